//! A running app gives its place to another binary: who may ask, what has to come to rest, and who is told.
//!
//! The steps are those of [`crate::upgrade`]; here they meet what this process has: events that are being told, lines
//! that are being written, clients.
//!
//! The surprising rule: [`Watch::replace`] returns only when it failed. Everything goes on then as if it had not been tried, and
//! whoever asked is told why. When it works, the answer comes from the next image ([`Watch::took_over`]).

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use polyfork::cluster::upgrade::{self as library, Frozen, Moment, Packing};
use polyfork::cluster::{Cluster, Notice};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::{After, Watch};
use crate::config::live::Live;
use crate::control::protocol::{self, Refusal};
use crate::control::server::{Control, Rested, Wish};
use crate::exit::Code;
use crate::metrics::server::Serving;
use crate::upgrade::secrets::Secrets;
use crate::upgrade::state::{AppState, BackgroundState};
use crate::upgrade::trial::Trial;
use crate::upgrade::{self, LAST_SIGNALS, REST_LIMIT, TRIAL_LIMIT, TRIES};
use crate::words;

/// Between two looks at whether everything is written.
const STEP: Duration = Duration::from_millis(1);

/// What whoever asked is told by the new image.
#[derive(Serialize)]
struct Replaced<'a> {
    /// Releases.
    from: &'a str,
    to: &'static str,
    workers: usize,
    descriptors: usize,
    /// How long nothing was decided.
    pause_ms: u128,
    took_ms: u128,
    text: &'a str,
}

/// Why this process was not replaced.
enum Not {
    /// Something was asked of the cluster in the last moment: worth another try.
    Asked,
    /// For people.
    Failed(String),
}

impl<T: Into<String>> From<T> for Not {
    fn from(text: T) -> Not {
        Not::Failed(text.into())
    }
}

/// The binary that is to be next.
struct Next<'a> {
    binary: OwnedFd,
    path: &'a Path,
    /// The process of its trial.
    trial: u32,
    asker: Option<&'a Rested>,
    began: Instant,
}

/// A cluster that rests as long as this lives.
struct Rest {
    frozen: Frozen,
    since: Instant,
}

impl Rest {
    async fn of(cluster: &Cluster) -> Result<Rest, String> {
        let frozen = cluster.freeze(Packing::new()).await;
        let frozen = frozen.map_err(|error| words::plain(&error.to_string()))?;
        Ok(Rest { frozen, since: Instant::now() })
    }
}

/// What rests goes on when this is dropped: the cluster first.
struct AtRest<'a> {
    control: Option<&'a Control>,
    serving: Option<&'a Serving>,
    cluster: Option<Rest>,
}

impl Drop for AtRest<'_> {
    fn drop(&mut self) {
        self.cluster = None;
        if let Some(control) = self.control {
            control.go_on();
        }
        if let Some(serving) = self.serving {
            serving.go_on();
        }
    }
}

impl Watch {
    /// Fulfils wishes for another binary. Never returns.
    pub(super) async fn replacing(&self, cluster: &Cluster) {
        let Some(own) = self.binary.clone() else { return std::future::pending().await };
        let mut wishes = self.wishes.borrow_mut().take();
        // Without descriptors for it, the signal has its default effect.
        let mut asked = signal(SignalKind::user_defined2()).ok();
        if let Some(after) = self.after.take() {
            self.took_over(cluster, after).await;
        }
        loop {
            let wish = tokio::select! {
                Some(wish) = next(&mut wishes) => wish,
                () = signalled(&mut asked) => match self.begin() {
                    Ok(()) => Wish { binary: own.clone(), limit: None, asker: None },
                    Err(refusal) => {
                        let text = format!("not upgraded: {}", refusal.text);
                        remark(cluster, "upgrade-failed", text);
                        continue;
                    }
                },
            };
            let Wish { binary, limit, mut asker } = wish;
            let limit = limit.unwrap_or(TRIAL_LIMIT);
            let Err(why) = self.replace(cluster, &binary, limit, &mut asker).await;
            self.stays(cluster, why, asker);
        }
    }

