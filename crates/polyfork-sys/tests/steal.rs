//! What a process has not read from its channel can be taken back, whatever it is doing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use common::*;
use polyfork_sys::channel::{self, FdKind};
use polyfork_sys::spawn::{Child, Command};
use polyfork_sys::steal::{self, StealError, Unread};
use rustix::process::Signal;

/// A child with a channel at descriptor 3.
struct Victim {
    child: Child,
    ours: OwnedFd,
    cookie: u64,
}

fn start(mut command: Command) -> Victim {
    let (ours, theirs) = channel::pair().unwrap();
    let cookie = channel::cookie(theirs.as_fd()).unwrap();
    command.fd(3, theirs);
    Victim { child: command.spawn().unwrap(), ours, cookie }
}

/// Sends `count` messages with one pipe each; gives the ends by which the pipes can be known.
fn send_pipes(victim: &Victim, count: u8) -> Vec<OwnedFd> {
    let send = |index| {
        let (reader, writer) = pipe();
        let message = [index; 5];
        channel::send(victim.ours.as_fd(), &message, &[reader.as_fd()]).unwrap();
        writer
    };
    (0..count).map(send).collect()
}

/// Checks that bytes and pipes have all come back, in order, and belong together.
fn check(unread: Unread, writers: Vec<OwnedFd>) {
    let count = writers.len();
    let expected: Vec<u8> = (0..count as u8).flat_map(|index| [index; 5]).collect();
    assert_eq!(unread.bytes, expected);
    assert_eq!(unread.fds.len(), count);
    assert!(unread.chunks.iter().all(|chunk| chunk.bytes == 5 && chunk.fds == 1));
    assert!(!unread.ended && !unread.disturbed);
    for (reader, writer) in unread.fds.into_iter().zip(writers) {
        rustix::io::write(&writer, b"mine").unwrap();
        drop(writer);
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "mine");
    }
}

fn steal(victim: &Victim) -> Unread {
    let (pidfd, pid) = (victim.child.pidfd(), victim.child.pid());
    steal::unread_checked(pidfd, pid, 3, Some(victim.cookie)).unwrap()
}

/// A process that reads lines from its channel when told by SIGUSR1, and never otherwise.
fn sleeper() -> Victim {
    let script = "trap 'read line <&3; echo \"got $line\" >&3' USR1; echo ready >&3; \
                  while :; do sleep 0.01; done";
    let victim = start(shell(script));
    expect_line(&victim, "ready\n");
    victim
}

fn expect_line(victim: &Victim, expected: &str) {
    assert!(readable_within(victim.ours.as_fd(), PATIENCE));
    let mut buffer = [0; 64];
    let mut fds = Default::default();
    let received = channel::receive(victim.ours.as_fd(), &mut buffer, &mut fds).unwrap();
    assert_eq!(String::from_utf8_lossy(&buffer[..received.len]), expected);
}

/// Later writes still arrive and are answered.
fn check_alive(victim: &Victim) {
    channel::send(victim.ours.as_fd(), b"later\n", &[]).unwrap();
    victim.child.signal(Signal::USR1).unwrap();
    expect_line(victim, "got later\n");
}

#[test]
fn all_that_a_child_never_read_comes_back_and_it_goes_on() {
    let victim = sleeper();
    let writers = send_pipes(&victim, 40);
    let unread = steal(&victim);
    assert!(!unread.was_stopped);
    check(unread, writers);
    assert!(steal(&victim).bytes.is_empty());
    check_alive(&victim);
    kill(&victim.child);
}

#[test]
fn a_stopped_child_stays_stopped() {
    let victim = sleeper();
    victim.child.signal(Signal::STOP).unwrap();
    wait_until_stopped(&victim.child);
    let writers = send_pipes(&victim, 8);
    let unread = steal(&victim);
    assert!(unread.was_stopped);
    check(unread, writers);
    assert_eq!(victim.child.try_wait_stopped().unwrap(), Some(libc::SIGSTOP));
    victim.child.signal(Signal::CONT).unwrap();
    check_alive(&victim);
    kill(&victim.child);
}

#[test]
fn a_spinning_child_is_robbed_too() {
    let victim = start(shell("echo ready >&3; while :; do :; done"));
    expect_line(&victim, "ready\n");
    for _ in 0..50 {
        let writers = send_pipes(&victim, 4);
        check(steal(&victim), writers);
    }
    kill(&victim.child);
}

#[test]
fn a_child_blocked_in_its_read_goes_on_waiting() {
    let victim = start(shell("echo ready >&3; read line <&3; echo \"got $line\" >&3"));
    expect_line(&victim, "ready\n");
    for _ in 0..20 {
        assert!(steal(&victim).bytes.is_empty());
    }
    channel::send(victim.ours.as_fd(), b"at last\n", &[]).unwrap();
    expect_line(&victim, "got at last\n");
    victim.child.wait().unwrap();
}

