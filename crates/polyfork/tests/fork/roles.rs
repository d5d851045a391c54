//! What this program does as somebody's child. Started by its full name, with `--ignored`.

use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

use polyfork::channel::{Channel, Handle};
use polyfork::child_process::{Entry, EntryResult, ForkNode, Port, Stdio, run_entries};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{block_on, next};

pub(crate) const DOUBLE: Entry<u64, u64> = Entry::new("double", |port| Box::pin(double(port)));
pub(crate) const FAIL: Entry<u64, String> = Entry::new("fail", |port| Box::pin(fail(port)));
pub(crate) const FLOOD: Entry<u64, u64> = Entry::new("flood", |port| Box::pin(flood(port)));
/// Not in this program.
pub(crate) const ABSENT: Entry<u64, u64> = Entry::new("absent", |port| Box::pin(double(port)));

async fn double(mut port: Port<u64, u64>) -> EntryResult {
    while let Some(number) = port.recv().await? {
        port.send(&(number * 2)).await?;
    }
    Ok(())
}

async fn fail(port: Port<u64, String>) -> EntryResult {
    port.send(&"last words".to_owned()).await?;
    Err("as wished".into())
}

async fn flood(mut port: Port<u64, u64>) -> EntryResult {
    let count = port.recv().await?.unwrap_or(0);
    for number in 0..count {
        port.send(&number).await?;
    }
    Ok(())
}

#[test]
#[ignore = "run by the other tests as their child"]
fn entries() {
    run_entries(&[&DOUBLE, &FAIL, &FLOOD]);
    unreachable!("this is a child");
}

#[test]
#[ignore = "run by the other tests as their child"]
fn echo() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        assert!(polyfork::process::is_forked());
        assert!(polyfork::process::channel().is_err(), "it can be taken once");
        while let Some(message) = parent.recv().await.unwrap() {
            parent.send(&message.to::<Value>().unwrap()).await.unwrap();
        }
        assert!(!parent.is_connected());
    });
}

/// Sends much, and leaves at once: nothing of it may be lost.
#[test]
#[ignore = "run by the other tests as their child"]
fn leaves() {
    block_on(async {
        let parent = polyfork::process::channel().unwrap();
        for number in 1..4 {
            parent.send(&number).await.unwrap();
        }
        parent.send(&"x".repeat(4 << 20)).await.unwrap();
        parent.disconnect().await.unwrap();
        assert!(parent.disconnect().await.is_err());
    });
}

#[test]
#[ignore = "run by the other tests as their child"]
fn serve() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let mut kept = Vec::new();
        while let Some(mut message) = parent.recv().await.unwrap() {
            let counted = message.take_counted();
            match (message.to::<String>().unwrap().as_str(), message.take_handle()) {
                ("server", Some(Handle::TcpListener(listener))) => {
                    tokio::spawn(accept(tokio::net::TcpListener::from_std(listener).unwrap()));
                    parent.send(&"listening").await.unwrap();
                }
                ("socket", Some(Handle::TcpStream(stream))) => {
                    let mut stream = tokio::net::TcpStream::from_std(stream).unwrap();
                    stream.write_all(b"from Rust").await.unwrap();
                    kept.push((stream, counted.expect("Node counts what its server accepted")));
                }
                ("udp", Some(Handle::UdpSocket(socket))) => {
                    tokio::spawn(answer(tokio::net::UdpSocket::from_std(socket).unwrap()));
                    parent.send(&"bound").await.unwrap();
                }
                ("let go", None) => kept.clear(),
                other => panic!("{other:?}"),
            }
        }
    });
}

async fn accept(listener: tokio::net::TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        stream.write_all(b"from Rust").await.unwrap();
    }
}

async fn answer(socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 100];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let text = [b"got ", &buffer[..length]].concat();
        socket.send_to(&text, from).await.unwrap();
    }
}

#[test]
#[ignore = "run by the other tests as their child"]
fn gives() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        parent.send_with(&json!({ "port": port }), listener).await.unwrap();
        next(&mut parent).await;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (connection, _) = listener.accept().unwrap();
        parent.send_with(&"connection", connection).await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        parent.send(&text).await.unwrap();
        next(&mut parent).await;
        give_udp(&mut parent).await;
        assert!(parent.recv().await.unwrap().is_none());
    });
}

