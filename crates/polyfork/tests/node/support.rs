//! What the tests against live runtimes share: which runtime, a cluster that remembers its events, and a way
//! to have a worker run a piece of JavaScript.
//!
//! [`Rig`] is a cluster of one program. Its events are collected as they come, so that a test can ask for one
//! that has happened already. Clients are in `client`.
//!
//! The rule that surprises: nothing here waits for a time. Whatever is waited for happens, or the test fails
//! after [`PATIENCE`] with all events printed.

use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use polyfork::cluster::{
    Address, Carried, Cluster, Event, Mechanism, Outcome, Output, OutputLine, Policy, Reason,
    Settings, Stream, WorkerHandle,
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// For what must happen; far beyond what any of it takes, also on a machine with much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A JavaScript runtime to test with.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    /// As in the manifest: `node20`, `deno`, `bun`.
    pub(crate) name: &'static str,
    /// Node's major version; 0 for the others.
    pub(crate) major: u32,
    /// The executable.
    pub(crate) path: PathBuf,
}

/// How connections are to reach workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A socket per slot, the kernel picks.
    Kernel,
    /// The primary accepts and passes connections on.
    Handoff,
    /// One socket for all.
    Shared,
}

impl Mode {
    pub(crate) const ALL: [Mode; 3] = [Mode::Kernel, Mode::Handoff, Mode::Shared];
    /// Those that take exact turns.
    pub(crate) const TURNS: [Mode; 2] = [Mode::Kernel, Mode::Handoff];

    pub(crate) fn apply(self, settings: Settings) -> Settings {
        match self {
            Mode::Kernel => settings.mechanism(Mechanism::Kernel),
            Mode::Handoff => settings.mechanism(Mechanism::Handoff),
            Mode::Shared => settings.policy(Policy::Shared),
        }
    }

    /// Whether this is how a TCP listener in this mode is carried.
    pub(crate) fn is(self, carried: Carried) -> bool {
        match self {
            Mode::Kernel => matches!(carried, Carried::KernelExact | Carried::KernelRandom),
            Mode::Handoff => carried == Carried::Handoff,
            Mode::Shared => carried == Carried::SharedSocket,
        }
    }
}

/// Runs a scenario with a runtime, or tells that it is skipped because there is none.
///
/// # Panics
/// When the scenario does, or takes longer than twice [`PATIENCE`].
pub(crate) fn play(test: &str, runtime: &'static str, scenario: impl AsyncFnOnce(Runtime)) {
    match find(runtime) {
        Ok(runtime) => block_on(async {
            let all = tokio::time::timeout(PATIENCE * 2, scenario(runtime));
            all.await.expect("the scenario takes longer than anything in it may");
        }),
        Err(reason) => skip(&format!("{test}::{runtime}"), &reason),
    }
}

/// Runs a future on a runtime of its own, as the primary of the command does.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

/// Says that a test did not run, here and in the log of the test command.
pub(crate) fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        // One write, so that lines of tests that run at once stay whole.
        log.and_then(|mut log| log.write_all(format!("SKIP {test}: {reason}\n").as_bytes()))
            .expect("the skip log can be written");
    }
}

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// A program of `tests/node-apps`, or with `apps/` in front one of `tests/apps`.
pub(crate) fn app(name: &str) -> PathBuf {
    let folder = if name.contains('/') { "tests" } else { "tests/node-apps" };
    root().join(folder).join(name)
}

/// A runtime of the manifest that `cargo xtask setup` writes; without one, a plain `node` of `PATH` stands in
/// for its own major version.
pub(crate) fn find(name: &'static str) -> Result<Runtime, String> {
    let major = name.strip_prefix("node").and_then(|m| m.parse().ok()).unwrap_or(0);
    let runtime = |path| Runtime { name, major, path };
    let manifest = std::env::var_os("POLYFORK_PEERS")
        .map_or_else(|| root().join(".peers/manifest.json"), PathBuf::from);
    if let Ok(text) = fs::read_to_string(&manifest) {
        let tools: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        let tool = &tools[name];
        return match tool["path"].as_str() {
            Some(path) => Ok(runtime(path.into())),
            None => Err(tool["missing"].as_str().unwrap_or("not in the manifest").to_owned()),
        };
    }
    let missing = || "not set up: run `cargo xtask setup`".to_owned();
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let plain = std::env::split_paths(&folders).map(|f| f.join("node")).find(|p| p.is_file());
    let plain = plain.filter(|_| major > 0).ok_or_else(missing)?;
    match polyfork::cluster::detect(plain.as_os_str(), &["x.js".into()], None, None) {
        Ok(found) if found.runtime.to_string().starts_with(&format!("Node {major}.")) => {
            Ok(runtime(plain))
        }
        _ => Err(missing()),
    }
}

