//! The codecs at one end of a channel, an unmodified Node at the other.
//!
//! Takes `node` from the path, or all that `POLYFORK_NODE` names, separated by colons; without any the tests
//! say so and pass. The child gets its channel as standard input, which Node allows, so that
//! nothing unsafe is needed here.
//!
//! With `POLYFORK_WIRE_RECORD=<directory>` what workers say is also written there, a file per version.
//! `recorded.rs` reads such files from `fixtures/`.
#![expect(clippy::disallowed_methods, reason = "the crate under test has no spawn of its own")]
#![expect(clippy::print_stdout, reason = "a test that skips says why")]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use polyfork_wire::env::{NODE_CHANNEL_FD, NODE_OPTIONS, NODE_UNIQUE_ID, append_node_options};
use polyfork_wire::node::cluster::{
    self, AddressType, ClusterMessage, Flavour, FromWorker, Query, Sockname,
};
use polyfork_wire::node::line::{Line, LineDecoder};
use polyfork_wire::node::message::{HandleKind, Incoming, parse_line};
use polyfork_wire::node::outbox::Outbox;
use polyfork_wire::{Limits, ProtocolError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// A peer that says nothing for so long is taken to be stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// The executables to test with.
fn nodes() -> Vec<PathBuf> {
    let named = std::env::var_os("POLYFORK_NODE");
    let found: Vec<PathBuf> = match &named {
        Some(list) => std::env::split_paths(list).collect(),
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let files = std::env::split_paths(&path).map(|directory| directory.join("node"));
            files.filter(|file| file.is_file()).take(1).collect()
        }
    };
    if found.is_empty() {
        println!("skipped: there is no node in PATH and POLYFORK_NODE names none");
    }
    found
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/node").join(name)
}

