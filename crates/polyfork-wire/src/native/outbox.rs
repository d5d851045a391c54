//! Orders native frames and their handles on the way to a peer.
//!
//! Frames leave in the order they were pushed. Frames without handles are joined, so that many go out in one
//! write; a frame with handles begins a write of its own. How many handles may be out unanswered is the
//! sender's decision; nothing waits here.
//!
//! The surprising rule: [`NativeOutbox::wrote`] gives the handles back once their frame has begun to leave. The
//! caller keeps those that must survive the worker, until `Accepted` names them.

use std::collections::VecDeque;

use super::{MAX_DESCRIPTORS, Payload, encode};

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
}

#[derive(Debug)]
struct Item<H> {
    bytes: Vec<u8>,
    /// Emptied when the first byte is written.
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

    /// Reports that the kernel took the first `n` bytes of the chunk, and its handles if `n` is not 0;
    /// these are given back. More than the chunk has counts as the whole chunk.
    pub fn wrote(&mut self, n: usize) -> Vec<H> {
        let Some(front) = self.queue.front_mut() else { return Vec::new() };
        let n = n.min(front.bytes.len() - self.front_sent);
        if n == 0 {
            return Vec::new();
        }
        let handles = std::mem::take(&mut front.handles);
        self.front_sent += n;
        if self.front_sent == front.bytes.len() {
            self.queue.pop_front();
            self.front_sent = 0;
        }
        self.written += n as u64;
        self.queued_bytes -= n;
        self.queued_handles -= handles.len();
        handles
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
        assert!(outbox.wrote(2 * frame.len()).is_empty());
        assert_eq!(outbox.peek().expect("the second").handles, [1, 2]);
        assert_eq!(outbox.queued_handles(), 2);
        assert_eq!(outbox.wrote(1), [1, 2]);
        assert_eq!(outbox.queued_handles(), 0);
        assert!(outbox.peek().expect("the rest").handles.is_empty());
        assert!(outbox.wrote(usize::MAX).is_empty());
        assert_eq!(outbox.peek().expect("the third").bytes, frame);
        assert!(outbox.wrote(frame.len()).is_empty());
        assert!(outbox.is_empty() && outbox.peek().is_none() && outbox.queued_bytes() == 0);
    }

    #[test]
    fn nothing_written_changes_nothing() {
        let mut outbox = NativeOutbox::<u32>::new();
        assert!(outbox.wrote(5).is_empty());
        outbox.push(&connections(0, 1), vec![1]);
        assert!(outbox.wrote(0).is_empty());
        assert_eq!(outbox.peek().expect("still there").handles, [1]);
    }

    #[test]
    fn dead_peer_gives_back_what_was_not_sent() {
        let mut outbox = NativeOutbox::<u32>::new();
        outbox.push(&connections(0, 2), vec![1, 2]);
        outbox.push(&connections(2, 1), vec![3]);
        assert_eq!(outbox.wrote(3), [1, 2]);
        assert_eq!(outbox.drain().collect::<Vec<_>>(), [3]);
        assert!(outbox.is_empty() && outbox.queued_bytes() == 0 && outbox.queued_handles() == 0);
    }

    #[test]
    #[should_panic(expected = "at most 253 handles")]
    fn more_handles_than_one_sendmsg_takes_are_a_mistake_of_the_caller() {
        NativeOutbox::new().push(&connections(0, 254), vec![0; 254]);
    }

    proptest! {
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
