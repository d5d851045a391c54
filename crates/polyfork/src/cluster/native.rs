//! What native workers say, and what they are answered.
//!
//! Frames are in `polyfork_wire::native`; the other half of this conversation is `worker`.
//!
//! The rule that surprises: connections that are handed over travel in batches, and a worker acknowledges a
//! run of them with one frame.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::{Decision, Input, ListenerId, WorkerId};
use polyfork_wire::native::{ListenAddress, PROTOCOL, ToPrimary, ToWorker};

use super::event::{Encoded, Event};
use super::link::{Link, NativeLink, Passed};
use super::ports::{Delivery, Key, KeyKind, Want4Port};
use super::primary::Primary;
use super::probe::is_probe;
use super::settings::Address;

impl Primary {
    pub(crate) fn on_native(&mut self, worker: WorkerId, message: ToPrimary) {
        match message {
            ToPrimary::Hello { protocol, .. } => self.on_hello(worker, protocol),
            ToPrimary::Listen { request, address, backlog, ipv6_only } => {
                self.on_listen(worker, request, address, backlog, ipv6_only);
            }
            ToPrimary::Listening { listener } => {
                self.on_native_listening(worker, ListenerId(listener))
            }
            // With a probe its word is not enough.
            ToPrimary::Ready if self.is_ready_by_probe(worker) => self.begin_probing(worker),
            ToPrimary::Ready => self.became_ready(worker),
            ToPrimary::Accepted { listener, seq, count } => {
                self.native_answered(worker, ListenerId(listener), seq, count, true);
            }
            ToPrimary::Refused { listener, seq } => {
                self.native_answered(worker, ListenerId(listener), seq, 1, false);
            }
            ToPrimary::Close { listener } => {
                let leaving = self.workers.get(&worker).is_none_or(|w| w.leaving);
                self.worker_closed(worker, ListenerId(listener), leaving);
            }
            ToPrimary::Message(bytes) => {
                self.on_user_message(worker, Encoded::Postcard(bytes.into()));
            }
            ToPrimary::Leaving => {
                if let Some(w) = self.workers.get_mut(&worker) {
                    w.leaving = true;
                    w.wants_to_leave = true;
                }
                self.feed(Input::Leaving { worker });
                // One that never served anybody is not suspended first.
                if self.workers.get(&worker).is_some_and(|w| !w.ready) {
                    self.acknowledge_leaving(worker);
                }
            }
            ToPrimary::OffersMetrics => {
                if let Some(w) = self.workers.get_mut(&worker) {
                    w.habit.offers = true;
                }
            }
            ToPrimary::Metrics { request, answer } => {
                self.on_native_metrics(worker, request, answer);
            }
            ToPrimary::Status { text } => {
                if let Some(w) = self.workers.get(&worker) {
                    self.emit(Event::Status { who: w.who, text });
                }
            }
            ToPrimary::Heartbeat => self.alive(worker, None),
            ToPrimary::Lag { micros } => self.alive(worker, Some(Duration::from_micros(micros))),
            _ => {}
        }
    }

    fn on_hello(&mut self, worker: WorkerId, protocol: u32) {
        let Some(w) = self.workers.get(&worker) else { return };
        let slot = w.who.slot;
        if protocol != PROTOCOL {
            let what = format!(
                "it speaks version {protocol} of the native protocol, this primary version {PROTOCOL}: build \
                 both with the same release"
            );
            self.protocol_fault(worker, &what);
            return;
        }
        let grace_ms = u64::try_from(self.settings.grace.as_millis()).unwrap_or(u64::MAX);
        let welcome = ToWorker::Welcome {
            protocol: PROTOCOL,
            worker: worker.0,
            slot,
            generation: 0,
            grace_ms,
        };
        self.push_frame(worker, &welcome, Vec::new());
        self.on_online(worker);
    }

    fn on_listen(
        &mut self,
        worker: WorkerId,
        request: u32,
        address: ListenAddress,
        backlog: u32,
        ipv6_only: bool,
    ) {
        let Some(seat) = self.ports.seat(worker) else { return };
        let (key, address) = native_key(address);
        let mut want = Want4Port::new(address);
        want.backlog = i32::try_from(backlog).unwrap_or(i32::MAX).max(1);
        want.ipv6_only = ipv6_only;
        let failed = |errno: i32, text: String| ToWorker::ListenFailed { request, errno, text };
        let id = match self.ports.ask(worker, key) {
            Decision::Join(id) => id,
            Decision::InUse => {
                let text = "this worker listens there already".to_owned();
                self.push_frame(worker, &failed(libc::EADDRINUSE, text), Vec::new());
                return;
            }
            Decision::Open(id) => match self.open_port(id, &want) {
                Ok(()) => id,
                Err((address, error)) => {
                    let text = format!("cannot listen on {address}: {error}");
                    self.bind_failed(Some(worker), address, &error);
                    let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
                    self.push_frame(worker, &failed(errno, text), Vec::new());
                    return;
                }
            },
        };
        let Some(port) = self.ports.get(id) else { return };
        let address = match &port.address {
            Address::Tcp(at) | Address::Udp(at) => ListenAddress::Tcp(*at),
            Address::Unix(path) => ListenAddress::Unix(path.clone().into_os_string().into_vec()),
            Address::Inherited(_) => return,
        };
        let handles = match port.socket_for(seat).map(|fd| fd.try_clone_to_owned()) {
            None => Vec::new(),
            Some(Ok(copy)) => vec![Passed::once(Arc::new(copy), None)],
            Some(Err(error)) => {
                let errno = error.raw_os_error().unwrap_or(libc::EMFILE);
                self.push_frame(worker, &failed(errno, error.to_string()), Vec::new());
                return;
            }
        };
        let handoff = handles.is_empty();
        let answer = ToWorker::Listening { request, listener: id.0, address, handoff };
        self.push_frame(worker, &answer, handles);
    }

