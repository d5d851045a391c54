//! What a pool has done and is doing, in figures.
//!
//! Every thread counts for itself (one writer, plain stores) and a reader adds up, so counting does not make threads wait
//! for one another. What happens rarely has counters shared by all.
//!
//! The rule that surprises: the figures are read one after the other while threads go on, so sums may be off by the tasks
//! that end meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::histogram::{Distribution, Histogram, add};
use super::task::Worked;

/// What happens rarely.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) aborted: AtomicU64,
    pub(super) timed_out: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) displaced: AtomicU64,
    pub(super) threads_started: AtomicU64,
    pub(super) threads_recycled: AtomicU64,
    pub(super) start_failures: AtomicU64,
}

/// What one thread has done. It alone writes.
pub(super) struct Meter {
    born: Instant,
    /// When the task in hand began, in ns since `born`, plus one; 0 when there is none.
    since: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    run: Histogram,
    wait: Histogram,
}

impl Meter {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        let (run, wait) = (Histogram::new(), Histogram::new());
        let born = Instant::now();
        Self { born, since: zero(), completed: zero(), failed: zero(), run, wait }
    }

    pub(super) fn begin(&self, now: Instant) {
        let ns = now.saturating_duration_since(self.born).as_nanos();
        self.since.store(u64::try_from(ns).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    pub(super) fn idle(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    pub(super) fn end(&self, worked: Worked, waited: Duration, ran: Duration) {
        self.idle();
        let counter = if worked == Worked::Failed { &self.failed } else { &self.completed };
        add(counter, 1);
        self.run.record(ran);
        self.wait.record(waited);
    }
}

/// The sum over threads that are gone.
pub(super) struct Totals {
    completed: u64,
    failed: u64,
    running: usize,
    lived: Duration,
    busy: Duration,
    run: Distribution,
    wait: Distribution,
}

impl Totals {
    pub(super) fn new() -> Self {
        Self {
            completed: 0,
            failed: 0,
            running: 0,
            lived: Duration::ZERO,
            busy: Duration::ZERO,
            run: Distribution::new(),
            wait: Distribution::new(),
        }
    }

    /// Adds what a thread has done. `lives`: it is a thread, rather than whoever runs tasks in passing.
    pub(super) fn add(&mut self, meter: &Meter, lives: bool) {
        self.completed += meter.completed.load(Ordering::Relaxed);
        self.failed += meter.failed.load(Ordering::Relaxed);
        self.run.add(&meter.run);
        self.wait.add(&meter.wait);
        let age = meter.born.elapsed();
        let since = meter.since.load(Ordering::Relaxed);
        let in_hand = since.checked_sub(1).map(|ns| age.saturating_sub(Duration::from_nanos(ns)));
        self.running += usize::from(in_hand.is_some());
        if lives {
            self.lived += age;
            self.busy += meter.run.sum() + in_hand.unwrap_or_default();
        }
    }
}

impl Clone for Totals {
    fn clone(&self) -> Self {
        Self { run: self.run.clone(), wait: self.wait.clone(), ..*self }
    }
}

/// A pool in figures; see [`Pool::stats`](super::Pool::stats). Counts are since the pool was made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Stats {
    /// Threads now.
    pub threads: usize,
    /// Threads that sleep.
    pub idle: usize,
    /// Tasks that run.
    pub running: usize,
    /// Tasks that wait in the queue.
    pub waiting: usize,
    /// Tasks that stand in line before the full queue.
    pub in_line: usize,
    /// Tasks that were run to their end.
    pub completed: u64,
    /// Tasks that panicked, or whose process ended under them.
    pub failed: u64,
    /// Tasks aborted before they began.
    pub aborted: u64,
    /// Tasks whose time was up, begun or not.
    pub timed_out: u64,
    /// Tasks that were not taken: the queue was full or the pool closed.
    pub refused: u64,
    /// Tasks that lost their place in the full queue.
    pub displaced: u64,
    /// Threads started.
    pub threads_started: u64,
    /// Threads that ended because they had done their number of tasks, or because a task panicked.
    pub threads_recycled: u64,
    /// Threads that could not be started.
    pub start_failures: u64,
    /// How long tasks ran.
    pub run_time: Distribution,
    /// How long tasks waited before they began.
    pub wait_time: Distribution,
    /// The share of their time that the threads spent in tasks, 0 to 1.
    pub utilisation: f64,
}

impl Stats {
    pub(super) fn new(
        view: polyfork_core::sync::pool::View,
        counters: &Counters,
        totals: Totals,
    ) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let share = totals.busy.as_secs_f64() / totals.lived.as_secs_f64();
        Self {
            threads: view.threads,
            idle: view.sleeping,
            running: totals.running,
            waiting: view.waiting,
            in_line: view.in_line,
            completed: totals.completed,
            failed: totals.failed,
            aborted: read(&counters.aborted),
            timed_out: read(&counters.timed_out),
            refused: read(&counters.refused),
            displaced: read(&counters.displaced),
            threads_started: read(&counters.threads_started),
            threads_recycled: read(&counters.threads_recycled),
            start_failures: read(&counters.start_failures),
            run_time: totals.run,
            wait_time: totals.wait,
            utilisation: if share.is_finite() { share.min(1.0) } else { 0.0 },
        }
    }
}
