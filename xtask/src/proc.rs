//! Processes that a chore starts: run with a limit, find all descendants, end them by pidfd.
//!
//! What to run is decided by the callers. This module promises that nothing it started outlives
//! the chore, also on Ctrl-C, on a failed step, and for programs that detach themselves (PM2's
//! daemon does): the chore is a child subreaper, so an orphan becomes its direct child and is found
//! by walking `/proc`.
//!
//! Orphans are also reaped promptly: a test that waits for a process to be gone must not wait for
//! this one.
//!
//! Surprising: on SIGINT or SIGTERM the watcher thread ends the descendants first and lets the main
//! thread fail on what it was waiting for, so that its temporary folders are removed by their
//! owners; only if it does not come back the process exits from the watcher.
//!
//! Source: prctl(2), proc_pid_stat(5), pidfd_open(2), pidfd_send_signal(2).

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Time between the polite signal and SIGKILL when descendants are ended.
const GRACE: Duration = Duration::from_secs(3);
/// Time the main thread has to clean up after a signal.
const CLEANUP: Duration = Duration::from_secs(15);
/// Pause between two looks at `/proc` or at a child; the kernel offers no event for a whole tree.
const POLL: Duration = Duration::from_millis(20);
/// How long the output of a command that has ended may stay open.
const OUTPUT_LIMIT: Duration = Duration::from_secs(10);

/// The signal that asked to stop; zero while none has come.
static INTERRUPTED: AtomicI32 = AtomicI32::new(0);

/// Makes this process the reaper of all its descendants and ends them on SIGINT and SIGTERM.
///
/// # Errors
/// When the kernel refuses the subreaper attribute or a signal handler cannot be set.
pub(crate) fn guard() -> Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .context("become the child subreaper")?;
    thread::Builder::new().name("orphans".into()).spawn(|| reap_orphans())?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("watch SIGINT and SIGTERM")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if INTERRUPTED.swap(signal, Ordering::SeqCst) != 0 {
                std::process::exit(128 + signal);
            }
            eprintln!("xtask: interrupted, stopping what was started");
            thread::spawn(move || {
                let until = Instant::now() + CLEANUP;
                while Instant::now() < until {
                    end_descendants();
                    thread::sleep(POLL);
                }
                std::process::exit(128 + signal);
            });
        }
    })?;
    Ok(())
}

/// Whether the user asked to stop; loops over rounds and stages look at it between steps.
///
/// # Errors
/// When a signal has come.
pub(crate) fn check_interrupted() -> Result<()> {
    match interrupted_by() {
        None => Ok(()),
        Some(_) => bail!("interrupted"),
    }
}

/// The signal by which the user asked to stop.
pub(crate) fn interrupted_by() -> Option<i32> {
    Some(INTERRUPTED.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
}

/// One line of `/proc/PID/stat`, the fields used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stat {
    /// The process.
    pub(crate) pid: i32,
    /// Its parent now.
    pub(crate) parent: i32,
    /// `R`, `S`, `Z`...
    pub(crate) state: char,
    /// User and system time of the process and of the children it has reaped, in clock ticks.
    pub(crate) ticks: u64,
}

/// Parses one `/proc/PID/stat` line; the name in parentheses may hold anything, spaces included.
pub(crate) fn parse_stat(line: &str) -> Option<Stat> {
    let (pid, rest) = line.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    // proc_pid_stat(5) numbers from 1; state is 3, ppid 4, utime to cstime 14 to 17.
    let times: Vec<u64> = fields.skip(9).take(4).map_while(|time| time.parse().ok()).collect();
    if times.len() != 4 {
        return None;
    }
    Some(Stat { pid: pid.parse().ok()?, parent, state, ticks: times.iter().sum() })
}

/// Every process that can be read now.
fn all_processes() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter_map(|line| parse_stat(line.trim_end()))
        .collect()
}

/// `root` and all its descendants, parents before children.
pub(crate) fn tree(root: i32) -> Vec<Stat> {
    let mut by_parent: HashMap<i32, Vec<Stat>> = HashMap::new();
    let mut found = Vec::new();
    for stat in all_processes() {
        if stat.pid == root {
            found.push(stat);
        } else {
            by_parent.entry(stat.parent).or_default().push(stat);
        }
    }
    let mut next = 0;
    while next < found.len() {
        let pid = found[next].pid;
        found.extend(by_parent.remove(&pid).unwrap_or_default());
        next += 1;
    }
    found
}

/// All descendants of this chore that still run; zombies are left to whoever waits for them.
pub(crate) fn descendants() -> Vec<Stat> {
    let me = std::process::id().cast_signed();
    tree(me).into_iter().filter(|stat| stat.pid != me && stat.state != 'Z').collect()
}

/// A process's command line for a person, shortened.
pub(crate) fn command_line(pid: i32) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&raw).replace('\0', " ");
    text.trim().chars().take(120).collect()
}

