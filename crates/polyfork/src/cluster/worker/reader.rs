//! What a primary says to its worker: one task that reads the channel and carries out what it says.
//!
//! Writing is in `channel`, the state of listeners and requests in `registry`, the user's messages in
//! `inbox`. When the channel ends, for whatever reason, the worker stops.
//!
//! The rule that surprises: a primary that breaks the protocol is treated as one that is gone. There is no
//! telling what it wants, and a worker without a primary knows what to do.
//!
//! References: unix(7), recvmsg(2); frames in `polyfork_wire::native`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use polyfork_sys::channel;
use polyfork_wire::limits::Limits;
use polyfork_wire::native::{self, Frame, FrameDecoder, ListenAddress, ToPrimary, ToWorker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::inbox::Delivery;
use super::registry::{Opened, Source};
use super::{Registration, Shared, Welcome};
use crate::cluster::listener::handed::Handed;

/// Most workers hear little; those that hear much get a larger buffer.
const FIRST_READ_BYTES: usize = 4 * 1024;
const READ_BYTES: usize = 64 * 1024;

/// The reading half of a worker's channel.
pub(super) struct Reader {
    worker: Arc<Shared>,
    decoder: FrameDecoder<OwnedFd>,
    delivery: Delivery,
}

/// Why reading came to its end; for people.
struct End(String);

impl Reader {
    pub(super) fn new(worker: Arc<Shared>, delivery: Delivery) -> Reader {
        Reader { worker, decoder: FrameDecoder::new(Limits::default()), delivery }
    }

    /// Reads until the channel ends, then stops the worker.
    pub(super) async fn run(mut self) {
        let End(why) = self.read_to_end().await;
        self.worker.channel_ended(&why);
    }

    async fn read_to_end(&mut self) -> End {
        let worker = Arc::clone(&self.worker);
        let Some(out) = &worker.channel else { return End("there is no channel".into()) };
        let mut buffer = vec![0; FIRST_READ_BYTES];
        let mut fds = VecDeque::new();
        loop {
            let mut guard = match out.socket().readable().await {
                Ok(guard) => guard,
                Err(e) => return End(format!("the runtime ends: {e}")),
            };
            let received = guard.try_io(|s| channel::receive(s.as_fd(), &mut buffer, &mut fds));
            let received = match received {
                Err(_would_block) => continue,
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => continue,
                // ECONNRESET: it died with unread bytes of ours. An end like any other.
                Ok(Ok(channel::Received { len: 0, .. }) | Err(_)) => {
                    return End("the primary is gone".into());
                }
                Ok(Ok(received)) => received,
            };
            if received.truncated {
                return End("descriptors were lost: this process has too many open files".into());
            }
            if let Err(end) = self.take_in(&buffer[..received.len], &mut fds).await {
                return end;
            }
            if received.len == buffer.len() && buffer.len() < READ_BYTES {
                buffer.resize(READ_BYTES, 0);
            }
        }
    }

    async fn take_in(&mut self, bytes: &[u8], fds: &mut VecDeque<OwnedFd>) -> Result<(), End> {
        for fd in fds.drain(..) {
            self.decoder.push_descriptor(fd).map_err(fault)?;
        }
        self.decoder.feed(bytes);
        while let Some(frame) = self.decoder.next::<ToWorker>().map_err(fault)? {
            self.on_frame(frame).await?;
        }
        Ok(())
    }

    async fn on_frame(&mut self, frame: Frame<ToWorker, OwnedFd>) -> Result<(), End> {
        let Frame { message, descriptors } = frame;
        match message {
            ToWorker::Welcome { protocol, worker, slot, generation, grace_ms } => {
                native::check_version(protocol).map_err(fault)?;
                let grace = Duration::from_millis(grace_ms);
                self.worker.welcome(Welcome { id: worker, slot, generation, grace });
            }
            ToWorker::Listening { request, listener, address, handoff } => {
                let source = source(descriptors, handoff)?;
                self.on_listening(request, listener, address, source)?;
            }
            ToWorker::ListenFailed { request, errno, text } => {
                let kind = io::Error::from_raw_os_error(errno).kind();
                self.worker.registry.failed(request, io::Error::new(kind, text));
            }
            ToWorker::Connections { listener, first_seq, count } => {
                if descriptors.len() as u64 != u64::from(count) {
                    return Err(End("connections came without their sockets".into()));
                }
                if first_seq.checked_add(count.into()).is_none() {
                    return Err(End("connections came with numbers that do not exist".into()));
                }
                self.on_connections(listener, first_seq, descriptors);
            }
            ToWorker::Disconnect { grace_ms } => {
                self.worker.stop(Some(Duration::from_millis(grace_ms)));
            }
            ToWorker::LeavingAcknowledged => self.worker.stop(None),
            ToWorker::Message(bytes) => {
                let worker = &self.worker;
                let delivered = self.delivery.deliver(bytes, || worker.primary_is_gone()).await;
                delivered.map_err(|_gone| End("the primary is gone".into()))?;
            }
        }
        Ok(())
    }

    fn on_listening(
        &self,
        request: u32,
        listener: u32,
        address: ListenAddress,
        source: Source,
    ) -> Result<(), End> {
        let Some(asker) = self.worker.registry.answered(request) else {
            return Err(End("the primary answered a request that was not made".into()));
        };
        let handed = match &source {
            Source::Handed(handed) => Some(Arc::clone(handed)),
            Source::Socket(_) => None,
        };
        let answer = if self.worker.registry.register(listener, handed) {
            let registration = Registration::new(Arc::clone(&self.worker), listener);
            Ok(Opened { registration, address, source })
        } else {
            Err(io::Error::from(io::ErrorKind::AddrInUse))
        };
        // Whoever gave up waiting: the registration is dropped, which closes the listener.
        drop(asker.send(answer));
        Ok(())
    }

    /// Queues connections for their listener; what it does not take goes back to the primary.
    fn on_connections(&self, listener: u32, first_seq: u64, connections: Vec<OwnedFd>) {
        let queue = self.worker.registry.handed(listener);
        for (seq, connection) in (first_seq..).zip(connections) {
            if !queue.as_ref().is_some_and(|queue| queue.give(seq, connection)) {
                self.worker.tell(&ToPrimary::Refused { listener, seq });
            }
        }
    }
}

impl Shared {
    /// Whether the other end of the channel is closed, without reading from it.
    fn primary_is_gone(&self) -> bool {
        let Some(channel) = &self.channel else { return true };
        let mut fds = [PollFd::new(channel.socket().get_ref(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

fn source(descriptors: Vec<OwnedFd>, handoff: bool) -> Result<Source, End> {
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next(), handoff) {
        (None, None, true) => Ok(Source::Handed(Arc::new(Handed::new()))),
        (Some(socket), None, false) => Ok(Source::Socket(socket)),
        _ => Err(End("a listener came with the wrong number of sockets".into())),
    }
}

fn fault(error: polyfork_wire::ProtocolError) -> End {
    End(format!("the primary broke the protocol: {error}"))
}
