//! What goes over: listeners and what waits on them, descriptors and nothing but them, counters, clients, half-said words.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;

use super::app::{App, workers};
use super::desk::{Desk, eventually, pidfd, signal};
use super::load::{Class, answer};
use super::support::{PATIENCE, SERVER, get};

/// A server on so many ports.
fn many(ports: u32) -> String {
    format!(
        "const http = require('http');\n\
         for (let i = 0; i < {ports}; i++) \
         http.createServer((q, r) => r.end('port ' + i)).listen(0, '127.0.0.1');\n"
    )
}

fn arrive(ports: u32, mechanism: &str) {
    let desk = Desk::new();
    desk.place.file("many.js", &many(ports));
    // Ready with the first of them; the others may take their time.
    let args = ["-w", "1", "--mechanism", mechanism, "many.js"];
    let app = App::start_on(desk, &args);
    let listeners = |app: &App| app.status()["listeners"].as_array().map_or(0, Vec::len);
    eventually("listeners", || listeners(&app), |count| *count == ports as usize);
    let before = app.status()["listeners"].clone();
    let sockets = app.inodes("socket:");
    app.upgrade();
    assert_eq!(before, app.status()["listeners"]);
    let kept = app.inodes("socket:");
    let listening = sockets.iter().filter(|inode| kept.contains(inode)).count();
    assert!(listening >= ports as usize, "{listening} of {ports}");
    // Each answers for itself.
    let addresses = before.as_array().expect("addresses");
    let mut seen: Vec<String> = addresses
        .iter()
        .map(|address| get(address.as_str().expect("text").parse().expect("an address"), "/"))
        .collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), ports as usize);
}

#[test]
fn fault_30_33_listeners_arrive() {
    arrive(33, "auto");
}

#[test]
fn fault_30_254_listeners_arrive() {
    arrive(253, "auto");
    arrive(254, "handoff");
}

#[test]
fn fault_30_and_31_a_thousand_listeners_and_descriptors_beyond_1024_arrive() {
    arrive(1000, "handoff");
}

#[test]
fn fault_31_with_many_idle_connections_nothing_is_lost() {
    let app = App::start(&["-w", "1", "--mechanism", "handoff", "server.js"]);
    let mut idle: Vec<TcpStream> =
        (0..2000).map(|_| TcpStream::connect(app.address).expect("connect")).collect();
    app.upgrade();
    for stream in &mut idle {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .expect("still open");
    }
    for stream in &mut idle {
        assert_eq!(answer(stream).0, Class::Ok);
    }
}

#[test]
fn fault_33_fifty_upgrades_leave_the_same_descriptors() {
    let app = App::start(&["-w", "2", "server.js"]);
    app.upgrade();
    // The event loop's own are made anew in each image; all others are the same by number of inode.
    let own = |list: &std::collections::BTreeMap<String, usize>| {
        let named = |name: &&String| !name.starts_with("socket:") && !name.contains("event");
        // Opened by the first line that an image writes.
        let lasting = |name: &&String| !name.ends_with("primary.log");
        let kinds = list.keys().filter(named).filter(lasting).cloned().collect::<Vec<_>>();
        (kinds, list.keys().filter(lasting).map(|name| list[name]).sum::<usize>())
    };
    // The client of the upgrade may just be leaving.
    let looks = std::iter::repeat_with(|| {
        std::thread::sleep(Duration::from_millis(10));
        app.descriptors()
    });
    let before = looks.take(30).min_by_key(|list| own(list).1).expect("a look");
    for number in 0..50 {
        app.upgrade();
        if number % 10 == 9 {
            let as_before = |now: &_| own(now) == own(&before);
            eventually(&format!("as before, after {number}"), || app.descriptors(), as_before);
        }
    }
    println!("after 51 upgrades: {} descriptors, as after the first", own(&before).1);
    let children = format!("/proc/{0}/task/{0}/children", app.pid);
    eventually(
        "trials are collected",
        || fs::read_to_string(&children).unwrap(),
        |children| children.split_whitespace().count() == 2,
    );
}

