//! Takes back what a stuck process has not read from its end of a channel, without its help.
//!
//! A worker whose event loop hangs keeps connections in its channel that somebody else could serve. We stop it
//! (SIGSTOP cannot be ignored), copy its descriptor with `pidfd_getfd`, empty the socket through
//! the copy, and let it go on. Whether a worker is stuck, and what to do with the loot, is decided
//! by `polyfork-core`.
//!
//! All or nothing: a stopped process is in no system call, so each message is either wholly in its own
//! memory (it received it) or still in the socket (we get it), and so is each descriptor. What it
//! had begun to read stays with it: the first bytes taken may be the middle of a frame.
//!
//! Behaviour follows: pidfd_getfd(2) (Linux 5.6; needs the right to ptrace), signal(7), proc(5).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Pid, PidfdGetfdFlags, Signal};

use crate::channel::{self, FdKind};

/// How long a process gets to stop. It takes microseconds unless it is in uninterruptible sleep.
const STOP_LIMIT: Duration = Duration::from_millis(500);
/// Between two looks at its state; the wait ends at once should the process end.
const STOP_POLL: Duration = Duration::from_micros(200);
const READ_BYTES: usize = 64 * 1024;

/// One message as it came out of the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes of [`Unread::bytes`], in order.
    pub bytes: usize,
    /// Descriptors of [`Unread::fds`], in order. They came with this chunk's first bytes.
    pub fds: usize,
    /// Descriptors were lost because this process is at its descriptor limit.
    pub truncated: bool,
}

/// What was taken.
#[derive(Debug, Default)]
pub struct Unread {
    /// All bytes. May begin in the middle of a frame whose start the process has read.
    pub bytes: Vec<u8>,
    /// All descriptors, close-on-exec.
    pub fds: VecDeque<OwnedFd>,
    /// How bytes and descriptors belong together.
    pub chunks: Vec<Chunk>,
    /// Our own end has been closed for writing.
    pub ended: bool,
    /// The process was stopped already, and so was left stopped.
    pub was_stopped: bool,
    /// Somebody else let the process go on before we had finished: it may have read in between,
    /// so what was taken is complete, but not necessarily without a gap.
    pub disturbed: bool,
}

/// Why nothing could be taken. The process goes on as it was in every case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StealError {
    /// The process has ended.
    #[error("process {0} has ended")]
    Gone(i32),
    /// No right to copy its descriptors (another user, no ptrace right, old kernel, seccomp).
    #[error("not permitted to stop process {pid} and copy its descriptor")]
    NotPermitted {
        /// The process.
        pid: i32,
        /// `EPERM` or `ENOSYS`.
        #[source]
        errno: io::Error,
    },
    /// It did not stop in time; it is probably in uninterruptible sleep.
    #[error("process {0} does not stop")]
    DoesNotStop(i32),
    /// The number is closed there.
    #[error("process {pid} has no descriptor {number}")]
    NoDescriptor {
        /// The process.
        pid: i32,
        /// The descriptor number.
        number: i32,
    },
    /// The number is open there, but is not the channel.
    #[error("descriptor {number} of process {pid} is not its channel (but {kind:?})")]
    NotTheChannel {
        /// The process.
        pid: i32,
        /// The descriptor number.
        number: i32,
        /// What it is instead; `UnixStream` when it is a different one.
        kind: FdKind,
    },
    /// Anything else.
    #[error("{step} of process {pid}")]
    System {
        /// What was being done.
        step: &'static str,
        /// The process.
        pid: i32,
        /// Its error.
        #[source]
        errno: io::Error,
    },
}

/// Takes all unread bytes and descriptors from `channel_fd`, a number in the table of process `pid`.
///
/// Stops the process if it is not stopped and lets it go on afterwards if so. What is written to
/// the channel later reaches the process as ever. `pid` must be the process of `pidfd`.
///
/// # Blocking
///
/// Until the process has stopped, at most half a second; usually well below a millisecond.
///
/// # Errors
///
/// See [`StealError`]. Nothing has been taken then.
pub fn unread(pidfd: BorrowedFd<'_>, pid: Pid, channel_fd: i32) -> Result<Unread, StealError> {
    unread_checked(pidfd, pid, channel_fd, None)
}

