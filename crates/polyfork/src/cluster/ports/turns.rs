//! Connections that the primary takes itself: by turns from one socket, and from queues that nobody accepts from.
//!
//! Whose turn it is is decided in `polyfork_core::Handoff`. Here is who waits for what the kernel has: a task for each
//! socket, which tells the loop once and waits until it is told that the queue was found empty.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use polyfork_core::{Handoff, HandoffConfig, ListenerId, Seat, Time};
use polyfork_sys::reuseport::{Group, Rescued, UnixSocket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::channel::socket::is_shortage;
use crate::cluster::primary::FromIo;
use crate::cluster::register::register;
use crate::cluster::to_loop::ToLoop;

/// Most connections accepted in one go, before other events get a turn.
const ACCEPT_BATCH: usize = 64;

pub(super) struct Turns {
    pub(super) socket: Arc<AsyncFd<OwnedFd>>,
    /// Removes the file of a Unix socket when it is dropped.
    pub(super) file: Option<UnixSocket>,
    pub(super) handoff: Handoff<Arc<OwnedFd>>,
    /// The task that waits for the socket; told to wait again after the queue was found empty.
    pub(super) again: Arc<Notify>,
    pub(super) task: AbortHandle,
    pub(super) paused: bool,
    /// There may be more in the kernel's queue than was accepted.
    pub(super) more: bool,
}

/// A task that waits for connections on a keeper, which nobody accepts from.
pub(super) struct Look {
    /// The queue has been moved.
    pub(super) again: Arc<Notify>,
    pub(super) task: AbortHandle,
}

impl Turns {
    pub(super) fn new(
        id: ListenerId,
        fd: OwnedFd,
        file: Option<UnixSocket>,
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<Turns> {
        Turns::over(id, fd, file, Handoff::new(config.clone()), io)
    }

    pub(super) fn over(
        id: ListenerId,
        fd: OwnedFd,
        file: Option<UnixSocket>,
        handoff: Handoff<Arc<OwnedFd>>,
        io: &ToLoop,
    ) -> io::Result<Turns> {
        let socket = Arc::new(register(fd, Interest::READABLE)?);
        let again = Arc::new(Notify::new());
        let task =
            tokio::spawn(wait_acceptable(id, Arc::clone(&socket), Arc::clone(&again), io.clone()));
        let task = task.abort_handle();
        Ok(Turns { socket, file, handoff, again, task, paused: false, more: false })
    }

    /// Accepts as many as there is room for. An error is a shortage: pause, nothing is lost.
    pub(super) fn accept(&mut self, now: Time) -> io::Result<()> {
        if self.paused || !self.more {
            return Ok(());
        }
        for _ in 0..self.handoff.room().min(ACCEPT_BATCH) {
            match self.socket.try_io(Interest::READABLE, |s| accept(s.as_fd())) {
                // Within its room the queue takes everything.
                Ok(connection) => drop(self.handoff.offer(now, Arc::new(connection))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.more = false;
                    self.again.notify_one();
                    return Ok(());
                }
                // The client went away while it waited, or a signal came: on to the next.
                Err(e) if is_per_connection(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn wait_acceptable(
    port: ListenerId,
    socket: Arc<AsyncFd<OwnedFd>>,
    again: Arc<Notify>,
    io: ToLoop,
) {
    loop {
        match socket.readable().await {
            Ok(mut guard) => guard.retain_ready(),
            Err(_) => return,
        }
        if io.send(FromIo::Acceptable { port }).await.is_err() {
            return;
        }
        again.notified().await;
    }
}

impl Look {
    pub(super) fn at(id: ListenerId, keeper: OwnedFd, io: &ToLoop) -> io::Result<Look> {
        let socket = register(keeper, Interest::READABLE)?;
        let again = Arc::new(Notify::new());
        let task = tokio::spawn(wait_kept(id, socket, Arc::clone(&again), io.clone()));
        Ok(Look { again, task: task.abort_handle() })
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Tells when something waits on a keeper.
async fn wait_kept(port: ListenerId, socket: AsyncFd<OwnedFd>, again: Arc<Notify>, io: ToLoop) {
    loop {
        match socket.readable().await {
            // What comes from now on is told again.
            Ok(mut guard) => guard.clear_ready(),
            Err(_) => return,
        }
        if io.send(FromIo::Acceptable { port }).await.is_err() {
            return;
        }
        again.notified().await;
    }
}

fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, accept_with};
    Ok(accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
}

/// Errors of accept(2) that concern one connection, not the listener.
fn is_per_connection(error: &io::Error) -> bool {
    !is_shortage(error)
        && !matches!(
            error.raw_os_error(),
            Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)
        )
}

/// Accepts what waits in slots that nobody accepts from and the kernel cannot empty.
pub(super) fn strand(
    group: &Group,
    slots: &[u32],
    now: Time,
    stranded: &mut Handoff<Arc<OwnedFd>>,
) {
    for slot in slots {
        let Some(listener) = group.listener(*slot) else { continue };
        while stranded.room() > 0
            && let Ok(connection) = accept(listener)
        {
            // Within its room the queue takes everything.
            drop(stranded.offer(now, Arc::new(connection)));
        }
    }
}

/// Sets who is live, then moves what waits where nobody will accept it. Gives the slots whose queue the kernel
/// cannot move.
pub(super) fn refresh_group(
    group: &mut Group,
    live: &[u32],
    held: &BTreeSet<Seat>,
) -> io::Result<Vec<u32>> {
    let mut live = live.to_vec();
    live.sort_unstable();
    live.dedup();
    if group.live() != live {
        group.set_live(&live)?;
    }
    if live.is_empty() {
        return Ok(Vec::new());
    }
    let idle: Vec<u32> =
        group.slots().filter(|slot| !live.contains(slot) && !held.contains(&Seat(*slot))).collect();
    let mut left = Vec::new();
    for slot in idle {
        if group.queue_depth(slot)? > 0 && group.rescue(slot)? == Rescued::NotPossible {
            left.push(slot);
        }
    }
    Ok(left)
}
