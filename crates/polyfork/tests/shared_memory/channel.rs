//! Channels between two processes whose messages go through shared memory, when one of the two is killed.

use std::time::Duration;

use polyfork::child_process::Signal;

use crate::support::{PATIENCE, next, role};

#[tokio::test]
async fn sender_killed_at_any_point_leaves_a_whole_beginning() {
    let mut longest = 0_u32;
    for round in 0..25_u64 {
        let mut forked = role("floods");
        // Past the start, at another point each time.
        let first: (u32, String) = next(&mut forked.channel).await.to().unwrap();
        assert_eq!(first.0, 0);
        let mut child = forked.child;
        let killing = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(round * 1379)).await;
            child.kill(Signal::KILL).unwrap();
            child.wait().await.unwrap();
        });
        let mut expected = 1;
        while let Some(mut message) = forked.channel.recv().await.unwrap() {
            let (number, text): (u32, String) = message.to().unwrap();
            assert_eq!((number, text.len()), (expected, expected as usize % 60));
            assert_eq!(message.take_handle().is_some(), number % 500 == 499);
            expected += 1;
        }
        killing.await.unwrap();
        tokio::time::timeout(PATIENCE, forked.channel.closed()).await.unwrap();
        longest = longest.max(expected);
    }
    assert!(longest > 5000, "the ring was hardly ever used: {longest} messages at most");
}

#[tokio::test]
async fn message_that_has_left_before_its_sender_died_is_received() {
    for count in [1, 5000, 12_345] {
        let mut forked = role("dies_after_flush");
        forked.channel.send(&count).await.unwrap();
        for expected in 0..count {
            let (number, text): (u32, String) = next(&mut forked.channel).await.to().unwrap();
            assert_eq!((number, text.len()), (expected, expected as usize % 60));
        }
        assert!(forked.channel.recv().await.unwrap().is_none());
        assert_eq!(forked.child.wait().await.unwrap().signal, Some(Signal::ABRT));
    }
}

#[tokio::test]
async fn receiver_killed_at_any_point_is_noticed_by_the_sender() {
    for round in 0..15_u64 {
        let forked = role("receives");
        let sender = forked.channel.sender();
        let sending = tokio::spawn(async move {
            let mut sent = 0_u64;
            while sender.send(&(sent, [1_u8; 32])).await.is_ok() {
                sent += 1;
            }
            sent
        });
        let mut child = forked.child;
        tokio::time::sleep(Duration::from_millis(20) + Duration::from_micros(round * 997)).await;
        child.kill(Signal::KILL).unwrap();
        tokio::time::timeout(PATIENCE, sending).await.unwrap().unwrap();
        tokio::time::timeout(PATIENCE, forked.channel.closed()).await.unwrap();
        child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn stopped_receiver_stops_the_sender_and_loses_nothing() {
    let mut forked = role("floods");
    forked.child.kill(Signal::STOP).unwrap();
    forked.child.kill(Signal::CONT).unwrap();
    for expected in 0..20_000_u32 {
        if expected % 5000 == 4999 {
            // Nothing is received here for a while: the child has to wait.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (number, _): (u32, String) = next(&mut forked.channel).await.to().unwrap();
        assert_eq!(number, expected);
    }
    forked.child.kill(Signal::KILL).unwrap();
    forked.child.wait().await.unwrap();
}
