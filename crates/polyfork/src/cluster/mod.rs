//! Many worker processes behind one port: Node's `cluster`, for any program.
//!
//! A *primary* starts *workers*, owns the listening sockets, gives each worker its share of the connections
//! and replaces workers that end. [`Cluster`] is the primary's side; [`Worker`] and [`run`] are the side of
//! a worker written in Rust.
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use polyfork::cluster::{Cluster, Event, Settings};
//!
//! // Unmodified Node on every core, behind the port that server.js listens on.
//! let cluster = Cluster::start(Settings::new("server.js"))?;
//! let mut events = cluster.events();
//! while let Some(event) = events.next().await {
//!     if let Event::Message { who, message } = event {
//!         println!("worker {} says {:?}", who.worker, message.json());
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! Names and the order of events are Node's: <https://nodejs.org/api/cluster.html>. What differs is said where
//! it differs; above all, workers that end are replaced unless [`Settings::supervise`] says otherwise.

mod cgroup;
mod detect;
mod event;
mod figures;
mod health;
mod link;
mod listener;
mod measures;
mod native;
mod node;
mod notify;
mod outgoing;
mod ports;
mod preload;
mod primary;
mod probe;
pub(crate) mod process;
pub(crate) mod register;
mod reload;
mod settings;
mod signals;
mod stuck;
mod to_loop;
mod traffic;
pub mod upgrade;
mod watchdog;
mod worker;

pub use cgroup::cgroup_folder;
pub use detect::{Answers, DetectError, Detected, Runtime, Version, detect, detect_with};
pub use event::{
    Carried, DecodeError, EncodeError, Event, Events, Message, Notice, Outcome, Via, Who,
};
pub use figures::{Figures, ListenerFigures, SlotFigures, Waits};
pub use listener::{Incoming, ListenOptions, Listener, UnixListener};
#[cfg(feature = "axum")]
pub use listener::{RemoteAddr, serve};
pub use measures::{Measured, Measures};
pub use polyfork_core::{Exit, Reason, RestartDelay, RestartPolicy, StopOn, StopOnError};
pub use polyfork_wire::limits::Limits;
pub use ports::store::{STORE_PREFIX, Store};
pub use probe::{Probe, ProbeError};
pub use reload::{ReloadError, ReloadOptions, ReloadReport};
pub use settings::{
    Address, AddressError, CgroupLimits, DefaultWorkers, Dialect, Mechanism, Output, OutputLine,
    Policy, Ready, Serialization, Settings, StopBy, Stream, default_workers, usable_cpus,
};
pub use worker::{MainResult, Worker, WorkerError, is_primary, is_worker, run, run_with};

use std::ffi::OsString;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polyfork_core::WorkerId;
use serde::Serialize;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::channel::Handle;
use outgoing::{Attached, Outgoing, Refusal, Spoken};
use primary::{Answer, Command, Primary};

/// Events kept for a subscriber that is behind.
pub(crate) const EVENT_BUFFER: usize = 1024;
/// Most connections that may be unacknowledged per worker.
pub(crate) const MAX_WINDOW: usize = 64;

/// A running cluster, as its primary sees it (Node: the `cluster` module in the primary).
///
/// A cheap handle: clone it freely. The cluster is asked to stop when the last handle is dropped.
#[derive(Clone)]
pub struct Cluster {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Event>,
    first: Arc<Mutex<Option<broadcast::Receiver<Event>>>>,
    outcome: watch::Receiver<Option<Outcome>>,
    spoken: Arc<Spoken>,
}

/// A worker, named by its id (Node: `cluster.Worker`).
#[derive(Clone)]
pub struct WorkerHandle {
    id: u64,
    commands: mpsc::Sender<Command>,
    spoken: Arc<Spoken>,
}

/// What a primary knows of one worker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// Stable position, from 1.
    pub slot: u32,
    /// Id, never used twice.
    pub worker: u64,
    /// Process id.
    pub pid: u32,
    /// `starting`, `online`, `ready` or `draining`.
    pub state: &'static str,
    /// How many reloads there had been when it was started, plus one.
    pub generation: u32,
    /// Connections that it was given so far; `None` where nobody counts them (one socket for all, a socket of its own,
    /// classic BPF). By the kernel mechanism a request that a client had to repeat counts each time.
    pub connections: Option<u64>,
    /// Time since the process was started.
    pub uptime: Duration,
    /// Whether its channel is open (Node: `worker.isConnected()`).
    pub connected: bool,
    /// Connections that wait for it and for nobody else; `None` where there is no such queue.
    pub queue: Option<u64>,
    /// How late the worker's event loop (Rust: its runtime) was for its latest timer. `None` until the worker reports it,
    /// which it does where there is a [watchdog](Settings::watchdog).
    pub event_loop_lag: Option<Duration>,
    /// For how long it has given no sign of life, if that is long enough to be told ([`Event::Blocked`]).
    pub blocked: Option<Duration>,
}

