//! Random values, for the tests of the advanced encoding.
//!
//! What comes out is what V8 would keep: keys are unique, typed arrays are whole, and references point to objects
//! before them.

use polyfork_wire::node::advanced::{
    Array, BigInt, Boxed, Bytes, BytesKind, ErrorKind, ErrorValue, Key, Map, Object, RegExp,
    Resizable, Set, SparseArray, Text, Value, View,
};
use proptest::prelude::*;

const KINDS: [BytesKind; 14] = [
    BytesKind::Int8Array,
    BytesKind::Uint8Array,
    BytesKind::Uint8ClampedArray,
    BytesKind::Int16Array,
    BytesKind::Uint16Array,
    BytesKind::Int32Array,
    BytesKind::Uint32Array,
    BytesKind::Float32Array,
    BytesKind::Float64Array,
    BytesKind::DataView,
    BytesKind::Buffer,
    BytesKind::BigInt64Array,
    BytesKind::BigUint64Array,
    BytesKind::Float16Array,
];

const ERRORS: [ErrorKind; 7] = [
    ErrorKind::Error,
    ErrorKind::EvalError,
    ErrorKind::RangeError,
    ErrorKind::ReferenceError,
    ErrorKind::SyntaxError,
    ErrorKind::TypeError,
    ErrorKind::UriError,
];

/// Values that every living version of Node reads and sends back as they are, if `stock`; any otherwise.
pub(crate) fn value(stock: bool) -> impl Strategy<Value = Value> {
    let tree = leaf(stock).prop_recursive(5, 60, 6, move |inner| {
        let mut kinds = vec![
            properties(inner.clone())
                .prop_map(|properties| Value::Object(Object { properties }))
                .boxed(),
            array(inner.clone()).boxed(),
            sparse(inner.clone()).boxed(),
            prop::collection::vec((inner.clone(), inner.clone()), 0..4).prop_map(map).boxed(),
            prop::collection::vec(inner.clone(), 0..4).prop_map(set).boxed(),
            error(inner.clone(), stock).boxed(),
        ];
        if !stock {
            kinds.push(
                properties(inner)
                    .prop_map(|properties| Value::Native(Object { properties }))
                    .boxed(),
            );
        }
        prop::strategy::Union::new(kinds)
    });
    tree.prop_map(|inner| {
        let mut root = Value::object([("v", inner)]);
        Numbering::default().fix(&mut root);
        root
    })
}

fn leaf(stock: bool) -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        any::<i32>().prop_map(Value::Int),
        (-2.0e20..2.0e20_f64).prop_map(Value::Double),
        Just(Value::Double(f64::INFINITY)),
        Just(Value::Double(0.1)),
        Just(Value::Double(4_294_967_296.0)),
    ];
    let simple = prop_oneof![
        Just(Value::Undefined),
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        bigint().prop_map(Value::BigInt),
        text().prop_map(Value::String),
    ];
    let time = (-8_640_000_000_000_000_i64..=8_640_000_000_000_000).prop_map(|time| {
        #[expect(clippy::cast_precision_loss, reason = "the limits are exact")]
        Value::Date(time as f64)
    });
    let boxed = prop_oneof![
        any::<bool>().prop_map(Boxed::Bool),
        (-1.0e9..1.0e9_f64).prop_map(Boxed::Number),
        bigint().prop_map(Boxed::BigInt),
        text().prop_map(Boxed::String),
    ];
    let regexp = (prop::sample::select(vec!["a+", "(?:x|é)", "[€]"]), 0..64_u32).prop_map(
        |(pattern, flags)| Value::RegExp(Box::new(RegExp { pattern: pattern.into(), flags })),
    );
    let others = prop_oneof![
        time,
        boxed.prop_map(|boxed| Value::Boxed(Box::new(boxed))),
        regexp,
        any::<u32>().prop_map(Value::Reference),
    ];
    prop_oneof![3 => number, 4 => simple, 2 => others, 2 => binary(stock)]
}

fn binary(stock: bool) -> BoxedStrategy<Value> {
    let content = || prop::collection::vec(any::<u8>(), 0..20);
    let kinds = if stock { &KINDS[..13] } else { &KINDS[..] };
    let bytes = (prop::sample::select(kinds), content()).prop_map(|(kind, mut bytes)| {
        bytes.truncate(bytes.len() / kind.element_bytes() * kind.element_bytes());
        Value::Bytes(Bytes::new(kind, bytes).expect("whole elements"))
    });
    let resizable = (content(), 0..20_u32).prop_map(|(bytes, more)| {
        let max_length = u32::try_from(bytes.len()).expect("it is short") + more;
        Value::Resizable(Box::new(Resizable { bytes, max_length }))
    });
    let buffer = prop_oneof![content().prop_map(Value::ArrayBuffer), resizable].boxed();
    if stock {
        return prop_oneof![bytes, buffer].boxed();
    }
    let view = (buffer.clone(), prop::sample::select(&KINDS[..]), 0..2_u32, 0..3_u32).prop_map(
        |(buffer, kind, from, count)| {
            let size = u32::try_from(kind.element_bytes()).expect("at most eight");
            let plain = buffer.clone();
            View::new(buffer, kind, from * size..(from + count) * size)
                .map_or(plain, |view| Value::View(Box::new(view)))
        },
    );
    prop_oneof![bytes, buffer, view].boxed()
}

fn bigint() -> impl Strategy<Value = BigInt> {
    (any::<bool>(), prop::collection::vec(any::<u64>(), 0..4))
        .prop_map(|(negative, digits)| BigInt::new(negative, digits))
}

