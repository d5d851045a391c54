//! Cuts a byte stream into lines.
//!
//! What a line says is left to [`message`](super::message). Nothing is read here: the shell feeds what
//! `recvmsg` gave it, in pieces of any size, and takes lines until there is none.
//!
//! The surprising rule: a line may begin with the byte 0x02. Bun marks internal messages with it; the
//! mark is taken off and remembered in [`Line::prefixed`].
//!
//! Behaviour follows: Node `lib/internal/child_process/serialization.js` (json), `string_decoder`.

use std::borrow::Cow;
use std::ops::Deref;

use crate::buffer::Buffer;
use crate::{Limits, ProtocolError};

/// The byte in front of an internal line of Bun.
pub(crate) const BUN_PREFIX: u8 = 0x02;

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

/// The text that these bytes stand for: invalid UTF-8 becomes U+FFFD.
///
/// A replacement may take three bytes for one, so what would exceed [`Limits::max_message`] is refused before
/// it is allocated.
pub(super) fn text<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Cow<'a, str>, ProtocolError> {
    let too_long = |length| length > limits.max_message;
    let refused = ProtocolError::TooLong { limit: limits.max_message };
    if too_long(bytes.len()) {
        return Err(refused);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Ok(Cow::Borrowed(text));
    }
    let replaced = bytes.utf8_chunks().filter(|chunk| !chunk.invalid().is_empty());
    let length = replaced.fold(bytes.len(), |sum, chunk| sum + 3 - chunk.invalid().len());
    if too_long(length) {
        return Err(refused);
    }
    let mut text = String::with_capacity(length);
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    Ok(Cow::Owned(text))
}

/// Collects bytes until a line is complete.
///
/// Takes linear time however the stream is cut, and holds at most one message of
/// [`Limits::max_message`] bytes and one read, provided that lines are taken until there are none before
/// more is fed.
#[derive(Debug)]
pub struct LineDecoder {
    limits: Limits,
    buffer: Buffer,
    /// So much of the buffer is known to hold no newline.
    scanned: usize,
    /// A line was too long: there is no telling where the next one begins.
    failed: bool,
}

