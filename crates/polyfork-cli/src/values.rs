//! Reads the values of options: durations, sizes, numbers of workers, `K=V` pairs.
//!
//! Every error says what is wrong with the text and shows one that is right. A duration needs its unit: `30`
//! could be seconds to one reader and milliseconds to another.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use polyfork::cluster::{Address, AddressError};

use crate::clock;
use crate::control::protocol::Scale;

/// How many workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workers {
    /// This many, at least 1.
    Exactly(u32),
    /// As many as the process may use CPUs, whatever `WEB_CONCURRENCY` says.
    Max,
}

/// The most workers that are accepted: more is a typing error, or a machine this was never tried on.
pub(crate) const MOST_WORKERS: u32 = 4096;

/// Reads `4` or `max`.
pub(crate) fn workers(text: &str) -> Result<Workers, String> {
    match text.trim() {
        "max" => Ok(Workers::Max),
        "0" => Err("a cluster needs at least 1 worker; `max` takes every CPU it may use".into()),
        number => match number.parse() {
            Ok(workers) if (1..=MOST_WORKERS).contains(&workers) => Ok(Workers::Exactly(workers)),
            _ => Err(format!("give a number from 1 to {MOST_WORKERS}, or `max`")),
        },
    }
}

/// Reads `4`, `+2` or `-1`.
pub(crate) fn scale(text: &str) -> Result<Scale, String> {
    let told =
        || format!("give a number from 1 to {MOST_WORKERS}, or how many more or less: +2, -1");
    let text = text.trim();
    if let Some(number) = text.strip_prefix(['+', '-']) {
        let number: u32 = number.parse().map_err(|_| told())?;
        let by =
            i32::try_from(number).ok().filter(|by| (1..=MOST_WORKERS).contains(&by.unsigned_abs()));
        let by = by.ok_or_else(told)?;
        return Ok(Scale::By(if text.starts_with('-') { -by } else { by }));
    }
    match text.parse() {
        Ok(workers) if (1..=MOST_WORKERS).contains(&workers) => Ok(Scale::To(workers)),
        Ok(0) => Err("at least 1 worker stays; `polyfork stop` ends an app".into()),
        _ => Err(told()),
    }
}

/// How many lines of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    /// The last ones.
    Last(usize),
    /// Every one there is.
    All,
}

/// The most lines that are held in memory to find the last ones.
const MOST_LINES: usize = 1_000_000;

/// Reads `20` or `all`.
pub(crate) fn lines(text: &str) -> Result<Lines, String> {
    match text.trim() {
        "all" => Ok(Lines::All),
        number => match number.parse() {
            Ok(number) if number <= MOST_LINES => Ok(Lines::Last(number)),
            _ => Err(format!("give a number from 0 to {MOST_LINES}, or `all`")),
        },
    }
}

/// Reads `10m`, which is that long ago, or a time as logs have it.
pub(crate) fn since(text: &str) -> Result<SystemTime, String> {
    if let Ok(ago) = duration(text) {
        return Ok(SystemTime::now().checked_sub(ago).unwrap_or(UNIX_EPOCH));
    }
    clock::read(text.trim()).ok_or_else(|| {
        "give how long ago, as in 10m, or a time in UTC, as in 2026-11-23T06:56:56Z".to_owned()
    })
}

/// Writes a size as people say it: `512 B`, `4.1 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = bytes;
    while scaled >= 1024 * 1024 && unit + 1 < UNITS.len() {
        scaled /= 1024;
        unit += 1;
    }
    match scaled {
        whole if whole < 1024 || unit + 1 == UNITS.len() => format!("{whole} {}", UNITS[unit]),
        more if more < 10 * 1024 => {
            format!("{}.{} {}", more / 1024, more % 1024 * 10 / 1024, UNITS[unit + 1])
        }
        more => format!("{} {}", more / 1024, UNITS[unit + 1]),
    }
}

/// Longer waits are typing errors, and far from what clocks can count.
const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 3600);

/// Reads the value of a variable that stands for an option without a value. Empty counts as not set.
pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("give 1, true, yes or on; or 0, false, no or off".into()),
    }
}

/// Reads what can be listened on.
pub(crate) fn address(text: &str) -> Result<Address, String> {
    if text.starts_with(['/', '.', '@']) {
        return Err(format!("that looks like a path: unix:{text} listens there"));
    }
    let is_word = !text.is_empty() && !text.contains(':') && text.parse::<u64>().is_err();
    if is_word {
        return Err(format!(
            "the port is missing: give HOST:PORT, as in {text}:8000, or unix:PATH"
        ));
    }
    text.parse().map_err(|error: AddressError| error.to_string())
}

