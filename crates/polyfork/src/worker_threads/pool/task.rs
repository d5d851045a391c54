//! One task: what is to be run, who waits for it, and what came out.
//!
//! A task is one allocation with two faces. The queue sees [`Work`], which has forgotten the types; the caller sees
//! [`Outcome`], which knows what comes out. Who gets there first decides: the thread that begins it, or whoever
//! gives it up (abort, time limit, shutdown); both do so under the task's own small lock.
//!
//! The rule that surprises: foreign code (the closure, the drop of what it captured, a waker) never runs under that
//! lock, nor under the pool's.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context as Waking, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use polyfork_core::sync::lock;
use polyfork_core::sync::pool::{Mark, Marked, Priority};
use tokio_util::sync::CancellationToken;

use super::error::{TaskError, panic_text};
use super::thread::{is_own_thread, quietly};
use super::{Shared, timer};

/// What is to be run.
pub(super) trait Run<T>: Send {
    /// An error is the task's outcome, as if it had panicked.
    fn run(self, context: &Context<'_>) -> Result<T, TaskError>;
}

/// A closure that asks nothing.
pub(super) struct Plain<F>(pub(super) F);

impl<T, F: FnOnce() -> T + Send> Run<T> for Plain<F> {
    fn run(self, _context: &Context<'_>) -> Result<T, TaskError> {
        Ok(self.0())
    }
}

/// A closure that is shown its context.
pub(super) struct Shown<F>(pub(super) F);

impl<T, F: FnOnce(&Context<'_>) -> T + Send> Run<T> for Shown<F> {
    fn run(self, context: &Context<'_>) -> Result<T, TaskError> {
        Ok(self.0(context))
    }
}

/// What a running task can ask about itself. Borrow it freely, also into other threads that end before the task does.
///
/// In a child process ([`Place::Process`](super::Place::Process)) it knows nothing: a task there is not asked to stop but killed.
#[derive(Debug)]
pub struct Context<'a> {
    head: Option<&'a Head>,
}

/// The task was asked to stop, and its time to do so has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the task was asked to stop")]
pub struct Cancelled;

impl Context<'_> {
    /// In another process.
    pub(super) fn elsewhere() -> Self {
        Self { head: None }
    }

    /// Calls `stopper` when the task is asked to stop: at once, if it was already. Replaces the one before.
    pub(super) fn on_stop(&self, stopper: impl FnOnce() + Send + 'static) {
        if let Some(head) = self.head {
            head.on_stop(Box::new(stopper));
        }
    }

    /// Fires when the pool is abandoned.
    pub(super) fn abandoned(&self) -> Option<&CancellationToken> {
        self.head.map(|head| &head.shared.abandoned)
    }

    /// Whether the task should stop: it was aborted, nobody waits for it any more, its time is up, or the pool is abandoned.
    /// Reads one flag; ask as often as you like.
    pub fn is_cancelled(&self) -> bool {
        self.head
            .is_some_and(|head| head.stop.load(Ordering::Relaxed) || head.shared.is_abandoned())
    }

    /// [`is_cancelled`](Self::is_cancelled) for use with `?`.
    ///
    /// # Errors
    /// [`Cancelled`] when the task should stop.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.is_cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// When its time is up, if it has a limit.
    pub fn deadline(&self) -> Option<Instant> {
        self.head.and_then(|head| head.deadline)
    }

    /// How urgent it was said to be.
    pub fn priority(&self) -> Priority {
        self.head.map(|head| head.priority).unwrap_or_default()
    }
}

type Stopper = Box<dyn FnOnce() + Send>;

/// What both faces of a task know.
pub(super) struct Head {
    pub(super) mark: Mark,
    /// The task should stop.
    stop: AtomicBool,
    /// Is called when it should stop, by whoever says so.
    stopper: Mutex<Option<Stopper>>,
    pub(super) priority: Priority,
    pub(super) brought: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) shared: Arc<Shared>,
}

impl Head {
    pub(super) fn new(shared: Arc<Shared>, priority: Priority, deadline: Option<Instant>) -> Self {
        Self {
            mark: Mark::new(),
            stop: AtomicBool::new(false),
            stopper: Mutex::new(None),
            priority,
            brought: Instant::now(),
            deadline,
            shared,
        }
    }

