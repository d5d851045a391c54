//! How many workers there are to be, and why that many.
//!
//! How many CPUs may be used is found out by the library. A wish in `WEB_CONCURRENCY` that cannot be followed stops nothing:
//! that variable was set for many programs.

use std::ffi::OsStr;

use polyfork::cluster::{default_workers, usable_cpus};

use crate::values::{self, Workers};
use crate::words;

/// How many workers, and why that many.
pub(crate) struct HowMany {
    pub(crate) workers: u32,
    pub(crate) why: String,
    /// A wish that was not followed.
    pub(crate) notice: Option<String>,
}

impl HowMany {
    /// As many as are wanted, by whoever says so.
    pub(crate) fn of(wanted: Option<Workers>) -> HowMany {
        match wanted {
            Some(Workers::Exactly(workers)) => {
                HowMany { workers, why: "as asked".to_owned(), notice: None }
            }
            Some(Workers::Max) => {
                let cpus = usable_cpus();
                HowMany { workers: cpus.workers, why: cpus.explanation, notice: None }
            }
            None => {
                let found = default_workers();
                let workers = found.workers.min(values::MOST_WORKERS);
                let set = std::env::var_os("WEB_CONCURRENCY").filter(|value| !value.is_empty());
                let notice = set.and_then(|set| not_followed(&set, workers));
                HowMany { workers, why: found.explanation, notice }
            }
        }
    }
}

/// Tells that `WEB_CONCURRENCY` is not what was started.
fn not_followed(set: &OsStr, workers: u32) -> Option<String> {
    let most = values::MOST_WORKERS;
    let text = set.to_string_lossy();
    let number = text.trim();
    if number.parse() == Ok(workers) {
        return None;
    }
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let why = match is_number && number.bytes().any(|byte| byte != b'0') {
        true => format!("more than {most}"),
        false => format!("not a number from 1 to {most}"),
    };
    Some(format!("WEB_CONCURRENCY={} is {why}: {workers} used instead", words::harmless(&text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_for_more_workers_than_there_can_be_is_answered() {
        let told = |set: &str, workers| not_followed(OsStr::new(set), workers);
        assert_eq!(told(" 3 ", 3), None);
        assert!(told("100000", 4096).unwrap().contains("more than 4096: 4096 used instead"));
        assert!(told("99999999999", 2).unwrap().contains("more than 4096: 2 used instead"));
        assert!(told("a\x1b", 2).unwrap().contains("\\u{1b} is not a number"));
    }
}
