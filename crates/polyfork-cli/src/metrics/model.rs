//! Metrics as the exposition formats know them: families of samples.
//!
//! Labels are kept as they are written, checked and cleaned when they are made; so whatever a worker says, what is written
//! has the right form. Bounds of buckets (`le`) and quantiles stand apart, because samples are sorted by them.

use std::cmp::Ordering;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// The longest name of a metric or label.
const LONGEST_NAME: usize = 200;
/// The longest value of a label.
const LONGEST_VALUE: usize = 1024;
/// Labels of one sample.
const MOST_LABELS: usize = 32;
/// The longest help text.
const LONGEST_HELP: usize = 1024;

/// What a family is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by bucket.
    Histogram,
    /// Quantiles.
    Summary,
    /// Nobody said.
    Unknown,
}

impl Kind {
    /// The word of the text format.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
            Kind::Summary => "summary",
            Kind::Unknown => "untyped",
        }
    }

    /// Reads such a word; what is not known is [`Kind::Unknown`].
    pub(crate) fn of(word: &str) -> Kind {
        match word {
            "counter" => Kind::Counter,
            "gauge" => Kind::Gauge,
            "histogram" => Kind::Histogram,
            "summary" => Kind::Summary,
            _ => Kind::Unknown,
        }
    }
}

/// What a sample's name has more than its family's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Part {
    /// Nothing.
    Whole,
    /// `_bucket`.
    Bucket,
    /// `_sum`.
    Sum,
    /// `_count`.
    Count,
}

impl Part {
    /// The end of the name.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Part::Whole => "",
            Part::Bucket => "_bucket",
            Part::Sum => "_sum",
            Part::Count => "_count",
        }
    }

    /// Which part of a family a sample's name means.
    pub(crate) fn of(name: &str, family: &str) -> Option<Part> {
        let rest = name.strip_prefix(family)?;
        [Part::Whole, Part::Bucket, Part::Sum, Part::Count]
            .into_iter()
            .find(|part| part.suffix() == rest)
    }

    /// Whether a family of this kind has it.
    pub(crate) fn fits(self, kind: Kind) -> bool {
        match kind {
            Kind::Histogram => self != Part::Whole,
            Kind::Summary => self != Part::Bucket,
            _ => self == Part::Whole,
        }
    }
}

/// The bound of a bucket, or a quantile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bound(pub(crate) f64);

impl Eq for Bound {}

impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Bound) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Bound {
    fn cmp(&self, other: &Bound) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// What tells one sample of a family from the others, in the order in which they are written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Key {
    /// As written between the braces, sorted; without `le` and `quantile`.
    pub(crate) labels: Box<str>,
    /// Which part.
    pub(crate) part: Part,
    /// `le` of a bucket, `quantile` of a summary.
    pub(crate) bound: Option<Bound>,
}

impl Key {
    /// Of a sample without labels.
    pub(crate) fn plain() -> Key {
        Key { labels: "".into(), part: Part::Whole, bound: None }
    }

    /// Checks what a program said of a sample. `None` when it makes no sense or is too much.
    pub(crate) fn read(kind: Kind, part: Part, mut labels: Vec<(String, String)>) -> Option<Key> {
        if !part.fits(kind) || labels.len() > MOST_LABELS {
            return None;
        }
        let special = match (kind, part) {
            (Kind::Histogram, Part::Bucket) => Some("le"),
            (Kind::Summary, Part::Whole) => Some("quantile"),
            _ => None,
        };
        let mut bound = None;
        if let Some(special) = special {
            let at = labels.iter().position(|(name, _)| name == special)?;
            let value = number(&labels.swap_remove(at).1)?;
            bound = Some(Bound(value)).filter(|bound| !bound.0.is_nan());
            bound?;
        }
        labels.sort();
        if labels.windows(2).any(|two| two[0].0 == two[1].0) {
            return None;
        }
        let mut written = String::new();
        for (name, value) in &labels {
            let reserved = name.starts_with("__") || name == "le" || name == "quantile";
            if !is_name(name, false) || reserved || value.len() > LONGEST_VALUE {
                return None;
            }
            write_label(&mut written, name, value);
        }
        Some(Key { labels: written.into(), part, bound })
    }
}

/// One number.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    /// Of what.
    pub(crate) key: Key,
    /// How much.
    pub(crate) value: f64,
}

/// Samples of one name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Family {
    /// As in the text format: a counter may end with `_total`.
    pub(crate) name: String,
    /// For people.
    pub(crate) help: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// Its unit, if its name tells one.
    pub(crate) unit: &'static str,
    /// Sorted by key.
    pub(crate) samples: Vec<Sample>,
}

