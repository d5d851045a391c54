//! The primary: one loop that owns every worker, every listening socket and every decision's outcome.
//!
//! What should happen is decided by `polyfork_core::Supervisor` (life of workers) and
//! `polyfork_core::Handoff` (who gets which connection). This loop feeds them what happened and carries out
//! what they answer. Starting a process is in `process`, channels in `link`, sockets in `ports`, what Node
//! workers say in `node`, what native ones say in `native`, `NOTIFY_SOCKET` in `notify`.
//!
//! The rule that surprises: a worker's end is told to the supervisor only after its channel was read to the
//! end, because an acknowledgement it wrote just before it died decides who gets a connection.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork_core::restart::Jitter;
use polyfork_core::{
    Action, Exit, Input, ListenerId, Outcome as Ended, Plan, Reason, Report, Seat, SlotId,
    Supervisor, Time, Watchdog, WorkerId,
};
use polyfork_sys::system::LimitGroup;
use polyfork_wire::ProtocolError;
use polyfork_wire::notify::{Notification, Watchdog as Alive};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::detect::{Detected, Runtime};
use super::event::{Encoded, Event, Message, Notice, Outcome, Who};
use super::figures::{Figures, Tally};
use super::health::{Allowance, Health};
use super::link::{self, Item};
use super::measures::{Asked, Habit, Questions};
use super::outgoing::{Encoding, Outgoing, Refusal, Spoken};
use super::ports::store::Stored;
use super::ports::{self, Ports};
use super::probe::Probing;
use super::process::{self, Environment, Running, Stdio};
use super::reload::{self, Launch, ReloadError, ReloadOptions, Reloading};
use super::settings::{Address, Dialect, Mechanism, Ready, Settings, StopBy};
use super::stuck::Watch;
use super::to_loop::ToLoop;
use super::upgrade::{FreezeError, Frozen, Packing};
use super::{SendError, StartError, WorkerStatus, cgroup, probe, watchdog};

mod carry;

pub(crate) use carry::State;

/// How often a queue that should run dry is looked at.
const DRAIN_CHECK: Duration = Duration::from_millis(4);
/// How long, at most and within the grace period, a stop waits for sockets that workers share to run dry.
const DOORS_LIMIT: Duration = Duration::from_secs(5);
/// How often a Node worker that said nothing is looked at for a socket of its own.
const OWN_SOCKET_CHECK: Duration = Duration::from_millis(150);
/// A socket that no worker has asked for by then, after the last of them got ready, is a leftover of an
/// earlier version of the program. A program of several servers gets ready with the first of them.
const UNUSED_AFTER: Duration = Duration::from_secs(3);
/// How long the answer to a worker's good-bye is held back when it has been asked to go as well.
const GOODBYE_PAUSE: Duration = Duration::from_millis(200);
/// A sockets worker that does not use `NOTIFY_SOCKET` counts as ready after this.
const SOCKETS_DELAY: Duration = Duration::from_secs(1);
/// A process whose channel closed is ending by itself, as a rule, and seen to have ended within this.
const ENDING: Duration = Duration::from_millis(250);
/// How long the last output of ended workers is waited for (a grandchild may hold the pipe for ever).
const OUTPUT_LINGER: Duration = Duration::from_millis(500);

/// What the tasks around the loop report to it.
#[derive(Debug)]
pub(crate) enum FromIo {
    Item {
        worker: WorkerId,
        item: Item,
    },
    ChannelEnd {
        worker: WorkerId,
        fault: Option<ProtocolError>,
    },
    Writable {
        worker: WorkerId,
    },
    Exited {
        worker: WorkerId,
        status: std::io::Result<std::process::ExitStatus>,
        /// What it had used by then, where the system tells.
        cpu: Option<Duration>,
    },
    Acceptable {
        port: ListenerId,
    },
    Notified {
        worker: WorkerId,
        text: Vec<u8>,
    },
    /// A connection came while nothing was expected.
    Stirred,
    Probed {
        worker: WorkerId,
        number: u64,
        answer: probe::Answer,
    },
    Rested {
        worker: WorkerId,
        what: Rested,
    },
    OutputRested(process::Pipe),
}

/// A task of a worker that came to rest because the loop wanted it to.
#[derive(Debug)]
pub(crate) enum Rested {
    /// It read the channel.
    Reader(link::Partial),
    /// It waited for the end of the process.
    Watcher,
    /// It read the notify socket.
    Notify,
    /// It probed the worker.
    Probe(u64),
}

/// What handles ask of the loop.
pub(crate) enum Command {
    Stop,
    StopWithin(Duration),
    StopNow,
    ForgetKept,
    Scale(u32),
    AddOne,
    RemoveOne,
    RestartSlot(u32),
    Fork {
        env: Vec<(OsString, OsString)>,
        reply: oneshot::Sender<Option<WorkerId>>,
    },
    Disconnect(WorkerId),
    Kill(WorkerId, i32),
    Send {
        to: WorkerId,
        message: Outgoing,
        reply: Answer,
    },
    Broadcast {
        message: Outgoing,
        reply: Answer,
    },
    TakePipe {
        of: WorkerId,
        number: u32,
        reply: oneshot::Sender<Option<OwnedFd>>,
    },
    Status(oneshot::Sender<Vec<WorkerStatus>>),
    Figures(oneshot::Sender<Figures>),
    Measures(oneshot::Sender<Asked>),
    Setup {
        settings: Box<Settings>,
        detected: Box<Detected>,
        reply: oneshot::Sender<bool>,
    },
    Settings(oneshot::Sender<Settings>),
    Reload {
        options: Box<ReloadOptions>,
        detected: Option<Box<Detected>>,
        reply: oneshot::Sender<reload::Answer>,
    },
    /// There were no settings to reload with.
    NotReloaded {
        why: ReloadError,
        reply: oneshot::Sender<reload::Answer>,
    },
    ReapStrangers,
    Freeze {
        packing: Packing,
        reply: oneshot::Sender<Result<Frozen, FreezeError>>,
    },
}

/// Whom to tell what became of a message.
pub(crate) type Answer = oneshot::Sender<Result<(), Refusal>>;

/// Things to do at a certain time.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) enum Timer {
    ReadyByAge(WorkerId),
    OwnSocket(WorkerId),
    Drained(WorkerId),
    Accept(ListenerId),
    NoBeat(WorkerId),
    Probe(WorkerId),
    Stranded(Duration),
    StillThere(WorkerId),
    Unused,
    Goodbye(WorkerId, u64),
    Doors,
    Stuck,
    Queues,
    Health,
}

