//! What signals mean to a primary.
//!
//! | signal | meaning |
//! | --- | --- |
//! | TERM, INT | drain: workers finish what they serve; a second one, 100 ms later or more, ends them now |
//! | HUP | reload, as daemons do; where a terminal is attached, which hangs up when it is closed: as TERM |
//! | QUIT | end now |
//! | TTIN, TTOU | one worker more, one less |
//! | PIPE | ignored (Rust's start-up code does it); writes report the error instead |
//! | USR2 | left to the program: the command puts another binary in its place |
//! | CHLD | as PID 1: ended processes that are not ours are reaped |
//!
//! Reference: signal(7).

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Cluster, ReloadOptions};

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    quit: Signal,
    more: Signal,
    fewer: Signal,
    child: Option<Signal>,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let on = |raw| signal(SignalKind::from_raw(raw));
        let child = polyfork_sys::system::is_pid_one().then(|| on(libc::SIGCHLD)).transpose()?;
        Ok(Signals {
            terminate: on(libc::SIGTERM)?,
            interrupt: on(libc::SIGINT)?,
            hang_up: on(libc::SIGHUP)?,
            quit: on(libc::SIGQUIT)?,
            more: on(libc::SIGTTIN)?,
            fewer: on(libc::SIGTTOU)?,
            child,
        })
    }

    /// Signals handled from here on, whoever waits for them later.
    async fn obey(mut self, cluster: &Cluster) {
        let mut stop = Stop { last: None };
        loop {
            tokio::select! {
                _ = self.terminate.recv() => stop.ask(cluster).await,
                _ = self.interrupt.recv() => stop.ask(cluster).await,
                _ = self.hang_up.recv() => hang_up(cluster, &mut stop).await,
                _ = self.quit.recv() => cluster.stop_now().await,
                _ = self.more.recv() => cluster.add_worker().await,
                _ = self.fewer.recv() => cluster.remove_worker().await,
                Some(_) = recv(&mut self.child) => cluster.reap_strangers().await,
            }
        }
    }
}

/// Signals that come together are one wish: `timeout`, npm and terminals send to a process and its group.
const SAME_WISH: Duration = Duration::from_millis(100);

struct Stop {
    last: Option<Instant>,
}

impl Stop {
    async fn ask(&mut self, cluster: &Cluster) {
        let last = self.last.replace(Instant::now());
        if last.is_none_or(|last| last.elapsed() > SAME_WISH) {
            cluster.stop().await;
        }
    }
}

/// Nobody else can tell whether a terminal went away or somebody wants a reload.
async fn hang_up(cluster: &Cluster, stop: &mut Stop) {
    if io::stdin().is_terminal() || io::stdout().is_terminal() || io::stderr().is_terminal() {
        stop.ask(cluster).await;
        return;
    }
    let cluster = cluster.clone();
    tokio::spawn(async move {
        // The events tell what becomes of it.
        let _ = cluster.reload(ReloadOptions::new()).await;
    });
}

async fn recv(signal: &mut Option<Signal>) -> Option<()> {
    match signal {
        Some(signal) => signal.recv().await,
        None => std::future::pending().await,
    }
}

impl Cluster {
    /// Obeys signals until the cluster has ended: TERM and INT let workers finish what they serve, a second one ends
    /// them now, QUIT ends them now, HUP reloads (or, where one of the three standard streams is a terminal, is taken
    /// as TERM: the terminal was closed), TTIN and TTOU mean one worker more or less. As PID 1, orphans are reaped.
    ///
    /// From the first call on, these signals no longer have their default effect on this process.
    pub async fn obey_signals(&self) {
        match Signals::listen() {
            Ok(signals) => {
                tokio::select! {
                    () = signals.obey(self) => {}
                    _ = self.wait() => {}
                }
            }
            // Without signal handling (no descriptors left) the defaults apply.
            Err(_) => {
                self.wait().await;
            }
        }
    }
}
