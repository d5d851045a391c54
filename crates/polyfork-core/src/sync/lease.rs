//! A lock whose holder can be found out to be dead, for memory that processes share.
//!
//! Who holds it stands in the lock; who waits looks, now and then, whether the holder still exists, and takes its
//! place if not. Telling who exists, sleeping and waking are the callers'.
//!
//! Why not the kernel's robust futexes: the list of locks that a thread holds belongs to the C library, one per thread.
//!
//! The story of the lost wake-up: a waiter notes the bell, then says that it waits, then looks at the holder, then sleeps unless
//! the bell has rung since. Who lets go empties the lock, then looks whether anybody waits, and if so takes that note
//! back and rings. Were the bell noted after saying so, a holder could take the note back and ring in
//! between, a third could come and go without a word, and the waiter would sleep on.
//! Model: `tests/loom_lease.rs`.
//!
//! The surprising rule: who was asleep says again that somebody waits before it takes the lock, as there may be others
//! asleep of whom nobody else knows.

use super::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// A lock in words that belong to somebody else. All are zero to begin with.
#[derive(Debug, Clone, Copy)]
pub struct Lease<'a> {
    /// Who holds it; 0 for nobody.
    pub owner: &'a AtomicU64,
    /// Changes when it is let go and somebody waits. To be slept on.
    pub bell: &'a AtomicU32,
    /// Whether somebody may be asleep.
    pub waiting: &'a AtomicU32,
    /// Whether a holder died, and nobody said that its work was put in order.
    pub broken: &'a AtomicU32,
}

/// What a waiter finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// It holds the lock now.
    Locked,
    /// Somebody else does. Sleep while the bell is this, at most until it is time to look whether the holder lives.
    Wait {
        /// What the bell was.
        bell: u32,
        /// Who holds it.
        owner: u64,
    },
}

impl Lease<'_> {
    /// Takes the lock if nobody holds it. `me` names the holder and is not 0.
    #[must_use]
    pub fn try_lock(&self, me: u64) -> bool {
        self.owner.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Takes the lock, or says that somebody waits for it.
    #[must_use]
    pub fn attempt(&self, me: u64) -> Attempt {
        let bell = self.bell.load(Ordering::Acquire);
        self.waiting.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        match self.owner.compare_exchange(0, me, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => Attempt::Locked,
            Err(owner) => Attempt::Wait { bell, owner },
        }
    }

    /// Takes the lock from a holder that is dead; `false` when it is no longer the holder. What it guards is marked as
    /// broken.
    #[must_use]
    pub fn take_over(&self, dead: u64, me: u64) -> bool {
        let taken = self.owner.compare_exchange(dead, me, Ordering::Acquire, Ordering::Relaxed);
        if taken.is_ok() {
            self.broken.store(1, Ordering::Relaxed);
        }
        taken.is_ok()
    }

    /// Lets go; whether one waiter has to be woken. Nothing happens when `me` does not hold it any more.
    #[must_use]
    pub fn unlock(&self, me: u64) -> bool {
        if self.owner.compare_exchange(me, 0, Ordering::Release, Ordering::Relaxed).is_err() {
            return false;
        }
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.waiting.store(0, Ordering::Relaxed);
        self.bell.fetch_add(1, Ordering::Release);
        true
    }
}
