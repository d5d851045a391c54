//! Clients of the servers under test: just enough HTTP/1.1, and a closed-loop load that counts every attempt.
//!
//! Every attempt ends in exactly one class (ok, refused, reset, cut, hung), so that the counts add up. A
//! connection that the server closes *between* two requests is no failure: the next request opens another.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polyfork::cluster::Address;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::support::{PATIENCE, Rig};

/// An answer to a request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    /// The server says that it closes the connection after this.
    pub(crate) last: bool,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON answer")
    }
}

/// The address of a TCP listener as a client reaches it: a wildcard is reached over loopback.
pub(crate) fn reach(address: &Address) -> SocketAddr {
    match address {
        Address::Tcp(at) if at.ip().is_unspecified() => {
            SocketAddr::from(([127, 0, 0, 1], at.port()))
        }
        Address::Tcp(at) => *at,
        other => panic!("{other} is no TCP address"),
    }
}

/// One request on a connection of its own.
pub(crate) async fn get(to: SocketAddr, path: &str) -> io::Result<Answer> {
    let mut stream = BufReader::new(TcpStream::connect(to).await?);
    exchange(&mut stream, path, false).await
}

/// As [`get`], over a Unix socket.
pub(crate) async fn get_unix(to: &Path, path: &str) -> io::Result<Answer> {
    let mut stream = BufReader::new(UnixStream::connect(to).await?);
    exchange(&mut stream, path, false).await
}

/// Connects and reads to the end: what the `greeter` of `actor.cjs` says.
pub(crate) async fn greeting(to: SocketAddr) -> io::Result<String> {
    let mut text = String::new();
    TcpStream::connect(to).await?.read_to_string(&mut text).await?;
    Ok(text)
}

/// A connection that is kept for several requests.
pub(crate) struct Kept(BufReader<TcpStream>);

impl Kept {
    pub(crate) async fn open(to: SocketAddr) -> io::Result<Kept> {
        Ok(Kept(BufReader::new(TcpStream::connect(to).await?)))
    }

    pub(crate) async fn get(&mut self, path: &str) -> io::Result<Answer> {
        exchange(&mut self.0, path, true).await
    }

    /// Whether the server has closed it while it was idle, as any client looks before it uses one again.
    fn is_closed(&self) -> bool {
        let nothing = |e: &io::Error| e.kind() == io::ErrorKind::WouldBlock;
        !self.0.get_ref().try_read(&mut [0]).is_err_and(|e| nothing(&e))
    }
}

async fn exchange<S>(stream: &mut BufReader<S>, path: &str, keep: bool) -> io::Result<Answer>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let connection = if keep { "keep-alive" } else { "close" };
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    read_answer(stream).await
}

async fn read_answer<S>(stream: &mut BufReader<S>) -> io::Result<Answer>
where
    S: tokio::io::AsyncRead + Unpin,
{
    let cut = || io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the whole answer");
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Err(cut());
        }
        match line.trim_end() {
            "" => break,
            text => head.push(text.to_ascii_lowercase()),
        }
    }
    let status =
        head.first().and_then(|line| line.split(' ').nth(1)?.parse().ok()).ok_or_else(cut)?;
    let header = |name: &str| {
        head.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let last = header("connection") == Some("close");
    let body = if header("transfer-encoding") == Some("chunked") {
        read_chunks(stream).await?
    } else {
        let length = header("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        body
    };
    Ok(Answer { status, body, last })
}

async fn read_chunks<S>(stream: &mut BufReader<S>) -> io::Result<Vec<u8>>
where
    S: tokio::io::AsyncRead + Unpin,
{
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let wrong = |_| io::Error::new(io::ErrorKind::InvalidData, "no length of a chunk");
        let length = usize::from_str_radix(line.trim_end(), 16).map_err(wrong)?;
        let mut chunk = vec![0; length + 2];
        stream.read_exact(&mut chunk).await?;
        chunk.truncate(length);
        if length == 0 {
            return Ok(body);
        }
        body.extend(chunk);
    }
}

/// What became of the requests of a load.
#[derive(Default)]
pub(crate) struct Counts {
    ok: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
    cut: AtomicU64,
    hung: AtomicU64,
    /// Kept connections that the server said good-bye to with an answer.
    closed_politely: AtomicU64,
    /// Kept connections that were found closed before the next request was sent.
    closed_idle: AtomicU64,
    /// Told of each answer.
    answered: Notify,
}

impl fmt::Debug for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counts")
            .field("ok", &self.ok)
            .field("refused", &self.refused)
            .field("reset", &self.reset)
            .field("cut", &self.cut)
            .field("hung", &self.hung)
            .field("closed_politely", &self.closed_politely)
            .field("closed_idle", &self.closed_idle)
            .finish_non_exhaustive()
    }
}

