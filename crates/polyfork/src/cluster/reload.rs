//! Reload: a new generation of workers takes over, or nothing changes; and the proof of what it cost.
//!
//! What may happen when is decided in `polyfork_core::supervisor`; here are the options, what the new generation is
//! started with, and the measurements.
//!
//! The rule that surprises: what was refused or reset is counted by the kernel and by the primary at the sockets, not
//! estimated from outside; but how long somebody waited in a kernel queue is only seen by looking now and then.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use polyfork_core::{
    Input, ListenerId, Reason, ReloadFault, ReloadPlan, Seat, SupervisorLimits, WorkerId,
};
use tokio::sync::oneshot;

use super::detect::Detected;
use super::event::{Event, Who};
use super::primary::{Primary, Timer};
use super::process::Environment;
use super::settings::{Address, Settings};

/// Between two looks at the queues during a reload.
const LOOK: Duration = Duration::from_millis(5);
/// How long new workers must stay ready before they get connections, unless asked otherwise.
const PROBATION: Duration = Duration::from_secs(1);

/// How a reload is to go ([`Cluster::reload`](super::Cluster::reload)).
#[derive(Debug, Clone)]
pub struct ReloadOptions {
    pub(crate) settings: Option<Settings>,
    /// The settings are those of [`Settings::reload_from`]: all of them count.
    pub(crate) from_source: bool,
    pub(crate) at_a_time: u32,
    pub(crate) probation: Duration,
}

impl Default for ReloadOptions {
    /// The same settings (a changed program file takes effect), all workers at once, a probation of one second.
    fn default() -> Self {
        ReloadOptions { settings: None, from_source: false, at_a_time: 0, probation: PROBATION }
    }
}

impl ReloadOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the new generation is started with; what [`Cluster::setup`](super::Cluster::setup) leaves alone stays.
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = Some(settings);
        self
    }

    /// Replaces so many workers at a time: fewer processes beside each other, and no longer all or nothing, for what
    /// an earlier batch has replaced stays replaced when a later one fails. Zero means all at once.
    #[must_use]
    pub fn at_a_time(mut self, workers: u32) -> Self {
        self.at_a_time = workers;
        self
    }

    /// How long new workers must stay ready before they get their first connection.
    #[must_use]
    pub fn probation(mut self, time: Duration) -> Self {
        self.probation = time;
        self
    }
}

/// What a reload did and what it cost.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct ReloadReport {
    /// The generation that serves now. The first one is 1.
    pub generation: u32,
    /// How many workers were replaced.
    pub workers: u32,
    /// Connections that were turned away meanwhile because a queue was full: the kernel's count, over all sockets. The
    /// client's own system tries again.
    pub refused: u64,
    /// Connections that were waiting on a socket when it had to be closed and could not be moved.
    pub reset: u64,
    /// Replaced workers that were still busy when their grace period was over: what they were serving was cut.
    #[serde(default)]
    pub cut_short: u32,
    /// Addresses that no worker of the new generation listens on. Each is closed three seconds later unless one does by then.
    #[serde(default)]
    pub abandoned: Vec<Address>,
    /// The longest time that a queue was seen to stand still with somebody in it (kernel, looked at every 5 ms), or
    /// from accepting a connection to its acknowledgement (hand-off).
    pub slowest_wait: Duration,
    /// From the request until the last old worker was gone.
    pub took: Duration,
}

/// Why a reload did not happen, or not wholly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// One is under way.
    #[error("a reload is under way already (generation {generation}); wait for its end")]
    Busy {
        /// The generation that it brings up.
        generation: u32,
    },
    /// The new program cannot be used.
    #[error("{0}")]
    Settings(String),
    /// Workers are not replaced in this cluster ([`Settings::supervise`]).
    #[error("nothing to reload: this cluster leaves its workers to themselves")]
    Unsupervised,
    /// A new worker did not get through. Workers that served go on serving.
    #[error("{}", failure(.who, .reason, .replaced))]
    Failed {
        /// The new worker.
        who: Who,
        /// What became of it.
        reason: Reason,
        /// How many workers an earlier batch had replaced; they stay.
        replaced: u32,
    },
    /// The cluster is stopping.
    #[error("the cluster is stopping")]
    Stopping,
    /// The cluster has ended.
    #[error("the cluster has ended")]
    Ended,
}

/// What the supervisor is to go by.
fn limits_of(settings: &Settings) -> SupervisorLimits {
    SupervisorLimits {
        ready_timeout: settings.ready_timeout,
        grace: settings.grace,
        restart: settings.restart.clone(),
        stay_at_rest: settings.stay_at_rest,
    }
}

