//! Who does the next task, who sleeps, who is woken and who leaves: the meeting point of a thread pool.
//!
//! Everything happens under one lock that is held for some tens of nanoseconds. Threads are not started, parked or woken
//! here, and tasks are not run: the answers say what the caller is to do, after the lock is free again. The caller's
//! threads go round like this:
//!
//! ```text
//!             next(Called)                           next(Busy)
//! started ────────────────────▶ Task ── run it ──────────────────▶ Task | Search | Sleep | Leave
//! Search: look at `looks_empty` for a while, then next(Searching)
//! Sleep:  park until called, then next(Called); when its time is up: tired()
//! ```
//!
//! **No wake-up is lost**, because a thread lies down under the same lock under which it saw the queue empty. **At most
//! one thread is woken for a task, and none while one is on its way or searching**; when that one takes a task and more are
//! waiting it calls the next. So a burst wakes the threads one after the other, each only if there is still something to do.
//!
//! A thread that runs out of work searches for a while before it lies down, unless others do: threads that were called do not count
//! here, because it may take the system milliseconds to let them run.
//!
//! The thread that lay down last is woken first: its caches are warm, and the others can get tired and leave.
//!
//! The rule that surprises: a full queue may have a *line* before it, without bound. A task stands in line only while somebody
//! holds it and waits for it; that is what bounds it.
//!
//! Proved by `tests/loom_pool.rs` and `tests/shuttle_pool.rs`, which run this very code.

mod lanes;
mod mark;

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use lanes::Lanes;
pub use lanes::Priority;
pub use mark::{Mark, Marked};

/// Sizes of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Threads that stay when there is nothing to do.
    pub min: usize,
    /// Threads at most; at least 1 and at least `min`.
    pub max: usize,
    /// Tasks that may wait, at least 1.
    pub capacity: usize,
    /// Threads that may look for work at one time before they lie down.
    pub max_searching: usize,
}

/// What to do with a task for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It stands in line; it is held by somebody who waits for it.
    StandInLine,
    /// It is given back.
    GiveBack,
    /// The oldest of the lowest priority makes room, unless all are more urgent. Not to be mixed with
    /// [`StandInLine`](Self::StandInLine): it would pass those in line.
    Displace,
}

/// Whom the caller must set going, now that the lock is free.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a thread that is not called sleeps on"]
pub enum Call<S> {
    /// Nobody.
    Nobody,
    /// This sleeper.
    Wake(S),
    /// A new thread, which is counted already. If it cannot be started: [`Dispatch::start_failed`].
    Start,
}

/// What became of a task that was brought.
#[derive(Debug)]
pub enum Brought<T, S> {
    /// It waits, or stands in line; `displaced` had to make room.
    Accepted {
        /// Whom to set going.
        call: Call<S>,
        /// The task that lost its place.
        displaced: Option<T>,
        /// Withdrawn tasks that were swept out, to be dropped without the lock.
        dead: Vec<T>,
    },
    /// It stands in line before the full queue.
    InLine,
    /// There is no room for it.
    Full(T),
    /// No more tasks are taken.
    Closed(T),
}

/// How a thread comes to [`Dispatch::next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coming {
    /// New, or called from its sleep.
    Called,
    /// From a task.
    Busy,
    /// From a search.
    Searching,
}

/// What a thread is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// This.
    Task(T),
    /// Look at [`Dispatch::looks_empty`] for a while, then ask again.
    Search,
    /// Sleep until called; for the idle timeout at most if `timed`.
    Sleep {
        /// This thread may leave when it has slept long enough.
        timed: bool,
    },
    /// End.
    Leave {
        /// It was the last, and no more tasks are taken.
        last: bool,
    },
}

/// An answer to a thread, with everything that has to be done without the lock.
#[derive(Debug)]
pub struct Answer<T, S> {
    /// What it is to do.
    pub next: Next<T>,
    /// Whom it has to set going first.
    pub call: Call<S>,
    /// A task that came from the line into the queue.
    pub accepted: Option<T>,
    /// Withdrawn tasks, to be dropped.
    pub dead: Vec<T>,
}

/// What a sleeper whose time is up is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tired {
    /// It has been called meanwhile: go on as called.
    Called,
    /// Sleep on, without a limit: it is one of those that stay.
    Stay,
    /// End.
    Leave {
        /// It was the last, and no more tasks are taken.
        last: bool,
    },
}

/// What a thread is to do that has done as many tasks as one thread should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retire {
    /// End.
    Leave {
        /// It was the last, and no more tasks are taken.
        last: bool,
    },
    /// Start a new thread and end. If it cannot be started, stay, as one that is [`Coming::Called`].
    Replace,
}

/// A task was asked back.
#[derive(Debug)]
pub struct Withdrawn<T> {
    /// It was waiting, and will never be given to a thread.
    pub was_waiting: bool,
    /// A task that came from the line into the queue.
    pub accepted: Option<T>,
    /// Withdrawn tasks, to be dropped.
    pub dead: Vec<T>,
}