impl Counts {
    pub(crate) fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    /// Requests that failed, in whatever way.
    pub(crate) fn failed(&self) -> u64 {
        [&self.refused, &self.reset, &self.cut, &self.hung]
            .iter()
            .map(|n| n.load(Ordering::Relaxed))
            .sum()
    }

    fn count(&self, outcome: &Outcome) {
        let class = match outcome {
            Ok(Ok(answer)) if answer.status == 200 => &self.ok,
            Ok(Ok(_)) => &self.cut,
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => &self.refused,
            Ok(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => &self.cut,
            Ok(Err(_)) => &self.reset,
            Err(_) => &self.hung,
        };
        class.fetch_add(1, Ordering::Relaxed);
        self.answered.notify_waiters();
    }
}

type Outcome = Result<io::Result<Answer>, tokio::time::error::Elapsed>;

/// Clients that each send a request as soon as they have the answer to the one before.
pub(crate) struct Load {
    pub(crate) counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    /// Half of the clients open a connection for each request, half keep theirs.
    pub(crate) fn start(to: SocketAddr, clients: usize, path: &'static str) -> Load {
        Load::with(to, clients, path, |number| number % 2 == 1)
    }

    /// Clients that connect and are greeted, see [`greeting`].
    pub(crate) fn greeted(to: SocketAddr, clients: usize) -> Load {
        let mut load =
            Load { counts: Arc::default(), stop: Arc::default(), clients: JoinSet::new() };
        for _ in 0..clients {
            let (counts, stop) = (Arc::clone(&load.counts), Arc::clone(&load.stop));
            load.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let greeted = tokio::time::timeout(PATIENCE, greeting(to)).await;
                    counts.count(&greeted.map(|text| text.and_then(as_answer)));
                }
            });
        }
        load
    }

    /// Every client opens a connection for each request.
    pub(crate) fn short(to: SocketAddr, clients: usize, path: &'static str) -> Load {
        Load::with(to, clients, path, |_| false)
    }

    fn with(
        to: SocketAddr,
        clients: usize,
        path: &'static str,
        keeps: impl Fn(usize) -> bool,
    ) -> Load {
        let mut load =
            Load { counts: Arc::default(), stop: Arc::default(), clients: JoinSet::new() };
        for number in 0..clients {
            let (counts, stop) = (Arc::clone(&load.counts), Arc::clone(&load.stop));
            let keeps = keeps(number);
            load.clients.spawn(async move {
                if keeps {
                    kept_client(to, path, &counts, &stop).await;
                } else {
                    short_client(to, path, &counts, &stop).await;
                }
            });
        }
        load
    }

    /// Waits until this many more requests were answered.
    ///
    /// # Panics
    /// When that takes too long; `rig` tells what it saw.
    pub(crate) async fn answered(&self, rig: &Rig, more: u64) {
        let until = self.counts.ok() + more;
        let reached = tokio::time::timeout(PATIENCE, async {
            loop {
                let more = self.counts.answered.notified();
                if self.counts.ok() >= until {
                    return;
                }
                more.await;
            }
        });
        let still = || panic!("the load stands still: {:?}\n{}", self.counts, rig.story());
        reached.await.unwrap_or_else(|_| still());
    }

    /// Lets every client finish its request; prints and gives the counts.
    pub(crate) async fn finish(mut self, what: &str) -> Arc<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("a client never panics");
        }
        println!("{what}: {:?}", self.counts);
        self.counts
    }
}

/// A greeting that is missing is a connection that was cut.
fn as_answer(text: String) -> io::Result<Answer> {
    if text.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Answer { status: 200, body: text.into_bytes(), last: true })
}

async fn short_client(to: SocketAddr, path: &str, counts: &Counts, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        counts.count(&tokio::time::timeout(PATIENCE, get(to, path)).await);
    }
}

async fn kept_client(to: SocketAddr, path: &str, counts: &Counts, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut connection) = Kept::open(to).await else {
            counts.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        loop {
            if connection.is_closed() {
                counts.closed_idle.fetch_add(1, Ordering::Relaxed);
                break;
            }
            let outcome = tokio::time::timeout(PATIENCE, connection.get(path)).await;
            counts.count(&outcome);
            match outcome {
                Ok(Ok(answer)) if answer.last => {
                    counts.closed_politely.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Ok(Ok(_)) if !stop.load(Ordering::Relaxed) => {}
                _ => break,
            }
        }
    }
}
