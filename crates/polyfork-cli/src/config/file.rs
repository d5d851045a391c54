//! Reads polyfork.toml: tables become apps, and everything that is wrong is told at once, each with its place.
//!
//! Which keys there are and what they take is known to `keys`. Nothing here looks at programs or addresses in use: that is
//! `check`'s.
//!
//! The surprising rule: a file with a mistake anywhere starts nothing, also where the mistake is in another app's table. Half of a
//! configuration is none.

use std::collections::BTreeMap;
use std::path::Path;

use clap::Command;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::{Fault, Mark};
use super::keys::{self, Key, Kind};
use super::wanted::Wanted;
use crate::control::name::Name;

/// The longest file that is read.
pub(crate) const LONGEST: usize = 1 << 20;

type Pair<'t, 'i> = (&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>);

/// Reads a file's text. Apps come in the order of the file.
pub(crate) fn read(path: &Path, text: &str, profile: Option<&str>) -> (Vec<Wanted>, Vec<Fault>) {
    let table = match DeTable::parse(text) {
        Ok(table) => table,
        Err(error) => {
            let at = error.span().map(|span| Mark::of(text, span.start).secret());
            let text = error.message().trim().replace('\n', "; ");
            return (Vec::new(), vec![Fault::new(path, at, format!("not TOML: {text}"))]);
        }
    };
    let mut reader = Reader {
        path,
        text,
        profile,
        profile_seen: profile.is_none(),
        keys: keys::all(),
        command: keys::description(),
        faults: Vec::new(),
    };
    let apps = reader.file(table.get_ref());
    (apps, reader.faults)
}

struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    profile: Option<&'a str>,
    /// Some table has the profile that was asked for.
    profile_seen: bool,
    keys: Vec<Key>,
    command: Command,
    faults: Vec<Fault>,
}

