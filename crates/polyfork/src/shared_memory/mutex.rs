//! A lock between processes that survives the death of its holder.
//!
//! The algorithm is in `polyfork_core::sync::lease`; here are its words in a buffer, sleeping, and finding out who
//! is dead: the lock holds the process id and the start time of its holder, and who waits looks five times a second whether
//! there still is such a process.
//!
//! Why not `PTHREAD_MUTEX_ROBUST`: its list of held locks lies in memory that hostile peers could write, and the kernel follows it.
//!
//! The rule that surprises: it guards nothing by itself. What it stands for is whatever words the processes agree on; they
//! are atomics and can be touched without it.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use polyfork_core::sync::lease::{Attempt, Lease};
use polyfork_sys::{futex, system};
use rustix::process::Pid;

use super::{SharedArrayBuffer, View, ViewError};

/// How long a waiter sleeps before it looks whether the holder is still there.
const LOOK: Duration = Duration::from_millis(200);
/// Process ids take so many bits at most (`PID_MAX_LIMIT`), and the start time has the rest.
const PID_BITS: u32 = 22;
const WORDS: usize = 3;

/// A lock in shared memory, for threads of any number of processes. Clones are the same lock.
///
/// Takes [`BYTES`](Self::BYTES) bytes, which must be zero to begin with. All processes must be in one pid namespace: a
/// holder in another looks as if it were dead.
///
/// When a process dies while it holds the lock, the first who waits gets it within 200 ms, and is told
/// ([`SharedMutexGuard::is_inconsistent`]): what the lock stands for may be half done.
///
/// ```
/// use std::sync::atomic::Ordering::Relaxed;
///
/// use polyfork::shared_memory::{SharedArrayBuffer, SharedMutex};
///
/// let buffer = SharedArrayBuffer::new(4096)?;
/// let lock = SharedMutex::new(&buffer, 0)?;
/// let pair = buffer.view::<std::sync::atomic::AtomicU64>(64, 2)?;
/// {
///     let guard = lock.lock();
///     if guard.is_inconsistent() {
///         pair[1].store(pair[0].load(Relaxed), Relaxed);
///         guard.set_consistent();
///     }
///     pair[0].fetch_add(1, Relaxed);
///     pair[1].fetch_add(1, Relaxed);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SharedMutex {
    owner: View<AtomicU64>,
    words: View<AtomicU32>,
}

impl SharedMutex {
    /// How many bytes it takes.
    pub const BYTES: usize = 24;

    /// The lock that begins at byte `start` of the buffer, a multiple of 8.
    ///
    /// # Errors
    /// [`ViewError`].
    pub fn new(buffer: &SharedArrayBuffer, start: usize) -> Result<Self, ViewError> {
        let owner = buffer.view(start, 1)?;
        let words = buffer.view(start + size_of::<u64>(), WORDS)?;
        Ok(Self { owner, words })
    }

    /// Takes the lock; `None` when somebody else has it, dead or alive.
    pub fn try_lock(&self) -> Option<SharedMutexGuard<'_>> {
        self.lease().try_lock(me()).then(|| SharedMutexGuard(self))
    }

    /// Takes the lock, waiting for it as long as it takes.
    ///
    /// # Blocking
    /// Blocks the thread. A thread that holds it already waits for itself, for ever.
    pub fn lock(&self) -> SharedMutexGuard<'_> {
        loop {
            if let Some(guard) = self.lock_within(Duration::MAX) {
                return guard;
            }
        }
    }

    /// Takes the lock, waiting for it at most for so long.
    ///
    /// # Blocking
    /// As [`lock`](Self::lock).
    pub fn lock_within(&self, limit: Duration) -> Option<SharedMutexGuard<'_>> {
        if let Some(guard) = self.try_lock() {
            return Some(guard);
        }
        let end = Instant::now().checked_add(limit);
        loop {
            let Attempt::Wait { bell, owner } = self.lease().attempt(me()) else {
                return Some(SharedMutexGuard(self));
            };
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let step = left.map_or(LOOK, |left| left.min(LOOK));
            let waited = futex::wait(&self.words[0], bell, Some(step));
            if waited == futex::Waited::TimedOut
                && !lives(owner)
                && self.lease().take_over(owner, me())
            {
                return Some(SharedMutexGuard(self));
            }
        }
    }

    fn lease(&self) -> Lease<'_> {
        let [bell, waiting, broken] = &self.words[..] else { unreachable!("there are three") };
        Lease { owner: &self.owner[0], bell, waiting, broken }
    }
}

impl fmt::Debug for SharedMutex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = self.owner[0].load(Ordering::Relaxed);
        let holder = (owner != 0).then_some(owner & ((1 << PID_BITS) - 1));
        f.debug_struct("SharedMutex").field("holder", &holder).finish_non_exhaustive()
    }
}

/// Has the lock until it is dropped, also by a panic.
#[must_use = "the lock is let go when it is dropped"]
#[derive(Debug)]
pub struct SharedMutexGuard<'a>(&'a SharedMutex);

impl SharedMutexGuard<'_> {
    /// Whether a process died with the lock, or a thread panicked, and nobody has put in order since what it stands for.
    pub fn is_inconsistent(&self) -> bool {
        self.0.lease().broken.load(Ordering::Relaxed) != 0
    }

    /// Says that what the lock stands for is in order.
    pub fn set_consistent(&self) {
        self.0.lease().broken.store(0, Ordering::Relaxed);
    }
}

impl Drop for SharedMutexGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lease().broken.store(1, Ordering::Relaxed);
        }
        if self.0.lease().unlock(me()) {
            futex::wake(&self.0.words[0], 1);
        }
    }
}

/// This process, as it stands in a lock.
fn me() -> u64 {
    static ME: OnceLock<u64> = OnceLock::new();
    *ME.get_or_init(|| {
        let pid = rustix::process::getpid();
        // Without /proc nobody can be found out to be dead either.
        named(pid, system::started_at(pid).unwrap_or(0))
    })
}

fn named(pid: Pid, started: u64) -> u64 {
    started << PID_BITS | u64::from(pid.as_raw_nonzero().get().unsigned_abs())
}

/// Whether the process lives that has this name.
fn lives(owner: u64) -> bool {
    if owner == me() {
        return true;
    }
    let pid = i32::try_from(owner & ((1 << PID_BITS) - 1)).ok().and_then(Pid::from_raw);
    // A number that names nobody was written by somebody who does not keep the rules.
    let started = pid.and_then(system::started_at);
    started.is_some_and(|started| owner >> PID_BITS == started)
}
