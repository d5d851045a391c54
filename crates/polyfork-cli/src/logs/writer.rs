//! Writes the lines of one app to its files, and begins new ones when these are full or old.
//!
//! One thread does it, so that a slow disk stops that thread and nothing else; between it and the primary is one bounded
//! buffer. Worker output waits for room in it, and the wait reaches the worker's own pipe; the primary's lines never
//! wait, they are dropped and counted when there is no room.
//!
//! Rotation is a rename by the thread that writes, so nothing is lost between two files. Another thread, which is there
//! only while there is something to do, compresses what is full.
//!
//! A disk that is full, or a file that cannot be opened, loses lines: they are counted, and the count is written where
//! they are missing as soon as something can be written again. A half-written line is taken back. A file that somebody
//! moved or removed is made anew, and so is the folder, by the rules of the start; once a second is tried at most.
//!
//! The surprising rule: nothing looks at the clock by itself. A file that is a day old is rotated when the next line comes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use flate2::Compression;
use flate2::write::GzEncoder;
use polyfork::cluster::upgrade;
use rustix::fs as sys;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::folder::{Age, Folder, LogName};
use super::line::{self, Format, Source};
use crate::clock;
use crate::words;

/// Worker output waits while this many bytes are unwritten.
const OUTPUT_BYTES: usize = 64 << 10;
/// The primary's own lines are dropped while this many bytes are unwritten.
const OWN_BYTES: usize = OUTPUT_BYTES + (130 << 10);
/// What a record costs beyond its bytes.
const RECORD_BYTES: usize = 64;
const STACK_BYTES: usize = 128 << 10;
/// Of the thread that compresses. Its tables, 300 KiB, are made on the stack before they move to the heap.
const COMPRESSOR_STACK: usize = 2 << 20;
/// At the end, a disk that takes nothing for this long is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at whether it has stopped.
const COMPRESSOR_PAUSE: Duration = Duration::from_millis(2);
/// Between two tries to make a folder that was removed.
const ANEW: Duration = Duration::from_secs(1);
/// A compressed file that is not whole yet.
const PART: &str = ".part";

/// What becomes of full files.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Rotation {
    /// Bytes of a full file.
    pub(crate) size: u64,
    /// The age at which a file is full.
    pub(crate) age: Option<Duration>,
    /// How many are kept for each slot.
    pub(crate) keep: usize,
}

/// What was lost, for `status`.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    lines: AtomicU64,
}

impl Losses {
    /// How many lines could not be written since the start.
    pub(crate) fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }
}

/// The primary's end.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    pub(crate) losses: Arc<Losses>,
    how: (Format, Rotation),
}

/// Lines that could not be written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Lost {
    lines: u64,
    /// Of the primary, and not told yet.
    dropped: u64,
    /// Of slots, and not told yet: how many, and why.
    slots: BTreeMap<u32, (u64, String)>,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread.
    work: Condvar,
    /// Wakes [`Writer::finish`].
    progress: Condvar,
    /// Wakes the one task that waits in [`Writer::line`].
    room: Notify,
    /// The folder that is written to, also for others.
    folder: Mutex<Folder>,
    /// Wakes [`Writer::moved`].
    moved: Notify,
}

#[derive(Default)]
struct State {
    waiting: Vec<Record>,
    waiting_bytes: usize,
    /// Bytes that the thread took and did not write yet.
    taken: usize,
    done: u64,
    dropped: u64,
    /// As the thread told last.
    lost: BTreeMap<u32, (u64, String)>,
    closed: bool,
    ended: bool,
}

struct Record {
    time: SystemTime,
    slot: u32,
    source: Source,
    complete: bool,
    line: Vec<u8>,
}

