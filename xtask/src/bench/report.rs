//! Tables, ratios and aims from the measurements.
//!
//! A ratio is taken within a round, against the baseline that ran minutes before or after, and the
//! median of these is shown; medians of absolute numbers stand beside it.
//!
//! Surprising: an aim that is not met is printed as such and changes no exit code. Times belong to
//! a machine, and a build does not fail on them.
//!
//! Source: the table "Speed to aim for" of the project's design; its rows stand in [`AIMS`].

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::load::LoadKind;
use super::measure::Sample;
use super::targets::{Family, Target};

/// One load on one server in one round.
pub(super) struct Record {
    /// Counted from 1.
    pub(super) round: u32,
    /// The server.
    pub(super) target: Target,
    /// The load.
    pub(super) load: LoadKind,
    /// What was measured.
    pub(super) sample: Sample,
}

impl Record {
    /// One line while the benchmark runs.
    pub(super) fn print_progress(&self) {
        let sample = &self.sample;
        println!(
            "round {} {:<34} {:<6} {:>8.0} req/s {:>7.1} µs CPU  p99 {:>8.2} ms  {} errors  others {:.0}%",
            self.round,
            self.target.label(),
            self.load.name(),
            sample.rate,
            sample.cpu_us,
            sample.answered.p99_us as f64 / 1e3,
            sample.answered.errors,
            sample.others * 100.0
        );
    }
}

/// Above this share of others a run's rates are told to be unreliable.
const QUIET: f64 = 0.05;

/// Something measured, as a number; `None` where it was not.
type Metric = fn(&Sample) -> Option<f64>;

const RATE: Metric = |sample| Some(sample.rate);
const CPU: Metric = |sample| Some(sample.cpu_us);
const P50_MS: Metric = |sample| Some(sample.answered.p50_us as f64 / 1e3);
const P99_MS: Metric = |sample| Some(sample.answered.p99_us as f64 / 1e3);
const P999_MS: Metric = |sample| Some(sample.answered.p999_us as f64 / 1e3);
const FAIRNESS: Metric = |sample| sample.fairness;
const SPREAD: Metric = |sample| sample.spread.map(|spread| spread as f64);
const RSS_MIB: Metric = |sample| sample.primary.map(|memory| memory.rss_kib as f64 / 1024.0);
const PSS_MIB: Metric = |sample| sample.primary.map(|memory| memory.pss_kib as f64 / 1024.0);
const OTHERS: Metric = |sample| Some(sample.others);
const ERRORS: Metric = |sample| Some(sample.answered.errors as f64);

/// Everything measured in one run.
pub(super) struct Report {
    seconds: u32,
    rounds: u32,
    workers: u32,
    /// All measurements, in the order they were made.
    pub(super) records: Vec<Record>,
    left_out: Vec<(Target, String)>,
}

impl Report {
    /// Nothing measured yet.
    pub(super) fn new(seconds: u32, rounds: u32, workers: u32) -> Self {
        Self { seconds, rounds, workers, records: Vec::new(), left_out: Vec::new() }
    }

    /// Notes that a server failed; it is not tried again, and its numbers stay out of the ratios.
    pub(super) fn leave_out(&mut self, target: &Target, reason: &str) {
        self.left_out.push((target.clone(), reason.to_owned()));
    }

    /// Whether a server has failed before.
    pub(super) fn is_out(&self, target: &Target) -> bool {
        self.left_out.iter().any(|(out, _)| out == target)
    }

    /// One table per load and group, then the aims.
    pub(super) fn print(&self) {
        for load in LoadKind::ALL {
            for line in self.lines() {
                self.print_table(load, line.as_deref());
            }
        }
        for (target, reason) in &self.left_out {
            println!("\nleft out: {}: {reason}", target.label());
        }
        self.print_disturbance();
        self.print_aims();
    }

    /// Tells how busy the machine was with other things, and what that means.
    fn print_disturbance(&self) {
        let all = self.records.iter().filter_map(|record| OTHERS(&record.sample)).collect();
        let Some(others) = median(all) else { return };
        println!("\nother processes took {:.0}% of the machine (median)", others * 100.0);
        if others > QUIET {
            println!("that is too much to trust rates and latencies; CPU per request suffers less");
        }
    }

    /// Node lines in the order they were measured, then the native servers.
    fn lines(&self) -> Vec<Option<String>> {
        let mut lines: Vec<Option<String>> = Vec::new();
        for record in &self.records {
            if !lines.contains(&record.target.node_line) {
                lines.push(record.target.node_line.clone());
            }
        }
        lines
    }

