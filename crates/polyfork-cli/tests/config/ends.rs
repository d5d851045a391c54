//! Ends of workers after which none follows, and how long restarts wait: PM2's keys, and the options that they become.
//!
//! What decides is in the tests of the core; here is that files, options, status and exit codes say the same of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};

use super::desk::{Desk, eventually};
use super::support::{Place, get};

/// Serves, and exits with the code it is asked for.
const EXITS: &str = "
const http = require('http');
http.createServer((request, response) => {
  const code = /^.exit=(\\d+)$/.exec(request.url);
  if (code) process.exit(Number(code[1]));
  response.end(String(process.pid));
}).listen(0, '127.0.0.1');
";

/// Works for a moment, notes that it did, and is done: nothing but its channel is open then.
const JOB: &str = "setTimeout(() => require('fs').appendFileSync('done', 'x'), 20);";

/// Has the worker whose turn it is exit with this code.
fn exit(address: SocketAddr, code: u8) {
    let mut stream = TcpStream::connect(address).expect("connect");
    let request = format!("GET /exit={code} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("write");
    // It ends without an answer.
    let _ = stream.read(&mut [0]);
}

/// The states of an app and of its slots.
fn states(status: &Value) -> Vec<String> {
    let slots = status["workers"].as_array().into_iter().flatten();
    let all = std::iter::once(status).chain(slots);
    all.map(|one| one["state"].as_str().unwrap_or_default().to_owned()).collect()
}

fn jobs_done(desk: &Desk) -> usize {
    std::fs::read(desk.place.path().join("done")).map_or(0, |done| done.len())
}

#[test]
fn a_slot_stops_after_an_exit_code_that_was_named_and_the_others_serve() {
    let mut desk = Desk::new();
    desk.place.file("shop.js", EXITS);
    desk.place.file(
        "ecosystem.config.js",
        "module.exports = { apps: [{ script: 'shop.js', instances: 2, stop_exit_codes: [3] }] }",
    );
    let app = desk.json(&["start", "--json"])[0].clone();
    desk.adopt(&app);
    let address = Desk::address(&app);
    exit(address, 3);
    let status = eventually(
        "one slot stopped",
        || desk.status("shop"),
        |status| states(status).contains(&"stopped".to_owned()),
    );
    let mut slots = states(&status).split_off(1);
    slots.sort();
    assert_eq!(
        (status["state"].as_str(), slots),
        (Some("ready"), vec!["ready".into(), "stopped".into()])
    );
    let stopped = status["workers"].as_array().into_iter().flatten();
    let stopped: Vec<&Value> = stopped.filter(|slot| slot["state"] == "stopped").collect();
    assert_eq!((&stopped[0]["restarts"], &stopped[0]["last_exit"]["code"]), (&json!(0), &json!(3)));
    assert!(get(address, "/").parse::<u32>().is_ok(), "the other one serves");
    // Another code is another matter.
    exit(address, 4);
    eventually(
        "a restart",
        || desk.status("shop"),
        |status| status["restarts"] == 1 && status["workers_ready"] == 1,
    );
    exit(address, 3);
    let listed = eventually("all stopped", || desk.listed(), |apps| apps[0].1 == "stopped");
    assert_eq!(listed, [("shop".to_owned(), "stopped".to_owned())]);
    assert_eq!(desk.json(&["ls", "--json"])[0]["workers_ready"], 0);
    // Whoever wants it again says so.
    desk.did(&["reload", "shop"]);
    assert_eq!(states(&desk.status("shop")), ["ready", "ready", "ready"]);
    desk.did(&["stop", "shop"]);
}

#[test]
fn a_job_that_is_not_to_be_restarted_is_stopped_and_can_be_run_again() {
    let mut desk = Desk::new();
    desk.place.file("job.js", JOB);
    desk.place.file(
        "ecosystem.config.js",
        "module.exports = { apps: [{ script: 'job.js', autorestart: false }] }",
    );
    let told = desk.does(&["start", "--json"]);
    let app = super::desk::read(&told.out)[0].clone();
    desk.adopt(&app);
    assert_eq!((told.code, &app["state"]), (Some(0), &json!("stopped")), "{told:?}");
    assert_eq!(jobs_done(&desk), 1);
    let status = desk.status("job");
    assert_eq!(states(&status), ["stopped", "stopped"]);
    assert_eq!(
        (&status["restarts"], &status["workers"][0]["last_exit"]["code"]),
        (&json!(0), &json!(0))
    );
    desk.did(&["restart", "job"]);
    assert_eq!(jobs_done(&desk), 2);
    // A reload of what does not serve is run to its end, and is no failure.
    desk.did(&["reload", "job"]);
    assert_eq!(jobs_done(&desk), 3);
    desk.did(&["upgrade", "job"]);
    assert_eq!(states(&desk.status("job")), ["stopped", "stopped"], "also in the next image");
    desk.did(&["restart", "job"]);
    assert_eq!(jobs_done(&desk), 4);
    desk.did(&["stop", "job"]);
}

#[test]
fn a_job_that_has_stopped_is_run_again_when_what_it_watches_changes() {
    let mut desk = Desk::new();
    desk.place.file("job.js", JOB);
    desk.place.file("input", "1");
    let args =
        ["--name", "job", "-w", "1", "--ready", "listening-or=30s", "--stop-exit-codes", "any"];
    let app =
        desk.start(&[&args[..], &["--watch", "input", "--watch-delay", "1ms", "job.js"]].concat());
    assert_eq!((&app["state"], jobs_done(&desk)), (&json!("stopped"), 1));
    // The watch may begin a moment after the start was told.
    eventually(
        "run again",
        || {
            desk.place.file("input", "2");
            jobs_done(&desk)
        },
        |done| *done >= 2,
    );
    desk.did(&["stop", "job"]);
}

#[test]
fn a_server_that_may_end_goes_on_as_long_as_it_listens() {
    let place = Place::new();
    place.file("serves.js", EXITS);
    for mechanism in ["kernel", "handoff"] {
        let codes = ["--mechanism", mechanism, "--stop-exit-codes", "0"];
        let mut events = place.events([&codes[..], &["-w", "1", "serves.js"]].concat());
        let address = eventually_listening(&mut events);
        // Nothing but the way to its primary may be open in between.
        let pids: Vec<String> = (0..5).map(|_| get(address, "/")).collect();
        assert!(pids.windows(2).all(|two| two[0] == two[1]), "{mechanism}: {pids:?}");
        exit(address, 0);
        assert_eq!(events.end().0, 0, "{mechanism}");
    }
}

#[test]
fn in_the_foreground_the_exit_code_says_how_jobs_ended() {
    let place = Place::new();
    place.file("job.js", "process.exit(Number(process.env.CODE))");
    for (codes, code, ends) in [("0,3", 3, 0), ("any", 0, 0), ("any", 3, 7), ("0", 3, 7)] {
        let code = format!("CODE={code}");
        let limit = ["--restart-limit", "0/1m", "--stop-exit-codes", codes];
        let done =
            place.ends([&["run", "-w", "2", "--env", &code][..], &limit, &["job.js"]].concat());
        assert_eq!(done.code, Some(ends), "{codes} {code}: {done:?}");
    }
}

#[test]
fn a_restart_waits_as_long_as_it_was_told_each_time() {
    let place = Place::new();
    place.file("dies.js", EXITS);
    for (delay, waits) in [("300ms", [300, 300, 300]), ("10ms..40ms", [0, 0, 0])] {
        let mut events = place.events(["-w", "1", "--restart-delay", delay, "dies.js"]);
        let mut told = Vec::new();
        for _ in 0..3 {
            let address = eventually_listening(&mut events);
            exit(address, 1);
            told.push(events.wait_for("exit")["restart_in_ms"].as_u64().expect("a wait"));
        }
        match waits {
            [0, ..] => assert!(told.is_sorted() && (10..=13).contains(&told[0]), "{told:?}"),
            _ => assert_eq!(told, waits),
        }
    }
}

/// Where the latest worker listens; it may be another port each time.
fn eventually_listening(events: &mut super::support::Events) -> SocketAddr {
    let listening = events.wait_for("listening");
    events.wait_for("worker_ready");
    listening["address"].as_str().expect("address").parse().expect("an address")
}

#[test]
fn an_app_is_given_up_after_so_many_young_workers_in_a_row_however_long_restarts_wait() {
    let place = Place::new();
    place.file("dies.js", "process.exit(1)");
    // More time passes between restarts than PM2 would take for its whole count.
    place.file(
        "ecosystem.config.js",
        "module.exports = { apps: [{ script: 'dies.js', max_restarts: 3, min_uptime: 60000, restart_delay: 50 }] }",
    );
    let mut events = place.events(["--config", "ecosystem.config.js", "dies"]);
    let failed = events.wait_for("slot_failed");
    assert_eq!(failed["restarts"], 3, "{failed}");
    let exits = events.seen.iter().filter(|event| event["event"] == "exit").count();
    assert_eq!((exits, events.end().0), (4, 7));
}
