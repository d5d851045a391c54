//! Cuts a byte stream into lines.
//!
//! What a line says is left to [`message`](super::message). Nothing is read here: the shell feeds what
//! `recvmsg` gave it, in pieces of any size, and takes lines until there is none.
//!
//! The surprising rule: a line may begin with the byte 0x02. Bun marks internal messages with it; the
//! mark is taken off and remembered in [`Line::prefixed`].
//!
//! Behaviour follows: Node `lib/internal/child_process/serialization.js` (json), `string_decoder`.

use std::ops::Deref;

use crate::{Limits, ProtocolError};

/// The byte in front of an internal line of Bun.
pub(crate) const BUN_PREFIX: u8 = 0x02;

/// A line at least this long is moved out of the buffer instead of being copied.
const MOVE_FROM_BYTES: usize = 64 << 10;

/// One complete line of valid UTF-8, without its newline.
///
/// Dereferences to its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    text: String,
    /// The line began with the byte 0x02, which is not part of the bytes: it came from Bun.
    pub prefixed: bool,
}

impl Line {
    /// The line as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The line as text, without a copy.
    #[must_use]
    pub fn into_string(self) -> String {
        self.text
    }
}

impl Deref for Line {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl AsRef<[u8]> for Line {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Collects bytes until a line is complete.
///
/// Takes linear time however the stream is cut, and holds at most one message of
/// [`Limits::max_message`] bytes and one read, provided that lines are taken until there are none before
/// more is fed.
#[derive(Debug)]
pub struct LineDecoder {
    limits: Limits,
    buffer: Vec<u8>,
    /// Where the first line that was not taken begins.
    start: usize,
    /// Everything from `start` to here holds no newline.
    scanned: usize,
    /// A line was too long: there is no telling where the next one begins.
    failed: bool,
}

impl LineDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, buffer: Vec::new(), start: 0, scanned: 0, failed: false }
    }

    /// Appends what was read. After [`ProtocolError::TooLong`] the bytes are thrown away.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.failed && self.pending() > self.limits.max_message && self.find_newline().is_none()
        {
            self.fail();
        }
        if self.failed {
            return;
        }
        self.compact();
        self.reserve(bytes.len());
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete line, or `None` until more is fed.
    ///
    /// Invalid UTF-8 becomes U+FFFD, as Node does it. A carriage return stays in the line; the parser
    /// takes it for a blank.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::EmptyLine`] for a line of blanks; the lines after it can still be taken.
    /// [`ProtocolError::TooLong`], also for a line that is not complete yet, from then on for ever.
    #[expect(clippy::should_implement_trait, reason = "a decoder has more after `None`")]
    pub fn next(&mut self) -> Result<Option<Line>, ProtocolError> {
        if self.failed {
            return Err(self.too_long());
        }
        let Some(newline) = self.find_newline() else {
            // One byte more is allowed for Bun's mark.
            if self.pending() > self.limits.max_message.saturating_add(1) {
                return Err(self.fail());
            }
            return Ok(None);
        };
        let prefixed = self.buffer[self.start] == BUN_PREFIX;
        let from = self.start + usize::from(prefixed);
        if newline - from > self.limits.max_message {
            return Err(self.fail());
        }
        let bytes = self.cut(from, newline);
        if bytes.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r')) {
            return Err(ProtocolError::EmptyLine);
        }
        let text = self.decode(bytes)?;
        Ok(Some(Line { text, prefixed }))
    }

    /// True when the stream stands inside a line: more bytes of it must come.
    ///
    /// Only meaningful after [`next`](Self::next) said `None`.
    #[must_use]
    pub fn has_partial(&self) -> bool {
        self.pending() > 0
    }

    /// The stream has ended: [`ProtocolError::Truncated`] when it did so inside a line, which is dropped.
    ///
    /// Complete lines must be taken before; those left are dropped as well.
    pub fn end(&mut self) -> Option<ProtocolError> {
        let cut_short = self
            .buffer
            .get(self.start..)
            .is_some_and(|rest| rest.last().is_some_and(|last| *last != b'\n'));
        self.clear();
        cut_short.then_some(ProtocolError::Truncated)
    }

    fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The position of the newline that ends the first line. Never looks at a byte twice.
    fn find_newline(&mut self) -> Option<usize> {
        match memchr::memchr(b'\n', &self.buffer[self.scanned..]) {
            Some(offset) => {
                self.scanned += offset;
                Some(self.scanned)
            }
            None => {
                self.scanned = self.buffer.len();
                None
            }
        }
    }

    /// Takes the bytes `from..newline` out and steps over the newline.
    fn cut(&mut self, from: usize, newline: usize) -> Vec<u8> {
        let after = self.buffer.len() - (newline + 1);
        let length = newline - from;
        if length >= MOVE_FROM_BYTES && after <= length {
            let rest = self.buffer.split_off(newline + 1);
            let mut line = std::mem::replace(&mut self.buffer, rest);
            self.start = 0;
            self.scanned = 0;
            line.truncate(newline);
            line.drain(..from);
            return line;
        }
        let line = self.buffer[from..newline].to_vec();
        self.start = newline + 1;
        self.scanned = self.start;
        line
    }

    fn decode(&mut self, bytes: Vec<u8>) -> Result<String, ProtocolError> {
        match String::from_utf8(bytes) {
            Ok(text) => Ok(text),
            Err(invalid) => {
                // A replacement takes three bytes for one, so measure before allocating.
                let bytes = invalid.as_bytes();
                let length: usize = bytes
                    .utf8_chunks()
                    .map(|chunk| chunk.valid().len() + 3 * usize::from(!chunk.invalid().is_empty()))
                    .sum();
                if length > self.limits.max_message {
                    return Err(self.fail());
                }
                Ok(String::from_utf8_lossy(bytes).into_owned())
            }
        }
    }

    /// Moves the unread bytes to the front once they are the smaller part.
    fn compact(&mut self) {
        if self.start == self.buffer.len() {
            if self.buffer.capacity() > 4 * MOVE_FROM_BYTES {
                self.buffer = Vec::new();
            }
            self.buffer.clear();
        } else if self.start > self.buffer.len() / 2 {
            self.buffer.drain(..self.start);
        } else {
            return;
        }
        self.scanned -= self.start;
        self.start = 0;
    }

    /// Doubles the buffer, but not beyond one message and one read.
    fn reserve(&mut self, more: usize) {
        let needed = self.buffer.len() + more;
        if needed > self.buffer.capacity() {
            let most = self.limits.max_message.saturating_add(more).saturating_add(2);
            let target = self.buffer.capacity().saturating_mul(2).min(most).max(needed);
            self.buffer.reserve_exact(target - self.buffer.len());
        }
    }

    fn fail(&mut self) -> ProtocolError {
        self.clear();
        self.failed = true;
        self.too_long()
    }

    fn clear(&mut self) {
        self.buffer = Vec::new();
        self.start = 0;
        self.scanned = 0;
    }

    fn too_long(&self) -> ProtocolError {
        ProtocolError::TooLong { limit: self.limits.max_message }
    }
}
