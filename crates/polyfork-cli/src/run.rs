//! `polyfork run`: the way from options to a cluster, and from a cluster to lines and an exit code.
//!
//! Decides nothing about workers; it is one user of `polyfork::cluster`. Rendering is in `report`, writing in `sink`.
//!
//! The surprising rule: three things go on side by side on one thread, and none waits for another: events become lines
//! (never waiting), worker output becomes lines (waiting for the reader), signals are obeyed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork::cluster::upgrade::{ResumeError, Unpacking};
use polyfork::cluster::{
    Address, CgroupLimits, Cluster, DetectError, Detected, Dialect, Event, Limits, Output,
    OutputLine, Probe, Settings, StartError, default_workers, detect_with, usable_cpus,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::args::choices::{CgroupArg, OutputArg};
use crate::args::run::RunArgs;
use crate::args::start::{LogArgs, LogFormatArg, StartArgs};
use crate::background::{self, Starter};
use crate::clock;
use crate::config;
use crate::config::live::Live;
use crate::config::renew::Renewal;
use crate::control::book::{About, Book};
use crate::control::folder::{Card, Claim, Ended, NotClaimed, Runtime};
use crate::control::name::Name;
use crate::control::server::{Control, Rested, Wish};
use crate::exit::Code;
use crate::identity::{self, Wants};
use crate::ledger::{Ledger, Verdict};
use crate::logs::folder as log_folder;
use crate::logs::line::{Format, Source};
use crate::logs::writer::{Rotation, Writer};
use crate::manager::{self, Manager};
use crate::metrics::Meter;
use crate::metrics::server::{self as metrics_server, Door, Serving};
use crate::report::human::{self, Human};
use crate::report::json::{self, Json};
use crate::report::{Report, Start};
use crate::sink::{Sink, Target};
use crate::style::Paint;
use crate::upgrade::state::{AppState, BackgroundState};
use crate::upgrade::{self, Left};
use crate::values::{self, Workers};
use crate::words;

mod replacing;

/// Lines of worker output between the primary and the writer; each is 64 KiB at most.
const LINES: usize = 16;
/// After so long without an event a primary gives memory back.
const REST_AFTER: Duration = Duration::from_secs(1);
/// At the end, a reader of worker output that takes nothing for this long is taken for stuck.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Before a slot's last lines are shown, how long they may still come.
const LAST_LINES: Duration = Duration::from_millis(50);
const LAST_LINES_STEP: Duration = Duration::from_millis(5);

/// Why nothing was started.
pub(crate) type Refused = Verdict;

/// Everything that is needed to start, made from options.
pub(crate) struct Prepared {
    pub(crate) settings: Settings,
    pub(crate) start: Start,
    pub(crate) show: Show,
    pub(crate) place: Place,
}

impl Prepared {
    /// Another binary may take the place of this one.
    fn replaceable(mut self) -> Prepared {
        self.place.binary = Some(upgrade::own_binary());
        self
    }
}

/// Where an app is found, and where it writes to.
#[derive(Default)]
pub(crate) struct Place {
    /// The file of this binary, if another one may take its place.
    binary: Option<PathBuf>,
    /// Its name, as long as it runs.
    claim: Option<Claim>,
    about: About,
    background: Option<Background>,
    /// When it reloads by itself.
    renewal: Renewal,
    measured: Measured,
}

/// What of it is measured, and where that is served.
#[derive(Debug, Default)]
struct Measured {
    address: Option<Address>,
    programs: bool,
}

/// What an app in the background has instead of a terminal.
struct Background {
    starter: Starter,
    logs: Writer,
}

/// What is shown of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Show {
    pub(crate) json: bool,
    pub(crate) output: OutputArg,
}

/// Runs a program until it ends.
pub(crate) fn run(args: RunArgs) -> Code {
    if let Some(left) = upgrade::left() {
        return go_on(left);
    }
    let json = args.show.json;
    let args = match config::for_run(args) {
        Ok(args) => args,
        Err(refused) => return refuse(&refused, json),
    };
    let prepared = prepare_run(args).map(Prepared::replaceable);
    match prepared.and_then(|prepared| supervise(prepared, |_| |_: &Event| ())) {
        Ok(code) => code,
        Err(refused) => refuse(&refused, json),
    }
}

fn prepare_run(args: RunArgs) -> Result<Prepared, Refused> {
    let explicit = args.name.is_some();
    let controlled = !args.no_control;
    let name = name_of(&args);
    let wants = Wants { name: &name, explicit, controlled, logs: None };
    let settled = identity::settle(&args, &wants)?;
    let prepared = prepare(args)?;
    match settled.and_then(|settled| settled.claim) {
        _ if !controlled => Ok(prepared),
        Some(claim) => Ok(with_claim(prepared, claim)),
        None => with_control(prepared, explicit),
    }
}

/// Runs a program in the background, as `polyfork start` began it.
pub(crate) fn run_in_background(args: StartArgs) -> Code {
    if let Some(left) = upgrade::left() {
        return go_on(left);
    }
    let mut starter = match Starter::take() {
        Ok(starter) => starter,
        Err(error) => {
            let text = words::plain(&format!("cannot leave the foreground: {error}"));
            return refuse(&Verdict { code: Code::Unexpected, text }, false);
        }
    };
    match config::for_primary(args).and_then(prepare_background) {
        Ok((mut prepared, logs)) => {
            prepared.start.warnings.iter().for_each(|text| starter.warning(text));
            prepared.place.background = Some(Background { starter, logs });
            supervise(prepared.replaceable(), |_| |_: &Event| ())
                .unwrap_or_else(|refused| refused.code)
        }
        Err(refused) => {
            starter.refused(&refused);
            refused.code
        }
    }
}

