//! What comes out of a task, from whoever brings it.

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

use polyfork::worker_threads::{Pool, TaskError};

use super::{Gate, soon, threads, until};

#[tokio::test]
async fn result_reaches_whoever_awaits() {
    let pool = Pool::new().unwrap();
    let text = "moved in".to_owned();
    assert_eq!(soon(pool.run(move || text + " and out")).await.unwrap(), "moved in and out");
}

#[tokio::test]
async fn runtime_goes_on_while_a_task_runs() {
    let pool = threads(1).build().unwrap();
    let gate = Gate::default();
    let door = gate.clone();
    let task = pool.run(move || door.pass());
    // On this one thread of the runtime: it could not open the gate if it were blocked.
    soon(async {
        tokio::task::yield_now().await;
        gate.open();
        task.await.unwrap();
    })
    .await;
}

#[test]
fn no_runtime_is_needed() {
    struct Flag(AtomicBool);
    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let pool = threads(1).build().unwrap();
    let gate = Gate::default();
    let door = gate.clone();
    let mut task = pin!(pool.run(move || {
        door.pass();
        7
    }));
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let waker = Waker::from(flag.clone());
    assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    gate.open();
    until("woken", || flag.0.load(Ordering::SeqCst));
    match task.as_mut().poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(outcome) => assert_eq!(outcome.unwrap(), 7),
        Poll::Pending => panic!("woken without an outcome"),
    }
}

#[test]
fn the_waker_of_the_last_poll_is_woken() {
    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let pool = threads(1).build().unwrap();
    let gate = Gate::default();
    let door = gate.clone();
    let mut task = pin!(pool.run(move || door.pass()));
    let counts = [(); 2].map(|()| Arc::new(Count(AtomicUsize::new(0))));
    for count in &counts {
        let waker = Waker::from(count.clone());
        assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    gate.open();
    until("woken", || counts[1].0.load(Ordering::SeqCst) == 1);
    assert_eq!(counts[0].0.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn panic_is_the_error_of_its_task_and_of_no_other() {
    let pool = threads(1).build().unwrap();
    let other = pool.run(|| thread::current().id());
    let text = soon(pool.run(|| -> () { panic!("no {}", "luck") })).await.unwrap_err();
    assert!(matches!(&text, TaskError::Panicked { text } if text == "no luck"), "{text:?}");
    assert_eq!(text.to_string(), "task panicked: no luck");
    let literal = soon(pool.run(|| -> () { panic!("plain") })).await.unwrap_err();
    assert!(matches!(literal, TaskError::Panicked { text } if text == "plain"));
    let odd = soon(pool.run(|| -> () { std::panic::panic_any(5) })).await.unwrap_err();
    assert!(matches!(odd, TaskError::Panicked { text } if text.contains("no text")));
    let after = soon(pool.run(|| thread::current().id())).await.unwrap();
    assert_eq!(soon(other).await.unwrap(), after, "the thread goes on");
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[tokio::test]
async fn panic_while_something_is_dropped_ends_no_thread() {
    let pool = threads(1).build().unwrap();
    // What the closure holds, what the panic carries, what comes out.
    let held = PanicsWhenDropped;
    let outcome = soon(pool.run(move || drop(held))).await;
    assert!(matches!(outcome, Err(TaskError::Panicked { text }) if text == "dropped"));
    let outcome = soon(pool.run(|| -> () { std::panic::panic_any(PanicsWhenDropped) })).await;
    assert!(matches!(outcome, Err(TaskError::Panicked { .. })));
    pool.run(|| PanicsWhenDropped).detach().unwrap();
    assert_eq!(soon(pool.run(|| 1)).await.unwrap(), 1);
    assert_eq!(pool.stats().threads_started, 1);
}

#[test]
fn lock_that_a_task_poisoned_is_that_locks_affair() {
    let pool = threads(2).build().unwrap();
    let lock = Arc::new(Mutex::new(0));
    let held = lock.clone();
    let outcome = pool.run_blocking(move || {
        let _held = held.lock().unwrap();
        panic!("in the critical section");
    });
    let outcome: Result<(), _> = outcome;
    assert!(matches!(outcome, Err(TaskError::Panicked { .. })));
    assert!(lock.is_poisoned());
    assert_eq!(pool.run_blocking(|| 2).unwrap(), 2);
    pool.close().wait().unwrap();
}

#[test]
fn tasks_use_all_threads_at_once() {
    let pool = threads(4).build().unwrap();
    let barrier = Arc::new(Barrier::new(4));
    let tasks = (0..4).map(|_| {
        let barrier = barrier.clone();
        pool.run(move || barrier.wait().is_leader())
    });
    let tasks: Vec<_> = tasks.collect();
    let leaders = tasks.into_iter().filter_map(|task| task.wait().ok()).filter(|leads| *leads);
    assert_eq!(leaders.count(), 1);
}

#[test]
fn many_producers_of_short_and_long_tasks_get_what_is_theirs() {
    let pool = Pool::builder().min_threads(0).max_threads(3).max_queue(64).build().unwrap();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for producer in 0..8_u64 {
            let (pool, done) = (&pool, &done);
            scope.spawn(move || {
                for burst in 0..200_u64 {
                    let tasks: Vec<_> = (0..16)
                        .map(|task| {
                            let number = producer * 1_000_000 + burst * 100 + task;
                            pool.run(move || {
                                (0..number % 7 * 50).for_each(|_| std::hint::spin_loop());
                                number
                            })
                        })
                        .collect();
                    for (task, outcome) in tasks.into_iter().enumerate() {
                        let expected = producer * 1_000_000 + burst * 100 + task as u64;
                        assert_eq!(outcome.wait().unwrap(), expected);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(done.into_inner(), 8 * 200 * 16);
    let stats = pool.stats();
    assert_eq!((stats.completed, stats.waiting, stats.in_line), (8 * 200 * 16, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_async_producers_with_pauses_lose_no_wake_up() {
    let pool = threads(2).build().unwrap();
    let producers: Vec<_> = (0..4_u64)
        .map(|producer| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for round in 0..2000_u64 {
                    assert_eq!(
                        soon(pool.run(move || producer ^ round)).await.unwrap(),
                        producer ^ round
                    );
                    if round % 17 == 0 {
                        // Long enough for threads to lie down.
                        tokio::time::sleep(std::time::Duration::from_micros(200)).await;
                    }
                }
            })
        })
        .collect();
    for producer in producers {
        soon(producer).await.unwrap();
    }
}

#[test]
fn task_may_wait_for_tasks_it_brought() {
    fn fibonacci(pool: &Pool, n: u64) -> u64 {
        if n < 2 {
            return n;
        }
        let inner = pool.clone();
        let left = pool.run(move || fibonacci(&inner, n - 1));
        let inner = pool.clone();
        let right = pool.run_blocking(move || fibonacci(&inner, n - 2)).unwrap();
        left.wait().unwrap() + right
    }
    let pool = threads(1).build().unwrap();
    let inner = pool.clone();
    assert_eq!(pool.run_blocking(move || fibonacci(&inner, 12)).unwrap(), 144);
}

#[test]
fn thread_local_variables_are_a_threads_own() {
    thread_local!(static TASKS: Cell<usize> = const { Cell::new(0) });
    let pool = threads(1).build().unwrap();
    for expected in 1..=3 {
        let seen = pool.run_blocking(|| {
            TASKS.set(TASKS.get() + 1);
            TASKS.get()
        });
        assert_eq!(seen.unwrap(), expected);
    }
    assert_eq!(TASKS.get(), 0);
}
