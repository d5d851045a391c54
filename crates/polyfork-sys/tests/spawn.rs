//! Every option of a command, as the child itself or `/proc` shows it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use common::*;
use polyfork_sys::spawn::{Command, Step, is_unknown_child};
use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal};

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap()
}

#[test]
fn arguments_reach_the_program_as_they_are() {
    let mut command = Command::new("printf");
    let hostile = ["$(id)", "a b", "", "'", "\"; exit 9;", "\n", "%s", "\\"];
    command.arg("%s\\0").args(hostile);
    let expected: Vec<u8> =
        hostile.iter().flat_map(|arg| [arg.as_bytes(), b"\0"].concat()).collect();
    assert_eq!(output(command).as_bytes(), expected);
}

#[test]
fn the_program_sees_the_name_it_is_given() {
    let mut command = Command::new("/bin/sh");
    command.arg0("other-name").arg("-c").arg("echo $0");
    assert_eq!(output(command), "other-name\n");
}

#[test]
fn the_environment_is_a_copy_with_changes() {
    let mut command = Command::new("env");
    command.env("POLYFORK_A", "1").env("POLYFORK_B", "x=y z").env_remove("HOME");
    let text = output(command);
    let mut lines = text.lines();
    assert!(lines.clone().any(|line| line == "POLYFORK_B=x=y z"), "{text}");
    assert!(lines.clone().any(|line| line.starts_with("PATH=")));
    assert!(!lines.any(|line| line.starts_with("HOME=")));

    let mut command = Command::new("env");
    command.env_clear().envs([("B", "2"), ("A", "1")]);
    assert_eq!(output(command), "A=1\nB=2\n");
}

