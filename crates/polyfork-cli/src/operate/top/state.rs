//! What `top` has seen of an app, and what follows from two looks: rates, shares, balance.
//!
//! No I/O and no clock: looks and the time between them go in. Reading statuses from sockets is in `top`, drawing in `view`.
//!
//! The surprising rule: rates belong to workers, since a worker's counters begin with it; history belongs to slots, which last.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde_json::Value;

use crate::words;

/// Looks that are remembered, for sparklines and the balance.
pub(crate) const HISTORY: usize = 120;
/// Looks that the balance is taken over.
const BALANCE_LOOKS: usize = 60;

/// An app at one moment. All text is harmless.
#[derive(Debug, Clone, Default)]
pub(crate) struct Look {
    pub(crate) name: String,
    pub(crate) state: String,
    pub(crate) program: String,
    pub(crate) pid: u64,
    pub(crate) listens: Vec<String>,
    pub(crate) policy: String,
    pub(crate) mechanism: String,
    pub(crate) wanted: u64,
    pub(crate) ready: u64,
    pub(crate) restarts: u64,
    pub(crate) uptime_ms: u64,
    pub(crate) busy: Option<String>,
    pub(crate) primary_cpu_ms: Option<u64>,
    pub(crate) primary_bytes: Option<u64>,
    pub(crate) workers: Vec<Worker>,
}

/// A worker, or a slot without one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Worker {
    pub(crate) slot: u64,
    pub(crate) id: Option<u64>,
    pub(crate) pid: Option<u64>,
    pub(crate) state: String,
    pub(crate) restarts: u64,
    pub(crate) uptime_ms: Option<u64>,
    pub(crate) cpu_ms: Option<u64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) accepted: Option<u64>,
    pub(crate) queue: Option<u64>,
    pub(crate) lag_ms: Option<u64>,
}

impl Look {
    /// Reads an answer to `status`. What is missing in it is not known; nothing in it is an error.
    pub(crate) fn read(status: &Value) -> Look {
        let text = |field: &str| words::harmless(status[field].as_str().unwrap_or("-"));
        let number = |field: &str| status[field].as_u64().unwrap_or(0);
        let listeners = status["listeners"].as_array().into_iter().flatten();
        let workers = status["workers"].as_array().into_iter().flatten();
        Look {
            name: text("name"),
            state: text("state"),
            program: text("program"),
            pid: number("pid"),
            listens: listeners.filter_map(Value::as_str).map(words::harmless).collect(),
            policy: text("policy"),
            mechanism: text("mechanism"),
            wanted: number("workers_wanted"),
            ready: number("workers_ready"),
            restarts: number("restarts"),
            uptime_ms: number("uptime_ms"),
            busy: status["busy"].as_str().map(words::harmless),
            primary_cpu_ms: status["primary"]["cpu_ms"].as_u64(),
            primary_bytes: status["primary"]["resident_bytes"].as_u64(),
            workers: workers.map(Worker::read).collect(),
        }
    }
}

impl Worker {
    fn read(worker: &Value) -> Worker {
        let number = |field: &str| worker[field].as_u64();
        Worker {
            slot: number("slot").unwrap_or(0),
            id: number("worker"),
            pid: number("pid"),
            state: words::harmless(worker["state"].as_str().unwrap_or("-")),
            restarts: number("restarts").unwrap_or(0),
            uptime_ms: number("uptime_ms"),
            cpu_ms: number("cpu_ms"),
            bytes: number("resident_bytes"),
            accepted: number("accepted"),
            queue: number("queue"),
            lag_ms: number("lag_ms"),
        }
    }
}

/// A worker, and what it does now.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub(crate) worker: Worker,
    /// In per cent of one CPU; `None` before the second look.
    pub(crate) cpu: Option<f64>,
    /// Connections a second.
    pub(crate) rate: Option<f64>,
}

