//! JSON texts as values and values as JSON texts, for internal messages.
//!
//! User messages are not converted here: they stay what they are, or go through serde.
//!
//! A text keeps all that `JSON.parse` keeps, lone surrogates included. A value loses what `JSON.stringify` would
//! lose and, for want of need, more: objects other than plain ones and arrays become `null`, and so do
//! references. Node's internal messages have none of these.

use super::text::{Key, Text};
use super::value::{Array, Object, Value};
use crate::ProtocolError;
use crate::json::{self, Fault};

/// The value of a JSON text.
pub(super) fn from_json(text: &str) -> Result<Value, ProtocolError> {
    json::members(text, usize::MAX, |_, _| {}).map_err(|fault| match fault {
        Fault::Syntax(at) => ProtocolError::not_json(text.as_bytes(), at),
        Fault::Depth => ProtocolError::TooDeep { limit: usize::MAX },
    })?;
    Ok(Parser { rest: text, open: Vec::new() }.parse())
}

/// Builds the value of a text that is known to be valid.
struct Parser<'t> {
    rest: &'t str,
    open: Vec<Open>,
}

enum Open {
    Object(Object, Key),
    Array(Vec<Value>),
}

impl Parser<'_> {
    fn parse(mut self) -> Value {
        loop {
            self.rest = json::trim(self.rest);
            let mut value = match self.rest.as_bytes().first() {
                Some(b'{') => {
                    self.rest = json::trim(&self.rest[1..]);
                    if !self.rest.starts_with('}') {
                        let key = self.key();
                        self.open.push(Open::Object(Object::default(), key));
                        continue;
                    }
                    self.rest = &self.rest[1..];
                    Value::Object(Object::default())
                }
                Some(b'[') => {
                    self.rest = json::trim(&self.rest[1..]);
                    if !self.rest.starts_with(']') {
                        self.open.push(Open::Array(Vec::new()));
                        continue;
                    }
                    self.rest = &self.rest[1..];
                    Value::Array(Array::default())
                }
                _ => self.scalar(),
            };
            // Closes what ends here.
            loop {
                let Some(open) = self.open.pop() else { return value };
                self.rest = json::trim(self.rest);
                let more = self.rest.starts_with(',');
                self.rest = self.rest.get(1..).unwrap_or_default();
                value = match open {
                    Open::Object(mut object, key) => {
                        object.properties.push((key, value));
                        if more {
                            let key = self.key();
                            self.open.push(Open::Object(object, key));
                            break;
                        }
                        Value::Object(object)
                    }
                    Open::Array(mut elements) => {
                        elements.push(value);
                        if more {
                            self.open.push(Open::Array(elements));
                            break;
                        }
                        Value::Array(Array { elements, named: None })
                    }
                };
            }
        }
    }

    /// The name of a member and its colon.
    fn key(&mut self) -> Key {
        self.rest = json::trim(self.rest);
        let key = Key::Text(self.string());
        self.rest = json::trim(self.rest).strip_prefix(':').unwrap_or_default();
        key
    }

    fn scalar(&mut self) -> Value {
        if self.rest.starts_with('"') {
            return Value::String(self.string());
        }
        let end = self.rest.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            "null" => Value::Null,
            number => number_value(number.parse().unwrap_or(f64::NAN)),
        }
    }

    fn string(&mut self) -> Text {
        let body = self.rest.strip_prefix('"').unwrap_or_default();
        let mut end = 0;
        while let Some(found) = body[end..].find(['"', '\\']) {
            end += found;
            if body[end..].starts_with('"') {
                break;
            }
            // The character after a backslash is ASCII in a valid text.
            end = (end + 2).min(body.len());
        }
        self.rest = body.get(end + 1..).unwrap_or_default();
        unescape(&body[..end])
    }
}

/// As V8 keeps it: an integer where it is one.
fn number_value(number: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "compared with what it was")]
    let int = number as i32;
    if f64::from(int).to_bits() == number.to_bits() {
        Value::Int(int)
    } else {
        Value::Double(number)
    }
}

fn unescape(raw: &str) -> Text {
    if !raw.contains('\\') {
        return Text::from(raw);
    }
    let mut units = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        units.extend(rest[..at].encode_utf16());
        let escape = rest[at + 1..].chars().next().unwrap_or('\\');
        rest = rest.get(at + 1 + escape.len_utf8()..).unwrap_or_default();
        units.push(match escape {
            'b' => 8,
            'f' => 12,
            'n' => 10,
            'r' => 13,
            't' => 9,
            'u' => {
                let unit = rest.get(..4).and_then(|hex| u16::from_str_radix(hex, 16).ok());
                rest = rest.get(4..).unwrap_or_default();
                unit.unwrap_or(0xFFFD)
            }
            other => u16::try_from(u32::from(other)).unwrap_or(0xFFFD),
        });
    }
    units.extend(rest.encode_utf16());
    Text::from_utf16(units)
}

