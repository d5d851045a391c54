//! `polyfork service`: an app as a unit of systemd, printed or installed.
//!
//! The unit runs `polyfork run` in the foreground: systemd is told when it is ready (`Type=notify`), gets signs of life,
//! keeps its output, and reloads it by `polyfork reload`, whose exit code says whether the new version came up. What a line
//! of the unit is for stands behind it in docs/service.md. Where units go and what is asked for is decided here, their
//! text in `unit`.
//!
//! The surprising rule: a file that is there is never written over, not even one of ours: somebody may have changed it.
//!
//! References: systemd.service(5), systemd.socket(5), systemd.exec(5), systemd.unit(5).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::args::run::RunArgs;
use crate::args::tools::{ServiceArgs, ServiceVerb, UnitArgs};
use crate::args::{self, NotRun, Verb};
use crate::background::words_of;
use crate::config;
use crate::control::folder::Runtime;
use crate::control::name::Name;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::{operate, out, words};

mod unit;

use unit::{App, Unit};

/// The version of the JSON form.
const VERSION: u32 = 1;
/// The longest command line that is taken over from an app that runs.
const LONGEST_COMMAND: usize = 128 << 10;

#[derive(Serialize)]
struct Told<'a> {
    version: u32,
    name: &'a str,
    installed: bool,
    units: Vec<ToldUnit<'a>>,
}

#[derive(Serialize)]
struct ToldUnit<'a> {
    path: PathBuf,
    text: &'a str,
}

/// Runs the verb.
pub(crate) fn run(args: ServiceArgs) -> Code {
    let (args, install) = match args.verb {
        ServiceVerb::Print(args) => (args, false),
        ServiceVerb::Install(args) => (args, true),
    };
    match make(&args, install) {
        Ok(()) => Code::Stopped,
        Err(verdict) => operate::fail(&verdict, args.form.json),
    }
}

fn make(args: &UnitArgs, install: bool) -> Result<(), Verdict> {
    let app = app(args)?;
    let units = unit::of(&app);
    let folder = folder(args)?;
    if install {
        write_all(&folder, &units)?;
    }
    if args.form.json {
        let told =
            units.iter().map(|unit| ToldUnit { path: folder.join(&unit.file), text: &unit.text });
        let name = app.name.as_str();
        out::json(&Told { version: VERSION, name, installed: install, units: told.collect() });
    } else if install {
        crate::say(io::stderr(), &installed(args, &folder, &units));
    } else {
        for unit in &units {
            let head = format!("# {}\n", folder.join(&unit.file).display());
            if !out::write(format!("{head}{}", unit.text).as_bytes()) {
                break;
            }
        }
    }
    Ok(())
}

fn installed(args: &UnitArgs, folder: &Path, units: &[Unit]) -> String {
    let manager = if args.user_unit { "systemctl --user" } else { "systemctl" };
    let wrote =
        units.iter().map(|unit| format!("polyfork: wrote {}\n", folder.join(&unit.file).display()));
    let names: Vec<&str> = units.iter().map(|unit| unit.file.as_str()).collect();
    let names = names.join(" ");
    wrote.collect::<String>()
        + &format!("polyfork: next: {manager} daemon-reload && {manager} enable --now {names}\n")
}

fn refused(text: impl Into<String>) -> Verdict {
    Verdict { code: Code::Refused, text: text.into() }
}

fn usage(text: impl Into<String>) -> Verdict {
    Verdict { code: Code::Usage, text: text.into() }
}

/// Writes all or none.
fn write_all(folder: &Path, units: &[Unit]) -> Result<(), Verdict> {
    let told = |path: &Path, error: &io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => refused(format!(
            "{} is there already and is not written over; remove it first, or compare with `polyfork service print`",
            path.display()
        )),
        _ => refused(format!(
            "cannot write {}: {}",
            path.display(),
            words::plain(&error.to_string())
        )),
    };
    fs::create_dir_all(folder).map_err(|error| told(folder, &error))?;
    let mut written: Vec<PathBuf> = Vec::new();
    for unit in units {
        let path = folder.join(&unit.file);
        let outcome = write_new(&path, unit);
        if let Err(error) = outcome {
            if error.kind() != io::ErrorKind::AlreadyExists {
                written.push(path.clone());
            }
            // As far as they are ours.
            written.iter().for_each(|path| drop(fs::remove_file(path)));
            return Err(told(&path, &error));
        }
        written.push(path);
    }
    Ok(())
}

