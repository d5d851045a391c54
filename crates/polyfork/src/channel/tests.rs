//! Channels within one process: both ends are ours, or one is a bare socket that says what it likes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use polyfork_wire::native::port::PortFrame;
use serde_json::{Value, json};

use super::*;

mod ring;

const LONG: Duration = Duration::from_secs(60);
const ALL: [Encoding; 3] = [Encoding::Json, Encoding::Advanced, Encoding::Native];

fn pair(encoding: Encoding) -> (Channel, Channel) {
    let (one, other) = polyfork_sys::channel::pair().unwrap();
    (Channel::new(one, encoding).unwrap(), Channel::new(other, encoding).unwrap())
}

/// A channel, and its other end as a plain blocking socket.
fn with_peer(encoding: Encoding) -> (Channel, UnixStream) {
    let (one, other) = UnixStream::pair().unwrap();
    (Channel::new(one.into(), encoding).unwrap(), other)
}

async fn next(channel: &mut Channel) -> Message {
    tokio::time::timeout(LONG, channel.recv()).await.unwrap().unwrap().unwrap()
}

fn frame(port: &PortFrame<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    port.write(&mut payload);
    let mut frame = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

#[tokio::test]
async fn messages_arrive_once_and_in_order() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let writing = tokio::spawn(async move {
            for number in 0..20_000_u32 {
                here.send(&(number, "x".repeat(number as usize % 50))).await.unwrap();
            }
            here.disconnect().await.unwrap();
        });
        for expected in 0..20_000_u32 {
            let (number, text): (u32, String) = next(&mut there).await.to().unwrap();
            assert_eq!((number, text.len()), (expected, expected as usize % 50));
        }
        assert!(there.recv().await.unwrap().is_none());
        writing.await.unwrap();
        assert!(!there.is_connected());
    }
}

#[tokio::test]
async fn disconnect_loses_nothing_and_works_once() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let sender = here.sender();
        let leaving = tokio::spawn(async move {
            for _ in 0..3 {
                here.send(&"x".repeat(3 << 20)).await.unwrap();
            }
            here.disconnect().await
        });
        for _ in 0..3 {
            assert_eq!(next(&mut there).await.to::<String>().unwrap().len(), 3 << 20);
        }
        assert_eq!(leaving.await.unwrap(), Ok(()));
        assert!(!sender.is_connected());
        assert_eq!(sender.disconnect().await, Err(AlreadyDisconnected));
        assert_eq!(sender.send(&1).await, Err(SendError::Disconnected));
        assert!(there.recv().await.unwrap().is_none());
        drop(there);
        tokio::time::timeout(LONG, sender.closed()).await.unwrap();
    }
}

#[tokio::test]
async fn dropped_channel_writes_what_is_queued_and_ends() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        for number in 0..1000 {
            here.send(&number).await.unwrap();
        }
        drop(here);
        for number in 0..1000 {
            assert_eq!(next(&mut there).await.to::<i32>().unwrap(), number);
        }
        assert!(there.recv().await.unwrap().is_none());
    }
}

#[tokio::test]
async fn try_send_gives_the_message_back_when_full_and_when_closed() {
    for encoding in ALL {
        let (channel, mut peer) = with_peer(encoding);
        let message = "x".repeat(10_000);
        let mut sent = 0_usize;
        let back = loop {
            match channel.try_send(message.clone()) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 1000, "the queue has no end");
        };
        assert_eq!(back, TrySendError::Full(message.clone()));
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            all.len()
        });
        channel.send(&message).await.unwrap();
        channel.disconnect().await.unwrap();
        assert_eq!(channel.try_send(message.clone()), Err(TrySendError::Closed(message)));
        assert!(reading.join().unwrap() >= 10_000 * (sent + 1));
    }
}

#[tokio::test]
async fn texts_are_read_where_they_are() {
    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct Line<'a> {
        number: u64,
        text: &'a str,
    }
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        for text in ["short", &"long ".repeat(100), "with \"quotes\""] {
            here.send(&Line { number: 7, text }).await.unwrap();
            let message = next(&mut there).await;
            let read = message.to_borrowed::<Line<'_>>();
            match (encoding, text.contains('"')) {
                (Encoding::Advanced, _) => assert!(read.unwrap_err().to_string().contains("`to`")),
                (Encoding::Json, true) => {
                    assert!(read.is_err(), "an escaped text cannot be borrowed")
                }
                _ => assert_eq!(read.unwrap(), Line { number: 7, text }),
            }
        }
    }
}

