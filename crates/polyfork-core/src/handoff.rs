//! Hands accepted connections to workers in turn, and keeps each until its worker has acknowledged it.
//!
//! The shell accepts, sends descriptors over channels and reads the answers; this module decides who gets what, and
//! remembers a copy of everything that is under way. Whose turn it is comes from [`crate::turn`]; the life of workers is
//! the [`crate::supervisor`]'s.
//!
//! # The order that loses nothing
//!
//! 1. The primary accepts no more than [`Handoff::room`]; the rest waits in the kernel's queue, where it is safe.
//! 2. Each connection sent has a sequence number and a copy kept here. At most a window of them is under way per worker.
//! 3. The worker acknowledges before its first read. Only then is the copy given back to be closed.
//! 4. When a worker dies, its channel is read to the end first, every acknowledgement in it is entered, and only
//!    then [`Handoff::died`] puts the rest back in line. An acknowledged connection is never handed out again, because the worker
//!    may have read from it; an unacknowledged one always is, because it cannot have.
//!
//! # Lost or lying acknowledgements
//!
//! A number that was never sent, was sent to somebody else, was answered before or was taken back is a [`HandoffFault`]. It
//! changes nothing here; the shell replaces that worker. No other worker notices.
//!
//! The surprising rule: a connection that comes back is sorted in by the time it was accepted, not put at the end. It has
//! waited longest, and clients notice the order.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::id::WorkerId;
use crate::time::Time;
use crate::turn::{Room, Turn};

/// The limits of one listener's hand-over.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HandoffConfig {
    /// Unacknowledged connections per worker, 1 to [`HandoffConfig::MAX_WINDOW`], for workers that join without one.
    pub window: usize,
    /// Connections accepted and not yet under way, at least 1. Those that come back from a dead worker may exceed it.
    pub queue_limit: usize,
    /// A worker that answers nothing for this long while it owes an answer is stalled, and skipped until it does.
    pub ack_limit: Duration,
    /// How long a worker that refused a connection gets none, before it is tried with one.
    pub refuse_pause: Duration,
    /// Turns that a worker without room is owed at most. Then the others wait for it, until it is stalled (see [`Turn`]).
    pub debt_limit: u32,
}

impl HandoffConfig {
    /// The largest window.
    pub const MAX_WINDOW: usize = 64;
}

impl Default for HandoffConfig {
    fn default() -> HandoffConfig {
        HandoffConfig {
            window: 8,
            queue_limit: 1024,
            ack_limit: Duration::from_secs(1),
            refuse_pause: Duration::from_millis(25),
            debt_limit: 32,
        }
    }
}

/// Send this connection to this worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment<C> {
    /// Who gets it.
    pub worker: WorkerId,
    /// The number its answer will carry: unique and growing within one [`Handoff`].
    pub seq: u64,
    /// A copy; the other one is kept until the acknowledgement.
    pub connection: C,
    /// How often it had been handed to some worker before: 0 the first time.
    pub before: u32,
}

/// A connection that its worker took over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted<C> {
    /// The copy that was kept. Dropping it is right: the worker has its own.
    pub connection: C,
    /// From [`Handoff::offer`] to here, by the latest time this value was told.
    pub waited: Duration,
}

/// An answer that no honest worker gives. The shell replaces the worker.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandoffFault {
    /// The worker takes no part in this hand-over (any more).
    #[error("worker {worker} answered connection {seq} but takes no part")]
    NotAMember {
        /// Who answered.
        worker: WorkerId,
        /// What it answered.
        seq: u64,
    },
    /// The number has not been used yet.
    #[error("worker {worker} answered connection {seq}, which was never sent")]
    NeverSent {
        /// Who answered.
        worker: WorkerId,
        /// What it answered.
        seq: u64,
    },
    /// The connection is under way to another worker.
    #[error("worker {worker} answered connection {seq}, which was sent to worker {owner}")]
    NotYours {
        /// Who answered.
        worker: WorkerId,
        /// What it answered.
        seq: u64,
        /// Whom it was sent to.
        owner: WorkerId,
    },
    /// The connection was taken back from this worker before it answered.
    #[error("worker {worker} answered connection {seq} after it was taken back")]
    Revoked {
        /// Who answered.
        worker: WorkerId,
        /// What it answered.
        seq: u64,
    },
    /// The number is used up: answered before, by this worker or another, or taken back long ago.
    #[error("worker {worker} answered connection {seq}, which is settled")]
    Settled {
        /// Who answered.
        worker: WorkerId,
        /// What it answered.
        seq: u64,
    },
}

