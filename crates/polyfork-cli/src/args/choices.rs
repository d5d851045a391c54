//! What options can be: the words that one takes, and types of the library as options.
//!
//! Durations, sizes and whatever else has nothing to do with this command line are in `values`.

use std::time::Duration;

use clap::ValueEnum;
use polyfork::cluster::{
    Dialect, Mechanism, Policy, Probe, Ready, RestartDelay, RestartPolicy, StopOn,
};

use crate::values;

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

pub(super) fn limit(text: &str) -> Result<Limit, String> {
    values::limit(text).map(Limit)
}

pub(super) fn ready(text: &str) -> Result<Ready, String> {
    match text.trim() {
        "auto" => Ok(Ready::Auto),
        "listening" => Ok(Ready::Listening),
        "message" => Ok(Ready::Message),
        "notify" => Ok(Ready::Notify),
        "probe" => Ok(Ready::Probe),
        other => match other.split_once('=') {
            Some(("delay", delay)) => values::duration(delay).map(Ready::Delay),
            Some(("listening-or", delay)) => values::duration(delay).map(Ready::ListeningOr),
            _ => {
                Err("give auto, listening, listening-or=3s, message, notify, probe or delay=1s"
                    .into())
            }
        },
    }
}

pub(super) fn probe(text: &str) -> Result<Probe, String> {
    text.trim().parse::<Probe>().map_err(|error| error.to_string())
}

pub(super) fn cpus(text: &str) -> Result<f64, String> {
    let number = text.trim().parse::<f64>().ok().filter(|cpus| cpus.is_finite() && *cpus > 0.0);
    number.ok_or_else(|| "give a number above 0, as in 0.5 or 2".to_owned())
}

pub(super) fn restart_delay(text: &str) -> Result<RestartDelay, String> {
    match (text.trim(), text.split_once("..")) {
        ("auto", _) => Ok(RestartDelay::Auto),
        (_, None) => values::duration(text).map(RestartDelay::Fixed),
        (_, Some((from, to))) => match (values::duration(from)?, values::duration(to)?) {
            (from, to) if from > to => Err("the first wait is longer than the last".into()),
            (from, to) => Ok(RestartDelay::Growing(from, to)),
        },
    }
}

pub(super) fn stop_on(text: &str) -> Result<StopOn, String> {
    text.parse::<StopOn>().map_err(|error| error.to_string())
}

pub(super) fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    text.parse::<RestartPolicy>().map_err(|error| error.to_string())
}
