//! Internal messages and envelopes in frames.
//!
//! What a message says is the business of [`message`](mod@crate::node::message) and
//! [`cluster`](crate::node::cluster), for lines and frames alike: an internal message is turned into
//! JSON on the way in, and from it on the way out. Only what belongs to the user stays a [`Value`].
//!
//! The surprising rule: the message in an envelope counts objects from the envelope on, so its references change when
//! it is taken out. Node's envelopes and their messages share nothing; one that does is refused.

use serde::Serialize;

use super::error::ConvertError;
use super::json::{from_json, to_json};
use super::refs::{Objects, detach};
use super::ser;
use super::tag;
use super::value::Value;
use super::write::{frame_of, write_frame};
use crate::json;
use crate::node::line::BUN_PREFIX;
use crate::node::message::{
    self, DgramType, Fields, HandleEnvelope, HandleKind, Incoming, MAX_NESTED_ENVELOPES,
};
use crate::{Limits, ProtocolError};

/// Says what a value is that came as a message.
///
/// # Errors
///
/// [`ProtocolError::BadEnvelope`] for more than eight envelopes in one another and for one that shares objects with
/// its message; [`TooLong`](ProtocolError::TooLong) for an internal message that exceeds the limit
/// as JSON. Missing or odd members are not an error.
pub fn parse_value(value: Value, limits: &Limits) -> Result<Incoming<Value>, ProtocolError> {
    match internal_cmd(&value) {
        None => Ok(Incoming::User(value)),
        Some("NODE_HANDLE") => envelope(value, limits).map(Incoming::Handle),
        Some(cmd) => internal(cmd, &value, limits),
    }
}

/// The `cmd`, when it makes the message internal.
fn internal_cmd(value: &Value) -> Option<&str> {
    value.get("cmd")?.as_str().filter(|cmd| message::is_internal(cmd))
}

fn internal(cmd: &str, value: &Value, limits: &Limits) -> Result<Incoming<Value>, ProtocolError> {
    let json = to_json(value, limits.max_message)?;
    Ok(message::internal(cmd, &Fields::read(&json, usize::MAX)?))
}

/// Unwraps an envelope down to the message that is in it.
fn envelope(mut outer: Value, limits: &Limits) -> Result<HandleEnvelope<Value>, ProtocolError> {
    for _ in 0..MAX_NESTED_ENVELOPES {
        let inner = take_message(&mut outer)?;
        let message = match internal_cmd(&inner) {
            Some("NODE_HANDLE") => {
                outer = inner;
                continue;
            }
            // Nested, these acknowledge nothing.
            Some(cmd @ ("NODE_HANDLE_ACK" | "NODE_HANDLE_NACK")) => {
                Incoming::OtherInternal { cmd: cmd.to_owned() }
            }
            Some(cmd) => internal(cmd, &inner, limits)?,
            None => Incoming::User(inner),
        };
        let text = |name| outer.get(name).and_then(Value::as_str);
        return Ok(HandleEnvelope {
            kind: HandleKind::from_name(text("type").unwrap_or_default()),
            key: text("key").map(str::to_owned),
            dgram_type: text("dgramType").and_then(DgramType::from_name),
            message: Box::new(message),
        });
    }
    Err(ProtocolError::BadEnvelope { why: "more than eight are wrapped into one another" })
}

/// Takes the message out of an envelope; `null` when there is none.
fn take_message(envelope: &mut Value) -> Result<Value, ProtocolError> {
    let Some(at) = envelope.properties().iter().rposition(|(key, _)| *key == *"msg") else {
        return Ok(Value::Null);
    };
    let start = {
        let message = &envelope.properties()[at].1;
        // What is no object has no number, and refers to nothing unless it is a reference itself.
        if message.is_object() { Objects::of(envelope).first_id_of(message) } else { None }
    };
    let taken = envelope.properties_mut().map(|list| std::mem::take(&mut list[at].1));
    let mut message = taken.unwrap_or(Value::Null);
    if detach(&mut message, start.unwrap_or(0)) {
        Ok(message)
    } else {
        Err(ProtocolError::BadEnvelope { why: "it shares objects with its message" })
    }
}

/// The frame that says what a line says, for all lines that are made for Node: those of
/// [`cluster`](crate::node::cluster), acknowledgements included.
///
/// The line may have its newline, and Bun's mark.
///
/// # Errors
///
/// [`ProtocolError::NotJson`] when it is no JSON text; [`ProtocolError::TooLong`] beyond 4 GiB.
pub fn transcode_line(json_line: &[u8]) -> Result<Vec<u8>, ProtocolError> {
    let line = json_line.strip_prefix(&[BUN_PREFIX]).unwrap_or(json_line);
    let text = std::str::from_utf8(line)
        .map_err(|error| ProtocolError::not_json(line, error.valid_up_to()))?;
    let value = from_json(json::trim(text))?;
    write_frame(&value).map_err(|_| ProtocolError::TooLong { limit: u32::MAX as usize })
}

/// A message for the user code of the peer with a handle, whose descriptor travels with this frame. The same for
/// lines is [`cluster::handle_message`](crate::node::cluster::handle_message).
///
/// `key` is for [`HandleKind::NetSocket`] only, `dgram_type` for [`HandleKind::DgramSocket`] only and
/// needed there. A [`Value`] is sent as it is.
///
/// # Errors
///
/// What the message's `Serialize` reports, or that it does not fit a frame.
pub fn handle_message<T: Serialize + ?Sized>(
    kind: &HandleKind,
    message: &T,
    key: Option<&str>,
    dgram_type: Option<DgramType>,
) -> Result<Vec<u8>, ConvertError> {
    frame_of(|writer| {
        writer.begin(tag::OBJECT);
        let mut count = 3;
        for (name, text) in [("cmd", "NODE_HANDLE"), ("type", kind.as_str())] {
            writer.str(name);
            writer.str(text);
        }
        writer.str("msg");
        ser::serialize(message, writer)?;
        let dgram_type = dgram_type.map(DgramType::as_str);
        for (name, text) in [("key", key), ("dgramType", dgram_type)] {
            if let Some(text) = text {
                writer.str(name);
                writer.str(text);
                count += 1;
            }
        }
        writer.end(tag::OBJECT_END, count, None);
        Ok(())
    })
}
