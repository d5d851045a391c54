//! What is known about a worker from outside: its stage, its end, and the way to ask it to stop.
//!
//! The rule that surprises: the end is told by the worker's thread itself, as the last thing it does. What the
//! operating system then still tidies up is not waited for, except by `join_blocking`.

use std::collections::HashMap;
use std::fs;
use std::mem;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use polyfork_core::sync::lock;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::direct::Inbox;
use super::exit::{WorkerExit, quietly};

/// Where a worker is in its life.
#[derive(Debug, Clone)]
pub(super) enum Stage {
    Starting,
    Online,
    Ended(WorkerExit),
}

pub(super) struct Control {
    pub(super) id: u64,
    pub(super) name: Option<String>,
    pub(super) stage: watch::Sender<Stage>,
    pub(super) stop: CancellationToken,
    /// Discards what the worker has not received; the other half of asking it to stop.
    pub(super) deafen: Box<dyn Fn() + Send + Sync>,
    /// The kernel's number of the thread.
    pub(super) tid: OnceLock<u32>,
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
    pub(super) inbox: Mutex<Option<Inbox>>,
    referenced: Mutex<Referenced>,
}

/// Whether it is counted among those that the program waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Referenced {
    Yes,
    No,
    Ended,
}

static LIVE: LazyLock<Mutex<HashMap<u64, Arc<Control>>>> = LazyLock::new(Mutex::default);
/// How many live workers are referenced. Changes may overtake one another, so that it is below the truth for a moment.
static REFERENCED: LazyLock<watch::Sender<isize>> = LazyLock::new(|| watch::Sender::new(0));

pub(super) fn find(id: u64) -> Option<Arc<Control>> {
    lock(&LIVE).get(&id).cloned()
}

impl Control {
    pub(super) fn new(
        id: u64,
        name: Option<String>,
        deafen: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        let control = Arc::new(Self {
            id,
            name,
            stage: watch::Sender::new(Stage::Starting),
            stop: CancellationToken::new(),
            deafen,
            tid: OnceLock::new(),
            thread: Mutex::new(None),
            inbox: Mutex::new(None),
            referenced: Mutex::new(Referenced::Yes),
        });
        lock(&LIVE).insert(id, Arc::clone(&control));
        REFERENCED.send_modify(|count| *count += 1);
        control
    }

    /// Tells the end, once. Whoever is told finds everything else done, except that the program may go on waiting for it
    /// for a moment.
    pub(super) fn end(&self, exit: WorkerExit) {
        let known = lock(&LIVE).remove(&self.id);
        let inbox = lock(&self.inbox).take();
        // What waits in it may be anything.
        quietly(|| drop(inbox));
        let was = mem::replace(&mut *lock(&self.referenced), Referenced::Ended);
        // Wakers are foreign code, too.
        quietly(|| drop(self.stage.send_replace(Stage::Ended(exit))));
        if was == Referenced::Yes {
            quietly(|| REFERENCED.send_modify(|count| *count -= 1));
        }
        drop(known);
    }

    pub(super) fn set_referenced(&self, yes: bool) {
        let mut referenced = lock(&self.referenced);
        let new = if yes { Referenced::Yes } else { Referenced::No };
        if *referenced == Referenced::Ended || *referenced == new {
            return;
        }
        *referenced = new;
        drop(referenced);
        REFERENCED.send_modify(|count| *count = if yes { *count + 1 } else { *count - 1 });
    }

    pub(super) fn is_referenced(&self) -> bool {
        *lock(&self.referenced) == Referenced::Yes
    }

    pub(super) fn ask_to_stop(&self) {
        self.stop.cancel();
        (self.deafen)();
    }

    pub(super) fn exit(&self) -> Option<WorkerExit> {
        match &*self.stage.borrow() {
            Stage::Ended(exit) => Some(exit.clone()),
            Stage::Starting | Stage::Online => None,
        }
    }

    pub(super) async fn ended(&self) -> WorkerExit {
        let mut stage = self.stage.subscribe();
        // We hold the sender.
        let stage = stage.wait_for(|stage| matches!(stage, Stage::Ended(_))).await;
        match stage.as_deref() {
            Ok(Stage::Ended(exit)) => exit.clone(),
            _ => unreachable!("waited for the end"),
        }
    }

    /// Until it has begun, or ended without.
    pub(super) async fn begun(&self) {
        let mut stage = self.stage.subscribe();
        let _begun = stage.wait_for(|stage| !matches!(stage, Stage::Starting)).await;
    }

    pub(super) fn cpu_usage(&self) -> Option<CpuUsage> {
        let tid = self.tid.get()?;
        let text = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).ok()?;
        // Its number may be another's by now.
        if self.exit().is_some() {
            return None;
        }
        CpuUsage::parse(&text, rustix::param::clock_ticks_per_second())
    }
}

/// The processor time a worker has used (Node: `worker.cpuUsage()`), as finely as the kernel tells: usually 10 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuUsage {
    /// In its own code.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
}

impl CpuUsage {
    /// What was used since an earlier reading.
    pub fn since(&self, earlier: &CpuUsage) -> CpuUsage {
        CpuUsage {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
        }
    }

    /// Reads `/proc/PID/task/TID/stat`, proc_pid_stat(5): fields 14 and 15.
    fn parse(stat: &str, ticks_per_second: u64) -> Option<Self> {
        // A name may contain blanks and brackets.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace().skip(11);
        let mut next = || -> Option<Duration> {
            let ticks: u64 = fields.next()?.parse().ok()?;
            let nanos = u128::from(ticks) * 1_000_000_000 / u128::from(ticks_per_second.max(1));
            Some(Duration::from_nanos(nanos.try_into().ok()?))
        };
        Some(Self { user: next()?, system: next()? })
    }
}

/// Resolves when no referenced worker runs any more: what Node waits for at the end of a program. A Rust program ends
/// with `main` whoever still runs, so call this last if workers shall finish.
///
/// Dropped handles count as long as their workers run; those without a [reference](super::Worker::unref) do not.
pub async fn workers_ended() {
    let mut referenced = REFERENCED.subscribe();
    // The sender is static.
    let _none = referenced.wait_for(|count| *count <= 0).await;
}

/// [`workers_ended`], blocking the thread.
pub fn workers_ended_blocking() {
    crate::worker_threads::park::block_on(workers_ended());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_whatever_the_name() {
        let stat = "12 (a b) 3 (c)) S 1 2 3 4 5 6 7 8 9 10 250 3 0 0 20";
        let usage = CpuUsage::parse(stat, 100).unwrap();
        assert_eq!(usage.user, Duration::from_millis(2500));
        assert_eq!(usage.system, Duration::from_millis(30));
        for bad in ["", "12 (a", "12 (a) S 1 2", "12 (a) S 1 2 3 4 5 6 7 8 9 10 x y"] {
            assert_eq!(CpuUsage::parse(bad, 100), None, "{bad}");
        }
    }
}
