//! What the primary tells of itself, over HTTP and by the verb.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use serde_json::Value;

use super::desk::{Desk, eventually};
use super::scrape::{Told, connect, exchange, place, scrape, told};
use super::support::get;

/// Serves metrics on a port that the system chooses.
const SERVED: [&str; 2] = ["--metrics", "127.0.0.1:0"];

#[test]
fn every_figure_has_its_series() {
    let mut desk = Desk::new();
    let app =
        desk.start(&[&SERVED[..], &["-w", "2", "--mechanism", "handoff", "server.js"]].concat());
    for _ in 0..20 {
        get(Desk::address(&app), "/");
    }
    let address = place(&desk, "server");
    let handed = |told: &Told| told.value("polyfork_handoff_seconds_count") == Some(20.0);
    let told = eventually("20 acknowledged", || scrape(address), handed);
    assert_eq!(told.of("polyfork_workers{state=\"ready\"}"), 2.0);
    assert_eq!(told.of("polyfork_workers_wanted"), 2.0);
    assert_eq!(told.sum("polyfork_slot_connections_total"), 20.0);
    assert_eq!(told.of("polyfork_slot_connections_total{slot=\"1\"}"), 10.0);
    assert_eq!(told.of("polyfork_handoff_seconds_bucket{le=\"+Inf\"}"), 20.0);
    assert!(told.of("polyfork_handoff_seconds_sum") > 0.0);
    assert!(told.of("polyfork_slot_resident_bytes{slot=\"2\"}") > 1e6);
    assert!(told.of("polyfork_slot_cpu_seconds_total{slot=\"1\"}") > 0.0);
    assert!(told.of("polyfork_primary_resident_bytes") > 1e5);
    assert!(told.of("polyfork_primary_open_descriptors") > 3.0);
    assert!(told.of("polyfork_primary_max_descriptors") > 3.0);
    assert!(told.of("polyfork_start_time_seconds") > 1.7e9);
    assert_eq!(told.of("polyfork_stale"), 0.0);
    assert_eq!(told.of("polyfork_worker_restarts_total{reason=\"exited\"}"), 0.0);
    assert_eq!(told.of("polyfork_reloads_total{result=\"done\"}"), 0.0);
    let listener = format!("{{listener=\"{}\"}}", Desk::address(&app));
    assert_eq!(told.of(&format!("polyfork_listener_dropped_total{listener}")), 0.0);
    assert_eq!(told.of(&format!("polyfork_listener_queue{listener}")), 0.0);
    assert_eq!(told.named("polyfork_build_info").len(), 1);
    assert!(told.named("polyfork_app_info")[0].contains("app=\"server\",runtime=\"node\""));
    for (name, kind) in [
        ("polyfork_handoff_seconds", "histogram"),
        ("polyfork_slot_queue", "gauge"),
        ("polyfork_slot_messages_total", "counter"),
    ] {
        assert_eq!(told.types[name], kind);
    }
}

/// Works for a second and a half of processor time, and ends.
const BURNS: &str = "
const burn = () => {
  for (const from = process.cpuUsage(); ;) {
    const used = process.cpuUsage(from);
    if (used.user + used.system > 1.5e6) process.exit(7);
  }
};
require('http').createServer((request, response) => {
  response.end('burning', request.url === '/burn' ? burn : undefined);
}).listen(0, '127.0.0.1');
";

#[test]
fn what_a_worker_used_after_the_last_look_is_counted_when_it_ends() {
    let mut desk = Desk::new();
    desk.place.file("server.js", BURNS);
    let app = desk.start(&["-w", "1", "server.js"]);
    let series = "polyfork_slot_cpu_seconds_total{slot=\"1\"}";
    let before = told(&desk, "server").of(series);
    get(Desk::address(&app), "/burn");
    let replaced =
        |status: &Value| status["workers"][0]["worker"] == 2 && status["state"] == "ready";
    eventually("another worker", || desk.status("server"), replaced);
    let after = told(&desk, "server").of(series);
    assert!(after - before >= 1.4, "{before}, then {after}");
    // And for good, also when the next one is asked to leave.
    desk.did(&["restart", "server"]);
    let later = told(&desk, "server").of(series);
    assert!(later >= after, "{after}, then {later}");
}

#[test]
fn a_reload_is_counted_and_a_slot_keeps_its_figures() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "2", "server.js"]);
    for _ in 0..10 {
        get(Desk::address(&app), "/");
    }
    assert_eq!(told(&desk, "server").sum("polyfork_slot_connections_total"), 10.0);
    desk.did(&["reload", "--probation", "0", "server"]);
    for _ in 0..4 {
        get(Desk::address(&app), "/");
    }
    let after = told(&desk, "server");
    assert_eq!(after.sum("polyfork_slot_connections_total"), 14.0);
    assert_eq!(after.named("polyfork_slot_connections_total").len(), 2);
    assert_eq!(after.of("polyfork_reloads_total{result=\"done\"}"), 1.0);
    assert_eq!(after.sum("polyfork_reload_lost_connections_total"), 0.0);
    assert!(after.of("polyfork_last_reload_seconds") > 0.0);
    assert_eq!(after.of("polyfork_worker_exits_total{reason=\"asked\"}"), 2.0);
    assert_eq!(after.sum("polyfork_worker_restarts_total"), 0.0);
    desk.place.file("server.js", "process.exit(3)");
    desk.refuses(&["reload", "server"], 16);
    assert_eq!(told(&desk, "server").of("polyfork_reloads_total{result=\"failed\"}"), 1.0);
}

