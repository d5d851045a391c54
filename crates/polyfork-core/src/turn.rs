//! Whose turn it is: exact round robin with bounded debt.
//!
//! Used by the hand-over of connections ([`crate::handoff`]); the kernel mechanism takes its turns in a program of its own.
//!
//! Plain "next in the ring that has room" is unfair: a member that is full when its turn comes loses it, and the one
//! behind it takes two. Here everyone's turns are counted, the one with the fewest goes next, and ties go round the
//! ring. With room everywhere that is round robin to the letter. A member without room is owed its turns.
//!
//! The surprising rule: what is owed is bounded. Without the bound a member that hung for a minute would get all
//! traffic afterwards until it had caught up.

use crate::id::WorkerId;

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
#[derive(Clone, Debug)]
pub struct Turn<K = WorkerId> {
    ring: Vec<Member<K>>,
    /// Index in `ring` of the first member to look at: the one after the last who took a turn.
    from: usize,
    debt_limit: u64,
}

#[derive(Clone, Debug)]
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
    pub fn next(&mut self, mut has_room: impl FnMut(K) -> bool) -> Option<K> {
        let floor = self.most().saturating_sub(self.debt_limit);
        let len = self.ring.len();
        let mut best: Option<(u64, usize)> = None;
        for step in 0..len {
            let index = (self.from + step) % len;
            let member = &mut self.ring[index];
            member.taken = member.taken.max(floor);
            if best.is_none_or(|(taken, _)| member.taken < taken) && has_room(member.key) {
                best = Some((member.taken, index));
            }
        }
        let (_, index) = best?;
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

    fn most(&self) -> u64 {
        self.ring.iter().map(|m| m.taken).max().unwrap_or(0)
    }
}
