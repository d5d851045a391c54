//! A worker from the moment that the supervisor wants it until connections may reach it.
//!
//! The process is started elsewhere (`process`); what it says is read by its dialect. Here is what follows from both: when
//! it counts as ready, and what that means for its slot and for sockets that nobody uses any more.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use polyfork_core::{Input, Reason, Seat, SlotId, SlotState, WorkerId};
use polyfork_wire::notify::{Notification, Watchdog as Alive};

use super::{Primary, Timer, Worker};
use crate::cluster::event::{Event, Who};
use crate::cluster::health::Allowance;
use crate::cluster::measures::Habit;
use crate::cluster::ports::sockets;
use crate::cluster::probe::Probing;
use crate::cluster::process::{self, Running};
use crate::cluster::settings::{Dialect, Ready, StopBy};

/// How often a Node worker that said nothing is looked at for a socket of its own.
const OWN_SOCKET_CHECK: Duration = Duration::from_millis(150);
/// A socket that no worker has asked for by then, after the last of them got ready, is a leftover of an
/// earlier version of the program. A program of several servers gets ready with the first of them.
const UNUSED_AFTER: Duration = Duration::from_secs(3);
/// A sockets worker that does not use `NOTIFY_SOCKET` counts as ready after this.
const SOCKETS_DELAY: Duration = Duration::from_secs(1);

/// What its settings ask of a worker, as they were when it was started.
struct Terms {
    ready_by: Ready,
    stop_by: StopBy,
    watchdog: Option<Duration>,
    allowance: Allowance,
    probing: Option<Probing>,
}

impl Primary {
    pub(super) fn spawn(&mut self, slot: SlotId, worker: WorkerId, generation: u32) {
        // A restart that is due at the same moment is not what was asked for: forked slots are never restarted.
        let restartable = self.supervisor.slot(slot).is_some_and(|slot| slot.supervised);
        let forked = if restartable { None } else { self.forking.pop_front() };
        let extra = forked.as_ref().map(|(env, _)| env.as_slice()).unwrap_or_default();
        for failure in self.ports.take_seat(worker, Seat(slot.0)) {
            self.notice("slot", None, failure);
        }
        // Only programs that inherit sockets are to get them blocking: a Node worker hangs on such a one.
        let inherited = match self.detected.dialect {
            Dialect::Sockets => self.ports.inherited_by(worker),
            _ => Ok(Vec::new()),
        };
        let (settings, detected, environment) = match self.launches.get(&generation) {
            Some(launch) => (&launch.settings, &launch.detected, &launch.environment),
            None => (&self.settings, &self.detected, &self.environment),
        };
        let (ready_by, watchdog) = (settings.ready_by(), settings.watchdog);
        let probing = settings.probe.as_ref().map(Probing::new);
        let stop_by = settings.stop_by;
        let allowance = Allowance::draw(settings, &mut self.chance);
        let request = process::Request {
            slot,
            worker,
            settings,
            detected,
            environment,
            extra_env: extra,
            inherited,
            io: &self.io,
            output: &mut self.output,
            max_requests: allowance.requests(),
        };
        match process::start(request) {
            Ok(running) => {
                let terms = Terms { ready_by, stop_by, watchdog, allowance, probing };
                self.spawned(slot, worker, generation, terms, running);
            }
            Err(error) => {
                let transient = error.is_transient();
                self.notice(
                    "spawn-failed",
                    Some(Who { slot: slot.0, worker: worker.0, pid: 0 }),
                    error.told(),
                );
                self.feed(Input::SpawnFailed { worker, transient });
            }
        }
        if let Some((_, reply)) = forked {
            // The asker may have gone.
            let _ = reply.send(self.workers.contains_key(&worker).then_some(worker));
        }
    }

