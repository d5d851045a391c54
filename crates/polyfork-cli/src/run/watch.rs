//! A cluster is watched: events become lines, worker output becomes lines, signals are obeyed, until it ends.
//!
//! What lines say is in `report`, who takes them in `sink` and `logs`. Another binary in this one's place is in `replacing`.
//!
//! The surprising rule: these go on side by side on one thread, and none waits for another. Events never wait for a reader;
//! worker output does, so that a slow reader holds up workers and not this process' memory.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use polyfork::cluster::{Cluster, Event, Notice, OutputLine};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::place::card;
use super::{Around, Background, Place, Show, Watch};
use crate::args::choices::OutputArg;
use crate::background::Starter;
use crate::clock;
use crate::control::book::About;
use crate::control::folder::{Claim, Ended};
use crate::exit::Code;
use crate::ledger::{Ledger, Verdict};
use crate::logs::line::Source;
use crate::logs::writer::Writer;
use crate::report::Report;
use crate::report::human::{self, Human};
use crate::report::json::{self, Json};
use crate::sink::{Sink, Target};
use crate::style::Paint;
use crate::words;

/// After so long without an event a primary gives memory back.
const REST_AFTER: Duration = Duration::from_secs(1);
/// At the end, a reader of worker output that takes nothing for this long is taken for stuck.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Before a slot's last lines are shown, how long they may still come.
const LAST_LINES: Duration = Duration::from_millis(50);
const LAST_LINES_STEP: Duration = Duration::from_millis(5);

impl Watch {
    pub(super) fn new(
        workers: u32,
        show: Show,
        place: Place,
        around: Around,
        ledger: Ledger,
    ) -> Watch {
        let Place { binary, claim, about, background, renewal, measured: _, ready: _ } = place;
        let Around { control, serving, manager } = around;
        let report = if show.json {
            Report::Json(Json)
        } else {
            Report::Human(Human::new(workers, Paint::stdout(), Paint::stderr()))
        };
        let tell_dropped = if show.json { json::dropped } else { human::dropped };
        // A thread only for a stream that will be written to.
        let prefix = show.output == OutputArg::Prefix;
        let foreground = background.is_none();
        let out =
            (foreground && (show.json || prefix)).then(|| Sink::new(Target::Stdout, tell_dropped));
        let err = (foreground && !show.json).then(|| Sink::new(Target::Stderr, tell_dropped));
        let (starter, logs) = match background {
            Some(Background { starter, logs }) => (starter, Some(logs)),
            None => (Starter::default(), None),
        };
        let (control, wishes) = control.unzip();
        Watch {
            report: RefCell::new(report),
            ledger: RefCell::new(match show.output {
                OutputArg::Inherit => ledger.deaf(),
                _ => ledger,
            }),
            out,
            err,
            show,
            logs,
            starter: RefCell::new(starter),
            control,
            wishes: RefCell::new(wishes),
            claim: RefCell::new(claim),
            serving,
            manager,
            renewal,
            about,
            workers,
            binary,
            after: RefCell::default(),
            passed_on: Cell::new(0),
            telling: Cell::new(false),
            passing: Cell::new(false),
            told_lost: Cell::new(false),
        }
    }

    /// Stays with the cluster to its end, and tells it.
    pub(super) async fn run(
        &self,
        cluster: &Cluster,
        lines: Option<mpsc::Receiver<OutputLine>>,
        observer: impl FnMut(&Event),
    ) -> Verdict {
        let verdict = self.to_the_end(cluster, lines, observer).await;
        if let Some(claim) = self.claim.borrow_mut().take() {
            self.take_leave(claim, &self.about, &verdict);
        }
        self.starter.borrow_mut().end(&verdict);
        verdict
    }

    fn sink(&self, target: Target) -> Option<&Sink> {
        match target {
            Target::Stdout => self.out.as_ref(),
            Target::Stderr => self.err.as_ref(),
        }
    }

    /// Writes a line of the primary.
    pub(super) fn own(&self, line: &str) {
        if let Some(logs) = &self.logs {
            return logs.own(line.trim_end_matches('\n').as_bytes());
        }
        let target = self.report.borrow().target();
        if let Some(sink) = self.sink(target) {
            sink.own(line.as_bytes());
        }
    }

