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
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::{Decision, Handoff, ListenerId, Listeners, Seat, Seats, Time, WorkerId};
use polyfork_sys::channel;
use polyfork_sys::reuseport::{self, Group, Selection, UnixSocket};
use polyfork_wire::RawJson;

use super::event::{Carried, Via};
use super::figures::ListenerFigures;
use super::settings::{Address, Mechanism, Policy};
use super::to_loop::ToLoop;
use store::Stored;
use turns::{Look, Turns, refresh_group, strand};

pub(super) mod carry;
mod open;
pub(super) mod sockets;
pub(super) mod store;
mod turns;

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

    /// What no worker uses.
    pub(crate) fn unused(&self) -> Vec<Address> {
        let unused = self.book.unused().into_iter().filter_map(|id| self.open.get(&id));
        unused.map(|port| port.address.clone()).collect()
    }

    /// Closes what no worker uses any more, and says what that was. Who waits there is reset.
    pub(crate) fn close_unused(&mut self) -> Vec<Address> {
        let unused = self.book.unused();
        let ports = unused.iter().filter_map(|id| self.open.get(id));
        self.reset += ports.map(Port::waiting).sum::<u64>();
        unused.into_iter().filter_map(|id| self.close(id)).collect()
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

    /// Connections that wait here, wherever.
    fn waiting(&self) -> u64 {
        let on = |socket: BorrowedFd<'_>| u64::from(reuseport::queue_depth(socket).unwrap_or(0));
        match (&self.kind, &self.address) {
            (_, Address::Unix(_)) => 0,
            (Kind::Slots { group, .. }, _) => {
                let depths = group.slots().filter_map(|seat| group.queue_depth(seat).ok());
                depths.map(u64::from).sum::<u64>() + group.keeper().map_or(0, on)
            }
            (Kind::Shared(fd), _) => on(fd.as_fd()),
            (Kind::Turns(turns), _) => {
                turns.handoff.counters().queued + on(turns.socket.get_ref().as_fd())
            }
            (Kind::SharedUnix(_), _) => 0,
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

/// How long accepting rests when the system is short of something.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
