//! Requests of one client, as they come in piece by piece.
//!
//! What a request says is read by `protocol`; how long one may take is decided by `clients`.
//!
//! Who may ask is looked at here: by the credentials of whoever connected, and again by those of whoever *sent* each piece.
//! A connection that a privileged program left open for another is of no use to that other.
//!
//! The surprising rule: a client that only says that it will not ask again has not left, and is owed its answer.
//!
//! References: unix(7) `SO_PEERCRED`, `SO_PASSCRED`; kernel `unix_stream_read_generic` (what two senders wrote is never read
//! in one piece).

use std::io;
use std::mem::MaybeUninit;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::control::protocol::{LONGEST_REQUEST, Refusal};

/// Of a request, read at once.
const PIECE: usize = 512;
/// The most descriptors that the kernel passes with one message (`SCM_MAX_FD`).
const MOST_RIGHTS: usize = 253;

/// Requests as they come in.
pub(super) struct Requests {
    pub(super) reader: OwnedReadHalf,
    /// Read and not asked for yet; never more than one request and a piece.
    pub(super) buffer: Vec<u8>,
    /// A piece came from somebody who may not ask. Nothing is read any more.
    pub(super) stranger: bool,
}

impl Requests {
    /// The next request; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, Refusal> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.buffer[looked..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(looked + end + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            looked = self.buffer.len();
            if looked >= LONGEST_REQUEST {
                let text = format!("a request is longer than {LONGEST_REQUEST} bytes");
                return Err(Refusal::bad(text));
            }
            if !self.read().await {
                if self.stranger {
                    return Err(Refusal::stranger());
                }
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(Refusal::bad("a request ends with a newline")),
                };
            }
        }
    }

    /// Returns when the client has left. One that only says that it will not ask again has not. What it sends
    /// meanwhile waits, in the kernel at the latest.
    pub(super) async fn gone(&mut self, writer: &OwnedWriteHalf) {
        while self.buffer.len() < LONGEST_REQUEST {
            if !self.read().await {
                let closed = writer.ready(Interest::WRITABLE).await;
                if closed.is_ok_and(|ready| !ready.is_write_closed()) {
                    break;
                }
                return;
            }
        }
        std::future::pending().await
    }

    /// False at the end. Cancel safe: nothing is lost between two calls.
    async fn read(&mut self) -> bool {
        if self.stranger {
            return false;
        }
        let stream: &UnixStream = self.reader.as_ref();
        let mut piece = [0; PIECE];
        let read = stream.async_io(Interest::READABLE, || receive(stream, &mut piece)).await;
        match read {
            Ok(Some(read)) => self.buffer.extend_from_slice(&piece[..read]),
            Ok(None) => self.stranger = true,
            Err(_reset) => return false,
        }
        matches!(read, Ok(Some(read)) if read > 0)
    }
}

/// One piece of a request: its length, 0 at the end; `None` when its sender may not ask. Descriptors that come along are
/// closed.
fn receive(stream: &UnixStream, piece: &mut [u8]) -> io::Result<Option<usize>> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(MOST_RIGHTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = recvmsg(stream, &mut [io::IoSliceMut::new(piece)], &mut control, flags)?;
    let mut sender = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmCredentials(credentials) = message {
            sender = Some(credentials.uid.as_raw());
        }
    }
    // The end has no sender.
    let permitted = got.bytes == 0 || sender.is_some_and(is_friend);
    Ok(permitted.then_some(got.bytes))
}

/// The same user, or root.
pub(super) fn is_permitted(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| is_friend(peer.uid()))
}

fn is_friend(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}
