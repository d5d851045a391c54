//! How long things took, in a fixed amount of memory: counts in buckets whose width grows with the value.
//!
//! Sixteen buckets to each doubling, so a figure read from here is off by at most 1/16 of itself, and usually half of that.
//! Values from 0 ns to about 4.8 hours; longer ones are counted as that long. 5 KiB, whatever is recorded.
//!
//! The rule that surprises: a [`Histogram`] has one writer at a time, so that recording costs two plain stores and no locked
//! instruction; readers may come at any moment and see some recent state.
//!
//! The idea is that of HDR histograms (log-linear buckets), written for atomics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets for each doubling, as a power of two.
const FINE: u32 = 4;
const PER_DOUBLING: usize = 1 << FINE;
/// The last doubling that is told apart: 2^43 ns to 2^44 ns.
const LAST: u32 = 43;
const BUCKETS: usize = (LAST - FINE + 2) as usize * PER_DOUBLING;

/// Counts of durations, written by one thread at a time and read by any.
pub(super) struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
    sum_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Histogram {
    pub(super) fn new() -> Self {
        let buckets = Box::new([const { AtomicU64::new(0) }; BUCKETS]);
        Self { buckets, sum_ns: AtomicU64::new(0), max_ns: AtomicU64::new(0) }
    }

    /// Counts one. To be called by one thread at a time.
    pub(super) fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        add(&self.buckets[bucket(ns)], 1);
        add(&self.sum_ns, ns);
        if ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.store(ns, Ordering::Relaxed);
        }
    }

    /// The sum of all recorded.
    pub(super) fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed))
    }
}

/// Adds without a locked instruction: there is one writer.
pub(super) fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

fn bucket(ns: u64) -> usize {
    let Some(doubling) = ns.checked_ilog2().filter(|doubling| *doubling >= FINE) else {
        return ns as usize;
    };
    if doubling > LAST {
        return BUCKETS - 1;
    }
    let within = (ns >> (doubling - FINE)) as usize & (PER_DOUBLING - 1);
    (doubling - FINE + 1) as usize * PER_DOUBLING + within
}

/// The middle of a bucket.
fn middle(bucket: usize) -> u64 {
    if bucket < PER_DOUBLING {
        return bucket as u64;
    }
    let shift = (bucket / PER_DOUBLING - 1) as u32;
    let low = ((PER_DOUBLING + bucket % PER_DOUBLING) as u64) << shift;
    low + ((1 << shift) >> 1)
}

/// How long many things took: a snapshot.
#[derive(Clone)]
pub struct Distribution {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
    sum_ns: u64,
    max_ns: u64,
}

impl Distribution {
    pub(super) fn new() -> Self {
        Self { buckets: Box::new([0; BUCKETS]), count: 0, sum_ns: 0, max_ns: 0 }
    }

    pub(super) fn add(&mut self, histogram: &Histogram) {
        for (sum, one) in self.buckets.iter_mut().zip(histogram.buckets.iter()) {
            let one = one.load(Ordering::Relaxed);
            *sum += one;
            self.count += one;
        }
        self.sum_ns = self.sum_ns.wrapping_add(histogram.sum_ns.load(Ordering::Relaxed));
        self.max_ns = self.max_ns.max(histogram.max_ns.load(Ordering::Relaxed));
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The time below which the share `quantile` of them stayed: 0.5 is the median, 0.99 the 99th percentile. Right to
    /// within a sixteenth. Zero when there were none.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let wanted = (quantile.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(middle(bucket).min(self.max_ns));
            }
        }
        Duration::ZERO
    }

    /// The longest, exactly.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns)
    }

    /// The sum of all, exactly.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns)
    }

    /// The average; zero when there were none.
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.checked_div(self.count).unwrap_or(0))
    }
}

impl std::fmt::Debug for Distribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Distribution")
            .field("count", &self.count)
            .field("mean", &self.mean())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        let mut last = 0;
        for ns in (0..5_000_u64).chain((13..44).flat_map(|e| [(1 << e) - 1, 1 << e, (1 << e) + 1]))
        {
            let this = bucket(ns);
            assert!(this == last || this == last + 1 || ns > 5_000, "{ns}: {last}, {this}");
            assert!(this < BUCKETS);
            last = this;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn figure_is_off_by_a_sixteenth_at_most() {
        for ns in [0, 1, 15, 16, 17, 100, 999, 12_345, 1_000_000, 77_777_777_777, 1 << 43] {
            let read = middle(bucket(ns));
            assert!(read.abs_diff(ns) * 16 <= ns, "{ns} is read as {read}");
        }
    }

    #[test]
    fn quantiles_of_a_known_set() {
        let histogram = Histogram::new();
        (1..=1000).for_each(|us| histogram.record(Duration::from_micros(us)));
        let mut all = Distribution::new();
        all.add(&histogram);
        let close = |read: Duration, us: u64| {
            let off = read.abs_diff(Duration::from_micros(us));
            assert!(off * 16 <= Duration::from_micros(us), "{read:?} for {us} µs");
        };
        close(all.quantile(0.5), 500);
        close(all.quantile(0.99), 990);
        close(all.quantile(0.0), 1);
        assert_eq!((all.count(), all.max()), (1000, Duration::from_millis(1)));
        assert_eq!(all.mean(), Duration::from_nanos(500_500));
        assert_eq!(Distribution::new().quantile(0.5), Duration::ZERO);
    }
}
