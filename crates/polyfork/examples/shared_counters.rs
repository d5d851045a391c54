//! Counters in memory that all workers of a cluster share: exact totals, whichever process answered.
//!
//! ```text
//! cargo run --example shared_counters
//! curl http://127.0.0.1:3000/
//! ```
//!
//! `PORT` (default 3000, 0 for any) is the TCP port on loopback, `WORKERS` the number of workers. Each answer tells which
//! process gave it, how many it has given, and how many all have given together. A worker that is killed takes its own
//! count with it, not the common one.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program, not a library")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use polyfork::cluster::{self, Settings, Worker};
use polyfork::shared_memory::SharedArrayBuffer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The name of the memory; its first word counts all answers.
const ANSWERS: &str = "answers";

fn main() -> ExitCode {
    match settings() {
        Ok(settings) => cluster::run_with(settings, serve),
        Err(error) => {
            eprintln!("shared_counters: {error}");
            ExitCode::FAILURE
        }
    }
}

fn settings() -> Result<Settings, Box<dyn Error>> {
    let memory = SharedArrayBuffer::new(8)?;
    let settings = Settings::this_program()?.shared_memory(ANSWERS, &memory);
    Ok(match std::env::var("WORKERS") {
        Ok(workers) => settings.workers(workers.parse()?),
        Err(_) => settings,
    })
}

async fn serve(worker: Worker) -> cluster::MainResult {
    // Alone, a worker has nobody to share with.
    let memory = match worker.shared_memory(ANSWERS) {
        Some(memory) => memory,
        None => SharedArrayBuffer::new(8)?,
    };
    let together = memory.u64()?;
    let port = std::env::var("PORT").unwrap_or_else(|_| "3000".to_owned());
    let mut listener = worker.listen(format!("127.0.0.1:{port}")).await?;
    if worker.slot() == Some(1) {
        println!("http://{}/", listener.local_addr()?);
    }
    let mut mine = 0u64;
    loop {
        let (mut client, _) = tokio::select! {
            accepted = listener.accept() => accepted?,
            () = worker.shutdown() => return Ok(()),
        };
        let mut request = [0; 1024];
        if client.read(&mut request).await.is_err() {
            continue;
        }
        mine += 1;
        let all = together[0].fetch_add(1, Ordering::Relaxed) + 1;
        let body = format!("process {} gave {mine}, all together {all}\n", std::process::id());
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", body.len());
        // A client that has left needs no answer.
        let _ = client.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes()).await;
    }
}
