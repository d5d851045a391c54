//! The command line: every option once, with its help, its default, its unit and its environment variable.
//!
//! Only describes and parses; what options mean for a cluster is in `run`. Options stand before PROGRAM: the
//! first word that is no option is the program, and all that follows belongs to it, `--` included.
//!
//! The text of an error is made one line here, with what to do next: clap's own takes a screen.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::builder::Resettable;
use clap::error::{ContextKind, ErrorKind};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use polyfork::cluster::{Address, Dialect, Mechanism, Policy, Probe, Ready, RestartPolicy};

use crate::config::args::{ApplyArgs, CheckArgs, ConfigArgs, InitArgs, RenewArgs};
use crate::control::name;
use crate::control::protocol::Scale;
use crate::exit;
use crate::style::Paint;
use crate::values::{self, Lines, Workers};
use crate::words;

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
    UpgradeCheck(UpgradeCheckArgs),
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

/// `polyfork service`.
#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    /// What to do
    #[command(subcommand)]
    pub(crate) verb: ServiceVerb,
}

/// What to do with a unit file.
#[derive(Debug, Subcommand)]
pub(crate) enum ServiceVerb {
    /// Show the unit file
    #[command(
        override_usage = "polyfork service print [OPTIONS] NAME\n       polyfork service print [OPTIONS] -- [RUN OPTIONS] PROGRAM [ARGS]..."
    )]
    Print(UnitArgs),
    /// Write the unit file to where systemd looks for it
    #[command(
        override_usage = "polyfork service install [OPTIONS] NAME\n       polyfork service install [OPTIONS] -- [RUN OPTIONS] PROGRAM [ARGS]..."
    )]
    Install(UnitArgs),
}

/// `polyfork service print`, `polyfork service install`.
#[derive(Debug, Args)]
pub(crate) struct UnitArgs {
    /// The name of an app that runs, to have what it was started with; or, with --, the options of `run` and a program
    #[arg(value_names = ["NAME"], required = true, num_args = 1.., trailing_var_arg = true)]
    pub(crate) command: Vec<OsString>,

    /// For the service manager of this user instead of that of the system
    #[arg(long)]
    pub(crate) user_unit: bool,

    /// An address that systemd listens on and passes on: a .socket unit besides; repeatable
    #[arg(long, value_name = "ADDRESS", value_parser = values::address)]
    pub(crate) socket: Vec<Address>,

    /// The program of the unit must give a sign of life this often; none for no watchdog
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = limit, allow_hyphen_values = true)]
    pub(crate) watchdog_sec: Limit,

    /// Folder to write to, instead of where systemd looks
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// `polyfork man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for each verb into this folder, instead of the one of `polyfork` to standard output
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// `polyfork completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// `polyfork advise`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct AdviseArgs {
    /// The figures as JSON, see docs/advise.md
    #[arg(long)]
    pub(crate) json: bool,

    /// Shorter measurements: about a second in all, and less to be relied upon
    #[arg(long)]
    pub(crate) quick: bool,
}

/// `polyfork start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,

    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// Where and how what workers write is kept.
#[derive(Debug, Clone, Args)]
pub(crate) struct LogArgs {
    /// Folder of all logs; an app has a folder of its name in it
    ///
    /// Default: polyfork in XDG_STATE_HOME, or ~/.local/state/polyfork, or /var/log/polyfork for root.
    #[arg(
        long,
        value_name = "DIR",
        env = "POLYFORK_LOG_DIR",
        hide_env_values = true,
        help_heading = "Logs"
    )]
    pub(crate) log_dir: Option<PathBuf>,

    /// Begin a new file when one has this size
    #[arg(long, value_name = "SIZE", default_value = "10MiB", value_parser = values::size,
          env = "POLYFORK_LOG_SIZE", allow_hyphen_values = true, hide_env_values = true, help_heading = "Logs")]
    pub(crate) log_size: usize,

    /// Begin a new file when one is this old; none for never
    #[arg(long, value_name = "DURATION", default_value = "1d", value_parser = limit,
          env = "POLYFORK_LOG_AGE", allow_hyphen_values = true, hide_env_values = true, help_heading = "Logs")]
    pub(crate) log_age: Limit,

    /// Old files that are kept for each slot, compressed
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(0..=10_000),
          env = "POLYFORK_LOG_KEEP", allow_hyphen_values = true, hide_env_values = true, help_heading = "Logs")]
    pub(crate) log_keep: u16,

    /// How lines are written
    #[arg(
        long,
        value_enum,
        default_value = "text",
        env = "POLYFORK_LOG_FORMAT",
        hide_env_values = true,
        help_heading = "Logs"
    )]
    pub(crate) log_format: LogFormatArg,
}

