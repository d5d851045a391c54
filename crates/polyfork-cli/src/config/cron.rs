//! Times as crontab(5) has them: minute, hour, day, month, weekday, in local time.
//!
//! Only decides when it is time next; [`Clock`] waits for that, `renew` does what is to be done.
//!
//! The surprising rules are cron's own: where both day and weekday are restricted, either will do. When clocks are put back,
//! a time that comes twice is taken once; when they are put forward, a time that is skipped is not made up for.
//!
//! References: crontab(5), timerfd_create(2) for `TFD_TIMER_CANCEL_ON_SET`.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use polyfork::process::{LocalTime, local_time};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How far ahead is looked: 29 February comes at least every eight years.
const HORIZON: Duration = Duration::from_secs(9 * 366 * 24 * 3600);
const MINUTE: u64 = 60;
const HOUR: u64 = 3600;

/// A moment of every so often.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Cron {
    text: String,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    weekdays: u64,
    /// Day and weekday are both restricted: either will do.
    either: bool,
}

impl fmt::Debug for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One of the five fields.
struct Field {
    name: &'static str,
    from: u32,
    to: u32,
    words: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", from: 0, to: 59, words: &[] },
    Field { name: "hour", from: 0, to: 23, words: &[] },
    Field { name: "day", from: 1, to: 31, words: &[] },
    Field {
        name: "month",
        from: 1,
        to: 12,
        words: &[
            "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
        ],
    },
    // 7 is Sunday as well.
    Field {
        name: "weekday",
        from: 0,
        to: 7,
        words: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
    },
];

/// Short forms.
const NAMED: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

impl Cron {
    /// Reads `30 3 * * 1-5` and the like, `@daily`, and six fields if the first, seconds, is 0.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(text: &str) -> Result<Cron, String> {
        let text = text.trim();
        let long = NAMED.iter().find(|(name, _)| *name == text).map_or(text, |(_, long)| long);
        let mut words: Vec<&str> = long.split_whitespace().collect();
        if words.len() == 6 {
            if words[0] != "0" {
                return Err(format!("{:?}: seconds can only be 0", words[0]));
            }
            words.remove(0);
        }
        let [minute, hour, day, month, weekday] = words[..] else {
            return Err(format!(
                "give minute, hour, day, month and weekday, as in \"30 3 * * *\", or @daily; this has {} fields",
                words.len()
            ));
        };
        let read = |at: usize, word: &str| FIELDS[at].read(word);
        let weekdays = read(4, weekday)?;
        let cron = Cron {
            text: text.to_owned(),
            minutes: read(0, minute)?,
            hours: read(1, hour)?,
            days: read(2, day)?,
            months: read(3, month)?,
            weekdays: (weekdays | weekdays >> 7) & 0x7f,
            either: !day.starts_with('*') && !weekday.starts_with('*'),
        };
        match cron.is_possible() {
            true => Ok(cron),
            false => Err("no year has such a day".into()),
        }
    }

    /// Whether any year has such a day, leap years included.
    fn is_possible(&self) -> bool {
        const DAYS: [u32; 12] = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let in_month = |month: u32| self.days & ((2 << DAYS[month as usize]) - 2) != 0;
        self.either || (0..12).any(|month| has(self.months, month + 1) && in_month(month))
    }

    fn is_day(&self, at: &LocalTime) -> bool {
        let (day, weekday) = (has(self.days, at.day), has(self.weekdays, at.weekday));
        has(self.months, at.month) && if self.either { day || weekday } else { day && weekday }
    }

    /// The first such moment after `now`. `shows` is the clock on the wall.
    pub(crate) fn next(
        &self,
        now: SystemTime,
        shows: impl Fn(SystemTime) -> io::Result<LocalTime>,
    ) -> Option<SystemTime> {
        let since = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
        let before = minute_of(&shows(now).ok()?);
        let mut at = (since / MINUTE + 1) * MINUTE;
        let last = since + HORIZON.as_secs();
        while at <= last {
            let time = UNIX_EPOCH + Duration::from_secs(at);
            let local = shows(time).ok()?;
            // Zones that are off by seconds were given up in 1972.
            if !(self.is_day(&local) && has(self.hours, local.hour)) {
                at += HOUR - u64::from(local.minute) * MINUTE;
            } else if !has(self.minutes, local.minute) || self.was(&local, before) {
                at += MINUTE;
            } else {
                return Some(time);
            }
        }
        None
    }

    /// Whether a fixed time comes a second time, because clocks were put back.
    fn was(&self, local: &LocalTime, before: (i32, u32, u32, u32, u32)) -> bool {
        let every_hour = self.hours == (1 << 24) - 1;
        !every_hour && minute_of(local) <= before
    }
}