/// Sends `signal` to `pid` through a pidfd; a process that is gone already is no error.
pub(crate) fn signal(pid: i32, signal: Signal) {
    let Some(pid) = Pid::from_raw(pid) else { return };
    if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) {
        // ESRCH: it ended between the two calls, which is what was wanted.
        let _ = pidfd_send_signal(fd, signal);
    }
}

/// Ends every descendant: SIGTERM, then SIGKILL for what is left after the grace period.
pub(crate) fn end_descendants() {
    end(descendants);
}

/// Ends `root` and all below it, the same way.
pub(crate) fn end_tree(root: i32) {
    end(|| tree(root).into_iter().filter(|stat| stat.state != 'Z').collect());
}

fn end(mut who: impl FnMut() -> Vec<Stat>) {
    let began = Instant::now();
    let mut asked = Vec::new();
    loop {
        let left = who();
        // Nothing survives SIGKILL for another grace period but a task stuck in the kernel.
        if left.is_empty() || began.elapsed() >= 2 * GRACE {
            return;
        }
        let late = began.elapsed() >= GRACE;
        for stat in &left {
            if late {
                signal(stat.pid, Signal::KILL);
            } else if !asked.contains(&stat.pid) {
                signal(stat.pid, Signal::TERM);
                asked.push(stat.pid);
            }
        }
        thread::sleep(POLL);
    }
}

/// Children that this chore started itself and waits for by name; the orphan reaper skips them.
static OWNED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn owned() -> MutexGuard<'static, BTreeSet<u32>> {
    // A panic of another thread cannot leave the set half-changed.
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reaps the orphans that a subreaper inherits, so that no test sees an eternal zombie.
///
/// Waits for any child without taking its status, then takes it only where nobody here owns the
/// child; holding the lock closes the gap between a start and its registration.
fn reap_orphans() -> ! {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    loop {
        let found = rustix::process::waitid(WaitId::All, look).ok().flatten();
        let Some(pid) = found.and_then(|_| orphan_zombie()) else {
            // No child at all, or one whose owner is about to wait for it.
            thread::sleep(POLL);
            continue;
        };
        // The answer is of no use; ECHILD cannot be, only this thread waits for orphans.
        let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
    }
}

/// A zombie child that nobody here owns.
fn orphan_zombie() -> Option<Pid> {
    let owned = owned();
    let me = std::process::id().cast_signed();
    all_processes()
        .into_iter()
        .find(|s| s.parent == me && s.state == 'Z' && !owned.contains(&s.pid.cast_unsigned()))
        .and_then(|stat| Pid::from_raw(stat.pid))
}

/// A child that this chore started; dropping it ends it and everything below it.
#[derive(Debug)]
pub(crate) struct Started {
    child: Child,
    done: Option<ExitStatus>,
}

