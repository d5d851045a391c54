//! The primary's end of the control socket: who may ask, how much at once, and what becomes of a request.
//!
//! Nothing a client does can hurt the primary. There are 64 clients at most; each has one request of 64 KiB at most in
//! hand, five seconds to finish sending it and five to take its answer. When all places are taken, whoever is still
//! sending gives way, the oldest first: a thousand clients that send a byte a second keep nobody else out. Everything runs on
//! the primary's one thread, and nothing exists for a client that is not there.
//!
//! Who may ask: the same user, and root. `clients` come and go, `talk` is what is said to one of them, `requests` are what it
//! sends and who sent it, `work` is what it asks for, `carry` is how clients stay through an upgrade. Here is what all of them share: the book of the app, who
//! waits for it to change, and the state that a list shows.
//!
//! The surprising rule: the state for a list is written before an answer is given, and before it is told that all are ready.
//! Whoever hears of it and looks sees it.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyfork::cluster::{Cluster, Event, ReloadError};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::book::Book;
use super::folder::StateFile;
use crate::background::Starter;
use crate::ledger::{Ledger, Verdict};
use crate::metrics::Meter;
use crate::report::json;

pub(crate) mod carry;
mod clients;
mod requests;
mod talk;
mod work;

/// Between two writings of the state.
const STATE_PAUSE: Duration = Duration::from_millis(20);
/// For a client to take an answer, or a line of a stream.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// At the end, for answers that are on their way.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// The control plane of a running primary.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

struct Shared {
    /// None for an app that no command can reach.
    socket: Option<UnixListener>,
    accepting: Mutex<Option<AbortHandle>>,
    rest: watch::Sender<Rest>,
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

impl Client {
    fn is(&self, phase: u8) -> bool {
        self.phase.load(Ordering::Relaxed) == phase
    }
}

/// Which clients are to rest, so that this process can be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rest {
    Nobody,
    /// Those that send requests, between two of them.
    Askers,
    /// Those that are told what happens as well.
    Everybody,
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

/// Still sending its request.
const SENDING: u8 = 0;
/// Its request is worked on, or it is being answered.
const SERVED: u8 = 1;
/// It is told what happens.
const LISTENING: u8 = 2;

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
            rest: watch::Sender::new(Rest::Nobody),
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
        let accepting = tokio::spawn(clients::accept(self.clone())).abort_handle();
        *lock(&self.0.accepting) = Some(accepting);
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

    fn count_refused(&self) {
        self.0.refused.fetch_add(1, Ordering::Relaxed);
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
            while lock(&self.0.clients).iter().any(|client| !client.is(SENDING)) {
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
