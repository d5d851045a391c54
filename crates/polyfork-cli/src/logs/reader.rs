//! Reads logs of one app or of several back: all slots in the order of time, full and compressed files too, and what is
//! written from now on.
//!
//! Memory is bounded: one line of each slot, and the last lines that are asked for.
//!
//! A file that cannot be read, or not to its end, is noted and keeps nothing else from being shown. No link is followed.
//!
//! A file may be renamed, compressed or removed by the primary at any moment. It is found again by its name of age; one that
//! is gone altogether is passed over. Who follows keeps the file it reads open and finishes it before it goes on to those
//! that came after it.
//!
//! The surprising rule: a line that is none of ours, because somebody edited a file, is taken for a part of the line before it.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::PathBuf;

use flate2::bufread::MultiGzDecoder;
use rustix::fs as sys;

use super::folder::{Age, Folder, LogName};
use super::line::{self, Entry};

/// Longer lines are cut where they are read: a worker's pieces are 64 KiB.
const LONGEST_LINE: u64 = 1 << 20;

/// Which lines are wanted.
#[derive(Debug, Default, Clone)]
pub(crate) struct Filter {
    /// Not older than this stamp.
    pub(crate) since: Option<String>,
    /// With this text in them.
    pub(crate) part: Option<Vec<u8>>,
    /// Of this slot.
    pub(crate) slot: Option<u32>,
}

impl Filter {
    fn takes_slot(&self, slot: u32) -> bool {
        // The primary's own remarks go with those of a slot only when it is asked for.
        self.slot.is_none_or(|wanted| wanted == slot)
    }

    fn takes(&self, entry: &Entry) -> bool {
        self.since.as_ref().is_none_or(|since| entry.stamp >= *since)
            && self.part.as_ref().is_none_or(|part| contains(&entry.line, part))
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}

/// The folder of one app, and what in it could not be read.
pub(crate) struct Shelf {
    folder: RefCell<Folder>,
    path: PathBuf,
    /// Files that were noted; each is told once.
    noted: RefCell<BTreeSet<String>>,
    unread: RefCell<Vec<Unread>>,
}

/// A file that could not be read, or not to its end.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) path: PathBuf,
    pub(crate) error: io::Error,
}

impl Shelf {
    pub(crate) fn new(folder: Folder) -> Shelf {
        let path = folder.path.clone();
        let folder = RefCell::new(folder);
        Shelf { folder, path, noted: RefCell::default(), unread: RefCell::default() }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Whether something else is under its path by now, or nothing.
    pub(crate) fn is_replaced(&self) -> bool {
        self.folder.borrow().is_replaced()
    }

    /// What could not be read since the last call.
    pub(crate) fn unread(&self) -> Vec<Unread> {
        self.unread.take()
    }

    /// Files come and go while they are read: one that is gone is no fault.
    fn note(&self, name: &LogName, error: io::Error) {
        if error.kind() != io::ErrorKind::NotFound && self.noted.borrow_mut().insert(name.file()) {
            let path = self.path.join(name.file());
            self.unread.borrow_mut().push(Unread { path, error });
        }
    }

    /// What the folder has at this moment; nothing if that cannot be told, which is noted.
    fn files(&self) -> Vec<LogName> {
        let files = self.folder.borrow().files();
        files.unwrap_or_else(|error| {
            if self.noted.borrow_mut().insert(String::new()) {
                let path = self.path.clone();
                self.unread.borrow_mut().push(Unread { path, error });
            }
            Vec::new()
        })
    }
}

/// The lines of one file.
struct Lines {
    from: Box<dyn BufRead>,
    name: LogName,
    /// It could not be read any further.
    broken: bool,
    /// Of the line before.
    stamp: String,
    /// Begun and not ended yet.
    pending: Vec<u8>,
    /// Ended by the end of the file.
    last: bool,
    /// So many bytes.
    read: u64,
}

impl Lines {
    /// `None`: it is gone, or cannot be opened, which is noted.
    fn of(shelf: &Shelf, name: &LogName) -> Option<Lines> {
        match Lines::open(&shelf.folder.borrow(), name) {
            Ok(from) => Some(Lines::over(from, name.clone())),
            Err(error) => {
                shelf.note(name, error);
                None
            }
        }
    }

