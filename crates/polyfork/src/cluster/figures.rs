//! What a primary counts for whoever measures it: connections and messages by slot, hand-over times, losses.
//!
//! Only counts. What workers' programs measure of themselves is in `measures`; how figures are written down is up to
//! their reader (the command does it for Prometheus).
//!
//! The rule that surprises: figures belong to slots, which last, and not to workers, which come and go. What a worker
//! had is added to its slot when it is gone, so a slot's count never goes back; a slot that is retired takes its figures with
//! it, so there are never more of them than slots.

use std::collections::BTreeMap;
use std::time::Duration;

use polyfork_core::{SlotId, WorkerId};
use tokio::sync::oneshot;

use super::Cluster;
use super::primary::{Command, Primary, Worker};
use super::settings::Address;

/// What a primary has counted since it was started.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Figures {
    /// By slot.
    pub slots: BTreeMap<u32, SlotFigures>,
    /// From accepting a connection to its acknowledgement by a worker (hand-off).
    pub handed_over: Waits,
    /// Sockets that are open now.
    pub listeners: Vec<ListenerFigures>,
    /// Connections that were waiting on a socket when it had to be closed and could not be moved.
    pub reset: u64,
}

/// The figures of one slot: of its present workers, and of those that are gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct SlotFigures {
    /// Connections that it was given; `None` where nobody counts them, see
    /// [`WorkerStatus::connections`](super::WorkerStatus::connections).
    pub connections: Option<u64>,
    /// CPU time of its workers that have ended, of all their threads; what living ones have used so far comes on top.
    pub cpu_of_ended: Duration,
    /// Messages that its workers sent to the primary.
    pub messages_in: u64,
    /// Messages that the primary sent to its workers.
    pub messages_out: u64,
}

/// The figures of one socket, or of the sockets of one reuse-port group.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ListenerFigures {
    /// Where it listens.
    pub address: Address,
    /// Connections that the kernel turned away because a queue was full; the client's own system tries again.
    /// `None` where the kernel does not say (Unix sockets).
    pub dropped: Option<u64>,
    /// Connections that wait and belong to no worker yet: in a queue that all workers share, or in the primary. `None`
    /// where each worker has a queue of its own.
    pub queue: Option<u64>,
}

/// How long things took, in buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Waits {
    counts: [u64; Waits::BOUNDS.len() + 1],
    sum: Duration,
}

impl Waits {
    /// The upper bounds of the buckets; beyond the last there is one more.
    pub const BOUNDS: [Duration; 14] = [
        Duration::from_micros(50),
        Duration::from_micros(100),
        Duration::from_micros(250),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_micros(2500),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(25),
        Duration::from_millis(50),
        Duration::from_millis(100),
        Duration::from_millis(250),
        Duration::from_millis(500),
        Duration::from_secs(1),
    ];

    pub(crate) fn note(&mut self, waited: Duration) {
        let bucket = Waits::BOUNDS.partition_point(|bound| *bound < waited);
        self.counts[bucket] += 1;
        self.sum = self.sum.saturating_add(waited);
    }

    /// How many took at most as long as each of [`Waits::BOUNDS`], and last how many there were in all.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + '_ {
        let bounds = Waits::BOUNDS.into_iter().map(Some).chain([None]);
        let mut total = 0;
        bounds.zip(self.counts).map(move |(bound, count)| {
            total += count;
            (bound, total)
        })
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// All of them together.
    pub fn sum(&self) -> Duration {
        self.sum
    }
}

/// What the loop keeps.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Tally {
    slots: BTreeMap<u32, SlotFigures>,
    waits: Waits,
}

impl Tally {
    pub(crate) fn message_in(&mut self, slot: u32) {
        self.slots.entry(slot).or_default().messages_in += 1;
    }

    pub(crate) fn message_out(&mut self, slot: u32) {
        self.slots.entry(slot).or_default().messages_out += 1;
    }

    /// A worker of this slot is gone, and had so many connections.
    pub(crate) fn had(&mut self, slot: u32, connections: Option<u64>) {
        if let Some(had) = connections {
            *self.slots.entry(slot).or_default().connections.get_or_insert(0) += had;
        }
    }

    /// A worker of this slot has ended, and had used so much.
    pub(crate) fn used(&mut self, slot: u32, cpu: Duration) {
        self.slots.entry(slot).or_default().cpu_of_ended += cpu;
    }

    pub(crate) fn retired(&mut self, slot: u32) {
        self.slots.remove(&slot);
    }

    pub(crate) fn handed_over(&mut self, waited: Duration) {
        self.waits.note(waited);
    }
}

impl Primary {
    pub(crate) fn figures(&self) -> Figures {
        let mut slots = self.tally.slots.clone();
        // A slot that was forked and has ended is one no more, nor is one of which only the last worker is left.
        slots.retain(|slot, _| self.supervisor.slot(SlotId(*slot)).is_some());
        for (id, w) in &self.workers {
            let slot = slots.entry(w.who.slot).or_default();
            if let Some(has) = self.connections_of(*id, w) {
                *slot.connections.get_or_insert(0) += has;
            }
        }
        Figures {
            slots,
            handed_over: self.tally.waits,
            listeners: self.ports.figures(),
            reset: self.ports.reset,
        }
    }

    /// A worker that is gone leaves its figures to its slot.
    pub(crate) fn count_gone(&mut self, id: WorkerId, w: &Worker) {
        let had = self.connections_of(id, w);
        self.tally.had(w.who.slot, had);
    }
}

impl Cluster {
    /// What the primary has counted so far. Empty when the cluster has ended.
    pub async fn figures(&self) -> Figures {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Figures(reply)).await;
        answer.await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_a_bound_belongs_to_its_bucket() {
        let mut waits = Waits::default();
        for micros in [50, 51, 100, 5_000_000] {
            waits.note(Duration::from_micros(micros));
        }
        let told: Vec<u64> = waits.cumulative().map(|(_, count)| count).collect();
        assert_eq!((told[0], told[1], told[13], told[14]), (1, 3, 3, 4));
        assert_eq!(waits.count(), 4);
        assert_eq!(waits.sum(), Duration::from_micros(5_000_201));
        assert!(Waits::BOUNDS.is_sorted());
    }

    #[test]
    fn a_slot_keeps_what_its_workers_had_until_it_is_retired() {
        let mut tally = Tally::default();
        tally.had(1, Some(3));
        tally.had(1, None);
        tally.had(1, Some(4));
        tally.message_in(1);
        tally.used(1, Duration::from_secs(2));
        tally.used(1, Duration::from_secs(1));
        assert_eq!(tally.slots[&1].connections, Some(7));
        assert_eq!(tally.slots[&1].cpu_of_ended, Duration::from_secs(3));
        tally.retired(1);
        assert!(tally.slots.is_empty());
    }
}
