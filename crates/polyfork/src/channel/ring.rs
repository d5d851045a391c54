//! The way of messages through shared memory, between two Rust processes.
//!
//! When an end has sent much, it offers the other a ring; if that is taken, its messages go there and enter the kernel only
//! to wake who sleeps. Messages with handles, the offer and the wake-ups stay in the socket, and so does the end: whoever
//! dies is noticed there. What the frames mean is in `polyfork_wire::native::port`, the ring itself in
//! `polyfork_core::sync::ring`; when to read, write and sleep is decided in `engine`.
//!
//! The order of messages is that of the ring. One that goes by the socket has its place in the ring, marked by an empty
//! record before it is sent, and is kept until everything before that place was taken.
//!
//! The rule that surprises: each direction has a ring of its own, or none. Who only listens never pays for one.
//!
//! Costs 68 KiB of memory for each direction in which more than 64 KiB were sent, and one descriptor at each end.

use std::sync::atomic::AtomicU64;

use polyfork_core::sync::ring::{self, Consumer, Corrupt, HEADER_WORDS, Producer, PushError};
use polyfork_wire::native::port::{FEATURE_RING, PortFrame, RECORD_FRAMES, RECORD_PLACE};
use polyfork_wire::native::stream::FrameStream;
use polyfork_wire::native::{HEADER_BYTES, NativeOutbox};
use polyfork_wire::{Limits, ProtocolError};

use super::Handle;
use super::codec::{Event, Passed, Written, ring_event};
use super::message::{Body, Message};
use super::socket::Socket;
use crate::shared_memory::{SharedArrayBuffer, View};

/// What is in a ring at most.
const RING_BYTES: usize = 64 << 10;
/// Who sends less than this gets no ring.
const OFFER_FROM_BYTES: u64 = 64 << 10;
/// Who is offered a ring takes it up to this size.
const MOST_RING_BYTES: usize = 16 << 20;
/// A piece shorter than this waits for room for more, if there is more to come.
const LEAST_PIECE_BYTES: usize = 1 << 10;
/// So much is taken at once: small messages of one turn stay in a processor's nearest cache until they are received.
pub(super) const TURN_BYTES: usize = 16 << 10;

type Words = View<AtomicU64>;

/// What leaves a native channel, by the socket and by the ring.
#[derive(Debug)]
pub(super) struct NativeOut {
    pub(super) queue: NativeOutbox<Passed>,
    ring: RingOut,
    /// Frames that go by the socket, besides what is queued. Short.
    aside: Vec<u8>,
    /// Where in the stream the last wake-up ends that was queued.
    wake_ends: u64,
    allowed: bool,
}

/// The ring by which we send.
#[derive(Debug)]
enum RingOut {
    /// The other end takes none, or did not say so far that it does.
    None,
    /// It would take one.
    Possible,
    Offered(Producer<Words>),
    Used(Used),
}

#[derive(Debug)]
struct Used {
    producer: Producer<Words>,
    /// What is queued before this position of the stream goes by the socket.
    from: u64,
    /// The next frame that goes by the socket has its place in the ring.
    placed: bool,
    /// Something was added that nobody was woken for.
    added: bool,
}

impl NativeOut {
    /// With the greeting in it.
    pub(super) fn new() -> NativeOut {
        let mut out = NativeOut {
            queue: NativeOutbox::new(),
            ring: RingOut::None,
            aside: Vec::new(),
            wake_ends: 0,
            allowed: true,
        };
        out.push_frame(PortFrame::Hello { features: FEATURE_RING });
        out
    }

    /// Queues a frame of the channel itself.
    pub(super) fn push_frame(&mut self, frame: PortFrame<'_>) {
        self.push_with_handles(frame, Vec::new());
    }

    fn push_with_handles(&mut self, frame: PortFrame<'_>, handles: Vec<Passed>) {
        let write = |to: &mut Vec<u8>| {
            frame.write(to);
            Ok::<_, std::convert::Infallible>(())
        };
        self.queue.push_with(handles, usize::MAX, write).expect("a frame of ours fits");
    }

