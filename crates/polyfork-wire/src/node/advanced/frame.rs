//! Cuts a byte stream into frames: a length of four bytes, the highest first, and so many bytes.
//!
//! What a frame says is left to [`read`](super::read()). Nothing is read from a socket here: the shell feeds what
//! `recvmsg` gave it, in pieces of any size, and takes frames until there is none.
//!
//! The surprising rule: the length is a promise of the peer and no reason to allocate. Memory grows with what
//! came, and a length beyond the limit is refused before a byte of the frame is kept.
//!
//! Behaviour follows: Node `lib/internal/child_process/serialization.js` (advanced).

use crate::buffer::Buffer;
use crate::{Limits, ProtocolError};

/// Bytes of the length in front of each frame.
pub(super) const HEADER_BYTES: usize = 4;

/// Collects bytes until a frame is complete.
///
/// Takes linear time however the stream is cut, and holds at most one message of
/// [`Limits::max_message`] bytes and one read, provided that frames are taken until there are none before
/// more is fed.
#[derive(Debug)]
pub struct FrameDecoder {
    limits: Limits,
    buffer: Buffer,
    /// A frame was too long and what followed was dropped.
    failed: bool,
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, buffer: Buffer::default(), failed: false }
    }

    /// Appends what was read. After [`ProtocolError::TooLong`] the bytes are thrown away.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.announced().is_some_and(|length| length > self.limits.max_message) {
            self.fail();
        }
        if !self.failed {
            let expected = self.announced().unwrap_or(0).saturating_add(HEADER_BYTES);
            self.buffer.feed(bytes, expected);
        }
    }

    /// The payload of the next complete frame, or `None` until more is fed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::EmptyFrame`]; the frames after it can still be taken.
    /// [`ProtocolError::TooLong`] as soon as a header says so, from then on for ever.
    #[expect(clippy::should_implement_trait, reason = "a decoder has more after `None`")]
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, ProtocolError> {
        if self.failed {
            return Err(self.too_long());
        }
        let Some(length) = self.announced() else { return Ok(None) };
        if length > self.limits.max_message {
            return Err(self.fail());
        }
        let end = HEADER_BYTES + length;
        if self.buffer.rest().len() < end {
            return Ok(None);
        }
        if length == 0 {
            self.buffer.skip(end);
            return Err(ProtocolError::EmptyFrame);
        }
        Ok(Some(self.buffer.take(HEADER_BYTES..end, end)))
    }

    /// True when the stream stands inside a frame: more bytes of it must come.
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

    /// The stream has ended: [`ProtocolError::Truncated`] when it did so inside a frame, which is dropped.
    ///
    /// Complete frames must be taken before; those left are dropped as well.
    pub fn end(&mut self) -> Option<ProtocolError> {
        let cut_short = self.has_partial();
        self.buffer.clear();
        cut_short.then_some(ProtocolError::Truncated)
    }

    /// The length that the first header names.
    fn announced(&self) -> Option<usize> {
        let header = self.buffer.rest().first_chunk::<HEADER_BYTES>()?;
        Some(usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX))
    }

    fn fail(&mut self) -> ProtocolError {
        self.buffer.clear();
        self.failed = true;
        self.too_long()
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

    /// Everything that the stream gives when it is fed in these pieces.
    fn decode<'a>(
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Vec<Result<Vec<u8>, ProtocolError>> {
        let mut decoder = FrameDecoder::new(small());
        let mut seen = Vec::new();
        for piece in pieces {
            decoder.feed(piece);
            loop {
                match decoder.next() {
                    Ok(Some(payload)) => seen.push(Ok(payload)),
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

    #[test]
    fn frames_are_cut_by_their_length() {
        let seen = decode([&b"\0\0\0\x02ab\0\0\0\x01c"[..]]);
        assert_eq!(seen, [Ok(b"ab".to_vec()), Ok(b"c".to_vec())]);
    }

    #[test]
    fn empty_frame_is_an_error_and_the_next_frame_is_not() {
        let seen = decode([&b"\0\0\0\0\0\0\0\x01c"[..]]);
        assert_eq!(seen, [Err(ProtocolError::EmptyFrame), Ok(b"c".to_vec())]);
    }

    #[test]
    fn length_beyond_the_limit_is_refused_by_its_header_for_ever() {
        let mut decoder = FrameDecoder::new(small());
        decoder.feed(b"\0\0\0\x0b");
        for _ in 0..3 {
            assert_eq!(decoder.next(), Err(ProtocolError::TooLong { limit: 10 }));
            decoder.feed(b"\0\0\0\x01a");
            assert!(!decoder.has_partial());
        }
        assert_eq!(decode([&b"\0\0\0\x0a0123456789"[..]]), [Ok(b"0123456789".to_vec())]);
        assert_eq!(decode([&b"\xff\xff\xff\xff"[..]]), [Err(ProtocolError::TooLong { limit: 10 })]);
    }

    #[test]
    fn refused_frame_is_dropped_even_if_nobody_takes_frames() {
        let mut decoder = FrameDecoder::new(small());
        for _ in 0..1000 {
            decoder.feed(b"\x7f\0\0\0xxxxxxxx");
            assert!(decoder.buffer.rest().len() <= 12);
        }
        assert_eq!(decoder.next(), Err(ProtocolError::TooLong { limit: 10 }));
    }

    #[test]
    fn end_inside_a_frame_is_told_and_delivers_nothing() {
        let stream = b"\0\0\0\x02ab\0\0\0\x01c";
        for cut in 0..=stream.len() {
            let seen = decode([&stream[..cut]]);
            let inside = !matches!(cut, 0 | 6 | 11);
            assert_eq!(seen.last() == Some(&Err(ProtocolError::Truncated)), inside, "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn any_cutting_equals_the_whole(
            stream in prop::collection::vec(prop_oneof![3 => Just(0_u8), 2 => 0..12_u8, 1 => any::<u8>()], 0..200),
            cuts in prop::collection::vec(1..20_usize, 1..50),
        ) {
            let whole = decode([&stream[..]]);
            prop_assert_eq!(&whole, &decode(stream.chunks(1)));
            let mut rest = &stream[..];
            let mut pieces = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            prop_assert_eq!(whole, decode(pieces));
        }
    }
}
