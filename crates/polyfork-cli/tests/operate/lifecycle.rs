//! From start to stop.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::Signal;
use serde_json::Value;

use super::desk::{Desk, eventually, is_over, pidfd, read, signal};
use super::support::{Events, Lines, Running, SERVER, ended, get};

/// A program with requests that take for ever, and that it wants to finish.
const SLOW_TO_LEAVE: &str = "
require('http').createServer((request, response) => {
  if (request.url === '/slow') return setTimeout(() => response.end('done'), 600000);
  response.end('hi');
}).listen(0, '127.0.0.1');
";

/// Starts the slow program, and a request that keeps it from leaving.
fn busy(desk: &mut Desk) -> TcpStream {
    desk.place.file("slow.js", SLOW_TO_LEAVE);
    let app = desk.start(&["-w", "1", "--grace", "10m", "slow.js"]);
    let mut busy = TcpStream::connect(Desk::address(&app)).expect("connect");
    busy.write_all(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    // A later one is answered, so the worker has read the first.
    assert_eq!(get(Desk::address(&app), "/"), "hi");
    busy
}

#[test]
fn start_returns_when_it_serves_and_stop_when_all_is_over() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "2", "server.js"]);
    assert_eq!((&app["name"], &app["state"]), (&"server".into(), &"ready".into()));
    assert_eq!((&app["workers_ready"], &app["version"]), (&2.into(), &1.into()));
    assert!(get(Desk::address(&app), "/").contains("pid"));
    assert_eq!(desk.listed(), [("server".into(), "ready".into())]);
    let primary = pidfd(app["pid"].as_u64().unwrap());
    let stopped = desk.json(&["stop", "--json", "server"]);
    assert_eq!(stopped["result"]["outcome"], "stopped");
    assert_eq!(stopped["version"], 1);
    // Its name is free again, so nothing of it is left.
    assert_eq!(desk.listed(), []);
    assert!(is_over(&primary));
    assert!(desk.runtime().read_dir().unwrap().next().is_none());
}

#[test]
fn people_are_told_what_happened_and_what_is_next() {
    let mut desk = Desk::new();
    let started = desk.does(&["start", "-w", "1", "server.js"]);
    let list = desk.json(&["ls", "--json"]);
    desk.adopt(&list[0]);
    assert_eq!((started.code, started.out.as_str()), (Some(0), ""));
    for part in ["server: 1 worker ready on 127.0.0.1:", "`polyfork status server`"] {
        assert!(started.err.contains(part), "{}", started.err);
    }
    let list = desk.did(&["ls"]);
    assert!(list.starts_with("name ") && list.contains("server  ready  1/1"), "{list}");
    let status = desk.did(&["status", "server"]);
    for part in
        ["server  ready, 1 of 1 workers ready", "listens", "round-robin", "slot  worker  pid"]
    {
        assert!(status.contains(part), "{status}");
    }
    let stopped = desk.does(&["stop", "server"]);
    assert!(stopped.err.contains("server: stopped: every worker finished"), "{}", stopped.err);
    let none = desk.does(&["ls"]);
    assert!(none.err.contains("no app runs"), "{}", none.err);
}

#[test]
fn an_app_outlives_its_terminal_and_has_nothing_of_it() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    let pid = app["pid"].as_u64().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    assert_eq!(fields[3], pid.to_string(), "leader of a session: {stat}");
    let open = |fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    assert!(open(0).to_string_lossy().starts_with("/memfd:"), "its words: {:?}", open(0));
    for fd in 1..3 {
        assert_eq!(open(fd), std::path::Path::new("/dev/null"), "{fd}");
    }
}

#[test]
fn a_second_app_of_that_name_is_refused_and_the_first_goes_on() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "--name", "shop", "server.js"]);
    let told = desk.refuses(&["start", "--name", "shop", "server.js"], 11);
    assert!(told.contains("shop runs already") && told.contains("polyfork stop shop"), "{told}");
    let told = desk.refuses(&["run", "--name", "shop", "server.js"], 11);
    assert!(told.contains("shop runs already"), "{told}");
    assert!(get(Desk::address(&app), "/").contains("pid"));
    assert_eq!(desk.status("shop")["pid"], app["pid"]);
}

