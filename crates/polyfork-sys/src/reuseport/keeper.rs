//! A socket of a group that belongs to no slot, so that the port can outlive the process.
//!
//! Somebody else (a service manager) holds a copy of the *keeper*. While a slot is live the program selects slots only. While
//! none is, it selects the keeper; and when this process is gone with all its sockets, the keeper is what is left of the
//! group: the program finds none of the sockets it knows, the kernel's own hash decides, and there is but one to
//! choose. What waited in the queues of sockets that closed moved there as well (the program is attached with
//! select-or-migrate, and stays attached to the group). The next process builds its group over the keeper and moves what waits.
//!
//! Only with the eBPF program: a classic one names positions in the kernel's array, which nobody knows any more once workers of
//! the process before still have sockets in it.
//!
//! The surprising rule: the keeper is in the program's map only while no slot is live. A socket can be in one map at a
//! time, and the map of a process that was killed lives a little longer than its successor takes to begin.
//!
//! Behaviour follows: kernel `net/core/sock_reuseport.c` (`reuseport_migrate_sock`, `reuseport_attach_prog`),
//! `net/ipv4/inet_connection_sock.c` (`inet_csk_listen_stop`), `kernel/bpf/reuseport_array.c`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{Shutdown, sockopt};

use super::{
    BindError, BindStep, Group, Mechanism, Member, Options, Want, check_slots, choose, ebpf,
    local_addr, queue_depth,
};

/// The keeper's number among the members; no slot has it.
pub(super) const KEEPER: u32 = u32::MAX;
/// As much as the kernel lets wait: nobody accepts for as long as it takes to start again.
const BACKLOG: i32 = i32::MAX;

impl Group {
    /// Builds a group over a socket that listens already and that another process has left: it becomes the keeper. No slot is
    /// live at first. What waits on it moves with [`empty_keeper`](Self::empty_keeper).
    ///
    /// The address is that of the socket. Sockets of the process before that are still open stay in the group until they
    /// are closed; no slot of ours has them, and what waits there moves to ours then.
    ///
    /// # Errors
    ///
    /// [`BindStep::Program`] without the eBPF program. In use when the socket belongs to another user. It comes back, and
    /// listens as before.
    pub fn over(
        keeper: OwnedFd,
        options: &Options,
        slots: &[u32],
    ) -> Result<Group, Box<(BindError, OwnedFd)>> {
        match build(keeper.as_fd(), options, slots) {
            Ok(mut group) => {
                group.insert(KEEPER, keeper);
                group.call_keeper();
                Ok(group)
            }
            Err(error) => Err(Box::new((error, keeper))),
        }
    }

    /// Adds a keeper, unless there is one. To be given to whoever shall hold it.
    ///
    /// # Errors
    ///
    /// `Unsupported`: the program is a classic one. Else those of bind and listen.
    pub fn add_keeper(&mut self) -> io::Result<BorrowedFd<'_>> {
        if let Mechanism::Classic(_) = self.mechanism {
            let text = "a group with a classic program cannot be left to another process";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        if !self.members.contains_key(&KEEPER) {
            let socket = self.join().map_err(|error| error.errno)?;
            rustix::net::listen(&socket, BACKLOG)?;
            self.insert(KEEPER, socket);
            if self.live.is_empty() {
                self.call_keeper();
            }
        }
        Ok(self.member(KEEPER)?.socket.as_fd())
    }

