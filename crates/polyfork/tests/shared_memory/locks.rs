//! Locks and values of several words between processes, some of which are killed.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use polyfork::child_process::Signal;
use polyfork::shared_memory::{BeingWritten, SeqCell, SharedArrayBuffer, SharedMutex};

use crate::support::{PATIENCE, amount, next, role_with};

async fn locked_within_patience(lock: &SharedMutex) -> bool {
    let lock = lock.clone();
    let locking = tokio::task::spawn_blocking(move || {
        lock.lock_within(PATIENCE).expect("the lock in time").is_inconsistent()
    });
    locking.await.unwrap()
}

#[tokio::test]
async fn fault_125_lock_of_a_killed_process_is_taken_over_and_marked() {
    let memory = SharedArrayBuffer::new(SharedMutex::BYTES).unwrap();
    let lock = SharedMutex::new(&memory, 0).unwrap();
    for _ in 0..3 {
        let mut holder = role_with("holds", &memory).await;
        next(&mut holder.channel).await;
        assert!(lock.try_lock().is_none());
        holder.child.kill(Signal::KILL).unwrap();
        // Whether or not anybody has collected its status.
        assert!(locked_within_patience(&lock).await);
        assert!(lock.try_lock().unwrap().is_inconsistent(), "until somebody puts it in order");
        lock.try_lock().unwrap().set_consistent();
        assert!(!lock.try_lock().unwrap().is_inconsistent());
        holder.child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn fault_125_holder_killed_at_any_point_leaves_a_lock_that_works() {
    let memory = SharedArrayBuffer::new(128).unwrap();
    let words = memory.view::<AtomicU64>(64, 2).unwrap();
    for round in 0..amount(10, 300) {
        let mut killed = role_with("counts", &memory).await;
        killed.channel.send(&u64::MAX).await.unwrap();
        let mut counting = role_with("counts", &memory).await;
        counting.channel.send(&20_000_u64).await.unwrap();
        let before = words[0].load(SeqCst);
        while words[0].load(SeqCst) < before + 100 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(round * 613)).await;
        killed.child.kill(Signal::KILL).unwrap();
        let ended = tokio::time::timeout(PATIENCE, counting.child.wait()).await;
        assert!(ended.expect("it gets the lock").unwrap().success());
        killed.child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn lock_keeps_many_processes_apart() {
    let memory = SharedArrayBuffer::new(128).unwrap();
    let mut children = Vec::new();
    for _ in 0..4 {
        let forked = role_with("counts", &memory).await;
        forked.channel.send(&5000_u64).await.unwrap();
        children.push(forked);
    }
    for forked in &mut children {
        assert!(forked.child.wait().await.unwrap().success());
    }
    let words = memory.view::<AtomicU64>(64, 2).unwrap();
    assert_eq!((words[0].load(SeqCst), words[1].load(SeqCst)), (20_000, 20_000));
    assert!(!SharedMutex::new(&memory, 0).unwrap().lock().is_inconsistent());
}

#[tokio::test]
async fn lock_of_a_process_that_lives_is_never_taken() {
    let memory = SharedArrayBuffer::new(SharedMutex::BYTES).unwrap();
    let lock = SharedMutex::new(&memory, 0).unwrap();
    let mut holder = role_with("holds", &memory).await;
    next(&mut holder.channel).await;
    holder.child.kill(Signal::STOP).unwrap();
    let waiting = lock.clone();
    let limit = Duration::from_millis(700);
    let waited = tokio::task::spawn_blocking(move || waiting.lock_within(limit).is_none());
    assert!(waited.await.unwrap(), "stopped is not dead");
    holder.child.kill(Signal::CONT).unwrap();
    holder.channel.send(&"let go").await.unwrap();
    assert!(!locked_within_patience(&lock).await);
}

#[tokio::test]
async fn lock_of_an_earlier_process_with_the_same_id_is_taken_over() {
    let memory = SharedArrayBuffer::new(SharedMutex::BYTES).unwrap();
    let lock = SharedMutex::new(&memory, 0).unwrap();
    let same = SharedArrayBuffer::try_from(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let owner = same.u64().unwrap();
    let own_id = u64::from(std::process::id());
    for dead in [own_id | 1 << 22, own_id | u64::MAX << 22, 0x3f_ffff, u64::MAX, 1 << 22] {
        owner[0].store(dead, SeqCst);
        assert!(lock.try_lock().is_none());
        assert!(locked_within_patience(&lock).await, "{dead:x}");
        assert_eq!(owner[0].load(SeqCst), 0);
    }
}

#[test]
fn fault_117_panic_with_the_lock_marks_it_and_lets_go() {
    let memory = SharedArrayBuffer::new(SharedMutex::BYTES).unwrap();
    let lock = SharedMutex::new(&memory, 0).unwrap();
    let inside = lock.clone();
    let panicked = std::thread::spawn(move || {
        let _guard = inside.lock();
        panic!("as wished");
    });
    assert!(panicked.join().is_err());
    assert!(lock.lock().is_inconsistent());
}

#[test]
fn lock_of_another_thread_is_waited_for() {
    let memory = SharedArrayBuffer::new(SharedMutex::BYTES).unwrap();
    let lock = SharedMutex::new(&memory, 0).unwrap();
    let inside = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let _guard = lock.lock();
                    assert_eq!(inside.fetch_add(1, SeqCst), 0);
                    inside.fetch_sub(1, SeqCst);
                }
            });
        }
    });
    assert_eq!(SharedMutex::BYTES, memory.len());
}