#[test]
fn a_program_that_does_not_come_up_is_told_with_its_last_lines() {
    let desk = Desk::new();
    desk.place.file("broken.js", "console.error('no database\\x1b[2J'); process.exit(3)");
    let args = ["start", "-w", "1", "--restart-limit", "1/30s", "broken.js"];
    let told = desk.refuses(&args, 7);
    assert!(told.contains("exited with code 3") && told.contains("    no database"), "{told}");
    assert_eq!(desk.listed(), [], "nothing stays behind");
    let done = desk.does(&[&args[..1], &["--json"], &args[1..]].concat());
    let told = read(&done.out);
    assert_eq!(
        (&told["error"]["code"], &told["error"]["exit_code"]),
        (&"failed".into(), &7.into())
    );
    assert!(told["last_lines"][0].as_str().unwrap().contains("no database"), "{told}");
}

#[test]
fn why_nothing_was_started_has_the_exit_codes_of_run() {
    let desk = Desk::new();
    let told = desk.refuses(&["start", "nothing-here.js"], 3);
    assert!(told.contains("nothing-here.js"), "{told}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let server = format!("require('http').createServer().listen({port}, '127.0.0.1')");
    desk.place.file("taken.js", &server);
    let told = desk.refuses(&["start", "-w", "1", "taken.js"], 5);
    assert!(told.contains("in use"), "{told}");
    let address = format!("127.0.0.1:{port}");
    let told = desk.refuses(&["start", "-w", "1", "--listen", &address, "--", "sleep", "60"], 5);
    assert!(told.contains("in use"), "{told}");
    desk.place.file("silent.js", "setInterval(() => {}, 1000)");
    let limits = ["--ready-timeout", "300ms", "--restart-limit", "0/1s"];
    let told = desk.refuses(&[&["start", "-w", "1"], &limits[..], &["silent.js"]].concat(), 8);
    assert!(told.contains("--ready"), "{told}");
    desk.refuses(&["start", "--output", "inherit", "server.js"], 2);
    desk.refuses(&["start", "--no-control", "server.js"], 2);
    desk.refuses(&["start", "--name", "a/b", "server.js"], 2);
    desk.refuses(&["start", "--name", "..", "server.js"], 2);
    assert_eq!(desk.listed(), []);
}

#[test]
fn a_name_is_free_as_soon_as_stop_returns() {
    let mut desk = Desk::new();
    desk.place.file("short.sh", "trap 'exit 0' TERM; while :; do sleep 0.01; done");
    for _ in 0..5 {
        desk.start(&["-w", "1", "--ready", "delay=1ms", "--", "sh", "short.sh"]);
        desk.did(&["stop", "sh"]);
    }
}

#[test]
fn what_runs_in_the_foreground_is_managed_the_same_way() {
    let desk = Desk::new();
    let mut first = desk.place.events(["-w", "1", "server.js"]);
    first.wait_for("ready");
    let mut second = desk.place.events(["-w", "1", "server.js"]);
    second.wait_for("ready");
    assert_eq!(second.seen[0]["name"], "server-2", "nobody chose the name");
    let list = desk.listed();
    assert_eq!(list, [("server".into(), "ready".into()), ("server-2".into(), "ready".into())]);
    let told = desk.refuses(&["logs", "server"], 13);
    assert!(told.contains("foreground"), "{told}");
    desk.did(&["stop", "server"]);
    assert_eq!(first.end().0, 0);
    desk.did(&["kill", "server-2"]);
    assert_eq!(second.end().0, 9);
    assert_eq!(desk.listed(), []);
}

#[test]
fn without_control_there_is_nothing_to_be_found() {
    let desk = Desk::new();
    let mut cluster = desk.place.events(["-w", "1", "--no-control", "server.js"]);
    cluster.wait_for("ready");
    assert!(!desk.runtime().exists());
    assert_eq!(desk.listed(), []);
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn a_runtime_folder_that_cannot_be_made_does_not_keep_a_program_from_running() {
    let desk = Desk::new();
    let mut command = desk.place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    command.env("POLYFORK_RUNTIME_DIR", "/nowhere/at/all");
    let mut cluster = Events::of(command);
    let notice = cluster.wait_until("notice", |notice| notice["code"] == "warning");
    assert!(notice["text"].as_str().unwrap().contains("/nowhere/at/all"), "{notice}");
    cluster.wait_for("ready");
    let mut command = desk.command(&["start", "server.js"]);
    command.env("POLYFORK_RUNTIME_DIR", "/nowhere/at/all");
    let told = ended(command);
    assert_eq!(told.code, Some(14), "{told:?}");
}

#[test]
fn scale_counts_up_and_down_and_never_to_nothing() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for (wanted, workers) in [("3", 3), ("+1", 4), ("-2", 2), ("2", 2), ("1", 1)] {
        let told = desk.json(&["scale", "--json", "server", wanted]);
        assert_eq!(told["result"]["workers"], workers, "{wanted}");
        let status = desk.status("server");
        assert_eq!(status["workers_wanted"], workers);
        assert_eq!(status["workers_ready"], workers);
        assert_eq!(status["workers"].as_array().unwrap().len(), workers, "{status}");
        assert_eq!(status["restarts"], 0, "scaling is no restart");
    }
    let told = desk.refuses(&["scale", "server", "-1"], 13);
    assert!(told.contains("it has 1 worker"), "{told}");
    desk.refuses(&["scale", "server", "0"], 2);
    desk.refuses(&["scale", "server", "many"], 2);
    desk.refuses(&["scale", "server", "99999"], 2);
    desk.refuses(&["scale", "server"], 2);
    assert_eq!(desk.status("server")["workers_ready"], 1);
}

#[test]
fn restart_replaces_every_worker_and_no_request_fails() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "2", "server.js"]);
    let address = Desk::address(&app);
    let before = desk.status("server");
    let over = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let client = || {
        let (over, answered) = (Arc::clone(&over), Arc::clone(&answered));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                assert!(get(address, "/").contains("pid"));
                answered.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let clients: Vec<_> = (0..4).map(|_| client()).collect();
    let told = desk.json(&["restart", "--json", "server"]);
    assert_eq!(told["result"]["slots"], 2);
    let seen = answered.load(Ordering::Relaxed);
    eventually("requests after it", || answered.load(Ordering::Relaxed), |now| *now > seen + 50);
    over.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("a client that lost nothing");
    }
    println!("{} requests, 0 failed", answered.load(Ordering::Relaxed));
    let after = desk.status("server");
    let ids = |status: &Value| -> Vec<u64> {
        let workers = status["workers"].as_array().unwrap().iter();
        let ready = workers.filter(|worker| worker["state"] == "ready");
        ready.map(|worker| worker["worker"].as_u64().unwrap()).collect()
    };
    assert_eq!((ids(&before), ids(&after)), (vec![1, 2], vec![3, 4]));
    assert_eq!(after["restarts"], 0, "asked for, so none");
}

