//! Time limits of tasks: one thread that sleeps until the next one is due.
//!
//! It is started with the first task that has a limit, so a pool without limits has none. A task that is over is taken
//! off the list at once; the list is never longer than the number of tasks with a limit that are still wanted.
//!
//! The rule that surprises: the timer knows tasks weakly. One that nobody holds any more has nobody to be told.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::thread::quietly;

/// Something with a time limit.
pub(super) trait Limited: Send + Sync {
    /// Its time is up.
    fn time_is_up(&self);
}

type Key = (Instant, u64);

/// The list, and the thread that looks after it.
#[derive(Default)]
pub(super) struct Timer {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Default)]
struct List {
    due: BTreeMap<Key, Weak<dyn Limited>>,
    next: u64,
    thread: Option<JoinHandle<()>>,
    stopped: bool,
}

impl Timer {
    /// Has `what` told at `when`. The answer takes it off again.
    ///
    /// # Errors
    /// The thread could not be started.
    pub(super) fn add(
        &self,
        when: Instant,
        what: Weak<dyn Limited>,
        name: &str,
    ) -> io::Result<Entry> {
        let mut list = self.inner.lock();
        if list.thread.is_none() && !list.stopped {
            let inner = self.inner.clone();
            let builder = thread::Builder::new().name(format!("{name}-timer"));
            list.thread = Some(builder.spawn(move || inner.run())?);
        }
        let key = (when, list.next);
        list.next += 1;
        let first = list.due.first_key_value().is_none_or(|(first, _)| key < *first);
        list.due.insert(key, what);
        drop(list);
        if first {
            self.inner.changed.notify_one();
        }
        Ok(Entry { key, inner: self.inner.clone() })
    }

    /// Ends the thread and waits for that.
    pub(super) fn stop(&self) {
        let thread = {
            let mut list = self.inner.lock();
            list.stopped = true;
            list.thread.take()
        };
        self.inner.changed.notify_one();
        if let Some(thread) = thread
            && thread.thread().id() != thread::current().id()
        {
            // It cannot have panicked; nothing would follow from it.
            let _ = thread.join();
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut list = self.lock();
        while !list.stopped {
            let now = Instant::now();
            let Some(first) = list.due.first_entry() else {
                list = self.changed.wait(list).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let due = first.key().0;
            if due > now {
                let waited = self.changed.wait_timeout(list, due - now);
                list = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let what = first.remove();
            drop(list);
            // Also its drop, should this be the last one who holds it, may run foreign code.
            quietly(|| {
                if let Some(what) = what.upgrade() {
                    what.time_is_up();
                }
            });
            list = self.lock();
        }
    }
}

/// A place on the list; dropping it gives the place up.
pub(super) struct Entry {
    key: Key,
    inner: Arc<Inner>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let what = self.inner.lock().due.remove(&self.key);
        drop(what);
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Entry").field(&self.key.0).finish()
    }
}
