//! Writes the wall clock as RFC 3339 in UTC with milliseconds.
//!
//! Only stamps come from here; nothing is measured by it, since the wall clock may jump.
//!
//! The calendar is the Gregorian one counted in eras of 400 years (146,097 days) that start on 1 March, so that
//! a leap day is the last day of its year.

use std::time::{SystemTime, UNIX_EPOCH};

const DAYS_PER_ERA: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH: i64 = 719_468;

/// The present, e.g. `2026-11-23T06:56:56.042Z`.
pub(crate) fn now() -> String {
    stamp(SystemTime::now())
}

/// Writes `time`; a clock before 1970 is written as 1970-01-01T00:00:00.000Z.
fn stamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX / 2);
    let (year, month, day) = date(seconds.div_euclid(86_400));
    let of_day = seconds.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        since.subsec_millis(),
    )
}

/// Year, month and day of a number of days since 1970-01-01.
fn date(days: i64) -> (i64, i64, i64) {
    let days = days + EPOCH;
    let era = days.div_euclid(DAYS_PER_ERA);
    let of_era = days.rem_euclid(DAYS_PER_ERA);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_moments_are_written_right() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (1_709_251_200_000, "2024-03-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_795_417_016_042, "2026-11-23T06:56:56.042Z"),
        ] {
            assert_eq!(stamp(UNIX_EPOCH + Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn days_follow_one_another_for_a_thousand_years() {
        let (mut year, mut month, mut day) = date(0);
        for number in 1..366_000 {
            let next = date(number);
            let within = next == (year, month, day + 1);
            let month_end = next == (year, month + 1, 1) && day >= 28;
            let year_end = next == (year + 1, 1, 1) && (month, day) == (12, 31);
            assert!(within || month_end || year_end, "{next:?} after {:?}", (year, month, day));
            (year, month, day) = next;
        }
    }
}
