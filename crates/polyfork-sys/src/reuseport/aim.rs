//! A connection to our own port from a source port that the program was told before.
//!
//! Which socket such a connection reaches is the program's to say (`ebpf`); here it is bound, announced, opened, and the
//! announcement taken back.
//!
//! The rule that surprises: it is opened within the call or not at all. A SYN that is repeated later, because the slot's
//! queue was full, would come when the announcement is gone, and reach somebody else.
//!
//! Behaviour follows: connect(2), tcp(7), ip(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};

use super::bind;

/// On the loopback interface it takes a few microseconds, unless the machine has much else to do.
const LONGEST: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Opens a connection to `address`; `announce` is told the source port before, and `None` afterwards.
pub(super) fn connect(address: SocketAddr, announce: impl Fn(Option<u16>)) -> io::Result<OwnedFd> {
    let target = SocketAddr::new(reachable(address.ip()), address.port());
    let socket = bind::socket(target, SocketType::STREAM, false).map_err(|error| error.errno)?;
    rustix::net::bind(&socket, &SocketAddr::new(target.ip(), 0))?;
    let own = bind::local_addr(socket.as_fd())?;
    announce(Some(own.port()));
    let opened = open(&socket, target);
    announce(None);
    opened.map(|()| socket)
}

fn open(socket: &OwnedFd, target: SocketAddr) -> io::Result<()> {
    match rustix::net::connect(socket, &target) {
        Ok(()) => return Ok(()),
        Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut waited = [PollFd::new(socket, PollFlags::OUT)];
    if poll(&mut waited, Some(&LONGEST))? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the connection was not taken at once",
        ));
    }
    sockopt::socket_error(socket)?.map_err(io::Error::from)
}

/// An address of this machine that leads to whoever listens on `listens`.
fn reachable(listens: IpAddr) -> IpAddr {
    match listens {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}
