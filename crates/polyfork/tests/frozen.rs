//! Workers that a signal does not end at once: frozen by a control group, or held by a tracer.
//!
//! Faults 93 and 94 of the list that this project keeps (`docs/faults.tsv`). A frozen process of the old hierarchy keeps
//! even SIGKILL waiting until it is thawed, as one in an uninterruptible sleep does.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork::child_process::{Command, Signal, Stdio, exec_file};
use polyfork::cluster::{Cluster, Event, Events, Outcome, Output, Ready, Settings};

const PATIENCE: Duration = Duration::from_secs(60);

fn skip(test: &str, reason: &str) {
    println!("SKIP {test}: {reason}");
    if let Some(path) = std::env::var_os("POLYFORK_SKIP_LOG") {
        let log = fs::OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(format!("SKIP {test}: {reason}\n").as_bytes()))
            .expect("the skip log can be written");
    }
}

/// A control group that can be frozen. Thawed and removed in the end, whatever becomes of the test.
struct Freezer(PathBuf);

impl Freezer {
    fn new(name: &str) -> Option<Freezer> {
        let name = format!("polyfork-test-{name}-{}", std::process::id());
        let path = Path::new("/sys/fs/cgroup/freezer").join(name);
        fs::create_dir(&path).ok()?;
        let freezer = Freezer(path);
        fs::write(freezer.0.join("freezer.state"), "THAWED").is_ok().then_some(freezer)
    }

    async fn freeze(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        self.set("FROZEN").await;
    }

    async fn thaw(&self) {
        self.set("THAWED").await;
    }

