//! What all ends of one channel share: its queues, and the two tasks that read and write.
//!
//! Senders put bytes into a bounded queue; whoever gets round to it first writes them: the sender when a lot
//! has come together, the receiver before it waits, or the writer task. The reader task decodes, answers what
//! Node's protocol wants answered, and queues messages until there are too many.
//!
//! Between two Rust processes what is written may go into a ring of shared memory, and what is read come out of one (`ring`).
//! Nobody waits for a ring alone: who sleeps is woken by the socket.
//!
//! The rule that surprises: a receiver that is behind stops the reader, except while a handle or a
//! request waits for its answer, which comes in the same stream. Then reading goes on up to a second, higher
//! limit.
//!
//! References: unix(7); `polyfork_wire::node::outbox` for the order of handles.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use polyfork_wire::node::cluster::{self, HANDLE_ACK, HANDLE_NACK};
use polyfork_wire::{Limits, ProtocolError};
use serde::Serialize;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;

pub(super) use super::codec::Kind;
use super::codec::{Came, Decoder, Event, Outgoing, Written};
use super::count::Counts;
use super::message::{Answer, Body, Message, Rest};
use super::ring::{NativeOut, RingIn, TURN_BYTES};
use super::socket::{Read, SHORTAGE_PAUSE, Socket};
use super::{ChannelError, Encoding, Handle, SendError};

/// Senders wait above this many queued bytes.
const HIGH_MARK_BYTES: usize = 256 << 10;
/// Senders wait above this many queued handles, of which the system has few.
const HIGH_MARK_HANDLES: usize = 64;
/// A sender writes by itself when this much has come together.
const WRITE_FROM_BYTES: usize = 64 << 10;
/// The reader stops above this weight of messages that nobody has received.
const BEHIND_BYTES: usize = 1 << 20;
/// The same while an answer is waited for.
const FAR_BEHIND_BYTES: usize = 16 << 20;
/// The reader stops while the other end leaves this many bytes of acknowledgements unread.
const MOST_ANSWER_BYTES: usize = 64 << 10;
/// Most ends say little; those that say much get a larger buffer.
const FIRST_READ_BYTES: usize = 4 << 10;
const READ_BYTES: usize = 64 << 10;
/// A sender writes by itself into the ring when this much has come together: it costs no system call.
const RING_FROM_BYTES: usize = 8 << 10;
/// How often to look for room in a ring when the other end cannot tell us.
const RING_POLL: Duration = Duration::from_millis(2);
/// How often to look once more before sleeping.
const LOOKS: u32 = 8;
/// How long a look takes: so many times what a processor needs to do nothing.
const LOOK_SPINS: u32 = 16;
/// When looking did not help, so many times at most it is not tried again.
const MOST_SKIPPED: u32 = 255;

/// How far the life of the sending half has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing more is taken; what is queued is written.
    Closing,
    Closed,
}

pub(crate) struct Shared {
    socket: Socket,
    limits: Limits,
    out: Mutex<Out>,
    inn: Mutex<In>,
    /// Tells the writer that the queue is not empty.
    dirty: Notify,
    /// Held while waiting for room, so that senders get it in the order they asked.
    turn: tokio::sync::Mutex<()>,
    /// Senders that wait, whom nobody may overtake.
    waiting: AtomicUsize,
    /// Tells the reader that what made it stop may be over.
    resume: Notify,
    process_ended: Notify,
    requests: Mutex<HashMap<u64, oneshot::Sender<Option<Body>>>>,
    next_request: AtomicU64,
    pub(super) counts: Counts,
    ended: watch::Sender<bool>,
    reader: Mutex<Option<AbortHandle>>,
    /// Whether messages may go through shared memory.
    ring_allowed: AtomicBool,
}

struct Out {
    queue: Outgoing,
    state: State,
    /// Nobody is left to receive: once all is written the channel is over.
    abandoned: bool,
    /// No acknowledgement will come any more.
    reading_ended: bool,
    /// Who waits for bytes to leave.
    wakers: Vec<Waker>,
}

#[derive(Default)]
struct In {
    queue: VecDeque<Message>,
    /// Of the queue.
    weight: usize,
    /// Of what the receiver has taken at once, until it comes again.
    taken: usize,
    fault: Option<ChannelError>,
    ended: bool,
    receiver_gone: bool,
    reader_stopped: bool,
    waker: Option<Waker>,
}