/// Labels of our own, in the order they are given.
#[derive(Debug, Default)]
pub(crate) struct Labels(String);

impl Labels {
    /// One more.
    pub(crate) fn with(mut self, name: &str, value: impl std::fmt::Display) -> Labels {
        write_label(&mut self.0, name, &value.to_string());
        self
    }

    /// A sample with them.
    pub(crate) fn sample(self, value: f64) -> Sample {
        Sample { key: Key { labels: self.0.into(), part: Part::Whole, bound: None }, value }
    }
}

fn write_label(into: &mut String, name: &str, value: &str) {
    if !into.is_empty() {
        into.push(',');
    }
    // Writing to a string cannot fail.
    let _ = write!(into, "{name}=\"");
    for c in value.chars() {
        match c {
            '\\' => into.push_str("\\\\"),
            '"' => into.push_str("\\\""),
            '\n' => into.push_str("\\n"),
            // Nothing that a terminal would obey.
            c if c.is_control() => into.push(char::REPLACEMENT_CHARACTER),
            c => into.push(c),
        }
    }
    into.push('"');
}

/// A help text as it may be written: one line, nothing that a terminal would obey, not escaped yet.
pub(crate) fn help(text: &str) -> String {
    let end = text.char_indices().map(|(at, _)| at).find(|at| *at >= LONGEST_HELP);
    let text = &text[..end.unwrap_or(text.len())];
    let clean = |c: char| match c {
        '\n' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.trim().chars().map(clean).collect()
}

/// Whether it can be the name of a metric (with colons) or of a label (without).
pub(crate) fn is_name(name: &str, colons: bool) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || (colons && c == ':');
    let mut chars = name.chars();
    name.len() <= LONGEST_NAME
        && chars.next().is_some_and(letter)
        && chars.all(|c| letter(c) || c.is_ascii_digit())
}

/// Reads a number of the text format.
pub(crate) fn number(text: &str) -> Option<f64> {
    match text.trim() {
        "+Inf" | "Inf" | "inf" | "+inf" | "Infinity" => Some(f64::INFINITY),
        "-Inf" | "-inf" | "-Infinity" => Some(f64::NEG_INFINITY),
        "NaN" | "nan" => Some(f64::NAN),
        other => {
            let digits = other.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
            other.parse().ok().filter(|_| digits)
        }
    }
}

/// Writes a number of the text format.
pub(crate) fn written(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf".to_owned() } else { "-Inf".to_owned() }
    } else {
        format!("{value}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn labels_are_sorted_and_cleaned() {
        let key =
            Key::read(Kind::Gauge, Part::Whole, labels(&[("b", "x\"y\\\n"), ("a", "\x1b[2J")]));
        assert_eq!(&*key.unwrap().labels, "a=\"\u{fffd}[2J\",b=\"x\\\"y\\\\\\n\"");
    }

    #[test]
    fn what_makes_no_sense_is_no_sample() {
        let gauge = |pairs: &[(&str, &str)]| Key::read(Kind::Gauge, Part::Whole, labels(pairs));
        assert!(gauge(&[("a b", "")]).is_none());
        assert!(gauge(&[("__name__", "x")]).is_none());
        assert!(gauge(&[("le", "1")]).is_none());
        assert!(gauge(&[("a", "1"), ("a", "2")]).is_none());
        assert!(gauge(&[("a", &"x".repeat(2000))]).is_none());
        assert!(gauge(&[("", "x")]).is_none());
        let bucket = |le: &str| Key::read(Kind::Histogram, Part::Bucket, labels(&[("le", le)]));
        assert_eq!(bucket("+Inf").unwrap().bound, Some(Bound(f64::INFINITY)));
        assert!(bucket("NaN").is_none() && bucket("much").is_none());
        assert!(Key::read(Kind::Histogram, Part::Bucket, Vec::new()).is_none());
        assert!(Key::read(Kind::Counter, Part::Sum, Vec::new()).is_none());
    }

    #[test]
    fn numbers_are_read_as_they_are_written() {
        for value in [0.0, 1.0, -2.5, 0.005, 1e300, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(number(&written(value)), Some(value));
        }
        assert!(number("NaN").unwrap().is_nan());
        for bad in ["", "one", "0x10", "1_000", "infinity!"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }

    #[test]
    fn help_is_one_harmless_line_of_bounded_length() {
        assert_eq!(help(" a\nb\x1b[0m "), "a b\u{fffd}[0m");
        assert!(help(&"ä".repeat(5000)).len() <= LONGEST_HELP + 2);
    }
}
