//! One worker of the demo: an axum server that says who it is.
//!
//! `/` is the page, `/json` the same as data (with `?close` the connection ends with the answer, so that the next
//! request is a new connection), `/healthz` says ok.
//!
//! The surprising rule: connections are counted where they are accepted, not where requests are answered; a kept-alive
//! connection counts once.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName,
};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::ListenerExt;
use polyfork::cluster::Worker;
use serde::Serialize;
use tokio::sync::Notify;

use super::{Board, Counts, PAUSE, Row};
use crate::exit::Code;

const PAGE: &str = include_str!("page.html");
/// The page brings everything along and talks to its own server only.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:";

/// What all requests of this worker share.
struct Shared {
    me: Row,
    connections: AtomicU64,
    requests: AtomicU64,
    board: Mutex<Board>,
    changed: Notify,
}

/// The answer of `/json`.
#[derive(Debug, Serialize)]
struct Answer {
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

async fn serve(listen: SocketAddr) -> std::io::Result<()> {
    let worker = Worker::from_env().map_err(std::io::Error::other)?;
    let listener = worker.listen(listen).await?;
    let shared = Arc::new(Shared::new(&worker));
    let counted = Arc::clone(&shared);
    let listener = listener.tap_io(move |connection| {
        // Answers are small and complete; waiting for more would only delay them.
        let _as_before = connection.set_nodelay(true);
        counted.connections.fetch_add(1, Ordering::Relaxed);
        counted.changed.notify_one();
    });
    tokio::spawn(tell(worker.clone(), Arc::clone(&shared)));
    tokio::spawn(hear(worker.clone(), Arc::clone(&shared)));
    axum::serve(listener, router(shared)).with_graceful_shutdown(worker.shutdown()).await
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/json", get(json))
        .route("/healthz", get(|| async { "ok\n" }))
        .with_state(shared)
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

async fn page(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    shared.answered();
    let headers: [(HeaderName, &str); 3] = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, PAGE)
}

async fn json(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> impl IntoResponse {
    shared.answered();
    let close = query.is_some_and(|query| query.split('&').any(|word| word == "close"));
    let connection = if close { "close" } else { "keep-alive" };
    let headers: [(HeaderName, &str); 3] =
        [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store"), (CONNECTION, connection)];
    // Rows of numbers and text cannot fail.
    (headers, serde_json::to_string(&shared.answer()).unwrap_or_default() + "\n")
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

    fn answered(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
    }

    fn counts(&self) -> Counts {
        Counts {
            connections: self.connections.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
        }
    }

    fn answer(&self) -> Answer {
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
        Answer { answered_by, workers, connections, spread, way, why }
    }
}
