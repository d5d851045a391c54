//! The primary's sockets on their way to its next image: nothing is bound again.
//!
//! The rule that surprises: an eBPF group goes over with its program and its maps. Turns go on from where they are, taken by
//! the kernel while there is nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use polyfork_core::{Handoff, ListenerId, Listeners, Seat, Seats, WorkerId};
use polyfork_sys::reuseport::{
    Group, Options, Parts, Picks, Place, Spare, UnixSocket, adopt_spare, spare_parts,
};
use polyfork_wire::RawJson;
use serde::{Deserialize, Serialize};

use super::store::{StoreHandle, Stored, Waiting};
use super::turns::Turns;
use super::{Key, Kind, Port, Ports};
use crate::cluster::event::Via;
use crate::cluster::settings::{Address, Mechanism, Policy};
use crate::cluster::to_loop::ToLoop;
use crate::cluster::upgrade::{FreezeError, Name, Packing, ResumeError, Unpacking};

/// All sockets as they are written down.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PortsState {
    book: Listeners<Key>,
    open: Vec<(ListenerId, PortState)>,
    seats: Seats,
    admitted: BTreeMap<WorkerId, Seat>,
    windows: BTreeMap<WorkerId, usize>,
    aside: BTreeSet<WorkerId>,
    policy: Policy,
    mechanism: Mechanism,
    by_hand: bool,
    reset: u64,
    refused_before: u64,
    activated: Vec<i32>,
    given_before: BTreeMap<WorkerId, u64>,
    /// What came back from a store and nobody has asked for yet, and how much the store holds.
    waiting: Vec<(String, Name)>,
    held: usize,
    /// Programs for sockets to come, of a process that may load none any more.
    spare: Vec<Spare<Name>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PortState {
    address: Address,
    via: Via,
    data: Option<String>,
    given: bool,
    kept: Option<String>,
    dropped_before: u64,
    kind: KindState,
}

#[derive(Debug, Serialize, Deserialize)]
enum KindState {
    Slots { group: GroupState, stranded: Handoff<Name> },
    Shared(Name),
    SharedUnix(UnixState),
    Turns { socket: Name, file: Option<UnixState>, handoff: Handoff<Name>, paused: bool },
}

