//! Deno and Bun as workers: what they can, by the mechanism that suits them.

use std::collections::BTreeSet;

use polyfork::cluster::{Carried, Event, Settings};
use serde_json::json;

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, own_host, play};

fn settings(settings: Settings) -> Settings {
    settings.env("HOST", "127.0.0.1").env("PORT", "0")
}

/// Deno accepts on no socket that it is given, so connections are handed to it, in exact turns.
#[test]
fn deno_is_served_by_handing_over_whatever_was_asked_for() {
    play(module_path!(), "deno", async |runtime| {
        for mode in Mode::ALL {
            let rig = Rig::serving(&runtime, "apps/deno.ts", mode, 2, settings);
            rig.all_ready(2).await;
            let (address, carried) = rig.listening(1).await;
            assert_eq!(carried, Carried::Handoff, "{mode:?}");
            let mut workers = Vec::new();
            for _ in 0..10 {
                let answer = get(reach(&address), "/").await.expect("answered").json();
                workers.push(answer["worker"].as_u64().expect("cluster.worker.id"));
            }
            workers.sort_unstable();
            assert_eq!(workers, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2], "{mode:?}");
            rig.end().await;
        }
    });
}

#[test]
fn deno_talks_and_leaves_as_node_does() {
    play(module_path!(), "deno", async |runtime| {
        let rig = Rig::actors(&runtime, Mode::Handoff);
        let worker = rig.fork().await;
        let code = "return { worker: cluster.isWorker, id: cluster.worker.id, instance: process.env.NODE_APP_INSTANCE }";
        assert_eq!(rig.js(worker, code).await, json!({ "worker": true, "id": 1, "instance": "0" }));
        let listen = "keep.s = http.createServer(counter()); return (await listen(keep.s, 0, '127.0.0.1')).port";
        let port = rig.js(worker, listen).await;
        let (address, _) = rig.listening(worker).await;
        assert_eq!(port, reach(&address).port());
        rig.worker(worker).disconnect().await;
        let ended = rig.ended(worker).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true));
        rig.end().await;
    });
}

/// A worker that goes while others serve: short connections lose nothing.
#[test]
fn deno_workers_are_replaced_under_load() {
    play(module_path!(), "deno", async |runtime| {
        let rig = Rig::serving(&runtime, "apps/deno.ts", Mode::Handoff, 2, settings);
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let load = Load::short(to, 4, "/");
        load.answered(&rig, 40).await;
        for worker in [1, 2] {
            rig.worker(worker).disconnect().await;
            rig.ended(worker).await;
            load.answered(&rig, 40).await;
        }
        let counts = load.finish("deno").await;
        assert_eq!(counts.failed(), 0, "{counts:?}\n{}", rig.story());
        rig.end().await;
    });
}

/// Bun binds for itself, with Bun.serve and with node:http; the primary only watches.
#[test]
fn bun_binds_for_itself_and_is_ready_when_it_listens() {
    play(module_path!(), "bun", async |runtime| {
        for program in ["apps/bun.ts", "apps/http.cjs"] {
            let host = own_host();
            let free = std::net::TcpListener::bind((host, 0)).expect("a port");
            let port = free.local_addr().expect("its number").port();
            drop(free);
            let rig = Rig::serving(&runtime, program, Mode::Kernel, 2, |s| {
                s.env("HOST", host.to_string()).env("PORT", port.to_string())
            });
            rig.all_ready(2).await;
            for worker in [1, 2] {
                let (address, carried) = rig.listening(worker).await;
                assert_eq!(
                    (reach(&address).port(), carried),
                    (port, Carried::OwnSocket),
                    "{program}"
                );
            }
            let bound = |e: &_| matches!(e, Event::Bound { .. });
            assert!(!rig.events().iter().any(bound), "{program}: the primary does not listen");
            let mut workers = BTreeSet::new();
            // The kernel spreads by a hash: not exact, but a worker without any would be no luck.
            while workers.len() < 2 {
                let answer = get((host, port).into(), "/").await.expect("answered");
                workers.insert(answer.json()["worker"].as_u64());
            }
            rig.stop().await;
        }
    });
}
