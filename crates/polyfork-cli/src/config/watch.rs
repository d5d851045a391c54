//! Files that are watched: tells that something changed, once it has been quiet for a while.
//!
//! Only watches; `renew` does what is to be done about it.
//!
//! The surprising rule: what a program writes while it runs must not make it be reloaded for ever. So names that begin with a
//! dot, `node_modules`, and the app's own folder of logs are passed over; for the rest there is `--watch-ignore`.
//!
//! Folders are watched one by one, up to [`MOST_FOLDERS`]; a folder that comes later is watched when it comes. Where the
//! kernel lost count (`IN_Q_OVERFLOW`), something has changed. What is removed or moved away is watched again once it is
//! back: a folder that is made anew is how many deploy.
//!
//! References: inotify(7).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::control::name;

/// Folders that one app watches at most: each takes about a kilobyte of the kernel's memory.
pub(crate) const MOST_FOLDERS: usize = 8192;
/// Folders within each other that are followed.
const DEEPEST: usize = 64;
/// However busily files change, after so many delays it is told.
const MOST_DELAYS: u32 = 50;

/// Between two looks for what is away. The kernel does not tell when a path comes to be.
const AWAY_PAUSE: Duration = Duration::from_secs(1);

const CHANGES: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB);

/// What is to be watched.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Wish {
    /// Files and folders.
    pub(crate) paths: Vec<PathBuf>,
    /// Names, or paths from a watched folder on, with `*` and `?`.
    pub(crate) ignore: Vec<String>,
    /// Folders that are never looked at, in full.
    pub(crate) never: Vec<PathBuf>,
    /// How long it must have been quiet.
    pub(crate) delay: Duration,
}

impl Wish {
    /// Whether a path is of no interest. `inside` is the path from the watched folder on.
    fn ignores(&self, path: &Path, inside: &Path) -> bool {
        let names = || inside.components().map(|part| part.as_os_str().to_string_lossy());
        let hidden = |name: &str| name.starts_with('.') || name == "node_modules";
        if names().any(|name| hidden(&name))
            || self.never.iter().any(|never| path.starts_with(never))
        {
            return true;
        }
        self.ignore.iter().any(|pattern| {
            let pattern = pattern.trim_start_matches("./").trim_end_matches("/**");
            let pattern = pattern.trim_start_matches("**/").trim_end_matches('/');
            let whole = |path: &Path| name::matches(pattern, &path.to_string_lossy());
            match pattern.contains('/') {
                // A folder stands for all that is in it.
                true => inside.ancestors().any(whole) || path.ancestors().any(whole),
                false => names().any(|name| name::matches(pattern, &name)),
            }
        })
    }
}

/// Where a watch is, and from where on its names count.
#[derive(Debug, Clone)]
struct Spot {
    path: PathBuf,
    root: PathBuf,
    /// Of a watched file: nothing else in its folder is of interest.
    only: Option<std::ffi::OsString>,
    depth: usize,
}

/// Files being watched. Gives its watches up when it is dropped.
pub(crate) struct Watcher {
    kernel: AsyncFd<OwnedFd>,
    wish: Wish,
    /// By the kernel's number; several where a file and its folder are watched.
    spots: BTreeMap<i32, Vec<Spot>>,
    /// What is not there now.
    away: Vec<PathBuf>,
    /// A change was seen that has not been told yet. The next image of this process has to know.
    seen: Arc<AtomicBool>,
    /// That was so in the image before this one.
    is_owed: bool,
    /// What could not be watched, in words.
    pub(crate) trouble: Vec<String>,
}

impl Watcher {
    /// Begins to watch.
    ///
    /// # Errors
    /// When the system gives no watches at all. Single paths that cannot be watched are `trouble`.
    pub(crate) fn new(wish: Wish, seen: Arc<AtomicBool>) -> io::Result<Watcher> {
        let kernel = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let kernel = register(kernel)?;
        let (spots, away, trouble) = (BTreeMap::new(), Vec::new(), Vec::new());
        let is_owed = seen.load(Ordering::Relaxed);
        let mut watcher = Watcher { kernel, wish, spots, away, seen, is_owed, trouble };
        for path in watcher.wish.paths.clone() {
            watcher.begin(&path);
        }
        Ok(watcher)
    }

