//! The command line: every option once, with its help, its default, its unit and its environment variable.
//!
//! Only describes and parses; what options mean for a cluster is in `crate::run`. Here are the verbs, and how a command
//! line is read. Options are with their verbs: `run` and `start` bring an app up, `operate` is for apps that run, `tools` leave
//! all apps alone; those of configuration are in `config::args`. `choices` are what several of them can be, `wrong` says why
//! a command line was not taken.
//!
//! The surprising rule: options stand before PROGRAM. The first word that is no option is the program, and all that follows
//! belongs to it, `--` included.

use std::ffi::OsString;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::args::{ApplyArgs, CheckArgs, InitArgs};
use crate::exit;

use operate::{
    AppArgs, EventsArgs, KillArgs, LogsArgs, LsArgs, MetricsArgs, ReloadArgs, ScaleArgs, StopArgs,
    TopArgs, UpgradeArgs, WaitArgs,
};
use run::RunArgs;
use start::StartArgs;
use tools::{AdviseArgs, CompletionsArgs, DemoArgs, ManArgs, ServiceArgs};

pub(crate) mod choices;
pub(crate) mod operate;
pub(crate) mod run;
pub(crate) mod start;
pub(crate) mod tools;
pub(crate) mod wrong;

const ABOUT: &str = "Every core behind one port, from any program.";

const LONG_ABOUT: &str = "\
Every core behind one port, from any program.

polyfork starts a program once per CPU core and gives each process its share of the connections that reach \
one address. Node programs run as they are; programs in Rust can speak to the primary; anything else inherits \
its listening sockets. Processes that end are replaced, and stopping lets them finish.";

const EXAMPLES: &str = "\
Examples:
  polyfork demo                             see it work; needs nothing else
  polyfork run server.js                    one Node worker per core, behind the port it listens on
  polyfork run -w 4 node --inspect app.js   four workers; options of the program follow the program
  polyfork run --listen :8000 -- uvicorn --fd 3 app:app
                                            each worker inherits a socket for port 8000
  polyfork start server.js                  in the background; then ls, status, logs, stop
  polyfork init; polyfork start             apps as polyfork.toml has them; so has ecosystem.config.js

`polyfork run --help` tells all options, signals and exit codes.";

pub(crate) const RUN_EXAMPLES: &str = "\
Examples:
  polyfork run server.js                     as many workers as CPUs may be used
  polyfork run -w max --grace 1m server.js   every CPU; up to a minute to finish when stopping
  polyfork run server.ts --port 3000         --port 3000 goes to the program
  polyfork run --runtime bun server.ts       by Bun instead of Node
  polyfork run --listen unix:/run/app.sock -- gunicorn app:app
  polyfork run --json server.js | jq .       events and output as JSON lines, see docs/events.md

Signals:
  TERM, INT       stop: workers get nothing new, finish what they serve, then polyfork ends
  a second one    end now: workers are killed
  HUP             reload: new workers take over once they are ready; with a terminal: stop
  QUIT            end now
  USR2            put the binary that is there now in the place of this primary, see `polyfork upgrade`
  TTIN, TTOU      one worker more, one worker less; of many at once some may count as one";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "polyfork",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = EXAMPLES,
    disable_help_subcommand = true,
    subcommand_required = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a program on all cores behind one port, in the foreground
    #[command(
        override_usage = "polyfork run [OPTIONS] PROGRAM [ARGS]...\n       polyfork run [OPTIONS] [APP]"
    )]
    Run(Box<RunArgs>),
    /// Run a built-in HTTP server on all cores and show who answers
    Demo(DemoArgs),
    /// Measure cluster, threads, spawn and fork on this machine: which one to take for what
    Advise(AdviseArgs),
    /// Run a program as `run` does, in the background; return when it is ready
    #[command(
        override_usage = "polyfork start [OPTIONS] PROGRAM [ARGS]...\n       polyfork start [OPTIONS] [FILE] [APP]..."
    )]
    Start(Box<StartArgs>),
    /// The background's end of `start`
    #[command(hide = true, override_usage = "polyfork primary [OPTIONS] PROGRAM [ARGS]...")]
    Primary(Box<StartArgs>),
    /// List apps
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Tell all about apps
    Status(AppArgs),
    /// Bring up new workers beside the old ones; they take over if all come up, or nothing changes
    Reload(ReloadArgs),
    /// Replace every worker, slot by slot
    Restart(WaitArgs),
    /// Put another binary of polyfork in the place of a running primary; workers notice nothing
    Upgrade(UpgradeArgs),
    /// The new binary's end of `upgrade`
    #[command(hide = true)]
    UpgradeCheck,
    /// Change the number of workers
    Scale(ScaleArgs),
    /// Let workers finish, then end apps
    Stop(StopArgs),
    /// End apps at once
    Kill(KillArgs),
    /// Show what workers wrote
    Logs(LogsArgs),
    /// Follow what happens, as JSON lines
    Events(EventsArgs),
    /// Look a configuration over: polyfork.toml, or PM2's ecosystem.config.js
    Check(CheckArgs),
    /// Make what runs be what a configuration says: tell what that takes, then do it
    Apply(ApplyArgs),
    /// Write a polyfork.toml that explains itself
    Init(InitArgs),
    /// Show metrics, as Prometheus reads them
    Metrics(MetricsArgs),
    /// Watch apps live: processor, memory, connections, queues; and act on them
    Top(TopArgs),
    /// Look at this machine: what works here, what does not, and what to do about it
    Doctor(FormArgs),
    /// Write a unit file for systemd, or show it
    Service(ServiceArgs),
    /// Write manual pages
    Man(ManArgs),
    /// Write what a shell needs to complete verbs, options and names of apps
    Completions(CompletionsArgs),
    /// Names of apps, for completions
    #[command(hide = true)]
    Names,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct FormArgs {
    /// The answer as JSON, see docs/control.md
    #[arg(long)]
    pub(crate) json: bool,
}

/// Why the command line was not taken.
pub(crate) enum NotRun {
    /// Help or the version was asked for: this is it, for standard output.
    Asked(String),
    /// It is wrong: one line for people.
    Wrong(String),
}

/// The whole description, as help, manual pages and completions show it.
pub(crate) fn whole() -> clap::Command {
    let codes = format!("{RUN_EXAMPLES}\n\n{}", exit::help());
    Cli::command().mut_subcommand("run", |run| run.after_help(codes))
}

/// Reads the command line.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, NotRun> {
    let args: Vec<OsString> = args.into_iter().collect();
    let read = whole().try_get_matches_from(&args);
    read.and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|error| wrong::not_taken(&error, &args))
}

/// Whether a command line that was not understood asks for an answer as JSON, as far as that can be seen: `--json` stands
/// among its words. `run` and `demo` write events, and those tell of no such thing.
pub(crate) fn wants_json(args: impl IntoIterator<Item = OsString>) -> bool {
    let mut args = args.into_iter().skip(1);
    let verb = args.next().unwrap_or_default();
    let answers = !["run", "demo", "primary", "upgrade-check"].iter().any(|other| verb == *other);
    answers && args.take_while(|word| word != "--").any(|word| word == "--json")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn read(words: &[&str]) -> Result<Cli, NotRun> {
        parse(std::iter::once("polyfork").chain(words.iter().copied()).map(OsString::from))
    }

    #[test]
    fn the_description_is_sound() {
        Cli::command().debug_assert();
    }
}
