//! A worker written in Rust: its listeners, its messages, its end.
//!
//! [`Worker`] is a thin front. `identity` finds out whether there is a primary, `reader` and `channel` speak
//! with it, `registry` knows what was asked for, `inbox` keeps messages, `beat` gives signs of life, `stop` ends the worker, `run` makes
//! a whole program of it. Accepting connections is in `listener`.
//!
//! The rule that surprises: a program without a primary is a worker too, a *standalone* one. It binds for
//! itself and stops by SIGTERM or Ctrl-C, so the same program runs alone.
//!
//! Behaviour follows: Node `lib/internal/cluster/child.js`, with native frames instead of JSON.

mod beat;
mod channel;
mod identity;
mod inbox;
mod memory;
mod metrics;
mod reader;
mod registry;
mod run;
mod stop;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use polyfork_wire::limits::Limits;
use polyfork_wire::native::{ListenAddress, PROTOCOL, ToPrimary};
use serde::Serialize;
use tokio::net::ToSocketAddrs;

use super::SendError;
use super::event::Message;
use super::listener::{ListenOptions, Listener, UnixListener};
use crate::shared_memory::SharedArrayBuffer;
use channel::Channel;
pub(crate) use channel::{Closed, Mark};
use identity::Identity;
pub use identity::{is_primary, is_worker};
use inbox::Inbox;
use metrics::Metrics;
use reader::Reader;
pub(crate) use registry::Source;
use registry::{Opened, Registry};
pub use run::{MainResult, run, run_with};
use stop::{Signals, Stop};

/// How long a worker that wants to leave waits for its primary to take it out of turn.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);
/// A status is cut after this many bytes.
const STATUS_BYTES: usize = 1024;

/// This process as a worker (Node: `cluster.worker` and `process` in a worker).
///
/// A cheap handle: clone it freely. The channel to the primary stays open as long as the tokio runtime it was
/// made in, also when every handle is dropped.
///
/// ```no_run
/// # #[cfg(feature = "axum")]
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use axum::{Router, routing::get};
/// use polyfork::cluster::Worker;
///
/// let worker = Worker::from_env()?;
/// let listener = worker.listen(("127.0.0.1", 3000)).await?;
/// let app = Router::new().route("/", get(|| async { "hello" }));
/// axum::serve(listener, app).with_graceful_shutdown(worker.shutdown()).await?;
/// # Ok(()) }
/// # #[cfg(not(feature = "axum"))] fn main() {}
/// ```
///
/// # The end of a worker
///
/// [`Worker::shutdown`] resolves when the primary asks the worker to stop, when the primary is gone, after
/// [`Worker::disconnect`], and on SIGTERM or SIGINT. From then on connections that were handed over but not
/// taken go to other workers, and a program should finish what it serves and return from `main`. The primary
/// ends by signal what is still there after the grace period. When the primary itself is gone, the worker
/// exits with code 0 at the end of the grace period even if the program does not.
#[derive(Debug, Clone)]
pub struct Worker {
    shared: Arc<Shared>,
}

/// What all handles, listeners and tasks of one worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// `None`: standalone.
    channel: Option<Channel>,
    registry: Registry,
    stop: Stop,
    /// Whether the primary was told that we leave.
    leaving: AtomicBool,
    inbox: Inbox,
    /// What the environment said, until the primary says it itself.
    told: (Option<u64>, Option<u32>),
    welcome: OnceLock<Welcome>,
    /// Whether this process must end some time after its channel.
    owns_process: bool,
    /// What the program measures of itself.
    metrics: Metrics,
    /// What the primary shares with all its workers.
    memory: OnceLock<BTreeMap<String, SharedArrayBuffer>>,
}

/// What the primary says first.
#[derive(Debug, Clone, Copy)]
struct Welcome {
    id: u64,
    slot: u32,
    generation: u32,
    grace: Duration,
}

