//! Workers: their events, their end, and what they do in between.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polyfork::worker_threads::{
    ExitCode, MessagePort, PostToThreadErrorKind, ThreadMessage, TryPostError, TryReceiveError,
    Worker, WorkerContext, WorkerError, WorkerEvent, WorkerExit, WorkerOptions, exit,
    post_message_to_thread, thread_id, thread_messages,
};

use crate::support::{Census, Counted, PATIENCE, block_on, role};

fn echo(mut parent: WorkerContext<u32, u32>) {
    while let Some(number) = parent.receive_blocking() {
        parent.try_post_message(number).unwrap();
    }
}

fn events<In, Out>(worker: &mut Worker<In, Out>) -> Vec<WorkerEvent<Out>> {
    std::iter::from_fn(|| worker.next_event_blocking()).collect()
}

#[test]
fn events_come_in_order_and_all_messages_before_the_end() {
    let mut worker = Worker::spawn(|parent: WorkerContext<(), u32>| {
        for number in 0..1000 {
            parent.try_post_message(number).unwrap();
        }
        ExitCode(42)
    })
    .unwrap();
    let events = events(&mut worker);
    assert_eq!(events.first(), Some(&WorkerEvent::Online));
    let messages = (0..1000).map(WorkerEvent::Message);
    assert!(events[1..1001].iter().cloned().eq(messages));
    assert_eq!(events[1001..], [WorkerEvent::Exit(42)]);
    assert_eq!(worker.next_event_blocking(), None);
    assert_eq!(worker.exit(), Some(WorkerExit { code: 42, error: None }));
}

#[tokio::test]
async fn the_parent_follows_a_worker_from_async_code() {
    let mut worker = Worker::spawn(echo).unwrap();
    assert_eq!(worker.next_event().await, Some(WorkerEvent::Online));
    for number in 0..100 {
        worker.post_message(number).await.unwrap();
        assert_eq!(worker.next_event().await, Some(WorkerEvent::Message(number)));
    }
    worker.close();
    assert_eq!(worker.next_event().await, Some(WorkerEvent::Exit(0)));
    assert_eq!(worker.next_event().await, None);
    assert!(worker.join().await.success());
}

/// A task that has had its turn is to give way; a blocking form cannot, and must be woken all the same.
#[tokio::test]
async fn blocking_forms_in_a_task_are_woken_however_long_its_turn_was() {
    for number in 0..400 {
        let mut worker = Worker::spawn(echo).unwrap();
        worker.post_message_blocking(number).unwrap();
        assert!(worker.receive_blocking().is_some());
        worker.close();
        assert!(worker.join_blocking().success());
    }
}

#[test]
fn an_async_worker_has_a_runtime_of_its_own_and_futures_that_stay_there() {
    let mut worker = Worker::spawn_async(async |mut parent: WorkerContext<u32, u32>| {
        let sum = Rc::new(std::cell::Cell::new(0));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
        while let Some(number) = parent.receive().await {
            sum.set(sum.get() + number);
        }
        drop(listener);
        parent.post_message(sum.get()).await.ok();
        Ok::<_, std::io::Error>(())
    })
    .unwrap();
    for number in 0..10 {
        worker.try_post_message(number).unwrap();
    }
    assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Online));
    worker.close();
    // Closed by us, so its last word goes nowhere.
    assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Exit(0)));
}

#[test]
fn a_closed_port_is_not_the_end_of_its_worker() {
    let go_on = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&go_on);
    let mut worker = Worker::spawn(move |parent: WorkerContext<(), ()>| {
        drop(parent);
        while !flag.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    })
    .unwrap();
    assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Online));
    assert_eq!(worker.receive_blocking(), None);
    assert_eq!(worker.next_event_timeout(Duration::from_millis(5)), Err(TryReceiveError::Empty));
    go_on.store(true, Ordering::Release);
    assert_eq!(worker.next_event_blocking(), Some(WorkerEvent::Exit(0)));
}

#[test]
fn an_exit_call_ends_the_worker_at_once_with_its_code_and_no_error() {
    let after = Arc::new(AtomicBool::new(false));
    let census = Census::default();
    let (flag, held) = (Arc::clone(&after), census.message());
    let mut worker = Worker::spawn(move |_: WorkerContext<(), ()>| {
        let _held = held;
        // Errors are handled around it, and do not stop it.
        fn leaves() -> Result<(), String> {
            exit(7)
        }
        let _handled = leaves().is_err();
        flag.store(true, Ordering::SeqCst);
    })
    .unwrap();
    assert_eq!(events(&mut worker), [WorkerEvent::Online, WorkerEvent::Exit(7)]);
    assert!(!after.load(Ordering::SeqCst));
    assert_eq!(census.alive(), 0, "what it held was dropped");
    let mut worker = Worker::spawn_async(async |_: WorkerContext<(), ()>| -> ExitCode {
        tokio::task::yield_now().await;
        exit(8)
    })
    .unwrap();
    assert_eq!(events(&mut worker), [WorkerEvent::Online, WorkerEvent::Exit(8)]);
}

