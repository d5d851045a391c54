//! The four ways, driven alike: start one, say something, hear something, end it.
//!
//! On the other side of each are the same answers: in a thread, in a forked process, in a
//! worker of a cluster. A spawned program knows nothing of us; there, `cat` gives back what it reads.
//!
//! The surprising rule: a thread is waited for by blocking, as a thread would be; everything else by the runtime.

use std::time::Duration;

use polyfork::channel::Handle;
use polyfork::child_process::{
    self, Child, Command, Entry, EntryResult, Port, Signal, Stdio, fork_entry,
};
use polyfork::cluster::{Cluster, Event, Events, Output, Settings, Worker as ClusterWorker};
use polyfork::shared_memory::SharedArrayBuffer;
use polyfork::worker_threads::{Worker, WorkerContext, WorkerEvent};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use crate::exit::Code;

/// Nothing here takes this long, unless something is broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// What an ordinary message has besides its number: about 96 bytes in all.
const TEXT: &str =
    "a message of the usual kind, long enough to be like one that somebody would really send";

pub(super) type Result<T> = std::result::Result<T, String>;

/// What the other side is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Say it back.
    Echo(Letter),
    /// Say something so many times, as fast as it goes.
    Flood(u64),
    /// How many primes are there in this range?
    Primes(u64, u64),
    /// Here is some memory: how long is it?
    Look(usize),
    /// Take this and say how long it is.
    Copy(Vec<u8>),
    /// Fail.
    Crash,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    /// What it was sent, or one of a flood.
    Letter(Letter),
    /// A result.
    Number(u64),
}

/// An ordinary message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Letter {
    id: u64,
    text: String,
}

impl Letter {
    pub(super) fn new(id: u64) -> Letter {
        Letter { id, text: TEXT.to_owned() }
    }
}

/// One of the ways, once it is started.
pub(super) trait Peer: Sized {
    async fn start() -> Result<Self>;
    async fn say(&mut self, ask: Ask) -> Result<()>;
    async fn hear(&mut self) -> Result<Told>;
    /// Lets it finish.
    async fn end(self) -> Result<()>;

