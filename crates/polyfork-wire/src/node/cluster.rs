//! Messages of Node's cluster module: reads what a worker says, writes what a primary says.
//!
//! Which answer a question deserves is decided elsewhere; here a message is only read and written. Every
//! writer returns complete lines, newline included.
//!
//! The surprising rule: workers leave members out (`fd`, `flags`), send `false` for a missing backlog and use
//! numbers for address families, so every member is optional and nothing that is odd is an error. A
//! number that does not fit counts as missing.
//!
//! Behaviour follows: Node `lib/internal/cluster/{primary,child,utils,shared_handle,round_robin_handle}.js`.

use super::line::BUN_PREFIX;
use super::message::{DgramType, Fields, HandleKind, text_of};
use crate::ProtocolError;
use crate::json::{self, RawJson};

/// Answers a handle message whose descriptor came. Never prefixed, not even for Bun.
pub const HANDLE_ACK: &[u8] = b"{\"cmd\":\"NODE_HANDLE_ACK\"}\n";

/// Answers a handle message that came without its descriptor. Never prefixed, not even for Bun.
pub const HANDLE_NACK: &[u8] = b"{\"cmd\":\"NODE_HANDLE_NACK\"}\n";

/// The beginning of every line that Bun wants to see prefixed.
const CLUSTER: &[u8] = b"{\"cmd\":\"NODE_CLUSTER\"";

/// A message of the cluster module.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterMessage {
    /// The sender's number of this message, to be named in the answer. Bun's `listening` has none.
    pub seq: Option<u64>,
    /// What it says.
    pub body: FromWorker,
}

/// What a worker tells its primary.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum FromWorker {
    /// The worker's script is about to run.
    Online,
    /// It wants a listening or bound socket. Must be answered.
    QueryServer(Query),
    /// It listens now. The members are those of the question, with the port resolved.
    Listening(Query),
    /// It no longer uses a handle. Not answered.
    Close {
        /// The key it was given; empty when it named none.
        key: String,
    },
    /// It is about to leave of its own will. Must be answered by [`reply_ack`], or it waits for ever.
    ExitedAfterDisconnect,
    /// It answers a message of ours.
    Reply {
        /// The `seq` of our message.
        ack: u64,
        /// Answer to a connection: taken or refused. Anything but a boolean counts as missing.
        accepted: Option<bool>,
    },
    /// Nothing we know.
    Unknown {
        /// What it called itself; empty when it did not.
        act: String,
    },
}

/// A worker's question for a socket, and its later `listening`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Query {
    /// Tells apart the servers of one worker with the same address, from 0.
    pub index: u64,
    /// What all workers of a server shall share, for instance TLS ticket keys. The first that is not null is
    /// given to all.
    pub data: Option<RawJson>,
    /// Host, already resolved, or path; `None` for any host and for a descriptor.
    pub address: Option<String>,
    /// TCP or UDP port, -1 for a path, `None` for a descriptor. Not checked to be a port.
    pub port: Option<i64>,
    /// Address family. A placeholder 4 when `address` is `None`.
    pub address_type: AddressType,
    /// A descriptor number in the *primary's* table. Negative numbers count as missing.
    pub fd: Option<i64>,
    /// TCP: 1 IPv6 only, 2 reuse port. UDP: 1 IPv6 only, 4 reuse address, 64 reuse port.
    pub flags: Option<u32>,
    /// Length of the accept queue, only when it is a positive number; Node means 511 otherwise.
    pub backlog: Option<u32>,
    /// Unix paths: everybody may read.
    pub readable_all: bool,
    /// Unix paths: everybody may write.
    pub writable_all: bool,
}

/// The `addressType` of a question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AddressType {
    /// 4
    V4,
    /// 6
    V6,
    /// `"udp4"`
    Udp4,
    /// `"udp6"`
    Udp6,
    /// -1: a unix path, or a pipe on Windows.
    Path,
    /// Null or missing: a descriptor.
    #[default]
    None,
    /// Anything else.
    Other,
}

/// The address that a round-robin answer names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockname {
    /// As text, without brackets and without a port.
    pub address: String,
    /// Version of the address.
    pub family: Family,
    /// Must be the requested port when that was not 0, or the worker reports "address in use".
    pub port: u16,
}

impl From<std::net::SocketAddr> for Sockname {
    fn from(address: std::net::SocketAddr) -> Self {
        let family = if address.is_ipv4() { Family::IPv4 } else { Family::IPv6 };
        Self { address: address.ip().to_string(), family, port: address.port() }
    }
}

/// Version of an internet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `"IPv4"`
    IPv4,
    /// `"IPv6"`
    IPv6,
}

impl Family {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IPv4 => "IPv4",
            Self::IPv6 => "IPv6",
        }
    }
}

/// How internal lines are marked for the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// Node and Deno: not at all.
    #[default]
    Node,
    /// Bun: the byte 0x02 in front of cluster messages, but not of envelopes and acknowledgements.
    Bun,
}

