//! One worker's channel as the primary sees it: bytes and descriptors in, bytes and descriptors out.
//!
//! Reading is a task per worker that turns bytes into items for the primary's loop, and waits when that loop
//! is behind. Writing happens in the loop itself, as far as the kernel takes it; a task waits for the rest.
//! What the items mean is decided in `node` and `native`.
//!
//! The rule that surprises: when the process has ended, the reader first takes everything that is still in
//! the socket and only then says so. Acknowledgements that a dying worker wrote count.
//!
//! References: unix(7), recvmsg(2); wire formats in `polyfork-wire`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use polyfork_core::{ListenerId, WorkerId};
use polyfork_wire::ProtocolError;
use polyfork_wire::limits::Limits;
use polyfork_wire::native::{FrameDecoder, NativeOutbox, ToPrimary, ToWorker};
use polyfork_wire::node::advanced::{self, Value};
use polyfork_wire::node::cluster::Flavour;
use polyfork_wire::node::inbox::Inbox;
use polyfork_wire::node::line::LineDecoder;
use polyfork_wire::node::message::{self, Incoming};
use polyfork_wire::node::outbox::Outbox;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::SendError;
use super::outgoing::{Encoding, Outgoing, Refusal};
use super::primary::{FromIo, Rested};
use super::to_loop::{Rest, ToLoop};
use crate::channel::socket::{Read, SHORTAGE_PAUSE, Socket, Write};

pub(super) mod carry;

/// Above this many bytes that wait in our own memory, `send` makes its caller wait.
const HIGH_MARK_BYTES: usize = 256 * 1024;
/// The same for handles, of which the system has few.
const HIGH_MARK_HANDLES: usize = 64;
/// How often a handle is sent again to a Node worker that says it came without its descriptor; Node does so as often.
const RETRANSMISSIONS: u8 = 3;

/// Read at most this much at once; Node does the same.
const READ_BYTES: usize = 64 * 1024;

/// A descriptor on its way to a worker. The primary's copy lives as long as somebody holds this.
#[derive(Debug, Clone)]
pub(crate) struct Passed {
    pub(crate) fd: Arc<OwnedFd>,
    /// Set for a connection that is handed over: which listener it came from, and the number by which the
    /// worker will name it (native: its number at that listener, Node: the number of the message).
    pub(crate) connection: Option<(ListenerId, u64)>,
    /// Node, for anything but a connection: the line it travels with, should it have to be sent again.
    pub(crate) line: Option<Arc<[u8]>>,
    /// How often the worker has said that the line came without it.
    pub(crate) refusals: u8,
}

impl Passed {
    /// A descriptor that is not sent a second time.
    pub(crate) fn once(fd: Arc<OwnedFd>, connection: Option<(ListenerId, u64)>) -> Passed {
        Passed { fd, connection, line: None, refusals: 0 }
    }

    /// A descriptor that is sent again, with its line, until it has arrived.
    pub(crate) fn with(fd: &Arc<OwnedFd>, line: &[u8]) -> Passed {
        Passed { fd: Arc::clone(fd), connection: None, line: Some(line.into()), refusals: 0 }
    }
}

