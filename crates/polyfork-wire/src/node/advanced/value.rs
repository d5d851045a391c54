//! A message as a tree: everything that V8 writes for plain data.
//!
//! The tree owns all it has. An object that occurs twice is in the tree once, and every further place has a
//! [`Value::Reference`]; [`Objects`](super::Objects) finds what it means.
//!
//! The surprising rule: dropping takes constant stack however deep a tree is; so do `clone`, `==` and `Debug`, which
//! are in `tree`.

use std::mem;

use super::bigint::BigInt;
use super::text::{Key, Text};

/// A JavaScript value.
///
/// `==` compares trees: the order of properties counts, and NaN differs from itself.
#[derive(Default)]
#[non_exhaustive]
pub enum Value {
    /// `undefined`
    #[default]
    Undefined,
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number that V8 had as a small integer. The same number may be a [`Double`](Self::Double) as well.
    Int(i32),
    /// Any other number.
    Double(f64),
    /// A `bigint`.
    BigInt(BigInt),
    /// A string.
    String(Text),
    /// A plain object.
    Object(Object),
    /// An array with all or most of its elements.
    Array(Array),
    /// An array with few of its elements.
    SparseArray(Box<SparseArray>),
    /// An element that an array does not have. Only within [`Array::elements`]; elsewhere it is sent as
    /// `undefined`.
    Hole,
    /// `Date`, in milliseconds since 1970; NaN for an invalid one.
    Date(f64),
    /// `Map`
    Map(Map),
    /// `Set`
    Set(Set),
    /// `RegExp`
    RegExp(Box<RegExp>),
    /// A primitive value in its object: `Object(1)`.
    Boxed(Box<Boxed>),
    /// `Error` and its kin.
    Error(Box<ErrorValue>),
    /// `ArrayBuffer`
    ArrayBuffer(Vec<u8>),
    /// `ArrayBuffer` with a `maxByteLength`. Node 18 and older refuse the message.
    Resizable(Box<Resizable>),
    /// A `Buffer`, a typed array or a `DataView`, as Node sends them: with bytes of its own.
    Bytes(Bytes),
    /// A typed array or a `DataView` as V8 writes them: a window on an array buffer, which others may share.
    /// Stock Node reads these and never sends one.
    View(Box<View>),
    /// What Node made of an object that is implemented in C++: its own enumerable properties.
    Native(Object),
    /// An object that occurred before: its number, in the order in which objects begin in the message,
    /// from 0. (Everything but the primitive values is an object; of a view, the buffer begins first.)
    Reference(u32),
}

/// A plain object: properties in order. Of duplicate names the last counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object {
    /// Names and values.
    pub properties: Vec<(Key, Value)>,
}

/// An array whose elements are listed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array {
    /// From index 0. Missing ones are [`Value::Hole`].
    pub elements: Vec<Value>,
    /// Properties beside the elements, if it has any.
    pub named: Option<Box<Object>>,
}

/// An array that lists only the elements it has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseArray {
    /// Its `length`, which a peer may set to anything.
    pub length: u32,
    /// Indices with their elements, and properties.
    pub properties: Vec<(Key, Value)>,
}

/// A `Map`: entries in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map {
    /// Keys and values.
    pub entries: Vec<(Value, Value)>,
}

/// A `Set`: values in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Set {
    /// What is in it.
    pub values: Vec<Value>,
}

/// A regular expression. It is not checked to be one, and a peer refuses the message if it is not.
#[derive(Clone, Debug, PartialEq)]
pub struct RegExp {
    /// Between the slashes.
    pub pattern: Text,
    /// Sum of 1 for `g`, 2 `i`, 4 `m`, 8 `y`, 16 `u`, 32 `s`, 128 `d`, 256 `v`.
    pub flags: u32,
}

impl RegExp {
    /// The letters of the flags, in the order of `RegExp.prototype.flags`.
    #[must_use]
    pub fn letters(&self) -> String {
        const LETTERS: [(char, u32); 8] =
            [('d', 128), ('g', 1), ('i', 2), ('m', 4), ('s', 32), ('u', 16), ('v', 256), ('y', 8)];
        LETTERS.iter().filter(|(_, bit)| self.flags & bit != 0).map(|(letter, _)| letter).collect()
    }
}

