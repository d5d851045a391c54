//! A child that runs: its streams, its events in Node's order, its end.
//!
//! One task per child watches the pidfd. It alone collects, so a child is never a zombie for longer than it takes the
//! task to run, whether anybody waits or not; it also holds the time limit and the abort token. What it learns goes to
//! the [`Child`] through a watch (the end) and a queue of two (why it was killed). The order of events is made here, by
//! the one who asks, from those two and from the streams' own ends.
//!
//! The story behind the lock: a process group is named by its leader's pid. On kernels that cannot name it through the
//! pidfd (before 6.9), the number is safe only until the leader is collected. So collecting and signalling by number
//! exclude each other, and afterwards the number is never used.
//!
//! References: Node `lib/internal/child_process.js` (`onexit`, `flushStdio`, `maybeClose`); pidfd_open(2).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use polyfork_sys::spawn::{Cgroup, is_unknown_child, send_group_signal, send_signal, try_wait};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::sync::{mpsc, watch};
use tokio::time::Sleep;

use super::command::{Command, Ends, Limits, Prepared};
use super::exec::Output;
use super::stdio::{ChildSocket, ChildStderr, ChildStdin, ChildStdout, Open};
use super::{Signal, SpawnError};
use crate::cluster::register::register;

/// At most one notice of each kind is ever sent.
const NOTICES: usize = 2;
/// Read at a time from a stream that nobody wants.
const DISCARD_BYTES: usize = 8 * 1024;

/// How a process ended: by a code of its own, or by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exit {
    /// The exit code, 0 to 255.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<Signal>,
}

impl Exit {
    /// Whether it exited with code 0.
    pub fn success(self) -> bool {
        self.code == Some(0)
    }

    /// Neither code nor signal: somebody else in this process (a library that calls `waitpid(-1)`) collected it, or
    /// SIGCHLD is ignored, and the kernel tells only once.
    pub fn is_unknown(self) -> bool {
        self == Self::default()
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        Self { code: status.code(), signal: status.signal().map(Signal::from_kernel) }
    }
}

/// What happens to a child, in this order: `Spawn`, then messages and `Disconnect` if it has a channel, `Error` at any
/// time before its exit, `Exit`, `Close`.
///
/// `M` is the type of messages; a child without a channel sends none.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<M = Infallible> {
    /// It runs.
    Spawn,
    /// It has sent a message over its channel.
    Message(M),
    /// Its channel is closed.
    Disconnect,
    /// Something went wrong that did not by itself end it.
    Error(ChildError),
    /// It has ended. Its streams may hold more to read.
    Exit(Exit),
    /// It has ended, and all its streams have been read to their end or dropped. The last event.
    Close(Exit),
}

/// What can go wrong with a child that runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildError {
    /// Its token was cancelled; it was sent its kill signal (Node: `AbortError`).
    #[error("the child was aborted")]
    Aborted,
    /// It can no longer be watched: the runtime it was started in has ended.
    #[error("the child is not watched any more: {0}")]
    Unwatched(#[source] io::Error),
}

/// Why the watching task reached for the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Notice {
    TimedOut,
    Aborted,
}

/// What comes next of a child, apart from its streams.
#[derive(Debug)]
pub(super) enum News {
    TimedOut,
    Aborted,
    Exited(io::Result<Exit>),
}

/// The process as task and handle share it.
#[derive(Debug)]
struct Process {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    leads_group: bool,
    cgroup: Option<Cgroup>,
    killed: AtomicBool,
    /// Whether it has been collected; locked while its number is relied on.
    collected: Mutex<bool>,
}

impl Process {
    fn collect(&self) -> io::Result<Option<Exit>> {
        let mut collected = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        let status = match try_wait(self.pidfd.get_ref().as_fd()) {
            Ok(Some(status)) => Exit::from(status),
            Ok(None) => return Ok(None),
            Err(error) if is_unknown_child(&error) => Exit::default(),
            Err(error) => return Err(error),
        };
        *collected = true;
        Ok(Some(status))
    }

    /// Whether it has ended, collected or not.
    fn has_ended(&self) -> bool {
        let mut poll = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut poll, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    fn kill(&self, signal: Signal) -> io::Result<bool> {
        if self.has_ended() {
            return Ok(false);
        }
        let sent = sent(send_signal(self.pidfd.get_ref().as_fd(), signal.number()))?;
        if sent && signal != Signal::NONE {
            self.killed.store(true, Ordering::Relaxed);
        }
        Ok(sent)
    }

    fn kill_tree(&self, signal: Signal) -> io::Result<bool> {
        if let (Some(group), Signal::KILL) = (&self.cgroup, signal) {
            if group.is_empty().unwrap_or(true) {
                return Ok(false);
            }
            group.kill()?;
            self.killed.store(true, Ordering::Relaxed);
            return Ok(true);
        }
        if !self.leads_group {
            let text = "the child leads no process group: start it with process_group or detached";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let result = send_group_signal(self.pidfd.get_ref().as_fd(), signal.number());
        let sent = match result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.kill_group_by_number(signal)?
            }
            other => sent(other)?,
        };
        if sent && signal != Signal::NONE {
            self.killed.store(true, Ordering::Relaxed);
        }
        Ok(sent)
    }

