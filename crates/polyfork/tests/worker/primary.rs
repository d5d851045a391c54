//! A primary that says what a test tells it to, and shows what the worker says.
//!
//! Built from the frames and the channel alone: nothing here decides anything, so it can also lie.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use polyfork::cluster::Worker;
use polyfork_sys::channel;
use polyfork_wire::limits::Limits;
use polyfork_wire::native::{self, FrameDecoder, ListenAddress, PROTOCOL, ToPrimary, ToWorker};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// For what should happen at once. Generous: the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// The grace period that `welcome` tells.
pub(crate) const GRACE: Duration = Duration::from_secs(7);

/// The other end of a worker's channel.
pub(crate) struct Primary {
    socket: UnixStream,
    decoder: FrameDecoder<OwnedFd>,
}

/// Waits for what should happen at once.
pub(crate) async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(SOON, event).await.expect("did not happen")
}

/// Whether `event` has happened; asks once.
pub(crate) async fn has_happened<F: Future>(event: F) -> bool {
    tokio::pin!(event);
    std::future::poll_fn(|cx| std::task::Poll::Ready(event.as_mut().poll(cx).is_ready())).await
}

/// Sends until neither the socket nor the worker's queue takes more; returns how many messages they took.
pub(crate) async fn fill(worker: &Worker) -> usize {
    let mut taken = 0;
    loop {
        let before = taken;
        while has_happened(worker.send(&[1u8; 10_000][..])).await {
            taken += 1;
            assert!(taken < 1_000, "more than 10 MB were queued");
        }
        if taken == before {
            return taken;
        }
        // The worker's writer gets its turn.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Primary {
    /// A worker and its primary, before a word was said.
    pub(crate) fn silent() -> (Worker, Primary) {
        let (ours, theirs) = channel::pair().unwrap();
        let worker = Worker::from_channel(theirs).unwrap();
        let socket = UnixStream::from_std(ours.into()).unwrap();
        (worker, Primary { socket, decoder: FrameDecoder::new(Limits::default()) })
    }

    /// A worker and its primary, after the greeting.
    pub(crate) async fn new() -> (Worker, Primary) {
        let (worker, mut primary) = Primary::silent();
        let hello = primary.next().await;
        assert_eq!(hello, ToPrimary::Hello { protocol: PROTOCOL, pid: std::process::id() });
        let grace_ms = GRACE.as_millis().try_into().unwrap();
        let welcome =
            ToWorker::Welcome { protocol: PROTOCOL, worker: 41, slot: 2, generation: 3, grace_ms };
        primary.say(&welcome, &[]).await;
        (worker, primary)
    }

    /// What the worker says next.
    pub(crate) async fn next(&mut self) -> ToPrimary {
        soon(self.try_next()).await.expect("the worker closed its channel")
    }

    /// What the worker says next; `None` when it closed its channel.
    pub(crate) async fn try_next(&mut self) -> Option<ToPrimary> {
        loop {
            if let Some(frame) = self.decoder.next::<ToPrimary>().unwrap() {
                assert!(frame.descriptors.is_empty());
                return Some(frame.message);
            }
            let mut buffer = [0; 4096];
            let mut fds = VecDeque::new();
            let socket = &self.socket;
            let received = socket
                .async_io(Interest::READABLE, || {
                    channel::receive(socket.as_fd(), &mut buffer, &mut fds)
                })
                .await;
            match received {
                Ok(received) if received.len > 0 => self.decoder.feed(&buffer[..received.len]),
                _ => return None,
            }
        }
    }

    /// Everything the worker has said up to now.
    pub(crate) async fn said(&mut self, worker: &Worker) -> Vec<ToPrimary> {
        worker.status("now");
        let mut said = Vec::new();
        loop {
            match self.next().await {
                ToPrimary::Status { text } if text == "now" => return said,
                frame => said.push(frame),
            }
        }
    }

    /// Says something.
    pub(crate) async fn say(&self, frame: &ToWorker, fds: &[BorrowedFd<'_>]) {
        self.say_raw(&native::encode(frame, fds.len()), fds).await;
    }

    /// Sends bytes, whatever they mean.
    pub(crate) async fn say_raw(&self, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) {
        while !bytes.is_empty() {
            let socket = &self.socket;
            let send = || channel::send(socket.as_fd(), bytes, fds);
            let sent = soon(socket.async_io(Interest::WRITABLE, send)).await.unwrap();
            bytes = &bytes[sent..];
            fds = &[];
        }
    }

    /// Waits until the worker has heard everything that was said so far.
    pub(crate) async fn heard(&self, worker: &Worker) {
        self.say(&ToWorker::Message(Vec::new()), &[]).await;
        soon(worker.recv()).await.expect("the channel is open");
    }

    /// Answers a request to listen with a listening socket, or with a promise to hand connections over.
    pub(crate) async fn open(&mut self, listener: u32, socket: Option<&TcpListener>) {
        let (request, asked) = match self.next().await {
            ToPrimary::Listen { request, address, .. } => (request, address),
            other => panic!("not a request to listen: {other:?}"),
        };
        let address = match socket {
            Some(socket) => ListenAddress::Tcp(socket.local_addr().unwrap()),
            None => asked,
        };
        let handoff = socket.is_none();
        let answer = ToWorker::Listening { request, listener, address, handoff };
        let fds: Vec<_> = socket.iter().map(|socket| socket.as_fd()).collect();
        self.say(&answer, &fds).await;
    }

    /// Hands connections over.
    pub(crate) async fn hand_over(&self, listener: u32, first_seq: u64, connections: &[OwnedFd]) {
        let count = connections.len().try_into().unwrap();
        let frame = ToWorker::Connections { listener, first_seq, count };
        let fds: Vec<_> = connections.iter().map(AsFd::as_fd).collect();
        self.say(&frame, &fds).await;
    }
}

/// Clients and the accepted ends of their connections.
pub(crate) fn connections(count: usize) -> io::Result<(Vec<TcpStream>, Vec<OwnedFd>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut clients = Vec::new();
    let mut accepted = Vec::new();
    for _ in 0..count {
        clients.push(TcpStream::connect(listener.local_addr()?)?);
        let connection = listener.accept()?.0;
        connection.set_nonblocking(true)?;
        accepted.push(connection.into());
    }
    Ok((clients, accepted))
}
