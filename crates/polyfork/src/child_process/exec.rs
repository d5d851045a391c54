//! A command run to its end, its output collected: [`exec`] and [`exec_file`].
//!
//! Says what success is and what to do when it is not to be had (over the limit, out of time, aborted). The blocking
//! way to the same result is in `sync`; both end in the same [`verdict`].
//!
//! The rule that surprises: a command that is killed for its output or its time is not read any further, so that what
//! it left behind cannot hold up the answer by keeping a pipe open.
//!
//! References: Node `lib/child_process.js` (`execFile`, `exithandler`).

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::str::Utf8Error;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::child::{Child, News};
use super::error::{ExecError, ExecErrorKind, OutputStream};
use super::stdio::ChildStdin;
use super::{Command, Exit, Shell, Signal, Stdio};

/// What each output may hold unless said otherwise: 1 MiB, as in Node.
pub const DEFAULT_MAX_BUFFER: usize = 1024 * 1024;
/// Read at a time.
pub(super) const READ_BYTES: usize = 16 * 1024;

/// How a command ended and all it wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Code or signal.
    pub exit: Exit,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    ///
    /// # Errors
    /// It is not UTF-8.
    pub fn stdout_str(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.stdout)
    }

    /// Standard error as text.
    ///
    /// # Errors
    /// It is not UTF-8.
    pub fn stderr_str(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.stderr)
    }

    /// Standard output as text, what is not UTF-8 replaced by U+FFFD, which is what Node gives.
    pub fn stdout_lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }

    /// Standard error as text, what is not UTF-8 replaced by U+FFFD.
    pub fn stderr_lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stderr)
    }
}

/// A command to be run to its end. `.await` it, [`start`](Self::start) it to keep hold of it, or
/// [`run_sync`](Self::run_sync) it where there is no runtime.
///
/// Its standard input is empty unless [`input`](Self::input) is given (Node leaves it open, and a command that reads it
/// would wait for ever); both outputs are collected unless the command says where they go. Dropping the future kills the
/// command with its kill signal.
#[derive(Debug)]
#[must_use = "nothing is run until it is awaited, started or run"]
pub struct Exec {
    pub(super) command: Command,
    pub(super) input: Option<Vec<u8>>,
    pub(super) max_buffer: usize,
}

/// Runs a line in `/bin/sh` and collects what it writes.
///
/// # Security
///
/// The shell runs whatever the line says: never build it from input you do not control. [`exec_file`] needs no shell.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::exec;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), polyfork::child_process::ExecError> {
/// let output = exec("printf one; printf two >&2").await?;
/// assert_eq!(output.stdout_str(), Ok("one"));
///
/// let error = exec("echo no such thing >&2; exit 3").await.unwrap_err();
/// assert_eq!(error.code(), Some(3));
/// assert_eq!(error.to_string(), "Command failed: echo no such thing >&2; exit 3\nno such thing\n");
/// # Ok(())
/// # }
/// ```
pub fn exec(line: impl AsRef<OsStr>) -> Exec {
    let mut command = Command::new(line);
    command.shell(Shell::Default);
    Exec::new(command)
}