/// The doors are shut.
#[derive(Debug)]
pub struct Shut<T, S> {
    /// All sleepers, to be woken.
    pub wake: Vec<S>,
    /// The tasks that nobody will do.
    pub tasks: Vec<T>,
    /// No thread is left.
    pub ended: bool,
}

/// What a pool looks like at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct View {
    /// Threads, started or about to be.
    pub threads: usize,
    /// Of these, the ones that sleep.
    pub sleeping: usize,
    /// Of these, the ones that look for work, or were called to it.
    pub searching: usize,
    /// Tasks that wait.
    pub waiting: usize,
    /// Tasks in line before the full queue.
    pub in_line: usize,
}

/// The meeting point. `T` is a task, `S` the way to wake one thread.
#[derive(Debug)]
pub struct Dispatch<T, S> {
    sizes: Sizes,
    state: Mutex<State<T, S>>,
    /// How many tasks wait, written under the lock. A hint for those who search without it.
    hint: AtomicUsize,
}

#[derive(Debug)]
struct State<T, S> {
    lanes: Lanes<T>,
    /// Not empty only while `lanes` is full.
    line: Lanes<T>,
    /// The last is woken first.
    sleepers: Vec<(u64, S)>,
    /// Threads that were called, or are being started, and have not come yet.
    called: usize,
    searching: usize,
    threads: usize,
    open: bool,
}

impl<T: Marked, S> Dispatch<T, S> {
    /// A meeting point without threads. Sizes below their minimum are raised to it.
    pub fn new(sizes: Sizes) -> Self {
        let max = sizes.max.max(sizes.min).max(1);
        let sizes = Sizes { max, capacity: sizes.capacity.max(1), ..sizes };
        let state = State {
            lanes: Lanes::new(),
            line: Lanes::new(),
            sleepers: Vec::new(),
            called: 0,
            searching: 0,
            threads: 0,
            open: true,
        };
        Self { sizes, state: Mutex::new(state), hint: AtomicUsize::new(0) }
    }

    /// Brings a task.
    pub fn bring(&self, task: T, priority: Priority, full: WhenFull) -> Brought<T, S> {
        let mut state = self.lock();
        if !state.open {
            return Brought::Closed(task);
        }
        let mut dead = Vec::new();
        let mut displaced = None;
        if state.lanes.len() >= self.sizes.capacity {
            match full {
                WhenFull::GiveBack => return Brought::Full(task),
                WhenFull::StandInLine => {
                    task.mark().in_line();
                    state.line.push(task, priority);
                    return Brought::InLine;
                }
                WhenFull::Displace => {
                    displaced = state.lanes.pop_least(priority, &mut dead);
                    let Some(displaced) = &displaced else { return Brought::Full(task) };
                    displaced.mark().outside();
                }
            }
        }
        task.mark().queued();
        state.lanes.push(task, priority);
        let call = state.call(&self.sizes);
        self.tell(&state);
        Brought::Accepted { call, displaced, dead }
    }

    /// What the thread `id` is to do. `sleeper` is asked for the way to wake it, if it is to sleep.
    pub fn next(&self, coming: Coming, id: u64, sleeper: impl FnOnce() -> S) -> Answer<T, S> {
        let mut state = self.lock();
        match coming {
            Coming::Called => state.called -= 1,
            Coming::Searching => state.searching -= 1,
            Coming::Busy => {}
        }
        let (task, accepted, dead) = state.take();
        let (next, call) = match task {
            Some(task) => (Next::Task(task), state.call(&self.sizes)),
            None => (state.rest(&self.sizes, coming, id, sleeper), Call::Nobody),
        };
        self.tell(&state);
        Answer { next, call, accepted, dead }
    }

    /// Whether there is probably nothing to do. Reads one number, without the lock.
    pub fn looks_empty(&self) -> bool {
        self.hint.load(Ordering::Relaxed) == 0
    }

    /// The thread `id` has slept for the idle timeout.
    pub fn tired(&self, id: u64) -> Tired {
        let mut state = self.lock();
        let Some(place) = state.sleepers.iter().position(|(sleeper, _)| *sleeper == id) else {
            return Tired::Called;
        };
        if state.threads <= self.sizes.min {
            return Tired::Stay;
        }
        state.sleepers.remove(place);
        Tired::Leave { last: state.leave() }
    }

    /// A thread that comes from a task has done enough of them.
    pub fn retire(&self) -> Retire {
        let mut state = self.lock();
        let missed = !state.lanes.is_empty() || state.threads <= self.sizes.min;
        if missed && (state.open || !state.lanes.is_empty()) {
            state.called += 1;
            return Retire::Replace;
        }
        Retire::Leave { last: state.leave() }
    }

    /// A thread that [`Call::Start`] asked for could not be started. Returns whom to call instead, and, if there is no thread at
    /// all, the tasks that nobody will do.
    pub fn start_failed(&self) -> (Call<S>, Shut<T, S>) {
        let mut state = self.lock();
        state.called -= 1;
        let ended = state.leave();
        let mut tasks = Vec::new();
        let mut call = Call::Nobody;
        if state.threads == 0 {
            tasks = state.take_all();
        } else if !state.lanes.is_empty() && state.called + state.searching == 0 {
            call = state.wake();
        }
        self.tell(&state);
        (call, Shut { wake: Vec::new(), tasks, ended })
    }

