//! What is known of an app while it runs: its slots, its addresses, what ended why. Fed with events, read for `status`
//! and `ls`.
//!
//! Bounded: one entry for each slot and each address. What changes by itself (CPU, memory) is read when it is asked for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use polyfork::cluster::upgrade;
use polyfork::cluster::{Address, Event, Via, WorkerStatus};
use serde::{Deserialize, Serialize};

use super::usage::{self, Usage};
use crate::clock;
use crate::config::live::Live;
use crate::config::wanted::Digest;
use crate::ledger::Verdict;
use crate::logs::writer::Losses;
use crate::metrics::counts::Counts;
use crate::words;

/// The version of what `status` and `ls` give.
pub(crate) const VERSION: u32 = 1;

/// What is known.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Book {
    about: About,
    #[serde(with = "upgrade::instant")]
    started: Instant,
    started_at: SystemTime,
    slots: BTreeMap<u32, Slot>,
    listeners: BTreeMap<Address, Way>,
    /// How many workers are wanted.
    wanted: u32,
    restarts: u64,
    counts: Counts,
    stopping: bool,
    #[serde(skip)]
    ended: Option<Verdict>,
    /// Lines of logs that could not be written.
    #[serde(skip)]
    losses: Option<Arc<Losses>>,
    /// Somebody restarts or reloads it now.
    #[serde(skip)]
    pub(crate) busy: Option<&'static str>,
    /// What the new worker of a reload that failed wrote last to standard error.
    #[serde(skip)]
    pub(crate) failed_reload: Option<Vec<String>>,
}

/// What does not change.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct About {
    /// Its name.
    pub(crate) name: String,
    /// As it was named, without arguments: those may hold secrets.
    pub(crate) program: String,
    /// `node`, `python` and so on.
    pub(crate) runtime: String,
    /// How workers are spoken to.
    pub(crate) dialect: String,
    /// The policy asked for.
    pub(crate) policy: String,
    /// The mechanism asked for.
    pub(crate) mechanism: String,
    /// The folder of its logs, if it writes any.
    pub(crate) logs: Option<String>,
    /// Where its metrics are served, if they are.
    pub(crate) metrics: Option<String>,
    /// Its configuration, if it has one.
    #[serde(skip)]
    pub(crate) live: Option<Live>,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Slot {
    /// The latest worker and its process.
    worker: Option<(u64, u32)>,
    /// Workers that are not gone, and their processes. During a reload there are two, or more while old ones finish.
    living: BTreeMap<u64, u32>,
    /// Those that get connections.
    ready: BTreeSet<u64>,
    failed: bool,
    /// Its worker has done its work; there is to be no other. So too while another one is tried by a reload.
    stopped: bool,
    /// How often a worker ended and was replaced afterwards.
    restarts: u64,
    last_exit: Option<LastExit>,
}

/// How the latest worker of a slot that ended did so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LastExit {
    /// When.
    time: String,
    /// Which worker.
    pub(crate) worker: u64,
    /// The word of docs/events.md.
    reason: Cow<'static, str>,
    /// For people.
    pub(crate) text: String,
    code: Option<i32>,
    signal: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Way {
    policy: String,
    mechanism: Cow<'static, str>,
    exact: bool,
    why: String,
}

/// How a slot does, for whoever waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It has a ready worker.
    Ready(u64),
    /// It has none yet.
    Coming,
    /// Its latest worker ended before it was ready, or the slot was given up. What happened.
    Failed(String),
    /// Its worker has done its work; there is to be no other.
    Stopped,
    /// It was taken out of service.
    Gone,
}

/// A slot, for whoever measures it.
#[derive(Debug)]
pub(crate) struct SlotView {
    /// Its number.
    pub(crate) slot: u32,
    /// It has a worker that gets connections.
    pub(crate) ready: bool,
    /// What it is while it has no worker.
    pub(crate) without: &'static str,
    /// How often a worker ended and was replaced afterwards.
    pub(crate) restarts: u64,
    /// Workers that are not gone, and their processes.
    pub(crate) living: Vec<(u64, u32)>,
}

