//! The blocking forms, for programs without a runtime: [`spawn_sync`], [`exec_sync`], [`exec_file_sync`].
//!
//! One thread, the caller's, and one poll(2) over input, both outputs and the pidfd: input is written while output is
//! read, so that a child which answers before it has read everything cannot deadlock with us.
//!
//! The rule that surprises: the outputs must end too, not only the child; a process that it left behind and that
//! keeps them open is waited for, unless there is a time limit. Node does the same.
//!
//! References: Node `src/spawn_sync.cc`; poll(2).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use polyfork_sys::spawn::{Child as SysChild, is_unknown_child, send_signal};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::command::{Ends, Prepared};
use super::exec::{READ_BYTES, take_up_to, verdict};
use super::{Exec, ExecError, ExecErrorKind, Exit, Output, OutputStream, Signal, SpawnError};

/// Why a blocking run was cut short.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyncFault {
    /// Out of time; the child was sent its kill signal (`ETIMEDOUT`).
    #[error("timed out")]
    TimedOut,
    /// More output than allowed; the child was sent its kill signal (`ENOBUFS`).
    #[error("wrote more to {0} than max_buffer allows")]
    MaxBuffer(OutputStream),
    /// Its pipes or its end could not be followed; it was killed.
    #[error("lost: {0}")]
    Io(#[source] io::Error),
}

impl SyncFault {
    /// Node's error number for it.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            SyncFault::TimedOut => Some(libc::ETIMEDOUT),
            SyncFault::MaxBuffer(_) => Some(libc::ENOBUFS),
            SyncFault::Io(error) => error.raw_os_error(),
        }
    }
}

impl From<SyncFault> for ExecErrorKind {
    fn from(fault: SyncFault) -> Self {
        match fault {
            SyncFault::TimedOut => ExecErrorKind::Timeout,
            SyncFault::MaxBuffer(stream) => ExecErrorKind::MaxBuffer(stream),
            SyncFault::Io(error) => ExecErrorKind::Io(error),
        }
    }
}

/// What [`spawn_sync`] brings.
#[derive(Debug)]
pub struct SyncOutput {
    /// The process id it had.
    pub pid: u32,
    /// Code or signal, and all it wrote.
    pub output: Output,
    /// Whether we sent it a signal.
    pub killed: bool,
    /// Why it was cut short, if it was. Another exit code than 0 is none.
    pub error: Option<SyncFault>,
}

/// Runs a command to its end, blocking, and tells how it went: only a failed start is an error.
///
/// Takes a [`Command`](super::Command), or an [`Exec`] where there is input or a limit to be given. Slots 0 to 2 are as
/// for [`Exec`]; pipes beyond 2, and abort tokens, are for the other forms.
///
/// # Blocking
///
/// Until the child has ended and its outputs are closed, or the time limit has passed and it has obeyed the signal.
///
/// # Errors
///
/// [`SpawnError`]: it was not started.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::{Command, Exec, spawn_sync};
///
/// let done = spawn_sync(Exec::new(Command::new("cat")).input("hello"))?;
/// assert_eq!(done.output.stdout, b"hello");
/// assert!(done.output.exit.success() && done.error.is_none());
/// # Ok::<(), polyfork::child_process::SpawnError>(())
/// ```
pub fn spawn_sync(command: impl Into<Exec>) -> Result<SyncOutput, SpawnError> {
    let mut exec = command.into();
    exec.fill_slots();
    let limits = exec.command.limits().clone();
    let cancelled = limits.abort.as_ref().is_some_and(CancellationToken::is_cancelled);
    if limits.abort.is_some() && !cancelled {
        return Err(exec.command.invalid("an abort token cannot be waited for without a runtime"));
    }
    let Prepared { sys, ends, cgroup } = exec.command.prepare()?;
    if let Some((slot, _)) = ends.beyond.first_key_value() {
        let text = format!("stdio slot {slot}: pipes beyond 2 cannot be used without a runtime");
        return Err(exec.command.invalid(text));
    }
    let program = exec.command.shown_program();
    let pipes = Pipes::open(ends, exec.input.take().unwrap_or_default(), exec.max_buffer)
        .map_err(|source| SpawnError::Stdio { program, slot: 0, source })?;
    let deadline = limits.timeout.and_then(|limit| Instant::now().checked_add(limit));
    let child = sys.spawn()?;
    let run = Run { child, pipes, deadline, kill_signal: limits.kill_signal, killed: false };
    let done = run.finish();
    drop(cgroup);
    Ok(done)
}

