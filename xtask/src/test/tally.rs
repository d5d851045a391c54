//! Counts what passed, failed and was skipped, from the tests' own lines.
//!
//! Which stages run is decided elsewhere. Skips come from two places: libtest's `ignored` lines and
//! the skip log that tests append to. What a failed test printed is kept and told last, where a
//! reader of a long log looks first.
//!
//! Surprising: a test that skips returns normally, so libtest counts it as passed; each line of the
//! skip log therefore moves one from passed to skipped.
//!
//! Source: libtest's output, `test NAME ... ignored, REASON`, `---- NAME stdout ----` and
//! `test result: ...`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

/// Tests (by the start of their name) that may skip in CI too, each with the reason.
///
/// Everything else is required there: a skip of it is a failure.
pub(super) const MAY_SKIP_IN_CI: &[(&str, &str)] = &[
    ("granian", "its wheel is not built for every platform"),
    ("real_systemd", "a sandboxed machine may refuse control groups and namespaces even to root"),
    ("ebpf", "a sandboxed machine may refuse bpf(2) even to root; classic BPF is then tested"),
];

/// The reason of an ignored test that is no skip: another test runs it, in a process of its own.
const RUN_BY: &str = "run by ";

/// Lines of a failed test that the closing lines repeat.
const LINES_PER_FAILURE: usize = 80;

/// What a failed test printed.
struct Told {
    name: String,
    lines: Vec<String>,
    left_out: usize,
}

/// Where in the output of a test program the reader is.
#[derive(PartialEq, Eq)]
enum Reading {
    Tests,
    /// Between the first `failures:` and the second, which only repeats the names.
    Failures,
}

/// The counts so far.
pub(super) struct Tally {
    passed: usize,
    failures: Vec<String>,
    /// Tests that failed once and passed when run again, alone.
    flaky: Vec<String>,
    skips: BTreeSet<String>,
    /// Failures named since the last result line; it must account for all that line counts.
    named: usize,
    /// What failed tests printed, a block a test.
    told: Vec<Told>,
    /// Where in libtest's output of failures the reader is.
    reading: Reading,
    skip_log: NamedTempFile,
}

impl Tally {
    /// Nothing counted, and an empty skip log.
    ///
    /// # Errors
    /// When no temporary file can be made.
    pub(super) fn new() -> Result<Self> {
        let skip_log =
            NamedTempFile::with_prefix("polyfork-skips-").context("make the skip log")?;
        Ok(Self {
            passed: 0,
            failures: Vec::new(),
            flaky: Vec::new(),
            skips: BTreeSet::new(),
            named: 0,
            told: Vec::new(),
            reading: Reading::Tests,
            skip_log,
        })
    }

    /// The file that tests append their `SKIP` lines to.
    pub(super) fn skip_log(&self) -> &Path {
        self.skip_log.path()
    }

    /// One check passed.
    pub(super) fn pass(&mut self) {
        self.passed += 1;
    }

    /// One check failed.
    pub(super) fn fail(&mut self, name: &str, reason: &str) {
        println!("FAILED {name}: {reason}");
        self.failures.push(format!("{name}: {reason}"));
    }

    /// One check was not made.
    pub(super) fn skip(&mut self, name: &str, reason: &str) {
        println!("SKIP {name}: {reason}");
        self.skips.insert(format!("{name}: {reason}"));
    }

    /// How many failed so far.
    pub(super) fn failed(&self) -> usize {
        self.failures.len()
    }

    /// The failures since there were `before`.
    pub(super) fn failed_since(&self, before: usize) -> &[String] {
        &self.failures[before.min(self.failures.len())..]
    }

    /// A test that failed has passed when it was run again, alone.
    pub(super) fn passed_again(&mut self, name: &str) {
        let before = self.failures.len();
        self.failures.retain(|failure| failure != name);
        if self.failures.len() < before {
            self.passed += 1;
            self.flaky.push(name.to_owned());
        }
    }

    /// Whether nothing failed.
    pub(super) fn clean(&self) -> bool {
        self.failures.is_empty()
    }

    /// Takes note of one line of `cargo test`.
    pub(super) fn read_line(&mut self, line: &str) {
        if self.reading == Reading::Failures {
            self.read_failure(line);
        } else if line == "failures:" {
            self.reading = Reading::Failures;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count_before(counts, " passed");
            let unnamed = count_before(counts, " failed").saturating_sub(self.named);
            let name = "a test whose line was mixed with other output; see above";
            self.failures.extend(std::iter::repeat_n(name.to_owned(), unnamed));
            self.named = 0;
        } else if let Some((name, outcome)) = test_line(line) {
            match outcome.split_once("ignored") {
                Some(("", reason)) => {
                    let reason = reason.trim_start_matches([',', ' ']);
                    let reason = if reason.is_empty() { "ignored" } else { reason };
                    if !reason.starts_with(RUN_BY) {
                        self.skips.insert(format!("{name}: {reason}"));
                    }
                }
                _ if outcome.starts_with("FAILED") => {
                    self.failures.push(name.to_owned());
                    self.named += 1;
                }
                _ => {}
            }
        }
    }

    /// Takes a line of what failed tests printed.
    fn read_failure(&mut self, line: &str) {
        let header = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(name) = header {
            self.told.push(Told { name: name.to_owned(), lines: Vec::new(), left_out: 0 });
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.reading = Reading::Tests;
        } else if let Some(told) = self.told.last_mut() {
            if told.lines.len() < LINES_PER_FAILURE {
                told.lines.push(line.to_owned());
            } else {
                told.left_out += 1;
            }
        }
    }