impl Started {
    /// Its process id, valid while this value lives: it is not reaped before.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Its standard output, once, where it was piped.
    pub(crate) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Its standard error, once, where it was piped.
    pub(crate) fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// When waiting itself fails.
    pub(crate) fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.done.is_none() {
            self.done = self.child.try_wait().context("wait for a child")?;
            if self.done.is_some() {
                owned().remove(&self.child.id());
            }
        }
        Ok(self.done)
    }

    /// Waits for it, ending its tree when `limit` has passed; `None` says that this was needed.
    ///
    /// # Errors
    /// When waiting itself fails.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.poll()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                self.end();
                return Ok(None);
            }
            thread::sleep(POLL);
        }
    }

    /// Ends it and everything below it, politely first.
    pub(crate) fn end(&mut self) {
        if matches!(self.poll(), Ok(Some(_))) {
            return;
        }
        end_tree(self.pid());
        self.done = self.child.wait().ok();
        owned().remove(&self.child.id());
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts a command and names it when that fails.
///
/// # Errors
/// No such program, no permission, no memory; or the user interrupted.
pub(crate) fn start(command: &mut Command) -> Result<Started> {
    check_interrupted()?;
    let name = command.get_program().to_string_lossy().into_owned();
    let mut owned = owned();
    let child = command.spawn().with_context(|| format!("start {name}"))?;
    owned.insert(child.id());
    Ok(Started { child, done: None })
}

/// How a limited run ended.
#[derive(Debug)]
pub(crate) struct Run {
    /// Exit status; `None` when the limit ran out and the tree was ended.
    pub(crate) status: Option<ExitStatus>,
    /// Standard output, where it was captured.
    pub(crate) stdout: String,
    /// Standard error, where it was captured.
    pub(crate) stderr: String,
}

impl Run {
    /// Whether the program ended by itself with code 0.
    pub(crate) fn ok(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// One line that says how it ended, with the last thing it complained about.
    pub(crate) fn complaint(&self) -> String {
        let how = describe(self.status);
        let last = self.stderr.lines().chain(self.stdout.lines()).rfind(|l| !l.trim().is_empty());
        match last {
            Some(line) => format!("{how}: {}", line.trim()),
            None => how,
        }
    }
}

/// Exit code or signal in words.
pub(crate) fn describe(status: Option<ExitStatus>) -> String {
    match status {
        None => "ran into its time limit".into(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "unknown exit".into(),
        },
    }
}

/// Runs a command quietly and returns what it printed.
///
/// # Errors
/// When it cannot be started. A non-zero exit and a passed limit are in the result.
pub(crate) fn capture(mut command: Command, limit: Duration) -> Result<Run> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = start(&mut command)?;
    let stdout = collect(child.stdout());
    let stderr = collect(child.stderr());
    let status = child.wait(limit)?;
    Ok(Run { status, stdout: stdout(), stderr: stderr() })
}

/// Which of a command's two outputs a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// Runs a command and gives each line of its two outputs to `each_line` as it comes.
///
/// # Errors
/// As [`capture`], and when processes that it left behind keep its output open: they are named and ended.
pub(crate) fn stream(
    mut command: Command,
    limit: Duration,
    mut each_line: impl FnMut(Output, &str),
) -> Result<Run> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = start(&mut command)?;
    let (lines, received) = mpsc::channel();
    read_lines(child.stdout(), Output::Out, lines.clone());
    read_lines(child.stderr(), Output::Err, lines);
    let until = Instant::now() + limit;
    let mut ended: Option<(Option<ExitStatus>, Instant)> = None;
    loop {
        match received.recv_timeout(POLL) {
            Ok((output, line)) => each_line(output, &line),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        match ended {
            None => {
                if let Some(status) = child.poll()? {
                    ended = Some((Some(status), Instant::now()));
                } else if Instant::now() >= until {
                    child.end();
                    ended = Some((None, Instant::now()));
                }
            }
            Some((_, when)) if when.elapsed() >= OUTPUT_LIMIT => {
                let name = |stat: &Stat| format!("{} {}", stat.pid, command_line(stat.pid));
                let left: Vec<String> = descendants().iter().map(name).collect();
                end_descendants();
                bail!("processes left behind hold its output: {}", left.join("; "));
            }
            Some(_) => {}
        }
    }
    let status = match ended {
        Some((status, _)) => status,
        None => child.wait(until.saturating_duration_since(Instant::now()))?,
    };
    Ok(Run { status, stdout: String::new(), stderr: String::new() })
}

/// Sends a pipe's lines until it ends, from a thread of its own.
fn read_lines(
    pipe: Option<impl Read + Send + 'static>,
    output: Output,
    lines: mpsc::Sender<(Output, String)>,
) {
    thread::spawn(move || {
        for line in pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n')).flatten() {
            let line = String::from_utf8_lossy(&line).into_owned();
            if lines.send((output, line)).is_err() {
                return;
            }
        }
    });
}

/// Reads a pipe to its end on a thread, so that a full pipe never blocks the child.
///
/// The answer waits a moment only: a detached grandchild may hold the pipe open for ever.
fn collect(pipe: Option<impl Read + Send + 'static>) -> impl FnOnce() -> String {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = [0; 8192];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    move || {
        let mut all = Vec::new();
        while let Ok(part) = receiver.recv_timeout(Duration::from_millis(200)) {
            all.extend(part);
        }
        String::from_utf8_lossy(&all).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_line_with_parentheses_and_spaces_in_the_name_is_read() {
        let line = "42 (a) b (c) S 7 42 42 0 -1 4194304 100 0 0 0 10 20 3 4 20 0 1 0 55 0 0";
        let expected = Stat { pid: 42, parent: 7, state: 'S', ticks: 37 };
        assert_eq!(parse_stat(line), Some(expected));
    }

    #[test]
    fn short_stat_line_is_refused() {
        assert_eq!(parse_stat("42 (a) S 7 42"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn tree_of_this_process_starts_with_it_and_holds_its_child() {
        let me = std::process::id().cast_signed();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pids: Vec<i32> = tree(me).iter().map(|stat| stat.pid).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(pids[0], me);
        assert!(pids.contains(&child.id().cast_signed()));
    }

    #[test]
    fn run_past_its_limit_is_ended_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 60 & echo $!; wait"]);
        let run = capture(command, Duration::from_millis(300)).unwrap();
        assert!(run.status.is_none());
        let grandchild: i32 = run.stdout.trim().parse().unwrap();
        let gone = tree(grandchild).iter().all(|stat| stat.state == 'Z');
        assert!(gone, "the grandchild still runs");
    }

    #[test]
    fn complaint_names_the_exit_and_the_last_line() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo second >&2; exit 3"]);
        let run = capture(command, Duration::from_secs(20)).unwrap();
        assert_eq!(run.complaint(), "exit code 3: second");
    }
}
