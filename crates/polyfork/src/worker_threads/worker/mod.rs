//! Workers: threads with a port to their parent, a life that can be followed, and an end that can be asked for.
//!
//! `options` says how a worker is started and starts it, `context` is what its function gets, `control` is what the
//! two sides share, `exit` is how it ends, `env` what it inherits, `direct` reaches it by id.
//!
//! The rule that surprises: nothing can stop a thread that does not listen. [`Worker::terminate`] asks, waits, and
//! then says so.
//!
//! Behaviour follows: Node `lib/internal/worker.js`.

mod context;
mod control;
mod current;
mod direct;
mod env;
mod exit;
mod options;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use context::WorkerContext;
use control::Control;
pub use control::{CpuUsage, workers_ended, workers_ended_blocking};
pub use current::{is_main_thread, thread_id, thread_name};
pub use direct::{
    PostToThreadError, PostToThreadErrorKind, ThreadMessage, post_message_to_thread,
    thread_messages,
};
pub use env::{
    Env, Environment, env, get_environment_data, remove_environment_data, set_environment_data,
};
pub use exit::{ExitCode, IntoExit, WorkerError, WorkerExit, exit};
pub(crate) use exit::{allow_exit, caught};
pub use options::{WorkerOptions, WorkerSpawnError};

use super::park::{block_on, block_on_until};
use super::{MessagePort, Poster, TryReceiveError};

/// A worker thread: gets messages of type `In`, sends messages of type `Out`.
///
/// ```
/// use polyfork::worker_threads::{Worker, WorkerEvent};
///
/// let mut worker = Worker::spawn(|mut parent| {
///     while let Some(number) = parent.receive_blocking() {
///         parent.post_message_blocking(number * 2_u64).ok();
///     }
/// })?;
/// worker.try_post_message(21_u64)?;
/// assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Online));
/// assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Message(42_u64)));
/// worker.close();
/// assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Exit(0)));
/// assert_eq!(worker.next_event_blocking(), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics and worse
/// A panic ends the worker and nothing else: its ports are closed, the parent gets [`WorkerEvent::Error`] with the
/// panic's text and then [`WorkerEvent::Exit`]. A lock that the worker held is poisoned; take shared locks by
/// [`lock`](super::lock), which does not panic in turn. What Rust cannot catch ends the whole process: a stack overflow
/// (raise [`WorkerOptions::stack_size`], and limit recursion), an abort, memory errors of foreign code. Work on hostile
/// input belongs into a process ([`fork_entry`](crate::child_process::fork_entry)).
///
/// # Dropping
/// The worker goes on, as in Node. It can receive what was posted, and then sees its port closed, at which a worker that
/// loops over its port ends. [`WorkerOptions::terminate_on_drop`] asks it to stop instead. When `main` returns, the
/// process ends, whoever runs: see [`workers_ended`].
pub struct Worker<In, Out> {
    /// Before the port, which ends when it is dropped: the worker shall know whether it was asked to stop.
    life: Life,
    port: MessagePort<Out, In>,
    told: Told,
}

/// A worker without its port.
pub(crate) struct Life {
    control: Arc<Control>,
    terminate_on_drop: bool,
}

impl Life {
    pub(crate) fn id(&self) -> u64 {
        self.control.id
    }

    pub(crate) async fn begun(&self) {
        self.control.begun().await;
    }

    pub(crate) async fn ended(&self) -> WorkerExit {
        self.control.ended().await
    }

    pub(crate) async fn terminate(&self, limit: Duration) -> Result<WorkerExit, NotListening> {
        self.control.ask_to_stop();
        if let Some(exit) = self.control.exit() {
            return Ok(exit);
        }
        let ended = tokio::time::timeout(limit, self.control.ended()).await;
        ended.map_err(|_elapsed| self.not_listening(limit))
    }

    fn not_listening(&self, limit: Duration) -> NotListening {
        let (id, name) = (self.control.id, self.control.name.clone());
        NotListening { id, name, limit }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        if self.terminate_on_drop {
            self.control.ask_to_stop();
        }
    }
}

/// Which events were told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Online,
    Error,
    Exit,
}

