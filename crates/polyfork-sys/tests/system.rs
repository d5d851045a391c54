//! What the machine grants, and strangers' ends.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::os::fd::AsRawFd;

use common::*;
use polyfork_sys::spawn::Command;
use polyfork_sys::system;
use rustix::process::Pid;

#[test]
fn parallelism_is_at_least_one_and_explained() {
    let found = system::available_parallelism();
    println!("{found:?}");
    assert!(found.cpus >= 1 && found.cpus <= found.affinity);
    assert!(!found.explain.is_empty());
}

#[test]
fn affinity_limits_parallelism() {
    let mut command = helper("helper_has_one_processor");
    command.env("POLYFORK_TEST", "1");
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by affinity_limits_parallelism"]
fn helper_has_one_processor() {
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    let first = (0..1024).find(|cpu| all.is_set(*cpu)).unwrap();
    let mut one = rustix::thread::CpuSet::new();
    one.set(first);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let found = system::available_parallelism();
    assert_eq!((found.cpus, found.affinity), (1, 1));
}

#[test]
fn resident_memory_is_told_in_bytes() {
    let mine = system::resident_bytes(rustix::process::getpid()).unwrap();
    assert!((100_000..1 << 34).contains(&mine), "{mine}");
    let missing = Pid::from_raw(i32::MAX).unwrap();
    assert_eq!(system::resident_bytes(missing).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

#[test]
fn the_monotonic_clock_does_not_go_back() {
    let first = system::now_monotonic();
    assert!(system::now_monotonic() >= first);
}

#[test]
fn inherited_descriptors_are_those_without_close_on_exec() {
    let (kept, closed) = pipe();
    let careless = rustix::io::dup(&kept).unwrap();
    let found = system::inherited_fds();
    assert!(found.contains(&careless.as_raw_fd()));
    assert!(!found.contains(&kept.as_raw_fd()) && !found.contains(&closed.as_raw_fd()));
    assert!(found.iter().all(|number| *number >= 3));
}

#[test]
fn only_what_was_inherited_is_taken_over_and_only_once() {
    let (own, other) = pipe();
    assert!(system::take_inherited_fd(own.as_raw_fd()).is_err(), "it has an owner");
    assert!(system::take_inherited_fd(1).is_err());
    let closed = other.as_raw_fd();
    drop(other);
    assert!(system::take_inherited_fd(closed).is_err());
    // As exec leaves it: open, without the flag, and nobody's.
    let inherited = std::os::fd::IntoRawFd::into_raw_fd(rustix::io::dup(&own).unwrap());
    let taken = system::take_inherited_fd(inherited).unwrap();
    assert!(rustix::io::fcntl_getfd(&taken).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    drop(taken);
    assert!(system::take_inherited_fd(inherited).is_err());
}

/// As process 1 does: orphans are given to us, and ended ones of both kinds lie about in any order.
#[test]
fn orphans_are_collected_and_our_own_children_are_not() {
    assert!(helper("helper_adopts_orphans").spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by orphans_are_collected_and_our_own_children_are_not"]
fn helper_adopts_orphans() {
    // SAFETY: makes this process the parent of its descendants' orphans; no pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
    assert!(!system::is_pid_one());
    assert!(system::reap_strangers(&|_| false).is_empty());
    let ours: Vec<_> = (0..3)
        .map(|_| {
            let child = Command::new("true").spawn().unwrap();
            assert!(readable_within(child.pidfd(), PATIENCE));
            child
        })
        .collect();
    let expected = 50;
    // Each shell leaves a grandchild behind that ends later with code 5.
    for _ in 0..expected {
        let child = shell("(sleep 0.01; exit 5) & exit 0").spawn().unwrap();
        child.wait().unwrap();
    }
    let is_ours = |pid: Pid| ours.iter().any(|child| child.pid() == pid);
    let mut reaped = Vec::new();
    until("all orphans are collected", || {
        reaped.extend(system::reap_strangers(&is_ours));
        reaped.len() >= expected
    });
    assert!(reaped.iter().all(|(pid, status)| !is_ours(*pid) && status.code() == Some(5)));
    for child in &ours {
        assert!(child.try_wait().unwrap().unwrap().success());
    }
    assert!(system::reap_strangers(&|_| false).is_empty());
}
