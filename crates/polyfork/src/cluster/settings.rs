//! What a cluster is made of: the program, how many workers, how connections reach them, when to give up.
//!
//! Only data. Defaults are chosen here; what they lead to is decided in `polyfork-core` and carried out in
//! `primary`. Names follow Node's `cluster.settings` where Node has one.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::RestartPolicy;
use polyfork_wire::limits::Limits;
use tokio::sync::mpsc;

use super::detect::Detected;
use super::ports::store::{Store, StoreHandle};
use super::probe::Probe;
use crate::shared_memory::SharedArrayBuffer;

/// Which worker gets the next connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Policy {
    /// Each ready worker in turn, exactly (Node: `SCHED_RR`).
    #[default]
    RoundRobin,
    /// One listening socket for all; whichever worker wakes first takes the connection (Node: `SCHED_NONE`).
    Shared,
}

/// How messages of Node workers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Serialization {
    /// A line of JSON each, as Node does unless told otherwise.
    #[default]
    Json,
    /// V8's structured clone: maps, sets, dates, big integers, buffers and cycles arrive as what they are. Node only;
    /// Bun has a format of its own.
    Advanced,
}

/// Who carries the policy out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Mechanism {
    /// The kernel where the dialect, the address and the permissions allow it, else handing over.
    #[default]
    Auto,
    /// A listening socket per slot, and a program in the kernel that picks one for each connection.
    Kernel,
    /// The primary accepts and passes each connection to a worker.
    Handoff,
}

/// How a worker is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Dialect {
    /// A program built on this crate.
    Native,
    /// Node's own channel and cluster messages: Node, Deno, Bun.
    Node,
    /// Anything that takes `LISTEN_FDS`; it is spoken to by signals and `NOTIFY_SOCKET`.
    Sockets,
}

/// When a new worker counts as ready, which is when it starts to get connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Ready {
    /// With a probe as [`Ready::Probe`]; else what fits the dialect: `listening` for node, its own word for native, `READY=1` or a second of life
    /// for sockets.
    #[default]
    Auto,
    /// When it listens.
    Listening,
    /// When it listens, or when it has lived this long without: for a program that may have nothing to listen on. In the
    /// sockets dialect, where nobody tells, only the time counts.
    ListeningOr(Duration),
    /// When it sends the message `ready` (`process.send('ready')`).
    Message,
    /// When it sends `READY=1` to `NOTIFY_SOCKET`.
    Notify,
    /// When it has lived this long.
    Delay(Duration),
    /// When it has answered its probe ([`Settings::probe`]).
    Probe,
}

/// What the kernel lets each worker use, by a control group ([`Settings::cgroup`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CgroupLimits {
    /// Bytes of memory. A worker that needs more is killed ([`Reason::OutOfMemory`](super::Reason::OutOfMemory)).
    pub memory: Option<u64>,
    /// Processors' worth of time: 0.5 is half of one.
    pub cpus: Option<f64>,
    /// Without the right to make groups: go on without limits, with a notice, instead of failing at the start.
    pub optional: bool,
}

/// How a worker is asked to finish and leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum StopBy {
    /// What fits the dialect: `disconnect` for node, its own word for native, SIGTERM for sockets.
    #[default]
    Auto,
    /// The message `shutdown` (PM2: `shutdown_with_message`). The program closes its servers and leaves by itself. Where
    /// there is no channel, as [`StopBy::Auto`].
    Message,
    /// A signal, e.g. `libc::SIGINT`.
    Signal(i32),
}

/// What a reload asks for settings, see [`Settings::reload_from`].
#[derive(Clone)]
pub(crate) struct ReloadSource(pub(crate) Arc<Source>);

type Source = dyn Fn() -> Result<(Settings, Detected), String> + Send + Sync;

impl fmt::Debug for ReloadSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReloadSource")
    }
}

/// An address to listen on.
#[derive(
    Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[non_exhaustive]
pub enum Address {
    /// TCP over IPv4 or IPv6. Port 0 lets the system choose; all workers get the same port.
    Tcp(SocketAddr),
    /// UDP over IPv4 or IPv6.
    Udp(SocketAddr),
    /// A Unix stream socket. A leading NUL byte makes it a Linux abstract name.
    Unix(PathBuf),
    /// A descriptor that the primary inherited.
    Inherited(i32),
}

