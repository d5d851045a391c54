//! A child written in Rust for a Node program: `cargo build --example rust_worker_for_node`, then
//! `node crates/polyfork/examples/rust_worker_for_node.mjs`.
//!
//! Counts primes up to the numbers it gets, and serves the HTTP connections of a server it is given.

use polyfork::channel::Handle;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Work {
    CountPrimes(u32),
    Serve,
}

#[derive(Serialize)]
struct Primes {
    primes: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut parent = polyfork::process::channel()?;
    while let Some(mut message) = parent.recv().await? {
        match message.to()? {
            Work::CountPrimes(limit) => {
                let primes = tokio::task::spawn_blocking(move || count_primes(limit)).await?;
                parent.send(&Primes { primes }).await?;
            }
            Work::Serve => {
                if let Some(Handle::TcpListener(listener)) = message.take_handle() {
                    tokio::spawn(serve(tokio::net::TcpListener::from_std(listener)?));
                    parent.send(&"serving").await?;
                }
            }
        }
    }
    Ok(())
}

fn count_primes(limit: u32) -> usize {
    let is_prime = |n: &u32| (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (2..=limit).filter(is_prime).count()
}

async fn serve(listener: tokio::net::TcpListener) -> std::io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut request = [0; 4096];
            let _length = stream.read(&mut request).await?;
            let body = "served by Rust\n";
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", body.len());
            stream.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes()).await
        });
    }
}
