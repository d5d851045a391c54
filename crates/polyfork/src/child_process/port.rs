//! The typed port of an entry: over a channel to another process, or over a message port to another thread.
//!
//! Both carry the same things in the same order: values, handles, requests and their answers. `entry` gives a port to
//! the function, `place` keeps the other end.
//!
//! The rule that surprises: between threads a value that is [posted](Port::post_message) moves, and one that is sent by
//! reference is written and read, as it would be between processes. So nothing is cloned behind anybody's back, and a
//! type that cannot be read again is found out in a thread as well.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::channel::{
    AlreadyDisconnected, Answer, Channel, ChannelError, DecodeError, Handle, Message, Reply,
    RequestError, SendError, Sender, decode, encode,
};
use crate::worker_threads::{MessagePort, Poster, WorkerError};

/// One end of a typed channel: gets `In`, sends `Out`.
pub struct Port<In, Out> {
    link: Link<In, Out>,
}

enum Link<In, Out> {
    Process { channel: Channel, framing: Framing, types: PhantomData<fn(Out) -> In> },
    Thread(MessagePort<Packet<In>, Packet<Out>>),
}

/// Whether a child wraps its messages, to tell its parent more than messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    None,
    /// This is the child.
    Child,
    /// This is the parent of one that does.
    Parent,
}

/// What a child sends that tells its events.
#[derive(Serialize)]
pub(super) enum ToParent<'a, T> {
    Online,
    Message(&'a T),
    Failed(&'a str),
    Panicked(&'a str),
}

impl<'a, T> ToParent<'a, T> {
    pub(super) fn error(error: &'a WorkerError) -> Self {
        match error {
            WorkerError::Panicked(text) => Self::Panicked(text),
            other => Self::Failed(other.text()),
        }
    }
}

/// [`ToParent`] as it is read: the same variants in the same order.
#[derive(Deserialize)]
enum FromChild<T> {
    Online,
    Message(T),
    Failed(String),
    Panicked(String),
}

/// A message between threads.
pub(super) struct Packet<T> {
    value: Value<T>,
    handles: Vec<Handle>,
    answer: Option<Answer>,
}

enum Value<T> {
    Moved(T),
    Written(Bytes),
}

impl<T> Packet<T> {
    fn moved(value: T) -> Self {
        Self { value: Value::Moved(value), handles: Vec::new(), answer: None }
    }
}

/// What came from the other end.
pub(super) enum Arrival<T> {
    Online,
    Message(T, Message),
    Error(WorkerError),
}

/// Why nothing was received on a [`Port`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PortError {
    /// The other end broke the protocol; the channel has ended.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A message is not of type `In`. The next ones can be received.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl<In, Out> Port<In, Out> {
    /// A typed port over a channel.
    pub fn new(channel: Channel) -> Self {
        Self::framed(channel, Framing::None)
    }

    pub(super) fn framed(channel: Channel, framing: Framing) -> Self {
        Self { link: Link::Process { channel, framing, types: PhantomData } }
    }

    pub(super) fn of_thread(port: MessagePort<Packet<In>, Packet<Out>>) -> Self {
        Self { link: Link::Thread(port) }
    }

    /// Ends the channel after everything was written; see [`Sender::disconnect`].
    ///
    /// # Errors
    /// [`AlreadyDisconnected`].
    pub async fn disconnect(&self) -> Result<(), AlreadyDisconnected> {
        match &self.link {
            Link::Process { channel, .. } => channel.disconnect().await,
            Link::Thread(port) if port.is_closed() => Err(AlreadyDisconnected),
            Link::Thread(port) => {
                port.close();
                Ok(())
            }
        }
    }

    /// Whether messages can be sent.
    pub fn is_connected(&self) -> bool {
        match &self.link {
            Link::Process { channel, .. } => channel.is_connected(),
            Link::Thread(port) => !port.is_closed(),
        }
    }

    /// The sending half, for other tasks.
    pub fn sender(&self) -> PortSender<Out> {
        let way = match &self.link {
            Link::Process { channel, framing, .. } => Way::Process(channel.sender(), *framing),
            Link::Thread(port) => Way::Thread(port.poster()),
        };
        PortSender { way }
    }

    /// The channel, without types.
    ///
    /// # Errors
    /// The port, if there is none: the other end is a thread, or the messages are wrapped because a parent follows the
    /// [events](super::Started) of its child.
    pub fn into_channel(self) -> Result<Channel, Self> {
        match self.link {
            Link::Process { channel, framing: Framing::None, .. } => Ok(channel),
            link => Err(Self { link }),
        }
    }
}

impl<In: DeserializeOwned, Out: Serialize> Port<In, Out> {
    /// The next message; `None` when the channel has ended. Cancel safe.
    ///
    /// # Errors
    /// [`PortError`].
    pub async fn recv(&mut self) -> Result<Option<In>, PortError> {
        Ok(self.recv_message().await?.map(|(value, _message)| value))
    }

    /// The next message with its handles and the way to answer it. Cancel safe.
    ///
    /// The value is taken out of the message.
    ///
    /// # Errors
    /// [`PortError`].
    pub async fn recv_message(&mut self) -> Result<Option<(In, Message)>, PortError> {
        loop {
            match self.arrival().await? {
                Some(Arrival::Message(value, message)) => return Ok(Some((value, message))),
                // For those who follow events.
                Some(Arrival::Online | Arrival::Error(_)) => {}
                None => return Ok(None),
            }
        }
    }

    pub(super) async fn arrival(&mut self) -> Result<Option<Arrival<In>>, PortError> {
        match &mut self.link {
            Link::Process { channel, framing, .. } => {
                let Some(message) = channel.recv().await? else { return Ok(None) };
                if *framing != Framing::Parent {
                    return Ok(Some(Arrival::Message(message.to()?, message)));
                }
                Ok(Some(match message.to()? {
                    FromChild::Online => Arrival::Online,
                    FromChild::Message(value) => Arrival::Message(value, message),
                    FromChild::Failed(text) => Arrival::Error(WorkerError::Failed(text)),
                    FromChild::Panicked(text) => Arrival::Error(WorkerError::Panicked(text)),
                }))
            }
            Link::Thread(port) => {
                let Some(Packet { value, handles, answer }) = port.receive().await else {
                    return Ok(None);
                };
                let (value, bytes) = match value {
                    Value::Moved(value) => (value, Bytes::new()),
                    Value::Written(bytes) => (decode(&bytes)?, bytes),
                };
                let message = Message::local(bytes, handles, answer);
                Ok(Some(Arrival::Message(value, message)))
            }
        }
    }

    /// Sends a message; see [`Sender::send`]. To a thread it is written and read as well, and at most 1024 wait;
    /// [`post_message`](Self::post_message) saves that.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, message: &Out) -> Result<(), SendError> {
        match &self.link {
            Link::Process { channel, framing, .. } => send(channel, *framing, message).await,
            Link::Thread(port) => pass(port, message, Vec::new(), None).await,
        }
    }

    /// Sends a message that is not needed here any more: to a thread it moves, without being written or cloned.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn post_message(&self, message: Out) -> Result<(), SendError> {
        match &self.link {
            Link::Process { channel, framing, .. } => send(channel, *framing, &message).await,
            Link::Thread(port) => post(port, message).await,
        }
    }

    /// Sends a message with a handle; see [`Sender::send_with`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send_with(
        &self,
        message: &Out,
        handle: impl Into<Handle>,
    ) -> Result<(), SendError> {
        match &self.link {
            Link::Process { channel, framing: Framing::Child, .. } => {
                channel.send_with(&ToParent::Message(message), handle).await
            }
            Link::Process { channel, .. } => channel.send_with(message, handle).await,
            Link::Thread(port) => pass(port, message, vec![handle.into()], None).await,
        }
    }

    /// Asks, and waits for the answer, which may be of any type the two agree on; see [`Sender::request`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(&self, message: &Out, limit: Duration) -> Result<Reply, RequestError> {
        match &self.link {
            Link::Process { channel, framing: Framing::Child, .. } => {
                channel.request(&ToParent::Message(message), limit).await
            }
            Link::Process { channel, .. } => channel.request(message, limit).await,
            Link::Thread(port) => {
                let (answer, asked) = Answer::local();
                let sent = pass(port, message, Vec::new(), Some(answer));
                // The limit includes the time it takes to be sent.
                let start = tokio::time::Instant::now();
                match tokio::time::timeout(limit, sent).await {
                    Ok(sent) => sent?,
                    Err(_elapsed) => return Err(RequestError::Deadline(limit)),
                }
                match asked.answer(limit.saturating_sub(start.elapsed())).await {
                    Err(RequestError::Deadline(_)) => Err(RequestError::Deadline(limit)),
                    answered => answered,
                }
            }
        }
    }
}