impl Writer {
    /// Starts to write into a folder.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn start(folder: Folder, format: Format, rotation: Rotation) -> io::Result<Writer> {
        Self::go_on(folder, format, rotation, Lost::default())
    }

    /// As [`Writer::start`], for an app whose logs another image of this process has written so far.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn go_on(
        folder: Folder,
        format: Format,
        rotation: Rotation,
        lost: Lost,
    ) -> io::Result<Writer> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { dropped: lost.dropped, ..State::default() }),
            work: Condvar::new(),
            progress: Condvar::new(),
            room: Notify::new(),
            folder: Mutex::new(folder.again()?),
            moved: Notify::new(),
        });
        let losses = Arc::new(Losses { lines: AtomicU64::new(lost.lines) });
        let open = |(slot, (lost, why))| (slot, Slot { file: None, lost, why });
        let files = Files {
            shared: Arc::clone(&shared),
            tried: None,
            compressor: Arc::default(),
            losses: Arc::clone(&losses),
            open: lost.slots.into_iter().map(open).collect(),
            folder,
            format,
            rotation,
        };
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("logs".into()).stack_size(STACK_BYTES);
        // Signals are for the thread that obeys them, and for the next image of this process while it is made.
        let held = upgrade::hold_signals()?;
        thread.spawn(move || write_all(&theirs, files))?;
        drop(held);
        Ok(Writer { shared, losses, how: (format, rotation) })
    }

    /// Where it writes to by now.
    pub(crate) fn folder(&self) -> MutexGuard<'_, Folder> {
        self.shared.folder()
    }

    /// Waits until the folder was removed and another one is written to.
    pub(crate) async fn moved(&self) {
        self.shared.moved.notified().await;
    }

    /// How lines are written, and what becomes of full files.
    pub(crate) fn how(&self) -> (Format, Rotation) {
        self.how
    }

    /// Whether everything is written, or counted as lost.
    pub(crate) fn is_written(&self) -> bool {
        self.shared.lock().unwritten() == 0
    }

    /// What is lost so far, and not told where it is missing. To be asked when everything is written.
    pub(crate) fn lost(&self) -> Lost {
        let state = self.shared.lock();
        Lost { lines: self.losses.lines(), dropped: state.dropped, slots: state.lost.clone() }
    }

    /// Adds a worker's line, waiting while the buffer is full.
    ///
    /// Cancel safe: the line was added or it was not. One task at a time.
    pub(crate) async fn line(&self, slot: u32, source: Source, line: &[u8], complete: bool) {
        loop {
            {
                let mut state = self.shared.lock();
                if state.ended {
                    return;
                }
                if state.unwritten() < OUTPUT_BYTES {
                    self.add(&mut state, slot, source, line, complete);
                    return;
                }
            }
            self.shared.room.notified().await;
        }
    }

    /// Adds a line of the primary, or drops and counts it. Never waits.
    pub(crate) fn own(&self, line: &[u8]) {
        let mut state = self.shared.lock();
        if state.unwritten() > 0 && state.unwritten() + line.len() > OWN_BYTES {
            state.dropped += 1;
            self.losses.lines.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if state.dropped > 0 {
            let told = format!("{} lines of the primary are missing here", state.dropped);
            state.dropped = 0;
            self.add(&mut state, 0, Source::Own, told.as_bytes(), true);
        }
        self.add(&mut state, 0, Source::Own, line, true);
    }

    fn add(&self, state: &mut State, slot: u32, source: Source, line: &[u8], complete: bool) {
        state.waiting_bytes += line.len() + RECORD_BYTES;
        let line = line.to_vec();
        state.waiting.push(Record { time: SystemTime::now(), slot, source, complete, line });
        self.shared.work.notify_one();
    }

    /// Waits until everything is written, but not for a disk that takes nothing for two seconds.
    ///
    /// Blocks the thread: called when nothing else is left to do. False when something stayed unwritten.
    pub(crate) fn finish(&self) -> bool {
        let mut state = self.shared.lock();
        state.closed = true;
        self.shared.work.notify_one();
        while !state.ended {
            let before = state.done;
            let (next, waited) = self
                .shared
                .progress
                .wait_timeout(state, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.done == before && !state.ended {
                return false;
            }
        }
        true
    }
}

impl State {
    fn unwritten(&self) -> usize {
        self.waiting_bytes + self.taken
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self) -> MutexGuard<'_, Folder> {
        self.folder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be written next; `None` when the end is reached.
    fn take(&self) -> Option<Vec<Record>> {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return None;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.taken = std::mem::take(&mut state.waiting_bytes);
        Some(std::mem::take(&mut state.waiting))
    }

    fn done(&self, lost: BTreeMap<u32, (u64, String)>) {
        let mut state = self.lock();
        state.lost = lost;
        state.done += 1;
        state.taken = 0;
        drop(state);
        self.progress.notify_all();
        self.room.notify_one();
    }
}

/// The thread.
fn write_all(shared: &Shared, mut files: Files) {
    // A primary that was killed may have left some.
    remove_parts(&files.folder);
    while let Some(records) = shared.take() {
        files.write(&records);
        shared.done(files.lost());
    }
    files.end();
    shared.lock().ended = true;
    shared.progress.notify_all();
    shared.room.notify_one();
}

/// The thread's files.
struct Files {
    shared: Arc<Shared>,
    folder: Folder,
    /// When it was tried last to have another folder, and why lines are lost until the next try.
    tried: Option<(Instant, String)>,
    format: Format,
    rotation: Rotation,
    open: BTreeMap<u32, Slot>,
    compressor: Arc<Compressor>,
    losses: Arc<Losses>,
}

/// The thread that compresses, as it is seen from outside.
#[derive(Default)]
struct Compressor {
    running: AtomicBool,
    /// It is to stop: what it has not finished is compressed by the next primary.
    stop: AtomicBool,
}

impl Compressor {
    fn is_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Stops it, and waits until it has cleared away what it had begun.
    fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let limit = Instant::now() + PATIENCE;
        while self.running.load(Ordering::Acquire) && Instant::now() < limit {
            std::thread::sleep(COMPRESSOR_PAUSE);
        }
    }
}

