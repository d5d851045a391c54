//! The sequence lock under loom: no torn value in any interleaving.
//!
//! `RUSTFLAGS="--cfg polyfork_loom" cargo test --release -p polyfork-core --test loom_seq`
#![cfg(polyfork_loom)]
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

use loom::sync::Arc;
use loom::thread;
use polyfork_core::sync::atomic::AtomicU64;
use polyfork_core::sync::seq::SeqLock;

#[derive(Clone)]
struct Words(Arc<Vec<AtomicU64>>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn lock() -> SeqLock<Words> {
    SeqLock::new(Words(Arc::new((0..3).map(|_| AtomicU64::new(0)).collect())))
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn value_is_read_whole_or_not_at_all() {
    check(|| {
        let writer = lock();
        let reader = writer.clone();
        let writing = thread::spawn(move || {
            writer.write(&[1, 1]).unwrap();
            writer.write(&[2, 2]).unwrap();
        });
        let mut last = 0;
        for _ in 0..2 {
            let mut value = [9, 9];
            if reader.read(&mut value).is_ok() {
                assert_eq!(value[0], value[1], "torn");
                assert!(value[0] >= last, "went back");
                last = value[0];
            }
        }
        writing.join().unwrap();
        let mut value = [9, 9];
        reader.read(&mut value).unwrap();
        assert_eq!(value, [2, 2]);
    });
}

#[test]
fn one_of_two_writers_gives_way() {
    check(|| {
        let one = lock();
        let other = one.clone();
        let reader = one.clone();
        let writing = thread::spawn(move || one.write(&[1, 1]).is_ok());
        let second = other.write(&[2, 2]).is_ok();
        let mut value = [9, 9];
        if reader.read(&mut value).is_ok() {
            assert_eq!(value[0], value[1], "torn");
        }
        assert!(writing.join().unwrap() || second);
    });
}
