//! What cannot be started is told by its step and errno, and leaves no process behind.
//!
//! The tests of this program run one after the other (a lock), so that each can check that this
//! process has no child at all.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::*;
use polyfork_sys::spawn::{Command, SpawnError, Step};
use rustix::process::Signal;

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails to start it, and checks what is left: no child, and no descriptor more than before.
fn failure(command: Command) -> SpawnError {
    // The first spawn of the process makes things that stay.
    Command::new("true").spawn().unwrap().wait().unwrap();
    let error = command.spawn().unwrap_err();
    let left = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
    assert_eq!(left.unwrap_err(), rustix::io::Errno::CHILD, "a process is left");
    error
}

fn errno(error: &SpawnError) -> i32 {
    error.errno.raw_os_error().unwrap_or(0)
}

fn file(folder: &Path, name: &str, text: &str, mode: u32) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    path
}

#[test]
fn a_missing_program_names_where_it_was_looked_for() {
    let _alone = alone();
    let mut command = Command::new("no-such-program");
    command.env("PATH", "/usr/bin:/bin:");
    let error = failure(command);
    assert_eq!((error.step, errno(&error)), (Step::Exec, libc::ENOENT));
    assert!(error.is_not_found());
    assert_eq!(
        error.to_string(),
        "cannot start \"no-such-program\": no such file or directory (looked in /usr/bin, /bin, .)"
    );
    let error = failure(Command::new("/nonexistent/program"));
    let text = "cannot start \"/nonexistent/program\": no such file or directory";
    assert_eq!(error.to_string(), text);
    assert_eq!(error.tried, [Path::new("/nonexistent/program")]);
    assert!(failure(Command::new("")).is_not_found());
}

#[test]
fn a_program_that_may_not_be_run_is_permission_denied() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "tool", "#!/bin/sh\n", 0o644);
    let error = failure(Command::new(&path));
    assert_eq!((error.step, errno(&error)), (Step::Exec, libc::EACCES));
    // Also when a later folder of the path does not have it at all.
    let mut command = Command::new("tool");
    command.env("PATH", format!("{}:/nonexistent", folder.path().display()));
    assert_eq!(errno(&failure(command)), libc::EACCES);
    assert_eq!(errno(&failure(Command::new(folder.path()))), libc::EACCES);
}

#[test]
fn a_file_that_is_no_program_is_not_given_to_a_shell() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "tool", "echo never\n", 0o755);
    let error = failure(Command::new(&path));
    assert_eq!((error.step, errno(&error)), (Step::Exec, libc::ENOEXEC));
    assert!(error.to_string().ends_with("neither an executable nor a script with a #! line)"));
}

#[test]
fn a_script_whose_interpreter_is_missing_says_so() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "tool", "#!/nonexistent/node\n", 0o755);
    let error = failure(Command::new(&path));
    assert_eq!(errno(&error), libc::ENOENT);
    let text = error.to_string();
    assert!(text.ends_with("exists, but the interpreter or loader it names does not)"), "{text}");
}

#[test]
fn too_many_arguments_are_told() {
    let _alone = alone();
    let mut command = Command::new("true");
    command.args(vec!["x".repeat(30_000); 100]);
    let error = failure(command);
    assert_eq!((error.step, errno(&error)), (Step::Exec, libc::E2BIG));
    assert_eq!(error.to_string(), "cannot start \"true\": argument list too long");
}

#[test]
fn a_missing_working_directory_is_named() {
    let _alone = alone();
    let mut command = Command::new("true");
    command.current_dir("/nonexistent/here");
    let error = failure(command);
    assert_eq!((error.step, errno(&error)), (Step::Chdir, libc::ENOENT));
    assert_eq!(
        error.to_string(),
        "cannot start \"true\": working directory \"/nonexistent/here\": no such file or directory"
    );
}

