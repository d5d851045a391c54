//! What the hand-over promises, one test per promise. Random orders are in `simulation`.
//!
//! Connections are numbers here, given in the order they are offered; a batch of assignments is written as
//! `[(worker, connection)]`.

use std::collections::BTreeMap;
use std::time::Duration;

use polyfork_core::{Assignment, Counters, Handoff, HandoffConfig, HandoffFault, Time, WorkerId};
use proptest::prelude::*;

/// A hand-over with a clock in the test's hand.
struct Port {
    handoff: Handoff<u32>,
    now: Time,
    offered: u32,
    /// What is under way: number to worker and connection.
    sent: BTreeMap<u64, (u64, u32)>,
}

impl Port {
    fn new(workers: u64, config: HandoffConfig) -> Port {
        let mut handoff = Handoff::new(config);
        (1..=workers).for_each(|n| handoff.join(w(n), 0));
        Port { handoff, now: Time::ZERO, offered: 0, sent: BTreeMap::new() }
    }

    fn offer(&mut self, count: u32) {
        for _ in 0..count {
            assert_eq!(self.handoff.offer(self.now, self.offered), None);
            self.offered += 1;
        }
    }

    fn assign(&mut self) -> Vec<(u64, u32)> {
        let mut out: Vec<Assignment<u32>> = Vec::new();
        self.handoff.assign(self.now, &mut out);
        out.iter().map(|a| self.enter(a)).collect()
    }

    fn enter(&mut self, assignment: &Assignment<u32>) -> (u64, u32) {
        let what = (assignment.worker.0, assignment.connection);
        self.sent.insert(assignment.seq, what);
        what
    }

    /// The number under which this connection was sent last.
    fn seq(&self, connection: u32) -> u64 {
        let found = self.sent.iter().rev().find(|(_, (_, c))| *c == connection);
        *found.expect("it was sent").0
    }

    fn acknowledge(&mut self, connection: u32) -> Result<u32, HandoffFault> {
        let seq = self.seq(connection);
        let worker = self.sent[&seq].0;
        self.handoff.acknowledged(w(worker), seq).map(|accepted| accepted.connection)
    }

    fn refuse(&mut self, connection: u32) -> Result<(), HandoffFault> {
        let seq = self.seq(connection);
        let worker = self.sent[&seq].0;
        self.handoff.refused(self.now, w(worker), seq)
    }
}

fn w(n: u64) -> WorkerId {
    WorkerId(n)
}

fn window(window: usize) -> HandoffConfig {
    HandoffConfig { window, ..HandoffConfig::default() }
}

const ACK_LIMIT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(25);

// ---- turns and room ----

#[test]
fn connections_go_round_in_exact_turns() {
    let mut port = Port::new(3, window(8));
    port.offer(7);
    let expected = [(1, 0), (2, 1), (3, 2), (1, 3), (2, 4), (3, 5), (1, 6)];
    assert_eq!(port.assign(), expected);
}

#[test]
fn no_worker_has_more_under_way_than_its_window() {
    let mut port = Port::new(2, window(2));
    port.offer(4);
    assert_eq!(port.handoff.room(), 0);
    assert_eq!(port.assign().len(), 4);
    assert_eq!(port.handoff.room(), 0);
    port.offer(1);
    assert_eq!(port.assign(), [], "both windows are full");
    assert_eq!(port.acknowledge(1), Ok(1));
    assert_eq!(port.assign(), [(2, 4)]);
}

#[test]
fn without_workers_nothing_is_accepted() {
    let mut port = Port::new(0, window(8));
    assert_eq!(port.handoff.room(), 0);
    port.handoff.join(w(1), 3);
    assert_eq!(port.handoff.room(), 3);
    port.handoff.suspend(w(1));
    assert_eq!(port.handoff.room(), 0);
}

#[test]
fn windows_are_taken_into_their_range() {
    let mut port = Port::new(0, window(1000));
    port.handoff.join(w(1), 0);
    port.handoff.join(w(2), usize::MAX);
    assert_eq!(port.handoff.room(), 2 * HandoffConfig::MAX_WINDOW);
}

