//! The runtime folder: one folder for each app, with its lock, its control socket and a card that says what it is.
//!
//! | file | what |
//! | --- | --- |
//! | `NAME/lock` | locked by the primary as long as it lives; says who is alive, whatever else lies around |
//! | `NAME/control` | the control socket, 0600 |
//! | `NAME/card.json` | what does not change while it runs, and how it ended if nobody was there to be told |
//! | `NAME/state.json` | its line in a list, written anew when it changes, so that a list need not wake everybody |
//!
//! Everything is reached from an open descriptor of the folder, and no link is followed, so nobody can put another
//! folder in its place meanwhile. The folder belongs to the user and is closed to all others; one that does not is
//! refused. A primary that was killed leaves its files behind; the lock is gone with it, and the next one of
//! that name takes them over. No process number in a file is ever believed.
//!
//! The surprising rule: a socket's path may be 107 bytes long at most. Here it is reached by way of
//! `/proc/self/fd`, so that the folder's path may be as long as it likes.
//!
//! References: openat(2), flock(2), unix(7), the XDG base directory specification.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork::cluster::upgrade::{Name as Carried, Packing, ResumeError, Unpacking};
use rustix::fs::{self as sys, AtFlags, FlockOperation, Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::name::Name;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::words;

const LOCK: &str = "lock";
const SOCKET: &str = "control";
const CARD: &str = "card.json";
const NEW_CARD: &str = "card.new";
const STATE: &str = "state.json";
const NEW_STATE: &str = "state.new";
/// A card is a few hundred bytes, a state as many and ten for each worker; what is longer is none of ours.
const LONGEST_CARD: u64 = 256 << 10;
/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;
/// Somebody who only looks whether a lock is held holds it for microseconds.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

const PRIVATE_FOLDER: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);
const FOLDER_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The folder with all apps of one user.
#[derive(Debug)]
pub(crate) struct Runtime {
    folder: OwnedFd,
    path: PathBuf,
}

/// The folder of one app, as a client sees it.
#[derive(Debug)]
pub(crate) struct App {
    folder: OwnedFd,
    pub(crate) name: Name,
}

/// A name that is ours as long as this exists; its files go when it does.
#[derive(Debug)]
pub(crate) struct Claim {
    runtime: Runtime,
    folder: OwnedFd,
    lock: OwnedFd,
    name: Name,
    /// The card stays, to tell how it ended.
    leaves_card: bool,
}

/// What is known of an app without asking it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Card {
    /// Of this format.
    pub(crate) version: u32,
    /// Of the primary; for people, not to be believed.
    pub(crate) pid: u32,
    /// When it was started, RFC 3339.
    pub(crate) started: String,
    /// The program as it was named, without its arguments.
    pub(crate) program: String,
    /// The folder of its logs, if it writes any.
    pub(crate) logs: Option<PathBuf>,
    /// How it ended, when nobody was there to be told.
    #[serde(default)]
    pub(crate) ended: Option<Ended>,
}

/// How an app ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// When, RFC 3339.
    pub(crate) time: String,
    /// The word of its exit code.
    pub(crate) outcome: String,
    /// Its exit code.
    pub(crate) exit_code: u8,
    /// For people.
    pub(crate) text: String,
}

/// Why a name could not be had.
#[derive(Debug)]
pub(crate) enum NotClaimed {
    /// A living primary has it.
    Taken,
    /// The folder cannot be used.
    Unusable(Verdict),
}

fn unusable(text: String) -> Verdict {
    Verdict { code: Code::NoFolder, text: words::plain(&text) }
}

/// What went wrong with a path, in one line.
fn about(path: &Path, what: impl std::fmt::Display) -> Verdict {
    unusable(format!("runtime folder {}: {what}", path.display()))
}

