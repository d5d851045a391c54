//! What two Rust programs say to each other on a channel of their own: messages, requests, answers.
//!
//! The payload of a native frame is one byte for the kind, for all but messages and greetings the number of
//! the request (u64, little-endian), and the user's bytes. Which request is still waited for is decided by
//! the channel.
//!
//! The surprising rule: the first frame of either end is a [`PortFrame::Hello`] with [`PROTOCOL`](super::PROTOCOL),
//! and it stays the first for ever, so that two versions can tell each other apart.

use super::check_version;
use crate::ProtocolError;

const HELLO: u8 = 0;
const MESSAGE: u8 = 1;
const REQUEST: u8 = 2;
const REPLY: u8 = 3;
const REFUSED: u8 = 4;

/// One frame of a channel, without its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortFrame<'a> {
    /// First on the channel, from both ends.
    Hello,
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
}

impl<'a> PortFrame<'a> {
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
                check_version(u32::from_le_bytes(*version)).map(|()| Self::Hello)
            }
            MESSAGE => Ok(Self::Message(rest)),
            REQUEST => numbered(rest).map(|(id, body)| Self::Request { id, body }),
            REPLY => numbered(rest).map(|(id, body)| Self::Reply { id, body }),
            REFUSED => numbered(rest).map(|(id, _)| Self::Refused { id }),
            kind => Err(ProtocolError::UnknownFrame { kind: kind.into() }),
        }
    }

    /// Writes what stands before the user's bytes, and these.
    pub fn write(&self, to: &mut Vec<u8>) {
        match self {
            Self::Hello => {
                to.push(HELLO);
                to.extend_from_slice(&super::PROTOCOL.to_le_bytes());
            }
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
            PortFrame::Hello,
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
    fn faulty_frames_are_refused() {
        assert!(matches!(PortFrame::read(b""), Err(ProtocolError::BadFrame { .. })));
        assert!(matches!(PortFrame::read(&[0, 1, 0]), Err(ProtocolError::BadFrame { .. })));
        assert!(matches!(PortFrame::read(&[2, 1, 2, 3]), Err(ProtocolError::BadFrame { .. })));
        assert_eq!(PortFrame::read(&[9]), Err(ProtocolError::UnknownFrame { kind: 9 }));
        assert_eq!(
            PortFrame::read(&[0, 2, 0, 0, 0]),
            Err(ProtocolError::VersionMismatch { ours: 1, theirs: 2 })
        );
    }
}
