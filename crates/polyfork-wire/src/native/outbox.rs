//! Orders native frames and their handles on the way to a peer.
//!
//! Frames leave in the order they were pushed. Frames without handles are joined, so that many go out in one
//! write; a frame with handles begins a write of its own. How many handles may be out unanswered is the
//! sender's decision; nothing waits here.
//!
//! The surprising rule: a frame with handles is remembered after it was written, until the caller tells that the
//! peer has read it. What a stuck peer has not read can be pulled out of its socket; then
//! [`NativeOutbox::rewind_unread`] gives such frames back, or writes them again with their handles.

use std::collections::VecDeque;

use super::{HEADER_BYTES, MAX_DESCRIPTORS, Payload, encode};
use crate::ProtocolError;

/// Frames without handles are joined into runs of at most about this size.
const RUN_BYTES: usize = 64 << 10;

/// What to write now.
#[derive(Debug, PartialEq, Eq)]
pub struct NativeChunk<'a, H> {
    /// Never empty.
    pub bytes: &'a [u8],
    /// To be attached to the first of the bytes, all in one `sendmsg`. At most 253.
    pub handles: &'a [H],
    /// It is the frame of one message with handles, or the rest of it.
    pub apart: bool,
}

/// Frames and handles on their way to one peer. `H` is an owned descriptor, or a token for one.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct NativeOutbox<H> {
    queue: VecDeque<Item<H>>,
    /// How much of the first item was written. Never all of it.
    front_sent: usize,
    queued_bytes: usize,
    queued_handles: usize,
    written: u64,
    /// Frames with handles that began to leave and may be unread, oldest first.
    sent: VecDeque<Sent<H>>,
    /// The peer has read everything before this position: a frame that ends here was answered, or what was behind
    /// it was taken back.
    known_read: u64,
    /// The memory of a run that has left, for the next one.
    #[serde(skip)]
    spare: Vec<u8>,
}

/// A frame that is being written to the end of a run; gone again unless it is [kept](Self::keep), also when
/// the writer of its payload panics.
struct Unfinished<'a> {
    run: &'a mut Vec<u8>,
    start: usize,
    kept: bool,
}

impl Unfinished<'_> {
    fn begin(run: &mut Vec<u8>) -> Unfinished<'_> {
        let start = run.len();
        run.extend_from_slice(&[0; HEADER_BYTES]);
        Unfinished { run, start, kept: false }
    }

    fn payload(&self) -> usize {
        self.run.len() - self.start - HEADER_BYTES
    }

    /// Completes the header; `None` for a payload that is empty or too long.
    fn keep(mut self, descriptors: u8, most: usize) -> Option<usize> {
        let payload = self.payload();
        let length = u32::try_from(payload).ok().filter(|_| payload > 0 && payload <= most)?;
        let header = &mut self.run[self.start..self.start + HEADER_BYTES];
        header[..4].copy_from_slice(&length.to_le_bytes());
        header[4] = descriptors;
        self.kept = true;
        Some(self.run.len() - self.start)
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.run.truncate(self.start);
        }
    }
}

/// Why [`NativeOutbox::push_with`] queued nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotPushed<E> {
    /// The writer of the payload failed.
    Writer(E),
    /// The payload is empty or longer than allowed, or there are more than [`MAX_DESCRIPTORS`] handles.
    Size,
}

/// Where a frame with handles stands in the stream: its first byte, and one past its last.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Sent<H> {
    start: u64,
    end: u64,
    handles: Vec<H>,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Item<H> {
    bytes: Vec<u8>,
    /// Moved to `sent` when the first byte is written.
    handles: Vec<H>,
    /// Nothing may be joined to it.
    closed: bool,
    /// It is one frame, and has or had handles.
    apart: bool,
}

