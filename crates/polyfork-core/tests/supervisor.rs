//! What the supervisor promises, one test per promise.
//!
//! Each test plays a short story through the public API and looks at the actions. Random orders are in `simulation`. The one
//! surprising rule: time stands still unless a test moves it, so every action is the answer to the input before it.

use std::time::Duration;

use polyfork_core::supervisor::{DRAIN_LIMIT, MAX_LEAVING, MAX_SLOTS, START_GRACE};
use polyfork_core::{
    Action, Exit, Input, NotNow, Outcome, Plan, Reason, ReloadPlan, Report, RestartPolicy, SlotId,
    SlotState, Supervisor, SupervisorLimits, Time, WorkerId, WorkerState,
};

const SECOND: Duration = Duration::from_secs(1);
const STABLE: Duration = Duration::from_secs(60);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A supervisor with a clock in the test's hand.
struct Cluster {
    supervisor: Supervisor,
    now: Time,
}

impl Cluster {
    fn new(plan: Plan) -> Cluster {
        Cluster { supervisor: Supervisor::new(plan), now: Time::new(STABLE) }
    }

    /// Started, with all workers ready.
    fn ready(plan: Plan) -> Cluster {
        let workers = u64::from(plan.workers);
        let mut cluster = Cluster::new(plan);
        cluster.feed(Input::Start);
        (1..=workers).for_each(|n| cluster.come_up(n));
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

    /// Time goes on to the next deadline.
    fn wait(&mut self) -> Vec<Action> {
        self.now = self.supervisor.deadline().expect("something to wait for");
        self.feed(Input::Tick)
    }

    fn come_up(&mut self, n: u64) {
        self.feed(Input::Spawned { worker: w(n) });
        let out = self.feed(Input::Ready { worker: w(n) });
        assert_eq!(out, [Action::Admit { worker: w(n) }]);
    }

    fn exit(&mut self, n: u64, exit: Exit) -> Vec<Action> {
        self.feed(Input::Exited { worker: w(n), exit, out_of_memory: false })
    }

    fn state(&self, n: u32) -> SlotState {
        self.supervisor.slot(s(n)).expect("the slot exists").state
    }
}

fn w(n: u64) -> WorkerId {
    WorkerId(n)
}

fn s(n: u32) -> SlotId {
    SlotId(n)
}

/// With a wait also after the first death of a worker that was ready: then there is something to look at.
fn plan(workers: u32) -> Plan {
    let restart = RestartPolicy::default();
    let restart = RestartPolicy { first_delay: restart.min_delay, ..restart };
    Plan { workers, restart, ..Plan::default() }
}

fn spawned(out: &[Action]) -> Vec<(SlotId, WorkerId)> {
    let spawned = out.iter().filter_map(|action| match action {
        Action::Spawn { slot, worker, .. } => Some((*slot, *worker)),
        _ => None,
    });
    spawned.collect()
}

fn reason(out: &[Action]) -> Reason {
    let reason = out.iter().find_map(|action| match action {
        Action::Gone { reason, .. } => Some(*reason),
        _ => None,
    });
    reason.expect("a worker is gone")
}

fn will_restart(out: &[Action]) -> Option<Duration> {
    let gone = out.iter().find_map(|action| match action {
        Action::Gone { will_restart, .. } => Some(*will_restart),
        _ => None,
    });
    gone.expect("a worker is gone")
}

// ---- start ----

#[test]
fn every_slot_starts_at_once() {
    let mut cluster = Cluster::new(plan(3));
    let out = cluster.feed(Input::Start);
    assert_eq!(spawned(&out), [(s(1), w(1)), (s(2), w(2)), (s(3), w(3))]);
    assert!(cluster.feed(Input::Start).is_empty(), "a second Start starts nothing");
}

#[test]
fn worker_is_admitted_once_and_only_when_ready() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    assert!(cluster.feed(Input::Spawned { worker: w(1) }).is_empty());
    assert!(cluster.feed(Input::Online { worker: w(1) }).is_empty());
    assert_eq!(cluster.supervisor.live_workers().count(), 0);
    assert_eq!(cluster.feed(Input::Ready { worker: w(1) }), [Action::Admit { worker: w(1) }]);
    assert!(cluster.feed(Input::Ready { worker: w(1) }).is_empty());
    assert_eq!(cluster.supervisor.live_workers().count(), 1);
    assert_eq!(cluster.state(1), SlotState::Ready);
}

#[test]
fn worker_that_is_not_ready_in_time_is_replaced_and_ended() {
    let mut cluster = Cluster::new(Plan { ready_timeout: Some(SECOND), ..plan(1) });
    cluster.feed(Input::Start);
    cluster.feed(Input::Spawned { worker: w(1) });
    assert!(cluster.pass(SECOND - Duration::from_millis(1)).is_empty());
    let out = cluster.wait();
    assert_eq!(out[..2], [Action::Suspend { worker: w(1) }, Action::Terminate { worker: w(1) }]);
    assert!(matches!(out[2], Action::Report(Report::Replacing { .. })));
    assert_eq!(spawned(&cluster.wait()), [(s(1), w(2))], "its successor does not wait for it");
    let out = cluster.wait();
    assert_eq!(out.last(), Some(&Action::Kill { worker: w(1) }), "SIGTERM did not help");
    assert_eq!(reason(&cluster.exit(1, Exit::Signal(9))), Reason::NeverReady);
}

#[test]
fn without_a_limit_a_worker_may_start_for_ever() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    cluster.feed(Input::Spawned { worker: w(1) });
    assert_eq!(cluster.supervisor.deadline(), None);
    assert!(cluster.pass(YEAR).is_empty());
}

#[test]
fn failed_spawn_is_told_as_gone_and_tried_again() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    let out = cluster.feed(Input::SpawnFailed { worker: w(1), transient: true });
    assert_eq!(reason(&out), Reason::Exited(Exit::NotStarted));
    assert!(will_restart(&out).is_some());
    assert!(cluster.feed(Input::SpawnFailed { worker: w(1), transient: true }).is_empty());
    assert_eq!(spawned(&cluster.wait()), [(s(1), w(2))]);
}

