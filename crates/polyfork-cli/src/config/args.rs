//! The command line of configuration: which file, which app, and the options that came with it.
//!
//! Only describes; `args` takes these in, `run` makes settings of them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use polyfork::cluster::StopBy;

use super::cron::Cron;
use super::live::Live;
use crate::args::FormArgs;
use crate::values;

/// Which configuration `run` and `start` go by.
#[derive(Debug, Default, Clone, Args)]
pub(crate) struct ConfigArgs {
    /// A configuration file; the words after the options are names of its apps then
    ///
    /// polyfork.toml, or ecosystem.config.js, .cjs, .mjs or .json of PM2. Where no program is given, the one in this folder is
    /// taken. As PROGRAM, polyfork.toml and any NAME.config.js, .cjs or .mjs are configurations as well. See docs/config.md.
    #[arg(
        long,
        value_name = "FILE",
        env = "POLYFORK_CONFIG",
        hide_env_values = true,
        help_heading = "Configuration"
    )]
    pub(crate) config: Option<PathBuf>,

    /// Settings of the file that hold for this occasion, as in [app.NAME.profile.PROFILE], or env_PROFILE of PM2
    #[arg(
        long,
        value_name = "PROFILE",
        env = "POLYFORK_PROFILE",
        hide_env_values = true,
        help_heading = "Configuration"
    )]
    pub(crate) profile: Option<String>,

    /// The file that the background's end goes by
    #[arg(long, value_name = "FILE", hide = true, requires = "of_app")]
    pub(crate) of_config: Option<PathBuf>,

    /// The app of that file
    #[arg(long, value_name = "NAME", hide = true, requires = "of_config")]
    pub(crate) of_app: Option<String>,

    /// Where these options come from, for whoever reads them again.
    #[arg(skip)]
    pub(crate) live: Option<Live>,
}

/// What workers are told, and what makes them be replaced by newer ones.
#[derive(Debug, Clone, Args)]
pub(crate) struct RenewArgs {
    /// How workers are asked to leave: auto, message, or a signal such as INT
    ///
    /// auto: what fits the dialect. message: Node workers get the message 'shutdown', as PM2's shutdown_with_message has it.
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = stop_by, env = "POLYFORK_STOP_BY",
          hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) stop_by: StopBy,

    /// The variable that tells each worker its number, from 0
    #[arg(long, value_name = "NAME", default_value = "NODE_APP_INSTANCE", value_parser = variable,
          env = "POLYFORK_INSTANCE_VAR", hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) instance_var: String,

    /// A variable set by --env to whose value each worker's number is added
    #[arg(long, value_name = "NAME", value_parser = variable, env = "POLYFORK_INCREMENT_VAR",
          hide_env_values = true, help_heading = "Life of a worker")]
    pub(crate) increment_var: Option<String>,

    /// Reload at certain times: minute, hour, day, month and weekday as in crontab(5), in local time
    #[arg(long, value_name = "CRON", value_parser = Cron::read, env = "POLYFORK_RELOAD_AT",
          hide_env_values = true, help_heading = "Reload by itself")]
    pub(crate) reload_at: Option<Cron>,

    /// Reload when something changes there; repeatable, relative to the working directory
    ///
    /// Folders are watched with all that is in them, except for node_modules and names that begin with a dot. POLYFORK_WATCH
    /// takes several, separated by colons.
    #[arg(
        long,
        value_name = "PATH",
        env = "POLYFORK_WATCH",
        hide_env_values = true,
        value_delimiter = ':',
        help_heading = "Reload by itself"
    )]
    pub(crate) watch: Vec<PathBuf>,

    /// What is not watched: names or paths, with * and ?; repeatable
    #[arg(
        long,
        value_name = "PATTERN",
        env = "POLYFORK_WATCH_IGNORE",
        hide_env_values = true,
        value_delimiter = ':',
        help_heading = "Reload by itself"
    )]
    pub(crate) watch_ignore: Vec<String>,

    /// How long nothing must have changed any more
    #[arg(long, value_name = "DURATION", default_value = "200ms", value_parser = values::duration,
          env = "POLYFORK_WATCH_DELAY", allow_hyphen_values = true, hide_env_values = true,
          help_heading = "Reload by itself")]
    pub(crate) watch_delay: Duration,
}

/// `polyfork check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The file [default: polyfork.toml or ecosystem.config.* in this folder]
    #[arg(value_name = "FILE", env = "POLYFORK_CONFIG", hide_env_values = true)]
    pub(crate) file: Option<PathBuf>,

    /// As with `start`
    #[arg(long, value_name = "PROFILE", env = "POLYFORK_PROFILE", hide_env_values = true)]
    pub(crate) profile: Option<String>,

    /// Print the JSON schema of polyfork.toml, for editors, and check nothing
    #[arg(long)]
    pub(crate) schema: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// `polyfork apply`.
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// The file [default: polyfork.toml or ecosystem.config.* in this folder]
    #[arg(value_name = "FILE", env = "POLYFORK_CONFIG", hide_env_values = true)]
    pub(crate) file: Option<PathBuf>,

    /// As with `start`
    #[arg(long, value_name = "PROFILE", env = "POLYFORK_PROFILE", hide_env_values = true)]
    pub(crate) profile: Option<String>,

    /// Show what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    /// Stop apps that were started from this file and are not in it any more
    #[arg(long)]
    pub(crate) prune: bool,

    /// Stop and start apps where a change cannot take effect otherwise; nobody serves in between
    #[arg(long)]
    pub(crate) replace: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// `polyfork init`.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The program of its first app
    #[arg(value_name = "PROGRAM")]
    pub(crate) program: Option<PathBuf>,

    /// Write what this file of PM2 says
    #[arg(long, value_name = "FILE", conflicts_with = "program")]
    pub(crate) from: Option<PathBuf>,

    /// The file to write; one that is there is left alone
    #[arg(long, value_name = "FILE", default_value = "polyfork.toml")]
    pub(crate) out: PathBuf,

    /// Print the JSON schema of polyfork.toml, for editors, and write nothing
    #[arg(long, conflicts_with_all = ["program", "from"])]
    pub(crate) schema: bool,

    #[command(flatten)]
    pub(crate) form: FormArgs,
}

/// Signals that a worker can be asked to leave by, under their names.
const SIGNALS: [(&str, i32); 6] =
    [("HUP", 1), ("INT", 2), ("QUIT", 3), ("USR1", 10), ("USR2", 12), ("TERM", 15)];

fn stop_by(text: &str) -> Result<StopBy, String> {
    let named = |name: &str| {
        let name = name.strip_prefix("SIG").unwrap_or(name);
        SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
    };
    match text.trim() {
        "auto" => Ok(StopBy::Auto),
        "message" => Ok(StopBy::Message),
        other => named(&other.to_ascii_uppercase()).map(StopBy::Signal).ok_or_else(|| {
            let names: Vec<&str> = SIGNALS.iter().map(|(name, _)| *name).collect();
            format!("give auto, message, or one of {}", names.join(", "))
        }),
    }
}

fn variable(text: &str) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let begins = text.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
    match begins && text.bytes().all(fits) {
        true => Ok(text.to_owned()),
        false => Err("give the name of a variable: letters, digits and _".into()),
    }
}
