//! Message ports: two entangled ends, each of which posts to the other.
//!
//! Waiting is added here to the queue of `polyfork_core::sync::port`: every operation has a form that is awaited and
//! one that blocks the thread. Workers get a port to their parent from `worker`; one message for many is
//! `broadcast`'s business.
//!
//! The rule that surprises: messages move. What was posted is gone from the sender, and what does not fit comes
//! back with the error.
//!
//! Behaviour follows: Node `lib/internal/worker/io.js`, `src/node_messaging.cc`.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use polyfork_core::sync::lock;
use polyfork_core::sync::port::{self as core, Closer, Receiver, Sender, TryPost, TryReceive};

use super::park::{Patience, block_on, block_on_until};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A port's number. The queue of nobody is 0.
pub(super) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Which port is in which port's queue; see [`MessagePort::transfer`].
static IN_TRANSIT: LazyLock<Mutex<HashMap<u64, u64>>> = LazyLock::new(Mutex::default);

/// Two ports that are connected (Node: `new MessageChannel()`).
///
/// The first gets messages of type `A` and posts messages of type `B`; the second the other way round.
///
/// ```
/// use polyfork::worker_threads::MessageChannel;
///
/// let MessageChannel { port1, mut port2 } = MessageChannel::<u32, String>::new();
/// std::thread::spawn(move || port2.receive_blocking().map(|text: String| port2.try_post_message(text.len() as u32)));
/// let mut port1 = port1;
/// port1.try_post_message("four".to_owned())?;
/// assert_eq!(port1.receive_blocking(), Some(4));
/// assert_eq!(port1.receive_blocking(), None, "the other end is gone");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MessageChannel<A, B> {
    /// One end.
    pub port1: MessagePort<A, B>,
    /// The other.
    pub port2: MessagePort<B, A>,
}

impl<A, B> MessageChannel<A, B> {
    /// A channel that holds any number of messages, as Node's does. Posting never waits, so whoever posts more than
    /// the other end receives fills the memory.
    #[expect(
        clippy::new_without_default,
        reason = "a channel is a pair, not a value with a default"
    )]
    pub fn new() -> Self {
        Self::with(None)
    }

    /// A channel that holds at most `capacity` messages in each direction, at least one: when it is full, posting
    /// waits, or says so and gives the message back.
    pub fn bounded(capacity: usize) -> Self {
        Self::with(Some(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN)))
    }

    pub(super) fn with(capacity: Option<NonZeroUsize>) -> Self {
        let (to_port2, from_port1) = core::queue(capacity);
        let (to_port1, from_port2) = core::queue(capacity);
        let (id1, id2) = (next_id(), next_id());
        Self {
            port1: MessagePort::new(id1, from_port2, Poster::new(id2, to_port2)),
            port2: MessagePort::new(id2, from_port1, Poster::new(id1, to_port1)),
        }
    }
}

/// One end of a [`MessageChannel`]: gets messages of type `In`, posts messages of type `Out`.
///
/// Messages arrive once and in the order they were posted. A port belongs to whoever holds it; it can be moved to
/// another thread, also in a message. When it is dropped, what it has not received is dropped too, and the other end
/// learns that ([`closed`](Poster::closed)); what it had posted can still be received there.
///
/// A port does not keep its thread or its runtime alive: a worker lives until its function returns.
///
/// # Blocking
/// The methods called `…_blocking` and `receive_timeout` block the thread; on a runtime's thread use the others. They
/// need no runtime.
///
/// # Ports in messages
/// A port may be part of a message. If a port's own type is not part of what it carries, nothing can go wrong. Where it
/// is (`enum Message { Port(MessagePort<Message, Message>), .. }`), a port could end in its own queue, where nobody can
/// reach it any more: send it as a [`Transferred`], which cannot.
pub struct MessagePort<In, Out> {
    id: u64,
    incoming: Receiver<In>,
    poster: Poster<Out>,
}

/// Posts to the other end of a port; clone it freely, for other threads and tasks.
///
/// The other end sees the end of messages when the port and all its posters are gone, or when one of them closes.
pub struct Poster<Out> {
    /// The port that receives.
    to: u64,
    queue: Sender<Out>,
}

impl<Out> Clone for Poster<Out> {
    fn clone(&self) -> Self {
        Self::new(self.to, self.queue.clone())
    }
}

/// Nobody will receive this message: the port is closed. Here it is back.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot post a message: the port is closed")]
pub struct PostError<T>(pub T);

