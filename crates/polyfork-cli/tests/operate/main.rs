//! Apps in the background: every verb as a user types it, with real programs, and what happens when it goes wrong.
//!
//! Needs `node`, `python3` and `sh`, as the project's tests do. Each test has a runtime folder and a log folder of its own;
//! whatever it starts ends with it.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "../support/mod.rs"]
mod support;

mod desk;

mod control;
mod faults;
mod full;
mod lifecycle;
mod logs;
