//! The blocking forms: no runtime, no deadlock, Node's error numbers.

use std::time::Duration;

use polyfork::child_process::{
    CancellationToken, Command, Exec, ExecErrorKind, OutputStream, Signal, SpawnError, Stdio,
    SyncFault, exec, exec_file, exec_file_sync, exec_sync, spawn_sync,
};

fn sh(script: &str) -> Exec {
    let mut command = Command::new("sh");
    command.arg("-c").arg(script);
    Exec::new(command)
}

#[test]
fn code_outputs_and_pid_are_told() {
    let done = spawn_sync(sh("echo out; echo err >&2; exit 3")).unwrap();
    assert_eq!((done.output.exit.code, done.output.exit.signal), (Some(3), None));
    assert_eq!((&done.output.stdout[..], &done.output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert!(done.pid > 0 && done.error.is_none() && !done.killed);
    let done = spawn_sync(sh("kill -INT $$")).unwrap();
    assert_eq!(done.output.exit.signal, Some(Signal::INT));
}

#[test]
fn a_program_that_cannot_be_started_is_told_apart() {
    let error = spawn_sync(Command::new("no-such-program")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    let mut command = Command::new("pwd");
    command.current_dir("/no/such/folder");
    assert_eq!(spawn_sync(command).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    let error = exec_file_sync("no-such-program", ["x"]).unwrap_err();
    assert_eq!((error.pid(), error.raw_os_error()), (None, Some(libc::ENOENT)));
    assert_eq!(exec_sync("no-such-program").unwrap_err().code(), Some(127));
}

#[test]
fn no_arguments_are_no_arguments() {
    let done = exec_file_sync("sh", ["-c", "echo $#"]).unwrap();
    assert_eq!(done.stdout, b"0\n");
    assert_eq!(exec_file_sync("echo", [] as [&str; 0]).unwrap().stdout, b"\n");
}

#[test]
fn environment_and_directory_are_as_given() {
    let output = exec("echo $A; pwd").env("A", "1").current_dir("/usr").run_sync().unwrap();
    assert_eq!(output.stdout, b"1\n/usr\n");
}

#[test]
fn the_shell_is_the_default_one_or_the_given() {
    assert_eq!(exec_sync("echo $0; echo a && echo b").unwrap().stdout, b"/bin/sh\na\nb\n");
    let output = exec_file("echo $0", [] as [&str; 0]).shell("sh").run_sync().unwrap();
    assert_eq!(output.stdout, b"sh\n");
}

#[test]
fn input_of_any_kind_of_bytes_is_fed_and_ended() {
    let run = |input: Vec<u8>| spawn_sync(sh("cat").input(input)).unwrap().output.stdout;
    assert_eq!(run("text".into()), b"text");
    assert_eq!(run(vec![0, 255, 10]), [0, 255, 10]);
    assert_eq!(run(Vec::new()), b"");
    // Without any, the input is empty.
    assert_eq!(exec_sync("cat").unwrap().stdout, b"");
}

#[test]
fn outputs_may_go_elsewhere() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("echo");
    command.arg("there").stdout(file.reopen().unwrap());
    assert_eq!(spawn_sync(command).unwrap().output.stdout, b"");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut file, &mut text).unwrap();
    assert_eq!(text, "there\n");
    let mut command = Command::new("true");
    command.stdio(3, Stdio::Pipe);
    let error = spawn_sync(command).unwrap_err();
    assert!(error.to_string().contains("stdio slot 3"), "{error}");
}

#[test]
fn big_input_and_big_output_do_not_deadlock() {
    let input: Vec<u8> = (0..8usize << 20).map(|index| index as u8).collect();
    let both = sh("tee /dev/stderr").input(input.clone()).max_buffer(usize::MAX);
    let done = spawn_sync(both).unwrap();
    assert!(done.output.stdout == input && done.output.stderr == input);
    // Output first, input never read to its end.
    let done = spawn_sync(sh("head -c 1000000 /dev/zero; read line").input(input)).unwrap();
    assert_eq!((done.output.stdout.len(), done.error.is_none()), (1_000_000, true));
}

#[test]
fn out_of_time_is_etimedout_with_the_chosen_signal() {
    let limit = Duration::from_millis(500);
    for (signal, told) in
        [(None, Signal::TERM), (Some("sigkill"), Signal::KILL), (Some("10"), Signal::USR1)]
    {
        let mut run = sh("echo so far; exec sleep 1000").timeout(limit);
        if let Some(signal) = signal {
            run = run.kill_signal(signal.parse().unwrap());
        }
        let done = spawn_sync(run).unwrap();
        let fault = done.error.unwrap();
        assert!(matches!(fault, SyncFault::TimedOut));
        assert_eq!(fault.raw_os_error(), Some(libc::ETIMEDOUT));
        assert_eq!((done.output.exit.code, done.output.exit.signal), (None, Some(told)));
        assert_eq!((&done.output.stdout[..], done.killed), (&b"so far\n"[..], true));
    }
    let error = exec("exec sleep 1000").timeout(limit).run_sync().unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::Timeout));
    // In time, a limit is nothing.
    assert!(exec("true").timeout(Duration::from_secs(100)).run_sync().is_ok());
}

