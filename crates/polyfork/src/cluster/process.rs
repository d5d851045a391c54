//! Starts a worker process the way its dialect wants it, and watches it.
//!
//! Environment, descriptors, channel and output pipes are put together here; the system call is in
//! `polyfork_sys::spawn`. Whether and when a worker is started is not decided here.
//!
//! The rule that surprises: every worker is the leader of its own process group, so that Ctrl-C in a terminal
//! reaches the primary alone, which then drains.
//!
//! References: Node `lib/internal/cluster/primary.js` (`createWorkerProcess`); sd_listen_fds(3), sd_notify(3).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use polyfork_core::{SlotId, StopOn, WorkerId};
use polyfork_sys::spawn::{Command, SpawnError, try_wait};
use polyfork_sys::system::{LimitGroup, cpu_time, prefer_as_oom_victim};
use polyfork_wire::env::{self as names, NODE_OPTIONS};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::cgroup;
use super::detect::{Detected, Runtime};
use super::link::{Codec, Link};
use super::notify::NotifySocket;
use super::preload::{self, python};
use super::primary::{FromIo, Rested};
use super::register::register;
use super::settings::{Dialect, Output, OutputLine, Serialization, Settings};
use super::to_loop::{Rest, ToLoop};
use super::watchdog;
use crate::channel::socket::is_shortage;

pub(super) mod carry;

/// Descriptor number of the channel in the worker, as Node's `fork` has it.
pub(crate) const CHANNEL_FD: i32 = 3;
/// First inherited socket in a sockets worker (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: i32 = 3;
/// A line of output longer than this is passed on in pieces.
const LINE_LIMIT: usize = 64 * 1024;

/// Whose channel it is: like `LISTEN_PID`, so that a grandchild is not fooled by what it inherits.
pub(crate) const POLYFORK_CHANNEL_PID: &str = "POLYFORK_CHANNEL_PID";
/// What an ended worker can have left in one pipe and in the task that reads it.
const LAST_WORDS: usize = 64 * 1024 + LINE_LIMIT + READ_BYTES;
/// By how much the kernel prefers a worker to its primary when memory is short, in thousandths of all there is.
const OOM_PREFERENCE: i32 = 100;
/// Room made for each read from a worker's output.
const READ_BYTES: usize = 8 * 1024;

/// Standard output or error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Stdio {
    Out,
    Err,
}

/// What workers have in their environment beyond their identity.
pub(crate) struct Environment {
    set: Vec<(OsString, OsString)>,
    /// Names of ours that workers get; all if there is none.
    allowed: Option<Vec<OsString>>,
    preload: Option<Preload>,
    notices: Vec<String>,
}

/// Where the file is that a worker loads before the program.
enum Preload {
    /// And the grace period it is told.
    Node(PathBuf, Duration),
    /// The folder of it.
    Python(PathBuf),
}

/// Our parent's, and not for workers: sockets, the way to tell it that we are ready, how often it wants a sign of life, and
/// what the image of the primary before this one has left.
const NOT_INHERITED: [&str; 8] = [
    names::LISTEN_FDS,
    names::LISTEN_PID,
    names::LISTEN_FDNAMES,
    names::NOTIFY_SOCKET,
    names::POLYFORK_STATE,
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "FDSTORE",
];

impl Environment {
    pub(crate) fn new(settings: &Settings, detected: &Detected) -> Self {
        let mut notices = Vec::new();
        let preload = place_preload(settings, detected).unwrap_or_else(|error| {
            notices.push(format!(
                "cannot write the drain preload ({error}): workers that drain {}; set XDG_CACHE_HOME to a folder \
                 that can be written",
                match detected.runtime {
                    Runtime::Python => "will cut kept-alive clients off",
                    _ => "will wait for kept-alive clients",
                }
            ));
            None
        });
        Environment {
            set: settings.env.clone(),
            allowed: settings.env_allow.clone(),
            preload,
            notices,
        }
    }

