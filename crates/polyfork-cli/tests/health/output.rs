//! Nobody reads what workers write.

use serde_json::Value;

use super::status_of;
use super::support::{Lines, Place, Running, get};

const FLOOD: &str = "
    const http = require('http');
    http.createServer((request, response) => response.end(String(process.pid))).listen(0, '127.0.0.1', () => {
        if (require('cluster').worker.id !== 1) return;
        const line = 'x'.repeat(1000) + '\\n';
        setTimeout(() => { for (let n = 0; n < 20000; n++) process.stdout.write(line); }, 50);
    });";

#[test]
fn fault_55_a_log_reader_that_is_stuck_holds_up_one_worker_and_not_the_primary() {
    let place = Place::new();
    place.file("app.js", FLOOD);
    let mut running =
        Running::start(place.polyfork(["run", "--name", "shop", "-w", "2", "app.js"]));
    // Not read before the end.
    let out = running.take_out();
    let mut err = Lines::of(running.take_err());
    err.wait_for("all workers are ready");
    let ask = || {
        let answer = place.ends(["status", "--json", "shop"]);
        serde_json::from_str::<Value>(&answer.out).expect("an answer")
    };
    let address = ask()["listening"][0]["address"].as_str().map(str::parse);
    let address = address.expect("an address").expect("an address");
    // The kernel gives the worker that is stuck no connection that it does not take.
    let answers: Vec<String> = (0..20).map(|_| get(address, "/")).collect();
    assert!(answers.iter().all(|pid| !pid.is_empty()));
    assert_eq!(ask()["workers_ready"], 2);
    let resident = running.resident_kib();
    println!("20 MB written by a worker, primary {resident} KiB");
    assert!(resident < 32 * 1024, "the primary keeps what nobody reads");
    assert!(status_of(running.pid(), "Threads") < 16);
    let lines = Lines::of(out);
    running.signal(rustix::process::Signal::TERM);
    assert!(running.end().success());
    drop(lines);
}
