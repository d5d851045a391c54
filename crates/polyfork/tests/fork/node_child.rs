//! A Node child, forked from here.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use polyfork::channel::advanced::Value as Cloned;
use polyfork::channel::{Encoding, Handle, RequestError};
use polyfork::child_process::{ForkNode, Signal};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::support::{Node, PATIENCE, next, next_json, on_node};

on_node!(
    child_gets_its_arguments_and_no_channel_variables,
    random_values_come_back_unchanged,
    eight_mebibytes_arrive_whole,
    many_messages_arrive_in_order,
    child_that_ends_by_itself_is_heard_first,
    disconnect_by_either_side_ends_both,
    requests_are_answered_in_time_or_not_at_all,
    child_asks_and_is_answered,
    listening_server_is_used_in_the_child,
    connection_is_used_in_the_child,
    udp_socket_is_used_in_the_child,
    server_of_the_child_is_used_here,
    connection_of_the_child_is_used_and_counted_here,
    udp_socket_of_the_child_is_used_here,
    many_handles_and_messages_keep_their_order,
    child_killed_at_any_time_ends_the_channel,
    hostile_bytes_end_only_their_channel,
    only_reserved_names_are_internal,
    try_send_says_full_to_a_child_that_does_not_read,
);

async fn child_gets_its_arguments_and_no_channel_variables(node: Node) {
    let mut forked = node
        .script("actor.cjs")
        .args(["a b", "$HOME"])
        .exec_args(["--no-warnings"])
        .fork()
        .unwrap();
    forked.channel.send(&json!({"act": "argv"})).await.unwrap();
    let told = next_json(&mut forked.channel).await;
    assert_eq!(told, json!({"argv": ["a b", "$HOME"], "execArgv": ["--no-warnings"]}));
    forked.channel.send(&json!({"act": "env"})).await.unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!([]));
}

/// A random value that JSON can say, and that JavaScript reads as the same.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<f64>()
            .prop_filter("JSON says it", |n| n.is_finite() && n.fract() != 0.0)
            .prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a-z\u{e0}-\u{ff}\u{4e00}\u{1f600}]{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 60, 8, |inner| {
        let name = "[a-zA-Z \u{e4}\u{1f600}\"]{1,8}";
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::hash_map(name, inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

async fn random_values_come_back_unchanged(node: Node) {
    let mut forked = node.fork("echo.cjs");
    let mut runner = TestRunner::default();
    for _ in 0..500 {
        let value = value().new_tree(&mut runner).unwrap().current();
        forked.channel.send(&value).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, value);
    }
    forked.channel.disconnect().await.unwrap();
    assert!(forked.child.wait().await.unwrap().success());
}

async fn eight_mebibytes_arrive_whole(node: Node) {
    let forked = node.fork("echo.cjs");
    let (sender, mut receiver) = forked.channel.split();
    let long = "x".repeat(8 << 20);
    let sending = async {
        for number in 0..4 {
            sender.send(&format!("{long}{number}")).await.unwrap();
        }
    };
    let receiving = async {
        for number in 0..4 {
            let text: String = receiver.recv().await.unwrap().unwrap().to().unwrap();
            assert!(text.len() == long.len() + 1 && text.ends_with(&number.to_string()));
        }
    };
    tokio::join!(sending, receiving);
}

async fn many_messages_arrive_in_order(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "flood", "count": 20_000})).await.unwrap();
    for number in 0..20_000 {
        assert_eq!(next_json(&mut forked.channel).await, json!({"n": number}));
    }
}

async fn child_that_ends_by_itself_is_heard_first(node: Node) {
    let mut forked = node.script("leaver.cjs").arg("x").fork().unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!("ready"));
    assert_eq!(next_json(&mut forked.channel).await, json!(["x"]));
    assert!(forked.channel.recv().await.unwrap().is_none());
    assert!(forked.child.wait().await.unwrap().success());
    assert!(!forked.channel.is_connected());
}

async fn disconnect_by_either_side_ends_both(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "leave"})).await.unwrap();
    assert!(forked.channel.recv().await.unwrap().is_none());
    tokio::time::timeout(PATIENCE, forked.channel.closed()).await.unwrap();
    assert!(!forked.channel.is_connected());
    assert!(forked.channel.disconnect().await.is_err());
    assert!(forked.child.wait().await.unwrap().success());

    let mut forked = node.fork("actor.cjs");
    for number in 0..1000 {
        forked.channel.send(&json!({"act": "echo", "value": number})).await.unwrap();
    }
    forked.channel.disconnect().await.unwrap();
    assert!(forked.channel.disconnect().await.is_err());
    assert!(forked.child.wait().await.unwrap().success());
}