/// What becomes of the standard output and error of workers. Their standard input is always empty.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum Output {
    /// They write to the primary's own; nothing passes through the primary.
    #[default]
    Inherit,
    /// Discarded.
    Null,
    /// Read by the primary and sent here in lines. When the channel is full reading pauses, so a slow reader
    /// slows the worker that writes and never the primary; nothing is lost.
    Lines(mpsc::Sender<OutputLine>),
}

/// One line a worker wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputLine {
    /// Slot of the worker, from 1.
    pub slot: u32,
    /// Id of the worker.
    pub worker: u64,
    /// Which of its two streams.
    pub stream: Stream,
    /// The line without its newline; any bytes. A line of more than 64 KiB comes in pieces.
    pub line: Vec<u8>,
    /// False when the line was cut: more of it follows, or the worker ended without a newline.
    pub complete: bool,
}

/// Standard output or standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

/// Everything a cluster is started with (Node: `cluster.settings`).
///
/// ```
/// use polyfork::cluster::{Policy, Settings};
/// let settings = Settings::new("node").arg("server.js").workers(4).policy(Policy::RoundRobin);
/// assert_eq!(settings.worker_count(), 4);
/// ```
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    pub(crate) exec: OsString,
    pub(crate) args: Vec<OsString>,
    pub(crate) workers: Option<u32>,
    pub(crate) name: Option<String>,
    pub(crate) policy: Policy,
    pub(crate) mechanism: Mechanism,
    pub(crate) dialect: Option<Dialect>,
    pub(crate) listen: Vec<Address>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) env_allow: Option<Vec<OsString>>,
    pub(crate) activated: Vec<i32>,
    /// Never carried: whoever goes on says who it is.
    #[serde(skip)]
    pub(crate) store: Option<StoreHandle>,
    /// Taken at the start.
    #[serde(skip)]
    pub(crate) kept: Vec<(String, i32)>,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) ready: Ready,
    pub(crate) ready_timeout: Option<Duration>,
    pub(crate) restart: RestartPolicy,
    pub(crate) stay_at_rest: bool,
    pub(crate) supervise: bool,
    /// Never carried: whoever goes on says where it goes.
    #[serde(skip)]
    pub(crate) output: Output,
    pub(crate) limits: Limits,
    pub(crate) window: usize,
    pub(crate) ack_limit: Duration,
    pub(crate) max_memory: Option<u64>,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) max_connections: Option<u64>,
    pub(crate) max_requests: Option<u64>,
    pub(crate) probe: Option<Probe>,
    pub(crate) cgroup: Option<CgroupLimits>,
    pub(crate) drain_preload: bool,
    pub(crate) serialization: Serialization,
    pub(crate) pipes: BTreeSet<u32>,
    /// Never carried: with it, there is no upgrade.
    #[serde(skip)]
    pub(crate) memory: BTreeMap<String, SharedArrayBuffer>,
    pub(crate) watchdog: Option<Duration>,
    pub(crate) stop_by: StopBy,
    pub(crate) instance_var: String,
    pub(crate) increment_var: Option<String>,
    /// Never carried: whoever goes on says where they come from.
    #[serde(skip)]
    pub(crate) reload_from: Option<ReloadSource>,
}

/// Which variable tells a worker its number, unless asked otherwise; PM2's name for it.
const INSTANCE_VAR: &str = "NODE_APP_INSTANCE";

