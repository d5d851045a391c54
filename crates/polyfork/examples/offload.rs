//! An axum server that computes beside serving: tiles of the Mandelbrot set as PNG, and primes.
//!
//! ```text
//! cargo run --release --example offload --features axum
//! curl -o tile.png http://127.0.0.1:3000/tile/2/1/1
//! curl http://127.0.0.1:3000/primes/50000000
//! ```
//!
//! `PLACE` is `thread` (default) or `process`: the one word that decides where the jobs run. `PORT` is the TCP port on loopback
//! (default 3000; 0 takes a free one).
//!
//! `/` answers at once, whatever is being computed; `/tile/{zoom}/{x}/{y}` is one of 4^zoom tiles; `/primes/{below}` counts
//! primes; `/stats` tells what the pool has done. A client that hangs up has its job aborted: the handler is dropped, and
//! the task with it. When too much waits the answer is 503, and 504 when a job is not done in ten seconds.

#![expect(clippy::print_stderr, reason = "a program, not a library")]

use std::error::Error;
use std::net::Ipv4Addr;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use polyfork::child_process::run_entries;
use polyfork::worker_threads::pool::{Context, Full};
use polyfork::worker_threads::{Job, JobPool, Place, Pool, TaskError};
use serde::{Deserialize, Serialize};

/// Pixels of a tile's side.
const SIDE: u32 = 256;
const MAX_STEPS: u32 = 1000;
/// Largest sieve: one byte each.
const MAX_SIEVE: usize = 200_000_000;
const LIMIT: Duration = Duration::from_secs(10);

/// What is computed.
#[derive(Serialize, Deserialize)]
enum Order {
    Tile { zoom: u32, x: u32, y: u32 },
    Primes { below: usize },
}

/// The body of an answer; `None` if the job was asked to stop.
type Body = Option<Vec<u8>>;

const COMPUTE: Job<Order, Body> = Job::new("compute", |order, context| match order {
    Order::Tile { zoom, x, y } => tile(zoom, x, y, context),
    Order::Primes { below } => {
        let found = primes(below, context)?;
        Some(format!("{found} primes below {below}\n").into_bytes())
    }
});

fn main() -> Result<(), Box<dyn Error>> {
    run_entries(&[&COMPUTE]); // does not return in a child
    let place = match std::env::var("PLACE").as_deref() {
        Ok("process") => Place::Process,
        Ok("thread") | Err(_) => Place::Thread,
        Ok(other) => return Err(format!("PLACE is {other:?}: thread or process").into()),
    };
    let port = std::env::var("PORT").map_or(Ok(3000), |port| port.parse::<u16>())?;
    let pool = Pool::builder().max_queue(64).when_full(Full::Refuse).of(&COMPUTE, place)?;
    // One thread is enough for serving; all others are for computing.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(pool, port))
}

async fn serve(pool: JobPool<Order, Body>, port: u16) -> Result<(), Box<dyn Error>> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
    eprintln!("listening on http://{}", listener.local_addr()?);
    let app = Router::new()
        .route("/", get(|| async { "still here\n" }))
        .route("/tile/{zoom}/{x}/{y}", get(get_tile))
        .route("/primes/{below}", get(get_primes))
        .route("/stats", get(get_stats))
        .with_state(pool);
    axum::serve(listener, app).await?;
    Ok(())
}

type Jobs = State<JobPool<Order, Body>>;

async fn get_tile(State(pool): Jobs, Path((zoom, x, y)): Path<(u32, u32, u32)>) -> Response {
    if zoom > 30 || x >= 1 << zoom || y >= 1 << zoom {
        return StatusCode::NOT_FOUND.into_response();
    }
    answer(&pool, Order::Tile { zoom, x, y }, "image/png").await
}

async fn get_primes(State(pool): Jobs, Path(below): Path<usize>) -> Response {
    if below > MAX_SIEVE {
        return (StatusCode::BAD_REQUEST, format!("at most {MAX_SIEVE}\n")).into_response();
    }
    answer(&pool, Order::Primes { below }, "text/plain").await
}

async fn get_stats(State(pool): Jobs) -> String {
    let stats = pool.stats();
    format!(
        "{} done, {} failed, {} refused, {} timed out; waited {:?} (p99), ran {:?} (p99); {:.0} % busy\n",
        stats.completed,
        stats.failed,
        stats.refused,
        stats.timed_out,
        stats.wait_time.quantile(0.99),
        stats.run_time.quantile(0.99),
        stats.utilisation * 100.0
    )
}

async fn answer(pool: &JobPool<Order, Body>, order: Order, kind: &'static str) -> Response {
    match pool.task().timeout(LIMIT).run(order).await {
        Ok(Some(body)) => ([(header::CONTENT_TYPE, kind)], body).into_response(),
        Ok(None) | Err(TaskError::TimedOut { .. }) => StatusCode::GATEWAY_TIMEOUT.into_response(),
        Err(TaskError::Full) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// One tile of the set, which lies within 2 of (-0.5, 0).
fn tile(zoom: u32, x: u32, y: u32, context: &Context<'_>) -> Body {
    let width = 4.0 / f64::from(1_u32 << zoom);
    let (left, top) = (-2.5 + width * f64::from(x), -2.0 + width * f64::from(y));
    let place = |pixel: u32| width * f64::from(pixel) / f64::from(SIDE);
    let mut pixels = Vec::with_capacity((SIDE * SIDE) as usize);
    for row in 0..SIDE {
        context.check().ok()?;
        pixels.extend((0..SIDE).map(|column| shade(left + place(column), top + place(row))));
    }
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, SIDE, SIDE);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().expect("a vector takes everything");
    writer.write_image_data(&pixels).expect("a vector takes everything");
    writer.finish().expect("a vector takes everything");
    Some(png)
}

/// How soon a point leaves the circle of radius 2: black if it never does.
fn shade(re: f64, im: f64) -> u8 {
    let (mut x, mut y) = (0.0, 0.0);
    for step in 0..MAX_STEPS {
        if x * x + y * y > 4.0 {
            return 55 + (step * 8 % 200) as u8;
        }
        (x, y) = (x * x - y * y + re, 2.0 * x * y + im);
    }
    0
}

/// Primes below a number, by Eratosthenes.
fn primes(below: usize, context: &Context<'_>) -> Option<usize> {
    let mut composite = vec![false; below];
    let mut found = 0;
    for n in 2..below {
        if composite[n] {
            continue;
        }
        found += 1;
        if n * n < below {
            context.check().ok()?;
            composite[n * n..].iter_mut().step_by(n).for_each(|flag| *flag = true);
        }
    }
    Some(found)
}
