//! When a worker stops: one state that begins once, who begins it, and what ends a program that forgot.
//!
//! Many wait for the state; the channel, the signals and the program itself begin it. Telling the primary is
//! left to `channel` and `mod`.
//!
//! The rule that surprises: while the primary lives, it alone ends a worker whose grace is over. Only when
//! the channel has ended does the worker arm a clock of its own, because nobody else is left to do it.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Grace of a worker whose primary died before it told its own.
pub(super) const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// The stop of one worker.
#[derive(Debug)]
pub(crate) struct Stop(watch::Sender<Option<Stopping>>);

/// A stop that has begun.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopping {
    since: Instant,
    grace: Duration,
}

impl Stop {
    pub(super) fn new() -> Stop {
        Stop(watch::Sender::new(None))
    }

    /// Begins the stop; false when it has begun before, which changes nothing.
    pub(super) fn begin(&self, grace: Duration) -> bool {
        self.0.send_if_modified(|state| {
            let first = state.is_none();
            state.get_or_insert_with(|| Stopping { since: Instant::now(), grace });
            first
        })
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Resolves when the stop begins, and at once when it has begun or the worker is gone.
    pub(crate) fn wait(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let mut state = self.0.subscribe();
        async move {
            // An error means that the worker and its tasks are gone: nothing to go on for.
            let _ = state.wait_for(Option::is_some).await;
        }
    }

    /// How much of the grace is left.
    pub(super) fn left(&self) -> Duration {
        match *self.0.borrow() {
            Some(Stopping { since, grace }) => grace.saturating_sub(since.elapsed()),
            None => DEFAULT_GRACE,
        }
    }
}

/// Ends this process with code 0 after `grace`, whatever its other threads do.
///
/// A thread and not a task: the program may block its event loop, or end it and hang in a destructor.
pub(super) fn exit_after(grace: Duration) {
    let wait_and_exit = move || {
        std::thread::sleep(grace);
        std::process::exit(0);
    };
    let thread = std::thread::Builder::new().name("polyfork-exit".into()).stack_size(64 * 1024);
    if thread.spawn(wait_and_exit).is_err() {
        // No thread to be had (EAGAIN): the event loop is second best.
        tokio::spawn(async move {
            tokio::time::sleep(grace).await;
            std::process::exit(0);
        });
    }
}

/// SIGTERM and SIGINT as this process gets them from now on, instead of dying of them.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// A signal that asks for a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Terminate,
    Interrupt,
}

impl Signals {
    /// Takes both signals over; needs a tokio runtime.
    pub(super) fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub(super) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Terminate,
            _ = self.interrupt.recv() => Asked::Interrupt,
        }
    }
}

impl Asked {
    /// Exit code of a process that ends because of the signal, as a shell counts it.
    pub(super) fn exit_code(self) -> i32 {
        match self {
            Asked::Interrupt => 128 + 2,
            Asked::Terminate => 128 + 15,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_stop_wins_and_all_who_wait_hear_of_it() {
        let stop = Stop::new();
        let early = [stop.wait(), stop.wait()];
        assert!(!stop.has_begun());
        assert!(stop.begin(Duration::from_secs(3600)));
        assert!(!stop.begin(Duration::ZERO));
        for waiting in early {
            waiting.await;
        }
        stop.wait().await;
        assert!(stop.left() > Duration::from_secs(3000));
    }

    #[tokio::test]
    async fn a_stop_resolves_when_its_worker_is_gone() {
        let stop = Stop::new();
        let waiting = stop.wait();
        drop(stop);
        waiting.await;
    }
}
