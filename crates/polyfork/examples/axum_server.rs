//! An axum server that is a cluster of itself: one process per core behind one port.
//!
//! ```text
//! cargo run --release --example axum_server --features axum
//! curl http://127.0.0.1:3000/worker
//! ```
//!
//! `PORT` (default 3000) is the TCP port on loopback, `WORKERS` the number of workers (default: one per
//! usable core). With `POLYFORK_STANDALONE=1` it is an ordinary server in one process.
//!
//! `/` answers a fixed text, `/worker` tells who answered, `/count` how many connections this worker has
//! accepted, and `/hold?ms=N` keeps it busy. The benchmark (`cargo xtask bench http`) asks for the same things
//! of its other servers; for it, `STALL=1` lets worker 1 block its event loop for 50 ms every 500 ms.

#![expect(clippy::print_stderr, reason = "a program, not a library")]

use std::error::Error;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{Uri, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::ListenerExt;
use polyfork::cluster::{self, Settings, Worker};

const BODY: &str = "hello from one of many\n";

fn main() -> ExitCode {
    match settings() {
        Ok(settings) => cluster::run_with(settings, serve),
        Err(error) => {
            eprintln!("axum_server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn settings() -> Result<Settings, Box<dyn Error>> {
    let settings = Settings::this_program()?;
    Ok(match std::env::var("WORKERS") {
        Ok(workers) => settings.workers(workers.parse().map_err(|e| format!("WORKERS: {e}"))?),
        Err(_) => settings,
    })
}

async fn serve(worker: Worker) -> cluster::MainResult {
    let port: u16 = match std::env::var("PORT") {
        Ok(port) => port.parse().map_err(|e| format!("PORT: {e}"))?,
        Err(_) => 3000,
    };
    let connections = Arc::new(AtomicU64::new(0));
    let accepted = Arc::clone(&connections);
    let listener = worker.listen((Ipv4Addr::LOCALHOST, port)).await?.tap_io(move |tcp| {
        accepted.fetch_add(1, Ordering::Relaxed);
        // A client that is gone already shows itself when it is read from.
        let _ = tcp.set_nodelay(true);
    });
    if worker.id() == Some(1) && std::env::var_os("STALL").is_some() {
        tokio::spawn(stall());
    }
    // Like `axum::serve`, and no client loses a request when this worker leaves.
    cluster::serve(listener, router(worker.clone(), connections), &worker).await;
    Ok(())
}

fn router(worker: Worker, connections: Arc<AtomicU64>) -> Router {
    let id = worker.id().unwrap_or(0);
    let pid = std::process::id();
    let who = move |ConnectInfo(client): ConnectInfo<std::net::SocketAddr>| async move {
        format!("worker {id} in slot {} answers {client}\n", worker.slot().unwrap_or(0))
    };
    let count = move || async move {
        let connections = connections.load(Ordering::Relaxed);
        let body = format!("{{\"pid\":{pid},\"worker\":{id},\"connections\":{connections}}}");
        ([(header::CONTENT_TYPE, "application/json")], body).into_response()
    };
    Router::new()
        .route("/", get(|| async { BODY }))
        .route("/worker", get(who))
        .route("/count", get(count))
        .route("/hold", get(hold))
}

async fn hold(uri: Uri) -> &'static str {
    let ms = uri.query().and_then(|query| query.strip_prefix("ms=")?.parse().ok());
    busy(Duration::from_millis(ms.unwrap_or(0)));
    BODY
}

async fn stall() {
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        every.tick().await;
        busy(Duration::from_millis(50));
    }
}

/// Blocks the event loop, as a badly written handler would.
fn busy(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}
