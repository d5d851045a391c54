//! Signs of life: which worker has been silent for too long.
//!
//! The shell says who is watched, and feeds each sign of life and the time; what becomes of a worker that is silent is the
//! supervisor's business. A worker is first told of ([`Silence::Blocked`]), if its limits have a place for that, and then
//! given up ([`Silence::Dead`]), each once.
//!
//! The surprising rule: a look that comes late proves nothing about workers. When this process was itself stopped, frozen
//! with its control group, or starved, everybody looks silent at once. So a late look only begins all waits anew, and
//! whoever is silent has to miss two more looks, all of them after the gap, before it is given up.
//!
//! Source of the rule: sd_notify(3) for the limits; the rest is restated from the project's list of faults.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::WorkerId;
use crate::time::Time;

/// A look is late from a quarter of the limit on, or from this on where the limit is short.
const LEAST_LATENESS: Duration = Duration::from_millis(200);

/// How long a worker may be silent.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Patience {
    /// After this it is told of; without it, never before it is given up.
    pub tell: Option<Duration>,
    /// After this it is given up.
    pub limit: Duration,
}

impl Patience {
    /// For a worker that gives four signs of life within `limit`, as one does that is asked to by us.
    pub fn with_warning(limit: Duration) -> Patience {
        Patience { tell: Some(limit / 2), limit }
    }

    /// For a worker that was only told the limit.
    pub fn without_warning(limit: Duration) -> Patience {
        Patience { tell: None, limit }
    }
}

/// What a look found.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// A worker has been silent for this long. Told once, until it gives a sign of life.
    Blocked {
        /// Which.
        worker: WorkerId,
        /// Since its last sign of life.
        silent: Duration,
    },
    /// A worker has been silent for its limit. It is not watched any more.
    Dead {
        /// Which.
        worker: WorkerId,
        /// Since its last sign of life.
        silent: Duration,
    },
    /// The look was late by this much: all waits begin anew.
    Gap {
        /// How late.
        late: Duration,
    },
}

#[derive(Copy, Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Watched {
    patience: Patience,
    /// From when its silence counts.
    since: Time,
    /// Its last sign of life, or when it was first watched.
    heard: Time,
    told: bool,
}

impl Watched {
    fn deadline(&self) -> Option<Time> {
        let next = self.patience.tell.filter(|_| !self.told).unwrap_or(self.patience.limit);
        self.since.after(next)
    }

    fn lateness(&self, now: Time) -> Duration {
        let late = self.deadline().map_or(Duration::ZERO, |deadline| now.since(deadline));
        let bound = (self.patience.limit / 4).max(LEAST_LATENESS);
        if late >= bound { late } else { Duration::ZERO }
    }
}

/// Who is watched, and since when each has been silent.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Watchdog {
    watched: BTreeMap<WorkerId, Watched>,
}

impl Watchdog {
    /// Watches a worker from now on, or with other limits than so far.
    pub fn watch(&mut self, now: Time, worker: WorkerId, patience: Patience) {
        let fresh = Watched { patience, since: now, heard: now, told: false };
        self.watched.entry(worker).or_insert(fresh).patience = patience;
    }

    /// Whether a worker is watched.
    pub fn watches(&self, worker: WorkerId) -> bool {
        self.watched.contains_key(&worker)
    }

    /// Watches it no more. Fine if nobody did.
    pub fn forget(&mut self, worker: WorkerId) {
        self.watched.remove(&worker);
    }

    /// A sign of life. Gives how long the worker had been silent if that had been told.
    pub fn heard(&mut self, now: Time, worker: WorkerId) -> Option<Duration> {
        let watched = self.watched.get_mut(&worker)?;
        let silent = now.since(watched.heard);
        watched.since = watched.since.max(now);
        watched.heard = watched.heard.max(now);
        std::mem::take(&mut watched.told).then_some(silent)
    }

    /// How long a worker has been silent that was told of.
    pub fn blocked(&self, now: Time, worker: WorkerId) -> Option<Duration> {
        let watched = self.watched.get(&worker).filter(|watched| watched.told)?;
        Some(now.since(watched.heard))
    }

    /// When to look at the latest.
    pub fn deadline(&self) -> Option<Time> {
        self.watched.values().filter_map(Watched::deadline).min()
    }

