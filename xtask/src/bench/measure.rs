//! What a load cost: CPU of the whole process tree, memory of the primary, connections per worker.
//!
//! The load itself is in `load`. CPU is the user and system time of every process of the tree and of
//! the children they have reaped, read before and after.
//!
//! Surprising: workers count their own connections and are asked over HTTP, and each question is a
//! connection too. Under exact turns that keeps the counts within one of each other; a worker that
//! the kernel never wakes while a sibling is idle is reached by keeping the sibling busy.
//!
//! Source: proc_pid_stat(5), proc_pid_status(5), proc_stat(5), smaps_rollup in proc(5).

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::load::Answered;
use super::targets::Running;
use crate::proc;

/// How long one question to a worker may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Questions before we give up to hear from every worker.
const QUESTIONS: usize = 80;
/// After this many answers without news, the eager worker is kept busy.
const PATIENCE: usize = 8;
/// For how long, in milliseconds: long enough for several questions.
const HOLD_MS: u32 = 150;

/// What one load on one server showed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    /// Requests per second.
    pub(super) rate: f64,
    /// CPU of the whole tree per request, in microseconds.
    pub(super) cpu_us: f64,
    /// Latencies and errors.
    pub(super) answered: Answered,
    /// Connections of the busiest worker over those of the idlest; `None` if not all could be asked.
    pub(super) fairness: Option<f64>,
    /// The difference of the same two since the start.
    pub(super) spread: Option<u64>,
    /// Resident memory of the primary after the load.
    pub(super) primary: Option<Memory>,
    /// Share of the machine, 0 to 1, that went to processes outside this benchmark.
    pub(super) others: f64,
}

/// Memory of one process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    /// All resident pages.
    pub(super) rss_kib: u64,
    /// Resident pages, shared ones divided among who shares them.
    pub(super) pss_kib: u64,
}

/// Puts a load on a server and measures what it costs.
///
/// # Errors
/// When the load fails or the server is gone.
pub(super) fn sample(running: &Running, load: impl FnOnce() -> Result<Answered>) -> Result<Sample> {
    let counts_before = counts(running);
    let (ticks_before, machine_before) = (ticks(running.root())?, Machine::now()?);
    let answered = load()?;
    let (ticks_after, machine_after) = (ticks(running.root())?, Machine::now()?);
    let counts_after = counts(running);
    let cpu_seconds = ticks_after.saturating_sub(ticks_before) as f64
        / rustix::param::clock_ticks_per_second() as f64;
    Ok(Sample {
        rate: answered.requests as f64 / answered.seconds,
        cpu_us: cpu_seconds * 1e6 / answered.requests as f64,
        fairness: counts_before.zip(counts_after.as_ref()).and_then(|(b, a)| fairness(&b, a)),
        spread: counts_after.as_ref().and_then(spread),
        primary: running.primary().and_then(memory),
        others: machine_after.others_since(&machine_before),
        answered,
    })
}

/// CPU of `root` and all below it, with the children they reaped, in clock ticks.
fn ticks(root: i32) -> Result<u64> {
    let tree = proc::tree(root);
    ensure!(!tree.is_empty(), "the server is gone");
    Ok(tree.iter().map(|stat| stat.ticks).sum())
}

/// Time of all CPUs so far, in clock ticks.
#[derive(Debug, Clone, Copy)]
struct Machine {
    /// Passed on all CPUs, idle or not.
    all: u64,
    /// Spent in processes, or taken by the host.
    busy: u64,
    /// Spent in this chore and everything it started.
    ours: u64,
}

impl Machine {
    fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let (all, busy) = parse_machine(&text).context("/proc/stat has no line for all CPUs")?;
        Ok(Self { all, busy, ours: ticks(std::process::id().cast_signed())? })
    }

    /// Share of the machine that others took; it tells how far a run is to be trusted.
    fn others_since(&self, before: &Self) -> f64 {
        let busy = self.busy.saturating_sub(before.busy);
        let others = busy.saturating_sub(self.ours.saturating_sub(before.ours));
        others as f64 / self.all.saturating_sub(before.all).max(1) as f64
    }
}

