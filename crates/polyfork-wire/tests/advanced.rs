//! The advanced encoding without a peer: bytes as stock Node writes them, random values both ways, hostile bytes,
//! types of serde, and messages.

#[path = "common/values.rs"]
mod values;

use std::collections::{BTreeMap, HashMap};

use polyfork_wire::node::advanced::{
    BigInt, Bytes, BytesKind, ErrorKind, ErrorValue, FrameDecoder, Key, Map, Object, Objects,
    RegExp, Resizable, Set, SparseArray, Text, Value, View, from_value, handle_message,
    parse_value, read, to_frame, to_payload, transcode_line, write, write_frame,
};
use polyfork_wire::node::cluster::{self, FromWorker, HANDLE_ACK, HANDLE_NACK};
use polyfork_wire::node::message::{DgramType, HandleKind, Incoming};
use polyfork_wire::{Limits, ProtocolError};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pair = |two: &[u8]| u8::from_str_radix(std::str::from_utf8(two).expect("ASCII"), 16);
    digits.chunks(2).map(|two| pair(two).expect("two digits")).collect()
}

fn take(payload: &[u8]) -> Value {
    read(payload, &Limits::default()).unwrap_or_else(|error| panic!("{error}: {payload:02x?}"))
}

fn refused(hex: &str) -> ProtocolError {
    read(&bytes(hex), &Limits::default()).expect_err(hex)
}

fn array(elements: impl IntoIterator<Item = Value>) -> Value {
    Value::from(elements.into_iter().collect::<Vec<_>>())
}

fn int(number: i32) -> Value {
    Value::Int(number)
}

