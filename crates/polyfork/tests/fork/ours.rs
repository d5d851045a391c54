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