/// Why a message was not posted. It is given back.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TryPostError<T> {
    /// There is no room now.
    #[error("cannot post a message: the port's queue is full")]
    Full(T),
    /// Nobody will receive it.
    #[error("cannot post a message: the port is closed")]
    Closed(T),
}

impl<T> TryPostError<T> {
    /// The message.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(message) | Self::Closed(message) => message,
        }
    }
}

// Messages need not be printable for their errors to be.
impl<T> fmt::Debug for PostError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PostError(..)")
    }
}

impl<T> fmt::Debug for TryPostError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full(..)",
            Self::Closed(_) => "Closed(..)",
        })
    }
}

/// Why nothing was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TryReceiveError {
    /// No message waits, or none came in time.
    #[error("no message")]
    Empty,
    /// The port is closed, and everything was received.
    #[error("the port is closed")]
    Closed,
}

impl From<TryReceive> for TryReceiveError {
    fn from(why: TryReceive) -> Self {
        match why {
            TryReceive::Empty => Self::Empty,
            TryReceive::Closed => Self::Closed,
        }
    }
}

impl<Out> Poster<Out> {
    pub(super) fn new(to: u64, queue: Sender<Out>) -> Self {
        Self { to, queue }
    }

    /// Posts a message, as soon as there is room.
    ///
    /// # Cancel safety
    /// Dropped before it is done, nothing was posted, and the message is dropped with the future.
    ///
    /// # Errors
    /// [`PostError`] with the message: the port is closed.
    pub async fn post_message(&self, message: Out) -> Result<(), PostError<Out>> {
        self.queue.post(message).await.map_err(PostError)
    }

    /// [`post_message`](Self::post_message), blocking the thread.
    ///
    /// # Errors
    /// [`PostError`] with the message: the port is closed.
    pub fn post_message_blocking(&self, message: Out) -> Result<(), PostError<Out>> {
        let message = match self.queue.try_post(message) {
            Ok(()) => return Ok(()),
            Err(TryPost::Closed(message)) => return Err(PostError(message)),
            Err(TryPost::Full(message)) => message,
        };
        Patience::THREAD.look(|| !self.queue.looks_full());
        block_on(self.queue.post(message)).map_err(PostError)
    }

    /// Posts a message if there is room. Does not wait.
    ///
    /// # Errors
    /// [`TryPostError`] with the message.
    pub fn try_post_message(&self, message: Out) -> Result<(), TryPostError<Out>> {
        self.queue.try_post(message).map_err(|why| match why {
            TryPost::Full(message) => TryPostError::Full(message),
            TryPost::Closed(message) => TryPostError::Closed(message),
        })
    }

    /// Resolves when nothing posted here will be received any more: the other end was dropped, or either closed.
    pub async fn closed(&self) {
        self.queue.closed().await;
    }

    /// Whether nothing posted here will be received any more.
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// How many messages the other end holds at most, if there is a bound.
    pub fn capacity(&self) -> Option<usize> {
        self.queue.capacity()
    }
}

impl<Out> fmt::Debug for Poster<Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poster").field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

impl<In, Out> MessagePort<In, Out> {
    pub(super) fn new(id: u64, incoming: Receiver<In>, poster: Poster<Out>) -> Self {
        Self { id, incoming, poster }
    }

    /// The next message; `None` when the port is closed and everything was received.
    ///
    /// On tokio, gives way to other tasks now and then even if there is always a message.
    ///
    /// # Cancel safety
    /// No message is lost.
    pub async fn receive(&mut self) -> Option<In> {
        poll_fn(|cx| self.poll_receive(cx)).await
    }