async fn requests_are_answered_in_time_or_not_at_all(node: Node) {
    let forked = node.fork("actor.cjs");
    let body = json!({"a": [1, {"b": "c"}]});
    let reply = forked.channel.request(&body, PATIENCE).await.unwrap();
    assert_eq!(reply.to::<Value>().unwrap(), body);
    forked.child.kill(Signal::STOP).unwrap();
    let limit = Duration::from_millis(1);
    let late = forked.channel.request(&"late", limit).await.unwrap_err();
    assert_eq!(late, RequestError::Deadline(limit));
    forked.child.kill(Signal::CONT).unwrap();
    let reply = forked.channel.request(&"next", PATIENCE).await.unwrap();
    assert_eq!(reply.to::<String>().unwrap(), "next");
    forked.child.kill(Signal::STOP).unwrap();
    let sender = forked.channel.sender();
    let asking = tokio::spawn(async move { sender.request(&1, PATIENCE).await.map(|_| ()) });
    tokio::task::yield_now().await;
    forked.child.kill(Signal::KILL).unwrap();
    assert_eq!(asking.await.unwrap(), Err(RequestError::Disconnected));
}

async fn child_asks_and_is_answered(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "ask", "id": 5, "body": [1, 2]})).await.unwrap();
    let request = next(&mut forked.channel).await;
    assert!(request.wants_reply());
    assert_eq!(request.to::<Vec<u8>>().unwrap(), [1, 2]);
    request.reply(&3).await.unwrap();
    let told = next_json(&mut forked.channel).await;
    assert_eq!(told, json!({"answered": {"polyfork": "reply", "id": 5, "body": 3}}));
}

/// What a connection says until it ends.
async fn read_all(stream: TcpStream) -> String {
    stream.set_nonblocking(false).unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        (&stream).read_to_string(&mut text).map(|_| text)
    });
    reading.await.unwrap().unwrap()
}

async fn listening_server_is_used_in_the_child(node: Node) {
    let mut forked = node.fork("actor.cjs");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    forked.channel.send_with(&json!({"act": "server"}), listener).await.unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!("listening"));
    for _ in 0..3 {
        assert_eq!(read_all(TcpStream::connect(address).unwrap()).await, "from the child");
    }
}

async fn connection_is_used_in_the_child(node: Node) {
    let forked = node.fork("actor.cjs");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for name in ["one", "two", "three"] {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let message = json!({"act": "socket", "name": name});
        forked.channel.send_with(&message, connection).await.unwrap();
        assert_eq!(read_all(client).await, format!("hello {name}"));
    }
}

async fn udp_socket_is_used_in_the_child(node: Node) {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let mut forked = node.fork("actor.cjs");
        let socket = UdpSocket::bind(address).unwrap();
        let client = tokio::net::UdpSocket::bind(address).await.unwrap();
        client.connect(socket.local_addr().unwrap()).await.unwrap();
        forked.channel.send_with(&json!({"act": "udp"}), socket).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, json!("bound"));
        client.send(b"hi").await.unwrap();
        let mut buffer = [0; 100];
        let length = client.recv(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"got hi");
    }
}

async fn server_of_the_child_is_used_here(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "give-server"})).await.unwrap();
    let mut message = next(&mut forked.channel).await;
    let Some(Handle::TcpListener(listener)) = message.take_handle() else { panic!("a listener") };
    let port = message.to::<Value>().unwrap()["port"].as_u64();
    assert_eq!(port, Some(listener.local_addr().unwrap().port().into()));
    // Both accept on it. The child is gone before anybody connects.
    forked.child.kill(Signal::KILL).unwrap();
    forked.child.wait().await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    assert_eq!(stream.peer_addr().unwrap(), client.local_addr().unwrap());
}

async fn connection_of_the_child_is_used_and_counted_here(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "give-socket"})).await.unwrap();
    let told = next_json(&mut forked.channel).await;
    let port = u16::try_from(told["port"].as_u64().unwrap()).unwrap();
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut message = next(&mut forked.channel).await;
    assert_eq!(message.to::<String>().unwrap(), "connection");
    let Some(Handle::TcpStream(mut stream)) = message.take_handle() else { panic!("a stream") };
    let counted = message.take_counted().expect("its server counts it");
    assert_eq!(counted.key(), "4:127.0.0.1:0");
    stream.write_all(b"from here").unwrap();
    assert_eq!(next_json(&mut forked.channel).await, json!({"connections": 1}));
    drop(stream);
    assert_eq!(read_all(client).await, "from here");
    drop(counted);
    assert_eq!(next_json(&mut forked.channel).await, json!("server closed"));
}

async fn udp_socket_of_the_child_is_used_here(node: Node) {
    let mut forked = node.fork("actor.cjs");
    forked.channel.send(&json!({"act": "give-udp"})).await.unwrap();
    let mut message = next(&mut forked.channel).await;
    let Some(Handle::UdpSocket(socket)) = message.take_handle() else { panic!("a UDP socket") };
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
    socket.send_to(b"hi", client.local_addr().unwrap()).await.unwrap();
    let (_, from) =
        tokio::task::spawn_blocking(move || client.recv_from(&mut [0; 9])).await.unwrap().unwrap();
    assert_eq!(from, socket.local_addr().unwrap());
}

