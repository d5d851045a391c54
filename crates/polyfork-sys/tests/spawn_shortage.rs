//! Starting a child when the system allows no further process, and when the parent dies in the middle of it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use common::*;
use polyfork_sys::spawn::{Command, Step};
use rustix::process::{Pid, Resource, Rlimit, Signal};

/// No other process of the machine runs as this user, so its limit counts ours alone.
const NOBODY_ELSE: u32 = 61_347;

fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        let line = format!("SKIP {test}: {reason}\n");
        log.and_then(|mut log| std::io::Write::write_all(&mut log, line.as_bytes())).unwrap();
    }
}

/// Cannot be started: the error says so, and nothing is left of the attempt. Once it can be, it is.
fn fails_whole_and_works_again(allow: impl FnOnce()) {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for bound in [false, true] {
        let (reader, writer) = pipe();
        let mut command = Command::new("/bin/echo");
        command.arg("it ran").null(0).fd(1, writer);
        command.parent_death_signal(bound.then_some(Signal::KILL));
        let error = command.spawn().unwrap_err();
        assert_eq!(error.step, Step::Clone, "{error}");
        assert_eq!(error.errno.raw_os_error(), Some(libc::EAGAIN), "{error}");
        // No half child: it would have the other end of the pipe, and would be ours.
        let mut text = String::new();
        std::io::Read::read_to_string(&mut fs::File::from(reader), &mut text).unwrap();
        assert_eq!(text, "");
        let left = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
        assert_eq!(left.unwrap_err(), rustix::io::Errno::CHILD, "a process is left");
    }
    assert_eq!(descriptors(), before, "a descriptor is left");
    allow();
    let mut command = Command::new("/bin/echo");
    command.arg("now");
    assert_eq!(output(command), "now\n");
}

/// The thread that starts bound children, and what else the first one brings along.
fn first_child() {
    let mut command = Command::new("/bin/true");
    command.parent_death_signal(Some(Signal::KILL));
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
fn fault_48_at_the_limit_of_processes_no_half_child_is_left() {
    if !is_root() {
        skip("fault_48_at_the_limit_of_processes_no_half_child_is_left", "starts as root");
        return;
    }
    let copy = world_readable_copy();
    let mut command = helper_in(&copy, "helper_is_at_its_limit_of_processes");
    command.uid(NOBODY_ELSE).gid(NOBODY_ELSE).groups(&[]);
    command.parent_death_signal(Some(Signal::KILL));
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by fault_48_at_the_limit_of_processes_no_half_child_is_left"]
fn helper_is_at_its_limit_of_processes() {
    first_child();
    let old = rustix::process::getrlimit(Resource::Nproc);
    let none = Rlimit { current: Some(1), maximum: old.maximum };
    rustix::process::setrlimit(Resource::Nproc, none).unwrap();
    fails_whole_and_works_again(|| rustix::process::setrlimit(Resource::Nproc, old).unwrap());
}

/// A control group of the old hierarchy that is removed again.
struct Group(PathBuf);

impl Group {
    fn new(controller: &str) -> Option<Group> {
        let parent = Path::new("/sys/fs/cgroup").join(controller);
        let path = parent.join(format!("polyfork-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Group(path))
    }

    fn set(&self, file: &str, value: &str) -> bool {
        fs::write(self.0.join(file), value).is_ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Left for the next boot if it is busy.
        let _busy = fs::remove_dir(&self.0);
    }
}

#[test]
fn fault_48_in_a_full_control_group_no_half_child_is_left() {
    let test = "fault_48_in_a_full_control_group_no_half_child_is_left";
    let Some(group) = Group::new("pids").filter(|group| group.set("pids.max", "max")) else {
        skip(test, "no pids controller that may be used");
        return;
    };
    let mut command = helper("helper_is_in_a_full_control_group");
    command.env("POLYFORK_TEST_GROUP", &group.0).parent_death_signal(Some(Signal::KILL));
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by fault_48_in_a_full_control_group_no_half_child_is_left"]
fn helper_is_in_a_full_control_group() {
    let group = PathBuf::from(std::env::var_os("POLYFORK_TEST_GROUP").unwrap());
    fs::write(group.join("cgroup.procs"), "0").unwrap();
    first_child();
    fs::write(group.join("pids.max"), "1").unwrap();
    fails_whole_and_works_again(|| fs::write(group.join("pids.max"), "max").unwrap());
}

/// The first child of a process, or of one of its threads.
fn child_of(pid: Pid) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).ok()?;
    let of_task = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).ok();
    let all = tasks.flatten().filter_map(of_task).collect::<String>();
    all.split_whitespace().next()?.parse().ok().and_then(Pid::from_raw)
}

/// The parent is killed while its child has been cloned and has not yet asked for its death signal: nobody would
/// ever send it. The child must see that by itself, and not start the program.
#[test]
fn fault_83_a_child_whose_parent_dies_before_it_is_bound_does_not_start() {
    let test = "fault_83_a_child_whose_parent_dies_before_it_is_bound_does_not_start";
    if !Path::new("/usr/bin/strace").exists() {
        skip(test, "strace is not installed");
        return;
    }
    let (reader, writer) = pipe();
    // The child stands before its prctl for as long as that takes to be seen, as a rule.
    let mut command = Command::new("/usr/bin/strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "--inject=prctl:delay_enter=3000000"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "helper_starts_a_bound_child", "--ignored", "--nocapture"]);
    command.arg("--test-threads=1").null(0).null(1).null(2).fd(3, writer);
    command.parent_death_signal(Some(Signal::KILL));
    let tracer = command.spawn().unwrap();
    // "157 0x1 ...": it stands at the entry of prctl(PR_SET_PDEATHSIG).
    let entry = format!("{} {:#x} ", libc::SYS_prctl, libc::PR_SET_PDEATHSIG);
    let mut seen = None;
    until("a child stands before its prctl", || {
        seen = child_of(tracer.pid()).and_then(|parent| Some((parent, child_of(parent)?)));
        let call = |(_, child): (Pid, Pid)| {
            fs::read_to_string(format!("/proc/{}/syscall", child.as_raw_nonzero())).ok()
        };
        seen.and_then(call).is_some_and(|call| call.starts_with(&entry))
    });
    let (parent, child) = seen.unwrap();
    let flags = rustix::process::PidfdFlags::empty();
    let child = rustix::process::pidfd_open(child, flags).unwrap();
    let parent = rustix::process::pidfd_open(parent, flags).unwrap();
    assert!(!readable_within(child.as_fd(), std::time::Duration::ZERO));
    rustix::process::pidfd_send_signal(&parent, Signal::KILL).unwrap();
    assert!(readable_within(child.as_fd(), PATIENCE), "the child lives on");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut fs::File::from(reader), &mut text).unwrap();
    assert_eq!(text, "", "the program was started");
    tracer.wait().unwrap();
}

#[test]
#[ignore = "run by fault_83_a_child_whose_parent_dies_before_it_is_bound_does_not_start"]
fn helper_starts_a_bound_child() {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo started >&3; exec sleep 1000"]).null(0).null(1).null(2);
    command.inherit_fd(3).parent_death_signal(Some(Signal::KILL));
    let child = command.spawn().unwrap();
    let _status = child.wait();
}
