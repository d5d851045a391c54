//! Waiting on a word of shared memory until another process says so.
//!
//! Wait, wake, and a wait that can be called off. What the word means is the business of the callers, and memory
//! that several processes have is in [`crate::memory`].
//!
//! The surprising rule: a wait that a signal interrupts goes on with what is left of its time, so "timed out" means
//! that the whole time has passed. Whether it was woken or the word merely looked so is not told apart: the kernel may
//! wake a waiter for reasons of its own, which is why callers look at their word again.
//!
//! Behaviour follows: futex(2), futex(7), Linux `Documentation/userspace-api/futex2.rst`.

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::futex::{self as raw, Flags, Wait, WaitFlags, WaitPtr, WaitvFlags};
use rustix::time::{ClockId, Timespec, clock_gettime};

/// How often a wait that cannot be called off in the kernel looks whether it was.
const LOOK: Duration = Duration::from_millis(20);

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Waited {
    /// Somebody woke it.
    Woken,
    /// The word had another value to begin with.
    NotEqual,
    /// The time has passed.
    TimedOut,
    /// It was [called off](Cancel::cancel). Never so when it was woken.
    Cancelled,
}

/// The words that the kernel can wait on.
pub trait FutexWord: sealed::Sealed {
    /// The same word, without a sign.
    fn as_u32(&self) -> &AtomicU32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::AtomicU32 {}
    impl Sealed for super::AtomicI32 {}
}

impl FutexWord for AtomicU32 {
    fn as_u32(&self) -> &AtomicU32 {
        self
    }
}

impl FutexWord for AtomicI32 {
    fn as_u32(&self) -> &AtomicU32 {
        // SAFETY: the pointer comes from a reference that lives as long as the result, both types have the size and
        // alignment of 32 bits, and every access through either is atomic and of that width.
        unsafe { AtomicU32::from_ptr(self.as_ptr().cast()) }
    }
}

/// Waits while `word` is `expected`, at most for `limit`, until [`wake`] is called for it in any process that has
/// the memory. The clock is the monotonic one.
///
/// Comparing and going to sleep are one step: no wake-up that follows a change of the word is lost.
pub fn wait(word: &impl FutexWord, expected: u32, limit: Option<Duration>) -> Waited {
    let word = word.as_u32();
    let end = limit.map(|limit| Instant::now().checked_add(limit));
    loop {
        let left = match end {
            None | Some(None) => None,
            Some(Some(end)) => {
                let left = end.saturating_duration_since(Instant::now());
                Some(timespec(left))
            }
        };
        match raw::wait(word, Flags::empty(), expected, left.as_ref()) {
            Ok(()) => return Waited::Woken,
            Err(Errno::AGAIN) => return Waited::NotEqual,
            Err(Errno::TIMEDOUT) => return Waited::TimedOut,
            Err(Errno::INTR) => {}
            // A reference is never outside of memory, nor unaligned. Should the kernel have no futexes, a waiter
            // that finds its word unchanged tries again.
            Err(_) => return Waited::Woken,
        }
    }
}

/// Wakes at most `most` waiters on `word`, in all processes; returns how many.
pub fn wake(word: &impl FutexWord, most: u32) -> usize {
    // The kernel takes a signed number, and wakes one for zero.
    if most == 0 {
        return 0;
    }
    raw::wake(word.as_u32(), Flags::empty(), most.min(i32::MAX as u32)).unwrap_or(0)
}

/// Calls off a [`wait_or_cancel`]. For this process alone.
#[derive(Debug, Default)]
pub struct Cancel(AtomicU32);

impl Cancel {
    /// Not called off.
    #[must_use]
    pub const fn new() -> Cancel {
        Cancel(AtomicU32::new(0))
    }

    /// Ends every wait with it, now and later.
    pub fn cancel(&self) {
        self.0.store(1, Ordering::SeqCst);
        let _woken = raw::wake(&self.0, Flags::PRIVATE, i32::MAX as u32);
    }

    /// Whether it was called off.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }
}

/// [`wait`] that another thread can end.
///
/// A wake-up that was meant for it is never swallowed: woken and called off at once counts as woken.
/// Before Linux 5.16 being called off takes up to 20 ms.
pub fn wait_or_cancel(
    word: &impl FutexWord,
    expected: u32,
    limit: Option<Duration>,
    cancel: &Cancel,
) -> Waited {
    let word = word.as_u32();
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    // The kernel tells the last of those that were woken.
    let waiters = [waiter(&cancel.0, 0, true), waiter(word, expected, false)];
    loop {
        let until = end.map(|end| from_now(end.saturating_duration_since(Instant::now())));
        let flags = WaitvFlags::empty();
        match raw::waitv(&waiters, flags, until.as_ref(), ClockId::Monotonic) {
            Ok(0) => return Waited::Cancelled,
            Ok(_) => return Waited::Woken,
            Err(Errno::AGAIN) => {
                // One of the two words was not as expected, if only for a moment.
                let unchanged = word.load(Ordering::SeqCst) == expected;
                return if unchanged && cancel.is_cancelled() {
                    Waited::Cancelled
                } else {
                    Waited::NotEqual
                };
            }
            Err(Errno::TIMEDOUT) => return Waited::TimedOut,
            Err(Errno::INTR) => {}
            Err(_) => return wait_in_steps(word, expected, end, cancel),
        }
    }
}

