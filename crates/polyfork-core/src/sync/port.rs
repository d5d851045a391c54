//! The queue under a message port: many senders, one receiver, bounded or not.
//!
//! One lock guards the inbox. The receiver takes all that is there at once and then works through it alone, so
//! that it locks once in a batch, and two buffers change places for ever instead of being allocated. Nobody sleeps
//! here: whoever has to wait leaves a [`Waker`], and only those who left one are woken. Threads that block, ports in
//! pairs and their names live in `polyfork::worker_threads`.
//!
//! The rule that surprises: no foreign code runs with the lock held. A message that nobody will receive is dropped
//! after the lock was given back, and so is a waker, because either may come back to this very queue.
//!
//! The bound is exact although a batch is out of the lock's sight: the receiver counts what it took in `head`,
//! and a sender that finds the queue full says so in `hungry` and looks at `head` once more. Each side writes
//! before it reads, with a fence between (Dekker), so one of them sees the other; `tests/loom_port.rs` plays it.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::mem;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use super::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use super::{Mutex, MutexGuard, lock};

/// An empty buffer with room for more than this is given back to the system when it was far too large.
const KEEP: usize = 256;
/// How many times too large a buffer must have been.
const TOO_LARGE: usize = 8;

/// A queue for at most `capacity` messages, or for any number.
///
/// A message counts until it was received, wherever it waits.
pub fn queue<T>(capacity: Option<NonZeroUsize>) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        tail: Line(AtomicUsize::new(0)),
        head: Line(AtomicUsize::new(0)),
        hungry: AtomicBool::new(false),
        aborted: AtomicBool::new(false),
        senders: AtomicUsize::new(1),
        capacity: capacity.map_or(usize::MAX, NonZeroUsize::get),
        state: Mutex::new(State {
            inbox: VecDeque::new(),
            posted: 0,
            head_seen: 0,
            closed: false,
            receiver: None,
            waiting: VecDeque::new(),
            watchers: Vec::new(),
            tickets: 0,
        }),
    });
    let sender = Sender { shared: Arc::clone(&shared) };
    (
        sender,
        Receiver { shared, batch: std::sync::Mutex::default(), held: 0, taken: 0, received: 0 },
    )
}

/// Keeps what one side writes all the time out of the other's cache lines (two at once are fetched on x86).
#[repr(align(128))]
struct Line<T>(T);

struct Shared<T> {
    /// Twice the messages ever posted, plus one when closed. Written with the lock held, so that a receiver that
    /// polls need not take it.
    tail: Line<AtomicUsize>,
    /// Messages ever received; kept for bounded queues only. Written by the receiver alone.
    head: Line<AtomicUsize>,
    /// Senders wait for room. Written with the lock held.
    hungry: AtomicBool,
    /// What is queued is not to be received any more.
    aborted: AtomicBool,
    senders: AtomicUsize,
    capacity: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    inbox: VecDeque<T>,
    posted: usize,
    /// The `head` a sender saw last.
    head_seen: usize,
    closed: bool,
    receiver: Option<Waker>,
    /// Senders that wait for room, the longest first.
    waiting: VecDeque<(u64, Waker)>,
    /// Who wants to know of the close.
    watchers: Vec<(u64, Waker)>,
    tickets: u64,
}

impl<T> State<T> {
    fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    fn wait_in_line(&mut self, ticket: &mut Option<u64>, waker: Waker) -> Option<Waker> {
        let place = ticket.and_then(|ticket| self.waiting.iter_mut().find(|(t, _)| *t == ticket));
        if let Some((_, old)) = place {
            return Some(mem::replace(old, waker));
        }
        let new = self.ticket();
        *ticket = Some(new);
        self.waiting.push_back((new, waker));
        None
    }

    /// Whether it was still waiting.
    fn leave_line(&mut self, ticket: u64) -> Option<Waker> {
        let place = self.waiting.iter().position(|(t, _)| *t == ticket)?;
        self.waiting.remove(place).map(|(_, waker)| waker)
    }
}

/// Wakers to be woken once the lock is free.
struct Woken {
    receiver: Option<Waker>,
    others: Vec<Waker>,
}

impl Woken {
    fn wake(self) {
        for waker in self.receiver.into_iter().chain(self.others) {
            waker.wake();
        }
    }
}

