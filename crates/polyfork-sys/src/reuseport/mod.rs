//! One port, a listening socket per slot, and a program in the kernel that picks among them.
//!
//! A [`Group`] holds the sockets of all slots and says which slots are live; the kernel gives each new
//! connection to one of them. Workers accept from their own socket as if they had bound it, and this
//! process is not in the way of any connection. Which slots are live, and when, is decided above.
//!
//! Two kinds of program: `ebpf` (exact turns, moves what waits in a closed socket's queue to the
//! others; needs `CAP_BPF` and `CAP_NET_ADMIN`, Linux 5.14) and `classic` (at random, no privilege).
//! [`Want::Auto`] takes the first and falls back to the second, remembering why.
//!
//! # Why a second cluster cannot share the port unseen
//!
//! `SO_REUSEPORT` lets any socket of the same user join a group, silently. So the first socket is bound
//! and set listening *without* that option: if anybody listens on the port, group or not, the kernel
//! refuses (when two try at once, the second `listen` sees the first socket listening). Only a listening
//! socket gets the option for good, and then the others join; there is no moment in which a rival could
//! pass. Kernel: `inet_csk_get_port` is called again by `inet_csk_listen_start`, with `inet_bind_conflict`.
//!
//! Between bind and listen the option is on for a moment, because the kernel makes the group and takes its
//! program only then (`reuseport_attach_prog`): so even a group of one has its program from the start.
//!
//! A group that is built over a socket which outlived its process (`keeper`) needs no such door: that socket has held the port
//! all the time.
//!
//! What remains possible: a program of the same user that itself binds with `SO_REUSEPORT` joins the
//! group. It gets no connection while a slot is live (the program names our sockets only).
//!
//! Behaviour follows: socket(7), kernel `net/core/sock_reuseport.c`, `net/ipv4/inet_connection_sock.c`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{Shutdown, SocketType, sockopt};

use crate::errno;

mod aim;
mod assembler;
mod bind;
mod classic;
mod closing;
mod ebpf;
mod keeper;
mod parts;

pub use bind::{
    BindError, BindStep, MAX_UNIX_PATH, UdpFlags, UnixSocket, bind_listener, bind_udp, bind_unix,
    ensure_free, is_wildcard, local_addr,
};
use classic::Positions;
pub use closing::refuse_new;
pub use keeper::reuse_alone;
pub use parts::{Parts, Picks, Place, Spare, adopt_spare, spare_parts};

/// How the sockets of a port are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// An IPv6 wildcard address does not take IPv4.
    pub ipv6_only: bool,
    /// How many finished connections wait in each socket's queue (the kernel caps it at `net.core.somaxconn`).
    pub backlog: i32,
}

impl Default for Options {
    /// Node's defaults: both protocols, 511.
    fn default() -> Self {
        Self { ipv6_only: false, backlog: 511 }
    }
}

/// Which program picks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// Exact turns over the live slots.
    Ebpf,
    /// At random over the live slots, even on average.
    Classic,
}

/// Which program is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Want {
    /// eBPF where it is permitted, else classic.
    #[default]
    Auto,
    /// eBPF or an error.
    Ebpf,
    /// Classic.
    Classic,
}

/// Why the eBPF program cannot be used.
#[derive(Debug, thiserror::Error)]
pub struct LoadError {
    /// What was being done.
    pub step: &'static str,
    /// The error.
    #[source]
    pub errno: io::Error,
    /// The verifier's log, when it refused the program.
    pub log: Option<String>,
}

impl LoadError {
    fn new(step: &'static str, errno: io::Error) -> Self {
        Self { step, errno, log: None }
    }

    /// Whether rights are missing (as opposed to a kernel that cannot).
    pub fn is_not_permitted(&self) -> bool {
        self.errno.kind() == io::ErrorKind::PermissionDenied
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.step, errno::text(&self.errno))?;
        if self.is_not_permitted() {
            write!(f, " (CAP_BPF and CAP_NET_ADMIN are needed)")?;
        }
        Ok(())
    }
}

