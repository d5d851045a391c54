//! A worker's process on its way to the next image of its primary: it stays a child of the same process.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use polyfork_core::{SlotId, WorkerId};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use super::{Pipe, Running, Stdio};
use crate::cluster::cgroup::GroupState;
use crate::cluster::link::Link;
use crate::cluster::link::carry::LinkState;
use crate::cluster::notify::NotifySocket;
use crate::cluster::register::register;
use crate::cluster::to_loop::ToLoop;
use crate::cluster::upgrade::{FreezeError, Name, Packing, ResumeError, Unpacking};

/// A process as it is written down.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RunningState {
    pid: i32,
    pidfd: Name,
    pub(crate) link: Option<LinkState>,
    cookie: Option<u64>,
    group: Option<GroupState>,
    pipes: Vec<(u32, Name)>,
    notify: Option<(String, Name)>,
}

/// Output that nobody reads, as it is written down.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PipeState {
    slot: SlotId,
    worker: WorkerId,
    stdio: Stdio,
    pipe: Name,
    pending: Vec<u8>,
}

impl Running {
    /// Writes down a process whose tasks are at rest.
    pub(crate) fn pack(&self, packing: &mut Packing) -> Result<RunningState, FreezeError> {
        let Running { pid, pidfd, link, cookie, group, pipes, notify, watched: _ } = self;
        let pipe = |(number, pipe): (&u32, &std::os::fd::OwnedFd), packing: &mut Packing| {
            Ok::<_, FreezeError>((*number, packing.name(pipe.as_fd())?))
        };
        let notify = match notify {
            Some(it) => Some((it.address().to_owned(), packing.name(it.socket().as_fd())?)),
            None => None,
        };
        Ok(RunningState {
            pid: pid.as_raw_nonzero().get(),
            pidfd: packing.name(pidfd.get_ref().as_fd())?,
            link: link.pack(packing)?,
            cookie: *cookie,
            group: group.as_ref().map(GroupState::of),
            pipes: pipes.iter().map(|it| pipe(it, packing)).collect::<Result<_, _>>()?,
            notify,
        })
    }

    /// A process that nobody watches yet.
    pub(crate) fn unpack(
        worker: WorkerId,
        state: RunningState,
        unpacking: &mut Unpacking,
        io: &ToLoop,
    ) -> Result<Running, ResumeError> {
        let RunningState { pid, pidfd, link, cookie, group, pipes, notify } = state;
        let pid = Pid::from_raw(pid.max(0)).ok_or_else(|| ResumeError::inside("no process"))?;
        let pidfd = Arc::new(register(unpacking.take(pidfd)?, Interest::READABLE)?);
        let link = match link {
            Some(link) => Link::unpack(worker, link, unpacking, io)?,
            None => Link::None,
        };
        let mut ours = BTreeMap::new();
        for (number, pipe) in pipes {
            ours.insert(number, unpacking.take(pipe)?);
        }
        let notify = match notify {
            Some((address, socket)) => {
                Some(NotifySocket::over(worker, address, unpacking.take(socket)?)?)
            }
            None => None,
        };
        let group = group.map(GroupState::back);
        Ok(Running { pid, pidfd, link, cookie, group, pipes: ours, notify, watched: false })
    }
}

impl Pipe {
    pub(crate) fn pack(&self, packing: &mut Packing) -> Result<PipeState, FreezeError> {
        let Pipe { slot, worker, stdio, pipe, pending } = self;
        let (pipe, pending) = (packing.name(pipe.as_fd())?, pending.clone());
        Ok(PipeState { slot: *slot, worker: *worker, stdio: *stdio, pipe, pending })
    }

    pub(crate) fn unpack(state: PipeState, unpacking: &mut Unpacking) -> Result<Pipe, ResumeError> {
        let PipeState { slot, worker, stdio, pipe, pending } = state;
        Ok(Pipe { slot, worker, stdio, pipe: unpacking.take(pipe)?, pending })
    }
}
