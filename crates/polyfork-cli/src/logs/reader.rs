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
        Lines { from, slot, stamp: String::new(), pending: Vec::new(), last: true }
    }

    /// The next line. What does not end with a newline yet is kept for later, unless nothing will be added any more.
    fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut limited = (&mut self.from).take(LONGEST_LINE);
        limited.read_until(b'\n', &mut self.pending)?;
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

/// The lines of one slot, file after file.
struct SlotLines<'a> {
    folder: &'a Folder,
    files: VecDeque<LogName>,
    lines: Option<Lines>,
    next: Option<Entry>,
}

impl SlotLines<'_> {
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
            let Some(name) = self.files.pop_front() else {
                self.next = None;
                return Ok(());
            };
            self.lines = match Lines::of(self.folder, &name) {
                Ok(lines) => Some(lines),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
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
    mut take: impl FnMut(Entry) -> io::Result<()>,
) -> io::Result<()> {
    let mut slots: BTreeMap<u32, VecDeque<LogName>> = BTreeMap::new();
    for name in folder.files()?.into_iter().filter(|name| filter.takes_slot(name.slot)) {
        slots.entry(name.slot).or_default().push_back(name);
    }
    if let Some(last) = last {
        for files in slots.values_mut() {
            needed(folder, files, filter, last)?;
        }
    }
    let open = |files| SlotLines { folder, files, lines: None, next: None };
    let mut heads: Vec<SlotLines<'_>> = slots.into_values().map(open).collect();
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
    kept.into_iter().try_for_each(take)
}

fn stamp_of<'a>(head: &'a SlotLines<'_>) -> &'a str {
    head.next.as_ref().map_or("", |entry| &entry.stamp)
}

/// Leaves out old files of a slot: those behind which there are enough lines.
fn needed(
    folder: &Folder,
    files: &mut VecDeque<LogName>,
    filter: &Filter,
    last: usize,
) -> io::Result<()> {
    let mut found = 0;
    let mut first = files.len();
    while first > 0 && found < last {
        first -= 1;
        let mut lines = match Lines::of(folder, &files[first]) {
            Ok(lines) => lines,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        while let Some(entry) = lines.next()? {
            found += usize::from(filter.takes(&entry));
        }
    }
    files.drain(..first);
    Ok(())
}

/// What is written from now on.
pub(crate) struct Follow {
    folder: Folder,
    filter: Filter,
    slots: BTreeMap<u32, Tail>,
}

/// Where one slot is being read.
struct Tail {
    lines: Lines,
    /// Device and inode of the file.
    identity: (u64, u64),
    /// The latest full file when this one was opened.
    after: Age,
}

impl Follow {
    /// From the present end of every file.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn new(folder: Folder, filter: Filter) -> io::Result<Follow> {
        let mut follow = Follow { folder, filter, slots: BTreeMap::new() };
        for name in follow.folder.files()? {
            if name.age == Age::Current && follow.filter.takes_slot(name.slot) {
                let after = follow.latest_full(name.slot)?;
                let (mut file, identity) = match follow.current(name.slot) {
                    Ok(found) => found,
                    Err(_) => continue,
                };
                io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
                follow.slots.insert(name.slot, Tail::new(file, name.slot, identity, after));
            }
        }
        Ok(follow)
    }

    fn latest_full(&self, slot: u32) -> io::Result<Age> {
        let full = |name: &LogName| name.slot == slot && name.age != Age::Current;
        let latest = self.folder.files()?.into_iter().filter(full).map(|name| name.age).max();
        Ok(latest.unwrap_or(Age::Full(String::new())))
    }

    fn current(&self, slot: u32) -> io::Result<(File, (u64, u64))> {
        let file = self.folder.open(&LogName::current(slot))?;
        let found = sys::fstat(file.as_fd())?;
        Ok((file, (found.st_dev, found.st_ino)))
    }

    /// All that came since the last call, in the order of time.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn more(&mut self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let names = self.folder.files()?;
        let slots: Vec<u32> = names
            .iter()
            .filter(|name| name.age == Age::Current && self.filter.takes_slot(name.slot))
            .map(|name| name.slot)
            .collect();
        for slot in slots {
            self.more_of(slot, &mut entries)?;
        }
        entries.sort_by(|a, b| a.stamp.cmp(&b.stamp));
        Ok(entries)
    }

    fn more_of(&mut self, slot: u32, entries: &mut Vec<Entry>) -> io::Result<()> {
        let latest = self.latest_full(slot)?;
        let name = LogName::current(slot);
        let there = self.folder.stat(&name.file());
        let now = there.map(|there| (there.st_dev, there.st_ino)).ok();
        let tail = self.slots.remove(&slot);
        let moved = tail.as_ref().is_some_and(|tail| Some(tail.identity) != now);
        let after = match tail {
            Some(mut tail) => {
                // When it was moved nothing is added to it any more.
                tail.lines.last = moved;
                drain(&mut tail.lines, &self.filter, entries)?;
                if !moved {
                    self.slots.insert(slot, tail);
                    return Ok(());
                }
                Some(tail.after)
            }
            None => None,
        };
        // The first of the full files that came since is the one just finished, unless somebody else removed it.
        if let Some(after) = after {
            let between =
                |name: &LogName| name.slot == slot && name.age != Age::Current && name.age > after;
            let came: Vec<LogName> = self.folder.files()?.into_iter().filter(between).collect();
            for name in came.iter().skip(1).filter(|name| name.age <= latest) {
                if let Ok(mut lines) = Lines::of(&self.folder, name) {
                    drain(&mut lines, &self.filter, entries)?;
                }
            }
        }
        if let Ok((file, identity)) = self.current(slot) {
            let mut tail = Tail::new(file, slot, identity, latest);
            drain(&mut tail.lines, &self.filter, entries)?;
            self.slots.insert(slot, tail);
        }
        Ok(())
    }
}

impl Tail {
    fn new(file: File, slot: u32, identity: (u64, u64), after: Age) -> Tail {
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
