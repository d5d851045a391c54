//! What a thread of the pool does from its first to its last moment.
//!
//! Whose turn it is and who sleeps is decided in `polyfork_core::sync::pool`; here a thread really sleeps, wakes
//! another, or is started. Nothing a task does ends a thread: every call into foreign code is under [`quietly`] or
//! caught in the task.
//!
//! The rule that surprises: a thread that leaves joins those that left before it, so that at most one is ever between its
//! last word and its real end, and memory of dead threads does not pile up.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use polyfork_core::sync::pool::{Call, Coming, Next, Retire, Tired};

use super::Shared;
use super::stats::Meter;
use super::task::{Queued, Worked};

/// How often a thread looks for work before it lies down; between two looks it lets somebody else run. Measured on two cores:
/// fewer looks cost wake-ups under load; pausing the processor instead of yielding keeps the one away who would bring something.
const LOOKS: u32 = 32;

thread_local! {
    /// The address of the pool this thread belongs to; 0: of none.
    static POOL: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread belongs to that pool.
pub(super) fn is_own_thread(shared: &Arc<Shared>) -> bool {
    POOL.get() == Arc::as_ptr(shared).addr()
}

/// Calls foreign code whose panic concerns nobody. Whether it did not panic.
pub(super) fn quietly(call: impl FnOnce()) -> bool {
    let Err(payload) = catch_unwind(AssertUnwindSafe(call)) else { return true };
    // What a panic carries may panic when it is dropped; then it stays where it is.
    if let Err(worse) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(worse);
    }
    false
}

/// Where one thread sleeps.
#[derive(Debug)]
pub(super) struct Bed {
    called: AtomicBool,
    thread: Thread,
}

impl Bed {
    fn new() -> Arc<Self> {
        Arc::new(Self { called: AtomicBool::new(false), thread: thread::current() })
    }

    /// Wakes its thread, now or when it lies down.
    pub(super) fn call(&self) {
        self.called.store(true, Ordering::Release);
        self.thread.unpark();
    }

    /// Sleeps until called; `false`: the time was up first. Others may unpark this thread without meaning it.
    fn sleep(&self, limit: Option<Duration>) -> bool {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            if self.called.swap(false, Ordering::Acquire) {
                return true;
            }
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(Duration::ZERO) => return false,
                Some(rest) => thread::park_timeout(rest),
            }
        }
    }
}

impl Shared {
    /// Starts a thread that the dispatch has counted.
    pub(super) fn start_thread(self: &Arc<Self>) -> io::Result<()> {
        let id = self.next_thread.fetch_add(1, Ordering::Relaxed);
        let mut builder = thread::Builder::new().name(format!("{}-{id}", self.options.name));
        if let Some(bytes) = self.options.stack_bytes {
            builder = builder.stack_size(bytes);
        }
        let shared = self.clone();
        // Under the lock, so that a thread that leaves at once finds its own handle.
        let mut threads = self.threads();
        let handle = builder.spawn(move || Member::new(shared, id).live())?;
        threads.running.insert(id, handle);
        drop(threads);
        self.counters.threads_started.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Does what the dispatch asks for.
    pub(super) fn set_going(self: &Arc<Self>, call: Call<Arc<Bed>>) {
        match call {
            Call::Nobody => {}
            Call::Wake(bed) => bed.call(),
            Call::Start => {
                if let Err(error) = self.start_thread() {
                    self.no_thread(error);
                }
            }
        }
    }

    fn no_thread(self: &Arc<Self>, error: io::Error) {
        self.counters.start_failures.fetch_add(1, Ordering::Relaxed);
        let (call, shut) = self.dispatch.start_failed();
        if let Call::Wake(bed) = call {
            bed.call();
        }
        self.fail_all(shut.tasks, &super::TaskError::NoThread(Arc::new(error)));
        if shut.ended {
            self.tell_ended();
        }
    }
}

/// One thread.
struct Member {
    shared: Arc<Shared>,
    id: u64,
    bed: Arc<Bed>,
    meter: Arc<Meter>,
    /// Tasks since it was started.
    tasks: u64,
    /// The end of the last task, if no time has passed since.
    clock: Option<Instant>,
}

/// Why the rounds ended.
struct Left {
    last: bool,
}

impl Member {
    fn new(shared: Arc<Shared>, id: u64) -> Self {
        let meter = Arc::new(Meter::new());
        shared.meters().push(meter.clone());
        Self { shared, id, bed: Bed::new(), meter, tasks: 0, clock: None }
    }

