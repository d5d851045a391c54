//! Limits on a worker's life: memory, age, connections. A worker beyond one is renewed.
//!
//! Renewing means that its successor is ready before the worker is told to stop (`polyfork_core::supervisor`), so a limit
//! costs no request. One worker at a time: where several are beyond their limits, the others wait for the next look.
//! Signs of life are elsewhere: `NOTIFY_SOCKET` in `primary`, queues that nobody empties in `stuck`.
//!
//! The rule that surprises: age and connections are limits of each worker's own, up to a tenth above what was asked for,
//! or all workers of a cluster would come to theirs at the same moment.

use std::time::{Duration, Instant};

use polyfork_core::restart::Jitter;
use polyfork_core::{Input, ReloadFault, SlotId, WorkerId};

use super::primary::{Primary, Timer};
use super::settings::Settings;
use super::upgrade::Moment;

/// Between two looks, where there is something to look for.
const LOOK: Duration = Duration::from_secs(1);
/// A slot whose successor did not come up is left alone for this long.
const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// What one worker may come to.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Allowance {
    memory: Option<u64>,
    age: Option<Duration>,
    connections: Option<u64>,
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
        }
    }

    fn is_limited(&self) -> bool {
        self.memory.is_some() || self.age.is_some() || self.connections.is_some()
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
                "it has lived {} s, its limit is {}",
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
    looking: bool,
    /// Slots that are left alone for a while.
    pauses: Vec<(SlotId, Instant)>,
}

/// What the looks remember, as it is carried to the next image of the primary.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct HealthState {
    looking: bool,
    pauses: Vec<(SlotId, Moment)>,
}

impl Health {
    pub(crate) fn state(&self) -> HealthState {
        let Health { looking, pauses } = self;
        let pauses = pauses.iter().map(|(slot, until)| (*slot, Moment(*until))).collect();
        HealthState { looking: *looking, pauses }
    }
}

impl HealthState {
    pub(crate) fn back(self) -> Health {
        let pauses = self.pauses.into_iter().map(|(slot, until)| (slot, until.0)).collect();
        Health { looking: self.looking, pauses }
    }
}

impl Primary {
    /// A worker has limits: looks begin with the first one.
    pub(crate) fn watch_health(&mut self, allowance: &Allowance) {
        if allowance.is_limited() && !std::mem::replace(&mut self.health.looking, true) {
            self.after(LOOK, Timer::Health);
        }
    }

    pub(crate) fn look_at_health(&mut self) {
        self.health.looking = self.workers.values().any(|w| w.allowance.is_limited());
        if !self.health.looking {
            return;
        }
        self.after(LOOK, Timer::Health);
        let now = Instant::now();
        self.health.pauses.retain(|(_, until)| *until > now);
        if self.supervisor.reloading().is_some() || self.supervisor.renewing().is_some() {
            return;
        }
        if let Some((worker, why)) = self.first_beyond_its_limits() {
            let Some(w) = self.workers.get(&worker) else { return };
            let who = w.who;
            self.notice("renewing", Some(who), format!("{why}: a new worker takes over from it"));
            self.feed(Input::Renew { slot: SlotId(who.slot) });
        }
    }

    fn first_beyond_its_limits(&self) -> Option<(WorkerId, String)> {
        self.workers.iter().find_map(|(id, w)| {
            let paused = self.health.pauses.iter().any(|(slot, _)| slot.0 == w.who.slot);
            if !w.admitted || w.leaving || paused || !w.allowance.is_limited() {
                return None;
            }
            let (_, pid) = w.running.process();
            let memory = || polyfork_sys::system::resident_bytes(pid).ok();
            let why =
                w.allowance.exceeded(memory, w.started.elapsed(), self.connections_of(*id, w));
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
            .max_connections(Some(1000));
        let mut chance = Jitter::new(7);
        let drawn: Vec<_> = (0..50).map(|_| Allowance::draw(&settings, &mut chance)).collect();
        let ages: Vec<u64> = drawn.iter().filter_map(|a| a.age).map(|age| age.as_secs()).collect();
        assert!(ages.iter().all(|age| (100..=110).contains(age)), "{ages:?}");
        assert!(ages.iter().any(|age| *age != ages[0]), "{ages:?}");
        assert!(drawn.iter().all(|a| a.connections.is_some_and(|n| (1000..=1100).contains(&n))));
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
