//! The options of `start`: those of `run`, and where what workers write is kept.
//!
//! Logs are written by `logs`; the options of `logs`, the verb, are in `operate`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::choices::{Limit, limit};
use super::run::RunArgs;
use crate::values;

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
