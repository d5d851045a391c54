//! Message ports: order, bounds, ends, and ports that travel.

use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use polyfork::worker_threads::{
    CyclicTransfer, MessageChannel, MessagePort, Transferred, TryPostError, TryReceiveError,
    receive_message_on_port,
};

use crate::support::{Census, Counted, PATIENCE, block_on};

#[test]
fn messages_arrive_in_order_on_both_sides_by_every_way_of_waiting() {
    for channel in [MessageChannel::<u32, u32>::new(), MessageChannel::bounded(3)] {
        let MessageChannel { mut port1, mut port2 } = channel;
        let other = thread::spawn(move || {
            for number in 0..10_000 {
                assert_eq!(port2.receive_blocking(), Some(number));
                port2.post_message_blocking(number).unwrap();
            }
            assert_eq!(port2.receive_blocking(), None);
        });
        let poster = port1.poster();
        let posting = thread::spawn(move || {
            for number in 0..10_000 {
                block_on(poster.post_message(number)).unwrap();
            }
        });
        block_on(async {
            for number in 0..10_000 {
                assert_eq!(port1.receive().await, Some(number));
            }
        });
        posting.join().unwrap();
        drop(port1);
        other.join().unwrap();
    }
}

#[test]
fn synchronous_receive_takes_one_message_in_order_or_none() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::new();
    assert_eq!(receive_message_on_port(&mut port2), None);
    for number in 0..3 {
        port1.try_post_message(number).unwrap();
    }
    assert_eq!(port2.waiting(), 3);
    for number in 0..3 {
        assert_eq!(receive_message_on_port(&mut port2), Some(number));
    }
    assert_eq!(port2.try_receive(), Err(TryReceiveError::Empty));
    drop(port1);
    assert_eq!(port2.try_receive(), Err(TryReceiveError::Closed));
    assert_eq!(receive_message_on_port(&mut port2), None);
}

#[test]
fn the_bound_is_exact_and_what_is_full_gives_the_message_back() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::bounded(4);
    for round in 0..10 {
        for number in 0..4 {
            port1.try_post_message(number).unwrap();
        }
        assert_eq!(port1.try_post_message(99), Err(TryPostError::Full(99)));
        // What waits here counts, whether it was looked at together with others or not.
        assert_eq!(port2.try_receive(), Ok(0));
        port1.try_post_message(4).unwrap();
        assert_eq!(port1.try_post_message(99), Err(TryPostError::Full(99)));
        for number in 1..5 {
            assert_eq!(port2.try_receive(), Ok(number), "round {round}");
        }
    }
    assert_eq!(port1.capacity(), Some(4));
    drop(port2);
    assert_eq!(port1.try_post_message(7), Err(TryPostError::Closed(7)));
    assert_eq!(port1.post_message_blocking(7).unwrap_err().0, 7);
}

#[test]
fn one_message_received_lets_exactly_one_sender_on() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::bounded(2);
    port1.try_post_message(0).unwrap();
    port1.try_post_message(1).unwrap();
    let (posted, was_posted) = mpsc::channel();
    let sender = thread::spawn(move || {
        port1.post_message_blocking(2).unwrap();
        posted.send(()).unwrap();
        port1
    });
    // This one and the next were taken in one look; still there is room at once.
    assert_eq!(port2.receive_blocking(), Some(0));
    was_posted.recv_timeout(PATIENCE).expect("there was room");
    assert_eq!(port2.receive_blocking(), Some(1));
    assert_eq!(port2.receive_blocking(), Some(2));
    drop(sender.join().unwrap());
    assert_eq!(port2.receive_blocking(), None);
}

#[test]
fn a_post_that_is_dropped_has_posted_nothing() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::bounded(1);
    port1.try_post_message(0).unwrap();
    let mut cx = Context::from_waker(Waker::noop());
    let mut post = Box::pin(port1.post_message(1));
    assert!(post.as_mut().poll(&mut cx).is_pending());
    drop(post);
    assert_eq!(port2.try_receive(), Ok(0));
    assert_eq!(port2.try_receive(), Err(TryReceiveError::Empty));
    let mut receive = Box::pin(port2.receive());
    assert!(receive.as_mut().poll(&mut cx).is_pending());
    drop(receive);
    port1.try_post_message(2).unwrap();
    assert_eq!(port2.try_receive(), Ok(2), "a receive that is dropped has taken nothing");
}