/// Tells why nothing was started: a line on standard error, and a JSON line where those are wanted.
pub(crate) fn refuse(refused: &Refused, json: bool) -> Code {
    if json {
        crate::say(io::stdout(), &json::refused(refused));
    }
    crate::say(io::stderr(), &format!("polyfork: {}\n", refused.text));
    refused.code
}

fn usage(text: impl Into<String>) -> Refused {
    Verdict { code: Code::Usage, text: text.into() }
}

fn prepare(args: RunArgs) -> Result<Prepared, Refused> {
    let show = Show { json: args.show.json, output: args.show.output };
    if show.json && show.output == OutputArg::Inherit {
        let text = "--json and --output inherit exclude each other: workers would write between the JSON lines";
        return Err(usage(text));
    }
    if let Some(directory) = args.cwd.as_deref() {
        enterable(directory)
            .map_err(|text| usage(format!("--cwd {}: {text}", directory.display())))?;
    }
    if args.command.is_empty() {
        return Err(usage(config::nothing_to("run")));
    }
    let mut words = args.command.iter();
    let program = words.next().cloned().unwrap_or_default();
    let arguments: Vec<OsString> = words.cloned().collect();
    let pairs = pairs(&args.env)?;
    let path = pairs.iter().rev().find(|(key, _)| key == "PATH").map(|(_, path)| path.as_os_str());
    let runtime = args.runtime.as_deref().filter(|name| !name.is_empty());
    let mut detected = detect_with(&program, &arguments, args.cwd.as_deref(), path, runtime)
        .map_err(|error| not_run(&error))?;
    if let Some(dialect) = args.dialect.dialect() {
        detected.dialect = dialect;
    }
    let HowMany { workers, why: workers_why, notice } = workers(args.workers);
    let mut settings = Settings::new(&program)
        .args(&arguments)
        .workers(workers)
        .policy(args.policy.into())
        .mechanism(args.mechanism.into())
        .grace(args.grace)
        .ready(args.ready)
        .ready_timeout(args.ready_timeout.0)
        .watchdog(args.watchdog.0)
        .restart(args.restart_limit.clone())
        .window(usize::from(args.window))
        .ack_limit(args.ack_limit)
        .max_memory(args.max_memory.map(|bytes| bytes as u64))
        .max_lifetime(args.max_lifetime.0)
        .max_connections(args.max_connections)
        .max_requests(args.max_requests)
        .probe(probe(&args))
        .cgroup(cgroup(&args))
        .drain_preload(!args.no_drain_preload)
        .stop_by(args.renew.stop_by)
        .instance_var(&args.renew.instance_var)
        .increment_var(args.renew.increment_var.clone())
        .limits(limits(&args));
    if let Some(live) = args.config.live.clone() {
        settings = settings.reload_from(move || read_again(&live));
    }
    if let Some(dialect) = args.dialect.dialect() {
        settings = settings.dialect(dialect);
    }
    settings = pairs.into_iter().fold(settings, |settings, (key, value)| settings.env(key, value));
    if let Some(names) = &args.env_allow {
        settings = settings.env_allow(names);
    }
    settings = listen(&args)?.into_iter().fold(settings, Settings::listen);
    let given = manager::sockets();
    if detected.dialect == Dialect::Sockets {
        settings = given.iter().copied().map(Address::Inherited).fold(settings, Settings::listen);
    }
    settings = settings.activated(given);
    if let Some(directory) = &args.cwd {
        settings = settings.cwd(directory);
    }
    let name = name_of(&args);
    settings = settings.name(&name);
    let warnings = notice.into_iter().chain(warnings(&detected, &args)).collect();
    let about = About {
        name: name.clone(),
        program: words::harmless(&program.to_string_lossy()),
        runtime: json::runtime_word(detected.runtime).to_owned(),
        dialect: detected.dialect.to_string(),
        policy: polyfork::cluster::Policy::from(args.policy).to_string(),
        mechanism: polyfork::cluster::Mechanism::from(args.mechanism).to_string(),
        logs: None,
        metrics: None,
        live: args.config.live.clone(),
    };
    let start = Start { name, workers, workers_why, detected, warnings, page: false };
    let measured = Measured { address: metrics(&args)?, programs: !args.no_app_metrics };
    let place = Place { measured, renewal: Renewal::of(&args), ..Place::of(about) };
    Ok(Prepared { settings, start, show, place })
}

/// What an app's configuration says by now, for a reload.
fn read_again(live: &Live) -> Result<(Settings, Detected), String> {
    let prepared = live.read_again().and_then(prepare).map_err(|refused| refused.text)?;
    Ok((prepared.settings, prepared.start.detected))
}

/// Finds out what would keep an app from being started, as far as that can be known without starting it.
///
/// # Errors
/// What would.
pub(crate) fn look_over(args: StartArgs) -> Result<(), Refused> {
    no_foreground(&args.run)?;
    prepare(args.run).map(drop)
}

/// Takes the app's name, so that commands find it. An app in the foreground is worth more than its control socket: without
/// a folder for it, it goes on without; and a name that nobody chose gets a number if it is taken.
pub(crate) fn with_control(prepared: Prepared, explicit: bool) -> Result<Prepared, Refused> {
    let claim = claim_a_name(&prepared.start.name, explicit)?;
    Ok(with_claim(prepared, claim))
}