#[test]
fn room_never_exceeds_the_queue() {
    let mut port = Port::new(4, HandoffConfig { queue_limit: 5, ..window(8) });
    assert_eq!(port.handoff.room(), 5);
    port.offer(3);
    assert_eq!(port.handoff.room(), 2);
}

#[test]
fn queue_holds_at_least_one() {
    let port = Port::new(1, HandoffConfig { queue_limit: 0, ..window(8) });
    assert_eq!(port.handoff.room(), 1);
}

#[test]
fn full_queue_sheds_what_is_offered_and_says_so() {
    let mut port = Port::new(0, HandoffConfig { queue_limit: 2, ..window(8) });
    port.offer(2);
    assert_eq!(port.handoff.offer(port.now, 77), Some(77), "it comes back to the caller");
    let counters = port.handoff.counters();
    assert_eq!((counters.offered, counters.queued, counters.shed), (3, 2, 1));
}

#[test]
fn worker_that_was_full_is_owed_its_turns() {
    let mut port = Port::new(2, window(2));
    port.offer(4);
    port.assign();
    for connection in [1, 3] {
        port.acknowledge(connection).unwrap();
    }
    port.offer(2);
    assert_eq!(port.assign(), [(2, 4), (2, 5)], "worker 1 is full");
    for connection in [0, 2, 4, 5] {
        port.acknowledge(connection).unwrap();
    }
    port.offer(4);
    assert_eq!(port.assign(), [(1, 6), (1, 7), (2, 8), (2, 9)], "two turns are made up");
}

// ---- death ----

#[test]
fn unacknowledged_connections_of_a_dead_worker_go_to_another_in_their_old_order() {
    let mut port = Port::new(2, window(2));
    port.offer(4);
    port.assign();
    port.offer(2);
    assert_eq!(port.handoff.died(w(1)), 2);
    assert_eq!(port.assign(), [], "worker 2 is full");
    for connection in [1, 3] {
        port.acknowledge(connection).unwrap();
    }
    assert_eq!(port.assign(), [(2, 0), (2, 2)], "the oldest before the newer ones");
    assert_eq!(port.handoff.counters().rehanded, 2);
    for connection in [0, 2] {
        port.acknowledge(connection).unwrap();
    }
    assert_eq!(port.assign(), [(2, 4), (2, 5)]);
}

#[test]
fn acknowledged_connections_of_a_dead_worker_are_not_handed_out_again() {
    let mut port = Port::new(2, window(4));
    port.offer(4);
    port.assign();
    assert_eq!(port.acknowledge(0), Ok(0), "read from its channel after it died");
    assert_eq!(port.handoff.died(w(1)), 1);
    assert_eq!(port.assign(), [(2, 2)]);
}

