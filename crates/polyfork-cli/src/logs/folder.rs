//! Where logs are, and what their files are called.
//!
//! `NAME/1.log` is what slot 1 writes now, `NAME/primary.log` what the primary says. `NAME/1.20261123T065656042123Z.log` was
//! full at that time, and ends in `.log.gz` once it is compressed. Names sort as time does.
//!
//! The folder of an app belongs to the user; others may not write to it, and no link is followed in it: a log that is
//! appended to by root would otherwise be a way to write anywhere.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self as sys, AtFlags, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::control::name::Name;
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::words;

const PRIVATE_FOLDER: Mode = Mode::RWXU;
const PRIVATE_FILE: Mode = Mode::RUSR.union(Mode::WUSR);
const FOLDER_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const PRIMARY: &str = "primary";
const COMPRESSED: &str = ".log.gz";
const PLAIN: &str = ".log";

/// The folder of one app's logs.
#[derive(Debug)]
pub(crate) struct Folder {
    folder: OwnedFd,
    pub(crate) path: PathBuf,
}

/// The name of a file, taken apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LogName {
    /// Whose; 0 is the primary.
    pub(crate) slot: u32,
    /// Since when nothing was added; `None` sorts behind these: it is written to now.
    pub(crate) age: Age,
    /// Whether it is compressed.
    pub(crate) compressed: bool,
}

/// How old a file is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Age {
    /// It was full then: a stamp without punctuation.
    Full(String),
    /// It is written to.
    Current,
}

impl LogName {
    /// The file that is written to.
    pub(crate) fn current(slot: u32) -> LogName {
        LogName { slot, age: Age::Current, compressed: false }
    }

    /// What it is called when it is full.
    pub(crate) fn full(slot: u32, stamp: &str) -> LogName {
        let stamp = stamp.chars().filter(char::is_ascii_alphanumeric).collect();
        LogName { slot, age: Age::Full(stamp), compressed: false }
    }

    /// As a file name.
    pub(crate) fn file(&self) -> String {
        let slot = match self.slot {
            0 => PRIMARY.to_owned(),
            number => number.to_string(),
        };
        let age = match &self.age {
            Age::Full(stamp) => format!(".{stamp}"),
            Age::Current => String::new(),
        };
        format!("{slot}{age}{}", if self.compressed { COMPRESSED } else { PLAIN })
    }

    /// From a file name; `None` for one that is none of ours.
    pub(crate) fn read(file: &str) -> Option<LogName> {
        let (stem, compressed) = match file.strip_suffix(COMPRESSED) {
            Some(stem) => (stem, true),
            None => (file.strip_suffix(PLAIN)?, false),
        };
        let (slot, age) = match stem.split_once('.') {
            Some((slot, stamp)) => (slot, Age::Full(stamp.to_owned())),
            None => (stem, Age::Current),
        };
        let slot = match slot {
            PRIMARY => 0,
            number => number.parse().ok().filter(|slot| *slot > 0)?,
        };
        let name = LogName { slot, age, compressed };
        // The one way to write it.
        (name.file() == file && (name.age != Age::Current || !compressed)).then_some(name)
    }
}

impl Folder {
    /// Opens the folder of an app below `root`, and makes it if it is not there.
    ///
    /// # Errors
    /// When it cannot be made or written to, or others could write to it.
    pub(crate) fn make(root: &Path, name: &Name) -> Result<Folder, Verdict> {
        let folder = Folder::make_for(root, name, None)?;
        // Told now, rather than when nobody looks.
        let opened = folder.append(&LogName::current(0).file());
        opened.map_err(|error| refused(&folder.path, error))?;
        Ok(folder)
    }

    /// As [`make`](Self::make), for a user (and group) that this process is about to become.
    ///
    /// # Errors
    /// As there; and when it belongs to neither.
    pub(crate) fn make_for(
        root: &Path,
        name: &Name,
        user: Option<(u32, u32)>,
    ) -> Result<Folder, Verdict> {
        Folder::at(root.join(name.as_str()), user)
    }

