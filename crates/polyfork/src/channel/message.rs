//! A message that came: its value, its handles, and the way back for the answer.
//!
//! How it was cut out of the stream is in `codec`, what becomes of answers in `engine`.

use std::fmt;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use polyfork_wire::node::advanced::{self, Value};
use polyfork_wire::node::message::UserMessage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::count::Counted;
use super::engine::{Kind, Shared};
use super::{DecodeError, Handle, Reply, RequestError, SendError};

/// What a message counts for beyond its bytes, when it waits to be received.
const WEIGHT_BYTES: usize = 128;
/// Bodies up to this length are kept where they are: a cache line with their length and what they are.
const SMALL_BYTES: usize = 62;
/// What a handle counts for: the system has few of them.
const HANDLE_WEIGHT_BYTES: usize = 4096;

/// A value as it travelled.
#[derive(Clone)]
pub(super) enum Body {
    Json(UserMessage),
    Advanced(Box<Advanced>),
    Native(Bytes),
    /// The same, for the many that are so small that moving them costs less than a place of their own.
    Small(Small),
}

/// Bytes that are kept where they are.
#[derive(Clone)]
pub(super) struct Small {
    length: u8,
    bytes: [u8; SMALL_BYTES],
}

#[derive(Clone)]
pub(super) struct Advanced {
    pub(super) value: Value,
    /// The message is the `body` of this object.
    pub(super) wrapped: bool,
    /// As it travelled.
    pub(super) bytes: usize,
}

impl Body {
    /// A copy of what came on a native channel.
    pub(super) fn native(bytes: &[u8]) -> Body {
        match u8::try_from(bytes.len()) {
            Ok(length) if bytes.len() <= SMALL_BYTES => {
                let mut small = Small { length, bytes: [0; SMALL_BYTES] };
                small.bytes[..bytes.len()].copy_from_slice(bytes);
                Body::Small(small)
            }
            _ => Body::Native(Bytes::copy_from_slice(bytes)),
        }
    }

    pub(super) fn to<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        match self {
            Body::Json(json) => json.parse().map_err(|e| DecodeError(e.to_string())),
            Body::Advanced(advanced) => {
                #[derive(Deserialize)]
                struct Wrapped<T> {
                    body: T,
                }
                let value = advanced.value.clone();
                let read = if advanced.wrapped {
                    advanced::from_value(value).map(|Wrapped { body }| body)
                } else {
                    advanced::from_value(value)
                };
                read.map_err(|error| DecodeError(error.to_string()))
            }
            Body::Native(bytes) => decode(bytes),
            Body::Small(small) => decode(small.bytes()),
        }
    }

    pub(super) fn to_borrowed<'a, T: Deserialize<'a>>(&'a self) -> Result<T, DecodeError> {
        match self {
            Body::Json(json) => {
                serde_json::from_str(json.as_str()).map_err(|e| DecodeError(e.to_string()))
            }
            Body::Advanced(_) => Err(DecodeError(
                "the advanced encoding keeps nothing that could be borrowed: use `to`".into(),
            )),
            Body::Native(bytes) => decode(bytes),
            Body::Small(small) => decode(small.bytes()),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Body::Json(json) => json.as_str().len(),
            Body::Advanced(advanced) => advanced.bytes,
            Body::Native(bytes) => bytes.len(),
            Body::Small(small) => small.length.into(),
        }
    }
}

impl Small {
    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// A message that was received.
pub struct Message {
    body: Body,
    /// Most have nothing but a body, and each is moved several times on its way.
    rest: Option<Box<Rest>>,
}

/// What some messages have besides.
#[derive(Default)]
pub(super) struct Rest {
    pub(super) handles: Vec<Handle>,
    pub(super) counted: Option<Counted>,
    pub(super) answer: Option<Answer>,
}

impl Message {
    /// A message that came by other means than a channel: from a thread.
    pub(crate) fn local(bytes: Bytes, handles: Vec<Handle>, answer: Option<Answer>) -> Self {
        Self::new(Body::Native(bytes), Rest { handles, counted: None, answer })
    }

    /// Reads the message as a value of type `T`.
    ///
    /// # Errors
    /// When it does not have that shape.
    pub fn to<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        self.body.to()
    }

    /// Reads the message as a value that borrows texts (`&str`) and bytes (`&[u8]`) from it, so that nothing is copied and no
    /// memory asked for.
    ///
    /// ```
    /// # use polyfork::channel::Message;
    /// #[derive(serde::Deserialize)]
    /// struct Line<'a> {
    ///     number: u64,
    ///     text: &'a str,
    /// }
    /// fn length(message: &Message) -> Option<usize> {
    ///     let line: Line<'_> = message.to_borrowed().ok()?;
    ///     Some(line.text.len())
    /// }
    /// ```
    ///
    /// # Errors
    /// When it does not have that shape; for a text with escapes in JSON, which cannot be borrowed (`Cow` takes both with
    /// `#[serde(borrow)]`); and always in Node's advanced encoding.
    pub fn to_borrowed<'a, T: Deserialize<'a>>(&'a self) -> Result<T, DecodeError> {
        self.body.to_borrowed()
    }

    /// The JSON text, when the channel speaks JSON.
    pub fn json(&self) -> Option<&str> {
        match &self.body {
            Body::Json(json) => Some(json.as_str()),
            Body::Advanced(_) | Body::Native(_) | Body::Small(_) => None,
        }
    }

    /// The value as it was sent, when the channel speaks Node's advanced encoding: with maps, sets, dates, big
    /// integers, buffers and cycles. A request is the member `body` of it.
    pub fn value(&self) -> Option<&Value> {
        match &self.body {
            Body::Advanced(advanced) => Some(&advanced.value),
            Body::Json(_) | Body::Native(_) | Body::Small(_) => None,
        }
    }