impl Flavour {
    /// The peer's flavour, by its `online` line.
    #[must_use]
    pub fn of(prefixed: bool) -> Self {
        if prefixed { Self::Bun } else { Self::Node }
    }

    /// Marks a line made by this module, if this peer wants it marked. Other lines stay as they are.
    #[must_use]
    pub fn apply(self, mut line: Vec<u8>) -> Vec<u8> {
        if self == Self::Bun && line.starts_with(CLUSTER) {
            line.insert(0, BUN_PREFIX);
        }
        line
    }
}

/// Reads a cluster message. Nothing in it is required.
pub(crate) fn read(fields: &Fields<'_>) -> ClusterMessage {
    ClusterMessage { seq: fields.seq.and_then(json::unsigned), body: body(fields) }
}

fn body(fields: &Fields<'_>) -> FromWorker {
    let act = text_of(fields.act);
    match act.as_str() {
        "online" => FromWorker::Online,
        "queryServer" => FromWorker::QueryServer(query(fields)),
        "listening" => FromWorker::Listening(query(fields)),
        "close" => FromWorker::Close { key: text_of(fields.key) },
        "exitedAfterDisconnect" => FromWorker::ExitedAfterDisconnect,
        _ => match fields.ack.and_then(json::unsigned) {
            Some(ack) => FromWorker::Reply { ack, accepted: fields.accepted.and_then(boolean) },
            None => FromWorker::Unknown { act },
        },
    }
}

fn query(fields: &Fields<'_>) -> Query {
    Query {
        index: fields.index.and_then(json::unsigned).unwrap_or(0),
        data: fields.data.filter(|data| *data != "null").map(RawJson::scanned),
        address: fields.address.and_then(json::string).map(Into::into),
        port: fields.port.and_then(json::integer),
        address_type: address_type(fields.address_type),
        fd: fields.fd.and_then(json::integer).filter(|fd| *fd >= 0),
        flags: fields.flags.and_then(json::unsigned).and_then(|flags| flags.try_into().ok()),
        backlog: fields.backlog.and_then(backlog),
        readable_all: fields.readable_all == Some("true"),
        writable_all: fields.writable_all == Some("true"),
    }
}

fn address_type(value: Option<&str>) -> AddressType {
    let Some(value) = value else { return AddressType::None };
    if let Some(name) = json::string(value) {
        return match name.as_ref() {
            "udp4" => AddressType::Udp4,
            "udp6" => AddressType::Udp6,
            _ => AddressType::Other,
        };
    }
    match json::integer(value) {
        Some(4) => AddressType::V4,
        Some(6) => AddressType::V6,
        Some(-1) => AddressType::Path,
        None if value == "null" => AddressType::None,
        _ => AddressType::Other,
    }
}

/// A positive number without its fraction; the kernel cuts what is too large anyway.
fn backlog(value: &str) -> Option<u32> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`as` saturates, and what is below one is filtered"
    )]
    let whole = json::number(value)? as u32;
    (whole > 0).then_some(whole)
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// Answers a question for a socket by round robin: the primary listens, connections will be handed over.
///
/// `sockname` belongs to TCP and is left out for paths and descriptors. `key` must be new among the
/// worker's open handles, or the worker dies of an assertion.
#[must_use]
pub fn reply_round_robin(
    ack: u64,
    seq: u64,
    key: &str,
    data: Option<&RawJson>,
    sockname: Option<&Sockname>,
) -> Vec<u8> {
    let mut line = Object::cluster();
    line.raw("errno", "null");
    line.answer(ack, key, data);
    if let Some(Sockname { address, family, port }) = sockname {
        let mut inner = Object::new();
        inner.text("address", address);
        inner.text("family", family.as_str());
        inner.number("port", u64::from(*port));
        line.raw("sockname", &inner.close());
    }
    line.number("seq", seq);
    line.finish()
}

/// Answers a question for a socket with the socket itself: the bound descriptor travels with this line.
///
/// `kind` is [`HandleKind::NetNative`] for TCP and paths, [`HandleKind::DgramNative`] for UDP; the
/// receiver crashes on a kind it does not know. `key` as for [`reply_round_robin`].
#[must_use]
pub fn reply_shared(
    ack: u64,
    seq: u64,
    key: &str,
    data: Option<&RawJson>,
    kind: HandleKind,
) -> Vec<u8> {
    let mut inner = Object::cluster();
    inner.number("errno", 0);
    inner.answer(ack, key, data);
    inner.number("seq", seq);
    envelope(&kind, &inner.close()).finish()
}

/// Answers a question for a socket by an error, for instance -98 for an address in use.
///
/// The wire wants the negative number. A positive one would throw in the worker, so the sign is corrected,
/// and 0, which would mean success, becomes -22 (EINVAL).
#[must_use]
pub fn reply_error(
    ack: u64,
    seq: u64,
    key: &str,
    errno_negative: i32,
    data: Option<&RawJson>,
) -> Vec<u8> {
    let errno = if errno_negative == 0 { -22 } else { -errno_negative.saturating_abs() };
    let mut line = Object::cluster();
    line.raw("errno", &errno.to_string());
    line.answer(ack, key, data);
    line.number("seq", seq);
    line.finish()
}

