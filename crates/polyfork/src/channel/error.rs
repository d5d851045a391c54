//! What can go wrong on a channel, and what is given back then.
//!
//! A fault of the other end costs that channel and nothing else.

use std::time::Duration;

use polyfork_wire::ProtocolError;

/// Why a channel ended before its time: the other end broke the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("channel ended: {0}")]
pub struct ChannelError(#[from] pub(super) ProtocolError);

impl ChannelError {
    /// What the other end did.
    pub fn fault(&self) -> &ProtocolError {
        &self.0
    }
}

/// Why a message was not sent. Nothing of it has left then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The channel is disconnected (Node: `ERR_IPC_CHANNEL_CLOSED`).
    #[error("channel is disconnected")]
    Disconnected,
    /// The value cannot be written in the encoding of the channel.
    #[error("cannot encode the message: {0}")]
    Encode(String),
    /// The encoded message is longer than [`Limits::max_message`](polyfork_wire::Limits::max_message).
    #[error("message is longer than the limit of {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
    /// On a channel to Node an object whose `cmd` begins with `NODE_` is a message of Node's own.
    #[error("message has a cmd that begins with NODE_, which Node keeps to itself")]
    Reserved,
    /// The other end has no use for such a handle, or would crash on it.
    #[error("handle cannot be sent: {0}")]
    Handle(&'static str),
}

/// Why [`Sender::try_send`](super::Sender::try_send) did not send. The message is given back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrySendError<T> {
    /// Too much is waiting to be written.
    #[error("channel is full")]
    Full(T),
    /// The channel is disconnected.
    #[error("channel is disconnected")]
    Closed(T),
    /// This message will never go.
    #[error("{1}")]
    Refused(T, SendError),
}

impl<T> TrySendError<T> {
    /// The message.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(message) | Self::Closed(message) | Self::Refused(message, _) => message,
        }
    }
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// It was not sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// No answer in time. One that comes later is dropped.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    /// The other end says that there will be none.
    #[error("the other end does not answer this request")]
    Refused,
    /// The channel ended first.
    #[error("channel was disconnected before the answer came")]
    Disconnected,
}

/// Why a message is not of the expected type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("message is not of the expected type: {0}")]
pub struct DecodeError(pub(super) String);

/// [`disconnect`](super::Sender::disconnect) was called on a channel that is not connected (Node:
/// `ERR_IPC_DISCONNECTED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("channel is already disconnected")]
pub struct AlreadyDisconnected;