/// What is known of an app by several looks.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) look: Look,
    pub(crate) rows: Vec<Row>,
    /// The primary's, in per cent of one CPU.
    pub(crate) primary_cpu: Option<f64>,
    /// Connections a second, of all slots, the latest last.
    pub(crate) total: VecDeque<f64>,
    /// Connections a second by slot, the latest last.
    pub(crate) rates: BTreeMap<u64, VecDeque<f64>>,
    /// New connections by slot, look by look.
    shares: VecDeque<BTreeMap<u64, u64>>,
    looks: u64,
}

fn push<T>(history: &mut VecDeque<T>, most: usize, value: T) {
    history.push_back(value);
    while history.len() > most {
        history.pop_front();
    }
}

impl Seen {
    /// Takes the next look in, `since` after the one before.
    pub(crate) fn next(&mut self, look: Look, since: Duration) {
        if look.name != self.look.name || look.pid != self.look.pid {
            *self = Seen::default();
        }
        let seconds = since.as_secs_f64().max(0.001);
        let first = self.looks == 0;
        let before: BTreeMap<u64, &Worker> =
            self.look.workers.iter().filter_map(|worker| Some((worker.id?, worker))).collect();
        let mut shares: BTreeMap<u64, u64> = BTreeMap::new();
        let mut rates: BTreeMap<u64, f64> = BTreeMap::new();
        let mut rows = Vec::with_capacity(look.workers.len());
        for worker in &look.workers {
            // A new worker's counters began with it.
            let was = worker.id.and_then(|id| before.get(&id).copied());
            let grown = |now: Option<u64>, was: Option<Option<u64>>| {
                let was = was.map_or(Some(0), |was| was).filter(|_| !first)?;
                Some(now?.saturating_sub(was))
            };
            let cpu = grown(worker.cpu_ms, was.map(|was| was.cpu_ms));
            let new = grown(worker.accepted, was.map(|was| was.accepted));
            let rate = new.map(|new| new as f64 / seconds);
            if let (Some(new), Some(rate)) = (new, rate) {
                *shares.entry(worker.slot).or_insert(0) += new;
                *rates.entry(worker.slot).or_insert(0.0) += rate;
            }
            let cpu = cpu.map(|ms| ms as f64 / 10.0 / seconds);
            rows.push(Row { worker: worker.clone(), cpu, rate });
        }
        let primary = look.primary_cpu_ms.zip(self.look.primary_cpu_ms).filter(|_| !first);
        self.primary_cpu =
            primary.map(|(now, was)| now.saturating_sub(was) as f64 / 10.0 / seconds);
        if !first {
            push(&mut self.total, HISTORY, rates.values().sum());
            self.rates.retain(|slot, _| look.workers.iter().any(|worker| worker.slot == *slot));
            for (slot, rate) in rates {
                push(self.rates.entry(slot).or_default(), HISTORY, rate);
            }
            push(&mut self.shares, BALANCE_LOOKS, shares);
        }
        self.rows = rows;
        self.look = look;
        self.looks += 1;
    }

    /// Whether rates are known.
    pub(crate) fn has_rates(&self) -> bool {
        self.looks > 1
    }

    /// How even the shares of ready slots were of late.
    pub(crate) fn balance(&self) -> Option<Balance> {
        let ready: Vec<u64> = self
            .look
            .workers
            .iter()
            .filter(|worker| worker.state == "ready" && worker.accepted.is_some())
            .map(|worker| worker.slot)
            .collect();
        let of = |slot: &u64| {
            let looks = self.shares.iter();
            looks.map(|look| look.get(slot).copied().unwrap_or(0)).sum::<u64>()
        };
        Balance::of(&ready.iter().map(of).collect::<Vec<_>>())
    }

    /// Connections a second, all together.
    pub(crate) fn total_rate(&self) -> Option<f64> {
        self.total.back().copied()
    }
}

/// How evenly connections are spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Balance {
    /// 1 when all have the same, 1/n when one has all: Jain's index.
    pub(crate) evenness: f64,
    /// The smallest share.
    pub(crate) least: f64,
    /// The largest.
    pub(crate) most: f64,
}

