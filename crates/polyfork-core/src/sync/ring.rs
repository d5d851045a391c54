//! A ring of records of any length, from one producer to one consumer that may not trust each other.
//!
//! Copies bytes into and out of words that both see, and says when the other side has to be woken. The words, the
//! sleeping and the waking are the callers'. It is meant for memory that two processes share.
//!
//! # What is where
//!
//! Positions count words since the beginning and never go back; a word stands at its position modulo the capacity, which is
//! a power of two. A record is one word of length (low half) and kind (high half), and its bytes in
//! whole words, which may go round the end. Each field below has a cache line pair of its own.
//!
//! | word | written by | meaning |
//! | --- | --- | --- |
//! | 0 | whoever formats | that this is a ring, of this version |
//! | 16 | producer | position behind the last complete record |
//! | 32 | consumer | position of the first record that was not taken |
//! | 48 | both | 1: the consumer sleeps, or is about to |
//! | 64 | both | words the producer sleeps for, or is about to; 0: it does not |
//! | 80 | both | bit 0: the producer is gone, bit 1: the consumer is |
//! | 96 | producer | the records |
//!
//! # A peer that lies
//!
//! Each side believes only its own position, which it keeps to itself. The other's is copied once per look, must not go back
//! and not be further away than the capacity, or the ring is [`Corrupt`]; the length in a record is held against
//! what is there. So a hostile peer can put in garbage or make the other side stop, and nothing else: each call
//! is bounded by the capacity.
//!
//! # Sleeping
//!
//! The story of the lost wake-up: the consumer finds nothing and is about to sleep; the producer adds a record and sees nobody
//! asleep; the consumer sleeps for ever. So each side first says what it is about to do (the flag, or the record), then
//! passes a sequentially consistent fence, then looks what the other side said. At least one of them sees the other.
//! Model: `tests/loom_ring.rs`.
//!
//! The surprising rule: a flag is taken back by whoever wakes, so that one sleep costs one wake-up.

use super::atomic::{AtomicU64, Ordering, fence};

/// Words in a pair of cache lines, which processors fetch together. A model checker has less to do without.
const LINE: usize = if cfg!(polyfork_loom) { 1 } else { 16 };
const FORMAT: usize = 0;
const TAIL: usize = LINE;
const HEAD: usize = 2 * LINE;
const CONSUMER_SLEEPS: usize = 3 * LINE;
const PRODUCER_WANTS: usize = 4 * LINE;
const GONE: usize = 5 * LINE;
/// Words before the records.
pub const HEADER_WORDS: usize = 6 * LINE;

/// "PFRING" and version 1.
const MAGIC: u64 = 0x0001_474e_4952_4650;
const PRODUCER_GONE: u64 = 1;
const CONSUMER_GONE: u64 = 2;
const WORD_BYTES: usize = 8;

