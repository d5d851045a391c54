//! Which worker runs in which slot, and when it is admitted, stopped, restarted or given up.
//!
//! The shell feeds what happened ([`Input`]) and carries out what comes back ([`Action`]); it starts processes, sends signals
//! and reads channels, and decides nothing. Connections are handed out by [`crate::handoff`] or by the kernel; how soon and how
//! often a restart may be is [`crate::restart`]'s.
//!
//! # The life of a worker
//!
//! ```text
//! Spawning -> Starting -> Ready -> Suspended -> Stopping -> Terminating -> Killed
//!    |           |  ready_timeout      | 1 s       | grace       | kill_after
//!    +-----------+---------+-----------+-----------+-------------+----------------> Gone
//! ```
//!
//! (A reload puts Trial before Ready, see `reload`.) It only moves to the right, may skip states, and ends from any of them. Admit comes with Ready, Suspend when Ready (or
//! what came before it) is left for anything but Gone; so a worker gets no connection before it is ready and none after it
//! was told to stop.
//!
//! # Slots
//!
//! A slot has at most one *current* worker. One that leaves, or is unfit, stays in the slot as *leaving* until it is gone,
//! beside its successor. A slot below the wanted number is at any time starting, ready, waiting for a restart, at rest, or
//! failed; never forgotten.
//!
//! Where some ends leave a slot at rest ([`crate::restart::StopOn`]), a worker that leaves by itself stays the current one:
//! only its end says whether there is to be a successor.
//!
//! # Races, told once
//!
//! - *Stop while a process is being started.* The decision is kept with the worker; the moment the shell says Spawned, the
//!   worker is told. SpawnFailed ends it as well. So a stop waits for every process that was ever asked for.
//! - *Exit before the shell knows of the readiness.* Inputs about a worker that is gone are ignored.
//! - *Ready after Suspend.* A worker that was asked to stop before it was ready is not admitted any more.
//! - *A channel that closes because the process just died.* ChannelClosed suspends and replaces it, and the Exited that
//!   follows tells the true reason.
//!
//! The surprising rule: Stop wins. After it nothing starts, whatever is asked, until [`Action::Finished`].
//!
//! Behaviour follows the section "Nothing lost" of the design; restart intensity as in Erlang/OTP's supervisor.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::id::{SlotId, WorkerId};
use crate::restart::{Decision, Jitter, Life, StopOn};
use crate::time::Time;

mod api;
mod carry;
mod record;
mod reload;

pub use api::{
    Action, Exit, Input, Outcome, Plan, Reason, Report, SlotState, SlotView, SupervisorLimits,
    WorkerState, WorkerView,
};
pub use carry::{Inconsistent, NotNow, Snapshot};
use record::{Manner, Pending, Slot, Wait, Worker};
pub use reload::{READY_LIMIT, ReloadFault, ReloadPlan};
use reload::{Reload, Unfit};

/// How long [`Input::Drained`] is waited for.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// The grace of a worker that never became ready: it serves nothing that could be lost.
pub const START_GRACE: Duration = Duration::from_millis(500);
/// How long after SIGKILL a worker that is still there is reported.
pub const UNKILLABLE_AFTER: Duration = Duration::from_secs(5);
/// The most slots a cluster has.
pub const MAX_SLOTS: u32 = 4096;
/// The most workers that leave one slot at their leisure; beyond, the oldest is hurried.
pub const MAX_LEAVING: usize = 8;
/// The most workers that leave one slot at all; beyond, its next start waits. Reached only when SIGKILL does not help.
const MAX_LEAVING_EVER: usize = 2 * MAX_LEAVING;
/// How long that start waits before it looks again.
const CROWDED_WAIT: Duration = Duration::from_secs(1);

#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Phase {
    /// Before [`Input::Start`].
    New,
    Running,
    /// Everyone finishes.
    Stopping,
    /// Everyone was sent SIGKILL.
    Killing,
    Finished,
}

