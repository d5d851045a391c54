//! The primary: one loop that owns every worker, every listening socket and every decision's outcome.
//!
//! What should happen is decided by `polyfork_core::Supervisor` (life of workers) and
//! `polyfork_core::Handoff` (who gets which connection). This loop feeds them what happened and carries out
//! what they answer. What that means for one worker is in `starting`, `leaving` and `talk`. Starting a process is
//! in `process`, channels in `link`, sockets in `ports`, what Node workers say in `node`, what native ones say in
//! `native`, `NOTIFY_SOCKET` in `notify`.
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
    Action, Input, ListenerId, Plan, Report, SlotId, Supervisor, Time, Watchdog, WorkerId,
};
use polyfork_sys::system::LimitGroup;
use polyfork_wire::ProtocolError;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::detect::{Detected, Runtime};
use super::event::{Event, Notice, Outcome, Who};
use super::figures::{Figures, Tally};
use super::health::{Allowance, Health};
use super::link::{self, Item};
use super::measures::{Asked, Habit, Questions};
use super::outgoing::{Encoding, Outgoing, Refusal, Spoken};
use super::ports::Ports;
use super::ports::store::Stored;
use super::probe::Probing;
use super::process::{self, Environment, Running, Stdio};
use super::reload::{self, Launch, ReloadError, ReloadOptions, Reloading};
use super::settings::{Address, Dialect, Mechanism, Ready, Settings, StopBy};
use super::stuck::Watch;
use super::to_loop::ToLoop;
use super::upgrade::{FreezeError, Frozen, Packing};
use super::{StartError, WorkerStatus, cgroup, probe, watchdog};

mod carry;
mod leaving;
mod starting;
mod talk;

pub(crate) use carry::State;

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
            stay_at_rest: settings.stay_at_rest,
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
            stay_at_rest: old.stay_at_rest,
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
            Action::SlotRests { slot, exit } => {
                let (code, signal) = leaving::code_and_signal(exit);
                self.emit(Event::SlotRests { slot: slot.0, code, signal });
                self.check_all_ready();
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

    // ---- messages ----

    // ---- small things ----

    pub(crate) fn next_sequence(&mut self) -> u64 {
        let sequence = self.sequence;
        self.sequence += 1;
        sequence
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

impl From<Stdio> for super::settings::Stream {
    fn from(stdio: Stdio) -> Self {
        match stdio {
            Stdio::Out => super::settings::Stream::Stdout,
            Stdio::Err => super::settings::Stream::Stderr,
        }
    }
}
