//! What is counted of events for metrics: ends by reason, reloads and what they lost.
//!
//! Bounded: an entry for each reason there is a word for.

use std::borrow::Cow;
use std::collections::BTreeMap;

use polyfork::cluster::{Event, ReloadReport};
use serde::{Deserialize, Serialize};

use crate::words;

/// The counts.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Workers that ended, by reason.
    pub(crate) exits: BTreeMap<Cow<'static, str>, u64>,
    /// Those that ended by themselves and were replaced.
    pub(crate) restarts: BTreeMap<Cow<'static, str>, u64>,
    /// Reloads that were done.
    pub(crate) reloaded: u64,
    /// Reloads that were given up.
    pub(crate) reloads_failed: u64,
    /// Connections that were turned away while reloads went on.
    pub(crate) refused: u64,
    /// Connections that were cut meanwhile.
    pub(crate) reset: u64,
    /// Workers that were still busy when their grace period was over.
    #[serde(default)]
    pub(crate) cut_short: u64,
    /// The last one that was done.
    pub(crate) last: Option<ReloadReport>,
}

impl Counts {
    /// Notes an event.
    pub(crate) fn event(&mut self, event: &Event) {
        match event {
            Event::Exit { reason, restart_in, .. } => {
                let word = words::reason(*reason);
                *self.exits.entry(word.into()).or_insert(0) += 1;
                if restart_in.is_some() {
                    *self.restarts.entry(word.into()).or_insert(0) += 1;
                }
            }
            Event::Reloaded(report) => {
                self.reloaded += 1;
                self.refused += report.refused;
                self.reset += report.reset;
                self.cut_short += u64::from(report.cut_short);
                self.last = Some(report.clone());
            }
            Event::ReloadFailed { .. } => self.reloads_failed += 1,
            _ => {}
        }
    }
}
