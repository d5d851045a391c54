//! `polyfork logs NAME`: what workers wrote, in the order of time, and what they write from now on.
//!
//! Reads files; a running app is not asked for anything but where they are. So what an app wrote can be read after its end,
//! and following costs the primary nothing.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
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
use crate::logs::reader::{self, Filter, Follow};
use crate::style::{Ink, Paint};
use crate::values::Lines;
use crate::{clock, out, words};

/// Between two looks for a folder that was removed.
const LOOK: Duration = Duration::from_millis(200);

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
    let show = Show { json, paint: Paint::stdout(), several: logs.len() > 1 };
    let shown = show_all(logs, filter, &show, args.lines, args.follow).await;
    match shown {
        Ok(()) => Code::Stopped,
        // Whoever read has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Code::Stopped,
        Err(error) => {
            let text = words::plain(&format!("cannot read the logs: {error}"));
            fail(&Verdict { code: Code::Unexpected, text }, json)
        }
    }
}

async fn show_all(
    logs: Vec<Log>,
    filter: Filter,
    show: &Show,
    lines: Lines,
    follow: bool,
) -> io::Result<()> {
    let last = match lines {
        Lines::Last(last) => Some(last),
        Lines::All => None,
    };
    let mut follows = Vec::new();
    for Log { name, folder } in logs {
        let tell = |entry: Entry| show.line(&name, &entry);
        if !follow {
            reader::read(&folder, &filter, last, tell)?;
            continue;
        }
        // From before the reading on, so that nothing falls between the two.
        let notify = watch(&folder)?;
        let tail = reader::read_and_follow(folder, &filter, last, tell)?;
        follows.push((name, notify, tail));
    }
    follow_all(follows, show).await
}

/// Sound for an `OwnedFd`, which stays open and the same until it is dropped; see tokio's pull request 8587.
#[expect(
    deprecated,
    reason = "the unsafe one is for types that may close their descriptor earlier"
)]
fn watch(folder: &Folder) -> io::Result<AsyncFd<OwnedFd>> {
    let notify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let what = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
    inotify::add_watch(&notify, &folder.path, what)?;
    if let Some(parent) = folder.path.parent() {
        let what = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        // Only tells sooner that the folder was removed.
        let _ = inotify::add_watch(&notify, parent, what);
    }
    AsyncFd::with_interest(notify, Interest::READABLE)
}

/// The folder that takes the place of one that was removed. It comes with the next line.
async fn replaced(gone: &Folder) -> Folder {
    loop {
        match Folder::find(&gone.path) {
            Some(folder) => return folder,
            None => tokio::time::sleep(LOOK).await,
        }
    }
}

async fn follow_all(follows: Vec<(Name, AsyncFd<OwnedFd>, Follow)>, show: &Show) -> io::Result<()> {
    let following = follows.into_iter().map(|(name, mut notify, mut tail)| async move {
        loop {
            let more = match tail.folder().is_replaced() {
                false => tail.more()?,
                true => {
                    let folder = replaced(tail.folder()).await;
                    notify = watch(&folder)?;
                    tail.go_on_in(folder)?
                }
            };
            for entry in more {
                show.line(&name, &entry)?;
            }
            let mut ready = notify.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut events = Reader::new(notify.get_ref(), &mut buffer);
            loop {
                match events.next() {
                    Ok(_) => {}
                    Err(Errno::WOULDBLOCK) => break,
                    Err(error) => return Err::<(), io::Error>(error.into()),
                }
            }
            ready.clear_ready();
        }
    });
    let mut following: Vec<_> = following.map(Box::pin).collect();
    if following.is_empty() {
        return Ok(());
    }
    std::future::poll_fn(|context| {
        for each in &mut following {
            if let std::task::Poll::Ready(outcome) = each.as_mut().poll(context) {
                return std::task::Poll::Ready(outcome);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

impl Show {
    fn line(&self, app: &Name, entry: &Entry) -> io::Result<()> {
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