    fn at(path: PathBuf, user: Option<(u32, u32)>) -> Result<Folder, Verdict> {
        make_all(&path).map_err(|error| refused(&path, error))?;
        let folder = sys::open(&path, FOLDER_FLAGS, Mode::empty())
            .map_err(|error| refused(&path, in_the_way(error)))?;
        let found = sys::fstat(&folder).map_err(|error| refused(&path, error))?;
        let me = rustix::process::geteuid().as_raw();
        if found.st_uid != me && Some(found.st_uid) != user.map(|(uid, _)| uid) {
            return Err(refused(&path, "it belongs to another user"));
        }
        if found.st_mode & 0o022 != 0 {
            return Err(refused(&path, "other users may write to it: `chmod go-w` it"));
        }
        let folder = Folder { folder, path };
        if let Some((uid, gid)) = user.filter(|_| found.st_uid == me) {
            folder.give_to(uid, gid).map_err(|error| refused(&folder.path, error))?;
        }
        Ok(folder)
    }

    /// The folder that is under this path by now, made if there is none: this one was removed.
    ///
    /// # Errors
    /// As of [`make`](Self::make).
    pub(super) fn anew(&self) -> io::Result<Folder> {
        Folder::at(self.path.clone(), None).map_err(|verdict| io::Error::other(verdict.text))
    }

    /// Whether something else is under its path by now, or nothing.
    pub(crate) fn is_replaced(&self) -> bool {
        let identity = |found: Stat| (found.st_dev, found.st_ino);
        let there = sys::lstat(&self.path).map(identity);
        sys::fstat(&self.folder).map(identity) != there
    }

    /// The folder that another image of this process has opened.
    pub(crate) fn of(folder: OwnedFd, path: PathBuf) -> Folder {
        Folder { folder, path }
    }

    /// Makes the folder, which is ours, and the logs in it another user's. Nobody else could put a link in it so far.
    fn give_to(&self, uid: u32, gid: u32) -> io::Result<()> {
        let owner = (Some(sys::Uid::from_raw(uid)), Some(sys::Gid::from_raw(gid)));
        let mut files = Vec::new();
        self.each(|file| files.extend(LogName::read(file)))?;
        for file in files {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            sys::chownat(&self.folder, file.file(), owner.0, owner.1, flags)?;
        }
        Ok(sys::fchown(&self.folder, owner.0, owner.1)?)
    }

    /// Opens what is there; `None` when nothing is.
    pub(crate) fn find(path: &Path) -> Option<Folder> {
        let folder = sys::open(path, FOLDER_FLAGS, Mode::empty()).ok()?;
        Some(Folder { folder, path: path.to_owned() })
    }