/// The supervisor of one cluster. See the module's text.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Supervisor {
    plan: Plan,
    phase: Phase,
    now: Time,
    slots: BTreeMap<SlotId, Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    next_worker: u64,
    jitter: Jitter,
    ever_ready: bool,
    first_reason: Option<Reason>,
    last_reason: Option<Reason>,
    /// What new slots begin with.
    generation: u32,
    /// The highest that was ever begun.
    latest_generation: u32,
    /// Never carried: see `carry`.
    #[serde(skip)]
    reload: Option<Reload>,
    /// Asked for while a slot was being renewed.
    #[serde(skip)]
    queued_reload: Option<(ReloadPlan, u32)>,
    /// Workers that wait to be renewed, each once.
    #[serde(skip)]
    unfit: VecDeque<Unfit>,
}

impl Supervisor {
    /// A supervisor at rest; [`Input::Start`] sets it going.
    pub fn new(plan: Plan) -> Supervisor {
        let jitter = Jitter::new(plan.seed);
        Supervisor {
            plan,
            phase: Phase::New,
            now: Time::ZERO,
            slots: BTreeMap::new(),
            workers: BTreeMap::new(),
            next_worker: 1,
            jitter,
            ever_ready: false,
            first_reason: None,
            last_reason: None,
            generation: 1,
            latest_generation: 1,
            reload: None,
            queued_reload: None,
            unfit: VecDeque::new(),
        }
    }

    /// Other limits from now on, for whatever begins from now on: a wait that is under way keeps its end.
    pub fn set_limits(&mut self, limits: SupervisorLimits) {
        let SupervisorLimits { ready_timeout, grace, restart, stay_at_rest } = limits;
        self.plan = Plan { ready_timeout, grace, restart, stay_at_rest, ..self.plan.clone() };
    }