    /// For kernels before 6.9, see the header.
    fn kill_group_by_number(&self, signal: Signal) -> io::Result<bool> {
        let collected = self.collected.lock().unwrap_or_else(PoisonError::into_inner);
        if *collected {
            let text = "the group of a child that has ended can be reached from Linux 6.9 on";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let result = match rustix::process::Signal::from_named_raw(signal.number()) {
            Some(signal) => rustix::process::kill_process_group(self.pid, signal),
            None if signal == Signal::NONE => rustix::process::test_kill_process_group(self.pid),
            None => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        sent(result.map_err(io::Error::from))
    }
}

/// "Nobody there" is an answer, not an error.
fn sent(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}

/// How far the events have come.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Started,
    Running,
    Ended(Exit),
    Closed,
}

/// A process started by [`Command::spawn`].
///
/// # Dropping
///
/// Dropping it closes the streams it still has and leaves the process alone, unless
/// [`Command::kill_on_drop`] was asked for. It is collected when it ends, as long as the runtime it was started in
/// lives, so no zombie is left; a [`Command::timeout`] stays in force.
///
/// # Streams
///
/// They are taken out of their fields to be used. A child that fills a pipe which nobody reads waits.
#[derive(Debug)]
pub struct Child {
    /// Our end of its standard input, if that is a pipe.
    pub stdin: Option<ChildStdin>,
    /// Our end of its standard output, if that is a pipe.
    pub stdout: Option<ChildStdout>,
    /// Our end of its standard error, if that is a pipe.
    pub stderr: Option<ChildStderr>,
    /// Our ends of the two-way pipes in slots beyond 2, by slot.
    pub stdio: BTreeMap<u32, ChildSocket>,
    process: Arc<Process>,
    notices: mpsc::Receiver<Notice>,
    end: watch::Receiver<Option<Exit>>,
    open: mpsc::Receiver<Infallible>,
    stage: Stage,
    drop_signal: Option<Signal>,
}

impl Child {
    pub(super) fn start(command: &mut Command) -> Result<Self, SpawnError> {
        let program = command.shown_program();
        command.check()?;
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(SpawnError::NoRuntime { program });
        }
        let limits = command.limits().clone();
        // Made here, so that a runtime without a clock is told to the caller and not to a task.
        let timer = limits.timeout.map(|limit| Box::pin(tokio::time::sleep(limit)));
        let leads_group = command.leads_a_group();
        let Prepared { sys, ends, cgroup } = command.prepare()?;
        let (opened, open) = mpsc::channel(1);
        // All that can fail comes before the process exists, as far as that is possible.
        let streams = Streams::open(ends, &opened).map_err(|(slot, source)| SpawnError::Stdio {
            program: program.clone(),
            slot,
            source,
        })?;
        let child = sys.spawn()?;
        let watched = child
            .pidfd()
            .try_clone_to_owned()
            .and_then(|pidfd| register(pidfd, Interest::READABLE));
        let pidfd = match watched {
            Ok(pidfd) => pidfd,
            Err(source) => {
                // It may have ended by itself; either way it is collected here.
                let _ended = child.signal(rustix::process::Signal::KILL);
                let _status = child.wait();
                return Err(SpawnError::Watch { program, source });
            }
        };
        let process = Arc::new(Process {
            pid: child.pid(),
            pidfd,
            leads_group,
            cgroup,
            killed: AtomicBool::new(false),
            collected: Mutex::new(false),
        });
        let drop_signal = limits.kill_on_drop.then_some(limits.kill_signal);
        let (notify, notices) = mpsc::channel(NOTICES);
        let (ended, end) = watch::channel(None);
        tokio::spawn(watch_over(Arc::clone(&process), limits, timer, notify, ended));
        let Streams { stdin, stdout, stderr, stdio } = streams;
        let stage = Stage::Started;
        Ok(Self { stdin, stdout, stderr, stdio, process, notices, end, open, stage, drop_signal })
    }