/// One slot's file.
#[derive(Default)]
struct Slot {
    file: Option<Open>,
    /// Lines that could not be written and were not told yet, and why.
    lost: u64,
    why: String,
}

struct Open {
    file: File,
    /// Device and inode.
    identity: (u64, u64),
    size: u64,
    /// When its first line was written.
    since: SystemTime,
    /// It does not end with a newline.
    torn: bool,
}

impl Files {
    /// What is missing and was not told yet.
    fn lost(&self) -> BTreeMap<u32, (u64, String)> {
        let lost = self.open.iter().filter(|(_, slot)| slot.lost > 0);
        lost.map(|(number, slot)| (*number, (slot.lost, slot.why.clone()))).collect()
    }

    fn write(&mut self, records: &[Record]) {
        let mut texts: BTreeMap<u32, (Vec<u8>, u64, SystemTime)> = BTreeMap::new();
        for Record { time, slot, source, complete, line } in records {
            let text = texts.entry(*slot).or_insert_with(|| (Vec::new(), 0, *time));
            line::write(&mut text.0, self.format, *time, *slot, *source, line, *complete);
            text.1 += 1;
        }
        for (slot, (text, lines, time)) in texts {
            self.write_slot(slot, &text, lines, time);
        }
    }

    fn write_slot(&mut self, number: u32, text: &[u8], lines: u64, time: SystemTime) {
        let mut slot = self.open.remove(&number).unwrap_or_default();
        let outcome = self.make_room(number, &mut slot, text.len() as u64, time);
        let (written, error) = match (outcome, &mut slot.file) {
            (Ok(()), Some(open)) => {
                let told = (slot.lost > 0).then(|| self.missing(number, slot.lost, &slot.why));
                let mut rest = Ok(());
                if let Some(told) = told {
                    rest = open.append(&told).1;
                    if rest.is_ok() {
                        slot.lost = 0;
                    }
                }
                match rest {
                    Ok(()) => {
                        let (bytes, outcome) = open.append(text);
                        let whole = text[..bytes].iter().filter(|byte| **byte == b'\n').count();
                        (whole as u64, outcome.err())
                    }
                    Err(error) => (0, Some(error)),
                }
            }
            (Ok(()), None) => (0, None),
            (Err(error), _) => (0, Some(error)),
        };
        if let Some(error) = error {
            let lost = lines.saturating_sub(written);
            slot.lost += lost;
            self.losses.lines.fetch_add(lost, Ordering::Relaxed);
            slot.why = words::plain(&error.to_string());
        }
        self.open.insert(number, slot);
    }

