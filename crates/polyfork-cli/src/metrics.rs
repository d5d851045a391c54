//! Metrics: what a primary knows of itself and its workers, and what the programs of workers tell of themselves, as text
//! that Prometheus reads.
//!
//! `catalog` is the table of our own metrics, `counts` counts events, `read` and `merge` deal with what programs say,
//! `model` and `text` know the formats, `server` serves them over HTTP; the control socket has a verb for them. Figures of
//! connections are the library's.
//!
//! Written by hand instead of with a crate of metrics: nearly all numbers exist already, in the library's figures, in the book
//! and in the kernel, and are read when somebody asks. So a primary that nobody asks keeps no registry, and what is left of
//! a metrics crate is its text format, which is a page.
//!
//! The surprising rule: nobody is waited for. The loop has a fifth of a second, programs have half a second, and what is not
//! there by then is told to be missing or late. Whoever asks while others are being answered gets the same answer.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use polyfork::cluster::{Cluster, Figures, Measured, Measures, WorkerStatus};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::control::book::{Book, SlotView};
use crate::control::server::Control;
use crate::control::usage;
use catalog as own;
use merge::Memory;
use model::{Bound, Family, Key, Labels, Part, Sample};

pub(crate) mod catalog;
pub(crate) mod counts;
mod merge;
mod model;
mod read;
pub(crate) mod server;
pub(crate) mod text;

/// For the primary's own loop, which waits for nobody.
const LOOP_TIME: Duration = Duration::from_millis(200);
/// For programs to tell of themselves.
const PROGRAM_TIME: Duration = Duration::from_millis(500);
/// States that are always told.
const STATES: [&str; 7] =
    ["starting", "online", "ready", "draining", "waiting", "stopped", "failed"];

/// What there is to tell at one moment.
#[derive(Debug)]
pub(crate) struct Exposition {
    /// In the order in which they are written.
    families: Vec<Family>,
}

impl Exposition {
    /// As text.
    pub(crate) fn text(&self, format: text::Format) -> String {
        text::render(&self.families, format)
    }

    /// As JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        text::json(&self.families)
    }
}

/// What is remembered from one answer to the next.
#[derive(Debug)]
pub(crate) struct Meter {
    /// Whether programs are asked for metrics of their own.
    asks_programs: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    programs: Memory,
    cpu: BTreeMap<u32, Cpu>,
    /// The last answer, as long as somebody uses it, and when it was complete.
    last: Option<(Instant, Weak<Exposition>)>,
}

/// CPU time of a slot's workers, as it was last told: it never goes back, also when one ends between two looks.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Cpu {
    told_ms: u64,
}

impl Meter {
    /// A meter that has measured nothing.
    pub(crate) fn new(asks_programs: bool) -> Meter {
        Meter { asks_programs, state: Mutex::default() }
    }

    /// What is remembered, for the next image of this process. While somebody gathers, nothing is.
    ///
    /// # Errors
    /// When it cannot be written down.
    pub(crate) fn pack(&self) -> std::io::Result<Vec<u8>> {
        let none = (Memory::default(), BTreeMap::<u32, Cpu>::new());
        let packed = match self.state.try_lock() {
            Ok(state) => postcard::to_stdvec(&(self.asks_programs, &state.programs, &state.cpu)),
            Err(_) => postcard::to_stdvec(&(self.asks_programs, &none.0, &none.1)),
        };
        packed.map_err(std::io::Error::other)
    }

    /// Goes on measuring where the image before this one has stopped.
    ///
    /// # Errors
    /// When what it left makes no sense.
    pub(crate) fn unpack(packed: &[u8]) -> Result<Meter, postcard::Error> {
        let (asks_programs, programs, cpu): (bool, Memory, BTreeMap<u32, Cpu>) =
            postcard::from_bytes(packed)?;
        let state = State { programs, cpu, last: None };
        Ok(Meter { asks_programs, state: Mutex::new(state) })
    }
}

/// Gathers everything, within a second.
pub(crate) async fn gather(control: &Control) -> Arc<Exposition> {
    let asked = Instant::now();
    let meter = control.meter();
    let mut state = meter.state.lock().await;
    if let Some((complete, last)) = &state.last
        && *complete > asked
        && let Some(exposition) = last.upgrade()
    {
        return exposition;
    }
    let cluster = control.cluster();
    let (living, figures, measures) = tokio::join!(
        timeout(LOOP_TIME, cluster.status()),
        timeout(LOOP_TIME, cluster.figures()),
        programs(cluster, meter.asks_programs),
    );
    let looked = living.ok().zip(figures.ok());
    let known = control.book().living_workers();
    let told = match measures {
        Some(measures) => told(&mut state.programs, measures, known).await,
        None => Vec::new(),
    };
    let mut families = Vec::new();
    {
        let book = control.book();
        primary(&mut families, &book, control.refused());
        workers(&mut families, &book, looked.as_ref().map(|(living, _)| living.as_slice()));
        slots(&mut families, &book, &mut state.cpu, looked.as_ref());
        connections(&mut families, looked.as_ref().map(|(_, figures)| figures));
        reloads(&mut families, &book);
    }
    families.push(own::STALE.with(vec![alone(f64::from(u8::from(looked.is_none())))]));
    families.extend(told);
    let exposition = Arc::new(Exposition { families });
    state.last = Some((Instant::now(), Arc::downgrade(&exposition)));
    exposition
}

