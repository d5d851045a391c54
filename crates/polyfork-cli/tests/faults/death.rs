//! Section A of the fault matrix: workers die, stop, refuse, or get stuck while clients wait.

use std::net::TcpStream;

use rustix::process::Signal;

use super::cluster::{APP, Cluster, eventually, nothing_failed, report, signal};
use super::load::{Class, Counts, Load, answer, attempt, count};

const PATIENT_RESTARTS: [&str; 2] = ["--restart-limit", "1000/30s"];

fn options<'a>(mechanism: &'a str, workers: &'a str) -> Vec<&'a str> {
    let mut options = vec!["--mechanism", mechanism, "-w", workers];
    options.extend(PATIENT_RESTARTS);
    options
}

/// Kills a worker, waits for its successor, goes on; the load never pauses.
fn kill_in_turn(mechanism: &str, kills: u32) -> (Counts, u64) {
    let clients = 12;
    let mut cluster = Cluster::start(&options(mechanism, "3"), APP);
    let before = cluster.baseline();
    let load = Load::start(cluster.address, clients, "/");
    for kill in 0..kills {
        load.wait_for_ok(50);
        let slot = u64::from(kill % 3) + 1;
        let pid = cluster.workers[&slot];
        signal(pid, Signal::KILL);
        let exit = cluster.wait(|e| e["event"] == "exit" && e["pid"] == pid);
        assert_eq!(exit["signal"], "SIGKILL", "{exit}");
        cluster.wait_replaced(slot, pid);
    }
    load.wait_for_ok(50);
    let counts = load.stop();
    report(&format!("{kills} kills, {mechanism}"), &counts);
    cluster.check(&before);
    cluster.stop();
    (counts, clients as u64)
}

/// Only what a killed worker was serving may fail: at most every client once per kill, and in practice about one.
fn only_what_was_served(counts: &Counts, kills: u64, clients: u64) {
    assert_eq!(count(counts, Class::Refused), 0, "refused: {counts:?}");
    let lost = count(counts, Class::Reset) + count(counts, Class::Empty);
    assert!(lost <= kills * clients, "{lost} lost by {kills} kills: {counts:?}");
}

#[test]
fn fault_01_kill_under_load_handoff() {
    let (counts, clients) = kill_in_turn("handoff", 15);
    only_what_was_served(&counts, 15, clients);
}

#[test]
fn fault_01_kill_under_load_kernel() {
    let (counts, clients) = kill_in_turn("kernel", 15);
    only_what_was_served(&counts, 15, clients);
}

/// Connections that a stopped worker was given and has not read are answered by others when it is killed.
#[test]
fn fault_02_killed_between_send_and_receive() {
    let mut cluster =
        Cluster::start(&[&options("handoff", "2")[..], &["--ack-limit", "1h"]].concat(), APP);
    let before = cluster.baseline();
    let victim = cluster.workers[&1];
    signal(victim, Signal::STOP);
    let clients = ask_all(&cluster, 12);
    signal(victim, Signal::KILL);
    cluster.wait(|e| e["event"] == "exit" && e["pid"] == victim);
    let counts = answers(clients);
    nothing_failed("killed between send and receive", &counts);
    cluster.check(&before);
    cluster.stop();
}

/// A worker that acknowledges and dies in the same breath: its word counts, so nobody else gets the connection, and the
/// client sees exactly one ending.
#[test]
fn fault_03_killed_after_the_acknowledgement() {
    let dies = "
const net = require('net');
net.createServer(() => process.kill(process.pid, 'SIGKILL')).listen(0, '127.0.0.1');
";
    let limits = ["--mechanism", "handoff", "-w", "2", "--restart-limit", "1000/1s"];
    let mut cluster = Cluster::start(&limits, dies);
    let before = cluster.baseline();
    for _ in 0..10 {
        let exits = cluster.events.seen.iter().filter(|e| e["event"] == "exit").count();
        let (class, _) = attempt(cluster.address, "/");
        assert!(matches!(class, Class::Reset | Class::Empty), "served by nobody else: {class:?}");
        cluster.wait(|e| e["event"] == "exit");
        while cluster.workers.len() < 2 {
            cluster.wait(|e| e["event"] == "worker_ready");
        }
        // One connection, one death: it was not handed out again.
        let now = cluster.events.seen.iter().filter(|e| e["event"] == "exit").count();
        assert_eq!(now, exits + 1, "a second worker got the same connection");
    }
    cluster.check(&before);
    cluster.stop();
}