    fn spawned(
        &mut self,
        slot: SlotId,
        worker: WorkerId,
        generation: u32,
        terms: Terms,
        running: Running,
    ) {
        let Terms { ready_by, stop_by, watchdog, allowance, probing } = terms;
        let who = Who { slot: slot.0, worker: worker.0, pid: running.pid() };
        let has_channel = running.link.exists();
        self.workers.insert(
            worker,
            Worker {
                who,
                running,
                generation,
                ready_by,
                stop_by,
                handed_over: 0,
                allowance,
                started: Instant::now(),
                online: false,
                ready: false,
                admitted: false,
                leaving: false,
                told: false,
                disconnected: false,
                prefixed: false,
                calls: BTreeMap::new(),
                bind_failed: false,
                status: None,
                channel_ended: !has_channel,
                fault: false,
                watchdog,
                had_requests: None,
                probing,
                probes: BTreeMap::new(),
                beats: false,
                lag: None,
                silent: false,
                last_take_back: None,
                wants_to_leave: false,
                habit: Habit::default(),
                oom_kills: polyfork_sys::system::oom_kills(),
                waiting_senders: VecDeque::new(),
            },
        );
        self.watch_health();
        self.emit(Event::Fork(who));
        if self.supervisor.reloading() == Some(generation) {
            self.started_anew(worker, who);
        }
        self.note_not_all_ready();
        if self.runtime().binds_itself() {
            self.is_bun(worker);
        }
        self.feed(Input::Spawned { worker });
        self.join_pinned(worker);
        match (ready_by, self.detected.dialect) {
            (Ready::Delay(delay), _) => self.after(delay, Timer::ReadyByAge(worker)),
            (Ready::Auto, Dialect::Sockets) => self.after(SOCKETS_DELAY, Timer::ReadyByAge(worker)),
            (Ready::ListeningOr(delay), dialect) => {
                self.after(delay, Timer::ReadyByAge(worker));
                if dialect == Dialect::Node {
                    self.after(OWN_SOCKET_CHECK, Timer::OwnSocket(worker));
                }
            }
            (Ready::Auto | Ready::Listening, Dialect::Node) => {
                self.after(OWN_SOCKET_CHECK, Timer::OwnSocket(worker));
            }
            _ => {}
        }
        if !has_channel {
            self.on_online(worker);
        }
    }

    /// The worker runs and can talk (Node: `online`).
    pub(crate) fn on_online(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if std::mem::replace(&mut w.online, true) {
            return;
        }
        let who = w.who;
        self.emit(Event::Online(who));
        self.feed(Input::Online { worker });
    }

    /// Whether it is ready once it listens.
    pub(crate) fn is_ready_by_listening(&self, worker: WorkerId) -> bool {
        let ready_by = self.workers.get(&worker).map(|w| w.ready_by);
        matches!(ready_by, Some(Ready::Auto | Ready::Listening | Ready::ListeningOr(_)))
    }

