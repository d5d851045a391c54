//! Which worker has which place in a reuse-port group.
//!
//! A *seat* is one listening socket of every group, by number. While a worker lives its seat is its own: its
//! replacement, and the next generation during a reload, get seats of their own, so that two processes never accept
//! from one socket. Opening and closing the sockets is the shell's.
//!
//! The surprising rule: a seat is not its worker's slot. They are equal until a worker is replaced while it still
//! finishes what it serves.

use std::collections::BTreeMap;

use crate::id::WorkerId;

/// A place in every reuse-port group, from 1.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Seat(pub u32);

/// The seats of a cluster and who has them.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Seats {
    taken: BTreeMap<Seat, Option<WorkerId>>,
}

impl Seats {
    /// Makes a seat, free, unless it exists. True if it is new.
    pub fn make(&mut self, seat: Seat) -> bool {
        if self.taken.contains_key(&seat) {
            return false;
        }
        self.taken.insert(seat, None);
        true
    }

    /// Gives a worker a seat: the one it has, `wish` if that is free or does not exist, else the lowest free one, else
    /// a new one. The second value tells whether the seat is new.
    pub fn take(&mut self, worker: WorkerId, wish: Seat) -> (Seat, bool) {
        if let Some(seat) = self.of(worker) {
            return (seat, false);
        }
        let is_free = |seat: &Seat| matches!(self.taken.get(seat), Some(None));
        let free = self.taken.keys().copied().find(is_free);
        let seat = match free {
            _ if is_free(&wish) => wish,
            Some(seat) => seat,
            None => self.unused(wish),
        };
        let new = self.taken.insert(seat, Some(worker)).is_none();
        (seat, new)
    }

    /// A number that no seat has, `wish` if possible.
    fn unused(&self, wish: Seat) -> Seat {
        let free = |seat: &Seat| !self.taken.contains_key(seat);
        let others = (1..=u32::MAX).map(Seat);
        std::iter::once(wish).chain(others).find(free).unwrap_or(wish)
    }

    /// The seat of a worker.
    pub fn of(&self, worker: WorkerId) -> Option<Seat> {
        let has = |entry: &(&Seat, &Option<WorkerId>)| *entry.1 == Some(worker);
        self.taken.iter().find(has).map(|(seat, _)| *seat)
    }

    /// A worker is gone: its seat is free.
    pub fn leave(&mut self, worker: WorkerId) {
        for owner in self.taken.values_mut() {
            owner.take_if(|owner| *owner == worker);
        }
    }

    /// Removes free seats, highest first, until there are `wanted` or none is free. Gives the removed ones.
    pub fn trim(&mut self, wanted: usize) -> Vec<Seat> {
        let surplus = self.taken.len().saturating_sub(wanted);
        let free = self.taken.iter().rev().filter(|(_, owner)| owner.is_none());
        let removed: Vec<Seat> = free.map(|(seat, _)| *seat).take(surplus).collect();
        for seat in &removed {
            self.taken.remove(seat);
        }
        removed
    }

    /// All seats, in order.
    pub fn all(&self) -> impl Iterator<Item = Seat> + '_ {
        self.taken.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);
    const C: WorkerId = WorkerId(3);

    #[test]
    fn a_worker_gets_the_seat_it_wishes_while_nobody_has_it() {
        let mut seats = Seats::default();
        assert!(seats.make(Seat(1)));
        assert!(!seats.make(Seat(1)));
        assert_eq!(seats.take(A, Seat(1)), (Seat(1), false));
        assert_eq!(seats.take(A, Seat(7)), (Seat(1), false), "it keeps the one it has");
        assert_eq!(seats.take(B, Seat(2)), (Seat(2), true));
    }

    #[test]
    fn two_living_workers_never_share_a_seat() {
        let mut seats = Seats::default();
        seats.take(A, Seat(1));
        assert_eq!(seats.take(B, Seat(1)), (Seat(2), true), "the next free number");
        seats.leave(A);
        assert_eq!(seats.take(C, Seat(2)), (Seat(1), false), "a free one before a new one");
        assert_eq!((seats.of(A), seats.of(B), seats.of(C)), (None, Some(Seat(2)), Some(Seat(1))));
    }

    #[test]
    fn only_free_seats_are_removed_highest_first() {
        let mut seats = Seats::default();
        for (worker, seat) in [(A, 1), (B, 2), (C, 3)] {
            seats.take(worker, Seat(seat));
        }
        seats.make(Seat(4));
        seats.leave(A);
        seats.leave(C);
        assert_eq!(seats.trim(2), [Seat(4), Seat(3)]);
        assert_eq!(seats.trim(0), [Seat(1)]);
        assert_eq!(seats.all().collect::<Vec<_>>(), [Seat(2)]);
    }
}
