//! Manual pages and completions, made from the very description that the help is made from.
//!
//! What clap makes knows verbs and options, not apps. The names of apps are asked for when a key is pressed: `polyfork names`
//! reads the runtime folder, and wakes nobody.
//!
//! The surprising rule: a manual page that exists is written anew; these are made files and nobody's work.
//!
//! References: man-pages(7); the manuals of bash, zsh and fish on completion.

use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args;
use crate::args::tools::{CompletionsArgs, ManArgs};
use crate::control::folder::Runtime;
use crate::exit::Code;
use crate::out;

/// Verbs that take the names of apps.
const OF_APPS: [&str; 12] = [
    "ls", "list", "status", "reload", "restart", "upgrade", "scale", "stop", "kill", "logs",
    "events", "service",
];

/// Writes manual pages.
pub(crate) fn man(args: &ManArgs) -> Code {
    let command = built();
    let written = match &args.out {
        None => page(&command).map(|text| {
            out::write(&text);
        }),
        Some(folder) => fs::create_dir_all(folder).and_then(|()| pages(&command, folder)),
    };
    match written {
        Ok(()) => Code::Stopped,
        Err(error) => {
            let place = args.out.as_ref().map_or("memory".into(), |out| out.to_string_lossy());
            crate::say(io::stderr(), &out::complaint(&place, &error));
            Code::Unexpected
        }
    }
}

/// Writes completions.
pub(crate) fn completions(args: &CompletionsArgs) -> Code {
    out::write(&script(args.shell));
    Code::Stopped
}

/// Writes the names of all apps, one a line.
pub(crate) fn names() -> Code {
    let names = Runtime::find().ok().flatten().and_then(|runtime| runtime.names().ok());
    let lines: String = names.unwrap_or_default().iter().map(|name| format!("{name}\n")).collect();
    out::write(lines.as_bytes());
    Code::Stopped
}

/// The description, with everything that is worked out late worked out.
fn built() -> Command {
    let mut command = args::whole().disable_help_subcommand(true);
    command.build();
    command
}

fn page(command: &Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    Man::new(command.clone()).section("1").render(&mut text)?;
    Ok(text)
}

/// `polyfork.1`, `polyfork-run.1`, `polyfork-service-print.1` and so on.
fn pages(command: &Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    fs::write(folder.join(format!("{name}.1")), page(command)?)?;
    command
        .get_subcommands()
        .filter(|verb| !verb.is_hide_set())
        .try_for_each(|verb| pages(verb, folder))
}

/// What a shell reads.
fn script(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut shown(), "polyfork", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    with_names(shell, text).into_bytes()
}

/// Without what is hidden: a shell would offer it.
fn shown() -> Command {
    let whole = args::whole();
    let hidden: Vec<String> = whole
        .get_subcommands()
        .filter(|verb| verb.is_hide_set())
        .map(|verb| verb.get_name().to_owned())
        .collect();
    let mut shown = Command::new("polyfork").version(env!("CARGO_PKG_VERSION"));
    for verb in whole.get_subcommands().filter(|verb| !hidden.iter().any(|h| h == verb.get_name()))
    {
        shown = shown.subcommand(verb.clone());
    }
    shown.disable_help_subcommand(true)
}

/// Adds the names of apps, in shells for which that is a few lines.
fn with_names(shell: Shell, text: String) -> String {
    let verbs = OF_APPS;
    match shell {
        Shell::Bash => {
            let verbs = verbs.join("|");
            format!(
                r#"{text}
_polyfork_with_apps() {{
    _polyfork "$@"
    case "${{COMP_WORDS[1]}}" in
        {verbs})
            local word="${{COMP_WORDS[COMP_CWORD]}}"
            if [[ "$word" != -* ]]; then
                COMPREPLY+=( $(compgen -W "$(polyfork names 2>/dev/null)" -- "$word") )
            fi
            ;;
    esac
}}
complete -F _polyfork_with_apps -o nosort -o bashdefault -o default polyfork 2>/dev/null ||
    complete -F _polyfork_with_apps -o bashdefault -o default polyfork
"#
            )
        }
        Shell::Zsh => {
            let apps = "_polyfork_apps() {\n    local -a apps\n    apps=( ${(f)\"$(polyfork names 2>/dev/null)\"} )\n    compadd -a apps\n}\n\n";
            let lines = text.lines().map(|line| {
                match line.contains(":name -- ") || line.contains("::names -- ") {
                    true => line.replace(":_default'", ":_polyfork_apps'") + "\n",
                    false => format!("{line}\n"),
                }
            });
            let text: String = lines.collect();
            // The first line tells zsh what the file completes, and has to stay the first.
            match text.split_once('\n') {
                Some((first, rest)) => format!("{first}\n\n{apps}{rest}"),
                None => text,
            }
        }
        Shell::Fish => {
            let verbs = verbs.join(" ");
            format!(
                "{text}complete -c polyfork -n \"__fish_seen_subcommand_from {verbs}\" -f -a \"(polyfork names 2>/dev/null)\"\n"
            )
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every verb that is shown, with the options that are shown.
    fn verbs() -> Vec<(String, Vec<String>)> {
        let whole = built();
        let options = |verb: &Command| {
            let shown = verb.get_arguments().filter(|arg| !arg.is_hide_set());
            shown.filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
        };
        let shown = whole.get_subcommands().filter(|verb| !verb.is_hide_set());
        shown.map(|verb| (verb.get_name().to_owned(), options(verb))).collect()
    }

    #[test]
    fn every_verb_and_every_option_is_in_the_manual_pages() {
        let folder = tempfile::tempdir().unwrap();
        pages(&built(), folder.path()).unwrap();
        let first = fs::read_to_string(folder.path().join("polyfork.1")).unwrap();
        for (verb, options) in verbs() {
            assert!(first.contains(&verb.replace('-', "\\-")), "polyfork.1 has {verb}");
            let page = folder.path().join(format!("polyfork-{verb}.1"));
            let text = fs::read_to_string(&page).unwrap_or_else(|e| panic!("{verb}: {e}"));
            for option in options {
                let written = format!("\\-\\-{}", option.replace('-', "\\-"));
                assert!(text.contains(&written), "{verb}: {written}");
            }
        }
        assert!(!folder.path().join("polyfork-primary.1").exists(), "hidden verbs have no page");
        let run = fs::read_to_string(folder.path().join("polyfork-run.1")).unwrap();
        assert!(run.contains("Exit codes") && run.contains("TTIN"), "signals and codes are told");
    }

    #[test]
    fn every_verb_and_every_option_is_in_the_completions() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let text = String::from_utf8(script(shell)).unwrap();
            for (verb, options) in verbs() {
                assert!(text.contains(&verb), "{shell}: {verb}");
                for option in options {
                    let written = match shell {
                        Shell::Fish => format!("-l {option}"),
                        _ => format!("--{option}"),
                    };
                    assert!(text.contains(&written), "{shell}: {verb} {written}");
                }
            }
            assert!(!text.contains("primary)"), "{shell}: hidden verbs are not offered");
        }
    }

    #[test]
    fn names_of_apps_are_asked_for() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let text = String::from_utf8(script(shell)).unwrap();
            assert!(text.contains("polyfork names"), "{shell}");
        }
        let zsh = String::from_utf8(script(Shell::Zsh)).unwrap();
        assert!(zsh.starts_with("#compdef polyfork\n"), "{zsh:.40}");
        assert!(zsh.contains(":_polyfork_apps'"), "in zsh they stand where a name is wanted");
    }
}
