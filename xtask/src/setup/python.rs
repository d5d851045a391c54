//! One Python virtual environment, `.peers/python`, with the servers that `sockets` workers run.
//!
//! Surprising: a virtual environment holds absolute paths, so it cannot be moved into place as the
//! npm folders are. A mark in it, written last, names the folder it was made in and the pins it
//! holds; a mark that differs means making it anew.
//!
//! Source: `python3 -m venv`, pip-install(1).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::manifest::Tool;
use super::pins::{PYTHON, PYTHON_PACKAGES, PythonPin};
use super::{Found, INSTALL_LIMIT, Outcome, debian, twice};
use crate::{paths, proc};

/// The environment's Python and all programs of the table.
pub(super) fn install_all() -> Vec<Outcome> {
    let folder = paths::peers().join("python");
    let python = environment(&folder);
    let broken = python.as_ref().err().cloned();
    let mut outcomes = vec![Outcome::tell("python", true, python)];
    outcomes.extend(PYTHON.iter().map(|pin| {
        let result = match &broken {
            None => install_one(pin, &folder),
            Some(reason) => Err(reason.clone()),
        };
        Outcome::tell(pin.name, pin.required, result)
    }));
    outcomes
}

/// A working virtual environment.
fn environment(folder: &Path) -> Result<Found, String> {
    let program = folder.join("bin/python");
    let mark = Mark { path: folder.join(".made"), text: folder.display().to_string() };
    let fresh = !(mark.holds() && program.exists());
    if fresh {
        let make = || make_environment(folder).and_then(|()| mark.write());
        if let Err(first) = make() {
            // Debian keeps venv in a package of its own; bring it and try once more.
            debian::install(PYTHON_PACKAGES).map_err(|reason| format!("{first:#}; {reason}"))?;
            make().map_err(|error| format!("{error:#}"))?;
        }
    }
    let version = run(&program, &["-c", "import platform; print(platform.python_version())"])
        .map_err(|error| format!("{error:#}"))?;
    Ok(Found { tool: Tool { path: program, version }, fresh })
}

fn make_environment(folder: &Path) -> Result<()> {
    let mut last = anyhow::anyhow!("no python3 in the search path");
    for python in [debian::which("python3"), Some("/usr/bin/python3".into())].into_iter().flatten()
    {
        let place = folder.display().to_string();
        match run(&python, &["-m", "venv", "--clear", &place]) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn install_one(pin: &PythonPin, folder: &Path) -> Result<Found, String> {
    let program = folder.join("bin").join(pin.name);
    let mark = Mark {
        path: folder.join(format!(".{}", pin.name)),
        text: format!("{}\n{}", folder.display(), pin.requirements.join("\n")),
    };
    let fresh = !(mark.holds() && program.exists());
    if fresh {
        let python = folder.join("bin/python");
        let words = [&["-m", "pip", "install", "--quiet", "--no-input"], pin.requirements].concat();
        twice(|| run(&python, &words).and_then(|_| mark.write()))?;
    }
    let version = pin.requirements[0].rsplit("==").next().unwrap_or_default().to_owned();
    Ok(Found { tool: Tool { path: program, version }, fresh })
}

/// Runs a Python command and returns what it printed.
fn run(python: &Path, words: &[&str]) -> Result<String> {
    let mut command = Command::new(python);
    command.args(words).env("PIP_DISABLE_PIP_VERSION_CHECK", "1").env_remove("PYTHONHOME");
    let run = proc::capture(command, INSTALL_LIMIT)?;
    if !run.ok() {
        bail!("{} {}: {}", python.display(), words.join(" "), run.complaint());
    }
    Ok(run.stdout.trim().to_owned())
}

/// A file that says what was completed.
struct Mark {
    path: PathBuf,
    text: String,
}

impl Mark {
    fn holds(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text == self.text)
    }

    fn write(&self) -> Result<()> {
        fs::write(&self.path, &self.text).with_context(|| format!("write {}", self.path.display()))
    }
}