impl AsFd for Passed {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a reader hands to the primary's loop.
#[derive(Debug)]
pub(crate) enum Item {
    /// A line of a Node worker; `prefixed` when it began with Bun's byte 0x02.
    Node { incoming: Incoming, prefixed: bool, fd: Option<OwnedFd> },
    /// The same from one that speaks V8's serialization.
    Advanced { incoming: Incoming<Value>, fd: Option<OwnedFd> },
    /// A frame of a native worker.
    Native(ToPrimary),
}

/// How a worker is written to.
pub(crate) enum Link {
    Node(NodeLink),
    Native(NativeLink),
    /// Signals only.
    None,
}

pub(crate) struct NodeLink {
    wire: Wire,
    pub(crate) outbox: Outbox<Passed>,
    /// How internal lines are marked for this peer.
    pub(crate) flavour: Flavour,
    /// Lines are made into frames of V8's serialization.
    advanced: bool,
}

pub(crate) struct NativeLink {
    wire: Wire,
    pub(crate) outbox: NativeOutbox<Passed>,
}

/// The socket, and the two tasks that wait on it.
struct Wire {
    worker: WorkerId,
    socket: Arc<Socket>,
    to_loop: ToLoop,
    codec: Codec,
    limits: Limits,
    process_ended: Arc<Notify>,
    /// None at rest, and when there is nothing more to read.
    reader: Option<AbortHandle>,
    /// What the reader had read and not understood when it came to rest; some as long as it rests.
    partial: Option<Partial>,
    writer: Option<AbortHandle>,
    broken: bool,
}

/// The beginning of a message, and descriptors that wait for theirs.
#[derive(Debug, Default)]
pub(crate) struct Partial {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: VecDeque<OwnedFd>,
}

/// Which codec a channel speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Codec {
    Node,
    Advanced,
    Native,
}

impl Link {
    /// Starts reading from `socket`, our non-blocking end of the worker's channel.
    pub(crate) fn open(
        worker: WorkerId,
        socket: OwnedFd,
        codec: Codec,
        limits: Limits,
        window: usize,
        to_loop: ToLoop,
    ) -> io::Result<Link> {
        let mut wire = Wire::new(worker, socket, codec, limits, to_loop)?;
        wire.partial = Some(Partial::default());
        wire.read();
        Ok(match codec {
            Codec::Node | Codec::Advanced => Link::Node(NodeLink {
                wire,
                outbox: Outbox::new(window),
                flavour: Flavour::Node,
                advanced: codec == Codec::Advanced,
            }),
            Codec::Native => Link::Native(NativeLink { wire, outbox: NativeOutbox::new() }),
        })
    }

    fn wire(&mut self) -> Option<&mut Wire> {
        match self {
            Link::Node(link) => Some(&mut link.wire),
            Link::Native(link) => Some(&mut link.wire),
            Link::None => None,
        }
    }

    /// Whether there is a channel at all.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self, Link::None)
    }

    /// The process has ended: the reader takes what is left, then reports the end of the channel.
    pub(crate) fn process_ended(&mut self) {
        if let Some(wire) = self.wire() {
            wire.process_ended.notify_one();
        }
    }

    /// What messages of the user are written in.
    pub(crate) fn encoding(&self) -> Option<Encoding> {
        match self {
            Link::Node(link) => Some(link.encoding()),
            Link::Native(_) => Some(Encoding::Postcard),
            Link::None => None,
        }
    }

    /// Queues a message of the user.
    pub(crate) fn push_user_message(&mut self, message: &Outgoing) -> Result<(), Refusal> {
        match self {
            Link::Node(link) => {
                let bytes = message.written_in(link.encoding())?;
                match &message.handle {
                    None => link.outbox.push(bytes.to_vec()),
                    Some(fd) => link.outbox.push_handle(bytes.to_vec(), Passed::with(fd, bytes)),
                }
            }
            Link::Native(_) if message.handle.is_some() => {
                let text = "a worker built on this crate takes messages without handles only";
                return Err(SendError::Handle(text).into());
            }
            Link::Native(link) => {
                let bytes = message.written_in(Encoding::Postcard)?.to_vec();
                link.outbox.push(&ToWorker::Message(bytes), Vec::new());
            }
            Link::None => return Err(SendError::Disconnected.into()),
        }
        Ok(())
    }

    /// Writes what can be written now. When the worker's end is closed, reading still
    /// goes on, so that nothing it said is lost.
    pub(crate) fn flush(&mut self) {
        match self {
            Link::Node(link) => link.flush(),
            Link::Native(link) => link.flush(),
            Link::None => {}
        }
    }

    /// Bytes that wait in our memory.
    pub(crate) fn queued_bytes(&self) -> usize {
        match self {
            Link::Node(link) => link.outbox.queued_bytes(),
            Link::Native(link) => link.outbox.queued_bytes(),
            Link::None => 0,
        }
    }

    /// Whether a sender should wait before it sends more.
    pub(crate) fn is_full(&self) -> bool {
        let handles = match self {
            Link::Node(link) => link.outbox.queued_handles(),
            Link::Native(_) | Link::None => 0,
        };
        self.queued_bytes() > HIGH_MARK_BYTES || handles > HIGH_MARK_HANDLES
    }

    /// Ends both tasks and lets go of the socket.
    pub(crate) fn close(&mut self) {
        if let Some(wire) = self.wire() {
            if let Some(reader) = &wire.reader {
                reader.abort();
            }
            if let Some(writer) = wire.writer.take() {
                writer.abort();
            }
        }
        *self = Link::None;
    }

    /// The reader has come to rest.
    pub(crate) fn rested(&mut self, partial: Partial) {
        if let Some(wire) = self.wire() {
            wire.reader = None;
            wire.partial = Some(partial);
        }
    }

    /// Reads on, if the reader came to rest.
    pub(crate) fn read_on(&mut self) {
        if let Some(wire) = self.wire() {
            wire.read();
        }
    }

    /// The writable task has ended; to be called before the next [`Link::flush`].
    pub(crate) fn writable(&mut self) {
        if let Some(wire) = self.wire() {
            wire.writer = None;
        }
    }
}

