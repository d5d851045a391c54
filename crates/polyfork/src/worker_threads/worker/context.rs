//! What a worker's function gets: the port to its parent and the wish to stop.

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::worker_threads::MessagePort;

/// A worker's end: its port to the parent (Node: `parentPort`), and what it was started with.
///
/// It is a [`MessagePort`]: receive from it, post to it.
pub struct WorkerContext<In, Out> {
    port: MessagePort<In, Out>,
    stop: CancellationToken,
    /// Never locked: so that a shared context asks no more of the data than to be `Send`.
    data: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<In, Out> WorkerContext<In, Out> {
    pub(super) fn new(
        port: MessagePort<In, Out>,
        stop: CancellationToken,
        data: Option<Box<dyn Any + Send>>,
    ) -> Self {
        Self { port, stop, data: Mutex::new(data) }
    }

    /// Takes the data given by [`WorkerOptions::worker_data`](super::WorkerOptions::worker_data) (Node: `workerData`);
    /// `None` if there is none of this type, or if it was taken.
    pub fn worker_data<T: Any + Send>(&mut self) -> Option<T> {
        let place = self.data.get_mut().unwrap_or_else(PoisonError::into_inner);
        match place.take()?.downcast() {
            Ok(data) => Some(*data),
            Err(data) => {
                *place = Some(data);
                None
            }
        }
    }

    /// Whether the parent asked it to stop. A loop that computes looks at this now and then.
    pub fn is_terminating(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// The wish to stop, for code that has no context.
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// The port alone.
    pub fn into_port(self) -> MessagePort<In, Out> {
        self.port
    }
}

impl<In, Out> Deref for WorkerContext<In, Out> {
    type Target = MessagePort<In, Out>;

    fn deref(&self) -> &Self::Target {
        &self.port
    }
}

impl<In, Out> DerefMut for WorkerContext<In, Out> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.port
    }
}

impl<In, Out> fmt::Debug for WorkerContext<In, Out> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkerContext").field(&self.port).finish()
    }
}
