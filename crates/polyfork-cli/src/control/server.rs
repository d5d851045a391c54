//! The primary's end of the control socket: who may ask, how much at once, and what becomes of a request.
//!
//! Nothing a client does can hurt the primary. There are 64 clients at most; each has one request of 64 KiB at most in
//! hand, five seconds to finish sending it and five to take its answer. When all places are taken, whoever is still
//! sending gives way, the oldest first: a thousand clients that send a byte a second keep nobody else out. Everything runs on
//! the primary's one thread, and nothing exists for a client that is not there.
//!
//! Who may ask: the same user, and root, by the credentials of whoever connected and again by those of whoever *sent* each
//! piece of a request: a connection that a privileged program left open for another is of no use to that other.
//!
//! The surprising rule: work that was begun for a client goes on when the client leaves. A restart that stopped half-way
//! because a terminal was closed would be worse than one that is finished unseen.
//!
//! References: unix(7) `SO_PEERCRED`, `SO_PASSCRED`; kernel `unix_stream_read_generic` (what two senders wrote is never read
//! in one piece).

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyfork::cluster::upgrade::{Name as Carried, Packing, ResumeError, StateError, Unpacking};
use polyfork::cluster::{Cluster, Event, ReloadError, ReloadOptions, ReloadReport};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::book::{Book, Progress};
use super::folder::StateFile;
use super::protocol::{self, LONGEST_REQUEST, Refusal, Request, Scale, Verb};
use crate::background::Starter;
use crate::config::live::Live;
use crate::ledger::{Ledger, Verdict};
use crate::logs::writer::Losses;
use crate::metrics::{self, Meter, text};
use crate::report::json;
use crate::values::MOST_WORKERS;

/// Between two writings of the state.
const STATE_PAUSE: Duration = Duration::from_millis(20);
/// Clients at a time.
const MOST_CLIENTS: usize = 64;
/// For a client to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// For a client to take an answer, or a line of a stream.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Between two looks at whether clients rest.
const REST_STEP: Duration = Duration::from_millis(1);
/// After an error of `accept`: as a rule too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// At the end, for answers that are on their way.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// Events kept for a client that is behind.
const STREAM_BUFFER: usize = 256;

/// The control plane of a running primary.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

struct Shared {
    /// None for an app that no command can reach.
    socket: Option<UnixListener>,
    accepting: Mutex<Option<AbortHandle>>,
    /// Whether clients are to rest: 0 none, 1 those that ask nothing, 2 those that listen as well.
    rest: watch::Sender<u8>,
    rested: Mutex<Vec<Rested>>,
    /// Where wishes for another binary go.
    wishes: mpsc::Sender<Wish>,
    cluster: Cluster,
    book: Mutex<Book>,
    meter: Meter,
    /// Counts what happened; whoever waits for the book to change waits here.
    changed: watch::Sender<u64>,
    /// None for an app that no command can reach.
    state: Option<StateFile>,
    /// The state on file is not the present one.
    state_is_old: AtomicBool,
    /// There as long as somebody listens.
    stream: Mutex<Option<broadcast::Sender<Arc<str>>>>,
    clients: Mutex<VecDeque<Client>>,
    /// Counts connections that were sent away: strangers, garbage, too slow.
    refused: AtomicU64,
    next_client: AtomicU64,
}

struct Client {
    id: u64,
    phase: Arc<AtomicU8>,
    task: AbortHandle,
}

/// A wish for another binary in the place of this one.
pub(crate) struct Wish {
    /// The file.
    pub(crate) binary: PathBuf,
    /// How long it may take to show that it can.
    pub(crate) limit: Option<Duration>,
    /// Who waits for the answer, if somebody does.
    pub(crate) asker: Option<Rested>,
}

/// A client between two steps.
#[derive(Debug)]
pub(crate) struct Rested {
    stream: UnixStream,
    /// Read and not asked for yet.
    buffer: Vec<u8>,
    listens: bool,
}

/// A client, as it is carried to the next image of this process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClientState {
    stream: Carried,
    buffer: Vec<u8>,
    listens: bool,
}

impl Rested {
    fn pack(&self, packing: &mut Packing) -> io::Result<ClientState> {
        let Rested { stream, buffer, listens } = self;
        let stream = packing.name(stream.as_fd())?;
        Ok(ClientState { stream, buffer: buffer.clone(), listens: *listens })
    }

