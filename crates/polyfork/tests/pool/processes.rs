//! The same pool in threads and in child processes, and what only a process can do.
//!
//! The children are this test program, started again as the ignored test `jobs`.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use polyfork::child_process::{Command, Signal, Stdio, run_entries};
use polyfork::worker_threads::pool::{Full, Job, JobPool, Place, PoolError};
use polyfork::worker_threads::{Pool, PoolBuilder, Priority, TaskError};
use serde::{Deserialize, Serialize};

use super::{FOR_EVER, PATIENCE, soon, threads, until};

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Order {
    Square(u64),
    Who,
    Panic,
    Exit(i32),
    Kill,
    Hang,
    Swallow(Vec<u8>),
    Flood(usize),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Result {
    Number(u64),
    Bytes(Vec<u8>),
}

const WORK: Job<Order, Result> = Job::new("work", |order, context| {
    Result::Number(match order {
        Order::Square(number) => number * number,
        Order::Who => u64::from(std::process::id()),
        Order::Panic => panic!("as wished"),
        Order::Exit(code) => std::process::exit(code),
        Order::Kill => {
            let me = rustix::process::getpid();
            let pidfd = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty());
            rustix::process::pidfd_send_signal(pidfd.unwrap(), rustix::process::Signal::KILL)
                .unwrap();
            unreachable!("we are gone")
        }
        Order::Hang => {
            until("asked to stop", || context.is_cancelled());
            0
        }
        Order::Swallow(bytes) => bytes.len() as u64,
        Order::Flood(bytes) => return Result::Bytes(vec![7; bytes]),
    })
});

/// Not in this program.
const ABSENT: Job<u64, u64> = Job::new("absent", |number, _| number);

#[test]
#[ignore = "run by the other tests as their child"]
fn jobs() {
    run_entries(&[&WORK]);
    unreachable!("this is a child");
}

fn role(command: &mut Command) {
    command.args(["processes::jobs", "--exact", "--ignored", "--nocapture"]).stdout(Stdio::Ignore);
}

fn of(builder: PoolBuilder, place: Place) -> JobPool<Order, Result> {
    builder.child_command(role).of(&WORK, place).unwrap()
}

/// One process.
fn one() -> JobPool<Order, Result> {
    of(threads(1), Place::Process)
}

fn number(pool: &JobPool<Order, Result>, order: Order) -> u64 {
    match pool.run_blocking(order).unwrap() {
        Result::Number(number) => number,
        Result::Bytes(bytes) => panic!("{} bytes", bytes.len()),
    }
}

fn is_there(pid: u64) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn one_word_decides_between_threads_and_processes() {
    for place in [Place::Thread, Place::Process] {
        let pool = of(threads(2), place);
        let tasks: Vec<_> = (0..200).map(|n| pool.run(Order::Square(n))).collect();
        for (n, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.wait().unwrap(), Result::Number((n * n) as u64));
        }
        let own = number(&pool, Order::Who) == u64::from(std::process::id());
        assert_eq!(own, place == Place::Thread);
        let panicked = pool.run_blocking(Order::Panic);
        assert!(matches!(panicked, Err(TaskError::Panicked { text }) if text == "as wished"));
        let high = pool.task().priority(Priority::High).timeout(FOR_EVER).run(Order::Square(5));
        assert_eq!(high.wait().unwrap(), Result::Number(25));
        let stats = pool.stats();
        assert_eq!((stats.completed, stats.failed), (202, 1));
        pool.close().wait().unwrap();
        assert!(matches!(pool.run_blocking(Order::Who), Err(TaskError::Closed)));
    }
}

#[tokio::test]
async fn jobs_are_awaited_and_given_back_like_closures() {
    for place in [Place::Thread, Place::Process] {
        let pool = of(threads(1).max_queue(1), place);
        let hanging = pool.run(Order::Hang);
        until("it hangs", || pool.stats().running == 1);
        let waiting = pool.try_run(Order::Square(3)).unwrap();
        let rejected = pool.try_run(Order::Square(4)).unwrap_err();
        assert!(matches!(rejected.task, Order::Square(4)));
        drop(hanging);
        assert_eq!(soon(waiting).await.unwrap(), Result::Number(9));
        soon(pool.close()).await;
    }
}

#[test]
fn crash_is_the_error_of_its_job_and_the_child_is_replaced() {
    let pool = one();
    let first = number(&pool, Order::Who);
    let crashed = pool.run_blocking(Order::Exit(3)).unwrap_err();
    assert!(matches!(crashed, TaskError::Crashed { exit } if exit.code == Some(3)), "{crashed}");
    assert_eq!(crashed.to_string(), "process of the task ended under it with exit code 3");
    let second = number(&pool, Order::Who);
    let killed = pool.run_blocking(Order::Kill).unwrap_err();
    assert!(matches!(killed, TaskError::Crashed { exit } if exit.signal == Some(Signal::KILL)));
    let third = number(&pool, Order::Who);
    assert_eq!(HashSet::from([first, second, third]).len(), 3);
    assert!(!is_there(first) && !is_there(second), "they are reaped");
    assert_eq!(pool.stats().failed, 2);
}

