//! Channels whose messages go by a ring: the same order, the same ends, and peers that lie in it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use polyfork_core::sync::ring as words;
use polyfork_wire::native::port::{FEATURE_RING, RECORD_FRAMES, RECORD_PLACE};

use super::*;
use crate::shared_memory::{SharedArrayBuffer, View};

fn by_ring(sender: &Sender) -> bool {
    sender.shared().uses_ring()
}

/// Sends until messages go by the ring; how many that took. They are numbers, from 0.
async fn until_by_ring(channel: &Channel, receiver: &mut Channel) -> u32 {
    let mut sent = 0;
    while !by_ring(channel) {
        channel.send(&(sent, [1_u8; 32])).await.unwrap();
        let (got, _): (u32, [u8; 32]) = next(receiver).await.to().unwrap();
        assert_eq!(got, sent);
        sent += 1;
        assert!(sent < 100_000, "never");
    }
    sent
}

#[tokio::test]
async fn who_sends_much_sends_by_the_ring_and_who_does_not_does_not() {
    let (here, mut there) = pair(Encoding::Native);
    until_by_ring(&here, &mut there).await;
    assert!(by_ring(&here) && !by_ring(&there));
}

#[tokio::test]
async fn messages_of_every_kind_keep_their_order() {
    const COUNT: u32 = 6000;
    let (here, mut there) = pair(Encoding::Native);
    let sending = tokio::spawn(async move {
        for number in 0..COUNT {
            match number % 50 {
                10 => {
                    let (one, _other) = UnixStream::pair().unwrap();
                    here.send_with(&(number, ""), one).await.unwrap();
                }
                20 => here.send(&(number, "x".repeat(100_000))).await.unwrap(),
                30 => {
                    let handles = (0..3).map(|_| UnixStream::pair().unwrap().0.into()).collect();
                    here.send_with_all(&(number, "y".repeat(70_000)), handles).await.unwrap();
                }
                _ => here.send(&(number, "")).await.unwrap(),
            }
        }
        assert!(by_ring(&here));
        here.disconnect().await.unwrap();
    });
    for expected in 0..COUNT {
        let mut message = next(&mut there).await;
        let (number, text): (u32, String) = message.to().unwrap();
        assert_eq!(number, expected);
        let (length, handles) = match number % 50 {
            10 => (0, 1),
            20 => (100_000, 0),
            30 => (70_000, 3),
            _ => (0, 0),
        };
        assert_eq!((text.len(), message.take_handles().len()), (length, handles), "{number}");
    }
    assert!(there.recv().await.unwrap().is_none());
    sending.await.unwrap();
}

#[tokio::test]
async fn requests_and_refusals_go_by_the_ring() {
    let (here, mut there) = pair(Encoding::Native);
    until_by_ring(&here, &mut there).await;
    let serving = tokio::spawn(async move {
        while let Ok(Some(message)) = there.recv().await {
            let number: u32 = message.to().unwrap();
            if !number.is_multiple_of(3) {
                message.reply(&(number * 2, [0_u8; 32])).await.unwrap();
            }
        }
    });
    for number in 0..5000_u32 {
        match here.request(&number, LONG).await {
            Ok(reply) => assert_eq!(reply.to::<(u32, [u8; 32])>().unwrap().0, number * 2),
            Err(error) => assert_eq!((error, number % 3), (RequestError::Refused, 0)),
        }
    }
    here.disconnect().await.unwrap();
    serving.await.unwrap();
}

#[tokio::test]
async fn either_end_can_keep_to_the_socket() {
    for (ours, theirs) in [(false, true), (true, false)] {
        let (here, mut there) = pair(Encoding::Native);
        here.allow_ring(ours);
        there.allow_ring(theirs);
        for number in 0..10_000_u32 {
            here.send(&(number, [1_u8; 32])).await.unwrap();
            assert_eq!(next(&mut there).await.to::<(u32, [u8; 32])>().unwrap().0, number);
        }
        assert!(!by_ring(&here));
    }
}