/// What became of the connections: `offered = acknowledged + shed + in_flight + queued`, always.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Given to [`Handoff::offer`].
    pub offered: u64,
    /// Taken over by a worker.
    pub acknowledged: u64,
    /// Times that a connection was sent to a worker after an earlier one had not taken it over.
    pub rehanded: u64,
    /// Times that a worker refused one.
    pub refused: u64,
    /// Given back to the shell undelivered: the queue was full, or the listener closed.
    pub shed: u64,
    /// Sent and not answered.
    pub in_flight: u64,
    /// Waiting here.
    pub queued: u64,
}

/// One listener's connections on their way to workers. `C` is the shell's owned descriptor, cheap to clone.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Handoff<C> {
    config: HandoffConfig,
    now: Time,
    turn: Turn<WorkerId>,
    members: BTreeMap<WorkerId, Member<C>>,
    /// Sorted by `Held::arrival`.
    queue: VecDeque<Held<C>>,
    next_seq: u64,
    arrivals: u64,
    counters: Counters,
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Held<C> {
    arrival: u64,
    offered: Time,
    handed: u32,
    connection: C,
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Flight<C> {
    seq: u64,
    sent: Time,
    held: Held<C>,
}

/// Whether a worker has to show, with one connection at a time, that it takes what it is sent.
#[derive(Copy, Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Trial {
    /// It is trusted with its window.
    No,
    /// It refused one.
    Refused,
    /// So many times in a row all that was sent was taken back from it, unread.
    Silent(u32),
}

#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Member<C> {
    window: usize,
    suspended: bool,
    paused_until: Option<Time>,
    trial: Trial,
    /// When it last answered.
    answered: Time,
    /// Sorted by `Flight::seq`.
    in_flight: VecDeque<Flight<C>>,
    /// The latest numbers taken back, for a better message. Bounded by `MAX_WINDOW`.
    revoked: VecDeque<u64>,
}

/// A worker that stays silent is tried after 1, 2, 4, and then always 4 acknowledgement limits: the power of two.
const LONGEST_SILENT_PAUSE: u32 = 2;

impl<C> Member<C> {
    fn new(window: usize) -> Member<C> {
        Member {
            window,
            suspended: false,
            paused_until: None,
            trial: Trial::No,
            answered: Time::ZERO,
            in_flight: VecDeque::new(),
            revoked: VecDeque::new(),
        }
    }

    /// When it counts as stalled, if it owes an answer.
    fn stalls_at(&self, ack_limit: Duration) -> Option<Time> {
        let oldest = self.in_flight.front()?;
        oldest.sent.max(self.answered).after(ack_limit)
    }

    fn stalled(&self, now: Time, ack_limit: Duration) -> bool {
        self.stalls_at(ack_limit).is_some_and(|at| at <= now)
    }

    /// Whether it can take a turn. One that answers is worth waiting for; one that is stalled, paused or on trial is
    /// not.
    fn room(&self, now: Time, ack_limit: Duration) -> Room {
        let paused = self.paused_until.is_some_and(|until| until > now);
        if self.free(now, ack_limit) > 0 {
            Room::Free
        } else if self.suspended
            || paused
            || self.trial != Trial::No
            || self.stalled(now, ack_limit)
        {
            Room::Away
        } else {
            Room::Busy
        }
    }

    /// How many it may be sent now.
    fn free(&self, now: Time, ack_limit: Duration) -> usize {
        let paused = self.paused_until.is_some_and(|until| until > now);
        if self.suspended || paused || self.stalled(now, ack_limit) {
            return 0;
        }
        let window = if self.trial == Trial::No { self.window } else { 1 };
        window.saturating_sub(self.in_flight.len())
    }

    fn remove(&mut self, seq: u64) -> Option<Flight<C>> {
        let index = self.in_flight.binary_search_by_key(&seq, |flight| flight.seq).ok()?;
        self.in_flight.remove(index)
    }

    /// Nothing for a while, longer each time, then one connection to see whether it lives.
    fn fell_silent(&mut self, now: Time, ack_limit: Duration) {
        if self.paused_until.is_some_and(|until| until > now) {
            return;
        }
        let before = if let Trial::Silent(times) = self.trial { times } else { 0 };
        self.trial = Trial::Silent(before.saturating_add(1));
        let factor = 1 << before.min(LONGEST_SILENT_PAUSE);
        self.paused_until = now.after(ack_limit.saturating_mul(factor));
    }

