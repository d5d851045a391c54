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
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
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
    line.text("dgramType", dgram_type.as_str());
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::Limits;
    use crate::node::message::{Incoming, parse_line};

    fn read(line: &str) -> ClusterMessage {
        match parse_line(line.as_bytes(), &Limits::default()) {
            Ok(Incoming::Cluster(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    fn query(members: &str) -> Query {
        let line = format!(r#"{{"cmd":"NODE_CLUSTER","act":"queryServer","seq":1,{members}}}"#);
        match read(&line).body {
            FromWorker::QueryServer(query) => query,
            other => panic!("{other:?}"),
        }
    }

    /// The value of a line, which must be one line.
    fn value(line: &[u8]) -> Value {
        let text = line.strip_suffix(b"\n").expect("a newline at the end");
        assert!(!text.contains(&b'\n'));
        serde_json::from_slice(text).expect("JSON")
    }

    #[test]
    fn acts_of_a_worker_are_told_apart() {
        let body = |members: &str| read(&format!(r#"{{"cmd":"NODE_CLUSTER",{members}}}"#)).body;
        assert_eq!(body(r#""act":"online","seq":0"#), FromWorker::Online);
        assert_eq!(
            body(r#""act":"close","key":"k","seq":0"#),
            FromWorker::Close { key: "k".into() }
        );
        assert_eq!(body(r#""act":"exitedAfterDisconnect""#), FromWorker::ExitedAfterDisconnect);
        assert_eq!(
            body(r#""ack":3,"accepted":true"#),
            FromWorker::Reply { ack: 3, accepted: Some(true) }
        );
        assert_eq!(
            body(r#""ack":3,"accepted":false"#),
            FromWorker::Reply { ack: 3, accepted: Some(false) }
        );
        assert_eq!(body(r#""ack":3,"accepted":1"#), FromWorker::Reply { ack: 3, accepted: None });
        assert_eq!(body(r#""ack":3"#), FromWorker::Reply { ack: 3, accepted: None });
        assert_eq!(body(r#""ack":-3"#), FromWorker::Unknown { act: String::new() });
        assert_eq!(body(r#""act":"suicide""#), FromWorker::Unknown { act: "suicide".into() });
        assert_eq!(body(r#""act":{"a":1}"#), FromWorker::Unknown { act: r#"{"a":1}"#.into() });
    }

    #[test]
    fn sequence_number_may_be_missing_or_odd() {
        let seq =
            |value: &str| read(&format!(r#"{{"cmd":"NODE_CLUSTER","act":"online"{value}}}"#)).seq;
        assert_eq!(seq(r#","seq":12"#), Some(12));
        for odd in [
            "",
            r#","seq":null"#,
            r#","seq":-1"#,
            r#","seq":1.5"#,
            r#","seq":1e300"#,
            r#","seq":"1""#,
        ] {
            assert_eq!(seq(odd), None, "{odd}");
        }
    }

    #[test]
    fn question_for_a_port_is_read() {
        let query = query(
            r#""index":0,"data":null,"address":null,"port":8000,"addressType":4,"flags":1,"backlog":17"#,
        );
        let expected = Query {
            port: Some(8000),
            address_type: AddressType::V4,
            flags: Some(1),
            backlog: Some(17),
            ..Query::default()
        };
        assert_eq!(query, expected);
    }

    #[test]
    fn question_for_a_path_is_read() {
        let query = query(
            r#""index":2,"data":null,"address":"/tmp/x.sock","port":-1,"addressType":-1,"readableAll":true,"writableAll":true,"backlog":9"#,
        );
        let expected = Query {
            index: 2,
            address: Some("/tmp/x.sock".into()),
            port: Some(-1),
            address_type: AddressType::Path,
            backlog: Some(9),
            readable_all: true,
            writable_all: true,
            ..Query::default()
        };
        assert_eq!(query, expected);
    }

    #[test]
    fn questions_for_descriptors_and_udp_are_read() {
        let fd =
            query(r#""index":0,"data":null,"address":null,"port":null,"addressType":null,"fd":77"#);
        assert_eq!((fd.fd, fd.port, fd.address_type), (Some(77), None, AddressType::None));
        let udp =
            query(r#""address":"0.0.0.0","port":18994,"addressType":"udp4","fd":-1,"flags":64"#);
        assert_eq!((udp.fd, udp.address_type, udp.flags), (None, AddressType::Udp4, Some(64)));
        let udp = query(r#""address":null,"port":null,"addressType":"udp6","fd":5,"flags":null"#);
        assert_eq!((udp.fd, udp.address_type, udp.flags), (Some(5), AddressType::Udp6, None));
    }

    #[test]
    fn odd_members_count_as_missing() {
        let backlog = |value: &str| query(&format!(r#""backlog":{value}"#)).backlog;
        for none in ["false", "0", "-5", "null", "\"9\"", "0.5", "[9]", "1e999"] {
            assert_eq!(backlog(none), None, "{none}");
        }
        assert_eq!(backlog("1e300"), Some(u32::MAX));
        assert_eq!(backlog("2.7"), Some(2));
        let query = query(
            r#""index":-1,"port":1e300,"fd":1.5,"flags":4294967296,"address":7,"addressType":5,"readableAll":1"#,
        );
        assert_eq!(query, Query { address_type: AddressType::Other, ..Query::default() });
        assert_eq!(self::query(r#""addressType":"tcp""#).address_type, AddressType::Other);
        assert_eq!(self::query(r#""addressType":-1.0"#).address_type, AddressType::Path);
    }

    #[test]
    fn data_is_kept_as_it_came() {
        let query = query(r#""data":{"ticketKeys":"00ff", "n":1.0}"#);
        assert_eq!(
            query.data.as_ref().map(RawJson::as_str),
            Some(r#"{"ticketKeys":"00ff", "n":1.0}"#)
        );
    }

    #[test]
    fn listening_of_bun_has_no_number() {
        let line = "\u{2}{\"cmd\":\"NODE_CLUSTER\",\"act\":\"listening\",\"address\":\"0.0.0.0\",\"port\":80,\"data\":null,\"addressType\":4}";
        let message = read(line);
        assert_eq!(message.seq, None);
        let expected = Query {
            address: Some("0.0.0.0".into()),
            port: Some(80),
            address_type: AddressType::V4,
            ..Query::default()
        };
        assert_eq!(message.body, FromWorker::Listening(expected));
    }

    #[test]
    fn round_robin_answer_names_the_bound_address() {
        let sockname = Sockname::from(std::net::SocketAddr::from(([0_u16; 8], 8000)));
        let line = reply_round_robin(4, 9, "a\"b\n", None, Some(&sockname));
        assert_eq!(
            value(&line),
            json!({"cmd": "NODE_CLUSTER", "errno": null, "key": "a\"b\n", "ack": 4, "data": null, "seq": 9,
                   "sockname": {"address": "::", "family": "IPv6", "port": 8000}})
        );
        let data = RawJson::new("{\"ticketKeys\":\n\"00\"}").expect("it is JSON");
        let line = reply_round_robin(4, 9, "k", Some(&data), None);
        assert_eq!(
            value(&line),
            json!({"cmd": "NODE_CLUSTER", "errno": null, "key": "k", "ack": 4, "seq": 9,
                   "data": {"ticketKeys": "00"}})
        );
    }

    #[test]
    fn shared_answer_is_an_envelope() {
        for (kind, name) in
            [(HandleKind::NetNative, "net.Native"), (HandleKind::DgramNative, "dgram.Native")]
        {
            assert_eq!(
                value(&reply_shared(1, 2, "k", None, kind)),
                json!({"cmd": "NODE_HANDLE", "type": name,
                       "msg": {"cmd": "NODE_CLUSTER", "errno": 0, "key": "k", "ack": 1, "data": null, "seq": 2}})
            );
        }
    }

    #[test]
    fn errno_is_always_negative() {
        for (given, sent) in [(-98, -98), (98, -98), (0, -22), (i32::MIN, -i32::MAX)] {
            assert_eq!(value(&reply_error(1, 2, "k", given, None))["errno"], sent);
        }
    }

    #[test]
    fn short_messages_are_written() {
        assert_eq!(value(&reply_ack(5, 6)), json!({"cmd": "NODE_CLUSTER", "ack": 5, "seq": 6}));
        assert_eq!(
            value(&disconnect(7)),
            json!({"cmd": "NODE_CLUSTER", "act": "disconnect", "seq": 7})
        );
        assert_eq!(value(HANDLE_ACK), json!({"cmd": "NODE_HANDLE_ACK"}));
        assert_eq!(value(HANDLE_NACK), json!({"cmd": "NODE_HANDLE_NACK"}));
        assert_eq!(
            value(&socket_count("k", 3)),
            json!({"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 3})
        );
        assert_eq!(
            value(&socket_all_closed("k")),
            json!({"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "k"})
        );
        assert_eq!(
            value(&new_connection("k", 8)),
            json!({"cmd": "NODE_HANDLE", "type": "net.Native",
                   "msg": {"cmd": "NODE_CLUSTER", "act": "newconn", "key": "k", "seq": 8}})
        );
    }

    #[test]
    fn user_messages_stay_on_one_line() {
        assert_eq!(user_message("{\n\"a\": \"\\n\"\r\n}"), b"{ \"a\": \"\\n\"  }\n");
        assert_eq!(checked_user_message("[1]").as_deref(), Ok(&b"[1]\n"[..]));
        assert!(checked_user_message("[1").is_err());
        assert_eq!(
            value(&handle_message(HandleKind::NetSocket, "{\n}", Some("4:x:0"))),
            json!({"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": {}, "key": "4:x:0"})
        );
        assert_eq!(
            value(&dgram_handle_message(DgramType::Udp6, "1")),
            json!({"cmd": "NODE_HANDLE", "type": "dgram.Socket", "msg": 1, "dgramType": "udp6"})
        );
    }

    #[test]
    fn bun_gets_a_mark_before_cluster_messages_only() {
        assert_eq!(Flavour::of(true), Flavour::Bun);
        for line in [reply_ack(1, 2), disconnect(3), reply_error(1, 2, "k", -98, None)] {
            assert_eq!(Flavour::Node.apply(line.clone()), line);
            assert_eq!(Flavour::Bun.apply(line.clone()), [&[2], &line[..]].concat());
        }
        for line in [HANDLE_ACK.to_vec(), new_connection("k", 1), user_message("1")] {
            assert_eq!(Flavour::Bun.apply(line.clone()), line);
        }
    }
}
