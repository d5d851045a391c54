//! Asks a JavaScript runtime who it is: `--version`, and for a shim the path of the real one.
//!
//! Only files that are called exactly like a runtime are asked, so that no stranger is run with an argument it may
//! misunderstand; only what answers like that runtime is believed.
//!
//! Whoever looks at many programs in one go asks each runtime once: [`Answers`].
//!
//! The surprising rule: what is asked is the file that was found, by its own path, because some change their character
//! with their name (Bun called as `node` answers as a Node would).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use polyfork_sys::spawn::{Child, Command};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::Version;
use super::find::{self, Kind, Search};

/// How long a runtime may take to answer. Tens of milliseconds are usual.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
/// An answer is a line; a path may be 4 KiB.
const MOST_BYTES: u64 = 8 << 10;

/// The runtimes that are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Node,
    Deno,
    Bun,
}

/// The version, or what was said instead.
pub(super) type Answer = Result<Version, String>;

/// What runtimes have said, for whoever looks at many programs in one go ([`Answers::detect`]).
///
/// Not to be kept: another version may come to lie under the same path.
#[derive(Debug, Default)]
pub struct Answers(RefCell<BTreeMap<Asked, Vec<u8>>>);

/// A question, with all that its answer may depend on.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Asked {
    exec: PathBuf,
    args: &'static [&'static str],
    /// Where it was asked, and with which `PATH`: what stands for a runtime may go by them.
    at: Option<(PathBuf, OsString)>,
}

impl Answers {
    fn run(
        &self,
        exec: &Path,
        args: &'static [&'static str],
        search: &Search,
    ) -> io::Result<Vec<u8>> {
        let at = (!is_itself(exec)).then(|| (search.directory.clone(), search.path.clone()));
        let asked = Asked { exec: exec.to_owned(), args, at };
        if let Some(said) = self.0.borrow().get(&asked) {
            return Ok(said.clone());
        }
        let said = run(exec, args, search)?;
        self.0.borrow_mut().insert(asked, said.clone());
        Ok(said)
    }
}

/// Whether a file is a runtime, rather than something that stands for one.
fn is_itself(exec: &Path) -> bool {
    let named = std::fs::canonicalize(exec).is_ok_and(|real| exact_name(&real).is_some());
    named && matches!(find::kind(exec), Ok(Kind::Elf { .. }))
}

/// The runtime a file is called after, by the name it has in the end (links followed) or was found under.
pub(super) fn runtime_name(path: &Path) -> Option<Name> {
    let real = std::fs::canonicalize(path).ok();
    real.as_deref().and_then(exact_name).or_else(|| exact_name(path))
}

fn exact_name(path: &Path) -> Option<Name> {
    match path.file_name()?.to_str()? {
        "node" | "nodejs" => Some(Name::Node),
        "deno" => Some(Name::Deno),
        // Bun's npm package ships its Linux binary under this name.
        "bun" | "bun.exe" => Some(Name::Bun),
        _ => None,
    }
}

/// Asks for the version.
///
/// # Errors
/// It could not be started, or did not answer in time.
pub(super) fn version(
    name: Name,
    exec: &Path,
    search: &Search,
    answers: &Answers,
) -> io::Result<Answer> {
    let said = answers.run(exec, &["--version"], search)?;
    Ok(read_version(name, &said).ok_or_else(|| first_line(&said)))
}

/// Asks for the path of the binary that answers.
///
/// # Errors
/// As [`version`], or when it names no absolute path.
pub(super) fn real_path(
    name: Name,
    exec: &Path,
    search: &Search,
    answers: &Answers,
) -> io::Result<PathBuf> {
    let said = match name {
        Name::Node | Name::Bun => answers.run(exec, &["-p", "process.execPath"], search)?,
        Name::Deno => answers.run(exec, &["eval", "console.log(Deno.execPath())"], search)?,
    };
    let line = said.trim_ascii();
    let path = PathBuf::from(OsString::from_vec(line.to_vec()));
    if path.is_absolute() && !line.contains(&b'\n') {
        Ok(path)
    } else {
        Err(io::Error::other(format!("answers {:?}", first_line(&said))))
    }
}

