//! One contender of `cargo xtask bench channel`: two processes, messages of about 96 bytes.
//!
//! `bench-channel HOW MODE MILLISECONDS [NODE SCRIPT]`. HOW is `native`, `native-borrowed` (the same messages, sent from and read
//! into a struct that borrows its texts), `native-socket` (without the ring of shared memory), `json` or `advanced` (polyfork at both ends), `node-json` or `node-advanced` (polyfork here, the program
//! NODE with SCRIPT as the child), `ipc-channel`,
//! or `socket` (a bare Unix socket with blocking reads and writes of whole messages: the limit). MODE is `oneway`
//! (the child sends as fast as it can, this side counts) or `echo` (one message there and back at a time).
//! Prints one line of JSON: how many messages, in how many seconds, and the CPU time of this side.
//!
//! The child is this program again; CHANNEL_BENCH names the mode.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "one line is the result")]
#![allow(clippy::disallowed_methods, reason = "rivals start their children without us")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipc_channel::ipc::{self, IpcOneShotServer, IpcReceiver, IpcSender};
use polyfork::channel::Encoding;
use polyfork::child_process::{Command, ForkNode, Forked, Signal, fork_program};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The first ones warm up.
const WARM_UP: u64 = 1000;
/// The clock is looked at once in so many messages.
const EVERY: u64 = 64;
/// A message of the bare socket.
const BYTES: usize = 96;
const MODE: &str = "CHANNEL_BENCH";
const HOW: &str = "CHANNEL_BENCH_HOW";

/// About 96 bytes as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Message {
    id: u64,
    name: String,
    flags: [u8; 3],
    text: String,
}

/// The same, of texts that are somebody else's.
#[derive(Debug, Serialize, Deserialize)]
struct Borrowed<'a> {
    id: u64,
    name: &'a str,
    flags: [u8; 3],
    text: &'a str,
}

impl Message {
    fn new(id: u64) -> Self {
        let name = "a message of the usual kind".to_owned();
        Self { id, name, flags: [1, 2, 3], text: "x".repeat(20) }
    }
}

/// What ipc-channel's child needs: where to send, and where to hear.
type Ends = (IpcReceiver<Message>, IpcSender<Message>);

/// Counts what arrives and knows when it is enough.
struct Count {
    limit: Duration,
    messages: u64,
    since: Option<(Instant, Duration)>,
}

impl Count {
    fn new(limit: Duration) -> Self {
        Self { limit, messages: 0, since: None }
    }

    /// One more; true when time is up, and the result printed.
    fn one(&mut self) -> bool {
        self.messages += 1;
        match self.since {
            None if self.messages == WARM_UP => {
                self.messages = 0;
                self.since = Some((Instant::now(), cpu()));
                false
            }
            Some((start, used)) if self.messages.is_multiple_of(EVERY) => {
                let time = start.elapsed();
                if time < self.limit {
                    return false;
                }
                println!(
                    "{{\"messages\":{},\"seconds\":{},\"cpu_us\":{}}}",
                    self.messages,
                    time.as_secs_f64(),
                    (cpu() - used).as_micros()
                );
                true
            }
            _ => false,
        }
    }
}

/// CPU time of this process.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    if let (Ok(mode), Ok(how)) = (std::env::var(MODE), std::env::var(HOW)) {
        return child(&how, &mode).await;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [how, mode, limit, rest @ ..] = args.as_slice() else {
        bail!("usage: bench-channel HOW MODE MILLISECONDS [NODE SCRIPT]");
    };
    ensure!(mode == "oneway" || mode == "echo", "no mode \"{mode}\": oneway or echo");
    let count = Count::new(Duration::from_millis(limit.parse()?));
    match how.as_str() {
        "native" => polyfork(own(mode, Encoding::Native)?, mode, count).await,
        "native-borrowed" => {
            let mut command = Command::new(std::env::current_exe()?);
            command.env(MODE, mode).env(HOW, "borrowed");
            borrowed(fork_program(&mut command, Encoding::Native)?, mode, count).await
        }
        "native-socket" => {
            let forked = own(mode, Encoding::Native)?;
            // The parent receives, so it refuses; what it sends is small.
            forked.channel.allow_ring(false);
            polyfork(forked, mode, count).await
        }
        "json" => polyfork(own(mode, Encoding::Json)?, mode, count).await,
        "advanced" => polyfork(own(mode, Encoding::Advanced)?, mode, count).await,
        "node-json" | "node-advanced" => {
            let [node, script] = rest else { bail!("{how} needs NODE and SCRIPT") };
            let mut fork = ForkNode::new(script);
            fork.exec_path(node).encoding(if how == "node-json" {
                Encoding::Json
            } else {
                Encoding::Advanced
            });
            fork.command().env(MODE, mode);
            polyfork(fork.fork()?, mode, count).await
        }
        "ipc-channel" => ipc_channel(mode, count),
        "socket" => socket(mode, count),
        other => bail!(
            "no \"{other}\": native, native-borrowed, native-socket, json, advanced, node-json, node-advanced, ipc-channel or socket"
        ),
    }
}