    /// Takes in what happened at `now` and appends what is to be done to `out`, to be carried out in that order.
    ///
    /// Everything whose time has come is done as well, whatever the input. A `now` before an earlier one counts as that one.
    pub fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        if self.phase == Phase::Finished {
            return;
        }
        self.take(input, out);
        // A switch may tell a worker to stop that has no time left for it, and its end may let a reload go on.
        loop {
            self.do_what_is_due(out);
            if !self.advance_reload(out) {
                break;
            }
        }
        self.settle(out);
    }

    /// When to feed [`Input::Tick`] at the latest; nothing when all that is pending is the shell's to tell.
    pub fn deadline(&self) -> Option<Time> {
        let workers = self.workers.values().filter_map(|worker| worker.deadline);
        let slots = self.slots.values().filter_map(|slot| slot.waiting.map(|wait| wait.until));
        workers.chain(slots).chain(self.reload_deadline()).min()
    }

    /// What is known of a worker that is not gone.
    pub fn worker(&self, worker: WorkerId) -> Option<&WorkerView> {
        self.workers.get(&worker).map(|worker| &worker.view)
    }

    /// All workers that are not gone, oldest first.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerView> {
        self.workers.values().map(|worker| &worker.view)
    }

    /// The workers that take connections, oldest first.
    pub fn live_workers(&self) -> impl Iterator<Item = &WorkerView> {
        self.workers().filter(|worker| worker.state == WorkerState::Ready)
    }

    /// One slot.
    pub fn slot(&self, slot: SlotId) -> Option<SlotView<'_>> {
        self.slots.get(&slot).map(|slot| self.slot_view(slot))
    }

    /// All slots, in order; those that were scaled away stay until their last worker is gone.
    pub fn slots(&self) -> impl Iterator<Item = SlotView<'_>> {
        self.slots.values().map(|slot| self.slot_view(slot))
    }

    /// How many slots are wanted, failed ones included, forked ones not.
    pub fn target(&self) -> u32 {
        let wanted = self.slots.values().filter(|slot| slot.wanted && slot.counted).count();
        u32::try_from(wanted).unwrap_or(u32::MAX)
    }

    /// Whether [`Input::Stop`] or [`Input::StopNow`] was taken in.
    pub fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping | Phase::Killing)
    }

    /// Whether [`Action::Finished`] was given.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    fn slot_view<'a>(&'a self, slot: &'a Slot) -> SlotView<'a> {
        slot.view(slot.current.and_then(|worker| self.worker(worker)).map(|worker| worker.state))
    }

    fn take(&mut self, input: Input, out: &mut Vec<Action>) {
        match input {
            Input::Spawned { worker } => self.spawned(worker, out),
            Input::SpawnFailed { worker, transient } => self.spawn_failed(worker, transient, out),
            Input::Online { worker } => self.online(worker),
            Input::Ready { worker } => self.ready(worker, out),
            Input::Leaving { worker } => self.leaving(worker, Reason::Voluntary, out),
            Input::ChannelClosed { worker } => self.leaving(worker, Reason::Disconnected, out),
            Input::Exited { worker, exit, out_of_memory } => {
                self.exited(worker, exit, out_of_memory, out);
            }
            Input::Unfit { worker, reason } => self.unfit(worker, reason, out),
            Input::Replace { worker, reason } => self.replace_gently(worker, reason, out),
            Input::Extend { worker, by } => self.extend(worker, by),
            Input::Drained { worker } => self.drained(worker, out),
            Input::Disconnect { worker } => self.disconnect(worker, out),
            Input::Kill { worker, signal } => self.signal(worker, signal, out),
            Input::Grace { grace } => self.set_grace(grace),
            Input::Stop if self.phase == Phase::Stopping => self.stop_now(out),
            Input::Stop => self.stop(out),
            Input::StopNow => self.stop_now(out),
            Input::Tick => {}
            Input::Start
            | Input::Scale { .. }
            | Input::AddOne
            | Input::RemoveOne
            | Input::Fork
            | Input::Reload(_)
            | Input::Renew { .. }
            | Input::Restart { .. } => self.wish(input, out),
        }
    }

    /// Inputs that would start something: Stop wins over them.
    fn wish(&mut self, input: Input, out: &mut Vec<Action>) {
        if self.is_stopping() {
            out.push(Action::Report(Report::IgnoredWhileStopping));
            return;
        }
        match input {
            Input::Start if self.phase == Phase::New => self.scale(self.plan.workers, out),
            Input::Scale { workers } => self.scale(workers, out),
            Input::AddOne => self.scale(self.target().saturating_add(1), out),
            Input::RemoveOne if self.target() <= 1 => out.push(Action::Report(Report::LastSlot)),
            Input::RemoveOne => self.scale(self.target() - 1, out),
            Input::Fork => self.fork(out),
            Input::Restart { slot } => self.restart(slot, out),
            Input::Reload(plan) => self.ask_reload(plan),
            Input::Renew { slot } => self.renew(slot),
            _ => {}
        }
    }
}

/// Slots: how many there are and when each starts a worker.
impl Supervisor {
    fn scale(&mut self, workers: u32, out: &mut Vec<Action>) {
        self.phase = Phase::Running;
        let now = self.target();
        let counted = self.slots.values().rev().filter(|slot| slot.wanted && slot.counted);
        let surplus = now.saturating_sub(workers) as usize;
        let surplus: Vec<SlotId> = counted.take(surplus).map(|slot| slot.id).collect();
        for id in surplus {
            self.retire(id, out);
        }
        self.open_slots(workers.saturating_sub(now), true, out);
    }

    fn fork(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Running;
        self.open_slots(1, false, out);
    }

    /// Opens the lowest slots that are not in use; their workers start at once. A supervised slot may be one whose last
    /// worker still leaves: those are bounded by a grace period. Others may stay for ever and keep their slot.
    fn open_slots(&mut self, more: u32, counted: bool, out: &mut Vec<Action>) {
        let shares = counted && self.plan.supervise;
        let free = |id: &SlotId| self.slots.get(id).is_none_or(|slot| shares && !slot.wanted);
        let free = (1..=MAX_SLOTS).map(SlotId).filter(free).take(more as usize);
        let free: Vec<SlotId> = free.collect();
        let opened = u32::try_from(free.len()).unwrap_or(u32::MAX);
        for id in free {
            self.open_slot(id, counted);
        }
        if opened < more {
            out.push(Action::Report(Report::TooManySlots { asked: more, given: opened }));
        }
    }

