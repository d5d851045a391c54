//! Frames between two Rust processes: what a primary and a native worker say to each other.
//!
//! A frame is `[u32 little-endian payload length][u8 number of descriptors][u8 0]` and the payload, the
//! postcard form of [`ToPrimary`] or [`ToWorker`]. The descriptors are attached to the first byte of the
//! frame. [`decoder`] reads frames, [`outbox`] orders what is sent; neither decides anything.
//!
//! The surprising rule: the order of the variants is the protocol, as postcard writes their position. New ones
//! go to the end, and a change to an old one needs a new [`PROTOCOL`] number. `Hello` and `Welcome` stay
//! first and begin with that number for ever, so that two versions can tell each other apart.
//!
//! Sources: postcard wire format 1.0; unix(7), `SCM_MAX_FD`.

pub mod decoder;
pub mod outbox;
pub mod port;
pub mod stream;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ProtocolError;

pub use decoder::{Frame, FrameDecoder};
pub use outbox::{NativeChunk, NativeOutbox, NotPushed};

/// The version of the protocol that this crate speaks.
pub const PROTOCOL: u32 = 1;

/// Bytes in front of every payload.
pub const HEADER_BYTES: usize = 6;

/// Most descriptors in one frame: what Linux lets one `sendmsg` carry.
pub const MAX_DESCRIPTORS: usize = 253;

/// Checks the version in a `Hello` or `Welcome`.
///
/// # Errors
///
/// [`ProtocolError::VersionMismatch`] for any other version than [`PROTOCOL`].
pub fn check_version(theirs: u32) -> Result<(), ProtocolError> {
    if theirs == PROTOCOL {
        Ok(())
    } else {
        Err(ProtocolError::VersionMismatch { ours: PROTOCOL, theirs })
    }
}

/// Where to listen, or where somebody listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ListenAddress {
    /// TCP, version 4 or 6.
    Tcp(SocketAddr),
    /// A unix socket: the path's bytes; a leading NUL makes it an abstract name.
    Unix(#[serde(with = "as_bytes")] Vec<u8>),
}

/// What a worker tells its primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPrimary {
    /// First on the channel. Answered by [`ToWorker::Welcome`].
    Hello {
        /// [`PROTOCOL`] of the worker.
        protocol: u32,
        /// Its process id, as it sees it.
        pid: u32,
    },
    /// It wants a listener. Answered by [`ToWorker::Listening`] or [`ToWorker::ListenFailed`].
    Listen {
        /// Chosen by the worker, named in the answer.
        request: u32,
        /// Where.
        address: ListenAddress,
        /// Length of the accept queue.
        backlog: u32,
        /// Do not take IPv4 connections on an IPv6 address.
        ipv6_only: bool,
    },
    /// It accepts on a listener now.
    Listening {
        /// The listener, as the primary named it.
        listener: u32,
    },
    /// It is ready for work.
    Ready,
    /// It has taken the oldest connections that were handed over.
    Accepted {
        /// The listener.
        listener: u32,
        /// Number of the first connection.
        seq: u64,
        /// How many, from that one on.
        count: u32,
    },
    /// It gives a connection back: the primary still has its copy.
    Refused {
        /// The listener.
        listener: u32,
        /// Number of the connection.
        seq: u64,
    },
    /// It no longer uses a listener.
    Close {
        /// The listener.
        listener: u32,
    },
    /// A message for the user of the primary.
    Message(#[serde(with = "as_bytes")] Vec<u8>),
    /// It is about to leave of its own will. Answered by [`ToWorker::LeavingAcknowledged`].
    Leaving,
    /// A line for people, about what it is doing.
    Status {
        /// The line.
        text: String,
    },
    /// It is alive.
    Heartbeat,
    /// Its connections, for policies that count them.
    Report {
        /// Connections open now.
        open: u32,
        /// Connections accepted since it started.
        accepted: u64,
    },
    /// It is alive, and its runtime was so late for a timer of its own. Sent when the primary asked for it.
    Lag {
        /// In microseconds.
        micros: u64,
    },
    /// It can be asked what it measures.
    OffersMetrics,
    /// Answers [`ToWorker::Metrics`].
    Metrics {
        /// The number of the question.
        request: u64,
        /// Text in the exposition format of Prometheus, or why there is none.
        answer: Result<String, String>,
    },
}