/// Reads `v20.20.2`, `deno 2.9.6 (stable, ...)` or `1.4.5`, each only from the runtime that says it so.
fn read_version(name: Name, said: &[u8]) -> Option<Version> {
    let said = std::str::from_utf8(said).ok()?.lines().next()?.trim();
    let numbers = match name {
        Name::Node => said.strip_prefix('v')?,
        Name::Deno => said.strip_prefix("deno ")?,
        Name::Bun => said,
    };
    let numbers = numbers.split([' ', '-', '+']).next()?;
    let mut parts = numbers.split('.').map(|part| part.parse::<u32>().ok());
    let version = Version { major: parts.next()??, minor: parts.next()??, patch: parts.next()?? };
    parts.next().is_none().then_some(version)
}

fn first_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.lines().next().unwrap_or_default().trim().chars().take(80).collect()
}

/// Runs `exec` and returns what it writes to standard output.
fn run(exec: &Path, args: &[&str], search: &Search) -> io::Result<Vec<u8>> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(exec);
    command.args(args).current_dir(&search.directory).env("PATH", &search.path);
    // Answers as its bare self: no preloads, and no belief that it has a parent to talk to.
    for variable in ["NODE_OPTIONS", "NODE_CHANNEL_FD", "NODE_UNIQUE_ID"] {
        command.env_remove(variable);
    }
    command.null(0).fd(1, OwnedFd::from(writer)).null(2);
    command.parent_death_signal(Some(Signal::KILL));
    let child = command.spawn().map_err(io::Error::other)?;
    let deadline = Instant::now() + PATIENCE;
    let answer = read_until(File::from(OwnedFd::from(reader)), &child, deadline);
    // Gone already, as a rule; if not, it has nothing more to say.
    let _gone = child.signal(Signal::KILL);
    let _collected = child.wait();
    answer
}

/// Reads until the end of the pipe, or until the child has ended (a child of its own may keep the pipe).
fn read_until(mut pipe: File, child: &Child, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut said = Vec::new();
    while (said.len() as u64) < MOST_BYTES {
        let ended = wait(&pipe, child, deadline)?;
        if readable_now(&pipe)? {
            let mut part = [0; 1024];
            match pipe.read(&mut part)? {
                0 => break,
                length => said.extend_from_slice(&part[..length]),
            }
        } else if ended {
            break;
        }
    }
    Ok(said)
}

/// Waits for something to read or for the child's end; true if it ended.
fn wait(pipe: &File, child: &Child, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::TimedOut)?;
    let pidfd = child.pidfd();
    let mut fds = [PollFd::new(pipe, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) => {
            let text = format!("no answer within {} s", PATIENCE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
        Ok(_) => Ok(!fds[1].revents().is_empty()),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn readable_now(pipe: &File) -> io::Result<bool> {
    let fd = pipe.as_fd();
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&at_once)))? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_each_runtime_tells_them() {
        let version = |major, minor, patch| Some(Version { major, minor, patch });
        assert_eq!(read_version(Name::Node, b"v20.20.2\n"), version(20, 20, 2));
        assert_eq!(read_version(Name::Node, b"v24.0.0-nightly2025\n"), version(24, 0, 0));
        assert_eq!(
            read_version(Name::Deno, b"deno 2.9.6 (stable, release, x86_64)\nv8 1\n"),
            version(2, 9, 6)
        );
        assert_eq!(read_version(Name::Bun, b"1.4.5\n"), version(1, 4, 5));
    }

    #[test]
    fn an_answer_of_another_shape_is_no_version() {
        for (name, said) in [
            (Name::Node, "1.4.5"),
            (Name::Node, "node for amateur radio, v0.3"),
            (Name::Bun, "v20.20.2"),
            (Name::Deno, "2.9.6"),
            (Name::Bun, "1.4"),
            (Name::Bun, "1.4.5.6"),
            (Name::Node, ""),
            (Name::Node, "v1.2.99999999999999"),
        ] {
            assert_eq!(read_version(name, said.as_bytes()), None, "{said}");
        }
        assert_eq!(read_version(Name::Node, b"\xff\xfe"), None);
    }
}
