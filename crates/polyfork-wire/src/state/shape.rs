//! The shape of a type: which values it is made of and in which order, as a form without names in it sees them. Only for
//! tests: what a primary leaves to its successor is in such a form, so a field that is added, moved or of another type
//! means another [`VERSION`](super::VERSION), and somebody has to notice.
//!
//! The type's own `Deserialize` is asked what it would like to read and is given the simplest thing each time: one element
//! of a sequence, something in each option, zero. Of an enum it is given another variant in each pass, until all have
//! been seen at all places.
//!
//! The rule that surprises: a variant whose type refuses the simplest value (the other system's half of an `OsString`, for
//! example) stands there as refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

/// So many passes without anything new, and nothing more is looked for. An enum inside of enums is only reached in some.
const QUIET_PASSES: u32 = 500;

/// The shape of `T`, a line for each value that it is made of: `path: type`, in order of paths.
///
/// # Panics
/// When `T` contains itself, or refuses the simplest value that it could have.
///
/// # Examples
///
/// ```
/// #[derive(serde::Deserialize)]
/// struct Worker {
///     pid: u32,
///     ended: Option<i32>,
/// }
/// let shape = polyfork_wire::state::shape::of::<Worker>();
/// assert_eq!(shape, "/: struct pid, ended\n/ended: option\n/ended?: i32\n/pid: u32\n");
/// ```
pub fn of<'de, T: Deserialize<'de>>() -> String {
    let mut seen = Seen::default();
    let mut quiet = 0;
    while quiet < QUIET_PASSES {
        seen.is_new = false;
        seen.open.clear();
        if let Err(Refused(reason)) =
            T::deserialize(Shape { path: "/".to_owned(), seen: &mut seen })
        {
            let Some((path, variant)) = seen.open.pop() else {
                panic!("it refuses the simplest value: {reason}")
            };
            if let Some(tried) = seen.tried.get_mut(&path) {
                tried[variant] = u32::MAX;
            }
            seen.lines.insert(format!("{path}#{variant}"), "refused".to_owned());
            seen.is_new = true;
        }
        quiet = if seen.is_new { 0 } else { quiet + 1 };
    }
    seen.lines.iter().fold(String::new(), |mut text, (path, line)| {
        let _ = writeln!(text, "{path}: {line}");
        text
    })
}

/// Holds a shape to the file that it was written to, with the version that it belongs to in its first line.
///
/// With the variable `POLYFORK_KEEP_SHAPE` the file is written instead.
///
/// # Panics
/// When they differ: that is its purpose. When the file cannot be read or written.
#[track_caller]
pub fn hold(shape: &str, file: &Path) {
    let now = format!("version {}\n{shape}", super::VERSION);
    if std::env::var_os("POLYFORK_KEEP_SHAPE").is_some() {
        return std::fs::write(file, now)
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    let kept =
        std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let missing = |these: &str, those: &str, sign: &str| -> String {
        let those: BTreeSet<_> = those.lines().collect();
        these
            .lines()
            .filter(|line| !those.contains(line))
            .map(|line| format!("  {sign} {line}\n"))
            .collect()
    };
    assert!(
        now == kept,
        "what a primary leaves to its successor has another shape than {} says:\n{}{}\
         A release with it would misread what the one before it wrote. Raise VERSION in crates/polyfork-wire/src/state.rs, \
         unless the version that stands there was never released, and run this test once with POLYFORK_KEEP_SHAPE=1.",
        file.display(),
        missing(&kept, &now, "-"),
        missing(&now, &kept, "+"),
    );
}

#[derive(Default)]
struct Seen {
    lines: BTreeMap<String, String>,
    /// How often each variant was given, by the path of its enum.
    tried: BTreeMap<String, Vec<u32>>,
    /// The variants that are being read, the innermost last.
    open: Vec<(String, usize)>,
    is_new: bool,
}

struct Shape<'a> {
    path: String,
    seen: &'a mut Seen,
}

