//! Signs of life of a worker written in Rust, where its primary asked for them.
//!
//! A task tells regularly how late the runtime was for its timer. What silence means is the primary's business.
//!
//! The rule that surprises: this shows that the runtime goes on, not that every task does. A blocked thread is seen where
//! there is one thread (a current-thread runtime, as [`run`](super::run()) makes); one of many is not missed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork_wire::env::POLYFORK_BEAT_MS;
use polyfork_wire::native::ToPrimary;

use super::Shared;

/// How often the primary wants to hear, if it does.
pub(super) fn asked_for() -> Option<Duration> {
    let text = std::env::var(POLYFORK_BEAT_MS).ok()?;
    let ms = text.parse::<u64>().ok().filter(|ms| *ms > 0)?;
    Some(Duration::from_millis(ms))
}

/// Tells until the channel ends.
pub(super) async fn tell(shared: Arc<Shared>, every: Duration) {
    let Some(channel) = &shared.channel else { return };
    let mut due = Instant::now();
    while !channel.is_closed() {
        let late = due.elapsed();
        // One that waits to be written says as much as two.
        if channel.is_idle() {
            let micros = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
            channel.push(&ToPrimary::Lag { micros });
        }
        due = Instant::now() + every;
        tokio::time::sleep_until(due.into()).await;
    }
}
