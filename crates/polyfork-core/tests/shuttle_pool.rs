//! Long random schedules of the pool with many threads and tasks, by shuttle, over the real code.
//!
//! `RUSTFLAGS="--cfg polyfork_shuttle" cargo test --release -p polyfork-core --test shuttle_pool`. What loom proves for two threads
//! and a few steps is looked for here among many: random schedules, and schedules with few but unlucky preemptions (PCT).
#![cfg(polyfork_shuttle)]
#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use shuttle as checker;

#[path = "pool_model/mod.rs"]
mod pool_model;

use polyfork_core::sync::pool::WhenFull;
use pool_model::{Fate, Latch, Pool, Task};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use std::sync::Arc;

const SCHEDULES: usize = 3000;

fn both(model: fn()) {
    shuttle::check_random(model, SCHEDULES);
    shuttle::check_pct(model, SCHEDULES, 3);
}

#[test]
fn many_producers_and_threads_lose_and_repeat_nothing() {
    both(|| {
        let pool = Arc::new(Pool { impatient: true, tasks_per_thread: 3, ..Pool::new(1, 3, 2) });
        pool.start_min(1);
        let producers: Vec<_> = (0..3)
            .map(|_| {
                let pool = pool.clone();
                thread::spawn(move || {
                    let mut tasks = Vec::new();
                    for _ in 0..5 {
                        let task = Task::new();
                        let full = match thread_rng().gen_range(0..3) {
                            0 => WhenFull::GiveBack,
                            1 => WhenFull::Displace,
                            _ => WhenFull::StandInLine,
                        };
                        pool.bring(&task, full);
                        let withdrawn = thread_rng().gen_range(0..4) == 0
                            && pool.dispatch.withdraw(&task.0).was_waiting;
                        tasks.push((task, withdrawn));
                    }
                    tasks
                })
            })
            .collect();
        let tasks: Vec<_> = producers.into_iter().flat_map(|p| p.join().unwrap()).collect();
        pool.shut(thread_rng().gen_range(0..2) == 0);
        pool.join();
        for (task, withdrawn) in tasks {
            // A withdrawn task may be handed back by an abandoned pool that had not swept it out yet; the pool then finds it over.
            let ends = task.1.ran() + if withdrawn { 1 } else { task.1.given_up() };
            assert_eq!(ends, 1);
        }
        assert!(pool.dispatch.has_ended());
        let view = pool.dispatch.view();
        assert_eq!((view.threads, view.sleeping, view.searching), (0, 0, 0));
    });
}

#[test]
fn chain_of_tasks_that_wait_for_one_another_runs_on_as_many_threads() {
    both(|| {
        let pool = Arc::new(Pool::new(0, 4, 8));
        let latches: Vec<_> = (0..4).map(|_| Arc::new(Latch::new())).collect();
        let tasks: Vec<_> = (0..4_usize)
            .map(|n| {
                let opens = n.checked_sub(1).map(|before| latches[before].clone());
                let waits_for = (n < 3).then(|| latches[n].clone());
                Task::with(Fate { opens, waits_for, ..Fate::default() })
            })
            .collect();
        let producers: Vec<_> = tasks
            .chunks(2)
            .map(|pair| {
                let (pool, pair) = (pool.clone(), pair.to_vec());
                thread::spawn(move || {
                    pair.iter().for_each(|task| assert!(pool.bring(task, WhenFull::GiveBack)));
                })
            })
            .collect();
        producers.into_iter().for_each(|producer| producer.join().unwrap());
        tasks.iter().for_each(Task::wait);
        pool.shut(false);
        pool.join();
        assert!(tasks.iter().all(|task| task.1.ran() == 1));
    });
}
