//! The builder: everything that can be said about a child before it exists, and its translation for the spawner.
//!
//! It checks all of it before anything is started, so that an error names what is wrong and where. Watching what was
//! started is the business of `child`, collecting output that of `exec` and `sync`.
//!
//! The rule that surprises: a command can be started again, but a descriptor given to it by value went to the first
//! child; the second start is refused and says so.
//!
//! References: Node `lib/child_process.js` (`normalizeSpawnArguments`), std's `process::Command`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork_sys::spawn::{Cgroup, Command as SysCommand};
use tokio_util::sync::CancellationToken;

use super::child::Child;
use super::{Signal, SpawnError, Stdio};

/// The number that means "leave it" to the kernel's calls.
const NOBODY: u32 = u32::MAX;

/// Which shell reads the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shell {
    /// `/bin/sh`.
    Default,
    /// This one, called with `-c` and the line; a path, or a name that is searched in the child's `PATH`.
    Program(OsString),
}

impl Shell {
    fn program(&self) -> &OsStr {
        match self {
            Shell::Default => OsStr::new("/bin/sh"),
            Shell::Program(program) => program,
        }
    }
}

impl From<&str> for Shell {
    fn from(program: &str) -> Self {
        Shell::Program(program.into())
    }
}

/// A slot as the builder keeps it.
#[derive(Debug)]
enum Slot {
    Given(Stdio),
    /// Its descriptor went to an earlier child.
    Spent,
}

/// What watches over a child, apart from its exit.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) timeout: Option<Duration>,
    pub(super) kill_signal: Signal,
    pub(super) abort: Option<CancellationToken>,
    pub(super) kill_on_drop: bool,
}

/// A process to be started, with Node's options under the names of the standard library.
///
/// It begins with this process' environment, working directory and standard streams, as `std::process::Command` does
/// (Node begins with pipes: see [`piped`](Self::piped)). Nothing else is inherited: every descriptor not named here is
/// closed in the child, whatever its flags.
///
/// # Examples
///
/// ```
/// use polyfork::child_process::{Command, Stdio};
/// use tokio::io::AsyncReadExt;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut child = Command::new("echo").arg("hello").stdout(Stdio::Pipe).spawn()?;
/// let mut text = String::new();
/// child.stdout.take().expect("asked for").read_to_string(&mut text).await?;
/// assert_eq!(text, "hello\n");
/// assert!(child.wait().await?.success());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Command {
    program: OsString,
    args: Vec<OsString>,
    arg0: Option<OsString>,
    clear: bool,
    /// In the order of their names; `None` takes one out of what is inherited.
    env: BTreeMap<OsString, Option<OsString>>,
    pid_env: Option<OsString>,
    directory: Option<PathBuf>,
    slots: BTreeMap<u32, Slot>,
    /// Where `fork` is to put the channel.
    channel: Option<u32>,
    shell: Option<Shell>,
    session: bool,
    group: bool,
    uid: Option<u32>,
    gid: Option<u32>,
    groups: Option<Vec<u32>>,
    umask: Option<u32>,
    death_signal: Option<Signal>,
    own_cgroup: bool,
    limits: Limits,
}

