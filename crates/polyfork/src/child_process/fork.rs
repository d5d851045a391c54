//! A child with a channel: this executable in one of its entries, a Node script, or any program.
//!
//! Puts a socket into slot 3 or where it is wanted, says so in the environment, and starts the child as every other. The channel itself is
//! in [`channel`](crate::channel), the child's end in [`process`](crate::process), entries in `entry`.
//!
//! The rule that surprises: when the process has ended, the channel takes what is still in the socket and ends, even
//! if a grandchild has inherited the other end.
//!
//! Behaviour follows: Node `lib/child_process.js` (`fork`).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use polyfork_wire::env as names;
use tokio::io::Interest;

#[cfg(doc)]
use super::Stdio;
use super::{Child, Command, SpawnError};
use crate::channel::{Channel, Encoding, Limits};
use crate::cluster::process::POLYFORK_CHANNEL_PID;
use crate::cluster::register::register;
use crate::cluster::{DetectError, detect};
use crate::process::FORK_FD;

/// Where the channel is in the child unless asked otherwise, as Node's `fork` has it.
const CHANNEL_SLOT: u32 = 3;

/// A child with a channel.
#[derive(Debug)]
pub struct Forked {
    /// The channel to it.
    pub channel: Channel,
    /// The process.
    pub child: Child,
}

