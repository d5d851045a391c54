//! Finds workers that do not accept what the kernel gave them, and gives it to others.
//!
//! Under the kernel mechanism nobody asks the primary where a connection goes, so a worker whose event loop hangs
//! would keep its share of them for as long as it hangs. This file looks at the queues of their seats now and then
//! and compares: what was there, what came by the turns taken since, what is there now. A queue of which
//! nothing was accepted for the acknowledgement limit belongs to a stuck worker. It loses its turn, and its queue
//! goes to the siblings while the worker stands still (an `accept` in the middle of that would fail).
//!
//! The rule that surprises: a stuck worker has nothing in its queue any more by which it could be seen to be well
//! again. It gets its turns back when its main thread has slept of its own accord since, which a
//! busy loop and a stopped process do not, or when a while has passed, longer each time.
//!
//! Nobody looks while nothing happens: when no turn was taken and no queue holds anything since the last look, the sockets
//! are put into an epoll instance of their own, and the first connection wakes us. It is closed on that, so that the
//! connections that follow cost nothing.
//!
//! A queue that overflows hides how much came; there only a worker that is stopped is recognised.
//!
//! References: epoll(7), tcp(7) `TCP_INFO`, proc(5) (`voluntary_ctxt_switches`), listen(2).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use polyfork_core::{ListenerId, Seat, WorkerId};
use rustix::event::epoll;
use tokio::io::Interest;
use tokio::task::AbortHandle;

use super::ports::{Depths, Ports};
use super::primary::{FromIo, Primary, Timer};
use super::register::register;
use super::to_loop::ToLoop;
use super::upgrade::Moment;

/// Between two looks, at least: each is a system call per seat.
const SHORTEST_LOOK: Duration = Duration::from_millis(5);
/// How long a stuck worker goes without turns at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(16);

/// What is remembered between two looks.
#[derive(Default)]
pub(crate) struct Watch {
    /// When there is no next look: waits for the first connection.
    sleep: Option<Sleep>,
    /// An empty epoll instance for the next sleep, made when the last one ended: so a primary that sleeps has no
    /// descriptor more than one that does not, and needs none to go to sleep.
    spare: Option<OwnedFd>,
    /// A look is planned.
    planned: bool,
    before: BTreeMap<ListenerId, Depths>,
    /// Looks in a row at which nothing of a worker's queue was accepted.
    suspicious: BTreeMap<WorkerId, u32>,
    aside: BTreeMap<WorkerId, Aside>,
    /// Pauses so far of workers that were stuck before.
    pauses: BTreeMap<WorkerId, Duration>,
}

/// Waits for the first connection on any of the sockets that are looked at.
struct Sleep(AbortHandle);

impl Drop for Sleep {
    fn drop(&mut self) {
        // Closes the epoll instance with the task.
        self.0.abort();
    }
}

impl Sleep {
    fn begin(all: OwnedFd, ports: &Ports, io: ToLoop) -> io::Result<Sleep> {
        for socket in ports.sockets_with_turns() {
            // Also tells of what has come before this.
            let (data, flags) = (epoll::EventData::new_u64(0), epoll::EventFlags::IN);
            epoll::add(&all, socket, data, flags)?;
        }
        let all = register(all, Interest::READABLE)?;
        let task = tokio::spawn(async move {
            // An error wakes as well: better a look too many.
            let _ = all.readable().await;
            drop(all);
            // The loop is gone only when the whole primary ends.
            let _ = io.send(FromIo::Stirred).await;
        });
        Ok(Sleep(task.abort_handle()))
    }
}

/// A worker that has lost its turns for now.
struct Aside {
    until: Instant,
    /// Its main thread had slept so often when it was set aside.
    slept: Option<u64>,
}

impl Watch {
    /// The worker is gone.
    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.suspicious.remove(&worker);
        self.aside.remove(&worker);
        self.pauses.remove(&worker);
    }
}

/// Who has lost its turns, as it is carried to the next image of the primary. The looks themselves begin anew.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct WatchState {
    aside: Vec<(WorkerId, Moment, Option<u64>)>,
    pauses: BTreeMap<WorkerId, Duration>,
}