impl<T> Shared<T> {
    #[inline]
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        lock(&self.state)
    }

    fn is_bounded(&self) -> bool {
        self.capacity != usize::MAX
    }

    #[inline]
    fn is_full(&self, state: &mut State<T>) -> bool {
        if state.posted.wrapping_sub(state.head_seen) < self.capacity {
            return false;
        }
        if self.is_bounded() {
            state.head_seen = self.head.0.load(Ordering::Acquire);
        }
        state.posted.wrapping_sub(state.head_seen) >= self.capacity
    }

    /// [`is_full`](Self::is_full), and if so the receiver will look for senders that wait.
    fn is_full_for_long(&self, state: &mut State<T>) -> bool {
        if !self.is_full(state) {
            return false;
        }
        self.hungry.store(true, Ordering::Relaxed);
        // With the one in `received_one`.
        fence(Ordering::SeqCst);
        self.is_full(state)
    }

    /// Says whether anybody waits, for the receiver.
    fn note_hunger(&self, state: &State<T>) {
        self.hungry.store(!state.waiting.is_empty(), Ordering::Relaxed);
    }

    #[inline]
    fn push(&self, state: &mut State<T>, message: T) -> Option<Waker> {
        state.inbox.push_back(message);
        state.posted = state.posted.wrapping_add(1);
        self.tail.0.store(state.posted << 1, Ordering::Release);
        state.receiver.take()
    }

    #[inline]
    fn try_post(&self, message: T) -> Result<(), TryPost<T>> {
        let mut state = self.lock();
        if state.closed {
            return Err(TryPost::Closed(message));
        }
        if self.is_full(&mut state) {
            return Err(TryPost::Full(message));
        }
        let receiver = self.push(&mut state, message);
        drop(state);
        if let Some(receiver) = receiver {
            receiver.wake();
        }
        Ok(())
    }

    fn close_locked(&self, state: &mut State<T>) -> Woken {
        state.closed = true;
        self.tail.0.store((state.posted << 1) | 1, Ordering::Release);
        let waiting = mem::take(&mut state.waiting).into_iter();
        let watchers = mem::take(&mut state.watchers).into_iter();
        self.note_hunger(state);
        Woken {
            receiver: state.receiver.take(),
            others: waiting.chain(watchers).map(|(_, waker)| waker).collect(),
        }
    }

    fn close(&self) {
        let mut state = self.lock();
        if state.closed {
            return;
        }
        let woken = self.close_locked(&mut state);
        drop(state);
        woken.wake();
    }

    fn close_and_discard(&self) {
        let mut state = self.lock();
        let woken = self.close_locked(&mut state);
        let inbox = mem::take(&mut state.inbox);
        drop(state);
        woken.wake();
        drop(inbox);
    }

    /// Room was made: one sender that waits may go on.
    fn feed_one(&self) {
        let mut state = self.lock();
        let next = if self.is_full(&mut state) { None } else { state.waiting.pop_front() };
        self.note_hunger(&state);
        drop(state);
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }
}

/// Why a message was not posted; it is given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TryPost<T> {
    /// There is no room now.
    Full(T),
    /// Nobody will receive it.
    Closed(T),
}

/// Why nothing was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TryReceive {
    /// There is nothing now.
    Empty,
    /// There is nothing and there will be nothing.
    Closed,
}