impl Default for LogArgs {
    /// For verbs that write no logs.
    fn default() -> LogArgs {
        LogArgs {
            log_dir: None,
            log_size: 10 << 20,
            log_age: Limit(None),
            log_keep: 0,
            log_format: LogFormatArg::Text,
        }
    }
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormatArg {
    /// time, worker and stream in front of each line
    Text,
    /// a JSON object a line
    Json,
}

/// `polyfork ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Names or patterns (*, ?); all if none is given
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// Verbs that only name apps.
#[derive(Debug, Args)]
pub(crate) struct AppArgs {
    /// Names or patterns (*, ?)
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// How an answer is written.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct FormArgs {
    /// The answer as JSON, see docs/control.md
    #[arg(long)]
    pub(crate) json: bool,
}

/// `polyfork restart`.
#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    #[command(flatten)]
    pub(crate) apps: AppArgs,

    /// Return when it has begun, not when it is done
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// `polyfork reload`.
#[derive(Debug, Args)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    pub(crate) wait: WaitArgs,

    /// Replace so many workers at a time instead of all at once
    ///
    /// Fewer processes beside each other; but what an earlier batch has replaced stays replaced when a later one fails.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) at_a_time: Option<u32>,

    /// How long new workers must stay ready before they get connections
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = values::duration,
          allow_hyphen_values = true)]
    pub(crate) probation: Duration,
}

/// `polyfork upgrade`.
#[derive(Debug, Args)]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    pub(crate) wait: WaitArgs,

    /// The new binary [default: the one that this command is]
    #[arg(long, value_name = "PATH")]
    pub(crate) binary: Option<PathBuf>,

    /// How long the new binary may take to show that it can take over
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::duration,
          allow_hyphen_values = true)]
    pub(crate) limit: Duration,
}

/// `polyfork upgrade-check`.
#[derive(Debug, Args)]
pub(crate) struct UpgradeCheckArgs {
    /// What the primary was started with
    #[arg(value_name = "ARGS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) words: Vec<OsString>,
}

/// `polyfork scale`.
#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    /// Name or pattern (*, ?)
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// How many workers; with + or - in front, how many more or less
    #[arg(value_name = "N|+N|-N", value_parser = values::scale, allow_hyphen_values = true)]
    pub(crate) workers: Scale,

    #[command(flatten)]
    pub(crate) form: FormArgs,

    /// Return when it has begun, not when it is done
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// `polyfork stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Names or patterns (*, ?)
    #[arg(value_name = "NAME", required_unless_present = "all")]
    pub(crate) names: Vec<String>,

    /// Every app
    #[arg(long, conflicts_with = "names")]
    pub(crate) all: bool,

    /// How long workers may finish, instead of what `start` or `run` said; if it stops already, from now on
    #[arg(long, value_name = "DURATION", value_parser = values::duration, allow_hyphen_values = true)]
    pub(crate) grace: Option<Duration>,

    /// Return when it has begun, not when it is done
    #[arg(long)]
    pub(crate) no_wait: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// `polyfork kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Names or patterns (*, ?)
    #[arg(value_name = "NAME", required_unless_present = "all")]
    pub(crate) names: Vec<String>,

    /// Every app
    #[arg(long, conflicts_with = "names")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// `polyfork logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Names or patterns (*, ?)
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,

    /// Go on with what is written from now on
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// The last N lines, or all
    #[arg(short = 'n', long, value_name = "N|all", default_value = "20", value_parser = values::lines,
          allow_hyphen_values = true)]
    pub(crate) lines: Lines,

    /// Only what was written since: 10m ago, or at 2026-11-23T06:56:56Z
    #[arg(long, value_name = "DURATION|TIME", value_parser = values::since, allow_hyphen_values = true)]
    pub(crate) since: Option<SystemTime>,

    /// Only lines that contain this text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) grep: Option<String>,

    /// Only what this slot wrote; 0 is the primary
    #[arg(long, value_name = "N")]
    pub(crate) slot: Option<u32>,

    /// Folder of all logs, for apps that run no more
    #[arg(long, value_name = "DIR", env = "POLYFORK_LOG_DIR", hide_env_values = true)]
    pub(crate) log_dir: Option<PathBuf>,

    /// Lines as JSON objects, see docs/control.md
    #[arg(long)]
    pub(crate) json: bool,
}

