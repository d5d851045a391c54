//! `cargo xtask try`: the main job on a machine that has nothing yet.
//!
//! Builds the command and runs a stock Node server with it, in the foreground. Node comes from PATH, or else from
//! `setup`. Replaces this process, so that Ctrl-C and the exit code are the command's own.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use pico_args::Arguments;

use crate::setup::manifest::Manifest;
use crate::{paths, setup};

const PROGRAM: &str = "crates/polyfork/examples/server.js";

/// Runs the example server; words that follow go to `polyfork run`, before the program.
pub(crate) fn main(args: &mut Arguments) -> Result<ExitCode> {
    let options = std::mem::replace(args, Arguments::from_vec(Vec::new())).finish();
    let node = node()?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["run", "--release", "--quiet", "-p", "polyfork-cli", "--", "run", "--runtime"]);
    command.arg(&node).args(options).arg(PROGRAM).current_dir(paths::root());
    println!("polyfork run {PROGRAM} (by {}; building first, Ctrl-C ends it)", node.display());
    Err(command.exec()).context("cannot start cargo")
}

fn node() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|dir| dir.join("node")).find(|file| file.is_file());
    if let Some(node) = found {
        return Ok(node);
    }
    println!("no node in PATH: bringing the tools of the tests into .peers/ first");
    setup::run()?;
    Ok(Manifest::read(&paths::manifest())?.tool("node20")?.path.clone())
}
