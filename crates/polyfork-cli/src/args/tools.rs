//! The options of verbs that leave all apps alone: `demo`, `advise`, `service`, `man` and `completions`.
//!
//! Those of `check`, `apply` and `init` are in `config::args`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use polyfork::cluster::Address;

use super::FormArgs;
use super::choices::{Limit, MechanismArg, PolicyArg, limit};
use crate::values::{self, Workers};

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