#[test]
fn death_of_worker_after_worker_keeps_the_order_of_arrival() {
    let mut port = Port::new(3, window(2));
    port.offer(6);
    port.assign();
    port.handoff.died(w(3));
    port.handoff.died(w(1));
    port.handoff.died(w(2));
    port.handoff.join(w(4), 6);
    let order: Vec<u32> = port.assign().into_iter().map(|(_, connection)| connection).collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn all_workers_dead_holds_what_waits_until_one_comes() {
    let mut port = Port::new(1, window(8));
    port.offer(2);
    port.assign();
    port.handoff.died(w(1));
    assert_eq!((port.assign(), port.handoff.room()), (vec![], 0));
    assert_eq!(port.handoff.deadline(), None);
    port.handoff.join(w(2), 0);
    assert_eq!(port.assign(), [(2, 0), (2, 1)]);
}

// ---- suspend ----

#[test]
fn suspended_worker_gets_nothing_new_and_may_still_acknowledge() {
    let mut port = Port::new(2, window(8));
    port.offer(2);
    port.assign();
    port.handoff.suspend(w(1));
    port.offer(2);
    assert_eq!(port.assign(), [(2, 2), (2, 3)]);
    assert_eq!(port.acknowledge(0), Ok(0));
    assert_eq!(port.handoff.in_flight(w(1)), 0);
}

#[test]
fn worker_that_listens_again_takes_part_again_without_a_flood() {
    let mut port = Port::new(2, window(64));
    port.handoff.suspend(w(1));
    port.offer(10);
    port.assign();
    port.handoff.join(w(1), 0);
    port.offer(4);
    let order: Vec<u64> = port.assign().into_iter().map(|(worker, _)| worker).collect();
    assert_eq!(order.iter().filter(|worker| **worker == 1).count(), 2, "{order:?}");
}

// ---- refusal ----

#[test]
fn refused_connection_goes_to_another_worker_first_of_all() {
    let mut port = Port::new(2, window(8));
    port.offer(1);
    assert_eq!(port.assign(), [(1, 0)]);
    port.offer(1);
    port.refuse(0).unwrap();
    assert_eq!(port.assign(), [(2, 0), (2, 1)]);
    assert_eq!(port.handoff.counters().refused, 1);
}

#[test]
fn connection_that_everybody_refuses_is_held_for_a_pause_not_bounced() {
    let mut port = Port::new(2, window(8));
    port.offer(1);
    for _ in 0..2 {
        assert_eq!(port.assign().len(), 1);
        port.refuse(0).unwrap();
    }
    assert_eq!(port.assign(), []);
    assert_eq!(port.handoff.room(), 0);
    assert_eq!(port.handoff.deadline(), Some(port.now + PAUSE));
    port.now = port.now + PAUSE;
    assert_eq!(port.assign().len(), 1);
}

// ---- lies ----

#[test]
fn acknowledgement_of_a_number_never_sent_is_a_fault() {
    let mut port = Port::new(1, window(8));
    port.offer(1);
    port.assign();
    for seq in [0, 2, u64::MAX] {
        let fault = HandoffFault::NeverSent { worker: w(1), seq };
        assert_eq!(port.handoff.acknowledged(w(1), seq), Err(fault));
        assert_eq!(port.handoff.refused(port.now, w(1), seq), Err(fault));
    }
    assert_eq!(port.acknowledge(0), Ok(0), "what it owes is untouched");
}

#[test]
fn second_acknowledgement_is_a_fault() {
    let mut port = Port::new(1, window(8));
    port.offer(1);
    port.assign();
    let seq = port.seq(0);
    port.acknowledge(0).unwrap();
    let fault = HandoffFault::Settled { worker: w(1), seq };
    assert_eq!(port.acknowledge(0), Err(fault));
    assert_eq!(port.refuse(0), Err(fault), "nor can it be refused any more");
    assert_eq!(port.handoff.counters().acknowledged, 1);
}

#[test]
fn acknowledgement_of_anothers_connection_is_a_fault_and_harms_nobody() {
    let mut port = Port::new(2, window(8));
    port.offer(2);
    port.assign();
    let seq = port.seq(1);
    let fault = HandoffFault::NotYours { worker: w(1), seq, owner: w(2) };
    assert_eq!(port.handoff.acknowledged(w(1), seq), Err(fault));
    assert_eq!(port.acknowledge(1), Ok(1), "its owner acknowledges as ever");
}

#[test]
fn late_acknowledgement_is_refused() {
    let mut port = Port::new(2, window(8));
    port.offer(1);
    port.assign();
    let seq = port.seq(0);
    assert_eq!(port.handoff.take_back(port.now, w(1), &[seq, 99]), 1);
    assert_eq!(port.assign(), [(2, 0)]);
    let fault = HandoffFault::Revoked { worker: w(1), seq };
    assert_eq!(port.handoff.acknowledged(w(1), seq), Err(fault));
    assert_eq!(port.acknowledge(0), Ok(0), "it belongs to the other one");
}

#[test]
fn answer_of_a_worker_that_takes_no_part_is_a_fault() {
    let mut port = Port::new(1, window(8));
    port.offer(1);
    port.assign();
    let seq = port.seq(0);
    port.handoff.died(w(1));
    for worker in [w(1), w(9)] {
        let fault = HandoffFault::NotAMember { worker, seq };
        assert_eq!(port.handoff.acknowledged(worker, seq), Err(fault));
    }
    assert_eq!(port.handoff.counters().queued, 1);
}

// ---- stalls ----

#[test]
fn stalled_worker_loses_its_turns_until_it_acknowledges() {
    let mut port = Port::new(2, window(8));
    port.offer(2);
    port.assign();
    port.acknowledge(1).unwrap();
    assert_eq!(port.handoff.deadline(), Some(Time::ZERO + ACK_LIMIT));
    port.now = port.now + ACK_LIMIT;
    port.offer(2);
    assert_eq!(port.assign(), [(2, 2), (2, 3)]);
    let overdue: Vec<_> = port.handoff.overdue(port.now).collect();
    assert_eq!(overdue, [(w(1), Time::ZERO)]);
    port.acknowledge(0).unwrap();
    assert_eq!(port.handoff.overdue(port.now).count(), 0);
    port.offer(1);
    assert_eq!(port.assign(), [(1, 4)], "it is owed a turn");
}

#[test]
fn slow_worker_that_answers_is_not_stalled() {
    let mut port = Port::new(1, window(8));
    port.offer(3);
    port.assign();
    for connection in 0..3 {
        port.now = port.now + ACK_LIMIT * 9 / 10;
        port.assign();
        port.acknowledge(connection).unwrap();
        assert_eq!(port.handoff.overdue(port.now).count(), 0);
    }
}

#[test]
fn worker_that_connections_were_taken_back_from_is_tried_with_one() {
    let mut port = Port::new(1, window(8));
    port.offer(4);
    port.assign();
    port.now = port.now + ACK_LIMIT;
    let owed: Vec<u64> = port.handoff.unanswered(w(1)).collect();
    assert_eq!(port.handoff.take_back(port.now, w(1), &owed), 4);
    assert_eq!(port.assign(), [], "not at once");
    port.now = port.handoff.deadline().expect("its pause ends");
    assert_eq!(port.assign(), [(1, 0)]);
    assert_eq!(port.assign(), [], "one at a time");
    port.acknowledge(0).unwrap();
    assert_eq!(port.assign().len(), 3, "it lives");
}

#[test]
fn silent_worker_is_tried_less_and_less_often() {
    let mut port = Port::new(1, window(8));
    port.offer(2);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        port.assign();
        port.now = port.now + ACK_LIMIT;
        let owed: Vec<u64> = port.handoff.unanswered(w(1)).collect();
        // One by one counts as once.
        for seq in &owed {
            assert_eq!(port.handoff.take_back(port.now, w(1), &[*seq]), 1);
        }
        let until = port.handoff.deadline().expect("its pause ends");
        pauses.push(until.since(port.now).as_secs());
        port.now = until;
    }
    assert_eq!(pauses, [1, 2, 4, 4]);
}

