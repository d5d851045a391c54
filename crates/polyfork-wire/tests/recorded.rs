//! What workers of each runtime were recorded to say, read without the runtime.
//!
//! The recordings in `fixtures/` are what `node/questions.cjs` makes a worker write when each of its questions is
//! refused, byte for byte but for the TLS ticket keys. `live_node.rs` makes new ones.

use polyfork_wire::node::cluster::{AddressType, FromWorker, Query};
use polyfork_wire::node::line::LineDecoder;
use polyfork_wire::node::message::{Incoming, parse_line};
use polyfork_wire::{Limits, ProtocolError};

const NODE: [&[u8]; 5] = [
    include_bytes!("fixtures/node-18.20.8.worker"),
    include_bytes!("fixtures/node-20.20.2.worker"),
    include_bytes!("fixtures/node-22.23.3.worker"),
    include_bytes!("fixtures/node-24.21.0.worker"),
    include_bytes!("fixtures/node-26.10.0.worker"),
];
const DENO: &[u8] = include_bytes!("fixtures/deno-2.9.6.worker");
const BUN: &[u8] = include_bytes!("fixtures/bun-1.4.5.worker");

/// Every message, and whether its line was marked as Bun does.
fn read(recording: &[u8], piece: usize) -> Vec<(Incoming, bool)> {
    let limits = Limits::default();
    let mut lines = LineDecoder::new(limits);
    let mut messages = Vec::new();
    for bytes in recording.chunks(piece) {
        lines.feed(bytes);
        while let Some(line) = lines.next().expect("the recording has valid lines") {
            let incoming = parse_line(&line, &limits).expect("the recording has valid messages");
            messages.push((incoming, line.prefixed));
        }
    }
    assert_eq!(lines.end(), None);
    messages
}

fn questions(messages: &[(Incoming, bool)]) -> Vec<&Query> {
    messages
        .iter()
        .filter_map(|(incoming, _)| match incoming {
            Incoming::Cluster(message) => match &message.body {
                FromWorker::QueryServer(query) => Some(query),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

#[test]
fn every_worker_is_online_first_and_leaves_last() {
    for recording in NODE.iter().chain([&DENO, &BUN]) {
        let messages = read(recording, recording.len());
        let body = |incoming: &Incoming| match incoming {
            Incoming::Cluster(message) => Some((message.seq, message.body.clone())),
            _ => None,
        };
        let first = messages.first().and_then(|(incoming, _)| body(incoming));
        assert_eq!(first, Some((Some(0), FromWorker::Online)));
        let (seq, last) =
            messages.last().and_then(|(incoming, _)| body(incoming)).expect("the last");
        assert_eq!(last, FromWorker::ExitedAfterDisconnect);
        assert_eq!(seq, Some(questions(&messages).len() as u64 + 1));
    }
}

#[test]
fn every_cutting_gives_the_same_messages() {
    for recording in NODE.iter().chain([&DENO, &BUN]) {
        let whole = read(recording, recording.len());
        for piece in [1, 2, 3, 7, 64, 1000] {
            assert_eq!(read(recording, piece), whole);
        }
    }
}

#[test]
fn recording_cut_anywhere_ends_in_a_whole_message_or_is_truncated() {
    let recording = NODE[4];
    for cut in 0..recording.len() {
        let mut lines = LineDecoder::new(Limits::default());
        lines.feed(&recording[..cut]);
        let mut seen = 0;
        while let Some(line) = lines.next().expect("the recording has valid lines") {
            parse_line(&line, &Limits::default()).expect("a delivered line is whole");
            seen += 1;
        }
        assert_eq!(seen, recording[..cut].iter().filter(|byte| **byte == b'\n').count());
        let whole = cut == 0 || recording[cut - 1] == b'\n';
        assert_eq!(lines.end(), (!whole).then_some(ProtocolError::Truncated));
    }
}

#[test]
fn only_bun_marks_its_messages_and_only_internal_ones() {
    for recording in NODE.iter().chain([&DENO]) {
        assert!(read(recording, 64).iter().all(|(_, marked)| !marked));
    }
    for (incoming, marked) in read(BUN, 64) {
        assert_eq!(marked, matches!(incoming, Incoming::Cluster(_)));
    }
}

#[test]
fn flags_without_a_host_came_with_node_22() {
    let flags = NODE.map(|recording| questions(&read(recording, 64))[0].flags);
    assert_eq!(flags, [None, None, Some(0), Some(0), Some(0)]);
}

#[test]
fn runtimes_ask_in_their_own_ways() {
    let (deno, bun) = (read(DENO, 64), read(BUN, 64));
    let (deno, bun) = (questions(&deno), questions(&bun));
    // Deno writes 2 for "IPv6 only", which is "reuse port" in Node, and never asks for UDP.
    assert_eq!((deno[3].address_type, deno[3].flags), (AddressType::V6, Some(2)));
    let udp = |query: &&&Query| matches!(query.address_type, AddressType::Udp4 | AddressType::Udp6);
    assert_eq!((deno.iter().filter(udp).count(), bun.iter().filter(udp).count()), (0, 2));
    // It leaves out who may use a path. Bun says it always, and leaves out the backlog.
    assert!(!deno[5].readable_all && bun[5].readable_all && bun[5].writable_all);
    assert_eq!((bun[0].backlog, bun[2].backlog), (None, Some(17)));
    // Node keeps a lone surrogate, Deno replaces it.
    let surrogate = |recording| {
        read(recording, 64).into_iter().any(|(incoming, _)| {
        matches!(incoming, Incoming::User(message) if message.as_str() == r#""\ud800""#)
    })
    };
    assert!(NODE.iter().all(|recording| surrogate(recording)) && !surrogate(DENO));
}
