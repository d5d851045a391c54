//! The figures a pool gives of itself.

use std::time::Duration;

use super::{occupy, threads, until};

#[test]
fn figures_tell_what_was_done() {
    let pool = threads(1).build().unwrap();
    let sleep = Duration::from_millis(3);
    for _ in 0..4 {
        pool.run_blocking(move || std::thread::sleep(sleep)).unwrap();
    }
    let _ = pool.run_blocking(|| -> () { panic!("counted apart") });
    let stats = pool.stats();
    assert_eq!((stats.completed, stats.failed, stats.running), (4, 1, 0));
    assert_eq!(stats.wait_time.count(), 5);
    let median = stats.run_time.quantile(0.5);
    assert!(median >= sleep.mul_f64(15.0 / 16.0), "{median:?}");
    assert!(stats.run_time.max() >= sleep && stats.run_time.sum() >= sleep * 4);
    assert!(stats.run_time.mean() >= sleep.mul_f64(0.75));
    assert!(stats.utilisation > 0.0 && stats.utilisation <= 1.0);
}

#[test]
fn what_is_under_way_is_seen() {
    let pool = threads(2).build().unwrap();
    let (gate, held) = occupy(&pool);
    let (second, also) = occupy(&pool);
    let waiting = pool.run(|| ());
    let stats = pool.stats();
    assert_eq!((stats.threads, stats.running, stats.waiting, stats.idle), (2, 2, 1, 0));
    assert_eq!(stats.completed, 0);
    std::thread::sleep(Duration::from_millis(5));
    let later = pool.stats();
    assert!(later.utilisation > stats.utilisation, "a task in hand counts as it goes");
    gate.open();
    second.open();
    [held, also, waiting].into_iter().for_each(|task| task.wait().unwrap());
    until("at rest", || pool.stats().idle == 2);
    assert_eq!(pool.stats().completed, 3);
}