impl Settings {
    /// A cluster of `program`, a path or a name that is looked up in `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Settings {
            exec: program.as_ref().to_owned(),
            args: Vec::new(),
            workers: None,
            name: None,
            policy: Policy::default(),
            mechanism: Mechanism::default(),
            dialect: None,
            listen: Vec::new(),
            env: Vec::new(),
            env_allow: None,
            activated: Vec::new(),
            store: None,
            kept: Vec::new(),
            cwd: None,
            grace: Duration::from_secs(30),
            ready: Ready::default(),
            ready_timeout: Some(Duration::from_secs(30)),
            restart: RestartPolicy::default(),
            stay_at_rest: false,
            supervise: true,
            output: Output::default(),
            limits: Limits::default(),
            window: 8,
            ack_limit: Duration::from_secs(1),
            max_memory: None,
            max_lifetime: None,
            max_connections: None,
            max_requests: None,
            probe: None,
            cgroup: None,
            drain_preload: true,
            serialization: Serialization::default(),
            pipes: BTreeSet::new(),
            memory: BTreeMap::new(),
            watchdog: None,
            stop_by: StopBy::default(),
            instance_var: INSTANCE_VAR.to_owned(),
            increment_var: None,
            reload_from: None,
        }
    }

    /// A cluster of this very program, with its own arguments, speaking the native dialect.
    ///
    /// # Errors
    /// When the system cannot tell the path of the running executable.
    pub fn this_program() -> std::io::Result<Self> {
        let mut settings = Settings::new(std::env::current_exe()?).dialect(Dialect::Native);
        settings.args = std::env::args_os().skip(1).collect();
        Ok(settings)
    }

    /// One more argument for the program.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments for the program.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// How many workers. Default: [`default_workers`].
    #[must_use]
    pub fn workers(mut self, workers: u32) -> Self {
        self.workers = Some(workers);
        self
    }

    /// The number of workers that will be started.
    pub fn worker_count(&self) -> u32 {
        self.workers.unwrap_or_else(|| default_workers().workers)
    }

    /// A name for people, in events and in `ps`-like listings. Default: the program's file name.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Which worker gets the next connection.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Who carries the policy out.
    #[must_use]
    pub fn mechanism(mut self, mechanism: Mechanism) -> Self {
        self.mechanism = mechanism;
        self
    }

    /// How workers are spoken to. Default: found out from the program file, see [`detect`](super::detect()).
    #[must_use]
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = Some(dialect);
        self
    }

    /// One more address that workers of the sockets dialect inherit (bound before the first one starts).
    #[must_use]
    pub fn listen(mut self, address: Address) -> Self {
        self.listen.push(address);
        self
    }

    /// Listening sockets that this process was given (`LISTEN_FDS`), by descriptor: a worker that asks for the address of
    /// one of them gets that one, instead of a new socket that could not be bound.
    #[must_use]
    pub fn activated(mut self, descriptors: impl IntoIterator<Item = i32>) -> Self {
        self.activated.extend(descriptors);
        self
    }

    /// Who holds copies of the listening sockets, so that they outlive this process: whoever connects after a crash waits
    /// for the next process instead of being refused. Sockets that this process was given are not among them, nor are
    /// datagram sockets, ports that the system chose, and groups of sockets with a classic program. Default: nobody.
    ///
    /// When the cluster stops, what is kept takes connections on, and the next process serves them; unless
    /// [`Cluster::forget_kept`](super::Cluster::forget_kept) was called before.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(StoreHandle(store));
        self
    }

    /// What this process inherited of what a [`Store`] held: names and descriptors, which belong to the cluster from its start
    /// on. The socket of an address is used again when somebody asks for that address; what nobody has asked for a while
    /// after all workers are ready is let go, and so is what is not a listening socket of ours.
    #[must_use]
    pub fn kept(mut self, sockets: impl IntoIterator<Item = (String, i32)>) -> Self {
        self.kept.extend(sockets);
        self
    }

    /// Of this process's own environment, workers get these variables and no others; a name may end in `*`. What
    /// [`env`](Self::env) sets, and what tells a worker its place, comes besides. Default: all.
    #[must_use]
    pub fn env_allow<K: AsRef<OsStr>>(mut self, names: impl IntoIterator<Item = K>) -> Self {
        let names = names.into_iter().map(|name| name.as_ref().to_owned());
        self.env_allow.get_or_insert_default().extend(names);
        self
    }

    /// What is not for every eye, and nothing to quote in messages and logs: arguments of the program, and values of
    /// variables that were set for workers.
    pub fn private_words(&self) -> impl Iterator<Item = &OsStr> {
        let values = self.env.iter().map(|(_, value)| value.as_os_str());
        self.args.iter().map(OsString::as_os_str).chain(values)
    }

    /// Sets a variable in the environment of every worker.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Working directory of workers.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cwd = Some(directory.into());
        self
    }

    /// How long a worker that was asked to stop may finish what it serves. Default 30 s.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// What makes a worker ready.
    #[must_use]
    pub fn ready(mut self, ready: Ready) -> Self {
        self.ready = ready;
        self
    }

    /// How long a worker may take to get ready; it is replaced after that. `None`: for ever. Default 30 s.
    #[must_use]
    pub fn ready_timeout(mut self, limit: Option<Duration>) -> Self {
        self.ready_timeout = limit;
        self
    }

    /// How restarts wait, when a slot that keeps dying is given up, and after which ends none follows. Default 5 restarts in
    /// 30 s, after every end.
    #[must_use]
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = policy;
        self
    }

    /// Whether the cluster goes on when every slot rests ([`RestartPolicy::stop_on`]), because workers may be started again: by
    /// a reload, or by [`Cluster::restart_slot`](super::Cluster::restart_slot). Default false: it ends with
    /// [`Outcome::AtRest`](super::Outcome::AtRest).
    #[must_use]
    pub fn stay_at_rest(mut self, stay: bool) -> Self {
        self.stay_at_rest = stay;
        self
    }

    /// Whether workers that end are replaced. Default true; false is how Node's `cluster` behaves.
    #[must_use]
    pub fn supervise(mut self, supervise: bool) -> Self {
        self.supervise = supervise;
        self
    }

    /// What becomes of what workers write.
    #[must_use]
    pub fn output(mut self, output: Output) -> Self {
        self.output = output;
        self
    }

    /// Gives every worker one more descriptor under this number: a two-way pipe (a Unix socket, as Node's), whose other
    /// end is [`WorkerHandle::take_pipe`](super::WorkerHandle::take_pipe).
    ///
    /// The number must be free: from 4 on, for the sockets dialect behind what it inherits, which begins at 3. A
    /// worker that fills a pipe which nobody reads waits.
    #[must_use]
    pub fn pipe(mut self, number: u32) -> Self {
        self.pipes.insert(number);
        self
    }

    /// Gives every worker this memory under a name: [`Worker::shared_memory`](super::Worker::shared_memory). All of
    /// them, those that come later, and this process see the same bytes and can wait for each other.
    ///
    /// For workers built on this crate only. A name has letters, digits, `.`, `-` and `_`; it takes one
    /// descriptor in each worker.
    #[must_use]
    pub fn shared_memory(mut self, name: impl Into<String>, memory: &SharedArrayBuffer) -> Self {
        self.memory.insert(name.into(), memory.clone());
        self
    }

    /// Limits on what a worker may send over its channel.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Handing over: how many connections may be unacknowledged per worker, 1 to 64. Default 8.
    #[must_use]
    pub fn window(mut self, window: usize) -> Self {
        self.window = window.clamp(1, 64);
        self
    }

    /// How long a worker may leave unread what was given to it. Handing over: a connection is then taken back and given
    /// to another. By the kernel in exact turns: a worker that accepted nothing of its queue for that long loses its
    /// queue and its turns until it is well again. Default 1 s.
    #[must_use]
    pub fn ack_limit(mut self, limit: Duration) -> Self {
        self.ack_limit = limit;
        self
    }

    /// Node and Python workers: whether the small preload that ends kept-alive connections during a drain is added to
    /// `NODE_OPTIONS` or `PYTHONPATH`. Each worker takes it out again before the program begins. In Python it is for
    /// uvicorn, by itself or below gunicorn; others are as without it. Default true.
    #[must_use]
    pub fn drain_preload(mut self, yes: bool) -> Self {
        self.drain_preload = yes;
        self
    }

    /// Node workers: how messages are written, both ways (Node: `setupPrimary({ serialization })`). Default JSON.
    #[must_use]
    pub fn serialization(mut self, serialization: Serialization) -> Self {
        self.serialization = serialization;
        self
    }

    /// How long a worker may give no sign of life before it is replaced: its successor is ready first where that can be,
    /// then it is asked to stop, and ended if it does not hear. Default: no watchdog.
    ///
    /// Node workers say four times in this limit that their event loop runs, by the preload of
    /// [`drain_preload`](Settings::drain_preload); workers built on this crate do so by themselves. Either is told of
    /// ([`Event::Blocked`](super::Event::Blocked)) when it was silent for half the limit. Workers of the sockets dialect are
    /// told the limit as `WATCHDOG_USEC` and send `WATCHDOG=1` to `NOTIFY_SOCKET`. Deno and Bun have no such thing.
    ///
    /// When this process itself stood still (suspended, frozen, stopped), every worker gets the whole limit again.
    #[must_use]
    pub fn watchdog(mut self, limit: Option<Duration>) -> Self {
        self.watchdog = limit;
        self
    }

    /// How workers are asked to finish and leave. Default: what fits the dialect.
    #[must_use]
    pub fn stop_by(mut self, how: StopBy) -> Self {
        self.stop_by = how;
        self
    }

    /// The variable that tells each worker its number, from 0 (PM2: `instance_var`). Default `NODE_APP_INSTANCE`.
    #[must_use]
    pub fn instance_var(mut self, name: impl Into<String>) -> Self {
        self.instance_var = name.into();
        self
    }

    /// A variable of [`Settings::env`] that holds a whole number, and to which each worker's number is added (PM2:
    /// `increment_var`): with `PORT=3000` the worker of slot 3 gets 3002. Anything else is left as it is.
    #[must_use]
    pub fn increment_var(mut self, name: Option<String>) -> Self {
        self.increment_var = name;
        self
    }

    /// Where a reload that was given no settings takes them from: a configuration that is read again, for one. Called on
    /// a thread of its own. What it gives replaces program, arguments, environment, limits, grace period, restart policy and,
    /// if it differs from what it was, the number of workers; policy, mechanism and addresses stay as they are.
    /// An error ends the reload before it began ([`ReloadError::Settings`](super::ReloadError::Settings)).
    #[must_use]
    pub fn reload_from(
        mut self,
        source: impl Fn() -> Result<(Settings, Detected), String> + Send + Sync + 'static,
    ) -> Self {
        self.reload_from = Some(ReloadSource(Arc::new(source)));
        self
    }

    /// How many bytes of memory a worker may use (resident, looked at once a second). One that uses more is replaced: a
    /// new worker is ready before it is told to stop. Default: no limit.
    ///
    /// Memory that grows faster than a new worker comes up is for the kernel to limit, by a cgroup.
    #[must_use]
    pub fn max_memory(mut self, bytes: Option<u64>) -> Self {
        self.max_memory = bytes;
        self
    }

    /// How long a worker lives before it is replaced, up to a tenth longer, so that not all go at once. Default: no limit.
    #[must_use]
    pub fn max_lifetime(mut self, time: Option<Duration>) -> Self {
        self.max_lifetime = time;
        self
    }

    /// How many connections a worker is given before it is replaced, up to a tenth more. Counted where
    /// [`WorkerStatus::connections`](super::WorkerStatus::connections) is. Default: no limit.
    #[must_use]
    pub fn max_connections(mut self, connections: Option<u64>) -> Self {
        self.max_connections = connections;
        self
    }

    /// Node workers: how many HTTP requests a worker is asked before it is replaced, up to a tenth more. They are
    /// counted in the worker, by the preload of [`drain_preload`](Settings::drain_preload). Default: no limit.
    #[must_use]
    pub fn max_requests(mut self, requests: Option<u64>) -> Self {
        self.max_requests = requests;
        self
    }

    /// Asks each worker now and then whether it answers, over a connection to this worker. One that failed to several times in
    /// a row is replaced. It also is what makes a worker ready, unless [`Settings::ready`] says something else. Default: no
    /// probe.
    ///
    /// A probe can be brought to workers of every dialect where the kernel gives out connections in exact turns, and to
    /// those of Node and Deno everywhere. Anything else is an error at the start, or a notice where it shows later.
    #[must_use]
    pub fn probe(mut self, probe: Option<Probe>) -> Self {
        self.probe = probe;
        self
    }

    /// Puts each worker into a control group of its own with these limits, which the kernel enforces on the worker and all it
    /// starts. Default: none.
    #[must_use]
    pub fn cgroup(mut self, limits: Option<CgroupLimits>) -> Self {
        self.cgroup = limits;
        self
    }

    /// What makes a worker ready, with the probe considered.
    pub(crate) fn ready_by(&self) -> Ready {
        match (self.ready, &self.probe) {
            (Ready::Auto, Some(_)) => Ready::Probe,
            (ready, _) => ready,
        }
    }

    /// The name of the cluster.
    pub fn display_name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let program = std::path::Path::new(&self.exec);
            program.file_stem().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()
        })
    }
}