#[test]
fn a_restart_that_fails_leaves_the_other_slots_alone() {
    let mut desk = Desk::new();
    desk.start(&["-w", "2", "--restart-limit", "1/30s", "server.js"]);
    desk.place.file("server.js", "process.exit(4)");
    let told = desk.refuses(&["restart", "server"], 13);
    assert!(told.contains("slot 1: its new worker exited with code 4"), "{told}");
    let status = desk.status("server");
    let workers = status["workers"].as_array().unwrap();
    let second = workers.iter().find(|worker| worker["slot"] == 2).unwrap();
    assert_eq!((&second["worker"], &second["state"]), (&2.into(), &"ready".into()));
    // With a program that works again, the slot that was given up comes back.
    desk.place.file("server.js", SERVER);
    desk.did(&["restart", "server"]);
    assert_eq!(desk.status("server")["state"], "ready");
}

#[test]
fn a_shorter_grace_is_kept() {
    let mut desk = Desk::new();
    let _busy = busy(&mut desk);
    let told = desk.json(&["stop", "--json", "--grace", "100ms", "slow"]);
    assert!(told["result"]["exit_code"] == 0 || told["result"]["exit_code"] == 9, "{told}");
    assert_eq!(desk.listed(), []);
}

#[test]
fn the_second_interrupt_leaves_a_stop_to_itself() {
    let mut desk = Desk::new();
    let _busy = busy(&mut desk);
    let mut stop = Running::start(desk.command(&["stop", "slow"]));
    let mut told = Lines::of(stop.take_err());
    eventually("it stops", || desk.status("slow")["state"].clone(), |state| state == "stopping");
    stop.signal(Signal::INT);
    told.wait_for("Ctrl-C again");
    stop.signal(Signal::INT);
    assert_eq!(stop.end().code(), Some(15));
    assert_eq!(desk.status("slow")["state"], "stopping");
    // What is stopping takes no other orders but the last one.
    desk.refuses(&["scale", "slow", "2"], 13);
    desk.refuses(&["restart", "slow"], 13);
    let told = desk.json(&["kill", "--json", "slow"]);
    assert_eq!(told["result"]["outcome"], "forced");
}

