//! Standard output of verbs that answer: help, lists, tables, JSON.
//!
//! What a foreground primary passes on from its workers is the business of `sink`, which stays when nobody reads.
//!
//! The surprising rule: an answer that cannot be written is complained of here, once, and `main` asks here for the exit code,
//! so that no verb can forget either. A reader that is gone (`polyfork ls | head -1`) has read enough, and that is no fault.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::exit::Code;
use crate::words;

/// Something could not be written, though somebody wanted it.
static LOST: AtomicBool = AtomicBool::new(false);

/// Writes to standard output. False: nothing more can be written, and all that is to be said of that has been said.
pub(crate) fn write(bytes: &[u8]) -> bool {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => true,
        Err(error) => {
            if error.kind() != io::ErrorKind::BrokenPipe && !LOST.swap(true, Ordering::Relaxed) {
                crate::say(io::stderr(), &complaint("standard output", &error));
            }
            false
        }
    }
}

/// Writes one JSON value over several lines, with a newline.
pub(crate) fn json<T: Serialize>(value: &T) -> bool {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    write(harmless_json(text).as_bytes())
}

/// Writes one JSON value as one line.
pub(crate) fn json_line<T: Serialize>(value: &T) -> bool {
    let text = serde_json::to_string(value).unwrap_or_default();
    write(harmless_json(text).as_bytes())
}

/// The same value, and nothing in its text that a terminal would obey: what JSON leaves as it is of that kind can only stand
/// inside a string, where an escape means the same.
fn harmless_json(text: String) -> String {
    let mut harmless = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        match c {
            c if !c.is_ascii() && words::is_unseen(c) => {
                harmless.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => harmless.push(c),
        }
    }
    harmless.push('\n');
    harmless
}

/// That something could not be written to a place.
pub(crate) fn complaint(place: &str, error: &io::Error) -> String {
    let what = words::plain(&error.to_string());
    let mut letters = what.chars();
    let first = letters.next().map(|c| c.to_ascii_lowercase());
    let what = first.into_iter().chain(letters).collect::<String>();
    format!("polyfork: cannot write to {}: {what}\n", words::harmless(place))
}

/// Whether something could not be written that somebody wanted: what was done is better told elsewhere.
pub(crate) fn is_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

/// The exit code of a verb that came to `code`: what went well and could not be told did not go well.
pub(crate) fn code(code: Code) -> Code {
    match code {
        Code::Stopped if is_lost() => Code::Unexpected,
        code => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_means_the_same_and_moves_no_cursor() {
        let name = "a\u{1b}[2J\u{9b}31m\u{202e}b\u{feff} \u{e9}\u{1f4bb}\n";
        let text = harmless_json(serde_json::to_string(name).expect("JSON"));
        assert!(!text.trim_end_matches('\n').chars().any(words::is_unseen), "{text:?}");
        assert!(text.contains("\u{e9}\u{1f4bb}"), "{text:?}");
        assert_eq!(serde_json::from_str::<String>(&text).expect("JSON"), name);
    }
}
