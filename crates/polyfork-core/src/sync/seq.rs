//! A value of several words that one writes and many read, whole or not at all.
//!
//! A sequence lock: the counter is odd while a write is under way, and a read that saw it change is no read. Memory and patience
//! are the callers'.
//!
//! The surprising rule: a writer that dies in the middle leaves the counter odd, and readers then never get a value again,
//! rather than a torn one. [`SeqLock::write_over`] is for whoever knows that it is dead.
//!
//! Source: H. Boehm, "Can seqlocks get along with programming language memory models?" (2012).
//! Model: `tests/loom_seq.rs`.

use super::atomic::{AtomicU64, Ordering, fence};

/// One word of counter and the words of the value.
#[derive(Debug, Clone)]
pub struct SeqLock<M> {
    words: M,
}

/// A write is under way: by somebody else, or by one that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a write is under way")]
pub struct Busy;

impl<M: AsRef<[AtomicU64]>> SeqLock<M> {
    /// Of zero words. The value has one less than there are.
    pub const fn new(words: M) -> Self {
        Self { words }
    }

    /// Writes the value.
    ///
    /// # Errors
    ///
    /// [`Busy`]; nothing was written.
    ///
    /// # Panics
    ///
    /// When the value has not as many words as there are.
    pub fn write(&self, value: &[u64]) -> Result<(), Busy> {
        let (seq, data) = self.parts();
        let before = seq.load(Ordering::Relaxed);
        if before % 2 == 1 {
            return Err(Busy);
        }
        write_from(seq, data, before, before.wrapping_add(1), value)
    }

    /// Writes the value, also when a write that will never be finished stands in the way. Only to be called by who
    /// knows that no writer lives.
    ///
    /// # Errors
    ///
    /// [`Busy`] when somebody else does the same.
    ///
    /// # Panics
    ///
    /// As [`write`](Self::write).
    pub fn write_over(&self, value: &[u64]) -> Result<(), Busy> {
        let (seq, data) = self.parts();
        let before = seq.load(Ordering::Relaxed);
        write_from(seq, data, before, before.wrapping_add(1 + before % 2), value)
    }

    /// Reads the value, whole.
    ///
    /// # Errors
    ///
    /// [`Busy`] when it was being written; `value` is of no use then.
    ///
    /// # Panics
    ///
    /// When `value` has not as many words as there are.
    pub fn read(&self, value: &mut [u64]) -> Result<(), Busy> {
        let (seq, data) = self.parts();
        assert_eq!(value.len(), data.len(), "the value has as many words");
        let before = seq.load(Ordering::Acquire);
        if before % 2 == 1 {
            return Err(Busy);
        }
        for (to, from) in value.iter_mut().zip(data) {
            *to = from.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        if seq.load(Ordering::Relaxed) == before { Ok(()) } else { Err(Busy) }
    }

    /// How often the value was written, and half a time for a write that is under way.
    pub fn version(&self) -> u64 {
        self.parts().0.load(Ordering::Acquire)
    }

    fn parts(&self) -> (&AtomicU64, &[AtomicU64]) {
        self.words.as_ref().split_first().expect("there is a word for the counter")
    }
}

/// Claims the counter, which must be `before`, by an odd number, and writes.
fn write_from(
    seq: &AtomicU64,
    data: &[AtomicU64],
    before: u64,
    odd: u64,
    value: &[u64],
) -> Result<(), Busy> {
    assert_eq!(value.len(), data.len(), "the value has as many words");
    seq.compare_exchange(before, odd, Ordering::Acquire, Ordering::Relaxed).map_err(|_| Busy)?;
    // Whoever sees one of the words sees that the counter is odd.
    fence(Ordering::Release);
    for (to, from) in data.iter().zip(value) {
        to.store(*from, Ordering::Relaxed);
    }
    seq.store(odd.wrapping_add(1), Ordering::Release);
    Ok(())
}