    fn missing(&self, slot: u32, lost: u64, why: &str) -> Vec<u8> {
        let mut told = Vec::new();
        let plural = if lost == 1 { "line is" } else { "lines are" };
        let text = format!("polyfork: {lost} {plural} missing here: {why}");
        let now = SystemTime::now();
        line::write(&mut told, self.format, now, slot, Source::Own, text.as_bytes(), true);
        told
    }

    /// Opens a file to be appended to, in a new folder if this one was removed.
    fn append(&mut self, name: &str) -> io::Result<File> {
        let error = match self.folder.append(name) {
            // In a folder that is there it would have been made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => error,
            other => return other,
        };
        if let Some((_, why)) = self.tried.as_ref().filter(|(tried, _)| tried.elapsed() < ANEW) {
            return Err(io::Error::other(why.clone()));
        }
        let made = self.folder.anew();
        let why = made.as_ref().err().unwrap_or(&error).to_string();
        self.tried = Some((Instant::now(), why));
        let folder = made?;
        *self.shared.folder() = folder.again()?;
        self.folder = folder;
        self.shared.moved.notify_one();
        self.folder.append(name)
    }

    /// Sees to it that the slot has a file, that it is the one under its name, and that it is neither full nor old.
    fn make_room(
        &mut self,
        number: u32,
        slot: &mut Slot,
        bytes: u64,
        time: SystemTime,
    ) -> io::Result<()> {
        let name = LogName::current(number).file();
        if let Some(open) = &slot.file {
            let there = self.folder.stat(&name);
            let same = there.is_ok_and(|there| (there.st_dev, there.st_ino) == open.identity);
            if !same {
                slot.file = None;
            }
        }
        if slot.file.is_none() {
            let file = self.append(&name)?;
            slot.file = Some(Open::new(file, || self.first_stamp(number))?);
        }
        let Some(open) = &slot.file else { return Ok(()) };
        let old = |age: Duration| time.duration_since(open.since).is_ok_and(|past| past >= age);
        let full = open.size + bytes > self.rotation.size || self.rotation.age.is_some_and(old);
        if open.size > 0 && full {
            slot.file = None;
            let stamp = clock::fine_stamp(SystemTime::now());
            self.folder.rename(&name, &LogName::full(number, &stamp).file())?;
            self.tidy(number);
            slot.file = Some(Open::new(self.append(&name)?, || None)?);
        }
        Ok(())
    }

    /// When the first line of a file that was there already was written.
    fn first_stamp(&self, slot: u32) -> Option<SystemTime> {
        let mut start = [0; 256];
        let mut file = self.folder.open(&LogName::current(slot)).ok()?;
        let len = file.read(&mut start).ok()?;
        let line = start[..len].split(|byte| *byte == b'\n').next()?;
        // A long line of JSON is cut here, and its age not known.
        clock::read(&line::read(line, slot)?.stamp)
    }

    /// Removes what is more than is to be kept, and has the rest compressed.
    fn tidy(&self, slot: u32) {
        let full = |name: &LogName| name.slot == slot && name.age != Age::Current;
        let mut files = self.folder.files().unwrap_or_default();
        files.retain(full);
        let surplus = files.len().saturating_sub(self.rotation.keep);
        for name in files.drain(..surplus) {
            // Both may be there while it is compressed.
            for compressed in [false, true] {
                let file = LogName { compressed, ..name.clone() }.file();
                let _ = self.folder.remove(&file);
            }
        }
        self.compress();
    }

    /// Starts the thread that compresses, unless it runs.
    fn compress(&self) {
        if self.compressor.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let compressor = Arc::clone(&self.compressor);
        let started = self.folder.again().and_then(|folder| {
            let thread = std::thread::Builder::new().name("gzip".into());
            thread.stack_size(COMPRESSOR_STACK).spawn(move || {
                compress_all(&folder, &compressor);
                compressor.running.store(false, Ordering::Release);
            })
        });
        if started.is_err() {
            self.compressor.running.store(false, Ordering::Release);
        }
    }