    fn begin(&mut self, path: &Path) {
        let folder = |path: &Path| Spot {
            path: path.to_owned(),
            root: path.to_owned(),
            only: None,
            depth: 0,
        };
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => self.folder(folder(path)),
            // An editor puts another file in its place: the folder is what stays.
            Ok(_) => match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => {
                    let parent =
                        if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
                    let only = Some(name.to_owned());
                    self.one(Spot { only, ..folder(parent) });
                }
                _ => self.trouble.push(format!("{} cannot be watched", path.display())),
            },
            Err(error) => {
                self.trouble.push(told(path, &error));
                self.away.push(path.to_owned());
            }
        }
    }

    /// Watches what was away and is there now; one of it.
    fn look_for_what_is_away(&mut self) -> Option<PathBuf> {
        let (back, away) = std::mem::take(&mut self.away).into_iter().partition(|p| p.exists());
        self.away = away;
        let back: Vec<PathBuf> = back;
        back.iter().for_each(|path| self.begin(path));
        back.into_iter().next()
    }

    /// Watches a folder, and those in it.
    fn folder(&mut self, spot: Spot) {
        let mut open = vec![spot];
        while let Some(spot) = open.pop() {
            if !self.one(spot.clone()) || spot.depth >= DEEPEST {
                continue;
            }
            let Ok(entries) = fs::read_dir(&spot.path) else { continue };
            for entry in entries.flatten() {
                // A link to a folder is not followed: it may lead back here.
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let path = entry.path();
                if is_folder && !self.is_ignored(&path, &spot.root) {
                    open.push(Spot { path, depth: spot.depth + 1, ..spot.clone() });
                }
            }
        }
    }

    fn one(&mut self, spot: Spot) -> bool {
        if self.spots.len() >= MOST_FOLDERS {
            let text = format!("more than {MOST_FOLDERS} folders: the others are not watched");
            if !self.trouble.contains(&text) {
                self.trouble.push(text);
            }
            return false;
        }
        match inotify::add_watch(self.kernel.get_ref(), &spot.path, CHANGES) {
            Ok(number) => {
                self.spots.entry(number).or_default().push(spot);
                true
            }
            // It may have gone since it was seen.
            Err(Errno::NOENT | Errno::NOTDIR) if spot.depth > 0 => false,
            Err(error) => {
                self.trouble.push(told(&spot.path, &error.into()));
                false
            }
        }
    }

    fn is_ignored(&self, path: &Path, root: &Path) -> bool {
        self.wish.ignores(path, path.strip_prefix(root).unwrap_or(path))
    }

    /// Returns when something has changed and it has been quiet since; what changed first.
    pub(crate) async fn changed(&mut self) -> io::Result<PathBuf> {
        let first = match std::mem::take(&mut self.is_owed) {
            true => self.wish.paths.first().cloned().unwrap_or_default(),
            false => self.first_change().await?,
        };
        self.seen.store(true, Ordering::Relaxed);
        for _ in 0..MOST_DELAYS {
            match tokio::time::timeout(self.wish.delay, self.look()).await {
                Ok(looked) => drop(looked?),
                Err(_quiet) => break,
            }
        }
        Ok(first)
    }

    async fn first_change(&mut self) -> io::Result<PathBuf> {
        loop {
            if let Some(path) = self.look_for_what_is_away() {
                return Ok(path);
            }
            let found = match self.away.is_empty() {
                true => self.look().await?,
                false => match tokio::time::timeout(AWAY_PAUSE, self.look()).await {
                    Ok(looked) => looked?,
                    Err(_nothing) => None,
                },
            };
            if let Some(path) = found {
                return Ok(path);
            }
        }
    }

    /// Waits for what the kernel tells next; what of it is of interest.
    async fn look(&mut self) -> io::Result<Option<PathBuf>> {
        let mut space = [MaybeUninit::<u8>::uninit(); 4096];
        let mut told: Vec<(i32, ReadFlags, Option<Vec<u8>>)> = Vec::new();
        {
            let mut ready = self.kernel.readable().await?;
            let mut reader = inotify::Reader::new(self.kernel.get_ref(), &mut space);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let name = event.file_name().map(|name| name.to_bytes().to_vec());
                        told.push((event.wd(), event.events(), name));
                        if reader.is_buffer_empty() {
                            break;
                        }
                    }
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        let mut first = None;
        for (number, flags, name) in told {
            let found = self.take(number, flags, name.as_deref());
            first = first.or(found);
        }
        Ok(first)
    }

    /// One thing that the kernel told.
    fn take(&mut self, number: i32, flags: ReadFlags, name: Option<&[u8]>) -> Option<PathBuf> {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.wish.paths.first().cloned();
        }
        let spots = self.spots.get(&number)?.clone();
        if flags.contains(ReadFlags::IGNORED) {
            self.spots.remove(&number);
            let wished = |spot: &Spot| match &spot.only {
                Some(name) => spot.path.join(name),
                None => spot.path.clone(),
            };
            let roots = spots.iter().filter(|spot| spot.depth == 0).map(wished);
            self.away.extend(roots);
            return None;
        }
        // One inside of another that moved has been told of by that one, and is watched where it is now.
        if flags.contains(ReadFlags::MOVE_SELF) && spots.iter().any(|spot| spot.depth == 0) {
            // Under its path there is nothing, or something else. That a watch has gone is told as IGNORED.
            let _ = inotify::remove_watch(self.kernel.get_ref(), number);
        }
        let mut found = None;
        for spot in spots {
            let path = match name {
                Some(name) => spot.path.join(std::ffi::OsStr::from_bytes(name)),
                None => spot.path.clone(),
            };
            let other = spot.only.as_ref().is_some_and(|only| path.file_name() != Some(only));
            if other || self.is_ignored(&path, &spot.root) {
                continue;
            }
            let is_folder = flags.contains(ReadFlags::ISDIR);
            let came = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
            if is_folder && came && spot.only.is_none() {
                self.folder(Spot { path: path.clone(), depth: spot.depth + 1, ..spot });
            }
            // A folder whose times changed has not changed; a file that was only looked at has not, either.
            let only_attributes = flags.contains(ReadFlags::ATTRIB);
            if !(is_folder && only_attributes) {
                found = found.or(Some(path));
            }
        }
        found
    }
}

