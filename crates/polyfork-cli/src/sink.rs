//! Writes whole lines to standard output or error without ever holding up the primary.
//!
//! A thread per stream does the writing, so a reader that stopped (Ctrl-S, a paused pager, a full pipe) stops
//! that thread and nothing else. Between it and the primary is one bounded buffer, used in two ways:
//!
//! - worker output waits for room ([`Sink::line`]): the wait reaches the worker's own pipe, nothing is lost;
//! - the primary's lines never wait ([`Sink::own`]): they have room of their own, and when that is used up
//!   they are dropped, counted, and the count is written as soon as there is room again.
//!
//! Lines keep their order and are never mixed, whoever wrote them. A reader that went away (EPIPE) or a
//! terminal that is gone (EIO) ends nothing: what follows is discarded. A full disk discards what did not fit.
//! That something was lost is told once ([`Sink::lost`]).
//!
//! A blocking write cannot be taken back: when a stuck reader outlasts [`Sink::finish`] the thread is left
//! behind and ends with the process.

use std::io::{self, Stderr, Stdout};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyfork::cluster::upgrade;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::Notify;

/// Worker output waits while this many bytes are unwritten.
const OUTPUT_BYTES: usize = 64 << 10;
/// The primary's own lines are dropped while this many bytes are unwritten: worker output at its bound, one
/// long line that was let in below it, and 64 KiB of our own.
const OWN_BYTES: usize = OUTPUT_BYTES + (66 << 10) + (64 << 10);
/// The writing thread calls nothing deep.
const STACK_BYTES: usize = 64 << 10;
/// At the end, a reader that takes nothing for this long is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One stream with its thread.
pub(crate) struct Sink {
    shared: Arc<Shared>,
    /// Makes the line that tells how many of the primary's lines were dropped.
    tell_dropped: fn(u64) -> String,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread: something to write, or the end.
    work: Condvar,
    /// Wakes [`Sink::finish`]: something was written.
    progress: Condvar,
    /// Wakes the one task that waits in [`Sink::line`].
    room: Notify,
    /// Wakes the one task that waits in [`Sink::lost`].
    loss: Notify,
}

#[derive(Default)]
struct State {
    /// Whole lines that the thread has not taken yet.
    waiting: Vec<u8>,
    /// Bytes that the thread took and did not write yet.
    taken: usize,
    /// Bytes written or discarded since the start.
    done: u64,
    /// Own lines dropped and not told yet.
    dropped: u64,
    /// No more lines will come.
    closed: bool,
    /// Nobody reads: lines are discarded.
    dead: bool,
    /// The thread is gone.
    ended: bool,
    /// Why something was discarded first.
    loss: Option<Errno>,
}

impl Sink {
    /// Starts the thread. If the system refuses one, lines are discarded: a program is worth more than its log.
    pub(crate) fn new(target: Target, tell_dropped: fn(u64) -> String) -> Sink {
        match target {
            Target::Stdout => Sink::over(io::stdout, "stdout", tell_dropped),
            Target::Stderr => Sink::over(io::stderr, "stderr", tell_dropped),
        }
    }

    fn over<S: Stream>(
        stream: impl FnOnce() -> S + Send + 'static,
        name: &str,
        tell_dropped: fn(u64) -> String,
    ) -> Sink {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            progress: Condvar::new(),
            room: Notify::new(),
            loss: Notify::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
        // Signals are for the thread that obeys them, and for the next image of this process while it is made.
        let held = upgrade::hold_signals();
        let started = thread.spawn(move || write_all(&theirs, &stream()));
        drop(held);
        if started.is_err() {
            let mut state = shared.lock();
            state.dead = true;
            state.ended = true;
        }
        Sink { shared, tell_dropped }
    }

    /// Adds a worker's line, waiting while the buffer is full. `line` ends with a newline.
    ///
    /// Cancel safe: the line was added or it was not. One task at a time.
    pub(crate) async fn line(&self, line: &[u8]) {
        loop {
            {
                let mut state = self.shared.lock();
                if state.dead {
                    return;
                }
                if state.unwritten() < OUTPUT_BYTES {
                    self.add(&mut state, line);
                    return;
                }
            }
            self.shared.room.notified().await;
        }
    }