    fn open_slot(&mut self, id: SlotId, counted: bool) {
        let leaving = self.slots.remove(&id).map(|slot| slot.leaving).unwrap_or_default();
        let mut slot = Slot::new(id, self.generation);
        slot.counted = counted;
        slot.supervised = counted && self.plan.supervise;
        slot.leaving = leaving;
        slot.waiting = Some(Wait { until: self.now, counts: false });
        self.slots.insert(id, slot);
        if counted {
            self.reload_adds(id);
        }
    }

    /// Takes a slot out of the cluster; it disappears with its last worker.
    fn retire(&mut self, id: SlotId, out: &mut Vec<Action>) {
        self.reload_drops(id, out);
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.wanted = false;
        slot.waiting = None;
        if let Some(worker) = slot.current.take() {
            slot.leaving.push(worker);
            self.ask_to_stop(worker, Reason::Asked, Manner::Tell, true, out);
            self.hurry_the_oldest(id, out);
        }
    }

    fn restart(&mut self, id: SlotId, out: &mut Vec<Action>) {
        let now = self.now;
        let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.wanted) else { return };
        slot.failed = false;
        slot.rests = None;
        slot.history.forgive();
        slot.waiting = Some(Wait { until: now, counts: false });
        if let Some(worker) = slot.current.take() {
            slot.leaving.push(worker);
            self.ask_to_stop(worker, Reason::Asked, Manner::Tell, true, out);
            self.hurry_the_oldest(id, out);
        }
    }

    /// Starts the worker a slot waits for.
    fn start_worker(&mut self, id: SlotId, out: &mut Vec<Action>) {
        let now = self.now;
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(wait) = slot.waiting.take() else { return };
        if slot.leaving.len() >= MAX_LEAVING_EVER {
            slot.waiting = Some(Wait { until: now + CROWDED_WAIT, ..wait });
            return;
        }
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        if wait.counts {
            slot.history.restarted(&self.plan.restart, now);
        }
        slot.current = Some(worker);
        let (generation, attempt) = (slot.generation, slot.history.attempt());
        self.workers.insert(worker, Worker::new(worker, id, generation, now));
        out.push(Action::Spawn { slot: id, worker, generation, candidate: false, attempt });
    }

    /// The slot has lost its current worker, so it was wanted: what now? `exit` is how that ended, if it did.
    fn succession(
        &mut self,
        id: SlotId,
        reason: Reason,
        exit: Option<Exit>,
        started: Time,
        served: Option<Duration>,
    ) -> Option<Next> {
        let running = self.phase == Phase::Running;
        let slot = self.slots.get_mut(&id)?;
        slot.last_reason = Some(reason);
        if !running {
            return None;
        }
        if !slot.supervised {
            slot.wanted = false;
            return None;
        }
        let policy = &self.plan.restart;
        if let Some(exit) = exit.filter(|exit| policy.stop_on.covers(*exit)) {
            slot.rests = Some(exit);
            return Some(Next::Rest(exit));
        }
        let smooth = matches!(reason, Reason::Voluntary | Reason::Asked);
        let life = Life { lived: self.now.since(started), served };
        let (history, jitter) = (&mut slot.history, &mut self.jitter);
        let decision = if reason == Reason::NeverReady {
            history.never_got_ready(policy, self.now, started, jitter)
        } else {
            history.ended(policy, self.now, life, smooth, jitter)
        };
        match decision {
            Decision::Restart(wait) => {
                slot.waiting = Some(Wait { until: self.now + wait, counts: true });
            }
            Decision::GiveUp { .. } => slot.failed = true,
        }
        Some(match decision {
            Decision::Restart(after) => Next::Restart(after),
            Decision::GiveUp { restarts, within } => Next::GiveUp { restarts, within },
        })
    }

    /// A current worker that still runs becomes a leaving one, and its successor is arranged for.
    fn replace(&mut self, id: WorkerId, reason: Reason, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let (slot_id, started) = (worker.view.slot, worker.view.started);
        let served = worker.served(self.now);
        let Some(slot) = self.slots.get_mut(&slot_id) else { return };
        if slot.current != Some(id) {
            return;
        }
        slot.current = None;
        slot.leaving.push(id);
        match self.succession(slot_id, reason, None, started, served) {
            Some(Next::Restart(after)) => {
                let report = Report::Replacing { slot: slot_id, worker: id, reason, after };
                out.push(Action::Report(report));
            }
            Some(next) => tell_next(slot_id, next, out),
            None => {}
        }
        self.hurry_the_oldest(slot_id, out);
    }

    /// Bounds the workers that leave a slot at their leisure.
    fn hurry_the_oldest(&mut self, id: SlotId, out: &mut Vec<Action>) {
        let Some(slot) = self.slots.get(&id) else { return };
        let states = slot.leaving.iter().filter_map(|id| self.workers.get(id));
        let at_leisure: Vec<WorkerId> = states
            .filter(|worker| worker.view.state < WorkerState::Terminating)
            .filter(|worker| worker.pending != Pending::Kill)
            .map(|worker| worker.view.id)
            .collect();
        let too_many = at_leisure.len().saturating_sub(MAX_LEAVING);
        for worker in at_leisure.into_iter().take(too_many) {
            out.push(Action::Report(Report::TooManyLeaving { slot: id, worker }));
            self.terminate(worker, Reason::GraceExpired, out);
        }
    }
}

