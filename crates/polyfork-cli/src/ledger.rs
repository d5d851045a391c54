//! What the command remembers to explain the end: the last lines of each slot, and who did not finish in time.
//!
//! Judges nothing while the cluster runs; [`Ledger::verdict`] turns the outcome into the exit code. Memory is bounded:
//! ten lines of half a kilobyte for each slot.

use std::collections::{BTreeMap, VecDeque};

use polyfork::cluster::{Event, Exit, Outcome, OutputLine, Ready, Reason, Stream};
use serde::{Deserialize, Serialize};

use crate::exit::Code;
use crate::words;

const LINES: usize = 10;
const LINE_BYTES: usize = 500;

/// What is known of each slot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Ledger {
    slots: BTreeMap<u32, Tail>,
    /// Workers whose grace period was over.
    cut_short: u64,
    /// The slot that was given up last.
    given_up: Option<u32>,
    /// Workers write for themselves: what they write is not known.
    deaf: bool,
    /// What makes a worker ready. Of use at the start, and not carried to the next image.
    #[serde(skip)]
    ready: Ready,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Tail {
    /// Whose lines they are.
    worker: u64,
    lines: VecDeque<String>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The exit code.
    pub(crate) code: Code,
    /// One line for people.
    pub(crate) text: String,
}

impl Ledger {
    /// For workers that are ready when this is so.
    pub(crate) fn awaiting(ready: Ready) -> Ledger {
        Ledger { ready, ..Ledger::default() }
    }

    /// For workers that write for themselves.
    pub(crate) fn deaf(self) -> Ledger {
        Ledger { deaf: true, ..self }
    }

    /// Whether a slot without last lines has written none.
    pub(crate) fn hears(&self) -> bool {
        !self.deaf
    }

    /// Notes a line of a worker.
    pub(crate) fn line(&mut self, line: &OutputLine) {
        if line.stream != Stream::Stderr || line.line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        let slot = self.slots.entry(line.slot).or_default();
        // One that still finishes beside its successor explains nothing.
        if line.worker < slot.worker {
            return;
        }
        if slot.worker != line.worker {
            slot.worker = line.worker;
            slot.lines.clear();
        }
        if slot.lines.len() == LINES {
            slot.lines.pop_front();
        }
        let shown = &line.line[..line.line.len().min(LINE_BYTES)];
        slot.lines.push_back(words::harmless(&String::from_utf8_lossy(shown)));
    }

    /// Notes an event.
    pub(crate) fn event(&mut self, event: &Event) {
        match event {
            // Those that a reload or a restart cut short are no news of the end.
            Event::Stopping => self.cut_short = 0,
            Event::Exit { reason: Reason::GraceExpired, .. } => self.cut_short += 1,
            Event::SlotFailed { slot, .. } | Event::SlotRests { slot, .. } => {
                self.given_up = Some(*slot);
            }
            Event::SlotRetired { slot } => drop(self.slots.remove(slot)),
            _ => {}
        }
    }

    /// The last lines the slot's latest worker wrote to standard error.
    pub(crate) fn last_lines(&self, slot: u32) -> impl Iterator<Item = &str> {
        self.slots.get(&slot).into_iter().flat_map(|slot| slot.lines.iter().map(String::as_str))
    }

    /// The exit code of an outcome and its reason.
    pub(crate) fn verdict(&self, outcome: &Outcome) -> Verdict {
        match outcome {
            Outcome::Stopped => Verdict { code: Code::Stopped, text: self.stopped() },
            Outcome::AtRest { last, clean: true } => {
                let last = words::ended(*last);
                let text = format!("every worker has done its work: the last one {last}");
                Verdict { code: Code::Stopped, text }
            }
            Outcome::AtRest { last, clean: false } => {
                self.failed(*last, "every worker has ended and none is to follow")
            }
            Outcome::Forced => {
                Verdict { code: Code::Forced, text: "stopped at once: workers were killed".into() }
            }
            Outcome::BindFailed { address, error } => {
                Verdict { code: words::bind_code(error), text: words::bind_failed(address, error) }
            }
            Outcome::AllFailed { last } => self.failed(*last, "every slot was given up"),
            Outcome::NeverReady { last, .. } => {
                self.failed(*last, "every slot was given up, none was ever ready")
            }
            _ => Verdict { code: Code::Unexpected, text: "ended in an unknown way".into() },
        }
    }

    fn stopped(&self) -> String {
        match self.cut_short {
            0 => "stopped: every worker finished".into(),
            1 => "stopped: 1 worker was still busy when its grace period was over".into(),
            n => format!("stopped: {n} workers were still busy when their grace period was over"),
        }
    }

    fn failed(&self, last: Reason, what: &str) -> Verdict {
        let silent = self.given_up.is_some_and(|slot| self.last_lines(slot).next().is_none());
        let (code, next) = match last {
            Reason::NeverReady => (Code::NeverReady, awaited(self.ready)),
            Reason::Exited(Exit::NotStarted) => (Code::NoProgram, "can it be executed?"),
            Reason::Exited(Exit::Code(0)) => {
                (Code::Failed, "a server must keep running; does it go to the background?")
            }
            Reason::OutOfMemory => {
                (Code::Failed, "fewer workers (--workers) need less memory, or raise the limit")
            }
            _ if self.hears() && silent => (Code::Failed, "run it by hand to see why"),
            _ => (Code::Failed, "its last lines on standard error say more"),
        };
        Verdict { code, text: format!("{what}: the last worker {}; {next}", words::ended(last)) }
    }
}

