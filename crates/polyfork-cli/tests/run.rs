//! `polyfork run` with real workers: events, output, signals, exit codes.
//!
//! Needs `node` and `python3`, as the project's tests do.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use support::{Events, Lines, PATIENCE, Place, Running, get};

#[test]
fn events_tell_the_life_of_a_cluster_in_order() {
    let place = Place::with_server();
    let mut cluster = place.events(["-w", "2", "--name", "shop", "server.js"]);
    let address = cluster.address();
    cluster.wait_for("ready");
    assert!(get(address, "/").contains("pid"));
    cluster.running.signal(Signal::TERM);
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (0, &"stopped".into()));

    let setup = &cluster.seen[0];
    assert_eq!(setup["event"], "setup");
    assert_eq!((&setup["v"], &setup["workers"]), (&1.into(), &2.into()));
    assert_eq!((&setup["name"], &setup["dialect"]), (&"shop".into(), &"node".into()));
    assert_eq!(setup["runtime"], "node");
    for worker in [1, 2] {
        let story: Vec<&str> = cluster
            .seen
            .iter()
            .filter(|event| event["worker"] == worker && event["event"] != "disconnect")
            .filter_map(|event| event["event"].as_str())
            .collect();
        assert_eq!(story.first(), Some(&"fork"));
        assert_eq!(story.last(), Some(&"exit"));
        let place = |name: &str| {
            story.iter().position(|one| *one == name).unwrap_or_else(|| panic!("{name}: {story:?}"))
        };
        assert!(place("online") < place("listening"), "{story:?}");
        assert!(place("listening") < place("worker_ready"), "{story:?}");
        assert!(place("worker_ready") < place("draining"), "{story:?}");
    }
    for event in &cluster.seen {
        assert!(event["event"].is_string() && event["time"].is_string(), "{event}");
    }
}