#[expect(deprecated, reason = "sound for a descriptor that the registration owns")]
fn register(kernel: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(kernel, Interest::READABLE)
}

fn told(path: &Path, error: &io::Error) -> String {
    let what = crate::words::plain(&error.to_string());
    let next = match error.raw_os_error() {
        Some(28) => "; raise fs.inotify.max_user_watches",
        _ => "",
    };
    format!("{} cannot be watched: {what}{next}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(ignore: &[&str]) -> Wish {
        Wish { ignore: ignore.iter().map(|&text| text.to_owned()).collect(), ..Wish::default() }
    }

    #[test]
    fn what_is_ignored_is_ignored_with_all_that_is_in_it() {
        let ignored = |wish: &Wish, inside: &str| {
            let inside = Path::new(inside);
            wish.ignores(&Path::new("/srv/app").join(inside), inside)
        };
        let plain = wish(&[]);
        for (path, expected) in [
            ("node_modules/x/y.js", true),
            ("src/.cache/a", true),
            (".git/HEAD", true),
            ("src/a.js", false),
        ] {
            assert_eq!(ignored(&plain, path), expected, "{path}");
        }
        let more = wish(&["*.log", "public/uploads", "./tmp/", "data/*.db"]);
        for (path, expected) in [
            ("a.log", true),
            ("deep/in/b.log", true),
            ("public/uploads/x/y.png", true),
            ("public/x.png", false),
            ("tmp/x", true),
            ("src/tmp/x", true),
            ("data/main.db", true),
            ("data/main.js", false),
        ] {
            assert_eq!(ignored(&more, path), expected, "{path}");
        }
        let logs = Wish { never: vec!["/srv/app/logs".into()], ..Wish::default() };
        assert!(ignored(&logs, "logs/app/1.log") && !ignored(&logs, "logs.js"));
    }

    #[test]
    fn a_change_is_told_once_it_is_quiet_and_new_folders_are_watched() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_owned();
        fs::create_dir(path.join("node_modules")).expect("a folder");
        runtime.expect("a runtime").block_on(async {
            let delay = Duration::from_millis(20);
            let wish = Wish { paths: vec![path.clone()], delay, ..Wish::default() };
            let mut watcher = Watcher::new(wish, Arc::default()).expect("watches");
            assert!(watcher.trouble.is_empty(), "{:?}", watcher.trouble);
            fs::write(path.join("node_modules/x.js"), "1").expect("a file");
            fs::create_dir(path.join("new")).expect("a folder");
            assert_eq!(watcher.changed().await.expect("a change"), path.join("new"));
            fs::write(path.join("new/a.js"), "1").expect("a file");
            fs::write(path.join("new/b.js"), "1").expect("a file");
            assert_eq!(watcher.changed().await.expect("a change"), path.join("new/a.js"));
            fs::write(path.join("c.js"), "1").expect("a file");
            assert_eq!(watcher.changed().await.expect("a change"), path.join("c.js"));
        });
    }

    #[test]
    fn of_a_watched_file_its_successor_counts_and_its_neighbour_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("server.js");
        fs::write(&file, "1").expect("a file");
        runtime.expect("a runtime").block_on(async {
            let wish = Wish { paths: vec![file.clone()], ..Wish::default() };
            let mut watcher = Watcher::new(wish, Arc::default()).expect("watches");
            fs::write(folder.path().join("other.js"), "1").expect("a file");
            fs::write(folder.path().join("next.js"), "2").expect("a file");
            fs::rename(folder.path().join("next.js"), &file).expect("rename");
            assert_eq!(watcher.changed().await.expect("a change"), file);
        });
    }

    #[test]
    fn what_is_not_there_is_trouble_and_no_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let paths = vec!["/no/such/place".into()];
            let watcher =
                Watcher::new(Wish { paths, ..Wish::default() }, Arc::default()).expect("watches");
            assert!(watcher.trouble[0].contains("/no/such/place"), "{:?}", watcher.trouble);
        });
    }

    #[test]
    fn what_was_removed_or_moved_away_is_watched_again_once_it_is_back() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("app");
        let file = path.join("a.js");
        let make = || {
            fs::create_dir(&path).expect("a folder");
            fs::write(&file, "1").expect("a file");
        };
        make();
        runtime.expect("a runtime").block_on(async {
            let delay = Duration::from_millis(1);
            for paths in [vec![path.clone()], vec![file.clone()]] {
                let wish = Wish { paths, delay, ..Wish::default() };
                let seen = Arc::new(AtomicBool::new(false));
                let mut watcher = Watcher::new(wish, Arc::clone(&seen)).expect("watches");
                for moved in [false, true] {
                    match moved {
                        true => fs::rename(&path, folder.path().join("old")).expect("moved"),
                        false => fs::remove_dir_all(&path).expect("removed"),
                    }
                    // Until all of the going has been told.
                    while watcher.away.is_empty() {
                        watcher.look().await.expect("a look");
                    }
                    make();
                    watcher.changed().await.expect("it is back");
                    assert!(seen.swap(false, Ordering::Relaxed), "whoever asks knows");
                    fs::write(&file, "2").expect("a file");
                    watcher.changed().await.expect("it is watched");
                    seen.store(false, Ordering::Relaxed);
                }
                fs::remove_dir_all(folder.path().join("old")).expect("removed");
            }
        });
    }
}