#[test]
fn fault_34_what_waits_on_a_listener_is_served_and_the_listener_is_the_same() {
    for mechanism in ["kernel", "handoff"] {
        let app = App::start(&["-w", "1", "--mechanism", mechanism, "server.js"]);
        let worker = pidfd(app.status()["workers"][0]["pid"].as_u64().expect("a pid"));
        let sockets = app.inodes("socket:");
        signal(&worker, Signal::STOP);
        let mut waiting: Vec<TcpStream> = (0..200)
            .map(|_| {
                let mut stream = TcpStream::connect(app.address).expect("connect");
                let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
                stream.write_all(request).expect("ask");
                stream
            })
            .collect();
        app.upgrade();
        let kept = app.inodes("socket:");
        assert!(sockets.iter().filter(|inode| kept.contains(inode)).count() >= 2, "{mechanism}");
        signal(&worker, Signal::CONT);
        for stream in &mut waiting {
            assert_eq!(answer(stream).0, Class::Ok, "{mechanism}");
        }
    }
}

#[test]
fn fault_35_an_upgrade_during_a_crash_loop_forgives_nothing() {
    let desk = Desk::new();
    // The first one serves, the second one ends at once, again and again.
    let crash = format!("if (process.env.NODE_APP_INSTANCE === '1') process.exit(5);\n{SERVER}");
    desk.place.file("crash.js", &crash);
    let mut command = desk.command(&["start", "-w", "2", "--restart-limit", "6/60s", "crash.js"]);
    let mut starting = super::support::Running::start({
        command.stdin(std::process::Stdio::null());
        command
    });
    let restarts = |desk: &Desk| {
        let status = desk.does(&["status", "--json", "crash"]);
        let status: serde_json::Value = serde_json::from_str(&status.out).unwrap_or_default();
        status["workers"][1]["restarts"].as_u64().unwrap_or(0)
    };
    eventually("restarts", || restarts(&desk), |count| *count >= 2);
    // Each time it is upgraded in the middle of it.
    let mut upgrades = 0;
    for _ in 0..3 {
        let before = restarts(&desk);
        let done = desk.does(&["upgrade", "crash"]);
        assert!(matches!(done.code, Some(0 | 13)), "{done:?}");
        upgrades += u32::from(done.code == Some(0));
        assert!(restarts(&desk) >= before, "counted on");
    }
    assert!(upgrades > 0);
    let state =
        |desk: &Desk| desk.json(&["status", "--json", "crash"])["workers"][1]["state"].clone();
    eventually("given up", || state(&desk), |state| *state == "failed");
    let list = desk.json(&["status", "--json", "crash"]);
    assert_eq!(
        list["workers"][1]["restarts"], 6,
        "no more than the limit, over all images: {list}"
    );
    println!("crash loop: {upgrades} upgrades, 6 restarts in all");
    // The start that began it is told in the end, by an image that it did not start.
    assert_eq!(starting.end().code(), Some(0));
    let app = desk.json(&["ls", "--json"]);
    let mut desk = desk;
    desk.adopt(&app[0]);
}

#[test]
fn counters_and_the_last_end_of_a_worker_are_counted_on() {
    let app = App::start(&["-w", "2", "server.js"]);
    for _ in 0..10 {
        get(app.address, "/");
    }
    let victim = app.status()["workers"][0]["pid"].as_u64().expect("a pid");
    signal(&pidfd(victim), Signal::KILL);
    eventually(
        "a new worker",
        || app.status(),
        |status| status["restarts"] == 1 && status["workers_ready"] == 2,
    );
    let facts = |app: &App| {
        let status = app.status();
        let of = |field: &str| {
            let workers = status["workers"].as_array().expect("workers");
            workers.iter().map(|worker| worker[field].clone()).collect::<Vec<_>>()
        };
        (status["restarts"].clone(), of("accepted"), of("last_exit"), of("generation"))
    };
    let before = facts(&app);
    app.upgrade();
    assert_eq!(before, facts(&app));
    // Turns go on where they were: exact over both images.
    for _ in 0..10 {
        get(app.address, "/");
    }
    let accepted = |value: &serde_json::Value| value.as_u64().expect("a number");
    let after = facts(&app).1;
    let more: Vec<u64> =
        after.iter().zip(&before.1).map(|(a, b)| accepted(a) - accepted(b)).collect();
    assert_eq!(more, [5, 5]);
}

