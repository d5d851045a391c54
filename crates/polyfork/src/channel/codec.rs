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
use polyfork_wire::node::advanced::{self, Value};
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
    Advanced { frames: advanced::FrameDecoder, inbox: Inbox<Option<OwnedFd>>, limits: Limits },
    Native { frames: FrameDecoder<OwnedFd>, greeted: bool },
}

impl Decoder {
    pub(super) fn new(encoding: Encoding, limits: Limits) -> Decoder {
        match encoding {
            Encoding::Json => {
                Decoder::Json { lines: LineDecoder::new(limits), inbox: Inbox::new(limits), limits }
            }
            Encoding::Advanced => Decoder::Advanced {
                frames: advanced::FrameDecoder::new(limits),
                inbox: Inbox::new(limits),
                limits,
            },
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
                queue(inbox, fds, lost)?;
                lines.feed(bytes);
            }
            Decoder::Advanced { frames, inbox, .. } => {
                queue(inbox, fds, lost)?;
                frames.feed(bytes);
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
                Ok(Some(node_event(message::parse(line, limits)?, inbox)))
            }
            Decoder::Advanced { frames, inbox, limits } => {
                let Some(frame) = frames.next()? else {
                    drop(inbox.settle(frames.has_partial()));
                    return Ok(None);
                };
                let value = advanced::read(&frame, limits)?;
                let mut event = node_event(advanced::parse_value(value, limits)?, inbox);
                if let Event::Message { body: Body::Advanced { bytes, .. }, .. } = &mut event {
                    *bytes = frame.len();
                }
                Ok(Some(event))
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

/// Keeps what came for the envelopes. One that was lost keeps its place, so that the next is not taken for it.
fn queue(
    inbox: &mut Inbox<Option<OwnedFd>>,
    fds: &mut VecDeque<OwnedFd>,
    lost: bool,
) -> Result<(), ProtocolError> {
    for fd in fds.drain(..) {
        inbox.push(Some(fd))?;
    }
    if lost { inbox.push(None) } else { Ok(()) }
}

/// A user's message in one of Node's encodings.
trait UserValue: Sized {
    /// The message, with the word and number of an envelope of ours if it is one.
    fn open(self) -> (Body, Option<(Word, u64)>);
}

/// What an envelope of ours is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Request,
    Reply,
    Refused,
}

impl Word {
    fn of(text: &str) -> Option<Word> {
        match text {
            "request" => Some(Word::Request),
            "reply" => Some(Word::Reply),
            "refused" => Some(Word::Refused),
            _ => None,
        }
    }
}

impl UserValue for UserMessage {
    fn open(self) -> (Body, Option<(Word, u64)>) {
        match numbered(&self) {
            Some((word, id, body)) => (Body::Json(body), Some((word, id))),
            None => (Body::Json(self), None),
        }
    }
}

impl UserValue for Value {
    fn open(self) -> (Body, Option<(Word, u64)>) {
        let word = self.get("polyfork").and_then(|word| Word::of(word.as_str()?));
        let id = self.get("id").and_then(Value::as_f64).and_then(whole);
        let numbered = word.zip(id);
        // The body stays where it is: what is in it may refer to objects by their place.
        (Body::Advanced { value: self, wrapped: numbered.is_some(), bytes: 0 }, numbered)
    }
}

/// A number that JavaScript writes without a fraction, as long as it is exact.
fn whole(number: f64) -> Option<u64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked")]
    (number.fract() == 0.0 && (0.0..=EXACT).contains(&number)).then_some(number as u64)
}

fn node_event<M: UserValue>(incoming: Incoming<M>, inbox: &mut Inbox<Option<OwnedFd>>) -> Event {
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

fn envelope_event<M: UserValue>(envelope: HandleEnvelope<M>, fd: OwnedFd) -> Event {
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

fn user_event<M: UserValue>(
    message: M,
    handles: Vec<Handle>,
    key: Option<String>,
    acknowledge: bool,
) -> Event {
    let (body, numbered) = message.open();
    let request = match numbered {
        Some((Word::Request, id)) => Some(id),
        Some((Word::Reply, id)) if handles.is_empty() => return Event::Reply { id, body },
        Some((Word::Refused, id)) if handles.is_empty() => return Event::Refused { id },
        _ => None,
    };
    Event::Message { body, request, handles, key, acknowledge }
}

/// The shape of requests and answers between a Rust program and a script.
#[derive(Deserialize)]
struct Envelope<'a> {
    polyfork: &'a str,
    id: u64,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
}

fn numbered(message: &UserMessage) -> Option<(Word, u64, UserMessage)> {
    let text = message.as_str();
    if !text.starts_with('{') || !text.contains("\"polyfork\"") {
        return None;
    }
    let envelope: Envelope<'_> = serde_json::from_str(text).ok()?;
    let body = RawJson::new(envelope.body.map_or("null", RawValue::get)).ok()?;
    Some((Word::of(envelope.polyfork)?, envelope.id, body.into()))
}

/// A handle that is being sent. Our copy lives until the other end has it.
#[derive(Debug)]
pub(super) struct Passed {
    handle: Handle,
    /// The line it travels with, while it may have to be sent again, and how often.
    again: Option<(Vec<u8>, u8)>,
}

impl AsFd for Passed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// What is queued, in the order it leaves.
#[derive(Debug)]
pub(super) enum Outgoing {
    Node {
        queue: Outbox<Passed>,
        /// Frames instead of lines.
        advanced: bool,
    },
    Native(NativeOutbox<Passed>),
}

impl Outgoing {
    pub(super) fn new(encoding: Encoding) -> Outgoing {
        match encoding {
            Encoding::Json => Outgoing::node(false),
            Encoding::Advanced => Outgoing::node(true),
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

    fn node(advanced: bool) -> Outgoing {
        Outgoing::Node { queue: Outbox::new(WINDOW), advanced }
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
            Outgoing::Node { queue, advanced: false } => {
                let json = json_text(kind, value, most)?;
                push_json(queue, json, handles)
            }
            Outgoing::Node { queue, advanced: true } => {
                push_advanced(queue, kind, value, handles, most)
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
            Outgoing::Node { queue, advanced } => {
                let line = format!("{{\"polyfork\":\"refused\",\"id\":{id}}}\n");
                queue.push(as_spoken(line.into_bytes(), *advanced));
            }
        }
    }

    /// Queues a line of Node's own before everything else.
    pub(super) fn answer(&mut self, line: impl Into<Vec<u8>>) {
        if let Outgoing::Node { queue, advanced } = self {
            queue.push_bypass(as_spoken(line.into(), *advanced));
        }
    }

    /// The other end received our oldest handle, or did not and it is sent again.
    pub(super) fn acknowledged(&mut self, nack: bool) -> Result<(), ProtocolError> {
        let Outgoing::Node { queue, .. } = self else { return Ok(()) };
        let Passed { handle, again } = queue.acknowledged(nack)?;
        if let Some((line, left)) = again.filter(|(_, left)| nack && *left > 0) {
            queue.push_handle(line.clone(), Passed { handle, again: Some((line, left - 1)) });
        }
        Ok(())
    }

    /// What to write now.
    pub(super) fn peek(&self) -> Option<(&[u8], Vec<BorrowedFd<'_>>)> {
        match self {
            Outgoing::Node { queue, .. } => queue
                .peek()
                .map(|chunk| (chunk.bytes, chunk.handle.map(AsFd::as_fd).into_iter().collect())),
            Outgoing::Native(queue) => queue
                .peek()
                .map(|chunk| (chunk.bytes, chunk.handles.iter().map(AsFd::as_fd).collect())),
        }
    }

    pub(super) fn wrote(&mut self, n: usize) {
        match self {
            Outgoing::Node { queue, .. } => queue.wrote(n),
            Outgoing::Native(queue) => {
                queue.wrote(n);
                // Between two Rust programs the kernel keeps what is under way.
                queue.forget_written();
            }
        }
    }

    pub(super) fn queued_bytes(&self) -> usize {
        match self {
            Outgoing::Node { queue, .. } => queue.queued_bytes(),
            Outgoing::Native(queue) => queue.queued_bytes(),
        }
    }

    pub(super) fn queued_handles(&self) -> usize {
        match self {
            Outgoing::Node { queue, .. } => queue.queued_handles() + queue.in_flight(),
            Outgoing::Native(queue) => queue.queued_handles(),
        }
    }

    /// Bytes of answers that the other end does not take.
    pub(super) fn answer_bytes(&self) -> usize {
        match self {
            Outgoing::Node { queue, .. } => queue.bypass_bytes(),
            Outgoing::Native(_) => 0,
        }
    }

    pub(super) fn written_total(&self) -> u64 {
        match self {
            Outgoing::Node { queue, .. } => queue.written_total(),
            Outgoing::Native(queue) => queue.written_total(),
        }
    }

    /// Whether everything has left, and every handle was received.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Outgoing::Node { queue, .. } => queue.is_empty(),
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
    let handles = handles.into_iter().map(|handle| Passed { handle, again: None }).collect();
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

/// The shape in which a script gets requests and answers.
#[derive(Serialize)]
struct Numbered<'a, T: ?Sized> {
    polyfork: &'static str,
    id: u64,
    body: &'a T,
}

/// One JSON text, without its newline.
fn json_text<T: Serialize + ?Sized>(
    kind: Kind,
    value: &T,
    most: usize,
) -> Result<String, SendError> {
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
    match at_most_one(handles)? {
        None => queue.push(line(json)),
        Some((handle, kind, family)) => {
            let line = match family {
                Some(family) => cluster::dgram_handle_message(family, &json),
                None => cluster::handle_message(kind.clone(), &json, None),
            };
            push_handle(queue, line, handle, &kind);
        }
    }
    Ok(())
}

fn push_advanced<T: Serialize + ?Sized>(
    queue: &mut Outbox<Passed>,
    kind: Kind,
    value: &T,
    handles: Vec<Handle>,
    most: usize,
) -> Result<(), SendError> {
    let encode = |frame: Result<Vec<u8>, advanced::ConvertError>| {
        let frame = frame.map_err(|error| SendError::Encode(error.to_string()))?;
        let fits = frame.len().saturating_sub(LENGTH_BYTES) <= most;
        if fits { Ok(frame) } else { Err(SendError::TooLong { limit: most }) }
    };
    let numbered = |polyfork, id| advanced::to_frame(&Numbered { polyfork, id, body: value });
    let frame = encode(match kind {
        Kind::Message => advanced::to_frame(value),
        Kind::Request(id) => numbered("request", id),
        Kind::Reply(id) => numbered("reply", id),
    })?;
    if memchr::memmem::find(&frame, b"NODE_").is_some() && is_reserved_frame(&frame) {
        return Err(SendError::Reserved);
    }
    match at_most_one(handles)? {
        None => queue.push(frame),
        Some((handle, kind, family)) => {
            let frame = encode(advanced::handle_message(&kind, value, None, family))?;
            push_handle(queue, frame, handle, &kind);
        }
    }
    Ok(())
}

/// What comes before every frame of the advanced encoding.
const LENGTH_BYTES: usize = 4;

fn is_reserved_frame(frame: &[u8]) -> bool {
    let limits = Limits {
        max_message: usize::MAX,
        max_depth: usize::MAX,
        max_values: usize::MAX,
        ..Limits::default()
    };
    let value = frame.get(LENGTH_BYTES..).map(|payload| advanced::read(payload, &limits));
    let Some(Ok(value)) = value else { return false };
    !matches!(advanced::parse_value(value, &limits), Ok(Incoming::User(_)))
}

type ForNode = (Handle, HandleKind, Option<DgramType>);

/// The handle of a message to Node, which carries at most one, fit for sending.
fn at_most_one(handles: Vec<Handle>) -> Result<Option<ForNode>, SendError> {
    let mut handles = handles.into_iter();
    let Some(handle) = handles.next() else { return Ok(None) };
    if handles.next().is_some() {
        return Err(SendError::Handle("a message to Node carries at most one"));
    }
    let (kind, family) = handle.node_kind()?;
    handle.prepare()?;
    Ok(Some((handle, kind, family)))
}

fn push_handle(queue: &mut Outbox<Passed>, bytes: Vec<u8>, handle: Handle, kind: &HandleKind) {
    let again = (*kind == HandleKind::NetSocket).then(|| (bytes.clone(), RETRANSMISSIONS));
    queue.push_handle(bytes, Passed { handle, again });
}

/// A line of our own in the encoding of the channel.
fn as_spoken(line: Vec<u8>, advanced: bool) -> Vec<u8> {
    if advanced { advanced::transcode_line(&line).expect("our own line is JSON") } else { line }
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
