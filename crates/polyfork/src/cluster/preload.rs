//! Places the file that lets stock Node workers leave cleanly, and says what makes them load it. That of Python workers is placed
//! in the same way; the rest about it is in `preload/python.rs`.
//!
//! The file itself, `preload.cjs` next to this one, says what it does. Whether a worker gets it is decided
//! in `process`; what NODE_OPTIONS looks like from inside is known to `polyfork_wire::env`.
//!
//! The file is shared by all primaries of a user and is never removed: a worker that outlives its primary
//! may start a thread or a child late. So its name carries a hash of its content, other versions live beside
//! it, and what is already there is only used when it is ours and word for word the same. A folder that
//! someone else could write to is not used: Node would run what they put there.
//!
//! Behaviour follows: Node `src/node_options.cc`, the XDG base directory specification; open(2), rename(2).

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use polyfork_wire::env::{NODE_OPTIONS, append_node_options, split_node_options};

pub(crate) mod python;

/// What Node runs before the program.
const CONTENT: &str = include_str!("preload.cjs");
/// Tells the preload that it is meant, and what to take out of NODE_OPTIONS or PYTHONPATH.
const MARKER: &str = "POLYFORK_PRELOAD";
/// How long a worker whose primary died may go on, in milliseconds.
const GRACE: &str = "POLYFORK_GRACE_MS";
/// Flags with which Node (18 and 20) may not read our file, and would refuse to start. From 22 on,
/// `--permission` lets it read what it is told to load.
const FORBIDDING: [&str; 2] = ["--experimental-permission", "--experimental-policy"];
/// How many names for the temporary file are tried.
const ATTEMPTS: u32 = 16;

/// Writes the preload into the user's cache, unless it is there, and returns where it is.
///
/// Tried in turn: `$XDG_CACHE_HOME/polyfork`, `$HOME/.cache/polyfork`, `/tmp/polyfork-<uid>`; a folder that
/// belongs to somebody else, or is open to others, is passed over.
///
/// # Errors
///
/// No folder could be used: the error of the last one, with its path.
pub(crate) fn place() -> io::Result<PathBuf> {
    place_in(&own_folders(), CONTENT.as_bytes())
}

/// The folders of this user, in the order in which they are tried.
fn own_folders() -> Vec<Folder> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    folders(variable("XDG_CACHE_HOME"), variable("HOME"), Path::new("/tmp"))
}

/// What to put into the environment of a Node worker, for the preload at `path` to be loaded by it.
///
/// `existing` is the NODE_OPTIONS that the worker would have had; it is added to, and the preload puts it back.
/// `grace` bounds how long the worker goes on without a primary. Empty, so that the worker runs
/// without the preload, when `existing` forbids reading the file or is nothing that Node would start with.
pub(crate) fn environment(
    existing: Option<&OsStr>,
    path: &Path,
    grace: Duration,
) -> Vec<(OsString, OsString)> {
    let (Some(path), Some(existing)) =
        (path.to_str(), existing.map_or(Some(None), |e| e.to_str().map(Some)))
    else {
        // Node reads both as UTF-8, and would put something else back.
        return Vec::new();
    };
    let Some((options, added)) = extend(existing, path) else { return Vec::new() };
    let grace = grace.as_millis().min(u128::from(u32::MAX / 2)).to_string();
    [(NODE_OPTIONS, options), (MARKER, added), (GRACE, grace)]
        .map(|(name, value)| (name.into(), value.into()))
        .into()
}

/// The new NODE_OPTIONS and the part of it that is ours, which starts with a blank unless it is the whole.
fn extend(existing: Option<&str>, path: &str) -> Option<(String, String)> {
    let argument = format!("--require={path}");
    let Some(existing) = existing else {
        let options = append_node_options(None, &argument);
        return Some((options.clone(), options));
    };
    let arguments = split_node_options(existing).ok()?;
    if arguments.iter().any(|given| FORBIDDING.iter().any(|flag| given.starts_with(flag))) {
        return None;
    }
    let options = match append_node_options(Some(existing), &argument) {
        // Absent and empty are not the same when it is put back.
        options if existing.is_empty() => format!(" {options}"),
        options => options,
    };
    let added = options.strip_prefix(existing).filter(|added| !added.is_empty())?.to_owned();
    Some((options, added))
}

/// A folder that may hold the file, and whether the one above it may be made as well.
struct Folder {
    path: PathBuf,
    make_parent: bool,
}

