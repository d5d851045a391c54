//! Cuts a byte stream into native frames and gives each the descriptors it declares.
//!
//! The shell pushes the descriptors of a `recvmsg` first, then feeds its bytes, then takes frames until
//! there is none. `D` is an owned descriptor; dropping the decoder closes what nobody claimed.
//!
//! Unlike a Node peer, a native one is held to the letter: a descriptor too few or too many is an error,
//! unless it was this process that could not take it ([`FrameDecoder::descriptors_lost`]).

use std::collections::VecDeque;

use super::{HEADER_BYTES, MAX_DESCRIPTORS, Payload};
use crate::buffer::Buffer;
use crate::{Limits, ProtocolError};

/// A message and its descriptors.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<T, D> {
    /// The message.
    pub message: T,
    /// As many as the frame declared; fewer, the first ones, if the others were lost on arrival.
    pub descriptors: Vec<D>,
}

/// Collects bytes and descriptors until a frame is complete.
///
/// Takes linear time however the stream is cut, and holds at most one frame and one read, provided that
/// frames are taken until there are none before more is fed.
#[derive(Debug)]
pub struct FrameDecoder<D> {
    limits: Limits,
    buffer: Buffer,
    descriptors: VecDeque<D>,
    /// The next frame with descriptors gets so many and no more: the rest was lost.
    lost_after: Option<usize>,
    /// After an error there is no telling where the next frame begins.
    failed: Option<ProtocolError>,
}

/// A header that was read.
#[derive(Clone, Copy)]
struct Header {
    length: usize,
    descriptors: usize,
}

impl<D> FrameDecoder<D> {
    /// An empty decoder.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            buffer: Buffer::default(),
            descriptors: VecDeque::new(),
            lost_after: None,
            failed: None,
        }
    }

    /// Adds a descriptor that was received. To be called before the bytes of the same read are fed.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::SurplusDescriptor`] when [`Limits::max_fds_queued`] are waiting, and any
    /// earlier error of this decoder. The descriptor is dropped, which closes it.
    pub fn push_descriptor(&mut self, descriptor: D) -> Result<(), ProtocolError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.descriptors.len() >= self.limits.max_fds_queued {
            return Err(self.fail(ProtocolError::SurplusDescriptor));
        }
        self.descriptors.push_back(descriptor);
        Ok(())
    }

    /// The read whose descriptors were just pushed lost others (`MSG_CTRUNC`: this process is at its limit).
    /// The frame they came with gets what is there instead of being an error.
    ///
    /// To be called after they were pushed, and before the bytes are fed. The kernel ends a read behind the
    /// message that carried them and frames were taken until there was none, so all that wait are that frame's.
    pub fn descriptors_lost(&mut self) {
        self.lost_after = Some(self.descriptors.len());
    }

    /// Appends what was read. After an error the bytes are thrown away.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.feed(bytes, self.limits.max_message.saturating_add(HEADER_BYTES));
        }
    }

    /// The next complete frame, or `None` until more is fed.
    ///
    /// # Errors
    ///
    /// Any of them is final. [`ProtocolError::TooLong`] as soon as a header says so, before anything is
    /// allocated for it; [`BadFrame`](ProtocolError::BadFrame) and
    /// [`UnknownFrame`](ProtocolError::UnknownFrame); [`MissingDescriptor`](ProtocolError::MissingDescriptor)
    /// for a complete frame with fewer descriptors than it declares;
    /// [`SurplusDescriptor`](ProtocolError::SurplusDescriptor) when more wait than the frame the stream
    /// stands in can claim.
    #[expect(clippy::should_implement_trait, reason = "a decoder has more after `None`")]
    pub fn next<T: Payload>(&mut self) -> Result<Option<Frame<T, D>>, ProtocolError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.try_next(decode).map_err(|error| self.fail(error))
    }

    /// As [`next`](Self::next), for frames whose payload is something else: `read` makes of it what it is. An
    /// error of `read` is final too.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next), and those of `read`.
    pub fn next_with<T>(
        &mut self,
        read: impl FnOnce(&[u8]) -> Result<T, ProtocolError>,
    ) -> Result<Option<Frame<T, D>>, ProtocolError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.try_next(read).map_err(|error| self.fail(error))
    }

    /// The stream has ended: [`ProtocolError::Truncated`] when it did so inside a frame, which is dropped
    /// with its descriptors.
    pub fn end(&mut self) -> Option<ProtocolError> {
        let cut_short = self.has_partial();
        self.clear();
        cut_short.then_some(ProtocolError::Truncated)
    }

    /// What was fed and not taken, and the descriptors that wait: for another decoder, which then goes on from here.
    pub fn into_rest(self) -> (Vec<u8>, VecDeque<D>) {
        (self.buffer.rest().to_vec(), self.descriptors)
    }

    /// True when the stream stands inside a frame.
    #[must_use]
    pub fn has_partial(&self) -> bool {
        !self.buffer.rest().is_empty()
    }

    fn try_next<T>(
        &mut self,
        decode: impl FnOnce(&[u8]) -> Result<T, ProtocolError>,
    ) -> Result<Option<Frame<T, D>>, ProtocolError> {
        let rest = self.buffer.rest();
        let Some(header) = Header::read(rest, &self.limits)? else {
            // Inside a header there may be the descriptors of the frame that follows.
            let possible = if rest.is_empty() { 0 } else { MAX_DESCRIPTORS };
            return self.no_more_than(possible);
        };
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + header.length) else {
            return self.no_more_than(header.descriptors);
        };
        let message = decode(payload)?;
        let count = self.arrived(header.descriptors)?;
        self.buffer.skip(HEADER_BYTES + header.length);
        let descriptors = self.descriptors.drain(..count).collect();
        Ok(Some(Frame { message, descriptors }))
    }

    /// How many of the descriptors that a frame declares it gets.
    fn arrived(&mut self, declared: usize) -> Result<usize, ProtocolError> {
        if declared > 0
            && let Some(there) = self.lost_after.take()
        {
            return Ok(declared.min(there));
        }
        if self.descriptors.len() < declared {
            return Err(ProtocolError::MissingDescriptor);
        }
        Ok(declared)
    }

    /// No frame yet, and no error unless more descriptors wait than the unfinished one can claim.
    fn no_more_than<T>(&self, possible: usize) -> Result<Option<T>, ProtocolError> {
        if self.descriptors.len() > possible {
            return Err(ProtocolError::SurplusDescriptor);
        }
        Ok(None)
    }

    fn fail(&mut self, error: ProtocolError) -> ProtocolError {
        self.clear();
        self.failed = Some(error.clone());
        error
    }

    fn clear(&mut self) {
        self.buffer.clear();
        self.descriptors.clear();
    }
}