/// The other side wrote what it cannot have written, or this is no ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring is corrupt: {0}")]
pub struct Corrupt(pub &'static str);

/// Why a record was not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// There is no room now.
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
    /// The consumer broke the ring.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// How many words hold a ring for `bytes` bytes of records.
#[must_use]
pub const fn words_for(bytes: usize) -> usize {
    let words = bytes.div_ceil(WORD_BYTES);
    HEADER_WORDS + words.next_power_of_two()
}

/// Makes fresh words, which must be zero, a ring. Before anybody else has them.
///
/// # Errors
///
/// [`Corrupt`] when there are too few.
pub fn format(words: &[AtomicU64]) -> Result<(), Corrupt> {
    capacity(words)?;
    words[FORMAT].store(MAGIC, Ordering::Release);
    Ok(())
}

fn capacity(words: &[AtomicU64]) -> Result<u64, Corrupt> {
    let data = words.len().saturating_sub(HEADER_WORDS);
    if data < 2 {
        return Err(Corrupt("it has no room for a record"));
    }
    Ok(1 << data.ilog2())
}

fn attach(words: &[AtomicU64]) -> Result<u64, Corrupt> {
    let capacity = capacity(words)?;
    if words[FORMAT].load(Ordering::Acquire) != MAGIC {
        return Err(Corrupt("it is no ring of this version"));
    }
    Ok(capacity)
}

/// How many words a record takes.
fn words_of(length: usize) -> u64 {
    1 + length.div_ceil(WORD_BYTES) as u64
}

/// The end that adds records. There must be one only.
#[derive(Debug)]
pub struct Producer<M> {
    words: M,
    capacity: u64,
    tail: u64,
    /// As it was seen last.
    head: u64,
}

impl<M: AsRef<[AtomicU64]>> Producer<M> {
    /// Takes the producing end of a formatted ring.
    ///
    /// # Errors
    ///
    /// [`Corrupt`].
    pub fn new(words: M) -> Result<Self, Corrupt> {
        let all = words.as_ref();
        let capacity = attach(all)?;
        let (tail, head) = (all[TAIL].load(Ordering::Relaxed), all[HEAD].load(Ordering::Acquire));
        if tail.wrapping_sub(head) > capacity {
            return Err(Corrupt("its positions are too far apart"));
        }
        Ok(Self { words, capacity, tail, head })
    }

    /// The longest record in bytes.
    #[must_use]
    pub fn longest(&self) -> usize {
        (self.capacity as usize - 1) * WORD_BYTES
    }

    /// Adds a record. What `kind` means is the callers' business.
    ///
    /// # Errors
    ///
    /// [`PushError`]; nothing was added then.
    pub fn push(&mut self, kind: u32, bytes: &[u8]) -> Result<(), PushError> {
        let need = self.room_for(bytes.len())?;
        let length = u32::try_from(bytes.len())
            .map_err(|_| PushError::TooLong { length: bytes.len(), limit: u32::MAX as usize })?;
        let place = Place::new(self.words.as_ref(), self.capacity);
        place.word(self.tail).store(u64::from(length) | u64::from(kind) << 32, Ordering::Relaxed);
        let (first, second) = place.split(self.tail.wrapping_add(1), need - 1);
        let (before, after) = bytes.split_at(bytes.len().min(first.len() * WORD_BYTES));
        write(first, before);
        write(second, after);
        self.tail = self.tail.wrapping_add(need);
        self.words.as_ref()[TAIL].store(self.tail, Ordering::Release);
        Ok(())
    }

    /// Whether a record of this length can be added now.
    ///
    /// # Errors
    ///
    /// [`PushError`].
    pub fn can_push(&mut self, length: usize) -> Result<(), PushError> {
        self.room_for(length).map(|_| ())
    }

    /// How long a record may be that can be added now, as far as is known without looking.
    #[must_use]
    pub fn known_room(&self) -> usize {
        let free = self.capacity - self.tail.wrapping_sub(self.head);
        (free as usize).saturating_sub(1) * WORD_BYTES
    }

    /// How long a record may be that can be added now.
    ///
    /// # Errors
    ///
    /// [`Corrupt`].
    pub fn room(&mut self) -> Result<usize, Corrupt> {
        self.look()?;
        Ok(self.known_room())
    }

    fn room_for(&mut self, length: usize) -> Result<u64, PushError> {
        let need = words_of(length);
        if need > self.capacity {
            return Err(PushError::TooLong { length, limit: self.longest() });
        }
        if self.free() < need {
            self.look()?;
            if self.free() < need {
                return Err(PushError::Full);
            }
        }
        Ok(need)
    }

    fn free(&self) -> u64 {
        self.capacity - self.tail.wrapping_sub(self.head)
    }

    /// Learns what the consumer has taken.
    fn look(&mut self) -> Result<(), Corrupt> {
        let head = self.words.as_ref()[HEAD].load(Ordering::Acquire);
        if self.tail.wrapping_sub(head) > self.tail.wrapping_sub(self.head) {
            return Err(Corrupt("the consumer's position went back or ahead of the producer's"));
        }
        self.head = head;
        Ok(())
    }

    /// To be called after records were added: whether the consumer has to be woken.
    #[must_use]
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        take(&self.words.as_ref()[CONSUMER_SLEEPS])
    }

    /// To be called before sleeping for room for a record of this length. `false`: there is room, do not sleep.
    ///
    /// # Errors
    ///
    /// [`PushError`], but never [`Full`](PushError::Full).
    pub fn prepare_sleep(&mut self, length: usize) -> Result<bool, PushError> {
        let need = words_of(length);
        self.words.as_ref()[PRODUCER_WANTS].store(need, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        match self.room_for(length) {
            Err(PushError::Full) => Ok(true),
            other => {
                self.awake();
                other.map(|_| false)
            }
        }
    }

    /// To be called when a sleep is over for another reason than being woken.
    pub fn awake(&self) {
        self.words.as_ref()[PRODUCER_WANTS].store(0, Ordering::Relaxed);
    }

    /// Says that nothing more is added.
    pub fn leave(&self) {
        self.words.as_ref()[GONE].fetch_or(PRODUCER_GONE, Ordering::SeqCst);
    }

    /// Whether the consumer said that it takes no more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.words.as_ref()[GONE].load(Ordering::Acquire) & CONSUMER_GONE != 0
    }
}