// ---- restart ----

#[test]
fn a_worker_that_served_has_its_successor_at_once() {
    let mut cluster = Cluster::ready(Plan { workers: 1, ..Plan::default() });
    let out = cluster.exit(1, Exit::Signal(9));
    assert_eq!(will_restart(&out), Some(Duration::ZERO));
    assert_eq!(spawned(&out), [(s(1), w(2))]);
    cluster.come_up(2);
    let out = cluster.exit(2, Exit::Signal(9));
    assert!(will_restart(&out).is_some_and(|wait| !wait.is_zero()), "the second in a row");
}

#[test]
fn exit_zero_is_an_end_like_any_other() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.now = cluster.now + STABLE;
    let out = cluster.exit(1, Exit::Code(0));
    assert_eq!(reason(&out), Reason::Exited(Exit::Code(0)));
    assert!(will_restart(&out).is_some_and(|wait| !wait.is_zero()));
    assert!(matches!(cluster.state(1), SlotState::Waiting { .. }));
    assert_eq!(spawned(&cluster.wait()), [(s(1), w(2))]);
}

#[test]
fn restarts_of_a_crashing_worker_wait_longer_and_longer() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    let mut waits = Vec::new();
    for n in 1..=5 {
        cluster.feed(Input::Spawned { worker: w(n) });
        waits.extend(will_restart(&cluster.exit(n, Exit::Code(1))));
        let out = cluster.wait();
        let attempt = u32::try_from(n).expect("small") + 1;
        assert_eq!(
            out,
            [Action::Spawn {
                slot: s(1),
                worker: w(n + 1),
                generation: 1,
                candidate: false,
                attempt
            }]
        );
    }
    assert!(waits.is_sorted(), "{waits:?}");
    assert!(waits[4] >= waits[0] * 12, "{waits:?}");
}

#[test]
fn slot_past_its_limit_rests_while_the_others_serve() {
    let mut cluster = Cluster::ready(plan(2));
    let (mut n, mut out) = (2, cluster.exit(2, Exit::Code(1)));
    for _ in 0..5 {
        assert!(will_restart(&out).is_some());
        n = spawned(&cluster.wait())[0].1.0;
        cluster.come_up(n);
        out = cluster.exit(n, Exit::Code(1));
    }
    assert_eq!((n, will_restart(&out)), (7, None));
    let window = Duration::from_secs(30);
    assert_eq!(out[1..], [Action::SlotFailed { slot: s(2), restarts: 5, window }]);
    assert_eq!(cluster.state(2), SlotState::Failed);
    assert_eq!(cluster.state(1), SlotState::Ready);
    assert!(cluster.pass(YEAR).is_empty(), "a failed slot stays so");
    assert!(!cluster.supervisor.is_finished());
}

// ---- at rest ----

fn plan_that_stops_on(workers: u32, codes: &str) -> Plan {
    let plan = plan(workers);
    let stop_on = codes.parse().expect("codes");
    Plan { restart: RestartPolicy { stop_on, ..plan.restart }, ..plan }
}

#[test]
fn an_exit_with_a_code_that_was_named_leaves_its_slot_at_rest() {
    let mut cluster = Cluster::ready(plan_that_stops_on(2, "3"));
    let out = cluster.exit(2, Exit::Code(3));
    assert_eq!(will_restart(&out), None);
    assert_eq!(out[1..], [Action::SlotRests { slot: s(2), exit: Exit::Code(3) }]);
    assert_eq!((cluster.state(1), cluster.state(2)), (SlotState::Ready, SlotState::Resting));
    assert!(cluster.pass(YEAR).is_empty(), "a slot at rest stays so");
    assert!(will_restart(&cluster.exit(1, Exit::Code(4))).is_some(), "another code is a restart");
    let out = cluster.feed(Input::Restart { slot: s(2) });
    assert!(spawned(&out).iter().any(|(slot, _)| *slot == s(2)), "{out:?}");
}

#[test]
fn the_end_of_a_worker_that_leaves_by_itself_says_whether_it_has_a_successor() {
    for (code, rests) in [(0, true), (1, false)] {
        let mut cluster = Cluster::ready(plan_that_stops_on(2, "0"));
        let out = cluster.feed(Input::Leaving { worker: w(1) });
        assert_eq!(out, [Action::Suspend { worker: w(1) }], "nothing is known yet");
        assert_eq!(cluster.state(1), SlotState::Draining);
        let out = cluster.exit(1, Exit::Code(code));
        assert_eq!(cluster.state(1) == SlotState::Resting, rests, "{out:?}");
        assert_eq!(will_restart(&out).is_none(), rests);
    }
}

#[test]
fn a_cluster_whose_slots_all_rest_has_ended_unless_it_is_to_stay() {
    for (codes, code, clean) in [("0,3", 3, true), ("any", 0, true), ("any", 3, false)] {
        let mut cluster = Cluster::ready(plan_that_stops_on(2, codes));
        cluster.exit(1, Exit::Code(code));
        let out = cluster.exit(2, Exit::Code(code));
        let last = Reason::Exited(Exit::Code(code));
        let outcome = Outcome::AtRest { last, clean };
        assert_eq!(out.last(), Some(&Action::Finished { outcome }));
    }
    let mut cluster = Cluster::ready(Plan { stay_at_rest: true, ..plan_that_stops_on(1, "any") });
    cluster.exit(1, Exit::Signal(9));
    assert!(!cluster.supervisor.is_finished());
    assert_eq!(spawned(&cluster.feed(Input::Restart { slot: s(1) })).len(), 1);
}

