//! The one error of every decoder here: the peer broke the protocol, and how.
//!
//! A protocol error costs the peer its channel and nothing else; none of them is worth a retry. Errors of
//! the operating system do not occur in this crate.

/// Longest part of a faulty message that an error repeats, in bytes before escaping.
const EXCERPT_BYTES: usize = 64;

/// A peer broke the protocol of its channel.
///
/// The text is a lower-case fragment that reads well after "worker 3: ".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A message is longer than [`Limits::max_message`](crate::Limits::max_message).
    #[error("message is longer than the limit of {limit} bytes")]
    TooLong {
        /// The limit that was passed, in bytes.
        limit: usize,
    },
    /// A message is nested deeper than [`Limits::max_depth`](crate::Limits::max_depth).
    #[error("message is nested deeper than the limit of {limit} levels")]
    TooDeep {
        /// The limit that was passed, in levels.
        limit: usize,
    },
    /// A line is not one JSON text.
    #[error("line is not JSON at byte {at}: \"{excerpt}\"")]
    NotJson {
        /// Offset of the first byte that cannot continue a JSON text.
        at: usize,
        /// The first 64 bytes of the line with everything unprintable escaped.
        excerpt: String,
    },
    /// A line with nothing but blanks, which stock Node refuses as well.
    #[error("line is empty")]
    EmptyLine,
    /// The stream ended inside a message.
    #[error("stream ended inside a message")]
    Truncated,
    /// An acknowledgement came while no complete message with a handle was waiting for one.
    #[error("acknowledgement of a handle that was not sent")]
    UnsolicitedAck,
    /// A message that needs a descriptor came without one.
    #[error("message came without its descriptor")]
    MissingDescriptor,
    /// Descriptors came that belong to no message, or more than may be queued.
    #[error("descriptor came that belongs to no message")]
    SurplusDescriptor,
    /// A handle envelope that no peer sends: nested too deep.
    #[error("handle envelope is malformed: {why}")]
    BadEnvelope {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A native frame of a kind that this version does not know.
    #[error("frame of unknown kind {kind}")]
    UnknownFrame {
        /// The number that stands for the kind on the wire.
        kind: u32,
    },
    /// A native frame whose header or payload cannot be read.
    #[error("frame is malformed: {why}")]
    BadFrame {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A frame of Node's `advanced` encoding that announces no payload, which stock Node refuses as well.
    #[error("frame is empty")]
    EmptyFrame,
    /// A payload of Node's `advanced` encoding in a version of the format that is not read here.
    #[error("value is serialized in format {version}, and only 13 to 16 are read here")]
    UnknownFormat {
        /// The version that the payload names; 0 when it names none.
        version: u32,
    },
    /// A payload of Node's `advanced` encoding that is not a value.
    #[error("value is malformed at byte {at}: {why}")]
    BadValue {
        /// Offset in the payload of what cannot be read.
        at: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A message has more values than [`Limits::max_values`](crate::Limits::max_values).
    #[error("message has more values than the limit of {limit}")]
    TooManyValues {
        /// The limit that was passed.
        limit: usize,
    },
    /// The two ends of a native channel speak different versions.
    #[error(
        "channel protocol {theirs} is not spoken here, only {ours}: \
         build both programs with the same version of polyfork"
    )]
    VersionMismatch {
        /// The version this program speaks.
        ours: u32,
        /// The version the peer announced.
        theirs: u32,
    },
    /// Bytes were taken back that the peer has already acknowledged, or that were never written.
    #[error("{unread} unread bytes were taken back where at most {possible} can be unread")]
    BadRewind {
        /// How many bytes were said to be unread.
        unread: u64,
        /// How many can be unread, by what was acknowledged.
        possible: u64,
    },
}

impl ProtocolError {
    /// The error for a line that stops being JSON at byte `at`.
    pub(crate) fn not_json(line: &[u8], at: usize) -> Self {
        Self::NotJson { at, excerpt: excerpt(line) }
    }
}

/// The first 64 bytes of a foreign text, printable: safe to show on a terminal and in a log line.
#[must_use]
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(EXCERPT_BYTES)];
    let mut shown = cut.escape_ascii().to_string();
    if cut.len() < bytes.len() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpt_shows_at_most_64_bytes_escaped() {
        let mut garbage = b"\x1b[31mhi\n\"\xff".to_vec();
        garbage.resize(500, b'x');
        let shown = excerpt(&garbage);
        assert!(shown.starts_with(r#"\x1b[31mhi\n\"\xff"#));
        assert!(shown.ends_with("xxx..."));
        assert!(shown.is_ascii() && !shown.contains('\x1b'));
        assert_eq!(excerpt(b""), "");
    }

    #[test]
    fn texts_are_fragments_without_a_final_stop() {
        let all = [
            ProtocolError::TooLong { limit: 1 },
            ProtocolError::TooDeep { limit: 1 },
            ProtocolError::not_json(b"x", 0),
            ProtocolError::EmptyLine,
            ProtocolError::Truncated,
            ProtocolError::UnsolicitedAck,
            ProtocolError::MissingDescriptor,
            ProtocolError::SurplusDescriptor,
            ProtocolError::VersionMismatch { ours: 1, theirs: 2 },
            ProtocolError::EmptyFrame,
            ProtocolError::UnknownFormat { version: 12 },
            ProtocolError::BadValue { at: 1, why: "it ends too early" },
            ProtocolError::TooManyValues { limit: 1 },
        ];
        for error in all {
            let text = error.to_string();
            assert!(!text.ends_with('.') && !text.starts_with(char::is_uppercase), "{text}");
        }
    }
}
