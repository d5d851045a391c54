//! The advanced encoding at one end of a channel, an unmodified Node at the other.
//!
//! Takes the executables that `POLYFORK_NODE` names, separated by colons; else those of the manifest that
//! `cargo xtask setup` writes, with the versions 20 and 26; else `node` from the path. Without any, the tests
//! say so and pass. The child gets its channel as standard input, which Node allows.
#![expect(clippy::disallowed_methods, reason = "the crate under test has no spawn of its own")]
#![expect(clippy::print_stdout, reason = "a test that skips says why")]

#[path = "common/values.rs"]
mod values;

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use polyfork_wire::Limits;
use polyfork_wire::env::{NODE_CHANNEL_FD, NODE_OPTIONS, NODE_UNIQUE_ID};
use polyfork_wire::node::advanced::{
    Array, Bytes, BytesKind, FrameDecoder, Key, Map, Object, Objects, Resizable, Set, Value, View,
    from_value, handle_message, parse_value, read, to_frame, to_payload, transcode_line, write,
    write_frame,
};
use polyfork_wire::node::cluster::{self, ClusterMessage, FromWorker};
use polyfork_wire::node::message::{HandleKind, Incoming};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

const SERIALIZATION_MODE: &str = "NODE_CHANNEL_SERIALIZATION_MODE";

/// A peer that says nothing for so long is taken to be stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// Random values that are sent to each version.
const ROUNDS: usize = 500;

/// The executables to test with.
fn nodes(test: &str) -> Vec<PathBuf> {
    if let Some(list) = std::env::var_os("POLYFORK_NODE") {
        return std::env::split_paths(&list).collect();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let manifest = std::env::var_os("POLYFORK_PEERS")
        .map_or_else(|| root.join(".peers/manifest.json"), PathBuf::from);
    if let Ok(text) = fs::read_to_string(manifest) {
        let tools: serde_json::Value = serde_json::from_str(&text).expect("the manifest is JSON");
        let path = |name: &str| {
            let path = tools[name]["path"].as_str().map(PathBuf::from);
            if path.is_none() {
                skip(&format!("{test}::{name}"), "not in the manifest");
            }
            path
        };
        return ["node20", "node26"].into_iter().filter_map(path).collect();
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let files = std::env::split_paths(&folders).map(|folder| folder.join("node"));
    let found: Vec<_> = files.filter(|file| file.is_file()).take(1).collect();
    if found.is_empty() {
        skip(test, "there is no node: run `cargo xtask setup`");
    }
    found
}

/// Says that a test did not run, here and in the log of the test command.
fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(format!("SKIP {test}: {reason}\n").as_bytes()))
            .expect("the skip log can be written");
    }
}

/// A child and our end of its channel.
struct Peer {
    process: Child,
    socket: UnixStream,
    frames: FrameDecoder,
}