    fn revoke(&mut self, seq: u64) {
        if self.revoked.len() == HandoffConfig::MAX_WINDOW {
            self.revoked.pop_front();
        }
        self.revoked.push_back(seq);
    }
}

impl<C> Handoff<C> {
    /// A hand-over without workers. A number outside its range is taken to the nearest end.
    pub fn new(mut config: HandoffConfig) -> Handoff<C> {
        config.queue_limit = config.queue_limit.max(1);
        let turn = Turn::new(config.debt_limit);
        Handoff {
            config,
            now: Time::ZERO,
            turn,
            members: BTreeMap::new(),
            queue: VecDeque::new(),
            next_seq: 1,
            arrivals: 0,
            counters: Counters::default(),
        }
    }

    /// From now this worker takes its turns, with at most `window` connections unacknowledged (0: as configured).
    ///
    /// A suspended worker that joins again takes part again, with what it still owes: it closed and listens anew.
    pub fn join(&mut self, worker: WorkerId, window: usize) {
        let window = if window == 0 { self.config.window } else { window };
        let window = window.clamp(1, HandoffConfig::MAX_WINDOW);
        let member = self.members.entry(worker).or_insert_with(|| Member::new(window));
        member.window = window;
        member.suspended = false;
        self.turn.join(worker);
    }

    /// From now this worker gets nothing new. What is under way stays so until it answers or dies.
    pub fn suspend(&mut self, worker: WorkerId) {
        if let Some(member) = self.members.get_mut(&worker) {
            member.suspended = true;
            self.turn.leave(worker);
        }
    }

    /// Ends the trial of a worker that connections were taken back from: the shell heard from it in some other way.
    pub fn heard(&mut self, now: Time, worker: WorkerId) {
        self.tell_time(now);
        let Some(member) = self.members.get_mut(&worker) else { return };
        if let Trial::Silent(_) = member.trial {
            member.trial = Trial::No;
            member.paused_until = None;
        }
    }

    /// Tells the time. Calls that take a time do this themselves; one that goes back is taken as standing still.
    pub fn tell_time(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// How many connections the primary may accept now; with 0 they are left in the kernel's queue.
    ///
    /// Judged by the latest time told, so call it after [`Handoff::assign`].
    pub fn room(&self) -> usize {
        let free: usize =
            self.members.values().map(|m| m.free(self.now, self.config.ack_limit)).sum();
        free.min(self.config.queue_limit).saturating_sub(self.queue.len())
    }

    /// Takes an accepted connection into the queue.
    ///
    /// Gives it back, counted as shed, when the queue is full; within [`Handoff::room`] that does not happen.
    pub fn offer(&mut self, now: Time, connection: C) -> Option<C> {
        self.tell_time(now);
        self.counters.offered += 1;
        if self.queue.len() >= self.config.queue_limit {
            self.counters.shed += 1;
            return Some(connection);
        }
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.queue.push_back(Held { arrival, offered: self.now, handed: 0, connection });
        None
    }

    /// Gives what waits to workers with room, in turn. Call it after every change, and at [`Handoff::deadline`].
    pub fn assign(&mut self, now: Time, out: &mut Vec<Assignment<C>>)
    where
        C: Clone,
    {
        self.tell_time(now);
        while !self.queue.is_empty() {
            let Some(worker) = self.next_worker() else { return };
            let Some(member) = self.members.get_mut(&worker) else { return };
            let Some(mut held) = self.queue.pop_front() else { return };
            let seq = self.next_seq;
            self.next_seq += 1;
            let connection = held.connection.clone();
            out.push(Assignment { worker, seq, connection, before: held.handed });
            self.counters.rehanded += u64::from(held.handed > 0);
            held.handed = held.handed.saturating_add(1);
            member.in_flight.push_back(Flight { seq, sent: self.now, held });
        }
    }

    /// The worker took the connection over: its copy comes back, to be dropped.
    ///
    /// # Errors
    ///
    /// A fault when this worker does not owe an answer with this number. Nothing changes then; replace the worker.
    pub fn acknowledged(
        &mut self,
        worker: WorkerId,
        seq: u64,
    ) -> Result<Accepted<C>, HandoffFault> {
        let flight = self.answer(worker, seq)?;
        if let Some(member) = self.members.get_mut(&worker) {
            member.trial = Trial::No;
        }
        self.counters.acknowledged += 1;
        let waited = self.now.since(flight.held.offered);
        Ok(Accepted { connection: flight.held.connection, waited })
    }

    /// The worker will not have the connection: it goes back in line. The worker gets nothing for a pause, then one
    /// connection at a time until it takes one.
    ///
    /// # Errors
    ///
    /// As for [`Handoff::acknowledged`].
    pub fn refused(&mut self, now: Time, worker: WorkerId, seq: u64) -> Result<(), HandoffFault> {
        self.tell_time(now);
        let flight = self.answer(worker, seq)?;
        if let Some(member) = self.members.get_mut(&worker) {
            member.trial = Trial::Refused;
            member.paused_until = self.now.after(self.config.refuse_pause);
        }
        self.counters.refused += 1;
        self.requeue(flight.held);
        Ok(())
    }

    /// The worker is dead and its channel has been read to the end: what it did not acknowledge goes back in line.
    ///
    /// Tells how many. A worker that is not a member had none.
    pub fn died(&mut self, worker: WorkerId) -> usize {
        self.turn.leave(worker);
        let Some(member) = self.members.remove(&worker) else { return 0 };
        let count = member.in_flight.len();
        for flight in member.in_flight {
            self.requeue(flight.held);
        }
        count
    }

    /// The shell proved that the worker has not read these: they go back in line, and an answer to them is a fault.
    ///
    /// Numbers that the worker does not owe are passed over. Tells how many came back. The worker gets nothing for an
    /// acknowledgement limit, then one connection at a time until it takes one or is [`Handoff::heard`]. The pause
    /// grows, to four limits, while it stays silent.
    pub fn take_back(&mut self, now: Time, worker: WorkerId, seqs: &[u64]) -> usize {
        self.tell_time(now);
        let Some(member) = self.members.get_mut(&worker) else { return 0 };
        let mut back = Vec::new();
        for seq in seqs {
            if let Some(flight) = member.remove(*seq) {
                member.revoke(*seq);
                back.push(flight.held);
            }
        }
        if !back.is_empty() {
            member.fell_silent(self.now, self.config.ack_limit);
        }
        let count = back.len();
        for held in back {
            self.requeue(held);
        }
        count
    }

    /// The workers that are stalled at `now`, each with the moment its oldest unanswered connection was sent.
    pub fn overdue(&self, now: Time) -> impl Iterator<Item = (WorkerId, Time)> + '_ {
        let now = self.now.max(now);
        self.members.iter().filter_map(move |(worker, member)| {
            let oldest = member.in_flight.front()?;
            member.stalled(now, self.config.ack_limit).then_some((*worker, oldest.sent))
        })
    }

