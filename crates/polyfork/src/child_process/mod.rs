//! Child processes with Node's semantics: run a program, keep hold of its streams, know how it ended.
//!
//! | Node | here |
//! | --- | --- |
//! | `spawn(file, args, options)` | [`Command`], [`Command::spawn`], [`Child`] |
//! | `exec(line, options)` | [`exec()`], which is awaited |
//! | `execFile(file, args, options)` | [`exec_file`] |
//! | `spawnSync`, `execSync`, `execFileSync` | [`spawn_sync`], [`exec_sync`], [`exec_file_sync`]; no runtime needed |
//! | `subprocess.kill(signal)` | [`Child::kill`], and [`Child::kill_tree`] for all it has started |
//! | `fork(script, args, options)` | [`fork_node`], [`ForkNode`]; [`fork_program`] for any program |
//! | `fork(__filename)` | [`fork_entry`], a function of this program in a process of its own |
//! | `subprocess.send`, `on('message')` | [`Forked::channel`](struct@Forked) |
//! | events | [`Child::next_event`] |
//! | `fork(__filename)` or `new Worker(__filename)` | [`Entry::start`], which leaves the choice open |
//!
//! What differs from Node, on purpose:
//!
//! - A child that could not be started is an error and no child, instead of a child with an `error` event.
//! - [`Command`] begins with this process' standard streams, as in the standard library; Node begins with pipes
//!   ([`Command::piped`]).
//! - Commands run by [`exec()`] have an empty input, not one that stays open. Out of time is an error even if the
//!   command then exits with 0.
//! - Output is bytes; text is made on request.
//!
//! Nothing here calls fork(2): a child is cloned with our memory borrowed until it calls exec (`polyfork_sys::spawn`),
//! so the time it takes does not grow with this process. It has an empty signal mask, every signal at its default, and
//! no descriptor that was not given to it.
//!
//! The rule that surprises: a child is collected by a task of the runtime it was started in, whether anybody waits or
//! not. So none becomes a zombie when its handle is dropped, and signals go through a pidfd, which cannot hit a stranger.
//!
//! Linux only. References: Node `lib/child_process.js`, `lib/internal/child_process.js`.

mod child;
mod command;
mod entry;
mod error;
mod exec;
mod fork;
mod place;
mod port;
mod signal;
mod stdio;
mod sync;

pub use crate::worker_threads::Place;
pub use child::{Child, ChildError, Event, Exit};
pub use command::{Command, Shell};
pub(crate) use entry::sealed;
pub use entry::{
    AnyEntry, Entry, EntryResult, ForkedEntry, fork_entry, fork_entry_with, run_entries,
};
pub use error::{ExecError, ExecErrorKind, OutputStream, SpawnError};
pub use exec::{DEFAULT_MAX_BUFFER, Exec, Executing, Output, exec, exec_file};
pub use fork::{ForkError, ForkNode, Forked, fork_node, fork_program};
pub use place::{EntryEvent, EntryExit, StartError, Started};
pub use port::{Port, PortError, PortSender};
pub use signal::{Signal, UnknownSignal};
pub use stdio::{ChildSocket, ChildStderr, ChildStdin, ChildStdout, Stdio};
pub use sync::{SyncFault, SyncOutput, exec_file_sync, exec_sync, spawn_sync};
pub use tokio_util::sync::CancellationToken;
