//! The ring of records between two processes.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use polyfork::child_process::{Forked, Signal};
use polyfork::shared_memory::SharedArrayBuffer;
use polyfork::shared_memory::ring::{
    self, AttachError, Consumer, Producer, ReceiveError, SendError,
};

use crate::support::{PATIENCE, amount, record, role_with};

/// How a death is noticed here.
const NOTICED: Duration = Duration::from_millis(100);

async fn producer_from(memory: &SharedArrayBuffer, first: u64) -> Forked {
    let forked = role_with("produces", memory).await;
    forked.channel.send(&first).await.unwrap();
    forked
}

#[tokio::test]
async fn records_of_another_process_arrive_whole_and_in_order() {
    let memory = ring::create(4096).unwrap();
    let _producing = producer_from(&memory, 0).await;
    let mut consumer = Consumer::new(&memory).unwrap();
    let mut got = Vec::new();
    for number in 0..50_000 {
        assert!(consumer.pop_async(&mut got).await.unwrap());
        assert_eq!(got, record(number));
    }
    for number in 50_000..amount(300_000, 100_000_000) {
        assert!(consumer.pop(&mut got, Some(PATIENCE)).unwrap());
        assert_eq!(got, record(number));
    }
}

#[tokio::test]
async fn producer_killed_at_any_point_is_replaced_by_another() {
    let memory = ring::create(1024).unwrap();
    let mut number = 0;
    for round in 0..amount(15, 500) {
        let producing = producer_from(&memory, number).await;
        let mut child = producing.child;
        let mut consumer = Consumer::new(&memory).unwrap();
        let consuming = tokio::task::spawn_blocking(move || {
            let mut got = Vec::new();
            // The first comes when the process has started.
            let mut patience = PATIENCE;
            loop {
                match consumer.pop(&mut got, Some(patience)) {
                    Ok(true) => assert_eq!(got, record(number)),
                    Ok(false) => panic!("it does not leave by itself"),
                    Err(ReceiveError::Empty) => break,
                    Err(error) => panic!("{error}"),
                }
                number += 1;
                patience = NOTICED;
            }
            // As a process that is killed: it does not say that it leaves.
            std::mem::forget(consumer);
            number
        });
        tokio::time::sleep(Duration::from_micros(20_000 + round * 1777)).await;
        child.kill(Signal::KILL).unwrap();
        child.wait().await.unwrap();
        number = consuming.await.unwrap();
    }
    assert!(number > 1000, "hardly anything was sent: {number} records");
}

