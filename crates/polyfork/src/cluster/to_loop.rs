//! The way from the tasks around a primary to its loop, and the loop's word that they are to rest.
//!
//! A task that holds something (bytes that are no message yet, a status that nobody else will be told) has a [`Rest`]. When
//! the loop wants them to rest, each finishes what it has begun, tells what it holds, and ends. When the last one has
//! ended, the loop knows that nothing of its world is anywhere but with itself and in the kernel.
//!
//! The rule that surprises: a task rests between two steps only, never in the middle of telling the loop something. So the loop
//! must go on listening until all have ended.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::primary::FromIo;

/// What tasks report may be so far ahead of the loop.
const QUEUE: usize = 512;

/// The way to the loop.
#[derive(Clone)]
pub(crate) struct ToLoop {
    sender: mpsc::Sender<FromIo>,
    rest: Arc<watch::Sender<bool>>,
}

/// A task's ear for the word to rest; that it is there means that the task runs.
pub(crate) struct Rest(watch::Receiver<bool>);

impl ToLoop {
    pub(crate) fn new() -> (ToLoop, mpsc::Receiver<FromIo>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (ToLoop { sender, rest: Arc::new(watch::Sender::new(false)) }, receiver)
    }

    /// Reports. An error when the loop is gone.
    pub(crate) async fn send(&self, what: FromIo) -> Result<(), ()> {
        self.sender.send(what).await.map_err(drop)
    }

    /// For a new task that can rest.
    pub(crate) fn rest(&self) -> Rest {
        Rest(self.rest.subscribe())
    }

    /// Tells all tasks to rest, or that new ones may run.
    pub(crate) fn tell(&self, rest: bool) {
        self.rest.send_replace(rest);
    }

    /// Whether tasks are to rest.
    pub(crate) fn is_resting(&self) -> bool {
        *self.rest.borrow()
    }

    /// Whether every task that can rest has ended.
    pub(crate) fn is_quiet(&self) -> bool {
        self.rest.receiver_count() == 0
    }

    /// Waits until every task that can rest has ended. Cancel safe.
    pub(crate) async fn quiet(&self) {
        self.rest.closed().await;
    }
}

impl Rest {
    /// Returns when the task is to rest. Cancel safe.
    pub(crate) async fn asked(&mut self) {
        if self.0.wait_for(|rest| *rest).await.is_err() {
            // The loop is gone, and with it everybody who could want something.
            std::future::pending::<()>().await;
        }
    }
}
