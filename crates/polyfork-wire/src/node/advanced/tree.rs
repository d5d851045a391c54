//! Copies, compares and shows a [`Value`] without recursion: a peer decides how deep a tree is, not our stack.
//!
//! Dropping is in `value`, next to the types it takes apart. The containers derive all three, which is
//! sound because they reach their values through the implementations here.
//!
//! The surprising rule: `{:#?}` shows the same single line as `{:?}`, because what indents it would recurse.

use std::fmt;

use super::value::{Array, ErrorValue, Map, Object, Set, SparseArray, Value};

/// A step of a copy, last one first.
enum Copying<'a> {
    /// Copy this and all below it.
    Enter(&'a Value),
    /// All nested values of this are copied: put it together.
    Leave(&'a Value),
}

impl Clone for Value {
    fn clone(&self) -> Self {
        if !self.is_nested() {
            return self.shallow();
        }
        let mut done = Vec::new();
        let mut steps = vec![Copying::Enter(self)];
        let mut children = Vec::new();
        while let Some(step) = steps.pop() {
            match step {
                Copying::Enter(value) => {
                    steps.push(Copying::Leave(value));
                    value.children(&mut children);
                    let nested = children.drain(..).filter(|child| child.is_nested());
                    steps.extend(nested.map(Copying::Enter));
                }
                Copying::Leave(value) => {
                    // The last child was copied first, so they come off in order.
                    let copy = value.assemble(|child| {
                        if child.is_nested() {
                            done.pop().unwrap_or_default()
                        } else {
                            child.shallow()
                        }
                    });
                    done.push(copy);
                }
            }
        }
        done.pop().unwrap_or_default()
    }
}

impl Value {
    /// A container like this one, of the values that `part` makes of its own, in order.
    fn assemble(&self, mut part: impl FnMut(&Self) -> Self) -> Self {
        let mut pairs = |pairs: &[(_, Self)]| {
            let copied =
                pairs.iter().map(|(key, value): &(super::Key, _)| (key.clone(), part(value)));
            copied.collect::<Vec<_>>()
        };
        match self {
            Self::Object(object) => Self::Object(Object { properties: pairs(&object.properties) }),
            Self::Native(object) => Self::Native(Object { properties: pairs(&object.properties) }),
            Self::SparseArray(array) => Self::SparseArray(Box::new(SparseArray {
                length: array.length,
                properties: pairs(&array.properties),
            })),
            Self::Array(array) => {
                let elements = array.elements.iter().map(&mut part).collect();
                let named = array.named.as_ref().map(|named| {
                    let copied =
                        named.properties.iter().map(|(key, value)| (key.clone(), part(value)));
                    Box::new(Object { properties: copied.collect() })
                });
                Self::Array(Array { elements, named })
            }
            Self::Map(map) => {
                let copied = map.entries.iter().map(|(key, value)| (part(key), part(value)));
                Self::Map(Map { entries: copied.collect() })
            }
            Self::Set(set) => Self::Set(Set { values: set.values.iter().map(part).collect() }),
            Self::Error(error) => Self::Error(Box::new(ErrorValue {
                kind: error.kind,
                message: error.message.clone(),
                stack: error.stack.clone(),
                cause: error.cause.as_ref().map(part),
            })),
            other => other.shallow(),
        }
    }

    /// A copy of what has no values in it.
    fn shallow(&self) -> Self {
        match self {
            Self::Undefined => Self::Undefined,
            Self::Null => Self::Null,
            Self::Bool(value) => Self::Bool(*value),
            Self::Int(number) => Self::Int(*number),
            Self::Double(number) => Self::Double(*number),
            Self::BigInt(number) => Self::BigInt(number.clone()),
            Self::String(text) => Self::String(text.clone()),
            Self::Hole => Self::Hole,
            Self::Date(time) => Self::Date(*time),
            Self::RegExp(expression) => Self::RegExp(expression.clone()),
            Self::Boxed(value) => Self::Boxed(value.clone()),
            Self::ArrayBuffer(bytes) => Self::ArrayBuffer(bytes.clone()),
            Self::Resizable(buffer) => Self::Resizable(buffer.clone()),
            Self::Bytes(bytes) => Self::Bytes(bytes.clone()),
            Self::View(view) => Self::View(view.clone()),
            Self::Reference(number) => Self::Reference(*number),
            // Empty ones.
            Self::Object(_)
            | Self::Native(_)
            | Self::Array(_)
            | Self::SparseArray(_)
            | Self::Map(_)
            | Self::Set(_)
            | Self::Error(_) => self.assemble(Self::shallow),
        }
    }

    /// Whether two values are the same apart from the values in them, of which there are as many in both.
    fn is_like(&self, other: &Self) -> bool {
        fn keys<K: PartialEq, V>(one: &[(K, V)], other: &[(K, V)]) -> bool {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| one.0 == other.0)
        }
        match (self, other) {
            (Self::Undefined, Self::Undefined)
            | (Self::Null, Self::Null)
            | (Self::Hole, Self::Hole) => true,
            (Self::Bool(one), Self::Bool(other)) => one == other,
            (Self::Int(one), Self::Int(other)) => one == other,
            (Self::Double(one), Self::Double(other)) | (Self::Date(one), Self::Date(other)) => {
                one == other
            }
            (Self::BigInt(one), Self::BigInt(other)) => one == other,
            (Self::String(one), Self::String(other)) => one == other,
            (Self::Object(one), Self::Object(other)) | (Self::Native(one), Self::Native(other)) => {
                keys(&one.properties, &other.properties)
            }
            (Self::Array(one), Self::Array(other)) => {
                one.elements.len() == other.elements.len()
                    && match (&one.named, &other.named) {
                        (None, None) => true,
                        (Some(one), Some(other)) => keys(&one.properties, &other.properties),
                        _ => false,
                    }
            }
            (Self::SparseArray(one), Self::SparseArray(other)) => {
                one.length == other.length && keys(&one.properties, &other.properties)
            }
            (Self::Map(one), Self::Map(other)) => one.entries.len() == other.entries.len(),
            (Self::Set(one), Self::Set(other)) => one.values.len() == other.values.len(),
            (Self::RegExp(one), Self::RegExp(other)) => one == other,
            (Self::Boxed(one), Self::Boxed(other)) => one == other,
            (Self::Error(one), Self::Error(other)) => {
                let parts = |error: &ErrorValue| (error.kind, error.cause.is_some());
                parts(one) == parts(other)
                    && one.message == other.message
                    && one.stack == other.stack
            }
            (Self::ArrayBuffer(one), Self::ArrayBuffer(other)) => one == other,
            (Self::Resizable(one), Self::Resizable(other)) => one == other,
            (Self::Bytes(one), Self::Bytes(other)) => one == other,
            (Self::View(one), Self::View(other)) => one == other,
            (Self::Reference(one), Self::Reference(other)) => one == other,
            _ => false,
        }
    }
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        let mut pairs = vec![(self, other)];
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        while let Some((one, other)) = pairs.pop() {
            if !one.is_like(other) {
                return false;
            }
            // A view was compared as a whole.
            if one.is_nested() {
                one.children(&mut ours);
                other.children(&mut theirs);
                pairs.extend(ours.drain(..).zip(theirs.drain(..)));
            }
        }
        true
    }
}