#[tokio::test]
async fn fault_127_no_value_that_another_process_writes_is_read_torn() {
    let memory = SharedArrayBuffer::new(SeqCell::<8>::BYTES).unwrap();
    let cell = SeqCell::<8>::new(&memory, 0).unwrap();
    cell.write(std::array::from_fn(|n| n as u64)).unwrap();
    let _writing = role_with("writes", &memory).await;
    let reading = tokio::task::spawn_blocking(move || {
        let (mut last, mut changed, mut reads) = (0, 0_u64, 0_u64);
        while reads < amount(1_000_000, 100_000_000) || changed < 100 {
            // While it is being written, again.
            let Ok(value) = cell.try_read() else { continue };
            reads += 1;
            let number = value[0];
            let whole = value.iter().enumerate().all(|(n, word)| *word == number ^ n as u64);
            assert!(whole, "torn: {value:x?}");
            assert!(number >= last, "it went back from {last} to {number}");
            changed += u64::from(number != last);
            last = number;
        }
    });
    reading.await.unwrap();
}

#[tokio::test]
async fn fault_127_writer_killed_at_any_point_leaves_no_torn_value() {
    let memory = SharedArrayBuffer::new(SeqCell::<8>::BYTES).unwrap();
    let cell = SeqCell::<8>::new(&memory, 0).unwrap();
    for round in 0..amount(15, 1000) {
        let before = cell.version();
        let mut writing = role_with("writes", &memory).await;
        while cell.version() < before + 1000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(round * 37)).await;
        writing.child.kill(Signal::KILL).unwrap();
        writing.child.wait().await.unwrap();
        match cell.try_read() {
            Ok(value) => {
                assert!(value.iter().enumerate().all(|(n, word)| *word == value[0] ^ n as u64));
            }
            Err(BeingWritten) => assert_eq!(cell.write([0; 8]), Err(BeingWritten)),
        }
        cell.write_over([7; 8]).unwrap();
        assert_eq!(cell.read(), Ok([7; 8]));
    }
}

#[test]
fn value_whose_writer_died_is_not_read_until_it_is_written_over() {
    let memory = SharedArrayBuffer::new(64).unwrap();
    let cell = SeqCell::<2>::new(&memory, 8).unwrap();
    cell.write([1, 2]).unwrap();
    let words = memory.view::<AtomicU64>(8, 1).unwrap();
    words[0].fetch_add(1, Relaxed);
    assert_eq!(cell.try_read(), Err(BeingWritten));
    assert_eq!(cell.read(), Err(BeingWritten));
    assert_eq!(cell.write([3, 4]), Err(BeingWritten));
    cell.write_over([5, 6]).unwrap();
    assert_eq!((cell.read(), cell.version()), (Ok([5, 6]), 6));
}
