//! The primary on its way to the next image of its process: when it can go, what goes, and how it goes on.
//!
//! The order: [`Primary::freeze`] has every task come to rest and listens to the last of what they tell, then writes down
//! supervisor, workers, sockets, timers and settings. When the caller lets go of that, tasks start again where they rested.
//! [`Primary::wake`] makes the same primary from what was written, and starts them too.
//!
//! What is not carried is refused by name before anything is touched, or is known anew in a moment: measurements between
//! two looks at queues, how often a notice was told.
//!
//! The rule that surprises: each value is taken apart field by field, so that one that is added later cannot be forgotten
//! here without the compiler saying so.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork_core::restart::Jitter;
use polyfork_core::{ListenerId, Snapshot, Supervisor, Watchdog, WorkerId};
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{Primary, Rested, Started, Timer, Worker};
use crate::cluster::cgroup::GroupState;
use crate::cluster::detect::Detected;
use crate::cluster::event::Who;
use crate::cluster::figures::Tally;
use crate::cluster::health::{Allowance, HealthState};
use crate::cluster::measures::{Habit, QuestionsState};
use crate::cluster::outgoing::Spoken;
use crate::cluster::ports::Ports;
use crate::cluster::ports::carry::PortsState;
use crate::cluster::probe::{Probing, ProbingState};
use crate::cluster::process::carry::{PipeState, RunningState};
use crate::cluster::process::{Environment, OutputTasks, Pipe, Running};
use crate::cluster::reload::Launch;
use crate::cluster::settings::{Address, Output, Ready, Settings, StopBy};
use crate::cluster::stuck::WatchState;
use crate::cluster::to_loop::ToLoop;
use crate::cluster::upgrade::{
    FreezeError, Frozen, Moment, Packing, REST_LIMIT, ResumeError, Unpacking,
};

/// A primary as it is written down.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    settings: Settings,
    detected: Detected,
    launches: Vec<(u32, Settings, Detected)>,
    origin: Moment,
    supervisor: Snapshot,
    workers: Vec<WorkerState>,
    ports: PortsState,
    outputs: Vec<PipeState>,
    timers: Vec<(Moment, Timer)>,
    sequence: u64,
    chance: Jitter,
    health: HealthState,
    watchdog: Watchdog,
    groups_left: Vec<GroupState>,
    tally: Tally,
    questions: QuestionsState,
    watch: WatchState,
    ever_ready: bool,
    all_ready: bool,
    bind_failure: Option<(Address, i32)>,
}

/// A worker as it is written down.
#[derive(Debug, Serialize, Deserialize)]
struct WorkerState {
    id: WorkerId,
    who: Who,
    running: RunningState,
    generation: u32,
    ready_by: Ready,
    stop_by: StopBy,
    handed_over: u64,
    allowance: Allowance,
    started: Moment,
    online: bool,
    ready: bool,
    admitted: bool,
    leaving: bool,
    told: bool,
    disconnected: bool,
    prefixed: bool,
    calls: BTreeMap<u64, (ListenerId, u64)>,
    bind_failed: bool,
    /// It has ended: with this status, or nobody could tell.
    ended: Option<Option<i32>>,
    channel_ended: bool,
    fault: bool,
    watchdog: Option<Duration>,
    had_requests: Option<u64>,
    probing: Option<ProbingState>,
    probes: BTreeMap<u64, u64>,
    beats: bool,
    lag: Option<Duration>,
    silent: bool,
    last_take_back: Option<Moment>,
    wants_to_leave: bool,
    habit: Habit,
    oom_kills: Option<u64>,
}