/// How far a flush came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    /// There is nothing to write now.
    Done,
    Full,
    RingFull,
    Shortage,
    /// Nothing will be written any more.
    Closed,
}

impl Shared {
    /// Starts both tasks. Must be called inside a tokio runtime.
    pub(super) fn start(
        socket: OwnedFd,
        encoding: Encoding,
        limits: Limits,
    ) -> io::Result<Arc<Shared>> {
        let out = Out {
            queue: Outgoing::new(encoding),
            state: State::Open,
            abandoned: false,
            reading_ended: false,
            wakers: Vec::new(),
        };
        let shared = Arc::new(Shared {
            socket: Socket::new(socket)?,
            limits,
            out: Mutex::new(out),
            inn: Mutex::default(),
            dirty: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            waiting: AtomicUsize::new(0),
            resume: Notify::new(),
            process_ended: Notify::new(),
            requests: Mutex::default(),
            next_request: AtomicU64::new(1),
            counts: Counts::default(),
            ended: watch::Sender::new(false),
            reader: Mutex::new(None),
            ring_allowed: AtomicBool::new(true),
        });
        tokio::spawn(Arc::clone(&shared).write_all());
        let reader = Arc::clone(&shared).read_all(Decoder::new(encoding, limits));
        *lock(&shared.reader) = Some(tokio::spawn(reader).abort_handle());
        Ok(shared)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    // Sending.

    /// Queues a value, waiting for room. Cancel safe: dropped before it is done, nothing was queued.
    pub(super) async fn send<T: Serialize + ?Sized>(
        &self,
        kind: Kind,
        value: &T,
        handles: Vec<Handle>,
    ) -> Result<(), SendError> {
        tokio::task::consume_budget().await;
        if self.waiting.load(Ordering::Relaxed) == 0 {
            let mut out = lock(&self.out);
            if out.state != State::Open {
                return Err(SendError::Disconnected);
            }
            if out.has_room() {
                return self.push(&mut out, kind, value, handles);
            }
        }
        self.send_in_turn(kind, value, handles).await
    }

    async fn send_in_turn<T: Serialize + ?Sized>(
        &self,
        kind: Kind,
        value: &T,
        handles: Vec<Handle>,
    ) -> Result<(), SendError> {
        let _waiting = Waiting::new(&self.waiting);
        let _turn = self.turn.lock().await;
        std::future::poll_fn(|cx| lock(&self.out).poll_until(cx, Out::has_room)).await?;
        let mut out = lock(&self.out);
        if out.state != State::Open {
            return Err(SendError::Disconnected);
        }
        self.push(&mut out, kind, value, handles)
    }

    /// Queues a value if there is room; `Ok(false)` when there is none.
    pub(super) fn try_send<T: Serialize + ?Sized>(&self, value: &T) -> Result<bool, SendError> {
        let mut out = lock(&self.out);
        if out.state != State::Open {
            return Err(SendError::Disconnected);
        }
        if self.waiting.load(Ordering::Relaxed) > 0 || !out.has_room() {
            return Ok(false);
        }
        self.push(&mut out, Kind::Message, value, Vec::new()).map(|()| true)
    }

    fn push<T: Serialize + ?Sized>(
        &self,
        out: &mut Out,
        kind: Kind,
        value: &T,
        handles: Vec<Handle>,
    ) -> Result<(), SendError> {
        let with_handles = !handles.is_empty();
        let before = out.queue.queued_bytes();
        out.queue.push(kind, value, handles, self.limits.max_message)?;
        self.pushed(out, before);
        if with_handles {
            // An acknowledgement is waited for from now on.
            self.resume.notify_one();
        }
        Ok(())
    }

    /// Sees to it that what was queued leaves.
    fn pushed(&self, out: &mut Out, before: usize) {
        if before == 0 {
            self.dirty.notify_one();
        }
        let from = if out.by_ring() { RING_FROM_BYTES } else { WRITE_FROM_BYTES };
        if before < from && out.queue.queued_bytes() >= from {
            self.flush_locked(out);
        }
    }

    /// Tells an asker that there is no answer, unless it does not read what it is told anyway.
    pub(super) fn refuse(&self, id: u64) {
        let mut out = lock(&self.out);
        let before = out.queue.queued_bytes();
        if out.state == State::Open && before <= 2 * HIGH_MARK_BYTES {
            out.queue.push_refusal(id);
            self.pushed(&mut out, before);
        }
    }

    pub(super) fn say_all_closed(&self, key: &str) {
        self.answer(cluster::socket_all_closed(key));
    }

    fn answer(&self, line: impl Into<Vec<u8>>) {
        let mut out = lock(&self.out);
        // While closing too: the other end waits for it.
        if out.state != State::Closed {
            let before = out.queue.queued_bytes();
            out.queue.answer(line);
            self.pushed(&mut out, before);
        }
    }

    /// Waits until everything queued so far has left this process.
    pub(super) async fn flush(&self) -> Result<(), SendError> {
        let end = {
            let out = lock(&self.out);
            out.queue.written_total() + out.queue.queued_bytes() as u64
        };
        std::future::poll_fn(|cx| {
            lock(&self.out).poll_until(cx, |out| out.queue.written_total() >= end)
        })
        .await
    }

    pub(super) fn is_connected(&self) -> bool {
        lock(&self.out).state == State::Open
    }

    /// Takes nothing more, and writes what is queued. False when that was so already.
    pub(super) fn begin_disconnect(&self) -> bool {
        let mut out = lock(&self.out);
        if out.state != State::Open {
            return false;
        }
        self.begin_closing(&mut out);
        true
    }

    fn begin_closing(&self, out: &mut Out) {
        out.state = State::Closing;
        // Who waits for room learns that there will be none.
        out.wake();
        self.dirty.notify_one();
        self.resume.notify_one();
    }

    /// Waits until all that was queued has been written, or cannot be.
    pub(super) async fn disconnected(&self) {
        let written = |out: &Out| out.state == State::Closed;
        std::future::poll_fn(|cx| {
            let mut out = lock(&self.out);
            if written(&out) {
                return Poll::Ready(());
            }
            out.wait(cx);
            Poll::Pending
        })
        .await;
    }

    /// Nobody has the channel any more: it ends when what is queued is written.
    pub(super) fn abandon(&self) {
        let over = {
            let mut out = lock(&self.out);
            out.abandoned = true;
            if out.state == State::Open {
                self.begin_closing(&mut out);
            }
            out.state == State::Closed
        };
        if over {
            self.stop_reading();
        }
    }

    /// Not to be called with a lock held.
    fn stop_reading(&self) {
        if let Some(reader) = lock(&self.reader).take() {
            reader.abort();
            self.socket.shutdown(Shutdown::Both);
            self.end_of_reading(None);
        }
    }

    /// Resolves when nothing more is sent or received.
    pub(super) async fn ended(&self) {
        // The sender lives as long as this does.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    pub(super) fn ending(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// The process at the other end has ended: what is in the socket is read, then the channel ends even if
    /// somebody else has inherited that end.
    pub(super) fn process_ended(&self) {
        self.process_ended.notify_one();
    }

    // Writing.

    async fn write_all(self: Arc<Self>) {
        let mut looks = spins();
        loop {
            // Before it sleeps for room, it looks for some a few times.
            let (flushed, moved) = self.write_now(looks == 0);
            if moved || flushed != Flushed::RingFull {
                looks = spins();
            }
            match flushed {
                Flushed::Done => self.dirty.notified().await,
                Flushed::Shortage => tokio::time::sleep(SHORTAGE_PAUSE).await,
                Flushed::Full if self.socket.writable().await => {}
                Flushed::Full => self.close_out(&mut lock(&self.out)),
                Flushed::RingFull if looks > 0 => {
                    looks -= 1;
                    tokio::task::yield_now().await;
                }
                Flushed::RingFull => self.wait_for_room_in_ring().await,
                Flushed::Closed => break,
            }
        }
        if lock(&self.out).abandoned {
            self.stop_reading();
        }
    }

    /// Waits until the other end says that it took something out of the ring, or can no longer say so.
    async fn wait_for_room_in_ring(&self) {
        let ended = lock(&self.out).reading_ended;
        if !ended && !lock(&self.inn).reader_stopped {
            return self.dirty.notified().await;
        }
        // Nobody reads what it says. It may go on taking all the same.
        tokio::select! {
            () = self.dirty.notified() => {}
            () = tokio::time::sleep(RING_POLL) => {}
        }
        if self.socket.is_hung_up() {
            self.close_out(&mut lock(&self.out));
        }
    }

    fn flush_locked(&self, out: &mut Out) -> Flushed {
        let flushed = self.flush_out(out, false);
        if flushed == Flushed::RingFull {
            // The writer waits for room.
            self.dirty.notify_one();
        }
        flushed
    }

    /// How far the writer came, and whether it came any further. `sleeps`: it will wait for what is missing.
    fn write_now(&self, sleeps: bool) -> (Flushed, bool) {
        let mut out = lock(&self.out);
        let before = out.queue.written_total();
        let flushed = self.flush_out(&mut out, sleeps);
        (flushed, out.queue.written_total() != before)
    }

    fn flush_out(&self, out: &mut Out, sleeps: bool) -> Flushed {
        if out.state == State::Closed {
            return Flushed::Closed;
        }
        let before = out.queue.written_total();
        let written = out.queue.write_to(&self.socket, sleeps);
        if out.queue.written_total() != before {
            out.wake();
            self.resume_reader();
        }
        match written {
            Written::Gone => {
                self.close_out(out);
                Flushed::Closed
            }
            Written::All if out.state == State::Closing && out.is_done() => {
                self.close_out(out);
                Flushed::Closed
            }
            Written::All => Flushed::Done,
            Written::SocketFull => Flushed::Full,
            Written::RingFull => Flushed::RingFull,
            Written::Shortage => Flushed::Shortage,
        }
    }

    /// Nothing is written any more, because all was or because nobody reads it.
    fn close_out(&self, out: &mut Out) {
        if out.state != State::Closed {
            out.state = State::Closed;
            out.queue = Outgoing::new(Encoding::Json);
            self.socket.shutdown(Shutdown::Write);
            out.wake();
            self.dirty.notify_one();
            self.resume.notify_one();
        }
    }

    // Receiving.

    /// Moves everything that came into `ready`, which is empty. `Ready(Ok(false))` at the end.
    pub(super) fn poll_take(
        &self,
        cx: &mut Context<'_>,
        ready: &mut VecDeque<Message>,
    ) -> Poll<Result<bool, ChannelError>> {
        {
            let mut inn = lock(&self.inn);
            // What was taken the last time has been received by now.
            inn.taken = 0;
            let taken = self.take(&mut inn, ready);
            if taken.is_ready() {
                self.resume_if_stopped(&mut inn);
                return taken;
            }
            if inn.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                inn.waker = Some(cx.waker().clone());
            }
            self.resume_if_stopped(&mut inn);
        }
        // Whoever waits for an answer should not wait for the writer to get its turn as well.
        let mut out = lock(&self.out);
        if out.queue.queued_bytes() > 0 {
            self.flush_locked(&mut out);
        }
        Poll::Pending
    }

    fn take(
        &self,
        inn: &mut In,
        ready: &mut VecDeque<Message>,
    ) -> Poll<Result<bool, ChannelError>> {
        if !inn.queue.is_empty() {
            std::mem::swap(&mut inn.queue, ready);
            inn.taken = std::mem::take(&mut inn.weight);
            return Poll::Ready(Ok(true));
        }
        if let Some(fault) = inn.fault.take() {
            return Poll::Ready(Err(fault));
        }
        if inn.ended { Poll::Ready(Ok(false)) } else { Poll::Pending }
    }

    fn resume_if_stopped(&self, inn: &mut In) {
        if std::mem::take(&mut inn.reader_stopped) {
            self.resume.notify_one();
        }
    }

    fn resume_reader(&self) {
        self.resume_if_stopped(&mut lock(&self.inn));
    }

    /// What comes from now on is dropped.
    pub(super) fn receiver_gone(&self) {
        let dropped = {
            let mut inn = lock(&self.inn);
            inn.receiver_gone = true;
            inn.weight = 0;
            self.resume_if_stopped(&mut inn);
            std::mem::take(&mut inn.queue)
        };
        // Requests among them are refused, which needs the other lock.
        drop(dropped);
    }

    // Requests.

    /// Asks, and waits for the answer. Forgotten when dropped.
    pub(super) async fn request<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<Option<Option<Body>>, SendError> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        lock(&self.requests).insert(id, answer);
        let _forget = Forget { id, shared: self };
        self.resume.notify_one();
        self.send(Kind::Request(id), value, Vec::new()).await?;
        if *self.ended.borrow() {
            return Ok(None);
        }
        Ok(answered.await.ok())
    }

