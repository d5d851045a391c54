//! Workers are asked whether they answer: who never did gets no connection, who does not any more is replaced.

use std::fs;
use std::time::Duration;

use polyfork::cluster::{Event, Probe, Ready, Reason, Settings, StartError};
use tempfile::TempDir;

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, Runtime, play};

/// Well only once it was asked three times; ill from `/ill` on. Tells who asked.
const SERVER: &str = "
    let asked = 0, ill = false;
    require('http').createServer((request, response) => {
        if (request.url === '/health') {
            asked += 1;
            response.statusCode = ill || asked < 3 ? 503 : 204;
            return response.end();
        }
        if (request.url === '/ill') ill = true;
        response.end(JSON.stringify({ pid: process.pid, asked }));
    }).listen(process.env.SOCKET || 0, '127.0.0.1');";

/// The same for a runtime whose programs are modules.
const MODULE: &str = "
    import http from 'node:http';
    import process from 'node:process';
    let asked = 0, ill = false;
    http.createServer((request, response) => {
        if (request.url === '/health') {
            asked += 1;
            response.statusCode = ill || asked < 3 ? 503 : 204;
            return response.end();
        }
        if (request.url === '/ill') ill = true;
        response.end(JSON.stringify({ pid: process.pid, asked }));
    }).listen(0, '127.0.0.1');";

/// Connections of Deno's workers are handed over, and so are probes.
#[test]
fn a_deno_worker_is_ready_once_it_answers_and_replaced_when_it_does_not() {
    play(module_path!(), "deno", async |runtime| {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("app.mjs");
        fs::write(&program, MODULE).expect("written");
        let program = program.to_str().expect("UTF-8");
        for text in ["/health", "tcp"] {
            let probed = |s: Settings| s.probe(Some(probe(text)));
            let rig = Rig::serving(&runtime, program, Mode::Handoff, 2, probed);
            rig.all_ready(2).await;
            let to = reach(&rig.listening(1).await.0);
            if text == "/health" {
                let ill = get(to, "/ill").await.expect("an answer").json();
                assert!(ill["asked"].as_u64() >= Some(3), "{ill}\n{}", rig.story());
                let old = if ill["pid"] == rig.pid(1).await { 1 } else { 2 };
                let load = Load::short(to, 2, "/");
                assert_eq!(rig.ended(old).await.reason, Reason::ProbeFailed, "{}", rig.story());
                let counts = load.finish("deno").await;
                assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
            }
            assert!(get(to, "/").await.is_ok(), "{text}");
            rig.end().await;
        }
    });
}

/// Bun binds for itself: a probe cannot be brought to one of its workers, and that is said before anything starts.
#[test]
fn probing_workers_of_bun_is_refused() {
    play(module_path!(), "bun", async |runtime| {
        for text in ["/health", "tcp"] {
            let settings = Settings::new(&runtime.path).arg("x.js").probe(Some(probe(text)));
            match polyfork::cluster::Cluster::start(settings) {
                Err(StartError::Settings(text)) => {
                    assert!(text.contains("probe them from outside"), "{text}");
                }
                other => panic!("{:?}", other.err()),
            }
        }
    });
}

on_nodes_20_and_26! {
    a_worker_is_ready_once_it_answers_its_probe,
    a_worker_that_fails_its_probes_is_replaced_and_no_other,
    probes_reach_workers_on_a_unix_path,
    what_cannot_be_probed_is_refused,
}

fn probe(text: &str) -> Probe {
    let probe: Probe = text.parse().expect("a probe");
    probe.interval(Duration::from_millis(100)).timeout(Duration::from_secs(10)).failures(3)
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

async fn a_worker_is_ready_once_it_answers_its_probe(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::ALL {
        let rig = start(&runtime, &folder, mode, |s| s.probe(Some(probe("/health"))));
        rig.all_ready(2).await;
        let answer = get(reach(&rig.listening(1).await.0), "/").await.expect("an answer").text();
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        assert!(answer["asked"].as_u64() >= Some(3), "{answer} {mode:?}\n{}", rig.story());
        rig.stop().await;
    }
}

async fn a_worker_that_fails_its_probes_is_replaced_and_no_other(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    for mode in Mode::ALL {
        let rig = start(&runtime, &folder, mode, |s| s.probe(Some(probe("http://x/health"))));
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let ill = get(to, "/ill").await.expect("an answer").text();
        let ill: serde_json::Value = serde_json::from_str(&ill).expect("JSON");
        let old = if ill["pid"] == rig.pid(1).await { 1 } else { 2 };
        let load = Load::start(to, 2, "/");
        assert_eq!(rig.ended(old).await.reason, Reason::ProbeFailed, "{}", rig.story());
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        let ends = rig.events().iter().filter(|e| matches!(e, Event::Exit { .. })).count();
        assert_eq!(ends, 1, "{mode:?}\n{}", rig.story());
        rig.stop().await;
    }
}

async fn probes_reach_workers_on_a_unix_path(runtime: Runtime) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    for text in ["/health", "tcp"] {
        let rig = start(&runtime, &folder, Mode::Handoff, |s| {
            s.env("SOCKET", &path).probe(Some(probe(text))).ready(Ready::Probe)
        });
        rig.all_ready(2).await;
        rig.stop().await;
    }
}

async fn what_cannot_be_probed_is_refused(runtime: Runtime) {
    let refused = |settings: Settings, part: &str| match polyfork::cluster::Cluster::start(settings)
    {
        Err(StartError::Settings(text)) => assert!(text.contains(part), "{text}"),
        other => panic!("{:?}", other.err()),
    };
    refused(Settings::new(&runtime.path).arg("x.js").ready(Ready::Probe), "needs a probe");
    let sockets = || {
        let sh = Settings::new("/bin/sh").dialect(polyfork::cluster::Dialect::Sockets);
        sh.probe(Some(probe("tcp")))
    };
    refused(sockets(), "--listen");
    let address = |text: &str| text.parse().expect("an address");
    let shared = sockets().policy(polyfork::cluster::Policy::Shared);
    refused(shared.listen(address("127.0.0.1:0")), "share one socket");
    let folder = tempfile::tempdir().expect("a folder");
    let path = format!("unix:{}", folder.path().join("socket").display());
    refused(sockets().listen(address(&path)), "cannot be brought to one worker");
}