/// Reads where metrics are served.
pub(crate) fn metrics_address(text: &str) -> Result<Address, String> {
    const EXPECTED: &str = "give HOST:PORT, as in 127.0.0.1:9100, or unix:PATH";
    match address(text)? {
        Address::Unix(path) if path.as_os_str().as_bytes().first() == Some(&0) => {
            Err(format!("an abstract name can be connected to by every user; {EXPECTED}"))
        }
        found @ (Address::Tcp(_) | Address::Unix(_)) => Ok(found),
        _ => Err(EXPECTED.to_owned()),
    }
}

/// Reads how long to wait between two looks.
pub(crate) fn interval(text: &str) -> Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_millis(100);
    match duration(text)? {
        short if short < SHORTEST => Err("give 100ms or more".to_owned()),
        interval => Ok(interval),
    }
}

/// Reads `500ms`, `30s`, `1.5s`, `2m`, `1h`, `7d`, `1m30s`, and `0`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err(format!("less than nothing; {}", expected()));
    }
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let (part, after) = one_part(rest)?;
        total = total.checked_add(part).filter(|sum| *sum <= LONGEST).ok_or_else(too_long)?;
        rest = after;
    }
    if text.is_empty() { Err(expected()) } else { Ok(total) }
}

/// Reads permission bits, octal.
pub(crate) fn umask(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text.trim(), 8) {
        Ok(mask) if mask <= 0o777 && !text.trim_start().starts_with('+') => Ok(mask),
        _ => Err("give octal digits from 000 to 777, as in 027".to_owned()),
    }
}

/// Takes whom to become. Nobody is no answer: it would leave root as it is.
pub(crate) fn user(text: OsString) -> Result<OsString, String> {
    let name = text.as_bytes().split(|byte| *byte == b':').next().unwrap_or_default();
    match name.trim_ascii().is_empty() {
        true => Err(
            "it names no user; is the variable set that it comes from? Leave it out to stay who \
                     you are"
                .to_owned(),
        ),
        false => Ok(text),
    }
}

/// Reads a duration, or `none` for no limit.
pub(crate) fn limit(text: &str) -> Result<Option<Duration>, String> {
    match text.trim() {
        "none" => Ok(None),
        other => duration(other).map(Some).map_err(|error| format!("{error}; or `none`")),
    }
}

/// Takes one number with its unit off the front.
fn one_part(text: &str) -> Result<(Duration, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(end);
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" | "min" => Duration::from_secs(60),
        "h" => Duration::from_secs(3600),
        "d" => Duration::from_secs(24 * 3600),
        "" if !number.is_empty() => {
            return Err(format!("the unit is missing: {number}s or {number}ms?"));
        }
        _ => return Err(expected()),
    };
    Ok((times(number, unit)?, rest))
}

/// `number` units; up to three digits after the point count, which is a microsecond of a millisecond.
fn times(number: &str, unit: Duration) -> Result<Duration, String> {
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 3 {
        return Err(expected());
    }
    let whole: u32 = whole.parse().map_err(|_| too_long())?;
    let thousandths: u32 = format!("{part:0<3}").parse().map_err(|_| expected())?;
    unit.checked_mul(whole)
        .zip((unit / 1000).checked_mul(thousandths))
        .and_then(|(whole, part)| whole.checked_add(part))
        .ok_or_else(too_long)
}

fn too_long() -> String {
    format!("too long: at most {}d (a hundred years)", LONGEST.as_secs() / (24 * 3600))
}

fn expected() -> String {
    "give a number with its unit, as in 500ms, 30s, 2m, 1m30s".into()
}

/// Reads `65536`, `64K`, `64KiB`, `1M`, `64MiB`. K is 1,024 bytes, M is 1,024 K.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        _ => return Err(expected_size()),
    };
    let digits = digits.trim();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(expected_size());
    }
    // All digits: what is left to go wrong is that there are too many.
    match digits.parse::<usize>().ok().and_then(|number| number.checked_mul(factor)) {
        Some(0) => Err("at least 1 byte, as in 64KiB".into()),
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err(format!("too large: at most {} bytes; as in 64KiB", isize::MAX)),
    }
}

fn expected_size() -> String {
    "give a number of bytes, as in 65536, 64KiB, 16MiB".into()
}

/// Reads `KEY=VALUE`; the value may hold any byte, and may be empty.
pub(crate) fn pair(text: OsString) -> Result<(OsString, OsString), String> {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        None | Some(0) => Err("give KEY=VALUE, as in PORT=3000".into()),
        Some(at) => Ok((
            OsString::from_vec(bytes[..at].to_vec()),
            OsString::from_vec(bytes[at + 1..].to_vec()),
        )),
    }
}

