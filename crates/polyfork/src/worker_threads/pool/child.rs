//! The child process that belongs to one thread of a pool: started, given jobs one at a time, killed, replaced.
//!
//! A pool of processes is a pool of threads each of which has a child and waits for it, so queue, priorities, time limits
//! and figures are those of threads. The thread has a small runtime of its own for the channel.
//!
//! The rule that surprises: a child that was found dead *before* a job was sent is replaced without a word; one that dies
//! after is that job's error, because nobody knows how far it got.

use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use super::error::{TaskError, panic_text};
use super::task::Context;
use crate::channel::{Channel, Encoding};
use crate::child_process::{Child, Command, EntryResult, Exit, Forked, Port, Signal, fork_program};
use crate::process::FORK_ENTRY;

/// How long a child that is no longer needed may take to leave by itself.
const GRACE: Duration = Duration::from_secs(1);

/// Says more about each child.
pub(super) type Prepare = dyn Fn(&mut Command) + Send + Sync;

thread_local! {
    static CHILD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// What a child answers.
#[derive(Serialize, Deserialize)]
enum Answer<Out> {
    Done(Out),
    Panicked(String),
}

/// A child and its channel.
struct Held {
    /// Dropped last: channel and child belong to it.
    parts: Option<(Channel, Child)>,
    runtime: Runtime,
}

/// Runs one job in the child of this thread, which is started or replaced if need be.
pub(super) fn run<In, Out>(
    entry: &'static str,
    prepare: Option<&Prepare>,
    job: &In,
    context: &Context<'_>,
) -> Result<Out, TaskError>
where
    In: Serialize,
    Out: DeserializeOwned,
{
    CHILD.with_borrow_mut(|place| {
        let mut held = match place.take() {
            Some(held) if held.lives() => held,
            _ => Held::start(entry, prepare)?,
        };
        let outcome = held.call(job, context);
        // A panic and a job that could not be sent leave the child as good as before.
        if held.parts.is_some() {
            *place = Some(held);
        }
        outcome
    })
}

/// Ends the child of this thread, if it has one.
pub(super) fn end() {
    let held = CHILD.with_borrow_mut(Option::take);
    if let Some(mut held) = held {
        held.leave();
    }
}

fn failed(what: &str, error: impl std::fmt::Display) -> TaskError {
    TaskError::Process { reason: format!("{what}: {error}") }
}

impl Held {
    fn start(entry: &'static str, prepare: Option<&Prepare>) -> Result<Self, TaskError> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| failed("cannot start a runtime for its channel", error))?;
        let mut command = Command::new("/proc/self/exe");
        command.parent_death_signal(Signal::KILL);
        if let Some(prepare) = prepare {
            prepare(&mut command);
        }
        command.env(FORK_ENTRY, entry);
        let forked = {
            let _inside = runtime.enter();
            fork_program(&mut command, Encoding::Native)
        };
        let Forked { channel, child } =
            forked.map_err(|error| failed("cannot start its process", error))?;
        Ok(Self { parts: Some((channel, child)), runtime })
    }

    /// Whether the child has not ended, as far as the kernel knows.
    fn lives(&self) -> bool {
        self.parts.as_ref().is_some_and(|(_, child)| child.kill(Signal::NONE).unwrap_or(true))
    }

    fn call<In, Out>(&mut self, job: &In, context: &Context<'_>) -> Result<Out, TaskError>
    where
        In: Serialize,
        Out: DeserializeOwned,
    {
        let Some((channel, child)) = &mut self.parts else {
            return Err(failed("its process", "has ended"));
        };
        let stopped = Arc::new(Notify::new());
        let notify = stopped.clone();
        context.on_stop(move || notify.notify_one());
        let answer = self.runtime.block_on(async {
            let abandoned = async {
                match context.abandoned() {
                    Some(abandoned) => abandoned.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = ask::<In, Out>(channel, job) => Some(answer),
                () = stopped.notified() => None,
                () = abandoned => None,
            }
        });
        match answer {
            Some(Asked::Answered(Answer::Done(outcome))) => Ok(outcome),
            Some(Asked::Answered(Answer::Panicked(text))) => Err(TaskError::Panicked { text }),
            Some(Asked::NotSent(error)) => Err(error),
            Some(Asked::Unreadable(error)) => {
                self.kill();
                Err(error)
            }
            Some(Asked::Gone) => {
                let exit = self.runtime.block_on(last_moment(child));
                self.parts = None;
                Err(TaskError::Crashed { exit })
            }
            None => {
                self.kill();
                Err(TaskError::Aborted)
            }
        }
    }

    fn kill(&mut self) {
        if let Some((channel, mut child)) = self.parts.take() {
            // It may have ended by itself meanwhile.
            let _sent = child.kill(Signal::KILL);
            drop(channel);
            // An error would mean that the runtime has ended, and it is ours.
            let _exit = self.runtime.block_on(child.wait());
        }
    }

    /// Lets it leave by itself, for a while.
    fn leave(&mut self) {
        let Some((channel, child)) = &mut self.parts else { return };
        self.runtime.block_on(async {
            // Gone already, if this is an error.
            let _ended = channel.disconnect().await;
            last_moment(child).await
        });
        self.parts = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Inside its runtime, where channel and child were made.
        let _inside = self.runtime.enter();
        self.parts = None;
    }
}

/// Waits for the end of a child that has no channel any more; kills it if it does not come.
async fn last_moment(child: &mut Child) -> Exit {
    if let Ok(exit) = tokio::time::timeout(GRACE, child.wait()).await {
        return exit.unwrap_or_default();
    }
    let _sent = child.kill(Signal::KILL);
    child.wait().await.unwrap_or_default()
}

/// What came of a question.
enum Asked<Out> {
    Answered(Answer<Out>),
    NotSent(TaskError),
    Unreadable(TaskError),
    Gone,
}

async fn ask<In, Out>(channel: &mut Channel, job: &In) -> Asked<Out>
where
    In: Serialize,
    Out: DeserializeOwned,
{
    use crate::channel::SendError;
    match channel.send(job).await {
        Ok(()) => {}
        Err(SendError::Disconnected) => return Asked::Gone,
        Err(error) => return Asked::NotSent(failed("cannot send the job", error)),
    }
    match channel.recv().await {
        Ok(Some(message)) => match message.to() {
            Ok(answer) => Asked::Answered(answer),
            Err(error) => Asked::Unreadable(failed("cannot read the result", error)),
        },
        Ok(None) => Asked::Gone,
        Err(error) => Asked::Unreadable(failed("cannot read the result", error)),
    }
}

/// What the child does.
pub(super) fn serve<In, Out>(
    job: fn(In, &Context<'_>) -> Out,
    channel: Channel,
) -> Pin<Box<dyn Future<Output = EntryResult> + Send>>
where
    In: DeserializeOwned + Send + 'static,
    Out: Serialize + Send + Sync + 'static,
{
    Box::pin(async move {
        let channel = channel;
        let mut port: Port<In, Answer<Out>> = Port::new(channel);
        while let Some(input) = port.recv().await? {
            let answer = catch_unwind(AssertUnwindSafe(|| job(input, &Context::elsewhere())))
                .map_or_else(|payload| Answer::Panicked(panic_text(payload)), Answer::Done);
            port.send(&answer).await?;
        }
        Ok(())
    })
}
