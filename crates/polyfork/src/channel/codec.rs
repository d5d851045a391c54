//! From bytes and descriptors to events, and from values to what is queued.
//!
//! One place for everything in which the encodings differ. What an event leads to is decided in `engine`.
//!
//! The rule that surprises: requests and answers to a Node process are ordinary messages of a fixed shape, so
//! that a script answers with one line and needs no library.
//!
//! Wire formats: `polyfork_wire::node` and `polyfork_wire::native`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use polyfork_wire::native::port::PortFrame;
use polyfork_wire::native::{FrameDecoder, MAX_DESCRIPTORS, NativeOutbox, NotPushed};
use polyfork_wire::node::cluster;
use polyfork_wire::node::inbox::Inbox;
use polyfork_wire::node::line::LineDecoder;
use polyfork_wire::node::message::{
    self, DgramType, HandleEnvelope, HandleKind, Incoming, UserMessage,
};
use polyfork_wire::node::outbox::Outbox;
use polyfork_wire::{Limits, ProtocolError, RawJson};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::message::Body;
use super::{Encoding, Handle, SendError};

/// Handle messages to a Node process that may be unacknowledged.
const WINDOW: usize = 8;
/// How often a connection is sent again when the other end says that it came without its descriptor.
const RETRANSMISSIONS: u8 = 3;

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Message,
    Request(u64),
    Reply(u64),
}

/// What came.
pub(super) enum Event {
    Message {
        body: Body,
        request: Option<u64>,
        handles: Vec<Handle>,
        /// Of a counted connection.
        key: Option<String>,
        /// To be acknowledged, before the message is passed on.
        acknowledge: bool,
    },
    Reply {
        id: u64,
        body: Body,
    },
    Refused {
        id: u64,
    },
    /// A handle of ours was received, or not.
    Acknowledged {
        nack: bool,
    },
    /// A handle message came without its descriptor, or without anything to be passed on.
    Answer {
        nack: bool,
    },
    /// How many connections of this key are open?
    Count {
        key: String,
    },
    /// Tell when no connection of this key is open.
    TellClosed {
        key: String,
    },
    Nothing,
}

/// Makes events of what is read.
pub(super) enum Decoder {
    Json { lines: LineDecoder, inbox: Inbox<Option<OwnedFd>>, limits: Limits },
    Native { frames: FrameDecoder<OwnedFd>, greeted: bool },
}

impl Decoder {
    pub(super) fn new(encoding: Encoding, limits: Limits) -> Decoder {
        match encoding {
            Encoding::Json => {
                Decoder::Json { lines: LineDecoder::new(limits), inbox: Inbox::new(limits), limits }
            }
            Encoding::Native => {
                Decoder::Native { frames: FrameDecoder::new(limits), greeted: false }
            }
        }
    }

    /// Takes what one read brought; `lost` says that it lost descriptors.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        fds: &mut VecDeque<OwnedFd>,
        lost: bool,
    ) -> Result<(), ProtocolError> {
        match self {
            Decoder::Json { lines, inbox, .. } => {
                for fd in fds.drain(..) {
                    inbox.push(Some(fd))?;
                }
                if lost {
                    // Its place is kept, so that the next one is not taken for it.
                    inbox.push(None)?;
                }
                lines.feed(bytes);
            }
            Decoder::Native { frames, .. } => {
                for fd in fds.drain(..) {
                    frames.push_descriptor(fd)?;
                }
                if lost {
                    frames.descriptors_lost();
                }
                frames.feed(bytes);
            }
        }
        Ok(())
    }

    /// The next event; `None` until more is fed.
    pub(super) fn next(&mut self) -> Result<Option<Event>, ProtocolError> {
        match self {
            Decoder::Json { lines, inbox, limits } => {
                let Some(line) = lines.next()? else {
                    // Descriptors that belong to no message are closed at once.
                    drop(inbox.settle(lines.has_partial()));
                    return Ok(None);
                };
                Ok(Some(json_event(message::parse(line, limits)?, inbox)))
            }
            Decoder::Native { frames, greeted } => {
                let Some(frame) = frames.next_with(|payload| native_event(payload, greeted))?
                else {
                    return Ok(None);
                };
                let mut event = frame.message;
                match &mut event {
                    Event::Message { handles, .. } => {
                        handles.extend(frame.descriptors.into_iter().map(Handle::look));
                    }
                    _ if !frame.descriptors.is_empty() => {
                        return Err(ProtocolError::SurplusDescriptor);
                    }
                    _ => {}
                }
                Ok(Some(event))
            }
        }
    }
}