    fn live(mut self) {
        POOL.set(Arc::as_ptr(&self.shared).addr());
        if let Some(hook) = &self.shared.options.on_thread_start {
            quietly(hook);
        }
        let left = self.rounds();
        if self.shared.options.has_children {
            quietly(super::child::end);
        }
        if let Some(hook) = &self.shared.options.on_thread_stop {
            quietly(hook);
        }
        self.shared.retire_meter(&self.meter);
        self.join_earlier();
        if left.last {
            self.shared.tell_ended();
        }
    }

    fn rounds(&mut self) -> Left {
        let mut coming = Coming::Called;
        loop {
            let answer = self.shared.dispatch.next(coming, self.id, || self.bed.clone());
            self.shared.set_going(answer.call);
            if let Some(task) = answer.accepted {
                task.0.wake();
            }
            self.drop_quietly(answer.dead);
            coming = Coming::Called;
            match answer.next {
                Next::Task(task) => {
                    let well = self.do_task(task);
                    coming = Coming::Busy;
                    if self.has_done_enough(well)
                        && let Some(left) = self.retire(&mut coming)
                    {
                        return left;
                    }
                }
                Next::Search => {
                    self.search();
                    coming = Coming::Searching;
                }
                Next::Sleep { timed } => {
                    if let Some(left) = self.sleep(timed) {
                        return left;
                    }
                }
                Next::Leave { last } => return Left { last },
            }
        }
    }

    /// Whether it did not panic.
    fn do_task(&mut self, task: Queued) -> bool {
        let begin = self.clock.take().unwrap_or_else(Instant::now);
        self.meter.begin(begin);
        let waited = begin.saturating_duration_since(task.0.head().brought);
        let mut well = true;
        let (meter, clock) = (&self.meter, &mut self.clock);
        self.shared.run(&*task.0, begin, &mut |worked| {
            let end = Instant::now();
            meter.end(worked, waited, end.saturating_duration_since(begin));
            *clock = Some(end);
            well = worked == Worked::Done;
        });
        self.meter.idle();
        self.tasks += 1;
        // A result that nobody waits for is dropped here.
        quietly(|| drop(task)) && well
    }

    fn has_done_enough(&self, well: bool) -> bool {
        let options = &self.shared.options;
        options.tasks_per_thread.is_some_and(|limit| self.tasks >= limit)
            || (!well && options.replace_after_panic)
    }

    /// Makes room for a new thread, or none. `None`: it stays after all.
    fn retire(&mut self, coming: &mut Coming) -> Option<Left> {
        let left = match self.shared.dispatch.retire() {
            Retire::Leave { last } => Left { last },
            Retire::Replace => {
                if self.shared.start_thread().is_err() {
                    self.shared.counters.start_failures.fetch_add(1, Ordering::Relaxed);
                    *coming = Coming::Called;
                    return None;
                }
                Left { last: false }
            }
        };
        self.shared.counters.threads_recycled.fetch_add(1, Ordering::Relaxed);
        Some(left)
    }

    fn search(&mut self) {
        self.clock = None;
        for _ in 0..LOOKS {
            if !self.shared.dispatch.looks_empty() {
                return;
            }
            thread::yield_now();
        }
    }

    fn sleep(&mut self, timed: bool) -> Option<Left> {
        self.clock = None;
        let limit = timed.then_some(self.shared.options.idle_timeout);
        if self.bed.sleep(limit) {
            return None;
        }
        match self.shared.dispatch.tired(self.id) {
            Tired::Leave { last } => Some(Left { last }),
            // The call is on its way, or will be one day.
            Tired::Called | Tired::Stay => {
                self.bed.sleep(None);
                None
            }
        }
    }

    fn drop_quietly(&self, tasks: Vec<Queued>) {
        for task in tasks {
            quietly(|| drop(task));
        }
    }

    /// Waits for the real end of threads that left before, and leaves its own handle to the next.
    fn join_earlier(&self) {
        let earlier = {
            let mut threads = self.shared.threads();
            let own = threads.running.remove(&self.id);
            std::mem::replace(&mut threads.left, own.into_iter().collect())
        };
        for handle in earlier {
            // It cannot have panicked, and if it had, there is nothing to do about it.
            let _ = handle.join();
        }
    }
}
