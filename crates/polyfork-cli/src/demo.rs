//! `polyfork demo`: a native HTTP server on all cores that shows which worker answered.
//!
//! The primary and the workers are this same executable. Each worker counts the connections it accepts and tells the
//! primary; the primary puts the counts together and tells all workers, so that any of them can show all. The page and
//! its answers are in `demo/server.rs`.
//!
//! The surprising rule: counts are told fifty times a second at most, so what a worker says of others may be a moment
//! behind; what it says of itself is exact.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polyfork::cluster::{Address, Cluster, Detected, Event, Settings, Who, is_worker};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::args::choices::OutputArg;
use crate::args::tools::DemoArgs;
use crate::control::book::About;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::report::{Start, json};
use crate::run::how_many::HowMany;
use crate::run::place::with_control;
use crate::run::start::supervise;
use crate::run::{self, Place, Prepared, Show};
use crate::words;

mod http;
mod server;

/// Between two tellings of the counts.
const PAUSE: Duration = Duration::from_millis(20);

/// What a worker tells the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Counts {
    /// Connections accepted since it started.
    connections: u64,
    /// Requests answered since it started.
    requests: u64,
}

/// One worker on the board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    slot: u32,
    worker: u64,
    pid: u32,
    connections: u64,
    requests: u64,
}

/// What the primary tells the workers: everyone's counts, and how connections reach them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Board {
    rows: Vec<Row>,
    /// Policy and mechanism for people.
    way: String,
    /// Why that mechanism.
    why: String,
}

/// Runs the demo: as its primary, or as one of its workers.
pub(crate) fn run(args: DemoArgs) -> Code {
    let Address::Tcp(listen) = args.listen else {
        let text = format!("--listen {}: a browser needs a TCP address", args.listen);
        return run::refuse(&Verdict { code: Code::Usage, text }, args.json);
    };
    if is_worker() {
        return server::work(listen);
    }
    let json = args.json;
    let prepared = prepare(args).and_then(|prepared| with_control(prepared, false));
    match prepared.and_then(|prepared| supervise(prepared, Counter::start)) {
        Ok(code) => code,
        Err(refused) => run::refuse(&refused, json),
    }
}

fn prepare(args: DemoArgs) -> Result<Prepared, Verdict> {
    let unexpected = |text: String| Verdict { code: Code::Unexpected, text: words::plain(&text) };
    let HowMany { workers, why: workers_why, notice } = HowMany::of(args.workers);
    let program = std::env::current_exe()
        .map_err(|error| unexpected(format!("cannot find this program's own file: {error}")))?;
    let detected =
        Detected::native(OsStr::new(&program)).map_err(|error| unexpected(error.to_string()))?;
    let settings = Settings::this_program()
        .map_err(|error| unexpected(format!("cannot find this program's own file: {error}")))?
        .workers(workers)
        .policy(args.policy.into())
        .mechanism(args.mechanism.into())
        .grace(Duration::from_secs(5))
        .name("demo");
    let start = Start {
        name: "demo".into(),
        workers,
        workers_why,
        detected: Detected { why: "this very program serves".into(), ..detected },
        warnings: notice.into_iter().collect(),
        page: true,
    };
    let show = Show { json: args.json, output: OutputArg::Prefix };
    let about = About {
        name: "demo".into(),
        program: "polyfork demo".into(),
        runtime: json::runtime_word(start.detected.runtime).to_owned(),
        dialect: start.detected.dialect.to_string(),
        policy: polyfork::cluster::Policy::from(args.policy).to_string(),
        mechanism: polyfork::cluster::Mechanism::from(args.mechanism).to_string(),
        logs: None,
        metrics: None,
        live: None,
    };
    Ok(Prepared { settings, start, show, place: Place::of(about) })
}

/// The primary's side: puts the counts together.
struct Counter {
    tally: Mutex<Tally>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Tally {
    rows: BTreeMap<u64, Row>,
    way: String,
    why: String,
}

impl Counter {
    /// Starts telling the workers; gives what takes in the events.
    fn start(cluster: &Cluster) -> impl FnMut(&Event) + use<> {
        let counter = Arc::new(Counter { tally: Mutex::default(), changed: Notify::new() });
        tokio::spawn(tell(Arc::clone(&counter), cluster.clone()));
        move |event| {
            if counter.tally.lock().unwrap_or_else(PoisonError::into_inner).take(event) {
                counter.changed.notify_one();
            }
        }
    }

    fn board(&self) -> Board {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).board()
    }
}

/// Tells the workers whenever something has changed, until the runtime ends.
async fn tell(counter: Arc<Counter>, cluster: Cluster) {
    loop {
        counter.changed.notified().await;
        if cluster.broadcast(&counter.board()).await.is_err() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Tally {
    /// Takes an event in; true if the board has changed.
    fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Ready(Who { slot, worker, pid }) => {
                let row =
                    Row { slot: *slot, worker: *worker, pid: *pid, connections: 0, requests: 0 };
                self.rows.entry(*worker).or_insert(row);
            }
            Event::Message { who, message } => {
                let Ok(counts) = message.decode::<Counts>() else { return false };
                let Some(row) = self.rows.get_mut(&who.worker) else { return false };
                row.connections = counts.connections;
                row.requests = counts.requests;
            }
            Event::Exit { who, .. } => drop(self.rows.remove(&who.worker)),
            Event::Bound { by, .. } => {
                self.way = words::via(by).to_owned();
                self.why.clone_from(&by.why);
            }
            _ => return false,
        }
        true
    }

    fn board(&self) -> Board {
        let mut rows: Vec<Row> = self.rows.values().cloned().collect();
        rows.sort_by_key(|row| (row.slot, row.worker));
        Board { rows, way: self.way.clone(), why: self.why.clone() }
    }
}

/// The address of the page for a person's browser.
pub(crate) fn url(address: &SocketAddr) -> String {
    match address {
        wildcard if wildcard.ip().is_unspecified() => {
            format!("http://localhost:{}/", wildcard.port())
        }
        other => format!("http://{other}/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polyfork::cluster::{Exit, Reason};

    fn ready(slot: u32, worker: u64) -> Event {
        Event::Ready(Who { slot, worker, pid: 100 + slot })
    }

    #[test]
    fn the_board_shows_the_workers_that_serve() {
        let mut tally = Tally::default();
        assert!(tally.take(&ready(2, 2)) && tally.take(&ready(1, 1)));
        assert!(!tally.take(&Event::AllReady { workers: 2 }));
        let gone = Event::Exit {
            who: Who { slot: 2, worker: 2, pid: 102 },
            code: Some(1),
            signal: None,
            reason: Reason::Exited(Exit::Code(1)),
            lived: Duration::ZERO,
            voluntary: false,
            restart_in: None,
        };
        assert!(tally.take(&gone) && tally.take(&ready(2, 3)));
        let seen: Vec<_> = tally.board().rows.iter().map(|row| (row.slot, row.worker)).collect();
        assert_eq!(seen, [(1, 1), (2, 3)]);
    }

    #[test]
    fn the_page_is_told_as_a_browser_can_open_it() {
        assert_eq!(url(&"127.0.0.1:80".parse().unwrap()), "http://127.0.0.1:80/");
        assert_eq!(url(&"[::]:80".parse().unwrap()), "http://localhost:80/");
        assert_eq!(url(&"[::1]:80".parse().unwrap()), "http://[::1]:80/");
    }
}
