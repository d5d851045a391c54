//! `cargo xtask bench channel`: messages of about 96 bytes between two processes, one way and there and back.
//!
//! Each contender is a program of its own that measures for a while and prints one line of JSON
//! (`bench/channel`, `bench/apps/channel.cjs`). This file runs them in interleaved rounds, prints medians and
//! ratios, and says which aims were met. No time fails it.
//!
//! Surprising: our crates are built for speed here, as in a program that depends on them; the project's own release profile
//! builds them to be small, for the command.
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

const MODES: [&str; 2] = ["oneway", "echo"];
/// One measurement; far more than it takes.
const LIMIT: Duration = Duration::from_secs(90);
const NATIVE: &str = "polyfork, native";
const NATIVE_BORROWED: &str = "polyfork, native, borrowed texts";
const NATIVE_SOCKET: &str = "polyfork, native, without the ring";
const SOCKET: &str = "bare socket, a write each";

/// Two processes with a channel between them.
struct Contender {
    title: String,
    program: PathBuf,
    before: Vec<String>,
    after: Vec<String>,
    /// Both ends are Node, so that the rate of "Rust with Node" can be held against it.
    node: Option<(&'static str, &'static str)>,
    /// The parent is ours and the child is this Node.
    with_node: Option<(&'static str, &'static str)>,
}