impl Balance {
    /// `None` for fewer than two, and when there was nothing to share.
    pub(crate) fn of(counts: &[u64]) -> Option<Balance> {
        let sum: f64 = counts.iter().map(|n| *n as f64).sum();
        if counts.len() < 2 || sum == 0.0 {
            return None;
        }
        let squares: f64 = counts.iter().map(|n| (*n as f64).powi(2)).sum();
        let share = |n: Option<&u64>| n.map_or(0.0, |n| *n as f64 / sum);
        Some(Balance {
            evenness: sum * sum / (counts.len() as f64 * squares),
            least: share(counts.iter().min()),
            most: share(counts.iter().max()),
        })
    }
}

/// By what rows are sorted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Sort {
    /// Slot and worker.
    #[default]
    Slot,
    /// Most CPU first.
    Cpu,
    /// Most memory first.
    Memory,
    /// Most connections a second first.
    Rate,
    /// Longest queue first.
    Queue,
    /// Latest event loop first.
    Lag,
    /// Most restarts first.
    Restarts,
}

impl Sort {
    /// The one after it, round and round.
    pub(crate) fn next(self) -> Sort {
        match self {
            Sort::Slot => Sort::Cpu,
            Sort::Cpu => Sort::Memory,
            Sort::Memory => Sort::Rate,
            Sort::Rate => Sort::Queue,
            Sort::Queue => Sort::Lag,
            Sort::Lag => Sort::Restarts,
            Sort::Restarts => Sort::Slot,
        }
    }

