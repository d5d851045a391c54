//! What is wrong with a configuration, and where: file, line, column, the line itself, and what to do.
//!
//! The surprising rule: lines are shown as they stand in the file, which may hold secrets. So of a variable of `env` only
//! the name is ever shown.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::Code;
use crate::ledger::Verdict;
use crate::words;

/// The longest piece of a line that is shown.
const SHOWN: usize = 120;

/// A place in a file, both from 1. Columns count characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Mark {
    pub(crate) line: usize,
    pub(crate) column: usize,
    /// The line, if it may be shown.
    #[serde(skip)]
    pub(crate) shown: Option<String>,
}

impl Mark {
    /// The place of a byte in a text.
    pub(crate) fn of(text: &str, byte: usize) -> Mark {
        let mut byte = byte.min(text.len());
        while !text.is_char_boundary(byte) {
            byte -= 1;
        }
        let before = &text[..byte];
        let start = before.rfind('\n').map_or(0, |at| at + 1);
        let line = text[start..].lines().next().unwrap_or_default();
        Mark {
            line: before.matches('\n').count() + 1,
            column: text[start..byte].chars().count() + 1,
            shown: Some(line.to_owned()),
        }
    }

    /// The same place, of which nothing is shown.
    pub(crate) fn secret(self) -> Mark {
        Mark { shown: None, ..self }
    }
}

/// Something wrong, or worth knowing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) file: PathBuf,
    pub(crate) at: Option<Mark>,
    /// The app it is about.
    pub(crate) app: Option<String>,
    pub(crate) text: String,
    pub(crate) code: Code,
    /// Whether it keeps the app from being started.
    pub(crate) fatal: bool,
}

impl Fault {
    /// Something that has to be put right first.
    pub(crate) fn new(file: &Path, at: Option<Mark>, text: impl Into<String>) -> Fault {
        let (file, text) = (file.to_owned(), text.into());
        Fault { file, at, app: None, text, code: Code::Usage, fatal: true }
    }

    /// Something to know.
    pub(crate) fn warning(file: &Path, at: Option<Mark>, text: impl Into<String>) -> Fault {
        Fault { fatal: false, ..Fault::new(file, at, text) }
    }

    /// About this app.
    pub(crate) fn of(self, app: &str) -> Fault {
        Fault { app: Some(app.to_owned()), ..self }
    }

    /// With this exit code.
    pub(crate) fn with(self, code: Code) -> Fault {
        Fault { code, ..self }
    }

    /// `polyfork.toml:7:1: app shop: what`, the line, and a mark under the place.
    pub(crate) fn told(&self) -> String {
        let mut told = words::harmless(&self.file.display().to_string());
        if let Some(at) = &self.at {
            told.push_str(&format!(":{}:{}", at.line, at.column));
        }
        if let Some(app) = &self.app {
            told.push_str(&format!(": app {}", words::harmless(app)));
        }
        told.push_str(&format!(": {}", self.text));
        let Some((at, line)) = self.at.as_ref().and_then(|at| Some((at, at.shown.as_ref()?)))
        else {
            return told;
        };
        let from = at.column.saturating_sub(SHOWN / 2);
        let piece: String = line.chars().skip(from).take(SHOWN).collect();
        let piece = piece.replace('\t', " ");
        let blanks = " ".repeat((at.column - 1).saturating_sub(from));
        format!("{told}\n    {}\n    {blanks}^", words::harmless(&piece))
    }
}

/// All that is wrong, as one refusal.
pub(crate) fn refusal(faults: &[Fault]) -> Verdict {
    let fatal: Vec<&Fault> = faults.iter().filter(|fault| fault.fatal).collect();
    let text: Vec<String> = fatal.iter().map(|fault| fault.told()).collect();
    Verdict { code: fatal.first().map_or(Code::Usage, |fault| fault.code), text: text.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_shows_the_line_and_points_at_the_place() {
        let text = "a = 1\n  wörkers = 2\n";
        let at = Mark::of(text, text.find('=').map_or(0, |_| text.rfind('2').unwrap_or(0)));
        assert_eq!((at.line, at.column), (2, 13));
        let fault = Fault::new(Path::new("x.toml"), Some(at.clone()), "no").of("shop");
        let told = "x.toml:2:13: app shop: no\n      wörkers = 2\n                ^";
        assert_eq!(fault.told(), told);
        let secret = Fault::new(Path::new("x.toml"), Some(at.secret()), "no");
        assert_eq!(secret.told(), "x.toml:2:13: no");
    }

    #[test]
    fn any_place_in_any_text_can_be_marked() {
        for text in ["", "\n\n", "é", "a\r\nb", "\t\t\u{1b}[2J"] {
            for byte in 0..text.len() + 3 {
                let told = Fault::new(Path::new("x"), Some(Mark::of(text, byte)), "no").told();
                assert!(!told.contains('\x1b'), "{told:?}");
            }
        }
    }
}
