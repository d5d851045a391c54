//! Lines for people.
//!
//! The primary's lines begin with `polyfork:` and go to standard error; a worker's lines begin with its slot, as in
//! `1 | `, and go to the stream the worker wrote them to. What needs no attention is left out: `--json` tells all.
//!
//! The surprising rule: a line of a worker that is too long comes in pieces, and other lines may come between; each
//! further piece begins with `1 + `, so it can be told from a new line.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use polyfork::cluster::{Address, Event, Exit, OutputLine, Reason, ReloadError, Stream, Via, Who};

use super::Start;
use crate::demo;
use crate::exit::Code;
use crate::ledger::{Ledger, Verdict};
use crate::sink::Target;
use crate::style::{Ink, Paint};
use crate::values::spoken;
use crate::words;

/// Renders events and output.
pub(crate) struct Human {
    /// Paint of standard output.
    out: Paint,
    /// Paint of standard error.
    err: Paint,
    /// Digits of the largest slot so far.
    width: usize,
    /// When each worker that is not ready yet was started.
    started: BTreeMap<u64, Instant>,
    /// Workers that finish.
    draining: BTreeSet<u64>,
    /// Whether addresses are told as pages for a browser.
    page: bool,
    /// Addresses that were told.
    told: BTreeSet<Address>,
    /// Streams whose latest piece was not the end of a line, and whose it was.
    open: BTreeMap<(u32, bool), u64>,
}

impl Human {
    /// Paints what goes to a terminal.
    pub(crate) fn new(workers: u32, out: Paint, err: Paint) -> Human {
        Human {
            out,
            err,
            width: workers.to_string().len(),
            started: BTreeMap::new(),
            draining: BTreeSet::new(),
            page: false,
            told: BTreeSet::new(),
            open: BTreeMap::new(),
        }
    }

    pub(super) fn start(&mut self, start: &Start) -> Vec<String> {
        self.page = start.page;
        let workers = match start.workers {
            1 => "1 worker".to_owned(),
            more => format!("{more} workers"),
        };
        let name = self.err.with(Ink::Bold, &start.name);
        let mut lines = vec![self.own(None, &format!("{name}: {workers} ({})", start.workers_why))];
        let dialect = start.detected.dialect;
        lines.push(self.own(None, &format!("{}; dialect {dialect}", start.detected.why)));
        lines.extend(start.warnings.iter().map(|text| self.own(Some(Ink::Warn), text)));
        lines
    }