#[test]
fn a_worker_that_dies_after_the_upgrade_is_replaced() {
    for mechanism in ["kernel", "handoff"] {
        let app = App::start(&["-w", "2", "--mechanism", mechanism, "server.js"]);
        app.upgrade();
        let before = workers(&app.status());
        signal(&pidfd(before[0].2), Signal::KILL);
        eventually(
            "a new worker",
            || app.status(),
            |status| status["workers_ready"] == 2 && workers(status)[0].1 > before[0].1,
        );
        let after = workers(&app.status());
        assert!(after[0].1 > before[1].1, "numbers of workers are never used again: {after:?}");
        assert!(get(app.address, "/").contains("pid"));
        app.desk.did(&["scale", &app.name, "3"]);
        app.upgrade();
        app.desk.did(&["reload", "--probation", "0s", &app.name]);
        app.desk.did(&["stop", &app.name]);
        assert_eq!(app.desk.listed(), []);
    }
}

#[test]
fn lines_that_are_half_written_are_whole_in_the_end() {
    let desk = Desk::new();
    // Half of each line before, half after whatever happens between.
    let talks = format!(
        "let n = 0;\n\
         setInterval(() => {{ process.stdout.write(`line ${{n}} begins`); \
         setTimeout(k => process.stdout.write(` and ends ${{k}}\\n`), 15, n++); }}, 25);\n{SERVER}"
    );
    desk.place.file("talks.js", &talks);
    let app = App::start_on(desk, &["-w", "1", "talks.js"]);
    for _ in 0..8 {
        app.upgrade();
    }
    let read = || fs::read_to_string(app.desk.logs().join("talks/1.log")).unwrap_or_default();
    let enough = read().lines().count() + 5;
    let text = eventually("lines", read, |text| text.lines().count() > enough);
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(" out line")).collect();
    for (number, line) in lines.iter().enumerate() {
        let expected = format!("line {number} begins and ends {number}");
        assert!(line.ends_with(&expected), "{expected:?}: {line:?}");
    }
    println!("{} lines, none torn over 8 upgrades", lines.len());
}

#[test]
fn messages_that_are_half_sent_reach_their_server() {
    // A worker that opens and closes servers all the time speaks to its primary all the time.
    let busy = format!(
        "const net = require('net');\n\
         function again() {{ const s = net.createServer().listen(0, '127.0.0.1', () => s.close(again)); }}\n\
         for (let i = 0; i < 8; i++) again();\n{SERVER}"
    );
    for mechanism in ["kernel", "handoff"] {
        let args = ["-w", "2", "--name", mechanism, "--mechanism", mechanism];
        let mut desk = Desk::new();
        desk.place.file("busy.js", &busy);
        let app = desk.start(&[&args[..], &["--ready", "delay=1s", "busy.js"]].concat());
        let before = workers(&desk.status(mechanism));
        for _ in 0..6 {
            let done = desk.does(&["upgrade", mechanism]);
            assert_eq!(done.code, Some(0), "{done:?}");
        }
        assert_eq!(before, workers(&desk.status(mechanism)), "{app}");
        let said = fs::read_to_string(desk.logs().join(mechanism).join("primary.log")).unwrap();
        assert!(!said.contains("rules of its channel"), "{said}");
    }
}

