//! Named functions of this program that run in a process of their own.
//!
//! An [`Entry`] is a name and an async function over a typed [`Port`]. The parent starts this executable again with
//! the name in its environment; the first line of `main` sees that and runs the function instead of the program.
//!
//! The rule that surprises: nothing of the parent's memory is there. The child begins as a fresh process, so
//! what it needs is sent to it.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::process::exit;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::fork::{ForkError, start};
use super::{Child, Command};
use crate::channel::{
    AlreadyDisconnected, Channel, ChannelError, DecodeError, Encoding, Handle, Limits, Message,
    RequestError, SendError, Sender,
};
use crate::process::{self, FORK_ENTRY, ProcessError};

/// The exit code of a child whose entry failed, as of a program whose `main` returns an error.
const FAILED: i32 = 1;
/// The exit code of a child that was asked for an entry this program has not (`EX_SOFTWARE`).
const UNKNOWN_ENTRY: i32 = 70;

/// What the function of an entry returns.
pub type EntryResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

type Running = Pin<Box<dyn Future<Output = EntryResult> + Send>>;

/// A named function of this program that gets messages of type `In` and sends messages of type `Out`.
///
/// ```no_run
/// use polyfork::child_process::{Entry, EntryResult, Port, fork_entry, run_entries};
///
/// const DOUBLE: Entry<u64, u64> = Entry::new("double", |port| Box::pin(double(port)));
///
/// async fn double(mut port: Port<u64, u64>) -> EntryResult {
///     while let Some(number) = port.recv().await? {
///         port.send(&(number * 2)).await?;
///     }
///     Ok(())
/// }
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     run_entries(&[&DOUBLE]); // does not return in a child
///     let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
///     runtime.block_on(async {
///         let mut child = fork_entry(&DOUBLE)?;
///         child.port.send(&21).await?;
///         assert_eq!(child.port.recv().await?, Some(42));
///         child.port.disconnect().await?;
///         child.child.wait().await?;
///         Ok(())
///     })
/// }
/// ```
pub struct Entry<In, Out> {
    name: &'static str,
    run: fn(Port<In, Out>) -> Running,
}

impl<In, Out> Entry<In, Out> {
    /// An entry. The name must be its own among those given to [`run_entries`].
    pub const fn new(name: &'static str, run: fn(Port<In, Out>) -> Running) -> Self {
        Self { name, run }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl<In, Out> fmt::Debug for Entry<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({:?})", self.name)
    }
}

/// One end of a typed channel: gets `In`, sends `Out`.
pub struct Port<In, Out> {
    channel: Channel,
    types: PhantomData<fn(Out) -> In>,
}

/// Why nothing was received on a [`Port`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PortError {
    /// The other end broke the protocol; the channel has ended.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A message is not of type `In`. The next ones can be received.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl<In: DeserializeOwned, Out: Serialize> Port<In, Out> {
    /// A typed port over a channel.
    pub fn new(channel: Channel) -> Self {
        Self { channel, types: PhantomData }
    }

    /// The next message; `None` when the channel has ended. Cancel safe.
    ///
    /// # Errors
    /// [`PortError`].
    pub async fn recv(&mut self) -> Result<Option<In>, PortError> {
        match self.channel.recv().await? {
            Some(message) => Ok(Some(message.to()?)),
            None => Ok(None),
        }
    }

    /// The next message with its handles and the way to answer it. Cancel safe.
    ///
    /// # Errors
    /// [`PortError`].
    pub async fn recv_message(&mut self) -> Result<Option<(In, Message)>, PortError> {
        match self.channel.recv().await? {
            Some(message) => Ok(Some((message.to()?, message))),
            None => Ok(None),
        }
    }

    /// Sends a message; see [`Sender::send`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send(&self, message: &Out) -> Result<(), SendError> {
        self.channel.send(message).await
    }

    /// Sends a message with a handle; see [`Sender::send_with`].
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn send_with(
        &self,
        message: &Out,
        handle: impl Into<Handle>,
    ) -> Result<(), SendError> {
        self.channel.send_with(message, handle).await
    }

    /// Asks, and waits for the answer, which may be of any type the two agree on; see [`Sender::request`].
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn request(
        &self,
        message: &Out,
        limit: Duration,
    ) -> Result<crate::channel::Reply, RequestError> {
        self.channel.request(message, limit).await
    }

    /// Ends the channel after everything was written; see [`Sender::disconnect`].
    ///
    /// # Errors
    /// [`AlreadyDisconnected`].
    pub async fn disconnect(&self) -> Result<(), AlreadyDisconnected> {
        self.channel.disconnect().await
    }

    /// The sending half, for other tasks. It sends anything, so it is for values of type `Out`.
    pub fn sender(&self) -> Sender {
        self.channel.sender()
    }

    /// The channel, without types.
    pub fn into_channel(self) -> Channel {
        self.channel
    }
}