/// What is still to be shown, last one first.
enum Showing<'a> {
    Value(&'a Value),
    Key(&'a super::Key),
    Text(&'static str),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Showing::Text;
        let mut rest = vec![Showing::Value(self)];
        while let Some(piece) = rest.pop() {
            let value = match piece {
                Text(text) => {
                    f.write_str(text)?;
                    continue;
                }
                Showing::Key(super::Key::Text(name)) => {
                    write!(f, "{name:?}")?;
                    continue;
                }
                Showing::Key(super::Key::Number(number)) => {
                    write!(f, "{number}")?;
                    continue;
                }
                Showing::Value(value) => value,
            };
            let begins = rest.len();
            match value {
                Self::Undefined => f.write_str("Undefined")?,
                Self::Null => f.write_str("Null")?,
                Self::Hole => f.write_str("Hole")?,
                Self::Bool(value) => write!(f, "Bool({value})")?,
                Self::Int(number) => write!(f, "Int({number})")?,
                Self::Double(number) => write!(f, "Double({number:?})")?,
                Self::Date(time) => write!(f, "Date({time:?})")?,
                Self::BigInt(number) => write!(f, "{number:?}")?,
                Self::String(text) => write!(f, "String({text:?})")?,
                Self::RegExp(expression) => write!(f, "{expression:?}")?,
                Self::Boxed(value) => write!(f, "Boxed({value:?})")?,
                Self::ArrayBuffer(bytes) => write!(f, "ArrayBuffer({bytes:?})")?,
                Self::Resizable(buffer) => write!(f, "{buffer:?}")?,
                Self::Bytes(bytes) => write!(f, "{bytes:?}")?,
                Self::View(view) => write!(f, "{view:?}")?,
                Self::Reference(number) => write!(f, "Reference({number})")?,
                Self::Object(object) => show_properties("Object {", &object.properties, &mut rest),
                Self::Native(object) => show_properties("Native {", &object.properties, &mut rest),
                Self::Array(array) => {
                    rest.push(Text("Array ["));
                    show_list(&array.elements, &mut rest);
                    rest.push(Text("]"));
                    if let Some(named) = &array.named {
                        show_properties(" with {", &named.properties, &mut rest);
                    }
                }
                Self::SparseArray(array) => {
                    write!(f, "SparseArray of {} ", array.length)?;
                    show_properties("{", &array.properties, &mut rest);
                }
                Self::Map(map) => {
                    rest.push(Text("Map {"));
                    for (at, (key, value)) in map.entries.iter().enumerate() {
                        rest.push(Text(if at == 0 { "" } else { ", " }));
                        rest.push(Showing::Value(key));
                        rest.push(Text(" => "));
                        rest.push(Showing::Value(value));
                    }
                    rest.push(Text("}"));
                }
                Self::Set(set) => {
                    rest.push(Text("Set {"));
                    show_list(&set.values, &mut rest);
                    rest.push(Text("}"));
                }
                Self::Error(error) => {
                    write!(f, "{:?}({:?}, {:?}", error.kind, error.message, error.stack)?;
                    if let Some(cause) = &error.cause {
                        rest.push(Text(", cause: "));
                        rest.push(Showing::Value(cause));
                    }
                    rest.push(Text(")"));
                }
            }
            // Written in reading order, taken from the end.
            rest[begins..].reverse();
        }
        Ok(())
    }
}

fn show_list<'a>(values: &'a [Value], to: &mut Vec<Showing<'a>>) {
    for (at, value) in values.iter().enumerate() {
        to.push(Showing::Text(if at == 0 { "" } else { ", " }));
        to.push(Showing::Value(value));
    }
}