    /// All files of ours, in the order of slots and time.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn files(&self) -> io::Result<Vec<LogName>> {
        let mut names = Vec::new();
        self.each(|file| names.extend(LogName::read(file)))?;
        names.sort_unstable();
        // While it is compressed a file is there twice; the compressed one is whole as soon as it has its name.
        names.dedup_by(|next, kept| {
            (next.slot, &next.age) == (kept.slot, &kept.age) && {
                kept.compressed = true;
                true
            }
        });
        Ok(names)
    }

    /// Every name in the folder.
    pub(super) fn each(&self, mut take: impl FnMut(&str)) -> io::Result<()> {
        let again = sys::openat(&self.folder, ".", FOLDER_FLAGS, Mode::empty())?;
        let mut buffer = Vec::with_capacity(8 << 10);
        let mut entries = RawDir::new(again, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            if let Ok(name) = entry?.file_name().to_str() {
                take(name);
            }
        }
        Ok(())
    }

    /// Opens a file to be appended to.
    pub(crate) fn append(&self, file: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::CLOEXEC;
        let opened = sys::openat(&self.folder, file, flags, PRIVATE_FILE).map_err(in_the_way)?;
        regular(opened)
    }

    /// Opens a new file.
    pub(super) fn create(&self, file: &str) -> io::Result<File> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(sys::openat(&self.folder, file, flags, PRIVATE_FILE)?.into())
    }

    /// Opens a file to be read.
    pub(crate) fn open(&self, name: &LogName) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = sys::openat(&self.folder, name.file(), flags, Mode::empty());
        regular(opened.map_err(in_the_way)?)
    }

    /// What is under a name now.
    pub(crate) fn stat(&self, file: &str) -> io::Result<Stat> {
        Ok(sys::statat(&self.folder, file, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Renames a file. What has the new name already is not replaced.
    pub(super) fn rename(&self, old: &str, new: &str) -> io::Result<()> {
        match sys::renameat_with(&self.folder, old, &self.folder, new, sys::RenameFlags::NOREPLACE)
        {
            // Not every file system can do that.
            Err(Errno::INVAL) => Ok(sys::renameat(&self.folder, old, &self.folder, new)?),
            other => Ok(other?),
        }
    }

    /// Removes a file.
    pub(super) fn remove(&self, file: &str) -> io::Result<()> {
        Ok(sys::unlinkat(&self.folder, file, AtFlags::empty())?)
    }

    /// The same folder once more.
    pub(crate) fn again(&self) -> io::Result<Folder> {
        Ok(Folder { folder: self.folder.try_clone()?, path: self.path.clone() })
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// A pipe or a device under the name of a log would swallow lines, or never end.
fn regular(file: OwnedFd) -> io::Result<File> {
    let kind = sys::FileType::from_raw_mode(sys::fstat(&file)?.st_mode);
    if kind == sys::FileType::RegularFile {
        return Ok(file.into());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "something that is no file is in the way"))
}

fn in_the_way(error: Errno) -> io::Error {
    match error {
        Errno::LOOP => io::Error::new(io::ErrorKind::InvalidInput, "a link is in the way"),
        other => other.into(),
    }
}

fn make_all(path: &Path) -> io::Result<()> {
    match sys::mkdir(path, PRIVATE_FOLDER) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(Errno::NOENT) => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            make_all(parent.ok_or(Errno::NOENT)?)?;
            match sys::mkdir(path, PRIVATE_FOLDER) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn refused(path: &Path, what: impl std::fmt::Display) -> Verdict {
    let text = format!(
        "log folder {}: {what}; --log-dir names another",
        words::harmless(&path.to_string_lossy())
    );
    Verdict { code: Code::NoFolder, text: words::plain(&text) }
}

/// The folder of all logs: `given`, else `$XDG_STATE_HOME/polyfork`, else `/var/log/polyfork` for root, else
/// `~/.local/state/polyfork`.
///
/// # Errors
/// When nothing says where that could be.
pub(crate) fn root(given: Option<&Path>) -> Result<PathBuf, Verdict> {
    let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    if let Some(given) = given.filter(|given| !given.as_os_str().is_empty()) {
        return std::path::absolute(given).map_err(|error| refused(given, error));
    }
    // A relative one is to be ignored, says the XDG base directory specification.
    if let Some(state) = variable("XDG_STATE_HOME").map(PathBuf::from).and_then(absolute) {
        return Ok(state.join("polyfork"));
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/var/log/polyfork".into());
    }
    match variable("HOME").map(PathBuf::from).and_then(absolute) {
        Some(home) => Ok(home.join(".local/state/polyfork")),
        None => Err(Verdict {
            code: Code::NoFolder,
            text: "no folder for logs: HOME is not set; --log-dir names one".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_sort_by_slot_and_time() {
        let names = [
            "primary.20260101T000000000000Z.log.gz",
            "primary.log",
            "1.20260101T000000000000Z.log.gz",
            "1.20260102T000000000000Z.log",
            "1.log",
            "2.log",
            "10.log",
        ];
        let mut read: Vec<LogName> =
            names.iter().rev().map(|name| LogName::read(name).expect(name)).collect();
        read.sort();
        assert_eq!(read.iter().map(LogName::file).collect::<Vec<_>>(), names);
        let full = LogName::full(3, "2026-11-23T06:56:56.042123Z");
        assert_eq!(full.file(), "3.20261123T065656042123Z.log");
    }

    #[test]
    fn other_files_are_none_of_ours() {
        for name in [
            "", ".log", "x.log", "0.log", "01.log", "+1.log", "1.log.gz", "1.txt", "-1.log",
            "1.x.gz",
        ] {
            assert_eq!(LogName::read(name), None, "{name}");
        }
    }
}