impl Watch {
    pub(crate) fn state(&self) -> WatchState {
        let Watch { sleep: _, spare: _, planned: _, before: _, suspicious: _, aside, pauses } =
            self;
        let aside = aside.iter().map(|(id, aside)| (*id, Moment(aside.until), aside.slept));
        WatchState { aside: aside.collect(), pauses: pauses.clone() }
    }
}

impl WatchState {
    pub(crate) fn back(self) -> Watch {
        let aside =
            |(id, until, slept): (WorkerId, Moment, _)| (id, Aside { until: until.0, slept });
        let aside = self.aside.into_iter().map(aside).collect();
        Watch { aside, pauses: self.pauses, ..Watch::default() }
    }
}

/// Nothing of the queue was accepted between two looks at seat `seat`, as far as it can be known.
fn nothing_accepted(
    before: &Depths,
    now: &Depths,
    seat: u32,
    stopped: impl FnOnce() -> bool,
) -> bool {
    let (Some(was), Some(is)) = (before.queued.get(&seat), now.queued.get(&seat)) else {
        return false;
    };
    if *was == 0 || *is == 0 || before.queued.len() != now.queued.len() {
        return false;
    }
    let came = now.turns.saturating_sub(before.turns) / before.queued.len() as u64;
    u64::from(*was) + came <= u64::from(*is) || stopped()
}

impl Primary {
    /// Something came, or the sockets changed: there is something to look at again.
    pub(crate) fn stirred(&mut self) {
        self.watch.sleep = None;
        if self.watch.spare.is_none() {
            self.watch.spare = empty().ok();
        }
        self.next_look();
    }

    /// Two looks make the acknowledgement limit.
    fn next_look(&mut self) {
        if !std::mem::replace(&mut self.watch.planned, true) {
            let pause = (self.settings.ack_limit / 2).max(SHORTEST_LOOK);
            self.after(pause, Timer::Stuck);
        }
    }

    /// Nothing moves: nothing to look at before something comes.
    fn sleep_until_something_comes(&mut self) {
        if !self.ports.has_turns() {
            return;
        }
        let all = self.watch.spare.take().map_or_else(empty, Ok);
        match all.and_then(|all| Sleep::begin(all, &self.ports, self.io.clone())) {
            Ok(sleep) => self.watch.sleep = Some(sleep),
            // Short of descriptors or memory: look as ever.
            Err(_) => self.next_look(),
        }
    }

    pub(crate) fn look_for_stuck(&mut self) {
        self.watch.planned = false;
        let depths = self.ports.depths();
        let watch = &self.watch;
        let rests = |(port, now): (&ListenerId, &Depths)| {
            let same = watch.before.get(port).is_some_and(|before| before.turns == now.turns);
            same && now.queued.values().all(|queued| *queued == 0)
        };
        if depths.iter().all(rests) && watch.aside.is_empty() && watch.suspicious.is_empty() {
            self.watch.before = depths;
            return self.sleep_until_something_comes();
        }
        self.next_look();
        let mut well: Vec<WorkerId> = self.watch.suspicious.keys().copied().collect();
        let mut stuck = Vec::new();
        for (port, now) in &depths {
            let Some(before) = self.watch.before.get(port) else { continue };
            // With one seat there is nobody to take its turns.
            for (seat, queued) in now.queued.iter().filter(|_| now.queued.len() > 1) {
                let sits = |id: &WorkerId| self.ports.seat(*id) == Some(Seat(*seat));
                let Some((worker, w)) = self.workers.iter().find(|(id, w)| w.admitted && sits(id))
                else {
                    continue;
                };
                let pid = w.running.pid();
                if !nothing_accepted(before, now, *seat, || is_stopped(pid)) {
                    continue;
                }
                well.retain(|other| other != worker);
                let looks = self.watch.suspicious.entry(*worker).or_insert(0);
                *looks += 1;
                if *looks >= 2 {
                    stuck.push((*worker, *queued));
                }
            }
        }
        for worker in well {
            self.watch.suspicious.remove(&worker);
        }
        self.watch.before = depths;
        for (worker, queued) in stuck {
            self.set_aside(worker, queued);
        }
        self.look_after_those_aside();
    }

