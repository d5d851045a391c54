//! Starts processes: fast whatever the parent's size, and with nothing in the child but what was asked for.
//!
//! A [`Command`] is plain data. [`Command::spawn`] turns it into a plan (in `plan`: every string, every
//! descriptor move, every candidate path) and clones a child (`thread`) that shares our memory until it
//! execs (`child`). Supervision, time limits and
//! restarts are not decided here.
//!
//! What the child is promised: an empty signal mask, every signal at its default, only the descriptors
//! given to it, and, when exec fails, an error here instead of a process that dies with 127.
//!
//! The one surprising rule: children with a parent-death signal are started by the main thread, or else by one thread
//! that never ends. `PR_SET_PDEATHSIG` fires when the *thread* that forked ends, not the process; from a pool thread it
//! would kill a healthy child, and from any thread but the main one it does when this process replaces itself by exec.
//! What a child inherits from a thread (processor affinity, priority, namespaces) such a child has from the thread that
//! starts it: the main one, or whoever made the first spawn of that kind; any other has it from its caller.
//!
//! Behaviour follows: clone(2) (`CLONE_VM`, `CLONE_VFORK`, `CLONE_PIDFD`), prctl(2), close_range(2),
//! execvp(3) for the path search, libuv's `uv_spawn` for the order of the steps.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::process::{Pid, Signal};

use crate::errno;
use crate::wait::{self, Target};

mod cgroup;
mod child;
mod plan;
mod signal;
mod thread;

pub use cgroup::Cgroup;
pub use signal::{MAX_SIGNAL, send_group_signal, send_signal};

/// Where a descriptor of the child comes from.
#[derive(Debug)]
enum Source {
    Owned(OwnedFd),
    Inherit,
    Null,
}

/// A process to be started.
///
/// Starts from a copy of this process' environment, its working directory and its standard
/// descriptors. Everything else is closed in the child.
///
/// # Examples
///
/// ```
/// use polyfork_sys::spawn::Command;
///
/// let mut command = Command::new("sh");
/// command.arg("-c").arg("exit 3");
/// let child = command.spawn()?;
/// let status = child.wait()?;
/// assert_eq!(status.code(), Some(3));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Command {
    program: OsString,
    arg0: Option<OsString>,
    args: Vec<OsString>,
    env: BTreeMap<OsString, OsString>,
    directory: Option<PathBuf>,
    fds: BTreeMap<i32, Source>,
    process_group: bool,
    new_session: bool,
    death_signal: Option<Signal>,
    pid_env: Option<OsString>,
    uid: Option<u32>,
    gid: Option<u32>,
    groups: Option<Vec<u32>>,
    umask: Option<u32>,
    cgroups: Vec<OwnedFd>,
}