/// Where to try, in order.
fn folders(cache: Option<PathBuf>, home: Option<PathBuf>, shared: &Path) -> Vec<Folder> {
    let own = |cache: PathBuf| Folder { path: cache.join("polyfork"), make_parent: true };
    // A relative XDG_CACHE_HOME is to be ignored, says its specification.
    let cache = cache.filter(|path| path.is_absolute()).map(own);
    let home = home.filter(|path| path.is_absolute()).map(|home| own(home.join(".cache")));
    let name = format!("polyfork-{}", rustix::process::geteuid().as_raw());
    let shared = Folder { path: shared.join(name), make_parent: false };
    cache.into_iter().chain(home).chain([shared]).collect()
}

fn place_in(folders: &[Folder], content: &[u8]) -> io::Result<PathBuf> {
    let name = format!("preload-{:016x}.cjs", hash(content));
    in_the_first(folders, |folder| place_in_one(folder, &name, content))
}

/// What `place` returns for the first folder that can be used.
fn in_the_first(
    folders: &[Folder],
    place: impl Fn(&Folder) -> io::Result<PathBuf>,
) -> io::Result<PathBuf> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no folder to put the preload in");
    for folder in folders {
        match place(folder) {
            Ok(path) => return Ok(path),
            Err(error) => {
                last = io::Error::new(error.kind(), format!("{}: {error}", folder.path.display()));
            }
        }
    }
    Err(last)
}

fn place_in_one(folder: &Folder, name: &str, content: &[u8]) -> io::Result<PathBuf> {
    let path = folder.path.join(name);
    if path.to_str().is_none() {
        return Err(refused("the path is not UTF-8, which Node cannot be told"));
    }
    make_folder(folder)?;
    place_file(&folder.path, path, content)
}

/// Writes the file, unless it is there word for word.
fn place_file(folder: &Path, path: PathBuf, content: &[u8]) -> io::Result<PathBuf> {
    if holds(&path, content) {
        return Ok(path);
    }
    write_new(folder, &path, content)?;
    if holds(&path, content) {
        Ok(path)
    } else {
        Err(refused("the preload changed while it was written"))
    }
}

/// Makes the folder, private to the user, or checks that the one that is there is.
fn make_folder(folder: &Folder) -> io::Result<()> {
    let make = |path: &Path| match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        outcome => outcome,
    };
    if folder.make_parent
        && let Some(parent) = folder.path.parent()
    {
        make(parent)?;
    }
    make(&folder.path)?;
    let found = fs::symlink_metadata(&folder.path)?;
    if !found.is_dir() {
        return Err(refused("not a folder, or a link to one"));
    }
    check_owner(&found)
}

/// Refuses what somebody else owns or may write to: they would choose what our workers run.
fn check_owner(found: &fs::Metadata) -> io::Result<()> {
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(refused("belongs to another user"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(refused("can be written by others"));
    }
    Ok(())
}

/// Whether `path` is a plain file of ours with exactly this content.
fn holds(path: &Path, content: &[u8]) -> bool {
    let mut found = Vec::new();
    let read = |found: &mut Vec<u8>| {
        // Not waiting for a writer, should it be a FIFO.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(refused("not a plain file"));
        }
        check_owner(&about)?;
        file.take(content.len() as u64 + 1).read_to_end(found)
    };
    read(&mut found).is_ok() && found == content
}