    /// Looks. To be called whenever [`Watchdog::deadline`] has passed; at any other time it finds nothing.
    pub fn look(&mut self, now: Time, out: &mut Vec<Silence>) {
        let late = self.watched.values().map(|watched| watched.lateness(now)).max();
        if let Some(late) = late.filter(|late| !late.is_zero()) {
            self.watched.values_mut().for_each(|watched| watched.since = now);
            out.push(Silence::Gap { late });
            return;
        }
        self.watched.retain(|worker, watched| {
            let worker = *worker;
            let waited = now.since(watched.since);
            let silent = now.since(watched.heard);
            if waited >= watched.patience.limit {
                out.push(Silence::Dead { worker, silent });
                return false;
            }
            if !watched.told && watched.patience.tell.is_some_and(|tell| waited >= tell) {
                watched.told = true;
                out.push(Silence::Blocked { worker, silent });
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(4);
    const ONE: WorkerId = WorkerId(1);
    const TWO: WorkerId = WorkerId(2);

    fn at(ms: u64) -> Time {
        Time::new(Duration::from_millis(ms))
    }

    fn watching(workers: &[WorkerId]) -> Watchdog {
        let mut dog = Watchdog::default();
        workers.iter().for_each(|one| dog.watch(at(0), *one, Patience::with_warning(LIMIT)));
        dog
    }

    fn look(dog: &mut Watchdog, ms: u64) -> Vec<Silence> {
        let mut found = Vec::new();
        dog.look(at(ms), &mut found);
        found
    }

    #[test]
    fn a_silent_worker_is_told_of_once_and_then_given_up_once() {
        let mut dog = watching(&[ONE]);
        assert_eq!(dog.deadline(), Some(at(2000)));
        assert_eq!(look(&mut dog, 1999), []);
        let silent = Duration::from_secs(2);
        assert_eq!(look(&mut dog, 2000), [Silence::Blocked { worker: ONE, silent }]);
        assert_eq!(dog.deadline(), Some(at(4000)));
        assert_eq!(look(&mut dog, 3000), []);
        assert_eq!(look(&mut dog, 4000), [Silence::Dead { worker: ONE, silent: LIMIT }]);
        assert_eq!((look(&mut dog, 9000), dog.deadline()), (vec![], None));
    }

    #[test]
    fn a_sign_of_life_ends_the_silence_and_says_how_long_it_was() {
        let mut dog = watching(&[ONE]);
        look(&mut dog, 2000);
        assert_eq!(dog.blocked(at(2500), ONE), Some(Duration::from_millis(2500)));
        assert_eq!(dog.heard(at(3000), ONE), Some(Duration::from_secs(3)));
        assert_eq!(dog.blocked(at(3000), ONE), None);
        assert_eq!(dog.heard(at(3500), ONE), None);
        assert_eq!(look(&mut dog, 5499), []);
        let silent = Duration::from_secs(2);
        assert_eq!(look(&mut dog, 5500), [Silence::Blocked { worker: ONE, silent }]);
    }

    #[test]
    fn without_a_warning_it_is_given_up_at_the_limit() {
        let mut dog = Watchdog::default();
        dog.watch(at(0), ONE, Patience::without_warning(LIMIT));
        assert_eq!((look(&mut dog, 3999), dog.deadline()), (vec![], Some(at(4000))));
        assert_eq!(look(&mut dog, 4000), [Silence::Dead { worker: ONE, silent: LIMIT }]);
    }

    #[test]
    fn after_a_gap_nobody_is_given_up_before_two_more_missed_looks() {
        let mut dog = watching(&[ONE, TWO]);
        // Ten minutes of nothing at all.
        let late = Duration::from_millis(598_000);
        assert_eq!(look(&mut dog, 600_000), [Silence::Gap { late }]);
        // One comes back, one does not.
        dog.heard(at(600_500), ONE);
        assert_eq!(look(&mut dog, 601_999), []);
        let found = look(&mut dog, 602_000);
        assert!(matches!(found[..], [Silence::Blocked { worker: TWO, .. }]), "{found:?}");
        dog.heard(at(602_300), ONE);
        let found = look(&mut dog, 604_000);
        assert!(matches!(found[..], [Silence::Dead { worker: TWO, .. }]), "{found:?}");
    }

    #[test]
    fn gaps_that_follow_one_another_restart_nobody() {
        let mut dog = watching(&[ONE, TWO]);
        for round in 1..100 {
            let found = look(&mut dog, round * 5000);
            assert!(matches!(found[..], [Silence::Gap { .. }]), "{found:?}");
        }
    }

    #[test]
    fn a_gap_that_one_sign_of_life_came_through_still_counts_for_the_others() {
        let mut dog = watching(&[ONE, TWO]);
        // What waited in the channel of one is read before the look.
        dog.heard(at(60_000), ONE);
        let found = look(&mut dog, 60_000);
        assert!(matches!(found[..], [Silence::Gap { .. }]), "{found:?}");
    }

    #[test]
    fn a_clock_that_goes_back_stands_still() {
        let mut dog = watching(&[ONE]);
        dog.heard(at(5000), ONE);
        dog.heard(at(1), ONE);
        assert_eq!(look(&mut dog, 2500), []);
        assert_eq!(dog.deadline(), Some(at(7000)));
    }

    #[test]
    fn who_is_forgotten_is_not_waited_for() {
        let mut dog = watching(&[ONE]);
        assert!(dog.watches(ONE));
        dog.forget(ONE);
        assert_eq!((dog.deadline(), dog.heard(at(1), ONE)), (None, None));
        assert_eq!(look(&mut dog, 99_000), []);
    }
}