impl Reader<'_> {
    fn mark<T>(&self, of: &Spanned<T>) -> Mark {
        let mark = Mark::of(self.text, of.span().start);
        // Variables and arguments may be secrets, also those that stand beside a mistake.
        let holds = |line: &String| line.contains("env") || line.contains("args");
        match mark.shown.as_ref().is_some_and(holds) {
            true => mark.secret(),
            false => mark,
        }
    }

    fn fault(&mut self, at: Mark, app: Option<&str>, text: impl Into<String>) {
        let fault = Fault::new(self.path, Some(at), text);
        self.faults.push(match app {
            Some(app) => fault.of(app),
            None => fault,
        });
    }

    fn file(&mut self, table: &DeTable<'_>) -> Vec<Wanted> {
        let mut defaults = Wanted::new(self.path);
        let mut apps = Vec::new();
        for (key, value) in sorted(table) {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("$schema", DeValue::String(_)) => {}
                ("defaults", DeValue::Table(table)) => {
                    self.table(None, table, &mut defaults, &["program", "args", "autostart"]);
                }
                ("app", DeValue::Table(table)) => apps = sorted(table),
                ("app" | "defaults" | "$schema", _) => {
                    let name = key.get_ref().to_string();
                    let at = self.mark(value);
                    self.fault(at, None, format!("{name} is a table, as in [app.shop]"));
                }
                (other, _) => {
                    let near = keys::nearest(other, ["app", "defaults"].into_iter());
                    let hint = match near {
                        Some(near) => format!("; did you mean {near}?"),
                        None if keys::meant(other, &self.keys).is_some() => {
                            "; keys of an app stand below its [app.NAME], keys of all below [defaults]"
                                .to_owned()
                        }
                        None => "; apps are tables: [app.NAME]".to_owned(),
                    };
                    let at = self.mark(key);
                    self.fault(at, None, format!("unknown key {other:?}{hint}"));
                }
            }
        }
        let found = apps.into_iter().filter_map(|app| self.app(app, &defaults)).collect();
        if let (false, Some(profile)) = (self.profile_seen, self.profile) {
            let text = format!("no app has the profile {profile:?}");
            self.faults.push(Fault::new(self.path, None, text));
        }
        if self.faults.is_empty() && Vec::is_empty(&found) {
            let text = "it has no app: begin one with [app.NAME] and program = \"server.js\"";
            self.faults.push(Fault::warning(self.path, None, text));
        }
        found
    }

    fn app(&mut self, (key, value): Pair<'_, '_>, defaults: &Wanted) -> Option<Wanted> {
        let name = key.get_ref().to_string();
        let at = self.mark(key);
        if let Err(error) = Name::read(&name) {
            self.fault(at.clone(), None, format!("{name:?} cannot be an app's name: {error}"));
        }
        let DeValue::Table(table) = value.get_ref() else {
            self.fault(at, None, format!("app {name:?} is a table: [app.{name}]"));
            return None;
        };
        let mut app = Wanted { name: name.clone(), at: Some(at.clone()), ..defaults.clone() };
        self.table(Some(&name), table, &mut app, &[]);
        if app.program.is_empty() {
            let text = "it has no program: add program = \"server.js\"";
            self.fault(at, Some(&name), text);
        }
        Some(app)
    }

    /// Reads the keys of an app, then those of its profile on top.
    fn table(
        &mut self,
        app: Option<&str>,
        table: &DeTable<'_>,
        into: &mut Wanted,
        not_here: &[&str],
    ) {
        let mut profiles = None;
        for pair in sorted(table) {
            match (pair.0.get_ref().as_ref(), pair.1.get_ref()) {
                (key, _) if not_here.contains(&key) => {
                    let (key, at) = (key.to_owned(), self.mark(pair.0));
                    self.fault(at, app, format!("{key} belongs to an app, not to all of them"));
                }
                ("profile", DeValue::Table(table)) => profiles = Some(table),
                _ => self.key(app, pair, into),
            }
        }
        for (name, value) in profiles.into_iter().flat_map(sorted) {
            let chosen = self.profile == Some(name.get_ref().as_ref());
            let DeValue::Table(table) = value.get_ref() else {
                let at = self.mark(value);
                self.fault(at, app, "a profile is a table of keys");
                continue;
            };
            // The ones that are not chosen are to be right as well.
            let mut aside = into.clone();
            let target = if chosen { &mut *into } else { &mut aside };
            self.profile_seen |= chosen;
            let not_here = [not_here, &["profile"]].concat();
            self.table(app, table, target, &not_here);
        }
    }

    fn key(&mut self, app: Option<&str>, (key, value): Pair<'_, '_>, into: &mut Wanted) {
        let (name, at) = (key.get_ref().to_string(), self.mark(value));
        let wrong = |what: &str| format!("{name} is {what}, not {}", kind_of(value.get_ref()));
        match (name.as_str(), value.get_ref()) {
            ("program", DeValue::String(text)) if !text.is_empty() => {
                into.program = text.to_string();
                into.marks.insert(name, at);
            }
            ("program", DeValue::String(_)) => self.fault(at, app, "program is empty"),
            ("program", _) => self.fault(at, app, wrong("a text, as in \"server.js\"")),
            ("args", DeValue::Array(items)) => match items.iter().map(word).collect() {
                Some(words) => {
                    into.args = words;
                    into.marks.insert(name, at);
                }
                None => self.fault(at, app, "args are texts, as in [\"--port\", \"3000\"]"),
            },
            ("args", _) => self.fault(at, app, wrong("a list, as in [\"--port\", \"3000\"]")),
            ("autostart", DeValue::Boolean(yes)) => into.autostart = *yes,
            ("autostart", _) => self.fault(at, app, wrong("true or false")),
            ("env", DeValue::Table(table)) => self.variables(app, table, into),
            ("env", _) => self.fault(at, app, wrong("a table, as in env = { PORT = 3000 }")),
            _ => match self.keys.iter().position(|known| known.name == name) {
                Some(place) => self.option(app, place, at, value.get_ref(), into),
                None => {
                    let near = match keys::meant(&name, &self.keys) {
                        Some(near) => format!("; did you mean {near}?"),
                        None => "; docs/config.md has them all".to_owned(),
                    };
                    let at = self.mark(key);
                    self.fault(at, app, format!("unknown key {name:?}{near}"));
                }
            },
        }
    }

    fn variables(&mut self, app: Option<&str>, table: &DeTable<'_>, into: &mut Wanted) {
        for (key, value) in sorted(table) {
            let name = key.get_ref().to_string();
            let at = self.mark(value).secret();
            let text = match value.get_ref() {
                DeValue::Boolean(yes) => Some(yes.to_string()),
                DeValue::Float(number) => Some(number.as_str().to_owned()),
                DeValue::String(text) => Some(text.to_string()),
                _ => word(value),
            };
            match text {
                Some(text) if !is_variable(&name) || text.contains('\0') => {
                    self.fault(at, app, format!("env.{name:?} cannot be in an environment"));
                }
                Some(text) => drop(into.env.insert(name, text)),
                None => self.fault(at, app, format!("env.{name} is a text or a number")),
            }
        }
    }

    fn option(
        &mut self,
        app: Option<&str>,
        place: usize,
        at: Mark,
        value: &DeValue<'_>,
        into: &mut Wanted,
    ) {
        let key = self.keys[place].clone();
        let text = |value: &DeValue<'_>| match value {
            DeValue::String(text) => Some(text.to_string()),
            _ => None,
        };
        let values = match (&key.kind, value) {
            (Kind::Switch, DeValue::Boolean(yes)) => Ok(vec![yes.to_string()]),
            (Kind::Switch, _) => Err("true or false".to_owned()),
            (Kind::Number, DeValue::Integer(number)) => Ok(vec![plain_number(number)]),
            (Kind::Number, _) => Err("a number without quotes".to_owned()),
            (Kind::List, DeValue::Array(items)) => items
                .iter()
                .map(|item| text(item.get_ref()))
                .collect::<Option<Vec<String>>>()
                .ok_or_else(|| "a list of texts".to_owned()),
            (Kind::List, DeValue::String(one)) => Ok(vec![one.to_string()]),
            (Kind::List, DeValue::Integer(number)) => Ok(vec![plain_number(number)]),
            (Kind::List, _) => Err("a text or a list of texts".to_owned()),
            (_, DeValue::String(text)) => Ok(vec![text.to_string()]),
            // The parser of durations asks for the unit, that of sizes takes bytes.
            (Kind::NumberOrText | Kind::Text, DeValue::Integer(number)) => {
                Ok(vec![plain_number(number)])
            }
            (Kind::Choice(choices), _) => Err(format!("one of {}", choices.join(", "))),
            (_, _) => Err(format!("a text ({})", key.value)),
        };
        let values = match values {
            Ok(values) => values,
            Err(what) => {
                let text = format!("{} is {what}, not {}", key.name, kind_of(value));
                return self.fault(at, app, text);
            }
        };
        if values.iter().any(|value| value.contains('\0')) {
            return self.fault(at, app, format!("{} holds a NUL character", key.name));
        }
        if let Err(why) = key.check(&self.command, &values) {
            return self.fault(at, app, format!("{}: {why}", key.name));
        }
        into.marks.insert(key.name.clone(), at);
        into.options.insert(key.name, values);
    }
}

