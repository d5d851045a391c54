//! Whole clusters of a Rust program: real processes, a real primary, both mechanisms.
//!
//! The program is this test binary itself: [`worker_main`] is a test that does nothing when it is run as one,
//! and is a server when a primary started the process. What the two halves say to each other in detail is
//! tested in `worker`.
//!
//! Every test counts what it did and waits for events; the one time limit is [`SOON`].

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use polyfork::cluster::{
    Address, Cluster, Dialect, Event, Events, MainResult, Measured, Mechanism, Outcome, Output,
    Settings, Worker, WorkerError, is_worker,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

/// For what should happen at once. Generous: the machine may be busy.
const SOON: Duration = Duration::from_secs(60);

/// Limit of open files of a worker that is to run out of them.
const FEW_FILES: u64 = 32;

/// What the primary sends.
#[derive(Debug, Serialize, Deserialize)]
enum ToWorker {
    Double(u64),
    TakeChannelAgain,
    /// Start a child and tell what it sees.
    AskChild,
    Leave,
}

/// What a worker sends.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum ToPrimary {
    ChildSees { worker: bool, sockets: usize },
    Doubled { worker: u64, value: u64 },
    Error(String),
}

// The worker's side.

/// Not a test of its own: see the header.
#[test]
fn worker_main() {
    if is_worker() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve()).unwrap();
        std::process::exit(0);
    }
}

/// Answers lines: `who` with the worker's id, `slow` with the same once the worker was asked to stop.
async fn serve() -> MainResult {
    let worker = Worker::from_env()?;
    let mut listener = worker.listen("127.0.0.1:0").await?;
    if std::env::var_os("MEASURES").is_some() {
        let id = worker.id().unwrap_or(0);
        worker.on_metrics(move || format!("jobs_total{{worker=\"{id}\"}} 1\n"));
    }
    if std::env::var_os("FIRST_HAS_FEW_FILES").is_some() && worker.id() == Some(1) {
        let limit = Rlimit { current: Some(FEW_FILES), maximum: Some(FEW_FILES) };
        setrlimit(Resource::Nofile, limit)?;
    }
    tokio::spawn(answer_messages(worker.clone()));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                connections.spawn(answer_lines(worker.clone(), accepted?.0));
            }
            () = worker.shutdown() => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    if std::env::var_os("FORGETS_TO_LEAVE").is_some() {
        std::future::pending::<()>().await;
    }
    worker.flush().await;
    Ok(())
}

async fn answer_lines(worker: Worker, stream: tokio::net::TcpStream) {
    let mut stream = tokio::io::BufReader::new(stream);
    let mut line = String::new();
    // A client that is gone wants no answer.
    while stream.read_line(&mut line).await.is_ok_and(|length| length > 0) {
        if line.trim() == "slow" {
            // Says that it has begun.
            let _ = stream.write_all(b"wait\n").await;
            worker.shutdown().await;
        }
        let answer = format!("{}\n", worker.id().unwrap_or(0));
        let _ = stream.write_all(answer.as_bytes()).await;
        line.clear();
    }
}

async fn answer_messages(worker: Worker) {
    while let Some(message) = worker.recv().await {
        let answer = match message.decode() {
            Ok(ToWorker::Double(value)) => {
                ToPrimary::Doubled { worker: worker.id().unwrap_or(0), value: value * 2 }
            }
            Ok(ToWorker::TakeChannelAgain) => match Worker::from_env() {
                Err(WorkerError::Channel { source, .. }) => ToPrimary::Error(source.to_string()),
                other => ToPrimary::Error(format!("{other:?}")),
            },
            Ok(ToWorker::AskChild) => ask_child(),
            Ok(ToWorker::Leave) => return worker.disconnect().await,
            Err(error) => ToPrimary::Error(error.to_string()),
        };
        // The primary is gone: so are we.
        let _ = worker.send(&answer).await;
    }
}

/// What a child that inherits all it can from this worker sees.
fn ask_child() -> ToPrimary {
    let output = plain_child("child_main", "POLYFORK_TEST_CHILD").output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let seen = output.lines().find_map(|line| line.strip_prefix("sees ")).unwrap_or_default();
    let (worker, sockets) = seen.split_once(' ').unwrap_or_default();
    ToPrimary::ChildSees { worker: worker != "false", sockets: sockets.parse().unwrap_or(999) }
}

