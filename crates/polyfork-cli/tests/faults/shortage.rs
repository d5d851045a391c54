//! Section C of the fault matrix: descriptors run out, workers die in loops, there are very many of them.

use std::net::TcpStream;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use super::cluster::{APP, Cluster, descriptors, nothing_failed};
use super::load::{Class, Counts, Load, answer, attempt};
use super::support::Place;

fn limit_descriptors(pid: u32, soft: Option<u64>) -> Rlimit {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: soft.or(hard), maximum: hard };
    prlimit(pid, Resource::Nofile, limit).expect("prlimit")
}

fn ask(cluster: &Cluster) -> TcpStream {
    use std::io::Write;
    let mut stream = TcpStream::connect(cluster.address).expect("connect");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
    stream
}

/// No descriptor left to accept with: accepting pauses and says so, at most once a second; nobody is refused; when there
/// are descriptors again, everybody is served.
#[test]
fn fault_42_primary_out_of_descriptors() {
    let mut cluster = Cluster::start(&["--mechanism", "handoff", "-w", "2"], APP);
    let before = cluster.baseline();
    let old = limit_descriptors(cluster.pid(), Some(descriptors(cluster.pid()) as u64 - 1));
    let clients: Vec<TcpStream> = (0..100).map(|_| ask(&cluster)).collect();
    let notice = cluster.wait(|e| e["event"] == "notice" && e["code"] == "accept-paused");
    println!("{}", notice["text"]);
    // Paused, not spinning: the same check as for an idle primary.
    cluster.check(&before);
    let told = cluster.events.seen.iter().filter(|e| e["code"] == "accept-paused").count();
    limit_descriptors(cluster.pid(), old.current);
    let mut counts = Counts::new();
    for mut client in clients {
        *counts.entry(answer(&mut client).0).or_default() += 1;
    }
    nothing_failed("accepting without descriptors", &counts);
    assert!(told <= 2, "told {told} times within two checks");
    cluster.check(&before);
    cluster.stop();
}

/// A worker that cannot receive descriptors never holds a connection: it goes to the other.
#[test]
fn fault_43_worker_out_of_descriptors() {
    let cluster = Cluster::start(&["--mechanism", "handoff", "-w", "2"], APP);
    let before = cluster.baseline();
    let full = cluster.workers[&1];
    limit_descriptors(full, Some(descriptors(full) as u64));
    let load = Load::start(cluster.address, 4, "/");
    load.wait_for_ok(100);
    nothing_failed("one worker without descriptors", &load.stop());
    limit_descriptors(full, None);
    cluster.check(&before);
    cluster.stop();
}

/// No descriptor left to start a worker with: it is told what to do, and the worker comes once there are some.
#[test]
fn a_worker_that_cannot_be_prepared_is_told_with_the_next_step() {
    let mut cluster = Cluster::start(&["-w", "2"], APP);
    let old = limit_descriptors(cluster.pid(), Some(descriptors(cluster.pid()) as u64));
    cluster.events.running.signal(rustix::process::Signal::TTIN);
    let notice = cluster.wait(|e| e["event"] == "notice" && e["code"] == "spawn-failed");
    let text = notice["text"].as_str().expect("a text");
    assert!(text.contains("Too many open files") && !text.contains("os error"), "{text}");
    assert!(text.contains("; raise the limit of open files (`ulimit -n`"), "{text}");
    limit_descriptors(cluster.pid(), old.current);
    cluster.wait(|e| e["event"] == "ready" && e["workers"] == 3);
    cluster.stop();
}

/// One slot dies in a loop: given up after its limit, while the other serves.
#[test]
fn fault_49_crash_loop_of_one_slot() {
    let app = format!("if (process.env.NODE_APP_INSTANCE === '0') process.exit(7);\n{APP}");
    let place = Place::new();
    place.file("app.js", &app);
    let mut events = place.events(["-w", "2", "--restart-limit", "3/60s", "app.js"]);
    let failed = events.wait_for("slot_failed");
    assert_eq!(
        (failed["slot"].as_u64(), failed["restarts"].as_u64()),
        (Some(1), Some(3)),
        "{failed}"
    );
    let forks = events.seen.iter().filter(|e| e["event"] == "fork" && e["slot"] == 1).count();
    assert_eq!(forks, 4, "one start and three restarts");
    let bound = events.seen.iter().find(|e| e["event"] == "bound").expect("slot 2 listens");
    let address = bound["address"].as_str().expect("address").parse().expect("an address");
    for _ in 0..20 {
        assert_eq!(attempt(address, "/").0, Class::Ok, "the other one serves everybody");
    }
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
}

/// Workers that get ready and die soon after are counted all the same.
#[test]
fn fault_50_flapping() {
    let app =
        format!("{APP}\nserver.on('listening', () => setTimeout(() => process.exit(1), 50));");
    let place = Place::new();
    place.file("app.js", &app);
    let mut events = place.events(["-w", "1", "--restart-limit", "3/60s", "app.js"]);
    let failed = events.wait_for("slot_failed");
    assert_eq!(failed["restarts"].as_u64(), Some(3), "{failed}");
    assert_eq!(events.end().0, 7);
}

/// Two hundred workers start and stop; what each costs in descriptors is told.
#[test]
fn fault_56_two_hundred_workers() {
    let place = Place::new();
    let words =
        ["-w", "200", "--dialect", "sockets", "--ready", "delay=10ms", "--", "sleep", "1000"];
    let mut events = place.events(words);
    let ready = events.wait_for("ready");
    assert_eq!(ready["workers"], 200);
    let pid = events.running.pid();
    println!(
        "200 workers: {} descriptors, {} KiB",
        descriptors(pid),
        events.running.resident_kib()
    );
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
}