#[test]
fn who_listens_to_events_goes_on_listening_and_who_is_about_to_ask_is_answered() {
    let app = App::start(&["-w", "1", "server.js"]);
    let socket = || {
        let path = app.desk.runtime().join(&app.name).join("control");
        let stream = UnixStream::connect(path).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        stream
    };
    let (listener, mut asker) = (socket(), socket());
    (&listener).write_all(b"{\"verb\":\"events\"}\n").expect("ask");
    let mut lines = BufReader::new(listener).lines();
    assert!(lines.next().expect("a line").expect("text").contains("accepted"));
    // Half a request before, half after.
    asker.write_all(b"{\"verb\":").expect("ask");
    app.upgrade();
    asker.write_all(b"\"brief\"}\n").expect("ask");
    let mut answer = String::new();
    BufReader::new(&asker).read_line(&mut answer).expect("an answer");
    assert!(answer.contains("\"ok\":true") && answer.contains("server"), "{answer}");
    let upgraded = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("upgraded")));
    assert!(upgraded.is_some());
    signal(&pidfd(app.status()["workers"][0]["pid"].as_u64().unwrap()), Signal::KILL);
    let exit = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("\"exit\"")));
    assert!(exit.is_some(), "events of the new image");
    drop(asker);
}

#[test]
fn unix_sockets_keep_their_file_and_it_goes_with_the_app() {
    for policy in ["round-robin", "shared"] {
        let mut desk = Desk::new();
        let server = SERVER.replace("Number(process.env.PORT || 0), '127.0.0.1'", "'app.sock'");
        desk.place.file("unix.js", &server);
        let path = desk.place.path().join("app.sock");
        desk.start(&["-w", "2", "--policy", policy, "unix.js"]);
        desk.did(&["upgrade", "unix"]);
        let mut stream = UnixStream::connect(&path).expect("connect");
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        assert!(text.contains("200 OK"), "{policy}: {text}");
        desk.did(&["stop", "unix"]);
        assert!(!path.exists(), "{policy}");
    }
}

#[test]
fn signals_that_come_meanwhile_are_obeyed() {
    for step in 0..8 {
        let app = App::start(&["-w", "1", "server.js"]);
        let primary = pidfd(app.pid);
        let mut upgrade = super::support::Running::start(app.desk.command(&["upgrade", "server"]));
        std::thread::sleep(Duration::from_millis(step * 30));
        signal(&primary, Signal::TERM);
        upgrade.end();
        assert!(super::desk::is_over(&primary), "it stops, in whichever image");
        assert_eq!(app.desk.listed(), []);
    }
}

#[test]
fn a_changed_file_that_waits_for_quiet_is_reloaded_by_the_new_image() {
    let desk = Desk::new();
    let source = desk.place.path().join("source");
    fs::create_dir(&source).expect("a folder");
    let app =
        App::start_on(desk, &["-w", "1", "--watch", "source", "--watch-delay", "5s", "server.js"]);
    fs::write(source.join("a.js"), "1").expect("a file");
    app.desk.did(&["upgrade", &app.name]);
    let generation = || app.status()["workers"][0]["generation"].clone();
    eventually("a reload", generation, |generation| *generation == 2);
}

#[test]
fn fault_108_secrets_are_told_by_nobody() {
    let desk = Desk::new();
    let args = ["-w", "1", "--env", "TOKEN=canary-in-env", "server.js", "--key", "canary-in-args"];
    let app = App::start_on(desk, &args);
    let memory = || {
        let files = app.descriptors().into_iter();
        files.filter(|(file, _)| file.starts_with("/memfd:")).collect::<Vec<_>>()
    };
    // What it was given, which only its user and root can open.
    let given = memory();
    assert_eq!(given.len(), 1, "{given:?}");
    let told = app.desk.does(&["upgrade", "--json", "server"]);
    let bad = app.refuses(&app.desk.place.file("text", "x"), &[]);
    let status = app.desk.did(&["status", "--json", "server"]);
    let list = app.desk.did(&["ls", "--json"]);
    for text in [&told.out, &told.err, &bad, &status, &list, &app.says()] {
        assert!(!text.contains("canary"), "{text}");
    }
    // What was left to the new image is gone: nobody can open it any more.
    assert_eq!(memory(), given);
}