fn with_claim(mut prepared: Prepared, claim: Result<Claim, String>) -> Prepared {
    match claim {
        Ok(claim) => with_name(prepared, claim),
        Err(why) => {
            prepared.start.warnings.push(why);
            prepared
        }
    }
}

/// Claims a name for an app in the foreground, or says why it has to go without.
pub(crate) fn claim_a_name(wanted: &str, explicit: bool) -> Result<Result<Claim, String>, Refused> {
    let name = match explicit {
        true => named(wanted)?,
        false => Name::like(wanted),
    };
    let without = |refused: &Verdict| {
        Ok(Err(format!("{}; no command can reach this one (--no-control says so)", refused.text)))
    };
    let mut runtime = match Runtime::make() {
        Ok(runtime) => runtime,
        Err(refused) => return without(&refused),
    };
    let mut number = 1;
    let mut wanted = name.clone();
    loop {
        match runtime.claim(&wanted) {
            Ok(claim) => return Ok(Ok(claim)),
            Err((_, NotClaimed::Unusable(refused))) => return without(&refused),
            Err((_, NotClaimed::Taken)) if explicit => return Err(taken(&wanted)),
            Err((back, NotClaimed::Taken)) => {
                runtime = back;
                number += 1;
                wanted = name.numbered(number);
            }
        }
    }
}

pub(crate) fn named(name: &str) -> Result<Name, Refused> {
    Name::read(name).map_err(|error| usage(format!("--name {}: {error}", words::harmless(name))))
}

pub(crate) fn taken(name: &Name) -> Refused {
    let text = format!(
        "an app named {name} runs already: `polyfork status {name}` shows it, `polyfork stop {name}` ends it, \
         --name gives this one another name"
    );
    Verdict { code: Code::AlreadyRunning, text }
}

/// Everything is called what the claim says.
fn with_name(mut prepared: Prepared, claim: Claim) -> Prepared {
    let name = claim.name().to_string();
    prepared.settings = prepared.settings.name(&name);
    prepared.place.about.name.clone_from(&name);
    prepared.start.name = name;
    prepared.place.claim = Some(claim);
    prepared
}

/// Claims a name for an app in the background, which has to be had.
pub(crate) fn claim_in_background(wanted: &str, explicit: bool) -> Result<Claim, Refused> {
    let name = match explicit {
        true => named(wanted)?,
        false => Name::like(wanted),
    };
    Runtime::make()?.claim(&name).map_err(|(_, error)| match error {
        NotClaimed::Taken => taken(&name),
        NotClaimed::Unusable(refused) => refused,
    })
}

fn prepare_background(args: StartArgs) -> Result<(Prepared, Writer), Refused> {
    let StartArgs { run, log } = args;
    no_foreground(&run)?;
    let explicit = run.name.is_some();
    let name = name_of(&run);
    let given = Some(log.log_dir.as_deref());
    let wants = Wants { name: &name, explicit, controlled: true, logs: given };
    let settled = identity::settle(&run, &wants)?.unwrap_or_default();
    let prepared =
        prepare(RunArgs { show: crate::args::run::ShowArgs { json: false, ..run.show }, ..run })?;
    let claim = match settled.claim {
        Some(Ok(claim)) => claim,
        _ => claim_in_background(&prepared.start.name, explicit)?,
    };
    let mut prepared = with_name(prepared, claim);
    let logs = logs(&log, settled.logs, &mut prepared.place.about)?;
    Ok((prepared, logs))
}

/// What makes sense in the foreground alone.
fn no_foreground(run: &RunArgs) -> Result<(), Refused> {
    if run.no_control {
        return Err(usage("--no-control: nobody could stop what is started in the background"));
    }
    if run.show.output == OutputArg::Inherit {
        return Err(usage("--output inherit: in the background there is nothing to inherit"));
    }
    Ok(())
}

/// `made`: the folder, if it had to be made before.
fn logs(
    args: &LogArgs,
    made: Option<log_folder::Folder>,
    about: &mut About,
) -> Result<Writer, Refused> {
    let folder = match made {
        Some(folder) => folder,
        None => {
            let root = log_folder::root(args.log_dir.as_deref())?;
            log_folder::Folder::make(&root, &named(&about.name)?)?
        }
    };
    about.logs = Some(folder.path.to_string_lossy().into_owned());
    if let Ok(folder) = folder.again() {
        background::write_panics_to(folder);
    }
    let (format, rotation) = how_to_log(args);
    Writer::start(folder, format, rotation).map_err(|error| Verdict {
        code: Code::Unexpected,
        text: words::plain(&format!("cannot start to write logs: {error}")),
    })
}

fn how_to_log(args: &LogArgs) -> (Format, Rotation) {
    let format = match args.log_format {
        LogFormatArg::Text => Format::Text,
        LogFormatArg::Json => Format::Json,
    };
    let rotation = Rotation {
        size: u64::try_from(args.log_size).unwrap_or(u64::MAX),
        age: args.log_age.0,
        keep: usize::from(args.log_keep),
    };
    (format, rotation)
}

/// What it is called: as was asked for, or after its program.
pub(crate) fn name_of(args: &RunArgs) -> String {
    let program = args.command.first().cloned().unwrap_or_default();
    args.name.clone().unwrap_or_else(|| display_name(&program, args.cwd.as_deref()))
}

fn probe(args: &RunArgs) -> Option<Probe> {
    let probe = args.probe.clone()?;
    let probe = probe.interval(args.probe_interval).timeout(args.probe_timeout);
    Some(probe.failures(args.probe_failures))
}