    async fn set(&self, state: &str) {
        let path = self.0.join("freezer.state");
        fs::write(&path, state).unwrap();
        while fs::read_to_string(&path).unwrap().trim() != state {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // Best effort: a group that is still busy stays, empty of ours in a moment.
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Two workers that do nothing, and little patience with them.
fn sleepers() -> Settings {
    Settings::new("sleep")
        .arg("1000")
        .workers(2)
        .ready(Ready::Delay(Duration::from_millis(10)))
        .grace(Duration::from_millis(100))
        .output(Output::Null)
}

async fn told<T>(events: &mut Events, what: &str, mut find: impl FnMut(&Event) -> Option<T>) -> T {
    let mut story = Vec::new();
    let looking = async {
        loop {
            let event = events.next().await.unwrap_or_else(|| panic!("no {what}: {story:?}"));
            if let Some(found) = find(&event) {
                return found;
            }
            story.push(event);
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("no {what}"))
}

async fn pid_of(events: &mut Events, worker: u64) -> u32 {
    told(events, "fork", |event| match event {
        Event::Fork(who) if who.worker == worker => Some(who.pid),
        _ => None,
    })
    .await
}

async fn all_ready(events: &mut Events) {
    told(events, "all ready", |e| matches!(e, Event::AllReady { .. }).then_some(())).await;
}

#[tokio::test]
async fn fault_93_a_worker_that_cannot_die_is_told_and_the_cluster_goes_on() {
    let test = "fault_93_a_worker_that_cannot_die_is_told_and_the_cluster_goes_on";
    let Some(freezer) = Freezer::new("worker") else {
        skip(test, "no freezer controller of the old hierarchy that may be used");
        return;
    };
    let cluster = Cluster::start(sleepers()).unwrap();
    let mut events = cluster.events();
    let pid = pid_of(&mut events, 1).await;
    all_ready(&mut events).await;
    freezer.freeze(pid).await;
    cluster.worker(1).disconnect().await;
    let notice = told(&mut events, "a notice that it is not dead", |event| match event {
        Event::Notice(notice) if notice.code == "unkillable" => Some(notice.clone()),
        _ => None,
    })
    .await;
    assert_eq!(notice.who.map(|who| who.pid), Some(pid), "{notice:?}");
    assert!(notice.text.contains("still there long after SIGKILL"), "{notice:?}");
    // Everybody else goes on: its slot has a new worker, and another one can be stopped and replaced.
    let status = cluster.status().await;
    assert!(status.iter().filter(|worker| worker.state == "ready").count() == 2, "{status:?}");
    cluster.worker(2).kill(Signal::KILL.number()).await;
    told(&mut events, "the end of the other", |event| match event {
        Event::Exit { who, .. } if who.worker == 2 => Some(()),
        _ => None,
    })
    .await;
    // Its end is told when it comes.
    freezer.thaw().await;
    told(&mut events, "its end", |event| match event {
        Event::Exit { who, .. } if who.worker == 1 => Some(()),
        _ => None,
    })
    .await;
    cluster.stop_now().await;
    assert!(matches!(cluster.wait().await, Outcome::Forced));
}

/// The same for one command: a limit of the caller's is kept, although the child is still there.
#[tokio::test]
async fn fault_93_a_child_that_cannot_die_does_not_hold_up_its_caller() {
    let test = "fault_93_a_child_that_cannot_die_does_not_hold_up_its_caller";
    let Some(freezer) = Freezer::new("child") else {
        skip(test, "no freezer controller of the old hierarchy that may be used");
        return;
    };
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    freezer.freeze(child.pid()).await;
    assert!(child.kill(Signal::KILL).unwrap());
    let early = tokio::time::timeout(Duration::from_millis(200), child.wait()).await;
    assert!(early.is_err(), "it is frozen: {early:?}");
    assert!(child.try_wait().is_none() && child.killed());
    // Nothing else waits for it.
    assert!(exec_file("true", [""; 0]).await.is_ok());
    freezer.thaw().await;
    let exit = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert_eq!(exit.signal, Some(Signal::KILL));
}

/// A tracer holds the worker at its death: it counts as leaving, and is replaced once.
#[tokio::test]
async fn fault_94_a_worker_held_by_a_tracer_is_replaced_once() {
    let test = "fault_94_a_worker_held_by_a_tracer_is_replaced_once";
    if !Path::new("/usr/bin/strace").exists() {
        skip(test, "strace is not installed");
        return;
    }
    let cluster = Cluster::start(sleepers()).unwrap();
    let mut events = cluster.events();
    let pid = pid_of(&mut events, 1).await;
    all_ready(&mut events).await;
    let mut tracer = Command::new("/usr/bin/strace");
    tracer.args(["-qq", "-o", "/dev/null", "-p", &pid.to_string()]);
    tracer.stdin(Stdio::Ignore).stderr(Stdio::Ignore).parent_death_signal(Signal::KILL);
    let mut tracer = tracer.spawn().unwrap();
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.contains(&format!("TracerPid:\t{}\n", tracer.pid()))
    };
    while !traced() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // A tracer that is stopped itself lets nothing happen to the worker.
    assert!(tracer.kill(Signal::STOP).unwrap());
    cluster.worker(1).disconnect().await;
    // SIGKILL gets through, but only the tracer is told of the end.
    let replacement = told(&mut events, "a replacement", |event| match event {
        Event::Fork(who) if who.slot == 1 && who.worker != 1 => Some(who.worker),
        _ => None,
    })
    .await;
    told(&mut events, "a notice that it is not dead", |event| match event {
        Event::Notice(notice) if notice.code == "unkillable" => Some(()),
        _ => None,
    })
    .await;
    tracer.kill(Signal::KILL).unwrap();
    tracer.wait().await.unwrap();
    told(&mut events, "its end", |event| match event {
        Event::Exit { who, restart_in, .. } if who.worker == 1 => {
            assert_eq!(*restart_in, None, "it has been replaced");
            Some(())
        }
        Event::Fork(who) if who.slot == 1 => panic!("replaced a second time: {who:?}"),
        _ => None,
    })
    .await;
    let status = cluster.status().await;
    let in_slot = status.iter().filter(|worker| worker.slot == 1).map(|worker| worker.worker);
    assert_eq!(in_slot.collect::<Vec<_>>(), [replacement], "{status:?}");
    cluster.stop_now().await;
    cluster.wait().await;
}
