//! The ring with one thread, with two, and against a peer that writes what it likes into the words.
#![cfg(not(any(polyfork_loom, polyfork_shuttle)))]
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polyfork_core::sync::ring::{
    Consumer, Corrupt, HEADER_WORDS, Producer, PushError, format, words_for,
};
use proptest::prelude::*;

type Words = Arc<[AtomicU64]>;

fn words(data: usize) -> Words {
    (0..HEADER_WORDS + data).map(|_| AtomicU64::new(0)).collect()
}

fn ends(words: &Words) -> (Producer<Words>, Consumer<Words>) {
    (Producer::new(Arc::clone(words)).unwrap(), Consumer::new(Arc::clone(words)).unwrap())
}

fn ring(data: usize) -> (Producer<Words>, Consumer<Words>) {
    let words = words(data);
    format(&words).unwrap();
    ends(&words)
}

fn popped(consumer: &mut Consumer<Words>) -> Option<(u32, Vec<u8>)> {
    let mut bytes = Vec::new();
    consumer.pop(&mut bytes).unwrap().map(|kind| (kind, bytes))
}

#[test]
fn full_ring_refuses_and_takes_again_when_something_was_taken() {
    let (mut producer, mut consumer) = ring(8);
    assert_eq!(producer.longest(), 56);
    producer.push(1, &[1; 30]).unwrap();
    assert_eq!(producer.push(2, &[2; 30]), Err(PushError::Full));
    producer.push(3, &[3; 16]).unwrap();
    assert_eq!(producer.push(4, &[]), Err(PushError::Full));
    assert_eq!(popped(&mut consumer), Some((1, vec![1; 30])));
    producer.push(5, &[5; 32]).unwrap();
    assert_eq!(popped(&mut consumer), Some((3, vec![3; 16])));
    assert_eq!(popped(&mut consumer), Some((5, vec![5; 32])));
    assert_eq!(popped(&mut consumer), None);
    let too_long = PushError::TooLong { length: 57, limit: 56 };
    assert_eq!(producer.push(0, &[0; 57]), Err(too_long));
    assert_eq!(producer.prepare_sleep(57), Err(too_long));
    producer.push(0, &[0; 56]).unwrap();
    assert_eq!(producer.room(), Ok(0));
}

#[test]
fn capacity_is_the_power_of_two_that_fits() {
    let memory = words(1000);
    format(&memory).unwrap();
    assert_eq!(ends(&memory).0.longest(), 511 * 8);
    assert_eq!(words_for(4096), HEADER_WORDS + 512);
    assert_eq!(words_for(4097), HEADER_WORDS + 1024);
    assert!(format(&words(1)).is_err());
    assert!(Producer::new(words(64)).is_err(), "it was never formatted");
}

#[test]
fn ends_that_are_attached_later_go_on_where_they_are() {
    let memory = words(16);
    format(&memory).unwrap();
    let (mut producer, mut consumer) = ends(&memory);
    for kind in 0..100 {
        producer.push(kind, &[7; 9]).unwrap();
        producer.push(kind, &[]).unwrap();
        popped(&mut consumer).unwrap();
        (producer, consumer) = ends(&memory);
        assert_eq!(popped(&mut consumer), Some((kind, Vec::new())));
    }
}

#[test]
fn sleeping_is_called_off_when_there_is_something_to_do() {
    let (mut producer, mut consumer) = ring(8);
    assert!(consumer.prepare_sleep().unwrap());
    producer.push(0, &[0; 40]).unwrap();
    assert!(producer.must_wake());
    assert!(!producer.must_wake(), "one sleep costs one wake-up");
    assert!(!consumer.prepare_sleep().unwrap());
    assert!(!producer.must_wake());
    assert!(producer.prepare_sleep(16).unwrap());
    assert!(!consumer.must_wake(), "there is no room yet");
    popped(&mut consumer).unwrap();
    assert!(consumer.must_wake() && !consumer.must_wake());
    assert!(!producer.prepare_sleep(16).unwrap());
    assert!(!consumer.must_wake());
}