/// A worker that has been started and is not gone yet.
pub(crate) struct Worker {
    pub(crate) who: Who,
    pub(crate) running: Running,
    /// How many reloads there had been when it was started, plus one.
    pub(crate) generation: u32,
    /// What makes it ready.
    pub(crate) ready_by: Ready,
    /// How it is asked to leave.
    stop_by: StopBy,
    /// Connections that it acknowledged.
    pub(crate) handed_over: u64,
    /// How much of everything it may have.
    pub(crate) allowance: Allowance,
    pub(crate) started: Instant,
    pub(crate) online: bool,
    /// Said to be ready, or found to be.
    pub(crate) ready: bool,
    /// Admitted by the supervisor: connections may go to it.
    pub(crate) admitted: bool,
    /// It said that it is going (`exitedAfterDisconnect`), or we asked it to.
    pub(crate) leaving: bool,
    /// Node: it was sent `disconnect`.
    pub(crate) told: bool,
    /// The `disconnect` event was told.
    pub(crate) disconnected: bool,
    /// The first byte of its lines showed Bun.
    pub(crate) prefixed: bool,
    /// Node: connections on their way, by the sequence number of the `newconn` message.
    pub(crate) calls: BTreeMap<u64, (ListenerId, u64)>,
    /// Native: which listener of ours is meant by its ids (the same numbers).
    pub(crate) bind_failed: bool,
    status: Option<std::io::Result<std::process::ExitStatus>>,
    channel_ended: bool,
    fault: bool,
    /// How long it may give no sign of life.
    pub(crate) watchdog: Option<Duration>,
    /// Node: it has said that it was asked so many requests, which is its limit.
    pub(crate) had_requests: Option<u64>,
    /// Its probes.
    pub(crate) probing: Option<Probing>,
    /// Node: probes that were handed over, by the sequence number of the message.
    pub(crate) probes: BTreeMap<u64, u64>,
    /// It has given a sign of life.
    pub(crate) beats: bool,
    /// How late its event loop said it was.
    pub(crate) lag: Option<Duration>,
    /// It was silent for too long and is being replaced.
    pub(crate) silent: bool,
    pub(crate) last_take_back: Option<Instant>,
    /// Native: it said that it leaves, and is told that it may once nothing waits for it.
    pub(crate) wants_to_leave: bool,
    /// How it answers when it is asked what it measures.
    pub(crate) habit: Habit,
    oom_kills: Option<u64>,
    waiting_senders: VecDeque<Answer>,
}

/// What its settings ask of a worker, as they were when it was started.
struct Terms {
    ready_by: Ready,
    stop_by: StopBy,
    watchdog: Option<Duration>,
    allowance: Allowance,
    probing: Option<Probing>,
}

/// A fork that was asked for: its variables, and who waits for the worker's id.
type Forking = (Vec<(OsString, OsString)>, oneshot::Sender<Option<WorkerId>>);

/// The loop's state.
pub(crate) struct Primary {
    pub(crate) settings: Settings,
    pub(crate) detected: Detected,
    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    pub(crate) ports: Ports,
    pub(crate) io: ToLoop,
    /// The address that could not be had, if that is why no worker comes up.
    pub(crate) bind_failure: Option<(Address, Arc<std::io::Error>)>,
    pub(crate) supervisor: Supervisor,
    /// What generations other than the present one are started with.
    pub(crate) launches: BTreeMap<u32, Launch>,
    pub(crate) reloading: Option<Reloading>,
    pub(crate) health: Health,
    pub(crate) watchdog: Watchdog,
    /// Control groups that cannot be removed yet.
    pub(crate) groups_left: Vec<LimitGroup>,
    pub(crate) tally: Tally,
    pub(crate) questions: Questions,
    /// For limits that are each worker's own.
    chance: Jitter,
    actions: Vec<Action>,
    commands: mpsc::Receiver<Command>,
    from_io: mpsc::Receiver<FromIo>,
    events: broadcast::Sender<Event>,
    origin: Instant,
    timers: BTreeMap<(Instant, u64), Timer>,
    timer_seq: u64,
    /// Numbers of our own cluster messages (Node: one counter per sending process).
    sequence: u64,
    forking: VecDeque<Forking>,
    pub(crate) environment: Environment,
    /// What messages have to be written in; shared with those who write them.
    spoken: Arc<Spoken>,
    output: process::OutputTasks,
    /// Output that nobody reads while the loop rests.
    rested_output: Vec<process::Pipe>,
    ever_ready: bool,
    all_ready: bool,
    outcome: Option<Outcome>,
    told: BTreeMap<&'static str, Instant>,
    forced: bool,
    stopping: bool,
    /// Whom the kernel gives connections that it does not accept.
    pub(crate) watch: Watch,
    /// Since when the sockets take nothing new, while what waits on them is still given out.
    closing_doors: Option<Instant>,
}

/// What a [`super::Cluster`] handle needs of its loop.
pub(crate) struct Started {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) events: broadcast::Sender<Event>,
    pub(crate) first: broadcast::Receiver<Event>,
    pub(crate) spoken: Arc<Spoken>,
    pub(crate) end: oneshot::Receiver<Outcome>,
}

