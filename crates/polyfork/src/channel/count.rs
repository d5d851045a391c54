//! Counts connections that a Node server gave away, for its `getConnections` and `close`.
//!
//! The questions come in `engine`; here is what is open.
//!
//! The rule that surprises: a server that is being closed asks once and then waits for ever, so the answer
//! goes out later, when the last connection of its key is closed.
//!
//! Behaviour follows: Node `lib/internal/socket_list.js`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use super::engine::Shared;

/// Keeps one received connection counted until it is dropped; see
/// [`Message::take_counted`](super::Message::take_counted).
pub struct Counted {
    key: String,
    channel: Weak<Shared>,
}

impl Counted {
    /// The name by which the server groups its connections, such as `4:127.0.0.1:0`.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Counted({})", self.key)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.upgrade()
            && channel.counts.closed_one(&self.key)
        {
            channel.say_all_closed(&self.key);
        }
    }
}

/// Open connections by key. Only keys with open connections are remembered.
#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<HashMap<String, Count>>);

#[derive(Debug, Default)]
struct Count {
    open: u64,
    /// The server is being closed and waits.
    asked: bool,
}

impl Counts {
    /// A connection has come.
    pub(super) fn count(&self, key: String, channel: Weak<Shared>) -> Counted {
        self.lock().entry(key.clone()).or_default().open += 1;
        Counted { key, channel }
    }

    /// How many are open.
    pub(super) fn open(&self, key: &str) -> u64 {
        self.lock().get(key).map_or(0, |count| count.open)
    }

    /// The server wants to close: true when nothing is open, else it is told later.
    pub(super) fn asked(&self, key: &str) -> bool {
        match self.lock().get_mut(key) {
            Some(count) => {
                count.asked = true;
                false
            }
            None => true,
        }
    }

    /// One was closed: true when it was the last and the server waits for that.
    fn closed_one(&self, key: &str) -> bool {
        let mut counts = self.lock();
        let Some(count) = counts.get_mut(key) else { return false };
        count.open = count.open.saturating_sub(1);
        if count.open > 0 {
            return false;
        }
        counts.remove(key).is_some_and(|count| count.asked)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
