//! Orders what is sent to a Node peer, with several handles in flight and none mis-paired.
//!
//! The shell pushes lines, asks [`Outbox::peek`] what to write now, and reports with [`Outbox::wrote`] how
//! much of it the kernel took. How long the queue may grow is the shell's decision, by
//! [`Outbox::queued_bytes`] and [`Outbox::queued_handles`].
//!
//! # Why a handle must sometimes wait
//!
//! A stock receiver reads up to 65,536 bytes at a time, takes one descriptor per read and keeps it in a single
//! place until the next envelope is parsed. The kernel ends a read after the buffer that carried a
//! descriptor. So a read begins behind the previous handle message or later, and it contains the whole of the
//! next one when the bytes between the two and that message fit 65,536 together. Otherwise the read may end
//! inside the message, and the next read may bring the next descriptor before the line is
//! complete: the two are exchanged, and connections end up in the wrong server. Such a message is sent
//! *alone*: after everything before it was acknowledged, and with no further handle until it is
//! acknowledged itself. A message of which the kernel took only a part is alone from then on.
//!
//! This holds while the kernel takes a line under 32 KiB as one buffer: `SO_SNDBUF`, as `getsockopt`
//! reports it, must be at least 65,664 (Linux gives 212,992, Node sets 131,072).
//!
//! Behaviour follows: Node `lib/internal/child_process.js`, libuv `src/unix/stream.c` (`uv__read`), Linux
//! `net/unix/af_unix.c` (`unix_stream_read_generic`); unix(7).

use std::collections::VecDeque;

use crate::ProtocolError;

/// Most bytes a stock receiver reads at once.
const READ_BYTES: u64 = 65_536;

/// A handle line must be shorter than this to share the channel with another one.
const SHORT_LINE_BYTES: usize = 32 << 10;

/// Plain lines are joined into runs of at most about this size, to be written at once.
const RUN_BYTES: usize = 64 << 10;

/// What to write now.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk<'a, H> {
    /// Never empty.
    pub bytes: &'a [u8],
    /// To be attached to the first of the bytes, in one `sendmsg` that has no other bytes before it. It
    /// stays in the outbox until it is acknowledged.
    pub handle: Option<&'a H>,
}

/// Lines and handles on their way to one peer. `H` is an owned descriptor, or a token for one.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct Outbox<H> {
    window: usize,
    /// Lines that may overtake `queue`, joined. Sent from `bypass_sent` on.
    bypass: Vec<u8>,
    bypass_sent: usize,
    queue: VecDeque<Item<H>>,
    /// How much of the first item in `queue` was written. Never all of it.
    front_sent: usize,
    in_flight: VecDeque<Flight<H>>,
    /// Position in the stream: everything before was written and not taken back.
    written: u64,
    queued_bytes: usize,
    queued_handles: usize,
    /// The read that takes the next descriptor begins here or later: behind the last handle message, or
    /// where the peer stopped reading. Never beyond `written`, except while a handle message is partly written.
    read_from: u64,
    /// The peer has read everything before this: a message that ends here was acknowledged, or what was
    /// behind it was taken back.
    known_read: u64,
    nacks: u64,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Item<H> {
    /// Whole plain lines.
    Plain(Vec<u8>),
    Handle {
        line: Vec<u8>,
        handle: H,
    },
    /// Begins inside a line, so nothing may overtake it: a handle message whose first byte was written, or
    /// what was taken back.
    Rest(Vec<u8>),
}

/// A handle message that was written, at least in part, and not acknowledged.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Flight<H> {
    handle: H,
    /// First byte and one past the last, as positions in the stream.
    start: u64,
    end: u64,
    /// No other handle may be sent until this one is acknowledged.
    alone: bool,
}

impl<H> Item<H> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Plain(bytes) | Self::Rest(bytes) | Self::Handle { line: bytes, .. } => bytes,
        }
    }
}

impl<H> Outbox<H> {
    /// An empty outbox that keeps at most `window` handle messages unacknowledged; at least one.
    #[must_use]
    pub fn new(window: usize) -> Self {
        Self {
            window: window.max(1),
            bypass: Vec::new(),
            bypass_sent: 0,
            queue: VecDeque::new(),
            front_sent: 0,
            in_flight: VecDeque::new(),
            written: 0,
            queued_bytes: 0,
            queued_handles: 0,
            read_from: 0,
            known_read: 0,
            nacks: 0,
        }
    }

