//! The listening sockets of a primary, and how connections get from them to workers.
//!
//! Who may share which socket is decided in `polyfork_core::Listeners`, whose turn it is in
//! `polyfork_core::Handoff` or by the kernel program in `polyfork_sys::reuseport`. Here are the sockets
//! themselves: opened once, kept for as long as the cluster lives, whatever becomes of workers.
//!
//! The rule that surprises: under the kernel mechanism every seat (see `polyfork_core::seats`) has a socket from the
//! start, also seats whose worker never asks; such a seat is not live, and what reached its queue by the kernel's own choice
//! while nobody was live is moved to the others as soon as there is one.
//!
//! References: socket(7) `SO_REUSEPORT`, `SO_ATTACH_REUSEPORT_EBPF`; Node `lib/internal/cluster/`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::{
    Decision, Handoff, HandoffConfig, ListenerId, Listeners, Seat, Seats, Time, WorkerId,
};
use polyfork_sys::channel;
use polyfork_sys::reuseport::{
    self, BindError, Group, Options, Rescued, Selection, UdpFlags, UnixSocket, Want,
};
use polyfork_wire::RawJson;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::event::{Carried, Via};
use super::figures::ListenerFigures;
use super::primary::FromIo;
use super::register::register;
use super::settings::{Address, Mechanism, Policy};
use super::to_loop::ToLoop;
use crate::channel::socket::is_shortage;
use store::{Stored, Waiting};

pub(super) mod carry;
pub(super) mod store;

/// Most connections accepted in one go, before other events get a turn.
const ACCEPT_BATCH: usize = 64;

/// What makes two requests of workers mean the same socket.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Key {
    /// The address as the worker wrote it.
    pub(crate) address: Option<String>,
    pub(crate) port: Option<i64>,
    pub(crate) kind: KeyKind,
    pub(crate) fd: Option<i64>,
    /// Which of several servers on port 0; 0 for every other port.
    pub(crate) index: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum KeyKind {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
    Unix,
    Inherited,
}

/// What to open.
#[derive(Debug, Clone)]
pub(crate) struct Want4Port {
    /// Tried in this order; a later one only when the family of the earlier does not exist here.
    pub(crate) addresses: Vec<Address>,
    pub(crate) backlog: i32,
    pub(crate) ipv6_only: bool,
    pub(crate) udp_reuse_address: bool,
    /// The worker will read datagrams, not accept connections. Asked only of a descriptor.
    pub(crate) datagrams: bool,
    /// Permission bits of a Unix socket's file.
    pub(crate) unix_mode: Option<u32>,
    /// The worker cannot take a listening socket of its own (Deno).
    pub(crate) handoff_only: bool,
    /// The worker cannot take connections (anything of the sockets dialect).
    pub(crate) sockets_only: bool,
}

impl Want4Port {
    pub(crate) fn new(address: Address) -> Self {
        Want4Port {
            addresses: vec![address],
            backlog: 511,
            ipv6_only: false,
            udp_reuse_address: false,
            datagrams: false,
            unix_mode: None,
            handoff_only: false,
            sockets_only: false,
        }
    }
}

/// One open socket (or one per slot).
pub(crate) struct Port {
    pub(crate) address: Address,
    pub(crate) via: Arc<Via>,
    /// First `data` that a worker sent for it (Node: TLS ticket keys), given to every later one.
    pub(crate) data: Option<RawJson>,
    /// It was given to this process and outlives it: what waits there at the end is for whoever has it next.
    given: bool,
    /// Somebody holds a copy under this name and gives it to the next process: what waits there at the end is for that one.
    kept: Option<String>,
    /// What sockets of it that are closed by now had dropped.
    dropped_before: u64,
    kind: Kind,
}

enum Kind {
    Slots {
        group: Group,
        /// Connections accepted here from queues that the kernel cannot move (classic BPF), passed on by hand.
        stranded: Handoff<Arc<OwnedFd>>,
        /// Sees what reaches the keeper, if there is one.
        look: Option<Look>,
    },
    Shared(Arc<OwnedFd>),
    SharedUnix(UnixSocket),
    Turns(Turns),
}

/// A task that waits for connections on a keeper, which nobody accepts from.
struct Look {
    /// The queue has been moved.
    again: Arc<Notify>,
    task: AbortHandle,
}

struct Turns {
    socket: Arc<AsyncFd<OwnedFd>>,
    /// Removes the file of a Unix socket when it is dropped.
    file: Option<UnixSocket>,
    handoff: Handoff<Arc<OwnedFd>>,
    /// The task that waits for the socket; told to wait again after the queue was found empty.
    again: Arc<Notify>,
    task: AbortHandle,
    paused: bool,
    /// There may be more in the kernel's queue than was accepted.
    more: bool,
}

/// How a connection of the primary's own gets to one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Opened as a client does; the kernel's program knows whom it is for.
    Aimed,
    /// An end of a pair is handed over.
    Handed,
    /// Not at all.
    None,
}

/// A connection on its way to a worker.
pub(crate) struct Delivery {
    pub(crate) port: ListenerId,
    pub(crate) worker: WorkerId,
    pub(crate) seq: u64,
    pub(crate) connection: Arc<OwnedFd>,
}

/// The queues of one port's live slots at one moment.
pub(crate) struct Depths {
    /// Turns taken so far.
    pub(crate) turns: u64,
    /// Connections that wait, by live seat.
    pub(crate) queued: BTreeMap<u32, u32>,
}

/// Something that went wrong while accepting.
pub(crate) struct AcceptTrouble {
    pub(crate) port: ListenerId,
    pub(crate) address: Address,
    pub(crate) error: io::Error,
}

#[derive(Default)]
pub(crate) struct Ports {
    pub(crate) book: Listeners<Key>,
    open: BTreeMap<ListenerId, Port>,
    seats: Seats,
    /// Workers that may get connections, with their seat.
    admitted: BTreeMap<WorkerId, Seat>,
    windows: BTreeMap<WorkerId, usize>,
    /// Stuck: others take their turns, where there are others.
    aside: BTreeSet<WorkerId>,
    policy: Policy,
    mechanism: Mechanism,
    by_hand: bool,
    /// Connections that were lost because their socket was closed and nobody could take them.
    pub(crate) reset: u64,
    /// What sockets that are closed by now had refused.
    refused_before: u64,
    /// Listening sockets that this process was given.
    activated: Vec<i32>,
    /// What a worker's seat had been given by the kernel before it was this worker's.
    given_before: BTreeMap<WorkerId, u64>,
    /// What outlives this process.
    stored: Stored,
}