    fn open(folder: &Folder, name: &LogName) -> io::Result<Box<dyn BufRead>> {
        let plain = LogName { compressed: false, ..name.clone() };
        let whole = LogName { compressed: true, ..name.clone() };
        // It may be compressed this very moment.
        if !name.compressed
            && let Ok(file) = folder.open(&plain)
        {
            return Ok(Box::new(BufReader::new(file)));
        }
        match folder.open(&whole) {
            Ok(file) => Ok(Box::new(BufReader::new(MultiGzDecoder::new(BufReader::new(file))))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Box::new(BufReader::new(folder.open(&plain)?)))
            }
            Err(error) => Err(error),
        }
    }

    fn over(from: Box<dyn BufRead>, name: LogName) -> Lines {
        Lines {
            from,
            name,
            broken: false,
            stamp: String::new(),
            pending: Vec::new(),
            last: true,
            read: 0,
        }
    }

    /// The next line. What does not end with a newline yet is kept for later, unless nothing will be added any more.
    fn next(&mut self, shelf: &Shelf) -> Option<Entry> {
        if self.broken {
            return None;
        }
        let mut limited = (&mut self.from).take(LONGEST_LINE);
        match limited.read_until(b'\n', &mut self.pending) {
            Ok(read) => self.read += read as u64,
            Err(error) => {
                self.broken = true;
                shelf.note(&self.name, error);
                // Of the line where it breaks off there may be a piece.
                let piece = line::read(&std::mem::take(&mut self.pending), self.name.slot)?;
                return Some(Entry { complete: false, ..piece });
            }
        }
        let ended = self.pending.last() == Some(&b'\n');
        let long = self.pending.len() as u64 >= LONGEST_LINE;
        if self.pending.is_empty() || !(ended || long || self.last) {
            return None;
        }
        let mut text = std::mem::take(&mut self.pending);
        if ended {
            text.pop();
        }
        let entry = line::read(&text, self.name.slot).unwrap_or_else(|| Entry {
            stamp: self.stamp.clone(),
            slot: self.name.slot,
            source: line::Source::Own,
            complete: true,
            line: text,
        });
        self.stamp.clone_from(&entry.stamp);
        Some(entry)
    }
}

/// All files of a slot at one moment.
struct Snapshot {
    slot: u32,
    /// Those that are full, the oldest first.
    full: VecDeque<LogName>,
    /// The age of the latest full file, also when that is not wanted; older than any if there is none.
    latest: Age,
    /// The one that is written to, with its device and inode.
    current: Option<(File, Identity)>,
}

type Identity = (u64, u64);

/// How often a slot may begin a new file while it is looked at.
const TRIES: u32 = 100;

impl Snapshot {
    /// Between a look at the names and the opening of the file that is written to, that one may become a full one, and would
    /// be missed. So it is opened between two looks that must show the same.
    fn of(shelf: &Shelf, slot: u32) -> Option<Snapshot> {
        let name = LogName::current(slot);
        let mut before = full_files(shelf, slot);
        for _ in 0..TRIES {
            let current = open_current(shelf, &name);
            let after = full_files(shelf, slot);
            if after.back().map(|name| &name.age) == before.back().map(|name| &name.age) {
                let latest = after.back().map_or(Age::Full(String::new()), |name| name.age.clone());
                return Some(Snapshot { slot, full: after, latest, current });
            }
            before = after;
        }
        shelf.note(&name, io::Error::other("files are filled faster than they can be listed"));
        None
    }

    /// Leaves out old files: those behind which there are enough lines.
    fn keep_last(&mut self, shelf: &Shelf, filter: &Filter, last: usize) {
        let count = |mut lines: Lines| {
            let all = std::iter::from_fn(|| lines.next(shelf));
            all.filter(|entry| filter.takes(entry)).count()
        };
        let again = self.current.as_ref().and_then(|(file, _)| file.try_clone().ok());
        let mut found = 0;
        if let Some(again) = again {
            let again = Box::new(BufReader::new(again));
            found = count(Lines::over(again, LogName::current(self.slot)));
        }
        // The two share their place in the file.
        if let Some((file, _)) = &self.current
            && let Err(error) = io::Seek::rewind(&mut &*file)
        {
            shelf.note(&LogName::current(self.slot), error);
        }
        let mut first = self.full.len();
        while first > 0 && found < last {
            first -= 1;
            found += Lines::of(shelf, &self.full[first]).map_or(0, count);
        }
        self.full.drain(..first);
    }
}

