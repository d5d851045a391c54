//! What a worker has asked its primary for: listeners, those asked for and those it uses, and readiness.
//!
//! Pure state behind one lock; nothing here reads or writes a socket. The channel's reader puts answers in,
//! listeners take them out, and what has to be said to the primary is returned to the caller.
//!
//! The rule that surprises: a worker is ready when the program accepts on every listener it has opened, not
//! when `listen` returns. Until then it may still be loading something, and connections would wait for it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyfork_wire::native::{ListenAddress, ToPrimary};
use tokio::sync::oneshot;

use super::Registration;
use crate::cluster::listener::handed::Handed;

/// See the header.
#[derive(Debug)]
pub(super) struct Registry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next_request: u32,
    requests: HashMap<u32, Asker>,
    listeners: HashMap<u32, Entry>,
    ready: bool,
    stopping: bool,
    /// Set by the end of the channel: why nothing can be asked for any more.
    ended: Option<String>,
}

#[derive(Debug)]
struct Entry {
    accepting: bool,
    handed: Option<Arc<Handed>>,
}

/// A listener that the primary opened for us, on its way to the program.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) registration: Registration,
    pub(super) address: ListenAddress,
    pub(super) source: Source,
}

/// Where the connections of a listener come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// A listening socket of our own.
    Socket(OwnedFd),
    /// The primary hands them over.
    Handed(Arc<Handed>),
}

impl Source {
    /// The queue, if connections are handed over.
    pub(super) fn handed(&self) -> Option<Arc<Handed>> {
        match self {
            Source::Handed(handed) => Some(Arc::clone(handed)),
            Source::Socket(_) => None,
        }
    }
}

/// Who waits for the answer to a request.
pub(super) type Asker = oneshot::Sender<io::Result<Opened>>;

impl Registry {
    pub(super) fn new() -> Registry {
        Registry(Mutex::new(State::default()))
    }

    /// Notes a request; the number goes into [`ToPrimary::Listen`].
    pub(super) fn ask(&self) -> io::Result<(u32, oneshot::Receiver<io::Result<Opened>>)> {
        let mut state = self.lock();
        if let Some(why) = &state.ended {
            return Err(io::Error::new(io::ErrorKind::NotConnected, why.clone()));
        }
        let request = state.next_request;
        state.next_request = request.wrapping_add(1);
        let (tell, answer) = oneshot::channel();
        state.requests.insert(request, tell);
        Ok((request, answer))
    }

    /// Who made a request; `None` when nobody did.
    pub(super) fn answered(&self, request: u32) -> Option<Asker> {
        self.lock().requests.remove(&request)
    }

    /// The primary could not do what was asked for.
    pub(super) fn failed(&self, request: u32, error: io::Error) {
        if let Some(asker) = self.answered(request) {
            // Whoever gave up waiting does not need the error.
            let _ = asker.send(Err(error));
        }
    }

    /// Counts a listener from now on. False when it counts already: the primary names a listener by its
    /// address, so this worker listens there.
    pub(super) fn register(&self, listener: u32, handed: Option<Arc<Handed>>) -> bool {
        let mut state = self.lock();
        if state.listeners.contains_key(&listener) {
            return false;
        }
        let entry = Entry { accepting: false, handed };
        if state.stopping {
            // Empty still, so nothing has to be refused.
            drop(entry.refuse(listener));
        }
        state.listeners.insert(listener, entry);
        true
    }

    /// The queue of a listener whose connections are handed over.
    pub(super) fn handed(&self, listener: u32) -> Option<Arc<Handed>> {
        self.lock().listeners.get(&listener)?.handed.clone()
    }

    /// The program accepts on a listener for the first time; returns what to tell the primary.
    pub(super) fn accepting(&self, listener: u32) -> Vec<ToPrimary> {
        let mut state = self.lock();
        let Some(entry) = state.listeners.get_mut(&listener) else { return Vec::new() };
        entry.accepting = true;
        let mut tell = vec![ToPrimary::Listening { listener }];
        tell.extend(state.ready_now());
        tell
    }

