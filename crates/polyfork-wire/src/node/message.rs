//! Says what a line of a Node channel is: the user's message, or one of Node's own.
//!
//! The members of cluster messages are read in [`cluster`]; what to do about a message,
//! and whether this peer may send it, is the caller's decision.
//!
//! The surprising rule: user code can send objects that look like internal messages, and Node then treats
//! them as such. A value is internal when it is an object whose own `cmd` is a string longer than five
//! characters that begins with `NODE_`; of duplicate names the last counts, as in `JSON.parse`, and
//! `__proto__` is a name like any other.
//!
//! Behaviour follows: Node `lib/internal/child_process.js`, `lib/internal/cluster/utils.js`.

use std::fmt;

use serde::de::DeserializeOwned;

use super::cluster::{self, ClusterMessage};
use super::line::{self, BUN_PREFIX, Line};
use crate::json::{self, Fault, RawJson};
use crate::{Limits, ProtocolError};

/// How many envelopes may be wrapped into one another. Stock Node wraps once more for each of its three
/// retransmissions, so four are seen.
pub(super) const MAX_NESTED_ENVELOPES: usize = 8;

/// What came on a channel. `M` is what the channel's encoding makes of a user's message: a JSON text, or
/// with `advanced` a [`Value`](super::advanced::Value).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Incoming<M = UserMessage> {
    /// For the user: whatever `process.send` was given.
    User(M),
    /// A message that travels with one descriptor. It must be answered by exactly one
    /// [`HANDLE_ACK`](cluster::HANDLE_ACK), or [`HANDLE_NACK`](cluster::HANDLE_NACK) when the descriptor
    /// is missing, before it is acted on.
    Handle(HandleEnvelope<M>),
    /// The oldest handle message we sent was received.
    HandleAck,
    /// The oldest handle message we sent came without its descriptor and was dropped.
    HandleNack,
    /// A message of the cluster module.
    Cluster(ClusterMessage),
    /// The owner of a server is closing it: answer [`Incoming::SocketAllClosed`] once no socket of `key`
    /// is open.
    SocketNotifyClose {
        /// Groups the sockets of one server.
        key: String,
    },
    /// No socket of `key` is open at the peer any more.
    SocketAllClosed {
        /// Groups the sockets of one server.
        key: String,
    },
    /// How many sockets of `key` are open? To be answered.
    SocketGetCount {
        /// Groups the sockets of one server.
        key: String,
    },
    /// The answer to [`Incoming::SocketGetCount`].
    SocketCount {
        /// Groups the sockets of one server.
        key: String,
        /// Open sockets; 0 when the peer sent no whole number.
        count: u64,
    },
    /// The worker's preload says how it is: see [`Health`].
    Health(Health),
    /// Internal, but nothing we know; Node drops it silently.
    OtherInternal {
        /// Its `cmd`.
        cmd: String,
    },
}

/// What a worker that polyfork started says of itself, where user code sees nothing of it. A stock primary drops it, as it
/// drops every internal message that it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is alive, and its event loop was so late for its own timer.
    Beat {
        /// In microseconds.
        lag_us: u64,
    },
    /// It has had as many requests as it was to have.
    Requests {
        /// How many.
        count: u64,
    },
}

/// A message with a handle.
#[derive(Clone, Debug, PartialEq)]
pub struct HandleEnvelope<M = UserMessage> {
    /// What to make of the descriptor.
    pub kind: HandleKind,
    /// `net.Socket` only: the server whose sockets are counted together.
    pub key: Option<String>,
    /// `dgram.Socket` only.
    pub dgram_type: Option<DgramType>,
    /// The message inside; `null` when there was none. It is never a
    /// [`Handle`](Incoming::Handle), [`HandleAck`](Incoming::HandleAck) or
    /// [`HandleNack`](Incoming::HandleNack): envelopes within envelopes, which stock Node makes when
    /// it retransmits, are unwrapped, and the innermost one says the kind.
    pub message: Box<Incoming<M>>,
}

