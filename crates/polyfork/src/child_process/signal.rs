//! Signals as a caller names them: by number, or by name in any case.
//!
//! References: signal(7); Node `lib/internal/util.js` (`convertToValidSignal`).

use std::fmt;
use std::str::FromStr;

use polyfork_sys::spawn::MAX_SIGNAL;

/// Names and numbers; where two names share a number, the one to show comes first.
const NAMES: [(&str, i32); 34] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGPOLL),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
    ("UNUSED", libc::SIGSYS),
];

/// A signal of Linux, real-time signals included, or [`Signal::NONE`], which only asks whether somebody is there.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::Signal;
///
/// assert_eq!("sigterm".parse::<Signal>()?, Signal::TERM);
/// assert_eq!(Signal::try_from(9)?, Signal::KILL);
/// assert_eq!(Signal::KILL.to_string(), "SIGKILL");
/// assert!("SIGFOO".parse::<Signal>().is_err());
/// # Ok::<(), polyfork::child_process::UnknownSignal>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Signal(i32);

impl Signal {
    /// Number 0: nothing is sent, but whether it could be is told.
    pub const NONE: Self = Self(0);
    /// Hang-up.
    pub const HUP: Self = Self(libc::SIGHUP);
    /// Ctrl-C.
    pub const INT: Self = Self(libc::SIGINT);
    /// Ctrl-\\.
    pub const QUIT: Self = Self(libc::SIGQUIT);
    /// `abort(3)`.
    pub const ABRT: Self = Self(libc::SIGABRT);
    /// Cannot be caught.
    pub const KILL: Self = Self(libc::SIGKILL);
    /// Free for programs.
    pub const USR1: Self = Self(libc::SIGUSR1);
    /// Free for programs.
    pub const USR2: Self = Self(libc::SIGUSR2);
    /// A write that nobody can read.
    pub const PIPE: Self = Self(libc::SIGPIPE);
    /// The polite request to end; what is sent where nothing else is said.
    pub const TERM: Self = Self(libc::SIGTERM);
    /// Goes on after a stop.
    pub const CONT: Self = Self(libc::SIGCONT);
    /// Stops; cannot be caught.
    pub const STOP: Self = Self(libc::SIGSTOP);

    /// Its number on this machine.
    pub fn number(self) -> i32 {
        self.0
    }

    /// One that ended a process, which the kernel told.
    pub(crate) fn from_kernel(number: i32) -> Self {
        Self(number)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0),
        }
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<i32> for Signal {
    type Error = UnknownSignal;

    /// # Errors
    /// Below 0, above 64, or 32 and 33, which the C library keeps for itself.
    fn try_from(number: i32) -> Result<Self, UnknownSignal> {
        match number {
            32 | 33 => Err(UnknownSignal(number.to_string())),
            0..=MAX_SIGNAL => Ok(Self(number)),
            _ => Err(UnknownSignal(number.to_string())),
        }
    }
}

impl FromStr for Signal {
    type Err = UnknownSignal;

    /// `SIGTERM`, `sigterm`, `TERM` or `15`.
    ///
    /// # Errors
    /// No signal of this name or number.
    fn from_str(text: &str) -> Result<Self, UnknownSignal> {
        let unknown = || UnknownSignal(text.to_owned());
        if let Ok(number) = text.parse::<i32>() {
            return Self::try_from(number).map_err(|_| unknown());
        }
        let upper = text.to_ascii_uppercase();
        let short = upper.strip_prefix("SIG").unwrap_or(&upper);
        let found = NAMES.iter().find(|(name, _)| *name == short);
        found.map(|(_, number)| Self(*number)).ok_or_else(unknown)
    }
}

/// There is no such signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown signal: {0:?}")]
pub struct UnknownSignal(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_any_case_and_numbers_are_read() {
        for text in ["SIGKILL", "sigkill", "SigKill", "kill", "9"] {
            assert_eq!(text.parse(), Ok(Signal::KILL), "{text}");
        }
        assert_eq!(Signal::try_from(40).map(Signal::number), Ok(40));
        for text in ["", "SIG", "SIGSIGKILL", "65", "-1", "32", "9 ", "foo"] {
            assert_eq!(text.parse::<Signal>(), Err(UnknownSignal(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn every_name_is_shown_as_it_is_read() {
        for (_, number) in NAMES {
            let signal = Signal(number);
            assert_eq!(signal.to_string().parse(), Ok(signal));
        }
        assert_eq!(Signal(40).to_string(), "signal 40");
    }
}
