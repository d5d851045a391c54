//! Messages as Rust values.
//!
//! The counterpart of [`ser`](super::ser): what that makes of a type is read back into it. Beyond that it takes what
//! JavaScript programs send: `undefined` members count as missing, typed arrays are sequences of their elements
//! and bytes where bytes are asked for, dates are milliseconds, a boxed primitive is the primitive, an error
//! is a map with `name`, `message`, `stack` and `cause`, and a regular expression is text.
//!
//! The surprising rule: references are followed, so a shared object is read as often as it is mentioned. What
//! is copied that way is bounded, and a cycle is an error, except in a [`Value`], which keeps references.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, EnumAccess, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

use super::bigint::BigInt;
use super::error::ConvertError;
use super::refs::{Follow, MOST_LEVELS, cloned, detach};
use super::ser::WHOLE_VALUE;
use super::text::Key;
use super::value::{Boxed, BytesKind, ErrorValue, Map, Object, Value};

/// Doubles hold every whole number up to this.
const EXACT: f64 = 9_007_199_254_740_992.0;

thread_local! {
    /// What a [`Value`] is to become, while it is asked to read itself.
    static HANDED: RefCell<Option<Value>> = const { RefCell::new(None) };
}

/// Builds a value of `T` from a message. Asked for a [`Value`], it gives the message as it is.
///
/// # Errors
///
/// The message does not fit `T`; it is nested in more than 128 levels or contains itself; or it
/// exceeds 256 MiB when every object is copied wherever it is mentioned.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, ConvertError> {
    let follow = Follow::new(&value);
    T::deserialize(Reader { value: &value, follow: &follow, levels: MOST_LEVELS, copied: false })
}

#[derive(Clone, Copy)]
struct Reader<'v> {
    value: &'v Value,
    follow: &'v Follow<'v>,
    levels: usize,
    /// It is behind a reference.
    copied: bool,
}

type Result_<T> = Result<T, ConvertError>;

impl<'v> Reader<'v> {
    /// The reader of something in this value.
    fn of(self, value: &'v Value) -> Result_<Self> {
        let inside = "message is nested too deep, or contains itself";
        let levels = self.levels.checked_sub(1).ok_or_else(|| ConvertError::new(inside))?;
        Ok(Self { value, levels, ..self })
    }

    /// Follows a reference.
    fn resolved(mut self) -> Result_<Self> {
        if let Value::Reference(id) = self.value {
            self = Self { copied: true, ..self.of(self.follow.reference(*id)?)? };
        }
        if self.copied {
            self.follow.copy_value(self.value)?;
        }
        Ok(self)
    }

