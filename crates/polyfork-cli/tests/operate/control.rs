//! The control socket as a program sees it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::desk::{Desk, read};

fn ask(stream: &mut UnixStream, request: &Value) -> Value {
    stream.write_all(format!("{request}\n").as_bytes()).expect("ask");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("an answer");
    read(&line)
}

#[test]
fn several_requests_on_one_connection_are_answered_in_order() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut stream = desk.socket("server");
    for _ in 0..3 {
        let answer = ask(&mut stream, &json!({"v": 1, "verb": "brief", "unknown": [1, 2]}));
        assert_eq!((&answer["ok"], &answer["v"]), (&true.into(), &1.into()));
        assert_eq!(answer["result"]["name"], "server");
    }
    let answer = ask(&mut stream, &json!({"v": 1, "verb": "dance"}));
    assert_eq!((&answer["ok"], &answer["error"]["code"]), (&false.into(), &"unknown_verb".into()));
    let answer = ask(&mut stream, &json!({"v": 99, "verb": "brief"}));
    assert_eq!(answer["error"]["code"], "version");
    let answer = ask(&mut stream, &json!({"verb": "status"}));
    assert_eq!(answer["result"]["workers"][0]["state"], "ready");
}

/// As `echo ... | nc -NU` does.
#[test]
fn who_says_that_nothing_more_is_asked_still_gets_an_answer() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    let mut stream = desk.socket("server");
    stream.write_all(b"{\"verb\":\"status\"}\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(read(&answer)["ok"], true);
}

#[test]
fn what_takes_longer_than_its_deadline_is_told_and_goes_on() {
    let mut desk = Desk::new();
    desk.place.file(
        "late.js",
        "const late = process.env.NODE_APP_INSTANCE === '0' ? 0 : 500;
         setTimeout(() => require('http').createServer().listen(0, '127.0.0.1'), late)",
    );
    desk.start(&["-w", "1", "late.js"]);
    let mut stream = desk.socket("late");
    let answer = ask(&mut stream, &json!({"verb": "scale", "to": 2, "deadline_ms": 50}));
    assert_eq!(answer["error"]["code"], "deadline", "{answer}");
    let answer = ask(&mut stream, &json!({"verb": "scale", "to": 2}));
    assert_eq!(answer["result"], json!({"workers": 2, "ready": true}));
}

#[test]
fn only_one_restart_goes_on_at_a_time() {
    let mut desk = Desk::new();
    desk.place.file(
        "late.js",
        "setTimeout(() => require('http').createServer().listen(0, '127.0.0.1'), 300)",
    );
    desk.start(&["-w", "2", "late.js"]);
    let mut stream = desk.socket("late");
    let begun = ask(&mut stream, &json!({"verb": "restart", "wait": false}));
    assert_eq!(begun["ok"], true);
    let second = ask(&mut stream, &json!({"verb": "restart"}));
    assert_eq!(second["error"]["code"], "busy", "{second}");
    assert_eq!(ask(&mut stream, &json!({"verb": "status"}))["result"]["busy"], "restart");
}
