//! Turns what a cluster tells into lines: for people, or as JSON.
//!
//! Only renders. Where lines go is decided here too ([`Target`]), how they get there is the job of `sink`.

use polyfork::cluster::{Detected, Event, OutputLine};

use crate::ledger::{Ledger, Verdict};
use crate::sink::Target;

pub(crate) mod human;
pub(crate) mod json;

/// One of the two formats.
pub(crate) enum Report {
    /// For people.
    Human(human::Human),
    /// JSON lines.
    Json(json::Json),
}

/// What is known before anything runs.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    /// The cluster's name.
    pub(crate) name: String,
    /// How many workers.
    pub(crate) workers: u32,
    /// Why that many.
    pub(crate) workers_why: String,
    /// What the program is.
    pub(crate) detected: Detected,
    /// What is likely to go wrong.
    pub(crate) warnings: Vec<String>,
    /// Whether what it listens on is a page for a browser.
    pub(crate) page: bool,
}

impl Report {
    /// The lines at the start.
    pub(crate) fn start(&mut self, start: &Start) -> Vec<String> {
        match self {
            Report::Human(human) => human.start(start),
            Report::Json(json) => json.start(start),
        }
    }

    /// The lines of an event; none for one that this format leaves out.
    pub(crate) fn event(&mut self, event: &Event, ledger: &Ledger) -> Vec<String> {
        match self {
            Report::Human(human) => human.event(event, ledger),
            Report::Json(json) => json.event(event, ledger).into_iter().collect(),
        }
    }

    /// The line at the end.
    pub(crate) fn end(&mut self, verdict: &Verdict) -> String {
        match self {
            Report::Human(human) => human.end(verdict),
            Report::Json(json) => json.end(verdict),
        }
    }

    /// Where the lines above go.
    pub(crate) fn target(&self) -> Target {
        match self {
            Report::Human(_) => Target::Stderr,
            Report::Json(_) => Target::Stdout,
        }
    }

    /// A line of a worker: where it goes, and its bytes with a newline.
    pub(crate) fn output(&mut self, line: &OutputLine) -> (Target, Vec<u8>) {
        match self {
            Report::Human(human) => human.output(line),
            Report::Json(json) => (Target::Stdout, json.output(line)),
        }
    }
}
