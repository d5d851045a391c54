//! Ending a child with all it started: by its group, by its control group, and signals by number.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};

use common::*;
use polyfork_sys::spawn::{Cgroup, Child, Command, send_group_signal, send_signal};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

/// Starts `script`, which writes the pid of one process it leaves behind; gives the child and that process.
fn with_grandchild(mut command: Command) -> (Child, OwnedFd) {
    let (reader, writer) = pipe();
    command.fd(1, writer);
    let child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(File::from(reader)).read_line(&mut line).unwrap();
    let pid = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
    (child, pidfd_open(pid, PidfdFlags::empty()).unwrap())
}

#[test]
fn signals_are_sent_by_number_real_time_ones_too() {
    let child = shell("exec sleep 1000").spawn().unwrap();
    send_signal(child.pidfd(), 0).unwrap();
    assert_eq!(errno(send_signal(child.pidfd(), 65)), Some(libc::EINVAL));
    assert_eq!(errno(send_signal(child.pidfd(), -1)), Some(libc::EINVAL));
    assert_eq!(errno(send_signal(child.pidfd(), 32)), Some(libc::EINVAL));
    send_signal(child.pidfd(), libc::SIGRTMIN() + 1).unwrap();
    let status = child.wait().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    assert_eq!(signal, Some(libc::SIGRTMIN() + 1));
    assert_eq!(errno(send_signal(child.pidfd(), 0)), Some(libc::ESRCH));
}

#[test]
fn a_group_is_reached_after_its_leader_was_collected() {
    let mut command = shell("sleep 1000 & echo $!");
    command.process_group(true);
    let (child, grandchild) = with_grandchild(command);
    child.wait().unwrap();
    match send_group_signal(child.pidfd(), libc::SIGKILL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("skipped: the kernel is older than 6.9");
            rustix::process::pidfd_send_signal(&grandchild, rustix::process::Signal::KILL).unwrap();
            return;
        }
        other => other.unwrap(),
    }
    assert!(readable_within(grandchild.as_fd(), PATIENCE));
    // One that never had anybody else in it; above, whoever adopted the grandchild may let it lie about.
    let mut command = shell("exit 0");
    command.process_group(true);
    let child = command.spawn().unwrap();
    child.wait().unwrap();
    assert_eq!(errno(send_group_signal(child.pidfd(), 0)), Some(libc::ESRCH));
}

#[test]
fn a_control_group_holds_even_what_made_its_own_session() {
    let group = match Cgroup::create() {
        Ok(group) => group,
        Err(error) => {
            println!("skipped: no control group of our own: {error}");
            return;
        }
    };
    assert!(group.is_empty().unwrap());
    let mut command = shell("setsid sleep 1000 & echo $!; sleep 1000");
    command.enter_cgroup(group.door().unwrap());
    let (child, grandchild) = with_grandchild(command);
    assert!(!group.is_empty().unwrap());
    assert_eq!(errno(group.remove()), Some(libc::EBUSY));
    group.kill().unwrap();
    child.wait().unwrap();
    assert!(readable_within(grandchild.as_fd(), PATIENCE));
    until("the group is empty", || group.is_empty().unwrap());
    let path = group.path().to_owned();
    until("the folder can go", || group.remove().is_ok());
    assert!(!path.exists());
    group.remove().unwrap();
}
