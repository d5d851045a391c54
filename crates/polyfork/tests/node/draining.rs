//! Workers leave under load, and nobody notices.
//!
//! Half of the clients open a connection for each request, half keep theirs; every attempt is counted.

use polyfork::cluster::{Event, Settings};

use super::client::{Load, get, reach};
use super::support::{Mode, Rig, Runtime};

const CLIENTS: usize = 8;
/// Requests answered between two disturbances, so that all states meet traffic.
const BETWEEN: u64 = 60;

async fn retired(rig: &Rig, slots: usize) {
    rig.eventually("the slots' end", |rig| {
        let retired = |e: &&_| matches!(e, Event::SlotRetired { .. });
        (rig.events().iter().filter(retired).count() >= slots).then_some(())
    })
    .await;
}

fn settings(settings: Settings) -> Settings {
    settings.env("HOST", "127.0.0.1").env("PORT", "0")
}

on_every_node! {
    no_request_fails_while_workers_are_replaced_and_their_number_changes,
    a_crash_keeps_every_socket_of_a_program,
    no_connection_is_lost_while_a_worker_closes_and_listens_again,
}

async fn no_request_fails_while_workers_are_replaced_and_their_number_changes(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::serving(&runtime, "apps/http.cjs", mode, 2, settings);
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        let load = Load::start(to, CLIENTS, "/");
        load.answered(&rig, BETWEEN).await;
        for worker in [1, 2, 3] {
            rig.worker(worker).disconnect().await;
            let ended = rig.ended(worker).await;
            assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?} {ended:?}");
            load.answered(&rig, BETWEEN).await;
        }
        rig.cluster.scale(4).await;
        rig.all_ready(4).await;
        load.answered(&rig, BETWEEN).await;
        rig.cluster.scale(1).await;
        retired(&rig, 3).await;
        load.answered(&rig, BETWEEN).await;
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{mode:?}: {counts:?}\n{}", rig.story());
        rig.stop().await;
    }
}

/// A server that closes in a worker that stays: its share goes to the others, also what was on its way.
async fn no_connection_is_lost_while_a_worker_closes_and_listens_again(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (one, two) = (rig.fork().await, rig.fork().await);
        // Not HTTP: closing such a server cuts connections that have not said anything yet.
        let serve = "
            keep.open = () => listen(keep.s = net.createServer(greeter()), 0, '127.0.0.1');
            return (await keep.open()).port;";
        let port = rig.js(one, serve).await;
        assert_eq!(rig.js(two, serve).await, port);
        let to = reach(&rig.listening(one).await.0);
        rig.listening(two).await;
        let load = Load::greeted(to, CLIENTS);
        for _ in 0..12 {
            load.answered(&rig, BETWEEN / 4).await;
            let again = rig.js(one, "await close(keep.s); return (await keep.open()).port").await;
            assert_eq!(again, port);
        }
        let counts = load.finish(&format!("{} {mode:?}", runtime.name)).await;
        assert_eq!(counts.failed(), 0, "{mode:?}: {counts:?}\n{}", rig.story());
        rig.end().await;
    }
}

/// A program of two servers dies: what comes for either of them waits for its replacement, on the same ports,
/// although that one is ready before it asks for the second.
async fn a_crash_keeps_every_socket_of_a_program(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::serving(&runtime, "two-servers.cjs", mode, 1, |s| s);
        let ports = rig.message(1, |m| m["ports"].is_array()).await;
        for worker in [1, 2] {
            rig.worker(worker).kill(9).await;
            rig.ended(worker).await;
            for port in ports["ports"].as_array().expect("two ports") {
                let port = port.as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port");
                let answer = get(([127, 0, 0, 1], port).into(), "/").await;
                let pid = rig.pid(worker + 1).await;
                assert_eq!(answer.expect("it waits").text(), pid.to_string(), "{mode:?}");
            }
            assert_eq!(rig.message(worker + 1, |m| m["ports"].is_array()).await, ports, "{mode:?}");
        }
        rig.stop().await;
    }
}