#[test]
fn worker_that_refused_is_tried_with_one() {
    let mut port = Port::new(1, window(8));
    port.offer(4);
    port.assign();
    port.refuse(0).unwrap();
    port.now = port.now + PAUSE;
    assert_eq!(port.assign(), [], "three are under way, and one is the most");
    for connection in [1, 2] {
        port.acknowledge(connection).unwrap();
    }
    assert_eq!(port.assign(), [(1, 0)], "it took one: it has its window again");
}

#[test]
fn sign_of_life_ends_the_trial() {
    let mut port = Port::new(1, window(8));
    port.offer(2);
    port.assign();
    let owed: Vec<u64> = port.handoff.unanswered(w(1)).collect();
    port.handoff.take_back(port.now, w(1), &owed);
    port.handoff.heard(port.now, w(1));
    assert_eq!(port.assign().len(), 2);
}

#[test]
fn deadline_is_never_in_the_past() {
    let mut port = Port::new(2, window(8));
    port.offer(2);
    port.assign();
    port.now = port.now + ACK_LIMIT * 5;
    port.assign();
    assert_eq!(port.handoff.deadline(), None, "both are stalled, and nothing changes by itself");
}

#[test]
fn clock_that_goes_back_stands_still() {
    let mut port = Port::new(1, window(8));
    port.now = Time::ZERO + ACK_LIMIT * 10;
    port.offer(1);
    port.assign();
    port.now = Time::ZERO;
    port.offer(1);
    assert_eq!(port.assign().len(), 1);
    assert_eq!(port.handoff.overdue(port.now).count(), 0);
    assert_eq!(port.handoff.deadline(), Some(Time::ZERO + ACK_LIMIT * 11));
}