/// For kernels that cannot wait for two words.
fn wait_in_steps(word: &AtomicU32, expected: u32, end: Option<Instant>, cancel: &Cancel) -> Waited {
    while !cancel.is_cancelled() {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let step = left.map_or(LOOK, |left| left.min(LOOK));
        match wait(word, expected, Some(step)) {
            Waited::TimedOut if left.is_none_or(|left| left > step) => {}
            waited => return waited,
        }
    }
    Waited::Cancelled
}

fn waiter(word: &AtomicU32, expected: u32, private: bool) -> Wait {
    let mut wait = Wait::new();
    wait.val = expected.into();
    wait.uaddr = WaitPtr::new(word.as_ptr().cast());
    wait.flags = WaitFlags::SIZE_U32;
    if private {
        wait.flags |= WaitFlags::PRIVATE;
    }
    wait
}

fn timespec(duration: Duration) -> Timespec {
    let tv_sec = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: duration.subsec_nanos().into() }
}

/// The time of the kernel's monotonic clock after so long.
fn from_now(duration: Duration) -> Timespec {
    let now = clock_gettime(ClockId::Monotonic);
    let nanos = now.tv_nsec + i64::from(duration.subsec_nanos());
    let carried = nanos / 1_000_000_000;
    let secs = timespec(duration).tv_sec;
    Timespec {
        tv_sec: now.tv_sec.saturating_add(secs).saturating_add(carried),
        tv_nsec: nanos % 1_000_000_000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn value_that_differs_is_told_at_once() {
        let word = AtomicU32::new(1);
        assert_eq!(wait(&word, 0, None), Waited::NotEqual);
        assert_eq!(wait_or_cancel(&word, 0, None, &Cancel::new()), Waited::NotEqual);
    }

    #[test]
    fn whole_time_passes_before_a_wait_times_out() {
        let word = AtomicU32::new(0);
        let limit = Duration::from_millis(20);
        let start = Instant::now();
        assert_eq!(wait(&word, 0, Some(limit)), Waited::TimedOut);
        assert!(start.elapsed() >= limit);
        let start = Instant::now();
        assert_eq!(wait_or_cancel(&word, 0, Some(limit), &Cancel::new()), Waited::TimedOut);
        assert!(start.elapsed() >= limit);
        assert_eq!(wait(&word, 0, Some(Duration::ZERO)), Waited::TimedOut);
    }

    #[test]
    fn exactly_as_many_waiters_are_woken_as_wanted() {
        let word = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..3)
                .map(|odd| {
                    let word = &word;
                    scope.spawn(move || match odd {
                        1 => wait_or_cancel(word, 0, Some(LONG), &Cancel::new()),
                        _ => wait(word, 0, Some(LONG)),
                    })
                })
                .collect();
            let mut woken = 0;
            while woken < 2 {
                woken += wake(&word, 2 - woken as u32);
                std::thread::yield_now();
            }
            while woken < 3 {
                woken += wake(&word, u32::MAX);
                std::thread::yield_now();
            }
            for waiter in waiting {
                assert_eq!(waiter.join().expect("no panic"), Waited::Woken);
            }
        });
        assert_eq!(wake(&word, u32::MAX), 0);
        assert_eq!(wake(&word, 0), 0);
    }

    #[test]
    fn called_off_wait_ends_before_and_after_it_began() {
        let word = AtomicU32::new(0);
        let cancel = Cancel::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_or_cancel(&word, 0, Some(LONG), &cancel));
            std::thread::sleep(Duration::from_millis(5));
            cancel.cancel();
            assert_eq!(waiting.join().expect("no panic"), Waited::Cancelled);
        });
        assert_eq!(wait_or_cancel(&word, 0, None, &cancel), Waited::Cancelled);
        assert_eq!(wait_in_steps(&word, 0, None, &cancel), Waited::Cancelled);
        let cancel = Cancel::new();
        let soon = Instant::now() + LOOK * 2;
        assert_eq!(wait_in_steps(&word, 0, Some(soon), &cancel), Waited::TimedOut);
    }
}