#[tokio::test]
async fn peer_that_knows_no_ring_is_told_nothing_of_it() {
    let (channel, mut peer) = with_peer(Encoding::Native);
    // As an earlier version greets.
    peer.write_all(&[5, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).unwrap();
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    for _ in 0..9000 {
        channel.send(&[7_u8; 32]).await.unwrap();
        tokio::task::yield_now().await;
    }
    channel.disconnect().await.unwrap();
    drop(channel);
    let all = reading.join().unwrap();
    let mut rest = &all[..];
    let mut kinds = Vec::new();
    while let [a, b, c, d, 0, 0, after @ ..] = rest {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        kinds.push(after[0]);
        rest = &after[length..];
    }
    assert!(rest.is_empty() && kinds[0] == 0 && kinds[1..].iter().all(|kind| *kind == 1));
    assert_eq!(kinds.len(), 9001);
}

#[tokio::test]
async fn end_that_only_listens_any_more_gets_everything() {
    let (here, mut there) = pair(Encoding::Native);
    let first = until_by_ring(&here, &mut there).await;
    there.disconnect().await.unwrap();
    // Nothing more can be sent to us, so nobody tells us when there is room.
    let sending = tokio::spawn(async move {
        let mut sent = first;
        while here.send(&(sent, [1_u8; 32])).await.is_ok() {
            sent += 1;
        }
        sent
    });
    let mut expected = first;
    while let Some(message) = there.recv().await.unwrap() {
        assert_eq!(message.to::<(u32, [u8; 32])>().unwrap().0, expected);
        expected += 1;
    }
    assert_eq!(sending.await.unwrap(), expected);
}

#[tokio::test]
async fn queued_messages_arrive_although_the_other_end_has_said_good_bye() {
    let (here, mut there) = pair(Encoding::Native);
    let first = until_by_ring(&here, &mut there).await;
    let count = 5000;
    for number in first..first + count {
        if here.try_send((number, [1_u8; 32])).is_err() {
            panic!("{count} of them fit");
        }
    }
    there.disconnect().await.unwrap();
    for number in first..first + count {
        assert_eq!(next(&mut there).await.to::<(u32, [u8; 32])>().unwrap().0, number);
    }
    assert!(there.recv().await.unwrap().is_none());
}

#[tokio::test]
async fn sender_goes_on_while_its_own_receiver_is_behind() {
    let (here, mut there) = pair(Encoding::Native);
    until_by_ring(&here, &mut there).await;
    // Until nothing more goes to `here`, which reads nothing then: no wake-up either.
    let flood = "x".repeat(1000);
    let mut full = 0;
    while full < 200 {
        match there.try_send(&flood) {
            Ok(()) => full = 0,
            Err(_) => full += 1,
        }
        tokio::task::yield_now().await;
    }
    let sending = tokio::spawn(async move {
        for number in 0..50_000_u32 {
            here.send(&(number, [1_u8; 32])).await.unwrap();
        }
        here
    });
    for number in 0..50_000_u32 {
        assert_eq!(next(&mut there).await.to::<(u32, [u8; 32])>().unwrap().0, number);
    }
    let mut here = sending.await.unwrap();
    assert_eq!(next(&mut here).await.to::<String>().unwrap(), flood);
}

#[tokio::test]
async fn sender_learns_of_the_end_while_its_own_receiver_is_behind() {
    let (here, mut there) = pair(Encoding::Native);
    until_by_ring(&here, &mut there).await;
    let flood = "x".repeat(1000);
    let mut full = 0;
    while full < 200 {
        match there.try_send(&flood) {
            Ok(()) => full = 0,
            Err(_) => full += 1,
        }
        tokio::task::yield_now().await;
    }
    let sender = here.sender();
    let sending = tokio::spawn(async move { while sender.send(&flood).await.is_ok() {} });
    tokio::time::sleep(Duration::from_millis(20)).await;
    // As a process that is killed.
    there.shared().cut_off();
    tokio::time::timeout(LONG, sending).await.unwrap().unwrap();
}

#[tokio::test]
async fn flush_waits_until_everything_is_in_the_ring() {
    let (here, mut there) = pair(Encoding::Native);
    let first = until_by_ring(&here, &mut there).await;
    for number in first..first + 500 {
        here.send(&(number, [1_u8; 32])).await.unwrap();
    }
    here.flush().await.unwrap();
    assert_eq!(lock_queue(&here), 0);
    for number in first..first + 500 {
        assert_eq!(next(&mut there).await.to::<(u32, [u8; 32])>().unwrap().0, number);
    }
}

fn lock_queue(channel: &Channel) -> usize {
    channel.shared().queued_bytes()
}

/// A peer that offers a ring and writes what it likes into both.
struct Liar {
    peer: UnixStream,
    memory: SharedArrayBuffer,
    ring: words::Producer<View<AtomicU64>>,
}

const HELLO: PortFrame<'_> = PortFrame::Hello { features: FEATURE_RING };

impl Liar {
    /// Says hello, and has a ring ready.
    fn new() -> (Channel, Liar) {
        let (channel, peer) = with_peer(Encoding::Native);
        let memory = SharedArrayBuffer::new(words::words_for(4096) * 8).unwrap();
        let all = memory.u64().unwrap();
        words::format(&all).unwrap();
        let ring = words::Producer::new(all).unwrap();
        let mut liar = Liar { peer, memory, ring };
        liar.say(&HELLO);
        (channel, liar)
    }

    fn say(&mut self, said: &PortFrame<'_>) {
        self.peer.write_all(&frame(said)).unwrap();
    }

    fn offer(&mut self, what: impl AsFd) {
        let mut offer = frame(&PortFrame::Ring);
        offer[4] = 1;
        polyfork_sys::channel::send(self.peer.as_fd(), &offer, &[what.as_fd()]).unwrap();
    }

    /// Our ring is offered and used.
    async fn start(&mut self) {
        let memory = self.memory.clone();
        self.offer(memory);
        assert_eq!(self.answer().await, PortFrame::RingAnswer { taken: true });
        self.say(&PortFrame::RingStart);
    }

    fn add(&mut self, kind: u32, bytes: &[u8]) {
        self.ring.push(kind, bytes).unwrap();
        self.say(&PortFrame::Wake);
    }

    /// What the channel answered to the first offer, after its greeting.
    async fn answer(&mut self) -> PortFrame<'static> {
        let mut bytes = [0; 15 + 8];
        let mut there = 0;
        self.peer.set_nonblocking(true).unwrap();
        while there < bytes.len() {
            match self.peer.read(&mut bytes[there..]) {
                Ok(got) => there += got,
                // The channel has to have its turn.
                Err(_would_block) => tokio::task::yield_now().await,
            }
        }
        self.peer.set_nonblocking(false).unwrap();
        assert!(matches!(PortFrame::read(&bytes[6..15]).unwrap(), PortFrame::Hello { .. }));
        PortFrame::RingAnswer { taken: bytes[22] == 1 }
    }
}

