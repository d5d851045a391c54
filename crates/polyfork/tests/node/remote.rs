//! A primary in a process of its own, told what to do over its standard input.
//!
//! Two of them speak the same lines: Node's own primary (`tests/node-apps/stock-primary.cjs`), to compare with,
//! and ours, which is this test program started again with [`ROLE`] set. The second is for what cannot be had in
//! a process with other tests: descriptors that it inherited, and its death.
//!
//! The rule that surprises: the second one is a test, too, that does nothing unless it is told to.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use polyfork_sys::spawn::{Child, Command};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::pipe;

use super::support::{Mode, PATIENCE, Rig, Runtime, Thrown, app, block_on, find};

/// Says that this process is such a primary: the runtime and the mode, as `node20 Kernel`.
const ROLE: &str = "POLYFORK_TEST_PRIMARY";

/// The user who owns nothing, on every Linux.
pub(crate) const NOBODY: u32 = 65534;

/// The other process. Dropped, it is killed.
pub(crate) struct Remote {
    child: Child,
    input: Option<pipe::Sender>,
    output: BufReader<pipe::Receiver>,
    next: AtomicU64,
    /// Answers that came while another one was waited for.
    early: Mutex<Vec<Value>>,
}

impl Remote {
    /// Node's own primary.
    pub(crate) fn stock(runtime: &Runtime, policy: &str) -> Remote {
        let mut command = Command::new(&runtime.path);
        command.arg(app("stock-primary.cjs")).arg(app("actor.cjs"));
        command.env("NODE_CLUSTER_SCHED_POLICY", policy);
        Remote::start(command)
    }

    /// A cluster of ours, with these descriptors inherited.
    pub(crate) fn ours(
        runtime: &Runtime,
        mode: Mode,
        inherited: impl IntoIterator<Item = (i32, OwnedFd)>,
    ) -> Remote {
        let mut command = Remote::command(runtime, mode);
        for (number, fd) in inherited {
            command.fd(number, fd);
        }
        Remote::start(command)
    }

    /// A cluster of ours, run by a user who may do nothing special. `cache` is a folder of that user's.
    pub(crate) fn unprivileged(runtime: &Runtime, mode: Mode, cache: &Path) -> Remote {
        let mut command = Remote::command(runtime, mode);
        command.uid(NOBODY).gid(NOBODY).groups(&[]).env("XDG_CACHE_HOME", cache);
        command.env("NODE_OPTIONS", "--stack-trace-limit=33");
        Remote::start(command)
    }

