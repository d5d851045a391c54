//! A pool of threads for work that would hold up an async runtime, or that should use every core.
//!
//! ```
//! use polyfork::worker_threads::Pool;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = Pool::new()?;
//! let sum = pool.run(|| (1..=1_000_000_u64).sum::<u64>()).await?;
//! assert_eq!(sum, 500_000_500_000);
//! # Ok(()) }
//! ```
//!
//! A [`Task`] is a future of any runtime, or of none ([`Task::wait`]); the runtime's thread is never blocked. The pool keeps
//! between `min` and `max` threads, by default one and as many as this process may really use (its CPU affinity, capped
//! by its control group's quota). Others are started when work comes and end when they were idle for a while.
//!
//! # Order
//!
//! First come, first served within a [`Priority`]; higher priorities go first. Nobody starves: while there is work in every lane,
//! the normal one gets at least one turn in ten and the low one at least one in thirty-four.
//!
//! # When the queue is full
//!
//! The queue is bounded, by default to 8192 tasks. What happens to a task for which there is no room is the pool's [`Full`]
//! policy; [`Pool::try_run`] always gives it back.
//!
//! # Ending a task
//!
//! A thread cannot be killed, so a task that runs is only ever *asked* to stop: by [`Task::abort`], by dropping its [`Task`],
//! by its time limit, by [`Pool::abandon`]. It hears of it when it looks at its [`Context`]:
//!
//! ```
//! # use polyfork::worker_threads::{Pool, TaskError};
//! # use std::time::Duration;
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let pool = Pool::new()?;
//! let task = pool.task().timeout(Duration::from_millis(20)).run_with(|context| {
//!     let mut rounds = 0_u64;
//!     while !context.is_cancelled() {
//!         rounds += 1; // a part of the work
//!     }
//!     rounds
//! });
//! assert!(matches!(task.await, Err(TaskError::TimedOut { begun: true })));
//! # Ok(()) }
//! ```
//!
//! A task that has not begun is different: it is taken out of the queue and never runs.
//!
//! # Panics
//!
//! A panic in a task is that task's [`TaskError::Panicked`], with its text; the thread goes on. Code that leaves thread-local
//! variables in disorder when it panics wants [`PoolBuilder::replace_after_panic`].
//!
//! # Loops over data
//!
//! Splitting one computation over the cores is what rayon is for. Give it threads of its own and enter them from here, so that the
//! async side awaits it, the queue bounds it, and a time limit reaches it:
//!
//! ```
//! # use polyfork::worker_threads::Pool;
//! use rayon::prelude::*;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let cores = rayon::ThreadPoolBuilder::new().build()?;
//! let pool = Pool::builder().max_threads(1).build()?; // one loop at a time, each on all cores
//! let task = pool.run_with(move |context| {
//!     cores.install(|| {
//!         let part = |n: u64| context.check().map(|()| n * n);
//!         (0..1000).into_par_iter().map(part).sum::<Result<u64, _>>()
//!     })
//! });
//! assert_eq!(task.await?, Ok(332_833_500));
//! # Ok(()) }
//! ```
//!
//! # In threads or in processes
//!
//! A [`Job`] is a function of this program with a name. A pool of it runs in threads or in child processes, by one word:
//!
//! ```no_run
//! use polyfork::child_process::run_entries;
//! use polyfork::worker_threads::pool::{Job, Place, Pool};
//!
//! const SQUARE: Job<u64, u64> = Job::new("square", |number, _context| number * number);
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     run_entries(&[&SQUARE]); // does not return in a child
//!     let pool = Pool::of(&SQUARE, Place::Process)?; // or Place::Thread
//!     assert_eq!(pool.run_blocking(12)?, 144);
//!     Ok(())
//! }
//! ```
//!
//! See [`Place`] for what a process can do that a thread cannot.
//!
//! # Ending the pool
//!
//! [`Pool::close`] has everything done that was brought before, [`Pool::abandon`] only what has begun; either can be awaited.
//! Dropping the last clone of a pool closes it without waiting.
//!
//! Behaviour resembles: piscina (queue, abort, histograms, recycling). Who sleeps and who is woken is decided in
//! `polyfork_core::sync::pool`, where it is model-checked.