#[test]
fn an_error_returned_is_told_before_the_exit() {
    let mut worker = Worker::spawn(|parent: WorkerContext<(), u32>| {
        parent.try_post_message(1).unwrap();
        Err::<(), _>("as wished")
    })
    .unwrap();
    let error = WorkerError::Failed("as wished".to_owned());
    assert_eq!(error.text(), "as wished");
    let expected = [
        WorkerEvent::Online,
        WorkerEvent::Message(1),
        WorkerEvent::Error(error),
        WorkerEvent::Exit(1),
    ];
    assert_eq!(events(&mut worker), expected);
}

#[test]
fn an_error_of_a_nested_worker_reaches_the_top_through_its_parent() {
    let mut outer = Worker::spawn(|_: WorkerContext<(), ()>| {
        let mut inner = Worker::<(), ()>::spawn(|_| -> () { panic!("deep down") }).unwrap();
        assert!(inner.thread_id() > thread_id());
        loop {
            match inner.next_event_blocking() {
                Some(WorkerEvent::Error(error)) => return Err(error),
                Some(_) => {}
                None => return Ok(()),
            }
        }
    })
    .unwrap();
    let events = events(&mut outer);
    let Some(WorkerEvent::Error(error)) = events.get(1) else { panic!("{events:?}") };
    assert_eq!(error.text(), "worker panicked: deep down");
}

#[test]
fn a_finished_worker_s_handle_still_answers() {
    let worker = Worker::spawn(|_: WorkerContext<u32, u32>| ()).unwrap();
    worker.join_blocking();
    let (id, reference) = (worker.thread_id(), worker.has_ref());
    assert!(id > 0 && !reference);
    assert_eq!(worker.try_post_message(1), Err(TryPostError::Closed(1)));
    worker.unref();
    worker.reference();
    worker.close();
    assert_eq!(worker.cpu_usage(), None);
    assert!(worker.join_blocking().success());
    assert!(worker.terminate_blocking(Duration::ZERO).unwrap().success());
    assert!(block_on(worker.terminate(Duration::ZERO)).unwrap().success());
}

#[test]
fn references_decide_whom_the_program_waits_for() {
    let (exit, stderr) = role("referenced");
    assert_eq!(exit.code, Some(0), "{stderr}");
}

#[test]
fn a_worker_whose_handle_is_dropped_goes_on_and_sees_its_port_closed() {
    let (told, ended) = std::sync::mpsc::channel();
    let worker = Worker::spawn(move |mut parent: WorkerContext<u32, u32>| {
        let mut numbers = Vec::new();
        while let Some(number) = parent.receive_blocking() {
            numbers.push(number);
        }
        told.send((numbers, parent.is_terminating())).unwrap();
    })
    .unwrap();
    worker.try_post_message(1).unwrap();
    worker.try_post_message(2).unwrap();
    drop(worker);
    assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), (vec![1, 2], false));
}

#[test]
fn a_worker_in_a_scope_is_asked_to_stop_at_its_end() {
    let (told, ended) = std::sync::mpsc::channel();
    let worker = WorkerOptions::new()
        .terminate_on_drop(true)
        .spawn(move |mut parent: WorkerContext<u32, u32>| {
            while parent.receive_blocking().is_some() {}
            told.send(parent.is_terminating()).unwrap();
        })
        .unwrap();
    drop(worker);
    assert!(ended.recv_timeout(PATIENCE).unwrap());
}

#[test]
fn terminating_drops_what_the_worker_has_not_received() {
    let census = Census::default();
    let mut worker = Worker::spawn(|mut parent: WorkerContext<Counted, ()>| {
        assert!(parent.receive_blocking().is_some());
        parent.try_post_message(()).unwrap();
        // It may have taken all in one look, but has not received it.
        while !parent.is_terminating() {
            std::thread::yield_now();
        }
        // The wish is told an instant before the port knows.
        while parent.receive_blocking().is_some() {}
        ExitCode(3)
    })
    .unwrap();
    for _ in 0..100 {
        worker.try_post_message(census.message()).unwrap();
    }
    assert_eq!(worker.receive_blocking(), Some(()));
    assert_eq!(worker.terminate_blocking(PATIENCE).unwrap().code, 3);
    assert!(worker.try_post_message(census.message()).is_err());
    assert_eq!(census.alive(), 0);
}