async fn programs(cluster: &Cluster, asks: bool) -> Option<Vec<Measures>> {
    match asks {
        true => Some(cluster.measures(PROGRAM_TIME).await),
        false => None,
    }
}

/// A sample without labels.
fn alone(value: f64) -> Sample {
    Sample { key: Key::plain(), value }
}

/// Counts are far below 2^53, from which on not every number can be told.
fn count(value: u64) -> f64 {
    value as f64
}

fn seconds(ms: u64) -> f64 {
    count(ms) / 1000.0
}

fn by(label: &str, counts: impl IntoIterator<Item = (impl std::fmt::Display, f64)>) -> Vec<Sample> {
    counts.into_iter().map(|(of, value)| Labels::default().with(label, of).sample(value)).collect()
}

/// The primary itself.
fn primary(families: &mut Vec<Family>, book: &Book, refused: u64) {
    let about = book.about();
    let (policy, mechanism) = book.way();
    let app = Labels::default()
        .with("app", &about.name)
        .with("runtime", &about.runtime)
        .with("dialect", &about.dialect)
        .with("policy", policy)
        .with("mechanism", mechanism);
    let version = Labels::default().with("version", env!("CARGO_PKG_VERSION"));
    families.push(own::BUILD.with(vec![version.sample(1.0)]));
    families.push(own::APP.with(vec![app.sample(1.0)]));
    families.push(own::STARTED.with(vec![alone(book.started_at().as_secs_f64())]));
    if let Some(usage) = usage::of(std::process::id()) {
        families.push(own::CPU.with(vec![alone(seconds(usage.cpu_ms))]));
        families.push(own::MEMORY.with(vec![alone(count(usage.resident_bytes))]));
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        // The one that reads the folder is none of them.
        let open = open.count().saturating_sub(1);
        families.push(own::DESCRIPTORS.with(vec![alone(count(open as u64))]));
    }
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    families.push(own::MOST_DESCRIPTORS.with(vec![alone(most.map_or(f64::INFINITY, count))]));
    if let Some(lost) = book.log_lines_lost() {
        families.push(own::LOG_LOST.with(vec![alone(count(lost))]));
    }
    families.push(own::CONTROL_REFUSED.with(vec![alone(count(refused))]));
}

/// Workers by state, and how they ended.
fn workers(families: &mut Vec<Family>, book: &Book, living: Option<&[WorkerStatus]>) {
    families.push(own::WANTED.with(vec![alone(f64::from(book.wanted()))]));
    if let Some(living) = living {
        let mut states: BTreeMap<&str, u32> = BTreeMap::new();
        living.iter().for_each(|worker| *states.entry(worker.state).or_insert(0) += 1);
        for slot in book.slot_views() {
            if !living.iter().any(|worker| worker.slot == slot.slot) {
                *states.entry(slot.without).or_insert(0) += 1;
            }
        }
        let told = STATES.map(|state| (state, f64::from(states.get(state).copied().unwrap_or(0))));
        families.push(own::WORKERS.with(by("state", told)));
    }
    let counts = book.counts();
    let told = |ends: &BTreeMap<Cow<'static, str>, u64>| {
        let known = crate::words::REASONS.iter().map(|word| (*word, 0));
        let all: BTreeMap<&str, u64> =
            known.chain(ends.iter().map(|(word, n)| (&**word, *n))).collect();
        by("reason", all.into_iter().map(|(word, n)| (word, count(n))))
    };
    families.push(own::EXITS.with(told(&counts.exits)));
    families.push(own::RESTARTS.with(told(&counts.restarts)));
}

