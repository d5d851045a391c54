//! What a stage prints: everything to a file, the part worth reading to the screen.
//!
//! Counting is the tally's. A run prints some twenty thousand lines, a good part of them by tests
//! that make something fail on purpose; a reader wants to know which test programs ran, what they
//! counted, and, where something failed, what was printed just before.
//!
//! Surprising: `RUST_BACKTRACE` is not passed on to tests: a panic made on purpose would print a
//! page each time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::paths;
use crate::proc::Output;

/// Lines shown of a stage that fails without naming a test.
const LAST_LINES: usize = 120;

/// The log of one run of the test command.
pub(super) struct Log {
    path: PathBuf,
    file: BufWriter<File>,
    last: VecDeque<String>,
}

impl Log {
    /// An empty log under the build folder; the one of the run before is replaced.
    ///
    /// # Errors
    /// When the folder or the file cannot be made.
    pub(super) fn new() -> Result<Self> {
        let path = paths::target().join("xtask-test.log");
        std::fs::create_dir_all(paths::target()).context("make the build folder")?;
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, file: BufWriter::new(file), last: VecDeque::new() })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A stage begins.
    pub(super) fn begin(&mut self, title: &str) {
        self.last.clear();
        println!("\n{title}");
        self.write(title);
    }

    /// Takes one line; shows it if a reader of the screen wants it.
    pub(super) fn take(&mut self, output: Output, line: &str) {
        if worth_showing(output, line) {
            println!("{}", line.trim_start());
        }
        self.write(line);
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line.to_owned());
    }

    /// Shows the last lines, for a failure that no test's name explains.
    pub(super) fn show_last(&self) {
        self.last.iter().for_each(|line| println!("{line}"));
    }

    fn write(&mut self, line: &str) {
        // A disk that is full costs the log, not the run.
        let _ = writeln!(self.file, "{line}").and_then(|()| self.file.flush());
    }
}

fn worth_showing(output: Output, line: &str) -> bool {
    match output {
        Output::Err => ["     Running ", "   Doc-tests "].iter().any(|word| line.starts_with(word)),
        Output::Out => {
            line.starts_with("test result: ")
                || line.starts_with("simulation: ")
                || (line.starts_with("test ") && line.ends_with(" ... FAILED"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn screen_shows_programs_results_and_failures_only() {
        assert!(worth_showing(Output::Err, "     Running tests/node/main.rs (target/node-1)"));
        assert!(worth_showing(Output::Out, "test result: ok. 12 passed; 0 failed"));
        assert!(worth_showing(Output::Out, "test a::b ... FAILED"));
        assert!(!worth_showing(Output::Out, "test a::b ... ok"));
        assert!(!worth_showing(Output::Err, "thread 'a' panicked at b.rs:1:2:"));
    }
}
