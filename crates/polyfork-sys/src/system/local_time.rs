//! What the clock on the wall shows: the C library's idea of local time.
//!
//! Only the reading of it; what is to happen at which local time is decided by who asks.
//!
//! The surprising rule: the C library looks at `TZ` and at the zone file once, at the first call. A zone that is changed
//! afterwards is not noticed until the next start.
//!
//! References: localtime_r(3), tzset(3).

use std::io;
use std::mem::MaybeUninit;
use std::time::{SystemTime, UNIX_EPOCH};

/// A local time, to the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalTime {
    /// As people count, 2026.
    pub year: i32,
    /// 1 to 12.
    pub month: u32,
    /// 1 to 31.
    pub day: u32,
    /// 0 to 23.
    pub hour: u32,
    /// 0 to 59.
    pub minute: u32,
    /// 0 to 60: there may be a leap second.
    pub second: u32,
    /// 0 is Sunday, 6 is Saturday.
    pub weekday: u32,
}

/// The local time at `time`.
///
/// # Errors
/// When the time is beyond what the C library can tell.
pub fn local_time(time: SystemTime) -> io::Result<LocalTime> {
    let since = time.duration_since(UNIX_EPOCH).map_err(|_| too_far())?;
    let seconds = libc::time_t::try_from(since.as_secs()).map_err(|_| too_far())?;
    let mut told = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are to living values of the right types, and nothing keeps them after the call. The environment,
    // which it reads, is changed by nobody in a process of ours.
    let filled = unsafe { libc::localtime_r(&raw const seconds, told.as_mut_ptr()) };
    if filled.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes are a valid value of this plain structure, and the call has filled it.
    let told = unsafe { told.assume_init() };
    let part = |number: libc::c_int| u32::try_from(number).unwrap_or(0);
    Ok(LocalTime {
        year: told.tm_year.saturating_add(1900),
        month: part(told.tm_mon) + 1,
        day: part(told.tm_mday),
        hour: part(told.tm_hour),
        minute: part(told.tm_min),
        second: part(told.tm_sec),
        weekday: part(told.tm_wday),
    })
}

fn too_far() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a time that no clock shows")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn parts_are_those_of_a_clock_and_go_on_with_time() {
        let at = |seconds| local_time(UNIX_EPOCH + Duration::from_secs(seconds)).expect("a time");
        // Whatever the zone: it is a whole number of minutes off in our days.
        let (one, other) = (at(1_795_000_000), at(1_795_000_059));
        assert_eq!((one.year, one.second), (2026, 40));
        assert_eq!((one.minute + 1) % 60, other.minute);
        let later = at(1_795_000_000 + 7 * 24 * 3600);
        assert_eq!(later.weekday, one.weekday);
    }

    #[test]
    fn a_time_before_all_clocks_is_an_error() {
        assert!(local_time(UNIX_EPOCH - Duration::from_secs(1)).is_err());
    }
}