    /// Adds a line of the primary, or drops and counts it. Never waits. `line` ends with a newline.
    pub(crate) fn own(&self, line: &[u8]) {
        let mut state = self.shared.lock();
        if state.dead {
            return;
        }
        // A line longer than the bound is let in when nothing waits: a worker may send long messages.
        if state.unwritten() > 0 && state.unwritten() + line.len() > OWN_BYTES {
            state.dropped += 1;
        } else {
            self.add(&mut state, line);
        }
    }

    fn add(&self, state: &mut State, line: &[u8]) {
        if state.dropped > 0 {
            let dropped = std::mem::take(&mut state.dropped);
            state.waiting.extend_from_slice((self.tell_dropped)(dropped).as_bytes());
        }
        state.waiting.extend_from_slice(line);
        self.shared.work.notify_one();
    }

    /// Whether everything is written, or will never be.
    pub(crate) fn is_written(&self) -> bool {
        let state = self.shared.lock();
        state.dead || state.unwritten() == 0
    }

    /// Why something could not be written, the first time; a terminal or a reader that is gone counts as well.
    pub(crate) fn loss(&self) -> Option<Errno> {
        self.shared.lock().loss
    }

    /// Waits until something could not be written. Cancel safe; one task at a time.
    pub(crate) async fn lost(&self) -> Errno {
        loop {
            if let Some(error) = self.loss() {
                return error;
            }
            self.shared.loss.notified().await;
        }
    }

    /// Waits until everything is written, but not for a reader that takes nothing for two seconds.
    ///
    /// Blocks the thread: called when nothing else is left to do. False when something stayed unwritten.
    pub(crate) fn finish(&self) -> bool {
        let mut state = self.shared.lock();
        if state.dropped > 0 && !state.dead {
            self.add(&mut state, b"");
        }
        state.closed = true;
        self.shared.work.notify_one();
        while !state.ended {
            let before = state.done;
            let (next, waited) = self
                .shared
                .progress
                .wait_timeout(state, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.done == before && !state.ended {
                return false;
            }
        }
        true
    }
}

impl State {
    fn unwritten(&self) -> usize {
        self.waiting.len() + self.taken
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be written next; `None` when the end is reached.
    fn take(&self, mut empty: Vec<u8>) -> Option<Vec<u8>> {
        empty.clear();
        empty.shrink_to(OUTPUT_BYTES);
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return None;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let full = std::mem::replace(&mut state.waiting, empty);
        state.taken = full.len();
        Some(full)
    }

    /// Notes that `bytes` were written or discarded.
    fn done(&self, bytes: usize) {
        let mut state = self.lock();
        state.taken -= bytes;
        state.done += bytes as u64;
        drop(state);
        self.progress.notify_all();
        self.room.notify_one();
    }

    /// Notes why bytes are discarded.
    fn lose(&self, error: Errno) {
        self.lock().loss.get_or_insert(error);
        self.loss.notify_one();
    }

    fn die(&self) {
        let mut state = self.lock();
        state.dead = true;
        state.waiting = Vec::new();
    }

    fn end(&self) {
        self.lock().ended = true;
        self.progress.notify_all();
        self.room.notify_one();
    }
}

/// What can be written to: standard output and error, a pipe in tests.
trait Stream {
    fn fd(&self) -> BorrowedFd<'_>;
}

impl Stream for Stdout {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Stream for Stderr {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// The thread.
fn write_all(shared: &Shared, stream: &impl Stream) {
    let mut buffer = Vec::new();
    while let Some(full) = shared.take(buffer) {
        let mut rest = &full[..];
        while !rest.is_empty() {
            match write_some(stream.fd(), rest) {
                Ok(written) => {
                    rest = &rest[written..];
                    shared.done(written);
                }
                Err(error @ (Errno::NOSPC | Errno::DQUOT)) => {
                    shared.lose(error);
                    shared.done(rest.len());
                    rest = &[];
                }
                Err(error) => {
                    shared.lose(error);
                    shared.die();
                    shared.done(rest.len());
                    rest = &[];
                }
            }
        }
        buffer = full;
    }
    shared.end();
}

/// One write that waits: also on a descriptor that another process made non-blocking, which happens when the
/// terminal or the pipe is shared with a Node program.
fn write_some(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::write(fd, bytes) {
            Err(Errno::AGAIN) => {
                let mut wait = [PollFd::new(&fd, PollFlags::OUT)];
                match poll(&mut wait, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error),
                }
            }
            Err(Errno::INTR) => {}
            Ok(0) => return Err(Errno::IO),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    impl Stream for OwnedFd {
        fn fd(&self) -> BorrowedFd<'_> {
            self.as_fd()
        }
    }