#[test]
fn a_worker_that_floods_its_parent_can_be_terminated() {
    let mut worker = WorkerOptions::new()
        .queue(8)
        .spawn(|parent: WorkerContext<(), u64>| {
            let mut number = 0;
            while !parent.is_terminating() {
                // Gives the message back when the queue is full, and goes on.
                let _full = parent.try_post_message(number);
                number += 1;
            }
        })
        .unwrap();
    worker.unref();
    assert_eq!(worker.receive_blocking(), Some(0));
    assert!(worker.terminate_blocking(PATIENCE).unwrap().success());
}

#[tokio::test]
async fn an_async_worker_is_terminated_wherever_it_awaits() {
    // A query that is never answered, a task that never ends, and a blocking one that takes its time.
    let (done, may_end) = std::sync::mpsc::channel::<()>();
    let census = Census::default();
    let held = census.message();
    let mut worker = Worker::spawn_async(async move |parent: WorkerContext<(), ()>| {
        let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        tokio::spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        let blocking = tokio::task::spawn_blocking(move || may_end.recv().ok());
        parent.try_post_message(()).unwrap();
        silent.recv(&mut [0; 512]).await.ok();
        blocking.await.ok();
    })
    .unwrap();
    assert_eq!(worker.receive().await, Some(()));
    let ended = worker.terminate(PATIENCE).await.unwrap();
    assert_eq!(ended, WorkerExit { code: 1, error: None });
    assert_eq!(census.alive(), 0, "its tasks are gone with it");
    drop(done);
}

#[tokio::test]
async fn sockets_and_files_of_a_worker_are_closed_when_it_ends() {
    let mut worker = Worker::spawn_async(async |parent: WorkerContext<(), u16>| {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { listener.accept().await.map(drop) });
        parent.try_post_message(port).unwrap();
        std::future::pending::<()>().await;
    })
    .unwrap();
    let port = worker.receive().await.unwrap();
    worker.terminate(PATIENCE).await.unwrap();
    let error = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn workers_can_be_terminated_again_and_again_amid_their_work() {
    for round in 0..50 {
        let worker = Worker::spawn_async(async |parent: WorkerContext<(), ()>| -> ExitCode {
            parent.try_post_message(()).unwrap();
            loop {
                // Some of these exist.
                for name in ["/proc/self/stat", "/nowhere/at/all"] {
                    tokio::task::spawn_blocking(move || std::fs::File::open(name).ok()).await.ok();
                }
            }
        });
        let mut worker = worker.unwrap();
        if round % 2 == 0 {
            worker.receive_blocking();
        }
        assert_eq!(worker.terminate_blocking(PATIENCE).unwrap().code, 1);
    }
}

#[test]
fn terminating_right_after_a_port_was_sent_drops_the_port() {
    for _ in 0..100 {
        let channel = polyfork::worker_threads::MessageChannel::<u32, u32>::new();
        let worker = Worker::spawn(|mut parent: WorkerContext<MessagePort<u32, u32>, ()>| {
            let mut kept = Vec::new();
            while let Some(port) = parent.receive_blocking() {
                kept.push(port);
            }
        })
        .unwrap();
        worker.try_post_message(channel.port2).unwrap();
        worker.terminate_blocking(PATIENCE).unwrap();
        let mut port = channel.port1;
        assert_eq!(port.receive_blocking(), None, "its peer is gone with the worker");
    }
}

#[test]
fn sixty_short_workers_leave_nothing_behind() {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let census = Census::default();
    for _ in 0..60 {
        let held = census.message();
        let mut worker = Worker::spawn_async(async move |mut parent: WorkerContext<u32, u32>| {
            let _held = held;
            let number = parent.receive().await.unwrap();
            parent.post_message(number).await.unwrap();
        })
        .unwrap();
        worker.try_post_message(1).unwrap();
        assert_eq!(worker.receive_blocking(), Some(1));
        let before = threads();
        worker.join_blocking();
        // Other tests have threads too; this one is gone for certain.
        assert!(before > 0);
        drop(worker);
    }
    assert_eq!(census.alive(), 0);
}