    fn unpack(state: ClientState, unpacking: &mut Unpacking) -> Result<Rested, ResumeError> {
        let ClientState { stream, buffer, listens } = state;
        let stream = std::os::unix::net::UnixStream::from(unpacking.take(stream)?);
        Ok(Rested { stream: UnixStream::from_std(stream)?, buffer, listens })
    }
}

/// The control plane, as it is carried to the next image of this process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ControlState {
    /// None for an app that no command can reach.
    socket: Option<Carried>,
    book: Vec<u8>,
    refused: u64,
    meter: Vec<u8>,
    clients: Vec<ClientState>,
    asker: Option<ClientState>,
}

/// Of a request, read at once.
const PIECE: usize = 512;
/// The most descriptors that the kernel passes with one message (`SCM_MAX_FD`).
const MOST_RIGHTS: usize = 253;

/// Still sending its request.
const SENDING: u8 = 0;
/// Its request is worked on, or it is being answered.
const SERVED: u8 = 1;
/// It is told what happens.
const LISTENING: u8 = 2;

/// What a client gets.
enum Answer {
    Line(Vec<u8>),
    Stream(broadcast::Receiver<Arc<str>>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// Starts to answer. Must be called inside the primary's runtime. Also gives the wishes that somebody else is to fulfil.
    ///
    /// # Errors
    /// When the system cannot wait for the socket.
    pub(crate) fn start(
        socket: StdListener,
        state: StateFile,
        cluster: &Cluster,
        book: Book,
        meter: Meter,
    ) -> io::Result<(Control, mpsc::Receiver<Wish>)> {
        // Connections have it from the socket they come by, so from their first byte on.
        rustix::net::sockopt::set_socket_passcred(&socket, true)?;
        let socket = UnixListener::from_std(socket)?;
        let (control, wished) = Control::new(Some((socket, state)), cluster, book, meter);
        control.write_state();
        control.accept();
        tokio::spawn(keep_state(control.clone()));
        Ok((control, wished))
    }

    /// For an app that no command can reach, and that is measured all the same.
    pub(crate) fn quiet(
        cluster: &Cluster,
        book: Book,
        meter: Meter,
    ) -> (Control, mpsc::Receiver<Wish>) {
        Control::new(None, cluster, book, meter)
    }

    fn new(
        reached: Option<(UnixListener, StateFile)>,
        cluster: &Cluster,
        book: Book,
        meter: Meter,
    ) -> (Control, mpsc::Receiver<Wish>) {
        // One at a time: the book says that somebody is busy.
        let (wishes, wished) = mpsc::channel(1);
        let (socket, state) = reached.unzip();
        let control = Control(Arc::new(Shared {
            socket,
            accepting: Mutex::default(),
            rest: watch::Sender::new(0),
            rested: Mutex::default(),
            wishes,
            cluster: cluster.clone(),
            book: Mutex::new(book),
            meter,
            changed: watch::Sender::new(0),
            state,
            state_is_old: AtomicBool::new(true),
            stream: Mutex::new(None),
            clients: Mutex::default(),
            refused: AtomicU64::new(0),
            next_client: AtomicU64::new(0),
        }));
        (control, wished)
    }

    fn accept(&self) {
        if self.0.socket.is_none() {
            return;
        }
        let accepting = tokio::spawn(accept(self.clone())).abort_handle();
        *lock(&self.0.accepting) = Some(accepting);
    }

    /// Takes no new client, and lets those rest that ask nothing. Who is being answered is waited for.
    ///
    /// # Errors
    /// When that is not done within the time.
    pub(crate) async fn rest(&self, limit: Duration) -> Result<(), &'static str> {
        if let Some(accepting) = lock(&self.0.accepting).take() {
            accepting.abort();
        }
        self.0.rest.send_replace(1);
        let listens = |client: &Client| client.phase.load(Ordering::Relaxed) == LISTENING;
        let rest = async {
            while !lock(&self.0.clients).iter().all(listens) {
                tokio::time::sleep(REST_STEP).await;
            }
        };
        timeout(limit, rest).await.map_err(|_| "somebody waits for what he asked of it")
    }