    async fn to_the_end(
        &self,
        cluster: &Cluster,
        lines: Option<mpsc::Receiver<OutputLine>>,
        observer: impl FnMut(&Event),
    ) -> Verdict {
        let output = self.pass_on(lines);
        let told = async { tokio::join!(self.tell(cluster, observer), cluster.obey_signals()) };
        let (replacing, renewed) = (self.replacing(cluster), self.renew(cluster));
        tokio::pin!(output, told, replacing, renewed);
        let mut output_ended = false;
        loop {
            tokio::select! {
                // First of all signals are obeyed; who reads a line may send one.
                biased;
                _ = &mut told => break,
                () = &mut output, if !output_ended => output_ended = true,
                () = &mut replacing => {}
                () = &mut renewed => {}
                () = self.logs_moved() => self.tell_of_moved_logs(),
                error = self.lost(), if !self.told_lost.get() => self.tell_lost(error),
                () = self.manager.stay_alive(cluster) => {}
            }
        }
        if !output_ended {
            self.last_output(output).await;
        }
        let outcome = cluster.wait().await;
        let verdict = self.ledger.borrow().verdict(&outcome);
        self.last_words(&verdict).await;
        verdict
    }

    /// Tells the end to everybody who is there.
    async fn last_words(&self, verdict: &Verdict) {
        let last = self.report.borrow_mut().end(verdict);
        self.own(&last);
        // A reader that is stuck has been waited for.
        let finish = |sink: &Option<Sink>| sink.as_ref().is_none_or(Sink::finish);
        let _complete = finish(&self.out);
        if let (false, Some(error)) = (self.told_lost.get(), self.out.as_ref().and_then(Sink::loss))
        {
            self.tell_lost(error);
        }
        let _complete = finish(&self.err);
        let _complete = self.logs.as_ref().is_none_or(Writer::finish);
        if let Some(control) = &self.control {
            control.finish(verdict, &json::Json.end(verdict)).await;
        }
    }

    /// Gives the name back. An app that ended in the background by itself leaves word, since nobody saw it.
    fn take_leave(&self, claim: Claim, about: &About, verdict: &Verdict) {
        let as_asked = matches!(verdict.code, Code::Stopped | Code::Forced);
        if as_asked || self.logs.is_none() || self.starter.borrow().waits() {
            return drop(claim);
        }
        let ended = Ended {
            time: clock::now(),
            outcome: verdict.code.row().word.to_owned(),
            exit_code: verdict.code as u8,
            text: verdict.text.clone(),
        };
        // An app that ends in the background had a control socket.
        let started = self.control.as_ref().map(|control| control.book().started());
        claim.leave(&card(about, started.unwrap_or_else(clock::now), Some(ended)));
    }

    /// Waits until standard output takes lines no more.
    async fn lost(&self) -> Errno {
        match &self.out {
            Some(out) => out.lost().await,
            None => std::future::pending().await,
        }
    }

    /// Waits until the folder of the logs is another one.
    async fn logs_moved(&self) {
        match &self.logs {
            Some(logs) => logs.moved().await,
            None => std::future::pending().await,
        }
    }

    /// Tells that somebody removed the folder of the logs.
    fn tell_of_moved_logs(&self) {
        let Some(logs) = &self.logs else { return };
        let path = words::harmless(&logs.folder().path.to_string_lossy());
        let text = format!("the log folder {path} was removed, and is made anew");
        let event = Event::Notice(Notice { code: "log-folder", who: None, text });
        let ledger = self.ledger.borrow();
        if let Some(control) = &self.control {
            control.event(&event, &ledger);
        }
        let lines = self.report.borrow_mut().event(&event, &ledger);
        lines.iter().for_each(|line| self.own(line));
    }

    /// Tells that lines are missing from standard output, once: that is where nobody can see it.
    fn tell_lost(&self, error: Errno) {
        self.told_lost.set(true);
        let what = words::plain(&io::Error::from(error).to_string());
        let line = format!(
            "polyfork: cannot write to standard output: {what}; what does not fit there is lost\n"
        );
        match &self.err {
            Some(sink) => sink.own(line.as_bytes()),
            None => crate::say(io::stderr(), &line),
        }
    }

