//! The book of workers and slots: what the shell was told to do, in which order, and whether it was allowed.
//!
//! It reads actions only and keeps its own count of restarts. The surprising rule: a start counts as a restart unless the slot
//! is new, or a person asked for it; the supervisor's own idea of what it counts is not consulted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use polyfork_core::{Action, Outcome, Plan, SlotId, Time, WorkerId};

#[derive(Debug, Default)]
struct Seen {
    process: bool,
    ready_said: bool,
    admitted: bool,
    suspended: bool,
    told: bool,
    terminated: bool,
    killed: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    plan: Plan,
    alive: BTreeMap<WorkerId, (SlotId, Seen)>,
    last_worker: u64,
    restarts: BTreeMap<SlotId, VecDeque<Time>>,
    /// Slots whose next start is free: new ones, or asked for.
    forgiven: BTreeSet<SlotId>,
    failed: BTreeSet<SlotId>,
    resting: BTreeSet<SlotId>,
    /// The generation of slots that are opened now.
    generation: u32,
    /// Workers of a generation that has not taken over.
    candidates: BTreeMap<WorkerId, u32>,
    pub(crate) spawned: u64,
    pub(crate) gone: u64,
    pub(crate) stop_asked: bool,
    pub(crate) finished: Option<Outcome>,
}

impl Book {
    pub(crate) fn new(plan: Plan) -> Book {
        Book { plan, generation: 1, ..Book::default() }
    }

    pub(crate) fn forgive(&mut self, slot: SlotId) {
        self.forgiven.insert(slot);
        self.failed.remove(&slot);
        self.resting.remove(&slot);
    }

    pub(crate) fn process_exists(&mut self, worker: WorkerId) {
        self.seen(worker).process = true;
    }

    pub(crate) fn said_ready(&mut self, worker: WorkerId) {
        if let Some((_, seen)) = self.alive.get_mut(&worker) {
            seen.ready_said = true;
        }
    }

    /// Whether this worker may be sent a connection.
    pub(crate) fn may_receive(&self, worker: WorkerId) -> bool {
        let seen = self.alive.get(&worker).map(|(_, seen)| seen);
        seen.is_some_and(|seen| seen.admitted && !seen.suspended)
    }

    pub(crate) fn is_alive(&self, worker: WorkerId) -> bool {
        self.alive.contains_key(&worker)
    }

    pub(crate) fn alive(&self) -> usize {
        self.alive.len()
    }

    pub(crate) fn enter(&mut self, now: Time, action: &Action) {
        assert_eq!(self.finished, None, "{action:?} after the end");
        match *action {
            Action::Spawn { slot, worker, generation, candidate, attempt } => {
                let candidate = candidate.then_some(generation);
                self.spawn(now, slot, worker, candidate, attempt);
            }
            Action::Switched { .. } => {}
            Action::Reloaded { generation, .. } => {
                assert!(generation > self.generation, "generation {generation} again");
                self.candidates.clear();
                self.generation = generation;
            }
            Action::ReloadFailed { generation, .. } => {
                self.candidates.retain(|_, of| *of != generation);
            }
            Action::Renewed { .. } | Action::RenewalFailed { .. } => {}
            Action::Admit { worker } => {
                self.take_over(worker);
                let seen = self.process(worker);
                assert!(seen.ready_said, "{worker} admitted before it was ready");
                assert!(!seen.suspended, "{worker} admitted after Suspend");
                assert!(!std::mem::replace(&mut seen.admitted, true), "{worker} admitted twice");
            }
            Action::Suspend { worker } => {
                let seen = self.process(worker);
                assert!(!std::mem::replace(&mut seen.suspended, true), "{worker} suspended twice");
            }
            Action::TellStop { worker, grace } => {
                assert!(grace <= self.plan.grace);
                let seen = self.process(worker);
                assert!(seen.suspended, "{worker} told to stop before Suspend");
                assert!(!seen.terminated && !seen.killed, "{worker} told to stop after a signal");
                assert!(!std::mem::replace(&mut seen.told, true), "{worker} told to stop twice");
            }
            Action::Terminate { worker } => {
                let seen = self.process(worker);
                assert!(seen.suspended, "{worker} sent SIGTERM before Suspend");
                assert!(!seen.killed, "{worker} sent SIGTERM after SIGKILL");
                assert!(!std::mem::replace(&mut seen.terminated, true), "{worker}: second SIGTERM");
            }
            Action::Kill { worker } => {
                let seen = self.process(worker);
                assert!(seen.suspended, "{worker} sent SIGKILL before Suspend");
                assert!(!std::mem::replace(&mut seen.killed, true), "{worker}: second SIGKILL");
            }
            Action::Signal { worker, .. } => {
                self.process(worker);
            }
            Action::Gone { slot, worker, will_restart, .. } => self.end(slot, worker, will_restart),
            Action::SlotFailed { slot, restarts, .. } => {
                assert!(restarts >= self.plan.restart.limit, "{slot} failed before the limit");
                assert!(self.failed.insert(slot), "{slot} failed twice");
            }
            Action::SlotRests { slot, exit } => {
                assert!(self.plan.restart.stop_on.covers(exit), "{slot} rests after {exit:?}");
                assert!(!self.stop_asked, "{slot} rests after Stop");
                self.resting.insert(slot);
            }
            Action::SlotRetired { slot } => {
                assert!(!self.alive.values().any(|(of, _)| *of == slot), "{slot} left a worker");
                self.restarts.remove(&slot);
                self.forgive(slot);
            }
            Action::Report(_) => {}
            Action::Finished { outcome } => self.finish(outcome),
        }
    }