    /// Its process id, for people and for files under `/proc`. Signals go by [`kill`](Self::kill), which cannot hit a
    /// stranger that got the number later.
    pub fn pid(&self) -> u32 {
        self.process.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Its exit code, once it has exited by itself.
    pub fn exit_code(&self) -> Option<i32> {
        (*self.end.borrow()).and_then(|exit| exit.code)
    }

    /// The signal that ended it, once one has.
    pub fn signal_code(&self) -> Option<Signal> {
        (*self.end.borrow()).and_then(|exit| exit.signal)
    }

    /// How it ended, once it has.
    pub fn try_wait(&self) -> Option<Exit> {
        *self.end.borrow()
    }

    /// Whether a signal was sent to it: by [`kill`](Self::kill), a time limit or an abort. It may have survived it.
    pub fn killed(&self) -> bool {
        self.process.killed.load(Ordering::Relaxed)
    }

    /// Sends it a signal through its pidfd: `true` if it was sent, `false` if the child had ended already.
    /// [`Signal::NONE`] only asks.
    ///
    /// # Errors
    ///
    /// `EPERM`: it has changed its user and we may not signal it any more.
    pub fn kill(&self, signal: Signal) -> io::Result<bool> {
        self.process.kill(signal)
    }

    /// Sends a signal to the whole process group the child leads, the child's own children included; with
    /// [`Command::own_cgroup`] and [`Signal::KILL`], to everything in its control group, whatever it did to get away.
    /// `false` if nobody was left. Works after the child itself has ended.
    ///
    /// # Errors
    ///
    /// `InvalidInput`: it leads no group (see [`Command::process_group`], [`Command::detached`]). `EPERM`: nobody in
    /// the group may be signalled by us. `Unsupported`: the child has ended and the kernel is older than 6.9.
    pub fn kill_tree(&self, signal: Signal) -> io::Result<bool> {
        self.process.kill_tree(signal)
    }

    /// Waits for the end. Closes its standard input first, if it is still in [`Child::stdin`], so that a child that reads
    /// to the end of its input does end. Pipes that fill up are not read: see
    /// [`wait_with_output`](Self::wait_with_output).
    ///
    /// # Errors
    ///
    /// The runtime it was started in has ended.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost: the end is told again to whoever asks later, as often as asked.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        self.stdin = None;
        self.ended().await
    }

    /// Reads standard output and error to their ends and waits for the exit. Without a limit: see
    /// [`exec_file`](super::exec_file()) for one with.
    ///
    /// Waits as long as any process has the other ends of the pipes.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    ///
    /// # Cancel safety
    ///
    /// Cancelled, it drops the child and what was read.
    pub async fn wait_with_output(mut self) -> io::Result<Output> {
        self.stdin = None;
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        let (stdout, stderr, exit) =
            tokio::join!(read_to_end(stdout), read_to_end(stderr), self.ended());
        Ok(Output { exit: exit?, stdout: stdout?, stderr: stderr? })
    }

    /// The next event, or `None` after [`Event::Close`]. See [`Event`] for the order.
    ///
    /// Streams that were not taken out of their fields by the exit are read and thrown away after it, since the close
    /// waits for their end; standard input is closed with the exit.
    ///
    /// # Cancel safety
    ///
    /// No event is lost.
    pub async fn next_event(&mut self) -> Option<Event> {
        match self.stage {
            Stage::Started => {
                self.stage = Stage::Running;
                Some(Event::Spawn)
            }
            Stage::Running => Some(loop {
                match self.news().await {
                    // Node has no event for it either: the exit tells the signal.
                    News::TimedOut => {}
                    News::Aborted => break Event::Error(ChildError::Aborted),
                    News::Exited(Ok(exit)) => {
                        self.stdin = None;
                        self.stage = Stage::Ended(exit);
                        break Event::Exit(exit);
                    }
                    News::Exited(Err(error)) => {
                        self.stage = Stage::Closed;
                        break Event::Error(ChildError::Unwatched(error));
                    }
                }
            }),
            Stage::Ended(exit) => {
                self.closed().await;
                self.stage = Stage::Closed;
                Some(Event::Close(exit))
            }
            Stage::Closed => None,
        }
    }

    /// What comes next of the process. Cancel-safe.
    pub(super) async fn news(&mut self) -> News {
        let mut end = self.end.clone();
        tokio::select! {
            biased;
            Some(notice) = self.notices.recv() => match notice {
                Notice::TimedOut => News::TimedOut,
                Notice::Aborted => News::Aborted,
            },
            exit = ended(&mut end) => News::Exited(exit),
        }
    }

    async fn ended(&mut self) -> io::Result<Exit> {
        ended(&mut self.end).await
    }

    /// Waits until every stream has ended, reading those that nobody took.
    async fn closed(&mut self) {
        discard(&mut self.stdout).await;
        discard(&mut self.stderr).await;
        while let Some(mut entry) = self.stdio.first_entry() {
            let mut buffer = [0; DISCARD_BYTES];
            while matches!(entry.get_mut().read(&mut buffer).await, Ok(read) if read > 0) {}
            entry.remove();
        }
        // Nothing is ever sent: this ends when the last stream does.
        let _none = self.open.recv().await;
    }
}