impl Header {
    /// Reads a header once it is complete.
    fn read(bytes: &[u8], limits: &Limits) -> Result<Option<Self>, ProtocolError> {
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
        let descriptors = usize::from(descriptors);
        if descriptors > MAX_DESCRIPTORS {
            return Err(ProtocolError::BadFrame { why: "it declares more than 253 descriptors" });
        }
        Ok(Some(Self { length, descriptors }))
    }
}

fn decode<T: Payload>(payload: &[u8]) -> Result<T, ProtocolError> {
    if let Ok((kind, _)) = postcard::take_from_bytes::<u32>(payload)
        && kind >= T::KINDS
    {
        return Err(ProtocolError::UnknownFrame { kind });
    }
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(ProtocolError::BadFrame { why: "bytes follow its message" }),
        Err(_) => Err(ProtocolError::BadFrame { why: "its message cannot be read" }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{every_message_to_primary, every_message_to_worker};
    use super::super::{ListenAddress, ToPrimary, ToWorker, encode};
    use super::*;

    fn limits() -> Limits {
        Limits { max_message: 1000, max_fds_queued: 300, ..Limits::default() }
    }

    /// A frame of these bytes, without descriptors.
    fn raw(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("it is short");
        [&length.to_le_bytes()[..], &[0, 0], payload].concat()
    }

    fn refused(bytes: &[u8]) -> ProtocolError {
        let mut decoder = FrameDecoder::<u32>::new(limits());
        decoder.feed(bytes);
        let error = decoder.next::<ToPrimary>().expect_err("the frame is faulty");
        assert_eq!(decoder.next::<ToPrimary>(), Err(error.clone()), "an error is final");
        decoder.feed(&encode(&ToPrimary::Ready, 0));
        assert_eq!(decoder.next::<ToPrimary>(), Err(error.clone()), "an error is final");
        assert_eq!(decoder.push_descriptor(1), Err(error.clone()), "an error is final");
        error
    }

    fn pieces<T: Payload + Clone>(stream: &[u8], size: usize) -> Vec<T> {
        let mut decoder = FrameDecoder::<u32>::new(limits());
        let mut messages = Vec::new();
        for piece in stream.chunks(size) {
            decoder.feed(piece);
            while let Some(frame) = decoder.next().expect("the stream is valid") {
                messages.push(frame.message);
            }
        }
        assert!(!decoder.has_partial());
        assert_eq!(decoder.end(), None);
        messages
    }

    #[test]
    fn every_message_survives_every_cutting() {
        let to_primary = every_message_to_primary();
        let to_worker = every_message_to_worker();
        let up: Vec<u8> = to_primary.iter().flat_map(|message| encode(message, 0)).collect();
        let down: Vec<u8> = to_worker.iter().flat_map(|message| encode(message, 0)).collect();
        for size in 1..=up.len() {
            assert_eq!(pieces::<ToPrimary>(&up, size), to_primary);
            assert_eq!(pieces::<ToWorker>(&down, size), to_worker);
        }
    }

    #[test]
    fn end_inside_a_frame_is_told_and_delivers_nothing() {
        let frame = encode(&ToPrimary::Message(vec![7; 100]), 0);
        for cut in 0..frame.len() {
            let mut decoder = FrameDecoder::<u32>::new(limits());
            decoder.feed(&frame[..cut]);
            assert_eq!(decoder.next::<ToPrimary>(), Ok(None), "cut at {cut}");
            assert_eq!(decoder.has_partial(), cut > 0);
            assert_eq!(decoder.end(), (cut > 0).then_some(ProtocolError::Truncated));
        }
    }

    #[test]
    fn absurd_lengths_are_refused_before_anything_is_allocated() {
        for length in [1001, 0x8000_0000, u32::MAX] {
            let header = [&length.to_le_bytes()[..], &[0, 0]].concat();
            assert_eq!(refused(&header), ProtocolError::TooLong { limit: 1000 });
        }
        assert!(matches!(refused(&[0; 6]), ProtocolError::BadFrame { .. }));
    }

    #[test]
    fn faulty_frames_are_refused() {
        let unknown = ProtocolError::UnknownFrame { kind: 15 };
        assert_eq!(refused(&raw(&[15])), unknown);
        let unknown = ProtocolError::UnknownFrame { kind: u32::MAX };
        assert_eq!(refused(&raw(&[0xff, 0xff, 0xff, 0xff, 0x0f])), unknown);
        for payload in [
            &[0xff; 5][..],                     // no number at all
            &[0, 1],                            // Hello without a pid
            &[3, 0],                            // a byte after Ready
            &[7, 200, 1],                       // Message with 200 bytes, of which one is there
            &[7, 0xff, 0xff, 0xff, 0xff, 0x0f], // Message with 4 GiB
            &[9, 2, 0xff, 0xff],                // Status that is not UTF-8
            &[1, 1, 2, 0, 0],                   // Listen on a third kind of address
        ] {
            assert!(
                matches!(refused(&raw(payload)), ProtocolError::BadFrame { .. }),
                "{payload:?}"
            );
        }
        assert!(matches!(refused(&[1, 0, 0, 0, 254, 0, 3]), ProtocolError::BadFrame { .. }));
        assert!(matches!(refused(&[1, 0, 0, 0, 0, 1, 3]), ProtocolError::BadFrame { .. }));
    }

    #[test]
    fn frame_gets_exactly_the_descriptors_it_declares() {
        let message = ToWorker::Connections { listener: 1, first_seq: 0, count: 3 };
        let stream =
            [encode(&message, 3), encode(&ToWorker::LeavingAcknowledged, 0), encode(&message, 1)];
        let mut decoder = FrameDecoder::new(limits());
        for descriptor in 1..=4 {
            decoder.push_descriptor(descriptor).expect("there is room");
        }
        decoder.feed(&stream.concat());
        let mut given = Vec::new();
        while let Some(frame) = decoder.next::<ToWorker>().expect("the stream is valid") {
            given.push(frame.descriptors);
        }
        assert_eq!(given, [vec![1, 2, 3], vec![], vec![4]]);
    }

    #[test]
    fn frame_whose_descriptors_were_lost_gets_the_first_ones() {
        let frame = |count| encode(&ToWorker::Connections { listener: 1, first_seq: 0, count }, 3);
        for there in [0, 2] {
            let mut decoder = FrameDecoder::new(limits());
            // A frame without descriptors may come in the same read, before the one that lost them.
            let stream = [encode(&ToWorker::LeavingAcknowledged, 0), frame(1)].concat();
            let (now, later) = stream.split_at(stream.len() - 1);
            for descriptor in 0..there {
                decoder.push_descriptor(descriptor).expect("there is room");
            }
            decoder.descriptors_lost();
            decoder.feed(now);
            assert!(decoder.next::<ToWorker>().expect("valid").is_some());
            assert!(decoder.next::<ToWorker>().expect("valid").is_none());
            // The next read may bring the end of the frame and those of the one after it.
            for descriptor in 10..13 {
                decoder.push_descriptor(descriptor).expect("there is room");
            }
            decoder.feed(&[later, &frame(2)].concat());
            let short = decoder.next::<ToWorker>().expect("valid").expect("complete");
            assert_eq!(short.descriptors, (0..there).collect::<Vec<u32>>());
            let whole = decoder.next::<ToWorker>().expect("valid").expect("complete");
            assert_eq!(whole.descriptors, [10, 11, 12]);
            decoder.feed(&frame(3));
            assert_eq!(decoder.next::<ToWorker>(), Err(ProtocolError::MissingDescriptor));
        }
    }

    #[test]
    fn missing_descriptor_is_refused() {
        let mut decoder = FrameDecoder::new(limits());
        decoder.push_descriptor(1).expect("there is room");
        decoder.feed(&encode(&ToWorker::LeavingAcknowledged, 2));
        assert_eq!(decoder.next::<ToWorker>(), Err(ProtocolError::MissingDescriptor));
    }

    #[test]
    fn surplus_descriptor_is_refused_and_dropped() {
        let frame = encode(&ToWorker::LeavingAcknowledged, 1);
        for fed in 0..=frame.len() {
            // Within a header the number is not known yet.
            let allowed = if fed == 0 {
                0
            } else if fed < HEADER_BYTES {
                253
            } else {
                1
            };
            let token = std::rc::Rc::new(());
            let mut decoder = FrameDecoder::new(limits());
            for _ in 0..=allowed {
                decoder.push_descriptor(token.clone()).expect("there is room");
            }
            decoder.feed(&frame[..fed]);
            let mut result = decoder.next::<ToWorker>();
            if let Ok(Some(_)) = result {
                result = decoder.next();
            }
            assert_eq!(result.expect_err("one too many"), ProtocolError::SurplusDescriptor);
            assert_eq!(std::rc::Rc::strong_count(&token), 1, "all are dropped, after {fed} bytes");
        }
    }

    #[test]
    fn descriptors_beyond_the_limit_are_refused() {
        let mut decoder = FrameDecoder::new(Limits { max_fds_queued: 2, ..limits() });
        decoder.push_descriptor(1).expect("there is room");
        decoder.push_descriptor(2).expect("there is room");
        assert_eq!(decoder.push_descriptor(3), Err(ProtocolError::SurplusDescriptor));
    }

    #[test]
    fn addresses_survive() {
        for address in [
            ListenAddress::Tcp("[2001:db8::1]:443".parse().expect("an address")),
            ListenAddress::Tcp("0.0.0.0:0".parse().expect("an address")),
            ListenAddress::Unix(b"/run/\xff.sock".to_vec()),
        ] {
            let message = ToPrimary::Listen { request: 0, address, backlog: 0, ipv6_only: true };
            assert_eq!(pieces::<ToPrimary>(&encode(&message, 0), 6), [message]);
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..300), descriptors in 0..5_u32, size in 1..50_usize
        ) {
            let mut decoder = FrameDecoder::new(limits());
            for descriptor in 0..descriptors {
                let _ = decoder.push_descriptor(descriptor);
            }
            for piece in bytes.chunks(size) {
                decoder.feed(piece);
                while let Ok(Some(_)) = decoder.next::<ToPrimary>() {}
            }
            let _ = decoder.end();
        }

        #[test]
        fn framed_garbage_is_refused_or_means_what_it_says(payload in prop::collection::vec(any::<u8>(), 1..40)) {
            let mut decoder = FrameDecoder::<u32>::new(limits());
            decoder.feed(&raw(&payload));
            if let Ok(Some(frame)) = decoder.next::<ToWorker>() {
                let again = encode(&frame.message, 0);
                prop_assert_eq!(pieces::<ToWorker>(&again, 1000), [frame.message]);
            }
        }
    }
}