fn all_at_once(mechanism: &str) {
    let mut cluster = Cluster::start(&options(mechanism, "3"), APP);
    let before = cluster.baseline();
    let load = Load::start(cluster.address, 8, "/");
    load.wait_for_ok(50);
    let victims: Vec<(u64, u32)> = cluster.workers.iter().map(|(s, p)| (*s, *p)).collect();
    for (_, pid) in &victims {
        signal(*pid, Signal::KILL);
    }
    for (slot, pid) in victims {
        cluster.wait_replaced(slot, pid);
    }
    load.wait_for_ok(100);
    let counts = load.stop();
    report(&format!("all workers dead at once, {mechanism}"), &counts);
    assert_eq!(count(&counts, Class::Refused), 0, "the listener stays: {counts:?}");
    assert!(count(&counts, Class::Reset) + count(&counts, Class::Empty) <= 8, "{counts:?}");
    cluster.check(&before);
    cluster.stop();
}

#[test]
fn fault_04_all_workers_dead_at_once_handoff() {
    all_at_once("handoff");
}

#[test]
fn fault_04_all_workers_dead_at_once_kernel() {
    all_at_once("kernel");
}

/// A stopped worker holds up at most its window, and that comes back; the load goes on; and when it continues, it does
/// not touch what was taken back (fault 6): every client gets exactly one whole answer.
#[test]
fn fault_05_and_06_stopped_worker_gives_back_what_it_has_not_read() {
    let mut cluster =
        Cluster::start(&[&options("handoff", "3")[..], &["--ack-limit", "200ms"]].concat(), APP);
    let before = cluster.baseline();
    let load = Load::start(cluster.address, 8, "/");
    load.wait_for_ok(100);
    let stopped = cluster.workers[&1];
    signal(stopped, Signal::STOP);
    let notice = cluster.wait(|e| e["event"] == "notice" && e["code"] == "taken-back");
    println!("{}", notice["text"]);
    load.wait_for_ok(300);
    signal(stopped, Signal::CONT);
    load.wait_for_ok(300);
    let counts = load.stop();
    nothing_failed("a worker stopped and continued", &counts);
    assert_eq!(cluster.workers[&1], stopped, "it was not replaced");
    // It is tried with one connection after a pause, and takes its turns again when it answers.
    eventually("who serves", || serve_count(&cluster), |pids| pids.contains(&stopped));
    cluster.check(&before);
    cluster.stop();
}

/// The same where nobody asks the primary: its queue goes to others, it loses its turns, and gets them back.
#[test]
fn fault_05_and_06_stopped_worker_loses_its_turns_and_its_queue() {
    let mut cluster =
        Cluster::start(&[&options("kernel", "3")[..], &["--ack-limit", "200ms"]].concat(), APP);
    let load = Load::start(cluster.address, 8, "/");
    load.wait_for_ok(100);
    let stopped = cluster.workers[&1];
    signal(stopped, Signal::STOP);
    let notice = cluster.wait(|e| e["event"] == "notice" && e["code"] == "stuck");
    println!("{}", notice["text"]);
    assert_eq!(notice["slot"], 1, "{notice}");
    load.wait_for_ok(300);
    signal(stopped, Signal::CONT);
    cluster.wait(|e| e["event"] == "notice" && e["code"] == "stuck");
    load.wait_for_ok(300);
    let counts = load.stop();
    // What it had accepted when it was stopped waited for it; nobody was cut.
    nothing_failed("a worker stopped and continued, kernel", &counts);
    assert_eq!(cluster.workers[&1], stopped, "it was not replaced");
    eventually("who serves", || serve_count(&cluster), |pids| pids.contains(&stopped));
    cluster.stop();
}