impl Runtime {
    /// Opens the folder, and makes it if it is not there.
    ///
    /// # Errors
    /// When it cannot be made, belongs to somebody else, or is open to others.
    pub(crate) fn make() -> Result<Runtime, Verdict> {
        let path = place();
        match sys::mkdir(&path, PRIVATE_FOLDER) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(about(&path, cannot_make(error))),
        }
        let Some(runtime) = open(&path)? else {
            return Err(about(&path, "it was removed by somebody this very moment"));
        };
        if rustix::process::geteuid().as_raw() != owner(&runtime.folder, &path)? {
            return Err(about(
                &path,
                "it belongs to another user; POLYFORK_RUNTIME_DIR names another",
            ));
        }
        Ok(runtime)
    }

    /// Opens the folder; `None` when there is none, so that no app runs.
    ///
    /// # Errors
    /// When it belongs to somebody else or is open to others.
    pub(crate) fn find() -> Result<Option<Runtime>, Verdict> {
        open(&place())
    }

    /// The names of all apps, living or dead, in order.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(crate) fn names(&self) -> Result<Vec<Name>, Verdict> {
        let told = |error: Errno| about(&self.path, io::Error::from(error));
        let again = sys::openat(&self.folder, ".", FOLDER_FLAGS, Mode::empty()).map_err(told)?;
        let mut buffer = Vec::with_capacity(16 << 10);
        let mut entries = RawDir::new(again, buffer.spare_capacity_mut());
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(told)?;
            let kind = entry.file_type();
            if !matches!(kind, sys::FileType::Directory | sys::FileType::Unknown) {
                continue;
            }
            let name = entry.file_name().to_str().ok().and_then(|name| Name::read(name).ok());
            names.extend(name.filter(|name| self.is_of_an_app(name)));
        }
        names.sort_unstable();
        Ok(names)
    }

    /// An empty folder is what a primary leaves that may not remove it, because it has become another user.
    fn is_of_an_app(&self, name: &Name) -> bool {
        let has = |file: &str| {
            let path = format!("{name}/{file}");
            sys::statat(&self.folder, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
        };
        has(LOCK) || has(CARD)
    }

    /// The folder of an app; `None` when there is none of that name.
    pub(crate) fn app(&self, name: &Name) -> Option<App> {
        let folder = sys::openat(&self.folder, name.as_str(), FOLDER_FLAGS, Mode::empty()).ok()?;
        Some(App { folder, name: name.clone() })
    }

    /// Takes a name, as long as no living primary has it.
    pub(crate) fn claim(self, name: &Name) -> Result<Claim, (Runtime, NotClaimed)> {
        match self.try_claim(name) {
            Ok((folder, lock)) => {
                let name = name.clone();
                Ok(Claim { runtime: self, folder, lock, name, leaves_card: false })
            }
            Err(error) => Err((self, error)),
        }
    }

    fn try_claim(&self, name: &Name) -> Result<(OwnedFd, OwnedFd), NotClaimed> {
        let unusable = |what: Errno| {
            // If it was made just now; one with something in it stays.
            let _ = sys::unlinkat(&self.folder, name.as_str(), AtFlags::REMOVEDIR);
            let path = self.path.join(name.as_str());
            NotClaimed::Unusable(match what {
                Errno::LOOP | Errno::NOTDIR => {
                    about(&path, "a link or a file is in the way; remove it")
                }
                other => about(&path, io::Error::from(other)),
            })
        };
        for _ in 0..LOCK_TRIES {
            match sys::mkdirat(&self.folder, name.as_str(), PRIVATE_FOLDER) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(unusable(error)),
            }
            let folder = match sys::openat(&self.folder, name.as_str(), FOLDER_FLAGS, Mode::empty())
            {
                // The last primary of this name takes its leave this very moment.
                Err(Errno::NOENT) => continue,
                other => other.map_err(unusable)?,
            };
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let lock = match sys::openat(&folder, LOCK, flags, PRIVATE_FILE) {
                Err(Errno::NOENT) => continue,
                other => other.map_err(unusable)?,
            };
            match sys::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_still(&folder, LOCK, &lock) => return Ok((folder, lock)),
                // What was locked has been removed by its last owner.
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
                Err(error) => return Err(unusable(error)),
            }
        }
        Err(NotClaimed::Taken)
    }
}

/// Whether a file is still the one under its name.
fn is_still(folder: &OwnedFd, name: &str, file: &OwnedFd) -> bool {
    let there = sys::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    let ours = sys::fstat(file);
    there.is_ok_and(|there| {
        ours.is_ok_and(|ours| (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev))
    })
}

