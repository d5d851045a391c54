//! One memory for the primary of a cluster and all its workers, those that come later as well.

use std::sync::atomic::Ordering::SeqCst;

use polyfork::cluster::{Cluster, Dialect, Output, Settings};
use polyfork::shared_memory::{Atomics, SharedArrayBuffer};

use crate::support::PATIENCE;

fn settings() -> Settings {
    Settings::new(std::env::current_exe().unwrap())
        .args(["--exact", "roles::counts_in_a_cluster", "--ignored", "--nocapture"])
        .dialect(Dialect::Native)
        .workers(2)
        .output(Output::Null)
}

#[tokio::test]
async fn workers_and_their_replacements_share_the_memory_of_the_primary() {
    let memory = SharedArrayBuffer::new(4096).unwrap();
    let counters = memory.u32().unwrap();
    let until = async |slot: usize, count: u32| {
        while counters[slot].load(SeqCst) < count {
            let seen = counters[slot].load(SeqCst);
            counters.wait_async(slot, seen, Some(PATIENCE)).await.unwrap();
        }
    };
    // Behind the pipes that workers have.
    let settings = settings().shared_memory("counters", &memory).pipe(9);
    let cluster = Cluster::start(settings).unwrap();
    let all = async {
        until(1, 1).await;
        until(2, 1).await;
        cluster.worker(1).kill(libc::SIGKILL).await;
        until(1, 2).await;
    };
    tokio::time::timeout(PATIENCE, all).await.expect("workers that count");
    assert_eq!(counters[0].load(SeqCst), 0);
    cluster.stop().await;
}

#[tokio::test]
async fn what_cannot_be_shared_is_told_before_anything_starts() {
    let memory = SharedArrayBuffer::new(8).unwrap();
    let wrong = [
        (settings().shared_memory("a=b", &memory), "cannot have the name"),
        (settings().shared_memory("", &memory), "cannot have the name"),
        (Settings::new("node").dialect(Dialect::Node).shared_memory("a", &memory), "only workers"),
    ];
    for (settings, told) in wrong {
        let error = Cluster::start(settings).err().expect("it cannot start").to_string();
        assert!(error.contains(told), "{error}");
    }
}
