//! How long a restart waits, and how many are too many.
//!
//! [`RestartPolicy`] holds the numbers (and reads `5/30s`), [`RestartHistory`] is what one slot remembers. Which worker is to
//! be restarted at all is decided in [`crate::supervisor`].
//!
//! Two questions are kept apart. The *backoff* asks how soon: it doubles while workers die young and starts anew once one
//! lived long enough. The *intensity* asks how often: it counts every restart in a sliding window and forgets none, so
//! a worker that lives just long enough to reset the backoff is still caught.
//!
//! A worker that had been ready is missed by somebody, and nothing says yet that the next one will fare as it did: the first
//! such death is answered at once. Waiting begins with the second in a row, and with a worker that never got ready.
//!
//! [`StopOn`] names ends after which there is no successor at all: the program has done its work.
//!
//! The surprising rule: the window is judged at the moment the restart would happen, not at the moment of the death, and
//! a restart is entered when it does happen. So "at most N starts in any window" holds for the starts themselves.
//!
//! Source: the restart intensity of Erlang/OTP (page "Supervisor Behaviour"), with backoff added.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::supervisor::Exit;
use crate::time::Time;

/// When a slot's worker is started again, and when it is given up.
///
/// # Examples
///
/// ```
/// use polyfork_core::RestartPolicy;
/// use std::time::Duration;
///
/// let policy: RestartPolicy = "3/10s".parse().unwrap();
/// assert_eq!((policy.limit, policy.window), (3, Duration::from_secs(10)));
/// ```
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RestartPolicy {
    /// Restarts allowed per slot in any `window`; 0 gives a slot up at the first end of its worker. At most
    /// [`RestartPolicy::MAX_LIMIT`] is used, as each is remembered.
    pub limit: u32,
    /// Length of the sliding window; [`RestartPolicy::NO_WINDOW`] for one without an end.
    pub window: Duration,
    /// A worker that lived this long, from its start on, does not count, and those before it are forgotten: `limit` is of
    /// restarts in a row then. Nothing: every restart counts.
    pub min_uptime: Duration,
    /// The wait for the successor of a worker that was stable and whose end was wanted.
    pub smooth_delay: Duration,
    /// The wait for the successor of a worker that had been ready, unless the one before it died young, too.
    pub first_delay: Duration,
    /// The wait after the first worker that did not even get ready, and the shortest that grows.
    pub min_delay: Duration,
    /// The longest wait.
    pub max_delay: Duration,
    /// What the wait is multiplied with after each worker that died young. Values below 1 count as 1.
    pub factor: u32,
    /// The part of the wait that is left to chance, 0 to 1, so that slots that died together do not come back together.
    pub jitter: f64,
    /// A worker that was ready for this long resets the wait (not the window).
    ///
    /// Keep it below `window / limit`, then a worker that dies each time it got there still exceeds the limit.
    pub stable_after: Duration,
    /// Which ends leave the slot at rest.
    pub stop_on: StopOn,
}

impl RestartPolicy {
    /// The largest `limit` that is honoured.
    pub const MAX_LIMIT: u32 = 10_000;

    /// The window of a limit that has none: restarts count for ever, or until [`RestartPolicy::min_uptime`] forgives them.
    pub const NO_WINDOW: Duration = Duration::MAX;

    /// At most `limit` restarts in `window`, the waits as in the default.
    pub fn intensity(limit: u32, window: Duration) -> RestartPolicy {
        RestartPolicy {
            limit,
            window,
            min_uptime: Duration::ZERO,
            smooth_delay: Duration::ZERO,
            first_delay: Duration::ZERO,
            min_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(15),
            factor: 2,
            jitter: 0.25,
            stable_after: match window {
                RestartPolicy::NO_WINDOW => STABLE_WITHOUT_WINDOW,
                window => window / limit.saturating_add(1),
            },
            stop_on: StopOn::Nothing,
        }
    }

    /// The same, but every restart waits as long as `delay` says.
    #[must_use]
    pub fn delayed(self, delay: RestartDelay) -> RestartPolicy {
        match delay {
            RestartDelay::Auto => self,
            RestartDelay::Fixed(wait) => RestartPolicy {
                smooth_delay: wait,
                first_delay: wait,
                min_delay: wait,
                max_delay: wait,
                factor: 1,
                jitter: 0.0,
                ..self
            },
            RestartDelay::Growing(from, to) => RestartPolicy {
                smooth_delay: from,
                first_delay: from,
                min_delay: from,
                max_delay: to,
                ..self
            },
        }
    }