impl<In, Out> fmt::Debug for Port<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Port").field(&self.channel).finish()
    }
}

/// A child that runs an entry. What it sends is received here, so the types have changed places.
#[derive(Debug)]
pub struct ForkedEntry<In, Out> {
    /// The channel to it.
    pub port: Port<Out, In>,
    /// The process.
    pub child: Child,
}

/// Starts this program again, in one of its entries (Node: `fork(__filename)`).
///
/// `main` of this program must call [`run_entries`] with this entry. Must be called inside a tokio runtime.
///
/// # Errors
/// [`ForkError`].
pub fn fork_entry<In, Out>(entry: &Entry<In, Out>) -> Result<ForkedEntry<In, Out>, ForkError>
where
    In: Serialize + DeserializeOwned,
    Out: Serialize + DeserializeOwned,
{
    // The file that was started, also when it has been replaced or moved since.
    fork_entry_with(entry, &mut Command::new("/proc/self/exe"))
}

/// [`fork_entry`] with everything that can be said about a child. The command's program must be one that has this
/// entry; `/proc/self/exe` is this one.
///
/// # Errors
/// [`ForkError`].
pub fn fork_entry_with<In, Out>(
    entry: &Entry<In, Out>,
    command: &mut Command,
) -> Result<ForkedEntry<In, Out>, ForkError>
where
    In: Serialize + DeserializeOwned,
    Out: Serialize + DeserializeOwned,
{
    command.env(FORK_ENTRY, entry.name);
    let forked = start(command, Encoding::Native, Limits::default())?;
    Ok(ForkedEntry { port: Port::new(forked.channel), child: forked.child })
}

/// An entry whose types are forgotten, for [`run_entries`].
pub trait AnyEntry: Sync + sealed::Sealed {
    #[doc(hidden)]
    fn entry_name(&self) -> &'static str;
    #[doc(hidden)]
    fn run_on(&self, channel: Channel) -> Running;
}

pub(crate) mod sealed {
    pub trait Sealed {}
    impl<In, Out> Sealed for super::Entry<In, Out> {}
}

impl<In, Out> AnyEntry for Entry<In, Out>
where
    In: DeserializeOwned,
    Out: Serialize,
{
    fn entry_name(&self) -> &'static str {
        self.name
    }

    fn run_on(&self, channel: Channel) -> Running {
        (self.run)(Port::new(channel))
    }
}

/// Runs the entry that this process was started for, and ends the process with it. Returns at once in every
/// other process.
///
/// Call it first in `main`, before a runtime is made: it makes its own, for the current thread. The exit code is 0 when
/// the function returns `Ok`, 1 with a message on standard error when it returns an error, and 70 when there
/// is no entry of that name.
#[expect(clippy::print_stderr, reason = "as the end of `main` does with an error")]
pub fn run_entries(entries: &[&dyn AnyEntry]) {
    let Some(name) = process::entry() else { return };
    let Some(entry) = entries.iter().find(|entry| name == entry.entry_name()) else {
        let known: Vec<_> = entries.iter().map(|entry| entry.entry_name()).collect();
        eprintln!("polyfork: no entry {name:?} in this program; it has {known:?}");
        exit(UNKNOWN_ENTRY);
    };
    let ended = run(*entry);
    if let Err(error) = &ended {
        eprintln!("polyfork: entry {name:?} failed: {error}");
    }
    exit(if ended.is_ok() { 0 } else { FAILED });
}

fn run(entry: &dyn AnyEntry) -> EntryResult {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = process::channel().map_err(|error: ProcessError| Box::new(error))?;
        // What the function sent leaves before the process ends, unless the parent does not read.
        let sender = channel.sender();
        let result = entry.run_on(channel).await;
        let _gone = sender.flush().await;
        result
    })
}
