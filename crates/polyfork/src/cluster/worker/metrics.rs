//! What the program measures of itself, told to the primary when it asks.
//!
//! Only carries the text; what becomes of it is the business of whoever asked.
//!
//! The rule that surprises: the program's function runs in a task of its own, so that one that panics costs its answer
//! and not the channel.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyfork_wire::native::ToPrimary;

use super::Shared;

/// The longest text that is told.
const LONGEST: usize = 4 << 20;

/// How the program tells.
pub(super) type Tell = Arc<dyn Fn() -> String + Send + Sync>;

/// How the program tells, once it has said so.
#[derive(Default)]
pub(super) struct Metrics(Mutex<Option<Tell>>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metrics").field(&self.lock().is_some()).finish()
    }
}

impl Metrics {
    /// True for the first time.
    pub(super) fn set(&self, tell: Tell) -> bool {
        self.lock().replace(tell).is_none()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Tell>> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Answers a question of the primary, soon.
    pub(super) fn answer_metrics(self: &Arc<Self>, request: u64) {
        let Some(tell) = self.metrics.lock().clone() else { return };
        let worker = Arc::clone(self);
        tokio::spawn(async move {
            let text = tell();
            let answer = match text.len() {
                0..=LONGEST => Ok(text),
                long => Err(format!("{long} bytes; {LONGEST} can be told")),
            };
            worker.tell(&ToPrimary::Metrics { request, answer });
        });
    }
}