/// Why a cluster did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The program is not there, cannot be run, or nothing here can run it.
    #[error(transparent)]
    Program(#[from] DetectError),
    /// An address of [`Settings::listen`] cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Bind {
        /// The address.
        address: Address,
        /// The system's error.
        error: io::Error,
    },
    /// The settings contradict each other.
    #[error("{0}")]
    Settings(String),
    /// The cluster has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// Why a message was not sent.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// No worker has this id (any more).
    #[error("no such worker")]
    NoSuchWorker,
    /// The worker's channel is closed (Node: `ERR_IPC_CHANNEL_CLOSED`), or it has none.
    #[error("the channel is closed")]
    Disconnected,
    /// The value cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The encoded value is larger than one message may be.
    #[error("the message is {bytes} bytes long, more than the limit of {limit}")]
    TooLong {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The worker has no use for such a handle, or would crash on it.
    #[error("handle cannot be sent: {0}")]
    Handle(&'static str),
    /// The cluster has ended.
    #[error("the cluster has ended")]
    Ended,
}

/// The cluster has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cluster has ended")]
pub struct Ended;

impl Cluster {
    /// Starts the primary and, unless [`Settings::supervise`] is off, its workers. Must be called inside a
    /// tokio runtime; returns at once, workers come up while it runs.
    ///
    /// # Errors
    /// [`StartError::Program`] when the program cannot be run, [`StartError::Bind`] when an address that
    /// workers should inherit cannot be bound, [`StartError::Settings`] when settings contradict each other.
    pub fn start(settings: Settings) -> Result<Cluster, StartError> {
        let detected = look_at(&settings)?;
        Self::start_detected(settings, detected)
    }

    /// Changes what workers that are started from now on are (Node: `cluster.setupPrimary()`, called again): the
    /// program, its arguments, directory and environment, what becomes of its output, what makes it ready,
    /// and limits. Told by [`Event::Setup`].
    ///
    /// How many there are, how connections reach them, and how they are supervised was settled at the start and
    /// is not changed. To change a little, begin with [`Cluster::settings`].
    ///
    /// # Errors
    /// As [`Cluster::start`]; nothing has changed then. A program that is spoken to in another way than those
    /// that run is an error, too.
    pub async fn setup(&self, settings: Settings) -> Result<(), StartError> {
        let mut detected = look_at(&settings)?;
        if let Some(dialect) = settings.dialect {
            detected.dialect = dialect;
        }
        primary::check_pipes(&settings, detected.dialect)?;
        primary::check(&settings, &detected)?;
        let dialect = detected.dialect;
        let (settings, detected) = (Box::new(settings), Box::new(detected));
        let (reply, answer) = oneshot::channel();
        self.command(Command::Setup { settings, detected, reply }).await;
        if answer.await.map_err(|_| Ended)? {
            return Ok(());
        }
        Err(StartError::Settings(format!(
            "the program speaks the {dialect} dialect, the cluster was started with another"
        )))
    }

    /// What workers that are started from now on are (Node: `cluster.settings`).
    ///
    /// # Errors
    /// When the cluster has ended.
    pub async fn settings(&self) -> Result<Settings, Ended> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Settings(reply)).await;
        answer.await.map_err(|_| Ended)
    }

    /// As [`Cluster::start`], with a program that has been looked at already.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_detected(
        settings: Settings,
        mut detected: Detected,
    ) -> Result<Cluster, StartError> {
        if let Some(dialect) = settings.dialect {
            detected.dialect = dialect;
        }
        Primary::start(settings, detected).map(Self::of)
    }

    fn of(started: primary::Started) -> Cluster {
        let (tell, outcome) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(outcome) = started.end.await {
                // Nobody has to listen.
                let _ = tell.send(Some(outcome));
            }
        });
        Cluster {
            commands: started.commands,
            events: started.events,
            first: Arc::new(Mutex::new(Some(started.first))),
            outcome,
            spoken: started.spoken,
        }
    }

    /// The events of the cluster. The first call gets every event since the start; later ones get what
    /// happens from then on.
    pub fn events(&self) -> Events {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        Events(first.unwrap_or_else(|| self.events.subscribe()))
    }

    /// Waits for the end of the cluster. Cancel safe.
    pub async fn wait(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(found) => found.clone().unwrap_or(Outcome::Stopped),
            // The loop's task was dropped with its runtime.
            Err(_) => Outcome::Stopped,
        }
    }

    /// Asks all workers to finish what they serve and leave (Node: `cluster.disconnect()`), within the grace
    /// period; returns when the request is on its way. [`Cluster::wait`] tells the end. A second call ends
    /// the workers at once.
    pub async fn stop(&self) {
        self.command(Command::Stop).await;
    }

    /// As [`stop`](Self::stop), with another grace period than the cluster was started with. When it stops already, the
    /// period is changed, and counts from now; nothing is ended at once.
    pub async fn stop_within(&self, grace: Duration) {
        self.command(Command::StopWithin(grace)).await;
    }

    /// Ends all workers at once, with SIGKILL.
    pub async fn stop_now(&self) {
        self.command(Command::StopNow).await;
    }

    /// Nothing outlives this process: what its [`Store`] holds of it is let go. To be called before a stop that is meant to be
    /// the end, and not the first half of a start.
    pub async fn forget_kept(&self) {
        self.command(Command::ForgetKept).await;
    }

    /// Changes the number of workers. Those too many finish what they serve first.
    pub async fn scale(&self, workers: u32) {
        self.command(Command::Scale(workers)).await;
    }

    /// One worker more.
    pub async fn add_worker(&self) {
        self.command(Command::AddOne).await;
    }

    /// One worker less; at least one stays.
    pub async fn remove_worker(&self) {
        self.command(Command::RemoveOne).await;
    }

    /// Starts a slot's worker anew and forgives the slot its past, which is also the way out for one that was given up.
    /// The new worker starts at once; the old one, if there is one, finishes what it serves meanwhile. A slot that does
    /// not exist is passed over. The events tell the rest.
    pub async fn restart_slot(&self, slot: u32) {
        self.command(Command::RestartSlot(slot)).await;
    }

    /// Brings up a new generation of workers beside the present one and lets it take over: what was changed in the
    /// program takes effect, and so do [`ReloadOptions::settings`]. The listening sockets stay. Returns when the last
    /// worker of the old generation is gone, which may take the grace period; the future may be dropped before, the
    /// reload goes on.
    ///
    /// New workers get connections when all of them (or a batch, see [`ReloadOptions::at_a_time`]) are ready and have
    /// stayed so for the probation. On a socket that all workers share (UDP, [`Policy::Shared`], a program that
    /// binds for itself) nobody can keep them from taking something earlier.
    ///
    /// # Errors
    /// [`ReloadError`]. Whatever fails, workers that serve go on serving.
    ///
    /// ```no_run
    /// # async fn example(cluster: polyfork::cluster::Cluster) -> Result<(), polyfork::cluster::ReloadError> {
    /// use polyfork::cluster::ReloadOptions;
    ///
    /// let report = cluster.reload(ReloadOptions::new()).await?;
    /// assert_eq!((report.refused, report.reset), (0, 0));
    /// # Ok(()) }
    /// ```
    pub async fn reload(&self, options: ReloadOptions) -> Result<ReloadReport, ReloadError> {
        let mut options = options;
        if options.settings.is_none() {
            match self.asked_source().await {
                Ok(None) => {}
                Ok(Some((settings, detected))) => {
                    options.settings = Some(settings);
                    options.from_source = true;
                    return self.ask_to_reload(options, Some(Box::new(detected))).await;
                }
                Err(why) => {
                    let (reply, answer) = oneshot::channel();
                    self.command(Command::NotReloaded { why, reply }).await;
                    return answer.await.unwrap_or(Err(ReloadError::Ended));
                }
            }
        }
        let detected = match &options.settings {
            None => None,
            Some(settings) => {
                let look = look_at(settings).map_err(|e| ReloadError::Settings(e.to_string()))?;
                let dialect = settings.dialect.unwrap_or(look.dialect);
                let detected = Detected { dialect, ..look };
                primary::check_pipes(settings, dialect)
                    .and_then(|()| primary::check(settings, &detected))
                    .map_err(|e| ReloadError::Settings(e.to_string()))?;
                Some(Box::new(detected))
            }
        };
        self.ask_to_reload(options, detected).await
    }

    /// What [`Settings::reload_from`] says now.
    async fn asked_source(&self) -> Result<Option<(Settings, Detected)>, ReloadError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Settings(reply)).await;
        let old = answer.await.map_err(|_| ReloadError::Ended)?;
        let Some(source) = old.reload_from.clone() else { return Ok(None) };
        let asked = tokio::task::spawn_blocking(move || (source.0)()).await;
        let asked = asked.map_err(|_| "the source of settings broke off".to_owned());
        let (new, mut detected) = asked.and_then(|answer| answer).map_err(ReloadError::Settings)?;
        detected.dialect = new.dialect.unwrap_or(detected.dialect);
        primary::check_pipes(&new, detected.dialect)
            .map_err(|error| ReloadError::Settings(error.to_string()))?;
        // What workers write goes where it went, and the next reload asks the same source.
        let settings = Settings { output: old.output, reload_from: old.reload_from, ..new };
        Ok(Some((settings, detected)))
    }

    async fn ask_to_reload(
        &self,
        options: ReloadOptions,
        detected: Option<Box<Detected>>,
    ) -> Result<ReloadReport, ReloadError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Reload { options: Box::new(options), detected, reply }).await;
        answer.await.unwrap_or(Err(ReloadError::Ended))
    }

    /// Starts one more worker in a slot of its own, with these variables on top of its environment (Node:
    /// `cluster.fork(env)`). It is not replaced when it ends, unless the cluster is supervised.
    ///
    /// # Errors
    /// When the cluster is stopping, or the process cannot be started; the events say why.
    pub async fn fork<K, V>(
        &self,
        env: impl IntoIterator<Item = (K, V)>,
    ) -> Result<WorkerHandle, Ended>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let (reply, answer) = oneshot::channel();
        let env = env.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        self.command(Command::Fork { env, reply }).await;
        let WorkerId(id) = answer.await.ok().flatten().ok_or(Ended)?;
        Ok(self.worker(id))
    }

    /// A handle for the worker with this id (Node: `cluster.workers[id]`). Whether there is one shows when
    /// the handle is used.
    pub fn worker(&self, id: u64) -> WorkerHandle {
        WorkerHandle { id, commands: self.commands.clone(), spoken: Arc::clone(&self.spoken) }
    }

    /// All workers that have not ended.
    pub async fn status(&self) -> Vec<WorkerStatus> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Status(reply)).await;
        answer.await.unwrap_or_default()
    }

    /// Sends a message to every worker.
    ///
    /// # Errors
    /// When the value cannot be encoded, or the cluster has ended. Workers without a channel are passed over.
    pub async fn broadcast<T: Serialize + ?Sized>(&self, value: &T) -> Result<(), SendError> {
        let broadcast = |message, reply| Command::Broadcast { message, reply };
        say(&self.commands, &self.spoken, value, None, broadcast).await
    }

    pub(crate) async fn reap_strangers(&self) {
        self.command(Command::ReapStrangers).await;
    }

    async fn command(&self, command: Command) {
        // A cluster that has ended needs no commands; whoever waits for an answer sees the end.
        let _ = self.commands.send(command).await;
    }
}

