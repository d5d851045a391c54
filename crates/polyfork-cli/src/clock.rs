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
pub(crate) fn stamp(time: SystemTime) -> String {
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

/// Writes `time` with microseconds, for logs.
pub(crate) fn fine_stamp(time: SystemTime) -> String {
    let mut stamp = stamp(time);
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    stamp.truncate(stamp.len() - 1);
    stamp.push_str(&format!("{:03}Z", since.subsec_micros() % 1000));
    stamp
}

/// Reads `2026-11-23T06:56:56Z`, with or without a part of a second, with or without the clock time.
pub(crate) fn read(text: &str) -> Option<SystemTime> {
    let text = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "00:00:00"));
    let (time, part) = time.split_once('.').unwrap_or((time, "0"));
    let number = |text: &str| -> Option<i64> {
        (!text.is_empty() && text.len() <= 4 && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse().ok())
            .flatten()
    };
    let mut days = date.split('-').map(number);
    let (year, month, day) = (days.next()??, days.next()??, days.next()??);
    let mut clock = time.split(':').map(number);
    let (hour, minute) = (clock.next()??, clock.next()??);
    let second = clock.next().unwrap_or(Some(0))?;
    let within = (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24;
    let over = days.next().is_some() || clock.next().is_some();
    let digits = part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
    if over || !within || minute > 59 || second > 60 || !digits || part.is_empty() {
        return None;
    }
    let seconds = number_of(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    let nanos: u32 = format!("{part:0<9}").parse().ok()?;
    let since = std::time::Duration::new(u64::try_from(seconds).ok()?, nanos);
    UNIX_EPOCH.checked_add(since)
}

/// Days from 1970-01-01 to a date.
fn number_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * from_march + 2) / 5 + day - 1;
    era * DAYS_PER_ERA + of_era * 365 + of_era / 4 - of_era / 100 + of_year - EPOCH
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
    fn what_is_written_is_read_back() {
        for ms in [0, 951_782_400_000, 1_709_251_199_999, 4_107_542_400_000, 1_795_417_016_042u64] {
            let time = UNIX_EPOCH + Duration::from_millis(ms);
            assert_eq!(read(&stamp(time)), Some(time));
            let fine = time + Duration::from_micros(7);
            assert_eq!(read(&fine_stamp(fine)), Some(fine));
        }
        let second = read("2026-11-23T06:56:56Z");
        assert!(second.is_some());
        assert_eq!(read("2026-11-23 06:56:56"), second);
        assert_eq!(read("2026-11-23"), read("2026-11-23T00:00Z"));
        for bad in
            ["", "yesterday", "2026", "2026-13-01", "2026-11-23T25:00", "1-2-3-4", "2026-11-23T1"]
        {
            assert_eq!(read(bad), None, "{bad}");
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
