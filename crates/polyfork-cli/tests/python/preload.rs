//! What the preload leaves alone: the environment, the user's own module of its name, and whatever it does not know.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::support::{Events, Place};

/// Writes down what a Python program sees of us, and then does nothing.
const REPORT: &str = r#"
import json, os, signal, sys
import uvicorn.server
report = {
    "path": os.environ.get("PYTHONPATH"),
    "ours": [name for name in os.environ if name in ("POLYFORK_PRELOAD", "POLYFORK_LINGER_MS")],
    "folders": [folder for folder in sys.path if "polyfork" in folder],
    "custom": getattr(sys.modules.get("sitecustomize"), "WHO", None),
    "left": uvicorn.server.Server.shutdown is uvicorn.server.ORIGINAL,
    "ran": uvicorn.server.run(),
}
with open("report.part", "w") as file:
    json.dump(report, file)
os.rename("report.part", "report.json")
signal.pause()
"#;

/// A server with a shutdown that can be awaited, as uvicorn's; what it has to do with is of an unknown kind.
const SERVER: &str = r#"
import asyncio
class State:
    pass
class Config:
    timeout_graceful_shutdown = None
class Connection:
    def shutdown(self):
        done.append("closed")
done = []
class Server:
    def __init__(self):
        self.server_state, self.config = State(), Config()
        self.server_state.connections = {Connection()}
    async def shutdown(self, sockets=None):
        for connection in self.server_state.connections:
            connection.shutdown()
        return "down"
ORIGINAL = Server.shutdown
def run():
    return [asyncio.run(Server().shutdown(sockets=None))] + done
"#;

/// One that is as no uvicorn was.
const STRANGE: &str = r#"
class Server:
    def shutdown(self):
        return "down"
ORIGINAL = Server.shutdown
def run():
    return [Server().shutdown()]
"#;

fn place(server: &str) -> Place {
    let place = Place::new();
    place.file("report.py", REPORT);
    std::fs::create_dir(place.path().join("uvicorn")).expect("a folder");
    place.file("uvicorn/__init__.py", "");
    place.file("uvicorn/server.py", server);
    place
}

/// What the program wrote down, with these words and this PYTHONPATH.
fn report(place: &Place, words: &[&str], path: Option<&str>) -> Value {
    let start = ["run", "--json", "-w", "1", "--ready", "delay=10ms"];
    let mut command = place.polyfork([&start, words].concat());
    command.env("XDG_CACHE_HOME", place.path().join("cache")).env_remove("PYTHONPATH");
    if let Some(path) = path {
        command.env("PYTHONPATH", path);
    }
    let mut events = Events::of(command);
    events.wait_for("ready");
    let file = place.path().join("report.json");
    let limit = std::time::Instant::now() + super::support::PATIENCE;
    while !file.exists() {
        assert!(std::time::Instant::now() < limit, "the program wrote nothing");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let text = std::fs::read_to_string(&file).expect("a report");
    std::fs::remove_file(&file).expect("ours");
    events.running.signal(Signal::TERM);
    events.end();
    serde_json::from_str(&text).expect("JSON")
}

fn expected(path: Option<&str>, left: bool) -> Value {
    json!({ "path": path, "ours": [], "folders": [], "custom": null, "left": left, "ran": ["down", "closed"] })
}

fn folders(place: &Path) -> Vec<std::path::PathBuf> {
    let found = std::fs::read_dir(place.join("cache/polyfork")).into_iter().flatten().flatten();
    found.map(|entry| entry.path()).collect()
}

#[test]
fn pythonpath_is_as_it_was_before_the_program_begins() {
    let place = place(SERVER);
    for path in [None, Some(""), Some("/a:/b"), Some(":")] {
        assert_eq!(report(&place, &["report.py"], path), expected(path, false), "{path:?}");
    }
    assert_eq!(report(&place, &["--", "python3", "report.py"], None), expected(None, false));
    let folders = folders(place.path());
    assert_eq!(folders.len(), 1, "{folders:?}");
    let mut names: Vec<_> = std::fs::read_dir(&folders[0])
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["__pycache__", "sitecustomize.py"]);
    assert!(folders[0].join("__pycache__").is_file(), "nothing compiled is kept");
}

#[test]
fn a_sitecustomize_of_the_user_is_run() {
    let place = place(SERVER);
    let own = place.path().join("own");
    std::fs::create_dir(&own).expect("a folder");
    place.file("own/sitecustomize.py", "WHO = 'the user'");
    let path = own.to_str().expect("a path");
    let mut wanted = expected(Some(path), false);
    wanted["custom"] = "the user".into();
    assert_eq!(report(&place, &["report.py"], Some(path)), wanted);

    // And its errors are those that Python tells, and do not keep the program from running.
    place.file("own/sitecustomize.py", "import a_module_that_is_not_there");
    assert_eq!(report(&place, &["report.py"], Some(path)), expected(Some(path), false));
}

#[test]
fn switched_off_nothing_is_written_and_nothing_set() {
    let place = place(SERVER);
    let words = ["--no-drain-preload", "report.py"];
    assert_eq!(report(&place, &words, Some("/a")), expected(Some("/a"), true));
    assert_eq!(folders(place.path()).len(), 0);
}

#[test]
fn a_server_of_an_unknown_shape_is_left_alone() {
    let place = place(STRANGE);
    let mut wanted = expected(None, true);
    wanted["ran"] = json!(["down"]);
    assert_eq!(report(&place, &["report.py"], None), wanted);
}

/// Python does not look at PYTHONPATH then, so nobody would take it out again.
#[test]
fn an_isolated_python_sees_nothing_of_us() {
    let place = place(SERVER);
    for flag in ["-E", "-S", "-sE"] {
        let words = ["--", "python3", flag, "report.py"];
        assert_eq!(report(&place, &words, Some("/a")), expected(Some("/a"), true), "{flag}");
    }
    let words = [
        "--",
        "python3",
        "-P",
        "-c",
        "import sys; sys.path.insert(0, '.'); exec(open('report.py').read())",
    ];
    assert_eq!(report(&place, &words, None), expected(None, false), "a safe path is no obstacle");
}
