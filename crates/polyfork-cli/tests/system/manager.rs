//! What a service manager is told, and what is taken from it: a test plays the manager.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime};

use super::support::{Events, PATIENCE, Place, command, get};

/// A notify socket, and what was said there.
struct Manager {
    socket: UnixDatagram,
    seen: Vec<String>,
}

impl Manager {
    fn of(place: &Place, command: &mut Command) -> Manager {
        let path = place.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("a notify socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        command.env("NOTIFY_SOCKET", &path);
        Manager { socket, seen: Vec::new() }
    }

    fn next(&mut self) -> String {
        let mut buffer = [0; 4096];
        let len = self.socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{e}: {:#?}", self.seen));
        let text = String::from_utf8(buffer[..len].to_vec()).expect("text");
        self.seen.push(text.clone());
        text
    }

    /// Reads until somebody says this line.
    fn wait_for(&mut self, line: &str) -> String {
        loop {
            let text = self.next();
            if text.lines().any(|said| said == line) {
                return text;
            }
        }
    }
}

fn monotonic_usec() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

fn value<'a>(text: &'a str, name: &str) -> &'a str {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(key, _)| *key == name).map(|(_, value)| value).next().expect(name)
}

#[test]
fn a_manager_is_told_what_happens_and_when() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "2", "server.js"]);
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    let ready = manager.wait_for("READY=1");
    assert_eq!(value(&ready, "MAINPID"), cluster.running.pid().to_string());
    assert_eq!(value(&ready, "STATUS"), "2 of 2 workers ready");
    let before = monotonic_usec();
    cluster.running.signal(Signal::HUP);
    let reloading = manager.wait_for("RELOADING=1");
    let at: u64 = value(&reloading, "MONOTONIC_USEC").parse().expect("a number");
    assert!(before <= at && at <= monotonic_usec(), "{before} {at}");
    // A worker that is ready besides is no news.
    manager.wait_for("READY=1");
    cluster.running.signal(Signal::TERM);
    let stopping = manager.wait_for("STOPPING=1");
    assert!(value(&stopping, "STATUS").starts_with("stopping; "), "{stopping}");
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn a_reload_that_fails_is_over_as_well() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    manager.wait_for("READY=1");
    place.file("server.js", "process.exit(7)");
    cluster.running.signal(Signal::HUP);
    manager.wait_for("RELOADING=1");
    let over = manager.wait_for("READY=1");
    assert!(over.contains("STATUS=1 of 1 workers ready"), "{over}");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn the_next_image_of_an_upgrade_goes_on_telling() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    run.env("WATCHDOG_USEC", "200000");
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    manager.wait_for("READY=1");
    cluster.running.signal(Signal::USR2);
    cluster.wait_until("notice", |notice| notice["code"] == "upgraded");
    // What was said before is not said again; signs of life come, and what is new is told.
    let before = manager.seen.len();
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    cluster.running.signal(Signal::HUP);
    let reloading = manager.wait_for("RELOADING=1");
    assert!(!reloading.contains("STOPPING"), "{reloading}");
    manager.wait_for("READY=1");
    let again = |text: &&String| text.contains("READY=1");
    assert_eq!(manager.seen[before..].iter().filter(again).count(), 1, "{:#?}", manager.seen);
    cluster.running.signal(Signal::TERM);
    manager.wait_for("STOPPING=1");
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn nobody_is_told_ready_when_no_worker_is() {
    let place = Place::new();
    place.file("bad.js", "process.exit(7)");
    let options = ["run", "--json", "-w", "1", "--restart-limit", "1/10s", "bad.js"];
    let mut run = place.polyfork(options);
    let manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    assert_eq!(cluster.end().0, 7);
    manager.socket.set_nonblocking(true).expect("non-blocking");
    let mut buffer = [0; 4096];
    while let Ok(len) = manager.socket.recv(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        assert!(!text.contains("READY=1"), "{text}");
    }
}

#[test]
fn signs_of_life_come_again_and_again() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    run.env("WATCHDOG_USEC", "100000");
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    manager.wait_for("READY=1");
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1");
    }
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

#[test]
fn a_watchdog_for_somebody_else_is_not_fed() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    run.env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    manager.wait_for("READY=1");
    cluster.running.signal(Signal::TERM);
    manager.wait_for("STOPPING=1");
    assert_eq!(cluster.end().0, 0);
    assert!(!manager.seen.iter().any(|text| text.contains("WATCHDOG")), "{:#?}", manager.seen);
}

