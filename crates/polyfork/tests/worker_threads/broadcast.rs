//! Broadcast channels: who hears what.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use polyfork::worker_threads::Broadcasted::{self, Message, Missed};
use polyfork::worker_threads::{
    BroadcastChannel, BroadcastError, TryReceiveError, WhenFull, Worker, WorkerContext,
};

use crate::support::{Census, block_on};

#[test]
fn messages_reach_every_other_channel_of_the_name_in_order() {
    let mut channels: Vec<BroadcastChannel<u32>> =
        (0..3).map(|_| BroadcastChannel::new("order").unwrap()).collect();
    let mut stranger = BroadcastChannel::<u32>::new("another").unwrap();
    for number in 0..10 {
        assert_eq!(channels[0].post_message(number), 2);
    }
    assert_eq!(channels[1].post_message(10), 2);
    assert!(stranger.try_receive().is_err());
    assert_eq!(channels[0].try_receive(), Ok(Message(10)), "and not its own");
    assert_eq!(channels[0].try_receive(), Err(TryReceiveError::Empty));
    for number in 0..11 {
        assert_eq!(channels[2].receive_blocking(), Some(Message(number)));
    }
    assert_eq!(channels[0].name(), "order");
}

#[test]
fn closed_channels_hear_nothing_more_and_post_to_nobody() {
    let one = BroadcastChannel::<u32>::new("closing").unwrap();
    let mut other = BroadcastChannel::<u32>::new("closing").unwrap();
    one.post_message(1);
    other.close();
    other.close();
    assert!(other.is_closed());
    assert_eq!(other.receive_blocking(), None);
    assert_eq!(other.try_receive(), Err(TryReceiveError::Closed));
    assert_eq!(one.post_message(2), 0);
    assert_eq!(other.post_message(3), 0);
}

#[test]
fn messages_reach_other_threads_and_wake_who_waits() {
    let here = BroadcastChannel::<String>::new("threads").unwrap();
    let workers: Vec<_> = (0..3)
        .map(|_| {
            Worker::<(), String>::spawn_async(async |parent: WorkerContext<(), String>| {
                let mut channel = BroadcastChannel::<String>::new("threads").unwrap();
                parent.try_post_message("ready".to_owned()).unwrap();
                while let Some(Message(text)) = channel.receive().await {
                    if text == "done" {
                        break;
                    }
                }
                parent.try_post_message("heard".to_owned()).unwrap();
            })
            .unwrap()
        })
        .collect();
    let mut workers = workers;
    for worker in &mut workers {
        assert_eq!(worker.receive_blocking().as_deref(), Some("ready"));
    }
    assert_eq!(here.post_message("first".to_owned()), 3);
    assert_eq!(here.post_message("done".to_owned()), 3);
    for worker in &mut workers {
        assert_eq!(worker.receive_blocking().as_deref(), Some("heard"));
    }
}

#[test]
fn who_does_not_keep_up_misses_what_it_chose_and_is_told_how_much() {
    let one = BroadcastChannel::<u32>::new("slow").unwrap();
    let mut news = BroadcastChannel::with("slow", 2, WhenFull::DropOldest).unwrap();
    let mut history = BroadcastChannel::with("slow", 2, WhenFull::DropNewest).unwrap();
    for number in 0..5 {
        one.post_message(number);
    }
    let all = |channel: &mut BroadcastChannel<u32>| -> Vec<Broadcasted<u32>> {
        std::iter::from_fn(|| channel.try_receive().ok()).collect()
    };
    assert_eq!(all(&mut news), [Missed(3), Message(3), Message(4)]);
    assert_eq!(all(&mut history), [Message(0), Message(1), Missed(3)]);
    one.post_message(5);
    assert_eq!(all(&mut news), [Message(5)]);
    assert_eq!(all(&mut history), [Message(5)]);
}

#[test]
fn a_name_has_one_type_until_its_last_channel_is_gone() {
    let one = BroadcastChannel::<u32>::new("typed").unwrap();
    let error = BroadcastChannel::<String>::new("typed").unwrap_err();
    assert_eq!(error, BroadcastError::OtherType("typed".to_owned()));
    drop(one);
    let other = BroadcastChannel::<String>::new("typed").unwrap();
    assert_eq!(other.post_message("alone".to_owned()), 0);
}

#[test]
fn what_is_not_received_is_dropped_with_its_channel() {
    let census = Census::default();
    type Shared = BroadcastChannel<Arc<crate::support::Counted>>;
    let one = Shared::new("leak").unwrap();
    let others: Vec<_> = (0..3).map(|_| Shared::new("leak").unwrap()).collect();
    for _ in 0..10 {
        one.post_message(Arc::new(census.message()));
    }
    assert_eq!(census.alive(), 10);
    drop(others);
    assert_eq!(census.alive(), 0);
}

#[test]
fn waiting_has_a_limit_and_ends_with_a_close() {
    let mut channel = BroadcastChannel::<u32>::new("limit").unwrap();
    assert_eq!(channel.receive_timeout(Duration::from_millis(1)), Err(TryReceiveError::Empty));
    let other = BroadcastChannel::<u32>::new("limit").unwrap();
    let waiting = thread::spawn(move || {
        assert_eq!(block_on(channel.receive()), Some(Message(1)));
        channel.close();
        assert_eq!(block_on(channel.receive()), None);
    });
    other.post_message(1);
    waiting.join().unwrap();
}
