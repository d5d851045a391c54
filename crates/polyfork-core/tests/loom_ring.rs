//! The ring and its sleeping flags under loom: every interleaving of two threads, with the memory model's reorderings.
//!
//! `RUSTFLAGS="--cfg polyfork_loom" cargo test --release -p polyfork-core --test loom_ring`
#![cfg(polyfork_loom)]
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use polyfork_core::sync::atomic::AtomicU64;
use polyfork_core::sync::ring::{Consumer, HEADER_WORDS, Producer, PushError, format};

#[derive(Clone)]
struct Words(Arc<Vec<AtomicU64>>);

impl AsRef<[AtomicU64]> for Words {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn ring(data: usize) -> (Producer<Words>, Consumer<Words>) {
    let words = Words(Arc::new((0..HEADER_WORDS + data).map(|_| AtomicU64::new(0)).collect()));
    format(words.as_ref()).unwrap();
    (Producer::new(words.clone()).unwrap(), Consumer::new(words).unwrap())
}

/// A way to sleep that keeps one wake-up, as an eventfd or a futex with its word does.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Bell {
        Bell(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }

    fn sleep(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn records_arrive_whole_and_in_order_round_the_end() {
    check(3, || {
        let (mut producer, mut consumer) = ring(4);
        let producing = thread::spawn(move || {
            for byte in 1..=3_u8 {
                // One word and two: the third goes round the end.
                let bytes = vec![byte; usize::from(byte) * 4];
                while producer.push(byte.into(), &bytes) == Err(PushError::Full) {
                    thread::yield_now();
                }
            }
        });
        for byte in 1..=3_u8 {
            let mut bytes = Vec::new();
            let kind = loop {
                match consumer.pop(&mut bytes).unwrap() {
                    Some(kind) => break kind,
                    None => thread::yield_now(),
                }
            };
            assert_eq!((kind, bytes), (byte.into(), vec![byte; usize::from(byte) * 4]));
        }
        producing.join().unwrap();
    });
}

#[test]
fn consumer_that_sleeps_is_woken_for_every_record() {
    check(3, || {
        let (mut producer, mut consumer) = ring(4);
        let bell = Bell::new();
        let rung = bell.clone();
        let producing = thread::spawn(move || {
            for kind in 0..2 {
                producer.push(kind, &[]).unwrap();
                if producer.must_wake() {
                    rung.ring();
                }
            }
        });
        let mut expected = 0;
        while expected < 2 {
            match consumer.pop(&mut Vec::new()).unwrap() {
                Some(kind) => {
                    assert_eq!(kind, expected);
                    expected += 1;
                }
                None => {
                    if consumer.prepare_sleep().unwrap() {
                        bell.sleep();
                    }
                }
            }
        }
        producing.join().unwrap();
    });
}

#[test]
fn producer_that_sleeps_is_woken_when_there_is_room() {
    check(3, || {
        let (mut producer, mut consumer) = ring(2);
        let bell = Bell::new();
        let rung = bell.clone();
        let consuming = thread::spawn(move || {
            let mut taken = 0;
            while taken < 2 {
                match consumer.pop(&mut Vec::new()).unwrap() {
                    Some(_) => {
                        taken += 1;
                        if consumer.must_wake() {
                            rung.ring();
                        }
                    }
                    None => thread::yield_now(),
                }
            }
        });
        for kind in 0..2 {
            // As long as the whole ring, so that the second needs what the first takes.
            while producer.push(kind, &[7; 8]) == Err(PushError::Full) {
                if producer.prepare_sleep(8).unwrap() {
                    bell.sleep();
                }
            }
        }
        consuming.join().unwrap();
    });
}

#[test]
fn both_sleep_and_both_are_woken() {
    check(2, || {
        let (mut producer, mut consumer) = ring(2);
        let (to_consumer, to_producer) = (Bell::new(), Bell::new());
        let (wake, sleep) = (to_consumer.clone(), to_producer.clone());
        let producing = thread::spawn(move || {
            for kind in 0..2 {
                while producer.push(kind, &[7; 8]) == Err(PushError::Full) {
                    if producer.prepare_sleep(8).unwrap() {
                        sleep.sleep();
                    }
                }
                if producer.must_wake() {
                    wake.ring();
                }
            }
        });
        let mut taken = 0;
        while taken < 2 {
            if consumer.pop(&mut Vec::new()).unwrap().is_some() {
                taken += 1;
                if consumer.must_wake() {
                    to_producer.ring();
                }
            } else if consumer.prepare_sleep().unwrap() {
                to_consumer.sleep();
            }
        }
        producing.join().unwrap();
    });
}