/// What became of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rescued {
    /// The connections that waited (this many, when last counted) wait in the queues of live slots now.
    Moved(u32),
    /// The kernel cannot move them: accept them from [`Group::listener`] and hand them over.
    NotPossible,
}

#[derive(Debug)]
enum Mechanism {
    Ebpf(ebpf::Selector),
    Classic(Positions),
}

#[derive(Debug)]
struct Member {
    socket: OwnedFd,
    /// Place in the eBPF program's map of sockets.
    index: u32,
    /// What that place had been given before.
    given_before: u64,
}

/// The sockets of one port.
///
/// Every slot has a socket that listens from [`bind`](Self::bind) or [`add_slot`](Self::add_slot) on,
/// live or not. While no slot is live, the kernel spreads connections over all of them by its hash.
/// Dropping the group closes the sockets here; a worker that has a copy of its own goes on listening.
#[derive(Debug)]
pub struct Group {
    address: SocketAddr,
    options: Options,
    mechanism: Mechanism,
    fallback: Option<LoadError>,
    members: BTreeMap<u32, Member>,
    live: Vec<u32>,
}

impl Group {
    /// Binds a socket for each slot. No slot is live at first.
    ///
    /// Port 0 takes a free port, the same for all; [`address`](Self::address) tells which.
    ///
    /// # Errors
    ///
    /// In use when anybody listens on the port, be it a group of the same user; see the header of this
    /// module. [`BindStep::Program`] only with [`Want::Ebpf`].
    pub fn bind(
        address: SocketAddr,
        options: &Options,
        slots: &[u32],
        want: Want,
    ) -> Result<Self, BindError> {
        check_slots(slots).map_err(|errno| BindError::new(BindStep::Input, address, errno))?;
        let (mechanism, fallback) = choose(address, want)?;
        let prepare = |door: BorrowedFd<'_>| make_group(door, &mechanism);
        let door = bind::bind_prepared(address, options, prepare)?;
        let address = local_addr(door.as_fd())
            .map_err(|errno| BindError::new(BindStep::Bind, address, errno))?;
        sockopt::set_socket_reuseport(&door, true)
            .map_err(|errno| BindError::new(BindStep::Option, address, errno))?;
        let options = *options;
        let (members, live) = (BTreeMap::new(), Vec::new());
        let mut group = Self { address, options, mechanism, fallback, members, live };
        let mut door = Some(door);
        for slot in slots {
            let socket = match door.take() {
                Some(door) => door,
                None => group.join()?,
            };
            group.insert(*slot, socket);
            group
                .register(*slot)
                .map_err(|errno| BindError::new(BindStep::Attach, address, errno))?;
        }
        Ok(group)
    }

    /// The address with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Which program picks.
    pub fn selection(&self) -> Selection {
        match self.mechanism {
            Mechanism::Ebpf(_) => Selection::Ebpf,
            Mechanism::Classic(_) => Selection::Classic,
        }
    }

    /// Why it is not eBPF although [`Want::Auto`] would have liked it.
    pub fn fallback_reason(&self) -> Option<&LoadError> {
        self.fallback.as_ref()
    }