    /// The column's name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Sort::Slot => "slot",
            Sort::Cpu => "cpu",
            Sort::Memory => "memory",
            Sort::Rate => "conn/s",
            Sort::Queue => "queue",
            Sort::Lag => "lag",
            Sort::Restarts => "restarts",
        }
    }

    /// Sorts rows; equal ones stay in the order of their slots.
    pub(crate) fn sort(self, rows: &mut [Row]) {
        rows.sort_by_key(|row| (row.worker.slot, row.worker.id));
        let by = |value: fn(&Row) -> f64| move |a: &Row, b: &Row| value(b).total_cmp(&value(a));
        match self {
            Sort::Slot => {}
            Sort::Cpu => rows.sort_by(by(|row| row.cpu.unwrap_or(-1.0))),
            Sort::Memory => rows.sort_by_key(|row| std::cmp::Reverse(row.worker.bytes)),
            Sort::Rate => rows.sort_by(by(|row| row.rate.unwrap_or(-1.0))),
            Sort::Queue => rows.sort_by_key(|row| std::cmp::Reverse(row.worker.queue)),
            Sort::Lag => rows.sort_by_key(|row| std::cmp::Reverse(row.worker.lag_ms)),
            Sort::Restarts => rows.sort_by_key(|row| std::cmp::Reverse(row.worker.restarts)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(workers: &[(u64, u64, u64, u64)]) -> Value {
        let worker = |(slot, id, cpu, accepted): &(u64, u64, u64, u64)| {
            json!({"slot": slot, "worker": id, "pid": id + 100, "state": "ready", "restarts": 0,
                   "cpu_ms": cpu, "resident_bytes": 1 << 20, "accepted": accepted, "queue": 0})
        };
        let workers: Vec<Value> = workers.iter().map(worker).collect();
        json!({"name": "shop", "pid": 7, "state": "ready", "workers_wanted": 2, "workers_ready": 2,
               "primary": {"cpu_ms": 10, "resident_bytes": 4 << 20}, "workers": workers})
    }

    fn seen(looks: &[&[(u64, u64, u64, u64)]]) -> Seen {
        let mut seen = Seen::default();
        for look in looks {
            seen.next(Look::read(&status(look)), Duration::from_secs(2));
        }
        seen
    }

    #[test]
    fn rates_come_of_two_looks_and_begin_anew_with_a_worker() {
        let one = seen(&[&[(1, 1, 1000, 50)]]);
        assert!(!one.has_rates() && one.rows[0].cpu.is_none() && one.rows[0].rate.is_none());
        let two = seen(&[&[(1, 1, 1000, 50), (2, 2, 0, 90)], &[(1, 1, 2000, 60), (2, 3, 100, 4)]]);
        assert_eq!((two.rows[0].cpu, two.rows[0].rate), (Some(50.0), Some(5.0)));
        assert_eq!((two.rows[1].cpu, two.rows[1].rate), (Some(5.0), Some(2.0)));
        assert_eq!(two.total_rate(), Some(7.0));
    }

    #[test]
    fn a_counter_that_goes_back_is_no_rate_below_zero() {
        let odd = seen(&[&[(1, 1, 1000, 50)], &[(1, 1, 10, 5)]]);
        assert_eq!((odd.rows[0].cpu, odd.rows[0].rate), (Some(0.0), Some(0.0)));
    }

    #[test]
    fn an_app_that_was_started_anew_is_another() {
        let mut seen = seen(&[&[(1, 1, 1000, 50)], &[(1, 1, 1000, 60)]]);
        let mut other = status(&[(1, 1, 5, 5)]);
        other["pid"] = 8.into();
        seen.next(Look::read(&other), Duration::from_secs(1));
        assert!(!seen.has_rates() && seen.total.is_empty());
    }

    #[test]
    fn evenness_is_one_for_equal_shares_and_least_when_one_has_all() {
        let even = Balance::of(&[5, 5, 5, 5]).unwrap();
        assert_eq!((even.evenness, even.least, even.most), (1.0, 0.25, 0.25));
        let one = Balance::of(&[20, 0, 0, 0]).unwrap();
        assert_eq!((one.evenness, one.least, one.most), (0.25, 0.0, 1.0));
        assert_eq!(Balance::of(&[3]), None);
        assert_eq!(Balance::of(&[0, 0]), None);
    }

    #[test]
    fn history_is_bounded_and_goes_with_its_slot() {
        let mut seen = Seen::default();
        for n in 0..500 {
            seen.next(Look::read(&status(&[(1, 1, n, n), (2, 2, n, n)])), Duration::from_secs(1));
        }
        assert_eq!((seen.total.len(), seen.rates[&2].len()), (HISTORY, HISTORY));
        seen.next(Look::read(&status(&[(1, 1, 500, 500)])), Duration::from_secs(1));
        assert!(!seen.rates.contains_key(&2));
    }

    #[test]
    fn rows_are_sorted_by_what_is_asked_for() {
        let mut rows = seen(&[&[(1, 1, 0, 0), (2, 2, 0, 0)], &[(1, 1, 10, 9), (2, 2, 90, 1)]]).rows;
        let slots = |rows: &[Row]| rows.iter().map(|row| row.worker.slot).collect::<Vec<_>>();
        Sort::Cpu.sort(&mut rows);
        assert_eq!(slots(&rows), [2, 1]);
        Sort::Rate.sort(&mut rows);
        assert_eq!(slots(&rows), [1, 2]);
        Sort::Queue.sort(&mut rows);
        assert_eq!(slots(&rows), [1, 2]);
        let all = std::iter::successors(Some(Sort::Slot), |sort| Some(sort.next()));
        assert_eq!(all.skip(1).position(|sort| sort == Sort::Slot), Some(6));
    }

    #[test]
    fn an_answer_that_makes_no_sense_is_an_app_of_which_nothing_is_known() {
        for odd in [json!(null), json!([]), json!({"name": 3, "workers": {"a": 1}})] {
            let look = Look::read(&odd);
            assert_eq!((look.name.as_str(), look.workers.len()), ("-", 0));
        }
        let look = Look::read(&json!({"name": "\u{1b}[2Jx", "workers": [7, {"state": "\u{7}"}]}));
        assert_eq!(look.name, "\\u{1b}[2Jx");
        assert_eq!(look.workers[1].state, "\\u{7}");
    }
}
