//! How a worker ends: a code, and the reason if it went wrong.
//!
//! The rule that surprises: everything a worker's function can do to end is caught at the thread's entry, also a panic
//! while something is dropped there. Only what ends the whole process does not come here: a stack overflow, an abort,
//! a second panic while the first one unwinds.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// The code of a worker that went wrong, as in Node.
pub(super) const FAILED: i32 = 1;

/// An exit code that a worker's function can return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCode(pub i32);

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerExit {
    /// 0 if its function returned without an error, 1 after an error or a panic or when it was terminated, else what
    /// it chose.
    pub code: i32,
    /// What went wrong, if something did.
    pub error: Option<WorkerError>,
}

impl WorkerExit {
    /// Whether it ended with code 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }
}

/// What went wrong in a worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// It panicked; the panic's text.
    #[error("worker panicked: {0}")]
    Panicked(String),
    /// Its function returned an error; the error's text.
    #[error("worker failed: {0}")]
    Failed(String),
    /// It was a process, and a signal ended it; its name.
    #[error("worker was ended by {0}")]
    Killed(String),
}

impl WorkerError {
    /// The text of the panic or of the error, or the signal's name.
    pub fn text(&self) -> &str {
        match self {
            Self::Panicked(text) | Self::Failed(text) | Self::Killed(text) => text,
        }
    }
}

/// What the function of a worker may return: nothing, an [`ExitCode`], or a result whose error can be shown.
pub trait IntoExit {
    #[doc(hidden)]
    fn into_exit(self) -> WorkerExit;
}

impl IntoExit for () {
    fn into_exit(self) -> WorkerExit {
        ExitCode(0).into_exit()
    }
}

impl IntoExit for ExitCode {
    fn into_exit(self) -> WorkerExit {
        WorkerExit { code: self.0, error: None }
    }
}

impl<T: IntoExit, E: fmt::Display> IntoExit for Result<T, E> {
    fn into_exit(self) -> WorkerExit {
        match self {
            Ok(value) => value.into_exit(),
            Err(error) => {
                WorkerExit { code: FAILED, error: Some(WorkerError::Failed(error.to_string())) }
            }
        }
    }
}

/// What travels up the stack when a worker calls [`exit`].
struct Leaving(i32);

/// Ends this worker, or the child process that runs an entry, with a code (Node: `process.exit()` in a worker). Nothing after it is run, except what is dropped on
/// the way out.
///
/// It unwinds the stack without a panic message, to the entry of the worker; code that catches panics would catch it.
/// In a task that was spawned it ends that task alone: use it in the worker's own function. Where panics abort
/// (`panic = "abort"`) it would end the process: return an [`ExitCode`] instead.
///
/// # Panics
/// Outside of workers, where nobody is there to catch it.
pub fn exit(code: i32) -> ! {
    let caught = ALLOWED.load(Ordering::Relaxed) || !super::current::is_main_thread();
    assert!(caught, "exit() was called outside of a worker");
    resume_unwind(Box::new(Leaving(code)));
}

/// This process runs an entry, so that there is somebody to catch it.
static ALLOWED: AtomicBool = AtomicBool::new(false);

/// From now on [`exit`] may be called outside of workers as well.
pub(crate) fn allow_exit() {
    ALLOWED.store(true, Ordering::Relaxed);
}

/// Runs what may end in any way, to its end.
pub(crate) fn caught(run: impl FnOnce() -> WorkerExit) -> WorkerExit {
    // What it leaves behind in a broken state dies with its thread, or is behind a lock of its own.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(exit) => exit,
        Err(payload) => match payload.downcast::<Leaving>() {
            Ok(leaving) => WorkerExit { code: leaving.0, error: None },
            Err(payload) => {
                let error = Some(WorkerError::Panicked(panic_text(&*payload)));
                discard(payload);
                WorkerExit { code: FAILED, error }
            }
        },
    }
}

/// Does what must not stop the worker from telling its end.
pub(super) fn quietly(run: impl FnOnce()) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(run)) {
        discard(payload);
    }
}

/// A payload may panic when it is dropped, with a payload that may do it again.
fn discard(payload: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(again);
    }
}

/// The text of a panic, as the standard library shows it.
fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&'static str>() {
        return (*text).to_owned();
    }
    payload
        .downcast_ref::<String>()
        .cloned()
        .unwrap_or_else(|| "a value that is no text".to_owned())
}