/// As [`unread`], and makes sure by its [`channel::cookie`] that the number still means that socket.
///
/// # Errors
///
/// See [`StealError`].
pub fn unread_checked(
    pidfd: BorrowedFd<'_>,
    pid: Pid,
    channel_fd: i32,
    cookie: Option<u64>,
) -> Result<Unread, StealError> {
    let victim = Victim { pidfd, pid };
    let stopped = Stopped::ensure(victim)?;
    let socket = victim.copy(channel_fd)?;
    victim.verify(socket.as_fd(), channel_fd, cookie)?;
    let mut unread =
        drain(socket.as_fd()).map_err(|errno| victim.system("read the channel", errno))?;
    unread.was_stopped = !stopped.by_us;
    // If it cannot be looked at any more it was killed, and read nothing.
    unread.disturbed = !victim.is_stopped().unwrap_or(true);
    Ok(unread)
}

/// Does something while a process stands still, so that it cannot be in the middle of a system call. `pid` must be the
/// process of `pidfd`; it goes on afterwards unless it was stopped before.
///
/// # Blocking
///
/// As [`unread`], and for as long as `act` takes.
///
/// # Errors
///
/// Those of [`StealError`] that concern stopping. `act` was not called then.
pub fn while_stopped<T>(
    pidfd: BorrowedFd<'_>,
    pid: Pid,
    act: impl FnOnce() -> T,
) -> Result<T, StealError> {
    let _stopped = Stopped::ensure(Victim { pidfd, pid })?;
    Ok(act())
}

/// The process id a pidfd stands for, in our pid namespace.
///
/// # Errors
///
/// [`StealError::System`] when `/proc` cannot tell; [`StealError::Gone`] when it was collected.
pub(crate) fn pid_of(pidfd: BorrowedFd<'_>) -> Result<Pid, StealError> {
    use std::os::fd::AsRawFd;
    let unknown = |errno| StealError::System { step: "find the number", pid: 0, errno };
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(path).map_err(unknown)?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:")).map(str::trim);
    let pid = number.and_then(|number| number.parse().ok()).and_then(Pid::from_raw);
    pid.filter(|pid| pid.as_raw_nonzero().get() > 0)
        .ok_or_else(|| unknown(io::Error::from_raw_os_error(libc::ESRCH)))
}

/// The process we take from.
#[derive(Clone, Copy, Debug)]
struct Victim<'a> {
    pidfd: BorrowedFd<'a>,
    pid: Pid,
}

