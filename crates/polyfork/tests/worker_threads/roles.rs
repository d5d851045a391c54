//! What this program does as a child of its own tests. Started by its full name, with `--ignored`.

use std::io::ErrorKind;

use polyfork::worker_threads::{
    ExitCode, Worker, WorkerContext, WorkerOptions, WorkerSpawnError, workers_ended_blocking,
};
use rustix::process::{Resource, Rlimit, setrlimit};

#[test]
#[ignore = "run by the other tests as their child"]
fn overflow() {
    #[expect(unconditional_recursion, reason = "the point")]
    fn deeper(depth: u64) -> u64 {
        let here = std::hint::black_box([depth; 64]);
        here[0] + deeper(depth + 1) + here[63]
    }
    let worker = Worker::<(), ()>::spawn(|_| {
        std::hint::black_box(deeper(0));
    });
    worker.unwrap().join_blocking();
}

/// Without descriptors there are no async workers, but all is well otherwise.
#[test]
#[ignore = "run by the other tests as their child"]
fn no_descriptors() {
    let worker = Worker::<u32, u32>::spawn(|mut parent: WorkerContext<u32, u32>| {
        while let Some(number) = parent.receive_blocking() {
            parent.try_post_message(number).unwrap();
        }
    });
    let mut worker = worker.unwrap();
    let limit = setrlimit(Resource::Nofile, Rlimit { current: Some(3), maximum: Some(3) });
    limit.unwrap();
    for _ in 0..100 {
        let error = Worker::<(), ()>::spawn_async(async |_| ()).unwrap_err();
        assert!(matches!(error, WorkerSpawnError::Runtime(_)), "{error}");
    }
    worker.try_post_message(7).unwrap();
    assert_eq!(worker.receive_blocking(), Some(7), "the first still works");
    Worker::<(), ()>::spawn(|_| ()).unwrap().join_blocking();
}

/// Without memory for stacks there are no workers at all.
#[test]
#[ignore = "run by the other tests as their child"]
fn no_memory() {
    for _ in 0..10 {
        let error = WorkerOptions::new()
            .stack_size(1 << 46)
            .spawn(|_: WorkerContext<(), ()>| ())
            .unwrap_err();
        let WorkerSpawnError::Thread(error) = error else { panic!("{error}") };
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::OutOfMemory), "{error}");
    }
    workers_ended_blocking();
    Worker::<(), ()>::spawn(|_| ()).unwrap().join_blocking();
}

/// Waits for those that are referenced, and for no others.
#[test]
#[ignore = "run by the other tests as their child"]
fn referenced() {
    let unreferenced = Worker::<(), ()>::spawn(|_| -> ExitCode {
        loop {
            std::thread::park();
        }
    });
    let unreferenced = unreferenced.unwrap();
    assert!(unreferenced.has_ref());
    unreferenced.unref();
    unreferenced.unref();
    assert!(!unreferenced.has_ref());
    workers_ended_blocking();
    let mut worker = Worker::<(), u8>::spawn(|mut parent: WorkerContext<(), u8>| {
        parent.receive_blocking();
        parent.try_post_message(1).unwrap();
    })
    .unwrap();
    worker.unref();
    worker.reference();
    assert!(worker.has_ref());
    worker.try_post_message(()).unwrap();
    workers_ended_blocking();
    assert!(worker.exit().is_some());
    assert!(!worker.has_ref());
    worker.unref();
    worker.reference();
    assert!(!worker.has_ref(), "the ended are waited for by nobody");
    assert_eq!(worker.receive_blocking(), Some(1));
    workers_ended_blocking();
}
