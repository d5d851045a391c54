//! This process as somebody's child: its channel to the parent.
//!
//! The parent may be this crate ([`child_process::fork`](crate::child_process)) or a Node program that gives a
//! Rust executable as `execPath` to its own `child_process.fork`. A worker of a cluster has another
//! conversation with its primary: [`cluster::Worker`](crate::cluster::Worker).
//!
//! The rule that surprises: the environment cannot be changed safely in a running Rust program, so the
//! variables that name the channel stay. What this crate starts does not get them. Ours count only with our own
//! process id beside them; Node's `NODE_CHANNEL_FD` has nothing like it, so a Node program that is started by
//! other means (`std::process::Command`) should have it removed.
//!
//! # What keeps a process alive
//!
//! Node counts references: a child with a `message` listener stays alive as long as its channel. A Rust program
//! ends when `main` returns, so nothing is counted here: a child that shall live as long as its channel
//! receives until there is nothing more, and one that shall not simply returns.
//!
//! Behaviour follows: Node `lib/internal/process/pre_execution.js` (`setupChildProcessIpcChannel`).

use std::ffi::OsString;
use std::io;

use polyfork_wire::env::{self as names, EnvError, SerializationMode};

use crate::channel::{Channel, Encoding};
use crate::cluster::process::POLYFORK_CHANNEL_PID as CHANNEL_PID;

/// Descriptor of the channel to a parent that speaks the native encoding, decimal.
pub(crate) const FORK_FD: &str = "POLYFORK_FORK_FD";
/// Name of the entry that a child of the same executable runs.
pub(crate) const FORK_ENTRY: &str = "POLYFORK_FORK_ENTRY";

/// Set when the parent follows the child's events, so that its messages are [wrapped](crate::child_process::Started).
pub(crate) const FORK_EVENTS: &str = "POLYFORK_FORK_EVENTS";

/// Says that this process can do without the memory of the code that it has executed so far: for a primary that has
/// started and goes to sleep. What it needs later comes back page by page, from the page cache (madvise(2)).
pub fn give_back_code() {
    polyfork_sys::system::give_back_code();
}

/// What a clock on the wall shows at `time` where this process is (`TZ`, else `/etc/localtime`): localtime_r(3).
///
/// # Errors
/// When the time is beyond what the C library can tell.
///
/// ```
/// let now = polyfork::process::local_time(std::time::SystemTime::now())?;
/// assert!((1..=12).contains(&now.month) && now.minute < 60);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn local_time(time: std::time::SystemTime) -> io::Result<LocalTime> {
    polyfork_sys::system::local_time(time)
}

pub use polyfork_sys::system::LocalTime;

/// What no child inherits from this process by way of this crate: its own place in the world.
pub(crate) const NOT_INHERITED: [&str; 14] = [
    names::NODE_CHANNEL_FD,
    names::NODE_CHANNEL_SERIALIZATION_MODE,
    names::NODE_UNIQUE_ID,
    FORK_FD,
    FORK_ENTRY,
    FORK_EVENTS,
    CHANNEL_PID,
    names::POLYFORK_CHANNEL_FD,
    names::POLYFORK_WORKER_ID,
    names::POLYFORK_SLOT,
    names::POLYFORK_MEMORY,
    names::POLYFORK_BEAT_MS,
    names::POLYFORK_REQUESTS,
    names::POLYFORK_MAY_END,
];

/// Why this process has no channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// No parent gave it one.
    #[error("this process was not forked with a channel")]
    NotForked,
    /// A variable that the parent sets makes no sense.
    #[error(transparent)]
    Environment(#[from] EnvError),
    /// The descriptor cannot be used: it is not open, is not a stream socket, or the channel has been taken
    /// already.
    #[error("cannot use descriptor {fd} as the channel to the parent")]
    Channel {
        /// The descriptor's number.
        fd: i32,
        /// The system's error.
        source: io::Error,
    },
    /// Not called inside a tokio runtime.
    #[error("a channel needs a tokio runtime: call this inside one")]
    NoRuntime,
}