    /// What one worker has, `extra` on top. Its own `NODE_OPTIONS`, wherever they come from, are added to and
    /// never replaced, so this can only be worked out for each worker. The same holds for `PYTHONPATH`.
    fn of_worker(
        &self,
        extra: &[(OsString, OsString)],
        for_preload: &[(&str, String)],
    ) -> Vec<(OsString, OsString)> {
        let mut set = [&self.set, extra].concat();
        let existing = |name| {
            let own = set.iter().rev().find(|(key, _)| key == name);
            own.map(|(_, value)| value.clone()).or_else(|| self.ours(OsStr::new(name)))
        };
        match &self.preload {
            None => {}
            Some(Preload::Node(path, grace)) => {
                let loads = preload::environment(existing(NODE_OPTIONS).as_deref(), path, *grace);
                if !loads.is_empty() {
                    set.extend(for_preload.iter().map(|(key, value)| (key.into(), value.into())));
                }
                set.extend(loads);
            }
            Some(Preload::Python(folder)) => {
                let existing = existing(python::PATH);
                set.extend(python::environment(existing.as_deref(), folder));
            }
        }
        set
    }

    /// Whether workers get a variable of ours.
    fn allows(&self, name: &OsStr) -> bool {
        let fits = |allowed: &OsString| match allowed.as_bytes().split_last() {
            Some((b'*', start)) => name.as_bytes().starts_with(start),
            _ => allowed == name,
        };
        self.allowed.as_ref().is_none_or(|allowed| allowed.iter().any(fits))
    }

    fn ours(&self, name: &OsStr) -> Option<OsString> {
        std::env::var_os(name).filter(|_| self.allows(name))
    }

    /// Takes out what workers are not to get.
    fn narrow(&self, command: &mut Command) {
        if self.allowed.is_some() {
            let ours = std::env::vars_os().filter(|(name, _)| !self.allows(name));
            for (name, _) in ours {
                command.env_remove(name);
            }
        }
    }

    /// What a person should know about it, once.
    pub(crate) fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }
}

/// Writes the file that workers of this kind load first, if there is one and it is wanted.
fn place_preload(settings: &Settings, detected: &Detected) -> io::Result<Option<Preload>> {
    match detected.runtime {
        _ if !settings.drain_preload => Ok(None),
        Runtime::Node { .. } if !may_not_read_files(settings, detected) => {
            preload::place().map(|path| Some(Preload::Node(path, settings.grace)))
        }
        Runtime::Python
            if detected.dialect == Dialect::Sockets
                && !python::is_isolated(
                    &detected.exec,
                    detected.args_before.iter().chain(&settings.args),
                ) =>
        {
            python::place().map(|folder| Some(Preload::Python(folder)))
        }
        _ => Ok(None),
    }
}

/// Under these flags Node 18 and 20 may not read the preload and would refuse to start.
fn may_not_read_files(settings: &Settings, detected: &Detected) -> bool {
    let flags = ["--experimental-permission", "--experimental-policy"];
    detected
        .args_before
        .iter()
        .chain(&settings.args)
        .filter_map(|arg| arg.to_str())
        .any(|arg| flags.iter().any(|flag| arg.starts_with(flag)))
}

/// All that goes into one start.
pub(crate) struct Request<'a> {
    pub(crate) slot: SlotId,
    pub(crate) worker: WorkerId,
    pub(crate) settings: &'a Settings,
    pub(crate) detected: &'a Detected,
    pub(crate) environment: &'a Environment,
    pub(crate) extra_env: &'a [(OsString, OsString)],
    /// Listening sockets for a sockets worker, with their names.
    pub(crate) inherited: io::Result<Vec<(OwnedFd, String)>>,
    pub(crate) io: &'a ToLoop,
    pub(crate) output: &'a mut OutputTasks,
    /// A Node worker's own limit on requests.
    pub(crate) max_requests: Option<u64>,
}