    /// All slots, ascending.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        self.members.keys().copied().filter(|slot| *slot != keeper::KEEPER)
    }

    /// The slot's listening socket (non-blocking, close-on-exec).
    pub fn listener(&self, slot: u32) -> Option<BorrowedFd<'_>> {
        self.members.get(&slot).map(|member| member.socket.as_fd())
    }

    /// No slot takes a new handshake any more: see [`refuse_new`].
    ///
    /// # Errors
    ///
    /// Those of [`refuse_new`].
    pub fn refuse_new(&self) -> io::Result<()> {
        self.members.values().try_for_each(|member| refuse_new(member.socket.as_fd()))
    }

    /// Adds a slot: a socket that joins the group and listens. It is not live yet.
    ///
    /// # Errors
    ///
    /// `InvalidInput`: the slot exists, or there are too many. Else those of bind and listen.
    pub fn add_slot(&mut self, slot: u32) -> io::Result<()> {
        if self.members.contains_key(&slot) || slot == keeper::KEEPER {
            return Err(invalid(format!("slot {slot} exists already")));
        }
        if self.members.len() >= ebpf::CAPACITY {
            return Err(invalid(format!("a group has at most {} slots", ebpf::CAPACITY)));
        }
        let socket = self.join().map_err(|error| error.errno)?;
        self.insert(slot, socket);
        let registered = self.register(slot);
        if registered.is_err() {
            self.forget(slot);
        }
        registered
    }

    /// Takes a slot out: no longer live, what waits in its queue saved, its socket closed for everybody
    /// who has a copy.
    ///
    /// eBPF: the queue moves to the live slots. Classic: the queue must have been emptied before
    /// (accept from [`listener`](Self::listener) after [`set_live`](Self::set_live) without the slot); a
    /// handshake that ends between the last accept and the close is reset.
    ///
    /// # Errors
    ///
    /// - `NotFound`: no such slot.
    /// - `InvalidInput`: it is the last one, and the port would be lost.
    /// - `ResourceBusy`: connections wait in its queue and the kernel cannot move them. It is not live any
    ///   more; accept them and call again.
    pub fn remove_slot(&mut self, slot: u32) -> io::Result<()> {
        self.member(slot)?;
        if self.members.len() == 1 {
            return Err(invalid(format!("slot {slot} is the last one")));
        }
        if self.live.contains(&slot) {
            let live: Vec<u32> = self.live.iter().copied().filter(|one| *one != slot).collect();
            self.set_live(&live)?;
        }
        if self.selection() == Selection::Classic {
            let waiting = self.queue_depth(slot)?;
            if waiting > 0 {
                let text = format!("{waiting} connections wait in the queue of slot {slot}");
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
        }
        self.step_aside(slot)?;
        // Not only our copy: a worker that still has one stops listening, too (or did so before).
        match rustix::net::shutdown(&self.member(slot)?.socket, Shutdown::Read) {
            Ok(()) | Err(Errno::NOTCONN) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.forget(slot);
        self.apply_live()
    }

    /// Says which slots get connections, from the next one on. Nothing is detached meanwhile.
    ///
    /// A slot named twice gets two turns of each round.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such slot. `InvalidInput`: too many. The old set stays then.
    pub fn set_live(&mut self, slots: &[u32]) -> io::Result<()> {
        for slot in slots {
            self.member(*slot)?;
        }
        let most = match self.mechanism {
            Mechanism::Ebpf(_) => ebpf::CAPACITY,
            Mechanism::Classic(_) => classic::MAX_LIVE,
        };
        if slots.len() > most {
            return Err(invalid(format!(
                "{} live slots, at most {most} are possible",
                slots.len()
            )));
        }
        let before = std::mem::replace(&mut self.live, slots.to_vec());
        let applied = self.apply_live();
        if applied.is_err() {
            self.live = before;
        }
        applied
    }

    /// The live slots, as set last.
    pub fn live(&self) -> &[u32] {
        &self.live
    }

    /// How many finished connections wait in the slot's queue.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such slot.
    pub fn queue_depth(&self, slot: u32) -> io::Result<u32> {
        queue_depth(self.member(slot)?.socket.as_fd())
    }

    /// Connections that the kernel turned away because this slot's queue was full, since the slot was added.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such slot.
    pub fn dropped(&self, slot: u32) -> io::Result<u64> {
        dropped(self.member(slot)?.socket.as_fd())
    }

    /// Moves what waits in the queue of a slot that is not live to the queues of live ones.
    ///
    /// The slot's socket listens again afterwards, as the same socket: a worker's copy stays good. A
    /// worker that calls accept in between (some 30 us) gets `EINVAL`. Handshakes that were under way
    /// end up in the slot's queue later: look at [`queue_depth`](Self::queue_depth) again after a while.
    ///
    /// A socket that a worker has shut down (which works on every copy, ours too) listens again, in a
    /// classic group as well.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such slot. `InvalidInput`: it is live. Else those of listen(2); the slot is deaf then.
    pub fn rescue(&mut self, slot: u32) -> io::Result<Rescued> {
        let socket = self.member(slot)?.socket.as_fd();
        if self.live.contains(&slot) {
            return Err(invalid(format!("slot {slot} is live, its queue would fill again")));
        }
        if !sockopt::socket_acceptconn(socket)? {
            return self.revive(slot).map(|()| Rescued::Moved(0));
        }
        // With nobody to take them the kernel would reset the connections.
        if self.live.is_empty() || self.selection() == Selection::Classic {
            return Ok(Rescued::NotPossible);
        }
        let waiting = queue_depth(socket)?;
        rustix::net::shutdown(socket, Shutdown::Read)?;
        rustix::net::listen(socket, self.options.backlog)?;
        // A socket that stops listening leaves the map by itself.
        self.register(slot)?;
        Ok(Rescued::Moved(waiting))
    }

    /// Lets a socket listen that somebody has shut down.
    fn revive(&mut self, slot: u32) -> io::Result<()> {
        rustix::net::listen(&self.member(slot)?.socket, self.options.backlog)?;
        if let Mechanism::Classic(positions) = &mut self.mechanism {
            positions.remove(slot);
            positions.append(slot);
            return self.apply_live();
        }
        self.register(slot)
    }

    /// How many turns connection requests have taken since the start (eBPF only).
    pub fn turns(&self) -> Option<u64> {
        match &self.mechanism {
            Mechanism::Ebpf(selector) => Some(selector.turns()),
            Mechanism::Classic(_) => None,
        }
    }

    /// How many connection requests were given to a slot since it was added (eBPF only). A request that a client had to
    /// repeat counts each time.
    pub fn given(&self, slot: u32) -> Option<u64> {
        let member = self.members.get(&slot)?;
        match &self.mechanism {
            Mechanism::Ebpf(selector) => Some(selector.given(member.index) - member.given_before),
            Mechanism::Classic(_) => None,
        }
    }

    /// Opens a connection to this group that reaches one slot, live or not, and takes nobody's turn (eBPF only).
    ///
    /// Takes some 50 us; 20 ms at most, when the slot's queue is full or the machine is very busy.
    ///
    /// # Errors
    ///
    /// `NotFound`: no such slot. `Unsupported`: the program cannot be aimed. `TimedOut`: it was not taken in time. Else those
    /// of socket(2), bind(2) and connect(2).
    pub fn reach(&self, slot: u32) -> io::Result<OwnedFd> {
        let index = self.member(slot)?.index;
        match &self.mechanism {
            Mechanism::Ebpf(selector) => {
                aim::connect(self.address, |port| selector.aim(port.map(|port| (index, port))))
            }
            Mechanism::Classic(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a classic program cannot send a connection to a slot of our choice",
            )),
        }
    }

    fn member(&self, slot: u32) -> io::Result<&Member> {
        self.members.get(&slot).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("there is no slot {slot}"))
        })
    }

    /// A socket that joins the group and listens.
    fn join(&self) -> Result<OwnedFd, BindError> {
        let fail = |step| move |errno: Errno| BindError::new(step, self.address, errno);
        let socket = bind::socket(self.address, SocketType::STREAM, self.options.ipv6_only)?;
        sockopt::set_socket_reuseaddr(&socket, true).map_err(fail(BindStep::Option))?;
        sockopt::set_socket_reuseport(&socket, true).map_err(fail(BindStep::Option))?;
        rustix::net::bind(&socket, &self.address).map_err(fail(BindStep::Bind))?;
        rustix::net::listen(&socket, self.options.backlog).map_err(fail(BindStep::Listen))?;
        Ok(socket)
    }

    /// Notes a member whose socket has just begun to listen.
    fn insert(&mut self, slot: u32, socket: OwnedFd) {
        let taken: BTreeSet<u32> = self.members.values().map(|member| member.index).collect();
        let index = (0..).find(|index| !taken.contains(index)).unwrap_or(u32::MAX);
        let given_before = match &self.mechanism {
            Mechanism::Ebpf(selector) => selector.given(index),
            Mechanism::Classic(_) => 0,
        };
        self.members.insert(slot, Member { socket, index, given_before });
        if let Mechanism::Classic(positions) = &mut self.mechanism {
            positions.append(slot);
        }
    }

    /// Drops a member whose socket has stopped listening, or is closed by this.
    fn forget(&mut self, slot: u32) {
        self.members.remove(&slot);
        if let Mechanism::Classic(positions) = &mut self.mechanism {
            positions.remove(slot);
        }
    }

    /// Puts a slot's socket where the program finds it.
    fn register(&self, slot: u32) -> io::Result<()> {
        match &self.mechanism {
            Mechanism::Ebpf(selector) => {
                let member = self.member(slot)?;
                selector.put(member.index, member.socket.as_fd())
            }
            // The array of the kernel is all there is.
            Mechanism::Classic(_) => Ok(()),
        }
    }

    /// Makes the kernel's choice that of `self.live`.
    fn apply_live(&mut self) -> io::Result<()> {
        let index = |slot: &u32| self.members.get(slot).map(|member| member.index);
        match &mut self.mechanism {
            Mechanism::Ebpf(selector) => {
                let indices: Vec<u32> = self.live.iter().filter_map(index).collect();
                match self.members.get(&keeper::KEEPER) {
                    Some(keeper) if indices.is_empty() => keeper.steps_in(selector),
                    Some(keeper) => keeper.steps_back(selector, &indices),
                    None => selector.set_live(&indices),
                }
                Ok(())
            }
            Mechanism::Classic(positions) => {
                let live = positions.of(&self.live);
                self.attach_classic(&live)
            }
        }
    }

    /// Attaches by way of a member that listens: one that does not would become a group of its own
    /// (`reuseport_attach_prog`) and could not come back.
    fn attach_classic(&self, live: &[u32]) -> io::Result<()> {
        let listens = |member: &&Member| sockopt::socket_acceptconn(&member.socket) == Ok(true);
        match self.members.values().find(listens) {
            Some(member) => classic::attach(member.socket.as_fd(), live),
            None => Ok(()),
        }
    }

    /// Prepares for `slot` to stop listening. In a classic group that moves the last socket to another
    /// position; until the next program knows it, no connection is sent to the last position.
    fn step_aside(&self, slot: u32) -> io::Result<()> {
        match &self.mechanism {
            Mechanism::Ebpf(selector) => selector.clear(self.member(slot)?.index),
            Mechanism::Classic(positions) => {
                let stay = |one: &u32| *one != slot && Some(*one) != positions.last();
                let live: Vec<u32> = self.live.iter().copied().filter(stay).collect();
                self.attach_classic(&positions.of(&live))
            }
        }
    }
}

