//! `polyfork reload`: a new version takes over under its name, a bad one is refused with its last words.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use std::process::Output;

use rustix::process::Signal;
use serde_json::Value;
use support::{Place, get};

fn ask(place: &Place, words: &[&str]) -> Output {
    place.polyfork(words).output().expect("it runs")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_reload_by_name_ends_with_a_proof_and_a_bad_version_is_refused() {
    let place = Place::with_server();
    let mut app = place.events(["--name", "shop", "-w", "2", "server.js"]);
    let address = app.address();
    app.wait_for("ready");

    let done = ask(&place, &["reload", "--json", "--probation", "10ms", "sh*"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let result = &json(&done)["result"];
    assert_eq!((&result["generation"], &result["workers"]), (&2.into(), &2.into()));
    assert_eq!((&result["refused"], &result["reset"]), (&0.into(), &0.into()));

    place.file("server.js", "console.error('first\\nsecond'); process.exit(3)");
    let refused = ask(&place, &["reload", "--at-a-time", "1", "shop"]);
    assert_eq!(refused.status.code(), Some(16), "{refused:?}");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("exited with code 3; the old workers go on serving"), "{text}");
    assert!(text.ends_with("\n    first\n    second\n"), "{text}");
    let refused = json(&ask(&place, &["reload", "--json", "shop"]));
    assert_eq!(refused["error"]["code"], "reload_failed");

    assert!(get(address, "/").contains("pid"));
    let status = json(&ask(&place, &["status", "--json", "shop"]));
    let workers = status["workers"].as_array().expect("workers");
    let serving = workers.iter().filter(|worker| worker["state"] == "ready");
    assert!(serving.clone().all(|worker| worker["generation"] == 2), "{status:#}");
    assert_eq!(serving.count(), 2, "{status:#}");
    app.running.signal(Signal::TERM);
    assert_eq!(app.end().0, 0);
}

/// How many slots each `ready` told so far.
fn told_ready(app: &support::Events) -> Vec<u64> {
    let told = app.seen.iter().filter(|event| event["event"] == "ready");
    told.map(|event| event["workers"].as_u64().expect("a number")).collect()
}

#[test]
fn all_are_ready_when_each_slot_has_its_worker_and_old_ones_do_not_count() {
    let place = Place::with_server();
    for workers in [1, 3] {
        let mut app = place.events(["--name", "shop", "-w", &workers.to_string(), "server.js"]);
        let address = app.address();
        app.wait_for("ready");
        for _ in 0..2 {
            let done = ask(&place, &["reload", "--probation", "0s", "shop"]);
            assert_eq!(done.status.code(), Some(0), "{done:?}");
            app.wait_for("reloaded");
        }
        assert_eq!(told_ready(&app), [workers], "it was so all the time");
        let _cut_short = std::panic::catch_unwind(|| get(address, "/die"));
        app.wait_until("exit", |exit| exit["reason"] == "exited");
        app.wait_for("ready");
        assert_eq!(told_ready(&app), [workers, workers]);
        let done = ask(&place, &["scale", "shop", "4"]);
        assert_eq!(done.status.code(), Some(0), "{done:?}");
        app.wait_for("ready");
        assert_eq!(told_ready(&app), [workers, workers, 4]);
        app.running.signal(Signal::TERM);
        assert_eq!(app.end().0, 0);
    }
}

#[test]
fn an_address_that_the_new_version_does_not_listen_on_is_closed() {
    let place = Place::with_server();
    let mut app = place.events(["--name", "shop", "-w", "2", "server.js"]);
    let before = app.address();
    app.wait_for("ready");
    let text = std::fs::read_to_string(place.path().join("server.js")).expect("the program");
    // Port 0 once more, and another socket: the first of another name.
    place.file("server.js", &text.replace("'127.0.0.1'", "'127.0.0.2'"));
    let done = ask(&place, &["reload", "--json", "shop"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let result = &json(&done)["result"];
    assert_eq!(result["abandoned"], serde_json::json!([before.to_string()]), "{result}");
    let text = result["text"].as_str().expect("text");
    assert!(text.contains(&format!("nobody listens on {before} any more")), "{text}");
    let waits = std::net::TcpStream::connect(before).expect("it is not closed yet");
    app.wait_for("closed");
    let metrics = String::from_utf8(ask(&place, &["metrics", "shop"]).stdout).expect("text");
    assert!(metrics.contains("\npolyfork_connections_reset_total 1\n"), "{metrics}");
    drop(waits);
    let refused = std::net::TcpStream::connect(before).expect_err("nobody listens there");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let status = json(&ask(&place, &["status", "--json", "shop"]));
    assert_eq!(status["listeners"].as_array().map(Vec::len), Some(1), "{status:#}");
    app.running.signal(Signal::TERM);
    assert_eq!(app.end().0, 0);
}

#[test]
fn two_reloads_at_once_one_wins_and_the_other_is_told() {
    let place = Place::with_server();
    let mut app = place.events(["--name", "shop", "-w", "1", "server.js"]);
    app.wait_for("ready");
    let begun = ask(&place, &["reload", "--no-wait", "--probation", "1m", "shop"]);
    assert_eq!(begun.status.code(), Some(0), "{begun:?}");
    let told = ask(&place, &["reload", "shop"]);
    assert_eq!(told.status.code(), Some(13), "{told:?}");
    let text = String::from_utf8_lossy(&told.stderr);
    assert!(text.contains("a reload is under way; wait for its end"), "{text}");
    app.running.signal(Signal::TERM);
    app.wait_for("reload_failed");
    assert_eq!(app.end().0, 0);
}
