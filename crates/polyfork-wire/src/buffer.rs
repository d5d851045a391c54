//! Bytes that were read and not yet decoded.
//!
//! Shared by the two decoders. What is a message is their business; here it is only made sure that feeding and
//! taking cost linear time however a stream is cut, and that memory does not outgrow one message and one
//! read.

use std::ops::Range;

/// A message at least this long is moved out of the buffer instead of being copied.
const MOVE_FROM_BYTES: usize = 64 << 10;

/// An empty buffer larger than this is given back.
const KEEP_BYTES: usize = 256 << 10;

#[derive(Debug, Default)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    /// Everything before was taken.
    start: usize,
}

impl Buffer {
    /// Appends what was read. The memory doubles as it fills, but not beyond `expected` bytes and this
    /// read, unless more than that has not been taken.
    pub(crate) fn feed(&mut self, read: &[u8], expected: usize) {
        self.compact();
        let needed = self.bytes.len() + read.len();
        if needed > self.bytes.capacity() {
            let most = expected.saturating_add(read.len());
            let target = self.bytes.capacity().saturating_mul(2).min(most).max(needed);
            self.bytes.reserve_exact(target - self.bytes.len());
        }
        self.bytes.extend_from_slice(read);
    }

    /// What was not taken.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Steps over the first `n` bytes of the rest.
    pub(crate) fn skip(&mut self, n: usize) {
        self.start = self.start.saturating_add(n).min(self.bytes.len());
        if self.start == self.bytes.len() && self.bytes.capacity() > KEEP_BYTES {
            self.clear();
        }
    }

    /// Takes `message` out of the rest and steps over the first `n` bytes, of which it is a part.
    pub(crate) fn take(&mut self, message: Range<usize>, n: usize) -> Vec<u8> {
        let after = self.rest().len() - n;
        if message.len() < MOVE_FROM_BYTES || after > message.len() {
            let copy = self.rest()[message].to_vec();
            self.skip(n);
            return copy;
        }
        let rest = self.bytes.split_off(self.start + n);
        let mut taken = std::mem::replace(&mut self.bytes, rest);
        taken.truncate(self.start + message.end);
        taken.drain(..self.start + message.start);
        self.start = 0;
        taken
    }

    /// Forgets everything and gives the memory back.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Moves the rest to the front once it is the smaller part.
    fn compact(&mut self) {
        if self.start > self.bytes.len() / 2 || self.start == self.bytes.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_message_is_moved_and_the_rest_stays() {
        let mut buffer = Buffer::default();
        buffer.feed(b"short", usize::MAX);
        buffer.skip(5);
        let long = vec![b'x'; 3 * MOVE_FROM_BYTES];
        buffer.feed(b"<", usize::MAX);
        buffer.feed(&long, usize::MAX);
        buffer.feed(b">rest", usize::MAX);
        assert_eq!(buffer.take(1..1 + long.len(), long.len() + 2), long);
        assert_eq!(buffer.rest(), b"rest");
        assert_eq!(buffer.take(1..3, 3), b"es");
        assert_eq!(buffer.rest(), b"t");
    }

    #[test]
    fn memory_stays_within_one_message_and_one_read() {
        let mut buffer = Buffer::default();
        for _ in 0..1000 {
            buffer.feed(&[0; 1000], 1_000_000);
        }
        assert!(buffer.bytes.capacity() <= 1_001_000, "{}", buffer.bytes.capacity());
        buffer.skip(1_000_000);
        assert_eq!(buffer.bytes.capacity(), 0);
    }

    #[test]
    fn memory_does_not_grow_while_everything_is_taken() {
        let mut buffer = Buffer::default();
        for round in 0..100_000 {
            buffer.feed(b"abcdefghij", 1000);
            buffer.skip(if round == 0 { 5 } else { 10 });
        }
        assert_eq!(buffer.rest(), b"fghij");
        assert!(buffer.bytes.capacity() < 200, "{}", buffer.bytes.capacity());
    }
}