/// Answers [`FromWorker::ExitedAfterDisconnect`].
#[must_use]
pub fn reply_ack(ack: u64, seq: u64) -> Vec<u8> {
    let mut line = Object::cluster();
    line.number("ack", ack);
    line.number("seq", seq);
    line.finish()
}

/// Hands a connection over; its descriptor, which must be non-blocking, travels with this line.
///
/// The worker answers twice: [`HANDLE_ACK`] for the descriptor and [`FromWorker::Reply`] with this `seq`.
#[must_use]
pub fn new_connection(key: &str, seq: u64) -> Vec<u8> {
    let mut inner = Object::cluster();
    inner.text("act", "newconn");
    inner.text("key", key);
    inner.number("seq", seq);
    envelope(&HandleKind::NetNative, &inner.close()).finish()
}

/// Tells the worker to close its servers and then the channel.
#[must_use]
pub fn disconnect(seq: u64) -> Vec<u8> {
    let mut line = Object::cluster();
    line.text("act", "disconnect");
    line.number("seq", seq);
    line.finish()
}

/// A message for the user code of the peer. `json` must be one JSON text; line breaks between its tokens
/// become blanks.
///
/// The text is not checked again: malformed text ends a stock peer. [`checked_user_message`] is
/// for text that the caller did not make itself.
#[must_use]
pub fn user_message(json: &str) -> Vec<u8> {
    let mut line = Vec::with_capacity(json.len() + 1);
    line.extend_from_slice(json::on_one_line(json).as_bytes());
    line.push(b'\n');
    line
}

/// As [`user_message`], after checking the text.
///
/// # Errors
///
/// As [`RawJson::new`].
pub fn checked_user_message(json: &str) -> Result<Vec<u8>, ProtocolError> {
    RawJson::new(json).map(|json| user_message(json.as_str()))
}

/// A message for the user code of the peer with a handle; its descriptor travels with this line.
///
/// `key` is for [`HandleKind::NetSocket`] only. A [`HandleKind::DgramSocket`] needs
/// [`dgram_handle_message`]. `json` as for [`user_message`].
#[must_use]
pub fn handle_message(kind: HandleKind, json: &str, key: Option<&str>) -> Vec<u8> {
    let mut line = envelope(&kind, json);
    if let Some(key) = key {
        line.text("key", key);
    }
    line.finish()
}

/// A message for the user code of the peer with a UDP socket; its descriptor travels with this line.
#[must_use]
pub fn dgram_handle_message(dgram_type: DgramType, json: &str) -> Vec<u8> {
    let mut line = envelope(&HandleKind::DgramSocket, json);
    line.text(
        "dgramType",
        match dgram_type {
            DgramType::Udp4 => "udp4",
            DgramType::Udp6 => "udp6",
        },
    );
    line.finish()
}

/// Answers `NODE_SOCKET_GET_COUNT`: how many sockets of `key` are open here.
#[must_use]
pub fn socket_count(key: &str, count: u64) -> Vec<u8> {
    let mut line = Object::new();
    line.text("cmd", "NODE_SOCKET_COUNT");
    line.text("key", key);
    line.number("count", count);
    line.finish()
}

/// Answers `NODE_SOCKET_NOTIFY_CLOSE`: no socket of `key` is open here.
#[must_use]
pub fn socket_all_closed(key: &str) -> Vec<u8> {
    let mut line = Object::new();
    line.text("cmd", "NODE_SOCKET_ALL_CLOSED");
    line.text("key", key);
    line.finish()
}

fn envelope(kind: &HandleKind, message: &str) -> Object {
    let mut line = Object::new();
    line.text("cmd", "NODE_HANDLE");
    line.text("type", kind.as_str());
    line.raw("msg", &json::on_one_line(message));
    line
}

/// A JSON object under construction.
struct Object(String);

impl Object {
    fn new() -> Self {
        Self(String::with_capacity(160))
    }

    fn cluster() -> Self {
        let mut object = Self::new();
        object.text("cmd", "NODE_CLUSTER");
        object
    }

    fn answer(&mut self, ack: u64, key: &str, data: Option<&RawJson>) {
        self.text("key", key);
        self.number("ack", ack);
        self.raw("data", data.map_or("null", RawJson::as_str));
    }

    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        json::quote(&mut self.0, value);
    }

    fn number(&mut self, name: &str, value: u64) {
        self.raw(name, &value.to_string());
    }

    fn raw(&mut self, name: &str, value: &str) {
        self.name(name);
        self.0.push_str(value);
    }

    fn name(&mut self, name: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        json::quote(&mut self.0, name);
        self.0.push(':');
    }

    fn close(mut self) -> String {
        self.0.push('}');
        self.0
    }

    fn finish(self) -> Vec<u8> {
        let mut line = self.close();
        line.push('\n');
        line.into_bytes()
    }
}