fn version(node: &Path) -> String {
    let output = Command::new(node).arg("--version").output().expect("the executable starts");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A child and our end of its channel.
struct Peer {
    process: Child,
    socket: UnixStream,
    lines: LineDecoder,
    flavour: Flavour,
    heard: Vec<u8>,
}

impl Peer {
    fn start(node: &Path, name: &str, worker: bool) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut command = Command::new(node);
        command.arg(script(name)).stdin(OwnedFd::from(theirs)).env(NODE_CHANNEL_FD, "0");
        command.env_remove(NODE_OPTIONS).env_remove(NODE_UNIQUE_ID);
        if worker {
            command.env(NODE_UNIQUE_ID, "1");
        }
        let process = command.spawn().expect("the executable starts");
        ours.set_nonblocking(true).expect("a socket can be non-blocking");
        let lines = LineDecoder::new(Limits::default());
        Self { process, socket: ours, lines, flavour: Flavour::Node, heard: Vec::new() }
    }

    /// Waits until the socket is ready for one of the flags.
    fn wait(&self, flags: PollFlags) -> PollFlags {
        let mut fds = [PollFd::new(&self.socket, flags)];
        let limit = PATIENCE.try_into().expect("it is short");
        let ready = poll(&mut fds, Some(&limit)).expect("poll works");
        assert!(ready > 0, "nothing happened for {PATIENCE:?}");
        fds[0].revents()
    }

    /// The next message, or `None` at the end of the channel.
    fn receive(&mut self) -> Option<Incoming> {
        loop {
            if let Some(incoming) = self.parse_next() {
                return Some(incoming);
            }
            self.wait(PollFlags::IN);
            if !self.read() {
                assert_eq!(self.lines.end(), None);
                return None;
            }
        }
    }

    fn parse_next(&mut self) -> Option<Incoming> {
        let line: Line = self.lines.next().expect("Node sends valid lines")?;
        if line.prefixed {
            self.flavour = Flavour::Bun;
        }
        Some(parse_line(&line, &Limits::default()).expect("Node sends valid messages"))
    }

    /// Takes what there is. False at the end of the stream.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 65_536];
        match (&self.socket).read(&mut bytes) {
            Ok(0) => false,
            Ok(n) => {
                self.lines.feed(&bytes[..n]);
                self.heard.extend_from_slice(&bytes[..n]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("reading the channel: {error}"),
        }
    }

    /// Writes as much of the outbox as the kernel takes now.
    fn flush(&mut self, outbox: &mut Outbox<impl AsFd>) {
        while let Some(chunk) = outbox.peek() {
            let fds: Vec<_> = chunk.handle.iter().map(|handle| handle.as_fd()).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [IoSlice::new(chunk.bytes)];
            match sendmsg(&self.socket, &bytes, &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => outbox.wrote(n),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(error) => panic!("writing to the channel: {error}"),
            }
        }
    }

    /// Sends lines without handles.
    fn send(&mut self, line: Vec<u8>) {
        let mut outbox = Outbox::<OwnedFd>::new(1);
        outbox.push(self.flavour.apply(line));
        while !outbox.is_empty() {
            self.wait(PollFlags::OUT);
            self.flush(&mut outbox);
        }
    }

    /// The next message of the cluster module.
    fn cluster(&mut self) -> ClusterMessage {
        match self.receive() {
            Some(Incoming::Cluster(message)) => message,
            other => panic!("expected a cluster message, not {other:?}"),
        }
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

/// Two ends of a connection; the first is for the peer.
fn connection(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().expect("it is bound");
    let client = TcpStream::connect(address).expect("it listens");
    let (server, _) = listener.accept().expect("somebody connected");
    server.set_nonblocking(true).expect("a socket can be non-blocking");
    (server, client)
}

fn any_port() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port")
}

#[test]
fn every_question_of_a_worker_is_read() {
    for node in nodes() {
        let mut worker = Peer::start(&node, "questions.cjs", true);
        let online = worker.cluster();
        assert_eq!((online.seq, online.body), (Some(0), FromWorker::Online));
        let mut questions = Vec::new();
        let leaving = loop {
            match worker.receive() {
                Some(Incoming::Cluster(message)) => match message.body {
                    FromWorker::QueryServer(query) => {
                        let seq = message.seq.expect("a question has a number");
                        worker.send(cluster::reply_error(seq, 0, "", -22, query.data.as_ref()));
                        questions.push(query);
                    }
                    FromWorker::ExitedAfterDisconnect => break message.seq,
                    other => panic!("{other:?}"),
                },
                Some(Incoming::User(message)) => said(&message),
                other => panic!("{other:?}"),
            }
        };
        record(&node, &worker.heard);
        check_questions(&questions);
        worker.send(cluster::reply_ack(leaving.expect("it has a number"), 1));
        assert!(worker.receive().is_none());
        assert_eq!(worker.exit_code(), Some(0), "{}", version(&node));
    }
}

fn said(message: &polyfork_wire::node::message::UserMessage) {
    let texts = [
        r#""grüße 😀\u0000\n""#,
        r#"{"a":[1.5,null,true],"cmd":"NODE_"}"#,
        "null",
        // JSON.stringify writes a lone surrogate as an escape.
        r#""\ud800""#,
    ];
    assert!(texts.contains(&message.as_str()), "{message:?}");
}

/// The questions of `questions.cjs`, as every version asks them.
fn check_questions(questions: &[Query]) {
    let host = |query: &Query| (query.address.clone(), query.port, query.address_type);
    let text = |text: &str| Some(text.to_owned());
    let path = || text("/tmp/polyfork-wire-questions.sock");
    let expected = [
        (None, Some(18000), AddressType::V4),
        (text("127.0.0.1"), Some(0), AddressType::V4),
        (text("127.0.0.1"), Some(18001), AddressType::V4),
        (text("::"), Some(18002), AddressType::V6),
        (path(), Some(-1), AddressType::Path),
        (path(), Some(-1), AddressType::Path),
        (None, None, AddressType::None),
        (text("0.0.0.0"), Some(18003), AddressType::Udp4),
        (text("::1"), Some(18004), AddressType::Udp6),
        (None, Some(18443), AddressType::V4),
    ];
    assert_eq!(questions.iter().map(host).collect::<Vec<_>>(), expected);
    assert_eq!(questions[2].backlog, Some(17));
    assert_eq!(questions[3].flags, Some(1));
    let shared = &questions[5];
    assert_eq!((shared.readable_all, shared.writable_all, shared.backlog), (true, true, Some(9)));
    assert_eq!(questions[6].fd, Some(77));
    assert_eq!(questions[7].fd, None);
    let tickets = questions[9].data.as_ref().expect("TLS has data").as_str();
    assert!(tickets.starts_with(r#"{"ticketKeys":""#), "{tickets}");
    assert!(questions[..9].iter().all(|query| query.data.is_none()));
    // Only the second question for the path repeats one.
    let indices: Vec<u64> = questions.iter().map(|query| query.index).collect();
    assert_eq!(indices, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
}

/// Writes what was heard to the directory that was asked for.
fn record(node: &Path, heard: &[u8]) {
    if let Some(directory) = std::env::var_os("POLYFORK_WIRE_RECORD") {
        let file = Path::new(&directory).join(format!("node-{}.worker", version(node)));
        std::fs::write(file, heard).expect("the directory can be written to");
    }
}

#[test]
fn worker_serves_connections_by_round_robin_and_leaves() {
    for node in nodes() {
        let mut worker = Peer::start(&node, "serve.cjs", true);
        assert_eq!(worker.cluster().body, FromWorker::Online);
        let question = worker.cluster();
        assert!(matches!(question.body, FromWorker::QueryServer(_)));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 18100));
        let name = Sockname::from(address);
        let seq = question.seq.expect("a question has a number");
        worker.send(cluster::reply_round_robin(seq, 0, "a key", None, Some(&name)));
        assert!(matches!(worker.cluster().body, FromWorker::Listening(_)));
        serve_connections(&mut worker, 50);
        worker.send(cluster::disconnect(1000));
        assert_eq!(worker.cluster().body, FromWorker::Close { key: "a key".into() });
        assert!(worker.receive().is_none());
        assert_eq!(worker.exit_code(), Some(0), "{}", version(&node));
    }
}

/// Hands over so many connections without waiting and sees each client answered.
fn serve_connections(worker: &mut Peer, count: u64) {
    let listener = any_port();
    let mut outbox = Outbox::new(16);
    let mut clients = Vec::new();
    for seq in 1..=count {
        let (server, client) = connection(&listener);
        outbox.push_handle(cluster::new_connection("a key", seq), server);
        clients.push(client);
    }
    let mut accepted = Vec::new();
    while accepted.len() < clients.len() {
        worker.flush(&mut outbox);
        match worker.receive() {
            Some(Incoming::HandleAck) => drop(outbox.acknowledged(false).expect("it was sent")),
            Some(Incoming::Cluster(ClusterMessage {
                body: FromWorker::Reply { ack, accepted: Some(true) },
                ..
            })) => accepted.push(ack),
            other => panic!("{other:?}"),
        }
    }
    assert!(accepted.into_iter().eq(1..=count), "answers come in order");
    assert!(outbox.is_empty());
    for mut client in clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("the worker answers");
        let port = client.local_addr().expect("it is connected").port();
        assert_eq!(answer, format!("you are {port}"));
    }
}

/// Lengths of handle messages, and of plain ones before them, that a careless sender would mis-pair.
fn awkward_lengths(n: usize) -> (usize, usize) {
    let handles = [120, 120, 32_700, 120, 40_000, 120, 70_000, 150_000, 120, 30_000];
    let plain = [0, 60_000, 0, 65_400, 0, 0, 65_500, 0, 65_536, 130_000, 0];
    (handles[n % handles.len()], plain[n % plain.len()])
}

#[test]
fn pipelined_sockets_reach_the_message_they_were_sent_with() {
    for node in nodes() {
        let mut child = Peer::start(&node, "sockets.cjs", false);
        assert!(
            matches!(child.receive(), Some(Incoming::User(ready)) if ready.as_str() == "\"ready\"")
        );
        let listener = any_port();
        let mut outbox = Outbox::new(8);
        let mut ports = Vec::new();
        for n in 0..150 {
            let (length, plain) = awkward_lengths(n);
            if plain > 0 {
                outbox.push(cluster::user_message(&format!(
                    r#"{{"plain":"{}"}}"#,
                    "-".repeat(plain)
                )));
            }
            let (server, client) = connection(&listener);
            let message = format!(r#"{{"n":{n},"pad":"{}"}}"#, "-".repeat(length));
            outbox.push_handle(
                cluster::handle_message(HandleKind::NetSocket, &message, None),
                server,
            );
            ports.push(client.local_addr().expect("it is connected").port());
        }
        outbox.push(cluster::user_message(r#"{"last":true}"#));
        assert_eq!(exchange(&mut child, &mut outbox), ports, "{}", version(&node));
        assert_eq!(child.exit_code(), Some(0), "{}", version(&node));
    }
}

#[derive(serde::Deserialize)]
struct Found {
    n: usize,
    port: u16,
}

/// Sends everything and returns the ports that the child found, in the order of the messages.
fn exchange(child: &mut Peer, outbox: &mut Outbox<TcpStream>) -> Vec<u16> {
    let mut ports = Vec::new();
    loop {
        let writing = if outbox.peek().is_some() { PollFlags::OUT } else { PollFlags::empty() };
        let ready = child.wait(PollFlags::IN | writing);
        if ready.contains(PollFlags::OUT) {
            child.flush(outbox);
        }
        if ready.intersects(PollFlags::IN | PollFlags::HUP) && !child.read() {
            assert!(outbox.is_empty(), "everything was acknowledged");
            return ports;
        }
        while let Some(incoming) = child.parse_next() {
            match incoming {
                Incoming::HandleAck => drop(outbox.acknowledged(false).expect("it was sent")),
                Incoming::User(message) => {
                    let found: Found = message.parse().expect("the child found a socket");
                    assert_eq!(found.n, ports.len());
                    ports.push(found.port);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn messages_of_a_parent_are_read_as_they_were_meant() {
    for node in nodes() {
        let mut command = Command::new(&node);
        let output = command
            .arg(script("parent.cjs"))
            .env_remove(NODE_OPTIONS)
            .stdin(Stdio::null())
            .output()
            .expect("the executable starts");
        let meant = String::from_utf8(output.stderr).expect("JSON.stringify writes valid text");
        let mut meant = meant.lines();
        let mut lines = LineDecoder::new(Limits::default());
        lines.feed(&output.stdout);
        let mut envelopes = 0;
        while let Some(line) = lines.next().expect("Node sends valid lines") {
            match parse_line(&line, &Limits::default()).expect("Node sends valid messages") {
                Incoming::User(message) => assert_eq!(Some(message.as_str()), meant.next()),
                Incoming::Handle(envelope) => {
                    assert_eq!(envelope.kind, HandleKind::NetServer);
                    let Incoming::User(inner) = *envelope.message else { panic!("{envelope:?}") };
                    assert_eq!(inner.as_str(), r#"{"with":"a server"}"#);
                    envelopes += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((meant.next(), envelopes), (None, 1), "{}", version(&node));
    }
}

/// Texts around the edge of what is JSON, from a fixed beginning.
fn doubtful_texts() -> Vec<Vec<u8>> {
    let seeds: [&[u8]; 8] = [
        br#"{"a":[1,-2.5e-7,null,true,false,"x\u00e9\\\"\n"],"":{}}"#,
        b"\"\xe2\x82\xac\xf0\x9f\x98\x80\xc3\xa4\"",
        b" [ 1 , 2 ] ",
        b"-0.0e+00",
        b"\xef\xbb\xbf1",
        b"\"\xed\xa0\x80\"",
        b"\"\xf0\x9f\x98\"",
        br#"{"__proto__":1,"a":1,"a":2}"#,
    ];
    let bytes = b"{}[]\",:\\u0e+-. \t\r\x0b\x00\xff\xc2\x80tn1";
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).expect("31 bits") % below
    };
    let mut texts: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.to_vec()).collect();
    for n in 0..20_000 {
        let mut text = texts[n % seeds.len()].clone();
        for _ in 0..=random(3) {
            let at = random(text.len());
            match random(3) {
                0 => text[at] = bytes[random(bytes.len())],
                1 => text.insert(at, bytes[random(bytes.len())]),
                _ if text.len() > 1 => drop(text.remove(at)),
                _ => {}
            }
        }
        texts.push(text);
    }
    texts
}

#[test]
fn verdict_on_doubtful_texts_is_that_of_json_parse() {
    for node in nodes() {
        let texts = doubtful_texts();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let directory = tempfile::tempdir().expect("a directory for temporary files");
        let input = directory.path().join("texts");
        let lines: String = texts.iter().map(|text| hex(text) + "\n").collect();
        std::fs::write(&input, lines).expect("the directory can be written to");
        let output = Command::new(&node)
            .arg(script("judge.cjs"))
            .env_remove(NODE_OPTIONS)
            .stdin(std::fs::File::open(&input).expect("it was just written"))
            .output()
            .expect("the executable starts");
        let answers = String::from_utf8(output.stdout).expect("the script writes ASCII");
        assert_eq!(answers.lines().count(), texts.len());
        for (text, answer) in texts.iter().zip(answers.lines()) {
            let (verdict, decoded) = answer.split_once(' ').expect("two words");
            let ours = parse_line(text, &Limits::default());
            let shown = text.escape_ascii();
            match ours {
                Ok(Incoming::User(message)) => {
                    assert_eq!(verdict, "ok", "{shown}");
                    // Blanks around the value are not kept, and a carriage return becomes a blank.
                    let blank = text.iter().any(|byte| b" \t\r\n".contains(byte));
                    assert!(blank || hex(message.as_str().as_bytes()) == decoded, "{shown}");
                }
                Err(ProtocolError::NotJson { .. } | ProtocolError::EmptyLine) => {
                    assert_eq!(verdict, "bad", "{shown}");
                }
                other => panic!("{shown}: {other:?}"),
            }
        }
    }
}

#[test]
fn appended_option_is_read_by_node_however_odd_the_path() {
    for node in nodes() {
        let directory = tempfile::tempdir().expect("a directory for temporary files");
        let odd = directory.path().join("my \"app\" \\ 'x' $HOME é.cjs");
        std::fs::copy(script("option.cjs"), &odd).expect("the directory can be written to");
        let odd = odd.to_str().expect("it is text");
        for existing in [None, Some("--no-warnings"), Some(" --title=\"a \\\"b\\\"\" ")] {
            let options = append_node_options(existing, &format!("--require={odd}"));
            let output = Command::new(&node)
                .args(["-e", ""])
                .env(NODE_OPTIONS, &options)
                .output()
                .expect("the executable starts");
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(said, format!("loaded {odd}"), "{options}: {output:?}");
        }
    }
}
