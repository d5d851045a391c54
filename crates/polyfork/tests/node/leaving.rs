//! How a worker leaves: asked by the primary, by its own wish, by accident; and with which code.
//!
//! Leaving under load is in `draining`.

use polyfork::cluster::{Event, Reason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::{get, greeting, reach};
use super::support::{Ended, Mode, Rig, Runtime};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// A worker that listens, and how to reach it.
async fn listening_worker(rig: &Rig) -> (u64, std::net::SocketAddr) {
    let worker = rig.fork().await;
    rig.js(worker, "keep.s = net.createServer(greeter()); await listen(keep.s, 0, '127.0.0.1')")
        .await;
    let (address, _) = rig.listening(worker).await;
    (worker, reach(&address))
}

/// Runs `code` in a worker that listens, and gives how the worker ended.
async fn ended_by(runtime: &Runtime, mode: Mode, code: &str) -> Ended {
    let rig = Rig::actors(runtime, mode);
    let (worker, _) = listening_worker(&rig).await;
    rig.start_js(worker, code).await;
    let ended = rig.ended(worker).await;
    assert_one_end(&rig, worker);
    rig.end().await;
    ended
}

/// One `disconnect` and one `exit`, last of all.
fn assert_one_end(rig: &Rig, worker: u64) {
    let life = rig.life_of(worker);
    let mut end = life[life.len() - 2..].to_vec();
    end.sort_unstable();
    assert_eq!(end, ["disconnect", "exit"], "{life:?}");
    assert_eq!(life.iter().filter(|name| **name == "exit").count(), 1, "{life:?}");
}

on_every_node! {
    a_worker_that_ends_itself_is_told_apart_by_code_and_wish,
    a_worker_asked_to_leave_knows_and_chooses_its_code,
    a_workers_own_disconnect_waits_for_the_primary,
    a_worker_asked_to_leave_finishes_its_connections,
    signals_end_a_worker_even_a_busy_one,
    the_whole_cycle_can_be_repeated,
    all_may_leave_at_once,
    leaving_and_starting_on_the_same_sockets_do_not_meet,
    leaving_during_a_connection_leaks_no_socket,
    stopping_the_cluster_lets_idle_workers_go,
    references_to_a_server_hold_the_worker_as_under_node,
    a_worker_may_leave_in_its_error_handler,
}

/// By its own wish: voluntary, code 0, whichever way it says so. By accident: not voluntary, its own code.
async fn a_worker_that_ends_itself_is_told_apart_by_code_and_wish(runtime: Runtime) {
    let voluntary = |code| (Some(code), None, true);
    let other = |code| (Some(code), None, false);
    let table = [
        ("cluster.worker.disconnect()", voluntary(0)),
        ("cluster.worker.kill()", voluntary(0)),
        ("cluster.worker.destroy()", voluntary(0)),
        ("cluster.worker.destroy(); cluster.worker.disconnect()", voluntary(0)),
        (
            "cluster.worker.on('disconnect', () => cluster.worker.destroy()); cluster.worker.disconnect()",
            voluntary(0),
        ),
        ("process.disconnect()", other(0)),
        ("process.exit(42)", other(42)),
        ("process.exitCode = 3; process.disconnect()", other(0)),
        ("setImmediate(() => { throw new Error('not caught') })", other(1)),
        ("process.kill(process.pid, 'SIGKILL')", (None, Some(SIGKILL), false)),
    ];
    for (turn, (code, expected)) in table.into_iter().enumerate() {
        let ended = ended_by(&runtime, Mode::ALL[turn % 3], code).await;
        assert_eq!((ended.code, ended.signal, ended.voluntary), expected, "{code}: {ended:?}");
    }
}

/// The worker hears of it as under Node's own primary, and may choose its code.
async fn a_worker_asked_to_leave_knows_and_chooses_its_code(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (worker, _) = listening_worker(&rig).await;
        let code = "cluster.worker.once('disconnect', () => {
            process.exit(cluster.worker.exitedAfterDisconnect === true && !process.connected
                && !cluster.worker.isConnected() ? 42 : 1); })";
        rig.js(worker, code).await;
        rig.worker(worker).disconnect().await;
        let ended = rig.ended(worker).await;
        assert_eq!((ended.code, ended.voluntary), (Some(42), true), "{mode:?}");
        assert_eq!(ended.reason, Reason::Asked);
        assert_one_end(&rig, worker);
        rig.end().await;
    }
}

/// Its own `disconnect` event comes only after the primary has heard of it.
async fn a_workers_own_disconnect_waits_for_the_primary(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    for _ in 0..4 {
        let worker = rig.fork().await;
        rig.start_js(worker, "
            process.on('disconnect', () => { process.exitCode = cluster.worker.exitedAfterDisconnect ? 0 : 9 });
            cluster.worker.disconnect();").await;
        let ended = rig.ended(worker).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true));
    }
    rig.end().await;
}