/// What a primary tells its worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Answers [`ToPrimary::Hello`].
    Welcome {
        /// [`PROTOCOL`] of the primary.
        protocol: u32,
        /// Number of the worker, never used again.
        worker: u64,
        /// Its slot, from 1.
        slot: u32,
        /// How many reloads the slot has been through.
        generation: u32,
        /// How long it may finish its work after a disconnect, in milliseconds.
        grace_ms: u64,
    },
    /// Answers [`ToPrimary::Listen`]. The listening socket comes with it, unless connections will be
    /// handed over.
    Listening {
        /// The number of the question.
        request: u32,
        /// Names the listener from now on.
        listener: u32,
        /// Where it listens, with the real port.
        address: ListenAddress,
        /// Connections come by [`ToWorker::Connections`]; no socket is attached.
        handoff: bool,
    },
    /// Answers [`ToPrimary::Listen`]: it did not work.
    ListenFailed {
        /// The number of the question.
        request: u32,
        /// The positive error number of the operating system.
        errno: i32,
        /// The error for people.
        text: String,
    },
    /// Connections, one descriptor each. To be answered by [`ToPrimary::Accepted`] or
    /// [`ToPrimary::Refused`] before the first read.
    Connections {
        /// The listener they came to.
        listener: u32,
        /// Number of the first; the others follow.
        first_seq: u64,
        /// How many.
        count: u32,
    },
    /// Finish and leave.
    Disconnect {
        /// How long it may take, in milliseconds.
        grace_ms: u64,
    },
    /// Answers [`ToPrimary::Leaving`].
    LeavingAcknowledged,
    /// A message for the user of the worker.
    Message(#[serde(with = "as_bytes")] Vec<u8>),
    /// What does it measure? Asked only of who said [`ToPrimary::OffersMetrics`].
    Metrics {
        /// Named in the answer.
        request: u64,
    },
}

/// What may travel in a frame. Implemented by the two message enums only.
pub trait Payload: Serialize + serde::de::DeserializeOwned + sealed::Sealed {
    /// How many variants there are: the numbers from here on are unknown.
    #[doc(hidden)]
    const KINDS: u32;
}

impl Payload for ToPrimary {
    const KINDS: u32 = 15;
}

impl Payload for ToWorker {
    const KINDS: u32 = 8;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ToPrimary {}
    impl Sealed for super::ToWorker {}
}

/// Writes one frame, to be sent with `descriptors` descriptors attached to its first byte.
///
/// # Panics
///
/// With more than [`MAX_DESCRIPTORS`], or for a payload of 4 GiB.
#[must_use]
pub fn encode<T: Payload>(message: &T, descriptors: usize) -> Vec<u8> {
    assert!(descriptors <= MAX_DESCRIPTORS, "one sendmsg carries at most 253 descriptors");
    let header = vec![0; HEADER_BYTES];
    let mut frame =
        postcard::to_extend(message, header).expect("the message types have no unsupported parts");
    let length = u32::try_from(frame.len() - HEADER_BYTES).expect("a payload is below 4 GiB");
    frame[..4].copy_from_slice(&length.to_le_bytes());
    frame[4] = u8::try_from(descriptors).expect("checked above");
    frame
}

/// Byte strings as one piece; serde alone would take them byte by byte. The wire form is the same.
mod as_bytes {
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    #[expect(clippy::ptr_arg, reason = "serde passes the field's own type")]
    pub(super) fn serialize<S: Serializer>(bytes: &Vec<u8>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        from.deserialize_byte_buf(Bytes)
    }

