//! The promises of the pipelining sender, against a model of the kernel and of a stock Node receiver.
//!
//! That the model is as careless as the real thing is shown here too: it gives the same wrong pairs to a
//! sender without the outbox that Node 20 and 26 were seen to give. `live_node.rs` repeats the
//! main case with a real one.

#[path = "common/outbox_model.rs"]
mod outbox_model;

use outbox_model::{Got, Receiver, Socket, Step, line, play};
use polyfork_wire::ProtocolError;
use polyfork_wire::node::outbox::{Chunk, Outbox};
use proptest::prelude::*;

/// What a stock receiver makes of handle messages that are sent without waiting.
fn sent_blindly(plain: usize, handles: u32, length: usize) -> Vec<Got> {
    let (mut socket, mut receiver) = (Socket::default(), Receiver::default());
    if plain > 0 {
        socket.send(&line('P', 1000, plain), None);
    }
    for n in 0..handles {
        socket.send(&line('H', n, length), Some(n));
    }
    while receiver.read(&mut socket) {}
    receiver.got.into_iter().filter(|got| matches!(got, Got::Handle(..))).collect()
}

fn all_paired(got: &[Got]) -> bool {
    got.iter().all(|got| matches!(got, Got::Handle(n, Some(descriptor)) if n == descriptor))
}

#[test]
fn model_mispairs_where_stock_node_does() {
    assert!(all_paired(&sent_blindly(0, 200, 130)));
    assert!(all_paired(&sent_blindly(60_000, 3, 130)));
    assert!(all_paired(&sent_blindly(0, 10, 30_000)));
    for length in [40_000, 70_000, 150_000] {
        assert!(!all_paired(&sent_blindly(0, 10, length)), "{length}");
    }
    for plain in [65_420, 65_500] {
        assert!(!all_paired(&sent_blindly(plain, 3, 130)), "{plain}");
    }
}

#[test]
fn large_handle_messages_are_paired() {
    for length in [100, 30_000, 32_767, 32_768, 40_000, 65_536, 70_000, 150_000] {
        let mut steps = vec![Step::Handle(length); 10];
        steps.extend([Step::Write; 10]);
        play(8, &steps);
    }
}

#[test]
fn handles_behind_many_plain_bytes_are_paired() {
    for plain in (65_100..65_600).step_by(13) {
        for gap in [0, 200, 65_000] {
            let steps = [
                Step::Plain(plain),
                Step::Write,
                Step::Handle(130),
                Step::Write,
                Step::Plain(gap),
                Step::Write,
                Step::Handle(130),
                Step::Write,
                Step::Handle(130),
                Step::Write,
            ];
            play(8, &steps);
        }
    }
}

#[test]
fn short_handle_messages_use_the_whole_window() {
    let mut outbox = Outbox::new(16);
    for n in 0..20 {
        outbox.push_handle(line('H', n, 130), n);
    }
    let mut sent = 0;
    while let Some(chunk) = outbox.peek() {
        assert_eq!(chunk.handle, Some(&sent));
        sent += 1;
        let n = chunk.bytes.len();
        outbox.wrote(n);
    }
    assert_eq!((sent, outbox.in_flight(), outbox.queued_handles()), (16, 16, 4));
    assert_eq!(outbox.acknowledged(false), Ok(0));
    assert_eq!(outbox.peek().and_then(|chunk| chunk.handle), Some(&16));
}

#[test]
fn window_of_none_is_a_window_of_one() {
    let mut outbox = Outbox::new(0);
    outbox.push_handle(b"a\n".to_vec(), 1);
    outbox.push_handle(b"b\n".to_vec(), 2);
    outbox.wrote(2);
    assert!(outbox.peek().is_none());
    assert_eq!(outbox.acknowledged(true), Ok(1));
    assert!(outbox.peek().is_some());
    assert_eq!(outbox.nacks_total(), 1);
}

#[test]
fn plain_lines_are_written_together() {
    let mut outbox = Outbox::<u32>::new(1);
    for n in 0..1000 {
        outbox.push(line('P', n, 20));
    }
    let first = outbox.peek().expect("there are lines").bytes.len();
    assert_eq!(first, 20_000);
    outbox.wrote(19_990);
    outbox.push(line('P', 1000, 20));
    assert_eq!(outbox.peek().expect("there are lines").bytes.len(), 30);
}

#[test]
fn empty_lines_are_ignored() {
    let mut outbox = Outbox::<u32>::new(1);
    outbox.push(Vec::new());
    outbox.push_bypass(Vec::new());
    assert!(outbox.peek().is_none() && outbox.is_empty());
}

#[test]
fn acknowledgements_overtake_but_never_split() {
    let mut outbox = Outbox::new(1);
    outbox.push_handle(b"H0\n".to_vec(), 0);
    outbox.push_handle(b"H1\n".to_vec(), 1);
    outbox.wrote(1);
    outbox.push_bypass(&b"B2\n"[..]);
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"0\n", handle: None }));
    outbox.wrote(2);
    // The second handle waits for an acknowledgement; ours does not wait for it.
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"B2\n", handle: None }));
    outbox.wrote(1);
    outbox.push_bypass(&b"B3\n"[..]);
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"2\nB3\n", handle: None }));
    outbox.wrote(5);
    assert_eq!(outbox.peek(), None);
    assert_eq!(outbox.acknowledged(false), Ok(0));
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"H1\n", handle: Some(&1) }));
}

