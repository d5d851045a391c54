//! What this program does as somebody's child. Started by its full name, with `--ignored`.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use polyfork::shared_memory::{
    Atomics, SeqCell, SharedArrayBuffer, SharedMutex, WaitOutcome, ring,
};

use crate::support::{PATIENCE, block_on, next, next_memory, record};

/// Adds one to every word, tells so in the first, and makes memory of its own for the parent.
#[test]
#[ignore = "run by the other tests as their child"]
fn shares() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let words = memory.u32().unwrap();
        for word in words.iter() {
            word.fetch_add(1, SeqCst);
        }
        words.notify(0, u32::MAX);
        let ours = SharedArrayBuffer::growable(8, 64 << 10).unwrap();
        ours.u64().unwrap()[0].store(7, SeqCst);
        parent.send_with(&"ours", ours.clone()).await.unwrap();
        let words = ours.u32().unwrap();
        // The parent writes 8 there, and notifies.
        let outcome = words.wait_async(0, 7, Some(PATIENCE)).await.unwrap();
        assert_ne!(outcome, WaitOutcome::TimedOut);
        assert_eq!((words[0].load(SeqCst), ours.len()), (8, 50_000));
        assert!(parent.recv().await.unwrap().is_none());
    });
}

/// Counts the word up whenever it is odd.
#[test]
#[ignore = "run by the other tests as their child"]
fn plays() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let words = memory.i32().unwrap();
        loop {
            let seen = words[0].load(SeqCst);
            if seen < 0 {
                return;
            }
            if seen % 2 == 0 {
                words.wait(0, seen, None);
            } else if words[0].compare_exchange(seen, seen + 1, SeqCst, SeqCst).is_ok() {
                words.notify(0, 1);
            }
        }
    });
}

/// Sends numbers for ever, with a handle now and then.
#[test]
#[ignore = "run by the other tests as their child"]
fn floods() {
    block_on(async {
        let parent = polyfork::process::channel().unwrap();
        for number in 0_u32.. {
            let text = "x".repeat(number as usize % 60);
            let sent = if number % 500 == 499 {
                let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
                parent.send_with(&(number, text), one).await
            } else {
                parent.send(&(number, text)).await
            };
            if sent.is_err() {
                return;
            }
        }
    });
}

/// Sends so many numbers, sees to it that they have left, and dies at once.
#[test]
#[ignore = "run by the other tests as their child"]
fn dies_after_flush() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let count: u32 = next(&mut parent).await.to().unwrap();
        for number in 0..count {
            parent.send(&(number, "x".repeat(number as usize % 60))).await.unwrap();
        }
        parent.flush().await.unwrap();
        std::process::abort();
    });
}

/// Receives for ever.
#[test]
#[ignore = "run by the other tests as their child"]
fn receives() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        while parent.recv().await.unwrap().is_some() {}
    });
}

/// Adds numbers to a ring for ever, in records of changing length.
#[test]
#[ignore = "run by the other tests as their child"]
fn produces() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let mut producer = ring::Producer::new(&memory).unwrap();
        let first: u64 = next(&mut parent).await.to().unwrap();
        for number in first.. {
            if producer.push(&record(number), None).is_err() {
                return;
            }
        }
    });
}

/// Takes numbers out of a ring and says how far it came, for ever.
#[test]
#[ignore = "run by the other tests as their child"]
fn consumes() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let seen = next_memory(&mut parent).await.u64().unwrap();
        let mut consumer = ring::Consumer::new(&memory).unwrap();
        let mut got = Vec::new();
        while consumer.pop(&mut got, None).unwrap() {
            let number = seen[0].load(SeqCst);
            assert_eq!(got, record(number));
            seen[0].store(number + 1, SeqCst);
        }
    });
}

/// Takes the lock, says so, and keeps it until it is told otherwise.
#[test]
#[ignore = "run by the other tests as their child"]
fn holds() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let lock = SharedMutex::new(&memory, 0).unwrap();
        let guard = lock.lock();
        parent.send(&"locked").await.unwrap();
        next(&mut parent).await;
        drop(guard);
    });
}

/// Counts in two words that only the lock keeps together, for ever.
#[test]
#[ignore = "run by the other tests as their child"]
fn counts() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let lock = SharedMutex::new(&memory, 0).unwrap();
        let words = memory.view::<AtomicU64>(64, 2).unwrap();
        let most: u64 = next(&mut parent).await.to().unwrap();
        for _ in 0..most {
            let guard = lock.lock();
            if guard.is_inconsistent() {
                words[1].store(words[0].load(Relaxed), Relaxed);
                guard.set_consistent();
            }
            let count = words[0].load(Relaxed);
            assert_eq!(words[1].load(Relaxed), count);
            words[0].store(count + 1, Relaxed);
            words[1].store(count + 1, Relaxed);
        }
    });
}

/// Writes values whose words belong together, for ever.
#[test]
#[ignore = "run by the other tests as their child"]
fn writes() {
    block_on(async {
        let mut parent = polyfork::process::channel().unwrap();
        let memory = next_memory(&mut parent).await;
        let cell = SeqCell::<8>::new(&memory, 0).unwrap();
        for number in 0.. {
            cell.write_over(std::array::from_fn(|n| number ^ n as u64)).unwrap();
        }
    });
}

/// A worker of a cluster: counts itself under its slot, and tells who waits.
#[test]
#[ignore = "run by the other tests as their child"]
fn counts_in_a_cluster() {
    block_on(async {
        let worker = polyfork::cluster::Worker::from_env().unwrap();
        let _listener = worker.listen("127.0.0.1:0").await.unwrap();
        assert!(worker.shared_memory("others").is_none());
        let counters = worker.shared_memory("counters").unwrap().u32().unwrap();
        let slot = worker.slot().unwrap() as usize;
        counters[slot].fetch_add(1, SeqCst);
        counters.notify(slot, u32::MAX);
        worker.shutdown().await;
    });
}
