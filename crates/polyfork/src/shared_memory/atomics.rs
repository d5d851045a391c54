//! Waiting on a word, and telling who waits (Node: `Atomics.wait`, `Atomics.waitAsync`, `Atomics.notify`).
//!
//! Reading and writing are methods of the atomics themselves. The system call is in `polyfork_sys::futex`, threads that
//! wait for a future in `waiter`.
//!
//! The rule that surprises: only words of 32 bits can be waited on. Linux has no wait on 64, and waiting on half
//! of a word would miss changes of the other.
//!
//! Behaviour follows: ECMA-262 `Atomics.wait`, `Atomics.notify`; futex(2).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use polyfork_sys::futex::{self, Cancel, FutexWord, Waited};
use tokio::sync::oneshot;

use super::waiter;
use super::{View, Word};

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WaitOutcome {
    /// Somebody notified, or the kernel woke the waiter for a reason of its own (Node: `"ok"`). Look at the word.
    Ok,
    /// The word had another value to begin with (Node: `"not-equal"`).
    NotEqual,
    /// Nobody notified in time (Node: `"timed-out"`).
    TimedOut,
}

/// Waiting and notifying, for views of 32-bit words.
///
/// All processes that have the memory take part. A waiter is told once, in no particular order.
pub trait Atomics: sealed::Sealed {
    /// The value of a word.
    type Value;

    /// Waits while the word is `expected`, at most for `limit` (Node: `Atomics.wait`).
    ///
    /// Comparing and going to sleep are one step, so whoever changes the word and then notifies reaches
    /// everybody who waits for the old value.
    ///
    /// # Blocking
    /// Blocks the thread: in async code use [`wait_async`](Self::wait_async).
    ///
    /// # Panics
    /// When there is no word `index`.
    fn wait(&self, index: usize, expected: Self::Value, limit: Option<Duration>) -> WaitOutcome;

    /// Waits without blocking (Node: `Atomics.waitAsync`). Begins at once, not when it is polled; dropping it
    /// ends it, and a notification that it has used up by then is passed on.
    ///
    /// A thread of its own waits for each one that is pending, 1,024 at most in a process; needs no runtime. As that
    /// thread takes a moment to go to sleep, change the word before you notify: then the outcome is either
    /// `Ok` or `NotEqual`. A notification without a change may come too early.
    ///
    /// The future is an error when there are too many, or no thread can be started.
    ///
    /// # Panics
    /// When there is no word `index`.
    fn wait_async(&self, index: usize, expected: Self::Value, limit: Option<Duration>) -> Waiting;

    /// Wakes at most `most` of those who wait on the word, in all processes; returns how many (Node:
    /// `Atomics.notify`). [`u32::MAX`] for all.
    ///
    /// # Panics
    /// When there is no word `index`.
    fn notify(&self, index: usize, most: u32) -> usize;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! atomics {
    ($($atomic:ty: $value:ty),+) => {$(
        impl sealed::Sealed for View<$atomic> {}
        impl Atomics for View<$atomic> {
            type Value = $value;

            fn wait(&self, index: usize, expected: $value, limit: Option<Duration>) -> WaitOutcome {
                outcome(futex::wait(&self[index], expected.cast_unsigned_32(), limit))
            }

            fn wait_async(
                &self,
                index: usize,
                expected: $value,
                limit: Option<Duration>,
            ) -> Waiting {
                Waiting::begin(self, index, expected.cast_unsigned_32(), limit)
            }

            fn notify(&self, index: usize, most: u32) -> usize {
                futex::wake(&self[index], most)
            }
        }
    )+};
}

atomics!(AtomicU32: u32, AtomicI32: i32);

trait Bits {
    fn cast_unsigned_32(self) -> u32;
}

impl Bits for u32 {
    fn cast_unsigned_32(self) -> u32 {
        self
    }
}

impl Bits for i32 {
    fn cast_unsigned_32(self) -> u32 {
        self.cast_unsigned()
    }
}

fn outcome(waited: Waited) -> WaitOutcome {
    match waited {
        Waited::Woken => WaitOutcome::Ok,
        Waited::NotEqual => WaitOutcome::NotEqual,
        Waited::TimedOut | Waited::Cancelled => WaitOutcome::TimedOut,
    }
}

/// A wait that goes on in the background; see [`Atomics::wait_async`].
#[must_use = "a wait ends when it is dropped"]
pub struct Waiting {
    state: State,
    cancel: Arc<Cancel>,
    /// Tells another waiter instead of this one.
    pass_on: Box<dyn Fn() + Send + Sync>,
}

enum State {
    Done(Option<io::Result<WaitOutcome>>),
    Pending(oneshot::Receiver<WaitOutcome>),
}

impl Waiting {
    fn begin<T: Word + FutexWord>(
        view: &View<T>,
        index: usize,
        expected: u32,
        limit: Option<Duration>,
    ) -> Waiting {
        let cancel = Arc::new(Cancel::new());
        let pass_on = {
            let view = view.clone();
            Box::new(move || {
                futex::wake(&view[index], 1);
            })
        };
        let done = |result| State::Done(Some(result));
        let state = if view[index].as_u32().load(Ordering::SeqCst) != expected {
            done(Ok(WaitOutcome::NotEqual))
        } else {
            let (tell, told) = oneshot::channel();
            let (view, called_off) = (view.clone(), Arc::clone(&cancel));
            let started = waiter::run(move || {
                let waited = futex::wait_or_cancel(&view[index], expected, limit, &called_off);
                if tell.send(outcome(waited)).is_err() && waited == Waited::Woken {
                    futex::wake(&view[index], 1);
                }
            });
            match started {
                Ok(()) => State::Pending(told),
                Err(error) => done(Err(error)),
            }
        };
        Waiting { state, cancel, pass_on }
    }
}

impl Future for Waiting {
    type Output = io::Result<WaitOutcome>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = match &mut self.state {
            State::Done(result) => result.take().expect("polled after it was ready"),
            State::Pending(told) => match Pin::new(told).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(told) => told.map_err(|_| io::Error::other("the waiting thread ended")),
            },
        };
        self.state = State::Done(None);
        Poll::Ready(result)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let State::Pending(told) = &mut self.state else { return };
        self.cancel.cancel();
        // From here on the thread keeps what it is told, and passes it on itself.
        told.close();
        if told.try_recv() == Ok(WaitOutcome::Ok) {
            (self.pass_on)();
        }
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.state {
            State::Done(_) => "Waiting(done)",
            State::Pending(_) => "Waiting(pending)",
        })
    }
}