    fn bytes(self) -> Option<&'v [u8]> {
        match self.value {
            Value::View(view) => view.bytes_in(self.follow.objects().resolve(&view.buffer)),
            value => value.as_bytes(),
        }
    }

    /// The kind and bytes of anything that has bytes.
    fn elements(self) -> Option<(BytesKind, &'v [u8])> {
        let kind = match self.value {
            Value::Bytes(bytes) => bytes.kind(),
            Value::View(view) => view.kind(),
            _ => BytesKind::Uint8Array,
        };
        Some((kind, self.bytes()?))
    }

    fn members(self) -> Option<Members<'v>> {
        let properties = match self.value {
            Value::Object(Object { properties }) | Value::Native(Object { properties }) => {
                properties
            }
            _ => return None,
        };
        Some(Members { reader: self, rest: properties.iter(), value: None })
    }

    fn any_map<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        match self.value {
            Value::Map(Map { entries }) => {
                visitor.visit_map(Entries { reader: self, rest: entries.iter(), value: None })
            }
            Value::Error(error) => visitor.visit_map(ErrorParts { reader: self, error, next: 0 }),
            _ => match self.members() {
                Some(members) => visitor.visit_map(members),
                None => Err(ConvertError::new("an object was expected")),
            },
        }
    }

    fn any_seq<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        match self.value {
            Value::Array(array) => {
                visitor.visit_seq(Elements { reader: self, rest: array.elements.iter() })
            }
            Value::Set(set) => {
                visitor.visit_seq(Elements { reader: self, rest: set.values.iter() })
            }
            Value::SparseArray(array) => {
                self.follow.copy((array.length as usize).saturating_mul(size_of::<Value>()))?;
                let mut elements = vec![&Value::Hole; array.length as usize];
                for (key, value) in &array.properties {
                    if let Key::Number(index) = key
                        && index.fract() == 0.0
                        && (0.0..f64::from(array.length)).contains(index)
                    {
                        #[expect(
                            clippy::cast_possible_truncation,
                            clippy::cast_sign_loss,
                            reason = "checked to be an index"
                        )]
                        let index = *index as usize;
                        elements[index] = value;
                    }
                }
                visitor.visit_seq(Elements { reader: self, rest: elements.into_iter() })
            }
            _ => match self.elements() {
                Some((kind, bytes)) => visitor
                    .visit_seq(Numbers { kind, rest: bytes.chunks_exact(kind.element_bytes()) }),
                None => Err(ConvertError::new("an array was expected")),
            },
        }
    }

    /// Hands a copy of the value itself to the `Deserialize` of [`Value`].
    fn whole<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        let reader = if self.levels == MOST_LEVELS { self } else { self.resolved()? };
        let deep = || ConvertError::new("message is nested too deep to be cloned");
        let mut value = cloned(reader.value).ok_or_else(deep)?;
        if reader.levels < MOST_LEVELS && may_refer(reader.value) {
            let start = reader.follow.objects().first_id_of(reader.value).unwrap_or(0);
            if !detach(&mut value, start) {
                return Err(ConvertError::new(
                    "a part of the message shares objects with the rest",
                ));
            }
        }
        HANDED.with(|slot| slot.replace(Some(value)));
        let outcome = visitor.visit_unit();
        HANDED.with(RefCell::take);
        outcome
    }
}

fn may_refer(value: &Value) -> bool {
    let mut stack = vec![value];
    while let Some(value) = stack.pop() {
        if matches!(value, Value::Reference(_)) {
            return true;
        }
        value.children(&mut stack);
    }
    false
}

fn visit_number<'v, V: Visitor<'v>>(visitor: V, number: f64) -> Result_<V::Value> {
    let whole = number.fract() == 0.0 && number.abs() <= EXACT;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be whole and exact"
    )]
    if !whole || (number == 0.0 && number.is_sign_negative()) {
        visitor.visit_f64(number)
    } else if number < 0.0 {
        visitor.visit_i64(number as i64)
    } else {
        visitor.visit_u64(number as u64)
    }
}

fn visit_bigint<'v, V: Visitor<'v>>(visitor: V, number: &BigInt) -> Result_<V::Value> {
    if let Some(Ok(number)) = number.to_u128().map(u64::try_from) {
        return visitor.visit_u64(number);
    }
    match (number.to_i128(), number.to_u128()) {
        (Some(number), _) => match i64::try_from(number) {
            Ok(number) => visitor.visit_i64(number),
            Err(_) => visitor.visit_i128(number),
        },
        (None, Some(number)) => visitor.visit_u128(number),
        (None, None) => visitor.visit_string(number.to_string()),
    }
}