/// The channel to this process's parent (Node: `process.send`, `process.on('message')`).
///
/// Can be taken once. Must be called inside a tokio runtime with I/O and time enabled. When the channel is one of
/// the standard streams (Node: `stdio: ['ipc']`), that stream is empty from then on.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut parent = polyfork::process::channel()?;
/// while let Some(message) = parent.recv().await? {
///     let number: f64 = message.to()?;
///     parent.send(&(number * 2.0)).await?;
/// }
/// parent.disconnect().await.ok();
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`ProcessError`].
pub fn channel() -> Result<Channel, ProcessError> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(ProcessError::NoRuntime);
    }
    let Place { fd, encoding } = Place::read(|key| std::env::var_os(key), std::process::id())?
        .ok_or(ProcessError::NotForked)?;
    let unusable = |source| ProcessError::Channel { fd, source };
    let socket = polyfork_sys::channel::take_inherited(fd).map_err(unusable)?;
    Channel::new(socket, encoding).map_err(unusable)
}

/// Whether a parent gave this process a channel. Does not look at the channel itself.
pub fn is_forked() -> bool {
    // A variable that makes no sense still means that somebody wanted one: `channel` says what is wrong.
    !matches!(Place::read(|key| std::env::var_os(key), std::process::id()), Ok(None))
}

/// The entry that this process shall run.
pub(crate) fn entry() -> Option<OsString> {
    own(&|key: &str| std::env::var_os(key), std::process::id(), FORK_ENTRY)
}

/// Whether its parent follows the events of that entry.
pub(crate) fn tells_events() -> bool {
    own(&|key: &str| std::env::var_os(key), std::process::id(), FORK_EVENTS).is_some()
}

/// What the environment says.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    fd: i32,
    encoding: Encoding,
}

impl Place {
    fn read(
        var: impl Fn(&str) -> Option<OsString>,
        own_pid: u32,
    ) -> Result<Option<Place>, ProcessError> {
        if let Some(text) = own(&var, own_pid, FORK_FD) {
            let fd = text.to_str().and_then(|text| text.parse().ok()).filter(|fd| *fd >= 0);
            let fd = fd.ok_or_else(|| EnvError {
                name: FORK_FD,
                value: text.as_encoded_bytes().escape_ascii().to_string(),
                why: "is not the number of a descriptor",
            })?;
            return Ok(Some(Place { fd, encoding: Encoding::Native }));
        }
        let node = [names::NODE_CHANNEL_FD, names::NODE_CHANNEL_SERIALIZATION_MODE];
        let given = node.into_iter().filter_map(|key| Some((key, var(key)?)));
        let Some(channel) = names::node_channel(given)? else { return Ok(None) };
        let encoding = match channel.mode {
            SerializationMode::Json => Encoding::Json,
            SerializationMode::Advanced => Encoding::Advanced,
        };
        Ok(Some(Place { fd: channel.fd, encoding }))
    }
}

/// A variable that counts only when it was meant for this very process.
fn own(var: &impl Fn(&str) -> Option<OsString>, own_pid: u32, key: &str) -> Option<OsString> {
    let pid = var(CHANNEL_PID)?;
    (pid.to_str()?.parse() == Ok(own_pid)).then(|| var(key))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Option<Place>, ProcessError> {
        let find = |key: &str| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| OsString::from(v));
        Place::read(find, 77)
    }

    #[test]
    fn a_forked_process_knows_its_channel() {
        let native = Place { fd: 3, encoding: Encoding::Native };
        assert_eq!(read(&[(FORK_FD, "3"), (CHANNEL_PID, "77")]).unwrap(), Some(native));
        let json = Place { fd: 5, encoding: Encoding::Json };
        assert_eq!(read(&[("NODE_CHANNEL_FD", "5")]).unwrap(), Some(json));
        assert_eq!(read(&[("NODE_CHANNEL_FD", "")]).unwrap(), None);
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn a_grandchild_that_inherits_the_variables_is_not_forked() {
        assert_eq!(read(&[(FORK_FD, "3"), (CHANNEL_PID, "76")]).unwrap(), None);
        assert_eq!(read(&[(FORK_FD, "3")]).unwrap(), None);
    }

    #[test]
    fn a_variable_that_makes_no_sense_is_shown() {
        for text in ["", "x", "-1", "99999999999"] {
            let error = read(&[(FORK_FD, text), (CHANNEL_PID, "77")]).unwrap_err().to_string();
            assert!(error.contains(FORK_FD) && error.contains(text), "{error}");
        }
        let error = read(&[("NODE_CHANNEL_FD", "three")]).unwrap_err().to_string();
        assert!(error.contains("three"), "{error}");
    }
}
