//! The models of a port's queue in all schedules with at most two preemptions, or as many as LOOM_MAX_PREEMPTIONS says
//! (three take some ten minutes).
//!
//! `RUSTFLAGS="--cfg polyfork_loom" cargo test --release -p polyfork-core --test loom_port`
#![cfg(polyfork_loom)]

use std::num::NonZeroUsize;

use loom::thread;

#[path = "models/port.rs"]
mod models;

const ONE: Option<NonZeroUsize> = NonZeroUsize::new(1);

fn check(scene: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(scene);
}

#[test]
fn a_sleeping_receiver_is_woken() {
    check(|| models::post_against_sleep(None, 2));
}

#[test]
fn a_sender_that_waits_for_room_is_woken() {
    check(|| models::post_against_sleep(ONE, 3));
}

#[test]
fn fault_120_port_close_against_send() {
    check(|| models::close_against_post(None));
    check(|| models::close_against_post(ONE));
}

#[test]
fn fault_120_polite_close_against_send() {
    check(models::polite_close_against_post);
}

#[test]
fn fault_120_ports_in_messages_go_with_their_queue() {
    check(models::ports_in_messages_go_with_their_queue);
}

#[test]
fn a_turn_not_used_is_passed_on() {
    check(models::giving_up_passes_the_turn_on);
}

#[test]
fn the_close_is_told() {
    check(models::close_is_told);
}

#[test]
fn an_abort_ends_a_receiver() {
    check(models::abort_against_receive);
}
