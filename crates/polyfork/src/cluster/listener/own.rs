//! Accepting from a listening socket: the worker's own under the kernel mechanism, or a standalone one's.
//!
//! Nothing here knows about a primary. What is accepted is a plain descriptor; its type is made in `mod`.
//!
//! The rule that surprises: the socket may hang up and come back. To rescue the queue of a stalled worker the
//! primary ends the listening and starts it again on its copy; `accept` fails with `EINVAL` in between, and
//! the event loop keeps a hang-up in mind for ever. So the socket is registered anew after one.
//!
//! References: accept4(2) on errors to be treated like `EAGAIN`; tokio `Readiness` on final states.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketAddrAny, SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;

use crate::cluster::register::register;

/// Pause when descriptors or memory are short: others may give some back.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);
/// Pause while the socket does not listen.
const DEAF_PAUSE: Duration = Duration::from_millis(10);
/// Pause after an error of one connection, so that one that comes at once every time cannot spin.
const ODD_PAUSE: Duration = Duration::from_millis(1);

/// A listening socket in the event loop.
#[derive(Debug)]
pub(super) struct OwnSocket {
    /// `None` only while it is registered anew, or after that failed.
    socket: Option<AsyncFd<OwnedFd>>,
    pause: Option<Pin<Box<Sleep>>>,
}

/// A connection, and where it came from as far as the kernel told.
pub(super) type Accepted = (OwnedFd, Option<SocketAddrAny>);

/// What an error of `accept` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// Nobody is waiting.
    Wait,
    Retry,
    Pause(Duration),
    /// The socket does not listen at the moment.
    Renew,
    /// It never will.
    GiveUp,
}

impl OwnSocket {
    /// Takes a non-blocking listening socket; needs a tokio runtime.
    pub(super) fn new(socket: OwnedFd) -> io::Result<OwnSocket> {
        Ok(OwnSocket { socket: Some(register(socket, Interest::READABLE)?), pause: None })
    }

    /// The next connection. Errors that concern one connection or will pass are dealt with here, so that an
    /// error that comes out is final.
    pub(super) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            let Some(socket) = &self.socket else { return Poll::Ready(Err(Errno::BADF.into())) };
            let mut ready = ready!(socket.poll_read_ready(cx))?;
            let error = match accept(socket.get_ref()) {
                Ok(accepted) => return Poll::Ready(Ok(accepted)),
                Err(error) => error,
            };
            let hung_up = ready.ready().is_read_closed();
            match remedy(error) {
                Remedy::Wait if hung_up => self.renew(ODD_PAUSE)?,
                Remedy::Wait => ready.clear_ready(),
                Remedy::Retry => {}
                Remedy::Pause(pause) => self.pause = Some(Box::pin(tokio::time::sleep(pause))),
                Remedy::Renew => self.renew(DEAF_PAUSE)?,
                Remedy::GiveUp => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Whether a connection waits right now, without asking the event loop.
    pub(super) fn try_accept(&mut self) -> Option<Accepted> {
        accept(self.socket.as_ref()?.get_ref()).ok()
    }

    /// Forgets what the event loop knows of the socket, and goes on after a pause.
    fn renew(&mut self, pause: Duration) -> io::Result<()> {
        self.pause = Some(Box::pin(tokio::time::sleep(pause)));
        if let Some(socket) = self.socket.take() {
            self.socket = Some(register(socket.into_inner(), Interest::READABLE)?);
        }
        Ok(())
    }
}

fn accept(socket: &OwnedFd) -> Result<Accepted, Errno> {
    acceptfrom_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
}

fn remedy(error: Errno) -> Remedy {
    match error {
        Errno::AGAIN => Remedy::Wait,
        Errno::INTR | Errno::CONNABORTED => Remedy::Retry,
        Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => Remedy::Pause(SHORTAGE_PAUSE),
        Errno::INVAL => Remedy::Renew,
        // What accept4(2) lists: errors of the new connection that are reported here. Firewalls add EPERM.
        Errno::NETDOWN
        | Errno::PROTO
        | Errno::NOPROTOOPT
        | Errno::HOSTDOWN
        | Errno::NONET
        | Errno::HOSTUNREACH
        | Errno::NETUNREACH
        | Errno::OPNOTSUPP
        | Errno::CONNRESET
        | Errno::TIMEDOUT
        | Errno::PERM => Remedy::Pause(ODD_PAUSE),
        _ => Remedy::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rustix::net::{Shutdown, listen, shutdown};

    use super::*;

    fn listening() -> (OwnSocket, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        (OwnSocket::new(listener.try_clone().unwrap().into()).unwrap(), listener)
    }

    async fn accept_one(own: &mut OwnSocket) -> Accepted {
        std::future::poll_fn(|cx| own.poll_accept(cx)).await.unwrap()
    }

    #[tokio::test]
    async fn a_socket_that_stops_listening_and_starts_again_goes_on() {
        let (mut own, copy) = listening();
        for _ in 0..3 {
            shutdown(copy.as_fd(), Shutdown::Read).unwrap();
            // The event loop must see the hang-up before it is over.
            let deaf = tokio::time::timeout(DEAF_PAUSE * 3, accept_one(&mut own)).await;
            assert!(deaf.is_err());
            listen(copy.as_fd(), 16).unwrap();
            // A port that the system chose is given up with the listening, and another one chosen.
            let client = TcpStream::connect(copy.local_addr().unwrap()).unwrap();
            let (_, peer) = accept_one(&mut own).await;
            let peer = std::net::SocketAddr::try_from(peer.unwrap()).unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
        }
    }

    #[tokio::test]
    async fn a_hang_up_that_is_over_before_accept_leaves_no_spinning() {
        let (mut own, copy) = listening();
        shutdown(copy.as_fd(), Shutdown::Read).unwrap();
        tokio::task::yield_now().await;
        listen(copy.as_fd(), 16).unwrap();
        let idle = tokio::time::timeout(Duration::from_millis(50), accept_one(&mut own)).await;
        assert!(idle.is_err());
        let socket = own.socket.as_ref().unwrap();
        let waker = std::task::Waker::noop();
        let mut cx = Context::from_waker(waker);
        assert!(socket.poll_read_ready(&mut cx).is_pending());
    }

    #[test]
    fn only_errors_that_never_pass_come_out() {
        assert_eq!(remedy(Errno::BADF), Remedy::GiveUp);
        assert_eq!(remedy(Errno::NOTSOCK), Remedy::GiveUp);
        assert_eq!(remedy(Errno::CONNABORTED), Remedy::Retry);
        for shortage in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS] {
            assert_eq!(remedy(shortage), Remedy::Pause(SHORTAGE_PAUSE));
        }
    }
}
