//! What becomes of a request: it is answered from the book, or something is done and waited for.
//!
//! What workers do about it is decided by the cluster. Whether it is done is seen in the book, which hears of every event:
//! whoever waits, waits for the book to say so. A wish for another binary is no work of this kind: `clients` passes it on.
//!
//! The surprising rule: of what takes long, a reload, a restart, an upgrade, there is one at a time; another is told what is
//! under way and not put into a queue.

use std::sync::Arc;
use std::time::Duration;

use polyfork::cluster::{ReloadError, ReloadOptions, ReloadReport};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::time::timeout;

use super::{Control, LAST_ANSWERS, lock};
use crate::config::live::Live;
use crate::control::book::{Book, Progress};
use crate::control::protocol::{self, Refusal, Request, Scale, Verb};
use crate::exit::Code;
use crate::metrics::{self, text};
use crate::values::MOST_WORKERS;
use crate::words;

/// Events kept for a client that is behind.
const STREAM_BUFFER: usize = 256;

/// What a client gets.
pub(super) enum Answer {
    Line(Vec<u8>),
    Stream(broadcast::Receiver<Arc<str>>),
}

#[derive(Serialize)]
struct Accepted {
    accepted: bool,
}

/// What is told who does not wait.
pub(super) fn accepted() -> Vec<u8> {
    protocol::done(&Accepted { accepted: true })
}

#[derive(Serialize)]
struct Scaled {
    workers: u32,
    ready: bool,
}

#[derive(Serialize)]
struct Reloaded {
    generation: u32,
    workers: u32,
    refused: u64,
    reset: u64,
    cut_short: u32,
    abandoned: Vec<String>,
    slowest_wait_ms: u128,
    took_ms: u128,
    /// Keys of the configuration that no reload changes.
    left: Vec<String>,
    text: String,
}

impl Reloaded {
    fn of(report: &ReloadReport, live: Option<&Live>) -> Reloaded {
        let mut text = words::reloaded(report);
        if let Some(left) = live.and_then(Live::left_told) {
            text.push_str("; ");
            text.push_str(&left);
        }
        Reloaded {
            generation: report.generation,
            workers: report.workers,
            refused: report.refused,
            reset: report.reset,
            cut_short: report.cut_short,
            abandoned: words::addresses(&report.abandoned),
            slowest_wait_ms: report.slowest_wait.as_millis(),
            took_ms: report.took.as_millis(),
            left: live.map(Live::left).unwrap_or_default(),
            text,
        }
    }
}

#[derive(Serialize)]
struct Restarted {
    slots: usize,
    workers: Vec<u64>,
}

#[derive(Serialize)]
struct Over<'a> {
    outcome: &'a str,
    exit_code: u8,
    text: &'a str,
}

/// Does what is asked, within the time that the asker gives.
pub(super) async fn work(control: &Control, request: Request) -> Answer {
    let limit = request.deadline;
    let working = answer_to(control, request);
    let reply = match limit {
        None => working.await,
        Some(limit) => timeout(limit, working).await.unwrap_or_else(|_| {
            let text = "not done within the time given; it goes on".to_owned();
            Err(Refusal { word: "deadline", code: Code::NotAnswering, text })
        }),
    };
    // Who is told that something is done sees it done, also in a list.
    control.write_state();
    reply.unwrap_or_else(|refusal| Answer::Line(protocol::not_done(&refusal)))
}

async fn answer_to(control: &Control, request: Request) -> Result<Answer, Refusal> {
    let wait = request.wait;
    match request.verb {
        Verb::Status => {
            let living = control.0.cluster.status().await;
            Ok(Answer::Line(protocol::done(&control.book().status(&living))))
        }
        Verb::Brief => Ok(Answer::Line(protocol::done(&control.book().brief()))),
        Verb::Metrics { json } => {
            let exposition = metrics::gather(control).await;
            Ok(Answer::Line(match json {
                true => protocol::done(&exposition.json()),
                false => protocol::done(&exposition.text(text::Format::Text)),
            }))
        }
        Verb::RestartSlot { slot } => control.restart_slot(slot, wait).await.map(Answer::Line),
        Verb::Config => Ok(Answer::Line(protocol::done(&control.book().configuration()))),
        Verb::Events => control.listen().map(Answer::Stream),
        Verb::Scale(scale) => control.scale(scale, wait).await.map(Answer::Line),
        Verb::Restart => control.restart(wait).await.map(Answer::Line),
        Verb::Reload { at_a_time, probation } => {
            let options = ReloadOptions::new().at_a_time(at_a_time);
            let options = probation.into_iter().fold(options, ReloadOptions::probation);
            control.reload(options, wait).await.map(Answer::Line)
        }
        Verb::Stop { grace } => Ok(Answer::Line(control.stop(grace, wait).await)),
        Verb::Kill => Ok(Answer::Line(control.kill(wait).await)),
        // Taken out by whoever has the connection.
        Verb::Upgrade { .. } => Err(Refusal::refused("it cannot be asked for here")),
    }
}