/// What Node 20 and 26 write, without the two bytes of the header, and what it means.
fn vectors() -> Vec<(&'static str, Value)> {
    let object = |properties: Vec<(Key, Value)>| Value::Object(Object { properties });
    let sparse =
        |length, properties| Value::SparseArray(Box::new(SparseArray { length, properties }));
    let bytes_of = |kind, content: &[u8]| {
        Value::Bytes(Bytes::new(kind, content.to_vec()).expect("whole elements"))
    };
    let mut error = ErrorValue::new(ErrorKind::TypeError, "x");
    error.stack = Some("at".into());
    error.cause = Some(Value::Reference(0));
    vec![
        ("5f", Value::Undefined),
        ("30", Value::Null),
        ("54", Value::Bool(true)),
        ("46", Value::Bool(false)),
        ("49 02", int(1)),
        ("49 09", int(-5)),
        ("49 ffffffff0f", int(i32::MIN)),
        ("4e 000000000000f041", Value::Double(4_294_967_296.0)),
        ("4e 000000000000f83f", Value::Double(1.5)),
        ("4e 0000000000000080", Value::Double(-0.0)),
        ("5a 00", Value::BigInt(BigInt::default())),
        ("5a 10 0500000000000000", Value::BigInt(BigInt::from(5_i64))),
        ("5a 11 0500000000000000", Value::BigInt(BigInt::from(-5_i64))),
        ("5a 20 0000000000000000 0100000000000000", Value::BigInt(BigInt::from(1_u128 << 64))),
        ("22 04 6772fcdf", Value::from("grüß")),
        ("63 06 6100 ac20 6200", Value::from("a€b")),
        ("63 02 3dd8", Value::from(Text::from_utf16(vec![0xD83D]))),
        ("6f 7b 00", object(vec![])),
        (
            "6f 49 02 49 04 22 01 61 49 06 7b 02",
            object(vec![(Key::from(1), int(2)), (Key::from("a"), int(3))]),
        ),
        // The string is at an odd offset without the padding.
        ("6f 00 63 02 ac20 63 02 ac20 7b 01", object(vec![(Key::from("€"), Value::from("€"))])),
        ("6f 4e 0000c0ffffffef41 49 06 7b 01", object(vec![(Key::from(4_294_967_294), int(3))])),
        ("6f 22 04 73656c66 5e 00 7b 01", Value::object([("self", Value::Reference(0))])),
        ("41 03 49 02 49 04 49 06 24 00 03", array([int(1), int(2), int(3)])),
        ("41 01 2d 24 00 01", array([Value::Hole])),
        (
            "61 03 49 00 49 02 49 04 49 06 40 02 03",
            sparse(3, vec![(Key::from(0), int(1)), (Key::from(2), int(3))]),
        ),
        ("61 e907 49 d00f 49 02 40 01 e907", sparse(1001, vec![(Key::from(1000), int(1))])),
        ("44 0000000000001440", Value::Date(5.0)),
        ("52 22 02 61e9 03", Value::RegExp(Box::new(RegExp { pattern: "aé".into(), flags: 3 }))),
        ("3b 49 02 49 04 3a 02", Value::Map(Map { entries: vec![(int(1), int(2))] })),
        ("27 49 02 2c 01", Value::Set(Set { values: vec![int(1)] })),
        ("72 54 6d 22 01 78 73 22 02 6174 63 5e 00 2e", Value::from(error)),
        ("72 2e", Value::from(ErrorValue::default())),
        ("42 03 000000", Value::ArrayBuffer(vec![0; 3])),
        (
            "7e 03 08 000000",
            Value::Resizable(Box::new(Resizable { bytes: vec![0; 3], max_length: 8 })),
        ),
        ("5c 00 01 02 01 02", bytes_of(BytesKind::Uint8Array, &[1, 2])),
        ("5c 00 0a 03 616263", Value::buffer(b"abc".to_vec())),
        (
            "5c 00 0c 08 0102030405060708",
            bytes_of(BytesKind::BigUint64Array, &[1, 2, 3, 4, 5, 6, 7, 8]),
        ),
        (
            "5c 01 6f 22 01 61 49 02 7b 01",
            Value::Native(Object { properties: vec![(Key::from("a"), int(1))] }),
        ),
        // The two numbers of the native object come before that of the last one.
        (
            "41 03 5c 01 6f 7b 00 5c 00 0a 01 61 5e 03 24 00 03",
            array([
                Value::Native(Object::default()),
                Value::buffer(b"a".to_vec()),
                Value::Reference(3),
            ]),
        ),
        (
            "42 04 01020304 56 57 02 02",
            Value::View(Box::new(
                View::new(Value::ArrayBuffer(vec![1, 2, 3, 4]), BytesKind::Uint16Array, 2..4)
                    .expect("it fits"),
            )),
        ),
    ]
}

#[test]
fn bytes_of_stock_node_are_read_and_written_again() {
    for (hex, value) in vectors() {
        for version in [13, 15, 16] {
            let payload = [&[0xFF, version][..], &bytes(hex)].concat();
            // Views have flags from version 14 on.
            if hex.contains(" 56 ") && version > 13 {
                assert_eq!(take(&[&payload[..], &[0]].concat()), value, "{hex}");
            } else {
                assert_eq!(take(&payload), value, "{hex} in version {version}");
            }
        }
        assert_eq!(write(&value), [&[0xFF, 13][..], &bytes(hex)].concat(), "{hex}");
    }
}

#[test]
fn boxed_primitives_are_read_and_written_again() {
    let hex = "ff0d 41 05 79 78 6e 000000000000f03f 7a 10 0500000000000000 73 22 01 78 24 00 05";
    let value = take(&bytes(hex));
    assert_eq!(write(&value), bytes(hex));
    let plain: (bool, bool, f64, i64, String) = from_value(value).expect("they are primitives");
    assert_eq!(plain, (true, false, 1.0, 5, "x".to_owned()));
}