#[test]
fn acknowledgement_of_nothing_is_refused() {
    let mut outbox = Outbox::new(4);
    assert_eq!(outbox.acknowledged(false), Err(ProtocolError::UnsolicitedAck));
    outbox.push_handle(b"H0\n".to_vec(), 0);
    assert_eq!(outbox.acknowledged(false), Err(ProtocolError::UnsolicitedAck));
    outbox.wrote(2);
    // The line is not complete, so nobody can have read it.
    assert_eq!(outbox.acknowledged(false), Err(ProtocolError::UnsolicitedAck));
    outbox.wrote(1);
    assert_eq!(outbox.acknowledged(false), Ok(0));
}

#[test]
fn dead_peer_gives_back_everything_unacknowledged() {
    let mut outbox = Outbox::new(4);
    for n in 0..4 {
        outbox.push_handle(line('H', n, 10), n);
        outbox.push(line('P', n, 10));
    }
    for _ in 0..3 {
        outbox.wrote(10);
    }
    outbox.push_bypass(&b"B\n"[..]);
    assert_eq!(outbox.acknowledged(false), Ok(0));
    assert_eq!(outbox.drain().collect::<Vec<_>>(), [1, 2, 3]);
    assert!(outbox.is_empty() && outbox.peek().is_none());
    assert_eq!((outbox.queued_bytes(), outbox.queued_handles(), outbox.in_flight()), (0, 0, 0));
}

#[test]
fn unread_handle_messages_vanish_and_the_rest_is_sent_again() {
    let mut outbox = Outbox::new(8);
    outbox.push(b"plain one\n".to_vec());
    outbox.push_handle(b"handle 0\n".to_vec(), 0);
    outbox.push(b"plain two\n".to_vec());
    outbox.push_handle(b"handle 1\n".to_vec(), 1);
    outbox.push(b"plain three\n".to_vec());
    for _ in 0..4 {
        let whole = outbox.peek().expect("all can be sent").bytes.len();
        outbox.wrote(whole);
    }
    outbox.wrote(5);
    // The peer has read "plain one\nhand": the first descriptor arrived, the second did not.
    let returned = outbox.rewind_unread(b"le 0\nplain two\nhandle 1\nplain");
    assert_eq!(returned, Ok(vec![1]));
    outbox.push_bypass(&b"ack\n"[..]);
    let again = outbox.peek().expect("the rest of the stream");
    assert_eq!(again, Chunk { bytes: b"le 0\nplain two\nplain three\n", handle: None });
    outbox.wrote(again.bytes.len());
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"ack\n", handle: None }));
    outbox.wrote(4);
    // The first message was read in two parts, so no other descriptor may come before it is acknowledged.
    outbox.push_handle(b"handle 2\n".to_vec(), 2);
    assert_eq!(outbox.peek(), None);
    assert_eq!(outbox.acknowledged(false), Ok(0));
    assert_eq!(outbox.peek().and_then(|chunk| chunk.handle), Some(&2));
}

#[test]
fn half_written_handle_message_that_nobody_read_vanishes_wholly() {
    let mut outbox = Outbox::new(8);
    outbox.push_handle(b"handle 0\n".to_vec(), 0);
    outbox.push(b"plain\n".to_vec());
    outbox.wrote(4);
    assert_eq!(outbox.rewind_unread(b"hand"), Ok(vec![0]));
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"plain\n", handle: None }));
    assert_eq!((outbox.written_total(), outbox.queued_bytes()), (0, 6));
}

#[test]
fn more_unread_bytes_than_possible_are_refused() {
    let bad = |unread, possible| Err(ProtocolError::BadRewind { unread, possible });
    let mut outbox = Outbox::new(8);
    outbox.push_handle(b"H0\n".to_vec(), 0);
    outbox.push(b"P1\n".to_vec());
    assert_eq!(outbox.rewind_unread(b"x"), bad(1, 0));
    outbox.wrote(3);
    outbox.wrote(3);
    assert_eq!(outbox.rewind_unread(b"1234567"), bad(7, 6));
    assert_eq!(outbox.acknowledged(false), Ok(0));
    // It cannot have acknowledged what it has not read.
    assert_eq!(outbox.rewind_unread(b"\nP1\n"), bad(4, 3));
    assert_eq!(outbox.rewind_unread(b"P1\n"), Ok(vec![]));
    assert_eq!(outbox.rewind_unread(b""), Ok(vec![]));
    // Nor can it unread what it had read when bytes were taken back before.
    outbox.wrote(3);
    assert_eq!(outbox.rewind_unread(b"\n"), Ok(vec![]));
    outbox.wrote(1);
    assert_eq!(outbox.rewind_unread(b"1\n"), bad(2, 1));
    assert_eq!(outbox.rewind_unread(b"\n"), Ok(vec![]));
    assert_eq!(outbox.peek(), Some(Chunk { bytes: b"\n", handle: None }));
}

fn any_length() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1..300_usize,
        2 => 30_000..40_000_usize,
        1 => 60_000..70_000_usize,
        1 => 100_000..200_000_usize,
    ]
}

fn any_step(rewind: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any_length().prop_map(Step::Plain),
        6 => any_length().prop_map(Step::Handle),
        1 => Just(Step::Bypass),
        8 => Just(Step::Write),
        2 => (0..100_000_usize).prop_map(Step::WriteSome),
        2 => (0..4_usize).prop_map(Step::WriteSome),
        5 => Just(Step::Read),
        4 => Just(Step::Acknowledge),
        rewind => Just(Step::Rewind),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_descriptor_is_ever_mispaired(
        window in 0..20_usize, steps in prop::collection::vec(any_step(0), 0..150)
    ) {
        play(window, &steps);
    }

    #[test]
    fn pulling_back_loses_and_repeats_nothing(
        window in 0..20_usize, steps in prop::collection::vec(any_step(3), 0..150)
    ) {
        play(window, &steps);
    }
}
