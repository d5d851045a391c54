//! `cargo xtask test`: the test command of the README and of CI.
//!
//! `stages` is the table of what runs, `tally` counts tests and skips, `log` keeps what was printed. This file runs the stages in
//! turn, times them, and prints the closing lines. A stage that fails does not stop the next one:
//! one run tells everything that is wrong.
//!
//! A test that cannot run here (a missing runtime, no right to load eBPF) passes, prints
//! `SKIP <test>: <reason>` and appends that line to the file that `POLYFORK_SKIP_LOG` names, because
//! the harness hides the output of tests that pass. With `CI=true` a skip is a failure, unless
//! [`tally::MAY_SKIP_IN_CI`] permits it.
//!
//! A test that fails is run once more, alone, if few failed: a machine that stands still for a minute fails
//! tests for no fault of theirs. One that passes then is named `FLAKY` with what it printed, and is to be mended
//! like a failure; one that fails again has failed.
//!
//! Surprising: after each stage the processes that are left over are counted as a failure and
//! ended. Tests of a supervisor that leave workers behind have found a bug.
//!
//! Source: the output format of libtest (`cargo test`).

mod log;
mod stages;
mod tally;

use std::env;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pico_args::Arguments;

use crate::proc::Output;
use crate::{paths, proc, setup};
use log::Log;
use stages::{Stage, Verdict};
use tally::Tally;

const HELP: &str = "\
Runs every check; ends with a line `N passed, N failed, N skipped` and the list of skips.

Usage: cargo xtask test [OPTIONS]

Options:
  --quick          format, lints and unit tests only
  --only LIST      these stages only, by name, separated by commas
  --list           name the stages and stop

Environment:
  CI=true               a skip that the run may not make counts as a failure
  POLYFORK_ADVISORY_DB  folder of an advisory database; turns the audit stage on
  POLYFORK_SIM_EVENTS   events that the supervisor's simulation plays (default 10000000)
  POLYFORK_SIM_SEED     seed of its first life (default from the clock, printed)
  POLYFORK_FUZZ_RUNS    inputs per decoder in the fuzz stage (default 50000)
  PROPTEST_CASES        cases per property in the fuzz stage (default 2000)
";

/// How long leftovers may take to go by themselves after a stage.
const SETTLE: Duration = Duration::from_secs(5);

/// With more failures than this in a stage, none is run again: something is broken.
const RUN_AGAIN: usize = 3;

/// What every stage can see.
struct Session {
    tally: Tally,
    log: Log,
    in_ci: bool,
}

/// The command.
///
/// # Errors
/// When the run itself cannot be made; failed checks are told by the exit code.
pub(crate) fn main(args: &mut Arguments) -> Result<ExitCode> {
    if args.contains(["-h", "--help"]) {
        print!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    }
    let quick = args.contains("--quick");
    let list = args.contains("--list");
    let only: Option<String> = args.opt_value_from_str("--only")?;
    crate::nothing_left(args)?;
    let chosen = stages::choose(quick, only.as_deref())?;
    if list {
        chosen.iter().for_each(|stage| println!("{:<12} {}", stage.name, stage.about));
        return Ok(ExitCode::SUCCESS);
    }
    run(&chosen)
}

