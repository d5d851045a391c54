//! The same bytes in two processes, and waiting for each other.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use polyfork::channel::{Channel, Encoding, Handle, SendError};
use polyfork::child_process::Signal;
use polyfork::shared_memory::{
    Atomics, MOST_RECEIVED_BYTES, SharedArrayBuffer, ViewError, WaitOutcome, load_f64, store_f64,
};

use crate::support::{PATIENCE, next, next_memory, role, role_with};

#[tokio::test]
async fn parent_and_child_see_the_same_bytes_and_wait_for_each_other() {
    let memory = SharedArrayBuffer::new(64 << 10).unwrap();
    let words = memory.u32().unwrap();
    let changed = words.wait_async(0, 0, Some(PATIENCE));
    let mut forked = role_with("shares", &memory).await;
    assert_ne!(changed.await.unwrap(), WaitOutcome::TimedOut);
    let theirs = next_memory(&mut forked.channel).await;
    assert!(words.iter().all(|word| word.load(SeqCst) == 1));
    assert_eq!((theirs.len(), theirs.max_len(), theirs.is_growable()), (8, 64 << 10, true));
    let numbers = theirs.u32().unwrap();
    theirs.grow(50_000).unwrap();
    numbers[0].store(8, SeqCst);
    numbers.notify(0, u32::MAX);
    forked.channel.disconnect().await.unwrap();
    assert!(forked.child.wait().await.unwrap().success());
    assert_eq!(numbers[0].load(SeqCst), 8);
}

#[tokio::test]
async fn ten_thousand_turns_are_taken_by_waiting_and_notifying() {
    let memory = SharedArrayBuffer::new(4).unwrap();
    let forked = role_with("plays", &memory).await;
    let words = memory.i32().unwrap();
    let turns = tokio::task::spawn_blocking(move || {
        for turn in 0..10_000 {
            assert_eq!(
                words[0].compare_exchange(2 * turn, 2 * turn + 1, SeqCst, SeqCst),
                Ok(2 * turn)
            );
            words.notify(0, 1);
            while words[0].load(SeqCst) == 2 * turn + 1 {
                assert_ne!(words.wait(0, 2 * turn + 1, Some(PATIENCE)), WaitOutcome::TimedOut);
            }
        }
        words[0].store(-1, SeqCst);
        words.notify(0, u32::MAX);
    });
    turns.await.unwrap();
    let mut child = forked.child;
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn memory_is_sent_on_to_a_third_process() {
    let (here, mut there) = Channel::pair().unwrap();
    let memory = SharedArrayBuffer::new(100).unwrap();
    here.send_with(&1, memory.clone()).await.unwrap();
    let again = next_memory(&mut there).await;
    assert!(again.is_same(&memory));
    again.u8().unwrap()[99].store(5, SeqCst);
    there.send_with_all(&2, vec![again.into(), memory.clone().into()]).await.unwrap();
    let (_, mut here) = here.split();
    let mut message = here.recv().await.unwrap().unwrap();
    assert_eq!(message.take_handles().len(), 2);
    assert_eq!(memory.u8().unwrap()[99].load(SeqCst), 5);
}

#[tokio::test]
async fn node_is_not_given_memory() {
    for encoding in [Encoding::Json, Encoding::Advanced] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours.into(), encoding).unwrap();
        let memory = SharedArrayBuffer::new(100).unwrap();
        let refused = channel.send_with(&1, memory).await.unwrap_err();
        assert_eq!(refused, SendError::Handle("Node shares memory between threads only"));
    }
}

#[tokio::test]
async fn what_is_not_sealed_arrives_as_a_file() {
    let (here, mut there) = Channel::pair().unwrap();
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let unsealed = std::fs::File::from(rustix::fs::memfd_create("unsealed", flags).unwrap());
    unsealed.set_len(4096).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 4096]).unwrap();
    let long = SharedArrayBuffer::growable(0, MOST_RECEIVED_BYTES * 2).unwrap();
    here.send_with_all(&1, vec![unsealed.into(), file.into(), long.into()]).await.unwrap();
    let handles = next(&mut there).await.take_handles();
    assert!(matches!(handles[..2], [Handle::File(_), Handle::File(_)]), "{handles:?}");
    let Handle::Memory(memory) = &handles[2] else { panic!("{handles:?}") };
    assert_eq!(memory.max_len(), MOST_RECEIVED_BYTES);
}

#[tokio::test]
async fn waiting_is_without_effect_when_the_value_differs() {
    let words = SharedArrayBuffer::new(8).unwrap().i32().unwrap();
    words[1].store(-5, SeqCst);
    assert_eq!(words.wait(1, 0, None), WaitOutcome::NotEqual);
    assert_eq!(words.wait_async(1, 0, None).await.unwrap(), WaitOutcome::NotEqual);
    assert_eq!(words.wait(1, -5, Some(Duration::ZERO)), WaitOutcome::TimedOut);
    let start = Instant::now();
    let limit = Duration::from_millis(20);
    assert_eq!(words.wait_async(1, -5, Some(limit)).await.unwrap(), WaitOutcome::TimedOut);
    assert!(start.elapsed() >= limit);
    assert_eq!(words.notify(1, u32::MAX), 0);
}

