//! How a task ends before it has done its work, and how a pool ends.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use polyfork::worker_threads::pool::{Cancelled, WouldDeadlock};
use polyfork::worker_threads::{Pool, TaskError};

use super::{FOR_EVER, Gate, occupy, soon, threads, until};

#[tokio::test]
async fn aborted_before_it_began_it_never_runs() {
    let pool = threads(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let witness = Arc::new(());
    let inside = witness.clone();
    let task = pool.run(move || drop(inside));
    assert!(task.abort());
    assert_eq!(Arc::strong_count(&witness), 1, "what it held is dropped at once");
    assert!(!task.abort(), "only once");
    gate.open();
    assert!(matches!(soon(task).await, Err(TaskError::Aborted)));
    assert_eq!(soon(pool.run(|| 1)).await.unwrap(), 1);
    assert_eq!(pool.stats().aborted, 1);
}

#[tokio::test]
async fn aborted_after_it_began_it_is_asked_and_decides() {
    let pool = threads(1).build().unwrap();
    let gate = Gate::default();
    let door = gate.clone();
    let task = pool.run_with(move |context| {
        assert!(context.check().is_ok());
        door.pass();
        context.check()
    });
    gate.wait_for(1);
    let handle = task.abort_handle();
    assert!(!handle.abort());
    gate.open();
    assert_eq!(soon(task).await.unwrap(), Err(Cancelled));
    assert!(!handle.abort(), "it is over");
}

#[test]
fn dropping_the_task_aborts_it() {
    let pool = threads(1).build().unwrap();
    let (gate, held) = occupy(&pool);
    let ran = Arc::new(AtomicBool::new(false));
    let flag = ran.clone();
    drop(pool.run(move || flag.store(true, Ordering::SeqCst)));
    gate.open();
    held.wait().unwrap();
    pool.close().wait().unwrap();
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn dropping_a_running_task_asks_it_to_stop() {
    let pool = threads(1).build().unwrap();
    let begun = Gate::default();
    let (door, stopped) = (begun.clone(), Arc::new(AtomicBool::new(false)));
    let flag = stopped.clone();
    let task = pool.run_with(move |context| {
        door.pass();
        until("asked to stop", || context.is_cancelled());
        flag.store(true, Ordering::SeqCst);
    });
    begun.wait_for(1);
    drop(task);
    begun.open();
    until("stopped", || stopped.load(Ordering::SeqCst));
}

#[test]
fn detached_task_goes_on() {
    let pool = threads(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let ran = Arc::new(AtomicBool::new(false));
    let flag = ran.clone();
    pool.run(move || flag.store(true, Ordering::SeqCst)).detach().unwrap();
    gate.open();
    pool.close().wait().unwrap();
    assert!(ran.load(Ordering::SeqCst));
}

#[tokio::test]
async fn time_is_up_before_it_began() {
    let pool = threads(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let task = pool.task().timeout(Duration::from_millis(5)).run(|| panic!("it runs"));
    let outcome: Result<(), _> = soon(task).await;
    assert!(matches!(outcome, Err(TaskError::TimedOut { begun: false })));
    let stats = pool.stats();
    assert_eq!((stats.timed_out, stats.waiting), (1, 0), "its place is free");
    gate.open();
    let late = pool.task().deadline(Instant::now()).run(|| panic!("it runs"));
    let outcome: Result<(), _> = soon(late).await;
    assert!(matches!(outcome, Err(TaskError::TimedOut { begun: false })));
    assert_eq!(soon(pool.run(|| 1)).await.unwrap(), 1);
}

#[tokio::test]
async fn time_is_up_while_it_runs() {
    let pool = threads(1).build().unwrap();
    let gate = Gate::default();
    let door = gate.clone();
    let asked = Arc::new(AtomicBool::new(false));
    let flag = asked.clone();
    let task = pool.task().timeout(Duration::from_millis(20)).run_with(move |context| {
        assert!(context.deadline().is_some());
        door.pass();
        flag.store(context.is_cancelled(), Ordering::SeqCst);
    });
    gate.wait_for(1);
    // At once, though the task is held at the gate.
    assert!(matches!(soon(task).await, Err(TaskError::TimedOut { begun: true })));
    gate.open();
    soon(pool.run(|| ())).await.unwrap();
    assert!(asked.load(Ordering::SeqCst));
}

#[tokio::test]
async fn done_in_time_it_is_forgotten_by_the_timer() {
    let pool = threads(1).build().unwrap();
    for n in 0..100 {
        let task = pool.task().timeout(FOR_EVER).run(move || n);
        assert_eq!(soon(task).await.unwrap(), n);
    }
    let never = pool.task().timeout(Duration::MAX).run(|| 1);
    assert_eq!(soon(never).await.unwrap(), 1);
    assert_eq!(pool.stats().timed_out, 0);
    soon(pool.close()).await;
}

#[tokio::test]
async fn closed_pool_does_what_was_brought_and_takes_no_more() {
    let pool = threads(1).max_queue(2).build().unwrap();
    let (gate, held) = occupy(&pool);
    let tasks: Vec<_> = (0..5).map(|n| pool.run(move || n)).collect();
    assert_eq!(pool.stats().in_line, 3);
    let closing = pool.close();
    let refused = pool.try_run(|| 1).unwrap_err();
    assert!(matches!(refused.reason, TaskError::Closed));
    assert!(matches!(soon(pool.run(|| 1)).await, Err(TaskError::Closed)));
    gate.open();
    soon(closing).await;
    assert!(held.is_finished());
    for (n, task) in tasks.into_iter().enumerate() {
        assert!(task.is_finished());
        assert_eq!(task.await.unwrap(), n);
    }
    assert_eq!(pool.stats().threads, 0);
    soon(pool.close()).await;
}

#[tokio::test]
async fn abandoned_pool_does_only_what_has_begun() {
    let pool = threads(1).max_queue(2).build().unwrap();
    let begun = Gate::default();
    let door = begun.clone();
    let running = pool.run_with(move |context| {
        door.pass();
        until("asked to stop", || context.is_cancelled());
        "stopped"
    });
    begun.wait_for(1);
    let tasks: Vec<_> = (0..5).map(|n| pool.run(move || n)).collect();
    let closing = pool.close();
    let abandoned = pool.abandon();
    for task in tasks {
        assert!(matches!(soon(task).await, Err(TaskError::Closed)));
    }
    begun.open();
    soon(closing).await;
    soon(abandoned).await;
    assert_eq!(soon(running).await.unwrap(), "stopped");
}

#[test]
fn last_clone_closes_without_waiting() {
    let pool = threads(1).build().unwrap();
    let (gate, held) = occupy(&pool);
    let after = pool.clone().run(|| 3);
    drop(pool);
    gate.open();
    held.wait().unwrap();
    assert_eq!(after.wait().unwrap(), 3);
}

#[test]
fn end_of_the_pool_is_the_end_of_its_threads() {
    struct Last(Arc<AtomicUsize>);
    impl Drop for Last {
        fn drop(&mut self) {
            thread::sleep(Duration::from_millis(20));
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    thread_local!(static KEPT: RefCell<Option<Last>> = const { RefCell::new(None) });
    let pool = threads(3).build().unwrap();
    let ended = Arc::new(AtomicUsize::new(0));
    let gate = Gate::default();
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let (gate, ended) = (gate.clone(), ended.clone());
            pool.run(move || {
                KEPT.with_borrow_mut(|kept| *kept = Some(Last(ended)));
                gate.pass();
            })
        })
        .collect();
    gate.wait_for(3);
    gate.open();
    tasks.into_iter().for_each(|task| task.wait().unwrap());
    pool.close().wait().unwrap();
    assert_eq!(ended.load(Ordering::SeqCst), 3, "thread-local variables are gone");
}

#[test]
fn task_cannot_wait_for_the_end_of_its_pool() {
    let pool = threads(1).build().unwrap();
    let own = pool.clone();
    let outcome = pool.run_blocking(move || own.close().wait()).unwrap();
    assert_eq!(outcome, Err(WouldDeadlock));
    pool.close().wait().unwrap();
}

#[test]
fn pools_come_and_go() {
    for round in 0..200 {
        let pool = Pool::builder().min_threads(round % 3).max_threads(3).build().unwrap();
        let tasks: Vec<_> = (0..round % 7).map(|n| pool.run(move || n)).collect();
        if round % 2 == 0 {
            pool.close().wait().unwrap();
        } else {
            pool.abandon().wait().unwrap();
        }
        for task in tasks {
            assert!(matches!(task.wait(), Ok(_) | Err(TaskError::Closed)));
        }
    }
}