#[test]
fn a_slot_that_failed_is_not_covered_up_by_others_that_rest() {
    let plan = plan_that_stops_on(2, "0");
    let mut cluster = Cluster::ready(Plan {
        restart: RestartPolicy { limit: 0, ..plan.restart.clone() },
        ..plan
    });
    cluster.exit(1, Exit::Code(0));
    let out = cluster.exit(2, Exit::Code(1));
    let outcome = Outcome::AllFailed { last: Reason::Exited(Exit::Code(1)) };
    assert_eq!(out.last(), Some(&Action::Finished { outcome }));
}

#[test]
fn a_reload_runs_a_slot_at_rest_again_and_its_end_is_no_failure() {
    let plan = Plan { stay_at_rest: true, ..plan_that_stops_on(1, "any") };
    let mut cluster = Cluster::ready(plan);
    cluster.exit(1, Exit::Code(0));
    let reload = ReloadPlan { at_a_time: 0, probation: SECOND };
    let out = cluster.feed(Input::Reload(reload));
    assert_eq!(spawned(&out), [(s(1), w(2))]);
    cluster.feed(Input::Spawned { worker: w(2) });
    let out = cluster.exit(2, Exit::Code(0));
    let exit = Exit::Code(0);
    assert_eq!(
        out[1..],
        [Action::SlotRests { slot: s(1), exit }, Action::Reloaded { generation: 2, replaced: 1 }]
    );
    assert_eq!(cluster.state(1), SlotState::Resting);
    // One that stays is what serves from then on.
    cluster.feed(Input::Reload(reload));
    cluster.feed(Input::Spawned { worker: w(3) });
    cluster.feed(Input::Ready { worker: w(3) });
    cluster.pass(SECOND);
    assert_eq!(cluster.state(1), SlotState::Ready);
}

#[test]
fn a_worker_that_could_not_be_started_never_rests() {
    let mut cluster = Cluster::new(plan_that_stops_on(1, "any"));
    cluster.feed(Input::Start);
    let out = cluster.feed(Input::SpawnFailed { worker: w(1), transient: false });
    assert!(out.iter().any(|action| matches!(action, Action::Gone { will_restart: Some(_), .. })));
}

#[test]
fn a_worker_that_is_asked_to_leave_while_it_starts_does_not_overstay() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.feed(Input::AddOne);
    cluster.feed(Input::Spawned { worker: w(3) });
    assert!(cluster.feed(Input::RemoveOne).iter().any(|a| matches!(a, Action::TellStop { .. })));
    // It is still loading its program and hears nothing.
    let out = cluster.wait();
    assert_eq!(out, [Action::Terminate { worker: w(3) }]);
    assert_eq!(reason(&cluster.exit(3, Exit::Signal(15))), Reason::Asked);
}

#[test]
fn workers_that_never_get_ready_reach_the_limit_however_long_each_is_waited_for() {
    let ready_timeout = Some(Duration::from_secs(30));
    let mut cluster =
        Cluster::new(Plan { restart: RestartPolicy::default(), ready_timeout, ..plan(1) });
    cluster.feed(Input::Start);
    let mut n = 1;
    let failed = loop {
        cluster.feed(Input::Spawned { worker: w(n) });
        let started = cluster.now;
        let out = cluster.wait();
        assert_eq!(cluster.now.since(started), Duration::from_secs(30));
        assert!(out.contains(&Action::Terminate { worker: w(n) }), "{out:?}");
        let failed = out.iter().find(|action| matches!(action, Action::SlotFailed { .. })).cloned();
        cluster.exit(n, Exit::Signal(15));
        if failed.is_some() {
            break failed;
        }
        n = spawned(&cluster.wait())[0].1.0;
        assert!(n < 20, "restarted for ever");
    };
    assert_eq!(n, 6, "a first start and five more");
    let Some(Action::SlotFailed { restarts, window, .. }) = failed else { unreachable!() };
    assert_eq!(restarts, 5);
    assert!(window >= Duration::from_secs(180), "{window:?}");
    assert!(cluster.supervisor.is_finished());
}

#[test]
fn cluster_whose_slots_all_failed_ends_and_says_the_first_reason() {
    let restart = RestartPolicy::intensity(1, Duration::from_secs(30));
    let mut cluster = Cluster::new(Plan { restart, ..plan(1) });
    cluster.feed(Input::Start);
    cluster.feed(Input::Spawned { worker: w(1) });
    cluster.exit(1, Exit::Code(3));
    cluster.wait();
    cluster.feed(Input::Spawned { worker: w(2) });
    let out = cluster.exit(2, Exit::Signal(11));
    let first = Reason::Exited(Exit::Code(3));
    let last = Reason::Exited(Exit::Signal(11));
    let outcome = Outcome::NeverReady { first, last };
    assert_eq!(out.last(), Some(&Action::Finished { outcome }));
    assert!(cluster.feed(Input::AddOne).is_empty(), "nothing after the end");
}

#[test]
fn cluster_that_had_served_ends_as_all_failed() {
    let restart = RestartPolicy::intensity(0, SECOND);
    let mut cluster = Cluster::ready(Plan { restart, ..plan(1) });
    let out = cluster.exit(1, Exit::Code(1));
    let outcome = Outcome::AllFailed { last: Reason::Exited(Exit::Code(1)) };
    assert_eq!(out.last(), Some(&Action::Finished { outcome }));
}

#[test]
fn cluster_does_not_end_while_a_failed_slots_worker_still_leaves() {
    let restart = RestartPolicy::intensity(0, SECOND);
    let mut cluster = Cluster::ready(Plan { restart, ..plan(1) });
    let out = cluster.feed(Input::Leaving { worker: w(1) });
    assert!(out.iter().any(|a| matches!(a, Action::SlotFailed { .. })));
    assert!(!cluster.supervisor.is_finished());
    let out = cluster.exit(1, Exit::Code(0));
    assert!(matches!(out.last(), Some(Action::Finished { .. })));
}

