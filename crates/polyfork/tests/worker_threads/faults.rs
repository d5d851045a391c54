//! Rows 116 to 121 of the list of faults.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use polyfork::worker_threads::{
    MessageChannel, MessagePort, Worker, WorkerContext, WorkerError, WorkerEvent, env, lock,
    set_environment_data,
};

use crate::ports::General;
use crate::support::{Census, Counted, PATIENCE, block_on, role};

fn events<In, Out>(worker: &mut Worker<In, Out>) -> Vec<WorkerEvent<Out>> {
    std::iter::from_fn(|| worker.next_event_blocking()).collect()
}

fn panicked(text: &str) -> WorkerError {
    WorkerError::Panicked(text.to_owned())
}

#[test]
fn fault_116_a_panic_is_an_error_with_its_text_and_the_others_live() {
    let other = MessageChannel::<u32, u32>::new();
    let (given, mut kept) = (other.port1, other.port2);
    let bystander = Worker::spawn(|mut parent: WorkerContext<u32, u32>| {
        while let Some(number) = parent.receive_blocking() {
            parent.try_post_message(number).unwrap();
        }
    });
    let mut bystander = bystander.unwrap();
    let mut worker = Worker::spawn(move |mut parent: WorkerContext<u32, u32>| -> () {
        let _given = given;
        let number = parent.receive_blocking().unwrap();
        parent.try_post_message(number).unwrap();
        panic!("on command {number}");
    })
    .unwrap();
    let elsewhere = worker.poster();
    worker.try_post_message(5).unwrap();
    let expected = [
        WorkerEvent::Online,
        WorkerEvent::Message(5),
        WorkerEvent::Error(panicked("on command 5")),
        WorkerEvent::Exit(1),
    ];
    assert_eq!(events(&mut worker), expected);
    assert!(elsewhere.try_post_message(6).is_err(), "its port is closed");
    assert_eq!(kept.receive_blocking(), None, "and so is what it was given");
    bystander.try_post_message(7).unwrap();
    assert_eq!(bystander.receive_blocking(), Some(7));
}

#[test]
fn fault_116_a_panic_of_an_async_worker_is_told_as_well() {
    let mut worker = Worker::spawn_async(async |_: WorkerContext<(), ()>| -> () {
        tokio::task::yield_now().await;
        panic!("{}", "in the middle".to_owned());
    })
    .unwrap();
    let expected =
        [WorkerEvent::Online, WorkerEvent::Error(panicked("in the middle")), WorkerEvent::Exit(1)];
    assert_eq!(events(&mut worker), expected);
    let mut silent = Worker::<(), ()>::spawn(|_| -> () { std::panic::panic_any(17_u8) }).unwrap();
    let events = events(&mut silent);
    let text = "a value that is no text";
    assert_eq!(events[1..], [WorkerEvent::Error(panicked(text)), WorkerEvent::Exit(1)]);
}

#[test]
fn fault_117_a_lock_held_in_a_panic_does_not_panic_the_others() {
    let shared = Arc::new(Mutex::new(Vec::new()));
    let held = Arc::clone(&shared);
    let worker = Worker::<(), ()>::spawn(move |_| {
        let mut list = lock(&held);
        list.push(1);
        assert!(list.is_empty(), "with the lock held");
    });
    let exit = worker.unwrap().join_blocking();
    assert_eq!(exit.error, Some(panicked("with the lock held")));
    assert!(shared.is_poisoned());
    lock(&shared).push(2);
    let again = Arc::clone(&shared);
    let next = Worker::<(), ()>::spawn(move |_| lock(&again).push(3));
    assert!(next.unwrap().join_blocking().success());
    assert_eq!(*lock(&shared), [1, 2, 3]);
}

/// Panics when dropped, unless the thread panics already.
struct Bomb(&'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "{}", self.0);
    }
}