/// [`exec`](super::exec()), blocking: the line in `/bin/sh`, what it wrote, or an error if it did not exit with 0.
///
/// Node's form copies the standard error to this process' own; this one leaves your terminal alone.
///
/// # Security
///
/// As [`exec`](super::exec()): never with input you do not control.
///
/// # Errors
///
/// [`ExecError`], with all that was written until then.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::exec_sync;
///
/// assert_eq!(exec_sync("echo $((6 * 7))")?.stdout, b"42\n");
/// assert_eq!(exec_sync("no-such-command").unwrap_err().code(), Some(127));
/// # Ok::<(), polyfork::child_process::ExecError>(())
/// ```
pub fn exec_sync(line: impl AsRef<OsStr>) -> Result<Output, ExecError> {
    super::exec(line).run_sync()
}

/// [`exec_file`](super::exec_file()), blocking: a program with arguments, no shell.
///
/// # Errors
///
/// [`ExecError`], with all that was written until then.
pub fn exec_file_sync(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Result<Output, ExecError> {
    super::exec_file(program, args).run_sync()
}

impl Exec {
    /// Runs it here and now, without a runtime. See [`spawn_sync`] for what blocks and for how long.
    ///
    /// # Errors
    ///
    /// [`ExecError`], with all that was written until then.
    pub fn run_sync(self) -> Result<Output, ExecError> {
        let line = self.command.shown_line();
        match spawn_sync(self) {
            Ok(SyncOutput { pid, output, killed, error }) => {
                verdict(output, error.map(ExecErrorKind::from), line, pid, killed)
            }
            Err(error) => {
                let kind = match error {
                    SpawnError::Aborted { .. } => ExecErrorKind::Aborted,
                    error => ExecErrorKind::Spawn(error),
                };
                Err(ExecError::new(kind, line, None, false, Output::default()))
            }
        }
    }
}

/// One output as it fills.
#[derive(Debug)]
struct Capture {
    pipe: Option<OwnedFd>,
    bytes: Vec<u8>,
    limit: usize,
}

impl Capture {
    /// Reads what is there; `false` when it was more than is allowed.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; READ_BYTES];
        let Some(pipe) = &self.pipe else { return Ok(true) };
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => {
                self.pipe = None;
                Ok(true)
            }
            Ok(read) => Ok(take_up_to(self.limit, &mut self.bytes, &buffer[..read])),
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

#[derive(Debug)]
struct Pipes {
    stdin: Option<OwnedFd>,
    input: Vec<u8>,
    written: usize,
    stdout: Capture,
    stderr: Capture,
}

impl Pipes {
    fn open(ends: Ends, input: Vec<u8>, limit: usize) -> io::Result<Self> {
        for end in [&ends.stdin, &ends.stdout, &ends.stderr].into_iter().flatten() {
            polyfork_sys::channel::set_nonblocking(end.as_fd(), true)?;
        }
        let capture = |pipe| Capture { pipe, bytes: Vec::new(), limit };
        // Nothing to write: the child reads the end at once.
        let stdin = ends.stdin.filter(|_| !input.is_empty());
        let (stdout, stderr) = (capture(ends.stdout), capture(ends.stderr));
        Ok(Self { stdin, input, written: 0, stdout, stderr })
    }

    /// Writes what fits. A reader that has gone is no error: not every program reads all of its input.
    fn write(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        match rustix::io::write(stdin, &self.input[self.written..]) {
            Ok(written) => self.written += written,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.stdin = None,
        }
        if self.written == self.input.len() {
            self.stdin = None;
        }
    }

    fn read(&mut self) -> Result<(), SyncFault> {
        for (capture, stream) in
            [(&mut self.stdout, OutputStream::Stdout), (&mut self.stderr, OutputStream::Stderr)]
        {
            if !capture.read().map_err(SyncFault::Io)? {
                return Err(SyncFault::MaxBuffer(stream));
            }
        }
        Ok(())
    }

    fn close(&mut self) {
        (self.stdin, self.stdout.pipe, self.stderr.pipe) = (None, None, None);
    }
}

/// A child that is run to its end.
struct Run {
    child: SysChild,
    pipes: Pipes,
    deadline: Option<Instant>,
    kill_signal: Signal,
    killed: bool,
}

impl Run {
    fn finish(mut self) -> SyncOutput {
        let (mut exit, mut error) = (None, None);
        if let Err(fault) = self.follow(&mut exit) {
            self.pipes.close();
            if exit.is_none() {
                let signal = match fault {
                    SyncFault::Io(_) => Signal::KILL,
                    _ => self.kill_signal,
                };
                let sent = send_signal(self.child.pidfd(), signal.number());
                self.killed = sent.is_ok();
            }
            error = Some(fault);
        }
        let exit = exit.unwrap_or_else(|| self.child.wait().map(Exit::from).unwrap_or_default());
        SyncOutput {
            pid: self.child.pid().as_raw_nonzero().get().unsigned_abs(),
            output: Output {
                exit,
                stdout: self.pipes.stdout.bytes,
                stderr: self.pipes.stderr.bytes,
            },
            killed: self.killed,
            error,
        }
    }

    /// Until the child has ended and its outputs have.
    fn follow(&mut self, exit: &mut Option<Exit>) -> Result<(), SyncFault> {
        loop {
            let outputs = self.pipes.stdout.pipe.is_some() || self.pipes.stderr.pipe.is_some();
            if exit.is_some() && !outputs {
                return Ok(());
            }
            if !self.wait(exit.is_none())? {
                return Err(SyncFault::TimedOut);
            }
            self.pipes.write();
            self.pipes.read()?;
            if exit.is_none() {
                *exit = match self.child.try_wait() {
                    Ok(status) => status.map(Exit::from),
                    Err(error) if is_unknown_child(&error) => Some(Exit::default()),
                    Err(error) => return Err(SyncFault::Io(error)),
                };
                if exit.is_some() {
                    self.pipes.stdin = None;
                }
            }
        }
    }

    /// Sleeps until there is something to do; `false` when the time is over.
    fn wait(&self, for_child: bool) -> Result<bool, SyncFault> {
        let mut fds = Vec::with_capacity(4);
        fds.extend(self.pipes.stdin.as_ref().map(|fd| PollFd::new(fd, PollFlags::OUT)));
        let outputs = [&self.pipes.stdout, &self.pipes.stderr];
        let outputs = outputs.into_iter().filter_map(|capture| capture.pipe.as_ref());
        fds.extend(outputs.map(|fd| PollFd::new(fd, PollFlags::IN)));
        if for_child {
            fds.push(PollFd::from_borrowed_fd(self.child.pidfd(), PollFlags::IN));
        }
        loop {
            let left = match self.deadline {
                None => None,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => Some(timespec(left)),
                    _ => return Ok(false),
                },
            };
            match rustix::event::poll(&mut fds, left.as_ref()) {
                // A time limit that has passed is seen at the top.
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(SyncFault::Io(error.into())),
            }
        }
    }
}

fn timespec(left: Duration) -> Timespec {
    let tv_sec = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: left.subsec_nanos().into() }
}