    fn begin(&self) -> Result<(), Refusal> {
        self.control.as_ref().map_or(Ok(()), Control::begin_upgrade)
    }

    /// This binary stays, for this reason.
    fn stays(&self, cluster: &Cluster, why: String, asker: Option<Rested>) {
        remark(
            cluster,
            "upgrade-failed",
            format!("not upgraded: {why}; the binary before goes on"),
        );
        let Some(control) = &self.control else { return };
        control.end_upgrade();
        if let Some(asker) = asker {
            let text = format!("{why}; nothing has changed");
            let refusal = Refusal { word: "upgrade_failed", code: Code::Refused, text };
            control.answer(asker, protocol::not_done(&refusal));
        }
    }

    /// Puts the binary in the place of this process, or says why that was not done.
    async fn replace(
        &self,
        cluster: &Cluster,
        path: &Path,
        limit: Duration,
        asker: &mut Option<Rested>,
    ) -> Result<Infallible, String> {
        let began = Instant::now();
        let binary = upgrade::open_binary(path)?;
        let settings =
            cluster.settings().await.map_err(|error| words::plain(&error.to_string()))?;
        let mut trial = Trial::start(&binary, path, limit, Secrets::of(&settings))?;
        let next = Next { binary, path, trial: trial.pid(), asker: asker.as_ref(), began };
        let Err(why) = self.with_trial(cluster, &next, &mut trial).await;
        trial.end().await;
        Err(why)
    }

    async fn with_trial(
        &self,
        cluster: &Cluster,
        next: &Next<'_>,
        trial: &mut Trial,
    ) -> Result<Infallible, String> {
        let rehearsed = self.write(&mut Rest::of(cluster).await?, next)?.1;
        trial.reads(&rehearsed).await?;
        drop(rehearsed);
        for _ in 0..TRIES {
            match self.leave(cluster, next, trial).await {
                Err(Not::Failed(why)) => return Err(why),
                Err(Not::Asked) => tokio::time::sleep(STEP).await,
                Ok(never) => match never {},
            }
        }
        Err("it is asked for other things all the time".to_owned())
    }

    /// The last step.
    async fn leave(
        &self,
        cluster: &Cluster,
        next: &Next<'_>,
        trial: &mut Trial,
    ) -> Result<Infallible, Not> {
        let (control, serving) = (self.control.as_ref(), self.serving.as_ref());
        let mut at_rest = AtRest { control, serving, cluster: None };
        if let Some(control) = &self.control {
            control.rest(REST_LIMIT).await?;
        }
        if let Some(serving) = &self.serving {
            serving.rest(REST_LIMIT).await;
        }
        let rest = at_rest.cluster.insert(Rest::of(cluster).await?);
        let settled = tokio::time::timeout(REST_LIMIT, self.settled(cluster)).await;
        if let Some(control) = &self.control {
            control.rest_all(REST_LIMIT).await?;
        }
        if settled.is_err() {
            return Err("what workers wrote is not taken by who reads it, or by the disk".into());
        }
        let (list, sealed) = self.write(rest, next)?;
        trial.again(REST_LIMIT);
        trial.reads(&sealed).await?;
        let held = library::hold_signals().map_err(|error| words::plain(&error.to_string()))?;
        // What came before has been told to the cluster then, and shows.
        tokio::time::sleep(LAST_SIGNALS).await;
        if cluster.is_asked() || !self.is_settled(cluster) {
            return Err(Not::Asked);
        }
        let error = upgrade::exec(&next.binary, &sealed, &list);
        drop(held);
        Err(format!("it cannot be executed: {}", words::plain(&error.to_string())).into())
    }

    /// Returns when everything that was told is written.
    async fn settled(&self, cluster: &Cluster) {
        loop {
            // Who tells and who passes on have their turn before we look.
            tokio::time::sleep(STEP).await;
            if self.is_settled(cluster) {
                return;
            }
        }
    }

    fn is_settled(&self, cluster: &Cluster) -> bool {
        let sinks = [&self.out, &self.err];
        cluster.untold() == 0
            && !self.telling.get()
            && !self.passing.get()
            && self.logs.as_ref().is_none_or(|logs| logs.is_written())
            && sinks.into_iter().flatten().all(|sink| sink.is_written())
    }