impl NodeLink {
    fn encoding(&self) -> Encoding {
        if self.advanced { Encoding::Advanced } else { Encoding::Json }
    }

    /// A line of ours, as this peer wants it.
    fn said(&self, line: Vec<u8>) -> Vec<u8> {
        if self.advanced {
            // Nothing that we say ourselves is too long or too deep for a frame.
            advanced::transcode_line(&line).unwrap_or_default()
        } else {
            self.flavour.apply(line)
        }
    }

    /// Queues a line of ours.
    pub(crate) fn say(&mut self, line: Vec<u8>) {
        let line = self.said(line);
        self.outbox.push(line);
    }

    /// Queues an acknowledgement, before all the rest.
    pub(crate) fn say_first(&mut self, line: &[u8]) {
        let line = self.said(line.to_vec());
        self.outbox.push_bypass(line);
    }

    /// Queues a line of ours with a descriptor, made with the bytes that will be sent.
    pub(crate) fn say_with(&mut self, line: Vec<u8>, passed: impl FnOnce(&[u8]) -> Passed) {
        let line = if self.advanced { self.said(line) } else { line };
        if !line.is_empty() {
            let passed = passed(&line);
            self.outbox.push_handle(line, passed);
        }
    }

    /// A worker was out of descriptors when this came: it is sent again, within bounds.
    pub(crate) fn say_again(&mut self, passed: Passed) {
        if let Some(line) = passed.line.clone().filter(|_| passed.refusals < RETRANSMISSIONS) {
            let refusals = passed.refusals + 1;
            self.outbox.push_handle(line.to_vec(), Passed { refusals, ..passed });
        }
    }

    fn flush(&mut self) {
        while let Some(chunk) = self.outbox.peek() {
            let Some(written) =
                self.wire.write(chunk.bytes, chunk.handle.map(AsFd::as_fd).as_slice())
            else {
                return;
            };
            self.outbox.wrote(written);
        }
    }
}

impl NativeLink {
    fn flush(&mut self) {
        while let Some(chunk) = self.outbox.peek() {
            let fds: Vec<_> = chunk.handles.iter().map(AsFd::as_fd).collect();
            let Some(written) = self.wire.write(chunk.bytes, &fds) else { return };
            self.outbox.wrote(written);
        }
    }

    /// Queues one frame with the descriptors that go with it.
    pub(crate) fn push(&mut self, frame: &ToWorker, handles: Vec<Passed>) {
        self.outbox.push(frame, handles);
    }
}

