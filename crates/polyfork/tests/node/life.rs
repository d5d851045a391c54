//! A worker's life: events and their order, identity, environment, messages.
//!
//! How it ends is in `leaving`, where it listens in `listening`.

use polyfork::cluster::Event;
use serde_json::json;

use super::client::{get, reach};
use super::support::{Mode, Rig};

on_every_node! {
    /// fork, online, listening, then disconnect and exit; with the right arguments, and the state follows.
    async fn events_come_in_nodes_order_with_nodes_arguments(runtime) {
        let rig = Rig::actors(&runtime, Mode::Kernel);
        let (one, two) = (rig.fork().await, rig.fork().await);
        assert_eq!((one, two), (1, 2), "ids count from 1");
        rig.online(one).await;
        assert_eq!(rig.life_of(one), ["fork", "online"]);
        let status = rig.cluster.status().await;
        assert!(status.iter().all(|w| w.connected && w.pid != std::process::id()), "{status:?}");

        let address = rig
            .js(one, "keep.s = http.createServer(counter()); return listen(keep.s, 0, '127.0.0.1')")
            .await;
        let (told, carried) = rig.listening(one).await;
        assert!(Mode::Kernel.is(carried), "{carried:?}");
        assert_eq!(u64::from(reach(&told).port()), address["port"], "the real port, not 0");
        assert_eq!(get(reach(&told), "/").await.expect("an answer").text(), "1");

        rig.worker(one).disconnect().await;
        let ended = rig.ended(one).await;
        assert_eq!((ended.code, ended.signal, ended.voluntary), (Some(0), None, true));
        let life = rig.life_of(one);
        assert_eq!(life[..3], ["fork", "online", "listening"]);
        assert!(life[3..] == ["disconnect", "exit"] || life[3..] == ["exit", "disconnect"], "{life:?}");
        let status = rig.cluster.status().await;
        assert_eq!(status.iter().map(|w| w.worker).collect::<Vec<_>>(), [two], "the dead are gone");
        assert!(matches!(rig.events()[0], Event::Setup { .. }), "setup comes first");
        rig.end().await;
    }

    async fn a_worker_knows_who_it_is(runtime) {
        let rig = Rig::actors(&runtime, Mode::Handoff);
        let one = rig.fork_with([("NODE_OPTIONS", "--stack-trace-limit=33"), ("COLOUR", "blue")]).await;
        let two = rig.fork().await;
        let code = "return {
            isWorker: cluster.isWorker, isPrimary: cluster.isPrimary, id: cluster.worker.id,
            unique: process.env.NODE_UNIQUE_ID ?? null, fd: process.env.NODE_CHANNEL_FD ?? null,
            mode: process.env.NODE_CHANNEL_SERIALIZATION_MODE ?? null,
            instance: process.env.NODE_APP_INSTANCE, options: process.env.NODE_OPTIONS ?? null,
            limit: Error.stackTraceLimit, colour: process.env.COLOUR ?? null,
            ours: Object.keys(process.env).filter((key) => key.startsWith('POLYFORK')),
            connected: process.connected && cluster.worker.isConnected(), dead: cluster.worker.isDead(),
            leaving: cluster.worker.exitedAfterDisconnect ?? null }";
        let mut expected = json!({
            "isWorker": true, "isPrimary": false, "id": 1, "unique": null, "fd": null, "mode": null,
            "instance": "0", "options": "--stack-trace-limit=33", "limit": 33, "colour": "blue",
            "ours": [], "connected": true, "dead": false, "leaving": null,
        });
        assert_eq!(rig.js(one, code).await, expected);
        expected["id"] = json!(2);
        expected["instance"] = json!("1");
        expected["options"] = json!(null);
        expected["limit"] = json!(10);
        expected["colour"] = json!(null);
        assert_eq!(rig.js(two, code).await, expected);
        rig.end().await;
    }
}
