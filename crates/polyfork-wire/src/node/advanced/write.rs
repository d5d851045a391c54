//! Writes values as V8's serializer does.
//!
//! The surprising rule: the format is always 13, the oldest that any peer writes, because every peer reads it. Only
//! a message with a view on a resizable buffer is in format 14: version 13 has no words for it, and the peers
//! that read nothing newer know no such buffers.
//!
//! A string that is not Latin-1 is padded so that its units lie on even offsets. A reference that points to
//! nothing before it becomes `undefined`, as a stock peer dies of it.

use std::slice::Iter;

use super::bigint::BigInt;
use super::error::ConvertError;
use super::frame::HEADER_BYTES;
use super::tag;
use super::text::{Key, Text};
use super::value::{Boxed, ErrorValue, Object, Value, View};

const VERSION: u8 = 13;
const VERSION_WITH_VIEW_FLAGS: u8 = 14;

/// Room for most messages, so that they do not grow step by step.
const USUAL_BYTES: usize = 256;

/// A varint of zero in five bytes, to be overwritten by one that is known later.
const UNKNOWN_LENGTH: [u8; 5] = [0x80, 0x80, 0x80, 0x80, 0];

/// The payload of a message.
#[must_use]
pub fn write(value: &Value) -> Vec<u8> {
    let mut writer = Writer::new(0);
    writer.value(value);
    if !writer.needs_view_flags {
        return writer.bytes;
    }
    let mut writer = Writer::with_view_flags(0);
    writer.value(value);
    writer.bytes
}

/// A whole frame: the payload of [`write()`] behind its length.
///
/// # Errors
///
/// When the payload is longer than 4 GiB less a byte.
pub fn write_frame(value: &Value) -> Result<Vec<u8>, ConvertError> {
    frame_of(|writer| {
        writer.value(value);
        Ok(())
    })
}

/// A frame with what `fill` writes.
pub(super) fn frame_of(
    fill: impl Fn(&mut Writer) -> Result<(), ConvertError>,
) -> Result<Vec<u8>, ConvertError> {
    let mut bytes = payload_of(HEADER_BYTES, fill)?;
    let length = u32::try_from(bytes.len() - HEADER_BYTES)
        .map_err(|_| ConvertError::new("message is longer than a frame can be"))?;
    bytes[..HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(bytes)
}

/// What `fill` writes, with room before it.
pub(super) fn payload_of(
    room: usize,
    fill: impl Fn(&mut Writer) -> Result<(), ConvertError>,
) -> Result<Vec<u8>, ConvertError> {
    let mut writer = Writer::new(room);
    fill(&mut writer)?;
    if writer.needs_view_flags {
        writer = Writer::with_view_flags(room);
        fill(&mut writer)?;
    }
    Ok(writer.bytes)
}

/// A payload under construction.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
    next_id: u32,
    view_flags: bool,
    /// A view was met that this format cannot describe.
    needs_view_flags: bool,
}

