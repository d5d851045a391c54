//! A cluster of stock Node workers under test, and the invariants that hold after every fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::load::{Class, Counts, count};
use super::support::{Events, PATIENCE, Place};

/// A stock program. `/slow?ms=` answers late, `/spin` blocks its event loop for good, `/exit` ends it with 0.
pub(crate) const APP: &str = "
const http = require('http');
let connections = 0;
const server = http.createServer((request, response) => {
  const url = new URL(request.url, 'http://x');
  if (url.pathname === '/spin') { response.end('{}'); return setImmediate(() => { for (;;); }); }
  if (url.pathname === '/exit') { response.end('{}'); return setImmediate(() => process.exit(0)); }
  const answer = () => response.end(JSON.stringify({ pid: process.pid, connections }));
  if (url.pathname === '/slow') return setTimeout(answer, Number(url.searchParams.get('ms')));
  answer();
});
server.on('connection', () => connections += 1);
server.listen(0, '127.0.0.1');
";

/// Load tests take both processors: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

pub(crate) struct Cluster {
    pub(crate) events: Events,
    pub(crate) address: SocketAddr,
    /// Process ids of ready workers by slot, as far as events were read.
    pub(crate) workers: BTreeMap<u64, u32>,
    /// Holds the program; removed in the end.
    _place: Place,
    _alone: MutexGuard<'static, ()>,
}

/// What is to be found again after a fault.
pub(crate) struct Baseline {
    descriptors: usize,
    resident_kib: u64,
    pid: u32,
}

impl Cluster {
    /// `polyfork run --json` with these options before the program; returns when all workers are ready.
    pub(crate) fn start(options: &[&str], app: &str) -> Cluster {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let place = Place::new();
        place.file("app.js", app);
        let mut words: Vec<&str> = options.to_vec();
        words.push("app.js");
        Self::ready(place, &words, alone)
    }

    /// The same, with any words after `polyfork run --json`.
    pub(crate) fn start_in(place: Place, words: &[&str]) -> Cluster {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self::ready(place, words, alone)
    }

    fn ready(place: Place, words: &[&str], alone: MutexGuard<'static, ()>) -> Cluster {
        let events = place.events(words);
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut cluster = Cluster {
            events,
            address: unknown,
            workers: BTreeMap::new(),
            _place: place,
            _alone: alone,
        };
        cluster.wait(|event| event["event"] == "ready");
        let seen = cluster.events.seen.iter().find(|event| event["event"] == "bound");
        let bound = seen.expect("a bound address")["address"].as_str().expect("address").to_owned();
        cluster.address = bound.parse().expect("an address");
        cluster
    }