impl<H> NativeOutbox<H> {
    /// An empty outbox.
    #[must_use]
    pub fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            front_sent: 0,
            queued_bytes: 0,
            queued_handles: 0,
            written: 0,
            sent: VecDeque::new(),
            known_read: 0,
            spare: Vec::new(),
        }
    }

    /// Queues a frame whose payload, of at most `most` bytes, is written by `write` straight behind what is
    /// queued. When that fails or panics nothing is queued.
    ///
    /// # Errors
    ///
    /// [`NotPushed`].
    pub fn push_with<E>(
        &mut self,
        handles: Vec<H>,
        most: usize,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), NotPushed<E>> {
        let count = u8::try_from(handles.len()).map_err(|_| NotPushed::Size)?;
        if handles.len() > MAX_DESCRIPTORS {
            return Err(NotPushed::Size);
        }
        let plain = handles.is_empty();
        let joins = |run: &Item<H>| plain && !run.closed && run.bytes.len() < RUN_BYTES;
        let added = if let Some(run) = self.queue.back_mut().filter(|run| joins(run)) {
            finish(&mut run.bytes, count, most, write)?
        } else {
            let mut bytes = std::mem::take(&mut self.spare);
            let added = finish(&mut bytes, count, most, write)?;
            self.queue.push_back(Item { bytes, handles, closed: !plain, apart: !plain });
            added
        };
        self.queued_bytes += added;
        self.queued_handles += usize::from(count);
        Ok(())
    }

    /// The same outbox with something else in the place of each handle: a name by which another process finds it, or
    /// the handle that such a name stands for. Handles are visited in a fixed order.
    ///
    /// # Errors
    ///
    /// The first error of `name`.
    pub fn try_map<D, E>(
        &self,
        mut name: impl FnMut(&H) -> Result<D, E>,
    ) -> Result<NativeOutbox<D>, E> {
        let mut all = |handles: &[H]| handles.iter().map(&mut name).collect::<Result<Vec<D>, E>>();
        let sent = |sent: &Sent<H>| {
            Ok(Sent { start: sent.start, end: sent.end, handles: all(&sent.handles)? })
        };
        let sent = self.sent.iter().map(sent).collect::<Result<_, E>>()?;
        let item = |item: &Item<H>| {
            let Item { bytes, handles, closed, apart } = item;
            Ok(Item {
                bytes: bytes.clone(),
                handles: all(handles)?,
                closed: *closed,
                apart: *apart,
            })
        };
        Ok(NativeOutbox {
            queue: self.queue.iter().map(item).collect::<Result<_, E>>()?,
            front_sent: self.front_sent,
            queued_bytes: self.queued_bytes,
            queued_handles: self.queued_handles,
            written: self.written,
            sent,
            known_read: self.known_read,
            spare: Vec::new(),
        })
    }

    /// Whether its parts fit each other. To be asked of one that came from another process, before it is used.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let lengths: usize = self.queue.iter().map(|item| item.bytes.len()).sum();
        let handles: usize = self.queue.iter().map(|item| item.handles.len()).sum();
        let front = self.queue.front().map_or(0, |item| item.bytes.len());
        let limit = u64::MAX / 2;
        (self.front_sent < front || self.front_sent == 0)
            && self.queue.iter().all(|item| !item.bytes.is_empty())
            && self.queue.iter().all(|item| item.handles.len() <= MAX_DESCRIPTORS)
            && lengths.checked_sub(self.front_sent) == Some(self.queued_bytes)
            && handles == self.queued_handles
            && self.written < limit
            && self.known_read <= self.written
            && self.sent.iter().is_sorted_by(|a, b| a.start < a.end && a.end <= b.start)
            && self.sent.iter().all(|sent| sent.end < limit && !sent.handles.is_empty())
    }

    /// Forgets frames that were written: their handles are dropped and nothing can be taken back. For
    /// channels on which nobody takes anything back.
    pub fn forget_written(&mut self) {
        self.known_read = self.written;
        self.sent.clear();
    }

    /// Queues a message with its handles.
    ///
    /// # Panics
    ///
    /// With more than [`MAX_DESCRIPTORS`] handles, or for a message of 4 GiB.
    pub fn push<T: Payload>(&mut self, message: &T, handles: Vec<H>) {
        assert!(handles.len() <= MAX_DESCRIPTORS, "one frame carries at most 253 handles");
        let bytes = encode(message, handles.len());
        self.queued_bytes += bytes.len();
        self.queued_handles += handles.len();
        let plain = handles.is_empty();
        match self.queue.back_mut() {
            Some(run) if plain && !run.closed && run.bytes.len() + bytes.len() <= RUN_BYTES => {
                run.bytes.extend_from_slice(&bytes);
            }
            _ => self.queue.push_back(Item { bytes, handles, closed: !plain, apart: !plain }),
        }
    }

    /// What to write now, or `None` when there is nothing.
    #[must_use]
    pub fn peek(&self) -> Option<NativeChunk<'_, H>> {
        let front = self.queue.front()?;
        let bytes = &front.bytes[self.front_sent..];
        Some(NativeChunk { bytes, handles: &front.handles, apart: front.apart })
    }

    /// Whether the next chunk begins with a whole frame, or there is none.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        self.front_sent == 0
    }

    /// What is pushed from now on does not share a chunk with what is queued. Returns the position in the stream at
    /// which it will begin.
    pub fn close_run(&mut self) -> u64 {
        if let Some(last) = self.queue.back_mut() {
            last.closed = true;
        }
        self.written + self.queued_bytes as u64
    }

    /// Reports that the kernel took the first `n` bytes of the chunk, and its handles if `n` is not 0. More than
    /// the chunk has counts as the whole chunk.
    pub fn wrote(&mut self, n: usize) {
        let Some(front) = self.queue.front_mut() else { return };
        let n = n.min(front.bytes.len() - self.front_sent);
        if n == 0 {
            return;
        }
        let handles = std::mem::take(&mut front.handles);
        if !handles.is_empty() {
            self.queued_handles -= handles.len();
            let end = self.written + front.bytes.len() as u64;
            self.sent.push_back(Sent { start: self.written, end, handles });
        }
        self.front_sent += n;
        if self.front_sent == front.bytes.len() {
            self.front_sent = 0;
            if let Some(Item { mut bytes, .. }) = self.queue.pop_front()
                && bytes.capacity() <= 2 * RUN_BYTES
            {
                bytes.clear();
                self.spare = bytes;
            }
        }
        self.written += n as u64;
        self.queued_bytes -= n;
    }

    /// The peer has shown that it read the frame that carries a handle like this, and so everything before it:
    /// these frames are forgotten and their handles dropped. Nothing happens if no completely written
    /// frame has one.
    pub fn was_read(&mut self, mut is_it: impl FnMut(&H) -> bool) {
        let at = self.sent.iter().position(|sent| sent.handles.iter().any(&mut is_it));
        if let Some(at) = at.filter(|at| self.sent[*at].end <= self.written) {
            self.known_read = self.known_read.max(self.sent[at].end);
            self.sent.drain(..=at);
        }
    }

    /// Takes back what the peer has not read: `unread` is the last part of everything written, as it was pulled
    /// out of the peer's socket together with its descriptors.
    ///
    /// Frames of which nothing was read and whose first handle is `removable` vanish from the stream, even if
    /// they are not completely written; their handles are returned, oldest frame first. Everything else of
    /// `unread` is queued again, in order, with its handles and before anything else, so that the peer
    /// sees a well-formed stream. A frame that was partly read goes on without its handles, as they were
    /// received.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadRewind`] when more is said to be unread than can be, by what the peer answered:
    /// nothing is changed then, and the channel is not to be trusted.
    pub fn rewind_unread(
        &mut self,
        unread: &[u8],
        mut removable: impl FnMut(&H) -> bool,
    ) -> Result<Vec<Vec<H>>, ProtocolError> {
        let possible = self.written.saturating_sub(self.known_read);
        let taken = unread.len() as u64;
        if taken > possible {
            return Err(ProtocolError::BadRewind { unread: taken, possible });
        }
        if taken == 0 {
            return Ok(Vec::new());
        }
        let mut stream = unread.to_vec();
        self.take_unfinished(&mut stream);
        self.written -= taken;
        self.known_read = self.written;
        let (mut removed, mut again) = (Vec::new(), Again::new(stream, self.written));
        for sent in std::mem::take(&mut self.sent) {
            if sent.start < self.written {
                // Partly or wholly read: its handles were received.
                continue;
            }
            again.up_to(sent.start, Vec::new());
            if sent.handles.first().is_some_and(&mut removable) {
                again.leave_out(sent.end);
                removed.push(sent.handles);
            } else {
                again.up_to(sent.end, sent.handles);
            }
        }
        self.queue_again(again.finish());
        Ok(removed)
    }

    /// Appends what is still to be written of the first item, if some of it was written, and removes it.
    fn take_unfinished(&mut self, stream: &mut Vec<u8>) {
        if self.front_sent > 0
            && let Some(front) = self.queue.pop_front()
        {
            let rest = &front.bytes[self.front_sent..];
            self.queued_bytes -= rest.len();
            stream.extend_from_slice(rest);
            self.front_sent = 0;
        }
    }

    fn queue_again(&mut self, items: Vec<Item<H>>) {
        for item in items.into_iter().rev() {
            self.queued_bytes += item.bytes.len();
            self.queued_handles += item.handles.len();
            self.queue.push_front(item);
        }
    }

    /// Bytes that are not written yet.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Handles that are not written yet.
    #[must_use]
    pub fn queued_handles(&self) -> usize {
        self.queued_handles
    }

    /// True when everything was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes written since the beginning.
    #[must_use]
    pub fn written_total(&self) -> u64 {
        self.written
    }

    /// The peer is gone: the handles that it is not known to have read, oldest first, those that were not sent
    /// last. The outbox is empty even if the iterator is not used.
    pub fn drain(&mut self) -> impl Iterator<Item = H> + use<H> {
        self.front_sent = 0;
        self.queued_bytes = 0;
        self.queued_handles = 0;
        let sent = std::mem::take(&mut self.sent).into_iter().flat_map(|sent| sent.handles);
        sent.chain(std::mem::take(&mut self.queue).into_iter().flat_map(|item| item.handles))
    }
}