    async fn echo(&mut self, id: u64) -> Result<()> {
        self.say(Ask::Echo(Letter::new(id))).await?;
        match self.hear().await? {
            Told::Letter(letter) if letter.id == id => Ok(()),
            other => Err(format!("an echo of something else: {other:?}")),
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| format!("{what}: nothing for 30 s"))
}

/// How many primes there are from `from` to `to`: work for a processor and for nothing else.
pub(crate) fn primes(from: u64, to: u64) -> u64 {
    let is_prime =
        |n: &u64| *n > 1 && (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (from..to).filter(is_prime).count() as u64
}

/// What is answered at once; a flood is not.
fn answer(ask: Ask) -> Told {
    match ask {
        Ask::Echo(letter) => Told::Letter(letter),
        Ask::Primes(from, to) => Told::Number(primes(from, to)),
        Ask::Look(length) => Told::Number(length as u64),
        Ask::Copy(bytes) => Told::Number(bytes.len() as u64),
        Ask::Flood(_) | Ask::Crash => Told::Number(0),
    }
}

// ---- a thread ----

pub(super) struct Thread(Worker<Ask, Told>);

impl Thread {
    /// Waits for the worker's own error, which it was asked for.
    pub(super) fn crash(mut self) -> Result<()> {
        self.0.poster().post_message_blocking(Ask::Crash).map_err(|_| "it has ended".to_owned())?;
        while let Some(event) = self.0.next_event_blocking() {
            if let WorkerEvent::Error(_) = event {
                return Ok(());
            }
        }
        Err("it ended without an error".to_owned())
    }
}

fn in_a_thread(mut context: WorkerContext<Ask, Told>) {
    while let Some(ask) = context.receive_blocking() {
        let sent = match ask {
            Ask::Flood(count) => (0..count)
                .try_for_each(|id| context.post_message_blocking(Told::Letter(Letter::new(id)))),
            // Not `panic!`: its text would be on the asker's terminal.
            Ask::Crash => std::panic::resume_unwind(Box::new("as asked")),
            ask => context.post_message_blocking(answer(ask)),
        };
        if sent.is_err() {
            return;
        }
    }
}

impl Peer for Thread {
    async fn start() -> Result<Thread> {
        Worker::spawn(in_a_thread).map(Thread).map_err(text)
    }

    async fn say(&mut self, ask: Ask) -> Result<()> {
        self.0.poster().post_message_blocking(ask).map_err(|_| "the thread has ended".to_owned())
    }

    async fn hear(&mut self) -> Result<Told> {
        self.0.receive_blocking().ok_or_else(|| "the thread has ended".to_owned())
    }

    async fn end(self) -> Result<()> {
        self.0.close();
        self.0.join_blocking();
        Ok(())
    }
}

// ---- a forked process ----

/// The other side of [`Forked`], in a process of its own.
pub(crate) const ENTRY: Entry<Ask, Told> = Entry::new("advise", |port| Box::pin(in_a_child(port)));

async fn in_a_child(mut port: Port<Ask, Told>) -> EntryResult {
    while let Some((ask, mut message)) = port.recv_message().await? {
        match ask {
            Ask::Flood(count) => {
                for id in 0..count {
                    port.send(&Told::Letter(Letter::new(id))).await?;
                }
            }
            Ask::Look(_) => {
                let length = match message.take_handle() {
                    Some(Handle::Memory(memory)) => memory.len(),
                    _ => 0,
                };
                port.send(&Told::Number(length as u64)).await?;
            }
            Ask::Crash => std::process::abort(),
            ask => port.send(&answer(ask)).await?,
        }
    }
    Ok(())
}

pub(super) struct Forked {
    port: Port<Told, Ask>,
    child: Child,
}

impl Forked {
    pub(super) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Shares memory without copying it.
    pub(super) async fn share(&mut self, memory: SharedArrayBuffer) -> Result<u64> {
        let handle = Handle::Memory(memory);
        self.port.send_with(&Ask::Look(0), handle).await.map_err(text)?;
        match self.hear().await? {
            Told::Number(length) => Ok(length),
            Told::Letter(_) => Err("a letter instead of a number".to_owned()),
        }
    }

    pub(super) async fn kill(mut self) -> Result<()> {
        self.child.kill(Signal::KILL).map_err(text)?;
        soon("the end of a child", self.child.wait()).await?.map(drop).map_err(text)
    }
}

impl Peer for Forked {
    async fn start() -> Result<Forked> {
        let forked = fork_entry(&ENTRY).map_err(text)?;
        Ok(Forked { port: forked.port, child: forked.child })
    }

    async fn say(&mut self, ask: Ask) -> Result<()> {
        self.port.send(&ask).await.map_err(text)
    }

    async fn hear(&mut self) -> Result<Told> {
        let told = soon("a child", self.port.recv()).await?.map_err(text)?;
        told.ok_or_else(|| "the child has ended".to_owned())
    }

    async fn end(mut self) -> Result<()> {
        self.port.disconnect().await.map_err(text)?;
        soon("the end of a child", self.child.wait()).await?.map(drop).map_err(text)
    }
}

// ---- a worker of a cluster ----

pub(super) struct Clustered {
    cluster: Cluster,
    events: Events,
    worker: u64,
    pid: u32,
}

/// This process is a worker of a cluster that `advise` started.
pub(crate) fn work() -> Code {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return Code::Unexpected };
    match runtime.block_on(in_a_worker()) {
        Ok(()) => Code::Stopped,
        Err(error) => {
            crate::say(std::io::stderr(), &format!("polyfork advise: {error}\n"));
            Code::Unexpected
        }
    }
}

async fn in_a_worker() -> Result<()> {
    let worker = ClusterWorker::from_env().map_err(text)?;
    worker.ready();
    loop {
        let message = tokio::select! {
            message = worker.recv() => message,
            () = worker.shutdown() => return Ok(()),
        };
        let Some(message) = message else { return Ok(()) };
        match message.decode::<Ask>().map_err(text)? {
            Ask::Flood(count) => {
                for id in 0..count {
                    worker.send(&Told::Letter(Letter::new(id))).await.map_err(text)?;
                }
            }
            Ask::Crash => std::process::abort(),
            ask => worker.send(&answer(ask)).await.map_err(text)?,
        }
    }
}

impl Clustered {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    async fn ready(&mut self) -> Result<()> {
        loop {
            match soon("a worker", self.events.next()).await? {
                Some(Event::Ready(who)) => {
                    (self.worker, self.pid) = (who.worker, who.pid);
                    return Ok(());
                }
                Some(Event::End(_)) | None => return Err("the cluster has ended".to_owned()),
                Some(_) => {}
            }
        }
    }