    fn print_table(&self, load: LoadKind, line: Option<&str>) {
        let families: Vec<Family> =
            Family::ALL.into_iter().filter(|f| self.has(*f, line, load)).collect();
        let Some(first) = families.first() else { return };
        let group = line.map_or("native".to_owned(), |line| format!("Node {line}"));
        println!("\n{}", load.title());
        println!(
            "{group}, {} workers, median of {} rounds of {} s; ratios against {}",
            self.workers,
            self.rounds,
            self.seconds,
            first.baseline().title()
        );
        println!(
            "{:<24}{:>9}{:>7}{:>10}{:>7}{:>9}{:>9}{:>10}{:>9}{:>8}{:>16}{:>8}",
            "server",
            "req/s",
            "ratio",
            "CPU µs/r",
            "ratio",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "max/min",
            "differ",
            "primary RSS/PSS",
            "errors"
        );
        for family in families {
            println!("{}", self.row(Key { family, line, load }));
        }
    }

    fn row(&self, key: Key<'_>) -> String {
        let base = Key { family: key.family.baseline(), ..key };
        let mut row = format!("{:<24}", key.family.title());
        let mut cell = |width: usize, decimals: usize, value: Option<f64>| {
            let text = value.map_or("-".to_owned(), |value| format!("{value:.decimals$}"));
            let _ = write!(row, "{text:>width$}"); // writing to a String cannot fail
        };
        cell(9, 0, self.median(key, RATE));
        cell(7, 2, self.ratio(key, base, RATE));
        cell(10, 1, self.median(key, CPU));
        cell(7, 2, self.ratio(key, base, CPU));
        cell(9, 2, self.median(key, P50_MS));
        cell(9, 2, self.median(key, P99_MS));
        cell(10, 2, self.median(key, P999_MS));
        cell(9, 3, self.median(key, FAIRNESS));
        cell(8, 0, self.most(key, SPREAD));
        cell(8, 1, self.median(key, RSS_MIB));
        cell(8, 1, self.median(key, PSS_MIB));
        cell(8, 0, self.total(key, ERRORS));
        row
    }

    fn print_aims(&self) {
        println!("\naims of the design, and whether this run met them");
        for aim in AIMS {
            for line in self.lines_of(aim) {
                let key = Key { family: aim.family, line: line.as_deref(), load: aim.load };
                let measured = (aim.measure)(self, key);
                let verdict = match measured {
                    None => "not measured".to_owned(),
                    Some(value) => {
                        let met = if aim.bound.holds(value) { "met" } else { "NOT met" };
                        format!("{met}: {value:.3}")
                    }
                };
                let group = line.map_or(String::new(), |line| format!(" (Node {line})"));
                println!("  {:<84}{verdict}", format!("{}{group}", aim.text()));
            }
        }
        for aim in ELSEWHERE {
            println!("  {aim:<84}not measured by this command");
        }
    }

    /// The groups an aim speaks of: each Node line, or the native servers.
    fn lines_of(&self, aim: &Aim) -> Vec<Option<String>> {
        let lines = self.lines();
        let of = lines.into_iter().filter(|line| line.is_some() == aim.family.is_node());
        let of: Vec<Option<String>> = of.collect();
        if of.is_empty() { vec![None] } else { of }
    }

    fn has(&self, family: Family, line: Option<&str>, load: LoadKind) -> bool {
        self.values(Key { family, line, load }, RATE).next().is_some()
    }

