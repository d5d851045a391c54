//! Sockets and files on their way through a channel.
//!
//! Which envelope Node wants for each is here, and what a descriptor that came really is. Pairing descriptors
//! with messages is in `codec`.
//!
//! The rule that surprises: a descriptor is looked at, never believed. Whatever the message says, the system is
//! asked what came; what the channel does not carry is closed.
//!
//! Behaviour follows: Node `lib/internal/child_process.js` (`handleConversion`).

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use polyfork_sys::channel::{FdKind, kind, set_nonblocking};
use polyfork_wire::node::message::{DgramType, HandleKind};
use rustix::net::{AddressFamily, sockopt};

use super::SendError;
use crate::shared_memory::{MOST_RECEIVED_BYTES, SharedArrayBuffer};

/// How long the accept queue is of a socket that we make listen, as in Node.
const BACKLOG: i32 = 511;

/// Something the other process shall have as well, or has sent.
///
/// What is received is close-on-exec, and sockets are non-blocking: tokio's `from_std` takes them as they are.
/// Sending makes a socket non-blocking, for every process that has it: Node cannot live with another.
///
/// | handle | Node makes of it |
/// | --- | --- |
/// | [`TcpListener`](Self::TcpListener), [`UnixListener`](Self::UnixListener) | `net.Server` |
/// | [`TcpStream`](Self::TcpStream), [`UnixStream`](Self::UnixStream) | `net.Socket` |
/// | [`UdpSocket`](Self::UdpSocket) | `dgram.Socket` |
/// | [`BoundTcp`](Self::BoundTcp) | `net.BoundSocket`; Node 25 and older end with an error |
/// | [`File`](Self::File), [`Fd`](Self::Fd) | refused before anything is sent: Node would abort |
/// | [`Memory`](Self::Memory) | refused before anything is sent: Node shares memory between threads only |
#[derive(Debug)]
#[non_exhaustive]
pub enum Handle {
    /// A listening TCP socket.
    TcpListener(TcpListener),
    /// A TCP connection.
    TcpStream(TcpStream),
    /// A listening Unix stream socket.
    UnixListener(UnixListener),
    /// A connection of a Unix stream socket.
    UnixStream(UnixStream),
    /// A UDP socket.
    UdpSocket(UdpSocket),
    /// A TCP socket that has an address and neither listens nor is connected, for whoever gets it to decide.
    /// Between two Rust programs it arrives as a [`TcpStream`](Self::TcpStream), since the system cannot tell
    /// it from a connection that has ended.
    BoundTcp(OwnedFd),
    /// A regular file. Between two Rust programs only.
    File(File),
    /// Memory that both processes have from then on. Between two Rust programs only. What comes is this only if
    /// it is sealed as it must be and not longer than
    /// [`MOST_RECEIVED_BYTES`], else it is a [`File`](Self::File).
    Memory(SharedArrayBuffer),
    /// Anything else that has a descriptor. Between two Rust programs only.
    Fd(OwnedFd),
}

impl Handle {
    /// What this descriptor is, whatever anybody says.
    pub(super) fn look(fd: OwnedFd) -> Handle {
        let socket = |fd: OwnedFd, make: fn(OwnedFd) -> Handle| {
            // It belongs to us now; should this fail, the first use tells.
            let _ = set_nonblocking(fd.as_fd(), true);
            make(fd)
        };
        match kind(fd.as_fd()) {
            Ok(FdKind::TcpListener) => socket(fd, |fd| Handle::TcpListener(fd.into())),
            Ok(FdKind::TcpStream) => socket(fd, |fd| Handle::TcpStream(fd.into())),
            Ok(FdKind::UnixListener) => socket(fd, |fd| Handle::UnixListener(fd.into())),
            Ok(FdKind::UnixStream) => socket(fd, |fd| Handle::UnixStream(fd.into())),
            Ok(FdKind::Udp) => socket(fd, |fd| Handle::UdpSocket(fd.into())),
            Ok(FdKind::File) => Handle::look_at_file(fd),
            _ => Handle::Fd(fd),
        }
    }

    fn look_at_file(fd: OwnedFd) -> Handle {
        match SharedArrayBuffer::adopt(fd, MOST_RECEIVED_BYTES) {
            Ok(memory) => Handle::Memory(memory),
            Err((_, fd)) => Handle::File(fd.into()),
        }
    }

