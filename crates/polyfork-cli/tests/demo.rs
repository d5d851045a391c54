//! `polyfork demo` needs nothing but the binary, and shows exact turns.

#![allow(clippy::print_stdout, reason = "tests print their counts")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use rustix::process::Signal;
use serde_json::Value;
use support::{Events, Lines, PATIENCE, Place, Running, get};

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
fn a_kept_alive_connection_counts_once() {
    let mut demo = Events::of(Place::new().polyfork(["demo", "-w", "1", "--json"]));
    let address = demo.address();
    demo.wait_for("ready");
    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
    stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let mut ask = |path: &str| {
        write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
        }
        let length = head.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    };
    for _ in 0..20 {
        assert_eq!(ask("/healthz"), "ok\n");
    }
    let state: Value = serde_json::from_str(&ask("/json")).unwrap();
    assert_eq!(state["answered_by"]["connections"], 1);
    assert_eq!(state["answered_by"]["requests"], 21);
    // A connection that rests does not hold up the end.
    demo.running.signal(Signal::TERM);
    assert_eq!(demo.end().0, 0);
    let mut rest = Vec::new();
    assert_eq!(stream.read_to_end(&mut rest).unwrap(), 0, "closed, not reset");
}

#[test]
fn odd_requests_are_answered_and_end_the_connection() {
    let mut demo = Events::of(Place::new().polyfork(["demo", "-w", "1", "--json"]));
    let address = demo.address();
    demo.wait_for("ready");
    for (request, status) in [
        ("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "413"),
        ("DELETE / HTTP/1.1\r\n\r\n", "405"),
        ("GET /nothing HTTP/1.0\r\n\r\n", "404"),
        ("\x16\x03\x01 not HTTP\r\n\r\n", "400"),
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
    }
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