/// Ends each connection by closing it, without a word before: whoever else holds it keeps its client waiting.
const CLOSES: &str = "
require('net').createServer(socket => socket.write('bye', () => socket.destroy())).listen(0, '127.0.0.1');
";

#[test]
fn connections_that_were_on_their_way_are_let_go_once_their_worker_has_them() {
    let desk = Desk::new();
    desk.place.file("closes.js", CLOSES);
    let options = ["-w", "1", "--mechanism", "handoff", "--ack-limit", "1m", "closes.js"];
    let app = App::start_on(desk, &options);
    let worker = pidfd(app.status()["workers"][0]["pid"].as_u64().expect("a pid"));
    signal(&worker, Signal::STOP);
    let mut clients: Vec<TcpStream> =
        (0..3).map(|_| TcpStream::connect(app.address).expect("a client")).collect();
    app.upgrade();
    signal(&worker, Signal::CONT);
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("the end of the connection");
        assert_eq!(answer, "bye");
    }
}

/// Answers each datagram with who it is.
const UDP: &str = "
const socket = require('dgram').createSocket('udp4');
socket.on('message', (m, from) => socket.send(m + ' from ' + process.pid, from.port, from.address));
socket.bind(PORT, '127.0.0.1');
";

#[test]
fn udp_sockets_are_carried() {
    let free = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address");
    drop(free);
    let mut desk = Desk::new();
    desk.place.file("udp.js", &UDP.replace("PORT", &address.port().to_string()));
    desk.start(&["-w", "2", "udp.js"]);
    let client = std::net::UdpSocket::bind("127.0.0.1:0").expect("a client");
    client.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let ask = |text: &str| {
        client.send_to(text.as_bytes(), address).expect("asked");
        let mut answer = [0; 100];
        let (len, _) = client.recv_from(&mut answer).expect("an answer");
        String::from_utf8_lossy(&answer[..len]).into_owned()
    };
    assert!(ask("before").starts_with("before from"));
    desk.did(&["upgrade", "udp"]);
    assert!(ask("after").starts_with("after from"));
    desk.did(&["restart", "udp"]);
    assert!(ask("restarted").starts_with("restarted from"), "the socket is given on");
}

#[test]
fn sockets_that_the_primary_inherited_stay_open_under_their_numbers() {
    let mut desk = Desk::new();
    let server = SERVER.replace("Number(process.env.PORT || 0), '127.0.0.1'", "{ fd: 3 }");
    desk.place.file("given.js", &server);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    // As a service manager passes it on: number 3, open over exec.
    let python = "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3); os.execv(sys.argv[2], sys.argv[2:])";
    use std::os::fd::AsRawFd;
    let number = listener.as_raw_fd().to_string();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("open over exec");
    let polyfork = desk.command(&["run", "--json", "-w", "1", "--name", "given", "given.js"]);
    let mut command = super::support::command("python3");
    command.args(["-c", python, &number]).arg(polyfork.get_program()).args(polyfork.get_args());
    command.current_dir(desk.place.path()).stdin(std::process::Stdio::null());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    let mut events = super::support::Events::of(command);
    events.wait_for("ready");
    assert!(get(address, "/").contains("pid"));
    let app = desk.json(&["ls", "--json"]);
    desk.adopt(&app[0]);
    let open = || fs::read_link(format!("/proc/{}/fd/3", app[0]["pid"])).expect("number 3");
    let before = open();
    for _ in 0..2 {
        desk.did(&["upgrade", "given"]);
        assert_eq!(before, open());
        assert!(get(address, "/").contains("pid"));
        desk.did(&["restart", "given"]);
        assert!(get(address, "/").contains("pid"), "a new worker is given it, too");
    }
}
