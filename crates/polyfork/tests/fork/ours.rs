//! Rust at both ends: entries of this program, and this program as any program.

use std::net::TcpListener;
use std::time::Duration;

use polyfork::channel::Encoding;
use polyfork::child_process::{
    Command, Entry, ForkedEntry, Signal, Stdio, fork_entry_with, fork_program,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use crate::roles::{ABSENT, DOUBLE, FAIL, FLOOD};
use crate::support::{PATIENCE, next};

/// This program in a role.
fn role(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([&format!("roles::{name}"), "--exact", "--ignored", "--nocapture"]);
    command.stdout(Stdio::Ignore);
    command
}

fn entry<In, Out>(entry: &Entry<In, Out>) -> ForkedEntry<In, Out>
where
    In: Serialize + DeserializeOwned,
    Out: Serialize + DeserializeOwned,
{
    fork_entry_with(entry, role("entries").stderr(Stdio::Pipe)).unwrap()
}

#[tokio::test]
async fn entry_gets_and_sends_typed_messages_and_ends_with_its_channel() {
    let mut forked = entry(&DOUBLE);
    for number in 0..1000 {
        forked.port.send(&number).await.unwrap();
        assert_eq!(forked.port.recv().await.unwrap(), Some(number * 2));
    }
    forked.port.disconnect().await.unwrap();
    assert_eq!(forked.port.recv().await.unwrap(), None);
    assert!(forked.child.wait().await.unwrap().success());
}

#[tokio::test]
async fn last_words_of_an_entry_that_fails_arrive_and_its_exit_code_tells() {
    let mut forked = entry(&FAIL);
    assert_eq!(forked.port.recv().await.unwrap().as_deref(), Some("last words"));
    assert_eq!(forked.port.recv().await.unwrap(), None);
    let output = forked.child.wait_with_output().await.unwrap();
    assert_eq!(output.exit.code, Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("as wished"), "{text}");
}

#[tokio::test]
async fn all_messages_of_an_entry_that_returns_arrive() {
    let mut forked = entry(&FLOOD);
    forked.port.send(&100_000).await.unwrap();
    for number in 0..100_000 {
        assert_eq!(forked.port.recv().await.unwrap(), Some(number));
    }
    assert_eq!(forked.port.recv().await.unwrap(), None);
    assert!(forked.child.wait().await.unwrap().success());
}

#[tokio::test]
async fn entry_that_is_not_in_the_program_is_told_clearly() {
    let mut forked = entry(&ABSENT);
    assert_eq!(forked.port.recv().await.unwrap(), None);
    let output = forked.child.wait_with_output().await.unwrap();
    assert_eq!(output.exit.code, Some(70));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("no entry \"absent\"") && text.contains("double"), "{text}");
}

#[tokio::test]
async fn program_speaks_every_encoding_it_is_told() {
    for encoding in [Encoding::Json, Encoding::Advanced] {
        let mut forked = fork_program(&mut role("echo"), encoding).unwrap();
        forked.channel.send(&json!({"a": [1, "two", null]})).await.unwrap();
        let message = next(&mut forked.channel).await;
        assert_eq!(message.to::<serde_json::Value>().unwrap(), json!({"a": [1, "two", null]}));
        forked.channel.disconnect().await.unwrap();
        assert!(forked.child.wait().await.unwrap().success());
    }
}

#[tokio::test]
async fn listener_is_used_in_the_child() {
    let mut forked = fork_program(&mut role("serve"), Encoding::Json).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    forked.channel.send_with(&"server", listener).await.unwrap();
    assert_eq!(next(&mut forked.channel).await.to::<String>().unwrap(), "listening");
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.unwrap();
    assert_eq!(text, "from Rust");
    forked.child.kill(Signal::KILL).unwrap();
}