/// A primitive value in an object.
#[derive(Clone, Debug, PartialEq)]
pub enum Boxed {
    /// `Object(true)`
    Bool(bool),
    /// `Object(1)`
    Number(f64),
    /// `Object(1n)`
    BigInt(BigInt),
    /// `Object('')`
    String(Text),
}

/// An error. Properties of its own do not travel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ErrorValue {
    /// Which constructor made it.
    pub kind: ErrorKind,
    /// `message`
    pub message: Option<Text>,
    /// `stack`
    pub stack: Option<Text>,
    /// `cause`
    pub cause: Option<Value>,
}

/// The constructor of an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// `Error`, and every class of a user.
    #[default]
    Error,
    /// `EvalError`
    EvalError,
    /// `RangeError`
    RangeError,
    /// `ReferenceError`
    ReferenceError,
    /// `SyntaxError`
    SyntaxError,
    /// `TypeError`
    TypeError,
    /// `URIError`
    UriError,
}

impl ErrorKind {
    const TAGS: [(Self, u8); 6] = [
        (Self::EvalError, b'E'),
        (Self::RangeError, b'R'),
        (Self::ReferenceError, b'F'),
        (Self::SyntaxError, b'S'),
        (Self::TypeError, b'T'),
        (Self::UriError, b'U'),
    ];

    pub(super) fn tag(self) -> Option<u8> {
        Self::TAGS.iter().find(|(kind, _)| *kind == self).map(|(_, tag)| *tag)
    }

    pub(super) fn from_tag(tag: u8) -> Option<Self> {
        Self::TAGS.iter().find(|(_, known)| *known == tag).map(|(kind, _)| *kind)
    }

    /// The `name` of such an error.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "Error",
            Self::EvalError => "EvalError",
            Self::RangeError => "RangeError",
            Self::ReferenceError => "ReferenceError",
            Self::SyntaxError => "SyntaxError",
            Self::TypeError => "TypeError",
            Self::UriError => "URIError",
        }
    }
}

/// An array buffer that can grow.
#[derive(Clone, Debug, PartialEq)]
pub struct Resizable {
    /// What is in it now.
    pub bytes: Vec<u8>,
    /// `maxByteLength`. One beyond 4 GiB is read as 4 GiB less a byte, because most peers know no larger
    /// numbers here; one below the length is sent as the length.
    pub max_length: u32,
}

/// A buffer, typed array or data view with its bytes, which are in little-endian order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes {
    kind: BytesKind,
    bytes: Vec<u8>,
}

impl Bytes {
    /// Bytes that are a whole number of elements; gives them back when they are not.
    ///
    /// # Errors
    ///
    /// The bytes.
    pub fn new(kind: BytesKind, bytes: Vec<u8>) -> Result<Self, Vec<u8>> {
        if bytes.len().is_multiple_of(kind.element_bytes()) {
            Ok(Self { kind, bytes })
        } else {
            Err(bytes)
        }
    }

    /// What it is in JavaScript.
    #[must_use]
    pub fn kind(&self) -> BytesKind {
        self.kind
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, without a copy.
    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        self.bytes
    }
}

/// What bytes are in JavaScript.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names of the classes")]
pub enum BytesKind {
    Int8Array,
    Uint8Array,
    Uint8ClampedArray,
    Int16Array,
    Uint16Array,
    Int32Array,
    Uint32Array,
    Float32Array,
    Float64Array,
    DataView,
    /// Node's `Buffer`.
    Buffer,
    BigInt64Array,
    BigUint64Array,
    /// Older versions of Node do not know it and refuse the message.
    Float16Array,
}

impl BytesKind {
    /// In the order of Node's numbers, with the letters of V8, which has none for a `Buffer`.
    const ALL: [(Self, u8); 14] = [
        (Self::Int8Array, b'b'),
        (Self::Uint8Array, b'B'),
        (Self::Uint8ClampedArray, b'C'),
        (Self::Int16Array, b'w'),
        (Self::Uint16Array, b'W'),
        (Self::Int32Array, b'd'),
        (Self::Uint32Array, b'D'),
        (Self::Float32Array, b'f'),
        (Self::Float64Array, b'F'),
        (Self::DataView, b'?'),
        (Self::Buffer, 0),
        (Self::BigInt64Array, b'q'),
        (Self::BigUint64Array, b'Q'),
        (Self::Float16Array, b'h'),
    ];

