//! One function, in a thread or in a process, by one word.
//!
//! `cargo run --example thread_or_process` sends the same jobs to both, and then one that crashes to the process.
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::{Duration, Instant};

use polyfork::child_process::{Entry, EntryEvent, EntryResult, Place, Port, Started, run_entries};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
enum Job {
    Count { below: u32 },
    Crash,
}

const PRIMES: Entry<Job, u32> = Entry::new("primes", |port| Box::pin(primes(port)));

async fn primes(mut port: Port<Job, u32>) -> EntryResult {
    while let Some(job) = port.recv().await? {
        match job {
            Job::Count { below } => {
                let is_prime =
                    |n: u32| (2..n).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
                let count = (2..below).filter(|n| is_prime(*n)).count();
                port.post_message(u32::try_from(count)?).await?;
            }
            // As bad foreign code would do it: nothing can catch this.
            Job::Crash => std::process::abort(),
        }
    }
    Ok(())
}

async fn follow(started: &mut Started<Job, u32>) -> Result<(), Box<dyn std::error::Error>> {
    while let Some(event) = started.next_event().await? {
        println!("  {event:?}");
        if let EntryEvent::Message(_) = event {
            started.port.disconnect().await.ok();
        }
    }
    Ok(())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    for place in [Place::Thread, Place::Process] {
        let start = Instant::now();
        let mut primes = PRIMES.start(place)?;
        primes.port.post_message(Job::Count { below: 100_000 }).await?;
        println!("{place:?}:");
        follow(&mut primes).await?;
        println!("  {:?}", start.elapsed());
    }
    println!("A crash in a process:");
    let mut primes = PRIMES.start(Place::Process)?;
    primes.port.post_message(Job::Crash).await?;
    follow(&mut primes).await?;

    println!("Told to end:");
    let mut primes = PRIMES.start(Place::Thread)?;
    println!("  {:?}", primes.terminate(Duration::from_secs(1)).await?);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    run_entries(&[&PRIMES]); // does not return in a child
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}