impl Wire {
    /// Nobody reads yet.
    fn new(
        worker: WorkerId,
        socket: OwnedFd,
        codec: Codec,
        limits: Limits,
        to_loop: ToLoop,
    ) -> io::Result<Wire> {
        Ok(Wire {
            worker,
            socket: Arc::new(Socket::new(socket)?),
            to_loop,
            codec,
            limits,
            process_ended: Arc::new(Notify::new()),
            reader: None,
            partial: None,
            writer: None,
            broken: false,
        })
    }

    /// Starts a reader where the last one came to rest.
    fn read(&mut self) {
        let Some(partial) = self.partial.take() else { return };
        let reader = Reader {
            worker: self.worker,
            socket: Arc::clone(&self.socket),
            codec: Decoder::new(self.codec, self.limits),
            fds: partial.fds,
            limits: self.limits,
            to_loop: self.to_loop.clone(),
            rest: self.to_loop.rest(),
        };
        let reader = reader.run(partial.bytes, Arc::clone(&self.process_ended));
        self.reader = Some(tokio::spawn(reader).abort_handle());
    }

    /// One write. `None`: not now (a task waits) or never (the worker's end is gone).
    fn write(&mut self, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Option<usize> {
        if self.broken || self.writer.is_some() {
            return None;
        }
        match self.socket.write(bytes, fds) {
            Write::Some(written) => return Some(written),
            Write::Full => self.wait_writable(None),
            // Too many descriptors in flight or no memory: the kernel is full, not the channel.
            Write::Shortage => self.wait_writable(Some(SHORTAGE_PAUSE)),
            // The reader will tell the end of the channel.
            Write::Gone => self.broken = true,
        }
        None
    }

    fn wait_writable(&mut self, pause: Option<std::time::Duration>) {
        let socket = Arc::clone(&self.socket);
        let to_loop = self.to_loop.clone();
        let worker = self.worker;
        let task = tokio::spawn(async move {
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
            // False: the runtime is shutting down, and the loop with it.
            socket.writable().await;
            // The loop is gone only when the whole primary ends.
            let _ = to_loop.send(FromIo::Writable { worker }).await;
        });
        self.writer = Some(task.abort_handle());
    }
}

struct Reader {
    worker: WorkerId,
    socket: Arc<Socket>,
    codec: Decoder,
    fds: VecDeque<OwnedFd>,
    limits: Limits,
    to_loop: ToLoop,
    rest: Rest,
}

enum Decoder {
    Node(LineDecoder, Inbox<OwnedFd>),
    Advanced(advanced::FrameDecoder, Inbox<OwnedFd>),
    Native(FrameDecoder<OwnedFd>),
}

impl Decoder {
    fn new(codec: Codec, limits: Limits) -> Decoder {
        match codec {
            Codec::Node => Decoder::Node(LineDecoder::new(limits), Inbox::new(limits)),
            Codec::Advanced => {
                Decoder::Advanced(advanced::FrameDecoder::new(limits), Inbox::new(limits))
            }
            Codec::Native => Decoder::Native(FrameDecoder::new(limits)),
        }
    }

    /// What was read and is no message yet.
    fn into_partial(self) -> Partial {
        match self {
            Decoder::Node(lines, inbox) => {
                Partial { bytes: lines.rest().to_vec(), fds: inbox.into_waiting() }
            }
            Decoder::Advanced(frames, inbox) => {
                Partial { bytes: frames.rest().to_vec(), fds: inbox.into_waiting() }
            }
            Decoder::Native(frames) => {
                let (bytes, fds) = frames.into_rest();
                Partial { bytes, fds }
            }
        }
    }
}

/// Why a reader stops.
enum Stops {
    /// Nothing more comes.
    End,
    /// The loop wants it to.
    Rest,
}

impl Reader {
    async fn run(mut self, partial: Vec<u8>, process_ended: Arc<Notify>) {
        let (worker, to_loop) = (self.worker, self.to_loop.clone());
        let stopped = match self.decode(&partial).await {
            Ok(()) => self.read_to_end(&process_ended).await,
            Err(fault) => Err(fault),
        };
        // The loop is gone only when the whole primary ends. What makes it wait for us goes last, with `self.rest`.
        let Reader { codec, rest: _ears, .. } = self;
        let _ = match stopped {
            Ok(Stops::Rest) => {
                let what = Rested::Reader(codec.into_partial());
                to_loop.send(FromIo::Rested { worker, what }).await
            }
            Ok(Stops::End) => to_loop.send(FromIo::ChannelEnd { worker, fault: None }).await,
            Err(fault) => to_loop.send(FromIo::ChannelEnd { worker, fault: Some(fault) }).await,
        };
    }

