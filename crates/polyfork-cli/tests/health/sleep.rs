//! Nothing happens, and nobody wakes up for it.

use std::time::{Duration, Instant};

use super::status_of;
use super::support::{Place, get};

fn wake_ups(pid: u32) -> u64 {
    status_of(pid, "voluntary_ctxt_switches")
}

/// Waits until `pid` has not woken for some seconds in a row; gives how often it woke in the last stretch.
fn settles(pid: u32, stretch: Duration) -> u64 {
    let limit = Instant::now() + super::support::PATIENCE;
    loop {
        let before = wake_ups(pid);
        std::thread::sleep(stretch);
        let woken = wake_ups(pid) - before;
        if woken <= 1 || Instant::now() > limit {
            return woken;
        }
    }
}

#[test]
fn an_idle_primary_sleeps_and_is_awake_when_something_comes() {
    let place = Place::with_server();
    // Without anything that was asked for, and with looks every 100 ms while something moves.
    let mut events = place.events(["-w", "2", "--ack-limit", "200ms", "server.js"]);
    let address = events.address();
    events.wait_for("ready");
    let primary = events.running.pid();
    let stretch = Duration::from_secs(3);
    let idle = settles(primary, stretch);
    println!("idle: woken {idle} times in {stretch:?}");
    assert!(idle <= 1, "an idle primary woke {idle} times");
    // A connection wakes it, and it goes to sleep again.
    let before = wake_ups(primary);
    get(address, "/");
    let again = settles(primary, stretch);
    println!("after a connection: {} times until it slept", wake_ups(primary) - before);
    assert!(wake_ups(primary) > before, "it looks once something has come");
    assert!(again <= 1, "it does not go to sleep again");
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
}

#[test]
fn many_connections_do_not_wake_the_primary_one_by_one() {
    let place = Place::with_server();
    let mut events = place.events(["-w", "2", "server.js"]);
    let address = events.address();
    let bound = events.seen.iter().find(|event| event["event"] == "bound").expect("bound");
    if bound["mechanism"] != "kernel" {
        let reason = "connections are handed over by the primary here";
        return super::support::skip("many_connections_do_not_wake_the_primary_one_by_one", reason);
    }
    events.wait_for("ready");
    let primary = events.running.pid();
    settles(primary, Duration::from_secs(2));
    let before = (wake_ups(primary), Instant::now());
    const CONNECTIONS: u32 = 400;
    for _ in 0..CONNECTIONS {
        get(address, "/");
    }
    let (woken, took) = (wake_ups(primary) - before.0, before.1.elapsed());
    println!("{CONNECTIONS} connections in {took:?}: woken {woken} times");
    // Two looks a second, however many come.
    let looks = took.as_secs() * 2 + 20;
    assert!(woken < looks.min(u64::from(CONNECTIONS)), "woken {woken} times");
    events.running.signal(rustix::process::Signal::TERM);
    assert_eq!(events.end().0, 0);
}
