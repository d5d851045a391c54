//! What a reload promises, one test per promise. Random orders are in `simulation`.
//!
//! Workers 1 to N are the first generation, N+1 to 2N the second. Time stands still unless a test moves it.

use std::time::Duration;

use polyfork_core::{
    Action, Exit, Input, Plan, READY_LIMIT, Reason, ReloadFault, ReloadPlan, RestartPolicy, SlotId,
    SlotState, Supervisor, Time, WorkerId, WorkerState,
};

const SECOND: Duration = Duration::from_secs(1);

struct Cluster {
    supervisor: Supervisor,
    now: Time,
}

impl Cluster {
    fn ready(workers: u32) -> Cluster {
        Cluster::of(Plan { workers, ..Plan::default() })
    }

    fn of(plan: Plan) -> Cluster {
        let workers = plan.workers;
        let mut cluster = Cluster { supervisor: Supervisor::new(plan), now: Time::new(SECOND) };
        cluster.feed(Input::Start);
        (1..=u64::from(workers)).for_each(|n| drop(cluster.come_up(n)));
        cluster
    }

    fn feed(&mut self, input: Input) -> Vec<Action> {
        let mut out = Vec::new();
        self.supervisor.handle(self.now, input, &mut out);
        out
    }

    fn pass(&mut self, time: Duration) -> Vec<Action> {
        self.now = self.now + time;
        self.feed(Input::Tick)
    }

    fn come_up(&mut self, n: u64) -> Vec<Action> {
        self.feed(Input::Spawned { worker: w(n) });
        self.feed(Input::Ready { worker: w(n) })
    }

    fn exit(&mut self, n: u64, code: i32) -> Vec<Action> {
        let exit = Exit::Code(code);
        self.feed(Input::Exited { worker: w(n), exit, out_of_memory: false })
    }

    fn reload(&mut self, at_a_time: u32, probation: Duration) -> Vec<Action> {
        self.feed(Input::Reload(ReloadPlan { at_a_time, probation }))
    }

    fn live(&self) -> Vec<u64> {
        self.supervisor.live_workers().map(|worker| worker.id.0).collect()
    }
}

fn w(n: u64) -> WorkerId {
    WorkerId(n)
}

fn spawned(out: &[Action]) -> Vec<u64> {
    let spawned = out.iter().filter_map(|action| match action {
        Action::Spawn { worker, generation: 2, .. } => Some(worker.0),
        _ => None,
    });
    spawned.collect()
}

fn failed(out: &[Action]) -> Option<ReloadFault> {
    out.iter().find_map(|action| match action {
        Action::ReloadFailed { fault, .. } => Some(*fault),
        _ => None,
    })
}

fn touches(out: &[Action], n: u64) -> bool {
    let worker = w(n);
    out.iter().any(|action| {
        let (Action::Suspend { worker: of } | Action::TellStop { worker: of, .. }) = *action else {
            return false;
        };
        of == worker
    })
}

#[test]
fn next_generation_comes_up_beside_the_present_one_and_gets_nothing_yet() {
    let mut cluster = Cluster::ready(2);
    assert_eq!(spawned(&cluster.reload(0, SECOND)), [3, 4]);
    assert_eq!(cluster.come_up(3), []);
    assert_eq!(cluster.come_up(4), []);
    assert_eq!(cluster.live(), [1, 2]);
    let state = cluster.supervisor.worker(w(3)).map(|worker| (worker.state, worker.candidate));
    assert_eq!(state, Some((WorkerState::Trial, true)));
}

#[test]
fn it_takes_over_as_one_when_all_have_passed_their_probation() {
    let mut cluster = Cluster::ready(2);
    cluster.reload(0, SECOND);
    cluster.come_up(3);
    cluster.pass(10 * SECOND);
    cluster.come_up(4);
    assert_eq!(cluster.live(), [1, 2], "the probation of the last one counts");
    let out = cluster.pass(SECOND);
    let admits = |n| Action::Admit { worker: w(n) };
    let suspends = |n| Action::Suspend { worker: w(n) };
    let switched = Action::Switched { generation: 2, workers: 2 };
    assert_eq!(out, [admits(3), admits(4), switched, suspends(1), suspends(2)]);
    assert_eq!(cluster.live(), [3, 4]);
}