#[test]
fn too_much_output_is_enobufs_with_what_was_read() {
    let done = spawn_sync(sh("echo hello; exec sleep 1000").max_buffer(3)).unwrap();
    let fault = done.error.unwrap();
    assert!(matches!(fault, SyncFault::MaxBuffer(OutputStream::Stdout)));
    assert_eq!(fault.raw_os_error(), Some(libc::ENOBUFS));
    assert_eq!(
        (&done.output.stdout[..], done.output.exit.signal),
        (&b"hel"[..], Some(Signal::TERM))
    );
    let done = spawn_sync(sh("printf abc").max_buffer(3)).unwrap();
    assert!(done.error.is_none() && done.output.stdout == b"abc");
}

#[test]
fn exec_file_too_much_output_is_an_error_with_what_was_read() {
    let run = exec_file("sh", ["-c", "echo hello >&2"]).max_buffer(5).run_sync();
    let error = run.unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::MaxBuffer(OutputStream::Stderr)));
    assert_eq!((error.stderr(), error.raw_os_error()), (&b"hello"[..], Some(libc::ENOBUFS)));
    assert_eq!(exec_file("printf", ["hello"]).max_buffer(5).run_sync().unwrap().stdout, b"hello");
}

#[test]
fn exec_too_much_output_is_an_error_and_the_limit_is_one_mebibyte() {
    assert_eq!(exec_sync("head -c 1048576 /dev/zero").unwrap().stdout.len(), 1 << 20);
    let error = exec_sync("head -c 1048577 /dev/zero").unwrap_err();
    assert_eq!((error.stdout().len(), error.raw_os_error()), (1 << 20, Some(libc::ENOBUFS)));
    let output = exec("head -c 1048577 /dev/zero").max_buffer(usize::MAX).run_sync().unwrap();
    assert_eq!(output.stdout.len(), (1 << 20) + 1);
}

#[test]
fn nonsense_is_refused_and_signal_names_have_any_case() {
    for (run, part) in [
        (sh("true").kill_signal(Signal::NONE), "kill signal 0"),
        (sh("true").current_dir("a\0b"), "NUL"),
        (sh("true").env("A", "\0"), "NUL"),
        (sh("true").configure(|command| command.uid(u32::MAX)), "no user"),
        (sh("true").abort(CancellationToken::new()), "abort token"),
    ] {
        let error = spawn_sync(run).unwrap_err();
        assert!(matches!(error, SpawnError::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
    for name in ["SIGKILL", "sigkill", "SigKill"] {
        assert!(spawn_sync(sh("true").kill_signal(name.parse().unwrap())).is_ok());
    }
    assert!("SIGNOPE".parse::<Signal>().is_err());
    let token = CancellationToken::new();
    token.cancel();
    let error = exec("true").abort(token).run_sync().unwrap_err();
    assert!(matches!(error.kind(), ExecErrorKind::Aborted));
}

#[test]
fn a_process_left_behind_with_the_output_is_waited_for() {
    let done = spawn_sync(sh("(sleep 0.2; echo late) & echo early")).unwrap();
    assert_eq!(done.output.stdout, b"early\nlate\n");
    // Unless there is a limit.
    let left = sh("sleep 1000 & echo $!").timeout(Duration::from_secs(1));
    let done = spawn_sync(left).unwrap();
    assert!(matches!(done.error, Some(SyncFault::TimedOut)));
    assert_ne!(done.output.exit.success(), done.killed, "nothing is sent to what has ended");
    super::end(super::process(std::str::from_utf8(&done.output.stdout).unwrap()));
}

#[tokio::test]
async fn it_works_inside_a_runtime_too() {
    assert_eq!(exec_sync("echo inside").unwrap().stdout, b"inside\n");
}