impl Primary {
    /// Checks the settings, opens what `listen` names, and starts the loop as a task.
    pub(crate) fn start(mut settings: Settings, detected: Detected) -> Result<Started, StartError> {
        let workers = settings.worker_count();
        if workers == 0 && settings.supervise {
            return Err(StartError::Settings(
                "a cluster needs at least one worker: 0 were asked for".into(),
            ));
        }
        if !settings.listen.is_empty() && detected.dialect != Dialect::Sockets {
            return Err(StartError::Settings(format!(
                "addresses to inherit are for the sockets dialect; workers of the {} dialect say themselves \
                 where they listen",
                detected.dialect
            )));
        }
        if detected.dialect == Dialect::Sockets && settings.mechanism == Mechanism::Handoff {
            return Err(StartError::Settings(
                "connections cannot be handed to workers of the sockets dialect; use --mechanism kernel, or \
                 --policy shared"
                    .into(),
            ));
        }
        check_pipes(&settings, detected.dialect)?;
        check(&settings, &detected)?;
        let without_group = cgroup::settle(&mut settings)?;
        let (commands_tx, commands) = mpsc::channel(64);
        let (io, from_io) = ToLoop::new();
        let (events, first) = broadcast::channel(super::EVENT_BUFFER);
        let (end_tx, end) = oneshot::channel();
        let supervised = if settings.supervise { workers } else { 0 };
        let plan = Plan {
            workers: supervised,
            supervise: settings.supervise,
            ready_timeout: settings.ready_timeout,
            grace: settings.grace,
            kill_after: Duration::from_secs(2),
            restart: settings.restart.clone(),
            seed: process::random_seed(),
        };
        let stored = Stored::new(settings.store.clone(), std::mem::take(&mut settings.kept));
        let environment = Environment::new(&settings, &detected);
        let spoken = Arc::new(Spoken::default());
        spoken.note(Encoding::of(detected.dialect, settings.serialization));
        let mut primary = Primary {
            ports: Ports::new(
                settings.policy,
                settings.mechanism,
                detected.dialect != Dialect::Sockets,
                settings.activated.clone(),
                stored,
            ),
            supervisor: Supervisor::new(plan),
            launches: BTreeMap::new(),
            reloading: None,
            health: Health::default(),
            watchdog: Watchdog::default(),
            groups_left: Vec::new(),
            tally: Tally::default(),
            questions: Questions::default(),
            chance: Jitter::new(process::random_seed()),
            actions: Vec::new(),
            workers: BTreeMap::new(),
            commands,
            from_io,
            io,
            events: events.clone(),
            origin: Instant::now(),
            timers: BTreeMap::new(),
            timer_seq: 0,
            sequence: 0,
            forking: VecDeque::new(),
            environment,
            spoken: Arc::clone(&spoken),
            output: process::OutputTasks::default(),
            rested_output: Vec::new(),
            ever_ready: false,
            all_ready: false,
            bind_failure: None,
            forced: false,
            stopping: false,
            watch: Watch::default(),
            closing_doors: None,
            outcome: None,
            told: BTreeMap::new(),
            settings,
            detected,
        };
        primary.tell_setup();
        if let Some(text) = without_group {
            primary.notice("cgroup", None, text);
        }
        primary.tell_of_store();
        primary.bind_pinned(supervised)?;
        primary.check_probe()?;
        tokio::spawn(primary.run(end_tx));
        Ok(Started { commands: commands_tx, events, first, spoken, end })
    }

    fn tell_setup(&mut self) {
        let workers = if self.settings.supervise { self.settings.worker_count() } else { 0 };
        self.emit(Event::Setup { workers, dialect: self.detected.dialect });
        for text in self.environment.take_notices() {
            self.notice("preload", None, text);
        }
    }

    /// Takes over what workers started from now on are. What the supervisor and the sockets were built with
    /// stays. False when the program speaks another dialect than those that run.
    fn set_up(&mut self, settings: Settings, detected: Detected) -> bool {
        if detected.dialect != self.detected.dialect {
            return false;
        }
        self.settings = self.later_settings(settings);
        self.environment = Environment::new(&self.settings, &detected);
        self.speak(&detected, &self.settings);
        self.detected = detected;
        self.tell_setup();
        true
    }

    /// Settings for workers to come: what the supervisor and the sockets were built with stays.
    pub(crate) fn later_settings(&self, settings: Settings) -> Settings {
        let old = &self.settings;
        Settings {
            workers: old.workers,
            policy: old.policy,
            mechanism: old.mechanism,
            listen: old.listen.clone(),
            activated: old.activated.clone(),
            store: old.store.clone(),
            kept: Vec::new(),
            supervise: old.supervise,
            restart: old.restart.clone(),
            grace: old.grace,
            ready_timeout: old.ready_timeout,
            ..settings
        }
    }

    /// Messages to all are written in what these workers speak, too.
    pub(crate) fn speak(&self, detected: &Detected, settings: &Settings) {
        self.spoken.note(Encoding::of(detected.dialect, settings.serialization));
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping
    }

    async fn run(mut self, end: oneshot::Sender<Outcome>) {
        self.feed(Input::Start);
        self.live(end).await;
    }

    async fn live(mut self, end: oneshot::Sender<Outcome>) {
        while self.outcome.is_none() {
            self.turn().await;
        }
        self.ports.leave();
        self.output.finish(OUTPUT_LINGER).await;
        if let Some(outcome) = self.outcome.take() {
            self.emit(Event::End(outcome.clone()));
            // Nobody has to wait for the end.
            let _ = end.send(outcome);
        }
    }

    /// One round: wait for something, deal with it and with all that is there by then, act.
    async fn turn(&mut self) {
        let deadline = self.deadline();
        tokio::select! {
            Some(io) = self.from_io.recv() => {
                self.on_io(io);
                // Whatever else has arrived is dealt with in the same round, up to a bound that keeps
                // commands and timers alive.
                for _ in 0..256 {
                    match self.from_io.try_recv() {
                        Ok(io) => self.on_io(io),
                        Err(_) => break,
                    }
                }
            }
            command = self.commands.recv() => match command {
                Some(Command::Freeze { packing, reply }) => self.freeze(packing, reply).await,
                Some(command) => self.on_command(command),
                // Every handle is gone: nobody could stop the cluster any more.
                None => self.feed(Input::Stop),
            },
            () = sleep_until(deadline) => {}
        }
        self.run_timers();
        self.look_for_silence();
        self.feed(Input::Tick);
        self.deliver();
    }

    pub(crate) fn now(&self) -> Time {
        Time::new(self.origin.elapsed())
    }

    fn deadline(&self) -> Option<Instant> {
        // A batch was cut short: go on after whatever else is there.
        if self.ports.has_more() {
            return Some(Instant::now());
        }
        let at = |time: Time| self.origin + time.since_origin();
        let timer = self.timers.keys().next().map(|(at, _)| *at);
        let supervisor = self.supervisor.deadline().map(at);
        let handoff = self.ports.deadline().map(at);
        let silence = self.watchdog.deadline().map(at);
        [timer, supervisor, handoff, silence].into_iter().flatten().min()
    }

    pub(crate) fn after(&mut self, delay: Duration, timer: Timer) {
        self.timer_seq += 1;
        self.timers.insert((Instant::now() + delay, self.timer_seq), timer);
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.timers.first_entry()
            && entry.key().0 <= now
        {
            match entry.remove() {
                Timer::ReadyByAge(worker) => self.became_ready(worker),
                Timer::OwnSocket(worker) => self.look_for_own_socket(worker),
                Timer::Drained(worker) => self.check_drained(worker),
                Timer::Accept(port) => self.ports.resume_accepting(port),
                Timer::NoBeat(worker) => self.no_beat(worker),
                Timer::Probe(worker) => self.probe(worker),
                Timer::Stranded(pause) => self.stranded_check(pause),
                Timer::StillThere(worker) => self.still_there(worker),
                Timer::Unused => self.close_unused(),
                Timer::Goodbye(worker, seq) => self.answer_goodbye(worker, seq),
                Timer::Doors => self.check_doors(),
                Timer::Stuck => self.look_for_stuck(),
                Timer::Queues => self.look_at_queues(),
                Timer::Health => self.look_at_health(),
            }
        }
    }