#[test]
fn it_is_over_when_the_old_ones_are_gone_and_later_workers_belong_to_it() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, Duration::ZERO);
    cluster.come_up(2);
    cluster.feed(Input::Drained { worker: w(1) });
    assert_eq!(cluster.supervisor.reloading(), Some(2));
    let out = cluster.exit(1, 0);
    assert!(out.contains(&Action::Reloaded { generation: 2, replaced: 1 }), "{out:?}");
    assert_eq!(cluster.supervisor.reloading(), None);
    assert_eq!(spawned(&cluster.exit(2, 1)), [3]);
}

#[test]
fn a_rolling_reload_has_one_batch_of_processes_too_many() {
    let mut cluster = Cluster::ready(3);
    assert_eq!(spawned(&cluster.reload(2, Duration::ZERO)), [4, 5]);
    cluster.come_up(4);
    cluster.come_up(5);
    assert_eq!(cluster.live(), [3, 4, 5]);
    assert_eq!(spawned(&cluster.exit(1, 0)), []);
    assert_eq!(spawned(&cluster.exit(2, 0)), [6], "the next batch waits for the last of this");
    cluster.come_up(6);
    let out = cluster.exit(3, 0);
    assert!(out.contains(&Action::Reloaded { generation: 2, replaced: 3 }), "{out:?}");
}

#[test]
fn a_version_that_exits_leaves_the_old_generation_untouched() {
    let mut cluster = Cluster::ready(2);
    cluster.reload(0, SECOND);
    cluster.come_up(3);
    cluster.feed(Input::Spawned { worker: w(4) });
    let out = cluster.exit(4, 1);
    let reason = Reason::Exited(Exit::Code(1));
    let fault = ReloadFault::Candidate { slot: SlotId(2), worker: w(4), reason };
    assert_eq!(failed(&out), Some(fault));
    assert!(touches(&out, 3), "its sibling is asked to stop");
    assert!(!touches(&out, 1) && !touches(&out, 2));
    assert_eq!(cluster.live(), [1, 2]);
    assert!(cluster.exit(3, 0).iter().all(|action| !matches!(action, Action::Spawn { .. })));
    assert!(cluster.supervisor.slots().all(|slot| slot.restarts == 0), "no strike for the slots");
}

#[test]
fn a_version_that_never_gets_ready_fails_by_the_limit() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, Duration::ZERO);
    cluster.feed(Input::Spawned { worker: w(2) });
    let out = cluster.pass(polyfork_core::supervisor::READY_LIMIT);
    let reason = Reason::NeverReady;
    let fault = ReloadFault::Candidate { slot: SlotId(1), worker: w(2), reason };
    assert_eq!(failed(&out), Some(fault));
    assert_eq!(cluster.live(), [1]);
}

#[test]
fn a_version_that_dies_in_probation_never_gets_a_connection() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, SECOND);
    cluster.come_up(2);
    cluster.pass(SECOND / 2);
    assert!(failed(&cluster.exit(2, 1)).is_some());
    assert_eq!(cluster.pass(10 * SECOND), []);
    assert_eq!(cluster.live(), [1]);
}

#[test]
fn a_candidate_that_is_killed_or_leaves_or_cannot_be_started_ends_the_reload() {
    for input in [
        Input::Leaving { worker: w(2) },
        Input::Disconnect { worker: w(2) },
        Input::Unfit { worker: w(2), reason: Reason::ProtocolFault },
        Input::ChannelClosed { worker: w(2) },
    ] {
        let mut cluster = Cluster::ready(1);
        cluster.reload(0, SECOND);
        cluster.come_up(2);
        assert!(failed(&cluster.feed(input)).is_some(), "{input:?}");
        assert_eq!(cluster.live(), [1]);
    }
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, SECOND);
    let input = Input::SpawnFailed { worker: w(2), transient: true };
    assert!(failed(&cluster.feed(input)).is_some());
}

#[test]
fn a_second_reload_waits_for_nobody_and_changes_nothing() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, SECOND);
    assert_eq!(cluster.reload(0, SECOND), []);
    assert_eq!(cluster.supervisor.reloading(), Some(2));
}