    /// Queues a plain line, newline included. An empty one is ignored.
    pub fn push(&mut self, line: Vec<u8>) {
        if line.is_empty() {
            return;
        }
        self.queued_bytes += line.len();
        match self.queue.back_mut() {
            Some(Item::Plain(run)) if run.len() + line.len() <= RUN_BYTES => {
                run.extend_from_slice(&line);
            }
            _ => self.queue.push_back(Item::Plain(line)),
        }
    }

    /// Queues a line with a handle.
    ///
    /// # Panics
    ///
    /// If the line is empty: a descriptor needs a byte to travel with.
    pub fn push_handle(&mut self, line: Vec<u8>, handle: H) {
        assert!(!line.is_empty(), "a descriptor needs a byte to travel with");
        self.queued_bytes += line.len();
        self.queued_handles += 1;
        self.queue.push_back(Item::Handle { line, handle });
    }

    /// Queues an acknowledgement, which goes before everything that is queued, but never into a message
    /// that is partly written. Without this two peers that wait for each other's acknowledgement wait
    /// for ever.
    pub fn push_bypass(&mut self, line: impl Into<Vec<u8>>) {
        let line = line.into();
        self.queued_bytes += line.len();
        if self.bypass.is_empty() {
            self.bypass = line;
        } else {
            self.bypass.extend_from_slice(&line);
        }
    }

    /// What to write now, or `None` while there is nothing or an acknowledgement must come first.
    #[must_use]
    pub fn peek(&self) -> Option<Chunk<'_, H>> {
        let chunk = match self.turn()? {
            Turn::Bypass => Chunk { bytes: &self.bypass[self.bypass_sent..], handle: None },
            Turn::Front => match self.queue.front()? {
                Item::Handle { line, handle } => Chunk { bytes: line, handle: Some(handle) },
                item => Chunk { bytes: &item.bytes()[self.front_sent..], handle: None },
            },
        };
        Some(chunk)
    }

    /// Reports that the kernel took the first `n` bytes of the chunk, and its handle if `n` is not 0. More
    /// than the chunk has counts as the whole chunk.
    pub fn wrote(&mut self, n: usize) {
        let Some(chunk) = self.peek() else { return };
        let n = n.min(chunk.bytes.len());
        if n == 0 {
            return;
        }
        match self.turn() {
            Some(Turn::Bypass) => self.bypass_wrote(n),
            Some(Turn::Front) => self.front_wrote(n),
            None => return,
        }
        self.written += n as u64;
        self.queued_bytes -= n;
    }

    /// The peer acknowledged the oldest handle in flight, which is given back: to be closed, or to be
    /// sent elsewhere after a `nack`.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::UnsolicitedAck`] when no completely written handle message waits for one.
    pub fn acknowledged(&mut self, nack: bool) -> Result<H, ProtocolError> {
        if self.in_flight.front().is_none_or(|oldest| oldest.end > self.written) {
            return Err(ProtocolError::UnsolicitedAck);
        }
        let oldest = self.in_flight.pop_front().ok_or(ProtocolError::UnsolicitedAck)?;
        self.known_read = self.known_read.max(oldest.end);
        self.nacks += u64::from(nack);
        Ok(oldest.handle)
    }

    /// Handle messages that were written, at least in part, and not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Bytes that are not written yet.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Acknowledgements and other answers that are not written yet, in bytes.
    #[must_use]
    pub fn bypass_bytes(&self) -> usize {
        self.bypass.len() - self.bypass_sent
    }

    /// Handles of which nothing is written yet.
    #[must_use]
    pub fn queued_handles(&self) -> usize {
        self.queued_handles
    }

    /// True when everything was written and acknowledged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queued_bytes == 0 && self.in_flight.is_empty()
    }

    /// Bytes written and not taken back, since the beginning.
    #[must_use]
    pub fn written_total(&self) -> u64 {
        self.written
    }

    /// Handle messages that were refused by a NACK.
    #[must_use]
    pub fn nacks_total(&self) -> u64 {
        self.nacks
    }

    /// The handles in flight, oldest first.
    pub fn handles_in_flight(&self) -> impl Iterator<Item = &H> {
        self.in_flight.iter().map(|flight| &flight.handle)
    }

    /// The peer is gone: all handles that it did not acknowledge, oldest first, those that were not sent
    /// last. The lines are dropped, and the outbox is empty even if the iterator is not used.
    pub fn drain(&mut self) -> impl Iterator<Item = H> + use<H> {
        let flights = std::mem::take(&mut self.in_flight);
        let queue = std::mem::take(&mut self.queue);
        self.bypass.clear();
        self.bypass_sent = 0;
        self.front_sent = 0;
        self.queued_bytes = 0;
        self.queued_handles = 0;
        let unsent = queue.into_iter().filter_map(|item| match item {
            Item::Handle { handle, .. } => Some(handle),
            Item::Plain(_) | Item::Rest(_) => None,
        });
        flights.into_iter().map(|flight| flight.handle).chain(unsent)
    }

    /// Takes back what the peer has not read: `unread` is the last part of everything written, as it was
    /// pulled out of the peer's socket.
    ///
    /// Handle messages of which nothing was read vanish from the stream and their handles are given back,
    /// oldest first. Everything else of `unread` is queued again, in order and before anything
    /// else, so that the peer sees a well-formed stream: plain lines, and the rest of a message that was
    /// partly read. A handle message that was partly read stays in flight, as its descriptor was received.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadRewind`] when more is said to be unread than can be, by what the peer
    /// acknowledged: nothing is changed then, and the channel is not to be trusted.
    pub fn rewind_unread(&mut self, unread: &[u8]) -> Result<Vec<H>, ProtocolError> {
        let possible = self.written.saturating_sub(self.known_read);
        let taken = unread.len() as u64;
        if taken > possible {
            return Err(ProtocolError::BadRewind { unread: taken, possible });
        }
        if taken == 0 {
            return Ok(Vec::new());
        }
        let read_to = self.written - taken;
        let first_unread = self.in_flight.partition_point(|flight| flight.start < read_to);
        let unsent_handles = self.in_flight.split_off(first_unread);
        let again = without(unread, read_to, &unsent_handles);
        self.forget_unfinished(&unsent_handles);
        self.written = read_to;
        self.known_read = read_to;
        self.read_from = read_to;
        if let Some(partly_read) = self.in_flight.back_mut().filter(|flight| flight.end > read_to) {
            partly_read.alone = true;
        }
        self.queue_again(again);
        Ok(unsent_handles.into_iter().map(|flight| flight.handle).collect())
    }
}

