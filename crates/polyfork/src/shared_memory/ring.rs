//! A ring of records in shared memory, from one producer to one consumer, in one process or two.
//!
//! The algorithm is in `polyfork_core::sync::ring`; here are its place in a buffer, and sleeping: blocking ends sleep on a
//! word by a futex, async ends by [`Atomics::wait_async`]. Either end enters the kernel only to sleep, or to wake the other when
//! that sleeps. Whoever wants messages of serde types, order with other messages, and to be told when a process
//! dies takes a [`channel`](crate::channel), which uses such a ring by itself.
//!
//! ```
//! use polyfork::shared_memory::ring::{self, Consumer, Producer};
//!
//! let memory = ring::create(1 << 16)?;
//! // One of the two usually happens in the process that the memory was sent to.
//! let mut producer = Producer::new(&memory)?;
//! let mut consumer = Consumer::new(&memory)?;
//! std::thread::spawn(move || {
//!     for number in 0..1000_u32 {
//!         producer.push(&number.to_le_bytes(), None).expect("the consumer is there");
//!     }
//! });
//! let mut record = Vec::new();
//! let mut sum = 0;
//! while consumer.pop(&mut record, None)? {
//!     sum += u32::from_le_bytes(record[..].try_into()?);
//! }
//! assert_eq!(sum, 499_500);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The rule that surprises: an end that is dropped says so in the memory, but one that is killed cannot. Who must
//! notice that waits with a limit and looks at the process, or keeps a channel to it.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub use polyfork_core::sync::ring::Corrupt;
use polyfork_core::sync::ring::{self as words, PushError};

use super::{Atomics, MemoryError, SharedArrayBuffer, View, ViewError};

/// Bytes before the ring: a bell for each end, on lines of their own.
const BELLS_BYTES: usize = 256;
const TO_CONSUMER: usize = 0;
const TO_PRODUCER: usize = 32;
const BELLS: usize = BELLS_BYTES / size_of::<u32>();
/// How often an end looks once more before it sleeps. Half a microsecond or two.
const LOOKS: u32 = 64;

/// Why there is no end of a ring.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Part of the buffer is in use in another width.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The buffer has no ring in it.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// Why a record was not added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// There is no room, or was none in time.
    #[error("ring is full")]
    Full,
    /// There will never be room.
    #[error("record of {length} bytes is longer than the ring's limit of {limit}")]
    TooLong {
        /// The record's length.
        length: usize,
        /// The longest record that fits.
        limit: usize,
    },
    /// The consumer was dropped.
    #[error("the consumer of the ring is gone")]
    Abandoned,
    /// The consumer broke the ring.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// Waiting without blocking takes a thread, and there is none.
    #[error("cannot wait for room in the ring: {0}")]
    Wait(#[source] io::Error),
}

/// Why no record was taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// There is none, or was none in time.
    #[error("ring is empty")]
    Empty,
    /// The producer broke the ring.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// Waiting without blocking takes a thread, and there is none.
    #[error("cannot wait for a record in the ring: {0}")]
    Wait(#[source] io::Error),
}

/// Memory with an empty ring in it, for at least so many bytes of records. A record takes 8 bytes besides its own, and its
/// own in multiples of 8.
///
/// # Errors
/// [`MemoryError`].
pub fn create(bytes: usize) -> Result<SharedArrayBuffer, MemoryError> {
    // What is too much here is too much for the machine.
    let bytes = bytes.clamp(64, isize::MAX as usize / 4);
    let length = BELLS_BYTES + words::words_for(bytes) * size_of::<u64>();
    let memory = SharedArrayBuffer::new(length)?;
    let all = ring_of(&memory).expect("nobody else has seen this memory");
    words::format(&all).expect("it is long enough");
    Ok(memory)
}

fn ring_of(memory: &SharedArrayBuffer) -> Result<View<AtomicU64>, ViewError> {
    let count = memory.len().saturating_sub(BELLS_BYTES) / size_of::<u64>();
    memory.view(BELLS_BYTES, count)
}