/// A loopback address that no other test uses, for ports that are free and then are bound by number.
pub(crate) fn own_host() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let process = 1 + u8::try_from(std::process::id() % 250).expect("less than 250");
    Ipv4Addr::new(127, process, high, low)
}

/// What a piece of JavaScript threw.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Thrown {
    pub(crate) name: Option<String>,
    pub(crate) text: String,
    pub(crate) code: Option<String>,
    pub(crate) syscall: Option<String>,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    /// Node's `exitedAfterDisconnect`.
    pub(crate) voluntary: bool,
    pub(crate) reason: Reason,
}

/// A running cluster of one program.
///
/// Dropped without [`Rig::end`] (by a test that fails), it kills its workers.
pub(crate) struct Rig {
    pub(crate) cluster: Cluster,
    pub(crate) runtime: Runtime,
    log: Arc<Log>,
    changed: watch::Receiver<()>,
    calls: AtomicU64,
}

#[derive(Default)]
struct Log {
    events: Mutex<Vec<Event>>,
    output: Mutex<Vec<OutputLine>>,
}

impl Rig {
    /// A cluster of `tests/node-apps/actor.cjs` that behaves as Node's own: nothing runs until it is forked,
    /// nothing is replaced.
    pub(crate) fn actors(runtime: &Runtime, mode: Mode) -> Rig {
        Rig::start(runtime, "actor.cjs", |s| mode.apply(s).supervise(false).ready_timeout(None))
    }

    /// A supervised cluster of a stock program.
    pub(crate) fn serving(
        runtime: &Runtime,
        program: &str,
        mode: Mode,
        workers: u32,
        change: impl FnOnce(Settings) -> Settings,
    ) -> Rig {
        Rig::start(runtime, program, |s| change(mode.apply(s).workers(workers)))
    }

    /// A cluster of a program, see [`app`]. To be called inside [`play`].
    pub(crate) fn start(
        runtime: &Runtime,
        program: &str,
        change: impl FnOnce(Settings) -> Settings,
    ) -> Rig {
        let (lines, output) = mpsc::channel(64);
        let mut settings = Settings::new(&runtime.path);
        if runtime.name == "deno" {
            settings = settings.args(["run", "--quiet", "--allow-all"]);
        }
        let settings = settings.arg(app(program)).output(Output::Lines(lines));
        let cluster = Cluster::start(change(settings)).expect("the cluster starts");
        let log = Arc::<Log>::default();
        let (tell, changed) = watch::channel(());
        tokio::spawn(collect(Arc::clone(&log), cluster.events(), output, tell));
        Rig { cluster, runtime: runtime.clone(), log, changed, calls: AtomicU64::new(1) }
    }

    // ---- workers ----

    /// Starts one more worker; gives its id.
    pub(crate) async fn fork(&self) -> u64 {
        self.fork_with::<&str, &str>([]).await
    }

    /// Starts one more worker with these variables.
    pub(crate) async fn fork_with<K, V>(&self, env: impl IntoIterator<Item = (K, V)>) -> u64
    where
        K: Into<std::ffi::OsString>,
        V: Into<std::ffi::OsString>,
    {
        self.cluster.fork(env).await.expect("a worker starts").id()
    }

    /// Starts this many workers; gives their ids.
    pub(crate) async fn fork_many(&self, workers: usize) -> Vec<u64> {
        let mut ids = Vec::new();
        for _ in 0..workers {
            ids.push(self.fork().await);
        }
        ids
    }

    pub(crate) fn worker(&self, id: u64) -> WorkerHandle {
        self.cluster.worker(id)
    }

