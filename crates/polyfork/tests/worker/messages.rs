//! Messages, status and identity.

use std::io;

use polyfork::cluster::{Message, SendError};
use polyfork_wire::native::{PROTOCOL, ToPrimary, ToWorker};
use serde::{Deserialize, Serialize};

use crate::primary::{Primary, fill, soon};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Job {
    Add { a: u32, b: u32 },
    Done(String),
}

fn encoded(job: &Job) -> Vec<u8> {
    postcard::to_stdvec(job).unwrap()
}

#[tokio::test]
async fn a_worker_knows_who_it_is_once_it_was_welcomed() {
    let (worker, primary) = Primary::silent();
    assert_eq!((worker.id(), worker.slot(), worker.generation()), (None, None, None));
    assert!(!worker.is_standalone() && worker.is_connected());
    let welcome =
        ToWorker::Welcome { protocol: PROTOCOL, worker: 9, slot: 2, generation: 1, grace_ms: 1 };
    primary.say(&welcome, &[]).await;
    primary.heard(&worker).await;
    assert_eq!((worker.id(), worker.slot(), worker.generation()), (Some(9), Some(2), Some(1)));
}

#[tokio::test]
async fn messages_travel_both_ways_in_order() {
    let (worker, mut primary) = Primary::new().await;
    let jobs = [Job::Add { a: 1, b: 2 }, Job::Done("three".into())];
    for job in &jobs {
        worker.send(job).await.unwrap();
        primary.say(&ToWorker::Message(encoded(job)), &[]).await;
    }
    for job in &jobs {
        assert_eq!(primary.next().await, ToPrimary::Message(encoded(job)));
        let message: Message = soon(worker.recv()).await.unwrap();
        assert_eq!(message.decode::<Job>().unwrap(), *job);
        assert!(message.json().is_none());
    }
}

#[tokio::test]
async fn a_message_of_another_type_is_an_error_and_not_lost() {
    let (worker, primary) = Primary::new().await;
    primary.say(&ToWorker::Message(encoded(&Job::Done("x".into()))), &[]).await;
    let message = soon(worker.recv()).await.unwrap();
    assert!(message.decode::<[u64; 4]>().is_err());
    assert_eq!(message.decode::<Job>().unwrap(), Job::Done("x".into()));
}

#[tokio::test]
async fn sending_waits_for_a_primary_that_does_not_read() {
    let (worker, mut primary) = Primary::new().await;
    let queued = fill(&worker).await;
    let reading = tokio::spawn(async move {
        for _ in 0..=queued {
            assert!(matches!(primary.next().await, ToPrimary::Message(_)));
        }
        primary
    });
    soon(worker.send(&[1u8; 10_000][..])).await.unwrap();
    soon(worker.flush()).await;
    let mut primary = soon(reading).await.unwrap();
    assert!(primary.said(&worker).await.is_empty());
}

#[tokio::test]
async fn a_message_that_is_too_long_is_not_sent() {
    let (worker, mut primary) = Primary::new().await;
    let error = worker.send(&vec![0u8; 64 << 20]).await.unwrap_err();
    assert!(matches!(error, SendError::TooLong { .. }), "{error}");
    assert!(primary.said(&worker).await.is_empty());
}

#[tokio::test]
async fn a_large_message_arrives_whole() {
    let (worker, mut primary) = Primary::new().await;
    let text = Job::Done("long ".repeat(1 << 20));
    primary.say(&ToWorker::Message(encoded(&text)), &[]).await;
    assert_eq!(soon(worker.recv()).await.unwrap().decode::<Job>().unwrap(), text);
    worker.send(&text).await.unwrap();
    assert_eq!(primary.next().await, ToPrimary::Message(encoded(&text)));
}

#[tokio::test]
async fn messages_that_came_before_the_end_are_still_received() {
    let (worker, primary) = Primary::new().await;
    primary.say(&ToWorker::Message(encoded(&Job::Done("last".into()))), &[]).await;
    drop(primary);
    soon(worker.shutdown()).await;
    assert!(soon(worker.recv()).await.is_some());
    assert!(soon(worker.recv()).await.is_none());
    assert!(soon(worker.recv()).await.is_none());
}

#[tokio::test]
async fn nothing_can_be_sent_after_the_end() {
    let (worker, primary) = Primary::new().await;
    drop(primary);
    soon(worker.shutdown()).await;
    assert!(matches!(worker.send(&1).await, Err(SendError::Disconnected)));
    assert!(!worker.is_connected());
    let error = worker.listen("127.0.0.1:0").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    worker.flush().await;
}

#[tokio::test]
async fn a_sender_that_waits_hears_of_the_end() {
    let (worker, primary) = Primary::new().await;
    fill(&worker).await;
    let waiting = {
        let worker = worker.clone();
        tokio::spawn(async move { worker.send(&[1u8; 10_000][..]).await })
    };
    tokio::task::yield_now().await;
    drop(primary);
    assert!(matches!(soon(waiting).await.unwrap(), Err(SendError::Disconnected)));
}

#[tokio::test]
async fn a_status_is_cut_and_the_latest_counts() {
    let (worker, mut primary) = Primary::new().await;
    worker.status("warming up");
    worker.status("ä".repeat(2_000));
    let ToPrimary::Status { text } = primary.next().await else { panic!("no status") };
    assert_eq!(text, "ä".repeat(512));
}

#[tokio::test]
async fn a_program_that_says_so_is_ready() {
    let (worker, mut primary) = Primary::new().await;
    worker.ready();
    worker.ready();
    assert_eq!(primary.said(&worker).await, [ToPrimary::Ready]);
}