/// `polyfork events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// Accepted, and what happens anyway
    #[arg(long, hide = true)]
    pub(crate) json: bool,
}

/// `polyfork metrics`.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// Families and samples as JSON, see docs/metrics.md
    #[arg(long)]
    pub(crate) json: bool,
}

/// `polyfork top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Names or patterns (*, ?); all if none is given
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,

    /// Between two looks
    #[arg(long, value_name = "DURATION", value_parser = values::interval, allow_hyphen_values = true)]
    pub(crate) interval: Option<Duration>,

    /// Tables as text, once, or again and again with --interval; this is so, too, where there is no terminal
    #[arg(long)]
    pub(crate) plain: bool,

    /// The figures as JSON, one object a line for each look
    #[arg(long)]
    pub(crate) json: bool,
}

/// `polyfork run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The program and its arguments
    ///
    /// PROGRAM is an executable, looked up in PATH if it has no slash, or a file that a runtime runs: a
    /// JavaScript or TypeScript module, a Python script, a script with #!, a directory with a package.json.
    #[arg(value_names = ["PROGRAM", "ARGS"], num_args = 1.., trailing_var_arg = true)]
    pub(crate) command: Vec<OsString>,

    /// How many workers: a number, or max for every CPU that may be used
    ///
    /// Default: WEB_CONCURRENCY if set, else the CPUs this process may really use: its affinity, capped by the
    /// CPU quota of its cgroup.
    #[arg(short, long, value_name = "N|max", value_parser = values::workers, env = "POLYFORK_WORKERS",
          hide_env_values = true, help_heading = "Workers", allow_hyphen_values = true)]
    pub(crate) workers: Option<Workers>,

    /// What runs a JavaScript or TypeScript module: a name in PATH or a path [default: node]
    #[arg(
        long,
        value_name = "NAME|PATH",
        env = "POLYFORK_RUNTIME",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    pub(crate) runtime: Option<OsString>,

    /// How workers are spoken to
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        env = "POLYFORK_DIALECT",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    pub(crate) dialect: DialectArg,

    /// Set a variable in the environment of workers; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = clap::builder::OsStringValueParser::new(),
          help_heading = "Workers")]
    pub(crate) env: Vec<OsString>,

    /// Give workers only these variables of this environment, separated by commas; a name may end in *; repeatable
    ///
    /// What --env sets and what tells a worker its place comes besides. Most programs need PATH and HOME.
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        env = "POLYFORK_ENV_ALLOW",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    pub(crate) env_allow: Option<Vec<OsString>>,

    #[command(flatten)]
    pub(crate) identity: IdentityArgs,

    /// Working directory of workers; a relative PROGRAM is looked up there
    #[arg(
        long,
        value_name = "DIR",
        env = "POLYFORK_CWD",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    pub(crate) cwd: Option<PathBuf>,

    /// A name for people and commands [default: the program's file name]
    #[arg(
        long,
        value_name = "NAME",
        env = "POLYFORK_NAME",
        hide_env_values = true,
        help_heading = "Workers"
    )]
    pub(crate) name: Option<String>,

    /// Which worker gets the next connection
    #[arg(
        long,
        value_enum,
        default_value = "round-robin",
        env = "POLYFORK_POLICY",
        hide_env_values = true,
        help_heading = "Connections"
    )]
    pub(crate) policy: PolicyArg,

    /// Who carries the policy out
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        env = "POLYFORK_MECHANISM",
        hide_env_values = true,
        help_heading = "Connections"
    )]
    pub(crate) mechanism: MechanismArg,

    /// An address that workers inherit as descriptor 3, 4, ...; repeatable
    ///
    /// HOST:PORT (an IP address, IPv6 in brackets, or localhost, which is 127.0.0.1), :PORT or PORT (all addresses),
    /// unix:PATH or unix:@ABSTRACT. Bound before the first worker starts and told by LISTEN_FDS. For workers of the sockets dialect; Node and native workers say themselves
    /// where they listen. POLYFORK_LISTEN takes several, separated by spaces.
    #[arg(long, value_name = "ADDRESS", value_parser = values::address, help_heading = "Connections")]
    pub(crate) listen: Vec<Address>,

    /// Hand-off: unacknowledged connections per worker, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64),
          env = "POLYFORK_WINDOW", allow_hyphen_values = true, hide_env_values = true, help_heading = "Connections")]
    pub(crate) window: u16,

    /// Give connections to other workers when they were not taken for this long
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = values::duration,
          env = "POLYFORK_ACK_LIMIT", allow_hyphen_values = true, hide_env_values = true, help_heading = "Connections")]
    pub(crate) ack_limit: Duration,

    /// When a worker counts as ready and gets connections
    ///
    /// auto: what fits the dialect. listening: when it listens. message: when it sends the message 'ready'.
    /// notify: when it writes READY=1 to NOTIFY_SOCKET. probe: when it has answered --probe. delay=1s: when it has lived that long.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = ready, env = "POLYFORK_READY",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) ready: Ready,

    /// Replace a worker that is not ready after this long; none for no limit
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = limit,
          env = "POLYFORK_READY_TIMEOUT", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) ready_timeout: Limit,

    /// Replace a worker that gives no sign of life for this long, as one whose event loop is blocked
    ///
    /// Node workers and those built on the polyfork crate give them by themselves, four in this time; others are told
    /// it as WATCHDOG_USEC and send WATCHDOG=1, as under systemd. See docs/health.md. none: no watchdog.
    #[arg(long, value_name = "DURATION", default_value = "none", value_parser = limit,
          env = "POLYFORK_WATCHDOG", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) watchdog: Limit,

    /// Ask each worker now and then over a connection of its own, and replace one that does not answer
    ///
    /// http://HOST:PORT/path or /path: it is to answer 2xx or 3xx. tcp: it is to take connections. The port chooses among
    /// several addresses. With --ready auto a worker is ready once it has answered. See docs/health.md.
    #[arg(long, value_name = "PROBE", value_parser = probe, env = "POLYFORK_PROBE",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) probe: Option<Probe>,

    /// How long from one probe to the next
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::duration, env = "POLYFORK_PROBE_INTERVAL",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) probe_interval: Duration,

    /// How long a worker may take to answer a probe
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = values::duration, env = "POLYFORK_PROBE_TIMEOUT",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) probe_timeout: Duration,

    /// Replace a worker after so many failed probes in a row
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..), env = "POLYFORK_PROBE_FAILURES",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) probe_failures: u32,

    /// How long a worker may finish what it serves when it is asked to stop
    ///
    /// Then it gets TERM, and two seconds later KILL.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration,
          env = "POLYFORK_GRACE", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) grace: Duration,

    /// Give a slot up after N restarts within a time; the others go on serving
    #[arg(long, value_name = "N/DURATION", default_value = "5/30s", value_parser = restart_policy,
          env = "POLYFORK_RESTART_LIMIT", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) restart_limit: RestartPolicy,

    /// Replace a worker that uses more memory than this, once its successor is ready
    #[arg(long, value_name = "SIZE", value_parser = values::size, env = "POLYFORK_MAX_MEMORY",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) max_memory: Option<usize>,

    /// Replace a worker that has lived this long (up to a tenth longer, so that not all go at once)
    #[arg(long, value_name = "DURATION", default_value = "none", value_parser = limit,
          env = "POLYFORK_MAX_LIFETIME", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) max_lifetime: Limit,

    /// Replace a worker that was given so many connections (up to a tenth more)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), env = "POLYFORK_MAX_CONNECTIONS",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) max_connections: Option<u64>,

    /// Replace a Node worker that was asked so many HTTP requests (up to a tenth more)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000), env = "POLYFORK_MAX_REQUESTS",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) max_requests: Option<u64>,

    /// The most memory the kernel lets each worker have, by a control group of its own; one that needs more is killed
    #[arg(long, value_name = "SIZE", value_parser = values::size, env = "POLYFORK_CGROUP_MEMORY",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Limits")]
    pub(crate) cgroup_memory: Option<usize>,

    /// How many CPUs' worth of time the kernel lets each worker have, by a control group of its own: 0.5, 2
    #[arg(long, value_name = "CPUS", value_parser = cpus, env = "POLYFORK_CGROUP_CPU",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Limits")]
    pub(crate) cgroup_cpu: Option<f64>,

    /// What happens without the right to make control groups
    #[arg(
        long,
        value_enum,
        default_value = "require",
        env = "POLYFORK_CGROUP",
        hide_env_values = true,
        help_heading = "Limits"
    )]
    pub(crate) cgroup: CgroupArg,

    /// Do not add the small preload that ends kept-alive connections of Node and uvicorn workers that stop
    #[arg(long, value_parser = values::switch, env = "POLYFORK_NO_DRAIN_PRELOAD",
          hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) no_drain_preload: bool,

    /// Longest message that a worker may send, in bytes; a worker that sends a longer one is replaced
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = values::size,
          env = "POLYFORK_MAX_MESSAGE", allow_hyphen_values = true, hide_env_values = true, help_heading = "Limits")]
    pub(crate) max_message: usize,

    /// Deepest nesting of a message that a worker may send
    #[arg(long, value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..), env = "POLYFORK_MAX_DEPTH",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Limits")]
    pub(crate) max_depth: u32,

    /// Serve metrics for Prometheus: HOST:PORT of this machine, or unix:PATH
    ///
    /// Only a loopback address, as in 127.0.0.1:9100, unless --metrics-on-network is given; port 0 is told by `status`. A Unix
    /// socket is for its user alone. `polyfork metrics NAME` shows the same without it. See docs/metrics.md.
    #[arg(long, value_name = "ADDRESS", value_parser = values::metrics_address, env = "POLYFORK_METRICS",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Metrics")]
    pub(crate) metrics: Option<Address>,

    /// Let --metrics be an address that other machines can reach; everybody who does can read it
    #[arg(long, value_parser = values::switch, env = "POLYFORK_METRICS_ON_NETWORK",
          hide_env_values = true, help_heading = "Metrics")]
    pub(crate) metrics_on_network: bool,

    /// Do not ask programs for metrics of their own (Node programs get a message of prom-client for that)
    #[arg(long, value_parser = values::switch, env = "POLYFORK_NO_APP_METRICS",
          hide_env_values = true, help_heading = "Metrics")]
    pub(crate) no_app_metrics: bool,

    /// Do not open a control socket: `ls`, `status`, `stop` and the like cannot reach it
    #[arg(long, value_parser = values::switch, env = "POLYFORK_NO_CONTROL", hide_env_values = true)]
    pub(crate) no_control: bool,

    #[command(flatten)]
    pub(crate) renew: RenewArgs,

    #[command(flatten)]
    pub(crate) config: ConfigArgs,

    #[command(flatten)]
    pub(crate) show: ShowArgs,
}