    /// The program dropped a listener; returns what to tell the primary.
    pub(super) fn closed(&self, listener: u32) -> Vec<ToPrimary> {
        let mut state = self.lock();
        let Some(entry) = state.listeners.remove(&listener) else { return Vec::new() };
        let mut tell = entry.refuse(listener);
        tell.push(ToPrimary::Close { listener });
        tell.extend(state.ready_now());
        tell
    }

    /// The program says that it is ready; true when it was not before.
    pub(super) fn ready(&self) -> bool {
        !std::mem::replace(&mut self.lock().ready, true)
    }

    /// The worker stops: every connection that waits goes back, and none is taken any more.
    pub(super) fn refuse_all(&self) -> Vec<ToPrimary> {
        let mut state = self.lock();
        state.stopping = true;
        state.listeners.iter().flat_map(|(listener, entry)| entry.refuse(*listener)).collect()
    }

    /// The channel has ended: nothing that was asked for will be answered.
    pub(super) fn end(&self, why: &str) {
        let mut state = self.lock();
        state.stopping = true;
        state.ended.get_or_insert_with(|| why.to_owned());
        for (_, asker) in state.requests.drain() {
            // Whoever gave up waiting does not need the error.
            let _ = asker.send(Err(io::Error::new(io::ErrorKind::NotConnected, why)));
        }
        for (listener, entry) in &state.listeners {
            // The primary's copies are given to other workers, or gone with it; ours must not be touched.
            drop(entry.refuse(*listener));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and if it did every entry would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ready_now(&mut self) -> Option<ToPrimary> {
        let all = !self.listeners.is_empty() && self.listeners.values().all(|e| e.accepting);
        (all && !std::mem::replace(&mut self.ready, true)).then_some(ToPrimary::Ready)
    }
}

impl Entry {
    fn refuse(&self, listener: u32) -> Vec<ToPrimary> {
        let waiting = self.handed.iter().flat_map(|handed| handed.close());
        waiting.map(|seq| ToPrimary::Refused { listener, seq }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_ready_when_it_accepts_on_every_listener() {
        let registry = Registry::new();
        assert!(registry.register(1, None) && registry.register(2, None));
        assert_eq!(registry.accepting(1), [ToPrimary::Listening { listener: 1 }]);
        assert_eq!(registry.accepting(2), [ToPrimary::Listening { listener: 2 }, ToPrimary::Ready]);
        assert!(registry.register(3, None));
        assert_eq!(registry.accepting(3), [ToPrimary::Listening { listener: 3 }]);
    }

    #[test]
    fn a_listener_that_is_dropped_does_not_hold_readiness_up() {
        let registry = Registry::new();
        assert!(registry.register(1, None) && registry.register(2, None));
        registry.accepting(1);
        assert_eq!(registry.closed(2), [ToPrimary::Close { listener: 2 }, ToPrimary::Ready]);
    }

    #[test]
    fn a_program_that_says_so_is_ready_once() {
        let registry = Registry::new();
        assert!(registry.ready());
        assert!(!registry.ready());
        assert!(registry.register(1, None));
        assert_eq!(registry.accepting(1), [ToPrimary::Listening { listener: 1 }]);
    }

    #[test]
    fn a_listener_counts_once_until_it_is_closed() {
        let registry = Registry::new();
        assert!(registry.register(1, None));
        assert!(!registry.register(1, None));
        assert_eq!(registry.closed(1), [ToPrimary::Close { listener: 1 }]);
        assert_eq!(registry.closed(1), []);
        assert!(registry.register(1, None));
    }

    #[test]
    fn a_listener_that_opens_during_a_stop_takes_nothing() {
        let registry = Registry::new();
        assert_eq!(registry.refuse_all(), []);
        let handed = Arc::new(Handed::new());
        assert!(registry.register(1, Some(Arc::clone(&handed))));
        assert!(!handed.give(1, std::fs::File::open("/dev/null").unwrap().into()));
    }

    #[test]
    fn the_end_of_the_channel_answers_every_request() {
        let registry = Registry::new();
        let (_, answer) = registry.ask().unwrap();
        registry.end("the primary is gone");
        assert_eq!(answer.blocking_recv().unwrap().unwrap_err().to_string(), "the primary is gone");
        assert_eq!(registry.ask().unwrap_err().to_string(), "the primary is gone");
    }
}
