//! Every event is one line of sound JSON with the promised fields, and is in the document.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polyfork::cluster::{Carried, Dialect, Exit, Notice, Policy, Reason, Version};
use serde_json::Value;

use super::*;
use crate::exit::Code;

const WHO: Who = Who { slot: 2, worker: 7, pid: 4711 };

fn read(line: &str) -> Value {
    assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
    serde_json::from_str(line).expect(line)
}

fn told(event: &Event) -> Value {
    read(&Json.event(event, &Ledger::default()).expect("a line"))
}

fn via() -> Arc<Via> {
    let (policy, mechanism) = (Policy::RoundRobin, Carried::KernelExact);
    Arc::new(Via { policy, mechanism, why: "eBPF is permitted".into() })
}

fn address() -> Address {
    "127.0.0.1:3000".parse().unwrap()
}

fn one_of_each() -> Vec<Event> {
    vec![
        Event::Stopping,
        Event::Fork(WHO),
        Event::Online(WHO),
        Event::Listening { who: WHO, address: address(), by: via() },
        Event::Ready(WHO),
        Event::AllReady { workers: 4 },
        Event::Draining(WHO),
        Event::Disconnect(WHO),
        Event::Exit {
            who: WHO,
            code: None,
            signal: Some(9),
            reason: Reason::Exited(Exit::Signal(9)),
            lived: Duration::from_millis(1_500),
            voluntary: false,
            restart_in: Some(Duration::from_millis(100)),
        },
        Event::SlotFailed { slot: 2, restarts: 5, window: Duration::from_secs(30) },
        Event::SlotRests { slot: 2, code: Some(0), signal: None },
        Event::SlotRetired { slot: 2 },
        Event::Bound { address: address(), by: via() },
        Event::Closed { address: address() },
        Event::BindFailed {
            who: None,
            address: address(),
            error: Arc::new(io::ErrorKind::AddrInUse.into()),
        },
        Event::Status { who: WHO, text: "line\nbreak \u{1b}".into() },
        Event::Notice(Notice { code: "fallback", who: None, text: "no eBPF".into() }),
        Event::Lagged(3),
    ]
}

#[test]
fn every_event_is_one_line_with_event_and_time() {
    for event in one_of_each() {
        let value = told(&event);
        assert!(value["event"].is_string(), "{value}");
        let time = value["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z'), "{time}");
    }
}

#[test]
fn every_event_and_field_is_in_the_document() {
    let document = include_str!("../../../../../docs/events.md");
    let start = Start {
        name: "n".into(),
        workers: 1,
        workers_why: "w".into(),
        detected: Detected {
            dialect: Dialect::Node,
            runtime: Runtime::Node { version: Version { major: 20, minor: 1, patch: 0 } },
            exec: PathBuf::from("/usr/bin/node"),
            args_before: Vec::new(),
            why: "y".into(),
            warning: None,
        },
        warnings: vec!["careful".into()],
        page: false,
    };
    let verdict = Verdict { code: Code::Failed, text: "t".into() };
    let line =
        OutputLine { slot: 1, worker: 1, stream: Stream::Stdout, line: vec![], complete: true };
    let mut lines = Json.start(&start);
    lines.push(Json.end(&verdict));
    lines.push(refused(&verdict));
    lines.push(dropped(1));
    lines.push(String::from_utf8(Json.output(&line)).unwrap());
    lines.extend(one_of_each().iter().filter_map(|event| Json.event(event, &Ledger::default())));
    for line in lines {
        let value = read(&line);
        let name = value["event"].as_str().unwrap();
        let section = document.split("\n### ").find(|part| part.starts_with(&format!("`{name}`")));
        let section = section.unwrap_or_else(|| panic!("docs/events.md lacks `{name}`"));
        for field in value.as_object().unwrap().keys() {
            let everywhere = ["event", "time", "slot", "worker", "pid"].contains(&field.as_str());
            assert!(everywhere || section.contains(&format!("`{field}`")), "`{name}`: `{field}`");
        }
    }
}

#[test]
fn a_listening_worker_is_told_with_address_port_and_way() {
    let value = told(&Event::Listening { who: WHO, address: address(), by: via() });
    assert_eq!(value["slot"], 2);
    assert_eq!(value["worker"], 7);
    assert_eq!(value["pid"], 4711);
    assert_eq!(value["address"], "127.0.0.1:3000");
    assert_eq!(value["port"], 3000);
    assert_eq!(value["policy"], "round-robin");
    assert_eq!(value["mechanism"], "kernel");
    assert_eq!(value["exact"], true);
}

#[test]
fn what_has_no_value_is_null() {
    let path: Address = "unix:/run/x".parse().unwrap();
    assert_eq!(told(&Event::Closed { address: path })["port"], Value::Null);
    let exit = one_of_each().into_iter().find(|event| matches!(event, Event::Exit { .. })).unwrap();
    let exit = told(&exit);
    assert_eq!(exit["code"], Value::Null);
    assert_eq!(exit["signal"], "SIGKILL");
    assert_eq!(exit["restart_in_ms"], 100);
    assert_eq!(exit["lived_ms"], 1_500);
}

#[test]
fn output_of_any_bytes_is_exact() {
    let output = |bytes: &[u8]| {
        let line = OutputLine {
            slot: 1,
            worker: 1,
            stream: Stream::Stderr,
            line: bytes.to_vec(),
            complete: false,
        };
        read(&String::from_utf8(Json.output(&line)).unwrap())
    };
    let text = output("ünï \"q\" \u{7}".as_bytes());
    assert_eq!(text["line"], "ünï \"q\" \u{7}");
    assert_eq!(text["base64"], Value::Null);
    assert_eq!(text["complete"], false);
    let bytes = output(b"a\xff\xfe");
    assert_eq!(bytes["base64"], "Yf/+");
}

#[test]
fn base64_is_the_standard_one() {
    // RFC 4648, section 10.
    for (text, encoded) in [
        ("", ""),
        ("f", "Zg=="),
        ("fo", "Zm8="),
        ("foo", "Zm9v"),
        ("foob", "Zm9vYg=="),
        ("fooba", "Zm9vYmE="),
        ("foobar", "Zm9vYmFy"),
    ] {
        assert_eq!(base64(text.as_bytes()), encoded);
    }
}
