//! Reads what V8's serializer wrote.
//!
//! Formats 13 to 16 are read; they differ in the flags of views (from 14) and in how large a length may be
//! (16). What cannot leave a process in a message (shared memory, WebAssembly, transferred buffers) is an
//! error, and so is everything that V8 would refuse, except that patterns of regular expressions
//! are not compiled.
//!
//! The rule that keeps a hostile payload harmless: finished values lie on one stack, and open containers on
//! another; a container takes its part of the first when its end comes. Nothing recurses, and no
//! length or count from the payload is ever allocated for: each value costs at least a byte that is there,
//! and [`Limits::max_values`] bounds their number.

use super::bigint::BigInt;
use super::tag;
use super::text::{Key, Text};
use super::value::{
    Array, Boxed, Bytes, BytesKind, ErrorKind, ErrorValue, Map, Object, RegExp, Resizable, Set,
    SparseArray, Value, View,
};
use crate::{Limits, ProtocolError};

/// The formats that are read.
const VERSIONS: std::ops::RangeInclusive<u32> = 13..=16;

/// The first format in which views have flags.
const VIEW_FLAGS_SINCE: u32 = 14;

const ENDS: &str = "it ends too early";

/// Reads one payload. Bytes behind its value are ignored, as V8 does.
///
/// # Errors
///
/// [`ProtocolError::TooLong`], [`TooDeep`](ProtocolError::TooDeep),
/// [`TooManyValues`](ProtocolError::TooManyValues), [`UnknownFormat`](ProtocolError::UnknownFormat),
/// [`EmptyFrame`](ProtocolError::EmptyFrame), [`BadValue`](ProtocolError::BadValue).
pub fn read(payload: &[u8], limits: &Limits) -> Result<Value, ProtocolError> {
    if payload.is_empty() {
        return Err(ProtocolError::EmptyFrame);
    }
    if payload.len() > limits.max_message {
        return Err(ProtocolError::TooLong { limit: limits.max_message });
    }
    let mut reader = Reader {
        bytes: payload,
        at: 0,
        version: 0,
        limits,
        // Enough for most messages, so that they do not grow step by step.
        values: Vec::with_capacity(16),
        open: Vec::with_capacity(4),
        next_id: 0,
        count: 0,
        buffers: Vec::new(),
    };
    reader.header()?;
    reader.root()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    version: u32,
    limits: &'a Limits,
    /// Finished values whose container is open, outermost first.
    values: Vec<Value>,
    open: Vec<Open>,
    /// The number of the next object.
    next_id: u32,
    /// Values so far, names of properties included.
    count: usize,
    /// The array buffers so far, by number.
    buffers: Vec<Buffer>,
}

/// A container whose end has not come.
struct Open {
    kind: Kind,
    /// Where its values begin.
    start: usize,
}

enum Kind {
    Object {
        native: bool,
    },
    /// `left` elements are still to come, then properties.
    Dense {
        length: u32,
        left: u32,
    },
    Sparse {
        length: u32,
    },
    Map,
    Set,
    /// Has one value on the stack when `cause` is set.
    Error {
        error: Box<ErrorValue>,
        cause: bool,
    },
}

struct Buffer {
    id: u32,
    length: usize,
    resizable: bool,
}

type Result_<T> = Result<T, ProtocolError>;

