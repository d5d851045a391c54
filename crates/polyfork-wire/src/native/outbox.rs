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