    fn limit_used(&self) -> usize {
        self.limit.min(Self::MAX_LIMIT) as usize
    }

    /// The wait before the restart after `level` young deaths in a row, always within `min_delay..=max_delay`.
    fn delay(&self, level: u32, jitter: &mut Jitter) -> Duration {
        let max = self.max_delay.max(self.min_delay);
        let grown = u128::from(self.factor.max(1)).saturating_pow(level);
        let base = self.min_delay.saturating_mul(u32::try_from(grown).unwrap_or(u32::MAX)).min(max);
        let chance = self.chance(base, jitter);
        // Chance lengthens the wait, except near the longest one, which it must not exceed: there it shortens.
        let wait = match base.checked_add(chance) {
            Some(longer) if longer <= max => longer,
            _ => base.saturating_sub(chance),
        };
        wait.clamp(self.min_delay, max)
    }

    fn lengthened(&self, base: Duration, jitter: &mut Jitter) -> Duration {
        base.saturating_add(self.chance(base, jitter))
    }

    /// What chance makes of a wait.
    fn chance(&self, base: Duration, jitter: &mut Jitter) -> Duration {
        let share = if self.jitter.is_finite() { self.jitter.clamp(0.0, 1.0) } else { 0.0 };
        base.mul_f64(share * jitter.fraction())
    }
}

impl Default for RestartPolicy {
    /// Five restarts in 30 s; at once the first time, then waits from 100 ms to 15 s, doubling, a quarter of it chance; stable
    /// after 5 s.
    fn default() -> RestartPolicy {
        RestartPolicy::intensity(5, Duration::from_secs(30))
    }
}

impl fmt::Display for RestartPolicy {
    /// The form that [`FromStr`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.window {
            RestartPolicy::NO_WINDOW => write!(f, "{}", self.limit),
            window => write!(f, "{}/{}ms", self.limit, window.as_millis()),
        }
    }
}

/// Why a restart limit could not be read. The text is for people and names what was typed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestartPolicyError {
    /// No `/` between the number and the window.
    #[error("restart limit \"{0}\" has no \"/\": write how many restarts in how long, as in 5/30s")]
    NoSlash(String),
    /// The number of restarts is not one.
    #[error("restart limit \"{0}\" does not start with a number from 0 to {max}", max = RestartPolicy::MAX_LIMIT)]
    BadLimit(String),
    /// The window is not a number with a unit.
    #[error(
        "window of restart limit \"{0}\" is not a number with one of the units ms, s, m, h, as in 30s"
    )]
    BadWindow(String),
    /// The window is nothing, or longer than ten years.
    #[error("window of restart limit \"{0}\" must be longer than 0 and at most 87600h")]
    WindowOutOfRange(String),
}

impl FromStr for RestartPolicy {
    type Err = RestartPolicyError;

    /// Reads `N/WINDOW`, as in `5/30s`; units `ms`, `s`, `m`, `h`, and seconds without one. `N` alone has no window.
    fn from_str(text: &str) -> Result<RestartPolicy, RestartPolicyError> {
        let whole = || text.to_owned();
        let (limit, window) = match text.split_once('/') {
            Some((limit, window)) => (limit, Some(window)),
            None if digits(text.trim()).is_some() => (text, None),
            None => return Err(RestartPolicyError::NoSlash(whole())),
        };
        let limit = digits(limit.trim())
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n <= RestartPolicy::MAX_LIMIT)
            .ok_or_else(|| RestartPolicyError::BadLimit(whole()))?;
        let Some(window) = window else {
            return Ok(RestartPolicy::intensity(limit, RestartPolicy::NO_WINDOW));
        };
        let window =
            duration(window.trim()).ok_or_else(|| RestartPolicyError::BadWindow(whole()))?;
        if window.is_zero() || window > LONGEST_WINDOW {
            return Err(RestartPolicyError::WindowOutOfRange(whole()));
        }
        Ok(RestartPolicy::intensity(limit, window))
    }
}

