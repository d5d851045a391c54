//! What Node workers say, and what they are answered: the primary's half of Node's cluster protocol.
//!
//! Covers Node 18 to 26, Deno, and as far as it goes Bun. The bytes are in `polyfork_wire::node`; sockets are
//! in `ports`.
//!
//! The rule that surprises: under the kernel mechanism a worker is answered as if the policy were "shared",
//! only that the socket it gets is its own. It listens on it and never knows.
//!
//! Behaviour follows: Node `lib/internal/cluster/primary.js`, `round_robin_handle.js`, `shared_handle.js`.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::{Decision, Input, ListenerId, WorkerId};
use polyfork_wire::node::cluster::{
    self as wire, AddressType, ClusterMessage, FromWorker, Query, Sockname,
};
use polyfork_wire::node::message::{HandleKind, Health, Incoming};

use super::detect::Runtime;
use super::event::{Encoded, Event};
use super::link::{Link, NodeLink, Passed};
use super::ports::{Delivery, Key, KeyKind, Want4Port};
use super::primary::Primary;
use super::settings::Address;

/// libuv's flags in a request.
const UV_TCP_IPV6ONLY: u32 = 1;
const UV_UDP_REUSEADDR: u32 = 4;

impl Primary {
    pub(crate) fn on_node<M: Into<Encoded>>(
        &mut self,
        worker: WorkerId,
        incoming: Incoming<M>,
        prefixed: bool,
        fd: Option<OwnedFd>,
    ) {
        match incoming {
            Incoming::User(message) => self.on_user_message(worker, message.into()),
            Incoming::Cluster(message) => {
                if prefixed {
                    self.is_bun(worker);
                }
                self.on_cluster(worker, message);
            }
            Incoming::HandleAck => self.on_handle_ack(worker, false),
            Incoming::HandleNack => self.on_handle_ack(worker, true),
            Incoming::Handle(envelope) => {
                // One answer per envelope, before anything else. The primary has no use for the descriptor
                // itself; it is closed here.
                let answer = if fd.is_some() { wire::HANDLE_ACK } else { wire::HANDLE_NACK };
                if let Some(link) = self.node_link(worker) {
                    link.say_first(answer);
                }
                self.flush(worker);
                if let (Some(_), Incoming::User(message)) = (&fd, *envelope.message) {
                    self.on_user_message(worker, message.into());
                }
            }
            // A server whose connections were sent here counts them before it closes. None stays open here.
            Incoming::SocketGetCount { key } => {
                self.push_internal(worker, wire::socket_count(&key, 0));
            }
            Incoming::SocketNotifyClose { key } => {
                self.push_internal(worker, wire::socket_all_closed(&key));
            }
            Incoming::Health(Health::Beat { lag_us }) => {
                self.alive(worker, Some(Duration::from_micros(lag_us)));
            }
            Incoming::Health(Health::Requests { count }) => self.had_its_requests(worker, count),
            // Answers to questions that the primary never asks.
            _ => {}
        }
    }

    fn on_cluster(&mut self, worker: WorkerId, message: ClusterMessage) {
        let seq = message.seq.unwrap_or(0);
        match message.body {
            FromWorker::Online => self.on_online(worker),
            FromWorker::QueryServer(query) => self.on_query(worker, seq, query),
            FromWorker::Listening(query) => self.on_listening(worker, query),
            FromWorker::Close { key } => self.on_close(worker, &key),
            FromWorker::ExitedAfterDisconnect => {
                let Some(w) = self.workers.get_mut(&worker) else { return };
                w.leaving = true;
                // Both have told the other to go. A stock worker closes its channel once for our word and
                // once for our answer, and the second time is an error that ends it with code 1. It has most
                // likely gone by the time of the answer; if not, connections hold it, and it wants out.
                if w.told {
                    self.answer_goodbye_later(worker, seq);
                } else {
                    self.answer_goodbye(worker, seq);
                }
                self.feed(Input::Leaving { worker });
            }
            FromWorker::Reply { ack, accepted } => self.on_reply(worker, ack, accepted),
            // A newer worker's own idea; a stock primary ignores it, too.
            _ => {}
        }
    }

