//! `polyfork logs NAME`: what workers wrote, in the order of time over all apps that are meant, and what they write from now on.
//!
//! Reads files; a running app is not asked for anything but where they are. So what an app wrote can be read after its end,
//! and following costs the primary nothing.
//!
//! The surprising rule: what is written from now on is in order as far as it is seen together. A line that is written late
//! under an early stamp comes late.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{fail, targets};
use crate::args::operate::LogsArgs;
use crate::control::folder::Runtime;
use crate::control::name::{self, Name};
use crate::exit::Code;
use crate::ledger::Verdict;
use crate::logs::folder::{self, Folder};
use crate::logs::line::{self, Entry, Source};
use crate::logs::reader::{self, Filter, Shelf, Unread};
use crate::style::{Ink, Paint};
use crate::values::Lines;
use crate::{clock, out, words};

/// Between two looks for a folder that was removed.
const LOOK: Duration = Duration::from_millis(200);
/// In this time what several apps write is collected, to be put in order.
const TOGETHER: Duration = Duration::from_millis(10);

/// One app's logs.
struct Log {
    name: Name,
    folder: Folder,
}

/// How lines are shown.
struct Show {
    json: bool,
    paint: Paint,
    /// Lines of several apps are mixed.
    several: bool,
    /// Their names.
    apps: Vec<Name>,
    /// What the verb comes to.
    code: Code,
}

/// Runs the verb.
pub(crate) async fn run(args: LogsArgs) -> Code {
    let json = args.json;
    let logs = match find(&args) {
        Ok(logs) => logs,
        Err(verdict) => return fail(&verdict, json),
    };
    let filter = Filter {
        since: args.since.map(clock::fine_stamp),
        part: args.grep.map(String::into_bytes),
        slot: args.slot,
    };
    let mut show = Show {
        json,
        paint: Paint::stdout(),
        several: logs.len() > 1,
        apps: Vec::new(),
        code: Code::Stopped,
    };
    let mut shelves = Vec::new();
    for Log { name, folder } in logs {
        show.apps.push(name);
        shelves.push(Shelf::new(folder));
    }
    let last = match args.lines {
        Lines::Last(last) => Some(last),
        Lines::All => None,
    };
    may_open_many();
    let shown = match args.follow {
        true => follow(&shelves, &filter, &mut show, last).await,
        false => reader::read(&shelves, &filter, last, |app, entry| show.line(app, &entry)),
    };
    show.complain(&shelves);
    match shown {
        Ok(()) => show.code,
        // Whoever read has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => show.code,
        Err(error) => {
            let text = words::plain(&format!("cannot follow the logs: {error}"));
            fail(&Verdict { code: Code::Unexpected, text }, json)
        }
    }
}

/// Every slot of every app has two files open while they are merged.
fn may_open_many() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // With fewer, some of many files cannot be read, which is told.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

async fn follow(
    shelves: &[Shelf],
    filter: &Filter,
    show: &mut Show,
    last: Option<usize>,
) -> io::Result<()> {
    // From before the reading on, so that nothing falls between the two.
    let mut watch = Watch::new(shelves.iter().map(Shelf::path))?;
    let mut follows =
        reader::read_and_follow(shelves, filter, last, |app, entry| show.line(app, &entry))?;
    let mut changed: Vec<usize> = (0..shelves.len()).collect();
    loop {
        let mut entries: Vec<(usize, Entry)> = Vec::new();
        let mut removed = Vec::new();
        for app in changed {
            let more = match shelves[app].is_replaced() {
                false => follows[app].more(),
                // A folder that takes the place of one that was removed comes with the next line.
                true => match Folder::find(shelves[app].path()) {
                    Some(folder) if watch.again(app, &folder.path).is_ok() => {
                        follows[app].go_on_in(folder)
                    }
                    _ => {
                        removed.push(app);
                        continue;
                    }
                },
            };
            entries.extend(more.into_iter().map(|entry| (app, entry)));
        }
        entries.sort_by(|(_, a), (_, b)| a.stamp.cmp(&b.stamp));
        entries.iter().try_for_each(|(app, entry)| show.line(*app, entry))?;
        show.complain(shelves);
        changed = match removed.is_empty() {
            true => watch.next().await?,
            false => match tokio::time::timeout(LOOK, watch.next()).await {
                Ok(changed) => changed?,
                Err(_) => Vec::new(),
            },
        };
        changed.extend(removed);
        changed.sort_unstable();
        changed.dedup();
    }
}

/// Tells which apps have written.
struct Watch {
    notify: AsyncFd<OwnedFd>,
    /// Of each app, as the kernel numbers its folder, and that in which it is.
    numbers: Vec<[Option<i32>; 2]>,
}