impl Control {
    /// Notes that another binary is to take over, unless something is under way.
    ///
    /// # Errors
    /// What is under way.
    pub(crate) fn begin_upgrade(&self) -> Result<(), Refusal> {
        self.refuse_when_stopping()?;
        self.begin("upgrade")
    }

    /// Notes that it is over.
    pub(crate) fn end_upgrade(&self) {
        self.note(|book| book.busy = None);
    }

    pub(super) fn listen(&self) -> Result<broadcast::Receiver<Arc<str>>, Refusal> {
        if let Some(verdict) = self.book().ended() {
            return Err(Refusal::ended(verdict));
        }
        let mut stream = lock(&self.0.stream);
        let sender = stream.get_or_insert_with(|| broadcast::channel(STREAM_BUFFER).0);
        Ok(sender.subscribe())
    }

    fn refuse_when_stopping(&self) -> Result<(), Refusal> {
        let book = self.book();
        match (book.ended(), book.is_stopping()) {
            (Some(verdict), _) => Err(Refusal::ended(verdict)),
            (None, true) => Err(Refusal::refused("it is stopping")),
            (None, false) => Ok(()),
        }
    }

    async fn scale(&self, scale: Scale, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        let before = self.book().slots();
        let workers = self.wants(scale)?;
        self.0.cluster.scale(workers).await;
        if wait {
            self.until(|book| scaled(book, &before, workers)).await?;
        }
        Ok(protocol::done(&Scaled { workers, ready: wait }))
    }

    /// Notes how many workers there are to be.
    fn wants(&self, scale: Scale) -> Result<u32, Refusal> {
        let mut book = self.book();
        let now = book.wanted();
        let to = match scale {
            Scale::To(to) => i64::from(to),
            Scale::By(by) => i64::from(now) + i64::from(by),
        };
        let to = u32::try_from(to).ok().filter(|to| (1..=MOST_WORKERS).contains(to));
        let to = to.ok_or_else(|| {
            let text = format!("it has {now} workers; there can be 1 to {MOST_WORKERS}");
            Refusal::refused(text)
        })?;
        book.wants(to);
        Ok(to)
    }

    async fn reload(&self, options: ReloadOptions, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        self.begin("reload")?;
        self.note(|book| book.failed_reload = None);
        let control = self.clone();
        let reloading = tokio::spawn(async move {
            let outcome = control.0.cluster.reload(options).await;
            control.note(|book| book.busy = None);
            outcome
        });
        if !wait {
            return Ok(accepted());
        }
        let outcome = reloading.await.map_err(|_| Refusal::refused("the reload broke off"))?;
        match outcome {
            Ok(report) => Ok(protocol::done(&Reloaded::of(&report, self.book().live()))),
            Err(ReloadError::Busy { .. }) => Err(busy("reload")),
            // Nothing is wrong with the new version, and nobody goes on serving.
            Err(ReloadError::Stopping | ReloadError::Ended) => {
                Err(Refusal::refused("not reloaded: it is stopping"))
            }
            Err(error) => Err(self.reload_failed(&error).await),
        }
    }

    /// Why a reload failed, with what the new worker wrote last.
    async fn reload_failed(&self, error: &ReloadError) -> Refusal {
        let told = self.until(|book| book.failed_reload.clone());
        let lines = timeout(LAST_ANSWERS, told).await.unwrap_or_default();
        let mut text = error.to_string();
        if !lines.is_empty() {
            text.push_str("; its last lines on standard error:");
        }
        for line in lines {
            text.push_str("\n    ");
            text.push_str(&line);
        }
        Refusal { word: "reload_failed", code: Code::ReloadFailed, text }
    }

    /// Notes that something long begins; one at a time.
    fn begin(&self, what: &'static str) -> Result<(), Refusal> {
        let mut book = self.book();
        match book.busy {
            Some(other) => Err(busy(other)),
            None => {
                book.busy = Some(what);
                Ok(())
            }
        }
    }