/// The end that posts. Clones post to the same queue; when the last is dropped, the queue is closed.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Sender<T> {
    /// Posts a message if there is room.
    ///
    /// # Errors
    /// [`TryPost`] with the message.
    #[inline]
    pub fn try_post(&self, message: T) -> Result<(), TryPost<T>> {
        self.shared.try_post(message)
    }

    /// Posts a message as soon as there is room. Cancelled, it has posted nothing.
    ///
    /// The future's error is the message: the queue is closed.
    pub fn post(&self, message: T) -> Post<'_, T> {
        Post { shared: &self.shared, message: Some(message), ticket: None }
    }

    /// Takes nothing more. What is queued can still be received.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Whether it takes nothing more.
    pub fn is_closed(&self) -> bool {
        self.shared.tail.0.load(Ordering::Acquire) & 1 == 1
    }

    /// Whether a bounded queue was full a moment ago, without touching the lock: for a sender that looks a few times
    /// before it sleeps.
    pub fn looks_full(&self) -> bool {
        let posted = self.shared.tail.0.load(Ordering::Acquire) >> 1;
        let mask = usize::MAX >> 1;
        let waiting = posted.wrapping_sub(self.shared.head.0.load(Ordering::Acquire)) & mask;
        !self.is_closed() && waiting >= self.shared.capacity
    }

    /// Resolves when the queue takes nothing more.
    pub fn closed(&self) -> Closed<'_, T> {
        Closed { shared: &self.shared, ticket: None }
    }

    /// How many messages it holds at most.
    pub fn capacity(&self) -> Option<usize> {
        self.shared.is_bounded().then_some(self.shared.capacity)
    }

    /// A handle that can end the queue and does not count as a sender.
    pub fn closer(&self) -> Closer<T> {
        Closer { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.shared.senders.fetch_add(1, Ordering::Relaxed);
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.shared.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.close();
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

/// Ends a queue from outside.
pub struct Closer<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Closer<T> {
    /// Takes nothing more. What is queued can still be received.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Takes nothing more, and what is queued is not received any more either.
    ///
    /// What the receiver has not looked at yet is dropped when it next looks, or with it.
    pub fn abort(&self) {
        self.shared.aborted.store(true, Ordering::Release);
        self.shared.close_and_discard();
    }
}

/// A message on its way; see [`Sender::post`].
#[must_use = "a future does nothing unless polled"]
pub struct Post<'a, T> {
    shared: &'a Shared<T>,
    message: Option<T>,
    ticket: Option<u64>,
}

// The message is moved, never pinned.
impl<T> Unpin for Post<'_, T> {}

impl<T> Future for Post<'_, T> {
    type Output = Result<(), T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let message = this.message.take().expect("polled after it was ready");
        let message = if this.ticket.is_none() {
            match this.shared.try_post(message) {
                Ok(()) => return Poll::Ready(Ok(())),
                Err(TryPost::Closed(message)) => return Poll::Ready(Err(message)),
                Err(TryPost::Full(message)) => message,
            }
        } else {
            message
        };
        // Cloned before the lock is taken, and what it replaces dropped after: both are foreign code.
        let waker = cx.waker().clone();
        let mut state = this.shared.lock();
        if state.closed {
            drop(state);
            this.ticket = None;
            return Poll::Ready(Err(message));
        }
        if this.shared.is_full_for_long(&mut state) {
            let replaced = state.wait_in_line(&mut this.ticket, waker);
            drop(state);
            drop(replaced);
            this.message = Some(message);
            return Poll::Pending;
        }
        let left = this.ticket.take().and_then(|ticket| state.leave_line(ticket));
        this.shared.note_hunger(&state);
        let receiver = this.shared.push(&mut state, message);
        drop(state);
        drop(left);
        if let Some(receiver) = receiver {
            receiver.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T> Drop for Post<'_, T> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.shared.lock();
        let left = state.leave_line(ticket);
        self.shared.note_hunger(&state);
        drop(state);
        if left.is_none() {
            // It was woken and does not use its turn.
            self.shared.feed_one();
        }
    }
}

/// The close of a queue; see [`Sender::closed`].
#[must_use = "a future does nothing unless polled"]
pub struct Closed<'a, T> {
    shared: &'a Shared<T>,
    ticket: Option<u64>,
}

impl<T> Future for Closed<'_, T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let waker = cx.waker().clone();
        let mut state = this.shared.lock();
        if state.closed {
            drop(state);
            this.ticket = None;
            return Poll::Ready(());
        }
        let own = this.ticket;
        let place = state.watchers.iter_mut().find(|(ticket, _)| Some(*ticket) == own);
        let replaced = match place {
            Some((_, old)) => Some(mem::replace(old, waker)),
            None => {
                let ticket = state.ticket();
                this.ticket = Some(ticket);
                state.watchers.push((ticket, waker));
                None
            }
        };
        drop(state);
        drop(replaced);
        Poll::Pending
    }
}

impl<T> Drop for Closed<'_, T> {
    fn drop(&mut self) {
        let Some(own) = self.ticket else { return };
        let mut state = self.shared.lock();
        let place = state.watchers.iter().position(|(ticket, _)| *ticket == own);
        let left = place.map(|place| state.watchers.swap_remove(place));
        drop(state);
        drop(left);
    }
}

