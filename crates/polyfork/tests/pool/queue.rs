//! Who goes first, and what happens when the queue is full.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use polyfork::worker_threads::pool::Full;
use polyfork::worker_threads::{Pool, Priority, Task, TaskError};

use super::{occupy, soon, threads};

type Log = Arc<Mutex<Vec<usize>>>;

fn note(pool: &Pool, log: &Log, priority: Priority, number: usize) -> Task<()> {
    let log = log.clone();
    pool.task().priority(priority).run(move || log.lock().unwrap().push(number))
}

#[test]
fn higher_priority_goes_first_and_equals_in_order() {
    let pool = threads(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let log = Log::default();
    let order = [Priority::Low, Priority::Normal, Priority::High, Priority::Normal, Priority::High];
    let tasks: Vec<_> =
        order.iter().enumerate().map(|(number, p)| note(&pool, &log, *p, number)).collect();
    gate.open();
    tasks.into_iter().for_each(|task| task.wait().unwrap());
    assert_eq!(*log.lock().unwrap(), [2, 4, 1, 3, 0]);
}

#[test]
fn low_priority_is_not_starved() {
    let pool = threads(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let log = Log::default();
    let low = note(&pool, &log, Priority::Low, 1000);
    let normal = note(&pool, &log, Priority::Normal, 2000);
    let high: Vec<_> = (0..100).map(|n| note(&pool, &log, Priority::High, n)).collect();
    gate.open();
    high.into_iter().chain([low, normal]).for_each(|task| task.wait().unwrap());
    let log = log.lock().unwrap();
    let place = |number| log.iter().position(|n| *n == number).unwrap();
    assert!(place(2000) <= 9, "{}", place(2000));
    assert!(place(1000) <= 33, "{}", place(1000));
}

#[test]
fn full_queue_gives_the_closure_back() {
    let pool = threads(1).max_queue(2).build().unwrap();
    let (gate, held) = occupy(&pool);
    let waiting = [pool.run(|| 1), pool.run(|| 2)];
    let treasure = "kept".to_owned();
    let rejected = pool.try_run(move || treasure).unwrap_err();
    assert!(matches!(rejected.reason, TaskError::Full));
    assert_eq!((rejected.task)(), "kept");
    assert_eq!(pool.stats().refused, 1);
    gate.open();
    held.wait().unwrap();
    waiting.into_iter().for_each(|task| assert!(task.wait().is_ok()));
    assert_eq!(pool.try_run(|| 3).unwrap().wait().unwrap(), 3);
}

#[tokio::test]
async fn full_queue_makes_callers_wait_in_order() {
    let pool = threads(1).max_queue(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let log = Log::default();
    let mut tasks: Vec<_> = (0..4).map(|n| note(&pool, &log, Priority::Normal, n)).collect();
    assert_eq!((pool.stats().waiting, pool.stats().in_line), (1, 3));
    soon(tasks[0].accepted()).await;
    // One in line cannot be let go of: nobody would be held up by it.
    let last = tasks.pop().unwrap().detach().unwrap_err();
    tasks.push(last);
    assert_eq!(pool.stats().in_line, 3);
    gate.open();
    for mut task in tasks {
        soon(task.accepted()).await;
        soon(task).await.unwrap();
    }
    assert_eq!(*log.lock().unwrap(), [0, 1, 2, 3]);
}

#[tokio::test]
async fn place_that_an_aborted_task_leaves_goes_to_the_first_in_line() {
    let pool = threads(1).max_queue(1).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let queued = pool.run(|| 1);
    let mut in_line = pool.run(|| 2);
    let left_line = pool.run(|| 3);
    let mut behind = pool.run(|| 4);
    drop(left_line);
    drop(queued);
    soon(in_line.accepted()).await;
    assert_eq!((pool.stats().waiting, pool.stats().in_line), (1, 1));
    drop(in_line);
    soon(behind.accepted()).await;
    gate.open();
    assert_eq!(soon(behind).await.unwrap(), 4);
}

#[test]
fn full_queue_refuses() {
    let pool = threads(1).max_queue(1).when_full(Full::Refuse).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let waiting = pool.run(|| 1);
    assert!(matches!(pool.run(|| 2).wait(), Err(TaskError::Full)));
    gate.open();
    assert_eq!(waiting.wait().unwrap(), 1);
}

#[test]
fn full_queue_lets_the_caller_run_it() {
    let pool = threads(1).max_queue(1).when_full(Full::RunInCaller).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let waiting = pool.run(|| thread::current().id());
    let here = pool.run(|| thread::current().id());
    assert_eq!(here.wait().unwrap(), thread::current().id());
    let panicked = pool.run(|| -> () { panic!("caught here too") });
    assert!(matches!(panicked.wait(), Err(TaskError::Panicked { .. })));
    gate.open();
    assert_ne!(waiting.wait().unwrap(), thread::current().id());
    let stats = pool.stats();
    assert_eq!((stats.completed, stats.failed), (3, 1));
}

#[test]
fn full_queue_drops_the_oldest_of_the_lowest() {
    let pool = threads(1).max_queue(3).when_full(Full::DropOldest).build().unwrap();
    let (gate, _held) = occupy(&pool);
    let bring = |priority| pool.task().priority(priority).run(|| ());
    let high = bring(Priority::High);
    let old = bring(Priority::Normal);
    let young = bring(Priority::Normal);
    let newest = bring(Priority::Normal);
    assert!(matches!(old.wait(), Err(TaskError::Displaced)));
    assert!(matches!(bring(Priority::Low).wait(), Err(TaskError::Full)));
    assert_eq!(pool.stats().displaced, 1);
    gate.open();
    [high, young, newest].into_iter().for_each(|task| task.wait().unwrap());
}

#[test]
fn aborted_tasks_do_not_fill_the_queue() {
    let pool = threads(1).max_queue(4).build().unwrap();
    let (gate, _held) = occupy(&pool);
    for _ in 0..10_000 {
        // Dropped at once: that aborts it.
        drop(pool.try_run(|| ()).unwrap());
    }
    let stats = pool.stats();
    assert_eq!((stats.waiting, stats.aborted), (0, 10_000));
    gate.open();
    assert_eq!(pool.run_blocking(|| 1).unwrap(), 1);
    assert_eq!(pool.stats().completed, 2);
}

#[test]
fn bringing_and_aborting_at_once_runs_each_task_once_or_never() {
    let pool = threads(2).max_queue(8).build().unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    let mut outcomes = 0;
    thread::scope(|scope| {
        let producers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = 0;
                    for round in 0..3000 {
                        let ran = ran.clone();
                        let task = pool.run(move || ran.fetch_add(1, Ordering::Relaxed));
                        if round % 3 == 0 {
                            thread::yield_now();
                        }
                        let aborted = task.abort();
                        let outcome = task.wait();
                        assert_eq!(aborted, matches!(outcome, Err(TaskError::Aborted)));
                        done += usize::from(outcome.is_ok());
                    }
                    done
                })
            })
            .collect();
        outcomes = producers.into_iter().map(|producer| producer.join().unwrap()).sum();
    });
    assert_eq!(ran.load(Ordering::Relaxed), outcomes);
    let stats = pool.stats();
    assert_eq!((stats.completed, stats.aborted), (outcomes as u64, 9000 - outcomes as u64));
}