#[test]
fn forms_that_nobody_writes_are_read() {
    let same = |hex: &str, value: Value| assert_eq!(take(&bytes(hex)), value, "{hex}");
    same("ff0d 55 05", int(5));
    same("ff0d 55 ffffffff0f", Value::Double(4_294_967_295.0));
    same("ff0d 53 03 e282ac", Value::from("€"));
    same("ff0d 53 01 ff", Value::from("\u{fffd}"));
    same("ff0d 00 00 22 01 61", Value::from("a"));
    same("ff0d 3f 05 49 02", int(1));
    same("ff0d 49 02 trailing bytes: ff ff", int(1));
    same("ff0d 6f 63 02 ac20 00 49 02 00 7b 01", Value::object([("€", 1)]));
    same("ff0d 41 83 80 80 80 00 49 02 49 02 49 02 24 00 03", array([int(1), int(1), int(1)]));
    let capped = Resizable { bytes: vec![], max_length: u32::MAX };
    same("ff10 7e 00 8080808020", Value::Resizable(Box::new(capped)));
    same("ff0d 5a 02 05", Value::BigInt(BigInt::from(5_i64)));
    // An error of Node 20, with its cause before its stack.
    let mut error = ErrorValue::new(ErrorKind::Error, "m");
    error.cause = Some(int(1));
    error.stack = Some("s".into());
    same("ff0f 72 6d 22 01 6d 63 49 02 73 22 01 73 2e", Value::from(error));
}

#[test]
fn views_share_their_buffer() {
    // Two views on one buffer, the second by reference to it.
    let value =
        take(&bytes("ff0f 41 02 42 04 01020304 56 42 00 02 00 5e 01 56 57 02 02 00 24 00 02"));
    assert_eq!(from_value::<Vec<Vec<u16>>>(value.clone()), Ok(vec![vec![1, 2], vec![0x0403]]));
    assert_eq!(
        write(&value),
        bytes("ff0d 41 02 42 04 01020304 56 42 00 02 5e 01 56 57 02 02 24 00 02")
    );
    // On a resizable buffer a view needs flags, which version 13 does not have.
    let flagged = bytes("ff0e 7e 03 08 000000 56 42 00 03 03");
    assert_eq!(write(&take(&flagged)), flagged);
    for odd in [
        "ff0f 42 04 01020304 56 42 03 02 00",
        "ff0f 42 04 01020304 56 57 01 02 00",
        "ff0f 42 04 01020304 56 42 00 02 01",
        "ff0f 42 04 01020304 56 78 00 02 00",
        "ff0e 7e 03 08 000000 56 42 00 03 00",
        "ff0f 41 02 6f 7b 00 5e 01 56 42 00 00 00 24 00 02",
    ] {
        assert!(matches!(refused(odd), ProtocolError::BadValue { .. }), "{odd}");
    }
}

#[test]
fn malformed_payloads_are_told_apart() {
    assert_eq!(refused(""), ProtocolError::EmptyFrame);
    for (hex, version) in [("ff 0c 30", 12), ("ff 11 30", 17), ("30", 0), ("fe 0d", 0)] {
        assert_eq!(refused(hex), ProtocolError::UnknownFormat { version }, "{hex}");
    }
    for hex in [
        "ff0d",
        "ff0d 49",
        "ff0d 49 ffffffffffffffffff7f",
        "ff0d 4e 00",
        "ff0d 22 05 61",
        "ff0d 22 ffffffff0f",
        "ff0d 63 01 61",
        "ff0d 5a ffffffff0f",
        "ff0d 5e 00",
        "ff0d 2d",
        "ff0d 6f 2d 30 7b 01",
        "ff0d 6f 30 30 7b 01",
        "ff0d 6f 6f 7b 00 30 7b 01",
        "ff0d 6f 22 01 61 7b 01",
        "ff0d 6f 22 01 61 30 7b 02",
        "ff0d 41 ffffffff0f",
        "ff0d 41 01 30 24 00 02",
        "ff0d 41 01 30 24 01 01",
        "ff0d 61 05 40 00 06",
        "ff0d 3b 30 3a 01",
        "ff0d 3b 30 30 3a 01",
        "ff0d 27 30 2c 02",
        "ff0d 72 78 2e",
        "ff0d 72 6d 30 2e",
        "ff0d 72 63 30 63 30 2e",
        "ff0d 52 30 00",
        "ff0d 7e 03 02 000000",
        "ff0d 5c 00 0e 00",
        "ff0d 5c 00 03 01 00",
        "ff0d 5c 01 30",
        "ff0d 5c 02",
        // Shared memory, transferred buffers, WebAssembly.
        "ff0d 75 00",
        "ff0d 74 00",
        "ff0d 77 00",
        "ff0d 6d 00",
        "ff0f 70 00",
    ] {
        assert!(matches!(refused(hex), ProtocolError::BadValue { .. }), "{hex}");
    }
}

