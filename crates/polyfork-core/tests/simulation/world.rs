//! The world around the code under test: processes, a shell that is late, a clock that jumps, people with wishes.
//!
//! [`Life::play`] draws events until the cluster is over. What the shell does here is what the real one does, in the order it
//! must keep: a channel is read to its end before an exit is told, and every action is carried out at once. When things
//! happen is chance.
//!
//! The surprising part is [`Life::calm_down`]: now and then everybody starts to behave and time passes only from deadline to
//! deadline. Whatever happened before, the cluster must then become whole in a bounded number of steps, or something was
//! forgotten or waits for a deadline that nobody set.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use polyfork_core::restart::Jitter;
use polyfork_core::{
    Action, Assignment, Exit, Handoff, HandoffConfig, HandoffFault, Input, Outcome, Plan, Reason,
    ReloadFault, ReloadPlan, RestartPolicy, SlotId, SlotState, Snapshot, StopOn, Supervisor, Time,
    WorkerId, WorkerState,
};

use crate::book::Book;
use crate::ledger::Ledger;
use crate::process::{Nature, Process, Word};

/// What happened over all lives: so that a run that tested nothing cannot pass.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) events: u64,
    pub(crate) lives: u64,
    pub(crate) started: u64,
    pub(crate) deaths: u64,
    pub(crate) stops: u64,
    pub(crate) stops_during_start: u64,
    pub(crate) all_failed: u64,
    pub(crate) never_ready: u64,
    pub(crate) slots_failed: u64,
    pub(crate) slots_resting: u64,
    pub(crate) at_rest: u64,
    pub(crate) spawn_failures: u64,
    pub(crate) scaled: u64,
    pub(crate) reloads: u64,
    pub(crate) reloads_failed: u64,
    pub(crate) reloads_stopped: u64,
    pub(crate) switched: u64,
    pub(crate) renewed: u64,
    pub(crate) renewals_failed: u64,
    pub(crate) in_line: u64,
    pub(crate) clock_jumps: u64,
    pub(crate) calms: u64,
    pub(crate) offered: u64,
    pub(crate) acknowledged: u64,
    pub(crate) rehanded: u64,
    pub(crate) refused: u64,
    pub(crate) shed: u64,
    pub(crate) taken_back: u64,
    pub(crate) returned_by_death: u64,
    pub(crate) stalls_seen: u64,
    pub(crate) faults_never_sent: u64,
    pub(crate) faults_not_yours: u64,
    pub(crate) faults_revoked: u64,
    pub(crate) faults_settled: u64,
    pub(crate) faults_not_a_member: u64,
    pub(crate) most_processes: u64,
}

impl Sums {
    /// With enough events every kind has to have occurred.
    pub(crate) fn assert_that_everything_happened(&self, events: u64) {
        if events < 200_000 {
            return;
        }
        let text = format!("{self:?}");
        assert!(!text.contains(": 0,") && !text.contains(": 0 "), "never happened: {text}");
    }
}

pub(crate) struct Life {
    chance: Jitter,
    clock: Time,
    /// The latest time the supervisor was told.
    told: Time,
    plan: Plan,
    config: HandoffConfig,
    supervisor: Supervisor,
    handoff: Handoff<u64>,
    processes: BTreeMap<WorkerId, Process>,
    spawning: Vec<WorkerId>,
    suspended: Vec<WorkerId>,
    ledger: Ledger,
    book: Book,
    /// Served and are to be replaced, by their successors if that can be.
    unfit: BTreeSet<WorkerId>,
    /// Everybody behaves.
    calm: bool,
    /// Carry what is tested to another process after every so many events; zero for never.
    carry_every: u64,
    sums: Sums,
}

impl Life {
    pub(crate) fn new(seed: u64) -> Life {
        let mut chance = Jitter::new(seed);
        let plan = draw_plan(&mut chance);
        let config = draw_config(&mut chance);
        let clock = Time::new(Duration::from_millis(draw(&mut chance, 1 << 40)));
        Life {
            clock,
            told: Time::ZERO,
            supervisor: Supervisor::new(plan.clone()),
            handoff: Handoff::new(config.clone()),
            processes: BTreeMap::new(),
            spawning: Vec::new(),
            suspended: Vec::new(),
            ledger: Ledger::default(),
            book: Book::new(plan.clone()),
            unfit: BTreeSet::new(),
            calm: false,
            carry_every: 0,
            sums: Sums::default(),
            plan,
            config,
            chance,
        }
    }

    /// The same life, but what is tested is written down and read again after every `events` events, as if the
    /// primary had been replaced.
    pub(crate) fn carried_every(mut self, events: u64) -> Life {
        self.carry_every = events;
        self
    }

