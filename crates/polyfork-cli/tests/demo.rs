//! `polyfork demo` needs nothing but the binary, and shows exact turns.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use std::net::SocketAddr;

use rustix::process::Signal;
use serde_json::Value;
use support::{Events, Lines, Place, Running, get};

fn state(address: SocketAddr) -> Value {
    serde_json::from_str(&get(address, "/json?close")).expect("JSON")
}

#[test]
fn connections_fall_in_exact_turns_and_every_worker_shows_it() {
    const CONNECTIONS: u64 = 400;
    let mut demo = Events::of(Place::new().polyfork(["demo", "-w", "4", "--json"]));
    let address = demo.address();
    demo.wait_for("ready");
    for _ in 0..CONNECTIONS {
        assert_eq!(get(address, "/healthz"), "ok\n");
    }
    // Each look is a connection too; the counts of others come a moment later.
    let mut looks = 0;
    let settled = loop {
        let state = state(address);
        looks += 1;
        if state["connections"] == CONNECTIONS + looks {
            break state;
        }
        assert!(looks < 10_000, "{state}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    assert_eq!(settled["workers"].as_array().map(Vec::len), Some(4));
    assert!(settled["spread"].as_u64().unwrap() <= 1, "{settled}");
    demo.running.signal(Signal::TERM);
    assert_eq!(demo.end().0, 0);
}

#[test]
fn the_page_brings_everything_along() {
    let mut running = Running::start(Place::new().polyfork(["demo", "-w", "1"]));
    let mut err = Lines::of(running.take_err());
    let line = err.wait_for("open http://127.0.0.1:");
    let url = line.split("http://").nth(1).unwrap().trim_end_matches('/');
    err.wait_for("slot 1: ready");
    let page = get(url.parse().unwrap(), "/");
    assert!(page.starts_with("<!doctype html>") && page.contains("open 100 connections"));
    for outside in ["https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page refers to {outside}");
    }
    running.signal(Signal::INT);
    assert_eq!(running.end().code(), Some(0));
}
