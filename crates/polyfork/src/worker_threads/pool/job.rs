//! Functions of this program as jobs, and pools of them: in threads, or, by one word, in child processes.
//!
//! A job is a name and a function of a value; values are moved to a thread and serialised to a process. The types must be
//! able to do both, so that the choice of the place is never a surprise. Everything else about a pool is as with closures.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::child::{self, Prepare};
use super::error::{PoolError, Rejected, TaskError};
use super::stats::Stats;
use super::task::{Context, Run, Task};
use super::{Closing, Full, Pool, PoolBuilder, Priority, TaskBuilder};
use crate::channel::Channel;
use crate::child_process::{AnyEntry, Command, EntryResult, sealed};

/// Where a [`JobPool`] runs its jobs, and an [`Entry`](crate::child_process::Entry) its function.
///
/// For a pool:
///
/// | | `Thread` | `Process` |
/// | --- | --- | --- |
/// | a job costs | moving the value | serialising it, a message there and back |
/// | a crash (stack overflow, abort, out of memory) | ends this program | is the job's [`TaskError::Crashed`]; the child is replaced |
/// | time limit, abort, dropping the task | the caller has its answer at once; the job is asked to stop | the child is killed and replaced |
/// | memory a job leaks | stays | goes with the child; see [`PoolBuilder::tasks_per_thread`] |
/// | starting one | some 10 µs | some milliseconds, and a program's own memory |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// In threads of this process.
    Thread,
    /// In child processes, each with one job at a time: this same program, started again. `main` must begin with
    /// [`run_entries`](crate::child_process::run_entries), given the job.
    Process,
}

/// A function of this program with a name, to be run by a [`JobPool`].
///
/// The function gets the value and a [`Context`], which tells it in a thread whether it should stop.
pub struct Job<In, Out> {
    name: &'static str,
    run: fn(In, &Context<'_>) -> Out,
}

impl<In, Out> Job<In, Out> {
    /// A job. The name must be its own among those given to [`run_entries`](crate::child_process::run_entries).
    pub const fn new(name: &'static str, run: fn(In, &Context<'_>) -> Out) -> Self {
        Self { name, run }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl<In, Out> Clone for Job<In, Out> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<In, Out> Copy for Job<In, Out> {}

impl<In, Out> fmt::Debug for Job<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({:?})", self.name)
    }
}

impl<In, Out> sealed::Sealed for Job<In, Out> {}

impl<In, Out> AnyEntry for Job<In, Out>
where
    In: DeserializeOwned + Send + 'static,
    Out: Serialize + Send + Sync + 'static,
{
    fn entry_name(&self) -> &'static str {
        self.name
    }

    fn run_on(
        &self,
        channel: Channel,
    ) -> std::pin::Pin<Box<dyn Future<Output = EntryResult> + Send>> {
        child::serve(self.run, channel)
    }
}

/// A pool that runs one [`Job`], in threads or in child processes. Clones are the same pool.
pub struct JobPool<In, Out> {
    pool: Pool,
    job: Job<In, Out>,
    place: Place,
    prepare: Option<Arc<Prepare>>,
}

impl<In, Out> Clone for JobPool<In, Out> {
    fn clone(&self) -> Self {
        let prepare = self.prepare.clone();
        Self { pool: self.pool.clone(), job: self.job, place: self.place, prepare }
    }
}

impl<In, Out> fmt::Debug for JobPool<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobPool")
            .field("job", &self.job)
            .field("place", &self.place)
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of one job, with nothing else said about it.
    ///
    /// # Errors
    /// As [`PoolBuilder::of`].
    pub fn of<In, Out>(job: &Job<In, Out>, place: Place) -> Result<JobPool<In, Out>, PoolError>
    where
        In: Serialize + DeserializeOwned + Send + 'static,
        Out: Serialize + DeserializeOwned + Send + 'static,
    {
        Self::builder().of(job, place)
    }
}

impl PoolBuilder {
    /// Says more about each child process of a [`JobPool`]: environment, user, control group, standard streams. Its program is this
    /// one, and may be another that has the job; its slot 3 is the channel. It is killed when this process ends, unless said otherwise.
    pub fn child_command(mut self, prepare: impl Fn(&mut Command) + Send + Sync + 'static) -> Self {
        self.prepare = Some(Arc::new(prepare));
        self
    }