fn write_new(path: &Path, unit: &Unit) -> io::Result<()> {
    let mode = if unit.secret { 0o600 } else { 0o644 };
    // Exclusive: neither a file nor a link, to wherever, is followed.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(unit.text.as_bytes())?;
    file.sync_all()
}

/// Where systemd looks.
fn folder(args: &UnitArgs) -> Result<PathBuf, Verdict> {
    if let Some(dir) = &args.dir {
        return std::path::absolute(dir)
            .map_err(|error| usage(format!("--dir: {}", words::plain(&error.to_string()))));
    }
    if !args.user_unit {
        return Ok("/etc/systemd/system".into());
    }
    let variable =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")));
    let config =
        config.ok_or_else(|| usage("--user-unit: HOME is not set; --dir names the folder"))?;
    Ok(config.join("systemd/user"))
}

/// What a unit is made from.
struct Source {
    words: Vec<OsString>,
    directory: PathBuf,
    secret: bool,
    /// Options that were given as variables.
    variables: Vec<(OsString, OsString)>,
}

/// The variables of an environment that stand for options of `run`. The name is the unit's own.
fn options_of(
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let whole = args::whole();
    let known: Vec<&OsStr> = whole
        .find_subcommand("run")
        .into_iter()
        .flat_map(|run| run.get_arguments().filter_map(clap::Arg::get_env))
        .filter(|name| *name != "POLYFORK_NAME")
        .collect();
    let mut found: Vec<_> =
        environment.filter(|(name, _)| known.contains(&name.as_os_str())).collect();
    found.sort();
    found
}

/// The app that is meant: one that runs, or one that the words describe.
fn app(args: &UnitArgs) -> Result<App, Verdict> {
    let after_dashes = std::env::args_os().any(|word| word == "--");
    let Source { words, directory, secret, variables } = match (&args.command[..], after_dashes) {
        ([name], false) => of_running(&name.to_string_lossy())?,
        (words, true) => Source {
            words: words.to_vec(),
            directory: here()?,
            secret: false,
            variables: options_of(std::env::vars_os()),
        },
        _ => {
            return Err(usage(
                "give the NAME of an app that runs, or -- and then what follows `polyfork run`",
            ));
        }
    };
    let run = read_run(&words)?;
    let (words, run) = by_config(without_name(words, &run), run)?;
    let name = match &run.name {
        Some(name) => crate::run::place::named(name)?,
        None => Name::like(&crate::run::prepare::name_of(&run)),
    };
    let program = std::env::current_exe()
        .map_err(|error| refused(format!("cannot find this program's own file: {error}")))?;
    Ok(App {
        secret: secret || !run.env.is_empty(),
        name,
        program,
        words,
        directory,
        user_unit: args.user_unit,
        sockets: args.socket.clone(),
        watchdog: args.watchdog_sec.0,
        grace: run.grace,
        ready_timeout: run.ready_timeout.0,
        changes_user: run.identity.user.is_some(),
        path: std::env::var_os("PATH"),
        variables,
        runtime: std::env::var_os("POLYFORK_RUNTIME_DIR").filter(|path| !path.is_empty()),
    })
}

fn here() -> Result<PathBuf, Verdict> {
    std::env::current_dir().map_err(|error| refused(format!("where are we? {error}")))
}

/// The options as `run` reads them.
fn read_run(words: &[OsString]) -> Result<RunArgs, Verdict> {
    let whole = ["polyfork", "run"].into_iter().map(OsString::from).chain(words.iter().cloned());
    match args::parse(whole) {
        Ok(args::Cli { verb: Verb::Run(run) }) => Ok(*run),
        Ok(_) => Err(usage("that is nothing to run")),
        Err(NotRun::Asked(_)) => Err(usage("give a program, as for `polyfork run`")),
        Err(NotRun::Wrong(text)) => Err(usage(text)),
    }
}

/// An app that a configuration describes, in the words that `run` has for it, and with what the file says.
fn by_config(words: Vec<OsString>, run: RunArgs) -> Result<(Vec<OsString>, RunArgs), Verdict> {
    let (Some(file), Some(app)) = (&run.config.of_config, &run.config.of_app) else {
        return Ok((words, run));
    };
    let mut options = Vec::new();
    let mut rest = words.into_iter();
    while let Some(word) = rest.next() {
        match word == "--of-config" || word == "--of-app" {
            true => drop(rest.next()),
            false => options.push(word),
        }
    }
    let wanted = config::one_of(file, run.config.profile.as_deref(), app)?;
    let described = config::layered("run", &options, &wanted)?.run;
    let mut words = vec!["--config".into(), file.into()];
    words.extend(options);
    words.push(app.into());
    Ok((words, described))
}

