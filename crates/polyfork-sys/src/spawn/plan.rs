//! Everything about a spawn that can be worked out before the child exists.
//!
//! The child may not allocate, so each string, path and descriptor number it will need is laid out
//! here, in the caller's thread. A [`Plan`] is plain owned data; pointers into it are taken by `child`.
//!
//! Behaviour follows: execvp(3) for the search of the path.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use super::{Command, Source, SpawnError, Step};

/// Where programs are looked for when the child has no `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/bin:/bin";
/// Room for the digits of a process id (at most 4,194,304; an `i32` never needs more) and a NUL.
const PID_DIGITS: usize = 11;

/// One descriptor to be put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) source: i32,
    pub(super) target: i32,
    /// The source's number is somebody's target, so it must be copied out of the way first.
    pub(super) clashes: bool,
}

/// One descriptor that stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keep {
    pub(super) number: i32,
    /// Asked for by name: then it must be open.
    pub(super) required: bool,
}

/// The environment entry that holds the child's own pid.
#[derive(Debug)]
pub(super) struct PidEntry {
    /// `KEY=00000000000`, the zeros being digits, and a NUL.
    pub(super) bytes: Vec<u8>,
    /// Where the digits begin.
    pub(super) digits: usize,
}

/// What goes to which number.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    pub(super) moves: Vec<Move>,
    pub(super) keeps: Vec<Keep>,
    /// Inclusive ranges of numbers that must not survive exec.
    pub(super) closed: Vec<(u32, u32)>,
    /// Keeps the sources of `moves` open until the child is running.
    _sources: Vec<OwnedFd>,
}

/// Whom the child runs as.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) groups: Option<Vec<u32>>,
    /// `EPERM` from dropping groups is fine: there are none.
    pub(super) groups_optional: bool,
}

/// A spawn, laid out.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) candidates: Vec<CString>,
    pub(super) argv: Vec<CString>,
    pub(super) envp: Vec<CString>,
    pub(super) pid_entry: Option<PidEntry>,
    pub(super) directory: Option<CString>,
    pub(super) descriptors: Descriptors,
    pub(super) process_group: bool,
    pub(super) new_session: bool,
    /// Zero: none.
    pub(super) death_signal: i32,
    pub(super) identity: Identity,
    pub(super) umask: Option<u32>,
    /// The doors of the control groups to enter.
    pub(super) cgroups: Vec<OwnedFd>,
    program: OsString,
    working_directory: Option<PathBuf>,
}

/// What is wrong with a command.
type Fault = (Step, io::Error);

impl Plan {
    pub(super) fn new(mut command: Command) -> Result<Self, SpawnError> {
        let fds = std::mem::take(&mut command.fds);
        let cgroups = std::mem::take(&mut command.cgroups);
        let laid_out = Self::lay_out(&command, fds, cgroups);
        laid_out.map_err(|(step, errno)| SpawnError {
            step,
            errno,
            program: command.program,
            tried: Vec::new(),
            directory: command.directory,
        })
    }

    fn lay_out(
        command: &Command,
        fds: BTreeMap<i32, Source>,
        cgroups: Vec<OwnedFd>,
    ) -> Result<Self, Fault> {
        let input = |errno| (Step::Input, errno);
        if command.program.is_empty() {
            return Err((Step::Exec, io::Error::from_raw_os_error(libc::ENOENT)));
        }
        let directory = command.directory.as_ref().map(|path| path.as_os_str());
        Ok(Self {
            argv: arguments(command).map_err(input)?,
            candidates: candidates(&command.program, path_of(&command.env)).map_err(input)?,
            envp: environment(&command.env, command.pid_env.as_deref()).map_err(input)?,
            pid_entry: command.pid_env.as_deref().map(pid_entry).transpose().map_err(input)?,
            directory: directory
                .map(|path| c_string(path, "the working directory"))
                .transpose()
                .map_err(input)?,
            descriptors: Descriptors::new(fds)?,
            process_group: command.process_group && !command.new_session,
            new_session: command.new_session,
            death_signal: command.death_signal.map_or(0, |signal| signal.as_raw()),
            identity: Identity::new(command),
            umask: command.umask,
            cgroups,
            program: command.program.clone(),
            working_directory: command.directory.clone(),
        })
    }

    /// The error for a step that failed.
    pub(super) fn error(self, step: Step, errno: io::Error) -> SpawnError {
        let tried = self.candidates.into_iter();
        SpawnError {
            step,
            errno,
            program: self.program,
            tried: tried.map(|path| OsString::from_vec(path.into_bytes()).into()).collect(),
            directory: self.working_directory,
        }
    }
}

impl Descriptors {
    fn new(fds: BTreeMap<i32, Source>) -> Result<Self, Fault> {
        let mut plan = Self { closed: closed_ranges(fds.keys().copied()), ..Self::default() };
        let standard = (0..3).filter(|number| !fds.contains_key(number));
        plan.keeps.extend(standard.map(|number| Keep { number, required: false }));
        for (target, source) in fds {
            if target < 0 {
                let text = format!("descriptor number {target} is negative");
                return Err((Step::Input, invalid(text)));
            }
            let source = match source {
                Source::Owned(fd) => fd,
                Source::Null => open_null().map_err(|errno| (Step::Fd(target), errno))?,
                Source::Inherit => {
                    plan.keeps.push(Keep { number: target, required: true });
                    continue;
                }
            };
            plan.moves.push(Move { source: source.as_raw_fd(), target, clashes: false });
            plan._sources.push(source);
        }
        let targets: BTreeSet<i32> = plan.moves.iter().map(|one| one.target).collect();
        for one in &mut plan.moves {
            one.clashes = targets.contains(&one.source);
        }
        Ok(plan)
    }
}