impl Slot {
    fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether it rests, and nobody tries what would become of another worker.
    fn rests(&self) -> bool {
        self.stopped && self.living.is_empty()
    }

    /// What it is while it has no worker.
    fn without(&self) -> &'static str {
        match (self.failed, self.stopped) {
            (true, _) => "failed",
            (false, true) => "stopped",
            (false, false) => "waiting",
        }
    }
}

impl Book {
    /// A book in which nothing has happened yet.
    pub(crate) fn new(about: About, workers: u32, losses: Option<Arc<Losses>>) -> Book {
        Book {
            about,
            started: Instant::now(),
            started_at: SystemTime::now(),
            slots: (1..=workers).map(|slot| (slot, Slot::default())).collect(),
            listeners: BTreeMap::new(),
            wanted: workers,
            restarts: 0,
            counts: Counts::default(),
            stopping: false,
            ended: None,
            losses,
            busy: None,
            failed_reload: None,
        }
    }

    /// The book of the image before this one, with lines of logs counted on, and with its configuration.
    #[must_use]
    pub(crate) fn with(mut self, losses: Option<Arc<Losses>>, live: Option<Live>) -> Book {
        self.about.live = live;
        Book { losses, ..self }
    }

    /// Notes an event.
    pub(crate) fn event(&mut self, event: &Event) {
        self.counts.event(event);
        match event {
            Event::Fork(who) => {
                let slot = self.slots.entry(who.slot).or_default();
                slot.worker = Some((who.worker, who.pid));
                slot.living.insert(who.worker, who.pid);
                slot.failed = false;
                // One more may have been asked for by a signal.
                self.wanted = self.wanted.max(self.slot_count());
            }
            Event::Ready(who) => {
                if let Some(slot) = self.slots.get_mut(&who.slot) {
                    slot.ready.insert(who.worker);
                    slot.stopped = false;
                }
            }
            Event::Draining(who) => {
                if let Some(slot) = self.slots.get_mut(&who.slot) {
                    slot.ready.remove(&who.worker);
                }
            }
            Event::Exit { .. } => self.exit(event),
            Event::SlotFailed { slot, .. } => {
                if let Some(slot) = self.slots.get_mut(slot) {
                    slot.failed = true;
                    slot.stopped = false;
                }
            }
            Event::SlotRests { slot, .. } => {
                if let Some(slot) = self.slots.get_mut(slot) {
                    slot.stopped = true;
                }
            }
            Event::SlotRetired { slot } => {
                self.slots.remove(slot);
                self.wanted = self.wanted.min(self.slot_count());
            }
            Event::Listening { address, by, .. } | Event::Bound { address, by } => {
                self.listeners.insert(address.clone(), way(by));
            }
            Event::Closed { address } => drop(self.listeners.remove(address)),
            // Also when a signal asked for it.
            Event::Stopping => self.stopping = true,
            _ => {}
        }
    }

    fn exit(&mut self, event: &Event) {
        let Event::Exit { who, code, signal, reason, restart_in, .. } = event else { return };
        let Some(slot) = self.slots.get_mut(&who.slot) else { return };
        slot.living.remove(&who.worker);
        slot.ready.remove(&who.worker);
        // One that was replaced beforehand, by a reload or a restart, is none.
        if restart_in.is_some() {
            slot.stopped = false;
            slot.restarts += 1;
            self.restarts += 1;
        }
        slot.last_exit = Some(LastExit {
            time: clock::now(),
            worker: who.worker,
            reason: words::reason(*reason).into(),
            text: words::ended(*reason),
            code: *code,
            signal: signal.map(words::signal),
        });
    }

    /// What it was started with.
    pub(crate) fn configuration(&self) -> Digest {
        self.about.live.as_ref().map(Live::digest).unwrap_or_default()
    }

    /// Where it came from, if that is a file.
    pub(crate) fn live(&self) -> Option<&Live> {
        self.about.live.as_ref()
    }

    /// Notes that it was asked to stop.
    pub(crate) fn stops(&mut self) {
        self.stopping = true;
    }