mod child;
mod error;
mod histogram;
mod job;
mod stats;
mod task;
mod thread;
mod timer;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context as Waking, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use polyfork_core::sync::lock;
use polyfork_core::sync::pool::{Brought, Dispatch, Mark, Sizes, WhenFull};
use tokio_util::sync::CancellationToken;

pub use error::{PoolError, Rejected, TaskError};
pub use histogram::Distribution;
pub use job::{Job, JobBuilder, JobPool, Place};
pub use polyfork_core::sync::pool::Priority;
pub use stats::Stats;
pub use task::{AbortHandle, Cancelled, Context, Task};

use stats::{Counters, Meter, Totals};
use task::{Cell, Head, Plain, Queued, Run, Shown, Work, Worked, block_on};
use thread::{Bed, is_own_thread, quietly};
use timer::Timer;

/// Tasks that may wait, unless said otherwise.
const CAPACITY: usize = 8192;
/// How long a thread above the minimum is idle before it ends, unless said otherwise.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// What happens to a task for which there is no room in the queue. [`Pool::try_run`] gives it back under every policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Full {
    /// It waits for room, in the order of arrival within its priority, held by its [`Task`]: whoever awaits it is held up.
    #[default]
    Wait,
    /// Its outcome is [`TaskError::Full`].
    Refuse,
    /// The caller runs it at once, on its own thread. An async caller is blocked by that: for blocking callers, and as a brake.
    RunInCaller,
    /// The oldest task of the lowest priority loses its place ([`TaskError::Displaced`]). If all are more urgent than the
    /// new one, that one's outcome is [`TaskError::Full`].
    DropOldest,
}

type Hook = Box<dyn Fn() + Send + Sync>;

/// What a pool is to be like.
#[must_use = "`build` makes the pool"]
pub struct PoolBuilder {
    min: Option<usize>,
    max: Option<usize>,
    capacity: usize,
    options: Options,
    prepare: Option<Arc<child::Prepare>>,
}

/// What the threads need to know.
struct Options {
    name: String,
    stack_bytes: Option<usize>,
    idle_timeout: Duration,
    tasks_per_thread: Option<u64>,
    replace_after_panic: bool,
    full: Full,
    /// Each thread has a child process, which ends with it.
    has_children: bool,
    on_thread_start: Option<Hook>,
    on_thread_stop: Option<Hook>,
}

impl PoolBuilder {
    /// Threads that stay when there is nothing to do, started with the pool. By default 1; 0 is possible.
    pub fn min_threads(mut self, threads: usize) -> Self {
        self.min = Some(threads);
        self
    }

    /// Threads at most. By default what this process may really use of the machine.
    pub fn max_threads(mut self, threads: usize) -> Self {
        self.max = Some(threads);
        self
    }

