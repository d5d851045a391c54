//! What a child is given: arguments, environment, directory, user; and what is refused before there is one.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use polyfork::child_process::{CancellationToken, Command, Shell, Signal, SpawnError, Stdio};

use super::{default_shell, events, helper, is_root, output, shell, soon};

#[tokio::test]
async fn the_environment_is_inherited() {
    let path = std::env::var("PATH").unwrap();
    assert_eq!(output(&mut shell("printf %s \"$PATH\"")).await, path);
}

#[tokio::test]
async fn variables_are_set_kept_when_empty_and_removed() {
    let mut command = shell("echo \"${A-none} ${EMPTY-none} ${GONE-none}\"");
    command.env("A", "1").env("EMPTY", "").env("GONE", "x").env_remove("GONE");
    assert_eq!(output(&mut command).await, "1  none\n");
    let mut command = Command::new("env");
    command.env("LOST", "x").env_clear().env("ONLY", "this").env("PATH", "/usr/bin:/bin");
    assert_eq!(output(&mut command).await, "ONLY=this\nPATH=/usr/bin:/bin\n");
}

#[tokio::test]
async fn the_working_directory_is_set_and_an_empty_one_means_ours() {
    assert_eq!(output(Command::new("pwd").current_dir("/usr")).await, "/usr\n");
    let ours = std::env::current_dir().unwrap();
    let told = output(Command::new("pwd").arg("-P").current_dir("/usr").current_dir("")).await;
    assert_eq!(told.trim_end(), ours.canonicalize().unwrap().to_str().unwrap());
    let error = Command::new("pwd").current_dir("/no/such/folder").spawn().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    assert!(!error.is_not_found(), "it is not the program that is missing");
    let told =
        "cannot start \"pwd\": working directory \"/no/such/folder\": no such file or directory";
    assert_eq!(error.to_string(), told);
}

#[tokio::test]
async fn the_zeroth_argument_is_the_program_or_as_asked() {
    let told = output(Command::new("/bin/sh").arg("-c").arg("echo $0").arg0("other")).await;
    assert_eq!(told, "other\n");
    let told = output(Command::new("/bin/sh").arg("-c").arg("echo $0")).await;
    assert_eq!(told, "/bin/sh\n");
}

#[tokio::test]
async fn a_missing_program_is_an_error_that_names_all_and_no_child() {
    let error = Command::new("no-such-program").arg("x").piped().spawn().unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    assert!(error.tried().iter().any(|path| path.ends_with("no-such-program")));
    assert!(error.to_string().starts_with("cannot start \"no-such-program\": "), "{error}");
    let error = Command::new("/etc/passwd").spawn().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    assert!(!error.is_not_found());
}

#[tokio::test]
async fn a_shell_reads_the_joined_line_only_when_asked() {
    let told = output(Command::new("echo").arg("a").arg("&&").arg("echo $V").env("V", "b")).await;
    assert_eq!(told, "a && echo $V\n");
    let mut command = Command::new("echo");
    command.arg("a").arg("&&").arg("echo $V").env("V", "b").shell(default_shell());
    assert_eq!(output(&mut command).await, "a\nb\n");
    let mut command = Command::new("echo $0");
    assert_eq!(output(command.shell("/bin/sh")).await, "/bin/sh\n");
    let mut child =
        Command::new("no-such-command").shell("sh").stderr(Stdio::Ignore).spawn().unwrap();
    assert_eq!(soon(child.wait()).await.unwrap().code, Some(127));
}

fn nul() -> OsString {
    OsString::from_vec(b"a\0b".to_vec())
}