impl<H> Outbox<H> {
    /// The same outbox with something else in the place of each handle: a name by which another process finds it, or
    /// the handle that such a name stands for. Handles are visited in a fixed order.
    ///
    /// # Errors
    ///
    /// The first error of `name`.
    pub fn try_map<D, E>(&self, mut name: impl FnMut(&H) -> Result<D, E>) -> Result<Outbox<D>, E> {
        let flight = |flight: &Flight<H>| {
            let Flight { handle, start, end, alone } = flight;
            Ok(Flight { handle: name(handle)?, start: *start, end: *end, alone: *alone })
        };
        let in_flight = self.in_flight.iter().map(flight).collect::<Result<_, E>>()?;
        let item = |item: &Item<H>| {
            Ok(match item {
                Item::Plain(bytes) => Item::Plain(bytes.clone()),
                Item::Rest(bytes) => Item::Rest(bytes.clone()),
                Item::Handle { line, handle } => {
                    Item::Handle { line: line.clone(), handle: name(handle)? }
                }
            })
        };
        Ok(Outbox {
            window: self.window,
            bypass: self.bypass.clone(),
            bypass_sent: self.bypass_sent,
            queue: self.queue.iter().map(item).collect::<Result<_, E>>()?,
            front_sent: self.front_sent,
            in_flight,
            written: self.written,
            queued_bytes: self.queued_bytes,
            queued_handles: self.queued_handles,
            read_from: self.read_from,
            known_read: self.known_read,
            nacks: self.nacks,
        })
    }

    /// Whether its parts fit each other. To be asked of one that came from another process, before it is used.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let lengths: usize = self.queue.iter().map(|item| item.bytes().len()).sum();
        let bytes = (lengths + self.bypass.len()).checked_sub(self.front_sent + self.bypass_sent);
        let handles = self.queue.iter().filter(|item| matches!(item, Item::Handle { .. })).count();
        let front = self.queue.front().map_or(0, |item| item.bytes().len());
        let begun = self.front_sent > 0;
        let unfinished = self.in_flight.back().is_some_and(|last| last.end > self.written);
        let limit = u64::MAX / 2;
        self.window > 0
            && self.queue.iter().all(|item| !item.bytes().is_empty())
            && (self.front_sent < front || !begun)
            && !(begun && matches!(self.queue.front(), Some(Item::Handle { .. })))
            && self.bypass_sent <= self.bypass.len()
            && bytes == Some(self.queued_bytes)
            && handles == self.queued_handles
            && self.in_flight.iter().is_sorted_by(|a, b| a.start < a.end && a.end <= b.start)
            && self.in_flight.iter().all(|flight| flight.end < limit)
            && self.written < limit
            && self.known_read <= self.written
            && (self.read_from <= self.written || (unfinished && begun))
    }
}

