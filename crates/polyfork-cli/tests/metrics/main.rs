//! Metrics and `top`, as whoever scrapes or watches sees them, with real programs.
//!
//! Needs `node`, and prom-client from where `cargo xtask setup` puts it. Each test has a runtime folder of its own; whatever
//! it starts ends with it.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../operate/desk.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod desk;

mod scrape;

mod faults;
mod own;
mod programs;
mod top;
