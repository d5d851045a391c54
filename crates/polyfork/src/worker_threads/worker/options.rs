//! How a worker is started.
//!
//! All that can fail comes before the worker's function runs, and is told to the caller: a runtime that cannot be made,
//! a thread that the system refuses, processors that do not exist. Nothing is left running then.

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use polyfork_core::sync::lock;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio_util::sync::CancellationToken;

use super::control::{Control, Stage};
use super::current::{Current, become_worker, leave};
use super::env::{Data, Env};
use super::exit::{FAILED, IntoExit, WorkerExit, caught, quietly};
use super::{Life, Told, Worker, WorkerContext};
use crate::worker_threads::{MessageChannel, MessagePort};

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// What can be said about a worker before it starts.
///
/// ```
/// use polyfork::worker_threads::{ExitCode, WorkerContext, WorkerOptions, thread_name};
///
/// let worker = WorkerOptions::new()
///     .name("adder")
///     .stack_size(256 << 10)
///     .worker_data((20, 22))
///     .spawn(|mut parent: WorkerContext<(), i32>| {
///         let (a, b): (i32, i32) = parent.worker_data().expect("given");
///         assert_eq!(thread_name().as_deref(), Some("adder"));
///         ExitCode(a + b)
///     })?;
/// assert_eq!(worker.join_blocking().code, 42);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
#[must_use = "nothing starts before `spawn`"]
pub struct WorkerOptions {
    name: Option<String>,
    stack_size: Option<usize>,
    processors: Option<Vec<usize>>,
    env: Env,
    capacity: Option<NonZeroUsize>,
    data: Option<Box<dyn Any + Send>>,
    terminate_on_drop: bool,
}

/// Why a worker could not be started. Nothing of it runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerSpawnError {
    /// The system gives no more threads or memory (`EAGAIN`, `ENOMEM`).
    #[error("cannot start a worker: no thread for it: {0}")]
    Thread(#[source] io::Error),
    /// The runtime of an async worker could not be made, usually for want of descriptors (`EMFILE`).
    #[error("cannot start a worker: no runtime for it: {0}")]
    Runtime(#[source] io::Error),
    /// The processors do not exist, or this process may not use them.
    #[error("cannot start a worker: cannot run it on processors {processors:?}: {source}")]
    Affinity {
        /// Those asked for.
        processors: Vec<usize>,
        /// The system's error.
        source: io::Error,
    },
    /// A name is text without zero bytes.
    #[error("cannot start a worker: its name has a zero byte: {0:?}")]
    Name(String),
}

impl WorkerOptions {
    /// No name, the standard stack size, all processors, a copy of the environment, an unbounded port.
    pub fn new() -> Self {
        Self::default()
    }

    /// Its name. The system shows the first 15 bytes of it.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The size of its stack in bytes; 2 MiB unless said. Recursion that needs more ends the whole process.
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.stack_size = Some(bytes);
        self
    }

    /// The processors it may run on, counted from 0.
    pub fn cpu_affinity(mut self, processors: impl IntoIterator<Item = usize>) -> Self {
        self.processors = Some(processors.into_iter().collect());
        self
    }

    /// Its environment variables.
    pub fn env(mut self, env: Env) -> Self {
        self.env = env;
        self
    }

    /// At most so many messages wait in each direction, at least one; without a bound unless said.
    pub fn queue(mut self, capacity: usize) -> Self {
        self.capacity = Some(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN));
        self
    }

    /// What it starts with (Node: `workerData`), to be taken by [`WorkerContext::worker_data`]. It moves there. What the
    /// function captures does as well; this is for functions that are shared.
    pub fn worker_data<T: Any + Send>(mut self, data: T) -> Self {
        self.data = Some(Box::new(data));
        self
    }

    /// Asks it to stop when its handle is dropped, without waiting.
    pub fn terminate_on_drop(mut self, yes: bool) -> Self {
        self.terminate_on_drop = yes;
        self
    }

    /// Starts a function that may block its thread: typically a loop over its port.
    ///
    /// # Blocking
    /// For as long as the system takes to make a thread.
    ///
    /// # Errors
    /// [`WorkerSpawnError`]; nothing runs then.
    pub fn spawn<In, Out, F, R>(self, entry: F) -> Result<Worker<In, Out>, WorkerSpawnError>
    where
        In: Send + 'static,
        Out: Send + 'static,
        F: FnOnce(WorkerContext<In, Out>) -> R + Send + 'static,
        R: IntoExit,
    {
        self.start(move |context, _stop| entry(context).into_exit())
    }

    /// Starts an async function on a current-thread runtime of its own, with I/O and time enabled. Its future need not
    /// be `Send`.
    ///
    /// When the function has returned or is [terminated](Worker::terminate), the tasks it spawned are dropped. What it
    /// gave to the runtime's blocking threads is not waited for.
    ///
    /// # Errors
    /// [`WorkerSpawnError`]; nothing runs then.
    pub fn spawn_async<In, Out, F, R>(self, entry: F) -> Result<Worker<In, Out>, WorkerSpawnError>
    where
        In: Send + 'static,
        Out: Send + 'static,
        F: AsyncFnOnce(WorkerContext<In, Out>) -> R + Send + 'static,
        R: IntoExit + 'static,
    {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(WorkerSpawnError::Runtime)?;
        self.start(move |context, stop| {
            let mut exit = caught(|| {
                runtime.block_on(async {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => WorkerExit { code: FAILED, error: None },
                        returned = entry(context) => returned.into_exit(),
                    }
                })
            });
            runtime.shutdown_background();
            if stop.is_cancelled() && exit.success() {
                // It may have ended because its port did: the code is no matter of luck.
                exit.code = FAILED;
            }
            exit
        })
    }

    fn start<In, Out>(
        self,
        run: impl FnOnce(WorkerContext<In, Out>, CancellationToken) -> WorkerExit + Send + 'static,
    ) -> Result<Worker<In, Out>, WorkerSpawnError>
    where
        In: Send + 'static,
        Out: Send + 'static,
    {
        let Self { name, stack_size, processors, env, capacity, data, terminate_on_drop } = self;
        if let Some(name) = name.as_ref().filter(|name| name.contains('\0')) {
            return Err(WorkerSpawnError::Name(name.clone()));
        }
        let (ready, told) = processors.map(Ready::new).transpose()?.unzip();
        let MessageChannel { port1: parents, port2: own } = MessageChannel::with(capacity);
        let own: MessagePort<In, Out> = own;
        let (incoming, outgoing) = own.closers();
        let (_, deafening) = parents.closers();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let control = Control::new(id, name, Box::new(move || deafening.abort()));
        let context = WorkerContext::new(own, control.stop.clone(), data);
        let current = Current {
            control: Arc::clone(&control),
            env: env.for_worker(),
            data: Data::inherited(),
        };
        let body = {
            let control = Arc::clone(&control);
            move || {
                let exit = live(&control, current, ready, || run(context, control.stop.clone()));
                // Whoever else has got hold of its ports cannot use them any more. What wakes up by that is foreign.
                quietly(|| incoming.abort());
                quietly(|| outgoing.close());
                quietly(leave);
                control.end(exit);
            }
        };
        let mut builder = thread::Builder::new();
        if let Some(name) = &control.name {
            builder = builder.name(name.clone());
        }
        if let Some(bytes) = stack_size {
            builder = builder.stack_size(bytes);
        }
        let never = |error| {
            control.end(WorkerExit { code: FAILED, error: None });
            Err(error)
        };
        let thread = match builder.spawn(body) {
            Ok(thread) => thread,
            Err(error) => return never(WorkerSpawnError::Thread(error)),
        };
        if let Some(told) = told
            && let Err(error) = told.wait()
        {
            // Its thread has ended without a look at its function.
            let _panicked = thread.join();
            return Err(error);
        }
        *lock(&control.thread) = Some(thread);
        let life = Life { control, terminate_on_drop };
        Ok(Worker { port: parents, life, told: Told::Nothing })
    }
}