impl Shape<'_> {
    fn is(&mut self, line: impl Into<String>) {
        assert!(self.path.len() < 1_000, "{}: does it contain itself?", self.path);
        if !self.seen.lines.contains_key(&self.path) {
            self.seen.lines.insert(self.path.clone(), line.into());
            self.seen.is_new = true;
        }
    }

    fn inner(&mut self, step: &str) -> Shape<'_> {
        let slash = if self.path.ends_with('/') || step.starts_with(['?', '[', '#', '{']) {
            ""
        } else {
            "/"
        };
        Shape { path: format!("{}{slash}{step}", self.path), seen: self.seen }
    }
}

/// Why a type did not take what it was given.
#[derive(Debug)]
struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl de::Error for Refused {
    fn custom<T: fmt::Display>(reason: T) -> Refused {
        Refused(reason.to_string())
    }
}

macro_rules! simple {
    ($($method:ident $visit:ident $value:expr, $name:literal;)*) => {
        $(fn $method<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Refused> {
            self.is($name);
            visitor.$visit($value)
        })*
    };
}

impl<'de> de::Deserializer<'de> for Shape<'_> {
    type Error = Refused;

    simple! {
        deserialize_bool visit_bool false, "bool";
        deserialize_i8 visit_i8 1, "i8";
        deserialize_i16 visit_i16 1, "i16";
        deserialize_i32 visit_i32 1, "i32";
        deserialize_i64 visit_i64 1, "i64";
        deserialize_i128 visit_i128 1, "i128";
        deserialize_u8 visit_u8 1, "u8";
        deserialize_u16 visit_u16 1, "u16";
        deserialize_u32 visit_u32 1, "u32";
        deserialize_u64 visit_u64 1, "u64";
        deserialize_u128 visit_u128 1, "u128";
        deserialize_f32 visit_f32 1.0, "f32";
        deserialize_f64 visit_f64 1.0, "f64";
        deserialize_char visit_char 'a', "char";
        deserialize_str visit_str "a", "text";
        deserialize_string visit_str "a", "text";
        deserialize_bytes visit_bytes b"a", "bytes";
        deserialize_byte_buf visit_bytes b"a", "bytes";
    }

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        panic!("{}: it asks what there is, and a form without names cannot say", self.path)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_any(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Refused> {
        self.is("option");
        visitor.visit_some(self.inner("?"))
    }

    fn deserialize_unit<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Refused> {
        self.is("nothing");
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.deserialize_unit(visitor)
    }

    // What it is made of is all that is written down of it.
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Refused> {
        self.is("sequence");
        visitor.visit_seq(Elements { of: self, steps: vec!["[]".to_owned()].into_iter() })
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        mut self,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.is(format!("{length} values"));
        visitor.visit_seq(Elements { of: self, steps: numbered(length) })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.deserialize_tuple(length, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Refused> {
        self.is("map");
        visitor.visit_map(Elements {
            of: self,
            steps: vec!["{key}".to_owned(), "{value}".to_owned()].into_iter(),
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.is(format!("struct {}", fields.join(", ")));
        visitor.visit_seq(Elements { of: self, steps: named(fields) })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        self.is(format!("enum {}", variants.join(", ")));
        let tried =
            self.seen.tried.entry(self.path.clone()).or_insert_with(|| vec![0; variants.len()]);
        let least = tried.iter().enumerate().min_by_key(|(_, times)| **times);
        let Some((variant, times)) = least.filter(|(_, times)| **times < u32::MAX) else {
            return Err(de::Error::custom("all variants are refused"));
        };
        self.seen.is_new |= *times == 0;
        tried[variant] += 1;
        self.seen.open.push((self.path.clone(), variant));
        let (path, seen) = (format!("{}#{variant}", self.path), self.seen);
        let value =
            visitor.visit_enum(Variant { variant, shape: Shape { path, seen: &mut *seen } })?;
        seen.open.pop();
        Ok(value)
    }
}

/// A long tuple is an array, and its elements are all the same.
const LONGEST_TUPLE: usize = 12;

fn numbered(length: usize) -> std::vec::IntoIter<String> {
    if length > LONGEST_TUPLE {
        return vec!["[]".to_owned(); length].into_iter();
    }
    (0..length).map(|at| format!("[{at}]")).collect::<Vec<_>>().into_iter()
}

fn named(fields: &[&str]) -> std::vec::IntoIter<String> {
    fields.iter().map(ToString::to_string).collect::<Vec<_>>().into_iter()
}

struct Elements<'a> {
    of: Shape<'a>,
    steps: std::vec::IntoIter<String>,
}

impl<'de> de::SeqAccess<'de> for Elements<'_> {
    type Error = Refused;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Refused> {
        self.steps.next().map(|step| seed.deserialize(self.of.inner(&step))).transpose()
    }
}

impl<'de> de::MapAccess<'de> for Elements<'_> {
    type Error = Refused;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Refused> {
        de::SeqAccess::next_element_seed(self, seed)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refused> {
        let value = de::SeqAccess::next_element_seed(self, seed)?;
        value.ok_or_else(|| de::Error::custom("a key without a value"))
    }
}

struct Variant<'a> {
    variant: usize,
    shape: Shape<'a>,
}

impl<'de, 'a> de::EnumAccess<'de> for Variant<'a> {
    type Error = Refused;
    type Variant = Shape<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Shape<'a>), Refused> {
        let number = u32::try_from(self.variant).map_err(de::Error::custom)?;
        Ok((seed.deserialize(number.into_deserializer())?, self.shape))
    }
}