#[test]
fn an_interrupted_start_starts_nothing() {
    let desk = Desk::new();
    desk.place.file("silent.js", "setInterval(() => {}, 1000)");
    let mut start = Running::start(desk.command(&["start", "-w", "1", "silent.js"]));
    eventually(
        "it is being started",
        || desk.listed(),
        |apps| apps == &[("silent".into(), "starting".into())],
    );
    eventually(
        "a worker runs",
        || desk.does(&["status", "--json", "silent"]).out,
        |status| status.contains("\"online\""),
    );
    let mut told = Lines::of(start.take_err());
    start.signal(Signal::INT);
    assert_eq!(start.end().code(), Some(15));
    told.wait_for("interrupted before it was ready: it was stopped");
    assert_eq!(desk.listed(), [], "nothing goes on, and nothing is left");
}

/// `start` of a program that never gets ready and does not leave when it is asked to.
fn starting(desk: &Desk) -> Running {
    let stays = "process.on('SIGTERM', () => {}); process.on('disconnect', () => {}); setInterval(() => {}, 1000)";
    desk.place.file("stays.js", stays);
    let start = Running::start(desk.command(&["start", "-w", "1", "--grace", "30s", "stays.js"]));
    eventually(
        "a worker runs",
        || desk.does(&["status", "--json", "stays"]).out,
        |status| status.contains("\"online\""),
    );
    start
}

#[test]
fn the_second_interrupt_ends_a_start_at_once_and_leaves_nothing() {
    let desk = Desk::new();
    let mut start = starting(&desk);
    let mut told = Lines::of(start.take_err());
    start.signal(Signal::INT);
    eventually("it stops", || desk.status("stays")["state"].clone(), |state| state == "stopping");
    start.signal(Signal::INT);
    assert_eq!(start.end().code(), Some(9));
    told.wait_for("interrupted twice before it was ready: it was stopped at once");
    assert_eq!(desk.listed(), []);
}

#[test]
fn a_start_says_that_another_command_stopped_or_killed_it() {
    let desk = Desk::new();
    let mut start = starting(&desk);
    let mut told = Lines::of(start.take_err());
    desk.did(&["stop", "--grace", "100ms", "stays"]);
    assert_eq!(start.end().code(), Some(13));
    told.wait_for("it was stopped before it was ready, by another command");
    let mut start = starting(&desk);
    desk.did(&["kill", "stays"]);
    assert_eq!(start.end().code(), Some(9));
    assert_eq!(desk.listed(), []);
}

#[test]
fn the_background_end_of_start_is_not_for_people() {
    let desk = Desk::new();
    for args in [&["primary", "-w", "1", "server.js"][..], &["primary"], &["primary", "shop"]] {
        let told = desk.refuses(args, 2);
        assert!(told.contains("use `polyfork start`"), "{told}");
    }
    assert_eq!(desk.listed(), []);
}

#[test]
fn several_are_meant_by_a_pattern_and_none_by_a_wrong_name() {
    let mut desk = Desk::new();
    for name in ["web-1", "web-2", "job"] {
        desk.start(&["-w", "1", "--name", name, "server.js"]);
    }
    assert_eq!(desk.json(&["ls", "--json", "web-*"]).as_array().unwrap().len(), 2);
    assert_eq!(desk.json(&["status", "--json", "web-?"]).as_array().unwrap().len(), 2);
    let told = desk.refuses(&["stop", "wbe-1"], 10);
    assert!(told.contains("did you mean web-1"), "{told}");
    let told = desk.refuses(&["stop", "x*"], 10);
    assert!(told.contains("no app fits x*"), "{told}");
    for verb in ["status", "restart", "stop", "kill", "logs", "events"] {
        let told = desk.refuses(&[verb, "zebra\x1b[2J"], 10);
        assert!(told.contains("zebra") && told.contains("polyfork ls"), "{told}");
    }
    let stopped = desk.json(&["stop", "--json", "web-*"]);
    assert_eq!(stopped.as_array().unwrap().len(), 2);
    assert_eq!(desk.listed(), [("job".into(), "ready".into())]);
    let failed = desk.does(&["status", "--json", "jobs"]);
    assert_eq!(read(&failed.out)["error"]["code"], "no_such_app");
    desk.did(&["stop", "--all"]);
    assert_eq!(desk.listed(), []);
    desk.did(&["stop", "--all"]);
}

