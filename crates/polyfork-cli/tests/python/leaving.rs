//! Servers of Python that leave while their clients hold connections to them.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::kept::{Client, Load, Seen};
use super::support::{Events, Place};
use super::{apps, peer, with_module};

/// Load tests take both processors: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Cluster {
    events: Events,
    address: SocketAddr,
    _place: Place,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    fn start(options: &[&str], program: &[&str]) -> Cluster {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (place, apps) = (Place::new(), apps());
        let mut words = vec!["--listen", "127.0.0.1:0", "--cwd", &apps];
        words.extend(options);
        words.push("--");
        words.extend(program);
        let mut events = place.events(words);
        let address = events.address();
        events.wait_for("ready");
        Cluster { events, address, _place: place, _alone: alone }
    }

    /// Reloads under load, as often as told.
    fn reload(&mut self, times: u64, path: &str) -> Seen {
        let load = Load::start(self.address, 8, path);
        for _ in 0..times {
            load.wait_for_answers(50);
            self.events.running.signal_again(Signal::HUP);
            self.events.wait_for("reloaded");
        }
        load.wait_for_answers(50);
        load.stop()
    }

    fn stop(mut self) {
        self.events.running.signal(Signal::TERM);
        assert_eq!(self.events.end().0, 0);
    }
}

const UVICORN: [&str; 4] = ["--fd", "3", "--log-level", "warning"];

/// Nothing fails; each connection that a worker leaves behind was told so.
fn nothing_is_lost(what: &str, program: &[&str], path: &str) {
    let mut cluster = Cluster::start(&["-w", "2"], program);
    let seen = cluster.reload(4, path);
    println!("{what}: {} answers, {} of them with close", seen.answers, seen.closes);
    assert_eq!(seen.failed, [""; 0], "{what}");
    assert!(seen.closes >= 4, "{what}: {seen:?}");
    cluster.stop();
}

#[test]
fn fault_21_reloads_of_uvicorn_with_h11_cut_no_kept_connection() {
    let test = "fault_21_reloads_of_uvicorn_with_h11_cut_no_kept_connection";
    let Some(uvicorn) = peer(test, "uvicorn") else { return };
    let program = [&[uvicorn.as_str()][..], &UVICORN, &["--http", "h11", "asgi:app"]].concat();
    nothing_is_lost("h11", &program, "/");
    nothing_is_lost("h11, slow answers", &program, "/slow?ms=20");
}

#[test]
fn fault_21_reloads_of_uvicorn_with_httptools_cut_no_kept_connection() {
    let test = "fault_21_reloads_of_uvicorn_with_httptools_cut_no_kept_connection";
    let Some(uvicorn) = with_module(test, "uvicorn", "httptools") else { return };
    let program =
        [&[uvicorn.as_str()][..], &UVICORN, &["--http", "httptools", "asgi:app"]].concat();
    nothing_is_lost("httptools", &program, "/");
}

#[test]
fn fault_21_reloads_of_uvicorn_run_as_a_module_cut_no_kept_connection() {
    let test = "fault_21_reloads_of_uvicorn_run_as_a_module_cut_no_kept_connection";
    let Some(python) = with_module(test, "python", "uvicorn") else { return };
    let program = [&[python.as_str(), "-m", "uvicorn"][..], &UVICORN, &["asgi:app"]].concat();
    nothing_is_lost("python -m uvicorn", &program, "/");
}

#[test]
fn fault_21_reloads_of_uvicorn_below_gunicorn_cut_no_kept_connection() {
    let test = "fault_21_reloads_of_uvicorn_below_gunicorn_cut_no_kept_connection";
    let Some(gunicorn) = with_module(test, "gunicorn", "uvicorn_worker") else { return };
    let class = "uvicorn_worker.UvicornWorker";
    let program = [&gunicorn, "-w", "1", "--log-level", "warning", "-k", class, "asgi:app"];
    nothing_is_lost("gunicorn with uvicorn's worker", &program, "/");
}

