//! The descriptor of a channel on tokio's event loop: one read, one write, and what their errors mean.
//!
//! What is read and written is decided by the callers. Errors of the kernel come out as the few cases a
//! channel must tell apart.
//!
//! The rule that surprises: a read that fills less than the buffer has emptied the socket, unless it brought
//! descriptors, where the kernel stops early. So the second read that would only say "nothing there" is left
//! out.
//!
//! References: unix(7), recvmsg(2), sendmsg(2), Linux `net/unix/af_unix.c` (`unix_stream_read_generic`).

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use polyfork_sys::channel::{self, Received};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cluster::register::register;

/// How long to wait when the kernel is out of buffers, or too many descriptors are under way.
pub(crate) const SHORTAGE_PAUSE: Duration = Duration::from_millis(20);

/// One end of a channel, non-blocking.
#[derive(Debug)]
pub(crate) struct Socket(AsyncFd<OwnedFd>);

/// What one read brought.
#[derive(Debug)]
pub(crate) enum Read {
    /// Bytes, and perhaps descriptors.
    Some(Received),
    /// Nothing there now.
    Empty,
    /// Nothing any more: the other end is closed, gone or broken.
    End,
}

/// How far one write came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// So many bytes went, and all descriptors.
    Some(usize),
    /// The socket is full.
    Full,
    /// The kernel is short of something that comes back.
    Shortage,
    /// The other end is gone. It may have left something to read.
    Gone,
}

impl Socket {
    /// Puts a non-blocking socket on the event loop of the current runtime.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Socket> {
        register(fd, Interest::READABLE | Interest::WRITABLE).map(Socket)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }

    /// Waits for something to read, or the end. Cancel safe.
    pub(crate) async fn read(&self, buffer: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> Read {
        loop {
            // The runtime is shutting down.
            let Ok(mut guard) = self.0.readable().await else { return Read::End };
            let before = fds.len();
            let got = match guard.try_io(|s| channel::receive(s.as_fd(), buffer, fds)) {
                Err(_would_block) => continue,
                Ok(got) => said(got),
            };
            if let Read::Some(received) = &got
                && received.len < buffer.len()
                && fds.len() == before
                && !received.truncated
            {
                guard.clear_ready();
            }
            return got;
        }
    }

    /// Reads what is there, whatever the event loop has been told of the socket so far. For the last words
    /// of a process that has ended.
    pub(crate) fn read_now(&self, buffer: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> Read {
        said(channel::receive(self.as_fd(), buffer, fds))
    }

    /// One write.
    pub(crate) fn write(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Write {
        let sent = self.0.try_io(Interest::WRITABLE, |s| channel::send(s.as_fd(), bytes, fds));
        match sent {
            Ok(written) => Write::Some(written),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Write::Full,
            Err(error) if is_shortage(&error) => Write::Shortage,
            Err(_) => Write::Gone,
        }
    }

    /// Waits until more can be written; false when the runtime is shutting down. Cancel safe.
    pub(crate) async fn writable(&self) -> bool {
        match self.0.writable().await {
            Ok(mut guard) => {
                guard.retain_ready();
                true
            }
            Err(_) => false,
        }
    }

    /// Whether the other end is closed in both directions, so that nobody reads what is sent.
    pub(crate) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref(), PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = rustix::event::poll(&mut fds, Some(&now));
        polled.is_ok_and(|found| found > 0)
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Tells the other end that nothing more comes, or with [`Shutdown::Both`] that all is over.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        // ENOTCONN: the other end was faster.
        let _ = rustix::net::shutdown(self.as_fd(), how);
    }
}

fn said(got: io::Result<Received>) -> Read {
    match got {
        Ok(Received { len: 0, .. }) => Read::End,
        Ok(received) => Read::Some(received),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Read::Empty,
        // ECONNRESET: the other end died with unread bytes of ours. An end like any other.
        Err(_) => Read::End,
    }
}

/// Errors that pass: out of descriptors, buffers or memory, or too many descriptors in flight.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    let shortages =
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::TOOMANYREFS, Errno::AGAIN];
    error.raw_os_error().is_some_and(|raw| shortages.iter().any(|e| e.raw_os_error() == raw))
}
