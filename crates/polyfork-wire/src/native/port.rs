//! What two Rust programs say to each other on a channel of their own: messages, requests, answers.
//!
//! The payload of a native frame is one byte for the kind, for all but messages and greetings the number of
//! the request (u64, little-endian), and the user's bytes. Which request is still waited for is decided by
//! the channel.
//!
//! The surprising rule: the first frame of either end is a [`PortFrame::Hello`] with [`PROTOCOL`](super::PROTOCOL),
//! and it stays the first for ever, so that two versions can tell each other apart. What an end can do
//! besides stands behind the version, where older ones do not look; nobody is sent what it did not
//! say it can.
//!
//! # A ring of shared memory
//!
//! An end whose peer can [`FEATURE_RING`] may move what it sends into a ring. It sends [`PortFrame::Ring`] with the
//! memory, is told [`PortFrame::RingAnswer`], and sends [`PortFrame::RingStart`]. From then on all it says is in the
//! ring, as one stream of frames in records of [`RECORD_FRAMES`], cut anywhere. Only a frame with descriptors still
//! goes by the socket, and a record of [`RECORD_PLACE`] stands where it belongs: it is added before the frame is
//! sent. [`PortFrame::Wake`] goes by the socket at any time, in both directions.

use super::check_version;
use crate::ProtocolError;

const HELLO: u8 = 0;
const MESSAGE: u8 = 1;
const REQUEST: u8 = 2;
const REPLY: u8 = 3;
const REFUSED: u8 = 4;
const RING: u8 = 5;
const RING_ANSWER: u8 = 6;
const RING_START: u8 = 7;
const WAKE: u8 = 8;

/// In [`PortFrame::Hello`]: this end takes what it is sent from a ring, if it is offered one.
pub const FEATURE_RING: u32 = 1;

/// Kind of a ring's record: a piece of the stream of frames.
pub const RECORD_FRAMES: u32 = 0;
/// Kind of a ring's record, which is empty: the next frame is in the socket.
pub const RECORD_PLACE: u32 = 1;

/// One frame of a channel, without its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortFrame<'a> {
    /// First on the channel, from both ends.
    Hello {
        /// What this end can do: a sum of `FEATURE_` numbers. Unknown ones mean nothing.
        features: u32,
    },
    /// A message.
    Message(&'a [u8]),
    /// A message that wants an answer.
    Request {
        /// Chosen by the asker, never used again on this channel.
        id: u64,
        /// The message.
        body: &'a [u8],
    },
    /// An answer.
    Reply {
        /// The number of the request.
        id: u64,
        /// The message.
        body: &'a [u8],
    },
    /// There will be no answer.
    Refused {
        /// The number of the request.
        id: u64,
    },
    /// The offer of a ring, whose memory is attached. At most once from each end.
    Ring,
    /// Whether the ring that was offered is used.
    RingAnswer {
        /// It is, once the offerer says so.
        taken: bool,
    },
    /// What follows is in the ring.
    RingStart,
    /// There is something in the ring, or room. Wakes who sleeps by being there; nothing else depends on it.
    Wake,
}

