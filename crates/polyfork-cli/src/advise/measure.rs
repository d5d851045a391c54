//! What is measured of the four ways.
//!
//! How each is driven is in `peer`. Something that cannot be measured leaves a gap in its row and a reason beside it;
//! nothing is guessed.
//!
//! The surprising rule: everything is made ready before the clock starts and is ended after it has stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork::shared_memory::SharedArrayBuffer;
use polyfork::worker_threads::{Worker, WorkerContext};

use super::Row;
use super::peer::{self, Ask, Clustered, Forked, Letter, Peer, Result, Spawned, Thread, Told};

/// The memory that is shared.
const SHARED: usize = 64 << 20;
/// Copies travel in parts of this size.
const PART: usize = 1 << 20;
/// Threads whose memory is measured together.
const THREADS: usize = 32;
/// One flood; small enough for the event buffer of a cluster.
const FLOOD: u64 = 512;
/// The clock is looked at once in so many round trips.
const TRIPS: u64 = 64;

/// The rows, and what is missing in them.
pub(super) struct Measured {
    pub(super) rows: Vec<Row>,
    pub(super) missing: Vec<String>,
}

/// Puts figures into a row and reasons beside it.
struct Sheet {
    rows: Vec<Row>,
    missing: Vec<String>,
}

impl Sheet {
    fn row(
        &mut self,
        (figure, unit, title): (&'static str, &'static str, &'static str),
        values: [Option<Result<f64>>; 4],
    ) {
        let mut found = values.into_iter().zip(super::COLUMNS).map(|(value, way)| match value? {
            Ok(value) => Some(value),
            Err(why) => {
                self.missing.push(format!("{title} of {way}: {why}"));
                None
            }
        });
        let mut next = || found.next().flatten();
        let (cluster, worker_threads, spawn, fork) = (next(), next(), next(), next());
        drop(found);
        self.rows.push(Row { figure, unit, title, cluster, worker_threads, spawn, fork });
    }
}

/// Everything, each measurement as long as `effort`, computing on this many processors.
pub(super) async fn all(effort: Duration, processors: u32) -> Measured {
    let mut sheet = Sheet { rows: Vec::new(), missing: Vec::new() };
    sheet.row(
        ("start", "s", "start to first answer"),
        [
            Some(start::<Clustered>(effort).await),
            Some(start::<Thread>(effort).await),
            Some(start_spawned(effort).await),
            Some(start::<Forked>(effort).await),
        ],
    );
    sheet.row(
        ("starts", "per_s", "started and ended per second"),
        [
            Some(starts(effort, cycle::<Clustered>).await),
            Some(starts(effort, cycle::<Thread>).await),
            Some(starts(effort, peer::run_true).await),
            Some(starts(effort, cycle::<Forked>).await),
        ],
    );
    sheet.row(
        ("memory", "bytes", "memory of one"),
        [
            Some(memory_of_a_worker().await),
            Some(memory_of_a_thread()),
            Some(memory_of_a_program().await),
            Some(memory_of_a_child().await),
        ],
    );
    sheet.row(
        ("messages", "per_s", "messages of ~96 bytes to us"),
        [
            Some(flood::<Clustered>(effort).await),
            Some(flood::<Thread>(effort).await),
            Some(lines(effort).await),
            Some(flood::<Forked>(effort).await),
        ],
    );
    sheet.row(
        ("round_trip", "s", "a message and its answer"),
        [
            Some(round_trip::<Clustered>(effort).await),
            Some(round_trip::<Thread>(effort).await),
            Some(line_there_and_back(effort).await),
            Some(round_trip::<Forked>(effort).await),
        ],
    );
    sheet.row(
        ("share_64_mib", "s", "64 MiB to the other side"),
        [
            Some(copy::<Clustered>().await),
            Some(share_with_a_thread()),
            Some(pipe().await),
            Some(share_with_a_child().await),
        ],
    );
    let limit = calibrated(effort);
    sheet.row(
        ("speed_up", "times", "speed-up by all processors"),
        [
            None,
            Some(speed_up::<Thread>(limit, processors).await),
            None,
            Some(speed_up::<Forked>(limit, processors).await),
        ],
    );
    sheet.row(
        ("crash", "s", "crash to next answer"),
        [
            Some(crash_of_a_worker().await),
            Some(crash_of_a_thread().await),
            None,
            Some(crash_of_a_child().await),
        ],
    );
    Measured { rows: sheet.rows, missing: sheet.missing }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    let middle = times.len() / 2;
    match times.len() {
        0 => 0.0,
        even if even % 2 == 0 => (times[middle - 1] + times[middle]).as_secs_f64() / 2.0,
        _ => times[middle].as_secs_f64(),
    }
}

/// Whether to measure once more: as long as there is time, three times at least.
fn more(began: Instant, effort: Duration, done: usize) -> bool {
    done < 3 || (began.elapsed() < effort && done < 1000)
}

async fn start<P: Peer>(effort: Duration) -> Result<f64> {
    let (began, mut times) = (Instant::now(), Vec::new());
    while more(began, effort, times.len()) {
        let started = Instant::now();
        let mut peer = P::start().await?;
        peer.echo(1).await?;
        times.push(started.elapsed());
        peer.end().await?;
    }
    Ok(median(times))
}

async fn start_spawned(effort: Duration) -> Result<f64> {
    let (began, mut times, mut line) = (Instant::now(), Vec::new(), Vec::new());
    while more(began, effort, times.len()) {
        let started = Instant::now();
        let mut cat = Spawned::start("cat", &[])?;
        cat.echo(&mut line).await?;
        times.push(started.elapsed());
        cat.end().await?;
    }
    Ok(median(times))
}

async fn cycle<P: Peer>() -> Result<()> {
    P::start().await?.end().await
}

async fn starts<F: Future<Output = Result<()>>>(
    effort: Duration,
    cycle: impl Fn() -> F,
) -> Result<f64> {
    let (began, mut done) = (Instant::now(), 0);
    while more(began, effort, done) {
        cycle().await?;
        done += 1;
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// Memory that a process has, its share of what it has in common with others included (`Pss`, proc(5)).
fn proportional(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    number.map(|kib| kib * 1024.0).ok_or_else(|| format!("{path} has no Pss"))
}

async fn memory_of_a_worker() -> Result<f64> {
    let mut worker = Clustered::start().await?;
    worker.echo(1).await?;
    let bytes = proportional(worker.pid());
    worker.end().await?;
    bytes
}

async fn memory_of_a_child() -> Result<f64> {
    let mut child = Forked::start().await?;
    child.echo(1).await?;
    let bytes = proportional(child.pid());
    child.end().await?;
    bytes
}

async fn memory_of_a_program() -> Result<f64> {
    let mut cat = Spawned::start("cat", &[])?;
    cat.echo(&mut Vec::new()).await?;
    let bytes = proportional(cat.pid());
    cat.end().await?;
    bytes
}

/// What this process has more of with many threads that wait.
fn memory_of_a_thread() -> Result<f64> {
    let me = std::process::id();
    let before = proportional(me)?;
    let wait = |mut context: WorkerContext<(), ()>| {
        context.post_message_blocking(()).ok();
        context.receive_blocking();
    };
    let workers =
        (0..THREADS).map(|_| Worker::spawn(wait)).collect::<std::result::Result<Vec<_>, _>>();
    let mut workers = workers.map_err(|error| error.to_string())?;
    for worker in &mut workers {
        worker.receive_blocking();
    }
    let after = proportional(me);
    for worker in workers {
        worker.close();
        worker.join_blocking();
    }
    Ok(((after? - before) / THREADS as f64).max(0.0))
}

async fn flood<P: Peer>(effort: Duration) -> Result<f64> {
    let mut peer = P::start().await?;
    peer.echo(1).await?;
    let (began, mut count) = (Instant::now(), 0);
    // Two floods are under way, so that the other side never waits for us.
    peer.say(Ask::Flood(FLOOD / 2)).await?;
    while began.elapsed() < effort {
        peer.say(Ask::Flood(FLOOD / 2)).await?;
        for _ in 0..FLOOD / 2 {
            letter(&mut peer).await?;
        }
        count += FLOOD / 2;
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    for _ in 0..FLOOD / 2 {
        letter(&mut peer).await?;
    }
    peer.end().await?;
    Ok(rate)
}

async fn letter<P: Peer>(peer: &mut P) -> Result<Letter> {
    match peer.hear().await? {
        Told::Letter(letter) => Ok(letter),
        Told::Number(_) => Err("a number instead of a letter".to_owned()),
    }
}

async fn lines(effort: Duration) -> Result<f64> {
    let mut yes = Spawned::start("yes", &[Spawned::text()])?;
    let (mut line, mut count) = (Vec::new(), 0);
    yes.line(&mut line).await?;
    let began = Instant::now();
    while began.elapsed() < effort {
        for _ in 0..TRIPS {
            yes.line(&mut line).await?;
        }
        count += TRIPS;
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    yes.end().await?;
    Ok(rate)
}

async fn round_trip<P: Peer>(effort: Duration) -> Result<f64> {
    let mut peer = P::start().await?;
    peer.echo(1).await?;
    let (began, mut times) = (Instant::now(), Vec::new());
    while more(began, effort, times.len()) {
        let started = Instant::now();
        for id in 0..TRIPS {
            peer.echo(id).await?;
        }
        times.push(started.elapsed());
    }
    peer.end().await?;
    Ok(median(times) / TRIPS as f64)
}

async fn line_there_and_back(effort: Duration) -> Result<f64> {
    let mut cat = Spawned::start("cat", &[])?;
    let mut line = Vec::new();
    cat.echo(&mut line).await?;
    let (began, mut times) = (Instant::now(), Vec::new());
    while more(began, effort, times.len()) {
        let started = Instant::now();
        for _ in 0..TRIPS {
            cat.echo(&mut line).await?;
        }
        times.push(started.elapsed());
    }
    cat.end().await?;
    Ok(median(times) / TRIPS as f64)
}

/// By messages, part by part: a worker of a cluster is sent nothing but bytes.
async fn copy<P: Peer>() -> Result<f64> {
    let mut peer = P::start().await?;
    peer.echo(1).await?;
    let part = vec![1u8; PART];
    let began = Instant::now();
    for _ in 0..SHARED / PART {
        peer.say(Ask::Copy(part.clone())).await?;
    }
    for _ in 0..SHARED / PART {
        let Told::Number(length) = peer.hear().await? else { continue };
        if length != PART as u64 {
            return Err(format!("{length} bytes of {PART} came"));
        }
    }
    let time = began.elapsed();
    peer.end().await?;
    Ok(time.as_secs_f64())
}

/// A thread is given a pointer.
fn share_with_a_thread() -> Result<f64> {
    let memory: Arc<[u8]> = vec![1u8; SHARED].into();
    let look = |mut context: WorkerContext<Arc<[u8]>, usize>| {
        while let Some(memory) = context.receive_blocking() {
            if context.post_message_blocking(memory.len()).is_err() {
                return;
            }
        }
    };
    let mut worker = Worker::spawn(look).map_err(|error| error.to_string())?;
    let mut times = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        let sent = worker.poster().post_message_blocking(Arc::clone(&memory));
        sent.map_err(|_| "the thread has ended".to_owned())?;
        if worker.receive_blocking() != Some(SHARED) {
            return Err("not all of it came".to_owned());
        }
        times.push(began.elapsed());
    }
    worker.close();
    worker.join_blocking();
    Ok(median(times))
}

/// A process is given a descriptor of the same memory.
async fn share_with_a_child() -> Result<f64> {
    let memory = SharedArrayBuffer::new(SHARED).map_err(|error| error.to_string())?;
    let mut child = Forked::start().await?;
    child.echo(1).await?;
    let mut times = Vec::new();
    for _ in 0..20 {
        let began = Instant::now();
        if child.share(memory.clone()).await? != SHARED as u64 {
            return Err("not all of it came".to_owned());
        }
        times.push(began.elapsed());
    }
    child.end().await?;
    Ok(median(times))
}

async fn pipe() -> Result<f64> {
    let bytes = vec![1u8; SHARED];
    let mut swallower = Spawned::start("sh", &["-c", "read -r _; echo; cat >/dev/null"])?;
    swallower.echo(&mut Vec::new()).await?;
    let began = Instant::now();
    swallower.swallow(&bytes).await?;
    Ok(began.elapsed().as_secs_f64())
}

/// How far to count primes so that it takes one processor about twice the effort.
fn calibrated(effort: Duration) -> u64 {
    let mut limit = 20_000;
    loop {
        let began = Instant::now();
        std::hint::black_box(peer::primes(0, limit));
        if began.elapsed() * 2 >= effort || limit > 1 << 40 {
            return limit;
        }
        limit = limit * 3 / 2;
    }
}

/// The time of one worker over that of as many as there are processors.
async fn speed_up<P: Peer>(limit: u64, processors: u32) -> Result<f64> {
    let alone = count_primes::<P>(limit, 1).await?;
    let together = count_primes::<P>(limit, u64::from(processors)).await?;
    Ok(alone.as_secs_f64() / together.as_secs_f64())
}

async fn count_primes<P: Peer>(limit: u64, workers: u64) -> Result<Duration> {
    let mut peers = Vec::new();
    for _ in 0..workers {
        let mut peer = P::start().await?;
        peer.echo(1).await?;
        peers.push(peer);
    }
    // Equal work: large numbers take longer, so each gets many small ranges.
    let parts = workers * 16;
    let began = Instant::now();
    for part in 0..parts {
        let peer = &mut peers[(part % workers) as usize];
        peer.say(Ask::Primes(limit * part / parts, limit * (part + 1) / parts)).await?;
    }
    let mut found = 0;
    for part in 0..parts {
        if let Told::Number(primes) = peers[(part % workers) as usize].hear().await? {
            found += primes;
        }
    }
    let time = began.elapsed();
    std::hint::black_box(found);
    for peer in peers {
        peer.end().await?;
    }
    Ok(time)
}

async fn crash_of_a_thread() -> Result<f64> {
    let mut thread = Thread::start().await?;
    thread.echo(1).await?;
    let began = Instant::now();
    thread.crash()?;
    let mut next = Thread::start().await?;
    next.echo(1).await?;
    let time = began.elapsed();
    next.end().await?;
    Ok(time.as_secs_f64())
}

async fn crash_of_a_child() -> Result<f64> {
    let mut child = Forked::start().await?;
    child.echo(1).await?;
    let began = Instant::now();
    child.kill().await?;
    let mut next = Forked::start().await?;
    next.echo(1).await?;
    let time = began.elapsed();
    next.end().await?;
    Ok(time.as_secs_f64())
}

/// The cluster does it by itself, with the pause that keeps a program that cannot start from being started for ever.
async fn crash_of_a_worker() -> Result<f64> {
    let mut worker = Clustered::start().await?;
    worker.echo(1).await?;
    let began = Instant::now();
    worker.crash().await?;
    worker.echo(2).await?;
    let time = began.elapsed();
    worker.end().await?;
    Ok(time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_number_is_between_the_middle_ones() {
        let times = [4, 1, 3, 2].map(Duration::from_secs).to_vec();
        assert_eq!(median(times), 2.5);
        assert_eq!(median(vec![Duration::from_secs(7)]), 7.0);
    }

    #[test]
    fn primes_are_counted() {
        assert_eq!(peer::primes(0, 30), 10);
        assert_eq!(peer::primes(0, 10) + peer::primes(10, 30), 10);
    }
}