fn run(chosen: &[Stage]) -> Result<ExitCode> {
    let began = Instant::now();
    let in_ci = env::var("CI").is_ok_and(|value| value == "true");
    let mut session = Session { tally: Tally::new()?, log: Log::new()?, in_ci };
    let mut times = Vec::new();
    for stage in chosen {
        proc::check_interrupted()?;
        session.log.begin(&format!("== {}: {}", stage.name, stage.about));
        let stage_began = Instant::now();
        let verdict = (stage.run)(&mut session);
        session.settle(stage, verdict);
        let took = stage_began.elapsed().as_secs_f64();
        println!("== {} took {took:.1} s", stage.name);
        times.push((stage.name, took));
    }
    proc::check_interrupted()?;
    session.tally.collect_skip_log(session.in_ci)?;
    println!();
    for (name, took) in times {
        println!("{name:<12} {took:>7.1} s");
    }
    println!("{:<12} {:>7.1} s", "all", began.elapsed().as_secs_f64());
    session.tally.print();
    println!("All that was printed is in {}", session.log.path().display());
    Ok(if session.tally.clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Session {
    /// Counts a stage's verdict and the processes that it left behind.
    fn settle(&mut self, stage: &Stage, verdict: Result<Verdict>) {
        match verdict {
            Ok(Verdict::Counted) => {}
            Ok(Verdict::Passed) => self.tally.pass(),
            Ok(Verdict::Skipped(reason)) => self.tally.skip(stage.name, &reason),
            Err(error) => {
                self.log.show_last();
                self.tally.fail(stage.name, &format!("{error:#}"));
            }
        }
        let left = leftovers();
        if !left.is_empty() {
            self.tally.fail(stage.name, &format!("left processes behind: {}", left.join("; ")));
            proc::end_descendants();
        }
    }

    /// Sets everything up; each thing that is missing is a skip, or a failure in CI.
    fn set_up(&mut self) -> Result<Verdict> {
        for outcome in setup::run()? {
            match (outcome.result, outcome.required && self.in_ci) {
                (Ok(_), _) => {}
                (Err(reason), true) => self.tally.fail(outcome.name, &format!("missing: {reason}")),
                (Err(reason), false) => {
                    self.tally.skip(outcome.name, &format!("missing: {reason}"))
                }
            }
        }
        Ok(Verdict::Passed)
    }

    /// A check of cargo that passes or fails as a whole.
    fn check(&mut self, words: &[&str], environment: &[(&str, &str)]) -> Result<Verdict> {
        let log = &mut self.log;
        let keep = |output, line: &str| log.take(output, line);
        let run = proc::stream(cargo(words, environment), stages::LIMIT, keep)?;
        anyhow::ensure!(run.ok(), "cargo {}: {}", words.join(" "), proc::describe(run.status));
        Ok(Verdict::Passed)
    }

    /// The tests whose file begins with `prefix`, built with a model checker in place of the standard library's atomics.
    fn models(&mut self, configuration: &str, prefix: &str) -> Result<Verdict> {
        let folder = paths::root().join("crates/polyfork-core/tests");
        let entries = std::fs::read_dir(&folder).context("look for the models")?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names
            .filter(|name| name.starts_with(prefix))
            .filter_map(|name| name.strip_suffix(".rs").map(str::to_owned))
            .collect();
        anyhow::ensure!(!names.is_empty(), "no models {prefix}*.rs in {}", folder.display());
        names.sort();
        let mut words =
            vec!["test", "--profile", "models", "-p", "polyfork-core", "--no-fail-fast"];
        names.iter().for_each(|name| words.extend(["--test", name]));
        let flags = env::var("RUSTFLAGS").unwrap_or_default();
        let flags = format!("{flags} --cfg {configuration}");
        // A folder of its own: the flags would have everything else built anew.
        let target = paths::target().join("models");
        let target = target.to_str().context("the path of the build folder is not UTF-8")?;
        self.tests_as(&words, &[("RUSTFLAGS", flags.trim()), ("CARGO_TARGET_DIR", target)])
    }

    /// [`tests`](Self::tests) with variables that win over the caller's. None is run again: a model has no bad day.
    fn tests_as(&mut self, words: &[&str], environment: &[(&str, &str)]) -> Result<Verdict> {
        let mut command = test_command(words, &[], &self.tally);
        command.envs(environment.iter().copied());
        let failed_before = self.tally.failed();
        let (tally, log) = (&mut self.tally, &mut self.log);
        let run = proc::stream(command, stages::LIMIT, |output, line| {
            log.take(output, line);
            if output == Output::Out {
                tally.read_line(line);
            }
        })?;
        let told = self.tally.failed() > failed_before;
        anyhow::ensure!(
            run.ok() || (told && run.status.is_some()),
            "cargo {}: {}",
            words.join(" "),
            proc::describe(run.status)
        );
        Ok(Verdict::Counted)
    }

    /// A run of `cargo test`, whose tests are counted one by one.
    fn tests(&mut self, words: &[&str], environment: &[(&str, &str)]) -> Result<Verdict> {
        let failed_before = self.tally.failed();
        let mut targets = Vec::new();
        let (tally, log) = (&mut self.tally, &mut self.log);
        let command = test_command(words, environment, tally);
        let run = proc::stream(command, stages::LIMIT, |output, line| {
            log.take(output, line);
            match output {
                Output::Out => tally.read_line(line),
                Output::Err => targets.extend(failed_target(line)),
            }
        })?;
        // A build that fails, or a test program that dies, prints no result to count.
        let told = self.tally.failed() > failed_before;
        anyhow::ensure!(
            run.ok() || (told && run.status.is_some()),
            "cargo {}: {}",
            words.join(" "),
            proc::describe(run.status)
        );
        let failed = self.tally.failed_since(failed_before).to_vec();
        if !failed.is_empty() && failed.len() <= RUN_AGAIN {
            self.run_again(words, environment, &targets, &failed)?;
        }
        Ok(Verdict::Counted)
    }

    /// Runs the tests that failed once more, one at a time.
    fn run_again(
        &mut self,
        words: &[&str],
        environment: &[(&str, &str)],
        targets: &[Vec<String>],
        failed: &[String],
    ) -> Result<()> {
        let mut passed = Vec::new();
        for target in targets {
            let common = words.iter().take_while(|word| **word != "--").copied();
            let mut again: Vec<&str> = common.chain(target.iter().map(String::as_str)).collect();
            again.extend(["--", "--exact", "--test-threads=1"]);
            again.extend(failed.iter().map(String::as_str));
            println!("== again: cargo {}", again.join(" "));
            let log = &mut self.log;
            let command = test_command(&again, environment, &self.tally);
            let run = proc::stream(command, stages::LIMIT, |output, line| {
                log.take(output, line);
                if output == Output::Out {
                    passed.extend(tally::passed_test(line).map(str::to_owned));
                }
            })?;
            if !run.ok() {
                return Ok(());
            }
        }
        passed.iter().for_each(|name| self.tally.passed_again(name));
        Ok(())
    }
}

/// Cargo, with what the project's tests read from their environment.
fn test_command(words: &[&str], environment: &[(&str, &str)], tally: &Tally) -> Command {
    let mut command = cargo(words, environment);
    command.env("POLYFORK_PEERS", paths::manifest());
    command.env("POLYFORK_SKIP_LOG", tally.skip_log());
    command.env_remove("RUST_BACKTRACE");
    command
}

/// The test program that failed, from cargo's advice how to run it again; without the package, as the whole workspace
/// is built with one set of features.
fn failed_target(line: &str) -> Option<Vec<String>> {
    let advice = line.strip_prefix("error: test failed, to rerun pass `")?.strip_suffix('`')?;
    let mut words = advice.split(' ').peekable();
    if words.next_if_eq(&"-p").is_some() {
        words.next();
    }
    Some(words.map(str::to_owned).collect())
}

/// Cargo, without what the cargo that runs this chore left in the environment: build scripts would
/// take it for theirs and build again.
fn cargo(words: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root()).args(words);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    for (name, value) in environment {
        // What the caller set wins: that is how a soak run asks for more.
        if env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
    command
}

/// Command lines of the processes that still run once a stage is over.
fn leftovers() -> Vec<String> {
    let until = Instant::now() + SETTLE;
    loop {
        let left = proc::descendants();
        if left.is_empty() || Instant::now() >= until {
            let name = |stat: &proc::Stat| format!("{} {}", stat.pid, proc::command_line(stat.pid));
            return left.iter().map(name).collect();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An audit of the dependencies against an advisory database on disk; nothing is fetched.
fn audit(session: &mut Session) -> Result<Verdict> {
    let Some(database) = env::var_os("POLYFORK_ADVISORY_DB") else {
        return Ok(Verdict::Skipped("POLYFORK_ADVISORY_DB names no advisory database".into()));
    };
    let database = std::path::PathBuf::from(database);
    anyhow::ensure!(database.is_dir(), "no folder {}", database.display());
    if !proc::capture(cargo(&["audit", "--version"], &[]), stages::LIMIT)?.ok() {
        return Ok(Verdict::Skipped("cargo-audit is not installed".into()));
    }
    let place = database.to_str().context("the path of the advisory database is not UTF-8")?;
    session.check(&["audit", "--no-fetch", "--stale", "--db", place], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_target_is_read_from_the_advice_of_cargo() {
        let line = "error: test failed, to rerun pass `-p polyfork-sys --test steal`";
        assert_eq!(failed_target(line).unwrap(), ["--test", "steal"]);
        let line = "error: test failed, to rerun pass `--lib`";
        assert_eq!(failed_target(line).unwrap(), ["--lib"]);
        assert_eq!(failed_target("error: 1 target failed:"), None);
    }
}