/// A connection is finished however long that takes; new ones go elsewhere; it ends when the last does.
async fn a_worker_asked_to_leave_finishes_its_connections(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let echo =
            "keep.s = net.createServer((c) => { c.write(`${cluster.worker.id}`); c.pipe(c) });
            await listen(keep.s, 0, '127.0.0.1')";
        let first = rig.fork().await;
        rig.js(first, echo).await;
        let to = reach(&rig.listening(first).await.0);
        let mut client = TcpStream::connect(to).await.expect("connected");
        assert_eq!(client.read_u8().await.expect("its id"), b'1');
        let second = rig.fork().await;
        rig.js(second, echo).await;
        rig.listening(second).await;

        rig.worker(first).disconnect().await;
        rig.event("draining", |e| {
            matches!(e, Event::Draining(w) if w.worker == first).then_some(())
        })
        .await;
        rig.eventually("word of it", |rig| rig.life_of(first).contains(&"listening").then_some(()))
            .await;
        for _ in 0..6 {
            let mut other = TcpStream::connect(to).await.expect("connected");
            assert_eq!(
                other.read_u8().await.expect("its id"),
                b'2',
                "{mode:?}: nothing new for the first"
            );
        }
        client.write_all(b"x").await.expect("written");
        assert_eq!(client.read_u8().await.expect("still served"), b'x');
        assert!(!rig.life_of(first).contains(&"exit"), "it waits for its connection");
        drop(client);
        let ended = rig.ended(first).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?}");
        rig.end().await;
    }
}

async fn signals_end_a_worker_even_a_busy_one(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let (idle, busy) = (rig.fork().await, rig.fork().await);
    rig.js(busy, "setImmediate(() => { for (;;); })").await;
    rig.worker(busy).kill(SIGTERM).await;
    let ended = rig.ended(busy).await;
    assert_eq!((ended.code, ended.signal, ended.voluntary), (None, Some(SIGTERM), false));
    rig.js(idle, "return 0").await;
    rig.worker(idle).kill(SIGKILL).await;
    let ended = rig.ended(idle).await;
    assert_eq!((ended.code, ended.signal, ended.voluntary), (None, Some(SIGKILL), false));
    assert_one_end(&rig, idle);
    // Whoever asks again asks nobody.
    rig.worker(idle).kill(SIGKILL).await;
    rig.worker(idle).disconnect().await;
    rig.worker(idle).disconnect().await;
    let refused = rig.worker(idle).send(&1).await.expect_err("nobody to send to");
    assert!(matches!(refused, polyfork::cluster::SendError::NoSuchWorker), "{refused}");
    rig.end().await;
}

/// Several workers with two servers each serve, leave cleanly, and all of it once more.
async fn the_whole_cycle_can_be_repeated(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        for _ in 0..2 {
            let workers = rig.fork_many(3).await;
            let mut ports = Vec::new();
            for worker in &workers {
                let two = rig.js(*worker, "
                    keep.a = net.createServer(greeter()); keep.b = http.createServer(counter());
                    return [(await listen(keep.a, 0, '127.0.0.1')).port, (await listen(keep.b, 0, '127.0.0.1')).port]").await;
                ports.push(two);
            }
            assert!(
                ports.iter().all(|p| *p == ports[0]) && ports[0][0] != ports[0][1],
                "{ports:?}"
            );
            let at = |n: usize| {
                let port =
                    ports[0][n].as_u64().and_then(|p| u16::try_from(p).ok()).expect("a port");
                std::net::SocketAddr::from(([127, 0, 0, 1], port))
            };
            for worker in &workers {
                rig.listening(*worker).await;
            }
            for _ in 0..6 {
                greeting(at(0)).await.expect("greeted");
                get(at(1), "/").await.expect("answered");
            }
            for worker in &workers {
                rig.worker(*worker).disconnect().await;
            }
            for worker in &workers {
                let ended = rig.ended(*worker).await;
                assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?}");
            }
            assert!(rig.cluster.status().await.is_empty());
        }
        rig.end().await;
    }
}

/// Half are told by the primary, half leave by themselves, all at the same moment.
async fn all_may_leave_at_once(runtime: Runtime) {
    for mode in Mode::TURNS {
        let rig = Rig::actors(&runtime, mode);
        let workers = rig.fork_many(4).await;
        for worker in &workers {
            rig.js(
                *worker,
                "keep.s = net.createServer(greeter()); await listen(keep.s, 0, '127.0.0.1')",
            )
            .await;
        }
        for (turn, worker) in workers.iter().enumerate() {
            if turn % 2 == 0 {
                rig.worker(*worker).disconnect().await;
            } else {
                rig.start_js(*worker, "cluster.worker.destroy()").await;
            }
            rig.worker(*worker).disconnect().await;
        }
        for worker in &workers {
            let ended = rig.ended(*worker).await;
            assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?}\n{}", rig.story());
        }
        rig.end().await;
    }
}