/// Who runs it.
#[derive(Debug, Clone, Args)]
pub(crate) struct IdentityArgs {
    /// Become this user before anything is run: the primary and all workers; for root only
    ///
    /// NAME, NAME:GROUP or UID:GID. Groups are those of the account. Ports below 1024 can be bound all the same. What
    /// workers start cannot become root again. See docs/security.md.
    #[arg(long, value_name = "NAME[:GROUP]", value_parser = clap::builder::OsStringValueParser::new(),
          env = "POLYFORK_USER", hide_env_values = true, help_heading = "Workers")]
    pub(crate) user: Option<OsString>,

    /// Permission bits that new files do not get, octal, as in 027
    #[arg(long, value_name = "MASK", value_parser = values::umask, env = "POLYFORK_UMASK", hide_env_values = true,
          help_heading = "Workers")]
    pub(crate) umask: Option<u32>,
}

/// What is shown, and how.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// What becomes of what workers write
    ///
    /// prefix: passed on, each line with its slot in front; lines longer than 64 KiB come in pieces, and text without
    /// a newline when its line is complete or the worker ends. inherit: workers write for themselves, at once and
    /// without a prefix. none: discarded.
    #[arg(
        long,
        value_enum,
        default_value = "prefix",
        env = "POLYFORK_OUTPUT",
        hide_env_values = true,
        help_heading = "Output"
    )]
    pub(crate) output: OutputArg,

    /// Events and output as JSON lines on standard output, see docs/events.md
    #[arg(long, value_parser = values::switch, env = "POLYFORK_JSON", hide_env_values = true,
          help_heading = "Output")]
    pub(crate) json: bool,
}