#[test]
fn panic_in_a_child_leaves_the_child() {
    let pool = one();
    let before = number(&pool, Order::Who);
    assert!(matches!(pool.run_blocking(Order::Panic), Err(TaskError::Panicked { .. })));
    assert_eq!(number(&pool, Order::Who), before);
}

#[tokio::test]
async fn time_limit_kills_the_process() {
    let pool = one();
    let pid = number(&pool, Order::Who);
    let task = pool.task().timeout(Duration::from_millis(50)).run(Order::Hang);
    assert!(matches!(soon(task).await, Err(TaskError::TimedOut { begun: true })));
    until("killed", || !is_there(pid));
    assert_ne!(number(&pool, Order::Who), pid);
}

#[tokio::test]
async fn abort_and_drop_kill_the_process() {
    let pool = one();
    for drops in [false, true] {
        let pid = number(&pool, Order::Who);
        let task = pool.run(Order::Hang);
        until("it hangs", || pool.stats().running == 1);
        if drops {
            drop(task);
        } else {
            assert!(!task.abort(), "it had begun");
            assert!(matches!(soon(task).await, Err(TaskError::Aborted)));
        }
        until("killed", || !is_there(pid));
    }
    assert_eq!(number(&pool, Order::Square(2)), 4);
}

#[test]
fn abandoned_pool_kills_what_runs() {
    let pool = of(threads(2), Place::Process);
    let tasks = [pool.run(Order::Hang), pool.run(Order::Hang)];
    until("both hang", || pool.stats().running == 2);
    pool.abandon().wait().unwrap();
    for task in tasks {
        assert!(matches!(task.wait(), Err(TaskError::Aborted)));
    }
}

#[test]
fn child_that_died_at_rest_is_replaced_without_a_word() {
    let pool = one();
    for _ in 0..3 {
        let pid = number(&pool, Order::Who);
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
        let mut ended = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(rustix::event::poll(&mut ended, Some(&limit)).unwrap(), 1);
        assert_eq!(number(&pool, Order::Square(7)), 49);
    }
    assert_eq!(pool.stats().failed, 0);
}

#[test]
fn child_is_replaced_after_its_number_of_jobs() {
    let pool = of(threads(1).tasks_per_thread(2), Place::Process);
    let pids: Vec<_> = (0..6).map(|_| number(&pool, Order::Who)).collect();
    assert_eq!(HashSet::<_>::from_iter(&pids).len(), 3, "{pids:?}");
    pool.close().wait().unwrap();
    assert!(pids.into_iter().all(|pid| !is_there(pid)), "no child is left");
}

#[test]
fn idle_children_leave_with_their_threads() {
    let builder = Pool::builder().min_threads(0).max_threads(2);
    let pool = of(builder.idle_timeout(Duration::from_millis(10)), Place::Process);
    let pid = number(&pool, Order::Who);
    until("it has left", || pool.stats().threads == 0 && !is_there(pid));
}

#[test]
fn what_does_not_fit_into_a_message_is_told_and_harms_nobody() {
    let pool = one();
    let many = (64 << 20) + 1;
    let refused = pool.run_blocking(Order::Swallow(vec![1; many])).unwrap_err();
    assert!(
        matches!(&refused, TaskError::Process { reason } if reason.contains("limit")),
        "{refused}"
    );
    let large = pool.run_blocking(Order::Flood(8 << 20)).unwrap();
    assert!(matches!(large, Result::Bytes(bytes) if bytes.len() == 8 << 20));
    let lost = pool.run_blocking(Order::Flood(many)).unwrap_err();
    assert!(matches!(lost, TaskError::Crashed { .. } | TaskError::Process { .. }), "{lost}");
    assert_eq!(number(&pool, Order::Square(9)), 81);
}

#[test]
fn child_that_cannot_be_started_or_has_not_the_job_is_told() {
    let builder = threads(1).child_command(|command| {
        command.current_dir("/nowhere/at/all");
    });
    let pool = builder.of(&WORK, Place::Process).unwrap();
    let refused = pool.run_blocking(Order::Who).unwrap_err();
    assert!(
        matches!(&refused, TaskError::Process { reason } if reason.contains("start")),
        "{refused}"
    );
    let builder = threads(1).child_command(|command| {
        role(command);
        command.stderr(Stdio::Ignore);
    });
    let pool = builder.of(&ABSENT, Place::Process).unwrap();
    let crashed = pool.run_blocking(1).unwrap_err();
    assert!(matches!(crashed, TaskError::Crashed { exit } if exit.code == Some(70)), "{crashed}");
}

#[test]
fn caller_cannot_stand_in_for_a_process() {
    let refused = threads(1).when_full(Full::RunInCaller).of(&WORK, Place::Process);
    assert!(matches!(refused, Err(PoolError::Invalid(text)) if text.contains("RunInCaller")));
}
