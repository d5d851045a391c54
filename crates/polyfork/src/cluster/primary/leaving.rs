//! A worker from the moment that it gets no more until nothing is left of it, and the end of all of them.
//!
//! Why one has to go is decided elsewhere; who gets its slot is, too.
//!
//! The rule that surprises: a process that has ended is not gone yet. What it wrote before is read first, for it may
//! say who gets a connection.

use std::time::{Duration, Instant};

use polyfork_core::{Exit, Input, Outcome as Ended, Reason, SlotId, WorkerId};
use polyfork_sys::system::LimitGroup;
use polyfork_wire::ProtocolError;

use super::{Primary, Timer};
use crate::cluster::SendError;
use crate::cluster::event::{Event, Outcome, Who};
use crate::cluster::outgoing::Outgoing;
use crate::cluster::settings::{Dialect, StopBy};

/// How often a queue that should run dry is looked at.
const DRAIN_CHECK: Duration = Duration::from_millis(4);
/// How long, at most and within the grace period, a stop waits for sockets that workers share to run dry.
const DOORS_LIMIT: Duration = Duration::from_secs(5);
/// How long the answer to a worker's good-bye is held back when it has been asked to go as well.
const GOODBYE_PAUSE: Duration = Duration::from_millis(200);
/// A process whose channel closed is ending by itself, as a rule, and seen to have ended within this.
const ENDING: Duration = Duration::from_millis(250);

impl Primary {
    pub(super) fn suspend(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        let was_admitted = std::mem::replace(&mut w.admitted, false);
        let who = w.who;
        // Its grace period is its limit now.
        self.watchdog.forget(worker);
        self.ports.suspend(worker);
        self.refresh_ports();
        if was_admitted {
            self.emit(Event::Draining(who));
            self.note_not_all_ready();
        }
        self.check_drained(worker);
    }

    /// Stops, or goes on stopping, with another grace period than it was started with.
    pub(super) fn stop_within(&mut self, grace: Duration) {
        self.settings.grace = grace;
        self.feed(Input::Grace { grace });
        if !std::mem::replace(&mut self.stopping, true) {
            self.emit(Event::Stopping);
            self.close_doors();
        }
    }

    /// The cluster stops. Who is in the queue by now is served; who comes later meets a closed port, not a queue
    /// that nobody empties.
    pub(super) fn close_doors(&mut self) {
        self.closing_doors = Some(Instant::now());
        for failure in self.ports.refuse_new() {
            self.notice("stopping", None, failure);
        }
        self.check_doors();
    }

    /// As long as workers are admitted, they take what waits on sockets that are not one slot's own.
    pub(super) fn check_doors(&mut self) {
        let Some(since) = self.closing_doors else { return };
        let limit = self.settings.grace.min(DOORS_LIMIT);
        let nobody = self.workers.values().all(|w| !w.admitted);
        if nobody || self.ports.is_dry() || since.elapsed() >= limit {
            self.closing_doors = None;
            self.feed(Input::Stop);
        } else {
            self.after(DRAIN_CHECK, Timer::Doors);
        }
    }

    /// What waited for a suspended worker has been taken by it: it can be asked to stop without loss.
    pub(super) fn check_drained(&mut self, worker: WorkerId) {
        if !self.workers.contains_key(&worker) {
            return;
        }
        if self.ports.is_quiet(worker) {
            self.acknowledge_leaving(worker);
            self.feed(Input::Drained { worker });
        } else {
            self.rescue_from_silent(worker);
            self.after(DRAIN_CHECK, Timer::Drained(worker));
        }
    }

