//! Why a task has no result, and why a pool could not be made.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use super::thread::quietly;
use crate::child_process::Exit;

/// Why a task has no result.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// It panicked. Its thread goes on with the next task.
    #[error("task panicked: {text}")]
    Panicked {
        /// The panic's text, or what stands for it when the panic carried something else.
        text: String,
    },
    /// It was aborted: before it began, or, in a child process, at any time.
    #[error("task was aborted")]
    Aborted,
    /// Its time was up.
    #[error("task {}", if *begun { "was not done in time; it has been asked to stop" } else { "had not begun in time" })]
    TimedOut {
        /// It was running then, and runs on until it looks at its [`Context`](super::Context) or ends. In a child process it
        /// was killed.
        begun: bool,
    },
    /// The queue was full.
    #[error("task was refused: the queue is full")]
    Full,
    /// Its process ended under it. The next task gets another one.
    #[error("process of the task ended under it{}", how(*exit))]
    Crashed {
        /// How it ended.
        exit: Exit,
    },
    /// It could not be given to a process: none could be started, or the job or its result cannot be sent.
    #[error("task was not done in a process: {reason}")]
    Process {
        /// What went wrong, on what.
        reason: String,
    },
    /// It had to make room in the full queue for a newer one.
    #[error("task lost its place in the full queue to a newer one")]
    Displaced,
    /// The pool was closed before it began.
    #[error("task was refused: the pool is closed")]
    Closed,
    /// There is no thread, and none could be started.
    #[error("task was dropped: cannot start a thread of the pool: {0}")]
    NoThread(Arc<io::Error>),
}

fn how(exit: Exit) -> String {
    match (exit.code, exit.signal) {
        (Some(code), _) => format!(" with exit code {code}"),
        (None, Some(signal)) => format!(": killed by {signal}"),
        (None, None) => String::new(),
    }
}

/// The pool could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The numbers make no sense; the text says which.
    #[error("cannot make a pool: {0}")]
    Invalid(String),
    /// One of the first threads could not be started.
    #[error("cannot start a thread of the pool: {0}")]
    Thread(#[source] io::Error),
}

/// A task that was not taken, with what was to be run.
pub struct Rejected<F> {
    /// What was to be run.
    pub task: F,
    /// Why not: [`TaskError::Full`], [`TaskError::Closed`] or [`TaskError::NoThread`].
    pub reason: TaskError,
}

impl<F> fmt::Debug for Rejected<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl<F> fmt::Display for Rejected<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl<F> std::error::Error for Rejected<F> {}

/// The text of a panic. What it carried is dropped, and if that panics in its turn, so what.
pub(super) fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = if let Some(text) = payload.downcast_ref::<&'static str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "(a value that is no text)".to_owned()
    };
    quietly(|| drop(payload));
    text
}