/// Writes a duration as people say it: `850 ms`, `1.5 s`, `2 min`.
pub(crate) fn spoken(duration: Duration) -> String {
    let ms = duration.as_millis();
    match ms {
        0 => "<1 ms".into(),
        1..1000 => format!("{ms} ms"),
        1000..60_000 => match (ms / 1000, ms % 1000 / 100) {
            (seconds, 0) => format!("{seconds} s"),
            (seconds, tenth) => format!("{seconds}.{tenth} s"),
        },
        60_000..3_600_000 => in_two(ms / 60_000, "min", ms / 1000 % 60, "s"),
        _ => in_two(ms / 3_600_000, "h", ms / 60_000 % 60, "min"),
    }
}

fn in_two(large: u128, large_unit: &str, small: u128, small_unit: &str) -> String {
    match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        for (text, ms) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("1.5s", 1_500),
            ("0.25s", 250),
            ("1.500m", 90_000),
            ("2m", 120_000),
            ("1m30s", 90_000),
            ("1h", 3_600_000),
            ("0", 0),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn a_wrong_duration_is_told_with_a_right_one() {
        for text in [
            "",
            "30",
            "s",
            "-1s",
            "1x",
            "1s2",
            "soon",
            "1..2s",
            "1.s",
            ".5s",
            "1.0001s",
            "5000000000s",
            "99999999999999999999h",
            "é",
        ] {
            let error = duration(text).expect_err(text);
            assert!(error.contains("ms") || error.contains("too long"), "{text}: {error}");
        }
        assert_eq!(limit("none"), Ok(None));
        assert!(limit("never").expect_err("not a word").contains("none"));
    }

    #[test]
    fn what_is_too_much_is_told_with_the_limit() {
        for text in ["99999999999d", "36501d", "36500d1s", "5000000000s"] {
            assert!(duration(text).expect_err(text).contains("at most 36500d"), "{text}");
        }
        assert_eq!(duration("36500d"), Ok(LONGEST));
        assert!(duration("-1").expect_err("negative").contains("less than nothing"));
        assert!(size("0").expect_err("none").contains("at least 1 byte"));
        assert!(size("99999999999999999999").expect_err("huge").contains("at most"));
    }

    #[test]
    fn a_switch_is_on_or_off_and_nothing_else() {
        for (text, on) in [("1", true), ("YES", true), ("on", true), ("false", false), ("", false)]
        {
            assert_eq!(switch(text), Ok(on), "{text}");
        }
        for text in ["zzz", "2", "ja", "-1"] {
            assert!(switch(text).expect_err(text).contains("true"), "{text}");
        }
    }

    #[test]
    fn what_is_almost_an_address_is_told_how_to_be_one() {
        assert!(address("localhost").expect_err("no port").contains("localhost:8000"));
        assert!(address("/tmp/x.sock").expect_err("a path").contains("unix:/tmp/x.sock"));
        assert_eq!(address("localhost:80"), address("127.0.0.1:80"));
        assert_eq!(address("80"), address(":80"));
    }

    #[test]
    fn zero_workers_are_refused_with_what_to_do() {
        assert_eq!(workers("3"), Ok(Workers::Exactly(3)));
        assert_eq!(workers("max"), Ok(Workers::Max));
        assert!(workers("0").expect_err("zero").contains("at least 1"));
        for text in ["-1", "", "two", "4097", "99999999999"] {
            assert!(workers(text).expect_err(text).contains("1 to 4096"));
        }
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("65536"), Ok(65_536));
        assert_eq!(size("64KiB"), Ok(65_536));
        assert_eq!(size("2m"), Ok(2 << 20));
        for text in ["0", "", "KiB", "1x", "-1", "99999999999999999999", "18446744073709551615G"] {
            assert!(size(text).expect_err(text).contains("64KiB"));
        }
    }

    #[test]
    fn whoever_is_to_be_another_user_says_which() {
        for text in ["www", "33:33", "www:"] {
            assert_eq!(user(text.into()), Ok(text.into()));
        }
        for text in ["", " ", ":", ":adm"] {
            assert!(user(text.into()).expect_err(text).contains("names no user"), "{text:?}");
        }
    }

    #[test]
    fn a_pair_splits_at_its_first_equals_sign() {
        let read = |text: &str| pair(text.into());
        assert_eq!(read("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(read("A="), Ok(("A".into(), "".into())));
        assert!(read("A").is_err() && read("=b").is_err());
    }

    #[test]
    fn durations_are_written_as_people_say_them() {
        for (ms, text) in [
            (0, "<1 ms"),
            (83, "83 ms"),
            (1_000, "1 s"),
            (1_540, "1.5 s"),
            (30_000, "30 s"),
            (90_000, "1 min 30 s"),
            (7_200_000, "2 h"),
        ] {
            assert_eq!(spoken(Duration::from_millis(ms)), text);
        }
    }
}