    fn command(runtime: &Runtime, mode: Mode) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["remote::plays_the_primary", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, format!("{} {mode:?}", runtime.name));
        command
    }

    fn start(mut command: Command) -> Remote {
        let (their_input, input) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
        let (output, their_output) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
        command.fd(0, their_input).fd(1, their_output).parent_death_signal(Some(Signal::KILL));
        let child = command.spawn().expect("a process");
        for end in [&input, &output] {
            polyfork_sys::channel::set_nonblocking(end.as_fd(), true).expect("set");
        }
        Remote {
            child,
            input: Some(pipe::Sender::from_owned_fd(input).expect("a pipe")),
            output: BufReader::new(pipe::Receiver::from_owned_fd(output).expect("a pipe")),
            next: AtomicU64::new(1),
            early: Mutex::default(),
        }
    }

    /// Starts a worker; gives its id.
    pub(crate) async fn fork(&mut self) -> u64 {
        let id = self.ask(json!({ "do": "fork" })).await.expect("a worker");
        id.as_u64().expect("its id")
    }

    /// As [`Rig::try_js`].
    pub(crate) async fn try_js(&mut self, worker: u64, code: &str) -> Result<Value, Thrown> {
        self.ask(json!({ "do": "js", "worker": worker, "code": code })).await
    }

    /// As [`Rig::js`].
    pub(crate) async fn js(&mut self, worker: u64, code: &str) -> Value {
        self.try_js(worker, code).await.unwrap_or_else(|e| panic!("{code} threw {e:?}"))
    }

    /// Tells the process something that it does not answer.
    pub(crate) async fn tell(&mut self, mut command: Value) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        command["id"] = json!(id);
        let input = self.input.as_mut().expect("its input is open");
        input.write_all(format!("{command}\n").as_bytes()).await.expect("it lives");
        id
    }

    /// How connections reach a worker's first listener, once it listens.
    pub(crate) async fn carried(&mut self, worker: u64) -> Value {
        self.ask(json!({ "do": "carried", "worker": worker })).await.expect("an answer")
    }

    async fn ask(&mut self, command: Value) -> Result<Value, Thrown> {
        let id = self.tell(command).await;
        let answer = tokio::time::timeout(PATIENCE, self.answer(id)).await;
        let mut answer = answer.expect("an answer in time");
        match answer.get("error").filter(|error| !error.is_null()) {
            Some(error) => Err(serde_json::from_value(error.clone()).expect("an error")),
            None => Ok(answer["value"].take()),
        }
    }

    async fn answer(&mut self, id: u64) -> Value {
        loop {
            {
                let mut early = self.early.lock().expect("one thread");
                if let Some(at) = early.iter().position(|answer| answer["id"] == id) {
                    return early.swap_remove(at);
                }
            }
            let mut line = String::new();
            let read = self.output.read_line(&mut line).await.expect("readable");
            assert!(read > 0, "it has ended");
            // What a test program says about its tests is no answer.
            if let Ok(answer) = serde_json::from_str(&line) {
                self.early.lock().expect("one thread").push(answer);
            }
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.child.signal(signal).expect("it can be signalled");
    }

    /// Closes its input, upon which it ends; waits for that.
    pub(crate) async fn end(mut self) {
        self.input = None;
        let mut line = String::new();
        let until_closed = async {
            while self.output.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                line.clear();
            }
        };
        tokio::time::timeout(PATIENCE, until_closed).await.expect("it ends");
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // It has ended already, most of the time.
        let _ = self.child.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Not a test of its own: the other end of [`Remote::ours`].
#[test]
fn plays_the_primary() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (name, mode) = role.split_once(' ').expect("two words");
    let names = ["node18", "node20", "node22", "node24", "node26"];
    let name = names.into_iter().find(|known| *known == name).expect("a runtime");
    let mode = Mode::ALL.into_iter().find(|m| format!("{m:?}") == mode).expect("a mode");
    block_on(primary(find(name).expect("it was there"), mode));
}

async fn primary(runtime: Runtime, mode: Mode) {
    let rig = Rig::actors(&runtime, mode);
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().expect("open");
    polyfork_sys::channel::set_nonblocking(stdin.as_fd(), true).expect("set");
    let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(stdin).expect("a pipe")).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let command: Value = serde_json::from_str(&line).expect("a command");
        let outcome = match command["do"].as_str() {
            Some("fork") => Ok(json!(rig.fork().await)),
            Some("carried") => {
                Ok(json!(format!("{:?}", rig.listening(worker_of(&command)).await.1)))
            }
            Some("js") => {
                rig.try_js(worker_of(&command), command["code"].as_str().expect("code")).await
            }
            Some("exit") => std::process::exit(7),
            Some("panic") => panic!("as told"),
            other => panic!("no such command: {other:?}"),
        };
        let answer = match outcome {
            Ok(value) => json!({ "id": command["id"], "value": value }),
            Err(error) => json!({ "id": command["id"], "error": error }),
        };
        // libtest may have left its own line unfinished.
        println!("\n{answer}");
    }
    rig.end().await;
}

fn worker_of(command: &Value) -> u64 {
    command["worker"].as_u64().expect("a worker")
}

/// Waits for the end of processes that are no children of this one.
pub(crate) fn all_ended(pids: &[u32]) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let limit = Timespec::try_from(PATIENCE).expect("a time");
    for pid in pids {
        let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) else { continue };
        // One that cannot be opened has ended.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit));
        assert_eq!(ended, Ok(1), "process {pid:?} goes on");
    }
}

/// The process ids of its workers.
pub(crate) async fn pids(remote: &mut Remote, workers: &[u64]) -> Vec<u32> {
    let mut pids = Vec::new();
    for worker in workers {
        let pid = remote.js(*worker, "return process.pid").await;
        pids.push(pid.as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a pid"));
    }
    pids
}

/// A file name that this test alone uses.
pub(crate) fn socket_name(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("UTF-8").to_owned()
}