    /// The numbers this worker still owes an answer to, oldest first: what [`Handoff::take_back`] may name.
    pub fn unanswered(&self, worker: WorkerId) -> impl Iterator<Item = u64> + '_ {
        self.members.get(&worker).into_iter().flat_map(|m| m.in_flight.iter().map(|f| f.seq))
    }

    /// When something changes by itself: a pause ends or a worker becomes stalled. Call [`Handoff::assign`] then, and
    /// look at [`Handoff::overdue`]. Never at or before the latest time told.
    pub fn deadline(&self) -> Option<Time> {
        let limit = self.config.ack_limit;
        let times = self.members.values().flat_map(|m| [m.paused_until, m.stalls_at(limit)]);
        times.flatten().filter(|at| *at > self.now).min()
    }

    /// The listener closes: everything that waits or is under way is given back, oldest first, and counted as shed.
    ///
    /// Workers that took part have to join again. An answer that still comes is a fault of nobody: ask
    /// [`Handoff::is_member`] first, or drop the value.
    pub fn cancel_all(&mut self) -> Vec<C> {
        let workers: Vec<WorkerId> = self.members.keys().copied().collect();
        for worker in workers {
            self.died(worker);
        }
        self.counters.shed += self.queue.len() as u64;
        self.queue.drain(..).map(|held| held.connection).collect()
    }

    /// Whether this worker takes part, suspended or not.
    pub fn is_member(&self, worker: WorkerId) -> bool {
        self.members.contains_key(&worker)
    }

    /// Connections under way to this worker.
    pub fn in_flight(&self, worker: WorkerId) -> usize {
        self.members.get(&worker).map_or(0, |member| member.in_flight.len())
    }

    /// The numbers so far.
    pub fn counters(&self) -> Counters {
        let in_flight: usize = self.members.values().map(|m| m.in_flight.len()).sum();
        Counters { in_flight: in_flight as u64, queued: self.queue.len() as u64, ..self.counters }
    }

    /// The same hand-over with something else in the place of each connection: a name by which another process finds
    /// it, or the connection that such a name stands for. Connections are visited in a fixed order.
    ///
    /// # Errors
    ///
    /// The first error of `name`.
    pub fn try_map<D, E>(&self, mut name: impl FnMut(&C) -> Result<D, E>) -> Result<Handoff<D>, E> {
        let mut held = |held: &Held<C>| {
            let Held { arrival, offered, handed, ref connection } = *held;
            Ok(Held { arrival, offered, handed, connection: name(connection)? })
        };
        let queue = self.queue.iter().map(&mut held).collect::<Result<_, E>>()?;
        let mut members = BTreeMap::new();
        for (worker, member) in &self.members {
            let flight = |flight: &Flight<C>| {
                let Flight { seq, sent, held: ref before } = *flight;
                Ok(Flight { seq, sent, held: held(before)? })
            };
            let in_flight = member.in_flight.iter().map(flight).collect::<Result<_, E>>()?;
            let Member { window, suspended, paused_until, trial, answered, .. } = *member;
            let revoked = member.revoked.clone();
            members.insert(
                *worker,
                Member { window, suspended, paused_until, trial, answered, in_flight, revoked },
            );
        }
        Ok(Handoff {
            config: self.config.clone(),
            now: self.now,
            turn: self.turn.clone(),
            members,
            queue,
            next_seq: self.next_seq,
            arrivals: self.arrivals,
            counters: self.counters,
        })
    }

    /// Whether its parts fit each other. To be asked of one that came from another process, before it is used.
    ///
    /// # Errors
    ///
    /// What does not fit.
    pub fn check(&self) -> Result<(), crate::supervisor::Inconsistent> {
        let wrong = |what| Err(crate::supervisor::Inconsistent(what));
        let windows = 1..=HandoffConfig::MAX_WINDOW;
        if self.config.queue_limit == 0 || !self.turn.is_sound() {
            return wrong("a hand-over without room or with double turns");
        }
        if self.turn.members().any(|worker| !self.members.contains_key(&worker)) {
            return wrong("a turn of a worker that takes no part");
        }
        if self.next_seq >= u64::MAX / 2 || self.arrivals >= u64::MAX / 2 {
            return wrong("a hand-over without numbers left");
        }
        if !self.queue.iter().is_sorted_by(|a, b| a.arrival < b.arrival) {
            return wrong("connections are out of order");
        }
        for member in self.members.values() {
            let sorted = member.in_flight.iter().is_sorted_by(|a, b| a.seq < b.seq);
            let known = member.in_flight.iter().all(|flight| flight.seq < self.next_seq);
            let bounded = member.revoked.len() <= HandoffConfig::MAX_WINDOW;
            if !windows.contains(&member.window) || !sorted || !known || !bounded {
                return wrong("a worker's connections are out of order");
            }
        }
        Ok(())
    }

    fn next_worker(&mut self) -> Option<WorkerId> {
        let (now, limit, members) = (self.now, self.config.ack_limit, &self.members);
        self.turn
            .next_or_wait(|worker| members.get(&worker).map_or(Room::Away, |m| m.room(now, limit)))
    }

    /// Takes the connection that `worker` owes an answer to out of flight, or says what is wrong with the answer.
    fn answer(&mut self, worker: WorkerId, seq: u64) -> Result<Flight<C>, HandoffFault> {
        let now = self.now;
        if let Some(member) = self.members.get_mut(&worker)
            && let Some(flight) = member.remove(seq)
        {
            member.answered = now;
            return Ok(flight);
        }
        Err(self.fault(worker, seq))
    }

    fn fault(&self, worker: WorkerId, seq: u64) -> HandoffFault {
        let Some(member) = self.members.get(&worker) else {
            return HandoffFault::NotAMember { worker, seq };
        };
        if seq == 0 || seq >= self.next_seq {
            return HandoffFault::NeverSent { worker, seq };
        }
        if member.revoked.contains(&seq) {
            return HandoffFault::Revoked { worker, seq };
        }
        let owes = |m: &Member<C>| m.in_flight.binary_search_by_key(&seq, |f| f.seq).is_ok();
        match self.members.iter().find(|(_, other)| owes(other)) {
            Some((owner, _)) => HandoffFault::NotYours { worker, seq, owner: *owner },
            None => HandoffFault::Settled { worker, seq },
        }
    }

    /// Puts a connection back where its age belongs.
    fn requeue(&mut self, held: Held<C>) {
        let at = self.queue.partition_point(|other| other.arrival < held.arrival);
        self.queue.insert(at, held);
    }
}