impl Command {
    /// A command for `program`: a path if it contains a slash, else a name that is searched in the `PATH` of the
    /// *child's* environment. A relative path is taken from the child's working directory.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let limits =
            Limits { timeout: None, kill_signal: Signal::TERM, abort: None, kill_on_drop: false };
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            arg0: None,
            clear: false,
            env: BTreeMap::new(),
            pid_env: None,
            directory: None,
            slots: BTreeMap::new(),
            channel: None,
            shell: None,
            session: false,
            group: false,
            uid: None,
            gid: None,
            groups: None,
            umask: None,
            death_signal: None,
            own_cgroup: false,
            limits,
        }
    }

    /// Adds one argument. It reaches the program as it is, blanks and quotes included, unless a
    /// [`shell`](Self::shell) is asked for.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// What the program sees as its own name (Node: `argv0`; default: the program as given).
    pub fn arg0(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.arg0 = Some(name.as_ref().to_owned());
        self
    }

    /// Sets one variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.env.insert(key.as_ref().to_owned(), Some(value.as_ref().to_owned()));
        self
    }

    /// Sets variables.
    pub fn envs(
        &mut self,
        vars: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> &mut Self {
        for (key, value) in vars {
            self.env(key, value);
        }
        self
    }

    /// Takes one variable out.
    pub fn env_remove(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.env.insert(key.as_ref().to_owned(), None);
        self
    }

    /// Starts from an empty environment instead of this process', and forgets what was set so far.
    ///
    /// What this process inherits is looked at when the child is started. The variables by which this process knows
    /// its *own* channel (`NODE_CHANNEL_FD` and the like) are never passed on, unless set here by name.
    pub fn env_clear(&mut self) -> &mut Self {
        self.clear = true;
        self.env.clear();
        self
    }

    /// The child's own process id in a variable.
    pub(crate) fn pid_env(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.pid_env = Some(key.as_ref().to_owned());
        self
    }

    /// The child's working directory (Node: `cwd`). An empty path means this process' own.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        let path = path.as_ref();
        self.directory = (!path.as_os_str().is_empty()).then(|| path.to_owned());
        self
    }

    /// What the child finds as its standard input; inherited by default.
    pub fn stdin(&mut self, what: impl Into<Stdio>) -> &mut Self {
        self.stdio(0, what)
    }

    /// What the child finds as its standard output; inherited by default.
    pub fn stdout(&mut self, what: impl Into<Stdio>) -> &mut Self {
        self.stdio(1, what)
    }

    /// What the child finds as its standard error; inherited by default.
    pub fn stderr(&mut self, what: impl Into<Stdio>) -> &mut Self {
        self.stdio(2, what)
    }

    /// What the child finds under descriptor number `slot`. Slots may be set in any order and with gaps; setting one
    /// again replaces it. Our end of a [`Stdio::Pipe`] beyond 2 is in [`Child::stdio`].
    pub fn stdio(&mut self, slot: u32, what: impl Into<Stdio>) -> &mut Self {
        let what = what.into();
        match (&what, self.channel) {
            (Stdio::Channel, _) => self.channel = Some(slot),
            (_, Some(channel)) if channel == slot => self.channel = None,
            _ => {}
        }
        self.slots.insert(slot, Slot::Given(what));
        self
    }

    /// Pipes in slots 0 to 2, which is how Node's `spawn` begins.
    pub fn piped(&mut self) -> &mut Self {
        self.stdin(Stdio::Pipe).stdout(Stdio::Pipe).stderr(Stdio::Pipe)
    }

    /// Lets a shell read the program and its arguments as one line, joined by blanks *without quotes*.
    ///
    /// # Security
    ///
    /// A shell runs whatever the line says: with any part of it from outside, `; rm -rf ~` in a file's name is a
    /// command. Never use it with input you do not control; without a shell, arguments need no quotes and
    /// cannot be misread.
    pub fn shell(&mut self, shell: impl Into<Shell>) -> &mut Self {
        self.shell = Some(shell.into());
        self
    }

    /// Makes the child leader of a new session (Node: `detached`): away from our terminal, and in a group of its own. It
    /// runs on when this process ends, as every child does that nobody kills.
    pub fn detached(&mut self, yes: bool) -> &mut Self {
        self.session = yes;
        self
    }

    /// Makes the child leader of a process group of its own: Ctrl-C in our terminal does not reach it, and
    /// [`Child::kill_tree`] reaches what it starts.
    pub fn process_group(&mut self, yes: bool) -> &mut Self {
        self.group = yes;
        self
    }

    /// Puts the child into a control group of its own (version 2, below this process' group), for
    /// [`Child::kill_tree`] to end all it has started, also what left its process group. The group goes away
    /// with the last process in it, as long as the runtime lives.
    ///
    /// Needs root or a delegated group (systemd: `Delegate=yes`) and Linux 5.14; without, the start fails with
    /// [`SpawnError::Cgroup`].
    pub fn own_cgroup(&mut self, yes: bool) -> &mut Self {
        self.own_cgroup = yes;
        self
    }

    /// The user the child runs as. Unless [`groups`](Self::groups) are given, it has no supplementary groups then.
    pub fn uid(&mut self, uid: u32) -> &mut Self {
        self.uid = Some(uid);
        self
    }

    /// The group the child runs as.
    pub fn gid(&mut self, gid: u32) -> &mut Self {
        self.gid = Some(gid);
        self
    }

    /// The child's supplementary groups, exactly these.
    pub fn groups(&mut self, groups: &[u32]) -> &mut Self {
        self.groups = Some(groups.to_vec());
        self
    }

    /// The child's file mode creation mask (lowest nine bits).
    pub fn umask(&mut self, mask: u32) -> &mut Self {
        self.umask = Some(mask);
        self
    }

    /// The signal the kernel sends the child when this *process* ends, however it ends; `None`, the default, lets it
    /// live on. Named signals only, no real-time ones.
    pub fn parent_death_signal(&mut self, signal: impl Into<Option<Signal>>) -> &mut Self {
        self.death_signal = signal.into();
        self
    }

    /// Sends the child the [`kill_signal`](Self::kill_signal) if it still runs after `limit`, counted from the start. Zero
    /// means no limit, as in Node. It ends by the signal then, or not, if it ignores it.
    pub fn timeout(&mut self, limit: Duration) -> &mut Self {
        self.limits.timeout = (!limit.is_zero()).then_some(limit);
        self
    }

    /// The signal for time limit, abort and drop; SIGTERM by default.
    pub fn kill_signal(&mut self, signal: Signal) -> &mut Self {
        self.limits.kill_signal = signal;
        self
    }

    /// Sends the child the [`kill_signal`](Self::kill_signal) when `token` is cancelled (Node: `signal`). Cancelled before the
    /// start, nothing is started; cancelled after the end, nothing happens.
    pub fn abort(&mut self, token: CancellationToken) -> &mut Self {
        self.limits.abort = Some(token);
        self
    }

    /// Whether dropping the [`Child`] sends it the [`kill_signal`](Self::kill_signal). Off by default: it runs on,
    /// and is collected when it ends.
    pub fn kill_on_drop(&mut self, yes: bool) -> &mut Self {
        self.limits.kill_on_drop = yes;
        self
    }

    /// Starts it. When this returns, the program runs.
    ///
    /// Must be called inside a tokio runtime: a task of that runtime collects the child, whether or not anybody waits
    /// for it.
    ///
    /// # Blocking
    ///
    /// Blocks for tens to hundreds of microseconds until the child has called exec, however much memory this process
    /// uses: no page table is copied. There is no `.await` in it, so it cannot be cancelled half-way.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]; where Node has an `error` event for a child that never ran, this has an error and no child.
    ///
    /// # Panics
    ///
    /// As tokio does, if the runtime was built without I/O, or without time and there is a [`timeout`](Self::timeout).
    pub fn spawn(&mut self) -> Result<Child, SpawnError> {
        Child::start(self)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    pub(super) fn leads_a_group(&self) -> bool {
        self.session || self.group
    }

    /// For commands whose program is worked out when they are started.
    pub(super) fn set_program(&mut self, program: OsString, args: Vec<OsString>) {
        self.program = program;
        self.args = args;
    }

    /// The child's working directory, if it is not ours.
    pub(super) fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Puts the child's end of its channel where it was asked for, or else into slot `default`; gives the slot.
    pub(super) fn place_channel(&mut self, theirs: OwnedFd, default: u32) -> u32 {
        let slot = self.channel.unwrap_or(default);
        self.slots.insert(slot, Slot::Given(Stdio::Fd(theirs)));
        slot
    }

    /// Fills a slot nobody has said anything about.
    pub(super) fn default_stdio(&mut self, slot: u32, what: Stdio) {
        self.slots.entry(slot).or_insert(Slot::Given(what));
    }

    /// The program as messages show it.
    pub(super) fn shown_program(&self) -> String {
        self.program.display().to_string()
    }

    /// The whole line as messages show it.
    pub(super) fn shown_line(&self) -> String {
        self.line().display().to_string()
    }

    fn line(&self) -> OsString {
        let mut line = self.program.clone();
        for arg in &self.args {
            line.push(" ");
            line.push(arg);
        }
        line
    }

    pub(super) fn invalid(&self, reason: impl Into<String>) -> SpawnError {
        SpawnError::Invalid { program: self.shown_program(), reason: reason.into() }
    }

    /// Looks at everything that can be wrong before anything is made.
    pub(super) fn check(&self) -> Result<(), SpawnError> {
        self.check_texts()?;
        self.check_numbers()?;
        for (slot, what) in &self.slots {
            if matches!(what, Slot::Spent) {
                let text = format!("stdio slot {slot}: its descriptor went to an earlier child");
                return Err(self.invalid(text));
            }
            if matches!(what, Slot::Given(Stdio::Channel)) {
                let text = format!(
                    "stdio slot {slot}: only a forked program has a channel, and it has only one"
                );
                return Err(self.invalid(text));
            }
            if i32::try_from(*slot).is_err() {
                return Err(self.invalid(format!("stdio slot {slot}: no such descriptor number")));
            }
        }
        if self.limits.abort.as_ref().is_some_and(CancellationToken::is_cancelled) {
            return Err(SpawnError::Aborted { program: self.shown_program() });
        }
        Ok(())
    }

    fn check_texts(&self) -> Result<(), SpawnError> {
        if self.program.is_empty() {
            return Err(self.invalid("the program's name is empty"));
        }
        let mut texts: Vec<(String, &OsStr)> =
            vec![("the program's name".to_owned(), &self.program)];
        texts.extend(
            self.args
                .iter()
                .zip(1..)
                .map(|(arg, nth): (_, u32)| (format!("argument {nth}"), arg.as_os_str())),
        );
        texts.extend(self.arg0.as_deref().map(|name| ("arg0".to_owned(), name)));
        let directory = self.directory.as_ref().map(|path| path.as_os_str());
        texts.extend(directory.map(|path| ("the working directory".to_owned(), path)));
        if let Some(shell) = &self.shell {
            if shell.program().is_empty() {
                return Err(self.invalid("the shell's name is empty"));
            }
            texts.push(("the shell's name".to_owned(), shell.program()));
        }
        for (key, value) in &self.env {
            let name = key.display();
            if key.is_empty() || key.as_bytes().contains(&b'=') {
                return Err(self.invalid(format!("\"{name}\" cannot name a variable")));
            }
            texts.push((format!("the name of variable {name:?}"), key));
            texts.extend(value.as_deref().map(|value| (format!("variable {name}"), value)));
        }
        match texts.iter().find(|(_, text)| text.as_bytes().contains(&0)) {
            Some((what, _)) => Err(self.invalid(format!("{what} contains a NUL byte"))),
            None => Ok(()),
        }
    }

    fn check_numbers(&self) -> Result<(), SpawnError> {
        if self.limits.kill_signal == Signal::NONE {
            return Err(self.invalid("kill signal 0 would kill nobody"));
        }
        // The kernel takes this number for "leave it", so the child would keep our standing.
        for (what, id) in [("user", self.uid), ("group", self.gid)] {
            if id == Some(NOBODY) {
                return Err(self.invalid(format!("{NOBODY} is no {what}")));
            }
        }
        if self.groups.iter().flatten().any(|group| *group == NOBODY) {
            return Err(self.invalid(format!("{NOBODY} is no supplementary group")));
        }
        match self.death_signal {
            Some(signal) if named(signal).is_none() => {
                Err(self.invalid(format!("{signal} cannot be a parent death signal")))
            }
            _ => Ok(()),
        }
    }

    /// Makes what the child needs and puts it together. Descriptors given by value are spent.
    pub(super) fn prepare(&mut self) -> Result<Prepared, SpawnError> {
        self.check()?;
        let mut sys = match &self.shell {
            None => {
                let mut sys = SysCommand::new(&self.program);
                sys.args(&self.args);
                sys
            }
            Some(shell) => {
                let mut sys = SysCommand::new(shell.program());
                sys.arg("-c").arg(self.line());
                sys
            }
        };
        self.describe(&mut sys);
        let cgroup = self.cgroup(&mut sys)?;
        let ends = self.place_slots(&mut sys)?;
        Ok(Prepared { sys, ends, cgroup })
    }

    fn describe(&self, sys: &mut SysCommand) {
        if let Some(name) = &self.arg0 {
            sys.arg0(name);
        }
        if self.clear {
            sys.env_clear();
        }
        for name in crate::process::NOT_INHERITED {
            sys.env_remove(name);
        }
        for (key, value) in &self.env {
            match value {
                Some(value) => sys.env(key, value),
                None => sys.env_remove(key),
            };
        }
        if let Some(key) = &self.pid_env {
            sys.pid_env(key);
        }
        if let Some(path) = &self.directory {
            sys.current_dir(path);
        }
        if let Some(uid) = self.uid {
            sys.uid(uid);
        }
        if let Some(gid) = self.gid {
            sys.gid(gid);
        }
        if let Some(groups) = &self.groups {
            sys.groups(groups);
        }
        if let Some(mask) = self.umask {
            sys.umask(mask);
        }
        sys.new_session(self.session).process_group(self.group);
        sys.parent_death_signal(self.death_signal.and_then(named));
    }

    fn cgroup(&self, sys: &mut SysCommand) -> Result<Option<Cgroup>, SpawnError> {
        if !self.own_cgroup {
            return Ok(None);
        }
        let made = Cgroup::create().and_then(|group| Ok((group.door()?, group)));
        let (door, group) =
            made.map_err(|source| SpawnError::Cgroup { program: self.shown_program(), source })?;
        sys.enter_cgroup(door);
        Ok(Some(group))
    }

    fn place_slots(&mut self, sys: &mut SysCommand) -> Result<Ends, SpawnError> {
        let program = self.shown_program();
        let mut ends = Ends::default();
        for (slot, kept) in &mut self.slots {
            let Slot::Given(what) = kept else { continue };
            // Checked before: a number fits.
            let number = i32::try_from(*slot).unwrap_or(i32::MAX);
            let failed =
                |source| SpawnError::Stdio { program: program.clone(), slot: *slot, source };
            match what {
                Stdio::Inherit => drop(sys.inherit_fd(number)),
                Stdio::Ignore if number <= 2 => drop(sys.null(number)),
                // A channel was checked for before.
                Stdio::Ignore | Stdio::Channel => {}
                Stdio::Pipe => {
                    let theirs = ends.pipe(*slot).map_err(failed)?;
                    sys.fd(number, theirs);
                }
                Stdio::Fd(_) => {
                    let Slot::Given(Stdio::Fd(fd)) = std::mem::replace(kept, Slot::Spent) else {
                        continue;
                    };
                    if number <= 2 {
                        polyfork_sys::channel::set_nonblocking(fd.as_fd(), false)
                            .map_err(failed)?;
                    }
                    sys.fd(number, fd);
                }
            }
        }
        Ok(ends)
    }
}

/// A signal as the spawner takes it.
fn named(signal: Signal) -> Option<rustix::process::Signal> {
    rustix::process::Signal::from_named_raw(signal.number())
}

/// A command ready for the spawner, and what stays here.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) sys: SysCommand,
    pub(super) ends: Ends,
    pub(super) cgroup: Option<Cgroup>,
}

/// Our ends of the pipes made for a child.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) beyond: BTreeMap<u32, OwnedFd>,
}

impl Ends {
    /// Makes a pipe for `slot`, keeps our end and gives the child's.
    fn pipe(&mut self, slot: u32) -> std::io::Result<OwnedFd> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType};
        if slot > 2 {
            let flags = SocketFlags::CLOEXEC;
            let (ours, theirs) =
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            self.beyond.insert(slot, ours);
            return Ok(theirs);
        }
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (ours, theirs, place) = match slot {
            0 => (writer, reader, &mut self.stdin),
            1 => (reader, writer, &mut self.stdout),
            _ => (reader, writer, &mut self.stderr),
        };
        *place = Some(ours);
        Ok(theirs)
    }
}