/// A started process with all that is attached to it.
pub(crate) struct Running {
    pid: Pid,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    pub(crate) link: Link,
    /// Of the worker's end of its channel.
    pub(crate) cookie: Option<u64>,
    /// Its control group.
    pub(crate) group: Option<LimitGroup>,
    /// Our ends of its further pipes that nobody has taken yet.
    pub(crate) pipes: BTreeMap<u32, OwnedFd>,
    /// Present while the worker lives, for the dialects that use it.
    notify: Option<NotifySocket>,
    /// Somebody waits for its end.
    watched: bool,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        u32::try_from(self.pid.as_raw_nonzero().get()).unwrap_or(0)
    }

    /// The process, by its pidfd and its number.
    pub(crate) fn process(&self) -> (BorrowedFd<'_>, Pid) {
        (self.pidfd.get_ref().as_fd(), self.pid)
    }

    /// Waits for its end, unless somebody does.
    fn watch(&mut self, worker: WorkerId, io: &ToLoop) {
        if !std::mem::replace(&mut self.watched, true) {
            let pidfd = Arc::clone(&self.pidfd);
            tokio::spawn(watch(worker, self.pid, pidfd, io.clone(), io.rest()));
        }
    }

    /// A task of this worker has come to rest.
    pub(crate) fn rested(&mut self, what: Rested) {
        match what {
            Rested::Reader(partial) => self.link.rested(partial),
            Rested::Watcher => self.watched = false,
            Rested::Notify => {
                if let Some(socket) = &mut self.notify {
                    socket.rested();
                }
            }
            // Of the worker, not of its process.
            Rested::Probe(_) => {}
        }
    }

    /// Tasks that came to rest go on. `alive`: its end has not been seen yet.
    pub(crate) fn go_on(&mut self, worker: WorkerId, alive: bool, io: &ToLoop) {
        self.link.read_on();
        if let Some(socket) = &mut self.notify {
            socket.read(io);
        }
        if alive {
            self.watch(worker, io);
        } else {
            self.link.process_ended();
        }
    }

    /// Sends a signal through the pidfd. A process that has ended already is no error.
    pub(crate) fn signal(&self, number: i32) -> io::Result<()> {
        let signal = Signal::from_named_raw(number)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no such signal"))?;
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartFailure {
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("cannot prepare a worker: {0}")]
    Prepare(#[from] io::Error),
}

impl StartFailure {
    /// Worth trying again: the machine is short of something.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            StartFailure::Spawn(e) => is_shortage(&e.errno),
            StartFailure::Prepare(e) => is_shortage(e),
        }
    }

    /// What failed, and what to do about it where that is known.
    pub(crate) fn told(&self) -> String {
        let errno = match self {
            StartFailure::Spawn(e) => &e.errno,
            StartFailure::Prepare(e) => e,
        };
        let next = match errno.raw_os_error() {
            Some(libc::EMFILE) => {
                "; raise the limit of open files (`ulimit -n`, or LimitNOFILE= of a unit), or run fewer workers"
            }
            Some(libc::ENFILE) => {
                "; the whole machine has too many files open: raise fs.file-max, or end what holds them"
            }
            _ => "",
        };
        format!("{self}{next}")
    }
}

