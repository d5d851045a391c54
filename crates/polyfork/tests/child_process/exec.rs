//! `exec` and `exec_file`: collected output within limits, and errors that carry all that is known.

use std::io;
use std::time::Duration;

use polyfork::child_process::{
    CancellationToken, Command, DEFAULT_MAX_BUFFER, Exec, ExecError, ExecErrorKind, Output,
    OutputStream, Signal, SpawnError, exec, exec_file,
};

use super::{has_ended, process, soon, until};

async fn run(exec: Exec) -> Result<Output, ExecError> {
    soon(exec.into_future()).await
}

/// A program that writes so many bytes to both outputs.
fn writer(stdout: usize, stderr: usize) -> Exec {
    exec(format!("head -c {stderr} /dev/zero >&2; head -c {stdout} /dev/zero"))
}

#[tokio::test]
async fn success_brings_both_outputs() {
    let output = run(exec("printf out; printf err >&2")).await.unwrap();
    assert_eq!((output.stdout_str(), output.stderr_str()), (Ok("out"), Ok("err")));
    let output = run(exec_file("printf", ["%s|", "a b", "$HOME", "\"'"])).await.unwrap();
    assert_eq!(output.stdout_str(), Ok("a b|$HOME|\"'|"));
}

#[tokio::test]
async fn bytes_stay_bytes_until_text_is_asked_for() {
    let output = run(exec("printf 'a\\377b'")).await.unwrap();
    assert_eq!(output.stdout, b"a\xffb");
    assert!(output.stdout_str().is_err());
    assert_eq!(output.stdout_lossy(), "a\u{fffd}b");
}

#[tokio::test]
async fn failure_brings_code_line_and_outputs() {
    let error = run(exec_file("sh", ["-c", "echo out; echo err >&2; exit 42"])).await.unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::Failed));
    assert_eq!((error.code(), error.signal(), error.killed()), (Some(42), None, false));
    assert_eq!(error.command(), "sh -c echo out; echo err >&2; exit 42");
    assert_eq!((error.stdout(), error.stderr()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(error.to_string(), format!("Command failed: {}\nerr\n", error.command()));
    assert!(error.pid().is_some());
}

#[tokio::test]
async fn a_signal_from_elsewhere_is_a_failure_that_is_not_ours() {
    let error = run(exec("kill -KILL $$")).await.unwrap_err();
    assert_eq!((error.code(), error.signal(), error.killed()), (None, Some(Signal::KILL), false));
}

#[tokio::test]
async fn a_missing_command_is_127_through_a_shell_and_not_found_without() {
    let error = run(exec("no-such-command")).await.unwrap_err();
    assert_eq!(error.code(), Some(127));
    assert!(error.pid().is_some() && !error.stderr().is_empty());
    let error = run(exec_file("no-such-command", ["x"])).await.unwrap_err();
    assert_eq!((error.code(), error.pid()), (None, None));
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    assert!(matches!(error.kind(), ExecErrorKind::Spawn(error) if error.is_not_found()));
}

#[tokio::test]
async fn the_environment_directory_and_shell_are_as_given() {
    let output =
        run(exec("echo $A; pwd; echo ${HOME-none}").env_clear().env("A", "1").current_dir("/usr"));
    assert_eq!(output.await.unwrap().stdout_str(), Ok("1\n/usr\nnone\n"));
    let output = run(exec_file("echo $((1 + 1))", [] as [&str; 0]).shell("/bin/sh")).await;
    assert_eq!(output.unwrap().stdout_str(), Ok("2\n"));
    let output = run(exec("umask").configure(|command| command.umask(0o27))).await;
    assert_eq!(output.unwrap().stdout_str(), Ok("0027\n"));
}

#[tokio::test]
async fn output_up_to_the_limit_passes_and_one_byte_more_does_not() {
    for limit in [0, 1, 1000, 100_000] {
        let output = run(writer(limit, limit).max_buffer(limit)).await.unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (limit, limit));
        let error = run(writer(limit + 1, limit).max_buffer(limit)).await.unwrap_err();
        assert!(
            matches!(error.kind(), ExecErrorKind::MaxBuffer(OutputStream::Stdout)),
            "{error:?}"
        );
        assert_eq!(error.stdout().len(), limit);
        let error = run(writer(0, limit + 1).max_buffer(limit)).await.unwrap_err();
        assert!(
            matches!(error.kind(), ExecErrorKind::MaxBuffer(OutputStream::Stderr)),
            "{error:?}"
        );
        assert_eq!((error.stderr().len(), error.raw_os_error()), (limit, Some(libc::ENOBUFS)));
    }
}

