//! The part of `doctor` about folders and the apps in them: where apps are found, where logs go, who left what behind.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statvfs};

use super::{Check, plain};
use crate::control::folder::{self, Runtime};
use crate::control::name::Name;
use crate::logs::folder as log_folder;
use crate::words;

/// Less room than this for logs is told.
const LITTLE: u64 = 256 << 20;
/// Names of dead apps that are told one by one.
const MOST_NAMES: usize = 5;

pub(super) fn examine() -> Vec<Check> {
    let mut checks = vec![home()];
    checks.extend(runtime_folder());
    checks.extend([logs(), scratch()]);
    checks
}

fn home() -> Check {
    match std::env::var_os("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Check::ok("home", shown(Path::new(&home))),
        None => Check::warn(
            "home",
            "HOME is not set",
            "`start` of other users than root needs --log-dir then; the preload of Node and uvicorn goes to /tmp",
        ),
    }
}

fn runtime_folder() -> Vec<Check> {
    let place = folder::place();
    let runtime = match Runtime::find() {
        Err(verdict) => {
            let next = "POLYFORK_RUNTIME_DIR names another";
            return vec![Check::fail("runtime_folder", verdict.text, next)];
        }
        Ok(None) => return vec![not_there(&place)],
        Ok(Some(runtime)) => runtime,
    };
    if let Err(error) = access(&place, Access::WRITE_OK) {
        let text = format!("{}: {}", shown(&place), plain(error));
        return vec![Check::fail("runtime_folder", text, NOWHERE)];
    }
    let names = runtime.names().unwrap_or_default();
    let (mut living, mut dead) = (0, Vec::new());
    for name in &names {
        match runtime.app(name) {
            Some(app) if app.is_alive() => living += 1,
            Some(app) if app.card().is_some() => dead.push(name),
            _ => {}
        }
    }
    let text = format!("{}, {living} running", shown(&place));
    let mut checks = vec![Check::ok("runtime_folder", text)];
    checks.extend(stale(&dead));
    checks
}

const NOWHERE: &str = "apps cannot be reached by commands, and `start` refuses; POLYFORK_RUNTIME_DIR names another folder";

fn not_there(place: &Path) -> Check {
    let above = existing(place);
    match access(&above, Access::WRITE_OK) {
        Ok(()) => Check::ok("runtime_folder", format!("{} will be made", shown(place))),
        Err(error) => {
            let text =
                format!("{} cannot be made in {}: {}", shown(place), shown(&above), plain(error));
            Check::warn("runtime_folder", text, NOWHERE)
        }
    }
}

fn stale(dead: &[&Name]) -> Option<Check> {
    let (first, rest) = (dead.iter().take(MOST_NAMES), dead.len().saturating_sub(MOST_NAMES));
    let mut names = first.map(|name| name.as_str()).collect::<Vec<_>>().join(" ");
    if names.is_empty() {
        return None;
    }
    let next = format!("`polyfork logs NAME` may say why; `polyfork stop {names}` forgets them");
    if rest > 0 {
        names.push_str(&format!(" and {rest} more"));
    }
    Some(Check::warn("ended_apps", format!("ended by themselves or killed: {names}"), next))
}

fn logs() -> Check {
    let root =
        match log_folder::root(std::env::var_os("POLYFORK_LOG_DIR").as_deref().map(Path::new)) {
            Ok(root) => root,
            Err(verdict) => {
                return Check::warn("logs", verdict.text, "`run` needs none; `start` does");
            }
        };
    let above = existing(&root);
    if let Err(error) = access(&above, Access::WRITE_OK) {
        let text = format!("{}: {}", shown(&above), plain(error));
        return Check::warn(
            "logs",
            text,
            "`run` needs none; for `start`, --log-dir names another folder",
        );
    }
    let Ok(room) = statvfs(&above) else {
        return Check::ok("logs", shown(&root));
    };
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    let text = format!("{}, {} MiB free", shown(&root), free >> 20);
    match free {
        little if little < LITTLE => Check::warn(
            "logs",
            text,
            "lines that do not fit are lost, and counted; make room or name another folder",
        ),
        _ => Check::ok("logs", text),
    }
}

/// Where the preload of Node and Python workers goes.
fn scratch() -> Check {
    let variable =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let tried: Vec<PathBuf> = cache.into_iter().chain(["/tmp".into()]).collect();
    let fit = |path: &&PathBuf| access(existing(path), Access::WRITE_OK).is_ok();
    match tried.iter().find(fit) {
        Some(path) => Check::ok("preload", format!("goes to {}", shown(path))),
        None => Check::warn(
            "preload",
            "neither the cache folder nor /tmp can be written to",
            "workers run without the preload: Node's wait for kept-alive clients when they drain, uvicorn's cut them off; set XDG_CACHE_HOME",
        ),
    }
}

/// The path itself, or what of it exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn shown(path: &Path) -> String {
    words::harmless(&path.to_string_lossy())
}