impl WorkerHandle {
    /// The worker's id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Sends a message (Node: `worker.send()`): over Node's channel as [`Settings::serialization`] says, to a worker
    /// built on this crate as postcard. Waits while more than 256 KiB wait for the worker to read.
    ///
    /// # Errors
    /// [`SendError`]; the message has not been sent then.
    pub async fn send<T: Serialize + ?Sized>(&self, value: &T) -> Result<(), SendError> {
        self.say(value, None).await
    }

    /// Sends a message with a handle to a Node worker (Node: `worker.send(message, handle)`). Our copy is closed
    /// when the worker has it; keep a clone (`try_clone`) to go on using it.
    ///
    /// Connections that come to a server of the cluster need none of this: workers get them by themselves.
    ///
    /// # Errors
    /// As [`WorkerHandle::send`]; [`SendError::Handle`] for what Node cannot take, and for workers built on this
    /// crate, which ask for their listeners instead.
    pub async fn send_with<T: Serialize + ?Sized>(
        &self,
        value: &T,
        handle: impl Into<Handle>,
    ) -> Result<(), SendError> {
        self.say(value, Some(Attached::new(handle.into())?)).await
    }

    async fn say<T: Serialize + ?Sized>(
        &self,
        value: &T,
        attached: Option<Attached>,
    ) -> Result<(), SendError> {
        let to = WorkerId(self.id);
        let send = |message, reply| Command::Send { to, message, reply };
        say(&self.commands, &self.spoken, value, attached, send).await
    }

