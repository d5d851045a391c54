//! The supervisor as something that can be carried to another process and go on there.
//!
//! For a primary that replaces itself: what it knows of slots and workers, with every counter, wait and deadline, goes
//! to its successor. Times stay as they are; whoever carries them keeps the clock's origin.
//!
//! The surprising rule: not at every moment. A reload, a renewal, a stop and a process that is just being started have to
//! be over first; [`Supervisor::snapshot`] says which of them is in the way.

use std::collections::BTreeSet;

use super::api::WorkerState;
use super::{MAX_SLOTS, Phase, Supervisor};
use crate::id::WorkerId;

/// A supervisor between two inputs.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Snapshot(Supervisor);

/// Why there is no snapshot now.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotNow {
    /// It has not begun.
    #[error("it has not started yet")]
    NotStarted,
    /// A reload is under way.
    #[error("a reload is under way")]
    Reloading,
    /// A worker is being replaced by one that is coming up beside it.
    #[error("a worker is being renewed")]
    Renewing,
    /// It stops, or is over.
    #[error("it is stopping")]
    Stopping,
    /// A process is being started this very moment.
    #[error("a worker is being started")]
    Spawning,
}

/// A snapshot that no supervisor can have made.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the supervisor's state contradicts itself: {0}")]
pub struct Inconsistent(pub(crate) &'static str);

impl Supervisor {
    /// Everything there is to know, for [`restore`](Self::restore) to go on with.
    ///
    /// # Errors
    ///
    /// What is under way that cannot be carried.
    pub fn snapshot(&self) -> Result<Snapshot, NotNow> {
        match self.phase {
            Phase::New => return Err(NotNow::NotStarted),
            Phase::Running => {}
            Phase::Stopping | Phase::Killing | Phase::Finished => return Err(NotNow::Stopping),
        }
        if self.reloading().is_some() {
            return Err(NotNow::Reloading);
        }
        if self.reload.is_some() {
            return Err(NotNow::Renewing);
        }
        if self.workers.values().any(|worker| worker.view.state == WorkerState::Spawning) {
            return Err(NotNow::Spawning);
        }
        Ok(Snapshot(self.clone()))
    }

    /// A supervisor that goes on where the one of the snapshot stood.
    ///
    /// # Errors
    ///
    /// When the parts of the snapshot do not fit each other: it was damaged, or made by something else.
    pub fn restore(snapshot: Snapshot) -> Result<Supervisor, Inconsistent> {
        let Snapshot(supervisor) = snapshot;
        supervisor.check()?;
        Ok(supervisor)
    }

    fn check(&self) -> Result<(), Inconsistent> {
        let must = |so: bool, what| if so { Ok(()) } else { Err(Inconsistent(what)) };
        must(self.phase == Phase::Running, "it does not run")?;
        must(self.slots.len() <= MAX_SLOTS as usize, "there are too many slots")?;
        must(self.generation <= self.latest_generation, "a generation that never began")?;
        let mut seated: BTreeSet<WorkerId> = BTreeSet::new();
        for (id, slot) in &self.slots {
            must(*id == slot.id && (1..=MAX_SLOTS).contains(&id.0), "a slot has two numbers")?;
            must(slot.candidate.is_none(), "a candidate without a reload")?;
            must(slot.generation <= self.latest_generation, "a generation that never began")?;
            must(slot.history.is_bounded(&self.plan.restart), "too many restarts in a window")?;
            for worker in slot.current.iter().chain(&slot.leaving) {
                let known = self.workers.get(worker);
                must(known.is_some_and(|w| w.view.slot == *id), "a slot's worker is not there")?;
                must(seated.insert(*worker), "a worker stands in two places")?;
            }
        }
        for (id, worker) in &self.workers {
            must(*id == worker.view.id, "a worker has two numbers")?;
            must(id.0 < self.next_worker, "a worker's number was not given out yet")?;
            must(seated.contains(id), "a worker without a slot")?;
            must(!worker.view.candidate, "a candidate without a reload")?;
            let state = worker.view.state;
            must(
                state != WorkerState::Spawning && state != WorkerState::Trial,
                "a worker's state",
            )?;
        }
        must(self.next_worker < u64::MAX / 2, "no numbers are left for workers")
    }
}