/// gunicorn does this by itself; it is held to it here because our documents say so.
#[test]
fn reloads_of_gunicorn_with_threads_cut_no_kept_connection() {
    let test = "reloads_of_gunicorn_with_threads_cut_no_kept_connection";
    let Some(gunicorn) = peer(test, "gunicorn") else { return };
    let program = [&gunicorn, "-w", "1", "--threads", "8", "--log-level", "warning", "wsgi:app"];
    nothing_is_lost("gunicorn with threads", &program, "/");
}

/// A cluster of one uvicorn, of which the worker is about to leave.
fn one(test: &str, options: &[&str], more: &[&str]) -> Option<Cluster> {
    let uvicorn = peer(test, "uvicorn")?;
    let program = [&[uvicorn.as_str()][..], &UVICORN, more, &["asgi:app"]].concat();
    Some(Cluster::start(&[&["-w", "1"], options].concat(), &program))
}

#[test]
fn an_idle_connection_has_its_quiet_time_and_not_more() {
    let test = "an_idle_connection_has_its_quiet_time_and_not_more";
    let Some(mut cluster) = one(test, &[], &[]) else { return };
    let connect = || Client::connect(cluster.address).expect("connect");
    let (mut answered, mut asking, mut silent) = (connect(), connect(), connect());
    assert!(!answered.ask("/").expect("an answer").closes);
    asking.say("GET / HTTP/1.1\r\nHost: test\r\n").expect("said");
    let begun = Instant::now();
    cluster.events.running.signal(Signal::TERM);
    let answered = std::thread::spawn(move || {
        answered.ends().expect("an orderly end");
        begun.elapsed()
    });
    // A head that is on its way has longer, as long as more of it comes.
    while !answered.is_finished() {
        asking.say("X-More: to come\r\n").expect("said");
        std::thread::sleep(Duration::from_millis(50));
    }
    let quiet = answered.join().expect("a client");
    asking.say("\r\n").expect("said");
    assert!(asking.answer().expect("an answer").closes);
    silent.ends().expect("an orderly end");
    println!("an idle connection was closed after {quiet:?}");
    assert!(quiet >= Duration::from_millis(900), "closed after {quiet:?}");
    assert_eq!(cluster.events.end().0, 0);
}

#[test]
fn a_head_that_never_ends_does_not_hold_a_worker() {
    let test = "a_head_that_never_ends_does_not_hold_a_worker";
    let Some(mut cluster) = one(test, &["--grace", "60s"], &[]) else { return };
    let mut client = Client::connect(cluster.address).expect("connect");
    client.say("GET / HTTP/1.1\r\n").expect("said");
    let begun = Instant::now();
    cluster.events.running.signal(Signal::TERM);
    while client.say("X-More: to come\r\n").is_ok() {
        std::thread::sleep(Duration::from_millis(50));
        assert!(begun.elapsed() < Duration::from_secs(30), "still served");
    }
    assert_eq!(cluster.events.end().0, 0);
}

#[test]
fn pipelined_requests_are_all_answered() {
    for http in ["h11", "httptools"] {
        let test = "pipelined_requests_are_all_answered";
        if http == "httptools" && with_module(test, "uvicorn", http).is_none() {
            return;
        }
        let Some(mut cluster) = one(test, &[], &["--http", http]) else { return };
        let mut client = Client::connect(cluster.address).expect("connect");
        let slow = "GET /slow?ms=1000 HTTP/1.1\r\nHost: test\r\n\r\n";
        let fast = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";
        client.say(&[slow, fast, fast].concat()).expect("said");
        cluster.events.running.signal(Signal::TERM);
        let answers: Vec<bool> =
            (0..3).map(|_| client.answer().expect("an answer").closes).collect();
        assert_eq!(answers, [false, false, true], "{http}");
        client.ends().expect("the end");
        assert_eq!(cluster.events.end().0, 0);
    }
}

