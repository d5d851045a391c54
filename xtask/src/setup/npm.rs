//! Packages of npm, each alone in `.peers/npm-<name>/` with no lock file and no trace elsewhere.
//!
//! A folder of its own per package lets five versions of `node` stand side by side. npm's own
//! download cache stays where the user keeps it, as with cargo.
//!
//! Surprising: the package `node` runs npm again in its install script to fetch the binary for this
//! machine; so the settings go through the environment, which the inner npm inherits, not through
//! arguments, which it would not see.
//!
//! Source: npm-install(1), npm-config(7).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::manifest::Tool;
use super::pins::{NPM, NPM_PACKAGES, NpmPin};
use super::{Found, INSTALL_LIMIT, Outcome, debian, twice};
use crate::{paths, proc};

/// Installs at once; npm waits mostly for the network and the disk.
const PARALLEL: usize = 3;

/// Settings of npm: nothing written but the package itself.
const SETTINGS: &[(&str, &str)] = &[
    ("npm_config_package_lock", "false"),
    ("npm_config_save", "false"),
    ("npm_config_audit", "false"),
    ("npm_config_fund", "false"),
    ("npm_config_update_notifier", "false"),
    ("npm_config_loglevel", "error"),
    ("npm_config_ignore_scripts", "false"),
];

/// All packages of the table.
pub(super) fn install_all() -> Vec<Outcome> {
    let next = Mutex::new(NPM.iter());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some(pin) = next.lock().expect("no panic under the lock").next() {
                    let outcome = Outcome::tell(pin.name, true, install_one(pin));
                    done.lock().expect("no panic under the lock").push(outcome);
                }
            });
        }
    });
    done.into_inner().expect("no panic under the lock")
}

fn install_one(pin: &NpmPin) -> Result<Found, String> {
    let folder = paths::peers().join(format!("npm-{}", pin.name));
    if let Some(tool) = installed(pin, &folder) {
        return Ok(Found { tool, fresh: false });
    }
    let npm = npm()?;
    twice(|| install(pin, &npm, &folder))?;
    match installed(pin, &folder) {
        Some(tool) => Ok(Found { tool, fresh: true }),
        None => Err(format!("npm installed {} without {}", pin.package, pin.entry)),
    }
}

/// npm's own path; looked for, or brought, once for all threads.
fn npm() -> Result<PathBuf, String> {
    static NPM_PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let find = || debian::find_or_install("npm", NPM_PACKAGES).map(|(path, _)| path);
    NPM_PROGRAM.get_or_init(find).clone()
}

/// The tool, if exactly the pinned version is in place.
fn installed(pin: &NpmPin, folder: &Path) -> Option<Tool> {
    let modules = folder.join("node_modules");
    let text = fs::read_to_string(modules.join(pin.package).join("package.json")).ok()?;
    let package: Value = serde_json::from_str(&text).ok()?;
    let path = modules.join(pin.entry);
    (package["version"] == pin.version && path.exists())
        .then(|| Tool { path, version: pin.version.to_owned() })
}

/// Installs beside the final place and moves it there when complete.
fn install(pin: &NpmPin, npm: &Path, folder: &Path) -> Result<()> {
    let draft = draft_folder(folder);
    remove(&draft)?;
    fs::create_dir_all(&draft).with_context(|| format!("create {}", draft.display()))?;
    // Without a package.json here npm would look for one in the folders above.
    fs::write(draft.join("package.json"), "{\"private\": true}\n")?;
    let mut command = Command::new(npm);
    command.current_dir(&draft).envs(SETTINGS.iter().copied());
    command.args(["install", &format!("{}@{}", pin.package, pin.version)]);
    let run = proc::capture(command, INSTALL_LIMIT)?;
    if !run.ok() {
        let _ = remove(&draft); // the reason for the failure matters more
        bail!("npm install {}: {}", pin.package, run.complaint());
    }
    remove(folder)?;
    fs::rename(&draft, folder).with_context(|| format!("move to {}", folder.display()))
}

fn draft_folder(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().expect("a folder of .peers has a name").to_owned();
    name.push(".new");
    folder.with_file_name(name)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_of_another_version_counts_as_not_installed() {
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join("node_modules/thing");
        fs::create_dir_all(&package).unwrap();
        fs::write(package.join("package.json"), r#"{"version": "1.0.0"}"#).unwrap();
        let pin = |version| NpmPin { name: "thing", package: "thing", version, entry: "thing" };
        assert!(installed(&pin("1.0.0"), folder.path()).is_some());
        assert!(installed(&pin("1.0.1"), folder.path()).is_none());
    }
}
