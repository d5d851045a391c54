//! Rows of the fault matrix about metrics; the number is in the name.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect as connect_socket, socket_with};
use rustix::process::Signal;
use serde_json::Value;

use super::desk::{Desk, eventually, pidfd, signal};
use super::scrape::{Told, connect, exchange, place, scrape, told};
use super::support::{PATIENCE, get};

/// Begins to connect and does not wait.
fn knock(address: SocketAddr) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None);
    let socket = socket.expect("a socket");
    let _in_progress = connect_socket(&socket, &address);
    socket
}

fn worker_pids(status: &Value) -> Vec<u64> {
    let workers = status["workers"].as_array().expect("workers");
    workers.iter().filter_map(|worker| worker["pid"].as_u64()).collect()
}

#[test]
fn fault_57_full_queues_are_counted_and_recover() {
    let mut desk = Desk::new();
    desk.place.file(
        "short.js",
        "require('http').createServer((_, response) => response.end('well'))
           .listen({ port: 0, host: '127.0.0.1', backlog: 16 });",
    );
    let app = desk.start(&["--policy", "shared", "--no-app-metrics", "-w", "1", "short.js"]);
    let address = Desk::address(&app);
    let listener = |name: &str| format!("{name}{{listener=\"{address}\"}}");
    let (dropped, queue) =
        (listener("polyfork_listener_dropped_total"), listener("polyfork_listener_queue"));
    assert_eq!(told(&desk, "short").of(&dropped), 0.0);
    let worker = pidfd(worker_pids(&desk.status("short"))[0]);
    signal(&worker, Signal::STOP);
    let knocking: Vec<OwnedFd> = (0..500).map(|_| knock(address)).collect();
    let full = eventually("drops", || told(&desk, "short"), |told| told.of(&dropped) > 0.0);
    assert!(full.of(&queue) >= 16.0, "{}", full.of(&queue));
    println!("{} dropped, {} wait", full.of(&dropped), full.of(&queue));
    drop(knocking);
    signal(&worker, Signal::CONT);
    assert_eq!(get(address, "/"), "well");
    let after = eventually("a dry queue", || told(&desk, "short"), |told| told.of(&queue) == 0.0);
    assert!(after.of(&dropped) >= full.of(&dropped), "a count never goes back");
}

#[test]
fn fault_112_metrics_while_workers_die() {
    let mut desk = Desk::new();
    let options = ["--metrics", "127.0.0.1:0", "--restart-limit", "1000/1s", "-w", "3"];
    let app = desk.start(&[&options[..], &["server.js"]].concat());
    let address = place(&desk, "server");
    let over = AtomicBool::new(false);
    let scrapes = std::thread::scope(|scope| {
        let scraper = scope.spawn(|| {
            let mut scrapes = 0u32;
            let mut exits = 0.0;
            while !over.load(Ordering::Relaxed) {
                let told = scrape(address);
                let now = told.sum("polyfork_worker_exits_total");
                assert!(now >= exits, "a count never goes back");
                exits = now;
                scrapes += 1;
            }
            scrapes
        });
        for _ in 0..20 {
            let some = |pids: &Vec<u64>| !pids.is_empty();
            let pids = eventually("a worker", || worker_pids(&desk.status("server")), some);
            signal(&pidfd(pids[0]), Signal::KILL);
            let gone = |now: &Vec<u64>| !now.contains(&pids[0]);
            eventually("its end", || worker_pids(&desk.status("server")), gone);
        }
        over.store(true, Ordering::Relaxed);
        scraper.join().expect("every answer was whole")
    });
    println!("{scrapes} answers while 20 workers were killed");
    assert!(scrapes > 0);
    let well = |told: &Told| told.of("polyfork_workers{state=\"ready\"}") == 3.0;
    let told = eventually("three workers", || scrape(address), well);
    assert_eq!(told.of("polyfork_worker_restarts_total{reason=\"signal\"}"), 20.0);
    assert_eq!(told.sum("polyfork_slot_restarts_total"), 20.0);
    // All of them stand still: an answer comes, and says what is missing.
    let stopped: Vec<OwnedFd> =
        worker_pids(&desk.status("server")).into_iter().map(pidfd).collect();
    stopped.iter().for_each(|worker| signal(worker, Signal::STOP));
    let told = scrape(address);
    assert_eq!(told.of("polyfork_app_metrics_workers{state=\"silent\"}"), 3.0);
    assert_eq!(told.of("polyfork_workers{state=\"ready\"}"), 3.0);
    stopped.iter().for_each(|worker| signal(worker, Signal::CONT));
    assert!(!get(Desk::address(&app), "/").is_empty());
}

