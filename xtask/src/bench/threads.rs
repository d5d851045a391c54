//! `cargo xtask bench threads`: messages between threads, tasks of a pool, waiting on a word, and a server under load.
//!
//! The contenders are programs that measure for a while and print lines of JSON (`bench/threads`, `bench/pool`,
//! `bench/apps/post_message.cjs`, `bench/apps/piscina.cjs`). This file runs them in interleaved rounds, takes ratios within each
//! round, prints medians, and says which aims were met. No time fails it.
//!
//! Surprising: our crates are built for speed here, as in a program that depends on them; the project's own release profile
//! builds them for size.
//!
//! Source: the table "Speed to aim for" of the project's design.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::report::median;
use super::targets::cargo_build;
use crate::setup::manifest::Manifest;
use crate::{paths, proc};

/// One run of a contender; far more than it takes.
const LIMIT: Duration = Duration::from_secs(120);
const OURS: &str = "polyfork";
const PARTS: [&str; 5] = ["messages", "tasks", "atomics", "speedup", "server"];

/// A figure of a table: its heading, and how it is read from a line of JSON.
type Figure = (&'static str, fn(&Value) -> Option<f64>);

const RATE: Figure = ("per s", |line| line["rate"].as_f64());
const TASK_RATE: Figure = ("tasks/s", |line| per(line, "tasks", "seconds"));
const TASK_CPU: Figure = ("CPU µs", |line| per(line, "cpu_us", "tasks"));
const P50: Figure = ("p50 µs", |line| line["p50_us"].as_f64());
const P99: Figure = ("p99 µs", |line| line["p99_us"].as_f64());
const SPEEDUP: Figure = ("speed-up", |line| line["speedup"].as_f64());
const LIGHT: Figure = ("light/s", |line| per(line, "light", "seconds"));
const HEAVY: Figure = ("heavy/s", |line| per(line, "heavy", "seconds"));

fn per(line: &Value, what: &str, each: &str) -> Option<f64> {
    Some(line[what].as_f64()? / line[each].as_f64()?)
}

/// One table. The first figure is the one that is compared.
struct Table {
    title: String,
    part: &'static str,
    figures: &'static [Figure],
    /// Less of the first figure is better.
    less: bool,
    /// Who is compared with the others.
    ours: &'static str,
    runs: Vec<Run>,
}

/// One program to be run in each round.
struct Run {
    program: PathBuf,
    args: Vec<String>,
    /// Who its one line is about. `None`: each of its lines tells, by its key `how`.
    who: Option<&'static str>,
}

struct Sample {
    table: usize,
    round: u32,
    who: String,
    line: Value,
}

/// What must hold between ours and another in one table.
struct Aim {
    table: &'static str,
    than: &'static str,
    /// How many times better in the first figure.
    times: f64,
}

const AIMS: &[Aim] = &[
    Aim { table: ONEWAY, than: "crossbeam", times: 1.0 },
    Aim { table: ECHO, than: "crossbeam", times: 1.0 },
    Aim { table: "empty tasks, 1 producer, 256 under way", than: RAYON, times: 1.0 },
    Aim { table: "empty tasks, 8 producers, 256 under way each", than: RAYON, times: 1.0 },
    Aim { table: "empty tasks, 1 producer, one at a time", than: RAYON, times: 1.0 },
    Aim { table: "empty tasks, 8 producers, one at a time each", than: RAYON, times: 1.0 },
    Aim { table: WORD, than: "Node 26", times: 1.0 },
    Aim { table: SERVER, than: "inline", times: 10.0 },
];

const ONEWAY: &str = "messages, one way";
const ECHO: &str = "messages, there and back";
const WORD: &str = "a word in shared memory, there and back";
const SERVER: &str = "light requests beside heavy ones";
const RAYON: &str = "rayon + oneshot";

/// The command.
///
/// # Errors
/// A wrong option, a build that fails, or an interrupt.
pub(super) fn main(args: &mut Arguments, manifest: &Manifest) -> Result<ExitCode> {
    let ms: u32 = args.opt_value_from_str("--ms")?.unwrap_or(500);
    let rounds: u32 = args.opt_value_from_str("--rounds")?.unwrap_or(5);
    let only: Option<String> = args.opt_value_from_str("--only")?;
    let json: Option<PathBuf> = args.opt_value_from_str("--json")?;
    crate::nothing_left(args)?;
    ensure!((50..=30_000).contains(&ms), "--ms must be 50 to 30000");
    ensure!((1..=50).contains(&rounds), "--rounds must be 1 to 50");
    let parts = parts(only.as_deref())?;
    let tables: Vec<Table> =
        tables(manifest, ms)?.into_iter().filter(|table| parts.contains(&table.part)).collect();
    let samples = measure(&tables, rounds)?;
    for (index, table) in tables.iter().enumerate() {
        print(table, index, &samples);
    }
    tell_aims(&tables, &samples);
    if let Some(path) = json {
        std::fs::write(&path, to_json(&tables, &samples))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn parts(only: Option<&str>) -> Result<Vec<&'static str>> {
    let Some(only) = only else { return Ok(PARTS.to_vec()) };
    let known = |name: &str| PARTS.into_iter().find(|part| *part == name);
    only.split(',')
        .map(|name| known(name).with_context(|| format!("no part `{name}`: {}", PARTS.join(", "))))
        .collect()
}

fn tables(manifest: &Manifest, ms: u32) -> Result<Vec<Table>> {
    let fast = |package: &'static str| {
        let for_speed = |krate: &str| format!("profile.release.package.{krate}.opt-level=3");
        let (lib, core) = (for_speed("polyfork"), for_speed("polyfork-core"));
        cargo_build(&["-p", package, "--config", &lib, "--config", &core])
    };
    let all = All { ports: fast("bench-threads")?, pool: fast("bench-pool")?, manifest, ms };
    let mut tables = vec![all.messages("oneway", ONEWAY), all.messages("echo", ECHO)];
    for (work, what) in [("empty", "empty tasks"), ("20us", "tasks of 20 µs")] {
        for (producers, how_many) in [("1", "1 producer"), ("8", "8 producers")] {
            for mode in ["rate", "latency"] {
                let each = if producers == "1" { "" } else { " each" };
                let how = if mode == "rate" { "256 under way" } else { "one at a time" };
                let title = format!("{what}, {how_many}, {how}{each}");
                tables.push(all.tasks(title, work, producers, mode));
            }
        }
    }
    tables.extend([all.atomics(), all.speedup(), all.server()]);
    Ok(tables)
}

/// What all tables are made of.
struct All<'a> {
    ports: PathBuf,
    pool: PathBuf,
    manifest: &'a Manifest,
    ms: u32,
}