#[tokio::test]
async fn sender_waits_for_a_receiver_that_is_behind() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let writing = tokio::spawn(async move {
            for _ in 0..2000 {
                here.send(&"x".repeat(10_000)).await.unwrap();
                counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        let count = || sent.load(std::sync::atomic::Ordering::Relaxed);
        let mut before = usize::MAX;
        while count() != before {
            before = count();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(before < 400, "{before} messages of 10 kB are on their way");
        for _ in 0..2000 {
            next(&mut there).await;
        }
        writing.await.unwrap();
    }
}

#[tokio::test]
async fn requests_are_answered_by_number_in_any_order() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let serving = tokio::spawn(async move {
            let mut waiting = Vec::new();
            for _ in 0..10 {
                waiting.push(next(&mut there).await);
            }
            for message in waiting.into_iter().rev() {
                assert!(message.wants_reply());
                let number: u32 = message.to().unwrap();
                message.reply(&(number * 2)).await.unwrap();
            }
            there
        });
        let sender = here.sender();
        let asking = (0..10_u32).map(|number| {
            let sender = sender.clone();
            tokio::spawn(async move {
                let reply = sender.request(&number, LONG).await.unwrap();
                assert_eq!(reply.to::<u32>().unwrap(), number * 2);
            })
        });
        for asker in asking.collect::<Vec<_>>() {
            asker.await.unwrap();
        }
        drop(serving.await.unwrap());
        let ended = here.request(&1, LONG).await.unwrap_err();
        let noticed = RequestError::Send(SendError::Disconnected);
        assert!(ended == RequestError::Disconnected || ended == noticed, "{ended}");
    }
}

#[tokio::test]
async fn late_reply_reaches_nobody() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let late = here.request(&"slow", Duration::ZERO).await.unwrap_err();
        assert_eq!(late, RequestError::Deadline(Duration::ZERO));
        let serving = tokio::spawn(async move {
            // Whether the first was sent before its deadline is not known.
            let mut first = next(&mut there).await;
            if first.to::<String>().unwrap() == "slow" {
                first.reply(&"to the first").await.unwrap();
                first = next(&mut there).await;
            }
            first.reply(&"to the second").await.unwrap();
            there
        });
        let reply = here.request(&"quick", LONG).await.unwrap();
        assert_eq!(reply.to::<String>().unwrap(), "to the second");
        drop(serving.await.unwrap());
    }
}

#[tokio::test]
async fn request_that_is_dropped_is_refused() {
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        let serving = tokio::spawn(async move {
            drop(next(&mut there).await);
            there
        });
        assert_eq!(here.request(&1, LONG).await.unwrap_err(), RequestError::Refused);
        drop(serving.await.unwrap());
    }
}

#[tokio::test]
async fn replies_come_while_messages_pile_up() {
    for encoding in ALL {
        let (here, there) = pair(encoding);
        let (to_here, mut from_here) = there.split();
        let flood = to_here.clone();
        let flooding = tokio::spawn(async move {
            for _ in 0..300 {
                flood.send(&"x".repeat(10_000)).await.unwrap();
            }
            let request = from_here.recv().await.unwrap().unwrap();
            request.reply(&"answer").await.unwrap();
            from_here
        });
        // Nobody receives here.
        let reply = here.request(&"question", LONG).await.unwrap();
        assert_eq!(reply.to::<String>().unwrap(), "answer");
        drop(flooding.await.unwrap());
    }
}

#[tokio::test]
async fn handles_arrive_with_their_message() {
    let (here, mut there) = pair(Encoding::Native);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"text").unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    here.send(&0).await.unwrap();
    here.send_with(&1, listener).await.unwrap();
    here.send_with_all(&2, vec![file.into(), read.into()]).await.unwrap();
    drop(write);
    assert!(next(&mut there).await.handles().is_empty());
    let Some(Handle::TcpListener(listener)) = next(&mut there).await.take_handle() else {
        panic!("a listener");
    };
    assert_eq!(listener.local_addr().unwrap(), address);
    let handles = next(&mut there).await.take_handles();
    assert!(matches!(handles[..], [Handle::File(_), Handle::Fd(_)]));
}