async fn send<Out: Serialize>(
    sender: &Sender,
    framing: Framing,
    message: &Out,
) -> Result<(), SendError> {
    match framing {
        Framing::Child => sender.send(&ToParent::Message(message)).await,
        Framing::None | Framing::Parent => sender.send(message).await,
    }
}

async fn post<Out>(poster: &Poster<Packet<Out>>, message: Out) -> Result<(), SendError> {
    let posted = poster.post_message(Packet::moved(message)).await;
    posted.map_err(|_given_back| SendError::Disconnected)
}

async fn pass<Out: Serialize>(
    poster: &Poster<Packet<Out>>,
    message: &Out,
    handles: Vec<Handle>,
    answer: Option<Answer>,
) -> Result<(), SendError> {
    let value = Value::Written(encode(message)?);
    let posted = poster.post_message(Packet { value, handles, answer }).await;
    posted.map_err(|_given_back| SendError::Disconnected)
}

impl<In, Out> fmt::Debug for Port<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.link {
            Link::Process { channel, .. } => f.debug_tuple("Port").field(channel).finish(),
            Link::Thread(port) => f.debug_tuple("Port").field(port).finish(),
        }
    }
}

/// The sending half of a [`Port`]; clone it freely.
pub struct PortSender<Out> {
    way: Way<Out>,
}

enum Way<Out> {
    Process(Sender, Framing),
    Thread(Poster<Packet<Out>>),
}

impl<Out: Serialize> PortSender<Out> {
    /// [`Port::send`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, message: &Out) -> Result<(), SendError> {
        match &self.way {
            Way::Process(sender, framing) => send(sender, *framing, message).await,
            Way::Thread(poster) => pass(poster, message, Vec::new(), None).await,
        }
    }

    /// [`Port::post_message`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn post_message(&self, message: Out) -> Result<(), SendError> {
        match &self.way {
            Way::Process(sender, framing) => send(sender, *framing, &message).await,
            Way::Thread(poster) => post(poster, message).await,
        }
    }
}

impl<Out> Clone for PortSender<Out> {
    fn clone(&self) -> Self {
        let way = match &self.way {
            Way::Process(sender, framing) => Way::Process(sender.clone(), *framing),
            Way::Thread(poster) => Way::Thread(poster.clone()),
        };
        Self { way }
    }
}

impl<Out> fmt::Debug for PortSender<Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::Process(sender, _) => f.debug_tuple("PortSender").field(sender).finish(),
            Way::Thread(poster) => f.debug_tuple("PortSender").field(poster).finish(),
        }
    }
}
