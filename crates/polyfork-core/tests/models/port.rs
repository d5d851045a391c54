//! What a port's queue promises, as bodies that a model checker runs in every order of steps.
//!
//! `loom_port` plays all schedules with a bounded number of preemptions, `shuttle_port` many random ones of larger
//! scenes. Messages count their drops: in every schedule each is dropped exactly once.

use std::future::{Future, poll_fn};
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use polyfork_core::sync::port::{Receiver, Sender, TryReceive, queue};

use crate::thread;

/// Live messages of one scene.
#[derive(Clone, Default)]
pub(crate) struct Census(Arc<AtomicUsize>);

impl Census {
    pub(crate) fn message(&self, number: u32) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted { number, census: self.clone() }
    }

    pub(crate) fn assert_all_dropped(&self) {
        assert_eq!(self.0.load(Ordering::Relaxed), 0, "messages that were never dropped");
    }
}

pub(crate) struct Counted {
    number: u32,
    census: Census,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let before = self.census.0.fetch_sub(1, Ordering::Relaxed);
        assert_ne!(before, 0, "dropped twice");
    }
}

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn waker() -> Waker {
    Waker::from(Arc::new(Unpark(thread::current())))
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = waker();
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}

fn receive<T>(receiver: &mut Receiver<T>) -> Option<T> {
    block_on(poll_fn(|cx| receiver.poll_receive(cx)))
}

fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    queue(NonZeroUsize::new(capacity))
}

/// A receiver that falls asleep while a message is posted is woken, and the end is told.
pub(crate) fn post_against_sleep(capacity: Option<NonZeroUsize>, messages: u32) {
    let census = Census::default();
    let (sender, mut receiver) = queue(capacity);
    let other = census.clone();
    let posting = thread::spawn(move || {
        for number in 0..messages {
            assert!(block_on(sender.post(other.message(number))).is_ok(), "the receiver is there");
        }
    });
    for number in 0..messages {
        assert_eq!(receive(&mut receiver).expect("a message").number, number, "in order");
    }
    assert!(receive(&mut receiver).is_none(), "the last sender is gone");
    posting.join().expect("no panic");
    drop(receiver);
    census.assert_all_dropped();
}

/// A message posted while its receiver goes is given back or dropped, never lost and never kept.
pub(crate) fn close_against_post(capacity: Option<NonZeroUsize>) {
    let census = Census::default();
    let (sender, mut receiver) = queue(capacity);
    let other = census.clone();
    let posting = thread::spawn(move || {
        for number in 0..2 {
            if let Err(message) = block_on(sender.post(other.message(number))) {
                assert!(sender.is_closed());
                assert_eq!(message.number, number, "given back");
            }
        }
    });
    drop(receiver.try_receive());
    drop(receiver);
    posting.join().expect("no panic");
    census.assert_all_dropped();
}

/// What was posted before a close can be received, what comes after is given back: nothing in between.
pub(crate) fn polite_close_against_post() {
    let census = Census::default();
    let (sender, mut receiver) = queue(None);
    let other = census.clone();
    let posting = thread::spawn(move || {
        (0..2).filter(|number| sender.try_post(other.message(*number)).is_ok()).count()
    });
    receiver.close();
    let mut got = 0;
    while receive(&mut receiver).is_some() {
        got += 1;
    }
    assert_eq!(posting.join().expect("no panic"), got, "what was taken was delivered");
    drop(receiver);
    census.assert_all_dropped();
}

/// A sender that waits for room gives up: the next in line gets its turn.
pub(crate) fn giving_up_passes_the_turn_on() {
    let census = Census::default();
    let (sender, mut receiver) = bounded(1);
    assert!(sender.try_post(census.message(0)).is_ok());
    let waiting = {
        let (sender, census) = (sender.clone(), census.clone());
        thread::spawn(move || {
            assert!(block_on(sender.post(census.message(1))).is_ok());
        })
    };
    let giving_up = {
        let census = census.clone();
        thread::spawn(move || {
            let mut post = Box::pin(sender.post(census.message(2)));
            let done = post.as_mut().poll(&mut Context::from_waker(&waker())).is_ready();
            drop(post);
            done
        })
    };
    assert!(receive(&mut receiver).is_some_and(|message| message.number == 0));
    let mut got = 0;
    while receive(&mut receiver).is_some() {
        got += 1;
    }
    waiting.join().expect("no panic");
    let expected = 1 + usize::from(giving_up.join().expect("no panic"));
    assert_eq!(got, expected);
    drop(receiver);
    census.assert_all_dropped();
}

/// Both ends go at once, with a port inside a message that nobody received: all is dropped.
pub(crate) fn ports_in_messages_go_with_their_queue() {
    let census = Census::default();
    let (inner_sender, inner) = queue::<Counted>(None);
    assert!(inner_sender.try_post(census.message(0)).is_ok());
    let (sender, receiver) = queue::<(Counted, Receiver<Counted>)>(None);
    let other = census.clone();
    let posting = thread::spawn(move || {
        drop(sender.try_post((other.message(1), inner)));
    });
    drop(receiver);
    drop(inner_sender.try_post(census.message(2)));
    posting.join().expect("no panic");
    assert!(inner_sender.is_closed(), "the port in the message was closed");
    drop(inner_sender);
    census.assert_all_dropped();
}

/// Whoever waits for the close is told.
pub(crate) fn close_is_told() {
    let (sender, receiver) = queue::<Counted>(None);
    let watching = thread::spawn(move || block_on(sender.closed()));
    drop(receiver);
    watching.join().expect("no panic");
}

/// An abort ends a receiver that sleeps, and discards what waits.
pub(crate) fn abort_against_receive() {
    let census = Census::default();
    let (sender, mut receiver) = queue(None);
    let closer = sender.closer();
    assert!(sender.try_post(census.message(0)).is_ok());
    let aborting = thread::spawn(move || closer.abort());
    while receive(&mut receiver).is_some() {}
    assert!(matches!(receiver.try_receive(), Err(TryReceive::Closed)));
    aborting.join().expect("no panic");
    assert!(sender.try_post(census.message(1)).is_err());
    drop(receiver);
    census.assert_all_dropped();
}