/// Not a test of its own: what a child of a worker says.
#[test]
fn child_main() {
    if std::env::var_os("POLYFORK_TEST_CHILD").is_some() {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let targets = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:"));
        println!("\nsees {} {}", is_worker(), sockets.count());
    }
}

/// This program once more, with `main` as its only test, started as anybody would.
#[expect(clippy::disallowed_methods, reason = "not a child of a cluster")]
fn plain_child(main: &str, variable: &str) -> std::process::Command {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", main, "--nocapture", "--test-threads=1"]).env(variable, "1");
    child
}

// The primary's side.

fn settings(workers: u32) -> Settings {
    Settings::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker_main", "--nocapture", "--test-threads=1"])
        .dialect(Dialect::Native)
        .workers(workers)
        .output(Output::Null)
}

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(SOON, event).await.expect("did not happen")
}

/// A cluster that serves, and where.
struct Serving {
    cluster: Cluster,
    events: Events,
    at: SocketAddr,
}

impl Serving {
    async fn start(settings: Settings) -> Serving {
        let workers = settings.worker_count();
        let cluster = Cluster::start(settings).unwrap();
        let mut events = cluster.events();
        let mut at = Vec::new();
        soon(async {
            loop {
                match events.next().await.expect("the cluster goes on") {
                    Event::Listening { address: Address::Tcp(address), .. } => at.push(address),
                    Event::AllReady { workers: ready } if ready == workers => return,
                    Event::Exit { who, reason, .. } => panic!("worker {} {reason}", who.worker),
                    _ => {}
                }
            }
        })
        .await;
        assert_eq!(at.len(), workers as usize);
        assert!(at.iter().all(|address| *address == at[0]), "one port for all: {at:?}");
        Serving { cluster, events, at: at[0] }
    }

    /// Waits for an event that `find` knows.
    async fn event<T>(&mut self, mut find: impl FnMut(Event) -> Option<T>) -> T {
        soon(async {
            loop {
                if let Some(found) = find(self.events.next().await.expect("the cluster goes on")) {
                    return found;
                }
            }
        })
        .await
    }

    async fn message(&mut self) -> ToPrimary {
        let find = |event| match event {
            Event::Message { message, .. } => Some(message.decode().unwrap()),
            _ => None,
        };
        self.event(find).await
    }

    async fn stop(self) {
        self.cluster.stop().await;
        assert!(matches!(soon(self.cluster.wait()).await, Outcome::Stopped));
    }
}

/// A client in a thread of its own, so that it never waits for our event loop.
async fn client<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon(tokio::task::spawn_blocking(work)).await.unwrap()
}

fn connect(at: SocketAddr) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    BufReader::new(stream)
}

fn ask(connection: &mut BufReader<TcpStream>, what: &str) -> String {
    connection.get_mut().write_all(format!("{what}\n").as_bytes()).unwrap();
    answer(connection)
}

fn answer(connection: &mut BufReader<TcpStream>) -> String {
    let mut answer = String::new();
    connection.read_line(&mut answer).unwrap();
    answer.trim().to_owned()
}

/// How many of `count` connections each worker answered.
async fn count(at: SocketAddr, count: usize) -> BTreeMap<String, usize> {
    client(move || {
        let mut answered = BTreeMap::new();
        for _ in 0..count {
            *answered.entry(ask(&mut connect(at), "who")).or_default() += 1;
        }
        answered
    })
    .await
}

#[tokio::test]
async fn workers_take_exact_turns_when_connections_are_handed_over() {
    let serving = Serving::start(settings(3).mechanism(Mechanism::Handoff)).await;
    let answered = count(serving.at, 100).await;
    println!("100 connections handed over to 3 workers: {answered:?}");
    let (most, least) = (answered.values().max().unwrap(), answered.values().min().unwrap());
    assert_eq!((answered.len(), answered.values().sum::<usize>()), (3, 100));
    assert!(most - least <= 1);
    serving.stop().await;
}

#[tokio::test]
async fn every_worker_serves_from_a_socket_of_its_own() {
    let serving = Serving::start(settings(3).mechanism(Mechanism::Kernel)).await;
    let answered = count(serving.at, 100).await;
    println!("100 connections by the kernel to 3 workers: {answered:?}");
    assert_eq!((answered.len(), answered.values().sum::<usize>()), (3, 100));
    serving.stop().await;
}