fn bells_of(memory: &SharedArrayBuffer) -> Result<View<AtomicU32>, ViewError> {
    memory.view(0, BELLS)
}

/// Wakes who sleeps on a bell.
fn ring_bell(bells: &View<AtomicU32>, bell: usize) {
    bells[bell].fetch_add(1, Ordering::SeqCst);
    bells.notify(bell, 1);
}

/// The end that adds records. There must be one only, in all processes.
///
/// Dropping it tells the consumer, who gets what was added before.
#[derive(Debug)]
pub struct Producer {
    ring: words::Producer<View<AtomicU64>>,
    bells: View<AtomicU32>,
}

impl Producer {
    /// Takes the producing end of the ring in this memory.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn new(memory: &SharedArrayBuffer) -> Result<Self, AttachError> {
        let ring = words::Producer::new(ring_of(memory)?)?;
        Ok(Self { ring, bells: bells_of(memory)? })
    }

    /// The longest record in bytes.
    pub fn longest(&self) -> usize {
        self.ring.longest()
    }

    /// Adds a record without waiting.
    ///
    /// # Errors
    /// [`SendError`]; nothing was added then.
    pub fn try_push(&mut self, record: &[u8]) -> Result<(), SendError> {
        match self.ring.push(0, record) {
            Ok(()) => {
                if self.ring.must_wake() {
                    ring_bell(&self.bells, TO_CONSUMER);
                }
                Ok(())
            }
            Err(error) => Err(self.refused(error)),
        }
    }

    fn refused(&self, error: PushError) -> SendError {
        match error {
            _ if self.ring.is_abandoned() => SendError::Abandoned,
            PushError::Full => SendError::Full,
            PushError::TooLong { length, limit } => SendError::TooLong { length, limit },
            PushError::Corrupt(corrupt) => corrupt.into(),
        }
    }

    /// Adds a record, waiting for room at most for `limit`.
    ///
    /// # Blocking
    /// Blocks the thread.
    ///
    /// # Errors
    /// [`SendError`]; [`Full`](SendError::Full) when there was no room in time.
    pub fn push(&mut self, record: &[u8], limit: Option<Duration>) -> Result<(), SendError> {
        let end = deadline(limit);
        loop {
            match self.look_for_room(record) {
                Err(SendError::Full) => {}
                done => return done,
            }
            let bell = self.bells[TO_PRODUCER].load(Ordering::SeqCst);
            if !self.sleeps(record)? {
                continue;
            }
            let left = left(end).ok_or(SendError::Full);
            let waited = left.map(|left| self.bells.wait(TO_PRODUCER, bell, left));
            self.ring.awake();
            waited?;
        }
    }

    /// Adds a record, waiting for room without blocking. Cancel safe: dropped before it is done, nothing was added.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn push_async(&mut self, record: &[u8]) -> Result<(), SendError> {
        loop {
            match self.try_push(record) {
                Err(SendError::Full) => {}
                done => return done,
            }
            let bell = self.bells[TO_PRODUCER].load(Ordering::SeqCst);
            if self.sleeps(record)? {
                let waited = self.bells.wait_async(TO_PRODUCER, bell, None).await;
                self.ring.awake();
                waited.map_err(SendError::Wait)?;
            }
        }
    }

    fn look_for_room(&mut self, record: &[u8]) -> Result<(), SendError> {
        for _ in 0..LOOKS {
            match self.try_push(record) {
                Err(SendError::Full) => std::hint::spin_loop(),
                done => return done,
            }
        }
        Err(SendError::Full)
    }

    /// Says that this end sleeps, unless there is a reason not to.
    fn sleeps(&mut self, record: &[u8]) -> Result<bool, SendError> {
        let sleeps = self.ring.prepare_sleep(record.len()).map_err(|error| self.refused(error))?;
        if sleeps && self.ring.is_abandoned() {
            self.ring.awake();
            return Err(SendError::Abandoned);
        }
        Ok(sleeps)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.ring.leave();
        ring_bell(&self.bells, TO_CONSUMER);
    }
}