const LONGEST_WINDOW: Duration = Duration::from_secs(87_600 * 3600);
/// When waits begin anew under a limit that has no window.
const STABLE_WITHOUT_WINDOW: Duration = Duration::from_secs(5);
/// The most codes that are listed: there are no more.
const MOST_CODES: usize = 256;

/// How long restarts wait.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum RestartDelay {
    /// At once the first time, then from 100 ms to 15 s.
    #[default]
    Auto,
    /// Each as long as this.
    Fixed(Duration),
    /// From the first, twice as long each time, to the second; never at once.
    Growing(Duration, Duration),
}

/// Ends of workers that leave their slot at rest: no successor is started until somebody asks for one.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StopOn {
    /// None: whoever ends is replaced.
    #[default]
    Nothing,
    /// Exits with one of these codes.
    Codes(Vec<u8>),
    /// Whatever the end of a worker that had been started, by itself or by a signal.
    AnyEnd,
}

impl StopOn {
    /// Whether this end is one of them.
    pub fn covers(&self, exit: Exit) -> bool {
        match (self, exit) {
            (StopOn::Nothing, _) | (_, Exit::NotStarted) => false,
            (StopOn::Codes(codes), Exit::Code(code)) => {
                u8::try_from(code).is_ok_and(|code| codes.contains(&code))
            }
            (StopOn::Codes(_), _) => false,
            (StopOn::AnyEnd, _) => true,
        }
    }
}

impl fmt::Display for StopOn {
    /// The form that [`FromStr`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopOn::Nothing => f.write_str("none"),
            StopOn::AnyEnd => f.write_str("any"),
            StopOn::Codes(codes) => {
                let codes: Vec<String> = codes.iter().map(u8::to_string).collect();
                f.write_str(&codes.join(","))
            }
        }
    }
}

/// What was given is no list of exit codes. The text is for people.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give exit codes from 0 to 255 with commas between them, as in 0,3, or any, or none")]
pub struct StopOnError;

impl FromStr for StopOn {
    type Err = StopOnError;

    /// Reads `0,3`, `any` or `none`.
    fn from_str(text: &str) -> Result<StopOn, StopOnError> {
        match text.trim() {
            "any" => return Ok(StopOn::AnyEnd),
            "none" => return Ok(StopOn::Nothing),
            _ => {}
        }
        let code = |word: &str| digits(word.trim()).and_then(|code| u8::try_from(code).ok());
        let codes: Option<Vec<u8>> = text.split(',').map(code).collect();
        let mut codes = codes.filter(|codes| codes.len() <= MOST_CODES).ok_or(StopOnError)?;
        codes.sort_unstable();
        codes.dedup();
        Ok(StopOn::Codes(codes))
    }
}

/// A number of plain digits; signs and blanks, which `parse` would let through in part, are refused.
fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn duration(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let number = digits(number)?;
    match unit.trim() {
        "ms" => Some(Duration::from_millis(number)),
        "s" | "" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

/// What comes after the end of a slot's worker.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start another one after this wait.
    Restart(Duration),
    /// The limit is reached; `restarts` of them would be in the window already, or never got ready in a row.
    GiveUp {
        /// Restarts in the window.
        restarts: u32,
        /// How long a time they took: the policy's window, or since the first of those that never got ready.
        within: Duration,
    },
}

/// How long a worker was there.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// From its start to its end.
    pub lived: Duration,
    /// How long it had been ready; nothing when it never was.
    pub served: Option<Duration>,
}

/// What one slot remembers of its restarts. Memory: at most `limit` moments.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct RestartHistory {
    starts: VecDeque<Time>,
    young_deaths: u32,
    /// Workers in a row that were replaced because they did not get ready in time, and since when.
    never_ready: u32,
    never_ready_since: Option<Time>,
    /// The restart that comes is of a worker that had lived long enough, and counts for nothing.
    forgiven: bool,
    total: u32,
}

impl RestartHistory {
    /// An empty history.
    pub fn new() -> RestartHistory {
        RestartHistory::default()
    }

