//! What a worker accepts from: one type for both mechanisms.
//!
//! Under the kernel mechanism a listener has a listening socket (`own`); under hand-over it has a queue that
//! the channel fills (`handed`). Programs see no difference. Who gets which connection is decided elsewhere.
//!
//! The rule that surprises: `accept` does not fail for what concerns one connection or will pass (a client
//! that went away, no descriptor left). It goes on by itself, after a pause where needed.
//!
//! Behaviour follows: Node `lib/net.js`; tokio `TcpListener`; axum `serve::Listener`.

#[cfg(feature = "axum")]
mod axum;
pub(crate) mod handed;
#[cfg(feature = "axum")]
mod http;
mod own;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::SocketAddrAny;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpStream, UnixStream};
use tokio_stream::Stream;

use super::worker::{Mark, Registration, Source};
#[cfg(feature = "axum")]
pub use axum::RemoteAddr;
use handed::Handed;
#[cfg(feature = "axum")]
pub use http::serve;
use own::OwnSocket;

/// Most connections that are taken from a listening socket after the stop has begun. They were waiting in it
/// already; a program that goes on accepting under load must not take new ones for ever.
const LAST_CONNECTIONS: u32 = 128;

/// How to listen.
///
/// ```
/// use polyfork::cluster::ListenOptions;
/// let options = ListenOptions::default().backlog(4096).ipv6_only(true);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenOptions {
    pub(crate) backlog: u32,
    pub(crate) ipv6_only: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        ListenOptions { backlog: 1024, ipv6_only: false }
    }
}

impl ListenOptions {
    /// How many connections may wait to be accepted, at least 1; the kernel caps it (`somaxconn`). Default
    /// 1024.
    #[must_use]
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections.max(1);
        self
    }

    /// Whether an IPv6 address takes no IPv4 connections. Default false, as in Node.
    #[must_use]
    pub fn ipv6_only(mut self, yes: bool) -> Self {
        self.ipv6_only = yes;
        self
    }
}

/// A TCP listener of a worker, made by [`Worker::listen`](super::Worker::listen).
///
/// With feature `axum` it is an `axum::serve::Listener`; [`Listener::into_stream`] is what tonic's
/// `serve_with_incoming_shutdown` takes; for hyper, [`accept`](Listener::accept) in a loop. Connections are
/// plain [`TcpStream`]s with the system's options: `TCP_NODELAY` is off.
///
/// After the [end of the worker](super::Worker#the-end-of-a-worker) has begun, what already waits in the
/// listening socket is still accepted, then `accept` waits for ever: select on
/// [`shutdown`](super::Worker::shutdown) beside it.
///
/// Dropping the listener gives what waits in it to other workers, and tells the primary.
#[derive(Debug)]
pub struct Listener {
    intake: Intake,
    address: SocketAddr,
}

/// A Unix stream listener of a worker, made by [`Worker::listen_unix`](super::Worker::listen_unix). Otherwise
/// like [`Listener`].
#[derive(Debug)]
pub struct UnixListener {
    intake: Intake,
    path: PathBuf,
    _file: Option<SocketFile>,
}

/// The connections of a listener as a stream that never ends; see [`Listener::into_stream`].
#[derive(Debug)]
pub struct Incoming<L>(L);

impl Listener {
    pub(super) fn opened(
        address: SocketAddr,
        source: Source,
        registration: Registration,
    ) -> io::Result<Listener> {
        Ok(Listener { intake: Intake::new(source, registration)?, address })
    }

    /// Binds without a primary.
    pub(super) fn bind(
        address: SocketAddr,
        options: ListenOptions,
        registration: Registration,
    ) -> io::Result<Listener> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(options.ipv6_only)?;
        }
        listen(&socket, &SockAddr::from(address), options)?;
        let bound = socket.local_addr()?.as_socket().unwrap_or(address);
        Listener::opened(bound, Source::Socket(socket.into()), registration)
    }

    /// The next connection and the address of its client.
    ///
    /// A connection that was handed over is acknowledged to the primary before it is returned. Cancel safe:
    /// no connection is lost when the future is dropped.
    ///
    /// # Errors
    /// Only what never passes, such as a descriptor that is no listening socket; see the module's rule.
    pub async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        std::future::poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// [`Listener::accept`] as a poll.
    ///
    /// # Errors
    /// As [`Listener::accept`].
    pub fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        loop {
            let (connection, peer) = ready!(self.intake.poll_accept(cx))?;
            if let Some(connection) = tcp(connection, peer) {
                return Poll::Ready(Ok(connection));
            }
        }
    }

    /// Where it listens, with the real port. All workers have the same.
    ///
    /// # Errors
    /// None; the signature is that of [`tokio::net::TcpListener::local_addr`].
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    /// The connections as a stream that never ends.
    ///
    /// tonic: `server.serve_with_incoming_shutdown(listener.into_stream(), worker.shutdown())`.
    pub fn into_stream(self) -> Incoming<Listener> {
        Incoming(self)
    }
}

impl UnixListener {
    pub(super) fn opened(
        path: PathBuf,
        source: Source,
        registration: Registration,
    ) -> io::Result<UnixListener> {
        Ok(UnixListener { intake: Intake::new(source, registration)?, path, _file: None })
    }

