//! Cuts a byte stream into native frames and gives each the descriptors it declares.
//!
//! The shell pushes the descriptors of a `recvmsg` first, then feeds its bytes, then takes frames until
//! there is none. `D` is an owned descriptor; dropping the decoder closes what nobody claimed.
//!
//! Unlike a Node peer, a native one is held to the letter: a descriptor too few or too many is an error.

use std::collections::VecDeque;

use super::{HEADER_BYTES, MAX_DESCRIPTORS, Payload};
use crate::buffer::Buffer;
use crate::{Limits, ProtocolError};

/// A message and its descriptors.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<T, D> {
    /// The message.
    pub message: T,
    /// Exactly as many as the frame declared.
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
        Self { limits, buffer: Buffer::default(), descriptors: VecDeque::new(), failed: None }
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
        self.try_next().map_err(|error| self.fail(error))
    }

    /// The stream has ended: [`ProtocolError::Truncated`] when it did so inside a frame, which is dropped
    /// with its descriptors.
    pub fn end(&mut self) -> Option<ProtocolError> {
        let cut_short = self.has_partial();
        self.clear();
        cut_short.then_some(ProtocolError::Truncated)
    }

    /// True when the stream stands inside a frame.
    #[must_use]
    pub fn has_partial(&self) -> bool {
        !self.buffer.rest().is_empty()
    }

    fn try_next<T: Payload>(&mut self) -> Result<Option<Frame<T, D>>, ProtocolError> {
        let rest = self.buffer.rest();
        let Some(header) = Header::read(rest, &self.limits)? else {
            // Inside a header there may be the descriptors of the frame that follows.
            let possible = if rest.is_empty() { 0 } else { MAX_DESCRIPTORS };
            return self.no_more_than(possible);
        };
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + header.length) else {
            return self.no_more_than(header.descriptors);
        };
        if self.descriptors.len() < header.descriptors {
            return Err(ProtocolError::MissingDescriptor);
        }
        let message = decode(payload)?;
        self.buffer.skip(HEADER_BYTES + header.length);
        let descriptors = self.descriptors.drain(..header.descriptors).collect();
        Ok(Some(Frame { message, descriptors }))
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