/// The unit says the name itself.
fn without_name(words: Vec<OsString>, run: &RunArgs) -> Vec<OsString> {
    let own = words.len() - run.command.len().min(words.len());
    let mut kept = Vec::new();
    let mut options = words.into_iter().enumerate();
    while let Some((at, word)) = options.next() {
        let text = word.to_string_lossy();
        if at < own && text == "--name" {
            options.next();
        } else if at >= own || !text.starts_with("--name=") {
            kept.push(word);
        }
    }
    kept
}

/// What an app that runs was started with: the words of its primary, and its folder.
fn of_running(name: &str) -> Result<Source, Verdict> {
    let nobody = || Verdict {
        code: Code::NoSuchApp,
        text: format!(
            "no app is named {}; for a program, put -- in front of it",
            words::harmless(name)
        ),
    };
    let name = Name::read(name).map_err(|_| nobody())?;
    let runtime = Runtime::find()?.ok_or_else(nobody)?;
    let app =
        runtime.app(&name).filter(crate::control::folder::App::is_alive).ok_or_else(nobody)?;
    let broken = |what: String| refused(format!("{name}: {}", words::plain(&what)));
    // Of its socket, not of its card, which could name a stranger.
    let stream = app.socket_path().and_then(std::os::unix::net::UnixStream::connect);
    let stream = stream.map_err(|error| broken(error.to_string()))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|e| broken(e.to_string()))?;
    let folder = PathBuf::from(format!("/proc/{}", peer.pid.as_raw_nonzero()));
    let directory = fs::read_link(folder.join("cwd")).map_err(|e| broken(e.to_string()))?;
    let (words, background) = words_of_running(&folder).map_err(broken)?;
    let environment = fs::read(folder.join("environ")).map_err(|e| broken(e.to_string()))?;
    let pairs = environment.split(|byte| *byte == 0).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&pair[..at]), text(&pair[at + 1..])))
    });
    Ok(Source {
        words: if background { without_logs(words)? } else { words },
        directory,
        secret: true,
        variables: options_of(pairs),
    })
}

/// What a primary was given to run, and whether it is in the background.
fn words_of_running(folder: &Path) -> Result<(Vec<OsString>, bool), String> {
    let mut words = words_of(&content(&folder.join("cmdline"))?).into_iter().skip(1);
    match words.next() {
        // It has them as its standard input.
        Some(verb) if verb == "primary" => Ok((words_of(&content(&folder.join("fd/0"))?), true)),
        Some(verb) if verb == "run" => Ok((words.collect(), false)),
        _ => Err("it was not started by `start` or `run`".to_owned()),
    }
}

fn content(path: &Path) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    let file = fs::File::open(path);
    let read =
        file.and_then(|file| file.take(LONGEST_COMMAND as u64 + 1).read_to_end(&mut content));
    read.map_err(|error| error.to_string())?;
    match content.len() > LONGEST_COMMAND {
        true => Err("its command line is too long".to_owned()),
        false => Ok(content),
    }
}

/// Options that only `start` has: under systemd the journal keeps what is written. The program's own words stay.
fn without_logs(words: Vec<OsString>) -> Result<Vec<OsString>, Verdict> {
    const LOGS: [&str; 5] = ["--log-dir", "--log-size", "--log-age", "--log-keep", "--log-format"];
    let whole = ["polyfork", "start"].into_iter().map(OsString::from).chain(words.iter().cloned());
    let own = match args::parse(whole) {
        Ok(args::Cli { verb: Verb::Start(start) }) => {
            words.len().saturating_sub(start.run.command.len())
        }
        _ => return Err(refused("its command line is not understood by this version")),
    };
    let mut kept = Vec::new();
    let mut words = words.into_iter().enumerate();
    while let Some((at, word)) = words.next() {
        let text = word.to_string_lossy();
        let of_logs = LOGS.iter().find(|log| at < own && text.starts_with(**log));
        match of_logs {
            // Its value is a word of its own.
            Some(log) if text.len() == log.len() => drop(words.next()),
            Some(_) => {}
            None if at < own && text == "--json" => {}
            None => kept.push(word),
        }
    }
    Ok(kept)
}
