//! Forks a Node script and talks to it: `cargo run --example fork_node`.
//!
//! The script is in `fork_node.js`, next to this file.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::path::Path;
use std::time::Duration;

use polyfork::child_process::fork_node;
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fork_node.js");
    let mut forked = fork_node(script)?;

    forked.channel.send(&json!({ "greet": "Rust" })).await?;
    if let Some(message) = forked.channel.recv().await? {
        println!("the script says {}", message.to::<Value>()?);
    }
    let answer = forked.channel.request(&json!([1, 2, 3]), Duration::from_secs(5)).await?;
    println!("the sum is {}", answer.to::<f64>()?);

    forked.channel.disconnect().await?;
    println!("it ended with code {:?}", forked.child.wait().await?.code);
    Ok(())
}