impl Command {
    /// A command for `program`: a path when it contains a slash, else a name that is searched in the
    /// `PATH` of the *child's* environment (`/usr/bin:/bin` when that has none).
    ///
    /// A relative path is taken from the child's working directory.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arg0: None,
            args: Vec::new(),
            env: std::env::vars_os().collect(),
            directory: None,
            fds: BTreeMap::new(),
            process_group: false,
            new_session: false,
            death_signal: None,
            pid_env: None,
            uid: None,
            gid: None,
            groups: None,
            umask: None,
            cgroups: Vec::new(),
        }
    }

    /// The program as it was given.
    pub fn program(&self) -> &OsStr {
        &self.program
    }

    /// Adds one argument. It reaches the program as it is: no shell reads it.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// What the program sees as its own name (default: the program as given).
    pub fn arg0(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.arg0 = Some(name.as_ref().to_owned());
        self
    }

    /// Empties the environment, including what was copied from this process.
    pub fn env_clear(&mut self) -> &mut Self {
        self.env.clear();
        self
    }

    /// Sets one variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.insert(key.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Removes one variable.
    pub fn env_remove(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.env.remove(key.as_ref());
        self
    }

    /// Sets several variables.
    pub fn envs(
        &mut self,
        vars: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> &mut Self {
        for (key, value) in vars {
            self.env(key, value);
        }
        self
    }

    /// The value the child will see for `key`, as things stand.
    pub fn get_env(&self, key: impl AsRef<OsStr>) -> Option<&OsStr> {
        self.env.get(key.as_ref()).map(OsString::as_os_str)
    }

    /// The child's working directory. Entered before user and group change.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.directory = Some(path.as_ref().to_owned());
        self
    }

    /// Lets `source` appear as descriptor number `target` in the child, open across exec.
    ///
    /// Any numbers may be used in any combination, also such where one command's sources carry the
    /// numbers of its targets. Setting a target twice keeps the later. The descriptor's status flags
    /// (such as `O_NONBLOCK`) are shared with the copy here and are left alone.
    pub fn fd(&mut self, target: i32, source: OwnedFd) -> &mut Self {
        self.fds.insert(target, Source::Owned(source));
        self
    }

    /// Leaves descriptor `target` as it is here, close-on-exec cleared. This is the default for 0, 1
    /// and 2, where a closed one stays closed; asked for by name, a closed one is an error.
    pub fn inherit_fd(&mut self, target: i32) -> &mut Self {
        self.fds.insert(target, Source::Inherit);
        self
    }

    /// Opens `/dev/null` for reading and writing as descriptor `target`.
    pub fn null(&mut self, target: i32) -> &mut Self {
        self.fds.insert(target, Source::Null);
        self
    }

    /// Makes the child leader of a new process group (`setpgid(0, 0)`), away from the terminal's Ctrl-C.
    pub fn process_group(&mut self, yes: bool) -> &mut Self {
        self.process_group = yes;
        self
    }

    /// Makes the child leader of a new session (`setsid()`), and with it of a new process group.
    pub fn new_session(&mut self, yes: bool) -> &mut Self {
        self.new_session = yes;
        self
    }

    /// The signal the kernel sends the child when this process ends, however it ends.
    ///
    /// Should this process end before that is arranged, the child exits instead of running on. The
    /// kernel forgets the wish when the program is set-user-ID or has file capabilities.
    pub fn parent_death_signal(&mut self, signal: Option<Signal>) -> &mut Self {
        self.death_signal = signal;
        self
    }

    /// Puts the child's own process id into variable `key`, in decimal, as `LISTEN_PID` wants it. For one variable:
    /// a second call replaces the first.
    pub fn pid_env(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.pid_env = Some(key.as_ref().to_owned());
        self
    }

    /// The user the child runs as (real, effective and saved).
    ///
    /// Unless [`groups`](Self::groups) are given, the supplementary groups of this process are dropped
    /// with it; without the right to do that the spawn fails, except where there is nothing to drop.
    pub fn uid(&mut self, uid: u32) -> &mut Self {
        self.uid = Some(uid);
        self
    }

    /// The group the child runs as (real, effective and saved).
    pub fn gid(&mut self, gid: u32) -> &mut Self {
        self.gid = Some(gid);
        self
    }

    /// The child's supplementary groups, exactly.
    pub fn groups(&mut self, groups: &[u32]) -> &mut Self {
        self.groups = Some(groups.to_vec());
        self
    }

    /// The child's file mode creation mask (lowest nine bits).
    pub fn umask(&mut self, mask: u32) -> &mut Self {
        self.umask = Some(mask & 0o777);
        self
    }

    /// Lets the child enter a control group before it does anything else of its own: `door` is the group's
    /// `cgroup.procs`, open for writing ([`Cgroup::door`], [`doors`](crate::system::LimitGroup::doors)). Once for each
    /// hierarchy.
    pub fn enter_cgroup(&mut self, door: OwnedFd) -> &mut Self {
        self.cgroups.push(door);
        self
    }

    /// Starts the process. When this returns, the program has been executed (or killed by a signal).
    ///
    /// The descriptors given with [`fd`](Self::fd) are closed here in either case.
    ///
    /// # Blocking
    ///
    /// Blocks until the child has called exec: tens to hundreds of microseconds, independent of how much memory
    /// this process uses. With a [parent-death signal](Self::parent_death_signal), calls from several threads are
    /// carried out one after the other.
    ///
    /// # Errors
    ///
    /// [`SpawnError`] says which step failed. No process and no zombie is left behind then.
    pub fn spawn(self) -> Result<Child, SpawnError> {
        thread::spawn(Box::new(plan::Plan::new(self)?))
    }
}

/// A process started by [`Command::spawn`].
///
/// Known by its pidfd, so a signal never reaches a stranger that got the same number later. Dropping
/// it neither ends nor collects the process: without [`try_wait`](Self::try_wait) it stays as a zombie
/// once it has ended, until this process ends or [`crate::system::reap_strangers`] takes it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    /// Its process id, for people and for files under `/proc`.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The pidfd (close-on-exec). Becomes readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Takes the handle apart.
    pub fn into_pidfd(self) -> (Pid, OwnedFd) {
        (self.pid, self.pidfd)
    }

    /// Puts together again what [`into_pidfd`](Self::into_pidfd) took apart.
    pub fn from_pidfd(pid: Pid, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd }
    }

    /// Sends a signal.
    ///
    /// # Errors
    ///
    /// `ESRCH`: the process has ended and was collected. A zombie takes a signal without effect.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// Collects the process if it has ended, without waiting.
    ///
    /// # Errors
    ///
    /// `ECHILD` (see [`is_unknown_child`]): somebody else in this process collected it, its status is lost.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        try_wait(self.pidfd())
    }

    /// Waits until the process has ended and collects it. Blocks.
    ///
    /// # Errors
    ///
    /// As [`try_wait`](Self::try_wait).
    pub fn wait(&self) -> io::Result<ExitStatus> {
        let report = wait::wait(Target::PidFd(self.pidfd()), libc::WEXITED)?;
        report.map(wait::Report::status).ok_or_else(|| io::Error::from_raw_os_error(libc::ECHILD))
    }

    /// The signal by which the process is stopped now, if it is. Leaves the report for others.
    ///
    /// # Errors
    ///
    /// `ECHILD`: it has been collected.
    pub fn try_wait_stopped(&self) -> io::Result<Option<i32>> {
        let options = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
        let report = wait::wait(Target::PidFd(self.pidfd()), options)?;
        Ok(report.and_then(wait::Report::stop_signal))
    }
}