impl Peer {
    fn start(node: &Path, script: &str, worker: bool) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_read_timeout(Some(PATIENCE)).expect("a socket can have one");
        ours.set_write_timeout(Some(PATIENCE)).expect("a socket can have one");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node");
        let mut command = Command::new(node);
        command.arg(folder.join(script)).stdin(OwnedFd::from(theirs));
        command.env(NODE_CHANNEL_FD, "0").env(SERIALIZATION_MODE, "advanced");
        command.env_remove(NODE_OPTIONS).env_remove(NODE_UNIQUE_ID);
        if worker {
            command.env(NODE_UNIQUE_ID, "1");
        }
        let process = command.spawn().expect("the executable starts");
        Self { process, socket: ours, frames: FrameDecoder::new(Limits::default()) }
    }

    /// The next payload, or `None` at the end of the channel.
    fn payload(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(payload) = self.frames.next().expect("Node sends valid frames") {
                return Some(payload);
            }
            let mut bytes = [0; 65_536];
            match self.socket.read(&mut bytes).expect("the peer says something") {
                0 => {
                    assert_eq!(self.frames.end(), None);
                    return None;
                }
                n => self.frames.feed(&bytes[..n]),
            }
        }
    }

    fn receive(&mut self) -> Option<Incoming<Value>> {
        let payload = self.payload()?;
        Some(parse_value(take(&payload), &Limits::default()).expect("Node sends valid messages"))
    }

    fn send(&mut self, frame: &[u8]) {
        self.socket.write_all(frame).expect("the peer reads");
    }

    fn send_with(&mut self, frame: &[u8], handle: impl AsFd) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [handle.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let sent = sendmsg(&self.socket, &[IoSlice::new(frame)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(frame.len()), "a short frame goes at once");
    }

    /// Lets the samples pass.
    fn after_samples(&mut self) {
        while self.receive().expect("they have an end") != Incoming::User("end of samples".into()) {
        }
    }

    fn leave(mut self) {
        self.send(&write_frame(&Value::object([("last", true)])).expect("it is short"));
        assert!(self.receive().is_none());
        assert_eq!(self.exit_code(), Some(0));
    }

    fn exit_code(mut self) -> Option<i32> {
        self.process.wait().expect("the process can be waited for").code()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Only when a test fails half-way is it still there.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn take(payload: &[u8]) -> Value {
    read(payload, &Limits::default()).unwrap_or_else(|error| panic!("{error}: {payload:02x?}"))
}

/// The value as a reader of JavaScript sees it, so that two spellings of one value are the same. NaN equals itself.
fn meaning(value: &Value) -> String {
    let mut value = value.clone();
    simplify(&mut value);
    format!("{value:?}")
}

fn simplify(value: &mut Value) {
    match value {
        Value::Int(number) => *value = Value::Double((*number).into()),
        Value::Object(object) => simplify_all(&mut object.properties),
        Value::SparseArray(array) => simplify_all(&mut array.properties),
        Value::Map(Map { entries, .. }) => entries.iter_mut().for_each(|(key, value)| {
            simplify(key);
            simplify(value);
        }),
        Value::Set(Set { values, .. }) => values.iter_mut().for_each(simplify),
        Value::Error(error) => error.cause.iter_mut().for_each(simplify),
        Value::Array(array) => {
            let mut sparse = as_sparse(array);
            simplify_all(&mut sparse.properties);
            *value = Value::SparseArray(Box::new(sparse));
        }
        _ => {}
    }
}

fn simplify_all(properties: &mut [(Key, Value)]) {
    properties.iter_mut().for_each(|(_, value)| simplify(value));
}

fn as_sparse(array: &mut Array) -> polyfork_wire::node::advanced::SparseArray {
    let length = u32::try_from(array.elements.len()).expect("it is short");
    let elements = (0..length).map(Key::from).zip(std::mem::take(&mut array.elements));
    let mut properties: Vec<_> = elements.filter(|(_, value)| *value != Value::Hole).collect();
    let named: Option<&mut Object> = array.named.as_deref_mut();
    properties.extend(named.into_iter().flat_map(|named| std::mem::take(&mut named.properties)));
    polyfork_wire::node::advanced::SparseArray { length, properties }
}

fn has_error_with_cause(value: &Value) -> bool {
    format!("{value:?}").contains(", cause: ")
}

/// What Node wrote is what we write, but for the version.
fn rewritten(payload: &[u8]) {
    let value = take(payload);
    let again = write(&value);
    // Node 20 writes the cause before the stack, which Node 26 does not read; padding may differ then.
    if has_error_with_cause(&value) {
        assert_eq!(meaning(&take(&again)), meaning(&value));
    } else {
        assert_eq!((again[1], &again[2..]), (13, &payload[2..]), "{value:?}");
    }
}

/// A value within another one, so that all its references are to later objects than they were.
fn within_another(value: Value) -> Value {
    #[derive(serde::Serialize)]
    struct Within {
        value: Value,
    }
    take(&to_payload(&Within { value }).expect("it can be sent"))
}

#[test]
fn everything_node_sends_is_read_and_written_again() {
    for node in nodes("everything_node_sends_is_read_and_written_again") {
        let mut child = Peer::start(&node, "advanced.cjs", false);
        let mut samples = Vec::new();
        loop {
            let payload = child.payload().expect("the samples have an end");
            if take(&payload) == Value::from("end of samples") {
                break;
            }
            rewritten(&payload);
            samples.push(payload);
        }
        assert!(samples.len() > 40);
        // Our own spelling comes back with the same meaning.
        for sample in samples {
            let value = take(&sample);
            let frame = write_frame(&within_another(value)).expect("it is short");
            child.send(&frame);
            let back = take(&child.payload().expect("it is sent back"));
            assert_eq!(meaning(&back), meaning(&take(&frame[4..])));
        }
        child.leave();
    }
}

#[test]
fn random_values_come_back_from_node() {
    for node in nodes("random_values_come_back_from_node") {
        let mut child = Peer::start(&node, "advanced.cjs", false);
        child.after_samples();
        let mut runner = TestRunner::deterministic();
        let strategy = values::value(true);
        for _ in 0..ROUNDS {
            let value = strategy.new_tree(&mut runner).expect("nothing is rejected").current();
            child.send(&write_frame(&value).expect("it is short"));
            let payload = child.payload().unwrap_or_else(|| panic!("Node refuses {value:?}"));
            assert_eq!(meaning(&take(&payload)), meaning(&value));
            rewritten(&payload);
        }
        child.leave();
    }
}

#[test]
fn forms_that_node_never_writes_are_read_by_it() {
    let view = |buffer, kind, bytes| View::new(buffer, kind, bytes).expect("it fits");
    let buffer = Value::ArrayBuffer((0..8).collect());
    let resizable = Value::Resizable(Box::new(Resizable { bytes: vec![1, 2, 3], max_length: 8 }));
    let sent = Value::object([
        ("view", Value::View(Box::new(view(buffer, BytesKind::Uint16Array, 2..6)))),
        ("same", Value::Reference(1)),
        ("window", Value::View(Box::new(view(resizable, BytesKind::DataView, 1..3)))),
        ("native", Value::Native(Object { properties: vec![(Key::from("a"), Value::Int(1))] })),
        ("after", Value::Date(1.0)),
        ("date", Value::Reference(7)),
    ]);
    let bytes = |kind, bytes: &[u8]| Bytes::new(kind, bytes.to_vec()).map(Value::Bytes);
    for node in nodes("forms_that_node_never_writes_are_read_by_it") {
        let mut child = Peer::start(&node, "advanced.cjs", false);
        child.after_samples();
        child.send(&write_frame(&sent).expect("it is short"));
        let back = take(&child.payload().expect("it is sent back"));
        assert_eq!(back.get("view"), bytes(BytesKind::Uint16Array, &[2, 3, 4, 5]).ok().as_ref());
        assert_eq!(back.get("same"), Some(&Value::ArrayBuffer((0..8).collect())));
        assert_eq!(back.get("window"), bytes(BytesKind::DataView, &[2, 3]).ok().as_ref());
        assert_eq!(back.get("native"), Some(&Value::object([("a", 1)])));
        assert_eq!(back.get("after"), Some(&Value::Date(1.0)));
        let date = back.get("date").and_then(|date| Objects::of(&back).resolve(date));
        assert_eq!(date, Some(&Value::Date(1.0)));
        child.leave();
    }
}

#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Job {
    id: u64,
    name: String,
    tags: Vec<Option<f64>>,
}

#[derive(Debug, serde::Deserialize)]
struct Found {
    message: Job,
    port: u16,
}

#[test]
fn types_of_serde_and_sockets_reach_node_and_come_back() {
    for node in nodes("types_of_serde_and_sockets_reach_node_and_come_back") {
        let mut child = Peer::start(&node, "advanced.cjs", false);
        child.after_samples();
        let job = || Job { id: u64::MAX, name: "grüße €".into(), tags: vec![None, Some(0.5)] };
        child.send(&to_frame(&job()).expect("it can be sent"));
        let Some(Incoming::User(back)) = child.receive() else { panic!("it is sent back") };
        assert_eq!(from_value::<Job>(back), Ok(job()));

        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        for _ in 0..20 {
            let client = TcpStream::connect(address).expect("it listens");
            let (server, _) = listener.accept().expect("somebody connected");
            server.set_nonblocking(true).expect("a socket can be non-blocking");
            let frame = handle_message(&HandleKind::NetSocket, &job(), None, None);
            child.send_with(&frame.expect("it can be sent"), server);
            assert_eq!(child.receive(), Some(Incoming::HandleAck));
            let Some(Incoming::User(found)) = child.receive() else { panic!("it found a socket") };
            let found: Found = from_value(found).expect("it is what the script sends");
            let port = client.local_addr().expect("it is connected").port();
            assert_eq!((found.message, found.port), (job(), port));
        }
        child.leave();
    }
}

#[test]
fn cluster_worker_is_answered_in_frames() {
    for node in nodes("cluster_worker_is_answered_in_frames") {
        let mut worker = Peer::start(&node, "questions.cjs", true);
        let mut said = 0;
        let mut questions = 0;
        let leaving = loop {
            let (seq, body) = match worker.receive() {
                Some(Incoming::Cluster(ClusterMessage { seq, body })) => (seq, body),
                Some(Incoming::User(_)) => {
                    said += 1;
                    continue;
                }
                other => panic!("{other:?}"),
            };
            match body {
                FromWorker::Online => assert_eq!(seq, Some(0)),
                FromWorker::QueryServer(query) => {
                    let seq = seq.expect("a question has a number");
                    let line = cluster::reply_error(seq, 0, "", -22, query.data.as_ref());
                    worker.send(&transcode_line(&line).expect("it is JSON"));
                    questions += 1;
                }
                FromWorker::ExitedAfterDisconnect => break seq,
                other => panic!("{other:?}"),
            }
        };
        assert!(said > 0);
        assert_eq!(questions, 10);
        let line = cluster::reply_ack(leaving.expect("it has a number"), 1);
        worker.send(&transcode_line(&line).expect("it is JSON"));
        assert!(worker.receive().is_none());
        assert_eq!(worker.exit_code(), Some(0));
    }
}
