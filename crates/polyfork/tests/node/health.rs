//! Limits on a worker's life: who is beyond one is replaced by a worker that is ready first.

use std::fs;
use std::time::Duration;

use polyfork::cluster::{Event, Settings};
use tempfile::TempDir;

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, Runtime};

const SERVER: &str = "
    const keep = [];
    require('http').createServer((request, response) => {
        if (request.url === '/grow') keep.push(Buffer.alloc(200 << 20, 1));
        response.end(String(process.pid));
    }).listen(0, '127.0.0.1');";

on_nodes_20_and_26! {
    a_worker_with_too_much_memory_is_renewed,
    a_worker_with_enough_connections_is_renewed,
    a_successor_that_does_not_come_up_changes_nothing,
}

fn start(
    runtime: &Runtime,
    folder: &TempDir,
    mode: Mode,
    change: impl FnOnce(Settings) -> Settings,
) -> Rig {
    let program = folder.path().join("app.cjs");
    fs::write(&program, SERVER).expect("written");
    Rig::serving(runtime, program.to_str().expect("UTF-8"), mode, 2, change)
}

fn notices(rig: &Rig, code: &str) -> usize {
    let is = |event: &&Event| matches!(event, Event::Notice(notice) if notice.code == code);
    rig.events().iter().filter(is).count()
}

/// The successor was ready before the old one was told to leave.
fn nobody_was_missed(rig: &Rig, old: u64) {
    let place = |wanted: &dyn Fn(&Event) -> bool| rig.events().iter().position(wanted);
    let ready = place(&|event| matches!(event, Event::Ready(who) if who.worker == 3));
    let draining = place(&|event| matches!(event, Event::Draining(who) if who.worker == old));
    assert!(ready.is_some() && ready < draining, "{ready:?} {draining:?}\n{}", rig.story());
}

async fn a_worker_with_too_much_memory_is_renewed(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::TURNS {
        let rig = start(&runtime, &folder, mode, |s| s.max_memory(Some(180 << 20)));
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let load = Load::start(to, 4, "/");
        let grown = get(to, "/grow").await.expect("an answer").text();
        let old = if rig.pid(1).await.to_string() == grown { 1 } else { 2 };
        let ended = rig.ended(old).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{ended:?}");
        nobody_was_missed(&rig, old);
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        rig.stop().await;
    }
}

async fn a_worker_with_enough_connections_is_renewed(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::TURNS {
        let rig = start(&runtime, &folder, mode, |s| s.max_connections(Some(50)));
        rig.all_ready(2).await;
        let load = Load::start(reach(&rig.listening(1).await.0), 4, "/");
        // Both have them, and are renewed one after the other.
        rig.ended(1).await;
        rig.ended(2).await;
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        assert_eq!(notices(&rig, "renewal-failed"), 0, "{}", rig.story());
        rig.stop().await;
    }
}

async fn a_successor_that_does_not_come_up_changes_nothing(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = start(&runtime, &folder, Mode::Kernel, |s| {
        s.max_lifetime(Some(Duration::from_millis(1500)))
    });
    rig.all_ready(2).await;
    fs::write(folder.path().join("app.cjs"), "process.exit(1)").expect("written");
    rig.eventually("two failures", |rig| (notices(rig, "renewal-failed") == 2).then_some(())).await;
    let serving = rig.cluster.status().await.into_iter().filter(|w| w.state == "ready");
    assert_eq!(serving.map(|w| w.worker).collect::<Vec<_>>(), [1, 2], "{}", rig.story());
    rig.stop().await;
}