/// Why a child with a channel could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// There is no channel for it: no descriptors left, or no runtime.
    #[error("cannot make a channel: {0}")]
    Channel(#[source] io::Error),
    /// Who executes the script is not known.
    #[error(transparent)]
    Detect(#[from] DetectError),
    /// This executable cannot be found again.
    #[error("cannot find this program's own file: {0}")]
    OwnFile(#[source] io::Error),
}

/// Starts a Node script with a channel to it (Node: `fork(script, args)`): `node` from `PATH`, JSON, standard streams
/// inherited. [`ForkNode`] has options.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use polyfork::child_process::fork_node;
///
/// // worker.js: process.on('message', (m) => { process.send({ got: m }); process.disconnect(); });
/// let mut forked = fork_node("worker.js")?;
/// forked.channel.send(&"hello").await?;
/// while let Some(message) = forked.channel.recv().await? {
///     println!("{}", message.json().unwrap_or_default());
/// }
/// println!("{:?}", forked.child.wait().await?);
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`ForkError`].
pub fn fork_node(script: impl AsRef<Path>) -> Result<Forked, ForkError> {
    ForkNode::new(script).fork()
}

/// A Node script to be forked, with the options of Node's `fork`.
#[derive(Debug)]
pub struct ForkNode {
    script: PathBuf,
    args: Vec<OsString>,
    exec_path: Option<PathBuf>,
    exec_args: Vec<OsString>,
    encoding: Encoding,
    limits: Limits,
    command: Command,
}

impl ForkNode {
    /// The script; a path is taken from the child's working directory.
    pub fn new(script: impl AsRef<Path>) -> Self {
        Self {
            script: script.as_ref().to_owned(),
            args: Vec::new(),
            exec_path: None,
            exec_args: Vec::new(),
            encoding: Encoding::Json,
            limits: Limits::default(),
            command: Command::new(""),
        }
    }

    /// Adds one argument for the script.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments for the script.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// The runtime (Node: `execPath`); by default what the script's first line names, else `node` from `PATH`.
    pub fn exec_path(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.exec_path = Some(path.as_ref().to_owned());
        self
    }

    /// Adds arguments for the runtime, before the script (Node: `execArgv`).
    pub fn exec_args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.exec_args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// [`Encoding::Json`], the default, or [`Encoding::Advanced`] (Node: `serialization`).
    pub fn encoding(&mut self, encoding: Encoding) -> &mut Self {
        self.encoding = encoding;
        self
    }

    /// What the script may make this process hold.
    pub fn limits(&mut self, limits: Limits) -> &mut Self {
        self.limits = limits;
        self
    }

    /// Pipes for standard input, output and error instead of our own (Node: `silent`).
    pub fn silent(&mut self) -> &mut Self {
        self.command.piped();
        self
    }

    /// Everything else that can be said about a child: environment, working directory, streams, time limit, abort.
    /// Its program and arguments are not used, its slot 3 is the channel unless another one is
    /// [`Stdio::Channel`], and it must not have a shell.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it.
    ///
    /// # Blocking
    /// As [`Command::spawn`]; without [`exec_path`](Self::exec_path) also reads files to find the runtime.
    ///
    /// # Errors
    /// [`ForkError`].
    pub fn fork(&mut self) -> Result<Forked, ForkError> {
        if self.encoding == Encoding::Native {
            let reason = "a Node script speaks the encodings json and advanced only";
            return Err(self.command.invalid(reason).into());
        }
        let mut args = std::mem::take(&mut self.exec_args);
        let program = match &self.exec_path {
            Some(path) => {
                args.push(self.script.clone().into());
                path.clone()
            }
            None => {
                let directory = self.command.directory();
                let found = detect(self.script.as_os_str(), &[], directory, None)?;
                args.extend(found.args_before);
                found.exec
            }
        };
        args.append(&mut self.args);
        self.command.set_program(program.into(), args);
        start(&mut self.command, self.encoding, self.limits)
    }
}

/// Starts any program that speaks a channel: Node's, or ours by [`process::channel`](crate::process::channel). The
/// channel is in slot 3, or in the one that is [`Stdio::Channel`].
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use polyfork::channel::Encoding;
/// use polyfork::child_process::{Command, fork_program};
///
/// let forked = fork_program(Command::new("./worker").arg("--quiet"), Encoding::Native)?;
/// forked.channel.send(&1_u32).await?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`ForkError`].
pub fn fork_program(command: &mut Command, encoding: Encoding) -> Result<Forked, ForkError> {
    start(command, encoding, Limits::default())
}

/// Starts `command` with a channel.
pub(super) fn start(
    command: &mut Command,
    encoding: Encoding,
    limits: Limits,
) -> Result<Forked, ForkError> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(SpawnError::NoRuntime { program: command.shown_program() }.into());
    }
    let (ours, theirs) = polyfork_sys::channel::pair().map_err(ForkError::Channel)?;
    tell(command, theirs, encoding);
    let channel = Channel::with_limits(ours, encoding, limits).map_err(ForkError::Channel)?;
    let child = command.spawn()?;
    let pidfd = child.as_fd().try_clone_to_owned().map_err(ForkError::Channel)?;
    end_with(pidfd, &channel).map_err(ForkError::Channel)?;
    Ok(Forked { channel, child })
}

/// Gives the child its end, and the variables by which it finds it.
fn tell(command: &mut Command, theirs: OwnedFd, encoding: Encoding) {
    let mode = match encoding {
        Encoding::Json => Some("json"),
        Encoding::Advanced => Some("advanced"),
        Encoding::Native => None,
    };
    let slot = command.place_channel(theirs, CHANNEL_SLOT);
    match mode {
        Some(mode) => {
            command.env(names::NODE_CHANNEL_FD, slot.to_string());
            command.env(names::NODE_CHANNEL_SERIALIZATION_MODE, mode);
        }
        None => {
            command.env(FORK_FD, slot.to_string());
            command.pid_env(POLYFORK_CHANNEL_PID);
        }
    }
}

/// Lets the channel end with the process.
fn end_with(pidfd: OwnedFd, channel: &Channel) -> io::Result<()> {
    let pidfd = register(pidfd, Interest::READABLE)?;
    let ended = channel.process_ended();
    let closed = channel.closed_by_itself();
    tokio::spawn(async move {
        tokio::select! {
            // An error means that the runtime is shutting down.
            _readable = pidfd.readable() => ended(),
            () = closed => {}
        }
    });
    Ok(())
}
