//! A value of several words in shared memory: read whole or not at all, without ever making the writer wait.
//!
//! The algorithm is in `polyfork_core::sync::seq`; here is its place in a buffer, and how long a reader tries.
//!
//! The rule that surprises: a writer that was killed in the middle leaves the value unreadable, not torn. The next
//! [`write`](SeqCell::write) says so, and [`write_over`](SeqCell::write_over) is the way out for who knows that
//! it is dead.

use std::sync::atomic::AtomicU64;

use polyfork_core::sync::seq::{Busy, SeqLock};

use super::{SharedArrayBuffer, View, ViewError};

/// How often a read that meets a write tries again before it lets others run.
const TRIES: u32 = 64;
/// How often it lets others run before it gives up: a write takes less than a microsecond.
const ROUNDS: u32 = 10_000;

/// A value of `N` words in shared memory, written by one process at a time and read by any number. Clones are the same
/// value.
///
/// Takes `(N + 1) * 8` bytes, which must be zero to begin with.
///
/// ```
/// use polyfork::shared_memory::{SeqCell, SharedArrayBuffer};
///
/// let buffer = SharedArrayBuffer::new(4096)?;
/// let position = SeqCell::<3>::new(&buffer, 64)?;
/// position.write([1, 2, 3])?;
/// assert_eq!(position.read()?, [1, 2, 3]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SeqCell<const N: usize>(SeqLock<View<AtomicU64>>);

/// A write is under way: another process is at it, or died in the middle of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value in shared memory is being written, or its writer died in the middle")]
pub struct BeingWritten;

impl From<Busy> for BeingWritten {
    fn from(_: Busy) -> Self {
        BeingWritten
    }
}

impl<const N: usize> SeqCell<N> {
    /// How many bytes it takes.
    pub const BYTES: usize = (N + 1) * size_of::<u64>();

    /// The value that begins at byte `start` of the buffer.
    ///
    /// # Errors
    /// [`ViewError`].
    pub fn new(buffer: &SharedArrayBuffer, start: usize) -> Result<Self, ViewError> {
        Ok(Self(SeqLock::new(buffer.view(start, N + 1)?)))
    }

    /// Writes the value, without waiting.
    ///
    /// # Errors
    /// [`BeingWritten`]; nothing was written.
    pub fn write(&self, value: [u64; N]) -> Result<(), BeingWritten> {
        Ok(self.0.write(&value)?)
    }

    /// Writes the value, also when a writer died in the middle. Only for who knows that no other lives: a
    /// value that two write at a time can be read torn.
    ///
    /// # Errors
    /// [`BeingWritten`] when somebody else does the same.
    pub fn write_over(&self, value: [u64; N]) -> Result<(), BeingWritten> {
        Ok(self.0.write_over(&value)?)
    }

    /// Reads the value, at once or not at all.
    ///
    /// # Errors
    /// [`BeingWritten`], which is over soon if the writer lives.
    pub fn try_read(&self) -> Result<[u64; N], BeingWritten> {
        let mut value = [0; N];
        self.0.read(&mut value)?;
        Ok(value)
    }

    /// Reads the value, and tries again while it is being written. Against a writer that never pauses this can
    /// take long; it is bounded all the same.
    ///
    /// # Errors
    /// [`BeingWritten`] when it was so each time: in all likelihood the writer is dead, or was stopped in the middle.
    pub fn read(&self) -> Result<[u64; N], BeingWritten> {
        for _ in 0..ROUNDS {
            for _ in 0..TRIES {
                if let Ok(value) = self.try_read() {
                    return Ok(value);
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
        Err(BeingWritten)
    }

    /// Grows by two with each write, and is odd while one is under way.
    pub fn version(&self) -> u64 {
        self.0.version()
    }
}

impl<const N: usize> Clone for SeqCell<N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}