/// The file that is written to, with its identity; `None` if there is none, or none that can be read, which is noted.
fn open_current(shelf: &Shelf, name: &LogName) -> Option<(File, Identity)> {
    let opened = shelf.folder.borrow().open(name).and_then(|file| {
        let found = sys::fstat(file.as_fd())?;
        Ok((file, (found.st_dev, found.st_ino)))
    });
    opened.map_err(|error| shelf.note(name, error)).ok()
}

fn full_files(shelf: &Shelf, slot: u32) -> VecDeque<LogName> {
    let full = |name: &LogName| name.slot == slot && name.age != Age::Current;
    shelf.files().into_iter().filter(full).collect()
}

/// The slots that have files and are wanted.
fn slots(shelf: &Shelf, filter: &Filter) -> Vec<u32> {
    let mut slots: Vec<u32> = shelf.files().into_iter().map(|name| name.slot).collect();
    slots.dedup();
    slots.retain(|slot| filter.takes_slot(*slot));
    slots
}

/// The lines of one slot, file after file.
struct SlotLines<'a> {
    /// Whose, by its place among those that are read.
    app: usize,
    shelf: &'a Shelf,
    files: Snapshot,
    lines: Option<Lines>,
    next: Option<Entry>,
    /// Where the file that is written to is being read, for who follows it from there on.
    tail: Option<Tail>,
    /// The latest full file at the beginning.
    latest: Age,
    /// How long the file that is written to was at the beginning: a writer that is faster than its reader would never be read to the end.
    end: u64,
}

impl<'a> SlotLines<'a> {
    fn new(app: usize, shelf: &'a Shelf, mut files: Snapshot, follow: bool) -> SlotLines<'a> {
        let (latest, mut tail, mut end) = (files.latest.clone(), None, 0);
        if follow && let Some((file, identity)) = files.current.take() {
            end = file.metadata().map_or(0, |found| found.len());
            tail = Some(Tail::new(file, files.slot, identity, latest.clone()));
        }
        SlotLines { app, shelf, files, lines: None, next: None, tail, latest, end }
    }

    fn advance(&mut self, filter: &Filter) {
        let wanted = |lines: &mut Lines, shelf: &Shelf, end: u64| {
            while lines.read < end {
                let entry = lines.next(shelf)?;
                if filter.takes(&entry) {
                    return Some(entry);
                }
            }
            None
        };
        loop {
            self.next = match (&mut self.lines, &mut self.tail) {
                (Some(lines), _) => wanted(lines, self.shelf, u64::MAX),
                (None, Some(tail)) if self.files.full.is_empty() => {
                    wanted(&mut tail.lines, self.shelf, self.end)
                }
                _ => None,
            };
            if self.next.is_some() {
                return;
            }
            self.lines = match (self.files.full.pop_front(), self.lines.take()) {
                (Some(name), _) => Lines::of(self.shelf, &name),
                (None, read) => match self.files.current.take() {
                    Some((file, _)) => Some(Lines::over(
                        Box::new(BufReader::new(file)),
                        LogName::current(self.files.slot),
                    )),
                    // Behind the last full file comes the tail.
                    None if read.is_some() && self.tail.is_some() => None,
                    None => return,
                },
            };
        }
    }
}

/// Gives every line that is wanted to `take`, with the place of its app in `shelves`, in the order of time. With `last`, only
/// so many of the latest.
///
/// # Errors
/// Those of `take`.
pub(crate) fn read(
    shelves: &[Shelf],
    filter: &Filter,
    last: Option<usize>,
    take: impl FnMut(usize, Entry) -> io::Result<()>,
) -> io::Result<()> {
    merged(shelves, filter, last, false, take).map(drop)
}

/// ... and then goes on where that has ended, with a follower for each app: no line is missed, and none comes twice.
///
/// # Errors
/// Those of `take`.
pub(crate) fn read_and_follow<'a>(
    shelves: &'a [Shelf],
    filter: &Filter,
    last: Option<usize>,
    take: impl FnMut(usize, Entry) -> io::Result<()>,
) -> io::Result<Vec<Follow<'a>>> {
    let heads = merged(shelves, filter, last, true, take)?;
    let follow = |shelf| Follow {
        shelf,
        filter: filter.clone(),
        slots: BTreeMap::new(),
        between: BTreeMap::new(),
    };
    let mut follows: Vec<Follow<'_>> = shelves.iter().map(follow).collect();
    for head in heads {
        let Follow { slots, between, .. } = &mut follows[head.app];
        match head.tail {
            Some(tail) => drop(slots.insert(head.files.slot, tail)),
            None => drop(between.insert(head.files.slot, head.latest)),
        }
    }
    Ok(follows)
}

