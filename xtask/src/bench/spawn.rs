//! `cargo xtask bench spawn`: what starting a process costs, and whether the parent's size matters.
//!
//! Each contender is a program of its own that starts `true` again and again, one after the other, and prints
//! one line of JSON (`crates/polyfork-sys/examples/spawn_bench.rs`, `bench/apps/spawn.cjs`). This file runs
//! them in interleaved rounds, prints medians and ratios, and says which aims were met. No time fails it.
//!
//! Source: the table "Speed to aim for" of the project's design.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::targets::cargo_build;
use crate::setup::manifest::Manifest;
use crate::{paths, proc};

/// Sizes of the parent in MiB.
const SIZES: [u32; 2] = [10, 2048];
/// What the child is given: three descriptors on /dev/null, or a channel and five pipes.
const SHAPES: [&str; 2] = ["plain", "channel"];
/// One measurement with its memory; far more than it takes.
const LIMIT: Duration = Duration::from_secs(120);

/// Who starts processes.
struct Contender {
    title: String,
    program: PathBuf,
    /// Words before the shape.
    words: Vec<String>,
    /// std has no words for descriptors above 2.
    plain_only: bool,
}

/// One measurement.
struct Sample {
    contender: usize,
    shape: &'static str,
    mib: u32,
    rate: f64,
    blocked_us: f64,
}

/// The command.
///
/// # Errors
/// A wrong option, a build that fails, or an interrupt.
pub(super) fn main(args: &mut Arguments, manifest: &Manifest) -> Result<ExitCode> {
    let seconds: u32 = args.opt_value_from_str("--seconds")?.unwrap_or(2);
    let rounds: u32 = args.opt_value_from_str("--rounds")?.unwrap_or(3);
    let json: Option<PathBuf> = args.opt_value_from_str("--json")?;
    crate::nothing_left(args)?;
    ensure!((1..=60).contains(&seconds), "--seconds must be 1 to 60");
    ensure!((1..=20).contains(&rounds), "--rounds must be 1 to 20");
    let contenders = contenders(manifest)?;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for mib in SIZES {
            for shape in SHAPES {
                for (index, contender) in contenders.iter().enumerate() {
                    if contender.plain_only && shape != "plain" {
                        continue;
                    }
                    proc::check_interrupted()?;
                    let sample = measure(contender, index, shape, mib, seconds)?;
                    println!(
                        "round {round} {:<26} {shape:<8} {mib:>5} MiB {:>8.0} /s {:>9.0} µs blocked",
                        contender.title, sample.rate, sample.blocked_us
                    );
                    samples.push(sample);
                }
            }
        }
    }
    print(&contenders, &samples);
    if let Some(path) = json {
        std::fs::write(&path, to_json(&contenders, &samples))
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn contenders(manifest: &Manifest) -> Result<Vec<Contender>> {
    let ours = cargo_build(&["-p", "polyfork-sys", "--example", "spawn_bench"])?;
    let native = |title: &str, how: &str, plain_only| Contender {
        title: title.to_owned(),
        program: ours.clone(),
        words: vec![how.to_owned()],
        plain_only,
    };
    let mut all = vec![
        native("polyfork", "polyfork", false),
        native("std::process", "std", true),
        native("std::process, pre_exec", "std-pre-exec", false),
    ];
    let script = paths::root().join("bench/apps/spawn.cjs").display().to_string();
    for (name, title) in [("node20", "Node 20"), ("node26", "Node 26"), ("bun", "Bun")] {
        match manifest.tool(name) {
            Ok(tool) => all.push(Contender {
                title: title.to_owned(),
                program: tool.path.clone(),
                words: vec![script.clone()],
                plain_only: false,
            }),
            Err(error) => println!("{title:<26} left out: {error:#}"),
        }
    }
    Ok(all)
}

fn measure(
    contender: &Contender,
    index: usize,
    shape: &'static str,
    mib: u32,
    seconds: u32,
) -> Result<Sample> {
    let mut command = Command::new(&contender.program);
    command.args(&contender.words).args([shape, &mib.to_string(), &(seconds * 1000).to_string()]);
    let run = proc::capture(command, LIMIT)?;
    ensure!(run.ok(), "{}: {}", contender.title, run.complaint());
    let told: Value = serde_json::from_str(run.stdout.trim())
        .with_context(|| format!("{} printed {:?}", contender.title, run.stdout))?;
    let number = |key: &str| told[key].as_f64().with_context(|| format!("no {key} in {told}"));
    Ok(Sample {
        contender: index,
        shape,
        mib,
        rate: number("spawns")? / number("seconds")?,
        blocked_us: number("blocked_us")?,
    })
}

/// The median of one figure over the rounds.
fn median(
    samples: &[Sample],
    contender: usize,
    shape: &str,
    mib: u32,
    figure: fn(&Sample) -> f64,
) -> Option<f64> {
    let of = |s: &&Sample| s.contender == contender && s.shape == shape && s.mib == mib;
    super::report::median(samples.iter().filter(of).map(figure).collect())
}

fn print(contenders: &[Contender], samples: &[Sample]) {
    for mib in SIZES {
        for shape in SHAPES {
            println!("\n{shape}, parent of {mib} MiB: processes one after the other, medians");
            println!("{:<26} {:>9} {:>9} {:>11}", "who", "per s", "ours/its", "blocked µs");
            let ours = median(samples, 0, shape, mib, |s| s.rate);
            for (index, contender) in contenders.iter().enumerate() {
                let Some(rate) = median(samples, index, shape, mib, |s| s.rate) else { continue };
                let blocked = median(samples, index, shape, mib, |s| s.blocked_us);
                println!(
                    "{:<26} {rate:>9.0} {:>9.2} {:>11.0}",
                    contender.title,
                    ours.unwrap_or_default() / rate,
                    blocked.unwrap_or_default()
                );
            }
        }
    }
    println!("\naims, and whether this run met them");
    for (index, contender) in contenders.iter().enumerate() {
        let node = contender.title.starts_with("Node");
        let std = contender.title == "std::process";
        for mib in SIZES {
            let aim = if node && mib > 1000 {
                40.0
            } else if std {
                1.0
            } else {
                continue;
            };
            for shape in SHAPES {
                let rate = |who| median(samples, who, shape, mib, |s| s.rate);
                let Some((ours, theirs)) = rate(0).zip(rate(index)) else { continue };
                let ratio = ours / theirs;
                let met = if ratio >= aim { "met" } else { "NOT met" };
                println!(
                    "  {shape:<8} {mib:>5} MiB: rate over {} >= {aim}: {met}: {ratio:.2}",
                    contender.title
                );
            }
        }
    }
}

fn to_json(contenders: &[Contender], samples: &[Sample]) -> String {
    let all: Vec<Value> = samples
        .iter()
        .map(|s| {
            json!({
                "who": contenders[s.contender].title, "shape": s.shape, "parent_mib": s.mib,
                "per_second": s.rate, "blocked_us": s.blocked_us,
            })
        })
        .collect();
    Value::from(all).to_string() + "\n"
}