impl Watch {
    /// Sound for an `OwnedFd`, which stays open and the same until it is dropped; see tokio's pull request 8587.
    #[expect(
        deprecated,
        reason = "the unsafe one is for types that may close their descriptor earlier"
    )]
    fn new<'a>(folders: impl Iterator<Item = &'a Path>) -> io::Result<Watch> {
        let notify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let numbers = folders.map(|folder| Watch::add(&notify, folder)).collect::<Result<_, _>>();
        let notify = AsyncFd::with_interest(notify, Interest::READABLE)?;
        Ok(Watch { notify, numbers: numbers? })
    }

    fn add(notify: &OwnedFd, folder: &Path) -> Result<[Option<i32>; 2], Errno> {
        let what = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        let what = what | WatchFlags::DONT_FOLLOW | WatchFlags::ONLYDIR;
        let number = inotify::add_watch(notify, folder, what)?;
        let what = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        // Only tells sooner that the folder was removed.
        let above = folder.parent().and_then(|above| inotify::add_watch(notify, above, what).ok());
        Ok([Some(number), above])
    }

    /// Watches the folder that has taken the place of another.
    fn again(&mut self, app: usize, folder: &Path) -> Result<(), Errno> {
        self.numbers[app] = Watch::add(self.notify.get_ref(), folder)?;
        Ok(())
    }

    /// Waits until some have.
    async fn next(&self) -> io::Result<Vec<usize>> {
        let mut ready = self.notify.readable().await?;
        if self.numbers.len() > 1 {
            tokio::time::sleep(TOGETHER).await;
        }
        let mut changed = vec![false; self.numbers.len()];
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(self.notify.get_ref(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) => {
                    // More than the kernel can note: it may have been anybody.
                    let anybody = event.events().contains(ReadFlags::QUEUE_OVERFLOW);
                    for (number, changed) in self.numbers.iter().zip(&mut changed) {
                        *changed |= anybody || number.contains(&Some(event.wd()));
                    }
                }
                Err(Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        Ok((0..changed.len()).filter(|app| changed[*app]).collect())
    }
}

impl Show {
    /// Tells what could not be read. All else has been shown.
    fn complain(&mut self, shelves: &[Shelf]) {
        for (app, shelf) in self.apps.iter().zip(shelves) {
            for Unread { path, error } in shelf.unread() {
                let next = match error.kind() {
                    io::ErrorKind::PermissionDenied => "see whose it is",
                    _ if error.raw_os_error() == Some(Errno::MFILE.raw_os_error()) => {
                        "`ulimit -n` allows more open files"
                    }
                    _ => "remove it",
                };
                let text = format!(
                    "{app}: cannot read {}: {error}; all else is shown; {next}",
                    path.display()
                );
                let text = words::plain(&text);
                self.code = fail(&Verdict { code: Code::Unexpected, text }, self.json);
            }
        }
    }

    fn line(&self, app: usize, entry: &Entry) -> io::Result<()> {
        let app = &self.apps[app];
        let bytes = match self.json {
            true => line::json(entry, Some(app.as_str())),
            false => self.text(app, entry),
        };
        match out::write(&bytes) {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn text(&self, app: &Name, entry: &Entry) -> Vec<u8> {
        let slot = match entry.slot {
            0 => "-".to_owned(),
            number => number.to_string(),
        };
        let who = if self.several { format!("{app} {slot}") } else { slot };
        let mark = if entry.complete { "|" } else { "+" };
        let time = entry.stamp.get(..23).unwrap_or(&entry.stamp);
        let ink = if entry.source == Source::Own { Ink::Dim } else { Ink::Slot(entry.slot) };
        let front = format!(
            "{} {} ",
            self.paint.with(Ink::Dim, time),
            self.paint.with(ink, &format!("{who} {mark}"))
        );
        let mut bytes = front.into_bytes();
        match self.paint.is_terminal() {
            true => bytes.extend(words::colours_only(&entry.line).into_bytes()),
            false => bytes.extend_from_slice(&entry.line),
        }
        bytes.push(b'\n');
        bytes
    }
}

/// The logs of apps that run, and of those that ran.
fn find(args: &LogsArgs) -> Result<Vec<Log>, Verdict> {
    let runtime = Runtime::find()?;
    let running = match &runtime {
        Some(runtime) => runtime.names()?,
        None => Vec::new(),
    };
    let root = folder::root(args.log_dir.as_deref());
    let past = root.as_ref().map(|root| names_in(root)).unwrap_or_default();
    let mut names = running.clone();
    names.extend(past);
    names.sort_unstable();
    names.dedup();
    let mut logs = Vec::new();
    for text in &args.names {
        let meant: Vec<&Name> =
            names.iter().filter(|name| name::matches(text, name.as_str())).collect();
        if meant.is_empty() {
            let text = targets::no_such(text, &names);
            return Err(Verdict { code: Code::NoSuchApp, text });
        }
        for name in meant {
            let card = runtime.as_ref().and_then(|runtime| runtime.app(name)?.card());
            let told: Option<PathBuf> = card.as_ref().and_then(|card| card.logs.clone());
            let told_at = told.clone();
            let path = match (told, &card, &root) {
                (Some(path), ..) => Some(path),
                (None, Some(_), _) => None,
                (None, None, Ok(root)) => Some(root.join(name.as_str())),
                (None, None, Err(verdict)) => return Err(verdict.clone()),
            };
            if logs.iter().any(|log: &Log| log.name == *name) {
                continue;
            }
            match path.and_then(|path| Folder::find(&path)) {
                Some(folder) => logs.push(Log { name: name.clone(), folder }),
                None if name::is_pattern(text) => {}
                None if told_at.is_some() => {
                    let path = told_at.unwrap_or_default();
                    let text = format!(
                        "the folder of {name}'s logs, {}, is gone; it is made anew with the next line",
                        path.display()
                    );
                    return Err(Verdict { code: Code::Refused, text });
                }
                None => {
                    let text = format!(
                        "{name} has no logs: it runs in the foreground (`polyfork run`), and what it writes goes \
                         where it was started"
                    );
                    return Err(Verdict { code: Code::Refused, text });
                }
            }
        }
    }
    Ok(logs)
}

fn names_in(root: &std::path::Path) -> Vec<Name> {
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    entries.filter_map(|entry| Name::read(entry.file_name().to_str()?).ok()).collect()
}
