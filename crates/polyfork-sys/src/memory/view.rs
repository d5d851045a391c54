//! Views of shared memory: slices of atomics of one width.
//!
//! Which bytes are viewed in which width is kept here, the memory itself by the parent module.
//!
//! The surprising rule: bytes that are viewed in one width cannot be viewed in another at the same time, in this
//! mapping. Rust has no meaning for two atomic accesses of different sizes to the same byte that are not
//! ordered; so the second view is refused until the last of the first is dropped. (Another process can do as it likes.
//! That is no access of this program.)
//!
//! Source: the section "Memory model for atomic accesses" of `std::sync::atomic`.

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{
    AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Mapping, Memory};

/// The atomic integers that shared memory can be viewed as.
pub trait Word: sealed::Sealed + Send + Sync + 'static {
    /// Bytes of one.
    const BYTES: usize;
}

mod sealed {
    /// Only for types of which every bit pattern is a value and which have no padding.
    pub trait Sealed {}
}

macro_rules! words {
    ($($atomic:ty),+) => {$(
        impl sealed::Sealed for $atomic {}
        impl Word for $atomic {
            const BYTES: usize = size_of::<$atomic>();
        }
    )+};
}

words!(AtomicU8, AtomicI8, AtomicU16, AtomicI16, AtomicU32, AtomicI32, AtomicU64, AtomicI64);

/// A part of shared memory as a slice of atomics. It keeps the memory; clones are cheap.
pub struct View<T: Word> {
    first: NonNull<T>,
    count: usize,
    claim: Arc<Claim>,
}

// SAFETY: it is a shared reference to a slice of atomics, together with its owner, both of which are `Send`.
unsafe impl<T: Word> Send for View<T> {}
// SAFETY: as above, and both are `Sync`.
unsafe impl<T: Word> Sync for View<T> {}

/// Why there is no such view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// It would reach beyond the end.
    #[error("bytes {start} to {end} are not within shared memory of {length} bytes")]
    Outside {
        /// The first byte.
        start: usize,
        /// One past the last; the largest number when there is no such number.
        end: usize,
        /// How long the memory is.
        length: usize,
    },
    /// It does not begin at a multiple of the width.
    #[error("byte {start} is not at a multiple of {width} bytes")]
    Unaligned {
        /// The first byte.
        start: usize,
        /// The width, in bytes.
        width: usize,
    },
    /// Some of the bytes are being viewed in another width.
    #[error("bytes {start} to {end} are in use as words of {width} bytes")]
    OtherWidth {
        /// The first byte of what is in use.
        start: usize,
        /// One past its last.
        end: usize,
        /// The width in which it is in use.
        width: usize,
    },
}

impl Memory {
    /// The `count` words from byte `start` on.
    ///
    /// # Errors
    ///
    /// [`ViewError`].
    pub fn view<T: Word>(&self, start: usize, count: usize) -> Result<View<T>, ViewError> {
        if !start.is_multiple_of(T::BYTES) {
            return Err(ViewError::Unaligned { start, width: T::BYTES });
        }
        let end = count.checked_mul(T::BYTES).and_then(|bytes| bytes.checked_add(start));
        let end = end.unwrap_or(usize::MAX);
        let length = self.len();
        if end > length {
            return Err(ViewError::Outside { start, end, length });
        }
        let mapping = Arc::clone(self.mapping());
        // SAFETY: `start` is within the mapping, whose length is at least that of the memory, or one past it.
        let first = unsafe { mapping.base.add(start) }.cast();
        let claim = Claim::new(mapping, Range { start, end, width: T::BYTES })?;
        Ok(View { first, count, claim: Arc::new(claim) })
    }
}

impl<T: Word> View<T> {
    /// The memory it is of.
    pub fn memory(&self) -> Memory {
        Memory(Arc::clone(&self.claim.mapping))
    }

    /// The byte of the memory at which it begins.
    pub fn start(&self) -> usize {
        self.claim.range.start
    }
}

impl<T: Word> Deref for View<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the range is mapped for as long as the claim holds the mapping, was within the length of the
        // file when the view was made, and the file cannot become shorter; it is aligned, as the mapping begins at
        // a page and the range at a multiple of the width; every bit pattern is a value; and in this mapping
        // its bytes are used as atomics of this width alone, as the claim says.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl<T: Word> AsRef<[T]> for View<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: Word> Clone for View<T> {
    fn clone(&self) -> Self {
        View { first: self.first, count: self.count, claim: Arc::clone(&self.claim) }
    }
}

impl<T: Word> fmt::Debug for View<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end, width } = self.claim.range;
        write!(f, "View(bytes {start}..{end} as words of {width})")
    }
}

/// Bytes and the width in which they are viewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: usize,
    end: usize,
    width: usize,
}

impl Range {
    fn clashes(&self, other: &Range) -> bool {
        self.width != other.width && self.start < other.end && other.start < self.end
    }
}

/// Who views what. The lock orders the end of one view before the begin of the next.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<Vec<Range>>);

impl Claims {
    fn lock(&self) -> MutexGuard<'_, Vec<Range>> {
        // Nothing in here is ever half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Claim {
    mapping: Arc<Mapping>,
    range: Range,
}

impl Claim {
    fn new(mapping: Arc<Mapping>, range: Range) -> Result<Claim, ViewError> {
        let mut claims = mapping.claims.lock();
        if let Some(Range { start, end, width }) =
            claims.iter().find(|other| other.clashes(&range)).copied()
        {
            return Err(ViewError::OtherWidth { start, end, width });
        }
        claims.push(range);
        drop(claims);
        Ok(Claim { mapping, range })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.mapping.claims.lock();
        if let Some(at) = claims.iter().position(|range| *range == self.range) {
            claims.swap_remove(at);
        }
    }
}