/// What a Node worker is asked to tell of itself.
fn for_preload(request: &Request<'_>) -> Vec<(&'static str, String)> {
    let beat = request.settings.watchdog.map(|limit| watchdog::beat(limit).as_millis().to_string());
    let requests = request.max_requests.map(|most| most.to_string());
    // As its end means something, it is to come.
    let may_end = request.settings.restart.stop_on != StopOn::Nothing;
    let pairs = [
        (names::POLYFORK_BEAT_MS, beat),
        (names::POLYFORK_REQUESTS, requests),
        (names::POLYFORK_MAY_END, may_end.then(|| "1".to_owned())),
    ];
    pairs.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// Starts one worker process and the tasks that watch it.
pub(crate) fn start(request: Request<'_>) -> Result<Running, StartFailure> {
    let Request { slot, worker, settings, detected, environment, extra_env, .. } = request;
    let mut command = Command::new(&detected.exec);
    command.args(&detected.args_before).args(&settings.args);
    command.process_group(true).null(0);
    environment.narrow(&mut command);
    for name in NOT_INHERITED.iter().chain(&crate::process::NOT_INHERITED) {
        command.env_remove(name);
    }
    for (key, value) in environment.of_worker(extra_env, &for_preload(&request)) {
        command.env(key, value);
    }
    let number = slot.0.saturating_sub(1);
    command.env(&settings.instance_var, number.to_string());
    if let Some((name, value)) = incremented(settings, number) {
        command.env(name, value);
    }
    if let Some(directory) = &settings.cwd {
        command.current_dir(directory);
    }
    let pipes = output_pipes(&mut command, &settings.output)?;
    let further = further_pipes(&mut command, &settings.pipes)?;
    memory(&mut command, settings)?;
    let group = cgroup::of_worker(settings, worker)?;
    if let Some(group) = &group {
        for door in group.doors()? {
            command.enter_cgroup(door);
        }
    }
    let channel = dialect(&mut command, &request)?;
    let notify = match detected.dialect {
        Dialect::Sockets => Some(NotifySocket::open(worker, request.io)?),
        _ => None,
    };
    if let Some(socket) = &notify {
        command.env(names::NOTIFY_SOCKET, socket.address());
        if let Some(limit) = settings.watchdog {
            command.env("WATCHDOG_USEC", limit.as_micros().to_string());
        }
        // What cannot be asked by message is asked by signal when the primary is gone.
        command.parent_death_signal(Some(Signal::TERM));
    }
    // All that can fail comes before the process exists, as far as that is possible.
    let (mut link, cookie) = match channel {
        Some(Channel { ours, codec, cookie }) => {
            let limits = settings.limits;
            let link =
                Link::open(worker, ours, codec, limits, settings.window, request.io.clone())?;
            (link, Some(cookie))
        }
        None => (Link::None, None),
    };
    if let (Some((out, err)), Output::Lines(sink)) = (pipes, &settings.output) {
        for (pipe, stdio) in [(out, Stdio::Out), (err, Stdio::Err)] {
            request.output.read(pipe, slot, worker, stdio, sink.clone(), request.io)?;
        }
    }
    let child = command.spawn()?;
    // Where memory is short, rather a worker than what replaces it. One that has ended needs no more.
    let _ = prefer_as_oom_victim(child.pid(), OOM_PREFERENCE);
    let watched =
        child.pidfd().try_clone_to_owned().and_then(|fd| register(fd, Interest::READABLE));
    let pidfd = match watched {
        Ok(pidfd) => Arc::new(pidfd),
        Err(error) => {
            link.close();
            // It may have ended by itself; either way it is collected here.
            let _ = child.signal(Signal::KILL);
            let _ = child.wait();
            return Err(error.into());
        }
    };
    let pid = child.pid();
    let mut running =
        Running { pid, pidfd, link, cookie, group, pipes: further, notify, watched: false };
    running.watch(worker, request.io);
    Ok(running)
}

/// The variable that is another one for each worker.
fn incremented(settings: &Settings, number: u32) -> Option<(&str, String)> {
    let name = settings.increment_var.as_deref()?;
    let (_, base) = settings.env.iter().rev().find(|(key, _)| key == name)?;
    let base: u64 = base.to_str()?.trim().parse().ok()?;
    Some((name, base.checked_add(u64::from(number))?.to_string()))
}

/// Our end of a worker's channel.
struct Channel {
    ours: OwnedFd,
    codec: Codec,
    /// By which the worker's end is known again.
    cookie: u64,
}

/// Sets the command up for its dialect; gives the primary's side of the channel, if there is one.
fn dialect(command: &mut Command, request: &Request<'_>) -> Result<Option<Channel>, StartFailure> {
    let Request { slot, worker, inherited, .. } = request;
    match request.detected.dialect {
        Dialect::Node => {
            let (ours, theirs) = polyfork_sys::channel::pair()?;
            let cookie = polyfork_sys::channel::cookie(theirs.as_fd())?;
            command.fd(CHANNEL_FD, theirs);
            command.env(names::NODE_CHANNEL_FD, CHANNEL_FD.to_string());
            let (mode, codec) = match request.settings.serialization {
                Serialization::Json => ("json", Codec::Node),
                Serialization::Advanced => ("advanced", Codec::Advanced),
            };
            command.env(names::NODE_CHANNEL_SERIALIZATION_MODE, mode);
            command.env(names::NODE_UNIQUE_ID, worker.0.to_string());
            Ok(Some(Channel { ours, codec, cookie }))
        }
        Dialect::Native => {
            let (ours, theirs) = polyfork_sys::channel::pair()?;
            let cookie = polyfork_sys::channel::cookie(theirs.as_fd())?;
            command.fd(CHANNEL_FD, theirs);
            command.env(names::POLYFORK_CHANNEL_FD, CHANNEL_FD.to_string());
            command.env(names::POLYFORK_WORKER_ID, worker.0.to_string());
            command.env(names::POLYFORK_SLOT, slot.0.to_string());
            if let Some(limit) = request.settings.watchdog {
                let beat = watchdog::beat(limit).as_millis();
                command.env(names::POLYFORK_BEAT_MS, beat.to_string());
            }
            command.pid_env(POLYFORK_CHANNEL_PID);
            Ok(Some(Channel { ours, codec: Codec::Native, cookie }))
        }
        Dialect::Sockets => {
            let inherited = match inherited {
                Ok(sockets) => sockets,
                Err(e) => return Err(io::Error::new(e.kind(), e.to_string()).into()),
            };
            let mut sockets = Vec::new();
            for (number, (socket, name)) in (LISTEN_FDS_START..).zip(inherited) {
                command.fd(number, socket.try_clone()?);
                sockets.push(name.as_str());
            }
            if !sockets.is_empty() {
                command.env(names::LISTEN_FDS, sockets.len().to_string());
                command.env(names::LISTEN_FDNAMES, sockets.join(":"));
                command.pid_env(names::LISTEN_PID);
            }
            command.env(names::POLYFORK_SLOT, slot.0.to_string());
            Ok(None)
        }
    }
}

type Pipes = Option<(OwnedFd, OwnedFd)>;

fn output_pipes(command: &mut Command, output: &Output) -> io::Result<Pipes> {
    use rustix::pipe::{PipeFlags, pipe_with};
    match output {
        Output::Inherit => Ok(None),
        Output::Null => {
            command.null(1).null(2);
            Ok(None)
        }
        Output::Lines(_) => {
            let (out, out_child) = pipe_with(PipeFlags::CLOEXEC)?;
            let (err, err_child) = pipe_with(PipeFlags::CLOEXEC)?;
            command.fd(1, out_child).fd(2, err_child);
            Ok(Some((out, err)))
        }
    }
}

/// The two-way pipes that the settings ask for, as Node makes them: our ends do not block.
fn further_pipes(
    command: &mut Command,
    numbers: &BTreeSet<u32>,
) -> io::Result<BTreeMap<u32, OwnedFd>> {
    let mut ours = BTreeMap::new();
    for number in numbers {
        let (end, theirs) = polyfork_sys::channel::pair()?;
        // Checked with the settings: it fits.
        command.fd(i32::try_from(*number).unwrap_or(i32::MAX), theirs);
        ours.insert(*number, end);
    }
    Ok(ours)
}

/// The memory that the settings ask for, behind everything else.
fn memory(command: &mut Command, settings: &Settings) -> io::Result<()> {
    if settings.memory.is_empty() {
        return Ok(());
    }
    let first = settings.pipes.last().map_or(CHANNEL_FD, |last| i32::try_from(*last).unwrap_or(0));
    let mut named = Vec::new();
    for (number, (name, memory)) in (first.saturating_add(1)..).zip(&settings.memory) {
        command.fd(number, memory.as_fd().try_clone_to_owned()?);
        named.push(format!("{name}={number}"));
    }
    command.env(names::POLYFORK_MEMORY, named.join(","));
    Ok(())
}

/// The first number that a worker's own pipes may have.
pub(crate) fn first_free_number(dialect: Dialect, inherited: usize) -> u32 {
    let first = u32::try_from(CHANNEL_FD).unwrap_or_default();
    match dialect {
        Dialect::Node | Dialect::Native => first + 1,
        Dialect::Sockets => first.saturating_add(u32::try_from(inherited).unwrap_or(u32::MAX)),
    }
}

/// Waits for the end of the process and reports it, once, with the CPU time that it had used by then.
async fn watch(
    worker: WorkerId,
    pid: Pid,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    io: ToLoop,
    mut rest: Rest,
) {
    let mut cpu = None;
    let status = loop {
        let ready = tokio::select! {
            biased;
            () = rest.asked() => {
                // The loop is gone only when the whole primary ends.
                let _ = io.send(FromIo::Rested { worker, what: Rested::Watcher }).await;
                return;
            }
            ready = pidfd.readable() => ready,
        };
        let mut ready = match ready {
            Ok(ready) => ready,
            Err(e) => break Err(e),
        };
        // Nobody tells any more once it was waited for.
        cpu = cpu_time(pid);
        match try_wait(pidfd.get_ref().as_fd()) {
            Ok(Some(status)) => break Ok(status),
            Ok(None) => ready.clear_ready(),
            Err(e) => break Err(e),
        }
    };
    // The loop is gone only when the whole primary ends.
    let _ = io.send(FromIo::Exited { worker, status, cpu }).await;
}

/// The tasks that read what workers write. They outlive their worker until its pipes end.
#[derive(Default)]
pub(crate) struct OutputTasks {
    tasks: JoinSet<()>,
    /// Bytes of output that were taken by the reader of lines.
    passed: Arc<AtomicU64>,
}

impl OutputTasks {
    fn read(
        &mut self,
        pipe: OwnedFd,
        slot: SlotId,
        worker: WorkerId,
        stdio: Stdio,
        sink: mpsc::Sender<OutputLine>,
        io: &ToLoop,
    ) -> io::Result<()> {
        self.read_on(Pipe { slot, worker, stdio, pipe, pending: Vec::new() }, sink, io)
    }

    /// Reads on where a task came to rest, in this image of the process or in another.
    pub(crate) fn read_on(
        &mut self,
        from: Pipe,
        sink: mpsc::Sender<OutputLine>,
        io: &ToLoop,
    ) -> io::Result<()> {
        while self.tasks.try_join_next().is_some() {}
        let Pipe { slot, worker, stdio, pipe, pending } = from;
        polyfork_sys::channel::set_nonblocking(pipe.as_fd(), true)?;
        let pipe = pipe::Receiver::from_owned_fd(pipe)?;
        let lines = Lines { slot, worker, stdio, sink, passed: Arc::clone(&self.passed) };
        self.tasks.spawn(pass_lines(pipe, pending, lines, io.clone(), io.rest()));
        Ok(())
    }

    /// Waits for the last words of ended workers: as long as somebody takes them, `patience` between two
    /// lines. A grandchild may hold a pipe for ever; what an ended worker left behind is at most a full pipe
    /// and a line, so that is all that is waited for.
    pub(crate) async fn finish(&mut self, patience: Duration) {
        let start = self.passed.load(Ordering::Relaxed);
        let bound = (self.tasks.len() * LAST_WORDS) as u64;
        let mut before = start;
        loop {
            let ended = async { while self.tasks.join_next().await.is_some() {} };
            if tokio::time::timeout(patience, ended).await.is_ok() {
                return;
            }
            let now = self.passed.load(Ordering::Relaxed);
            if now == before || now - start > bound {
                break;
            }
            before = now;
        }
        self.tasks.abort_all();
    }
}

/// A pipe that nobody reads at the moment.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) slot: SlotId,
    pub(crate) worker: WorkerId,
    pub(crate) stdio: Stdio,
    pub(crate) pipe: OwnedFd,
    /// The beginning of a line.
    pub(crate) pending: Vec<u8>,
}