impl LineDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, buffer: Buffer::default(), scanned: 0, failed: false }
    }

    /// Appends what was read. After [`ProtocolError::TooLong`] the bytes are thrown away.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.failed && self.is_too_long() && self.find_newline().is_none() {
            self.fail();
        }
        if !self.failed {
            self.buffer.feed(bytes, self.limits.max_message.saturating_add(1));
        }
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
            return if self.is_too_long() { Err(self.fail()) } else { Ok(None) };
        };
        let prefixed = self.buffer.rest()[0] == BUN_PREFIX;
        let from = usize::from(prefixed);
        if newline - from > self.limits.max_message {
            return Err(self.fail());
        }
        self.scanned = 0;
        let bytes = self.buffer.take(from..newline, newline + 1);
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
        !self.buffer.rest().is_empty()
    }

    /// What was fed and not taken: to be fed to another decoder, which then goes on from here.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        self.buffer.rest()
    }

    /// The stream has ended: [`ProtocolError::Truncated`] when it did so inside a line, which is dropped.
    ///
    /// Complete lines must be taken before; those left are dropped as well.
    pub fn end(&mut self) -> Option<ProtocolError> {
        let cut_short = self.buffer.rest().last().is_some_and(|last| *last != b'\n');
        self.clear();
        cut_short.then_some(ProtocolError::Truncated)
    }

    /// Whether what waits would be too long for one line; Bun's mark does not count.
    fn is_too_long(&self) -> bool {
        let waiting = self.buffer.rest();
        let mark = usize::from(waiting.first() == Some(&BUN_PREFIX));
        waiting.len() - mark > self.limits.max_message
    }

    /// The position of the newline that ends the first line. Never looks at a byte twice.
    fn find_newline(&mut self) -> Option<usize> {
        let waiting = self.buffer.rest();
        let found = memchr::memchr(b'\n', &waiting[self.scanned..]);
        self.scanned = found.map_or(waiting.len(), |offset| self.scanned + offset);
        found.map(|_| self.scanned)
    }

    fn decode(&mut self, bytes: Vec<u8>) -> Result<String, ProtocolError> {
        String::from_utf8(bytes).or_else(|invalid| {
            let text = text(invalid.as_bytes(), &self.limits).map(Cow::into_owned);
            text.map_err(|_| self.fail())
        })
    }

    fn fail(&mut self) -> ProtocolError {
        self.clear();
        self.failed = true;
        self.too_long()
    }

    fn clear(&mut self) {
        self.buffer.clear();
        self.scanned = 0;
    }

    fn too_long(&self) -> ProtocolError {
        ProtocolError::TooLong { limit: self.limits.max_message }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn small() -> Limits {
        Limits { max_message: 10, ..Limits::default() }
    }

    /// Everything that the stream gives when it is fed in these pieces: lines, marks, errors, the end.
    fn decode<'a>(
        limits: Limits,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Vec<Result<(Vec<u8>, bool), ProtocolError>> {
        let mut decoder = LineDecoder::new(limits);
        let mut seen = Vec::new();
        for piece in pieces {
            decoder.feed(piece);
            loop {
                match decoder.next() {
                    Ok(Some(line)) => seen.push(Ok((line.to_vec(), line.prefixed))),
                    Ok(None) => break,
                    Err(error @ ProtocolError::TooLong { .. }) => {
                        seen.push(Err(error));
                        return seen;
                    }
                    Err(error) => seen.push(Err(error)),
                }
            }
        }
        seen.extend(decoder.end().map(Err));
        seen
    }

    fn plain(text: &str) -> Result<(Vec<u8>, bool), ProtocolError> {
        Ok((text.as_bytes().to_vec(), false))
    }

    #[test]
    fn lines_are_cut_at_newlines_only() {
        let seen = decode(Limits::default(), [&b"1\n{\"a\":\r2}\r\n \"b\" \n"[..]]);
        assert_eq!(seen, [plain("1"), plain("{\"a\":\r2}\r"), plain(" \"b\" ")]);
    }

    #[test]
    fn bun_mark_is_taken_off_and_told() {
        let seen = decode(Limits::default(), [&b"\x02{}\n{}\n\x02\x02\n"[..]]);
        let marked = |bytes: &[u8]| Ok((bytes.to_vec(), true));
        assert_eq!(seen, [marked(b"{}"), plain("{}"), marked(b"\x02")]);
    }

    #[test]
    fn empty_line_is_an_error_and_the_next_line_is_not() {
        let empty = || Err(ProtocolError::EmptyLine);
        let seen = decode(Limits::default(), [&b"\n1\n \t\r\n\x02\n2\n"[..]]);
        assert_eq!(seen, [empty(), plain("1"), empty(), empty(), plain("2")]);
    }

    #[test]
    fn invalid_utf8_becomes_the_replacement_character() {
        let seen = decode(Limits::default(), [&b"a\xffb\n\xe2\x82\n\xf0\x9f\x98\x80\n"[..]]);
        assert_eq!(seen, [plain("a\u{fffd}b"), plain("\u{fffd}"), plain("\u{1f600}")]);
    }

    #[test]
    fn end_inside_a_line_is_told_and_delivers_nothing() {
        let stream = b"{\"a\":1}\n{\"b\":2}\n";
        for cut in 0..=stream.len() {
            let seen = decode(Limits::default(), [&stream[..cut]]);
            let whole = stream[..cut].iter().filter(|byte| **byte == b'\n').count();
            let inside = !matches!(cut, 0 | 8 | 16);
            assert_eq!(seen.iter().filter(|line| line.is_ok()).count(), whole, "cut at {cut}");
            assert_eq!(seen.last() == Some(&Err(ProtocolError::Truncated)), inside, "cut at {cut}");
        }
    }

    #[test]
    fn limit_counts_the_line_without_newline_and_mark() {
        let too_long = || Err(ProtocolError::TooLong { limit: 10 });
        assert_eq!(decode(small(), [&b"0123456789\n"[..]]), [plain("0123456789")]);
        assert_eq!(
            decode(small(), [&b"\x020123456789\n"[..]]),
            [Ok((b"0123456789".to_vec(), true))]
        );
        assert_eq!(decode(small(), [&b"1\n0123456789a\n"[..]]), [plain("1"), too_long()]);
        // Without a newline as well, and no later than at the first byte too many.
        assert_eq!(decode(small(), [&b"0123456789a"[..]]), [too_long()]);
        assert_eq!(decode(small(), [&b"\x020123456789a"[..]]), [too_long()]);
    }

    #[test]
    fn replacing_cannot_exceed_the_limit() {
        assert_eq!(decode(small(), [&b"\xff\xff\xff\n"[..]]), [plain("\u{fffd}\u{fffd}\u{fffd}")]);
        let seen = decode(small(), [&b"\xff\xff\xff\xff\n"[..]]);
        assert_eq!(seen, [Err(ProtocolError::TooLong { limit: 10 })]);
    }

    #[test]
    fn too_long_is_final_and_keeps_nothing() {
        let mut decoder = LineDecoder::new(small());
        decoder.feed(&[b'x'; 11]);
        for _ in 0..3 {
            assert_eq!(decoder.next(), Err(ProtocolError::TooLong { limit: 10 }));
            decoder.feed(b"\n1\n");
        }
        assert!(!decoder.has_partial());
        assert_eq!(decoder.end(), None);
    }

    #[test]
    fn endless_line_is_dropped_even_if_nobody_takes_lines() {
        let mut decoder = LineDecoder::new(small());
        for _ in 0..1000 {
            decoder.feed(b"xxxxxxxx");
            assert!(decoder.buffer.rest().len() <= 10 + 8);
        }
        assert_eq!(decoder.next(), Err(ProtocolError::TooLong { limit: 10 }));
    }

    #[test]
    fn ten_megabytes_byte_by_byte_are_scanned_once() {
        let long = [vec![b'1'; 10 << 20], vec![b'\n']].concat();
        let mut decoder = LineDecoder::new(Limits::default());
        let mut lines = 0;
        for (fed, byte) in long.iter().enumerate() {
            decoder.feed(std::slice::from_ref(byte));
            lines += usize::from(decoder.next().expect("it is below the limit").is_some());
            let known = if decoder.has_partial() { fed + 1 } else { 0 };
            assert_eq!(
                decoder.scanned, known,
                "a byte is looked at when it comes, and then never again"
            );
        }
        assert_eq!(lines, 1);
    }

    proptest! {
        #[test]
        fn any_cutting_equals_the_whole(
            stream in prop::collection::vec(
                prop_oneof![Just(b'\n'), Just(b'\x02'), Just(b' '), Just(0xff), Just(0xe2), Just(0x82), any::<u8>()], 0..200),
            cuts in prop::collection::vec(1..20_usize, 1..50),
        ) {
            let limits = Limits { max_message: 40, ..Limits::default() };
            let whole = decode(limits, [&stream[..]]);
            let bytes = decode(limits, stream.chunks(1));
            prop_assert_eq!(&whole, &bytes);
            let mut rest = &stream[..];
            let mut pieces = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            prop_assert_eq!(whole, decode(limits, pieces));
        }
    }
}