#[test]
fn fault_117_foreign_code_that_panics_in_our_operations_poisons_nothing() {
    // Messages are dropped, and values replaced, with no lock held.
    let MessageChannel { port1, port2 } = MessageChannel::<(), Bomb>::new();
    let poster = port1.poster();
    let worker = Worker::<(), ()>::spawn(move |_| {
        port1.try_post_message(Bomb("a message")).unwrap_or_else(|_| panic!("open"));
        drop(port2);
    });
    assert_eq!(worker.unwrap().join_blocking().error, Some(panicked("a message")));
    let refused = poster.try_post_message(Bomb("refused"));
    assert!(refused.is_err(), "closed, and not broken");
    std::mem::forget(refused);
    let worker = Worker::<(), ()>::spawn(|_| {
        set_environment_data("bomb", Bomb("replaced"));
        set_environment_data("bomb", ());
    });
    assert_eq!(worker.unwrap().join_blocking().error, Some(panicked("replaced")));
    env().set("AFTER_THE_BOMB", "fine");
    assert!(Worker::<(), ()>::spawn(|_| ()).unwrap().join_blocking().success());
}

#[test]
fn fault_118_a_stack_overflow_ends_the_process_as_documented() {
    let (exit, stderr) = role("overflow");
    assert!(exit.signal.is_some(), "{exit:?}: {stderr}");
    assert!(stderr.contains("overflow"), "{stderr}");
}

#[test]
fn fault_119_a_worker_that_does_not_listen_is_said_so_and_never_killed() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let release = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&release);
    let worker = Worker::<(), ()>::spawn(move |_| {
        while !flag.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
    });
    let worker = worker.unwrap();
    let limit = Duration::from_millis(10);
    let error = worker.terminate_blocking(limit).unwrap_err();
    assert_eq!((error.id, error.limit), (worker.thread_id(), limit));
    assert!(error.to_string().contains("does not listen"), "{error}");
    let error = block_on(worker.terminate(limit)).unwrap_err();
    assert!(error.to_string().contains("10ms"), "{error}");
    assert_eq!(worker.exit(), None, "it lives");
    release.store(true, Ordering::Release);
    assert!(worker.terminate_blocking(PATIENCE).unwrap().success(), "asked again, it ends");
}

#[test]
fn fault_120_undelivered_messages_are_freed_and_the_peer_gets_its_close() {
    let census = Census::default();
    let MessageChannel { mut port1, mut port2 } = MessageChannel::<Counted, Counted>::new();
    for _ in 0..100 {
        port1.try_post_message(census.message()).unwrap();
        port2.try_post_message(census.message()).unwrap();
    }
    // Some are taken out of the lock's sight.
    drop(port2.try_receive().unwrap());
    drop(port2);
    assert_eq!(census.alive(), 100, "what it had posted is still to be received");
    block_on(port1.closed());
    assert!(port1.try_post_message(census.message()).is_err());
    assert!(port1.receive_blocking().is_some());
    drop(port1);
    assert_eq!(census.alive(), 0);
}

#[test]
fn fault_120_ports_inside_ports_inside_messages_are_freed() {
    let census = Census::default();
    let first = MessageChannel::<General, General>::new();
    let mut hold = vec![first.port2];
    let mut outer = first.port1;
    for _ in 0..1000 {
        let next = MessageChannel::<General, General>::new();
        next.port1.try_post_message(General::Data(census.message())).unwrap();
        let inner = next.port2.transfer(&outer).unwrap();
        outer.try_post_message(General::Port(inner)).unwrap();
        outer = next.port1;
    }
    assert_eq!(census.alive(), 1000);
    // One drop goes through them all; each level is in the queue of the one before.
    hold.clear();
    assert_eq!(census.alive(), 0);
    assert!(outer.is_closed());
}

