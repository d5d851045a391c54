//! What a Node child shares with us: the number of its channel, ports, sockets of other kinds, and for how long.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use polyfork::channel::{Encoding, Handle};
use polyfork::child_process::{Command, Signal, Stdio, fork_program};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use crate::support::{Node, PATIENCE, app, next, next_json, on_node};

on_node!(
    the_channel_is_wherever_it_is_asked_for,
    a_child_that_does_not_listen_learns_of_the_disconnect,
    a_detached_child_outlives_its_parent,
    what_javascript_finds_odd_arrives_as_node_means_it,
);

on_node!(only node26:
    processes_share_a_tcp_port_by_reuse,
    processes_share_a_udp_port_by_reuse,
    a_bound_socket_is_listened_on_in_the_child,
    a_bound_socket_of_the_child_is_listened_on_here,
);

async fn line_with(stream: &mut (impl AsyncRead + Unpin), part: &str) -> String {
    let mut lines = BufReader::new(stream).lines();
    let reading = async {
        loop {
            let line = lines.next_line().await.unwrap().expect("the line comes before the end");
            if line.contains(part) {
                return line;
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the line comes")
}

/// Node: `stdio: ['ipc', ...]`.
async fn the_channel_is_wherever_it_is_asked_for(node: Node) {
    for slot in [0, 1, 4, 9] {
        let mut script = node.script("actor.cjs");
        script.command().stdio(slot, Stdio::Channel);
        let mut forked = script.fork().unwrap();
        forked.channel.send(&json!({"act": "echo", "value": slot})).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, json!({"echo": slot}));
        // With everything that a channel does: handles, too.
        forked.channel.send(&json!({"act": "give-udp"})).await.unwrap();
        assert!(next(&mut forked.channel).await.take_handle().is_some());
        forked.child.kill(Signal::KILL).unwrap();
    }
    // Only a forked program has one, and it has only one.
    let mut command = Command::new("true");
    let error = command.stdio(5, Stdio::Channel).spawn().unwrap_err().to_string();
    assert!(error.contains("only a forked program has a channel"), "{error}");
    let mut script = node.script("actor.cjs");
    script.command().stdio(4, Stdio::Channel).stdio(5, Stdio::Channel);
    assert!(script.fork().unwrap_err().to_string().contains("only one"));
    // Something else in its place: the channel is where it always is.
    script.command().stdio(4, Stdio::Ignore).stdio(5, Stdio::Ignore);
    let mut forked = script.fork().unwrap();
    forked.channel.send(&json!({"act": "raw", "fd": 3, "bytes": []})).await.unwrap();
    forked.channel.send(&json!({"act": "echo", "value": 1})).await.unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!({"echo": 1}));
}

/// It lives for its own work alone: here, its standard input.
async fn a_child_that_does_not_listen_learns_of_the_disconnect(node: Node) {
    let mut script = node.script("quiet.cjs");
    script.command().stdin(Stdio::Pipe).stdout(Stdio::Pipe);
    let mut forked = script.fork().unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!("up"));
    forked.channel.disconnect().await.unwrap();
    let mut stdout = forked.child.stdout.take().unwrap();
    line_with(&mut stdout, "disconnected").await;
    assert!(forked.child.try_wait().is_none(), "its work is not done");
    let exit = tokio::time::timeout(PATIENCE, forked.child.wait()).await.unwrap();
    assert!(exit.unwrap().success());
}

/// Kills a process that is no child of ours, whatever becomes of the test.
struct Stranger(OwnedFd);

impl Stranger {
    fn has_ended(&self) -> bool {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&at_once)).unwrap() > 0
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = pidfd_send_signal(&self.0, rustix::process::Signal::KILL);
    }
}

async fn a_detached_child_outlives_its_parent(node: Node) {
    let mut command = Command::new("/proc/self/exe");
    command.args(["roles::forks_detached", "--exact", "--ignored", "--nocapture"]);
    command.env("POLYFORK_TEST_NODE", &node.path).env("POLYFORK_TEST_SCRIPT", app("actor.cjs"));
    command.stdin(Stdio::Ignore).stdout(Stdio::Pipe).kill_on_drop(true);
    let mut parent = fork_program(&mut command, node.encoding).unwrap();
    let told: Value = next_json(&mut parent.channel).await;
    let pid = told["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let flags = PidfdFlags::empty();
    let child = Stranger(pidfd_open(Pid::from_raw(pid.unwrap()).unwrap(), flags).unwrap());
    // Its parent ends, and it notices; only then is it looked at.
    parent.channel.disconnect().await.unwrap();
    let mut stdout = parent.child.stdout.take().unwrap();
    assert!(parent.child.wait().await.unwrap().success());
    line_with(&mut stdout, "the detached child goes on").await;
    assert!(!child.has_ended());
}

/// Values of which JavaScript makes something surprising: our side sees what another Node would, or refuses.
async fn what_javascript_finds_odd_arrives_as_node_means_it(node: Node) {
    let mut forked = node.fork("actor.cjs");
    let json = node.encoding == Encoding::Json;
    let say = async |forked: &mut polyfork::child_process::Forked, code: &str| {
        forked.channel.send(&json!({"act": "say", "code": code})).await.unwrap();
        next(&mut forked.channel).await
    };
    let proto = say(&mut forked, "JSON.parse('{\"__proto__\":{\"a\":1},\"x\":2}')").await;
    assert_eq!(proto.to::<Value>().unwrap(), json!({"__proto__": {"a": 1}, "x": 2}));
    let beyond = say(&mut forked, "[2 ** 53, -(2 ** 53) - 2, 1e21, -0]").await;
    let [exact, below, large, zero] = beyond.to::<[f64; 4]>().unwrap();
    assert_eq!((exact, below, large), (9_007_199_254_740_992.0, -9_007_199_254_740_994.0, 1e21));
    assert_eq!(zero.is_sign_negative(), !json, "JSON has no negative zero");
    // JSON says null for them, as it does in Node.
    let odd = say(&mut forked, "[NaN, Infinity, undefined]").await;
    if json {
        assert_eq!(odd.json(), Some("[null,null,null]"));
    } else {
        let odd = odd.value().unwrap();
        assert!(format!("{odd:?}") == "Array [Double(NaN), Double(inf), Undefined]", "{odd:?}");
    }
    // Half of a surrogate pair is no text: a value refuses it, the message itself keeps it.
    let lone = say(&mut forked, "'a\\ud800b'").await;
    match lone.json() {
        Some(text) => {
            assert_eq!(text, "\"a\\ud800b\"");
            assert!(lone.to::<String>().is_err());
        }
        None => assert!(lone.value().is_some()),
    }
    if json {
        // Of duplicate names the last counts, as JSON.parse has it.
        let bytes: Vec<u8> = b"{\"a\":1,\"b\":2,\"a\":3}\n".into();
        forked.channel.send(&json!({"act": "raw", "fd": 3, "bytes": bytes})).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, json!({"a": 3, "b": 2}));
        // And what we say that no double can hold is what Node makes of the digits.
        let message = json!({"act": "echo", "value": 9_007_199_254_740_993_u64});
        forked.channel.send(&message).await.unwrap();
        let echoed = next_json(&mut forked.channel).await;
        assert_eq!(echoed, json!({"echo": 9_007_199_254_740_992_u64}));
    }
}