    pub(super) fn host_number(self) -> u8 {
        self as u8
    }

    pub(super) fn from_host_number(number: u64) -> Option<Self> {
        usize::try_from(number).ok().and_then(|at| Self::ALL.get(at)).map(|(kind, _)| *kind)
    }

    pub(super) fn letter(self) -> u8 {
        Self::ALL[usize::from(self as u8)].1
    }

    pub(super) fn from_letter(letter: u64) -> Option<Self> {
        let known = Self::ALL.iter().find(|(_, known)| *known != 0 && u64::from(*known) == letter);
        known.map(|(kind, _)| *kind)
    }

    /// Bytes of one element; 1 for a buffer and a data view.
    #[must_use]
    pub fn element_bytes(self) -> usize {
        match self {
            Self::Int8Array
            | Self::Uint8Array
            | Self::Uint8ClampedArray
            | Self::DataView
            | Self::Buffer => 1,
            Self::Int16Array | Self::Uint16Array | Self::Float16Array => 2,
            Self::Int32Array | Self::Uint32Array | Self::Float32Array => 4,
            Self::Float64Array | Self::BigInt64Array | Self::BigUint64Array => 8,
        }
    }
}

/// A window on an array buffer. What is read from a peer lies within its buffer.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub(super) buffer: Value,
    pub(super) kind: BytesKind,
    pub(super) offset: u32,
    pub(super) length: u32,
    pub(super) flags: u32,
}

impl View {
    /// A view on so many bytes of a buffer; `None` when the value is no buffer of its own, or the bytes are not within it
    /// or no whole elements, or for a `Buffer`, which is no kind of V8.
    #[must_use]
    pub fn new(buffer: Value, kind: BytesKind, bytes: std::ops::Range<u32>) -> Option<Self> {
        let flags = match buffer {
            Value::ArrayBuffer(_) => 0,
            Value::Resizable(_) => super::tag::VIEW_RESIZABLE,
            _ => return None,
        };
        let length = bytes.end.checked_sub(bytes.start)?;
        let whole = |number: u32| (number as usize).is_multiple_of(kind.element_bytes());
        let view = Self { buffer, kind, offset: bytes.start, length, flags };
        let fits = whole(length) && whole(bytes.start) && kind != BytesKind::Buffer;
        (fits && view.bytes_in(Some(&view.buffer)).is_some()).then_some(view)
    }

    /// The [`ArrayBuffer`](Value::ArrayBuffer) or [`Resizable`](Value::Resizable), or a reference to it.
    #[must_use]
    pub fn buffer(&self) -> &Value {
        &self.buffer
    }

    /// What it is in JavaScript.
    #[must_use]
    pub fn kind(&self) -> BytesKind {
        self.kind
    }

    /// First byte in the buffer.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset as usize
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.length as usize
    }

    /// The bytes that it shows of `buffer`.
    pub(super) fn bytes_in<'v>(&self, buffer: Option<&'v Value>) -> Option<&'v [u8]> {
        let bytes = match buffer? {
            Value::ArrayBuffer(bytes) => bytes,
            Value::Resizable(buffer) => &buffer.bytes,
            _ => return None,
        };
        bytes.get(self.offset()..)?.get(..self.len_bytes())
    }
}

impl Value {
    /// A plain object.
    pub fn object<K: Into<Key>, V: Into<Value>>(
        properties: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let properties = properties.into_iter().map(|(key, value)| (key.into(), value.into()));
        Self::Object(Object { properties: properties.collect() })
    }

    /// A `Buffer`.
    #[must_use]
    pub fn buffer(bytes: Vec<u8>) -> Self {
        Self::Bytes(Bytes { kind: BytesKind::Buffer, bytes })
    }

