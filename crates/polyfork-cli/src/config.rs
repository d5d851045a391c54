//! Configuration files: which one is meant, what it says, and how it becomes options.
//!
//! `file` reads polyfork.toml and `ecosystem` PM2's files, which `evaluate` has evaluated; both give `wanted` apps. `keys`
//! are the options of the command line once more. `live` is the configuration of an app that runs, `renew` what makes it
//! reload by itself (`cron`, `watch`). `check`, `apply` and `init` are the verbs.
//!
//! The surprising rule: an app's options are the command line's defaults while that app is parsed. So what counts is, in this
//! order, the command line, the environment, the file, the default; and there is one parser for all of them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::FromArgMatches;

use crate::args::run::RunArgs;
use crate::args::start::{LogArgs, StartArgs};
use crate::args::{Cli, Verb};
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::operate::start::Starting;
use crate::words;

use fault::Fault;
use live::Live;
use wanted::Wanted;

pub(crate) mod apply;
pub(crate) mod args;
pub(crate) mod check;
pub(crate) mod cron;
mod ecosystem;
mod evaluate;
pub(crate) mod fault;
mod file;
pub(crate) mod init;
pub(crate) mod keys;
pub(crate) mod live;
pub(crate) mod renew;
pub(crate) mod wanted;
mod watch;

/// Files that are looked for, in this order.
pub(crate) const FILES: [&str; 5] = [
    "polyfork.toml",
    "ecosystem.config.js",
    "ecosystem.config.cjs",
    "ecosystem.config.mjs",
    "ecosystem.config.json",
];

/// What a file says.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// In full.
    pub(crate) file: PathBuf,
    pub(crate) apps: Vec<Wanted>,
    pub(crate) faults: Vec<Fault>,
}

impl Loaded {
    /// Its apps, unless something is wrong with the file.
    ///
    /// # Errors
    /// All that is wrong.
    pub(crate) fn sound(self) -> Result<Loaded, Verdict> {
        match self.faults.iter().any(|fault| fault.fatal) {
            true => Err(fault::refusal(&self.faults)),
            false => Ok(self),
        }
    }
}

/// Reads a file, whatever kind it is.
///
/// # Errors
/// When it cannot be read at all. What is wrong in it is among what was loaded.
pub(crate) fn load(file: &Path, profile: Option<&str>) -> Result<Loaded, Verdict> {
    let usage = |what: String| Verdict { code: Code::Usage, text: words::plain(&what) };
    let cannot = |error: std::io::Error| usage(format!("{}: {error}", file.display()));
    let full = std::path::absolute(file).map_err(cannot)?;
    let is_module = file
        .extension()
        .and_then(OsStr::to_str)
        .is_some_and(|end| matches!(end, "js" | "cjs" | "mjs" | "ts" | "mts" | "cts"));
    let (mut apps, mut faults) = if is_module {
        std::fs::metadata(file).map_err(cannot)?;
        match evaluate::evaluate(&full) {
            Ok(value) => ecosystem::read(&full, &value, profile),
            Err(fault) => (Vec::new(), vec![fault]),
        }
    } else {
        let text = text_of(file).map_err(cannot)?;
        match file.extension().is_some_and(|end| end == "json") {
            // Some editors begin every file with a mark.
            true => match serde_json::from_str(text.trim_start_matches('\u{feff}')) {
                Ok(value) => ecosystem::read(&full, &value, profile),
                Err(error) => (Vec::new(), vec![not_json(&full, &text, &error)]),
            },
            false => file::read(&full, &text, profile),
        }
    };
    let paths: Vec<String> =
        keys::all().into_iter().filter(|key| key.is_path).map(|key| key.name).collect();
    apps.iter_mut().for_each(|app| app.settle(&paths));
    // People know the file by the name they gave it.
    faults.iter_mut().for_each(|fault| fault.file = file.to_owned());
    Ok(Loaded { file: full, apps, faults })
}

