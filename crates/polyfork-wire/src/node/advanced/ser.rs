//! Rust values as messages.
//!
//! Types of serde become what `serde_json` makes of them, with these differences: whole numbers that a double
//! cannot hold are `bigint`, bytes are a `Buffer`, a map whose keys are not all strings is a `Map`, and numbers
//! that are not finite stay what they are.
//!
//! The surprising rule: a [`Value`] is written exactly as it is, wherever it occurs in what is serialized. For that it
//! announces itself under a name that only this serializer knows, which then lends it its writer by way of
//! a thread-local slot. To every other serializer it is data like JSON.

use std::cell::RefCell;

use serde::Serialize;
use serde::ser::{self, SerializeSeq};

use super::bigint::BigInt;
use super::error::ConvertError;
use super::refs::{Follow, MOST_LEVELS};
use super::tag;
use super::value::{Boxed, Value};
use super::write::{Writer, frame_of, payload_of};

/// The name under which a [`Value`] announces itself.
pub(super) const WHOLE_VALUE: &str = "$polyfork::node::advanced::Value";

/// Doubles hold every whole number up to this.
const EXACT: u64 = 1 << 53;

thread_local! {
    /// The writer, while a [`Value`] is asked to write itself.
    static LENT: RefCell<Option<Writer>> = const { RefCell::new(None) };
}

/// A whole frame with a message. A [`Value`] is sent as it is.
///
/// # Errors
///
/// What the value's `Serialize` reports, or that it does not fit a frame.
pub fn to_frame<T: Serialize + ?Sized>(message: &T) -> Result<Vec<u8>, ConvertError> {
    frame_of(|writer| serialize(message, writer))
}

/// As [`to_frame`], without the length in front.
///
/// # Errors
///
/// What the value's `Serialize` reports.
pub fn to_payload<T: Serialize + ?Sized>(message: &T) -> Result<Vec<u8>, ConvertError> {
    payload_of(0, |writer| serialize(message, writer))
}

pub(super) fn serialize<T: Serialize + ?Sized>(
    message: &T,
    writer: &mut Writer,
) -> Result<(), ConvertError> {
    message.serialize(Serializer { writer })
}

struct Serializer<'w> {
    writer: &'w mut Writer,
}

type Done = Result<(), ConvertError>;

impl<'w> Serializer<'w> {
    fn unsigned(self, number: u128) -> Done {
        if number <= EXACT.into() {
            #[expect(clippy::cast_precision_loss, reason = "checked to be exact")]
            self.writer.number(number as f64);
        } else {
            self.writer.any_bigint(&BigInt::from(number));
        }
        Ok(())
    }

    fn signed(self, number: i128) -> Done {
        if number.unsigned_abs() <= EXACT.into() {
            #[expect(clippy::cast_precision_loss, reason = "checked to be exact")]
            self.writer.number(number as f64);
        } else {
            self.writer.any_bigint(&BigInt::from(number));
        }
        Ok(())
    }

    /// An object with one member, whose value comes next.
    fn variant(self, name: &str) -> &'w mut Writer {
        self.writer.begin(tag::OBJECT);
        self.writer.str(name);
        self.writer
    }

    fn seq(self, in_variant: bool) -> Seq<'w> {
        let at = self.writer.begin_array();
        Seq { writer: self.writer, at, length: 0, in_variant }
    }

    fn fields(self, in_variant: bool) -> Fields<'w> {
        let at = self.writer.begin(tag::OBJECT);
        Fields { writer: self.writer, at, count: 0, all_text: true, in_variant }
    }
}

impl<'w> ser::Serializer for Serializer<'w> {
    type Ok = ();
    type Error = ConvertError;
    type SerializeSeq = Seq<'w>;
    type SerializeTuple = Seq<'w>;
    type SerializeTupleStruct = Seq<'w>;
    type SerializeTupleVariant = Seq<'w>;
    type SerializeMap = Fields<'w>;
    type SerializeStruct = Fields<'w>;
    type SerializeStructVariant = Fields<'w>;

    fn serialize_bool(self, value: bool) -> Done {
        self.writer.bool(value);
        Ok(())
    }

    fn serialize_i8(self, number: i8) -> Done {
        self.serialize_i32(number.into())
    }

    fn serialize_i16(self, number: i16) -> Done {
        self.serialize_i32(number.into())
    }

    fn serialize_i32(self, number: i32) -> Done {
        self.writer.int(number);
        Ok(())
    }

    fn serialize_i64(self, number: i64) -> Done {
        self.signed(number.into())
    }

    fn serialize_i128(self, number: i128) -> Done {
        self.signed(number)
    }

    fn serialize_u8(self, number: u8) -> Done {
        self.serialize_i32(number.into())
    }

    fn serialize_u16(self, number: u16) -> Done {
        self.serialize_i32(number.into())
    }

    fn serialize_u32(self, number: u32) -> Done {
        self.unsigned(number.into())
    }