    /// Whether it was asked to stop.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping || self.ended.is_some()
    }

    /// Notes the end.
    pub(crate) fn ends(&mut self, verdict: Verdict) {
        self.ended = Some(verdict);
    }

    /// How it ended.
    pub(crate) fn ended(&self) -> Option<&Verdict> {
        self.ended.as_ref()
    }

    /// Notes how many workers are wanted.
    pub(crate) fn wants(&mut self, workers: u32) {
        self.wanted = workers;
    }

    /// How many workers are wanted.
    pub(crate) fn wanted(&self) -> u32 {
        self.wanted
    }

    /// How many slots there are, also those that only finish.
    pub(crate) fn slot_count(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// The slots.
    pub(crate) fn slots(&self) -> Vec<u32> {
        self.slots.keys().copied().collect()
    }

    /// The latest worker of a slot.
    pub(crate) fn worker_of(&self, slot: u32) -> Option<u64> {
        self.slots.get(&slot)?.worker.map(|(worker, _)| worker)
    }

    /// How far a slot is with a worker younger than `than`.
    pub(crate) fn progress(&self, slot: u32, than: Option<u64>) -> Progress {
        let Some(found) = self.slots.get(&slot) else { return Progress::Gone };
        let younger = |worker: u64| than.is_none_or(|than| worker > than);
        let exit = found.last_exit.as_ref().filter(|exit| younger(exit.worker));
        match found.worker {
            Some((worker, _)) if younger(worker) && found.ready.contains(&worker) => {
                Progress::Ready(worker)
            }
            _ if found.stopped && exit.is_some() => Progress::Stopped,
            _ if found.failed => {
                let why = found.last_exit.as_ref().map_or("", |exit| exit.text.as_str());
                Progress::Failed(format!("slot {slot} was given up: its last worker {why}"))
            }
            _ => match exit {
                Some(exit) => {
                    Progress::Failed(format!("slot {slot}: its new worker {}", exit.text))
                }
                None => Progress::Coming,
            },
        }
    }

    /// What it is once no slot is on its way any more, and at least one is ready or has done its work.
    pub(crate) fn settled(&self) -> Option<Settled<'_>> {
        let over = |slot: &Slot| slot.is_ready() || slot.failed || slot.rests();
        if self.slots.values().all(|slot| slot.failed) || !self.slots.values().all(over) {
            return None;
        }
        let failed = self.slots.iter().filter(|(_, slot)| slot.failed);
        Some(Settled { brief: self.brief(), failed_slots: failed.map(|(slot, _)| *slot).collect() })
    }

    fn ready(&self) -> u32 {
        let ready = self.slots.values().filter(|slot| slot.is_ready()).count();
        u32::try_from(ready).unwrap_or(u32::MAX)
    }

    fn state(&self) -> &'static str {
        let ready = self.ready();
        let stopped = self.slots.values().filter(|slot| slot.rests()).count();
        let stopped = u32::try_from(stopped).unwrap_or(u32::MAX);
        let ever = self.slots.values().any(|slot| slot.is_ready() || slot.restarts > 0);
        match () {
            () if self.is_stopping() => "stopping",
            () if stopped > 0 && stopped >= self.wanted => "stopped",
            () if ready >= self.wanted.saturating_sub(stopped) => "ready",
            () if ready > 0 => "degraded",
            () if self.slots.values().all(|slot| slot.failed) => "failed",
            () if ever => "down",
            () => "starting",
        }
    }

    /// Policy and mechanism: as they came out where something listens, as asked for where nothing does.
    pub(crate) fn way(&self) -> (&str, &str) {
        match self.listeners.values().next() {
            Some(way) => (&way.policy, &way.mechanism),
            None => (&self.about.policy, &self.about.mechanism),
        }
    }

    fn pids(&self) -> impl Iterator<Item = u32> {
        self.slots.values().flat_map(|slot| slot.living.values().copied())
    }

    /// What does not change.
    pub(crate) fn about(&self) -> &About {
        &self.about
    }

    /// What was counted of events.
    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// When it was started, for people.
    pub(crate) fn started(&self) -> String {
        clock::stamp(self.started_at)
    }

    /// The same, since 1970.
    pub(crate) fn started_at(&self) -> std::time::Duration {
        self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    /// Lines of logs that could not be written, if it writes any.
    pub(crate) fn log_lines_lost(&self) -> Option<u64> {
        self.losses.as_ref().map(|losses| losses.lines())
    }

    /// The slots, for whoever measures them.
    pub(crate) fn slot_views(&self) -> Vec<SlotView> {
        let view = |(number, slot): (&u32, &Slot)| SlotView {
            slot: *number,
            ready: slot.is_ready(),
            without: slot.without(),
            restarts: slot.restarts,
            living: slot.living.iter().map(|(worker, pid)| (*worker, *pid)).collect(),
        };
        self.slots.iter().map(view).collect()
    }

    /// Ids of workers that are not gone.
    pub(crate) fn living_workers(&self) -> BTreeSet<u64> {
        self.slots.values().flat_map(|slot| slot.living.keys().copied()).collect()
    }

    /// A line of a list.
    pub(crate) fn brief(&self) -> Brief<'_> {
        self.brief_with(usage::of_all(self.pids().chain([std::process::id()])))
    }

    /// A line of a list for the state file: without what changes all the time, and with what it can be found out by.
    pub(crate) fn state_line(&self) -> Vec<u8> {
        let started = self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = State {
            brief: self.brief_with(Usage::default()),
            started_ms: ms(started),
            pids: self.pids().collect(),
        };
        // Texts and numbers cannot fail.
        serde_json::to_vec(&state).unwrap_or_default()
    }

    fn brief_with(&self, usage: Usage) -> Brief<'_> {
        let (policy, mechanism) = self.way();
        Brief {
            version: VERSION,
            name: &self.about.name,
            pid: std::process::id(),
            state: self.state(),
            program: &self.about.program,
            policy,
            mechanism,
            listeners: self.listeners.keys().map(ToString::to_string).collect(),
            workers_wanted: self.wanted,
            workers_ready: self.ready(),
            restarts: self.restarts,
            started: self.started(),
            uptime_ms: ms(self.started.elapsed()),
            cpu_ms: usage.cpu_ms,
            resident_bytes: usage.resident_bytes,
        }
    }

    /// All that is known, together with what the library knows of living workers.
    pub(crate) fn status(&self, living: &[WorkerStatus]) -> Status<'_> {
        let mut workers: Vec<WorkerShape<'_>> =
            living.iter().map(|worker| self.living(worker)).collect();
        let without = self
            .slots
            .iter()
            .filter(|(number, _)| !living.iter().any(|worker| worker.slot == **number));
        workers.extend(without.map(|(number, slot)| empty(*number, slot)));
        workers.sort_by_key(|worker| (worker.slot, worker.worker));
        let own = usage::of(std::process::id()).unwrap_or_default();
        let listener = |(address, way): (&Address, &Way)| ListenerShape {
            address: address.to_string(),
            port: words::port(address),
            policy: way.policy.clone(),
            mechanism: way.mechanism.to_string(),
            exact: way.exact,
            why: way.why.clone(),
        };
        Status {
            brief: self.brief(),
            polyfork: env!("CARGO_PKG_VERSION"),
            runtime: &self.about.runtime,
            dialect: &self.about.dialect,
            logs: self.about.logs.as_deref(),
            log_lines_lost: self.log_lines_lost(),
            metrics: self.about.metrics.as_deref(),
            busy: self.busy,
            listening: self.listeners.iter().map(listener).collect(),
            primary: PrimaryShape { cpu_ms: own.cpu_ms, resident_bytes: own.resident_bytes },
            workers,
        }
    }

    fn living(&self, worker: &WorkerStatus) -> WorkerShape<'_> {
        let slot = self.slots.get(&worker.slot);
        let usage = usage::of(worker.pid);
        WorkerShape {
            slot: worker.slot,
            worker: Some(worker.worker),
            pid: Some(worker.pid),
            state: worker.state,
            generation: Some(worker.generation),
            restarts: slot.map_or(0, |slot| slot.restarts),
            last_exit: slot.and_then(|slot| slot.last_exit.as_ref()),
            uptime_ms: Some(ms(worker.uptime)),
            cpu_ms: usage.map(|usage| usage.cpu_ms),
            resident_bytes: usage.map(|usage| usage.resident_bytes),
            accepted: worker.connections,
            queue: worker.queue,
            lag_ms: worker.event_loop_lag.map(|lag| lag.as_secs_f64() * 1000.0),
            blocked_ms: worker.blocked.map(ms),
        }
    }
}

