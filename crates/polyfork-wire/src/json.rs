//! Validates JSON and finds the members of a top-level object, without building anything.
//!
//! A message is looked at, not converted: the reader needs to know that a line is JSON, how deep it is and
//! what a few top-level members say. Turning the text into values is left to `serde_json`, when and
//! if somebody asks for the value.
//!
//! The scanner keeps one bit per open bracket on the heap and never recurses, so that two million
//! brackets cost 250 kB and no stack. It accepts exactly what `JSON.parse` accepts (RFC 8259), which includes
//! lone surrogates in escapes, numbers that overflow a double, and duplicate names, of which the last counts.

use std::borrow::Cow;

use serde::de::DeserializeOwned;

use crate::ProtocolError;

/// What JSON takes for blank between its tokens.
const BLANKS: [char; 4] = [' ', '\t', '\n', '\r'];

/// Why a text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No JSON text goes on like this; the offset of the byte.
    Syntax(usize),
    /// More brackets are open than allowed.
    Depth,
}

/// A text that is one valid JSON value, on one line.
///
/// It is kept as it came: numbers keep their digits, escapes and duplicate names stay.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RawJson(String);

impl RawJson {
    /// Checks that `text` is one JSON value of any depth. Blanks around it go away and line breaks
    /// between its parts become blanks, because a line break would end the message on the wire.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::NotJson`], or [`ProtocolError::EmptyLine`] when there are only blanks.
    pub fn new(text: &str) -> Result<Self, ProtocolError> {
        let value = trim(text);
        if value.is_empty() {
            return Err(ProtocolError::EmptyLine);
        }
        match members(value, usize::MAX, |_, _| {}) {
            Ok(()) => Ok(Self(on_one_line(value).into_owned())),
            Err(Fault::Syntax(at)) => Err(ProtocolError::not_json(value.as_bytes(), at)),
            Err(Fault::Depth) => Err(ProtocolError::TooDeep { limit: usize::MAX }),
        }
    }

    /// Serializes a value.
    ///
    /// # Errors
    ///
    /// What the value's `Serialize` reports, for instance a map whose keys are not strings.
    pub fn from_value<T: serde::Serialize + ?Sized>(value: &T) -> Result<Self, serde_json::Error> {
        serde_json::to_string(value).map(Self)
    }

    /// Wraps a text that a scanner of this module has accepted.
    pub(crate) fn scanned(text: &str) -> Self {
        Self(on_one_line(text).into_owned())
    }

    /// As [`scanned`](Self::scanned), in the memory of `text`, which may have blanks around it.
    pub(crate) fn from_scanned(mut text: String) -> Self {
        text.truncate(text.trim_end_matches(BLANKS).len());
        text.drain(..text.len() - text.trim_start_matches(BLANKS).len());
        match on_one_line(&text) {
            Cow::Borrowed(_) => Self(text),
            Cow::Owned(text) => Self(text),
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text, without a copy.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }

    /// Builds a value of `T`.
    ///
    /// # Errors
    ///
    /// The value does not fit `T`; or one of the differences between `serde_json` and `JSON.parse`: more
    /// than 128 levels, a lone surrogate in a string, a number beyond a double, and, for a derived
    /// struct only, a duplicate name. (`serde_json::Value` takes the last of duplicates, as Node does.)
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }
}

/// Replaces line breaks by blanks. In valid JSON they stand only between tokens.
pub(crate) fn on_one_line(text: &str) -> Cow<'_, str> {
    if memchr::memchr2(b'\n', b'\r', text.as_bytes()).is_none() {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace(['\n', '\r'], " "))
}

/// Cuts the four kinds of blank that JSON knows, and only these, off both ends.
pub(crate) fn trim(text: &str) -> &str {
    text.trim_matches(BLANKS)
}

