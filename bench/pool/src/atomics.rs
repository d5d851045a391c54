//! A word in shared memory, there and back between two threads, with waiting and notifying.
//!
//! The same dance as in `bench/apps/post_message.cjs`, for a comparison with JavaScript's `Atomics`.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use polyfork::shared_memory::{Atomics, SharedArrayBuffer};

/// The first turns warm up.
const WARM_UP: i32 = 200;
/// The clock is looked at once in so many turns.
const EVERY: i32 = 64;
/// Word 1 when it is over.
const OVER: i32 = -1;

pub(crate) fn measure(limit: Duration) -> Result<String> {
    let memory = SharedArrayBuffer::new(8)?;
    let other = memory.clone();
    let pong = thread::spawn(move || -> Result<()> {
        let words = other.i32()?;
        for turn in 1.. {
            let mut seen = words[0].load(Ordering::SeqCst);
            while seen != OVER && seen < turn {
                words.wait(0, turn - 1, None);
                seen = words[0].load(Ordering::SeqCst);
            }
            if seen == OVER {
                break;
            }
            words[1].store(turn, Ordering::SeqCst);
            words.notify(1, 1);
        }
        Ok(())
    });
    let words = memory.i32()?;
    let mut start = Instant::now();
    let mut rate = 0.0;
    for turn in 1.. {
        words[0].store(turn, Ordering::SeqCst);
        words.notify(0, 1);
        while words[1].load(Ordering::SeqCst) < turn {
            words.wait(1, turn - 1, None);
        }
        if turn == WARM_UP {
            start = Instant::now();
        }
        if turn > WARM_UP && turn % EVERY == 0 && start.elapsed() >= limit {
            rate = f64::from(turn - WARM_UP) / start.elapsed().as_secs_f64();
            break;
        }
    }
    words[0].store(OVER, Ordering::SeqCst);
    words.notify(0, 1);
    pong.join().expect("the other side does not panic")?;
    Ok(format!("{{\"rate\":{rate:.0}}}"))
}