fn failure(who: &Who, reason: &Reason, replaced: &u32) -> String {
    let rest = match replaced {
        0 => "the old workers go on serving".to_owned(),
        1 => "1 worker had been replaced and stays, the others go on serving".to_owned(),
        n => format!("{n} workers had been replaced and stay, the others go on serving"),
    };
    format!("new worker {} (pid {}) of slot {}: {reason}; {rest}", who.worker, who.pid, who.slot)
}

/// What a reload answers in the end.
pub(crate) type Answer = Result<ReloadReport, ReloadError>;

/// What workers of one generation are started with.
pub(crate) struct Launch {
    pub(crate) settings: Settings,
    pub(crate) detected: Detected,
    pub(crate) environment: Environment,
}

/// A reload under way.
pub(crate) struct Reloading {
    began: Instant,
    reply: oneshot::Sender<Answer>,
    /// Counts of the kernel and of ours, before.
    refused: u64,
    reset: u64,
    waits: Waits,
    /// Old workers whose grace period was over.
    cut_short: u32,
    /// The workers that it started.
    fresh: BTreeMap<WorkerId, Who>,
}

/// Queues that stand still.
#[derive(Default)]
struct Waits {
    /// How deep a queue was at the last look, and since when it has not become shorter.
    queues: BTreeMap<(ListenerId, Seat), (u32, Instant)>,
    slowest: Duration,
}

impl Waits {
    fn look(&mut self, now: Instant, depths: impl IntoIterator<Item = ((ListenerId, Seat), u32)>) {
        let before = std::mem::take(&mut self.queues);
        for (queue, depth) in depths.into_iter().filter(|(_, depth)| *depth > 0) {
            let since = match before.get(&queue) {
                Some((was, since)) if depth >= *was => *since,
                _ => now,
            };
            self.slowest = self.slowest.max(now - since);
            self.queues.insert(queue, (depth, since));
        }
    }
}

impl Primary {
    pub(crate) fn reload(
        &mut self,
        options: ReloadOptions,
        detected: Option<Detected>,
        reply: oneshot::Sender<Answer>,
    ) {
        if let Some(generation) = self.supervisor.reloading() {
            return self.refuse(reply, ReloadError::Busy { generation });
        }
        if self.is_stopping() {
            return self.refuse(reply, ReloadError::Stopping);
        }
        let ReloadOptions { settings, from_source, at_a_time, probation } = options;
        let detected = detected.unwrap_or_else(|| self.detected.clone());
        if detected.dialect != self.detected.dialect {
            let text = format!(
                "the new program speaks the {} dialect, the running one {}: stop it and start the new one",
                detected.dialect, self.detected.dialect
            );
            return self.refuse(reply, ReloadError::Settings(text));
        }
        let settings = settings.unwrap_or_else(|| self.settings.clone());
        let settings = match from_source {
            true => self.settings_of_source(settings),
            false => self.later_settings(settings),
        };
        // New workers may need more time than the old ones.
        self.supervisor.set_limits(limits_of(&settings));
        let environment = Environment::new(&settings, &detected);
        self.speak(&detected, &settings);
        let generation = self.supervisor.next_generation();
        self.launches.insert(generation, Launch { settings, detected, environment });
        let (refused, reset) = (self.ports.refused(), self.ports.reset);
        let (began, waits, fresh) = (Instant::now(), Waits::default(), BTreeMap::new());
        self.reloading =
            Some(Reloading { began, reply, refused, reset, waits, cut_short: 0, fresh });
        self.emit(Event::Reloading { generation });
        self.feed(Input::Reload(ReloadPlan { at_a_time, probation }));
        if self.supervisor.reloading().is_some() {
            self.look_at_queues();
        } else if let Some(reloading) = self.reloading.take() {
            self.launches.remove(&generation);
            self.supervisor.set_limits(limits_of(&self.settings));
            self.refuse(reloading.reply, ReloadError::Unsupervised);
        }
    }

    /// Settings that were read anew: what the sockets were built with stays.
    fn settings_of_source(&self, settings: Settings) -> Settings {
        let old = &self.settings;
        Settings {
            policy: old.policy,
            mechanism: old.mechanism,
            listen: old.listen.clone(),
            supervise: old.supervise,
            stay_at_rest: old.stay_at_rest || settings.stay_at_rest,
            ..settings
        }
    }

    /// Another number of workers than before is wanted. One that was changed by hand meanwhile is left alone.
    fn scale_as_configured(&mut self, before: &Settings) {
        let wanted = self.settings.worker_count();
        if self.settings.workers != before.workers && wanted > 0 && self.settings.supervise {
            self.feed(Input::Scale { workers: wanted });
        }
    }

