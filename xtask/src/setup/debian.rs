//! Programs of the system, from Debian's packages when they are missing and we are root.
//!
//! Without root, or without apt-get, nothing is tried: the reason names the command to run.
//!
//! Surprising: the package lists are brought up to date only after an install has failed, as a
//! fresh machine has none and a used one need not wait for them.
//!
//! Source: apt-get(8).

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::manifest::Tool;
use super::pins::{SYSTEM, SystemPin, UNPACKED, UnpackedPin};
use super::{Found, INSTALL_LIMIT, Outcome};
use crate::{paths, proc};

/// All programs of the table.
pub(super) fn install_all() -> Vec<Outcome> {
    let mut all: Vec<Outcome> =
        SYSTEM.iter().map(|pin| Outcome::tell(pin.name, true, install_one(pin))).collect();
    all.extend(UNPACKED.iter().map(|pin| Outcome::tell(pin.name, false, unpack_one(pin))));
    all
}

/// Takes the program of the search path, or unpacks the package into `.peers/`.
fn unpack_one(pin: &UnpackedPin) -> Result<Found, String> {
    let found = |path: PathBuf, fresh| {
        let version = own_version(&path).unwrap_or_else(|| "unknown version".into());
        Found { tool: Tool { path, version }, fresh }
    };
    if let Some(path) = which(pin.name) {
        return Ok(found(path, false));
    }
    let folder = paths::peers().join(format!("deb-{}", pin.name));
    let program = folder.join(pin.entry);
    if is_executable(&program) {
        return Ok(found(program, false));
    }
    let fetched = || download(pin.package, &folder);
    fetched()
        .or_else(|_| apt(&["update"]).and_then(|()| fetched()))
        .map_err(|error| format!("apt-get download {}: {error:#}", pin.package))?;
    match is_executable(&program) {
        true => Ok(found(program, true)),
        false => Err(format!("{} has no {}", pin.package, pin.entry)),
    }
}

/// Fetches a package and unpacks it into a folder.
fn download(package: &str, folder: &Path) -> Result<()> {
    let draft = tempfile::tempdir_in(paths::peers())?;
    let mut fetch = Command::new("apt-get");
    fetch.current_dir(draft.path()).args(["--quiet", "download", package]);
    let run = proc::capture(fetch, INSTALL_LIMIT)?;
    ensure!(run.ok(), "{}", run.complaint());
    let file = std::fs::read_dir(draft.path())?.flatten().next().context("it fetched nothing")?;
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--extract").arg(file.path()).arg(folder);
    let run = proc::capture(unpack, INSTALL_LIMIT)?;
    ensure!(run.ok(), "{}", run.complaint());
    Ok(())
}

/// What a program answers to `-v`, the part behind the last slash.
fn own_version(program: &Path) -> Option<String> {
    let mut command = Command::new(program);
    command.arg("-v");
    let run = proc::capture(command, INSTALL_LIMIT).ok()?;
    let text = if run.stderr.is_empty() { run.stdout } else { run.stderr };
    text.trim().rsplit('/').next().map(str::to_owned).filter(|version| !version.is_empty())
}

fn install_one(pin: &SystemPin) -> Result<Found, String> {
    let (path, fresh) = find_or_install(pin.name, &[pin.package])?;
    let version = package_version(pin.package).unwrap_or_else(|| "unknown version".into());
    Ok(Found { tool: Tool { path, version }, fresh })
}

/// Finds `program` in the search path, installing `packages` when it is not there.
///
/// The flag says whether an install was needed.
pub(super) fn find_or_install(program: &str, packages: &[&str]) -> Result<(PathBuf, bool), String> {
    if let Some(path) = which(program) {
        return Ok((path, false));
    }
    install(packages)?;
    match which(program) {
        Some(path) => Ok((path, true)),
        None => Err(format!("{} is installed but has no {program}", packages.join(" "))),
    }
}

/// Installs Debian packages.
///
/// # Errors
/// The reason in words: not root, no apt-get, or what apt-get said.
pub(super) fn install(packages: &[&str]) -> Result<(), String> {
    let list = packages.join(" ");
    if which("apt-get").is_none() {
        return Err(format!("no apt-get here; install {list} by the system's own means"));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(format!("not root; run: apt-get install {list}"));
    }
    let install = || apt(&[&["install", "--yes", "--no-install-recommends"], packages].concat());
    install()
        .or_else(|_| apt(&["update"]).and_then(|()| install()))
        .map_err(|error| format!("apt-get install {list}: {error:#}"))
}

fn apt(words: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").args(words).env("DEBIAN_FRONTEND", "noninteractive");
    let run = proc::capture(command, INSTALL_LIMIT)?;
    if !run.ok() {
        bail!("{}", run.complaint());
    }
    Ok(())
}

/// The version of an installed Debian package; `None` where dpkg does not know it.
fn package_version(package: &str) -> Option<String> {
    let mut command = Command::new("dpkg-query");
    command.args(["--show", "--showformat=${Version}", package]);
    let run = proc::capture(command, INSTALL_LIMIT).ok()?;
    run.ok().then(|| run.stdout.trim().to_owned()).filter(|version| !version.is_empty())
}

/// The first executable file of that name in the search path; root's sbin folders are looked at too.
pub(super) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_is_found_and_nonsense_is_not() {
        assert!(which("sh").is_some());
        assert_eq!(which("no-such-program-of-ours"), None);
    }
}
