//! Sections B and E of the fault matrix, as far as they are about one primary: it is killed, stopped early, stopped
//! twice, finds its port taken, is PID 1, writes to nobody.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use rustix::process::Signal;

use super::cluster::{APP, Cluster, children, eventually, is_alive, signal};
use super::load::{Class, Load, attempt, count};
use super::support::{Events, PATIENCE, Place, command};

/// On a port that is known beforehand, so that a second primary can want the same.
fn app_on(port: u16) -> String {
    APP.replace("listen(0,", &format!("listen({port},"))
}

fn free_port() -> u16 {
    let probe = TcpListener::bind("127.0.0.1:0").expect("bind");
    probe.local_addr().expect("address").port()
}

/// Requests in hand are finished, nobody stays behind, and the port is free at once.
fn primary_killed(mechanism: &str) {
    let port = free_port();
    let mut cluster = Cluster::start(&["--mechanism", mechanism, "-w", "3"], &app_on(port));
    let workers: Vec<u32> = cluster.workers.values().copied().collect();
    let address = cluster.address;
    let clients: Vec<_> =
        (0..10).map(|_| std::thread::spawn(move || attempt(address, "/slow?ms=1000").0)).collect();
    // All ten are in hand when every worker has counted its share.
    eventually("requests in hand", || established(port), |now| *now >= 10);
    std::thread::sleep(Duration::from_millis(200));
    cluster.events.running.signal(Signal::KILL);
    cluster.events.running.end();
    // A new primary has the port at once, while old workers still finish.
    let place = Place::new();
    place.file("app.js", &app_on(port));
    let mut next = retry_until_bound(&place, mechanism);
    next.wait_for("ready");
    assert_eq!(attempt(address, "/").0, Class::Ok);
    let classes: Vec<Class> = clients.into_iter().map(|c| c.join().expect("a client")).collect();
    println!("primary killed, {mechanism}: {classes:?}");
    assert!(classes.iter().all(|class| *class == Class::Ok), "{classes:?}");
    for pid in workers {
        eventually("workers of the killed primary", || is_alive(pid), |alive| !alive);
    }
    next.running.signal(Signal::TERM);
    assert_eq!(next.end().0, 0);
}

/// Whoever was in the queue is served, whoever comes later is refused; nobody waits for an answer in vain.
#[test]
fn a_stop_under_load_serves_who_waits_and_refuses_the_rest() {
    for options in [
        ["--mechanism", "kernel", "-w", "2"],
        ["--mechanism", "handoff", "-w", "2"],
        ["--policy", "shared", "-w", "2"],
    ] {
        let mut cluster = Cluster::start(&options, APP);
        let address = cluster.address;
        let slow = std::thread::spawn(move || attempt(address, "/slow?ms=1500").0);
        eventually("the slow request is in hand", || established(address.port()), |now| *now >= 1);
        let load = Load::start(address, 16, "/");
        load.wait_for_ok(100);
        cluster.events.running.signal(Signal::TERM);
        cluster.wait_for("draining");
        // The primary still waits for the slow one, and new clients know at once that nobody is there.
        eventually("refused", || attempt(address, "/").0, |class| *class == Class::Refused);
        let counts = load.stop();
        println!("stopped under load, {options:?}: {counts:?}");
        assert_eq!(slow.join().expect("a client"), Class::Ok);
        for class in [Class::Reset, Class::Empty, Class::Hang] {
            assert_eq!(count(&counts, class), 0, "{options:?}: {counts:?}");
        }
        assert_eq!(cluster.events.end().0, 0);
    }
}

/// Workers need a moment to see that their primary is gone; a supervisor of the primary would try again as well.
fn retry_until_bound(place: &Place, mechanism: &str) -> Events {
    let limit = std::time::Instant::now() + PATIENCE;
    loop {
        let mut next = place.events(["--mechanism", mechanism, "-w", "2", "app.js"]);
        while let Some(event) = next.next() {
            if event["event"] == "bound" {
                return next;
            }
            if event["event"] == "end" {
                break;
            }
        }
        assert!(std::time::Instant::now() < limit, "the port stays taken");
    }
}

/// Connections to a port that are established, from `/proc/net/tcp`.
fn established(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("table");
    let local = format!(":{port:04X}");
    let mine = |line: &&str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        fields.get(1).is_some_and(|at| at.ends_with(&local)) && fields.get(3) == Some(&"01")
    };
    table.lines().filter(mine).count()
}

#[test]
fn fault_24_primary_killed_kernel() {
    primary_killed("kernel");
}

#[test]
fn fault_24_primary_killed_handoff() {
    primary_killed("handoff");
}

/// Killed while it forks: no worker holds another's channel open, so every one of them notices.
#[test]
fn fault_25_primary_killed_while_it_forks() {
    let place = Place::new();
    place.file("app.js", APP);
    let mut events = place.events(["-w", "8", "app.js"]);
    let mut workers = Vec::new();
    while workers.len() < 8 {
        let fork = events.wait_for("fork");
        workers.push(u32::try_from(fork["pid"].as_u64().expect("pid")).expect("a pid"));
    }
    events.running.signal(Signal::KILL);
    events.running.end();
    for pid in workers {
        eventually("workers of the killed primary", || is_alive(pid), |alive| !alive);
    }
}

