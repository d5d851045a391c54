//! Runs the command as a user does, reads what it tells, and leaves nothing behind.
//!
//! A test waits for events, never for time; [`PATIENCE`] only bounds a test that would hang, and is generous because
//! the machine may be busy.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A directory with programs, removed in the end.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        let place = tempfile::tempdir().expect("a directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Place(place)
    }

    /// A place with `server.js`, which answers with its slot, pid and connection count.
    pub(crate) fn with_server() -> Place {
        let place = Place::new();
        place.file("server.js", SERVER);
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).expect("a file");
        path
    }

    /// `polyfork`, in this directory and without our own settings.
    pub(crate) fn polyfork<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = command(env!("CARGO_BIN_EXE_polyfork"));
        command.args(args).current_dir(self.path()).stdin(Stdio::null());
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("POLYFORK_") || name == "WEB_CONCURRENCY" || name == "NO_COLOR" {
                command.env_remove(&key);
            }
        }
        // Apps of one test are none of another's, and none of the user's.
        command.env("POLYFORK_RUNTIME_DIR", self.path().join("runtime"));
        command.env("POLYFORK_LOG_DIR", self.path().join("logs"));
        command
    }

    /// Runs to the end: code, standard output, standard error.
    pub(crate) fn ends<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Ended {
        ended(self.polyfork(args))
    }

    /// Starts with `--json` and reads events.
    pub(crate) fn events<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Events {
        let mut words = vec![OsStr::new("run").to_owned(), OsStr::new("--json").to_owned()];
        words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        Events::of(self.polyfork(words))
    }
}

pub(crate) const SERVER: &str = "
const http = require('http');
let connections = 0;
const server = http.createServer((request, response) => {
  if (request.url === '/die') process.exit(3);
  response.end(JSON.stringify({ pid: process.pid, slot: process.env.NODE_APP_INSTANCE, connections }));
});
server.on('connection', () => connections += 1);
server.listen(Number(process.env.PORT || 0), '127.0.0.1');
";

/// A test that cannot run here says so, also to the list that the test command looks at.
pub(crate) fn skip(test: &str, reason: &str) {
    let line = format!("SKIP {test}: {reason}\n");
    print!("{line}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes())).expect("the skip log");
    }
}

/// Tests stand where a user's shell does, outside of what the rule is for.
#[allow(clippy::disallowed_methods, reason = "a test starts the command as a shell would")]
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    Command::new(program)
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

pub(crate) fn ended(command: Command) -> Ended {
    let mut running = Running::start(command);
    let out = running.take_out();
    let err = running.take_err();
    let out = std::thread::spawn(move || text(out));
    let err = text(err);
    let code = running.end().code();
    Ended { code, out: out.join().expect("a reader"), err }
}

fn text(mut from: impl Read) -> String {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).expect("output");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A running command; killed when the test lets go of it.
pub(crate) struct Running {
    child: Child,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Running {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
        Running { child }
    }

    /// Its standard input, if that is a pipe.
    pub(crate) fn take_in(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("standard input")
    }

    pub(crate) fn take_out(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("standard output")
    }

    pub(crate) fn take_err(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("standard error")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// By pidfd: the child cannot have been replaced by a stranger, it is not collected yet.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
        pidfd_send_signal(&pidfd, signal).expect("signal");
    }

    /// A signal that is not taken for an echo of the one before: those come within 100 ms of it.
    pub(crate) fn signal_again(&self, signal: Signal) {
        std::thread::sleep(Duration::from_millis(200));
        self.signal(signal);
    }

    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_some()
    }

    /// Waits for the end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        let limit = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            assert!(Instant::now() < limit, "polyfork did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, as a rule. Workers of a primary that is gone end by themselves.
        let _gone = self.child.kill();
        let _collected = self.child.wait();
    }
}

/// Lines of a stream, read by a thread.
pub(crate) struct Lines {
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
}

impl Lines {
    pub(crate) fn of(stream: impl Read + Send + 'static) -> Lines {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { return };
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
            }
        });
        Lines { lines, seen: Vec::new() }
    }

    /// The next line, of something that may take that long.
    pub(crate) fn next_within(&mut self, patience: Duration) -> String {
        self.line_within(patience).expect("a line")
    }

    /// The next line; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<String> {
        self.line_within(PATIENCE)
    }

    fn line_within(&mut self, patience: Duration) -> Option<String> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no line came; seen: {:#?}", self.seen),
        }
    }

    /// Reads until a line contains `part`.
    pub(crate) fn wait_for(&mut self, part: &str) -> String {
        while let Some(line) = self.next() {
            if line.contains(part) {
                return line;
            }
        }
        panic!("no line has {part:?}; seen: {:#?}", self.seen)
    }

    /// All that comes until the end.
    pub(crate) fn rest(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

/// A cluster that tells its events.
pub(crate) struct Events {
    pub(crate) running: Running,
    lines: Lines,
    errors: Lines,
    /// Read and not asked for yet.
    pending: VecDeque<Value>,
    pub(crate) seen: Vec<Value>,
}

impl Events {
    pub(crate) fn of(command: Command) -> Events {
        let mut running = Running::start(command);
        let lines = Lines::of(running.take_out());
        let errors = Lines::of(running.take_err());
        Events { running, lines, errors, pending: VecDeque::new(), seen: Vec::new() }
    }

    /// The next event; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Value> {
        if let Some(value) = self.pending.pop_front() {
            return Some(value);
        }
        let line = self.lines.next()?;
        let value: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        self.seen.push(value.clone());
        Some(value)
    }

    /// Reads on until an event of that name comes.
    pub(crate) fn wait_for(&mut self, name: &str) -> Value {
        self.wait_until(name, |_| true)
    }

    /// Reads on until an event of that name comes of which `wanted` is true.
    pub(crate) fn wait_until(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        while let Some(value) = self.next() {
            if value["event"] == name && wanted(&value) {
                return value;
            }
        }
        panic!("no {name}; seen: {:#?}\n{:#?}", self.seen, self.errors.rest())
    }

    /// The address the cluster listens on.
    pub(crate) fn address(&mut self) -> SocketAddr {
        let bound = self.wait_for("bound");
        bound["address"].as_str().expect("address").parse().expect("an address")
    }

    /// Waits for the end: exit code, and the event that told it.
    pub(crate) fn end(&mut self) -> (i32, Value) {
        let end = self.wait_for("end");
        let code = self.running.end().code().expect("a code");
        assert_eq!(end["exit_code"], code);
        assert!(self.next().is_none(), "`end` is the last line");
        (code, end)
    }

    /// Closes our end of its standard output, as a reader that went away.
    pub(crate) fn stop_reading(&mut self) {
        self.lines = Lines::of(std::io::empty());
    }

    /// What was written to standard error.
    pub(crate) fn errors(&mut self) -> String {
        self.errors.rest().join("\n")
    }
}

/// GET over a connection of its own; the body.
pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    // In one piece: a simple server answers the first it sees and closes.
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("ask");
    let answer = text(stream);
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("answer: {answer:?}"));
    body.to_owned()
}