    fn tell(dropped: u64) -> String {
        format!("dropped {dropped}\n")
    }

    fn sink_into_a_pipe() -> (Sink, io::PipeReader) {
        let (reader, writer) = io::pipe().expect("a pipe");
        (Sink::over(move || OwnedFd::from(writer), "test", tell), reader)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
    }

    #[test]
    fn every_line_arrives_in_order_through_a_slow_reader() {
        let (sink, mut reader) = sink_into_a_pipe();
        let lines: Vec<String> =
            (0..20_000).map(|n| format!("line {n} {}\n", "x".repeat(50))).collect();
        let all = lines.concat();
        let read = std::thread::spawn(move || {
            let mut seen = String::new();
            reader.read_to_string(&mut seen).expect("text");
            seen
        });
        runtime().block_on(async {
            for line in &lines {
                sink.line(line.as_bytes()).await;
            }
        });
        assert!(sink.finish());
        assert_eq!(read.join().expect("reader"), all);
    }

    #[test]
    fn own_lines_never_wait_and_what_was_dropped_is_told() {
        let (sink, mut reader) = sink_into_a_pipe();
        let line = [b"o".repeat(99), b"\n".to_vec()].concat();
        let sent = 10_000;
        for _ in 0..sent {
            sink.own(&line);
        }
        let read = std::thread::spawn(move || {
            let mut seen = String::new();
            reader.read_to_string(&mut seen).expect("text");
            seen
        });
        assert!(sink.finish());
        let seen = read.join().expect("reader");
        let told: usize = seen
            .lines()
            .filter_map(|l| l.strip_prefix("dropped "))
            .map(|n| n.parse::<usize>().unwrap())
            .sum();
        let arrived = seen.lines().filter(|l| l.starts_with('o')).count();
        assert!(told > 0 && arrived > 0, "{told} dropped, {arrived} arrived");
        assert_eq!(told + arrived, sent);
        assert!(seen.lines().all(|l| l.len() == 99 || l.starts_with("dropped ")), "a line was cut");
    }

    #[test]
    fn worker_output_waits_while_nobody_reads() {
        let (sink, reader) = sink_into_a_pipe();
        let line = vec![b'x'; 32 << 10];
        let (accepted, reader) = runtime().block_on(async {
            let mut accepted = 0;
            let patience = Duration::from_millis(200);
            while tokio::time::timeout(patience, sink.line(&line)).await.is_ok() {
                accepted += 1;
                assert!(accepted < 100, "the buffer has no bound");
            }
            (accepted, reader)
        });
        assert!(accepted >= 2);
        sink.own(b"still here\n");
        assert_eq!(sink.shared.lock().dropped, 0, "own lines have room of their own");
        drop(reader);
        assert!(sink.finish());
    }

    #[test]
    fn a_reader_that_left_is_no_error_and_stops_nobody() {
        let (sink, reader) = sink_into_a_pipe();
        drop(reader);
        runtime().block_on(async {
            for _ in 0..1_000 {
                sink.line(&[b'x'; 1_000]).await;
            }
        });
        assert!(sink.finish());
    }

    #[test]
    fn the_end_does_not_wait_for_a_stuck_reader() {
        let (sink, reader) = sink_into_a_pipe();
        for _ in 0..10 {
            sink.own(&[b'x'; 16 << 10]);
        }
        assert!(!sink.finish(), "more than a pipe holds cannot have been written");
        drop(reader);
    }
}