    /// How long a thread above the minimum is idle before it ends. By default 10 s.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.options.idle_timeout = timeout;
        self
    }

    /// How many tasks may wait, not counting those that run. By default 8192.
    pub fn max_queue(mut self, tasks: usize) -> Self {
        self.capacity = tasks;
        self
    }

    /// What happens to a task for which there is no room. By default it waits.
    pub fn when_full(mut self, full: Full) -> Self {
        self.options.full = full;
        self
    }

    /// The threads are called so, with `-` and a number behind it. Linux shows the first 15 bytes.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.options.name = name.into();
        self
    }

    /// Stack of each thread. By default that of the standard library (2 MiB).
    ///
    /// A stack that overflows ends the whole process; that cannot be caught.
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.options.stack_bytes = Some(bytes);
        self
    }

    /// Replaces a thread when it has run so many tasks, for code that leaks into thread-local variables.
    pub fn tasks_per_thread(mut self, tasks: u64) -> Self {
        self.options.tasks_per_thread = Some(tasks);
        self
    }

    /// Replaces a thread on which a task panicked, so that no later task sees the thread-local variables it left behind.
    pub fn replace_after_panic(mut self, replace: bool) -> Self {
        self.options.replace_after_panic = replace;
        self
    }

    /// Is called on each thread before its first task. A panic in it is ignored.
    pub fn on_thread_start(mut self, hook: impl Fn() + Send + Sync + 'static) -> Self {
        self.options.on_thread_start = Some(Box::new(hook));
        self
    }

    /// Is called on each thread after its last task. A panic in it is ignored.
    pub fn on_thread_stop(mut self, hook: impl Fn() + Send + Sync + 'static) -> Self {
        self.options.on_thread_stop = Some(Box::new(hook));
        self
    }

    /// Makes the pool and starts its first threads.
    ///
    /// # Errors
    /// [`PoolError::Invalid`]: no threads or no queue at all, more threads at least than at most, a name that no thread can have.
    /// [`PoolError::Thread`]: one of the first threads could not be started; the others have ended again.
    pub fn build(self) -> Result<Pool, PoolError> {
        let cores = polyfork_sys::system::available_parallelism().cpus;
        let max = self.max.unwrap_or_else(|| cores.max(self.min.unwrap_or(1)));
        let min = self.min.unwrap_or_else(|| max.min(1));
        let invalid = |text: String| Err(PoolError::Invalid(text));
        if max == 0 {
            return invalid("max_threads is 0".to_owned());
        }
        if min > max {
            return invalid(format!("min_threads is {min} and max_threads is {max}"));
        }
        if self.capacity == 0 {
            return invalid("max_queue is 0, so no task could ever wait for its thread".to_owned());
        }
        if self.options.name.contains('\0') {
            return invalid("the name contains a zero byte".to_owned());
        }
        if self.options.tasks_per_thread == Some(0) {
            return invalid("tasks_per_thread is 0".to_owned());
        }
        // More of them take the processor from those who bring something; with a single core, one does.
        let max_searching = (cores / 2).min(max);
        let sizes = Sizes { min, max, capacity: self.capacity, max_searching };
        let shared = Arc::new(Shared::new(sizes, self.options));
        let pool = Pool { owner: Arc::new(Owner(shared.clone())) };
        for _ in 0..min {
            if shared.dispatch.add_thread()
                && let Err(error) = shared.start_thread()
            {
                let _ = shared.dispatch.start_failed();
                let _ = pool.close().wait();
                return Err(PoolError::Thread(error));
            }
        }
        Ok(pool)
    }
}

impl std::fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolBuilder")
            .field("name", &self.options.name)
            .field("min_threads", &self.min)
            .field("max_threads", &self.max)
            .field("max_queue", &self.capacity)
            .finish_non_exhaustive()
    }
}

/// A pool of threads. Clones are the same pool; when the last is dropped the pool closes, without waiting for it.
///
/// See the [module](self) for what it promises.
#[derive(Clone)]
pub struct Pool {
    owner: Arc<Owner>,
}

/// What the clones of a pool have in common. Threads and tasks do not hold it.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.shut(false);
    }
}

impl Pool {
    /// A pool with nothing said about it.
    ///
    /// # Errors
    /// [`PoolError::Thread`].
    pub fn new() -> Result<Self, PoolError> {
        Self::builder().build()
    }

    /// A pool about which something is to be said.
    pub fn builder() -> PoolBuilder {
        let options = Options {
            name: "polyfork-pool".to_owned(),
            stack_bytes: None,
            idle_timeout: IDLE_TIMEOUT,
            tasks_per_thread: None,
            replace_after_panic: false,
            full: Full::default(),
            has_children: false,
            on_thread_start: None,
            on_thread_stop: None,
        };
        PoolBuilder { min: None, max: None, capacity: CAPACITY, options, prepare: None }
    }

