//! What this program does as somebody's child. Started by its full name, with `--ignored`.

use std::sync::atomic::Ordering::SeqCst;

use polyfork::shared_memory::{Atomics, SharedArrayBuffer, WaitOutcome};

use crate::support::{PATIENCE, block_on, next, next_memory};

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
