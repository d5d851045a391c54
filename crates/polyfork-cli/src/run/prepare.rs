//! From options to settings: everything that can be found wrong before anything is started.
//!
//! Reads the program's file and the environment, and touches nothing else. Names and folders are taken in `place`, users
//! changed in `identity`, configurations read in `config`.
//!
//! The surprising rule: this is done again at every reload, by the same code, with what the configuration says by then.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;

use polyfork::cluster::{
    Address, Answers, CgroupLimits, DetectError, Detected, Dialect, Limits, Mechanism, Policy,
    Probe, RestartPolicy, Settings,
};

use super::how_many::HowMany;
use super::{Measured, Place, Prepared, Refused, Show, usage};
use crate::args::choices::{CgroupArg, OutputArg};
use crate::args::run::RunArgs;
use crate::args::start::StartArgs;
use crate::config;
use crate::config::live::Live;
use crate::config::renew::Renewal;
use crate::control::book::About;
use crate::exit::Code;
use crate::identity;
use crate::ledger::Verdict;
use crate::manager;
use crate::metrics::server as metrics_server;
use crate::report::{Start, json};
use crate::{values, words};

/// Makes settings of options.
///
/// # Errors
/// What is wrong with them, or with the program.
pub(super) fn prepare(args: RunArgs) -> Result<Prepared, Refused> {
    prepare_with(args, &Answers::default())
}

/// The same for one app of many: `answers` are what runtimes said before.
fn prepare_with(args: RunArgs, answers: &Answers) -> Result<Prepared, Refused> {
    let show = shown(&args)?;
    if let Some(directory) = args.cwd.as_deref() {
        enterable(directory)
            .map_err(|text| usage(format!("--cwd {}: {text}", directory.display())))?;
    }
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(usage(config::nothing_to("run")));
    };
    if args.restart_limit.window == RestartPolicy::NO_WINDOW && args.min_uptime.0.is_none() {
        let limit = &args.restart_limit;
        return Err(usage(format!(
            "--restart-limit {limit}: write how many restarts in how long, as in {limit}/30s, or say with --min-uptime which count"
        )));
    }
    let pairs = pairs(&args.env)?;
    let detected = detected(&args, program, arguments, &pairs, answers)?;
    let HowMany { workers, why: workers_why, notice } = HowMany::of(args.workers);
    let name = name_of(&args);
    let settings = Settings::new(program).args(arguments).workers(workers).name(&name);
    let settings = pairs.iter().fold(settings, |settings, (key, value)| settings.env(key, value));
    let settings = with_addresses(as_asked(settings, &args), &args, detected.dialect)?;
    let about = about(&args, name.clone(), program, &detected);
    let warnings = notice.into_iter().chain(warnings(&detected, &args)).collect();
    let start = Start { name, workers, workers_why, detected, warnings, page: false };
    let measured = Measured { address: metrics(&args)?, programs: !args.no_app_metrics };
    let (renewal, ready) = (Renewal::of(&args), args.ready);
    let place = Place { measured, renewal, ready, ..Place::of(about) };
    Ok(Prepared { settings, start, show, place })
}

fn shown(args: &RunArgs) -> Result<Show, Refused> {
    let show = Show { json: args.show.json, output: args.show.output };
    if show.json && show.output == OutputArg::Inherit {
        let text = "--json and --output inherit exclude each other: workers would write between the JSON lines";
        return Err(usage(text));
    }
    Ok(show)
}

/// What the program is. It is looked up where workers would look it up.
fn detected(
    args: &RunArgs,
    program: &OsStr,
    arguments: &[OsString],
    pairs: &[(OsString, OsString)],
    answers: &Answers,
) -> Result<Detected, Refused> {
    let path = pairs.iter().rev().find(|(key, _)| key == "PATH").map(|(_, path)| path.as_os_str());
    let runtime = args.runtime.as_deref().filter(|name| !name.is_empty());
    let found = answers
        .detect(program, arguments, args.cwd.as_deref(), path, runtime)
        .map_err(|error| not_run(&error))?;
    let dialect = args.dialect.dialect().unwrap_or(found.dialect);
    Ok(Detected { dialect, ..found })
}