    /// What is missing is told at least now, and nothing half-compressed stays.
    fn end(&mut self) {
        self.compressor.end();
        let open = std::mem::take(&mut self.open);
        for (number, slot) in open {
            if slot.lost > 0
                && let Some(mut open) = slot.file
            {
                // The disk is still full, then.
                let _ = open.append(&self.missing(number, slot.lost, &slot.why));
            }
        }
    }
}

impl Open {
    fn new(file: File, first: impl FnOnce() -> Option<SystemTime>) -> io::Result<Open> {
        let found = sys::fstat(file.as_fd())?;
        let size = u64::try_from(found.st_size).unwrap_or(0);
        let first = if size > 0 { first() } else { None };
        let since = first.unwrap_or_else(SystemTime::now);
        Ok(Open { file, identity: (found.st_dev, found.st_ino), size, since, torn: false })
    }

    /// Appends whole lines; gives how many bytes of them are in the file, and what stopped it there.
    fn append(&mut self, text: &[u8]) -> (usize, io::Result<()>) {
        if self.torn {
            match self.file.write_all(b"\n") {
                Ok(()) => (self.torn, self.size) = (false, self.size + 1),
                Err(error) => return (0, Err(error)),
            }
        }
        let mut written = 0;
        let outcome = loop {
            match self.file.write(&text[written..]) {
                Ok(0) if written < text.len() => break Err(io::ErrorKind::WriteZero.into()),
                Ok(0) => break Ok(()),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
            if written == text.len() {
                break Ok(());
            }
        };
        let whole = text[..written].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if whole < written {
            // Somebody else may have appended; then the piece stays, on a line of its own.
            let end = self.size + written as u64;
            let alone =
                sys::fstat(self.file.as_fd()).is_ok_and(|found| found.st_size as u64 == end);
            self.torn = !alone || self.file.set_len(self.size + whole as u64).is_err();
        }
        self.size += if self.torn { written } else { whole } as u64;
        (whole, outcome)
    }
}

/// Compresses every full file, one after the other.
fn compress_all(folder: &Folder, compressor: &Compressor) {
    remove_parts(folder);
    let mut failed = 0;
    while !compressor.is_to_stop() {
        let files = folder.files().unwrap_or_default();
        let mut next =
            files.into_iter().filter(|name| name.age != Age::Current && !name.compressed);
        let Some(name) = next.nth(failed) else { return };
        // The disk is full, or it was removed meanwhile: it stays as it is.
        if compress_one(folder, &name, compressor).is_err() {
            failed += 1;
        }
    }
}

/// What an earlier primary did not finish is of no use.
fn remove_parts(folder: &Folder) {
    let mut parts = Vec::new();
    let _ = folder.each(|name| {
        if name.ends_with(PART) {
            parts.push(name.to_owned());
        }
    });
    for part in parts {
        let _ = folder.remove(&part);
    }
}

fn compress_one(folder: &Folder, name: &LogName, compressor: &Compressor) -> io::Result<()> {
    let plain = name.file();
    let whole = LogName { compressed: true, ..name.clone() }.file();
    let part = format!("{whole}{PART}");
    let outcome = write_compressed(folder, name, &part, compressor)
        .and_then(|()| folder.rename(&part, &whole));
    if outcome.is_err() {
        let _ = folder.remove(&part);
        return outcome;
    }
    match folder.remove(&plain) {
        // Meanwhile it was one too many.
        Err(error) if error.kind() == io::ErrorKind::NotFound => folder.remove(&whole),
        other => other,
    }
}

fn write_compressed(
    folder: &Folder,
    name: &LogName,
    part: &str,
    compressor: &Compressor,
) -> io::Result<()> {
    let mut from = BufReader::with_capacity(32 << 10, folder.open(name)?);
    let to = folder.create(part)?;
    let mut encoder = GzEncoder::new(to, Compression::new(4));
    loop {
        if compressor.is_to_stop() {
            return Err(io::Error::other("the app ends"));
        }
        let read = match from.fill_buf() {
            Ok([]) => break,
            Ok(bytes) => {
                encoder.write_all(bytes)?;
                bytes.len()
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        from.consume(read);
    }
    let file = encoder.finish()?;
    // The plain file goes when this one is there for good.
    match rustix::fs::fdatasync(&file) {
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