    fn serialize_u64(self, number: u64) -> Done {
        self.unsigned(number.into())
    }

    fn serialize_u128(self, number: u128) -> Done {
        self.unsigned(number)
    }

    fn serialize_f32(self, number: f32) -> Done {
        self.serialize_f64(number.into())
    }

    fn serialize_f64(self, number: f64) -> Done {
        self.writer.number(number);
        Ok(())
    }

    fn serialize_char(self, character: char) -> Done {
        self.serialize_str(character.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, text: &str) -> Done {
        self.writer.str(text);
        Ok(())
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Done {
        self.writer.node_buffer(bytes);
        Ok(())
    }

    fn serialize_none(self) -> Done {
        self.serialize_unit()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Done {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Done {
        self.writer.null();
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Done {
        self.serialize_unit()
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Done {
        self.serialize_str(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Done {
        if name != WHOLE_VALUE {
            return value.serialize(self);
        }
        let nothing = |_| ConvertError::new("message is serialized within itself");
        let lent = std::mem::take(self.writer);
        LENT.with(|slot| slot.try_borrow_mut().map(|mut slot| *slot = Some(lent)))
            .map_err(nothing)?;
        let outcome = value.serialize(Serializer { writer: &mut Writer::default() });
        let back = LENT.with(|slot| slot.try_borrow_mut().map(|mut slot| slot.take()));
        *self.writer = back.map_err(nothing)?.unwrap_or_default();
        outcome
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Done {
        let writer = self.variant(variant);
        serialize(value, writer)?;
        writer.end(tag::OBJECT_END, 1, None);
        Ok(())
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Seq<'w>, ConvertError> {
        Ok(self.seq(false))
    }

    fn serialize_tuple(self, _: usize) -> Result<Seq<'w>, ConvertError> {
        Ok(self.seq(false))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Seq<'w>, ConvertError> {
        Ok(self.seq(false))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Seq<'w>, ConvertError> {
        Ok(Serializer { writer: self.variant(variant) }.seq(true))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Fields<'w>, ConvertError> {
        Ok(self.fields(false))
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Fields<'w>, ConvertError> {
        Ok(self.fields(false))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Fields<'w>, ConvertError> {
        Ok(Serializer { writer: self.variant(variant) }.fields(true))
    }
}

struct Seq<'w> {
    writer: &'w mut Writer,
    at: usize,
    length: u32,
    in_variant: bool,
}

impl Seq<'_> {
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        self.length = more(self.length)?;
        serialize(value, self.writer)
    }

    fn finish(self) -> Done {
        self.writer.end_array(self.at, self.length);
        if self.in_variant {
            self.writer.end(tag::OBJECT_END, 1, None);
        }
        Ok(())
    }
}

fn more(count: u32) -> Result<u32, ConvertError> {
    count.checked_add(1).ok_or_else(|| ConvertError::new("message has too many elements"))
}

impl ser::SerializeSeq for Seq<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        self.element(value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

impl ser::SerializeTuple for Seq<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        self.element(value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

impl ser::SerializeTupleStruct for Seq<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        self.element(value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

impl ser::SerializeTupleVariant for Seq<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        self.element(value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

/// An object, or a `Map` once a key is no string.
struct Fields<'w> {
    writer: &'w mut Writer,
    at: usize,
    count: u32,
    all_text: bool,
    in_variant: bool,
}

impl Fields<'_> {
    fn field<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Done {
        self.count = more(self.count)?;
        self.writer.str(name);
        serialize(value, self.writer)
    }

    fn finish(self) -> Done {
        if self.all_text {
            self.writer.end(tag::OBJECT_END, self.count, None);
        } else {
            self.writer.retag(self.at, tag::MAP);
            let count = self.count.checked_mul(2);
            let too_many = || ConvertError::new("message has too many elements");
            self.writer.end(tag::MAP_END, count.ok_or_else(too_many)?, None);
        }
        if self.in_variant {
            self.writer.end(tag::OBJECT_END, 1, None);
        }
        Ok(())
    }
}

impl ser::SerializeMap for Fields<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Done {
        self.count = more(self.count)?;
        let from = self.writer.position();
        serialize(key, self.writer)?;
        self.all_text &= self.writer.is_text_at(from);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Done {
        serialize(value, self.writer)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

impl ser::SerializeStruct for Fields<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Done {
        self.field(name, value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

impl ser::SerializeStructVariant for Fields<'_> {
    type Ok = ();
    type Error = ConvertError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Done {
        self.field(name, value)
    }

    fn end(self) -> Done {
        self.finish()
    }
}

/// Exact for [`to_frame`]; for other formats data like JSON: `undefined` members are left out, dates are
/// milliseconds, maps are maps and sets sequences, bytes are bytes, a `bigint` beyond 64 bits and a regular
/// expression are text, an error is an object, and references are followed.
///
/// # Errors
///
/// For other formats: cycles, and more than 128 levels.
impl Serialize for Value {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_newtype_struct(WHOLE_VALUE, &Whole(self))
    }
}

struct Whole<'v>(&'v Value);

impl Serialize for Whole<'_> {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let written = LENT.with(|slot| match slot.try_borrow_mut().as_deref_mut() {
            Ok(Some(writer)) => {
                writer.value(self.0);
                true
            }
            _ => false,
        });
        if written {
            return serializer.serialize_unit();
        }
        let follow = Follow::new(self.0);
        Part { value: self.0, follow: &follow, levels: MOST_LEVELS, copied: false }
            .serialize(serializer)
    }
}

/// A part of a value on its way to another format.
#[derive(Clone, Copy)]
struct Part<'v> {
    value: &'v Value,
    follow: &'v Follow<'v>,
    levels: usize,
    /// It is behind a reference.
    copied: bool,
}

impl<'v> Part<'v> {
    fn of(self, value: &'v Value) -> Self {
        Self { value, levels: self.levels.saturating_sub(1), ..self }
    }

    fn sequence<S: ser::Serializer>(
        self,
        serializer: S,
        elements: &'v [Value],
    ) -> Result<S::Ok, S::Error> {
        let mut sequence = serializer.serialize_seq(Some(elements.len()))?;
        for element in elements {
            sequence.serialize_element(&self.of(element))?;
        }
        sequence.end()
    }

    fn properties<S: ser::Serializer>(self, serializer: S) -> Result<S::Ok, S::Error> {
        let properties = self.value.properties().iter();
        let kept = properties.filter(|(_, value)| !matches!(value, Value::Undefined));
        serializer.collect_map(kept.map(|(key, value)| (key.to_str(), self.of(value))))
    }

    fn error<S: ser::Serializer>(self, serializer: S) -> Result<S::Ok, S::Error> {
        use ser::SerializeMap;
        let Value::Error(error) = self.value else { return serializer.serialize_unit() };
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", error.kind.as_str())?;
        for (name, text) in [("message", &error.message), ("stack", &error.stack)] {
            if let Some(text) = text {
                map.serialize_entry(name, &text.to_str())?;
            }
        }
        if let Some(cause) = &error.cause {
            map.serialize_entry("cause", &self.of(cause))?;
        }
        map.end()
    }
}

impl Serialize for Part<'_> {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use ser::Error;
        if self.levels == 0 {
            return Err(S::Error::custom("value is nested too deep, or contains itself"));
        }
        if self.copied {
            self.follow.copy_value(self.value).map_err(S::Error::custom)?;
        }
        let bigint = |serializer: S, number: &BigInt| match number.to_i128().map(i64::try_from) {
            Some(Ok(number)) => serializer.serialize_i64(number),
            _ => match number.to_u128().map(u64::try_from) {
                Some(Ok(number)) => serializer.serialize_u64(number),
                _ => serializer.collect_str(number),
            },
        };
        match self.value {
            Value::Undefined | Value::Null | Value::Hole => serializer.serialize_unit(),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::Int(number) => serializer.serialize_i32(*number),
            Value::Double(number) | Value::Date(number) => serializer.serialize_f64(*number),
            Value::BigInt(number) => bigint(serializer, number),
            Value::String(text) => serializer.serialize_str(&text.to_str()),
            Value::Object(_) | Value::Native(_) | Value::SparseArray(_) => {
                self.properties(serializer)
            }
            Value::Array(array) => self.sequence(serializer, &array.elements),
            Value::Map(map) => serializer
                .collect_map(map.entries.iter().map(|(key, value)| (self.of(key), self.of(value)))),
            Value::Set(set) => self.sequence(serializer, &set.values),
            Value::RegExp(regexp) => {
                let pattern = regexp.pattern.to_str();
                serializer.collect_str(&format_args!("/{pattern}/{}", regexp.letters()))
            }
            Value::Boxed(boxed) => match &**boxed {
                Boxed::Bool(value) => serializer.serialize_bool(*value),
                Boxed::Number(number) => serializer.serialize_f64(*number),
                Boxed::BigInt(number) => bigint(serializer, number),
                Boxed::String(text) => serializer.serialize_str(&text.to_str()),
            },
            Value::Error(_) => self.error(serializer),
            Value::ArrayBuffer(_) | Value::Resizable(_) | Value::Bytes(_) => {
                serializer.serialize_bytes(self.value.as_bytes().unwrap_or_default())
            }
            Value::View(view) => {
                let buffer = self.follow.objects().resolve(&view.buffer);
                serializer.serialize_bytes(view.bytes_in(buffer).unwrap_or_default())
            }
            Value::Reference(id) => {
                let value = self.follow.reference(*id).map_err(S::Error::custom)?;
                Part { copied: true, ..self.of(value) }.serialize(serializer)
            }
        }
    }
}
