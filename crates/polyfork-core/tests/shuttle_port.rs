//! The models of a port's queue in many random schedules, and scenes that are too large for all of them.
//!
//! `RUSTFLAGS="--cfg polyfork_shuttle" cargo test --release -p polyfork-core --test shuttle_port`
#![cfg(polyfork_shuttle)]

use std::future::poll_fn;
use std::num::NonZeroUsize;

use polyfork_core::sync::port::queue;
use shuttle::thread;

#[path = "models/port.rs"]
mod models;

const SCHEDULES: usize = 5_000;
const TWO: Option<NonZeroUsize> = NonZeroUsize::new(2);

fn check(scene: impl Fn() + Sync + Send + 'static) {
    shuttle::check_pct(scene, SCHEDULES, 4);
}

#[test]
fn the_models() {
    check(|| models::post_against_sleep(None, 10));
    check(|| models::post_against_sleep(TWO, 10));
    check(|| models::close_against_post(None));
    check(|| models::close_against_post(TWO));
    check(models::polite_close_against_post);
    check(models::ports_in_messages_go_with_their_queue);
    check(models::giving_up_passes_the_turn_on);
    check(models::close_is_told);
    check(models::abort_against_receive);
}

/// Every message of each of several senders arrives, in the sender's order.
#[test]
fn several_senders_wait_for_room() {
    const EACH: u32 = 4;
    shuttle::check_random(
        || {
            let census = models::Census::default();
            let (sender, mut receiver) = queue(TWO);
            let posting: Vec<_> = (0..3_u32)
                .map(|who| {
                    let (sender, census) = (sender.clone(), census.clone());
                    thread::spawn(move || {
                        for number in 0..EACH {
                            let message = (who, number, census.message(number));
                            assert!(models::block_on(sender.post(message)).is_ok());
                        }
                    })
                })
                .collect();
            drop(sender);
            let mut next = [0; 3];
            while let Some((who, number, _)) =
                models::block_on(poll_fn(|cx| receiver.poll_receive(cx)))
            {
                assert_eq!(number, next[who as usize], "the order of one sender");
                next[who as usize] += 1;
            }
            assert_eq!(next, [EACH; 3]);
            for thread in posting {
                thread.join().expect("no panic");
            }
            drop(receiver);
            census.assert_all_dropped();
        },
        SCHEDULES,
    );
}
