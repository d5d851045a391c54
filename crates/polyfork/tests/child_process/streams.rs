//! Streams: pipes one way and two ways, descriptors given away and shared, and when they count as closed.

use std::io::{Read, Seek, Write};

use polyfork::child_process::{Command, Event, Signal, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{events, first_line, helper, output, process, read_all, shell, soon};

/// More than a pipe holds.
const MEGABYTE: usize = 1 << 20;

#[tokio::test]
async fn what_a_child_writes_arrives_exactly() {
    assert_eq!(output(&mut shell("printf 'a\\nb'")).await, "a\nb");
    let mut child = shell("printf out; printf err >&2").piped().spawn().unwrap();
    assert_eq!(read_all(child.stderr.take()).await, b"err");
    assert_eq!(read_all(child.stdout.take()).await, b"out");
}

#[tokio::test]
async fn half_a_million_bytes_arrive_before_close() {
    let mut command = shell("head -c 500000 /dev/zero | tr '\\0' x; printf end");
    let mut child = command.stdout(Stdio::Pipe).spawn().unwrap();
    let text = read_all(child.stdout.take()).await;
    assert_eq!(text.len(), 500_003);
    assert!(text.ends_with(b"xend"));
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
}

#[tokio::test]
async fn the_last_words_of_a_child_can_be_read_after_its_exit() {
    let mut child = shell("printf words; exit 3").stdout(Stdio::Pipe).spawn().unwrap();
    assert_eq!(soon(child.wait()).await.unwrap().code, Some(3));
    assert_eq!(read_all(child.stdout.take()).await, b"words");
}

#[tokio::test]
async fn a_big_input_that_is_ended_arrives_whole() {
    let mut child =
        Command::new("wc").arg("-c").stdin(Stdio::Pipe).stdout(Stdio::Pipe).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for _ in 0..3 {
        soon(stdin.write_all(&vec![b'x'; MEGABYTE])).await.unwrap();
    }
    drop(stdin);
    assert_eq!(read_all(child.stdout.take()).await, format!("{}\n", 3 * MEGABYTE).as_bytes());
}

#[tokio::test]
async fn a_gone_reader_is_an_error_and_no_signal() {
    let mut child = Command::new("true").stdin(Stdio::Pipe).spawn().unwrap();
    soon(async {
        while !super::has_ended(&child) {
            tokio::task::yield_now().await
        }
    })
    .await;
    let mut stdin = child.stdin.take().unwrap();
    let error = soon(stdin.write_all(b"x")).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn slots_beyond_two_are_two_way_and_gaps_are_empty() {
    let mut command = shell("read line <&5; echo \"got $line\" >&5; ls /proc/$$/fd >&1");
    command.stdout(Stdio::Pipe).stdio(5, Stdio::Pipe).stdio(4, Stdio::Ignore);
    let mut child = command.spawn().unwrap();
    assert_eq!(child.stdio.keys().copied().collect::<Vec<_>>(), [5]);
    let mut socket = child.stdio.remove(&5).unwrap();
    soon(socket.write_all(b"hello\n")).await.unwrap();
    assert_eq!(first_line(&mut socket).await, "got hello");
    drop(socket);
    let listed = String::from_utf8(read_all(child.stdout.take()).await).unwrap();
    let numbers: Vec<&str> = listed.split_whitespace().collect();
    assert_eq!(numbers, ["0", "1", "2", "5"]);
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
}

#[tokio::test]
async fn ignore_is_dev_null_for_the_standard_three() {
    let mut command = Command::new("sleep");
    command.arg("1000").kill_on_drop(true);
    command.stdin(Stdio::Ignore).stdout(Stdio::Ignore).stderr(Stdio::Ignore);
    // Started means executed, so it can be looked at now.
    let child = command.spawn().unwrap();
    for slot in 0..3 {
        let target = std::fs::read_link(format!("/proc/{}/fd/{slot}", child.pid())).unwrap();
        assert_eq!(target.to_str(), Some("/dev/null"), "slot {slot}");
    }
}

#[tokio::test]
async fn files_and_sockets_stand_in_their_slots() {
    let mut file = tempfile::tempfile().unwrap();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // As a socket comes from an event loop.
    theirs.set_nonblocking(true).unwrap();
    let mut command = shell("cat; echo to the socket >&3");
    command.stdin(theirs.try_clone().unwrap()).stdout(file.try_clone().unwrap()).stdio(3, theirs);
    let mut child = command.spawn().unwrap();
    drop(command);
    ours.write_all(b"through a socket that blocks now").unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(soon(child.wait()).await.unwrap().success());
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through a socket that blocks now");
    text.clear();
    ours.read_to_string(&mut text).unwrap();
    assert_eq!(text, "to the socket\n");
}

#[tokio::test]
async fn one_childs_output_is_anothers_input_without_us() {
    let mut source = shell("head -c 1048576 /dev/zero").stdout(Stdio::Pipe).spawn().unwrap();
    let between = Stdio::try_from(source.stdout.take().unwrap()).unwrap();
    let mut counter = Command::new("wc");
    let mut counter = counter.arg("-c").stdin(between).stdout(Stdio::Pipe).spawn().unwrap();
    assert_eq!(read_all(counter.stdout.take()).await, format!("{MEGABYTE}\n").as_bytes());
    // A stream that was given away is no stream of the child's any more.
    assert_eq!(events(&mut source).await, ["spawn", "exit 0", "close 0"]);
}

#[tokio::test]
async fn one_input_takes_the_outputs_of_several_children_and_ours() {
    let mut cat = Command::new("cat").stdin(Stdio::Pipe).stdout(Stdio::Pipe).spawn().unwrap();
    let mut stdin = cat.stdin.take().unwrap();
    for word in ["one", "two"] {
        let mut writer = shell(&format!("echo {word}"));
        let mut writer = writer.stdout(stdin.share().unwrap()).spawn().unwrap();
        assert!(soon(writer.wait()).await.unwrap().success());
    }
    soon(stdin.write_all(b"ours\n")).await.unwrap();
    drop(stdin);
    assert_eq!(read_all(cat.stdout.take()).await, b"one\ntwo\nours\n");
}

#[tokio::test]
async fn what_a_borrower_leaves_of_a_pipe_can_be_read_here() {
    let mut source =
        shell("echo first; echo second; echo third").stdout(Stdio::Pipe).spawn().unwrap();
    let mut stdout = source.stdout.take().unwrap();
    // `read` of a shell takes no more than its line from a pipe.
    let mut borrower = shell("read line; echo \"$line\"");
    let borrower = output(borrower.stdin(stdout.share().unwrap())).await;
    assert_eq!(borrower, "first\n");
    let mut rest = String::new();
    soon(stdout.read_to_string(&mut rest)).await.unwrap();
    assert_eq!(rest, "second\nthird\n");
}

#[tokio::test]
async fn sharing_a_pipe_whose_other_end_is_closed_does_not_block() {
    let child = shell("echo rest").piped().spawn().unwrap();
    soon(async {
        while !super::has_ended(&child) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let unread = child.stdin.as_ref().unwrap().share().unwrap();
    let mut writer = Command::new("yes");
    let mut writer = writer.stdout(unread).spawn().unwrap();
    assert_eq!(soon(writer.wait()).await.unwrap().signal, Some(Signal::PIPE));
    let rest = child.stdout.as_ref().unwrap().share().unwrap();
    assert_eq!(output(Command::new("cat").stdin(rest)).await, "rest\n");
}

#[tokio::test]
async fn a_grandchild_writes_to_inherited_pipes() {
    let mut command = helper("streams::helper_has_a_child_that_inherits");
    command.stdin(Stdio::Pipe).stdout(Stdio::Pipe).stderr(Stdio::Pipe);
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    soon(stdin.write_all(&vec![b'#'; 100_000])).await.unwrap();
    drop(stdin);
    let out = read_all(child.stdout.take()).await;
    assert_eq!(out.iter().filter(|byte| **byte == b'#').count(), 100_000);
    assert!(soon(child.wait()).await.unwrap().success());
}

#[tokio::test]
#[ignore = "run by a_grandchild_writes_to_inherited_pipes"]
async fn helper_has_a_child_that_inherits() {
    let mut command = Command::new("cat");
    let mut child = command
        .stdin(Stdio::Inherit)
        .stdout(Stdio::Inherit)
        .stderr(Stdio::Inherit)
        .spawn()
        .unwrap();
    assert_eq!(soon(child.wait()).await.unwrap().code, Some(0));
}

#[tokio::test]
async fn a_grandchild_that_holds_the_output_delays_close_and_not_exit() {
    let mut command = shell("sleep 1000 & echo $!; exit 2");
    let mut child = command.stdout(Stdio::Pipe).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let holder = process(&first_line(&mut stdout).await);
    assert!(matches!(soon(child.next_event()).await, Some(Event::Spawn)));
    assert!(
        matches!(soon(child.next_event()).await, Some(Event::Exit(exit)) if exit.code == Some(2))
    );
    // Held: the close does not come, and a cancelled wait for it loses nothing.
    let reading = tokio::spawn(async move { stdout.read_to_end(&mut Vec::new()).await });
    let early =
        tokio::time::timeout(std::time::Duration::from_millis(50), child.next_event()).await;
    assert!(early.is_err(), "{early:?}");
    super::end(&holder);
    assert!(
        matches!(soon(child.next_event()).await, Some(Event::Close(exit)) if exit.code == Some(2))
    );
    assert!(soon(child.next_event()).await.is_none());
    soon(reading).await.unwrap().unwrap();
}

#[tokio::test]
async fn streams_nobody_took_do_not_hold_up_the_close() {
    let mut command = shell("head -c 300000 /dev/zero; echo x >&3");
    command.stdout(Stdio::Pipe).stdio(3, Stdio::Pipe);
    let mut child = command.spawn().unwrap();
    assert!(matches!(soon(child.next_event()).await, Some(Event::Spawn)));
    // It waits for a reader, as every child does whose pipe is full.
    let mut stdout = child.stdout.take().unwrap();
    soon(stdout.read_exact(&mut vec![0; 290_000])).await.unwrap();
    child.stdout = Some(stdout);
    assert_eq!(events(&mut child).await, ["exit 0", "close 0"]);
}

#[tokio::test]
async fn output_and_exit_come_together() {
    let mut command = shell("cat; echo err >&2; exit 5");
    let child = command.piped().spawn().unwrap();
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(
        (output.exit.code, output.stdout_str(), output.stderr_str()),
        (Some(5), Ok(""), Ok("err\n"))
    );
    let killed = shell("kill -KILL $$").piped().spawn().unwrap();
    let output = soon(killed.wait_with_output()).await.unwrap();
    assert_eq!((output.exit.code, output.exit.signal), (None, Some(Signal::KILL)));
}
