//! What the tasks do, and how quantiles are read.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Work of a fixed amount: so many steps that nothing can shorten.
pub(crate) fn steps(number: u64) -> u64 {
    let mut state = black_box(1_u64);
    for _ in 0..number {
        state = black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    state
}

/// How many steps take about `time` on this machine, by the quickest of several tries.
pub(crate) fn steps_of(time: Duration) -> u64 {
    const TRY: u64 = 100_000;
    let quickest = (0..20).map(|_| {
        let begin = Instant::now();
        steps(TRY);
        begin.elapsed()
    });
    let each = quickest.min().unwrap_or_default().as_secs_f64() / TRY as f64;
    (time.as_secs_f64() / each) as u64
}

/// Primes below `limit`, by Eratosthenes.
pub(crate) fn primes(limit: usize) -> usize {
    let mut composite = vec![false; limit];
    let mut found = 0;
    for n in 2..limit {
        if !composite[n] {
            found += 1;
            composite.iter_mut().skip(n * n).step_by(n).for_each(|flag| *flag = true);
        }
    }
    found
}

/// One quantile in microseconds; sorts.
pub(crate) fn quantile_us(times: &mut [Duration], quantile: f64) -> f64 {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    let index = (last as f64 * quantile).round() as usize;
    times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}

/// Processor time of this process.
pub(crate) fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What this process may use.
pub(crate) fn cores() -> usize {
    polyfork::cluster::usable_cpus().workers as usize
}