#[test]
fn failed_slot_is_started_again_on_request_with_a_clean_record() {
    let restart = RestartPolicy::intensity(0, SECOND);
    let mut cluster = Cluster::ready(Plan { restart, ..plan(2) });
    cluster.exit(2, Exit::Code(1));
    assert_eq!(cluster.state(2), SlotState::Failed);
    let out = cluster.feed(Input::Restart { slot: s(2) });
    assert_eq!(
        out,
        [Action::Spawn { slot: s(2), worker: w(3), generation: 1, candidate: false, attempt: 1 }]
    );
    cluster.come_up(3);
    assert_eq!(cluster.state(2), SlotState::Ready);
}

#[test]
fn restart_of_a_running_slot_lets_its_worker_finish() {
    let mut cluster = Cluster::ready(plan(1));
    let out = cluster.feed(Input::Restart { slot: s(1) });
    assert_eq!(out[0], Action::Suspend { worker: w(1) });
    assert_eq!(spawned(&out), [(s(1), w(2))]);
    assert_eq!(cluster.supervisor.slot(s(1)).expect("exists").leaving, [w(1)]);
    assert_eq!(cluster.feed(Input::Restart { slot: s(9) }), [], "no such slot");
}

// ---- leaving ----

#[test]
fn stable_worker_that_leaves_is_replaced_without_a_wait() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.now = cluster.now + STABLE;
    let out = cluster.feed(Input::Leaving { worker: w(1) });
    assert_eq!(out[0], Action::Suspend { worker: w(1) });
    assert_eq!(spawned(&out), [(s(1), w(2))]);
    assert_eq!(cluster.supervisor.slot(s(1)).expect("exists").restarts, 1, "counted all the same");
    assert!(cluster.feed(Input::Drained { worker: w(1) }).is_empty(), "it knows: nothing is told");
    let out = cluster.exit(1, Exit::Code(0));
    assert_eq!((reason(&out), will_restart(&out)), (Reason::Voluntary, None));
}

#[test]
fn young_worker_that_leaves_is_replaced_after_a_wait() {
    let mut cluster = Cluster::ready(plan(1));
    let out = cluster.feed(Input::Leaving { worker: w(1) });
    assert_eq!(spawned(&out), []);
    assert!(matches!(cluster.state(1), SlotState::Waiting { .. }));
    assert_eq!(spawned(&cluster.wait()), [(s(1), w(2))]);
}

#[test]
fn disconnected_worker_is_drained_told_and_replaced() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.now = cluster.now + STABLE;
    let out = cluster.feed(Input::Disconnect { worker: w(2) });
    assert_eq!(out[0], Action::Suspend { worker: w(2) });
    assert_eq!(spawned(&out), [(s(2), w(3))]);
    let out = cluster.feed(Input::Drained { worker: w(2) });
    let grace = Plan::default().grace;
    assert_eq!(out, [Action::TellStop { worker: w(2), grace }]);
    assert!(cluster.feed(Input::Drained { worker: w(2) }).is_empty(), "told once");
    assert_eq!(reason(&cluster.exit(2, Exit::Code(0))), Reason::Asked);
}

#[test]
fn other_limits_hold_for_what_begins_after_them() {
    let mut cluster = Cluster::ready(plan(2));
    let tell = |cluster: &mut Cluster, n| {
        cluster.feed(Input::Disconnect { worker: w(n) });
        cluster.feed(Input::Drained { worker: w(n) })
    };
    let before = Plan::default().grace;
    assert_eq!(tell(&mut cluster, 1), [Action::TellStop { worker: w(1), grace: before }]);
    let restart = RestartPolicy::default();
    cluster.supervisor.set_limits(SupervisorLimits {
        ready_timeout: None,
        grace: SECOND,
        restart,
        stay_at_rest: false,
    });
    assert_eq!(tell(&mut cluster, 2), [Action::TellStop { worker: w(2), grace: SECOND }]);
    // The first one keeps the time it was promised.
    let out = cluster.pass(SECOND);
    assert!(out.contains(&Action::Terminate { worker: w(2) }), "{out:?}");
    assert!(!out.contains(&Action::Terminate { worker: w(1) }), "{out:?}");
}

#[test]
fn worker_that_outstays_its_grace_is_terminated_then_killed() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Disconnect { worker: w(1) });
    cluster.feed(Input::Drained { worker: w(1) });
    let mut all = Vec::new();
    let end = cluster.now + Plan::default().grace + Plan::default().kill_after;
    while cluster.now < end {
        all.extend(cluster.wait());
    }
    let mine: Vec<&Action> = all
        .iter()
        .filter(|a| matches!(a, Action::Terminate { .. } | Action::Kill { .. }))
        .collect();
    assert_eq!(mine, [&Action::Terminate { worker: w(1) }, &Action::Kill { worker: w(1) }]);
    assert!(all.contains(&Action::Report(Report::GraceExpired { worker: w(1) })));
    assert_eq!(reason(&cluster.exit(1, Exit::Signal(9))), Reason::GraceExpired);
}

#[test]
fn worker_that_survives_sigkill_is_reported_once() {
    let mut cluster = Cluster::ready(plan(1));
    assert_eq!(cluster.feed(Input::StopNow).last(), Some(&Action::Kill { worker: w(1) }));
    assert_eq!(cluster.wait(), [Action::Report(Report::Unkillable { worker: w(1) })]);
    assert_eq!(cluster.supervisor.deadline(), None);
    assert!(!cluster.supervisor.is_finished(), "it is still there");
}

#[test]
fn late_readiness_admits_nobody() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    cluster.feed(Input::Spawned { worker: w(1) });
    cluster.feed(Input::Disconnect { worker: w(1) });
    assert!(cluster.feed(Input::Ready { worker: w(1) }).is_empty());
    cluster.exit(1, Exit::Code(0));
    assert!(cluster.feed(Input::Ready { worker: w(1) }).is_empty(), "not even after its end");
}

