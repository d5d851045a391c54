//! The pool of threads: tasks, their order and their end, and the threads themselves. One file per kind of promise.
//!
//! Tests hold threads by a [`Gate`] and wait for what they expect; none depends on how long something takes.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod ending;
mod figures;
mod processes;
mod queue;
mod running;
mod threads;

use std::future::Future;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use polyfork::worker_threads::{Pool, PoolBuilder, Task};

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than any test.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// `what`, or a panic if it does not come.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it never came")
}

/// Waits until `what` holds; panics with its name otherwise.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A door at which tasks wait.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<GateState>, Condvar)>);

#[derive(Default)]
struct GateState {
    open: bool,
    waiting: usize,
}

impl Gate {
    /// Waits for the door to open.
    fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.waiting += 1;
        changed.notify_all();
        let wait = changed.wait_timeout_while(state, PATIENCE, |state| !state.open).unwrap();
        assert!(!wait.1.timed_out(), "the gate never opened");
    }

    /// Waits until so many have come to the door.
    fn wait_for(&self, tasks: usize) {
        let (state, changed) = &*self.0;
        let state = state.lock().unwrap();
        let wait =
            changed.wait_timeout_while(state, PATIENCE, |state| state.waiting < tasks).unwrap();
        assert!(!wait.1.timed_out(), "they never came to the gate");
    }

    fn open(&self) {
        self.0.0.lock().unwrap().open = true;
        self.0.1.notify_all();
    }
}

/// A pool of that many threads, neither more nor less.
fn threads(number: usize) -> PoolBuilder {
    Pool::builder().min_threads(number).max_threads(number)
}

/// Occupies one thread of the pool until the gate opens.
fn occupy(pool: &Pool) -> (Gate, Task<()>) {
    let gate = Gate::default();
    let door = gate.clone();
    let task = pool.run(move || door.pass());
    gate.wait_for(1);
    (gate, task)
}