/// One leaves while another, on the same sockets, starts; one never listened at all.
async fn leaving_and_starting_on_the_same_sockets_do_not_meet(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (first, to) = listening_worker(&rig).await;
        let idle = rig.fork().await;
        rig.js(first, "keep.u = dgram.createSocket('udp4'); await listen(keep.u, 0, '127.0.0.1')")
            .await;
        let next = rig.fork().await;
        let call = rig.start_js(next, "
            keep.s = net.createServer(greeter()); keep.u = dgram.createSocket('udp4');
            await listen(keep.u, 0, '127.0.0.1'); return (await listen(keep.s, 0, '127.0.0.1')).port").await;
        rig.worker(first).disconnect().await;
        rig.worker(idle).disconnect().await;
        assert_eq!(rig.answer(next, call).await.expect("listens"), to.port());
        rig.listening(next).await;
        for worker in [first, idle] {
            let ended = rig.ended(worker).await;
            assert_eq!((ended.code, ended.voluntary), (Some(0), true), "{mode:?}");
        }
        for _ in 0..4 {
            assert_eq!(greeting(to).await.expect("served"), next.to_string(), "{mode:?}");
        }
        rig.end().await;
    }
}

/// Both leave during a live connection: both end well, and in the end the socket is gone.
async fn leaving_during_a_connection_leaks_no_socket(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Shared);
    let (first, to) = listening_worker(&rig).await;
    let second = rig.fork().await;
    rig.js(second, "keep.s = net.createServer(greeter()); await listen(keep.s, 0, '127.0.0.1')")
        .await;
    for worker in [first, second] {
        rig.js(worker, "keep.s.removeAllListeners('connection'); keep.s.on('connection', (c) => { c.write('h'); c.resume(); })").await;
    }
    let mut client = TcpStream::connect(to).await.expect("connected");
    assert_eq!(client.read_u8().await.expect("served"), b'h');
    rig.worker(first).disconnect().await;
    rig.worker(second).disconnect().await;
    rig.eventually("word of both", |rig| {
        let draining = |e: &&_| matches!(e, Event::Draining(_));
        (rig.events().iter().filter(draining).count() == 2).then_some(())
    })
    .await;
    drop(client);
    for worker in [first, second] {
        let ended = rig.ended(worker).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true));
    }
    rig.event("the socket's end", |e| matches!(e, Event::Closed { .. }).then_some(())).await;
    rig.end().await;
}

/// `stop` is `cluster.disconnect()`: idle workers go, and the table is empty afterwards.
async fn stopping_the_cluster_lets_idle_workers_go(runtime: Runtime) {
    let rig = Rig::actors(&runtime, Mode::Kernel);
    let workers = rig.fork_many(2).await;
    let first = workers[0];
    rig.online(first).await;
    rig.worker(first).disconnect().await; // and the whole cluster before it is gone
    rig.cluster.stop().await;
    for worker in workers {
        let ended = rig.ended(worker).await;
        assert_eq!((ended.code, ended.voluntary), (Some(0), true));
    }
    rig.cluster.wait().await;
    assert!(rig.cluster.status().await.is_empty());
    rig.stop().await;
}

/// Handed connections keep nothing alive; the open server does, and `unref` lets go of it.
async fn references_to_a_server_hold_the_worker_as_under_node(runtime: Runtime) {
    for mode in Mode::ALL {
        let rig = Rig::actors(&runtime, mode);
        let (worker, to) = listening_worker(&rig).await;
        rig.js(worker, "keep.s.unref(); keep.s.ref(); process.channel.unref()").await;
        assert_eq!(greeting(to).await.expect("the server keeps it alive"), "1");
        // Without its server nothing holds it.
        rig.start_js(worker, "keep.s.close()").await;
        assert_eq!(rig.ended(worker).await.code, Some(0), "{mode:?}");

        let (worker, _) = listening_worker(&rig).await;
        rig.start_js(worker, "process.channel.unref(); keep.s.unref()").await;
        assert_eq!(rig.ended(worker).await.code, Some(0), "{mode:?}");
        rig.end().await;
    }
}

/// A worker that wants to listen, cannot, and leaves in its error handler.
async fn a_worker_may_leave_in_its_error_handler(runtime: Runtime) {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its number").port();
    let rig = Rig::actors(&runtime, Mode::Handoff);
    let worker = rig.fork().await;
    rig.start_js(worker, &format!("
        const s = net.createServer(); s.on('error', (e) => {{ process.send(e.code); cluster.worker.disconnect(); }});
        s.listen({port}, '127.0.0.1')")).await;
    rig.message(worker, |m| m == "EADDRINUSE").await;
    let ended = rig.ended(worker).await;
    assert_eq!((ended.code, ended.voluntary), (Some(0), true));
    // An error thrown there is the program's own, uncaught as any other.
    let worker = rig.fork().await;
    rig.start_js(
        worker,
        &format!(
            "
        process.on('uncaughtException', (e) => process.exit(e.message === 'own' ? 42 : 1));
        const s = net.createServer(); s.on('error', () => {{ throw new Error('own'); }});
        s.listen({port}, '127.0.0.1')"
        ),
    )
    .await;
    assert_eq!(rig.ended(worker).await.code, Some(42));
    rig.end().await;
}