/// What a worker that never got ready should have done.
fn awaited(ready: Ready) -> &'static str {
    match ready {
        Ready::Message => {
            "it did not send the message it was waited for: process.send('ready') says it (--ready message, or \
             wait_ready of PM2); --ready-timeout sets for how long"
        }
        Ready::Notify => {
            "it did not write READY=1 to NOTIFY_SOCKET, which was waited for (--ready notify); --ready-timeout sets \
             for how long"
        }
        Ready::Probe => {
            "it did not answer its --probe, which was waited for (--ready probe); --ready-timeout sets for how long"
        }
        _ => "does it listen? --ready and --ready-timeout set what is waited for",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polyfork::cluster::Who;
    use std::io;
    use std::sync::Arc;
    use std::time::Duration;

    fn line(worker: u64, text: &str) -> OutputLine {
        let (stream, line) = (Stream::Stderr, text.as_bytes().to_vec());
        OutputLine { slot: 1, worker, stream, line, complete: true }
    }

    #[test]
    fn the_last_ten_lines_of_the_latest_worker_are_kept() {
        let mut ledger = Ledger::default();
        ledger.line(&line(1, "old"));
        for n in 0..12 {
            ledger.line(&line(2, &format!("line {n}")));
        }
        ledger.line(&line(2, "  "));
        let kept: Vec<&str> = ledger.last_lines(1).collect();
        assert_eq!((kept.len(), kept[0], kept[9]), (10, "line 2", "line 11"));
        assert_eq!(ledger.last_lines(2).count(), 0);
    }

    #[test]
    fn a_long_line_is_kept_in_part() {
        let mut ledger = Ledger::default();
        ledger.line(&line(1, &"é".repeat(10_000)));
        assert!(ledger.last_lines(1).next().unwrap().len() < 2 * LINE_BYTES);
    }

    #[test]
    fn outcomes_have_their_codes() {
        let none = Ledger::default();
        let never = |last| Outcome::NeverReady { first: last, last };
        let code = |outcome| none.verdict(&outcome).code;
        assert_eq!(code(Outcome::Stopped), Code::Stopped);
        assert_eq!(code(Outcome::Forced), Code::Forced);
        let last = Reason::Exited(Exit::Code(3));
        assert_eq!(code(Outcome::AtRest { last, clean: true }), Code::Stopped);
        assert_eq!(code(Outcome::AtRest { last, clean: false }), Code::Failed);
        assert_eq!(code(never(Reason::NeverReady)), Code::NeverReady);
        assert_eq!(code(never(Reason::Exited(Exit::Code(1)))), Code::Failed);
        assert_eq!(code(never(Reason::Exited(Exit::NotStarted))), Code::NoProgram);
        let (address, error) = ("127.0.0.1:80".parse().unwrap(), io::ErrorKind::AddrInUse.into());
        assert_eq!(
            code(Outcome::BindFailed { address, error: Arc::new(error) }),
            Code::AddressInUse
        );
        let verdict = none.verdict(&Outcome::AllFailed { last: Reason::Exited(Exit::Signal(11)) });
        assert_eq!(verdict.code, Code::Failed);
        assert!(verdict.text.contains("SIGSEGV"), "{}", verdict.text);
    }

    #[test]
    fn who_never_got_ready_is_told_what_was_waited_for() {
        let outcome = Outcome::NeverReady { first: Reason::NeverReady, last: Reason::NeverReady };
        for (ready, part) in [
            (Ready::Auto, "does it listen?"),
            (Ready::Message, "process.send('ready')"),
            (Ready::Notify, "READY=1"),
            (Ready::Probe, "--probe"),
        ] {
            let text = Ledger::awaiting(ready).verdict(&outcome).text;
            assert!(text.contains(part), "{text}");
            assert_eq!(text.contains("does it listen"), ready == Ready::Auto, "{text}");
        }
    }

    #[test]
    fn who_wrote_nothing_has_no_last_lines_to_read() {
        let given_up = Event::SlotFailed { slot: 1, restarts: 5, window: Duration::ZERO };
        let crashed = Outcome::AllFailed { last: Reason::Exited(Exit::Code(1)) };
        let points_to_lines = |mut ledger: Ledger| {
            ledger.event(&given_up);
            ledger.verdict(&crashed).text.contains("last lines")
        };
        assert!(!points_to_lines(Ledger::default()));
        assert!(points_to_lines(Ledger::default().deaf()), "they went by us");
        let mut talked = Ledger::default();
        talked.line(&line(1, "no database"));
        assert!(points_to_lines(talked));
    }

    #[test]
    fn a_worker_that_did_not_finish_in_time_is_told() {
        let mut ledger = Ledger::default();
        assert!(ledger.verdict(&Outcome::Stopped).text.contains("every worker finished"));
        ledger.event(&Event::Exit {
            who: Who { slot: 1, worker: 3, pid: 77 },
            code: None,
            signal: Some(15),
            reason: Reason::GraceExpired,
            lived: Duration::ZERO,
            voluntary: false,
            restart_in: None,
        });
        let verdict = ledger.verdict(&Outcome::Stopped);
        assert_eq!(verdict.code, Code::Stopped);
        assert!(verdict.text.contains("1 worker was still busy"), "{}", verdict.text);
    }
}
