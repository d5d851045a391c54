//! The command and the machine it runs on: service managers, users and rights, containers, what `doctor` sees, what the
//! pages and units say. Each test has folders of its own; whatever it starts ends with it.
//!
//! Needs `node`, `python3` and `sh`, as the project's tests do; what needs root, `systemd-analyze` or `strace` says so when
//! it skips.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[allow(dead_code, reason = "a desk for other tests as well")]
#[path = "../operate/desk.rs"]
mod desk;
#[allow(dead_code, reason = "a load for other tests as well")]
#[path = "../faults/load.rs"]
mod load;
#[path = "../support/mod.rs"]
mod support;

mod container;
mod doctor;
mod environment;
mod identity;
mod manager;
mod pages;
mod service;
mod stopping;
mod store;
mod systemd;