    /// Takes a worker's turns and its queue.
    fn set_aside(&mut self, worker: WorkerId, queued: u32) {
        self.watch.suspicious.remove(&worker);
        let Some(w) = self.workers.get(&worker) else { return };
        let (who, pid) = (w.who, w.running.pid());
        let pause =
            self.watch.pauses.get(&worker).map_or(FIRST_PAUSE, |last| (*last * 2).min(LAST_PAUSE));
        self.watch.pauses.insert(worker, pause);
        let aside = Aside { until: Instant::now() + pause, slept: sleeps(pid) };
        if self.watch.aside.insert(worker, aside).is_none() {
            let text = format!(
                "it accepts nothing, {queued} connections wait: they and its turns go to other workers until it \
                 is well"
            );
            self.notice("stuck", Some(who), text);
        }
        self.ports.set_aside(worker, true);
        self.refresh_ports();
        self.empty_queue(worker);
    }

    /// Moves what waits for a worker that is stuck.
    pub(crate) fn empty_queue(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get(&worker) else { return };
        let who = w.who;
        let Some(seat) = self.ports.seat(worker) else { return };
        if !self.ports.waits_aside(seat) {
            return;
        }
        let (pidfd, pid) = w.running.process();
        let ports = &mut self.ports;
        let failures = polyfork_sys::steal::while_stopped(pidfd, pid, || ports.rescue_aside(seat));
        let failures = failures.unwrap_or_else(|error| vec![error.to_string()]);
        for failure in failures {
            let text = format!("cannot move what waits for it: {failure}");
            self.notice("stuck", Some(who), text);
        }
    }

    fn look_after_those_aside(&mut self) {
        let aside: Vec<WorkerId> = self.watch.aside.keys().copied().collect();
        for worker in aside {
            let Some((w, aside)) = self.workers.get(&worker).zip(self.watch.aside.get(&worker))
            else {
                self.watch.aside.remove(&worker);
                continue;
            };
            let (who, pid) = (w.who, w.running.pid());
            let slept = aside.slept.zip(sleeps(pid)).is_some_and(|(was, is)| is > was);
            if (slept && !is_stopped(pid)) || Instant::now() >= aside.until {
                self.watch.aside.remove(&worker);
                self.ports.set_aside(worker, false);
                self.refresh_ports();
                if slept {
                    self.watch.pauses.remove(&worker);
                    self.notice(
                        "stuck",
                        Some(who),
                        "it is well again and takes its turns".to_owned(),
                    );
                }
            } else {
                self.empty_queue(worker);
            }
        }
    }
}

fn empty() -> io::Result<OwnedFd> {
    Ok(epoll::create(epoll::CreateFlags::CLOEXEC)?)
}

/// How often the main thread of a process has gone to sleep by itself.
fn sleeps(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
    line.trim().parse().ok()
}

/// Whether a process is stopped (SIGSTOP, a debugger).
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state follows the command, which may contain anything but ends with the last parenthesis.
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['T', 't']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depths(turns: u64, queued: [u32; 2]) -> Depths {
        Depths { turns, queued: (1..).zip(queued).collect() }
    }

    #[test]
    fn a_queue_that_only_grows_is_stuck_and_one_that_moves_is_not() {
        let stuck = |before, now| nothing_accepted(&before, &now, 1, || false);
        assert!(stuck(depths(10, [3, 0]), depths(10, [3, 0])), "nothing came, nothing went");
        assert!(stuck(depths(10, [3, 0]), depths(30, [13, 0])), "all that came is there");
        assert!(!stuck(depths(10, [3, 0]), depths(30, [12, 0])), "one was accepted");
        assert!(!stuck(depths(10, [0, 0]), depths(30, [10, 0])), "they may have come just now");
        assert!(!stuck(depths(10, [3, 0]), depths(10, [0, 0])));
    }

    #[test]
    fn what_this_process_does_can_be_seen() {
        let me = std::process::id();
        assert!(!is_stopped(me));
        let before = sleeps(me);
        assert!(before.is_some());
        assert_eq!(sleeps(0), None);
    }
}