#[tokio::test]
async fn child_killed_while_we_send_ends_the_channel() {
    for encoding in [Encoding::Json, Encoding::Advanced, Encoding::Native] {
        let mut forked = fork_program(&mut role("deaf"), encoding).unwrap();
        let sender = forked.channel.sender();
        let sending =
            tokio::spawn(async move { while sender.send(&"x".repeat(1000)).await.is_ok() {} });
        let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        forked.channel.send_with(&"never acknowledged", theirs).await.ok();
        tokio::time::sleep(Duration::from_millis(20)).await;
        forked.child.kill(Signal::KILL).unwrap();
        tokio::time::timeout(PATIENCE, sending).await.unwrap().unwrap();
        assert!(forked.channel.recv().await.unwrap().is_none());
        tokio::time::timeout(PATIENCE, forked.channel.closed()).await.unwrap();
        assert!(!forked.channel.is_connected());
        assert_eq!(forked.child.wait().await.unwrap().signal, Some(Signal::KILL));
    }
}

#[tokio::test]
async fn channel_ends_with_the_child_although_a_grandchild_has_its_end() {
    let mut command = Command::new("sh");
    command.args(["-c", "printf '\"last\"\\n' >&3; cat <&4 >/dev/null 2>&1 & exit 0"]);
    // The grandchild ends with this pipe.
    command.stdio(4, Stdio::Pipe);
    let mut forked = fork_program(&mut command, Encoding::Json).unwrap();
    assert_eq!(next(&mut forked.channel).await.to::<String>().unwrap(), "last");
    let end = tokio::time::timeout(PATIENCE, forked.channel.recv()).await.unwrap();
    assert!(end.unwrap().is_none());
    assert!(forked.child.wait().await.unwrap().success());
}

#[tokio::test]
async fn foreign_output_on_the_channel_ends_only_the_channel() {
    let mut command = Command::new("sh");
    command.args(["-c", "printf '1\\nSegmentation fault\\n' >&3; read line <&3; exit 0"]);
    let mut forked = fork_program(&mut command, Encoding::Json).unwrap();
    assert_eq!(next(&mut forked.channel).await.to::<i32>().unwrap(), 1);
    let error = forked.channel.recv().await.unwrap_err().to_string();
    assert!(error.contains("Segmentation fault"), "{error}");
    assert!(forked.channel.recv().await.unwrap().is_none());
    assert!(forked.child.wait().await.unwrap().success());
}

/// A Rust child that finds its channel in a standard stream moves it away, and reads nothing there.
#[tokio::test]
async fn channel_is_found_wherever_it_is() {
    // Not in its output: the test harness of the child writes there.
    for encoding in [Encoding::Json, Encoding::Advanced, Encoding::Native] {
        for slot in [0, 2, 7] {
            let mut command = role("deaf_echo");
            command.stdin(Stdio::Ignore).stdio(slot, Stdio::Channel);
            let mut forked = fork_program(&mut command, encoding).unwrap();
            forked.channel.send(&"hello").await.unwrap();
            let answer = next(&mut forked.channel).await.to::<(String, usize)>().unwrap();
            assert_eq!(answer, ("hello".to_owned(), 0));
            forked.channel.disconnect().await.unwrap();
            assert!(forked.child.wait().await.unwrap().success());
        }
    }
}

/// What the kernel keeps between the two ends, at most.
const IN_THE_KERNEL: usize = 1 << 20;