    pub(super) fn event(&mut self, event: &Event, ledger: &Ledger) -> Vec<String> {
        match event {
            Event::Fork(who) => self.fork(who),
            Event::Ready(who) => self.ready(who),
            Event::AllReady { workers: 0 | 1 } => Vec::new(),
            Event::AllReady { workers } => {
                vec![self.own(Some(Ink::Good), &format!("all workers are ready ({workers})"))]
            }
            Event::Listening { address, by, .. } | Event::Bound { address, by } => {
                self.listening(address, by)
            }
            Event::Closed { address } => {
                self.told.remove(address);
                vec![self.own(None, &format!("closed {}", words::address(address)))]
            }
            Event::BindFailed { who, address, error } => {
                let text = words::bind_failed(address, error);
                vec![self.own(Some(Ink::Bad), &about(who.as_ref(), &text))]
            }
            Event::Draining(who) => {
                self.draining.insert(who.worker);
                vec![self.own(None, &format!("slot {}: finishing ({})", who.slot, named(who)))]
            }
            Event::Exit { .. } => self.exit(event),
            Event::SlotFailed { slot, restarts, window } => {
                let window = spoken(*window);
                let plural = if *restarts == 1 { "" } else { "s" };
                let what =
                    format!("slot {slot}: given up after {restarts} restart{plural} in {window}");
                if !ledger.hears() {
                    return vec![self.own(Some(Ink::Bad), &what)];
                }
                self.with_last_lines(what, ledger.last_lines(*slot))
            }
            Event::SlotRests { slot, .. } => {
                vec![
                    self.own(
                        None,
                        &format!("slot {slot}: stopped, as no other worker is to follow"),
                    ),
                ]
            }
            Event::SlotRetired { slot } => vec![self.own(None, &format!("slot {slot}: closed"))],
            Event::Reloading { generation } => {
                let text = format!("reload: starting generation {generation}");
                vec![self.own(None, &text)]
            }
            Event::Switched { generation, workers } => {
                let text = format!("generation {generation} serves ({workers})");
                vec![self.own(Some(Ink::Good), &text)]
            }
            Event::Reloaded(report) => vec![self.own(Some(Ink::Good), &words::reloaded(report))],
            Event::ReloadFailed { error, .. } => {
                let what = format!("reload failed: {error}");
                let lines = match error {
                    ReloadError::Failed { who, .. } => ledger.last_lines(who.slot).collect(),
                    _ => Vec::new(),
                };
                self.with_last_lines(what, lines.into_iter())
            }
            Event::Status { who, text } => {
                vec![self.own(None, &format!("slot {}: {}", who.slot, words::harmless(text)))]
            }
            Event::Blocked { who, silent } => {
                let text = format!("no sign of life for {}: blocked or stopped", spoken(*silent));
                vec![self.own(Some(Ink::Warn), &about(Some(who), &text))]
            }
            Event::Unblocked { who, silent } => {
                let text = format!("goes on after {}", spoken(*silent));
                vec![self.own(Some(Ink::Good), &about(Some(who), &text))]
            }
            Event::Notice(notice) => {
                let text = words::harmless(&words::plain(&notice.text));
                vec![self.own(Some(Ink::Warn), &about(notice.who.as_ref(), &text))]
            }
            Event::Lagged(missed) => {
                let text = format!("{missed} events came too fast and are not shown");
                vec![self.own(Some(Ink::Warn), &text)]
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn end(&mut self, verdict: &Verdict) -> String {
        let ink = match verdict.code {
            Code::Stopped => Ink::Good,
            Code::Forced => Ink::Warn,
            _ => Ink::Bad,
        };
        self.own(Some(ink), &verdict.text)
    }

    pub(super) fn output(&mut self, line: &OutputLine) -> (Target, Vec<u8>) {
        self.know(line.slot);
        let (target, paint) = match line.stream {
            Stream::Stdout => (Target::Stdout, self.out),
            Stream::Stderr => (Target::Stderr, self.err),
        };
        let stream = (line.slot, line.stream == Stream::Stdout);
        let continues = self.open.get(&stream) == Some(&line.worker);
        if line.complete {
            self.open.remove(&stream);
        } else {
            self.open.insert(stream, line.worker);
        }
        let mark = if continues { '+' } else { '|' };
        let prefix = format!("{:>width$} {mark}", line.slot, width = self.width);
        let mut bytes = paint.with(Ink::Slot(line.slot), &prefix).into_bytes();
        bytes.reserve(line.line.len() + 2);
        bytes.push(b' ');
        bytes.extend_from_slice(line.line.strip_suffix(b"\r").unwrap_or(&line.line));
        bytes.push(b'\n');
        (target, bytes)
    }

    /// A line of the primary.
    fn own(&self, ink: Option<Ink>, text: &str) -> String {
        let prefix = self.err.with(Ink::Dim, "polyfork:");
        match ink {
            Some(ink) => format!("{prefix} {}\n", self.err.with(ink, text)),
            None => format!("{prefix} {text}\n"),
        }
    }

    fn know(&mut self, slot: u32) {
        self.width = self.width.max(slot.to_string().len());
    }

    fn fork(&mut self, who: &Who) -> Vec<String> {
        self.know(who.slot);
        self.started.insert(who.worker, Instant::now());
        Vec::new()
    }

    fn ready(&mut self, who: &Who) -> Vec<String> {
        let after = self.started.remove(&who.worker).map(|since| spoken(since.elapsed()));
        let after = after.map(|after| format!(" after {after}")).unwrap_or_default();
        vec![self.own(None, &format!("slot {}: ready{after} ({})", who.slot, named(who)))]
    }

    fn listening(&mut self, address: &Address, by: &Via) -> Vec<String> {
        if !self.told.insert(address.clone()) {
            return Vec::new();
        }
        let place = self.err.with(Ink::Bold, &words::address(address));
        let way = format!("listening on {place}: {} ({})", words::via(by), by.why);
        let mut lines = vec![self.own(None, &way)];
        if let (true, Address::Tcp(tcp)) = (self.page, address) {
            let url = self.err.with(Ink::Bold, &demo::url(tcp));
            lines.push(self.own(None, &format!("open {url}")));
        }
        lines
    }

    fn exit(&mut self, event: &Event) -> Vec<String> {
        let Event::Exit { who, reason, lived, restart_in, .. } = event else { return Vec::new() };
        self.started.remove(&who.worker);
        self.draining.remove(&who.worker);
        let what = match reason {
            Reason::Asked | Reason::Voluntary => "finished".to_owned(),
            other => words::ended(*other),
        };
        let next = match restart_in {
            Some(delay) if delay.is_zero() => "; a new one starts at once".to_owned(),
            Some(delay) => format!("; a new one starts in {}", spoken(*delay)),
            None if self.draining.is_empty() => String::new(),
            None => format!("; {} still finishing", self.draining.len()),
        };
        let ink = match reason {
            Reason::Asked | Reason::Voluntary => None,
            _ => Some(Ink::Warn),
        };
        let after = match reason {
            Reason::Exited(Exit::NotStarted) => String::new(),
            _ => format!(" after {}", spoken(*lived)),
        };
        vec![self.own(ink, &format!("slot {}: {} {what}{after}{next}", who.slot, named(who)))]
    }

    fn with_last_lines<'a>(
        &self,
        what: String,
        last: impl Iterator<Item = &'a str>,
    ) -> Vec<String> {
        let mut last = last.peekable();
        if last.peek().is_none() {
            return vec![
                self.own(Some(Ink::Bad), &format!("{what}; it wrote nothing to standard error")),
            ];
        }
        let told = self.own(Some(Ink::Bad), &format!("{what}; its last lines on standard error:"));
        std::iter::once(told).chain(last.map(|line| format!("    {line}\n"))).collect()
    }
}

fn named(who: &Who) -> String {
    match who.pid {
        0 => format!("worker {}", who.worker),
        pid => format!("worker {}, pid {pid}", who.worker),
    }
}

fn about(who: Option<&Who>, text: &str) -> String {
    match who {
        Some(who) => format!("slot {}: {text}", who.slot),
        None => text.to_owned(),
    }
}

/// The line that tells how many of the primary's own lines were dropped.
pub(crate) fn dropped(lines: u64) -> String {
    format!(
        "polyfork: {lines} lines of its own are missing here: they came faster than they were read\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use polyfork::cluster::{Carried, Policy};
    use std::sync::Arc;
    use std::time::Duration;

    const WHO: Who = Who { slot: 2, worker: 7, pid: 4711 };

    fn human() -> Human {
        Human::new(2, Paint::PLAIN, Paint::PLAIN)
    }

    fn piece(slot: u32, worker: u64, text: &str, complete: bool) -> OutputLine {
        let (stream, line) = (Stream::Stdout, text.as_bytes().to_vec());
        OutputLine { slot, worker, stream, line, complete }
    }

    fn written(human: &mut Human, line: &OutputLine) -> String {
        String::from_utf8(human.output(line).1).unwrap()
    }

    #[test]
    fn a_line_has_its_slot_in_front_and_keeps_its_stream() {
        let mut human = human();
        let mut line = piece(2, 7, "hello", true);
        assert_eq!(human.output(&line), (Target::Stdout, b"2 | hello\n".to_vec()));
        line.stream = Stream::Stderr;
        assert_eq!(human.output(&line).0, Target::Stderr);
        line.line = b"windows\r".to_vec();
        assert_eq!(human.output(&line).1, b"2 | windows\n");
    }

    #[test]
    fn slots_line_up() {
        let mut human = Human::new(12, Paint::PLAIN, Paint::PLAIN);
        assert_eq!(written(&mut human, &piece(3, 1, "x", true)), " 3 | x\n");
        assert_eq!(written(&mut human, &piece(12, 2, "x", true)), "12 | x\n");
    }

    #[test]
    fn pieces_of_a_long_line_are_told_from_new_lines() {
        let mut human = human();
        assert_eq!(written(&mut human, &piece(1, 1, "be", false)), "1 | be\n");
        assert_eq!(written(&mut human, &piece(2, 2, "other", true)), "2 | other\n");
        assert_eq!(written(&mut human, &piece(1, 1, "gin", true)), "1 + gin\n");
        assert_eq!(written(&mut human, &piece(1, 1, "next", false)), "1 | next\n");
        assert_eq!(written(&mut human, &piece(1, 3, "successor", true)), "1 | successor\n");
    }

    #[test]
    fn an_address_is_told_once_with_way_and_reason() {
        let mut human = human();
        let by = Arc::new(Via {
            policy: Policy::RoundRobin,
            mechanism: Carried::KernelExact,
            why: "eBPF is permitted".into(),
        });
        let address: Address = ":3000".parse().unwrap();
        let bound = Event::Bound { address: address.clone(), by: by.clone() };
        let lines = human.event(&bound, &Ledger::default());
        assert_eq!(
            lines,
            ["polyfork: listening on port 3000 of every address ([::]:3000): round-robin by \
              the kernel (eBPF is permitted)\n"]
        );
        let listening = Event::Listening { who: WHO, address, by };
        assert!(human.event(&listening, &Ledger::default()).is_empty());
    }

    #[test]
    fn an_end_is_told_with_its_reason_and_what_follows() {
        let mut human = human();
        let exit = |reason, restart_in| Event::Exit {
            who: WHO,
            code: None,
            signal: None,
            reason,
            lived: Duration::from_millis(3_200),
            voluntary: false,
            restart_in,
        };
        let died = exit(Reason::Exited(Exit::Signal(7)), Some(Duration::from_millis(100)));
        assert_eq!(
            human.event(&died, &Ledger::default()),
            [
                "polyfork: slot 2: worker 7, pid 4711 ended by SIGBUS after 3.2 s; a new one starts in 100 ms\n"
            ]
        );
        human.event(&Event::Draining(WHO), &Ledger::default());
        human.event(&Event::Draining(Who { worker: 8, ..WHO }), &Ledger::default());
        assert_eq!(
            human.event(&exit(Reason::Asked, None), &Ledger::default()),
            ["polyfork: slot 2: worker 7, pid 4711 finished after 3.2 s; 1 still finishing\n"]
        );
    }

    #[test]
    fn a_slot_that_is_given_up_shows_its_last_lines() {
        let mut ledger = Ledger::default();
        let mut line = piece(2, 7, "Error: boom \x1b[31m", true);
        line.stream = Stream::Stderr;
        ledger.line(&line);
        let failed = Event::SlotFailed { slot: 2, restarts: 5, window: Duration::from_secs(30) };
        let lines = human().event(&failed, &ledger).concat();
        assert!(lines.contains("given up after 5 restarts in 30 s"), "{lines}");
        assert!(lines.contains("    Error: boom \\u{1b}[31m\n"), "{lines}");
    }

    #[test]
    fn colours_never_change_the_words() {
        let events = [Event::Ready(WHO), Event::AllReady { workers: 2 }, Event::Lagged(2)];
        let mut painted = Human::new(2, Paint::COLOURS, Paint::COLOURS);
        for event in &events {
            let plain = human().event(event, &Ledger::default()).concat();
            let mut colours = painted.event(event, &Ledger::default()).concat();
            while let Some(start) = colours.find("\x1b[") {
                let end = start + colours[start..].find('m').unwrap();
                colours.replace_range(start..=end, "");
            }
            assert_eq!(plain, colours);
        }
    }
}