#[test]
fn waiting_time_is_counted_from_the_offer() {
    let mut port = Port::new(1, window(8));
    port.offer(1);
    port.now = port.now + Duration::from_millis(30);
    port.assign();
    port.handoff.tell_time(port.now + Duration::from_millis(10));
    let accepted = port.handoff.acknowledged(w(1), port.seq(0)).unwrap();
    assert_eq!(accepted.waited, Duration::from_millis(40));
}

// ---- the end ----

#[test]
fn closing_gives_everything_back_in_the_order_of_arrival() {
    let mut port = Port::new(2, window(2));
    port.offer(4);
    port.assign();
    port.offer(2);
    port.acknowledge(1).unwrap();
    assert_eq!(port.handoff.cancel_all(), [0, 2, 3, 4, 5]);
    let expected = Counters { offered: 6, acknowledged: 1, shed: 5, ..Counters::default() };
    assert_eq!(port.handoff.counters(), expected);
    assert!(!port.handoff.is_member(w(1)));
}

proptest! {
    /// N connections over W workers that all keep up differ by at most one.
    #[test]
    fn connections_per_worker_differ_by_at_most_one(
        workers in 1_u64..9,
        batches in prop::collection::vec(1_u32..20, 1..40),
    ) {
        let mut port = Port::new(workers, window(64));
        let mut counts = BTreeMap::new();
        for batch in batches {
            port.offer(batch);
            for (worker, connection) in port.assign() {
                *counts.entry(worker).or_insert(0_u32) += 1;
                port.acknowledge(connection).unwrap();
            }
        }
        let most = counts.values().max().copied().unwrap_or(0);
        let least = (1..=workers).map(|n| counts.get(&n).copied().unwrap_or(0)).min();
        prop_assert!(most - least.unwrap_or(0) <= 1, "{:?}", counts);
    }

    /// Workers that acknowledge late and out of order are owed turns, and in the end all had the same.
    #[test]
    fn workers_that_acknowledged_late_catch_up_to_the_same_number(
        workers in 1_u64..6,
        steps in prop::collection::vec((0_u32..4, any::<prop::sample::Index>()), 50..300),
    ) {
        let mut port = Port::new(workers, HandoffConfig { debt_limit: 10_000, ..window(4) });
        let mut counts: BTreeMap<u64, u32> = (1..=workers).map(|n| (n, 0)).collect();
        let mut under_way: Vec<u32> = Vec::new();
        for (accept, which) in steps {
            let room = u32::try_from(port.handoff.room()).unwrap();
            port.offer(accept.min(room));
            for (worker, connection) in port.assign() {
                *counts.get_mut(&worker).unwrap() += 1;
                under_way.push(connection);
            }
            if !under_way.is_empty() {
                let connection = under_way.swap_remove(which.index(under_way.len()));
                port.acknowledge(connection).unwrap();
            }
        }
        for connection in under_way {
            port.acknowledge(connection).unwrap();
        }
        for _ in 0..2000 {
            port.offer(1);
            for (worker, connection) in port.assign() {
                *counts.get_mut(&worker).unwrap() += 1;
                port.acknowledge(connection).unwrap();
            }
        }
        let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
        prop_assert!(most - least <= 1, "{:?}", counts);
    }
}