    struct Bytes;

    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a byte string")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One message of every kind, in the order of the wire.
    pub(super) fn every_message_to_primary() -> Vec<ToPrimary> {
        vec![
            ToPrimary::Hello { protocol: PROTOCOL, pid: 4711 },
            ToPrimary::Listen {
                request: 1,
                address: ListenAddress::Tcp(([127, 0, 0, 1], 8000).into()),
                backlog: 511,
                ipv6_only: false,
            },
            ToPrimary::Listening { listener: 2 },
            ToPrimary::Ready,
            ToPrimary::Accepted { listener: 2, seq: u64::MAX, count: 16 },
            ToPrimary::Refused { listener: 2, seq: 300 },
            ToPrimary::Close { listener: 2 },
            ToPrimary::Message(vec![0, 0xff, b'\n']),
            ToPrimary::Leaving,
            ToPrimary::Status { text: "warm".into() },
            ToPrimary::Heartbeat,
            ToPrimary::Report { open: 3, accepted: 1 << 40 },
            ToPrimary::Lag { micros: 1500 },
            ToPrimary::OffersMetrics,
            ToPrimary::Metrics { request: 7, answer: Ok("a 1\n".into()) },
        ]
    }

    pub(super) fn every_message_to_worker() -> Vec<ToWorker> {
        vec![
            ToWorker::Welcome {
                protocol: PROTOCOL,
                worker: 7,
                slot: 1,
                generation: 0,
                grace_ms: 30_000,
            },
            ToWorker::Listening {
                request: 1,
                listener: 2,
                address: ListenAddress::Unix(b"\0abstract\xff".to_vec()),
                handoff: true,
            },
            ToWorker::ListenFailed { request: 1, errno: 98, text: "address in use".into() },
            ToWorker::Connections { listener: 2, first_seq: 9, count: 253 },
            ToWorker::Disconnect { grace_ms: u64::MAX },
            ToWorker::LeavingAcknowledged,
            ToWorker::Message(Vec::new()),
            ToWorker::Metrics { request: u64::MAX },
        ]
    }

    #[test]
    fn numbers_of_the_kinds_are_the_protocol() {
        for (kind, message) in every_message_to_primary().iter().enumerate() {
            assert_eq!(usize::from(encode(message, 0)[HEADER_BYTES]), kind, "{message:?}");
        }
        for (kind, message) in every_message_to_worker().iter().enumerate() {
            assert_eq!(usize::from(encode(message, 0)[HEADER_BYTES]), kind, "{message:?}");
        }
        assert_eq!(every_message_to_primary().len(), ToPrimary::KINDS as usize);
        assert_eq!(every_message_to_worker().len(), ToWorker::KINDS as usize);
    }

    #[test]
    fn bytes_of_the_first_messages_never_change() {
        // A later version must be able to read these to refuse this one in words.
        let hello = ToPrimary::Hello { protocol: 1, pid: 300 };
        assert_eq!(encode(&hello, 0), [4, 0, 0, 0, 0, 0, 0, 1, 0xac, 2]);
        let welcome =
            ToWorker::Welcome { protocol: 1, worker: 2, slot: 3, generation: 4, grace_ms: 5 };
        assert_eq!(encode(&welcome, 2), [6, 0, 0, 0, 2, 0, 0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn byte_strings_have_a_length_and_the_bytes() {
        assert_eq!(encode(&ToPrimary::Message(b"abc".to_vec()), 0)[6..], [7, 3, b'a', b'b', b'c']);
    }

    #[test]
    fn other_version_is_refused_in_words() {
        assert_eq!(check_version(PROTOCOL), Ok(()));
        let error = check_version(2).expect_err("it is another version");
        assert!(error.to_string().contains("protocol 2 is not spoken here, only 1"), "{error}");
    }

    #[test]
    #[should_panic(expected = "at most 253 descriptors")]
    fn more_descriptors_than_one_sendmsg_takes_are_a_mistake_of_the_caller() {
        let _ = encode(&ToPrimary::Ready, 254);
    }
}
