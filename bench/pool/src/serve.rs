//! An axum server that answers light requests while processor-bound ones come in: how long do the light ones take?
//!
//! The heavy requests (a prime sieve of some tens of milliseconds) come from so many clients, each with one request at a time, that
//! the runtime's threads are all busy when they compute themselves. Light clients pause between requests. The clients are threads
//! with blocking sockets in this process.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::routing::get;
use polyfork::worker_threads::Pool;

use crate::work::{cores, primes, quantile_us};

/// Primes below this: some tens of milliseconds.
const SIEVE: usize = 3_000_000;
const LIGHT_CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(2);

pub(crate) fn measure(how: &str, limit: Duration) -> Result<String> {
    let pool = match how {
        "inline" => None,
        "pool" => Some(Pool::new()?),
        other => bail!("no \"{other}\": inline or pool"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores())
        .enable_all()
        .build()
        .context("start tokio")?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    runtime.spawn(async move { axum::serve(listener, router(pool)).await });
    let line = load(address, limit)?;
    runtime.shutdown_background();
    Ok(line)
}

fn router(pool: Option<Pool>) -> Router {
    let heavy = move || {
        let pool = pool.clone();
        async move {
            let found = match pool {
                Some(pool) => pool.run(|| primes(SIEVE)).await.expect("no task of ours fails"),
                None => primes(SIEVE),
            };
            found.to_string()
        }
    };
    Router::new().route("/", get(|| async { "light" })).route("/heavy", get(heavy))
}

fn load(address: SocketAddr, limit: Duration) -> Result<String> {
    let over = Arc::new(AtomicBool::new(false));
    let heavy = Arc::new(AtomicU64::new(0));
    let heavy_clients: Vec<_> = (0..cores() * 2)
        .map(|_| {
            let (over, heavy) = (over.clone(), heavy.clone());
            thread::spawn(move || -> Result<()> {
                let mut client = Client::connect(address)?;
                while !over.load(Ordering::Relaxed) {
                    client.get("/heavy")?;
                    heavy.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        })
        .collect();
    let begin = Instant::now();
    let light_clients: Vec<_> = (0..LIGHT_CLIENTS)
        .map(|_| {
            thread::spawn(move || -> Result<Vec<Duration>> {
                let mut client = Client::connect(address)?;
                let mut times = Vec::new();
                while begin.elapsed() < limit {
                    let sent = Instant::now();
                    client.get("/")?;
                    times.push(sent.elapsed());
                    thread::sleep(PAUSE);
                }
                Ok(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for client in light_clients {
        times.extend(client.join().expect("a client does not panic")?);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let heavy = heavy.load(Ordering::Relaxed);
    over.store(true, Ordering::Relaxed);
    for client in heavy_clients {
        client.join().expect("a client does not panic")?;
    }
    let light = times.len();
    let p50 = quantile_us(&mut times, 0.5);
    let p99 = quantile_us(&mut times, 0.99);
    Ok(format!(
        "{{\"light\":{light},\"heavy\":{heavy},\"seconds\":{seconds},\"p50_us\":{p50},\"p99_us\":{p99}}}"
    ))
}

/// One kept-alive connection.
struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096] })
    }

    /// Asks, and reads until the answer is complete; all answers have a short body and its length.
    fn get(&mut self, path: &str) -> Result<()> {
        write!(self.stream, "GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n")?;
        let mut filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[filled..])?;
            if read == 0 {
                bail!("the server hung up");
            }
            filled += read;
            if complete(&self.buffer[..filled]) {
                return Ok(());
            }
        }
    }
}

fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    length.and_then(|length| length.trim().parse().ok()) == Some(body.len())
}
