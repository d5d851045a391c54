//! What surrounds an app goes over as well: its metrics, its configuration, signs of life and probes.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use serde_json::Value;

use super::app::App;
use super::desk::{Desk, eventually, pidfd, read, signal};
use super::scrape::{exchange, place, scrape};
use super::support::get;

/// Answers with a variable of its environment.
const TELLS: &str = "
require('http').createServer((request, response) => {
  response.end(JSON.stringify({ colour: process.env.COLOUR }));
}).listen(0, '127.0.0.1');
";

#[test]
fn metrics_are_served_on_where_they_were_and_nothing_goes_back() {
    let app = App::start(&["--metrics", "127.0.0.1:0", "-w", "2", "server.js"]);
    for _ in 0..10 {
        get(app.address, "/");
    }
    let address = place(&app.desk, &app.name);
    let connections = "polyfork_slot_connections_total";
    let before = eventually("10", || scrape(address), |told| told.sum(connections) == 10.0);
    app.upgrade();
    assert_eq!(place(&app.desk, &app.name), address);
    let after = scrape(address);
    assert_eq!(after.sum(connections), 10.0);
    let started = "polyfork_start_time_seconds";
    assert_eq!(before.of(started), after.of(started));
    assert_eq!(after.of("polyfork_stale"), 0.0);
}

#[test]
fn metrics_in_a_file_are_served_on_and_the_file_goes_with_the_app() {
    let desk = Desk::new();
    let path = desk.place.path().join("metrics.sock");
    let there = format!("unix:{}", path.display());
    let app = App::start_on(desk, &["--metrics", &there, "-w", "1", "server.js"]);
    for _ in 0..2 {
        app.upgrade();
        let mode = path.metadata().expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let stream = UnixStream::connect(&path).expect("connect");
        let (head, _) = exchange(stream, "GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    }
    app.desk.did(&["stop", &app.name]);
    eventually("the file", || path.exists(), |there| !there);
}

fn configure(desk: &Desk, colour: &str) {
    let text = format!(
        "[app.shop]\nprogram = \"tells.js\"\nworkers = 1\n[app.shop.env]\nCOLOUR = \"{colour}\"\n"
    );
    desk.place.file("polyfork.toml", &text);
}

#[test]
fn the_next_image_reads_the_configuration_again() {
    let mut desk = Desk::new();
    desk.place.file("tells.js", TELLS);
    configure(&desk, "red");
    let shop = desk.json(&["start", "--json"])[0].clone();
    desk.adopt(&shop);
    let pid = shop["pid"].as_u64().expect("a pid");
    let (name, address) = ("shop".to_owned(), Desk::address(&shop));
    let app = App { desk, name, pid, address };
    let colour = || read(&get(address, "/"))["colour"].clone();
    assert_eq!(colour(), "red");
    app.upgrade();
    configure(&app.desk, "blue");
    app.desk.did(&["reload", "--probation", "0", "shop"]);
    assert_eq!(colour(), "blue");
    // What the configuration was read with has ended.
    app.upgrade();
    assert_eq!(colour(), "blue");
}

#[test]
fn signs_of_life_and_probes_are_asked_for_by_the_next_image() {
    let app = App::start(&[
        "-w",
        "2",
        "--watchdog",
        "8s",
        "--probe",
        "/",
        "--probe-interval",
        "50ms",
        // A worker that is stopped answers none of them.
        "--probe-failures",
        "1000",
        "server.js",
    ]);
    for _ in 0..5 {
        app.upgrade();
    }
    let worker = app.status()["workers"][0].clone();
    let stopped = pidfd(worker["pid"].as_u64().expect("a pid"));
    signal(&stopped, Signal::STOP);
    let blocked = |worker: &Value| !worker["blocked_ms"].is_null();
    eventually("a blocked worker", || app.status()["workers"][0].clone(), blocked);
    signal(&stopped, Signal::CONT);
    let well = |now: &Value| now["blocked_ms"].is_null() && now["pid"] == worker["pid"];
    eventually("the same worker", || app.status()["workers"][0].clone(), well);
}