    /// Binds without a primary.
    pub(super) fn bind(
        path: &Path,
        options: ListenOptions,
        registration: Registration,
    ) -> io::Result<UnixListener> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
        let address = SockAddr::unix(path)?;
        match listen(&socket, &address, options) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_abandoned(path, &address)? => {
                std::fs::remove_file(path)?;
                listen(&socket, &address, options)?;
            }
            result => result?,
        }
        let mut listener =
            UnixListener::opened(path.to_owned(), Source::Socket(socket.into()), registration)?;
        listener._file = SocketFile::of(path);
        Ok(listener)
    }

    /// The next connection.
    ///
    /// # Errors
    /// As [`Listener::accept`].
    pub async fn accept(&mut self) -> io::Result<(UnixStream, tokio::net::unix::SocketAddr)> {
        std::future::poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// [`UnixListener::accept`] as a poll.
    ///
    /// # Errors
    /// As [`Listener::accept`].
    pub fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<(UnixStream, tokio::net::unix::SocketAddr)>> {
        loop {
            let (connection, _) = ready!(self.intake.poll_accept(cx))?;
            let stream = UnixStream::from_std(connection.into());
            if let Ok((stream, peer)) = stream.and_then(|s| s.peer_addr().map(|peer| (s, peer))) {
                return Poll::Ready(Ok((stream, peer)));
            }
        }
    }

    /// Where it listens. A leading NUL byte marks a Linux abstract name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connections as a stream that never ends.
    pub fn into_stream(self) -> Incoming<UnixListener> {
        Incoming(self)
    }
}

impl<L> Incoming<L> {
    /// The listener, to ask it for its address.
    pub fn get_ref(&self) -> &L {
        &self.0
    }
}

impl Stream for Incoming<Listener> {
    type Item = io::Result<TcpStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

impl Stream for Incoming<UnixListener> {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

/// The part that TCP and Unix listeners have in common.
#[derive(Debug)]
struct Intake {
    source: From,
    registration: Registration,
    /// Whether the primary knows that the program accepts.
    announced: bool,
    /// How many more may be taken once the stop has begun.
    last: u32,
}

#[derive(Debug)]
enum From {
    Own {
        socket: OwnSocket,
        /// Nothing waited in the socket when it was last asked.
        empty: bool,
    },
    Handed {
        queue: Arc<Handed>,
        /// Taken by the program, and on its way to it once the acknowledgement has left.
        taken: Option<(Mark, OwnedFd)>,
    },
}

impl Intake {
    fn new(source: Source, registration: Registration) -> io::Result<Intake> {
        let source = match source {
            Source::Socket(socket) => {
                polyfork_sys::channel::set_nonblocking(socket.as_fd(), true)?;
                From::Own { socket: OwnSocket::new(socket)?, empty: false }
            }
            Source::Handed(queue) => From::Handed { queue, taken: None },
        };
        Ok(Intake { source, registration, announced: false, last: LAST_CONNECTIONS })
    }

    fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<(OwnedFd, Option<SocketAddrAny>)>> {
        if !std::mem::replace(&mut self.announced, true) {
            self.registration.accepting();
        }
        match &mut self.source {
            From::Own { socket, empty } if self.registration.is_stopping() => {
                // What waited when the stop began was promised to this worker; nothing new was.
                if *empty || self.last == 0 {
                    return Poll::Pending;
                }
                self.last -= 1;
                match socket.try_accept() {
                    Some(accepted) => Poll::Ready(Ok(accepted)),
                    None => {
                        *empty = true;
                        Poll::Pending
                    }
                }
            }
            From::Own { socket, empty } => {
                let accepted = socket.poll_accept(cx);
                *empty = accepted.is_pending();
                accepted
            }
            From::Handed { queue, taken } => {
                poll_handed(queue, taken, &self.registration, cx).map(|c| Ok((c, None)))
            }
        }
    }
}

/// The next connection that was handed over, once its acknowledgement has left the process.
fn poll_handed(
    queue: &Handed,
    taken: &mut Option<(Mark, OwnedFd)>,
    registration: &Registration,
    cx: &mut Context<'_>,
) -> Poll<OwnedFd> {
    loop {
        if let Some((mark, _)) = taken {
            let written = ready!(registration.poll_written(cx, *mark));
            // Channel at its end: whether the primary knows that it is ours nobody can tell, so we let go.
            if let (Ok(()), Some((_, connection))) = (written, taken.take()) {
                return Poll::Ready(connection);
            }
        }
        let (seq, connection) = ready!(queue.poll_take(cx));
        // Only a descriptor that is none could fail here, and then so does everything that follows.
        let _ = polyfork_sys::channel::set_nonblocking(connection.as_fd(), true);
        *taken = registration.acknowledge(seq).map(|mark| (mark, connection));
    }
}

/// A stream of the event loop; `None` when the client is gone already.
fn tcp(connection: OwnedFd, peer: Option<SocketAddrAny>) -> Option<(TcpStream, SocketAddr)> {
    let stream = TcpStream::from_std(connection.into()).ok()?;
    let peer = match peer.and_then(|peer| SocketAddr::try_from(peer).ok()) {
        Some(peer) => peer,
        None => stream.peer_addr().ok()?,
    };
    Some((stream, peer))
}

fn listen(socket: &Socket, address: &SockAddr, options: ListenOptions) -> io::Result<()> {
    socket.bind(address)?;
    socket.listen(i32::try_from(options.backlog).unwrap_or(i32::MAX))
}

/// Whether the file at `path` is a socket that nobody listens on.
fn is_abandoned(path: &Path, address: &SockAddr) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        return Ok(false);
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    let refused = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    Ok(probe.connect(address).is_err_and(|e| refused(&e)))
}

/// The file of a Unix socket that this process bound, removed when the listener is dropped.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode: somebody may have put another file in its place.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> Option<SocketFile> {
        Some(SocketFile { identity: identity(path)?, path: path.to_owned() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path) == Some(self.identity) {
            // Another process may have been faster; either way it is gone.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}