    /// Slot by slot. A new worker that ends before it is ready ends the whole: the slots after it keep what they have.
    async fn restart(&self, wait: bool) -> Result<Vec<u8>, Refusal> {
        let slots = self.book().slots();
        self.restart_these(slots, wait).await
    }

    async fn restart_slot(&self, slot: u32, wait: bool) -> Result<Vec<u8>, Refusal> {
        if !self.book().slots().contains(&slot) {
            return Err(Refusal::refused(format!("it has no slot {slot}")));
        }
        self.restart_these(vec![slot], wait).await
    }

    async fn restart_these(&self, slots: Vec<u32>, wait: bool) -> Result<Vec<u8>, Refusal> {
        self.refuse_when_stopping()?;
        self.begin("restart")?;
        let control = self.clone();
        let rolling = tokio::spawn(async move {
            let outcome = control.roll(slots).await;
            control.note(|book| book.busy = None);
            outcome
        });
        if !wait {
            return Ok(accepted());
        }
        let workers = rolling.await.map_err(|_| Refusal::refused("the restart broke off"))??;
        Ok(protocol::done(&Restarted { slots: workers.len(), workers }))
    }

    async fn roll(&self, slots: Vec<u32>) -> Result<Vec<u64>, Refusal> {
        let mut fresh = Vec::new();
        for slot in slots {
            let old = self.book().worker_of(slot);
            self.refuse_when_stopping()?;
            self.0.cluster.restart_slot(slot).await;
            fresh.extend(self.until(|book| rolled(book, slot, old)).await?);
        }
        Ok(fresh)
    }

    async fn stop(&self, grace: Option<Duration>, wait: bool) -> Vec<u8> {
        let stops_already = self.book().is_stopping();
        self.note(Book::stops);
        // Whoever asks here wants an end; a service manager that starts it again asks by signal.
        self.0.cluster.forget_kept().await;
        match grace {
            Some(grace) => self.0.cluster.stop_within(grace).await,
            // A second one, as a signal, would kill workers. That is what `kill` is for.
            None if stops_already => {}
            None => self.0.cluster.stop().await,
        }
        self.end(wait).await
    }

    async fn kill(&self, wait: bool) -> Vec<u8> {
        self.note(Book::stops);
        self.0.cluster.forget_kept().await;
        self.0.cluster.stop_now().await;
        self.end(wait).await
    }

    async fn end(&self, wait: bool) -> Vec<u8> {
        if !wait {
            return accepted();
        }
        let verdict = self.until(|book| book.ended().cloned()).await;
        let (outcome, exit_code) = (verdict.code.row().word, verdict.code as u8);
        protocol::done(&Over { outcome, exit_code, text: &verdict.text })
    }
}

/// Whether there are as many workers as were asked for; those in slots that were there `before` are not waited for.
fn scaled(book: &Book, before: &[u32], workers: u32) -> Option<Result<(), Refusal>> {
    if let Some(verdict) = book.ended() {
        return Some(Err(Refusal::ended(verdict)));
    }
    for slot in book.slots().iter().filter(|slot| !before.contains(slot)) {
        match book.progress(*slot, None) {
            Progress::Coming => return None,
            Progress::Failed(why) => return Some(Err(Refusal::refused(why))),
            Progress::Ready(_) | Progress::Stopped | Progress::Gone => {}
        }
    }
    let settled = book.wanted() != workers || book.slot_count() == workers;
    settled.then_some(Ok(()))
}

/// What becomes of one slot while workers are replaced: `None` as long as that is open, the new worker when it is ready.
fn rolled(book: &Book, slot: u32, old: Option<u64>) -> Option<Result<Option<u64>, Refusal>> {
    match (book.ended(), book.progress(slot, old)) {
        (Some(verdict), _) => Some(Err(Refusal::ended(verdict))),
        (None, _) if book.is_stopping() => Some(Err(Refusal::refused("it is stopping"))),
        (None, Progress::Coming) => None,
        (None, Progress::Stopped | Progress::Gone) => Some(Ok(None)),
        (None, Progress::Ready(worker)) => Some(Ok(Some(worker))),
        (None, Progress::Failed(why)) => Some(Err(Refusal::refused(why))),
    }
}

fn busy(with: &str) -> Refusal {
    Refusal {
        word: "busy",
        code: Code::Refused,
        text: format!("{} is under way; wait for its end", words::with_article(with)),
    }
}
