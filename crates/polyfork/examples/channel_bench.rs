//! Measures the channel between two processes: one-way messages per second and round trips.
//!
//! `channel_bench one-way|round-trip json|advanced|native [COUNT]`, or `bare [COUNT]` for the round trip of a plain
//! Unix socket as the limit. Prints one line of JSON.
#![allow(clippy::print_stdout, reason = "a measuring program prints its figures")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use polyfork::channel::{Channel, Encoding};
use polyfork::child_process::{Command, Stdio, fork_program};
use serde::{Deserialize, Serialize};

/// About 96 bytes in every encoding but JSON.
#[derive(Serialize, Deserialize)]
struct Record {
    id: u64,
    kind: u32,
    time: f64,
    text: String,
}

type Failed = Box<dyn std::error::Error>;

fn record(id: u64) -> Record {
    Record { id, kind: 7, time: 1_234_567.875, text: "x".repeat(78) }
}

fn main() -> Result<(), Failed> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize| args.get(at).map_or("", String::as_str);
    if word(0) == "bare-child" {
        return echo_bytes();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let number = |at: usize, or: u64| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(or);
    match word(0) {
        "child" => runtime.block_on(child(word(1))),
        "one-way" => runtime.block_on(one_way(encoding(word(1))?, number(2, 2_000_000))),
        "round-trip" => runtime.block_on(round_trip(encoding(word(1))?, number(2, 100_000))),
        "bare" => bare(number(1, 100_000)),
        _ => Err("usage: channel_bench one-way|round-trip json|advanced|native | bare".into()),
    }
}

fn encoding(word: &str) -> Result<Encoding, Failed> {
    match word {
        "json" => Ok(Encoding::Json),
        "advanced" => Ok(Encoding::Advanced),
        "native" => Ok(Encoding::Native),
        other => Err(format!("no encoding {other:?}").into()),
    }
}

fn start(encoding: Encoding, role: &str) -> Result<polyfork::child_process::Forked, Failed> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["child", role]);
    Ok(fork_program(&mut command, encoding)?)
}

async fn child(role: &str) -> Result<(), Failed> {
    let mut parent = polyfork::process::channel()?;
    let mut count = 0_u64;
    while let Some(message) = parent.recv().await? {
        let record: Record = message.to()?;
        if role == "echo" {
            parent.send(&record).await?;
        } else {
            if record.id != count {
                return Err(format!("message {} came as number {count}", record.id).into());
            }
            count += 1;
            if record.kind == 0 {
                break;
            }
        }
    }
    if role == "count" {
        parent.send(&count).await?;
        parent.disconnect().await?;
    }
    Ok(())
}

async fn one_way(encoding: Encoding, count: u64) -> Result<(), Failed> {
    let mut forked = start(encoding, "count")?;
    let begin = Instant::now();
    let mut message = record(0);
    for id in 0..count {
        message.id = id;
        message.kind = u32::from(id + 1 < count);
        forked.channel.send(&message).await?;
    }
    let counted: u64 = receive(&mut forked.channel).await?;
    let seconds = begin.elapsed().as_secs_f64();
    if counted != count {
        return Err(format!("{counted} of {count} messages arrived").into());
    }
    println!(
        "{{\"one_way\":\"{encoding:?}\",\"messages_per_second\":{:.0}}}",
        count as f64 / seconds
    );
    Ok(())
}

async fn receive<T: serde::de::DeserializeOwned>(channel: &mut Channel) -> Result<T, Failed> {
    Ok(channel.recv().await?.ok_or("the channel ended")?.to()?)
}

async fn round_trip(encoding: Encoding, count: u64) -> Result<(), Failed> {
    let mut forked = start(encoding, "echo")?;
    let message = record(1);
    let mut times = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        forked.channel.send(&message).await?;
        let _back: Record = receive(&mut forked.channel).await?;
        times.push(begin.elapsed());
    }
    report(&format!("{encoding:?}"), times);
    Ok(())
}

/// The same bytes over a socket and nothing else.
fn bare(count: u64) -> Result<(), Failed> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let mut command = Command::new("/proc/self/exe");
    command.arg("bare-child").stdin(Stdio::Fd(theirs.into())).kill_on_drop(true);
    let _child = command.spawn()?;
    let mut buffer = [7; 100];
    let mut times = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        ours.write_all(&buffer)?;
        ours.read_exact(&mut buffer)?;
        times.push(begin.elapsed());
    }
    report("bare", times);
    Ok(())
}

fn echo_bytes() -> Result<(), Failed> {
    let socket = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
    let mut socket = UnixStream::from(socket);
    let mut buffer = [0; 100];
    while socket.read_exact(&mut buffer).is_ok() {
        socket.write_all(&buffer)?;
    }
    Ok(())
}

fn report(what: &str, mut times: Vec<std::time::Duration>) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_nanos() as f64 / 1e3;
    println!("{{\"round_trip\":\"{what}\",\"p50_us\":{:.2},\"p99_us\":{:.2}}}", at(0.5), at(0.99));
}