    fn on_native_listening(&mut self, worker: WorkerId, id: ListenerId) {
        if !self.ports.book.listening(worker, id) {
            self.protocol_fault(
                worker,
                &format!("it listens on socket {}, which it did not ask for", id.0),
            );
            return;
        }
        let (Some(w), Some(port)) = (self.workers.get(&worker), self.ports.get(id)) else { return };
        let (who, address, by) = (w.who, port.address.clone(), Arc::clone(&port.via));
        self.emit(Event::Listening { who, address, by });
        self.begin_probing(worker);
        if self.is_ready_by_listening(worker) {
            self.became_ready(worker);
        }
        self.refresh_ports();
    }

    fn native_answered(
        &mut self,
        worker: WorkerId,
        id: ListenerId,
        seq: u64,
        count: u32,
        took: bool,
    ) {
        // No honest run is longer than what may be on its way.
        if count as usize > super::MAX_WINDOW {
            self.protocol_fault(worker, &format!("it acknowledged {count} connections at once"));
            return;
        }
        for offset in 0..u64::from(count) {
            let Some(seq) = seq.checked_add(offset) else { return };
            if !self.probe_was_taken_by_number(worker, seq, took) {
                self.connection_answered(worker, id, seq, took);
            }
        }
        let last = seq.saturating_add(u64::from(count).saturating_sub(1));
        if let Some(link) = self.native_link(worker) {
            link.outbox.was_read(|passed| passed.connection == Some((id, last)));
        }
    }

    /// Nothing waits for a worker that wants to leave: it may stop accepting.
    pub(crate) fn acknowledge_leaving(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.wants_to_leave, false) {
            self.push_frame(worker, &ToWorker::LeavingAcknowledged, Vec::new());
        }
    }

    /// Connections for one worker and one listener, with numbers that follow one another, go as one frame.
    pub(crate) fn deliver_native(&mut self, run: Vec<Delivery>) {
        let Some(first) = run.first() else { return };
        let (worker, listener, first_seq) = (first.worker, first.port, first.seq);
        let count = u32::try_from(run.len()).unwrap_or(u32::MAX);
        let frame = ToWorker::Connections { listener: listener.0, first_seq, count };
        let handles =
            run.into_iter().map(|d| Passed::once(d.connection, Some((d.port, d.seq)))).collect();
        if let Some(link) = self.native_link(worker) {
            link.push(&frame, handles);
        }
    }

    /// Takes back what a stuck worker has not read; see `take_back_node`.
    pub(crate) fn take_back_native(&mut self, worker: WorkerId) {
        let Some(unread) = self.pull_unread(worker) else { return };
        let Some(link) = self.native_link(worker) else { return };
        let rewound = link.outbox.rewind_unread(&unread, |passed| passed.connection.is_some());
        match rewound {
            Ok(frames) => {
                let connections =
                    frames.into_iter().flatten().filter_map(|passed| passed.connection);
                // A probe that was not read is not answered.
                let connections: Vec<_> = connections.filter(|(_, seq)| !is_probe(*seq)).collect();
                self.took_back(worker, &connections);
                self.flush(worker);
            }
            Err(error) => self.protocol_fault(worker, &error.to_string()),
        }
    }

    pub(crate) fn tell_native_stop(&mut self, worker: WorkerId, grace: Duration) {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.push_frame(worker, &ToWorker::Disconnect { grace_ms }, Vec::new());
    }

    fn push_frame(&mut self, worker: WorkerId, frame: &ToWorker, handles: Vec<Passed>) {
        if let Some(link) = self.native_link(worker) {
            link.push(frame, handles);
        }
        self.flush(worker);
    }

    fn native_link(&mut self, worker: WorkerId) -> Option<&mut NativeLink> {
        match &mut self.workers.get_mut(&worker)?.running.link {
            Link::Native(link) => Some(link),
            _ => None,
        }
    }
}

fn native_key(address: ListenAddress) -> (Key, Address) {
    match address {
        ListenAddress::Tcp(at) => (key(Some(at), KeyKind::Tcp6), Address::Tcp(at)),
        ListenAddress::Unix(bytes) => {
            let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
            let mut key = key(None, KeyKind::Unix);
            key.address = Some(path.to_string_lossy().into_owned());
            (key, Address::Unix(path))
        }
    }
}

fn key(at: Option<SocketAddr>, kind: KeyKind) -> Key {
    Key {
        address: at.map(|at| at.ip().to_string()),
        port: at.map(|at| i64::from(at.port())),
        kind,
        fd: None,
        index: 0,
    }
}