    /// Candidates that are none any more, though they did not take over: their slot was scaled away.
    pub(crate) fn forget_candidates(&mut self, gone: impl Fn(WorkerId) -> bool) {
        self.candidates.retain(|worker, _| !gone(*worker));
    }

    /// A candidate gets connections: the whole batch must have said that it is ready.
    fn take_over(&mut self, worker: WorkerId) {
        if self.candidates.remove(&worker).is_none() {
            return;
        }
        let slot = self.alive.get(&worker).map(|(slot, _)| *slot).expect("it lives");
        for other in self.candidates.keys() {
            let ready = self.alive.get(other).is_some_and(|(_, seen)| seen.ready_said);
            assert!(ready, "{worker} takes over while {other} is not ready");
        }
        self.forgive(slot);
    }

    fn spawn(
        &mut self,
        now: Time,
        slot: SlotId,
        worker: WorkerId,
        candidate: Option<u32>,
        attempt: u32,
    ) {
        assert!(!self.stop_asked, "{worker} started after Stop");
        assert!(attempt >= 1);
        assert!(worker.0 > self.last_worker, "{worker} used again");
        self.last_worker = worker.0;
        self.spawned += 1;
        self.alive.insert(worker, (slot, Seen::default()));
        if let Some(generation) = candidate {
            assert!(generation >= self.generation, "{worker} of an old generation");
            self.candidates.insert(worker, generation);
            return;
        }
        assert!(!self.failed.contains(&slot), "{worker} started in failed {slot}");
        assert!(!self.resting.contains(&slot), "{worker} started in resting {slot}");
        let first = !self.restarts.contains_key(&slot);
        let starts = self.restarts.entry(slot).or_default();
        if self.forgiven.remove(&slot) || first {
            starts.clear();
            return;
        }
        assert!(self.plan.supervise, "{worker} is a restart, unsupervised");
        starts.push_back(now);
        let window = self.plan.restart.window;
        while starts.front().is_some_and(|start| now.since(*start) >= window) {
            starts.pop_front();
        }
        let (count, limit) = (starts.len(), self.plan.restart.limit as usize);
        assert!(count <= limit, "{slot}: {count} restarts within {window:?}, limit {limit}");
    }

    fn end(&mut self, slot: SlotId, worker: WorkerId, will_restart: Option<std::time::Duration>) {
        let entry = self.alive.remove(&worker);
        let (of, _) = entry.unwrap_or_else(|| panic!("{worker} gone twice or never started"));
        assert_eq!(of, slot);
        self.candidates.remove(&worker);
        assert!(will_restart.is_none() || !self.stop_asked, "{worker} to be restarted after Stop");
        self.gone += 1;
    }

    fn finish(&mut self, outcome: Outcome) {
        assert!(self.alive.is_empty(), "finished with workers {:?}", self.alive.keys());
        assert_eq!(self.spawned, self.gone);
        assert_eq!(outcome == Outcome::Stopped, self.stop_asked, "{outcome:?}");
        self.finished = Some(outcome);
    }

    fn seen(&mut self, worker: WorkerId) -> &mut Seen {
        let entry = self.alive.get_mut(&worker);
        &mut entry.unwrap_or_else(|| panic!("{worker} is gone or was never started")).1
    }

    /// What is known of a worker that something is done to: there has to be a process.
    fn process(&mut self, worker: WorkerId) -> &mut Seen {
        let seen = self.seen(worker);
        assert!(seen.process, "{worker} has no process yet");
        seen
    }
}