    /// The keeper, if there is one.
    pub fn keeper(&self) -> Option<BorrowedFd<'_>> {
        self.members.get(&KEEPER).map(|keeper| keeper.socket.as_fd())
    }

    /// Moves what waits on the keeper to the queues of live slots, if there are any. How many connections those were.
    ///
    /// # Errors
    ///
    /// Those of shutdown(2) and listen(2).
    pub fn empty_keeper(&mut self) -> io::Result<u32> {
        let Some(keeper) = self.keeper() else { return Ok(0) };
        let waiting = queue_depth(keeper)?;
        if self.live.is_empty() || waiting == 0 {
            return Ok(0);
        }
        rustix::net::shutdown(keeper, Shutdown::Read)?;
        rustix::net::listen(keeper, BACKLOG)?;
        Ok(waiting)
    }

    /// Lets the keeper go, for everybody who holds it: what waits on it moves to the live slots, or is reset if there are none.
    ///
    /// # Errors
    ///
    /// Those of shutdown(2).
    pub fn remove_keeper(&mut self) -> io::Result<()> {
        let Some(keeper) = self.keeper() else { return Ok(()) };
        rustix::net::shutdown(keeper, Shutdown::Read)?;
        self.forget(KEEPER);
        self.apply_live()
    }

    /// To be called before the group is dropped, when the keeper is to live on: the map of this process keeps it no longer
    /// from that of the next.
    pub fn leave_keeper(&mut self) {
        if let (Mechanism::Ebpf(selector), Some(keeper)) =
            (&mut self.mechanism, self.members.get(&KEEPER))
        {
            // With nothing in the list the hash decides, and there is only the keeper left.
            keeper.steps_back(selector, &[]);
        }
    }

    fn call_keeper(&mut self) {
        if let (Mechanism::Ebpf(selector), Some(keeper)) =
            (&mut self.mechanism, self.members.get(&KEEPER))
        {
            keeper.steps_in(selector);
        }
    }
}

impl Member {
    /// Nobody is live: all connections go to this one.
    pub(super) fn steps_in(&self, selector: &mut ebpf::Selector) {
        // It is there already, or in the map of a process that has just been killed. In the latter case the program finds
        // nothing, and the hash decides over sockets that all listen.
        let _ = selector.put(self.index, self.socket.as_fd());
        selector.set_live(&[self.index]);
    }

    /// Others are live.
    pub(super) fn steps_back(&self, selector: &mut ebpf::Selector, live: &[u32]) {
        selector.set_live(live);
        // Left in the map it is not selected either; it only delays a successor.
        let _ = selector.clear(self.index);
    }
}

/// A group of new sockets beside the keeper, which is in it but not noted yet.
fn build(keeper: BorrowedFd<'_>, options: &Options, slots: &[u32]) -> Result<Group, BindError> {
    let address = local_addr(keeper)
        .map_err(|errno| BindError::new(BindStep::Input, "a kept socket", errno))?;
    let fail = |step| move |errno: io::Error| BindError::new(step, address, errno);
    check_slots(slots).map_err(fail(BindStep::Input))?;
    let (mechanism, fallback) = choose(address, Want::Ebpf)?;
    let (members, live) = (BTreeMap::new(), Vec::new());
    let mut group = Group { address, options: *options, mechanism, fallback, members, live };
    let set = sockopt::set_socket_reuseport(keeper, true);
    set.map_err(|errno| fail(BindStep::Option)(errno.into()))?;
    // Before the program is attached: a socket that was bound alone gets into a group by the first that joins it. Until then
    // the program of the process before decides, or nobody, and all who could be chosen listen.
    for slot in slots {
        let socket = group.join()?;
        group.insert(*slot, socket);
        group.register(*slot).map_err(fail(BindStep::Attach))?;
    }
    if let Mechanism::Ebpf(selector) = &group.mechanism {
        ebpf::attach(keeper, selector).map_err(fail(BindStep::Attach))?;
    }
    let listens = rustix::net::listen(keeper, BACKLOG);
    listens.map_err(|errno| fail(BindStep::Listen)(errno.into()))?;
    Ok(group)
}

/// Makes a listening TCP socket that another process has left one that is used alone, be it a keeper: nobody can join it from
/// now on. What waits on it stays.
///
/// A program of a group that it was in stays attached, and moves what waits on sockets of that process to this one when they
/// are closed.
///
/// # Errors
///
/// Those of setsockopt(2) and listen(2).
pub fn reuse_alone(socket: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    sockopt::set_socket_reuseport(socket, false)?;
    Ok(rustix::net::listen(socket, backlog)?)
}
