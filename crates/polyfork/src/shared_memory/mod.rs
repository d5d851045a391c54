//! Memory that threads and processes share, and waiting in it (Node: `SharedArrayBuffer`, `Atomics`).
//!
//! A [`SharedArrayBuffer`] is bytes; a [`View`] makes them a slice of the standard library's atomics; [`Atomics`] adds
//! waiting and notifying. Past Node, all of it works between processes: send the buffer over a native
//! [`channel`](crate::channel), and both ends see the same bytes and can wait for each other.
//!
//! | for | take |
//! | --- | --- |
//! | counters, flags, numbers | a [`View`] and its atomics |
//! | waiting until a number changes | [`Atomics`] |
//! | a value of several words, written by one, read by many | [`SeqCell`] |
//! | one at a time, also when one dies | [`SharedMutex`] |
//! | bytes from one to another | [`ring`] |
//! | messages from one to another | a [`channel`](crate::channel), which uses a ring by itself |
//!
//! ```
//! use std::sync::atomic::Ordering::SeqCst;
//!
//! use polyfork::shared_memory::{Atomics, SharedArrayBuffer, WaitOutcome};
//!
//! let buffer = SharedArrayBuffer::new(1024)?;
//! let numbers = buffer.i32()?;
//! let theirs = numbers.clone();
//! let other = std::thread::spawn(move || {
//!     theirs[0].store(42, SeqCst);
//!     theirs.notify(0, 1)
//! });
//! while numbers[0].load(SeqCst) == 0 {
//!     assert_ne!(numbers.wait(0, 0, None), WaitOutcome::TimedOut);
//! }
//! assert_eq!(numbers[0].load(SeqCst), 42);
//! # other.join().unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The rule that surprises: what is read from shared memory is input, like what is read from a socket. The other
//! process can have written anything, at any time. It cannot make the memory shorter or take it away, which is why
//! only memory that is sealed against that is accepted.
//!
//! Behaviour follows: ECMA-262 "Atomics" and "SharedArrayBuffer", futex(7), memfd_create(2).

mod atomics;
mod mutex;
pub mod ring;
mod seq_cell;
mod waiter;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{
    AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering,
};

pub use atomics::{Atomics, WaitOutcome, Waiting};
pub use mutex::{SharedMutex, SharedMutexGuard};
use polyfork_sys::memory::Memory;
pub use polyfork_sys::memory::{MemoryError, View, ViewError, Word};
pub use seq_cell::{BeingWritten, SeqCell};

/// The longest buffer that is taken from another process when nothing else is said: 1 GiB. Of a growable one it
/// is what it can grow to.
pub const MOST_RECEIVED_BYTES: usize = 1 << 30;

/// Bytes that several threads and processes share. Clones are the same bytes.
///
/// The space is reserved when the buffer is made: a machine or control group that has not enough is an error of
/// [`new`](Self::new), and nothing later. The memory is free again when nobody has it any more, in any process, also
/// when processes were killed.
///
/// Costs one descriptor per process and buffer.
#[derive(Clone, Debug)]
pub struct SharedArrayBuffer(Memory);

impl SharedArrayBuffer {
    /// A buffer of this many bytes, all zero.
    ///
    /// # Errors
    /// [`MemoryError`]: not enough memory, or no descriptors left.
    pub fn new(length: usize) -> Result<Self, MemoryError> {
        Memory::create(length).map(Self)
    }

