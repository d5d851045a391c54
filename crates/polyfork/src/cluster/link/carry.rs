//! A channel on its way to the next image: its socket, what waits to be written, what was read and not understood.
//!
//! The rule that surprises: the kernel's copy of a descriptor that was sent is not ours to carry. What is carried is our own
//! copy, by which a connection that its worker does not take can still be given to another.

use polyfork_core::{ListenerId, WorkerId};
use serde::{Deserialize, Serialize};

use super::{Codec, Link, NativeLink, NodeLink, Partial, Passed, Wire};
use crate::cluster::to_loop::ToLoop;
use crate::cluster::upgrade::{FreezeError, Name, Packing, ResumeError, Unpacking};
use polyfork_wire::limits::Limits;
use polyfork_wire::native::NativeOutbox;
use polyfork_wire::node::cluster::Flavour;
use polyfork_wire::node::outbox::Outbox;

/// A link as it is written down; none for a worker without a channel.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LinkState {
    socket: Name,
    codec: Codec,
    limits: Limits,
    broken: bool,
    /// The reader came to rest here; none when there is nothing more to read.
    partial: Option<PartialState>,
    outbox: OutboxState,
}

#[derive(Debug, Serialize, Deserialize)]
struct PartialState {
    bytes: Vec<u8>,
    fds: Vec<Name>,
}

#[derive(Debug, Serialize, Deserialize)]
enum OutboxState {
    Node { outbox: Outbox<PassedState>, flavour: Flavour, advanced: bool },
    Native(NativeOutbox<PassedState>),
}

#[derive(Debug, Serialize, Deserialize)]
struct PassedState {
    fd: Name,
    connection: Option<(ListenerId, u64)>,
    line: Option<Vec<u8>>,
    refusals: u8,
}

impl PassedState {
    fn of(passed: &Passed, packing: &mut Packing) -> Result<PassedState, FreezeError> {
        let Passed { fd, connection, line, refusals } = passed;
        use std::os::fd::AsFd;
        Ok(PassedState {
            fd: packing.name(fd.as_fd())?,
            connection: *connection,
            line: line.as_ref().map(|line| line.to_vec()),
            refusals: *refusals,
        })
    }

    fn back(&self, unpacking: &mut Unpacking) -> Result<Passed, ResumeError> {
        let PassedState { fd, connection, line, refusals } = self;
        Ok(Passed {
            fd: unpacking.share(*fd)?,
            connection: *connection,
            line: line.as_ref().map(|line| line.as_slice().into()),
            refusals: *refusals,
        })
    }
}

impl Link {
    /// Writes down a link whose reader is at rest.
    pub(crate) fn pack(&self, packing: &mut Packing) -> Result<Option<LinkState>, FreezeError> {
        use std::os::fd::AsFd;
        let (wire, outbox) = match self {
            Link::Node(NodeLink { wire, outbox, flavour, advanced }) => {
                let outbox = outbox.try_map(|passed| PassedState::of(passed, packing))?;
                (wire, OutboxState::Node { outbox, flavour: *flavour, advanced: *advanced })
            }
            Link::Native(NativeLink { wire, outbox }) => {
                let outbox = outbox.try_map(|passed| PassedState::of(passed, packing))?;
                (wire, OutboxState::Native(outbox))
            }
            Link::None => return Ok(None),
        };
        let Wire { socket, codec, limits, partial, broken, .. } = wire;
        let partial = match partial {
            None => None,
            Some(Partial { bytes, fds }) => {
                let fds = fds.iter().map(|fd| packing.name(fd.as_fd()));
                Some(PartialState { bytes: bytes.clone(), fds: fds.collect::<Result<_, _>>()? })
            }
        };
        let (codec, limits, broken) = (*codec, *limits, *broken);
        let socket = packing.name(socket.as_fd())?;
        Ok(Some(LinkState { socket, codec, limits, broken, partial, outbox }))
    }

    /// A link that nobody reads yet.
    pub(crate) fn unpack(
        worker: WorkerId,
        state: LinkState,
        unpacking: &mut Unpacking,
        to_loop: &ToLoop,
    ) -> Result<Link, ResumeError> {
        let LinkState { socket, codec, limits, broken, partial, outbox } = state;
        let socket = unpacking.take(socket)?;
        let mut wire = Wire::new(worker, socket, codec, limits, to_loop.clone())?;
        wire.broken = broken;
        wire.partial = match partial {
            None => None,
            Some(PartialState { bytes, fds }) => {
                let fds = fds.into_iter().map(|fd| unpacking.take(fd));
                Some(Partial { bytes, fds: fds.collect::<Result<_, _>>()? })
            }
        };
        Ok(match outbox {
            OutboxState::Node { outbox, flavour, advanced } => {
                let outbox = outbox.try_map(|passed| passed.back(unpacking))?;
                Link::Node(NodeLink { wire, outbox, flavour, advanced })
            }
            OutboxState::Native(outbox) => {
                let outbox = outbox.try_map(|passed| passed.back(unpacking))?;
                Link::Native(NativeLink { wire, outbox })
            }
        })
    }
}

impl LinkState {
    /// Whether its parts fit each other.
    pub(crate) fn check(&self) -> Result<(), ResumeError> {
        let (sound, fits) = match &self.outbox {
            OutboxState::Node { outbox, advanced, .. } => {
                let codec = if *advanced { Codec::Advanced } else { Codec::Node };
                (outbox.is_sound(), self.codec == codec)
            }
            OutboxState::Native(outbox) => (outbox.is_sound(), self.codec == Codec::Native),
        };
        if sound && fits { Ok(()) } else { Err(ResumeError::inside("a channel's outbox")) }
    }
}
