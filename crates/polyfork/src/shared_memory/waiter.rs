//! Threads that sleep in the kernel on behalf of futures.
//!
//! Each runs one wait at a time and stays for a while, in case another one follows. What they wait for is in `atomics`.
//!
//! Why a thread each: the kernel can wait for many words at once, but tells only one of those that were
//! notified, so the notifications of the others would be lost.
//!
//! The rule that surprises: a thread counts as free only until somebody means to use it, not until it has begun, so
//! two waits never line up behind each other.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most waits that are pending in this process.
const MOST_THREADS: usize = 1024;
/// How long a thread waits for more to do.
const STAY: Duration = Duration::from_secs(5);
/// They call one function.
const STACK_BYTES: usize = 128 << 10;

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    queue: VecDeque<Job>,
    threads: usize,
    /// Threads that wait, less those that are meant for what is queued.
    free: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { queue: VecDeque::new(), threads: 0, free: 0 });
static MORE: Condvar = Condvar::new();

/// Runs `job` at once in a thread of its own.
///
/// # Errors
/// `QuotaExceeded` when 1,024 are pending; those of starting a thread.
pub(super) fn run(job: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut pool = lock();
    if pool.free > 0 {
        pool.free -= 1;
        pool.queue.push_back(Box::new(job));
        MORE.notify_one();
        return Ok(());
    }
    if pool.threads >= MOST_THREADS {
        let text = format!("{MOST_THREADS} waits are pending in this process, which is the limit");
        return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
    }
    let named = std::thread::Builder::new().name("polyfork-wait".to_owned());
    named.stack_size(STACK_BYTES).spawn(move || work(Box::new(job)))?;
    pool.threads += 1;
    Ok(())
}

fn work(first: Job) {
    first();
    let mut pool = lock();
    pool.free += 1;
    loop {
        if let Some(job) = pool.queue.pop_front() {
            drop(pool);
            job();
            pool = lock();
            pool.free += 1;
            continue;
        }
        let (waited, timeout) =
            MORE.wait_timeout(pool, STAY).unwrap_or_else(PoisonError::into_inner);
        pool = waited;
        if timeout.timed_out() && pool.queue.is_empty() {
            pool.free -= 1;
            pool.threads -= 1;
            return;
        }
    }
}

fn lock() -> MutexGuard<'static, Pool> {
    // Nothing in here is ever half done, and jobs run without the lock.
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}