#[test]
fn an_answer_under_way_says_that_it_is_the_last() {
    let test = "an_answer_under_way_says_that_it_is_the_last";
    let Some(mut cluster) = one(test, &[], &[]) else { return };
    let mut client = Client::connect(cluster.address).expect("connect");
    client.say("GET /slow?ms=1500 HTTP/1.1\r\nHost: test\r\n\r\n").expect("said");
    cluster.events.running.signal(Signal::TERM);
    assert!(client.answer().expect("an answer").closes);
    assert_eq!(cluster.events.end().0, 0);
}

/// Says `keep-alive` by itself, as a proxy may; an answer begins at once and is whole when it is told so.
const STREAM: &str = "
import asyncio
async def app(scope, receive, send):
    if scope['type'] == 'lifespan':
        while True:
            event = (await receive())['type']
            await send({'type': event + '.complete'})
            if event == 'lifespan.shutdown':
                return
    headers = [(b'connection', b'keep-alive')]
    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
    await send({'type': 'http.response.body', 'body': b'begun', 'more_body': True})
    if scope['path'] == '/slow':
        await asyncio.sleep(1.5)
    await send({'type': 'http.response.body', 'body': b'done'})
";

#[test]
fn an_answer_that_began_before_is_followed_by_one_more() {
    let test = "an_answer_that_began_before_is_followed_by_one_more";
    for http in ["h11", "httptools"] {
        let Some(uvicorn) = with_module(test, "uvicorn", http) else { return };
        let place = Place::new();
        place.file("stream.py", STREAM);
        let folder = place.path().to_str().expect("a path");
        let more = ["--http", http, "--app-dir", folder, "stream:app"];
        let mut cluster =
            Cluster::start(&["-w", "1"], &[&[uvicorn.as_str()][..], &UVICORN, &more].concat());
        let mut client = Client::connect(cluster.address).expect("connect");
        client.say("GET /slow HTTP/1.1\r\nHost: test\r\n\r\n").expect("said");
        assert!(client.head().expect("a head").contains("connection: keep-alive"), "{http}");
        cluster.events.running.signal(Signal::TERM);
        assert_eq!(client.chunks().expect("the rest"), "begundone");
        assert!(client.ask("/").expect("one more").closes, "{http}");
        client.ends().expect("the end");
        assert_eq!(cluster.events.end().0, 0);
    }
}

#[test]
fn uvicorns_own_limit_is_kept() {
    let test = "uvicorns_own_limit_is_kept";
    let limit = ["--timeout-graceful-shutdown", "1"];
    let Some(mut cluster) = one(test, &["--grace", "60s"], &limit) else { return };
    let mut idle = Client::connect(cluster.address).expect("connect");
    assert!(!idle.ask("/").expect("an answer").closes);
    let mut slow = Client::connect(cluster.address).expect("connect");
    slow.say("GET /slow?ms=30000 HTTP/1.1\r\nHost: test\r\n\r\n").expect("said");
    let begun = Instant::now();
    cluster.events.running.signal(Signal::TERM);
    idle.ends().expect("an orderly end");
    assert!(slow.answer().is_err(), "cancelled");
    assert_eq!(cluster.events.end().0, 0);
    println!("ended after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20));
}

/// What it is for, seen from the other side.
#[test]
fn without_the_preload_uvicorn_cuts_idle_connections_at_once() {
    let test = "without_the_preload_uvicorn_cuts_idle_connections_at_once";
    let Some(mut cluster) = one(test, &["--no-drain-preload"], &["--http", "h11"]) else { return };
    let mut client = Client::connect(cluster.address).expect("connect");
    assert!(!client.ask("/").expect("an answer").closes);
    let mut slow = Client::connect(cluster.address).expect("connect");
    slow.say("GET /slow?ms=3000 HTTP/1.1\r\nHost: test\r\n\r\n").expect("said");
    cluster.events.running.signal(Signal::TERM);
    client.ends().expect("the end, before the slow answer");
    assert!(!slow.answer().expect("an answer").closes, "stock uvicorn does not say so");
    assert_eq!(cluster.events.end().0, 0);
}