fn empty(number: u32, slot: &Slot) -> WorkerShape<'_> {
    WorkerShape {
        slot: number,
        worker: None,
        pid: None,
        state: slot.without(),
        generation: None,
        restarts: slot.restarts,
        last_exit: slot.last_exit.as_ref(),
        uptime_ms: None,
        cpu_ms: None,
        resident_bytes: None,
        accepted: None,
        queue: None,
        lag_ms: None,
        blocked_ms: None,
    }
}

fn way(via: &Via) -> Way {
    Way {
        policy: via.policy.to_string(),
        mechanism: via.mechanism.word().into(),
        exact: words::is_exact(via),
        why: via.why.clone(),
    }
}

fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A line of a list.
#[derive(Debug, Serialize)]
pub(crate) struct Brief<'a> {
    version: u32,
    name: &'a str,
    pid: u32,
    state: &'static str,
    program: &'a str,
    policy: &'a str,
    mechanism: &'a str,
    listeners: Vec<String>,
    workers_wanted: u32,
    workers_ready: u32,
    restarts: u64,
    started: String,
    uptime_ms: u64,
    cpu_ms: u64,
    resident_bytes: u64,
}

/// A line of a list, as it is kept in a file.
#[derive(Debug, Serialize)]
struct State<'a> {
    #[serde(flatten)]
    brief: Brief<'a>,
    started_ms: u64,
    pids: Vec<u32>,
}