    /// Lets those rest that are told what happens, once they know it.
    ///
    /// # Errors
    /// When they do not take it within the time.
    pub(crate) async fn rest_all(&self, limit: Duration) -> Result<(), &'static str> {
        self.0.rest.send_replace(2);
        let rest = async {
            while !lock(&self.0.clients).is_empty() {
                tokio::time::sleep(REST_STEP).await;
            }
        };
        timeout(limit, rest).await.map_err(|_| "who listens to events does not read them")
    }

    /// Everybody is served as before.
    pub(crate) fn go_on(&self) {
        if self.0.rest.send_replace(0) == 0 {
            return;
        }
        for client in std::mem::take(&mut *lock(&self.0.rested)) {
            admit(self, client);
        }
        self.accept();
    }

    /// Writes down what is known and who is there, all at rest.
    ///
    /// # Errors
    /// The system's, or what cannot be written.
    pub(crate) fn pack(
        &self,
        asker: Option<&Rested>,
        packing: &mut Packing,
    ) -> io::Result<ControlState> {
        let clients = lock(&self.0.rested);
        let clients = clients.iter().map(|client| client.pack(packing));
        let clients = clients.collect::<io::Result<_>>()?;
        let asker = asker.map(|asker| asker.pack(packing)).transpose()?;
        let book = postcard::to_stdvec(&*self.book()).map_err(io::Error::other)?;
        let meter = self.0.meter.pack()?;
        let socket = self.0.socket.as_ref().map(|socket| packing.name(socket.as_fd()));
        let (socket, refused) = (socket.transpose()?, self.refused());
        Ok(ControlState { socket, book, refused, meter, clients, asker })
    }

    /// The book in what was written down.
    ///
    /// # Errors
    /// When it makes no sense.
    pub(crate) fn book_of(state: &ControlState) -> Result<Book, ResumeError> {
        postcard::from_bytes(&state.book)
            .map_err(|error| StateError::Inside(format!("the book of the app: {error}")).into())
    }

    /// What is remembered of measurements, in what was written down.
    ///
    /// # Errors
    /// When it makes no sense.
    pub(crate) fn meter_of(state: &ControlState) -> Result<Meter, ResumeError> {
        Meter::unpack(&state.meter)
            .map_err(|error| StateError::Inside(format!("what was measured: {error}")).into())
    }

    /// Answers on, for the image before this one. Also gives who asked for this, if somebody did.
    ///
    /// # Errors
    /// When a descriptor is missing, or the system cannot wait for one.
    pub(crate) fn unpack(
        state: ControlState,
        unpacking: &mut Unpacking,
        file: Option<StateFile>,
        cluster: &Cluster,
        (losses, live): (Option<Arc<Losses>>, Option<Live>),
    ) -> Result<(Control, mpsc::Receiver<Wish>, Option<Rested>), ResumeError> {
        let book = Control::book_of(&state)?.with(losses, live);
        let meter = Control::meter_of(&state)?;
        let ControlState { socket, book: _, refused, meter: _, clients, asker } = state;
        let socket = socket.map(|socket| unpacking.take(socket)).transpose()?;
        let clients = clients.into_iter().map(|client| Rested::unpack(client, unpacking));
        let clients: Vec<Rested> = clients.collect::<Result<_, _>>()?;
        let asker = asker.map(|asker| Rested::unpack(asker, unpacking)).transpose()?;
        let (control, wished) = match socket.zip(file) {
            Some((socket, file)) => {
                Control::start(StdListener::from(socket), file, cluster, book, meter)?
            }
            None => Control::quiet(cluster, book, meter),
        };
        control.0.refused.store(refused, Ordering::Relaxed);
        for client in clients {
            admit(&control, client);
        }
        Ok((control, wished, asker))
    }

    /// Tells who asked for another binary what became of it, and serves him on.
    pub(crate) fn answer(&self, asker: Rested, line: Vec<u8>) {
        let control = self.clone();
        tokio::spawn(async move {
            let mut asker = asker;
            // Who does not take it has been warned.
            if matches!(timeout(ANSWER_TIME, asker.stream.write_all(&line)).await, Ok(Ok(()))) {
                admit(&control, asker);
            }
        });
    }

    /// Notes that another binary is to take over, unless something is under way.
    ///
    /// # Errors
    /// What is under way.
    pub(crate) fn begin_upgrade(&self) -> Result<(), Refusal> {
        self.refuse_when_stopping()?;
        self.begin("upgrade")
    }

    /// Notes that it is over.
    pub(crate) fn end_upgrade(&self) {
        self.note(|book| book.busy = None);
    }

    /// What is remembered of measurements.
    pub(crate) fn meter(&self) -> &Meter {
        &self.0.meter
    }

    /// The cluster.
    pub(crate) fn cluster(&self) -> &Cluster {
        &self.0.cluster
    }

    /// How many connections were sent away: strangers, garbage, too slow.
    pub(crate) fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Notes an event, and passes it on to whoever listens.
    pub(crate) fn event(&self, event: &Event, ledger: &Ledger) {
        self.note(|book| {
            book.event(event);
            if let Event::ReloadFailed { error, .. } = event {
                book.failed_reload = Some(match error {
                    ReloadError::Failed { who, .. } => {
                        ledger.last_lines(who.slot).map(str::to_owned).collect()
                    }
                    _ => Vec::new(),
                });
            }
        });
        if matches!(event, Event::AllReady { .. }) {
            // Who reads that it is ready sees it ready in a list.
            self.write_state();
        }
        let mut stream = lock(&self.0.stream);
        if stream.as_ref().is_some_and(|stream| stream.receiver_count() == 0) {
            *stream = None;
        }
        if let Some(stream) = stream.as_ref()
            && let Some(line) = json::Json.event(event, ledger)
        {
            // The last listener may leave this very moment.
            let _ = stream.send(line.into());
        }
    }

    /// Lets whoever started the app in the background know of an event.
    pub(crate) fn tell(&self, starter: &mut Starter, event: &Event, ledger: &Ledger) {
        if !starter.waits() {
            return;
        }
        if self.book().settled().is_some() {
            // Who is told that it is ready sees it ready.
            self.write_state();
        }
        starter.event(event, ledger, &self.book());
    }

    /// Writes down what a list shows, if that has changed.
    fn write_state(&self) {
        if let Some(state) = &self.0.state
            && self.0.state_is_old.swap(false, Ordering::Relaxed)
        {
            state.write(&self.book().state_line());
        }
    }

    /// Tells the end, and waits for answers that are on their way.
    pub(crate) async fn finish(&self, verdict: &Verdict, last: &str) {
        if let Some(stream) = lock(&self.0.stream).take() {
            // Nobody has to listen.
            let _ = stream.send(last.into());
        }
        self.note(|book| book.ends(verdict.clone()));
        let nobody_waits = async {
            // Who listens to events is owed the last of them.
            let is_owed = |client: &Client| client.phase.load(Ordering::Relaxed) != SENDING;
            while lock(&self.0.clients).iter().any(is_owed) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        // A client that does not read its answer has been warned.
        let _ = timeout(LAST_ANSWERS, nobody_waits).await;
    }

    fn note(&self, change: impl FnOnce(&mut Book)) {
        change(&mut lock(&self.0.book));
        self.0.state_is_old.store(true, Ordering::Relaxed);
        self.0.changed.send_modify(|count| *count += 1);
    }

    /// What is known of the app. Not to be held for long.
    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.0.book)
    }

    /// Waits until the book says something.
    async fn until<T>(&self, mut look: impl FnMut(&Book) -> Option<T>) -> T {
        let mut changed = self.0.changed.subscribe();
        loop {
            if let Some(found) = look(&self.book()) {
                return found;
            }
            if changed.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// Writes down what a list shows, as often as that changes and not oftener than can be of use.
async fn keep_state(control: Control) {
    let mut changed = control.0.changed.subscribe();
    while changed.changed().await.is_ok() {
        control.write_state();
        tokio::time::sleep(STATE_PAUSE).await;
    }
}

/// Takes clients in, for ever.
async fn accept(control: Control) {
    let Some(socket) = &control.0.socket else { return };
    loop {
        match socket.accept().await {
            Ok((stream, _)) if is_permitted(&stream) => {
                admit(&control, Rested { stream, buffer: Vec::new(), listens: false });
            }
            Ok(_) => count_refused(&control),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// The same user, or root.
fn is_permitted(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| is_friend(peer.uid()))
}

fn is_friend(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

fn count_refused(control: &Control) {
    control.0.refused.fetch_add(1, Ordering::Relaxed);
}

/// Gives a client a place, if need be that of one that is still sending.
fn admit(control: &Control, client: Rested) {
    let mut clients = lock(&control.0.clients);
    if clients.len() >= MOST_CLIENTS {
        let sending = |client: &Client| client.phase.load(Ordering::Relaxed) == SENDING;
        let Some(oldest) = clients.iter().position(sending) else {
            drop(clients);
            return count_refused(control);
        };
        if let Some(client) = clients.remove(oldest) {
            client.task.abort();
            count_refused(control);
        }
    }
    let id = control.0.next_client.fetch_add(1, Ordering::Relaxed);
    let phase = Arc::new(AtomicU8::new(if client.listens { LISTENING } else { SENDING }));
    let served = serve(control.clone(), client, Arc::clone(&phase));
    let theirs = control.clone();
    let task = tokio::spawn(async move {
        served.await;
        let mut clients = lock(&theirs.0.clients);
        clients.retain(|client| client.id != id);
        if clients.is_empty() {
            // An answer takes code that nothing else does.
            polyfork::process::give_back_code();
        }
    });
    clients.push_back(Client { id, phase, task: task.abort_handle() });
}

/// One client, from its first byte to its last, or until it is to rest.
async fn serve(control: Control, client: Rested, phase: Arc<AtomicU8>) {
    let Rested { stream, buffer, listens } = client;
    let (reader, mut writer) = stream.into_split();
    let mut requests = Requests { reader, buffer, stranger: false };
    let mut rest = control.0.rest.subscribe();
    if listens {
        phase.store(LISTENING, Ordering::Relaxed);
        if let Ok(lines) = control.listen() {
            stream_to(&control, writer, requests, lines).await;
        }
        return;
    }
    loop {
        phase.store(SENDING, Ordering::Relaxed);
        let line = tokio::select! {
            biased;
            _ = rest.wait_for(|level| *level > 0) => return park(&control, requests, writer, false),
            line = timeout(REQUEST_TIME, requests.next()) => line,
        };
        let line = match line {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => return,
            Ok(Err(refusal)) => {
                count_refused(&control);
                answer(&mut writer, &protocol::not_done(&refusal)).await;
                return;
            }
            Err(_too_slow) => return count_refused(&control),
        };
        phase.store(SERVED, Ordering::Relaxed);
        let read = protocol::read(&line);
        drop(line);
        let reply = match read {
            Ok(Request { verb: Verb::Upgrade { binary, limit }, wait, .. }) => {
                match wish(&control, binary, limit, wait, requests, writer).await {
                    Some(kept) => {
                        (requests, writer) = kept;
                        continue;
                    }
                    None => return,
                }
            }
            Ok(request) => tokio::select! {
                reply = work(&control, request) => reply,
                // Nobody is left to be answered. What was begun goes on.
                () = requests.gone(&writer) => return,
            },
            Err(refusal) => {
                count_refused(&control);
                answer(&mut writer, &protocol::not_done(&refusal)).await;
                // Whoever sent it is lost, or no friend.
                if refusal.word == "bad_request" {
                    return;
                }
                continue;
            }
        };
        match reply {
            Answer::Line(line) => {
                if !answer(&mut writer, &line).await {
                    return;
                }
            }
            Answer::Stream(lines) => {
                phase.store(LISTENING, Ordering::Relaxed);
                if answer(&mut writer, &protocol::done(&Accepted { accepted: true })).await {
                    stream_to(&control, writer, requests, lines).await;
                }
                return;
            }
        }
    }
}

/// Keeps a client for whoever goes on with it.
fn park(control: &Control, requests: Requests, writer: OwnedWriteHalf, listens: bool) {
    let Requests { reader, buffer, stranger } = requests;
    if stranger {
        return count_refused(control);
    }
    // Both are halves of one.
    if let Ok(stream) = reader.reunite(writer) {
        lock(&control.0.rested).push(Rested { stream, buffer, listens });
    }
}

/// Passes a wish for another binary on, with the client, who is answered when it is fulfilled or not. Gives the client back
/// when it does not wait for that.
async fn wish(
    control: &Control,
    binary: PathBuf,
    limit: Option<Duration>,
    wait: bool,
    requests: Requests,
    mut writer: OwnedWriteHalf,
) -> Option<(Requests, OwnedWriteHalf)> {
    let begun = control.begin_upgrade();
    if let Err(refusal) = begun {
        let told = answer(&mut writer, &protocol::not_done(&refusal)).await;
        return told.then_some((requests, writer));
    }
    let (asker, kept) = match wait {
        false => {
            answer(&mut writer, &protocol::done(&Accepted { accepted: true })).await;
            (None, Some((requests, writer)))
        }
        true => {
            let Requests { reader, buffer, stranger: _ } = requests;
            let stream = reader.reunite(writer).ok();
            (stream.map(|stream| Rested { stream, buffer, listens: false }), None)
        }
    };
    if control.0.wishes.send(Wish { binary, limit, asker }).await.is_err() {
        control.end_upgrade();
    }
    kept
}

/// Writes a line; false when the client does not take it.
async fn answer(writer: &mut OwnedWriteHalf, line: &[u8]) -> bool {
    matches!(timeout(ANSWER_TIME, writer.write_all(line)).await, Ok(Ok(())))
}

/// Passes events on until the app ends, the client has enough, or all are to rest.
async fn stream_to(
    control: &Control,
    mut writer: OwnedWriteHalf,
    mut requests: Requests,
    mut lines: broadcast::Receiver<Arc<str>>,
) {
    let mut rest = control.0.rest.subscribe();
    loop {
        let line = tokio::select! {
            biased;
            line = lines.recv() => line,
            _ = rest.wait_for(|level| *level > 1) => return park(control, requests, writer, true),
            () = requests.gone(&writer) => return,
        };
        let written = match line {
            Ok(line) => answer(&mut writer, line.as_bytes()).await,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                answer(&mut writer, json::lagged(missed).as_bytes()).await
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if !written {
            return;
        }
    }
}

/// Requests as they come in.
struct Requests {
    reader: OwnedReadHalf,
    /// Read and not asked for yet; never more than one request and a piece.
    buffer: Vec<u8>,
    /// A piece came from somebody who may not ask. Nothing is read any more.
    stranger: bool,
}

impl Requests {
    /// The next request; `None` at the end.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Refusal> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.buffer[looked..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(looked + end + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            looked = self.buffer.len();
            if looked >= LONGEST_REQUEST {
                let text = format!("a request is longer than {LONGEST_REQUEST} bytes");
                return Err(Refusal::bad(text));
            }
            if !self.read().await {
                if self.stranger {
                    return Err(Refusal::stranger());
                }
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(Refusal::bad("a request ends with a newline")),
                };
            }
        }
    }

    /// Returns when the client has left. One that only says that it will not ask again has not. What it sends
    /// meanwhile waits, in the kernel at the latest.
    async fn gone(&mut self, writer: &OwnedWriteHalf) {
        while self.buffer.len() < LONGEST_REQUEST {
            if !self.read().await {
                let closed = writer.ready(Interest::WRITABLE).await;
                if closed.is_ok_and(|ready| !ready.is_write_closed()) {
                    break;
                }
                return;
            }
        }
        std::future::pending().await
    }

    /// False at the end. Cancel safe: nothing is lost between two calls.
    async fn read(&mut self) -> bool {
        if self.stranger {
            return false;
        }
        let stream: &UnixStream = self.reader.as_ref();
        let mut piece = [0; PIECE];
        let read = stream.async_io(Interest::READABLE, || receive(stream, &mut piece)).await;
        match read {
            Ok(Some(read)) => self.buffer.extend_from_slice(&piece[..read]),
            Ok(None) => self.stranger = true,
            Err(_reset) => return false,
        }
        matches!(read, Ok(Some(read)) if read > 0)
    }
}

/// One piece of a request: its length, 0 at the end; `None` when its sender may not ask. Descriptors that come along are
/// closed.
fn receive(stream: &UnixStream, piece: &mut [u8]) -> io::Result<Option<usize>> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(MOST_RIGHTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = recvmsg(stream, &mut [io::IoSliceMut::new(piece)], &mut control, flags)?;
    let mut sender = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmCredentials(credentials) = message {
            sender = Some(credentials.uid.as_raw());
        }
    }
    // The end has no sender.
    let permitted = got.bytes == 0 || sender.is_some_and(is_friend);
    Ok(permitted.then_some(got.bytes))
}

#[derive(Serialize)]
struct Accepted {
    accepted: bool,
}

#[derive(Serialize)]
struct Scaled {
    workers: u32,
    ready: bool,
}

#[derive(Serialize)]
struct Reloaded {
    generation: u32,
    workers: u32,
    refused: u64,
    reset: u64,
    slowest_wait_ms: u128,
    took_ms: u128,
    text: String,
}

impl Reloaded {
    fn of(report: &ReloadReport) -> Reloaded {
        Reloaded {
            generation: report.generation,
            workers: report.workers,
            refused: report.refused,
            reset: report.reset,
            slowest_wait_ms: report.slowest_wait.as_millis(),
            took_ms: report.took.as_millis(),
            text: crate::words::reloaded(report),
        }
    }
}

#[derive(Serialize)]
struct Restarted {
    slots: usize,
    workers: Vec<u64>,
}

#[derive(Serialize)]
struct Over<'a> {
    outcome: &'a str,
    exit_code: u8,
    text: &'a str,
}

/// Does what is asked, within the time that the asker gives.
async fn work(control: &Control, request: Request) -> Answer {
    let limit = request.deadline;
    let working = answer_to(control, request);
    let reply = match limit {
        None => working.await,
        Some(limit) => timeout(limit, working).await.unwrap_or_else(|_| {
            let text = "not done within the time given; it goes on".to_owned();
            Err(Refusal { word: "deadline", code: crate::exit::Code::NotAnswering, text })
        }),
    };
    // Who is told that something is done sees it done, also in a list.
    control.write_state();
    reply.unwrap_or_else(|refusal| Answer::Line(protocol::not_done(&refusal)))
}

async fn answer_to(control: &Control, request: Request) -> Result<Answer, Refusal> {
    let wait = request.wait;
    match request.verb {
        Verb::Status => {
            let living = control.0.cluster.status().await;
            Ok(Answer::Line(protocol::done(&control.book().status(&living))))
        }
        Verb::Brief => Ok(Answer::Line(protocol::done(&control.book().brief()))),
        Verb::Metrics { json } => {
            let exposition = metrics::gather(control).await;
            Ok(Answer::Line(match json {
                true => protocol::done(&exposition.json()),
                false => protocol::done(&exposition.text(text::Format::Text)),
            }))
        }
        Verb::RestartSlot { slot } => control.restart_slot(slot, wait).await.map(Answer::Line),
        Verb::Config => Ok(Answer::Line(protocol::done(&control.book().configuration()))),
        Verb::Events => control.listen().map(Answer::Stream),
        Verb::Scale(scale) => control.scale(scale, wait).await.map(Answer::Line),
        Verb::Restart => control.restart(wait).await.map(Answer::Line),
        Verb::Reload { at_a_time, probation } => {
            let options = ReloadOptions::new().at_a_time(at_a_time);
            let options = probation.into_iter().fold(options, ReloadOptions::probation);
            control.reload(options, wait).await.map(Answer::Line)
        }
        Verb::Stop { grace } => Ok(Answer::Line(control.stop(grace, wait).await)),
        Verb::Kill => Ok(Answer::Line(control.kill(wait).await)),
        // Taken out by whoever has the connection.
        Verb::Upgrade { .. } => Err(Refusal::refused("it cannot be asked for here")),
    }
}

impl Control {
    fn listen(&self) -> Result<broadcast::Receiver<Arc<str>>, Refusal> {
        if let Some(verdict) = self.book().ended() {
            return Err(Refusal::ended(verdict));
        }
        let mut stream = lock(&self.0.stream);
        let sender = stream.get_or_insert_with(|| broadcast::channel(STREAM_BUFFER).0);
        Ok(sender.subscribe())
    }

    fn refuse_when_stopping(&self) -> Result<(), Refusal> {
        let book = self.book();
        match (book.ended(), book.is_stopping()) {
            (Some(verdict), _) => Err(Refusal::ended(verdict)),
            (None, true) => Err(Refusal::refused("it is stopping")),
            (None, false) => Ok(()),
        }
    }

    async fn scale(&self, scale: Scale, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        let (before, now) = {
            let mut book = self.book();
            let now = book.wanted();
            let to = match scale {
                Scale::To(to) => i64::from(to),
                Scale::By(by) => i64::from(now) + i64::from(by),
            };
            let to = u32::try_from(to).ok().filter(|to| (1..=MOST_WORKERS).contains(to));
            let Some(to) = to else {
                return Err(Refusal::refused(format!(
                    "it has {now} workers; there can be 1 to {MOST_WORKERS}"
                )));
            };
            book.wants(to);
            (book.slots(), to)
        };
        self.0.cluster.scale(now).await;
        if !wait {
            return Ok(protocol::done(&Scaled { workers: now, ready: false }));
        }
        self.until(|book| {
            if let Some(verdict) = book.ended() {
                return Some(Err(Refusal::ended(verdict)));
            }
            let slots = book.slots();
            let fresh = slots.iter().filter(|slot| !before.contains(slot));
            for slot in fresh {
                match book.progress(*slot, None) {
                    Progress::Coming => return None,
                    Progress::Failed(why) => return Some(Err(Refusal::refused(why))),
                    Progress::Ready(_) | Progress::Gone => {}
                }
            }
            let settled = book.wanted() != now || book.slot_count() == now;
            settled.then(|| Ok(protocol::done(&Scaled { workers: now, ready: true })))
        })
        .await
    }

    async fn reload(&self, options: ReloadOptions, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        self.begin("reload")?;
        self.note(|book| book.failed_reload = None);
        let control = self.clone();
        let reloading = tokio::spawn(async move {
            let outcome = control.0.cluster.reload(options).await;
            control.note(|book| book.busy = None);
            outcome
        });
        if !wait {
            return Ok(protocol::done(&Accepted { accepted: true }));
        }
        let outcome = reloading.await.map_err(|_| Refusal::refused("the reload broke off"))?;
        match outcome {
            Ok(report) => Ok(protocol::done(&Reloaded::of(&report))),
            Err(ReloadError::Busy { .. }) => Err(busy("reload")),
            Err(error) => Err(self.reload_failed(&error).await),
        }
    }

    /// Why a reload failed, with what the new worker wrote last.
    async fn reload_failed(&self, error: &ReloadError) -> Refusal {
        let told = self.until(|book| book.failed_reload.clone());
        let lines = timeout(LAST_ANSWERS, told).await.unwrap_or_default();
        let mut text = error.to_string();
        if !lines.is_empty() {
            text.push_str("; its last lines on standard error:");
        }
        for line in lines {
            text.push_str("\n    ");
            text.push_str(&line);
        }
        Refusal { word: "reload_failed", code: crate::exit::Code::ReloadFailed, text }
    }

    /// Notes that something long begins; one at a time.
    fn begin(&self, what: &'static str) -> Result<(), Refusal> {
        let mut book = self.book();
        match book.busy {
            Some(other) => Err(busy(other)),
            None => {
                book.busy = Some(what);
                Ok(())
            }
        }
    }

    /// Slot by slot. A new worker that ends before it is ready ends the whole: the slots after it keep what they have.
    async fn restart(&self, wait: bool) -> Result<Vec<u8>, Refusal> {
        let slots = self.book().slots();
        self.restart_these(slots, wait).await
    }

    async fn restart_slot(&self, slot: u32, wait: bool) -> Result<Vec<u8>, Refusal> {
        if !self.book().slots().contains(&slot) {
            return Err(Refusal::refused(format!("it has no slot {slot}")));
        }
        self.restart_these(vec![slot], wait).await
    }

    async fn restart_these(&self, slots: Vec<u32>, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        self.begin("restart")?;
        let control = self.clone();
        let rolling = tokio::spawn(async move {
            let outcome = control.roll(slots).await;
            control.note(|book| book.busy = None);
            outcome
        });
        if !wait {
            return Ok(protocol::done(&Accepted { accepted: true }));
        }
        let workers = rolling.await.map_err(|_| Refusal::refused("the restart broke off"))??;
        Ok(protocol::done(&Restarted { slots: workers.len(), workers }))
    }

    async fn roll(&self, slots: Vec<u32>) -> Result<Vec<u64>, Refusal> {
        let mut fresh = Vec::new();
        for slot in slots {
            let old = self.book().worker_of(slot);
            self.refuse_when_stopping()?;
            self.0.cluster.restart_slot(slot).await;
            let outcome = self
                .until(|book| match (book.ended(), book.progress(slot, old)) {
                    (Some(verdict), _) => Some(Err(Refusal::ended(verdict))),
                    (None, _) if book.is_stopping() => {
                        Some(Err(Refusal::refused("it is stopping")))
                    }
                    (None, Progress::Coming) => None,
                    (None, Progress::Gone) => Some(Ok(None)),
                    (None, Progress::Ready(worker)) => Some(Ok(Some(worker))),
                    (None, Progress::Failed(why)) => Some(Err(Refusal::refused(why))),
                })
                .await?;
            fresh.extend(outcome);
        }
        Ok(fresh)
    }

    async fn stop(&self, grace: Option<Duration>, wait: bool) -> Vec<u8> {
        self.note(Book::stops);
        // Whoever asks here wants an end; a service manager that starts it again asks by signal.
        self.0.cluster.forget_kept().await;
        match grace {
            Some(grace) => self.0.cluster.stop_within(grace).await,
            None => self.0.cluster.stop().await,
        }
        self.end(wait).await
    }

    async fn kill(&self, wait: bool) -> Vec<u8> {
        self.note(Book::stops);
        self.0.cluster.forget_kept().await;
        self.0.cluster.stop_now().await;
        self.end(wait).await
    }

    async fn end(&self, wait: bool) -> Vec<u8> {
        if !wait {
            return protocol::done(&Accepted { accepted: true });
        }
        let verdict = self.until(|book| book.ended().cloned()).await;
        let (outcome, exit_code) = (verdict.code.row().word, verdict.code as u8);
        protocol::done(&Over { outcome, exit_code, text: &verdict.text })
    }
}

fn busy(with: &str) -> Refusal {
    Refusal {
        word: "busy",
        code: crate::exit::Code::Refused,
        text: format!("{} is under way; wait for its end", crate::words::with_article(with)),
    }
}
