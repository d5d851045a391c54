//! What the other end of a channel may do to us with bytes and descriptors: end the channel, and no more.
//!
//! Faults by their number in the list that this project keeps (`docs/faults.tsv`). The other end is a bare socket
//! here, so that it can say anything; the same against a live Node child is in `node_child`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use polyfork::channel::{Channel, ChannelError, Encoding, Handle, Limits, ProtocolError};
use polyfork_sys::channel as sys;
use serde_json::{Value, json};

use crate::support::{PATIENCE, next};

const ALL: [Encoding; 3] = [Encoding::Json, Encoding::Advanced, Encoding::Native];
const NODES: [Encoding; 2] = [Encoding::Json, Encoding::Advanced];

/// A channel, and the bare socket at its other end.
fn channel(encoding: Encoding) -> (Channel, UnixStream) {
    limited(encoding, Limits::default())
}

fn limited(encoding: Encoding, limits: Limits) -> (Channel, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Channel::with_limits(ours.into(), encoding, limits).unwrap(), theirs)
}

/// The messages as the other end of a channel would write them, and where each of them ends.
async fn recorded(encoding: Encoding, messages: &[Value]) -> (Vec<u8>, Vec<usize>) {
    let (channel, mut theirs) = channel(encoding);
    let mut ends = Vec::new();
    let mut bytes = Vec::new();
    theirs.set_nonblocking(true).unwrap();
    for message in messages {
        match encoding {
            // Postcard cannot say what it does not know the type of.
            Encoding::Native => channel.send(&message.to_string()).await.unwrap(),
            _ => channel.send(message).await.unwrap(),
        }
        channel.flush().await.unwrap();
        let error = theirs.read_to_end(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        ends.push(bytes.len());
    }
    (bytes, ends)
}

/// Writes from a thread: what the channel does not read must not stop the test.
fn write(mut to: UnixStream, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        // The channel may end in the middle of it.
        let _ended = to.write_all(&bytes);
    })
}

async fn fault_of(channel: &mut Channel) -> ChannelError {
    loop {
        match tokio::time::timeout(PATIENCE, channel.recv()).await.expect("in time") {
            Ok(Some(_message)) => {}
            Ok(None) => panic!("it ended without an error"),
            Err(error) => return error,
        }
    }
}

/// The bytes end the channel with an error, told once; nothing can be sent any more, and a channel next to it goes on.
async fn ends_only_its_channel(encoding: Encoding, bytes: &[u8]) -> ChannelError {
    let (mut good, good_theirs) = Channel::pair().unwrap();
    let (mut bad, theirs) = channel(encoding);
    let writing = write(theirs.try_clone().unwrap(), bytes.to_vec());
    let error = fault_of(&mut bad).await;
    writing.join().unwrap();
    assert!(bad.recv().await.unwrap().is_none());
    assert!(!bad.is_connected() && bad.send(&1).await.is_err());
    good_theirs.send(&5).await.unwrap();
    assert_eq!(next(&mut good).await.to::<i32>().unwrap(), 5);
    error
}

/// The greeting with which a native channel begins.
async fn greeting() -> Vec<u8> {
    recorded(Encoding::Native, &[json!(null)]).await.0[..].to_vec()
}

#[tokio::test]
async fn fault_58_absurd_lengths_end_only_their_channel() {
    for length in [0x8000_0000_u32, 0xFFFF_FFFF, 0] {
        ends_only_its_channel(Encoding::Advanced, &length.to_be_bytes()).await;
        let native = [&length.to_le_bytes()[..], &[0; 2]].concat();
        ends_only_its_channel(Encoding::Native, &native).await;
        // Also after good messages.
        let (mut bytes, _) = recorded(Encoding::Advanced, &[json!(1)]).await;
        bytes.extend(length.to_be_bytes());
        ends_only_its_channel(Encoding::Advanced, &bytes).await;
        ends_only_its_channel(Encoding::Native, &[greeting().await, native].concat()).await;
    }
}

#[tokio::test]
async fn fault_59_malformed_lines_end_only_their_channel() {
    for line in ["{\"a\":\n", "\n", "nonsense\n", "[1,]\n", "{\"a\":1}}\n", "\"\u{1}\"\n", "1 2\n"]
    {
        let error = ends_only_its_channel(Encoding::Json, line.as_bytes()).await;
        let why = error.fault();
        assert!(
            matches!(why, ProtocolError::NotJson { .. } | ProtocolError::EmptyLine),
            "{line:?}: {why}"
        );
    }
}