#[test]
fn fault_113_restarts_and_scaling_leave_no_series() {
    let mut desk = Desk::new();
    desk.start(&["-w", "2", "--restart-limit", "1000/1s", "server.js"]);
    let names = |told: &Told| told.samples.keys().cloned().collect::<BTreeSet<_>>();
    let before = names(&told(&desk, "server"));
    for _ in 0..10 {
        desk.did(&["restart", "server"]);
        desk.did(&["scale", "server", "4"]);
        told(&desk, "server");
        desk.did(&["scale", "server", "2"]);
    }
    let after = eventually("as before", || names(&told(&desk, "server")), |now| *now == before);
    for series in after {
        assert!(!series.contains("pid=") && !series.contains("worker="), "{series}");
    }
}

/// Addresses that a process listens on, as the kernel tells them.
fn listens(pid: u64) -> Vec<String> {
    let mut sockets = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        let target = target.to_string_lossy().into_owned();
        sockets.extend(
            target.strip_prefix("socket:[").map(|rest| rest.trim_end_matches(']').to_owned()),
        );
    }
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields[3] == "0A" && sockets.contains(fields[9]) {
                found.push(fields[1].to_owned());
            }
        }
    }
    found
}

#[test]
fn fault_114_nothing_is_reachable_that_was_not_asked_for() {
    let mut desk = Desk::new();
    desk.place.file("idle.js", "setInterval(() => {}, 1000)");
    let idle = ["--ready", "delay=1ms", "-w", "1", "idle.js"];
    let quiet = desk.start(&[&["--name", "quiet"][..], &idle].concat());
    assert_eq!(listens(quiet["pid"].as_u64().expect("a pid")), Vec::<String>::new());
    for public in ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:9100"] {
        let told = desk.refuses(&[&["start", "--metrics", public][..], &idle].concat(), 2);
        assert!(told.contains("--metrics-on-network") && told.contains("127.0.0.1"), "{told}");
    }
    for wrong in ["unix:@abstract", "fd:3", "udp:127.0.0.1:1", "here"] {
        desk.refuses(&[&["start", "--metrics", wrong][..], &idle].concat(), 2);
    }
    let app = desk.start(&[&["--name", "local", "--metrics", "127.0.0.1:0"][..], &idle].concat());
    let open = listens(app["pid"].as_u64().expect("a pid"));
    assert!(open.len() == 1 && open[0].starts_with("0100007F:"), "{open:?}");
    // A page in a browser whose name means this machine.
    let address = place(&desk, "local");
    let request = "GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n";
    assert!(exchange(connect(address), request).0.starts_with("HTTP/1.1 403"));
    let allowed = ["--name", "public", "--metrics-on-network", "--metrics", "0.0.0.0:0"];
    let public = desk.start(&[&allowed[..], &idle].concat());
    let open = listens(public["pid"].as_u64().expect("a pid"));
    assert!(open.len() == 1 && open[0].starts_with("00000000:"), "{open:?}");
}

#[test]
fn fault_103_slow_scrapers_keep_nobody_out() {
    let mut desk = Desk::new();
    desk.start(&["--metrics", "127.0.0.1:0", "--no-app-metrics", "-w", "1", "server.js"]);
    let address = place(&desk, "server");
    let mut slow: Vec<_> = (0..100).map(|_| connect(address)).collect();
    for stream in &mut slow {
        let _sent_away = stream.write_all(b"GET /metr");
    }
    assert_eq!(scrape(address).of("polyfork_workers_wanted"), 1.0);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000));
    let mut stream = connect(address);
    let _cut_off = stream.write_all(long.as_bytes());
    let mut answer = Vec::new();
    let _cut_off = std::io::Read::read_to_end(&mut stream, &mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    for garbage in ["\0\0\0\0\r\n\r\n", "\r\n\r\n", "GET /metrics SPDY/9\r\n\r\n"] {
        let stream = connect(address);
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        assert!(exchange(stream, garbage).0.starts_with("HTTP/1.1 400"), "{garbage:?}");
    }
    assert_eq!(desk.status("server")["state"], "ready");
}
