//! Reads an app's logs back: all slots in the order of time, full and compressed files too, and what is written from now on.
//!
//! Memory is bounded: one line of each slot, and the last lines that are asked for.
//!
//! A file may be renamed, compressed or removed by the primary at any moment. It is found again by its name of age; one that
//! is gone altogether is passed over. Who follows keeps the file it reads open and finishes it before it goes on to those
//! that came after it.
//!
//! The surprising rule: a line that is none of ours, because somebody edited a file, is taken for a part of the line before it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;

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

/// The lines of one file.
struct Lines {
    from: Box<dyn BufRead>,
    slot: u32,
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
    fn of(folder: &Folder, name: &LogName) -> io::Result<Lines> {
        let plain = LogName { compressed: false, ..name.clone() };
        let whole = LogName { compressed: true, ..name.clone() };
        // It may be compressed this very moment.
        let from: Box<dyn BufRead> = match folder.open(&plain) {
            Ok(file) if !name.compressed => Box::new(BufReader::new(file)),
            _ => match folder.open(&whole) {
                Ok(file) => Box::new(BufReader::new(MultiGzDecoder::new(BufReader::new(file)))),
                Err(_) => Box::new(BufReader::new(folder.open(&plain)?)),
            },
        };
        Ok(Lines::over(from, name.slot))
    }

    fn over(from: Box<dyn BufRead>, slot: u32) -> Lines {
        Lines { from, slot, stamp: String::new(), pending: Vec::new(), last: true, read: 0 }
    }