/// The life of a worker, on its thread.
fn live(
    control: &Control,
    current: Current,
    ready: Option<Ready>,
    run: impl FnOnce() -> WorkerExit,
) -> WorkerExit {
    let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    control.tid.get_or_init(|| tid);
    become_worker(current);
    if ready.is_some_and(|ready| !ready.bind()) {
        // Dropping what it was given may panic as well.
        quietly(|| drop(run));
        return WorkerExit { code: FAILED, error: None };
    }
    control.stage.send_replace(Stage::Online);
    caught(run)
}

/// Binds a new thread to processors and tells its parent how that went.
struct Ready {
    set: CpuSet,
    tell: mpsc::SyncSender<io::Result<()>>,
}

/// The parent's end of [`Ready`].
struct ToldReady {
    processors: Vec<usize>,
    told: mpsc::Receiver<io::Result<()>>,
}

impl Ready {
    fn new(processors: Vec<usize>) -> Result<(Self, ToldReady), WorkerSpawnError> {
        let mut set = CpuSet::new();
        for processor in &processors {
            if *processor >= CpuSet::MAX_CPU {
                let source = io::Error::from(io::ErrorKind::InvalidInput);
                return Err(WorkerSpawnError::Affinity { processors, source });
            }
            set.set(*processor);
        }
        let (tell, told) = mpsc::sync_channel(1);
        Ok((Self { set, tell }, ToldReady { processors, told }))
    }

    fn bind(self) -> bool {
        let bound = sched_setaffinity(None, &self.set).map_err(io::Error::from);
        let done = bound.is_ok();
        self.tell.send(bound).is_ok() && done
    }
}

impl ToldReady {
    fn wait(self) -> Result<(), WorkerSpawnError> {
        let bound = self.told.recv().unwrap_or_else(|error| Err(io::Error::other(error)));
        bound.map_err(|source| WorkerSpawnError::Affinity { processors: self.processors, source })
    }
}

impl std::fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerOptions")
            .field("name", &self.name)
            .field("stack_size", &self.stack_size)
            .field("cpu_affinity", &self.processors)
            .finish_non_exhaustive()
    }
}