/// The end that takes records. There must be one only.
#[derive(Debug)]
pub struct Consumer<M> {
    words: M,
    capacity: u64,
    head: u64,
    /// As it was seen last.
    tail: u64,
}

impl<M: AsRef<[AtomicU64]>> Consumer<M> {
    /// Takes the consuming end of a formatted ring.
    ///
    /// # Errors
    ///
    /// [`Corrupt`].
    pub fn new(words: M) -> Result<Self, Corrupt> {
        let all = words.as_ref();
        let capacity = attach(all)?;
        let (head, tail) = (all[HEAD].load(Ordering::Relaxed), all[TAIL].load(Ordering::Acquire));
        if tail.wrapping_sub(head) > capacity {
            return Err(Corrupt("its positions are too far apart"));
        }
        Ok(Self { words, capacity, head, tail: head })
    }

    /// Takes the first record: its bytes are appended to `into`, its kind is returned. `None` when there is none.
    ///
    /// # Errors
    ///
    /// [`Corrupt`]; nothing is appended then.
    pub fn pop(&mut self, into: &mut Vec<u8>) -> Result<Option<u32>, Corrupt> {
        if self.tail == self.head && !self.look()? {
            return Ok(None);
        }
        let there = self.tail.wrapping_sub(self.head);
        let place = Place::new(self.words.as_ref(), self.capacity);
        // Copied once: it may change at any time.
        let header = place.word(self.head).load(Ordering::Relaxed);
        let length = (header & u64::from(u32::MAX)) as usize;
        let need = words_of(length);
        if need > there {
            return Err(Corrupt("a record is longer than what was added"));
        }
        let (first, second) = place.split(self.head.wrapping_add(1), need - 1);
        let start = into.len();
        into.resize(start + length, 0);
        let (before, after) = into[start..].split_at_mut(length.min(first.len() * WORD_BYTES));
        read(first, before);
        read(second, after);
        self.head = self.head.wrapping_add(need);
        self.words.as_ref()[HEAD].store(self.head, Ordering::Release);
        Ok(Some((header >> 32) as u32))
    }

    /// How many bytes of records there can be at one time, at most.
    #[must_use]
    pub fn most_bytes(&self) -> usize {
        self.capacity as usize * WORD_BYTES
    }

    /// Whether nothing can be taken now.
    ///
    /// # Errors
    ///
    /// [`Corrupt`].
    pub fn is_empty(&mut self) -> Result<bool, Corrupt> {
        Ok(self.tail == self.head && !self.look()?)
    }