#[tokio::test]
async fn node_handles_are_acknowledged_and_more_than_the_window_arrive() {
    for encoding in [Encoding::Json, Encoding::Advanced] {
        send_a_hundred_connections(encoding).await;
    }
}

async fn send_a_hundred_connections(encoding: Encoding) {
    let (here, mut there) = pair(encoding);
    let sending = tokio::spawn(async move {
        for number in 0..100 {
            let (one, other) = UnixStream::pair().unwrap();
            here.send_with(&number, other).await.unwrap();
            (&one).write_all(&[number]).unwrap();
        }
        here.disconnect().await.unwrap();
    });
    for number in 0..100_u8 {
        let mut message = next(&mut there).await;
        assert_eq!(message.to::<u8>().unwrap(), number);
        let Some(Handle::UnixStream(stream)) = message.take_handle() else { panic!("a stream") };
        stream.set_nonblocking(false).unwrap();
        let mut byte = [0];
        (&stream).read_exact(&mut byte).unwrap();
        assert_eq!(byte, [number]);
    }
    sending.await.unwrap();
}

#[tokio::test]
async fn what_node_cannot_take_is_refused_before_anything_is_sent() {
    for encoding in [Encoding::Json, Encoding::Advanced] {
        refuse_what_node_cannot_take(encoding).await;
    }
}

async fn refuse_what_node_cannot_take(encoding: Encoding) {
    let (here, mut there) = pair(encoding);
    let refused = |result| matches!(result, Err(SendError::Handle(_)));
    assert!(refused(here.send_with(&1, tempfile::tempfile().unwrap()).await));
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(refused(here.send_with(&1, null).await));
    let disguised = TcpListener::from(OwnedFd::from(tempfile::tempfile().unwrap()));
    assert!(refused(here.send_with(&1, disguised).await));
    assert_eq!(here.send(&json!({"cmd": "NODE_HANDLE_ACK"})).await, Err(SendError::Reserved));
    here.send(&json!({"cmd": "NODE_", "a": "NODE_HANDLE"})).await.unwrap();
    assert_eq!(next(&mut there).await.to::<Value>().unwrap()["cmd"], "NODE_");
}

#[tokio::test]
async fn foreign_descriptor_is_closed_and_its_message_delivered() {
    let (mut channel, peer) = with_peer(Encoding::Json);
    let (pipe, other_end) = rustix::pipe::pipe().unwrap();
    let line = b"{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Server\",\"msg\":1}\n";
    polyfork_sys::channel::send(peer.as_fd(), line, &[other_end.as_fd()]).unwrap();
    drop(other_end);
    let message = next(&mut channel).await;
    assert!(message.handles().is_empty());
    // The other end of the pipe is closed now: end of file.
    assert_eq!(rustix::io::read(&pipe, &mut [0; 8]).unwrap(), 0);
    let mut ack = [0; 26];
    (&peer).read_exact(&mut ack).unwrap();
    assert_eq!(&ack, b"{\"cmd\":\"NODE_HANDLE_ACK\"}\n");
}

#[tokio::test]
async fn envelope_without_its_descriptor_is_refused_once() {
    let (mut channel, mut peer) = with_peer(Encoding::Json);
    peer.write_all(b"{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Socket\",\"msg\":1}\n2\n").unwrap();
    assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), 2);
    let mut nack = [0; 27];
    peer.read_exact(&mut nack).unwrap();
    assert_eq!(&nack, b"{\"cmd\":\"NODE_HANDLE_NACK\"}\n");
}

#[tokio::test]
async fn refused_connection_is_sent_again_three_times_unchanged() {
    let (channel, peer) = with_peer(Encoding::Json);
    let (_one, other) = UnixStream::pair().unwrap();
    channel.send_with(&1, other).await.unwrap();
    channel.flush().await.unwrap();
    let peer = tokio::task::spawn_blocking(move || {
        let mut lines = Vec::new();
        for _ in 0..4 {
            let (mut buffer, mut fds) = ([0; 500], VecDeque::new());
            let got = polyfork_sys::channel::receive(peer.as_fd(), &mut buffer, &mut fds).unwrap();
            assert_eq!(fds.len(), 1);
            lines.push(buffer[..got.len].to_vec());
            (&peer).write_all(cluster_nack()).unwrap();
        }
        assert!(lines.iter().all(|line| *line == lines[0]));
        peer
    })
    .await
    .unwrap();
    channel.disconnect().await.unwrap();
    let mut rest = Vec::new();
    (&peer).read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

fn cluster_nack() -> &'static [u8] {
    polyfork_wire::node::cluster::HANDLE_NACK
}