/// Validates `text` and calls `member` for every member of a top-level object, in order, with the name
/// and the value as they are written (the name without its quotes). Any other value has no members.
pub(crate) fn members<'a>(
    text: &'a str,
    max_depth: usize,
    mut member: impl FnMut(Name<'a>, &'a str),
) -> Result<(), Fault> {
    let mut scan = Scanner { bytes: text.as_bytes(), at: 0 };
    scan.blanks();
    if scan.peek() != Some(b'{') {
        scan.value(max_depth)?;
    } else {
        if max_depth == 0 {
            return Err(Fault::Depth);
        }
        scan.at += 1;
        scan.blanks();
        if scan.peek() == Some(b'}') {
            scan.at += 1;
        } else {
            loop {
                let name = scan.name()?;
                scan.blanks();
                let start = scan.at;
                scan.value(max_depth - 1)?;
                member(Name(&text[name.0..name.1]), &text[start..scan.at]);
                scan.blanks();
                match scan.take()? {
                    b',' => scan.blanks(),
                    b'}' => break,
                    _ => return Err(Fault::Syntax(scan.at - 1)),
                }
            }
        }
    }
    scan.blanks();
    if scan.at == scan.bytes.len() { Ok(()) } else { Err(Fault::Syntax(scan.at)) }
}

/// The name of a member as it is written, without quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name<'a>(&'a str);

impl<'a> Name<'a> {
    /// The name that is meant: `"\u0063md"` is `cmd`.
    pub(crate) fn text(self) -> Cow<'a, str> {
        unescape(self.0)
    }
}

/// The text of a JSON string value, or `None` when the value is of another kind.
///
/// A lone surrogate, which Rust cannot hold, becomes U+FFFD, as it does when Node encodes it.
pub(crate) fn string(value: &str) -> Option<Cow<'_, str>> {
    Some(unescape(value.strip_prefix('"')?.strip_suffix('"')?))
}

/// A number value as JavaScript sees it, or `None` when the value is of another kind or overflows.
pub(crate) fn number(value: &str) -> Option<f64> {
    if !value.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
        return None;
    }
    value.parse().ok().filter(|number: &f64| number.is_finite())
}

/// A whole number that a double holds exactly (at most 2^53 in either direction).
pub(crate) fn integer(value: &str) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let number = number(value)?;
    let whole = number.fract() == 0.0 && number.abs() <= EXACT;
    #[expect(clippy::cast_possible_truncation, reason = "checked to be whole and within 2^53")]
    whole.then_some(number as i64)
}

/// A whole number that is not negative.
pub(crate) fn unsigned(value: &str) -> Option<u64> {
    integer(value).and_then(|number| u64::try_from(number).ok())
}

/// Resolves the escapes of a valid JSON string without its quotes.
fn unescape(raw: &str) -> Cow<'_, str> {
    let Some(first) = memchr::memchr(b'\\', raw.as_bytes()) else {
        return Cow::Borrowed(raw);
    };
    let mut text = String::with_capacity(raw.len());
    text.push_str(&raw[..first]);
    let mut rest = &raw[first..];
    while let Some(escape) = rest.strip_prefix('\\') {
        let (meant, after) = one_escape(escape);
        text.push(meant);
        let next = memchr::memchr(b'\\', after.as_bytes()).unwrap_or(after.len());
        text.push_str(&after[..next]);
        rest = &after[next..];
    }
    Cow::Owned(text)
}

/// The character after a backslash and what follows it. The text was validated; should it not have been,
/// the escape reads as U+FFFD.
fn one_escape(escape: &str) -> (char, &str) {
    let mut chars = escape.chars();
    let simple = match chars.next() {
        Some('b') => '\u{8}',
        Some('f') => '\u{c}',
        Some('n') => '\n',
        Some('r') => '\r',
        Some('t') => '\t',
        Some('u') => return unicode_escape(chars.as_str()),
        Some(same @ ('"' | '\\' | '/')) => same,
        _ => char::REPLACEMENT_CHARACTER,
    };
    (simple, chars.as_str())
}