impl Claim {
    /// The name.
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// Makes the folder another user's, before this process becomes that user. The lock stays root's: who has it open
    /// needs no more. The empty folder is left behind in the end, since only root may remove it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn give_to(&self, uid: u32, gid: u32) -> io::Result<()> {
        use rustix::fs::{Gid, Uid};
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(sys::fchown(&self.folder, Some(uid), Some(gid))?)
    }

    /// Opens the control socket. Nobody else can reach it at any moment, whatever the umask: its folder is closed to
    /// others, and it takes connections only after its own mode was set.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn listen(&self) -> io::Result<UnixListener> {
        match sys::unlinkat(&self.folder, SOCKET, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &socket_address(&self.folder)?)?;
        sys::chmodat(&self.folder, SOCKET, PRIVATE_FILE, AtFlags::empty())?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(UnixListener::from(socket))
    }

    /// Writes what the app is. Whoever reads it sees the old one or the new one, never half of it.
    ///
    /// # Errors
    /// The system's: as a rule that the disk is full.
    pub(crate) fn write_card(&self, card: &Card) -> io::Result<()> {
        let text = serde_json::to_vec(card)?;
        replace(&self.folder, NEW_CARD, CARD, &text, Keep::ForGood)
    }

    /// The file that its line in a list is kept in.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn state_file(&self) -> io::Result<StateFile> {
        Ok(StateFile(self.folder.try_clone()?))
    }

    /// Leaves a card that tells how it ended, for whoever looks next.
    pub(crate) fn leave(mut self, card: &Card) {
        self.leaves_card = self.write_card(card).is_ok();
    }
}

/// A name that is ours, as it is carried to the next image of this process. The lock belongs to what is open, so it is held
/// throughout.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClaimState {
    path: PathBuf,
    runtime: Carried,
    folder: Carried,
    lock: Carried,
    name: String,
    leaves_card: bool,
}

impl Claim {
    /// Leaves it to the next image.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn pack(&self, packing: &mut Packing) -> io::Result<ClaimState> {
        let Claim { runtime, folder, lock, name, leaves_card } = self;
        Ok(ClaimState {
            path: runtime.path.clone(),
            runtime: packing.name(runtime.folder.as_fd())?,
            folder: packing.name(folder.as_fd())?,
            lock: packing.name(lock.as_fd())?,
            name: name.to_string(),
            leaves_card: *leaves_card,
        })
    }

    /// Takes it over from the image before.
    ///
    /// # Errors
    /// When a descriptor is missing, or the name is none.
    pub(crate) fn unpack(
        state: ClaimState,
        unpacking: &mut Unpacking,
    ) -> Result<Claim, ResumeError> {
        let ClaimState { path, runtime, folder, lock, name, leaves_card } = state;
        let name = Name::read(&name).map_err(|error| ResumeError::Descriptor(error.to_string()))?;
        let runtime = Runtime { folder: unpacking.take(runtime)?, path };
        let (folder, lock) = (unpacking.take(folder)?, unpacking.take(lock)?);
        Ok(Claim { runtime, folder, lock, name, leaves_card })
    }
}

/// Where an app's line in a list is kept.
#[derive(Debug)]
pub(crate) struct StateFile(OwnedFd);

impl StateFile {
    /// Writes it anew. When that fails there is none, and whoever wants to know asks.
    pub(crate) fn write(&self, text: &[u8]) {
        if replace(&self.0, NEW_STATE, STATE, text, Keep::WhileUp).is_err() {
            // It may not be there.
            let _ = sys::unlinkat(&self.0, STATE, AtFlags::empty());
        }
    }
}

/// How well a file is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Also when the machine loses power.
    ForGood,
    /// As long as the machine is up.
    WhileUp,
}

