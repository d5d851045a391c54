//! Reads the datagrams that a program sends to `NOTIFY_SOCKET`.
//!
//! Who sent a datagram, and whether it may, is for the receiver to check by its credentials. What a
//! notification leads to is decided in `polyfork-core`.
//!
//! The surprising rule: nothing here is an error. As systemd does it, a line that is unknown or makes no
//! sense is skipped, and of a repeated name the first counts.
//!
//! Behaviour follows: sd_notify(3), systemd `src/core/service.c` (`service_notify_message`).

/// Longest datagram that is looked at, in bytes; systemd's own limit.
pub const MAX_DATAGRAM_BYTES: usize = 4096;

/// What one datagram says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notification {
    /// `READY=1`: start-up or reload is finished.
    pub ready: bool,
    /// `RELOADING=1`: about to reload, until the next `READY=1`.
    pub reloading: bool,
    /// `STOPPING=1`: about to end.
    pub stopping: bool,
    /// `STATUS=`: a line for people. Control characters are replaced by U+FFFD.
    pub status: Option<String>,
    /// `ERRNO=`: why it failed.
    pub errno: Option<i32>,
    /// `MAINPID=`: the process to watch instead.
    pub main_pid: Option<u32>,
    /// `WATCHDOG=`: a sign of life, or the opposite.
    pub watchdog: Option<Watchdog>,
    /// `WATCHDOG_USEC=`: the new time limit between signs of life, in microseconds.
    pub watchdog_usec: Option<u64>,
    /// `EXTEND_TIMEOUT_USEC=`: more time for start, reload or stop, in microseconds.
    pub extend_timeout_usec: Option<u64>,
    /// `MONOTONIC_USEC=`: the sender's monotonic clock, sent with `RELOADING=1`, in microseconds.
    pub monotonic_usec: Option<u64>,
    /// `BARRIER=1`: the attached descriptor is to be closed once everything before was handled.
    pub barrier: bool,
    /// `FDSTORE=1`: keep the attached descriptors.
    pub fd_store: bool,
    /// `FDSTOREREMOVE=1`: forget the stored descriptors of this name.
    pub fd_store_remove: bool,
    /// `FDNAME=`: the name for the two before. Control characters are replaced by U+FFFD.
    pub fd_name: Option<String>,
    /// Lines that are not known or make no sense.
    pub ignored: usize,
    /// The datagram was longer than [`MAX_DATAGRAM_BYTES`]; the rest was not looked at.
    pub truncated: bool,
}

/// The value of `WATCHDOG=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watchdog {
    /// `1`: still alive.
    Alive,
    /// `trigger`: act as if the time limit had passed.
    Trigger,
}

impl Notification {
    /// Reads a datagram. Of one that is too long only the whole lines within the limit count.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Self {
        let mut notification = Self::default();
        for line in within_limit(datagram, &mut notification.truncated).split(|byte| *byte == b'\n')
        {
            if !line.is_empty() && notification.line(line).is_none() {
                notification.ignored += 1;
            }
        }
        notification
    }

    /// Takes a line in; `None` if it is to be ignored.
    fn line(&mut self, line: &[u8]) -> Option<()> {
        let equals = memchr::memchr(b'=', line)?;
        let (name, value) = (&line[..equals], &line[equals + 1..]);
        match name {
            b"READY" => flag(&mut self.ready, value),
            b"RELOADING" => flag(&mut self.reloading, value),
            b"STOPPING" => flag(&mut self.stopping, value),
            b"BARRIER" => flag(&mut self.barrier, value),
            b"FDSTORE" => flag(&mut self.fd_store, value),
            b"FDSTOREREMOVE" => flag(&mut self.fd_store_remove, value),
            b"STATUS" => first(&mut self.status, Some(printable(value))),
            b"FDNAME" => first(&mut self.fd_name, Some(printable(value))),
            b"ERRNO" => first(&mut self.errno, number(value)),
            b"MAINPID" => first(&mut self.main_pid, number(value).filter(|pid| *pid > 0)),
            b"WATCHDOG" => first(&mut self.watchdog, watchdog(value)),
            b"WATCHDOG_USEC" => first(&mut self.watchdog_usec, number(value)),
            b"EXTEND_TIMEOUT_USEC" => first(&mut self.extend_timeout_usec, number(value)),
            b"MONOTONIC_USEC" => first(&mut self.monotonic_usec, number(value)),
            _ => None,
        }
    }
}

