//! `stop --grace`, the demo's control socket, and what a primary leaves in its folder of logs.

use std::fs;

use super::desk::{Desk, eventually, read};
use super::support::{Events, Lines, Running, get};

/// Ends when it is told to by a file, and not before.
const SLOW: &str = "
const fs = require('fs');
require('http').createServer((request, response) => {
  const look = () => fs.existsSync('go') ? response.end('served') : setTimeout(look, 10);
  fs.writeFileSync('begun', '');
  look();
}).listen(0, '127.0.0.1');
";

fn begins(desk: &mut Desk, grace: &str) -> std::thread::JoinHandle<String> {
    desk.place.file("slow.js", SLOW);
    let app = desk.start(&["-w", "1", "--grace", grace, "slow.js"]);
    let address = Desk::address(&app);
    let client = std::thread::spawn(move || get(address, "/"));
    let begun = desk.place.path().join("begun");
    eventually("the request is in hand", || begun.exists(), |begun| *begun);
    client
}

#[test]
fn a_stop_can_give_more_time_than_the_start() {
    let mut desk = Desk::new();
    let client = begins(&mut desk, "0");
    let mut stop = Running::start(desk.command(&["stop", "slow", "--grace", "5m"]));
    eventually("it stops", || desk.status("slow")["state"] == "stopping", |stopping| *stopping);
    // With the grace of the start it would be gone at once.
    eventually(
        "draining",
        || desk.status("slow")["workers"][0]["state"].clone(),
        |s| *s == "draining",
    );
    desk.place.file("go", "");
    assert_eq!(client.join().unwrap(), "served");
    assert_eq!(stop.end().code(), Some(0));
}

#[test]
fn a_stop_under_way_can_be_cut_short_without_killing_at_once() {
    let mut desk = Desk::new();
    let client = begins(&mut desk, "10m");
    let mut first = Running::start(desk.command(&["stop", "slow"]));
    eventually("it stops", || desk.status("slow")["state"] == "stopping", |stopping| *stopping);
    let told = desk.json(&["stop", "--json", "slow", "--grace", "10ms"]);
    assert_eq!(told["result"]["outcome"], "stopped", "{told}");
    assert_eq!(first.end().code(), Some(0));
    assert!(client.join().is_err() || !desk.place.path().join("go").exists());
}

#[test]
fn a_second_stop_waits_for_the_same_end_and_kills_nobody() {
    let mut desk = Desk::new();
    let client = begins(&mut desk, "10m");
    desk.did(&["stop", "--no-wait", "slow"]);
    eventually("it stops", || desk.status("slow")["state"] == "stopping", |stopping| *stopping);
    desk.did(&["stop", "--no-wait", "slow"]);
    let mut all = Running::start(desk.command(&["stop", "--all"]));
    let mut third = Running::start(desk.command(&["stop", "--json", "slow"]));
    let mut told = Lines::of(third.take_out());
    // It is answered only when all is over, and that is up to the client.
    desk.place.file("go", "");
    assert_eq!(client.join().unwrap(), "served");
    let told = read(&told.rest().join("\n"));
    assert_eq!(told["result"]["outcome"], "stopped", "{told}");
    assert_eq!((all.end().code(), third.end().code()), (Some(0), Some(0)));
}

#[test]
fn a_reload_tells_whom_it_cut_short_and_the_end_does_not() {
    let mut desk = Desk::new();
    let client = begins(&mut desk, "300ms");
    let told = desk.json(&["reload", "--json", "slow", "--probation", "0"]);
    assert_eq!(told["result"]["cut_short"], 1, "{told}");
    let text = told["result"]["text"].as_str().expect("text");
    assert!(text.ends_with("; 1 worker was still busy when its grace period was over"), "{text}");
    assert!(client.join().is_err(), "it was cut");
    let told = desk.json(&["stop", "--json", "slow"]);
    assert_eq!(told["result"]["text"], "stopped: every worker finished");
}

#[test]
fn a_reload_that_a_stop_ends_says_that_it_is_stopping() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    desk.place.file("server.js", "setInterval(() => {}, 1000);");
    let mut reload = Running::start(desk.command(&["reload", "server"]));
    let mut told = Lines::of(reload.take_err());
    let coming = || desk.status("server")["workers"].as_array().map_or(0, Vec::len);
    eventually("the new version is started", coming, |workers| *workers == 2);
    desk.did(&["stop", "server"]);
    assert_eq!(reload.end().code(), Some(13));
    assert!(told.rest().join("\n").contains("it is stopping"));
}

#[test]
fn the_demo_is_reached_by_commands() {
    let desk = Desk::new();
    let mut demo = Events::of(desk.command(&["demo", "--json", "-w", "1"]));
    demo.wait_for("ready");
    assert_eq!(desk.listed(), [("demo".into(), "ready".into())]);
    desk.did(&["scale", "demo", "2"]);
    desk.did(&["reload", "demo", "--probation", "0"]);
    assert_eq!(desk.status("demo")["workers_ready"], 2);
    desk.did(&["stop", "demo"]);
    assert_eq!(demo.end().0, 0);
}

#[test]
fn what_a_killed_primary_left_half_compressed_is_removed() {
    let mut desk = Desk::new();
    desk.start(&["-w", "1", "server.js"]);
    desk.did(&["stop", "server"]);
    let part = desk.logs().join("server/1.20260101T000000000000Z.log.gz.part");
    fs::write(&part, "half").unwrap();
    desk.start(&["-w", "1", "server.js"]);
    eventually("it is removed", || part.exists(), |there| !there);
}

/// It ends in the middle of compressing.
#[test]
fn an_end_in_the_middle_of_compressing_leaves_nothing_half_done() {
    let mut desk = Desk::new();
    desk.place.file(
        "talk.js",
        "const line = Array.from({length: 200}, () => Math.random().toString(36)).join('').slice(0, 1500);
         require('http').createServer((request, response) => {
           for (let i = 0; i < 2000; i++) console.log(i + line);
           response.end('said');
         }).listen(0, '127.0.0.1');",
    );
    let app = desk.start(&["-w", "1", "--log-size", "1MiB", "talk.js"]);
    assert_eq!(get(Desk::address(&app), "/"), "said");
    desk.did(&["stop", "talk"]);
    let names = fs::read_dir(desk.logs().join("talk")).unwrap().flatten();
    let names: Vec<String> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.len() > 3 && !names.iter().any(|name| name.ends_with(".part")), "{names:?}");
}