/// Everything by slot.
fn slots(
    families: &mut Vec<Family>,
    book: &Book,
    cpu: &mut BTreeMap<u32, Cpu>,
    looked: Option<&(Vec<WorkerStatus>, Figures)>,
) {
    let views = book.slot_views();
    let ready = views.iter().map(|view| (view.slot, f64::from(u8::from(view.ready))));
    families.push(own::SLOT_READY.with(by("slot", ready)));
    let restarts = views.iter().map(|view| (view.slot, count(view.restarts)));
    families.push(own::SLOT_RESTARTS.with(by("slot", restarts)));
    let (times, memory) = used(&views, cpu, looked.map(|(_, figures)| figures));
    families.push(own::SLOT_CPU.with(by("slot", times)));
    families.push(own::SLOT_MEMORY.with(by("slot", memory)));
    let Some((living, figures)) = looked else { return };
    let known = |slot: &u32| views.iter().any(|view| view.slot == *slot);
    let slots = || figures.slots.iter().filter(|(slot, _)| known(slot));
    let connections =
        slots().filter_map(|(slot, figures)| Some((slot, count(figures.connections?))));
    families.push(own::SLOT_CONNECTIONS.with(by("slot", connections)));
    let mut queues: BTreeMap<u32, u64> = BTreeMap::new();
    let mut lags: BTreeMap<u32, Duration> = BTreeMap::new();
    for worker in living.iter().filter(|worker| known(&worker.slot)) {
        if let Some(queue) = worker.queue {
            *queues.entry(worker.slot).or_insert(0) += queue;
        }
        if let Some(lag) = worker.event_loop_lag {
            // Of two workers during a reload the later one counts where both tell.
            let slot = lags.entry(worker.slot).or_default();
            *slot = lag.max(*slot);
        }
    }
    families.push(own::SLOT_QUEUE.with(by("slot", queues.into_iter().map(|(s, n)| (s, count(n))))));
    if !lags.is_empty() {
        let lags = lags.into_iter().map(|(slot, lag)| (slot, lag.as_secs_f64()));
        families.push(own::SLOT_LAG.with(by("slot", lags)));
    }
    let messages = slots().flat_map(|(slot, figures)| {
        [("in", figures.messages_in), ("out", figures.messages_out)].map(|(direction, n)| {
            Labels::default().with("slot", slot).with("direction", direction).sample(count(n))
        })
    });
    families.push(own::MESSAGES.with(messages.collect()));
}

type BySlot = Vec<(u32, f64)>;

/// CPU time and memory by slot: of those that have ended what the primary has counted, and what living ones have used by now.
fn used(
    views: &[SlotView],
    cpu: &mut BTreeMap<u32, Cpu>,
    figures: Option<&Figures>,
) -> (BySlot, BySlot) {
    cpu.retain(|slot, _| views.iter().any(|view| view.slot == *slot));
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for view in views {
        let living = usage::of_all(view.living.iter().map(|(_, pid)| *pid));
        let ended = figures.and_then(|figures| figures.slots.get(&view.slot));
        let ended = ended.map_or(Duration::ZERO, |figures| figures.cpu_of_ended);
        let now = living.cpu_ms + u64::try_from(ended.as_millis()).unwrap_or(u64::MAX / 2);
        let told = &mut cpu.entry(view.slot).or_default().told_ms;
        *told = now.max(*told);
        times.push((view.slot, seconds(*told)));
        memory.push((view.slot, count(living.resident_bytes)));
    }
    (times, memory)
}

/// Sockets, and connections that were handed over.
fn connections(families: &mut Vec<Family>, figures: Option<&Figures>) {
    let Some(figures) = figures else { return };
    let waits = &figures.handed_over;
    let part = |part, bound, value| Sample { key: Key { labels: "".into(), part, bound }, value };
    let mut samples: Vec<Sample> = waits
        .cumulative()
        .map(|(bound, n)| {
            let bound = bound.map_or(f64::INFINITY, |bound| bound.as_secs_f64());
            part(Part::Bucket, Some(Bound(bound)), count(n))
        })
        .collect();
    samples.push(part(Part::Sum, None, waits.sum().as_secs_f64()));
    samples.push(part(Part::Count, None, count(waits.count())));
    families.push(own::HANDOFF.with(samples));
    // Two sockets can have one address, as those of port 0 of two families.
    let (mut dropped, mut queues) = (BTreeMap::new(), BTreeMap::new());
    for listener in &figures.listeners {
        let address = listener.address.to_string();
        if let Some(n) = listener.dropped {
            *dropped.entry(address.clone()).or_insert(0) += n;
        }
        if let Some(n) = listener.queue {
            *queues.entry(address).or_insert(0) += n;
        }
    }
    let told = |counts: BTreeMap<String, u64>| {
        by("listener", counts.into_iter().map(|(address, n)| (address, count(n))))
    };
    families.push(own::DROPPED.with(told(dropped)));
    families.push(own::LISTENER_QUEUE.with(told(queues)));
    families.push(own::RESET.with(vec![alone(count(figures.reset))]));
}