async fn many_handles_and_messages_keep_their_order(node: Node) {
    let forked = node.fork("actor.cjs");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut clients = Vec::new();
    for number in 0..100 {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let padding = "x".repeat(if number % 10 == 0 { 50_000 } else { number });
        forked.channel.send(&json!({"act": "echo", "value": 1, "padding": padding})).await.unwrap();
        let message = json!({"act": "socket", "name": number, "padding": padding});
        forked.channel.send_with(&message, connection).await.unwrap();
        clients.push(client);
    }
    for (number, client) in clients.into_iter().enumerate() {
        assert_eq!(read_all(client).await, format!("hello {number}"));
    }
}

async fn child_killed_at_any_time_ends_the_channel(node: Node) {
    for delay in [0, 1, 5, 20, 40, 60] {
        let mut forked = node.fork("echo.cjs");
        let sender = forked.channel.sender();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sending = tokio::spawn(async move {
            while sender.send_with(&1, listener.try_clone().unwrap()).await.is_ok()
                && sender.send(&"x".repeat(1000)).await.is_ok()
            {}
        });
        tokio::time::sleep(Duration::from_millis(delay)).await;
        forked.child.kill(Signal::KILL).unwrap();
        while forked.channel.recv().await.unwrap().is_some() {}
        tokio::time::timeout(PATIENCE, sending).await.unwrap().unwrap();
        assert_eq!(forked.child.wait().await.unwrap().signal, Some(Signal::KILL));
        tokio::time::timeout(PATIENCE, forked.channel.closed()).await.unwrap();
    }
}

async fn hostile_bytes_end_only_their_channel(node: Node) {
    let json: [&[u8]; 4] = [b"\n", b"{\"a\":\n", b"{\"cmd\":\"NODE_HANDLE_ACK\"}\n", b"\xff\xfe\n"];
    let advanced: [&[u8]; 4] =
        [&[0; 4], &[0xff; 4], &[0, 0, 0, 3, 0xff, 0x0f, 0x77], &[0, 0, 0, 4, 0xff, 13, b'^', 0]];
    let hostile = if node.encoding == Encoding::Json { json } else { advanced };
    for bytes in hostile {
        let mut forked = node.fork("actor.cjs");
        forked.channel.send(&json!({"act": "raw", "fd": 3, "bytes": bytes})).await.unwrap();
        let error = tokio::time::timeout(PATIENCE, forked.channel.recv()).await.unwrap();
        assert!(error.is_err(), "{bytes:?} is taken for {error:?}");
        assert!(forked.channel.recv().await.unwrap().is_none());
        // The child gets its end of file, and ends by itself.
        assert!(forked.child.wait().await.unwrap().success());
    }
}

async fn only_reserved_names_are_internal(node: Node) {
    let mut forked = node.fork("echo.cjs");
    for cmd in ["NODE_", "xNODE_", "node_x", "NODEX"] {
        let message = json!({"cmd": cmd});
        forked.channel.send(&message).await.unwrap();
        assert_eq!(next_json(&mut forked.channel).await, message);
    }
    assert!(forked.channel.send(&json!({"cmd": "NODE_X"})).await.is_err());
}

async fn try_send_says_full_to_a_child_that_does_not_read(node: Node) {
    let mut forked = node.fork("echo.cjs");
    forked.channel.send(&1).await.unwrap();
    next(&mut forked.channel).await;
    forked.child.kill(Signal::STOP).unwrap();
    let mut sent = 0;
    let back = loop {
        match forked.channel.try_send("x".repeat(1000)) {
            Ok(()) => sent += 1,
            Err(error) => break error.into_inner(),
        }
        assert!(sent < 10_000, "the queue has no end");
    };
    assert_eq!(back.len(), 1000);
    forked.child.kill(Signal::CONT).unwrap();
    for _ in 0..sent {
        next(&mut forked.channel).await;
    }
}

#[test]
fn what_json_cannot_say_arrives_in_the_advanced_encoding() {
    for name in ["node20", "node26"] {
        crate::support::play(module_path!(), name, Encoding::Advanced, async |node: Node| {
            let mut forked = node.fork("echo.cjs");
            let cycle = Cloned::object([("self", Cloned::Reference(0))]);
            let values = [Cloned::buffer(vec![0, 1, 255]), Cloned::Undefined, cycle];
            for value in values {
                let value = Cloned::object([("value", value)]);
                forked.channel.send(&value).await.unwrap();
                assert_eq!(next(&mut forked.channel).await.value(), Some(&value));
            }
        });
    }
}

#[test]
fn a_script_cannot_be_forked_in_our_own_encoding() {
    crate::support::block_on(async {
        let error = ForkNode::new("x.js").encoding(Encoding::Native).fork().unwrap_err();
        assert!(error.to_string().contains("json and advanced"), "{error}");
    });
}
