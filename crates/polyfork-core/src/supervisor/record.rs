//! What the supervisor remembers of each slot and worker.
//!
//! Plain records with questions about themselves; every transition is made by the parent module. The one surprising field is
//! [`Worker::pending`]: what was decided about a worker whose process is not there yet, to be carried out once it is.

use std::time::Duration;

use super::api::{Exit, Reason, SlotState, SlotView, WorkerState, WorkerView};
use crate::id::{SlotId, WorkerId};
use crate::restart::RestartHistory;
use crate::time::Time;

/// How a stop goes on once nothing waits for the worker.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Manner {
    /// It is told in its dialect.
    Tell,
    /// It knows already, or cannot be told: it is only waited for.
    Wait,
}

/// What happens to a worker as soon as its process exists.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Pending {
    Nothing,
    Stop,
    Kill,
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Worker {
    pub(super) view: WorkerView,
    /// When its state is left for the next one by itself.
    pub(super) deadline: Option<Time>,
    pub(super) manner: Manner,
    pub(super) pending: Pending,
    /// A signal asked for before the process existed.
    pub(super) pending_signal: Option<i32>,
    /// The latest signal that was asked for.
    pub(super) asked_signal: Option<i32>,
    /// Whether the end of its grace period has consequences.
    pub(super) enforced: bool,
    pub(super) suspended: bool,
}

impl Worker {
    pub(super) fn new(id: WorkerId, slot: SlotId, generation: u32, now: Time) -> Worker {
        let view = WorkerView {
            id,
            slot,
            generation,
            candidate: false,
            state: WorkerState::Spawning,
            online: false,
            started: now,
            ready: None,
            reason: None,
        };
        Worker {
            view,
            deadline: None,
            manner: Manner::Tell,
            pending: Pending::Nothing,
            pending_signal: None,
            asked_signal: None,
            enforced: false,
            suspended: false,
        }
    }

    /// Enters why the worker ends. A fault is never hidden by a later, weaker reason, nor a wish by another wish.
    pub(super) fn note(&mut self, reason: Reason) {
        let replace = match self.view.reason {
            None => true,
            Some(old) => weight(reason) > weight(old),
        };
        if replace {
            self.view.reason = Some(reason);
        }
    }

    pub(super) fn served(&self, now: Time) -> Option<Duration> {
        self.view.ready.map(|ready| now.since(ready))
    }
}

/// How much a reason says: wishes below consequences below faults.
fn weight(reason: Reason) -> u8 {
    match reason {
        Reason::Disconnected => 0,
        Reason::Asked | Reason::Voluntary => 1,
        Reason::GraceExpired => 2,
        Reason::Exited(_) => 3,
        Reason::NeverReady | Reason::ProtocolFault | Reason::Watchdog | Reason::ProbeFailed => 4,
        Reason::OutOfMemory => 5,
    }
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Slot {
    pub(super) id: SlotId,
    /// Part of the cluster. When not, it is removed with its last worker.
    pub(super) wanted: bool,
    /// Part of the number that [`super::Input::Scale`] speaks of.
    pub(super) counted: bool,
    pub(super) supervised: bool,
    pub(super) current: Option<WorkerId>,
    /// The worker of the next generation, until it takes over.
    pub(super) candidate: Option<WorkerId>,
    /// What its next worker belongs to.
    pub(super) generation: u32,
    /// Oldest first.
    pub(super) leaving: Vec<WorkerId>,
    pub(super) waiting: Option<Wait>,
    pub(super) failed: bool,
    /// How its last worker ended, if there is to be no other.
    pub(super) rests: Option<Exit>,
    pub(super) history: RestartHistory,
    pub(super) last_reason: Option<Reason>,
}

/// A start to come.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Wait {
    pub(super) until: Time,
    /// Whether it counts as a restart; a first start and one that a person asked for do not.
    pub(super) counts: bool,
}

impl Slot {
    pub(super) fn new(id: SlotId, generation: u32) -> Slot {
        Slot {
            id,
            wanted: true,
            counted: true,
            supervised: true,
            current: None,
            candidate: None,
            generation,
            leaving: Vec::new(),
            waiting: None,
            failed: false,
            rests: None,
            history: RestartHistory::new(),
            last_reason: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none()
            && self.candidate.is_none()
            && self.leaving.is_empty()
            && self.waiting.is_none()
    }

    pub(super) fn view(&self, current: Option<WorkerState>) -> SlotView<'_> {
        SlotView {
            id: self.id,
            state: self.state(current),
            current: self.current,
            candidate: self.candidate,
            leaving: &self.leaving,
            generation: self.generation,
            supervised: self.supervised,
            wanted: self.wanted,
            restarts: self.history.total(),
            last_reason: self.last_reason,
        }
    }

    fn state(&self, current: Option<WorkerState>) -> SlotState {
        match (current, self.waiting) {
            (Some(WorkerState::Spawning | WorkerState::Starting | WorkerState::Trial), _) => {
                SlotState::Starting
            }
            (Some(WorkerState::Ready), _) => SlotState::Ready,
            (Some(_), _) => SlotState::Draining,
            (None, Some(wait)) => SlotState::Waiting { until: wait.until },
            (None, None) if self.failed => SlotState::Failed,
            (None, None) if self.rests.is_some() => SlotState::Resting,
            (None, None) if self.leaving.is_empty() => SlotState::Empty,
            (None, None) => SlotState::Draining,
        }
    }
}
