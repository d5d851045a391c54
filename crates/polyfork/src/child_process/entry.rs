//! Named functions of this program that run in a process of their own, or in a thread.
//!
//! An [`Entry`] is a name and an async function over a typed [`Port`]. For a process the parent starts this executable
//! again with the name in its environment; the first line of `main` sees that and runs the function instead of the
//! program. The port is in `port`; `place` leaves open whether it is a process.
//!
//! The rule that surprises: nothing of the parent's memory is there. A child begins as a fresh process, so
//! what it needs is sent to it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::process::exit;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::fork::{ForkError, start};
use super::port::{Framing, ToParent};
use super::{Child, Command, Port};
use crate::channel::{Channel, Encoding, Limits};
use crate::process::{self, FORK_ENTRY, ProcessError};
use crate::worker_threads::{IntoExit, WorkerError, WorkerExit, allow_exit, caught};

/// The exit code of a child whose entry panicked, as of a program whose `main` panics.
const PANICKED: i32 = 101;
/// The exit code of a child that was asked for an entry this program has not (`EX_SOFTWARE`).
const UNKNOWN_ENTRY: i32 = 70;

/// What the function of an entry returns.
pub type EntryResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

pub(super) type Running = Pin<Box<dyn Future<Output = EntryResult> + Send>>;

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
    pub(super) name: &'static str,
    pub(super) run: fn(Port<In, Out>) -> Running,
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
    /// For a parent that follows events.
    #[doc(hidden)]
    fn run_telling(&self, channel: Channel) -> Running {
        self.run_on(channel)
    }
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

    fn run_telling(&self, channel: Channel) -> Running {
        (self.run)(Port::framed(channel, Framing::Child))
    }
}

/// Runs the entry that this process was started for, and ends the process with it. Returns at once in every
/// other process.
///
/// Call it first in `main`, before a runtime is made: it makes its own, for the current thread. The exit code is 0 when
/// the function returns `Ok`, 1 with a message on standard error when it returns an error, 101 when it panics, what it
/// gave to [`exit`](crate::worker_threads::exit()), and 70 when there is no entry of that name. A parent that follows its
/// [events](super::Started) is told errors and panics; the code is 1 for both then.
#[expect(clippy::print_stderr, reason = "as the end of `main` does with an error")]
pub fn run_entries(entries: &[&dyn AnyEntry]) {
    let Some(name) = process::entry() else { return };
    let Some(entry) = entries.iter().find(|entry| name == entry.entry_name()) else {
        let known: Vec<_> = entries.iter().map(|entry| entry.entry_name()).collect();
        eprintln!("polyfork: no entry {name:?} in this program; it has {known:?}");
        exit(UNKNOWN_ENTRY);
    };
    let tells = process::tells_events();
    let ended = run(*entry, tells).unwrap_or_else(|error| Err::<(), _>(error).into_exit());
    exit(match ended.error {
        Some(WorkerError::Failed(error)) if !tells => {
            eprintln!("polyfork: entry {name:?} failed: {error}");
            ended.code
        }
        Some(WorkerError::Panicked(_)) if !tells => PANICKED,
        _ => ended.code,
    });
}

/// What cannot be told to the parent is the error.
fn run(
    entry: &dyn AnyEntry,
    tells: bool,
) -> Result<WorkerExit, Box<dyn std::error::Error + Send + Sync>> {
    allow_exit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let channel = runtime
        .block_on(async { process::channel().map_err(|error: ProcessError| Box::new(error)) })?;
    let sender = channel.sender();
    let ended = caught(|| {
        runtime.block_on(async {
            if tells {
                // A parent that is gone is seen by the entry.
                let _gone = sender.send(&ToParent::<()>::Online).await;
                // Before a function that may block.
                let _gone = sender.flush().await;
            }
            let running = if tells { entry.run_telling(channel) } else { entry.run_on(channel) };
            running.await.into_exit()
        })
    });
    runtime.block_on(async {
        if let (true, Some(error)) = (tells, &ended.error) {
            let _gone = sender.send(&ToParent::<()>::error(error)).await;
        }
        // What the function sent leaves before the process ends, unless the parent does not read.
        let _gone = sender.flush().await;
    });
    Ok(ended)
}