/// The character of `XXXX` or of `XXXX\uXXXX`, a surrogate pair.
fn unicode_escape(hex: &str) -> (char, &str) {
    let Some((unit, rest)) = hex_unit(hex) else {
        return (char::REPLACEMENT_CHARACTER, hex);
    };
    if let Some(single) = char::from_u32(unit) {
        return (single, rest);
    }
    let low = rest.strip_prefix("\\u").and_then(hex_unit);
    match low {
        Some((low @ 0xDC00..=0xDFFF, after)) if unit < 0xDC00 => {
            let code = 0x1_0000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
            (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), after)
        }
        _ => (char::REPLACEMENT_CHARACTER, rest),
    }
}

/// Four hexadecimal digits and what follows them.
fn hex_unit(text: &str) -> Option<(u32, &str)> {
    let digits = text.get(..4).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
    Some((u32::from_str_radix(digits, 16).ok()?, &text[4..]))
}

/// The bytes that end a run of ordinary characters in a string: quote, backslash, control characters.
const ENDS_A_RUN: [bool; 256] = {
    let mut ends = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        ends[byte] = true;
        byte += 1;
    }
    ends[b'"' as usize] = true;
    ends[b'\\' as usize] = true;
    ends
};

/// A position in a text that is being validated.
struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self) -> Result<u8, Fault> {
        let byte = self.peek().ok_or(Fault::Syntax(self.at))?;
        self.at += 1;
        Ok(byte)
    }

    fn blanks(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// One value of any kind with at most `levels` brackets open at once.
    fn value(&mut self, levels: usize) -> Result<(), Fault> {
        let mut open = Nesting::default();
        loop {
            self.blanks();
            let bracket = self.peek().ok_or(Fault::Syntax(self.at))?;
            match bracket {
                b'{' | b'[' if open.len == levels => return Err(Fault::Depth),
                b'{' | b'[' => {
                    self.at += 1;
                    self.blanks();
                    let object = bracket == b'{';
                    if self.peek() == Some(if object { b'}' } else { b']' }) {
                        self.at += 1;
                    } else {
                        open.push(object);
                        if object {
                            self.name()?;
                        }
                        continue;
                    }
                }
                _ => self.scalar()?,
            }
            if !self.closings(&mut open)? {
                return Ok(());
            }
        }
    }

    /// What may follow a value: closing brackets, then a comma. False when the outermost value is
    /// complete, true when another value must follow.
    fn closings(&mut self, open: &mut Nesting) -> Result<bool, Fault> {
        while let Some(object) = open.top() {
            self.blanks();
            match (self.take()?, object) {
                (b'}', true) | (b']', false) => open.pop(),
                (b',', false) => return Ok(true),
                (b',', true) => {
                    self.blanks();
                    self.name()?;
                    return Ok(true);
                }
                _ => return Err(Fault::Syntax(self.at - 1)),
            }
        }
        Ok(false)
    }

    /// A member's name and its colon; the range of the name between its quotes.
    fn name(&mut self) -> Result<(usize, usize), Fault> {
        if self.peek() != Some(b'"') {
            return Err(Fault::Syntax(self.at));
        }
        let start = self.at + 1;
        self.quoted()?;
        let end = self.at - 1;
        self.blanks();
        if self.take()? != b':' {
            return Err(Fault::Syntax(self.at - 1));
        }
        Ok((start, end))
    }

    fn scalar(&mut self) -> Result<(), Fault> {
        match self.peek() {
            Some(b'"') => self.quoted(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            _ => self.digits_and_so_on(),
        }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), Fault> {
        for &expected in word {
            if self.take()? != expected {
                return Err(Fault::Syntax(self.at - 1));
            }
        }
        Ok(())
    }

    /// A string from its opening to its closing quote.
    fn quoted(&mut self) -> Result<(), Fault> {
        self.at += 1;
        loop {
            let ordinary =
                self.bytes[self.at..].iter().position(|byte| ENDS_A_RUN[usize::from(*byte)]);
            self.at = ordinary.map_or(self.bytes.len(), |run| self.at + run);
            match self.take()? {
                b'"' => return Ok(()),
                b'\\' => self.escape()?,
                _ => return Err(Fault::Syntax(self.at - 1)),
            }
        }
    }

    fn escape(&mut self) -> Result<(), Fault> {
        match self.take()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(()),
            b'u' => {
                for _ in 0..4 {
                    if !self.take()?.is_ascii_hexdigit() {
                        return Err(Fault::Syntax(self.at - 1));
                    }
                }
                Ok(())
            }
            _ => Err(Fault::Syntax(self.at - 1)),
        }
    }

    /// `-? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?`
    fn digits_and_so_on(&mut self) -> Result<(), Fault> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { Err(Fault::Syntax(start)) } else { Ok(()) }
    }
}

