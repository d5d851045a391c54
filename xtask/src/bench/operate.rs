//! `cargo xtask bench operate`: what a manager costs when nothing happens, and how long its commands take.
//!
//! Memory of the primary, start to the first answer, a killed worker to its successor's readiness, CPU and wake-ups of an idle
//! primary, and a list of 1, 10 and 100 apps; beside PM2, in turn. The figures that others publish for OxMgr are printed as a
//! reference and not measured here.
//!
//! Surprising: a crash is over when the manager itself tells a new worker as serving, since the other workers answer clients
//! all the time. PM2 is asked by its own list, whose duration is part of its figure.
//!
//! Source: proc_pid_status(5), proc_pid_smaps(5).

use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use rustix::process::Signal;

use super::managed::{App, Built, Kind};
use super::report::median;
use crate::proc;
use crate::setup::manifest::Manifest;

const LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(1);
/// How long nothing happens before memory is looked at.
const REST: Duration = Duration::from_secs(3);
/// OxMgr's own figures, as its authors published them in 2026.
const OXMGR: &str = "for reference, told by OxMgr of itself: 6.5 MB resident without apps, 35 ms from a crash until a program \
                     listens again, 5.7 ms to list 100 apps";

/// Everything measured of one manager in one round.
#[derive(Debug, Default, Clone)]
struct Figures {
    start_ms: f64,
    crash_ms: Option<f64>,
    rss_kib: [u64; 2],
    idle_cpu_ms: f64,
    wake_ups: f64,
    /// By length of the list.
    list_ms: Vec<f64>,
}

/// The command.
///
/// # Errors
/// A wrong option, a build that fails, or a manager that does.
pub(super) fn main(args: &mut Arguments, manifest: &Manifest) -> Result<ExitCode> {
    let seconds: u64 = args.opt_value_from_str("--seconds")?.unwrap_or(60);
    let rounds: usize = args.opt_value_from_str("--rounds")?.unwrap_or(3);
    let apps: Option<String> = args.opt_value_from_str("--apps")?;
    crate::nothing_left(args)?;
    ensure!(
        (1..=600).contains(&seconds) && (1..=20).contains(&rounds),
        "1 to 600 s, 1 to 20 rounds"
    );
    let lists = apps.as_deref().unwrap_or("1,10,100").split(',').map(|n| n.trim().parse());
    let lists: Vec<usize> = lists.collect::<Result<_, _>>().context("--apps")?;
    let built = Built::new()?;
    let mut kinds =
        vec![Kind::node(&built, manifest, "26", "kernel")?, Kind::rust(&built, "kernel")];
    match Kind::pm2(manifest, "26") {
        // Beside the same program under us.
        Ok(pm2) => kinds.insert(1, pm2),
        Err(error) => println!("PM2 left out: {error:#}"),
    }
    let mut all: Vec<Vec<Figures>> = vec![Vec::new(); kinds.len()];
    for round in 1..=rounds {
        for (kind, figures) in kinds.iter().zip(&mut all) {
            // Many apps take long to start: once is enough for them.
            let listed = round == 1 && kind.runs_node();
            let lists = if listed { lists.as_slice() } else { &[] };
            figures.push(measure(kind, Duration::from_secs(seconds), lists)?);
            println!("round {round} of {rounds}: {}", kind.title);
        }
    }
    print(&kinds, &all, &lists, seconds);
    Ok(ExitCode::SUCCESS)
}