/// A socket with SO_REUSEPORT, bound to `address`.
fn reusable(kind: Type, address: SocketAddr) -> Socket {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::IPV4, kind, Some(protocol)).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket
}

const ANY: SocketAddr =
    SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0));

async fn processes_share_a_tcp_port_by_reuse(node: Node) {
    let ours = reusable(Type::STREAM, ANY);
    ours.listen(64).unwrap();
    let address = ours.local_addr().unwrap().as_socket().unwrap();
    let mut children = Vec::new();
    for name in ["one", "two"] {
        let mut forked = node.fork("actor.cjs");
        let listen = json!({"act": "listen", "name": name, "port": address.port()});
        forked.channel.send(&listen).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, json!("listening"));
        children.push(forked);
    }
    ours.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(ours.into()).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"ours").await.unwrap();
        }
    });
    // The kernel spreads by a hash of the client's port: after a while each has had its turn.
    let mut seen = std::collections::BTreeSet::new();
    let asking = async {
        while seen.len() < 3 {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let mut text = String::new();
            tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
            seen.insert(text);
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("all three are reached");
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["one", "ours", "two"]);
}

async fn processes_share_a_udp_port_by_reuse(node: Node) {
    let ours = reusable(Type::DGRAM, ANY);
    let address = ours.local_addr().unwrap().as_socket().unwrap();
    let mut children = Vec::new();
    for name in ["one", "two"] {
        let mut forked = node.fork("actor.cjs");
        let bind = json!({"act": "bind", "name": name, "port": address.port()});
        forked.channel.send(&bind).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, json!("bound"));
        children.push(forked);
    }
    // Who has it, gives the port up for the others: all datagrams go to them.
    drop(ours);
    let mut seen = std::collections::BTreeSet::new();
    let asking = async {
        while seen.len() < 2 {
            let client = tokio::net::UdpSocket::bind(ANY).await.unwrap();
            client.send_to(b"who", address).await.unwrap();
            let mut buffer = [0; 16];
            let (length, _) = client.recv_from(&mut buffer).await.unwrap();
            seen.insert(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("both are reached");
}

async fn a_bound_socket_is_listened_on_in_the_child(node: Node) {
    let mut forked = node.fork("actor.cjs");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.bind(&ANY.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let handle = Handle::BoundTcp(socket.into());
    forked.channel.send_with(&json!({"act": "bound"}), handle).await.unwrap();
    let told = next_json(&mut forked.channel).await;
    assert_eq!(told, json!({"listening": address.port()}));
    let mut stream = TcpStream::connect(address).unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    });
    assert_eq!(reading.await.unwrap().unwrap(), "from the child");
    // What is connected is no such socket.
    let listener = std::net::TcpListener::bind(ANY).unwrap();
    let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let refused = forked.channel.send_with(&1, Handle::BoundTcp(connection.into())).await;
    assert!(refused.unwrap_err().to_string().contains("not the socket it is said to be"));
}

async fn a_bound_socket_of_the_child_is_listened_on_here(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "give-bound"})).await.unwrap();
    let mut message = next(&mut forked.channel).await;
    let port = message.to::<Value>().unwrap()["port"].as_u64();
    let Some(Handle::BoundTcp(socket)) = message.take_handle() else { panic!("a bound socket") };
    // The child has given it away.
    forked.child.kill(Signal::KILL).unwrap();
    forked.child.wait().await.unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    let listener = tokio::net::TcpListener::from_std(socket.into()).unwrap();
    let address = listener.local_addr().unwrap();
    assert_eq!(port, Some(address.port().into()));
    let client = tokio::net::TcpStream::connect(address).await.unwrap();
    let accepted = tokio::time::timeout(Duration::from_secs(60), listener.accept()).await.unwrap();
    assert_eq!(accepted.unwrap().1, client.local_addr().unwrap());
}
