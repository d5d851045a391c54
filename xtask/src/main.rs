//! `cargo xtask`: the project's chores, written in Rust so that a fresh machine needs only cargo.
//!
//! `setup` brings the peers and tools, `test` is the test command of the README, `bench` compares
//! with the peers. This file parses and dispatches; each chore has its module. Nothing of the
//! product lives here, and nothing here is published.
//!
//! Surprising: every chore runs as a child subreaper (see [`proc`]), so that whatever it starts,
//! a daemon that detached itself included, is still known and is ended with it.
//!
//! Source: the "xtask" convention of the Rust community; prctl(2) `PR_SET_CHILD_SUBREAPER`.

#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a chore runner's job is to talk to the terminal"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "chores run cargo, npm and pip; polyfork's own spawn is what is under test here"
)]

mod bench;
mod paths;
mod proc;
mod setup;
mod test;
mod try_it;

use std::process::ExitCode;

use anyhow::{Result, bail};
use pico_args::Arguments;

const HELP: &str = "\
The project's chores.

Usage: cargo xtask COMMAND [OPTIONS]

Commands:
  setup                  bring the peers and tools of tests and benchmarks into .peers/
  try [OPTIONS]          run a stock Node server with polyfork, on all cores, in the foreground
  test [--quick]         run every check; ends with `N passed, N failed, N skipped`
  bench http             compare with Node's cluster, PM2 and tokio, side by side
  help                   print this

Each command answers --help.
";

fn main() -> ExitCode {
    let mut args = Arguments::from_env();
    let outcome = proc::guard().and_then(|()| dispatch(&mut args));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            // A shell's way of telling that a signal ended it.
            let by_signal =
                proc::interrupted_by().and_then(|signal| u8::try_from(128 + signal).ok());
            by_signal.map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

/// Runs the chore that the first word names.
fn dispatch(args: &mut Arguments) -> Result<ExitCode> {
    match args.subcommand()?.as_deref() {
        Some("setup") => setup::main(args),
        Some("test") => test::main(args),
        Some("bench") => bench::main(args),
        Some("try") => try_it::main(args),
        Some("help") | None => {
            print!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        Some(other) => bail!("no command `{other}`; `cargo xtask help` lists them"),
    }
}

/// Refuses words that no option took, so that a typing slip is not silently ignored.
///
/// # Errors
/// Names the first word that is left.
fn nothing_left(args: &mut Arguments) -> Result<()> {
    let rest = std::mem::replace(args, Arguments::from_vec(Vec::new())).finish();
    match rest.first() {
        None => Ok(()),
        Some(word) => bail!("unknown option `{}`; try --help", word.to_string_lossy()),
    }
}