    /// A metric of one server under one load, by round.
    fn values<'a>(
        &'a self,
        key: Key<'a>,
        metric: Metric,
    ) -> impl Iterator<Item = (u32, f64)> + use<'a> {
        self.records
            .iter()
            .filter(move |record| {
                record.target.family == key.family
                    && record.target.node_line.as_deref() == key.line
                    && record.load == key.load
            })
            .filter_map(move |record| Some((record.round, metric(&record.sample)?)))
    }

    fn median(&self, key: Key<'_>, metric: Metric) -> Option<f64> {
        median(self.values(key, metric).map(|(_, value)| value).collect())
    }

    fn most(&self, key: Key<'_>, metric: Metric) -> Option<f64> {
        self.values(key, metric).map(|(_, value)| value).reduce(f64::max)
    }

    fn total(&self, key: Key<'_>, metric: Metric) -> Option<f64> {
        self.values(key, metric).map(|(_, value)| value).reduce(|a, b| a + b)
    }

    /// The median of the ratios of the rounds in which both were measured.
    fn ratio(&self, key: Key<'_>, base: Key<'_>, metric: Metric) -> Option<f64> {
        let base: Vec<(u32, f64)> = self.values(base, metric).collect();
        let ratios = self.values(key, metric).filter_map(|(round, value)| {
            let (_, other) = base.iter().find(|(other, _)| *other == round)?;
            (*other > 0.0).then(|| value / other)
        });
        median(ratios.collect())
    }

    /// Every measurement, for other tools.
    pub(super) fn to_json(&self) -> String {
        let records: Vec<Value> = self.records.iter().map(to_json).collect();
        let left_out: Vec<Value> = self
            .left_out
            .iter()
            .map(|(target, reason)| json!({ "server": target.label(), "reason": reason }))
            .collect();
        let all = json!({
            "seconds": self.seconds,
            "rounds": self.rounds,
            "workers": self.workers,
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "left_out": left_out,
            "records": records,
        });
        format!("{all:#}\n")
    }
}

fn to_json(record: &Record) -> Value {
    let sample = &record.sample;
    json!({
        "round": record.round,
        "server": record.target.family.name(),
        "node": record.target.node_line,
        "load": record.load.name(),
        "requests_per_second": sample.rate,
        "cpu_us_per_request": sample.cpu_us,
        "requests": sample.answered.requests,
        "errors": sample.answered.errors,
        "p50_us": sample.answered.p50_us,
        "p99_us": sample.answered.p99_us,
        "p999_us": sample.answered.p999_us,
        "connections_max_over_min": sample.fairness,
        "connections_differ_by": sample.spread,
        "others_share": sample.others,
        "primary_rss_kib": sample.primary.map(|memory| memory.rss_kib),
        "primary_pss_kib": sample.primary.map(|memory| memory.pss_kib),
    })
}

/// What a row of a table is about.
#[derive(Clone, Copy)]
struct Key<'a> {
    family: Family,
    line: Option<&'a str>,
    load: LoadKind,
}

/// What a measured value must be.
#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
            Self::Below(bound) => value < bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!(">= {bound}"),
            Self::AtMost(bound) => format!("<= {bound}"),
            Self::Below(bound) => format!("< {bound}"),
        }
    }
}

/// One aim of the design that this command can measure.
struct Aim {
    what: &'static str,
    family: Family,
    load: LoadKind,
    bound: Bound,
    measure: fn(&Report, Key<'_>) -> Option<f64>,
}

impl Aim {
    fn text(&self) -> String {
        let (server, load) = (self.family.title(), self.load.name());
        format!("{server}, {load}: {} {}", self.what, self.bound.text())
    }
}

/// The aims, in the order of the design's table.
const AIMS: &[Aim] = &[
    Aim {
        what: "requests/s over Node's default",
        family: Family::Kernel,
        load: LoadKind::Short,
        bound: Bound::AtLeast(2.5),
        measure: |report, key| report.ratio(key, key.of(Family::Cluster), RATE),
    },
    Aim {
        what: "CPU per request over Node's default",
        family: Family::Kernel,
        load: LoadKind::Short,
        bound: Bound::AtMost(0.45),
        measure: |report, key| report.ratio(key, key.of(Family::Cluster), CPU),
    },
    Aim {
        what: "connections, max/min",
        family: Family::Kernel,
        load: LoadKind::Short,
        bound: Bound::AtMost(1.01),
        measure: |report, key| report.most(key, FAIRNESS),
    },
    Aim {
        what: "connections, max/min",
        family: Family::Handoff,
        load: LoadKind::Short,
        bound: Bound::AtMost(1.01),
        measure: |report, key| report.most(key, FAIRNESS),
    },
    Aim {
        what: "connections differ by",
        family: Family::Kernel,
        load: LoadKind::Short,
        bound: Bound::AtMost(1.0),
        measure: |report, key| report.most(key, SPREAD),
    },
    Aim {
        what: "connections differ by",
        family: Family::Handoff,
        load: LoadKind::Short,
        bound: Bound::AtMost(1.0),
        measure: |report, key| report.most(key, SPREAD),
    },
    Aim {
        what: "p99 over Node's default",
        family: Family::Kernel,
        load: LoadKind::Stall,
        bound: Bound::Below(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Cluster), P99_MS),
    },
    Aim {
        what: "p99 over plain reuse-port",
        family: Family::Kernel,
        load: LoadKind::Stall,
        bound: Bound::Below(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Reuseport), P99_MS),
    },
    Aim {
        what: "p99 over Node's default",
        family: Family::Handoff,
        load: LoadKind::Stall,
        bound: Bound::Below(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Cluster), P99_MS),
    },
    Aim {
        what: "p99 over plain reuse-port",
        family: Family::Handoff,
        load: LoadKind::Stall,
        bound: Bound::Below(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Reuseport), P99_MS),
    },
    Aim {
        what: "requests/s over Node's default",
        family: Family::Kernel,
        load: LoadKind::Kept,
        bound: Bound::AtLeast(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Cluster), RATE),
    },
    Aim {
        what: "requests/s over plain reuse-port",
        family: Family::Kernel,
        load: LoadKind::Kept,
        bound: Bound::AtLeast(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::Reuseport), RATE),
    },
    Aim {
        what: "requests/s over tokio's threads",
        family: Family::Axum,
        load: LoadKind::Short,
        bound: Bound::AtLeast(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::AxumTokio), RATE),
    },
    Aim {
        what: "requests/s over tokio's threads",
        family: Family::Axum,
        load: LoadKind::Kept,
        bound: Bound::AtLeast(1.0),
        measure: |report, key| report.ratio(key, key.of(Family::AxumTokio), RATE),
    },
    Aim {
        what: "primary's resident MiB",
        family: Family::Kernel,
        load: LoadKind::Short,
        bound: Bound::AtMost(4.0),
        measure: |report, key| report.most(key, RSS_MIB),
    },
    Aim {
        what: "primary's resident MiB",
        family: Family::Handoff,
        load: LoadKind::Short,
        bound: Bound::AtMost(4.0),
        measure: |report, key| report.most(key, RSS_MIB),
    },
];