#[test]
fn hang_up_reloads_and_a_bad_version_leaves_the_old_one_serving() {
    let place = Place::with_server();
    let mut cluster = place.events(["-w", "2", "server.js"]);
    let address = cluster.address();
    cluster.wait_for("ready");
    cluster.running.signal(Signal::HUP);
    let report = cluster.wait_for("reloaded");
    assert_eq!((&report["generation"], &report["workers"]), (&2.into(), &2.into()));
    assert_eq!((&report["refused"], &report["reset"]), (&0.into(), &0.into()));
    let old = cluster.seen.iter().filter(|event| event["event"] == "exit");
    assert_eq!(
        old.filter_map(|event| event["worker"].as_u64()).collect::<BTreeSet<_>>(),
        [1, 2].into()
    );

    place.file("server.js", "console.error('half a deployment'); process.exit(3)");
    cluster.running.signal(Signal::HUP);
    let failed = cluster.wait_for("reload_failed");
    assert!(failed["worker"].as_u64().is_some_and(|worker| worker > 4), "{failed}");
    assert_eq!(failed["last_lines"], serde_json::json!(["half a deployment"]));
    assert!(failed["text"].as_str().is_some_and(|text| text.contains("exited with code 3")));
    assert!(get(address, "/").contains("pid"));
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn listening_is_told_with_address_port_policy_and_mechanism() {
    let place = Place::with_server();
    let mut cluster = place.events(["-w", "1", "--mechanism", "handoff", "server.js"]);
    let address = cluster.address();
    let listening = cluster.wait_for("listening");
    assert_eq!(listening["address"], address.to_string());
    assert_eq!(listening["port"], address.port());
    assert_eq!(listening["policy"], "round-robin");
    assert_eq!(listening["mechanism"], "handoff");
    assert_eq!(listening["exact"], true);
    assert_eq!((&listening["slot"], &listening["worker"]), (&1.into(), &1.into()));
}

#[test]
fn people_are_told_who_where_how_and_why() {
    let place = Place::with_server();
    let mut running = Running::start(place.polyfork(["run", "-w", "2", "server.js"]));
    let mut err = Lines::of(running.take_err());
    err.wait_for("all workers are ready (2)");
    running.signal(Signal::INT);
    assert_eq!(running.end().code(), Some(0));
    let all = err.rest().join("\n") + &err.seen.join("\n");
    for part in [
        "server: 2 workers",
        "JavaScript module",
        "Node ",
        "listening on 127.0.0.1:",
        "round-robin",
        "slot 1: ready after",
        "finishing",
        "stopped: every worker finished",
    ] {
        assert!(all.contains(part), "lacks {part:?}: {all}");
    }
    assert!(!all.contains('\x1b'), "no colours without a terminal");
}

#[test]
fn arguments_environment_and_directory_reach_workers() {
    let place = Place::new();
    let elsewhere = Place::new();
    elsewhere.file(
        "tell.js",
        "console.log(JSON.stringify([process.argv.slice(2), process.env.A, process.env.B, process.cwd()]));
         require('http').createServer().listen(0, '127.0.0.1');",
    );
    let directory = elsewhere.path().canonicalize().unwrap();
    let directory = directory.to_str().unwrap();
    let mut cluster = place.events([
        "-w", "1", "--env", "A=1=2", "--env", "B=", "--cwd", directory, "tell.js", "--port", "3",
        "--", "-w",
    ]);
    let line = cluster.wait_for("output");
    let told: Value = serde_json::from_str(line["line"].as_str().unwrap()).unwrap();
    assert_eq!(told, serde_json::json!([["--port", "3", "--", "-w"], "1=2", "", directory]));
}

#[test]
fn web_concurrency_counts_unless_a_number_is_given() {
    let place = Place::with_server();
    for (args, workers) in [(vec!["server.js"], 3), (vec!["-w", "1", "server.js"], 1)] {
        let mut command = place.polyfork(["run", "--json"]);
        command.args(args).env("WEB_CONCURRENCY", "3");
        let mut cluster = Events::of(command);
        let setup = cluster.wait_for("setup");
        assert_eq!(setup["workers"], workers);
        if workers == 3 {
            assert!(setup["workers_why"].as_str().unwrap().contains("WEB_CONCURRENCY"));
        }
        assert_eq!(cluster.wait_for("ready")["workers"], workers);
    }
}

#[test]
fn a_web_concurrency_that_is_not_followed_is_told() {
    let place = Place::with_server();
    for value in ["garbage", "0", "-1", "1.5"] {
        let mut command = place.polyfork(["run", "--json", "server.js"]);
        command.env("WEB_CONCURRENCY", value);
        let mut cluster = Events::of(command);
        let workers = cluster.wait_for("setup")["workers"].clone();
        let notice = cluster.wait_for("notice");
        let text = notice["text"].as_str().unwrap();
        for part in [format!("WEB_CONCURRENCY={value}"), format!("{workers} used instead")] {
            assert!(text.contains(&part), "lacks {part}: {text}");
        }
    }
}

#[test]
fn output_that_is_lost_is_told_once_when_it_happens() {
    let place = Place::new();
    place.file(
        "talk.js",
        "setInterval(() => console.log('hello'), 5); require('http').createServer().listen(0, '127.0.0.1');",
    );
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let gone = || std::io::pipe().unwrap().1;
    for (json, out) in
        [(false, Stdio::from(full())), (false, Stdio::from(gone())), (true, Stdio::from(full()))]
    {
        let mut command = place.polyfork(["run", "-w", "1", "--grace", "100ms", "talk.js"]);
        command.env("POLYFORK_JSON", if json { "1" } else { "0" });
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = command.stdout(out).stderr(writer).spawn().unwrap();
        drop(command);
        let mut lines = std::io::BufReader::new(reader).lines().map(Result::unwrap);
        let told = lines.by_ref().find(|line| line.contains("cannot write to standard output"));
        assert!(told.is_some_and(|line| !line.contains("os error")));
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(pidfd, Signal::TERM).unwrap();
        assert!(!lines.any(|line| line.contains("cannot write")), "told twice");
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn a_worker_that_ends_without_a_word_is_not_quoted() {
    let place = Place::new();
    place.file("silent.js", "process.exit(3)");
    let told = place.ends(["run", "-w", "1", "--restart-limit", "1/30s", "silent.js"]);
    assert_eq!(told.code, Some(7));
    assert!(told.err.contains("it wrote nothing to standard error"), "{}", told.err);
    assert!(!told.err.contains("last lines"), "{}", told.err);
    let inherit =
        ["run", "-w", "1", "--restart-limit", "1/30s", "--output", "inherit", "silent.js"];
    let told = place.ends(inherit);
    assert!(!told.err.contains("wrote nothing"), "nobody listened: {}", told.err);
}

#[test]
fn every_line_has_its_slot_in_front_and_no_line_is_cut() {
    const LINES: usize = 2_000;
    let place = Place::new();
    place.file(
        "talk.js",
        "const me = process.env.NODE_UNIQUE_ID || require('cluster').worker.id;
         for (let n = 0; n < 2000; n++) {
           process.stdout.write(`out ${me} ${n} ${'o'.repeat(n % 300)}.\\n`);
           process.stderr.write(`err ${me} ${n} ${'e'.repeat(n % 300)}.\\n`);
         }
         require('http').createServer().listen(0, '127.0.0.1', () => process.stdout.write('no newline'));",
    );
    let mut running = Running::start(place.polyfork(["run", "-w", "2", "talk.js"]));
    let mut out = Lines::of(running.take_out());
    let mut err = Lines::of(running.take_err());
    err.wait_for("all workers are ready");
    running.signal(Signal::TERM);
    let out = out.rest();
    let mut all_err = err.rest();
    all_err.extend(err.seen);
    assert_eq!(running.end().code(), Some(0));

    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    for line in &out {
        let (slot, text) = line.split_once(" | ").unwrap_or_else(|| panic!("no prefix: {line:?}"));
        if text == "no newline" {
            *next.entry(format!("{slot} open")).or_default() += 1;
            continue;
        }
        let words: Vec<&str> = text.split(' ').collect();
        let expected = next.entry(slot.to_owned()).or_default();
        assert_eq!((words[0], words[2]), ("out", expected.to_string().as_str()), "{line:?}");
        assert_eq!(words[3], format!("{}.", "o".repeat(*expected % 300)), "{line:?}");
        *expected += 1;
    }
    let counted: Vec<(&str, usize)> = next.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    assert_eq!(counted, [("1", LINES), ("1 open", 1), ("2", LINES), ("2 open", 1)]);
    let errors = all_err.iter().filter(|line| line.contains(" | err ")).count();
    assert!(errors >= 2 * LINES, "{errors} lines on standard error");
}

#[test]
fn a_reader_that_stops_holds_up_no_signal_and_loses_no_line() {
    const LINES: usize = 60_000;
    let place = Place::new();
    place.file(
        "flood.js",
        "const flood = () => {
           for (let n = 0; n < 60000; n++) process.stdout.write(`line ${n} ${'x'.repeat(40)}\\n`);
         };
         require('http').createServer().listen(0, '127.0.0.1', () => {
           if (require('cluster').worker.id === 1) setTimeout(flood, 50);
         });",
    );
    let mut running = Running::start(place.polyfork(["run", "-w", "1", "flood.js"]));
    let out = running.take_out();
    let mut err = Lines::of(running.take_err());
    err.wait_for("slot 1: ready");
    // Nobody reads standard output: the worker is stuck in its pipe by now or will be. The primary is not.
    running.signal(Signal::TTIN);
    err.wait_for("slot 2: ready");
    running.signal(Signal::TTOU);
    err.wait_for("slot 2: closed");

    let mut out = Lines::of(out);
    let mut expected = 0;
    while expected < LINES {
        let line = out.next().expect("all lines come");
        if let Some(text) = line.strip_prefix("1 | line ") {
            let (number, rest) = text.split_once(' ').unwrap();
            assert_eq!(number, expected.to_string());
            assert_eq!(rest.len(), 40);
            expected += 1;
        }
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().code(), Some(0));
}

#[test]
fn a_reader_that_leaves_does_not_end_the_cluster() {
    let place = Place::with_server();
    let mut cluster = Running::start(place.polyfork(["run", "--json", "-w", "1", "server.js"]));
    let mut out = std::io::BufReader::new(cluster.take_out());
    let mut line = String::new();
    let address = loop {
        line.clear();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "bound" {
            break event["address"].as_str().unwrap().parse().unwrap();
        }
    };
    drop(out);
    for _ in 0..3 {
        assert!(get(address, "/").contains("pid"));
    }
    cluster.signal(Signal::TERM);
    assert_eq!(cluster.end().code(), Some(0));
}

#[test]
fn a_worker_that_dies_is_replaced_and_the_reason_is_told() {
    let place = Place::with_server();
    let mut cluster = place.events(["-w", "2", "server.js"]);
    let address = cluster.address();
    cluster.wait_for("ready");
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /die HTTP/1.0\r\n\r\n").unwrap();
    let _cut_off = stream.read_to_end(&mut Vec::new());
    let exit = cluster.wait_for("exit");
    assert_eq!((&exit["code"], &exit["signal"]), (&3.into(), &Value::Null));
    assert_eq!((&exit["reason"], &exit["voluntary"]), (&"exited".into(), &false.into()));
    assert!(exit["restart_in_ms"].is_u64() && exit["lived_ms"].is_u64());
    let again = cluster.wait_until("worker_ready", |event| event["worker"] == 3);
    assert_eq!(again["slot"], exit["slot"], "the successor takes the slot over");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn workers_that_end_at_once_are_given_up_with_their_last_lines() {
    let place = Place::new();
    place.file("dies.js", "console.error('first\\nError: kaputt'); process.exit(1)");
    let args = ["-w", "2", "--restart-limit", "1/1m", "dies.js"];
    let mut cluster = place.events(args);
    let failed = cluster.wait_for("slot_failed");
    assert_eq!((&failed["restarts"], &failed["window_ms"]), (&1.into(), &60_000.into()));
    assert_eq!(failed["last_lines"], serde_json::json!(["first", "Error: kaputt"]));
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (7, &"failed".into()));

    let told = place.ends(["run"].into_iter().chain(args));
    assert_eq!(told.code, Some(7));
    let (_, explained) =
        told.err.split_once("given up after 1 restart in 1 min").expect("given up");
    assert!(explained.contains("    Error: kaputt"), "{}", told.err);
    assert!(explained.contains("every slot was given up"), "{}", told.err);
}

#[test]
fn workers_that_never_listen_are_told_as_such() {
    let place = Place::new();
    place.file("idle.js", "setInterval(() => {}, 1000)");
    let mut cluster =
        place.events(["-w", "1", "--ready-timeout", "300ms", "--restart-limit", "1/1m", "idle.js"]);
    let exit = cluster.wait_for("exit");
    assert_eq!(exit["reason"], "never_ready");
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (8, &"never_ready".into()));
    assert!(end["text"].as_str().unwrap().contains("--ready"));
}

#[test]
fn a_port_in_use_ends_with_its_own_code_and_names_the_port() {
    let place = Place::with_server();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let env = format!("PORT={port}");
    let mut cluster = place.events(["-w", "2", "--env", &env, "server.js"]);
    let failed = cluster.wait_for("bind_failed");
    assert_eq!(failed["port"].to_string(), port);
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (5, &"address_in_use".into()));
    let text = end["text"].as_str().unwrap();
    assert!(text.contains(&port) && text.contains("ss -ltnp"), "{text}");
}