/// Runs a program with arguments and collects what it writes. No shell is involved.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::exec_file;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), polyfork::child_process::ExecError> {
/// let output = exec_file("echo", ["$HOME; not a command"]).await?;
/// assert_eq!(output.stdout_str(), Ok("$HOME; not a command\n"));
/// # Ok(())
/// # }
/// ```
pub fn exec_file(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Exec {
    let mut command = Command::new(program);
    command.args(args);
    Exec::new(command)
}

impl From<Command> for Exec {
    fn from(command: Command) -> Self {
        Exec::new(command)
    }
}

impl Exec {
    /// Runs a command that was put together elsewhere.
    pub fn new(mut command: Command) -> Self {
        command.kill_on_drop(true);
        Self { command, input: None, max_buffer: DEFAULT_MAX_BUFFER }
    }

    /// How many bytes each output may hold: [`DEFAULT_MAX_BUFFER`] unless said, `usize::MAX` for no limit. So many are
    /// fine; with one more the command is killed and what fits is in the error.
    pub fn max_buffer(mut self, bytes: usize) -> Self {
        self.max_buffer = bytes;
        self
    }

    /// What the command reads from its standard input; the input ends after it. A command that does not read all of it
    /// is fine.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// See [`Command::timeout`]: the result is an error of kind [`ExecErrorKind::Timeout`].
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.command.timeout(limit);
        self
    }

    /// See [`Command::kill_signal`].
    pub fn kill_signal(mut self, signal: Signal) -> Self {
        self.command.kill_signal(signal);
        self
    }

    /// See [`Command::abort`]: the result is an error of kind [`ExecErrorKind::Aborted`]. Not for the blocking form.
    pub fn abort(mut self, token: CancellationToken) -> Self {
        self.command.abort(token);
        self
    }

    /// See [`Command::current_dir`].
    pub fn current_dir(mut self, path: impl AsRef<Path>) -> Self {
        self.command.current_dir(path);
        self
    }

    /// See [`Command::env`].
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// See [`Command::env_clear`].
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    /// See [`Command::shell`], with its warning.
    pub fn shell(mut self, shell: impl Into<Shell>) -> Self {
        self.command.shell(shell);
        self
    }

    /// Everything else a [`Command`] can be told.
    pub fn configure(
        mut self,
        change: impl for<'a> FnOnce(&'a mut Command) -> &'a mut Command,
    ) -> Self {
        change(&mut self.command);
        self
    }

    /// Fills in the slots nobody has said anything about.
    pub(super) fn fill_slots(&mut self) {
        let input = if self.input.is_some() { Stdio::Pipe } else { Stdio::Ignore };
        if self.input.is_some() {
            self.command.stdin(input);
        } else {
            self.command.default_stdio(0, input);
        }
        self.command.default_stdio(1, Stdio::Pipe);
        self.command.default_stdio(2, Stdio::Pipe);
    }

    /// Starts it and gives a handle to it, to have its pid or to signal it.
    ///
    /// # Errors
    ///
    /// [`ExecErrorKind::Spawn`], as [`Command::spawn`].
    pub fn start(mut self) -> Result<Executing, ExecError> {
        self.fill_slots();
        let line = self.command.shown_line();
        match self.command.spawn() {
            Ok(child) => Ok(Executing {
                child,
                line,
                input: self.input,
                max_buffer: self.max_buffer,
                kill_signal: self.command.limits().kill_signal,
            }),
            Err(error) => {
                let kind = ExecErrorKind::Spawn(error);
                Err(ExecError::new(kind, line, None, false, Output::default()))
            }
        }
    }
}

impl IntoFuture for Exec {
    type Output = Result<Output, ExecError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.start()?.finish().await })
    }
}

/// A command of [`exec`] or [`exec_file`] that runs. Dropping it kills the command with its kill signal.
#[derive(Debug)]
pub struct Executing {
    child: Child,
    line: String,
    input: Option<Vec<u8>>,
    max_buffer: usize,
    kill_signal: Signal,
}

