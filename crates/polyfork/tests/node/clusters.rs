//! Several clusters at once, and primaries that end.

use rustix::process::Signal;
use serde_json::json;

use polyfork::cluster::{Event, Outcome, Settings};

use super::client::{get, greeting, reach};
use super::remote::{Remote, all_ended, pids};
use super::support::{Mode, PATIENCE, Rig, Runtime, own_host};

on_every_node! {
    clusters_of_one_process_do_not_know_of_each_other,
    two_clusters_cannot_own_one_port,
    a_cluster_whose_port_is_taken_ends_with_the_reason,
    workers_end_with_their_primary,
}

async fn clusters_of_one_process_do_not_know_of_each_other(runtime: Runtime) {
    let rigs = [Mode::Kernel, Mode::Handoff, Mode::Shared, Mode::Kernel].map(|mode| {
        Rig::serving(&runtime, "apps/http.cjs", mode, 2, |s: Settings| {
            s.env("HOST", "127.0.0.1").env("PORT", "0")
        })
    });
    let mut seen = std::collections::BTreeSet::new();
    for rig in &rigs {
        rig.all_ready(2).await;
        let to = reach(&rig.listening(1).await.0);
        assert!(seen.insert(to), "a port of its own");
        let pids = [rig.pid(1).await, rig.pid(2).await];
        for _ in 0..4 {
            let pid = get(to, "/").await.expect("answered").json()["pid"].as_u64();
            assert!(pids.iter().any(|p| Some(u64::from(*p)) == pid), "one of its own workers");
        }
    }
    for rig in rigs {
        rig.stop().await;
    }
}

/// The second gets "address in use", whatever the mechanisms, and the first is not hurt.
async fn two_clusters_cannot_own_one_port(runtime: Runtime) {
    for first in Mode::ALL {
        let rig = Rig::actors(&runtime, first);
        let worker = rig.fork().await;
        rig.js(
            worker,
            "keep.s = net.createServer(greeter()); await listen(keep.s, 0, '127.0.0.1')",
        )
        .await;
        let to = reach(&rig.listening(worker).await.0);
        let second = Mode::ALL.into_iter().map(|mode| (mode, Rig::actors(&runtime, mode)));
        for (mode, other) in second {
            let worker = other.fork().await;
            let port = to.port();
            let error = other
                .try_js(worker, &format!("return listen(net.createServer(), {port}, '127.0.0.1')"))
                .await;
            let error = error.expect_err("in use");
            assert_eq!(error.code.as_deref(), Some("EADDRINUSE"), "{first:?}, then {mode:?}");
            let error =
                other.try_js(worker, &format!("return listen(net.createServer(), {port})")).await;
            assert_eq!(
                error.expect_err("in use").code.as_deref(),
                Some("EADDRINUSE"),
                "{first:?}, then {mode:?}"
            );
            other.end().await;
        }
        assert_eq!(greeting(to).await.expect("not hurt"), "1");
        rig.end().await;
    }
}

/// A supervised cluster that cannot have its port ends, and says so.
async fn a_cluster_whose_port_is_taken_ends_with_the_reason(runtime: Runtime) {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = holder.local_addr().expect("its number");
    let rig = Rig::serving(&runtime, "apps/http.cjs", Mode::Kernel, 2, |s: Settings| {
        s.env("HOST", "127.0.0.1").env("PORT", at.port().to_string())
    });
    let outcome = tokio::time::timeout(PATIENCE, rig.cluster.wait()).await.expect("it ends");
    let Outcome::BindFailed { address, error } = outcome else {
        panic!("{outcome:?}\n{}", rig.story())
    };
    assert_eq!((reach(&address), error.kind()), (at, std::io::ErrorKind::AddrInUse));
    let told = |e: &_| matches!(e, Event::BindFailed { who: Some(_), .. });
    assert!(rig.events().iter().any(told));
    rig.end().await;
}

/// However the primary ends, its workers do, and the port is free again.
async fn workers_end_with_their_primary(runtime: Runtime) {
    for how in ["exit", "panic", "kill"] {
        let host = own_host();
        let mut primary = Remote::ours(&runtime, Mode::Kernel, []);
        let workers = [primary.fork().await, primary.fork().await];
        let mut port = json!(null);
        for worker in workers {
            let listen = format!("listen(keep.s, 0, '{host}')");
            let code =
                format!("keep.s = http.createServer(counter()); return (await {listen}).port");
            port = primary.js(worker, &code).await;
        }
        let pids = pids(&mut primary, &workers).await;
        match how {
            "kill" => primary.signal(Signal::KILL),
            how => drop(primary.tell(json!({ "do": how })).await),
        }
        all_ended(&pids);
        let port = port.as_u64().and_then(|p| u16::try_from(p).ok()).expect("a port");
        // The system may have lent the number to somebody else's connection for a moment.
        let limit = std::time::Instant::now() + super::support::PATIENCE;
        while let Err(error) = std::net::TcpListener::bind((host, port)) {
            assert!(std::time::Instant::now() < limit, "{how}: port {port}: {error}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}