    /// Brings a closure to the pool: it proceeds from now on, whether or not the task is awaited. Does not block, except under
    /// [`Full::RunInCaller`].
    ///
    /// Dropping the [`Task`] aborts it; see there.
    pub fn run<F, T>(&self, task: F) -> Task<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task().run(task)
    }

    /// [`run`](Self::run) for a closure that looks now and then whether it should stop.
    pub fn run_with<F, T>(&self, task: F) -> Task<T>
    where
        F: FnOnce(&Context<'_>) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task().run_with(task)
    }

    /// Brings a closure if there is room for it in the queue.
    ///
    /// # Errors
    /// [`Rejected`] gives it back.
    pub fn try_run<F, T>(&self, task: F) -> Result<Task<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task().try_run(task)
    }

    /// Brings a closure and waits for what comes out, blocking this thread. On a thread of this pool it is run right here, because
    /// there may be no other.
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn run_blocking<F, T>(&self, task: F) -> Result<T, TaskError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.task().run_blocking(task)
    }

    /// A task about which something is to be said: priority, time limit.
    pub fn task(&self) -> TaskBuilder<'_> {
        TaskBuilder { shared: &self.owner.0, priority: Priority::Normal, limit: None }
    }

    /// What the pool has done and is doing. Takes some microseconds for each thread.
    pub fn stats(&self) -> Stats {
        self.owner.0.stats()
    }

    /// Takes no more tasks from now on. Everything brought before is done, also what waits for room; then the threads end.
    ///
    /// Closes whether or not the answer is awaited.
    pub fn close(&self) -> Closing {
        self.owner.0.shut(false);
        Closing { shared: self.owner.0.clone() }
    }

    /// Takes no more tasks from now on. What has not begun never will ([`TaskError::Closed`]), what runs is asked to stop; when
    /// the last one has, the threads end.
    pub fn abandon(&self) -> Closing {
        self.owner.0.abandoned.cancel();
        self.owner.0.shut(true);
        Closing { shared: self.owner.0.clone() }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shared = &self.owner.0;
        f.debug_struct("Pool")
            .field("name", &shared.options.name)
            .field("now", &shared.dispatch.view())
            .finish_non_exhaustive()
    }
}

/// A task to be brought to a pool, and what was said about it.
#[derive(Debug, Clone)]
#[must_use = "nothing is brought to the pool yet"]
pub struct TaskBuilder<'a> {
    shared: &'a Arc<Shared>,
    priority: Priority,
    limit: Option<Limit>,
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    At(Instant),
    In(Duration),
}

impl Limit {
    /// `None` if it is so far off that it never comes.
    fn instant(self) -> Option<Instant> {
        match self {
            Limit::At(instant) => Some(instant),
            Limit::In(time) => Instant::now().checked_add(time),
        }
    }
}

impl TaskBuilder<'_> {
    /// How urgent it is.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Time from bringing it to its outcome. When it is up, a task that has not begun never will, one that runs is asked to
    /// stop, and either way the outcome is [`TaskError::TimedOut`], at once.
    pub fn timeout(mut self, time: Duration) -> Self {
        self.limit = Some(Limit::In(time));
        self
    }

    /// [`timeout`](Self::timeout) as a point in time.
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.limit = Some(Limit::At(deadline));
        self
    }

    /// See [`Pool::run`].
    pub fn run<F, T>(self, task: F) -> Task<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.bring(Plain(task))
    }

    /// See [`Pool::run_with`].
    pub fn run_with<F, T>(self, task: F) -> Task<T>
    where
        F: FnOnce(&Context<'_>) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.bring(Shown(task))
    }

    /// See [`Pool::try_run`].
    ///
    /// # Errors
    /// [`Rejected`] gives it back.
    pub fn try_run<F, T>(self, task: F) -> Result<Task<T>, Rejected<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.try_bring(Plain(task)).map_err(|(task, reason)| Rejected { task: task.0, reason })
    }

    /// [`try_run`](Self::try_run) for a closure that looks now and then whether it should stop.
    ///
    /// # Errors
    /// [`Rejected`] gives it back.
    pub fn try_run_with<F, T>(self, task: F) -> Result<Task<T>, Rejected<F>>
    where
        F: FnOnce(&Context<'_>) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.try_bring(Shown(task)).map_err(|(task, reason)| Rejected { task: task.0, reason })
    }

    /// See [`Pool::run_blocking`].
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn run_blocking<F, T>(self, task: F) -> Result<T, TaskError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        self.bring(Plain(task)).wait()
    }

    fn bring<F, T>(self, task: F) -> Task<T>
    where
        F: Run<T> + 'static,
        T: Send + 'static,
    {
        let shared = self.shared;
        let cell = match self.cell(task) {
            Ok(cell) => cell,
            Err((cell, error)) => {
                shared.refuse(&*cell, error);
                return Task::new(cell);
            }
        };
        shared.bring(&*cell, Queued(cell.clone()));
        Task::new(cell)
    }

    fn try_bring<F, T>(self, task: F) -> Result<Task<T>, (F, TaskError)>
    where
        F: Run<T> + 'static,
        T: Send + 'static,
    {
        let shared = self.shared;
        let made = self.cell(task).and_then(|cell| match shared.try_bring(Queued(cell.clone())) {
            Ok(()) => Ok(cell),
            Err(reason) => Err((cell, reason)),
        });
        match made {
            Ok(cell) => Ok(Task::new(cell)),
            Err((cell, reason)) => match cell.take_back() {
                Some(task) => {
                    shared.counters.refused.fetch_add(1, Ordering::Relaxed);
                    Err((task, reason))
                }
                // Its time was up before it was refused; the task says so.
                None => Ok(Task::new(cell)),
            },
        }
    }

    /// The task, on the timer's list if it has a limit.
    #[allow(clippy::type_complexity, reason = "a task, or a task and why it cannot be brought")]
    fn cell<F, T>(self, task: F) -> Result<Arc<Cell<F, T>>, (Arc<Cell<F, T>>, TaskError)>
    where
        F: Run<T> + 'static,
        T: Send + 'static,
    {
        let deadline = self.limit.and_then(Limit::instant);
        let head = Head::new(self.shared.clone(), self.priority, deadline);
        let cell = Arc::new(Cell::new(head, task));
        let Some(deadline) = deadline else { return Ok(cell) };
        let weak: std::sync::Weak<dyn timer::Limited> =
            Arc::downgrade(&(cell.clone() as Arc<dyn timer::Limited>));
        match self.shared.timer.add(deadline, weak, &self.shared.options.name) {
            Ok(entry) => {
                cell.limited(entry);
                Ok(cell)
            }
            Err(error) => Err((cell, TaskError::NoThread(Arc::new(error)))),
        }
    }
}