#[test]
fn receiving_with_a_limit_says_that_nothing_came_or_that_nothing_will() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::new();
    assert_eq!(port2.receive_timeout(Duration::from_millis(1)), Err(TryReceiveError::Empty));
    assert_eq!(port2.receive_timeout(Duration::ZERO), Err(TryReceiveError::Empty));
    port1.try_post_message(1).unwrap();
    assert_eq!(port2.receive_timeout(Duration::MAX), Ok(1));
    drop(port1);
    assert_eq!(port2.receive_timeout(Duration::MAX), Err(TryReceiveError::Closed));
}

#[test]
fn closing_one_end_is_seen_at_both_and_what_was_posted_still_arrives() {
    let MessageChannel { mut port1, mut port2 } = MessageChannel::<u32, u32>::new();
    port1.try_post_message(1).unwrap();
    port1.try_post_message(2).unwrap();
    port2.try_post_message(3).unwrap();
    // In the midst of receiving.
    assert_eq!(port2.try_receive(), Ok(1));
    port2.close();
    port2.close();
    assert!(port1.is_closed() && port2.is_closed());
    block_on(async {
        port1.closed().await;
        port2.closed().await;
    });
    assert_eq!(port1.try_post_message(4), Err(TryPostError::Closed(4)));
    assert_eq!(port2.try_post_message(4), Err(TryPostError::Closed(4)));
    assert_eq!(port2.try_receive(), Ok(2));
    assert_eq!(port1.try_receive(), Ok(3));
    assert_eq!(port2.receive_blocking(), None);
    assert_eq!(block_on(port1.receive()), None);
}

#[test]
fn a_close_wakes_whoever_waits() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::bounded(1);
    port1.try_post_message(0).unwrap();
    let poster = port1.poster();
    let blocked = thread::spawn(move || poster.post_message_blocking(1).map_err(|error| error.0));
    let watching = {
        let poster = port1.poster();
        thread::spawn(move || block_on(poster.closed()))
    };
    // Posters do not keep a closed port open.
    port2.close();
    assert!(matches!(blocked.join().unwrap(), Ok(()) | Err(1)));
    watching.join().unwrap();
    while port2.receive_blocking().is_some() {}
    let MessageChannel { port1, port2: mut waiting } = MessageChannel::<(), ()>::new();
    let asleep = thread::spawn(move || waiting.receive_blocking());
    port1.close();
    assert_eq!(asleep.join().unwrap(), None);
}

#[test]
fn the_other_end_goes_on_until_port_and_posters_are_gone() {
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::new();
    let poster = port1.poster();
    let another = poster.clone();
    drop(port1);
    assert!(port2.is_closed(), "nobody receives there");
    poster.try_post_message(1).unwrap();
    drop(poster);
    another.try_post_message(2).unwrap();
    drop(another);
    assert_eq!(block_on(port2.receive()), Some(1));
    assert_eq!(block_on(port2.receive()), Some(2));
    assert_eq!(block_on(port2.receive()), None);
}

#[test]
fn many_senders_lose_nothing_and_each_keeps_its_order() {
    const SENDERS: usize = 4;
    const EACH: usize = 5_000;
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), (usize, usize)>::bounded(8);
    thread::scope(|scope| {
        for sender in 0..SENDERS {
            let poster = port1.poster();
            scope.spawn(move || {
                for number in 0..EACH {
                    match number % 3 {
                        0 => block_on(poster.post_message((sender, number))).unwrap(),
                        _ => poster.post_message_blocking((sender, number)).unwrap(),
                    }
                }
            });
        }
        drop(port1);
        let mut next = [0; SENDERS];
        while let Some((sender, number)) = port2.receive_blocking() {
            assert_eq!(number, next[sender]);
            next[sender] += 1;
        }
        assert_eq!(next, [EACH; SENDERS]);
    });
}

/// Two tasks that answer each other without end do not keep a third from its turn.
#[tokio::test]
async fn endless_ping_pong_does_not_starve_timers() {
    let MessageChannel { mut port1, mut port2 } = MessageChannel::<u64, u64>::new();
    port1.try_post_message(0).unwrap();
    let game = async move {
        loop {
            let number = port2.receive().await.unwrap();
            port2.try_post_message(number + 1).unwrap();
            let number = port1.receive().await.unwrap();
            port1.try_post_message(number + 1).unwrap();
        }
    };
    let game = tokio::spawn(game);
    tokio::time::sleep(Duration::from_millis(5)).await;
    game.abort();
    assert!(game.await.unwrap_err().is_cancelled());
}