/// Why this process cannot be a worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// Not called inside a tokio runtime.
    #[error("a worker needs a tokio runtime: call this inside one")]
    NoRuntime,
    /// A variable that the primary sets makes no sense.
    #[error("environment variable {variable}={value:?} is not a descriptor from 3 on")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: OsString,
    },
    /// The channel cannot be used: it is not open, is not a stream socket, or has been taken already (there
    /// can be one `Worker` per process; clone it).
    #[error("cannot use descriptor {fd} as the channel to the primary")]
    Channel {
        /// The descriptor's number.
        fd: i32,
        /// The system's error.
        source: io::Error,
    },
    /// The primary's shared memory cannot be used.
    #[error("cannot use the shared memory {name:?}: {why}")]
    Memory {
        /// Its name.
        name: String,
        /// Why not.
        why: String,
    },
    /// Signal handlers cannot be installed.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
}

impl Worker {
    /// The worker that this process is: of the primary that started it, or a standalone one.
    ///
    /// Must be called inside a tokio runtime with I/O and time enabled, of either flavour, and best before
    /// anything else, because it takes an inherited descriptor over. From then on SIGTERM and SIGINT ask for
    /// a stop instead of ending the process; a second one ends a standalone worker at once with the exit
    /// code a shell expects (143, 130).
    ///
    /// # Errors
    /// [`WorkerError`]. Also for the second call in a process that has a primary: clone the first worker.
    pub fn from_env() -> Result<Worker, WorkerError> {
        polyfork_sys::note::mark();
        let identity = Identity::from_env()?;
        runtime()?;
        let signals = Signals::new().map_err(WorkerError::Signals)?;
        let worker = match identity {
            Identity::Alone => Worker::standalone(true),
            Identity::Worker { channel, slot, id } => {
                let unusable = |source| WorkerError::Channel { fd: channel, source };
                let socket = polyfork_sys::channel::take_inherited(channel).map_err(unusable)?;
                let memory = memory::inherited(|key| std::env::var_os(key))?;
                let worker = Worker::connected(socket, (id, slot), true).map_err(unusable)?;
                // Nobody has set it before.
                let _ = worker.shared.memory.set(memory);
                if let Some(every) = beat::asked_for() {
                    tokio::spawn(beat::tell(Arc::clone(&worker.shared), every));
                }
                worker
            }
        };
        tokio::spawn(Arc::clone(&worker.shared).obey(signals));
        Ok(worker)
    }

    /// A worker that speaks with its primary over `socket`, a connected Unix stream socket.
    ///
    /// For programs that get the channel in a way of their own, and for tests of a primary. Other than
    /// [`Worker::from_env`] this leaves signals alone and never exits the process. Must be called inside a
    /// tokio runtime with I/O and time enabled.
    ///
    /// # Errors
    /// [`WorkerError::NoRuntime`], [`WorkerError::Channel`].
    pub fn from_channel(socket: OwnedFd) -> Result<Worker, WorkerError> {
        use std::os::fd::{AsFd, AsRawFd};
        runtime()?;
        let fd = socket.as_raw_fd();
        polyfork_sys::channel::set_nonblocking(socket.as_fd(), true)
            .and_then(|()| Worker::connected(socket, (None, None), false))
            .map_err(|source| WorkerError::Channel { fd, source })
    }

    fn standalone(owns_process: bool) -> Worker {
        let (_no_delivery, inbox) = inbox::inbox();
        Worker { shared: Arc::new(Shared::new(None, inbox, (None, None), owns_process)) }
    }