    /// A buffer that can [grow](Self::grow) up to `most` bytes (Node: `maxByteLength`). Address space for these is set
    /// aside in each process that has it, memory only for what it has grown to.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn growable(length: usize, most: usize) -> Result<Self, MemoryError> {
        Memory::growable(length, most).map(Self)
    }

    /// A buffer that another process made and whose descriptor came in some other way than over a
    /// [`channel`](crate::channel), if it is at most `limit` bytes.
    ///
    /// # Errors
    /// [`MemoryError::Foreign`] for everything that is not a memfd whose seals say that it cannot be shrunk and that this
    /// cannot be undone; [`MemoryError::TooLong`].
    pub fn from_fd(descriptor: OwnedFd, limit: usize) -> Result<Self, MemoryError> {
        Self::adopt(descriptor, limit).map_err(|(error, _)| error)
    }

    /// [`from_fd`](Self::from_fd) that gives the descriptor back.
    pub(crate) fn adopt(descriptor: OwnedFd, limit: usize) -> Result<Self, (MemoryError, OwnedFd)> {
        Memory::adopt(descriptor, limit).map(Self)
    }

    /// Its length in bytes. Of a growable one it may be more the next time.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The length it can grow to; of other buffers its length (Node: `maxByteLength`).
    pub fn max_len(&self) -> usize {
        self.0.max_len()
    }

    /// Whether it can grow.
    pub fn is_growable(&self) -> bool {
        self.0.is_growable()
    }

    /// Makes it at least `length` bytes long, for everybody. Views keep their length; make new ones for the new bytes,
    /// which are zero.
    ///
    /// # Errors
    /// [`MemoryError::Fixed`] for a buffer that cannot grow, [`TooLong`](MemoryError::TooLong) above its maximum,
    /// [`Reserve`](MemoryError::Reserve) when there is not enough memory.
    pub fn grow(&self, length: usize) -> Result<(), MemoryError> {
        self.0.grow(length)
    }

    /// Whether both are the same memory, however it came here.
    pub fn is_same(&self, other: &SharedArrayBuffer) -> bool {
        self.0.is_same(&other.0)
    }

    /// The `count` words of type `T` from byte `start` on.
    ///
    /// # Errors
    /// [`ViewError::Outside`] and [`Unaligned`](ViewError::Unaligned); [`OtherWidth`](ViewError::OtherWidth) while some
    /// of these bytes are viewed as words of another width in this process: accesses of different widths to the
    /// same byte have no meaning in Rust, unlike in JavaScript.
    pub fn view<T: Word>(&self, start: usize, count: usize) -> Result<View<T>, ViewError> {
        self.0.view(start, count)
    }

    fn whole<T: Word>(&self) -> Result<View<T>, ViewError> {
        self.view(0, self.len() / T::BYTES)
    }
}

macro_rules! whole {
    ($($name:ident: $atomic:ty, $node:literal;)+) => {
        impl SharedArrayBuffer {$(
            #[doc = concat!("All of it as [`", stringify!($atomic), "`]s (Node: `", $node, "`), as many as fit.")]
            ///
            /// # Errors
            /// [`ViewError::OtherWidth`]; see [`view`](Self::view).
            pub fn $name(&self) -> Result<View<$atomic>, ViewError> {
                self.whole()
            }
        )+}
    };
}

whole! {
    u8: AtomicU8, "Uint8Array";
    i8: AtomicI8, "Int8Array";
    u16: AtomicU16, "Uint16Array";
    i16: AtomicI16, "Int16Array";
    u32: AtomicU32, "Uint32Array";
    i32: AtomicI32, "Int32Array";
    u64: AtomicU64, "BigUint64Array";
    i64: AtomicI64, "BigInt64Array";
}

impl AsFd for SharedArrayBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// [`SharedArrayBuffer::from_fd`] with a limit of [`MOST_RECEIVED_BYTES`].
impl TryFrom<OwnedFd> for SharedArrayBuffer {
    type Error = MemoryError;

    fn try_from(descriptor: OwnedFd) -> Result<Self, MemoryError> {
        Self::from_fd(descriptor, MOST_RECEIVED_BYTES)
    }
}

/// Reads a word as the bits of a floating-point number (Node: `Float64Array`, which has no `Atomics`).
pub fn load_f64(word: &AtomicU64, order: Ordering) -> f64 {
    f64::from_bits(word.load(order))
}

/// Writes a floating-point number as the bits of a word.
pub fn store_f64(word: &AtomicU64, number: f64, order: Ordering) {
    word.store(number.to_bits(), order);
}