/// Writes one frame to the end of `run`; gives its length.
fn finish<E>(
    run: &mut Vec<u8>,
    descriptors: u8,
    most: usize,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<usize, NotPushed<E>> {
    let frame = Unfinished::begin(run);
    write(frame.run).map_err(NotPushed::Writer)?;
    frame.keep(descriptors, most).ok_or(NotPushed::Size)
}

/// A stretch of the stream that is cut into items again.
struct Again<H> {
    stream: Vec<u8>,
    /// Position in the stream of its first byte.
    from: u64,
    /// How much was cut.
    at: usize,
    items: Vec<Item<H>>,
}

impl<H> Again<H> {
    fn new(stream: Vec<u8>, from: u64) -> Self {
        Self { stream, from, at: 0, items: Vec::new() }
    }

    /// Everything up to this position becomes an item with these handles, unless there is nothing.
    fn up_to(&mut self, position: u64, handles: Vec<H>) {
        let end = self.place(position);
        if end > self.at {
            let bytes = self.stream[self.at..end].to_vec();
            let apart = !handles.is_empty();
            self.items.push(Item { bytes, handles, closed: true, apart });
            self.at = end;
        }
    }

    /// Everything up to this position vanishes.
    fn leave_out(&mut self, position: u64) {
        self.at = self.place(position);
    }

    fn finish(mut self) -> Vec<Item<H>> {
        self.up_to(u64::MAX, Vec::new());
        self.items
    }

    fn place(&self, position: u64) -> usize {
        let offset = position.saturating_sub(self.from);
        usize::try_from(offset).unwrap_or(usize::MAX).clamp(self.at, self.stream.len())
    }
}

impl<H> Default for NativeOutbox<H> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{FrameDecoder, ToWorker};
    use super::*;
    use crate::Limits;

    fn connections(first_seq: u64, count: u32) -> ToWorker {
        ToWorker::Connections { listener: 1, first_seq, count }
    }

    #[test]
    fn closed_run_is_not_joined_and_frames_with_handles_stand_apart() {
        let mut outbox = NativeOutbox::new();
        outbox.push(&ToWorker::Message(vec![1; 10]), Vec::new());
        let end = outbox.close_run();
        assert_eq!(end, outbox.queued_bytes() as u64);
        outbox.push(&ToWorker::Message(vec![2; 10]), Vec::new());
        outbox.push(&ToWorker::Message(vec![3; 10]), vec![7]);
        assert!(outbox.is_between_frames());
        for apart in [false, false, true] {
            let chunk = outbox.peek().expect("there is more");
            let length = chunk.bytes.len();
            assert_eq!(chunk.apart, apart);
            outbox.wrote(1);
            assert!(!outbox.is_between_frames());
            assert_eq!(outbox.peek().map(|chunk| chunk.apart), Some(apart), "its rest as well");
            outbox.wrote(length - 1);
            assert!(outbox.is_between_frames());
        }
        assert_eq!(outbox.close_run(), outbox.written_total());
    }

    #[test]
    fn plain_frames_are_joined_and_handles_begin_a_write() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        outbox.push(&connections(0, 2), vec![1, 2]);
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        let frame = encode(&ToWorker::LeavingAcknowledged, 0);
        let first =
            NativeChunk { bytes: &[&frame[..], &frame].concat(), handles: &[], apart: false };
        assert_eq!(outbox.peek(), Some(first));
        outbox.wrote(2 * frame.len());
        assert_eq!(outbox.peek().expect("the second").handles, [1, 2]);
        assert_eq!(outbox.queued_handles(), 2);
        outbox.wrote(1);
        assert_eq!(outbox.queued_handles(), 0);
        assert!(outbox.peek().expect("the rest").handles.is_empty());
        outbox.wrote(usize::MAX);
        assert_eq!(outbox.peek().expect("the third").bytes, frame);
        outbox.wrote(frame.len());
        assert!(outbox.is_empty() && outbox.peek().is_none() && outbox.queued_bytes() == 0);
    }

    #[test]
    fn payload_written_in_place_is_the_same_frame_and_a_failed_one_leaves_nothing() {
        let mut outbox = NativeOutbox::<u32>::new();
        let whole = |to: &mut Vec<u8>| {
            to.extend_from_slice(b"abc");
            Ok::<(), ()>(())
        };
        outbox.push_with(vec![], 3, whole).expect("it fits");
        let failed = outbox.push_with(vec![], 3, |to| {
            to.push(1);
            Err("no")
        });
        assert_eq!(failed, Err(NotPushed::Writer("no")));
        assert_eq!(outbox.push_with(vec![], 2, whole), Err(NotPushed::Size));
        assert_eq!(outbox.push_with(vec![], 2, |_| Ok::<(), ()>(())), Err(NotPushed::Size));
        assert_eq!(outbox.push_with(vec![0; 254], 3, whole), Err(NotPushed::Size));
        outbox.push_with(vec![7], 3, whole).expect("it fits");
        assert_eq!(outbox.peek().expect("queued").bytes, [3, 0, 0, 0, 0, 0, b'a', b'b', b'c']);
        outbox.wrote(9);
        let with_handle = NativeChunk {
            bytes: &[3, 0, 0, 0, 1, 0, b'a', b'b', b'c'],
            handles: &[7],
            apart: true,
        };
        assert_eq!(outbox.peek(), Some(with_handle));
        outbox.wrote(9);
        outbox.forget_written();
        assert!(outbox.is_empty() && outbox.drain().next().is_none());
        assert_eq!((outbox.queued_bytes(), outbox.queued_handles()), (0, 0));
    }

    #[test]
    fn nothing_written_changes_nothing() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.wrote(5);
        outbox.push(&connections(0, 1), vec![1]);
        outbox.wrote(0);
        assert_eq!(outbox.peek().expect("still there").handles, [1]);
    }

    #[test]
    fn dead_peer_gives_back_what_it_may_not_have_read() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.push(&connections(0, 2), vec![1, 2]);
        outbox.push(&connections(2, 1), vec![3]);
        outbox.wrote(3);
        assert_eq!(outbox.drain().collect::<Vec<_>>(), [1, 2, 3]);
        assert!(outbox.is_empty() && outbox.queued_bytes() == 0 && outbox.queued_handles() == 0);
    }

    #[test]
    #[should_panic(expected = "at most 253 handles")]
    fn more_handles_than_one_sendmsg_takes_are_a_mistake_of_the_caller() {
        NativeOutbox::new().push(&connections(0, 254), vec![0; 254]);
    }

    #[test]
    fn more_unread_than_possible_is_refused() {
        let bad = |unread, possible| Err(ProtocolError::BadRewind { unread, possible });
        let mut outbox = NativeOutbox::new();
        assert_eq!(outbox.rewind_unread(b"x", |_| true), bad(1, 0));
        outbox.push(&connections(0, 1), vec![1]);
        outbox.push(&connections(1, 1), vec![2]);
        let frame = encode(&connections(0, 1), 1);
        outbox.wrote(frame.len());
        outbox.wrote(frame.len());
        outbox.was_read(|handle| *handle == 1);
        // It cannot have answered what it has not read.
        let unread = [&frame[..], &frame].concat();
        assert_eq!(outbox.rewind_unread(&unread, |_| true), bad(20, 10));
        assert_eq!(outbox.rewind_unread(&frame, |_| true), Ok(vec![vec![2]]));
        assert_eq!(outbox.rewind_unread(b"x", |_| true), bad(1, 0));
    }

    #[test]
    fn answer_to_a_frame_that_is_not_complete_is_ignored() {
        let mut outbox = NativeOutbox::new();
        outbox.push(&connections(0, 1), vec![1]);
        outbox.wrote(3);
        outbox.was_read(|handle| *handle == 1);
        assert_eq!(outbox.drain().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn frame_that_was_taken_back_half_written_can_be_taken_back_again() {
        let mut outbox = NativeOutbox::new();
        outbox.push(&connections(0, 1), vec![1]);
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        let frame = encode(&connections(0, 1), 1);
        outbox.wrote(3);
        assert_eq!(outbox.rewind_unread(&frame[..3], |_| false), Ok(vec![]));
        assert_eq!(outbox.peek(), Some(NativeChunk { bytes: &frame, handles: &[1], apart: true }));
        outbox.wrote(4);
        assert_eq!(outbox.rewind_unread(&frame[..4], |_| true), Ok(vec![vec![1]]));
        let last = encode(&ToWorker::LeavingAcknowledged, 0);
        assert_eq!(outbox.peek(), Some(NativeChunk { bytes: &last, handles: &[], apart: false }));
        assert_eq!((outbox.queued_bytes(), outbox.queued_handles()), (last.len(), 0));
    }

    /// Handles from here on are connections, which can be given to somebody else.
    const CONNECTION: u32 = 1000;

    /// A message of each kind, with the handle that a channel would send with it.
    fn message(kind: u8, n: u32, length: usize) -> (ToWorker, Vec<u32>) {
        match kind {
            0 => (ToWorker::Message(vec![7; length]), vec![]),
            1 => (ToWorker::Message(vec![8; length]), vec![n]),
            _ => (connections(u64::from(n), 2), vec![CONNECTION + n, 2 * CONNECTION + n]),
        }
    }

    proptest! {
        /// The peer reads now and then, and what it has not read is pulled back now and then.
        #[test]
        fn taking_back_removes_whole_connections_and_keeps_everything_else(
            steps in prop::collection::vec((0..8_u8, 0..60_usize), 1..100),
        ) {
            let mut outbox = NativeOutbox::new();
            let mut decoder = FrameDecoder::new(Limits::default());
            let (mut pushed, mut received, mut returned) = (Vec::new(), Vec::new(), Vec::new());
            // Single bytes on their way, each with what travels on it.
            let mut socket: VecDeque<(u8, Vec<u32>)> = VecDeque::new();
            let finish = [(3, usize::MAX), (5, usize::MAX)].into_iter().cycle().take(400);
            for (n, (step, size)) in (0..).zip(steps.into_iter().chain(finish)) {
                match step {
                    0..=2 => {
                        let (message, handles) = message(step, n, size);
                        outbox.push(&message, handles.clone());
                        pushed.push((message, handles));
                    }
                    3 | 4 => if let Some(chunk) = outbox.peek() {
                        let size = size.min(chunk.bytes.len());
                        let mut handles = chunk.handles.to_vec();
                        for byte in &chunk.bytes[..size] {
                            socket.push_back((*byte, std::mem::take(&mut handles)));
                        }
                        outbox.wrote(size);
                    },
                    5 | 6 => for (byte, handles) in socket.drain(..size.min(socket.len())) {
                        for handle in handles {
                            decoder.push_descriptor(handle).expect("there is room");
                        }
                        decoder.feed(&[byte]);
                        while let Some(frame) = decoder.next().expect("the stream is valid") {
                            if let Some(first) = frame.descriptors.first().filter(|_| size % 2 == 0) {
                                outbox.was_read(|handle| handle == first);
                            }
                            received.push((frame.message, frame.descriptors));
                        }
                    },
                    _ => {
                        let unread: Vec<u8> = socket.drain(..).map(|(byte, _)| byte).collect();
                        let back = outbox.rewind_unread(&unread, |handle| *handle >= CONNECTION);
                        returned.extend(back.expect("these were unread"));
                    }
                }
            }
            prop_assert!(outbox.is_empty() && socket.is_empty());
            prop_assert_eq!((outbox.queued_bytes(), outbox.queued_handles()), (0, 0));
            prop_assert!(returned.iter().flatten().all(|handle| *handle >= CONNECTION));
            pushed.retain(|(_, handles)| !returned.contains(handles));
            prop_assert_eq!(received, pushed);
        }

        #[test]
        fn every_frame_arrives_with_its_handles(
            sizes in prop::collection::vec((0..4_u32, 0..300_usize), 1..40),
            writes in prop::collection::vec(1..200_usize, 1..40),
        ) {
            let mut outbox = NativeOutbox::new();
            let mut sent = Vec::new();
            for (n, (handles, length)) in sizes.into_iter().enumerate() {
                let handles: Vec<_> = (0..handles).map(|handle| (n, handle)).collect();
                let message = ToWorker::Message(vec![n as u8; length]);
                outbox.push(&message, handles.clone());
                sent.push((message, handles));
            }
            let mut decoder = FrameDecoder::new(Limits::default());
            let mut received = Vec::new();
            let mut writes = writes.iter().cycle();
            while let Some(chunk) = outbox.peek() {
                let n = (*writes.next().expect("endless")).min(chunk.bytes.len());
                for handle in chunk.handles {
                    decoder.push_descriptor(*handle).expect("there is room");
                }
                decoder.feed(&chunk.bytes[..n]);
                outbox.wrote(n);
                while let Some(frame) = decoder.next().expect("the stream is valid") {
                    received.push((frame.message, frame.descriptors));
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert_eq!((outbox.queued_bytes(), outbox.queued_handles()), (0, 0));
        }
    }
}
