//! Meeting points of threads and processes, as pure algorithms over atomics: no waiting, no wake-up and no memory of
//! their own.
//!
//! Whoever embeds one brings the memory and the way to sleep (a futex, a `Waker`, a condition variable). That is what
//! lets the same code run under a model checker: with `--cfg polyfork_loom` the atomics are loom's, with
//! `--cfg polyfork_shuttle` shuttle's, and otherwise the standard library's.
//!
//! The queue under a message [`port`] is more: it holds the messages, behind a lock that is held for a few instructions.
//!
//! Surprising: the configuration flags carry our name, because `--cfg loom` would change tokio as well.

#[cfg(not(any(polyfork_loom, polyfork_shuttle)))]
pub use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(polyfork_loom)]
pub use loom::sync::{Mutex, MutexGuard, atomic};

#[cfg(polyfork_shuttle)]
pub use shuttle::sync::{Mutex, MutexGuard, atomic};

pub mod lease;
pub mod pool;
pub mod port;
pub mod ring;
pub mod seq;

/// Takes a lock, also when a thread panicked while it held it: what we guard is consistent between any two statements
/// that can panic, so one thread's panic is no reason for another's.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