#[test]
fn ends_tell_that_they_are_gone() {
    let (producer, consumer) = ring(8);
    assert!(!producer.is_abandoned() && !consumer.is_abandoned());
    consumer.leave();
    assert!(producer.is_abandoned() && !consumer.is_abandoned());
    producer.leave();
    assert!(consumer.is_abandoned());
}

#[test]
fn millions_of_records_arrive_once_and_in_order() {
    let (mut producer, mut consumer) = ring(256);
    let count = if cfg!(debug_assertions) { 500_000_u32 } else { 5_000_000 };
    let length = |kind: u32| (kind.wrapping_mul(2_654_435_761) >> 24) as usize;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for kind in 0..count {
                let bytes = [kind as u8; 256];
                while producer.push(kind, &bytes[..length(kind)]) == Err(PushError::Full) {
                    std::thread::yield_now();
                }
            }
        });
        let mut bytes = Vec::new();
        for expected in 0..count {
            bytes.clear();
            let kind = loop {
                match consumer.pop(&mut bytes).unwrap() {
                    Some(kind) => break kind,
                    None => std::thread::yield_now(),
                }
            };
            assert_eq!((kind, bytes.len()), (expected, length(expected)));
            assert!(bytes.iter().all(|byte| *byte == kind as u8));
        }
    });
}

#[test]
fn fault_124_position_that_lies_is_corrupt_and_nothing_else() {
    const TAIL: usize = 16;
    const HEAD: usize = 32;
    for lie in [1 << 40, u64::MAX, 17, (1 << 63) + 3] {
        let memory = words(16);
        format(&memory).unwrap();
        let (mut producer, mut consumer) = ends(&memory);
        producer.push(0, &[1; 20]).unwrap();
        popped(&mut consumer).unwrap();
        memory[TAIL].store(lie, Ordering::Relaxed);
        let told = consumer.pop(&mut Vec::new());
        assert!(told.is_err() || lie == 17, "{lie} {told:?}");
        assert!(consumer.prepare_sleep().is_err() || lie == 17);
        memory[HEAD].store(lie, Ordering::Relaxed);
        assert!(matches!(producer.push(0, &[1; 110]), Err(PushError::Corrupt(_))));
        assert!(matches!(producer.prepare_sleep(110), Err(PushError::Corrupt(_))));
        let _ = (Producer::new(Arc::clone(&memory)), Consumer::new(Arc::clone(&memory)));
    }
}

#[test]
fn fault_124_position_that_goes_back_is_corrupt() {
    let memory = words(16);
    format(&memory).unwrap();
    let (mut producer, mut consumer) = ends(&memory);
    for _ in 0..2 {
        producer.push(0, &[]).unwrap();
    }
    popped(&mut consumer).unwrap();
    memory[16].store(1, Ordering::Relaxed);
    popped(&mut consumer).unwrap();
    assert!(consumer.pop(&mut Vec::new()).is_err());
}

#[test]
fn fault_124_record_longer_than_what_is_there_is_corrupt_and_takes_no_memory() {
    let memory = words(16);
    format(&memory).unwrap();
    let (mut producer, mut consumer) = ends(&memory);
    producer.push(0, &[1; 8]).unwrap();
    memory[HEADER_WORDS].store(u64::from(u32::MAX), Ordering::Relaxed);
    let mut into = Vec::new();
    assert_eq!(consumer.pop(&mut into), Err(Corrupt("a record is longer than what was added")));
    assert_eq!(into.capacity(), 0);
}

