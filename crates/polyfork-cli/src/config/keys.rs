//! The keys of a configuration: the options of the command line, under the same names with `_` for `-`.
//!
//! There is no second list: names, help, defaults and what a value may be come from the command line's own description, and
//! a value is read by the very parser that reads the option. So a new option is a key from its first day on.
//!
//! The surprising rule: what an option's value is called in the help (`DURATION`, `SIZE`, `N`) decides which types of TOML it
//! takes, and what the schema for editors says.

use std::error::Error;

use clap::builder::Resettable;
use clap::error::ContextKind;
use clap::{ArgAction, Command, CommandFactory};
use serde_json::{Map, Value, json};

use crate::args::Cli;
use crate::control::name;

/// Options that are no keys: the app's name is that of its table, variables have a table, and the rest is about a command
/// and not about an app.
pub(crate) const NOT_KEYS: [&str; 8] =
    ["command", "name", "env", "json", "config", "profile", "of_config", "of_app"];

/// Keys of an app that are no options.
pub(crate) const OWN_KEYS: [(&str, &str); 5] = [
    ("program", "The program, or the file that a runtime runs; relative to cwd"),
    ("args", "Its arguments"),
    ("env", "Variables in the environment of its workers"),
    ("profile", "Tables of keys that hold with --profile"),
    ("autostart", "Whether `start` without names, and `apply`, start it"),
];

/// What other managers call things.
const FOREIGN: [(&str, &str); 22] = [
    ("script", "program"),
    ("exec", "program"),
    ("command", "program"),
    ("cmd", "program"),
    ("instances", "workers"),
    ("numprocs", "workers"),
    ("processes", "workers"),
    ("interpreter", "runtime"),
    ("exec_interpreter", "runtime"),
    ("directory", "cwd"),
    ("working_directory", "cwd"),
    ("environment", "env"),
    ("max_memory_restart", "max_memory"),
    ("memory_limit", "max_memory"),
    ("kill_timeout", "grace"),
    ("graceful_timeout", "grace"),
    ("listen_timeout", "ready_timeout"),
    ("wait_ready", "ready"),
    ("cron_restart", "reload_at"),
    ("ignore_watch", "watch_ignore"),
    ("bind", "listen"),
    ("shutdown_with_message", "stop_by"),
];

/// Keys whose change takes a new primary. All others take effect at a reload.
pub(crate) const FIXED: [&str; 16] = [
    "policy",
    "mechanism",
    "dialect",
    "listen",
    "no_control",
    "output",
    "log_dir",
    "log_size",
    "log_age",
    "log_keep",
    "log_format",
    "user",
    "umask",
    "metrics",
    "metrics_on_network",
    "no_app_metrics",
];

/// What a key takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// true or false
    Switch,
    /// A whole number.
    Number,
    /// A whole number or a word.
    NumberOrText,
    /// One of these.
    Choice(Vec<String>),
    /// Any text; what it must be is decided by the option's parser.
    Text,
    /// Several texts, or one.
    List,
}

/// One key.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// What its value is called: `DURATION`.
    pub(crate) value: String,
    pub(crate) help: String,
    pub(crate) default: Option<String>,
    pub(crate) heading: String,
    /// A path, relative to the file's folder.
    pub(crate) is_path: bool,
}

impl Key {
    fn of(arg: &clap::Arg) -> Key {
        let name = arg.get_id().as_str().to_owned();
        let value = arg.get_value_names().and_then(|names| names.first());
        let value = value.map(ToString::to_string).unwrap_or_default();
        let choices: Vec<String> = arg
            .get_possible_values()
            .iter()
            .map(|choice| choice.get_name().to_owned())
            .filter(|choice| !matches!(choice.as_str(), "true" | "false"))
            .collect();
        let kind = match arg.get_action() {
            ArgAction::SetTrue | ArgAction::SetFalse => Kind::Switch,
            ArgAction::Append => Kind::List,
            _ if !choices.is_empty() => Kind::Choice(choices),
            _ if value == "N" => Kind::Number,
            _ if value == "SIZE" || value.starts_with("N|") => Kind::NumberOrText,
            _ => Kind::Text,
        };
        let default = arg.get_default_values().first().map(|text| text.to_string_lossy());
        let default = default.filter(|_| kind != Kind::Switch).map(|text| text.into_owned());
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let heading = arg.get_help_heading().unwrap_or("Other").to_owned();
        let is_path = value == "DIR";
        Key { name, kind, value, help, default, heading, is_path }
    }

