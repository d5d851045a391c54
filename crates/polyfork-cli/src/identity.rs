//! `--user` and `--umask`: what has to happen as root happens, then the process is somebody else.
//!
//! The order is what matters. As root: the app's name is claimed in root's runtime folder, so that root's commands find it;
//! its folder of logs is made; both are given to the user. The programs that the kernel mechanism needs are loaded. Then
//! the user, all groups and all capabilities but one are changed for good, before the program is even looked at and before
//! there is a second thread.
//!
//! The surprising rule: sockets are bound *after* that, also those of ports below 1024, with the one capability that is
//! kept (`CAP_NET_BIND_SERVICE`). The kernel lets only sockets of one user share a port; a group that root had begun could
//! not grow later, and a reload to another low port would fail. Workers have no capability at all.
//!
//! References: capabilities(7); kernel `inet_csk_get_port` (`sk_reuseport_match`: the same user).

use std::ffi::{OsStr, OsString};
use std::path::Path;

use polyfork::identity::{self, Account, Keep};
use rustix::fs::Mode;

use crate::args::choices::{MechanismArg, PolicyArg};
use crate::args::run::{IdentityArgs, RunArgs};
use crate::control::folder::Claim;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::logs::folder as log_folder;
use crate::run::Refused;
use crate::run::place::{claim_a_name, claim_in_background};
use crate::words;

/// How many addresses can have exact turns after the right to load programs is gone.
const PROGRAMS: usize = 4;

/// What was made while it was permitted.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// The app's name, or why it has none.
    pub(crate) claim: Option<Result<Claim, String>>,
    /// Its folder of logs.
    pub(crate) logs: Option<log_folder::Folder>,
}

/// What is wanted of [`settle`].
pub(crate) struct Wants<'a> {
    /// What the app is to be called.
    pub(crate) name: &'a str,
    /// Whether somebody chose that.
    pub(crate) explicit: bool,
    /// Whether it is to be reached by commands.
    pub(crate) controlled: bool,
    /// In the background: the folder of all logs, as it was given.
    pub(crate) logs: Option<Option<&'a Path>>,
}

/// Sets the umask and becomes the user, if that was asked for. `None`: nobody asked for another user.
///
/// # Errors
/// Who is meant is not known, or one of the steps failed; then nothing was started.
pub(crate) fn settle(args: &RunArgs, wants: &Wants<'_>) -> Result<Option<Settled>, Refused> {
    if let Some(mask) = args.identity.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    let Some(account) = wanted(&args.identity)? else { return Ok(None) };
    let me = rustix::process::geteuid().as_raw();
    if me != 0 {
        if account.uid == me {
            // It is so already. Groups and capabilities are as whoever started it wanted them.
            return Ok(None);
        }
        let text = format!(
            "--user {}: only root may become another user; this is user {me}",
            shown(&account.name)
        );
        return Err(Verdict { code: Code::Usage, text });
    }
    let mut settled = Settled::default();
    if let Some(given) = wants.logs {
        let claim = claim_in_background(wants.name, wants.explicit)?;
        give(&claim, &account)?;
        let root = log_folder::root(given)?;
        settled.logs = Some(log_folder::Folder::make_for(
            &root,
            claim.name(),
            Some((account.uid, account.gid)),
        )?);
        settled.claim = Some(Ok(claim));
    } else if wants.controlled {
        let claim = claim_a_name(wants.name, wants.explicit)?;
        if let Ok(claim) = &claim {
            give(claim, &account)?;
        }
        settled.claim = Some(claim);
    }
    load_programs(args);
    let keep = Keep { low_ports: true, maps: !maps_need_no_right() };
    identity::become_user(&account, keep).map_err(|error| {
        let text = format!("--user {}: {error}", shown(&account.name));
        Verdict { code: Code::Unexpected, text: words::plain(&text) }
    })?;
    Ok(Some(settled))
}

fn give(claim: &Claim, account: &Account) -> Result<(), Refused> {
    claim.give_to(account.uid, account.gid).map_err(|error| {
        let text = format!("cannot give the folder of {} to the user: {error}", claim.name());
        Verdict { code: Code::NoFolder, text: words::plain(&text) }
    })
}

/// Programs for sockets to come. That there are none is told where a socket is bound.
fn load_programs(args: &RunArgs) {
    let by_kernel = args.mechanism != MechanismArg::Handoff && args.policy != PolicyArg::Shared;
    if by_kernel {
        // The reason comes again with the socket that has to do without.
        let _ = identity::load_in_advance(PROGRAMS);
    }
}

/// Since 6.0 a map may be changed by whoever has its descriptor, however `kernel.unprivileged_bpf_disabled` is set.
fn maps_need_no_right() -> bool {
    let release = rustix::system::uname();
    let major =
        release.release().to_str().ok().and_then(|text| text.split('.').next()?.parse().ok());
    major.is_none_or(|major: u32| major >= 6)
}

/// Finds out whether the user that is meant exists, and becomes nobody.
///
/// # Errors
/// Who is not known.
pub(crate) fn look_up(args: &IdentityArgs) -> Result<(), Refused> {
    wanted(args).map(drop)
}

/// The account that is meant.
fn wanted(args: &IdentityArgs) -> Result<Option<Account>, Refused> {
    let Some(text) = args.user.as_deref() else { return Ok(None) };
    let refused =
        |why: String| Verdict { code: Code::Usage, text: format!("--user {}: {why}", shown(text)) };
    let (user, group) = split(text);
    let broken =
        |error: std::io::Error| refused(words::plain(&format!("cannot look it up: {error}")));
    let gid = match &group {
        None => None,
        Some(name) => Some(
            identity::group(name)
                .map_err(broken)?
                .ok_or_else(|| refused(format!("no such group: {}", shown(name))))?,
        ),
    };
    match identity::account(&user, gid).map_err(broken)? {
        Some(account) => Ok(Some(account)),
        None if user.to_str().is_some_and(|user| user.parse::<u32>().is_ok()) => {
            Err(refused("a number without an account needs a group: UID:GID".to_owned()))
        }
        None => Err(refused(format!("no such user: {}", shown(&user)))),
    }
}

/// `NAME` or `NAME:GROUP`.
fn split(text: &OsStr) -> (OsString, Option<OsString>) {
    use std::os::unix::ffi::OsStrExt;
    let bytes = text.as_bytes();
    match bytes.iter().position(|byte| *byte == b':') {
        Some(at) => (
            OsStr::from_bytes(&bytes[..at]).to_owned(),
            Some(OsStr::from_bytes(&bytes[at + 1..]).to_owned()).filter(|group| !group.is_empty()),
        ),
        None => (text.to_owned(), None),
    }
}

fn shown(text: &OsStr) -> String {
    words::harmless(&text.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_may_follow_the_user() {
        let read = |text: &str| {
            let (user, group) = split(OsStr::new(text));
            (user.into_string().unwrap(), group.map(|group| group.into_string().unwrap()))
        };
        assert_eq!(read("www"), ("www".into(), None));
        assert_eq!(read("www:"), ("www".into(), None));
        assert_eq!(read("www:adm"), ("www".into(), Some("adm".into())));
        assert_eq!(read("33:33"), ("33".into(), Some("33".into())));
    }

    #[test]
    fn who_does_not_exist_is_told_by_name() {
        let args = IdentityArgs { user: Some("no-such-\x1buser".into()), umask: None };
        let told = wanted(&args).unwrap_err();
        assert_eq!(told.code, Code::Usage);
        assert_eq!(told.text, "--user no-such-\\u{1b}user: no such user: no-such-\\u{1b}user");
    }
}
