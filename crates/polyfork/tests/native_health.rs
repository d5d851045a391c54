//! Workers of a Rust program are watched and probed: real processes, a real primary.
//!
//! The program is this test binary itself: [`worker_main`] is a test that does nothing when it is run as one, and a small
//! HTTP server when a primary started the process.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use polyfork::cluster::{
    Address, Cluster, Dialect, Event, Events, MainResult, Mechanism, Output, Probe, Reason,
    Settings, Worker, is_worker,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// For what should happen at once. Generous: the machine may be busy.
const SOON: Duration = Duration::from_secs(60);

/// Not a test of its own: see the header.
#[test]
fn worker_main() {
    if is_worker() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve()).unwrap();
        std::process::exit(0);
    }
}

/// `/block` never answers and stops the runtime, `/ill` makes `/health` answer 500 from then on.
async fn serve() -> MainResult {
    let worker = Worker::from_env()?;
    let mut listener = worker.listen("127.0.0.1:0").await?;
    let mut status = "204 No Content";
    loop {
        let (mut stream, _) = tokio::select! {
            accepted = listener.accept() => accepted?,
            () = worker.shutdown() => return Ok(()),
        };
        let mut request = [0; 512];
        let length = stream.read(&mut request).await.unwrap_or(0);
        let request = String::from_utf8_lossy(&request[..length]);
        if request.starts_with("GET /block") {
            std::thread::sleep(SOON * 10);
        }
        if request.starts_with("GET /ill") {
            status = "500 Internal Server Error";
        }
        let body = worker.id().unwrap_or(0);
        let status = if request.starts_with("GET /health") { status } else { "200 OK" };
        let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n{body}");
        // A client that is gone wants no answer.
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

fn settings(mechanism: Mechanism) -> Settings {
    let program = std::env::current_exe().unwrap();
    Settings::new(program)
        .args(["worker_main", "--exact", "--nocapture"])
        .dialect(Dialect::Native)
        .mechanism(mechanism)
        .workers(2)
        .grace(Duration::from_millis(500))
        .output(Output::Null)
}

async fn until<T>(events: &mut Events, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
    let search = async {
        loop {
            let event = events.next().await.expect("the cluster goes on");
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    };
    tokio::time::timeout(SOON, search).await.expect("it happens")
}

async fn ready(events: &mut Events) -> SocketAddr {
    let bound = |event: &Event| match event {
        Event::Bound { address: Address::Tcp(address), .. } => Some(*address),
        _ => None,
    };
    let address = until(events, bound).await;
    until(events, |event| matches!(event, Event::AllReady { .. }).then_some(())).await;
    address
}

fn ask(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    // The worker may be ended under it.
    let _ = stream.read_to_string(&mut answer);
    answer.rsplit("\r\n").next().unwrap().to_owned()
}

async fn stopped(cluster: Cluster) {
    cluster.stop().await;
    tokio::time::timeout(SOON, cluster.wait()).await.expect("it ends");
}

fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test);
}

#[test]
fn a_runtime_that_is_blocked_is_told_of_and_its_worker_replaced() {
    block_on(async {
        for mechanism in [Mechanism::Auto, Mechanism::Handoff] {
            let settings = settings(mechanism).watchdog(Some(Duration::from_secs(2)));
            let cluster = Cluster::start(settings).unwrap();
            let mut events = cluster.events();
            let address = ready(&mut events).await;
            let lags = async {
                while cluster.status().await.iter().any(|w| w.event_loop_lag.is_none()) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(SOON, lags).await.expect("lags are told");
            let blocking = std::thread::spawn(move || ask(address, "/block"));
            let blocked = |event: &Event| match event {
                Event::Blocked { who, .. } => Some(who.worker),
                _ => None,
            };
            let old = until(&mut events, blocked).await;
            let ended = |event: &Event| match event {
                Event::Exit { who, reason, .. } if who.worker == old => Some(*reason),
                _ => None,
            };
            assert_eq!(until(&mut events, ended).await, Reason::Watchdog);
            blocking.join().unwrap();
            stopped(cluster).await;
        }
    });
}

#[test]
fn a_worker_that_fails_its_probe_is_replaced() {
    block_on(async {
        for mechanism in [Mechanism::Auto, Mechanism::Handoff] {
            let probe: Probe = "/health".parse().unwrap();
            let probe = probe.interval(Duration::from_millis(50)).timeout(SOON).failures(2);
            let cluster = Cluster::start(settings(mechanism).probe(Some(probe))).unwrap();
            let mut events = cluster.events();
            let address = ready(&mut events).await;
            let ill = tokio::task::spawn_blocking(move || ask(address, "/ill")).await.unwrap();
            let ended = |event: &Event| match event {
                Event::Exit { who, reason, .. } => Some((who.worker.to_string(), *reason)),
                _ => None,
            };
            assert_eq!(until(&mut events, ended).await, (ill, Reason::ProbeFailed));
            stopped(cluster).await;
        }
    });
}