    /// Says something that has no order, in the socket.
    fn say(&mut self, frame: PortFrame<'_>) {
        if !matches!(self.ring, RingOut::Used(_)) {
            return self.push_frame(frame);
        }
        let start = self.aside.len();
        self.aside.extend_from_slice(&[0; HEADER_BYTES]);
        frame.write(&mut self.aside);
        let length = self.aside.len() - start - HEADER_BYTES;
        let length = u32::try_from(length).expect("a frame of ours is short");
        self.aside[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// Wakes the other end: there is room in its ring, or something in ours.
    pub(super) fn wake_other(&mut self) {
        // One that was not sent yet does for both.
        if self.aside.is_empty() && self.queue.written_total() >= self.wake_ends {
            self.say(PortFrame::Wake);
            if self.aside.is_empty() {
                self.wake_ends = self.queue.written_total() + self.queue.queued_bytes() as u64;
            }
        }
    }

    /// Whether a ring may be offered from now on.
    pub(super) fn allow_ring(&mut self, allowed: bool) {
        self.allowed = allowed;
    }

    pub(super) fn answer_offer(&mut self, taken: bool) {
        self.say(PortFrame::RingAnswer { taken });
    }

    /// The other end said what it can do.
    pub(super) fn other_can(&mut self, features: u32) {
        if features & FEATURE_RING != 0 {
            self.ring = RingOut::Possible;
        }
    }

    /// The other end takes our ring, or does not.
    pub(super) fn offer_was_answered(&mut self, taken: bool) -> Result<(), ProtocolError> {
        let RingOut::Offered(producer) = std::mem::replace(&mut self.ring, RingOut::None) else {
            return Err(ProtocolError::BadFrame { why: "it answers an offer that was not made" });
        };
        if taken {
            self.push_frame(PortFrame::RingStart);
            let from = self.queue.close_run();
            self.ring = RingOut::Used(Used { producer, from, placed: false, added: false });
        }
        Ok(())
    }

    /// Whether messages go by the ring.
    pub(super) fn uses_ring(&self) -> bool {
        matches!(self.ring, RingOut::Used(_))
    }

    fn offer_when_it_pays(&mut self) {
        let pays = self.allowed && self.queue.written_total() >= OFFER_FROM_BYTES;
        if !pays || !matches!(self.ring, RingOut::Possible) {
            return;
        }
        // Without memory for it, everything goes on as before.
        self.ring = RingOut::None;
        if let Some((memory, producer)) = make_ring() {
            self.push_with_handles(PortFrame::Ring, vec![Handle::Memory(memory).into()]);
            self.ring = RingOut::Offered(producer);
        }
    }

    /// Writes as far as it goes. `sleeps`: the caller will wait for what is missing.
    pub(super) fn write_to(&mut self, socket: &Socket, sleeps: bool) -> Written {
        let written = self.write_queue(socket, sleeps);
        if let RingOut::Used(used) = &mut self.ring
            && std::mem::take(&mut used.added)
            && used.producer.must_wake()
        {
            self.wake_other();
            // Who is in the middle of a frame in the socket writes on as soon as it can.
            if let Err(stopped) = self.write_aside(socket) {
                return stopped;
            }
        }
        written
    }

    fn write_queue(&mut self, socket: &Socket, sleeps: bool) -> Written {
        loop {
            self.offer_when_it_pays();
            if let Err(stopped) = self.write_aside(socket) {
                return stopped;
            }
            let Some(chunk) = self.queue.peek() else { return Written::All };
            let at = self.queue.written_total();
            let used = match &mut self.ring {
                RingOut::Used(used) if at >= used.from => Some(used),
                _ => None,
            };
            let moved = match used {
                Some(used) if !chunk.apart => used.add(chunk.bytes, sleeps),
                Some(used) if !used.placed => match used.place(sleeps) {
                    Ok(()) => continue,
                    Err(stopped) => Err(stopped),
                },
                _ => {
                    let fds: Vec<_> = chunk.handles.iter().map(std::os::fd::AsFd::as_fd).collect();
                    Written::from(socket.write(chunk.bytes, &fds))
                }
            };
            match moved {
                Ok(bytes) => {
                    let apart = chunk.apart;
                    self.queue.wrote(bytes);
                    // Between two Rust programs the kernel keeps what is under way.
                    self.queue.forget_written();
                    if let RingOut::Used(used) = &mut self.ring
                        && apart
                        && self.queue.is_between_frames()
                    {
                        used.placed = false;
                    }
                }
                Err(stopped) => return stopped,
            }
        }
    }

    /// Writes what goes aside, unless the socket stands inside a frame.
    fn write_aside(&mut self, socket: &Socket) -> Result<(), Written> {
        while !self.aside.is_empty() {
            let inside = self.queue.peek().is_some_and(|chunk| chunk.apart);
            if inside && !self.queue.is_between_frames() {
                return Ok(());
            }
            let written = Written::from(socket.write(&self.aside, &[]))?;
            self.aside.drain(..written);
        }
        Ok(())
    }
}

impl Used {
    /// Adds as much as there is room for; how much that was.
    fn add(&mut self, bytes: &[u8], sleeps: bool) -> Result<usize, Written> {
        let least = bytes.len().min(LEAST_PIECE_BYTES).min(self.producer.longest());
        loop {
            let room = match self.producer.known_room() {
                room if room < least => self.producer.room().map_err(broken)?,
                room => room,
            };
            if room >= least {
                let piece = &bytes[..bytes.len().min(room)];
                self.producer.push(RECORD_FRAMES, piece).map_err(|_| Written::Gone)?;
                self.added = true;
                return Ok(piece.len());
            }
            self.no_room_for(least, sleeps)?;
        }
    }

    /// Marks the place of a frame that goes by the socket.
    fn place(&mut self, sleeps: bool) -> Result<(), Written> {
        loop {
            match self.producer.push(RECORD_PLACE, &[]) {
                Ok(()) => {
                    (self.placed, self.added) = (true, true);
                    return Ok(());
                }
                Err(PushError::Full) => self.no_room_for(0, sleeps)?,
                Err(_) => return Err(Written::Gone),
            }
        }
    }

    /// `Ok` when there is room after all.
    fn no_room_for(&mut self, bytes: usize, sleeps: bool) -> Result<(), Written> {
        if !sleeps {
            return Err(Written::RingFull);
        }
        match self.producer.prepare_sleep(bytes) {
            Ok(true) => Err(Written::RingFull),
            Ok(false) => Ok(()),
            Err(_) => Err(Written::Gone),
        }
    }
}

fn broken(_: Corrupt) -> Written {
    Written::Gone
}

fn make_ring() -> Option<(SharedArrayBuffer, Producer<Words>)> {
    let memory = SharedArrayBuffer::new(ring::words_for(RING_BYTES) * size_of::<u64>()).ok()?;
    let words = memory.u64().ok()?;
    ring::format(&words).ok()?;
    Some((memory, Producer::new(words).ok()?))
}

/// What comes to a native channel by the ring.
pub(super) struct RingIn {
    consumer: Option<Consumer<Words>>,
    started: bool,
    frames: FrameStream,
    /// Was looked at, and comes before what is in the frames.
    next: Option<Event>,
    /// What comes next is in the socket.
    at_place: bool,
    /// How much more is taken in this turn.
    left: usize,
}

impl RingIn {
    pub(super) fn new(limits: Limits) -> RingIn {
        let frames = FrameStream::new(limits);
        RingIn { consumer: None, started: false, frames, next: None, at_place: false, left: 0 }
    }

    /// Takes what was offered, if it is a ring; whether it was.
    pub(super) fn take_offer(
        &mut self,
        memory: Option<SharedArrayBuffer>,
    ) -> Result<bool, ProtocolError> {
        if self.consumer.is_some() {
            return Err(ProtocolError::BadFrame { why: "it offers a second ring" });
        }
        let words = memory.filter(|memory| memory.len() <= MOST_RING_BYTES);
        let words = words.and_then(|memory| memory.u64().ok());
        let words = words.filter(|words| words.len() > HEADER_WORDS);
        self.consumer = words.and_then(|words| Consumer::new(words).ok());
        Ok(self.consumer.is_some())
    }

    /// From now on messages come by the ring.
    pub(super) fn start(&mut self) -> Result<(), ProtocolError> {
        if self.consumer.is_none() || self.started {
            return Err(ProtocolError::BadFrame { why: "it starts a ring that was not agreed on" });
        }
        self.started = true;
        Ok(())
    }

    pub(super) fn is_started(&self) -> bool {
        self.started
    }

    /// How much can be in it at most, if there is one.
    pub(super) fn most(&self) -> Option<usize> {
        self.consumer.as_ref().filter(|_| self.started).map(Consumer::most_bytes)
    }

    /// Lets so many bytes be taken.
    pub(super) fn begin_turn(&mut self, bytes: usize) {
        self.left = bytes;
    }

    /// What came by the ring next, unless it is the turn of the socket, or of somebody else.
    pub(super) fn next(&mut self) -> Result<Option<Event>, ProtocolError> {
        if let Some(event) = self.next.take() {
            return Ok(Some(event));
        }
        loop {
            if let Some(payload) = self.frames.next()? {
                return ring_event(payload).map(Some);
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Takes messages that are nothing else, one after another.
    pub(super) fn take_plain(&mut self, came: &mut Vec<Message>) -> Result<(), ProtocolError> {
        if !self.started || self.next.is_some() {
            return Ok(());
        }
        loop {
            while let Some(payload) = self.frames.next()? {
                match PortFrame::message(payload) {
                    Some(body) => came.push(Message::plain(Body::native(body))),
                    None => {
                        self.next = Some(ring_event(payload)?);
                        return Ok(());
                    }
                }
            }
            if !self.fill()? {
                return Ok(());
            }
        }
    }

    /// Takes records until a frame may be complete; false when there is none for now.
    fn fill(&mut self) -> Result<bool, ProtocolError> {
        let Some(consumer) = self.consumer.as_mut().filter(|_| self.started) else {
            return Ok(false);
        };
        if self.at_place || self.left == 0 {
            return Ok(false);
        }
        let buffer = self.frames.buffer();
        let before = buffer.len();
        match consumer.pop(buffer).map_err(fault)? {
            None => Ok(false),
            Some(RECORD_FRAMES) => {
                // An empty record is no reason to look on for ever.
                self.left = self.left.saturating_sub((buffer.len() - before).max(8));
                Ok(true)
            }
            Some(RECORD_PLACE) if !self.frames.has_partial() => {
                self.at_place = true;
                Ok(false)
            }
            Some(_) => Err(ProtocolError::BadFrame { why: "the ring has no such record" }),
        }
    }

    /// What came by the socket has its turn: true if so, false when there is more to take first.
    pub(super) fn take_place(&mut self) -> Result<bool, ProtocolError> {
        if !self.at_place && self.left > 0 {
            return Err(ProtocolError::BadFrame { why: "its place in the ring is missing" });
        }
        Ok(std::mem::take(&mut self.at_place))
    }

    /// Whether there is something to take, and it is not the turn of the socket.
    pub(super) fn has_more(&mut self) -> Result<bool, ProtocolError> {
        match self.waiting() {
            Some(consumer) => consumer.is_empty().map(|empty| !empty).map_err(fault),
            None => Ok(false),
        }
    }

    /// To be called before waiting; false when there is something to take.
    pub(super) fn prepare_sleep(&mut self) -> Result<bool, ProtocolError> {
        match self.waiting() {
            Some(consumer) => consumer.prepare_sleep().map_err(fault),
            None => Ok(true),
        }
    }

    /// To be called after waiting.
    pub(super) fn awake(&mut self) {
        if let Some(consumer) = self.waiting() {
            consumer.awake();
        }
    }

    /// Whether the other end waits for room, and there is.
    pub(super) fn must_wake(&self) -> bool {
        self.started && self.consumer.as_ref().is_some_and(Consumer::must_wake)
    }

    /// The ring, if something may come by it next.
    fn waiting(&mut self) -> Option<&mut Consumer<Words>> {
        self.consumer.as_mut().filter(|_| self.started && !self.at_place)
    }
}

fn fault(_: Corrupt) -> ProtocolError {
    ProtocolError::BadFrame { why: "its ring is corrupt" }
}