impl<'a> Key<'a> {
    /// The same group and load, another server.
    fn of(self, family: Family) -> Key<'a> {
        Key { family, ..self }
    }
}

/// Rows of the design's table that are not about HTTP.
const ELSEWHERE: &[&str] = &[
    "channel, Rust to Rust",
    "channel to stock Node",
    "spawn with a 2 GB parent",
    "thread messages",
    "reload under load, worker killed under load (counted by the fault tests)",
];

/// The middle value; the mean of the two middle ones for an even count.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    Some(f64::midpoint(values[middle - 1], upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Answered;

    fn report(rates: &[(u32, Family, f64)]) -> Report {
        let mut report = Report::new(1, 3, 2);
        for (round, family, rate) in rates {
            let answered =
                Answered { requests: 1, seconds: 1.0, p50_us: 1, p99_us: 2, p999_us: 3, errors: 0 };
            report.records.push(Record {
                round: *round,
                target: Target::for_test(*family, "20"),
                load: LoadKind::Short,
                sample: Sample {
                    rate: *rate,
                    cpu_us: 1.0,
                    answered,
                    fairness: None,
                    spread: None,
                    primary: None,
                    others: 0.0,
                },
            });
        }
        report
    }

    fn key(family: Family) -> Key<'static> {
        Key { family, line: Some("20"), load: LoadKind::Short }
    }

    #[test]
    fn ratio_is_the_median_of_the_ratios_of_each_round() {
        use Family::{Cluster, Kernel};
        let report = report(&[
            (1, Cluster, 10.0),
            (1, Kernel, 30.0),
            (2, Cluster, 100.0),
            (2, Kernel, 200.0),
            (3, Cluster, 1.0),
            (3, Kernel, 5.0),
        ]);
        assert_eq!(report.ratio(key(Kernel), key(Cluster), RATE), Some(3.0));
        assert_eq!(report.median(key(Kernel), RATE), Some(30.0));
    }

    #[test]
    fn round_without_the_baseline_has_no_ratio() {
        let report = report(&[(1, Family::Cluster, 10.0), (2, Family::Kernel, 30.0)]);
        assert_eq!(report.ratio(key(Family::Kernel), key(Family::Cluster), RATE), None);
    }

    #[test]
    fn median_of_an_even_count_is_the_mean_of_the_middle() {
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn bounds_hold_as_written() {
        assert!(Bound::AtLeast(2.5).holds(2.5) && !Bound::AtLeast(2.5).holds(2.4));
        assert!(Bound::AtMost(1.01).holds(1.01) && !Bound::AtMost(1.01).holds(1.02));
        assert!(!Bound::Below(1.0).holds(1.0));
    }
}
