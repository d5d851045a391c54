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
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use polyfork_sys::channel;
use polyfork_wire::limits::Limits;
use polyfork_wire::native::{self, Frame, FrameDecoder, ListenAddress, ToPrimary, ToWorker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::inbox::Delivery;
use super::registry::{Opened, Source};
use super::{Registration, Shared, Welcome};
use crate::channel::socket::Read;
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
            let received = match out.socket().read(&mut buffer, &mut fds).await {
                Read::Some(received) => received,
                Read::Empty => continue,
                Read::End => return End("the primary is gone".into()),
            };
            if let Err(end) = self.take_in(received, &buffer, &mut fds).await {
                return end;
            }
            if received.len == buffer.len() && buffer.len() < READ_BYTES {
                buffer.resize(READ_BYTES, 0);
            }
        }
    }

    async fn take_in(
        &mut self,
        received: channel::Received,
        buffer: &[u8],
        fds: &mut VecDeque<OwnedFd>,
    ) -> Result<(), End> {
        for fd in fds.drain(..) {
            self.decoder.push_descriptor(fd).map_err(fault)?;
        }
        if received.truncated {
            // This process has too many open files. What did not arrive goes back by number.
            self.decoder.descriptors_lost();
        }
        self.decoder.feed(&buffer[..received.len]);
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
                self.on_listening(request, listener, address, source(descriptors, handoff)?)?;
            }
            ToWorker::ListenFailed { request, errno, text } => {
                let kind = io::Error::from_raw_os_error(errno).kind();
                self.worker.registry.failed(request, io::Error::new(kind, text));
            }
            ToWorker::Connections { listener, first_seq, count } => {
                let Some(end) = first_seq.checked_add(count.into()) else {
                    return Err(End("connections came with numbers that do not exist".into()));
                };
                let count = count as usize;
                if count > native::MAX_DESCRIPTORS || descriptors.len() > count {
                    return Err(End("connections came with the wrong number of sockets".into()));
                }
                self.on_connections(listener, first_seq..end, descriptors);
            }
            ToWorker::Disconnect { grace_ms } => {
                self.worker.stop(Some(Duration::from_millis(grace_ms)));
            }
            ToWorker::LeavingAcknowledged => self.worker.stop(None),
            ToWorker::Metrics { request } => self.worker.answer_metrics(request),
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
        source: Option<Source>,
    ) -> Result<(), End> {
        let Some(asker) = self.worker.registry.answered(request) else {
            return Err(End("the primary answered a request that was not made".into()));
        };
        let registry = &self.worker.registry;
        let answer = match source {
            None => {
                self.worker.tell(&ToPrimary::Close { listener });
                Err(io::Error::from(Errno::MFILE))
            }
            Some(source) if registry.register(listener, source.handed()) => {
                let registration = Registration::new(Arc::clone(&self.worker), listener);
                Ok(Opened { registration, address, source })
            }
            Some(_) => Err(io::Error::from(io::ErrorKind::AddrInUse)),
        };
        // Whoever gave up waiting: the registration is dropped, which closes the listener.
        drop(asker.send(answer));
        Ok(())
    }

    /// Queues connections for their listener. What it does not take, and what did not arrive, goes back to
    /// the primary.
    fn on_connections(&self, listener: u32, numbers: Range<u64>, connections: Vec<OwnedFd>) {
        let queue = self.worker.registry.handed(listener);
        let mut connections = connections.into_iter();
        for seq in numbers {
            let arrived = queue.as_ref().zip(connections.next());
            if !arrived.is_some_and(|(queue, connection)| queue.give(seq, connection)) {
                self.worker.tell(&ToPrimary::Refused { listener, seq });
            }
        }
    }
}

impl Shared {
    /// Whether the other end of the channel is closed, without reading from it.
    fn primary_is_gone(&self) -> bool {
        let Some(channel) = &self.channel else { return true };
        let mut fds = [PollFd::from_borrowed_fd(channel.socket().as_fd(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// Where connections will come from; `None` when the socket did not arrive because this process has too many
/// open files.
fn source(descriptors: Vec<OwnedFd>, handoff: bool) -> Result<Option<Source>, End> {
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next(), handoff) {
        (None, None, true) => Ok(Some(Source::Handed(Arc::new(Handed::new())))),
        (Some(socket), None, false) => Ok(Some(Source::Socket(socket))),
        (None, None, false) => Ok(None),
        _ => Err(End("a listener came with the wrong number of sockets".into())),
    }
}

fn fault(error: polyfork_wire::ProtocolError) -> End {
    End(format!("the primary broke the protocol: {error}"))
}