/// The `type` of a handle envelope.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HandleKind {
    /// `net.Native`: a bare TCP or unix stream socket, as the cluster module sends it.
    NetNative,
    /// `net.Server`: a listening socket.
    NetServer,
    /// `net.Socket`: a connection.
    NetSocket,
    /// `dgram.Native`: a bare UDP socket, as the cluster module sends it.
    DgramNative,
    /// `dgram.Socket`: a UDP socket.
    DgramSocket,
    /// `net.BoundSocket`: a bound TCP socket that does not listen. Node 26 only; older ones crash on it.
    NetBoundSocket,
    /// Anything else. Never send one: the receiver crashes.
    Other(String),
}

impl HandleKind {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::NetNative => "net.Native",
            Self::NetServer => "net.Server",
            Self::NetSocket => "net.Socket",
            Self::DgramNative => "dgram.Native",
            Self::DgramSocket => "dgram.Socket",
            Self::NetBoundSocket => "net.BoundSocket",
            Self::Other(name) => name,
        }
    }

    pub(super) fn from_name(name: &str) -> Self {
        match name {
            "net.Native" => Self::NetNative,
            "net.Server" => Self::NetServer,
            "net.Socket" => Self::NetSocket,
            "dgram.Native" => Self::DgramNative,
            "dgram.Socket" => Self::DgramSocket,
            "net.BoundSocket" => Self::NetBoundSocket,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl fmt::Display for HandleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The address family of a `dgram.Socket`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DgramType {
    /// `udp4`
    Udp4,
    /// `udp6`
    Udp6,
}

impl DgramType {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Udp4 => "udp4",
            Self::Udp6 => "udp6",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [Self::Udp4, Self::Udp6].into_iter().find(|known| known.as_str() == name)
    }
}

/// A message for the user: one JSON text that was validated.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UserMessage(RawJson);

impl UserMessage {
    /// The JSON text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The JSON text, without a copy.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0.into_string()
    }

    /// Builds a value of `T`.
    ///
    /// # Errors
    ///
    /// As [`RawJson::parse`].
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        self.0.parse()
    }
}

impl From<UserMessage> for RawJson {
    fn from(message: UserMessage) -> Self {
        message.0
    }
}

impl From<RawJson> for UserMessage {
    fn from(json: RawJson) -> Self {
        Self(json)
    }
}

/// Says what a line is. The line is without its newline; invalid UTF-8 is replaced, and Bun's leading byte
/// 0x02, should it still be there, is stepped over.
///
/// Takes time linear in the line, constant stack, and memory for the line once more; [`parse`] does without the
/// latter.
///
/// # Errors
///
/// [`ProtocolError::NotJson`], [`TooDeep`](ProtocolError::TooDeep), [`TooLong`](ProtocolError::TooLong),
/// [`EmptyLine`](ProtocolError::EmptyLine); [`BadEnvelope`](ProtocolError::BadEnvelope) when more than
/// eight envelopes are wrapped into one another. An internal message with missing or odd members is not
/// an error.
pub fn parse_line(line: &[u8], limits: &Limits) -> Result<Incoming, ProtocolError> {
    let line = line.strip_prefix(&[BUN_PREFIX]).unwrap_or(line);
    let text = line::text(line, limits)?;
    let internal = read_internal(&text, limits)?;
    Ok(internal.unwrap_or_else(|| Incoming::User(UserMessage(RawJson::scanned(json::trim(&text))))))
}

/// As [`parse_line`], for a line that is no longer needed: a user's message keeps its memory instead of
/// taking as much again, which is what to use where messages may be large.
///
/// # Errors
///
/// As [`parse_line`].
pub fn parse(line: Line, limits: &Limits) -> Result<Incoming, ProtocolError> {
    if line.len() > limits.max_message {
        return Err(ProtocolError::TooLong { limit: limits.max_message });
    }
    let internal = read_internal(line.as_str(), limits)?;
    Ok(internal
        .unwrap_or_else(|| Incoming::User(UserMessage(RawJson::from_scanned(line.into_string())))))
}

/// The internal message that a text is; `None` when it is for the user.
fn read_internal(text: &str, limits: &Limits) -> Result<Option<Incoming>, ProtocolError> {
    if json::trim(text).is_empty() {
        return Err(ProtocolError::EmptyLine);
    }
    let fields = Fields::read(text, limits.max_depth)?;
    match fields.internal_cmd().as_deref() {
        Some("NODE_HANDLE") => envelope(fields).map(|envelope| Some(Incoming::Handle(envelope))),
        Some(cmd) => Ok(Some(internal(cmd, &fields))),
        None => Ok(None),
    }
}