    /// Learns what the producer has added; whether there is something.
    fn look(&mut self) -> Result<bool, Corrupt> {
        let tail = self.words.as_ref()[TAIL].load(Ordering::Acquire);
        let there = tail.wrapping_sub(self.head);
        if there > self.capacity || there < self.tail.wrapping_sub(self.head) {
            return Err(Corrupt("the producer's position went back or too far ahead"));
        }
        self.tail = tail;
        Ok(there > 0)
    }

    /// To be called after records were taken: whether the producer has to be woken.
    #[must_use]
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        let words = self.words.as_ref();
        let wanted = words[PRODUCER_WANTS].load(Ordering::Relaxed);
        if wanted == 0 {
            return false;
        }
        // It stands still while it wants something. If it does not, it gets a wake-up too many or too few.
        let used = words[TAIL].load(Ordering::Relaxed).wrapping_sub(self.head);
        self.capacity.saturating_sub(used) >= wanted && take(&words[PRODUCER_WANTS])
    }

    /// To be called before sleeping. `false`: there is something to take, do not sleep.
    ///
    /// # Errors
    ///
    /// [`Corrupt`].
    pub fn prepare_sleep(&mut self) -> Result<bool, Corrupt> {
        self.words.as_ref()[CONSUMER_SLEEPS].store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let empty = self.is_empty();
        if empty != Ok(true) {
            self.awake();
        }
        empty
    }

    /// To be called when a sleep is over for another reason than being woken.
    pub fn awake(&self) {
        self.words.as_ref()[CONSUMER_SLEEPS].store(0, Ordering::Relaxed);
    }

    /// Says that nothing more is taken.
    pub fn leave(&self) {
        self.words.as_ref()[GONE].fetch_or(CONSUMER_GONE, Ordering::SeqCst);
    }

    /// Whether the producer said that it adds no more. Look for records once more afterwards.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.words.as_ref()[GONE].load(Ordering::Acquire) & PRODUCER_GONE != 0
    }
}

/// Takes a flag back; whether it was set.
fn take(flag: &AtomicU64) -> bool {
    flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::Relaxed) != 0
}

/// The records of a ring.
struct Place<'a> {
    data: &'a [AtomicU64],
    mask: u64,
}

impl<'a> Place<'a> {
    fn new(words: &'a [AtomicU64], capacity: u64) -> Self {
        Place { data: &words[HEADER_WORDS..][..capacity as usize], mask: capacity - 1 }
    }

    fn word(&self, position: u64) -> &'a AtomicU64 {
        &self.data[(position & self.mask) as usize]
    }

    /// `count` words from a position on: up to the end, and from the beginning.
    fn split(&self, position: u64, count: u64) -> (&'a [AtomicU64], &'a [AtomicU64]) {
        let start = (position & self.mask) as usize;
        let count = count as usize;
        let first = count.min(self.data.len() - start);
        (&self.data[start..start + first], &self.data[..count - first])
    }
}

/// Writes bytes into as many words as they need; the last one is filled up with zeros.
fn write(words: &[AtomicU64], bytes: &[u8]) {
    let (whole, rest) = bytes.as_chunks::<WORD_BYTES>();
    for (word, bytes) in words.iter().zip(whole) {
        word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
    }
    if let Some(word) = words.get(whole.len()).filter(|_| !rest.is_empty()) {
        let mut last = [0; WORD_BYTES];
        last[..rest.len()].copy_from_slice(rest);
        word.store(u64::from_ne_bytes(last), Ordering::Relaxed);
    }
}

/// Reads as many bytes as there is room for.
fn read(words: &[AtomicU64], bytes: &mut [u8]) {
    let (whole, rest) = bytes.as_chunks_mut::<WORD_BYTES>();
    let words_left = words.get(whole.len());
    for (word, bytes) in words.iter().zip(whole) {
        *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
    }
    if let Some(word) = words_left {
        let last = word.load(Ordering::Relaxed).to_ne_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}