#[test]
fn a_second_cluster_does_not_share_the_port_of_the_first() {
    let place = Place::with_server();
    let mut first = place.events(["-w", "1", "server.js"]);
    let address = first.address();
    first.wait_for("ready");
    let env = format!("PORT={}", address.port());
    let mut second = place.events(["-w", "1", "--env", &env, "server.js"]);
    assert_eq!(second.end().0, 5);
    assert!(get(address, "/").contains("pid"), "the first one serves on");
}

#[test]
fn an_inherited_address_in_use_is_told_before_anything_starts() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = place.ends(["run", "--listen", &address, "sleep", "100"]);
    assert_eq!(ended.code, Some(5), "{ended:?}");
    assert!(ended.err.contains(&address) && ended.err.contains("in use"), "{ended:?}");
    let ended = place.ends(["run", "--listen", "192.0.2.1:80", "sleep", "100"]);
    assert_eq!(ended.code, Some(6), "{ended:?}");
    assert!(ended.err.contains("192.0.2.1:80"), "{ended:?}");
}

#[test]
fn a_port_that_is_not_permitted_is_told_with_what_would_permit_it() {
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if first.trim().parse::<u16>().unwrap() <= 99 {
        eprintln!("skipped: this machine lets everyone bind port 99");
        return;
    }
    let place = Place::with_server();
    let mut command = place.polyfork(["run", "--json", "-w", "1", "--env", "PORT=99", "server.js"]);
    if rustix::process::geteuid().is_root() {
        command.uid(65_534).gid(65_534);
    }
    let mut cluster = Events::of(command);
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (6, &"address_refused".into()));
    let text = end["text"].as_str().unwrap();
    assert!(text.contains("127.0.0.1:99") && text.contains("CAP_NET_BIND_SERVICE"), "{text}");
}