/// `polyfork demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How many workers: a number, or max for every CPU that may be used
    #[arg(short, long, value_name = "N|max", value_parser = values::workers, env = "POLYFORK_WORKERS",
          hide_env_values = true, allow_hyphen_values = true)]
    pub(crate) workers: Option<Workers>,

    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", value_parser = values::address,
          env = "POLYFORK_LISTEN", hide_env_values = true)]
    pub(crate) listen: Address,

    /// Which worker gets the next connection
    #[arg(
        long,
        value_enum,
        default_value = "round-robin",
        env = "POLYFORK_POLICY",
        hide_env_values = true
    )]
    pub(crate) policy: PolicyArg,

    /// Who carries the policy out
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        env = "POLYFORK_MECHANISM",
        hide_env_values = true
    )]
    pub(crate) mechanism: MechanismArg,

    /// Events as JSON lines on standard output, see docs/events.md
    #[arg(long, value_parser = values::switch, env = "POLYFORK_JSON", hide_env_values = true)]
    pub(crate) json: bool,
}

/// `--policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyArg {
    /// each ready worker in turn, exactly
    RoundRobin,
    /// one socket for all; whoever wakes first
    Shared,
}

/// `--mechanism`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MechanismArg {
    /// the kernel where it can, else hand-off; told which and why
    Auto,
    /// a listening socket per worker, and a program in the kernel that picks one for each connection
    Kernel,
    /// the primary accepts and passes each connection on
    Handoff,
}

