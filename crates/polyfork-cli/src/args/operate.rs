//! The options of verbs for apps that run: which ones are meant, and what is to become of them.
//!
//! What such a verb does is in `crate::operate`, how it asks in `control`. What brings an app up is in `run` and `start`.
//!
//! The surprising rule: `--since` reads the wall clock when the command line is read, as logs are stamped by it.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;

use super::FormArgs;
use crate::control::protocol::Scale;
use crate::values::{self, Lines};

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

    /// The last N lines of all that is meant together, or all
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
