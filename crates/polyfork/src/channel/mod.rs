//! The channel between two processes: messages and handles, in the encoding the other end speaks.
//!
//! One type for all: between two Rust programs, and to a Node process at either end. What travels is in
//! `polyfork-wire`; `codec` translates, `engine` reads and writes, `count` keeps Node's books on
//! connections. Who starts the other process is [`child_process`](crate::child_process), and
//! [`process::channel`](crate::process::channel) is the end that a child has.
//!
//! # A Node script that answers requests
//!
//! ```js
//! process.on('message', (m) => {
//!   if (m?.polyfork === 'request') process.send({ ...m, polyfork: 'reply', body: answer(m.body) });
//! });
//! ```
//!
//! A script asks the same way: it sends `{ polyfork: 'request', id, body }` with an `id` of its own, a whole
//! number, and gets `{ polyfork: 'reply', id, body }`, or `{ polyfork: 'refused', id }` when the Rust program
//! has no answer.
//!
//! The rule that surprises: nothing says good-bye on the wire. A channel ends when its socket is closed, so
//! [`disconnect`](Sender::disconnect) first writes everything that is queued, and a message that was cut off at the end of
//! the stream is dropped without an error.
//!
//! Behaviour follows: Node `lib/internal/child_process.js`.

mod codec;
mod count;
mod engine;
mod error;
mod handle;
mod message;
mod ring;
pub(crate) mod socket;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use count::Counted;
use engine::{Kind, Shared};
pub use error::{
    AlreadyDisconnected, ChannelError, DecodeError, RequestError, SendError, TrySendError,
};
pub use handle::Handle;
pub use message::{Answer, Message};
pub(crate) use message::{decode, encode};
pub use polyfork_wire::node::advanced;
pub use polyfork_wire::{Limits, ProtocolError};

/// How messages are written. Both ends must agree; whoever starts a process tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Encoding {
    /// Node's default: a line of JSON each.
    Json,
    /// Node's `serialization: 'advanced'`: V8's structured clone, so that maps, sets, dates, big integers,
    /// buffers and cycles arrive as what they are ([`Message::value`]).
    Advanced,
    /// Between two programs built on this crate: postcard, many messages in one system call, up to 253 handles
    /// with each. Both programs must agree on the types: a value does not tell what it is.
    Native,
}

/// One end of a channel to another process.
///
/// Messages arrive once and in the order they were sent. Both directions are bounded: [`send`](Sender::send)
/// waits while 256 KiB are queued here, and when this end does not receive, reading stops after 1 MiB
/// (16 MiB while a handle or a request waits for its answer), so that the other end has to wait too.
///
/// Dropping a channel and all its senders writes what is queued and then closes it, in the background, as
/// long as the tokio runtime it was made in goes on.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use polyfork::channel::Channel;
///
/// let (mut here, mut there) = Channel::pair()?;
/// here.send(&("rows", 3_u32)).await?;
/// here.disconnect().await?;
///
/// while let Some(message) = there.recv().await? {
///     assert_eq!(message.to::<(String, u32)>()?, ("rows".to_owned(), 3));
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Channel {
    receiver: Receiver,
    sender: Sender,
}

/// The sending half of a [`Channel`]; clone it freely.
#[derive(Clone)]
pub struct Sender(Arc<Owner>);

/// The receiving half of a [`Channel`].
///
/// When it is dropped, what comes is dropped, and requests are refused.
pub struct Receiver {
    ready: VecDeque<Message>,
    owner: Arc<Owner>,
}

/// Ends the channel with the last half.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.owner.0.receiver_gone();
    }
}

impl Channel {
    /// A channel over a connected Unix stream socket, with [`Limits::default`]. For sockets that were made in
    /// some other way; must be called inside a tokio runtime with I/O and time enabled.
    ///
    /// # Errors
    /// Those of the event loop.
    pub fn new(socket: OwnedFd, encoding: Encoding) -> io::Result<Channel> {
        Channel::with_limits(socket, encoding, Limits::default())
    }

    /// [`Channel::new`] with limits of one's own on what the other end may send, and, for the length of a
    /// message, on what is sent to it.
    ///
    /// # Errors
    /// Those of the event loop.
    pub fn with_limits(socket: OwnedFd, encoding: Encoding, limits: Limits) -> io::Result<Channel> {
        polyfork_sys::channel::set_nonblocking(socket.as_fd(), true)?;
        let owner = Arc::new(Owner(Shared::start(socket, encoding, limits)?));
        let receiver = Receiver { ready: VecDeque::new(), owner: Arc::clone(&owner) };
        Ok(Channel { receiver, sender: Sender(owner) })
    }

    /// Two ends that are connected, in the native encoding: within one process, or to give one away.
    ///
    /// # Errors
    /// No descriptors left; those of the event loop.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (one, other) = polyfork_sys::channel::pair()?;
        Ok((Channel::new(one, Encoding::Native)?, Channel::new(other, Encoding::Native)?))
    }

    /// [`Receiver::recv`].
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    #[inline]
    pub async fn recv(&mut self) -> Result<Option<Message>, ChannelError> {
        self.receiver.recv().await
    }

    /// A sending half, for other tasks.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Both halves.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Resolves when the channel has ended, without keeping it.
    pub(crate) fn closed_by_itself(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let ended = self.sender.0.0.ending();
        async move {
            let mut ended = ended;
            // An error means that nobody has the channel any more.
            let _ended = ended.wait_for(|ended| *ended).await;
        }
    }

    /// The process at the other end has ended; see `engine`.
    pub(crate) fn process_ended(&self) -> impl Fn() + Send + Sync + 'static + use<> {
        let shared = Arc::downgrade(&self.sender.0.0);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.process_ended();
            }
        }
    }
}