/// Whose bytes are next.
enum Turn {
    Bypass,
    Front,
}

impl<H> Outbox<H> {
    fn turn(&self) -> Option<Turn> {
        if self.front_sent > 0 || matches!(self.queue.front(), Some(Item::Rest(_))) {
            return Some(Turn::Front);
        }
        if self.bypass_sent < self.bypass.len() {
            return Some(Turn::Bypass);
        }
        match self.queue.front()? {
            Item::Handle { line, .. } => self.may_send(line).then_some(Turn::Front),
            Item::Plain(_) | Item::Rest(_) => Some(Turn::Front),
        }
    }

    /// Whether a handle message may be begun now.
    fn may_send(&self, line: &[u8]) -> bool {
        match self.in_flight.back() {
            None => true,
            Some(last) => {
                !last.alone && self.in_flight.len() < self.window && self.fits_one_read(line)
            }
        }
    }

    /// Whether the receiver is sure to read the whole line at once.
    fn fits_one_read(&self, line: &[u8]) -> bool {
        let since_last = self.written - self.read_from;
        line.len() < SHORT_LINE_BYTES && since_last + line.len() as u64 <= READ_BYTES
    }

    fn bypass_wrote(&mut self, n: usize) {
        self.bypass_sent += n;
        if self.bypass_sent == self.bypass.len() {
            self.bypass.clear();
            self.bypass_sent = 0;
        }
    }

    fn front_wrote(&mut self, n: usize) {
        let Some(front) = self.queue.pop_front() else { return };
        let length = front.bytes().len();
        let rest = match front {
            Item::Handle { line, handle } => {
                let end = self.written + length as u64;
                let alone = n < length || !self.fits_one_read(&line);
                self.in_flight.push_back(Flight { handle, start: self.written, end, alone });
                self.read_from = end;
                self.queued_handles -= 1;
                Item::Rest(line)
            }
            other => other,
        };
        self.front_sent += n;
        if self.front_sent == length {
            self.front_sent = 0;
        } else {
            self.queue.push_front(rest);
        }
    }

    /// Drops what is still to be written of a handle message that vanishes from the stream.
    fn forget_unfinished(&mut self, vanished: &VecDeque<Flight<H>>) {
        if vanished.back().is_some_and(|last| last.end > self.written)
            && let Some(front) = self.queue.pop_front()
        {
            self.queued_bytes -= front.bytes().len() - self.front_sent;
            self.front_sent = 0;
        }
    }

    /// Puts taken-back bytes before everything else, and what is left of a partly written line right after them.
    fn queue_again(&mut self, mut again: Vec<u8>) {
        if again.is_empty() {
            return;
        }
        self.queued_bytes += again.len();
        if self.bypass_sent > 0 {
            again.extend_from_slice(&self.bypass[self.bypass_sent..]);
            self.bypass.clear();
            self.bypass_sent = 0;
        }
        if self.front_sent > 0
            && let Some(front) = self.queue.pop_front()
        {
            again.extend_from_slice(&front.bytes()[self.front_sent..]);
            self.front_sent = 0;
        }
        self.queue.push_front(Item::Rest(again));
    }
}

/// `unread`, which begins at position `from`, without the messages that vanish.
fn without<H>(unread: &[u8], from: u64, vanished: &VecDeque<Flight<H>>) -> Vec<u8> {
    let offset = |position: u64| {
        usize::try_from(position.saturating_sub(from))
            .map_or(unread.len(), |at| at.min(unread.len()))
    };
    let mut rest = Vec::with_capacity(unread.len());
    let mut at = 0;
    for flight in vanished {
        rest.extend_from_slice(&unread[at..offset(flight.start)]);
        at = offset(flight.end);
    }
    rest.extend_from_slice(&unread[at..]);
    rest
}
