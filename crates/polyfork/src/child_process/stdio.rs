//! What stands in each slot of a child's descriptor table, and our ends of what was made for it.
//!
//! Slots 0 to 2 get pipes, one way each; slots beyond get Unix socket pairs, two ways, as in Node. Pipes and not sockets
//! for the first three, because programs reopen `/dev/stdout`, which fails for a socket.
//!
//! The rule that surprises: whether a descriptor blocks belongs to what is open, not to the number, so a non-blocking
//! descriptor given away would make the child's reads fail. What is given by value for slots 0 to 2 is therefore made
//! blocking, and [`ChildStdin::share`] opens the pipe anew instead of copying the number.
//!
//! References: Node `lib/internal/child_process.js` (`getValidStdio`), libuv `uv__process_init_stdio`; pipe(7), proc(5).

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

/// What a child finds in one slot of its descriptor table.
///
/// Files, sockets and pipes of the standard library convert into it, by value: they are closed here when the child
/// has been started.
///
/// # Examples
///
/// ```no_run
/// use polyfork::child_process::{Command, Stdio};
///
/// let log = std::fs::File::create("log")?;
/// let mut command = Command::new("make");
/// command.stdin(Stdio::Ignore).stdout(Stdio::Pipe).stderr(log).stdio(3, Stdio::Pipe);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Stdio {
    /// A new pipe (slots 0 to 2) or a new two-way socket pair (slots beyond); our end is found in the
    /// [`Child`](super::Child).
    Pipe,
    /// What this process has under the same number, which must be open.
    Inherit,
    /// `/dev/null` for slots 0 to 2, nothing at all beyond.
    Ignore,
    /// This descriptor, whatever it is. In slots 0 to 2 it is made blocking.
    Fd(OwnedFd),
    /// The channel (Node: `'ipc'`), for [`fork_program`](super::fork_program) and its kin, once at most. Without it
    /// the channel is in slot 3. A command that is not forked cannot have one.
    Channel,
}

impl Stdio {
    /// A copy of a descriptor that stays open here too, `std::io::stdout()` for example. It is shared: so is whether it
    /// blocks, so use it for descriptors that do.
    ///
    /// # Errors
    /// `EMFILE`: no descriptors left.
    pub fn copy_of(fd: impl AsFd) -> io::Result<Self> {
        Ok(Stdio::Fd(fd.as_fd().try_clone_to_owned()?))
    }
}

macro_rules! from_owned {
    ($($kind:ty),* $(,)?) => {
        $(impl From<$kind> for Stdio {
            fn from(value: $kind) -> Self {
                Stdio::Fd(OwnedFd::from(value))
            }
        })*
    };
}

from_owned!(
    File,
    io::PipeReader,
    io::PipeWriter,
    std::net::TcpListener,
    std::net::TcpStream,
    std::net::UdpSocket,
    std::os::unix::net::UnixDatagram,
    std::os::unix::net::UnixListener,
    std::os::unix::net::UnixStream,
);

impl From<OwnedFd> for Stdio {
    fn from(fd: OwnedFd) -> Self {
        Stdio::Fd(fd)
    }
}

/// Held by each stream that is still open; when the last is gone, the child is closed.
#[derive(Debug)]
pub(super) struct Open(Option<mpsc::Sender<Infallible>>);

impl Open {
    pub(super) fn new(sender: &mpsc::Sender<Infallible>) -> Self {
        Self(Some(sender.clone()))
    }

    fn end(&mut self) {
        self.0 = None;
    }
}

/// Reads and notes the end: nothing was read although there was room, or an error.
fn read_and_note(
    stream: Pin<&mut impl AsyncRead>,
    open: &mut Open,
    cx: &mut Context<'_>,
    buf: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let before = buf.filled().len();
    let room = buf.remaining() > 0;
    let result = stream.poll_read(cx, buf);
    match &result {
        Poll::Ready(Ok(())) if room && buf.filled().len() == before => open.end(),
        Poll::Ready(Err(_)) => open.end(),
        _ => {}
    }
    result
}

