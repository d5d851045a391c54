//! Reloads that nobody asked for by hand: at certain times, and when files change.
//!
//! `cron` says when it is time, `watch` when something changed; here both become reloads, one at a time. A reload that fails
//! leaves what runs as it is, and the next change tries again.
//!
//! The surprising rule: a change that comes while a reload is under way leads to another one afterwards, for nobody knows
//! whether the new workers had read the file before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polyfork::cluster::{Cluster, ReloadError, ReloadOptions};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::cron::{Clock, Cron};
use super::watch::{Watcher, Wish};
use crate::args::run::RunArgs;
use crate::words;

/// Before a reload that was refused because another one is under way is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(250);

/// When an app renews itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Times {
    cron: Option<Cron>,
    wish: Option<Wish>,
}

impl Times {
    pub(crate) fn of(args: &RunArgs) -> Times {
        let renew = &args.renew;
        let here = std::env::current_dir().unwrap_or_default();
        let cwd = here.join(args.cwd.as_deref().unwrap_or(std::path::Path::new("")));
        let paths: Vec<_> = renew.watch.iter().map(|path| cwd.join(path)).collect();
        let paths: Vec<_> = paths.iter().map(|path| path.components().collect()).collect();
        let wish = (!paths.is_empty()).then(|| Wish {
            paths,
            ignore: renew.watch_ignore.clone(),
            never: Vec::new(),
            delay: renew.watch_delay,
        });
        Times { cron: renew.reload_at.clone(), wish }
    }

    fn is_never(&self) -> bool {
        self.cron.is_none() && self.wish.is_none()
    }
}

/// When an app renews itself, which a reload can change.
#[derive(Debug, Clone, Default)]
pub(crate) struct Renewal {
    times: Arc<watch::Sender<Times>>,
    /// Something that is watched has changed, and the reload for it has not begun.
    seen: Arc<AtomicBool>,
}

impl Renewal {
    pub(crate) fn of(args: &RunArgs) -> Renewal {
        Renewal::at(Times::of(args), false)
    }

    /// At times that another image of this process followed.
    pub(crate) fn at(times: Times, seen: bool) -> Renewal {
        let times = Arc::new(watch::Sender::new(times));
        Renewal { times, seen: Arc::new(AtomicBool::new(seen)) }
    }

    /// Whether a change waits for its reload.
    pub(crate) fn has_seen(&self) -> bool {
        self.seen.load(Ordering::Relaxed)
    }

    /// When that is by now.
    pub(crate) fn times(&self) -> Times {
        self.times.borrow().clone()
    }

    /// Other times from now on.
    pub(crate) fn set(&self, times: Times) {
        self.times.send_if_modified(|now| {
            let differs = *now != times;
            *now = times;
            differs
        });
    }

    /// Reloads whenever it is time, for ever. `say` tells people; `logs` is a folder in which changes are our own.
    pub(crate) async fn run(
        &self,
        cluster: &Cluster,
        logs: Option<&std::path::Path>,
        say: impl Fn(&str),
    ) {
        let mut changed = self.times.subscribe();
        loop {
            let mut times = changed.borrow_and_update().clone();
            if let (Some(wish), Some(logs)) = (&mut times.wish, logs) {
                wish.never.push(logs.to_owned());
            }
            tokio::select! {
                () = follow(times, &self.seen, cluster, &say) => {}
                changed = changed.changed() => {
                    if changed.is_err() {
                        return std::future::pending().await;
                    }
                }
            }
        }
    }
}

/// Follows one set of times, until they are others.
async fn follow(times: Times, seen: &Arc<AtomicBool>, cluster: &Cluster, say: &impl Fn(&str)) {
    if times.is_never() {
        return std::future::pending().await;
    }
    let clock = times.cron.as_ref().map(|_| Clock::new());
    let clock = clock.and_then(|clock| clock.map_err(|e| say(&trouble("reload_at", &e))).ok());
    let watcher = times.wish.map(|wish| Watcher::new(wish, Arc::clone(seen)));
    let mut watcher = watcher.and_then(|made| made.map_err(|e| say(&trouble("watch", &e))).ok());
    for text in watcher.iter_mut().flat_map(|watcher| std::mem::take(&mut watcher.trouble)) {
        say(&text);
    }
    loop {
        let timed = async {
            match (&clock, &times.cron) {
                (Some(clock), Some(cron)) => clock.until(cron).await,
                _ => std::future::pending().await,
            }
        };
        let changed = async {
            match &mut watcher {
                Some(watcher) => watcher.changed().await,
                None => std::future::pending().await,
            }
        };
        let why = tokio::select! {
            () = timed => match &times.cron {
                Some(cron) => format!("it is time ({cron}): reloading"),
                None => continue,
            },
            path = changed => match path {
                Ok(path) => format!("{} changed: reloading", path.display()),
                Err(error) => {
                    say(&trouble("watch", &error));
                    watcher = None;
                    continue;
                }
            },
        };
        say(&why);
        seen.store(false, Ordering::Relaxed);
        reload(cluster).await;
    }
}

/// One reload; its events tell what becomes of it.
async fn reload(cluster: &Cluster) {
    while let Err(ReloadError::Busy { .. }) = cluster.reload(ReloadOptions::new()).await {
        tokio::time::sleep(BUSY_PAUSE).await;
    }
}

fn trouble(what: &str, error: &std::io::Error) -> String {
    format!("{what} has no effect: {}", words::plain(&error.to_string()))
}