#[test]
fn fault_124_peer_that_changes_everything_all_the_time_stops_nobody() {
    let memory = words(32);
    format(&memory).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
            while !over.load(Ordering::Relaxed) {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let at = seed as usize % memory.len();
                let value = match seed >> 61 {
                    0 => seed,
                    1 => u64::MAX,
                    _ => seed >> 40 & 63,
                };
                // What says that it is a ring stays, or nothing would be tried.
                if at != 0 {
                    memory[at].store(value, Ordering::Relaxed);
                }
            }
        });
        let mut good = 0_u32;
        for _ in 0..200_000 {
            let mut bytes = Vec::new();
            if let Ok(mut consumer) = Consumer::new(Arc::clone(&memory)) {
                for _ in 0..4 {
                    good += u32::from(matches!(consumer.pop(&mut bytes), Ok(Some(_))));
                }
                let _ = consumer.prepare_sleep();
                let _ = consumer.must_wake();
            }
            assert!(bytes.len() <= 4 * 31 * 8);
            if let Ok(mut producer) = Producer::new(Arc::clone(&memory)) {
                for _ in 0..4 {
                    let _ = producer.push(1, &[1; 40]);
                }
                let _ = producer.prepare_sleep(100);
                let _ = producer.must_wake();
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(good > 0, "nothing was tried");
    });
}

#[derive(Debug, Clone)]
enum Step {
    Push(u32, Vec<u8>),
    Pop,
    /// Both ends are made anew from the words.
    Attach,
    /// The peer writes this there.
    Lie(usize, u64),
}

fn step(lies: bool) -> impl Strategy<Value = Step> {
    let lie = (0..HEADER_WORDS + 32, prop_oneof![0..200_u64, any::<u64>()]);
    prop_oneof![
        4 => (any::<u32>(), prop::collection::vec(any::<u8>(), 0..280)).prop_map(|(k, b)| Step::Push(k, b)),
        4 => Just(Step::Pop),
        1 => Just(Step::Attach),
        if lies { 2 } else { 0 } => lie.prop_map(|(at, value)| Step::Lie(at, value)),
    ]
}

proptest! {
    #[test]
    fn ring_is_a_bounded_queue(steps in prop::collection::vec(step(false), 1..200)) {
        let memory = words(32);
        format(&memory).unwrap();
        let (mut producer, mut consumer) = ends(&memory);
        let mut queue = VecDeque::new();
        let mut used = 0;
        for step in steps {
            match step {
                Step::Push(kind, bytes) => {
                    let need = 1 + bytes.len().div_ceil(8);
                    let pushed = producer.push(kind, &bytes);
                    if need > 32 {
                        prop_assert_eq!(pushed, Err(PushError::TooLong { length: bytes.len(), limit: 248 }));
                    } else if used + need > 32 {
                        prop_assert_eq!(pushed, Err(PushError::Full));
                        prop_assert!(producer.prepare_sleep(bytes.len()).unwrap());
                        producer.awake();
                    } else {
                        prop_assert_eq!(pushed, Ok(()));
                        used += need;
                        queue.push_back((kind, bytes));
                    }
                }
                Step::Pop => {
                    let expected = queue.pop_front();
                    used -= expected.as_ref().map_or(0, |(_, bytes)| 1 + bytes.len().div_ceil(8));
                    prop_assert_eq!(popped(&mut consumer), expected);
                }
                Step::Attach => (producer, consumer) = ends(&memory),
                Step::Lie(..) => unreachable!("this peer is honest"),
            }
        }
    }

    #[test]
    fn fault_124_no_lie_does_more_than_garbage(steps in prop::collection::vec(step(true), 1..200)) {
        let memory = words(32);
        format(&memory).unwrap();
        let (mut producer, mut consumer) = ends(&memory);
        for step in steps {
            match step {
                Step::Push(kind, bytes) => {
                    let _ = producer.push(kind, &bytes);
                    let _ = producer.must_wake();
                    let _ = producer.prepare_sleep(bytes.len());
                }
                Step::Pop => {
                    let mut bytes = Vec::new();
                    let _ = consumer.pop(&mut bytes);
                    prop_assert!(bytes.len() <= 31 * 8);
                    let _ = consumer.must_wake();
                    let _ = consumer.prepare_sleep();
                }
                Step::Attach => {
                    if let Ok(new) = Producer::new(Arc::clone(&memory)) {
                        producer = new;
                    }
                    if let Ok(new) = Consumer::new(Arc::clone(&memory)) {
                        consumer = new;
                    }
                }
                Step::Lie(at, value) => memory[at].store(value, Ordering::Relaxed),
            }
        }
    }
}
