//! axum on tokio's multi-thread runtime: what a Rust service does today to use several cores.
//!
//! The benchmark compares it with the same router in a polyfork cluster. `PORT` is the TCP port on
//! loopback, `WORKERS` the number of runtime threads. Nothing here is tuned beyond axum's manual.
//!
//! Source: axum's "hello world" example, tokio's runtime builder.

#![forbid(unsafe_code)]

use std::env;
use std::error::Error;
use std::net::Ipv4Addr;

use axum::Router;
use axum::routing::get;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::runtime::Builder;

/// The body that every server of the benchmark answers.
const BODY: &str = "hello from one of many\n";

fn main() -> Result<(), Box<dyn Error>> {
    let port: u16 = env::var("PORT")?.parse()?;
    let threads: usize = env::var("WORKERS")?.parse()?;
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?.tap_io(|tcp| {
            // As the cluster's server does; a client that is gone shows itself when it is read from.
            let _ = tcp.set_nodelay(true);
        });
        let router = Router::new().route("/", get(|| async { BODY }));
        axum::serve(listener, router).await?;
        Ok(())
    })
}