impl<'a> PortFrame<'a> {
    /// The user's bytes, if this payload is a [`PortFrame::Message`]: what most are.
    #[must_use]
    pub fn message(payload: &'a [u8]) -> Option<&'a [u8]> {
        match payload {
            [MESSAGE, body @ ..] => Some(body),
            _ => None,
        }
    }

    /// Reads a payload.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::UnknownFrame`], [`BadFrame`](ProtocolError::BadFrame), and
    /// [`VersionMismatch`](ProtocolError::VersionMismatch) for a greeting of another version.
    pub fn read(payload: &'a [u8]) -> Result<Self, ProtocolError> {
        let (kind, rest) =
            payload.split_first().ok_or(ProtocolError::BadFrame { why: "its payload is empty" })?;
        match *kind {
            HELLO => {
                let version = rest
                    .first_chunk()
                    .ok_or(ProtocolError::BadFrame { why: "its greeting has no version" })?;
                check_version(u32::from_le_bytes(*version))?;
                // Older ends end here.
                let features = rest.get(4..8).and_then(|features| features.first_chunk());
                Ok(Self::Hello { features: features.map_or(0, |f| u32::from_le_bytes(*f)) })
            }
            MESSAGE => Ok(Self::Message(rest)),
            REQUEST => numbered(rest).map(|(id, body)| Self::Request { id, body }),
            REPLY => numbered(rest).map(|(id, body)| Self::Reply { id, body }),
            REFUSED => numbered(rest).map(|(id, _)| Self::Refused { id }),
            RING => Ok(Self::Ring),
            RING_ANSWER => match rest {
                [taken @ (0 | 1)] => Ok(Self::RingAnswer { taken: *taken == 1 }),
                _ => Err(ProtocolError::BadFrame { why: "its answer is neither yes nor no" }),
            },
            RING_START => Ok(Self::RingStart),
            WAKE => Ok(Self::Wake),
            kind => Err(ProtocolError::UnknownFrame { kind: kind.into() }),
        }
    }

    /// Writes what stands before the user's bytes, and these.
    pub fn write(&self, to: &mut Vec<u8>) {
        match self {
            Self::Hello { features } => {
                to.push(HELLO);
                to.extend_from_slice(&super::PROTOCOL.to_le_bytes());
                to.extend_from_slice(&features.to_le_bytes());
            }
            Self::Ring => to.push(RING),
            Self::RingAnswer { taken } => to.extend_from_slice(&[RING_ANSWER, u8::from(*taken)]),
            Self::RingStart => to.push(RING_START),
            Self::Wake => to.push(WAKE),
            Self::Message(body) => {
                to.push(MESSAGE);
                to.extend_from_slice(body);
            }
            Self::Request { id, body } => write_numbered(to, REQUEST, *id, body),
            Self::Reply { id, body } => write_numbered(to, REPLY, *id, body),
            Self::Refused { id } => write_numbered(to, REFUSED, *id, &[]),
        }
    }
}

fn numbered(rest: &[u8]) -> Result<(u64, &[u8]), ProtocolError> {
    let (id, body) = rest
        .split_first_chunk()
        .ok_or(ProtocolError::BadFrame { why: "its request has no number" })?;
    Ok((u64::from_le_bytes(*id), body))
}

fn write_numbered(to: &mut Vec<u8>, kind: u8, id: u64, body: &[u8]) {
    to.push(kind);
    to.extend_from_slice(&id.to_le_bytes());
    to.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_read_as_it_was_written() {
        for frame in [
            PortFrame::Hello { features: FEATURE_RING },
            PortFrame::Ring,
            PortFrame::RingAnswer { taken: true },
            PortFrame::RingAnswer { taken: false },
            PortFrame::RingStart,
            PortFrame::Wake,
            PortFrame::Message(b""),
            PortFrame::Message(b"abc"),
            PortFrame::Request { id: 7, body: b"q" },
            PortFrame::Reply { id: u64::MAX, body: b"" },
            PortFrame::Refused { id: 0 },
        ] {
            let mut bytes = Vec::new();
            frame.write(&mut bytes);
            assert_eq!(PortFrame::read(&bytes), Ok(frame));
        }
    }

    #[test]
    fn greeting_of_an_end_that_knows_no_features_is_understood() {
        assert_eq!(PortFrame::read(&[0, 1, 0, 0, 0]), Ok(PortFrame::Hello { features: 0 }));
        assert_eq!(PortFrame::read(&[0, 1, 0, 0, 0, 9]), Ok(PortFrame::Hello { features: 0 }));
        let later = [0, 1, 0, 0, 0, 1, 0, 0, 128, 77];
        assert_eq!(PortFrame::read(&later), Ok(PortFrame::Hello { features: 0x8000_0001 }));
    }

    #[test]
    fn faulty_frames_are_refused() {
        assert!(matches!(PortFrame::read(b""), Err(ProtocolError::BadFrame { .. })));
        assert!(matches!(PortFrame::read(&[0, 1, 0]), Err(ProtocolError::BadFrame { .. })));
        assert!(matches!(PortFrame::read(&[2, 1, 2, 3]), Err(ProtocolError::BadFrame { .. })));
        assert!(matches!(PortFrame::read(&[6, 2]), Err(ProtocolError::BadFrame { .. })));
        assert_eq!(PortFrame::read(&[9]), Err(ProtocolError::UnknownFrame { kind: 9 }));
        assert_eq!(
            PortFrame::read(&[0, 2, 0, 0, 0]),
            Err(ProtocolError::VersionMismatch { ours: 1, theirs: 2 })
        );
    }
}