fn native_event(payload: &[u8], greeted: &mut bool) -> Result<Event, ProtocolError> {
    let frame = PortFrame::read(payload)?;
    let first = !std::mem::replace(greeted, true);
    if first != (frame == PortFrame::Hello) {
        return Err(ProtocolError::BadFrame { why: "the greeting is missing or comes twice" });
    }
    let message = |body: &[u8], request| Event::Message {
        body: Body::Native(body.into()),
        request,
        handles: Vec::new(),
        key: None,
        acknowledge: false,
    };
    Ok(match frame {
        PortFrame::Hello => Event::Nothing,
        PortFrame::Message(body) => message(body, None),
        PortFrame::Request { id, body } => message(body, Some(id)),
        PortFrame::Reply { id, body } => Event::Reply { id, body: Body::Native(body.into()) },
        PortFrame::Refused { id } => Event::Refused { id },
    })
}

fn json_event(incoming: Incoming, inbox: &mut Inbox<Option<OwnedFd>>) -> Event {
    match incoming {
        Incoming::User(message) => user_event(message, Vec::new(), None, false),
        // The n-th descriptor belongs to the n-th envelope.
        Incoming::Handle(envelope) => match inbox.claim() {
            Ok(Some(fd)) => envelope_event(envelope, fd),
            Ok(None) | Err(_) => Event::Answer { nack: true },
        },
        Incoming::HandleAck => Event::Acknowledged { nack: false },
        Incoming::HandleNack => Event::Acknowledged { nack: true },
        Incoming::SocketGetCount { key } => Event::Count { key },
        Incoming::SocketNotifyClose { key } => Event::TellClosed { key },
        // The cluster's, or unknown: Node drops them silently as well.
        _ => Event::Nothing,
    }
}

fn envelope_event(envelope: HandleEnvelope, fd: OwnedFd) -> Event {
    let handle = Handle::from_node(fd, &envelope.kind);
    match *envelope.message {
        Incoming::User(message) => {
            let counted = matches!(handle, Some(Handle::TcpStream(_) | Handle::UnixStream(_)));
            let key = envelope.key.filter(|_| counted);
            user_event(message, handle.into_iter().collect(), key, true)
        }
        // A message of the cluster, for which there is no use here. It counts as received.
        _ => Event::Answer { nack: false },
    }
}

/// The shape of requests and answers between a Rust program and a script.
#[derive(Deserialize)]
struct Envelope<'a> {
    polyfork: &'a str,
    id: u64,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
}

fn user_event(
    message: UserMessage,
    handles: Vec<Handle>,
    key: Option<String>,
    acknowledge: bool,
) -> Event {
    let (message, request) = match numbered(&message) {
        Some(("request", id, Some(body))) => (body, Some(id)),
        Some(("reply", id, body)) if handles.is_empty() => {
            let body = body.unwrap_or_else(null);
            return Event::Reply { id, body: Body::Json(body) };
        }
        Some(("refused", id, _)) if handles.is_empty() => return Event::Refused { id },
        _ => (message, None),
    };
    Event::Message { body: Body::Json(message), request, handles, key, acknowledge }
}

fn null() -> UserMessage {
    RawJson::from_value(&()).expect("null is JSON").into()
}

fn numbered(message: &UserMessage) -> Option<(&'static str, u64, Option<UserMessage>)> {
    let text = message.as_str();
    if !text.starts_with('{') || !text.contains("\"polyfork\"") {
        return None;
    }
    let envelope: Envelope<'_> = serde_json::from_str(text).ok()?;
    let word = ["request", "reply", "refused"].into_iter().find(|w| *w == envelope.polyfork)?;
    let body = match envelope.body {
        Some(body) => Some(RawJson::new(body.get()).ok()?.into()),
        None => None,
    };
    Some((word, envelope.id, body))
}