impl<'v> de::Deserializer<'v> for Reader<'v> {
    type Error = ConvertError;

    fn deserialize_any<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        let reader = self.resolved()?;
        match reader.value {
            Value::Undefined | Value::Null | Value::Hole => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(number) => visit_number(visitor, (*number).into()),
            Value::Double(number) => visit_number(visitor, *number),
            Value::Date(time) => visitor.visit_f64(*time),
            Value::BigInt(number) => visit_bigint(visitor, number),
            Value::String(text) => visit_text(visitor, text.to_str()),
            Value::RegExp(regexp) => {
                let pattern = regexp.pattern.to_str();
                visitor.visit_string(format!("/{pattern}/{}", regexp.letters()))
            }
            Value::Boxed(boxed) => match &**boxed {
                Boxed::Bool(value) => visitor.visit_bool(*value),
                Boxed::Number(number) => visit_number(visitor, *number),
                Boxed::BigInt(number) => visit_bigint(visitor, number),
                Boxed::String(text) => visit_text(visitor, text.to_str()),
            },
            Value::Object(_) | Value::Native(_) | Value::Map(_) | Value::Error(_) => {
                reader.any_map(visitor)
            }
            _ => reader.any_seq(visitor),
        }
    }

    fn deserialize_f32<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        match self.resolved()?.value {
            Value::Int(number) => visitor.visit_f64((*number).into()),
            Value::Double(number) => visitor.visit_f64(*number),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_bytes<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        let reader = self.resolved()?;
        match reader.bytes() {
            Some(bytes) => visitor.visit_borrowed_bytes(bytes),
            None => reader.deserialize_any(visitor),
        }
    }

    fn deserialize_byte_buf<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        if self.value.is_nullish() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_unit_struct<V: Visitor<'v>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result_<V::Value> {
        self.deserialize_any(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'v>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result_<V::Value> {
        if name == WHOLE_VALUE { self.whole(visitor) } else { visitor.visit_newtype_struct(self) }
    }

    fn deserialize_enum<V: Visitor<'v>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result_<V::Value> {
        let reader = self.resolved()?;
        let (name, content) = match reader.value {
            Value::String(text) => (text.to_str(), None),
            value => {
                let mut kept =
                    value.properties().iter().filter(|(_, value)| *value != Value::Undefined);
                let (Some((key, content)), None) = (kept.next(), kept.next()) else {
                    return Err(ConvertError::new(
                        "a string or an object with one member was expected",
                    ));
                };
                (key.to_str(), Some(reader.of(content)?))
            }
        };
        visitor.visit_enum(Variant { name, content })
    }

    fn deserialize_ignored_any<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'v>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 char str string unit seq tuple tuple_struct
        map struct identifier
    }
}

fn visit_text<'v, V: Visitor<'v>>(visitor: V, text: Cow<'v, str>) -> Result_<V::Value> {
    match text {
        Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
        Cow::Owned(text) => visitor.visit_string(text),
    }
}

struct Elements<'v, I> {
    reader: Reader<'v>,
    rest: I,
}

impl<'v, I: Iterator<Item = &'v Value>> SeqAccess<'v> for Elements<'v, I> {
    type Error = ConvertError;

    fn next_element_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result_<Option<T::Value>> {
        self.rest.next().map(|value| seed.deserialize(self.reader.of(value)?)).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        self.rest.size_hint().1
    }
}

/// The elements of a typed array.
struct Numbers<'v> {
    kind: BytesKind,
    rest: std::slice::ChunksExact<'v, u8>,
}

impl<'v> SeqAccess<'v> for Numbers<'v> {
    type Error = ConvertError;

    fn next_element_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result_<Option<T::Value>> {
        self.rest.next().map(|bytes| seed.deserialize(Number(self.kind, bytes))).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}

/// One element of a typed array.
struct Number<'v>(BytesKind, &'v [u8]);