impl Primary {
    /// Rests for as long as whoever asked holds the answer.
    pub(super) async fn freeze(
        &mut self,
        packing: Packing,
        reply: oneshot::Sender<Result<Frozen, FreezeError>>,
    ) {
        let written = match self.can_be_carried() {
            Ok(()) => match self.come_to_rest().await {
                Ok(()) => self.write(packing),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let answered = match written {
            Ok((state, packing)) => {
                let (goes_on, resting) = oneshot::channel();
                let answer = Ok(Frozen { state, packing, _goes_on: goes_on });
                reply.send(answer).map(|()| Some(resting))
            }
            Err(error) => reply.send(Err(error)).map(|()| None),
        };
        if let Ok(Some(resting)) = answered {
            // It ends by being dropped.
            let _ = resting.await;
        }
        self.go_on();
    }

    /// Names what stands in the way.
    fn can_be_carried(&self) -> Result<(), FreezeError> {
        let no = |what: &str| Err(FreezeError::NotCarried(what.to_owned()));
        self.supervisor.snapshot()?;
        if self.stopping || self.closing_doors.is_some() || self.outcome.is_some() {
            return Err(polyfork_core::NotNow::Stopping.into());
        }
        if self.reloading.is_some() {
            return Err(polyfork_core::NotNow::Reloading.into());
        }
        let shares = |settings: &Settings| !settings.memory.is_empty();
        if shares(&self.settings) || self.launches.values().any(|launch| shares(&launch.settings)) {
            return no("memory that workers share with this process");
        }
        if self.workers.values().any(|w| !w.waiting_senders.is_empty()) {
            return no("a message whose sender waits for a worker to read");
        }
        if !self.forking.is_empty() {
            return no("a worker that is being forked");
        }
        Ok(())
    }

    /// Lets every task come to rest, and takes in what they still have to tell.
    async fn come_to_rest(&mut self) -> Result<(), FreezeError> {
        self.io.tell(true);
        let limit = tokio::time::Instant::now() + REST_LIMIT;
        let io = self.io.clone();
        loop {
            tokio::select! {
                biased;
                Some(told) = self.from_io.recv() => self.on_io(told),
                () = io.quiet() => {}
                () = tokio::time::sleep_until(limit) => return Err(FreezeError::Busy),
            }
            while let Ok(told) = self.from_io.try_recv() {
                self.on_io(told);
            }
            // What was told may have led to new tasks; they come to rest as well.
            if io.is_quiet() && self.from_io.is_empty() {
                return self.can_be_carried();
            }
        }
    }

    /// Everything goes on as before.
    fn go_on(&mut self) {
        self.io.tell(false);
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for worker in ids {
            self.wake_worker(worker);
            self.flush(worker);
        }
        for pipe in std::mem::take(&mut self.rested_output) {
            self.read_output(pipe);
        }
    }

    fn wake_worker(&mut self, worker: WorkerId) {
        if let Some(w) = self.workers.get_mut(&worker) {
            w.running.go_on(worker, w.status.is_none(), &self.io);
        }
    }

    fn read_output(&mut self, pipe: Pipe) {
        // Without a reader of lines there are no such pipes.
        let Output::Lines(sink) = &self.settings.output else { return };
        if let Err(error) = self.output.read_on(pipe, sink.clone(), &self.io) {
            self.notice("output", None, format!("output of a worker is lost: {error}"));
        }
    }

    pub(super) fn rested(&mut self, worker: WorkerId, what: Rested) {
        if let Rested::Probe(number) = what {
            return self.probe_rested(worker, number);
        }
        if let Some(w) = self.workers.get_mut(&worker) {
            w.running.rested(what);
        }
        if !self.io.is_resting() {
            self.wake_worker(worker);
        }
    }

    pub(super) fn output_rested(&mut self, pipe: Pipe) {
        match self.io.is_resting() {
            true => self.rested_output.push(pipe),
            false => self.read_output(pipe),
        }
    }

    fn write(&self, mut packing: Packing) -> Result<(Vec<u8>, Packing), FreezeError> {
        let state = self.state(&mut packing)?;
        let bytes =
            postcard::to_stdvec(&state).map_err(|error| FreezeError::Write(error.to_string()))?;
        Ok((bytes, packing))
    }

    /// All that is carried. What is not named here is made anew in [`Primary::wake`].
    fn state(&self, packing: &mut Packing) -> Result<State, FreezeError> {
        let Primary {
            settings,
            detected,
            workers,
            ports,
            io: _,
            bind_failure,
            supervisor,
            launches,
            reloading: _,
            health,
            watchdog,
            groups_left,
            tally,
            questions,
            chance,
            actions: _,
            commands: _,
            from_io: _,
            events: _,
            origin,
            timers,
            timer_seq: _,
            sequence,
            forking: _,
            environment: _,
            spoken: _,
            output: _,
            rested_output,
            ever_ready,
            all_ready,
            outcome: _,
            told: _,
            forced: _,
            stopping: _,
            watch,
            closing_doors: _,
        } = self;
        let launch = |(generation, launch): (&u32, &Launch)| {
            let Launch { settings, detected, environment: _ } = launch;
            (*generation, settings.clone(), detected.clone())
        };
        let failure = |(address, error): &(Address, Arc<std::io::Error>)| {
            (address.clone(), error.raw_os_error().unwrap_or(libc::EINVAL))
        };
        let workers = workers.iter().map(|(id, worker)| WorkerState::of(*id, worker, packing));
        let workers = workers.collect::<Result<_, _>>()?;
        let outputs = rested_output.iter().map(|pipe| pipe.pack(packing));
        let outputs = outputs.collect::<Result<_, _>>()?;
        // Looks begin anew, see `wake`.
        let kept = |timer: &Timer| !matches!(timer, Timer::Health | Timer::Stuck);
        let timers = timers.iter().filter(|(_, timer)| kept(timer));
        Ok(State {
            settings: settings.clone(),
            detected: detected.clone(),
            launches: launches.iter().map(launch).collect(),
            origin: Moment(*origin),
            supervisor: supervisor.snapshot()?,
            workers,
            ports: ports.pack(packing)?,
            outputs,
            timers: timers.map(|((at, _), timer)| (Moment(*at), *timer)).collect(),
            sequence: *sequence,
            chance: chance.clone(),
            health: health.state(),
            watchdog: watchdog.clone(),
            groups_left: groups_left.iter().map(GroupState::of).collect(),
            tally: tally.clone(),
            questions: questions.state(),
            watch: watch.state(),
            ever_ready: *ever_ready,
            all_ready: *all_ready,
            bind_failure: bind_failure.as_ref().map(failure),
        })
    }

    /// Goes on where another image of this process has stopped.
    pub(crate) fn wake(
        state: State,
        unpacking: &mut Unpacking,
        anew: impl FnOnce(Settings) -> Settings,
    ) -> Result<Started, ResumeError> {
        state.check()?;
        let State {
            settings,
            detected,
            launches,
            origin,
            supervisor,
            workers,
            ports,
            outputs,
            timers,
            sequence,
            chance,
            health,
            watchdog,
            groups_left,
            tally,
            questions,
            watch,
            ever_ready,
            all_ready,
            bind_failure,
        } = state;
        let (commands_tx, commands) = mpsc::channel(64);
        let (io, from_io) = ToLoop::new();
        // Started by `go_on`, when everything is there.
        io.tell(true);
        let (events, first) = broadcast::channel(crate::cluster::EVENT_BUFFER);
        let (end_tx, end) = oneshot::channel();
        let settings = anew(settings);
        let mut of_generations = BTreeMap::new();
        for (generation, launch, detected) in launches {
            let (output, reload_from) = (settings.output.clone(), settings.reload_from.clone());
            let settings = Settings { output, reload_from, ..launch };
            let environment = Environment::new(&settings, &detected);
            of_generations.insert(generation, Launch { settings, detected, environment });
        }
        let mut living = BTreeMap::new();
        for worker in workers {
            let (id, worker) = worker.back(unpacking, &io)?;
            living.insert(id, worker);
        }
        let outputs = outputs.into_iter().map(|pipe| Pipe::unpack(pipe, unpacking));
        let rested_output = outputs.collect::<Result<_, _>>()?;
        let failure =
            |(address, errno)| (address, Arc::new(std::io::Error::from_raw_os_error(errno)));
        let timers: BTreeMap<(Instant, u64), Timer> =
            (1_u64..).zip(timers).map(|(number, (at, timer))| ((at.0, number), timer)).collect();
        let spoken = Arc::new(Spoken::default());
        let mut primary = Primary {
            ports: Ports::unpack(ports, unpacking, &io, settings.store.clone())?,
            supervisor: Supervisor::restore(supervisor)?,
            launches: of_generations,
            reloading: None,
            health: health.back(),
            watchdog,
            groups_left: groups_left.into_iter().map(GroupState::back).collect(),
            tally,
            questions: questions.back(),
            chance,
            actions: Vec::new(),
            workers: living,
            commands,
            from_io,
            io,
            events: events.clone(),
            origin: origin.0,
            timer_seq: timers.len() as u64,
            timers,
            sequence,
            forking: std::collections::VecDeque::new(),
            environment: Environment::new(&settings, &detected),
            spoken: Arc::clone(&spoken),
            output: OutputTasks::default(),
            rested_output,
            ever_ready,
            all_ready,
            outcome: None,
            told: BTreeMap::new(),
            bind_failure: bind_failure.map(failure),
            forced: false,
            stopping: false,
            watch: watch.back(),
            closing_doors: None,
            settings,
            detected,
        };
        primary.speak(&primary.detected, &primary.settings);
        for w in primary.workers.values() {
            spoken.note(w.running.link.encoding());
        }
        primary.go_on();
        primary.watch_health();
        if primary.ports.has_turns() {
            primary.stirred();
        }
        tokio::spawn(primary.live(end_tx));
        Ok(Started { commands: commands_tx, events, first, spoken, end })
    }
}

impl State {
    /// Whether its parts fit each other, as far as that can be told without its descriptors.
    pub(crate) fn check(&self) -> Result<(), ResumeError> {
        let supervisor = Supervisor::restore(self.supervisor.clone())?;
        self.ports.check()?;
        for worker in &self.workers {
            let known = supervisor.worker(worker.id).is_some_and(|it| it.slot.0 == worker.who.slot);
            if !known || worker.who.worker != worker.id.0 {
                return Err(ResumeError::inside("a worker that nobody supervises"));
            }
            if let Some(link) = &worker.running.link {
                link.check()?;
            }
        }
        let has = |id: WorkerId| self.workers.iter().any(|worker| worker.id == id);
        if !supervisor.workers().all(|worker| has(worker.id)) || !self.ports.admitted().all(has) {
            return Err(ResumeError::inside("a worker without a process"));
        }
        Ok(())
    }
}

impl WorkerState {
    fn of(id: WorkerId, worker: &Worker, packing: &mut Packing) -> Result<Self, FreezeError> {
        let Worker {
            who,
            running,
            generation,
            ready_by,
            stop_by,
            handed_over,
            allowance,
            started,
            online,
            ready,
            admitted,
            leaving,
            told,
            disconnected,
            prefixed,
            calls,
            bind_failed,
            status,
            channel_ended,
            fault,
            watchdog,
            had_requests,
            probing,
            probes,
            beats,
            lag,
            silent,
            last_take_back,
            wants_to_leave,
            habit,
            oom_kills,
            waiting_senders: _,
        } = worker;
        Ok(WorkerState {
            id,
            who: *who,
            running: running.pack(packing)?,
            generation: *generation,
            ready_by: *ready_by,
            stop_by: *stop_by,
            handed_over: *handed_over,
            allowance: *allowance,
            started: Moment(*started),
            online: *online,
            ready: *ready,
            admitted: *admitted,
            leaving: *leaving,
            told: *told,
            disconnected: *disconnected,
            prefixed: *prefixed,
            calls: calls.clone(),
            bind_failed: *bind_failed,
            ended: status.as_ref().map(|status| status.as_ref().ok().map(|it| it.into_raw())),
            channel_ended: *channel_ended,
            fault: *fault,
            watchdog: *watchdog,
            had_requests: *had_requests,
            probing: probing.as_ref().map(Probing::state),
            probes: probes.clone(),
            beats: *beats,
            lag: *lag,
            silent: *silent,
            last_take_back: last_take_back.map(Moment),
            wants_to_leave: *wants_to_leave,
            habit: *habit,
            oom_kills: *oom_kills,
        })
    }

    fn back(
        self,
        unpacking: &mut Unpacking,
        io: &ToLoop,
    ) -> Result<(WorkerId, Worker), ResumeError> {
        let nobody_knows = || std::io::Error::other("its status was not told");
        let status = |raw: Option<i32>| raw.map(ExitStatus::from_raw).ok_or_else(nobody_knows);
        let worker = Worker {
            who: self.who,
            running: Running::unpack(self.id, self.running, unpacking, io)?,
            generation: self.generation,
            ready_by: self.ready_by,
            stop_by: self.stop_by,
            handed_over: self.handed_over,
            allowance: self.allowance,
            started: self.started.0,
            online: self.online,
            ready: self.ready,
            admitted: self.admitted,
            leaving: self.leaving,
            told: self.told,
            disconnected: self.disconnected,
            prefixed: self.prefixed,
            calls: self.calls,
            bind_failed: self.bind_failed,
            status: self.ended.map(status),
            channel_ended: self.channel_ended,
            fault: self.fault,
            watchdog: self.watchdog,
            had_requests: self.had_requests,
            probing: self.probing.map(ProbingState::back),
            probes: self.probes,
            beats: self.beats,
            lag: self.lag,
            silent: self.silent,
            last_take_back: self.last_take_back.map(|at| at.0),
            wants_to_leave: self.wants_to_leave,
            habit: self.habit,
            oom_kills: self.oom_kills,
            waiting_senders: std::collections::VecDeque::new(),
        };
        Ok((self.id, worker))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use polyfork_wire::state::shape;

    use super::*;

    #[test]
    fn fault_37_the_shape_of_the_state_belongs_to_its_version() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cluster/upgrade/shape.txt");
        shape::hold(&shape::of::<State>(), &file);
    }
}