    /// The value of a property: of an object, or beside the elements of an array. References are not
    /// followed.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Self> {
        self.properties().iter().rev().find(|(key, _)| *key == *name).map(|(_, value)| value)
    }

    /// The properties of an object, and those beside the elements of an array.
    #[must_use]
    pub fn properties(&self) -> &[(Key, Self)] {
        match self {
            Self::Object(object) | Self::Native(object) => &object.properties,
            Self::Array(array) => array.named.as_ref().map_or(&[], |named| &named.properties),
            Self::SparseArray(array) => &array.properties,
            _ => &[],
        }
    }

    pub(super) fn properties_mut(&mut self) -> Option<&mut Vec<(Key, Self)>> {
        match self {
            Self::Object(object) | Self::Native(object) => Some(&mut object.properties),
            Self::Array(array) => array.named.as_mut().map(|named| &mut named.properties),
            Self::SparseArray(array) => Some(&mut array.properties),
            _ => None,
        }
    }

    /// The elements of an array that is not sparse.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(array) => Some(&array.elements),
            _ => None,
        }
    }

    /// The text of a string without lone surrogates.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => text.as_str(),
            _ => None,
        }
    }

    /// A number, of either kind.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Int(number) => Some((*number).into()),
            Self::Double(number) => Some(*number),
            _ => None,
        }
    }

    /// A boolean.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The bytes of a `Buffer`, a typed array, a data view, or an array buffer; `None` for a view on a buffer
    /// that occurred before.
    #[must_use]
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes.as_slice()),
            Self::ArrayBuffer(bytes) => Some(bytes),
            Self::Resizable(buffer) => Some(&buffer.bytes),
            Self::View(view) => view.bytes_in(Some(&view.buffer)),
            _ => None,
        }
    }

    /// Whether it is `undefined`, `null` or a hole.
    #[must_use]
    pub fn is_nullish(&self) -> bool {
        matches!(self, Self::Undefined | Self::Null | Self::Hole)
    }

    /// Whether it has a number by which it can be referred to.
    pub(super) fn is_object(&self) -> bool {
        !matches!(
            self,
            Self::Undefined
                | Self::Null
                | Self::Bool(_)
                | Self::Int(_)
                | Self::Double(_)
                | Self::BigInt(_)
                | Self::String(_)
                | Self::Hole
                | Self::Reference(_)
        )
    }

    /// Appends what is directly in it.
    pub(super) fn children<'v>(&'v self, list: &mut Vec<&'v Self>) {
        match self {
            Self::Object(object) | Self::Native(object) => list.extend(values(&object.properties)),
            Self::Array(array) => {
                list.extend(&array.elements);
                list.extend(array.named.iter().flat_map(|named| values(&named.properties)));
            }
            Self::SparseArray(array) => list.extend(values(&array.properties)),
            Self::Map(map) => list.extend(map.entries.iter().flat_map(|(key, value)| [key, value])),
            Self::Set(set) => list.extend(&set.values),
            Self::Error(error) => list.extend(&error.cause),
            Self::View(view) => list.push(&view.buffer),
            _ => {}
        }
    }

    /// As [`children`](Self::children), to be changed.
    pub(super) fn children_mut<'v>(&'v mut self, list: &mut Vec<&'v mut Self>) {
        match self {
            Self::Object(object) | Self::Native(object) => {
                list.extend(object.properties.iter_mut().map(|(_, value)| value));
            }
            Self::Array(array) => {
                list.extend(&mut array.elements);
                let named = array.named.iter_mut().flat_map(|named| &mut named.properties);
                list.extend(named.map(|(_, value)| value));
            }
            Self::SparseArray(array) => {
                list.extend(array.properties.iter_mut().map(|(_, value)| value));
            }
            Self::Map(map) => {
                list.extend(map.entries.iter_mut().flat_map(|(key, value)| [key, value]));
            }
            Self::Set(set) => list.extend(&mut set.values),
            Self::Error(error) => list.extend(&mut error.cause),
            Self::View(view) => list.push(&mut view.buffer),
            _ => {}
        }
    }

    /// Whether dropping it drops further values.
    pub(super) fn is_nested(&self) -> bool {
        match self {
            Self::Object(object) | Self::Native(object) => !object.properties.is_empty(),
            Self::Array(array) => !array.elements.is_empty() || array.named.is_some(),
            Self::SparseArray(array) => !array.properties.is_empty(),
            Self::Map(map) => !map.entries.is_empty(),
            Self::Set(set) => !set.values.is_empty(),
            Self::Error(error) => error.cause.is_some(),
            _ => false,
        }
    }

    /// Moves what is directly in it to the list.
    fn dismantle(&mut self, list: &mut Vec<Self>) {
        match self {
            Self::Object(object) | Self::Native(object) => object.dismantle(list),
            Self::Array(array) => array.dismantle(list),
            Self::SparseArray(array) => array.dismantle(list),
            Self::Map(map) => map.dismantle(list),
            Self::Set(set) => set.dismantle(list),
            Self::Error(error) => error.dismantle(list),
            _ => {}
        }
    }
}