/// Writes a file under a new name and gives it its own when it is whole.
fn replace(folder: &OwnedFd, new: &str, name: &str, text: &[u8], keep: Keep) -> io::Result<()> {
    let write = || {
        match sys::unlinkat(folder, new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(sys::openat(folder, new, flags, PRIVATE_FILE)?);
        file.write_all(text)?;
        if keep == Keep::ForGood {
            file.sync_all()?;
        }
        Ok(sys::renameat(folder, new, folder, name)?)
    };
    let outcome = write();
    if outcome.is_err() {
        // It may not have been made at all.
        let _ = sys::unlinkat(folder, new, AtFlags::empty());
    }
    outcome
}

impl Drop for Claim {
    fn drop(&mut self) {
        // In this order, so that a folder without a card is nobody's. What stays is taken over by the next one.
        let card = (!self.leaves_card).then_some(CARD);
        for file in [Some(SOCKET), Some(STATE), card, Some(LOCK)].into_iter().flatten() {
            let _ = sys::unlinkat(&self.folder, file, AtFlags::empty());
        }
        if !self.leaves_card {
            let _ = sys::unlinkat(&self.runtime.folder, self.name.as_str(), AtFlags::REMOVEDIR);
        }
    }
}

impl App {
    /// The address of its control socket, which is valid as long as this lives.
    ///
    /// # Errors
    /// When its path is too long, on a system without `/proc`.
    pub(crate) fn socket_path(&self) -> io::Result<PathBuf> {
        socket_path(&self.folder)
    }

    /// Whether a primary lives. One that just starts or ends counts as alive.
    pub(crate) fn is_alive(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match sys::openat(&self.folder, LOCK, flags, Mode::empty()) {
            Ok(lock) => {
                sys::flock(&lock, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
            }
            Err(_) => false,
        }
    }

    /// What it is; `None` when there is no card, or none that can be read.
    pub(crate) fn card(&self) -> Option<Card> {
        serde_json::from_slice(&self.read(CARD)?).ok()
    }

    /// Its line in a list as its primary wrote it last; `None` when there is none. Says nothing about whether it lives.
    pub(crate) fn state(&self) -> Option<Vec<u8>> {
        self.read(STATE)
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(sys::openat(&self.folder, name, flags, Mode::empty()).ok()?);
        let mut text = Vec::with_capacity(1024);
        file.take(LONGEST_CARD).read_to_end(&mut text).ok()?;
        Some(text)
    }
}

/// The way to a socket in an open folder.
fn socket_path(folder: &OwnedFd) -> io::Result<PathBuf> {
    let by_number = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    if by_number.exists() {
        return Ok(by_number.join(SOCKET));
    }
    let text = "the folder's path is too long for a socket (107 bytes), and there is no /proc to go around it";
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

fn socket_address(folder: &OwnedFd) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new(socket_path(folder)?)?)
}

fn cannot_make(error: Errno) -> String {
    match error {
        Errno::NOENT => {
            "cannot make it: the folder above it is not there; POLYFORK_RUNTIME_DIR names another"
                .to_owned()
        }
        other => format!(
            "cannot make it: {}; POLYFORK_RUNTIME_DIR names another",
            io::Error::from(other)
        ),
    }
}

/// Opens and checks the folder.
fn open(path: &Path) -> Result<Option<Runtime>, Verdict> {
    let folder = match sys::open(path, FOLDER_FLAGS, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(about(path, "it is a link or a file, not a folder; remove it"));
        }
        Err(error) => return Err(about(path, io::Error::from(error))),
    };
    let owner = owner(&folder, path)?;
    let me = rustix::process::geteuid().as_raw();
    if owner != me && me != 0 {
        return Err(about(path, "it belongs to another user; POLYFORK_RUNTIME_DIR names another"));
    }
    let mode = sys::fstat(folder.as_fd()).map_err(|e| about(path, io::Error::from(e)))?.st_mode;
    if mode & 0o077 != 0 {
        let path = path.display();
        return Err(unusable(format!(
            "runtime folder {path}: it is open to other users (mode {:03o}); `chmod 700 {path}`",
            mode & 0o777
        )));
    }
    Ok(Some(Runtime { folder, path: path.to_owned() }))
}

fn owner(folder: &OwnedFd, path: &Path) -> Result<u32, Verdict> {
    let found = sys::fstat(folder).map_err(|e| about(path, io::Error::from(e)))?;
    Ok(found.st_uid)
}

/// `$POLYFORK_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/polyfork` where that is the user's own, else `/run/polyfork` for
/// root, else `/tmp/polyfork-UID`.
pub(crate) fn place() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let me = rustix::process::geteuid().as_raw();
    let own = |path: &PathBuf| sys::stat(path).is_ok_and(|found| found.st_uid == me);
    if let Some(path) = variable("POLYFORK_RUNTIME_DIR") {
        return PathBuf::from(path);
    }
    // Under sudo it may be that of the user who called.
    let session = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(path) = session.filter(|path| path.is_absolute() && own(path)) {
        return path.join("polyfork");
    }
    if me == 0 { "/run/polyfork".into() } else { format!("/tmp/polyfork-{me}").into() }
}