/// `--dialect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DialectArg {
    /// found out from the program file
    Auto,
    /// a program built on the polyfork crate
    Native,
    /// Node's own channel: Node, Deno, Bun
    Node,
    /// LISTEN_FDS, signals and NOTIFY_SOCKET: anything else
    Sockets,
}

/// `--cgroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupArg {
    /// nothing is started
    Require,
    /// workers run without these limits; told
    Auto,
}

/// `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub(crate) enum OutputArg {
    /// each line with its slot in front
    Prefix,
    /// workers write for themselves
    Inherit,
    /// discarded
    None,
}

/// A time limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) Option<Duration>);

impl From<PolicyArg> for Policy {
    fn from(arg: PolicyArg) -> Self {
        match arg {
            PolicyArg::RoundRobin => Policy::RoundRobin,
            PolicyArg::Shared => Policy::Shared,
        }
    }
}

impl From<MechanismArg> for Mechanism {
    fn from(arg: MechanismArg) -> Self {
        match arg {
            MechanismArg::Auto => Mechanism::Auto,
            MechanismArg::Kernel => Mechanism::Kernel,
            MechanismArg::Handoff => Mechanism::Handoff,
        }
    }
}

impl DialectArg {
    /// `None` when it is to be found out.
    pub(crate) fn dialect(self) -> Option<Dialect> {
        match self {
            DialectArg::Auto => None,
            DialectArg::Native => Some(Dialect::Native),
            DialectArg::Node => Some(Dialect::Node),
            DialectArg::Sockets => Some(Dialect::Sockets),
        }
    }
}

fn limit(text: &str) -> Result<Limit, String> {
    values::limit(text).map(Limit)
}

fn ready(text: &str) -> Result<Ready, String> {
    match text.trim() {
        "auto" => Ok(Ready::Auto),
        "listening" => Ok(Ready::Listening),
        "message" => Ok(Ready::Message),
        "notify" => Ok(Ready::Notify),
        "probe" => Ok(Ready::Probe),
        other => match other.strip_prefix("delay=") {
            Some(delay) => values::duration(delay).map(Ready::Delay),
            None => Err("give auto, listening, message, notify, probe or delay=1s".into()),
        },
    }
}

fn probe(text: &str) -> Result<Probe, String> {
    text.trim().parse::<Probe>().map_err(|error| error.to_string())
}

fn cpus(text: &str) -> Result<f64, String> {
    let number = text.trim().parse::<f64>().ok().filter(|cpus| cpus.is_finite() && *cpus > 0.0);
    number.ok_or_else(|| "give a number above 0, as in 0.5 or 2".to_owned())
}

fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    text.parse::<RestartPolicy>().map_err(|error| error.to_string())
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
    let command = whole();
    let matches = command.try_get_matches_from(&args).map_err(|error| {
        variable_of(&error, &args).map_or_else(
            || not_run(&error, &help_for(&args)),
            |name| NotRun::Wrong(blamed(&error, &name)),
        )
    })?;
    Cli::from_arg_matches(&matches).map_err(|error| not_run(&error, &help_for(&args)))
}

/// The command that helps with these words. Only for errors: the whole description is made once more for it.
fn help_for(args: &[OsString]) -> String {
    let known = |verb: &&str| Cli::command().find_subcommand(verb).is_some();
    match args.get(1).and_then(|verb| verb.to_str()).filter(known) {
        Some(verb) => format!("polyfork {verb} --help"),
        None => "polyfork --help".to_owned(),
    }
}