#[test]
fn a_manager_that_is_gone_is_no_reason_to_stop() {
    let place = Place::with_server();
    let mut run = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    run.env("NOTIFY_SOCKET", place.path().join("nobody")).env("WATCHDOG_USEC", "20000");
    let mut cluster = Events::of(run);
    cluster.wait_for("ready");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
    let mut odd = place.polyfork(["run", "--json", "-w", "1", "server.js"]);
    odd.env("NOTIFY_SOCKET", "nonsense");
    let mut cluster = Events::of(odd);
    cluster.wait_for("ready");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
    assert!(cluster.seen.iter().any(|event| event.to_string().contains("NOTIFY_SOCKET")));
}

#[test]
fn workers_do_not_get_what_is_the_primarys() {
    let place = Place::new();
    place.file(
        "app.js",
        "const names = ['NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID', 'LISTEN_FDS', 'LISTEN_PID',
                        'LISTEN_FDNAMES', 'FDSTORE'];
         console.log('seen ' + names.filter(name => name in process.env));
         require('http').createServer(() => {}).listen(0, '127.0.0.1');",
    );
    let mut run = place.polyfork(["run", "--json", "-w", "1", "app.js"]);
    run.env("WATCHDOG_USEC", "60000000").env("WATCHDOG_PID", "1").env("LISTEN_FDS", "0");
    run.env("LISTEN_FDNAMES", "").env("FDSTORE", "8");
    let mut manager = Manager::of(&place, &mut run);
    let mut cluster = Events::of(run);
    let line = cluster.wait_for("output")["line"].as_str().expect("a line").to_owned();
    assert_eq!(line, "seen ");
    manager.wait_for("READY=1");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}

/// Starts the command as a manager that listens would: the socket is descriptor 3, and `LISTEN_PID` is the command's.
fn activated(place: &Place, listener: &TcpListener, args: &[&str]) -> Command {
    let flags = rustix::io::FdFlags::empty();
    rustix::io::fcntl_setfd(listener, flags).expect("fcntl");
    let polyfork = place.polyfork(args);
    let mut launch = command("/usr/bin/env");
    launch.args(["python3", "-c"]);
    launch.arg(format!(
        "import os, sys
os.dup2({}, 3) if {} != 3 else None
os.environ['LISTEN_FDS'] = '1'
os.environ['LISTEN_PID'] = str(os.getpid())
os.execv(sys.argv[1], sys.argv[1:])",
        listener.as_raw_fd(),
        listener.as_raw_fd()
    ));
    launch.arg(polyfork.get_program()).args(polyfork.get_args()).current_dir(place.path());
    for (key, value) in polyfork.get_envs() {
        match value {
            Some(value) => launch.env(key, value),
            None => launch.env_remove(key),
        };
    }
    launch
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    (listener, address)
}

/// What waits on the socket at the end is served by the next one; nothing of the first stays on it.
#[test]
fn a_node_worker_gets_the_managers_socket_by_its_address_and_so_does_the_next() {
    let place = Place::with_server();
    let (listener, address) = listener();
    for policy in ["round-robin", "shared", "round-robin"] {
        let args = ["run", "--json", "-w", "2", "--policy", policy, "server.js"];
        let mut run = activated(&place, &listener, &args);
        run.env("PORT", address.port().to_string());
        let mut cluster = Events::of(run);
        cluster.wait_for("ready");
        for _ in 0..6 {
            assert!(get(address, "/").contains("slot"));
        }
        cluster.running.signal(Signal::TERM);
        assert_eq!(cluster.end().0, 0);
    }
}

#[test]
fn any_program_inherits_the_managers_socket() {
    let place = Place::new();
    place.file(
        "app.py",
        "import os, socket
assert os.environ['LISTEN_PID'] == str(os.getpid())
assert os.environ['LISTEN_FDS'] == '1'
s = socket.socket(fileno=3)
while True:
    c, _ = s.accept()
    c.recv(4096)
    c.sendall(b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\nfine')
    c.close()
",
    );
    let (listener, address) = listener();
    let args = ["run", "--json", "-w", "2", "--ready", "delay=10ms", "--", "python3", "app.py"];
    let mut cluster = Events::of(activated(&place, &listener, &args));
    cluster.wait_for("ready");
    assert_eq!(get(address, "/"), "fine");
    let warnings = cluster.seen.iter().filter(|event| event.to_string().contains("no --listen"));
    assert_eq!(warnings.count(), 0, "it has a socket");
    cluster.running.signal(Signal::TERM);
    assert_eq!(cluster.end().0, 0);
}