/// Unwraps an envelope down to the message that is in it.
fn envelope(mut outer: Fields<'_>) -> Result<HandleEnvelope, ProtocolError> {
    for _ in 0..MAX_NESTED_ENVELOPES {
        let text = outer.msg.unwrap_or("null");
        // The depth was checked with the line that this is a part of.
        let inner = Fields::read(text, usize::MAX)?;
        let cmd = inner.internal_cmd();
        if cmd.as_deref() == Some("NODE_HANDLE") {
            outer = inner;
            continue;
        }
        let message = match cmd.as_deref() {
            None => Incoming::User(UserMessage(RawJson::scanned(text))),
            // Nested, these acknowledge nothing.
            Some(cmd @ ("NODE_HANDLE_ACK" | "NODE_HANDLE_NACK")) => {
                Incoming::OtherInternal { cmd: cmd.to_owned() }
            }
            Some(cmd) => internal(cmd, &inner),
        };
        return Ok(HandleEnvelope {
            kind: HandleKind::from_name(&text_of(outer.r#type)),
            key: outer.key.and_then(json::string).map(Into::into),
            dgram_type: dgram_type(outer.dgram_type),
            message: Box::new(message),
        });
    }
    Err(ProtocolError::BadEnvelope { why: "more than eight are wrapped into one another" })
}

/// The message of this `cmd`, which is internal but no envelope.
pub(super) fn internal<M>(cmd: &str, fields: &Fields<'_>) -> Incoming<M> {
    let key = || text_of(fields.key);
    match cmd {
        "NODE_HANDLE_ACK" => Incoming::HandleAck,
        "NODE_HANDLE_NACK" => Incoming::HandleNack,
        "NODE_CLUSTER" => Incoming::Cluster(cluster::read(fields)),
        "NODE_SOCKET_NOTIFY_CLOSE" => Incoming::SocketNotifyClose { key: key() },
        "NODE_SOCKET_ALL_CLOSED" => Incoming::SocketAllClosed { key: key() },
        "NODE_SOCKET_GET_COUNT" => Incoming::SocketGetCount { key: key() },
        "NODE_SOCKET_COUNT" => Incoming::SocketCount {
            key: key(),
            count: fields.count.and_then(json::unsigned).unwrap_or(0),
        },
        "NODE_POLYFORK" => match health(fields) {
            Some(health) => Incoming::Health(health),
            None => Incoming::OtherInternal { cmd: cmd.to_owned() },
        },
        other => Incoming::OtherInternal { cmd: other.to_owned() },
    }
}

fn health(fields: &Fields<'_>) -> Option<Health> {
    let count = fields.count.and_then(json::unsigned)?;
    match fields.act.and_then(json::string)?.as_ref() {
        "beat" => Some(Health::Beat { lag_us: count }),
        "requests" => Some(Health::Requests { count }),
        _ => None,
    }
}

fn dgram_type(value: Option<&str>) -> Option<DgramType> {
    DgramType::from_name(&value.and_then(json::string)?)
}

/// A string member; empty when missing, the JSON text when it is of another kind.
pub(crate) fn text_of(value: Option<&str>) -> String {
    let value = value.unwrap_or("\"\"");
    json::string(value).map_or_else(|| value.to_owned(), Into::into)
}

/// The members of a top-level object that internal messages may have, as JSON texts.
#[derive(Debug, Default)]
pub(crate) struct Fields<'a> {
    cmd: Option<&'a str>,
    r#type: Option<&'a str>,
    msg: Option<&'a str>,
    dgram_type: Option<&'a str>,
    count: Option<&'a str>,
    pub(crate) key: Option<&'a str>,
    pub(crate) act: Option<&'a str>,
    pub(crate) seq: Option<&'a str>,
    pub(crate) ack: Option<&'a str>,
    pub(crate) accepted: Option<&'a str>,
    pub(crate) index: Option<&'a str>,
    pub(crate) data: Option<&'a str>,
    pub(crate) address: Option<&'a str>,
    pub(crate) port: Option<&'a str>,
    pub(crate) address_type: Option<&'a str>,
    pub(crate) fd: Option<&'a str>,
    pub(crate) flags: Option<&'a str>,
    pub(crate) backlog: Option<&'a str>,
    pub(crate) readable_all: Option<&'a str>,
    pub(crate) writable_all: Option<&'a str>,
}

impl<'a> Fields<'a> {
    /// Validates `text` and remembers the last of each known member.
    pub(super) fn read(text: &'a str, max_depth: usize) -> Result<Self, ProtocolError> {
        let mut fields = Self::default();
        json::members(text, max_depth, |name, value| fields.set(&name.text(), value)).map_err(
            |fault| match fault {
                Fault::Syntax(at) => ProtocolError::not_json(text.as_bytes(), at),
                Fault::Depth => ProtocolError::TooDeep { limit: max_depth },
            },
        )?;
        Ok(fields)
    }

    fn set(&mut self, name: &str, value: &'a str) {
        let field = match name {
            "cmd" => &mut self.cmd,
            "type" => &mut self.r#type,
            "msg" => &mut self.msg,
            "dgramType" => &mut self.dgram_type,
            "count" => &mut self.count,
            "key" => &mut self.key,
            "act" => &mut self.act,
            "seq" => &mut self.seq,
            "ack" => &mut self.ack,
            "accepted" => &mut self.accepted,
            "index" => &mut self.index,
            "data" => &mut self.data,
            "address" => &mut self.address,
            "port" => &mut self.port,
            "addressType" => &mut self.address_type,
            "fd" => &mut self.fd,
            "flags" => &mut self.flags,
            "backlog" => &mut self.backlog,
            "readableAll" => &mut self.readable_all,
            "writableAll" => &mut self.writable_all,
            _ => return,
        };
        *field = Some(value);
    }

    /// The `cmd`, when it makes the message internal.
    fn internal_cmd(&self) -> Option<std::borrow::Cow<'a, str>> {
        json::string(self.cmd?).filter(|cmd| is_internal(cmd))
    }
}