    pub(crate) fn answer_goodbye(&mut self, worker: WorkerId, seq: u64) {
        let answer = wire::reply_ack(seq, self.next_sequence());
        self.push_internal(worker, answer);
    }

    /// Bun marks its internal lines, and takes none that is not marked.
    pub(crate) fn is_bun(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.prefixed = true;
        if let Link::Node(link) = &mut w.running.link {
            link.flavour = wire::Flavour::Bun;
        }
    }

    // ---- asking for a socket ----

    fn on_query(&mut self, worker: WorkerId, seq: u64, query: Query) {
        let Some(w) = self.workers.get(&worker) else { return };
        // A stock primary does not answer a worker that leaves.
        if w.leaving {
            return;
        }
        let (who, prefixed) = (w.who, w.prefixed);
        let key = key_of(&query);
        let Some(want) = want_of(&query, self.hands_over_only()) else {
            self.answer_error(worker, seq, &query, libc::EINVAL);
            return;
        };
        if prefixed && !matches!(key.kind, KeyKind::Udp4 | KeyKind::Udp6) {
            let text = "this version of Bun takes no socket from a primary: use Bun.serve() or node:http, which \
                        bind for themselves";
            self.notice("bun", Some(who), text.to_owned());
            self.answer_error(worker, seq, &query, libc::ENOTSUP);
            return;
        }
        let id = match self.ports.ask(worker, key) {
            Decision::Join(id) => id,
            Decision::InUse => {
                self.answer_error(worker, seq, &query, libc::EADDRINUSE);
                return;
            }
            Decision::Open(id) => match self.open_port(id, &want) {
                Ok(()) => id,
                Err((address, error)) => {
                    let errno = errno_of(&address, &error);
                    self.bind_failed(Some(worker), address, &error);
                    self.answer_error(worker, seq, &query, errno);
                    return;
                }
            },
        };
        self.answer_query(worker, seq, &query, id);
    }

    fn hands_over_only(&self) -> bool {
        matches!(self.runtime(), Runtime::Deno { .. })
    }

    fn answer_query(&mut self, worker: WorkerId, seq: u64, query: &Query, id: ListenerId) {
        let Some(seat) = self.ports.seat(worker) else { return };
        let sequence = self.next_sequence();
        let Some(port) = self.ports.get_mut(id) else { return };
        if port.data.is_none() {
            port.data.clone_from(&query.data);
        }
        let key = key_text(id);
        let data = port.data.clone();
        if port.is_handoff() {
            let name = sockname(&port.address);
            let line = wire::reply_round_robin(seq, sequence, &key, data.as_ref(), name.as_ref());
            self.push_internal(worker, line);
            return;
        }
        let kind = match port.address {
            Address::Udp(_) => HandleKind::DgramNative,
            _ if matches!(query.address_type, AddressType::Udp4 | AddressType::Udp6) => {
                HandleKind::DgramNative
            }
            _ => HandleKind::NetNative,
        };
        let copy = match port.socket_for(seat).map(|fd| fd.try_clone_to_owned()) {
            Some(Ok(copy)) => Arc::new(copy),
            Some(Err(error)) => {
                let errno = error.raw_os_error().unwrap_or(libc::EMFILE);
                self.answer_error(worker, seq, query, errno);
                return;
            }
            None => {
                self.answer_error(worker, seq, query, libc::EINVAL);
                return;
            }
        };
        let line = wire::reply_shared(seq, sequence, &key, data.as_ref(), kind);
        if let Some(link) = self.node_link(worker) {
            link.say_with(line, |line| Passed::with(&copy, line));
        }
        self.flush(worker);
    }

