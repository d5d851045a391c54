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

use super::message::{Advanced, Body, Message};
use super::ring::{NativeOut, RingIn};
use super::socket::{Socket, Write};
use super::{Encoding, Handle, SendError};
use crate::shared_memory::SharedArrayBuffer;

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
    /// A message that is nothing else.
    Plain(Body),
    Message(Box<Came>),
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
    /// The other end can do this.
    Features(u32),
    /// The other end would like to send by a ring in this memory, which is none if it is not as it must be.
    Ring(Option<SharedArrayBuffer>),
    /// The ring that we offered is used, or not.
    RingAnswer {
        taken: bool,
    },
    /// There is something to be looked at: a ring has room.
    Wake,
    Nothing,
}

/// A message with something besides.
pub(super) struct Came {
    pub(super) body: Body,
    pub(super) request: Option<u64>,
    pub(super) handles: Vec<Handle>,
    /// Of a counted connection.
    pub(super) key: Option<String>,
    /// To be acknowledged, before the message is passed on.
    pub(super) acknowledge: bool,
}

/// Makes events of what is read.
pub(super) enum Decoder {
    Json { lines: LineDecoder, inbox: Inbox<Option<OwnedFd>>, limits: Limits },
    Advanced { frames: advanced::FrameDecoder, inbox: Inbox<Option<OwnedFd>>, limits: Limits },
    Native(Box<NativeDecoder>),
}

/// What comes by the socket, and by the ring if there is one.
pub(super) struct NativeDecoder {
    frames: FrameDecoder<OwnedFd>,
    greeted: bool,
    pub(super) ring: RingIn,
    /// Came by the socket and waits for its turn.
    held: Option<Event>,
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
            Encoding::Native => Decoder::Native(Box::new(NativeDecoder {
                frames: FrameDecoder::new(limits),
                greeted: false,
                ring: RingIn::new(limits),
                held: None,
            })),
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
            Decoder::Native(native) => {
                let frames = &mut native.frames;
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
                let body = match &mut event {
                    Event::Plain(body) => Some(body),
                    Event::Message(came) => Some(&mut came.body),
                    _ => None,
                };
                if let Some(Body::Advanced(advanced)) = body {
                    advanced.bytes = frame.len();
                }
                Ok(Some(event))
            }
            Decoder::Native(native) => native.next(),
        }
    }

    /// Takes messages that came by the ring and are nothing else, as far as they come one after another.
    pub(super) fn take_plain(&mut self, came: &mut Vec<Message>) -> Result<(), ProtocolError> {
        match self {
            Decoder::Native(native) if native.held.is_none() => native.ring.take_plain(came),
            _ => Ok(()),
        }
    }

    /// The ring by which messages come, of a native channel.
    pub(super) fn ring(&mut self) -> Option<&mut RingIn> {
        match self {
            Decoder::Native(native) => Some(&mut native.ring),
            _ => None,
        }
    }

    /// Whether what came by the socket waits for what comes by the ring: nothing more is to be read from the
    /// socket then.
    pub(super) fn is_holding(&self) -> bool {
        matches!(self, Decoder::Native(native) if native.held.is_some())
    }
}

impl NativeDecoder {
    fn next(&mut self) -> Result<Option<Event>, ProtocolError> {
        loop {
            if let Some(event) = self.ring.next()? {
                return Ok(Some(event));
            }
            if let Some(event) = self.held.take() {
                if self.ring.take_place()? {
                    return Ok(Some(event));
                }
                // There is more before it than is taken at once.
                self.held = Some(event);
                return Ok(None);
            }
            match self.next_by_socket()? {
                Some(event @ (Event::Plain(_) | Event::Message(_))) if self.ring.is_started() => {
                    self.held = Some(event);
                }
                Some(Event::Reply { .. } | Event::Refused { .. }) if self.ring.is_started() => {
                    return Err(ProtocolError::BadFrame { why: "it belongs into the ring" });
                }
                event => return Ok(event),
            }
        }
    }

    fn next_by_socket(&mut self) -> Result<Option<Event>, ProtocolError> {
        let (greeted, ring) = (&mut self.greeted, &mut self.ring);
        let read = |payload: &[u8]| {
            let frame = PortFrame::read(payload)?;
            let first = !std::mem::replace(greeted, true);
            if first != matches!(frame, PortFrame::Hello { .. }) {
                let why = "the greeting is missing or comes twice";
                return Err(ProtocolError::BadFrame { why });
            }
            Ok(match frame {
                PortFrame::Hello { features } => Event::Features(features),
                PortFrame::Message(body) => Event::Plain(Body::native(body)),
                PortFrame::Request { id, body } => request(id, Body::native(body)),
                PortFrame::Reply { id, body } => Event::Reply { id, body: Body::native(body) },
                PortFrame::Refused { id } => Event::Refused { id },
                PortFrame::Ring => Event::Ring(None),
                PortFrame::RingAnswer { taken } => Event::RingAnswer { taken },
                PortFrame::RingStart => {
                    ring.start()?;
                    Event::Nothing
                }
                PortFrame::Wake => Event::Wake,
            })
        };
        let Some(frame) = self.frames.next_with(read)? else { return Ok(None) };
        with_descriptors(frame.message, frame.descriptors).map(Some)
    }
}