/// Makes a group of one out of a bound socket that does not listen yet, with its program.
fn make_group(door: BorrowedFd<'_>, mechanism: &Mechanism) -> io::Result<()> {
    sockopt::set_socket_reuseport(door, true)?;
    match mechanism {
        Mechanism::Ebpf(selector) => ebpf::attach(door, selector)?,
        Mechanism::Classic(_) => classic::attach(door, &[])?,
    }
    Ok(sockopt::set_socket_reuseport(door, false)?)
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn check_slots(slots: &[u32]) -> io::Result<()> {
    if slots.is_empty() || slots.len() > ebpf::CAPACITY {
        let text = format!("{} slots, 1 to {} are possible", slots.len(), ebpf::CAPACITY);
        return Err(invalid(text));
    }
    if slots.contains(&keeper::KEEPER) {
        return Err(invalid(format!("a slot cannot have the number {}", keeper::KEEPER)));
    }
    let mut seen = BTreeSet::new();
    match slots.iter().find(|slot| !seen.insert(**slot)) {
        Some(slot) => Err(invalid(format!("slot {slot} is named twice"))),
        None => Ok(()),
    }
}

/// Programs that were loaded while that was permitted, for groups that come later.
static SPARE: Mutex<Vec<ebpf::Selector>> = Mutex::new(Vec::new());

/// Loads `groups` programs in advance, for a process that is about to give up the right to: a group that is bound later
/// takes one of them when it may load none of its own. Attaching one, and changing its maps, needs no right (the latter
/// from Linux 6.0 on).
///
/// # Errors
/// Why the kernel takes none: the same reason as of [`Group::fallback_reason`].
pub fn load_in_advance(groups: usize) -> Result<(), LoadError> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    while spare.len() < groups {
        spare.push(ebpf::Selector::load()?);
    }
    Ok(())
}