#[test]
fn fault_07_stuck_event_loop_loses_its_turns_and_its_queue() {
    let mut cluster =
        Cluster::start(&[&options("kernel", "2")[..], &["--ack-limit", "200ms"]].concat(), APP);
    let (class, _) = attempt(cluster.address, "/spin");
    assert_eq!(class, Class::Ok);
    let load = Load::start(cluster.address, 4, "/");
    cluster.wait(|e| e["event"] == "notice" && e["code"] == "stuck");
    load.wait_for_ok(200);
    let counts = load.stop();
    report("one event loop blocked for good, kernel", &counts);
    nothing_failed("one event loop blocked for good, kernel", &counts);
    cluster.events.running.signal(Signal::TERM);
    cluster.wait(|e| e["event"] == "draining");
    cluster.events.running.signal_again(Signal::TERM);
    assert_eq!(cluster.events.end().0, 9);
}

/// A blocked event loop is as good as a stopped process: what it has not read goes to others.
#[test]
fn fault_07_stuck_event_loop_does_not_hold_connections() {
    let mut cluster =
        Cluster::start(&[&options("handoff", "2")[..], &["--ack-limit", "200ms"]].concat(), APP);
    let (class, _) = attempt(cluster.address, "/spin");
    assert_eq!(class, Class::Ok);
    let load = Load::start(cluster.address, 4, "/");
    cluster.wait(|e| e["event"] == "notice" && e["code"] == "taken-back");
    load.wait_for_ok(200);
    let counts = load.stop();
    // What the stuck worker had read before it got stuck is its own; the loop reads one connection at a time.
    report("one event loop blocked for good", &counts);
    // It does not leave by itself either: the second signal ends it.
    cluster.events.running.signal(Signal::TERM);
    cluster.wait(|e| e["event"] == "draining");
    cluster.events.running.signal_again(Signal::TERM);
    let (code, _) = cluster.events.end();
    assert_eq!(code, 9);
}

/// The watchdog of the sockets dialect: no sign of life, replaced, and the reason is told.
#[test]
fn fault_07_watchdog_replaces_a_silent_worker() {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/apps/listen_fds.py");
    let place = super::support::Place::new();
    let words = [
        "-w",
        "1",
        "--watchdog",
        "500ms",
        "--ready",
        "notify",
        "--listen",
        "127.0.0.1:0",
        "--env",
        "STUCK=1",
        program,
    ];
    let mut cluster = Cluster::start_in(place, &words);
    let pid = cluster.workers[&1];
    let exit = cluster.wait(|e| e["event"] == "exit" && e["pid"] == pid);
    assert_eq!(exit["reason"], "watchdog", "{exit}");
    cluster.wait_replaced(1, pid);
    cluster.stop();
}

/// Workers at their `maxConnections` refuse; the connection goes to another and is not bounced without pause.
#[test]
fn fault_08_refused_connections_go_to_others() {
    let refuses = "
const http = require('http');
const server = http.createServer((q, r) => setTimeout(() => r.end('{}'), 20));
if (process.env.NODE_APP_INSTANCE === '0') server.maxConnections = 1;
server.listen(0, '127.0.0.1');
";
    let cluster = Cluster::start(&options("handoff", "2"), refuses);
    let before = cluster.baseline();
    let load = Load::start(cluster.address, 12, "/");
    load.wait_for_ok(300);
    let counts = load.stop();
    nothing_failed("one worker refuses most", &counts);
    cluster.check(&before);
    cluster.stop();
}

fn queue_survives(mechanism: &str) {
    // One worker: nobody else could serve what waits for it.
    let mut cluster = Cluster::start(&options(mechanism, "1"), APP);
    let before = cluster.baseline();
    let victim = cluster.workers[&1];
    signal(victim, Signal::STOP);
    let clients = ask_all(&cluster, 60);
    signal(victim, Signal::KILL);
    cluster.wait_replaced(1, victim);
    let counts = answers(clients);
    nothing_failed(&format!("60 queued while the only worker died, {mechanism}"), &counts);
    cluster.check(&before);
    cluster.stop();
}

#[test]
fn fault_11_queue_of_a_dead_worker_is_served_by_its_successor() {
    queue_survives("kernel");
    queue_survives("handoff");
}