/// Workers: from Spawn to Gone.
impl Supervisor {
    fn spawned(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let (now, limit) = (self.now, self.plan.ready_timeout);
        let Some(worker) = self.in_state(id, WorkerState::Spawning) else { return };
        worker.view.state = WorkerState::Starting;
        // Somebody waits for a candidate.
        let limit = if worker.view.candidate { limit.or(Some(READY_LIMIT)) } else { limit };
        worker.deadline = limit.and_then(|limit| now.after(limit));
        let (pending, signal) = (worker.pending, worker.pending_signal.take());
        if let Some(signal) = signal {
            out.push(Action::Signal { worker: id, signal });
        }
        match pending {
            Pending::Nothing => {}
            Pending::Stop => self.begin_stop(id, out),
            Pending::Kill => self.kill(id, out),
        }
    }

    fn spawn_failed(&mut self, id: WorkerId, transient: bool, out: &mut Vec<Action>) {
        let Some(worker) = self.in_state(id, WorkerState::Spawning) else { return };
        let slot = worker.view.slot;
        out.push(Action::Report(Report::SpawnFailed { slot, worker: id, transient }));
        self.exited(id, Exit::NotStarted, false, out);
    }

    fn online(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.view.online = true;
        }
    }

    fn ready(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let now = self.now;
        // The shell hears from a process before it has entered its start: enter it now.
        self.spawned(id, out);
        let Some(worker) = self.in_state(id, WorkerState::Starting) else { return };
        if worker.view.candidate {
            worker.view.state = WorkerState::Trial;
            worker.deadline = None;
            return;
        }
        worker.view.state = WorkerState::Ready;
        worker.view.ready = Some(now);
        worker.deadline = None;
        self.ever_ready = true;
        out.push(Action::Admit { worker: id });
    }

    /// It goes, or cannot be talked to any more. What Node leaves to itself is left to itself without supervision.
    fn leaving(&mut self, id: WorkerId, reason: Reason, out: &mut Vec<Action>) {
        let supervised = self.is_supervised(id);
        self.ask_to_stop(id, reason, Manner::Wait, supervised, out);
        if self.plan.restart.stop_on == StopOn::Nothing {
            self.replace(id, reason, out);
        }
    }

    fn disconnect(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let supervised = self.is_supervised(id);
        self.ask_to_stop(id, Reason::Asked, Manner::Tell, supervised, out);
        self.replace(id, Reason::Asked, out);
    }

    fn is_supervised(&self, id: WorkerId) -> bool {
        let slot = self.workers.get(&id).and_then(|worker| self.slots.get(&worker.view.slot));
        slot.is_some_and(|slot| slot.supervised)
    }

    fn signal(&mut self, id: WorkerId, signal: i32, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.asked_signal = Some(signal);
        if worker.view.state == WorkerState::Spawning {
            worker.pending_signal = Some(signal);
        } else {
            out.push(Action::Signal { worker: id, signal });
        }
    }

    /// Begins a stop, from whatever state allows one. `enforced`: whether the end of the grace period has consequences.
    fn ask_to_stop(
        &mut self,
        id: WorkerId,
        reason: Reason,
        manner: Manner,
        enforced: bool,
        out: &mut Vec<Action>,
    ) {
        let deadline = self.now.after(self.plan.grace);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let state = worker.view.state;
        if state >= WorkerState::Terminating {
            return;
        }
        worker.note(reason);
        worker.enforced |= enforced;
        if state == WorkerState::Stopping {
            // It stops already. One that could take as long as it liked gets its limit now.
            if worker.enforced && worker.deadline.is_none() {
                worker.deadline = deadline;
            }
        } else if state == WorkerState::Spawning {
            if worker.pending == Pending::Nothing {
                worker.pending = Pending::Stop;
                worker.manner = manner;
            }
        } else if state != WorkerState::Suspended {
            worker.manner = manner;
            self.begin_stop(id, out);
        }
    }

    /// Suspends a worker that is asked to stop; one that was never admitted has nothing to drain.
    fn begin_stop(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let drained_by = self.now.after(DRAIN_LIMIT);
        self.suspend(id, out);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.view.ready.is_some() {
            worker.view.state = WorkerState::Suspended;
            worker.deadline = drained_by;
        } else {
            self.tell_stop(id, out);
        }
    }

    fn drained(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        if self.in_state(id, WorkerState::Suspended).is_some() {
            self.tell_stop(id, out);
        }
    }

    fn tell_stop(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let tell = worker.manner == Manner::Tell;
        let idle = tell && worker.view.ready.is_none();
        let grace = if idle { self.plan.grace.min(START_GRACE) } else { self.plan.grace };
        worker.view.state = WorkerState::Stopping;
        worker.deadline = if worker.enforced { self.now.after(grace) } else { None };
        if tell {
            out.push(Action::TellStop { worker: id, grace });
        }
    }

    fn suspend(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        if let Some(worker) = self.workers.get_mut(&id)
            && !worker.suspended
        {
            worker.suspended = true;
            out.push(Action::Suspend { worker: id });
        }
    }

    fn unfit(&mut self, id: WorkerId, reason: Reason, out: &mut Vec<Action>) {
        self.terminate(id, reason, out);
        self.replace(id, reason, out);
    }

    /// More time for what has a limit. A worker that was sent SIGTERM has had its time.
    fn extend(&mut self, id: WorkerId, by: Duration) {
        let until = self.now.after(by);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if matches!(worker.view.state, WorkerState::Starting | WorkerState::Stopping)
            && worker.deadline.is_some_and(|deadline| until.is_none_or(|until| until > deadline))
        {
            worker.deadline = until;
        }
    }

    fn terminate(&mut self, id: WorkerId, reason: Reason, out: &mut Vec<Action>) {
        let deadline = self.now.after(self.plan.kill_after);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.view.state >= WorkerState::Terminating {
            return;
        }
        worker.note(reason);
        if worker.view.state == WorkerState::Spawning {
            worker.pending = Pending::Kill;
            return;
        }
        worker.view.state = WorkerState::Terminating;
        worker.deadline = deadline;
        self.suspend(id, out);
        out.push(Action::Terminate { worker: id });
    }

    fn kill(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let deadline = self.now.after(UNKILLABLE_AFTER);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if worker.view.state == WorkerState::Killed {
            return;
        }
        if worker.view.state == WorkerState::Spawning {
            worker.pending = Pending::Kill;
            return;
        }
        worker.view.state = WorkerState::Killed;
        worker.deadline = deadline;
        self.suspend(id, out);
        out.push(Action::Kill { worker: id });
    }

    fn exited(&mut self, id: WorkerId, exit: Exit, out_of_memory: bool, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.remove(&id) else { return };
        let slot_id = worker.view.slot;
        let reason = reason_of(&worker, exit, out_of_memory);
        self.first_reason.get_or_insert(reason);
        self.last_reason = Some(reason);
        let tried = self.reload_lost(slot_id, id, reason, exit);
        let was_current = self.forget(slot_id, id);
        let next = if was_current {
            let (started, served) = (worker.view.started, worker.served(self.now));
            self.succession(slot_id, reason, Some(exit), started, served)
        } else {
            tried.then_some(Next::Rest(exit))
        };
        out.push(Action::Gone {
            slot: slot_id,
            worker: id,
            exit,
            reason,
            lived: self.now.since(worker.view.started),
            will_restart: self.restart_in(slot_id),
        });
        if let Some(next) = next {
            tell_next(slot_id, next, out);
        }
    }

    /// Takes a worker out of its slot; tells whether it was the current one.
    fn forget(&mut self, slot: SlotId, worker: WorkerId) -> bool {
        let Some(slot) = self.slots.get_mut(&slot) else { return false };
        slot.leaving.retain(|id| *id != worker);
        slot.current.take_if(|id| *id == worker).is_some()
    }

    /// How long the slot still waits before it starts a worker, if it does.
    fn restart_in(&self, slot: SlotId) -> Option<Duration> {
        let wait = self.slots.get(&slot)?.waiting?;
        Some(wait.until.since(self.now))
    }

    fn in_state(&mut self, id: WorkerId, state: WorkerState) -> Option<&mut Worker> {
        self.workers.get_mut(&id).filter(|worker| worker.view.state == state)
    }
}