fn text_of(file: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let most = u64::try_from(file::LONGEST).unwrap_or(u64::MAX);
    std::fs::File::open(file)?.take(most + 1).read_to_string(&mut text)?;
    match text.len() > file::LONGEST {
        true => Err(std::io::Error::other(format!("longer than {} MiB", file::LONGEST >> 20))),
        false => Ok(text),
    }
}

fn not_json(file: &Path, text: &str, error: &serde_json::Error) -> Fault {
    let start: usize =
        text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let at = fault::Mark::of(text, start + error.column().saturating_sub(1));
    let what = error.to_string();
    let what = what.split(" at line ").next().unwrap_or_default();
    let text = format!("not JSON: {what}; comments are for ecosystem.config.js");
    Fault::new(file, Some(at.secret()), text)
}

/// The file of this folder.
pub(crate) fn here() -> Option<PathBuf> {
    FILES.iter().map(PathBuf::from).find(|file| file.is_file())
}

/// The file that is meant where one may be named.
///
/// # Errors
/// When there is none.
pub(crate) fn named_or_here(file: Option<&Path>) -> Result<PathBuf, Verdict> {
    match file.map(Path::to_owned).or_else(here) {
        Some(file) => Ok(file),
        None => {
            let text = format!(
                "no configuration here ({} or {}): `polyfork init` writes one",
                FILES[0], FILES[1]
            );
            Err(Verdict { code: Code::Usage, text })
        }
    }
}

/// Whether a word is the name of a configuration rather than of a program.
fn is_config_name(word: &OsStr) -> bool {
    let path = Path::new(word);
    let Some(name) = path.file_name().and_then(OsStr::to_str) else { return false };
    // As PM2 has it: whatever stands before. No server is called so.
    let pm2 = [".config.js", ".config.cjs", ".config.mjs"].iter().any(|end| name.ends_with(end));
    let ecosystem = name.contains(".config.") && name.starts_with("ecosystem");
    let known =
        pm2 || ecosystem || name.ends_with(".toml") || matches!(name, "process.json" | "pm2.json");
    known && path.is_file()
}

/// One app of a file that is known to have it.
///
/// # Errors
/// What is wrong with the file, or that the app is not in it.
pub(crate) fn one_of(file: &Path, profile: Option<&str>, app: &str) -> Result<Wanted, Verdict> {
    let Loaded { apps, .. } = load(file, profile)?.sound()?;
    let names: Vec<String> = apps.iter().map(|app| app.name.clone()).collect();
    let found = apps.into_iter().find(|wanted| wanted.name == app);
    found.ok_or_else(|| no_such(file, app, &names))
}

fn no_such(file: &Path, app: &str, names: &[String]) -> Verdict {
    let near = keys::nearest(app, names.iter().map(String::as_str));
    let hint = near.map_or_else(
        || format!("it has {}", names.join(", ")),
        |near| format!("did you mean {near}?"),
    );
    let text = format!("{} has no app {}; {hint}", file.display(), words::harmless(app));
    Verdict { code: Code::Usage, text }
}

/// What a command line means.
enum Meant {
    /// A program, in its words.
    Program,
    /// Apps of a file: those named, or all that start by themselves.
    Apps(Loaded, Vec<String>),
}

/// Why there is nothing to run.
pub(crate) fn nothing_to(verb: &str) -> String {
    format!(
        "no program given: `polyfork {verb} PROGRAM`, as in `polyfork {verb} server.js`; or write polyfork.toml (`polyfork init`)"
    )
}