/// What is still to be written of a container.
enum Rest<'v> {
    Values(Iter<'v, Value>),
    Properties(Iter<'v, (Key, Value)>),
    Entries(Iter<'v, (Value, Value)>),
    One(&'v Value),
    View(&'v View),
    /// A tag and counts.
    End(u8, u32, Option<u32>),
    ErrorEnd,
}

impl Writer {
    /// Behind so many zero bytes, which must be an even number.
    fn new(room: usize) -> Self {
        let mut bytes = Vec::with_capacity(USUAL_BYTES);
        bytes.resize(room, 0);
        bytes.extend_from_slice(&[tag::VERSION, VERSION]);
        Self { bytes, ..Self::default() }
    }

    fn with_view_flags(room: usize) -> Self {
        let mut writer = Self { view_flags: true, ..Self::new(room) };
        writer.bytes[room + 1] = VERSION_WITH_VIEW_FLAGS;
        writer
    }

    /// A tree, whose references are to objects of the tree.
    pub(super) fn value(&mut self, root: &Value) {
        let base = self.next_id;
        let mut stack = Vec::with_capacity(8);
        stack.push(Rest::One(root));
        while let Some(rest) = stack.pop() {
            let value = match rest {
                Rest::One(value) => value,
                Rest::Values(mut values) => {
                    let Some(value) = values.next() else { continue };
                    stack.push(Rest::Values(values));
                    value
                }
                Rest::Properties(mut properties) => {
                    let Some((key, value)) = properties.next() else { continue };
                    stack.push(Rest::Properties(properties));
                    self.key(key);
                    value
                }
                Rest::Entries(mut entries) => {
                    let Some((key, value)) = entries.next() else { continue };
                    stack.push(Rest::Entries(entries));
                    stack.push(Rest::One(value));
                    key
                }
                Rest::View(view) => {
                    self.view(view);
                    continue;
                }
                Rest::End(tag, count, length) => {
                    self.end(tag, count, length);
                    continue;
                }
                Rest::ErrorEnd => {
                    self.tag(tag::ERROR_END);
                    continue;
                }
            };
            self.one(value, base, &mut stack);
        }
    }

    /// A value without what is in it, which goes on the stack.
    fn one<'v>(&mut self, value: &'v Value, base: u32, stack: &mut Vec<Rest<'v>>) {
        if value.is_object() && !matches!(value, Value::View(_)) {
            self.next_id += 1;
        }
        match value {
            // Only an array has its properties below its elements.
            Value::Hole if matches!(stack[..], [.., Rest::Properties(_), Rest::Values(_)]) => {
                self.tag(tag::HOLE);
            }
            Value::Undefined | Value::Hole => self.undefined(),
            Value::Null => self.null(),
            Value::Bool(value) => self.bool(*value),
            Value::Int(number) => self.int(*number),
            Value::Double(number) => self.double(tag::DOUBLE, *number),
            Value::BigInt(number) => self.bigint(tag::BIGINT, number),
            Value::String(text) => self.text(text),
            Value::Reference(id) => match base.checked_add(*id).filter(|id| *id < self.next_id) {
                Some(id) => self.counted(tag::REFERENCE, id as usize),
                None => self.undefined(),
            },
            Value::Object(object) => self.object(object, stack),
            Value::Native(object) => {
                self.tag(tag::HOST);
                self.varint(tag::HOST_NATIVE);
                self.next_id += 1;
                self.object(object, stack);
            }
            Value::Array(array) => {
                let named = array.named.as_ref().map_or(&[][..], |named| &named.properties);
                let length = array.elements.len();
                self.counted(tag::DENSE, length);
                stack.push(Rest::End(tag::DENSE_END, count(named), Some(to_u32(length))));
                stack.push(Rest::Properties(named.iter()));
                stack.push(Rest::Values(array.elements.iter()));
            }
            Value::SparseArray(array) => {
                self.counted(tag::SPARSE, array.length as usize);
                let end = (tag::SPARSE_END, count(&array.properties), Some(array.length));
                stack.push(Rest::End(end.0, end.1, end.2));
                stack.push(Rest::Properties(array.properties.iter()));
            }
            Value::Map(map) => {
                self.tag(tag::MAP);
                stack.push(Rest::End(tag::MAP_END, to_u32(2 * map.entries.len()), None));
                stack.push(Rest::Entries(map.entries.iter()));
            }
            Value::Set(set) => {
                self.tag(tag::SET);
                stack.push(Rest::End(tag::SET_END, to_u32(set.values.len()), None));
                stack.push(Rest::Values(set.values.iter()));
            }
            Value::Error(error) => self.error(error, stack),
            Value::View(view) => {
                stack.push(Rest::View(view));
                stack.push(Rest::One(&view.buffer));
            }
            leaf => self.leaf(leaf),
        }
    }

    fn leaf(&mut self, value: &Value) {
        match value {
            Value::Date(time) => self.double(tag::DATE, *time),
            Value::RegExp(regexp) => {
                self.tag(tag::REGEXP);
                self.text(&regexp.pattern);
                self.varint(regexp.flags.into());
            }
            Value::Boxed(boxed) => match &**boxed {
                Boxed::Bool(true) => self.tag(tag::BOXED_TRUE),
                Boxed::Bool(false) => self.tag(tag::BOXED_FALSE),
                Boxed::Number(number) => self.double(tag::BOXED_NUMBER, *number),
                Boxed::BigInt(number) => self.bigint(tag::BOXED_BIGINT, number),
                Boxed::String(text) => {
                    self.tag(tag::BOXED_STRING);
                    self.text(text);
                }
            },
            Value::ArrayBuffer(bytes) => {
                self.counted(tag::ARRAY_BUFFER, bytes.len());
                self.bytes.extend_from_slice(bytes);
            }
            Value::Resizable(buffer) => {
                self.counted(tag::RESIZABLE, buffer.bytes.len());
                self.varint(u64::from(buffer.max_length).max(buffer.bytes.len() as u64));
                self.bytes.extend_from_slice(&buffer.bytes);
            }
            Value::Bytes(bytes) => self.host_bytes(bytes.kind().host_number(), bytes.as_slice()),
            _ => self.undefined(),
        }
    }

    /// A view whose bytes are its own.
    pub(super) fn host_bytes(&mut self, kind: u8, bytes: &[u8]) {
        self.tag(tag::HOST);
        self.varint(tag::HOST_BYTES);
        self.varint(kind.into());
        self.varint(bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }

    fn object<'v>(&mut self, object: &'v Object, stack: &mut Vec<Rest<'v>>) {
        self.tag(tag::OBJECT);
        stack.push(Rest::End(tag::OBJECT_END, count(&object.properties), None));
        stack.push(Rest::Properties(object.properties.iter()));
    }

    /// The cause comes last: Node 26 reads no other order.
    fn error<'v>(&mut self, error: &'v ErrorValue, stack: &mut Vec<Rest<'v>>) {
        self.tag(tag::ERROR);
        self.bytes.extend(error.kind.tag());
        for (tag, text) in [(tag::ERROR_MESSAGE, &error.message), (tag::ERROR_STACK, &error.stack)]
        {
            if let Some(text) = text {
                self.tag(tag);
                self.text(text);
            }
        }
        stack.push(Rest::ErrorEnd);
        if let Some(cause) = &error.cause {
            self.tag(tag::ERROR_CAUSE);
            stack.push(Rest::One(cause));
        }
    }

    fn view(&mut self, view: &View) {
        self.next_id += 1;
        self.tag(tag::VIEW);
        self.varint(view.kind.letter().into());
        self.varint(view.offset.into());
        self.varint(view.length.into());
        if self.view_flags {
            self.varint(view.flags.into());
        } else {
            self.needs_view_flags |= view.flags != 0;
        }
    }

    fn key(&mut self, key: &Key) {
        match key {
            Key::Text(text) => self.text(text),
            Key::Number(number) => self.number(*number),
        }
    }
}

/// What serde needs as well.
impl Writer {
    pub(super) fn undefined(&mut self) {
        self.tag(tag::UNDEFINED);
    }

    pub(super) fn null(&mut self) {
        self.tag(tag::NULL);
    }

    pub(super) fn bool(&mut self, value: bool) {
        self.tag(if value { tag::TRUE } else { tag::FALSE });
    }

    pub(super) fn int(&mut self, number: i32) {
        self.tag(tag::INT32);
        self.varint((number.cast_unsigned() << 1 ^ (number >> 31).cast_unsigned()).into());
    }

    /// A number in its shortest form.
    pub(super) fn number(&mut self, number: f64) {
        #[expect(clippy::cast_possible_truncation, reason = "compared with what it was")]
        let int = number as i32;
        if f64::from(int).to_bits() == number.to_bits() {
            self.int(int);
        } else {
            self.double(tag::DOUBLE, number);
        }
    }

    fn double(&mut self, tag: u8, number: f64) {
        self.tag(tag);
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    pub(super) fn any_bigint(&mut self, number: &BigInt) {
        self.bigint(tag::BIGINT, number);
    }

    fn bigint(&mut self, tag: u8, number: &BigInt) {
        self.tag(tag);
        let length = 8 * number.digits().len() as u64;
        self.varint(length << 1 | u64::from(number.is_negative()));
        for digit in number.digits() {
            self.bytes.extend_from_slice(&digit.to_le_bytes());
        }
    }

    fn text(&mut self, text: &Text) {
        match (text.as_str(), text.as_ill_formed()) {
            (Some(text), _) => self.str(text),
            (None, units) => self.two_byte(units.unwrap_or_default().iter().copied()),
        }
    }

    pub(super) fn str(&mut self, text: &str) {
        if text.is_ascii() {
            self.counted(tag::ONE_BYTE, text.len());
            self.bytes.extend_from_slice(text.as_bytes());
        } else if text.chars().all(|character| character <= '\u{FF}') {
            self.counted(tag::ONE_BYTE, text.chars().count());
            self.bytes.extend(text.chars().filter_map(|character| u8::try_from(character).ok()));
        } else {
            self.two_byte(text.encode_utf16());
        }
    }

    fn two_byte(&mut self, units: impl Iterator<Item = u16> + Clone) {
        let length = 2 * units.clone().count() as u64;
        // The header and the room before it are even, so this is the position in the payload as well.
        if (self.bytes.len() + 1 + varint_bytes(length)) % 2 == 1 {
            self.tag(tag::PADDING);
        }
        self.tag(tag::TWO_BYTE);
        self.varint(length);
        self.bytes.extend(units.flat_map(u16::to_le_bytes));
    }

    /// Counts an object that the next tag begins. Returns where it begins.
    pub(super) fn begin(&mut self, tag: u8) -> usize {
        self.next_id += 1;
        self.tag(tag);
        self.bytes.len() - 1
    }

    /// Counts and begins an array whose length is said by [`end_array`](Self::end_array).
    pub(super) fn begin_array(&mut self) -> usize {
        let at = self.begin(tag::DENSE);
        self.bytes.extend_from_slice(&UNKNOWN_LENGTH);
        at
    }

    /// Ends an array that began at `at`.
    pub(super) fn end_array(&mut self, at: usize, length: u32) {
        for (byte, index) in self.bytes[at + 1..].iter_mut().zip(0..5_u32) {
            let more = if index < 4 { 0x80 } else { 0 };
            *byte = u8::try_from(length >> (7 * index) & 0x7F).unwrap_or(0) | more;
        }
        self.end(tag::DENSE_END, 0, Some(length));
    }

    pub(super) fn position(&self) -> usize {
        self.bytes.len()
    }

    /// Whether what was written at `at` is a string.
    pub(super) fn is_text_at(&self, at: usize) -> bool {
        let mut written = self.bytes[at..].iter().skip_while(|byte| **byte == tag::PADDING);
        matches!(written.next(), Some(&(tag::ONE_BYTE | tag::TWO_BYTE)))
    }

    /// Makes what began at `at` something else.
    pub(super) fn retag(&mut self, at: usize, tag: u8) {
        self.bytes[at] = tag;
    }

    pub(super) fn end(&mut self, tag: u8, count: u32, length: Option<u32>) {
        self.tag(tag);
        self.varint(count.into());
        if let Some(length) = length {
            self.varint(length.into());
        }
    }

    /// Counts and writes a `Buffer`.
    pub(super) fn node_buffer(&mut self, bytes: &[u8]) {
        self.next_id += 1;
        self.host_bytes(super::BytesKind::Buffer.host_number(), bytes);
    }

    fn tag(&mut self, tag: u8) {
        self.bytes.push(tag);
    }

    fn counted(&mut self, tag: u8, count: usize) {
        self.tag(tag);
        self.varint(count as u64);
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(u8::try_from(number & 0x7F).unwrap_or(0) | 0x80);
            number >>= 7;
        }
        self.bytes.push(u8::try_from(number).unwrap_or(0));
    }
}

fn varint_bytes(number: u64) -> usize {
    (64 - (number | 1).leading_zeros()).div_ceil(7) as usize
}

fn count(properties: &[(Key, Value)]) -> u32 {
    to_u32(properties.len())
}

/// A count as the format has it. Four thousand million values do not fit a frame, so nothing is lost.
fn to_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
