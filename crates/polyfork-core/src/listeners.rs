//! Who holds which listening socket.
//!
//! The book keeping behind Node's `queryServer`: which socket a worker means, whether it exists, who else
//! uses it, and when nobody does any more. Binding and handing over are the shell's business.
//!
//! The rule that surprises: a socket outlives the workers that die or leave, so that their replacement finds
//! it (and its queue) again; only a worker that *closes* it while staying can be the last to let go, or a
//! full set of ready workers none of which wants it.
//!
//! Behaviour follows: Node `lib/internal/cluster/primary.js` (`queryServer`, `close`).

use std::collections::BTreeMap;

use crate::id::WorkerId;

/// Names one listening socket of the primary; never reused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct ListenerId(pub u32);

/// The sockets of a primary, by what workers call them. `K` is all that makes two requests mean the same.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Listeners<K> {
    entries: BTreeMap<ListenerId, Entry<K>>,
    next: u32,
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
struct Entry<K> {
    key: K,
    /// Who has asked for it, and whether it said that it listens.
    members: BTreeMap<WorkerId, bool>,
    /// Opened by the primary itself: stays until the end.
    pinned: bool,
}

/// What to do with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Open a socket; it is entered under this id. Call [`Listeners::remove`] if that fails.
    Open(ListenerId),
    /// Share this one, which is open.
    Join(ListenerId),
    /// The worker holds it already: address in use.
    InUse,
}

impl<K: PartialEq> Default for Listeners<K> {
    fn default() -> Self {
        Listeners { entries: BTreeMap::new(), next: 1 }
    }
}

impl<K: PartialEq> Listeners<K> {
    /// A worker asks for a socket. It is a member from now on, unless the answer is `InUse`.
    pub fn ask(&mut self, worker: WorkerId, key: K) -> Decision {
        if let Some((id, entry)) = self.entries.iter_mut().find(|(_, e)| e.key == key) {
            if entry.members.contains_key(&worker) {
                return Decision::InUse;
            }
            entry.members.insert(worker, false);
            return Decision::Join(*id);
        }
        let id = self.enter(key, false);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.members.insert(worker, false);
        }
        Decision::Open(id)
    }

    /// The primary opens a socket of its own, which stays until [`Listeners::remove`].
    pub fn pin(&mut self, key: K) -> ListenerId {
        self.enter(key, true)
    }

    fn enter(&mut self, key: K, pinned: bool) -> ListenerId {
        let id = ListenerId(self.next);
        self.next += 1;
        self.entries.insert(id, Entry { key, members: BTreeMap::new(), pinned });
        id
    }

    /// A worker takes part in a socket that the primary opened.
    pub fn join(&mut self, worker: WorkerId, id: ListenerId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.members.entry(worker).or_insert(false);
        }
    }

    /// A worker says that it listens. False if it never asked for that socket.
    pub fn listening(&mut self, worker: WorkerId, id: ListenerId) -> bool {
        match self.entries.get_mut(&id).and_then(|e| e.members.get_mut(&worker)) {
            Some(listening) => {
                *listening = true;
                true
            }
            None => false,
        }
    }

    /// A worker closes a socket and stays. True when nobody is left: the socket should be closed, too.
    pub fn close(&mut self, worker: WorkerId, id: ListenerId) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else { return false };
        entry.members.remove(&worker).is_some() && entry.members.is_empty() && !entry.pinned
    }

    /// A worker leaves or has died: it is no member of anything any more. The sockets stay.
    pub fn leave(&mut self, worker: WorkerId) -> Vec<ListenerId> {
        let mut left = Vec::new();
        for (id, entry) in &mut self.entries {
            if entry.members.remove(&worker).is_some() {
                left.push(*id);
            }
        }
        left
    }

    /// Sockets that nobody uses. To be asked when every slot has a ready worker: those are leftovers of an
    /// earlier version of the program.
    pub fn unused(&self) -> Vec<ListenerId> {
        let idle = |e: &Entry<K>| e.members.is_empty() && !e.pinned;
        self.entries.iter().filter(|(_, e)| idle(e)).map(|(id, _)| *id).collect()
    }

    /// Forgets a socket.
    pub fn remove(&mut self, id: ListenerId) {
        self.entries.remove(&id);
    }

    /// Whether the worker is a member, and if so whether it said that it listens.
    pub fn member(&self, worker: WorkerId, id: ListenerId) -> Option<bool> {
        self.entries.get(&id)?.members.get(&worker).copied()
    }

    /// Workers that listen on a socket.
    pub fn listeners_of(&self, id: ListenerId) -> impl Iterator<Item = WorkerId> + '_ {
        let members = self.entries.get(&id).into_iter().flat_map(|e| &e.members);
        members.filter(|(_, listening)| **listening).map(|(worker, _)| *worker)
    }

    /// All members of a socket, listening or about to.
    pub fn members_of(&self, id: ListenerId) -> impl Iterator<Item = WorkerId> + '_ {
        self.entries.get(&id).into_iter().flat_map(|e| e.members.keys().copied())
    }

    /// All sockets that are entered, in order.
    pub fn ids(&self) -> impl Iterator<Item = ListenerId> + '_ {
        self.entries.keys().copied()
    }

    /// Whether every number was given out before the next one.
    pub fn is_sound(&self) -> bool {
        self.next < u32::MAX / 2 && self.entries.keys().all(|id| id.0 < self.next)
    }

    /// The sockets a worker is a member of, with their key and whether it listens.
    pub fn of(&self, worker: WorkerId) -> impl Iterator<Item = (ListenerId, &K, bool)> + '_ {
        self.entries.iter().filter_map(move |(id, e)| {
            e.members.get(&worker).map(|listening| (*id, &e.key, *listening))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    #[test]
    fn workers_that_mean_the_same_share_one_socket() {
        let mut book = Listeners::default();
        let Decision::Open(id) = book.ask(A, "x") else { panic!("first opens") };
        assert_eq!(book.ask(B, "x"), Decision::Join(id));
        assert_ne!(book.ask(B, "y"), Decision::Join(id));
    }

    #[test]
    fn a_second_request_of_the_same_worker_is_address_in_use() {
        let mut book = Listeners::default();
        book.ask(A, "x");
        assert_eq!(book.ask(A, "x"), Decision::InUse);
    }

    #[test]
    fn the_last_to_close_ends_the_socket() {
        let mut book = Listeners::default();
        let Decision::Open(id) = book.ask(A, "x") else { panic!("first opens") };
        book.ask(B, "x");
        assert!(!book.close(A, id));
        assert!(!book.close(A, id), "closing twice counts once");
        assert!(book.close(B, id));
    }

    #[test]
    fn death_keeps_the_socket_for_the_replacement() {
        let mut book = Listeners::default();
        let Decision::Open(id) = book.ask(A, "x") else { panic!("first opens") };
        assert!(book.listening(A, id));
        assert_eq!(book.leave(A), vec![id]);
        assert_eq!(book.unused(), vec![id]);
        assert_eq!(book.ask(B, "x"), Decision::Join(id));
        assert_eq!(book.unused(), vec![]);
        assert_eq!(book.listeners_of(id).count(), 0);
        assert!(!book.listening(A, id), "the dead do not listen");
    }

    #[test]
    fn sockets_of_the_primary_stay() {
        let mut book = Listeners::default();
        let id = book.pin("x");
        book.join(A, id);
        assert!(!book.close(A, id));
        assert_eq!(book.unused(), vec![]);
    }
}
