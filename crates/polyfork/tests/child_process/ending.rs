//! How a child ends, by itself or by us, and in which order that is told.

use std::time::Duration;

use polyfork::child_process::{CancellationToken, Command, Event, Signal, Stdio};

use super::{end, events, first_line, has_ended, helper, process, shell, soon, until};

const FOREVER: &str = "exec sleep 1000";

#[tokio::test]
async fn the_exit_code_is_exact_and_without_a_signal() {
    for code in [0, 1, 42, 255] {
        let mut child = shell(&format!("exit {code}")).spawn().unwrap();
        let exit = soon(child.wait()).await.unwrap();
        assert_eq!((exit.code, exit.signal), (Some(code), None));
        assert_eq!((child.exit_code(), child.signal_code()), (Some(code), None));
        // As often as asked.
        assert_eq!(soon(child.wait()).await.unwrap(), exit);
        assert_eq!(child.try_wait(), Some(exit));
    }
}

#[tokio::test]
async fn spawn_comes_first_then_exit_then_close() {
    let mut child = shell("echo x").stdout(Stdio::Pipe).spawn().unwrap();
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
    assert!(child.next_event().await.is_none());
}

#[tokio::test]
async fn a_signal_is_sent_once_it_runs_and_refused_when_it_is_gone() {
    let mut child = shell(FOREVER).spawn().unwrap();
    assert!(child.kill(Signal::NONE).unwrap());
    assert!(!child.killed(), "asking is not killing");
    assert!(child.kill("sigterm".parse().unwrap()).unwrap());
    assert!(child.killed());
    assert_eq!(events(&mut child).await, ["spawn", "exit SIGTERM", "close SIGTERM"]);
    assert_eq!((child.exit_code(), child.signal_code()), (None, Some(Signal::TERM)));
    assert!(!child.kill(Signal::TERM).unwrap());
    assert!(!child.kill(Signal::NONE).unwrap());
}

#[tokio::test]
async fn a_child_that_ended_by_itself_was_not_killed() {
    let mut child = Command::new("true").spawn().unwrap();
    soon(child.wait()).await.unwrap();
    assert!(!child.kill(Signal::KILL).unwrap());
    assert!(!child.killed());
}

#[tokio::test]
async fn a_real_time_signal_ends_it_too() {
    let mut child = shell(FOREVER).spawn().unwrap();
    assert!(child.kill(Signal::try_from(40).unwrap()).unwrap());
    assert_eq!(soon(child.wait()).await.unwrap().signal.map(Signal::number), Some(40));
}

#[tokio::test]
async fn out_of_time_it_is_sent_its_signal_and_no_error_is_told() {
    for signal in [Signal::TERM, Signal::KILL, Signal::USR2] {
        let mut command = shell(FOREVER);
        let limit = Duration::from_millis(20);
        let mut child = command.timeout(limit).kill_signal(signal).spawn().unwrap();
        let told = events(&mut child).await;
        assert_eq!(told, ["spawn".to_owned(), format!("exit {signal}"), format!("close {signal}")]);
        assert!(child.killed());
    }
    let mut command = Command::new("true");
    let mut child = command.timeout(Duration::ZERO).spawn().unwrap();
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
}

#[tokio::test]
async fn an_abort_is_one_error_before_the_exit() {
    let token = CancellationToken::new();
    let mut child = shell(FOREVER).abort(token.clone()).spawn().unwrap();
    assert!(matches!(soon(child.next_event()).await, Some(Event::Spawn)));
    token.cancel();
    token.cancel();
    let told = events(&mut child).await;
    assert_eq!(told, ["error the child was aborted", "exit SIGTERM", "close SIGTERM"]);
}

#[tokio::test]
async fn an_abort_after_the_exit_does_nothing() {
    let token = CancellationToken::new();
    let mut child = Command::new("true").abort(token.clone()).spawn().unwrap();
    soon(child.wait()).await.unwrap();
    token.cancel();
    assert_eq!(events(&mut child).await, ["spawn", "exit 0", "close 0"]);
    assert!(!child.killed());
}

#[tokio::test]
async fn a_cancelled_wait_loses_nothing() {
    let mut child = shell("read line; exit 6").stdin(Stdio::Pipe).spawn().unwrap();
    let stdin = child.stdin.take();
    for _ in 0..3 {
        let early = tokio::time::timeout(Duration::from_millis(5), child.wait()).await;
        assert!(early.is_err());
    }
    drop(stdin);
    assert_eq!(soon(child.wait()).await.unwrap().code, Some(6));
    assert_eq!(events(&mut child).await, ["spawn", "exit 6", "close 6"]);
}

#[tokio::test]
async fn waiting_closes_the_input() {
    let mut child = Command::new("cat").piped().spawn().unwrap();
    assert!(soon(child.wait()).await.unwrap().success());
}