impl Victim<'_> {
    fn number(self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    fn system(self, step: &'static str, errno: io::Error) -> StealError {
        StealError::System { step, pid: self.number(), errno }
    }

    fn signal(self, signal: Signal) -> Result<(), StealError> {
        match rustix::process::pidfd_send_signal(self.pidfd, signal) {
            Ok(()) => Ok(()),
            Err(Errno::SRCH) => Err(StealError::Gone(self.number())),
            Err(errno @ Errno::PERM) => {
                Err(StealError::NotPermitted { pid: self.number(), errno: errno.into() })
            }
            Err(errno) => Err(self.system("signal", errno.into())),
        }
    }

    /// Whether it ended within `limit`.
    fn ended_within(self, limit: Duration) -> io::Result<bool> {
        let mut poll = [PollFd::from_borrowed_fd(self.pidfd, PollFlags::IN)];
        let limit = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
        match rustix::event::poll(&mut poll, Some(&limit)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether every thread of it is stopped: a thread still on its way could be inside recvmsg.
    fn is_stopped(self) -> io::Result<bool> {
        let folder = format!("/proc/{}/task", self.pid.as_raw_nonzero());
        for task in std::fs::read_dir(folder)? {
            match std::fs::read(task?.path().join("stat")) {
                Ok(stat) if matches!(state(&stat), Some(b'T' | b't' | b'Z' | b'X')) => {}
                Ok(_) => return Ok(false),
                // The thread has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn copy(self, number: i32) -> Result<OwnedFd, StealError> {
        rustix::process::pidfd_getfd(self.pidfd, number, PidfdGetfdFlags::empty()).map_err(
            |errno| {
                let pid = self.number();
                match errno {
                    Errno::PERM | Errno::NOSYS => {
                        StealError::NotPermitted { pid, errno: errno.into() }
                    }
                    Errno::BADF => StealError::NoDescriptor { pid, number },
                    Errno::SRCH => StealError::Gone(pid),
                    other => self.system("copy a descriptor", other.into()),
                }
            },
        )
    }

    fn verify(
        self,
        socket: BorrowedFd<'_>,
        number: i32,
        cookie: Option<u64>,
    ) -> Result<(), StealError> {
        let look = |errno| self.system("look at the channel", errno);
        let kind = channel::kind(socket).map_err(look)?;
        let same = match cookie {
            Some(cookie) if kind == FdKind::UnixStream => {
                channel::cookie(socket).map_err(look)? == cookie
            }
            _ => kind == FdKind::UnixStream,
        };
        if same {
            return Ok(());
        }
        Err(StealError::NotTheChannel { pid: self.number(), number, kind })
    }
}

/// A process held still; goes on when this is dropped, if it was we who stopped it.
#[derive(Debug)]
struct Stopped<'a> {
    victim: Victim<'a>,
    by_us: bool,
}

impl<'a> Stopped<'a> {
    fn ensure(victim: Victim<'a>) -> Result<Self, StealError> {
        let look = |errno: io::Error| match errno.kind() {
            io::ErrorKind::NotFound => StealError::Gone(victim.number()),
            _ => victim.system("look at", errno),
        };
        if victim.ended_within(Duration::ZERO).map_err(look)? {
            return Err(StealError::Gone(victim.number()));
        }
        if victim.is_stopped().map_err(look)? {
            return Ok(Self { victim, by_us: false });
        }
        victim.signal(Signal::STOP)?;
        let stopped = Self { victim, by_us: true };
        let started = Instant::now();
        while !victim.is_stopped().map_err(look)? {
            if victim.ended_within(STOP_POLL).map_err(look)? {
                return Err(StealError::Gone(victim.number()));
            }
            if started.elapsed() > STOP_LIMIT {
                return Err(StealError::DoesNotStop(victim.number()));
            }
        }
        Ok(stopped)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if self.by_us {
            // ESRCH: it was killed meanwhile. There is no other way for this to fail.
            let _gone = self.victim.signal(Signal::CONT);
        }
    }
}

/// The state letter of a line of `/proc/PID/stat`: the field after the command, which may contain anything.
fn state(stat: &[u8]) -> Option<u8> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(end + 2).copied()
}

fn drain(socket: BorrowedFd<'_>) -> io::Result<Unread> {
    let mut unread = Unread::default();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let before = unread.fds.len();
        let flags = RecvFlags::DONTWAIT;
        match channel::receive_with(socket, &mut buffer, &mut unread.fds, flags) {
            Ok(received) if received.len == 0 => {
                unread.ended = true;
                return Ok(unread);
            }
            Ok(received) => {
                unread.bytes.extend_from_slice(&buffer[..received.len]);
                unread.chunks.push(Chunk {
                    bytes: received.len,
                    fds: unread.fds.len() - before,
                    truncated: received.truncated,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(unread),
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {
                unread.ended = true;
                return Ok(unread);
            }
            // What has been taken cannot be put back, so it is given out.
            Err(_) if !unread.chunks.is_empty() => return Ok(unread),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_found_behind_any_command_name() {
        assert_eq!(state(b"12 (node) S 1 12"), Some(b'S'));
        assert_eq!(state(b"12 (a) T (b) R 1 12"), Some(b'R'));
        assert_eq!(state(b"12 (nod"), None);
        assert_eq!(state(b"12 (x)"), None);
    }
}