    /// Its descriptor.
    ///
    /// # Errors
    /// Of [`Memory`](Self::Memory), which may be in use elsewhere, this is a copy: no descriptors left.
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(match self {
            Handle::TcpListener(it) => it.into(),
            Handle::TcpStream(it) => it.into(),
            Handle::UnixListener(it) => it.into(),
            Handle::UnixStream(it) => it.into(),
            Handle::UdpSocket(it) => it.into(),
            Handle::File(it) => it.into(),
            Handle::Memory(it) => it.as_fd().try_clone_to_owned()?,
            Handle::BoundTcp(it) | Handle::Fd(it) => it,
        })
    }

    /// What came from a Node process that announced this; `None`, and closed, for what Node does not send.
    pub(super) fn from_node(fd: OwnedFd, announced: &HandleKind) -> Option<Handle> {
        let handle = Handle::look(fd);
        match handle {
            Handle::File(_) | Handle::Memory(_) | Handle::Fd(_) => None,
            Handle::TcpStream(stream) if *announced == HandleKind::NetBoundSocket => {
                Some(Handle::BoundTcp(stream.into()))
            }
            // Node listens again on what it receives as a server, so a bound socket may come as well.
            Handle::TcpStream(_) | Handle::UnixStream(_) if *announced == HandleKind::NetServer => {
                let fd = handle.into_fd().ok()?;
                rustix::net::listen(&fd, BACKLOG).is_ok().then(|| Handle::look(fd))
            }
            handle => Some(handle),
        }
    }

    /// Makes it fit for sending.
    pub(crate) fn prepare(&self) -> Result<(), SendError> {
        if matches!(self, Handle::File(_) | Handle::Memory(_) | Handle::Fd(_)) {
            return Ok(());
        }
        set_nonblocking(self.as_fd(), true)
            .map_err(|_| SendError::Handle("its socket cannot be made non-blocking"))
    }

    /// The envelope a Node process wants for it.
    pub(crate) fn node_kind(&self) -> Result<(HandleKind, Option<DgramType>), SendError> {
        let is = |wanted: FdKind| kind(self.as_fd()).is_ok_and(|found| found == wanted);
        let sound = match self {
            Handle::TcpListener(_) => is(FdKind::TcpListener),
            Handle::TcpStream(_) => is(FdKind::TcpStream),
            Handle::UnixListener(_) => is(FdKind::UnixListener),
            Handle::UnixStream(_) => is(FdKind::UnixStream),
            Handle::UdpSocket(_) => is(FdKind::Udp),
            Handle::BoundTcp(fd) => is(FdKind::TcpStream) && rustix::net::getpeername(fd).is_err(),
            Handle::File(_) => return Err(SendError::Handle("Node aborts on a file")),
            Handle::Memory(_) => {
                return Err(SendError::Handle("Node shares memory between threads only"));
            }
            Handle::Fd(_) => return Err(SendError::Handle("Node takes only sockets")),
        };
        if !sound {
            return Err(SendError::Handle("its descriptor is not the socket it is said to be"));
        }
        Ok(match self {
            Handle::TcpListener(_) | Handle::UnixListener(_) => (HandleKind::NetServer, None),
            Handle::UdpSocket(socket) => {
                let v6 = sockopt::socket_domain(socket).is_ok_and(|d| d == AddressFamily::INET6);
                let family = if v6 { DgramType::Udp6 } else { DgramType::Udp4 };
                (HandleKind::DgramSocket, Some(family))
            }
            Handle::BoundTcp(_) => (HandleKind::NetBoundSocket, None),
            _ => (HandleKind::NetSocket, None),
        })
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Handle::TcpListener(it) => it.as_fd(),
            Handle::TcpStream(it) => it.as_fd(),
            Handle::UnixListener(it) => it.as_fd(),
            Handle::UnixStream(it) => it.as_fd(),
            Handle::UdpSocket(it) => it.as_fd(),
            Handle::BoundTcp(it) => it.as_fd(),
            Handle::File(it) => it.as_fd(),
            Handle::Memory(it) => it.as_fd(),
            Handle::Fd(it) => it.as_fd(),
        }
    }
}

macro_rules! from {
    ($($kind:ident($type:ty)),+ $(,)?) => {$(
        impl From<$type> for Handle {
            fn from(it: $type) -> Handle {
                Handle::$kind(it)
            }
        }
    )+};
}

from! {
    TcpListener(TcpListener),
    TcpStream(TcpStream),
    UnixListener(UnixListener),
    UnixStream(UnixStream),
    UdpSocket(UdpSocket),
    File(File),
    Memory(SharedArrayBuffer),
    Fd(OwnedFd),
}
