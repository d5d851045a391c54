//! Probes: a connection to one worker, now and then, to see whether it answers.
//!
//! Which worker a client reaches is not for the client to choose, so a probe is brought to its worker in one of two ways.
//! Where the kernel gives out connections in exact turns, its program is told the probe's source port and sends it to
//! the worker's own socket (`polyfork_sys::reuseport::Group::reach`): the way that clients come. Everywhere else the primary
//! makes a pair of connected sockets and hands one end over, as it hands connections over; a Node worker takes such a one on
//! any of its listeners. What can be probed in neither way is refused ([`check`], [`Primary::check_probe`]).
//!
//! The rule that surprises: a probe that was answered too late because this process stood still is no failure.
//!
//! Reference: RFC 9112 (what is sent, and the line that is read).

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork_core::{Input, ListenerId, Reason, WorkerId};
use polyfork_wire::native::ToWorker;
use polyfork_wire::node::cluster as wire;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::AbortHandle;

use super::StartError;
use super::detect::{Detected, Runtime};
use super::link::{Link, Passed};
use super::ports::Way;
use super::primary::{FromIo, Primary, Rested, Timer};
use super::settings::{Address, Dialect, Policy, Ready, Settings};
use super::to_loop::{Rest, ToLoop};

/// A worker that is not ready yet is probed this often, unless the interval is shorter.
const UNTIL_READY: Duration = Duration::from_millis(250);
/// As much of an answer as is looked at: `HTTP/1.1 200`.
const STATUS_BYTES: usize = 12;
/// As much of the rest is read.
const REST_BYTES: u64 = 64 * 1024;
/// So many handed-over probes of one worker are remembered.
const REMEMBERED: usize = 64;
/// Numbers of handed-over probes begin here, far above those of connections.
const FIRST_NUMBER: u64 = 1 << 63;

/// Whether this is the number of a probe that was handed to a native worker.
pub(crate) fn is_probe(seq: u64) -> bool {
    seq >= FIRST_NUMBER
}

/// What a worker is asked now and then ([`Settings::probe`]).
///
/// Reads from `tcp`, `tcp:PORT`, `/path` and `http://HOST[:PORT]/path`. The port chooses among the worker's addresses; without
/// one it is the first. The host is only what the worker reads in the `Host` field.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Probe {
    question: Question,
    port: Option<u16>,
    pub(crate) interval: Duration,
    timeout: Duration,
    failures: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Question {
    Tcp,
    Http { host: String, path: String },
}

/// Why a text is not a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a probe: {reason}; use tcp, /path or http://HOST:PORT/path")]
pub struct ProbeError {
    text: String,
    reason: &'static str,
}

impl FromStr for Probe {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Probe, ProbeError> {
        let wrong = |reason| ProbeError { text: text.to_owned(), reason };
        let bad_port = || wrong("the port is not a number from 1 to 65535");
        let port = |text: &str| text.parse().ok().filter(|port| *port > 0).ok_or_else(bad_port);
        let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        let (question, port) = if text == "tcp" {
            (Question::Tcp, None)
        } else if let Some(number) = text.strip_prefix("tcp:") {
            (Question::Tcp, Some(port(number)?))
        } else if text.starts_with('/') {
            (Question::Http { host: "localhost".into(), path: text.into() }, None)
        } else if text.starts_with("https://") {
            return Err(wrong("probes do not encrypt (`tcp` sees whether connections are taken)"));
        } else {
            let rest = text.strip_prefix("http://").ok_or_else(|| wrong("it has no such form"))?;
            let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
            let after = host.rfind(']').map_or(0, |at| at + 1);
            let number = match host[after..].rsplit_once(':') {
                Some((_, number)) => Some(port(number)?),
                None => None,
            };
            if host.is_empty() {
                return Err(wrong("it names no host"));
            }
            (Question::Http { host: host.into(), path: path.into() }, number)
        };
        if !plain(text) {
            return Err(wrong("it has blanks or characters that an address cannot have"));
        }
        let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(2));
        Ok(Probe { question, port, interval, timeout, failures: 3 })
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.question, self.port) {
            (Question::Tcp, None) => f.write_str("tcp"),
            (Question::Tcp, Some(port)) => write!(f, "tcp:{port}"),
            (Question::Http { host, path }, _) => write!(f, "http://{host}{path}"),
        }
    }
}