/// Gives an event the descriptors that came with it.
fn with_descriptors(event: Event, descriptors: Vec<OwnedFd>) -> Result<Event, ProtocolError> {
    if descriptors.is_empty() {
        return Ok(event);
    }
    let mut handles = descriptors.into_iter().map(Handle::look);
    match event {
        Event::Plain(body) => {
            let handles = handles.collect();
            let came = Came { body, request: None, handles, key: None, acknowledge: false };
            Ok(Event::Message(Box::new(came)))
        }
        Event::Message(mut came) => {
            came.handles.extend(handles);
            Ok(Event::Message(came))
        }
        Event::Ring(_) => match (handles.next(), handles.next()) {
            (Some(Handle::Memory(memory)), None) => Ok(Event::Ring(Some(memory))),
            _ => Ok(Event::Ring(None)),
        },
        _ => Err(ProtocolError::SurplusDescriptor),
    }
}

/// What came by the ring.
pub(super) fn ring_event(payload: &[u8]) -> Result<Event, ProtocolError> {
    Ok(match PortFrame::read(payload)? {
        PortFrame::Message(body) => Event::Plain(Body::native(body)),
        PortFrame::Request { id, body } => request(id, Body::native(body)),
        PortFrame::Reply { id, body } => Event::Reply { id, body: Body::native(body) },
        PortFrame::Refused { id } => Event::Refused { id },
        _ => return Err(ProtocolError::BadFrame { why: "it does not belong into the ring" }),
    })
}

fn request(id: u64, body: Body) -> Event {
    let request = Some(id);
    let came = Came { body, request, handles: Vec::new(), key: None, acknowledge: false };
    Event::Message(Box::new(came))
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
        let wrapped = numbered.is_some();
        (Body::Advanced(Box::new(Advanced { value: self, wrapped, bytes: 0 })), numbered)
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
    if request.is_none() && handles.is_empty() && key.is_none() && !acknowledge {
        return Event::Plain(body);
    }
    Event::Message(Box::new(Came { body, request, handles, key, acknowledge }))
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

impl From<Handle> for Passed {
    fn from(handle: Handle) -> Passed {
        Passed { handle, again: None }
    }
}

impl AsFd for Passed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// How far writing came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// There is nothing to write now.
    All,
    /// The socket is full.
    SocketFull,
    /// The ring is full.
    RingFull,
    /// The kernel is short of something that comes back.
    Shortage,
    /// The other end is gone, or broke the ring.
    Gone,
}

impl Written {
    /// How many bytes went, or why none did.
    pub(super) fn from(written: Write) -> Result<usize, Written> {
        match written {
            Write::Some(written) => Ok(written),
            Write::Full => Err(Written::SocketFull),
            Write::Shortage => Err(Written::Shortage),
            Write::Gone => Err(Written::Gone),
        }
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
    Native(Box<NativeOut>),
}

impl Outgoing {
    pub(super) fn new(encoding: Encoding) -> Outgoing {
        match encoding {
            Encoding::Json => Outgoing::node(false),
            Encoding::Advanced => Outgoing::node(true),
            Encoding::Native => Outgoing::Native(Box::new(NativeOut::new())),
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
            Outgoing::Native(native) => push_native(&mut native.queue, kind, value, handles, most),
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
            Outgoing::Native(native) => native.push_frame(PortFrame::Refused { id }),
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

    /// Writes as far as it goes. `sleeps`: the caller will wait for what is missing.
    pub(super) fn write_to(&mut self, socket: &Socket, sleeps: bool) -> Written {
        match self {
            Outgoing::Native(native) => native.write_to(socket, sleeps),
            Outgoing::Node { queue, .. } => {
                while let Some(chunk) = queue.peek() {
                    let fds: Vec<_> = chunk.handle.map(AsFd::as_fd).into_iter().collect();
                    match Written::from(socket.write(chunk.bytes, &fds)) {
                        Ok(written) => queue.wrote(written),
                        Err(stopped) => return stopped,
                    }
                }
                Written::All
            }
        }
    }

    /// The ring by which messages leave, of a native channel.
    pub(super) fn native(&mut self) -> Option<&mut NativeOut> {
        match self {
            Outgoing::Native(native) => Some(native),
            Outgoing::Node { .. } => None,
        }
    }

    pub(super) fn queued_bytes(&self) -> usize {
        match self {
            Outgoing::Node { queue, .. } => queue.queued_bytes(),
            Outgoing::Native(native) => native.queue.queued_bytes(),
        }
    }

    pub(super) fn queued_handles(&self) -> usize {
        match self {
            Outgoing::Node { queue, .. } => queue.queued_handles() + queue.in_flight(),
            Outgoing::Native(native) => native.queue.queued_handles(),
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
            Outgoing::Native(native) => native.queue.written_total(),
        }
    }

    /// Whether everything has left, and every handle was received.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Outgoing::Node { queue, .. } => queue.is_empty(),
            Outgoing::Native(native) => native.queue.is_empty(),
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
    let handles = handles.into_iter().map(Passed::from).collect();
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
