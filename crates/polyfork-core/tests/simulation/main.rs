//! Plays the supervisor and the hand-over through random orders of events and checks what they promise.
//!
//! A *life* is one cluster from Start to its end, in a simulated world ([`world`]) whose worker processes ([`process`]) hold
//! real connections, die at any point, freeze, lie, ignore signals; whose shell sees things late; and whose clock jumps.
//! What must hold is kept in three books that know nothing of the code under test: [`ledger`] for connections, [`book`] for
//! workers and slots, and the world's own checks of what can be asked from outside.
//!
//! Two variables steer it: `POLYFORK_SIM_SEED` (default: from the clock, printed) and `POLYFORK_SIM_EVENTS` (default one
//! million). A failure prints the line that replays exactly the life that failed.
//!
//! The surprising rule: the seed of the next life comes from the seed of this one, so any life can be the first.

mod book;
mod ledger;
mod process;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{SystemTime, UNIX_EPOCH};

use polyfork_core::restart::Jitter;
use world::{Life, Sums};

const DEFAULT_EVENTS: u64 = 1_000_000;

#[test]
fn no_connection_lost_or_given_twice_and_no_slot_forgotten() {
    let mut seed = number("POLYFORK_SIM_SEED").unwrap_or_else(seed_from_clock);
    let events = number("POLYFORK_SIM_EVENTS").unwrap_or(DEFAULT_EVENTS);
    println!("simulation: POLYFORK_SIM_SEED={seed} POLYFORK_SIM_EVENTS={events}");
    let mut sums = Sums::default();
    while sums.events < events {
        let life = AssertUnwindSafe(|| Life::new(seed).play(&mut sums));
        if let Err(failure) = catch_unwind(life) {
            println!(
                "replay: POLYFORK_SIM_SEED={seed} POLYFORK_SIM_EVENTS=1 \
                 cargo test -p polyfork-core --test simulation no_connection_lost"
            );
            resume_unwind(failure);
        }
        seed = Jitter::new(seed).bits();
    }
    println!("simulation: {sums:?}");
    sums.assert_that_everything_happened(events);
}

#[test]
fn the_same_seed_plays_the_same_life() {
    let play = |seed| {
        let mut sums = Sums::default();
        Life::new(seed).play(&mut sums);
        sums
    };
    for seed in 0..20 {
        assert_eq!(play(seed), play(seed));
    }
}

#[test]
fn a_life_that_is_carried_to_another_process_goes_on_as_it_would_have() {
    let mut carried = 0;
    for seed in 0..60 {
        let (mut plain, mut moved) = (Sums::default(), Sums::default());
        Life::new(seed).play(&mut plain);
        carried += Life::new(seed).carried_every(1 + seed % 7).play_carried(&mut moved);
        assert_eq!(plain, moved, "seed {seed}");
    }
    println!("simulation: carried {carried} times");
    assert!(carried > 1000, "{carried}");
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text:?}")))
}

fn seed_from_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Jitter::new(since.as_nanos() as u64).bits()
}
