//! A thread that waits for a future, without a runtime.
//!
//! Every blocking form in this module is its async form, waited for here, after a few looks without sleeping: two
//! threads that answer each other are far quicker than the system can put one to sleep and wake it.
//!
//! The rule that surprises: a wake-up that nobody waits for any more stays with the thread and makes its next wait
//! look once too often. Nothing else.

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

struct Parker {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.thread.unpark();
        }
    }
}

fn parker() -> (Arc<Parker>, Waker) {
    let parker = Arc::new(Parker { thread: thread::current(), woken: AtomicBool::new(false) });
    (Arc::clone(&parker), Waker::from(parker))
}

thread_local! {
    static OWN: RefCell<(Arc<Parker>, Waker)> = RefCell::new(parker());
}

/// How long to look before one sleeps: the whole takes about as long as the system takes to wake a thread.
///
/// Few pauses and many offers of the processor, because the one we wait for may be waiting for this very processor: then
/// every pause delays it, and an offer lets it run at once. If it runs elsewhere, an offer costs little more than a pause.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Looks with a pause of the processor before each.
    pauses: u32,
    /// Then looks with the processor offered to others before each.
    offers: u32,
}

impl Patience {
    /// For a thread that would sleep: some 10 µs.
    pub(super) const THREAD: Self = Self { pauses: 32, offers: 32 };
    /// For a task, whose thread has other tasks: some 2 µs.
    pub(super) const TASK: Self = Self { pauses: 16, offers: 4 };

    /// Looks until `done`, but not for long.
    pub(super) fn look(self, mut done: impl FnMut() -> bool) {
        if !has_company() {
            return;
        }
        for _ in 0..self.pauses {
            std::hint::spin_loop();
            if done() {
                return;
            }
        }
        for _ in 0..self.offers {
            thread::yield_now();
            if done() {
                return;
            }
        }
    }
}

/// Whether another thread can run while this one looks.
fn has_company() -> bool {
    static COMPANY: OnceLock<bool> = OnceLock::new();
    *COMPANY.get_or_init(|| thread::available_parallelism().is_ok_and(|count| count.get() > 1))
}

/// Waits for a future on this thread.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    match block_on_until(future, None) {
        Some(output) => output,
        None => unreachable!("it ends with the future only"),
    }
}

/// Waits for a future on this thread, until a moment; `None` when that came first.
pub(super) fn block_on_until<F: Future>(future: F, deadline: Option<Instant>) -> Option<F::Output> {
    // In a task of tokio's, whose turn is over after so many looks, the wake-up would wait for the task to give way.
    let mut future = pin!(tokio::task::unconstrained(future));
    let mut wait = |parker: &Parker, waker: &Waker| {
        let mut cx = Context::from_waker(waker);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                return Some(output);
            }
            while !parker.woken.swap(false, Ordering::AcqRel) {
                match deadline {
                    None => thread::park(),
                    Some(deadline) => {
                        let left = deadline.saturating_duration_since(Instant::now());
                        if left.is_zero() {
                            return None;
                        }
                        thread::park_timeout(left);
                    }
                }
            }
        }
    };
    let own = OWN.try_with(|own| {
        // Held while we wait, so that a wait within this wait makes a parker of its own.
        own.try_borrow_mut().ok().map(|own| wait(&own.0, &own.1))
    });
    match own {
        Ok(Some(output)) => output,
        _ => {
            let (parker, waker) = parker();
            wait(&parker, &waker)
        }
    }
}