    fn answer_error(&mut self, worker: WorkerId, seq: u64, query: &Query, errno: i32) {
        let sequence = self.next_sequence();
        let key = format!("failed:{sequence}");
        let line = wire::reply_error(seq, sequence, &key, -errno, query.data.as_ref());
        self.push_internal(worker, line);
    }

    // ---- listening and closing ----

    fn on_listening(&mut self, worker: WorkerId, query: Query) {
        let Some(w) = self.workers.get(&worker) else { return };
        let who = w.who;
        let found = self.port_meant(worker, &query);
        let (address, by) = match found.and_then(|id| self.ports.get(id)) {
            Some(port) => (port.address.clone(), Arc::clone(&port.via)),
            // It binds for itself and only tells (Bun), or closed again before it could tell.
            None => match want_of(&query, false).and_then(|want| want.addresses.into_iter().next())
            {
                Some(address) if w.prefixed || found.is_none() => {
                    (address, self.ports.own_socket_via())
                }
                _ => return,
            },
        };
        if let Some(id) = found {
            self.ports.book.listening(worker, id);
        }
        self.emit(Event::Listening { who, address, by });
        self.begin_probing(worker);
        if self.is_ready_by_listening(worker) {
            self.became_ready(worker);
        }
        self.refresh_ports();
    }

    /// Which of the sockets that the worker asked for its `listening` is about. The message repeats the
    /// request, but with the real port, and has no key.
    fn port_meant(&self, worker: WorkerId, query: &Query) -> Option<ListenerId> {
        let said = key_of(query);
        let matches = |key: &Key, id: ListenerId| {
            let port_fits = match (key.port, self.ports.get(id).map(|p| &p.address)) {
                (Some(0), Some(Address::Tcp(real) | Address::Udp(real))) => {
                    said.port == Some(0) || said.port == Some(i64::from(real.port()))
                }
                _ => key.port == said.port || key.fd.is_some(),
            };
            port_fits && key.address == said.address && key.kind == said.kind && key.fd == said.fd
        };
        let mine: Vec<_> =
            self.ports.book.of(worker).filter(|(id, key, _)| matches(key, *id)).collect();
        let not_yet = mine.iter().find(|(_, _, listening)| !listening);
        not_yet.or_else(|| mine.first()).map(|(id, ..)| *id)
    }

    fn on_close(&mut self, worker: WorkerId, key: &str) {
        let Some(id) = parse_key(key) else { return };
        let leaving = self.workers.get(&worker).is_none_or(|w| w.leaving || !w.admitted && w.ready);
        self.worker_closed(worker, id, leaving);
    }

    // ---- handing over ----

    pub(crate) fn deliver_node(&mut self, delivery: Delivery) {
        let sequence = self.next_sequence();
        let line = wire::new_connection(&key_text(delivery.port), sequence);
        let Some(w) = self.workers.get_mut(&delivery.worker) else { return };
        w.calls.insert(sequence, (delivery.port, delivery.seq));
        if let Link::Node(link) = &mut w.running.link {
            let passed = Passed::once(delivery.connection, Some((delivery.port, sequence)));
            link.say_with(line, |_| passed);
        }
    }

    /// The answer to `newconn`; answers to anything else are ignored, as Node does.
    fn on_reply(&mut self, worker: WorkerId, ack: u64, accepted: Option<bool>) {
        if self.probe_was_taken(worker, ack, accepted == Some(true)) {
            return;
        }
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let Some((port, seq)) = w.calls.remove(&ack) else {
            // Numbers are given out in order: a number we have used was answered before, or was taken back,
            // or was never a connection. An answer that claims a connection all the same is a lie.
            if accepted.is_some() {
                self.protocol_fault(
                    worker,
                    &format!("it answered connection {ack}, which it does not hold"),
                );
            }
            return;
        };
        self.connection_answered(worker, port, seq, accepted == Some(true));
    }