fn load() -> Result<ebpf::Selector, LoadError> {
    ebpf::Selector::load().or_else(|reason| {
        let spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.ok_or(reason)
    })
}

fn choose(address: SocketAddr, want: Want) -> Result<(Mechanism, Option<LoadError>), BindError> {
    let classic = Mechanism::Classic(Positions::default());
    match want {
        Want::Classic => Ok((classic, None)),
        Want::Auto => Ok(match load() {
            Ok(selector) => (Mechanism::Ebpf(selector), None),
            Err(reason) => (classic, Some(reason)),
        }),
        Want::Ebpf => match load() {
            Ok(selector) => Ok((Mechanism::Ebpf(selector), None)),
            Err(reason) => {
                let text = io::Error::new(reason.errno.kind(), reason.to_string());
                let mut error = BindError::new(BindStep::Program, address, text);
                error.verifier_log = reason.log;
                Err(error)
            }
        },
    }
}

/// Connections that have finished their handshake on a listening TCP socket and wait for accept.
///
/// # Errors
///
/// Those of getsockopt(2): not a TCP socket.
pub fn queue_depth(listener: BorrowedFd<'_>) -> io::Result<u32> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, place) = (listener.as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: `place` has room for `length` bytes, and the kernel writes no more than that.
    let result =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, then filled in part by the kernel; plain numbers, for which all bits are valid.
    let info = unsafe { info.assume_init() };
    // For a listening socket the kernel reports its queue here (`tcp_get_info`, `sk_ack_backlog`).
    Ok(info.tcpi_unacked)
}

/// Connections that the kernel turned away on a listening socket because its queue was full, since it exists.
///
/// # Errors
///
/// Those of getsockopt(2).
pub fn dropped(listener: BorrowedFd<'_>) -> io::Result<u64> {
    // `SK_MEMINFO_DROPS` of linux/sock_diag.h.
    const DROPS: usize = 8;
    let mut counts = [0u32; DROPS + 1];
    let mut length = size_of_val(&counts) as libc::socklen_t;
    let (fd, place) = (listener.as_raw_fd(), counts.as_mut_ptr().cast());
    // SAFETY: `place` has room for `length` bytes, and the kernel writes no more than that.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, place, &raw mut length) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from(counts[DROPS]))
}

/// Sets an option of the socket level.
fn set_option<T>(socket: BorrowedFd<'_>, option: i32, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    let (fd, place) = (socket.as_raw_fd(), ptr::from_ref(value).cast());
    // SAFETY: `place` points to a `T`, whose size is passed; each caller passes the type that the option
    // demands (`int`, `struct sock_fprog` with the program it points to), alive over the call.
    if unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, place, length) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