fn text() -> impl Strategy<Value = Text> {
    prop_oneof![
        "[a-z]{0,10}".prop_map(Text::from),
        "[a-é€😀]{0,5}".prop_map(Text::from),
        any::<String>().prop_map(Text::from),
        prop::collection::vec(prop_oneof![Just(0xD83D), Just(0xDE00), any::<u16>()], 0..5)
            .prop_map(Text::from_utf16),
    ]
}

/// Unique names: indices first, in order, as V8 has them.
fn properties(inner: impl Strategy<Value = Value>) -> impl Strategy<Value = Vec<(Key, Value)>> {
    let names = prop::collection::btree_set(
        prop_oneof![
            3 => "[a-z]{1,3}".prop_map(|name| (u32::MAX, name)),
            1 => "€[a-z]".prop_map(|name| (u32::MAX, name)),
            1 => (0..u32::MAX).prop_map(|index| (index, String::new())),
        ],
        0..5,
    );
    (names, prop::collection::vec(inner, 5)).prop_map(|(names, values)| {
        let key = |(index, name): (u32, String)| match index {
            u32::MAX => Key::from(name),
            index => Key::from(index),
        };
        names.into_iter().map(key).zip(values).collect()
    })
}

fn array(inner: impl Strategy<Value = Value> + Clone) -> impl Strategy<Value = Value> {
    let element = prop_oneof![6 => inner.clone(), 1 => Just(Value::Hole)];
    (prop::collection::vec(element, 0..6), prop::option::weighted(0.2, inner)).prop_map(
        |(elements, named)| {
            let properties = named.map(|value| vec![(Key::from("named"), value)]);
            let named = properties.map(|properties| Box::new(Object { properties }));
            Value::Array(Array { elements, named })
        },
    )
}

fn sparse(inner: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    properties(inner).prop_map(|mut properties| {
        properties.retain(|(key, _)| !matches!(key, Key::Number(index) if *index >= 5.0e8));
        let index = |key: &Key| if let Key::Number(index) = key { *index } else { -1.0 };
        let last = properties.iter().map(|(key, _)| index(key)).fold(-1.0, f64::max);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let length = (last + 1.0) as u32;
        Value::SparseArray(Box::new(SparseArray { length, properties }))
    })
}

/// What JavaScript takes for the same key; numbers of the two kinds may be equal. A reference has none, as it
/// could be to another key of the same collection.
fn same(value: &Value) -> Option<String> {
    match value.as_f64() {
        Some(number) => Some(format!("{number:?}")),
        None if matches!(value, Value::Reference(_)) => None,
        None => Some(format!("{value:?}")),
    }
}

fn map(entries: Vec<(Value, Value)>) -> Value {
    let mut seen = std::collections::HashSet::new();
    let entries =
        entries.into_iter().filter(|(key, _)| same(key).is_some_and(|key| seen.insert(key)));
    Value::Map(Map { entries: entries.collect() })
}

fn set(values: Vec<Value>) -> Value {
    let mut seen = std::collections::HashSet::new();
    let values = values.into_iter().filter(|value| same(value).is_some_and(|key| seen.insert(key)));
    Value::Set(Set { values: values.collect() })
}

fn error(inner: impl Strategy<Value = Value>, stock: bool) -> impl Strategy<Value = Value> {
    let part = move || {
        (text(), any::<bool>()).prop_map(move |(text, given)| (stock || given).then_some(text))
    };
    let kind = prop::sample::select(&ERRORS[..]);
    (kind, part(), part(), prop::option::of(inner)).prop_map(|(kind, message, stack, cause)| {
        Value::from(ErrorValue { kind, message, stack, cause })
    })
}

/// Makes references point to what comes before them and is complete or may contain itself.
#[derive(Default)]
struct Numbering {
    next: u32,
    known: Vec<u32>,
}

impl Numbering {
    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    fn fix(&mut self, value: &mut Value) {
        let id = match value {
            Value::Undefined
            | Value::Null
            | Value::Bool(_)
            | Value::Int(_)
            | Value::Double(_)
            | Value::BigInt(_)
            | Value::String(_)
            | Value::Hole => return,
            Value::Reference(id) => {
                *id = self.known[*id as usize % self.known.len()];
                return;
            }
            Value::Native(_) => {
                self.number();
                self.number()
            }
            Value::View(_) => {
                self.known.push(self.next);
                self.number();
                self.number()
            }
            _ => self.number(),
        };
        // An error or a view is complete before anything can refer to it.
        let late = matches!(value, Value::Error(_) | Value::Native(_));
        if !late {
            self.known.push(id);
        }
        match value {
            Value::Object(object) | Value::Native(object) => self.fix_all(&mut object.properties),
            Value::Array(array) => {
                array.elements.iter_mut().for_each(|element| self.fix(element));
                array.named.iter_mut().for_each(|named| self.fix_all(&mut named.properties));
            }
            Value::SparseArray(array) => self.fix_all(&mut array.properties),
            Value::Map(map) => map.entries.iter_mut().for_each(|(key, value)| {
                self.fix(key);
                self.fix(value);
            }),
            Value::Set(set) => set.values.iter_mut().for_each(|value| self.fix(value)),
            Value::Error(error) => error.cause.iter_mut().for_each(|cause| self.fix(cause)),
            _ => {}
        }
        if late {
            self.known.push(id);
        }
    }

    fn fix_all(&mut self, properties: &mut [(Key, Value)]) {
        properties.iter_mut().for_each(|(_, value)| self.fix(value));
    }
}
