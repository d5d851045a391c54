//! Whether workers are well, as a user of the command has it: watchdogs, probes, control groups, and a primary that sleeps.
//!
//! Needs `node` and `python3`, as the project's tests do. What a single part promises is tested where it is; here is the whole.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "../support/mod.rs"]
mod support;

mod drain;
mod groups;
mod output;
mod signs;
mod sleep;

use std::fs;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Signals a process of a test.
fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
    pidfd_send_signal(&pidfd, signal).expect("signal");
}

/// A number of `/proc/PID/status`.
fn status_of(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect(field);
    line.trim_start_matches(':').trim().parse().expect("a number")
}