/// `accepted` of a status, too, begins anew with a worker that sits where another sat.
#[test]
fn a_successor_does_not_inherit_connections() {
    let mut desk = Desk::new();
    let app = desk.start(&["-w", "1", "server.js"]);
    for _ in 0..7 {
        get(Desk::address(&app), "/");
    }
    let before = desk.status("server")["workers"][0]["worker"].clone();
    // Its process ends without an answer.
    let mut dying = connect(Desk::address(&app));
    std::io::Write::write_all(&mut dying, b"GET /die HTTP/1.1\r\nHost: x\r\n\r\n").expect("ask");
    let fresh = |status: &serde_json::Value| {
        let worker = &status["workers"][0];
        worker["state"] == "ready" && worker["worker"] != before
    };
    let status = eventually("a successor", || desk.status("server"), fresh);
    assert_eq!(status["workers"][0]["accepted"], 0);
    let restarted = |told: &Told| told.of("polyfork_slot_restarts_total{slot=\"1\"}") == 1.0;
    let told = eventually("its end", || told(&desk, "server"), restarted);
    assert_eq!(told.of("polyfork_slot_connections_total{slot=\"1\"}"), 8.0);
    assert_eq!(told.of("polyfork_worker_restarts_total{reason=\"exited\"}"), 1.0);
}

#[test]
fn a_unix_socket_is_for_its_user_alone_and_goes_with_the_app() {
    let mut desk = Desk::new();
    let path = desk.place.path().join("m.sock");
    let there = format!("unix:{}", path.display());
    desk.start(&["--metrics", &there, "-w", "1", "server.js"]);
    let mode = fs::metadata(&path).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(desk.status("server")["metrics"], there);
    let stream = UnixStream::connect(&path).expect("connect");
    let (_, body) = exchange(stream, "GET /metrics HTTP/1.1\r\nHost: anything\r\n\r\n");
    assert_eq!(Told::read(&body).of("polyfork_workers_wanted"), 1.0);
    // One that is in use is nobody else's.
    let told = desk.refuses(&["start", "--name", "b", "--metrics", &there, "server.js"], 5);
    assert!(told.contains("--metrics") && told.contains("in use"), "{told}");
    desk.did(&["kill", "server"]);
    eventually("the file", || path.exists(), |there| !there);
}

#[test]
fn open_metrics_and_json_tell_the_same() {
    let mut desk = Desk::new();
    desk.start(&[&SERVED[..], &["-w", "1", "server.js"]].concat());
    let address = place(&desk, "server");
    let request = format!(
        "GET /metrics HTTP/1.1\r\nHost: {address}\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n"
    );
    let (head, body) = exchange(connect(address), &request);
    assert!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"));
    assert!(body.contains("# TYPE polyfork_primary_cpu_seconds counter\n"));
    assert!(body.contains("# UNIT polyfork_primary_cpu_seconds seconds\n"));
    let open: BTreeSet<String> = Told::read(&body).samples.into_keys().collect();
    let text = told(&desk, "server");
    let json = desk.json(&["metrics", "--json", "server"]);
    let families = json.as_array().expect("families");
    let names: BTreeSet<&str> =
        families.iter().map(|family| family["name"].as_str().expect("a name")).collect();
    assert_eq!(names, text.types.keys().map(String::as_str).collect());
    let counted: usize =
        families.iter().map(|family| family["samples"].as_array().expect("samples").len()).sum();
    assert_eq!((counted, open.len()), (text.samples.len(), text.samples.len()));
    let head = exchange(connect(address), "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.0.starts_with("HTTP/1.1 200") && head.1.is_empty());
}

#[test]
fn what_is_told_stands_in_the_document() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "--mechanism", "handoff", "server.js"]);
    desk.did(&["reload", "--probation", "0", "server"]);
    let document = include_str!("../../../../docs/metrics.md");
    let told = told(&desk, "server");
    for (name, kind) in &told.types {
        assert!(document.contains(&format!("| `{name}` | {kind} |")), "{name} ({kind})");
    }
    let rows = document.lines().filter(|line| line.starts_with("| `polyfork_"));
    let documented: BTreeSet<&str> = rows.filter_map(|row| row.split('`').nth(1)).collect();
    let missing: Vec<_> =
        documented.iter().filter(|name| !told.types.contains_key(**name)).collect();
    // There once workers report it.
    let waits = missing.iter().filter(|name| !name.contains("event_loop_lag"));
    assert_eq!(waits.count(), 0, "{missing:?}");
}