impl std::ops::Deref for Channel {
    type Target = Sender;

    fn deref(&self) -> &Sender {
        &self.sender
    }
}

impl Receiver {
    /// The next message; `None` when the channel has ended and everything was received.
    ///
    /// Cancel safe. Waits without limit.
    ///
    /// # Errors
    /// [`ChannelError`], once, after the last good message, when the other end broke the protocol: nothing
    /// more is sent or received then.
    #[inline]
    pub async fn recv(&mut self) -> Result<Option<Message>, ChannelError> {
        if let Some(message) = self.ready.pop_front() {
            return Ok(Some(message));
        }
        tokio::task::consume_budget().await;
        let shared = &self.owner.0;
        let ready = &mut self.ready;
        let more = std::future::poll_fn(|cx| shared.poll_take(cx, ready)).await?;
        Ok(if more { self.ready.pop_front() } else { None })
    }
}

impl Sender {
    /// Sends a message. `Ok` means queued, in order; [`flush`](Self::flush) waits until it has left.
    ///
    /// Waits while more than 256 KiB are queued. Cancel safe: dropped before it is done, nothing was sent.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send<T: Serialize + ?Sized>(&self, message: &T) -> Result<(), SendError> {
        self.shared().send(Kind::Message, message, Vec::new()).await
    }

    /// Sends a message without waiting, or gives it back.
    ///
    /// # Errors
    /// [`TrySendError::Full`] when `send` would wait.
    pub fn try_send<T: Serialize>(&self, message: T) -> Result<(), TrySendError<T>> {
        match self.shared().try_send(&message) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TrySendError::Full(message)),
            Err(SendError::Disconnected) => Err(TrySendError::Closed(message)),
            Err(error) => Err(TrySendError::Refused(message, error)),
        }
    }

    /// Sends a message with a handle. Our copy is closed when the other end has it; keep a clone
    /// (`try_clone`) to go on using it.
    ///
    /// # Errors
    /// [`SendError::Handle`] before anything is sent, for what the other end cannot take; the handle is
    /// closed then.
    pub async fn send_with<T: Serialize + ?Sized>(
        &self,
        message: &T,
        handle: impl Into<Handle>,
    ) -> Result<(), SendError> {
        self.shared().send(Kind::Message, message, vec![handle.into()]).await
    }

    /// Sends a message with several handles, at most 253; to Node one.
    ///
    /// # Errors
    /// As [`send_with`](Self::send_with).
    pub async fn send_with_all<T: Serialize + ?Sized>(
        &self,
        message: &T,
        handles: Vec<Handle>,
    ) -> Result<(), SendError> {
        self.shared().send(Kind::Message, message, handles).await
    }

    /// Sends a message and waits for the answer, at most for `limit`, which includes the time it takes to be
    /// sent.
    ///
    /// An answer that comes too late is dropped: requests have numbers that are never used again. How a Node
    /// script answers is in the [module's description](self).
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request<T: Serialize + ?Sized>(
        &self,
        message: &T,
        limit: Duration,
    ) -> Result<Reply, RequestError> {
        match tokio::time::timeout(limit, self.shared().request(message)).await {
            Err(_elapsed) => Err(RequestError::Deadline(limit)),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(None)) => Err(RequestError::Disconnected),
            Ok(Ok(Some(None))) => Err(RequestError::Refused),
            Ok(Ok(Some(Some(body)))) => Ok(Reply(body)),
        }
    }

    /// Waits until everything that was sent so far has left this process.
    ///
    /// # Errors
    /// [`SendError::Disconnected`] when the channel ended first.
    pub async fn flush(&self) -> Result<(), SendError> {
        self.shared().flush().await
    }

    /// Ends the channel: takes nothing more at once, writes everything that is queued, then tells the other
    /// end. What it had sent before can still be received.
    ///
    /// Waits until all is written and every handle was received, which a peer that does not read can delay for
    /// ever. When the future is dropped, that goes on in the background.
    ///
    /// # Errors
    /// [`AlreadyDisconnected`] when it is not connected.
    pub async fn disconnect(&self) -> Result<(), AlreadyDisconnected> {
        if !self.shared().begin_disconnect() {
            return Err(AlreadyDisconnected);
        }
        self.shared().disconnected().await;
        Ok(())
    }

    /// Whether messages can be sent: false from [`disconnect`](Self::disconnect) on, and when the other end
    /// has disconnected or is gone.
    pub fn is_connected(&self) -> bool {
        self.shared().is_connected()
    }

    /// Resolves when the channel has ended in both directions. What was received before may still wait for
    /// [`recv`](Receiver::recv).
    pub async fn closed(&self) {
        self.shared().ended().await;
    }

    /// Whether messages may go through shared memory, on a native channel whose other end can do that. By default they
    /// may: once 64 KiB were sent in one direction, a ring of 68 KiB takes over for that direction, and what is in it
    /// does not enter the kernel. The order of messages, what is bounded and what is lost when a process dies stay
    /// the same. Each end decides for what it sends and for what it is sent, until a ring is in use.
    pub fn allow_ring(&self, allowed: bool) {
        self.shared().allow_ring(allowed);
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        self.shared().limits()
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }
}

/// The answer to a request.
#[derive(Clone)]
pub struct Reply(message::Body);

impl Reply {
    /// Reads the answer as a value of type `T`.
    ///
    /// # Errors
    /// When it does not have that shape.
    pub fn to<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        self.0.to()
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({} bytes)", self.0.len())
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("connected", &self.is_connected()).finish()
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("ready", &self.ready.len()).finish_non_exhaustive()
    }
}