#[test]
fn worker_whose_channel_closes_is_replaced_and_given_its_grace() {
    let mut cluster = Cluster::ready(plan(1));
    let out = cluster.feed(Input::ChannelClosed { worker: w(1) });
    assert_eq!(out[0], Action::Suspend { worker: w(1) });
    assert!(matches!(cluster.state(1), SlotState::Waiting { .. }));
    let told = cluster.feed(Input::Drained { worker: w(1) });
    assert!(!told.iter().any(|a| matches!(a, Action::TellStop { .. })), "there is no way to tell");
    let end = cluster.now + Plan::default().grace;
    while cluster.now < end {
        cluster.wait();
    }
    let out = cluster.exit(1, Exit::Signal(15));
    assert_eq!(reason(&out), Reason::GraceExpired);
}

#[test]
fn crash_that_shows_as_a_closed_channel_first_is_told_as_the_crash() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::ChannelClosed { worker: w(1) });
    let out = cluster.exit(1, Exit::Signal(11));
    assert_eq!(reason(&out), Reason::Exited(Exit::Signal(11)));
    assert!(will_restart(&out).is_some(), "the wait that began with the close");
}

#[test]
fn workers_that_leave_one_slot_at_their_leisure_are_bounded() {
    let restart = RestartPolicy::intensity(1000, SECOND);
    let mut cluster = Cluster::ready(Plan { restart, grace: YEAR, ..plan(1) });
    let mut hurried = Vec::new();
    for n in 1..40 {
        cluster.pass(SECOND);
        let mut out = cluster.feed(Input::Leaving { worker: w(n) });
        out.extend(cluster.pass(STABLE));
        hurried.extend(out.iter().filter_map(|action| match action {
            Action::Terminate { worker } => Some(*worker),
            _ => None,
        }));
        if spawned(&out).is_empty() {
            break;
        }
        cluster.come_up(n + 1);
    }
    let leaving = cluster.supervisor.slot(s(1)).expect("exists").leaving.len();
    assert_eq!(leaving, 2 * MAX_LEAVING, "even of those that nothing kills");
    assert_eq!(hurried[..3], [w(1), w(2), w(3)], "the oldest first");
    cluster.exit(1, Exit::Signal(9));
    assert_eq!(spawned(&cluster.wait()).len(), 1, "as soon as one is gone there is room again");
}

#[test]
fn worker_that_is_hurried_before_it_exists_is_hurried_once() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    let mut hurried = Vec::new();
    for _ in 0..MAX_LEAVING + 4 {
        let out = cluster.feed(Input::Restart { slot: s(1) });
        hurried.extend(out.iter().filter_map(|action| match action {
            Action::Report(Report::TooManyLeaving { worker, .. }) => Some(*worker),
            _ => None,
        }));
    }
    assert_eq!(hurried, [w(1), w(2), w(3), w(4)]);
    let out = cluster.feed(Input::Spawned { worker: w(1) });
    assert_eq!(out, [Action::Suspend { worker: w(1) }, Action::Kill { worker: w(1) }]);
}

// ---- unfit ----

#[test]
fn unfit_worker_is_ended_and_replaced_and_nobody_else_is_touched() {
    let mut cluster = Cluster::ready(plan(2));
    let reason_given = Reason::ProtocolFault;
    let out = cluster.feed(Input::Unfit { worker: w(1), reason: reason_given });
    assert_eq!(out[..2], [Action::Suspend { worker: w(1) }, Action::Terminate { worker: w(1) }]);
    assert!(!out.iter().any(|a| matches!(a, Action::Suspend { worker } if *worker == w(2))));
    assert_eq!(cluster.state(2), SlotState::Ready);
    assert!(cluster.feed(Input::Unfit { worker: w(1), reason: reason_given }).is_empty());
    assert_eq!(reason(&cluster.exit(1, Exit::Code(1))), Reason::ProtocolFault);
}

#[test]
fn worker_that_the_watchdog_gave_up_is_killed_when_sigterm_does_not_help() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Unfit { worker: w(1), reason: Reason::Watchdog });
    let out = cluster.pass(Plan::default().kill_after);
    assert!(out.contains(&Action::Kill { worker: w(1) }));
    assert_eq!(reason(&cluster.exit(1, Exit::Signal(9))), Reason::Watchdog);
}

#[test]
fn fault_is_not_hidden_by_a_later_wish() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Unfit { worker: w(1), reason: Reason::ProtocolFault });
    cluster.feed(Input::StopNow);
    assert_eq!(reason(&cluster.exit(1, Exit::Signal(9))), Reason::ProtocolFault);
}

#[test]
fn fault_tells_more_than_the_wish_before_it() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Stop);
    cluster.feed(Input::Unfit { worker: w(1), reason: Reason::ProtocolFault });
    assert_eq!(reason(&cluster.exit(1, Exit::Signal(15))), Reason::ProtocolFault);
}

#[test]
fn want_of_memory_is_told_before_any_other_reason() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Unfit { worker: w(1), reason: Reason::Watchdog });
    let exit = Exit::Signal(9);
    let out = cluster.feed(Input::Exited { worker: w(1), exit, out_of_memory: true });
    assert_eq!(reason(&out), Reason::OutOfMemory);
}

// ---- kill through the API ----

#[test]
fn signal_that_was_asked_for_explains_the_end() {
    let mut cluster = Cluster::ready(plan(1));
    let out = cluster.feed(Input::Kill { worker: w(1), signal: 15 });
    assert_eq!(out, [Action::Signal { worker: w(1), signal: 15 }]);
    let out = cluster.exit(1, Exit::Code(0));
    assert_eq!(reason(&out), Reason::Asked);
    assert!(will_restart(&out).is_some());
}

#[test]
fn signal_that_ends_nobody_does_not_explain_a_crash() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Kill { worker: w(1), signal: 10 });
    let out = cluster.exit(1, Exit::Code(1));
    assert_eq!(reason(&out), Reason::Exited(Exit::Code(1)));
}

#[test]
fn signal_for_a_worker_without_a_process_waits_for_it() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    assert!(cluster.feed(Input::Kill { worker: w(1), signal: 9 }).is_empty());
    let out = cluster.feed(Input::Spawned { worker: w(1) });
    assert_eq!(out, [Action::Signal { worker: w(1), signal: 9 }]);
}

