//! `cargo xtask setup`: brings what tests and benchmarks need into `.peers/`, with exact versions.
//!
//! `pins` is the table, `npm`, `python` and `debian` install one kind each, `manifest` is what the
//! readers get. A thing that cannot be had is not an error here: it is marked missing with the
//! reason, and who needs it decides (the test command fails on it in CI).
//!
//! Surprising: a package is installed into a folder of its own beside its final name and moved
//! there when complete, so that an interrupted set-up never looks finished. Two set-ups at once
//! wait for each other on a file lock.
//!
//! Source: npm-install(1), `python3 -m venv`, apt-get(8), flock(2).

mod debian;
pub(crate) mod manifest;
mod npm;
mod pins;
mod python;

use std::fs::{self, File};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pico_args::Arguments;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::paths;
use manifest::{Manifest, Tool};

/// One install may take this long; downloads of 40 MB over a slow line fit.
const INSTALL_LIMIT: Duration = Duration::from_secs(600);

const HELP: &str = "\
Brings the peers and tools of tests and benchmarks into .peers/ (git-ignored).

Usage: cargo xtask setup

Prints one line per thing: present, installed or MISSING with the reason. Quick when all is there.
Debian packages (wrk, strace, iproute2, and npm or python3-venv where missing) are installed when
run as root, else named. Exit code 1 when something that the tests require is missing.
";

/// What became of one thing.
pub(crate) struct Outcome {
    /// Name in the manifest.
    pub(crate) name: &'static str,
    /// Whether the tests need it.
    pub(crate) required: bool,
    /// Where it is and how it came there, or why it is missing.
    pub(crate) result: Result<Found, String>,
}

/// A thing that is there.
pub(crate) struct Found {
    /// Path and version.
    pub(crate) tool: Tool,
    /// Whether this run brought it.
    pub(crate) fresh: bool,
}

impl Outcome {
    /// Tells what became of a thing, as soon as it is known.
    fn tell(name: &'static str, required: bool, result: Result<Found, String>) -> Self {
        let line = match &result {
            Ok(found) => {
                let how = if found.fresh { "installed" } else { "present" };
                format!("{how:<10} {name:<10} {}", found.tool.version)
            }
            Err(reason) => format!("{:<10} {name:<10} ({reason})", "MISSING"),
        };
        // A reader that has seen enough (`| head`) must not stop the set-up half-way.
        let _ = writeln!(io::stdout(), "{line}");
        Self { name, required, result }
    }
}

/// The command.
///
/// # Errors
/// When `.peers/` cannot be written; a missing thing is told by the exit code.
pub(crate) fn main(args: &mut Arguments) -> Result<ExitCode> {
    if args.contains(["-h", "--help"]) {
        print!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    }
    crate::nothing_left(args)?;
    let missing = run()?.iter().any(|outcome| outcome.required && outcome.result.is_err());
    Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Brings everything and writes the manifest.
///
/// # Errors
/// As [`main`].
pub(crate) fn run() -> Result<Vec<Outcome>> {
    let began = Instant::now();
    let folder = paths::peers();
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let _lock = lock()?;
    let mut outcomes = debian::install_all();
    outcomes.extend(npm::install_all());
    outcomes.extend(python::install_all());
    let manifest = Manifest::of(&outcomes);
    manifest.write(&paths::manifest())?;
    let took = began.elapsed().as_secs_f64();
    let _ = writeln!(io::stdout(), "set-up took {took:.1} s; {}", paths::manifest().display());
    Ok(outcomes)
}

/// Takes the set-up lock; the kernel gives it back when this process ends, however it ends.
fn lock() -> Result<File> {
    let path = paths::peers().join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        println!("another set-up runs, waiting for it");
        flock(&file, FlockOperation::LockExclusive).context("lock .peers")?;
    }
    Ok(file)
}

/// Does `install` once more when it fails: registries have bad moments.
fn twice<T>(mut install: impl FnMut() -> Result<T>) -> Result<T, String> {
    install().or_else(|_| install()).map_err(|error| format!("{error:#}"))
}