/// A stop at any moment of the start is a clean end.
#[test]
fn fault_38_stopped_while_it_starts() {
    let place = Place::new();
    place.file("app.js", APP);
    for step in 0..12 {
        let mut events = place.events(["-w", "2", "app.js"]);
        events.wait_for("setup");
        std::thread::sleep(Duration::from_millis(step * 30));
        let pid = events.running.pid();
        events.running.signal(Signal::TERM);
        let (code, _) = events.end();
        assert_eq!(code, 0, "stopped {} ms after its first word", step * 30);
        assert!(children(pid).is_empty());
    }
}

/// The second signal means now, also for workers that will not listen.
#[test]
fn fault_40_second_signal() {
    let stubborn =
        format!("process.on('SIGTERM', () => {{}}); process.on('disconnect', () => {{}});\n{APP}");
    let cluster_options = ["-w", "2", "--grace", "1h"];
    for second in [Signal::TERM, Signal::INT] {
        let mut cluster = Cluster::start(&cluster_options, &stubborn);
        let address = cluster.address;
        let client = std::thread::spawn(move || attempt(address, "/slow?ms=3600000").0);
        eventually("a request in hand", || established(address.port()), |now| *now >= 1);
        cluster.events.running.signal(Signal::TERM);
        cluster.wait(|e| e["event"] == "draining");
        cluster.events.running.signal_again(second);
        let (code, end) = cluster.events.end();
        assert_eq!(code, 9, "{end}");
        assert_ne!(client.join().expect("client"), Class::Ok);
        for pid in cluster.workers.values() {
            assert!(!is_alive(*pid));
        }
    }
}

/// Taken: said with the address; free again: works, nothing remembered.
#[test]
fn fault_41_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("address").port();
    let place = Place::new();
    place.file("app.js", &app_on(port));
    let mut events = place.events(["-w", "2", "app.js"]);
    let (code, end) = events.end();
    assert_eq!(code, 5, "{end}");
    assert!(end["text"].as_str().expect("text").contains(&port.to_string()), "{end}");
    drop(taken);
    let mut events = place.events(["-w", "2", "app.js"]);
    events.wait_for("ready");
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    assert_eq!(attempt(address, "/").0, Class::Ok);
    // A second cluster on the same port is refused, although both could share it by the kernel's rules.
    let mut second = place.events(["-w", "2", "app.js"]);
    assert_eq!(second.end().0, 5);
    assert_eq!(attempt(address, "/").0, Class::Ok);
    events.running.signal(Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// As PID 1 of a container: orphans are reaped, and SIGTERM works although PID 1 has no default action.
#[test]
fn fault_85_pid_one() {
    let place = Place::new();
    let orphans = "for i in $(seq 200); do (sleep 0.01 &) ; done; exec sleep 1000";
    place.file("app.js", APP);
    let mut container = command("unshare");
    container.args([
        "--pid",
        "--fork",
        "--mount-proc",
        env!("CARGO_BIN_EXE_polyfork"),
        "run",
        "--json",
    ]);
    container.args([
        "-w",
        "1",
        "--dialect",
        "sockets",
        "--ready",
        "delay=10ms",
        "--",
        "sh",
        "-c",
        orphans,
    ]);
    container.current_dir(place.path());
    if !rustix::process::geteuid().is_root() {
        super::support::skip("fault_85_pid_one", "needs root for a pid namespace");
        return;
    }
    let mut events = Events::of(container);
    let setup = events.wait_for("setup");
    assert_eq!(setup["pid"], 1, "{setup}");
    events.wait_for("ready");
    // Seen from outside, the primary is the only child of `unshare`.
    let primary = children(events.running.pid())[0].0;
    eventually("orphans", || children(primary), |all| all.len() == 1 && all[0].1 != 'Z');
    signal(primary, Signal::TERM);
    let end = events.wait_for("end");
    assert_eq!(end["exit_code"], 0, "{end}");
}

/// Nobody reads its output any more: the service goes on. Its children have the default action again.
#[test]
fn fault_86_broken_pipe() {
    let app = format!("setInterval(() => console.log('words'), 5);\n{APP}");
    let place = Place::new();
    let words = [
        "-w",
        "1",
        "--dialect",
        "sockets",
        "--",
        "grep",
        "-E",
        "^Sig(Ign|Blk)",
        "/proc/self/status",
    ];
    let mut bare = place.events(words);
    for _ in 0..2 {
        let line = bare.wait_for("output")["line"].as_str().expect("line").to_owned();
        assert!(
            line.ends_with("0000000000000000"),
            "nothing blocked or ignored in a child: {line}"
        );
    }
    drop(bare);
    let mut cluster = Cluster::start(&["-w", "1"], &app);
    cluster.events.stop_reading();
    for _ in 0..200 {
        assert_eq!(attempt(cluster.address, "/").0, Class::Ok);
    }
    cluster.events.running.signal(Signal::TERM);
    assert_eq!(cluster.events.running.end().code(), Some(0));
}
