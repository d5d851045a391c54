//! A connected pair of stream sockets that carries bytes and descriptors.
//!
//! Sends, receives and tells what kind of thing arrived; frames, windows and who may send what belong
//! to `polyfork-wire` and `polyfork-core`.
//!
//! The surprising rules of the kernel, all kept here: a plain `read(2)` drops descriptors, so only
//! `recvmsg` is used; descriptors sent with no byte vanish, so at least one is demanded; a receiver
//! at its descriptor limit loses them with only `MSG_CTRUNC` to tell, so that is passed on; more than
//! 253 in one message is refused before any call.
//!
//! Behaviour follows: unix(7), cmsg(3), recvmsg(2).

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sockopt,
};

/// The most descriptors one message can carry (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Room for the control data of a full message.
const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));

/// What one [`receive`] brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes written to the start of the buffer. Zero: the other side has closed.
    pub len: usize,
    /// Descriptors were lost: this process is at its descriptor limit. What they belonged to must be
    /// treated as lost, and the sender still has its copy or nobody has.
    pub truncated: bool,
}

/// Makes a channel: our end (non-blocking) and the child's (blocking), both close-on-exec.
///
/// # Errors
///
/// `EMFILE` and `ENFILE`: no descriptors left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_nonblocking(ours.as_fd(), true)?;
    Ok((ours, theirs))
}

