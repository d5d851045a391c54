//! Exact turns: of N connections over W workers nobody gets two more than another, counted by the workers.
//!
//! Each answer carries the worker's own count of requests, one to a connection.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use polyfork::cluster::{Event, Settings};
use tokio::task::JoinSet;

use super::client::{get, reach};
use super::support::{Mode, Rig, Runtime};

/// Makes `connections`, many at once, and gives how many each worker says it answered meanwhile.
async fn counted(
    to: SocketAddr,
    connections: usize,
    before: &BTreeMap<u64, u64>,
) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::<u64, u64>::new();
    let mut clients = JoinSet::new();
    for number in 0..connections {
        clients.spawn(async move { get(to, "/").await });
        if number % 16 == 15 || number + 1 == connections {
            while let Some(answer) = clients.join_next().await {
                let answer = answer.expect("no panic").expect("answered").json();
                let (worker, n) = (&answer["worker"], &answer["n"]);
                let count = counts.entry(worker.as_u64().expect("an id")).or_default();
                *count = (*count).max(n.as_u64().expect("a count"));
            }
        }
    }
    counts.iter().map(|(worker, n)| (*worker, n - before.get(worker).unwrap_or(&0))).collect()
}

/// Counts a phase and checks it: `workers` took part, and the shares differ by at most one.
async fn check(what: &str, to: SocketAddr, workers: usize, total: &mut BTreeMap<u64, u64>) {
    // Not a multiple of the number of workers.
    let connections = 60 + 1;
    let counts = counted(to, connections, total).await;
    for (worker, count) in &counts {
        *total.entry(*worker).or_default() += count;
    }
    println!("{what}: {counts:?}");
    let (most, least) = (counts.values().max(), counts.values().min());
    assert_eq!(counts.values().sum::<u64>(), connections as u64, "{what}: {counts:?}");
    assert_eq!(counts.len(), workers, "{what}: {counts:?}");
    assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{what}: {counts:?}");
}

/// How many times `AllReady` was told.
fn all_ready(rig: &Rig) -> usize {
    rig.events().iter().filter(|e| matches!(e, Event::AllReady { .. })).count()
}

on_every_node! {
    turns_are_exact_whatever_became_of_the_workers,
}

/// From the start, after a worker was replaced, after more and after fewer are wanted.
async fn turns_are_exact_whatever_became_of_the_workers(runtime: Runtime) {
    for mode in Mode::TURNS {
        for workers in [2, 3, 5] {
            let settings = |s: Settings| s.env("HOST", "127.0.0.1").env("PORT", "0");
            // The same server twice: CommonJS and an ES module.
            let program = if workers == 2 { "apps/http.mjs" } else { "apps/http.cjs" };
            let rig = Rig::serving(&runtime, program, mode, workers, settings);
            rig.all_ready(workers).await;
            let (address, carried) = rig.listening(1).await;
            assert!(mode.is(carried), "{carried:?}");
            let to = reach(&address);
            let what = |phase| format!("{} {mode:?} {workers} workers {phase}", runtime.name);
            let mut total = BTreeMap::new();
            let each = workers as usize;
            check(&what("at first"), to, each, &mut total).await;
            let told = rig.cluster.status().await.into_iter();
            let told: BTreeMap<u64, u64> =
                told.map(|w| (w.worker, w.connections.expect("counted"))).collect();
            assert_eq!(told, total, "{}", what("as the primary counts"));

            let rounds = all_ready(&rig);
            rig.worker(1).disconnect().await;
            rig.eventually("the replacement", |rig| (all_ready(rig) > rounds).then_some(())).await;
            check(&what("after a replacement"), to, each, &mut total).await;

            if workers == 2 {
                let rounds = all_ready(&rig);
                rig.worker(2).kill(9).await;
                rig.eventually("the replacement", |rig| (all_ready(rig) > rounds).then_some(()))
                    .await;
                check(&what("after a crash"), to, each, &mut total).await;
            }
            if workers == 3 {
                rig.cluster.scale(workers + 1).await;
                rig.all_ready(workers + 1).await;
                check(&what("with one more"), to, each + 1, &mut total).await;
                rig.cluster.scale(workers - 1).await;
                rig.eventually("two fewer", |rig| {
                    let retired = |e: &&_| matches!(e, Event::SlotRetired { .. });
                    (rig.events().iter().filter(retired).count() == 2).then_some(())
                })
                .await;
                check(&what("with two fewer"), to, each - 1, &mut total).await;
            }
            rig.end().await;
        }
    }
}