#[tokio::test]
async fn dropping_kills_only_if_asked() {
    let mut command = shell("echo $$; exec sleep 1000");
    let start = |command: &mut Command| command.stdout(Stdio::Pipe).spawn().unwrap();
    let mut child = start(&mut command);
    let left = process(&first_line(child.stdout.as_mut().unwrap()).await);
    drop(child);
    let mut child = start(command.kill_on_drop(true));
    let killed = process(&first_line(child.stdout.as_mut().unwrap()).await);
    drop(child);
    until("the child is killed", || has_ended(&killed)).await;
    assert!(!has_ended(&left));
    end(&left);
    until("the other ends", || has_ended(&left)).await;
}

#[tokio::test]
async fn a_detached_process_outlives_the_one_that_started_it() {
    let mut command = helper("ending::helper_leaves_a_detached_child");
    let mut child = command.stderr(Stdio::Pipe).spawn().unwrap();
    let left = process(&first_line(child.stderr.as_mut().unwrap()).await);
    drop(child.stderr.take());
    assert!(soon(child.wait()).await.unwrap().success());
    assert!(!has_ended(&left));
    end(&left);
    until("it ends when it is told to", || has_ended(&left)).await;
}

#[tokio::test]
#[ignore = "run by a_detached_process_outlives_the_one_that_started_it"]
async fn helper_leaves_a_detached_child() {
    let mut command = Command::new("sleep");
    command.arg("1000").detached(true).stdin(Stdio::Ignore).stderr(Stdio::Ignore);
    let child = command.spawn().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap();
    let session = stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, child.pid().to_string(), "it leads a session of its own");
    rustix::io::write(std::io::stderr(), format!("{}\n", child.pid()).as_bytes()).unwrap();
}

#[tokio::test]
async fn a_group_is_ended_with_all_in_it_also_after_its_leader() {
    for leader_ends in [false, true] {
        let script = if leader_ends { "exit 0" } else { "wait" };
        let mut command = shell(&format!("sleep 1000 & echo $!; {script}"));
        let mut child = command.process_group(true).stdout(Stdio::Pipe).spawn().unwrap();
        let grandchild = process(&first_line(child.stdout.as_mut().unwrap()).await);
        if leader_ends {
            assert!(soon(child.wait()).await.unwrap().success());
        }
        match child.kill_tree(Signal::KILL) {
            Err(error) if leader_ends && error.kind() == std::io::ErrorKind::Unsupported => {
                println!("skipped: {error}");
                end(&grandchild);
                continue;
            }
            sent => assert!(sent.unwrap()),
        }
        until("the grandchild is killed", || has_ended(&grandchild)).await;
        soon(child.wait()).await.unwrap();
    }
}

#[tokio::test]
async fn a_group_in_which_nobody_is_left_takes_no_signal() {
    let mut child = Command::new("true").process_group(true).spawn().unwrap();
    soon(child.wait()).await.unwrap();
    match child.kill_tree(Signal::KILL) {
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Unsupported, "{error}"),
        Ok(sent) => assert!(!sent),
    }
}

#[tokio::test]
async fn a_tree_without_a_group_of_its_own_is_refused_and_ours_is_spared() {
    let mut child = shell(FOREVER).spawn().unwrap();
    let error = child.kill_tree(Signal::KILL).unwrap_err();
    assert!(error.to_string().contains("leads no process group"), "{error}");
    assert!(child.kill(Signal::KILL).unwrap());
    soon(child.wait()).await.unwrap();
}

#[tokio::test]
async fn a_control_group_is_ended_with_what_left_the_process_group_and_goes_away() {
    let mut command = shell("setsid sleep 1000 & echo $!; cat /proc/self/cgroup; wait");
    let started = command.own_cgroup(true).stdout(Stdio::Pipe).spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("a control group of its own: "), "{text}");
            println!("skipped: {text}");
            return;
        }
    };
    let mut stdout = tokio::io::BufReader::new(child.stdout.take().unwrap());
    let grandchild = process(&first_line(&mut stdout).await);
    assert!(child.kill_tree(Signal::KILL).unwrap());
    until("the grandchild is killed", || has_ended(&grandchild)).await;
    assert_eq!(soon(child.wait()).await.unwrap().signal, Some(Signal::KILL));
    until("the group is empty", || !child.kill_tree(Signal::KILL).unwrap()).await;
    let prefix = format!("polyfork-{}-", std::process::id());
    let groups = || {
        let folder = std::fs::read_dir("/sys/fs/cgroup/unified")
            .or_else(|_| std::fs::read_dir("/sys/fs/cgroup"));
        folder
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            })
            .count()
    };
    until("the folder is gone", || groups() == 0).await;
}
