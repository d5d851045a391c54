//! A reload: the next generation comes up beside the present one, and takes over only if it does.
//!
//! ```text
//! Reload -> a batch of candidates: Spawn -> Starting -> Trial -+- all on trial, probation over -> Admit, old ones stop
//!                                                              +- any one ends, leaves, is late -> all of the batch stop
//! ```
//!
//! A batch is every slot, or a few at a time; the next one begins when the old workers of the last one are gone, so that a
//! rolling reload never has more than a batch of processes too many. A candidate gets no connection before its whole batch
//! has passed its probation. What ends a reload ends its candidates; slots that were switched by an earlier batch stay
//! switched, for the old program may be gone.
//!
//! A *renewal* is a reload of one slot by its own generation: a worker that is to be replaced while it is well (too much
//! memory, too old) has its successor before it is told to stop. It is over with the switch; a reload that is asked for
//! meanwhile waits that long.
//!
//! A worker that *cannot stay* and serves (silent, its probe fails) is renewed as well, and ends first only when its successor
//! does not come up. While something of the kind is under way it waits in line, as long as a successor may take to get
//! ready and a minute at least; a reload that switches its slot meanwhile is its renewal.
//!
//! The surprising rule: until it is admitted a candidate has nothing to do with its slot's restarts. Its death is the
//! reload's failure, never a strike against the slot; and the old worker may die and be replaced beside it. In a slot that
//! rests a candidate that ends as its workers are meant to end is no failure: it has done its work.

use std::collections::BTreeMap;
use std::time::Duration;

use super::api::{Action, Exit, Reason, WorkerState};
use super::record::{Manner, Pending, Worker};
use super::{Phase, Supervisor};
use crate::id::{SlotId, WorkerId};
use crate::time::Time;

/// How long a candidate may take until it is ready when [`super::Plan::ready_timeout`] sets no limit.
pub const READY_LIMIT: Duration = Duration::from_secs(60);

/// How a reload is to go.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ReloadPlan {
    /// How many slots at a time; zero for all at once.
    pub at_a_time: u32,
    /// How long all candidates of a batch must stay ready before they get connections.
    pub probation: Duration,
}

/// Why a reload ended before every slot had been switched.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ReloadFault {
    /// A worker of the new generation did not get through.
    Candidate {
        /// Where.
        slot: SlotId,
        /// Which.
        worker: WorkerId,
        /// Why it ended, or is ending.
        reason: Reason,
    },
    /// The cluster is stopping.
    Stopping,
}

/// A worker that cannot stay, and waits for its renewal to begin.
#[derive(Copy, Clone, Debug)]
pub(super) struct Unfit {
    worker: WorkerId,
    reason: Reason,
    /// No longer than this.
    until: Time,
}

/// A reload under way.
#[derive(Clone, Debug)]
pub(super) struct Reload {
    plan: ReloadPlan,
    generation: u32,
    /// Slots that no batch has had yet, in order.
    left: Vec<SlotId>,
    batch: BTreeMap<SlotId, WorkerId>,
    /// When the probation of the batch is over, once all of it is on trial.
    until: Option<Time>,
    /// Old workers of the last batch that are not gone yet.
    draining: Vec<WorkerId>,
    replaced: u32,
    fault: Option<ReloadFault>,
    /// One slot by its own generation.
    renews: Option<SlotId>,
    /// The worker to be replaced cannot stay, whatever becomes of its successor.
    unfit: Option<(WorkerId, Reason)>,
}

impl Reload {
    fn new(plan: ReloadPlan, generation: u32, left: Vec<SlotId>, renews: Option<SlotId>) -> Reload {
        Reload {
            plan,
            generation,
            left,
            batch: BTreeMap::new(),
            until: None,
            draining: Vec::new(),
            replaced: 0,
            fault: None,
            renews,
            unfit: None,
        }
    }
}

impl Supervisor {
    /// The generation that a reload is bringing up, or will as soon as a renewal is over.
    pub fn reloading(&self) -> Option<u32> {
        let under_way = self.reload.as_ref().filter(|reload| reload.renews.is_none());
        let queued = self.queued_reload.map(|(_, generation)| generation);
        under_way.map(|reload| reload.generation).or(queued)
    }

