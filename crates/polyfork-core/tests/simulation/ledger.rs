//! The book of connections: every one has exactly one end, and never two workers.
//!
//! Written by the world at the moments that matter (accepted from the kernel, sent, read by a worker, given back), it
//! panics at the first entry that breaks a promise. The surprising rule: *read by a worker* is entered when the worker takes it
//! from its channel, not when the primary learns of it; the promise is about that moment.

use std::collections::BTreeMap;

use polyfork_core::WorkerId;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Place {
    /// With the primary only.
    Kept,
    /// Sent to this worker under this number.
    Sent(WorkerId, u64),
    /// The primary gave up its copy, to this worker.
    Acknowledged(WorkerId),
    /// Back with the shell: shed, or the listener closed.
    Returned,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    read_by: Option<WorkerId>,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    entries: BTreeMap<u64, Entry>,
    next: u64,
    pub(crate) last_seq: u64,
    pub(crate) kept: u64,
    pub(crate) sent: u64,
    pub(crate) acknowledged: u64,
    pub(crate) returned: u64,
}

impl Ledger {
    /// A new connection, accepted by the primary.
    pub(crate) fn accept(&mut self) -> u64 {
        let connection = self.next;
        self.next += 1;
        self.entries.insert(connection, Entry { place: Place::Kept, read_by: None });
        self.kept += 1;
        connection
    }

    pub(crate) fn offered(&self) -> u64 {
        self.next
    }

    pub(crate) fn send(&mut self, connection: u64, worker: WorkerId, seq: u64) {
        assert!(seq > self.last_seq, "number {seq} after {}", self.last_seq);
        self.last_seq = seq;
        let entry = self.entry(connection);
        assert_eq!(entry.place, Place::Kept, "connection {connection} sent to {worker} as well");
        assert_eq!(entry.read_by, None, "connection {connection} sent again after it was read");
        entry.place = Place::Sent(worker, seq);
        self.kept -= 1;
        self.sent += 1;
    }

    /// The worker took it from its channel and will read from it.
    pub(crate) fn read(&mut self, connection: u64, worker: WorkerId, seq: u64) {
        let entry = self.entry(connection);
        assert_eq!(entry.read_by, None, "connection {connection} read twice");
        let sent = entry.place == Place::Sent(worker, seq);
        // A worker that lied about it has "acknowledged" it before.
        let early = entry.place == Place::Acknowledged(worker);
        assert!(sent || early, "connection {connection} read by {worker}: {:?}", entry.place);
        entry.read_by = Some(worker);
    }

    pub(crate) fn acknowledge(
        &mut self,
        connection: u64,
        worker: WorkerId,
        seq: u64,
        honest: bool,
    ) {
        let entry = self.entry(connection);
        assert_eq!(entry.place, Place::Sent(worker, seq), "connection {connection}");
        assert!(!honest || entry.read_by == Some(worker), "connection {connection} not read");
        entry.place = Place::Acknowledged(worker);
        self.sent -= 1;
        self.acknowledged += 1;
    }

    /// The connection that was sent to this worker under this number.
    pub(crate) fn under(&self, worker: WorkerId, seq: u64) -> u64 {
        let there = self.entries.iter().find(|(_, entry)| entry.place == Place::Sent(worker, seq));
        *there.unwrap_or_else(|| panic!("nothing was sent to {worker} under {seq}")).0
    }

    /// It is with the primary again.
    pub(crate) fn come_back(&mut self, connection: u64, worker: WorkerId) {
        let entry = self.entry(connection);
        assert!(matches!(entry.place, Place::Sent(to, _) if to == worker), "{:?}", entry.place);
        entry.place = Place::Kept;
        self.sent -= 1;
        self.kept += 1;
    }

    /// All that this worker has not acknowledged is with the primary again; tells how many.
    pub(crate) fn come_back_from(&mut self, worker: WorkerId) -> usize {
        let of_worker = |e: &Entry| matches!(e.place, Place::Sent(to, _) if to == worker);
        let all: Vec<u64> =
            self.entries.iter().filter(|(_, e)| of_worker(e)).map(|(id, _)| *id).collect();
        for connection in &all {
            self.come_back(*connection, worker);
        }
        all.len()
    }

    /// The shell has it again.
    pub(crate) fn give_back(&mut self, connection: u64) {
        let entry = self.entry(connection);
        match entry.place {
            Place::Kept => self.kept -= 1,
            Place::Sent(..) => self.sent -= 1,
            other => panic!("connection {connection} came back but was {other:?}"),
        }
        self.entry(connection).place = Place::Returned;
        self.returned += 1;
    }

    /// After the end: every connection has one.
    pub(crate) fn assert_complete(&self) {
        assert_eq!((self.kept, self.sent), (0, 0), "connections without an end");
        assert_eq!(self.next, self.acknowledged + self.returned);
        for (connection, entry) in &self.entries {
            let over = matches!(entry.place, Place::Acknowledged(_) | Place::Returned);
            assert!(over, "connection {connection} is {:?}", entry.place);
        }
    }

    /// Forgets connections that can no longer change: those that were acknowledged and read.
    pub(crate) fn forget_the_settled(&mut self) {
        let settled = |e: &Entry| matches!(e.place, Place::Acknowledged(_)) && e.read_by.is_some();
        self.entries.retain(|_, entry| !settled(entry));
    }

    fn entry(&mut self, connection: u64) -> &mut Entry {
        self.entries.get_mut(&connection).unwrap_or_else(|| panic!("no connection {connection}"))
    }
}