fn within_limit<'a>(datagram: &'a [u8], truncated: &mut bool) -> &'a [u8] {
    *truncated = datagram.len() > MAX_DATAGRAM_BYTES;
    if !*truncated {
        return datagram;
    }
    let cut = &datagram[..MAX_DATAGRAM_BYTES];
    &cut[..memchr::memrchr(b'\n', cut).unwrap_or(0)]
}

fn flag(field: &mut bool, value: &[u8]) -> Option<()> {
    (value == b"1").then(|| *field = true)
}

fn first<T>(field: &mut Option<T>, value: Option<T>) -> Option<()> {
    let value = value?;
    field.get_or_insert(value);
    Some(())
}

fn number<T: std::str::FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn watchdog(value: &[u8]) -> Option<Watchdog> {
    match value {
        b"1" => Some(Watchdog::Alive),
        b"trigger" => Some(Watchdog::Trigger),
        _ => None,
    }
}

/// Text that cannot do anything to a terminal.
fn printable(value: &[u8]) -> String {
    String::from_utf8_lossy(value)
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(datagram: &str) -> Notification {
        Notification::parse(datagram.as_bytes())
    }

    #[test]
    fn everything_known_is_read() {
        let datagram = "READY=1\nRELOADING=1\nSTOPPING=1\nSTATUS=half way: 50 %\nERRNO=13\nMAINPID=42\n\
            WATCHDOG=1\nWATCHDOG_USEC=20000000\nEXTEND_TIMEOUT_USEC=5\nMONOTONIC_USEC=18446744073709551615\n\
            BARRIER=1\nFDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=web";
        let expected = Notification {
            ready: true,
            reloading: true,
            stopping: true,
            status: Some("half way: 50 %".into()),
            errno: Some(13),
            main_pid: Some(42),
            watchdog: Some(Watchdog::Alive),
            watchdog_usec: Some(20_000_000),
            extend_timeout_usec: Some(5),
            monotonic_usec: Some(u64::MAX),
            barrier: true,
            fd_store: true,
            fd_store_remove: true,
            fd_name: Some("web".into()),
            ignored: 0,
            truncated: false,
        };
        assert_eq!(parse(datagram), expected);
    }

    #[test]
    fn watchdog_can_be_triggered() {
        assert_eq!(parse("WATCHDOG=trigger\n").watchdog, Some(Watchdog::Trigger));
    }

    #[test]
    fn what_makes_no_sense_is_skipped_and_counted() {
        let odd = parse(
            "READY=0\nREADY\n=1\nready=1\n READY=1\nREADY=1 \nMAINPID=0\nMAINPID=-1\nMAINPID=1e3\n\
             WATCHDOG=2\nWATCHDOG_USEC=18446744073709551616\nX_OURS=1\n\0",
        );
        assert_eq!(odd, Notification { ignored: 13, ..Notification::default() });
        assert_eq!(parse("\n\n\n"), Notification::default());
    }

    #[test]
    fn first_of_a_repeated_name_counts() {
        assert_eq!(parse("STATUS=a\nSTATUS=b").status.as_deref(), Some("a"));
        assert_eq!(parse("MAINPID=x\nMAINPID=7").main_pid, Some(7));
    }

    #[test]
    fn status_cannot_do_anything_to_a_terminal() {
        let shown = Notification::parse(b"STATUS=\x1b[2J\x07\xffok\x7f\xc2\x9b").status;
        assert_eq!(shown.as_deref(), Some("\u{fffd}[2J\u{fffd}\u{fffd}ok\u{fffd}\u{fffd}"));
    }

    #[test]
    fn of_a_long_datagram_only_whole_lines_within_the_limit_count() {
        let long = format!("READY=1\nSTATUS={}", "x".repeat(MAX_DATAGRAM_BYTES));
        let seen = parse(&long);
        assert_eq!(seen, Notification { ready: true, truncated: true, ..Notification::default() });
        assert!(parse(&"x".repeat(MAX_DATAGRAM_BYTES + 1)).truncated);
        assert!(!parse(&"x".repeat(MAX_DATAGRAM_BYTES)).truncated);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(datagram in prop::collection::vec(any::<u8>(), 0..200)) {
            let seen = Notification::parse(&datagram);
            prop_assert!(seen.ignored <= datagram.len());
        }

        #[test]
        fn cutting_a_datagram_anywhere_is_harmless(at in 0..40_usize) {
            let datagram = &b"READY=1\nSTATUS=serving\nMAINPID=77\n"[..];
            let seen = Notification::parse(&datagram[..at.min(datagram.len())]);
            prop_assert!(seen.main_pid.is_none_or(|pid| pid == 77 || pid == 7));
        }
    }
}
