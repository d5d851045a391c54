//! One worker of the demo: an HTTP server that says who it is.
//!
//! `/` is the page, `/json` the same as data (with `?close` the connection ends with the answer, so that the next
//! request is a new connection), `/healthz` says ok. The protocol itself is in `http`.
//!
//! The surprising rule: connections are counted where they are accepted, not where requests are answered; a kept-alive
//! connection counts once.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polyfork::cluster::Worker;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::http::{self, Answer, HEAD_BYTES, Read, Request, Status};
use super::{Board, Counts, PAUSE, Row};
use crate::exit::Code;

const PAGE: &str = include_str!("page.html");
/// The page brings everything along and talks to its own server only.
const POLICY: &str = "content-security-policy: default-src 'none'; style-src 'unsafe-inline'; \
                      script-src 'unsafe-inline'; connect-src 'self'; img-src data:\r\n";
/// How long a client may take for a request, or between two, or to read an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a client that has just connected may take to ask when the worker stops.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// What all requests of this worker share.
struct Shared {
    me: Row,
    connections: AtomicU64,
    requests: AtomicU64,
    board: Mutex<Board>,
    changed: Notify,
}

/// What `/json` tells.
#[derive(Debug, Serialize)]
struct State {
    answered_by: Row,
    workers: Vec<Row>,
    /// Of all workers together.
    connections: u64,
    /// Between the worker with most connections and the one with fewest.
    spread: u64,
    way: String,
    why: String,
}

/// Serves until the primary says stop.
pub(super) fn work(listen: SocketAddr) -> Code {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| runtime.block_on(serve(listen)));
    match served {
        Ok(()) => Code::Stopped,
        Err(error) => {
            crate::say(std::io::stderr(), &format!("polyfork demo: {error}\n"));
            Code::Unexpected
        }
    }
}

async fn serve(listen: SocketAddr) -> io::Result<()> {
    let worker = Worker::from_env().map_err(io::Error::other)?;
    let mut listener = worker.listen(listen).await?;
    let shared = Arc::new(Shared::new(&worker));
    tokio::spawn(tell(worker.clone(), Arc::clone(&shared)));
    tokio::spawn(hear(worker.clone(), Arc::clone(&shared)));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (connection, _client) = accepted?;
                shared.accepted();
                connections.spawn(converse(connection, worker.clone(), Arc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
            () = worker.shutdown() => break,
        }
    }
    // What waits in it goes to the others.
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Answers one client until it leaves, or the worker stops and no request is under way.
async fn converse(mut connection: TcpStream, worker: Worker, shared: Arc<Shared>) {
    // Answers are small and complete; waiting for more would only delay them.
    let _as_before = connection.set_nodelay(true);
    let mut received = Vec::new();
    let mut asked = false;
    loop {
        let (answer, used, stays) = match http::read(&received) {
            Read::Part => {
                let idle = received.is_empty();
                let more = receive(&mut connection, &mut received);
                tokio::select! {
                    biased;
                    more = tokio::time::timeout(PATIENCE, more) => match more {
                        Ok(Ok(1..)) => continue,
                        _ => return,
                    },
                    () = end_of_patience(&worker, asked), if idle => return,
                }
            }
            Read::Whole(request, used) => {
                asked = true;
                let stays = request.keep_alive && !worker.is_stopping();
                let (answer, stays) = shared.respond(&request, stays);
                (answer, used, stays)
            }
            Read::Refused(status) => (Answer::refusal(status).bytes(false), 0, false),
        };
        let sent = tokio::time::timeout(PATIENCE, connection.write_all(&answer)).await;
        if !stays || !matches!(sent, Ok(Ok(()))) {
            return leave(connection).await;
        }
        received.drain(..used);
    }
}

/// Waits until nothing more is expected of a client that has asked nothing, or nothing else. One that has just connected is
/// about to ask: its first request may be on its way when the worker is told to stop.
async fn end_of_patience(worker: &Worker, asked: bool) {
    worker.shutdown().await;
    if !asked {
        tokio::time::sleep(FIRST_REQUEST).await;
    }
}

/// Reads what is there, up to the longest request.
async fn receive(connection: &mut TcpStream, received: &mut Vec<u8>) -> io::Result<usize> {
    let mut part = [0; 2048];
    let room = part.len().min(HEAD_BYTES.saturating_sub(received.len()).max(1));
    let length = connection.read(&mut part[..room]).await?;
    received.extend_from_slice(&part[..length]);
    Ok(length)
}

/// Closes so that the client gets the answer: closing with bytes unread would reset the connection.
async fn leave(mut connection: TcpStream) {
    let mut rest = [0; 1024];
    let ended = async {
        connection.shutdown().await?;
        while connection.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // A client that does not close its side is left after a second.
    let _ended = tokio::time::timeout(Duration::from_secs(1), ended).await;
}

/// Tells the primary what was counted.
async fn tell(worker: Worker, shared: Arc<Shared>) {
    loop {
        shared.changed.notified().await;
        if worker.send(&shared.counts()).await.is_err() {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Keeps what the primary tells.
async fn hear(worker: Worker, shared: Arc<Shared>) {
    while let Some(message) = worker.recv().await {
        if let Ok(board) = message.decode() {
            *shared.board.lock().unwrap_or_else(PoisonError::into_inner) = board;
        }
    }
}

impl Shared {
    fn new(worker: &Worker) -> Shared {
        let me = Row {
            slot: worker.slot().unwrap_or(1),
            worker: worker.id().unwrap_or(1),
            pid: std::process::id(),
            connections: 0,
            requests: 0,
        };
        Shared {
            me,
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            board: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn accepted(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
    }

    /// The answer, and whether the connection stays open after it.
    fn respond(&self, request: &Request<'_>, keep_alive: bool) -> (Vec<u8>, bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
        let (path, query) = request.target.split_once('?').unwrap_or((request.target, ""));
        let close = query.split('&').any(|word| word == "close");
        let keep_alive = keep_alive && !close;
        let plain = |status, content_type, body| {
            Answer { status, content_type, fields: "", body, keep_alive }.bytes(request.head)
        };
        let bytes = match path {
            "/" => {
                let content_type = "text/html; charset=utf-8";
                let (status, fields, body) = (Status::Ok, POLICY, PAGE);
                Answer { status, content_type, fields, body, keep_alive }.bytes(request.head)
            }
            "/json" => {
                // Rows of numbers and text cannot fail.
                let body = serde_json::to_string(&self.state()).unwrap_or_default() + "\n";
                plain(Status::Ok, "application/json", &body)
            }
            "/healthz" => plain(Status::Ok, "text/plain", "ok\n"),
            _ => plain(Status::NotFound, "text/plain", "no such page\n"),
        };
        (bytes, keep_alive)
    }

    fn counts(&self) -> Counts {
        Counts {
            connections: self.connections.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
        }
    }

    fn state(&self) -> State {
        let Board { rows, way, why } =
            self.board.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Counts { connections, requests } = self.counts();
        let answered_by = Row { connections, requests, ..self.me.clone() };
        // What is known first hand goes before what was told.
        let mut workers: Vec<Row> =
            rows.into_iter().filter(|row| row.worker != answered_by.worker).collect();
        workers.push(answered_by.clone());
        workers.sort_by_key(|row| (row.slot, row.worker));
        let counts = || workers.iter().map(|row| row.connections);
        let spread = counts().max().unwrap_or(0) - counts().min().unwrap_or(0);
        let connections = counts().sum();
        State { answered_by, workers, connections, spread, way, why }
    }
}