/// Sends bytes and with the first of them the descriptors; returns how many bytes went.
///
/// If any byte went, all descriptors did. The kernel holds its own reference to each: closing ours
/// afterwards is safe for a live receiver (for a dying one see the header of `steal`).
///
/// # Errors
///
/// - `InvalidInput`: no byte, or more than [`MAX_FDS`] descriptors; nothing was sent.
/// - `WouldBlock`: the channel is full, nothing was sent.
/// - `EPIPE`, `ECONNRESET`: the other side is gone. Never a SIGPIPE.
/// - `ETOOMANYREFS`: too many descriptors of this user are under way; try again later.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if bytes.is_empty() {
        let text = "at least one byte must be sent: descriptors do not travel alone";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    if fds.len() > MAX_FDS {
        let text =
            format!("{} descriptors in one message, at most {MAX_FDS} can travel", fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("control buffer too small for its own limit"));
    }
    loop {
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Receives what there is: bytes into `buf`, descriptors (close-on-exec from birth) to the back of `fds`.
///
/// The kernel never merges two messages that carry descriptors, so those of one call belong to a
/// message whose first byte is among the bytes of this call.
///
/// # Errors
///
/// - `InvalidInput`: an empty buffer, which could not be told from the end.
/// - `WouldBlock`: nothing there now.
/// - `ECONNRESET`: the other side closed without reading all we sent. What it sent has been read before.
pub fn receive(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
) -> io::Result<Received> {
    receive_with(socket, buf, fds, RecvFlags::empty())
}

pub(crate) fn receive_with(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<Received> {
    if buf.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "empty receive buffer"));
    }
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buf)], &mut control, flags) {
            Err(Errno::INTR) => {}
            result => break result?,
        }
    };
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    Ok(Received { len: message.bytes, truncated: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Takes over this process's inherited end of a channel, known by number from its environment. The descriptor
/// becomes close-on-exec and non-blocking.
///
/// Once per process: a number can be turned into an owner only once. Standard input, output and error are
/// never owned: a channel there is moved to another number, and `/dev/null` takes its place.
///
/// # Errors
///
/// - `AlreadyExists`: some channel has been taken before.
/// - `InvalidInput`: a negative number, or no connected Unix stream socket.
/// - `EBADF`: nothing is open under this number.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        let text = "the channel of this process has been taken already";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    let moved = check_inherited(fd).and_then(|()| vacate_standard(fd));
    match moved {
        Ok(None) => {}
        Ok(Some(moved)) => return Ok(moved),
        Err(error) => {
            TAKEN.store(false, Ordering::Relaxed);
            return Err(error);
        }
    }
    // SAFETY: the number is open, as just seen. It was inherited over exec, so nothing in this process owns
    // it unless we made an owner before; the flag, which a success never clears, says that we did not.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check_inherited(fd: RawFd) -> io::Result<()> {
    if fd < 0 {
        let text = format!("descriptor {fd} cannot be a channel");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: fcntl(2) with F_GETFD takes any number and touches no memory; EBADF if it is not open.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, as just seen, and an inherited number has no owner in this process that could close it
    // before this function returns: the only one is made by our caller, which let no other in.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let kind = kind(inherited)?;
    if kind != FdKind::UnixStream {
        let text = format!("descriptor {fd} is not a Unix stream socket but {kind:?}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    rustix::net::getpeername(inherited)?;
    set_nonblocking(inherited, true)?;
    rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::CLOEXEC)?;
    Ok(())
}

/// Moves a channel away from the place of a standard stream, which the whole process believes to be open.
fn vacate_standard(fd: RawFd) -> io::Result<Option<OwnedFd>> {
    if fd > libc::STDERR_FILENO {
        return Ok(None);
    }
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: open, as its caller has seen, and standard streams have no owner that could close them.
    let standard = unsafe { BorrowedFd::borrow_raw(fd) };
    let moved = rustix::io::fcntl_dupfd_cloexec(standard, libc::STDERR_FILENO + 1)?;
    // SAFETY: both numbers are open. What borrowed the standard stream finds another stream there, as after
    // any redirection; the number itself stays open throughout. No close-on-exec: streams are inherited.
    if unsafe { libc::dup2(null.as_raw_fd(), fd) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(Some(moved))
}

/// What a descriptor stands for, as far as a receiver has to care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FdKind {
    /// A listening TCP socket.
    TcpListener,
    /// Any other TCP socket: connected, or not yet.
    TcpStream,
    /// A listening Unix stream socket.
    UnixListener,
    /// Any other Unix stream socket.
    UnixStream,
    /// A UDP socket.
    Udp,
    /// A Unix datagram socket.
    UnixDatagram,
    /// A Unix sequenced-packet socket.
    UnixSeqpacket,
    /// A pipe or FIFO.
    Fifo,
    /// A regular file.
    File,
    /// Anything else: terminal, device, directory, other sockets.
    Other,
}

/// Looks at a descriptor from outside: never trust what the sender says it is.
///
/// # Errors
///
/// Those of `fstat` and `getsockopt`; none is expected of an open descriptor.
pub fn kind(fd: BorrowedFd<'_>) -> io::Result<FdKind> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo => FdKind::Fifo,
        FileType::RegularFile => FdKind::File,
        FileType::Socket => socket_kind(fd)?,
        _ => FdKind::Other,
    })
}

fn socket_kind(fd: BorrowedFd<'_>) -> io::Result<FdKind> {
    let internet = |domain| domain == AddressFamily::INET || domain == AddressFamily::INET6;
    let domain = sockopt::socket_domain(fd)?;
    let kind = sockopt::socket_type(fd)?;
    let protocol = sockopt::socket_protocol(fd)?;
    let listening = sockopt::socket_acceptconn(fd)?;
    Ok(if internet(domain) && kind == SocketType::STREAM {
        match protocol {
            Some(rustix::net::ipproto::TCP) if listening => FdKind::TcpListener,
            Some(rustix::net::ipproto::TCP) => FdKind::TcpStream,
            _ => FdKind::Other,
        }
    } else if internet(domain) && kind == SocketType::DGRAM {
        if protocol == Some(rustix::net::ipproto::UDP) { FdKind::Udp } else { FdKind::Other }
    } else if domain == AddressFamily::UNIX {
        match kind {
            SocketType::STREAM if listening => FdKind::UnixListener,
            SocketType::STREAM => FdKind::UnixStream,
            SocketType::DGRAM => FdKind::UnixDatagram,
            SocketType::SEQPACKET => FdKind::UnixSeqpacket,
            _ => FdKind::Other,
        }
    } else {
        FdKind::Other
    })
}

/// Switches a descriptor between blocking and non-blocking.
///
/// The flag belongs to what is open, not to the number: everyone who has a copy sees the change.
///
/// # Errors
///
/// Those of fcntl(2); none is expected.
pub fn set_nonblocking(fd: BorrowedFd<'_>, yes: bool) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    let mut wanted = flags;
    wanted.set(OFlags::NONBLOCK, yes);
    if wanted != flags {
        rustix::fs::fcntl_setfl(fd, wanted)?;
    }
    Ok(())
}

/// The kernel's name for a socket (`SO_COOKIE`): the same for every copy, never reused while the
/// machine runs. Note it for a child's end before the child gets it, and [`crate::steal`] can tell
/// whether the number still means that socket.
///
/// # Errors
///
/// Those of getsockopt(2): not a socket.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(sockopt::socket_cookie(socket)?)
}

/// Takes back what a process has not read from its end of a channel: see [`crate::steal::unread`].
///
/// The process is named by its pidfd alone.
///
/// # Errors
///
/// Those of [`crate::steal::unread`].
pub fn steal_unread(
    pidfd: BorrowedFd<'_>,
    fd_number: i32,
) -> Result<crate::steal::Unread, crate::steal::StealError> {
    let pid = crate::steal::pid_of(pidfd)?;
    crate::steal::unread(pidfd, pid, fd_number)
}