#[tokio::test]
async fn connections_of_a_node_server_are_counted_until_closed() {
    let (mut channel, peer) = with_peer(Encoding::Json);
    let line = b"{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Socket\",\"msg\":1,\"key\":\"k\"}\n";
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(peer.try_clone().unwrap()));
    let mut read = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    let mut kept = Vec::new();
    for _ in 0..2 {
        let (_one, other) = UnixStream::pair().unwrap();
        polyfork_sys::channel::send(peer.as_fd(), line, &[other.as_fd()]).unwrap();
        kept.push(next(&mut channel).await.take_counted().unwrap());
    }
    assert_eq!(kept[0].key(), "k");
    (&peer).write_all(b"{\"cmd\":\"NODE_SOCKET_GET_COUNT\",\"key\":\"k\"}\n").unwrap();
    (&peer).write_all(b"{\"cmd\":\"NODE_SOCKET_NOTIFY_CLOSE\",\"key\":\"k\"}\n").unwrap();
    (&peer).write_all(b"{\"cmd\":\"NODE_SOCKET_NOTIFY_CLOSE\",\"key\":\"other\"}\n0\n").unwrap();
    next(&mut channel).await;
    kept.pop();
    kept.pop();
    channel.disconnect().await.unwrap();
    let said: Vec<Value> = (0..5).map(|_| read()).collect();
    let ack = json!({"cmd": "NODE_HANDLE_ACK"});
    let closed = |key| json!({"cmd": "NODE_SOCKET_ALL_CLOSED", "key": key});
    let count = json!({"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 2});
    assert_eq!(said, [ack.clone(), ack, count, closed("other"), closed("k")]);
}

#[tokio::test]
async fn fault_is_told_once_after_the_last_good_message() {
    let node: [&[u8]; 5] = [
        b"1\n\n",
        b"1\nnot json\n",
        b"1\n[1\n",
        b"1\n{\"cmd\":\"NODE_HANDLE_ACK\"}\n",
        b"1\n\xff\n",
    ];
    let hello = frame(&PortFrame::Hello { features: 0 });
    let one = frame(&PortFrame::Message(&[2]));
    let native = [
        [&hello[..], &one, &one[..3], &[9; 40]].concat(),
        [&hello[..], &one, &hello].concat(),
        [&hello[..], &one, &[0xff; 6]].concat(),
        [&hello[..], &one, &[1, 0, 0, 0, 0, 0, 77]].concat(),
        [&hello[..], &one, &[1, 0, 0, 0, 1, 0, 1]].concat(),
    ];
    let node = node.into_iter().map(|bytes| (Encoding::Json, bytes.to_vec()));
    let native = native.into_iter().map(|bytes| (Encoding::Native, bytes));
    for (encoding, bytes) in node.chain(native) {
        let (mut channel, mut peer) = with_peer(encoding);
        peer.write_all(&bytes).unwrap();
        assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), 1);
        channel.recv().await.unwrap_err();
        assert!(channel.recv().await.unwrap().is_none(), "a fault is told once");
        assert!(!channel.is_connected());
        assert_eq!(channel.send(&1).await, Err(SendError::Disconnected));
        tokio::time::timeout(LONG, channel.closed()).await.unwrap();
        let mut rest = Vec::new();
        // What we said before may be there; then the end, or the news that we did not read all.
        let _end = peer.read_to_end(&mut rest);
    }
}

#[tokio::test]
async fn first_frame_must_be_a_greeting_of_the_same_version() {
    for bytes in [frame(&PortFrame::Message(&[1])), vec![5, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0]] {
        let (mut channel, mut peer) = with_peer(Encoding::Native);
        peer.write_all(&bytes).unwrap();
        channel.recv().await.unwrap_err();
    }
}

