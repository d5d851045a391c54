//! What is not to be read on in anything that a stranger's program wrote: values of variables, arguments of the program.
//!
//! A binary on trial has the primary's environment and reads a state with all variables of workers. What it writes then is
//! quoted, to people and in the log; here the known values are taken out of it.
//!
//! The surprising rule: short values are looked for as whole words only, and very short ones of the environment not at
//! all. `1` is no secret, and to hide it everywhere would leave nothing to read.

use std::collections::BTreeSet;
use std::ffi::OsStr;

use polyfork::cluster::Settings;

/// What stands there instead.
const HIDDEN: &str = "***";
/// A value of fewer characters is hidden only where it stands alone.
const SHORT: usize = 4;

/// All values that are known, the longest first: one may be part of another.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    /// Of workers with these settings, and of this process.
    pub(crate) fn of(settings: &Settings) -> Secrets {
        let environment: Vec<_> = std::env::vars_os().map(|(_, value)| value).collect();
        let long = environment.iter().filter(|value| value.len() >= SHORT);
        Secrets::from(settings.private_words().chain(long.map(AsRef::as_ref)))
    }

    fn from<'a>(values: impl Iterator<Item = &'a OsStr>) -> Secrets {
        let mut all = BTreeSet::new();
        for value in values {
            let text = value.to_string_lossy();
            // Lines of a key, say: the one that is quoted may be any of them.
            all.extend(
                text.lines().map(str::trim).filter(|line| line.len() >= SHORT).map(str::to_owned),
            );
            all.insert(text.into_owned());
        }
        all.remove("");
        let mut all: Vec<String> = all.into_iter().collect();
        all.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Secrets(all)
    }

    /// The text without them.
    pub(crate) fn hidden(&self, text: &str) -> String {
        let mut pieces = vec![Piece::Open(text)];
        for value in &self.0 {
            pieces = pieces.into_iter().flat_map(|piece| piece.without(value)).collect();
        }
        pieces.iter().map(Piece::shown).collect()
    }
}

/// A part of a text: what was hidden once is not looked at again.
enum Piece<'a> {
    Open(&'a str),
    Hidden,
}

impl<'a> Piece<'a> {
    fn shown(&self) -> &str {
        match self {
            Piece::Open(text) => text,
            Piece::Hidden => HIDDEN,
        }
    }

    fn without(self, value: &str) -> Vec<Piece<'a>> {
        let Piece::Open(text) = self else { return vec![self] };
        let mut pieces = Vec::new();
        let mut from = 0;
        for (at, _) in text.match_indices(value) {
            let end = at + value.len();
            if value.len() >= SHORT || is_word(text, at, end) {
                pieces.extend([Piece::Open(&text[from..at]), Piece::Hidden]);
                from = end;
            }
        }
        pieces.push(Piece::Open(&text[from..]));
        pieces
    }
}

fn is_word(text: &str, at: usize, end: usize) -> bool {
    let (before, after) = (text[..at].chars().next_back(), text[end..].chars().next());
    !before.into_iter().chain(after).any(char::is_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hides(values: &[&str], text: &str) -> String {
        Secrets::from(values.iter().map(OsStr::new)).hidden(text)
    }

    #[test]
    fn no_value_is_left_the_longest_first() {
        assert_eq!(hides(&["s3cret", "s3cretX"], "a s3cretX, s3cret."), "a ***, ***.");
        assert_eq!(hides(&["s3cret"], "API=s3crets3cret"), "API=******");
        assert_eq!(hides(&["one\ntwotwo"], "one\ntwotwo; then twotwo"), "***; then ***");
        assert_eq!(hides(&["****"], "a**** b"), "a*** b", "what was hidden is not looked at again");
        assert_eq!(hides(&["", "x"], "plain text"), "plain text");
    }

    #[test]
    fn short_values_are_hidden_where_they_stand_alone() {
        assert_eq!(hides(&["42"], "pin=42, code 142"), "pin=***, code 142");
    }

    #[test]
    fn the_variables_and_arguments_of_workers_are_secrets() {
        let settings = Settings::new("node").args(["--token=abcdef"]).env("KEY", "s3cretX");
        let told = Secrets::of(&settings).hidden("node got --token=abcdef and KEY=s3cretX");
        assert_eq!(told, "node got *** and KEY=***");
    }
}
