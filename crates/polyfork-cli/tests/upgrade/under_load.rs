//! Fault 26: upgrades under closed-loop load, with short and kept connections, and nobody notices.

use std::net::SocketAddr;
use std::path::PathBuf;

use rustix::process::Signal;

use super::app::{App, binary};
use super::desk::{Desk, eventually};
use super::kept::Kept;
use super::load::{Class, Load, count};
use super::support::{Events, skip};

const UPGRADES: u64 = 6;

/// Requests of each test.
fn requests() -> u64 {
    let asked = std::env::var("POLYFORK_UPGRADE_REQUESTS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(3000)
}

/// Half of the clients open a connection for each request, half keep theirs.
fn nobody_notices(what: &str, address: SocketAddr, path: &str, mut upgrade: impl FnMut()) {
    let (short, kept) = (Load::start(address, 4, path), Kept::start(address, 4, path));
    let reach = |wanted: u64| {
        eventually("requests", || short.ok() + kept.ok(), |done| *done >= wanted);
    };
    for number in 1..=UPGRADES {
        reach(requests() * number / (UPGRADES + 1));
        upgrade();
    }
    reach(requests());
    let (counts, (ok, wrong)) = (short.stop(), kept.stop());
    println!("{what}: {UPGRADES} upgrades, short {counts:?}, kept {ok} answered, failed {wrong:?}");
    let failed: u64 = counts.iter().filter(|(class, _)| **class != Class::Ok).map(|(_, n)| n).sum();
    assert_eq!((failed, wrong.len()), (0, 0), "{what}: {counts:?} {wrong:?}");
    assert!(count(&counts, Class::Ok) + ok >= requests());
}

fn app_under_load(what: &str, app: &App) {
    path_under_load(what, app, "/");
}

fn path_under_load(what: &str, app: &App, path: &str) {
    let mut pauses = Vec::new();
    nobody_notices(what, app.address, path, || {
        pauses.push(app.upgrade()["pause_ms"].as_u64().expect("a pause"));
    });
    println!("{what}: nothing was decided for {pauses:?} ms");
    // The answer may come before the line.
    let all = |said: &String| said.matches("upgraded from").count() as u64 == UPGRADES;
    eventually("a line for each upgrade", || app.says(), all);
}

#[test]
fn fault_26_upgrades_under_load_kernel() {
    app_under_load("kernel", &App::start(&["-w", "2", "server.js"]));
}

#[test]
fn fault_26_upgrades_under_load_handoff() {
    app_under_load("handoff", &App::start(&["-w", "2", "--mechanism", "handoff", "server.js"]));
}

#[test]
fn fault_26_upgrades_under_load_shared() {
    app_under_load("shared", &App::start(&["-w", "2", "--policy", "shared", "server.js"]));
}

#[test]
fn fault_26_upgrades_under_load_on_other_versions_of_node() {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let manifest = std::fs::read_to_string(root.join(".peers/manifest.json")).unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap_or_default();
    for name in ["node18", "node26"] {
        let Some(path) = manifest[name]["path"].as_str() else {
            skip("fault_26_upgrades_under_load_on_other_versions_of_node", name);
            continue;
        };
        app_under_load(name, &App::start(&["-w", "2", "--runtime", path, "server.js"]));
    }
}

/// A program that inherits its socket, tells `READY=1`, and writes a line for each request.
const PYTHON: &str = "
import http.server, json, os, socket, sys, threading
address = os.environ['NOTIFY_SOCKET']
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect('\\0' + address[1:] if address[0] == '@' else address)
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        body = json.dumps({'pid': os.getpid()}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(fileno=3)
        self.server_address = self.socket.getsockname()
server = Server()
notify.send(b'READY=1')
def alive():
    notify.send(b'WATCHDOG=1\\nSTATUS=alive')
    threading.Timer(0.2, alive).start()
alive()
server.serve_forever()
";

#[test]
fn fault_26_upgrades_under_load_sockets() {
    let desk = Desk::new();
    desk.place.file("server.py", PYTHON);
    let args = ["-w", "2", "--ready", "notify", "--watchdog", "5s", "--listen", "127.0.0.1:0"];
    app_under_load("sockets", &App::start_on(desk, &[&args[..], &["server.py"]].concat()));
}

#[test]
fn fault_26_upgrades_under_load_native() {
    let binary = binary();
    let binary = binary.to_str().expect("a path");
    let args = ["-w", "2", "--name", "native", "--dialect", "native", binary, "demo"];
    let app = App::start(&[&args[..], &["--listen", "127.0.0.1:0"]].concat());
    path_under_load("native", &app, "/json");
}

#[test]
fn an_app_in_the_foreground_is_upgraded_by_a_signal() {
    let desk = Desk::new();
    let mut command = desk.command(&["run", "--json", "-w", "2", "server.js"]);
    command.env("CANARY", "1");
    let mut events = Events::of(command);
    let address = events.address();
    events.wait_for("ready");
    let mut upgraded = 0;
    nobody_notices("USR2", address, "/", || {
        events.running.signal(Signal::USR2);
        let notice = events.wait_until("notice", |notice| notice["code"] == "upgraded");
        assert!(notice["text"].as_str().expect("text").contains("2 workers kept"), "{notice}");
        upgraded += 1;
    });
    assert_eq!(upgraded, UPGRADES);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}
