//! `polyfork advise`: the four ways out of one thread, measured on this machine, and which one to take for what.
//!
//! Here the measurements are put in order and shown; how each way is driven is in `peer`, what is measured in `measure`.
//! The answer to "cluster or worker threads?" is then the asker's own figures, documented in docs/advise.md.
//!
//! The surprising rule: every figure is a median of short runs on whatever else the machine does. They are for comparing
//! the columns of a row, not for a data sheet.

use std::io;
use std::time::Duration;

use polyfork::cluster::{is_worker, usable_cpus};
use serde::Serialize;

use crate::args::tools::AdviseArgs;
use crate::exit::Code;
use crate::out;
use crate::style::{Ink, Paint};
use crate::words;

mod measure;
mod peer;

pub(crate) use peer::ENTRY;

/// The version of the JSON answer.
const VERSION: u32 = 1;

/// The columns, by the names that people know from Node.
const COLUMNS: [&str; 4] = ["cluster", "worker_threads", "spawn", "fork"];

/// One figure for each way; nothing where a way has no such thing.
#[derive(Debug, Clone, Serialize)]
struct Row {
    /// A stable word for programs.
    figure: &'static str,
    unit: &'static str,
    /// What was measured, for people.
    #[serde(skip)]
    title: &'static str,
    cluster: Option<f64>,
    worker_threads: Option<f64>,
    spawn: Option<f64>,
    fork: Option<f64>,
}

impl Row {
    fn values(&self) -> [Option<f64>; 4] {
        [self.cluster, self.worker_threads, self.spawn, self.fork]
    }
}

/// Everything, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Advice {
    version: u32,
    polyfork: &'static str,
    processors: u32,
    processors_why: String,
    rows: Vec<Row>,
    /// What could not be measured, and why.
    missing: Vec<String>,
}

/// Runs it.
pub(crate) fn run(args: AdviseArgs) -> Code {
    if is_worker() {
        return peer::work();
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let text = words::plain(&format!("cannot make a runtime: {error}"));
            crate::say(io::stderr(), &format!("polyfork: {text}\n"));
            return Code::Unexpected;
        }
    };
    let cpus = usable_cpus();
    let effort = if args.quick { Duration::from_millis(60) } else { Duration::from_millis(400) };
    let told = runtime.block_on(measure::all(effort, cpus.workers));
    let advice = Advice {
        version: VERSION,
        polyfork: env!("CARGO_PKG_VERSION"),
        processors: cpus.workers,
        processors_why: cpus.explanation,
        rows: told.rows,
        missing: told.missing,
    };
    let text = if args.json { json(&advice) } else { page(&advice, Paint::stdout()) };
    out::write(text.as_bytes());
    if advice.missing.is_empty() { Code::Stopped } else { Code::Unexpected }
}

fn json(advice: &Advice) -> String {
    // Numbers and our own words can always be written.
    let mut text = serde_json::to_string_pretty(advice).unwrap_or_default();
    text.push('\n');
    text
}

const WHAT: [[&str; 4]; 4] = [
    ["many processes, one port", "many threads, one process", "any program", "own code in a child"],
    ["memory on request", "memory shared", "memory apart", "memory on request"],
    ["messages", "messages, memory", "three streams", "messages, handles"],
    [
        "requests over all cores",
        "CPU-bound work beside a server",
        "scripts and tools",
        "work that may crash, or is not trusted",
    ],
];

fn page(advice: &Advice, paint: Paint) -> String {
    let mut text = format!(
        "On this machine: {} ({})\n\n",
        plural(advice.processors, "processor"),
        words::harmless(&advice.processors_why)
    );
    let mut table: Vec<[String; 5]> = Vec::new();
    let head = std::iter::once("").chain(COLUMNS).map(str::to_owned);
    table.extend(<[String; 5]>::try_from(head.collect::<Vec<_>>()));
    for (label, words) in ["what", "memory", "talk by", "for"].into_iter().zip(WHAT) {
        let cells = std::iter::once(label).chain(words).map(str::to_owned);
        table.extend(<[String; 5]>::try_from(cells.collect::<Vec<_>>()));
    }
    for row in &advice.rows {
        let values = row.values().map(|value| value.map_or("-".to_owned(), |v| shown(v, row.unit)));
        let cells = std::iter::once(row.title.to_owned()).chain(values);
        table.extend(<[String; 5]>::try_from(cells.collect::<Vec<_>>()));
    }
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..5).map(|column| width(column).unwrap_or(0)).collect();
    for (number, row) in table.iter().enumerate() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        let line = line.trim_end();
        text.push_str(&if number == 0 { paint.with(Ink::Good, line) } else { line.to_owned() });
        text.push('\n');
    }
    text.push('\n');
    text.push_str(&counsel(advice));
    for missing in &advice.missing {
        text.push_str(&format!("not measured: {}\n", words::harmless(missing)));
    }
    text
}