    /// Takes the handle that came with it; with several, the next one. Handles that are not taken are closed
    /// with the message.
    pub fn take_handle(&mut self) -> Option<Handle> {
        let rest = self.rest.as_mut().filter(|rest| !rest.handles.is_empty())?;
        Some(rest.handles.remove(0))
    }

    /// The handles that came with it and were not taken.
    pub fn handles(&self) -> &[Handle] {
        self.rest.as_ref().map_or(&[], |rest| &rest.handles)
    }

    /// Takes all handles.
    pub fn take_handles(&mut self) -> Vec<Handle> {
        self.rest.as_mut().map(|rest| std::mem::take(&mut rest.handles)).unwrap_or_default()
    }

    /// For a connection that a Node server accepted: keep this beside the connection and drop it when the
    /// connection is closed. The server's `getConnections` counts it until then, and its `close` waits.
    /// `None` for everything else.
    pub fn take_counted(&mut self) -> Option<Counted> {
        self.rest.as_mut()?.counted.take()
    }

    /// Whether the other end waits for an answer.
    pub fn wants_reply(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| rest.answer.is_some())
    }

    /// Answers a request. A request that is dropped without is answered as refused.
    ///
    /// An answer to a message that was no request goes nowhere, and so does one that comes after the asker's
    /// deadline.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn reply<T: Serialize + ?Sized>(mut self, value: &T) -> Result<(), SendError> {
        match self.take_answer() {
            Some(answer) => answer.give(value).await,
            None => Ok(()),
        }
    }

    /// Splits the way back off, to answer after the message was taken apart.
    pub fn take_answer(&mut self) -> Option<Answer> {
        self.rest.as_mut()?.answer.take()
    }

    pub(super) fn new(body: Body, rest: Rest) -> Message {
        let plain = rest.handles.is_empty() && rest.counted.is_none() && rest.answer.is_none();
        Message { body, rest: (!plain).then(|| Box::new(rest)) }
    }

    pub(super) fn plain(body: Body) -> Message {
        Message { body, rest: None }
    }

    pub(super) fn weight(&self) -> usize {
        WEIGHT_BYTES + self.body.len() + self.handles().len() * HANDLE_WEIGHT_BYTES
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Json(json) => write!(f, "Message({}", json.as_str())?,
            Body::Advanced(advanced) => write!(f, "Message({:?}", advanced.value)?,
            Body::Native(_) | Body::Small(_) => write!(f, "Message({} bytes", self.body.len())?,
        }
        for handle in self.handles() {
            write!(f, ", {handle:?}")?;
        }
        f.write_str(if self.wants_reply() { ", wants a reply)" } else { ")" })
    }
}

/// The way back for the answer to one request. Dropped, it tells the asker that there is none.
pub struct Answer {
    /// Gone when it was given.
    way: Option<Way>,
}

enum Way {
    Channel { id: u64, channel: Weak<Shared> },
    Thread(oneshot::Sender<Option<Body>>),
}

impl Answer {
    pub(super) fn new(id: u64, channel: Weak<Shared>) -> Answer {
        Answer { way: Some(Way::Channel { id, channel }) }
    }

    /// The way back to a thread of this process, and where the answer will be.
    pub(crate) fn local() -> (Answer, Asked) {
        let (sender, receiver) = oneshot::channel();
        (Answer { way: Some(Way::Thread(sender)) }, Asked(receiver))
    }

    /// Sends the answer. Waits while the channel is full.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn give<T: Serialize + ?Sized>(mut self, value: &T) -> Result<(), SendError> {
        match &self.way {
            Some(Way::Channel { id, channel }) => {
                let channel = channel.upgrade().ok_or(SendError::Disconnected)?;
                channel.send(Kind::Reply(*id), value, Vec::new()).await?;
                self.way = None;
            }
            Some(Way::Thread(_)) => {
                let bytes = encode(value)?;
                if let Some(Way::Thread(asker)) = self.way.take() {
                    // Nobody waits for it any more: then it was too late.
                    drop(asker.send(Some(Body::Native(bytes))));
                }
            }
            None => {}
        }
        Ok(())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        match self.way.take() {
            Some(Way::Channel { id, channel }) => {
                if let Some(channel) = channel.upgrade() {
                    channel.refuse(id);
                }
            }
            Some(Way::Thread(asker)) => drop(asker.send(None)),
            None => {}
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Some(Way::Channel { id, .. }) => write!(f, "Answer({id})"),
            Some(Way::Thread(_)) => f.write_str("Answer(to a thread)"),
            None => f.write_str("Answer(given)"),
        }
    }
}

/// Where the answer of a thread will be.
pub(crate) struct Asked(oneshot::Receiver<Option<Body>>);

impl Asked {
    /// Waits for it, at most for `limit`.
    pub(crate) async fn answer(self, limit: Duration) -> Result<Reply, RequestError> {
        match tokio::time::timeout(limit, self.0).await {
            Err(_elapsed) => Err(RequestError::Deadline(limit)),
            Ok(Err(_gone)) => Err(RequestError::Disconnected),
            Ok(Ok(None)) => Err(RequestError::Refused),
            Ok(Ok(Some(body))) => Ok(Reply(body)),
        }
    }
}

/// A value as the native encoding has it.
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes, SendError> {
    match postcard::to_stdvec(value) {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) => Err(SendError::Encode(error.to_string())),
    }
}

/// Reads what [`encode`] wrote.
pub(crate) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(DecodeError("bytes follow its value".into())),
        Err(error) => Err(DecodeError(error.to_string())),
    }
}