    fn connected(
        socket: OwnedFd,
        told: (Option<u64>, Option<u32>),
        owns_process: bool,
    ) -> io::Result<Worker> {
        let (delivery, inbox) = inbox::inbox();
        let channel = Channel::new(socket)?;
        channel.push(&ToPrimary::Hello { protocol: PROTOCOL, pid: std::process::id() });
        let shared = Arc::new(Shared::new(Some(channel), inbox, told, owns_process));
        tokio::spawn(Reader::new(Arc::clone(&shared), delivery).run());
        let writer = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Some(channel) = &writer.channel {
                channel.write_all().await;
            }
        });
        Ok(Worker { shared })
    }

    /// The worker's id, never used twice by its primary (Node: `cluster.worker.id`). `None` when standalone.
    pub fn id(&self) -> Option<u64> {
        self.shared.welcome.get().map(|w| w.id).or(self.shared.told.0)
    }

    /// The worker's slot, from 1: a stable position that its replacement takes over. `None` when standalone.
    pub fn slot(&self) -> Option<u32> {
        self.shared.welcome.get().map(|w| w.slot).or(self.shared.told.1)
    }

    /// The memory that the primary shares under this name with all its workers
    /// ([`Settings::shared_memory`](crate::cluster::Settings::shared_memory)). `None` when there is none of this name,
    /// so also when standalone.
    ///
    /// ```no_run
    /// # async fn example(worker: polyfork::cluster::Worker) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::sync::atomic::Ordering::Relaxed;
    ///
    /// if let Some(memory) = worker.shared_memory("requests") {
    ///     memory.u64()?[0].fetch_add(1, Relaxed);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn shared_memory(&self, name: &str) -> Option<SharedArrayBuffer> {
        self.shared.memory.get()?.get(name).cloned()
    }

    /// How many reloads its slot has been through. `None` when standalone and before the primary said so.
    pub fn generation(&self) -> Option<u32> {
        self.shared.welcome.get().map(|w| w.generation)
    }

    /// Whether the program runs alone, without a primary.
    pub fn is_standalone(&self) -> bool {
        self.shared.channel.is_none()
    }

    /// Whether there is an open channel to a primary (Node: `worker.isConnected()`).
    pub fn is_connected(&self) -> bool {
        self.shared.channel.as_ref().is_some_and(|channel| !channel.is_closed())
    }

    /// Listens for TCP connections on the first of the addresses that works.
    ///
    /// With a primary, the primary binds; all workers that ask for the same address share it, each connection
    /// goes to one of them, and with port 0 all get the same port. Standalone, this binds with `SO_REUSEADDR`,
    /// as [`tokio::net::TcpListener::bind`] does.
    ///
    /// The primary hears that this worker listens, and [counts it as ready](Worker::ready), when the listener
    /// is first asked for a connection.
    ///
    /// Cancel safe: a listener that nobody waits for any more is closed.
    ///
    /// # Errors
    /// Those of bind(2), also when the primary did it; `AddrInUse` also when this worker listens there
    /// already; `NotConnected` when the worker stops or the primary is gone.
    pub async fn listen(&self, address: impl ToSocketAddrs) -> io::Result<Listener> {
        self.listen_with(address, ListenOptions::default()).await
    }

    /// [`Worker::listen`] with options. With a primary, those of the worker that asks first count.
    ///
    /// # Errors
    /// As [`Worker::listen`].
    pub async fn listen_with(
        &self,
        address: impl ToSocketAddrs,
        options: ListenOptions,
    ) -> io::Result<Listener> {
        let mut error = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
        for address in tokio::net::lookup_host(address).await? {
            match self.listen_on(address, options).await {
                Ok(listener) => return Ok(listener),
                Err(e) => error = e,
            }
        }
        Err(error)
    }

    async fn listen_on(&self, address: SocketAddr, options: ListenOptions) -> io::Result<Listener> {
        if self.is_standalone() {
            return Listener::bind(address, options, Registration::standalone(&self.shared));
        }
        let opened = self.request(ListenAddress::Tcp(address), options).await?;
        let ListenAddress::Tcp(address) = opened.address else { return Err(wrong_family()) };
        Listener::opened(address, opened.source, opened.registration)
    }

    /// Listens on a Unix stream socket. A path that begins with a NUL byte is a Linux abstract name.
    ///
    /// With a primary, the primary creates and removes the file; a relative path is meant from this process's
    /// working directory. Standalone, this takes the place of a file
    /// that nobody listens on any more, and removes its own when the listener is dropped.
    ///
    /// # Errors
    /// As [`Worker::listen`].
    pub async fn listen_unix(&self, path: impl AsRef<Path>) -> io::Result<UnixListener> {
        self.listen_unix_with(path, ListenOptions::default()).await
    }

    /// [`Worker::listen_unix`] with options.
    ///
    /// # Errors
    /// As [`Worker::listen`].
    pub async fn listen_unix_with(
        &self,
        path: impl AsRef<Path>,
        options: ListenOptions,
    ) -> io::Result<UnixListener> {
        let path = path.as_ref();
        if self.is_standalone() {
            return UnixListener::bind(path, options, Registration::standalone(&self.shared));
        }
        let address = ListenAddress::Unix(as_seen_by_primary(path).into_os_string().into_vec());
        let opened = self.request(address, options).await?;
        let ListenAddress::Unix(path) = opened.address else { return Err(wrong_family()) };
        let path = PathBuf::from(OsString::from_vec(path));
        UnixListener::opened(path, opened.source, opened.registration)
    }

    async fn request(&self, address: ListenAddress, options: ListenOptions) -> io::Result<Opened> {
        if self.shared.stop.has_begun() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the worker is stopping"));
        }
        let (request, answer) = self.shared.registry.ask()?;
        let ListenOptions { backlog, ipv6_only } = options;
        self.shared.tell(&ToPrimary::Listen { request, address, backlog, ipv6_only });
        let gone = |_| io::Error::new(io::ErrorKind::NotConnected, "the primary is gone");
        answer.await.map_err(gone)?
    }

    /// Says that this worker is ready for work, which is when connections start to come.
    ///
    /// Needed only by a program without a listener, or one that wants to say so before it accepts: a worker
    /// also becomes ready when it accepts on every listener it has opened so far. Standalone, this does
    /// nothing.
    pub fn ready(&self) {
        if self.shared.registry.ready() {
            self.shared.tell(&ToPrimary::Ready);
        }
    }

    /// Resolves when this worker should stop; see [the type](Worker#the-end-of-a-worker). For any number of
    /// callers, at any time; what [`axum::serve`'s `with_graceful_shutdown`] takes.
    ///
    /// [`axum::serve`'s `with_graceful_shutdown`]: https://docs.rs/axum/latest/axum/serve/struct.Serve.html
    pub fn shutdown(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.shared.stop.wait()
    }

    /// Whether [`Worker::shutdown`] has resolved.
    pub fn is_stopping(&self) -> bool {
        self.shared.stop.has_begun()
    }

    /// Sends a message to the primary (Node: `process.send()`), encoded by postcard.
    ///
    /// `Ok` means queued, in order; [`Worker::flush`] waits until it has left the process. Waits while more
    /// than 256 KiB are queued. Cancel safe: dropped before it is done, nothing was sent.
    ///
    /// # Errors
    /// [`SendError::Encode`]; [`SendError::TooLong`] above 64 MiB; [`SendError::Disconnected`] when the
    /// primary is gone and when there is none. A program that also runs alone may ignore the last.
    pub async fn send<T: Serialize + ?Sized>(&self, message: &T) -> Result<(), SendError> {
        let Some(channel) = &self.shared.channel else { return Err(SendError::Disconnected) };
        let bytes = encode(message)?;
        channel.send_message(bytes).await.map_err(|_| SendError::Disconnected)
    }

    /// The next message from the primary; `None` when there will be none, at once when standalone.
    ///
    /// With several callers each message goes to one of them. Cancel safe. Up to 4 MiB wait to be taken;
    /// above that the primary has to wait. Only if nothing is taken for five seconds then, the program counts
    /// as not listening, and messages are [dropped](Worker::dropped_messages) until it takes one again.
    pub async fn recv(&self) -> Option<Message> {
        self.shared.inbox.next().await
    }

    /// How many messages were dropped because the program took none, see [`Worker::recv`].
    pub fn dropped_messages(&self) -> u64 {
        self.shared.inbox.dropped()
    }

    /// Leaves of its own will (Node: `worker.disconnect()`): asks the primary to give it nothing new, then
    /// begins the stop that [`Worker::shutdown`] tells of. Returns when it has begun.
    ///
    /// The primary starts a replacement, unless it was told not to. When it does not answer within five
    /// seconds the stop begins all the same.
    pub async fn disconnect(&self) {
        self.shared.leave().await;
    }

    /// Tells the primary in words what the worker is doing, for people to see (`STATUS=` of sd_notify). Cut
    /// after 1 KiB; one that has not left yet is replaced by a later one. Standalone, this does nothing.
    pub fn status(&self, text: impl Into<String>) {
        if let Some(channel) = &self.shared.channel {
            let mut text = text.into();
            let cut = (0..=STATUS_BYTES).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(cut.unwrap_or(0));
            channel.status(text);
        }
    }

    /// Says how this worker answers when it is asked what it measures: `polyfork metrics`, and what `--metrics` serves, merge
    /// the answers of all workers into what the primary tells of itself.
    ///
    /// `tell` gives text in the exposition format of Prometheus, as every metrics crate can write it. Of the same
    /// series in several workers the sum is told, of gauges too; a comment `# AGGREGATE name max` in the text asks for `min`,
    /// `max`, `average`, `first` or `omit` instead. Names that begin with `polyfork_` are the primary's own. Counters
    /// never go back when a worker is replaced: the primary remembers what the ones before had counted.
    ///
    /// `tell` is called in a task of its own for each question, some times a minute as a rule; the question waits half
    /// a second. A later call of `on_metrics` takes the place of an earlier one. Standalone, this does nothing.
    ///
    /// ```no_run
    /// # fn example(worker: &polyfork::cluster::Worker) {
    /// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    ///
    /// static JOBS: AtomicU64 = AtomicU64::new(0);
    /// worker.on_metrics(|| format!("# TYPE jobs_total counter\njobs_total {}\n", JOBS.load(Relaxed)));
    /// # }
    /// ```
    pub fn on_metrics(&self, tell: impl Fn() -> String + Send + Sync + 'static) {
        if self.shared.metrics.set(std::sync::Arc::new(tell)) {
            self.shared.tell(&ToPrimary::OffersMetrics);
        }
    }

    /// Waits until everything said so far has left this process, or the primary is gone. To be called before
    /// [`std::process::exit`]; [`run`](run()) does it.
    pub async fn flush(&self) {
        if let Some(channel) = &self.shared.channel {
            // The primary is gone: what was said does not matter any more.
            let _ = channel.flush().await;
        }
    }
}