    /// Nothing was begun.
    pub(crate) fn refuse(&self, reply: oneshot::Sender<Answer>, why: ReloadError) {
        self.notice("reload", None, format!("not reloaded: {why}"));
        // The asker may have gone.
        let _ = reply.send(Err(why));
    }

    /// Looks at the queues for as long as a reload goes on.
    pub(crate) fn look_at_queues(&mut self) {
        if let Some(reloading) = &mut self.reloading {
            reloading.waits.look(Instant::now(), self.ports.queues());
            self.after(LOOK, Timer::Queues);
        }
    }

    /// A connection was acknowledged this long after it was accepted.
    pub(crate) fn was_handed_over(&mut self, waited: Duration) {
        self.tally.handed_over(waited);
        if let Some(reloading) = &mut self.reloading {
            reloading.waits.slowest = reloading.waits.slowest.max(waited);
        }
    }

    /// A worker of the generation that is coming up.
    pub(crate) fn started_anew(&mut self, worker: WorkerId, who: Who) {
        if let Some(reloading) = &mut self.reloading {
            reloading.fresh.insert(worker, who);
        }
    }

    /// A worker has ended for this reason.
    pub(crate) fn ended_meanwhile(&mut self, worker: WorkerId, reason: Reason) {
        if let Some(reloading) = &mut self.reloading
            && reason == Reason::GraceExpired
            && !reloading.fresh.contains_key(&worker)
        {
            reloading.cut_short += 1;
        }
    }

    pub(crate) fn reloaded(&mut self, generation: u32, workers: u32) {
        if let Some(launch) = self.launches.remove(&generation) {
            let before = std::mem::replace(&mut self.settings, launch.settings);
            self.scale_as_configured(&before);
            self.detected = launch.detected;
            self.environment = launch.environment;
        }
        self.forget_launches();
        let Some(reloading) = self.reloading.take() else { return };
        let report = ReloadReport {
            generation,
            workers,
            refused: self.ports.refused().saturating_sub(reloading.refused),
            reset: self.ports.reset - reloading.reset,
            cut_short: reloading.cut_short,
            abandoned: self.ports.unused(),
            slowest_wait: reloading.waits.slowest,
            took: reloading.began.elapsed(),
        };
        self.emit(Event::Reloaded(report.clone()));
        // The new version may listen elsewhere.
        self.look_for_unused();
        // The asker may have gone.
        let _ = reloading.reply.send(Ok(report));
    }

    pub(crate) fn reload_failed(&mut self, generation: u32, replaced: u32, fault: ReloadFault) {
        self.forget_launches();
        self.supervisor.set_limits(limits_of(&self.settings));
        let Some(reloading) = self.reloading.take() else { return };
        let error = match fault {
            ReloadFault::Stopping => ReloadError::Stopping,
            ReloadFault::Candidate { slot, worker, reason } => {
                let unborn = Who { slot: slot.0, worker: worker.0, pid: 0 };
                let who = reloading.fresh.get(&worker).copied().unwrap_or(unborn);
                ReloadError::Failed { who, reason, replaced }
            }
        };
        self.emit(Event::ReloadFailed { generation, error: error.clone() });
        self.look_for_unused();
        // The asker may have gone.
        let _ = reloading.reply.send(Err(error));
    }

    /// Of what workers were started with, only what a slot's next worker may need is kept.
    fn forget_launches(&mut self) {
        let supervisor = &self.supervisor;
        self.launches.retain(|of, _| supervisor.slots().any(|slot| slot.generation == *of));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_gets_shorter_is_served_and_one_that_does_not_waits() {
        let mut waits = Waits::default();
        let (queue, began) = ((ListenerId(1), Seat(1)), Instant::now());
        let at = |ms| began + Duration::from_millis(ms);
        waits.look(at(0), [(queue, 1)]);
        waits.look(at(5), [(queue, 2)]);
        assert_eq!(waits.slowest, Duration::from_millis(5));
        waits.look(at(10), [(queue, 1)]);
        waits.look(at(14), [(queue, 1)]);
        assert_eq!(waits.slowest, Duration::from_millis(5));
        waits.look(at(20), []);
        waits.look(at(90), [(queue, 1)]);
        assert_eq!(waits.slowest, Duration::from_millis(5));
    }

    #[test]
    fn failure_names_the_worker_the_reason_and_who_serves() {
        let who = Who { slot: 1, worker: 7, pid: 42 };
        let error = ReloadError::Failed { who, reason: Reason::NeverReady, replaced: 0 };
        let text =
            "new worker 7 (pid 42) of slot 1: never got ready; the old workers go on serving";
        assert_eq!(error.to_string(), text);
    }
}