#[tokio::test]
async fn messages_travel_between_a_primary_and_its_workers() {
    let mut serving = Serving::start(settings(2)).await;
    let ids: Vec<u64> = serving.cluster.status().await.iter().map(|w| w.worker).collect();
    serving.cluster.worker(ids[1]).send(&ToWorker::Double(21)).await.unwrap();
    let doubled = ToPrimary::Doubled { worker: ids[1], value: 42 };
    assert_eq!(serving.message().await, doubled);
    serving.cluster.broadcast(&ToWorker::Double(1)).await.unwrap();
    let mut from = Vec::new();
    for _ in &ids {
        match serving.message().await {
            ToPrimary::Doubled { worker, value: 2 } => from.push(worker),
            other => panic!("{other:?}"),
        }
    }
    from.sort_unstable();
    assert_eq!(from, ids);
    serving.stop().await;
}

#[tokio::test]
async fn workers_that_measure_are_asked_and_answer() {
    let serving = Serving::start(settings(2).env("MEASURES", "1")).await;
    let told = soon(serving.cluster.measures(SOON)).await;
    let texts: Vec<String> = told
        .into_iter()
        .map(|measures| match measures.measured {
            Measured::Text(text) => text,
            other => panic!("worker {}: {other:?}", measures.who.worker),
        })
        .collect();
    assert_eq!(texts, ["jobs_total{worker=\"1\"} 1\n", "jobs_total{worker=\"2\"} 1\n"]);
    let figures = serving.cluster.figures().await;
    assert_eq!(figures.slots.keys().collect::<Vec<_>>(), [&1, &2]);
    serving.stop().await;
    // One that does not is not asked: it might not know the question.
    let quiet = Serving::start(settings(1)).await;
    assert!(soon(quiet.cluster.measures(SOON)).await.is_empty());
    quiet.stop().await;
}

#[tokio::test]
async fn a_process_can_take_its_channel_only_once() {
    let mut serving = Serving::start(settings(1)).await;
    serving.cluster.worker(1).send(&ToWorker::TakeChannelAgain).await.unwrap();
    let text = "the channel of this process has been taken already".to_owned();
    assert_eq!(serving.message().await, ToPrimary::Error(text));
    serving.stop().await;
}

#[tokio::test]
async fn a_child_of_a_worker_is_no_worker_and_inherits_no_socket() {
    for mechanism in [Mechanism::Handoff, Mechanism::Kernel] {
        let mut serving = Serving::start(settings(1).mechanism(mechanism)).await;
        let at = serving.at;
        // The worker holds a connection while it starts the child.
        let held = client(move || {
            let mut held = connect(at);
            assert_eq!(ask(&mut held, "who"), "1");
            held
        });
        let held = held.await;
        serving.cluster.worker(1).send(&ToWorker::AskChild).await.unwrap();
        let sees = ToPrimary::ChildSees { worker: false, sockets: 0 };
        assert_eq!(serving.message().await, sees);
        drop(held);
        serving.stop().await;
    }
}

#[tokio::test]
async fn a_stopping_cluster_finishes_what_it_serves() {
    for mechanism in [Mechanism::Handoff, Mechanism::Kernel] {
        let serving = Serving::start(settings(2).mechanism(mechanism)).await;
        let at = serving.at;
        let mut connections = client(move || {
            let mut connections: Vec<_> = (0..4).map(|_| connect(at)).collect();
            for connection in &mut connections {
                assert_eq!(ask(connection, "slow"), "wait");
            }
            connections
        })
        .await;
        serving.cluster.stop().await;
        let answered =
            client(move || connections.iter_mut().map(answer).filter(|a| !a.is_empty()).count());
        assert_eq!(answered.await, 4);
        assert!(matches!(soon(serving.cluster.wait()).await, Outcome::Stopped));
    }
}

