//! The event loops of Node workers are watched: how late they are is known, one that is blocked is told of, and replaced
//! if it stays so.
//!
//! What counts as silence is tested in `polyfork_core::watchdog`, without a clock; here are the signs themselves.

use std::fs;
use std::time::Duration;

use polyfork::cluster::{Event, Reason, Serialization, Settings, StartError};
use polyfork_core::Exit;
use tempfile::TempDir;

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, Runtime};

/// Blocks on request, for a time or for ever; counts what user code sees of the primary's conversation.
const SERVER: &str = "
    process.on('message', (message) => process.send({ saw: message }));
    require('http').createServer((request, response) => {
        const time = /^.block=([0-9]+)/.exec(request.url);
        if (time) {
            const end = performance.now() + Number(time[1]);
            while (performance.now() < end);
        }
        response.end(String(process.pid));
    }).listen(0, '127.0.0.1');";

on_every_node! {
    a_loop_that_is_blocked_is_told_of_and_replaced_once_its_successor_is_ready,
    how_late_a_loop_is_is_known_and_user_code_sees_nothing_of_it,
    two_loops_that_are_blocked_at_once_have_their_successors_first,
}

on_nodes_20_and_26! {
    a_loop_that_comes_back_in_time_stays,
    a_worker_with_enough_requests_is_renewed,
    what_cannot_be_watched_or_counted_is_refused,
}

fn start(
    runtime: &Runtime,
    folder: &TempDir,
    mode: Mode,
    change: impl FnOnce(Settings) -> Settings,
) -> Rig {
    start_many(2, runtime, folder, mode, change)
}

fn start_many(
    workers: u32,
    runtime: &Runtime,
    folder: &TempDir,
    mode: Mode,
    change: impl FnOnce(Settings) -> Settings,
) -> Rig {
    let program = folder.path().join("app.cjs");
    fs::write(&program, SERVER).expect("written");
    Rig::serving(runtime, program.to_str().expect("UTF-8"), mode, workers, change)
}

fn position(rig: &Rig, wanted: impl Fn(&Event) -> bool) -> Option<usize> {
    rig.events().iter().position(wanted)
}

async fn a_loop_that_is_blocked_is_told_of_and_replaced_once_its_successor_is_ready(
    runtime: Runtime,
) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::TURNS {
        let watched = |s: Settings| {
            s.watchdog(Some(Duration::from_secs(2))).grace(Duration::from_millis(500))
        };
        let rig = start(&runtime, &folder, mode, watched);
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let blocked = tokio::spawn(async move { get(to, "/block=600000").await });
        let old = rig
            .event("a blocked worker", |event| match event {
                Event::Blocked { who, .. } => Some(who.worker),
                _ => None,
            })
            .await;
        let known = rig.cluster.status().await.into_iter().find(|w| w.worker == old);
        let load = Load::start(to, 4, "/");
        let ended = rig.ended(old).await;
        assert_eq!(ended.reason, Reason::Watchdog, "{}", rig.story());
        assert_eq!(ended.signal.map(Exit::Signal), Some(Exit::Signal(15)), "{ended:?}");
        assert!(known.is_none_or(|w| w.blocked.is_some()), "{}", rig.story());
        let ready = position(&rig, |e| matches!(e, Event::Ready(who) if who.worker == 3));
        let draining = position(&rig, |e| matches!(e, Event::Draining(who) if who.worker == old));
        assert!(ready.is_some() && ready < draining, "{}", rig.story());
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        // Only what it was doing is lost.
        drop(blocked.await.expect("a client"));
        rig.stop().await;
    }
}