impl Probe {
    /// How long from one to the next. Default 10 s.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long a worker may take to answer. Default 2 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// After how many failures in a row a worker is replaced, at least 1. Default 3.
    #[must_use]
    pub fn failures(mut self, failures: u32) -> Self {
        self.failures = failures.max(1);
        self
    }

    fn request(&self) -> Option<String> {
        let Question::Http { host, path } = &self.question else { return None };
        Some(format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: polyfork-probe\r\nAccept: */*\r\n\
             Connection: close\r\n\r\n"
        ))
    }
}

/// What became of a probe. `Err` tells people why.
pub(crate) type Answer = Result<(), String>;

/// A worker that is probed.
pub(crate) struct Probing {
    probe: Arc<Probe>,
    /// In a row.
    failures: u32,
    running: Option<Asking>,
    /// Tells the probes of one worker apart.
    number: u64,
}

/// A probe on its way.
struct Asking {
    number: u64,
    task: AbortHandle,
    begun: Instant,
    /// It is answered when the worker takes it, and nothing is asked.
    taken_is_enough: bool,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Probing {
    pub(crate) fn new(probe: &Probe) -> Probing {
        Probing { probe: Arc::new(probe.clone()), failures: 0, running: None, number: 0 }
    }
}

/// A worker that is probed, as it is carried to the next image of the primary. A probe that was on its way is made again.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct ProbingState {
    probe: Probe,
    failures: u32,
    number: u64,
}

impl Probing {
    pub(crate) fn state(&self) -> ProbingState {
        let Probing { probe, failures, running: _, number } = self;
        ProbingState { probe: Probe::clone(probe), failures: *failures, number: *number }
    }
}

impl ProbingState {
    pub(crate) fn back(self) -> Probing {
        let ProbingState { probe, failures, number } = self;
        Probing { probe: Arc::new(probe), failures, running: None, number }
    }
}

/// Refuses what could never be probed with workers of this kind.
pub(crate) fn check(settings: &Settings, detected: &Detected) -> Result<(), StartError> {
    let wrong = |text: String| Err(StartError::Settings(text));
    if settings.ready == Ready::Probe && settings.probe.is_none() {
        return wrong(
            "nothing says how a worker is probed: ready by probe needs a probe".to_owned(),
        );
    }
    if settings.probe.is_none() {
        return Ok(());
    }
    match detected.dialect {
        Dialect::Node if matches!(detected.runtime, Runtime::Bun { .. }) => wrong(
            "workers of Bun bind for themselves, so that a probe cannot be brought to one of them; probe them from outside"
                .to_owned(),
        ),
        Dialect::Sockets if settings.listen.is_empty() => wrong(
            "a probe needs an address that workers inherit (--listen): others bind for themselves".to_owned(),
        ),
        Dialect::Sockets | Dialect::Native if settings.policy == Policy::Shared => wrong(
            "workers that share one socket cannot be probed one by one; use the policy round-robin, or no probe"
                .to_owned(),
        ),
        _ => Ok(()),
    }
}

impl Primary {
    /// Refuses at the start what the sockets that were opened do not permit. Sockets dialect: they are there by now.
    pub(crate) fn check_probe(&self) -> Result<(), StartError> {
        let (Some(probe), Dialect::Sockets) = (&self.settings.probe, self.detected.dialect) else {
            return Ok(());
        };
        if self.ports.to_probe(None, probe.port, false).is_some_and(|(_, way)| way == Way::Aimed) {
            return Ok(());
        }
        let text = format!(
            "the probe {probe} cannot be brought to one worker: that needs a TCP address given out by the kernel in \
             exact turns (eBPF), for workers of the sockets dialect; leave the probe out"
        );
        Err(StartError::Settings(text))
    }

    /// The worker listens: it can be probed.
    pub(crate) fn begin_probing(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let Some(probing) = w.probing.as_mut().filter(|probing| probing.number == 0) else {
            return;
        };
        probing.number = 1;
        self.after(Duration::ZERO, Timer::Probe(worker));
    }

    /// Its time has come.
    pub(crate) fn probe(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker).filter(|w| !w.leaving && !w.silent) else {
            return;
        };
        let Some(probing) = w.probing.as_mut().filter(|probing| probing.running.is_none()) else {
            return;
        };
        probing.number += 1;
        let (number, probe) = (probing.number, Arc::clone(&probing.probe));
        let by_node = self.detected.dialect == Dialect::Node;
        let Some((port, way)) = self.ports.to_probe(Some(worker), probe.port, by_node) else {
            // It may listen there later.
            return self.probe_later(worker);
        };
        let end = match way {
            Way::Aimed => self.aim(worker, port),
            Way::Handed => self.hand(worker, port, number),
            Way::None => {
                let who = self.workers.get(&worker).map(|w| w.who);
                let text = format!(
                    "the probe {probe} cannot be brought to this worker (it needs exact turns or handing over); it \
                     counts as answered"
                );
                self.notice("probe", who, text);
                return self.probe_ready(worker);
            }
        };
        match end {
            Ok(end) => self.ask(worker, number, probe, end, way),
            Err(error) => self.answered(worker, Err(error.to_string())),
        }
    }

    fn ask(&mut self, worker: WorkerId, number: u64, probe: Arc<Probe>, end: End, way: Way) {
        let taken_is_enough = way == Way::Handed && probe.request().is_none();
        let (io, rest) = (self.io.clone(), self.io.rest());
        let task = tokio::spawn(exchange(worker, number, probe, end, taken_is_enough, io, rest));
        let begun = Instant::now();
        let asking = Asking { number, task: task.abort_handle(), begun, taken_is_enough };
        if let Some(probing) = self.workers.get_mut(&worker).and_then(|w| w.probing.as_mut()) {
            probing.running = Some(asking);
        }
    }

    fn aim(&self, worker: WorkerId, port: ListenerId) -> io::Result<End> {
        let socket = TcpStream::from(self.ports.reach(worker, port)?);
        Ok(End::Tcp(socket))
    }

    /// Hands one end of a pair over, outside all turns.
    fn hand(&mut self, worker: WorkerId, port: ListenerId, number: u64) -> io::Result<End> {
        let unix = matches!(self.ports.get(port).map(|port| &port.address), Some(Address::Unix(_)));
        let (ours, theirs) = if unix { unix_pair()? } else { tcp_pair()? };
        let (sequence, theirs) = (self.next_sequence(), Arc::new(theirs));
        let Some(w) = self.workers.get_mut(&worker) else { return Ok(ours) };
        match &mut w.running.link {
            Link::Node(link) => {
                w.probes.insert(sequence, number);
                // One that was pulled out of its channel unread is never answered.
                if w.probes.len() > REMEMBERED {
                    w.probes.pop_first();
                }
                let line = wire::new_connection(&super::node::key_text(port), sequence);
                link.say_with(line, |_| Passed::once(theirs, None));
            }
            Link::Native(link) => {
                let first_seq = FIRST_NUMBER + number;
                let frame = ToWorker::Connections { listener: port.0, first_seq, count: 1 };
                link.push(&frame, vec![Passed::once(theirs, Some((port, first_seq)))]);
            }
            Link::None => {}
        }
        self.flush(worker);
        Ok(ours)
    }

    /// A Node worker answered a connection: was it a probe?
    pub(crate) fn probe_was_taken(&mut self, worker: WorkerId, sequence: u64, took: bool) -> bool {
        let Some(w) = self.workers.get_mut(&worker) else { return false };
        let Some(number) = w.probes.remove(&sequence) else { return false };
        self.taken(worker, number, took);
        true
    }

    /// A native worker did.
    pub(crate) fn probe_was_taken_by_number(
        &mut self,
        worker: WorkerId,
        seq: u64,
        took: bool,
    ) -> bool {
        if !is_probe(seq) {
            return false;
        }
        self.taken(worker, seq - FIRST_NUMBER, took);
        true
    }

    fn taken(&mut self, worker: WorkerId, number: u64, took: bool) {
        let Some(probing) = self.workers.get(&worker).and_then(|w| w.probing.as_ref()) else {
            return;
        };
        let Some(asking) = probing.running.as_ref().filter(|asking| asking.number == number) else {
            return;
        };
        match (took, asking.taken_is_enough) {
            (true, true) => self.answered(worker, Ok(())),
            (true, false) => {}
            (false, _) => self.answered(worker, Err("it took no connection".to_owned())),
        }
    }

    /// The task of a probe came to rest: it is made again when the loop goes on.
    pub(crate) fn probe_rested(&mut self, worker: WorkerId, number: u64) {
        let Some(probing) = self.workers.get_mut(&worker).and_then(|w| w.probing.as_mut()) else {
            return;
        };
        if probing.running.take_if(|asking| asking.number == number).is_some() {
            self.after(Duration::ZERO, Timer::Probe(worker));
        }
    }

    /// The task of a probe has an answer, or gave up.
    pub(crate) fn probed(&mut self, worker: WorkerId, number: u64, answer: Answer) {
        let Some(probing) = self.workers.get(&worker).and_then(|w| w.probing.as_ref()) else {
            return;
        };
        if probing.running.as_ref().is_some_and(|asking| asking.number == number) {
            self.answered(worker, answer);
        }
    }

    fn answered(&mut self, worker: WorkerId, answer: Answer) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let (who, admitted) = (w.who, w.admitted);
        let Some(probing) = &mut w.probing else { return };
        let took = probing.running.take().map_or(Duration::ZERO, |asking| asking.begun.elapsed());
        let probe = Arc::clone(&probing.probe);
        let error = match answer {
            Ok(()) => {
                probing.failures = 0;
                return self.probe_ready(worker);
            }
            // We stood still, so it could not be heard.
            Err(_) if took > probe.timeout * 2 => return self.probe_later(worker),
            Err(error) => error,
        };
        // Before it is ready that is what it is probed for; its time for that is limited elsewhere.
        if admitted {
            probing.failures += 1;
            let (failures, most) = (probing.failures, probe.failures);
            let text = format!("probe {probe}: {error} ({failures} of {most} failures in a row)");
            self.notice("probe", Some(who), text);
            if failures >= most {
                return self.feed(Input::Replace { worker, reason: Reason::ProbeFailed });
            }
        }
        self.probe_later(worker);
    }

    fn probe_ready(&mut self, worker: WorkerId) {
        if self.workers.get(&worker).is_some_and(|w| w.ready_by == Ready::Probe) {
            self.became_ready(worker);
        }
        self.probe_later(worker);
    }

    fn probe_later(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get(&worker) else { return };
        let Some(probing) = &w.probing else { return };
        let interval = probing.probe.interval;
        let waits = w.ready_by == Ready::Probe && !w.ready;
        self.after(if waits { interval.min(UNTIL_READY) } else { interval }, Timer::Probe(worker));
    }
}

/// Our end of a probe.
enum End {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Asks, and tells what became of it.
async fn exchange(
    worker: WorkerId,
    number: u64,
    probe: Arc<Probe>,
    end: End,
    taken_is_enough: bool,
    io: ToLoop,
    mut rest: Rest,
) {
    let asked = async {
        match end {
            End::Tcp(end) => {
                end.set_nonblocking(true)?;
                ask(tokio::net::TcpStream::from_std(end)?, &probe, taken_is_enough).await
            }
            End::Unix(end) => {
                end.set_nonblocking(true)?;
                ask(tokio::net::UnixStream::from_std(end)?, &probe, taken_is_enough).await
            }
        }
    };
    let answered = tokio::select! {
        biased;
        () = rest.asked() => {
            // As below.
            let _ = io.send(FromIo::Rested { worker, what: Rested::Probe(number) }).await;
            return;
        }
        answered = tokio::time::timeout(probe.timeout, asked) => answered,
    };
    let answer = match answered {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} ms", probe.timeout.as_millis())),
    };
    // The loop is gone only when the whole primary ends.
    let _ = io.send(FromIo::Probed { worker, number, answer }).await;
}

async fn ask(
    mut end: impl AsyncRead + AsyncWrite + Unpin,
    probe: &Probe,
    taken_is_enough: bool,
) -> io::Result<Answer> {
    let Some(request) = probe.request() else {
        if taken_is_enough {
            // The primary hears of it by the channel, and ends this.
            std::future::pending::<()>().await;
        }
        return Ok(Ok(()));
    };
    end.write_all(request.as_bytes()).await?;
    let mut head = Vec::with_capacity(STATUS_BYTES);
    let mut status = (&mut end).take(STATUS_BYTES as u64);
    status.read_to_end(&mut head).await?;
    let answer = judge(&head);
    // Closed before the rest is read, the worker would see a reset. How it ends says nothing more.
    let _ = tokio::io::copy(&mut end.take(REST_BYTES), &mut tokio::io::sink()).await;
    Ok(answer)
}

/// 200 to 399 is an answer of somebody who is well.
fn judge(head: &[u8]) -> Answer {
    let status = std::str::from_utf8(head).ok().and_then(|head| {
        let (version, status) = head.split_once(' ')?;
        let digits = status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit());
        (version.starts_with("HTTP/1.") && digits).then(|| status.parse::<u16>().ok())?
    });
    match status {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("it answered {status}")),
        None if head.is_empty() => Err("it closed the connection without an answer".to_owned()),
        None => Err("it answered something that is not HTTP/1".to_owned()),
    }
}

fn tcp_pair() -> io::Result<(End, OwnedFd)> {
    let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let ours = TcpStream::connect(door.local_addr()?)?;
    let own = ours.local_addr()?;
    // Somebody else on this machine may have been faster.
    for _ in 0..16 {
        let (theirs, peer) = door.accept()?;
        if peer == own {
            theirs.set_nonblocking(true)?;
            return Ok((End::Tcp(ours), theirs.into()));
        }
    }
    Err(io::Error::other("strangers connect to the probe's own port"))
}

fn unix_pair() -> io::Result<(End, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    Ok((End::Unix(ours), theirs.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_read_in_every_form() {
        for text in ["tcp", "tcp:80", "http://a/b?c", "http://[::1]:80/", "http://127.0.0.1:3000/x"]
        {
            let probe: Probe = text.parse().expect(text);
            assert_eq!(probe.to_string(), text);
        }
        let short: Probe = "/health".parse().expect("short");
        assert_eq!((short.to_string().as_str(), short.port), ("http://localhost/health", None));
        let long: Probe = "http://h:81".parse().expect("long");
        assert_eq!((long.to_string().as_str(), long.port), ("http://h:81/", Some(81)));
        let request = long.request().expect("one");
        assert!(request.starts_with("GET / HTTP/1.1\r\nHost: h:81\r\n"), "{request}");
    }

    #[test]
    fn a_wrong_probe_says_what_is_wrong() {
        let texts = [
            "",
            "x",
            "tcp:0",
            "tcp:x",
            "http://",
            "http://a:99999/",
            "https://a/",
            "/a b",
            "/\r\nX:1",
        ];
        for text in texts {
            let error = text.parse::<Probe>().expect_err(text).to_string();
            assert!(error.contains("not a probe"), "{error}");
        }
    }

    #[test]
    fn only_two_and_three_hundreds_are_well() {
        for head in ["HTTP/1.1 200", "HTTP/1.0 302", "HTTP/1.1 399"] {
            assert_eq!(judge(head.as_bytes()), Ok(()), "{head}");
        }
        for head in ["", "HTTP/1.1 500", "HTTP/1.1 404", "HTTP/2 200", "HTTP/1.1 20x", "\u{1}\u{2}"]
        {
            assert!(judge(head.as_bytes()).is_err(), "{head}");
        }
    }

    #[test]
    fn a_pair_is_connected_to_itself() {
        use std::io::{Read, Write};
        let (End::Tcp(mut ours), theirs) = tcp_pair().expect("a pair") else { panic!("not TCP") };
        ours.write_all(b"x").expect("written");
        let mut theirs = TcpStream::from(theirs);
        theirs.set_nonblocking(false).expect("set");
        let mut byte = [0];
        theirs.read_exact(&mut byte).expect("read");
        assert_eq!(byte, *b"x");
    }
}
