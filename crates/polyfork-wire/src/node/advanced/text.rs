//! Strings and property names as JavaScript has them: sequences of 16-bit units.
//!
//! Nearly all of them are text that Rust can hold. A lone surrogate cannot be encoded in UTF-8, so a string with
//! one is kept as units, and only such a string is.

use std::borrow::Cow;
use std::fmt;

/// A JavaScript string.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Text(Repr);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Repr {
    Utf8(String),
    /// Has a lone surrogate.
    IllFormed(Vec<u16>),
}

impl Text {
    /// The string of these units.
    #[must_use]
    pub fn from_utf16(units: Vec<u16>) -> Self {
        Self(String::from_utf16(&units).map_or(Repr::IllFormed(units), Repr::Utf8))
    }

    pub(super) fn from_latin1(bytes: &[u8]) -> Self {
        if bytes.is_ascii()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return Self::from(text);
        }
        Self::from(bytes.iter().copied().map(char::from).collect::<String>())
    }

    /// The text; `None` when it has a lone surrogate.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.0 {
            Repr::Utf8(text) => Some(text),
            Repr::IllFormed(_) => None,
        }
    }

    /// The units of a string with a lone surrogate; `None` for text.
    #[must_use]
    pub fn as_ill_formed(&self) -> Option<&[u16]> {
        match &self.0 {
            Repr::Utf8(_) => None,
            Repr::IllFormed(units) => Some(units),
        }
    }

    /// The text, with U+FFFD for every lone surrogate.
    #[must_use]
    pub fn to_str(&self) -> Cow<'_, str> {
        match &self.0 {
            Repr::Utf8(text) => Cow::Borrowed(text),
            Repr::IllFormed(units) => Cow::Owned(String::from_utf16_lossy(units)),
        }
    }

    /// As [`to_str`](Self::to_str), without a copy where none is needed.
    #[must_use]
    pub fn into_string(self) -> String {
        match self.0 {
            Repr::Utf8(text) => text,
            Repr::IllFormed(units) => String::from_utf16_lossy(&units),
        }
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Repr::Utf8(text))
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == Some(other)
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Utf8(text) => text.fmt(f),
            Repr::IllFormed(units) => write!(f, "ill-formed {:?}", String::from_utf16_lossy(units)),
        }
    }
}

/// The name of a property. V8 writes names that are array indices as numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    /// An index; a peer may send any number.
    Number(f64),
    /// Any other name.
    Text(Text),
}

impl Key {
    /// The name as text, lone surrogates replaced. Numbers are written with all digits.
    #[must_use]
    pub fn to_str(&self) -> Cow<'_, str> {
        match self {
            Self::Number(number) => Cow::Owned(number.to_string()),
            Self::Text(text) => text.to_str(),
        }
    }
}

impl PartialEq<str> for Key {
    fn eq(&self, other: &str) -> bool {
        match self {
            Self::Number(number) => {
                other.as_bytes().first().is_some_and(u8::is_ascii_digit)
                    && number.to_string() == other
            }
            Self::Text(text) => text == other,
        }
    }
}

impl From<&str> for Key {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Key {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<u32> for Key {
    fn from(index: u32) -> Self {
        Self::Number(index.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lone_surrogates_are_kept_as_units() {
        let pair = Text::from_utf16(vec![0xD83D, 0xDE00]);
        assert_eq!(pair.as_str(), Some("😀"));
        let lone = Text::from_utf16(vec![0x61, 0xD83D]);
        assert_eq!((lone.as_str(), &*lone.to_str()), (None, "a\u{fffd}"));
        assert_eq!(lone.as_ill_formed(), Some(&[0x61, 0xD83D][..]));
        assert_eq!(Text::from_latin1(b"gr\xfc\xdfe"), "grüße");
    }

    #[test]
    fn indices_are_found_by_their_digits() {
        let (seven, text) = (Key::from(7), Key::from("x"));
        assert!(seven == *"7" && seven != *"07" && text == *"x");
        assert_eq!(Key::Number(4_294_967_294.0).to_str(), "4294967294");
    }
}