fn measure(kind: &Kind, idle: Duration, lists: &[usize]) -> Result<Figures> {
    let mut figures = Figures::default();
    let began = Instant::now();
    let small = kind.start(1)?;
    figures.start_ms = ms(began);
    let primary = small.primary()?;
    figures.crash_ms = crash(&small, primary).ok();
    thread::sleep(REST);
    figures.rss_kib[0] = status(primary, "VmRSS:")?;
    let (cpu, switches) = (cpu_ms(primary)?, wake_ups(primary)?);
    thread::sleep(idle);
    figures.idle_cpu_ms = (cpu_ms(primary)? - cpu) / idle.as_secs_f64();
    figures.wake_ups = (wake_ups(primary)? - switches) as f64 / idle.as_secs_f64();
    let mut running = 1;
    for length in lists {
        while running < *length {
            small.start_idle(running)?;
            running += 1;
        }
        figures.list_ms.push(list(&small)?);
    }
    drop(small);
    let large = kind.start(8)?;
    thread::sleep(REST);
    figures.rss_kib[1] = status(large.primary()?, "VmRSS:")?;
    Ok(figures)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Kills the only worker and waits until another one answers.
fn crash(app: &App, primary: i32) -> Result<f64> {
    let workers = app.worker_pids(primary);
    let [victim] = workers.as_slice() else { anyhow::bail!("one worker was expected") };
    let began = Instant::now();
    proc::signal(*victim, Signal::KILL);
    let until = began + LIMIT;
    loop {
        let others = app.worker_pids(primary);
        // Of a server with one worker, an answer is the new worker's.
        if !others.is_empty()
            && !others.contains(victim)
            && super::measure::get(app.port(), "/").is_ok()
        {
            return Ok(ms(began));
        }
        ensure!(Instant::now() < until, "no worker came back");
        thread::sleep(POLL);
    }
}

/// The median of some calls.
fn list(app: &App) -> Result<f64> {
    let mut took = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        app.list()?;
        took.push(ms(began));
    }
    median(took).context("no list")
}

/// A number of `/proc/PID/status`.
fn status(pid: i32, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    line.split_whitespace().next().context("no number")?.parse().context("a number")
}

/// How often all threads of it gave the processor up, which an idle one does once for each time it woke.
fn wake_ups(pid: i32) -> Result<u64> {
    let mut all = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("status"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        all += line.context("no such line")?.trim().parse::<u64>()?;
    }
    Ok(all)
}

/// CPU time of it alone, in ms; schedstat(5) counts nanoseconds.
fn cpu_ms(pid: i32) -> Result<f64> {
    let mut all = 0.0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        all += text.split_whitespace().next().context("schedstat")?.parse::<f64>()? / 1e6;
    }
    Ok(all)
}

fn print(kinds: &[Kind], all: &[Vec<Figures>], lists: &[usize], seconds: u64) {
    let medians = |figure: &dyn Fn(&Figures) -> Option<f64>| -> Vec<Option<f64>> {
        all.iter().map(|rounds| median(rounds.iter().filter_map(figure).collect())).collect()
    };
    print!("\n{:<46}", "medians");
    kinds.iter().for_each(|kind| print!("{:>24}", kind.title));
    println!("{:>12}", "PM2 to ours");
    let row = |what: &str, figures: Vec<Option<f64>>| {
        print!("{what:<46}");
        for figure in &figures {
            match figure {
                Some(figure) => print!("{figure:>24.2}"),
                None => print!("{:>24}", "not seen"),
            }
        }
        match figures.as_slice() {
            [Some(ours), Some(theirs), ..] if *ours > 0.0 => println!("{:>12.1}", theirs / ours),
            _ => println!("{:>12}", "-"),
        }
    };
    row("primary, 1 worker, MiB resident", medians(&|f| Some(f.rss_kib[0] as f64 / 1024.0)));
    row("primary, 8 workers, MiB resident", medians(&|f| Some(f.rss_kib[1] as f64 / 1024.0)));
    row("start to the first answer, ms", medians(&|f| Some(f.start_ms)));
    row("worker killed to its successor's answer, ms", medians(&|f| f.crash_ms));
    row(&format!("idle for {seconds} s: CPU, ms a second"), medians(&|f| Some(f.idle_cpu_ms)));
    row("idle: wake-ups a second", medians(&|f| Some(f.wake_ups)));
    for (index, length) in lists.iter().enumerate() {
        let what = format!("list of {length}, ms");
        row(&what, medians(&|f| f.list_ms.get(index).copied()));
    }
    println!("{OXMGR}");
}
