//! Time as a value.
//!
//! A [`Time`] is what the shell reads from the monotonic clock (`CLOCK_MONOTONIC`, `tokio::time::Instant`), counted from
//! any origin it likes. No code in this crate reads a clock; wall-clock stamps belong to logs.
//!
//! The surprising rule: nothing here panics or wraps. Sums saturate, differences of times in the wrong order are zero, and
//! each state machine keeps the latest time it was told, so a clock that jumps back only stands still.
//!
//! See clock_gettime(2) for what the monotonic clock promises.

use std::ops::Add;
use std::time::Duration;

/// A moment on the monotonic clock, since an origin chosen by the caller.
///
/// # Examples
///
/// ```
/// use polyfork_core::Time;
/// use std::time::Duration;
///
/// let start = Time::ZERO + Duration::from_secs(1);
/// let later = start + Duration::from_secs(2);
/// assert_eq!(later.since(start), Duration::from_secs(2));
/// assert_eq!(start.since(later), Duration::ZERO);
/// ```
#[derive(
    Copy,
    Clone,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Time(Duration);

impl Time {
    /// The origin.
    pub const ZERO: Time = Time(Duration::ZERO);

    /// The moment this long after the origin.
    pub const fn new(since_origin: Duration) -> Time {
        Time(since_origin)
    }

    /// How long after the origin this is.
    pub const fn since_origin(self) -> Duration {
        self.0
    }

    /// How long after `earlier` this is; zero when it is before it.
    pub fn since(self, earlier: Time) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// This moment plus `wait`, or nothing when that is beyond what can be represented: a wait for ever.
    pub fn after(self, wait: Duration) -> Option<Time> {
        self.0.checked_add(wait).map(Time)
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    /// Saturates at the largest representable moment.
    fn add(self, wait: Duration) -> Time {
        Time(self.0.saturating_add(wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_saturate_and_a_wait_for_ever_has_no_end() {
        let late = Time::new(Duration::MAX);
        assert_eq!(late + Duration::from_secs(1), late);
        assert_eq!(Time::ZERO.after(Duration::MAX), Some(late));
        assert_eq!(late.after(Duration::from_nanos(1)), None);
    }

    #[test]
    fn differences_never_go_below_zero() {
        let one = Time::new(Duration::from_secs(1));
        assert_eq!(Time::ZERO.since(one), Duration::ZERO);
        assert_eq!(one.since(Time::ZERO), Duration::from_secs(1));
    }
}