#[tokio::test]
async fn notify_wakes_as_many_as_it_says_whether_they_block_or_not() {
    let words = SharedArrayBuffer::new(4).unwrap().u32().unwrap();
    let mut waiting: Vec<_> =
        (0..4).map(|_| tokio::spawn(words.wait_async(0, 0, Some(PATIENCE)))).collect();
    let blocked = words.clone();
    waiting.push(tokio::task::spawn_blocking(move || Ok(blocked.wait(0, 0, Some(PATIENCE)))));
    let mut woken = 0;
    while woken < 5 {
        let now = words.notify(0, 2);
        assert!(now <= 2);
        woken += now;
        tokio::task::yield_now().await;
    }
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap().unwrap(), WaitOutcome::Ok);
    }
    assert_eq!(words.notify(0, u32::MAX), 0);
}

#[tokio::test]
async fn dropped_wait_takes_no_notification_from_the_others() {
    const ROUNDS: u32 = 200;
    let words = SharedArrayBuffer::new(4).unwrap().u32().unwrap();
    let mut reminded = 0;
    for _ in 0..ROUNDS {
        let kept = words.wait_async(0, 0, Some(PATIENCE));
        let dropped = words.wait_async(0, 0, Some(PATIENCE));
        let notifier = words.clone();
        let notifying = tokio::task::spawn_blocking(move || {
            while notifier.notify(0, 1) == 0 {
                std::thread::yield_now();
            }
        });
        drop(dropped);
        notifying.await.unwrap();
        let mut kept = std::pin::pin!(kept);
        let outcome = loop {
            // It may not have slept yet when the notification was passed on. That is rare.
            match tokio::time::timeout(Duration::from_millis(200), &mut kept).await {
                Ok(outcome) => break outcome.unwrap(),
                Err(_) => reminded += words.notify(0, 1),
            }
        };
        assert_eq!(outcome, WaitOutcome::Ok);
    }
    assert!(reminded < ROUNDS as usize / 4, "{reminded} notifications were swallowed");
}

#[tokio::test]
async fn waiter_outlives_a_notifier_that_is_killed_at_any_point() {
    let words_of = |memory: &SharedArrayBuffer| memory.i32().unwrap();
    for round in 0..20_u32 {
        let memory = SharedArrayBuffer::new(4).unwrap();
        let words = words_of(&memory);
        let forked = role_with("plays", &memory).await;
        let after = Duration::from_micros(u64::from(round * 700));
        let mut child = forked.child;
        let killer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(10) + after).await;
            child.kill(Signal::KILL).unwrap();
            child.wait().await.unwrap();
        });
        let playing = tokio::task::spawn_blocking(move || {
            let mut seen = 0;
            loop {
                words[0].store(seen + 1, SeqCst);
                words.notify(0, 1);
                // Short: it is how the death is noticed here.
                while words[0].load(SeqCst) == seen + 1 {
                    if words.wait(0, seen + 1, Some(Duration::from_millis(100)))
                        == WaitOutcome::TimedOut
                    {
                        return seen;
                    }
                }
                assert_eq!(words[0].load(SeqCst), seen + 2);
                seen += 2;
            }
        });
        killer.await.unwrap();
        playing.await.unwrap();
        // The memory is as good as before for the next one.
        let (next, words) = (role_with("plays", &memory).await, words_of(&memory));
        words[0].store(1, SeqCst);
        words.notify(0, 1);
        let went_on = words.wait_async(0, 1, Some(PATIENCE)).await.unwrap();
        assert_ne!(went_on, WaitOutcome::TimedOut);
        assert_eq!(words[0].load(SeqCst), 2);
        drop(next);
    }
}

#[tokio::test]
async fn memory_of_a_dead_process_lives_on() {
    let mut forked = role("shares");
    let memory = SharedArrayBuffer::new(4).unwrap();
    forked.channel.send_with(&(), memory).await.unwrap();
    let theirs = next_memory(&mut forked.channel).await;
    forked.child.kill(Signal::KILL).unwrap();
    forked.child.wait().await.unwrap();
    assert_eq!(theirs.u64().unwrap()[0].load(SeqCst), 7);
}

#[test]
fn views_of_two_widths_are_refused_where_they_meet() {
    let memory = SharedArrayBuffer::new(16).unwrap();
    let floats = memory.view::<std::sync::atomic::AtomicU64>(8, 1).unwrap();
    assert_eq!(memory.u8().map(drop), Err(ViewError::OtherWidth { start: 8, end: 16, width: 8 }));
    store_f64(&floats[0], -0.5, SeqCst);
    assert_eq!(load_f64(&floats[0], SeqCst), -0.5);
    let again = SharedArrayBuffer::try_from(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(load_f64(&again.u64().unwrap()[1], SeqCst), -0.5);
}