/// Gives the lines of all slots of all apps in the order of time; where each of them has been read to.
fn merged<'a>(
    shelves: &'a [Shelf],
    filter: &Filter,
    last: Option<usize>,
    follow: bool,
    mut take: impl FnMut(usize, Entry) -> io::Result<()>,
) -> io::Result<Vec<SlotLines<'a>>> {
    let mut heads = Vec::new();
    for (app, shelf) in shelves.iter().enumerate() {
        for slot in slots(shelf, filter) {
            let Some(mut files) = Snapshot::of(shelf, slot) else { continue };
            if let Some(last) = last {
                files.keep_last(shelf, filter, last);
            }
            heads.push(SlotLines::new(app, shelf, files, follow));
        }
    }
    // The earliest line of each; of several at the same time that of the first.
    let mut earliest = BinaryHeap::new();
    let advanced = |head: &mut SlotLines<'_>, place: usize| {
        head.advance(filter);
        head.next.as_ref().map(|entry| Reverse((entry.stamp.clone(), place)))
    };
    for (place, head) in heads.iter_mut().enumerate() {
        earliest.extend(advanced(head, place));
    }
    let mut kept = VecDeque::new();
    while let Some(Reverse((_, place))) = earliest.pop() {
        let head = &mut heads[place];
        let Some(entry) = head.next.take() else { continue };
        let app = head.app;
        earliest.extend(advanced(head, place));
        match last {
            None => take(app, entry)?,
            Some(0) => {}
            Some(last) => {
                if kept.len() == last {
                    kept.pop_front();
                }
                kept.push_back((app, entry));
            }
        }
    }
    kept.into_iter().try_for_each(|(app, entry)| take(app, entry))?;
    Ok(heads)
}

/// What is written from now on.
pub(crate) struct Follow<'a> {
    shelf: &'a Shelf,
    filter: Filter,
    slots: BTreeMap<u32, Tail>,
    /// Slots whose file has got full and whose next one is about to be made: all is read up to this full file.
    between: BTreeMap<u32, Age>,
}

/// Where one slot is being read.
struct Tail {
    lines: Lines,
    /// Of the file.
    identity: Identity,
    /// The latest full file when this one was opened.
    after: Age,
}

impl Follow<'_> {
    /// All that came since the last call, in the order of time.
    pub(crate) fn more(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for slot in slots(self.shelf, &self.filter) {
            self.more_of(slot, &mut entries);
        }
        entries.sort_by(|a, b| a.stamp.cmp(&b.stamp));
        entries
    }

    /// Goes on in the folder that has taken the place of this one, which was removed; gives what was left here, too.
    pub(crate) fn go_on_in(&mut self, folder: Folder) -> Vec<Entry> {
        let mut entries = Vec::new();
        for mut tail in std::mem::take(&mut self.slots).into_values() {
            tail.lines.last = true;
            drain(&mut tail.lines, self.shelf, &self.filter, &mut entries);
        }
        self.between.clear();
        self.shelf.folder.replace(folder);
        entries.extend(self.more());
        entries
    }

    fn more_of(&mut self, slot: u32, entries: &mut Vec<Entry>) {
        let Some(files) = Snapshot::of(self.shelf, slot) else { return };
        let latest = files.latest.clone();
        // When there is none, the next one is about to be made.
        let now = files.current.as_ref().map(|(_, identity)| *identity);
        let moved = |tail: &Tail| now.is_some_and(|now| now != tail.identity);
        let Some(tail) = self.slots.get_mut(&slot) else {
            // One that was not there before is read from its beginning.
            let read = self.between.remove(&slot).unwrap_or(Age::Full(String::new()));
            return self.begin(files, (read, 0), entries);
        };
        // Once it has been moved nothing is added to it any more.
        tail.lines.last = moved(tail);
        drain(&mut tail.lines, self.shelf, &self.filter, entries);
        if !moved(tail) {
            return;
        }
        let after = std::mem::replace(&mut tail.after, latest);
        // The file that was read was the first to get full since.
        self.begin(files, (after, 1), entries);
    }

    /// Reads what came after a full file and so many others.
    fn begin(&mut self, files: Snapshot, (since, read): (Age, usize), entries: &mut Vec<Entry>) {
        let (slot, latest) = (files.slot, files.latest.clone());
        for name in files.full.iter().filter(|name| name.age > since).skip(read) {
            if let Some(mut lines) = Lines::of(self.shelf, name) {
                drain(&mut lines, self.shelf, &self.filter, entries);
            }
        }
        let Some((file, identity)) = files.current else {
            self.slots.remove(&slot);
            self.between.insert(slot, latest);
            return;
        };
        let mut tail = Tail::new(file, slot, identity, latest);
        drain(&mut tail.lines, self.shelf, &self.filter, entries);
        self.slots.insert(slot, tail);
    }
}

