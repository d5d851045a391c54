//! Limits on a worker's life: memory, age, connections, requests. A worker beyond one is renewed.
//!
//! Renewing means that its successor is ready before the worker is told to stop (`polyfork_core::supervisor`), so a limit
//! costs no request. One worker at a time: where several are beyond their limits, the others wait for the next look.
//! Signs of life are elsewhere: those that workers give in `watchdog`, queues that nobody empties in `stuck`.
//!
//! The rule that surprises: all limits but memory are each worker's own, up to a tenth above what was asked for,
//! or all workers of a cluster would come to theirs at the same moment.

use std::time::{Duration, Instant};

use polyfork_core::restart::Jitter;
use polyfork_core::{Input, ReloadFault, SlotId, WorkerId};

use super::primary::{Primary, Timer, Worker};
use super::settings::Settings;
use super::upgrade::Moment;

/// Between two looks, where there is something to look for, at least.
const LOOK: Duration = Duration::from_secs(1);
/// A slot whose successor did not come up is left alone for this long.
const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// What one worker may come to.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Allowance {
    memory: Option<u64>,
    age: Option<Duration>,
    connections: Option<u64>,
    requests: Option<u64>,
}

impl Allowance {
    /// A worker's own limits.
    pub(crate) fn draw(settings: &Settings, chance: &mut Jitter) -> Allowance {
        let mut above = || 1.0 + (chance.bits() % 1000) as f64 / 10_000.0;
        Allowance {
            memory: settings.max_memory,
            age: settings.max_lifetime.map(|age| age.mul_f64(above())),
            // Counts are far below 2^52.
            connections: settings.max_connections.map(|most| (most as f64 * above()) as u64),
            requests: settings.max_requests.map(|most| (most as f64 * above()) as u64),
        }
    }

    /// After how many requests a Node worker is to say so: it counts them itself, and nobody has to look.
    pub(crate) fn requests(&self) -> Option<u64> {
        self.requests
    }

    fn is_limited(&self) -> bool {
        self.memory.is_some()
            || self.age.is_some()
            || self.connections.is_some()
            || self.requests.is_some()
    }

    /// Which limit is exceeded, in words.
    fn exceeded(
        &self,
        memory: impl FnOnce() -> Option<u64>,
        age: Duration,
        connections: Option<u64>,
    ) -> Option<String> {
        const MIB: u64 = 1 << 20;
        if let Some(most) = self.age.filter(|most| age >= *most) {
            return Some(format!(
                "it has lived {} s, its limit is {} s",
                age.as_secs(),
                most.as_secs()
            ));
        }
        if let Some((most, had)) = self.connections.zip(connections).filter(|(most, n)| n >= most) {
            return Some(format!("it was given {had} connections, its limit is {most}"));
        }
        let most = self.memory?;
        let used = memory().filter(|used| *used > most)?;
        let (used, most) = (used.div_ceil(MIB), most / MIB);
        Some(format!("it uses {used} MiB of memory, the limit is {most}"))
    }
}

/// What the looks remember.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// When the next look is.
    next: Option<Instant>,
    /// Slots that are left alone for a while.
    pauses: Vec<(SlotId, Instant)>,
}

/// What the looks remember, as it is carried to the next image of the primary. The looks themselves begin anew.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct HealthState {
    pauses: Vec<(SlotId, Moment)>,
}

impl Health {
    pub(crate) fn state(&self) -> HealthState {
        let Health { next: _, pauses } = self;
        let pauses = pauses.iter().map(|(slot, until)| (*slot, Moment(*until))).collect();
        HealthState { pauses }
    }
}

impl HealthState {
    pub(crate) fn back(self) -> Health {
        let pauses = self.pauses.into_iter().map(|(slot, until)| (slot, until.0)).collect();
        Health { next: None, pauses }
    }
}

impl Primary {
    /// A worker has limits: looks begin with the first one.
    pub(crate) fn watch_health(&mut self) {
        if let Some(pause) = self.until_next_look() {
            self.look_at_health_in(pause);
        }
    }

    fn look_at_health_in(&mut self, pause: Duration) {
        let at = Instant::now() + pause;
        if self.health.next.is_none_or(|next| next > at) {
            self.health.next = Some(at);
            self.after(pause, Timer::Health);
        }
    }