/// All time and busy time of the first line of `/proc/stat`.
///
/// Interrupt time is left out of the busy time: loopback traffic of the load itself runs there.
fn parse_machine(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let times: Vec<u64> = line.split_ascii_whitespace().map_while(|t| t.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user.
    let [user, nice, system, _, _, _, _, steal] = *times.get(..8)? else { return None };
    Some((times[..8].iter().sum(), user + nice + system + steal))
}

/// Memory of one process; `None` when it is gone.
fn memory(pid: i32) -> Option<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some(Memory { rss_kib: kib(&status, "VmRSS:")?, pss_kib: kib(&rollup, "Pss:")? })
}

/// The number of a `Name:  123 kB` line.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Connections by worker pid, the freshest answer of each; `None` when not all could be heard.
type Counts = BTreeMap<u64, u64>;

fn counts(running: &Running) -> Option<Counts> {
    let workers = running.counted_workers()?;
    let mut counts = Counts::new();
    let mut last_news = 0;
    for question in 0..QUESTIONS {
        if question - last_news > PATIENCE {
            hold(running.port());
            last_news = question;
        }
        let (pid, connections) = ask(running.port()).ok()?;
        if counts.insert(pid, connections).is_none() {
            last_news = question;
        }
        // Hear everyone once more after the last one was found, so that the answers are of one time.
        if counts.len() >= workers && question >= last_news + workers {
            break;
        }
    }
    (counts.len() == workers).then_some(counts)
}

/// Keeps the worker busy that takes an idle connection first.
fn hold(port: u16) {
    thread::spawn(move || get(port, &format!("/hold?ms={HOLD_MS}")));
    // Not a wait for an event: merely lets the question above arrive first, and it is tried again.
    thread::sleep(Duration::from_millis(20));
}

/// Asks one worker for its pid and its count.
fn ask(port: u16) -> Result<(u64, u64)> {
    let value: Value = serde_json::from_str(&get(port, "/count")?)?;
    let number = |name: &str| value[name].as_u64().with_context(|| format!("no {name}"));
    Ok((number("pid")?, number("connections")?))
}

/// The body of one HTTP answer from loopback.
///
/// # Errors
/// No connection, no answer in time, or a status other than 200.
pub(super) fn get(port: u16, path: &str) -> Result<String> {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let mut stream = TcpStream::connect_timeout(&address.into(), ANSWER_LIMIT)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "answer `{}`", head.lines().next().unwrap_or(""));
    Ok(body.to_owned())
}

/// Busiest over idlest worker, by the connections each took between two counts.
fn fairness(before: &Counts, after: &Counts) -> Option<f64> {
    let taken = |(pid, now): (&u64, &u64)| now.saturating_sub(*before.get(pid).unwrap_or(&0));
    let taken: Vec<u64> = after.iter().map(taken).collect();
    let (least, most) = (*taken.iter().min()?, *taken.iter().max()?);
    (least > 0).then(|| most as f64 / least as f64)
}

/// Busiest minus idlest.
fn spread(counts: &Counts) -> Option<u64> {
    Some(counts.values().max()? - counts.values().min()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_compares_what_was_taken_in_between() {
        let before = Counts::from([(1, 100), (2, 300)]);
        let after = Counts::from([(1, 200), (2, 350)]);
        assert_eq!(fairness(&before, &after), Some(2.0));
        assert_eq!(spread(&after), Some(150));
    }

    #[test]
    fn worker_that_got_nothing_has_no_ratio() {
        let before = Counts::from([(1, 100), (2, 300)]);
        assert_eq!(fairness(&before, &Counts::from([(1, 100), (2, 350)])), None);
    }

    #[test]
    fn interrupts_are_no_work_of_others() {
        let text = "cpu  10 20 30 40 50 60 70 80 5 5\ncpu0 1 2 3 4\n";
        assert_eq!(parse_machine(text), Some((360, 140)));
        assert_eq!(parse_machine("cpu  10 20"), None);
        let before = Machine { all: 0, busy: 0, ours: 0 };
        let after = Machine { all: 200, busy: 120, ours: 100 };
        assert!((after.others_since(&before) - 0.1).abs() < f64::EPSILON);
    }

    #[test]
    fn memory_of_this_process_is_read() {
        let memory = memory(std::process::id().cast_signed()).unwrap();
        assert!(memory.rss_kib >= memory.pss_kib && memory.pss_kib > 0);
    }
}