#[test]
fn the_processor_time_of_a_worker_is_told_while_it_runs() {
    let mut worker = Worker::spawn(|mut parent: WorkerContext<(), ()>| {
        let start = Instant::now();
        let mut number = 1_u64;
        while start.elapsed() < Duration::from_millis(60) {
            number = std::hint::black_box(number.wrapping_mul(31));
        }
        parent.try_post_message(()).unwrap();
        parent.receive_blocking();
    })
    .unwrap();
    worker.receive_blocking();
    let usage = worker.cpu_usage().expect("it runs");
    let later = worker.cpu_usage().expect("it runs");
    assert!(later.since(&usage).user <= later.user);
    assert!(usage.user + usage.system <= later.user + later.system);
    worker.close();
    worker.join_blocking();
    assert_eq!(worker.cpu_usage(), None);
}

#[test]
fn no_descriptors_is_a_clear_error_and_leaves_nothing_running() {
    let (exit, stderr) = role("no_descriptors");
    assert_eq!(exit.code, Some(0), "{stderr}");
}

#[test]
fn no_memory_for_a_thread_is_a_clear_error_and_leaves_nothing_running() {
    let (exit, stderr) = role("no_memory");
    assert_eq!(exit.code, Some(0), "{stderr}");
}

#[test]
fn a_name_with_a_zero_byte_is_refused() {
    let census = Census::default();
    let held = census.message();
    let options = WorkerOptions::new().name("a\0b").worker_data(held);
    let error = options.spawn(|_: WorkerContext<(), ()>| ()).unwrap_err();
    assert!(error.to_string().contains("zero byte"), "{error}");
    assert_eq!(census.alive(), 0, "nothing of it is left");
}

#[test]
fn any_worker_can_message_any_other_by_its_id() {
    fn text(message: ThreadMessage) -> (u64, String) {
        (message.source, *message.value.downcast().expect("text"))
    }
    // Three levels deep; each answers whoever writes to it.
    let mut outer = Worker::spawn(|mut parent: WorkerContext<(), u64>| {
        let mut inner = Worker::spawn(|mut parent: WorkerContext<(), u64>| {
            let mut inbox = thread_messages(4);
            parent.try_post_message(thread_id()).unwrap();
            let (source, hello) = text(inbox.receive_blocking().unwrap());
            post_message_to_thread(source, hello + " yourself").unwrap();
            parent.receive_blocking();
        })
        .unwrap();
        parent.try_post_message(inner.receive_blocking().unwrap()).unwrap();
        parent.receive_blocking();
    })
    .unwrap();
    let innermost = outer.receive_blocking().unwrap();
    let mut asker = Worker::spawn(move |parent: WorkerContext<(), (u64, String)>| {
        let mut inbox = thread_messages(4);
        post_message_to_thread(innermost, "hello".to_owned()).unwrap();
        parent.try_post_message(text(inbox.receive_blocking().unwrap())).unwrap();
        let own = post_message_to_thread(thread_id(), 1).unwrap_err();
        assert_eq!(own.kind, PostToThreadErrorKind::SameThread);
        // The outer one does not listen.
        let deaf = post_message_to_thread(innermost - 1, 1).unwrap_err();
        assert_ne!(deaf.kind, PostToThreadErrorKind::SameThread);
        assert_eq!(deaf.value.downcast_ref(), Some(&1), "given back");
    })
    .unwrap();
    assert_eq!(asker.receive_blocking(), Some((innermost, "hello yourself".to_owned())));
    assert!(asker.join_blocking().success());
    let gone = post_message_to_thread(asker.thread_id(), 1).unwrap_err();
    assert_eq!(gone.kind, PostToThreadErrorKind::NoSuchThread);
    let never = post_message_to_thread(u64::MAX, 1).unwrap_err();
    assert_eq!(never.kind, PostToThreadErrorKind::NoSuchThread);
    let deaf = post_message_to_thread(outer.thread_id(), 1).unwrap_err();
    assert_eq!(deaf.kind, PostToThreadErrorKind::NotListening);
}

#[test]
fn direct_messages_are_bounded() {
    let mut worker = Worker::spawn(|mut parent: WorkerContext<(), ()>| {
        let _inbox = thread_messages(2);
        parent.try_post_message(()).unwrap();
        parent.receive_blocking();
    })
    .unwrap();
    worker.receive_blocking();
    let id = worker.thread_id();
    post_message_to_thread(id, 1).unwrap();
    post_message_to_thread(id, 2).unwrap();
    let full = post_message_to_thread(id, 3).unwrap_err();
    assert_eq!(full.kind, PostToThreadErrorKind::Full);
}
