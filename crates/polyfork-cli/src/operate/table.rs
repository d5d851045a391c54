//! Tables for people: columns as wide as their widest cell, nothing that could move the cursor.

use crate::style::{Ink, Paint};
use crate::words;

/// A cell and its colour.
#[derive(Debug, Clone)]
pub(crate) struct Cell(String, Option<Ink>);

impl Cell {
    /// Text of any origin.
    pub(crate) fn of(text: impl std::fmt::Display) -> Cell {
        Cell(words::harmless(&text.to_string()), None)
    }

    /// The same in a colour.
    pub(crate) fn ink(self, ink: Ink) -> Cell {
        Cell(self.0, Some(ink))
    }

    /// What is not known.
    pub(crate) fn unknown() -> Cell {
        Cell("-".to_owned(), Some(Ink::Dim))
    }

    /// Something if it is known.
    pub(crate) fn maybe(text: Option<impl std::fmt::Display>) -> Cell {
        text.map_or_else(Cell::unknown, Cell::of)
    }
}

/// Draws a table.
pub(crate) fn draw(paint: Paint, head: &[&str], rows: &[Vec<Cell>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.0.chars().count()).max().unwrap_or(0);
        widest.max(head[column].chars().count())
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let head: Vec<Cell> = head.iter().map(|text| Cell::of(text).ink(Ink::Dim)).collect();
    let mut drawn = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let pad = width - cell.0.chars().count();
            let text = match cell.1 {
                Some(ink) => paint.with(ink, &cell.0),
                None => cell.0.clone(),
            };
            line.push_str(&text);
            line.extend(std::iter::repeat_n(' ', pad + 2));
        }
        drawn.push_str(line.trim_end());
        drawn.push('\n');
    }
    drawn
}

/// The colour of a state.
pub(crate) fn state(word: &str) -> Cell {
    let ink = match word {
        "ready" => Ink::Good,
        "starting" | "online" | "draining" | "stopping" | "degraded" | "waiting" | "stopped" => {
            Ink::Warn
        }
        _ => Ink::Bad,
    };
    Cell::of(word.replace('_', " ")).ink(ink)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be_and_nothing_moves_the_cursor() {
        let rows = [
            vec![Cell::of("a"), Cell::of("long cell"), Cell::unknown()],
            vec![Cell::of("\x1b[2Jx"), Cell::of(2), Cell::maybe(Some("end"))],
        ];
        let drawn = draw(Paint::PLAIN, &["name", "b", "c"], &rows);
        assert_eq!(
            drawn,
            "name        b          c\na           long cell  -\n\\u{1b}[2Jx  2          end\n"
        );
    }
}