impl All<'_> {
    fn messages(&self, mode: &'static str, title: &str) -> Table {
        let ms = self.ms.to_string();
        let args = vec![mode.to_owned(), ms, "1".to_owned()];
        let mut runs = vec![Run { program: self.ports.clone(), args, who: None }];
        runs.extend(self.scripts(mode));
        let (title, ours) = (title.to_owned(), "ours-bounded");
        Table { title, part: "messages", figures: &[RATE], less: false, ours, runs }
    }

    fn tasks(&self, title: String, work: &str, producers: &str, mode: &str) -> Table {
        let ms = self.ms.to_string();
        let ours = |who, how: &str| {
            let words = ["tasks", how, work, producers, mode, &ms];
            self.of_pool(who, &words)
        };
        let mut runs = vec![
            ours(OURS, "polyfork"),
            ours(RAYON, "rayon"),
            ours("tokio spawn_blocking", "spawn-blocking"),
        ];
        if let Some((node, piscina)) = self.tool("node26").zip(self.tool("piscina")) {
            let script = script("piscina.cjs");
            let folder = piscina.display().to_string();
            let words = [&script, &folder, work, producers, mode, &ms];
            let args = words.map(str::to_owned).to_vec();
            runs.push(Run { program: node, args, who: Some("piscina, Node 26") });
        }
        let latency = mode == "latency";
        let figures: &[Figure] =
            if latency { &[P50, P99, TASK_CPU] } else { &[TASK_RATE, TASK_CPU] };
        Table { title, part: "tasks", figures, less: latency, ours: OURS, runs }
    }

    fn atomics(&self) -> Table {
        let mut runs = vec![self.of_pool(OURS, &["atomics", &self.ms.to_string()])];
        runs.extend(self.scripts("atomics"));
        let title = WORD.to_owned();
        Table { title, part: "atomics", figures: &[RATE], less: false, ours: OURS, runs }
    }

    fn speedup(&self) -> Table {
        // A round of jobs takes longer than a measurement of anything else.
        let ms = (self.ms * 2).to_string();
        let run = |who, how| self.of_pool(who, &["speedup", how, &ms]);
        let runs = vec![run(OURS, "polyfork"), run("rayon", "rayon")];
        let title = "a processor-bound job on all cores against one".to_owned();
        Table { title, part: "speedup", figures: &[SPEEDUP], less: false, ours: OURS, runs }
    }

    fn server(&self) -> Table {
        let ms = (self.ms * 2).to_string();
        let run = |who, how| self.of_pool(who, &["serve", how, &ms]);
        let runs = vec![run(OURS, "pool"), run("inline", "inline")];
        let figures = &[P99, P50, LIGHT, HEAVY];
        let title = SERVER.to_owned();
        Table { title, part: "server", figures, less: true, ours: OURS, runs }
    }

    fn of_pool(&self, who: &'static str, words: &[&str]) -> Run {
        let args = words.iter().map(|word| (*word).to_owned()).collect();
        Run { program: self.pool.clone(), args, who: Some(who) }
    }

    /// `post_message.cjs` with the runtimes there are.
    fn scripts(&self, mode: &str) -> Vec<Run> {
        let args = vec![script("post_message.cjs"), mode.to_owned(), self.ms.to_string()];
        let run = |(name, who)| {
            Some(Run { program: self.tool(name)?, args: args.clone(), who: Some(who) })
        };
        [("node26", "Node 26"), ("bun", "Bun")].into_iter().filter_map(run).collect()
    }

    /// A tool's path. One that cannot be had is left out.
    fn tool(&self, name: &str) -> Option<PathBuf> {
        self.manifest.tool(name).ok().map(|tool| tool.path.clone())
    }
}

