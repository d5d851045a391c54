//! Reloads under load: the new version takes over without a lost request, and a bad one never does.
//!
//! Half of the clients open a connection for each request, half keep theirs; every attempt is counted. The program is a
//! file that changes under the running cluster, as a deployment does it. `POLYFORK_RELOADS=20` makes it long.

use std::fs;
use std::time::Duration;

use polyfork::cluster::{Event, ReloadError, ReloadOptions, ReloadReport};
use tempfile::TempDir;

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, Runtime};

const CLIENTS: usize = 8;
const BETWEEN: u64 = 60;

on_every_node! {
    reloads_under_load_lose_nothing,
    a_bad_version_never_takes_over,
}

on_nodes_20_and_26! {
    a_rolling_reload_replaces_them_one_by_one,
    changed_settings_take_effect_and_one_reload_is_under_way_at_a_time,
    a_slow_request_is_finished_by_the_old_worker,
}

fn reloads() -> u32 {
    std::env::var("POLYFORK_RELOADS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// A server that answers with its version.
fn version(folder: &TempDir, body: &str) {
    let server = format!(
        "const http = require('http');\n\
         const answer = (request, response) => {{ {body} }};\n\
         http.createServer(answer).listen(0, '127.0.0.1');\n"
    );
    replace(folder, &server);
}

/// As a deployment does it: nobody ever reads half a file.
fn replace(folder: &TempDir, text: &str) {
    let (new, program) = (folder.path().join("new"), folder.path().join("app.cjs"));
    fs::write(&new, text).expect("written");
    fs::rename(new, program).expect("renamed");
}

fn start(runtime: &Runtime, folder: &TempDir, mode: Mode, workers: u32) -> Rig {
    let program = folder.path().join("app.cjs");
    Rig::serving(runtime, program.to_str().expect("UTF-8"), mode, workers, |settings| {
        settings.grace(Duration::from_secs(20)).ready_timeout(Some(Duration::from_secs(40)))
    })
}

fn quick() -> ReloadOptions {
    ReloadOptions::new().probation(Duration::ZERO)
}

fn lost_nothing(report: &ReloadReport, rig: &Rig) {
    assert_eq!((report.refused, report.reset), (0, 0), "{report:?}\n{}", rig.story());
}

async fn reloads_under_load_lose_nothing(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::ALL {
        version(&folder, "response.end('0')");
        let rig = start(&runtime, &folder, mode, 2);
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let load = Load::start(to, CLIENTS, "/");
        for number in 1..=reloads() {
            load.answered(&rig, BETWEEN).await;
            version(&folder, &format!("response.end('{number}')"));
            let report = rig.cluster.reload(quick()).await.expect("reloaded");
            assert_eq!((report.generation, report.workers), (number + 1, 2));
            lost_nothing(&report, &rig);
            let answer = get(to, "/").await.expect("an answer").text();
            assert_eq!(answer, number.to_string(), "{mode:?}");
        }
        load.answered(&rig, BETWEEN).await;
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{mode:?}: {counts:?}\n{}", rig.story());
        rig.stop().await;
    }
}

/// The workers that serve.
async fn ready(rig: &Rig) -> Vec<u64> {
    let workers = rig.cluster.status().await.into_iter();
    workers.filter(|worker| worker.state == "ready").map(|worker| worker.worker).collect()
}

async fn a_bad_version_never_takes_over(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let bad = [
        ("exits at once", "process.exit(3);"),
        ("a syntax error", "const = 1;"),
        ("never ready", "setInterval(() => {}, 1000);"),
        (
            "dies in probation",
            "require('http').createServer().listen(0, '127.0.0.1', () => \
                                process.exit(4));",
        ),
    ];
    for mode in Mode::TURNS {
        version(&folder, "response.end('good')");
        let program = folder.path().join("app.cjs");
        let rig = Rig::serving(&runtime, program.to_str().expect("UTF-8"), mode, 2, |settings| {
            settings.ready_timeout(Some(Duration::from_secs(3)))
        });
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        // A busy machine may need more than the time that one has to get ready, and then there was another.
        let good = ready(&rig).await;
        let load = Load::start(to, CLIENTS, "/");
        for (what, text) in bad {
            load.answered(&rig, BETWEEN).await;
            replace(&folder, text);
            let error = rig.cluster.reload(ReloadOptions::new()).await.expect_err(what);
            let ReloadError::Failed { who, replaced: 0, .. } = error else {
                panic!("{what}: {error}");
            };
            assert!(!good.contains(&who.worker) && who.pid > 0, "{what}: {error}");
            assert_eq!(ready(&rig).await, good, "{what}");
        }
        version(&folder, "response.end('better')");
        rig.cluster.reload(quick()).await.expect("the next good one");
        assert_eq!(get(to, "/").await.expect("an answer").text(), "better");
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{mode:?}: {counts:?}\n{}", rig.story());
        rig.stop().await;
    }
}

async fn a_rolling_reload_replaces_them_one_by_one(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    version(&folder, "response.end('old')");
    let rig = start(&runtime, &folder, Mode::Kernel, 3);
    rig.all_ready(3).await;
    let load = Load::start(reach(&rig.listening(1).await.0), CLIENTS, "/");
    let report = rig.cluster.reload(quick().at_a_time(1)).await.expect("reloaded");
    assert_eq!(report.workers, 3);
    lost_nothing(&report, &rig);
    // Never more than one too many.
    let (mut living, mut most) = (0, 0);
    for event in rig.events().iter() {
        match event {
            Event::Fork(_) => living += 1,
            Event::Exit { .. } => living -= 1,
            _ => {}
        }
        most = most.max(living);
    }
    assert_eq!(most, 4, "{}", rig.story());
    let counts = load.finish(runtime.name).await;
    assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
    rig.stop().await;
}

async fn changed_settings_take_effect_and_one_reload_is_under_way_at_a_time(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    version(&folder, "response.end(process.env.COLOUR ?? 'none')");
    let rig = start(&runtime, &folder, Mode::Kernel, 1);
    rig.all_ready(1).await;
    let to = reach(&rig.listening(1).await.0);
    assert_eq!(get(to, "/").await.expect("an answer").text(), "none");
    let settings = rig.cluster.settings().await.expect("settings").env("COLOUR", "green");
    let slow = ReloadOptions::new().settings(settings).probation(Duration::from_millis(300));
    let (first, second) =
        tokio::join!(rig.cluster.reload(slow), rig.cluster.reload(ReloadOptions::new()));
    first.expect("the first one wins");
    assert_eq!(second, Err(ReloadError::Busy { generation: 2 }));
    assert_eq!(get(to, "/").await.expect("an answer").text(), "green");
    // A worker that is replaced later has them, too.
    rig.worker(2).kill(9).await;
    rig.ended(2).await;
    assert_eq!(get(to, "/").await.expect("an answer").text(), "green");
    rig.stop().await;
}

async fn a_slow_request_is_finished_by_the_old_worker(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    version(&folder, "process.send('asked'); process.once('message', () => response.end('old'))");
    let rig = start(&runtime, &folder, Mode::Kernel, 1);
    rig.all_ready(1).await;
    let to = reach(&rig.listening(1).await.0);
    let asked = tokio::spawn(async move { get(to, "/").await });
    rig.message(1, |message| message == "asked").await;
    version(&folder, "response.end('new')");
    let cluster = rig.cluster.clone();
    let reload = tokio::spawn(async move { cluster.reload(quick()).await });
    rig.event("the switch", |event| matches!(event, Event::Switched { .. }).then_some(())).await;
    assert_eq!(get(to, "/").await.expect("an answer").text(), "new");
    rig.worker(1).send("go on").await.expect("sent");
    assert_eq!(asked.await.expect("no panic").expect("an answer").text(), "old");
    reload.await.expect("no panic").expect("reloaded");
    rig.stop().await;
}
