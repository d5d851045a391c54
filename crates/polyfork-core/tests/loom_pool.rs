//! Every interleaving of the pool's sleeping, waking, leaving and shutting, by loom, over the real code.
//!
//! `RUSTFLAGS="--cfg polyfork_loom" cargo test --release -p polyfork-core --test loom_pool`. A wake-up that is lost is a
//! deadlock, which loom reports. Preemptions are bounded where a model would take minutes without; what the bound leaves out, the
//! random schedules of `shuttle_pool.rs` look for.
#![cfg(polyfork_loom)]
#![allow(clippy::unwrap_used, reason = "a panic is the report")]

use loom as checker;

#[path = "pool_model/mod.rs"]
mod pool_model;

use std::sync::Arc;

use loom::thread;
use polyfork_core::sync::pool::WhenFull;
use pool_model::{Fate, Latch, Pool, Task};

fn explore(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(model);
}

#[test]
fn sleeper_hears_of_a_task_whenever_it_comes() {
    explore(Some(4), || {
        let pool = Arc::new(Pool::new(1, 1, 8));
        pool.start_min(1);
        let task = Task::new();
        let other = Task::new();
        let producer = {
            let (pool, other) = (pool.clone(), other.clone());
            thread::spawn(move || pool.bring(&other, WhenFull::GiveBack))
        };
        assert!(pool.bring(&task, WhenFull::GiveBack));
        assert!(producer.join().unwrap());
        task.wait();
        other.wait();
        pool.shut(false);
        pool.join();
        assert_eq!((task.1.ran(), other.1.ran()), (1, 1));
    });
}

#[test]
fn task_that_another_waits_for_finds_a_thread() {
    // The first task ends only after the second has run: if the second thread slept on, this would hang.
    explore(Some(3), || {
        let pool = Arc::new(Pool::new(2, 2, 8));
        pool.start_min(2);
        let latch = Arc::new(Latch::new());
        let first = Task::with(Fate { waits_for: Some(latch.clone()), ..Fate::default() });
        let second = Task::with(Fate { opens: Some(latch), ..Fate::default() });
        assert!(pool.bring(&first, WhenFull::GiveBack));
        assert!(pool.bring(&second, WhenFull::GiveBack));
        first.wait();
        second.wait();
        pool.shut(false);
        pool.join();
        assert_eq!((first.1.ran(), second.1.ran()), (1, 1));
    });
}

#[test]
fn threads_started_on_demand_do_what_others_wait_for() {
    explore(Some(4), || {
        let pool = Arc::new(Pool::new(0, 2, 8));
        let latch = Arc::new(Latch::new());
        let first = Task::with(Fate { waits_for: Some(latch.clone()), ..Fate::default() });
        let second = Task::with(Fate { opens: Some(latch), ..Fate::default() });
        assert!(pool.bring(&first, WhenFull::GiveBack));
        assert!(pool.bring(&second, WhenFull::GiveBack));
        first.wait();
        second.wait();
        pool.shut(false);
        pool.join();
        assert_eq!((first.1.ran(), second.1.ran()), (1, 1));
    });
}

#[test]
fn thread_that_leaves_for_want_of_work_leaves_none_behind() {
    explore(None, || {
        let pool = Arc::new(Pool { impatient: true, ..Pool::new(0, 1, 8) });
        let tasks = [Task::new(), Task::new()];
        for task in &tasks {
            assert!(pool.bring(task, WhenFull::GiveBack));
        }
        tasks.iter().for_each(Task::wait);
        pool.shut(false);
        pool.join();
        assert!(tasks.iter().all(|task| task.1.ran() == 1));
        assert!(pool.dispatch.has_ended());
    });
}

#[test]
fn shutting_while_tasks_come_loses_none_and_runs_none_twice() {
    explore(Some(5), || {
        let pool = Arc::new(Pool::new(1, 1, 8));
        pool.start_min(1);
        let (early, late) = (Task::new(), Task::new());
        assert!(pool.bring(&early, WhenFull::GiveBack));
        let producer = {
            let (pool, late) = (pool.clone(), late.clone());
            thread::spawn(move || pool.bring(&late, WhenFull::GiveBack))
        };
        pool.shut(true);
        let taken = producer.join().unwrap();
        pool.join();
        for task in [&early, &late] {
            assert_eq!(task.1.ran() + task.1.given_up(), 1);
        }
        assert!(taken || late.1.given_up() == 1);
        assert_eq!(pool.last.load(loom::sync::atomic::Ordering::SeqCst), 1);
        assert!(pool.dispatch.has_ended());
    });
}

#[test]
fn closing_and_then_abandoning_is_heard_by_all() {
    explore(Some(3), || {
        let pool = Arc::new(Pool::new(2, 2, 8));
        pool.start_min(2);
        let task = Task::new();
        assert!(pool.bring(&task, WhenFull::GiveBack));
        let other = {
            let pool = pool.clone();
            thread::spawn(move || pool.shut(false))
        };
        pool.shut(true);
        other.join().unwrap();
        pool.join();
        assert_eq!(task.1.ran() + task.1.given_up(), 1);
    });
}

#[test]
fn withdrawn_task_is_run_or_withdrawn_never_both() {
    explore(None, || {
        let pool = Arc::new(Pool::new(1, 1, 1));
        pool.start_min(1);
        let (task, behind) = (Task::new(), Task::new());
        assert!(pool.bring(&task, WhenFull::StandInLine));
        assert!(pool.bring(&behind, WhenFull::StandInLine));
        let withdrawn = pool.dispatch.withdraw(&task.0).was_waiting;
        behind.wait();
        pool.shut(false);
        pool.join();
        assert_eq!(task.1.ran(), usize::from(!withdrawn));
        assert_eq!(behind.1.ran(), 1, "the line moves up");
    });
}

#[test]
fn line_before_a_full_queue_moves_up() {
    explore(Some(4), || {
        let pool = Arc::new(Pool::new(1, 1, 1));
        pool.start_min(1);
        let tasks = [Task::new(), Task::new(), Task::new()];
        for task in &tasks {
            assert!(pool.bring(task, WhenFull::StandInLine));
        }
        tasks.iter().for_each(Task::wait);
        pool.shut(false);
        pool.join();
        assert!(tasks.iter().all(|task| task.1.ran() == 1));
    });
}

#[test]
fn thread_that_retires_leaves_no_task_behind() {
    explore(Some(3), || {
        let pool = Arc::new(Pool { tasks_per_thread: 1, ..Pool::new(1, 1, 8) });
        pool.start_min(1);
        let tasks = [Task::new(), Task::new()];
        for task in &tasks {
            assert!(pool.bring(task, WhenFull::GiveBack));
        }
        tasks.iter().for_each(Task::wait);
        pool.shut(false);
        pool.join();
        assert!(tasks.iter().all(|task| task.1.ran() == 1));
        assert!(pool.dispatch.has_ended());
    });
}