/// The same pipe, opened anew: with a blocking mode of its own. Unlike a named pipe, one without a name is opened at
/// once, whether or not anybody has its other end.
fn reopen(pipe: BorrowedFd<'_>, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    Ok(rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty())?)
}

/// Our end of a child's standard input.
///
/// Dropping it closes it, which the child sees as the end of its input once it has read everything. Writes wait while
/// the pipe is full, and fail with `BrokenPipe` when nobody reads any more; no signal is raised.
#[derive(Debug)]
pub struct ChildStdin {
    pipe: pipe::Sender,
}

impl ChildStdin {
    pub(super) fn new(end: OwnedFd) -> io::Result<Self> {
        Ok(Self { pipe: pipe::Sender::from_owned_fd(end)? })
    }

    /// This pipe as the output of another child, while we may go on writing too. The reader sees the end when all have
    /// closed it.
    ///
    /// # Errors
    /// Those of open(2): no descriptors left, no `/proc`.
    pub fn share(&self) -> io::Result<Stdio> {
        Ok(Stdio::Fd(reopen(self.pipe.as_fd(), OFlags::WRONLY)?))
    }
}

impl AsFd for ChildStdin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl AsyncWrite for ChildStdin {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    /// A pipe cannot be shut down, only closed: drop it.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

impl TryFrom<ChildStdin> for Stdio {
    type Error = io::Error;

    /// The pipe as the output of another child.
    fn try_from(stdin: ChildStdin) -> io::Result<Stdio> {
        Ok(Stdio::Fd(stdin.pipe.into_blocking_fd()?))
    }
}

macro_rules! output_stream {
    ($name:ident, $what:literal) => {
        #[doc = concat!("Our end of a child's ", $what, ".")]
        ///
        /// Reads wait for the child and give nothing at the end, when every process that has the other end has closed
        /// it; a process the child left behind may keep it open for longer than the child lives. Dropping it makes
        /// the child's next write fail (`SIGPIPE`).
        #[derive(Debug)]
        pub struct $name {
            pipe: pipe::Receiver,
            open: Open,
        }

        impl $name {
            pub(super) fn new(end: OwnedFd, open: Open) -> io::Result<Self> {
                Ok(Self { pipe: pipe::Receiver::from_owned_fd(end)?, open })
            }

            /// This pipe as the input of another child, while it stays open here: what that one leaves can be read
            /// here afterwards.
            ///
            /// # Errors
            /// Those of open(2): no descriptors left, no `/proc`.
            pub fn share(&self) -> io::Result<Stdio> {
                Ok(Stdio::Fd(reopen(self.pipe.as_fd(), OFlags::RDONLY)?))
            }
        }

        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.pipe.as_fd()
            }
        }

        impl AsyncRead for $name {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                let this = self.get_mut();
                read_and_note(Pin::new(&mut this.pipe), &mut this.open, cx, buf)
            }
        }

        impl TryFrom<$name> for Stdio {
            type Error = io::Error;

            /// The pipe as the input of another child: the bytes never pass through this process.
            fn try_from(stream: $name) -> io::Result<Stdio> {
                Ok(Stdio::Fd(stream.pipe.into_blocking_fd()?))
            }
        }
    };
}

output_stream!(ChildStdout, "standard output");
output_stream!(ChildStderr, "standard error");

/// Our end of the two-way pipe in a slot beyond 2.
#[derive(Debug)]
pub struct ChildSocket {
    socket: UnixStream,
    open: Open,
}

impl ChildSocket {
    pub(super) fn new(end: OwnedFd, open: Open) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixStream::from(end);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixStream::from_std(socket)?, open })
    }
}

impl AsFd for ChildSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsyncRead for ChildSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        read_and_note(Pin::new(&mut this.socket), &mut this.open, cx, buf)
    }
}

impl AsyncWrite for ChildSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    /// Ends our direction: the child reads its end, and may still write.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
