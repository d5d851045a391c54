//! What the numbers in references stand for.
//!
//! Objects are numbered as the writer begins them: outermost first, then in order. Two exceptions: of a view, the
//! buffer comes first, and what stands for an object of C++ takes two numbers.
//!
//! The surprising rule: following references can make a small message endless, or exponentially large. Whoever
//! copies what they stand for must use [`Follow`], which counts.

use std::cell::{Cell, OnceCell};

use super::error::ConvertError;
use super::value::Value;

/// Most bytes that may be copied by following references from one message.
const MOST_COPIED_BYTES: usize = 256 << 20;

/// Deepest tree that is cloned, which recurses as well, but takes less stack for a level.
const MOST_CLONED_LEVELS: usize = 1000;

/// Deepest nesting that is followed by code that recurses.
pub(super) const MOST_LEVELS: usize = 128;

/// The objects of a message by number.
#[derive(Clone, Debug)]
pub struct Objects<'v>(Vec<&'v Value>);

enum Visit<'v> {
    Value(&'v Value),
    /// The number of a view is due.
    View(&'v Value),
}

impl<'v> Objects<'v> {
    /// Numbers all objects of a message; takes time and memory in proportion to it.
    #[must_use]
    pub fn of(root: &'v Value) -> Self {
        let mut objects = Vec::new();
        let mut stack = vec![Visit::Value(root)];
        let mut children = Vec::new();
        while let Some(visit) = stack.pop() {
            let value = match visit {
                Visit::Value(value) => value,
                Visit::View(view) => {
                    objects.push(view);
                    continue;
                }
            };
            match value {
                Value::View(_) => stack.push(Visit::View(value)),
                Value::Native(_) => objects.extend([value, value]),
                _ if value.is_object() => objects.push(value),
                _ => continue,
            }
            value.children(&mut children);
            stack.extend(children.drain(..).rev().map(Visit::Value));
        }
        Self(objects)
    }

    /// The object of this number.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<&'v Value> {
        self.0.get(id as usize).copied()
    }

    /// The value itself, or what it refers to; `None` for a reference to nothing.
    #[must_use]
    pub fn resolve<'a>(&self, value: &'a Value) -> Option<&'a Value>
    where
        'v: 'a,
    {
        match value {
            Value::Reference(id) => self.get(*id),
            value => Some(value),
        }
    }

    /// How many numbers the message uses.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The number of the first object in a part of the message, itself included. (Of a view that is the
    /// buffer, unless it refers to one that occurred before.)
    pub(super) fn first_id_of(&self, part: &Value) -> Option<usize> {
        let first = match part {
            Value::View(view) if view.buffer().is_object() => view.buffer(),
            part => part,
        };
        self.0.iter().position(|object| std::ptr::eq(*object, first))
    }
}

/// Makes references in a part of a message, whose first object has the number `start`, references of the part
/// alone. False when one leads out of it.
pub(super) fn detach(part: &mut Value, start: usize) -> bool {
    let count = Objects::of(part).count();
    let mut stack = vec![part];
    while let Some(value) = stack.pop() {
        if let Value::Reference(id) = value {
            match (*id as usize).checked_sub(start).filter(|id| *id < count) {
                Some(inner) => *id = u32::try_from(inner).unwrap_or(u32::MAX),
                None => return false,
            }
        } else {
            value.children_mut(&mut stack);
        }
    }
    true
}

/// A clone, unless that would take too much stack.
pub(super) fn cloned(value: &Value) -> Option<Value> {
    let mut level = vec![value];
    for _ in 0..MOST_CLONED_LEVELS {
        let mut below = Vec::new();
        level.iter().for_each(|value| value.children(&mut below));
        if below.is_empty() {
            return Some(value.clone());
        }
        level = below;
    }
    None
}

/// Follows references within bounds.
pub(super) struct Follow<'v> {
    root: &'v Value,
    objects: OnceCell<Objects<'v>>,
    copied: Cell<usize>,
}

impl<'v> Follow<'v> {
    pub(super) fn new(root: &'v Value) -> Self {
        Self { root, objects: OnceCell::new(), copied: Cell::new(0) }
    }

    pub(super) fn objects(&self) -> &Objects<'v> {
        self.objects.get_or_init(|| Objects::of(self.root))
    }

    pub(super) fn reference(&self, id: u32) -> Result<&'v Value, ConvertError> {
        let nothing = || ConvertError::new(format!("reference {id} is to nothing"));
        self.objects().get(id).ok_or_else(nothing)
    }

    /// Allows for a copy of what is behind a reference, or of elements that are not in the message.
    pub(super) fn copy(&self, bytes: usize) -> Result<(), ConvertError> {
        let copied = self.copied.get().saturating_add(bytes);
        self.copied.set(copied);
        if copied > MOST_COPIED_BYTES {
            return Err(ConvertError::new("message is too large without its references and gaps"));
        }
        Ok(())
    }

    /// As [`copy`](Self::copy), for one value without what is in it.
    pub(super) fn copy_value(&self, value: &Value) -> Result<(), ConvertError> {
        let contents = match value {
            Value::String(text) => text.as_str().map_or(0, str::len),
            Value::BigInt(number) => 8 * number.digits().len(),
            value => value.as_bytes().map_or(0, <[u8]>::len),
        };
        self.copy(contents.saturating_add(size_of::<Value>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::advanced::{Map, Object};

    #[test]
    fn objects_are_numbered_as_they_begin() {
        let inner = Value::object([("x", 1)]);
        let map = Value::Map(Map { entries: vec![(Value::Date(0.0), inner.clone())] });
        let native = Value::Native(Object::default());
        let root =
            Value::from(vec![Value::from("no number"), map, native.clone(), Value::buffer(vec![])]);
        let objects = Objects::of(&root);
        let expected = [Value::Date(0.0), inner, native.clone(), native, Value::buffer(vec![])];
        assert_eq!(objects.count(), 7);
        for (id, value) in (2..).zip(&expected) {
            assert_eq!(objects.resolve(&Value::Reference(id)), Some(value));
        }
        assert_eq!(objects.resolve(&Value::Reference(7)), None);
    }

    #[test]
    fn part_that_refers_to_its_surroundings_is_not_detached() {
        let mut part = Value::object([("self", Value::Reference(3))]);
        assert!(detach(&mut part, 3));
        assert_eq!(part.get("self"), Some(&Value::Reference(0)));
        assert!(!detach(&mut part, 1));
        assert!(!detach(&mut Value::object([("later", Value::Reference(9))]), 3));
    }
}
