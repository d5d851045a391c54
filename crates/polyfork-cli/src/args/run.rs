//! The options of `run`: what is run, who gets connections, how workers live and what they may use.
//!
//! The longest list of them all, in the order of the help, with a heading for each group. `start` and a configuration file
//! take the same ones. Options of configuration are in `config::args`; what they mean is in `crate::run`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::TypedValueParser as _;
use polyfork::cluster::{Address, Probe, Ready, RestartDelay, RestartPolicy, StopOn};

use super::choices::{
    CgroupArg, DialectArg, Limit, MechanismArg, OutputArg, PolicyArg, cpus, limit, probe, ready,
    restart_delay, restart_policy, stop_on,
};
use crate::config::args::{ConfigArgs, RenewArgs};
use crate::values::{self, Workers};

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
    /// listening-or=3s: whichever comes first, for a program that may have nothing to listen on.
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
    ///
    /// N alone, with --min-uptime: after N restarts in a row of workers that did not live that long, however far apart.
    #[arg(long, value_name = "N|N/DURATION", default_value = "5/30s", value_parser = restart_policy,
          env = "POLYFORK_RESTART_LIMIT", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) restart_limit: RestartPolicy,

    /// A worker that lived this long is no part of the restart limit, and forgives those before it; none: each one counts
    #[arg(long, value_name = "DURATION", default_value = "none", value_parser = limit,
          env = "POLYFORK_MIN_UPTIME", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) min_uptime: Limit,

    /// How long each restart waits
    ///
    /// auto: at once the first time, then from 100 ms to 15 s, longer each time. 4s: always that long. 1s..30s: from the first
    /// to the second, twice as long each time, until a worker has been ready for some seconds.
    #[arg(long, value_name = "WAIT", default_value = "auto", value_parser = restart_delay,
          env = "POLYFORK_RESTART_DELAY", allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) restart_delay: RestartDelay,

    /// Start no other worker after one that exits with this code, as its work is done; separated by commas; repeatable
    ///
    /// any: after no worker, however it ends. none: after all of them. Its slot rests (`stopped`) until `restart` or a reload.
    /// Where all slots rest the app does: `run` ends, unless it is to reload by itself; with `start` it stays as `stopped`.
    #[arg(long, value_name = "CODE", value_delimiter = ',', value_parser = stop_on, env = "POLYFORK_STOP_EXIT_CODES",
          allow_hyphen_values = true, hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) stop_exit_codes: Vec<StopOn>,

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
    #[arg(long, value_name = "NAME[:GROUP]", value_parser = clap::builder::OsStringValueParser::new().try_map(values::user),
          env = "POLYFORK_USER", hide_env_values = true, help_heading = "Workers")]
    pub(crate) user: Option<OsString>,

    /// Permission bits that new files do not get, octal, as in 027
    #[arg(long, value_name = "MASK", value_parser = values::umask, env = "POLYFORK_UMASK", hide_env_values = true,
          help_heading = "Workers")]
    pub(crate) umask: Option<u32>,
}

impl RunArgs {
    /// When workers are started again.
    pub(crate) fn restart(&self) -> RestartPolicy {
        let codes = self.stop_exit_codes.iter().flat_map(|one| match one {
            StopOn::Codes(codes) => codes.as_slice(),
            _ => &[],
        });
        let codes: Vec<u8> = codes.copied().collect();
        let stop_on = match (self.stop_exit_codes.contains(&StopOn::AnyEnd), codes.is_empty()) {
            (true, _) => StopOn::AnyEnd,
            (false, true) => StopOn::Nothing,
            (false, false) => StopOn::Codes(codes),
        };
        let min_uptime = self.min_uptime.0.unwrap_or_default();
        let limit = self.restart_limit.clone().delayed(self.restart_delay);
        RestartPolicy { min_uptime, stop_on, ..limit }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::read;
    use crate::args::{Cli, NotRun, Verb};

    fn run(words: &[&str]) -> RunArgs {
        match read(words) {
            Ok(Cli { verb: Verb::Run(args) }) => *args,
            Ok(_) => panic!("another verb"),
            Err(NotRun::Asked(text) | NotRun::Wrong(text)) => panic!("{text}"),
        }
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
    fn options_of_restarts_become_one_policy() {
        let policy = |words: &[&str]| {
            let words = [&["run"], words, &["x"]].concat();
            run(&words).restart()
        };
        assert_eq!(policy(&[]), RestartPolicy::default());
        let limited = policy(&["--restart-limit", "16", "--min-uptime", "1s"]);
        assert_eq!((limited.limit, limited.window), (16, RestartPolicy::NO_WINDOW));
        assert_eq!(limited.min_uptime, Duration::from_secs(1));
        let delayed = policy(&["--restart-delay", "4s"]);
        assert_eq!(
            (delayed.first_delay, delayed.max_delay),
            (delayed.min_delay, delayed.min_delay)
        );
        assert_eq!(delayed.max_delay, Duration::from_secs(4));
        let growing = policy(&["--restart-delay", "100ms..15s"]);
        assert_eq!(growing.first_delay, Duration::from_millis(100));
        let codes = policy(&["--stop-exit-codes", "0,3", "--stop-exit-codes", "7"]);
        assert_eq!(codes.stop_on, StopOn::Codes(vec![0, 3, 7]));
        assert_eq!(policy(&["--stop-exit-codes", "any,0"]).stop_on, StopOn::AnyEnd);
        assert_eq!(policy(&["--stop-exit-codes", "none"]).stop_on, StopOn::Nothing);
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