    /// Writes down and reads again what can be carried just now. Consumes no chance. Tells whether both could.
    fn carry(&mut self) -> bool {
        let named = self.handoff.try_map(|connection| Ok::<u64, ()>(*connection)).expect("names");
        let bytes = postcard::to_stdvec(&named).expect("a hand-over can be written");
        self.handoff = postcard::from_bytes(&bytes).expect("what was written can be read");
        self.handoff.check().expect("a hand-over that is carried fits together");
        let Ok(snapshot) = self.supervisor.snapshot() else { return false };
        let bytes = postcard::to_stdvec(&snapshot).expect("a supervisor can be written");
        let read: Snapshot = postcard::from_bytes(&bytes).expect("what was written can be read");
        self.supervisor = Supervisor::restore(read).expect("a supervisor that is carried");
        true
    }

    /// Plays the life to its end and adds what happened to `sums`; gives how often it was carried.
    pub(crate) fn play_carried(mut self, sums: &mut Sums) -> u64 {
        let length = 200 + self.draw(4000);
        let mut carried = 0;
        for number in 0..length {
            self.sums.events += 1;
            self.event();
            if self.book.finished.is_some() {
                break;
            }
            if self.carry_every > 0 && number % self.carry_every == 0 {
                carried += u64::from(self.carry());
            }
        }
        if self.book.finished.is_none() && self.one_in(2) {
            self.calm_down();
        }
        self.end();
        self.add_to(sums);
        carried
    }

    /// Plays the life to its end and adds what happened to `sums`.
    pub(crate) fn play(self, sums: &mut Sums) {
        self.play_carried(sums);
    }

    fn event(&mut self) {
        match self.draw(200) {
            0..40 => self.a_connection_arrives(),
            40..80 => self.a_worker_reads(),
            80..120 => self.the_shell_reads(),
            120..140 => self.a_spawn_is_answered(),
            140..155 => self.a_worker_speaks(),
            155..165 => self.a_process_acts(),
            165..175 => self.an_exit_is_seen(),
            175..181 => self.a_drain_is_told(),
            181..186 => self.time_passes(),
            186..192 => self.a_deadline_comes(),
            192..195 => self.a_stall_is_noticed(),
            195..199 => self.somebody_wishes(),
            _ => self.something_rare(),
        }
        if self.calm || self.one_in(4) {
            self.assign();
        }
        self.check();
    }

    // What comes from outside.

    fn a_connection_arrives(&mut self) {
        // Now and then more than there is room for.
        if self.handoff.room() == 0 && !self.one_in(20) {
            return;
        }
        let connection = self.ledger.accept();
        if let Some(shed) = self.handoff.offer(self.clock, connection) {
            assert_eq!(shed, connection);
            assert!(self.handoff.counters().queued >= self.config.queue_limit as u64);
            self.ledger.give_back(shed);
        }
    }

    fn somebody_wishes(&mut self) {
        let worker = self.any_worker_id();
        let slot = SlotId(1 + self.draw(8) as u32);
        let input = match self.draw(24) {
            0 | 1 => Input::Scale { workers: self.draw(7) as u32 },
            2 | 3 => Input::AddOne,
            4 | 5 => Input::RemoveOne,
            6 => Input::Fork,
            7 | 8 => Input::Disconnect { worker },
            9 => Input::Kill { worker, signal: [9, 15, 10, 0][self.draw(4) as usize] },
            10 => Input::Restart { slot },
            11 if self.one_in(8) => Input::Stop,
            12 if self.one_in(8) => Input::StopNow,
            13 => Input::Unfit { worker, reason: Reason::Watchdog },
            16 => Input::Renew { slot },
            17 => return self.somebody_is_unfit(worker),
            19 => return self.many_are_unfit(),
            18 => Input::Extend { worker, by: Duration::from_millis(250) },
            14 | 15 => {
                let (at_a_time, probation) = (self.draw(4) as u32, self.draw(1500));
                Input::Reload(ReloadPlan { at_a_time, probation: Duration::from_millis(probation) })
            }
            _ => Input::Start,
        };
        self.sums.scaled += u64::from(matches!(input, Input::Scale { .. }));
        self.feed(input);
    }

    /// Whoever serves is not ended before its successor is there, whatever is under way.
    fn somebody_is_unfit(&mut self, worker: WorkerId) {
        // What is due is not this one's doing.
        self.feed(Input::Tick);
        let serves = self.supervisor.worker(worker).filter(|w| w.state == WorkerState::Ready);
        let slot = serves.and_then(|w| self.supervisor.slot(w.slot));
        let replaceable = slot.is_some_and(|slot| slot.supervised && slot.wanted)
            && !self.supervisor.is_stopping();
        let busy = self.supervisor.renewing().is_some() || self.supervisor.reloading().is_some();
        self.feed(Input::Replace { worker, reason: Reason::Watchdog });
        if replaceable {
            let state = self.supervisor.worker(worker).map(|worker| worker.state);
            assert_eq!(state, Some(WorkerState::Ready), "it has no successor yet");
            self.unfit.insert(worker);
            self.sums.in_line += u64::from(busy);
        }
    }

