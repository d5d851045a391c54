//! Another binary in the place of a running primary: `polyfork upgrade`, and SIGUSR2.
//!
//! In this order, and nothing that serves is touched before the last step:
//!
//! 1. the file is opened, once: what is looked at is what will run;
//! 2. everything comes to rest for a moment and is written down, as a rehearsal;
//! 3. the new binary is run beside the primary and has to read that ([`trial`]);
//! 4. everything comes to rest for good: clients, cluster, logs; the final state is shown to the new binary, too;
//! 5. signals are held, the state is sealed, and the file is executed in the place of this process.
//!
//! The new image checks each descriptor and goes on ([`Left`]); should a descriptor not be what it was, it gives everything
//! back to the old binary, which is still there. Workers notice nothing of all this: they are children of the same process.
//!
//! What is in the state is in `polyfork::cluster::upgrade` and in [`state`]; what waits, and for whom, is in `run`.
//!
//! The surprising rule: the trial stays until the primary has become the new binary. As long as it runs, the kernel lets nobody
//! write to the file.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use polyfork::cluster::upgrade::{self, Descriptors, ResumeError};
use polyfork::identity;
use rustix::fs::{Mode, OFlags};

use crate::exit::Code;
use crate::words;

mod file;
pub(crate) mod secrets;
pub(crate) mod state;
pub(crate) mod trial;

pub(crate) use file::open as open_binary;
use state::AppState;

/// For a new binary to show that it can take over, unless asked otherwise.
pub(crate) const TRIAL_LIMIT: Duration = Duration::from_secs(10);
/// For clients, logs and output to come to rest, and for the trial to read the final state.
pub(crate) const REST_LIMIT: Duration = Duration::from_secs(2);
/// How often it is tried again when something is asked of the cluster in the last moment.
pub(crate) const TRIES: u32 = 5;
/// Signals that came before they were held are dealt with in this time.
pub(crate) const LAST_SIGNALS: Duration = Duration::from_millis(1);

/// Puts the binary in the place of this process. Returns only when that failed.
pub(crate) fn exec(binary: &OwnedFd, sealed: &[u8], list: &Descriptors) -> io::Error {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let made = upgrade::seal(sealed)
        .and_then(|state| Ok((state, rustix::fs::open("/proc/self/exe", flags, Mode::empty())?)));
    let (state, own) = match made {
        Ok(made) => made,
        Err(error) => return error,
    };
    let value = format!("{}:{}:{}", std::process::id(), state.as_raw_fd(), own.as_raw_fd());
    let variable = (upgrade::STATE_VARIABLE.into(), value.into());
    let argv: Vec<OsString> = std::env::args_os().collect();
    use std::os::fd::AsFd;
    let exec = || upgrade::exec(binary.as_fd(), &argv, &[variable], list, &[state, own]);
    with_rights(exec).unwrap_or_else(|error| error)
}

/// Whether exec would take rights from this process: it is not root, and what it kept when it became who it is (`--user`) is
/// not "ambient".
pub(crate) fn would_lose_rights() -> bool {
    let set = |name| u64::from_str_radix(&trial::own_rights(name)?, 16).ok();
    let lost = set("CapEff:").zip(set("CapAmb:")).is_some_and(|(has, keeps)| has & !keeps != 0);
    lost && !rustix::process::geteuid().is_root()
}

/// Executes something that is to have the rights of this process.
fn with_rights<T>(exec: impl FnOnce() -> T) -> io::Result<T> {
    if !would_lose_rights() {
        return Ok(exec());
    }
    identity::keep_over_exec(true)?;
    let done = exec();
    identity::keep_over_exec(false)?;
    Ok(done)
}

/// What the image before this one had to make inheritable for exec is not for workers.
pub(crate) fn rights_are_ours_alone() {
    // Giving something up is permitted to everybody.
    let _ = identity::keep_over_exec(false);
}

/// What the image before this one left.
#[derive(Debug)]
pub(crate) struct Left {
    /// Of the sealed state.
    state: RawFd,
    /// Of the binary that left it.
    old: RawFd,
    /// We are that binary: the new one could not take over, for this reason.
    pub(crate) back: Option<String>,
}

/// Whether this process goes on with something that was left to it, and with what.
pub(crate) fn left() -> Option<Left> {
    read(&std::env::var(upgrade::STATE_VARIABLE).ok()?, std::process::id())
}

/// `PID:STATE:OLD`, and `:REASON` on the way back.
fn read(text: &str, me: u32) -> Option<Left> {
    let mut parts = text.splitn(4, ':');
    let mut number = || parts.next()?.parse::<u32>().ok();
    let (pid, state, old) = (number()?, number()?, number()?);
    let (state, old) = (i32::try_from(state).ok()?, i32::try_from(old).ok()?);
    let back = parts.next().map(str::to_owned);
    (pid == me).then_some(Left { state, old, back })
}

impl Left {
    /// What is in it. Nothing has been changed yet.
    ///
    /// # Errors
    /// When it cannot be read, or makes no sense.
    pub(crate) fn open(&self) -> Result<AppState, ResumeError> {
        AppState::read(&upgrade::read_sealed(self.state)?)
    }

    /// Gives everything back to the binary that left it. Returns only if that failed as well.
    pub(crate) fn go_back(&self, why: &ResumeError) -> Code {
        let text = words::plain(&why.to_string());
        if self.back.is_none() {
            let error = self.exec_old(&text);
            tell(&format!("cannot take over: {text}; cannot go back: {error}"));
        } else {
            tell(&format!("cannot go on: {text}"));
        }
        Code::Unexpected
    }

    fn exec_old(&self, why: &str) -> io::Error {
        use std::os::fd::AsFd;
        let path = format!("/proc/self/fd/{}", self.old);
        let old = match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(old) => old,
            Err(error) => return error.into(),
        };
        let value = format!("{}:{}:{}:{why}", std::process::id(), self.state, self.old);
        let variable = (upgrade::STATE_VARIABLE.into(), value.into());
        let argv: Vec<OsString> = std::env::args_os().collect();
        // All that was left is still open, and stays so over exec.
        upgrade::exec(old.as_fd(), &argv, &[variable], &Descriptors::default(), &[])
    }
}

/// For whoever looks at standard error; in the background nobody does, and workers leave as after any end of a primary.
fn tell(text: &str) {
    crate::say(io::stderr(), &format!("polyfork: {text}\n"));
}

/// The file that this process was started from, as it was called then.
pub(crate) fn own_binary() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_default();
    let text = path.to_string_lossy();
    match text.strip_suffix(" (deleted)") {
        Some(before) => before.into(),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_to_another_process_is_none_of_ours() {
        let left = read("7:5:6", 7).expect("ours");
        assert_eq!((left.state, left.old, left.back), (5, 6, None));
        assert_eq!(read("7:5:6:a: b", 7).and_then(|left| left.back).as_deref(), Some("a: b"));
        for text in ["8:5:6", "", "7", "7:5", "7:x:6", "7:-1:6", "-7:5:6"] {
            assert!(read(text, 7).is_none(), "{text}");
        }
    }
}