/// The end of the cluster, and what comes with time.
impl Supervisor {
    fn stop(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Killing {
            return;
        }
        self.phase = Phase::Stopping;
        self.reload_stops(out);
        self.cancel_starts();
        for id in self.worker_ids() {
            self.ask_to_stop(id, Reason::Asked, Manner::Tell, true, out);
        }
    }

    /// Who was sent SIGTERM already keeps the limit of that.
    fn set_grace(&mut self, grace: Duration) {
        self.plan.grace = grace;
        let deadline = self.now.after(grace);
        for worker in self.workers.values_mut() {
            if worker.view.state == WorkerState::Stopping && worker.enforced {
                worker.deadline = deadline;
            }
        }
    }

    fn stop_now(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Killing;
        self.reload_stops(out);
        self.cancel_starts();
        for id in self.worker_ids() {
            if let Some(worker) = self.workers.get_mut(&id) {
                worker.note(Reason::Asked);
            }
            self.kill(id, out);
        }
    }

    fn cancel_starts(&mut self) {
        for slot in self.slots.values_mut() {
            slot.waiting = None;
        }
    }

    fn worker_ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().collect()
    }

    /// Moves every worker whose time has come on, steps without a wait at once, then starts what is to be started.
    ///
    /// It ends: a worker only moves forward through its states, and a slot is looked at once.
    fn do_what_is_due(&mut self, out: &mut Vec<Action>) {
        loop {
            let due = self.workers.values().filter(|worker| self.is_due(worker.deadline));
            let due: Vec<WorkerId> = due.map(|worker| worker.view.id).collect();
            if due.is_empty() {
                break;
            }
            for id in due {
                self.worker_is_due(id, out);
            }
        }
        let due = self.slots.values().filter(|slot| self.is_due(slot.waiting.map(|w| w.until)));
        let due: Vec<SlotId> = due.map(|slot| slot.id).collect();
        for id in due {
            self.start_worker(id, out);
        }
    }

    fn is_due(&self, at: Option<Time>) -> bool {
        at.is_some_and(|at| at <= self.now)
    }

    fn worker_is_due(&mut self, id: WorkerId, out: &mut Vec<Action>) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.deadline = None;
        match worker.view.state {
            WorkerState::Spawning | WorkerState::Trial | WorkerState::Ready => {}
            WorkerState::Starting => self.unfit(id, Reason::NeverReady, out),
            WorkerState::Suspended => self.tell_stop(id, out),
            // It never served anybody, so nothing is cut: it was only too busy starting to listen to us.
            WorkerState::Stopping if worker.view.ready.is_none() => {
                self.terminate(id, Reason::Asked, out);
            }
            WorkerState::Stopping => {
                out.push(Action::Report(Report::GraceExpired { worker: id }));
                self.terminate(id, Reason::GraceExpired, out);
            }
            WorkerState::Terminating => self.kill(id, out),
            WorkerState::Killed => out.push(Action::Report(Report::Unkillable { worker: id })),
        }
    }

    /// Removes slots that are done with, and says when it is over.
    fn settle(&mut self, out: &mut Vec<Action>) {
        self.slots.retain(|id, slot| {
            let stays = slot.wanted || !slot.is_empty();
            if !stays {
                out.push(Action::SlotRetired { slot: *id });
            }
            stays
        });
        if let Some(outcome) = self.outcome() {
            self.phase = Phase::Finished;
            out.push(Action::Finished { outcome });
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        if !self.workers.is_empty() {
            return None;
        }
        if self.is_stopping() {
            return Some(Outcome::Stopped);
        }
        let (first, last) = (self.first_reason?, self.last_reason?);
        // A candidate's process is among the workers: here nobody is on the way.
        let is_over = |slot: &Slot| slot.waiting.is_none() && (slot.failed || slot.rests.is_some());
        if self.slots.is_empty() || !self.slots.values().all(is_over) {
            return None;
        }
        let rests = || self.slots.values().filter_map(|slot| slot.rests);
        let any_failed = self.slots.values().any(|slot| slot.failed);
        if rests().next().is_some() && (self.plan.stay_at_rest || !any_failed) {
            let named = matches!(self.plan.restart.stop_on, StopOn::Codes(_));
            let clean = rests().all(|exit| exit == Exit::Code(0) || named);
            return (!self.plan.stay_at_rest).then_some(Outcome::AtRest { last, clean });
        }
        Some(match self.ever_ready {
            true => Outcome::AllFailed { last },
            false => Outcome::NeverReady { first, last },
        })
    }
}