#[test]
fn a_second_signal_ends_workers_at_once() {
    let place = Place::new();
    place.file(
        "stubborn.js",
        "process.on('SIGTERM', () => {}); setInterval(() => {}, 1000);
         require('http').createServer().listen(0, '127.0.0.1');",
    );
    let mut cluster = place.events(["-w", "2", "--grace", "10m", "stubborn.js"]);
    cluster.wait_for("ready");
    cluster.running.signal(Signal::TERM);
    cluster.wait_for("draining");
    cluster.running.signal_again(Signal::TERM);
    let (code, end) = cluster.end();
    assert_eq!((code, &end["outcome"]), (9, &"forced".into()));
}

#[test]
fn anything_else_inherits_its_socket() {
    let place = Place::new();
    place.file(
        "app.py",
        "import os, socket
listener = socket.socket(fileno=3)
listener.setblocking(True)
assert os.environ['LISTEN_FDS'] == '1' and int(os.environ['LISTEN_PID']) == os.getpid()
print('serving', flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(1000)
    connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n%d' % os.getpid())
    connection.close()
",
    );
    let mut cluster =
        place.events(["-w", "2", "--listen", "127.0.0.1:0", "--ready", "delay=100ms", "app.py"]);
    assert_eq!(cluster.wait_for("setup")["dialect"], "sockets");
    let address = cluster.address();
    cluster.wait_for("ready");
    let pids: Vec<String> = (0..10).map(|_| get(address, "/")).collect();
    let mut different = pids.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), 2, "{pids:?}");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn output_can_be_discarded_and_can_be_inherited() {
    let place = Place::new();
    place.file(
        "talk.js",
        "console.log('hello'); require('http').createServer().listen(0, '127.0.0.1');",
    );
    for (how, expected) in [("none", ""), ("inherit", "hello\n"), ("prefix", "1 | hello\n")] {
        let mut running =
            Running::start(place.polyfork(["run", "-w", "1", "--output", how, "talk.js"]));
        let mut out = running.take_out();
        let mut err = Lines::of(running.take_err());
        err.wait_for("slot 1: ready");
        running.signal(Signal::TERM);
        assert_eq!(running.end().code(), Some(0));
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(text, expected, "--output {how}");
    }
}