impl Shared {
    fn new(
        channel: Option<Channel>,
        inbox: Inbox,
        told: (Option<u64>, Option<u32>),
        owns_process: bool,
    ) -> Shared {
        Shared {
            channel,
            registry: Registry::new(),
            stop: Stop::new(),
            leaving: AtomicBool::new(false),
            inbox,
            told,
            welcome: OnceLock::new(),
            owns_process,
            metrics: Metrics::default(),
            memory: OnceLock::new(),
        }
    }

    /// Queues something for the primary, if there is one.
    fn tell(&self, frame: &ToPrimary) {
        if let Some(channel) = &self.channel {
            channel.push(frame);
        }
    }

    fn welcome(&self, welcome: Welcome) {
        // A second welcome says the same, or comes from a primary that is confused.
        let _ = self.welcome.set(welcome);
    }

    fn grace(&self) -> Duration {
        self.welcome.get().map_or(stop::DEFAULT_GRACE, |welcome| welcome.grace)
    }

    /// Begins the stop. What was handed over and not taken goes back first.
    fn stop(&self, grace: Option<Duration>) {
        for refused in self.registry.refuse_all() {
            self.tell(&refused);
        }
        self.stop.begin(grace.unwrap_or_else(|| self.grace()));
    }

    fn channel_ended(&self, why: &str) {
        if let Some(channel) = &self.channel {
            channel.close();
        }
        self.registry.end(why);
        self.stop.begin(self.grace());
        if self.owns_process {
            stop::exit_after(self.stop.left());
        }
    }