fn values(properties: &[(Key, Value)]) -> impl Iterator<Item = &Value> {
    properties.iter().map(|(_, value)| value)
}

/// Moves nested values to the list, and lets the others go.
fn nested(children: impl IntoIterator<Item = Value>, list: &mut Vec<Value>) {
    list.extend(children.into_iter().filter(Value::is_nested));
}

impl Object {
    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(mem::take(&mut self.properties).into_iter().map(|(_, value)| value), list);
    }
}

impl Array {
    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(mem::take(&mut self.elements), list);
        if let Some(mut named) = self.named.take() {
            named.dismantle(list);
        }
    }
}

impl SparseArray {
    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(mem::take(&mut self.properties).into_iter().map(|(_, value)| value), list);
    }
}

impl Map {
    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(
            mem::take(&mut self.entries).into_iter().flat_map(|(key, value)| [key, value]),
            list,
        );
    }
}

impl Set {
    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(mem::take(&mut self.values), list);
    }
}

impl ErrorValue {
    /// An error with a message, and no more.
    #[must_use]
    pub fn new(kind: ErrorKind, message: &str) -> Self {
        Self { kind, message: Some(message.into()), stack: None, cause: None }
    }

    fn dismantle(&mut self, list: &mut Vec<Value>) {
        nested(self.cause.take(), list);
    }
}

/// Drops what is in a container, level by level instead of one inside the other.
macro_rules! drop_in_constant_stack {
    ($($container:ty),*) => {$(
        impl Drop for $container {
            fn drop(&mut self) {
                let mut list = Vec::new();
                self.dismantle(&mut list);
                while let Some(mut value) = list.pop() {
                    value.dismantle(&mut list);
                }
            }
        }
    )*};
}

drop_in_constant_stack!(Object, Array, SparseArray, Map, Set, ErrorValue);

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Self {
        Self::Int(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Double(number)
    }
}

impl From<BigInt> for Value {
    fn from(number: BigInt) -> Self {
        Self::BigInt(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text.into())
    }
}

impl From<Text> for Value {
    fn from(text: Text) -> Self {
        Self::String(text)
    }
}

impl From<ErrorValue> for Value {
    fn from(error: ErrorValue) -> Self {
        Self::Error(Box::new(error))
    }
}

impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(elements: Vec<T>) -> Self {
        let elements = elements.into_iter().map(Into::into).collect();
        Self::Array(Array { elements, named: None })
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deepest_tree_is_dropped_in_constant_stack() {
        let deeper: [fn(Value) -> Value; 6] = [
            |value| Value::object([("a", value)]),
            |value| Value::from(vec![value]),
            |value| Value::Map(Map { entries: vec![(value, Value::Null)] }),
            |value| Value::Set(Set { values: vec![value] }),
            |value| {
                let mut error = ErrorValue::new(ErrorKind::TypeError, "x");
                error.cause = Some(value);
                Value::from(error)
            },
            |value| {
                let properties = vec![(Key::from(0), value)];
                Value::SparseArray(Box::new(SparseArray { length: 1, properties }))
            },
        ];
        let mut value = Value::Null;
        for level in 0..1_000_000 {
            value = deeper[level % deeper.len()](value);
        }
        drop(value);
    }

    #[test]
    fn last_of_duplicate_properties_is_found() {
        let object = Value::object([("a", 1), ("b", 2), ("a", 3)]);
        assert_eq!(object.get("a"), Some(&Value::Int(3)));
        assert_eq!(object.get("c"), None);
    }

    #[test]
    fn element_is_small() {
        assert!(size_of::<Value>() <= 40, "{}", size_of::<Value>());
    }

    #[test]
    fn flags_have_their_letters() {
        let all = RegExp { pattern: "x".into(), flags: 0x1BF };
        assert_eq!(all.letters(), "dgimsuvy");
    }
}
