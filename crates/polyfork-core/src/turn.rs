//! Whose turn it is: exact round robin with bounded debt.
//!
//! Used by the hand-over of connections ([`crate::handoff`]); the kernel mechanism takes its turns in a program of its own.
//!
//! Plain "next in the ring that has room" is unfair: a member that is full when its turn comes loses it, and the one
//! behind it takes two. Here everyone's turns are counted, the one with the fewest goes next, and ties go round the
//! ring. With room everywhere that is round robin to the letter. A member without room is owed its turns.
//!
//! The surprising rule: what is owed is bounded. At the bound the others wait for a member that is merely busy, so
//! that counts never drift apart; one that is away loses what it was owed beyond the bound, or else it would get all
//! traffic for a while when it comes back.

use crate::id::WorkerId;

/// Whether a member can take a turn.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// At once.
    Free,
    /// In a moment: it is worth waiting for.
    Busy,
    /// Nobody knows when.
    Away,
}

/// Turns among members, by default workers.
///
/// # Examples
///
/// ```
/// use polyfork_core::Turn;
///
/// let mut turn = Turn::new(64);
/// turn.join('a');
/// turn.join('b');
/// let taken: String = (0..4).filter_map(|_| turn.next(|_| true)).collect();
/// assert_eq!(taken, "abab");
/// ```
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Turn<K = WorkerId> {
    ring: Vec<Member<K>>,
    /// Index in `ring` of the first member to look at: the one after the last who took a turn.
    from: usize,
    debt_limit: u64,
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Member<K> {
    key: K,
    taken: u64,
}

impl<K: Copy + Eq> Turn<K> {
    /// A ring without members, in which at most `debt_limit` turns are owed to anyone.
    pub fn new(debt_limit: u32) -> Turn<K> {
        Turn { ring: Vec::new(), from: 0, debt_limit: u64::from(debt_limit) }
    }

    /// Adds a member behind the others. It starts level with the one that took most turns: nothing is owed to it.
    /// Joining twice changes nothing.
    pub fn join(&mut self, key: K) {
        if !self.contains(key) {
            let taken = self.most();
            self.ring.push(Member { key, taken });
        }
    }

    /// Removes a member and what it was owed.
    pub fn leave(&mut self, key: K) {
        let Some(index) = self.ring.iter().position(|m| m.key == key) else { return };
        self.ring.remove(index);
        if index < self.from {
            self.from -= 1;
        }
    }

    /// Gives the turn to the member with room that took fewest, the next in the ring among equals; nobody without room.
    ///
    /// Nobody is waited for: [`Turn::next_or_wait`] with every member free or away.
    pub fn next(&mut self, mut has_room: impl FnMut(K) -> bool) -> Option<K> {
        self.next_or_wait(|key| if has_room(key) { Room::Free } else { Room::Away })
    }

    /// As [`Turn::next`], but nobody is next while a busy member is owed all that may be owed.
    pub fn next_or_wait(&mut self, mut room: impl FnMut(K) -> Room) -> Option<K> {
        let floor = self.most().saturating_sub(self.debt_limit);
        let len = self.ring.len();
        let mut best: Option<(u64, usize)> = None;
        let mut busy: Option<u64> = None;
        for step in 0..len {
            let index = (self.from + step) % len;
            let member = &mut self.ring[index];
            match room(member.key) {
                Room::Free if best.is_none_or(|(taken, _)| member.taken < taken) => {
                    best = Some((member.taken, index));
                }
                Room::Free => {}
                Room::Busy => {
                    busy = Some(busy.map_or(member.taken, |taken| taken.min(member.taken)))
                }
                Room::Away => member.taken = member.taken.max(floor),
            }
        }
        let (taken, index) = best?;
        if busy.is_some_and(|busy| taken.saturating_sub(busy) >= self.debt_limit) {
            return None;
        }
        let member = &mut self.ring[index];
        member.taken += 1;
        self.from = index + 1;
        Some(member.key)
    }

    /// How many turns this member is behind the one that took most.
    pub fn owed(&self, key: K) -> u64 {
        let taken = self.ring.iter().find(|m| m.key == key).map(|m| m.taken);
        taken.map_or(0, |taken| (self.most() - taken).min(self.debt_limit))
    }

    /// Whether this member takes part.
    pub fn contains(&self, key: K) -> bool {
        self.ring.iter().any(|m| m.key == key)
    }

    /// How many take part.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether nobody takes part.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    /// Whether it can have come about: every member once, and numbers that can still grow.
    pub(crate) fn is_sound(&self) -> bool {
        let once = |(at, m): (usize, &Member<K>)| self.ring[..at].iter().all(|b| b.key != m.key);
        self.from <= self.ring.len()
            && self.ring.iter().enumerate().all(once)
            && self.most() < u64::MAX / 2
    }

    /// Everybody who takes part.
    pub(crate) fn members(&self) -> impl Iterator<Item = K> + '_ {
        self.ring.iter().map(|m| m.key)
    }

    fn most(&self) -> u64 {
        self.ring.iter().map(|m| m.taken).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ring(members: u32, debt_limit: u32) -> Turn<u32> {
        let mut turn = Turn::new(debt_limit);
        (0..members).for_each(|member| turn.join(member));
        turn
    }

    fn take(turn: &mut Turn<u32>, count: usize, without: &[u32]) -> Vec<u32> {
        (0..count).filter_map(|_| turn.next(|m| !without.contains(&m))).collect()
    }

    #[test]
    fn a_busy_member_is_waited_for_once_it_is_owed_all_that_may_be() {
        let mut turn = ring(2, 3);
        let busy = |key| if key == 0 { Room::Busy } else { Room::Free };
        let taken = (0..10).filter_map(|_| turn.next_or_wait(busy)).count();
        assert_eq!(taken, 3);
        let all: Vec<_> = (0..4).filter_map(|_| turn.next_or_wait(|_| Room::Free)).collect();
        assert_eq!(all, [0, 0, 0, 1].map(|key: u32| key));
    }

    #[test]
    fn nobody_with_room_nobody_next() {
        assert_eq!(ring(0, 64).next(|_| true), None);
        let mut turn = ring(3, 64);
        assert_eq!(turn.next(|_| false), None);
        assert_eq!(take(&mut turn, 3, &[]), [0, 1, 2], "looking costs no turn");
    }

    #[test]
    fn member_without_room_is_owed_its_turns() {
        let mut turn = ring(2, 64);
        assert_eq!(take(&mut turn, 3, &[1]), [0, 0, 0]);
        assert_eq!(turn.owed(1), 3);
        assert_eq!(take(&mut turn, 5, &[]), [1, 1, 1, 0, 1]);
    }

    #[test]
    fn what_is_owed_is_bounded() {
        let mut turn = ring(2, 4);
        take(&mut turn, 1000, &[1]);
        assert_eq!(turn.owed(1), 4);
        let run = take(&mut turn, 100, &[]).into_iter().take_while(|m| *m == 1).count();
        assert!(run <= 5, "{run} turns at a stretch");
    }

    #[test]
    fn newcomer_gets_no_flood() {
        let mut turn = ring(2, 64);
        take(&mut turn, 101, &[]);
        turn.join(9);
        let taken = take(&mut turn, 6, &[]);
        assert_eq!(taken.iter().filter(|m| **m == 9).count(), 2, "{taken:?}");
    }

    #[test]
    fn leaving_does_not_disturb_the_order_of_the_others() {
        let mut turn = ring(4, 64);
        assert_eq!(take(&mut turn, 2, &[]), [0, 1]);
        turn.leave(0);
        assert_eq!(take(&mut turn, 4, &[]), [2, 3, 1, 2]);
        turn.leave(3);
        assert_eq!(take(&mut turn, 3, &[]), [1, 2, 1]);
    }

    #[test]
    fn joining_twice_and_leaving_twice_change_nothing() {
        let mut turn = ring(2, 64);
        turn.join(1);
        assert_eq!(turn.len(), 2);
        turn.leave(0);
        turn.leave(0);
        assert_eq!((turn.len(), turn.contains(0)), (1, false));
        assert_eq!(take(&mut turn, 2, &[]), [1, 1]);
    }

    proptest! {
        /// Any stretch of turns falls evenly, to one, on members that all have room.
        #[test]
        fn any_stretch_of_turns_differs_by_at_most_one(
            members in 1_u32..12,
            skipped in 0_usize..50,
            length in 0_usize..100,
        ) {
            let mut turn = ring(members, 64);
            take(&mut turn, skipped, &[]);
            let stretch = take(&mut turn, length, &[]);
            let count = |m| stretch.iter().filter(|taken| **taken == m).count();
            let (least, most) = ((0..members).map(count).min(), (0..members).map(count).max());
            prop_assert!(most.unwrap() - least.unwrap() <= 1, "{:?}", stretch);
        }

        /// The turn always goes to a member with room, whoever comes and goes.
        #[test]
        fn turn_goes_to_a_member_with_room(
            steps in prop::collection::vec((0_u32..8, 0_u8..8, any::<u8>()), 0..400),
        ) {
            let mut turn = ring(3, 8);
            for (member, what, room) in steps {
                match what {
                    0 => turn.join(member),
                    1 => turn.leave(member),
                    _ => {
                        let has_room = |m: u32| room & (1 << m) != 0;
                        let could = (0..8).any(|m| turn.contains(m) && has_room(m));
                        let next = turn.next(has_room);
                        prop_assert_eq!(next.is_some(), could);
                        prop_assert!(next.is_none_or(|m| turn.contains(m) && has_room(m)));
                        prop_assert!((0..8).all(|m| turn.owed(m) <= 8));
                    }
                }
            }
        }
    }
}