    /// The slot that is being renewed.
    pub fn renewing(&self) -> Option<SlotId> {
        self.reload.as_ref()?.renews
    }

    /// The number of the generation that the next reload brings up.
    pub fn next_generation(&self) -> u32 {
        self.latest_generation + 1
    }

    /// When a reload goes on by itself.
    pub(super) fn reload_deadline(&self) -> Option<Time> {
        let probation = self.reload.as_ref().and_then(|reload| reload.until);
        let in_line = self.unfit.iter().map(|unfit| unfit.until);
        in_line.chain(probation).min()
    }

    pub(super) fn ask_reload(&mut self, plan: ReloadPlan) {
        if self.reloading().is_some() || self.phase != Phase::Running || !self.plan.supervise {
            return;
        }
        self.latest_generation += 1;
        self.queued_reload = Some((plan, self.latest_generation));
    }

    /// Begins the reload that was asked for.
    fn begin_reload(&mut self) {
        let Some((plan, generation)) = self.queued_reload.take() else { return };
        let wanted = self.slots.values().filter(|slot| slot.wanted && slot.counted);
        let left = wanted.map(|slot| slot.id).collect();
        self.reload = Some(Reload::new(plan, generation, left, None));
    }

    /// Renews a slot whose worker serves, unless something of the kind is under way.
    pub(super) fn renew(&mut self, id: SlotId) {
        if self.reload.is_some() || self.queued_reload.is_some() || self.phase != Phase::Running {
            return;
        }
        let Some(slot) = self.slots.get(&id).filter(|slot| slot.wanted && slot.supervised) else {
            return;
        };
        let current = slot.current.and_then(|worker| self.workers.get(&worker));
        if current.is_some_and(|worker| worker.view.state == WorkerState::Ready) {
            self.begin_renewal(id);
        }
    }

    fn begin_renewal(&mut self, id: SlotId) {
        let Some(slot) = self.slots.get(&id) else { return };
        let plan = ReloadPlan { at_a_time: 0, probation: Duration::ZERO };
        self.reload = Some(Reload::new(plan, slot.generation, vec![id], Some(id)));
    }