// ---- stop ----

#[test]
fn stop_drains_then_tells_then_waits_for_everybody() {
    let mut cluster = Cluster::ready(plan(2));
    let out = cluster.feed(Input::Stop);
    assert_eq!(out, [Action::Suspend { worker: w(1) }, Action::Suspend { worker: w(2) }]);
    let grace = Plan::default().grace;
    let out = cluster.feed(Input::Drained { worker: w(1) });
    assert_eq!(out, [Action::TellStop { worker: w(1), grace }]);
    let out = cluster.pass(DRAIN_LIMIT);
    assert_eq!(out, [Action::TellStop { worker: w(2), grace }], "nobody said Drained in time");
    assert_eq!(will_restart(&cluster.exit(1, Exit::Code(0))), None);
    let out = cluster.exit(2, Exit::Code(0));
    assert_eq!(out.last(), Some(&Action::Finished { outcome: Outcome::Stopped }));
}

#[test]
fn stop_before_start_is_over_at_once() {
    let mut cluster = Cluster::new(plan(2));
    let out = cluster.feed(Input::Stop);
    assert_eq!(out, [Action::Finished { outcome: Outcome::Stopped }]);
    assert!(cluster.feed(Input::Start).is_empty());
}

#[test]
fn worker_that_is_being_started_is_told_as_soon_as_it_exists() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    assert!(cluster.feed(Input::Stop).is_empty());
    let grace = START_GRACE;
    let out = cluster.feed(Input::Spawned { worker: w(1) });
    assert_eq!(out, [Action::Suspend { worker: w(1) }, Action::TellStop { worker: w(1), grace }]);
    assert!(cluster.feed(Input::Ready { worker: w(1) }).is_empty());
    let out = cluster.wait();
    assert!(out.contains(&Action::Terminate { worker: w(1) }), "it serves nothing: short grace");
    let out = cluster.exit(1, Exit::Signal(15));
    assert_eq!(out.last(), Some(&Action::Finished { outcome: Outcome::Stopped }));
}

#[test]
fn spawn_that_fails_during_a_stop_ends_it() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    cluster.feed(Input::Stop);
    let out = cluster.feed(Input::SpawnFailed { worker: w(1), transient: true });
    assert_eq!(will_restart(&out), None);
    assert_eq!(out.last(), Some(&Action::Finished { outcome: Outcome::Stopped }));
}

#[test]
fn stop_cancels_restarts_that_wait() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.exit(1, Exit::Code(1));
    cluster.feed(Input::Stop);
    assert_eq!(spawned(&cluster.pass(STABLE)), []);
    cluster.exit(2, Exit::Code(0));
    assert!(cluster.supervisor.is_finished());
}

#[test]
fn second_stop_means_now() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.feed(Input::Stop);
    let out = cluster.feed(Input::Stop);
    assert_eq!(out, [Action::Kill { worker: w(1) }, Action::Kill { worker: w(2) }]);
    assert!(cluster.feed(Input::Stop).is_empty(), "a third one adds nothing");
}

#[test]
fn stop_now_also_ends_workers_that_are_being_started() {
    let mut cluster = Cluster::new(plan(1));
    cluster.feed(Input::Start);
    assert!(cluster.feed(Input::StopNow).is_empty());
    let out = cluster.feed(Input::Spawned { worker: w(1) });
    assert_eq!(out.last(), Some(&Action::Kill { worker: w(1) }));
}

#[test]
fn stop_wins_over_every_later_wish() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Stop);
    let wishes = [
        Input::Start,
        Input::Scale { workers: 9 },
        Input::AddOne,
        Input::RemoveOne,
        Input::Fork,
        Input::Restart { slot: s(1) },
    ];
    for wish in wishes {
        let out = cluster.feed(wish);
        assert_eq!(out, [Action::Report(Report::IgnoredWhileStopping)], "{wish:?}");
    }
    cluster.exit(1, Exit::Code(1));
    assert!(cluster.supervisor.is_finished());
}

#[test]
fn another_grace_counts_from_now_for_those_that_stop_and_for_those_to_come() {
    for grace in [SECOND, YEAR] {
        let mut cluster = Cluster::ready(plan(1));
        cluster.feed(Input::Stop);
        cluster.feed(Input::Drained { worker: w(1) });
        cluster.pass(SECOND);
        assert_eq!(cluster.feed(Input::Grace { grace }), []);
        assert_eq!(cluster.supervisor.deadline(), Some(cluster.now + grace));
        assert_eq!(
            cluster.wait(),
            [
                Action::Report(Report::GraceExpired { worker: w(1) }),
                Action::Terminate { worker: w(1) }
            ]
        );
        let mut cluster = Cluster::ready(plan(1));
        cluster.feed(Input::Grace { grace });
        cluster.feed(Input::Stop);
        let told = cluster.feed(Input::Drained { worker: w(1) });
        assert_eq!(told, [Action::TellStop { worker: w(1), grace }]);
    }
}

#[test]
fn another_grace_does_not_save_who_was_sent_sigterm() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Stop);
    cluster.feed(Input::Drained { worker: w(1) });
    cluster.wait();
    let before = cluster.supervisor.deadline();
    cluster.feed(Input::Grace { grace: YEAR });
    assert_eq!(cluster.supervisor.deadline(), before);
}

#[test]
fn stop_does_not_lengthen_the_grace_of_those_already_leaving() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Disconnect { worker: w(1) });
    cluster.feed(Input::Drained { worker: w(1) });
    cluster.pass(Plan::default().grace - SECOND);
    cluster.feed(Input::Stop);
    let out = cluster.pass(SECOND);
    assert!(out.contains(&Action::Terminate { worker: w(1) }));
}

// ---- scale ----

