//! How much a peer may make us hold: sizes, depth, descriptors.
//!
//! The limits are per channel. They say nothing about what we send; a sender is bounded by its own
//! queue ([`crate::node::outbox`]).

/// What one channel may make its reader hold before the channel is called faulty.
///
/// Node has none of these limits: it buffers an endless line until its heap is full and takes two
/// million nested brackets. Raise the fields where a program relies on that; every decoder runs in
/// constant stack whatever the depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Longest message in bytes, without its newline or header. Default 64 MiB.
    pub max_message: usize,
    /// Deepest nesting of arrays and objects in one message; `[[1]]` has two levels. Default 128.
    pub max_depth: usize,
    /// Most values in one message of Node's `advanced` encoding, where a byte may stand for one. Each takes up
    /// to 100 bytes here while the message is read. Default 4,194,304; numbers by the million are better
    /// sent as a typed array, which is one value.
    pub max_values: usize,
    /// Most descriptors received and not yet claimed by a message. Default 1024.
    pub max_fds_queued: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_message: 64 << 20, max_depth: 128, max_values: 4 << 20, max_fds_queued: 1024 }
    }
}