    /// The next line. What does not end with a newline yet is kept for later, unless nothing will be added any more.
    fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut limited = (&mut self.from).take(LONGEST_LINE);
        self.read += limited.read_until(b'\n', &mut self.pending)? as u64;
        let ended = self.pending.last() == Some(&b'\n');
        let long = self.pending.len() as u64 >= LONGEST_LINE;
        if self.pending.is_empty() || !(ended || long || self.last) {
            return Ok(None);
        }
        let mut text = std::mem::take(&mut self.pending);
        if ended {
            text.pop();
        }
        let entry = line::read(&text, self.slot).unwrap_or_else(|| Entry {
            stamp: self.stamp.clone(),
            slot: self.slot,
            source: line::Source::Own,
            complete: true,
            line: text,
        });
        self.stamp.clone_from(&entry.stamp);
        Ok(Some(entry))
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
    fn of(folder: &Folder, slot: u32) -> io::Result<Snapshot> {
        let mut before = full_files(folder, slot)?;
        for _ in 0..TRIES {
            let current = match folder.open(&LogName::current(slot)) {
                Ok(file) => {
                    let found = sys::fstat(file.as_fd())?;
                    Some((file, (found.st_dev, found.st_ino)))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let after = full_files(folder, slot)?;
            if after.back().map(|name| &name.age) == before.back().map(|name| &name.age) {
                let latest = after.back().map_or(Age::Full(String::new()), |name| name.age.clone());
                return Ok(Snapshot { slot, full: after, latest, current });
            }
            before = after;
        }
        Err(io::Error::other("files are filled faster than they can be listed"))
    }

    /// Leaves out old files: those behind which there are enough lines.
    fn keep_last(&mut self, folder: &Folder, filter: &Filter, last: usize) -> io::Result<()> {
        let count = |mut lines: Lines| -> io::Result<usize> {
            let mut found = 0;
            while let Some(entry) = lines.next()? {
                found += usize::from(filter.takes(&entry));
            }
            Ok(found)
        };
        let mut found = match &self.current {
            Some((file, _)) => {
                let again = BufReader::new(file.try_clone()?);
                let found = count(Lines::over(Box::new(again), self.slot))?;
                // The two share their place in the file.
                io::Seek::rewind(&mut &*file)?;
                found
            }
            None => 0,
        };
        let mut first = self.full.len();
        while first > 0 && found < last {
            first -= 1;
            match Lines::of(folder, &self.full[first]) {
                Ok(lines) => found += count(lines)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        self.full.drain(..first);
        Ok(())
    }
}

fn full_files(folder: &Folder, slot: u32) -> io::Result<VecDeque<LogName>> {
    let full = |name: &LogName| name.slot == slot && name.age != Age::Current;
    Ok(folder.files()?.into_iter().filter(full).collect())
}

/// The slots that have files and are wanted.
fn slots(folder: &Folder, filter: &Filter) -> io::Result<Vec<u32>> {
    let mut slots: Vec<u32> = folder.files()?.into_iter().map(|name| name.slot).collect();
    slots.dedup();
    slots.retain(|slot| filter.takes_slot(*slot));
    Ok(slots)
}

/// The lines of one slot, file after file.
struct SlotLines<'a> {
    folder: &'a Folder,
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
    fn new(folder: &'a Folder, mut files: Snapshot, follow: bool) -> io::Result<SlotLines<'a>> {
        let (latest, mut tail, mut end) = (files.latest.clone(), None, 0);
        if follow && let Some((file, identity)) = files.current.take() {
            end = file.metadata()?.len();
            tail = Some(Tail::new(file, files.slot, identity, latest.clone()));
        }
        Ok(SlotLines { folder, files, lines: None, next: None, tail, latest, end })
    }

    fn advance(&mut self, filter: &Filter) -> io::Result<()> {
        loop {
            if let Some(lines) = &mut self.lines {
                while let Some(entry) = lines.next()? {
                    if filter.takes(&entry) {
                        self.next = Some(entry);
                        return Ok(());
                    }
                }
            }
            if self.files.full.is_empty()
                && let Some(Tail { lines, .. }) = &mut self.tail
            {
                while lines.read < self.end {
                    let Some(entry) = lines.next()? else { break };
                    if filter.takes(&entry) {
                        (self.lines, self.next) = (None, Some(entry));
                        return Ok(());
                    }
                }
            }
            self.lines = match (self.files.full.pop_front(), self.files.current.take()) {
                (Some(name), current) => {
                    self.files.current = current;
                    match Lines::of(self.folder, &name) {
                        Ok(lines) => Some(lines),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                        Err(error) => return Err(error),
                    }
                }
                (None, Some((file, _))) => {
                    Some(Lines::over(Box::new(BufReader::new(file)), self.files.slot))
                }
                (None, None) => {
                    self.next = None;
                    return Ok(());
                }
            };
        }
    }
}

/// Gives every line that is wanted to `take`, in the order of time. With `last`, only so many of the latest.
///
/// # Errors
/// The system's, and those of `take`.
pub(crate) fn read(
    folder: &Folder,
    filter: &Filter,
    last: Option<usize>,
    take: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    read_to_tails(folder, filter, last, false, take).map(drop)
}

/// ... and then goes on where that has ended: no line is missed, and none comes twice.
///
/// # Errors
/// The system's, and those of `take`.
pub(crate) fn read_and_follow(
    folder: Folder,
    filter: &Filter,
    last: Option<usize>,
    take: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<Follow> {
    let (slots, between) = read_to_tails(&folder, filter, last, true, take)?;
    Ok(Follow { folder, filter: filter.clone(), slots, between })
}

fn read_to_tails(
    folder: &Folder,
    filter: &Filter,
    last: Option<usize>,
    follow: bool,
    mut take: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<(BTreeMap<u32, Tail>, BTreeMap<u32, Age>)> {
    let mut heads = Vec::new();
    for slot in slots(folder, filter)? {
        let mut files = Snapshot::of(folder, slot)?;
        if let Some(last) = last {
            files.keep_last(folder, filter, last)?;
        }
        heads.push(SlotLines::new(folder, files, follow)?);
    }
    for head in &mut heads {
        head.advance(filter)?;
    }
    let mut kept = VecDeque::new();
    loop {
        let earliest = heads
            .iter_mut()
            .filter(|head| head.next.is_some())
            .min_by(|a, b| stamp_of(a).cmp(stamp_of(b)));
        let Some(head) = earliest else { break };
        let Some(entry) = head.next.take() else { break };
        head.advance(filter)?;
        match last {
            None => take(entry)?,
            Some(0) => {}
            Some(last) => {
                if kept.len() == last {
                    kept.pop_front();
                }
                kept.push_back(entry);
            }
        }
    }
    kept.into_iter().try_for_each(take)?;
    let (mut tails, mut between) = (BTreeMap::new(), BTreeMap::new());
    for head in heads {
        match head.tail {
            Some(tail) => drop(tails.insert(head.files.slot, tail)),
            None => drop(between.insert(head.files.slot, head.latest)),
        }
    }
    Ok((tails, between))
}

fn stamp_of<'a>(head: &'a SlotLines<'_>) -> &'a str {
    head.next.as_ref().map_or("", |entry| &entry.stamp)
}

/// What is written from now on.
pub(crate) struct Follow {
    folder: Folder,
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

impl Follow {
    /// All that came since the last call, in the order of time.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn more(&mut self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for slot in slots(&self.folder, &self.filter)? {
            self.more_of(slot, &mut entries)?;
        }
        entries.sort_by(|a, b| a.stamp.cmp(&b.stamp));
        Ok(entries)
    }

    /// Goes on in the folder that has taken the place of this one, which was removed; gives what was left here, too.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn go_on_in(&mut self, folder: Folder) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for mut tail in std::mem::take(&mut self.slots).into_values() {
            tail.lines.last = true;
            drain(&mut tail.lines, &self.filter, &mut entries)?;
        }
        self.between.clear();
        self.folder = folder;
        entries.extend(self.more()?);
        Ok(entries)
    }

    /// Where it reads.
    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    fn more_of(&mut self, slot: u32, entries: &mut Vec<Entry>) -> io::Result<()> {
        let files = Snapshot::of(&self.folder, slot)?;
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
        drain(&mut tail.lines, &self.filter, entries)?;
        if !moved(tail) {
            return Ok(());
        }
        let after = std::mem::replace(&mut tail.after, latest);
        // The file that was read was the first to get full since.
        self.begin(files, (after, 1), entries)
    }

    /// Reads what came after a full file and so many others.
    fn begin(
        &mut self,
        files: Snapshot,
        (since, read): (Age, usize),
        entries: &mut Vec<Entry>,
    ) -> io::Result<()> {
        let (slot, latest) = (files.slot, files.latest.clone());
        for name in files.full.iter().filter(|name| name.age > since).skip(read) {
            if let Ok(mut lines) = Lines::of(&self.folder, name) {
                drain(&mut lines, &self.filter, entries)?;
            }
        }
        let Some((file, identity)) = files.current else {
            self.slots.remove(&slot);
            self.between.insert(slot, latest);
            return Ok(());
        };
        let mut tail = Tail::new(file, slot, identity, latest);
        drain(&mut tail.lines, &self.filter, entries)?;
        self.slots.insert(slot, tail);
        Ok(())
    }
}

impl Tail {
    fn new(file: File, slot: u32, identity: Identity, after: Age) -> Tail {
        let mut lines = Lines::over(Box::new(BufReader::new(file)), slot);
        lines.last = false;
        Tail { lines, identity, after }
    }
}

fn drain(lines: &mut Lines, filter: &Filter, entries: &mut Vec<Entry>) -> io::Result<()> {
    while let Some(entry) = lines.next()? {
        if filter.takes(&entry) {
            entries.push(entry);
        }
    }
    Ok(())
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
        let folder = Folder::make_for(root.path(), &name, None).expect("a folder");
        let at = |name: LogName| root.path().join("app").join(name.file());
        let full = |number| LogName::full(1, &format!("2026010100000{number}"));
        for number in 0..3 {
            std::fs::write(at(full(number)), lines(number * 10..number * 10 + 10))
                .expect("written");
        }
        std::fs::write(at(LogName::current(1)), lines(30..40)).expect("written");
        let mut seen = Vec::new();
        let mut follow = read_and_follow(folder, &Filter::default(), Some(2), |entry| {
            seen.push(entry);
            Ok(())
        })
        .expect("a follower");
        assert_eq!(texts(seen), ["38", "39"]);
        std::fs::rename(at(LogName::current(1)), at(full(3))).expect("renamed");
        std::fs::write(at(LogName::current(1)), lines(40..41)).expect("written");
        assert_eq!(texts(follow.more().expect("a look")), ["40"]);
    }

    #[test]
    fn between_a_full_file_and_its_successor_nothing_comes_twice() {
        let root = tempfile::tempdir().expect("a folder");
        let name = Name::read("app").expect("a name");
        let folder = Folder::make_for(root.path(), &name, None).expect("a folder");
        let write = |name: LogName, text: Vec<u8>| {
            std::fs::write(root.path().join("app").join(name.file()), text).expect("written");
        };
        let full = |number| LogName::full(1, &format!("2026010100000{number}"));
        write(full(1), lines(0..10));
        let mut seen = Vec::new();
        let mut follow = read_and_follow(folder, &Filter::default(), Some(2), |entry| {
            seen.push(entry);
            Ok(())
        })
        .expect("a follower");
        assert_eq!(texts(seen), ["8", "9"]);
        // The next file has not been made, is made, gets full, and has no successor yet.
        assert_eq!(texts(follow.more().expect("a look")), [""; 0]);
        write(LogName::current(1), lines(10..12));
        assert_eq!(texts(follow.more().expect("a look")), ["10", "11"]);
        let at = |name: LogName| root.path().join("app").join(name.file());
        std::fs::rename(at(LogName::current(1)), at(full(2))).expect("renamed");
        assert_eq!(texts(follow.more().expect("a look")), [""; 0]);
        write(LogName::current(1), lines(12..13));
        assert_eq!(texts(follow.more().expect("a look")), ["12"]);
    }
}