impl Reader<'_> {
    fn header(&mut self) -> Result_<()> {
        if self.bytes.first() != Some(&tag::VERSION) {
            return Err(ProtocolError::UnknownFormat { version: 0 });
        }
        self.at = 1;
        self.version = self.varint32()?;
        if VERSIONS.contains(&self.version) {
            Ok(())
        } else {
            Err(ProtocolError::UnknownFormat { version: self.version })
        }
    }

    fn root(&mut self) -> Result_<Value> {
        loop {
            let finished = match self.close()? {
                Some(value) => Some(value),
                None => self.begin()?,
            };
            let Some(value) = finished else { continue };
            let value = self.view_on(value)?;
            match self.open.last_mut() {
                None => return Ok(value),
                Some(Open { kind: Kind::Dense { left, .. }, .. }) if *left > 0 => *left -= 1,
                Some(_) => self.check_name(&value)?,
            }
            self.values.push(value);
        }
    }

    /// Where the name of a property is expected, only strings and numbers may be.
    fn check_name(&self, value: &Value) -> Result_<()> {
        let Some(open) = self.open.last() else { return Ok(()) };
        let before = self.values.len() - open.start;
        let is_name = match open.kind {
            Kind::Object { .. } | Kind::Sparse { .. } => before.is_multiple_of(2),
            Kind::Dense { length, .. } => (before - length as usize).is_multiple_of(2),
            Kind::Map | Kind::Set | Kind::Error { .. } => false,
        };
        let may_be = matches!(value, Value::Int(_) | Value::Double(_) | Value::String(_));
        if is_name && !may_be { self.bad("name of a property is no name") } else { Ok(()) }
    }

    /// The innermost container, if its end is what comes next.
    fn close(&mut self) -> Result_<Option<Value>> {
        let next = self.peek();
        let Some(open) = self.open.last_mut() else { return Ok(None) };
        let end = match &mut open.kind {
            Kind::Object { .. } => tag::OBJECT_END,
            Kind::Dense { left: 1.., .. } => return Ok(None),
            Kind::Dense { .. } => tag::DENSE_END,
            Kind::Sparse { .. } => tag::SPARSE_END,
            Kind::Map => tag::MAP_END,
            Kind::Set => tag::SET_END,
            Kind::Error { .. } => return self.error_part(),
        };
        if next != Some(end) {
            return Ok(None);
        }
        self.at += 1;
        let Some(Open { kind, start }) = self.open.pop() else { return Ok(None) };
        self.finish(kind, start).map(Some)
    }

    fn finish(&mut self, kind: Kind, start: usize) -> Result_<Value> {
        Ok(match kind {
            Kind::Object { native } => {
                let object = Object { properties: self.properties(start)? };
                if native { Value::Native(object) } else { Value::Object(object) }
            }
            Kind::Dense { length, .. } => {
                let properties = self.properties(start + length as usize)?;
                self.expect_count(u64::from(length))?;
                let named = (!properties.is_empty()).then(|| Box::new(Object { properties }));
                Value::Array(Array { elements: self.values.drain(start..).collect(), named })
            }
            Kind::Sparse { length } => {
                let properties = self.properties(start)?;
                self.expect_count(u64::from(length))?;
                Value::SparseArray(Box::new(SparseArray { length, properties }))
            }
            Kind::Map => {
                let entries = self.pairs(start, Ok)?;
                self.expect_count(2 * entries.len() as u64)?;
                Value::Map(Map { entries })
            }
            Kind::Set => {
                let values: Vec<_> = self.values.drain(start..).collect();
                self.expect_count(values.len() as u64)?;
                Value::Set(Set { values })
            }
            Kind::Error { mut error, .. } => {
                error.cause = self.values.drain(start..).next();
                Value::Error(error)
            }
        })
    }

    /// The properties from `start` on, and their count, which is in the payload as well.
    fn properties(&mut self, start: usize) -> Result_<Vec<(Key, Value)>> {
        let properties = self.pairs(start, |name| match name {
            Value::Int(number) => Ok(Key::Number(number.into())),
            Value::Double(number) => Ok(Key::Number(number)),
            Value::String(text) => Ok(Key::Text(text)),
            _ => Err("name of a property is no name"),
        })?;
        self.expect_count(properties.len() as u64)?;
        Ok(properties)
    }

    fn pairs<K>(
        &mut self,
        start: usize,
        key: impl Fn(Value) -> Result<K, &'static str>,
    ) -> Result_<Vec<(K, Value)>> {
        let at = self.at;
        let bad = |why| ProtocolError::BadValue { at, why };
        let mut pairs = Vec::with_capacity((self.values.len() - start) / 2);
        let mut values = self.values.drain(start..);
        while let Some(first) = values.next() {
            let second = values.next().ok_or_else(|| bad("a name or key has no value"))?;
            pairs.push((key(first).map_err(bad)?, second));
        }
        Ok(pairs)
    }

    fn expect_count(&mut self, actual: u64) -> Result_<()> {
        if u64::from(self.varint32()?) == actual {
            Ok(())
        } else {
            self.bad("a count is not what was counted")
        }
    }

    /// One value, or the beginning of a container.
    fn begin(&mut self) -> Result_<Option<Value>> {
        let tag = self.tag()?;
        self.count += 1;
        if self.count > self.limits.max_values {
            return Err(ProtocolError::TooManyValues { limit: self.limits.max_values });
        }
        if let Some(simple) = self.primitive(tag)? {
            return Ok(Some(simple));
        }
        let id = self.next_id;
        self.next_id += 1;
        match tag {
            tag::OBJECT => self.enter(Kind::Object { native: false }),
            tag::DENSE => {
                let length = self.varint32()?;
                // Each element takes a byte, so a longer array cannot be complete.
                if length as usize > self.bytes.len() - self.at {
                    return self.bad(ENDS);
                }
                self.enter(Kind::Dense { length, left: length })
            }
            tag::SPARSE => {
                let length = self.varint32()?;
                self.enter(Kind::Sparse { length })
            }
            tag::MAP => self.enter(Kind::Map),
            tag::SET => self.enter(Kind::Set),
            tag::ERROR => {
                // Takes as much memory as some other values in fewer bytes of payload.
                self.count += 3;
                self.enter(Kind::Error { error: Box::default(), cause: false })
            }
            tag::HOST => self.host(),
            tag::ARRAY_BUFFER | tag::RESIZABLE => self.buffer(id, tag == tag::RESIZABLE).map(Some),
            _ => self.leaf(tag).map(Some),
        }
    }

    /// A value that has no number.
    fn primitive(&mut self, tag: u8) -> Result_<Option<Value>> {
        let value = match tag {
            tag::UNDEFINED => Value::Undefined,
            tag::NULL => Value::Null,
            tag::TRUE => Value::Bool(true),
            tag::FALSE => Value::Bool(false),
            tag::INT32 => {
                let folded = self.varint32()?;
                Value::Int((folded >> 1).cast_signed() ^ -(folded & 1).cast_signed())
            }
            tag::UINT32 => {
                let number = self.varint32()?;
                i32::try_from(number).map_or(Value::Double(number.into()), Value::Int)
            }
            tag::DOUBLE => Value::Double(self.double()?),
            tag::BIGINT => Value::BigInt(self.bigint()?),
            tag::UTF8 | tag::ONE_BYTE | tag::TWO_BYTE => Value::String(self.string(tag)?),
            tag::REFERENCE => {
                let id = self.varint32()?;
                if id >= self.next_id {
                    return self.bad("a reference is to nothing before it");
                }
                Value::Reference(id)
            }
            tag::HOLE => match self.open.last() {
                Some(Open { kind: Kind::Dense { left: 1.., .. }, .. }) => Value::Hole,
                _ => return self.bad("a hole is not in an array"),
            },
            _ => return Ok(None),
        };
        Ok(Some(value))
    }

    /// An object with nothing in it.
    fn leaf(&mut self, tag: u8) -> Result_<Value> {
        let boxed = |boxed| Value::Boxed(Box::new(boxed));
        Ok(match tag {
            tag::DATE => Value::Date(self.double()?),
            tag::BOXED_TRUE => boxed(Boxed::Bool(true)),
            tag::BOXED_FALSE => boxed(Boxed::Bool(false)),
            tag::BOXED_NUMBER => boxed(Boxed::Number(self.double()?)),
            tag::BOXED_BIGINT => boxed(Boxed::BigInt(self.bigint()?)),
            tag::BOXED_STRING => boxed(Boxed::String(self.any_string()?)),
            tag::REGEXP => {
                let pattern = self.any_string()?;
                Value::RegExp(Box::new(RegExp { pattern, flags: self.varint32()? }))
            }
            _ => {
                self.at -= 1;
                return self.bad("no value that can be sent begins so");
            }
        })
    }

    fn enter(&mut self, kind: Kind) -> Result_<Option<Value>> {
        if self.open.len() >= self.limits.max_depth {
            return Err(ProtocolError::TooDeep { limit: self.limits.max_depth });
        }
        self.open.push(Open { kind, start: self.values.len() });
        Ok(None)
    }

    /// Reads the parts of the innermost container, an error, up to its cause or its end.
    fn error_part(&mut self) -> Result_<Option<Value>> {
        loop {
            let part = self.byte()?;
            let text = match part {
                tag::ERROR_MESSAGE | tag::ERROR_STACK => Some(self.any_string()?),
                _ => None,
            };
            let at = self.at - 1;
            let Some(Open { kind: Kind::Error { error, cause }, .. }) = self.open.last_mut() else {
                return Ok(None);
            };
            match part {
                tag::ERROR_MESSAGE => error.message = text,
                tag::ERROR_STACK => error.stack = text,
                tag::ERROR_CAUSE if !*cause => {
                    *cause = true;
                    return Ok(None);
                }
                tag::ERROR_END => {
                    let Some(Open { kind, start }) = self.open.pop() else { return Ok(None) };
                    return self.finish(kind, start).map(Some);
                }
                prototype => match ErrorKind::from_tag(prototype) {
                    Some(kind) => error.kind = kind,
                    None => {
                        return Err(ProtocolError::BadValue {
                            at,
                            why: "no part of an error begins so",
                        });
                    }
                },
            }
        }
    }

    fn host(&mut self) -> Result_<Option<Value>> {
        match self.varint()? {
            tag::HOST_BYTES => {
                let kind = BytesKind::from_host_number(self.varint()?);
                let bytes = self.counted()?.to_vec();
                let Some(kind) = kind else { return self.bad("a view is of unknown kind") };
                match Bytes::new(kind, bytes) {
                    Ok(bytes) => Ok(Some(Value::Bytes(bytes))),
                    Err(_) => self.bad("a view ends inside an element"),
                }
            }
            tag::HOST_NATIVE if self.tag()? == tag::OBJECT => {
                // The object has a number of its own, beside the one of what it stands for.
                self.next_id += 1;
                self.enter(Kind::Object { native: true })
            }
            _ => self.bad("a host object is of unknown kind"),
        }
    }

    fn buffer(&mut self, id: u32, resizable: bool) -> Result_<Value> {
        let length = self.varint()?;
        let max_length = if resizable { self.varint()? } else { length };
        if max_length < length {
            return self.bad("a buffer is larger than it may be");
        }
        let bytes = self.take(length)?.to_vec();
        self.buffers.push(Buffer { id, length: bytes.len(), resizable });
        Ok(if resizable {
            let max_length = u32::try_from(max_length).unwrap_or(u32::MAX);
            Value::Resizable(Box::new(Resizable { bytes, max_length }))
        } else {
            Value::ArrayBuffer(bytes)
        })
    }

    /// A view may follow the buffer that it is on, or a reference to it, and stands for both.
    fn view_on(&mut self, value: Value) -> Result_<Value> {
        let id = match value {
            Value::ArrayBuffer(_) | Value::Resizable(_) => self.buffers.last().map(|last| last.id),
            Value::Reference(id) => Some(id),
            _ => None,
        };
        let Some(id) = id.filter(|_| self.peek() == Some(tag::VIEW)) else { return Ok(value) };
        let Ok(at) = self.buffers.binary_search_by_key(&id, |buffer| buffer.id) else {
            return self.bad("a view is not on a buffer");
        };
        self.at += 1;
        let kind = BytesKind::from_letter(self.varint()?);
        let (offset, length) = (self.varint32()?, self.varint32()?);
        let flags = if self.version >= VIEW_FLAGS_SINCE { self.varint32()? } else { 0 };
        let Some(kind) = kind else { return self.bad("a view is of unknown kind") };
        let Buffer { length: available, resizable, .. } = self.buffers[at];
        let (first, bytes) = (offset as usize, length as usize);
        let within = first <= available && bytes <= available - first;
        let whole = first % kind.element_bytes() == 0 && bytes % kind.element_bytes() == 0;
        let flagged = (flags & tag::VIEW_RESIZABLE != 0) == resizable
            && (resizable || flags & tag::VIEW_TRACKS == 0);
        if !(within && whole && flagged) {
            return self.bad("a view does not fit its buffer");
        }
        self.next_id += 1;
        let flags = flags & (tag::VIEW_TRACKS | tag::VIEW_RESIZABLE);
        Ok(Value::View(Box::new(View { buffer: value, kind, offset, length, flags })))
    }
}