    /// Whether it is ready once it listens.
    pub(crate) fn is_ready_by_listening(&self, worker: WorkerId) -> bool {
        let ready_by = self.workers.get(&worker).map(|w| w.ready_by);
        matches!(ready_by, Some(Ready::Auto | Ready::Listening))
    }

    /// Whether it is ready once it has answered its probe.
    pub(crate) fn is_ready_by_probe(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|w| w.ready_by == Ready::Probe)
    }

    /// Tells the supervisor, and does what it says.
    pub(crate) fn feed(&mut self, input: Input) {
        let now = self.now();
        self.supervisor.handle(now, input, &mut self.actions);
        // Acting can lead to more input (a spawn that fails); the supervisor sees it in order.
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            self.act(action);
        }
        if self.actions.is_empty() {
            self.actions = actions;
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Spawn { slot, worker, generation, .. } => self.spawn(slot, worker, generation),
            Action::Admit { worker } => self.admit(worker),
            Action::Suspend { worker } => self.suspend(worker),
            Action::TellStop { worker, grace } => self.tell_stop(worker, grace),
            Action::Terminate { worker } => self.signal(worker, libc::SIGTERM),
            Action::Kill { worker } => self.signal(worker, libc::SIGKILL),
            Action::Signal { worker, signal } => self.signal(worker, signal),
            Action::Gone { slot, worker, exit, reason, lived, will_restart } => {
                self.gone(slot, worker, exit, reason, lived, will_restart);
            }
            Action::SlotFailed { slot, restarts, window } => {
                self.emit(Event::SlotFailed { slot: slot.0, restarts, window });
            }
            Action::SlotRetired { slot } => {
                self.trim_seats();
                self.tally.retired(slot.0);
                self.emit(Event::SlotRetired { slot: slot.0 });
                self.check_all_ready();
            }
            Action::Switched { generation, workers } => {
                self.emit(Event::Switched { generation, workers });
            }
            Action::Renewed { .. } => {}
            Action::RenewalFailed { slot, fault } => self.renewal_failed(slot, fault),
            Action::Reloaded { generation, replaced } => self.reloaded(generation, replaced),
            Action::ReloadFailed { generation, replaced, fault } => {
                self.reload_failed(generation, replaced, fault);
            }
            Action::Finished { outcome } => self.outcome = Some(self.told_outcome(outcome)),
            Action::Report(report) => self.report(report),
        }
    }

    /// What the supervisor thinks a person should know. A failed start is told where it fails, with the reason.
    fn report(&mut self, report: Report) {
        let (code, worker, text) = match report {
            Report::Replacing { worker, reason, after, .. } => (
                "replacing",
                Some(worker),
                format!("{reason}; its replacement starts in {} ms", after.as_millis()),
            ),
            Report::GraceExpired { worker } => (
                "grace-expired",
                Some(worker),
                "it did not finish within its grace period and is sent SIGTERM".to_owned(),
            ),
            Report::TooManyLeaving { worker, .. } => (
                "too-many-leaving",
                Some(worker),
                "too many workers of this slot are still finishing; the oldest is sent SIGTERM"
                    .to_owned(),
            ),
            Report::Unkillable { worker } => (
                "unkillable",
                Some(worker),
                "it is still there long after SIGKILL: the kernel holds it".to_owned(),
            ),
            Report::TooManySlots { asked, given } => (
                "too-many-slots",
                None,
                format!("{asked} workers are more than can be had; there are {given}"),
            ),
            Report::LastSlot => ("last-slot", None, "the last worker stays".to_owned()),
            Report::IgnoredWhileStopping => {
                ("stopping", None, "ignored: the cluster is stopping".to_owned())
            }
            _ => return,
        };
        let who = worker.and_then(|worker| self.workers.get(&worker)).map(|w| w.who);
        self.notice(code, who, text);
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::StopWithin(grace) => self.stop_within(grace),
            Command::Stop => {
                if std::mem::replace(&mut self.stopping, true) {
                    self.forced = true;
                    if self.closing_doors.take().is_some() {
                        self.feed(Input::Stop);
                    }
                    self.feed(Input::Stop);
                } else {
                    self.emit(Event::Stopping);
                    self.close_doors();
                }
            }
            Command::StopNow => {
                self.forced = true;
                if !std::mem::replace(&mut self.stopping, true) {
                    self.emit(Event::Stopping);
                }
                self.closing_doors = None;
                self.feed(Input::StopNow);
            }
            Command::ForgetKept => self.forget_kept(),
            Command::Scale(workers) => self.feed(Input::Scale { workers }),
            Command::AddOne => self.feed(Input::AddOne),
            Command::RemoveOne => self.feed(Input::RemoveOne),
            Command::RestartSlot(slot) => self.feed(Input::Restart { slot: SlotId(slot) }),
            Command::Fork { env, reply } => {
                self.forking.push_back((env, reply));
                self.feed(Input::Fork);
                // Answered by `spawn`; a cluster that is stopping forks nothing.
                if let Some((_, reply)) = self.forking.pop_front() {
                    let _ = reply.send(None);
                }
            }
            Command::Disconnect(worker) => self.feed(Input::Disconnect { worker }),
            Command::Kill(worker, signal) => self.feed(Input::Kill { worker, signal }),
            Command::Send { to, message, reply } => self.send(to, &message, reply),
            Command::Broadcast { message, reply } => {
                // The asker may have gone.
                let _ = reply.send(self.push_to_all(&message));
            }
            Command::TakePipe { of, number, reply } => {
                let worker = self.workers.get_mut(&of);
                let pipe = worker.and_then(|w| w.running.pipes.remove(&number));
                // The asker may have gone: the pipe is closed then.
                let _ = reply.send(pipe);
            }
            Command::Setup { settings, detected, reply } => {
                // The asker may have gone.
                let _ = reply.send(self.set_up(*settings, *detected));
            }
            Command::Reload { options, detected, reply } => {
                self.reload(*options, detected.map(|detected| *detected), reply);
            }
            Command::NotReloaded { why, reply } => self.refuse(reply, why),
            Command::Settings(reply) => {
                // The asker may have gone.
                let _ = reply.send(self.settings.clone());
            }
            Command::ReapStrangers => self.reap_strangers(),
            // Taken out by whoever can wait.
            Command::Freeze { .. } => {}
            Command::Status(reply) => {
                // The asker may have gone.
                let _ = reply.send(self.status());
            }
            Command::Figures(reply) => {
                // The asker may have gone.
                let _ = reply.send(self.figures());
            }
            Command::Measures(reply) => self.ask_measures(reply),
        }
    }

    fn on_io(&mut self, io: FromIo) {
        match io {
            FromIo::Item { worker, item } => self.on_item(worker, item),
            FromIo::ChannelEnd { worker, fault } => self.on_channel_end(worker, fault),
            FromIo::Writable { worker } => {
                if let Some(w) = self.workers.get_mut(&worker) {
                    w.running.link.writable();
                }
                self.flush(worker);
            }
            FromIo::Exited { worker, status, cpu } => self.on_exited(worker, status, cpu),
            FromIo::Acceptable { port } => {
                if self.ports.acceptable(port) {
                    self.refresh_ports();
                }
            }
            FromIo::Notified { worker, text } => self.on_notified(worker, &text),
            FromIo::Stirred => self.stirred(),
            FromIo::Probed { worker, number, answer } => self.probed(worker, number, answer),
            FromIo::Rested { worker, what } => self.rested(worker, what),
            FromIo::OutputRested(pipe) => self.output_rested(pipe),
        }
    }

    fn on_item(&mut self, worker: WorkerId, item: Item) {
        match item {
            Item::Node { incoming, prefixed, fd } => self.on_node(worker, incoming, prefixed, fd),
            Item::Advanced { incoming, fd } => self.on_node(worker, incoming, false, fd),
            Item::Native(message) => self.on_native(worker, message),
        }
    }

    // ---- life of a worker ----

    fn spawn(&mut self, slot: SlotId, worker: WorkerId, generation: u32) {
        // A restart that is due at the same moment is not what was asked for: forked slots are never restarted.
        let restartable = self.supervisor.slot(slot).is_some_and(|slot| slot.supervised);
        let forked = if restartable { None } else { self.forking.pop_front() };
        let extra = forked.as_ref().map(|(env, _)| env.as_slice()).unwrap_or_default();
        for failure in self.ports.take_seat(worker, Seat(slot.0)) {
            self.notice("slot", None, failure);
        }
        // Only programs that inherit sockets are to get them blocking: a Node worker hangs on such a one.
        let inherited = match self.detected.dialect {
            Dialect::Sockets => self.ports.inherited_by(worker),
            _ => Ok(Vec::new()),
        };
        let (settings, detected, environment) = match self.launches.get(&generation) {
            Some(launch) => (&launch.settings, &launch.detected, &launch.environment),
            None => (&self.settings, &self.detected, &self.environment),
        };
        let (ready_by, watchdog) = (settings.ready_by(), settings.watchdog);
        let probing = settings.probe.as_ref().map(Probing::new);
        let stop_by = settings.stop_by;
        let allowance = Allowance::draw(settings, &mut self.chance);
        let request = process::Request {
            slot,
            worker,
            settings,
            detected,
            environment,
            extra_env: extra,
            inherited,
            io: &self.io,
            output: &mut self.output,
            max_requests: allowance.requests(),
        };
        match process::start(request) {
            Ok(running) => {
                let terms = Terms { ready_by, stop_by, watchdog, allowance, probing };
                self.spawned(slot, worker, generation, terms, running);
            }
            Err(error) => {
                let transient = error.is_transient();
                self.notice(
                    "spawn-failed",
                    Some(Who { slot: slot.0, worker: worker.0, pid: 0 }),
                    error.to_string(),
                );
                self.feed(Input::SpawnFailed { worker, transient });
            }
        }
        if let Some((_, reply)) = forked {
            // The asker may have gone.
            let _ = reply.send(self.workers.contains_key(&worker).then_some(worker));
        }
    }

    fn spawned(
        &mut self,
        slot: SlotId,
        worker: WorkerId,
        generation: u32,
        terms: Terms,
        running: Running,
    ) {
        let Terms { ready_by, stop_by, watchdog, allowance, probing } = terms;
        let who = Who { slot: slot.0, worker: worker.0, pid: running.pid() };
        let has_channel = running.link.exists();
        self.workers.insert(
            worker,
            Worker {
                who,
                running,
                generation,
                ready_by,
                stop_by,
                handed_over: 0,
                allowance,
                started: Instant::now(),
                online: false,
                ready: false,
                admitted: false,
                leaving: false,
                told: false,
                disconnected: false,
                prefixed: false,
                calls: BTreeMap::new(),
                bind_failed: false,
                status: None,
                channel_ended: !has_channel,
                fault: false,
                watchdog,
                had_requests: None,
                probing,
                probes: BTreeMap::new(),
                beats: false,
                lag: None,
                silent: false,
                last_take_back: None,
                wants_to_leave: false,
                habit: Habit::default(),
                oom_kills: polyfork_sys::system::oom_kills(),
                waiting_senders: VecDeque::new(),
            },
        );
        self.watch_health();
        self.emit(Event::Fork(who));
        if self.supervisor.reloading() == Some(generation) {
            self.started_anew(worker, who);
        } else {
            self.all_ready = false;
        }
        if self.runtime().binds_itself() {
            self.is_bun(worker);
        }
        self.feed(Input::Spawned { worker });
        self.join_pinned(worker);
        match (ready_by, self.detected.dialect) {
            (Ready::Delay(delay), _) => self.after(delay, Timer::ReadyByAge(worker)),
            (Ready::Auto, Dialect::Sockets) => self.after(SOCKETS_DELAY, Timer::ReadyByAge(worker)),
            (Ready::Auto | Ready::Listening, Dialect::Node) => {
                self.after(OWN_SOCKET_CHECK, Timer::OwnSocket(worker));
            }
            _ => {}
        }
        if !has_channel {
            self.on_online(worker);
        }
    }

    /// The worker runs and can talk (Node: `online`).
    pub(crate) fn on_online(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.online, true) {
            return;
        }
        let who = w.who;
        self.emit(Event::Online(who));
        self.feed(Input::Online { worker });
    }

    /// The worker may have connections, as far as it is concerned.
    pub(crate) fn became_ready(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if w.leaving || std::mem::replace(&mut w.ready, true) {
            return;
        }
        self.feed(Input::Ready { worker });
    }

    fn admit(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.admitted = true;
        let who = w.who;
        self.ever_ready = true;
        self.ports.admit(worker, self.settings.window);
        self.refresh_ports();
        self.emit(Event::Ready(who));
        // As systemd does: signs of life are due from the moment it is ready.
        self.begin_watch(worker);
        self.check_all_ready();
    }

    /// All slots have a ready worker: say so, and see in a while which sockets the present program does not use.
    fn check_all_ready(&mut self) {
        let wanted = self.supervisor.slots().count();
        let ready = self.workers.values().filter(|w| w.admitted).count();
        let all = wanted > 0 && ready >= wanted;
        if all && !self.all_ready {
            self.emit(Event::AllReady { workers: u32::try_from(ready).unwrap_or(u32::MAX) });
            self.look_for_unused();
        }
        self.all_ready = all;
    }

    /// One look at a time: an earlier one that is planned is replaced.
    fn look_for_unused(&mut self) {
        self.timers.retain(|_, timer| !matches!(timer, Timer::Unused));
        self.after(UNUSED_AFTER, Timer::Unused);
    }

    /// Closes what nobody asked for, unless somebody who might is about to start. Where nobody is replaced,
    /// that includes the sockets of a program whose workers have all gone.
    fn close_unused(&mut self) {
        if !self.all_ready && (self.settings.supervise || !self.workers.is_empty()) {
            return;
        }
        for address in self.ports.close_unused() {
            self.emit(Event::Closed { address });
        }
        self.ports.release_kept();
        self.tell_of_store();
    }

    fn suspend(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let was_admitted = std::mem::replace(&mut w.admitted, false);
        let who = w.who;
        // Its grace period is its limit now.
        self.watchdog.forget(worker);
        self.ports.suspend(worker);
        self.refresh_ports();
        if was_admitted {
            self.emit(Event::Draining(who));
            self.all_ready = false;
        }
        self.check_drained(worker);
    }

    /// Stops, or goes on stopping, with another grace period than it was started with.
    fn stop_within(&mut self, grace: Duration) {
        self.settings.grace = grace;
        self.feed(Input::Grace { grace });
        if !std::mem::replace(&mut self.stopping, true) {
            self.emit(Event::Stopping);
            self.close_doors();
        }
    }

    /// The cluster stops. Who is in the queue by now is served; who comes later meets a closed port, not a queue
    /// that nobody empties.
    fn close_doors(&mut self) {
        self.closing_doors = Some(Instant::now());
        for failure in self.ports.refuse_new() {
            self.notice("stopping", None, failure);
        }
        self.check_doors();
    }

    /// As long as workers are admitted, they take what waits on sockets that are not one slot's own.
    fn check_doors(&mut self) {
        let Some(since) = self.closing_doors else { return };
        let limit = self.settings.grace.min(DOORS_LIMIT);
        let nobody = self.workers.values().all(|w| !w.admitted);
        if nobody || self.ports.is_dry() || since.elapsed() >= limit {
            self.closing_doors = None;
            self.feed(Input::Stop);
        } else {
            self.after(DRAIN_CHECK, Timer::Doors);
        }
    }

    /// What waited for a suspended worker has been taken by it: it can be asked to stop without loss.
    fn check_drained(&mut self, worker: WorkerId) {
        if !self.workers.contains_key(&worker) {
            return;
        }
        if self.ports.is_quiet(worker) {
            self.acknowledge_leaving(worker);
            self.feed(Input::Drained { worker });
        } else {
            self.rescue_from_silent(worker);
            self.after(DRAIN_CHECK, Timer::Drained(worker));
        }
    }

    fn tell_stop(&mut self, worker: WorkerId, grace: Duration) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        // One that said it is going needs no telling; a second word would cut its connections.
        if std::mem::replace(&mut w.leaving, true) {
            return;
        }
        let (has_channel, prefixed) = (!w.channel_ended, w.prefixed);
        match (w.stop_by, self.detected.dialect) {
            (StopBy::Signal(signal), _) => self.signal(worker, signal),
            (StopBy::Message, Dialect::Node) if has_channel => self.say_shutdown(worker),
            // Bun closes its channel on `disconnect` and goes on serving: it is asked as any other program is.
            (_, Dialect::Node) if has_channel && !prefixed => self.tell_node_stop(worker),
            (_, Dialect::Native) if has_channel => self.tell_native_stop(worker, grace),
            _ => self.signal(worker, libc::SIGTERM),
        }
        if self.stopping && self.workers.values().all(|w| w.leaving) {
            self.ports.close_all();
        }
    }

    /// PM2's way: the program is told, and does the rest.
    fn say_shutdown(&mut self, worker: WorkerId) {
        let message = Outgoing::new("shutdown", None, &self.spoken);
        if self.push_message(worker, &message).is_err() {
            self.signal(worker, libc::SIGTERM);
        }
        self.refresh_ports();
    }

    fn signal(&mut self, worker: WorkerId, signal: i32) {
        let Some(w) = self.workers.get(&worker) else { return };
        if let Err(error) = w.running.signal(signal) {
            let who = w.who;
            self.notice("signal", Some(who), format!("cannot send signal {signal}: {error}"));
        }
    }

    fn on_exited(
        &mut self,
        worker: WorkerId,
        status: std::io::Result<std::process::ExitStatus>,
        cpu: Option<Duration>,
    ) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.status = Some(status);
        w.running.link.process_ended();
        self.tally.used(w.who.slot, cpu.unwrap_or_default());
        self.settle(worker);
    }

    fn on_channel_end(&mut self, worker: WorkerId, fault: Option<ProtocolError>) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.channel_ended = true;
        match fault {
            Some(fault) => self.protocol_fault(worker, &fault.to_string()),
            None => self.told_disconnect(worker),
        }
        self.settle(worker);
    }

    /// A worker broke the rules of its channel: it is replaced, and nothing else happens.
    pub(crate) fn protocol_fault(&mut self, worker: WorkerId, what: &str) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.fault, true) {
            return;
        }
        let who = w.who;
        // What it has not read goes to others. What it has read is its own now: nobody will believe what it
        // says about it, and nobody else could make sense of the rest.
        self.take_back(worker);
        self.ports.abandon(worker);
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.running.link.close();
        w.channel_ended = true;
        self.notice("protocol-fault", Some(who), format!("{what}; the worker is replaced"));
        self.feed(Input::Unfit { worker, reason: Reason::ProtocolFault });
        self.told_disconnect(worker);
        self.settle(worker);
    }

    /// Node's `disconnect`, once.
    fn told_disconnect(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.disconnected, true) {
            return;
        }
        let (who, alive, leaving) = (w.who, w.status.is_none(), w.leaving);
        for waiting in w.waiting_senders.drain(..) {
            // The sender may have given up.
            let _ = waiting.send(Err(SendError::Disconnected.into()));
        }
        self.emit(Event::Disconnect(who));
        // The channel of a worker that just ends closes a moment before its end is seen.
        if alive && !leaving {
            self.after(ENDING, Timer::StillThere(worker));
        }
    }

    /// Its channel has been closed for a while and the process is there: nothing can be asked of it any more.
    fn still_there(&mut self, worker: WorkerId) {
        if self.workers.get(&worker).is_some_and(|w| w.status.is_none() && !w.leaving) {
            self.feed(Input::ChannelClosed { worker });
        }
    }

    /// Both the process and its channel have ended: only now is the worker dead to the supervisor.
    fn settle(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if !w.channel_ended {
            return;
        }
        let Some(status) = w.status.take() else { return };
        let before = w.oom_kills;
        let exit = match &status {
            Ok(status) => exit_of(*status),
            Err(_) => Exit::Unknown,
        };
        let of_its_own = w.running.group.as_ref().and_then(LimitGroup::oom_kills);
        let for_memory = || match of_its_own {
            Some(kills) if kills > 0 => true,
            // Or the group that all are in was short of it.
            _ => before.zip(polyfork_sys::system::oom_kills()).is_some_and(|(was, is)| is > was),
        };
        let out_of_memory = exit == Exit::Signal(libc::SIGKILL) && for_memory();
        self.feed(Input::Exited { worker, exit, out_of_memory });
    }

    fn gone(
        &mut self,
        slot: SlotId,
        worker: WorkerId,
        exit: Exit,
        reason: Reason,
        lived: Duration,
        will_restart: Option<Duration>,
    ) {
        let (who, voluntary, bind_failed) = match self.workers.remove(&worker) {
            Some(mut w) => {
                self.count_gone(worker, &w);
                self.measures_cannot_come(worker, w.who);
                w.running.link.close();
                self.give_up_group(w.running.group.take());
                for waiting in w.waiting_senders.drain(..) {
                    // The sender may have given up.
                    let _ = waiting.send(Err(SendError::Disconnected.into()));
                }
                if !w.disconnected && self.detected.dialect != Dialect::Sockets {
                    self.emit(Event::Disconnect(w.who));
                }
                (w.who, w.leaving, w.bind_failed)
            }
            None => (Who { slot: slot.0, worker: worker.0, pid: 0 }, false, false),
        };
        self.all_ready = false;
        if self.workers.is_empty() {
            self.look_for_unused();
        }
        self.ports.died(worker);
        self.watch.forget(worker);
        self.watchdog.forget(worker);
        self.refresh_ports();
        self.trim_seats();
        let (code, signal) = match exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(signal) => (None, Some(signal)),
            Exit::Unknown | Exit::NotStarted => (None, None),
        };
        self.emit(Event::Exit {
            who,
            code,
            signal,
            reason,
            lived,
            voluntary,
            restart_in: will_restart,
        });
        // A first start that fails because the address is taken will not get better by trying again.
        if bind_failed && !self.ever_ready && self.settings.supervise && !self.stopping {
            self.feed(Input::StopNow);
        }
    }

    /// Sockets of places that no worker needs any more are closed.
    fn trim_seats(&mut self) {
        let now = self.now();
        for failure in self.ports.trim_seats(self.supervisor.slots().count(), now) {
            self.notice("slot", None, failure);
        }
    }

    fn told_outcome(&mut self, ended: Ended) -> Outcome {
        match (ended, self.bind_failure.take()) {
            (_, Some((address, error))) if !self.ever_ready => {
                Outcome::BindFailed { address, error }
            }
            (Ended::Stopped, _) if self.forced => Outcome::Forced,
            (Ended::Stopped, _) => Outcome::Stopped,
            (Ended::AllFailed { last }, _) => Outcome::AllFailed { last },
            (Ended::NeverReady { first, last }, _) => Outcome::NeverReady { first, last },
        }
    }

    // ---- messages ----

    fn send(&mut self, to: WorkerId, message: &Outgoing, reply: Answer) {
        let outcome = self.push_message(to, message);
        match self.workers.get_mut(&to) {
            Some(w) if outcome.is_ok() && w.running.link.is_full() => {
                w.waiting_senders.push_back(reply);
            }
            _ => {
                // The sender may have given up.
                let _ = reply.send(outcome);
            }
        }
    }

    /// To everybody, or, when somebody speaks what it is not written in yet, to nobody.
    fn push_to_all(&mut self, message: &Outgoing) -> Result<(), Refusal> {
        for worker in self.workers.values() {
            if let Some(encoding) = worker.running.link.encoding()
                && !message.is_written_in(encoding)
            {
                return Err(Refusal::NotEncoded);
            }
        }
        let everybody: Vec<_> = self.workers.keys().copied().collect();
        let mut outcome = Ok(());
        for worker in everybody {
            // One that is gone or has no channel is passed over.
            let pushed = self.push_message(worker, message);
            if let Err(Refusal::Error(SendError::Encode(_))) = pushed {
                outcome = pushed;
            }
        }
        outcome
    }

    fn push_message(&mut self, to: WorkerId, message: &Outgoing) -> Result<(), Refusal> {
        let w = self.workers.get_mut(&to).ok_or(SendError::NoSuchWorker)?;
        if w.channel_ended || w.disconnected {
            return Err(SendError::Disconnected.into());
        }
        w.running.link.push_user_message(message)?;
        self.tally.message_out(w.who.slot);
        self.flush(to);
        Ok(())
    }

    /// Writes what waits, and releases senders once there is room.
    pub(crate) fn flush(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.running.link.flush();
        if !w.running.link.is_full() {
            for waiting in w.waiting_senders.drain(..) {
                // The sender may have given up.
                let _ = waiting.send(Ok(()));
            }
        }
    }

    pub(crate) fn on_user_message(&mut self, worker: WorkerId, message: Encoded) {
        let Some(message) = self.take_measures(worker, message) else { return };
        let Some(w) = self.workers.get(&worker) else { return };
        self.tally.message_in(w.who.slot);
        let (who, ready_by) = (w.who, w.ready_by);
        if ready_by == Ready::Message
            && match &message {
                Encoded::Json(text) => &**text == "\"ready\"",
                Encoded::Advanced(value) => value.as_str() == Some("ready"),
                Encoded::Postcard(_) => false,
            }
        {
            self.became_ready(worker);
        }
        self.emit(Event::Message { who, message: Message(message) });
    }

    // ---- small things ----

    fn on_notified(&mut self, worker: WorkerId, text: &[u8]) {
        let Some(w) = self.workers.get(&worker) else { return };
        let (who, ready_by) = (w.who, w.ready_by);
        let state = Notification::parse(text);
        if state.watchdog == Some(Alive::Alive) {
            self.alive(worker, None);
        }
        if let Some(limit) = state.watchdog_usec {
            self.change_watch(worker, Duration::from_micros(limit));
        }
        if let Some(by) = state.extend_timeout_usec {
            self.feed(Input::Extend { worker, by: Duration::from_micros(by) });
        }
        if let Some(text) = state.status {
            self.emit(Event::Status { who, text });
        }
        if state.stopping
            && let Some(w) = self.workers.get_mut(&worker)
        {
            w.leaving = true;
            self.feed(Input::Leaving { worker });
        }
        if state.ready && matches!(ready_by, Ready::Auto | Ready::Notify) {
            self.became_ready(worker);
        }
        if state.watchdog == Some(Alive::Trigger) {
            self.notice(
                "watchdog",
                Some(who),
                "it asked to be replaced (WATCHDOG=trigger)".to_owned(),
            );
            self.feed(Input::Replace { worker, reason: Reason::Watchdog });
        }
    }

    /// A program may bind for itself (`exclusive`, `reusePort`) and tell nobody. Then its own listening
    /// socket is what makes it ready.
    fn look_for_own_socket(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get(&worker) else { return };
        if w.ready || w.leaving {
            return;
        }
        let who = w.who;
        // A socket that it was given, but has not said yet that it listens on, is ours.
        let ours = ports::sockets_of("self");
        let its = &ports::sockets_of(&who.pid.to_string()) - &ours;
        // Nearly always it has none, and the table of all connections need not be read.
        let found =
            if its.is_empty() { Vec::new() } else { ports::listening_sockets(who.pid, &its) };
        // Bun says that it is online when its program loads the cluster module, which Bun.serve() does not need.
        if found.is_empty() || !(w.online || self.runtime().binds_itself()) {
            self.after(OWN_SOCKET_CHECK, Timer::OwnSocket(worker));
            return;
        }
        self.on_online(worker);
        let by = self.ports.own_socket_via();
        for address in found {
            self.emit(Event::Listening { who, address, by: Arc::clone(&by) });
        }
        self.became_ready(worker);
    }

    pub(crate) fn next_sequence(&mut self) -> u64 {
        let sequence = self.sequence;
        self.sequence += 1;
        sequence
    }

    pub(crate) fn answer_goodbye_later(&mut self, worker: WorkerId, seq: u64) {
        self.after(GOODBYE_PAUSE, Timer::Goodbye(worker, seq));
    }

    /// One look at a time: an earlier one that is planned is replaced.
    pub(crate) fn look_for_stranded(&mut self, pause: Duration) {
        self.timers.retain(|_, timer| !matches!(timer, Timer::Stranded(_)));
        self.after(pause, Timer::Stranded(pause));
    }

    pub(crate) fn pause_accepting(&mut self, port: ListenerId, pause: Duration) {
        self.after(pause, Timer::Accept(port));
    }

    /// As PID 1: ended processes that nobody else will ever wait for.
    fn reap_strangers(&self) {
        let ours: Vec<u32> = self.workers.values().map(|w| w.who.pid).collect();
        polyfork_sys::system::reap_strangers(&|pid| {
            u32::try_from(pid.as_raw_nonzero().get()).is_ok_and(|pid| ours.contains(&pid))
        });
    }

    /// A remark that is made at most once in `pause`, however often its cause repeats.
    pub(crate) fn notice_at_most(&mut self, code: &'static str, pause: Duration, text: String) {
        let now = Instant::now();
        let last = self.told.insert(code, now);
        match last {
            Some(last) if now - last < pause => {
                self.told.insert(code, last);
            }
            _ => self.notice(code, None, text),
        }
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.detected.runtime
    }

    pub(crate) fn emit(&self, event: Event) {
        // No subscriber is fine.
        let _ = self.events.send(event);
    }

    pub(crate) fn notice(&self, code: &'static str, who: Option<Who>, text: String) {
        self.emit(Event::Notice(Notice { code, who, text }));
    }

    /// Connections that a worker was given. A socket that is shared, or a worker's own, is not counted.
    pub(crate) fn connections_of(&self, id: WorkerId, w: &Worker) -> Option<u64> {
        match (self.ports.given(id), w.handed_over) {
            (None, 0) => self.ports.hands_over().then_some(0),
            (given, handed_over) => Some(given.unwrap_or(0) + handed_over),
        }
    }

    fn status(&self) -> Vec<WorkerStatus> {
        let state = |w: &Worker| match (w.leaving, w.admitted, w.online) {
            (true, ..) => "draining",
            (_, true, _) => "ready",
            (_, _, true) => "online",
            _ => "starting",
        };
        self.workers
            .iter()
            .map(|(id, w)| WorkerStatus {
                slot: w.who.slot,
                worker: w.who.worker,
                pid: w.who.pid,
                state: state(w),
                generation: w.generation,
                connections: self.connections_of(*id, w),
                uptime: w.started.elapsed(),
                connected: !w.channel_ended && self.detected.dialect != Dialect::Sockets,
                queue: self.ports.queue_of(WorkerId(w.who.worker)),
                event_loop_lag: w.lag,
                blocked: self.blocked_for(*id),
            })
            .collect()
    }
}

