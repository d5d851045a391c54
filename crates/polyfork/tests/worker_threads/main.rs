//! Worker threads: ports, workers, broadcast, what is inherited, and what may go wrong.
//!
//! `faults` has a test for each row of the list of faults that concerns threads. `roles` are no tests: they are
//! what this program does when it is started as a child, by those tests that end or exhaust their process.
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

mod broadcast;
mod environment;
mod faults;
mod places;
mod ports;
mod roles;
mod sharing;
mod support;
mod workers;
