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
//! The surprising rule: until it is admitted a candidate has nothing to do with its slot's restarts. Its death is the
//! reload's failure, never a strike against the slot; and the old worker may die and be replaced beside it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::api::{Action, Reason, WorkerState};
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
}

impl Supervisor {
    /// The generation that a reload is bringing up.
    pub fn reloading(&self) -> Option<u32> {
        self.reload.as_ref().map(|reload| reload.generation)
    }

    /// The number of the generation that the next reload brings up.
    pub fn next_generation(&self) -> u32 {
        self.latest_generation + 1
    }

    /// When a reload goes on by itself.
    pub(super) fn reload_deadline(&self) -> Option<Time> {
        self.reload.as_ref()?.until
    }

    pub(super) fn begin_reload(&mut self, plan: ReloadPlan) {
        if self.reload.is_some() || self.phase != Phase::Running || !self.plan.supervise {
            return;
        }
        self.latest_generation += 1;
        let wanted = self.slots.values().filter(|slot| slot.wanted && slot.counted);
        self.reload = Some(Reload {
            plan,
            generation: self.latest_generation,
            left: wanted.map(|slot| slot.id).collect(),
            batch: BTreeMap::new(),
            until: None,
            draining: Vec::new(),
            replaced: 0,
            fault: None,
        });
    }

    /// A slot was opened: the reload is to have it as well.
    pub(super) fn reload_adds(&mut self, slot: SlotId) {
        if let Some(reload) = &mut self.reload {
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

    /// A worker ended; if it was a candidate, so does the reload.
    pub(super) fn reload_lost(&mut self, slot: SlotId, worker: WorkerId, reason: Reason) {
        let Some(reload) = &mut self.reload else { return };
        if reload.batch.get(&slot) == Some(&worker) {
            reload.batch.remove(&slot);
            reload.fault.get_or_insert(ReloadFault::Candidate { slot, worker, reason });
            if let Some(slot) = self.slots.get_mut(&slot) {
                slot.candidate = None;
            }
        }
    }

    /// The cluster stops: nothing is switched any more.
    pub(super) fn reload_stops(&mut self) {
        if let Some(reload) = &mut self.reload {
            reload.fault.get_or_insert(ReloadFault::Stopping);
        }
    }

    /// Does what can be done by now.
    ///
    /// It ends: each round ends the reload, or empties the batch, or begins one of the slots that are left.
    pub(super) fn advance_reload(&mut self, out: &mut Vec<Action>) {
        while let Some(reload) = &mut self.reload {
            reload.draining.retain(|worker| self.workers.contains_key(worker));
            let unfit = reload.batch.iter().find_map(|(slot, worker)| {
                let reason = why_unfit(self.workers.get(worker))?;
                Some(ReloadFault::Candidate { slot: *slot, worker: *worker, reason })
            });
            if let Some(fault) = reload.fault.or(unfit) {
                self.fail_reload(fault, out);
                return;
            }
            if reload.batch.is_empty() {
                if !reload.draining.is_empty() {
                    return;
                }
                if reload.left.is_empty() {
                    self.end_reload(out);
                    return;
                }
                self.begin_batch(out);
                continue;
            }
            let on_trial = |worker| {
                self.workers.get(worker).is_some_and(|w| w.view.state == WorkerState::Trial)
            };
            if !reload.batch.values().all(on_trial) {
                reload.until = None;
                return;
            }
            let probation = reload.plan.probation;
            let until = *reload.until.get_or_insert(self.now + probation);
            if until > self.now {
                return;
            }
            self.switch(out);
        }
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
            out.push(Action::Spawn { slot: id, worker, generation, attempt: 1 });
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
        out.push(Action::Switched { generation, workers: reload.replaced });
        for (slot, worker) in old {
            self.ask_to_stop(worker, Reason::Asked, Manner::Tell, true, out);
            self.hurry_the_oldest(slot, out);
        }
    }

    fn end_reload(&mut self, out: &mut Vec<Action>) {
        if let Some(reload) = self.reload.take() {
            self.generation = reload.generation;
            let (generation, replaced) = (reload.generation, reload.replaced);
            out.push(Action::Reloaded { generation, replaced });
        }
    }

    fn fail_reload(&mut self, fault: ReloadFault, out: &mut Vec<Action>) {
        let Some(reload) = self.reload.take() else { return };
        let (generation, replaced) = (reload.generation, reload.replaced);
        for (slot, worker) in reload.batch {
            self.dismiss(slot, worker, out);
        }
        out.push(Action::ReloadFailed { generation, replaced, fault });
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
