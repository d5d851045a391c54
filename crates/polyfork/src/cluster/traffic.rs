//! Where the primary's loop meets its sockets: opening, handing over, answers, taking back.
//!
//! Shared by both dialects that have a channel; `node` and `native` turn it into bytes.
//!
//! The rule that surprises: a worker that lets connections wait too long is not asked about it. Its unread
//! messages are pulled out of its own end of the channel, so it can never touch what goes to another.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::{HandoffConfig, ListenerId, WorkerId};

use super::StartError;
use super::event::{Event, Who};
use super::ports::{self, Delivery, Key, KeyKind, Want4Port};
use super::primary::Primary;
use super::settings::{Address, Dialect};

/// A cause that repeats is told at most this often.
const TELL_AGAIN: Duration = Duration::from_secs(1);

/// Connections that reached a slot just before its worker went are looked for after this, and then ever more
/// seldom, up to [`LAST_LOOK`].
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOK: Duration = Duration::from_secs(10);

impl Primary {
    /// Opens what workers of the sockets dialect will inherit.
    pub(crate) fn bind_pinned(&mut self, slots: u32) -> Result<(), StartError> {
        for slot in 1..=slots {
            self.ports.make_seat(polyfork_core::Seat(slot));
        }
        for address in self.settings.listen.clone() {
            let id = self.ports.book.pin(pinned_key(&address));
            let mut want = Want4Port::new(address.clone());
            want.sockets_only = self.detected.dialect == Dialect::Sockets;
            self.open_port(id, &want)
                .map_err(|(address, error)| StartError::Bind { address, error })?;
        }
        Ok(())
    }

    /// A sockets worker takes part in everything it inherited.
    pub(crate) fn join_pinned(&mut self, worker: WorkerId) {
        if self.detected.dialect != Dialect::Sockets {
            return;
        }
        let Some(who) = self.workers.get(&worker).map(|w| w.who) else { return };
        for id in self.ports.join_pinned(worker) {
            let Some(port) = self.ports.get(id) else { continue };
            let (address, by) = (port.address.clone(), Arc::clone(&port.via));
            self.emit(Event::Listening { who, address, by });
        }
        self.begin_probing(worker);
    }

    pub(crate) fn open_port(
        &mut self,
        id: ListenerId,
        want: &Want4Port,
    ) -> Result<(), (Address, io::Error)> {
        let config = HandoffConfig {
            window: self.settings.window,
            ack_limit: self.settings.ack_limit,
            ..HandoffConfig::default()
        };
        let opened = self.ports.open(id, want, config, &self.io);
        let opened = opened.map(|port| (port.address.clone(), Arc::clone(&port.via)));
        self.tell_of_store();
        match opened {
            Ok((address, by)) => {
                self.emit(Event::Bound { address, by });
                Ok(())
            }
            Err(failure) => {
                self.ports.book.remove(id);
                Err(failure)
            }
        }
    }

    /// Tells what became of sockets that are kept for the next process.
    pub(crate) fn tell_of_store(&mut self) {
        for text in self.ports.store_remarks() {
            self.notice("store", None, text);
        }
    }

    /// The cluster will not be followed by another one.
    pub(crate) fn forget_kept(&mut self) {
        for failure in self.ports.forget_kept() {
            self.notice("store", None, failure);
        }
        self.tell_of_store();
    }

    pub(crate) fn bind_failed(
        &mut self,
        worker: Option<WorkerId>,
        address: Address,
        error: &io::Error,
    ) {
        let who = worker.and_then(|id| {
            let w = self.workers.get_mut(&id)?;
            w.bind_failed = true;
            Some(w.who)
        });
        let copy = match error.raw_os_error() {
            Some(raw) => io::Error::from_raw_os_error(raw),
            None => io::Error::other(error.to_string()),
        };
        let error = Arc::new(copy);
        self.bind_failure.get_or_insert((address.clone(), Arc::clone(&error)));
        self.emit(Event::BindFailed { who, address, error });
    }

    /// A worker closed a socket. If it stays, and it was the last one, the socket is closed for good.
    pub(crate) fn worker_closed(&mut self, worker: WorkerId, id: ListenerId, leaving: bool) {
        if leaving {
            // Its replacement will want it. What waits in the slot's queue is free to be moved now.
            self.ports.let_go(worker, id);
        } else if self.ports.closed_by(worker, id)
            && let Some(address) = self.ports.close(id)
        {
            self.emit(Event::Closed { address });
        }
        self.refresh_ports();
    }

    /// Brings sockets in line with the workers, and passes on what waits where nobody accepts.
    pub(crate) fn refresh_ports(&mut self) {
        let now = self.now();
        for failure in self.ports.refresh(now) {
            self.notice("slot", None, failure);
        }
        if self.ports.has_turns() {
            self.stirred();
        }
        if self.ports.has_idle_slots() {
            self.look_for_stranded(FIRST_LOOK);
        }
    }

    /// A handshake that was under way when a worker went ends in a queue that nobody looks at.
    pub(crate) fn stranded_check(&mut self, pause: Duration) {
        let now = self.now();
        for failure in self.ports.refresh(now) {
            self.notice("slot", None, failure);
        }
        if self.ports.has_idle_slots() {
            self.look_for_stranded((pause * 2).min(LAST_LOOK));
        }
    }

