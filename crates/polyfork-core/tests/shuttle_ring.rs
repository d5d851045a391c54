//! The ring and the lease lock under shuttle: longer runs than loom can exhaust, in random schedules.
//!
//! `RUSTFLAGS="--cfg polyfork_shuttle" cargo test --release -p polyfork-core --test shuttle_ring`
#![cfg(polyfork_shuttle)]
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

use polyfork_core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use polyfork_core::sync::lease::{Attempt, Lease};
use polyfork_core::sync::ring::{Consumer, HEADER_WORDS, Producer, PushError, format};
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;

const SCHEDULES: usize = 5_000;

#[derive(Clone)]
struct Words(Arc<Vec<AtomicU64>>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Bell {
        Bell(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn sleep(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn lengths() -> impl Iterator<Item = (u32, usize)> {
    (0..40_u32).map(|kind| (kind, (kind as usize * 7) % 50))
}

#[test]
fn all_records_arrive_while_both_sides_sleep_and_wake() {
    shuttle::check_random(
        || {
            let words =
                Words(Arc::new((0..HEADER_WORDS + 16).map(|_| AtomicU64::new(0)).collect()));
            format(words.as_ref()).unwrap();
            let mut producer = Producer::new(words.clone()).unwrap();
            let mut consumer = Consumer::new(words).unwrap();
            let (to_consumer, to_producer) = (Bell::new(), Bell::new());
            let (wake, sleep) = (to_consumer.clone(), to_producer.clone());
            let producing = thread::spawn(move || {
                for (kind, length) in lengths() {
                    while producer.push(kind, &vec![kind as u8; length]) == Err(PushError::Full) {
                        if producer.prepare_sleep(length).unwrap() {
                            sleep.sleep();
                        }
                    }
                    if producer.must_wake() {
                        wake.ring();
                    }
                }
            });
            for (expected, length) in lengths() {
                let mut bytes = Vec::new();
                let kind = loop {
                    if let Some(kind) = consumer.pop(&mut bytes).unwrap() {
                        break kind;
                    }
                    if consumer.prepare_sleep().unwrap() {
                        to_consumer.sleep();
                    }
                };
                assert_eq!((kind, bytes), (expected, vec![expected as u8; length]));
                if consumer.must_wake() {
                    to_producer.ring();
                }
            }
            producing.join().unwrap();
        },
        SCHEDULES,
    );
}

#[test]
fn lock_is_held_by_one_of_many_and_nobody_sleeps_on() {
    shuttle::check_random(
        || {
            struct World {
                owner: AtomicU64,
                words: [AtomicU32; 3],
                inside: AtomicU32,
                queue: Mutex<()>,
                asleep: Condvar,
            }
            let world = Arc::new(World {
                owner: AtomicU64::new(0),
                words: [const { AtomicU32::new(0) }; 3],
                inside: AtomicU32::new(0),
                queue: Mutex::new(()),
                asleep: Condvar::new(),
            });
            let threads: Vec<_> = (1..5_u64)
                .map(|me| {
                    let world = Arc::clone(&world);
                    thread::spawn(move || {
                        let [bell, waiting, broken] = &world.words;
                        let lease = Lease { owner: &world.owner, bell, waiting, broken };
                        for _ in 0..5 {
                            while let Attempt::Wait { bell: seen, .. } = lease.attempt(me) {
                                let queue = world.queue.lock().unwrap();
                                if bell.load(Ordering::SeqCst) == seen {
                                    drop(world.asleep.wait(queue).unwrap());
                                }
                            }
                            assert_eq!(world.inside.fetch_add(1, Ordering::SeqCst), 0);
                            thread::yield_now();
                            assert_eq!(world.inside.fetch_sub(1, Ordering::SeqCst), 1);
                            if lease.unlock(me) {
                                drop(world.queue.lock().unwrap());
                                world.asleep.notify_one();
                            }
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
        },
        SCHEDULES,
    );
}
