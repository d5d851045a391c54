//! Shared memory that a worker inherits from its primary, by name.
//!
//! The primary's half is in `process`. What comes is looked at as everything that comes is: only memory that is sealed as
//! it must be is used.
//!
//! The rule that surprises: all of it is taken when the worker begins, as a program that this one starts in some other
//! way would inherit the descriptors otherwise.

use std::collections::BTreeMap;
use std::ffi::OsString;

use polyfork_wire::env::POLYFORK_MEMORY as MEMORY;

use super::WorkerError;
use crate::shared_memory::SharedArrayBuffer;

/// Takes what the environment names. For a process that knows that the environment means it.
pub(super) fn inherited(
    var: impl Fn(&str) -> Option<OsString>,
) -> Result<BTreeMap<String, SharedArrayBuffer>, WorkerError> {
    let Some(list) = var(MEMORY) else { return Ok(BTreeMap::new()) };
    let senseless = || WorkerError::Environment { variable: MEMORY, value: list.clone() };
    let mut taken = BTreeMap::new();
    for (name, number) in parse(list.to_str().ok_or_else(senseless)?).ok_or_else(senseless)? {
        let unusable = |why: String| WorkerError::Memory { name: name.to_owned(), why };
        let descriptor = polyfork_sys::memory::take_inherited(number)
            .map_err(|error| unusable(error.to_string()))?;
        // The primary is the one that we belong to: what it can map, we can.
        let memory = SharedArrayBuffer::from_fd(descriptor, usize::MAX)
            .map_err(|error| unusable(error.to_string()))?;
        taken.insert(name.to_owned(), memory);
    }
    Ok(taken)
}

fn parse(list: &str) -> Option<Vec<(&str, i32)>> {
    let one = |item: &'_ str| -> Option<i32> { item.parse().ok().filter(|number| *number > 2) };
    list.split(',')
        .map(|item| {
            let (name, number) = item.split_once('=')?;
            Some((name, one(number)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_names_each_with_its_descriptor() {
        assert_eq!(parse("a=4,b.c=17"), Some(vec![("a", 4), ("b.c", 17)]));
        for text in ["", "a", "a=", "a=x", "a=2", "a=-1", "a=4,", "a=99999999999"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_memory_is_an_error_that_names_it() {
        assert!(inherited(|_| None).expect("none is wanted").is_empty());
        let error = inherited(|_| Some("lost=987654".into())).expect_err("it is not open");
        assert!(error.to_string().contains("\"lost\""), "{error}");
        let error = inherited(|_| Some("lost".into())).expect_err("it has no number");
        assert!(error.to_string().contains(MEMORY), "{error}");
    }
}