    /// The values that `text` stands for, if the option's own parser takes them.
    ///
    /// # Errors
    /// What is wrong with it, without the value itself.
    pub(crate) fn check(&self, command: &Command, values: &[String]) -> Result<(), String> {
        let mut words = vec!["polyfork".to_owned(), "start".to_owned()];
        let long = self.name.replace('_', "-");
        match (&self.kind, values) {
            (Kind::Switch, _) => return Ok(()),
            (_, values) => words.extend(values.iter().map(|value| format!("--{long}={value}"))),
        }
        words.push("program".to_owned());
        match command.clone().try_get_matches_from(words) {
            Ok(_) => Ok(()),
            Err(error) => Err(why(&error)),
        }
    }
}

/// Why a value was not taken, in the words of its parser.
fn why(error: &clap::Error) -> String {
    if let Some(source) = error.source() {
        return source.to_string();
    }
    match error.get(ContextKind::ValidValue) {
        Some(valid) => format!("give one of {valid}"),
        None => crate::args::wrong::in_one_line(error),
    }
}

/// The description of `start`, without what the environment says.
pub(crate) fn description() -> Command {
    only("start").mut_subcommands(|verb| verb.mut_args(|arg| arg.env(Resettable::Reset)))
}

/// The description of one verb, and of no other: what is copied for each app, or each value, is small.
pub(crate) fn only(verb: &str) -> Command {
    let all = Cli::command();
    Command::new("polyfork").subcommands(all.find_subcommand(verb).cloned())
}

/// The options of a verb that are keys, in the order of its help.
pub(crate) fn of_verb(verb: &str) -> Vec<Key> {
    let command = Cli::command();
    let Some(found) = command.find_subcommand(verb) else { return Vec::new() };
    let is_key = |arg: &&clap::Arg| {
        let id = arg.get_id().as_str();
        !NOT_KEYS.contains(&id) && !matches!(id, "help" | "version")
    };
    found.get_arguments().filter(is_key).map(Key::of).collect()
}

/// All keys that are options.
pub(crate) fn all() -> Vec<Key> {
    of_verb("start")
}

/// The key that somebody meant who wrote something that is none.
pub(crate) fn meant(wrong: &str, keys: &[Key]) -> Option<String> {
    let low = wrong.to_lowercase().replace('-', "_");
    if let Some((_, ours)) = FOREIGN.iter().find(|(theirs, _)| *theirs == low) {
        return Some((*ours).to_owned());
    }
    let names = keys.iter().map(|key| key.name.as_str());
    nearest(&low, names.chain(OWN_KEYS.iter().map(|(name, _)| *name)))
}

/// The nearest of some names, if it is near.
pub(crate) fn nearest<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    let near = names.map(|known| (name::distance(wrong, known), known)).min()?;
    let most = 1 + wrong.len() / 3;
    (near.0 <= most).then(|| near.1.to_owned())
}

/// The JSON schema of polyfork.toml.
pub(crate) fn schema() -> Value {
    let keys = all();
    let mut properties: Map<String, Value> =
        keys.iter().map(|key| (key.name.clone(), property(key))).collect();
    let text = json!({"type": ["string", "integer", "boolean", "number"]});
    let own = |name: &str| {
        let help = OWN_KEYS.iter().find(|(own, _)| *own == name).map_or("", |(_, help)| *help);
        let mut property = match name {
            "program" => json!({"type": "string", "minLength": 1}),
            "args" => json!({"type": "array", "items": {"type": ["string", "integer"]}}),
            "env" => json!({"type": "object", "additionalProperties": text}),
            "autostart" => json!({"type": "boolean", "default": true}),
            _ => json!({
                "type": "object",
                "additionalProperties": {"$ref": "#/definitions/options"},
            }),
        };
        property["description"] = help.into();
        property
    };
    for (name, _) in OWN_KEYS {
        properties.insert(name.to_owned(), own(name));
    }
    let mut options = properties.clone();
    options.remove("profile");
    let object = |properties: Map<String, Value>, required: &[&str]| {
        let mut object = json!({
            "type": "object",
            "properties": properties,
            "additionalProperties": false,
        });
        if !required.is_empty() {
            object["required"] = json!(required);
        }
        object
    };
    let mut defaults = options.clone();
    for name in ["program", "args", "autostart"] {
        defaults.remove(name);
    }
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "polyfork.toml",
        "description": "Apps that polyfork runs; see docs/config.md",
        "type": "object",
        "additionalProperties": false,
        "properties": {
            "$schema": {"type": "string"},
            "defaults": {"$ref": "#/definitions/defaults"},
            "app": {
                "type": "object",
                "description": "An app under each name",
                "propertyNames": {"pattern": "^[A-Za-z0-9_@+][A-Za-z0-9._@+-]{0,63}$"},
                "additionalProperties": {"$ref": "#/definitions/app"},
            },
        },
        "definitions": {
            "app": object(properties, &["program"]),
            "options": object(options, &[]),
            "defaults": object(defaults, &[]),
        },
    })
}