    fn answered(&self, id: u64, body: Option<Body>) {
        // Nobody may wait for it any more: then it was too late.
        if let Some(asker) = lock(&self.requests).remove(&id) {
            drop(asker.send(body));
        }
    }

    // Reading.

    async fn read_all(self: Arc<Self>, mut decoder: Decoder) {
        let (fault, process_gone) = match self.read_to_end(&mut decoder).await {
            Ok(process_gone) => (None, process_gone),
            Err(fault) => (Some(fault), false),
        };
        if fault.is_some() || process_gone {
            self.close_out(&mut lock(&self.out));
            self.socket.shutdown(Shutdown::Both);
        }
        lock(&self.reader).take();
        self.end_of_reading(fault);
    }

    fn end_of_reading(&self, fault: Option<ProtocolError>) {
        {
            let mut out = lock(&self.out);
            out.reading_ended = true;
            if out.state == State::Open {
                self.begin_closing(&mut out);
            }
            self.dirty.notify_one();
        }
        let mut inn = lock(&self.inn);
        inn.ended = true;
        inn.fault = fault.map(ChannelError);
        let waker = inn.waker.take();
        drop(inn);
        lock(&self.requests).clear();
        self.ended.send_replace(true);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Reads until the channel ends; true when the process at the other end has.
    async fn read_to_end(self: &Arc<Self>, decoder: &mut Decoder) -> Result<bool, ProtocolError> {
        let mut buffer = vec![0; FIRST_READ_BYTES];
        let mut fds = VecDeque::new();
        // Used again and again: nothing is asked of the allocator for a message that is small.
        let mut came = Vec::new();
        let mut pace = Pace::default();
        let mut last = false;
        loop {
            let got = if last {
                Next::Read(self.socket.read_now(&mut buffer, &mut fds))
            } else {
                tokio::select! {
                    biased;
                    got = self.next_input(decoder, &mut buffer, &mut fds, &mut pace) => got?,
                    () = self.process_ended.notified() => {
                        last = true;
                        continue;
                    }
                }
            };
            let received = match got {
                Next::Ring => None,
                Next::Read(Read::Some(received)) => Some(received),
                // A message that is cut off is no fault: whoever dies while writing leaves one.
                Next::Read(Read::End) => {
                    self.take_last(decoder, &mut came)?;
                    return Ok(last);
                }
                Next::Read(Read::Empty) if last => {
                    self.take_last(decoder, &mut came)?;
                    return Ok(true);
                }
                Next::Read(Read::Empty) => continue,
            };
            if let Some(received) = received {
                decoder.feed(&buffer[..received.len], &mut fds, received.truncated)?;
            }
            self.take_turn(decoder, &mut came, TURN_BYTES)?;
            if received.is_some_and(|got| got.len == buffer.len()) && buffer.len() < READ_BYTES {
                buffer.resize(READ_BYTES, 0);
            }
        }
    }

    /// Waits for something to decode.
    async fn next_input(
        &self,
        decoder: &mut Decoder,
        buffer: &mut [u8],
        fds: &mut VecDeque<OwnedFd>,
        pace: &mut Pace,
    ) -> Result<Next, ProtocolError> {
        while !self.may_read() {
            self.resume.notified().await;
        }
        if decoder.is_holding() {
            tokio::task::yield_now().await;
            return Ok(Next::Ring);
        }
        let Some(ring) = decoder.ring().filter(|ring| ring.is_started()) else {
            return Ok(Next::Read(self.socket.read(buffer, fds).await));
        };
        let looks = pace.looks();
        for look in 0..=looks {
            let more = ring.has_more()? || look > 0 && comes_soon(ring)?;
            if more && look > 0 {
                pace.helped();
            }
            tokio::select! {
                biased;
                got = self.socket.read(buffer, fds) => return Ok(Next::Read(got)),
                // The socket, and who receives, get their turn as well.
                () = tokio::task::yield_now() => if more { return Ok(Next::Ring) },
            }
        }
        if looks > 0 {
            pace.did_not_help();
        }
        if !ring.prepare_sleep()? {
            return Ok(Next::Ring);
        }
        let _awake = Awake(ring);
        Ok(Next::Read(self.socket.read(buffer, fds).await))
    }

    /// Decodes what is there, not more than so much out of the ring.
    fn take_turn(
        self: &Arc<Self>,
        decoder: &mut Decoder,
        came: &mut Vec<Message>,
        bytes: usize,
    ) -> Result<(), ProtocolError> {
        if let Some(ring) = decoder.ring() {
            ring.begin_turn(bytes);
        }
        let fault = self.take_in(decoder, came).err();
        self.deliver(came);
        if decoder.ring().is_some_and(|ring| ring.must_wake()) {
            let mut out = lock(&self.out);
            if out.state != State::Closed
                && let Some(native) = out.queue.native()
            {
                native.wake_other();
                self.flush_locked(&mut out);
            }
        }
        fault.map_or(Ok(()), Err)
    }

    /// Decodes what the other end left behind.
    fn take_last(
        self: &Arc<Self>,
        decoder: &mut Decoder,
        came: &mut Vec<Message>,
    ) -> Result<(), ProtocolError> {
        let Some(most) = decoder.ring().and_then(|ring| ring.most()) else { return Ok(()) };
        self.take_turn(decoder, came, most)
    }

    /// Whether there is room for what is read.
    fn may_read(&self) -> bool {
        let (answers, handles, state) = {
            let out = lock(&self.out);
            (out.queue.answer_bytes(), out.queue.queued_handles(), out.state)
        };
        let waits_for_answer = handles > 0 || !lock(&self.requests).is_empty();
        let most = if waits_for_answer { FAR_BEHIND_BYTES } else { BEHIND_BYTES };
        let mut inn = lock(&self.inn);
        let may = inn.receiver_gone
            || (inn.weight + inn.taken <= most
                && (answers <= MOST_ANSWER_BYTES || state == State::Closed));
        inn.reader_stopped = !may;
        if !may {
            // The writer cannot be told any more that there is room in its ring.
            self.dirty.notify_one();
        }
        may
    }

    /// Decodes what was fed; messages go to `came`, the rest is answered at once.
    fn take_in(
        self: &Arc<Self>,
        decoder: &mut Decoder,
        came: &mut Vec<Message>,
    ) -> Result<(), ProtocolError> {
        loop {
            decoder.take_plain(came)?;
            let Some(event) = decoder.next()? else { return Ok(()) };
            match event {
                Event::Plain(body) => came.push(Message::plain(body)),
                Event::Message(message) => {
                    let Came { body, request, handles, key, acknowledge } = *message;
                    if acknowledge {
                        self.answer(HANDLE_ACK);
                    }
                    let counted = key.map(|key| self.counts.count(key, Arc::downgrade(self)));
                    let answer = request.map(|id| Answer::new(id, Arc::downgrade(self)));
                    came.push(Message::new(body, Rest { handles, counted, answer }));
                }
                Event::Reply { id, body } => self.answered(id, Some(body)),
                Event::Refused { id } => self.answered(id, None),
                Event::Acknowledged { nack } => {
                    let mut out = lock(&self.out);
                    if out.state != State::Closed {
                        out.queue.acknowledged(nack)?;
                        self.flush_locked(&mut out);
                        // What is left waits for the socket or for another acknowledgement.
                        self.dirty.notify_one();
                    }
                }
                Event::Answer { nack } => self.answer(if nack { HANDLE_NACK } else { HANDLE_ACK }),
                Event::Count { key } => {
                    self.answer(cluster::socket_count(&key, self.counts.open(&key)));
                }
                Event::TellClosed { key } => {
                    if self.counts.asked(&key) {
                        self.say_all_closed(&key);
                    }
                }
                Event::Ring(memory) => {
                    let allowed = self.ring_allowed.load(Ordering::Relaxed);
                    let taken = match decoder.ring().filter(|_| allowed) {
                        Some(ring) => ring.take_offer(memory)?,
                        None => false,
                    };
                    self.native_out(|native| {
                        native.answer_offer(taken);
                        Ok(())
                    })?;
                }
                Event::Features(features) => self.native_out(|native| {
                    native.other_can(features);
                    Ok(())
                })?,
                Event::RingAnswer { taken } => {
                    self.native_out(|native| native.offer_was_answered(taken))?;
                }
                Event::Wake => self.dirty.notify_one(),
                Event::Nothing => {}
            }
        }
    }

    /// Changes how a native channel writes, and sees to it that it does.
    fn native_out(
        &self,
        change: impl FnOnce(&mut NativeOut) -> Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        let mut out = lock(&self.out);
        if out.state == State::Closed {
            return Ok(());
        }
        let Some(native) = out.queue.native() else { return Ok(()) };
        change(native)?;
        self.dirty.notify_one();
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn uses_ring(&self) -> bool {
        lock(&self.out).by_ring()
    }

    /// As if this process had been killed.
    #[cfg(test)]
    pub(super) fn cut_off(&self) {
        self.close_out(&mut lock(&self.out));
        self.stop_reading();
    }

    #[cfg(test)]
    pub(super) fn queued_bytes(&self) -> usize {
        lock(&self.out).queue.queued_bytes()
    }

    pub(super) fn allow_ring(&self, allowed: bool) {
        self.ring_allowed.store(allowed, Ordering::Relaxed);
        if let Some(native) = lock(&self.out).queue.native() {
            native.allow_ring(allowed);
        }
    }

    fn deliver(&self, came: &mut Vec<Message>) {
        if came.is_empty() {
            return;
        }
        let mut inn = lock(&self.inn);
        if inn.receiver_gone {
            drop(inn);
            // Requests among them are refused, which needs the other lock.
            came.clear();
            return;
        }
        inn.weight += came.iter().map(Message::weight).sum::<usize>();
        inn.queue.extend(came.drain(..));
        let waker = inn.waker.take();
        drop(inn);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// What there is to decode.
enum Next {
    Read(Read),
    /// Something in the ring.
    Ring,
}

/// Whether to look again before sleeping: where it does not help, less and less often.
#[derive(Default)]
struct Pace {
    skip: u32,
    skipped: u32,
}

impl Pace {
    fn looks(&mut self) -> u32 {
        if self.skip == 0 {
            return spins();
        }
        self.skip -= 1;
        0
    }

    fn helped(&mut self) {
        self.skipped = 0;
    }

    fn did_not_help(&mut self) {
        self.skipped = (self.skipped * 2 + 1).min(MOST_SKIPPED);
        self.skip = self.skipped;
    }
}

/// Looks for a moment.
fn comes_soon(ring: &mut RingIn) -> Result<bool, ProtocolError> {
    for _ in 0..LOOK_SPINS {
        std::hint::spin_loop();
        if ring.has_more()? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Looking again while somebody else works takes a second processor.
fn spins() -> u32 {
    static LOOKS_HERE: OnceLock<u32> = OnceLock::new();
    let several = || std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    *LOOKS_HERE.get_or_init(|| if several() { LOOKS } else { 0 })
}

/// Says that nobody sleeps any more, also when the sleep is given up.
struct Awake<'a>(&'a mut RingIn);

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.0.awake();
    }
}

impl Out {
    /// Whether messages go into a ring now.
    fn by_ring(&mut self) -> bool {
        self.queue.native().is_some_and(|native| native.uses_ring())
    }

    /// Whether nothing more will be written, asked when nothing can be written now.
    fn is_done(&self) -> bool {
        self.queue.is_empty() || self.reading_ended
    }

    fn has_room(&self) -> bool {
        self.queue.queued_bytes() <= HIGH_MARK_BYTES
            && self.queue.queued_handles() <= HIGH_MARK_HANDLES
    }

    fn poll_until(
        &mut self,
        cx: &mut Context<'_>,
        done: impl FnOnce(&Out) -> bool,
    ) -> Poll<Result<(), SendError>> {
        if self.state == State::Closed {
            return Poll::Ready(Err(SendError::Disconnected));
        }
        if done(self) {
            return Poll::Ready(Ok(()));
        }
        self.wait(cx);
        Poll::Pending
    }

    fn wait(&mut self, cx: &mut Context<'_>) {
        if !self.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.wakers.push(cx.waker().clone());
        }
    }

    fn wake(&mut self) {
        for waker in self.wakers.drain(..) {
            waker.wake();
        }
    }
}

/// Counts a sender that waits, also when it gives up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Waiting<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Forgets a request, also when its asker gives up.
struct Forget<'a> {
    id: u64,
    shared: &'a Shared,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.shared.requests).remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it is held can only come from a value's `Serialize`, which leaves the queue whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
