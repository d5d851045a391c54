//! Another binary in the place of a running primary: under load, with everything it carries, and with everything that can be
//! wrong with it.
//!
//! Needs `node`, `python3` and `cc`, as the project's tests do. `POLYFORK_UPGRADE_REQUESTS=50000` makes the tests under load
//! long. Each test has a runtime folder and a log folder of its own; whatever it starts ends with it.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "../operate/desk.rs"]
#[allow(dead_code, reason = "these tests use their part")]
mod desk;
#[path = "../faults/load.rs"]
mod load;
#[path = "../metrics/scrape.rs"]
#[allow(dead_code, reason = "these tests use their part")]
mod scrape;
#[path = "../support/mod.rs"]
mod support;

mod app;
mod around;
mod carried;
mod kept;
mod refused;
mod under_load;