#[test]
fn messages_of_workers_are_told_as_they_are() {
    let place = Place::new();
    place.file(
        "send.js",
        "require('http').createServer().listen(0, '127.0.0.1', () => process.send({ a: [1, 'zwei'] }));",
    );
    let mut cluster = place.events(["-w", "1", "send.js"]);
    assert_eq!(cluster.wait_for("message")["message"], serde_json::json!({ "a": [1, "zwei"] }));
}

#[test]
fn the_primary_stays_small() {
    let place = Place::with_server();
    let mut cluster = place.events(["-w", "2", "server.js"]);
    let address = cluster.address();
    cluster.wait_for("ready");
    for _ in 0..100 {
        get(address, "/");
    }
    // A moment after the last event it gives back what it needed to start.
    let until = Instant::now() + PATIENCE;
    let mut kib = cluster.running.resident_kib();
    while !cfg!(debug_assertions) && kib > 4096 {
        assert!(Instant::now() < until, "{kib} KiB");
        std::thread::sleep(Duration::from_millis(50));
        kib = cluster.running.resident_kib();
    }
    println!("primary: {kib} KiB resident");
}

/// The fault: a program that cannot tell what it inherits leaves the delay of small writes on, and answers on kept-alive
/// connections wait for acknowledgements.
#[test]
fn connections_of_inherited_listeners_write_without_delay() {
    for policy in ["round-robin", "shared"] {
        let place = Place::new();
        place.file(
            "delay.py",
            "import socket\n\
             listener = socket.socket(fileno=3)\n\
             while True:\n    \
                 connection, _ = listener.accept()\n    \
                 connection.recv(65536)\n    \
                 set = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)\n    \
                 connection.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\nnodelay %d' % (set != 0))\n    \
                 connection.close()\n",
        );
        let words = ["-w", "1", "--policy", policy, "--listen", "127.0.0.1:0", "delay.py"];
        let mut events = place.events(words);
        let address = events.address();
        assert_eq!(get(address, "/"), "nodelay 1", "{policy}");
        events.running.signal(Signal::TERM);
        assert_eq!(events.end().0, 0);
    }
}
