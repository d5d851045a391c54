//! `polyfork check`: everything that can be known to be wrong before anything runs.
//!
//! Beyond what reading a file finds: programs, runtimes and users that are not there, folders that cannot be entered,
//! addresses that two apps want. Starts nothing, binds nothing, and asks nobody.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use polyfork::cluster::Answers;
use serde::Serialize;

use super::args::CheckArgs;
use super::fault::Fault;
use super::wanted::Wanted;
use super::{Loaded, keys};
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::operate::{VERSION, complain, fail, remark};
use crate::out;

/// Names that are all told.
const MOST_NAMES: usize = 12;
/// When there are more, so many are.
const FIRST_NAMES: usize = 5;

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    file: &'a Path,
    /// Nothing keeps its apps from being started.
    ok: bool,
    apps: Vec<AppShape<'a>>,
    problems: Vec<Problem<'a>>,
}

#[derive(Serialize)]
struct AppShape<'a> {
    name: &'a str,
    program: &'a str,
    cwd: PathBuf,
    autostart: bool,
    /// As the file has them, by their keys.
    options: &'a BTreeMap<String, Vec<String>>,
    /// Names alone.
    env: Vec<&'a str>,
}

#[derive(Serialize)]
struct Problem<'a> {
    level: &'static str,
    app: Option<&'a str>,
    line: Option<usize>,
    column: Option<usize>,
    text: &'a str,
}

/// Runs the verb.
pub(crate) fn run(args: CheckArgs) -> Code {
    let json = args.form.json;
    if args.schema {
        out::json(&keys::schema());
        return Code::Stopped;
    }
    let profile = args.profile.as_deref();
    let loaded =
        super::named_or_here(args.file.as_deref()).and_then(|file| super::load(&file, profile));
    let mut loaded = match loaded {
        Ok(loaded) => loaded,
        Err(verdict) => return fail(&verdict, json),
    };
    if !loaded.faults.iter().any(|fault| fault.fatal) {
        let file = args.file.clone().or_else(super::here).unwrap_or_else(|| loaded.file.clone());
        let more = look(&loaded.apps, &file);
        loaded.faults.extend(more);
    }
    let fatal = loaded.faults.iter().find(|fault| fault.fatal);
    let code = fatal.map_or(Code::Stopped, |fault| fault.code);
    for fault in &loaded.faults {
        match fault.fatal {
            true => complain(&fault.told()),
            false => remark_of(fault),
        }
    }
    if json {
        out::json(&report(&loaded));
    } else if code == Code::Stopped {
        let shown = loaded.file.display();
        remark(&format!("{shown} is sound: {}", counted(&loaded.apps)));
    }
    code
}

/// How many apps there are, and their names: of many only the first.
fn counted(apps: &[Wanted]) -> String {
    let plural = if apps.len() == 1 { "app" } else { "apps" };
    let shown = if apps.len() > MOST_NAMES { FIRST_NAMES } else { apps.len() };
    let names: Vec<&str> = apps.iter().take(shown).map(|app| app.name.as_str()).collect();
    let more = match apps.len() - shown {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{} {plural} ({}{more})", apps.len(), names.join(", "))
}

/// Something to know, in one line or more.
pub(crate) fn remark_of(fault: &Fault) {
    for line in fault.told().lines() {
        remark(line);
    }
}

fn report(loaded: &Loaded) -> Report<'_> {
    Report {
        version: VERSION,
        file: &loaded.file,
        ok: !loaded.faults.iter().any(|fault| fault.fatal),
        apps: loaded.apps.iter().map(shape).collect(),
        problems: loaded.faults.iter().map(problem).collect(),
    }
}

fn shape(app: &Wanted) -> AppShape<'_> {
    AppShape {
        name: &app.name,
        program: &app.program,
        cwd: app.cwd(),
        autostart: app.autostart,
        options: &app.options,
        env: app.env.keys().map(String::as_str).collect(),
    }
}

fn problem(fault: &Fault) -> Problem<'_> {
    Problem {
        level: if fault.fatal { "error" } else { "warning" },
        app: fault.app.as_deref(),
        line: fault.at.as_ref().map(|at| at.line),
        column: fault.at.as_ref().map(|at| at.column),
        text: &fault.text,
    }
}

/// What is wrong with apps whose file is sound. `file` is what people call it.
pub(crate) fn look(apps: &[Wanted], file: &Path) -> Vec<Fault> {
    let mut faults: Vec<Fault> = Vec::new();
    let (answers, description) = (Answers::default(), keys::only("start"));
    for app in apps {
        let fault = |key: &str, Verdict { code, text }: Verdict| {
            let at = app.marks.get(key).or(app.at.as_ref()).cloned();
            Fault::new(file, at, text).of(&app.name).with(code)
        };
        let args = match super::layered_on(&description, "start", &[], app) {
            Ok(args) => args,
            Err(verdict) => {
                faults.push(fault("program", verdict));
                continue;
            }
        };
        if let Err(verdict) = crate::run::prepare::look_over(args, &answers) {
            faults.push(fault(&key_of(&verdict, app), verdict));
        }
    }
    faults.extend(conflicts(apps, file));
    faults
}

/// The key that is at fault. What is wrong with an option begins with its name.
fn key_of(verdict: &Verdict, app: &Wanted) -> String {
    let word = verdict.text.split([' ', ':']).next().unwrap_or_default();
    match word.strip_prefix("--") {
        Some(option) => option.replace('-', "_"),
        None if verdict.code == Code::NoRuntime && app.marks.contains_key("runtime") => {
            "runtime".to_owned()
        }
        None => "program".to_owned(),
    }
}

/// What two apps cannot both have.
fn conflicts(apps: &[Wanted], file: &Path) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut addresses: BTreeMap<String, &str> = BTreeMap::new();
    let mut ports: BTreeMap<&str, &str> = BTreeMap::new();
    for app in apps {
        let mark = |key: &str| app.marks.get(key).or(app.at.as_ref()).cloned();
        for text in app.options.get("listen").into_iter().flatten() {
            let Ok(address) = crate::values::address(text) else { continue };
            if crate::words::port(&address) == Some(0) {
                continue;
            }
            if let Some(other) = addresses.insert(address.to_string(), &app.name)
                && other != app.name
            {
                let text = format!("{address} is app {other}'s address as well");
                let fault = Fault::new(file, mark("listen"), text).of(&app.name);
                faults.push(fault.with(Code::AddressInUse));
            }
        }
        let port = app.env.get("PORT").map(String::as_str).filter(|port| *port != "0");
        if let Some(port) = port
            && let Some(other) = ports.insert(port, &app.name)
        {
            let text = format!("PORT is {port}, as app {other}'s: will both listen there?");
            faults.push(Fault::warning(file, mark("env"), text).of(&app.name));
        }
    }
    faults
}
