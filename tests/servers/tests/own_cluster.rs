//! A program that is a cluster of itself, as its user sees it: answers, exit codes, what is on standard error.
//!
//! The program is `own-cluster` of this package, a page around `cluster::run_with`.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// For what should happen at once. Generous: the machine may be busy.
const SOON: Duration = Duration::from_secs(60);

fn program(arguments: &[&str]) -> Command {
    #[expect(clippy::disallowed_methods, reason = "started as a user would")]
    let mut command = Command::new(env!("CARGO_BIN_EXE_own-cluster"));
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A program that serves, and where. Killed when dropped.
struct Serving {
    child: Child,
    at: SocketAddr,
}

impl Serving {
    fn start(variables: &[(&str, &str)]) -> Serving {
        // Free a moment ago. Somebody else may be faster, then the start fails and says so.
        let at = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let mut command = program(&["serve", &at.port().to_string()]);
        let child = command.envs(variables.iter().copied()).spawn().unwrap();
        let mut serving = Serving { child, at };
        while TcpStream::connect(at).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
            assert!(serving.child.try_wait().unwrap().is_none(), "it ended: {}", serving.errors());
            std::thread::sleep(Duration::from_millis(5));
        }
        serving
    }

    fn ask(&self) -> String {
        let mut answer = String::new();
        let mut stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&process, signal).unwrap();
    }

    fn errors(&mut self) -> String {
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        errors
    }

    /// Waits for the end; exit code and standard error.
    fn end(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        (code, self.errors())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It has ended already in a test that went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ended(arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = program(arguments).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_cluster_serves_and_ends_well_when_it_is_asked_to() {
    for signal in [Signal::TERM, Signal::INT] {
        let serving = Serving::start(&[]);
        assert_eq!(serving.ask(), "worker");
        serving.signal(signal);
        assert_eq!(serving.end(), (Some(0), String::new()));
    }
}

#[test]
fn the_same_program_runs_alone_when_it_is_told_to() {
    for signal in [Signal::TERM, Signal::INT] {
        let serving = Serving::start(&[("POLYFORK_STANDALONE", "1")]);
        assert_eq!(serving.ask(), "standalone");
        serving.signal(signal);
        assert_eq!(serving.end(), (Some(0), String::new()));
    }
}

#[test]
fn a_program_that_fails_in_every_worker_is_given_up() {
    let (code, errors) = ended(&["fail"]);
    assert_eq!(code, Some(8), "{errors}");
    for line in ["worker 1: this program was told to fail", "no worker ever got ready"] {
        assert!(errors.contains(line), "{errors}");
    }
    assert!(errors.lines().all(|line| line.starts_with("polyfork: ")), "{errors}");
}

#[test]
fn a_program_that_fails_alone_says_why() {
    let output = program(&["fail"]).env("POLYFORK_STANDALONE", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(errors, "polyfork: this program was told to fail\n");
}

#[test]
fn an_address_in_use_has_an_exit_code_of_its_own() {
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    let (code, errors) = ended(&["listen", &port]);
    assert_eq!(code, Some(5), "{errors}");
    assert!(errors.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{errors}");
}