async fn give_udp(parent: &mut Channel) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    parent.send_with(&"udp", socket).await.unwrap();
    let client = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut buffer = [0; 100];
    // Until Node has begun to read, what is sent waits in the socket.
    client.send_to(b"ping", address).await.unwrap();
    let length = client.recv(&mut buffer).await.unwrap();
    parent.send(&String::from_utf8_lossy(&buffer[..length])).await.unwrap();
}

#[test]
#[ignore = "run by the other tests as their child"]
fn answers() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        while let Some(message) = parent.recv().await.unwrap() {
            assert!(message.wants_reply());
            if let Ok(number) = message.to::<f64>() {
                message.reply(&(number * 2.0)).await.unwrap();
            }
        }
    });
}

/// What a grandchild would inherit.
#[test]
#[ignore = "run by the other tests as their child"]
fn environment() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let mut command = polyfork::child_process::Command::new("env");
        command.stdout(polyfork::child_process::Stdio::Pipe);
        let output = command.spawn().unwrap().wait_with_output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let names: Vec<_> = text.lines().filter(|line| line.contains("CHANNEL")).collect();
        parent.send(&names).await.unwrap();
        assert!(parent.recv().await.unwrap().is_none());
    });
}

/// One line on standard error; the test harness has the output.
#[expect(clippy::print_stderr, reason = "a line is the report")]
fn tell(what: &dyn std::fmt::Display) {
    eprintln!("told: {what}");
}

/// Forks a Node script that shall outlive it, tells who that is, and ends with its channel.
#[test]
#[ignore = "run by the other tests as their child"]
fn forks_detached() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let mut script = ForkNode::new(std::env::var_os("POLYFORK_TEST_SCRIPT").unwrap());
        script.exec_path(std::env::var_os("POLYFORK_TEST_NODE").unwrap());
        script.command().detached(true).env("LINGER", "1").stdin(Stdio::Ignore);
        let mut forked = script.fork().unwrap();
        // It runs, and has its listener.
        forked.channel.send(&json!({"act": "echo", "value": 1})).await.unwrap();
        next(&mut forked.channel).await;
        parent.send(&json!({ "pid": forked.child.pid() })).await.unwrap();
        assert!(parent.recv().await.unwrap().is_none());
    });
}

/// Sends as fast as it may to a parent that does not receive; tells how far it came.
#[test]
#[ignore = "run by the other tests as their child"]
fn floods() {
    block_on(async {
        let parent = polyfork::process::channel().unwrap();
        let mut sent = 0;
        // Should the machine be slow, it has sent less than it could have.
        let pause = Duration::from_secs(2);
        while let Ok(Ok(())) = tokio::time::timeout(pause, parent.send(&"x".repeat(64 << 10))).await
        {
            sent += 1;
            assert!(sent < 2000, "nobody reads, and all is taken");
        }
        tell(&sent);
        parent.closed().await;
    });
}

/// Says what it makes of the variables that name its channel.
#[test]
#[ignore = "run by the other tests as their child"]
fn tells_its_channel() {
    block_on(async {
        let told = match polyfork::process::channel() {
            Ok(_) => "a channel".to_owned(),
            Err(error) => format!("{error:?}"),
        };
        tell(&told);
    });
}

/// Says what it gets, and how much it can read from its standard input, which must be open all the same.
#[test]
#[ignore = "run by the other tests as their child"]
fn deaf_echo() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let said: String = next(&mut parent).await.to().unwrap();
        let mut input = Vec::new();
        let length = std::io::Read::read_to_end(&mut std::io::stdin(), &mut input).unwrap();
        parent.send(&(said, length)).await.unwrap();
        assert!(parent.recv().await.unwrap().is_none());
    });
}

/// Reads nothing, until it is killed.
#[test]
#[ignore = "run by the other tests as their child"]
fn deaf() {
    std::thread::sleep(Duration::from_secs(600));
}
