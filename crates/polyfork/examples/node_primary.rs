//! A primary written in Rust that runs an unmodified Node server on several cores and talks to it.
//!
//! ```text
//! cargo run --example node_primary
//! curl http://127.0.0.1:3000/
//! ```
//!
//! `server.js` beside this file is an ordinary `http` server. This program starts it in as many workers as
//! there are cores, changes the greeting of all of them, asks every worker how much it has served each five
//! seconds, and prints what happens. `PORT` (default 3000) is the TCP port, `WORKERS` the number of workers.
//! Ctrl-C lets the workers finish what they serve; a second one ends them.

#![expect(clippy::print_stdout, reason = "a program, not a library")]

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use polyfork::cluster::{Cluster, Event, Events, Outcome, Settings};
use serde::{Deserialize, Serialize};

/// What `server.js` understands.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum ToServer {
    /// `{"greeting": "..."}`
    Greeting(&'static str),
    /// `{"question": "served"}`
    Question(&'static str),
}

/// What `server.js` answers: `{"pid": 1, "served": 2}`.
#[derive(Deserialize)]
struct Served {
    pid: u32,
    served: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/server.js");
    let mut settings = Settings::new(program);
    if let Ok(workers) = std::env::var("WORKERS") {
        settings = settings.workers(workers.parse()?);
    }
    let cluster = Cluster::start(settings)?;
    let events = tokio::spawn(tell(cluster.clone(), cluster.events()));
    let asking = tokio::spawn(ask_for_ever(cluster.clone()));
    cluster.obey_signals().await;
    let outcome = cluster.wait().await;
    asking.abort();
    events.await?;
    match outcome {
        Outcome::Stopped => Ok(()),
        other => Err(format!("the cluster ended: {other:?}").into()),
    }
}

/// Prints what happens, and greets every worker that comes online.
async fn tell(cluster: Cluster, mut events: Events) {
    while let Some(event) = events.next().await {
        match event {
            Event::Online(who) => {
                let greeting = ToServer::Greeting("hello, on every core,");
                // A worker that is gone already has been replaced, and its replacement is greeted.
                let _ = cluster.worker(who.worker).send(&greeting).await;
            }
            Event::Listening { who, address, by } => {
                println!("worker {} listens on {address} ({})", who.worker, by.why);
            }
            Event::AllReady { workers } => println!("all {workers} workers are ready"),
            Event::Message { who, message } => match message.decode() {
                Ok(Served { pid, served }) => {
                    println!("worker {} (process {pid}) has served {served}", who.worker);
                }
                Err(error) => println!("worker {} says {message:?}: {error}", who.worker),
            },
            Event::Exit { who, reason, .. } => println!("worker {} {reason}", who.worker),
            _ => {}
        }
    }
}

/// Asks all workers how much they have served, every five seconds.
async fn ask_for_ever(cluster: Cluster) {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    loop {
        every.tick().await;
        if cluster.broadcast(&ToServer::Question("served")).await.is_err() {
            return; // the cluster has ended
        }
    }
}
