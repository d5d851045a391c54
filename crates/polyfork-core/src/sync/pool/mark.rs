//! Where a task stands: written under the lock of the queue only, and kept in the task itself.
//!
//! That is what makes withdrawing cheap: no search, and no second count that could disagree with the queue.

use std::sync::Arc;

use crate::sync::atomic::{AtomicU8, Ordering};

const OUTSIDE: u8 = 0;
const QUEUED: u8 = 1;
const IN_LINE: u8 = 2;
const WITHDRAWN: u8 = 3;

/// Where a task stands. A task has one and shows it by [`Marked`].
#[derive(Debug)]
pub struct Mark(AtomicU8);

impl Mark {
    /// The mark of a task that is nowhere yet.
    pub fn new() -> Self {
        Self(AtomicU8::new(OUTSIDE))
    }

    // Relaxed everywhere: the lock of the queue orders reads and writes.

    pub(super) fn is_withdrawn(&self) -> bool {
        self.0.load(Ordering::Relaxed) == WITHDRAWN
    }

    pub(super) fn is_queued(&self) -> bool {
        self.0.load(Ordering::Relaxed) == QUEUED
    }

    pub(super) fn is_in_line(&self) -> bool {
        self.0.load(Ordering::Relaxed) == IN_LINE
    }

    pub(super) fn queued(&self) {
        self.0.store(QUEUED, Ordering::Relaxed);
    }

    pub(super) fn in_line(&self) {
        self.0.store(IN_LINE, Ordering::Relaxed);
    }

    pub(super) fn withdrawn(&self) {
        self.0.store(WITHDRAWN, Ordering::Relaxed);
    }

    pub(super) fn outside(&self) {
        self.0.store(OUTSIDE, Ordering::Relaxed);
    }
}

impl Default for Mark {
    fn default() -> Self {
        Self::new()
    }
}

/// A task that can be queued. Clones are the same task.
pub trait Marked: Clone {
    /// Its one mark.
    fn mark(&self) -> &Mark;
}

impl Marked for Arc<Mark> {
    fn mark(&self) -> &Mark {
        self
    }
}