    fn many_are_unfit(&mut self) {
        let serve: Vec<WorkerId> = self.supervisor.live_workers().map(|w| w.id).collect();
        serve.into_iter().for_each(|worker| self.somebody_is_unfit(worker));
    }

    fn something_rare(&mut self) {
        match self.draw(6) {
            0 => self.the_clock_jumps(),
            1 => self.a_late_event(),
            2 if self.one_in(8) => self.calm_down(),
            3 => {
                let all: Vec<WorkerId> = self.processes.keys().copied().collect();
                all.into_iter().for_each(|worker| self.kill(worker, Exit::Signal(9)));
            }
            _ => self.feed(Input::Tick),
        }
    }

    /// Inputs about workers in any state, also gone and never started: most must be ignored.
    fn a_late_event(&mut self) {
        let worker = self.any_worker_id();
        if self.book.is_alive(worker) {
            return;
        }
        let input = match self.draw(8) {
            0 => Input::Spawned { worker },
            1 => Input::Ready { worker },
            2 => Input::Exited { worker, exit: Exit::Code(0), out_of_memory: false },
            3 => Input::Leaving { worker },
            4 => Input::Drained { worker },
            5 => Input::ChannelClosed { worker },
            6 => Input::SpawnFailed { worker, transient: false },
            _ => Input::Unfit { worker, reason: Reason::ProtocolFault },
        };
        self.feed(input);
    }

    // Time.

    fn time_passes(&mut self) {
        self.clock = self.clock + Duration::from_millis(self.draw(400));
        if self.one_in(2) {
            self.feed(Input::Tick);
        }
    }

    fn a_deadline_comes(&mut self) {
        let deadline = if self.one_in(2) { self.supervisor.deadline() } else { None };
        let Some(at) = deadline.or_else(|| self.handoff.deadline()) else { return };
        self.clock = self.clock.max(at);
        self.feed(Input::Tick);
        self.assign();
    }

    fn the_clock_jumps(&mut self) {
        self.sums.clock_jumps += 1;
        let year = Duration::from_secs(365 * 24 * 3600);
        let far = if self.one_in(3) { year } else { Duration::from_millis(self.draw(100_000)) };
        self.clock = if self.one_in(2) {
            self.clock + far
        } else {
            Time::new(self.clock.since_origin().saturating_sub(far))
        };
        if self.one_in(2) {
            self.feed(Input::Tick);
        }
    }

    // What processes do.

    fn a_worker_reads(&mut self) {
        let Some(worker) = self.any_process(Process::talks) else { return };
        let count = 1 + self.draw(4);
        for _ in 0..count {
            self.read_one(worker);
        }
    }