#[tokio::test]
async fn a_worker_without_files_left_gives_connections_to_others() {
    const CLIENTS: usize = 3 * FEW_FILES as usize;
    for mechanism in [Mechanism::Handoff, Mechanism::Kernel] {
        let settings = settings(2).mechanism(mechanism).env("FIRST_HAS_FEW_FILES", "1");
        let serving = Serving::start(settings).await;
        let at = serving.at;
        let answered = client(move || {
            let held: Vec<_> = (0..CLIENTS).map(|_| connect(at)).collect();
            // Those that wait for a file of worker 1 are answered when others are closed.
            let mut answered = BTreeMap::<String, usize>::new();
            for mut connection in held {
                *answered.entry(ask(&mut connection, "who")).or_default() += 1;
            }
            answered
        })
        .await;
        println!("{CLIENTS} connections at once, worker 1 with few files: {answered:?}");
        assert_eq!((answered.len(), answered.values().sum::<usize>()), (2, CLIENTS));
        assert!(!answered.contains_key(""), "no connection is lost");
        serving.stop().await;
    }
}

/// Waits for the exit of `worker`; whether it was voluntary, and its code.
async fn exit_of(serving: &mut Serving, worker: u64) -> (bool, Option<i32>) {
    let find = |event| match event {
        Event::Exit { who, voluntary, code, .. } if who.worker == worker => Some((voluntary, code)),
        _ => None,
    };
    serving.event(find).await
}

#[tokio::test]
async fn a_worker_that_leaves_is_replaced_and_nothing_is_lost() {
    let mut serving = Serving::start(settings(2)).await;
    let at = serving.at;
    let load = tokio::task::spawn_blocking(move || {
        (0..500).filter(|_| !ask(&mut connect(at), "who").is_empty()).count()
    });
    serving.cluster.worker(1).send(&ToWorker::Leave).await.unwrap();
    // Its successor does not wait for its end, and may be ready before that.
    let (mut exit, mut is_ready) = (None, false);
    let both = |event| {
        match event {
            Event::Exit { who, voluntary, code, .. } if who.worker == 1 => {
                exit = Some((voluntary, code));
            }
            Event::Ready(who) => is_ready |= who.worker == 3,
            _ => {}
        }
        exit.filter(|_| is_ready)
    };
    assert_eq!(serving.event(both).await, (true, Some(0)));
    assert_eq!(soon(load).await.unwrap(), 500);
    serving.stop().await;
}

#[tokio::test]
async fn a_worker_that_gets_sigterm_leaves_in_order() {
    let mut serving = Serving::start(settings(2)).await;
    let at = serving.at;
    let load = tokio::task::spawn_blocking(move || {
        (0..500).filter(|_| !ask(&mut connect(at), "who").is_empty()).count()
    });
    serving.cluster.worker(2).kill(libc::SIGTERM).await;
    assert_eq!(exit_of(&mut serving, 2).await, (true, Some(0)));
    assert_eq!(soon(load).await.unwrap(), 500);
    serving.stop().await;
}

// The end of a primary.

/// Not a test of its own: a primary that a test kills. Tells its port on standard output.
#[test]
fn primary_main() {
    if std::env::var_os("POLYFORK_TEST_PRIMARY").is_none() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let settings = settings(2).env("FORGETS_TO_LEAVE", "1").grace(Duration::from_millis(500));
        let serving = Serving::start(settings).await;
        println!("\nlistens on {}", serving.at);
        std::future::pending::<()>().await;
    });
}

#[test]
fn workers_finish_and_leave_when_their_primary_is_killed() {
    let mut primary = plain_child("primary_main", "POLYFORK_TEST_PRIMARY")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(primary.stdout.take().unwrap()).lines();
    let at =
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix("listens on ")?.parse().ok());
    let at: SocketAddr = at.expect("the primary serves");
    let mut served: Vec<_> = (0..4).map(|_| connect(at)).collect();
    for connection in &mut served {
        assert_eq!(ask(connection, "slow"), "wait");
    }
    // Connections that nobody uses show the end of their worker.
    primary.kill().unwrap();
    primary.wait().unwrap();
    let finished = served.iter_mut().map(answer).filter(|a| !a.is_empty()).count();
    assert_eq!(finished, 4);
    for mut connection in served {
        // The worker forgets to leave, so only its own clock closes this: end or reset.
        let _ = connection.read(&mut [0; 1]);
    }
    let mut refused = None;
    while refused.is_none() {
        refused = TcpStream::connect(at).err();
    }
    assert_eq!(refused.map(|e| e.kind()), Some(std::io::ErrorKind::ConnectionRefused));
}