    async fn read_to_end(&mut self, process_ended: &Notify) -> Result<Stops, ProtocolError> {
        let mut buffer = vec![0; 4096];
        let mut last = false;
        loop {
            let got = if last {
                // Whatever the event loop has been told of the socket so far.
                self.socket.read_now(&mut buffer, &mut self.fds)
            } else {
                tokio::select! {
                    biased;
                    () = self.rest.asked() => return Ok(Stops::Rest),
                    got = self.socket.read(&mut buffer, &mut self.fds) => got,
                    () = process_ended.notified() => {
                        last = true;
                        continue;
                    }
                }
            };
            match got {
                Read::Some(got) if got.truncated => return Err(ProtocolError::MissingDescriptor),
                Read::Some(got) => {
                    self.decode(&buffer[..got.len]).await?;
                    // Most workers say little: memory grows only for those that say much at once.
                    if got.len == buffer.len() && got.len < READ_BYTES {
                        buffer.resize(READ_BYTES, 0);
                    }
                }
                Read::End => return self.end(),
                Read::Empty if last => return self.end(),
                Read::Empty => {}
            }
        }
    }

    async fn decode(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        match &mut self.codec {
            Decoder::Node(lines, inbox) => {
                for fd in self.fds.drain(..) {
                    inbox.push(fd)?;
                }
                lines.feed(bytes);
                while let Some(line) = lines.next()? {
                    let prefixed = line.prefixed;
                    let incoming = message::parse(line, &self.limits)?;
                    // The n-th descriptor belongs to the n-th envelope. A missing one is answered as such.
                    let fd = match incoming {
                        Incoming::Handle(_) => inbox.claim().ok(),
                        _ => None,
                    };
                    let item = Item::Node { incoming, prefixed, fd };
                    Self::give(&self.to_loop, self.worker, item).await;
                }
                // Descriptors that came with anything else are closed at once.
                drop(inbox.settle(lines.has_partial()));
            }
            Decoder::Advanced(frames, inbox) => {
                for fd in self.fds.drain(..) {
                    inbox.push(fd)?;
                }
                frames.feed(bytes);
                while let Some(payload) = frames.next()? {
                    let value = advanced::read(&payload, &self.limits)?;
                    let incoming = advanced::parse_value(value, &self.limits)?;
                    let fd = match incoming {
                        Incoming::Handle(_) => inbox.claim().ok(),
                        _ => None,
                    };
                    let item = Item::Advanced { incoming, fd };
                    Self::give(&self.to_loop, self.worker, item).await;
                }
                drop(inbox.settle(frames.has_partial()));
            }
            Decoder::Native(frames) => {
                for fd in self.fds.drain(..) {
                    frames.push_descriptor(fd)?;
                }
                frames.feed(bytes);
                while let Some(frame) = frames.next::<ToPrimary>()? {
                    // A worker has no descriptors for its primary.
                    if !frame.descriptors.is_empty() {
                        return Err(ProtocolError::SurplusDescriptor);
                    }
                    let item = Item::Native(frame.message);
                    Self::give(&self.to_loop, self.worker, item).await;
                }
            }
        }
        Ok(())
    }

    async fn give(to_loop: &ToLoop, worker: WorkerId, item: Item) {
        // The loop is gone only when the whole primary ends.
        let _ = to_loop.send(FromIo::Item { worker, item }).await;
    }

    /// A cut last message is no fault: whoever dies while writing leaves one.
    fn end(&mut self) -> Result<Stops, ProtocolError> {
        self.fds.clear();
        Ok(Stops::End)
    }
}