/// A pool that is closing: a future of its end, of any runtime.
///
/// The pool closes whether or not this is awaited. It is done when the last thread has ended, its thread-local variables
/// included: the last moment of one thread is waited for by blocking.
#[derive(Debug)]
#[must_use = "closing goes on without it, but nobody knows when it is over"]
pub struct Closing {
    shared: Arc<Shared>,
}

/// A task of a pool cannot wait for the end of that pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot wait for the end of the pool on one of its own threads")]
pub struct WouldDeadlock;

impl Closing {
    /// Waits for the end, blocking this thread.
    ///
    /// # Errors
    /// [`WouldDeadlock`] on a thread of this pool; it closes all the same.
    pub fn wait(self) -> Result<(), WouldDeadlock> {
        if is_own_thread(&self.shared) {
            return Err(WouldDeadlock);
        }
        block_on(self);
        Ok(())
    }
}

impl Future for Closing {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Waking<'_>) -> Poll<()> {
        if !self.shared.dispatch.has_ended() {
            self.shared.closers().push(cx.waker().clone());
            // It may have ended before the registration.
            if !self.shared.dispatch.has_ended() {
                return Poll::Pending;
            }
        }
        self.shared.join_all();
        Poll::Ready(())
    }
}

/// What everybody knows.
struct Shared {
    options: Options,
    dispatch: Dispatch<Queued, Arc<Bed>>,
    abandoned: CancellationToken,
    threads: Mutex<Threads>,
    next_thread: AtomicU64,
    counters: Counters,
    meters: Mutex<Vec<Arc<Meter>>>,
    /// What threads that are gone have done. Locked after `meters`.
    gone: Mutex<Totals>,
    /// Tasks run by others than the pool's threads in their turn.
    in_passing: Mutex<Meter>,
    closers: Mutex<Vec<Waker>>,
    timer: Timer,
}

#[derive(Default)]
struct Threads {
    running: HashMap<u64, JoinHandle<()>>,
    /// They have said their last word and are about to end.
    left: Vec<JoinHandle<()>>,
}

impl Shared {
    fn new(sizes: Sizes, options: Options) -> Self {
        Self {
            options,
            dispatch: Dispatch::new(sizes),
            abandoned: CancellationToken::new(),
            threads: Mutex::default(),
            next_thread: AtomicU64::new(0),
            counters: Counters::default(),
            meters: Mutex::default(),
            gone: Mutex::new(Totals::new()),
            in_passing: Mutex::new(Meter::new()),
            closers: Mutex::default(),
            timer: Timer::default(),
        }
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        lock(&self.threads)
    }