/// What tells minutes of the wall clock apart, in their order.
fn minute_of(at: &LocalTime) -> (i32, u32, u32, u32, u32) {
    (at.year, at.month, at.day, at.hour, at.minute)
}

fn has(set: u64, number: u32) -> bool {
    number < 64 && set & (1 << number) != 0
}

impl Field {
    /// The set of what is meant by `*`, `5`, `1-5`, `*/10`, `1-30/5`, `mon` and lists of these.
    fn read(&self, word: &str) -> Result<u64, String> {
        word.split(',').try_fold(0, |set, part| Ok(set | self.part(part)?))
    }

    fn part(&self, part: &str) -> Result<u64, String> {
        let wrong = || {
            let Field { name, from, to, .. } = self;
            format!("{part:?} is no {name}: give {from} to {to}, as in *, 5, 1-5, */10, 1,2")
        };
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, step.parse().ok().filter(|step| *step > 0)),
            None => (part, Some(1)),
        };
        let step: u32 = step.ok_or_else(wrong)?;
        let (from, to) = match (range, range.split_once('-')) {
            ("*", _) => (self.from, self.to),
            (_, Some((from, to))) => {
                (self.number(from).ok_or_else(wrong)?, self.number(to).ok_or_else(wrong)?)
            }
            (one, None) => {
                let one = self.number(one).ok_or_else(wrong)?;
                // As cron has it, 5/10 is 5-59/10.
                (one, if part.contains('/') { self.to } else { one })
            }
        };
        if from > to {
            return Err(wrong());
        }
        Ok((from..=to).step_by(step as usize).fold(0, |set, number| set | 1 << number))
    }

    fn number(&self, word: &str) -> Option<u32> {
        let word = word.to_ascii_lowercase();
        let named = self.words.iter().position(|known| *known == word);
        let number = match named {
            Some(place) => u32::try_from(place).ok()? + self.from,
            None if word.bytes().all(|byte| byte.is_ascii_digit()) => word.parse().ok()?,
            None => return None,
        };
        (self.from..=self.to).contains(&number).then_some(number)
    }
}

/// Waits for times of the wall clock. Asleep until then; a clock that is set wakes it.
pub(crate) struct Clock {
    timer: AsyncFd<OwnedFd>,
}