#[test]
fn an_old_worker_that_dies_meanwhile_is_replaced_by_its_own_kind() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, SECOND);
    let out = cluster.exit(1, 1);
    let again = out.iter().any(|a| matches!(a, Action::Spawn { generation: 1, .. }));
    assert!(again, "{out:?}");
    cluster.come_up(2);
    cluster.come_up(3);
    cluster.pass(SECOND);
    assert_eq!(cluster.live(), [2], "the candidate took over, not the replacement");
}

#[test]
fn a_slot_that_was_given_up_gets_its_worker_back() {
    let restart = RestartPolicy::intensity(0, SECOND);
    let mut cluster = Cluster::of(Plan { workers: 2, restart, ..Plan::default() });
    cluster.exit(1, 1);
    let state = cluster.supervisor.slot(SlotId(1)).map(|slot| slot.state);
    assert_eq!(state, Some(SlotState::Failed));
    let fresh = spawned(&cluster.reload(0, Duration::ZERO));
    assert_eq!(fresh.len(), 2);
    fresh.iter().for_each(|n| drop(cluster.come_up(*n)));
    assert_eq!(cluster.live(), fresh);
}

#[test]
fn stop_wins_over_a_reload() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, SECOND);
    cluster.come_up(2);
    let out = cluster.feed(Input::Stop);
    assert_eq!(failed(&out), Some(ReloadFault::Stopping));
    assert!(touches(&out, 1) && touches(&out, 2));
}

#[test]
fn a_slot_that_is_scaled_away_takes_its_candidate_along() {
    let mut cluster = Cluster::ready(2);
    cluster.reload(0, Duration::ZERO);
    cluster.come_up(3);
    let out = cluster.feed(Input::Scale { workers: 1 });
    assert!(touches(&out, 2), "{out:?}");
    assert!(out.contains(&Action::Admit { worker: w(3) }), "what is left passes: {out:?}");
    cluster.feed(Input::Spawned { worker: w(4) });
    assert_eq!(cluster.live(), [3]);
}

#[test]
fn a_slot_that_is_added_is_reloaded_as_well() {
    let mut cluster = Cluster::ready(1);
    cluster.reload(0, Duration::ZERO);
    cluster.feed(Input::AddOne);
    cluster.come_up(3);
    cluster.come_up(2);
    let out = cluster.exit(1, 0);
    assert_eq!(spawned(&out), [4]);
}

#[test]
fn without_supervision_there_is_nothing_to_reload() {
    let plan = Plan { workers: 1, supervise: false, ..Plan::default() };
    let mut supervisor = Supervisor::new(plan);
    let mut out = Vec::new();
    supervisor.handle(Time::ZERO, Input::Start, &mut out);
    supervisor.handle(
        Time::ZERO,
        Input::Reload(ReloadPlan { at_a_time: 0, probation: SECOND }),
        &mut out,
    );
    assert_eq!(supervisor.reloading(), None);
}

#[test]
fn a_renewal_puts_a_ready_worker_in_place_before_the_old_one_is_told() {
    let mut cluster = Cluster::ready(2);
    let out = cluster.feed(Input::Renew { slot: SlotId(2) });
    let spawn =
        Action::Spawn { slot: SlotId(2), worker: w(3), generation: 1, candidate: true, attempt: 1 };
    assert_eq!(out, [spawn]);
    assert_eq!(cluster.live(), [1, 2]);
    let out = cluster.come_up(3);
    let (admit, suspend) = (Action::Admit { worker: w(3) }, Action::Suspend { worker: w(2) });
    assert_eq!(out, [admit, suspend, Action::Renewed { slot: SlotId(2) }]);
    assert_eq!(cluster.live(), [1, 3]);
}

#[test]
fn a_renewal_that_fails_leaves_the_old_worker() {
    let mut cluster = Cluster::ready(1);
    cluster.feed(Input::Renew { slot: SlotId(1) });
    let out = cluster.exit(2, 1);
    assert!(out.iter().any(|action| matches!(action, Action::RenewalFailed { .. })), "{out:?}");
    assert_eq!(cluster.live(), [1]);
    assert_eq!(cluster.supervisor.renewing(), None);
}