/// The variable that a wrong value comes from; `None` when the command line itself is wrong.
///
/// Clap does not tell where a value came from, so the same words are read again without the environment: what is
/// wrong with the words alone is still wrong then.
fn variable_of(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let option = error.get(ContextKind::InvalidArg)?.to_string();
    let alone =
        Cli::command().mut_subcommands(|verb| verb.mut_args(|arg| arg.env(Resettable::Reset)));
    if let Err(again) = alone.try_get_matches_from(args)
        && again.get(ContextKind::InvalidArg) == error.get(ContextKind::InvalidArg)
        && again.get(ContextKind::InvalidValue) == error.get(ContextKind::InvalidValue)
    {
        return None;
    }
    let name = option.strip_prefix("--")?.split(' ').next()?;
    Some(format!("POLYFORK_{}", name.replace('-', "_").to_uppercase()))
}

/// The error of an option, told of the variable that stands for it.
fn blamed(error: &clap::Error, variable: &str) -> String {
    let text = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let (option, value) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue));
    let theirs = format!("'{value}' for '{option}'");
    let ours = format!("{value:?} of the environment variable {variable}");
    one_line(&error.render().to_string()).replacen(&theirs, &ours, 1)
}

fn not_run(error: &clap::Error, help: &str) -> NotRun {
    let text = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    NotRun::Wrong(match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return NotRun::Asked(painted(error)),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "no verb given: `polyfork run PROGRAM`, or `polyfork demo`".into()
        }
        ErrorKind::MissingRequiredArgument => {
            let missing = one_line(&error.render().to_string());
            format!("{missing} (see {help})")
        }
        ErrorKind::InvalidSubcommand => no_such_verb(&text(ContextKind::InvalidSubcommand)),
        ErrorKind::UnknownArgument if !text(ContextKind::InvalidArg).starts_with('-') => {
            let word = text(ContextKind::InvalidArg);
            format!("unexpected argument {word}: nothing follows the options here (see {help})")
        }
        ErrorKind::UnknownArgument => {
            let option = text(ContextKind::InvalidArg);
            let near = match text(ContextKind::SuggestedArg) {
                near if near.is_empty() => String::new(),
                near => format!("; did you mean {near}?"),
            };
            let near = match option.as_str() {
                "--config" => "; the file is given without it".to_owned(),
                _ => near,
            };
            let theirs = if runs_programs(help) { "the program's own come after it; " } else { "" };
            format!("unknown option {option}{near} ({theirs}see {help})")
        }
        _ => format!("{} (see {help})", one_line(&error.render().to_string())),
    })
}

/// A program, as a rule, unless it is nearly a verb.
fn no_such_verb(word: &str) -> String {
    let command = Cli::command();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    let near = verbs.map(|verb| (name::distance(word, verb.get_name()), verb.get_name())).min();
    let most = if word.len() > 3 { 2 } else { 1 };
    let shown = words::harmless(word);
    match near.filter(|(distance, _)| *distance <= most) {
        Some((_, verb)) => format!("no such verb: {shown}; did you mean '{verb}'?"),
        None => format!("no such verb: {shown}; to run a program: polyfork run {shown}"),
    }
}

/// Whether the verb takes a program with options of its own.
fn runs_programs(help: &str) -> bool {
    ["run", "start", "primary"].iter().any(|verb| help == format!("polyfork {verb} --help"))
}

fn painted(error: &clap::Error) -> String {
    let screen = error.render();
    if Paint::stdout().has_colours() { screen.ansi().to_string() } else { screen.to_string() }
}

/// What is wrong with a command line, in one line.
pub(crate) fn in_one_line(error: &clap::Error) -> String {
    one_line(&error.render().to_string())
}