#[test]
fn scaling_down_drains_the_highest_slots_and_retires_them_when_empty() {
    let mut cluster = Cluster::ready(plan(4));
    let mut out = cluster.feed(Input::Scale { workers: 2 });
    out.sort_by_key(|action| format!("{action:?}"));
    assert_eq!(out, [Action::Suspend { worker: w(3) }, Action::Suspend { worker: w(4) }]);
    assert_eq!(cluster.supervisor.target(), 2);
    cluster.feed(Input::Drained { worker: w(4) });
    let out = cluster.exit(4, Exit::Code(0));
    assert_eq!((reason(&out), will_restart(&out)), (Reason::Asked, None));
    assert_eq!(out.last(), Some(&Action::SlotRetired { slot: s(4) }));
    assert_eq!(cluster.state(3), SlotState::Draining);
    assert_eq!(cluster.supervisor.live_workers().count(), 2);
}

#[test]
fn scaling_up_again_uses_a_slot_whose_worker_still_leaves() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.feed(Input::RemoveOne);
    let out = cluster.feed(Input::AddOne);
    assert_eq!(spawned(&out), [(s(2), w(3))]);
    assert_eq!(cluster.supervisor.slot(s(2)).expect("exists").leaving, [w(2)]);
    let out = cluster.exit(2, Exit::Code(0));
    assert!(!out.iter().any(|a| matches!(a, Action::SlotRetired { .. })));
    assert_eq!(will_restart(&out), None);
}

#[test]
fn scaling_down_cancels_a_restart_that_waits() {
    let mut cluster = Cluster::ready(plan(2));
    cluster.exit(2, Exit::Code(1));
    assert_eq!(cluster.feed(Input::RemoveOne), [Action::SlotRetired { slot: s(2) }]);
    assert_eq!(spawned(&cluster.pass(STABLE)), []);
}

#[test]
fn failed_slots_count_as_slots() {
    let restart = RestartPolicy::intensity(0, SECOND);
    let mut cluster = Cluster::ready(Plan { restart, ..plan(2) });
    cluster.exit(1, Exit::Code(1));
    assert_eq!(cluster.feed(Input::Scale { workers: 2 }), []);
    assert_eq!(spawned(&cluster.feed(Input::AddOne)), [(s(3), w(3))]);
}

#[test]
fn the_last_slot_is_not_removed_by_removing_one() {
    let mut cluster = Cluster::ready(plan(1));
    assert_eq!(cluster.feed(Input::RemoveOne), [Action::Report(Report::LastSlot)]);
    assert_eq!(cluster.state(1), SlotState::Ready);
}

#[test]
fn scaling_to_nothing_rests_and_does_not_end_the_cluster() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Scale { workers: 0 });
    cluster.exit(1, Exit::Code(0));
    assert!(!cluster.supervisor.is_finished());
    assert_eq!(spawned(&cluster.feed(Input::AddOne)), [(s(1), w(2))]);
}

#[test]
fn more_slots_than_the_most_are_refused_with_a_report() {
    let mut cluster = Cluster::new(plan(u32::MAX));
    let out = cluster.feed(Input::Start);
    assert_eq!(spawned(&out).len(), MAX_SLOTS as usize);
    let report = Report::TooManySlots { asked: u32::MAX, given: MAX_SLOTS };
    assert!(out.contains(&Action::Report(report)));
    let report = Report::TooManySlots { asked: 1, given: 0 };
    assert_eq!(cluster.feed(Input::Fork), [Action::Report(report)]);
}

// ---- fork, and Node's own behaviour ----

#[test]
fn forked_worker_is_neither_counted_nor_replaced() {
    let mut cluster = Cluster::ready(plan(2));
    assert_eq!(spawned(&cluster.feed(Input::Fork)), [(s(3), w(3))]);
    assert_eq!(cluster.supervisor.target(), 2);
    cluster.come_up(3);
    let out = cluster.exit(3, Exit::Code(1));
    assert_eq!(will_restart(&out), None);
    assert_eq!(out.last(), Some(&Action::SlotRetired { slot: s(3) }));
    assert_eq!(spawned(&cluster.feed(Input::Fork)), [(s(3), w(4))], "its place is used again");
}

#[test]
fn scaling_leaves_forked_workers_alone() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Fork);
    cluster.come_up(2);
    assert_eq!(spawned(&cluster.feed(Input::Scale { workers: 2 })), [(s(3), w(3))]);
    cluster.come_up(3);
    assert_eq!(cluster.feed(Input::Scale { workers: 1 }), [Action::Suspend { worker: w(3) }]);
}

#[test]
fn without_supervision_nothing_is_restarted_and_the_cluster_does_not_end() {
    let mut cluster = Cluster::ready(Plan { supervise: false, ..plan(1) });
    let out = cluster.exit(1, Exit::Code(1));
    assert_eq!(will_restart(&out), None);
    assert_eq!(out[1..], [Action::SlotRetired { slot: s(1) }]);
    assert_eq!(cluster.supervisor.deadline(), None);
    assert!(!cluster.supervisor.is_finished());
    assert_eq!(spawned(&cluster.feed(Input::Fork)), [(s(1), w(2))]);
}

#[test]
fn without_supervision_a_disconnected_worker_may_live_on_until_stop() {
    let mut cluster = Cluster::ready(Plan { supervise: false, ..plan(1) });
    cluster.feed(Input::ChannelClosed { worker: w(1) });
    cluster.feed(Input::Drained { worker: w(1) });
    assert_eq!(cluster.supervisor.deadline(), None);
    assert!(cluster.pass(YEAR).is_empty());
    cluster.feed(Input::Stop);
    let out = cluster.pass(Plan::default().grace);
    assert!(out.contains(&Action::Terminate { worker: w(1) }));
}

#[test]
fn forked_worker_never_hurries_one_that_lives_on() {
    let mut cluster = Cluster::new(Plan { supervise: false, ..plan(0) });
    for n in 1..=30 {
        let out = cluster.feed(Input::Fork);
        assert_eq!(spawned(&out).len(), 1);
        cluster.come_up(n);
        let mut out = cluster.feed(Input::Disconnect { worker: w(n) });
        out.extend(cluster.pass(YEAR));
        assert!(!out.iter().any(|a| matches!(a, Action::Terminate { .. })), "{n}");
    }
    assert_eq!(cluster.supervisor.workers().count(), 30);
}