    async fn leave(&self) {
        if self.stop.has_begun() {
            return;
        }
        if self.channel.is_some() {
            if !self.leaving.swap(true, Ordering::Relaxed) {
                self.tell(&ToPrimary::Leaving);
            }
            if tokio::time::timeout(LEAVE_LIMIT, self.stop.wait()).await.is_ok() {
                return;
            }
        }
        self.stop(None);
    }

    /// What SIGTERM and SIGINT do from now on.
    async fn obey(self: Arc<Self>, mut signals: Signals) {
        loop {
            let asked = signals.next().await;
            if !self.stop.has_begun() {
                self.leave().await;
            } else if self.channel.is_none() {
                std::process::exit(asked.exit_code());
            }
            // With a primary a stop that has begun is the primary's to end.
        }
    }
}

/// The use of a listener. Dropping it tells the primary, after what waits has been refused.
#[derive(Debug)]
pub(crate) struct Registration {
    worker: Arc<Shared>,
    /// `None`: standalone, nobody to tell.
    listener: Option<u32>,
}

impl Registration {
    fn new(worker: Arc<Shared>, listener: u32) -> Registration {
        Registration { worker, listener: Some(listener) }
    }

    fn standalone(worker: &Arc<Shared>) -> Registration {
        Registration { worker: Arc::clone(worker), listener: None }
    }