    pub(super) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let stopper = lock(&self.stopper).take();
        if let Some(stopper) = stopper {
            stopper();
        }
    }

    fn on_stop(&self, stopper: Stopper) {
        *lock(&self.stopper) = Some(stopper);
        // Whoever asked before saw no stopper.
        if self.stop.load(Ordering::SeqCst) {
            self.ask_to_stop();
        }
    }

    fn forget_stopper(&self) {
        let stopper = lock(&self.stopper).take();
        drop(stopper);
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Head")
            .field("priority", &self.priority)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// What became of a task that was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Worked {
    /// It was run to its end.
    Done,
    /// It panicked, or its process ended under it.
    Failed,
}

/// The side of the threads.
pub(super) trait Work: Send + Sync {
    fn head(&self) -> &Head;
    /// Runs it, unless it was given up, and calls `ran` before anybody hears of the outcome. Does not panic.
    fn work(&self, ran: &mut dyn FnMut(Worked));
    /// Its outcome is `error`, if it has not begun. Whether that was so.
    fn give_up(&self, error: TaskError) -> bool;
    /// Its time is up: its outcome is that, unless it has one already; if it runs it is asked to stop.
    fn time_is_up(&self);
    /// Wakes whoever waits for it, to look again.
    fn wake(&self);
    /// Has `waker` woken at the next change.
    fn watch(&self, waker: &Waker);
}

/// The side of whoever waits.
trait Outcome<T>: Work {
    fn poll(&self, waker: &Waker) -> Poll<Result<T, TaskError>>;
    fn is_finished(&self) -> bool;
}

/// A task in the queue.
#[derive(Clone)]
pub(super) struct Queued(pub(super) Arc<dyn Work>);

impl Marked for Queued {
    fn mark(&self) -> &Mark {
        &self.0.head().mark
    }
}

/// The task itself.
pub(super) struct Cell<F, T> {
    head: Head,
    slot: Mutex<Slot<F, T>>,
}

struct Slot<F, T> {
    step: Step<F, T>,
    waker: Option<Waker>,
    /// Its place on the timer's list, while it has no outcome.
    limit: Option<timer::Entry>,
}

enum Step<F, T> {
    Waiting(F),
    Running,
    Over(Result<T, TaskError>),
    /// The outcome was fetched, or the closure given back.
    Empty,
}

impl<F, T> Slot<F, T> {
    /// It has an outcome now.
    fn end(&mut self) -> Ended {
        Ended { waker: self.waker.take(), limit: self.limit.take() }
    }
}

/// What has to be done when a task has got its outcome, without its lock.
struct Ended {
    waker: Option<Waker>,
    limit: Option<timer::Entry>,
}

impl Ended {
    fn tell(self) {
        drop(self.limit);
        wake(self.waker);
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        quietly(|| waker.wake());
    }
}

impl<F, T> Cell<F, T> {
    pub(super) fn new(head: Head, task: F) -> Self {
        let slot = Slot { step: Step::Waiting(task), waker: None, limit: None };
        Self { head, slot: Mutex::new(slot) }
    }

    /// What was to be run, if it has not begun.
    pub(super) fn take_back(&self) -> Option<F> {
        let mut slot = self.lock();
        match std::mem::replace(&mut slot.step, Step::Empty) {
            Step::Waiting(task) => {
                let ended = slot.end();
                drop(slot);
                ended.tell();
                Some(task)
            }
            other => {
                slot.step = other;
                None
            }
        }
    }