#[test]
fn descriptors_that_cannot_be_placed_are_named() {
    let _alone = alone();
    let (reader, _writer) = pipe();
    let mut command = Command::new("true");
    command.fd(i32::MAX - 1, reader);
    let error = failure(command);
    assert_eq!((error.step, errno(&error)), (Step::Fd(i32::MAX - 1), libc::EBADF));

    let closed = pipe().0.as_raw_fd();
    let mut command = Command::new("true");
    command.inherit_fd(closed);
    assert_eq!(failure(command).step, Step::Fd(closed));

    let mut command = Command::new("true");
    command.null(-1);
    assert_eq!(failure(command).step, Step::Input);
}

#[test]
fn the_highest_number_does_not_overflow() {
    let _alone = alone();
    let (reader, writer) = pipe();
    let number = writer.as_raw_fd();
    let mut command = Command::new("true");
    // A clash, so that a copy above the highest target is wanted.
    command.fd(i32::MAX, writer).fd(number, reader);
    assert!(matches!(failure(command).step, Step::Fd(_)));
}

#[test]
fn zero_bytes_and_bad_names_are_refused_before_a_process_exists() {
    let _alone = alone();
    let refused = |change: &dyn Fn(&mut Command)| {
        let mut command = Command::new("true");
        change(&mut command);
        let error = failure(command);
        assert_eq!(error.step, Step::Input);
        error.to_string()
    };
    assert_eq!(
        refused(&|command| {
            command.arg("a\0b");
        }),
        "cannot start \"true\": an argument contains a NUL byte"
    );
    assert!(
        refused(&|command| {
            command.env("A", "\0");
        })
        .contains("variable \"A\"")
    );
    assert!(
        refused(&|command| {
            command.env("A=B", "1");
        })
        .contains("\"A=B\" cannot name")
    );
    assert!(
        refused(&|command| {
            command.env("", "1");
        })
        .contains("\"\" cannot name")
    );
    assert!(
        refused(&|command| {
            command.pid_env("A=B");
        })
        .contains("cannot name")
    );
    assert!(
        refused(&|command| {
            command.current_dir("/\0");
        })
        .contains("working directory")
    );
    assert_eq!(failure(Command::new("a\0")).step, Step::Input);
}

#[test]
fn failures_leave_no_descriptor_open() {
    let _alone = alone();
    drop(failure(Command::new("no-such-program")));
    let me = rustix::process::getpid();
    let before = open_fds(me).len();
    for _ in 0..50 {
        let mut command = Command::new("no-such-program");
        command.fd(3, pipe().0).null(4);
        drop(failure(command));
    }
    assert_eq!(open_fds(me).len(), before);
}

/// The fault: a copy made by a bare fork has our memory but not the thread that starts some children. Its first thread
/// needs none; any other is told.
#[test]
fn in_a_process_made_by_fork_it_is_an_error_and_not_a_hang() {
    let _alone = alone();
    let bound = || {
        let mut command = Command::new("true");
        command.parent_death_signal(Some(Signal::TERM));
        command
    };
    bound().spawn().unwrap().wait().unwrap();
    let (first, other, unbound) = (bound(), bound(), Command::new("true"));
    let works = |command: Command| {
        command.spawn().is_ok_and(|child| child.wait().is_ok_and(|end| end.success()))
    };
    // SAFETY: the child calls spawn and starts a thread, which allocates (glibc keeps malloc usable after fork),
    // and leaves by _exit without running anything else of this program.
    match unsafe { libc::fork() } {
        0 => {
            let is_told = || other.spawn().is_err_and(|error| error.step == Step::Thread);
            let told = std::thread::spawn(is_told).join().is_ok_and(|told| told);
            let told = told && works(first) && works(unbound);
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(if told { 42 } else { 1 }) }
        }
        pid => {
            assert!(pid > 0);
            let pid = rustix::process::Pid::from_raw(pid);
            let options = rustix::process::WaitOptions::empty();
            let (_, status) = rustix::process::waitpid(pid, options).unwrap().unwrap();
            assert_eq!(status.exit_status(), Some(42));
        }
    }
}