/// What options say of workers, whatever the program is.
fn as_asked(settings: Settings, args: &RunArgs) -> Settings {
    let mut settings = settings
        .policy(args.policy.into())
        .mechanism(args.mechanism.into())
        .grace(args.grace)
        .ready(args.ready)
        .ready_timeout(args.ready_timeout.0)
        .watchdog(args.watchdog.0)
        .restart(args.restart())
        .stay_at_rest(args.renew.reload_at.is_some() || !args.renew.watch.is_empty())
        .window(usize::from(args.window))
        .ack_limit(args.ack_limit)
        .max_memory(args.max_memory.map(|bytes| bytes as u64))
        .max_lifetime(args.max_lifetime.0)
        .max_connections(args.max_connections)
        .max_requests(args.max_requests)
        .probe(probe(args))
        .cgroup(cgroup(args))
        .drain_preload(!args.no_drain_preload)
        .stop_by(args.renew.stop_by)
        .instance_var(&args.renew.instance_var)
        .increment_var(args.renew.increment_var.clone())
        .limits(limits(args));
    if let Some(live) = args.config.live.clone() {
        settings = settings.reload_from(move || read_again(&live));
    }
    if let Some(dialect) = args.dialect.dialect() {
        settings = settings.dialect(dialect);
    }
    if let Some(names) = &args.env_allow {
        settings = settings.env_allow(names);
    }
    match &args.cwd {
        Some(directory) => settings.cwd(directory),
        None => settings,
    }
}

/// With the addresses that were named, and the sockets that this process was given.
fn with_addresses(
    settings: Settings,
    args: &RunArgs,
    dialect: Dialect,
) -> Result<Settings, Refused> {
    let mut settings = listen(args)?.into_iter().fold(settings, Settings::listen);
    let given = manager::sockets();
    if dialect == Dialect::Sockets {
        settings = given.iter().copied().map(Address::Inherited).fold(settings, Settings::listen);
    }
    Ok(settings.activated(given))
}

/// What is told of it as long as it runs.
fn about(args: &RunArgs, name: String, program: &OsStr, detected: &Detected) -> About {
    About {
        name,
        program: program.to_string_lossy().into_owned(),
        runtime: json::runtime_word(detected.runtime).to_owned(),
        dialect: detected.dialect.to_string(),
        policy: Policy::from(args.policy).to_string(),
        mechanism: Mechanism::from(args.mechanism).to_string(),
        logs: None,
        metrics: None,
        live: args.config.live.clone(),
    }
}

/// What an app's configuration says by now, for a reload.
pub(super) fn read_again(live: &Live) -> Result<(Settings, Detected), String> {
    let prepared = live.read_again().and_then(prepare).map_err(|refused| refused.text)?;
    Ok((prepared.settings, prepared.start.detected))
}

/// Finds out what would keep an app from being started, as far as that can be known without starting it. It may be one of
/// many: `answers` are what runtimes said before.
///
/// # Errors
/// What would.
pub(crate) fn look_over(args: StartArgs, answers: &Answers) -> Result<(), Refused> {
    no_foreground(&args.run)?;
    identity::look_up(&args.run.identity)?;
    prepare_with(args.run, answers).map(drop)
}

/// What makes sense in the foreground alone.
pub(super) fn no_foreground(run: &RunArgs) -> Result<(), Refused> {
    if run.no_control {
        return Err(usage("--no-control: nobody could stop what is started in the background"));
    }
    if run.show.output == OutputArg::Inherit {
        return Err(usage("--output inherit: in the background there is nothing to inherit"));
    }
    Ok(())
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

pub(super) fn not_run(error: &DetectError) -> Refused {
    let code = if error.is_about_the_runtime() { Code::NoRuntime } else { Code::NoProgram };
    Verdict { code, text: words::harmless(&words::plain(&error.to_string())) }
}
