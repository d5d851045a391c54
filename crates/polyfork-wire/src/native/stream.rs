//! Cuts native frames out of bytes that come without descriptors.
//!
//! The caller appends what it reads to [`FrameStream::buffer`] and looks at each payload where it lies. For streams with
//! descriptors there is [`FrameDecoder`](super::FrameDecoder).
//!
//! The surprising rule: a payload is good until the next call. What is to be kept is copied by who knows
//! how.

use super::HEADER_BYTES;
use crate::{Limits, ProtocolError};

/// An empty buffer larger than this is given back.
const KEEP_BYTES: usize = 256 << 10;

/// Collects bytes until frames are complete.
///
/// Takes linear time however the stream is cut, and holds at most one frame and one read, provided that frames are
/// taken until there are none before more is appended.
#[derive(Debug)]
pub struct FrameStream {
    limits: Limits,
    bytes: Vec<u8>,
    /// Everything before was taken.
    start: usize,
}

impl FrameStream {
    /// An empty stream.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self { limits, bytes: Vec::new(), start: 0 }
    }

    /// Where to append what is read.
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        // What is left is the beginning of one frame. It is moved once: it then stands at the front.
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
            if self.bytes.is_empty() && self.bytes.capacity() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        }
        &mut self.bytes
    }

    /// The payload of the next complete frame, or `None` until more is appended.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::TooLong`] as soon as a header says so; [`BadFrame`](ProtocolError::BadFrame);
    /// [`MissingDescriptor`](ProtocolError::MissingDescriptor) for a frame that declares descriptors. There is no
    /// telling where the next frame begins then.
    #[expect(clippy::should_implement_trait, reason = "a stream has more after `None`")]
    pub fn next(&mut self) -> Result<Option<&[u8]>, ProtocolError> {
        let rest = &self.bytes[self.start..];
        let Some(length) = length_of(rest, &self.limits)? else { return Ok(None) };
        let payload = rest.get(HEADER_BYTES..length);
        if payload.is_some() {
            self.start += length;
        }
        Ok(payload)
    }

    /// True when the stream stands inside a frame, or before frames that were not taken.
    #[must_use]
    pub fn has_partial(&self) -> bool {
        self.start < self.bytes.len()
    }
}

/// How long the frame is that begins here, once its header is complete.
fn length_of(bytes: &[u8], limits: &Limits) -> Result<Option<usize>, ProtocolError> {
    let Some(&[a, b, c, d, descriptors, reserved]) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > limits.max_message {
        return Err(ProtocolError::TooLong { limit: limits.max_message });
    }
    if length == 0 {
        return Err(ProtocolError::BadFrame { why: "its payload is empty" });
    }
    if reserved != 0 {
        return Err(ProtocolError::BadFrame { why: "its reserved byte is not zero" });
    }
    if descriptors != 0 {
        return Err(ProtocolError::MissingDescriptor);
    }
    Ok(Some(HEADER_BYTES + length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits() -> Limits {
        Limits { max_message: 1000, ..Limits::default() }
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("it is short");
        [&length.to_le_bytes()[..], &[0, 0], payload].concat()
    }

    fn refused(bytes: &[u8]) -> ProtocolError {
        let mut stream = FrameStream::new(limits());
        stream.buffer().extend(bytes);
        let error = stream.next().expect_err("the frame is faulty");
        assert_eq!(stream.next(), Err(error.clone()), "an error is final");
        error
    }

    #[test]
    fn faulty_headers_are_refused() {
        assert_eq!(refused(&[233, 3, 0, 0, 0, 0]), ProtocolError::TooLong { limit: 1000 });
        assert_eq!(refused(&[255, 255, 255, 255, 0, 0]), ProtocolError::TooLong { limit: 1000 });
        assert!(matches!(refused(&[0; 6]), ProtocolError::BadFrame { .. }));
        assert!(matches!(refused(&[1, 0, 0, 0, 0, 1, 7]), ProtocolError::BadFrame { .. }));
        assert_eq!(refused(&[1, 0, 0, 0, 1, 0, 7]), ProtocolError::MissingDescriptor);
    }

    #[test]
    fn frames_before_a_faulty_one_are_taken_first() {
        let mut stream = FrameStream::new(limits());
        stream.buffer().extend([frame(b"good"), vec![0; 6]].concat());
        assert_eq!(stream.next(), Ok(Some(&b"good"[..])));
        assert!(stream.next().is_err());
    }

    #[test]
    fn long_frame_in_small_pieces_takes_linear_time() {
        let limits = Limits { max_message: 32 << 20, ..Limits::default() };
        let long = frame(&vec![b'x'; 32 << 20]);
        let mut stream = FrameStream::new(limits);
        for piece in long.chunks(100) {
            assert_eq!(stream.next(), Ok(None));
            stream.buffer().extend_from_slice(piece);
        }
        assert_eq!(stream.next().map(|frame| frame.map(|frame| frame.len())), Ok(Some(32 << 20)));
        assert!(!stream.has_partial());
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..40),
            cuts in prop::collection::vec(1..500_usize, 1..40),
        ) {
            let bytes: Vec<u8> = payloads.iter().flat_map(|payload| frame(payload)).collect();
            let mut stream = FrameStream::new(limits());
            let (mut rest, mut got) = (&bytes[..], Vec::new());
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                stream.buffer().extend_from_slice(piece);
                while let Some(payload) = stream.next().expect("the stream is valid") {
                    got.push(payload.to_vec());
                }
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, payloads);
            prop_assert!(!stream.has_partial());
        }

        #[test]
        fn no_bytes_do_more_than_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut stream = FrameStream::new(limits());
            for byte in bytes {
                stream.buffer().push(byte);
                while let Ok(Some(_)) = stream.next() {}
            }
        }
    }
}