    fn on_handle_ack(&mut self, worker: WorkerId, refused: bool) {
        let Some(link) = self.node_link(worker) else { return };
        match link.outbox.acknowledged(refused) {
            Ok(passed) => {
                // A worker that is out of descriptors never saw the message: somebody else gets the connection,
                // and anything else is sent once more.
                if let (true, Some((port, sequence))) = (refused, passed.connection)
                    && let Some((_, seq)) =
                        self.workers.get_mut(&worker).and_then(|w| w.calls.remove(&sequence))
                {
                    self.connection_answered(worker, port, seq, false);
                } else if let (true, Some(link)) = (refused, self.node_link(worker)) {
                    link.say_again(passed);
                }
                self.flush(worker);
            }
            Err(error) => self.protocol_fault(worker, &error.to_string()),
        }
    }

    /// Takes back what a stuck worker has not read: its unread bytes are pulled out of its end of the
    /// channel, whole connection messages stay here, the rest is written again.
    pub(crate) fn take_back_node(&mut self, worker: WorkerId) {
        let Some(unread) = self.pull_unread(worker) else { return };
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let Link::Node(link) = &mut w.running.link else { return };
        match link.outbox.rewind_unread(&unread) {
            Ok(given_back) => {
                let mut connections = Vec::new();
                for passed in given_back {
                    if let Some((_, sequence)) = passed.connection {
                        connections.extend(w.calls.remove(&sequence));
                    } else if let Some(line) = passed.line.clone() {
                        // An answer to a request for a socket: the worker still waits for it.
                        link.outbox.push_handle(line.to_vec(), passed);
                    }
                }
                self.took_back(worker, &connections);
                self.flush(worker);
            }
            Err(error) => self.protocol_fault(worker, &error.to_string()),
        }
    }

    // ---- writing ----

    pub(crate) fn tell_node_stop(&mut self, worker: WorkerId) {
        let line = wire::disconnect(self.next_sequence());
        self.push_internal(worker, line);
        if let Some(w) = self.workers.get_mut(&worker) {
            w.told = true;
        }
        // As Node's primary does: the worker's sockets are forgotten at once. What it still sends about them
        // is ignored.
        self.refresh_ports();
    }

    fn push_internal(&mut self, worker: WorkerId, line: Vec<u8>) {
        let Some(link) = self.node_link(worker) else { return };
        link.say(line);
        self.flush(worker);
    }

    pub(crate) fn node_link(&mut self, worker: WorkerId) -> Option<&mut NodeLink> {
        match &mut self.workers.get_mut(&worker)?.running.link {
            Link::Node(link) => Some(link),
            _ => None,
        }
    }
}

fn key_of(query: &Query) -> Key {
    let kind = match query.address_type {
        AddressType::V6 => KeyKind::Tcp6,
        AddressType::Udp4 => KeyKind::Udp4,
        AddressType::Udp6 => KeyKind::Udp6,
        AddressType::Path => KeyKind::Unix,
        _ if query.fd.is_some() => KeyKind::Inherited,
        _ => KeyKind::Tcp4,
    };
    // Port 0 needs to tell several servers of one worker apart. So do UDP sockets, which may share a port
    // within a worker if they say so; if they do not, binding the second one fails.
    let several = query.port == Some(0) || matches!(kind, KeyKind::Udp4 | KeyKind::Udp6);
    let index = if several { query.index } else { 0 };
    Key { address: query.address.clone(), port: query.port, kind, fd: query.fd, index }
}

