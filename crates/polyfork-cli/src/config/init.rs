//! `polyfork init`: writes a polyfork.toml that explains itself, or one that says what an ecosystem file of PM2 says.
//!
//! Options and their help come from `keys`, so the file is never behind the command. What is there already is never
//! overwritten.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::json;

use super::args::InitArgs;
use super::check::remark_of;
use super::keys::{self, Key, Kind};
use super::wanted::Wanted;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::operate::{VERSION, fail, remark};
use crate::{out, words};

/// Runs the verb.
pub(crate) fn run(args: InitArgs) -> Code {
    let json = args.form.json;
    if args.schema {
        out::json(&keys::schema());
        return Code::Stopped;
    }
    let written = text(&args).and_then(|text| write(&args.out, &text));
    match written {
        Ok(()) => {
            let shown = args.out.display();
            if json {
                out::json(&json!({"version": VERSION, "file": args.out}));
            }
            remark(&format!(
                "wrote {shown}; `polyfork check {shown}` looks it over, `polyfork start` starts what it says"
            ));
            Code::Stopped
        }
        Err(verdict) => fail(&verdict, json),
    }
}

fn write(file: &Path, text: &str) -> Result<(), Verdict> {
    let usage = |text: String| Verdict { code: Code::Usage, text: words::plain(&text) };
    // It may come to hold secrets.
    let mut options = std::fs::OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(0o600).open(file);
    let mut opened = opened.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => usage(format!(
            "{} is there already and stays as it is: --out FILE writes another one",
            file.display()
        )),
        _ => usage(format!("cannot write {}: {error}", file.display())),
    })?;
    opened.write_all(text.as_bytes()).map_err(|error| {
        // A piece of a file would be taken for the whole.
        let _ = std::fs::remove_file(file);
        usage(format!("cannot write {}: {error}", file.display()))
    })
}

const HEAD: &str = "\
# What polyfork runs. `polyfork check` looks this file over, `polyfork start` starts its apps, `polyfork apply` makes what
# runs be what it says. What counts: the command line, the environment, this file, the default, in this order.
# Every key is told in docs/config.md; `polyfork init --schema` prints a schema for editors.
";

fn text(args: &InitArgs) -> Result<String, Verdict> {
    let mut text = HEAD.to_owned();
    match &args.from {
        None => {
            let program = args.program.as_deref().map(|path| path.to_string_lossy().into_owned());
            let program = program.unwrap_or_else(guessed);
            let stem =
                Path::new(&program).file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let name = crate::control::name::Name::like(stem.as_deref().unwrap_or("app"));
            text.push_str(&format!("\n[app.{}]\n", key(name.as_str())));
            text.push_str(&format!(
                "program = {}\n# args = [\"--port\", \"3000\"]\n",
                quoted(&program)
            ));
            text.push_str("# env = { NODE_ENV = \"production\" }\n");
            let keys = keys::all();
            // The help keeps options of one heading together; so does this.
            let mut headings: Vec<&str> = Vec::new();
            for key in &keys {
                if !headings.contains(&key.heading.as_str()) {
                    headings.push(&key.heading);
                }
            }
            for heading in headings {
                text.push_str(&format!("\n## {heading}\n"));
                let of_it = keys.iter().filter(|key| key.heading == heading);
                of_it.for_each(|key| explain(&mut text, key));
            }
        }
        Some(from) => {
            let loaded = super::load(from, None)?.sound()?;
            loaded.faults.iter().for_each(remark_of);
            for fault in &loaded.faults {
                text.push_str(&format!("# {}\n", words::harmless(&fault.text)));
            }
            let folder = loaded.file.parent().unwrap_or(Path::new("/")).to_owned();
            loaded.apps.iter().for_each(|app| app_text(&mut text, app, &folder));
        }
    }
    Ok(text)
}

/// The program that is most likely meant.
fn guessed() -> String {
    let known = ["server.js", "index.js", "app.js", "main.js", "server.ts", "app.py"];
    let found = known.iter().find(|name| Path::new(name).is_file());
    (*found.unwrap_or(&"server.js")).to_owned()
}

/// An option as a comment, with what it does and what it is without being set.
fn explain(text: &mut String, key: &Key) {
    let value = match (&key.kind, &key.default) {
        (Kind::Switch, _) => "true".to_owned(),
        (Kind::Number, Some(default)) => default.clone(),
        (Kind::Number, None) => "1".to_owned(),
        (Kind::List, _) => format!("[{}]", quoted(&example(key))),
        (_, Some(default)) => quoted(default),
        (_, None) => quoted(&example(key)),
    };
    text.push_str(&format!("\n# {}\n# {} = {value}\n", key.help.replace('\n', " "), key.name));
}

/// A value that the option takes.
fn example(key: &Key) -> String {
    let text = match (key.name.as_str(), key.value.as_str()) {
        ("listen", _) => ":8000",
        ("reload_at", _) => "30 3 * * *",
        ("increment_var", _) => "PORT",
        ("runtime", _) => "node",
        ("umask", _) => "027",
        ("user", _) => "nobody",
        ("env_allow", _) => "PATH",
        ("probe", _) => "/healthy",
        ("cgroup_cpu", _) => "0.5",
        ("metrics", _) => "127.0.0.1:9100",
        ("watch", _) => "src",
        ("watch_ignore", _) => "*.log",
        ("stop_exit_codes", _) => "0",
        (_, "DIR") => ".",
        (_, "SIZE") => "512MiB",
        (_, "DURATION") => "30s",
        (_, value) if value.starts_with("N|") => "max",
        _ => "...",
    };
    text.to_owned()
}

fn app_text(text: &mut String, app: &Wanted, folder: &Path) {
    text.push_str(&format!("\n[app.{}]\nprogram = {}\n", key(&app.name), quoted(&app.program)));
    if !app.args.is_empty() {
        text.push_str(&format!("args = {}\n", list(&app.args)));
    }
    if !app.autostart {
        text.push_str("autostart = false\n");
    }
    let known = keys::all();
    for (name, values) in &app.options {
        let Some(found) = known.iter().find(|key| key.name == *name) else { continue };
        let first = values.first().map_or("", String::as_str);
        // The file's own folder is where its programs are looked up anyway.
        if name == "cwd" && Path::new(first) == folder {
            continue;
        }
        let is_number = first.parse::<u64>().is_ok();
        let value = match found.kind {
            Kind::Switch | Kind::Number => first.to_owned(),
            Kind::NumberOrText if is_number => first.to_owned(),
            Kind::List => list(values),
            _ => quoted(first),
        };
        text.push_str(&format!("{name} = {value}\n"));
    }
    if !app.env.is_empty() {
        text.push_str(&format!("[app.{}.env]\n", key(&app.name)));
        for (name, value) in &app.env {
            text.push_str(&format!("{} = {}\n", key(name), quoted(value)));
        }
    }
}

fn list(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    format!("[{}]", texts.join(", "))
}

/// A key, in quotes where TOML wants them.
fn key(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    match !name.is_empty() && name.chars().all(bare) {
        true => name.to_owned(),
        false => quoted(name),
    }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
