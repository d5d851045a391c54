//! What workers get of our environment, and what they cannot do to a terminal.

use super::desk::{Desk, eventually};
use super::support::{command, ended, get};

const TELLS: &str = "
require('http').createServer((request, response) => response.end(JSON.stringify(process.env)))
  .listen(0, '127.0.0.1');
";

fn variables(desk: &mut Desk, args: &[&str]) -> serde_json::Value {
    desk.place.file("tells.js", TELLS);
    let args = [&["start", "--json", "-w", "1"], args, &["tells.js"]].concat();
    let mut start = desk.command(&args);
    start.env("CANARY_TOKEN", "one").env("SHOWN_A", "two").env("SHOWN_B", "three");
    let done = super::support::ended(start);
    let app = desk.started(&args, done);
    let told = get(Desk::address(&app), "/");
    super::desk::read(&told)
}

#[test]
fn fault_108_only_listed_variables_reach_workers() {
    let mut desk = Desk::new();
    let seen = variables(
        &mut desk,
        &["--env-allow", "PATH,HOME", "--env-allow", "SHOWN_*", "--env", "MORE=4"],
    );
    assert_eq!((&seen["SHOWN_A"], &seen["SHOWN_B"]), (&"two".into(), &"three".into()));
    assert_eq!(seen["MORE"], "4");
    assert!(seen["PATH"].is_string());
    assert!(seen.get("CANARY_TOKEN").is_none(), "{seen}");
    assert!(seen.get("POLYFORK_RUNTIME_DIR").is_none(), "{seen}");
    assert_eq!(seen["NODE_APP_INSTANCE"], "0", "its place is told");
    // After a reload as well.
    desk.did(&["reload", "tells", "--probation", "0"]);
    let app = desk.status("tells");
    let seen = super::desk::read(&get(Desk::address(&app), "/"));
    assert!(seen.get("CANARY_TOKEN").is_none(), "{seen}");
}

#[test]
fn without_a_list_workers_get_everything() {
    let mut desk = Desk::new();
    let seen = variables(&mut desk, &[]);
    assert_eq!(seen["CANARY_TOKEN"], "one");
}

/// Names, programs, output and what a worker says of itself.
#[test]
fn nothing_that_a_worker_says_or_is_called_moves_a_cursor() {
    let mut desk = Desk::new();
    let evil = "a\u{1b}[2J\u{7}\u{9b}31m.js";
    let source = format!(
        "console.log('out \\x1b[2J\\x1b]0;title\\x07 \\x9b'); console.error('err \\x1b[1A\\r\\x08');\n{}",
        super::support::SERVER
    );
    desk.place.file(evil, &source);
    let app = desk.start(&["-w", "1", "--name", "evil", evil]);
    // JSON tells the true name, in letters that move nothing either.
    assert_eq!(app["program"], evil);
    eventually(
        "what it wrote",
        || desk.did(&["logs", "evil", "-n", "all"]),
        |text| text.contains("title") && text.contains("err"),
    );
    // A file or a program gets what was written; a terminal does not.
    let mut all = vec![on_a_terminal(&desk, &["logs", "evil", "-n", "all"])];
    for verb in [
        &["ls"][..],
        &["ls", "--json"],
        &["status", "evil"],
        &["status", "--json", "evil"],
        &["service", "print", "evil"],
        &["names"],
        &["doctor"],
    ] {
        let told = desk.does(verb);
        all.extend([told.out, told.err, on_a_terminal(&desk, verb)]);
    }
    all.push(desk.refuses(&["status", "b\u{1b}[2J"], 10));
    for text in all {
        let bad = |c: &char| c.is_control() && !['\n', '\r', '\t'].contains(c);
        assert_eq!(without_colours(&text).chars().find(bad), None, "{text:?}");
    }
}

/// What a verb writes when a terminal reads it.
fn on_a_terminal(desk: &Desk, args: &[&str]) -> String {
    let polyfork = desk.command(args);
    let mut python = command("/usr/bin/env");
    python.args(["python3", "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]);
    python.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(desk.place.path());
    python.env("POLYFORK_RUNTIME_DIR", desk.runtime()).env("POLYFORK_LOG_DIR", desk.logs());
    python.stdin(std::process::Stdio::null());
    ended(python).out
}

fn without_colours(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let colour = part.find(|c: char| !c.is_ascii_digit() && c != ';');
        match colour.filter(|at| part[*at..].starts_with('m')) {
            Some(at) => kept.push_str(&part[at + 1..]),
            None => kept.push_str(&format!("\u{1b}[{part}")),
        }
    }
    kept
}
