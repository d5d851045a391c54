//! A thread pool as small as can be over the real `sync::pool::Dispatch`, for the model checkers: what
//! `polyfork::worker_threads::pool` does, without its tasks' types, its clocks and its figures.
//!
//! The including test defines `checker` as loom or shuttle. A lost wake-up is a deadlock, which both report.

use std::sync::Arc;

use polyfork_core::sync::lock;
use polyfork_core::sync::pool::{
    Brought, Call, Coming, Dispatch, Mark, Marked, Next, Priority, Retire, Sizes, Tired, WhenFull,
};

use super::checker::sync::atomic::{AtomicUsize, Ordering};
use super::checker::sync::{Condvar, Mutex};
use super::checker::thread::{self, JoinHandle};

/// A task: counts how often it was run, dropped by the pool, or refused.
#[derive(Clone)]
pub(crate) struct Task(pub(crate) Arc<Mark>, pub(crate) Arc<Fate>);

/// What became of a task.
#[derive(Default)]
pub(crate) struct Fate {
    pub(crate) over: Latch,
    pub(crate) ran: AtomicUsize,
    pub(crate) given_up: AtomicUsize,
    /// The task waits for this one before it ends.
    pub(crate) waits_for: Option<Arc<Latch>>,
    /// Opened when it runs.
    pub(crate) opens: Option<Arc<Latch>>,
}

impl Fate {
    pub(crate) fn ran(&self) -> usize {
        self.ran.load(Ordering::SeqCst)
    }

    pub(crate) fn given_up(&self) -> usize {
        self.given_up.load(Ordering::SeqCst)
    }
}

impl Task {
    pub(crate) fn new() -> Self {
        Self::with(Fate::default())
    }

    pub(crate) fn with(fate: Fate) -> Self {
        Self(Arc::new(Mark::new()), Arc::new(fate))
    }

    fn run(&self) {
        if let Some(latch) = &self.1.opens {
            latch.open();
        }
        if let Some(latch) = &self.1.waits_for {
            latch.wait();
        }
        self.1.ran.fetch_add(1, Ordering::SeqCst);
        self.1.over.open();
    }

    /// Waits until it has run. (Shutting the pool would wake sleepers that nobody else has.)
    pub(crate) fn wait(&self) {
        self.1.over.wait();
    }

    fn give_up(&self) {
        self.1.given_up.fetch_add(1, Ordering::SeqCst);
    }
}

impl Marked for Task {
    fn mark(&self) -> &Mark {
        &self.0
    }
}

impl Default for Latch {
    fn default() -> Self {
        Self::new()
    }
}

/// A flag that can be waited for by one.
pub(crate) struct Latch(Mutex<bool>, Condvar);

impl Latch {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(false), Condvar::new())
    }

    pub(crate) fn open(&self) {
        *lock(&self.0) = true;
        self.1.notify_all();
    }

    pub(crate) fn wait(&self) {
        let mut open = lock(&self.0);
        while !*open {
            open = self.1.wait(open).unwrap();
        }
        *open = false;
    }
}

/// The pool. Threads sleep on latches.
pub(crate) struct Pool {
    pub(crate) dispatch: Dispatch<Task, Arc<Latch>>,
    pub(crate) threads: Mutex<Vec<JoinHandle<()>>>,
    pub(crate) next_id: AtomicUsize,
    /// Threads retire after so many tasks.
    pub(crate) tasks_per_thread: usize,
    /// Timed sleepers are tired at once, or called first: the checker decides.
    pub(crate) impatient: bool,
    pub(crate) last: AtomicUsize,
}

impl Pool {
    pub(crate) fn new(min: usize, max: usize, capacity: usize) -> Self {
        let sizes = Sizes { min, max, capacity, max_searching: 1 };
        Self {
            dispatch: Dispatch::new(sizes),
            threads: Mutex::new(Vec::new()),
            next_id: AtomicUsize::new(0),
            tasks_per_thread: usize::MAX,
            impatient: false,
            last: AtomicUsize::new(0),
        }
    }

    pub(crate) fn start_min(self: &Arc<Self>, min: usize) {
        for _ in 0..min {
            assert!(self.dispatch.add_thread());
            self.start();
        }
    }

    fn start(self: &Arc<Self>) {
        let pool = self.clone();
        let id = self.next_id.fetch_add(1, Ordering::SeqCst) as u64;
        let handle = thread::spawn(move || pool.live(id));
        lock(&self.threads).push(handle);
    }

    fn set_going(self: &Arc<Self>, call: Call<Arc<Latch>>) {
        match call {
            Call::Nobody => {}
            Call::Wake(bed) => bed.open(),
            Call::Start => self.start(),
        }
    }

    /// Whether it was taken.
    pub(crate) fn bring(self: &Arc<Self>, task: &Task, full: WhenFull) -> bool {
        match self.dispatch.bring(task.clone(), Priority::Normal, full) {
            Brought::Accepted { call, displaced, .. } => {
                self.set_going(call);
                if let Some(displaced) = displaced {
                    displaced.give_up();
                }
                true
            }
            Brought::InLine => true,
            Brought::Full(task) | Brought::Closed(task) => {
                task.give_up();
                false
            }
        }
    }

    pub(crate) fn shut(&self, abandon: bool) {
        let shut = self.dispatch.shut(abandon);
        for bed in shut.wake {
            bed.open();
        }
        for task in shut.tasks {
            task.give_up();
        }
    }

    /// Waits for all threads there ever were.
    pub(crate) fn join(&self) {
        loop {
            let Some(handle) = lock(&self.threads).pop() else { return };
            handle.join().unwrap();
        }
    }

    fn live(self: Arc<Self>, id: u64) {
        let bed = Arc::new(Latch::new());
        let mut coming = Coming::Called;
        let mut tasks = 0;
        loop {
            let answer = self.dispatch.next(coming, id, || bed.clone());
            self.set_going(answer.call);
            coming = Coming::Called;
            match answer.next {
                Next::Task(task) => {
                    task.run();
                    tasks += 1;
                    coming = Coming::Busy;
                    if tasks >= self.tasks_per_thread {
                        let last = match self.dispatch.retire() {
                            Retire::Leave { last } => last,
                            Retire::Replace => {
                                self.start();
                                false
                            }
                        };
                        return self.leave(last);
                    }
                }
                Next::Search => coming = Coming::Searching,
                Next::Sleep { timed } if timed && self.impatient => match self.dispatch.tired(id) {
                    Tired::Leave { last } => return self.leave(last),
                    Tired::Called | Tired::Stay => bed.wait(),
                },
                Next::Sleep { .. } => bed.wait(),
                Next::Leave { last } => return self.leave(last),
            }
        }
    }

    fn leave(&self, last: bool) {
        self.last.fetch_add(usize::from(last), Ordering::SeqCst);
    }
}