#[test]
fn a_reload_that_is_asked_for_during_a_renewal_follows_it() {
    let mut cluster = Cluster::ready(1);
    cluster.feed(Input::Renew { slot: SlotId(1) });
    assert_eq!(cluster.reload(0, Duration::ZERO), []);
    assert_eq!(cluster.supervisor.reloading(), Some(2));
    assert_eq!(spawned(&cluster.come_up(2)), [3]);
    assert_eq!(cluster.feed(Input::Renew { slot: SlotId(1) }), [], "one thing at a time");
    cluster.come_up(3);
    assert_eq!(cluster.live(), [3]);
}

#[test]
fn a_slot_without_a_ready_worker_is_not_renewed() {
    let mut cluster = Cluster::ready(1);
    cluster.exit(1, 1);
    assert_eq!(cluster.feed(Input::Renew { slot: SlotId(1) }), []);
    assert_eq!(cluster.feed(Input::Renew { slot: SlotId(9) }), []);
}

#[test]
fn an_unfit_worker_that_serves_has_its_successor_first() {
    let mut cluster = Cluster::ready(2);
    let reason = Reason::Watchdog;
    let out = cluster.feed(Input::Replace { worker: w(2), reason });
    let spawn =
        Action::Spawn { slot: SlotId(2), worker: w(3), generation: 1, candidate: true, attempt: 1 };
    assert_eq!(out, [spawn]);
    assert_eq!(cluster.live(), [1, 2]);
    cluster.come_up(3);
    assert_eq!(cluster.live(), [1, 3]);
    let out = cluster.exit(2, 0);
    let told = |action: &Action| matches!(action, Action::Gone { reason: Reason::Watchdog, .. });
    assert!(out.iter().any(told), "{out:?}");
}

#[test]
fn an_unfit_worker_does_not_stay_when_its_successor_does_not_come_up() {
    let mut cluster = Cluster::ready(1);
    cluster.feed(Input::Replace { worker: w(1), reason: Reason::Watchdog });
    let out = cluster.exit(2, 1);
    assert!(out.contains(&Action::Terminate { worker: w(1) }), "{out:?}");
    assert_eq!(cluster.live(), [0u64; 0]);
}

/// Who is started beside a worker that serves.
fn beside(out: &[Action]) -> Vec<u64> {
    let beside = out.iter().filter_map(|action| match action {
        Action::Spawn { worker, candidate: true, .. } => Some(worker.0),
        _ => None,
    });
    beside.collect()
}

fn replace(cluster: &mut Cluster, n: u64) -> Vec<Action> {
    cluster.feed(Input::Replace { worker: w(n), reason: Reason::Watchdog })
}

fn terminates(out: &[Action]) -> bool {
    out.iter().any(|action| matches!(action, Action::Terminate { .. }))
}

#[test]
fn unfit_workers_have_their_successors_first_one_after_the_other() {
    let mut cluster = Cluster::ready(3);
    assert_eq!(beside(&replace(&mut cluster, 1)), [4]);
    // They wait, told once or twice.
    for n in [2, 3, 2, 1] {
        assert_eq!(replace(&mut cluster, n), []);
    }
    let out = cluster.come_up(4);
    assert_eq!((beside(&out), terminates(&out)), (vec![5], false), "{out:?}");
    let out = cluster.come_up(5);
    assert_eq!((beside(&out), terminates(&out)), (vec![6], false), "{out:?}");
    let out = cluster.come_up(6);
    assert_eq!((beside(&out), terminates(&out)), (vec![], false), "{out:?}");
    assert_eq!(cluster.live(), [4, 5, 6]);
    for n in 1..=3 {
        let out = cluster.exit(n, 0);
        let told =
            |action: &Action| matches!(action, Action::Gone { reason: Reason::Watchdog, .. });
        assert!(out.iter().any(told), "{out:?}");
    }
}

#[test]
fn a_successor_that_does_not_come_up_costs_the_next_one_in_line_nothing() {
    let mut cluster = Cluster::ready(2);
    replace(&mut cluster, 1);
    replace(&mut cluster, 2);
    let out = cluster.exit(3, 1);
    assert!(out.contains(&Action::Terminate { worker: w(1) }), "{out:?}");
    assert!(!out.contains(&Action::Terminate { worker: w(2) }), "{out:?}");
    assert_eq!(cluster.live(), [2]);
    let next = beside(&out)[0];
    cluster.come_up(next);
    assert!(!cluster.live().contains(&2));
}