    /// Makes a pool of one job. Processes are started with their first job; threads with the pool, as ever.
    ///
    /// # Errors
    /// As [`build`](Self::build); [`Full::RunInCaller`] makes no sense with processes.
    pub fn of<In, Out>(
        mut self,
        job: &Job<In, Out>,
        place: Place,
    ) -> Result<JobPool<In, Out>, PoolError>
    where
        In: Serialize + DeserializeOwned + Send + 'static,
        Out: Serialize + DeserializeOwned + Send + 'static,
    {
        let prepare = self.prepare.take();
        if place == Place::Process {
            if self.options.full == Full::RunInCaller {
                let text = "Full::RunInCaller: the caller is not a process of the pool";
                return Err(PoolError::Invalid(text.to_owned()));
            }
            self.options.has_children = true;
        }
        Ok(JobPool { pool: self.build()?, job: *job, place, prepare })
    }
}

impl<In, Out> JobPool<In, Out>
where
    In: Serialize + DeserializeOwned + Send + 'static,
    Out: Serialize + DeserializeOwned + Send + 'static,
{
    /// Brings a job to the pool; see [`Pool::run`].
    pub fn run(&self, input: In) -> Task<Out> {
        self.task().run(input)
    }

    /// Brings a job if there is room for it in the queue.
    ///
    /// # Errors
    /// [`Rejected`] gives the value back.
    pub fn try_run(&self, input: In) -> Result<Task<Out>, Rejected<In>> {
        self.task().try_run(input)
    }

    /// Brings a job and waits for what comes out, blocking this thread.
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn run_blocking(&self, input: In) -> Result<Out, TaskError> {
        self.run(input).wait()
    }

    /// A job about which something is to be said: priority, time limit.
    pub fn task(&self) -> JobBuilder<'_, In, Out> {
        JobBuilder { pool: self, task: self.pool.task() }
    }

    /// Where it runs its jobs.
    pub fn place(&self) -> Place {
        self.place
    }

    /// [`Pool::stats`].
    pub fn stats(&self) -> Stats {
        self.pool.stats()
    }

    /// [`Pool::close`]. Children get a second to leave by themselves.
    pub fn close(&self) -> Closing {
        self.pool.close()
    }

    /// [`Pool::abandon`]. Children with a job in hand are killed.
    pub fn abandon(&self) -> Closing {
        self.pool.abandon()
    }
}

/// A job to be brought to a pool, and what was said about it.
#[derive(Debug)]
#[must_use = "nothing is brought to the pool yet"]
pub struct JobBuilder<'a, In, Out> {
    pool: &'a JobPool<In, Out>,
    task: TaskBuilder<'a>,
}

impl<In, Out> JobBuilder<'_, In, Out>
where
    In: Serialize + DeserializeOwned + Send + 'static,
    Out: Serialize + DeserializeOwned + Send + 'static,
{
    /// How urgent it is.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.task = self.task.priority(priority);
        self
    }

    /// Time from bringing it to its outcome; see [`TaskBuilder::timeout`]. When it is up, a child process is killed.
    pub fn timeout(mut self, time: Duration) -> Self {
        self.task = self.task.timeout(time);
        self
    }

    /// [`timeout`](Self::timeout) as a point in time.
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.task = self.task.deadline(deadline);
        self
    }

    /// See [`JobPool::run`].
    pub fn run(self, input: In) -> Task<Out> {
        let given = self.given(input);
        self.task.bring(given)
    }

    /// See [`JobPool::try_run`].
    ///
    /// # Errors
    /// [`Rejected`] gives the value back.
    pub fn try_run(self, input: In) -> Result<Task<Out>, Rejected<In>> {
        let given = self.given(input);
        let refused = |(given, reason): (Given<In, Out>, _)| Rejected { task: given.input, reason };
        self.task.try_bring(given).map_err(refused)
    }

    fn given(&self, input: In) -> Given<In, Out> {
        let JobPool { job, place, prepare, .. } = self.pool;
        Given { input, job: *job, place: *place, prepare: prepare.clone() }
    }
}

/// A job with its value.
struct Given<In, Out> {
    input: In,
    job: Job<In, Out>,
    place: Place,
    prepare: Option<Arc<Prepare>>,
}

impl<In, Out> Run<Out> for Given<In, Out>
where
    In: Serialize + Send,
    Out: DeserializeOwned + Send,
{
    fn run(self, context: &Context<'_>) -> Result<Out, TaskError> {
        match self.place {
            Place::Thread => Ok((self.job.run)(self.input, context)),
            Place::Process => {
                child::run(self.job.name, self.prepare.as_deref(), &self.input, context)
            }
        }
    }
}
