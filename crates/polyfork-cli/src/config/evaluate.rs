//! Has a configuration that is a program evaluated by the user's own runtime, in a process of its own.
//!
//! What comes back is JSON; what it means is known to `ecosystem`.
//!
//! The surprising rules: what the script prints goes to standard error and is shown only if it fails; the value comes behind
//! a word that the script cannot know. It has [`TIME`] and [`LONGEST`] bytes; a promise or a function is followed.
//!
//! Runs code that the user names, with the user's rights: as starting its programs does.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use polyfork::child_process::{Command, Exec, SyncFault, spawn_sync};
use serde_json::Value;

use super::fault::Fault;
use crate::exit::Code;
use crate::words;

/// How long a script may take.
const TIME: Duration = Duration::from_secs(20);
/// The longest value.
const LONGEST: usize = 1 << 20;
/// Lines of a script that failed which are shown.
const SHOWN: usize = 12;
/// Runtimes that are looked for, in this order.
const RUNTIMES: [&str; 2] = ["node", "bun"];

/// Loads the module named behind the word, and writes what it exports.
const SCRIPT: &str = r"
const [word, file] = process.argv.slice(-2);
const out = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr);
(async () => {
  const { pathToFileURL } = await import('node:url');
  const module = await import(pathToFileURL(file).href);
  let value = 'default' in module ? module.default : module;
  if (typeof value === 'function') value = value();
  value = await value;
  const text = JSON.stringify(value);
  await new Promise((done) => out('\n' + word + (text === undefined ? 'null' : text) + word + '\n', done));
  process.exit(0);
})().catch((error) => {
  console.error(error && error.stack ? error.stack : error);
  process.exit(1);
});
";

/// The value that the module `file` exports.
///
/// # Blocking
/// Until the script has ended, [`TIME`] at most.
///
/// # Errors
/// Why there is none, with what the script wrote.
pub(crate) fn evaluate(file: &Path) -> Result<Value, Fault> {
    let fault = |text: String| Fault::new(file, None, text);
    let named = std::env::var_os("POLYFORK_RUNTIME").filter(|name| !name.is_empty());
    let mut candidates: Vec<OsString> = named.into_iter().collect();
    candidates.extend(RUNTIMES.iter().map(OsString::from));
    let word = format!(
        "polyfork-{:016x}:",
        std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), file)
    );
    for runtime in candidates {
        let mut command = Command::new(&runtime);
        command.args(["-e", SCRIPT, "--", &word]).arg(file);
        if let Some(folder) = file.parent() {
            command.current_dir(folder);
        }
        command.piped().env_remove("NODE_CHANNEL_FD").timeout(TIME);
        command.kill_signal(polyfork::child_process::Signal::KILL);
        let done = match spawn_sync(Exec::new(command).max_buffer(2 * LONGEST)) {
            Ok(done) => done,
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(fault(words::plain(&error.to_string()))),
        };
        let shown = runtime.to_string_lossy();
        return match done.error {
            Some(SyncFault::TimedOut) => {
                Err(fault(format!("{shown} did not finish it within {} s", TIME.as_secs())))
            }
            Some(SyncFault::MaxBuffer(_)) => {
                Err(fault(format!("it wrote more than {} MiB", (2 * LONGEST) >> 20)))
            }
            Some(other) => Err(fault(words::plain(&other.to_string()))),
            None => value(&done.output.stdout, &word).map_err(|why| {
                let mut text = format!("{shown} could not evaluate it: {why}");
                for line in last_lines(&done.output.stderr) {
                    text.push_str(&format!("\n    {}", words::harmless(&line)));
                }
                fault(text)
            }),
        };
    }
    let text = "there is no runtime to evaluate it: install Node, name one by POLYFORK_RUNTIME, or write polyfork.toml";
    Err(fault(text.into()).with(Code::NoRuntime))
}

fn value(out: &[u8], word: &str) -> Result<Value, String> {
    let text = String::from_utf8_lossy(out);
    let mut parts = text.rsplitn(3, word);
    let (_, json, _) = match (parts.next(), parts.next(), parts.next()) {
        (Some(after), Some(json), Some(before)) => (after, json, before),
        _ => return Err("it ended without a value".into()),
    };
    if json.len() > LONGEST {
        return Err(format!("its value is longer than {} MiB", LONGEST >> 20));
    }
    serde_json::from_str(json).map_err(|error| format!("its value is not JSON: {error}"))
}

fn last_lines(err: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(err);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    // A stack trace says most at its top.
    lines.iter().take(SHOWN).map(|line| line.chars().take(200).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_what_stands_between_the_words() {
        let word = "w-1:";
        assert_eq!(value(b"noise\nw-1:{\"a\":1}w-1:\n", word), Ok(serde_json::json!({"a": 1})));
        for out in [&b""[..], b"{}", b"w-1:{}", b"\xff\xfe"] {
            assert!(value(out, word).is_err(), "{out:?}");
        }
    }
}
