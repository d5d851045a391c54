//! `waitid(2)` with the two answers rustix leaves out: whose status it is, as std's `ExitStatus`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::Pid;

/// Whom to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    Any,
    Pid(Pid),
    PidFd(BorrowedFd<'a>),
}

/// What was learnt about a child.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) pid: Pid,
    /// `CLD_EXITED`, `CLD_KILLED`, `CLD_DUMPED` or `CLD_STOPPED`.
    code: i32,
    /// Exit code or signal number, depending on `code`.
    value: i32,
}

impl Report {
    /// The status in std's form. For a stopped child this is a "stopped" status.
    pub(crate) fn status(self) -> ExitStatus {
        ExitStatus::from_raw(match self.code {
            libc::CLD_EXITED => (self.value & 0xff) << 8,
            libc::CLD_DUMPED => (self.value & 0x7f) | 0x80,
            libc::CLD_STOPPED => ((self.value & 0xff) << 8) | 0x7f,
            _ => self.value & 0x7f,
        })
    }

    /// The signal that stopped the child, if it is stopped.
    pub(crate) fn stop_signal(self) -> Option<i32> {
        (self.code == libc::CLD_STOPPED).then_some(self.value)
    }
}

/// Calls `waitid(2)` with `options`, starting over when a signal interrupts it.
///
/// # Errors
///
/// `ECHILD`: there is no such child, or somebody else has collected it.
pub(crate) fn wait(target: Target<'_>, options: i32) -> io::Result<Option<Report>> {
    let (kind, id) = match target {
        Target::Any => (libc::P_ALL, 0),
        Target::Pid(pid) => (libc::P_PID, pid.as_raw_nonzero().get() as libc::id_t),
        Target::PidFd(fd) => (libc::P_PIDFD, fd.as_raw_fd() as libc::id_t),
    };
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: `info` is writable memory of the size the kernel fills, and lives over the call.
        if unsafe { libc::waitid(kind, id, info.as_mut_ptr(), options) } == -1 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            return Err(error);
        }
        // SAFETY: zeroed above and then possibly filled by the kernel; all bit patterns are valid.
        let info = unsafe { info.assume_init() };
        // SAFETY: waitid fills the SIGCHLD members, and with WNOHANG and no news leaves them zero.
        let pid = unsafe { info.si_pid() };
        // SAFETY: as above.
        let value = unsafe { info.si_status() };
        return Ok(Pid::from_raw(pid).map(|pid| Report { pid, code: info.si_code, value }));
    }
}