fn cgroup(args: &RunArgs) -> Option<CgroupLimits> {
    let memory = args.cgroup_memory.map(|bytes| bytes as u64);
    let optional = args.cgroup == CgroupArg::Auto;
    let any = memory.is_some() || args.cgroup_cpu.is_some();
    any.then_some(CgroupLimits { memory, cpus: args.cgroup_cpu, optional })
}

/// Where metrics are served: not where other machines can read them, unless that is asked for.
fn metrics(args: &RunArgs) -> Result<Option<Address>, Refused> {
    let Some(address) = &args.metrics else {
        return match args.metrics_on_network {
            true => Err(usage("--metrics-on-network: say where, with --metrics ADDRESS")),
            false => Ok(None),
        };
    };
    match address {
        Address::Tcp(at) if !args.metrics_on_network && !metrics_server::is_loopback(*at) => {
            Err(usage(format!(
                "--metrics {address}: other machines could read it; give a loopback address, as in \
                 127.0.0.1:{}, or allow it with --metrics-on-network",
                at.port()
            )))
        }
        address => Ok(Some(address.clone())),
    }
}

fn limits(args: &RunArgs) -> Limits {
    Limits {
        max_message: args.max_message,
        max_depth: usize::try_from(args.max_depth).unwrap_or(usize::MAX),
        ..Limits::default()
    }
}

fn pairs(texts: &[OsString]) -> Result<Vec<(OsString, OsString)>, Refused> {
    let one = |text: &OsString| {
        values::pair(text.clone())
            .map_err(|error| usage(format!("--env {}: {error}", text.display())))
    };
    texts.iter().map(one).collect()
}

/// Why a directory cannot be that of workers.
fn enterable(directory: &Path) -> Result<(), String> {
    // Looking at the directory itself needs no permission on it; looking at what is in it does.
    let look = |directory: &Path| std::fs::metadata(directory.join("."));
    let told = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => "no such directory".to_owned(),
        io::ErrorKind::NotADirectory => "not a directory".to_owned(),
        io::ErrorKind::PermissionDenied => {
            let whole = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
            let denied = |step: &&Path| {
                look(step).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
            };
            let outermost = whole.ancestors().filter(denied).last().unwrap_or(directory);
            format!(
                "permission denied on {}: run as a user who may enter it, or chmod +x it",
                outermost.display()
            )
        }
        _ => words::plain(&error.to_string()),
    };
    look(directory).map(drop).map_err(told)
}

/// The addresses of `--listen`, or those of `POLYFORK_LISTEN`.
fn listen(args: &RunArgs) -> Result<Vec<Address>, Refused> {
    let (source, addresses) = if args.listen.is_empty() {
        let named = std::env::var("POLYFORK_LISTEN").unwrap_or_default();
        let read = |text: &str| {
            values::address(text)
                .map_err(|error| usage(format!("POLYFORK_LISTEN: {text:?}: {error}")))
        };
        ("POLYFORK_LISTEN", named.split_whitespace().map(read).collect::<Result<Vec<_>, _>>()?)
    } else {
        ("--listen", args.listen.clone())
    };
    // Port 0 is another port each time.
    let fixed = |address: &&Address| words::port(address) != Some(0);
    let mut seen = BTreeSet::new();
    match addresses.iter().filter(fixed).find(|address| !seen.insert(*address)) {
        Some(twice) => Err(usage(format!("{source}: {twice} is named twice; once is enough"))),
        None => Ok(addresses),
    }
}

/// How many workers, and why that many.
pub(crate) struct HowMany {
    pub(crate) workers: u32,
    pub(crate) why: String,
    /// A wish that was not followed.
    pub(crate) notice: Option<String>,
}

/// How many workers are wanted.
pub(crate) fn workers(wanted: Option<Workers>) -> HowMany {
    match wanted {
        Some(Workers::Exactly(workers)) => {
            HowMany { workers, why: "as asked".to_owned(), notice: None }
        }
        Some(Workers::Max) => {
            let cpus = usable_cpus();
            HowMany { workers: cpus.workers, why: cpus.explanation, notice: None }
        }
        None => {
            let found = default_workers();
            let workers = found.workers.min(values::MOST_WORKERS);
            let set = std::env::var_os("WEB_CONCURRENCY").filter(|value| !value.is_empty());
            let notice = set.and_then(|set| not_followed(&set, workers));
            HowMany { workers, why: found.explanation, notice }
        }
    }
}

/// Tells that `WEB_CONCURRENCY` is not what was started.
fn not_followed(set: &OsStr, workers: u32) -> Option<String> {
    let most = values::MOST_WORKERS;
    let text = set.to_string_lossy();
    let number = text.trim();
    if number.parse() == Ok(workers) {
        return None;
    }
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let why = match is_number && number.bytes().any(|byte| byte != b'0') {
        true => format!("more than {most}"),
        false => format!("not a number from 1 to {most}"),
    };
    Some(format!("WEB_CONCURRENCY={} is {why}: {workers} used instead", words::harmless(&text)))
}

/// `server` for `server.js`, the directory's name for `.`.
fn display_name(program: &OsStr, cwd: Option<&Path>) -> String {
    let path = cwd.unwrap_or(Path::new("")).join(program);
    let path = std::path::absolute(&path).unwrap_or(path);
    let name = path.file_stem().or_else(|| path.file_name()).unwrap_or(program);
    words::harmless(&name.to_string_lossy())
}