async fn faulty(mut channel: Channel) -> String {
    let error = tokio::time::timeout(LONG, channel.recv()).await.unwrap().unwrap_err();
    assert!(channel.recv().await.unwrap().is_none());
    tokio::time::timeout(LONG, channel.closed()).await.unwrap();
    error.to_string()
}

#[tokio::test]
async fn honest_peer_is_understood() {
    let (mut channel, mut liar) = Liar::new();
    liar.start().await;
    let message = frame(&PortFrame::Message(&[2]));
    liar.add(RECORD_FRAMES, &message[..3]);
    liar.add(RECORD_FRAMES, &message[3..]);
    liar.add(RECORD_FRAMES, &[]);
    liar.add(RECORD_PLACE, &[]);
    liar.add(RECORD_FRAMES, &frame(&PortFrame::Message(&[6])));
    liar.say(&PortFrame::Message(&[4]));
    for expected in 1..=3 {
        assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), expected);
    }
}

#[tokio::test]
async fn offer_that_is_no_ring_is_refused_and_the_socket_goes_on() {
    let not_sealed = tempfile::tempfile().unwrap();
    let not_formatted = SharedArrayBuffer::new(1 << 16).unwrap();
    let too_short = SharedArrayBuffer::new(8).unwrap();
    let too_long = SharedArrayBuffer::new((16 << 20) + 8).unwrap();
    words::format(&too_long.u64().unwrap()).unwrap();
    let bad: [BorrowedFd<'_>; 4] =
        [not_sealed.as_fd(), not_formatted.as_fd(), too_short.as_fd(), too_long.as_fd()];
    for bad in bad {
        let (mut channel, mut liar) = Liar::new();
        liar.offer(bad);
        liar.say(&PortFrame::Message(&[2]));
        assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), 1);
        assert_eq!(liar.answer().await, PortFrame::RingAnswer { taken: false });
        // It goes ahead all the same.
        liar.say(&PortFrame::RingStart);
        assert!(faulty(channel).await.contains("not agreed on"));
    }
    let (mut channel, mut liar) = Liar::new();
    liar.say(&PortFrame::Ring);
    liar.say(&PortFrame::Message(&[2]));
    assert_eq!(next(&mut channel).await.to::<i32>().unwrap(), 1);
    assert_eq!(liar.answer().await, PortFrame::RingAnswer { taken: false });
}

