//! A message on its way from the primary to its workers, in the encodings that they speak.
//!
//! Who sends has the value and does not know its reader; the loop knows the reader and cannot have the value. So
//! it is written where it is sent, in whatever this cluster's workers have spoken so far: nearly always one
//! encoding. What goes over which channel is decided in `link`.
//!
//! The rule that surprises: a setup between the two can bring a worker of another encoding. The loop then asks
//! for the message again, and nothing of it has been sent.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use polyfork_wire::node::advanced;
use polyfork_wire::node::cluster as wire;
use polyfork_wire::node::message::{DgramType, HandleKind};
use serde::Serialize;

use super::SendError;
use super::event::{EncodeError, Message};
use super::settings::{Dialect, Serialization};
use crate::channel::Handle;

/// How messages to a worker are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Json = 1,
    Advanced = 2,
    Postcard = 4,
}

impl Encoding {
    /// What workers of such a cluster speak, if they can be spoken to.
    pub(crate) fn of(dialect: Dialect, serialization: Serialization) -> Option<Encoding> {
        match (dialect, serialization) {
            (Dialect::Node, Serialization::Json) => Some(Encoding::Json),
            (Dialect::Node, Serialization::Advanced) => Some(Encoding::Advanced),
            (Dialect::Native, _) => Some(Encoding::Postcard),
            (Dialect::Sockets, _) => None,
        }
    }
}

/// The encodings that workers of a cluster have spoken since its start.
#[derive(Debug, Default)]
pub(crate) struct Spoken(AtomicU8);

impl Spoken {
    /// To be called before the first worker that speaks it.
    pub(crate) fn note(&self, encoding: Option<Encoding>) {
        // Only the bits themselves are passed on.
        self.0.fetch_or(encoding.map_or(0, |encoding| encoding as u8), Ordering::Relaxed);
    }

    fn has(&self, encoding: Encoding) -> bool {
        self.0.load(Ordering::Relaxed) & encoding as u8 != 0
    }
}

/// Why the loop did not take a message.
#[derive(Debug, Clone)]
pub(crate) enum Refusal {
    Error(SendError),
    /// Its reader speaks what was not spoken yet when it was written.
    NotEncoded,
}

impl From<SendError> for Refusal {
    fn from(error: SendError) -> Self {
        Refusal::Error(error)
    }
}

/// Each encoding has its own limits, which matter to whom speaks it.
type Encoded = Option<Result<Arc<[u8]>, EncodeError>>;

/// A message, and what goes with it.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    json: Encoded,
    advanced: Encoded,
    postcard: Encoded,
    /// A handle; both encodings of Node are envelopes then.
    pub(crate) handle: Option<Arc<OwnedFd>>,
}

/// A handle that is fit to be sent, and what Node is to make of it.
#[derive(Debug, Clone)]
pub(crate) struct Attached {
    fd: Arc<OwnedFd>,
    kind: HandleKind,
    family: Option<DgramType>,
}

impl Attached {
    pub(crate) fn new(handle: Handle) -> Result<Attached, SendError> {
        let refused = |error| match error {
            crate::channel::SendError::Handle(why) => SendError::Handle(why),
            _ => SendError::Handle("it is not what it is said to be"),
        };
        let (kind, family) = handle.node_kind().map_err(refused)?;
        handle.prepare().map_err(refused)?;
        let fd = handle.into_fd().map_err(|_| SendError::Handle("no descriptors are left"))?;
        Ok(Attached { fd: Arc::new(fd), kind, family })
    }
}

impl Outgoing {
    /// Writes `value` in all that is spoken.
    pub(crate) fn new<T: Serialize + ?Sized>(
        value: &T,
        attached: Option<&Attached>,
        spoken: &Spoken,
    ) -> Self {
        Outgoing {
            json: spoken.has(Encoding::Json).then(|| json(value, attached)),
            advanced: spoken.has(Encoding::Advanced).then(|| advanced(value, attached)),
            postcard: spoken
                .has(Encoding::Postcard)
                .then(|| Message::postcard(value).map(Into::into)),
            handle: attached.map(|attached| Arc::clone(&attached.fd)),
        }
    }

    fn encoded(&self, encoding: Encoding) -> &Encoded {
        match encoding {
            Encoding::Json => &self.json,
            Encoding::Advanced => &self.advanced,
            Encoding::Postcard => &self.postcard,
        }
    }

    /// Whether whoever speaks this can be given it, or its error.
    pub(crate) fn is_written_in(&self, encoding: Encoding) -> bool {
        self.encoded(encoding).is_some()
    }

    /// The bytes for whoever speaks this.
    pub(crate) fn written_in(&self, encoding: Encoding) -> Result<&[u8], Refusal> {
        match self.encoded(encoding) {
            Some(Ok(bytes)) => Ok(bytes),
            Some(Err(error)) => Err(SendError::Encode(error.clone()).into()),
            None => Err(Refusal::NotEncoded),
        }
    }
}

fn json<T: Serialize + ?Sized>(
    value: &T,
    attached: Option<&Attached>,
) -> Result<Arc<[u8]>, EncodeError> {
    let text = Message::to_json(value)?;
    Ok(match attached {
        None => wire::user_message(&text),
        Some(Attached { family: Some(family), .. }) => wire::dgram_handle_message(*family, &text),
        Some(Attached { kind, .. }) => wire::handle_message(kind.clone(), &text, None),
    }
    .into())
}

fn advanced<T: Serialize + ?Sized>(
    value: &T,
    attached: Option<&Attached>,
) -> Result<Arc<[u8]>, EncodeError> {
    let frame = match attached {
        None => return Message::to_advanced(value).map(Into::into),
        Some(it) => advanced::handle_message(&it.kind, value, None, it.family),
    };
    frame.map(Into::into).map_err(|error| EncodeError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Counts how often it is written.
    struct Counting<'a>(&'a Cell<u32>);

    impl Serialize for Counting<'_> {
        fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            self.0.set(self.0.get() + 1);
            to.serialize_u32(7)
        }
    }

    #[test]
    fn a_message_is_written_once_for_each_encoding_that_is_spoken() {
        let written = Cell::new(0);
        let spoken = Spoken::default();
        let message = Outgoing::new(&Counting(&written), None, &spoken);
        assert_eq!(written.get(), 0, "nobody could read it");
        assert!(matches!(message.written_in(Encoding::Json), Err(Refusal::NotEncoded)));

        spoken.note(Encoding::of(Dialect::Node, Serialization::Json));
        let message = Outgoing::new(&Counting(&written), None, &spoken);
        assert_eq!(written.replace(0), 1);
        assert_eq!(message.written_in(Encoding::Json).expect("JSON"), b"7\n");
        assert!(matches!(message.written_in(Encoding::Advanced), Err(Refusal::NotEncoded)));

        spoken.note(Encoding::of(Dialect::Sockets, Serialization::Json));
        spoken.note(Encoding::of(Dialect::Node, Serialization::Advanced));
        let message = Outgoing::new(&Counting(&written), None, &spoken);
        assert_eq!(written.replace(0), 2);
        assert!(message.written_in(Encoding::Advanced).is_ok());
        assert!(matches!(message.written_in(Encoding::Postcard), Err(Refusal::NotEncoded)));
    }
}