/// The pieces that values are made of.
impl<'a> Reader<'a> {
    fn bad<T>(&self, why: &'static str) -> Result_<T> {
        Err(ProtocolError::BadValue { at: self.at, why })
    }

    /// The next byte that is no padding, to be taken later.
    fn peek(&mut self) -> Option<u8> {
        while let Some(byte) = self.bytes.get(self.at) {
            if *byte != tag::PADDING {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    /// The beginning of a value.
    fn tag(&mut self) -> Result_<u8> {
        loop {
            let Some(tag) = self.peek() else { return self.bad(ENDS) };
            self.at += 1;
            if tag != tag::OBJECT_COUNT {
                return Ok(tag);
            }
            self.varint()?;
        }
    }

    fn byte(&mut self) -> Result_<u8> {
        let Some(byte) = self.bytes.get(self.at) else { return self.bad(ENDS) };
        self.at += 1;
        Ok(*byte)
    }

    #[inline]
    fn varint(&mut self) -> Result_<u64> {
        if let Some(byte @ 0..=0x7F) = self.bytes.get(self.at) {
            self.at += 1;
            return Ok(u64::from(*byte));
        }
        self.long_varint()
    }

    fn long_varint(&mut self) -> Result_<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7F);
            if part << shift >> shift != part {
                break;
            }
            number |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        self.bad("a number is too large")
    }

    fn varint32(&mut self) -> Result_<u32> {
        let number = self.varint()?;
        u32::try_from(number).or_else(|_| self.bad("a number is too large"))
    }

    fn take(&mut self, length: u64) -> Result_<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(length).ok().and_then(|length| rest.get(..length));
        let Some(taken) = taken else { return self.bad(ENDS) };
        self.at += taken.len();
        Ok(taken)
    }