    fn meters(&self) -> MutexGuard<'_, Vec<Arc<Meter>>> {
        lock(&self.meters)
    }

    fn closers(&self) -> MutexGuard<'_, Vec<Waker>> {
        lock(&self.closers)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.is_cancelled()
    }

    /// Brings a task, by the policy of the pool.
    fn bring(self: &Arc<Self>, task: &dyn Work, queued: Queued) {
        let full = match self.options.full {
            Full::Wait => WhenFull::StandInLine,
            Full::Refuse | Full::RunInCaller => WhenFull::GiveBack,
            Full::DropOldest => WhenFull::Displace,
        };
        match self.dispatch.bring(queued, task.head().priority, full) {
            Brought::Accepted { call, displaced, dead } => {
                self.set_going(call);
                if let Some(displaced) = displaced
                    && displaced.0.give_up(TaskError::Displaced)
                {
                    self.counters.displaced.fetch_add(1, Ordering::Relaxed);
                }
                quietly(|| drop(dead));
            }
            Brought::InLine => {}
            Brought::Full(_) if self.options.full == Full::RunInCaller => self.run_here(task),
            Brought::Full(_) => self.refuse(task, TaskError::Full),
            Brought::Closed(_) => self.refuse(task, TaskError::Closed),
        }
    }

    fn try_bring(self: &Arc<Self>, queued: Queued) -> Result<(), TaskError> {
        let priority = queued.0.head().priority;
        match self.dispatch.bring(queued, priority, WhenFull::GiveBack) {
            Brought::Accepted { call, .. } => {
                self.set_going(call);
                Ok(())
            }
            Brought::Closed(_) => Err(TaskError::Closed),
            Brought::Full(_) | Brought::InLine => Err(TaskError::Full),
        }
    }

    fn refuse(&self, task: &dyn Work, error: TaskError) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        task.give_up(error);
    }

    /// Runs a task that nobody else will, on this thread.
    fn run_here<W: Work + ?Sized>(&self, task: &W) {
        let begin = Instant::now();
        let waited = begin.saturating_duration_since(task.head().brought);
        self.run(task, begin, &mut |worked| {
            lock(&self.in_passing).end(worked, waited, begin.elapsed());
        });
    }

    /// Runs a task, unless its time is up.
    fn run<W: Work + ?Sized>(&self, task: &W, now: Instant, ran: &mut dyn FnMut(Worked)) {
        if task.head().deadline.is_some_and(|deadline| deadline <= now) {
            task.time_is_up();
        } else {
            task.work(ran);
        }
    }

    /// Takes a task out of the queue. Whether it was there.
    fn take_out(&self, mark: &Mark) -> bool {
        let withdrawn = self.dispatch.withdraw(mark);
        if let Some(task) = withdrawn.accepted {
            task.0.wake();
        }
        quietly(|| drop(withdrawn.dead));
        withdrawn.was_waiting
    }

    fn fail_all(&self, tasks: Vec<Queued>, error: &TaskError) {
        for task in tasks {
            if task.0.give_up(error.clone()) {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
            }
            quietly(|| drop(task));
        }
    }

    fn shut(&self, abandon: bool) {
        let shut = self.dispatch.shut(abandon);
        for bed in shut.wake {
            bed.call();
        }
        self.fail_all(shut.tasks, &TaskError::Closed);
        if shut.ended {
            self.tell_ended();
        }
    }

    /// No thread is left and none will come.
    fn tell_ended(&self) {
        let closers = std::mem::take(&mut *self.closers());
        for closer in closers {
            quietly(|| closer.wake());
        }
    }

    /// Waits for the real end of threads that have been told to leave.
    fn join_all(&self) {
        self.timer.stop();
        let threads = std::mem::take(&mut *self.threads());
        for handle in threads.left.into_iter().chain(threads.running.into_values()) {
            // It cannot have panicked, and if it had, there is nothing to do about it.
            let _ = handle.join();
        }
    }

    fn retire_meter(&self, meter: &Arc<Meter>) {
        let mut meters = self.meters();
        meters.retain(|other| !Arc::ptr_eq(other, meter));
        lock(&self.gone).add(meter, true);
    }

    fn stats(&self) -> Stats {
        let meters = self.meters();
        let mut totals = lock(&self.gone).clone();
        for meter in meters.iter() {
            totals.add(meter, true);
        }
        drop(meters);
        totals.add(&lock(&self.in_passing), false);
        Stats::new(self.dispatch.view(), &self.counters, totals)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("now", &self.dispatch.view()).finish_non_exhaustive()
    }
}
