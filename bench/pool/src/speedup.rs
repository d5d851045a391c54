//! The same processor-bound jobs on one thread and on all cores, in turns, so that a drift of the machine meets both.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use polyfork::worker_threads::Pool;
use rayon::prelude::*;

use crate::work::{cores, primes};

/// Jobs of one round, and the size of one: a few milliseconds.
const JOBS: usize = 64;
const SIEVE: usize = 300_000;

/// The sum over all jobs, computed by so many threads.
trait Contender {
    fn sum(&self) -> usize;
}

struct Ours(Pool);

impl Contender for Ours {
    fn sum(&self) -> usize {
        let tasks: Vec<_> = (0..JOBS).map(|_| self.0.run(|| primes(SIEVE))).collect();
        tasks.into_iter().map(|task| task.wait().expect("no task of ours fails")).sum()
    }
}

struct Rayon(rayon::ThreadPool);

impl Contender for Rayon {
    fn sum(&self) -> usize {
        self.0.install(|| (0..JOBS).into_par_iter().map(|_| primes(SIEVE)).sum())
    }
}

pub(crate) fn measure(how: &str, limit: Duration) -> Result<String> {
    let ours = |n| Pool::builder().min_threads(n).max_threads(n).build().map(Ours);
    let rayon = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().map(Rayon);
    match how {
        "polyfork" => Ok(compare(&ours(1)?, &ours(cores())?, limit)),
        "rayon" => Ok(compare(&rayon(1)?, &rayon(cores())?, limit)),
        other => bail!("no \"{other}\": polyfork or rayon"),
    }
}

fn compare(one: &impl Contender, all: &impl Contender, limit: Duration) -> String {
    let begin = Instant::now();
    let (mut alone, mut together) = (Duration::ZERO, Duration::ZERO);
    while begin.elapsed() < limit {
        alone += time(|| one.sum());
        together += time(|| all.sum());
    }
    let speedup = alone.as_secs_f64() / together.as_secs_f64();
    format!("{{\"cores\":{},\"speedup\":{speedup}}}", cores())
}

fn time(work: impl FnOnce() -> usize) -> Duration {
    let begin = Instant::now();
    std::hint::black_box(work());
    begin.elapsed()
}
