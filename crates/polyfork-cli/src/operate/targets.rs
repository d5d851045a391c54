//! Who is meant: names and patterns become apps, and a name that nobody has becomes a hint.

use crate::control::folder::{self, App, Runtime};
use crate::control::name::{self, Name};
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::words;

/// Every app there is.
///
/// # Errors
/// When the runtime folder will not do.
pub(crate) fn all() -> Result<Vec<App>, Verdict> {
    let Some(runtime) = Runtime::find()? else { return Ok(Vec::new()) };
    Ok(runtime.names()?.iter().filter_map(|name| runtime.app(name)).collect())
}

/// The apps that are meant by names and patterns, each once, in the order they are named.
///
/// # Errors
/// When one of them means nobody.
pub(crate) fn find(wanted: &[String]) -> Result<Vec<App>, Verdict> {
    let nobody =
        |text: &str, names: &[Name]| Verdict { code: Code::NoSuchApp, text: no_such(text, names) };
    let Some(runtime) = Runtime::find()? else {
        let first = wanted.first().map_or("", String::as_str);
        return Err(nobody(first, &[]));
    };
    let names = runtime.names()?;
    let mut meant: Vec<&Name> = Vec::new();
    for text in wanted {
        let before = meant.len();
        let found: Vec<&Name> =
            names.iter().filter(|name| name::matches(text, name.as_str())).collect();
        if found.is_empty() {
            return Err(nobody(text, &names));
        }
        meant.extend(found);
        let mut seen = meant[..before].to_vec();
        seen.extend(meant.drain(before..).collect::<Vec<_>>());
        meant = Vec::new();
        for name in seen {
            if !meant.contains(&name) {
                meant.push(name);
            }
        }
    }
    Ok(meant.into_iter().filter_map(|name| runtime.app(name)).collect())
}

/// That there is no such app, and who may be meant.
pub(crate) fn no_such(text: &str, names: &[Name]) -> String {
    let shown = words::harmless(text);
    let what = match name::is_pattern(text) {
        true => format!("no app fits {shown}"),
        false => format!("no app is named {shown}"),
    };
    let near: Vec<String> = name::near(text, names).iter().map(ToString::to_string).collect();
    let next = match (near.is_empty(), names.is_empty()) {
        (false, _) => format!("did you mean {}?", near.join(" or ")),
        (true, false) => "`polyfork ls` lists them".to_owned(),
        (true, true) => {
            let place = folder::place();
            format!("none runs here ({}); `polyfork start PROGRAM` starts one", place.display())
        }
    };
    format!("{what}; {next}")
}
