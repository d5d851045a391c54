//! What several test programs need: children that can be looked at, and patience.

#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use polyfork_sys::spawn::{Child, Command};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};

/// Only a failing test waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `what` holds; panics with its name otherwise.
///
/// A look counts for a tenth of a second at most: when the whole machine stood still in between, nobody had the time
/// to do what is waited for.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let mut waited = Duration::ZERO;
    while !holds() {
        assert!(waited < PATIENCE, "never: {what}");
        let looked = Instant::now();
        std::thread::sleep(Duration::from_micros(200));
        waited += looked.elapsed().min(Duration::from_millis(100));
    }
}

/// Whether `fd` becomes readable (for a pidfd: the process ends) within `limit`.
pub(crate) fn readable_within(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    rustix::event::poll(&mut poll, Some(&limit)).unwrap() > 0
}

/// Runs a command to its end and returns what it wrote to its standard output.
pub(crate) fn output(mut command: Command) -> String {
    let (reader, writer) = pipe();
    command.fd(1, writer);
    let child = command.spawn().unwrap();
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    text
}

pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

/// `sh -c script`.
pub(crate) fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    // Should a test fail, nothing of it is left.
    command.arg("-c").arg(script).parent_death_signal(Some(Signal::KILL));
    command
}

/// A shell that stops itself as soon as it runs: it can be looked at in peace.
pub(crate) fn stopping_shell() -> Command {
    shell("kill -STOP $$")
}

pub(crate) fn wait_until_stopped(child: &Child) {
    until("the child stops", || {
        assert!(!readable_within(child.pidfd(), Duration::ZERO), "the child has ended");
        child.try_wait_stopped().unwrap().is_some()
    });
}

pub(crate) fn kill(child: &Child) {
    child.signal(Signal::KILL).unwrap();
    child.wait().unwrap();
}

/// The open descriptors of a process and what they stand for.
pub(crate) fn open_fds(pid: Pid) -> BTreeMap<i32, String> {
    let folder = format!("/proc/{}/fd", pid.as_raw_nonzero());
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let number = entry.file_name().to_str().unwrap().parse().unwrap();
        found.insert(number, std::fs::read_link(entry.path()).unwrap().display().to_string());
    }
    found
}

/// A field of `/proc/PID/status`.
pub(crate) fn status_field(pid: Pid, name: &str) -> String {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let text = std::fs::read_to_string(path).unwrap();
    let mut fields = text.lines().filter_map(|line| line.split_once(":\t"));
    fields.find(|(key, _)| *key == name).unwrap().1.trim().to_owned()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The test named `name` of this program, to be run as a process of its own.
///
/// libtest writes to its standard output, so helpers report by descriptor or exit code.
pub(crate) fn helper(name: &str) -> Command {
    helper_of(&std::env::current_exe().unwrap(), name)
}

/// As [`helper`], from a [`world_readable_copy`].
pub(crate) fn helper_in(copy: &tempfile::TempDir, name: &str) -> Command {
    helper_of(&copy.path().join("program"), name)
}

fn helper_of(program: &Path, name: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    command.null(1);
    command
}

/// This test program where any user may run it.
pub(crate) fn world_readable_copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(std::env::current_exe().unwrap(), folder.path().join("program")).unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    folder
}