/// The kernel moves on while we take: what was read is gone from the socket, what was not is ours.
#[test]
fn with_a_child_that_reads_meanwhile_nothing_is_lost_or_doubled() {
    let victim = start(shell("echo ready >&3; exec dd bs=1 of=/dev/fd/4 status=none <&3"));
    // dd copies to a pipe, byte by byte; only its end of the pipe stays open.
    kill(&victim.child);
    let (copied, out) = pipe();
    let mut command = shell("exec dd bs=1 status=none <&3 >&4");
    command.fd(4, out);
    let victim = start(command);
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::from(copied).read_to_end(&mut bytes).unwrap();
        bytes
    });
    let mut stolen = Vec::new();
    let mut sent: u32 = 0;
    let started = std::time::Instant::now();
    while sent < 2000 && started.elapsed() < PATIENCE {
        for _ in 0..20 {
            channel::send(victim.ours.as_fd(), &sent.to_be_bytes(), &[]).unwrap();
            sent += 1;
        }
        stolen.extend(steal(&victim).bytes);
    }
    rustix::net::shutdown(&victim.ours, rustix::net::Shutdown::Write).unwrap();
    victim.child.wait().unwrap();
    let read = reader.join().unwrap();
    println!("{} bytes read by the child, {} taken back", read.len(), stolen.len());
    assert_eq!(read.len() + stolen.len(), 4 * sent as usize);
    // Every byte on exactly one side: together they are the numbers, each byte place as a multiset.
    let mut both: Vec<u8> = read.into_iter().chain(stolen).collect();
    let mut all: Vec<u8> = (0..sent).flat_map(u32::to_be_bytes).collect();
    both.sort_unstable();
    all.sort_unstable();
    assert_eq!(both, all);
}

#[test]
fn the_end_of_our_side_is_seen() {
    let victim = sleeper();
    channel::send(victim.ours.as_fd(), b"last words", &[]).unwrap();
    rustix::net::shutdown(&victim.ours, rustix::net::Shutdown::Write).unwrap();
    let unread = steal(&victim);
    assert_eq!((unread.bytes.as_slice(), unread.ended), (&b"last words"[..], true));
    kill(&victim.child);
}

#[test]
fn a_pidfd_alone_is_enough() {
    let victim = sleeper();
    let writers = send_pipes(&victim, 2);
    check(channel::steal_unread(victim.child.pidfd(), 3).unwrap(), writers);
    kill(&victim.child);
}

#[test]
fn another_socket_under_the_number_is_left_alone() {
    let victim = sleeper();
    let (stranger, other) = UnixStream::pair().unwrap();
    let theirs = channel::cookie(other.as_fd()).unwrap();
    channel::send(victim.ours.as_fd(), b"keep\n", &[]).unwrap();
    let (pidfd, pid) = (victim.child.pidfd(), victim.child.pid());
    let error = steal::unread_checked(pidfd, pid, 3, Some(theirs)).unwrap_err();
    assert!(matches!(error, StealError::NotTheChannel { kind: FdKind::UnixStream, .. }), "{error}");
    let error = steal::unread(pidfd, pid, 0).unwrap_err();
    assert!(matches!(error, StealError::NotTheChannel { number: 0, .. }), "{error}");
    let error = steal::unread(pidfd, pid, 77).unwrap_err();
    assert_eq!(error.to_string(), format!("process {} has no descriptor 77", pid.as_raw_nonzero()));
    // It was let go each time, and nothing was taken.
    victim.child.signal(Signal::USR1).unwrap();
    expect_line(&victim, "got keep\n");
    kill(&victim.child);
    drop(stranger);
}

#[test]
fn a_process_that_has_ended_is_gone() {
    let victim = sleeper();
    victim.child.signal(Signal::KILL).unwrap();
    assert!(readable_within(victim.child.pidfd(), PATIENCE));
    let (pidfd, pid) = (victim.child.pidfd(), victim.child.pid());
    let gone = |error: &StealError| matches!(error, StealError::Gone(_));
    assert!(gone(&steal::unread(pidfd, pid, 3).unwrap_err()));
    victim.child.wait().unwrap();
    assert!(gone(&steal::unread(pidfd, pid, 3).unwrap_err()));
}

#[test]
fn without_the_right_to_look_into_the_process_it_is_a_distinct_error() {
    if !is_root() {
        println!("skipped: starts as root");
        return;
    }
    let copy = world_readable_copy();
    let victim = sleeper();
    let mut command = helper_in(&copy, "helper_steals_from_a_stranger");
    command.env("VICTIM", victim.child.pid().as_raw_nonzero().to_string());
    command.fd(3, victim.child.pidfd().try_clone_to_owned().unwrap());
    command.uid(65534).gid(65534).groups(&[]);
    assert!(command.spawn().unwrap().wait().unwrap().success());
    check_alive(&victim);
    kill(&victim.child);
}

#[test]
#[ignore = "run by without_the_right_to_look_into_the_process_it_is_a_distinct_error"]
fn helper_steals_from_a_stranger() {
    let pid = std::env::var("VICTIM").unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    // SAFETY: number 3 was given to this process as a pidfd, and nobody else here owns it.
    let pidfd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(3) };
    let error = steal::unread(pidfd.as_fd(), pid, 3).unwrap_err();
    assert!(matches!(error, StealError::NotPermitted { .. }), "{error:?}");
}