    /// A worker ended (or left): restart, and after how long, or give up?
    ///
    /// `smooth` says that the end was wanted, by the worker or by an operator: then a stable worker's successor waits no
    /// longer than [`RestartPolicy::smooth_delay`]. It is counted all the same.
    pub fn ended(
        &mut self,
        policy: &RestartPolicy,
        now: Time,
        life: Life,
        smooth: bool,
        jitter: &mut Jitter,
    ) -> Decision {
        let Life { lived, served } = life;
        self.forgiven = !policy.min_uptime.is_zero() && lived >= policy.min_uptime;
        if self.forgiven {
            self.starts.clear();
        }
        self.never_ready = 0;
        self.never_ready_since = None;
        let stable = served.is_some_and(|served| served >= policy.stable_after);
        if stable {
            self.young_deaths = 0;
        }
        if stable && smooth {
            return self.within_limit(policy, now, policy.smooth_delay);
        }
        self.ended_young(policy, now, served.is_some(), jitter)
    }

    fn ended_young(
        &mut self,
        policy: &RestartPolicy,
        now: Time,
        was_ready: bool,
        jitter: &mut Jitter,
    ) -> Decision {
        let wait = match self.young_deaths {
            0 if was_ready => policy.lengthened(policy.first_delay, jitter),
            deaths => policy.delay(deaths, jitter),
        };
        self.young_deaths = self.young_deaths.saturating_add(1);
        self.within_limit(policy, now, wait)
    }

    /// Whether a restart after `wait` is one too many.
    fn within_limit(&self, policy: &RestartPolicy, now: Time, wait: Duration) -> Decision {
        if self.forgiven {
            return Decision::Restart(wait);
        }
        let restarts = self.in_window(policy, now + wait);
        if restarts >= policy.limit_used() {
            let restarts = u32::try_from(restarts).unwrap_or(u32::MAX);
            let since = self.starts.front().map_or(Duration::ZERO, |first| now.since(*first));
            let has_window = policy.window < RestartPolicy::NO_WINDOW;
            let within = if has_window { policy.window } else { since };
            return Decision::GiveUp { restarts, within };
        }
        Decision::Restart(wait)
    }

    /// As [`ended`](Self::ended), for a worker that did not get ready in time since `started`.
    ///
    /// Waiting for it took so long that the window alone would never be full: more such workers in a row than the limit
    /// allows restarts are enough, however long that takes.
    pub fn never_got_ready(
        &mut self,
        policy: &RestartPolicy,
        now: Time,
        started: Time,
        jitter: &mut Jitter,
    ) -> Decision {
        self.forgiven = false;
        let since = *self.never_ready_since.get_or_insert(started);
        self.never_ready = self.never_ready.saturating_add(1);
        match self.ended_young(policy, now, false, jitter) {
            Decision::Restart(_) if self.never_ready as usize > policy.limit_used() => {
                Decision::GiveUp { restarts: self.never_ready - 1, within: now.since(since) }
            }
            decision => decision,
        }
    }

    /// A restart happens now.
    pub fn restarted(&mut self, policy: &RestartPolicy, now: Time) {
        self.total = self.total.saturating_add(1);
        if std::mem::take(&mut self.forgiven) {
            return;
        }
        while self.starts.len() >= policy.limit_used().max(1) {
            self.starts.pop_front();
        }
        self.starts.push_back(now);
    }

    /// Forgets everything but the total: an operator said "try again".
    pub fn forgive(&mut self) {
        self.starts.clear();
        self.young_deaths = 0;
        self.never_ready = 0;
        self.never_ready_since = None;
        self.forgiven = false;
    }

    /// Restarts since the slot exists.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// 1 for a first start, one more for each restart since the slot last held a stable worker.
    pub fn attempt(&self) -> u32 {
        self.young_deaths.saturating_add(1)
    }

    /// Whether it holds no more than it ever would by itself.
    pub(crate) fn is_bounded(&self, policy: &RestartPolicy) -> bool {
        self.starts.len() <= policy.limit_used().max(1)
    }

    fn in_window(&self, policy: &RestartPolicy, at: Time) -> usize {
        self.starts.iter().filter(|start| at.since(**start) < policy.window).count()
    }
}

/// Chance from a seed: SplitMix64 (Steele, Lea, Flood 2014), enough to spread restarts apart.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Jitter(u64);