    /// Memory and connections have to be looked at; an age comes when it comes, and requests are told by the worker.
    fn until_next_look(&self) -> Option<Duration> {
        let of = |w: &Worker| {
            if w.leaving {
                return None;
            }
            let limits = &w.allowance;
            let looked_at = limits.memory.is_some() || limits.connections.is_some();
            let age = limits.age.map(|age| age.saturating_sub(w.started.elapsed()).max(LOOK));
            let waits = looked_at || w.had_requests.is_some();
            waits.then_some(LOOK).or(age)
        };
        self.workers.values().filter_map(of).min()
    }

    pub(crate) fn look_at_health(&mut self) {
        let now = Instant::now();
        // An earlier look took the place of this one.
        if self.health.next.is_none_or(|next| next > now) {
            return;
        }
        self.health.next = None;
        self.health.pauses.retain(|(_, until)| *until > now);
        if self.supervisor.reloading().is_none()
            && self.supervisor.renewing().is_none()
            && let Some((worker, why)) = self.first_beyond_its_limits()
            && let Some(w) = self.workers.get(&worker)
        {
            let who = w.who;
            self.notice("renewing", Some(who), format!("{why}: a new worker takes over from it"));
            self.feed(Input::Renew { slot: SlotId(who.slot) });
        }
        self.watch_health();
    }

    /// A Node worker has counted as many requests as it was to have. It says so once.
    pub(crate) fn had_its_requests(&mut self, worker: WorkerId, count: u64) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if w.allowance.requests.is_some() {
            w.had_requests = Some(count);
            self.look_at_health_in(Duration::ZERO);
        }
    }

    fn first_beyond_its_limits(&self) -> Option<(WorkerId, String)> {
        self.workers.iter().find_map(|(id, w)| {
            let paused = self.health.pauses.iter().any(|(slot, _)| slot.0 == w.who.slot);
            if !w.admitted || w.leaving || paused || !w.allowance.is_limited() {
                return None;
            }
            if let Some((had, most)) = w.had_requests.zip(w.allowance.requests) {
                return Some((*id, format!("it had {had} requests, its limit is {most}")));
            }
            let (_, pid) = w.running.process();
            let memory = || polyfork_sys::system::resident_bytes(pid).ok();
            let connections = w.allowance.connections.and_then(|_| self.connections_of(*id, w));
            let why = w.allowance.exceeded(memory, w.started.elapsed(), connections);
            Some((*id, why?))
        })
    }

    /// The successor did not come up. The old worker stays, and is left alone for a while.
    pub(crate) fn renewal_failed(&mut self, slot: SlotId, fault: ReloadFault) {
        if let ReloadFault::Candidate { worker, reason, .. } = fault {
            let text = format!(
                "slot {}: worker {} that was to take over {reason}; the one before stays",
                slot.0, worker.0
            );
            self.notice("renewal-failed", None, text);
        }
        self.health.pauses.push((slot, Instant::now() + AFTER_FAILURE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn limits_of_workers_differ_and_are_at_most_a_tenth_above() {
        let settings = Settings::new("x")
            .max_lifetime(Some(Duration::from_secs(100)))
            .max_connections(Some(1000))
            .max_requests(Some(2000));
        let mut chance = Jitter::new(7);
        let drawn: Vec<_> = (0..50).map(|_| Allowance::draw(&settings, &mut chance)).collect();
        let ages: Vec<u64> = drawn.iter().filter_map(|a| a.age).map(|age| age.as_secs()).collect();
        assert!(ages.iter().all(|age| (100..=110).contains(age)), "{ages:?}");
        assert!(ages.iter().any(|age| *age != ages[0]), "{ages:?}");
        assert!(drawn.iter().all(|a| a.connections.is_some_and(|n| (1000..=1100).contains(&n))));
        assert!(drawn.iter().all(|a| a.requests().is_some_and(|n| (2000..=2200).contains(&n))));
    }

    #[test]
    fn memory_is_measured_only_where_it_is_limited() {
        let never = || unreachable!("not asked for");
        let none = Allowance::default();
        assert_eq!(none.exceeded(never, Duration::MAX, Some(u64::MAX)), None);
        let limited = Allowance { memory: Some(100 * MIB), ..none };
        assert_eq!(limited.exceeded(|| Some(100 * MIB), Duration::ZERO, None), None);
        let why = limited.exceeded(|| Some(100 * MIB + 1), Duration::ZERO, None);
        assert_eq!(why.as_deref(), Some("it uses 101 MiB of memory, the limit is 100"));
    }
}