    /// Waits for output that workers left behind, as long as it comes.
    async fn last_output(&self, mut output: Pin<&mut impl Future<Output = ()>>) {
        loop {
            let before = self.passed_on.get();
            let ended = tokio::time::timeout(LAST_OUTPUT, output.as_mut()).await.is_ok();
            if ended || self.passed_on.get() == before {
                return;
            }
        }
    }

    /// Reloads when files change or it is time to, for ever.
    async fn renew(&self, cluster: &Cluster) {
        let say = |text: &str| {
            let text = words::harmless(text);
            let line = match self.show.json {
                true => json::warning(&text),
                false => format!("polyfork: {text}\n"),
            };
            self.own(&line);
        };
        self.renewal.run(cluster, self.about.logs.as_deref().map(Path::new), say).await;
    }

    /// Turns events into lines until the last one.
    async fn tell(&self, cluster: &Cluster, mut observer: impl FnMut(&Event)) {
        let mut events = cluster.events();
        while let Some(event) = next_or_rest(&mut events).await {
            self.telling.set(true);
            match event {
                Event::SlotFailed { .. } | Event::SlotRests { .. } | Event::ReloadFailed { .. } => {
                    self.last_lines(LAST_LINES).await;
                }
                Event::Exit { voluntary: false, .. } => self.last_lines(LAST_LINES_STEP).await,
                _ => {}
            }
            observer(&event);
            self.manager.event(&event);
            if let (Event::Reloaded(_), Some(live)) = (&event, &self.about.live) {
                live.commit(&self.renewal);
                if let Some(text) = live.left_told() {
                    cluster.remark(Notice { code: "left-as-it-was", who: None, text });
                }
            }
            self.ledger.borrow_mut().event(&event);
            if let Some(control) = &self.control {
                control.event(&event, &self.ledger.borrow());
                if self.logs.is_some() {
                    let starter = &mut *self.starter.borrow_mut();
                    control.tell(starter, &event, &self.ledger.borrow());
                }
            }
            let lines = self.report.borrow_mut().event(&event, &self.ledger.borrow());
            lines.iter().for_each(|line| self.own(line));
            if let Event::End(_) = event {
                return;
            }
            self.telling.set(false);
        }
    }

    /// Lets lines that explain an end come before it is told: for `most` at most, and only while they come.
    async fn last_lines(&self, most: Duration) {
        let mut left = most;
        loop {
            let before = self.passed_on.get();
            tokio::time::sleep(LAST_LINES_STEP).await;
            left = left.saturating_sub(LAST_LINES_STEP);
            if left.is_zero() || self.passed_on.get() == before {
                return;
            }
        }
    }

    /// Turns worker output into lines until no worker can write any more.
    async fn pass_on(&self, lines: Option<mpsc::Receiver<OutputLine>>) {
        let Some(mut lines) = lines else { return };
        while let Some(line) = lines.recv().await {
            self.passing.set(true);
            self.ledger.borrow_mut().line(&line);
            if let (Some(logs), OutputArg::Prefix) = (&self.logs, self.show.output) {
                let source = Source::of(line.worker, line.stream);
                logs.line(line.slot, source, &line.line, line.complete).await;
            } else if self.show.output == OutputArg::Prefix {
                let (target, bytes) = self.report.borrow_mut().output(&line);
                if let Some(sink) = self.sink(target) {
                    sink.line(&bytes).await;
                }
            }
            self.passed_on.set(self.passed_on.get() + 1);
            self.passing.set(!lines.is_empty());
        }
    }
}

/// The next event. When none comes for a while, what the last ones needed is not needed until something happens.
async fn next_or_rest(events: &mut polyfork::cluster::Events) -> Option<Event> {
    match tokio::time::timeout(REST_AFTER, events.next()).await {
        Ok(event) => event,
        Err(_nothing) => {
            polyfork::process::give_back_code();
            events.next().await
        }
    }
}