fn script(name: &str) -> String {
    paths::root().join("bench/apps").join(name).display().to_string()
}

fn measure(tables: &[Table], rounds: u32) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        for (index, table) in tables.iter().enumerate() {
            for run in &table.runs {
                proc::check_interrupted()?;
                for (who, line) in lines(run)? {
                    samples.push(Sample { table: index, round, who, line });
                }
            }
        }
    }
    Ok(samples)
}

fn lines(run: &Run) -> Result<Vec<(String, Value)>> {
    let mut command = Command::new(&run.program);
    command.args(&run.args);
    let done = proc::capture(command, LIMIT)?;
    let what = format!("{} {}", run.program.display(), run.args.join(" "));
    ensure!(done.ok(), "{what}: {}", done.complaint());
    let mut told = Vec::new();
    for line in done.stdout.lines() {
        let line: Value = serde_json::from_str(line)
            .with_context(|| format!("{what} printed {:?}", done.stdout))?;
        let who = match (run.who, line["how"].as_str()) {
            (Some(who), _) | (None, Some(who)) => who.to_owned(),
            (None, None) => bail!("{what} does not tell whom {line} is about"),
        };
        told.push((who, line));
    }
    ensure!(!told.is_empty(), "{what} printed nothing");
    Ok(told)
}

