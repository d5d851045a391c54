//! Configuration files as their users have them: read, checked, applied, and read again by apps that run.
//!
//! Needs `node` and `sh`, as the project's tests do. Each test has a folder of its own; whatever it starts ends with it.

#![allow(clippy::print_stdout, reason = "tests print what they skip")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../operate/desk.rs"]
#[allow(dead_code, reason = "shared with the tests of the verbs; each uses its part")]
mod desk;

mod apply;
mod check;
mod ends;
mod pm2;
mod reload;
mod start;

/// Answers with what it was started with, and its version.
pub(crate) const TELLS: &str = "
require('http').createServer((request, response) => {
  const { COLOUR, NODE_APP_INSTANCE, INSTANCE_ID, BASE } = process.env;
  response.end(JSON.stringify({ version: 1, pid: process.pid, COLOUR, NODE_APP_INSTANCE, INSTANCE_ID, BASE, argv: process.argv.slice(2) }));
}).listen(0, '127.0.0.1');
";

/// What an app answers.
pub(crate) fn answer(app: &serde_json::Value) -> serde_json::Value {
    desk::read(&support::get(desk::Desk::address(app), "/"))
}
