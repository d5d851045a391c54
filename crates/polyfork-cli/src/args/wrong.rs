//! What is wrong with a command line, in one line, with what to do next: clap's own takes a screen.
//!
//! Asks for the description of the command line again where that tells more; what is right is never slower for it.
//!
//! The surprising rule: clap does not tell whether a value came from a variable. That is found out by reading the words
//! once more without the environment.

use std::ffi::OsString;

use clap::CommandFactory;
use clap::builder::Resettable;
use clap::error::{ContextKind, ErrorKind};

use super::{Cli, NotRun};
use crate::control::name;
use crate::style::Paint;
use crate::words;

/// Why clap did not take these words.
pub(super) fn not_taken(error: &clap::Error, args: &[OsString]) -> NotRun {
    if let ErrorKind::DisplayHelp | ErrorKind::DisplayVersion = error.kind() {
        return NotRun::Asked(painted(error));
    }
    NotRun::Wrong(match variable_of(error, args) {
        Some(variable) => blamed(error, &variable),
        None => told(error, &help_for(args)),
    })
}

/// What is wrong with a command line, in one line.
pub(crate) fn in_one_line(error: &clap::Error) -> String {
    one_line(&error.render().to_string())
}

/// The variable that a wrong value comes from; `None` when the command line itself is wrong.
///
/// Clap does not tell where a value came from, so the same words are read again without the environment: what is
/// wrong with the words alone is still wrong then.
fn variable_of(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let option = error.get(ContextKind::InvalidArg)?.to_string();
    let alone =
        Cli::command().mut_subcommands(|verb| verb.mut_args(|arg| arg.env(Resettable::Reset)));
    if let Err(again) = alone.try_get_matches_from(args)
        && again.get(ContextKind::InvalidArg) == error.get(ContextKind::InvalidArg)
        && again.get(ContextKind::InvalidValue) == error.get(ContextKind::InvalidValue)
    {
        return None;
    }
    let name = option.strip_prefix("--")?.split(' ').next()?;
    Some(format!("POLYFORK_{}", name.replace('-', "_").to_uppercase()))
}

/// The error of an option, told of the variable that stands for it.
fn blamed(error: &clap::Error, variable: &str) -> String {
    let (option, value) =
        (of(error, ContextKind::InvalidArg), of(error, ContextKind::InvalidValue));
    let theirs = format!("'{value}' for '{option}'");
    let ours = format!("{value:?} of the environment variable {variable}");
    in_one_line(error).replacen(&theirs, &ours, 1)
}

/// The command that helps with these words. Only for errors: the whole description is made once more for it.
fn help_for(args: &[OsString]) -> String {
    let known = |verb: &&str| Cli::command().find_subcommand(verb).is_some();
    match args.get(1).and_then(|verb| verb.to_str()).filter(known) {
        Some(verb) => format!("polyfork {verb} --help"),
        None => "polyfork --help".to_owned(),
    }
}

/// The error, with what helps.
fn told(error: &clap::Error, help: &str) -> String {
    match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "no verb given: `polyfork run PROGRAM`, or `polyfork demo`".to_owned()
        }
        ErrorKind::InvalidSubcommand => no_such_verb(&of(error, ContextKind::InvalidSubcommand)),
        ErrorKind::UnknownArgument => match of(error, ContextKind::InvalidArg) {
            option if option.starts_with('-') => no_such_option(error, &option, help),
            word => {
                format!("unexpected argument {word}: nothing follows the options here (see {help})")
            }
        },
        _ => format!("{} (see {help})", in_one_line(error)),
    }
}

/// What clap knows of an error; empty when it knows nothing.
fn of(error: &clap::Error, kind: ContextKind) -> String {
    error.get(kind).map(ToString::to_string).unwrap_or_default()
}

fn no_such_option(error: &clap::Error, option: &str, help: &str) -> String {
    let near = match of(error, ContextKind::SuggestedArg) {
        _ if option == "--config" => "; the file is given without it".to_owned(),
        near if near.is_empty() => String::new(),
        near => format!("; did you mean {near}?"),
    };
    let theirs = if runs_programs(help) { "the program's own come after it; " } else { "" };
    format!("unknown option {option}{near} ({theirs}see {help})")
}