impl Clock {
    /// # Errors
    /// The system's.
    #[expect(deprecated, reason = "sound for a descriptor that the registration owns")]
    pub(crate) fn new() -> io::Result<Clock> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        Ok(Clock { timer: AsyncFd::with_interest(timer, Interest::READABLE)? })
    }

    /// Returns at the next time that `cron` means.
    pub(crate) async fn until(&self, cron: &Cron) {
        loop {
            let Some(at) = cron.next(SystemTime::now(), local_time) else {
                return std::future::pending().await;
            };
            match self.sleep(at).await {
                Ok(true) => return,
                // The clock was set: look at it again.
                Ok(false) => {}
                Err(_) => return std::future::pending().await,
            }
        }
    }

    /// False when the clock was set meanwhile.
    async fn sleep(&self, until: SystemTime) -> io::Result<bool> {
        let since = until.duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = Timespec {
            tv_sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(since.subsec_nanos()),
        };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        let value = Itimerspec { it_interval: never, it_value: at };
        timerfd_settime(self.timer.get_ref(), flags, &value)?;
        loop {
            let mut ready = self.timer.readable().await?;
            let mut count = [0; 8];
            match rustix::io::read(self.timer.get_ref(), &mut count) {
                Ok(_) => return Ok(true),
                Err(Errno::CANCELED) => return Ok(false),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A zone of its own: two hours ahead of UTC in winter, three from 2026-03-29 01:00 UTC to 2026-10-25 01:00 UTC.
    fn shows(time: SystemTime) -> io::Result<LocalTime> {
        let utc = time.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let summer = (1_774_746_000..1_792_890_000).contains(&utc);
        let local = utc + if summer { 3 * HOUR } else { 2 * HOUR };
        let (days, rest) = (local / 86_400, local % 86_400);
        let (year, month, day) = civil(i64::try_from(days).expect("days"));
        let part = |n: u64| u32::try_from(n).expect("small");
        Ok(LocalTime {
            year,
            month,
            day,
            hour: part(rest / HOUR),
            minute: part(rest % HOUR / MINUTE),
            second: part(rest % MINUTE),
            weekday: part((days + 4) % 7),
        })
    }

    /// Counted day by day, so that it owes nothing to a formula.
    fn civil(days: i64) -> (i32, u32, u32) {
        let leap = |year: i32| (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let (mut year, mut left) = (1970, days);
        loop {
            let length = if leap(year) { 366 } else { 365 };
            if left < length {
                break;
            }
            left -= length;
            year += 1;
        }
        let february = if leap(year) { 29 } else { 28 };
        let mut month = 1;
        for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        (year, month, u32::try_from(left + 1).expect("small"))
    }

    fn after(cron: &str, utc: u64) -> Option<(i32, u32, u32, u32, u32, u32)> {
        let cron = Cron::read(cron).expect("a cron pattern");
        let next = cron.next(UNIX_EPOCH + Duration::from_secs(utc), shows)?;
        let at = shows(next).expect("a time");
        assert_eq!(at.second, 0);
        Some((at.year, at.month, at.day, at.hour, at.minute, at.weekday))
    }

    /// 2026-11-23 (a Monday) 14:00:30 on that wall.
    const NOW: u64 = 1_795_435_230;

    #[test]
    fn the_next_time_is_the_next_one_on_the_wall() {
        for (cron, expected) in [
            ("* * * * *", (2026, 11, 23, 14, 1, 1)),
            ("*/15 * * * *", (2026, 11, 23, 14, 15, 1)),
            ("0 3 * * *", (2026, 11, 24, 3, 0, 2)),
            ("0 0 3 * * *", (2026, 11, 24, 3, 0, 2)),
            ("@daily", (2026, 11, 24, 0, 0, 2)),
            ("30 4 1 * *", (2026, 12, 1, 4, 30, 2)),
            ("0 9-17/4 * * mon-fri", (2026, 11, 23, 17, 0, 1)),
            ("5,35 14 * * *", (2026, 11, 23, 14, 5, 1)),
            ("0 0 29 2 *", (2028, 2, 29, 0, 0, 2)),
            ("0 12 * * 7", (2026, 11, 29, 12, 0, 0)),
            ("0 0 13 * fri", (2026, 11, 27, 0, 0, 5)),
            ("0 0 1 jan *", (2027, 1, 1, 0, 0, 5)),
        ] {
            assert_eq!(after(cron, NOW), Some(expected), "{cron}");
        }
    }

    #[test]
    fn a_time_that_comes_twice_is_taken_once() {
        // 03:30 on 25 October 2026 is 00:30 UTC, and 01:30 UTC again.
        let first = 1_792_888_200;
        assert_eq!(after("30 3 * * *", first - 60), Some((2026, 10, 25, 3, 30, 0)));
        assert_eq!(after("30 3 * * *", first), Some((2026, 10, 26, 3, 30, 1)));
        // What comes every hour comes in that hour, too.
        assert_eq!(after("30 * * * *", first), Some((2026, 10, 25, 3, 30, 0)));
    }

    #[test]
    fn a_time_that_is_skipped_passes() {
        // 03:00 to 03:59 on 29 March 2026 are not there.
        assert_eq!(after("30 3 * * *", 1_774_746_000 - 600), Some((2026, 3, 30, 3, 30, 1)));
        assert_eq!(after("30 4 * * *", 1_774_746_000 - 600), Some((2026, 3, 29, 4, 30, 0)));
    }

    #[test]
    fn what_is_no_time_is_told_with_what_would_be_one() {
        for (text, part) in [
            ("", "0 fields"),
            ("1 2 3", "3 fields"),
            ("60 * * * *", "minute"),
            ("* 24 * * *", "hour"),
            ("* * 0 * *", "day"),
            ("* * * 13 *", "month"),
            ("* * * * 8", "weekday"),
            ("* * * * noday", "weekday"),
            ("*/0 * * * *", "minute"),
            ("5-1 * * * *", "minute"),
            ("+5 * * * *", "minute"),
            ("0 0 30 2 *", "no year"),
            ("5 * * * * *", "seconds"),
            ("99999999999999999999 * * * *", "minute"),
        ] {
            let error = Cron::read(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_system_has_a_clock_to_wait_by() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let clock = Clock::new().expect("a clock");
            assert!(clock.sleep(SystemTime::now()).await.expect("asleep"));
        });
    }
}