/// The open brackets, one bit each: set for an object.
#[derive(Default)]
struct Nesting {
    /// Words of 64 brackets, the outermost in the lowest bit of the first.
    bits: Vec<u64>,
    len: usize,
}

impl Nesting {
    fn push(&mut self, object: bool) {
        let (word, bit) = (self.len / 64, self.len % 64);
        if word == self.bits.len() {
            self.bits.push(0);
        }
        self.bits[word] = self.bits[word] & !(1 << bit) | u64::from(object) << bit;
        self.len += 1;
    }

    fn pop(&mut self) {
        self.len = self.len.saturating_sub(1);
    }

    fn top(&self) -> Option<bool> {
        let last = self.len.checked_sub(1)?;
        Some(self.bits[last / 64] >> (last % 64) & 1 == 1)
    }
}

/// Appends `text` as a JSON string.
pub(crate) fn quote(json: &mut String, text: &str) {
    json.push('"');
    for character in text.chars() {
        match character {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            '\n' => json.push_str("\\n"),
            '\r' => json.push_str("\\r"),
            '\t' => json.push_str("\\t"),
            control @ '\0'..' ' => json.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => json.push(other),
        }
    }
    json.push('"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    fn valid(text: &str) -> bool {
        members(text, usize::MAX, |_, _| {}).is_ok()
    }

    fn depth_fits(text: &str, depth: usize) -> bool {
        match members(text, depth, |_, _| {}) {
            Ok(()) => true,
            Err(fault) => {
                assert_eq!(fault, Fault::Depth);
                false
            }
        }
    }

    fn listed(text: &str) -> Vec<(String, String)> {
        let mut list = Vec::new();
        members(text, usize::MAX, |name, value| list.push((name.text().into(), value.into())))
            .expect("the text is valid");
        list
    }

    #[test]
    fn what_json_parse_takes_is_taken() {
        for text in [
            "null",
            "true",
            "false",
            "0",
            "-0",
            "1e999",
            "-1.5E-7",
            "\"\"",
            "[]",
            "{}",
            " [ ] ",
            "\t{\r\n}",
            "[1,2]",
            r#"{"a":1,"a":2}"#,
            r#"{"__proto__":null}"#,
            r#""\ud800""#,
            r#""\u0000\/\b""#,
            "\"\u{7f}\u{2028}\"",
            r#"{"":{"":[{}]}}"#,
            "123456789012345678901234567890",
        ] {
            assert!(valid(text), "{text}");
        }
    }

    #[test]
    fn what_json_parse_refuses_is_refused() {
        for text in [
            "",
            " ",
            "nul",
            "nulll",
            "True",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "1e+",
            "-",
            "'a'",
            "\"",
            "\"\\x\"",
            "\"\\u12g4\"",
            "\"\t\"",
            "\"\u{1f}\"",
            "[",
            "[1,]",
            "[,]",
            "[1 2]",
            "{a:1}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{,}",
            "{1:1}",
            "[}",
            "{]",
            "[1}",
            "{\"a\":1]",
            "1 2",
            "{} {}",
            "\u{feff}1",
            "\u{a0}1",
            "NaN",
            "Infinity",
            "undefined",
            "// c\n1",
            "[1]]",
            "\"\\\"",
        ] {
            assert!(!valid(text), "{text}");
        }
    }

    #[test]
    fn fault_names_the_first_byte_that_does_not_fit() {
        for (text, at) in
            [("", 0), ("nux", 2), ("[1 2]", 3), ("{\"a\" 1}", 5), ("[1", 2), ("1x", 1)]
        {
            assert_eq!(members(text, 9, |_, _| {}), Err(Fault::Syntax(at)), "{text}");
        }
    }

    #[test]
    fn depth_counts_open_brackets() {
        assert!(depth_fits("1", 0));
        assert!(!depth_fits("[]", 0));
        assert!(depth_fits("[]", 1));
        assert!(!depth_fits("{}", 0));
        assert!(depth_fits("{}", 1));
        assert!(depth_fits("[[1],[2]]", 2));
        assert!(!depth_fits(r#"{"a":[1]}"#, 1));
        assert!(depth_fits(r#"{"a":[1],"b":{}}"#, 2));
        let deep = "[".repeat(128) + &"]".repeat(128);
        assert!(depth_fits(&deep, 128));
        assert!(!depth_fits(&deep, 127));
    }

    #[test]
    fn two_million_brackets_take_no_stack() {
        let levels = 2_000_000;
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let text = open.repeat(levels) + "1" + &close.repeat(levels);
            let small_stack = std::thread::Builder::new().stack_size(64 << 10);
            let checked = small_stack.spawn(move || {
                assert!(depth_fits(&text, levels));
                assert!(!depth_fits(&text, levels - 1));
            });
            checked.expect("a thread starts").join().expect("nothing overflows");
        }
    }

    #[test]
    fn brackets_of_both_kinds_are_told_apart_at_every_depth() {
        for depth in [1, 63, 64, 65, 128, 129, 200] {
            let kinds = (0..depth).map(|level| level % 3 == 0);
            let mut open = String::new();
            let mut close = Vec::new();
            for object in kinds {
                open.push_str(if object { "{\"k\":" } else { "[" });
                close.push(if object { '}' } else { ']' });
            }
            close.reverse();
            let good: String = open.clone() + "0" + &close.iter().collect::<String>();
            assert!(valid(&good), "{good}");
            for wrong in 0..close.len() {
                let mut bad = close.clone();
                bad[wrong] = if bad[wrong] == ']' { '}' } else { ']' };
                assert!(!valid(&(open.clone() + "0" + &bad.iter().collect::<String>())));
            }
        }
    }

    #[test]
    fn members_of_the_top_object_are_listed_in_order() {
        let text = r#" { "a" : 1 , "b":[ {"c":2} ], "\u0063md" : "x\ny", "a":{} } "#;
        let pairs = [("a", "1"), ("b", r#"[ {"c":2} ]"#), ("cmd", r#""x\ny""#), ("a", "{}")];
        assert_eq!(listed(text), pairs.map(|(name, value)| (name.into(), value.into())));
        assert!(listed("[{\"a\":1}]").is_empty());
    }

    #[test]
    fn strings_are_unescaped() {
        let value = r#""a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00z""#;
        assert_eq!(string(value).as_deref(), Some("a\"\\/\u{8}\u{c}\n\r\t\u{e9}\u{1f600}z"));
        assert_eq!(string("1"), None);
        assert_eq!(string("\"\"").as_deref(), Some(""));
    }

    #[test]
    fn lone_surrogates_become_the_replacement_character() {
        for (text, meant) in [
            (r#""\ud800""#, "\u{fffd}"),
            (r#""\udc00\ud800""#, "\u{fffd}\u{fffd}"),
            (r#""\ud800\ud83d\ude00""#, "\u{fffd}\u{1f600}"),
            (r#""\ud800\u0041""#, "\u{fffd}A"),
            (r#""\ud800x""#, "\u{fffd}x"),
        ] {
            assert_eq!(string(text).as_deref(), Some(meant), "{text}");
        }
    }

    #[test]
    fn numbers_never_wrap() {
        assert_eq!(integer("-1"), Some(-1));
        assert_eq!(integer("8e3"), Some(8000));
        assert_eq!(integer("5.0"), Some(5));
        assert_eq!(integer("9007199254740992"), Some(1 << 53));
        assert_eq!(unsigned("-0"), Some(0));
        for odd in [
            "1.5",
            "1e999",
            "-1e999",
            "1e300",
            "9007199254740994",
            "18446744073709551616",
            "\"5\"",
            "null",
            "true",
            "[1]",
            "{}",
        ] {
            assert_eq!(integer(odd), None, "{odd}");
        }
        assert_eq!(unsigned("-1"), None);
    }

    #[test]
    fn raw_json_is_one_line_without_blanks_around_it() {
        assert_eq!(
            RawJson::new(" {\n\"a\":\r\n1} \n").map(RawJson::into_string).as_deref(),
            Ok("{ \"a\":  1}")
        );
        assert_eq!(RawJson::new(" \n"), Err(ProtocolError::EmptyLine));
        assert!(matches!(RawJson::new("{\"a\":1}}"), Err(ProtocolError::NotJson { at: 7, .. })));
        let digits = RawJson::new("123456789012345678901234567890").expect("it is JSON");
        assert_eq!(digits.as_str(), "123456789012345678901234567890");
    }

    /// Valid JSON of every kind, written with blanks and escapes in odd places.
    fn any_json() -> impl Strategy<Value = String> {
        let blank = "[ \t\r]{0,2}";
        let leaf = prop_oneof![
            Just("null".to_owned()),
            Just("true".to_owned()),
            "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,3})?",
            "\"([ -!#-\\[\\]-~é€😀]|\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-fA-F]{4}){0,12}\"",
        ];
        leaf.prop_recursive(6, 64, 6, move |inner| {
            let name = "\"([a-z]|\\\\u00[46][0-9a-f]){0,4}\"";
            let member = (name, blank, inner.clone()).prop_map(|(n, b, v)| format!("{n}{b}:{v}"));
            prop_oneof![
                (blank, prop::collection::vec(inner, 0..6), blank)
                    .prop_map(|(a, v, b)| format!("{a}[{}]{b}", v.join(","))),
                (blank, prop::collection::vec(member, 0..6), blank)
                    .prop_map(|(a, v, b)| format!("{{{a}{}}}{b}", v.join(","))),
            ]
        })
    }

    proptest! {
        #[test]
        fn verdict_equals_serde_json_on_valid_text(text in any_json()) {
            prop_assert!(serde_json::from_str::<&RawValue>(&text).is_ok());
            prop_assert!(valid(&text));
        }

        #[test]
        fn verdict_equals_serde_json_on_damaged_text(
            text in any_json(), at in any::<prop::sample::Index>(), damage in "[\\[\\]{}\",:\\\\ue0-9.x\n-]{0,3}", cut in 0..3_usize
        ) {
            let mut characters: Vec<char> = text.chars().collect();
            let at = at.index(characters.len());
            characters.splice(at..(at + cut).min(characters.len()), damage.chars());
            let damaged: String = characters.into_iter().collect();
            let theirs = serde_json::from_str::<&RawValue>(&damaged).is_ok();
            prop_assert_eq!(valid(&damaged), theirs, "{}", damaged);
        }

        #[test]
        fn quoting_and_unquoting_give_the_same_text(text in any::<String>()) {
            let mut quoted = String::new();
            quote(&mut quoted, &text);
            prop_assert!(valid(&quoted) && !quoted.contains('\n'));
            prop_assert_eq!(string(&quoted), Some(text.into()));
        }

        #[test]
        fn strings_read_as_serde_json_reads_them(text in "\"([ -!#-\\[\\]-~é€😀]|\\\\[\"\\\\/bfnrt]|\\\\u[0-9a-fA-F]{4}){0,12}\"") {
            // serde_json refuses lone surrogates, which we replace.
            if let Ok(theirs) = serde_json::from_str::<String>(&text) {
                prop_assert_eq!(string(&text), Some(theirs.into()));
            }
        }
    }
}