    /// Takes one connection from the channel, as an honest worker does: acknowledge, then read from it; or refuse.
    fn read_one(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&worker).filter(|p| p.talks()) else { return };
        let Some((seq, connection)) = process.inbox.pop_front() else { return };
        let one_in = process.nature.refuses_one_in;
        let refuse = !self.calm && one_in > 0 && self.chance.bits().is_multiple_of(one_in);
        process.remember(seq);
        if refuse {
            process.say(Word::Refuse(seq));
        } else {
            process.say(Word::Acknowledge(seq));
            self.ledger.read(connection, worker, seq);
        }
    }

    fn a_worker_speaks(&mut self) {
        let Some(worker) = self.any_process(Process::talks) else { return };
        let lie = self.draw_lie(worker);
        let (what, patient) = (self.draw(16), self.one_in(4));
        let Some(process) = self.processes.get_mut(&worker) else { return };
        match what {
            0 => process.say(Word::Online),
            1 if patient && process.said_ready => process.say(Word::Leaving),
            2..8 if process.lies_now(patient) => process.say(lie),
            _ if process.nature.gets_ready && !process.said_ready => {
                process.said_ready = true;
                process.say(Word::Ready);
            }
            _ => {}
        }
    }

    /// An answer nobody asked for. A refusal of something the worker has read is left out: the connection would be given
    /// to a second worker, and no primary can know.
    fn draw_lie(&mut self, worker: WorkerId) -> Word {
        let near = (self.ledger.last_seq + 2).saturating_sub(self.draw(12));
        let process = self.processes.get(&worker);
        let old = process.and_then(|p| p.revoked.last().or(p.answered.back()).copied());
        match self.draw(6) {
            0 => Word::Acknowledge(u64::MAX - self.draw(3)),
            1 => Word::Refuse(u64::MAX),
            2 => Word::Refuse(0),
            3 | 4 => Word::Acknowledge(old.unwrap_or(near)),
            _ => Word::Acknowledge(near),
        }
    }

    fn a_process_acts(&mut self) {
        let Some(worker) = self.any_process(|p| p.ended.is_none()) else { return };
        let what = self.draw(24);
        let Some(process) = self.processes.get_mut(&worker) else { return };
        let runs = process.runs();
        if process.killed {
            // The kernel takes its time.
            self.kill(worker, Exit::Signal(9));
        } else if runs && process.terminated && process.nature.obeys_terminate {
            self.kill(worker, Exit::Signal(15));
        } else if runs && process.told_stop && process.nature.obeys_stop {
            self.kill(worker, Exit::Code(0));
        } else if runs && process.nature.exits_at_once {
            self.kill(worker, Exit::Code(1));
        } else {
            match what {
                0 => self.kill(worker, Exit::Signal(9)),
                1 if runs => self.kill(worker, Exit::Code(0)),
                2 => process.end(Exit::Signal(9), true),
                3 if runs => process.close_channel(),
                4..7 => process.frozen = true,
                7..13 => process.frozen = false,
                _ => {}
            }
        }
    }

    fn kill(&mut self, worker: WorkerId, exit: Exit) {
        if let Some(process) = self.processes.get_mut(&worker) {
            process.end(exit, false);
            self.sums.deaths += 1;
        }
    }

    // What the shell does.

    fn a_spawn_is_answered(&mut self) {
        if self.spawning.is_empty() {
            return;
        }
        let index = self.draw(self.spawning.len() as u64) as usize;
        let worker = self.spawning.swap_remove(index);
        if !self.calm && self.one_in(12) {
            self.sums.spawn_failures += 1;
            let transient = self.one_in(2);
            self.feed(Input::SpawnFailed { worker, transient });
            return;
        }
        let nature = self.draw_nature();
        self.processes.insert(worker, Process::new(worker, nature));
        self.book.process_exists(worker);
        self.feed(Input::Spawned { worker });
    }

    fn the_shell_reads(&mut self) {
        let Some(worker) = self.any_process(|p| !p.outbox.is_empty()) else { return };
        for _ in 0..1 + self.draw(4) {
            self.read_word(worker);
        }
    }

    fn read_word(&mut self, worker: WorkerId) -> bool {
        let Some(process) = self.processes.get_mut(&worker) else { return false };
        let Some(word) = process.outbox.pop_front() else { return false };
        match word {
            Word::Online => self.feed(Input::Online { worker }),
            Word::Ready => {
                self.book.said_ready(worker);
                self.feed(Input::Ready { worker });
            }
            Word::Leaving => self.feed(Input::Leaving { worker }),
            Word::Acknowledge(seq) => self.acknowledged(worker, seq),
            Word::Refuse(seq) => self.refused(worker, seq),
        }
        true
    }

    fn acknowledged(&mut self, worker: WorkerId, seq: u64) {
        match self.handoff.acknowledged(worker, seq) {
            Ok(accepted) => {
                let honest = self.processes.get(&worker).is_some_and(|p| !p.nature.lies);
                self.ledger.acknowledge(accepted.connection, worker, seq, honest);
            }
            Err(fault) => self.fault(worker, fault),
        }
    }

    fn refused(&mut self, worker: WorkerId, seq: u64) {
        let under_way: Vec<u64> = self.handoff.unanswered(worker).collect();
        let before = self.handoff.counters();
        match self.handoff.refused(self.clock, worker, seq) {
            Ok(()) => {
                assert!(under_way.contains(&seq));
                self.ledger.come_back(self.connection_of(worker, seq), worker);
            }
            Err(fault) => {
                assert_eq!(self.handoff.counters(), before, "a fault changed something");
                self.fault(worker, fault);
            }
        }
    }

    fn connection_of(&self, worker: WorkerId, seq: u64) -> u64 {
        self.ledger.under(worker, seq)
    }

    fn fault(&mut self, worker: WorkerId, fault: HandoffFault) {
        let liar = self.processes.get(&worker).is_some_and(|p| p.nature.lies);
        assert!(liar, "an honest worker is blamed: {fault}");
        *match fault {
            HandoffFault::NeverSent { .. } => &mut self.sums.faults_never_sent,
            HandoffFault::NotYours { .. } => &mut self.sums.faults_not_yours,
            HandoffFault::Revoked { .. } => &mut self.sums.faults_revoked,
            HandoffFault::Settled { .. } => &mut self.sums.faults_settled,
            _ => &mut self.sums.faults_not_a_member,
        } += 1;
        self.feed(Input::Unfit { worker, reason: Reason::ProtocolFault });
    }

    /// The end of a channel, or of its process: everything in it is read, then what was not acknowledged comes back.
    fn read_to_the_end(&mut self, worker: WorkerId) {
        while self.read_word(worker) {}
        let back = self.handoff.died(worker);
        assert_eq!(back, self.ledger.come_back_from(worker));
        self.sums.returned_by_death += back as u64;
    }

    fn an_exit_is_seen(&mut self) {
        let closed = |p: &Process| p.ended.is_none() && !p.channel_open && !p.close_seen;
        if self.one_in(3)
            && let Some(worker) = self.any_process(closed)
        {
            self.a_close_is_seen(worker);
        } else if let Some(worker) = self.any_process(|p| p.ended.is_some()) {
            self.read_to_the_end(worker);
            let process = self.processes.remove(&worker).expect("it was drawn from there");
            let (exit, out_of_memory) = process.ended.expect("it was drawn for that");
            self.feed(Input::Exited { worker, exit, out_of_memory });
            assert!(!self.book.is_alive(worker), "no Gone after the exit");
        }
    }

    fn a_close_is_seen(&mut self, worker: WorkerId) {
        self.read_to_the_end(worker);
        if let Some(process) = self.processes.get_mut(&worker) {
            process.close_seen = true;
        }
        self.feed(Input::ChannelClosed { worker });
    }

    fn a_drain_is_told(&mut self) {
        if self.suspended.is_empty() {
            return;
        }
        let index = self.draw(self.suspended.len() as u64) as usize;
        // Sometimes told twice.
        let worker = self.suspended[index];
        if !self.one_in(4) {
            self.suspended.swap_remove(index);
        }
        if self.book.is_alive(worker) || self.one_in(2) {
            self.feed(Input::Drained { worker });
        }
    }

    /// The shell looks after stalled workers: it proves of some connections that they were not read, and takes them back.
    fn a_stall_is_noticed(&mut self) {
        let overdue: Vec<(WorkerId, Time)> = self.handoff.overdue(self.clock).collect();
        for (worker, since) in overdue {
            self.sums.stalls_seen += 1;
            assert!(since <= self.clock.max(self.told) || since > Time::ZERO);
            let Some(process) = self.processes.get_mut(&worker).filter(|p| p.frozen) else {
                continue;
            };
            let unread: BTreeSet<u64> = process.inbox.drain(..).map(|(seq, _)| seq).collect();
            let mut seqs: Vec<u64> = unread.iter().copied().collect();
            // Numbers it does not owe are passed over.
            seqs.push(u64::MAX);
            let owed: Vec<u64> =
                self.handoff.unanswered(worker).filter(|seq| unread.contains(seq)).collect();
            process.revoked.extend(&owed);
            for seq in &owed {
                self.ledger.come_back(self.ledger.under(worker, *seq), worker);
            }
            let back = self.handoff.take_back(self.clock, worker, &seqs);
            assert_eq!(back, owed.len());
            self.sums.taken_back += back as u64;
        }
    }

    fn assign(&mut self) {
        let mut out: Vec<Assignment<u64>> = Vec::new();
        self.handoff.assign(self.clock, &mut out);
        for Assignment { worker, seq, connection, .. } in out {
            assert!(self.book.may_receive(worker), "{worker} gets connection {connection}");
            self.ledger.send(connection, worker, seq);
            if let Some(process) = self.processes.get_mut(&worker) {
                process.send(seq, connection);
            }
        }
    }

    fn feed(&mut self, input: Input) {
        match input {
            Input::Stop | Input::StopNow => {
                self.sums.stops += 1;
                self.sums.stops_during_start += u64::from(!self.spawning.is_empty());
                self.book.stop_asked = true;
            }
            Input::Restart { slot } if self.may_restart(slot) => self.book.forgive(slot),
            _ => {}
        }
        if self.book.finished.is_some() {
            return;
        }
        self.told = self.told.max(self.clock);
        for slot in self.supervisor.slots().filter(|slot| !slot.wanted) {
            self.book.forgive(slot.id);
        }
        let mut out = Vec::new();
        self.supervisor.handle(self.clock, input, &mut out);
        let supervisor = &self.supervisor;
        self.book.forget_candidates(|worker| {
            let view = supervisor.worker(worker);
            view.is_none_or(|view| !view.candidate && view.state != WorkerState::Ready)
        });
        for action in out {
            self.book.enter(self.told, &action);
            self.obey(action);
        }
        let late = self.supervisor.deadline().is_some_and(|at| at <= self.told);
        assert!(!late, "a deadline in the past: the shell would spin");
    }

    fn may_restart(&self, slot: SlotId) -> bool {
        let wanted = self.supervisor.slot(slot).is_some_and(|slot| slot.wanted);
        wanted && !self.supervisor.is_stopping()
    }

    fn obey(&mut self, action: Action) {
        match action {
            Action::Spawn { worker, .. } => self.spawning.push(worker),
            Action::Admit { worker } => {
                let window = self.draw(10) as usize;
                self.handoff.join(worker, window);
            }
            Action::Suspend { worker } => {
                self.handoff.suspend(worker);
                self.suspended.push(worker);
            }
            Action::TellStop { worker, .. } => self.with(worker, |p| p.told_stop = true),
            Action::Terminate { worker } => self.with(worker, |p| p.terminated = true),
            Action::Kill { worker } => self.with(worker, |p| p.killed = true),
            Action::Signal { worker, signal: 9 } => self.kill(worker, Exit::Signal(9)),
            Action::Signal { worker, signal: 15 } => self.with(worker, |p| p.terminated = true),
            Action::Gone { worker, .. } => {
                self.suspended.retain(|id| *id != worker);
                assert_eq!(self.handoff.in_flight(worker), 0, "connections with the dead");
            }
            Action::Switched { .. } => self.sums.switched += 1,
            Action::Renewed { .. } => self.sums.renewed += 1,
            Action::RenewalFailed { .. } => self.sums.renewals_failed += 1,
            Action::Reloaded { generation, .. } => {
                self.sums.reloads += 1;
                self.everybody_is_of(generation);
            }
            Action::ReloadFailed { fault: ReloadFault::Stopping, .. } => {
                self.sums.reloads_stopped += 1;
            }
            Action::ReloadFailed { .. } => self.sums.reloads_failed += 1,
            Action::SlotFailed { .. } => self.sums.slots_failed += 1,
            Action::SlotRests { .. } => self.sums.slots_resting += 1,
            Action::Finished { outcome } => match outcome {
                Outcome::Stopped => {}
                Outcome::AtRest { .. } => self.sums.at_rest += 1,
                Outcome::AllFailed { .. } => self.sums.all_failed += 1,
                Outcome::NeverReady { .. } => self.sums.never_ready += 1,
            },
            _ => {}
        }
    }

    fn with(&mut self, worker: WorkerId, change: impl FnOnce(&mut Process)) {
        change(self.processes.get_mut(&worker).expect("only processes that run are acted upon"));
    }

    /// After a reload nobody of an earlier generation serves, but those that no reload is for.
    fn everybody_is_of(&self, generation: u32) {
        let left = self.supervisor.workers().find(|worker| worker.candidate);
        assert!(
            left.is_none()
                || self.supervisor.reloading().is_some()
                || self.supervisor.renewing().is_some(),
            "still on trial: {left:?}"
        );
        for worker in self.supervisor.live_workers() {
            let counted = self.supervisor.slot(worker.slot).is_some_and(|slot| slot.supervised);
            assert!(!counted || worker.generation == generation, "left behind: {worker:?}");
        }
    }

    // What must hold at any time.

    fn check(&mut self) {
        let counters = self.handoff.counters();
        assert_eq!(counters.offered, self.ledger.offered());
        let parts = [counters.acknowledged, counters.shed, counters.in_flight, counters.queued];
        assert_eq!(counters.offered, parts.iter().sum::<u64>(), "{counters:?}");
        let ledger = &self.ledger;
        let entered = [ledger.acknowledged, ledger.returned, ledger.sent, ledger.kept];
        assert_eq!(parts, entered, "acknowledged, shed, in flight, queued");
        self.check_slots();
        self.check_deadline();
        self.check_memory();
    }

    fn check_slots(&self) {
        assert_eq!(self.book.alive(), self.supervisor.workers().count());
        if self.supervisor.is_stopping() || self.book.finished.is_some() {
            return;
        }
        for slot in self.supervisor.slots().filter(|slot| slot.wanted && slot.supervised) {
            // Where an end may leave it at rest, a worker that leaves by itself has no successor before its end.
            let leaves = slot.current.is_some() && self.plan.restart.stop_on != StopOn::Nothing;
            let known = !matches!(slot.state, SlotState::Empty | SlotState::Draining);
            assert!(known || leaves, "a forgotten slot: {slot:?}");
        }
        for worker in self.supervisor.live_workers() {
            assert!(self.book.may_receive(worker.id));
        }
    }

    /// Whatever ends by time has a time.
    fn check_deadline(&self) {
        if self.book.finished.is_some() {
            return;
        }
        let timed = |state| match state {
            WorkerState::Starting => self.plan.ready_timeout.is_some(),
            WorkerState::Stopping => self.plan.supervise && self.supervisor.is_stopping(),
            WorkerState::Suspended | WorkerState::Terminating => true,
            _ => false,
        };
        let by_worker = self.supervisor.workers().any(|worker| timed(worker.state));
        let waiting = self.supervisor.slots().filter_map(|slot| match slot.state {
            SlotState::Waiting { until } => Some(until),
            _ => None,
        });
        let deadline = self.supervisor.deadline();
        for until in waiting {
            assert!(deadline.is_some_and(|at| at <= until), "nobody wakes a waiting slot");
        }
        assert!(!by_worker || deadline.is_some(), "nobody wakes the supervisor");
    }

    fn check_memory(&mut self) {
        let processes = self.supervisor.workers().count();
        let slots = self.supervisor.slots().count();
        assert!(processes <= slots * 18, "{processes} workers in {slots} slots");
        self.sums.most_processes = self.sums.most_processes.max(processes as u64);
        // What came back from the dead comes on top of the queue: never more than was once under way.
        let under_way = self.sums.most_processes as usize * HandoffConfig::MAX_WINDOW;
        assert!(self.handoff.counters().queued as usize <= self.config.queue_limit + under_way);
        if self.one_in(64) {
            self.ledger.forget_the_settled();
        }
    }

    // The end, and the pauses on the way.

    /// Everybody behaves and time goes from deadline to deadline: the cluster becomes whole.
    fn calm_down(&mut self) {
        self.sums.calms += 1;
        self.calm = true;
        for process in self.processes.values_mut() {
            process.frozen = false;
            process.nature = Nature { lies: process.nature.lies, ..WELL_BEHAVED };
        }
        for _ in 0..400 {
            if self.is_whole() || self.book.finished.is_some() {
                break;
            }
            self.everybody_moves();
            self.pass_to_the_next_deadline();
        }
        assert!(self.is_whole() || self.book.finished.is_some(), "{}", self.describe());
        let stays = self.supervisor.live_workers().find(|worker| self.unfit.contains(&worker.id));
        assert!(stays.is_none(), "was to be replaced: {stays:?}");
        self.calm = false;
    }

    fn everybody_moves(&mut self) {
        while !self.spawning.is_empty() {
            self.a_spawn_is_answered();
        }
        let workers: Vec<WorkerId> = self.processes.keys().copied().collect();
        for worker in workers {
            self.behave(worker);
            while self.processes.get(&worker).is_some_and(|p| !p.inbox.is_empty()) {
                self.read_one(worker);
            }
            while self.read_word(worker) {}
        }
        let closed = |p: &Process| p.ended.is_none() && !p.channel_open && !p.close_seen;
        while let Some(worker) = self.any_process(closed) {
            self.a_close_is_seen(worker);
        }
        while self.any_process(|p| p.ended.is_some()).is_some() {
            self.an_exit_is_seen();
        }
        for worker in std::mem::take(&mut self.suspended) {
            self.feed(Input::Drained { worker });
        }
        self.assign();
        self.check();
    }

    fn behave(&mut self, worker: WorkerId) {
        let Some(state) = self.supervisor.worker(worker).map(|worker| worker.state) else { return };
        let Some(process) = self.processes.get_mut(&worker) else { return };
        let leaves = process.told_stop || process.terminated || process.killed;
        if leaves || state == WorkerState::Stopping {
            process.end(Exit::Code(0), false);
        } else if !process.said_ready {
            process.said_ready = true;
            process.say(Word::Ready);
        }
    }

    fn pass_to_the_next_deadline(&mut self) {
        let deadlines = [self.supervisor.deadline(), self.handoff.deadline()];
        if let Some(at) = deadlines.into_iter().flatten().min() {
            self.clock = self.clock.max(at);
            self.feed(Input::Tick);
            self.assign();
        }
    }

    fn is_whole(&self) -> bool {
        let settled =
            |state| matches!(state, SlotState::Ready | SlotState::Failed | SlotState::Resting);
        let slots = self.supervisor.slots().all(|s| settled(s.state) && s.leaving.is_empty());
        let counters = self.handoff.counters();
        let nobody = self.supervisor.live_workers().next().is_none();
        slots
            && self.supervisor.reloading().is_none()
            && self.supervisor.renewing().is_none()
            && (nobody || counters.queued + counters.in_flight == 0)
    }

    /// Stop always comes to an end, however the processes behave.
    fn end(&mut self) {
        if self.book.finished.is_none() {
            let now = self.one_in(4);
            self.feed(if now { Input::StopNow } else { Input::Stop });
        }
        for _ in 0..400 {
            if self.book.finished.is_some() {
                break;
            }
            self.spawns_are_answered_and_the_killed_die();
            self.pass_to_the_next_deadline();
        }
        assert!(self.book.finished.is_some(), "Stop without an end: {}", self.describe());
        assert!(self.processes.is_empty() && self.spawning.is_empty());
        assert_eq!(self.supervisor.deadline(), None);
        assert_eq!(self.supervisor.workers().count(), 0);
        self.nothing_happens_after_the_end();
        for connection in self.handoff.cancel_all() {
            self.ledger.give_back(connection);
        }
        self.check();
        self.ledger.assert_complete();
    }

    fn nothing_happens_after_the_end(&mut self) {
        let mut out = Vec::new();
        for input in [Input::Start, Input::AddOne, Input::Fork, Input::Stop, Input::Tick] {
            self.supervisor.handle(self.clock, input, &mut out);
        }
        assert_eq!(out, []);
    }

    fn spawns_are_answered_and_the_killed_die(&mut self) {
        while !self.spawning.is_empty() {
            self.a_spawn_is_answered();
        }
        for process in self.processes.values_mut().filter(|process| process.killed) {
            process.end(Exit::Signal(9), false);
        }
        while self.any_process(|p| p.ended.is_some()).is_some() {
            self.an_exit_is_seen();
        }
        self.check();
    }

    fn describe(&self) -> String {
        let slots: Vec<_> = self.supervisor.slots().collect();
        let workers: Vec<_> = self.supervisor.workers().collect();
        let (deadline, counters) = (self.supervisor.deadline(), self.handoff.counters());
        format!("{slots:#?} {workers:#?} {deadline:?} {counters:?} {:#?}", self.processes)
    }

    fn add_to(&self, sums: &mut Sums) {
        let (mine, counters) = (&self.sums, self.handoff.counters());
        sums.lives += 1;
        sums.started += self.book.spawned;
        sums.events += mine.events;
        sums.deaths += mine.deaths;
        sums.stops += mine.stops;
        sums.stops_during_start += mine.stops_during_start;
        sums.all_failed += mine.all_failed;
        sums.never_ready += mine.never_ready;
        sums.slots_resting += mine.slots_resting;
        sums.at_rest += mine.at_rest;
        sums.slots_failed += mine.slots_failed;
        sums.spawn_failures += mine.spawn_failures;
        sums.scaled += mine.scaled;
        sums.reloads += mine.reloads;
        sums.reloads_failed += mine.reloads_failed;
        sums.reloads_stopped += mine.reloads_stopped;
        sums.switched += mine.switched;
        sums.renewed += mine.renewed;
        sums.renewals_failed += mine.renewals_failed;
        sums.in_line += mine.in_line;
        sums.clock_jumps += mine.clock_jumps;
        sums.calms += mine.calms;
        sums.offered += counters.offered;
        sums.acknowledged += counters.acknowledged;
        sums.rehanded += counters.rehanded;
        sums.refused += counters.refused;
        sums.shed += counters.shed;
        sums.taken_back += mine.taken_back;
        sums.returned_by_death += mine.returned_by_death;
        sums.stalls_seen += mine.stalls_seen;
        sums.faults_never_sent += mine.faults_never_sent;
        sums.faults_not_yours += mine.faults_not_yours;
        sums.faults_revoked += mine.faults_revoked;
        sums.faults_settled += mine.faults_settled;
        sums.faults_not_a_member += mine.faults_not_a_member;
        sums.most_processes = sums.most_processes.max(mine.most_processes);
    }

    // Chance.

    fn draw(&mut self, below: u64) -> u64 {
        draw(&mut self.chance, below)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.draw(n) == 0
    }

    fn any_process(&mut self, wanted: impl Fn(&Process) -> bool) -> Option<WorkerId> {
        let count = self.processes.values().filter(|p| wanted(p)).count() as u64;
        if count == 0 {
            return None;
        }
        let nth = self.draw(count) as usize;
        self.processes.values().filter(|p| wanted(p)).nth(nth).map(|p| p.worker)
    }

    /// Mostly one that exists.
    fn any_worker_id(&mut self) -> WorkerId {
        let any = WorkerId(self.draw(self.book.spawned + 3));
        if self.one_in(4) { any } else { self.any_process(|_| true).unwrap_or(any) }
    }

    fn draw_nature(&mut self) -> Nature {
        if self.calm || self.one_in(2) {
            return WELL_BEHAVED;
        }
        Nature {
            gets_ready: !self.one_in(6),
            obeys_stop: !self.one_in(4),
            obeys_terminate: !self.one_in(4),
            lies: self.one_in(2),
            refuses_one_in: [0, 0, 1, 2, 10][self.draw(5) as usize],
            exits_at_once: self.one_in(6),
        }
    }
}