fn property(key: &Key) -> Value {
    let text = match key.value.as_str() {
        "DURATION" => json!({
            "type": "string",
            "pattern": "^(none|0|([0-9]+(\\.[0-9]{1,3})?(ms|s|m|min|h|d))+)$",
        }),
        "SIZE" => json!({
            "type": ["string", "integer"],
            "pattern": "^[0-9]+ ?[A-Za-z]*$",
            "minimum": 1,
        }),
        _ => json!({"type": "string"}),
    };
    let mut property = match &key.kind {
        Kind::Switch => json!({"type": "boolean", "default": false}),
        Kind::Number => json!({"type": "integer", "minimum": 0}),
        Kind::NumberOrText if key.value == "SIZE" => text,
        Kind::NumberOrText => json!({"type": ["integer", "string"]}),
        Kind::Choice(choices) => json!({"enum": choices}),
        Kind::Text => text,
        Kind::List if key.value == "CODE" => json!({
            "anyOf": [
                {"type": ["integer", "string"]},
                {"type": "array", "items": {"type": ["integer", "string"]}},
            ],
        }),
        Kind::List => json!({
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        }),
    };
    property["description"] = key.help.clone().into();
    if let Some(default) = &key.default {
        property["default"] = match (&key.kind, default.parse::<u64>()) {
            (Kind::Number, Ok(number)) => number.into(),
            _ => default.clone().into(),
        };
    }
    property
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_start_and_run_is_a_key() {
        let start: Vec<String> = all().into_iter().map(|key| key.name).collect();
        for verb in ["run", "start"] {
            let command = Cli::command();
            let verb = command.find_subcommand(verb).expect("a verb");
            for arg in verb.get_arguments() {
                let id = arg.get_id().as_str();
                let is = start.iter().any(|key| key == id);
                assert!(is || NOT_KEYS.contains(&id) || id == "help", "{id}");
                let long = arg.get_long().map(|long| long.replace('-', "_"));
                assert!(long.is_none_or(|long| long == id), "{id}: the key is not the option");
            }
        }
    }

    #[test]
    fn every_option_of_start_and_run_is_an_environment_variable_and_told_in_the_help() {
        // Without a variable: what workers inherit from the environment anyway, and what is told in the text.
        let told_otherwise = ["command", "env", "listen", "of_config", "of_app", "help"];
        for verb in ["run", "start"] {
            let command = Cli::command();
            let verb = command.find_subcommand(verb).expect("a verb");
            let help = verb.clone().render_long_help().to_string();
            assert!(help.contains("POLYFORK_LISTEN"), "listen has one of its own");
            for arg in verb.get_arguments() {
                let id = arg.get_id().as_str();
                if told_otherwise.contains(&id) {
                    continue;
                }
                let expected = format!("POLYFORK_{}", id.to_uppercase());
                let name = arg.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(name.as_deref(), Some(expected.as_str()), "--{id}");
                assert!(help.contains(&expected), "{expected} is not in the help");
            }
        }
    }

    #[test]
    fn keys_that_take_a_new_primary_and_foreign_words_are_about_keys_that_exist() {
        let keys = all();
        let is = |name: &str| {
            keys.iter().any(|key| key.name == name) || OWN_KEYS.iter().any(|(own, _)| *own == name)
        };
        assert!(FIXED.iter().all(|name| is(name)));
        for (theirs, ours) in FOREIGN {
            assert!(is(ours) && !is(theirs), "{theirs} {ours}");
        }
    }

    #[test]
    fn a_misspelt_key_is_answered_with_the_right_one() {
        let keys = all();
        for (wrong, right) in [
            ("max_memry", Some("max_memory")),
            ("max-memory", Some("max_memory")),
            ("instances", Some("workers")),
            ("script", Some("program")),
            ("Grace", Some("grace")),
            ("xyzzy", None),
        ] {
            assert_eq!(meant(wrong, &keys).as_deref(), right, "{wrong}");
        }
    }

    #[test]
    fn the_schema_on_file_is_the_one_that_is_printed() {
        let file = include_str!("../../../../docs/polyfork.schema.json");
        let file: Value = serde_json::from_str(file).expect("JSON");
        let told = "run `polyfork check --schema > docs/polyfork.schema.json`";
        assert!(file == schema(), "docs/polyfork.schema.json is not up to date: {told}");
    }

    #[test]
    fn the_document_names_every_key() {
        let document = include_str!("../../../../docs/config.md");
        for key in all() {
            let row = format!("| `{}` |", key.name);
            assert!(document.contains(&row), "docs/config.md lacks {row}");
        }
        for (own, _) in OWN_KEYS {
            assert!(document.contains(&format!("| `{own}` |")), "docs/config.md lacks {own}");
        }
    }
}