fn meant(args: &RunArgs, verb: &str) -> Result<Meant, Verdict> {
    let profile = args.config.profile.as_deref();
    let text = |word: &OsString| word.to_string_lossy().into_owned();
    let words: Vec<String> = args.command.iter().map(text).collect();
    let by_environment = std::env::var_os("POLYFORK_CONFIG").map(PathBuf::from);
    let named = args.config.config.clone();
    if let Some(file) = named.as_ref().filter(|named| by_environment.as_ref() != Some(named)) {
        return Ok(Meant::Apps(load(file, profile)?.sound()?, words));
    }
    let file = named.or_else(here);
    match (args.command.first(), file) {
        (Some(word), _) if is_config_name(word) => {
            let loaded = load(Path::new(word), profile)?.sound()?;
            Ok(Meant::Apps(loaded, words[1..].to_vec()))
        }
        // A program's name must not run a script of PM2's: only our own file is looked at.
        (Some(_), Some(file)) if file.extension().is_some_and(|end| end == "toml") => {
            let is_file = |word: &String| Path::new(word).exists();
            match load(&file, profile) {
                Ok(loaded)
                    if words.iter().all(|word| {
                        !is_file(word) && loaded.apps.iter().any(|app| app.name == *word)
                    }) =>
                {
                    Ok(Meant::Apps(loaded.sound()?, words))
                }
                _ => Ok(Meant::Program),
            }
        }
        (Some(_), _) => Ok(Meant::Program),
        (None, Some(file)) => Ok(Meant::Apps(load(&file, profile)?.sound()?, Vec::new())),
        (None, None) => Err(Verdict { code: Code::Usage, text: nothing_to(verb) }),
    }
}

impl Loaded {
    /// The apps of these names, or all.
    fn choose(self, names: &[String]) -> Result<Vec<Wanted>, Verdict> {
        let known: Vec<String> = self.apps.iter().map(|app| app.name.clone()).collect();
        if let Some(none) = names.iter().find(|name| !known.contains(name)) {
            return Err(no_such(&self.file, none, &known));
        }
        let is_meant = |app: &Wanted| match names.is_empty() {
            true => app.autostart,
            false => names.contains(&app.name),
        };
        let chosen: Vec<Wanted> = self.apps.into_iter().filter(is_meant).collect();
        match chosen.is_empty() {
            true => {
                let text = format!("{} has no app to start", self.file.display());
                Err(Verdict { code: Code::Usage, text })
            }
            false => Ok(chosen),
        }
    }
}

/// The words of this command line after the verb.
fn own_words() -> Vec<OsString> {
    std::env::args_os().skip(2).collect()
}

/// Those of `all` words after a verb that are options: all before `command`.
fn option_words(all: &[OsString], command: &[OsString]) -> Vec<OsString> {
    let mut words = all[..all.len().saturating_sub(command.len())].to_vec();
    words.pop_if(|last| last == "--");
    words
}

/// What `run` runs: its program, or the one app of a file.
///
/// # Errors
/// When there is none, or several.
pub(crate) fn for_run(args: RunArgs) -> Result<RunArgs, Verdict> {
    let (loaded, names) = match meant(&args, "run")? {
        Meant::Program => return Ok(args),
        Meant::Apps(loaded, names) => (loaded, names),
    };
    let file = loaded.file.clone();
    let mut chosen = loaded.choose(&names)?;
    if chosen.len() > 1 {
        let names: Vec<&str> = chosen.iter().map(|app| app.name.as_str()).collect();
        let text = format!(
            "{} has several apps: `polyfork run {}` runs one of {}, `polyfork start` starts all",
            file.display(),
            names[0],
            names.join(", ")
        );
        return Err(Verdict { code: Code::Usage, text });
    }
    let Some(app) = chosen.pop() else { return Ok(args) };
    let words = option_words(&own_words(), &args.command);
    let profile = args.config.profile.clone();
    Ok(with_live("run", words, &app, profile)?.run)
}

/// What the background's end runs, by the words that it was given.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn for_primary(args: StartArgs, words: &[OsString]) -> Result<StartArgs, Verdict> {
    let config = &args.run.config;
    let (Some(file), Some(app)) = (config.of_config.clone(), config.of_app.clone()) else {
        return match args.run.command.is_empty() {
            true => Err(Verdict { code: Code::Usage, text: nothing_to("start") }),
            false => Ok(args),
        };
    };
    let profile = config.profile.clone();
    let app = one_of(&file, profile.as_deref(), &app)?;
    with_live("primary", option_words(words, &args.run.command), &app, profile)
}