    /// Accepts, assigns, sends. Called once per round of the loop.
    pub(crate) fn deliver(&mut self) {
        self.take_back_overdue();
        let mut deliveries = Vec::new();
        let now = self.now();
        for trouble in self.ports.deliver(now, &mut deliveries) {
            self.pause_accepting(trouble.port, ports::ACCEPT_PAUSE);
            let text = format!(
                "accepting on {} pauses: {}; waiting connections stay in the kernel's queue",
                trouble.address, trouble.error
            );
            self.notice_at_most("accept-paused", TELL_AGAIN, text);
        }
        if deliveries.is_empty() {
            return;
        }
        let mut touched: Vec<WorkerId> = deliveries.iter().map(|d| d.worker).collect();
        touched.sort_unstable();
        touched.dedup();
        match self.detected.dialect {
            Dialect::Native => {
                for run in runs(deliveries) {
                    self.deliver_native(run);
                }
            }
            _ => {
                for delivery in deliveries {
                    self.deliver_node(delivery);
                }
            }
        }
        for worker in touched {
            self.flush(worker);
        }
    }

    /// A worker answered a connection that was handed to it.
    pub(crate) fn connection_answered(
        &mut self,
        worker: WorkerId,
        port: ListenerId,
        seq: u64,
        took: bool,
    ) {
        let now = self.now();
        // The listener may be closed by now: then nobody waits for the answer.
        let Some(handoff) = self.ports.handoff(port) else { return };
        if !handoff.is_member(worker) {
            return;
        }
        let outcome = if took {
            handoff.acknowledged(worker, seq).map(|accepted| Some(accepted.waited))
        } else {
            handoff.refused(now, worker, seq).map(|()| None)
        };
        if let Ok(Some(waited)) = outcome {
            self.was_handed_over(waited);
            if let Some(w) = self.workers.get_mut(&worker) {
                w.handed_over += 1;
            }
        }
        if let Err(fault) = outcome {
            self.protocol_fault(worker, &fault.to_string());
        }
    }

    /// Connections that a worker has left unread for too long go to others, if it truly has not read them.
    fn take_back_overdue(&mut self) {
        let now = self.now();
        for worker in self.ports.overdue(now) {
            let Some(w) = self.workers.get_mut(&worker) else { continue };
            // Once per limit and worker: reading is proof enough for a while that nothing is to be had.
            let since = w.last_take_back.map(|at| at.elapsed());
            if since.is_some_and(|since| since < self.settings.ack_limit) {
                continue;
            }
            w.last_take_back = Some(std::time::Instant::now());
            self.take_back(worker);
        }
    }

    /// Takes back what this worker has not read, if it can be done here.
    pub(crate) fn take_back(&mut self, worker: WorkerId) {
        match self.detected.dialect {
            Dialect::Node => self.take_back_node(worker),
            Dialect::Native => self.take_back_native(worker),
            Dialect::Sockets => {}
        }
    }

    /// The bytes that a stuck worker has not read from its channel. Their descriptors are closed here: the primary
    /// has its own copies.
    pub(crate) fn pull_unread(&mut self, worker: WorkerId) -> Option<Vec<u8>> {
        let w = self.workers.get(&worker)?;
        let (pidfd, pid) = w.running.process();
        let number = super::process::CHANNEL_FD;
        match polyfork_sys::steal::unread_checked(pidfd, pid, number, w.running.cookie) {
            Ok(unread) => Some(unread.bytes),
            Err(error) => {
                let text = format!(
                    "cannot take unread connections back: {error}; they wait for this worker"
                );
                self.notice("take-back", Some(w.who), text);
                None
            }
        }
    }

    /// The unread ones among what this worker owes are free again.
    pub(crate) fn took_back(&mut self, worker: WorkerId, connections: &[(ListenerId, u64)]) {
        let now = self.now();
        let mut count = 0;
        for (port, seq) in connections {
            if let Some(handoff) = self.ports.handoff(*port) {
                count += handoff.take_back(now, worker, &[*seq]);
            }
        }
        if count > 0 {
            let who: Option<Who> = self.workers.get(&worker).map(|w| w.who);
            let text = format!(
                "{count} connections it had not read were taken back and go to other workers"
            );
            self.notice("taken-back", who, text);
        }
    }
}

/// Splits deliveries into runs for one worker and listener whose numbers follow one another.
fn runs(mut deliveries: Vec<Delivery>) -> Vec<Vec<Delivery>> {
    deliveries.sort_by_key(|d| (d.worker, d.port, d.seq));
    let mut runs: Vec<Vec<Delivery>> = Vec::new();
    for delivery in deliveries {
        let follows = runs.last().and_then(|run| run.last()).is_some_and(|last| {
            (last.worker, last.port, last.seq + 1) == (delivery.worker, delivery.port, delivery.seq)
        });
        match runs.last_mut() {
            Some(run) if follows => run.push(delivery),
            _ => runs.push(vec![delivery]),
        }
    }
    runs
}

fn pinned_key(address: &Address) -> Key {
    Key {
        address: Some(address.to_string()),
        port: None,
        kind: KeyKind::Inherited,
        fd: None,
        index: 0,
    }
}