struct Sample {
    contender: usize,
    mode: &'static str,
    rate: f64,
    /// CPU of the measuring side for one message.
    cpu_us: f64,
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
    ensure!((1..=30).contains(&seconds), "--seconds must be 1 to 30");
    ensure!((1..=20).contains(&rounds), "--rounds must be 1 to 20");
    let contenders = contenders(manifest)?;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for mode in MODES {
            for (index, contender) in contenders.iter().enumerate() {
                proc::check_interrupted()?;
                let sample = measure(contender, index, mode, seconds)?;
                println!(
                    "round {round} {:<36} {mode:<7} {:>9.0} /s {:>7.2} µs CPU",
                    contender.title, sample.rate, sample.cpu_us
                );
                samples.push(sample);
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
    let for_speed = |krate: &str| format!("profile.release.package.{krate}.opt-level=3");
    let (lib, core) = (for_speed("polyfork"), for_speed("polyfork-core"));
    let ours = cargo_build(&["-p", "bench-channel", "--config", &lib, "--config", &core])?;
    let script = paths::root().join("bench/apps/channel.cjs").display().to_string();
    let rust = |title: &str, how: &str| Contender {
        title: title.to_owned(),
        program: ours.clone(),
        before: vec![how.to_owned()],
        after: Vec::new(),
        node: None,
        with_node: None,
    };
    let mut all = vec![
        rust(SOCKET, "socket"),
        rust(NATIVE, "native"),
        rust(NATIVE_BORROWED, "native-borrowed"),
        rust(NATIVE_SOCKET, "native-socket"),
        rust("polyfork, json", "json"),
        rust("polyfork, advanced", "advanced"),
        rust("ipc-channel", "ipc-channel"),
    ];
    for (name, title) in [("node20", "Node 20"), ("node26", "Node 26"), ("bun", "Bun")] {
        let tool = match manifest.tool(name) {
            Ok(tool) => tool,
            Err(error) => {
                println!("{title:<32} left out: {error:#}");
                continue;
            }
        };
        let encodings: &[&'static str] =
            if name == "bun" { &["json"] } else { &["json", "advanced"] };
        for encoding in encodings {
            all.push(Contender {
                title: format!("{title} at both ends, {encoding}"),
                program: tool.path.clone(),
                before: vec![script.clone()],
                after: vec![(*encoding).to_owned()],
                node: Some((title, encoding)),
                with_node: None,
            });
            let mut with = rust(&format!("polyfork with {title}, {encoding}"), "");
            with.before = vec![format!("node-{encoding}")];
            with.after = vec![tool.path.display().to_string(), script.clone()];
            with.with_node = Some((title, encoding));
            all.push(with);
        }
    }
    Ok(all)
}

fn measure(
    contender: &Contender,
    index: usize,
    mode: &'static str,
    seconds: u32,
) -> Result<Sample> {
    let limit = (seconds * 1000).to_string();
    let mut command = Command::new(&contender.program);
    command.args(&contender.before).arg(mode);
    match (&contender.node, contender.after.as_slice()) {
        // The script takes the encoding before the time.
        (Some(_), [encoding]) => command.arg(encoding).arg(limit),
        (_, after) => command.arg(limit).args(after),
    };
    let run = proc::capture(command, LIMIT)?;
    ensure!(run.ok(), "{}: {}", contender.title, run.complaint());
    let told: Value = serde_json::from_str(run.stdout.trim())
        .with_context(|| format!("{} printed {:?}", contender.title, run.stdout))?;
    let number = |key: &str| told[key].as_f64().with_context(|| format!("no {key} in {told}"));
    Ok(Sample {
        contender: index,
        mode,
        rate: number("messages")? / number("seconds")?,
        cpu_us: number("cpu_us")? / number("messages")?,
    })
}

/// The median of one figure over the rounds.
fn median(
    samples: &[Sample],
    contender: usize,
    mode: &str,
    figure: fn(&Sample) -> f64,
) -> Option<f64> {
    let of = |s: &&Sample| s.contender == contender && s.mode == mode;
    super::report::median(samples.iter().filter(of).map(figure).collect())
}

fn print(contenders: &[Contender], samples: &[Sample]) {
    let named = |title: &str| contenders.iter().position(|c| c.title == title);
    let native = named(NATIVE).unwrap_or_default();
    for mode in MODES {
        let what = if mode == "echo" { "there and back, one at a time" } else { "one way" };
        println!("\n{what}: messages of about 96 bytes, medians");
        println!("{:<36} {:>10} {:>12} {:>8}", "who", "per s", "native/this", "CPU µs");
        let ours = median(samples, native, mode, |s| s.rate).unwrap_or_default();
        for (index, contender) in contenders.iter().enumerate() {
            let Some(rate) = median(samples, index, mode, |s| s.rate) else { continue };
            let cpu = median(samples, index, mode, |s| s.cpu_us).unwrap_or_default();
            println!("{:<36} {rate:>10.0} {:>12.2} {cpu:>8.2}", contender.title, ours / rate);
        }
    }
    println!("\naims, and whether this run met them");
    let tell = |what: &str, met: bool, value: f64| {
        println!("  {what:<72} {}: {value:.2}", if met { "met" } else { "NOT met" });
    };
    if let Some(rate) = median(samples, native, "oneway", |s| s.rate) {
        tell("native, one way: million messages a second >= 10", rate >= 1e7, rate / 1e6);
    }
    let borrowed = named(NATIVE_BORROWED);
    if let Some(rate) = borrowed.and_then(|index| median(samples, index, "oneway", |s| s.rate)) {
        let what = "native, borrowed texts, one way: million messages a second >= 10";
        tell(what, rate >= 1e7, rate / 1e6);
    }
    if let Some(socket) = named(NATIVE_SOCKET) {
        if let Some(rate) = median(samples, socket, "oneway", |s| s.rate) {
            let what = "native without the ring, one way: million messages a second >= 2";
            tell(what, rate >= 2e6, rate / 1e6);
        }
        for (mode, what) in [
            ("oneway", "native, one way: rate over that without the ring >= 1"),
            ("echo", "native, there and back: rate over that without the ring >= 1"),
        ] {
            let with = median(samples, native, mode, |s| s.rate);
            if let Some((with, without)) = with.zip(median(samples, socket, mode, |s| s.rate)) {
                tell(what, with >= without, with / without);
            }
        }
    }
    let bare = named(SOCKET).and_then(|bare| median(samples, bare, "echo", |s| s.rate));
    if let Some((ours, bare)) = median(samples, native, "echo", |s| s.rate).zip(bare) {
        let ratio = bare / ours;
        tell("native, round trip: time over the bare socket's <= 1.3", ratio <= 1.3, ratio);
    }
    for (index, contender) in contenders.iter().enumerate() {
        let Some(key) = contender.with_node else { continue };
        if let Some(cpu) = median(samples, index, "oneway", |s| s.cpu_us) {
            let what = format!("{}, one way: CPU µs of our side <= 1", contender.title);
            tell(&what, cpu <= 1.0, cpu);
        }
        let both = contenders.iter().position(|c| c.node == Some(key));
        let theirs = both.and_then(|both| median(samples, both, "oneway", |s| s.rate));
        if let Some((ours, theirs)) = median(samples, index, "oneway", |s| s.rate).zip(theirs) {
            let what = format!("{}, one way: rate over Node at both ends >= 1", contender.title);
            tell(&what, ours >= theirs, ours / theirs);
        }
    }
}

fn to_json(contenders: &[Contender], samples: &[Sample]) -> String {
    let all: Vec<Value> = samples
        .iter()
        .map(|s| {
            json!({
                "who": contenders[s.contender].title, "mode": s.mode,
                "per_second": s.rate, "cpu_us": s.cpu_us,
            })
        })
        .collect();
    Value::from(all).to_string() + "\n"
}