    /// Is on the timer's list until it has an outcome.
    pub(super) fn limited(&self, limit: timer::Entry) {
        let mut slot = self.lock();
        if matches!(slot.step, Step::Waiting(_)) {
            slot.limit = Some(limit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slot<F, T>> {
        lock(&self.slot)
    }

    /// It ran. If somebody has given it up meanwhile, what came out is dropped.
    fn finish(&self, outcome: Result<T, TaskError>) {
        let mut slot = self.lock();
        if !matches!(slot.step, Step::Running) {
            drop(slot);
            quietly(|| drop(outcome));
            return;
        }
        slot.step = Step::Over(outcome);
        let ended = slot.end();
        drop(slot);
        ended.tell();
    }
}

impl<F, T> timer::Limited for Cell<F, T>
where
    F: Send,
    T: Send,
{
    fn time_is_up(&self) {
        let mut slot = self.lock();
        let begun = match slot.step {
            Step::Waiting(_) => false,
            Step::Running => true,
            Step::Over(_) | Step::Empty => return,
        };
        let outcome = Step::Over(Err(TaskError::TimedOut { begun }));
        let task = std::mem::replace(&mut slot.step, outcome);
        let ended = slot.end();
        drop(slot);
        self.head.ask_to_stop();
        self.head.shared.counters.timed_out.fetch_add(1, Ordering::Relaxed);
        if !begun {
            self.head.shared.take_out(&self.head.mark);
        }
        ended.tell();
        quietly(|| drop(task));
    }
}

impl<F, T> Work for Cell<F, T>
where
    F: Run<T>,
    T: Send,
{
    fn head(&self) -> &Head {
        &self.head
    }

    fn work(&self, ran: &mut dyn FnMut(Worked)) {
        let mut slot = self.lock();
        let task = match std::mem::replace(&mut slot.step, Step::Running) {
            Step::Waiting(task) => task,
            other => {
                slot.step = other;
                return;
            }
        };
        drop(slot);
        let context = Context { head: Some(&self.head) };
        let outcome = catch_unwind(AssertUnwindSafe(|| task.run(&context)))
            .unwrap_or_else(|payload| Err(TaskError::Panicked { text: panic_text(payload) }));
        self.head.forget_stopper();
        ran(if outcome.is_ok() { Worked::Done } else { Worked::Failed });
        self.finish(outcome);
    }

    fn give_up(&self, error: TaskError) -> bool {
        let mut slot = self.lock();
        if !matches!(slot.step, Step::Waiting(_)) {
            return false;
        }
        let task = std::mem::replace(&mut slot.step, Step::Over(Err(error)));
        let ended = slot.end();
        drop(slot);
        ended.tell();
        quietly(|| drop(task));
        true
    }

    fn time_is_up(&self) {
        timer::Limited::time_is_up(self);
    }

    fn wake(&self) {
        let waker = self.lock().waker.take();
        wake(waker);
    }

    fn watch(&self, waker: &Waker) {
        let stale = self.lock().waker.replace(waker.clone());
        drop(stale);
    }
}

impl<F, T> Outcome<T> for Cell<F, T>
where
    F: Run<T>,
    T: Send,
{
    fn poll(&self, waker: &Waker) -> Poll<Result<T, TaskError>> {
        let mut slot = self.lock();
        match std::mem::replace(&mut slot.step, Step::Empty) {
            Step::Over(outcome) => Poll::Ready(outcome),
            Step::Empty => panic!("a task was polled after it had given its outcome"),
            other => {
                slot.step = other;
                let stale = match &slot.waker {
                    Some(known) if known.will_wake(waker) => None,
                    _ => slot.waker.replace(waker.clone()),
                };
                drop(slot);
                drop(stale);
                Poll::Pending
            }
        }
    }

    fn is_finished(&self) -> bool {
        matches!(self.lock().step, Step::Over(_) | Step::Empty)
    }
}

/// A task in a [`Pool`](super::Pool), and a future of what comes out of it.
///
/// It was brought to the pool when it was made, so it proceeds whether or not this is polled, on no runtime or any.
///
/// # Dropping
/// Dropping this aborts the task: one that has not begun never will, one that runs is asked to stop and its result is
/// dropped. To let it go on unwatched use [`detach`](Self::detach).
///
/// # Cancellation
/// Awaiting a `&mut Task` is cancel safe.
#[must_use = "dropping a task aborts it; `detach` lets it go on"]
pub struct Task<T> {
    /// `None` only after the outcome was fetched or the task detached: nothing is to be aborted then.
    cell: Option<Arc<dyn Outcome<T>>>,
}

impl<T: Send + 'static> Task<T> {
    pub(super) fn new<F>(cell: Arc<Cell<F, T>>) -> Self
    where
        F: Run<T> + 'static,
    {
        Self { cell: Some(cell) }
    }

    /// Aborts the task if it has not begun, and asks it to stop if it has (see [`Context::is_cancelled`]).
    ///
    /// `true`: it will never run, and its outcome is [`TaskError::Aborted`]. `false`: it has begun, or is over, and
    /// its outcome is what it makes of it; in a child process it is killed, and its outcome is [`TaskError::Aborted`] too.
    pub fn abort(&self) -> bool {
        self.cell.as_ref().is_some_and(|cell| abort(&**cell))
    }

    /// What can abort it from elsewhere. Does not keep its result alive.
    pub fn abort_handle(&self) -> AbortHandle {
        let work = self.cell.clone().map(|cell| Arc::downgrade(&(cell as Arc<dyn Work>)));
        AbortHandle { work }
    }

    /// Whether the outcome is there to be fetched.
    pub fn is_finished(&self) -> bool {
        self.cell.as_ref().is_none_or(|cell| cell.is_finished())
    }

    /// Lets it go on unwatched; its result, or its panic, is dropped.
    ///
    /// # Errors
    /// Gives the task back while it stands in line before a full queue ([`Full::Wait`](super::Full::Wait)): somebody has to hold it
    /// there. [`accepted`](Self::accepted) waits for a place.
    pub fn detach(mut self) -> Result<(), Self> {
        if let Some(cell) = &self.cell {
            let head = cell.head();
            if head.shared.dispatch.is_in_line(&head.mark) {
                return Err(self);
            }
        }
        self.cell = None;
        Ok(())
    }

    /// Waits until the task has a place in the queue (or is beyond it). At once, unless the queue was full and the pool's policy is
    /// [`Full::Wait`](super::Full::Wait): for whoever brings many tasks and wants to be held up. Cancel safe.
    pub async fn accepted(&mut self) {
        std::future::poll_fn(|cx| self.poll_accepted(cx.waker())).await;
    }

    fn poll_accepted(&self, waker: &Waker) -> Poll<()> {
        let Some(cell) = &self.cell else { return Poll::Ready(()) };
        let head = cell.head();
        let in_line = || head.shared.dispatch.is_in_line(&head.mark);
        if !in_line() || cell.is_finished() {
            return Poll::Ready(());
        }
        cell.watch(waker);
        // It may have moved up between the look and the registration.
        if in_line() && !cell.is_finished() { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Waits for the outcome, blocking this thread.
    ///
    /// On a thread of the same pool a task that has not begun is run right here, so that tasks may wait for tasks they
    /// brought without using up all threads.
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn wait(mut self) -> Result<T, TaskError> {
        if let Some(cell) = &self.cell {
            let shared = &cell.head().shared;
            if is_own_thread(shared) && shared.take_out(&cell.head().mark) {
                shared.run_here(&**cell);
            }
        }
        block_on(&mut self)
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, TaskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Waking<'_>) -> Poll<Self::Output> {
        let cell = self.cell.as_ref().expect("a task is not polled after it gave its outcome");
        let outcome = cell.poll(cx.waker());
        if outcome.is_ready() {
            self.cell = None;
        }
        outcome
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        if let Some(cell) = self.cell.take() {
            abort(&*cell);
        }
    }
}

impl<T> std::fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let finished = self.cell.as_ref().is_none_or(|cell| cell.is_finished());
        f.debug_struct("Task").field("finished", &finished).finish_non_exhaustive()
    }
}

/// Aborts a task from elsewhere; see [`Task::abort`]. Clones abort the same task.
#[derive(Clone)]
pub struct AbortHandle {
    work: Option<Weak<dyn Work>>,
}

impl AbortHandle {
    /// [`Task::abort`].
    pub fn abort(&self) -> bool {
        self.work.as_ref().and_then(Weak::upgrade).is_some_and(|work| abort(&*work))
    }
}

impl std::fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AbortHandle").finish_non_exhaustive()
    }
}

fn abort<W: Work + ?Sized>(work: &W) -> bool {
    let head = work.head();
    head.ask_to_stop();
    let aborted = work.give_up(TaskError::Aborted);
    if aborted {
        head.shared.counters.aborted.fetch_add(1, Ordering::Relaxed);
        head.shared.take_out(&head.mark);
    }
    aborted
}

/// Wakes a thread that waits in [`block_on`].
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks this thread until the future is done.
pub(super) fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Waking::from_waker(&waker);
    loop {
        match Pin::new(&mut future).poll(&mut context) {
            Poll::Ready(output) => return output,
            // Returns at once if the wake-up came in between.
            Poll::Pending => thread::park(),
        }
    }
}
