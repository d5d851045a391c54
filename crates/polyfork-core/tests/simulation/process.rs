//! A simulated worker process and the two directions of its channel.
//!
//! It knows nothing of the code under test. What it does and when is drawn by the world; here is only what it can do and what
//! that leaves behind. The surprising rule: what a process wrote before it died can still be read, what was written to it and
//! not read is lost with it. That is what a socket pair does.

use std::collections::VecDeque;

use polyfork_core::{Exit, WorkerId};

/// What a worker writes to its primary.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Online,
    Ready,
    Leaving,
    Acknowledge(u64),
    Refuse(u64),
}

/// How this program behaves.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Nature {
    /// It will be ready at some time.
    pub(crate) gets_ready: bool,
    /// It ends when told to stop.
    pub(crate) obeys_stop: bool,
    /// It ends by SIGTERM.
    pub(crate) obeys_terminate: bool,
    /// It answers connections that it was not given.
    pub(crate) lies: bool,
    /// One in this many connections is refused.
    pub(crate) refuses_one_in: u64,
    /// It exits as soon as it has started.
    pub(crate) exits_at_once: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) worker: WorkerId,
    pub(crate) nature: Nature,
    pub(crate) frozen: bool,
    /// Whether the process has its end of the channel open.
    pub(crate) channel_open: bool,
    /// Whether the shell knows that it has not.
    pub(crate) close_seen: bool,
    pub(crate) inbox: VecDeque<(u64, u64)>,
    pub(crate) outbox: VecDeque<Word>,
    pub(crate) said_ready: bool,
    pub(crate) told_stop: bool,
    pub(crate) terminated: bool,
    pub(crate) killed: bool,
    /// The numbers it answered, the latest few: material for lies.
    pub(crate) answered: VecDeque<u64>,
    /// The numbers that were taken back from it.
    pub(crate) revoked: Vec<u64>,
    pub(crate) ended: Option<(Exit, bool)>,
}

impl Process {
    pub(crate) fn new(worker: WorkerId, nature: Nature) -> Process {
        Process {
            worker,
            nature,
            frozen: false,
            channel_open: true,
            close_seen: false,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            said_ready: false,
            told_stop: false,
            terminated: false,
            killed: false,
            answered: VecDeque::new(),
            revoked: Vec::new(),
            ended: None,
        }
    }

    /// Whether it can do anything by itself.
    pub(crate) fn runs(&self) -> bool {
        self.ended.is_none() && !self.frozen
    }

    /// Whether it can be read from or written to its channel.
    pub(crate) fn talks(&self) -> bool {
        self.runs() && self.channel_open
    }

    /// Whether a liar would lie: when it has something good to lie about, or just so.
    pub(crate) fn lies_now(&self, in_the_mood: bool) -> bool {
        self.nature.lies && self.said_ready && (in_the_mood || !self.revoked.is_empty())
    }

    pub(crate) fn say(&mut self, word: Word) {
        if self.talks() {
            self.outbox.push_back(word);
        }
    }

    /// A connection arrives, if somebody is there to hold the other end.
    pub(crate) fn send(&mut self, seq: u64, connection: u64) {
        if self.ended.is_none() && self.channel_open {
            self.inbox.push_back((seq, connection));
        }
    }

    pub(crate) fn end(&mut self, exit: Exit, out_of_memory: bool) {
        if self.ended.is_none() {
            self.ended = Some((exit, out_of_memory));
            self.inbox.clear();
        }
    }

    pub(crate) fn close_channel(&mut self) {
        self.channel_open = false;
        self.inbox.clear();
    }

    pub(crate) fn remember(&mut self, seq: u64) {
        if self.answered.len() == 8 {
            self.answered.pop_front();
        }
        self.answered.push_back(seq);
    }
}
