//! A program that is a cluster of itself, for the test of `cluster::run`: what it does is its first argument.
//!
//! `serve PORT` answers every connection with the role of the process and ends it. `fail` returns an error at
//! once. `listen PORT` returns the error of listening, if there is one.

#![expect(clippy::print_stderr, reason = "a program, not a library")]

use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use polyfork::cluster::{self, MainResult, RestartPolicy, Settings, Worker};
use tokio::io::AsyncWriteExt;

fn main() -> ExitCode {
    let settings = match Settings::this_program() {
        Ok(settings) => settings.workers(2).grace(Duration::from_secs(20)),
        Err(error) => {
            eprintln!("own-cluster: {error}");
            return ExitCode::FAILURE;
        }
    };
    let soon = Duration::from_millis(1);
    let quick = RestartPolicy { min_delay: soon, max_delay: soon, ..RestartPolicy::default() };
    cluster::run_with(settings.restart(quick), work)
}

async fn work(worker: Worker) -> MainResult {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let port = arguments.next().and_then(|port| port.parse().ok()).unwrap_or(0);
    match what.as_str() {
        "serve" => serve(worker, port).await,
        "listen" => worker.listen((Ipv4Addr::LOCALHOST, port)).await.map(drop).map_err(Into::into),
        _ => Err("this program was told to fail".into()),
    }
}

async fn serve(worker: Worker, port: u16) -> MainResult {
    let mut listener = worker.listen((Ipv4Addr::LOCALHOST, port)).await?;
    let role = if worker.is_standalone() { "standalone" } else { "worker" };
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A client that is gone wants no answer.
                let _ = accepted?.0.write_all(role.as_bytes()).await;
            }
            () = worker.shutdown() => return Ok(()),
        }
    }
}