#[test]
fn a_name_is_searched_in_the_path_of_the_child() {
    let folder = tempfile::tempdir().unwrap();
    let tool = folder.path().join("polyfork-test-tool");
    std::fs::write(&tool, "#!/bin/sh\necho found\n").unwrap();
    std::fs::set_permissions(&tool, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new("polyfork-test-tool");
    command.env("PATH", format!("/nonexistent:/etc/passwd:{}:/bin", folder.path().display()));
    assert_eq!(output(command), "found\n");
    // And not in ours.
    let error = Command::new("polyfork-test-tool").spawn().unwrap_err();
    assert!(error.is_not_found(), "{error}");
    // An empty element means the child's working directory.
    let mut command = Command::new("polyfork-test-tool");
    command.env("PATH", "/nonexistent:").current_dir(folder.path());
    assert_eq!(output(command), "found\n");
    // Without a PATH there is a default.
    let mut command = Command::new("true");
    command.env_clear();
    assert_eq!(output(command), "");
}

#[test]
fn a_file_that_may_not_be_run_does_not_end_the_search() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).join("polyfork-test-tool");
    for (name, mode) in [("first", 0o644), ("second", 0o755)] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        std::fs::write(path(name), "#!/bin/sh\necho second\n").unwrap();
        std::fs::set_permissions(path(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let folders = format!("{0}/first:{0}/second:/nonexistent", folder.path().display());
    let mut command = Command::new("polyfork-test-tool");
    command.env("PATH", folders);
    assert_eq!(output(command), "second\n");
}

#[test]
fn the_working_directory_is_entered_and_relative_programs_start_there() {
    let folder = tempfile::tempdir().unwrap();
    let real = folder.path().canonicalize().unwrap();
    std::fs::copy("/bin/pwd", real.join("here")).unwrap();
    let mut command = Command::new("./here");
    command.current_dir(&real).env_remove("PWD");
    assert_eq!(output(command), format!("{}\n", real.display()));
}

#[test]
fn the_umask_is_set() {
    let mut command = shell("umask");
    command.umask(0o027);
    assert_eq!(output(command), "0027\n");
}

#[test]
fn descriptors_appear_under_their_numbers_and_nothing_else_does() {
    // Without close-on-exec, as a careless library would leave it.
    let careless = memfd("careless");
    rustix::io::fcntl_setfd(&careless, rustix::io::FdFlags::empty()).unwrap();
    let mut command = stopping_shell();
    command.fd(3, memfd("three")).fd(700, memfd("far")).null(5);
    let child = command.spawn().unwrap();
    wait_until_stopped(&child);
    let fds = open_fds(child.pid());
    let numbers: Vec<i32> = fds.keys().copied().filter(|number| *number > 2).collect();
    assert_eq!(numbers, [3, 5, 700], "{fds:?}");
    assert_eq!(fds[&3], "/memfd:three (deleted)");
    assert_eq!(fds[&5], "/dev/null");
    assert_eq!(fds[&700], "/memfd:far (deleted)");
    kill(&child);
    drop(careless);
}

#[test]
fn a_descriptor_can_be_left_where_it_is() {
    let kept = memfd("kept");
    let number = kept.as_raw_fd();
    let mut command = stopping_shell();
    command.inherit_fd(number).null(1);
    let child = command.spawn().unwrap();
    wait_until_stopped(&child);
    let fds = open_fds(child.pid());
    assert_eq!(fds.get(&number).map(String::as_str), Some("/memfd:kept (deleted)"));
    assert_eq!(fds[&1], "/dev/null");
    assert_eq!(fds.len(), 4, "{fds:?}");
    kill(&child);
    // Ours has kept its close-on-exec.
    assert!(rustix::io::fcntl_getfd(&kept).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    /// Sources and targets are drawn from the same few numbers: chains, swaps and rings abound.
    #[test]
    fn sources_and_targets_may_clash_in_any_way(
        order in Just((0..8usize).collect::<Vec<_>>()).prop_shuffle(),
        small in proptest::collection::vec(any::<bool>(), 8),
        count in 1..8usize,
    ) {
        let sources: Vec<OwnedFd> = (0..8).map(|index| memfd(&format!("f{index}"))).collect();
        let numbers: Vec<i32> = sources.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = stopping_shell();
        let mut expected = std::collections::BTreeMap::new();
        for (index, source) in sources.into_iter().enumerate().take(count) {
            // Either a number that is one of the sources', or a small one.
            let target = if small[index] { index as i32 } else { numbers[order[index]] };
            expected.insert(target, format!("/memfd:f{index} (deleted)"));
            command.fd(target, source);
        }
        let child = command.spawn().unwrap();
        wait_until_stopped(&child);
        let mut found = open_fds(child.pid());
        kill(&child);
        found.retain(|number, _| *number > 2 || expected.contains_key(number));
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn groups_and_sessions_are_new_where_asked_for() {
    // pid, parent, process group, session; a group or session whose leader is outside this pid
    // namespace reads as 0 (pid_namespaces(7)), which is no `Pid`: hence the file for both sides.
    let numbers = |stat: &str| -> Vec<i32> {
        let rest = stat.rsplit(')').next().unwrap().split_ascii_whitespace();
        let pid = stat.split(' ').next().unwrap().parse().unwrap();
        let numbers = rest.skip(1).take(3).map(|field| field.parse().unwrap());
        std::iter::once(pid).chain(numbers).collect()
    };
    let fields = |mut command: Command| -> Vec<i32> {
        command.args(["-c", "read -r line < /proc/self/stat; echo $line"]);
        numbers(&output(command))
    };
    let own = numbers(&std::fs::read_to_string("/proc/self/stat").unwrap());
    let (group, session) = (own[2], own[3]);
    let plain = fields(Command::new("sh"));
    assert_eq!(plain[1], own[0]);
    assert_eq!(plain[2..], [group, session]);
    let mut command = Command::new("sh");
    command.process_group(true);
    let grouped = fields(command);
    assert_eq!(grouped[2..], [grouped[0], session]);
    let mut command = Command::new("sh");
    command.new_session(true).process_group(true);
    let alone = fields(command);
    assert_eq!(alone[2..], [alone[0], alone[0]]);
}

#[test]
fn signals_are_unblocked_and_at_their_defaults() {
    // Rust ignores SIGPIPE already; ignore, catch and block some more.
    extern "C" fn handler(_signal: i32) {}
    let catch: extern "C" fn(i32) = handler;
    for (signal, action) in
        [(libc::SIGUSR1, libc::SIG_IGN), (libc::SIGRTMIN() + 3, catch as libc::sighandler_t)]
    {
        // SAFETY: `signal` is used by nobody else here, and the handler does nothing.
        unsafe { libc::signal(signal, action) };
    }
    let spawn = std::thread::spawn(|| {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: fills the set it is given.
        unsafe { libc::sigfillset(set.as_mut_ptr()) };
        // SAFETY: the set was filled above; only this thread's mask changes.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) };
        stopping_shell().spawn().unwrap()
    });
    let child = spawn.join().unwrap();
    wait_until_stopped(&child);
    for field in ["SigBlk", "SigIgn"] {
        assert_eq!(status_field(child.pid(), field), "0000000000000000", "{field}");
    }
    kill(&child);
}

#[test]
fn sigpipe_ends_the_child_although_we_ignore_it() {
    let (reader, writer) = pipe();
    drop(reader);
    let mut command = Command::new("yes");
    command.fd(1, writer);
    assert_eq!(command.spawn().unwrap().wait().unwrap().signal(), Some(libc::SIGPIPE));
}

#[test]
fn the_child_finds_its_own_pid_in_its_environment() {
    for _ in 0..20 {
        let mut command = shell("echo $LISTEN_PID $$");
        command.env("LISTEN_PID", "overwritten").pid_env("LISTEN_PID");
        let text = output(command);
        let (told, real) = text.trim().split_once(' ').unwrap();
        assert_eq!(told, real);
    }
}

#[test]
fn user_group_and_groups_are_changed_and_our_own_standing_is_not() {
    if !is_root() {
        println!("skipped: only root may change users");
        return;
    }
    // SAFETY: reads an attribute of this process.
    let dumpable = || unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
    let before = dumpable();
    for (groups, expected) in [(None, ""), (Some(&[7, 9][..]), "7 9")] {
        let mut command = stopping_shell();
        command.uid(65534).gid(65533);
        if let Some(groups) = groups {
            command.groups(groups);
        }
        let child = command.spawn().unwrap();
        wait_until_stopped(&child);
        assert_eq!(status_field(child.pid(), "Uid"), ["65534"; 4].join("\t"));
        assert_eq!(status_field(child.pid(), "Gid"), ["65533"; 4].join("\t"));
        assert_eq!(status_field(child.pid(), "Groups"), expected);
        assert_eq!(status_field(child.pid(), "CapEff"), "0000000000000000");
        kill(&child);
    }
    assert_eq!(dumpable(), before);
    assert!(rustix::process::geteuid().is_root());
}

#[test]
fn a_user_change_without_the_right_fails_and_says_so() {
    if !is_root() {
        println!("skipped: starts as root");
        return;
    }
    let exe = world_readable_copy();
    let mut command = helper_in(&exe, "helper_changes_user_without_the_right");
    command.uid(65534).gid(65534).groups(&[]);
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "run by a_user_change_without_the_right_fails_and_says_so"]
fn helper_changes_user_without_the_right() {
    let step = |change: &dyn Fn(&mut Command)| {
        let mut command = Command::new("true");
        change(&mut command);
        command.spawn().map(|child| child.wait().unwrap()).unwrap_err()
    };
    // Nothing to drop, so the groups are no obstacle; the user is.
    assert_eq!(
        step(&|command| {
            command.uid(0);
        })
        .step,
        Step::Uid
    );
    assert_eq!(
        step(&|command| {
            command.gid(0);
        })
        .step,
        Step::Gid
    );
    let error = step(&|command| {
        command.groups(&[0]);
    });
    assert_eq!(error.step, Step::Groups);
    assert_eq!(error.to_string(), "cannot start \"true\": set groups: operation not permitted");
    // To stay what one is needs no right.
    let mut command = Command::new("true");
    command.uid(65534).gid(65534);
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

/// The fault: `PR_SET_PDEATHSIG` fires when the *thread* that forked ends.
#[test]
fn a_child_survives_the_thread_that_asked_for_it() {
    let spawn = || {
        let mut command = Command::new("sleep");
        command.arg("1000").parent_death_signal(Some(Signal::KILL));
        command.spawn().unwrap()
    };
    let child = std::thread::spawn(spawn).join().unwrap();
    assert!(!readable_within(child.pidfd(), Duration::from_millis(300)), "killed with the thread");
    kill(&child);
}

#[test]
fn a_child_gets_its_signal_when_the_process_that_started_it_is_killed() {
    let (reader, writer) = pipe();
    let mut command = helper("helper_starts_a_child_and_waits");
    command.fd(3, writer);
    let parent = command.spawn().unwrap();
    let mut pid = [0; 4];
    let mut reader = File::from(reader);
    reader.read_exact(&mut pid).unwrap();
    let grandchild = Pid::from_raw(i32::from_le_bytes(pid)).unwrap();
    let flags = rustix::process::PidfdFlags::empty();
    let grandchild = rustix::process::pidfd_open(grandchild, flags).unwrap();
    assert!(!readable_within(grandchild.as_fd(), Duration::from_millis(50)));
    kill(&parent);
    assert!(readable_within(grandchild.as_fd(), PATIENCE));
}

#[test]
#[ignore = "run by a_child_gets_its_signal_when_the_process_that_started_it_is_killed"]
fn helper_starts_a_child_and_waits() {
    let mut command = Command::new("sleep");
    command.arg("1000").null(0).null(1).parent_death_signal(Some(Signal::TERM));
    let child = command.spawn().unwrap();
    // SAFETY: number 3 was given to this process for this purpose, and nobody else here owns it.
    let report = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(3) };
    rustix::io::write(&report, &child.pid().as_raw_nonzero().get().to_le_bytes()).unwrap();
    child.wait().unwrap();
}

#[test]
fn the_end_is_told_as_code_or_signal() {
    assert_eq!(shell("exit 7").spawn().unwrap().wait().unwrap().code(), Some(7));
    let status = shell("kill -USR2 $$").spawn().unwrap().wait().unwrap();
    assert_eq!((status.code(), status.signal()), (None, Some(libc::SIGUSR2)));
}

#[test]
fn a_running_child_has_no_status_and_an_ended_one_takes_no_signal() {
    let child = Command::new("sleep").arg("1000").take().spawn().unwrap();
    assert!(child.try_wait().unwrap().is_none());
    child.signal(Signal::TERM).unwrap();
    assert!(readable_within(child.pidfd(), PATIENCE));
    assert_eq!(child.try_wait().unwrap().unwrap().signal(), Some(libc::SIGTERM));
    assert_eq!(child.signal(Signal::TERM).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    assert!(is_unknown_child(&child.try_wait().unwrap_err()));
}

#[test]
fn a_child_that_somebody_else_collected_is_told_apart() {
    let child = Command::new("true").spawn().unwrap();
    assert!(readable_within(child.pidfd(), PATIENCE));
    let options = rustix::process::WaitOptions::empty();
    rustix::process::waitpid(Some(child.pid()), options).unwrap();
    assert!(is_unknown_child(&child.try_wait().unwrap_err()));
}

trait Take: Sized {
    fn take(&mut self) -> Self;
}

impl Take for Command {
    /// The command out of a chain of calls.
    fn take(&mut self) -> Self {
        std::mem::replace(self, Command::new(""))
    }
}