/// Whether it can be the name of a variable.
pub(crate) fn is_variable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

fn sorted<'t, 'i>(table: &'t DeTable<'i>) -> Vec<Pair<'t, 'i>> {
    let mut pairs: Vec<Pair<'t, 'i>> = table.iter().collect();
    pairs.sort_by_key(|(key, _)| key.span().start);
    pairs
}

fn word(value: &Spanned<DeValue<'_>>) -> Option<String> {
    match value.get_ref() {
        DeValue::String(text) if !text.contains('\0') => Some(text.to_string()),
        DeValue::Integer(number) => Some(plain_number(number)),
        _ => None,
    }
}

/// `1_000` and `0xff` as the options' parsers have numbers.
fn plain_number(number: &toml::de::DeInteger<'_>) -> String {
    match i64::from_str_radix(number.as_str(), number.radix()) {
        Ok(value) => value.to_string(),
        Err(_) => number.as_str().to_owned(),
    }
}

fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// For readers of several tables: what one of them says under a key.
pub(crate) type Options = BTreeMap<String, Vec<String>>;

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "\
[defaults]\nworkers = 'max'\n[app.\"a.b\"]\nprogram = \"x.js\"\nargs = [1, 'b']\nenv = { A = 1.5, B = true }\nlisten = [':80']\n\
max_memory = 0x1000\nno_drain_preload = true\n[app.\"a.b\".profile.p]\ngrace = '1m30s'\n";

    fn read_it(text: &str, profile: Option<&str>) -> (Vec<Wanted>, Vec<Fault>) {
        read(Path::new("/srv/polyfork.toml"), text, profile)
    }

    #[test]
    fn a_whole_file_is_read_as_it_stands() {
        let (apps, faults) = read_it(WHOLE, Some("p"));
        assert_eq!(faults, []);
        let app = &apps[0];
        assert_eq!((app.name.as_str(), app.program.as_str()), ("a.b", "x.js"));
        assert_eq!(app.args, ["1", "b"]);
        let env: Vec<_> = app.env.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(env, ["A=1.5", "B=true"]);
        for (key, value) in
            [("workers", "max"), ("listen", ":80"), ("max_memory", "4096"), ("grace", "1m30s")]
        {
            assert_eq!(app.options[key], [value], "{key}");
        }
        assert_eq!(app.options["no_drain_preload"], ["true"]);
        let (_, faults) = read_it(WHOLE, Some("q"));
        assert!(faults[0].text.contains("no app has the profile"), "{faults:?}");
        assert!(!read_it(WHOLE, None).0[0].options.contains_key("grace"));
    }

    /// Cut, doubled and mixed up in every place: read or refused, and each fault has a place in the text.
    #[test]
    fn no_text_does_harm() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % below.max(1) as u64).unwrap_or(0)
        };
        let pieces = [
            "[", "]", "=", "\"", "'", "\n", ".", "app", "\u{0}", "é", "{", "}", "9", "#", "\\u",
            ",",
        ];
        for _ in 0..400 {
            let mut text: Vec<char> = WHOLE.chars().collect();
            for _ in 0..1 + next(4) {
                let at = next(text.len());
                match next(3) {
                    0 => drop(text.drain(at..(at + next(9)).min(text.len()))),
                    1 => text.splice(at..at, pieces[next(pieces.len())].chars()).for_each(drop),
                    _ => text.truncate(at),
                }
            }
            let text: String = text.into_iter().collect();
            let lines = text.lines().count() + 1;
            for fault in read_it(&text, None).1 {
                assert!(fault.at.as_ref().is_none_or(|at| at.line <= lines), "{fault:?} {text:?}");
                assert!(!fault.told().contains('\0'), "{fault:?}");
            }
        }
    }
}