    pub(super) fn tell_stop(&mut self, worker: WorkerId, grace: Duration) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        // One that said it is going needs no telling; a second word would cut its connections.
        if std::mem::replace(&mut w.leaving, true) {
            return;
        }
        let (has_channel, prefixed) = (!w.channel_ended, w.prefixed);
        match (w.stop_by, self.detected.dialect) {
            (StopBy::Signal(signal), _) => self.signal(worker, signal),
            (StopBy::Message, Dialect::Node) if has_channel => self.say_shutdown(worker),
            // Bun closes its channel on `disconnect` and goes on serving: it is asked as any other program is.
            (_, Dialect::Node) if has_channel && !prefixed => self.tell_node_stop(worker),
            (_, Dialect::Native) if has_channel => self.tell_native_stop(worker, grace),
            _ => self.signal(worker, libc::SIGTERM),
        }
        if self.stopping && self.workers.values().all(|w| w.leaving) {
            self.ports.close_all();
        }
    }

    /// PM2's way: the program is told, and does the rest.
    fn say_shutdown(&mut self, worker: WorkerId) {
        let message = Outgoing::new("shutdown", None, &self.spoken);
        if self.push_message(worker, &message).is_err() {
            self.signal(worker, libc::SIGTERM);
        }
        self.refresh_ports();
    }

    pub(super) fn signal(&mut self, worker: WorkerId, signal: i32) {
        let Some(w) = self.workers.get(&worker) else { return };
        if let Err(error) = w.running.signal(signal) {
            let who = w.who;
            self.notice("signal", Some(who), format!("cannot send signal {signal}: {error}"));
        }
    }

    pub(super) fn on_exited(
        &mut self,
        worker: WorkerId,
        status: std::io::Result<std::process::ExitStatus>,
        cpu: Option<Duration>,
    ) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.status = Some(status);
        w.running.link.process_ended();
        self.tally.used(w.who.slot, cpu.unwrap_or_default());
        self.settle(worker);
    }

    pub(super) fn on_channel_end(&mut self, worker: WorkerId, fault: Option<ProtocolError>) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.channel_ended = true;
        match fault {
            Some(fault) => self.protocol_fault(worker, &fault.to_string()),
            None => self.told_disconnect(worker),
        }
        self.settle(worker);
    }

    /// Node's `disconnect`, once.
    pub(super) fn told_disconnect(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.disconnected, true) {
            return;
        }
        let (who, alive, leaving) = (w.who, w.status.is_none(), w.leaving);
        for waiting in w.waiting_senders.drain(..) {
            // The sender may have given up.
            let _ = waiting.send(Err(SendError::Disconnected.into()));
        }
        self.emit(Event::Disconnect(who));
        // The channel of a worker that just ends closes a moment before its end is seen.
        if alive && !leaving {
            self.after(ENDING, Timer::StillThere(worker));
        }
    }

    pub(crate) fn answer_goodbye_later(&mut self, worker: WorkerId, seq: u64) {
        self.after(GOODBYE_PAUSE, Timer::Goodbye(worker, seq));
    }

    /// Its channel has been closed for a while and the process is there: nothing can be asked of it any more.
    pub(super) fn still_there(&mut self, worker: WorkerId) {
        if self.workers.get(&worker).is_some_and(|w| w.status.is_none() && !w.leaving) {
            self.feed(Input::ChannelClosed { worker });
        }
    }

    /// Both the process and its channel have ended: only now is the worker dead to the supervisor.
    pub(super) fn settle(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if !w.channel_ended {
            return;
        }
        let Some(status) = w.status.take() else { return };
        let before = w.oom_kills;
        let exit = match &status {
            Ok(status) => exit_of(*status),
            Err(_) => Exit::Unknown,
        };
        let of_its_own = w.running.group.as_ref().and_then(LimitGroup::oom_kills);
        let for_memory = || match of_its_own {
            Some(kills) if kills > 0 => true,
            // Or the group that all are in was short of it.
            _ => before.zip(polyfork_sys::system::oom_kills()).is_some_and(|(was, is)| is > was),
        };
        let out_of_memory = exit == Exit::Signal(libc::SIGKILL) && for_memory();
        self.feed(Input::Exited { worker, exit, out_of_memory });
    }

    pub(super) fn gone(
        &mut self,
        slot: SlotId,
        worker: WorkerId,
        exit: Exit,
        reason: Reason,
        lived: Duration,
        will_restart: Option<Duration>,
    ) {
        let (who, voluntary, bind_failed) = match self.workers.remove(&worker) {
            Some(mut w) => {
                self.count_gone(worker, &w);
                self.measures_cannot_come(worker, w.who);
                w.running.link.close();
                self.give_up_group(w.running.group.take());
                for waiting in w.waiting_senders.drain(..) {
                    // The sender may have given up.
                    let _ = waiting.send(Err(SendError::Disconnected.into()));
                }
                if !w.disconnected && self.detected.dialect != Dialect::Sockets {
                    self.emit(Event::Disconnect(w.who));
                }
                (w.who, w.leaving, w.bind_failed)
            }
            None => (Who { slot: slot.0, worker: worker.0, pid: 0 }, false, false),
        };
        self.ended_meanwhile(worker, reason);
        self.note_not_all_ready();
        if self.workers.is_empty() {
            self.look_for_unused();
        }
        self.ports.died(worker);
        self.watch.forget(worker);
        self.watchdog.forget(worker);
        self.refresh_ports();
        self.trim_seats();
        let (code, signal) = code_and_signal(exit);
        self.emit(Event::Exit {
            who,
            code,
            signal,
            reason,
            lived,
            voluntary,
            restart_in: will_restart,
        });
        // A first start that fails because the address is taken will not get better by trying again.
        if bind_failed && !self.ever_ready && self.settings.supervise && !self.stopping {
            self.feed(Input::StopNow);
        }
    }

    /// Sockets of places that no worker needs any more are closed.
    pub(super) fn trim_seats(&mut self) {
        let now = self.now();
        for failure in self.ports.trim_seats(self.supervisor.slots().count(), now) {
            self.notice("slot", None, failure);
        }
    }

    pub(super) fn told_outcome(&mut self, ended: Ended) -> Outcome {
        match (ended, self.bind_failure.take()) {
            (_, Some((address, error))) if !self.ever_ready => {
                Outcome::BindFailed { address, error }
            }
            (Ended::Stopped, _) if self.forced => Outcome::Forced,
            (Ended::Stopped, _) => Outcome::Stopped,
            (Ended::AtRest { last, clean }, _) => Outcome::AtRest { last, clean },
            (Ended::AllFailed { last }, _) => Outcome::AllFailed { last },
            (Ended::NeverReady { first, last }, _) => Outcome::NeverReady { first, last },
        }
    }
}

/// The exit code and the signal of an end, as events tell them.
pub(super) fn code_and_signal(exit: Exit) -> (Option<i32>, Option<i32>) {
    match exit {
        Exit::Code(code) => (Some(code), None),
        Exit::Signal(signal) => (None, Some(signal)),
        Exit::Unknown | Exit::NotStarted => (None, None),
    }
}

fn exit_of(status: std::process::ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}