#[test]
fn each_verb_tells_what_is_wrong_with_its_words() {
    let desk = Desk::new();
    for args in [
        &["status"][..],
        &["stop"],
        &["stop", "a", "--all"],
        &["stop", "a", "--grace", "5"],
        &["kill"],
        &["restart"],
        &["logs"],
        &["logs", "a", "-n", "x"],
        &["logs", "a", "--since", "yesterday"],
        &["logs", "a", "--slot", "x"],
        &["events"],
        &["events", "a", "b"],
        &["ls", "--colour"],
        &["start"],
        &["start", "--log-size", "0", "x"],
        &["start", "--log-keep", "-1", "x"],
    ] {
        let told = desk.refuses(args, 2);
        assert_eq!(told.lines().count(), 1, "{told}");
        assert!(told.contains("--help") || told.contains("polyfork"), "{told}");
    }
    assert_eq!(desk.did(&["ls", "--json"]).trim(), "[]");
    for verb in ["start", "ls", "status", "restart", "scale", "stop", "kill", "logs", "events"] {
        let help = desk.did(&[verb, "--help"]);
        assert!(help.contains("Usage: polyfork"), "{help}");
    }
    assert!(!desk.did(&["--help"]).contains("primary "), "an inner verb");
}

/// Nobody watches an app in the background: what became of it must be there to be found.
#[test]
fn an_app_that_fails_leaves_word() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "--restart-limit", "0/30s", "server.js"]);
    let primary = pidfd(app["pid"].as_u64().unwrap());
    let mut last = TcpStream::connect(Desk::address(&app)).unwrap();
    last.write_all(b"GET /die HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(is_over(&primary));
    let list = desk.json(&["ls", "--json"]);
    assert_eq!(list[0]["state"], "failed", "{list}");
    assert_eq!(list[0]["ended"]["exit_code"], 7);
    let told = desk.refuses(&["status", "server"], 10);
    assert!(told.contains("exited with code 3") && told.contains("polyfork logs"), "{told}");
    assert!(desk.did(&["logs", "server"]).contains("given up"));
    desk.did(&["stop", "server"]);
    assert_eq!(desk.listed(), []);
    desk.start(&["-w", "1", "server.js"]);
}

#[test]
fn events_of_an_app_that_fails_are_told_to_the_last() {
    let mut desk = Desk::new();
    let text = "require('http').createServer((q, s) => process.exit(1)).listen(0, '127.0.0.1')";
    desk.place.file("frail.js", text);
    let app = desk.start(&["-w", "1", "--restart-limit", "0/1m", "frail.js"]);
    let mut events = Running::start(desk.command(&["events", "frail"]));
    let mut lines = Lines::of(events.take_out());
    // Until it listens.
    while lines.seen.is_empty() {
        desk.did(&["scale", "frail", "2"]);
        desk.did(&["scale", "frail", "1"]);
        lines.wait_for("slot_retired");
    }
    let mut client = TcpStream::connect(Desk::address(&app)).unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    lines.rest();
    let all: Vec<Value> = lines.seen.iter().map(|line| read(line)).collect();
    let last: Vec<_> = all.iter().rev().take(2).map(|event| event["event"].clone()).collect();
    assert_eq!(last, ["end", "slot_failed"], "{all:?}");
    assert_eq!(events.end().code(), Some(0));
}

#[test]
fn events_are_told_live_until_the_end() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut events = Running::start(desk.command(&["events", "server"]));
    let mut lines = Lines::of(events.take_out());
    // It may not listen yet; a listener gets what happens from then on.
    let mut rounds = 0;
    while lines.seen.is_empty() && rounds < 20 {
        rounds += 1;
        desk.did(&["scale", "server", "2"]);
        desk.did(&["scale", "server", "1"]);
        if rounds > 1 {
            lines.wait_for("slot_retired");
        }
    }
    desk.did(&["stop", "server"]);
    lines.rest();
    let all: Vec<Value> = lines.seen.iter().map(|line| read(line)).collect();
    assert_eq!(all.last().unwrap()["event"], "end", "{all:?}");
    assert_eq!(events.end().code(), Some(0));
}