impl Ports {
    /// `by_hand`: workers can be given connections one by one.
    /// `activated`: listening sockets that this process was given.
    pub(crate) fn new(
        policy: Policy,
        mechanism: Mechanism,
        by_hand: bool,
        activated: Vec<i32>,
        stored: Stored,
    ) -> Self {
        Ports { policy, mechanism, by_hand, activated, stored, ..Ports::default() }
    }

    /// A worker's place in the reuse-port groups.
    pub(crate) fn seat(&self, worker: WorkerId) -> Option<Seat> {
        self.seats.of(worker)
    }

    pub(crate) fn get(&self, id: ListenerId) -> Option<&Port> {
        self.open.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: ListenerId) -> Option<&mut Port> {
        self.open.get_mut(&id)
    }

    // ---- opening and closing ----

    /// Opens a socket under an id that [`Listeners::ask`] or [`Listeners::pin`] gave out.
    pub(crate) fn open(
        &mut self,
        id: ListenerId,
        want: &Want4Port,
        config: HandoffConfig,
        io: &ToLoop,
    ) -> Result<&Port, (Address, io::Error)> {
        let mut last = None;
        for address in &want.addresses {
            match self.try_open(id, address, want, &config, io) {
                Ok(port) => {
                    let port = self.open.entry(id).or_insert(port);
                    return Ok(port);
                }
                // No such family on this machine, or the address is not of it: the next one may do.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                    ) && want.addresses.len() > 1 =>
                {
                    last = Some((address.clone(), e));
                }
                Err(e) => return Err((address.clone(), e)),
            }
        }
        Err(last.unwrap_or_else(|| {
            let nothing = Address::Unix(PathBuf::new());
            (nothing, io::Error::from_raw_os_error(libc::EINVAL))
        }))
    }