#[tokio::test]
async fn fault_124_ring_that_lies_ends_the_channel_and_nothing_else() {
    const TAIL: usize = 16;
    type Lie = fn(&mut Liar);
    let lies: [(&str, Lie); 9] = [
        ("ring is corrupt", |liar| {
            liar.ring.push(RECORD_FRAMES, &[0; 8]).unwrap();
            liar.memory.u64().unwrap()[TAIL].store(u64::MAX / 2, Ordering::SeqCst);
            liar.say(&PortFrame::Wake);
        }),
        ("ring is corrupt", |liar| {
            let words = liar.memory.u64().unwrap();
            liar.ring.push(RECORD_FRAMES, &[0; 8]).unwrap();
            words[words::HEADER_WORDS].store(u64::from(u32::MAX), Ordering::SeqCst);
            liar.say(&PortFrame::Wake);
        }),
        ("no such record", |liar| liar.add(7, &[])),
        ("payload is empty", |liar| liar.add(RECORD_FRAMES, &[0; 6])),
        ("does not belong into the ring", |liar| liar.add(RECORD_FRAMES, &frame(&HELLO))),
        ("no such record", |liar| {
            liar.add(RECORD_FRAMES, &frame(&PortFrame::Message(&[2]))[..3]);
            liar.add(RECORD_PLACE, &[]);
        }),
        ("place in the ring is missing", |liar| liar.say(&PortFrame::Message(&[2]))),
        ("belongs into the ring", |liar| liar.say(&PortFrame::Refused { id: 1 })),
        ("second ring", |liar| {
            let memory = liar.memory.clone();
            liar.offer(memory);
        }),
    ];
    for (told, lie) in lies {
        let (channel, mut liar) = Liar::new();
        liar.start().await;
        lie(&mut liar);
        let error = faulty(channel).await;
        assert!(error.contains(told), "{told}: {error}");
    }
}

#[tokio::test]
async fn answer_without_an_offer_is_a_fault() {
    let (channel, mut liar) = Liar::new();
    liar.say(&PortFrame::RingAnswer { taken: true });
    assert!(faulty(channel).await.contains("offer that was not made"));
}

#[tokio::test]
async fn fault_124_consumer_that_lies_ends_the_channel() {
    const HEAD: usize = 32;
    let (mut channel, liar) = Liar::new();
    let mut peer = liar.peer;
    let lying = std::thread::spawn(move || {
        let (mut bytes, mut fds) = (vec![0; 64 << 10], VecDeque::new());
        let memory = loop {
            polyfork_sys::channel::receive(peer.as_fd(), &mut bytes, &mut fds).unwrap();
            if let Some(fd) = fds.pop_front() {
                break SharedArrayBuffer::try_from(fd).unwrap();
            }
        };
        peer.write_all(&frame(&PortFrame::RingAnswer { taken: true })).unwrap();
        let words = memory.u64().unwrap();
        words[HEAD].store(u64::MAX / 2, Ordering::SeqCst);
        peer.set_nonblocking(false).unwrap();
        let mut rest = Vec::new();
        let _end = peer.read_to_end(&mut rest);
    });
    while channel.send(&"x".repeat(1000)).await.is_ok() {}
    assert!(!channel.is_connected());
    lying.join().unwrap();
    assert!(channel.recv().await.unwrap().is_none());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Whatever a peer does to the memory while we look at it, the channel delivers or ends.
    #[test]
    fn fault_124_any_words_in_a_ring_end_in_messages_or_an_error(
        lies in proptest::collection::vec((1..128_usize, proptest::prelude::any::<u64>()), 1..20),
        small in proptest::prelude::any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut channel, mut liar) = Liar::new();
            liar.start().await;
            for (at, value) in lies {
                let value = if small { value % 64 } else { value };
                liar.memory.u64().unwrap()[at].store(value, Ordering::Relaxed);
                liar.say(&PortFrame::Wake);
                tokio::task::yield_now().await;
                let _any = liar.ring.push(RECORD_FRAMES, &frame(&PortFrame::Message(&[2])));
                if !channel.is_connected() {
                    break;
                }
            }
            drop(liar);
            while let Ok(Some(message)) = channel.recv().await {
                let _any = message.to::<Value>();
            }
            assert!(matches!(channel.recv().await, Ok(None)));
        });
    }
}
