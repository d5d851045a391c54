//! Connections that the primary handed over and the program has not taken yet.
//!
//! A queue between the channel's reader and one listener. Saying to the primary what became of a connection
//! is left to them.
//!
//! The rule that surprises: what is in here is not ours yet. The primary has a copy of each, and gives it to
//! another worker when we refuse it or die; so nobody may read from a connection before it is acknowledged.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// More than any primary sends unasked; bounds what a faulty one makes us hold.
const CAPACITY: usize = 1024;

/// See the header.
#[derive(Debug)]
pub(crate) struct Handed(Mutex<State>);

#[derive(Debug)]
struct State {
    waiting: VecDeque<(u64, OwnedFd)>,
    taker: Option<Waker>,
    open: bool,
}

impl Handed {
    pub(crate) fn new() -> Handed {
        Handed(Mutex::new(State { waiting: VecDeque::new(), taker: None, open: true }))
    }

    /// Queues a connection; false when it must be refused: the queue is closed or full.
    pub(crate) fn give(&self, seq: u64, connection: OwnedFd) -> bool {
        let mut state = self.lock();
        if !state.open || state.waiting.len() >= CAPACITY {
            return false;
        }
        state.waiting.push_back((seq, connection));
        if let Some(taker) = state.taker.take() {
            taker.wake();
        }
        true
    }

    /// The oldest connection. Pending for ever once closed.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<(u64, OwnedFd)> {
        let mut state = self.lock();
        match state.waiting.pop_front() {
            Some(connection) => Poll::Ready(connection),
            None => {
                state.taker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Takes no more, and drops what waits; returns the numbers of those.
    pub(crate) fn close(&self) -> Vec<u64> {
        let mut state = self.lock();
        state.open = false;
        state.waiting.drain(..).map(|(seq, _)| seq).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and if it did the queue would still be whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[tokio::test]
    async fn connections_are_taken_in_the_order_they_came() {
        let handed = Handed::new();
        for seq in 5..8 {
            assert!(handed.give(seq, some_fd()));
        }
        for seq in 5..8 {
            assert_eq!(std::future::poll_fn(|cx| handed.poll_take(cx)).await.0, seq);
        }
    }

    #[test]
    fn a_closed_queue_names_what_waited_and_takes_no_more() {
        let handed = Handed::new();
        assert!(handed.give(1, some_fd()) && handed.give(2, some_fd()));
        assert_eq!(handed.close(), [1, 2]);
        assert!(!handed.give(3, some_fd()));
        assert!(handed.close().is_empty());
    }

    #[test]
    fn a_full_queue_takes_no_more() {
        let handed = Handed::new();
        let fill = (0..CAPACITY as u64).all(|seq| handed.give(seq, some_fd()));
        assert!(fill);
        assert!(!handed.give(CAPACITY as u64, some_fd()));
    }
}