/// Whether it can stand in a list of names.
fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty() && name.chars().all(fits)
}

/// Whether these settings can be had with such workers.
pub(crate) fn check(settings: &Settings, detected: &Detected) -> Result<(), StartError> {
    watchdog::check(settings, detected)?;
    probe::check(settings, detected)
}

/// A worker's own pipes must not take the place of anything else, and only some can have shared memory.
pub(crate) fn check_pipes(settings: &Settings, dialect: Dialect) -> Result<(), StartError> {
    let first = process::first_free_number(dialect, settings.listen.len());
    let wrong = |number: &&u32| **number < first || i32::try_from(**number).is_err();
    if let Some(name) = settings.memory.keys().find(|name| !is_name(name)) {
        let text = format!("shared memory cannot have the name {name:?}");
        return Err(StartError::Settings(text));
    }
    if !settings.memory.is_empty() && dialect != Dialect::Native {
        let text = "only workers built on this crate can have shared memory".to_owned();
        return Err(StartError::Settings(text));
    }
    match settings.pipes.iter().find(wrong) {
        None => Ok(()),
        Some(number) => Err(StartError::Settings(format!(
            "a worker cannot have a pipe as descriptor {number}: choose from {first} on"
        ))),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn exit_of(status: std::process::ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

impl From<Stdio> for super::settings::Stream {
    fn from(stdio: Stdio) -> Self {
        match stdio {
            Stdio::Out => super::settings::Stream::Stdout,
            Stdio::Err => super::settings::Stream::Stderr,
        }
    }
}
