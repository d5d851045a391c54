//! The exit codes of the command: one table that the code, the help and `docs/exit-codes.md` share.
//!
//! Codes stay below 64, so none can be taken for a signal (128 + number) or a shell's own. The number of a
//! released code is never reused for another meaning.

use std::fmt;

/// What the command tells whoever started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Code {
    /// The cluster did its work and was stopped as asked, or its workers ended as they were meant to.
    Stopped = 0,
    /// Something that has no code of its own.
    Unexpected = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The program does not exist or cannot be executed.
    NoProgram = 3,
    /// Nothing on this machine can run the program.
    NoRuntime = 4,
    /// Another program listens on the address.
    AddressInUse = 5,
    /// The address may not be bound, or is not of this machine.
    AddressRefused = 6,
    /// Workers kept ending, in every slot.
    Failed = 7,
    /// Workers ran but never got ready, in every slot.
    NeverReady = 8,
    /// Workers were killed at once: a second signal, or SIGQUIT.
    Forced = 9,
    /// No app has the name, or fits the pattern.
    NoSuchApp = 10,
    /// A living app has the name.
    AlreadyRunning = 11,
    /// An app is there and did not answer in time.
    NotAnswering = 12,
    /// An app said no, or tried and failed.
    Refused = 13,
    /// The folder for control sockets, or that for logs, will not do.
    NoFolder = 14,
    /// A command that waited was interrupted.
    Interrupted = 15,
    /// A new version did not come up; the old one serves on.
    ReloadFailed = 16,
}

/// One row of the table.
pub(crate) struct Row {
    /// The code.
    pub(crate) code: Code,
    /// A stable word for programs, used in JSON.
    pub(crate) word: &'static str,
    /// When it is given: a sentence for people.
    pub(crate) meaning: &'static str,
}

/// Every code, in order.
pub(crate) const TABLE: [Row; 17] = [
    row(
        Code::Stopped,
        "stopped",
        "stopped as asked, after workers finished or their grace period was over; or all ended as --stop-exit-codes says",
    ),
    row(Code::Unexpected, "unexpected", "a system error that has no code of its own"),
    row(Code::Usage, "usage", "the command line, or a configuration file, is wrong"),
    row(Code::NoProgram, "no_program", "no such program, or it cannot be executed"),
    row(Code::NoRuntime, "no_runtime", "no runtime (node, deno, bun, python3 ...) for the program"),
    row(Code::AddressInUse, "address_in_use", "another program listens on the address"),
    row(Code::AddressRefused, "address_refused", "the address is not permitted or not available"),
    row(Code::Failed, "failed", "workers kept ending, in every slot"),
    row(Code::NeverReady, "never_ready", "workers ran but never got ready, in every slot"),
    row(Code::Forced, "forced", "stopped at once: a second signal, SIGQUIT, or `polyfork kill`"),
    row(Code::NoSuchApp, "no_such_app", "no app of that name is there"),
    row(Code::AlreadyRunning, "already_running", "an app of that name runs already"),
    row(Code::NotAnswering, "not_answering", "an app did not answer in time"),
    row(Code::Refused, "refused", "an app refused a request, or could not do what was asked"),
    row(Code::NoFolder, "no_folder", "the folder for control sockets or logs cannot be used"),
    row(
        Code::Interrupted,
        "interrupted",
        "the command was interrupted while it waited; what it asked for goes on, but what `start` began is stopped",
    ),
    row(
        Code::ReloadFailed,
        "reload_failed",
        "a new version did not come up; the workers that served go on serving",
    ),
];

const fn row(code: Code, word: &'static str, meaning: &'static str) -> Row {
    Row { code, word, meaning }
}

impl Code {
    /// The code of a number; [`Code::Unexpected`] for one that this version does not know.
    pub(crate) fn of(number: u8) -> Code {
        TABLE.get(usize::from(number)).map_or(Code::Unexpected, |row| row.code)
    }

    /// The row of this code.
    pub(crate) fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        std::process::ExitCode::from(code as u8)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&(*self as u8), f)
    }
}

/// The table as the help shows it.
pub(crate) fn help() -> String {
    let lines = TABLE.iter().map(|row| format!("  {:>2}  {}\n", row.code, row.meaning));
    std::iter::once("Exit codes:\n".to_owned()).chain(lines).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_its_place_in_the_table() {
        for (place, row) in TABLE.iter().enumerate() {
            assert_eq!(row.code as usize, place);
            assert_eq!(row.code.row().word, row.word);
        }
    }

    #[test]
    fn the_document_has_the_same_table() {
        let document = include_str!("../../../docs/exit-codes.md");
        for row in &TABLE {
            let line = format!("| {} | `{}` | {} |", row.code, row.word, row.meaning);
            assert!(document.contains(&line), "docs/exit-codes.md lacks: {line}");
        }
    }

    #[test]
    fn the_document_has_the_signals_of_the_help() {
        let document = include_str!("../../../docs/exit-codes.md");
        let help = crate::args::RUN_EXAMPLES;
        let (_, signals) = help.split_once("Signals:\n").expect("signals in the help");
        let lines = signals.lines().take_while(|line| line.starts_with("  "));
        let rows: Vec<(&str, &str)> =
            lines.filter_map(|line| line.trim().split_once("  ")).collect();
        assert!(rows.len() >= 5, "{rows:?}");
        for (name, meaning) in rows {
            let line = format!("| {} | {} |", name.trim(), meaning.trim());
            assert!(document.contains(&line), "docs/exit-codes.md lacks: {line}");
        }
    }
}