#[tokio::test]
async fn the_limit_counts_bytes_and_is_one_mebibyte_unless_said() {
    // Three characters of three bytes.
    let error = run(exec("printf '中文字'").max_buffer(4)).await.unwrap_err();
    assert_eq!(error.stdout(), &"中文字".as_bytes()[..4]);
    assert_eq!(DEFAULT_MAX_BUFFER, 1 << 20);
    assert_eq!(run(writer(1 << 20, 0)).await.unwrap().stdout.len(), 1 << 20);
    assert_eq!(run(writer((1 << 20) + 1, 0)).await.unwrap_err().stdout().len(), 1 << 20);
    let output = run(writer(3 << 20, 0).max_buffer(usize::MAX)).await.unwrap();
    assert_eq!(output.stdout.len(), 3 << 20);
}

#[tokio::test]
async fn over_the_limit_the_command_is_killed() {
    let error = run(exec("exec yes").max_buffer(10)).await.unwrap_err();
    assert!(error.stdout() == b"y\ny\ny\ny\ny\n" && error.code().is_none());
    assert!(matches!(error.signal(), Some(Signal::TERM | Signal::PIPE)), "{error:?}");
    let sleeper = exec("echo too much; exec sleep 1000").max_buffer(3).kill_signal(Signal::KILL);
    let error = run(sleeper).await.unwrap_err();
    assert_eq!((error.signal(), error.killed()), (Some(Signal::KILL), true));
}

#[tokio::test]
async fn out_of_time_it_is_killed_by_the_chosen_signal() {
    for signal in [Signal::TERM, Signal::KILL] {
        let sleeper = exec("echo so far; exec sleep 1000").kill_signal(signal);
        let error = run(sleeper.timeout(Duration::from_millis(500))).await.unwrap_err();
        assert!(matches!(error.kind(), ExecErrorKind::Timeout), "{error:?}");
        assert_eq!((error.code(), error.signal(), error.killed()), (None, Some(signal), true));
        assert_eq!(
            (error.stdout(), error.raw_os_error()),
            (&b"so far\n"[..], Some(libc::ETIMEDOUT))
        );
    }
}

#[tokio::test]
async fn out_of_time_a_grandchild_with_the_pipe_does_not_hold_up_the_answer() {
    let sleeper = exec("sleep 1000 & echo $!; exec sleep 1000").timeout(Duration::from_millis(500));
    let error = run(sleeper).await.unwrap_err();
    let left = process(std::str::from_utf8(error.stdout()).unwrap());
    assert!(!has_ended(&left), "only the command itself is killed");
    super::end(&left);
}

#[tokio::test]
async fn an_abort_before_or_after_the_start_is_an_error() {
    let token = CancellationToken::new();
    let executing = exec("exec sleep 1000").abort(token.clone()).start().unwrap();
    let pid = executing.pid();
    let aborted = tokio::spawn(executing.finish());
    token.cancel();
    let error = soon(aborted).await.unwrap().unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::Aborted), "{error:?}");
    assert_eq!((error.pid(), error.signal()), (Some(pid), Some(Signal::TERM)));
    let error = run(exec("true").abort(token)).await.unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::Spawn(SpawnError::Aborted { .. })), "{error:?}");
    assert_eq!(error.pid(), None);
}

#[tokio::test]
async fn input_is_written_while_output_is_read() {
    let input = vec![b'x'; 3 << 20];
    let cat = Exec::new(Command::new("cat")).max_buffer(usize::MAX).input(input.clone());
    assert!(run(cat).await.unwrap().stdout == input);
    // Not all of it has to be read.
    let output = run(exec("head -c 3").input(input)).await.unwrap();
    assert_eq!(output.stdout, b"xxx");
    assert_eq!(run(exec("wc -c")).await.unwrap().stdout_str(), Ok("0\n"), "without, it is empty");
}

#[tokio::test]
async fn a_dropped_future_kills_its_command() {
    let executing = exec("exec sleep 1000").start().unwrap();
    let pidfd = process(&executing.pid().to_string());
    assert!(executing.child().kill(Signal::NONE).unwrap());
    let finishing = executing.finish();
    drop(finishing);
    until("the command is killed", || has_ended(&pidfd)).await;
}

#[tokio::test]
async fn an_error_of_the_start_says_why() {
    let error = run(exec("true").current_dir("/no/such/folder")).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("/no/such/folder"));
    let ExecErrorKind::Spawn(spawn) = error.kind() else { panic!("{error:?}") };
    assert_eq!(spawn.io_kind(), io::ErrorKind::NotFound);
}