impl AsFd for Child {
    /// Its pidfd: readable when it has ended.
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.process.pidfd.get_ref().as_fd()
    }
}

impl AsRawFd for Child {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(signal) = self.drop_signal {
            // Gone, or not ours any more: nothing to be done in either case.
            let _sent = self.process.kill(signal);
        }
    }
}

async fn ended(end: &mut watch::Receiver<Option<Exit>>) -> io::Result<Exit> {
    let told = end.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
    told.ok_or_else(|| io::Error::other("the runtime that watched the child has ended"))
}

async fn read_to_end(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// Reads to the end and drops the stream. Cancelled, it goes on next time.
async fn discard<S: AsyncRead + Unpin>(place: &mut Option<S>) {
    let Some(stream) = place.as_mut() else { return };
    let mut buffer = [0; DISCARD_BYTES];
    while matches!(stream.read(&mut buffer).await, Ok(read) if read > 0) {}
    *place = None;
}

/// The ends that stay here, known to the event loop.
struct Streams {
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    stdio: BTreeMap<u32, ChildSocket>,
}

impl Streams {
    fn open(ends: Ends, open: &mpsc::Sender<Infallible>) -> Result<Self, (u32, io::Error)> {
        let new = || Open::new(open);
        let at = |slot| move |error| (slot, error);
        let mut stdio = BTreeMap::new();
        for (slot, end) in ends.beyond {
            stdio.insert(slot, ChildSocket::new(end, new()).map_err(at(slot))?);
        }
        Ok(Self {
            stdin: ends.stdin.map(ChildStdin::new).transpose().map_err(at(0))?,
            stdout: ends
                .stdout
                .map(|end| ChildStdout::new(end, new()))
                .transpose()
                .map_err(at(1))?,
            stderr: ends
                .stderr
                .map(|end| ChildStderr::new(end, new()))
                .transpose()
                .map_err(at(2))?,
            stdio,
        })
    }
}

/// The task that belongs to a child: time limit, abort, collection.
async fn watch_over(
    process: Arc<Process>,
    limits: Limits,
    mut timer: Option<Pin<Box<Sleep>>>,
    notices: mpsc::Sender<Notice>,
    ended: watch::Sender<Option<Exit>>,
) {
    let Limits { kill_signal, mut abort, .. } = limits;
    let exit = loop {
        let notice = tokio::select! {
            biased;
            exit = collected(&process) => break exit,
            () = cancelled(abort.as_ref()), if abort.is_some() => {
                abort = None;
                Notice::Aborted
            }
            () = passed(timer.as_mut()), if timer.is_some() => {
                timer = None;
                Notice::TimedOut
            }
        };
        // Told before it is done, so that the exit cannot overtake the reason. There is room for one of each kind;
        // nobody may be listening.
        let _told = notices.try_send(notice);
        // Gone meanwhile, or not ours to signal: the exit will tell, or there will be none.
        let _sent = process.kill(kill_signal);
    };
    // What cannot be waited for is told as unknown, rather than never.
    ended.send_replace(Some(exit.unwrap_or_default()));
    drop(ended);
    clear_cgroup(&process).await;
}

async fn cancelled(token: Option<&tokio_util::sync::CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}

async fn passed(timer: Option<&mut Pin<Box<Sleep>>>) {
    match timer {
        Some(timer) => timer.await,
        None => std::future::pending().await,
    }
}

async fn collected(process: &Process) -> io::Result<Exit> {
    loop {
        let mut ready = process.pidfd.readable().await?;
        match process.collect()? {
            Some(exit) => return Ok(exit),
            None => ready.clear_ready(),
        }
    }
}

/// Removes the control group when the last process in it has gone.
async fn clear_cgroup(process: &Process) {
    let Some(group) = &process.cgroup else { return };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = rustix::fs::open(group.path().join("cgroup.events"), flags, Mode::empty());
    let Ok(events) =
        opened.map_err(io::Error::from).and_then(|fd| register(fd, Interest::PRIORITY))
    else {
        return;
    };
    // The kernel tells a change of the file as urgent data.
    while !group.is_empty().unwrap_or(true) {
        match events.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return,
        }
    }
    // Dropping the last handle tries again.
    let _busy = group.remove();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_old_kernel_reaches_a_group_only_while_its_leader_is_not_collected() {
        let mut command = Command::new("sleep");
        let mut child = command.arg("1000").process_group(true).spawn().expect("a child");
        assert!(child.process.kill_group_by_number(Signal::NONE).expect("an answer"));
        assert!(child.process.kill_group_by_number(Signal::TERM).expect("sent"));
        assert_eq!(child.wait().await.expect("the end").signal, Some(Signal::TERM));
        let error = child.process.kill_group_by_number(Signal::TERM).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
