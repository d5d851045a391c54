//! What a worker says to its primary: one bounded queue, written by whoever has something to say.
//!
//! Frames are queued in order and written as far as the socket takes them; a task waits for the rest.
//! Reading is in `reader`, what the frames mean in `mod` and `registry`.
//!
//! The rule that surprises: an acknowledgement of a connection is written before the program gets the
//! connection, not soon after. If the process dies in between, the primary must already be able to read that
//! the connection was taken, or it would give it to a second worker. So [`Channel::poll_written`] exists.
//!
//! What bounds the queue: messages wait for room; every other frame answers something of which there is a
//! limited number (a listener, a connection handed over, a stop), except the status, which is replaced.
//!
//! References: unix(7), sendmsg(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use polyfork_wire::native::{NativeOutbox, ToPrimary};
use tokio::sync::Notify;

use crate::channel::socket::{SHORTAGE_PAUSE, Socket, Write};

/// Messages wait for room above this many queued bytes.
const HIGH_MARK_BYTES: usize = 256 * 1024;

/// The writing half of a worker's channel.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: Socket,
    out: Mutex<Out>,
    /// Tells the writer that the queue is not empty.
    dirty: Notify,
    /// Held while waiting for room, so that senders get it in the order they asked.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Out {
    queue: NativeOutbox<OwnedFd>,
    /// The latest status that is not queued yet.
    status: Option<String>,
    closed: bool,
    /// Who waits for bytes to leave.
    waiting: Vec<Waker>,
}

/// A place in the stream of bytes: the end of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark(u64);

/// The channel has ended; nothing can be said any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Closed;

/// How far a flush came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    Empty,
    Blocked,
    Shortage,
}

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Channel> {
        let out =
            Out { queue: NativeOutbox::new(), status: None, closed: false, waiting: Vec::new() };
        Ok(Channel {
            socket: Socket::new(socket)?,
            out: Mutex::new(out),
            dirty: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
        })
    }

    /// The socket, for the reader.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Queues a frame for the writer. After the end of the channel it is discarded.
    pub(crate) fn push(&self, frame: &ToPrimary) {
        self.lock().push(frame);
        self.dirty.notify_one();
    }

    /// Queues a frame and writes what the socket takes at once.
    pub(crate) fn push_now(&self, frame: &ToPrimary) -> Mark {
        let mut out = self.lock();
        let mark = out.push(frame);
        if out.flush(&self.socket) != Flushed::Empty {
            self.dirty.notify_one();
        }
        mark
    }

    /// Ready when everything up to `mark` has left this process.
    pub(crate) fn poll_written(
        &self,
        cx: &mut Context<'_>,
        mark: Mark,
    ) -> Poll<Result<(), Closed>> {
        self.lock().poll_until(cx, |out| out.queue.written_total() >= mark.0)
    }

    /// Queues a message as soon as there is room for one.
    pub(super) async fn send_message(&self, bytes: Vec<u8>) -> Result<(), Closed> {
        let _turn = self.turn.lock().await;
        std::future::poll_fn(|cx| {
            self.lock().poll_until(cx, |out| out.queue.queued_bytes() <= HIGH_MARK_BYTES)
        })
        .await?;
        self.push(&ToPrimary::Message(bytes));
        Ok(())
    }

    /// Waits until everything said so far has left this process.
    pub(super) async fn flush(&self) -> Result<(), Closed> {
        let mark = self.lock().end();
        std::future::poll_fn(|cx| self.poll_written(cx, mark)).await
    }

    /// Says how the worker is, in words. A status that waits is replaced by a later one.
    pub(super) fn status(&self, text: String) {
        self.lock().status = Some(text);
        self.dirty.notify_one();
    }

    /// Whether nothing waits to be written.
    pub(super) fn is_idle(&self) -> bool {
        self.lock().queue.queued_bytes() == 0
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// The channel has ended: what is queued is discarded, who waits is told.
    pub(super) fn close(&self) {
        self.lock().close();
        self.dirty.notify_one();
    }

    /// Writes whatever is queued until the channel ends.
    pub(super) async fn write_all(&self) {
        loop {
            let flushed = {
                let mut out = self.lock();
                if out.closed {
                    return;
                }
                out.flush(&self.socket)
            };
            match flushed {
                Flushed::Empty => self.dirty.notified().await,
                Flushed::Shortage => tokio::time::sleep(SHORTAGE_PAUSE).await,
                Flushed::Blocked if self.socket.writable().await => {}
                Flushed::Blocked => return self.close(), // the runtime shuts down
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Out> {
        // Nothing panics while the lock is held, and if it did the queue would still be whole.
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Out {
    fn push(&mut self, frame: &ToPrimary) -> Mark {
        if !self.closed {
            self.queue.push(frame, Vec::new());
        }
        self.end()
    }

    /// The end of what is queued now.
    fn end(&self) -> Mark {
        Mark(self.queue.written_total() + self.queue.queued_bytes() as u64)
    }

    fn poll_until(
        &mut self,
        cx: &mut Context<'_>,
        done: impl FnOnce(&Out) -> bool,
    ) -> Poll<Result<(), Closed>> {
        if done(self) && !self.closed {
            return Poll::Ready(Ok(()));
        }
        if self.closed {
            return Poll::Ready(Err(Closed));
        }
        if !self.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn flush(&mut self, socket: &Socket) -> Flushed {
        let before = self.queue.written_total();
        let flushed = self.write_out(socket);
        if self.queue.written_total() != before {
            self.wake();
        }
        flushed
    }

    fn write_out(&mut self, socket: &Socket) -> Flushed {
        if self.queue.queued_bytes() <= HIGH_MARK_BYTES
            && let Some(text) = self.status.take()
        {
            self.push(&ToPrimary::Status { text });
        }
        while let Some(chunk) = self.queue.peek() {
            let fds: Vec<BorrowedFd<'_>> = chunk.handles.iter().map(AsFd::as_fd).collect();
            match socket.write(chunk.bytes, &fds) {
                Write::Some(len) => {
                    self.queue.wrote(len);
                }
                Write::Full => return Flushed::Blocked,
                Write::Shortage => return Flushed::Shortage,
                // The primary is gone. The reader tells the worker, after it has read what the primary said
                // before.
                Write::Gone => self.close(),
            }
        }
        Flushed::Empty
    }

    fn close(&mut self) {
        self.closed = true;
        self.queue = NativeOutbox::new();
        self.status = None;
        self.wake();
    }

    fn wake(&mut self) {
        for waker in self.waiting.drain(..) {
            waker.wake();
        }
    }
}