impl Executing {
    /// The child behind it.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Collects its output until it has ended.
    ///
    /// # Errors
    ///
    /// [`ExecError`]: it did not exit with code 0, or had to be killed. A command that is sent its kill signal and ignores
    /// it is waited for.
    ///
    /// # Cancel safety
    ///
    /// Cancelled, it kills the command.
    pub async fn finish(mut self) -> Result<Output, ExecError> {
        let mut stdout = Capture::new(self.child.stdout.take(), self.max_buffer);
        let mut stderr = Capture::new(self.child.stderr.take(), self.max_buffer);
        let mut feed = Feed::new(self.child.stdin.take(), self.input.take());
        let mut exit = None;
        let fault = loop {
            if exit.is_some() && stdout.is_over() && stderr.is_over() {
                break None;
            }
            tokio::select! {
                more = stdout.read(), if !stdout.is_over() => match more {
                    Ok(true) => {}
                    Ok(false) => break Some(ExecErrorKind::MaxBuffer(OutputStream::Stdout)),
                    Err(error) => break Some(ExecErrorKind::Io(error)),
                },
                more = stderr.read(), if !stderr.is_over() => match more {
                    Ok(true) => {}
                    Ok(false) => break Some(ExecErrorKind::MaxBuffer(OutputStream::Stderr)),
                    Err(error) => break Some(ExecErrorKind::Io(error)),
                },
                () = feed.write(), if !feed.is_over() => {}
                news = self.child.news(), if exit.is_none() => match news {
                    News::TimedOut => break Some(ExecErrorKind::Timeout),
                    News::Aborted => break Some(ExecErrorKind::Aborted),
                    News::Exited(Ok(how)) => {
                        exit = Some(how);
                        feed.end();
                    }
                    News::Exited(Err(error)) => break Some(ExecErrorKind::Io(error)),
                },
            }
        };
        let (stdout, stderr) = (stdout.end(), stderr.end());
        drop(feed);
        if matches!(fault, Some(ExecErrorKind::MaxBuffer(_) | ExecErrorKind::Io(_))) {
            // Ended by itself meanwhile: as good.
            let _sent = self.child.kill(self.kill_signal);
        }
        let exit = match exit {
            Some(exit) => exit,
            None => self.child.wait().await.unwrap_or_default(),
        };
        let output = Output { exit, stdout, stderr };
        verdict(output, fault, self.line.clone(), self.child.pid(), self.child.killed())
    }
}

/// Success or not.
pub(super) fn verdict(
    output: Output,
    fault: Option<ExecErrorKind>,
    line: String,
    pid: u32,
    killed: bool,
) -> Result<Output, ExecError> {
    match fault {
        None if output.exit.success() => Ok(output),
        fault => {
            let kind = fault.unwrap_or(ExecErrorKind::Failed);
            Err(ExecError::new(kind, line, Some(pid), killed, output))
        }
    }
}

/// Takes what fits below `limit` of `bytes`; whether that was all.
pub(super) fn take_up_to(limit: usize, kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = limit.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() <= room
}

/// One output and what it has brought so far.
struct Capture<S> {
    stream: Option<S>,
    bytes: Vec<u8>,
    limit: usize,
}

impl<S: AsyncRead + Unpin> Capture<S> {
    fn new(stream: Option<S>, limit: usize) -> Self {
        Self { stream, bytes: Vec::new(), limit }
    }

    fn is_over(&self) -> bool {
        self.stream.is_none()
    }

    /// Reads once; `false` when there was more than is allowed. Cancel-safe.
    async fn read(&mut self) -> io::Result<bool> {
        let Some(stream) = &mut self.stream else { return Ok(true) };
        let mut buffer = [0; READ_BYTES];
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            self.stream = None;
        }
        Ok(take_up_to(self.limit, &mut self.bytes, &buffer[..read]))
    }

    fn end(self) -> Vec<u8> {
        self.bytes
    }
}

/// What is still to be written to the input.
struct Feed {
    stdin: Option<ChildStdin>,
    input: Vec<u8>,
    written: usize,
}

impl Feed {
    fn new(stdin: Option<ChildStdin>, input: Option<Vec<u8>>) -> Self {
        Self { stdin, input: input.unwrap_or_default(), written: 0 }
    }

    fn is_over(&self) -> bool {
        self.stdin.is_none()
    }

    fn end(&mut self) {
        self.stdin = None;
    }

    /// Writes once; closes after the last byte, or when nobody reads any more. Cancel-safe.
    async fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        let rest = &self.input[self.written..];
        if !rest.is_empty() {
            match stdin.write(rest).await {
                Ok(written) if written > 0 => self.written += written,
                _ => self.end(),
            }
        }
        if self.written == self.input.len() {
            self.end();
        }
    }
}