async fn two_loops_that_are_blocked_at_once_have_their_successors_first(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::TURNS {
        let watched = |s: Settings| {
            s.watchdog(Some(Duration::from_secs(2))).grace(Duration::from_millis(500))
        };
        let rig = start_many(3, &runtime, &folder, mode, watched);
        rig.all_ready(3).await;
        let to = reach(&rig.listening(1).await.0);
        let block = || tokio::spawn(async move { get(to, "/block=600000").await });
        let blocked = [block(), block()];
        let mut old = Vec::new();
        while old.len() < 2 {
            let next = rig.event("a blocked worker", |event| match event {
                Event::Blocked { who, .. } if !old.contains(&who.worker) => Some(who.worker),
                _ => None,
            });
            let next = next.await;
            old.push(next);
        }
        let load = Load::start(to, 4, "/");
        for worker in &old {
            let ended = rig.ended(*worker).await;
            assert_eq!(ended.reason, Reason::Watchdog, "{}", rig.story());
            assert_eq!(ended.signal.map(Exit::Signal), Some(Exit::Signal(15)), "{ended:?}");
        }
        // Who leaves has its successor: the first one the first, the second one the second.
        let story = rig.events().clone();
        let at = |wanted: &dyn Fn(&Event) -> bool| -> Vec<usize> {
            (0..story.len()).filter(|at| wanted(&story[*at])).collect()
        };
        let ready = at(&|event| matches!(event, Event::Ready(who) if who.worker > 3));
        let left = at(&|e| matches!(e, Event::Draining(who) if old.contains(&who.worker)));
        assert_eq!((ready.len(), left.len()), (2, 2), "{}", rig.story());
        assert!(ready[0] < left[0] && ready[1] < left[1], "{}", rig.story());
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        for blocked in blocked {
            drop(blocked.await.expect("a client"));
        }
        rig.stop().await;
    }
}

async fn how_late_a_loop_is_is_known_and_user_code_sees_nothing_of_it(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for serialization in [Serialization::Json, Serialization::Advanced] {
        let rig = start(&runtime, &folder, Mode::Kernel, |s| {
            s.watchdog(Some(Duration::from_secs(2))).serialization(serialization)
        });
        rig.all_ready(2).await;
        // Nothing has to happen for a lag to be known, so it is asked for until it is there.
        let lags = async {
            loop {
                let status = rig.cluster.status().await;
                if status.iter().all(|w| w.event_loop_lag.is_some()) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(super::support::PATIENCE, lags).await.expect("lags are told");
        // What the program itself sends and gets is all there is.
        rig.worker(1).send(&"mine").await.expect("sent");
        let seen = rig.message(1, |_| true).await;
        assert_eq!(seen, serde_json::json!({ "saw": "mine" }));
        let messages = rig.events().iter().filter(|e| matches!(e, Event::Message { .. })).count();
        assert_eq!(messages, 1, "{}", rig.story());
        rig.stop().await;
    }
}

async fn a_loop_that_comes_back_in_time_stays(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let limit = Duration::from_secs(8);
    let rig = start(&runtime, &folder, Mode::Kernel, |s| s.watchdog(Some(limit)));
    rig.all_ready(2).await;
    let to = reach(&rig.listening(1).await.0);
    get(to, "/block=4600").await.expect("an answer in the end");
    rig.event("it goes on", |e| matches!(e, Event::Unblocked { .. }).then_some(())).await;
    let blocked = position(&rig, |e| matches!(e, Event::Blocked { .. }));
    assert!(blocked.is_some(), "{}", rig.story());
    assert_eq!(position(&rig, |e| matches!(e, Event::Exit { .. })), None, "{}", rig.story());
    rig.stop().await;
}

async fn a_worker_with_enough_requests_is_renewed(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::TURNS {
        let rig = start(&runtime, &folder, mode, |s| s.max_requests(Some(200)));
        rig.all_ready(2).await;
        let load = Load::start(reach(&rig.listening(1).await.0), 4, "/");
        rig.ended(1).await;
        rig.ended(2).await;
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        let told = |e: &Event| matches!(e, Event::Notice(n) if n.text.contains("requests"));
        assert!(position(&rig, told).is_some(), "{}", rig.story());
        rig.stop().await;
    }
}

async fn what_cannot_be_watched_or_counted_is_refused(runtime: Runtime) {
    let settings = || Settings::new(&runtime.path).arg("x.js");
    let refused = |settings: Settings, part: &str| match polyfork::cluster::Cluster::start(settings)
    {
        Err(StartError::Settings(text)) => assert!(text.contains(part), "{text}"),
        other => panic!("{:?}", other.err()),
    };
    let limit = Some(Duration::from_secs(1));
    refused(settings().watchdog(limit).drain_preload(false), "preload");
    refused(settings().max_requests(Some(1)).drain_preload(false), "preload");
    let python = Settings::new("/bin/sh").dialect(polyfork::cluster::Dialect::Sockets);
    refused(python.max_requests(Some(1)), "Node workers only");
}
