//! A user at a terminal, with a runtime folder of their own.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::support::{Ended, PATIENCE, Place, ended};

/// A place, and what was started there; killed in the end.
pub(crate) struct Desk {
    pub(crate) place: Place,
    primaries: Vec<OwnedFd>,
}

impl Desk {
    /// With `server.js` of the test support.
    pub(crate) fn new() -> Desk {
        Desk { place: Place::with_server(), primaries: Vec::new() }
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.place.path().join("runtime")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.place.path().join("logs")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.place.polyfork(args)
    }

    /// Runs a verb to its end.
    pub(crate) fn does(&self, args: &[&str]) -> Ended {
        self.place.ends(args)
    }

    /// Runs a verb that must do it; what it wrote to standard output.
    pub(crate) fn did(&self, args: &[&str]) -> String {
        let done = self.does(args);
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}");
        done.out
    }

    /// Runs a verb that must not do it, with this exit code; what it complained of.
    pub(crate) fn refuses(&self, args: &[&str], code: i32) -> String {
        let done = self.does(args);
        assert_eq!(done.code, Some(code), "{args:?}: {done:?}");
        assert!(done.err.starts_with("polyfork: "), "{args:?}: {:?}", done.err);
        assert!(!done.err.contains("os error") && !done.err.contains('\x1b'), "{:?}", done.err);
        done.err
    }

    /// A verb's answer as JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        read(&self.did(args))
    }

    /// Starts an app; what `start --json` tells.
    pub(crate) fn start(&mut self, args: &[&str]) -> Value {
        let args = [&["start", "--json"], args].concat();
        let done = self.does(&args);
        self.started(&args, done)
    }

    /// Notes what a command has started.
    pub(crate) fn started(&mut self, args: &[&str], done: Ended) -> Value {
        assert_eq!(done.code, Some(0), "{args:?}: {done:?}");
        let app = read(&done.out);
        self.adopt(&app);
        app
    }

    /// Ends it with the test.
    pub(crate) fn adopt(&mut self, app: &Value) {
        self.primaries.push(pidfd(app["pid"].as_u64().expect("a pid")));
    }

    pub(crate) fn status(&self, name: &str) -> Value {
        self.json(&["status", "--json", name])
    }

    /// The apps that `ls` shows, by name and state.
    pub(crate) fn listed(&self) -> Vec<(String, String)> {
        let list = self.json(&["ls", "--json"]);
        let text = |app: &Value, field: &str| app[field].as_str().expect(field).to_owned();
        let apps = list.as_array().expect("an array");
        apps.iter().map(|app| (text(app, "name"), text(app, "state"))).collect()
    }

    /// Where a Node app listens.
    pub(crate) fn address(app: &Value) -> std::net::SocketAddr {
        app["listeners"][0].as_str().expect("a listener").parse().expect("an address")
    }

    /// A raw connection to an app's control socket.
    pub(crate) fn socket(&self, name: &str) -> UnixStream {
        let stream = UnixStream::connect(self.runtime().join(name).join("control"));
        let stream = stream.expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        for primary in &self.primaries {
            // Most have been stopped. Workers go when their primary does.
            let _gone = pidfd_send_signal(primary, Signal::KILL);
        }
    }
}

pub(crate) fn pidfd(pid: u64) -> OwnedFd {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    pidfd_open(pid, PidfdFlags::empty()).expect("pidfd")
}

/// Waits for the end of a process that is none of our children.
pub(crate) fn is_over(pidfd: &OwnedFd) -> bool {
    let mut wait = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut wait, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })).expect("poll") > 0
}

pub(crate) fn signal(pidfd: &OwnedFd, signal: Signal) {
    pidfd_send_signal(pidfd, signal).expect("signal");
}

pub(crate) fn read(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:.500}"))
}

/// Looks until it is so.
pub(crate) fn eventually<T: std::fmt::Debug>(
    what: &str,
    mut look: impl FnMut() -> T,
    mut is_so: impl FnMut(&T) -> bool,
) -> T {
    let limit = Instant::now() + PATIENCE;
    loop {
        let seen = look();
        if is_so(&seen) {
            return seen;
        }
        if Instant::now() >= limit {
            let seen = format!("{seen:?}");
            panic!("{what}: still {seen:.500} ({} bytes)", seen.len());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a verb from a line of shell, in which it is `"$@"`.
pub(crate) fn shell(desk: &Desk, script: &str, args: &[&str]) -> Ended {
    let polyfork = desk.command(args);
    let mut command = super::support::command("sh");
    command.arg("-c").arg(script).arg("sh").arg(polyfork.get_program()).args(polyfork.get_args());
    command.current_dir(desk.place.path()).stdin(std::process::Stdio::null());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    ended(command)
}