/// What happens to a worker, in this order: once online, any number of messages, at most one error, one exit.
///
/// All messages that the worker has posted come before its error and its exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerEvent<Out> {
    /// Its function is about to run.
    Online,
    /// A message it posted.
    Message(Out),
    /// It went wrong.
    Error(WorkerError),
    /// It has ended, with this code.
    Exit(i32),
}

/// The worker does not listen: it was asked to stop, and still runs.
///
/// Nothing more can be done about it from here; it may yet end. A process could be killed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("worker {} did not stop within {limit:?}: it does not listen", shown(*id, name.as_deref()))]
pub struct NotListening {
    /// The worker's id.
    pub id: u64,
    /// Its name.
    pub name: Option<String>,
    /// How long it had.
    pub limit: Duration,
}

fn shown(id: u64, name: Option<&str>) -> String {
    name.map_or_else(|| id.to_string(), |name| format!("{id} ({name})"))
}

impl<In: Send + 'static, Out: Send + 'static> Worker<In, Out> {
    /// Starts a worker with [`WorkerOptions::new`]: a function that blocks its own thread.
    ///
    /// # Errors
    /// [`WorkerSpawnError`]; nothing runs then.
    pub fn spawn<F, R>(entry: F) -> Result<Self, WorkerSpawnError>
    where
        F: FnOnce(WorkerContext<In, Out>) -> R + Send + 'static,
        R: IntoExit,
    {
        WorkerOptions::new().spawn(entry)
    }

    /// Starts a worker with [`WorkerOptions::new`]: an async function on a current-thread runtime of its own.
    ///
    /// # Errors
    /// [`WorkerSpawnError`]; nothing runs then.
    pub fn spawn_async<F, R>(entry: F) -> Result<Self, WorkerSpawnError>
    where
        F: AsyncFnOnce(WorkerContext<In, Out>) -> R + Send + 'static,
        R: IntoExit + 'static,
    {
        WorkerOptions::new().spawn_async(entry)
    }
}

impl<In, Out> Worker<In, Out> {
    /// Its id. Ids increase and are never used again.
    pub fn thread_id(&self) -> u64 {
        self.life.control.id
    }

    /// Its name, if it has one.
    pub fn thread_name(&self) -> Option<&str> {
        self.life.control.name.as_deref()
    }

    /// The next event; `None` after [`WorkerEvent::Exit`].
    ///
    /// # Cancel safety
    /// No event is lost.
    pub async fn next_event(&mut self) -> Option<WorkerEvent<Out>> {
        match self.told {
            Told::Nothing => {
                self.life.control.begun().await;
                self.told = Told::Online;
                Some(WorkerEvent::Online)
            }
            Told::Online => {
                if let Some(message) = self.port.receive().await {
                    return Some(WorkerEvent::Message(message));
                }
                // Its port may be closed long before it ends.
                let exit = self.life.control.ended().await;
                Some(match exit.error {
                    Some(error) => {
                        self.told = Told::Error;
                        WorkerEvent::Error(error)
                    }
                    None => {
                        self.told = Told::Exit;
                        WorkerEvent::Exit(exit.code)
                    }
                })
            }
            Told::Error => {
                let exit = self.life.control.ended().await;
                self.told = Told::Exit;
                Some(WorkerEvent::Exit(exit.code))
            }
            Told::Exit => None,
        }
    }

    /// [`next_event`](Self::next_event), blocking the thread.
    pub fn next_event_blocking(&mut self) -> Option<WorkerEvent<Out>> {
        block_on(self.next_event())
    }

    /// [`next_event_blocking`](Self::next_event_blocking), for no longer than `limit`.
    ///
    /// # Errors
    /// [`TryReceiveError`]: `Empty` when nothing happened in time, `Closed` after the exit.
    pub fn next_event_timeout(
        &mut self,
        limit: Duration,
    ) -> Result<WorkerEvent<Out>, TryReceiveError> {
        let deadline = Instant::now().checked_add(limit);
        match block_on_until(self.next_event(), deadline) {
            Some(event) => event.ok_or(TryReceiveError::Closed),
            None => Err(TryReceiveError::Empty),
        }
    }

    /// The next message, for who does not care about other events; `None` when the worker will send no more.
    ///
    /// # Cancel safety
    /// No message is lost.
    pub async fn receive(&mut self) -> Option<Out> {
        self.port.receive().await
    }