    /// Our end of a pipe that [`Settings::pipe`] gave the worker under this number (Node: `worker.process.stdio[n]`),
    /// once. Must be called inside the runtime that shall read it. Dropped with the worker if nobody takes it,
    /// and with it what the worker wrote to it last: take it when [`Event::Fork`] is told.
    ///
    /// # Errors
    /// Those of the event loop.
    pub async fn take_pipe(&self, number: u32) -> io::Result<Option<tokio::net::UnixStream>> {
        let (reply, answer) = oneshot::channel();
        let of = WorkerId(self.id);
        // A cluster that has ended has no pipes.
        let _ = self.commands.send(Command::TakePipe { of, number, reply }).await;
        let Some(pipe) = answer.await.ok().flatten() else { return Ok(None) };
        tokio::net::UnixStream::from_std(pipe.into()).map(Some)
    }

    /// Asks the worker to finish what it serves and leave (Node: `worker.disconnect()`).
    pub async fn disconnect(&self) {
        // A cluster that has ended has no workers.
        let _ = self.commands.send(Command::Disconnect(WorkerId(self.id))).await;
    }

    /// Whether its channel is open: from the start until [`Event::Disconnect`] (Node: `worker.isConnected()`).
    pub async fn is_connected(&self) -> bool {
        self.status().await.is_some_and(|status| status.connected)
    }