    /// Has the slot of a worker that cannot stay renewed, in its turn; where that cannot be, the worker ends first.
    pub(super) fn replace_gently(&mut self, id: WorkerId, reason: Reason, out: &mut Vec<Action>) {
        if !self.can_be_renewed(id) {
            return self.unfit(id, reason, out);
        }
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.note(reason);
            let slot = worker.view.slot;
            if let Some(reload) = self.reload.as_mut().filter(|r| r.renews == Some(slot)) {
                // Its successor is on its way already, begun for it or for the one that was there before.
                if reload.unfit.is_none_or(|(before, _)| before != id) {
                    reload.unfit = Some((id, reason));
                }
                return;
            }
        }
        if self.unfit.iter().all(|unfit| unfit.worker != id) {
            let limit = self.plan.ready_timeout.map_or(READY_LIMIT, |limit| limit.max(READY_LIMIT));
            self.unfit.push_back(Unfit { worker: id, reason, until: self.now + limit });
        }
    }

    /// Whether it is the one that serves in a slot whose workers are replaced.
    fn can_be_renewed(&self, id: WorkerId) -> bool {
        let Some(worker) = self.workers.get(&id) else { return false };
        let slot = self.slots.get(&worker.view.slot);
        worker.view.state == WorkerState::Ready
            && self.phase == Phase::Running
            && slot.is_some_and(|s| s.wanted && s.supervised && s.current == Some(id))
    }

    /// Looks at those that wait in line: who has gone, was replaced otherwise, or has waited too long; and begins the first
    /// one's renewal where nothing else is under way. True if that was anything.
    fn advance_the_line(&mut self, out: &mut Vec<Action>) -> bool {
        let mut line = std::mem::take(&mut self.unfit);
        line.retain(|unfit| self.can_be_renewed(unfit.worker));
        let too_long = line.iter().position(|unfit| unfit.until <= self.now);
        let too_long = too_long.and_then(|at| line.remove(at));
        let next =
            if too_long.is_none() && self.reload.is_none() { line.pop_front() } else { None };
        self.unfit = line;
        if let Some(unfit) = too_long {
            self.unfit(unfit.worker, unfit.reason, out);
            return true;
        }
        let Some(Unfit { worker, reason, .. }) = next else { return false };
        let Some(slot) = self.workers.get(&worker).map(|worker| worker.view.slot) else {
            return false;
        };
        self.begin_renewal(slot);
        if let Some(reload) = &mut self.reload {
            reload.unfit = Some((worker, reason));
        }
        true
    }

    /// A slot was opened: the reload is to have it as well.
    pub(super) fn reload_adds(&mut self, slot: SlotId) {
        if let Some(reload) = self.reload.as_mut().filter(|reload| reload.renews.is_none()) {
            reload.left.push(slot);
        }
    }

    /// A slot is given up: so is its candidate.
    pub(super) fn reload_drops(&mut self, slot: SlotId, out: &mut Vec<Action>) {
        let Some(reload) = &mut self.reload else { return };
        reload.left.retain(|other| *other != slot);
        if let Some(candidate) = reload.batch.remove(&slot) {
            self.dismiss(slot, candidate, out);
        }
    }

    /// A worker ended; if it was a candidate, so does the reload, unless that is how the slot's workers end: then it rests
    /// as before. True if it does.
    pub(super) fn reload_lost(
        &mut self,
        id: SlotId,
        worker: WorkerId,
        reason: Reason,
        exit: Exit,
    ) -> bool {
        let Some(reload) = self.reload.as_mut().filter(|r| r.batch.get(&id) == Some(&worker))
        else {
            return false;
        };
        reload.batch.remove(&id);
        let slot = self.slots.get_mut(&id);
        let done = matches!(reason, Reason::Exited(_) | Reason::Voluntary)
            && self.plan.restart.stop_on.covers(exit)
            && slot.as_ref().is_some_and(|slot| slot.rests.is_some());
        if let Some(slot) = slot {
            slot.candidate = None;
            if done {
                slot.rests = Some(exit);
                slot.generation = reload.generation;
                slot.last_reason = Some(reason);
            }
        }
        match done {
            true => reload.replaced += 1,
            false => {
                reload.fault.get_or_insert(ReloadFault::Candidate { slot: id, worker, reason });
            }
        }
        done
    }

    /// The cluster stops: nothing is switched any more.
    pub(super) fn reload_stops(&mut self, out: &mut Vec<Action>) {
        if let Some(reload) = &mut self.reload {
            reload.fault.get_or_insert(ReloadFault::Stopping);
        }
        if let Some((_, generation)) = self.queued_reload.take() {
            let fault = ReloadFault::Stopping;
            out.push(Action::ReloadFailed { generation, replaced: 0, fault });
        }
    }

    /// Does what can be done by now; true if that was anything.
    ///
    /// It ends: each round takes one out of the line, ends the reload, empties the batch, or begins one of the slots that are
    /// left.
    pub(super) fn advance_reload(&mut self, out: &mut Vec<Action>) -> bool {
        let before = out.len();
        while self.step_reload(out) {}
        out.len() > before
    }

    fn step_reload(&mut self, out: &mut Vec<Action>) -> bool {
        if self.advance_the_line(out) {
            return true;
        }
        if self.reload.is_none() {
            self.begin_reload();
        }
        let Some(reload) = &mut self.reload else { return false };
        reload.draining.retain(|worker| self.workers.contains_key(worker));
        let unfit = reload.batch.iter().find_map(|(slot, worker)| {
            let reason = why_unfit(self.workers.get(worker))?;
            Some(ReloadFault::Candidate { slot: *slot, worker: *worker, reason })
        });
        if let Some(fault) = reload.fault.or(unfit) {
            self.fail_reload(fault, out);
            return true;
        }
        if reload.batch.is_empty() {
            if !reload.draining.is_empty() && reload.renews.is_none() {
                return false;
            }
            if reload.left.is_empty() {
                self.end_reload(out);
                return true;
            }
            self.begin_batch(out);
            return true;
        }
        let on_trial =
            |worker| self.workers.get(worker).is_some_and(|w| w.view.state == WorkerState::Trial);
        if !reload.batch.values().all(on_trial) {
            reload.until = None;
            return false;
        }
        let probation = reload.plan.probation;
        let until = *reload.until.get_or_insert(self.now + probation);
        if until > self.now {
            return false;
        }
        self.switch(out);
        true
    }

    fn begin_batch(&mut self, out: &mut Vec<Action>) {
        let Some(reload) = &mut self.reload else { return };
        let most = match reload.plan.at_a_time {
            0 => reload.left.len(),
            some => reload.left.len().min(some as usize),
        };
        let (generation, slots) =
            (reload.generation, reload.left.drain(..most).collect::<Vec<_>>());
        for id in slots {
            let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.wanted) else { continue };
            let worker = WorkerId(self.next_worker);
            self.next_worker += 1;
            slot.candidate = Some(worker);
            let mut record = Worker::new(worker, id, generation, self.now);
            record.view.candidate = true;
            self.workers.insert(worker, record);
            if let Some(reload) = &mut self.reload {
                reload.batch.insert(id, worker);
            }
            let candidate = true;
            out.push(Action::Spawn { slot: id, worker, generation, candidate, attempt: 1 });
        }
    }

    /// The batch has passed: it gets the connections, and the ones before it are told to stop.
    fn switch(&mut self, out: &mut Vec<Action>) {
        let Some(reload) = &mut self.reload else { return };
        reload.until = None;
        let (batch, generation) = (std::mem::take(&mut reload.batch), reload.generation);
        let mut old = Vec::new();
        for (id, worker) in batch {
            let (Some(slot), Some(record)) =
                (self.slots.get_mut(&id), self.workers.get_mut(&worker))
            else {
                continue;
            };
            record.view.candidate = false;
            record.view.state = WorkerState::Ready;
            record.view.ready = Some(self.now);
            slot.candidate = None;
            slot.waiting = None;
            slot.failed = false;
            slot.rests = None;
            slot.generation = generation;
            slot.history.forgive();
            let before = slot.current.replace(worker);
            slot.leaving.extend(before);
            old.extend(before.map(|before| (id, before)));
            out.push(Action::Admit { worker });
            reload.replaced += 1;
        }
        self.ever_ready = true;
        reload.draining = old.iter().map(|(_, worker)| *worker).collect();
        if reload.renews.is_none() {
            out.push(Action::Switched { generation, workers: reload.replaced });
        }
        for (slot, worker) in old {
            self.ask_to_stop(worker, Reason::Asked, Manner::Tell, true, out);
            self.hurry_the_oldest(slot, out);
        }
    }

    fn end_reload(&mut self, out: &mut Vec<Action>) {
        let Some(reload) = self.reload.take() else { return };
        match reload.renews {
            Some(slot) => out.push(Action::Renewed { slot }),
            None => {
                self.generation = reload.generation;
                let (generation, replaced) = (reload.generation, reload.replaced);
                out.push(Action::Reloaded { generation, replaced });
            }
        }
    }

    fn fail_reload(&mut self, fault: ReloadFault, out: &mut Vec<Action>) {
        let Some(reload) = self.reload.take() else { return };
        let (generation, replaced) = (reload.generation, reload.replaced);
        for (slot, worker) in reload.batch {
            self.dismiss(slot, worker, out);
        }
        match reload.renews {
            Some(slot) => out.push(Action::RenewalFailed { slot, fault }),
            None => out.push(Action::ReloadFailed { generation, replaced, fault }),
        }
        // When the cluster stops, it is asked to as all others are.
        if let Some((worker, reason)) = reload.unfit.filter(|_| self.phase == Phase::Running) {
            self.unfit(worker, reason, out);
        }
    }

    /// A candidate that is not to be: it serves nobody.
    fn dismiss(&mut self, slot: SlotId, worker: WorkerId, out: &mut Vec<Action>) {
        if let Some(slot) = self.slots.get_mut(&slot) {
            slot.candidate = None;
            slot.leaving.push(worker);
        }
        if let Some(record) = self.workers.get_mut(&worker) {
            record.view.candidate = false;
        }
        self.ask_to_stop(worker, Reason::Asked, Manner::Tell, true, out);
    }
}

/// Why a candidate will not get through, if it will not.
fn why_unfit(worker: Option<&Worker>) -> Option<Reason> {
    let Some(worker) = worker else { return Some(Reason::Disconnected) };
    let fit = worker.view.state <= WorkerState::Trial && worker.pending == Pending::Nothing;
    if fit { None } else { Some(worker.view.reason.unwrap_or(Reason::Asked)) }
}