/// Whether a `cmd` makes a message internal.
pub(super) fn is_internal(cmd: &str) -> bool {
    cmd.len() > 5 && cmd.starts_with("NODE_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::cluster::FromWorker;

    fn parse(line: &str) -> Incoming {
        parse_line(line.as_bytes(), &Limits::default()).expect(line)
    }

    fn refused(line: &[u8]) -> ProtocolError {
        parse_line(line, &Limits::default()).expect_err("the line is faulty")
    }

    fn user(json: &str) -> Incoming {
        Incoming::User(UserMessage(RawJson::new(json).expect("it is JSON")))
    }

    #[test]
    fn every_json_value_is_a_user_message_as_it_was_written() {
        for text in [
            "null",
            "true",
            "-1.50e+1",
            "\"str\"",
            "[1, 2]",
            "{}",
            r#"{"cmd":"NODE_"}"#,
            r#"{"cmd":"node_x"}"#,
            r#"{"cmd":"xNODE_CLUSTER"}"#,
            r#"{"cmd":["NODE_CLUSTER"]}"#,
            r#"[{"cmd":"NODE_CLUSTER"}]"#,
            r#"{"a":{"cmd":"NODE_CLUSTER"}}"#,
            r#"{"cmd":"NODE_CLUSTER","cmd":1}"#,
            r#"{"__proto__":{"cmd":"NODE_X"}}"#,
            r#"{"CMD":"NODE_CLUSTER"}"#,
            "\"\\ud800\"",
            "12345678901234567890123",
        ] {
            assert_eq!(parse(text), user(text), "{text}");
            assert_eq!(parse(&format!(" \t{text}\r")), user(text), "{text} with blanks");
        }
    }

    #[test]
    fn reserved_names_are_internal_however_they_are_written() {
        let other = |cmd: &str| Incoming::OtherInternal { cmd: cmd.to_owned() };
        assert_eq!(parse(r#"{"cmd":"NODE_X"}"#), other("NODE_X"));
        assert_eq!(parse(r#"{"\u0063md":"\u004eODE_DEBUG_ENABLED"}"#), other("NODE_DEBUG_ENABLED"));
        assert_eq!(parse(r#"{"cmd":1,"cmd":"NODE_X"}"#), other("NODE_X"));
        assert_eq!(parse(r#"{"cmd":"NODE_HANDLE_ACK"}"#), Incoming::HandleAck);
        assert_eq!(parse(r#"{"x":[],"cmd":"NODE_HANDLE_NACK"}"#), Incoming::HandleNack);
    }

    #[test]
    fn what_a_worker_says_of_itself_is_read_and_nonsense_is_dropped() {
        let say = |rest: &str| parse(&format!(r#"{{"cmd":"NODE_POLYFORK",{rest}}}"#));
        let beat = Incoming::Health(Health::Beat { lag_us: 1500 });
        assert_eq!(say(r#""act":"beat","count":1500"#), beat);
        let requests = Incoming::Health(Health::Requests { count: 7 });
        assert_eq!(say(r#""act":"requests","count":7"#), requests);
        let dropped = Incoming::OtherInternal { cmd: "NODE_POLYFORK".into() };
        for odd in [r#""act":"beat""#, r#""act":1,"count":1"#, r#""act":"x","count":1"#] {
            assert_eq!(say(odd), dropped, "{odd}");
        }
        assert_eq!(say(r#""act":"beat","count":-1"#), dropped);
    }

    #[test]
    fn bun_mark_is_stepped_over() {
        let Incoming::Cluster(message) =
            parse("\u{2}{\"cmd\":\"NODE_CLUSTER\",\"act\":\"online\"}")
        else {
            panic!("it is a cluster message");
        };
        assert_eq!(message.body, FromWorker::Online);
        assert!(matches!(refused(b"\x02\x02{}"), ProtocolError::NotJson { at: 0, .. }));
    }

    #[test]
    fn connection_counting_is_read() {
        let key = || "4:127.0.0.1:0".to_owned();
        let line =
            |cmd: &str| parse(&format!(r#"{{"cmd":"{cmd}","key":"4:127.0.0.1:0","count":7}}"#));
        assert_eq!(line("NODE_SOCKET_NOTIFY_CLOSE"), Incoming::SocketNotifyClose { key: key() });
        assert_eq!(line("NODE_SOCKET_ALL_CLOSED"), Incoming::SocketAllClosed { key: key() });
        assert_eq!(line("NODE_SOCKET_GET_COUNT"), Incoming::SocketGetCount { key: key() });
        assert_eq!(line("NODE_SOCKET_COUNT"), Incoming::SocketCount { key: key(), count: 7 });
        let odd = Incoming::SocketCount { key: String::new(), count: 0 };
        assert_eq!(parse(r#"{"cmd":"NODE_SOCKET_COUNT","count":-1.5}"#), odd);
    }

    #[test]
    fn envelope_names_what_the_descriptor_is() {
        for (name, kind) in [
            ("net.Native", HandleKind::NetNative),
            ("net.Server", HandleKind::NetServer),
            ("net.Socket", HandleKind::NetSocket),
            ("dgram.Native", HandleKind::DgramNative),
            ("dgram.Socket", HandleKind::DgramSocket),
            ("net.BoundSocket", HandleKind::NetBoundSocket),
            ("tty", HandleKind::Other("tty".into())),
        ] {
            let line = format!(
                r#"{{"cmd":"NODE_HANDLE","type":"{name}","msg":{{"a":1}},"key":"k","dgramType":"udp6"}}"#
            );
            assert_eq!(kind.as_str(), name);
            assert_eq!(
                parse(&line),
                Incoming::Handle(HandleEnvelope {
                    kind,
                    key: Some("k".into()),
                    dgram_type: Some(DgramType::Udp6),
                    message: Box::new(user(r#"{"a":1}"#)),
                })
            );
        }
    }

    #[test]
    fn envelope_without_anything_is_tolerated() {
        let Incoming::Handle(envelope) = parse(r#"{"cmd":"NODE_HANDLE"}"#) else {
            panic!("envelope")
        };
        assert_eq!(envelope.kind, HandleKind::Other(String::new()));
        assert_eq!((envelope.key, envelope.dgram_type), (None, None));
        assert_eq!(*envelope.message, user("null"));
    }

    #[test]
    fn retransmitted_envelope_is_unwrapped_to_the_innermost() {
        // What stock Node makes of a message that was refused three times.
        let mut line =
            r#"{"cmd":"NODE_HANDLE","type":"net.Socket","msg":{"n":1},"key":"k"}"#.to_owned();
        for _ in 0..3 {
            line = format!(r#"{{"cmd":"NODE_HANDLE","type":"net.Native","msg":{line}}}"#);
        }
        let Incoming::Handle(envelope) = parse(&line) else { panic!("envelope") };
        assert_eq!(envelope.kind, HandleKind::NetSocket);
        assert_eq!(envelope.key.as_deref(), Some("k"));
        assert_eq!(*envelope.message, user(r#"{"n":1}"#));
    }

    #[test]
    fn envelopes_without_end_are_refused() {
        let levels = 1_000_000;
        let line = r#"{"cmd":"NODE_HANDLE","msg":"#.repeat(levels) + "1" + &"}".repeat(levels);
        let limits = Limits { max_depth: levels, ..Limits::default() };
        let error = parse_line(line.as_bytes(), &limits).expect_err("nested too often");
        assert!(matches!(error, ProtocolError::BadEnvelope { .. }));
    }

    #[test]
    fn acknowledgement_inside_an_envelope_acknowledges_nothing() {
        for cmd in ["NODE_HANDLE_ACK", "NODE_HANDLE_NACK"] {
            let line =
                format!(r#"{{"cmd":"NODE_HANDLE","type":"net.Native","msg":{{"cmd":"{cmd}"}}}}"#);
            let Incoming::Handle(envelope) = parse(&line) else { panic!("envelope") };
            assert_eq!(*envelope.message, Incoming::OtherInternal { cmd: cmd.into() });
        }
    }

    #[test]
    fn faulty_lines_are_told_apart() {
        assert_eq!(refused(b""), ProtocolError::EmptyLine);
        assert_eq!(refused(b" \r"), ProtocolError::EmptyLine);
        assert_eq!(
            refused(b"Segmentation fault\x1b[0m"),
            ProtocolError::NotJson { at: 0, excerpt: r"Segmentation fault\x1b[0m".into() }
        );
        let deep = "[".repeat(129) + &"]".repeat(129);
        assert_eq!(refused(deep.as_bytes()), ProtocolError::TooDeep { limit: 128 });
        let limits = Limits { max_message: 3, ..Limits::default() };
        assert_eq!(parse_line(b"1234", &limits), Err(ProtocolError::TooLong { limit: 3 }));
        // What is replaced counts as what it is replaced by.
        assert_eq!(parse_line(b"\"\xff", &limits), Err(ProtocolError::TooLong { limit: 3 }));
    }

    #[test]
    fn owned_line_is_read_like_a_borrowed_one_without_a_copy() {
        let limits = Limits::default();
        let stream =
            b"{\"a\": [1, 2]}\n \t[1,\r2]\r\n{\"cmd\":\"NODE_HANDLE_ACK\"}\n[1\n\xff\n\x02null\n";
        let mut lines = crate::node::line::LineDecoder::new(limits);
        lines.feed(stream);
        while let Ok(Some(line)) = lines.next() {
            let borrowed = parse_line(&line, &limits);
            let at = line.as_str().as_ptr();
            let owned = super::parse(line, &limits);
            assert_eq!(owned, borrowed);
            if let Ok(Incoming::User(message)) = owned {
                assert!(message.as_str().contains(' ') || message.as_str().as_ptr() == at);
            }
        }
        assert!(!lines.has_partial());
    }

    #[test]
    fn user_message_is_built_on_demand() {
        let Incoming::User(message) = parse(r#"{"a":[1,2]}"#) else { panic!("user message") };
        let value: serde_json::Value = message.parse().expect("it is valid");
        assert_eq!(value["a"][1], 2);
        assert!(message.parse::<u8>().is_err());
        assert_eq!(message.into_string(), r#"{"a":[1,2]}"#);
    }
}