// ---- time ----

#[test]
fn clock_that_goes_back_stands_still() {
    let mut cluster = Cluster::ready(plan(1));
    let out = cluster.exit(1, Exit::Code(1));
    let wait = will_restart(&out).expect("a restart");
    let before = cluster.now;
    cluster.now = Time::ZERO;
    assert!(cluster.feed(Input::Tick).is_empty());
    cluster.feed(Input::AddOne);
    let view = cluster.supervisor.worker(w(2)).expect("it is being started");
    assert_eq!(view.started, before);
    cluster.feed(Input::RemoveOne);
    assert_eq!(cluster.supervisor.deadline(), Some(before + wait));
    cluster.now = before + wait;
    assert_eq!(spawned(&cluster.feed(Input::Tick)), [(s(1), w(3))]);
}

#[test]
fn clock_that_jumps_a_year_ahead_moves_each_worker_one_step() {
    let mut cluster = Cluster::ready(plan(1));
    cluster.feed(Input::Stop);
    let grace = Plan::default().grace;
    assert_eq!(cluster.pass(YEAR), [Action::TellStop { worker: w(1), grace }]);
    let state = cluster.supervisor.worker(w(1)).expect("still there").state;
    assert_eq!(state, WorkerState::Stopping, "its grace begins now");
}

#[test]
fn the_end_of_time_is_survived() {
    let mut cluster = Cluster::new(plan(1));
    cluster.now = Time::new(Duration::MAX);
    cluster.feed(Input::Start);
    cluster.feed(Input::Spawned { worker: w(1) });
    cluster.exit(1, Exit::Code(1));
    cluster.feed(Input::Tick);
    cluster.feed(Input::Spawned { worker: w(2) });
    cluster.feed(Input::Stop);
    cluster.feed(Input::StopNow);
    cluster.exit(2, Exit::Signal(9));
    assert!(cluster.supervisor.is_finished());
}

#[test]
fn same_seed_same_waits() {
    let play = |seed| {
        let mut cluster = Cluster::ready(Plan { seed, ..plan(1) });
        will_restart(&cluster.exit(1, Exit::Code(1)))
    };
    assert_eq!(play(7), play(7));
    assert_ne!(play(7), play(8));
}

#[test]
fn reasons_read_well() {
    let told = [
        (Reason::Exited(Exit::Code(3)), "exited with code 3"),
        (Reason::Exited(Exit::Signal(9)), "ended by SIGKILL"),
        (Reason::Exited(Exit::Signal(40)), "ended by signal 40"),
        (Reason::OutOfMemory, "out of memory"),
        (Reason::NeverReady, "never got ready"),
    ];
    for (reason, text) in told {
        assert_eq!(reason.to_string(), text);
    }
}

/// A supervisor in the middle of its life, written down.
fn written() -> Vec<u8> {
    let mut supervisor = Supervisor::new(plan(3));
    let mut out = Vec::new();
    let mut at = |supervisor: &mut Supervisor, seconds, input| {
        supervisor.handle(Time::new(Duration::from_secs(seconds)), input, &mut out);
    };
    at(&mut supervisor, 1, Input::Start);
    for worker in [1, 2, 3].map(WorkerId) {
        at(&mut supervisor, 2, Input::Spawned { worker });
        at(&mut supervisor, 3, Input::Ready { worker });
    }
    let (worker, exit) = (WorkerId(2), Exit::Code(1));
    at(&mut supervisor, 4, Input::Exited { worker, exit, out_of_memory: false });
    at(&mut supervisor, 4, Input::Disconnect { worker: WorkerId(3) });
    postcard::to_stdvec(&supervisor.snapshot().expect("nothing is in the way")).expect("written")
}

#[test]
fn fault_37_a_damaged_snapshot_is_refused_or_harmless() {
    let good = written();
    let (mut refused, mut harmless) = (0, 0);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut damaged = good.clone();
            damaged[at] ^= 1 << bit;
            let Ok(snapshot) = postcard::from_bytes(&damaged) else {
                refused += 1;
                continue;
            };
            let Ok(mut supervisor) = Supervisor::restore(snapshot) else {
                refused += 1;
                continue;
            };
            harmless += 1;
            let mut out = Vec::new();
            for seconds in [5, 10, 3600] {
                supervisor.handle(Time::new(Duration::from_secs(seconds)), Input::Tick, &mut out);
            }
            supervisor.handle(Time::new(Duration::from_secs(3601)), Input::Stop, &mut out);
        }
    }
    println!("{} bytes: {refused} refused, {harmless} harmless", good.len());
    assert!(refused > 0 && harmless > 0);
}

#[test]
fn what_is_under_way_that_cannot_be_carried_is_named() {
    let mut supervisor = Supervisor::new(Plan { workers: 1, ..Plan::default() });
    let mut out = Vec::new();
    assert_eq!(supervisor.snapshot().err(), Some(NotNow::NotStarted));
    supervisor.handle(Time::ZERO, Input::Start, &mut out);
    assert_eq!(supervisor.snapshot().err(), Some(NotNow::Spawning));
    let worker = WorkerId(1);
    supervisor.handle(Time::ZERO, Input::Spawned { worker }, &mut out);
    supervisor.handle(Time::ZERO, Input::Ready { worker }, &mut out);
    assert!(supervisor.snapshot().is_ok());
    let plan = ReloadPlan { at_a_time: 0, probation: Duration::ZERO };
    supervisor.handle(Time::ZERO, Input::Reload(plan), &mut out);
    assert_eq!(supervisor.snapshot().err(), Some(NotNow::Reloading));
    supervisor.handle(Time::ZERO, Input::Stop, &mut out);
    assert_eq!(supervisor.snapshot().err(), Some(NotNow::Stopping));
}