/// A handle that is being sent. Our copy lives until the other end has it.
#[derive(Debug)]
pub(super) struct Passed {
    fd: OwnedFd,
    /// The line it travels with, while it may have to be sent again, and how often.
    again: Option<(Vec<u8>, u8)>,
}

impl AsFd for Passed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What is queued, in the order it leaves.
#[derive(Debug)]
pub(super) enum Outgoing {
    Node(Outbox<Passed>),
    Native(NativeOutbox<Passed>),
}

impl Outgoing {
    pub(super) fn new(encoding: Encoding) -> Outgoing {
        match encoding {
            Encoding::Json => Outgoing::Node(Outbox::new(WINDOW)),
            Encoding::Native => {
                let mut queue = NativeOutbox::new();
                let hello = |to: &mut Vec<u8>| {
                    PortFrame::Hello.write(to);
                    Ok::<_, std::convert::Infallible>(())
                };
                queue.push_with(Vec::new(), usize::MAX, hello).expect("a greeting fits");
                Outgoing::Native(queue)
            }
        }
    }

    /// Encodes a value to the end of the queue. On an error nothing is queued.
    pub(super) fn push<T: Serialize + ?Sized>(
        &mut self,
        kind: Kind,
        value: &T,
        handles: Vec<Handle>,
        most: usize,
    ) -> Result<(), SendError> {
        match self {
            Outgoing::Native(queue) => push_native(queue, kind, value, handles, most),
            Outgoing::Node(queue) => {
                let json = json_text(kind, value, most)?;
                push_json(queue, json, handles)
            }
        }
    }

    /// Tells the asker that there will be no answer.
    pub(super) fn push_refusal(&mut self, id: u64) {
        match self {
            Outgoing::Native(queue) => {
                let refused = |to: &mut Vec<u8>| {
                    PortFrame::Refused { id }.write(to);
                    Ok::<_, std::convert::Infallible>(())
                };
                queue.push_with(Vec::new(), usize::MAX, refused).expect("nine bytes fit");
            }
            Outgoing::Node(queue) => {
                queue.push(format!("{{\"polyfork\":\"refused\",\"id\":{id}}}\n").into_bytes());
            }
        }
    }

    /// Queues a line of Node's own before everything else.
    pub(super) fn answer(&mut self, line: impl Into<Vec<u8>>) {
        if let Outgoing::Node(queue) = self {
            queue.push_bypass(line);
        }
    }

    /// The other end received our oldest handle, or did not and it is sent again.
    pub(super) fn acknowledged(&mut self, nack: bool) -> Result<(), ProtocolError> {
        let Outgoing::Node(queue) = self else { return Ok(()) };
        let Passed { fd, again } = queue.acknowledged(nack)?;
        if let Some((line, left)) = again.filter(|(_, left)| nack && *left > 0) {
            queue.push_handle(line.clone(), Passed { fd, again: Some((line, left - 1)) });
        }
        Ok(())
    }

    /// What to write now.
    pub(super) fn peek(&self) -> Option<(&[u8], Vec<BorrowedFd<'_>>)> {
        match self {
            Outgoing::Node(queue) => queue
                .peek()
                .map(|chunk| (chunk.bytes, chunk.handle.map(AsFd::as_fd).into_iter().collect())),
            Outgoing::Native(queue) => queue
                .peek()
                .map(|chunk| (chunk.bytes, chunk.handles.iter().map(AsFd::as_fd).collect())),
        }
    }

    pub(super) fn wrote(&mut self, n: usize) {
        match self {
            Outgoing::Node(queue) => queue.wrote(n),
            Outgoing::Native(queue) => {
                queue.wrote(n);
                // Between two Rust programs the kernel keeps what is under way.
                queue.forget_written();
            }
        }
    }

    pub(super) fn queued_bytes(&self) -> usize {
        match self {
            Outgoing::Node(queue) => queue.queued_bytes(),
            Outgoing::Native(queue) => queue.queued_bytes(),
        }
    }

    pub(super) fn queued_handles(&self) -> usize {
        match self {
            Outgoing::Node(queue) => queue.queued_handles() + queue.in_flight(),
            Outgoing::Native(queue) => queue.queued_handles(),
        }
    }

