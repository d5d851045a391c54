//! An app in the background: how the primary tells whoever started it that it is ready, or why not.
//!
//! `polyfork start` runs this executable again, in a session of its own, with a pipe as standard output. What is written
//! there is the short form of docs/events.md: notices, slots that were given up, and one last line, `started`, `end` or
//! `error`. Then standard output is nobody's.
//!
//! Its words are in a sealed memory file that is its standard input ([`given`]), not in its command line: that one is
//! shown by ps(1) to every user. The file stays where it is, through every upgrade, for `service print`; the kernel opens it for nobody
//! who may not trace the primary.
//!
//! The surprising rule: the starter may be stopped (Ctrl-Z) or gone. A line that does not fit into the pipe is dropped; an
//! app is never held up by who started it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use polyfork::cluster::Event;
use polyfork::cluster::upgrade::{self, Name as Carried, Packing, ResumeError, Unpacking};
use rustix::fs::{FileType, Mode, OFlags};

use crate::control::book::Book;
use crate::ledger::{Ledger, Verdict};
use crate::logs::folder::Folder;
use crate::report::json;

/// Words for a primary, to be its standard input.
///
/// # Errors
/// The system's.
pub(crate) fn give(words: &[OsString]) -> io::Result<OwnedFd> {
    let content: Vec<u8> =
        words.iter().flat_map(|word| word.as_bytes().iter().copied().chain([0])).collect();
    upgrade::seal(&content)
}

/// The words that this process was given; nothing if it was not `start` that started it.
pub(crate) fn given() -> Option<Vec<OsString>> {
    Some(words_of(&upgrade::read_sealed(0).ok()?))
}

/// Words that each end with a NUL, as in `/proc/PID/cmdline`.
pub(crate) fn words_of(content: &[u8]) -> Vec<OsString> {
    let words = content.split_inclusive(|byte| *byte == 0);
    let word = |word: &[u8]| OsString::from_vec(word.strip_suffix(b"\0").unwrap_or(word).to_vec());
    words.map(word).collect()
}

/// The way to who started us, as long as there is something to tell.
#[derive(Debug, Default)]
pub(crate) struct Starter(Option<OwnedFd>);

impl Starter {
    /// Takes standard output over, if it is a pipe. It is nobody's from now on.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn take() -> io::Result<Starter> {
        let mine = rustix::stdio::stdout();
        let kind = FileType::from_raw_mode(rustix::fs::fstat(mine)?.st_mode);
        let pipe = match kind {
            FileType::Fifo => {
                let pipe = rustix::io::fcntl_dupfd_cloexec(mine, 3)?;
                rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
                Some(pipe)
            }
            _ => None,
        };
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::stdio::dup2_stdout(&null)?;
        Ok(Starter(pipe))
    }

    /// Leaves it to the next image of this process.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn pack(&self, packing: &mut Packing) -> io::Result<Option<Carried>> {
        self.0.as_ref().map(|pipe| packing.name(pipe.as_fd())).transpose()
    }

    /// Takes it over from the image before.
    ///
    /// # Errors
    /// When the descriptor is missing.
    pub(crate) fn unpack(
        state: Option<Carried>,
        unpacking: &mut Unpacking,
    ) -> Result<Starter, ResumeError> {
        state.map(|pipe| unpacking.take(pipe)).transpose().map(Starter)
    }

    fn tell(&self, line: &str) {
        if let Some(pipe) = &self.0 {
            // Too full, or gone: see above.
            let _ = rustix::io::write(pipe, line.as_bytes());
        }
    }

    /// Tells what a person who waits should know. `book` knows of the event already.
    pub(crate) fn event(&mut self, event: &Event, ledger: &Ledger, book: &Book) {
        if self.0.is_none() {
            return;
        }
        if matches!(event, Event::Notice(_) | Event::SlotFailed { .. } | Event::BindFailed { .. })
            && let Some(line) = json::Json.event(event, ledger)
        {
            self.tell(&line);
        }
        if let Some(settled) = book.settled() {
            self.tell(&json::started(&settled));
            self.0 = None;
        }
    }

    /// Tells a warning of the time before anything ran.
    pub(crate) fn warning(&self, text: &str) {
        self.tell(&json::warning(text));
    }

    /// Tells that nothing was started.
    pub(crate) fn refused(&mut self, verdict: &Verdict) {
        self.tell(&json::refused(verdict));
        self.0 = None;
    }

    /// Whether somebody waits to be told.
    pub(crate) fn waits(&self) -> bool {
        self.0.is_some()
    }

    /// Tells the end, if it comes before the start was over.
    pub(crate) fn end(&mut self, verdict: &Verdict) {
        self.tell(&json::Json.end(verdict));
        self.0 = None;
    }
}

/// Writes what a panic of the primary says to a file, since its standard error is nobody's.
pub(crate) fn write_panics_to(folder: Folder) {
    std::panic::set_hook(Box::new(move |panic| {
        use std::io::Write;
        // By the open folder: its path may be closed to the user that this process has become.
        let anew = |_| Folder::find(&folder.path).ok_or(())?.append("primary.log").map_err(drop);
        if let Ok(mut file) = folder.append("primary.log").or_else(anew) {
            // Nobody is left to be told.
            let _ = writeln!(file, "{} polyfork: {panic}", crate::clock::now());
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_as_they_were_given() {
        use std::os::fd::AsRawFd;
        for words in [&[][..], &["-w", "", "a b", "\u{e9}"], &[""]] {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            let file = give(&words).expect("a file");
            let read = upgrade::read_sealed(file.as_raw_fd()).expect("it is sealed");
            assert_eq!(words_of(&read), words);
        }
        assert_eq!(words_of(b"a\0b"), ["a", "b"]);
    }
}