impl Jitter {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Jitter {
        Jitter(seed)
    }

    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The next number from 0 up to, not including, 1.
    fn fraction(&mut self) -> f64 {
        // 53 bits are what a double holds exactly.
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ended(
        history: &mut RestartHistory,
        policy: &RestartPolicy,
        now: Time,
        served: Option<Duration>,
    ) -> Decision {
        let life = Life { lived: served.unwrap_or_default(), served };
        history.ended(policy, now, life, false, &mut Jitter::new(1))
    }

    /// A worker that dies each time after `life`, until its slot is given up or `most` restarts happened.
    fn restarts_of_a_worker_that_lives(life: Duration, policy: &RestartPolicy, most: u32) -> u32 {
        let (mut history, mut now) = (RestartHistory::new(), Time::ZERO);
        for restarts in 0..most {
            now = now + life;
            match ended(&mut history, policy, now, Some(life)) {
                Decision::Restart(wait) => now = now + wait,
                Decision::GiveUp { .. } => return restarts,
            }
            history.restarted(policy, now);
        }
        most
    }

    #[test]
    fn limits_are_read_as_they_are_written() {
        let read = |text: &str| {
            let policy: RestartPolicy = text.parse().unwrap();
            (policy.limit, policy.window)
        };
        assert_eq!(read("5/30s"), (5, 30 * SECOND));
        assert_eq!(read("5/30"), (5, 30 * SECOND));
        assert_eq!(read("0/500ms"), (0, SECOND / 2));
        assert_eq!(read("10/2m"), (10, 120 * SECOND));
        assert_eq!(read(" 1 / 1 h "), (1, 3600 * SECOND));
        assert_eq!("5/30s".parse(), Ok(RestartPolicy::default()));
    }

    #[test]
    fn limits_that_cannot_be_read_say_why() {
        let error = |text: &str| text.parse::<RestartPolicy>().unwrap_err();
        for text in ["", "x", "5 30s", "5:30s"] {
            assert_eq!(error(text), RestartPolicyError::NoSlash(text.into()));
        }
        for text in ["/30s", "x/30s", "-1/30s", "+1/30s", "5.5/30s", "99999999999/1s", "10001/1s"] {
            assert_eq!(error(text), RestartPolicyError::BadLimit(text.into()));
        }
        for text in [
            "5/",
            "5/s",
            "5/30d",
            "5/30 sec",
            "5/-1s",
            "5/1.5s",
            "5/6/7",
            "1/99999999999999999999s",
        ] {
            assert_eq!(error(text), RestartPolicyError::BadWindow(text.into()));
        }
        for text in ["5/0s", "5/0", "1/99999999h", "1/18446744073709551615"] {
            assert_eq!(error(text), RestartPolicyError::WindowOutOfRange(text.into()));
        }
        let told = error("5:30").to_string();
        assert_eq!(
            told,
            "restart limit \"5:30\" has no \"/\": write how many restarts in how long, as in 5/30s"
        );
    }

    #[test]
    fn crash_loop_is_given_up_after_the_limit() {
        let policy = RestartPolicy::default();
        assert_eq!(restarts_of_a_worker_that_lives(Duration::ZERO, &policy, 1000), 5);
    }

    #[test]
    fn flapping_just_above_the_stable_age_is_still_caught() {
        let policy = RestartPolicy::default();
        let life = policy.stable_after + Duration::from_millis(50);
        assert_eq!(restarts_of_a_worker_that_lives(life, &policy, 1000), 5);
    }

    #[test]
    fn rare_deaths_are_restarted_for_ever() {
        let policy = RestartPolicy::default();
        let life = policy.window / policy.limit + SECOND;
        assert_eq!(restarts_of_a_worker_that_lives(life, &policy, 1000), 1000);
    }

    #[test]
    fn stable_life_resets_the_wait_and_not_the_window() {
        let policy = RestartPolicy::default();
        let mut history = RestartHistory::new();
        for _ in 0..4 {
            ended(&mut history, &policy, Time::ZERO, None);
            history.restarted(&policy, Time::ZERO);
        }
        assert_eq!(history.attempt(), 5);
        let stable = Some(policy.stable_after);
        let Decision::Restart(wait) = ended(&mut history, &policy, Time::ZERO, stable) else {
            panic!("four are below the limit");
        };
        assert!(wait < policy.min_delay * 2, "{wait:?}");
        history.restarted(&policy, Time::ZERO);
        let decision = ended(&mut history, &policy, Time::ZERO, stable);
        assert_eq!(decision, Decision::GiveUp { restarts: 5, within: policy.window });
    }

    #[test]
    fn the_first_death_of_a_worker_that_served_waits_for_nothing() {
        let policy = RestartPolicy { jitter: 0.0, ..RestartPolicy::default() };
        let waits = |served| {
            let mut history = RestartHistory::new();
            std::array::from_fn(|_| match ended(&mut history, &policy, Time::ZERO, served) {
                Decision::Restart(wait) => wait.as_millis(),
                Decision::GiveUp { .. } => u128::MAX,
            })
        };
        assert_eq!(waits(Some(Duration::ZERO)), [0, 200, 400, 800]);
        assert_eq!(waits(None), [100, 200, 400, 800]);
        assert_eq!(waits(Some(policy.stable_after)), [0, 0, 0, 0]);
    }

    #[test]
    fn wanted_end_of_a_stable_worker_waits_for_nothing_and_is_counted() {
        let policy = RestartPolicy::intensity(1, 30 * SECOND);
        let mut history = RestartHistory::new();
        let mut smooth = |served| {
            let life = Life { lived: Duration::ZERO, served };
            let decision = history.ended(&policy, Time::ZERO, life, true, &mut Jitter::new(1));
            history.restarted(&policy, Time::ZERO);
            decision
        };
        assert_eq!(smooth(Some(policy.stable_after)), Decision::Restart(Duration::ZERO));
        assert_eq!(
            smooth(Some(policy.stable_after)),
            Decision::GiveUp { restarts: 1, within: policy.window }
        );
    }

    #[test]
    fn a_limit_in_a_row_is_of_young_workers_however_far_apart() {
        let policy: RestartPolicy = "2".parse().unwrap();
        assert_eq!(policy.window, RestartPolicy::NO_WINDOW);
        let policy = RestartPolicy { min_uptime: 5 * SECOND, ..policy };
        let young = Duration::from_secs(4);
        assert_eq!(restarts_of_a_worker_that_lives(young, &policy, 1000), 2);
        assert_eq!(restarts_of_a_worker_that_lives(policy.min_uptime, &policy, 1000), 1000);
        // An old one in between forgives those before it, and its own restart is none.
        let (mut history, mut now) = (RestartHistory::new(), Time::ZERO);
        let mut dies = |life: Duration| {
            now = now + life + 3600 * SECOND;
            let decision = ended(&mut history, &policy, now, Some(life));
            if let Decision::Restart(_) = decision {
                history.restarted(&policy, now);
            }
            matches!(decision, Decision::Restart(_))
        };
        let lives = [young, young, 5 * SECOND, young, young, young];
        assert_eq!(lives.map(&mut dies), [true, true, true, true, true, false]);
    }

    #[test]
    fn a_fixed_delay_is_the_same_before_each_restart() {
        let delay = RestartDelay::Fixed(4 * SECOND);
        let policy = RestartPolicy::intensity(50, SECOND).delayed(delay);
        let (mut history, mut jitter) = (RestartHistory::new(), Jitter::new(3));
        for (lived, smooth) in [(0, false), (0, false), (9, false), (9, true), (0, true)] {
            let life = Life { lived: lived * SECOND, served: Some(lived * SECOND) };
            let decision = history.ended(&policy, Time::ZERO, life, smooth, &mut jitter);
            assert_eq!(decision, Decision::Restart(4 * SECOND), "{lived} {smooth}");
        }
        let never = history.never_got_ready(&policy, Time::ZERO, Time::ZERO, &mut jitter);
        assert_eq!(never, Decision::Restart(4 * SECOND));
    }

    #[test]
    fn a_growing_delay_begins_with_its_first_and_ends_with_its_last() {
        let delay = RestartDelay::Growing(SECOND, 3 * SECOND);
        let policy = RestartPolicy::intensity(50, SECOND).delayed(delay);
        let policy = RestartPolicy { jitter: 0.0, ..policy };
        let mut history = RestartHistory::new();
        let waits = std::array::from_fn(|_| {
            match ended(&mut history, &policy, Time::ZERO, Some(Duration::ZERO)) {
                Decision::Restart(wait) => wait.as_secs(),
                Decision::GiveUp { .. } => u64::MAX,
            }
        });
        assert_eq!(waits, [1, 2, 3, 3]);
    }

    #[test]
    fn ends_that_stop_a_slot_are_read_as_they_are_written() {
        let read = |text: &str| text.parse::<StopOn>();
        assert_eq!(read(" 3, 0,3 "), Ok(StopOn::Codes(vec![0, 3])));
        assert_eq!(read("any"), Ok(StopOn::AnyEnd));
        assert_eq!(read("none"), Ok(StopOn::Nothing));
        for text in ["", "0,", "256", "-1", "0 1", "all"] {
            assert_eq!(read(text), Err(StopOnError), "{text:?}");
        }
        for text in ["0,3", "any", "none"] {
            assert_eq!(read(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_code_covers_exits_with_it_and_any_covers_all_that_ran() {
        let codes = StopOn::Codes(vec![0, 3]);
        let ends = [Exit::Code(3), Exit::Code(4), Exit::Signal(3), Exit::Unknown, Exit::NotStarted];
        assert_eq!(ends.map(|end| codes.covers(end)), [true, false, false, false, false]);
        assert_eq!(ends.map(|end| StopOn::AnyEnd.covers(end)), [true, true, true, true, false]);
        assert_eq!(ends.map(|end| StopOn::Nothing.covers(end)), [false; 5]);
    }

    #[test]
    fn forgiven_slot_starts_with_a_clean_record() {
        let policy = RestartPolicy::intensity(1, 30 * SECOND);
        let mut history = RestartHistory::new();
        ended(&mut history, &policy, Time::ZERO, None);
        history.restarted(&policy, Time::ZERO);
        history.forgive();
        assert_eq!((history.attempt(), history.total()), (1, 1));
        assert!(matches!(ended(&mut history, &policy, Time::ZERO, None), Decision::Restart(_)));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in any::<String>()) {
            let _ = text.parse::<RestartPolicy>();
        }

        #[test]
        fn what_is_shown_can_be_read_again(limit in 0_u32..=10_000, millis in 1_u64..10_000_000) {
            let policy = RestartPolicy::intensity(limit, Duration::from_millis(millis));
            prop_assert_eq!(policy.to_string().parse(), Ok(policy));
        }

        /// Whatever the numbers are, a wait lies between the shortest and the longest.
        #[test]
        fn waits_stay_within_their_bounds(
            level in any::<u32>(),
            seed in any::<u64>(),
            min in 0_u64..100_000,
            max in 0_u64..100_000,
            factor in any::<u32>(),
            jitter in any::<f64>(),
        ) {
            let policy = RestartPolicy {
                min_delay: Duration::from_micros(min),
                max_delay: Duration::from_micros(max),
                factor,
                jitter,
                ..RestartPolicy::default()
            };
            let wait = policy.delay(level, &mut Jitter::new(seed));
            prop_assert!(wait >= policy.min_delay);
            prop_assert!(wait <= policy.max_delay.max(policy.min_delay));
        }

        /// However workers live and die, and however late a restart comes, no window holds more than the limit.
        #[test]
        fn restarts_in_any_window_never_exceed_the_limit(
            limit in 0_u32..6,
            window in 1_u64..5_000,
            lives in prop::collection::vec((0_u64..3_000, 0_u64..300, any::<bool>()), 1..60),
            seed in any::<u64>(),
        ) {
            let window = Duration::from_millis(window);
            let policy = RestartPolicy::intensity(limit, window);
            let mut jitter = Jitter::new(seed);
            let (mut history, mut now) = (RestartHistory::new(), Time::ZERO);
            let mut starts: Vec<Time> = Vec::new();
            for (life, late, smooth) in lives {
                let life = Duration::from_millis(life);
                now = now + life;
                let life = Life { lived: life, served: Some(life) };
                match history.ended(&policy, now, life, smooth, &mut jitter) {
                    Decision::Restart(wait) => now = now + wait + Duration::from_millis(late),
                    Decision::GiveUp { restarts, .. } => {
                        prop_assert!(restarts >= limit);
                        // An hour later somebody else's trouble is over.
                        now = now + Duration::from_secs(3600);
                        continue;
                    }
                }
                history.restarted(&policy, now);
                starts.push(now);
                let within = starts.iter().filter(|start| now.since(**start) < window).count();
                prop_assert!(within <= limit as usize);
            }
        }
    }
}