    /// Bytes behind their number.
    fn counted(&mut self) -> Result_<&'a [u8]> {
        let length = self.varint()?;
        self.take(length)
    }

    fn double(&mut self) -> Result_<f64> {
        let bytes = self.take(8)?;
        Ok(bytes.try_into().map_or(f64::NAN, f64::from_le_bytes))
    }

    fn bigint(&mut self) -> Result_<BigInt> {
        let bits = self.varint32()?;
        let digits = self.take(u64::from(bits >> 1))?;
        Ok(BigInt::from_bytes(bits & 1 == 1, digits))
    }

    /// A string as a part of something else.
    fn any_string(&mut self) -> Result_<Text> {
        let tag = self.tag()?;
        self.string(tag)
    }

    fn string(&mut self, tag: u8) -> Result_<Text> {
        if !matches!(tag, tag::UTF8 | tag::ONE_BYTE | tag::TWO_BYTE) {
            return self.bad("a string is expected");
        }
        let bytes = self.counted()?;
        match tag {
            tag::UTF8 => Ok(Text::from(String::from_utf8_lossy(bytes).into_owned())),
            tag::ONE_BYTE => Ok(Text::from_latin1(bytes)),
            _ if bytes.len() % 2 == 1 => self.bad("a string ends inside a character"),
            _ => {
                let units = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]]));
                Ok(Text::from_utf16(units.collect()))
            }
        }
    }
}