#[test]
fn a_status_has_every_field() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let status = desk.status("server");
    let fields = "version name pid state program policy mechanism listeners listening workers_wanted \
                  workers_ready restarts started uptime_ms cpu_ms resident_bytes polyfork runtime dialect logs \
                  log_lines_lost primary workers";
    for field in fields.split_whitespace() {
        assert!(!status[field].is_null(), "{field}: {status}");
    }
    assert!(status.as_object().unwrap().contains_key("busy"));
    let worker = status["workers"][0].as_object().unwrap();
    let fields = "slot worker pid state generation restarts last_exit uptime_ms cpu_ms resident_bytes accepted queue";
    for field in fields.split_whitespace() {
        assert!(worker.contains_key(field), "{field}: {worker:?}");
    }
    assert!(worker["resident_bytes"].as_u64().unwrap() > 1_000_000);
    let document = include_str!("../../../../docs/control.md");
    let names = status.as_object().unwrap().keys().chain(worker.keys());
    for name in names.chain(status["listening"][0].as_object().unwrap().keys()) {
        assert!(document.contains(&format!("`{name}`")), "docs/control.md lacks {name}");
    }
    assert_eq!(worker["queue"], 0);
}

#[test]
fn programs_of_any_kind_are_started() {
    let mut desk = Desk::new();
    desk.place.file(
        "app.py",
        "import socket\ns = socket.socket(fileno=3)\nwhile True:\n  c, _ = s.accept()\n  c.recv(9999)\n  c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\npython')\n  c.close()\n",
    );
    let app =
        desk.start(&["-w", "2", "--ready", "delay=200ms", "--listen", "127.0.0.1:0", "app.py"]);
    assert_eq!(get(Desk::address(&app), "/"), "python");
    assert_eq!(desk.status("app")["dialect"], "sockets");
    desk.did(&["stop", "app"]);
}

/// An app that hangs is shown as such, in a list that takes no longer for it than its limit.
#[test]
fn an_app_that_hangs_holds_up_nobody() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "--name", "stuck", "server.js"]);
    desk.start(&["-w", "1", "--name", "well", "server.js"]);
    let primary = pidfd(app["pid"].as_u64().unwrap());
    signal(&primary, Signal::STOP);
    let wanted = [("stuck".into(), "not_answering".into()), ("well".into(), "ready".into())];
    eventually("it is stopped", || desk.listed(), |listed| *listed == wanted);
    // Without what it has written it is asked, for as long as a list waits.
    std::fs::remove_file(desk.runtime().join("stuck/state.json")).unwrap();
    assert_eq!(desk.listed(), wanted);
    let told = desk.refuses(&["status", "stuck"], 12);
    assert!(told.contains("does not answer"), "{told}");
    signal(&primary, Signal::CONT);
    eventually("it answers again", || desk.listed(), |apps| apps[0].1 == "ready");
}

#[test]
fn a_list_that_nobody_reads_is_no_error() {
    let desk = Desk::new();
    let mut list = desk.command(&["ls", "--json"]);
    list.stdout(Stdio::piped());
    let mut running = Running::start(list);
    drop(running.take_out());
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn with_json_an_error_of_the_command_line_is_json_as_well() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    for (args, code, part) in [
        (&["scale", "--json", "server", "0"][..], 2, "'0'"),
        (&["status", "--json"], 2, "NAME"),
        (&["logs", "--json", "server", "--since", "banana"], 2, "banana"),
        (&["ls", "--jsn", "--json"], 2, "--jsn"),
        (&["events", "--json", "nope"], 10, "nope"),
    ] {
        let told = desk.does(args);
        let error = &read(&told.out)["error"];
        assert_eq!((told.code, &error["exit_code"]), (Some(code), &code.into()), "{told:?}");
        let text = error["text"].as_str().expect("a text");
        assert!(text.contains(part), "{args:?}: {told:?}");
        assert_eq!(told.err, format!("polyfork: {text}\n"), "{args:?}");
    }
    for args in [&["scale", "server", "0"][..], &["ls", "--jsn", "--", "--json"]] {
        let told = desk.does(args);
        assert_eq!((told.code, told.out.as_str()), (Some(2), ""), "{told:?}");
    }
}

#[test]
fn a_program_of_an_odd_name_is_shown_without_harm_and_told_as_it_is() {
    let mut desk = Desk::new();
    let odd = "odd\u{1b}[31m\u{202e}.js";
    desk.place.file(odd, "require('http').createServer().listen(0, '127.0.0.1')");
    let app = desk.start(&["-w", "1", "--name", "odd", odd]);
    assert_eq!(app["program"], odd);
    assert_eq!(desk.status("odd")["program"], odd);
    let shown = desk.did(&["status", "odd"]);
    assert!(shown.contains("odd\\u{1b}[31m\\u{202e}.js"), "{shown:?}");
    assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{shown:?}");
}