impl Tail {
    fn new(file: File, slot: u32, identity: Identity, after: Age) -> Tail {
        let mut lines = Lines::over(Box::new(BufReader::new(file)), LogName::current(slot));
        lines.last = false;
        Tail { lines, identity, after }
    }
}

fn drain(lines: &mut Lines, shelf: &Shelf, filter: &Filter, entries: &mut Vec<Entry>) {
    let all = std::iter::from_fn(|| lines.next(shelf));
    entries.extend(all.filter(|entry| filter.takes(entry)));
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::line::{Format, Source};
    use super::*;
    use crate::control::name::Name;

    /// The lines of these numbers.
    fn lines(numbers: std::ops::Range<u64>) -> Vec<u8> {
        let mut text = Vec::new();
        for number in numbers {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(number);
            let line = number.to_string();
            line::write(&mut text, Format::Text, time, 1, Source::Out(1), line.as_bytes(), true);
        }
        text
    }

    fn texts(entries: Vec<Entry>) -> Vec<String> {
        entries.into_iter().map(|entry| String::from_utf8(entry.line).expect("text")).collect()
    }

    #[test]
    fn files_that_were_left_out_are_not_read_when_the_next_one_is_full() {
        let root = tempfile::tempdir().expect("a folder");
        let name = Name::read("app").expect("a name");
        let shelf = [Shelf::new(Folder::make_for(root.path(), &name, None).expect("a folder"))];
        let at = |name: LogName| root.path().join("app").join(name.file());
        let full = |number| LogName::full(1, &format!("2026010100000{number}"));
        for number in 0..3 {
            std::fs::write(at(full(number)), lines(number * 10..number * 10 + 10))
                .expect("written");
        }
        std::fs::write(at(LogName::current(1)), lines(30..40)).expect("written");
        let mut seen = Vec::new();
        let mut follow = read_and_follow(&shelf, &Filter::default(), Some(2), |_, entry| {
            seen.push(entry);
            Ok(())
        })
        .expect("a follower");
        let mut follow = follow.pop().expect("a follower");
        assert_eq!(texts(seen), ["38", "39"]);
        std::fs::rename(at(LogName::current(1)), at(full(3))).expect("renamed");
        std::fs::write(at(LogName::current(1)), lines(40..41)).expect("written");
        assert_eq!(texts(follow.more()), ["40"]);
    }

    #[test]
    fn between_a_full_file_and_its_successor_nothing_comes_twice() {
        let root = tempfile::tempdir().expect("a folder");
        let name = Name::read("app").expect("a name");
        let shelf = [Shelf::new(Folder::make_for(root.path(), &name, None).expect("a folder"))];
        let write = |name: LogName, text: Vec<u8>| {
            std::fs::write(root.path().join("app").join(name.file()), text).expect("written");
        };
        let full = |number| LogName::full(1, &format!("2026010100000{number}"));
        write(full(1), lines(0..10));
        let mut seen = Vec::new();
        let mut follow = read_and_follow(&shelf, &Filter::default(), Some(2), |_, entry| {
            seen.push(entry);
            Ok(())
        })
        .expect("a follower");
        let mut follow = follow.pop().expect("a follower");
        assert_eq!(texts(seen), ["8", "9"]);
        // The next file has not been made, is made, gets full, and has no successor yet.
        assert_eq!(texts(follow.more()), [""; 0]);
        write(LogName::current(1), lines(10..12));
        assert_eq!(texts(follow.more()), ["10", "11"]);
        let at = |name: LogName| root.path().join("app").join(name.file());
        std::fs::rename(at(LogName::current(1)), at(full(2))).expect("renamed");
        assert_eq!(texts(follow.more()), [""; 0]);
        write(LogName::current(1), lines(12..13));
        assert_eq!(texts(follow.more()), ["12"]);
    }
}