#[tokio::test]
async fn fault_61_nesting_beyond_the_limit_ends_the_channel_and_takes_no_stack() {
    let levels = 2_000_000;
    let line = ["[".repeat(levels), "]".repeat(levels), "\n".into()].concat();
    let error = ends_only_its_channel(Encoding::Json, line.as_bytes()).await;
    assert!(matches!(error.fault(), ProtocolError::TooDeep { limit: 128 }), "{error}");
    let frame = |levels: usize| {
        let payload =
            [&b"\xff\x0f"[..], &b"o\"\x01a".repeat(levels), b"0", &b"{\x01".repeat(levels)];
        let payload = payload.concat();
        [&u32::try_from(payload.len()).unwrap().to_be_bytes()[..], &payload].concat()
    };
    let error = ends_only_its_channel(Encoding::Advanced, &frame(levels)).await;
    assert!(matches!(error.fault(), ProtocolError::TooDeep { limit: 128 }), "{error}");

    // As deep as Node goes, for those who want it. Whoever builds a value of it has a limit of their own.
    let limits = Limits { max_depth: usize::MAX, ..Limits::default() };
    let (mut json, theirs) = limited(Encoding::Json, limits);
    let writing = write(theirs, line.clone().into_bytes());
    let message = next(&mut json).await;
    assert!(message.json().is_some_and(|text| text.len() == line.len() - 1));
    assert!(message.to::<Value>().is_err());
    writing.join().unwrap();
    let (mut advanced, theirs) = limited(Encoding::Advanced, limits);
    let writing = write(theirs, frame(levels));
    let message = next(&mut advanced).await;
    let value = message.value().expect("a value");
    assert!(value.clone() == *value);
    assert!(message.to::<Value>().is_err());
    writing.join().unwrap();
}

#[tokio::test]
async fn fault_62_what_is_longer_than_the_limit_is_not_kept() {
    let limits = Limits { max_message: 1 << 20, ..Limits::default() };
    // A line without an end.
    let (mut channel, theirs) = limited(Encoding::Json, limits);
    let writing = write(theirs, vec![b'x'; 64 << 20]);
    let error = fault_of(&mut channel).await;
    assert!(matches!(error.fault(), ProtocolError::TooLong { limit: 1_048_576 }), "{error}");
    // The channel is closed: whoever goes on writing gets an error.
    writing.join().unwrap();
    // A gigabyte that is only announced is refused by its header.
    for encoding in [Encoding::Advanced, Encoding::Native] {
        let (mut channel, theirs) = limited(encoding, limits);
        let length = 1_u32 << 30;
        let bytes = match encoding {
            Encoding::Advanced => length.to_be_bytes().to_vec(),
            _ => [&length.to_le_bytes()[..], &[0; 2]].concat(),
        };
        let writing = write(theirs.try_clone().unwrap(), bytes);
        let error = fault_of(&mut channel).await;
        assert!(matches!(error.fault(), ProtocolError::TooLong { .. }), "{error}");
        writing.join().unwrap();
    }
}

#[tokio::test]
async fn fault_63_single_bytes_are_the_same_message() {
    let long = json!({ "long": "y".repeat(100_000), "n": [1, 2, 3] });
    for encoding in ALL {
        let (bytes, _) = recorded(encoding, std::slice::from_ref(&long)).await;
        let (mut channel, mut theirs) = channel(encoding);
        let writing = std::thread::spawn(move || {
            for byte in bytes {
                theirs.write_all(&[byte]).unwrap();
            }
            theirs
        });
        let message = next(&mut channel).await;
        let text = match encoding {
            Encoding::Native => message.to::<String>().unwrap(),
            _ => message.to::<Value>().unwrap().to_string(),
        };
        assert_eq!(text, long.to_string());
        writing.join().unwrap();
    }
}

/// Cut anywhere, whole messages arrive and the rest does not, without an error: the other end has died.
#[tokio::test]
async fn fault_64_a_stream_cut_anywhere_gives_its_whole_messages() {
    let messages = [json!("one"), json!({"two": [1, 2.5, null]}), json!("drei \u{1f600}")];
    for encoding in ALL {
        let (bytes, ends) = recorded(encoding, &messages).await;
        for cut in 0..=bytes.len() {
            let (mut channel, mut theirs) = channel(encoding);
            theirs.write_all(&bytes[..cut]).unwrap();
            drop(theirs);
            let mut whole = 0;
            while let Some(message) = channel.recv().await.unwrap() {
                if encoding != Encoding::Native {
                    assert_eq!(message.to::<Value>().unwrap(), messages[whole]);
                }
                whole += 1;
            }
            assert_eq!(whole, ends.iter().filter(|end| **end <= cut).count(), "{encoding:?} {cut}");
        }
    }
}

