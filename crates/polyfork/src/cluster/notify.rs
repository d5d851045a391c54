//! `NOTIFY_SOCKET`: how a worker of the sockets dialect tells that it is ready, stopping or alive.
//!
//! One datagram socket per worker, under an abstract name that nobody can guess; it leaves no file behind.
//! A datagram counts only when the kernel vouches that its sender has our own or the worker's user id.
//! What the words mean is `polyfork_wire::notify`.
//!
//! Reference: sd_notify(3), unix(7).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use polyfork_core::WorkerId;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SocketAddrUnix, SocketFlags, SocketType, bind, recvmsg, socket_with, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use super::primary::{FromIo, Rested};
use super::register::register;
use super::to_loop::{Rest, ToLoop};

/// An open notify socket; closed on drop.
pub(crate) struct NotifySocket {
    worker: WorkerId,
    address: String,
    socket: Arc<AsyncFd<OwnedFd>>,
    reader: Option<AbortHandle>,
}

impl NotifySocket {
    pub(crate) fn open(worker: WorkerId, io: &ToLoop) -> io::Result<Self> {
        let name = format!(
            "polyfork/{:016x}{:016x}/{}",
            super::process::random_seed(),
            super::process::random_seed(),
            worker.0
        );
        let address = format!("@{name}");
        let mut socket = Self::over(worker, address, bind_abstract(name.as_bytes())?)?;
        socket.read(io);
        Ok(socket)
    }

    /// A socket that is bound already, and that nobody reads yet.
    pub(crate) fn over(worker: WorkerId, address: String, socket: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(register(socket, Interest::READABLE)?);
        Ok(NotifySocket { worker, address, socket, reader: None })
    }

    /// Starts to read, unless that is done already.
    pub(crate) fn read(&mut self, io: &ToLoop) {
        if self.reader.is_none() {
            let task = read(self.worker, Arc::clone(&self.socket), io.clone(), io.rest());
            self.reader = Some(tokio::spawn(task).abort_handle());
        }
    }

    /// The task that read has come to rest.
    pub(crate) fn rested(&mut self) {
        self.reader = None;
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        self.socket.get_ref()
    }

    /// The value of `NOTIFY_SOCKET`.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for NotifySocket {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader {
            reader.abort();
        }
    }
}

async fn read(worker: WorkerId, socket: Arc<AsyncFd<OwnedFd>>, io: ToLoop, mut rest: Rest) {
    let mut buffer = vec![0; 4096];
    loop {
        let ready = tokio::select! {
            biased;
            () = rest.asked() => {
                // The loop is gone only when the whole primary ends.
                let _ = io.send(FromIo::Rested { worker, what: Rested::Notify }).await;
                return;
            }
            ready = socket.readable() => ready,
        };
        let Ok(mut ready) = ready else { return };
        match ready.try_io(|s| receive(s.get_ref(), &mut buffer)) {
            Ok(Ok(Some(len))) => {
                let text = buffer[..len].to_vec();
                if io.send(FromIo::Notified { worker, text }).await.is_err() {
                    return;
                }
            }
            // From a stranger, or longer than any honest one: ignored.
            Ok(Ok(None)) | Err(_) => {}
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(_)) => return,
        }
    }
}

fn bind_abstract(name: &[u8]) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    // Before the address exists, so that no datagram can come without credentials.
    sockopt::set_socket_passcred(&socket, true)?;
    bind(&socket, &SocketAddrUnix::new_abstract_name(name)?)?;
    Ok(socket)
}

/// One datagram: its length, or `None` when it is to be ignored. Descriptors that came along are closed.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let mut space =
        [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = recvmsg(socket, &mut [io::IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut trusted = false;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmCredentials(sender) = message {
            let own = rustix::process::geteuid();
            trusted = sender.uid == own || sender.uid.is_root();
        }
    }
    let whole = !got.flags.contains(ReturnFlags::TRUNC);
    Ok((trusted && whole).then_some(got.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendFlags, sendto, socket};

    #[tokio::test]
    async fn what_a_worker_says_arrives_with_its_id() {
        let (tx, mut rx) = ToLoop::new();
        let open = NotifySocket::open(WorkerId(7), &tx).expect("socket");
        let to = SocketAddrUnix::new_abstract_name(&open.address().as_bytes()[1..]).expect("name");
        let client = socket(AddressFamily::UNIX, SocketType::DGRAM, None).expect("client");
        sendto(&client, b"READY=1", SendFlags::empty(), &to).expect("send");
        match rx.recv().await {
            Some(FromIo::Notified { worker: WorkerId(7), text }) => assert_eq!(text, b"READY=1"),
            other => panic!("{other:?}"),
        }
    }
}