/// Which one to take, with this machine's reasons.
fn counsel(advice: &Advice) -> String {
    let of = |figure: &str| advice.rows.iter().find(|row| row.figure == figure);
    let mut text = String::from("Take\n");
    let mut line = |words: String| text.push_str(&format!("  {words}\n"));
    line("cluster          to serve requests with every core: a crash costs one worker's requests, a reload none.".into());
    let threads = match (of("round_trip"), of("memory")) {
        (Some(trip), Some(memory)) => match (trip.worker_threads, trip.fork, memory.fork) {
            (Some(thread), Some(process), Some(bytes)) => format!(
                " Here a message and its answer take {}, to a process {}, which also costs {}.",
                shown(thread, "s"),
                shown(process, "s"),
                shown(bytes, "bytes")
            ),
            _ => String::new(),
        },
        _ => String::new(),
    };
    line(format!(
        "worker_threads   for CPU-bound work inside one app, on data that is shared.{threads}"
    ));
    line("spawn            to run somebody else's program and read what it writes.".into());
    let crash = of("crash").and_then(|row| row.fork).map_or(String::new(), |seconds| {
        format!(" Here a killed one is replaced and answers after {}.", shown(seconds, "s"))
    });
    line(format!("fork             for own code that may crash, leak or be killed.{crash}"));
    line("cluster + threads  where requests need long computations: processes for the port, a pool in each.".into());
    text
}

/// A figure with a unit that fits its size.
fn shown(value: f64, unit: &str) -> String {
    let scaled = |steps: &[(f64, &str)]| {
        let fits = steps.iter().find(|(least, _)| value >= *least).or(steps.last());
        let (least, name) = fits.copied().unwrap_or((1.0, ""));
        let number = value / least;
        let digits = if number >= 100.0 { 0 } else { 1 };
        format!("{number:.digits$} {name}").trim_end().to_owned()
    };
    match unit {
        "s" => scaled(&[(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")]),
        "bytes" => scaled(&[(f64::from(1 << 20), "MiB"), (1024.0, "KiB"), (1.0, "B")]),
        "per_s" => format!("{}/s", scaled(&[(1e6, "M"), (1e3, "k"), (1.0, "")]).replace(' ', "")),
        "times" => format!("{value:.2} x"),
        _ => format!("{value:.1}"),
    }
}

fn plural(number: u32, word: &str) -> String {
    if number == 1 { format!("1 {word}") } else { format!("{number} {word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_in_a_unit_that_fits() {
        assert_eq!(shown(0.000_012_34, "s"), "12.3 us");
        assert_eq!(shown(0.25, "s"), "250 ms");
        assert_eq!(shown(3_400_000.0, "per_s"), "3.4M/s");
        assert_eq!(shown(812.0, "per_s"), "812/s");
        assert_eq!(shown(3.0 * 1024.0 * 1024.0, "bytes"), "3.0 MiB");
        assert_eq!(shown(1.94, "times"), "1.94 x");
    }

    #[test]
    fn page_names_all_columns_and_what_is_missing() {
        let row = Row {
            figure: "start",
            unit: "s",
            title: "start",
            cluster: Some(0.002),
            worker_threads: Some(0.000_02),
            spawn: None,
            fork: Some(0.001),
        };
        let advice = Advice {
            version: VERSION,
            polyfork: "0",
            processors: 2,
            processors_why: "two".into(),
            rows: vec![row],
            missing: vec!["spawn: no such program: cat".into()],
        };
        let page = page(&advice, Paint::PLAIN);
        assert!(COLUMNS.iter().all(|column| page.contains(column)), "{page}");
        assert!(page.contains("2.0 ms") && page.contains("20.0 us"), "{page}");
        assert!(page.contains("not measured: spawn: no such program: cat"), "{page}");
    }
}