    /// [`receive`](Self::receive) for hand-written futures.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<In>> {
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        if self.incoming.looks_empty() {
            Patience::TASK.look(|| !self.incoming.looks_empty());
        }
        let next = self.incoming.poll_receive(cx);
        if next.is_ready() {
            coop.made_progress();
        }
        next
    }

    /// [`receive`](Self::receive), blocking the thread.
    pub fn receive_blocking(&mut self) -> Option<In> {
        match self.incoming.try_receive() {
            Ok(message) => return Some(message),
            Err(TryReceive::Closed) => return None,
            Err(TryReceive::Empty) => {}
        }
        Patience::THREAD.look(|| !self.incoming.looks_empty());
        block_on(poll_fn(|cx| self.incoming.poll_receive(cx)))
    }

    /// [`receive_blocking`](Self::receive_blocking), for no longer than `limit`.
    ///
    /// # Errors
    /// [`TryReceiveError::Empty`]: nothing came in time.
    pub fn receive_timeout(&mut self, limit: Duration) -> Result<In, TryReceiveError> {
        match self.incoming.try_receive() {
            Ok(message) => return Ok(message),
            Err(TryReceive::Closed) => return Err(TryReceiveError::Closed),
            Err(TryReceive::Empty) => {}
        }
        // A limit beyond what the clock can say is none.
        let deadline = Instant::now().checked_add(limit);
        match block_on_until(poll_fn(|cx| self.incoming.poll_receive(cx)), deadline) {
            Some(Some(message)) => Ok(message),
            Some(None) => Err(TryReceiveError::Closed),
            None => Err(TryReceiveError::Empty),
        }
    }

    /// The next message if there is one (Node: `receiveMessageOnPort`). Does not wait.
    ///
    /// # Errors
    /// [`TryReceiveError`].
    pub fn try_receive(&mut self) -> Result<In, TryReceiveError> {
        self.incoming.try_receive().map_err(Into::into)
    }

    /// Closes both directions at once: neither end can post any more. What was posted before can still be received, by
    /// either; then both see the end. Closing twice is harmless.
    pub fn close(&self) {
        // In this order, so that who sees the end of what it receives cannot post any more either.
        self.incoming.close();
        self.poster.queue.close();
    }

    /// How many messages wait here.
    pub fn waiting(&self) -> usize {
        self.incoming.len()
    }

    /// Posts to the other end, for other threads and tasks.
    pub fn poster(&self) -> Poster<Out> {
        self.poster.clone()
    }

    /// Makes the port ready to be sent in a message on `through`, where its type is part of what it carries.
    ///
    /// # Errors
    /// [`CyclicTransfer`] with the port, if that message would go, directly or by way of other transferred ports, into
    /// the port's own queue. Nobody could take it out again: neither the port nor what waits in it would ever be
    /// dropped.
    pub fn transfer<T>(
        self,
        through: &Poster<T>,
    ) -> Result<Transferred<In, Out>, CyclicTransfer<Self>> {
        let mut in_transit = lock(&IN_TRANSIT);
        let mut place = through.to;
        loop {
            if place == self.id {
                drop(in_transit);
                return Err(CyclicTransfer(self));
            }
            match in_transit.get(&place) {
                Some(next) => place = *next,
                None => break,
            }
        }
        in_transit.insert(self.id, through.to);
        Ok(Transferred { id: self.id, port: Some(self) })
    }

    /// Ends both directions from outside, without keeping them open.
    pub(super) fn closers(&self) -> (Closer<In>, Closer<Out>) {
        (self.incoming.closer(), self.poster.queue.closer())
    }
}

impl<In, Out> std::ops::Deref for MessagePort<In, Out> {
    type Target = Poster<Out>;

    fn deref(&self) -> &Poster<Out> {
        &self.poster
    }
}

impl<In, Out> fmt::Debug for MessagePort<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessagePort")
            .field("closed", &self.is_closed())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

/// Takes one message that waits at a port, in order, or none (Node: `receiveMessageOnPort`).
pub fn receive_message_on_port<In, Out>(port: &mut MessagePort<In, Out>) -> Option<In> {
    port.try_receive().ok()
}

/// A port on its way in a message; see [`MessagePort::transfer`].
///
/// The receiver [opens](Self::open) it. Dropped with its message, it drops the port.
pub struct Transferred<In, Out> {
    id: u64,
    /// Always there until it is opened.
    port: Option<MessagePort<In, Out>>,
}

impl<In, Out> Transferred<In, Out> {
    /// The port, at its new place.
    pub fn open(mut self) -> MessagePort<In, Out> {
        self.port.take().expect("opened once, since it consumes itself")
    }
}

impl<In, Out> Drop for Transferred<In, Out> {
    fn drop(&mut self) {
        lock(&IN_TRANSIT).remove(&self.id);
    }
}

impl<In, Out> fmt::Debug for Transferred<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transferred({})", self.id)
    }
}

/// The port would have been sent into its own queue (Node: `DataCloneError`). Here it is back, unharmed.
#[derive(thiserror::Error)]
#[error("cannot transfer a port into its own queue")]
pub struct CyclicTransfer<P>(pub P);

impl<P> fmt::Debug for CyclicTransfer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CyclicTransfer(..)")
    }
}