/// The samples of one contender in one table.
fn of<'a>(
    samples: &'a [Sample],
    table: usize,
    who: &'a str,
) -> impl Iterator<Item = &'a Sample> + 'a {
    samples.iter().filter(move |sample| sample.table == table && sample.who == who)
}

/// How many times better ours is than another: the median over the rounds of the ratio within the round.
fn times_better(table: &Table, index: usize, samples: &[Sample], who: &str) -> Option<f64> {
    let (_, read) = table.figures[0];
    let ratio = |theirs: &Sample| {
        let ours = of(samples, index, table.ours).find(|ours| ours.round == theirs.round)?;
        let ratio = read(&ours.line)? / read(&theirs.line)?;
        Some(if table.less { 1.0 / ratio } else { ratio })
    };
    median(of(samples, index, who).filter_map(ratio).collect())
}

fn print(table: &Table, index: usize, samples: &[Sample]) {
    println!("\n{}: medians", table.title);
    let headings: String =
        table.figures.iter().map(|(heading, _)| format!(" {heading:>11}")).collect();
    println!("{:<24}{headings} {:>13}", "who", "ours better by");
    let mut seen: Vec<&str> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.table == index) {
        if seen.contains(&sample.who.as_str()) {
            continue;
        }
        seen.push(&sample.who);
        let median = |read: fn(&Value) -> Option<f64>| {
            median(of(samples, index, &sample.who).filter_map(|s| read(&s.line)).collect())
        };
        let figures: String = table
            .figures
            .iter()
            .map(|(_, read)| format!(" {:>11}", median(*read).map_or("-".to_owned(), shown)))
            .collect();
        let better = times_better(table, index, samples, &sample.who);
        let better = better.map_or("-".to_owned(), |times| format!("{times:.2}"));
        println!("{:<24}{figures} {better:>13}", sample.who);
    }
}

/// Few digits, whatever the size.
fn shown(number: f64) -> String {
    if number >= 100.0 { format!("{number:.0}") } else { format!("{number:.2}") }
}

fn tell_aims(tables: &[Table], samples: &[Sample]) {
    println!("\naims, and whether this run met them");
    for aim in AIMS {
        let Some(index) = tables.iter().position(|table| table.title == aim.table) else {
            continue;
        };
        let Some(times) = times_better(&tables[index], index, samples, aim.than) else { continue };
        let what = format!("{}: {} times {} or better", aim.table, aim.times, aim.than);
        println!("  {what:<74} {}: {times:.2}", if times >= aim.times { "met" } else { "NOT met" });
    }
}

fn to_json(tables: &[Table], samples: &[Sample]) -> String {
    let all: Vec<Value> = samples
        .iter()
        .map(|s| {
            json!({
                "table": tables[s.table].title, "round": s.round, "who": s.who, "line": s.line,
            })
        })
        .collect();
    Value::from(all).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(less: bool) -> Table {
        let (title, ours, runs) = ("a table".to_owned(), OURS, Vec::new());
        Table { title, part: "tasks", figures: &[RATE], less, ours, runs }
    }

    fn sample(round: u32, who: &str, rate: f64) -> Sample {
        Sample { table: 0, round, who: who.to_owned(), line: json!({ "rate": rate }) }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was ten times slower in the second round.
        let samples = [
            sample(1, OURS, 100.0),
            sample(1, "other", 50.0),
            sample(2, OURS, 10.0),
            sample(2, "other", 5.0),
        ];
        assert_eq!(times_better(&table(false), 0, &samples, "other"), Some(2.0));
        assert_eq!(times_better(&table(true), 0, &samples, "other"), Some(0.5));
        assert_eq!(times_better(&table(true), 0, &samples, "nobody"), None);
    }

    #[test]
    fn every_part_can_be_named_and_no_other() {
        assert_eq!(parts(None).unwrap(), PARTS);
        assert_eq!(parts(Some("server,tasks")).unwrap(), ["server", "tasks"]);
        assert!(parts(Some("cows")).unwrap_err().to_string().contains("messages"));
    }
}