/// What becomes of a slot that has lost its worker.
#[derive(Copy, Clone, Debug)]
enum Next {
    Restart(Duration),
    GiveUp { restarts: u32, within: Duration },
    Rest(Exit),
}

/// Tells it, unless there is a successor: that is told with the end.
fn tell_next(slot: SlotId, next: Next, out: &mut Vec<Action>) {
    match next {
        Next::Restart(_) => {}
        Next::GiveUp { restarts, within } => {
            out.push(Action::SlotFailed { slot, restarts, window: within });
        }
        Next::Rest(exit) => out.push(Action::SlotRests { slot, exit }),
    }
}

/// What is told as the reason of an end.
fn reason_of(worker: &Worker, exit: Exit, out_of_memory: bool) -> Reason {
    if out_of_memory {
        return Reason::OutOfMemory;
    }
    let by_itself = worker.view.state < WorkerState::Terminating;
    match worker.view.reason {
        // The channel closed because the process was dying.
        Some(Reason::Disconnected) if by_itself => Reason::Exited(exit),
        Some(reason) => reason,
        None if was_asked(worker.asked_signal, exit) => Reason::Asked,
        None => Reason::Exited(exit),
    }
}

/// Whether a signal that was asked for explains the end: it is the one that ended it, or one that asks programs to end.
fn was_asked(signal: Option<i32>, exit: Exit) -> bool {
    const ENDING: [i32; 4] = [2, 3, 9, 15]; // INT, QUIT, KILL, TERM: the same numbers on every Unix
    signal.is_some_and(|signal| exit == Exit::Signal(signal) || ENDING.contains(&signal))
}
