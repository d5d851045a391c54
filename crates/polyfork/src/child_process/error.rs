//! Why a process could not be started, and why a command that was run to its end did not succeed.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::exec::Output;
use super::{Exit, Signal};

/// Why a process could not be started. No process exists then, and none did that anybody could have noticed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The command makes no sense; the text names what and where.
    #[error("cannot start {program:?}: {reason}")]
    Invalid {
        /// The program as the command names it.
        program: String,
        /// What is wrong.
        reason: String,
    },
    /// Its token was cancelled before the start.
    #[error("cannot start {program:?}: aborted before it was started")]
    Aborted {
        /// The program as the command names it.
        program: String,
    },
    /// A pipe or socket for one of its slots could not be made: out of descriptors, usually.
    #[error("cannot start {program:?}: stdio slot {slot}: {source}")]
    Stdio {
        /// The program as the command names it.
        program: String,
        /// The descriptor number the child should have found it under.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A control group of its own could not be made.
    #[error("cannot start {program:?}: a control group of its own: {source}")]
    Cgroup {
        /// The program as the command names it.
        program: String,
        /// What the kernel said; usually that it is not permitted.
        source: io::Error,
    },
    /// There is no tokio runtime to watch the child with.
    #[error("cannot start {program:?}: not inside a tokio runtime (use the blocking forms)")]
    NoRuntime {
        /// The program as the command names it.
        program: String,
    },
    /// It was started and could not be watched, so it was killed and collected again.
    #[error("cannot watch {program:?}: {source}")]
    Watch {
        /// The program as the command names it.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The start itself failed: not found, not permitted, a missing directory, no right to change the user.
    #[error(transparent)]
    Start(#[from] polyfork_sys::spawn::SpawnError),
}

impl SpawnError {
    /// The error number of the system call that failed, where there was one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.io_error()?.raw_os_error()
    }

    /// The kind of error, where a system call failed; `InvalidInput` for a command that makes no sense.
    pub fn io_kind(&self) -> io::ErrorKind {
        match self {
            SpawnError::Invalid { .. } => io::ErrorKind::InvalidInput,
            SpawnError::Aborted { .. } => io::ErrorKind::Interrupted,
            other => other.io_error().map_or(io::ErrorKind::Other, io::Error::kind),
        }
    }

    /// Whether the program was not found, as opposed to found and not startable, or a missing working directory.
    pub fn is_not_found(&self) -> bool {
        matches!(self, SpawnError::Start(error) if error.is_not_found())
    }

    /// The paths at which the program was looked for, in order.
    pub fn tried(&self) -> &[PathBuf] {
        match self {
            SpawnError::Start(error) => &error.tried,
            _ => &[],
        }
    }

    fn io_error(&self) -> Option<&io::Error> {
        match self {
            SpawnError::Start(error) => Some(&error.errno),
            SpawnError::Stdio { source, .. }
            | SpawnError::Cgroup { source, .. }
            | SpawnError::Watch { source, .. } => Some(source),
            SpawnError::Invalid { .. }
            | SpawnError::Aborted { .. }
            | SpawnError::NoRuntime { .. } => None,
        }
    }
}

/// One of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl fmt::Display for OutputStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OutputStream::Stdout => "stdout",
            OutputStream::Stderr => "stderr",
        })
    }
}

/// What kept a command from success.
#[derive(Debug)]
#[non_exhaustive]
pub enum ExecErrorKind {
    /// It was never started.
    Spawn(SpawnError),
    /// It ended with another code than 0, or by a signal that was not ours.
    Failed,
    /// It had not ended in time and was killed (`ETIMEDOUT` in Node's blocking forms).
    Timeout,
    /// It wrote more than was allowed and was killed (`ERR_CHILD_PROCESS_STDIO_MAXBUFFER`, `ENOBUFS`).
    MaxBuffer(OutputStream),
    /// Its token was cancelled and it was killed.
    Aborted,
    /// It was started, but its pipes or its end could not be followed.
    Io(io::Error),
}

#[derive(Debug)]
struct Parts {
    kind: ExecErrorKind,
    command: String,
    pid: Option<u32>,
    killed: bool,
    output: Output,
}

/// A command run by [`exec`](super::exec()) or one of its relatives did not succeed.
///
/// Shown as Node shows it: `Command failed: <command>`, and what it wrote to its standard error on the lines below.
#[derive(Debug)]
pub struct ExecError(Box<Parts>);

impl ExecError {
    pub(super) fn new(
        kind: ExecErrorKind,
        command: String,
        pid: Option<u32>,
        killed: bool,
        output: Output,
    ) -> Self {
        Self(Box::new(Parts { kind, command, pid, killed, output }))
    }

    /// What happened.
    pub fn kind(&self) -> &ExecErrorKind {
        &self.0.kind
    }

    /// The command line: as given for a shell, else program and arguments with blanks between them.
    pub fn command(&self) -> &str {
        &self.0.command
    }

    /// Its process id, if it was started.
    pub fn pid(&self) -> Option<u32> {
        self.0.pid
    }

    /// The exit code, if it exited by itself. 127 from a shell usually means: no such command.
    pub fn code(&self) -> Option<i32> {
        self.0.output.exit.code
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<Signal> {
        self.0.output.exit.signal
    }

    /// Whether we sent it a signal.
    pub fn killed(&self) -> bool {
        self.0.killed
    }

    /// Code and signal together.
    pub fn exit(&self) -> Exit {
        self.0.output.exit
    }

    /// What it wrote to its standard output until then.
    pub fn stdout(&self) -> &[u8] {
        &self.0.output.stdout
    }

    /// What it wrote to its standard error until then.
    pub fn stderr(&self) -> &[u8] {
        &self.0.output.stderr
    }

    /// Everything it wrote until then.
    pub fn into_output(self) -> Output {
        self.0.output
    }

    /// The error number Node's blocking forms give: `ETIMEDOUT`, `ENOBUFS`, or that of the failed start.
    pub fn raw_os_error(&self) -> Option<i32> {
        match &self.0.kind {
            ExecErrorKind::Spawn(error) => error.raw_os_error(),
            ExecErrorKind::Timeout => Some(libc::ETIMEDOUT),
            ExecErrorKind::MaxBuffer(_) => Some(libc::ENOBUFS),
            ExecErrorKind::Io(error) => error.raw_os_error(),
            ExecErrorKind::Failed | ExecErrorKind::Aborted => None,
        }
    }
}

impl fmt::Display for ExecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let command = self.command();
        match self.kind() {
            ExecErrorKind::Spawn(error) => return write!(f, "{error}"),
            ExecErrorKind::Failed => write!(f, "Command failed: {command}")?,
            ExecErrorKind::Timeout => write!(f, "Command timed out: {command}")?,
            ExecErrorKind::MaxBuffer(stream) => {
                write!(f, "Command wrote more to {stream} than max_buffer allows: {command}")?;
            }
            ExecErrorKind::Aborted => write!(f, "Command was aborted: {command}")?,
            ExecErrorKind::Io(error) => write!(f, "Command was lost ({error}): {command}")?,
        }
        if !self.stderr().is_empty() {
            write!(f, "\n{}", self.0.output.stderr_lossy())?;
        }
        Ok(())
    }
}

impl std::error::Error for ExecError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self.kind() {
            ExecErrorKind::Spawn(error) => Some(error),
            ExecErrorKind::Io(error) => Some(error),
            _ => None,
        }
    }
}
