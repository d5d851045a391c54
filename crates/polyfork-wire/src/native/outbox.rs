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

use super::{MAX_DESCRIPTORS, Payload, encode};
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
}

/// Frames and handles on their way to one peer. `H` is an owned descriptor, or a token for one.
#[derive(Debug)]
pub struct NativeOutbox<H> {
    queue: VecDeque<Item<H>>,
    /// How much of the first item was written. Never all of it.
    front_sent: usize,
    queued_bytes: usize,
    queued_handles: usize,
    written: u64,
    /// Frames with handles that began to leave and may be unread, oldest first.
    sent: VecDeque<Sent<H>>,
}

/// Where a frame with handles stands in the stream.
#[derive(Debug)]
struct Sent<H> {
    start: u64,
    len: usize,
    handles: Vec<H>,
}

#[derive(Debug)]
struct Item<H> {
    bytes: Vec<u8>,
    /// Moved to `sent` when the first byte is written.
    handles: Vec<H>,
    /// Nothing may be joined to it.
    closed: bool,
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
        }
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
            _ => self.queue.push_back(Item { bytes, handles, closed: !plain }),
        }
    }

    /// What to write now, or `None` when there is nothing.
    #[must_use]
    pub fn peek(&self) -> Option<NativeChunk<'_, H>> {
        let front = self.queue.front()?;
        Some(NativeChunk { bytes: &front.bytes[self.front_sent..], handles: &front.handles })
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
            let len = front.bytes.len();
            self.sent.push_back(Sent { start: self.written, len, handles });
        }
        self.front_sent += n;
        if self.front_sent == front.bytes.len() {
            self.queue.pop_front();
            self.front_sent = 0;
        }
        self.written += n as u64;
        self.queued_bytes -= n;
    }

    /// The peer has shown that it read the frame that carries a handle like this, and so everything before it.
    pub fn was_read(&mut self, mut is_it: impl FnMut(&H) -> bool) {
        if let Some(at) = self.sent.iter().position(|sent| sent.handles.iter().any(&mut is_it)) {
            self.sent.drain(..=at);
        }
    }

    /// Takes back what the peer has not read: `unread` is the end of everything that was written, pulled out of
    /// the peer's socket together with its descriptors.
    ///
    /// Frames that were unread as a whole and whose first handle is `removable` are gone from the stream; their
    /// handles are returned, oldest frame first. Everything else is queued again, in order and with its handles.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BadFrame`] when more is unread than was ever written; nothing changes then.
    pub fn rewind_unread(
        &mut self,
        unread: &[u8],
        mut removable: impl FnMut(&H) -> bool,
    ) -> Result<Vec<Vec<H>>, ProtocolError> {
        let from = self
            .written
            .checked_sub(unread.len() as u64)
            .ok_or(ProtocolError::BadFrame { why: "more is unread than was written" })?;
        self.sent.retain(|sent| sent.start >= from);
        // What is left of a frame that was written in part goes on right behind the rest.
        if self.front_sent > 0
            && let Some(front) = self.queue.front_mut()
        {
            front.bytes.drain(..self.front_sent);
            front.closed = true;
            self.front_sent = 0;
        }
        let mut removed = Vec::new();
        let mut again = Vec::new();
        let mut at = from;
        for sent in std::mem::take(&mut self.sent) {
            self.piece(&mut again, unread, from, at, sent.start, Vec::new());
            at = sent.start;
            let end = sent.start + sent.len as u64;
            if end <= self.written && sent.handles.first().is_some_and(&mut removable) {
                removed.push(sent.handles);
            } else {
                self.piece(&mut again, unread, from, at, end.min(self.written), sent.handles);
            }
            at = end.min(self.written);
        }
        self.piece(&mut again, unread, from, at, self.written, Vec::new());
        self.written = from;
        for item in again.into_iter().rev() {
            self.queue.push_front(item);
        }
        Ok(removed)
    }

    /// Queues one stretch of the stream again.
    fn piece(
        &mut self,
        again: &mut Vec<Item<H>>,
        unread: &[u8],
        base: u64,
        start: u64,
        end: u64,
        handles: Vec<H>,
    ) {
        let place = |position: u64| usize::try_from(position - base).unwrap_or(unread.len());
        let bytes = unread[place(start)..place(end)].to_vec();
        if bytes.is_empty() {
            return;
        }
        self.queued_bytes += bytes.len();
        self.queued_handles += handles.len();
        again.push(Item { bytes, handles, closed: true });
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

    /// The peer is gone: the handles that were not sent, oldest first. The outbox is empty even if the
    /// iterator is not used.
    pub fn drain(&mut self) -> impl Iterator<Item = H> + use<H> {
        self.front_sent = 0;
        self.queued_bytes = 0;
        self.queued_handles = 0;
        std::mem::take(&mut self.queue).into_iter().flat_map(|item| item.handles)
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
    fn plain_frames_are_joined_and_handles_begin_a_write() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        outbox.push(&connections(0, 2), vec![1, 2]);
        outbox.push(&ToWorker::LeavingAcknowledged, vec![]);
        let frame = encode(&ToWorker::LeavingAcknowledged, 0);
        let first = NativeChunk { bytes: &[&frame[..], &frame].concat(), handles: &[] };
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
    fn nothing_written_changes_nothing() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.wrote(5);
        outbox.push(&connections(0, 1), vec![1]);
        outbox.wrote(0);
        assert_eq!(outbox.peek().expect("still there").handles, [1]);
    }

    #[test]
    fn dead_peer_gives_back_what_was_not_sent() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.push(&connections(0, 2), vec![1, 2]);
        outbox.push(&connections(2, 1), vec![3]);
        outbox.wrote(3);
        assert_eq!(outbox.drain().collect::<Vec<_>>(), [3]);
        assert!(outbox.is_empty() && outbox.queued_bytes() == 0 && outbox.queued_handles() == 0);
    }

    #[test]
    #[should_panic(expected = "at most 253 handles")]
    fn more_handles_than_one_sendmsg_takes_are_a_mistake_of_the_caller() {
        NativeOutbox::new().push(&connections(0, 254), vec![0; 254]);
    }

    /// What a receiver that reads `stream` from its beginning makes of it.
    fn decode(stream: &[(Vec<u8>, Vec<u32>)]) -> Vec<(ToWorker, Vec<u32>)> {
        let mut decoder = FrameDecoder::new(Limits::default());
        let mut frames = Vec::new();
        for (bytes, handles) in stream {
            for handle in handles {
                decoder.push_descriptor(*handle).expect("there is room");
            }
            decoder.feed(bytes);
            while let Some(frame) = decoder.next().expect("the stream is valid") {
                frames.push((frame.message, frame.descriptors));
            }
        }
        frames
    }

    #[test]
    fn more_unread_than_written_is_an_error() {
        let mut outbox = NativeOutbox::<u32>::new();
        assert!(outbox.rewind_unread(b"x", |_| true).is_err());
    }

    #[test]
    fn what_was_read_is_forgotten() {
        let mut outbox = NativeOutbox::new();
        outbox.push(&connections(0, 1), vec![1]);
        outbox.push(&connections(1, 1), vec![2]);
        while let Some(chunk) = outbox.peek() {
            let n = chunk.bytes.len();
            outbox.wrote(n);
        }
        outbox.was_read(|handle| *handle == 1);
        assert_eq!(outbox.sent.len(), 1);
    }

    proptest! {
        /// Handles from 100 on are connections. The peer reads up to some byte; the rest is pulled back.
        #[test]
        fn taking_back_removes_whole_connections_and_keeps_everything_else(
            frames in prop::collection::vec((0..3_u32, 0..40_usize), 1..20),
            written in 0..2000_usize,
            read in 0..2000_usize,
        ) {
            let mut outbox = NativeOutbox::new();
            let mut pushed = Vec::new();
            for (n, (kind, length)) in (0..).zip(frames) {
                let (message, handles) = match kind {
                    0 => (ToWorker::Message(vec![7; length]), vec![]),
                    1 => (ToWorker::Message(vec![8; length]), vec![n]),
                    _ => (connections(u64::from(n), 1), vec![100 + n]),
                };
                outbox.push(&message, handles.clone());
                pushed.push((message, handles));
            }
            // A stream of single bytes, each with what travels on it.
            let mut stream: Vec<(Vec<u8>, Vec<u32>)> = Vec::new();
            while stream.len() < written && let Some(chunk) = outbox.peek() {
                stream.push((chunk.bytes[..1].to_vec(), chunk.handles.to_vec()));
                outbox.wrote(1);
            }
            let read = read.min(stream.len());
            let unread: Vec<u8> = stream[read..].iter().flat_map(|(b, _)| b.clone()).collect();
            stream.truncate(read);
            let back = outbox.rewind_unread(&unread, |handle| *handle >= 100).expect("a suffix");
            while let Some(chunk) = outbox.peek() {
                stream.push((chunk.bytes.to_vec(), chunk.handles.to_vec()));
                let n = chunk.bytes.len();
                outbox.wrote(n);
            }
            prop_assert_eq!((outbox.queued_bytes(), outbox.queued_handles()), (0, 0));
            let back: Vec<u32> = back.into_iter().flatten().collect();
            let expected: Vec<_> =
                pushed.into_iter().filter(|(_, h)| !h.iter().any(|h| back.contains(h))).collect();
            prop_assert_eq!(decode(&stream), expected);
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