    fn try_open(
        &mut self,
        id: ListenerId,
        address: &Address,
        want: &Want4Port,
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<Port> {
        let given = self.activated.iter().copied().find(|fd| listens_on(*fd, address));
        let back = match given {
            Some(_) => None,
            None => self.stored.take(address, want.ipv6_only),
        };
        let how = (config, io);
        let mut port = match back {
            Some(Waiting { name, socket }) => {
                let copy = socket.try_clone();
                let opened = copy
                    .and_then(|copy| self.open_over(id, address, want, (given, Some(copy)), how));
                match opened {
                    Ok(port) => Port { kept: Some(name), ..port },
                    Err(error) => {
                        self.stored.put_back(Waiting { name, socket });
                        return Err(error);
                    }
                }
            }
            None => match self.open_over(id, address, want, (given, None), how) {
                // By a socket that was kept of an address that is not asked for any more?
                Err(error)
                    if error.raw_os_error() == Some(libc::EADDRINUSE)
                        && self.stored.make_way(address) =>
                {
                    self.open_over(id, address, want, (given, None), how)?
                }
                opened => opened?,
            },
        };
        self.have_kept(id, &mut port, address, io)?;
        Ok(port)
    }

    /// Opens a socket, or takes the one that this process was given, or the one that has come back.
    fn open_over(
        &self,
        id: ListenerId,
        address: &Address,
        want: &Want4Port,
        (given, back): (Option<i32>, Option<OwnedFd>),
        (config, io): (&HandoffConfig, &ToLoop),
    ) -> io::Result<Port> {
        let options = Options { ipv6_only: want.ipv6_only, backlog: want.backlog };
        let (kind, address, carried, why) = match address {
            _ if given.is_some() => {
                let number = given.unwrap_or_default();
                let (kind, _, carried, why) = self.open_inherited(id, number, want, config, io)?;
                (kind, address.clone(), carried, why)
            }
            Address::Udp(at) => {
                let fd = reuseport::bind_udp(
                    *at,
                    UdpFlags {
                        ipv6_only: want.ipv6_only,
                        reuse_address: want.udp_reuse_address,
                        reuse_port: false,
                    },
                )
                .map_err(into_io)?;
                let real = local_address(fd.as_fd())?;
                let why = "one UDP socket, shared by all workers".to_owned();
                (Kind::Shared(Arc::new(fd)), Address::Udp(real), Carried::SharedSocket, why)
            }
            Address::Tcp(at) => self.open_tcp(id, *at, (&options, want, back), config, io)?,
            Address::Unix(path) => {
                let listener = match back {
                    Some(back) => {
                        channel::set_nonblocking(back.as_fd(), true)?;
                        rustix::net::listen(&back, want.backlog)?;
                        store::with_file(back)
                    }
                    None => {
                        reuseport::bind_unix(path, want.backlog, want.unix_mode).map_err(into_io)?
                    }
                };
                let address = Address::Unix(path.clone());
                if want.sockets_only || self.policy == Policy::Shared {
                    let why =
                        "one socket, shared: a Unix path cannot have a socket per slot".to_owned();
                    (Kind::SharedUnix(listener), address, Carried::SharedSocket, why)
                } else {
                    let why = "exact turns: a Unix path cannot have a socket per slot, so the primary accepts";
                    let turns = Turns::new(
                        id,
                        listener.as_fd().try_clone_to_owned()?,
                        Some(listener),
                        config,
                        io,
                    )?;
                    (Kind::Turns(turns), address, Carried::Handoff, why.to_owned())
                }
            }
            Address::Inherited(number) => self.open_inherited(id, *number, want, config, io)?,
        };
        let policy = if carried == Carried::SharedSocket { Policy::Shared } else { self.policy };
        Ok(Port {
            address,
            via: Arc::new(Via { policy, mechanism: carried, why }),
            data: None,
            given: given.is_some(),
            kept: None,
            dropped_before: 0,
            kind,
        })
    }

    fn open_tcp(
        &self,
        id: ListenerId,
        at: SocketAddr,
        (options, want, back): (&Options, &Want4Port, Option<OwnedFd>),
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<(Kind, Address, Carried, String)> {
        if self.policy == Policy::Shared && !want.handoff_only {
            let fd = alone(at, options, back)?;
            let address = Address::Tcp(local_address(fd.as_fd())?);
            let why = "asked for: one socket, whichever worker wakes first accepts".to_owned();
            return Ok((Kind::Shared(Arc::new(fd)), address, Carried::SharedSocket, why));
        }
        if self.mechanism == Mechanism::Handoff || want.handoff_only {
            let fd = alone(at, options, back)?;
            let address = Address::Tcp(local_address(fd.as_fd())?);
            let why = if want.handoff_only {
                "exact turns: this runtime accepts no connection from a socket it is given"
                    .to_owned()
            } else {
                "exact turns: asked for, the primary accepts and passes connections on".to_owned()
            };
            let turns = Turns::new(id, fd, None, config, io)?;
            return Ok((Kind::Turns(turns), address, Carried::Handoff, why));
        }
        let seats: Vec<u32> = self.seats.all().map(|seat| seat.0).collect();
        let group = match back {
            None => Group::bind(at, options, &seats, Want::Auto).map_err(into_io)?,
            Some(back) => {
                channel::set_nonblocking(back.as_fd(), true)?;
                match Group::over(back, options, &seats) {
                    Ok(group) => group,
                    // The socket and who waits on it are worth more than the mechanism.
                    Err(failed) => return self.without_group(id, *failed, options, config, io),
                }
            }
        };
        let (carried, why) = match group.selection() {
            Selection::Ebpf => (
                Carried::KernelExact,
                "exact turns: a socket per slot, an eBPF program picks the next live one"
                    .to_owned(),
            ),
            Selection::Classic => {
                let reason = group.fallback_reason().map_or(String::new(), |e| format!(" ({e})"));
                (
                    Carried::KernelRandom,
                    format!(
                        "even on average: a socket per slot, a classic BPF program picks a live one at random, \
                         because eBPF is not permitted here{reason}; --mechanism handoff gives exact turns"
                    ),
                )
            }
        };
        let address = Address::Tcp(group.address());
        let stranded = Handoff::new(config.clone());
        Ok((Kind::Slots { group, stranded, look: None }, address, carried, why))
    }

    /// A socket that has come back and that no group can be built over.
    fn without_group(
        &self,
        id: ListenerId,
        (error, back): (BindError, OwnedFd),
        options: &Options,
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<(Kind, Address, Carried, String)> {
        let address = Address::Tcp(local_address(back.as_fd())?);
        let fd = reuse(back, options)?;
        if !self.by_hand {
            let why = format!("one socket that was kept, shared, because {error}");
            return Ok((Kind::Shared(Arc::new(fd)), address, Carried::SharedSocket, why));
        }
        let why = format!(
            "exact turns: the socket was kept, and the primary accepts from it, because {error}"
        );
        let turns = Turns::new(id, fd, None, config, io)?;
        Ok((Kind::Turns(turns), address, Carried::Handoff, why))
    }

    /// Has somebody hold a copy of what another process will need to go on listening. A port that the system chose is not
    /// asked for again, datagrams belong to nobody, and a group with a classic program cannot be left to anybody.
    fn have_kept(
        &mut self,
        id: ListenerId,
        port: &mut Port,
        asked: &Address,
        io: &ToLoop,
    ) -> io::Result<()> {
        let lasts = match asked {
            Address::Tcp(at) => at.port() != 0,
            Address::Unix(_) => true,
            Address::Udp(_) | Address::Inherited(_) => false,
        };
        if port.given || !lasts || !self.stored.exists() {
            port.kept = None;
            return Ok(());
        }
        if port.kept.is_none() {
            port.kept = match port.for_keeping() {
                Some(Ok(socket)) => self.stored.keep(socket),
                Some(Err(error)) => {
                    self.stored.cannot(&error.to_string());
                    None
                }
                None => None,
            };
        }
        if port.kept.is_none() {
            return port.is_kept_no_more();
        }
        port.is_kept(id, io)
    }

    /// A descriptor that the primary itself inherited: never one of ours, which are all close-on-exec, and
    /// only what the worker can use. Anything else is EINVAL, as under Node's primary.
    fn open_inherited(
        &self,
        id: ListenerId,
        number: i32,
        want: &Want4Port,
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<(Kind, Address, Carried, String)> {
        let fd = duplicate_inherited(number)?;
        let address = Address::Inherited(number);
        use channel::FdKind;
        let kind = channel::kind(fd.as_fd())?;
        let fits = match kind {
            FdKind::Udp => want.datagrams,
            // One that does not listen yet may be bound: listen(2) knows.
            FdKind::TcpListener | FdKind::TcpStream => !want.datagrams,
            FdKind::UnixListener | FdKind::UnixStream => !want.datagrams,
            _ => false,
        };
        if !fits && !want.sockets_only {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        channel::set_nonblocking(fd.as_fd(), true)?;
        if fits && !want.datagrams {
            rustix::net::listen(&fd, want.backlog)?;
        }
        if kind == FdKind::Udp || want.sockets_only || self.policy == Policy::Shared {
            let why = "one inherited socket, shared by all workers".to_owned();
            return Ok((Kind::Shared(Arc::new(fd)), address, Carried::SharedSocket, why));
        }
        let why =
            "exact turns: one inherited socket cannot be split, so the primary accepts".to_owned();
        let turns = Turns::new(id, fd, None, config, io)?;
        Ok((Kind::Turns(turns), address, Carried::Handoff, why))
    }

    /// Closes a socket. Connections that wait on it and belong to nobody are dropped, as when a server closes.
    pub(crate) fn close(&mut self, id: ListenerId) -> Option<Address> {
        self.book.remove(id);
        let mut port = self.open.remove(&id)?;
        self.refused_before += port.dropped().unwrap_or(0);
        if let Some(name) = port.kept.take() {
            port.owns_its_file(true);
            match port.kept_socket() {
                Some(socket) => self.stored.end(&name, socket),
                None => self.stored.forget(&name),
            }
        }
        Some(port.address)
    }

    /// Nothing outlives this process any more. Gives what went wrong.
    pub(crate) fn forget_kept(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        for port in self.open.values_mut() {
            if let Some(name) = port.kept.take() {
                self.stored.forget(&name);
                if let Err(error) = port.is_kept_no_more() {
                    failures.push(format!("{}: {error}", port.address));
                }
            }
        }
        self.stored.release();
        failures
    }

    /// What came back and nobody has asked for is let go.
    pub(crate) fn release_kept(&mut self) {
        self.stored.release();
    }

    /// What there is to tell people about sockets that are kept.
    pub(crate) fn store_remarks(&mut self) -> Vec<String> {
        self.stored.take_remarks()
    }

    /// Connections that the kernel turned away so far because a queue was full.
    pub(crate) fn refused(&self) -> u64 {
        self.refused_before + self.open.values().filter_map(Port::dropped).sum::<u64>()
    }

    /// What is to be known of each open socket.
    pub(crate) fn figures(&self) -> Vec<ListenerFigures> {
        let of = |port: &Port| ListenerFigures {
            address: port.address.clone(),
            dropped: port.dropped(),
            queue: port.common_queue(),
        };
        self.open.values().map(of).collect()
    }

    /// Connections that the kernel gave to this worker, where it counts them.
    pub(crate) fn given(&self, worker: WorkerId) -> Option<u64> {
        let before = self.given_before.get(&worker).copied().unwrap_or(0);
        Some(self.given_to(self.seats.of(worker)?)?.saturating_sub(before))
    }

    /// Connections that the kernel gave to a seat, whoever sat there.
    fn given_to(&self, seat: Seat) -> Option<u64> {
        let given = |port: &Port| match &port.kind {
            Kind::Slots { group, .. } => group.given(seat.0),
            _ => None,
        };
        self.open.values().filter_map(given).reduce(|a, b| a + b)
    }

    /// Whether some connections are handed over.
    pub(crate) fn hands_over(&self) -> bool {
        self.open.values().any(Port::is_handoff)
    }

    /// How many wait in the queue of each seat.
    pub(crate) fn queues(&self) -> Vec<((ListenerId, Seat), u32)> {
        let mut queues = Vec::new();
        for (id, port) in &self.open {
            if let Kind::Slots { group, .. } = &port.kind {
                let depth = |seat: u32| Some(((*id, Seat(seat)), group.queue_depth(seat).ok()?));
                queues.extend(group.slots().filter_map(depth));
            }
        }
        queues
    }

    /// How many connections wait for a worker: in its own queues in the kernel, or handed over and not acknowledged. `None`
    /// when it has neither, because all share one queue or each worker binds for itself.
    pub(crate) fn queue_of(&self, worker: WorkerId) -> Option<u64> {
        let seat = self.seat(worker);
        let of = |port: &Port| match &port.kind {
            Kind::Slots { group, .. } => group.queue_depth(seat?.0).ok().map(u64::from),
            Kind::Turns(turns) => Some(turns.handoff.in_flight(worker) as u64),
            Kind::Shared(_) | Kind::SharedUnix(_) => None,
        };
        self.open.values().filter_map(of).reduce(|sum, queue| sum + queue)
    }

    // ---- stuck workers ----

    /// What waits in the live slots of every port that counts its turns.
    pub(crate) fn depths(&self) -> BTreeMap<ListenerId, Depths> {
        let look = |(id, port): (&ListenerId, &Port)| {
            let Kind::Slots { group, .. } = &port.kind else { return None };
            let turns = group.turns()?;
            let depth = |slot: &u32| Some((*slot, group.queue_depth(*slot).ok()?));
            Some((*id, Depths { turns, queued: group.live().iter().filter_map(depth).collect() }))
        };
        self.open.iter().filter_map(look).collect()
    }

    /// How a connection of our own can be brought to one worker (`None`: to any), and on which port. `on` names the port;
    /// `any`: a connection can be handed over on whatever kind of socket.
    pub(crate) fn to_probe(
        &self,
        worker: Option<WorkerId>,
        on: Option<u16>,
        any: bool,
    ) -> Option<(ListenerId, Way)> {
        self.open.iter().find_map(|(id, port)| {
            let fits = match port.address {
                Address::Tcp(at) => on.is_none_or(|number| number == at.port()),
                Address::Unix(_) | Address::Inherited(_) => on.is_none(),
                Address::Udp(_) => false,
            };
            if !fits || worker.is_some_and(|worker| self.book.member(worker, *id).is_none()) {
                return None;
            }
            let way = match &port.kind {
                Kind::Slots { group, .. } if group.turns().is_some() => Way::Aimed,
                Kind::Turns(_) => Way::Handed,
                _ if any => Way::Handed,
                _ => Way::None,
            };
            Some((*id, way))
        })
    }

    /// A connection to the worker's own socket, where that is possible ([`Way::Aimed`]).
    pub(crate) fn reach(&self, worker: WorkerId, port: ListenerId) -> io::Result<OwnedFd> {
        let seat = self.seats.of(worker);
        match (self.open.get(&port).map(|port| &port.kind), seat) {
            (Some(Kind::Slots { group, .. }), Some(seat)) => group.reach(seat.0),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Whether there is anything for [`Ports::depths`] to tell.
    pub(crate) fn has_turns(&self) -> bool {
        self.sockets_with_turns().next().is_some()
    }

    /// The sockets that [`Ports::depths`] tells of.
    pub(crate) fn sockets_with_turns(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let groups = self.open.values().filter_map(|port| match &port.kind {
            Kind::Slots { group, .. } if group.turns().is_some() => Some(group),
            _ => None,
        });
        groups.flat_map(|group| group.slots().filter_map(|seat| group.listener(seat)))
    }

    /// Takes a worker's turns, or gives them back. Takes effect with the next [`Ports::refresh`].
    pub(crate) fn set_aside(&mut self, worker: WorkerId, aside: bool) {
        if aside {
            self.aside.insert(worker);
        } else {
            self.aside.remove(&worker);
        }
    }

    /// Whether something waits in a seat that has no turns.
    pub(crate) fn waits_aside(&self, seat: Seat) -> bool {
        self.open.values().any(|port| match &port.kind {
            Kind::Slots { group, .. } => {
                !group.live().contains(&seat.0) && group.queue_depth(seat.0).is_ok_and(|n| n > 0)
            }
            _ => false,
        })
    }

    /// Moves what waits in a seat that has no turns to the others. Its worker must stand still meanwhile. Gives
    /// what went wrong.
    pub(crate) fn rescue_aside(&mut self, seat: Seat) -> Vec<String> {
        let mut failures = Vec::new();
        for port in self.open.values_mut() {
            if let Kind::Slots { group, .. } = &mut port.kind
                && !group.live().contains(&seat.0)
                && group.queue_depth(seat.0).is_ok_and(|n| n > 0)
                && let Err(error) = group.rescue(seat.0)
            {
                failures.push(format!("{}: {error}", port.address));
            }
        }
        failures
    }

    // ---- the end ----

    /// The cluster stops: nothing new comes, what waits is still served. Gives what went wrong.
    pub(crate) fn refuse_new(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        for port in self.open.values_mut() {
            let refused = match (&mut port.kind, &port.address) {
                // A filter would stay on it; here it is enough to accept nothing more.
                (Kind::Turns(turns), _) if port.given || port.kept.is_some() => {
                    (turns.more, turns.paused) = (false, true);
                    Ok(())
                }
                _ if port.given || port.kept.is_some() => Ok(()),
                (Kind::Slots { group, .. }, _) => group.refuse_new(),
                (Kind::Shared(fd), Address::Tcp(_)) => reuseport::refuse_new(fd.as_fd()),
                (Kind::Turns(turns), Address::Tcp(_)) => {
                    turns.more = true;
                    reuseport::refuse_new(turns.socket.get_ref().as_fd())
                }
                // Who looks for the file does not find it; who did find it is served.
                (Kind::Turns(turns), _) => {
                    turns.more = true;
                    turns.file.as_mut().map_or(Ok(false), UnixSocket::unlink).map(drop)
                }
                (Kind::SharedUnix(socket), _) => socket.unlink().map(drop),
                (Kind::Shared(_), _) => Ok(()),
            };
            if let Err(error) = refused {
                failures
                    .push(format!("cannot refuse new connections on {}: {error}", port.address));
            }
        }
        failures
    }

    /// Whether nothing waits on sockets that all workers share or that the primary accepts from.
    pub(crate) fn is_dry(&self) -> bool {
        self.open.values().all(|port| match (&port.kind, &port.address) {
            (Kind::Turns(turns), _) => !turns.more && turns.handoff.counters().queued == 0,
            (Kind::Shared(fd), Address::Tcp(_)) if !port.given && port.kept.is_none() => {
                reuseport::queue_depth(fd.as_fd()).unwrap_or(0) == 0
            }
            _ => true,
        })
    }

    /// Every worker has been told to stop: the primary lets go of its sockets, so that new clients are refused
    /// at once. Who listens on what is still known. A group that is kept refuses nobody: its keeper gets them all.
    pub(crate) fn close_all(&mut self) {
        let refuses = |port: &Port| !matches!(port.kind, Kind::Slots { .. }) || port.kept.is_none();
        self.open.retain(|_, port| !refuses(port));
    }

    /// This is the end: all is closed here. What is kept is the next process's from now on.
    pub(crate) fn leave(&mut self) {
        for port in self.open.values_mut() {
            if let (Kind::Slots { group, .. }, Some(_)) = (&mut port.kind, &port.kept) {
                group.leave_keeper();
            }
        }
        self.open.clear();
    }

    /// Closes what no worker uses any more, and says what that was.
    pub(crate) fn close_unused(&mut self) -> Vec<Address> {
        self.book.unused().into_iter().filter_map(|id| self.close(id)).collect()
    }

    // ---- seats ----

    /// Makes a seat: every reuse-port group gets a socket for it. Gives what went wrong.
    pub(crate) fn make_seat(&mut self, seat: Seat) -> Vec<String> {
        if !self.seats.make(seat) {
            return Vec::new();
        }
        self.each_group(|group| group.add_slot(seat.0), seat, "add")
    }

    /// Gives a worker its seat, for as long as it lives. Gives what went wrong.
    pub(crate) fn take_seat(&mut self, worker: WorkerId, wish: Seat) -> Vec<String> {
        let (seat, new) = self.seats.take(worker, wish);
        if !new {
            let before = self.given_to(seat).unwrap_or(0);
            self.given_before.insert(worker, before);
            return Vec::new();
        }
        self.each_group(|group| group.add_slot(seat.0), seat, "add")
    }

    /// Closes the sockets of free seats beyond `wanted`; what waits on them goes to the others first. Gives what went
    /// wrong.
    pub(crate) fn trim_seats(&mut self, wanted: usize, now: Time) -> Vec<String> {
        let mut failures = Vec::new();
        for seat in self.seats.trim(wanted) {
            for port in self.open.values_mut() {
                if let Kind::Slots { group, stranded, .. } = &mut port.kind
                    && self.by_hand
                    && group.selection() == Selection::Classic
                {
                    strand(group, &[seat.0], now, stranded);
                }
                if let Kind::Slots { group, .. } = &port.kind {
                    port.dropped_before += group.dropped(seat.0).unwrap_or(0);
                    let alone = group.live().is_empty() && group.keeper().is_none();
                    if alone || group.selection() == Selection::Classic {
                        self.reset += u64::from(group.queue_depth(seat.0).unwrap_or(0));
                    }
                }
            }
            failures.extend(self.each_group(|group| group.remove_slot(seat.0), seat, "remove"));
        }
        failures
    }

    fn each_group(
        &mut self,
        mut act: impl FnMut(&mut Group) -> io::Result<()>,
        seat: Seat,
        verb: &str,
    ) -> Vec<String> {
        let mut failures = Vec::new();
        for port in self.open.values_mut() {
            if let Kind::Slots { group, .. } = &mut port.kind
                && let Err(e) = act(group)
            {
                failures.push(format!("cannot {verb} seat {} on {}: {e}", seat.0, port.address));
            }
        }
        failures
    }

    /// The sockets that a sockets worker inherits, with their names.
    pub(crate) fn inherited_by(&self, worker: WorkerId) -> io::Result<Vec<(OwnedFd, String)>> {
        let mut sockets = Vec::new();
        for port in self.open.values() {
            if let Some(fd) = self.seats.of(worker).and_then(|seat| port.socket_for(seat)) {
                // As systemd passes them on: a program that just accepts need not know better. The primary
                // itself never accepts from these.
                channel::set_nonblocking(fd, false)?;
                if matches!(port.address, Address::Tcp(_)) {
                    // Connections have it from their listener (tcp(7)). asyncio does not know that an inherited socket is TCP and
                    // leaves it off: each answer of uvicorn on a kept-alive connection then waits 40 ms for an acknowledgement.
                    rustix::net::sockopt::set_tcp_nodelay(fd, true)?;
                }
                // Colons separate names in LISTEN_FDNAMES.
                let name = port.address.to_string().replace(':', "_");
                sockets.push((fd.try_clone_to_owned()?, name));
            }
        }
        Ok(sockets)
    }

    // ---- workers ----

    /// A worker may have connections from now on, wherever it listens.
    pub(crate) fn admit(&mut self, worker: WorkerId, window: usize) {
        if let Some(seat) = self.seats.of(worker) {
            self.admitted.insert(worker, seat);
            self.windows.insert(worker, window);
        }
    }

    /// A worker gets nothing new.
    pub(crate) fn suspend(&mut self, worker: WorkerId) {
        self.admitted.remove(&worker);
        for port in self.open.values_mut() {
            if let Some(handoff) = port.handoff() {
                handoff.suspend(worker);
            }
        }
    }

    /// A worker is dead: what it had not acknowledged is free again.
    pub(crate) fn died(&mut self, worker: WorkerId) {
        self.suspend(worker);
        self.book.leave(worker);
        self.seats.leave(worker);
        self.windows.remove(&worker);
        self.aside.remove(&worker);
        self.given_before.remove(&worker);
        for port in self.open.values_mut() {
            if let Some(handoff) = port.handoff() {
                handoff.died(worker);
            }
        }
    }

    /// Brings every socket in line with who is admitted and listens: turns, live slots, stranded queues. Gives
    /// what went wrong.
    pub(crate) fn refresh(&mut self, now: Time) -> Vec<String> {
        let mut failures = Vec::new();
        let ids: Vec<_> = self.open.keys().copied().collect();
        for id in ids {
            let ready: Vec<(WorkerId, Seat)> = self
                .book
                .listeners_of(id)
                .filter_map(|w| self.admitted.get(&w).map(|seat| (w, *seat)))
                .collect();
            // A socket that a worker still holds must not be shut down under it.
            let held: BTreeSet<Seat> =
                self.book.members_of(id).filter_map(|w| self.seats.of(w)).collect();
            let Some(port) = self.open.get_mut(&id) else { continue };
            if let Some(handoff) = port.handoff() {
                for (worker, _) in &ready {
                    let window = self.windows.get(worker).copied().unwrap_or(1);
                    handoff.join(*worker, window);
                }
            }
            if let Kind::Slots { group, stranded, look } = &mut port.kind {
                let all = ready.iter();
                let well = all.filter(|(worker, _)| !self.aside.contains(worker));
                let mut live: Vec<u32> = well.map(|(_, seat)| seat.0).collect();
                if live.is_empty() {
                    live = ready.iter().map(|(_, seat)| seat.0).collect();
                }
                match refresh_group(group, &live, &held) {
                    Ok(left) if self.by_hand => strand(group, &left, now, stranded),
                    // They stay queued for the slot's next worker.
                    Ok(_) => {}
                    Err(e) => {
                        failures.push(format!("cannot switch slots on {}: {e}", port.address))
                    }
                }
                if let Some(look) = look
                    && !group.live().is_empty()
                {
                    if let Err(e) = group.empty_keeper() {
                        failures.push(format!("cannot move what waits on {}: {e}", port.address));
                    }
                    look.again.notify_one();
                }
            }
        }
        failures
    }

    /// Whether nothing waits for a suspended worker: neither in its seat's queue nor unacknowledged.
    pub(crate) fn is_quiet(&self, worker: WorkerId) -> bool {
        let depth = |group: &Group| {
            let seat = self.seats.of(worker);
            seat.and_then(|seat| group.queue_depth(seat.0).ok()).unwrap_or(0)
        };
        self.open.iter().all(|(id, port)| match &port.kind {
            Kind::Slots { group, stranded, .. } => {
                stranded.in_flight(worker) == 0
                    && (self.book.member(worker, *id).is_none() || depth(group) == 0)
            }
            Kind::Turns(turns) => turns.handoff.in_flight(worker) == 0,
            Kind::Shared(_) | Kind::SharedUnix(_) => true,
        })
    }

    // ---- handing over ----

    /// The task found the socket readable. True when it is one that nobody accepts from, and [`Ports::refresh`] has to move
    /// what waits there.
    pub(crate) fn acceptable(&mut self, id: ListenerId) -> bool {
        match self.open.get_mut(&id).map(|port| &mut port.kind) {
            Some(Kind::Turns(turns)) => {
                turns.more = true;
                false
            }
            Some(Kind::Slots { .. }) => true,
            _ => false,
        }
    }

    pub(crate) fn resume_accepting(&mut self, id: ListenerId) {
        if let Some(Port { kind: Kind::Turns(turns), .. }) = self.open.get_mut(&id) {
            turns.paused = false;
        }
    }

    /// Accepts what there is room for and says who gets what.
    pub(crate) fn deliver(&mut self, now: Time, out: &mut Vec<Delivery>) -> Vec<AcceptTrouble> {
        let mut troubles = Vec::new();
        let mut assigned = Vec::new();
        for (id, port) in &mut self.open {
            if let Kind::Turns(turns) = &mut port.kind
                && let Err(error) = turns.accept(now)
            {
                turns.paused = true;
                troubles.push(AcceptTrouble { port: *id, address: port.address.clone(), error });
            }
            let Some(handoff) = port.handoff() else { continue };
            handoff.assign(now, &mut assigned);
            out.extend(assigned.drain(..).map(|a| Delivery {
                port: *id,
                worker: a.worker,
                seq: a.seq,
                connection: a.connection,
            }));
        }
        troubles
    }

    pub(crate) fn handoff(&mut self, id: ListenerId) -> Option<&mut Handoff<Arc<OwnedFd>>> {
        self.open.get_mut(&id)?.handoff()
    }

    /// Everything on its way to this worker is its own from now on: the primary's copies are closed.
    pub(crate) fn abandon(&mut self, worker: WorkerId) {
        for port in self.open.values_mut() {
            let Some(handoff) = port.handoff() else { continue };
            let owed: Vec<u64> = handoff.unanswered(worker).collect();
            for seq in owed {
                // It owes this answer, so it cannot be wrong about it.
                drop(handoff.acknowledged(worker, seq));
            }
        }
    }

    /// Workers that let a connection wait too long.
    pub(crate) fn overdue(&self, now: Time) -> BTreeSet<WorkerId> {
        let mut overdue = BTreeSet::new();
        for port in self.open.values() {
            if let Some(handoff) = port.handoff_ref() {
                overdue.extend(handoff.overdue(now).map(|(worker, _)| worker));
            }
        }
        overdue
    }

    pub(crate) fn deadline(&self) -> Option<Time> {
        self.open.values().filter_map(|port| port.handoff_ref()?.deadline()).min()
    }

    /// Whether a round of [`Ports::deliver`] would accept more right away.
    pub(crate) fn has_more(&self) -> bool {
        self.open.values().any(|port| match &port.kind {
            Kind::Turns(turns) => turns.more && !turns.paused && turns.handoff.room() > 0,
            _ => false,
        })
    }

    /// Whether some slot has a socket that nobody accepts from while others serve: connections whose handshake
    /// was under way when its worker went may still reach it.
    pub(crate) fn has_idle_slots(&self) -> bool {
        self.open.iter().any(|(id, port)| match &port.kind {
            Kind::Slots { group, .. } => {
                let held = self.book.members_of(*id).count();
                !group.live().is_empty() && held < group.slots().count()
            }
            _ => false,
        })
    }

    pub(crate) fn own_socket_via(&self) -> Arc<Via> {
        Arc::new(Via {
            policy: Policy::Shared,
            mechanism: Carried::OwnSocket,
            why: "the program binds for itself; the kernel spreads connections".to_owned(),
        })
    }

    /// A worker inherited every pinned socket: it is a member and listens.
    pub(crate) fn join_pinned(&mut self, worker: WorkerId) -> Vec<ListenerId> {
        let ids: Vec<_> = self.open.keys().copied().collect();
        for id in &ids {
            self.book.join(worker, *id);
            self.book.listening(worker, *id);
        }
        ids
    }

    /// A leaving worker let go of a socket, which stays.
    pub(crate) fn let_go(&mut self, worker: WorkerId, id: ListenerId) {
        self.book.close(worker, id);
    }

    /// A worker that stays closed a socket. True when the socket should be closed, too.
    pub(crate) fn closed_by(&mut self, worker: WorkerId, id: ListenerId) -> bool {
        if let Some(handoff) = self.handoff(id) {
            handoff.suspend(worker);
        }
        self.book.close(worker, id)
    }

    pub(crate) fn ask(&mut self, worker: WorkerId, key: Key) -> Decision {
        self.book.ask(worker, key)
    }
}

impl Port {
    /// The socket of a seat; `None` when connections are handed over.
    pub(crate) fn socket_for(&self, seat: Seat) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Slots { group, .. } => group.listener(seat.0),
            Kind::Shared(fd) => Some(fd.as_fd()),
            Kind::SharedUnix(listener) => Some(listener.as_fd()),
            Kind::Turns(_) => None,
        }
    }

    /// Connections that the kernel turned away here because a queue was full; `None` where it does not say.
    fn dropped(&self) -> Option<u64> {
        let now = match (&self.kind, &self.address) {
            (Kind::SharedUnix(_), _) | (_, Address::Unix(_)) => return None,
            (Kind::Slots { group, .. }, _) => {
                let keeper = group.keeper().and_then(|keeper| reuseport::dropped(keeper).ok());
                let seats = group.slots().filter_map(|seat| group.dropped(seat).ok());
                seats.chain(keeper).sum()
            }
            (Kind::Shared(fd), _) => reuseport::dropped(fd.as_fd()).ok()?,
            (Kind::Turns(turns), _) => reuseport::dropped(turns.socket.get_ref().as_fd()).ok()?,
        };
        Some(self.dropped_before + now)
    }

    /// Connections that wait here for no worker in particular.
    fn common_queue(&self) -> Option<u64> {
        let waiting = |fd: BorrowedFd<'_>| match &self.address {
            Address::Tcp(_) => reuseport::queue_depth(fd).ok().map(u64::from),
            _ => None,
        };
        match &self.kind {
            Kind::Slots { .. } | Kind::SharedUnix(_) => None,
            Kind::Shared(fd) => waiting(fd.as_fd()),
            Kind::Turns(turns) => {
                let here = turns.handoff.counters().queued;
                Some(here + waiting(turns.socket.get_ref().as_fd()).unwrap_or(0))
            }
        }
    }

    // ---- outliving this process ----

    /// The socket to keep, made if need be. `None` when there can be none.
    fn for_keeping(&mut self) -> Option<io::Result<BorrowedFd<'_>>> {
        if let Kind::Slots { group, .. } = &mut self.kind {
            match group.add_keeper() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        self.kept_socket().map(Ok)
    }

    /// The socket that is kept.
    fn kept_socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Slots { group, .. } => group.keeper(),
            Kind::Shared(fd) => Some(fd.as_fd()),
            Kind::SharedUnix(socket) => Some(socket.as_fd()),
            Kind::Turns(turns) => Some(turns.socket.get_ref().as_fd()),
        }
    }

    /// Somebody has a copy.
    fn is_kept(&mut self, id: ListenerId, io: &ToLoop) -> io::Result<()> {
        self.owns_its_file(false);
        if let Kind::Slots { group, look, .. } = &mut self.kind
            && let Some(keeper) = group.keeper()
        {
            *look = Some(Look::at(id, keeper.try_clone_to_owned()?, io)?);
        }
        Ok(())
    }

    /// Nobody else is to have a copy.
    fn is_kept_no_more(&mut self) -> io::Result<()> {
        self.owns_its_file(true);
        match &mut self.kind {
            Kind::Slots { group, look, .. } => {
                *look = None;
                group.remove_keeper()
            }
            _ => Ok(()),
        }
    }

    /// Whether the file of a Unix socket goes when the socket is closed here.
    fn owns_its_file(&mut self, owns: bool) {
        if let Kind::SharedUnix(socket) | Kind::Turns(Turns { file: Some(socket), .. }) =
            &mut self.kind
        {
            socket.leave_file(!owns);
        }
    }

    pub(crate) fn is_handoff(&self) -> bool {
        matches!(self.kind, Kind::Turns(_))
    }

    fn handoff(&mut self) -> Option<&mut Handoff<Arc<OwnedFd>>> {
        match &mut self.kind {
            Kind::Turns(turns) => Some(&mut turns.handoff),
            Kind::Slots { stranded, .. } => Some(stranded),
            _ => None,
        }
    }

    fn handoff_ref(&self) -> Option<&Handoff<Arc<OwnedFd>>> {
        match &self.kind {
            Kind::Turns(turns) => Some(&turns.handoff),
            Kind::Slots { stranded, .. } => Some(stranded),
            _ => None,
        }
    }
}

/// Accepts what waits in slots that nobody accepts from and the kernel cannot empty.
fn strand(group: &Group, slots: &[u32], now: Time, stranded: &mut Handoff<Arc<OwnedFd>>) {
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
fn refresh_group(group: &mut Group, live: &[u32], held: &BTreeSet<Seat>) -> io::Result<Vec<u32>> {
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

impl Turns {
    fn new(
        id: ListenerId,
        fd: OwnedFd,
        file: Option<UnixSocket>,
        config: &HandoffConfig,
        io: &ToLoop,
    ) -> io::Result<Turns> {
        Turns::over(id, fd, file, Handoff::new(config.clone()), io)
    }

    fn over(
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
    fn accept(&mut self, now: Time) -> io::Result<()> {
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

impl Look {
    fn at(id: ListenerId, keeper: OwnedFd, io: &ToLoop) -> io::Result<Look> {
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

/// A listening socket of its own, or the one that has come back.
fn alone(at: SocketAddr, options: &Options, back: Option<OwnedFd>) -> io::Result<OwnedFd> {
    match back {
        Some(back) => reuse(back, options),
        None => reuseport::bind_listener(at, options).map_err(into_io),
    }
}

fn reuse(back: OwnedFd, options: &Options) -> io::Result<OwnedFd> {
    channel::set_nonblocking(back.as_fd(), true)?;
    reuseport::reuse_alone(back.as_fd(), options.backlog)?;
    Ok(back)
}

fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, accept_with};
    Ok(accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
}

/// A copy of a descriptor that this process was started with. Only of such a one: the primary's own are all
/// close-on-exec, and no worker may ask for those by number.
fn duplicate_inherited(number: i32) -> io::Result<OwnedFd> {
    use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
    if !polyfork_sys::system::inherited_fds().contains(&number) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let own = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(own, number, PidfdGetfdFlags::empty())?)
}

/// Whether a descriptor that this process was given listens where somebody wants to listen. A wildcard of either family
/// stands for all addresses: who has the port of one cannot be asked for that of the other.
fn listens_on(number: i32, wanted: &Address) -> bool {
    let Ok(fd) = duplicate_inherited(number) else { return false };
    match wanted {
        Address::Tcp(wanted) if wanted.port() != 0 => {
            local_address(fd.as_fd()).is_ok_and(|given| {
                let all = given.ip().is_unspecified() && wanted.ip().is_unspecified();
                given.port() == wanted.port() && (all || given.ip() == wanted.ip())
            })
        }
        Address::Unix(wanted) => rustix::net::getsockname(&fd)
            .ok()
            .and_then(|given| rustix::net::SocketAddrUnix::try_from(given).ok())
            .is_some_and(|given| {
                given.path_bytes().is_some_and(|path| path == wanted.as_os_str().as_bytes())
            }),
        _ => false,
    }
}

/// Number of a network interface, for addresses with a scope.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    if name.contains('/') || name.starts_with('.') {
        return None;
    }
    std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

/// Errors of accept(2) that concern one connection, not the listener.
fn is_per_connection(error: &io::Error) -> bool {
    !is_shortage(error)
        && !matches!(
            error.raw_os_error(),
            Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)
        )
}

fn into_io(error: BindError) -> io::Error {
    match error.errno.raw_os_error() {
        Some(raw) => io::Error::from_raw_os_error(raw),
        None => io::Error::new(error.errno.kind(), error.errno.to_string()),
    }
}

pub(crate) fn local_address(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(fd)?;
    SocketAddr::try_from(address).map_err(|_| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))
}

/// Inodes of the sockets that a process (`self`, or a number) holds. Empty when that cannot be read.
pub(crate) fn sockets_of(process: &str) -> BTreeSet<u64> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{process}/fd")) else {
        return BTreeSet::new();
    };
    let targets = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let inode = |target: PathBuf| {
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    targets.filter_map(inode).collect()
}

/// TCP addresses of those of `inodes` that listen, in the network namespace of a process, from `/proc`.
pub(crate) fn listening_sockets(pid: u32, inodes: &BTreeSet<u64>) -> Vec<Address> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let Ok(file) = std::fs::File::open(format!("/proc/{pid}/net/{table}")) else { continue };
        found.extend(listening_in(io::BufReader::new(file), inodes));
    }
    found
}

/// Those of one table. The kernel prints sockets that listen before all others (`tcp_get_idx` in `net/ipv4/tcp_ipv4.c`); what
/// follows may be a hundred thousand connections, finished ones included, and takes a tenth of a second.
fn listening_in(table: impl io::BufRead, inodes: &BTreeSet<u64>) -> Vec<Address> {
    let listens = |line: &String| line.split_ascii_whitespace().nth(3) == Some("0A");
    let lines = table.lines().map_while(Result::ok).skip(1).take_while(listens);
    lines.filter_map(|line| listening_line(&line, inodes)).collect()
}

/// One line of `/proc/net/tcp` about a socket that listens: its address if its inode is one of `inodes`.
fn listening_line(line: &str, inodes: &BTreeSet<u64>) -> Option<Address> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    if !inodes.contains(&fields.get(9)?.parse().ok()?) {
        return None;
    }
    let (host, port) = fields.get(1)?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // The kernel prints each 32-bit word of the address in the machine's byte order.
    let words: Vec<[u8; 4]> = (0..host.len() / 8)
        .map(|i| Some(u32::from_str_radix(host.get(i * 8..i * 8 + 8)?, 16).ok()?.to_ne_bytes()))
        .collect::<Option<_>>()?;
    let ip = match words.as_slice() {
        [v4] => IpAddr::V4(Ipv4Addr::from(*v4)),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (to, from) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                to.copy_from_slice(from);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    Some(Address::Tcp(SocketAddr::new(ip, port)))
}

/// How long accepting rests when the system is short of something.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_sockets_are_found_with_their_addresses() {
        let v4 = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let v6 = std::net::TcpListener::bind("[::1]:0");
        let found = listening_sockets(std::process::id(), &sockets_of("self"));
        for address in
            [Some(v4), v6.ok()].into_iter().flatten().map(|l| l.local_addr().expect("address"))
        {
            assert!(found.contains(&Address::Tcp(address)), "{address} in {found:?}");
        }
    }

    /// The fault: with a hundred thousand connections, looking for a worker's own socket kept the primary busy all the time.
    #[test]
    fn connections_are_not_read_through_for_sockets_that_listen() {
        struct Never;
        impl io::Read for Never {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("what follows the first connection was read")
            }
        }
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 0 0 7 1\n\
                     1: 0100007F:1F91 0100007F:C001 06 0:0 0:0 0 0 0 0 3\n";
        let reader = io::BufReader::new(io::Read::chain(table.as_bytes(), Never));
        let found = listening_in(reader, &BTreeSet::from([7]));
        assert_eq!(found, [Address::Tcp("127.0.0.1:8080".parse().expect("an address"))]);
    }

    #[test]
    fn a_line_that_makes_no_sense_is_no_socket() {
        let inodes = BTreeSet::from([7]);
        for line in
            ["", "0: x", "0: 0100007F:ZZZZ 0:0 0A 0 0 0 0 0 7", "0: 01:1F90 0:0 0A 0 0 0 0 0 7"]
        {
            assert_eq!(listening_line(line, &inodes), None);
        }
    }
}