impl Identity {
    fn new(command: &Command) -> Self {
        // To change the user and keep root's groups would be a trap.
        let dropping = command.groups.is_none() && command.uid.is_some();
        let no_groups = || rustix::process::getgroups().is_ok_and(|groups| groups.is_empty());
        Self {
            uid: command.uid,
            gid: command.gid,
            groups: if dropping { Some(Vec::new()) } else { command.groups.clone() },
            groups_optional: dropping && no_groups(),
        }
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn c_string(text: &OsStr, what: &str) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| invalid(format!("{what} contains a NUL byte")))
}

fn open_null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

fn arguments(command: &Command) -> io::Result<Vec<CString>> {
    let mut argv = Vec::with_capacity(command.args.len() + 1);
    let name = command.arg0.as_ref().unwrap_or(&command.program);
    argv.push(c_string(name, "the program's name")?);
    for arg in &command.args {
        argv.push(c_string(arg, "an argument")?);
    }
    Ok(argv)
}

fn path_of(vars: &BTreeMap<OsString, OsString>) -> &[u8] {
    vars.get(OsStr::new("PATH")).map_or(DEFAULT_PATH, |path| path.as_bytes())
}

/// The paths at which execvp(3) would look for `program`, in order.
fn candidates(program: &OsStr, path: &[u8]) -> io::Result<Vec<CString>> {
    let name = program.as_bytes();
    if name.contains(&b'/') {
        return Ok(vec![c_string(program, "the program's name")?]);
    }
    let nul = |_| invalid("the program's name or PATH contains a NUL byte".to_owned());
    let mut paths = Vec::new();
    for folder in path.split(|byte| *byte == b':') {
        let mut full = Vec::with_capacity(folder.len() + name.len() + 1);
        full.extend_from_slice(folder);
        // An empty element means the working directory.
        if !folder.is_empty() && !folder.ends_with(b"/") {
            full.push(b'/');
        }
        full.extend_from_slice(name);
        paths.push(CString::new(full).map_err(nul)?);
    }
    Ok(paths)
}

fn check_key(key: &OsStr) -> io::Result<()> {
    if key.is_empty() || key.as_bytes().contains(&b'=') {
        return Err(invalid(format!("\"{}\" cannot name a variable", key.display())));
    }
    Ok(())
}

fn environment(
    vars: &BTreeMap<OsString, OsString>,
    without: Option<&OsStr>,
) -> io::Result<Vec<CString>> {
    let mut entries = Vec::with_capacity(vars.len());
    for (key, value) in vars {
        if Some(key.as_os_str()) == without {
            continue;
        }
        check_key(key)?;
        let mut entry = Vec::with_capacity(key.len() + value.len() + 2);
        entry.extend_from_slice(key.as_bytes());
        entry.push(b'=');
        entry.extend_from_slice(value.as_bytes());
        entries.push(
            CString::new(entry).map_err(|_| {
                invalid(format!("variable \"{}\" contains a NUL byte", key.display()))
            })?,
        );
    }
    Ok(entries)
}

fn pid_entry(key: &OsStr) -> io::Result<PidEntry> {
    check_key(key)?;
    let mut bytes = c_string(key, "a variable's name")?.into_bytes();
    bytes.push(b'=');
    let digits = bytes.len();
    bytes.resize(digits + PID_DIGITS, b'0');
    bytes.push(0);
    Ok(PidEntry { bytes, digits })
}

/// All numbers but the standard three and `targets`, as inclusive ranges. `targets` must ascend.
fn closed_ranges(targets: impl Iterator<Item = i32>) -> Vec<(u32, u32)> {
    let mut ranges = Vec::new();
    let mut next = 3u32;
    for target in targets.filter_map(|target| u32::try_from(target).ok()) {
        if target < 3 {
            continue;
        }
        if target > next {
            ranges.push((next, target - 1));
        }
        next = target + 1;
    }
    ranges.push((next, u32::MAX));
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_between_and_above_targets_are_closed() {
        assert_eq!(closed_ranges([].into_iter()), [(3, u32::MAX)]);
        assert_eq!(closed_ranges([0, 2].into_iter()), [(3, u32::MAX)]);
        assert_eq!(closed_ranges([3, 4].into_iter()), [(5, u32::MAX)]);
        assert_eq!(closed_ranges([1, 5, 9].into_iter()), [(3, 4), (6, 8), (10, u32::MAX)]);
        assert_eq!(
            closed_ranges([i32::MAX].into_iter()),
            [(3, i32::MAX as u32 - 1), (i32::MAX as u32 + 1, u32::MAX)]
        );
    }

    #[test]
    fn a_name_is_looked_for_in_each_folder_and_a_path_only_there() {
        let paths = |name: &str, path: &str| -> Vec<String> {
            let found = candidates(OsStr::new(name), path.as_bytes()).unwrap();
            found.into_iter().map(|path| path.into_string().unwrap()).collect()
        };
        assert_eq!(paths("sh", "/bin:/usr/bin/"), ["/bin/sh", "/usr/bin/sh"]);
        assert_eq!(paths("sh", ":/bin:"), ["sh", "/bin/sh", "sh"]);
        assert_eq!(paths("sh", ""), ["sh"]);
        assert_eq!(paths("./sh", "/bin"), ["./sh"]);
    }

    #[test]
    fn the_reserved_pid_has_room_for_any_pid_and_no_zero_byte() {
        let entry = pid_entry(OsStr::new("LISTEN_PID")).unwrap();
        assert_eq!(&entry.bytes[..entry.digits], b"LISTEN_PID=");
        assert!(entry.bytes[..entry.bytes.len() - 1].iter().all(|byte| *byte != 0));
        assert!(entry.bytes.len() - entry.digits > i32::MAX.to_string().len());
    }
}
