//! What the primary tells its own service manager: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, and the sockets of `LISTEN_FDS`. What
//! the manager holds for it is in `manager/store`.
//!
//! | when | what |
//! | --- | --- |
//! | every slot has a ready worker, or was given up while others serve | `READY=1`, `MAINPID=` |
//! | a reload begins | `RELOADING=1`, `MONOTONIC_USEC=` |
//! | it is over, well or not | `READY=1` |
//! | the number of ready workers changes | `STATUS=` |
//! | it stops | `STOPPING=1` |
//! | twice in each `WATCHDOG_USEC` | `WATCHDOG=1`, once the loop that owns the workers has answered |
//!
//! Nothing is allocated, and nothing wakes up, where there is no manager. Workers have sockets of their own: what they tell
//! goes to the primary and no further.
//!
//! The surprising rule: a manager that does not listen is no reason to stop serving. What cannot be told at once is dropped;
//! the next message tells the state anew.
//!
//! References: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

mod store;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use polyfork::cluster::{Cluster, Event};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub(crate) use store::{store, with_store};

/// The first descriptor of `LISTEN_FDS`.
const FIRST: i32 = 3;
/// More sockets than anybody passes on.
const MOST_SOCKETS: i32 = 1024;
/// A watchdog that would have us run all the time is told at most so often.
const SHORTEST: Duration = Duration::from_millis(10);

/// The way to the service manager; nothing when there is none.
#[derive(Debug, Default)]
pub(crate) struct Manager(Option<Inner>);

#[derive(Debug)]
struct Inner {
    socket: OwnedFd,
    address: SocketAddrUnix,
    watchdog: Option<Duration>,
    seen: RefCell<Seen>,
}

/// What happened so far, as far as a manager wants to know.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    wanted: u32,
    ready: BTreeSet<(u32, u64)>,
    failed: BTreeSet<u32>,
    /// Their workers have done their work.
    at_rest: BTreeSet<u32>,
    told_ready: bool,
    reloading: bool,
    stopping: bool,
    status: String,
}

impl Manager {
    /// Finds the way in the environment. One that cannot be used is none, and gives a warning.
    pub(crate) fn take() -> (Manager, Option<String>) {
        let Some(place) = std::env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty())
        else {
            return (Manager::default(), None);
        };
        match connect(&place) {
            Ok((socket, address)) => {
                let watchdog = watchdog();
                let seen = RefCell::default();
                (Manager(Some(Inner { socket, address, watchdog, seen })), None)
            }
            Err(error) => {
                let what = crate::words::plain(&error.to_string());
                let text = format!(
                    "NOTIFY_SOCKET cannot be used ({what}): nobody is told when it is ready"
                );
                (Manager::default(), Some(text))
            }
        }
    }

    /// What it was told so far, for the next image of this process; the way to it is found again.
    pub(crate) fn seen(&self) -> Option<Seen> {
        self.0.as_ref().map(|inner| inner.seen.borrow().clone())
    }

    /// Goes on telling where the image before this one has stopped.
    pub(crate) fn back(seen: Option<Seen>) -> Manager {
        let Some(seen) = seen else { return Manager::default() };
        // What was usable and is so no more is no reason to stop serving.
        let (manager, _warning) = Manager::take();
        if let Some(inner) = &manager.0 {
            *inner.seen.borrow_mut() = seen;
        }
        manager
    }

    /// Tells what an event means to the manager.
    pub(crate) fn event(&self, event: &Event) {
        let Some(inner) = &self.0 else { return };
        let text = inner.seen.borrow_mut().event(event);
        if !text.is_empty() {
            inner.tell(&text);
        }
    }

    /// Gives signs of life as long as the cluster answers; for ever, if none are wanted.
    pub(crate) async fn stay_alive(&self, cluster: &Cluster) {
        let Some((inner, limit)) = self.0.as_ref().and_then(|inner| Some((inner, inner.watchdog?)))
        else {
            return std::future::pending().await;
        };
        let pause = (limit / 2).max(SHORTEST);
        loop {
            // A loop that hangs does not answer, and then the manager is not told that all is well.
            cluster.status().await;
            inner.tell("WATCHDOG=1");
            tokio::time::sleep(pause).await;
        }
    }
}

impl Inner {
    fn tell(&self, text: &str) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // See above: it is told anew.
        let _ = rustix::net::sendto(&self.socket, text.as_bytes(), flags, &self.address);
    }
}