    /// Counts what the tests wrote into the skip log.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub(super) fn collect_skip_log(&mut self, in_ci: bool) -> Result<()> {
        let text = fs::read_to_string(self.skip_log.path()).context("read the skip log")?;
        for line in text.lines().filter_map(|line| line.strip_prefix("SKIP ")) {
            self.passed = self.passed.saturating_sub(1);
            if in_ci && !may_skip_in_ci(line) {
                self.failures.push(format!("{line} (skipped, but required in CI)"));
            } else {
                self.skips.insert(line.to_owned());
            }
        }
        Ok(())
    }

    /// The closing lines.
    pub(super) fn print(&self) {
        for told in &self.told {
            println!("\n---- {} printed:", told.name);
            told.lines.iter().for_each(|line| println!("{line}"));
            if told.left_out > 0 {
                println!("({} more lines, in the log)", told.left_out);
            }
        }
        for name in &self.flaky {
            println!("FLAKY {name}: failed, and passed when run again alone; see above");
        }
        for failure in &self.failures {
            println!("FAILED {failure}");
        }
        let (failed, skipped) = (self.failures.len(), self.skips.len());
        println!("{} passed, {failed} failed, {skipped} skipped", self.passed);
        for skip in &self.skips {
            println!("SKIP {skip}");
        }
    }
}

/// The name of a test that passed, where the line tells one.
pub(super) fn passed_test(line: &str) -> Option<&str> {
    test_line(line).filter(|(_, outcome)| outcome.starts_with("ok")).map(|(name, _)| name)
}

fn may_skip_in_ci(line: &str) -> bool {
    MAY_SKIP_IN_CI.iter().any(|(name, _)| line.starts_with(name))
}

/// `test NAME ... OUTCOME`, with the name and the outcome.
fn test_line(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ... ")
}

/// The number in front of `word`, zero if there is none.
fn count_before(text: &str, word: &str) -> usize {
    let head = text.split(word).next().unwrap_or_default();
    let digits = head.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally_of(lines: &[&str]) -> Tally {
        let mut tally = Tally::new().unwrap();
        lines.iter().for_each(|line| tally.read_line(line));
        tally
    }

    #[test]
    fn results_of_several_test_programs_add_up() {
        let tally = tally_of(&[
            "test a ... ok",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out",
            "test b ... FAILED",
            "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        ]);
        assert_eq!((tally.passed, tally.failed(), tally.clean()), (15, 1, false));
    }

    #[test]
    fn failure_that_no_line_names_is_still_counted() {
        let tally = tally_of(&[
            "test b ... some output FAILED",
            "test result: FAILED. 0 passed; 2 failed; 0 ignored",
        ]);
        assert_eq!(tally.failed(), 2);
    }

    #[test]
    fn test_that_passes_again_is_counted_once_and_named() {
        let mut tally = tally_of(&[
            "test a ... FAILED",
            "test b ... FAILED",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored",
        ]);
        assert_eq!(tally.failed_since(0), ["a", "b"]);
        tally.passed_again("a");
        tally.passed_again("unknown");
        assert_eq!(
            (tally.passed, tally.failed_since(0), tally.flaky.len()),
            (4, &["b".to_owned()][..], 1)
        );
    }

    #[test]
    fn what_a_failed_test_printed_is_kept_and_bounded() {
        let mut lines = vec!["failures:", "", "---- a::b stdout ----"];
        lines.extend(std::iter::repeat_n("left != right", LINES_PER_FAILURE + 2));
        lines.extend(["---- c stdout ----", "gone", "failures:", "    a::b", "    c"]);
        lines.push("test result: FAILED. 0 passed; 2 failed; 0 ignored");
        let tally = tally_of(&lines);
        let told: Vec<_> =
            tally.told.iter().map(|t| (&*t.name, t.lines.len(), t.left_out)).collect();
        assert_eq!(told, [("a::b", LINES_PER_FAILURE, 2), ("c", 1, 0)]);
    }

    #[test]
    fn ignored_test_is_listed_with_its_reason() {
        let tally = tally_of(&["test soak ... ignored, takes an hour", "test other ... ignored"]);
        let skips: Vec<&String> = tally.skips.iter().collect();
        assert_eq!(skips, ["other: ignored", "soak: takes an hour"]);
    }

    #[test]
    fn helper_that_another_test_runs_is_no_skip() {
        let tally = tally_of(&["test helper_adopts ... ignored, run by orphans_are_collected"]);
        assert!(tally.skips.is_empty());
    }

    #[test]
    fn skipped_test_is_not_counted_as_passed() {
        let mut tally = tally_of(&["test result: ok. 5 passed; 0 failed; 0 ignored"]);
        fs::write(tally.skip_log(), "SKIP bun_listens: bun is missing\n").unwrap();
        tally.collect_skip_log(false).unwrap();
        assert_eq!((tally.passed, tally.failed(), tally.skips.len()), (4, 0, 1));
    }

    #[test]
    fn skip_of_a_required_test_fails_in_ci() {
        let mut tally = tally_of(&["test result: ok. 5 passed; 0 failed; 0 ignored"]);
        let log = "SKIP bun_listens: bun is missing\nSKIP ebpf_takes_turns: bpf(2) refused\n";
        fs::write(tally.skip_log(), log).unwrap();
        tally.collect_skip_log(true).unwrap();
        assert_eq!((tally.passed, tally.failed(), tally.skips.len()), (3, 1, 1));
    }
}