/// How many workers to start, and how that number came about.
#[derive(Debug, Clone)]
pub struct DefaultWorkers {
    /// At least 1.
    pub workers: u32,
    /// One line for people: what was looked at.
    pub explanation: String,
}

/// `WEB_CONCURRENCY` if it is a positive number, else what this process may really use: its CPU affinity,
/// capped by the cgroup's CPU quota (v1 or v2) rounded up.
pub fn default_workers() -> DefaultWorkers {
    if let Some(workers) = std::env::var("WEB_CONCURRENCY").ok().and_then(|v| v.trim().parse().ok())
        && workers > 0
    {
        return DefaultWorkers { workers, explanation: format!("WEB_CONCURRENCY={workers}") };
    }
    usable_cpus()
}

/// What this process may really use of the machine: CPU affinity capped by the cgroup's quota, rounded up.
pub fn usable_cpus() -> DefaultWorkers {
    let found = polyfork_sys::system::available_parallelism();
    DefaultWorkers {
        workers: u32::try_from(found.cpus).unwrap_or(u32::MAX),
        explanation: found.explain,
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::RoundRobin => "round-robin",
            Policy::Shared => "shared",
        })
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mechanism::Auto => "auto",
            Mechanism::Kernel => "kernel",
            Mechanism::Handoff => "handoff",
        })
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dialect::Native => "native",
            Dialect::Node => "node",
            Dialect::Sockets => "sockets",
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => write!(f, "{address}"),
            Address::Udp(address) => write!(f, "udp:{address}"),
            Address::Unix(path) => match path.as_os_str().as_encoded_bytes() {
                [0, name @ ..] => write!(f, "unix:@{}", String::from_utf8_lossy(name)),
                _ => write!(f, "unix:{}", path.display()),
            },
            Address::Inherited(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// Why a text is not an [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: {reason}; use HOST:PORT, [V6]:PORT, :PORT, PORT or unix:PATH")]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

impl FromStr for Address {
    type Err = AddressError;

    /// Reads `127.0.0.1:80`, `[::1]:80`, `:80` and `80` (every address, IPv6 and IPv4), `localhost:80`,
    /// `unix:PATH`, `unix:@ABSTRACT`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |reason| AddressError { text: text.to_owned(), reason };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.strip_prefix('@') {
                _ if path.contains('\0') => Err(wrong("a path cannot hold a NUL byte")),
                Some("") => Err(wrong("the abstract name is empty")),
                Some(name) => Ok(Address::Unix(PathBuf::from(format!("\0{name}")))),
                None if path.is_empty() => Err(wrong("the path is empty")),
                None => Ok(Address::Unix(PathBuf::from(path))),
            };
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Address::Tcp(address));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let port: u16 =
            port.parse().map_err(|_| wrong("the port is not a number from 0 to 65535"))?;
        match host {
            "" | "*" => Ok(Address::Tcp(SocketAddr::from(([0u16; 8], port)))),
            "localhost" => Ok(Address::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))),
            _ => Err(wrong("the host is not an IP address")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_print() {
        for text in ["127.0.0.1:80", "[::1]:0", "unix:/run/x.sock", "unix:@name"] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
        }
        assert_eq!("8080".parse(), ":8080".parse::<Address>());
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong_and_what_is_right() {
        for (text, part) in
            [("127.0.0.1:99999", "port"), ("example.org:1", "host"), ("unix:", "path")]
        {
            let error = text.parse::<Address>().expect_err(text).to_string();
            assert!(error.contains(part) && error.contains("unix:PATH"), "{error}");
        }
    }
}