impl<'de> de::VariantAccess<'de> for Shape<'_> {
    type Error = Refused;

    fn unit_variant(self) -> Result<(), Refused> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Refused> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        de::Deserializer::deserialize_tuple(self, length, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        de::Deserializer::deserialize_struct(self, "", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ffi::OsString;

    use super::*;

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is looked at")]
    enum Kind {
        None,
        One(Inner),
        Two(u8, Inner),
        Three { at: u64 },
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is looked at")]
    enum Inner {
        A,
        B(BTreeMap<u16, Vec<bool>>),
    }

    #[test]
    fn all_variants_are_seen_also_those_inside_of_others() {
        let shape = of::<Vec<Kind>>();
        let lines: Vec<_> = shape.lines().collect();
        assert_eq!(
            lines,
            [
                "/: sequence",
                "/[]: enum None, One, Two, Three",
                "/[]#1: enum A, B",
                "/[]#1#1: map",
                "/[]#1#1{key}: u16",
                "/[]#1#1{value}: sequence",
                "/[]#1#1{value}[]: bool",
                "/[]#2: 2 values",
                "/[]#2[0]: u8",
                "/[]#2[1]: enum A, B",
                "/[]#2[1]#1: map",
                "/[]#2[1]#1{key}: u16",
                "/[]#2[1]#1{value}: sequence",
                "/[]#2[1]#1{value}[]: bool",
                "/[]#3: struct at",
                "/[]#3/at: u64",
            ]
        );
    }

    #[test]
    fn another_shape_is_told_with_what_is_different() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("shape.txt");
        std::fs::write(&file, format!("version {}\n{}", crate::state::VERSION, of::<(u8, u16)>()))
            .unwrap();
        hold(&of::<(u8, u16)>(), &file);
        let told = std::panic::catch_unwind(|| hold(&of::<(u8, u32)>(), &file)).unwrap_err();
        let told = told.downcast_ref::<String>().unwrap();
        assert!(told.contains("- /[1]: u16\n  + /[1]: u32\n"), "{told}");
    }

    #[test]
    fn what_a_system_does_not_have_is_named_and_the_rest_is_seen() {
        let shape = of::<(OsString, u8)>();
        assert!(shape.contains("/[0]#1: refused\n"), "{shape}");
        assert!(shape.contains("/[0]#0: sequence") || shape.contains("/[0]#0: bytes"), "{shape}");
        assert!(shape.contains("/[1]: u8"), "{shape}");
    }
}