/// Where the lines of one pipe come from and go to.
struct Lines {
    slot: SlotId,
    worker: WorkerId,
    stdio: Stdio,
    sink: mpsc::Sender<OutputLine>,
    passed: Arc<AtomicU64>,
}

impl Lines {
    /// Waits until the line is taken; an error when nobody takes any more.
    async fn pass(&self, line: Vec<u8>, complete: bool) -> Result<(), ()> {
        let len = line.len() as u64 + u64::from(complete);
        let line = OutputLine {
            slot: self.slot.0,
            worker: self.worker.0,
            stream: self.stdio.into(),
            line,
            complete,
        };
        self.sink.send(line).await.map_err(|_| ())?;
        self.passed.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

/// Cuts a stream into lines. Waits while the reader of lines is behind, which in time makes the worker wait.
async fn pass_lines(
    mut pipe: pipe::Receiver,
    mut pending: Vec<u8>,
    lines: Lines,
    io: ToLoop,
    mut rest: Rest,
) {
    loop {
        let start = pending.len();
        pending.reserve(READ_BYTES);
        let read = tokio::select! {
            biased;
            () = rest.asked() => {
                let Ok(pipe) = pipe.into_nonblocking_fd() else { return };
                let Lines { slot, worker, stdio, .. } = lines;
                let pipe = Pipe { slot, worker, stdio, pipe, pending };
                // The loop is gone only when the whole primary ends.
                let _ = io.send(FromIo::OutputRested(pipe)).await;
                return;
            }
            read = pipe.read_buf(&mut pending) => read,
        };
        // An error on a pipe means that it is over.
        if !matches!(read, Ok(read) if read > 0) {
            break;
        }
        let mut from = 0;
        let mut look = start;
        while let Some(at) = pending[look..].iter().position(|b| *b == b'\n') {
            let end = look + at;
            if lines.pass(pending[from..end].to_vec(), true).await.is_err() {
                return;
            }
            from = end + 1;
            look = from;
        }
        pending.drain(..from);
        if pending.len() >= LINE_LIMIT
            && lines.pass(std::mem::take(&mut pending), false).await.is_err()
        {
            return;
        }
        if pending.is_empty() && pending.capacity() > LINE_LIMIT {
            pending = Vec::new();
        }
    }
    if !pending.is_empty() {
        // The reader of lines may have gone.
        let _ = lines.pass(pending, false).await;
    }
}

/// A seed for jitter, different in every process.
pub(crate) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines_of(text: &[u8]) -> Vec<(String, bool)> {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let (tx, mut rx) = mpsc::channel(4);
        let mut tasks = OutputTasks::default();
        tasks
            .read(reader, SlotId(1), WorkerId(1), Stdio::Out, tx, &ToLoop::new().0)
            .expect("reader");
        let text = text.to_vec();
        let writing = tokio::task::spawn_blocking(move || {
            use std::io::Write;
            std::fs::File::from(writer).write_all(&text).expect("write");
        });
        let mut lines = Vec::new();
        while let Some(line) = rx.recv().await {
            lines.push((String::from_utf8_lossy(&line.line).into_owned(), line.complete));
        }
        writing.await.expect("writer");
        lines
    }

    #[tokio::test]
    async fn lines_arrive_whole_and_a_last_one_without_newline_too() {
        let lines = lines_of(b"one\n\ntwo").await;
        let expected = [("one", true), ("", true), ("two", false)];
        assert_eq!(lines, expected.map(|(l, c)| (l.to_owned(), c)));
    }

    #[tokio::test(start_paused = true)]
    async fn last_words_are_waited_for_as_long_as_somebody_takes_them() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let (tx, mut rx) = mpsc::channel(1);
        let mut tasks = OutputTasks::default();
        tasks
            .read(reader, SlotId(1), WorkerId(1), Stdio::Out, tx, &ToLoop::new().0)
            .expect("reader");
        rustix::io::write(&writer, &b"word\n".repeat(40)).expect("write");
        drop(writer);
        // Slower in all than the patience, never slower for one line.
        let patience = Duration::from_millis(500);
        let slow = tokio::spawn(async move {
            let mut count = 0;
            while rx.recv().await.is_some() {
                count += 1;
                tokio::time::sleep(patience / 2).await;
            }
            count
        });
        tasks.finish(patience).await;
        drop(tasks);
        assert_eq!(slow.await.expect("reader of lines"), 40);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pipe_that_somebody_keeps_open_is_not_waited_for() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let (tx, _rx) = mpsc::channel(1);
        let mut tasks = OutputTasks::default();
        tasks
            .read(reader, SlotId(1), WorkerId(1), Stdio::Out, tx, &ToLoop::new().0)
            .expect("reader");
        tasks.finish(Duration::from_millis(500)).await;
        drop(writer);
    }

    #[tokio::test]
    async fn a_line_without_end_comes_in_pieces() {
        let lines = lines_of(&vec![b'x'; 300_000]).await;
        assert!(lines.len() > 1 && lines.iter().all(|(_, complete)| !complete));
        assert_eq!(lines.iter().map(|(l, _)| l.len()).sum::<usize>(), 300_000);
    }
}