/// The end that receives.
///
/// Dropped, it closes the queue and drops what was not received.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    /// Taken out of the inbox at once. Never locked: the lock is there so that a receiver that is shared asks no more of
    /// its messages than one that is moved, since nobody gets at them by a shared reference.
    batch: std::sync::Mutex<VecDeque<T>>,
    /// How many are in it.
    held: usize,
    /// Messages ever taken out of the inbox.
    taken: usize,
    /// Messages ever received; kept for bounded queues.
    received: usize,
}

impl<T> Receiver<T> {
    /// The next message, if there is one.
    ///
    /// # Errors
    /// [`TryReceive`].
    #[inline]
    pub fn try_receive(&mut self) -> Result<T, TryReceive> {
        if self.shared.aborted.load(Ordering::Acquire) {
            self.held = 0;
            self.batch().clear();
            return Err(TryReceive::Closed);
        }
        if self.held == 0 {
            self.refill()?;
        }
        let message = self.batch().pop_front().ok_or(TryReceive::Empty)?;
        self.held -= 1;
        self.received_one();
        Ok(message)
    }

    /// The next message; `None` when the queue is closed and empty.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        match self.try_receive() {
            Ok(message) => return Poll::Ready(Some(message)),
            Err(TryReceive::Closed) => return Poll::Ready(None),
            Err(TryReceive::Empty) => {}
        }
        let waker = cx.waker().clone();
        let mut state = self.shared.lock();
        if state.inbox.is_empty() && !state.closed {
            let replaced = state.receiver.replace(waker);
            drop(state);
            drop(replaced);
            return Poll::Pending;
        }
        drop(state);
        // Only we take messages out, and nothing reopens a queue; aborted meanwhile, it is closed.
        match self.try_receive() {
            Ok(message) => Poll::Ready(Some(message)),
            Err(_) => Poll::Ready(None),
        }
    }

    /// Whether [`try_receive`](Self::try_receive) would say `Empty`, without touching the lock: for a receiver that
    /// looks a few times before it sleeps.
    #[inline]
    pub fn looks_empty(&self) -> bool {
        self.held == 0 && self.shared.tail.0.load(Ordering::Acquire) == self.taken << 1
    }

    /// How many messages wait.
    pub fn len(&self) -> usize {
        let posted = self.shared.tail.0.load(Ordering::Acquire) >> 1;
        let mask = usize::MAX >> 1;
        self.held + (posted.wrapping_sub(self.taken) & mask)
    }

    /// Whether no message waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes nothing more. What is queued can still be received.
    pub fn close(&self) {
        self.shared.close();
    }

    /// A handle that can end the queue and does not count as a sender.
    pub fn closer(&self) -> Closer<T> {
        Closer { shared: Arc::clone(&self.shared) }
    }

    fn refill(&mut self) -> Result<(), TryReceive> {
        let tail = self.shared.tail.0.load(Ordering::Acquire);
        let taken = self.taken << 1;
        if tail == taken {
            return Err(TryReceive::Empty);
        }
        if tail == taken | 1 {
            return Err(TryReceive::Closed);
        }
        let shared = &self.shared;
        let batch = self.batch.get_mut().unwrap_or_else(PoisonError::into_inner);
        let room = batch.capacity();
        if room > KEEP && (tail.wrapping_sub(taken) >> 1).saturating_mul(TOO_LARGE) < room {
            *batch = VecDeque::new();
        }
        let mut state = shared.lock();
        mem::swap(batch, &mut state.inbox);
        self.taken = state.posted;
        drop(state);
        self.held = batch.len();
        Ok(())
    }

    #[inline]
    fn batch(&mut self) -> &mut VecDeque<T> {
        self.batch.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn received_one(&mut self) {
        if !self.shared.is_bounded() {
            return;
        }
        self.received = self.received.wrapping_add(1);
        self.shared.head.0.store(self.received, Ordering::Release);
        // With the one in `is_full_for_long`.
        fence(Ordering::SeqCst);
        if self.shared.hungry.load(Ordering::Relaxed) {
            self.shared.feed_one();
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.close_and_discard();
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("waiting", &self.len()).finish_non_exhaustive()
    }
}