#[tokio::test]
async fn fault_66_foreign_output_is_shown_escaped_with_its_first_bytes() {
    let output = format!("\u{1b}[31mwarning\u{7}: {}\n", "long ".repeat(100));
    let error = ends_only_its_channel(Encoding::Json, output.as_bytes()).await.to_string();
    assert!(error.contains("\\x1b[31mwarning\\x07: long"), "{error}");
    assert!(!error.chars().any(char::is_control) && error.len() < 400, "{error}");
}

/// Something to send, and how to see that every copy of it was closed.
fn watched() -> (OwnedFd, File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (writer, reader.into())
}

/// Every descriptor that was sent has been closed when this returns.
async fn closed(writer: OwnedFd, mut reader: File) {
    drop(writer);
    let reading = tokio::task::spawn_blocking(move || reader.read(&mut [0]).unwrap());
    let end = tokio::time::timeout(PATIENCE, reading).await.expect("a copy is still open");
    assert_eq!(end.unwrap(), 0);
}

/// Sends all of it, the descriptors with the first byte.
fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let sent = sys::send(socket.as_fd(), bytes, fds).unwrap();
    (&*socket).write_all(&bytes[sent..]).unwrap();
}

#[tokio::test]
async fn fault_67_descriptors_with_plain_messages_are_closed() {
    for encoding in NODES {
        let (bytes, _) = recorded(encoding, &[json!({"plain": 1})]).await;
        let (mut channel, theirs) = channel(encoding);
        let (writer, reader) = watched();
        let copy = writer.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            for _ in 0..10_000 {
                send(&theirs, &bytes, &[copy.as_fd()]);
            }
            // Still open: nothing is closed for the reason that the channel has ended.
            theirs
        });
        for _ in 0..10_000 {
            let message = next(&mut channel).await;
            assert!(message.handles().is_empty());
        }
        let _theirs = sending.join().unwrap();
        closed(writer, reader).await;
        assert!(channel.is_connected());
    }
    // Between our own programs a descriptor that no frame declares is a fault.
    let (mut channel, theirs) = channel(Encoding::Native);
    let (writer, reader) = watched();
    send(&theirs, &greeting().await, &[writer.as_fd()]);
    assert!(matches!(fault_of(&mut channel).await.fault(), ProtocolError::SurplusDescriptor));
    closed(writer, reader).await;
}

/// An envelope for a socket, with `message` inside.
fn envelope(encoding: Encoding, kind: &str, message: &Value) -> Vec<u8> {
    let envelope = json!({"cmd": "NODE_HANDLE", "type": kind, "msg": message});
    match encoding {
        Encoding::Json => format!("{envelope}\n").into_bytes(),
        _ => polyfork_wire::node::advanced::to_frame(&envelope).unwrap(),
    }
}

/// Reads until the channel has said this.
async fn hears(theirs: &UnixStream, what: &'static [u8]) {
    let mut theirs = theirs.try_clone().unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
        while !heard.windows(what.len()).any(|part| part == what) {
            let length = theirs.read(&mut buffer).unwrap();
            assert!(length > 0, "it said something else: {}", heard.escape_ascii());
            heard.extend_from_slice(&buffer[..length]);
        }
    });
    tokio::time::timeout(PATIENCE, reading).await.expect("it is said").unwrap();
}

#[tokio::test]
async fn fault_68_handles_that_are_not_what_they_should_be_are_closed() {
    for encoding in NODES {
        let (mut channel, theirs) = channel(encoding);
        // Two for one message: the first is a pipe and no socket, the second belongs to nothing.
        let (writer, reader) = watched();
        let bytes = envelope(encoding, "net.Socket", &json!("two"));
        send(&theirs, &bytes, &[writer.as_fd(), writer.as_fd()]);
        let mut message = next(&mut channel).await;
        assert_eq!(message.to::<String>().unwrap(), "two");
        assert!(message.take_handle().is_none(), "it is no socket");
        closed(writer, reader).await;
        // A file as a server.
        let file = File::open("/dev/null").unwrap();
        let bytes = envelope(encoding, "net.Server", &json!("file"));
        send(&theirs, &bytes, &[file.as_fd()]);
        assert!(next(&mut channel).await.take_handle().is_none());
        // None: refused in Node's way, and not delivered.
        // What comes next has a descriptor, which would be taken for its.
        send(&theirs, &envelope(encoding, "net.Socket", &json!("none")), &[]);
        hears(&theirs, b"NODE_HANDLE_NACK").await;
        // A right one still arrives.
        let (one, _other) = UnixStream::pair().unwrap();
        send(&theirs, &envelope(encoding, "net.Socket", &json!("right")), &[one.as_fd()]);
        let mut message = next(&mut channel).await;
        assert_eq!(message.to::<String>().unwrap(), "right");
        assert!(matches!(message.take_handle(), Some(Handle::UnixStream(_))));
        assert!(channel.is_connected());
    }
}