#[test]
fn limits_hold() {
    let nested = |levels: usize| {
        let open = bytes("41 01").repeat(levels);
        let close = bytes("24 00 01").repeat(levels);
        [&bytes("ff0d")[..], &open, &bytes("30"), &close].concat()
    };
    let limits = Limits { max_depth: 5, max_values: 10, max_message: 100, ..Limits::default() };
    assert!(read(&nested(5), &limits).is_ok());
    assert_eq!(read(&nested(6), &limits), Err(ProtocolError::TooDeep { limit: 5 }));
    let none = Limits { max_depth: 0, ..limits };
    assert_eq!(read(&bytes("ff0d 30"), &none), Ok(Value::Null));
    assert_eq!(read(&nested(1), &none), Err(ProtocolError::TooDeep { limit: 0 }));
    let wide = write(&array(vec![Value::Null; 10]));
    assert_eq!(read(&wide, &limits), Err(ProtocolError::TooManyValues { limit: 10 }));
    assert_eq!(read(&[0xFF; 101], &limits), Err(ProtocolError::TooLong { limit: 100 }));
}

#[test]
fn depth_takes_no_stack() {
    let limits = Limits { max_depth: usize::MAX, ..Limits::default() };
    let levels = 1_000_000;
    let open = bytes("6f 22 01 61").repeat(levels);
    let close = bytes("7b 01").repeat(levels);
    let payload = [&bytes("ff0d")[..], &open, &bytes("30"), &close].concat();
    let value = read(&payload, &limits).expect("there is no limit");
    assert_eq!(
        Objects::of(&value).get(999_999).and_then(|inner| inner.get("a")),
        Some(&Value::Null)
    );
    assert_eq!(write(&value), payload);
    assert!(serde_json::to_string(&value).is_err());
    assert!(from_value::<serde_json::Value>(value).is_err());
    let value = read(&payload, &limits).expect("there is no limit");
    assert!(from_value::<Value>(value).is_err());
    // What is cut off in the middle is dropped as well.
    assert!(read(&payload[..payload.len() / 2], &limits).is_err());
}