fn own(mode: &str, encoding: Encoding) -> Result<Forked> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(MODE, mode).env(HOW, "polyfork");
    Ok(fork_program(&mut command, encoding)?)
}

async fn child(how: &str, mode: &str) -> Result<()> {
    match how {
        "polyfork" => polyfork_child(mode).await,
        "borrowed" => borrowed_child(mode).await,
        "ipc-channel" => ipc_channel_child(mode),
        "socket" => socket_child(mode),
        other => bail!("no child \"{other}\""),
    }
}

async fn polyfork(forked: Forked, mode: &str, mut count: Count) -> Result<()> {
    let Forked { mut channel, child } = forked;
    channel.send(&Message::new(0)).await?;
    loop {
        let message = channel.recv().await?.context("the child has gone")?;
        let message: Message = message.to()?;
        if count.one() {
            break;
        }
        if mode == "echo" {
            channel.send(&message).await?;
        }
    }
    child.kill(Signal::KILL)?;
    Ok(())
}

async fn polyfork_child(mode: &str) -> Result<()> {
    let mut channel = polyfork::process::channel()?;
    if mode == "echo" {
        while let Some(message) = channel.recv().await? {
            let message: Message = message.to()?;
            channel.send(&message).await?;
        }
        return Ok(());
    }
    channel.recv().await?;
    for id in 0.. {
        // The parent stops by ending us.
        channel.send(&Message::new(id)).await?;
    }
    Ok(())
}

async fn borrowed(forked: Forked, mode: &str, mut count: Count) -> Result<()> {
    let Forked { mut channel, child } = forked;
    channel.send(&Message::new(0)).await?;
    loop {
        let message = channel.recv().await?.context("the child has gone")?;
        let read: Borrowed<'_> = message.to_borrowed()?;
        if count.one() {
            break;
        }
        if mode == "echo" {
            channel.send(&read).await?;
        }
    }
    child.kill(Signal::KILL)?;
    Ok(())
}

async fn borrowed_child(mode: &str) -> Result<()> {
    let mut channel = polyfork::process::channel()?;
    if mode == "echo" {
        while let Some(message) = channel.recv().await? {
            let read: Borrowed<'_> = message.to_borrowed()?;
            channel.send(&read).await?;
        }
        return Ok(());
    }
    channel.recv().await?;
    let one = Message::new(0);
    for id in 0.. {
        let message = Borrowed { id, name: &one.name, flags: one.flags, text: &one.text };
        channel.send(&message).await?;
    }
    Ok(())
}

fn ipc_channel(mode: &str, mut count: Count) -> Result<()> {
    let (server, name) = IpcOneShotServer::<Ends>::new()?;
    let mut child = std::process::Command::new(std::env::current_exe()?);
    let mut child = child.env(MODE, mode).env(HOW, "ipc-channel").arg(name).spawn()?;
    let (_, (receiver, sender)) = server.accept()?;
    sender.send(Message::new(0))?;
    loop {
        let message = receiver.recv()?;
        if count.one() {
            break;
        }
        if mode == "echo" {
            sender.send(message)?;
        }
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn ipc_channel_child(mode: &str) -> Result<()> {
    let name = std::env::args().nth(1).context("the parent's name")?;
    let (to_parent, parents) = ipc::channel::<Message>()?;
    let (to_us, ours) = ipc::channel::<Message>()?;
    IpcSender::<Ends>::connect(name)?.send((parents, to_us))?;
    if mode == "echo" {
        while let Ok(message) = ours.recv() {
            to_parent.send(message)?;
        }
        return Ok(());
    }
    ours.recv()?;
    for id in 0.. {
        to_parent.send(Message::new(id))?;
    }
    Ok(())
}

/// The child's end is its standard input.
fn socket(mode: &str, mut count: Count) -> Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let mut child = std::process::Command::new(std::env::current_exe()?);
    child.env(MODE, mode).env(HOW, "socket").stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    let mut child = child.spawn()?;
    let mut message = [1; BYTES];
    ours.write_all(&message)?;
    loop {
        ours.read_exact(&mut message)?;
        if count.one() {
            break;
        }
        if mode == "echo" {
            ours.write_all(&message)?;
        }
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn socket_child(mode: &str) -> Result<()> {
    use std::os::fd::AsFd;
    let mut channel = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut message = [1; BYTES];
    if mode == "echo" {
        while channel.read_exact(&mut message).is_ok() {
            channel.write_all(&message)?;
        }
        return Ok(());
    }
    channel.read_exact(&mut message)?;
    loop {
        channel.write_all(&message)?;
    }
}
