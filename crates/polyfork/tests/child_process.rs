//! Programs as children: started, spoken to, ended. One file per kind of promise.
//!
//! Helpers are tests of this program that others run as processes of their own; they are told what to do by the
//! environment and report by exit code or descriptor, because libtest writes to their standard output.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

#[path = "child_process/blocking.rs"]
mod blocking;
#[path = "child_process/ending.rs"]
mod ending;
#[path = "child_process/exec.rs"]
mod exec;
#[path = "child_process/faults.rs"]
mod faults;
#[path = "child_process/spawning.rs"]
mod spawning;
#[path = "child_process/streams.rs"]
mod streams;

use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use polyfork::child_process::{Child, Command, Event, Exit, Shell, Signal, Stdio};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// `what`, or a panic if it does not come.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it never came")
}

/// Waits until `what` holds; panics with its name otherwise.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// `sh -c script`. Should a test fail, nothing of it is left.
fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).parent_death_signal(Signal::KILL).stdin(Stdio::Ignore);
    command
}

/// The test named `name` of this program, to be run as a process of its own.
fn helper(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    command.parent_death_signal(Signal::KILL).stdin(Stdio::Ignore).stdout(Stdio::Ignore);
    command
}

async fn read_all(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon(stream.expect("a pipe").read_to_end(&mut bytes)).await.unwrap();
    bytes
}

async fn output(command: &mut Command) -> String {
    let mut child = command.stdout(Stdio::Pipe).spawn().unwrap();
    let text = String::from_utf8(read_all(child.stdout.take()).await).unwrap();
    let exit = soon(child.wait()).await.unwrap();
    assert!(exit.success(), "{exit:?}: {text}");
    text
}

async fn first_line(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut line = String::new();
    soon(BufReader::new(stream).read_line(&mut line)).await.unwrap();
    line.trim_end().to_owned()
}

/// The remaining events, by name.
async fn events(child: &mut Child) -> Vec<String> {
    let mut names = Vec::new();
    while let Some(event) = soon(child.next_event()).await {
        names.push(match event {
            Event::Spawn => "spawn".to_owned(),
            Event::Exit(exit) => format!("exit {}", shown(exit)),
            Event::Close(exit) => format!("close {}", shown(exit)),
            Event::Error(error) => format!("error {error}"),
            other => format!("{other:?}"),
        });
    }
    names
}

fn shown(exit: Exit) -> String {
    match exit {
        Exit { code: Some(code), signal: None } => code.to_string(),
        Exit { code: None, signal: Some(signal) } => signal.to_string(),
        other => format!("{other:?}"),
    }
}

/// A handle to a process that is not our child, by the number it told.
fn process(pid: &str) -> OwnedFd {
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    pidfd_open(pid, PidfdFlags::empty()).unwrap()
}

fn has_ended(pidfd: impl AsFd) -> bool {
    let mut poll = [PollFd::new(&pidfd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut poll, Some(&at_once)).unwrap() > 0
}

/// A process that is no child of ours any more is ended by whoever started it.
fn end(pidfd: impl AsFd) {
    let _ended = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn default_shell() -> Shell {
    Shell::Default
}