    /// Writes down everything: the list of descriptors, and the sealed state.
    fn write(
        &self,
        rest: &mut Rest,
        next: &Next<'_>,
    ) -> Result<(library::Descriptors, Vec<u8>), String> {
        let Rest { frozen, since } = rest;
        let told = |error: std::io::Error| words::plain(&error.to_string());
        let mut packing = std::mem::take(&mut frozen.packing);
        let packs = &mut packing;
        let claim = self.claim.borrow();
        let claim = claim.as_ref().map(|claim| claim.pack(packs)).transpose().map_err(told)?;
        let control = self.control.as_ref().map(|control| control.pack(next.asker, packs));
        let control = control.transpose().map_err(told)?;
        let background = match &self.logs {
            None => None,
            Some(logs) => {
                let folder = logs.folder();
                Some(BackgroundState {
                    starter: self.starter.borrow().pack(packs).map_err(told)?,
                    logs: packs.name(folder.as_fd()).map_err(told)?,
                    logs_path: folder.path.clone(),
                    format: logs.how().0,
                    rotation: logs.how().1,
                    lost: logs.lost(),
                })
            }
        };
        let metrics = self.serving.as_ref().map(|serving| serving.pack(packs));
        let metrics = metrics.transpose().map_err(told)?;
        let ledger = self.ledger.borrow();
        let state = AppState {
            descriptors: packing.finish(),
            polyfork: env!("CARGO_PKG_VERSION").to_owned(),
            binary: PathBuf::from(next.path),
            began: Moment(next.began),
            rests: Moment(*since),
            trial: next.trial,
            cluster: std::mem::take(&mut frozen.state),
            name: self.about.name.clone(),
            workers: self.workers,
            about: self.about.clone(),
            claim,
            control,
            background,
            ledger: ledger.clone(),
            told_lost: self.told_lost.get(),
            show: self.show,
            live: self.about.live.as_ref().map(Live::state),
            times: self.renewal.times(),
            change_seen: self.renewal.has_seen(),
            manager: self.manager.seen(),
            metrics,
            keeps_rights: upgrade::would_lose_rights(),
        };
        let sealed = state.seal()?;
        Ok((state.descriptors, sealed))
    }

    /// This image runs in the place of another: signals come in again, and whoever asked is told.
    async fn took_over(&self, cluster: &Cluster, after: After) {
        // They are obeyed by now: who obeys them had its turn first.
        if let Err(error) = library::release_signals() {
            remark(cluster, "signals", format!("signals are not let in: {error}"));
        }
        let After { from, began, rested, trial, descriptors, asker, back } = after;
        let pause = rested.elapsed();
        tokio::spawn(async move {
            // It ends when it sees that we run. If it is not there, so much the better.
            let _ = library::collect(trial).await;
        });
        if let Some(why) = back {
            return self.stays(cluster, why, asker);
        }
        let workers = cluster.status().await.len();
        let to = env!("CARGO_PKG_VERSION");
        let plural = if workers == 1 { "worker" } else { "workers" };
        let text = format!(
            "upgraded from {from} to {to}: {workers} {plural} kept, {descriptors} descriptors; nothing was decided for {} ms",
            pause.as_millis()
        );
        remark(cluster, "upgraded", text.clone());
        if let (Some(control), Some(asker)) = (&self.control, asker) {
            let (pause_ms, took_ms) = (pause.as_millis(), began.elapsed().as_millis());
            let from = from.as_str();
            let replaced =
                Replaced { from, to, workers, descriptors, pause_ms, took_ms, text: &text };
            control.answer(asker, protocol::done(&replaced));
        }
        polyfork::process::give_back_code();
    }
}

async fn next(wishes: &mut Option<mpsc::Receiver<Wish>>) -> Option<Wish> {
    match wishes {
        Some(wishes) => wishes.recv().await,
        None => std::future::pending().await,
    }
}

async fn signalled(signal: &mut Option<tokio::signal::unix::Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

fn remark(cluster: &Cluster, code: &'static str, text: String) {
    cluster.remark(Notice { code, who: None, text });
}