/// A Unix socket with the file that is removed with it.
#[derive(Debug, Serialize, Deserialize)]
struct UnixState {
    socket: Name,
    file: Option<(PathBuf, u64, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct GroupState {
    address: SocketAddr,
    ipv6_only: bool,
    backlog: i32,
    places: Vec<(u32, Name, u32, u64)>,
    live: Vec<u32>,
    picks: PicksState,
}

#[derive(Debug, Serialize, Deserialize)]
enum PicksState {
    Ebpf { program: Name, sockets: Name, state: Name },
    Classic(Vec<u32>),
}

impl Ports {
    pub(crate) fn pack(&self, packing: &mut Packing) -> Result<PortsState, FreezeError> {
        let Ports {
            book,
            open,
            seats,
            admitted,
            windows,
            aside,
            policy,
            mechanism,
            by_hand,
            reset,
            refused_before,
            activated,
            given_before,
            stored,
        } = self;
        let waiting =
            |waiting: &Waiting| Ok((waiting.name.clone(), packing.name(waiting.socket.as_fd())?));
        let waiting = stored.waiting().iter().map(waiting).collect::<Result<_, FreezeError>>()?;
        let open = open.iter().map(|(id, port)| Ok((*id, port.pack(packing)?)));
        Ok(PortsState {
            book: book.clone(),
            open: open.collect::<Result<_, FreezeError>>()?,
            seats: seats.clone(),
            admitted: admitted.clone(),
            windows: windows.clone(),
            aside: aside.clone(),
            policy: *policy,
            mechanism: *mechanism,
            by_hand: *by_hand,
            reset: *reset,
            refused_before: *refused_before,
            activated: activated.clone(),
            given_before: given_before.clone(),
            waiting,
            held: stored.held(),
            spare: spare_parts(|program| packing.name(program))?,
        })
    }

    pub(crate) fn unpack(
        state: PortsState,
        unpacking: &mut Unpacking,
        io: &ToLoop,
        store: Option<StoreHandle>,
    ) -> Result<Ports, ResumeError> {
        let PortsState {
            book,
            open,
            seats,
            admitted,
            windows,
            aside,
            policy,
            mechanism,
            by_hand,
            reset,
            refused_before,
            activated,
            given_before,
            waiting,
            held,
            spare,
        } = state;
        let program = |(program, sockets, state): Spare<Name>| {
            let (program, sockets) = (unpacking.take(program)?, unpacking.take(sockets)?);
            Ok::<_, ResumeError>((program, sockets, unpacking.take(state)?))
        };
        adopt_spare(spare.into_iter().map(program).collect::<Result<_, _>>()?)?;
        let came_back = |(name, socket): (String, Name)| {
            Ok::<_, ResumeError>(Waiting { name, socket: unpacking.take(socket)? })
        };
        let waiting = waiting.into_iter().map(came_back).collect::<Result<_, _>>()?;
        let port = |(id, port): (ListenerId, PortState)| {
            Ok::<_, ResumeError>((id, Port::unpack(id, port, unpacking, io)?))
        };
        Ok(Ports {
            book,
            open: open.into_iter().map(port).collect::<Result<_, _>>()?,
            seats,
            admitted,
            windows,
            aside,
            policy,
            mechanism,
            by_hand,
            reset,
            refused_before,
            activated,
            given_before,
            stored: Stored::back(store, waiting, held),
        })
    }
}

impl PortsState {
    /// Whether its parts fit each other.
    pub(crate) fn check(&self) -> Result<(), ResumeError> {
        if !self.book.is_sound() {
            return Err(ResumeError::inside("numbers of sockets"));
        }
        for (_, port) in &self.open {
            if let KindState::Slots { stranded: handoff, .. } | KindState::Turns { handoff, .. } =
                &port.kind
            {
                handoff.check()?;
            }
            if port.data.as_deref().is_some_and(|data| RawJson::new(data).is_err()) {
                return Err(ResumeError::inside("what workers said of a socket"));
            }
        }
        let seated = |(worker, seat): (&WorkerId, &Seat)| self.seats.of(*worker) == Some(*seat);
        match self.admitted.iter().all(seated) {
            true => Ok(()),
            false => Err(ResumeError::inside("a worker without its seat")),
        }
    }

    /// Workers that may get connections.
    pub(crate) fn admitted(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.admitted.keys().copied()
    }
}

/// Connections on their way, by name.
fn named(
    handoff: &Handoff<Arc<OwnedFd>>,
    packing: &mut Packing,
) -> Result<Handoff<Name>, FreezeError> {
    handoff.try_map(|connection| Ok(packing.name(connection.as_fd())?))
}

/// ... and themselves.
fn owned(
    handoff: &Handoff<Name>,
    unpacking: &mut Unpacking,
) -> Result<Handoff<Arc<OwnedFd>>, ResumeError> {
    handoff.try_map(|name| unpacking.share(*name))
}

impl Port {
    fn pack(&self, packing: &mut Packing) -> Result<PortState, FreezeError> {
        let Port { address, via, data, given, kept, dropped_before, kind } = self;
        let kind = match kind {
            Kind::Slots { group, stranded, look: _ } => KindState::Slots {
                group: GroupState::of(group, packing)?,
                stranded: named(stranded, packing)?,
            },
            Kind::Shared(fd) => KindState::Shared(packing.name(fd.as_fd())?),
            Kind::SharedUnix(socket) => KindState::SharedUnix(UnixState::of(socket, packing)?),
            Kind::Turns(Turns { socket, file, handoff, again: _, task: _, paused, more: _ }) => {
                let file = file.as_ref().map(|file| UnixState::of(file, packing)).transpose()?;
                let socket = packing.name(socket.get_ref().as_fd())?;
                let handoff = named(handoff, packing)?;
                KindState::Turns { socket, file, handoff, paused: *paused }
            }
        };
        let data = data.as_ref().map(|data| data.as_str().to_owned());
        let (address, via) = (address.clone(), Via::clone(via));
        let (given, dropped_before, kept) = (*given, *dropped_before, kept.clone());
        Ok(PortState { address, via, data, given, kept, dropped_before, kind })
    }

    fn unpack(
        id: ListenerId,
        state: PortState,
        unpacking: &mut Unpacking,
        io: &ToLoop,
    ) -> Result<Port, ResumeError> {
        let PortState { address, via, data, given, kept, dropped_before, kind } = state;
        let kind = match kind {
            KindState::Slots { group, stranded } => Kind::Slots {
                group: group.back(unpacking)?,
                stranded: owned(&stranded, unpacking)?,
                look: None,
            },
            KindState::Shared(name) => Kind::Shared(Arc::new(unpacking.take(name)?)),
            KindState::SharedUnix(socket) => Kind::SharedUnix(socket.back(unpacking)?),
            KindState::Turns { socket, file, handoff, paused } => {
                let handoff = owned(&handoff, unpacking)?;
                let file = file.map(|file| file.back(unpacking)).transpose()?;
                let mut turns = Turns::over(id, unpacking.take(socket)?, file, handoff, io)?;
                // What came meanwhile is not told again.
                (turns.more, turns.paused) = (true, paused);
                Kind::Turns(turns)
            }
        };
        let wrong = |_| ResumeError::inside("what workers said of a socket");
        let data = data.map(|data| RawJson::new(&data)).transpose().map_err(wrong)?;
        let via = Arc::new(via);
        let mut port = Port { address, via, data, given, kept, dropped_before, kind };
        if port.kept.is_some() {
            port.is_kept(id, io)?;
        }
        Ok(port)
    }
}

impl UnixState {
    fn of(socket: &UnixSocket, packing: &mut Packing) -> Result<UnixState, FreezeError> {
        let file = socket.file().map(|(path, device, inode)| (path.to_owned(), device, inode));
        Ok(UnixState { socket: packing.name(socket.as_fd())?, file })
    }

    fn back(self, unpacking: &mut Unpacking) -> Result<UnixSocket, ResumeError> {
        Ok(UnixSocket::from_parts(unpacking.take(self.socket)?, self.file))
    }
}

impl GroupState {
    fn of(group: &Group, packing: &mut Packing) -> Result<GroupState, FreezeError> {
        let Parts { address, options, places, live, picks } = group.parts();
        let Options { ipv6_only, backlog } = options;
        let place = |place: Place<_>| {
            let Place { slot, socket, index, given_before } = place;
            Ok((slot, packing.name(socket)?, index, given_before))
        };
        let places = places.into_iter().map(place).collect::<Result<_, FreezeError>>()?;
        let picks = match picks {
            Picks::Classic(order) => PicksState::Classic(order),
            Picks::Ebpf { program, sockets, state } => PicksState::Ebpf {
                program: packing.name(program)?,
                sockets: packing.name(sockets)?,
                state: packing.name(state)?,
            },
        };
        Ok(GroupState { address, ipv6_only, backlog, places, live, picks })
    }

    fn back(self, unpacking: &mut Unpacking) -> Result<Group, ResumeError> {
        let GroupState { address, ipv6_only, backlog, places, live, picks } = self;
        let place = |(slot, socket, index, given_before): (u32, Name, u32, u64)| {
            Ok(Place { slot, socket: unpacking.take(socket)?, index, given_before })
        };
        let places = places.into_iter().map(place).collect::<Result<_, ResumeError>>()?;
        let picks = match picks {
            PicksState::Classic(order) => Picks::Classic(order),
            PicksState::Ebpf { program, sockets, state } => Picks::Ebpf {
                program: unpacking.take(program)?,
                sockets: unpacking.take(sockets)?,
                state: unpacking.take(state)?,
            },
        };
        let options = Options { ipv6_only, backlog };
        Ok(Group::from_parts(Parts { address, options, places, live, picks })?)
    }
}