/// And with siblings they serve it at once, before the successor is up.
#[test]
fn fault_11_queue_of_a_dead_worker_is_served_by_siblings() {
    // A new worker takes long to come up: the answers cannot be its.
    let slow_start = format!(
        "const fs = require('fs');
         if (fs.existsSync('started-' + process.env.NODE_APP_INSTANCE)) setTimeout(main, 1e9); else main();
         function main() {{ fs.writeFileSync('started-' + process.env.NODE_APP_INSTANCE, ''); {APP} }}"
    );
    let mut cluster = Cluster::start(&options("kernel", "3"), &slow_start);
    let victim = cluster.workers[&1];
    signal(victim, Signal::STOP);
    let clients = ask_all(&cluster, 30);
    signal(victim, Signal::KILL);
    cluster.wait(|e| e["event"] == "exit" && e["pid"] == victim);
    nothing_failed("30 clients, a third of them queued on a dead worker", &answers(clients));
    cluster.events.running.signal(Signal::TERM);
    cluster.wait(|e| e["event"] == "draining");
    cluster.events.running.signal_again(Signal::TERM);
    cluster.events.end();
}

/// TTOU takes a worker out of service: nothing that was on its way to it is lost.
#[test]
fn fault_12_fewer_workers_reset_nobody() {
    for mechanism in ["kernel", "handoff"] {
        let mut cluster = Cluster::start(&options(mechanism, "4"), APP);
        let load = Load::start(cluster.address, 8, "/");
        for _ in 0..3 {
            load.wait_for_ok(100);
            cluster.events.running.signal(Signal::TTOU);
            cluster.wait(|e| e["event"] == "slot_retired");
        }
        load.wait_for_ok(100);
        nothing_failed(&format!("4 workers to 1, {mechanism}"), &load.stop());
        assert_eq!(serve_count(&cluster).len(), 1);
        // And back: new slots take part.
        cluster.events.running.signal(Signal::TTIN);
        let fork = cluster.wait_for("fork");
        cluster.wait(|e| e["event"] == "worker_ready" && e["pid"] == fork["pid"]);
        assert_eq!(serve_count(&cluster).len(), 2);
        cluster.stop();
    }
}

/// Exit code 0 is an end like any other: told, replaced, nothing lost that it had not taken.
#[test]
fn fault_13_a_worker_that_exits_by_itself_is_replaced() {
    for mechanism in ["kernel", "handoff"] {
        let mut cluster = Cluster::start(&options(mechanism, "2"), APP);
        let load = Load::start(cluster.address, 8, "/");
        load.wait_for_ok(50);
        for _ in 0..4 {
            attempt(cluster.address, "/exit");
            let exit = cluster.wait_for("exit");
            assert_eq!(exit["code"], 0, "{exit}");
            let (slot, pid) =
                (exit["slot"].as_u64().expect("slot"), exit["pid"].as_u64().expect("pid"));
            cluster.wait_replaced(slot, u32::try_from(pid).expect("a pid"));
        }
        let counts = load.stop();
        report(&format!("4 exits by itself, {mechanism}"), &counts);
        assert_eq!(count(&counts, Class::Refused), 0, "{counts:?}");
        assert!(count(&counts, Class::Reset) + count(&counts, Class::Empty) <= 4 * 8, "{counts:?}");
        cluster.stop();
    }
}

/// Sends that many requests without waiting for answers.
fn ask_all(cluster: &Cluster, clients: usize) -> Vec<TcpStream> {
    use std::io::Write;
    let ask = |_| {
        let mut stream = TcpStream::connect(cluster.address).expect("connect");
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            .expect("ask");
        stream
    };
    (0..clients).map(ask).collect()
}

fn answers(clients: Vec<TcpStream>) -> Counts {
    let mut counts = Counts::new();
    for mut client in clients {
        *counts.entry(answer(&mut client).0).or_default() += 1;
    }
    counts
}

/// Pids that answer a few dozen requests.
fn serve_count(cluster: &Cluster) -> std::collections::BTreeSet<u32> {
    (0..24)
        .map(|_| {
            let (class, body) = attempt(cluster.address, "/");
            assert_eq!(class, Class::Ok);
            let pid = body.split("\"pid\":").nth(1).expect("pid");
            pid.split(|c: char| !c.is_ascii_digit()).next().expect("digits").parse().expect("a pid")
        })
        .collect()
}