#[test]
fn fault_120_no_cycle_of_transferred_ports_can_be_made() {
    let make = MessageChannel::<General, General>::new;
    let (one, two, three) = (make(), make(), make());
    // one's receiver into two's queue, two's into three's, three's into one's.
    let (to_one, to_two, to_three) = (one.port1, two.port1, three.port1);
    let first = one.port2.transfer(&to_two).unwrap();
    to_two.try_post_message(General::Port(first)).unwrap();
    let second = two.port2.transfer(&to_three).unwrap();
    to_three.try_post_message(General::Port(second)).unwrap();
    let refused = three.port2.transfer(&to_one).unwrap_err();
    assert_eq!(refused.to_string(), "cannot transfer a port into its own queue");
    // It is unharmed, and with it all the others go.
    let mut third: MessagePort<General, General> = refused.0;
    let Some(General::Port(second)) = third.receive_blocking() else { panic!("a port") };
    drop(second);
    drop(third);
    for poster in [to_one, to_two, to_three] {
        assert!(poster.is_closed());
    }
}

#[test]
fn fault_121_a_panic_in_any_callback_ends_at_the_thread_s_entry() {
    // In what it captured, as it is dropped.
    let bomb = Bomb("captured");
    let worker = Worker::<(), ()>::spawn(move |_| drop(bomb));
    assert_eq!(worker.unwrap().join_blocking().error, Some(panicked("captured")));
    // In the data it did not take.
    let options = polyfork::worker_threads::WorkerOptions::new().worker_data(Bomb("data"));
    let worker = options.spawn(|_: WorkerContext<(), ()>| ()).unwrap();
    assert_eq!(worker.join_blocking().error, Some(panicked("data")));
    // In what it inherited, after its function has ended: told as the end it had.
    let worker = Worker::<(), ()>::spawn(|_| set_environment_data("bomb", Bomb("inherited")));
    assert!(worker.unwrap().join_blocking().success());
    // In a message that it did not receive, of an async worker.
    let worker = Worker::spawn_async(async |parent: WorkerContext<Bomb, ()>| {
        parent.try_post_message(()).unwrap();
        std::future::pending::<()>().await;
    });
    let mut worker = worker.unwrap();
    worker.receive_blocking();
    worker.try_post_message(Bomb("not received")).unwrap_or_else(|_| panic!("open"));
    let terminated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        worker.terminate_blocking(PATIENCE)
    }));
    // It was dropped by whoever asked the worker to stop, or by the worker, whoever was first.
    let exit = worker.terminate_blocking(PATIENCE).unwrap();
    assert_eq!(exit.code, 1);
    assert_eq!(exit.error.is_some(), terminated.is_ok());
}

/// A payload whose own drop panics, with another of its kind.
struct Payload(u32);

impl Drop for Payload {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(Payload(self.0 - 1));
        }
    }
}

#[test]
fn fault_121_not_even_the_payload_of_a_panic_gets_out() {
    let worker = Worker::<(), ()>::spawn(|_| -> () { std::panic::panic_any(Payload(2)) });
    let exit = worker.unwrap().join_blocking();
    assert_eq!(exit.code, 1);
    assert!(exit.error.is_some());
}

#[test]
fn fault_121_a_waker_that_panics_does_not_stop_the_end_from_being_told() {
    use std::sync::Arc;
    use std::task::{Context, Wake, Waker};
    struct Broken;
    impl Wake for Broken {
        fn wake(self: Arc<Self>) {
            panic!("a broken executor");
        }
    }
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let mut worker = Worker::<(), ()>::spawn(move |parent| {
        may_go.recv().ok();
        drop(parent);
    })
    .unwrap();
    let waker = Waker::from(Arc::new(Broken));
    let mut cx = Context::from_waker(&waker);
    let poster = worker.poster();
    let mut closed = Box::pin(poster.closed());
    assert!(closed.as_mut().poll(&mut cx).is_pending());
    go.send(()).unwrap();
    let exit = worker.join_blocking();
    assert_eq!(exit.code, 1, "the wake-up ran in the worker, and its panic was the worker's");
    assert!(worker.receive_blocking().is_none());
}