fn warnings(detected: &Detected, args: &RunArgs) -> Vec<String> {
    let sockets = detected.dialect == Dialect::Sockets;
    let mut warnings: Vec<String> = detected.warning.clone().into_iter().collect();
    let named = std::env::var_os("POLYFORK_LISTEN").is_some_and(|value| !value.is_empty());
    if sockets && args.listen.is_empty() && !named && manager::sockets().is_empty() {
        warnings.push(
            "no --listen: workers of the sockets dialect inherit nothing and must share the port by themselves"
                .into(),
        );
    }
    warnings
}

fn not_run(error: &DetectError) -> Refused {
    let code = if error.is_about_the_runtime() { Code::NoRuntime } else { Code::NoProgram };
    Verdict { code, text: words::harmless(&words::plain(&error.to_string())) }
}

fn not_started(error: &StartError) -> Refused {
    match error {
        StartError::Program(error) => not_run(error),
        StartError::Bind { address, error } => {
            Verdict { code: words::bind_code(error), text: words::bind_failed(address, error) }
        }
        StartError::Settings(text) => usage(text.clone()),
        other => Verdict { code: Code::Unexpected, text: words::plain(&other.to_string()) },
    }
}

/// Starts the cluster and stays with it to the end. `observer` makes, with the cluster at hand, what sees every event
/// before it is shown.
///
/// # Errors
/// Why nothing was started.
pub(crate) fn supervise<F: FnMut(&Event)>(
    prepared: Prepared,
    observer: impl FnOnce(&Cluster) -> F,
) -> Result<Code, Refused> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Verdict {
        code: Code::Unexpected,
        text: words::plain(&format!("cannot make a runtime: {error}; are too many files open?")),
    })?;
    let code = runtime.block_on(async {
        let Prepared { settings, mut start, show, mut place } = prepared;
        let door = place.open_metrics()?;
        let (settings, lines) = with_output(settings, show.output);
        // Whoever runs `start` is no manager of what stays behind.
        let settings = match place.background {
            Some(_) => settings,
            None => manager::with_store(settings),
        };
        let started = Cluster::start_detected(settings, start.detected.clone());
        let cluster = match started {
            Ok(cluster) => cluster,
            Err(error) => return Err(place.refuse(not_started(&error))),
        };
        let control = place.open(&cluster, &mut start)?;
        let (manager, warning) = match place.background {
            Some(_) => (Manager::default(), None),
            None => Manager::take(),
        };
        start.warnings.extend(warning);
        let serving = door
            .zip(control.as_ref())
            .map(|(door, (control, _))| metrics_server::serve(door, control));
        let serving = match serving.transpose() {
            Ok(serving) => serving,
            Err(error) => {
                let text = words::plain(&format!("cannot serve metrics: {error}"));
                return Err(place.refuse(Verdict { code: Code::Unexpected, text }));
            }
        };
        let around = Around { control, serving, manager };
        let mut watch = Watch::new(start.workers, show, place, around, Ledger::default());
        let first = watch.report.get_mut().start(&start);
        first.iter().for_each(|line| watch.own(line));
        drop((first, start));
        Ok(watch.run(&cluster, lines, observer(&cluster)).await.code)
    });
    // Whatever is left of the cluster ends with the process.
    runtime.shutdown_background();
    code
}

fn with_output(
    settings: Settings,
    output: OutputArg,
) -> (Settings, Option<mpsc::Receiver<OutputLine>>) {
    let (output, lines) = what_becomes_of(output);
    (settings.output(output), lines)
}

/// What becomes of what workers write, and where we read it.
fn what_becomes_of(output: OutputArg) -> (Output, Option<mpsc::Receiver<OutputLine>>) {
    if output == OutputArg::Inherit {
        return (Output::Inherit, None);
    }
    // Also when nothing is shown: the last lines explain a slot that is given up.
    let (sender, lines) = mpsc::channel(LINES);
    (Output::Lines(sender), Some(lines))
}