    /// Kills the worker and waits for the one that the cluster puts in its place.
    pub(super) async fn crash(&mut self) -> Result<()> {
        self.cluster.worker(self.worker).kill(9).await;
        self.ready().await
    }
}

impl Peer for Clustered {
    async fn start() -> Result<Clustered> {
        let settings = Settings::this_program().map_err(text)?;
        let settings = settings.workers(1).output(Output::Inherit).grace(Duration::from_secs(1));
        let cluster = Cluster::start(settings).map_err(text)?;
        let events = cluster.events();
        let mut clustered = Clustered { cluster, events, worker: 0, pid: 0 };
        clustered.ready().await?;
        Ok(clustered)
    }

    async fn say(&mut self, ask: Ask) -> Result<()> {
        self.cluster.worker(self.worker).send(&ask).await.map_err(text)
    }

    async fn hear(&mut self) -> Result<Told> {
        loop {
            match soon("a worker", self.events.next()).await? {
                Some(Event::Message { message, .. }) => return message.decode().map_err(text),
                Some(Event::Lagged(missed)) => {
                    return Err(format!("{missed} messages came too fast"));
                }
                Some(Event::Exit { .. } | Event::End(_)) | None => {
                    return Err("the worker has ended".to_owned());
                }
                Some(_) => {}
            }
        }
    }

    async fn end(self) -> Result<()> {
        self.cluster.stop().await;
        soon("the end of a cluster", self.cluster.wait()).await.map(drop)
    }
}

// ---- any program ----

/// `cat`, by its standard streams.
pub(super) struct Spawned {
    child: Child,
    input: child_process::ChildStdin,
    output: BufReader<child_process::ChildStdout>,
}

impl Spawned {
    pub(super) fn start(program: &str, args: &[&str]) -> Result<Spawned> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::Pipe).stdout(Stdio::Pipe).kill_on_drop(true);
        let mut child = command.spawn().map_err(text)?;
        let ends = child.stdin.take().zip(child.stdout.take());
        let (input, output) = ends.ok_or_else(|| "no pipes".to_owned())?;
        Ok(Spawned { child, input, output: BufReader::with_capacity(64 << 10, output) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.pid()
    }

    pub(super) async fn echo(&mut self, line: &mut Vec<u8>) -> Result<()> {
        self.input.write_all(TEXT.as_bytes()).await.map_err(text)?;
        self.input.write_all(b"\n").await.map_err(text)?;
        self.line(line).await
    }

    pub(super) async fn line(&mut self, line: &mut Vec<u8>) -> Result<()> {
        line.clear();
        let read = soon("a program", self.output.read_until(b'\n', line)).await?.map_err(text)?;
        if read == 0 { Err("the program has ended".to_owned()) } else { Ok(()) }
    }

    pub(super) fn text() -> &'static str {
        TEXT
    }

    /// Writes so many bytes and waits until the program has read them all.
    pub(super) async fn swallow(mut self, bytes: &[u8]) -> Result<()> {
        self.input.write_all(bytes).await.map_err(text)?;
        drop(self.input);
        let mut rest = Vec::new();
        soon("a program", self.output.read_to_end(&mut rest)).await?.map_err(text)?;
        soon("the end of a program", self.child.wait()).await?.map(drop).map_err(text)
    }

    pub(super) async fn end(mut self) -> Result<()> {
        self.child.kill(Signal::KILL).map_err(text)?;
        soon("the end of a program", self.child.wait()).await?.map(drop).map_err(text)
    }
}

/// Starts `true` and waits for its end.
pub(super) async fn run_true() -> Result<()> {
    let mut child = Command::new("true").spawn().map_err(text)?;
    soon("the end of a program", child.wait()).await?.map(drop).map_err(text)
}