/// Whether children with a parent-death signal run that were started by a thread which exec(2) would end: it would end them.
pub fn exec_ends_children() -> bool {
    thread::has_children()
}

/// [`Child::try_wait`] for a bare pidfd.
///
/// # Errors
///
/// `ECHILD`: not our child, or already collected.
pub fn try_wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<ExitStatus>> {
    let report = wait::wait(Target::PidFd(pidfd), libc::WEXITED | libc::WNOHANG)?;
    Ok(report.map(wait::Report::status))
}

/// Whether a wait failed because somebody else had collected the child.
pub fn is_unknown_child(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECHILD)
}

/// What was being done when a spawn failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Reading the command: a NUL byte in a string, `=` in a variable's name, a negative descriptor number.
    Input,
    /// Reaching the thread that starts children.
    Thread,
    /// `clone(2)`.
    Clone,
    /// `setsid(2)`.
    Session,
    /// `setpgid(2)`.
    Group,
    /// Entering the control group.
    Cgroup,
    /// Putting a descriptor in place; the number it should have had.
    Fd(i32),
    /// `chdir(2)`.
    Chdir,
    /// `setgroups(2)`.
    Groups,
    /// `setresgid(2)`.
    Gid,
    /// `setresuid(2)`.
    Uid,
    /// `prctl(PR_SET_PDEATHSIG)`.
    DeathSignal,
    /// Emptying the signal mask.
    SignalMask,
    /// `execve(2)`: not found, not permitted, not a program, too many arguments.
    Exec,
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub struct SpawnError {
    /// The step that failed.
    pub step: Step,
    /// Its error.
    #[source]
    pub errno: io::Error,
    /// The program as the command named it.
    pub program: OsString,
    /// The paths that were or would have been tried, in order.
    pub tried: Vec<PathBuf>,
    /// The working directory that was asked for.
    pub directory: Option<PathBuf>,
}

impl SpawnError {
    /// Whether the program was not found (as opposed to found and not startable).
    pub fn is_not_found(&self) -> bool {
        self.step == Step::Exec && self.errno.kind() == io::ErrorKind::NotFound
    }

    /// A remark that saves the reader a search, where one applies.
    fn remark(&self) -> Option<String> {
        let searched = !self.program.as_encoded_bytes().contains(&b'/');
        match self.errno.raw_os_error() {
            Some(libc::ENOENT) => match self.tried.iter().find(|path| path.exists()) {
                Some(path) => Some(format!(
                    "{} exists, but the interpreter or loader it names does not",
                    path.display()
                )),
                None if searched => Some(format!("looked in {}", self.folders())),
                None => None,
            },
            Some(libc::ENOEXEC) => {
                Some("neither an executable nor a script with a #! line".to_owned())
            }
            _ => None,
        }
    }

    fn folders(&self) -> String {
        let mut folders = Vec::new();
        for folder in self.tried.iter().filter_map(|path| path.parent()) {
            let name = folder.display().to_string();
            folders.push(if name.is_empty() { ".".to_owned() } else { name });
        }
        if folders.is_empty() { "an empty PATH".to_owned() } else { folders.join(", ") }
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot start \"{}\": ", self.program.display())?;
        match self.step {
            Step::Input | Step::Exec => {}
            Step::Thread => write!(f, "the thread that starts processes: ")?,
            Step::Clone => write!(f, "clone: ")?,
            Step::Session => write!(f, "new session: ")?,
            Step::Group => write!(f, "new process group: ")?,
            Step::Cgroup => write!(f, "enter control group: ")?,
            Step::Fd(number) => write!(f, "descriptor {number}: ")?,
            Step::Chdir => match &self.directory {
                Some(path) => write!(f, "working directory \"{}\": ", path.display())?,
                None => write!(f, "working directory: ")?,
            },
            Step::Groups => write!(f, "set groups: ")?,
            Step::Gid => write!(f, "set group: ")?,
            Step::Uid => write!(f, "set user: ")?,
            Step::DeathSignal => write!(f, "parent death signal: ")?,
            Step::SignalMask => write!(f, "signal mask: ")?,
        }
        write!(f, "{}", errno::text(&self.errno))?;
        match self.remark() {
            Some(remark) if self.step == Step::Exec => write!(f, " ({remark})"),
            _ => Ok(()),
        }
    }
}