impl<'v> de::Deserializer<'v> for Number<'v> {
    type Error = ConvertError;

    fn deserialize_any<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        let mut bytes = [0; 8];
        bytes[..self.1.len()].copy_from_slice(self.1);
        let all = u64::from_le_bytes(bytes);
        let [b0, b1, b2, b3, ..] = bytes;
        match self.0 {
            BytesKind::Int8Array => visitor.visit_i8(b0.cast_signed()),
            BytesKind::Int16Array => visitor.visit_i16(i16::from_le_bytes([b0, b1])),
            BytesKind::Int32Array => visitor.visit_i32(i32::from_le_bytes([b0, b1, b2, b3])),
            BytesKind::BigInt64Array => visitor.visit_i64(all.cast_signed()),
            BytesKind::Float16Array => visitor.visit_f64(half(u16::from_le_bytes([b0, b1]))),
            BytesKind::Float32Array => visitor.visit_f32(f32::from_le_bytes([b0, b1, b2, b3])),
            BytesKind::Float64Array => visitor.visit_f64(f64::from_bits(all)),
            BytesKind::Uint8Array
            | BytesKind::Uint8ClampedArray
            | BytesKind::DataView
            | BytesKind::Buffer
            | BytesKind::Uint16Array
            | BytesKind::Uint32Array
            | BytesKind::BigUint64Array => visitor.visit_u64(all),
        }
    }

    fn deserialize_option<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'v>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result_<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'v>>
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// A number of 16 bits as IEEE 754 has it.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let fraction = f64::from(bits & 0x3FF);
    let magnitude = match i32::from(bits >> 10 & 0x1F) {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        exponent => (1.0 + fraction / 1024.0) * 2_f64.powi(exponent - 15),
    };
    sign * magnitude
}

/// The members of an object without those that are `undefined`.
struct Members<'v> {
    reader: Reader<'v>,
    rest: std::slice::Iter<'v, (Key, Value)>,
    value: Option<&'v Value>,
}

impl<'v> MapAccess<'v> for Members<'v> {
    type Error = ConvertError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result_<Option<K::Value>> {
        let next = self.rest.find(|(_, value)| !matches!(value, Value::Undefined));
        let Some((key, value)) = next else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(Name(key.to_str())).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result_<T::Value> {
        let value = self.value.take().ok_or_else(|| ConvertError::new("a value without a name"))?;
        seed.deserialize(self.reader.of(value)?)
    }
}

/// The name of a property, which may be asked for as a number or a truth value.
struct Name<'v>(Cow<'v, str>);

macro_rules! parsed_names {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
            match self.0.parse::<$type>() {
                Ok(value) => visitor.$visit(value),
                Err(_) => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'v> de::Deserializer<'v> for Name<'v> {
    type Error = ConvertError;

    fn deserialize_any<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        visit_text(visitor, self.0)
    }

    parsed_names! {
        deserialize_bool visit_bool bool,
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64, deserialize_i128 visit_i128 i128,
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_u128 visit_u128 u128,
        deserialize_f32 visit_f32 f32, deserialize_f64 visit_f64 f64
    }

    fn deserialize_option<V: Visitor<'v>>(self, visitor: V) -> Result_<V::Value> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'v>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result_<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'v>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result_<V::Value> {
        visitor.visit_enum(Variant { name: self.0, content: None })
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'v>>
        char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier
        ignored_any
    }
}

struct Entries<'v> {
    reader: Reader<'v>,
    rest: std::slice::Iter<'v, (Value, Value)>,
    value: Option<&'v Value>,
}

impl<'v> MapAccess<'v> for Entries<'v> {
    type Error = ConvertError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result_<Option<K::Value>> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(self.reader.of(key)?).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result_<T::Value> {
        let value = self.value.take().ok_or_else(|| ConvertError::new("a value without a key"))?;
        seed.deserialize(self.reader.of(value)?)
    }
}

struct ErrorParts<'v> {
    reader: Reader<'v>,
    error: &'v ErrorValue,
    /// 0 name, 1 message, 2 stack, 3 cause; one more when its name was given.
    next: u8,
}

