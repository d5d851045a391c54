//! Load by wrk, and what it tells.
//!
//! Which server gets it is the caller's business. wrk prints one machine-readable line through
//! `bench/apps/report.lua`, with times in microseconds.
//!
//! Surprising: wrk is a closed loop, each of its connections waits for its answer. Its tail is
//! therefore kinder than what open clients would see; it is the same kindness for every server.
//!
//! Source: wrk's `SCRIPTING` document.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::setup::manifest::Tool;
use crate::{paths, proc};

/// Threads of wrk; two share two cores with the servers in the same way for all.
const THREADS: &str = "2";
/// A wrk that does not end this long after its time is ended.
const SLACK: Duration = Duration::from_secs(20);

/// A way of sending requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LoadKind {
    /// One request per connection.
    Short,
    /// Connections that stay open.
    Kept,
    /// One request per connection, while one worker blocks for 50 ms every 500 ms.
    Stall,
}

impl LoadKind {
    /// All loads, in the order of the report.
    pub(super) const ALL: [Self; 3] = [Self::Short, Self::Kept, Self::Stall];

    /// Name on the command line and in the JSON report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Kept => "kept",
            Self::Stall => "stall",
        }
    }

    /// What it does, for the heading of its table.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Short => "short connections (one request each, 32 clients)",
            Self::Kept => "kept-alive connections (64 clients)",
            Self::Stall => "short connections, worker 1 stalls 50 ms every 500 ms (64 clients)",
        }
    }

    /// The load of that name.
    ///
    /// # Errors
    /// Names the word that is none.
    pub(super) fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|load| load.name() == name.trim());
        found.with_context(|| format!("no load `{name}`; see --help"))
    }

    /// Clients that wrk plays. Under `Stall` enough wait behind one stall to show in the p99.
    fn clients(self) -> &'static str {
        match self {
            Self::Short => "32",
            Self::Kept | Self::Stall => "64",
        }
    }
}

/// What one run of wrk told.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answered {
    /// Complete answers.
    pub(super) requests: u64,
    /// Length of the run as wrk measured it, in seconds.
    pub(super) seconds: f64,
    /// Median latency, in microseconds.
    pub(super) p50_us: u64,
    /// 99th percentile, in microseconds.
    pub(super) p99_us: u64,
    /// 99.9th percentile, in microseconds.
    pub(super) p999_us: u64,
    /// Failed connects, reads and writes, timeouts, and answers that are not 2xx or 3xx.
    pub(super) errors: u64,
}

/// The load generator.
pub(super) struct Wrk {
    program: PathBuf,
}

impl Wrk {
    /// With the program that the set-up found.
    pub(super) fn new(tool: &Tool) -> Self {
        Self { program: tool.path.clone() }
    }

    /// Loads `127.0.0.1:port` for `seconds`.
    ///
    /// # Errors
    /// When wrk cannot run, or not one request was answered.
    pub(super) fn run(&self, load: LoadKind, port: u16, seconds: u32) -> Result<Answered> {
        let mut command = Command::new(&self.program);
        command.args(["--threads", THREADS, "--connections", load.clients()]);
        command.args(["--duration", &format!("{seconds}s"), "--latency"]);
        command.arg("--script").arg(paths::root().join("bench/apps/report.lua"));
        if load != LoadKind::Kept {
            command.args(["--header", "Connection: close"]);
        }
        command.arg(format!("http://127.0.0.1:{port}/"));
        let run = proc::capture(command, Duration::from_secs(seconds.into()) + SLACK)?;
        ensure!(run.ok(), "wrk: {}", run.complaint());
        let answered = parse(&run.stdout)?;
        ensure!(answered.requests > 0, "wrk: not one request was answered");
        Ok(answered)
    }
}

/// Reads the line that `report.lua` printed.
fn parse(output: &str) -> Result<Answered> {
    let Some(line) = output.lines().find_map(|line| line.strip_prefix("RESULT ")) else {
        bail!("wrk printed no result line");
    };
    let value: Value = serde_json::from_str(line).context("wrk's result line")?;
    let number = |name: &str| value[name].as_u64().with_context(|| format!("wrk told no {name}"));
    let mut errors = 0;
    for kind in ["connect", "read", "write", "status", "timeout"] {
        errors += number(kind)?;
    }
    Ok(Answered {
        requests: number("requests")?,
        seconds: number("duration_us")? as f64 / 1e6,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
        p999_us: number("p999_us")?,
        errors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_line_is_read_and_errors_add_up() {
        let output = "Running 2s test @ http://127.0.0.1:1/\nRESULT {\"requests\":10,\
            \"duration_us\":2000000,\"p50_us\":5,\"p99_us\":9,\"p999_us\":10,\"max_us\":11,\
            \"connect\":1,\"read\":2,\"write\":0,\"status\":3,\"timeout\":0}\n";
        let answered = parse(output).unwrap();
        assert_eq!((answered.requests, answered.errors, answered.p99_us), (10, 6, 9));
        assert!((answered.seconds - 2.0).abs() < f64::EPSILON);
    }

    #[test]
    fn output_without_a_result_is_refused() {
        assert!(parse("unable to connect").is_err());
        assert!(parse("RESULT {\"requests\":10}").is_err());
    }
}
