//! Signs of life of workers: asks for them, listens for them, and has who is silent replaced.
//!
//! When a silence counts is decided in `polyfork_core::watchdog`, what becomes of the worker in
//! `polyfork_core::supervisor`. A Node worker gives signs by the preload (`preload.cjs`), one built on this crate by a task
//! of the library (`worker/beat.rs`), any other by `NOTIFY_SOCKET`. Queues that a silent worker does not empty are the
//! business of `stuck`.
//!
//! The rule that surprises: a worker of the first two kinds is only watched once it has given a sign. Whether it can
//! is for it to know (an older build, `--require` forbidden), and who never could is not replaced for it, but told of.
//!
//! Reference: sd_notify(3), sd_watchdog_enabled(3).

use std::time::Duration;

use polyfork_core::{Input, Patience, Reason, Silence, WorkerId};

use super::StartError;
use super::detect::{Detected, Runtime};
use super::event::Event;
use super::primary::{Primary, Timer, Worker};
use super::settings::{Dialect, Settings};

/// Signs of life within the limit.
const BEATS: u32 = 4;
/// No worker is woken more often than this for it.
const SHORTEST_BEAT: Duration = Duration::from_millis(10);

/// How often a worker is to give a sign of life.
pub(crate) fn beat(limit: Duration) -> Duration {
    (limit / BEATS).max(SHORTEST_BEAT)
}

/// Refuses what could not be watched or counted with workers of this kind.
pub(crate) fn check(settings: &Settings, detected: &Detected) -> Result<(), StartError> {
    let wrong = |text: String| Err(StartError::Settings(text));
    let is_node = matches!(detected.runtime, Runtime::Node { .. });
    let speaks_node = detected.dialect == Dialect::Node;
    if settings.watchdog.is_some() && speaks_node && !is_node {
        return wrong(format!(
            "no watchdog for {}: it takes no preload that could say that its event loop runs; leave the watchdog \
             out, or run the program by Node",
            detected.runtime
        ));
    }
    if settings.max_requests.is_some() && !(speaks_node && is_node) {
        return wrong(format!(
            "requests are counted in Node workers only, and these speak the {} dialect ({}); limit their \
             connections instead",
            detected.dialect, detected.runtime
        ));
    }
    let wants = settings.watchdog.is_some() || settings.max_requests.is_some();
    if wants && speaks_node && !settings.drain_preload {
        let text = "the watchdog and the limit on requests of Node workers need the preload: leave one or the other out";
        return wrong(text.to_owned());
    }
    Ok(())
}

impl Primary {
    /// The worker serves from now on: signs of life are due, if it gives any.
    pub(crate) fn begin_watch(&mut self, worker: WorkerId) {
        let now = self.now();
        let Some(w) = self.workers.get(&worker) else { return };
        let Some(limit) = w.watchdog else { return };
        match self.detected.dialect {
            // It was told the limit and may give its signs as seldom as that.
            Dialect::Sockets => {
                self.watchdog.watch(now, worker, Patience::without_warning(limit));
            }
            _ if w.beats => self.watchdog.watch(now, worker, Patience::with_warning(limit)),
            _ => self.after(limit, Timer::NoBeat(worker)),
        }
    }

    /// A sign of life.
    pub(crate) fn alive(&mut self, worker: WorkerId, lag: Option<Duration>) {
        let now = self.now();
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let who = w.who;
        w.lag = lag.or(w.lag);
        let first = !std::mem::replace(&mut w.beats, true);
        if let Some(silent) = self.watchdog.heard(now, worker) {
            self.emit(Event::Unblocked { who, silent });
        } else if first && self.workers.get(&worker).is_some_and(|w| w.admitted) {
            self.begin_watch(worker);
        }
    }

    /// `WATCHDOG_USEC=` of a worker: it chooses its limit.
    pub(crate) fn change_watch(&mut self, worker: WorkerId, limit: Duration) {
        let now = self.now();
        let Some(w) = self.workers.get_mut(&worker) else { return };
        // Nobody asked for signs of life.
        if w.watchdog.is_none() || limit.is_zero() {
            return;
        }
        w.watchdog = Some(limit);
        if self.watchdog.watches(worker) {
            self.watchdog.watch(now, worker, Patience::without_warning(limit));
        }
    }

    /// A worker that serves was asked for signs of life and gave none in all its limit.
    pub(crate) fn no_beat(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get(&worker).filter(|w| !w.beats && !w.leaving) else { return };
        let text = "it gives no sign of life, so it is not watched: its program was built with an older version, or \
                    Node may not load the preload";
        self.notice("watchdog", Some(w.who), text.to_owned());
    }

    /// Whether it is silent, as far as that has been told.
    pub(crate) fn blocked_for(&self, worker: WorkerId) -> Option<Duration> {
        self.watchdog.blocked(self.now(), worker)
    }

    /// Looks who is silent.
    pub(crate) fn look_for_silence(&mut self) {
        let now = self.now();
        if self.watchdog.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let mut found = Vec::new();
        self.watchdog.look(now, &mut found);
        for silence in found {
            match silence {
                Silence::Blocked { worker, silent } => {
                    let Some(w) = self.workers.get(&worker) else { continue };
                    self.emit(Event::Blocked { who: w.who, silent });
                }
                Silence::Dead { worker, silent } => self.silent_for_too_long(worker, silent),
                Silence::Gap { late } => {
                    let text = format!(
                        "this process stood still for {} ms: workers are given their whole time again before their \
                         silence counts",
                        late.as_millis()
                    );
                    self.notice("gap", None, text);
                }
            }
        }
    }

    fn silent_for_too_long(&mut self, worker: WorkerId, silent: Duration) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.silent = true;
        let who = w.who;
        let text = format!("no sign of life for {} ms; the worker is replaced", silent.as_millis());
        self.notice("watchdog", Some(who), text);
        self.feed(Input::Replace { worker, reason: Reason::Watchdog });
    }

    /// What waits for a silent worker that gets nothing new any more goes to the others.
    pub(crate) fn rescue_from_silent(&mut self, worker: WorkerId) {
        if self.workers.get(&worker).is_some_and(|w: &Worker| w.silent) {
            self.empty_queue(worker);
        }
    }
}