impl<'v> MapAccess<'v> for ErrorParts<'v> {
    type Error = ConvertError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result_<Option<K::Value>> {
        let present = [
            ("name", true),
            ("message", self.error.message.is_some()),
            ("stack", self.error.stack.is_some()),
            ("cause", self.error.cause.is_some()),
        ];
        for (name, is_present) in present.into_iter().skip(self.next.into()) {
            self.next += 1;
            if is_present {
                return seed.deserialize(Name(name.into())).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result_<T::Value> {
        let text = match self.next {
            1 => Some(Cow::Borrowed(self.error.kind.as_str())),
            2 => self.error.message.as_ref().map(|text| text.to_str()),
            3 => self.error.stack.as_ref().map(|text| text.to_str()),
            _ => None,
        };
        match (text, &self.error.cause) {
            (Some(text), _) => seed.deserialize(Name(text)),
            (None, Some(cause)) => seed.deserialize(self.reader.of(cause)?),
            (None, None) => Err(ConvertError::new("a value without a name")),
        }
    }
}

struct Variant<'v> {
    name: Cow<'v, str>,
    content: Option<Reader<'v>>,
}

impl<'v> EnumAccess<'v> for Variant<'v> {
    type Error = ConvertError;
    type Variant = Content<'v>;

    fn variant_seed<T: DeserializeSeed<'v>>(self, seed: T) -> Result_<(T::Value, Content<'v>)> {
        Ok((seed.deserialize(Name(self.name))?, Content(self.content)))
    }
}

struct Content<'v>(Option<Reader<'v>>);

impl<'v> Content<'v> {
    fn expected(self) -> Result_<Reader<'v>> {
        self.0.ok_or_else(|| ConvertError::new("an object with one member was expected"))
    }
}

impl<'v> VariantAccess<'v> for Content<'v> {
    type Error = ConvertError;

    fn unit_variant(self) -> Result_<()> {
        match self.0 {
            None => Ok(()),
            Some(content) => <()>::deserialize(content),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'v>>(self, seed: T) -> Result_<T::Value> {
        seed.deserialize(self.expected()?)
    }

    fn tuple_variant<V: Visitor<'v>>(self, _: usize, visitor: V) -> Result_<V::Value> {
        de::Deserializer::deserialize_seq(self.expected()?, visitor)
    }

    fn struct_variant<V: Visitor<'v>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result_<V::Value> {
        de::Deserializer::deserialize_map(self.expected()?, visitor)
    }
}

/// Exact from a message of this encoding; from other formats what [`Serialize`](serde::Serialize) would make equal:
/// whole numbers beyond 2^53 become a `bigint`, bytes a `Buffer`, maps with keys that are not all text
/// a `Map`.
impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(WHOLE_VALUE, WholeVisitor)
    }
}

struct WholeVisitor;

#[expect(clippy::cast_precision_loss, reason = "checked to be exact")]
impl<'de> Visitor<'de> for WholeVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(HANDED.with(RefCell::take).unwrap_or(Value::Null))
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: de::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
        self.visit_i128(number.into())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        self.visit_i128(number.into())
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<Value, E> {
        Ok(if let Ok(int) = i32::try_from(number) {
            Value::Int(int)
        } else if number.unsigned_abs() <= 1 << 53 {
            Value::Double(number as f64)
        } else {
            Value::BigInt(BigInt::from(number))
        })
    }

    fn visit_u128<E: de::Error>(self, number: u128) -> Result<Value, E> {
        match i128::try_from(number) {
            Ok(number) => self.visit_i128(number),
            Err(_) => Ok(Value::BigInt(BigInt::from(number))),
        }
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Double(number))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::from(text))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::from(text))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Value, E> {
        Ok(Value::buffer(bytes.to_vec()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element::<Value>()? {
            elements.push(element);
        }
        Ok(Value::from(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry::<Value, Value>()? {
            entries.push(entry);
        }
        if !entries.iter().all(|(key, _)| matches!(key, Value::String(_))) {
            return Ok(Value::Map(Map { entries }));
        }
        let properties = entries.into_iter().filter_map(|(key, value)| match key {
            Value::String(text) => Some((Key::Text(text), value)),
            _ => None,
        });
        Ok(Value::Object(Object { properties: properties.collect() }))
    }
}

impl<'de> IntoDeserializer<'de, ConvertError> for Name<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