#[tokio::test]
async fn nonsense_is_refused_before_anything_is_started() {
    let token = CancellationToken::new();
    token.cancel();
    type Change = for<'a> fn(&'a mut Command) -> &'a mut Command;
    let case = |change: Change, part: &'static str| (change, part);
    let cases = [
        case(|c| c.arg("fine").arg(nul()), "argument 2 contains a NUL byte"),
        case(|c| c.arg0(nul()), "arg0 contains a NUL byte"),
        case(|c| c.current_dir(nul()), "the working directory contains a NUL byte"),
        case(|c| c.env("KEY", nul()), "variable KEY contains a NUL byte"),
        case(|c| c.env("A=B", "x"), "\"A=B\" cannot name a variable"),
        case(|c| c.env("", "x"), "\"\" cannot name a variable"),
        case(|c| c.shell(Shell::Program(nul())), "the shell's name contains a NUL byte"),
        case(|c| c.shell(""), "the shell's name is empty"),
        case(|c| c.kill_signal(Signal::NONE), "kill signal 0"),
        case(|c| c.uid(u32::MAX), "4294967295 is no user"),
        case(|c| c.gid(u32::MAX), "4294967295 is no group"),
        case(|c| c.groups(&[1, u32::MAX]), "4294967295 is no supplementary group"),
        case(|c| c.stdio(u32::MAX, Stdio::Pipe), "stdio slot 4294967295"),
        case(
            |c| c.parent_death_signal(Signal::try_from(40).unwrap()),
            "signal 40 cannot be a parent death signal",
        ),
    ];
    for (change, part) in cases {
        let mut command = Command::new("true");
        change(&mut command);
        let error = command.spawn().unwrap_err();
        assert!(matches!(error, SpawnError::Invalid { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with("cannot start \"true\": ") && text.contains(part), "{text}");
    }
    let empty = Command::new("").spawn().unwrap_err();
    assert!(empty.to_string().ends_with("the program's name is empty"), "{empty}");
    let error = Command::new("true").abort(token).spawn().unwrap_err();
    assert!(matches!(error, SpawnError::Aborted { .. }), "{error:?}");
    let error = Command::new("true").stdio(999, Stdio::Inherit).spawn().unwrap_err();
    assert!(error.to_string().contains("descriptor 999: bad file descriptor"), "{error}");
    // And what is sane is taken.
    let mut command = Command::new("true");
    command.args(Vec::<String>::new()).kill_signal("sigusr1".parse().unwrap()).umask(0o22);
    assert_eq!(events(&mut command.spawn().unwrap()).await, ["spawn", "exit 0", "close 0"]);
}

#[test]
fn without_a_runtime_it_says_so() {
    let error = Command::new("true").spawn().unwrap_err();
    assert!(matches!(error, SpawnError::NoRuntime { .. }), "{error:?}");
}

#[tokio::test]
async fn a_command_can_be_started_again_but_not_a_descriptor() {
    let mut command = shell("exit 4");
    for _ in 0..3 {
        assert_eq!(soon(command.spawn().unwrap().wait()).await.unwrap().code, Some(4));
    }
    command.stdout(std::fs::File::open("/dev/null").unwrap());
    assert_eq!(soon(command.spawn().unwrap().wait()).await.unwrap().code, Some(4));
    let error = command.spawn().unwrap_err().to_string();
    assert!(error.ends_with("stdio slot 1: its descriptor went to an earlier child"), "{error}");
}

#[tokio::test]
async fn user_and_group_are_changed_or_refused_with_eperm() {
    if !is_root() {
        let error = Command::new("true").uid(0).spawn().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        return;
    }
    let mut command = shell("id -u; id -g; id -G");
    assert_eq!(output(command.uid(65534).gid(65534)).await, "65534\n65534\n65534\n");
    let copy = tempfile::tempdir().unwrap();
    let program = copy.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(copy.path(), open).unwrap();
    let mut command = Command::new(&program);
    command.args(["--exact", "spawning::helper_asks_for_root", "--ignored", "--nocapture"]);
    command.uid(65534).gid(65534).current_dir("/").stdout(Stdio::Ignore);
    assert!(soon(command.spawn().unwrap().wait()).await.unwrap().success());
}

#[tokio::test]
#[ignore = "run by user_and_group_are_changed_or_refused_with_eperm"]
async fn helper_asks_for_root() {
    for change in [Command::uid, Command::gid] {
        let mut command = Command::new("true");
        let error = change(&mut command, 0).spawn().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    }
}

#[tokio::test]
async fn at_the_descriptor_limit_it_is_an_error_with_its_number() {
    let mut command = helper("spawning::helper_has_no_descriptors_left");
    assert!(soon(command.spawn().unwrap().wait()).await.unwrap().success());
}

#[tokio::test]
#[ignore = "run by at_the_descriptor_limit_it_is_an_error_with_its_number"]
async fn helper_has_no_descriptors_left() {
    // The thread and the event loop have theirs.
    soon(Command::new("true").spawn().unwrap().wait()).await.unwrap();
    let mut taken = Vec::new();
    let limit = rustix::process::Rlimit { current: Some(64), maximum: Some(64) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        taken.push(file);
    }
    for left in 0..6 {
        let result = Command::new("true").piped().spawn();
        let error = result.expect_err("six descriptors and more are needed");
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{left} left: {error}");
        taken.pop();
    }
    taken.truncate(10);
    let mut child = Command::new("true").piped().spawn().unwrap();
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
}

#[tokio::test]
async fn a_chain_of_five_unwinds_from_its_end() {
    let mut command = helper("spawning::helper_has_a_child_of_its_own");
    let mut child = command.env("DEPTH", "5").spawn().unwrap();
    assert_eq!(soon(child.wait()).await.unwrap().code, Some(15));
}

#[tokio::test]
#[ignore = "run by a_chain_of_five_unwinds_from_its_end"]
async fn helper_has_a_child_of_its_own() {
    let depth: i32 = std::env::var("DEPTH").unwrap().parse().unwrap();
    let below = if depth == 1 {
        0
    } else {
        let mut command = helper("spawning::helper_has_a_child_of_its_own");
        command.env("DEPTH", (depth - 1).to_string());
        soon(command.spawn().unwrap().wait()).await.unwrap().code.unwrap()
    };
    // 5 + 4 + 3 + 2 + 1, if each has waited for the one below.
    std::process::exit(below + depth);
}
