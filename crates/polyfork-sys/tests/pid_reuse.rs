//! A process id that is given to a stranger: signals for its former owner do not reach it.
//!
//! The fault: a supervisor keeps a number, the process behind it ends, the kernel gives the number to somebody else,
//! and the supervisor kills that one. Here it is made to happen, in a pid namespace of its own, by telling the kernel
//! where to go on counting (`/proc/sys/kernel/ns_last_pid`, proc(5)).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::*;
use polyfork_sys::spawn::{Child, Command};
use rustix::process::Signal;

/// The number the kernel gave out last in the caller's pid namespace.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
/// A thread started in between takes the number; then it is tried again.
const ATTEMPTS: usize = 100;

#[test]
fn fault_77_a_signal_for_an_ended_child_spares_the_stranger_with_its_number() {
    if !is_root() || !Path::new(LAST_PID).exists() {
        println!("skipped: needs root and a kernel with {LAST_PID}");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "helper_meets_its_number_again", "--ignored", "--nocapture"]);
    command.arg("--test-threads=1").null(1).parent_death_signal(Some(Signal::KILL));
    let status = command.spawn().unwrap().wait().unwrap();
    assert!(status.success(), "{status}");
}

fn sleeper() -> Child {
    let mut command = Command::new("sleep");
    command.arg("1000").parent_death_signal(Some(Signal::KILL));
    command.spawn().unwrap()
}

/// A process with the same number as one that has been collected.
fn stranger_with_the_number_of(gone: &Child) -> Child {
    let before = gone.pid().as_raw_nonzero().get() - 1;
    for _ in 0..ATTEMPTS {
        std::fs::write(LAST_PID, before.to_string()).unwrap();
        let child = sleeper();
        if child.pid() == gone.pid() {
            return child;
        }
        kill(&child);
    }
    panic!("the number was never given out again");
}

#[test]
#[ignore = "run by fault_77_a_signal_for_an_ended_child_spares_the_stranger_with_its_number"]
fn helper_meets_its_number_again() {
    // Not the number after ours: the thread that starts children came first.
    let gone = sleeper();
    kill(&gone);
    let stranger = stranger_with_the_number_of(&gone);
    assert_eq!(stranger.pid(), gone.pid());
    // The number itself leads to the stranger: signal 0 finds somebody.
    rustix::process::test_kill_process(gone.pid()).unwrap();
    for signal in [Signal::TERM, Signal::KILL, Signal::STOP] {
        let error = gone.signal(signal).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "{signal:?}");
    }
    assert!(!readable_within(stranger.pidfd(), Duration::from_millis(100)), "the stranger died");
    assert!(stranger.try_wait_stopped().unwrap().is_none(), "the stranger was stopped");
    kill(&stranger);
}
