//! Colours, for terminals only.
//!
//! Plain text whenever the reader is no terminal, `NO_COLOR` is set to anything (<https://no-color.org>), or the
//! terminal calls itself dumb.

use std::io::IsTerminal;

/// How one stream is painted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Paint {
    colours: bool,
    terminal: bool,
}

/// A colour or weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ink {
    /// What stays in the background.
    Dim,
    /// Names and numbers that matter.
    Bold,
    /// It works.
    Good,
    /// Somebody should look.
    Warn,
    /// It failed.
    Bad,
    /// The colour of a slot.
    Slot(u32),
}

impl Paint {
    /// For standard output.
    pub(crate) fn stdout() -> Paint {
        Paint::on(std::io::stdout().is_terminal())
    }

    /// For standard error.
    pub(crate) fn stderr() -> Paint {
        Paint::on(std::io::stderr().is_terminal())
    }

    fn on(terminal: bool) -> Paint {
        Paint { colours: terminal && wanted(), terminal }
    }

    /// Whether a terminal reads it.
    pub(crate) fn is_terminal(self) -> bool {
        self.terminal
    }

    /// Whether colours are shown.
    pub(crate) fn has_colours(self) -> bool {
        self.colours
    }

    /// `text` in `ink`, or as it is.
    pub(crate) fn with(self, ink: Ink, text: &str) -> String {
        if self.colours { format!("\x1b[{}m{text}\x1b[0m", ink.code()) } else { text.to_owned() }
    }
}

#[cfg(test)]
impl Paint {
    pub(crate) const PLAIN: Paint = Paint { colours: false, terminal: false };
    pub(crate) const COLOURS: Paint = Paint { colours: true, terminal: true };
}

impl Ink {
    fn code(self) -> u32 {
        match self {
            Ink::Dim => 2,
            Ink::Bold => 1,
            Ink::Good => 32,
            Ink::Warn => 33,
            Ink::Bad => 31,
            // Cyan to the bright ones; red and yellow stay for what is wrong.
            Ink::Slot(slot) => [36, 35, 34, 32, 96, 95, 94, 92][slot as usize % 8],
        }
    }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_end_where_the_text_ends_and_plain_is_plain() {
        assert_eq!(Paint::PLAIN.with(Ink::Bad, "x"), "x");
        assert_eq!(Paint::COLOURS.with(Ink::Bad, "x"), "\x1b[31mx\x1b[0m");
        assert_eq!(Paint::COLOURS.with(Ink::Slot(u32::MAX), "x"), "\x1b[92mx\x1b[0m");
    }
}
