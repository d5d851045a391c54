//! Tasks a second, and the time from giving one task to its result.
//!
//! Producers are tasks of tokio's multi-thread runtime (one producer: of its current-thread runtime). Each pool has as many
//! threads as there are cores; `spawn_blocking` has tokio's defaults, because that is what people run.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use polyfork::worker_threads::Pool;
use tokio::runtime::{Builder, Runtime};

use crate::work::{cores, cpu, quantile_us, steps, steps_of};

/// Tasks that each producer has under way in mode `rate`.
const WINDOW: usize = 256;
/// Latencies kept; the rest only counts.
const KEPT: usize = 200_000;

/// One way to have a closure run elsewhere.
trait Contender: Clone + Send + Sync + 'static {
    fn run(&self, number: u64) -> impl Future<Output = u64> + Send;
}

#[derive(Clone)]
struct Ours(Pool);

impl Contender for Ours {
    fn run(&self, number: u64) -> impl Future<Output = u64> + Send {
        let task = self.0.run(move || steps(number));
        async move { task.await.expect("no task of ours fails") }
    }
}

#[derive(Clone)]
struct Rayon(Arc<rayon::ThreadPool>);

impl Contender for Rayon {
    fn run(&self, number: u64) -> impl Future<Output = u64> + Send {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.0.spawn(move || {
            let _ = sender.send(steps(number));
        });
        async move { receiver.await.expect("no task of ours fails") }
    }
}

#[derive(Clone)]
struct SpawnBlocking;

impl Contender for SpawnBlocking {
    fn run(&self, number: u64) -> impl Future<Output = u64> + Send {
        let task = tokio::task::spawn_blocking(move || steps(number));
        async move { task.await.expect("no task of ours fails") }
    }
}

/// What one producer saw.
#[derive(Default)]
struct Seen {
    tasks: u64,
    times: Vec<Duration>,
}

pub(crate) fn measure(
    how: &str,
    work: &str,
    producers: usize,
    mode: &str,
    limit: Duration,
) -> Result<String> {
    ensure!(mode == "rate" || mode == "latency", "no mode \"{mode}\": rate or latency");
    let number = match work {
        "empty" => 0,
        "20us" => steps_of(Duration::from_micros(20)),
        other => bail!("no work \"{other}\": empty or 20us"),
    };
    let runtime = runtime(producers)?;
    let window = if mode == "rate" { WINDOW } else { 1 };
    let go = Go { number, producers, window, limit };
    match how {
        "polyfork" => go.all(&runtime, Ours(Pool::builder().max_threads(cores()).build()?)),
        "rayon" => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(cores()).build()?;
            go.all(&runtime, Rayon(Arc::new(pool)))
        }
        "spawn-blocking" => go.all(&runtime, SpawnBlocking),
        other => bail!("no \"{other}\": polyfork, rayon or spawn-blocking"),
    }
}

fn runtime(producers: usize) -> Result<Runtime> {
    let mut builder =
        if producers == 1 { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.worker_threads(cores()).build().context("start tokio")
}

#[derive(Clone, Copy)]
struct Go {
    number: u64,
    producers: usize,
    window: usize,
    limit: Duration,
}

impl Go {
    fn all<C: Contender>(self, runtime: &Runtime, contender: C) -> Result<String> {
        runtime.block_on(async {
            self.round(&contender, self.limit / 5).await?; // warms up
            let (begin, used) = (Instant::now(), cpu());
            let mut seen = self.round(&contender, self.limit).await?;
            let (seconds, used) = (begin.elapsed().as_secs_f64(), cpu() - used);
            let p50 = quantile_us(&mut seen.times, 0.5);
            let p99 = quantile_us(&mut seen.times, 0.99);
            Ok(format!(
                "{{\"tasks\":{},\"seconds\":{seconds},\"cpu_us\":{},\"p50_us\":{p50},\"p99_us\":{p99}}}",
                seen.tasks,
                used.as_micros()
            ))
        })
    }

    async fn round<C: Contender>(self, contender: &C, limit: Duration) -> Result<Seen> {
        let until = Instant::now() + limit;
        let producers: Vec<_> = (0..self.producers)
            .map(|_| tokio::spawn(self.produce(contender.clone(), until)))
            .collect();
        let mut all = Seen::default();
        for producer in producers {
            let seen = producer.await?;
            all.tasks += seen.tasks;
            all.times.extend(seen.times);
        }
        Ok(all)
    }

    async fn produce<C: Contender>(self, contender: C, until: Instant) -> Seen {
        let mut seen = Seen::default();
        let mut tasks = Vec::with_capacity(self.window);
        loop {
            let begin = Instant::now();
            if begin >= until {
                return seen;
            }
            tasks.extend((0..self.window).map(|_| contender.run(self.number)));
            for task in tasks.drain(..) {
                task.await;
            }
            seen.tasks += self.window as u64;
            if self.window == 1 && seen.times.len() < KEPT {
                seen.times.push(begin.elapsed());
            }
        }
    }
}