/// Neither end of a channel keeps more than its bounds, whoever floods and whoever does not read.
#[tokio::test]
async fn fault_45_and_46_a_flood_is_held_up_and_goes_on() {
    for encoding in [Encoding::Json, Encoding::Advanced, Encoding::Native] {
        // To a child that is stopped.
        let forked = fork_program(&mut role("deaf"), encoding).unwrap();
        let mut sent = 0;
        let long = "x".repeat(64 << 10);
        // Whoever waits that long while the event loop has nothing else to do waits for the child.
        let pause = Duration::from_millis(300);
        while tokio::time::timeout(pause, forked.channel.send(&long)).await.is_ok() {
            sent += 1;
            assert!(sent < 2000, "nobody reads, and all is taken");
        }
        assert!(forked.channel.try_send("x").is_err());
        println!(
            "{encoding:?}: {sent} messages of 64 KiB are taken for a child that does not read"
        );
        assert!(sent * (64 << 10) <= (256 << 10) + (64 << 10) + IN_THE_KERNEL, "{sent}");
        // Who waits gets its error when the child is gone.
        let sender = forked.channel.sender();
        let waiting = tokio::spawn(async move { sender.send(&"more").await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        forked.child.kill(Signal::KILL).unwrap();
        let told = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
        assert!(told.is_err());
    }
    // From a child, to us who do not receive: we take a mebibyte, the child keeps its own quarter.
    for encoding in [Encoding::Json, Encoding::Advanced, Encoding::Native] {
        let mut command = role("floods");
        command.stderr(Stdio::Pipe);
        let mut forked = fork_program(&mut command, encoding).unwrap();
        let mut lines = BufReader::new(forked.child.stderr.take().unwrap()).lines();
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
        let line = line.unwrap();
        let sent: usize = line.strip_prefix("told: ").expect(&line).parse().unwrap();
        println!(
            "{encoding:?}: a child gets rid of {sent} messages of 64 KiB that nobody receives"
        );
        assert!(sent * (64 << 10) <= (1 << 20) + (256 << 10) + 4 * (64 << 10) + IN_THE_KERNEL);
        // None of them is lost, once somebody receives.
        for _ in 0..sent {
            assert_eq!(next(&mut forked.channel).await.to::<String>().unwrap().len(), 64 << 10);
        }
        forked.child.kill(Signal::KILL).unwrap();
    }
}

/// Numbers in the environment that are no channel are errors that name them; nothing is closed, nothing taken.
#[tokio::test]
async fn fault_109_a_hostile_environment_gives_no_channel() {
    let told = async |variables: &[(&str, &str)], descriptor: Stdio| {
        let mut command = role("tells_its_channel");
        command.stderr(Stdio::Pipe).stdio(5, descriptor);
        for (name, value) in variables {
            command.env(name, value);
        }
        let mut child = command.spawn().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).await.unwrap();
        child.wait().await.unwrap();
        let told = text.lines().find_map(|line| line.strip_prefix("told: "));
        told.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    let node = |value| [("NODE_CHANNEL_FD", value)];
    for (value, expected) in [
        ("", "NotForked"),
        ("99", "Channel { fd: 99"),
        ("-1", "Environment"),
        ("5x", "Environment"),
        ("2147483648", "Environment"),
        (" 5", "Environment"),
        ("/dev/tty", "Environment"),
    ] {
        let said = told(&node(value), Stdio::Ignore).await;
        assert!(said.starts_with(expected), "{value:?}: {said}");
    }
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(told(&node("5"), one.into()).await, "a channel");
    let unix = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let unconnected =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    for descriptor in [
        Stdio::from(std::fs::File::open("/dev/null").unwrap()),
        Stdio::from(TcpListener::bind("127.0.0.1:0").unwrap()),
        Stdio::from(unix),
        Stdio::Fd(unconnected.into()),
    ] {
        let said = told(&node("5"), descriptor).await;
        assert!(said.starts_with("Channel { fd: 5"), "{said}");
    }
    let mode = [("NODE_CHANNEL_FD", "5"), ("NODE_CHANNEL_SERIALIZATION_MODE", "\u{1b}[31m")];
    assert!(told(&mode, Stdio::Ignore).await.starts_with("Environment"));
    // Ours counts only with the process id it was meant for, and that is not ours to guess.
    for pid in ["", "1", "0", "x"] {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let ours = [("POLYFORK_FORK_FD", "5"), ("POLYFORK_CHANNEL_PID", pid)];
        assert_eq!(told(&ours, one.into()).await, "NotForked", "{pid:?}");
    }
}