    /// [`receive`](Self::receive), blocking the thread.
    pub fn receive_blocking(&mut self) -> Option<Out> {
        self.port.receive_blocking()
    }

    /// [`receive_blocking`](Self::receive_blocking), for no longer than `limit`.
    ///
    /// # Errors
    /// [`TryReceiveError::Empty`]: nothing came in time.
    pub fn receive_timeout(&mut self, limit: Duration) -> Result<Out, TryReceiveError> {
        self.port.receive_timeout(limit)
    }

    /// The next message if there is one.
    ///
    /// # Errors
    /// [`TryReceiveError`].
    pub fn try_receive(&mut self) -> Result<Out, TryReceiveError> {
        self.port.try_receive()
    }

    /// Posts to the worker, for other threads and tasks.
    pub fn poster(&self) -> Poster<In> {
        self.port.poster()
    }

    /// Closes the port: the worker receives what was posted, and then sees the end.
    pub fn close(&self) {
        self.port.close();
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<WorkerExit> {
        self.life.control.exit()
    }

    /// Waits for its end. Messages stay to be received.
    ///
    /// A worker that waits for room to send would wait for ever: receive, or use
    /// [`next_event`](Self::next_event), where the queue is bounded.
    ///
    /// # Cancel safety
    /// Nothing is lost; the end is told to whoever asks.
    pub async fn join(&self) -> WorkerExit {
        self.life.control.ended().await
    }

    /// [`join`](Self::join), blocking the thread, until the operating system has its thread back.
    pub fn join_blocking(&self) -> WorkerExit {
        let exit = block_on(self.life.control.ended());
        let thread = polyfork_core::sync::lock(&self.life.control.thread).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // What it panicked with was caught before; what is left are destructors of its thread-locals.
            let _panicked = thread.join();
        }
        exit
    }

    /// Asks the worker to stop, and waits for its end, at most for `limit`.
    ///
    /// What it has not received is dropped, and it will receive nothing more; it can still send. A function that blocks
    /// sees that at its next look at its port or at [`WorkerContext::is_terminating`]; an async function is dropped where it awaits, and the
    /// code is then 1. One that has ended already is told at once.
    ///
    /// # Cancel safety
    /// Asked is asked.
    ///
    /// # Errors
    /// [`NotListening`]: it still runs, and can be asked again.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time enabled, if it has not ended already.
    pub async fn terminate(&self, limit: Duration) -> Result<WorkerExit, NotListening> {
        self.life.terminate(limit).await
    }

    /// [`terminate`](Self::terminate), blocking the thread. Needs no runtime.
    ///
    /// # Errors
    /// [`NotListening`]: it still runs, and can be asked again.
    pub fn terminate_blocking(&self, limit: Duration) -> Result<WorkerExit, NotListening> {
        self.life.control.ask_to_stop();
        let deadline = Instant::now().checked_add(limit);
        block_on_until(self.life.control.ended(), deadline)
            .ok_or_else(|| self.life.not_listening(limit))
    }

    /// Port and life apart.
    pub(crate) fn into_parts(self) -> (MessagePort<Out, In>, Life) {
        (self.port, self.life)
    }

    /// The processor time it has used; `None` before it runs and when it has ended.
    pub fn cpu_usage(&self) -> Option<CpuUsage> {
        self.life.control.cpu_usage()
    }

    /// Takes it out of those that [`workers_ended`] waits for (Node: `worker.unref()`).
    pub fn unref(&self) {
        self.life.control.set_referenced(false);
    }

    /// Puts it back (Node: `worker.ref()`). Workers begin so.
    pub fn reference(&self) {
        self.life.control.set_referenced(true);
    }

    /// Whether [`workers_ended`] waits for it. Not when it has ended.
    pub fn has_ref(&self) -> bool {
        self.life.control.is_referenced()
    }
}

impl<In, Out> std::ops::Deref for Worker<In, Out> {
    type Target = Poster<In>;

    fn deref(&self) -> &Poster<In> {
        &self.port
    }
}

impl<In, Out> fmt::Debug for Worker<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("id", &self.life.control.id)
            .field("name", &self.life.control.name)
            .field("exit", &self.exit())
            .finish_non_exhaustive()
    }
}