impl Seen {
    fn event(&mut self, event: &Event) -> String {
        let mut text = String::new();
        match event {
            Event::Setup { workers, .. } => self.wanted = *workers,
            Event::AllReady { workers } => {
                self.wanted = *workers;
                self.failed.clear();
                self.at_rest.clear();
            }
            Event::Ready(who) => {
                self.ready.insert((who.slot, who.worker));
                self.failed.remove(&who.slot);
                self.at_rest.remove(&who.slot);
            }
            Event::Draining(who) | Event::Exit { who, .. } => {
                self.ready.remove(&(who.slot, who.worker));
            }
            Event::SlotFailed { slot, .. } => drop(self.failed.insert(*slot)),
            Event::SlotRests { slot, .. } => drop(self.at_rest.insert(*slot)),
            Event::Reloading { .. } => {
                self.reloading = true;
                text.push_str("RELOADING=1\n");
                // Writing to a String cannot fail.
                let _ = writeln!(text, "MONOTONIC_USEC={}", monotonic_usec());
            }
            Event::Reloaded(_) | Event::ReloadFailed { .. } => {
                if std::mem::take(&mut self.reloading) {
                    text.push_str("READY=1\n");
                }
            }
            Event::Stopping => {
                self.stopping = true;
                text.push_str("STOPPING=1\n");
            }
            _ => return text,
        }
        if !self.told_ready && self.is_up() {
            self.told_ready = true;
            // Writing to a String cannot fail.
            let _ = writeln!(text, "READY=1\nMAINPID={}", std::process::id());
        }
        let status = self.status();
        if status != self.status {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "STATUS={status}");
            self.status = status;
        }
        text
    }

    fn slots(&self) -> usize {
        self.ready.iter().map(|(slot, _)| slot).collect::<BTreeSet<_>>().len()
    }

    fn is_up(&self) -> bool {
        let ready = self.slots();
        let others = self.failed.union(&self.at_rest);
        let others = others.filter(|slot| !self.ready.iter().any(|(s, _)| s == *slot));
        ready + self.at_rest.len() > 0 && ready + others.count() >= self.wanted as usize
    }

    fn status(&self) -> String {
        let counts = format!("{} of {} workers ready", self.slots(), self.wanted);
        match (self.stopping, self.reloading) {
            (true, _) => format!("stopping; {counts}"),
            (false, true) => format!("reloading; {counts}"),
            (false, false) => counts,
        }
    }
}

fn monotonic_usec() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0) / 1000)
}

fn connect(place: &OsString) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let address = match place.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name)?,
        Some((b'/', _)) => SocketAddrUnix::new(Path::new(place))?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "no path and no @NAME")),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    Ok((socket, address))
}

/// How long the manager waits between two signs of life, if it wants any from this very process.
fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC").filter(|usec| *usec > 0).map(Duration::from_micros)
}

/// The listening sockets that this process was given (`LISTEN_FDS`), if they are meant for it. Without a `LISTEN_PID` they
/// are not, as for sd_listen_fds(3): the variable may have come a long way. What it had the manager hold is not among them.
pub(crate) fn sockets() -> Vec<i32> {
    let kept = store::kept();
    given().into_iter().filter(|number| !kept.iter().any(|(_, kept)| kept == number)).collect()
}

/// All descriptors of `LISTEN_FDS`.
fn given() -> Vec<i32> {
    let number = |name| std::env::var(name).ok()?.parse::<i32>().ok();
    if number("LISTEN_PID").and_then(|pid| u32::try_from(pid).ok()) != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, MOST_SOCKETS);
    (FIRST..FIRST + count).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use polyfork::cluster::{Dialect, Event, Who};

    use super::*;

    fn who(slot: u32, worker: u64) -> Who {
        Who { slot, worker, pid: 0 }
    }

    fn after(seen: &mut Seen, events: &[Event]) -> String {
        events.iter().map(|event| seen.event(event)).collect()
    }

    #[test]
    fn it_is_ready_when_every_slot_is_or_was_given_up() {
        let mut seen = Seen::default();
        let setup = Event::Setup { workers: 2, dialect: Dialect::Node };
        let told = after(&mut seen, &[setup, Event::Ready(who(1, 1))]);
        assert!(!told.contains("READY=1"), "{told}");
        assert!(told.contains("STATUS=1 of 2 workers ready"), "{told}");
        let given_up = Event::SlotFailed { slot: 2, restarts: 5, window: Duration::ZERO };
        let told = after(&mut seen, &[given_up]);
        assert!(told.starts_with("READY=1\nMAINPID="), "{told}");
        // Once.
        assert!(!after(&mut seen, &[Event::Ready(who(2, 9))]).contains("READY=1"));
    }

    #[test]
    fn without_any_ready_worker_it_is_never_ready() {
        let mut seen = Seen::default();
        let failed = Event::SlotFailed { slot: 1, restarts: 5, window: Duration::ZERO };
        let setup = Event::Setup { workers: 1, dialect: Dialect::Node };
        assert!(!after(&mut seen, &[setup, failed]).contains("READY=1"));
    }

    #[test]
    fn a_slot_whose_work_is_done_keeps_nothing_from_being_ready() {
        let mut seen = Seen::default();
        let setup = Event::Setup { workers: 1, dialect: Dialect::Node };
        let done = Event::SlotRests { slot: 1, code: Some(0), signal: None };
        assert!(after(&mut seen, &[setup, done]).contains("READY=1"));
    }

    #[test]
    fn a_reload_and_the_end_are_told_with_the_state() {
        let mut seen = Seen::default();
        let setup = Event::Setup { workers: 1, dialect: Dialect::Node };
        after(&mut seen, &[setup, Event::Ready(who(1, 1))]);
        let told = after(&mut seen, &[Event::Reloading { generation: 2 }]);
        assert!(told.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{told}");
        assert!(told.ends_with("STATUS=reloading; 1 of 1 workers ready\n"), "{told}");
        assert_eq!(
            after(&mut seen, &[Event::Stopping]),
            "STOPPING=1\nSTATUS=stopping; 1 of 1 workers ready\n"
        );
    }
}
