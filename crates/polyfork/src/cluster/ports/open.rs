//! Opening and closing: which socket, or which sockets, an address gets.
//!
//! One that this process was given, one that has come back from a service manager, or a new one; and by policy and mechanism a
//! group with a socket for each seat, one that all share, or one that the primary accepts from.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use polyfork_core::{Handoff, HandoffConfig, ListenerId};
use polyfork_sys::channel;
use polyfork_sys::reuseport::{self, BindError, Group, Options, Selection, UdpFlags, Want};

use super::sockets::local_address;
use super::store::{self, Waiting};
use super::turns::Turns;
use super::{Kind, Port, Ports, Want4Port};
use crate::cluster::event::{Carried, Via};
use crate::cluster::settings::{Address, Mechanism, Policy};
use crate::cluster::to_loop::ToLoop;

impl Ports {
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

    pub(super) fn try_open(
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
    pub(super) fn open_over(
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

    pub(super) fn open_tcp(
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
    pub(super) fn without_group(
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
    pub(super) fn have_kept(
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
    pub(super) fn open_inherited(
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

fn into_io(error: BindError) -> io::Error {
    match error.errno.raw_os_error() {
        Some(raw) => io::Error::from_raw_os_error(raw),
        None => io::Error::new(error.errno.kind(), error.errno.to_string()),
    }
}