#[test]
fn an_unfit_worker_whose_turn_does_not_come_ends_in_the_end() {
    let mut cluster = Cluster::ready(2);
    replace(&mut cluster, 1);
    replace(&mut cluster, 2);
    // A shell that never tells what became of the start.
    assert!(!terminates(&cluster.pass(READY_LIMIT - SECOND)));
    assert!(cluster.supervisor.deadline().is_some());
    let out = cluster.pass(SECOND);
    assert!(out.contains(&Action::Terminate { worker: w(2) }), "{out:?}");
}

#[test]
fn an_unfit_worker_waits_for_a_reload_that_replaces_it() {
    let mut cluster = Cluster::ready(2);
    assert_eq!(beside(&cluster.reload(0, Duration::ZERO)), [3, 4]);
    assert_eq!(replace(&mut cluster, 1), []);
    cluster.come_up(3);
    let out = cluster.come_up(4);
    assert_eq!((beside(&out), terminates(&out)), (vec![], false), "{out:?}");
    assert_eq!(cluster.live(), [3, 4]);
    cluster.exit(2, 0);
    let out = cluster.exit(1, 0);
    assert!(!out.iter().any(|action| matches!(action, Action::Spawn { .. })), "{out:?}");
}

#[test]
fn an_unfit_worker_is_renewed_when_the_reload_fails_or_was_asked_for_later() {
    let mut cluster = Cluster::ready(2);
    cluster.reload(0, Duration::ZERO);
    replace(&mut cluster, 1);
    let out = cluster.exit(3, 1);
    assert!(out.iter().any(|action| matches!(action, Action::ReloadFailed { .. })), "{out:?}");
    assert_eq!((beside(&out), terminates(&out)), (vec![5], false), "{out:?}");
    // One that is asked for now comes after it.
    assert_eq!(cluster.reload(0, Duration::ZERO), []);
    assert_eq!(beside(&cluster.come_up(5)), [6, 7]);
}

#[test]
fn an_unfit_worker_that_nobody_replaces_ends_at_once() {
    let plan = Plan { workers: 1, supervise: false, ..Plan::default() };
    let mut cluster = Cluster::of(plan);
    let out = replace(&mut cluster, 1);
    assert!(out.contains(&Action::Terminate { worker: w(1) }), "{out:?}");
}

#[test]
fn who_waits_in_line_and_goes_by_itself_is_forgotten() {
    let mut cluster = Cluster::ready(2);
    replace(&mut cluster, 1);
    replace(&mut cluster, 2);
    let out = cluster.exit(2, 1);
    assert!(!terminates(&out), "{out:?}");
    let out = cluster.come_up(3);
    assert!(out.contains(&Action::Renewed { slot: SlotId(1) }), "{out:?}");
    assert_eq!(beside(&out), [0_u64; 0], "there is nobody to renew");
    assert_eq!(cluster.supervisor.renewing(), None);
}

/// The fault: the renewal knew the worker that it was begun for, and the one in its place was unfit for ever.
#[test]
fn an_unfit_worker_in_the_place_of_one_that_was_unfit_does_not_stay() {
    let mut cluster = Cluster::ready(1);
    assert_eq!(beside(&replace(&mut cluster, 1)), [2]);
    cluster.exit(1, 1);
    cluster.pass(60 * SECOND);
    cluster.come_up(3);
    assert_eq!(cluster.live(), [3]);
    assert_eq!(replace(&mut cluster, 3), []);
    let out = cluster.exit(2, 1);
    assert!(out.contains(&Action::Terminate { worker: w(3) }), "{out:?}");
}

#[test]
fn more_time_is_given_to_what_has_a_limit_and_never_less() {
    let limit = Some(10 * SECOND);
    let mut cluster = Cluster::of(Plan { workers: 0, ready_timeout: limit, ..Plan::default() });
    cluster.feed(Input::Scale { workers: 1 });
    cluster.feed(Input::Spawned { worker: w(1) });
    cluster.feed(Input::Extend { worker: w(1), by: SECOND });
    assert_eq!(cluster.pass(9 * SECOND), []);
    cluster.feed(Input::Extend { worker: w(1), by: 5 * SECOND });
    assert_eq!(cluster.pass(4 * SECOND), []);
    assert!(cluster.pass(SECOND).contains(&Action::Terminate { worker: w(1) }));
}