/// Goes on with an app that another image of this process has left.
fn go_on(left: Left) -> Code {
    let adopted = left.open().and_then(|state| {
        let unpacking = Unpacking::adopt(&state.descriptors)?;
        Ok((state, unpacking))
    });
    let (state, unpacking) = match adopted {
        Ok(adopted) => adopted,
        Err(error) => return left.go_back(&error),
    };
    // What is executed by its descriptor is called after its number.
    let _ = rustix::thread::set_name(c"polyfork");
    if state.keeps_rights {
        upgrade::rights_are_ours_alone();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(ResumeError::from).and_then(|runtime| {
        let code = runtime.block_on(go_on_with(state, unpacking, left.back));
        runtime.shutdown_background();
        code
    });
    outcome.unwrap_or_else(|error| {
        // Everything was found to fit before; this is a machine without memory or descriptors. Workers finish and leave.
        crate::say(io::stderr(), &format!("polyfork: cannot go on: {error}\n"));
        Code::Unexpected
    })
}

async fn go_on_with(
    state: AppState,
    mut left: Unpacking,
    back: Option<String>,
) -> Result<Code, ResumeError> {
    let unpacking = &mut left;
    let show = state.show;
    let (output, lines) = what_becomes_of(show.output);
    let live = state.live.map(Live::back);
    let source = live.clone();
    let store = state.manager.as_ref().and_then(|_| manager::store());
    let anew = |settings: Settings| {
        let settings = match store {
            Some(store) => settings.store(store),
            None => settings,
        };
        match source {
            Some(live) => settings.output(output).reload_from(move || read_again(&live)),
            None => settings.output(output),
        }
    };
    let cluster = Cluster::resume(&state.cluster, unpacking, anew)?;
    let claim = state.claim.map(|claim| Claim::unpack(claim, unpacking)).transpose()?;
    let background = match state.background {
        Some(background) => {
            let BackgroundState { starter, logs, logs_path, format, rotation, lost } = background;
            let starter = Starter::unpack(starter, unpacking)?;
            let folder = log_folder::Folder::of(unpacking.take(logs)?, logs_path);
            background::write_panics_to(folder.again()?);
            let logs = Writer::go_on(folder, format, rotation, lost)?;
            Some(Background { starter, logs })
        }
        None => None,
    };
    let losses = background.as_ref().map(|background| Arc::clone(&background.logs.losses));
    let (mut control, mut asker) = (None, None);
    if let Some(state) = state.control {
        let file = claim.as_ref().map(Claim::state_file).transpose()?;
        let known = (losses, live.clone());
        let (there, wishes, waits) = Control::unpack(state, unpacking, file, &cluster, known)?;
        (control, asker) = (Some((there, wishes)), waits);
    }
    let serving = match (state.metrics, &control) {
        (Some(door), Some((control, _))) => {
            Some(metrics_server::serve(Door::unpack(door, unpacking)?, control)?)
        }
        _ => None,
    };
    // What it shares would stay open with it: connections that their workers have had and closed.
    drop(left);
    let around = Around { control, serving, manager: Manager::back(state.manager) };
    // The binary that asked for this one is what runs, when that one gave everything back.
    let own = if back.is_some() { upgrade::own_binary() } else { state.binary };
    let place = Place {
        binary: Some(own),
        claim,
        about: About { live, ..state.about },
        background,
        renewal: Renewal::at(state.times, state.change_seen),
        measured: Measured::default(),
    };
    let mut watch = Watch::new(state.workers, show, place, around, state.ledger);
    watch.told_lost = Cell::new(state.told_lost);
    watch.after = RefCell::new(Some(After {
        from: state.polyfork,
        began: state.began.0,
        rested: state.rests.0,
        trial: state.trial,
        descriptors: state.descriptors.len(),
        asker,
        back,
    }));
    Ok(watch.run(&cluster, lines, |_: &Event| ()).await.code)
}

impl Place {
    /// An app that is not reached by a name yet.
    pub(crate) fn of(about: About) -> Place {
        Place { about, ..Place::default() }
    }

    /// Tells whoever waits in the foreground.
    fn refuse(&mut self, refused: Refused) -> Refused {
        // The name is free when they are told.
        self.claim = None;
        if let Some(background) = &mut self.background {
            background.starter.refused(&refused);
        }
        refused
    }

    /// Opens the place where metrics are served, before anything is started.
    fn open_metrics(&mut self) -> Result<Option<metrics_server::Door>, Refused> {
        let Some(address) = &self.measured.address else { return Ok(None) };
        match metrics_server::open(address) {
            Ok(door) => {
                self.about.metrics = Some(door.place.clone());
                Ok(Some(door))
            }
            Err(error) => {
                let text = format!("--metrics: {}", words::bind_failed(address, &error));
                Err(self.refuse(Verdict { code: words::bind_code(&error), text }))
            }
        }
    }

    /// Opens the control socket. In the background it has to be had; in the foreground it is gone without.
    fn open(
        &mut self,
        cluster: &Cluster,
        start: &mut Start,
    ) -> Result<Option<Controlled>, Refused> {
        let meter = Meter::new(self.measured.programs);
        let Some(claim) = &self.claim else {
            // Nobody can reach it; it may be measured all the same.
            let book = || Book::new(self.about.clone(), start.workers, None);
            let measured = self.measured.address.is_some();
            return Ok(measured.then(|| Control::quiet(cluster, book(), meter)));
        };
        let card = card(&self.about, clock::now(), None);
        let opened =
            claim.write_card(&card).and_then(|()| Ok((claim.listen()?, claim.state_file()?)));
        let losses = self.background.as_ref().map(|background| Arc::clone(&background.logs.losses));
        let book = Book::new(self.about.clone(), start.workers, losses);
        match opened.and_then(|(socket, state)| Control::start(socket, state, cluster, book, meter))
        {
            Ok(controlled) => Ok(Some(controlled)),
            Err(error) => {
                let text =
                    format!("cannot open the control socket of {}: {error}", self.about.name);
                let refused = Verdict { code: Code::NoFolder, text: words::plain(&text) };
                if self.background.is_some() {
                    return Err(self.refuse(refused));
                }
                start.warnings.push(format!("{}; no command can reach this one", refused.text));
                self.claim = None;
                Ok(None)
            }
        }
    }
}

fn card(about: &About, started: String, ended: Option<Ended>) -> Card {
    Card {
        version: 1,
        pid: std::process::id(),
        started,
        program: about.program.clone(),
        logs: about.logs.as_ref().map(Into::into),
        ended,
    }
}

/// The control socket, and the wishes for another binary that come by it.
type Controlled = (Control, mpsc::Receiver<Wish>);

/// What surrounds a cluster: who asks, who measures, who manages.
struct Around {
    control: Option<Controlled>,
    serving: Option<Serving>,
    manager: Manager,
}

/// What is to be told once this image runs in the place of another.
struct After {
    /// The release before.
    from: String,
    began: Instant,
    rested: Instant,
    trial: u32,
    descriptors: usize,
    asker: Option<Rested>,
    /// The new binary gave everything back, for this reason.
    back: Option<String>,
}

/// The next event. When none comes for a while, what the last ones needed is not needed until something happens.
async fn next_or_rest(events: &mut polyfork::cluster::Events) -> Option<Event> {
    match tokio::time::timeout(REST_AFTER, events.next()).await {
        Ok(event) => event,
        Err(_nothing) => {
            polyfork::process::give_back_code();
            events.next().await
        }
    }
}

/// A cluster being watched.
struct Watch {
    report: RefCell<Report>,
    ledger: RefCell<Ledger>,
    out: Option<Sink>,
    err: Option<Sink>,
    show: Show,
    /// In the background: where lines go instead.
    logs: Option<Writer>,
    starter: RefCell<Starter>,
    control: Option<Control>,
    wishes: RefCell<Option<mpsc::Receiver<Wish>>>,
    claim: RefCell<Option<Claim>>,
    serving: Option<Serving>,
    manager: Manager,
    renewal: Renewal,
    about: About,
    workers: u32,
    binary: Option<PathBuf>,
    after: RefCell<Option<After>>,
    /// Lines of workers dealt with so far.
    passed_on: Cell<u64>,
    /// An event, or a line of a worker, is being dealt with.
    telling: Cell<bool>,
    passing: Cell<bool>,
    /// It was told that standard output loses lines.
    told_lost: Cell<bool>,
}

impl Watch {
    fn new(workers: u32, show: Show, place: Place, around: Around, ledger: Ledger) -> Watch {
        let Place { binary, claim, about, background, renewal, measured: _ } = place;
        let Around { control, serving, manager } = around;
        let report = if show.json {
            Report::Json(Json)
        } else {
            Report::Human(Human::new(workers, Paint::stdout(), Paint::stderr()))
        };
        let tell_dropped = if show.json { json::dropped } else { human::dropped };
        // A thread only for a stream that will be written to.
        let prefix = show.output == OutputArg::Prefix;
        let foreground = background.is_none();
        let out =
            (foreground && (show.json || prefix)).then(|| Sink::new(Target::Stdout, tell_dropped));
        let err = (foreground && !show.json).then(|| Sink::new(Target::Stderr, tell_dropped));
        let (starter, logs) = match background {
            Some(Background { starter, logs }) => (starter, Some(logs)),
            None => (Starter::default(), None),
        };
        let (control, wishes) = control.unzip();
        Watch {
            report: RefCell::new(report),
            ledger: RefCell::new(match show.output {
                OutputArg::Inherit => Ledger::deaf(),
                _ => ledger,
            }),
            out,
            err,
            show,
            logs,
            starter: RefCell::new(starter),
            control,
            wishes: RefCell::new(wishes),
            claim: RefCell::new(claim),
            serving,
            manager,
            renewal,
            about,
            workers,
            binary,
            after: RefCell::default(),
            passed_on: Cell::new(0),
            telling: Cell::new(false),
            passing: Cell::new(false),
            told_lost: Cell::new(false),
        }
    }

    /// Stays with the cluster to its end, and tells it.
    async fn run(
        &self,
        cluster: &Cluster,
        lines: Option<mpsc::Receiver<OutputLine>>,
        observer: impl FnMut(&Event),
    ) -> Verdict {
        let verdict = self.to_the_end(cluster, lines, observer).await;
        if let Some(claim) = self.claim.borrow_mut().take() {
            self.take_leave(claim, &self.about, &verdict);
        }
        self.starter.borrow_mut().end(&verdict);
        verdict
    }

    fn sink(&self, target: Target) -> Option<&Sink> {
        match target {
            Target::Stdout => self.out.as_ref(),
            Target::Stderr => self.err.as_ref(),
        }
    }

    /// Writes a line of the primary.
    fn own(&self, line: &str) {
        if let Some(logs) = &self.logs {
            return logs.own(line.trim_end_matches('\n').as_bytes());
        }
        let target = self.report.borrow().target();
        if let Some(sink) = self.sink(target) {
            sink.own(line.as_bytes());
        }
    }

    async fn to_the_end(
        &self,
        cluster: &Cluster,
        lines: Option<mpsc::Receiver<OutputLine>>,
        observer: impl FnMut(&Event),
    ) -> Verdict {
        let output = self.pass_on(lines);
        let told = async { tokio::join!(self.tell(cluster, observer), cluster.obey_signals()) };
        let (replacing, renewed) = (self.replacing(cluster), self.renew(cluster));
        tokio::pin!(output, told, replacing, renewed);
        let mut output_ended = false;
        loop {
            tokio::select! {
                // First of all signals are obeyed; who reads a line may send one.
                biased;
                _ = &mut told => break,
                () = &mut output, if !output_ended => output_ended = true,
                () = &mut replacing => {}
                () = &mut renewed => {}
                error = self.lost(), if !self.told_lost.get() => self.tell_lost(error),
                () = self.manager.stay_alive(cluster) => {}
            }
        }
        if !output_ended {
            self.last_output(output).await;
        }
        let outcome = cluster.wait().await;
        let verdict = self.ledger.borrow().verdict(&outcome);
        let last = self.report.borrow_mut().end(&verdict);
        self.own(&last);
        // A reader that is stuck has been waited for.
        let finish = |sink: &Option<Sink>| sink.as_ref().is_none_or(Sink::finish);
        let _complete = finish(&self.out);
        if let (false, Some(error)) = (self.told_lost.get(), self.out.as_ref().and_then(Sink::loss))
        {
            self.tell_lost(error);
        }
        let _complete = finish(&self.err);
        let _complete = self.logs.as_ref().is_none_or(Writer::finish);
        if let Some(control) = &self.control {
            control.finish(&verdict, &json::Json.end(&verdict)).await;
        }
        verdict
    }

    /// Gives the name back. An app that ended in the background by itself leaves word, since nobody saw it.
    fn take_leave(&self, claim: Claim, about: &About, verdict: &Verdict) {
        let as_asked = matches!(verdict.code, Code::Stopped | Code::Forced);
        if as_asked || self.logs.is_none() || self.starter.borrow().waits() {
            return drop(claim);
        }
        let ended = Ended {
            time: clock::now(),
            outcome: verdict.code.row().word.to_owned(),
            exit_code: verdict.code as u8,
            text: verdict.text.clone(),
        };
        // An app that ends in the background had a control socket.
        let started = self.control.as_ref().map(|control| control.book().started());
        claim.leave(&card(about, started.unwrap_or_else(clock::now), Some(ended)));
    }

    /// Waits until standard output takes lines no more.
    async fn lost(&self) -> Errno {
        match &self.out {
            Some(out) => out.lost().await,
            None => std::future::pending().await,
        }
    }

    /// Tells that lines are missing from standard output, once: that is where nobody can see it.
    fn tell_lost(&self, error: Errno) {
        self.told_lost.set(true);
        let what = words::plain(&io::Error::from(error).to_string());
        let line = format!(
            "polyfork: cannot write to standard output: {what}; what does not fit there is lost\n"
        );
        match &self.err {
            Some(sink) => sink.own(line.as_bytes()),
            None => crate::say(io::stderr(), &line),
        }
    }

    /// Waits for output that workers left behind, as long as it comes.
    async fn last_output(&self, mut output: Pin<&mut impl Future<Output = ()>>) {
        loop {
            let before = self.passed_on.get();
            let ended = tokio::time::timeout(LAST_OUTPUT, output.as_mut()).await.is_ok();
            if ended || self.passed_on.get() == before {
                return;
            }
        }
    }

    /// Reloads when files change or it is time to, for ever.
    async fn renew(&self, cluster: &Cluster) {
        let say = |text: &str| {
            let text = words::harmless(text);
            let line = match self.show.json {
                true => json::warning(&text),
                false => format!("polyfork: {text}\n"),
            };
            self.own(&line);
        };
        self.renewal.run(cluster, self.about.logs.as_deref().map(Path::new), say).await;
    }

    /// Turns events into lines until the last one.
    async fn tell(&self, cluster: &Cluster, mut observer: impl FnMut(&Event)) {
        let mut events = cluster.events();
        while let Some(event) = next_or_rest(&mut events).await {
            self.telling.set(true);
            match event {
                Event::SlotFailed { .. } | Event::ReloadFailed { .. } => {
                    self.last_lines(LAST_LINES).await;
                }
                Event::Exit { voluntary: false, .. } => self.last_lines(LAST_LINES_STEP).await,
                _ => {}
            }
            observer(&event);
            self.manager.event(&event);
            if let (Event::Reloaded(_), Some(live)) = (&event, &self.about.live) {
                live.commit(&self.renewal);
            }
            self.ledger.borrow_mut().event(&event);
            if let Some(control) = &self.control {
                control.event(&event, &self.ledger.borrow());
                if self.logs.is_some() {
                    let starter = &mut *self.starter.borrow_mut();
                    control.tell(starter, &event, &self.ledger.borrow());
                }
            }
            let lines = self.report.borrow_mut().event(&event, &self.ledger.borrow());
            lines.iter().for_each(|line| self.own(line));
            if let Event::End(_) = event {
                return;
            }
            self.telling.set(false);
        }
    }

    /// Lets lines that explain an end come before it is told: for `most` at most, and only while they come.
    async fn last_lines(&self, most: Duration) {
        let mut left = most;
        loop {
            let before = self.passed_on.get();
            tokio::time::sleep(LAST_LINES_STEP).await;
            left = left.saturating_sub(LAST_LINES_STEP);
            if left.is_zero() || self.passed_on.get() == before {
                return;
            }
        }
    }

    /// Turns worker output into lines until no worker can write any more.
    async fn pass_on(&self, lines: Option<mpsc::Receiver<OutputLine>>) {
        let Some(mut lines) = lines else { return };
        while let Some(line) = lines.recv().await {
            self.passing.set(true);
            self.ledger.borrow_mut().line(&line);
            if let (Some(logs), OutputArg::Prefix) = (&self.logs, self.show.output) {
                let source = Source::of(line.worker, line.stream);
                logs.line(line.slot, source, &line.line, line.complete).await;
            } else if self.show.output == OutputArg::Prefix {
                let (target, bytes) = self.report.borrow_mut().output(&line);
                if let Some(sink) = self.sink(target) {
                    sink.line(&bytes).await;
                }
            }
            self.passed_on.set(self.passed_on.get() + 1);
            self.passing.set(!lines.is_empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_for_more_workers_than_there_can_be_is_answered() {
        let told = |set: &str, workers| not_followed(OsStr::new(set), workers);
        assert_eq!(told(" 3 ", 3), None);
        assert!(told("100000", 4096).unwrap().contains("more than 4096: 4096 used instead"));
        assert!(told("99999999999", 2).unwrap().contains("more than 4096: 2 used instead"));
        assert!(told("a\x1b", 2).unwrap().contains("\\u{1b} is not a number"));
    }
}
