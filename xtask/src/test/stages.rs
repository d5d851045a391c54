//! The table of stages. To add one, add a line.
//!
//! How a stage is counted is in the parent module. Stages run in this order, cheap ones first.
//!
//! Surprising: the clippy and test stages build with all features, as the examples need them.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Session, audit};

/// A stage that takes longer hangs; it is ended with all it started.
pub(super) const LIMIT: Duration = Duration::from_secs(40 * 60);

/// How a stage ended, when it did not fail.
pub(super) enum Verdict {
    /// As a whole.
    Passed,
    /// Its tests were counted one by one.
    Counted,
    /// Not run, and why.
    Skipped(String),
}

/// One line of the table.
#[derive(Clone, Copy)]
pub(super) struct Stage {
    /// Name for `--only` and the closing lines.
    pub(super) name: &'static str,
    /// What it checks.
    pub(super) about: &'static str,
    /// Part of `--quick`.
    quick: bool,
    /// Runs it.
    pub(super) run: fn(&mut Session) -> Result<Verdict>,
}

/// Everything, in order.
const STAGES: &[Stage] = &[
    Stage { name: "setup", about: "peers and tools", quick: false, run: Session::set_up },
    Stage {
        name: "fmt",
        about: "formatting",
        quick: true,
        run: |session| session.check(&["fmt", "--all", "--check"], &[]),
    },
    Stage {
        name: "clippy",
        about: "lints, all targets",
        quick: true,
        run: |session| {
            let words = ["clippy", "--workspace", "--all-targets", "--all-features"];
            session.check(&[&words[..], &["--", "-D", "warnings"]].concat(), &[])
        },
    },
    Stage {
        name: "docs",
        about: "documentation builds without a warning",
        quick: false,
        run: |session| {
            // The command and the library have one name. Documented at once, each removes what the other is writing.
            let variables = [("RUSTDOCFLAGS", "-D warnings")];
            let words = ["doc", "--no-deps", "--all-features"];
            session.check(&[&words[..], &["--package", "polyfork-cli"]].concat(), &variables)?;
            let others = ["--workspace", "--exclude", "polyfork-cli"];
            session.check(&[&words[..], &others].concat(), &variables)
        },
    },
    Stage {
        name: "unit",
        about: "unit tests only",
        quick: true,
        run: |session| {
            let words = ["test", "--workspace", "--all-features", "--lib", "--bins"];
            session.tests(&[&words[..], &["--no-fail-fast"]].concat(), &[])
        },
    },
    Stage {
        name: "release",
        about: "the command as users build it",
        quick: false,
        run: |session| session.check(&["build", "--release", "-p", "polyfork-cli"], &[]),
    },
    Stage {
        name: "tests",
        about: "unit, integration and documentation tests",
        quick: false,
        run: |session| {
            let words = ["test", "--workspace", "--all-features", "--no-fail-fast"];
            session.tests(&words, &[])
        },
    },
    Stage {
        name: "simulation",
        about: "the supervisor's core through random event orders, optimised",
        quick: false,
        run: |session| {
            // Not captured: the seed and the sums of what happened are the point of the stage.
            let words = ["test", "--release", "-p", "polyfork-core", "--test", "simulation"];
            let words = [&words[..], &["--", "--nocapture"]].concat();
            session.tests(&words, &[("POLYFORK_SIM_EVENTS", "10000000")])
        },
    },
    Stage {
        name: "models",
        about: "lock-free algorithms in every schedule (loom) and many larger ones (shuttle)",
        quick: false,
        run: |session| {
            session.models("polyfork_loom", "loom_")?;
            session.models("polyfork_shuttle", "shuttle_")
        },
    },
    Stage {
        name: "fuzz",
        about: "every decoder against random bytes, optimised",
        quick: false,
        run: |session| {
            let words = ["test", "--release", "-p", "polyfork-wire", "--no-fail-fast"];
            let more = [("POLYFORK_FUZZ_RUNS", "50000"), ("PROPTEST_CASES", "2000")];
            session.tests(&words, &more)
        },
    },
    Stage {
        name: "audit",
        about: "dependencies against known advisories",
        quick: false,
        run: audit,
    },
];

/// Stages that a full run leaves out because another one contains them.
const CONTAINED: &[&str] = &["unit"];

/// The stages to run.
///
/// # Errors
/// Names a stage of `only` that is not in the table.
pub(super) fn choose(quick: bool, only: Option<&str>) -> Result<Vec<Stage>> {
    let Some(only) = only else {
        let wanted =
            |stage: &&Stage| if quick { stage.quick } else { !CONTAINED.contains(&stage.name) };
        return Ok(STAGES.iter().filter(wanted).copied().collect());
    };
    let names: Vec<&str> = only.split(',').map(str::trim).collect();
    for name in &names {
        ensure!(STAGES.iter().any(|stage| stage.name == *name), "no stage `{name}`; see --list");
    }
    Ok(STAGES.iter().filter(|stage| names.contains(&stage.name)).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(quick: bool, only: Option<&str>) -> Vec<&'static str> {
        choose(quick, only).unwrap().iter().map(|stage| stage.name).collect()
    }

    #[test]
    fn full_run_has_every_test_once() {
        let all = names(false, None);
        assert!(all.contains(&"tests") && !all.contains(&"unit"));
        assert_eq!(all.first(), Some(&"setup"));
    }

    #[test]
    fn quick_run_is_a_subset_that_needs_no_set_up() {
        assert_eq!(names(true, None), ["fmt", "clippy", "unit"]);
    }

    #[test]
    fn stage_of_an_unknown_name_is_refused() {
        assert_eq!(names(false, Some("fmt, docs")), ["fmt", "docs"]);
        let error = choose(false, Some("fmt,dcos")).err().unwrap().to_string();
        assert_eq!(error, "no stage `dcos`; see --list");
    }
}