    /// Whether it is ready once it has answered its probe.
    pub(crate) fn is_ready_by_probe(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|w| w.ready_by == Ready::Probe)
    }

    pub(super) fn on_notified(&mut self, worker: WorkerId, text: &[u8]) {
        let Some(w) = self.workers.get(&worker) else { return };
        let (who, ready_by) = (w.who, w.ready_by);
        let state = Notification::parse(text);
        if state.watchdog == Some(Alive::Alive) {
            self.alive(worker, None);
        }
        if let Some(limit) = state.watchdog_usec {
            self.change_watch(worker, Duration::from_micros(limit));
        }
        if let Some(by) = state.extend_timeout_usec {
            self.feed(Input::Extend { worker, by: Duration::from_micros(by) });
        }
        if let Some(text) = state.status {
            self.emit(Event::Status { who, text });
        }
        if state.stopping
            && let Some(w) = self.workers.get_mut(&worker)
        {
            w.leaving = true;
            self.feed(Input::Leaving { worker });
        }
        if state.ready && matches!(ready_by, Ready::Auto | Ready::Notify) {
            self.became_ready(worker);
        }
        if state.watchdog == Some(Alive::Trigger) {
            self.notice(
                "watchdog",
                Some(who),
                "it asked to be replaced (WATCHDOG=trigger)".to_owned(),
            );
            self.feed(Input::Replace { worker, reason: Reason::Watchdog });
        }
    }

    /// A program may bind for itself (`exclusive`, `reusePort`) and tell nobody. Then its own listening
    /// socket is what makes it ready.
    pub(super) fn look_for_own_socket(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get(&worker) else { return };
        if w.ready || w.leaving {
            return;
        }
        let who = w.who;
        // A socket that it was given, but has not said yet that it listens on, is ours.
        let ours = sockets::sockets_of("self");
        let its = &sockets::sockets_of(&who.pid.to_string()) - &ours;
        // Nearly always it has none, and the table of all connections need not be read.
        let found =
            if its.is_empty() { Vec::new() } else { sockets::listening_sockets(who.pid, &its) };
        // Bun says that it is online when its program loads the cluster module, which Bun.serve() does not need.
        if found.is_empty() || !(w.online || self.runtime().binds_itself()) {
            self.after(OWN_SOCKET_CHECK, Timer::OwnSocket(worker));
            return;
        }
        self.on_online(worker);
        let by = self.ports.own_socket_via();
        for address in found {
            self.emit(Event::Listening { who, address, by: Arc::clone(&by) });
        }
        self.became_ready(worker);
    }

    /// The worker may have connections, as far as it is concerned.
    pub(crate) fn became_ready(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        if w.leaving || std::mem::replace(&mut w.ready, true) {
            return;
        }
        self.feed(Input::Ready { worker });
    }

    pub(super) fn admit(&mut self, worker: WorkerId) {
        let Some(w) = self.workers.get_mut(&worker) else { return };
        w.admitted = true;
        let who = w.who;
        self.ever_ready = true;
        self.ports.admit(worker, self.settings.window);
        self.refresh_ports();
        self.emit(Event::Ready(who));
        // As systemd does: signs of life are due from the moment it is ready.
        self.begin_watch(worker);
        self.check_all_ready();
    }

    /// All slots have a ready worker: say so, and see in a while which sockets the present program does not use.
    pub(super) fn check_all_ready(&mut self) {
        let (ready, wanted) = self.ready_and_wanted();
        if ready > 0 && ready >= wanted && !self.all_ready {
            self.emit(Event::AllReady { workers: u32::try_from(ready).unwrap_or(u32::MAX) });
            self.look_for_unused();
            self.all_ready = true;
        }
    }

    /// Something became of a worker: should its slot be without a ready one now, all slots being ready is told again.
    /// One that has a successor in its slot already is not missed.
    pub(super) fn note_not_all_ready(&mut self) {
        let mut states = self
            .supervisor
            .slots()
            .map(|slot| slot.state)
            .filter(|s| *s != SlotState::Resting)
            .peekable();
        self.all_ready &= states.peek().is_some() && states.all(|state| state == SlotState::Ready);
    }

    /// Slots whose worker may have connections, and slots. During a change a slot may have two such workers; the one
    /// that leaves does not count.
    fn ready_and_wanted(&self) -> (usize, usize) {
        let admitted = |worker| self.workers.get(&worker).is_some_and(|w| w.admitted);
        let ready = self.supervisor.slots().filter(|slot| slot.current.is_some_and(admitted));
        let wanted = self.supervisor.slots().filter(|slot| slot.state != SlotState::Resting);
        (ready.count(), wanted.count())
    }

    /// One look at a time: an earlier one that is planned is replaced.
    pub(crate) fn look_for_unused(&mut self) {
        self.timers.retain(|_, timer| !matches!(timer, Timer::Unused));
        self.after(UNUSED_AFTER, Timer::Unused);
    }

    /// Closes what nobody asked for, unless somebody who might is about to start. Where nobody is replaced,
    /// that includes the sockets of a program whose workers have all gone.
    pub(super) fn close_unused(&mut self) {
        let (ready, wanted) = self.ready_and_wanted();
        let all_ready = ready > 0 && ready >= wanted;
        if !all_ready && (self.settings.supervise || !self.workers.is_empty()) {
            return;
        }
        for address in self.ports.close_unused() {
            self.emit(Event::Closed { address });
        }
        self.ports.release_kept();
        self.tell_of_store();
    }
}
