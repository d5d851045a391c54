//! CPU time and memory of a process, as the kernel counts them.
//!
//! Reference: proc(5), `/proc/PID/stat`.

use std::fs::File;
use std::io::Read;

/// What a process has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// CPU time since its start, in user mode and in the kernel, of all its threads.
    pub(crate) cpu_ms: u64,
    /// Memory that is in RAM now, also what it shares with others.
    pub(crate) resident_bytes: u64,
    /// Somebody has stopped it (SIGSTOP, a debugger).
    pub(crate) is_stopped: bool,
}

/// Of one process; `None` when it is gone.
pub(crate) fn of(pid: u32) -> Option<Usage> {
    let mut text = [0; 1024];
    let mut file = File::open(format!("/proc/{pid}/stat")).ok()?;
    let len = file.read(&mut text).ok()?;
    read(&String::from_utf8_lossy(&text[..len]))
}

/// Of several together.
pub(crate) fn of_all(pids: impl IntoIterator<Item = u32>) -> Usage {
    pids.into_iter().filter_map(of).fold(Usage::default(), Usage::plus)
}

/// The command may hold anything, blanks and parentheses too, and ends with the last parenthesis.
fn read(stat: &str) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(')')?;
    // From field 3, the state, on.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let ticks = number(14)?.checked_add(number(15)?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    Some(Usage {
        cpu_ms: ticks.saturating_mul(1000) / per_second,
        resident_bytes: number(24)?.saturating_mul(page),
        is_stopped: fields.first().is_some_and(|state| matches!(*state, "T" | "t")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let mine = of(std::process::id()).expect("stat");
        assert!(mine.resident_bytes > 100_000, "{mine:?}");
        assert_eq!(of(u32::MAX), None);
    }

    #[test]
    fn a_command_cannot_forge_the_numbers() {
        let stat = "7 (a) R 1 9 9) S 1 1 1 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 5 1000 6 1";
        let per_second = rustix::param::clock_ticks_per_second();
        let page = rustix::param::page_size() as u64;
        let usage = read(stat).expect("numbers");
        let wanted =
            Usage { cpu_ms: 42_000 / per_second, resident_bytes: 6 * page, is_stopped: false };
        assert_eq!(usage, wanted);
        assert!(read(&stat.replace(" S ", " T ")).expect("numbers").is_stopped);
        assert_eq!(read("nonsense"), None);
        assert_eq!(read("7 (x) S 1"), None);
    }
}