#[tokio::test]
async fn cut_off_last_message_is_dropped_without_an_error() {
    for (encoding, bytes) in [
        (Encoding::Json, b"1\n{\"a\":".to_vec()),
        (Encoding::Native, {
            let one = frame(&PortFrame::Message(&[2]));
            [&frame(&PortFrame::Hello { features: 0 })[..], &one, &one[..7]].concat()
        }),
    ] {
        let (mut channel, mut peer) = with_peer(encoding);
        peer.write_all(&bytes).unwrap();
        drop(peer);
        assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), 1);
        assert!(channel.recv().await.unwrap().is_none());
    }
}

#[tokio::test]
async fn longer_message_than_allowed_is_refused_by_both_ends() {
    for encoding in ALL {
        let limits = Limits { max_message: 1000, ..Limits::default() };
        let (one, other) = polyfork_sys::channel::pair().unwrap();
        let here = Channel::new(one, encoding).unwrap();
        let mut there = Channel::with_limits(other, encoding, limits).unwrap();
        let long = "x".repeat(2000);
        assert_eq!(there.send(&long).await, Err(SendError::TooLong { limit: 1000 }));
        there.send(&"short").await.unwrap();
        here.send(&long).await.unwrap();
        let error = there.recv().await.unwrap_err();
        assert_eq!(*error.fault(), ProtocolError::TooLong { limit: 1000 });
    }
}

#[tokio::test]
async fn value_that_cannot_be_written_leaves_the_channel_whole() {
    struct Bad(bool);
    impl Serialize for Bad {
        fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            use serde::ser::{Error, SerializeTuple};
            let mut tuple = to.serialize_tuple(2)?;
            tuple.serialize_element("half")?;
            assert!(!self.0, "as wished");
            Err(S::Error::custom("no"))
        }
    }
    for encoding in ALL {
        let (here, mut there) = pair(encoding);
        here.send(&1).await.unwrap();
        assert!(matches!(here.send(&Bad(false)).await, Err(SendError::Encode(_))));
        let sender = here.sender();
        tokio::spawn(async move { sender.send(&Bad(true)).await }).await.unwrap_err();
        here.send(&2).await.unwrap();
        assert_eq!(next(&mut there).await.to::<i32>().unwrap(), 1);
        assert_eq!(next(&mut there).await.to::<i32>().unwrap(), 2);
    }
}

#[tokio::test]
async fn peer_that_reads_no_acknowledgements_makes_us_stop_reading() {
    let (mut channel, peer) = with_peer(Encoding::Json);
    peer.set_nonblocking(true).unwrap();
    let (_one, other) = UnixStream::pair().unwrap();
    let line = b"{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Socket\",\"msg\":1}\n";
    let sending = async {
        let mut refused = 0;
        while refused < 20 {
            match polyfork_sys::channel::send(peer.as_fd(), line, &[other.as_fd()]) {
                Ok(_) => refused = 0,
                Err(_) => refused += 1,
            }
            tokio::time::sleep(Duration::from_micros(10)).await;
        }
    };
    tokio::select! {
        () = sending => {}
        () = async { while channel.recv().await.unwrap().is_some() {} } => panic!("it ended"),
    }
}

#[tokio::test]
async fn dropped_send_has_sent_nothing() {
    for encoding in ALL {
        let (channel, mut peer) = with_peer(encoding);
        let soon = Duration::from_millis(20);
        while tokio::time::timeout(soon, channel.send(&"x".repeat(1000))).await.is_ok() {}
        assert!(tokio::time::timeout(soon, channel.send(&"never")).await.is_err());
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            all
        });
        channel.disconnect().await.unwrap();
        assert!(!reading.join().unwrap().windows(5).any(|window| window == b"never"));
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever the other end writes, nothing panics and the channel ends.
    #[test]
    fn any_bytes_end_in_messages_or_an_error(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
        encoding in 0..3_usize,
        greeted in proptest::prelude::any::<bool>(),
    ) {
        let encoding = ALL[encoding];
        let native = encoding == Encoding::Native;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut channel, mut peer) = with_peer(encoding);
            if greeted && native {
                peer.write_all(&frame(&PortFrame::Hello { features: 0 })).unwrap();
            }
            peer.write_all(&bytes).unwrap();
            drop(peer);
            while let Ok(Some(message)) = channel.recv().await {
                let _any = message.to::<Value>();
            }
            assert!(matches!(channel.recv().await, Ok(None)));
        });
    }
}