/// A program, as a rule, unless it is nearly a verb.
fn no_such_verb(word: &str) -> String {
    let command = Cli::command();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set());
    let near = verbs.map(|verb| (name::distance(word, verb.get_name()), verb.get_name())).min();
    let most = if word.len() > 3 { 2 } else { 1 };
    let shown = words::harmless(word);
    match near.filter(|(distance, _)| *distance <= most) {
        Some((_, verb)) => format!("no such verb: {shown}; did you mean '{verb}'?"),
        None => format!("no such verb: {shown}; to run a program: polyfork run {shown}"),
    }
}

/// Whether the verb takes a program with options of its own.
fn runs_programs(help: &str) -> bool {
    ["run", "start", "primary"].iter().any(|verb| help == format!("polyfork {verb} --help"))
}

fn painted(error: &clap::Error) -> String {
    let screen = error.render();
    if Paint::stdout().has_colours() { screen.ansi().to_string() } else { screen.to_string() }
}

/// Clap's `error: what`, possible values and tips, without the usage that follows.
fn one_line(screen: &str) -> String {
    let told = screen.split("\n\nUsage:").next().unwrap_or(screen);
    let told = told.split("\n\nFor more information").next().unwrap_or(told);
    let told = told.strip_prefix("error: ").unwrap_or(told);
    let parts = told.lines().map(str::trim).filter(|part| !part.is_empty());
    let parts: Vec<&str> = parts.map(|part| part.strip_prefix("tip: ").unwrap_or(part)).collect();
    parts.join("; ").replace(":; ", ": ")
}

#[cfg(test)]
mod tests {
    use crate::args::NotRun;
    use crate::args::tests::read;

    fn wrong(words: &[&str]) -> String {
        match read(words) {
            Err(NotRun::Wrong(line)) => line,
            Err(NotRun::Asked(_)) => panic!("help for {words:?}"),
            Ok(cli) => panic!("{words:?} was taken: {cli:?}"),
        }
    }

    #[test]
    fn an_unknown_option_is_answered_with_a_near_one() {
        let line = wrong(&["run", "--worker", "2", "server.js"]);
        assert!(line.contains("--worker") && line.contains("--workers"), "{line}");
        let line = wrong(&["runn", "server.js"]);
        assert!(line.contains("runn") && line.contains("'run'"), "{line}");
        let line = wrong(&["server.js"]);
        assert!(line.contains("polyfork run server.js"), "{line}");
    }

    #[test]
    fn every_wrong_value_is_one_line_that_names_option_and_value() {
        for words in [
            ["--workers", "0"],
            ["--workers", "-2"],
            ["--grace", "30"],
            ["--grace", "soon"],
            ["--listen", "nowhere"],
            ["--listen", "127.0.0.1:70000"],
            ["--ready", "perhaps"],
            ["--ready-timeout", "x"],
            ["--restart-limit", "often"],
            ["--restart-delay", "later"],
            ["--restart-delay", "2s..1s"],
            ["--min-uptime", "5"],
            ["--stop-exit-codes", "256"],
            ["--ready", "listening-or=x"],
            ["--policy", "fair"],
            ["--mechanism", "magic"],
            ["--dialect", "latin"],
            ["--window", "65"],
            ["--max-message", "0"],
            ["--max-depth", "0"],
            ["--max-depth", "-1"],
            ["--grace", "-1"],
            ["--window", "-1"],
            ["--max-message", "-1"],
            ["--output", "paper"],
        ] {
            let line = wrong(&["run", words[0], words[1], "server.js"]);
            assert!(line.contains(words[0]) && line.contains(words[1]), "{line}");
            assert!(!line.contains('\n') && line.len() < 250, "{line}");
        }
    }

    #[test]
    fn a_word_too_many_is_not_called_an_option() {
        let line = wrong(&["demo", "extra"]);
        assert!(
            line.contains("unexpected argument extra") && !line.contains("option extra"),
            "{line}"
        );
    }

    #[test]
    fn a_missing_program_and_a_missing_verb_are_told() {
        assert!(wrong(&["run", "--workers"]).contains("--workers"));
        assert!(wrong(&[]).contains("polyfork run PROGRAM"));
    }
}
