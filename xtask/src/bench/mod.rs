//! `cargo xtask bench`: polyfork beside its peers, in one run, by interleaved rounds.
//!
//! `channel`, `spawn`, `threads`, `soak` and `operate` are benchmarks of their own. For `bench http`, `targets` starts a server, `load` sends requests, `measure` reads CPU, memory and fairness,
//! `report` prints. This file chooses what to run and keeps the order: every round starts each
//! server anew, measures it and stops it, so that a drift of the machine meets all of them alike
//! and ratios can be taken within a round.
//!
//! Surprising: nothing here fails on a time. A peer that cannot be had is told and left out.
//!
//! Source: the table "Speed to aim for" of the project's design.

mod channel;
mod load;
mod managed;
mod measure;
mod operate;
mod report;
mod soak;
mod spawn;
mod targets;
mod threads;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use pico_args::Arguments;

use crate::setup::manifest::Manifest;
use crate::{paths, proc};
use load::{LoadKind, Wrk};
use report::{Record, Report};
use targets::{Family, Plan, Target};

const HELP: &str = "\
Compares polyfork with its peers. Load goes to loopback only and is bounded in time.

Usage: cargo xtask bench http [OPTIONS]
       cargo xtask bench spawn [--seconds N] [--rounds R] [--json FILE]
       cargo xtask bench channel [--seconds N] [--rounds R] [--json FILE]
       cargo xtask bench soak [--reloads N] [--kills N] [--upgrades N] [--requests N] [--only PART]
       cargo xtask bench operate [--seconds N] [--rounds R] [--apps LIST]
       cargo xtask bench threads [--ms N] [--rounds R] [--only PARTS] [--json FILE]

`spawn` starts /bin/true from parents of 10 MiB and 2 GiB, beside Node, Bun and std::process (default 2 s, 3 rounds).
`channel` sends messages between two processes, beside Node, Bun, ipc-channel and a bare socket (the same defaults).
`threads` compares messages between threads, tasks of a pool, waiting on a word, the use of all cores, and a server under
load with their rivals in Rust, Node and Bun (default 500 ms, 5 rounds). PARTS: messages tasks atomics speedup server,
separated by commas.

`soak` reloads, kills workers and replaces the primary while clients ask without a pause, beside PM2 and nginx, and counts what
they lose (default 20, 300, none; at least 60000 requests while reloading and upgrading; exit code 1 if we lost what we promise to
keep). PART of a title leaves only such servers. `operate` measures the primary's memory, start, crash and idle time and `ls`
beside PM2 (default 10 s idle, 3 rounds, lists of 1,10,100 apps).

Options of `http`:
  --seconds N    length of one load (default 4)
  --rounds R     interleaved rounds (default 3)
  --workers N    workers of every server (default 2)
  --only LIST    these servers only, separated by commas (see below)
  --loads LIST   these loads only: short, kept, stall (default all)
  --node LIST    Node lines, for example 20,26 (default 20,26)
  --json FILE    write every measurement to FILE

Servers: plain cluster cluster-none reuseport pm2 kernel kernel-quick handoff shared axum-tokio axum
";

/// What the user asked for.
struct Settings {
    seconds: u32,
    rounds: u32,
    workers: u32,
    loads: Vec<LoadKind>,
    plan: Vec<Target>,
    json: Option<PathBuf>,
}