/// Clap's `error: what`, possible values and tips, without the usage that follows.
fn one_line(screen: &str) -> String {
    let told = screen.split("\n\nUsage:").next().unwrap_or(screen);
    let told = told.split("\n\nFor more information").next().unwrap_or(told);
    let told = told.strip_prefix("error: ").unwrap_or(told);
    let parts = told.lines().map(str::trim).filter(|part| !part.is_empty());
    let parts: Vec<&str> = parts.map(|part| part.strip_prefix("tip: ").unwrap_or(part)).collect();
    parts.join("; ").replace(":; ", ": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> RunArgs {
        match read(words) {
            Ok(Cli { verb: Verb::Run(args) }) => *args,
            Ok(_) => panic!("another verb"),
            Err(NotRun::Asked(text) | NotRun::Wrong(text)) => panic!("{text}"),
        }
    }

    fn read(words: &[&str]) -> Result<Cli, NotRun> {
        parse(std::iter::once("polyfork").chain(words.iter().copied()).map(OsString::from))
    }

    fn wrong(words: &[&str]) -> String {
        match read(words) {
            Err(NotRun::Wrong(line)) => line,
            Err(NotRun::Asked(_)) => panic!("help for {words:?}"),
            Ok(cli) => panic!("{words:?} was taken: {cli:?}"),
        }
    }

    #[test]
    fn the_description_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn all_after_the_program_belongs_to_it() {
        for (words, command) in [
            (&["run", "server.js", "--port", "3"][..], &["server.js", "--port", "3"][..]),
            (&["run", "-w", "2", "--", "node", "x.js"], &["node", "x.js"]),
            (
                &["run", "-w", "2", "npm", "start", "--", "-w", "3"],
                &["npm", "start", "--", "-w", "3"],
            ),
            (&["run", "x", "--", "y"], &["x", "--", "y"]),
            (&["run", "x", "--help"], &["x", "--help"]),
            (&["run", "--", "-odd", "--json"], &["-odd", "--json"]),
        ] {
            let args = run(words);
            assert_eq!(args.command, command, "{words:?}");
            assert!(!args.show.json);
        }
    }

    #[test]
    fn an_unknown_option_is_answered_with_a_near_one() {
        let line = wrong(&["run", "--worker", "2", "server.js"]);
        assert!(line.contains("--worker") && line.contains("--workers"), "{line}");
        let line = wrong(&["runn", "server.js"]);
        assert!(line.contains("runn") && line.contains("'run'"), "{line}");
        let line = wrong(&["server.js"]);
        assert!(line.contains("polyfork run server.js"), "{line}");
    }

    #[test]
    fn every_wrong_value_is_one_line_that_names_option_and_value() {
        for words in [
            ["--workers", "0"],
            ["--workers", "-2"],
            ["--grace", "30"],
            ["--grace", "soon"],
            ["--listen", "nowhere"],
            ["--listen", "127.0.0.1:70000"],
            ["--ready", "perhaps"],
            ["--ready-timeout", "x"],
            ["--restart-limit", "often"],
            ["--policy", "fair"],
            ["--mechanism", "magic"],
            ["--dialect", "latin"],
            ["--window", "65"],
            ["--max-message", "0"],
            ["--max-depth", "0"],
            ["--max-depth", "-1"],
            ["--grace", "-1"],
            ["--window", "-1"],
            ["--max-message", "-1"],
            ["--output", "paper"],
        ] {
            let line = wrong(&["run", words[0], words[1], "server.js"]);
            assert!(line.contains(words[0]) && line.contains(words[1]), "{line}");
            assert!(!line.contains('\n') && line.len() < 250, "{line}");
        }
    }

    #[test]
    fn a_word_too_many_is_not_called_an_option() {
        let line = wrong(&["demo", "extra"]);
        assert!(
            line.contains("unexpected argument extra") && !line.contains("option extra"),
            "{line}"
        );
    }

    #[test]
    fn a_missing_program_and_a_missing_verb_are_told() {
        assert!(wrong(&["run", "--workers"]).contains("--workers"));
        assert!(wrong(&[]).contains("polyfork run PROGRAM"));
    }

    #[test]
    fn values_become_settings() {
        let args = run(&[
            "run",
            "--ready",
            "delay=250ms",
            "--grace",
            "1m",
            "--ready-timeout",
            "none",
            "--listen",
            ":80",
            "--listen",
            "unix:/x",
            "--max-message",
            "1MiB",
            "--env",
            "A=1",
            "--env",
            "B=2",
            "x",
        ]);
        assert_eq!(args.ready, Ready::Delay(Duration::from_millis(250)));
        assert_eq!(args.grace, Duration::from_secs(60));
        assert_eq!(args.ready_timeout, Limit(None));
        assert_eq!(args.listen.len(), 2);
        assert_eq!(args.max_message, 1 << 20);
        assert_eq!(args.env, ["A=1", "B=2"]);
    }
}
