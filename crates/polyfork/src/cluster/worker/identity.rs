//! Who this process is: a worker of a primary, or a program that runs alone.
//!
//! Reads the environment that a primary prepares; opens nothing. Taking the channel over is `Worker::from_env`.
//!
//! The rule that surprises: the variables count only if `POLYFORK_CHANNEL_PID` is our own process id. A
//! worker's children inherit its environment, and must not believe that they are the worker. systemd solves
//! the same problem the same way with `LISTEN_PID` (sd_listen_fds(3)).

use std::ffi::OsString;
use std::os::fd::RawFd;

use polyfork_wire::env::{
    POLYFORK_CHANNEL_FD as CHANNEL_FD, POLYFORK_SLOT as SLOT, POLYFORK_WORKER_ID as WORKER_ID,
};

use super::WorkerError;
use crate::cluster::process::POLYFORK_CHANNEL_PID as CHANNEL_PID;

/// What the environment says about this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Identity {
    /// No primary started this process as a worker of the native dialect.
    Alone,
    /// A primary did.
    Worker {
        /// The channel's descriptor, not checked yet.
        channel: RawFd,
        /// Present when the variable is a number.
        slot: Option<u32>,
        /// Present when the variable is a number.
        id: Option<u64>,
    },
}

/// Whether a primary started this very process as a worker.
///
/// True in a worker of the native dialect, so in a program built on this crate that [`run`](super::run()), a
/// [`Cluster`](crate::cluster::Cluster) or `polyfork run` started. False in the children of such a worker,
/// although they inherit its environment. Does not look at the channel itself; [`super::Worker::from_env`]
/// does.
pub fn is_worker() -> bool {
    polyfork_sys::note::mark();
    // A malformed descriptor number still means that somebody wanted a worker: `from_env` says what is wrong.
    !matches!(Identity::from_env(), Ok(Identity::Alone))
}

/// Whether this process is not a worker (Node: `cluster.isPrimary`): it may start a cluster.
pub fn is_primary() -> bool {
    !is_worker()
}

impl Identity {
    pub(super) fn from_env() -> Result<Identity, WorkerError> {
        Identity::read(|key| std::env::var_os(key), std::process::id())
    }

    fn read(var: impl Fn(&str) -> Option<OsString>, own_pid: u32) -> Result<Identity, WorkerError> {
        let number = |key| var(key).and_then(|value| value.to_str()?.parse::<u64>().ok());
        if number(CHANNEL_PID) != Some(u64::from(own_pid)) {
            return Ok(Identity::Alone);
        }
        let Some(text) = var(CHANNEL_FD) else { return Ok(Identity::Alone) };
        let channel = text
            .to_str()
            .and_then(|text| text.parse::<RawFd>().ok())
            .filter(|fd| *fd > 2)
            .ok_or(WorkerError::Environment { variable: CHANNEL_FD, value: text })?;
        Ok(Identity::Worker {
            channel,
            slot: number(SLOT).and_then(|slot| u32::try_from(slot).ok()),
            id: number(WORKER_ID),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Identity, WorkerError> {
        let find = |key: &str| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| OsString::from(v));
        Identity::read(find, 77)
    }

    #[test]
    fn a_process_with_its_own_pid_in_the_environment_is_a_worker() {
        let vars = [
            (CHANNEL_FD, "3"),
            (CHANNEL_PID, "77"),
            (SLOT, "2"),
            (WORKER_ID, "18446744073709551615"),
        ];
        let worker = Identity::Worker { channel: 3, slot: Some(2), id: Some(u64::MAX) };
        assert_eq!(read(&vars).unwrap(), worker);
    }

    #[test]
    fn a_grandchild_that_inherits_the_variables_is_not_a_worker() {
        assert_eq!(read(&[(CHANNEL_FD, "3"), (CHANNEL_PID, "76")]).unwrap(), Identity::Alone);
        assert_eq!(read(&[(CHANNEL_FD, "3")]).unwrap(), Identity::Alone);
        assert_eq!(read(&[(CHANNEL_PID, "77")]).unwrap(), Identity::Alone);
    }

    #[test]
    fn a_descriptor_that_is_no_number_is_an_error_that_shows_it() {
        for text in ["", "x", "-1", "0", "2", "99999999999"] {
            let error = read(&[(CHANNEL_FD, text), (CHANNEL_PID, "77")]).unwrap_err().to_string();
            assert!(error.contains(CHANNEL_FD) && error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn odd_information_is_left_out() {
        let vars = [(CHANNEL_FD, "3"), (CHANNEL_PID, "77"), (SLOT, "-2"), (WORKER_ID, "")];
        let worker = Identity::Worker { channel: 3, slot: None, id: None };
        assert_eq!(read(&vars).unwrap(), worker);
    }
}