    /// Whether it has ended: from [`Event::Exit`] on (Node: `worker.isDead()`).
    pub async fn is_dead(&self) -> bool {
        self.status().await.is_none()
    }

    /// What the primary knows of it; `None` once it has ended.
    pub async fn status(&self) -> Option<WorkerStatus> {
        let (reply, answer) = oneshot::channel();
        // A cluster that has ended has no workers.
        let _ = self.commands.send(Command::Status(reply)).await;
        answer.await.unwrap_or_default().into_iter().find(|status| status.worker == self.id)
    }

    /// Sends a signal, e.g. `libc::SIGTERM` (Node: `worker.process.kill()`).
    pub async fn kill(&self, signal: i32) {
        // A cluster that has ended has no workers.
        let _ = self.commands.send(Command::Kill(WorkerId(self.id), signal)).await;
    }
}

/// Finds out what a program is, unless the caller knows.
fn look_at(settings: &Settings) -> Result<Detected, StartError> {
    let path = settings.env.iter().rev().find(|(key, _)| key == "PATH").map(|(_, v)| v.as_os_str());
    Ok(match settings.dialect {
        // The caller knows better than any look at the file.
        Some(Dialect::Native) => Detected {
            dialect: Dialect::Native,
            runtime: Runtime::Native { protocol: polyfork_wire::native::PROTOCOL },
            exec: settings.exec.clone().into(),
            args_before: Vec::new(),
            why: "asked for".to_owned(),
            warning: None,
        },
        _ => detect(&settings.exec, &settings.args, settings.cwd.as_deref(), path)?,
    })
}

/// Writes a message and gives it to the loop, again should it turn out that a worker speaks something new.
async fn say<T: Serialize + ?Sized>(
    commands: &mpsc::Sender<Command>,
    spoken: &Spoken,
    value: &T,
    attached: Option<Attached>,
    command: impl Fn(Outgoing, Answer) -> Command,
) -> Result<(), SendError> {
    loop {
        let message = Outgoing::new(value, attached.as_ref(), spoken);
        let (reply, answer) = oneshot::channel();
        if commands.send(command(message, reply)).await.is_err() {
            return Err(SendError::Ended);
        }
        match answer.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(Refusal::Error(error))) => return Err(error),
            // By now the new encoding is known.
            Ok(Err(Refusal::NotEncoded)) => {}
            Err(_) => return Err(SendError::Ended),
        }
    }
}