const WELL_BEHAVED: Nature = Nature {
    gets_ready: true,
    obeys_stop: true,
    obeys_terminate: true,
    lies: false,
    refuses_one_in: 0,
    exits_at_once: false,
};

fn draw(chance: &mut Jitter, below: u64) -> u64 {
    if below == 0 { 0 } else { chance.bits() % below }
}

fn draw_plan(chance: &mut Jitter) -> Plan {
    let mut millis = |below| Duration::from_millis(draw(chance, below));
    let (ready_timeout, grace, kill_after) = (millis(2000), millis(3000), millis(1000));
    let window = millis(60_000) + Duration::from_millis(1);
    let limit = [0, 2, 5, 20, 1000, 1000][draw(chance, 6) as usize];
    Plan {
        workers: draw(chance, 6) as u32,
        supervise: draw(chance, 8) > 0,
        ready_timeout: (draw(chance, 4) > 0).then_some(ready_timeout + Duration::from_millis(1)),
        grace,
        kill_after,
        restart: RestartPolicy {
            stop_on: match draw(chance, 6) {
                0 => StopOn::Codes(vec![0]),
                1 => StopOn::AnyEnd,
                _ => StopOn::Nothing,
            },
            ..RestartPolicy::intensity(limit, window)
        },
        stay_at_rest: draw(chance, 2) > 0,
        seed: chance.bits(),
    }
}

fn draw_config(chance: &mut Jitter) -> HandoffConfig {
    HandoffConfig {
        window: 1 + draw(chance, 10) as usize,
        queue_limit: 1 + draw(chance, 64) as usize,
        ack_limit: Duration::from_millis(draw(chance, 1000)),
        refuse_pause: Duration::from_millis(draw(chance, 50)),
        debt_limit: draw(chance, 100) as u32,
    }
}
