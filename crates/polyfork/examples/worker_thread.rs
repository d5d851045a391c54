//! A server that answers while a worker thread computes.
//!
//! `cargo run --example worker_thread` listens, asks itself for the number of primes below ten million, and shows that
//! small requests are answered meanwhile. The sieve looks now and then whether it shall stop.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::{Duration, Instant};

use polyfork::worker_threads::{Worker, WorkerContext, WorkerEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LIMIT: usize = 10_000_000;

/// Counts primes below each number it receives.
fn sieve(mut parent: WorkerContext<usize, (usize, usize)>) -> Result<(), &'static str> {
    while let Some(limit) = parent.receive_blocking() {
        let mut composite = vec![false; limit];
        let mut primes = 0;
        for number in 2..limit {
            if number % 4096 == 0 && parent.is_terminating() {
                return Err("asked to stop");
            }
            if !composite[number] {
                primes += 1;
                (number * number..limit).step_by(number).for_each(|n| composite[n] = true);
            }
        }
        parent.try_post_message((limit, primes)).map_err(|_| "the parent is gone")?;
    }
    Ok(())
}

async fn serve(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await?;
            stream.write_all(&request[..length]).await
        });
    }
}

async fn ask(listener: std::net::SocketAddr) -> std::io::Result<Duration> {
    let start = Instant::now();
    let mut stream = TcpStream::connect(listener).await?;
    stream.write_all(b"hello").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert_eq!(answer, "hello");
    Ok(start.elapsed())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(serve(listener));

    let mut worker = Worker::spawn(sieve)?;
    worker.post_message(LIMIT).await?;
    let (mut answered, mut slowest) = (0, Duration::ZERO);
    loop {
        tokio::select! {
            event = worker.next_event() => match event {
                Some(WorkerEvent::Message((limit, primes))) => {
                    println!("{primes} primes below {limit}");
                    worker.close();
                }
                Some(WorkerEvent::Error(error)) => println!("{error}"),
                Some(WorkerEvent::Exit(code)) => println!("the worker ended with code {code}"),
                Some(WorkerEvent::Online) => println!("the worker is online"),
                None => break,
            },
            took = ask(address) => {
                answered += 1;
                slowest = slowest.max(took?);
            }
        }
    }
    println!("{answered} requests were answered meanwhile, the slowest in {slowest:?}");
    Ok(())
}