/// The end that takes records. There must be one only, in all processes.
///
/// Dropping it tells the producer.
#[derive(Debug)]
pub struct Consumer {
    ring: words::Consumer<View<AtomicU64>>,
    bells: View<AtomicU32>,
}

impl Consumer {
    /// Takes the consuming end of the ring in this memory.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn new(memory: &SharedArrayBuffer) -> Result<Self, AttachError> {
        let ring = words::Consumer::new(ring_of(memory)?)?;
        Ok(Self { ring, bells: bells_of(memory)? })
    }

    /// Takes the first record without waiting: `into` is replaced by it. `false` when nothing more will come,
    /// since the producer was dropped.
    ///
    /// # Errors
    /// [`ReceiveError`]; `into` is empty then.
    pub fn try_pop(&mut self, into: &mut Vec<u8>) -> Result<bool, ReceiveError> {
        into.clear();
        // Looked at first: what was added before it left is there when this is seen.
        let left = self.ring.is_abandoned();
        match self.ring.pop(into)? {
            Some(_) => {
                if self.ring.must_wake() {
                    ring_bell(&self.bells, TO_PRODUCER);
                }
                Ok(true)
            }
            None if left => Ok(false),
            None => Err(ReceiveError::Empty),
        }
    }

    /// Takes the first record, waiting for it at most for `limit`. `false` when nothing more will come.
    ///
    /// # Blocking
    /// Blocks the thread.
    ///
    /// # Errors
    /// [`ReceiveError`]; [`Empty`](ReceiveError::Empty) when there was none in time.
    pub fn pop(
        &mut self,
        into: &mut Vec<u8>,
        limit: Option<Duration>,
    ) -> Result<bool, ReceiveError> {
        let end = deadline(limit);
        loop {
            match self.look_for_record(into) {
                Err(ReceiveError::Empty) => {}
                done => return done,
            }
            let bell = self.bells[TO_CONSUMER].load(Ordering::SeqCst);
            if !self.sleeps()? {
                continue;
            }
            let left = left(end).ok_or(ReceiveError::Empty);
            let waited = left.map(|left| self.bells.wait(TO_CONSUMER, bell, left));
            self.ring.awake();
            waited?;
        }
    }

    /// Takes the first record, waiting for it without blocking. `false` when nothing more will come. Cancel
    /// safe.
    ///
    /// # Errors
    /// [`ReceiveError`], but never [`Empty`](ReceiveError::Empty).
    pub async fn pop_async(&mut self, into: &mut Vec<u8>) -> Result<bool, ReceiveError> {
        loop {
            match self.try_pop(into) {
                Err(ReceiveError::Empty) => {}
                done => return done,
            }
            let bell = self.bells[TO_CONSUMER].load(Ordering::SeqCst);
            if self.sleeps()? {
                let waited = self.bells.wait_async(TO_CONSUMER, bell, None).await;
                self.ring.awake();
                waited.map_err(ReceiveError::Wait)?;
            }
        }
    }

    fn look_for_record(&mut self, into: &mut Vec<u8>) -> Result<bool, ReceiveError> {
        for _ in 0..LOOKS {
            match self.try_pop(into) {
                Err(ReceiveError::Empty) => std::hint::spin_loop(),
                done => return done,
            }
        }
        Err(ReceiveError::Empty)
    }

    /// Says that this end sleeps, unless there is a reason not to.
    fn sleeps(&mut self) -> Result<bool, ReceiveError> {
        let sleeps = self.ring.prepare_sleep()?;
        if sleeps && self.ring.is_abandoned() {
            self.ring.awake();
            return Ok(false);
        }
        Ok(sleeps)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.ring.leave();
        ring_bell(&self.bells, TO_PRODUCER);
    }
}

fn deadline(limit: Option<Duration>) -> Option<Instant> {
    limit.and_then(|limit| Instant::now().checked_add(limit))
}

/// What is left of a limit; `None` when nothing is.
fn left(end: Option<Instant>) -> Option<Option<Duration>> {
    match end {
        None => Some(None),
        Some(end) => {
            let left = end.saturating_duration_since(Instant::now());
            (!left.is_zero()).then_some(Some(left))
        }
    }
}