    /// Bytes of answers that the other end does not take.
    pub(super) fn answer_bytes(&self) -> usize {
        match self {
            Outgoing::Node(queue) => queue.bypass_bytes(),
            Outgoing::Native(_) => 0,
        }
    }

    pub(super) fn written_total(&self) -> u64 {
        match self {
            Outgoing::Node(queue) => queue.written_total(),
            Outgoing::Native(queue) => queue.written_total(),
        }
    }

    /// Whether everything has left, and every handle was received.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Outgoing::Node(queue) => queue.is_empty(),
            Outgoing::Native(queue) => queue.is_empty(),
        }
    }
}

fn push_native<T: Serialize + ?Sized>(
    queue: &mut NativeOutbox<Passed>,
    kind: Kind,
    value: &T,
    handles: Vec<Handle>,
    most: usize,
) -> Result<(), SendError> {
    if handles.len() > MAX_DESCRIPTORS {
        return Err(SendError::Handle("one message carries at most 253"));
    }
    for handle in &handles {
        handle.prepare()?;
    }
    let handles =
        handles.into_iter().map(|handle| Passed { fd: handle.into(), again: None }).collect();
    let pushed = queue.push_with(handles, most, |to| {
        match kind {
            Kind::Message => PortFrame::Message(&[]),
            Kind::Request(id) => PortFrame::Request { id, body: &[] },
            Kind::Reply(id) => PortFrame::Reply { id, body: &[] },
        }
        .write(to);
        postcard::serialize_with_flavor(value, InPlace(to))
    });
    pushed.map_err(|error| match error {
        NotPushed::Writer(error) => SendError::Encode(error.to_string()),
        NotPushed::Size => SendError::TooLong { limit: most },
    })
}

/// Lets postcard write behind what is there.
struct InPlace<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for InPlace<'_> {
    type Output = ();

    #[inline]
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    #[inline]
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// One JSON text, without its newline.
fn json_text<T: Serialize + ?Sized>(
    kind: Kind,
    value: &T,
    most: usize,
) -> Result<String, SendError> {
    #[derive(Serialize)]
    struct Numbered<'a, T: ?Sized> {
        polyfork: &'static str,
        id: u64,
        body: &'a T,
    }
    let text = match kind {
        Kind::Message => serde_json::to_string(value),
        Kind::Request(id) => {
            serde_json::to_string(&Numbered { polyfork: "request", id, body: value })
        }
        Kind::Reply(id) => serde_json::to_string(&Numbered { polyfork: "reply", id, body: value }),
    };
    let text = text.map_err(|error| SendError::Encode(error.to_string()))?;
    if text.len() > most {
        return Err(SendError::TooLong { limit: most });
    }
    if text.contains("NODE_") && is_reserved(&text) {
        return Err(SendError::Reserved);
    }
    Ok(text)
}

/// Whether Node would take this for a message of its own.
fn is_reserved(text: &str) -> bool {
    let limits = Limits { max_message: usize::MAX, max_depth: usize::MAX, ..Limits::default() };
    !matches!(message::parse_line(text.as_bytes(), &limits), Ok(Incoming::User(_)))
}

fn push_json(
    queue: &mut Outbox<Passed>,
    json: String,
    handles: Vec<Handle>,
) -> Result<(), SendError> {
    let mut handles = handles.into_iter();
    let Some(handle) = handles.next() else {
        queue.push(line(json));
        return Ok(());
    };
    if handles.next().is_some() {
        return Err(SendError::Handle("a message to Node carries at most one"));
    }
    let (kind, family) = handle.node_kind()?;
    handle.prepare()?;
    let line = match family {
        Some(family) => dgram_line(family, &json),
        None => cluster::handle_message(kind.clone(), &json, None),
    };
    let again = (kind == HandleKind::NetSocket).then(|| (line.clone(), RETRANSMISSIONS));
    queue.push_handle(line, Passed { fd: handle.into(), again });
    Ok(())
}

fn dgram_line(family: DgramType, json: &str) -> Vec<u8> {
    cluster::dgram_handle_message(family, json)
}

/// The text as one line. Line breaks can only stand between its tokens.
fn line(json: String) -> Vec<u8> {
    if json.contains(['\n', '\r']) {
        return cluster::user_message(&json);
    }
    let mut line = json.into_bytes();
    line.push(b'\n');
    line
}