fn show_properties<'a>(
    begin: &'static str,
    properties: &'a [(super::Key, Value)],
    to: &mut Vec<Showing<'a>>,
) {
    to.push(Showing::Text(begin));
    for (at, (key, value)) in properties.iter().enumerate() {
        to.push(Showing::Text(if at == 0 { "" } else { ", " }));
        to.push(Showing::Key(key));
        to.push(Showing::Text(": "));
        to.push(Showing::Value(value));
    }
    to.push(Showing::Text("}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::advanced::{ErrorKind, Key};

    /// Every kind of container in turn, each with something beside what is deeper.
    fn deep(levels: usize) -> Value {
        let deeper: [fn(Value) -> Value; 7] = [
            |value| Value::object([("a", Value::Int(1)), ("b", value), ("c", "x".into())]),
            |value| Value::from(vec![value, Value::Hole, Value::from(vec![0])]),
            |value| Value::Map(Map { entries: vec![(value, Value::Null)] }),
            |value| Value::Set(Set { values: vec![Value::Bool(true), value] }),
            |value| {
                let mut error = ErrorValue::new(ErrorKind::TypeError, "x");
                error.cause = Some(value);
                Value::from(error)
            },
            |value| {
                let properties = vec![(Key::from(7), value)];
                Value::SparseArray(Box::new(SparseArray { length: 9, properties }))
            },
            |value| {
                let named = Object { properties: vec![(Key::from("n"), value)] };
                Value::Array(Array { elements: vec![Value::Null], named: Some(Box::new(named)) })
            },
        ];
        (0..levels).fold(Value::Null, |value, level| deeper[level % deeper.len()](value))
    }

    #[test]
    fn deepest_tree_is_copied_compared_and_shown_in_constant_stack() {
        let all = || {
            let value = deep(100_000);
            let copy = value.clone();
            assert!(copy == value);
            assert!(deep(99_999) != value);
            let shown = format!("{value:?}");
            assert!(shown.len() > 500_000 && shown == format!("{copy:#?}"));
        };
        // A sixteenth of what a thread has.
        let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(all);
        thread.expect("a thread").join().expect("no overflow");
    }

    #[test]
    fn a_copy_is_equal_and_shown_in_reading_order() {
        let value = deep(7);
        assert_eq!(value.clone(), value);
        assert_eq!(
            format!("{value:?}"),
            "Array [Null] with {\"n\": SparseArray of 9 {7: TypeError(Some(\"x\"), None, cause: Set {Bool(true), \
             Map {Array [Object {\"a\": Int(1), \"b\": Null, \"c\": String(\"x\")}, Hole, Array [Int(0)]] => \
             Null}})}}"
        );
        assert_eq!(format!("{:?}", Value::Set(Set { values: vec![] })), "Set {}");
    }

    #[test]
    fn any_difference_is_seen() {
        let base = || Value::object([("a", Value::from(vec![1, 2])), ("b", Value::Null)]);
        assert_eq!(base(), base());
        for other in [
            Value::object([("a", Value::from(vec![1, 3])), ("b", Value::Null)]),
            Value::object([("a", Value::from(vec![1, 2])), ("c", Value::Null)]),
            Value::object([("a", Value::from(vec![1])), ("b", Value::Null)]),
            Value::object([("a", Value::from(vec![1, 2]))]),
            Value::object([("b", Value::Null), ("a", Value::from(vec![1, 2]))]),
            Value::Undefined,
        ] {
            assert_ne!(base(), other);
        }
        assert_ne!(Value::Double(f64::NAN), Value::Double(f64::NAN));
        assert_ne!(Value::Native(Object::default()), Value::Object(Object::default()));
        assert_ne!(Value::Int(1), Value::Double(1.0));
    }
}
