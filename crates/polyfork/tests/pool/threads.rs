//! How many threads there are, and what they are like.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use polyfork::worker_threads::pool::PoolError;
use polyfork::worker_threads::{Pool, TaskError};

use super::{FOR_EVER, Gate, occupy, threads, until};

#[test]
fn threads_come_when_there_is_work_and_leave_when_idle() {
    let builder = Pool::builder().min_threads(1).max_threads(3);
    let pool = builder.idle_timeout(Duration::from_millis(10)).build().unwrap();
    assert_eq!(pool.stats().threads, 1);
    let gate = Gate::default();
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let gate = gate.clone();
            pool.run(move || gate.pass())
        })
        .collect();
    gate.wait_for(3);
    let stats = pool.stats();
    assert_eq!((stats.threads, stats.running, stats.waiting), (3, 3, 2));
    gate.open();
    tasks.into_iter().for_each(|task| task.wait().unwrap());
    until("two have left", || pool.stats().threads == 1);
    assert_eq!(pool.run_blocking(|| 1).unwrap(), 1);
}

#[test]
fn pool_without_minimum_has_no_thread_when_idle() {
    let builder = Pool::builder().min_threads(0).max_threads(2);
    let pool = builder.idle_timeout(Duration::from_millis(5)).build().unwrap();
    assert_eq!(pool.stats().threads_started, 0);
    for _ in 0..3 {
        assert_eq!(pool.run_blocking(|| 1).unwrap(), 1);
        until("all have left", || pool.stats().threads == 0);
    }
    pool.close().wait().unwrap();
}

#[test]
fn long_idle_timeout_does_not_hold_up_the_end() {
    let pool = Pool::builder().max_threads(2).idle_timeout(FOR_EVER).build().unwrap();
    let (gate, held) = occupy(&pool);
    let (second, also) = occupy(&pool);
    gate.open();
    second.open();
    held.wait().unwrap();
    also.wait().unwrap();
    pool.close().wait().unwrap();
}

#[test]
fn idle_timeout_beyond_all_clocks_is_for_ever() {
    let pool = Pool::builder().min_threads(0).idle_timeout(Duration::MAX).build().unwrap();
    assert_eq!(pool.run_blocking(|| 1).unwrap(), 1);
    pool.close().wait().unwrap();
}

#[test]
fn thread_is_replaced_after_its_number_of_tasks() {
    let pool = threads(1).tasks_per_thread(5).build().unwrap();
    let seen: Vec<_> =
        (0..20).map(|_| pool.run_blocking(|| thread::current().id()).unwrap()).collect();
    for batch in seen.chunks(5) {
        assert_eq!(HashSet::<_>::from_iter(batch).len(), 1);
    }
    assert_eq!(HashSet::<_>::from_iter(&seen).len(), 4);
    until("the last is replaced too", || pool.stats().threads_recycled == 4);
    assert_eq!(pool.stats().threads, 1);
    assert_eq!(pool.stats().completed, 20, "what replaced threads did still counts");
}

#[test]
fn recycling_under_load_loses_nothing() {
    let pool = threads(2).tasks_per_thread(3).build().unwrap();
    let tasks: Vec<_> = (0..600).map(|n| pool.run(move || n)).collect();
    for (n, task) in tasks.into_iter().enumerate() {
        assert_eq!(task.wait().unwrap(), n);
    }
    pool.close().wait().unwrap();
    let stats = pool.stats();
    assert_eq!(stats.completed, 600);
    assert!(stats.threads_recycled >= 190, "{stats:?}");
}

#[test]
fn thread_on_which_a_task_panicked_is_replaced_if_asked_for() {
    let pool = threads(1).replace_after_panic(true).build().unwrap();
    let before = pool.run_blocking(|| thread::current().id()).unwrap();
    let outcome = pool.run_blocking(|| -> () { panic!("and leaves a mess") });
    assert!(matches!(outcome, Err(TaskError::Panicked { .. })));
    assert_ne!(pool.run_blocking(|| thread::current().id()).unwrap(), before);
    assert_eq!(pool.stats().threads_recycled, 1);
}

#[test]
fn threads_have_the_name_and_the_stack_asked_for() {
    let pool = threads(1).name("tiles").stack_size(64 << 20).build().unwrap();
    let name = pool.run_blocking(|| thread::current().name().map(str::to_owned)).unwrap();
    assert_eq!(name.as_deref(), Some("tiles-0"));
    // 32 MiB of it: an overflow would end the test program.
    let deep = pool.run_blocking(|| {
        let mut room = [0_u8; 32 << 20];
        std::hint::black_box(&mut room)[..].iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        room.iter().map(|byte| usize::from(*byte)).sum::<usize>()
    });
    assert_eq!(deep.unwrap(), (32 << 20) / 4096);
}

#[test]
fn hooks_frame_the_life_of_each_thread() {
    let counts = Arc::new([const { AtomicUsize::new(0) }; 2]);
    let (start, stop) = (counts.clone(), counts.clone());
    let builder = threads(2)
        .on_thread_start(move || {
            start[0].fetch_add(1, Ordering::SeqCst);
            panic!("which is ignored");
        })
        .on_thread_stop(move || {
            stop[1].fetch_add(1, Ordering::SeqCst);
        });
    let pool = builder.build().unwrap();
    assert_eq!(pool.run_blocking(|| 1).unwrap(), 1);
    pool.close().wait().unwrap();
    assert_eq!(counts[0].load(Ordering::SeqCst), 2);
    assert_eq!(counts[1].load(Ordering::SeqCst), 2);
}

/// More address space than there is: no thread can be started.
const TOO_MUCH: usize = 1 << 60;

#[test]
fn thread_that_cannot_be_started_is_told() {
    let refused = threads(1).stack_size(TOO_MUCH).build();
    assert!(matches!(refused, Err(PoolError::Thread(_))), "{refused:?}");
    let pool = Pool::builder().min_threads(0).stack_size(TOO_MUCH).build().unwrap();
    for _ in 0..3 {
        assert!(matches!(pool.run_blocking(|| 1), Err(TaskError::NoThread(_))));
    }
    assert_eq!(pool.stats().start_failures, 3);
    pool.close().wait().unwrap();
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    let refused = |builder: polyfork::worker_threads::PoolBuilder, word: &str| {
        let error = builder.build().unwrap_err();
        assert!(matches!(&error, PoolError::Invalid(text) if text.contains(word)), "{error}");
    };
    refused(Pool::builder().max_threads(0), "max_threads");
    refused(Pool::builder().min_threads(3).max_threads(2), "min_threads is 3");
    refused(Pool::builder().max_queue(0), "max_queue");
    refused(Pool::builder().tasks_per_thread(0), "tasks_per_thread");
    refused(Pool::builder().name("a\0b"), "name");
}
