//! Shared memory and moved things in messages and in start-up data.

use std::sync::atomic::Ordering;

use polyfork::shared_memory::SharedArrayBuffer;
use polyfork::worker_threads::{Worker, WorkerContext, WorkerOptions};

#[test]
fn a_shared_buffer_in_a_message_is_the_same_memory_on_both_sides() {
    let buffer = SharedArrayBuffer::new(64).unwrap();
    let mut worker = Worker::spawn(|mut parent: WorkerContext<SharedArrayBuffer, ()>| {
        let numbers = parent.receive_blocking().unwrap().i32().unwrap();
        assert_eq!(numbers[0].load(Ordering::SeqCst), 1);
        numbers[1].store(2, Ordering::SeqCst);
        parent.try_post_message(()).unwrap();
        parent.receive_blocking();
    })
    .unwrap();
    let numbers = buffer.i32().unwrap();
    numbers[0].store(1, Ordering::SeqCst);
    worker.try_post_message(buffer.clone()).unwrap();
    assert_eq!(worker.receive_blocking(), Some(()));
    assert_eq!(numbers[1].load(Ordering::SeqCst), 2);
}

#[test]
fn several_shared_buffers_in_a_message_stay_what_they_are() {
    let (one, other) = (SharedArrayBuffer::new(8).unwrap(), SharedArrayBuffer::new(8).unwrap());
    let mut worker = Worker::spawn(
        |mut parent: WorkerContext<[SharedArrayBuffer; 3], [SharedArrayBuffer; 3]>| {
            let [first, second, third] = parent.receive_blocking().unwrap();
            assert!(first.is_same(&third) && !first.is_same(&second));
            parent.try_post_message([third, second, first]).unwrap();
        },
    )
    .unwrap();
    worker.try_post_message([one.clone(), other.clone(), one.clone()]).unwrap();
    let [first, second, third] = worker.receive_blocking().unwrap();
    assert!(first.is_same(&one) && second.is_same(&other) && third.is_same(&one));
}

#[test]
fn a_shared_buffer_in_the_start_up_data_is_shared_memory() {
    let buffer = SharedArrayBuffer::new(8).unwrap();
    let options = WorkerOptions::new().worker_data(buffer.clone());
    let worker = options.spawn(|mut parent: WorkerContext<(), ()>| {
        let buffer: SharedArrayBuffer = parent.worker_data().expect("given");
        buffer.i32().unwrap()[0].store(7, Ordering::SeqCst);
    });
    assert!(worker.unwrap().join_blocking().success());
    assert_eq!(buffer.i32().unwrap()[0].load(Ordering::SeqCst), 7);
}

#[test]
fn what_is_posted_moves_without_a_copy() {
    let bytes = vec![1_u8; 1 << 20];
    let address = bytes.as_ptr() as usize;
    let mut worker = Worker::spawn(|mut parent: WorkerContext<Vec<u8>, Vec<u8>>| {
        while let Some(bytes) = parent.receive_blocking() {
            parent.try_post_message(bytes).unwrap();
        }
    })
    .unwrap();
    worker.try_post_message(bytes).unwrap();
    let back = worker.receive_blocking().unwrap();
    assert_eq!((back.as_ptr() as usize, back.len()), (address, 1 << 20));
}