/// The command.
///
/// # Errors
/// A wrong option, no wrk, or an interrupt.
pub(crate) fn main(args: &mut Arguments) -> Result<ExitCode> {
    if args.contains(["-h", "--help"]) {
        print!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    }
    let which = args.subcommand()?;
    match which.as_deref() {
        Some("http" | "spawn" | "channel" | "threads" | "soak" | "operate") => {}
        Some(other) => bail!("no benchmark `{other}`; see --help"),
        None => bail!("which benchmark? see --help"),
    }
    crate::setup::run()?;
    let manifest = Manifest::read(&paths::manifest())?;
    match which.as_deref() {
        Some("spawn") => return spawn::main(args, &manifest),
        Some("channel") => return channel::main(args, &manifest),
        Some("soak") => return soak::main(args, &manifest),
        Some("operate") => return operate::main(args, &manifest),
        Some("threads") => return threads::main(args, &manifest),
        _ => {}
    }
    let wrk = Wrk::new(manifest.tool("wrk")?);
    let settings = settings(args, &manifest)?;
    let report = measure_all(&settings, &wrk)?;
    report.print();
    if let Some(path) = &settings.json {
        std::fs::write(path, report.to_json())
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(args: &mut Arguments, manifest: &Manifest) -> Result<Settings> {
    let seconds = args.opt_value_from_str("--seconds")?.unwrap_or(4);
    let rounds = args.opt_value_from_str("--rounds")?.unwrap_or(3);
    let workers = args.opt_value_from_str("--workers")?.unwrap_or(2);
    let only: Option<String> = args.opt_value_from_str("--only")?;
    let loads: Option<String> = args.opt_value_from_str("--loads")?;
    let nodes: Option<String> = args.opt_value_from_str("--node")?;
    let json = args.opt_value_from_str("--json")?;
    crate::nothing_left(args)?;
    ensure!((1..=60).contains(&seconds), "--seconds must be 1 to 60");
    ensure!((1..=20).contains(&rounds), "--rounds must be 1 to 20");
    ensure!((2..=64).contains(&workers), "--workers must be 2 to 64");
    let families = match &only {
        None => Family::ALL.to_vec(),
        Some(list) => list.split(',').map(Family::parse).collect::<Result<_>>()?,
    };
    let loads = match &loads {
        None => LoadKind::ALL.to_vec(),
        Some(list) => list.split(',').map(LoadKind::parse).collect::<Result<_>>()?,
    };
    let lines = nodes.as_deref().unwrap_or("20,26");
    let lines: Vec<&str> = lines.split(',').map(str::trim).collect();
    let plan = Plan { manifest, families: &families, node_lines: &lines }.targets()?;
    ensure!(!plan.is_empty(), "nothing to measure");
    Ok(Settings { seconds, rounds, workers, loads, plan, json })
}

/// All rounds of all targets; the stall scenario has starts of its own.
fn measure_all(settings: &Settings, wrk: &Wrk) -> Result<Report> {
    let mut report = Report::new(settings.seconds, settings.rounds, settings.workers);
    let steady: Vec<LoadKind> =
        settings.loads.iter().copied().filter(|load| *load != LoadKind::Stall).collect();
    let stall = settings.loads.contains(&LoadKind::Stall);
    for round in 1..=settings.rounds {
        for target in &settings.plan {
            if !steady.is_empty() {
                one(settings, wrk, target, round, &steady, &mut report)?;
            }
            if stall && target.family.in_stall_scenario() {
                one(settings, wrk, target, round, &[LoadKind::Stall], &mut report)?;
            }
        }
    }
    Ok(report)
}

/// Starts one target, puts each load on it, stops it. A target that fails is told and left out.
fn one(
    settings: &Settings,
    wrk: &Wrk,
    target: &Target,
    round: u32,
    loads: &[LoadKind],
    report: &mut Report,
) -> Result<()> {
    proc::check_interrupted()?;
    if report.is_out(target) {
        return Ok(());
    }
    let result = measure_one(settings, wrk, target, round, loads);
    proc::check_interrupted()?;
    match result {
        Ok(records) => {
            records.iter().for_each(Record::print_progress);
            report.records.extend(records);
        }
        Err(error) => {
            println!("round {round} {:<26} left out: {error:#}", target.label());
            report.leave_out(target, &format!("{error:#}"));
        }
    }
    Ok(())
}

fn measure_one(
    settings: &Settings,
    wrk: &Wrk,
    target: &Target,
    round: u32,
    loads: &[LoadKind],
) -> Result<Vec<Record>> {
    let stalling = loads.contains(&LoadKind::Stall);
    let running = target.start(settings.workers, stalling)?;
    wrk.run(LoadKind::Short, running.port(), 1).context("warm up")?;
    let mut records = Vec::new();
    for load in loads {
        let sample =
            measure::sample(&running, || wrk.run(*load, running.port(), settings.seconds))?;
        records.push(Record { round, target: target.clone(), load: *load, sample });
    }
    Ok(records)
}
