//! The lease lock under loom: nobody is in twice, nobody sleeps on.
//!
//! `RUSTFLAGS="--cfg polyfork_loom" cargo test --release -p polyfork-core --test loom_lease`
#![cfg(polyfork_loom)]
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use polyfork_core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use polyfork_core::sync::lease::{Attempt, Lease};

struct World {
    owner: AtomicU64,
    bell: AtomicU32,
    waiting: AtomicU32,
    broken: AtomicU32,
    /// What the lock guards; loom reports two at once.
    guarded: UnsafeCell<u32>,
    /// The kernel's queue of one futex.
    queue: Mutex<()>,
    asleep: Condvar,
}

impl World {
    fn new() -> Arc<World> {
        Arc::new(World {
            owner: AtomicU64::new(0),
            bell: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            broken: AtomicU32::new(0),
            guarded: UnsafeCell::new(0),
            queue: Mutex::new(()),
            asleep: Condvar::new(),
        })
    }

    fn lease(&self) -> Lease<'_> {
        Lease { owner: &self.owner, bell: &self.bell, waiting: &self.waiting, broken: &self.broken }
    }

    fn lock(&self, me: u64) {
        while let Attempt::Wait { bell, .. } = self.lease().attempt(me) {
            let queue = self.queue.lock().unwrap();
            if self.bell.load(Ordering::SeqCst) == bell {
                drop(self.asleep.wait(queue).unwrap());
            }
        }
    }

    fn unlock(&self, me: u64) {
        if self.lease().unlock(me) {
            drop(self.queue.lock().unwrap());
            self.asleep.notify_one();
        }
    }

    fn inside(&self) {
        self.guarded.with_mut(|guarded| {
            let _ = guarded;
        });
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn one_at_a_time_and_nobody_sleeps_on() {
    check(3, || {
        let world = World::new();
        let other = Arc::clone(&world);
        let thread = thread::spawn(move || {
            other.lock(2);
            other.inside();
            other.unlock(2);
        });
        for _ in 0..2 {
            world.lock(1);
            world.inside();
            world.unlock(1);
        }
        thread.join().unwrap();
    });
}

#[test]
fn three_take_turns() {
    check(2, || {
        let world = World::new();
        let others: Vec<_> = (2..4)
            .map(|me| {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    world.lock(me);
                    world.inside();
                    world.unlock(me);
                })
            })
            .collect();
        world.lock(1);
        world.inside();
        world.unlock(1);
        for other in others {
            other.join().unwrap();
        }
    });
}

#[test]
fn one_of_two_takes_over_from_the_dead() {
    check(3, || {
        let world = World::new();
        // 9 died inside.
        assert!(world.lease().try_lock(9));
        let other = Arc::clone(&world);
        let take = |world: &World, me: u64| {
            while !world.lease().take_over(9, me) {
                if world.lease().attempt(me) == Attempt::Locked {
                    break;
                }
                thread::yield_now();
            }
            world.inside();
            assert_eq!(world.broken.load(Ordering::Relaxed), 1);
            world.unlock(me);
        };
        let thread = thread::spawn(move || take(&other, 2));
        take(&world, 1);
        thread.join().unwrap();
    });
}