enum Step<'v> {
    Value(&'v Value),
    Member(&'v Key, &'v Value, bool),
    Text(&'static str),
}

/// The JSON text of a value, at most so many bytes.
pub(super) fn to_json(root: &Value, limit: usize) -> Result<String, ProtocolError> {
    let mut json = String::new();
    let mut stack = vec![Step::Value(root)];
    while let Some(step) = stack.pop() {
        match step {
            Step::Text(text) => json.push_str(text),
            Step::Member(key, value, first) => {
                if !first {
                    json.push(',');
                }
                json::quote(&mut json, &key.to_str());
                json.push(':');
                stack.push(Step::Value(value));
            }
            Step::Value(value) => one(value, &mut json, &mut stack),
        }
        if json.len() > limit {
            return Err(ProtocolError::TooLong { limit });
        }
    }
    Ok(json)
}

fn one<'v>(value: &'v Value, json: &mut String, stack: &mut Vec<Step<'v>>) {
    match value {
        Value::Bool(value) => json.push_str(if *value { "true" } else { "false" }),
        Value::Int(number) => json.push_str(&number.to_string()),
        Value::Double(number) if number.is_finite() => json.push_str(&number.to_string()),
        Value::String(text) => json::quote(json, &text.to_str()),
        Value::Object(object) | Value::Native(object) => {
            json.push('{');
            stack.push(Step::Text("}"));
            let first = stack.len();
            let kept = object.properties.iter().filter(|(_, value)| *value != Value::Undefined);
            stack
                .extend(kept.enumerate().map(|(n, (key, value))| Step::Member(key, value, n == 0)));
            stack[first..].reverse();
        }
        Value::Array(array) => {
            json.push('[');
            stack.push(Step::Text("]"));
            for (index, element) in array.elements.iter().enumerate().rev() {
                stack.push(Step::Value(element));
                if index > 0 {
                    stack.push(Step::Text(","));
                }
            }
        }
        _ => json.push_str("null"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        from_json(text).expect(text)
    }

    #[test]
    fn texts_become_the_values_of_json_parse() {
        let object = Value::object([
            ("a", Value::from(vec![Value::Int(1), Value::Double(1.5), Value::Null])),
            ("", Value::object::<&str, Value>([])),
            ("c\n", Value::from("\u{1F600}\"\\")),
        ]);
        let text = "{ \"a\" : [1, 1.5 ,null],\"\":{ } , \"c\\n\":\"\\ud83d\\ude00\\\"\\\\\"}";
        assert_eq!(value(text), object);
        assert_eq!(value("[]"), Value::Array(Array::default()));
        assert_eq!(value("[[[true]],false]"), {
            let inner = Value::from(vec![Value::from(vec![Value::Bool(true)])]);
            Value::from(vec![inner, Value::Bool(false)])
        });
        assert_eq!(value("4294967296"), Value::Double(4_294_967_296.0));
        assert_eq!(value("1e999"), Value::Double(f64::INFINITY));
        assert!(matches!(value("-0"), Value::Double(zero) if zero.is_sign_negative()));
        assert!(
            matches!(value("\"a\\ud800\""), Value::String(text) if text.as_ill_formed() == Some(&[0x61, 0xD800]))
        );
        assert!(from_json("[1").is_err() && from_json("").is_err());
    }

    #[test]
    fn texts_survive_both_ways() {
        for text in
            ["null", "[1,[2,{\"a\":\"\\\"\",\"b\":[]}],{}]", "\"grüße €\"", "-1.5", "{\"a\":true}"]
        {
            assert_eq!(to_json(&value(text), 100).as_deref(), Ok(text));
        }
        assert_eq!(to_json(&value("[1,2]"), 3), Err(ProtocolError::TooLong { limit: 3 }));
    }

    #[test]
    fn deep_texts_take_no_stack() {
        let deep = "[".repeat(200_000) + &"]".repeat(200_000);
        assert_eq!(to_json(&value(&deep), usize::MAX).map(|text| text == deep), Ok(true));
    }

    #[test]
    fn undefined_members_are_left_out_and_odd_values_are_null() {
        let odd = Value::object([
            ("u", Value::Undefined),
            ("d", Value::Date(0.0)),
            ("n", Value::Double(f64::NAN)),
            ("h", Value::from(vec![Value::Hole, Value::Undefined])),
        ]);
        assert_eq!(to_json(&odd, 100).as_deref(), Ok(r#"{"d":null,"n":null,"h":[null,null]}"#));
    }
}