#[test]
fn a_port_travels_in_a_message_and_keeps_what_waits_in_it() {
    let MessageChannel { port1: here, mut port2 } =
        MessageChannel::<(), MessagePort<u32, String>>::new();
    let MessageChannel { port1: mut mine, port2: yours } = MessageChannel::<String, u32>::new();
    mine.try_post_message(1).unwrap();
    here.try_post_message(yours).unwrap();
    let other = thread::spawn(move || {
        let mut port = port2.receive_blocking().unwrap();
        while let Some(number) = port.receive_blocking() {
            port.try_post_message(number.to_string()).unwrap();
        }
    });
    mine.try_post_message(2).unwrap();
    assert_eq!(mine.receive_blocking().as_deref(), Some("1"));
    assert_eq!(mine.receive_blocking().as_deref(), Some("2"));
    mine.close();
    assert_eq!(mine.receive_blocking(), None);
    other.join().unwrap();
}

/// As general as Node's: data, or a port for the same.
pub(crate) enum General {
    Data(#[expect(dead_code, reason = "counts")] Counted),
    Port(Transferred<General, General>),
}

type GeneralPort = MessagePort<General, General>;

#[test]
fn a_port_cannot_be_sent_to_itself_and_the_attempt_leaves_it_working() {
    let census = Census::default();
    let MessageChannel { port1, port2 } = MessageChannel::<General, General>::new();
    let poster = port1.poster();
    // To its own peer: nobody could ever receive it.
    let CyclicTransfer(mut port2) = port2.transfer(&poster).unwrap_err();
    port1.try_post_message(General::Data(census.message())).unwrap();
    assert!(matches!(port2.try_receive(), Ok(General::Data(_))));
    // Through itself is possible: the peer gets both ends.
    let port1 = port1.transfer(&poster).unwrap();
    poster.try_post_message(General::Port(port1)).unwrap();
    drop(poster);
    let Ok(General::Port(port1)) = port2.try_receive() else { panic!("a port") };
    let port1 = port1.open();
    port1.try_post_message(General::Data(census.message())).unwrap();
    assert_eq!(census.alive(), 1);
    drop(port1);
    drop(port2);
    assert_eq!(census.alive(), 0);
}

#[test]
fn a_port_opened_at_its_new_place_can_travel_on() {
    let make = MessageChannel::<General, General>::new;
    let (one, two, three) = (make(), make(), make());
    let mut receivers: Vec<GeneralPort> = vec![two.port2, three.port2];
    let posters = [two.port1.poster(), three.port1.poster()];
    let mut port = one.port2;
    for (poster, receiver) in posters.iter().zip(&mut receivers) {
        let transferred = port.transfer(poster).unwrap();
        poster.try_post_message(General::Port(transferred)).unwrap();
        let Ok(General::Port(arrived)) = receiver.try_receive() else { panic!("a port") };
        port = arrived.open();
    }
    // It has left the queues it came through, so their ports may go into its own.
    let back = receivers.pop().unwrap().transfer(&one.port1).unwrap();
    one.port1.try_post_message(General::Port(back)).unwrap();
    assert!(matches!(port.try_receive(), Ok(General::Port(_))));
}

#[test]
fn poll_by_hand_is_woken_once_for_many_messages() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    let mut cx = Context::from_waker(&waker);
    let MessageChannel { port1, mut port2 } = MessageChannel::<(), u32>::new();
    assert!(port2.poll_receive(&mut cx).is_pending());
    for number in 0..100 {
        port1.try_post_message(number).unwrap();
    }
    assert_eq!(count.0.load(Ordering::SeqCst), 1, "only a sleeper is woken");
    for number in 0..100 {
        assert_eq!(port2.poll_receive(&mut cx), Poll::Ready(Some(number)));
    }
    assert_eq!(count.0.load(Ordering::SeqCst), 1);
}

/// What is only `Send` can be carried by a port that tasks of several threads share.
#[test]
fn ports_and_workers_ask_no_more_of_messages_than_to_be_sent() {
    type OnlySend = std::cell::Cell<u32>;
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<MessagePort<OnlySend, OnlySend>>();
    is_sync::<MessagePort<OnlySend, OnlySend>>();
    is_send::<polyfork::worker_threads::Worker<OnlySend, OnlySend>>();
    is_sync::<polyfork::worker_threads::Worker<OnlySend, OnlySend>>();
    is_send::<polyfork::worker_threads::WorkerContext<OnlySend, OnlySend>>();
    is_sync::<polyfork::worker_threads::WorkerContext<OnlySend, OnlySend>>();
    is_sync::<polyfork::worker_threads::Poster<OnlySend>>();
    is_sync::<polyfork::worker_threads::BroadcastChannel<OnlySend>>();
}