#[tokio::test]
async fn consumer_killed_at_any_point_leaves_the_rest() {
    let memory = ring::create(1024).unwrap();
    let taken = SharedArrayBuffer::new(8).unwrap();
    let seen = taken.u64().unwrap();
    let mut number = 0;
    for round in 0..amount(15, 500) {
        seen[0].store(number, SeqCst);
        let consuming = role_with("consumes", &memory).await;
        consuming.channel.send_with(&"taken", taken.clone()).await.unwrap();
        let (mut child, first, theirs) = (consuming.child, number, seen.clone());
        let mut producer = Producer::new(&memory).unwrap();
        let producing = tokio::task::spawn_blocking(move || {
            loop {
                let begun = theirs[0].load(SeqCst) > first;
                match producer.push(&record(number), Some(if begun { NOTICED } else { PATIENCE })) {
                    Ok(()) => number += 1,
                    Err(SendError::Full) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            std::mem::forget(producer);
            number
        });
        while seen[0].load(SeqCst) == first {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(round * 777)).await;
        child.kill(Signal::KILL).unwrap();
        child.wait().await.unwrap();
        number = producing.await.unwrap();
        // At most one was taken of which it could not say so any more.
        let told = seen[0].load(SeqCst);
        let mut consumer = Consumer::new(&memory).unwrap();
        let (mut got, mut rest) = (Vec::new(), Vec::new());
        while let Ok(true) = consumer.try_pop(&mut got) {
            rest.push(got.clone());
        }
        let from = number - rest.len() as u64;
        assert!(from == told || from == told + 1, "{told} {from}");
        assert!((from..).zip(&rest).all(|(number, got)| *got == record(number)));
        std::mem::forget(consumer);
    }
}

#[tokio::test]
async fn ends_that_are_dropped_tell_the_other_end_whether_it_sleeps_or_not() {
    let memory = ring::create(1024).unwrap();
    let (mut producer, mut consumer) =
        (Producer::new(&memory).unwrap(), Consumer::new(&memory).unwrap());
    producer.try_push(b"last").unwrap();
    let mut got = Vec::new();
    let sleeping = tokio::spawn(async move {
        assert!(consumer.pop_async(&mut got).await.unwrap());
        assert_eq!(got, b"last");
        assert!(!consumer.pop_async(&mut got).await.unwrap() && got.is_empty());
        assert!(!consumer.pop(&mut got, None).unwrap());
    });
    tokio::time::sleep(Duration::from_millis(5)).await;
    drop(producer);
    tokio::time::timeout(PATIENCE, sleeping).await.unwrap().unwrap();

    let memory = ring::create(64).unwrap();
    let (mut producer, consumer) =
        (Producer::new(&memory).unwrap(), Consumer::new(&memory).unwrap());
    producer.try_push(&[1; 50]).unwrap();
    let sleeping = tokio::task::spawn_blocking(move || {
        let told = producer.push(&[2; 50], None).unwrap_err();
        assert!(matches!(told, SendError::Abandoned), "{told}");
        assert!(matches!(producer.try_push(&[2; 50]), Err(SendError::Abandoned)));
    });
    tokio::time::sleep(Duration::from_millis(5)).await;
    drop(consumer);
    tokio::time::timeout(PATIENCE, sleeping).await.unwrap().unwrap();
}

#[tokio::test]
async fn full_and_empty_are_told_and_nothing_is_lost() {
    let memory = ring::create(64).unwrap();
    let (mut producer, mut consumer) =
        (Producer::new(&memory).unwrap(), Consumer::new(&memory).unwrap());
    let (mut got, soon) = (Vec::new(), Some(Duration::from_millis(5)));
    assert!(matches!(consumer.try_pop(&mut got), Err(ReceiveError::Empty)));
    assert!(matches!(consumer.pop(&mut got, soon), Err(ReceiveError::Empty)));
    producer.try_push(&[1; 40]).unwrap();
    assert!(matches!(producer.try_push(&[2; 40]), Err(SendError::Full)));
    assert!(matches!(producer.push(&[2; 40], soon), Err(SendError::Full)));
    let limit = producer.longest();
    assert!(
        matches!(producer.try_push(&[0; 100]), Err(SendError::TooLong { length: 100, limit: l }) if l == limit)
    );
    let waiting = tokio::spawn(async move {
        producer.push_async(&[2; 40]).await.unwrap();
        producer
    });
    tokio::task::yield_now().await;
    for expected in [1, 2] {
        assert!(consumer.pop_async(&mut got).await.unwrap());
        assert_eq!(got, [expected; 40]);
    }
    drop(waiting.await.unwrap());
    assert!(!consumer.try_pop(&mut got).unwrap());
}

#[test]
fn memory_without_a_ring_has_no_ends() {
    let memory = SharedArrayBuffer::new(4096).unwrap();
    assert!(matches!(Producer::new(&memory), Err(AttachError::Corrupt(_))));
    assert!(matches!(Consumer::new(&memory), Err(AttachError::Corrupt(_))));
    for length in [0, 8, 256, 1024] {
        let short = SharedArrayBuffer::new(length).unwrap();
        assert!(Producer::new(&short).is_err() && Consumer::new(&short).is_err());
    }
}

#[test]
fn fault_124_ring_that_lies_stops_this_end_and_nothing_else() {
    let memory = ring::create(1024).unwrap();
    let (mut producer, mut consumer) =
        (Producer::new(&memory).unwrap(), Consumer::new(&memory).unwrap());
    producer.try_push(&[1; 100]).unwrap();
    // The bells and the header, all of it.
    let other = SharedArrayBuffer::try_from(
        std::os::fd::AsFd::as_fd(&memory).try_clone_to_owned().unwrap(),
    )
    .unwrap();
    for word in &other.u64().unwrap()[33..] {
        word.store(u64::MAX - 12, SeqCst);
    }
    let mut got = Vec::new();
    assert!(matches!(consumer.pop(&mut got, None), Err(ReceiveError::Corrupt(_))));
    assert!(producer.push(&[1; 1000], Some(PATIENCE)).is_err());
}