#[tokio::test]
async fn fault_69_as_many_descriptors_as_a_message_can_carry_arrive_or_are_closed() {
    // Between our own programs all of them are wanted.
    let (mut here, there) = Channel::pair().unwrap();
    let null = || Handle::from(OwnedFd::from(File::open("/dev/null").unwrap()));
    there.send_with_all(&"many", (0..253).map(|_| null()).collect()).await.unwrap();
    let mut message = next(&mut here).await;
    let mut arrived = 0;
    while message.take_handle().is_some() {
        arrived += 1;
    }
    assert_eq!(arrived, 253);
    // From Node one is. More than may be kept until their message is whole are closed, and so is the rest after it.
    for encoding in NODES {
        let limits = Limits { max_fds_queued: 300, ..Limits::default() };
        let (mut channel, theirs) = limited(encoding, limits);
        let (writer, reader) = watched();
        let bytes = envelope(encoding, "net.Socket", &json!(1));
        // In the midst of one message, so that none of them can be settled.
        for part in bytes.chunks(bytes.len() / 4 + 1) {
            send(&theirs, part, &[writer.as_fd(); 253]);
        }
        let message = next(&mut channel).await;
        assert_eq!(message.to::<i32>().unwrap(), 1);
        assert!(message.handles().is_empty(), "a pipe is no socket");
        closed(writer, reader).await;
        assert!(channel.is_connected());
    }
}

/// On channels descriptors are received by recvmsg alone; a plain read would lose them silently.
#[test]
fn fault_70_channels_are_never_read_by_read() {
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/src/channel");
    for entry in std::fs::read_dir(sources).unwrap() {
        let path = entry.unwrap().path();
        // Tests have a folder of their own.
        if path.is_dir() {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for call in ["read(fd", "readv(", "try_read", "read_buf", "AsyncRead", "io::Read", "recv("]
        {
            // Its own receiving function is called the same; tests may read as they like.
            let own = call == "recv(" || path.ends_with("tests.rs");
            assert!(own || !text.contains(call), "{} uses {call}", path.display());
        }
    }
    let socket = std::fs::read_to_string(format!("{sources}/socket.rs")).unwrap();
    assert!(socket.contains("channel::receive("), "the one place that reads");
}

/// What only Node's own modules say to each other reaches no program, and harms nobody.
#[tokio::test]
async fn fault_75_internal_messages_reach_nobody() {
    for encoding in NODES {
        let (mut channel, theirs) = channel(encoding);
        for internal in [
            json!({"cmd": "NODE_CLUSTER", "act": "newconn", "key": "x", "seq": 1}),
            json!({"cmd": "NODE_CLUSTER", "act": "disconnect"}),
            json!({"cmd": "NODE_CLUSTER", "ack": 1e300}),
            json!({"cmd": "NODE_SOMETHING", "seq": -1}),
            json!({"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "no such server"}),
            json!({"cmd": "NODE_SOCKET_COUNT", "key": [], "count": -5}),
        ] {
            let bytes = match encoding {
                Encoding::Json => format!("{internal}\n").into_bytes(),
                _ => polyfork_wire::node::advanced::to_frame(&internal).unwrap(),
            };
            send(&theirs, &bytes, &[]);
        }
        // Inside an envelope neither.
        let (writer, reader) = watched();
        let inner = json!({"cmd": "NODE_CLUSTER", "act": "newconn"});
        send(&theirs, &envelope(encoding, "net.Native", &inner), &[writer.as_fd()]);
        closed(writer, reader).await;
        let (good, _) = recorded(encoding, &[json!("good")]).await;
        send(&theirs, &good, &[]);
        assert_eq!(next(&mut channel).await.to::<String>().unwrap(), "good");
    }
}