#[test]
fn reference_to_nothing_is_not_sent() {
    for nowhere in [array([Value::Reference(1)]), array([Value::Reference(u32::MAX)])] {
        assert_eq!(take(&write(&nowhere)), array([Value::Undefined]));
    }
    assert_eq!(take(&write(&Value::Hole)), Value::Undefined);
    assert_eq!(take(&write(&Value::Set(Set { values: vec![Value::Hole] }))), {
        Value::Set(Set { values: vec![Value::Undefined] })
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_survive_both_ways(value in values::value(false)) {
        let payload = write(&value);
        let again = take(&payload);
        prop_assert_eq!(&again, &value);
        prop_assert_eq!(write(&again), &payload[..]);
        prop_assert_eq!(to_payload(&value), Ok(payload));
        prop_assert_eq!(from_value::<Value>(again), Ok(value));
    }

    #[test]
    fn values_survive_within_a_struct(first in values::value(false), second in values::value(false)) {
        let parts = Parts { count: 2, first, second };
        let whole = take(&to_payload(&parts).expect("it can be sent"));
        prop_assert_eq!(from_value::<Parts>(whole), Ok(parts));
    }

    #[test]
    fn every_truncation_is_an_error(value in values::value(false)) {
        let payload = write(&value);
        for end in 0..payload.len() {
            prop_assert!(read(&payload[..end], &Limits::default()).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn changed_payloads_are_harmless(
        value in values::value(false),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut payload = write(&value);
        for (at, byte) in changes {
            let at = at.index(payload.len() - 2) + 2;
            payload[at] = byte;
        }
        harmless(&payload);
    }

    #[test]
    fn random_bytes_are_harmless(mut payload in prop::collection::vec(any::<u8>(), 2..200)) {
        payload[0] = 0xFF;
        payload[1] = 13 + payload[1] % 4;
        harmless(&payload);
    }
}

/// Whatever is read can be used in every way.
fn harmless(payload: &[u8]) {
    let Ok(value) = read(payload, &Limits::default()) else { return };
    let payload = write(&value);
    assert_eq!(write(&take(&payload)), payload);
    let _ = serde_json::to_string(&value);
    let _ = from_value::<serde_json::Value>(value.clone());
    let _ = parse_value(value, &Limits::default());
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Parts {
    first: Value,
    count: u32,
    second: Value,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    Unit,
    New(u8),
    Tuple(i8, String),
    Struct { a: Option<bool> },
}

/// Bytes as serde has them.
#[derive(Debug, PartialEq)]
struct Blob(Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BlobVisitor;
        impl serde::de::Visitor<'_> for BlobVisitor {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(BlobVisitor)
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Everything {
    small: (i8, i16, i32, u8, u16, u32),
    large: (i64, u64, i128, u128),
    exact: (i64, u64),
    float: (f32, f64, f64),
    text: (char, String),
    none: Option<u8>,
    some: Option<u8>,
    unit: (),
    list: Vec<Vec<u8>>,
    blob: Blob,
    names: HashMap<String, u8>,
    numbers: BTreeMap<i32, String>,
    empty: BTreeMap<i32, String>,
    shapes: Vec<Shape>,
}

fn everything() -> Everything {
    Everything {
        small: (-1, -2, i32::MIN, 3, 4, u32::MAX),
        large: (i64::MIN, u64::MAX, i128::MIN, u128::MAX),
        exact: (-(1 << 53), 1 << 53),
        float: (0.1, -0.0, 1e300),
        text: ('€', "grüße 😀".to_owned()),
        none: None,
        some: Some(1),
        unit: (),
        list: vec![vec![], vec![1, 2]],
        blob: Blob(vec![0, 255]),
        names: HashMap::from([("a".to_owned(), 1)]),
        numbers: BTreeMap::from([(-1, "x".to_owned()), (7, "y".to_owned())]),
        empty: BTreeMap::new(),
        shapes: vec![
            Shape::Unit,
            Shape::New(1),
            Shape::Tuple(-1, "t".to_owned()),
            Shape::Struct { a: None },
        ],
    }
}

#[test]
fn types_of_serde_survive_both_ways() {
    let value = take(&to_payload(&everything()).expect("it can be sent"));
    assert_eq!(from_value::<Everything>(value.clone()), Ok(everything()));
    let large = value.get("large").and_then(Value::as_array).expect("a tuple is an array");
    assert!(large.iter().all(|number| matches!(number, Value::BigInt(_))));
    let exact = value.get("exact").and_then(Value::as_array).expect("a tuple is an array");
    assert_eq!(exact[1], Value::Double(9_007_199_254_740_992.0));
    assert!(matches!(value.get("numbers"), Some(Value::Map(_))));
    assert!(matches!(value.get("names"), Some(Value::Object(_))));
    assert_eq!(value.get("blob"), Some(&Value::buffer(vec![0, 255])));
    assert_eq!(value.get("none"), Some(&Value::Null));
}

#[test]
fn what_javascript_sends_fits_rust_types() {
    #[derive(Debug, PartialEq, Deserialize)]
    struct Message {
        missing: Option<u8>,
        undefined: Option<u8>,
        #[serde(default)]
        defaulted: u8,
        when: f64,
        whole: u64,
        blob: Blob,
        doubles: Vec<f64>,
        set: Vec<u8>,
        map: HashMap<String, u8>,
        holes: Vec<Option<u8>>,
        sparse: Vec<Option<u8>>,
        error: HashMap<String, String>,
        indices: BTreeMap<u32, bool>,
    }
    let sparse = SparseArray { length: 3, properties: vec![(Key::from(1), int(1))] };
    let doubles = Bytes::new(BytesKind::Float64Array, 1.5_f64.to_le_bytes().to_vec());
    let value = Value::object([
        ("undefined", Value::Undefined),
        ("defaulted", Value::Undefined),
        ("when", Value::Date(5.0)),
        ("whole", Value::Double(4_294_967_296.0)),
        ("blob", Value::Bytes(Bytes::new(BytesKind::Uint8Array, vec![1]).expect("it is whole"))),
        ("doubles", Value::Bytes(doubles.expect("it is whole"))),
        ("set", Value::Set(Set { values: vec![int(1), int(2)] })),
        ("map", Value::Map(Map { entries: vec![(Value::from("a"), int(1))] })),
        ("holes", array([int(1), Value::Hole, Value::Undefined])),
        ("sparse", Value::SparseArray(Box::new(sparse))),
        ("error", Value::from(ErrorValue::new(ErrorKind::RangeError, "m"))),
        ("indices", Value::Object(Object { properties: vec![(Key::from(7), Value::Bool(true))] })),
    ]);
    let text = |text: &str| text.to_owned();
    let expected = Message {
        missing: None,
        undefined: None,
        defaulted: 0,
        when: 5.0,
        whole: 1 << 32,
        blob: Blob(vec![1]),
        doubles: vec![1.5],
        set: vec![1, 2],
        map: HashMap::from([(text("a"), 1)]),
        holes: vec![Some(1), None, None],
        sparse: vec![None, Some(1), None],
        error: HashMap::from([(text("name"), text("RangeError")), (text("message"), text("m"))]),
        indices: BTreeMap::from([(7, true)]),
    };
    assert_eq!(from_value::<Message>(value), Ok(expected));
}

#[test]
fn value_is_data_like_json_to_other_formats() {
    let value = Value::object([
        ("u", Value::Undefined),
        ("i", int(1)),
        ("b", Value::BigInt(BigInt::from(u64::MAX))),
        ("a", array([Value::Hole, Value::from("x"), Value::Reference(1)])),
        ("m", Value::Map(Map { entries: vec![(Value::from("k"), Value::Date(5.0))] })),
        ("r", Value::RegExp(Box::new(RegExp { pattern: "a".into(), flags: 1 }))),
        ("s", Value::Reference(2)),
    ]);
    // The array contains itself.
    assert!(serde_json::to_string(&value).is_err());
    let Value::Object(mut object) = value else { unreachable!("it was built as one") };
    object.properties[3].1 = array([Value::Hole, Value::from("x")]);
    assert_eq!(
        serde_json::to_string(&Value::Object(object)).expect("it is data"),
        r#"{"i":1,"b":18446744073709551615,"a":[null,"x"],"m":{"k":5.0},"r":"/a/g","s":{"k":5.0}}"#
    );
    let text = r#"{"a":[1,-1,1.5,null,true,"x",{}],"b":18446744073709551615}"#;
    let value: Value = serde_json::from_str(text).expect("it is JSON");
    assert_eq!(value.get("b"), Some(&Value::BigInt(BigInt::from(u64::MAX))));
    assert_eq!(serde_json::to_string(&value).expect("it is data"), text);
}

#[test]
fn small_message_cannot_become_a_large_one() {
    // Each level mentions the one before twice.
    let mut elements = vec![array([Value::from("x")])];
    for level in 1..60 {
        elements.push(array([Value::Reference(level), Value::Reference(level)]));
    }
    let bomb = array(elements);
    assert!(from_value::<serde_json::Value>(bomb.clone()).is_err());
    assert!(serde_json::to_string(&bomb).is_err());
    // Nor does a gap.
    let sparse = SparseArray { length: u32::MAX, properties: vec![] };
    assert!(from_value::<Vec<Option<u8>>>(Value::SparseArray(Box::new(sparse))).is_err());
    let cycle = Value::object([("self", Value::Reference(0))]);
    assert!(from_value::<serde_json::Value>(cycle.clone()).is_err());
    assert_eq!(from_value::<Value>(cycle.clone()), Ok(cycle));
}

#[test]
fn part_of_a_message_keeps_its_own_references() {
    #[derive(Deserialize)]
    struct Two {
        first: Value,
        second: Value,
    }
    let own = Value::object([("self", Value::Reference(1))]);
    let message = Value::object([("first", own), ("second", Value::Reference(1))]);
    let two: Two = from_value(message).expect("nothing is shared within the parts");
    let alone = Value::object([("self", Value::Reference(0))]);
    assert_eq!((two.first, two.second), (alone.clone(), alone));
    let inner = Value::object([("outer", Value::Reference(0))]);
    assert!(from_value::<Two>(Value::object([("first", inner), ("second", Value::Null)])).is_err());
}

/// The message in a frame.
fn framed(frame: &[u8]) -> Incoming<Value> {
    let mut decoder = FrameDecoder::new(Limits::default());
    decoder.feed(frame);
    let payload = decoder.next().expect("it is a frame").expect("it is complete");
    assert!(!decoder.has_partial());
    parse_value(take(&payload), &Limits::default()).expect("it is a message")
}

#[test]
fn lines_made_for_node_are_the_same_in_frames() {
    assert_eq!(framed(&transcode_line(HANDLE_ACK).expect("it is JSON")), Incoming::HandleAck);
    assert_eq!(framed(&transcode_line(HANDLE_NACK).expect("it is JSON")), Incoming::HandleNack);
    let ack = transcode_line(HANDLE_ACK).expect("it is JSON");
    assert_eq!(
        ack,
        bytes("0000001b ff0d 6f 22 03 636d64 22 0f 4e4f44455f48414e444c455f41434b 7b 01")
    );
    let count = framed(&transcode_line(&cluster::socket_count("k", 3)).expect("it is JSON"));
    assert_eq!(count, Incoming::SocketCount { key: "k".into(), count: 3 });
    let line = cluster::new_connection("k", 8);
    let marked = [&b"\x02"[..], &line].concat();
    assert_eq!(transcode_line(&line), transcode_line(&marked));
    let Incoming::Handle(envelope) = framed(&transcode_line(&line).expect("it is JSON")) else {
        panic!("it is an envelope")
    };
    assert_eq!(envelope.kind, HandleKind::NetNative);
    assert!(matches!(*envelope.message, Incoming::Cluster(_)));
    for odd in [&b""[..], b"\n", b"{", b"\xff", b"1 2"] {
        assert!(transcode_line(odd).is_err());
    }
}

#[test]
fn internal_messages_are_told_apart() {
    let said = |properties: Vec<(&str, Value)>| {
        parse_value(Value::object(properties), &Limits::default()).expect("it is a message")
    };
    let Incoming::Cluster(message) = said(vec![
        ("cmd", Value::from("NODE_CLUSTER")),
        ("act", Value::from("queryServer")),
        ("seq", int(4)),
        ("port", int(8000)),
        ("fd", Value::Undefined),
        ("data", Value::Null),
        ("flags", Value::Undefined),
        ("address", Value::Null),
        ("addressType", int(4)),
        ("backlog", Value::Bool(false)),
    ]) else {
        panic!("it is of the cluster")
    };
    let FromWorker::QueryServer(query) = message.body else { panic!("{message:?}") };
    assert_eq!((message.seq, query.port, query.fd, query.flags), (Some(4), Some(8000), None, None));
    let user = vec![("cmd", Value::from("NODE_"))];
    assert_eq!(said(user.clone()), Incoming::User(Value::object(user)));
    let other = Incoming::OtherInternal { cmd: "NODE_X".into() };
    assert_eq!(said(vec![("cmd", Value::from("NODE_X")), ("d", Value::Date(0.0))]), other);
    assert_eq!(
        parse_value(Value::from("x"), &Limits::default()),
        Ok(Incoming::User(Value::from("x")))
    );
}

#[test]
fn envelopes_carry_values_with_their_references() {
    let message =
        Value::object([("self", Value::Reference(0)), ("map", Value::Map(Map::default()))]);
    let frame = handle_message(&HandleKind::NetSocket, &message, Some("4:x:0"), None);
    let Incoming::Handle(envelope) = framed(&frame.expect("it can be sent")) else {
        panic!("it is an envelope")
    };
    assert_eq!((envelope.kind, envelope.key.as_deref()), (HandleKind::NetSocket, Some("4:x:0")));
    assert_eq!(*envelope.message, Incoming::User(message));
    let udp = handle_message(&HandleKind::DgramSocket, "text", None, Some(DgramType::Udp6));
    let Incoming::Handle(envelope) = framed(&udp.expect("it can be sent")) else {
        panic!("it is an envelope")
    };
    assert_eq!(envelope.dgram_type, Some(DgramType::Udp6));
    assert_eq!(*envelope.message, Incoming::User(Value::from("text")));
    let line = transcode_line(&cluster::handle_message(HandleKind::NetServer, "[1]", None));
    let same = handle_message(&HandleKind::NetServer, &[1], None, None).expect("it can be sent");
    assert_eq!(framed(&line.expect("it is JSON")), framed(&same));
}

fn wrapped(message: Value) -> Value {
    Value::object([
        ("cmd", Value::from("NODE_HANDLE")),
        ("type", Value::from("net.Native")),
        ("msg", message),
    ])
}

#[test]
fn retransmitted_envelope_is_unwrapped_to_the_innermost() {
    let message = Value::object([("self", Value::Reference(2))]);
    let mut inner = wrapped(message);
    if let Value::Object(object) = &mut inner {
        object.properties[1].1 = Value::from("net.Socket");
        object.properties.push((Key::from("key"), Value::from("k")));
    }
    let Ok(Incoming::Handle(envelope)) = parse_value(wrapped(inner), &Limits::default()) else {
        panic!("it is an envelope")
    };
    assert_eq!((envelope.kind, envelope.key.as_deref()), (HandleKind::NetSocket, Some("k")));
    let alone = Value::object([("self", Value::Reference(0))]);
    assert_eq!(*envelope.message, Incoming::User(alone));
}

#[test]
fn odd_envelopes_are_refused_or_tolerated() {
    let parse = |value| parse_value(value, &Limits::default());
    let shares = wrapped(Value::object([("outer", Value::Reference(0))]));
    assert!(matches!(parse(shares), Err(ProtocolError::BadEnvelope { .. })));
    assert!(matches!(parse(wrapped(Value::Reference(0))), Err(ProtocolError::BadEnvelope { .. })));
    let endless = (0..9).fold(Value::Null, |inner, _| wrapped(inner));
    assert!(matches!(parse(endless), Err(ProtocolError::BadEnvelope { .. })));
    let ack = wrapped(Value::object([("cmd", "NODE_HANDLE_ACK")]));
    let Ok(Incoming::Handle(envelope)) = parse(ack) else { panic!("it is an envelope") };
    assert!(matches!(*envelope.message, Incoming::OtherInternal { .. }));
    let Ok(Incoming::Handle(envelope)) = parse(Value::object([("cmd", "NODE_HANDLE")])) else {
        panic!("it is an envelope")
    };
    assert_eq!(envelope.kind, HandleKind::Other(String::new()));
    assert_eq!(*envelope.message, Incoming::User(Value::Null));
}

#[test]
fn frame_is_the_payload_behind_its_length() {
    let value = Value::object([("a", "€")]);
    let payload = write(&value);
    let frame = write_frame(&value).expect("it is short");
    let length = u32::try_from(payload.len()).expect("it is short");
    assert_eq!(frame, [&length.to_be_bytes()[..], &payload].concat());
    assert_eq!(to_frame(&value), Ok(frame));
}