    /// Reads events until one is wanted, and keeps the table of workers.
    pub(crate) fn wait(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        while let Some(event) = self.events.next() {
            let slot = event["slot"].as_u64().unwrap_or(0);
            let pid = event["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
            match event["event"].as_str() {
                Some("worker_ready") => drop(self.workers.insert(slot, pid)),
                Some("exit") if self.workers.get(&slot) == Some(&pid) => {
                    self.workers.remove(&slot);
                }
                _ => {}
            }
            if wanted(&event) {
                return event;
            }
        }
        panic!("the events ended: {:#?}", self.events.seen)
    }

    pub(crate) fn wait_for(&mut self, name: &str) -> Value {
        self.wait(|event| event["event"] == name)
    }

    /// Waits until the slot has a ready worker that is not `old`.
    pub(crate) fn wait_replaced(&mut self, slot: u64, old: u32) -> u32 {
        loop {
            match self.workers.get(&slot) {
                Some(pid) if *pid != old => return *pid,
                _ => drop(self.wait(|event| event["event"] == "worker_ready")),
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.events.running.pid()
    }

    pub(crate) fn baseline(&self) -> Baseline {
        Baseline {
            descriptors: descriptors(self.pid()),
            resident_kib: self.events.running.resident_kib(),
            pid: self.pid(),
        }
    }

    /// Invariants I3 to I7 and I11; I1 and I2 are asserted on the counts of the load.
    pub(crate) fn check(&self, before: &Baseline) {
        let pid = self.pid();
        assert_eq!(before.pid, pid, "I5: the same primary");
        eventually(
            "I3: the primary's descriptors",
            || descriptors(pid),
            |now| *now == before.descriptors,
        );
        eventually("I3: sockets in CLOSE-WAIT", || close_wait(pid), |now| *now == 0);
        eventually("I4: zombies", || zombies(pid), Vec::is_empty);
        let grown = self.events.running.resident_kib().saturating_sub(before.resident_kib);
        assert!(grown < 16 * 1024, "I6: {grown} KiB more resident");
        eventually(
            "I7: processor ticks used in idle half seconds",
            || idle_ticks(pid),
            |ticks| *ticks <= 2,
        );
    }

    /// Stops in good order.
    pub(crate) fn stop(mut self) {
        self.events.running.signal(Signal::TERM);
        let (code, end) = self.events.end();
        assert_eq!(code, 0, "{end}");
    }
}

/// I1 and I2, and a line for people.
pub(crate) fn report(what: &str, counts: &Counts) {
    println!("{what}: {counts:?}");
    assert_eq!(count(counts, Class::Hang), 0, "I2: hangs; {counts:?}");
    assert_eq!(count(counts, Class::Other), 0, "I1: unknown failures; {counts:?}");
    assert!(count(counts, Class::Ok) > 0, "nothing worked: {counts:?}");
}

/// Every connection is answered whole, whatever happened.
pub(crate) fn nothing_failed(what: &str, counts: &Counts) {
    report(what, counts);
    assert_eq!(counts.len(), 1, "{what}: only successes; {counts:?}");
}

/// Looks again until it is as it should be.
pub(crate) fn eventually<T: std::fmt::Debug>(
    what: &str,
    look: impl Fn() -> T,
    right: impl Fn(&T) -> bool,
) {
    let limit = Instant::now() + PATIENCE;
    loop {
        let now = look();
        if right(&now) {
            return;
        }
        assert!(Instant::now() < limit, "{what}: {now:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Through a pidfd that is opened while the process is known to be there.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
        // It may have ended in the meantime, which is what most signals here are for.
        let _ended = pidfd_send_signal(&pidfd, signal);
    }
}

/// Open descriptors, but for the one by which the state on file is being replaced at this very moment.
pub(crate) fn descriptors(pid: u32) -> usize {
    let lasting = |entry: &fs::DirEntry| {
        !fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("state.new"))
    };
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter(lasting).count()
}

/// Processes whose parent is `pid`, with their state letter.
pub(crate) fn children(pid: u32) -> Vec<(u32, char)> {
    let processes = fs::read_dir("/proc").expect("proc").flatten();
    processes
        .filter_map(|entry| {
            let child: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
            let (_, rest) = stat.rsplit_once(") ")?;
            let mut fields = rest.split(' ');
            let state = fields.next()?.chars().next()?;
            let parent: u32 = fields.next()?.parse().ok()?;
            (parent == pid).then_some((child, state))
        })
        .collect()
}

fn zombies(pid: u32) -> Vec<(u32, char)> {
    children(pid).into_iter().filter(|(_, state)| *state == 'Z').collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(_) => false,
    }
}

/// TCP sockets of a process whose peer has closed and that it keeps (state 08).
fn close_wait(pid: u32) -> usize {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).map(|d| d.flatten().collect::<Vec<_>>());
    let inodes: BTreeSet<String> = fds
        .unwrap_or_default()
        .into_iter()
        .filter_map(|fd| fs::read_link(fd.path()).ok()?.to_str().map(str::to_owned))
        .filter_map(|t| Some(t.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let mine = |line: &&str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        fields.get(3) == Some(&"08") && fields.get(9).is_some_and(|inode| inodes.contains(*inode))
    };
    table.lines().filter(mine).count()
}

/// Processor time a process uses in half a second, in ticks of 10 ms.
fn idle_ticks(pid: u32) -> u64 {
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields: Vec<u64> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').map(|f| f.parse().unwrap_or(0)).collect())
            .unwrap_or_default();
        fields.get(11).copied().unwrap_or(0) + fields.get(12).copied().unwrap_or(0)
    };
    let before = used();
    std::thread::sleep(Duration::from_millis(500));
    used() - before
}