    /// Counts a thread that the caller starts by itself. `false`: there are as many as there may be, or no more are wanted.
    /// Its first question is `next(Called)`.
    pub fn add_thread(&self) -> bool {
        let mut state = self.lock();
        if !state.open || state.threads >= self.sizes.max {
            return false;
        }
        state.threads += 1;
        state.called += 1;
        true
    }

    /// Asks a task back: after this no thread gets it, if it was waiting.
    pub fn withdraw(&self, mark: &Mark) -> Withdrawn<T> {
        let mut state = self.lock();
        let mut answer = Withdrawn { was_waiting: true, accepted: None, dead: Vec::new() };
        if mark.is_queued() {
            mark.withdrawn();
            answer.dead = state.lanes.one_withdrawn();
            answer.accepted = state.refill(&mut answer.dead);
        } else if mark.is_in_line() {
            mark.withdrawn();
            answer.dead = state.line.one_withdrawn();
        } else {
            answer.was_waiting = false;
        }
        self.tell(&state);
        answer
    }

    /// Whether a task stands in line before the full queue.
    pub fn is_in_line(&self, mark: &Mark) -> bool {
        let _state = self.lock();
        mark.is_in_line()
    }

    /// Takes no more tasks. What waits is done all the same, also what stands in line, unless `abandon`.
    ///
    /// May be called again, to abandon what is left.
    pub fn shut(&self, abandon: bool) -> Shut<T, S> {
        let mut state = self.lock();
        state.open = false;
        let tasks = if abandon { state.take_all() } else { Vec::new() };
        let wake: Vec<S> = state.sleepers.drain(..).map(|(_, sleeper)| sleeper).collect();
        state.called += wake.len();
        self.tell(&state);
        Shut { wake, tasks, ended: state.threads == 0 }
    }

    /// Whether no more tasks are taken and no thread is left.
    pub fn has_ended(&self) -> bool {
        let state = self.lock();
        !state.open && state.threads == 0
    }

    /// What it looks like now.
    pub fn view(&self) -> View {
        let state = self.lock();
        View {
            threads: state.threads,
            sleeping: state.sleepers.len(),
            searching: state.called + state.searching,
            waiting: state.lanes.len(),
            in_line: state.line.len(),
        }
    }

    /// A panic of somebody who held the lock says nothing about what it protects: no foreign code runs under it.
    fn lock(&self) -> MutexGuard<'_, State<T, S>> {
        lock(&self.state)
    }

    fn tell(&self, state: &State<T, S>) {
        self.hint.store(state.lanes.len(), Ordering::Relaxed);
    }
}

impl<T: Marked, S> State<T, S> {
    /// The next task; the line moves up by one.
    fn take(&mut self) -> (Option<T>, Option<T>, Vec<T>) {
        let mut dead = Vec::new();
        let Some((task, _)) = self.lanes.pop(&mut dead) else { return (None, None, dead) };
        task.mark().outside();
        let accepted = self.refill(&mut dead);
        (Some(task), accepted, dead)
    }

    /// Moves one task from the line into the place that has become free.
    fn refill(&mut self, dead: &mut Vec<T>) -> Option<T> {
        let (task, priority) = self.line.pop(dead)?;
        task.mark().queued();
        self.lanes.push(task.clone(), priority);
        Some(task)
    }

    /// Whom to set going for what waits, if anybody.
    fn call(&mut self, sizes: &Sizes) -> Call<S> {
        if self.called + self.searching > 0 || self.lanes.is_empty() {
            return Call::Nobody;
        }
        match self.wake() {
            Call::Nobody if self.threads < sizes.max => {
                self.threads += 1;
                self.called += 1;
                Call::Start
            }
            call => call,
        }
    }

    fn wake(&mut self) -> Call<S> {
        match self.sleepers.pop() {
            Some((_, sleeper)) => {
                self.called += 1;
                Call::Wake(sleeper)
            }
            None => Call::Nobody,
        }
    }

    /// There is nothing to do.
    fn rest(
        &mut self,
        sizes: &Sizes,
        coming: Coming,
        id: u64,
        sleeper: impl FnOnce() -> S,
    ) -> Next<T> {
        if !self.open {
            return Next::Leave { last: self.leave() };
        }
        if coming == Coming::Busy && self.searching < sizes.max_searching {
            self.searching += 1;
            return Next::Search;
        }
        self.sleepers.push((id, sleeper()));
        Next::Sleep { timed: self.threads > sizes.min }
    }

    /// One thread less. Whether it was the last one for good.
    fn leave(&mut self) -> bool {
        self.threads -= 1;
        self.threads == 0 && !self.open
    }

    fn take_all(&mut self) -> Vec<T> {
        let mut tasks = Vec::new();
        for task in self.lanes.take_all().chain(self.line.take_all()) {
            // Withdrawn ones are dropped by the caller just the same.
            task.mark().outside();
            tasks.push(task);
        }
        tasks
    }
}