fn reloads(families: &mut Vec<Family>, book: &Book) {
    let counts = book.counts();
    let results = [("done", count(counts.reloaded)), ("failed", count(counts.reloads_failed))];
    families.push(own::RELOADS.with(by("result", results)));
    let lost = [("refused", count(counts.refused)), ("reset", count(counts.reset))];
    families.push(own::RELOAD_LOST.with(by("how", lost)));
    families.push(own::RELOAD_CUT.with(vec![alone(count(counts.cut_short))]));
    if let Some(last) = &counts.last {
        families.push(own::RELOAD_TOOK.with(vec![alone(last.took.as_secs_f64())]));
        families.push(own::RELOAD_WAIT.with(vec![alone(last.slowest_wait.as_secs_f64())]));
    }
}

/// What programs tell of themselves, and how many of them did. `living` are all workers that the book knows.
async fn told(
    memory: &mut Memory,
    measures: Vec<Measures>,
    mut living: BTreeSet<u64>,
) -> Vec<Family> {
    let mut states = BTreeMap::from(["answered", "failed", "late", "silent"].map(|s| (s, 0u32)));
    let mut answers = Vec::new();
    for Measures { who, measured, .. } in measures {
        // The book may not have heard of the youngest.
        living.insert(who.worker);
        let answer = match measured {
            Measured::PromClient(message) => read::prom_client(&message).map_err(|_| "failed"),
            Measured::Text(text) => Ok(read::text(&text)),
            Measured::Failed(_) => Err("failed"),
            Measured::Late => Err("late"),
            _ => Err("silent"),
        };
        let state = match answer {
            Ok(answer) => {
                answers.push((who.worker, answer));
                "answered"
            }
            Err(state) => state,
        };
        *states.entry(state).or_default() += 1;
        // Reading a long answer takes a while, and connections are waiting.
        tokio::task::yield_now().await;
    }
    let merged = memory.merge(answers, &living);
    let states = states.into_iter().map(|(state, n)| (state, f64::from(n)));
    let mut families = vec![
        own::APP_WORKERS.with(by("state", states)),
        own::APP_LEFT_OUT.with(vec![alone(count(merged.left_out))]),
    ];
    families.extend(merged.families);
    families
}

#[cfg(test)]
mod tests {
    use polyfork::cluster::{Event, Exit, Reason, Who};

    use super::*;
    use crate::control::book::About;

    fn written(book: &Book, cpu: &mut BTreeMap<u32, Cpu>) -> String {
        let looked = (Vec::new(), Figures::default());
        let mut families = Vec::new();
        primary(&mut families, book, 0);
        workers(&mut families, book, Some(&looked.0));
        slots(&mut families, book, cpu, Some(&looked));
        connections(&mut families, Some(&looked.1));
        reloads(&mut families, book);
        Exposition { families }.text(text::Format::Text)
    }

    #[test]
    fn fault_113_ten_thousand_restarts_leave_no_series() {
        let mut book = Book::new(About::default(), 4, None);
        let mut cpu = BTreeMap::new();
        let mut lines = None;
        for worker in 1..=10_000u32 {
            let slot = worker % 4 + 1;
            // No process has such a number.
            let who = Who { slot, worker: u64::from(worker), pid: u32::MAX - worker };
            book.event(&Event::Fork(who));
            book.event(&Event::Ready(who));
            let signal = [9, 11, 15][worker as usize % 3];
            book.event(&Event::Exit {
                who,
                code: None,
                signal: Some(signal),
                reason: Reason::Exited(Exit::Signal(signal)),
                lived: Duration::ZERO,
                voluntary: false,
                restart_in: Some(Duration::ZERO),
            });
            if worker % 500 == 0 {
                let now = written(&book, &mut cpu).lines().count();
                assert_eq!(*lines.get_or_insert(now), now, "after {worker} restarts");
            }
        }
        let text = written(&book, &mut cpu);
        assert!(
            text.contains("polyfork_worker_restarts_total{reason=\"signal\"} 10000\n"),
            "{text}"
        );
        assert!(text.contains("polyfork_slot_restarts_total{slot=\"4\"} 2500\n"), "{text}");
        assert_eq!(cpu.len(), 4);
    }

    #[test]
    fn time_of_workers_that_are_gone_stays_with_their_slot() {
        let view = |living: Vec<(u64, u32)>| SlotView {
            slot: 1,
            ready: true,
            without: "waiting",
            restarts: 0,
            living,
        };
        let mut figures = Figures::default();
        figures.slots.entry(1).or_default().cpu_of_ended = Duration::from_millis(2000);
        let mut cpu = BTreeMap::new();
        let gone = [view(vec![(8, u32::MAX)])];
        let (times, memory) = used(&gone, &mut cpu, Some(&figures));
        assert_eq!((times[0], memory[0]), ((1, 2.0), (1, 0.0)));
        // Nobody could ask the primary, or a worker has just ended and was not counted yet.
        assert_eq!(used(&gone, &mut cpu, None).0[0], (1, 2.0));
        assert!(used(&[], &mut cpu, Some(&figures)).0.is_empty() && cpu.is_empty());
    }
}