    /// The program asks for a connection for the first time.
    pub(crate) fn accepting(&self) {
        let Some(listener) = self.listener else { return };
        for frame in self.worker.registry.accepting(listener) {
            self.worker.tell(&frame);
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.worker.stop.has_begun()
    }

    /// Acknowledges a connection that was handed over. The program may have it when
    /// [`Registration::poll_written`] says that this has left the process.
    pub(crate) fn acknowledge(&self, seq: u64) -> Option<Mark> {
        let (Some(listener), Some(channel)) = (self.listener, &self.worker.channel) else {
            return None;
        };
        Some(channel.push_now(&ToPrimary::Accepted { listener, seq, count: 1 }))
    }

    pub(crate) fn poll_written(
        &self,
        cx: &mut Context<'_>,
        mark: Mark,
    ) -> Poll<Result<(), Closed>> {
        match &self.worker.channel {
            Some(channel) => channel.poll_written(cx, mark),
            None => Poll::Ready(Err(Closed)),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(listener) = self.listener else { return };
        for frame in self.worker.registry.closed(listener) {
            self.worker.tell(&frame);
        }
    }
}

fn runtime() -> Result<(), WorkerError> {
    tokio::runtime::Handle::try_current().map(drop).map_err(|_| WorkerError::NoRuntime)
}

fn encode<T: Serialize + ?Sized>(message: &T) -> Result<Vec<u8>, SendError> {
    // A frame says a little more than its message: its kind and the length.
    const FRAME_BYTES: usize = 16;
    let limit = Limits::default().max_message - FRAME_BYTES;
    let bytes = Message::postcard(message)?;
    if bytes.len() > limit {
        return Err(SendError::TooLong { bytes: bytes.len(), limit });
    }
    Ok(bytes)
}

/// A path that means the same from another working directory, unless it gets too long for a socket then.
fn as_seen_by_primary(path: &Path) -> PathBuf {
    /// `sun_path` of unix(7), with its NUL.
    const MAX_BYTES: usize = 108;
    if path.as_os_str().as_bytes().first() == Some(&0) {
        return path.to_owned();
    }
    match std::path::absolute(path) {
        Ok(absolute) if absolute.as_os_str().len() < MAX_BYTES => absolute,
        _ => path.to_owned(),
    }
}

fn wrong_family() -> io::Error {
    io::Error::other("the primary opened another kind of listener than was asked for")
}