fn want_of(query: &Query, handoff_only: bool) -> Option<Want4Port> {
    let flags = query.flags.unwrap_or(0);
    let addresses = if let Some(fd) = query.fd {
        vec![Address::Inherited(i32::try_from(fd).ok()?)]
    } else {
        match query.address_type {
            AddressType::Path => vec![Address::Unix(unix_path(query.address.as_deref()?))],
            AddressType::Udp4 | AddressType::Udp6 => {
                let port = u16::try_from(query.port?).ok()?;
                let any = if query.address_type == AddressType::Udp4 { "0.0.0.0" } else { "::" };
                let ip = parse_ip(query.address.as_deref().unwrap_or(any), port)?;
                vec![Address::Udp(ip)]
            }
            _ => {
                let port = u16::try_from(query.port?).ok()?;
                match query.address.as_deref() {
                    Some(text) => vec![Address::Tcp(parse_ip(text, port)?)],
                    None => {
                        let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
                        let v4 = SocketAddr::from(([0, 0, 0, 0], port));
                        vec![Address::Tcp(v6), Address::Tcp(v4)]
                    }
                }
            }
        }
    };
    let unix_mode = match (query.readable_all, query.writable_all) {
        (false, false) => None,
        (readable, writable) => {
            // On top of what a new socket file has for its owner, as libuv does.
            let all = (if readable { 0o444 } else { 0 }) | (if writable { 0o222 } else { 0 });
            Some(0o755 | all)
        }
    };
    Some(Want4Port {
        backlog: query.backlog.and_then(|b| i32::try_from(b).ok()).unwrap_or(511),
        ipv6_only: flags & UV_TCP_IPV6ONLY != 0,
        udp_reuse_address: flags & UV_UDP_REUSEADDR != 0,
        datagrams: matches!(query.address_type, AddressType::Udp4 | AddressType::Udp6),
        unix_mode,
        handoff_only,
        sockets_only: false,
        addresses,
    })
}

/// The error as a stock primary tells it: libuv has words of its own for paths. The event tells the true one.
fn errno_of(address: &Address, error: &std::io::Error) -> i32 {
    let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
    match (address, errno) {
        (Address::Unix(_), libc::ENOENT) => libc::EACCES,
        (Address::Unix(_), libc::ENAMETOOLONG) => libc::EINVAL,
        _ => errno,
    }
}

/// A worker makes `\0name` absolute with its own directory; the name is what follows the NUL byte.
fn unix_path(text: &str) -> PathBuf {
    match text.find('\0') {
        Some(at) => PathBuf::from(&text[at..]),
        None => PathBuf::from(text),
    }
}

/// An address with an optional scope (`fe80::1%eth0`), as Node passes it on.
fn parse_ip(text: &str, port: u16) -> Option<SocketAddr> {
    match text.split_once('%') {
        None => Some(SocketAddr::new(text.parse::<IpAddr>().ok()?, port)),
        Some((ip, scope)) => {
            let ip = ip.parse::<Ipv6Addr>().ok()?;
            let scope = match scope.parse() {
                Ok(number) => number,
                Err(_) => super::ports::sockets::interface_index(scope)?,
            };
            Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope)))
        }
    }
}

fn sockname(address: &Address) -> Option<Sockname> {
    match address {
        Address::Tcp(at) => Some(Sockname::from(*at)),
        _ => None,
    }
}

/// Workers treat the key as opaque; it must only be unique among what one worker holds.
pub(crate) fn key_text(id: ListenerId) -> String {
    format!("polyfork:{}", id.0)
}

fn parse_key(text: &str) -> Option<ListenerId> {
    text.strip_prefix("polyfork:")?.parse().ok().map(ListenerId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abstract_names_survive_the_workers_mangling() {
        assert_eq!(unix_path("/srv/app/\0name"), PathBuf::from("\0name"));
        assert_eq!(unix_path("/tmp/x.sock"), PathBuf::from("/tmp/x.sock"));
    }

    #[test]
    fn addresses_with_a_scope_are_understood() {
        let Some(SocketAddr::V6(at)) = parse_ip("fe80::1%3", 80) else { panic!("v6") };
        assert_eq!((at.scope_id(), at.port()), (3, 80));
        assert_eq!(parse_ip("127.0.0.1", 1).map(|a| a.is_ipv4()), Some(true));
        assert_eq!(parse_ip("host.example", 1), None);
    }

    #[test]
    fn keys_read_back() {
        assert_eq!(parse_key(&key_text(ListenerId(12))), Some(ListenerId(12)));
        assert_eq!(parse_key("null:80:4:undefined"), None);
    }
}