fn with_live(
    verb: &'static str,
    words: Vec<OsString>,
    app: &Wanted,
    profile: Option<String>,
) -> Result<StartArgs, Verdict> {
    let mut args = layered(verb, &words, app)?;
    args.run.config.live = Some(Live::new(verb, app, profile, words));
    Ok(args)
}

/// What `start` starts: each app, with the words for its background's end. `None`: the program of the command line.
///
/// # Errors
/// What is wrong with the file, or with what was named.
pub(crate) fn for_start(args: &StartArgs) -> Result<Option<Vec<Starting>>, Verdict> {
    let (loaded, names) = match meant(&args.run, "start")? {
        Meant::Program => return Ok(None),
        Meant::Apps(loaded, names) => (loaded, names),
    };
    let options = option_words(&own_words(), &args.run.command);
    let chosen = loaded.choose(&names)?;
    let starting = |app: &Wanted| {
        let name = args.run.name.as_ref().unwrap_or(&app.name);
        (Some(words::harmless(name)), start_words(&options, app))
    };
    Ok(Some(chosen.iter().map(starting).collect()))
}

/// What the background's end of an app is told.
pub(crate) fn start_words(options: &[OsString], app: &Wanted) -> Vec<OsString> {
    let mut words = options.to_vec();
    words.extend(["--of-config".into(), app.file.clone().into_os_string()]);
    words.extend(["--of-app".into(), app.name.clone().into()]);
    words
}

/// Reads the options of a command line with an app's own as defaults.
///
/// # Errors
/// When they do not fit together.
pub(crate) fn layered(verb: &str, words: &[OsString], app: &Wanted) -> Result<StartArgs, Verdict> {
    layered_on(&keys::only(verb), verb, words, app)
}

/// The same, with the verb's description at hand: making it is most of the work.
pub(crate) fn layered_on(
    description: &clap::Command,
    verb: &str,
    words: &[OsString],
    app: &Wanted,
) -> Result<StartArgs, Verdict> {
    let listens = std::env::var_os("POLYFORK_LISTEN").is_some_and(|value| !value.is_empty());
    let mut command = description.clone().mut_subcommand(verb, |verb| {
        let known = |key: &str| {
            let is = |arg: &clap::Arg| arg.get_id().as_str() == key;
            !keys::NOT_KEYS.contains(&key) && verb.get_arguments().any(is)
        };
        let mine: Vec<(&String, &Vec<String>)> =
            app.options.iter().filter(|(key, _)| known(key)).collect();
        let verb = verb.mut_arg("name", |arg| arg.default_value(app.name.clone()));
        let mine = mine.into_iter().filter(|(key, _)| !(listens && *key == "listen"));
        mine.fold(verb, |verb, (key, values)| {
            verb.mut_arg(key.as_str(), |arg| arg.default_values(values.clone()))
        })
    });
    let mut line: Vec<OsString> = vec!["polyfork".into(), verb.into()];
    line.extend(words.iter().cloned());
    line.extend(["--".into(), app.program.clone().into()]);
    line.extend(app.args.iter().map(OsString::from));
    let wrong = |error: &clap::Error| Verdict {
        code: Code::Usage,
        text: format!(
            "{}: app {}: {}",
            app.file.display(),
            app.name,
            crate::args::wrong::in_one_line(error)
        ),
    };
    let matches = command.try_get_matches_from_mut(line).map_err(|error| wrong(&error))?;
    let read = Cli::from_arg_matches(&matches).map_err(|error| wrong(&error))?;
    let mut args = match read.verb {
        Verb::Start(args) | Verb::Primary(args) => *args,
        Verb::Run(run) => StartArgs { run: *run, log: LogArgs::default() },
        _ => return Err(Verdict { code: Code::Unexpected, text: format!("{verb} runs nothing") }),
    };
    let variables = app.env.iter().map(|(key, value)| format!("{key}={value}").into());
    args.run.env.splice(0..0, variables);
    Ok(args)
}