    /// Has an actor run the body of an async function; gives what it returned or threw.
    pub(crate) async fn try_js(&self, worker: u64, code: &str) -> Result<Value, Thrown> {
        let call = self.start_js(worker, code).await;
        self.answer(worker, call).await
    }

    /// As [`Rig::try_js`], for what does not throw.
    pub(crate) async fn js(&self, worker: u64, code: &str) -> Value {
        self.try_js(worker, code).await.unwrap_or_else(|e| panic!("{code} threw {e:?}"))
    }

    /// As [`Rig::js`], for an address that was closed just now. All primaries of these tests are in one process: a
    /// worker that another one starts at this moment has a copy of every descriptor until it executes its program.
    pub(crate) async fn js_when_free(&self, worker: u64, code: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.try_js(worker, code).await {
                Ok(value) => return value,
                Err(error)
                    if error.code.as_deref() == Some("EADDRINUSE") && Instant::now() < until =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("{code} threw {error:?}"),
            }
        }
    }

    /// Sends an actor something to run and does not wait for its answer.
    pub(crate) async fn start_js(&self, worker: u64, code: &str) -> u64 {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let sent = self.worker(worker).send(&json!({ "call": call, "code": code })).await;
        sent.unwrap_or_else(|e| panic!("cannot send to worker {worker}: {e}"));
        call
    }

    /// The answer to [`Rig::start_js`].
    pub(crate) async fn answer(&self, worker: u64, call: u64) -> Result<Value, Thrown> {
        let answer = self.message(worker, move |m| m["call"] == call).await;
        match answer.get("error") {
            Some(error) => {
                Err(serde_json::from_value(error.clone()).expect("an error as the actor tells it"))
            }
            None => Ok(answer["value"].clone()),
        }
    }

    // ---- what happened ----

    /// The first event, since the start, that `find` wants; waited for if it has not happened yet.
    pub(crate) async fn event<T>(
        &self,
        what: &str,
        mut find: impl FnMut(&Event) -> Option<T>,
    ) -> T {
        self.eventually(what, |rig| rig.events().iter().find_map(&mut find)).await
    }

    /// What `find` gives once it gives something; looked at again after each event and line of output.
    pub(crate) async fn eventually<T>(
        &self,
        what: &str,
        mut find: impl FnMut(&Rig) -> Option<T>,
    ) -> T {
        let mut changed = self.changed.clone();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                changed.mark_unchanged();
                if let Some(found) = find(self) {
                    return Some(found);
                }
                if changed.changed().await.is_err() {
                    return find(self);
                }
            }
        });
        match found.await {
            Ok(Some(found)) => found,
            Ok(None) => panic!("{what} did not happen and the cluster has ended\n{}", self.story()),
            Err(_) => panic!("{what} did not happen\n{}", self.story()),
        }
    }

    /// Everything that was told so far.
    pub(crate) fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.log.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message of a worker that fits.
    pub(crate) async fn message(&self, worker: u64, mut fits: impl FnMut(&Value) -> bool) -> Value {
        self.event(&format!("a message of worker {worker}"), |event| match event {
            Event::Message { who, message } if who.worker == worker => {
                message.decode::<Value>().ok().filter(|m| fits(m))
            }
            _ => None,
        })
        .await
    }

    /// Waits until a worker talks.
    pub(crate) async fn online(&self, worker: u64) {
        self.event("online", |e| matches!(e, Event::Online(w) if w.worker == worker).then_some(()))
            .await;
    }

    /// Waits until the first `workers` slots have had a ready worker.
    pub(crate) async fn all_ready(&self, workers: u32) {
        self.event("all ready", |e| {
            matches!(e, Event::AllReady { workers: n } if *n == workers).then_some(())
        })
        .await;
    }

    /// Where a worker first listened, as told by its `listening` event.
    pub(crate) async fn listening(&self, worker: u64) -> (Address, Carried) {
        self.event(&format!("listening of worker {worker}"), |event| match event {
            Event::Listening { who, address, by } if who.worker == worker => {
                Some((address.clone(), by.mechanism))
            }
            _ => None,
        })
        .await
    }

    /// How a worker ended.
    pub(crate) async fn ended(&self, worker: u64) -> Ended {
        self.event(&format!("the end of worker {worker}"), |event| match event {
            Event::Exit { who, code, signal, reason, voluntary, .. } if who.worker == worker => {
                Some(Ended { code: *code, signal: *signal, voluntary: *voluntary, reason: *reason })
            }
            _ => None,
        })
        .await
    }

    /// Node's names of what happened to a worker, in order; without `message`.
    pub(crate) fn life_of(&self, worker: u64) -> Vec<&'static str> {
        let of = |event: &Event| {
            let (name, who) = match event {
                Event::Fork(who) => ("fork", who),
                Event::Online(who) => ("online", who),
                Event::Listening { who, .. } => ("listening", who),
                Event::Disconnect(who) => ("disconnect", who),
                Event::Exit { who, .. } => ("exit", who),
                _ => return None,
            };
            (who.worker == worker).then_some(name)
        };
        self.events().iter().filter_map(of).collect()
    }

    /// Process id of a worker that was forked.
    pub(crate) async fn pid(&self, worker: u64) -> u32 {
        self.event("fork", |event| match event {
            Event::Fork(who) if who.worker == worker => Some(who.pid),
            _ => None,
        })
        .await
    }

    /// What a worker wrote to one of its streams so far, a line each.
    pub(crate) fn lines_of(&self, worker: u64, stream: Stream) -> Vec<String> {
        let output = self.log.output.lock().unwrap_or_else(PoisonError::into_inner);
        let its = output.iter().filter(|line| (line.worker, line.stream) == (worker, stream));
        its.map(|line| String::from_utf8_lossy(&line.line).into_owned()).collect()
    }

    /// Everything, for a person to read.
    pub(crate) fn story(&self) -> String {
        let mut story = format!("with {}:\n", self.runtime.name);
        for event in self.events().iter() {
            story += &format!("  {event:?}\n");
        }
        for line in self.log.output.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            story += &format!("  {:?} {}\n", line.stream, String::from_utf8_lossy(&line.line));
        }
        story
    }

    // ---- the end ----

    /// Ends the cluster at once and sees that no process is left.
    pub(crate) async fn end(self) {
        self.cluster.stop_now().await;
        self.gone().await;
    }

    /// Asks everybody to finish, waits for it, and sees that nobody had to be forced.
    pub(crate) async fn stop(self) {
        self.cluster.stop().await;
        let outcome = self.gone().await;
        assert!(matches!(outcome, Outcome::Stopped), "{outcome:?}\n{}", self.story());
    }

    async fn gone(&self) -> Outcome {
        let outcome = tokio::time::timeout(PATIENCE, self.cluster.wait()).await;
        let outcome =
            outcome.unwrap_or_else(|_| panic!("the end takes too long\n{}", self.story()));
        self.eventually("the last event", |rig| {
            matches!(rig.events().last(), Some(Event::End(_))).then_some(())
        })
        .await;
        let left = self.alive();
        assert!(left.is_empty(), "left behind: {left:?}\n{}", self.story());
        outcome
    }

    /// Workers whose end was not told, by process id.
    fn alive(&self) -> Vec<u32> {
        let mut alive = Vec::new();
        for event in self.events().iter() {
            match event {
                Event::Fork(who) => alive.push(who.pid),
                Event::Exit { who, .. } => alive.retain(|pid| *pid != who.pid),
                _ => {}
            }
        }
        alive
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for pid in self.alive() {
            kill_child(pid);
        }
    }
}

/// Kills a child of this process. One that was not waited for cannot have its number given to another.
fn kill_child(pid: u32) {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let ours = parent.and_then(|p| p.trim().parse().ok()) == Some(std::process::id());
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|_| ours);
    if let Some(child) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
        // It may end by itself at this moment.
        let _ = pidfd_send_signal(child, Signal::KILL);
    }
}

async fn collect(
    log: Arc<Log>,
    mut events: polyfork::cluster::Events,
    mut output: mpsc::Receiver<OutputLine>,
    tell: watch::Sender<()>,
) {
    loop {
        tokio::select! {
            Some(line) = output.recv() => {
                log.output.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
            Some(event) = events.next() => {
                assert!(!matches!(event, Event::Lagged(_)), "events were lost");
                log.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            }
            else => return,
        }
        // Nobody has to wait.
        let _ = tell.send(());
    }
}