/// Writes beside `path` and renames, so that another primary sees all of it or nothing.
fn write_new(folder: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let (temporary, mut file) = new_file(folder)?;
    let written = file.write_all(content).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // Best effort: the error that matters is the one that is returned.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// A file that did not exist. A name that is taken is left alone: it may be another primary at work.
fn new_file(folder: &Path) -> io::Result<(PathBuf, File)> {
    let mut attempt = 0;
    loop {
        let path = folder.join(format!(".preload-{}-{attempt}", std::process::id()));
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path);
        match opened {
            Ok(file) => return Ok((path, file)),
            Err(error)
                if error.kind() == io::ErrorKind::AlreadyExists && attempt + 1 < ATTEMPTS =>
            {
                attempt += 1
            }
            Err(error) => return Err(error),
        }
    }
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// FNV-1a, 64 bit. Tells versions apart; content is compared before it is trusted.
fn hash(content: &[u8]) -> u64 {
    content.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A folder of its own for each test, gone afterwards.
    pub(super) struct Scratch(PathBuf);

    impl Scratch {
        pub(super) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path =
                std::env::temp_dir().join(format!("preload-test-{}-{number}", std::process::id()));
            fs::create_dir(&path).expect("a fresh name");
            Scratch(path)
        }

        pub(super) fn folder(&self, name: &str) -> Folder {
            Folder { path: self.0.join(name), make_parent: false }
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    pub(super) fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("exists").mode() & 0o7777
    }

    pub(super) fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn file_is_placed_once_and_private() {
        let scratch = Scratch::new();
        let folder = Folder { path: scratch.0.join("cache").join("polyfork"), make_parent: true };
        let first = place_in(&[folder], b"one").expect("placed");
        assert_eq!(fs::read(&first).expect("readable"), b"one");
        assert_eq!((mode(&first), mode(first.parent().expect("a folder"))), (0o600, 0o700));
        let inode = fs::metadata(&first).expect("exists").ino();

        let folder = Folder { path: scratch.0.join("cache").join("polyfork"), make_parent: true };
        assert_eq!(place_in(&[folder], b"one").expect("placed"), first);
        assert_eq!(fs::metadata(&first).expect("exists").ino(), inode, "written again");
    }

    #[test]
    fn versions_live_side_by_side() {
        let scratch = Scratch::new();
        let one = place_in(&[scratch.folder("f")], b"one").expect("placed");
        let two = place_in(&[scratch.folder("f")], b"two").expect("placed");
        assert_ne!(one, two);
        assert_eq!(names(&scratch.0.join("f")).len(), 2, "and no temporary file is left");
        assert_eq!(fs::read(one).expect("kept"), b"one");
    }

    #[test]
    fn changed_content_is_replaced() {
        let scratch = Scratch::new();
        let path = place_in(&[scratch.folder("f")], b"the preload").expect("placed");
        for bad in [&b""[..], b"the preloae", b"the preload and more"] {
            fs::write(&path, bad).expect("ours");
            assert_eq!(place_in(&[scratch.folder("f")], b"the preload").expect("placed"), path);
            assert_eq!(fs::read(&path).expect("readable"), b"the preload");
        }
    }

    #[test]
    fn file_that_others_can_write_is_replaced() {
        let scratch = Scratch::new();
        let path = place_in(&[scratch.folder("f")], b"x").expect("placed");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("ours");
        place_in(&[scratch.folder("f")], b"x").expect("placed");
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn link_in_place_of_the_file_is_replaced_and_its_target_left_alone() {
        let scratch = Scratch::new();
        let path = place_in(&[scratch.folder("f")], b"x").expect("placed");
        let target = scratch.0.join("target");
        fs::write(&target, b"x").expect("written");
        fs::remove_file(&path).expect("ours");
        symlink(&target, &path).expect("linked");
        place_in(&[scratch.folder("f")], b"x").expect("placed");
        assert!(fs::symlink_metadata(&path).expect("exists").is_file());
        assert_eq!(fs::read(target).expect("still there"), b"x");
    }

    #[test]
    fn fifo_in_place_of_the_file_does_not_block() {
        let scratch = Scratch::new();
        let path = place_in(&[scratch.folder("f")], b"x").expect("placed");
        fs::remove_file(&path).expect("ours");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .expect("a FIFO");
        place_in(&[scratch.folder("f")], b"x").expect("placed");
        assert!(fs::symlink_metadata(&path).expect("exists").is_file());
    }

    #[test]
    fn folder_in_place_of_the_file_is_an_error_and_leaves_nothing_behind() {
        let scratch = Scratch::new();
        let path = place_in(&[scratch.folder("f")], b"x").expect("placed");
        fs::remove_file(&path).expect("ours");
        fs::create_dir(&path).expect("a folder");
        assert!(place_in(&[scratch.folder("f")], b"x").is_err());
        assert_eq!(names(&scratch.0.join("f")).len(), 1);
    }

    #[test]
    fn linked_folder_is_passed_over() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.0.join("real")).expect("made");
        symlink(scratch.0.join("real"), scratch.0.join("link")).expect("linked");
        let placed =
            place_in(&[scratch.folder("link"), scratch.folder("next")], b"x").expect("placed");
        assert!(placed.starts_with(scratch.0.join("next")));
        assert!(names(&scratch.0.join("real")).is_empty());
    }

    #[test]
    fn folder_that_others_can_write_is_passed_over() {
        let scratch = Scratch::new();
        for bits in [0o777, 0o720, 0o1777] {
            let open = scratch.0.join(format!("{bits:o}"));
            fs::create_dir(&open).expect("made");
            fs::set_permissions(&open, fs::Permissions::from_mode(bits)).expect("ours");
            let error = place_in(&[Folder { path: open.clone(), make_parent: false }], b"x");
            let error = error.expect_err("refused").to_string();
            assert!(
                error.contains("written by others") && error.contains("preload-test"),
                "{error}"
            );
            assert!(names(&open).is_empty());
        }
    }

    #[test]
    fn folder_of_another_user_is_passed_over() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can make one
        }
        let scratch = Scratch::new();
        let theirs = scratch.0.join("theirs");
        fs::create_dir(&theirs).expect("made");
        std::os::unix::fs::chown(&theirs, Some(65_534), None).expect("root may");
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o700)).expect("root may");
        let error = place_in(&[scratch.folder("theirs")], b"x").expect_err("refused");
        assert!(error.to_string().contains("another user"), "{error}");
        assert!(names(&theirs).is_empty());
    }

    #[test]
    fn file_in_place_of_the_folder_is_passed_over() {
        let scratch = Scratch::new();
        fs::write(scratch.0.join("f"), b"").expect("written");
        assert!(place_in(&[scratch.folder("f")], b"x").is_err());
        assert!(place_in(&[scratch.folder("f"), scratch.folder("g")], b"x").is_ok());
    }

    #[test]
    fn taken_temporary_names_are_left_alone() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.0.join("f")).expect("made");
        fs::set_permissions(scratch.0.join("f"), fs::Permissions::from_mode(0o700)).expect("ours");
        let bait = scratch.0.join("bait");
        symlink(&bait, scratch.0.join("f").join(format!(".preload-{}-0", std::process::id())))
            .expect("linked");
        place_in(&[scratch.folder("f")], b"x").expect("placed");
        assert!(!bait.exists(), "followed the link");
    }

    #[test]
    fn cache_of_the_user_comes_before_the_shared_folder() {
        let paths = |cache: Option<&str>, home: Option<&str>| -> Vec<PathBuf> {
            let list =
                folders(cache.map(PathBuf::from), home.map(PathBuf::from), Path::new("/tmp"));
            list.into_iter().map(|folder| folder.path).collect()
        };
        let shared =
            PathBuf::from(format!("/tmp/polyfork-{}", rustix::process::geteuid().as_raw()));
        assert_eq!(
            paths(Some("/c"), Some("/h")),
            [PathBuf::from("/c/polyfork"), PathBuf::from("/h/.cache/polyfork"), shared.clone()]
        );
        assert_eq!(paths(Some("c"), Some("")), paths(None, None), "relative ones are no use");
        assert_eq!(paths(None, None), [shared]);
    }

    #[test]
    fn path_that_is_not_utf_8_is_passed_over() {
        let scratch = Scratch::new();
        let odd = scratch.0.join(OsStr::from_bytes(b"odd\xff"));
        let folders = [Folder { path: odd, make_parent: false }, scratch.folder("next")];
        assert!(place_in(&folders, b"x").expect("placed").starts_with(scratch.0.join("next")));
    }

    fn variables(existing: Option<&str>, path: &str) -> Vec<(String, String)> {
        environment(existing.map(OsStr::new), Path::new(path), Duration::from_secs(7))
            .into_iter()
            .map(|(name, value)| {
                (name.into_string().expect("text"), value.into_string().expect("text"))
            })
            .collect()
    }

    #[test]
    fn what_is_added_can_be_taken_out_again() {
        for path in ["/c/p.cjs", "/my app/p.cjs", r#"/a"b\c/p.cjs"#] {
            for existing in
                [None, Some(""), Some(" "), Some("--no-warnings"), Some(r#"--title "a \" b" "#)]
            {
                let set = variables(existing, path);
                let [(_, options), (_, added), (_, grace)] = &set[..] else { panic!("{set:?}") };
                let arguments = split_node_options(options).expect("Node can read it");
                assert_eq!(arguments.last(), Some(&format!("--require={path}")));
                assert_eq!(options.strip_suffix(added.as_str()), Some(existing.unwrap_or("")));
                let whole = options == added && !added.starts_with(' ');
                assert_eq!(whole, existing.is_none(), "absent and empty differ");
                assert_eq!(grace, "7000");
            }
        }
    }

    #[test]
    fn options_that_node_refuses_are_left_to_node() {
        assert!(variables(Some(r#"--title "open"#), "/p.cjs").is_empty());
    }

    #[test]
    fn node_that_may_not_read_the_file_goes_without() {
        for flag in [
            "--experimental-permission",
            "--experimental-policy=p.json",
            "\"--experimental-permission\"",
        ] {
            assert!(variables(Some(&format!("--no-warnings {flag}")), "/p.cjs").is_empty());
        }
        assert!(
            !variables(Some("--permission --title=--experimental-policy"), "/p.cjs").is_empty()
        );
    }

    #[test]
    fn text_that_node_could_not_put_back_is_left_alone() {
        let odd = OsStr::from_bytes(b"--title=\xff");
        assert!(environment(Some(odd), Path::new("/p.cjs"), Duration::ZERO).is_empty());
        let odd = Path::new(OsStr::from_bytes(b"/\xff"));
        assert!(environment(None, odd, Duration::ZERO).is_empty());
    }

    #[test]
    fn endless_grace_fits_a_timer_of_node() {
        let set = environment(None, Path::new("/p.cjs"), Duration::MAX);
        assert_eq!(set[2].1, "2147483647");
    }
}
