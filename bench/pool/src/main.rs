//! One contender of `cargo xtask bench threads`: tasks given to a pool, a job on all cores, a server under load.
//!
//! `bench-pool tasks HOW WORK PRODUCERS MODE MILLISECONDS`: HOW is `polyfork`, `rayon` (`spawn` and a tokio oneshot) or
//! `spawn-blocking`; WORK is `empty` or `20us`; MODE is `rate` (each producer has 256 tasks under way) or `latency` (one at a time).
//! `bench-pool speedup HOW MILLISECONDS`: the same jobs on one thread and on all cores, in turns.
//! `bench-pool serve HOW MILLISECONDS`: an axum server that computes `inline` or in the `pool`, and its clients.
//!
//! `bench-pool atomics MILLISECONDS`: a word in shared memory, there and back between two threads.
//!
//! Prints one line of JSON.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "one line is the result")]

mod atomics;
mod serve;
mod speedup;
mod tasks;
mod work;

use std::time::Duration;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let line = match words.as_slice() {
        ["tasks", how, work, producers, mode, ms] => {
            tasks::measure(how, work, producers.parse()?, mode, limit(ms)?)?
        }
        ["atomics", ms] => atomics::measure(limit(ms)?)?,
        ["speedup", how, ms] => speedup::measure(how, limit(ms)?)?,
        ["serve", how, ms] => serve::measure(how, limit(ms)?)?,
        _ => bail!("usage: see the head of bench/pool/src/main.rs"),
    };
    println!("{line}");
    Ok(())
}

fn limit(ms: &str) -> Result<Duration> {
    Ok(Duration::from_millis(ms.parse().context("milliseconds")?))
}
