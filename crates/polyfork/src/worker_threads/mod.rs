//! Threads with Node's semantics: workers with ports, messages that move, and a pool.
//!
//! | Node | here |
//! | --- | --- |
//! | `new Worker(file, options)` | [`Worker::spawn`], [`Worker::spawn_async`], [`WorkerOptions`] |
//! | `parentPort`, `workerData` | [`WorkerContext`] |
//! | `online`, `message`, `error`, `exit` | [`Worker::next_event`] |
//! | `worker.terminate()` | [`Worker::terminate`], which asks |
//! | `process.exit()` in a worker | [`exit()`], or return an [`ExitCode`] |
//! | `new MessageChannel()`, `MessagePort` | [`MessageChannel`], [`MessagePort`], [`Poster`] |
//! | the list of what is transferred | nothing: messages move; [`MessagePort::transfer`] for ports that carry ports like themselves |
//! | `receiveMessageOnPort` | [`receive_message_on_port`] |
//! | `BroadcastChannel` | [`BroadcastChannel`] |
//! | `SHARE_ENV`, `env` | [`Env`], [`env()`] |
//! | `setEnvironmentData` | [`set_environment_data`], [`get_environment_data`] |
//! | `postMessageToThread` | [`post_message_to_thread`], [`thread_messages`] |
//! | `worker.unref()`, the end of the program | [`Worker::unref`], [`workers_ended`] |
//! | a pool, which Node leaves to packages | [`Pool`] |
//!
//! What differs from Node, on purpose:
//!
//! - A worker runs a function of this program.
//! - A worker that cannot be started is an error and no worker.
//! - Ports have types, can have a bound, and keep nothing alive: a worker ends when its function returns.
//! - Standard streams belong to the process. A worker that shall not write there is given a port.
//!
//! The rule that surprises: a thread cannot be killed. Whatever ends a worker from outside asks it, and says so when
//! it does not listen.
//!
//! Behaviour follows: Node `lib/internal/worker.js`, `src/node_messaging.cc`.

mod broadcast;
mod park;
pub mod pool;
mod port;
mod worker;

pub use broadcast::{BroadcastChannel, BroadcastError, Broadcasted, WhenFull};
pub use pool::{Job, JobPool, Place, Pool, PoolBuilder, Priority, Task, TaskError};
pub use port::{
    CyclicTransfer, MessageChannel, MessagePort, PostError, Poster, Transferred, TryPostError,
    TryReceiveError, receive_message_on_port,
};
pub use worker::{
    CpuUsage, Env, Environment, ExitCode, IntoExit, NotListening, PostToThreadError,
    PostToThreadErrorKind, ThreadMessage, Worker, WorkerContext, WorkerError, WorkerEvent,
    WorkerExit, WorkerOptions, WorkerSpawnError, env, exit, get_environment_data, is_main_thread,
    post_message_to_thread, remove_environment_data, set_environment_data, thread_id,
    thread_messages, thread_name, workers_ended, workers_ended_blocking,
};
pub(crate) use worker::{Life, allow_exit, caught};

/// Takes a lock that workers share, also when one of them panicked while it held it: what such a worker may have left
/// half done is for you to judge, but its panic is not passed on to those that live.
pub fn lock<T: ?Sized>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    polyfork_core::sync::lock(mutex)
}