/// What a start came to.
#[derive(Debug, Serialize)]
pub(crate) struct Settled<'a> {
    #[serde(flatten)]
    brief: Brief<'a>,
    failed_slots: Vec<u32>,
}

/// All that is known.
#[derive(Debug, Serialize)]
pub(crate) struct Status<'a> {
    #[serde(flatten)]
    brief: Brief<'a>,
    polyfork: &'static str,
    runtime: &'a str,
    dialect: &'a str,
    logs: Option<&'a str>,
    log_lines_lost: Option<u64>,
    metrics: Option<&'a str>,
    busy: Option<&'static str>,
    listening: Vec<ListenerShape>,
    primary: PrimaryShape,
    workers: Vec<WorkerShape<'a>>,
}

#[derive(Debug, Serialize)]
struct PrimaryShape {
    cpu_ms: u64,
    resident_bytes: u64,
}

#[derive(Debug, Serialize)]
struct ListenerShape {
    address: String,
    port: Option<u16>,
    policy: String,
    mechanism: String,
    exact: bool,
    why: String,
}

#[derive(Debug, Serialize)]
struct WorkerShape<'a> {
    slot: u32,
    worker: Option<u64>,
    pid: Option<u32>,
    state: &'static str,
    generation: Option<u32>,
    restarts: u64,
    last_exit: Option<&'a LastExit>,
    uptime_ms: Option<u64>,
    cpu_ms: Option<u64>,
    resident_bytes: Option<u64>,
    accepted: Option<u64>,
    queue: Option<u64>,
    lag_ms: Option<f64>,
    blocked_ms: Option<u64>,
}

impl Usage {
    /// The sum of two.
    pub(crate) fn plus(self, other: Usage) -> Usage {
        Usage {
            cpu_ms: self.cpu_ms + other.cpu_ms,
            resident_bytes: self.resident_bytes + other.resident_bytes,
            is_stopped: self.is_stopped || other.is_stopped,
        }
    }
}
