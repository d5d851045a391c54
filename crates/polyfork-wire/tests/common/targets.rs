//! What the fuzzers call: functions that take any bytes and panic when a promise of the crate is broken.
//!
//! Used by `fuzz.rs` in every test run, and by libFuzzer through `fuzz/` at the root of the project. The seeds
//! are in `corpus/`, a directory for each target; an input that ever broke something is added there.

use std::rc::Rc;

use polyfork_wire::env::{
    CHANNEL_VARIABLES, LISTEN_VARIABLES, append_node_options, listen_fds, native_channel,
    node_channel, split_node_options,
};
use polyfork_wire::native::{FrameDecoder, Payload, ToPrimary, ToWorker, encode};
use polyfork_wire::node::advanced::{
    FrameDecoder as AdvancedDecoder, Objects, Value as AdvancedValue, from_value, handle_message,
    parse_value, read, to_payload, transcode_line, write,
};
use polyfork_wire::node::cluster::{self, FromWorker, Query, Sockname};
use polyfork_wire::node::inbox::Inbox;
use polyfork_wire::node::line::{Line, LineDecoder};
use polyfork_wire::node::message::{HandleKind, Incoming, parse, parse_line};
use polyfork_wire::notify::Notification;
use polyfork_wire::{Limits, ProtocolError, RawJson};
use serde_json::Value;
use serde_json::value::RawValue;

use super::outbox_model::{Step, play};

/// A function that takes any bytes.
pub(crate) type Target = fn(&[u8]);

/// Every target by the name of its corpus.
pub(crate) const TARGETS: [(&str, Target); 9] = [
    ("line", line),
    ("cluster", cluster),
    ("advanced", advanced),
    ("advanced-frames", advanced_frames),
    ("native", native),
    ("notify", notify),
    ("env", env),
    ("outbox", outbox),
    ("state", state),
];

/// The envelope of a state: what is opened is what was sealed, to the last byte.
pub(crate) fn state(data: &[u8]) {
    if let Ok(inside) = polyfork_wire::state::open(data) {
        assert_eq!(polyfork_wire::state::seal(inside).as_deref(), Ok(data));
    }
    let sealed = polyfork_wire::state::seal(data).expect("short enough");
    assert_eq!(polyfork_wire::state::open(&sealed), Ok(data));
    assert!(polyfork_wire::state::open(&sealed[..sealed.len() - 1]).is_err());
}

/// Small enough that a fuzzer reaches them.
const LIMITS: Limits =
    Limits { max_message: 2000, max_depth: 20, max_values: 500, max_fds_queued: 4 };

/// A stream of lines: any cutting gives the same, and what is delivered is valid. The first byte is the
/// length of the pieces.
pub(crate) fn line(data: &[u8]) {
    let Some((first, stream)) = data.split_first() else { return };
    let piece = usize::from(*first).max(1);
    assert_eq!(lines(stream.chunks(piece)), lines([stream]));
    descriptors_are_paired_or_given_back(stream, piece);
}

/// Everything a stream gives until its first error that is final.
fn lines<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Result<Incoming, ProtocolError>> {
    let mut decoder = LineDecoder::new(LIMITS);
    let mut seen = Vec::new();
    for bytes in pieces {
        decoder.feed(bytes);
        loop {
            let incoming = match decoder.next() {
                Ok(Some(line)) => parse_both_ways(line),
                Ok(None) => break,
                Err(error) => Err(error),
            };
            check_incoming(incoming.as_ref().ok());
            let last = matches!(incoming, Err(ProtocolError::TooLong { .. }));
            seen.push(incoming);
            if last {
                return seen;
            }
        }
    }
    seen.extend(decoder.end().map(Err));
    seen
}

/// A line that begins with a second mark is read by one way only, which is no promise.
fn parse_both_ways(line: Line) -> Result<Incoming, ProtocolError> {
    let borrowed = parse_line(&line, &LIMITS);
    let marked_twice = line.starts_with(b"\x02");
    let owned = parse(line, &LIMITS);
    assert!(marked_twice || owned == borrowed);
    owned
}

fn check_incoming(incoming: Option<&Incoming>) {
    match incoming {
        Some(Incoming::User(message)) => check_json(message.as_str()),
        Some(Incoming::Handle(envelope)) => {
            assert!(!matches!(
                *envelope.message,
                Incoming::Handle(_) | Incoming::HandleAck | Incoming::HandleNack
            ));
            check_incoming(Some(&envelope.message));
        }
        Some(Incoming::Cluster(message)) => match &message.body {
            FromWorker::QueryServer(query) | FromWorker::Listening(query) => check_query(query),
            _ => {}
        },
        Some(Incoming::OtherInternal { cmd }) => assert!(cmd.len() > 5 && cmd.starts_with("NODE_")),
        _ => {}
    }
}

fn check_json(text: &str) {
    assert!(serde_json::from_str::<&RawValue>(text).is_ok(), "{text}");
    assert!(!text.contains(['\n', '\r']), "{text}");
}

fn check_query(query: &Query) {
    assert!(query.fd.is_none_or(|fd| fd >= 0));
    assert!(query.backlog.is_none_or(|backlog| backlog > 0));
    if let Some(data) = &query.data {
        check_json(data.as_str());
    }
}

/// A descriptor comes with every read; none is lost, kept for ever, or given twice.
fn descriptors_are_paired_or_given_back(stream: &[u8], piece: usize) {
    let token = Rc::new(());
    let mut inbox = Inbox::new(LIMITS);
    let mut decoder = LineDecoder::new(LIMITS);
    for bytes in stream.chunks(piece) {
        inbox.push(Rc::clone(&token)).expect("at most one is kept from read to read");
        decoder.feed(bytes);
        while let Ok(Some(line)) = decoder.next() {
            if let Ok(Incoming::Handle(_)) = parse_line(&line, &LIMITS) {
                let _ = inbox.claim();
            }
        }
        drop(inbox.settle(decoder.has_partial()));
        assert!(inbox.len() <= 1);
        assert_eq!(Rc::strong_count(&token), 1 + inbox.len());
    }
}

/// One line, and answers made from what it says: they are one line of JSON each.
pub(crate) fn cluster(data: &[u8]) {
    let Ok(incoming) = parse_line(data, &LIMITS) else { return };
    check_incoming(Some(&incoming));
    let text = String::from_utf8_lossy(data);
    match incoming {
        Incoming::Cluster(message) => {
            let seq = message.seq.unwrap_or(u64::MAX);
            check_written(&cluster::reply_ack(seq, 0), false);
            if let FromWorker::QueryServer(query) | FromWorker::Listening(query) = message.body {
                check_answers(seq, &text, &query);
            }
        }
        Incoming::User(message) => {
            let line = cluster::user_message(message.as_str());
            let again = parse_line(line.trim_ascii_end(), &LIMITS);
            assert_eq!(again, Ok(Incoming::User(message)));
        }
        _ => {}
    }
}

fn check_answers(seq: u64, key: &str, query: &Query) {
    let data = query.data.as_ref();
    let name = Sockname::from(std::net::SocketAddr::from(([0, 0, 0, 0], 1)));
    check_written(&cluster::reply_round_robin(seq, 1, key, data, Some(&name)), false);
    check_written(&cluster::reply_error(seq, 1, key, -98, data), false);
    check_written(&cluster::reply_shared(seq, 1, key, data, HandleKind::NetNative), true);
    check_written(&cluster::new_connection(key, 1), true);
}

fn check_written(line: &[u8], envelope: bool) {
    let (newline, text) = line.split_last().expect("a line is not empty");
    assert!(*newline == b'\n' && !text.contains(&b'\n'));
    let limits = Limits { max_message: usize::MAX, max_depth: usize::MAX, ..LIMITS };
    match parse_line(text, &limits).expect("we write what we read") {
        Incoming::Handle(_) => assert!(envelope),
        Incoming::Cluster(_) => assert!(!envelope),
        other => panic!("{other:?}"),
    }
}

/// A payload of the advanced encoding: what is read can be written, and is then read as the same; it has no more
/// values than allowed, and can be used in every way.
pub(crate) fn advanced(data: &[u8]) {
    let Ok(value) = read(data, &LIMITS) else { return };
    // Unlike the value, its text is the same where numbers are NaN.
    let text = format!("{value:?}");
    let payload = write(&value);
    // Written, Latin-1 is shorter and most else is as long; only replaced UTF-8 and padding take more.
    assert!(payload.len() <= 4 * data.len() + 8, "{} from {}", payload.len(), data.len());
    let wide = Limits { max_message: usize::MAX, ..LIMITS };
    let again = read(&payload, &wide).expect("we write what we read");
    assert_eq!(write(&again), payload);
    assert_eq!(to_payload(&value).as_ref(), Ok(&payload));
    // Names of properties are numbers of one kind here, and may be of two on the wire.
    assert_eq!(format!("{again:?}"), text);
    let _ = Objects::of(&value);
    if let Ok(json) = serde_json::to_string(&value) {
        assert!(serde_json::from_str::<AdvancedValue>(&json).is_ok(), "{json}");
    }
    let _ = from_value::<Value>(value.clone());
    let whole = from_value::<AdvancedValue>(value.clone()).expect("it is what it is");
    assert_eq!(format!("{whole:?}"), text);
    check_envelope(&value);
    if let Ok(Incoming::Handle(envelope)) = parse_value(value, &wide) {
        assert!(!matches!(
            *envelope.message,
            Incoming::Handle(_) | Incoming::HandleAck | Incoming::HandleNack
        ));
    }
}

/// What is put into an envelope comes out of it.
fn check_envelope(value: &AdvancedValue) {
    let wide = Limits {
        max_message: usize::MAX,
        max_values: LIMITS.max_values + 10,
        max_depth: LIMITS.max_depth + 1,
        ..LIMITS
    };
    let frame =
        handle_message(&HandleKind::NetSocket, value, Some("k"), None).expect("it is short");
    let envelope = read(&frame[4..], &wide).expect("we write what we read");
    let inner = parse_value(value.clone(), &wide);
    match parse_value(envelope, &wide) {
        Ok(Incoming::Handle(envelope)) => {
            if let (Incoming::User(message), Ok(Incoming::User(inner))) = (*envelope.message, inner)
            {
                assert_eq!(format!("{message:?}"), format!("{inner:?}"));
            }
        }
        other => assert!(inner.is_err(), "{other:?}"),
    }
}

/// A stream of frames of the advanced encoding: any cutting gives the same. The first byte is the length of
/// the pieces. The rest as a line gives a frame if it is JSON.
pub(crate) fn advanced_frames(data: &[u8]) {
    let Some((first, stream)) = data.split_first() else { return };
    let piece = usize::from(*first).max(1);
    assert_eq!(payloads(stream.chunks(piece)), payloads([stream]));
    if let Ok(frame) = transcode_line(stream) {
        let wide = Limits { max_message: usize::MAX, max_depth: usize::MAX, ..Limits::default() };
        let value = read(&frame[4..], &wide).expect("we write what we read");
        assert_eq!(parse_value(value, &wide).is_ok(), parse_line(stream, &wide).is_ok());
    }
}

fn payloads<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Result<Vec<u8>, ProtocolError>> {
    let mut decoder = AdvancedDecoder::new(LIMITS);
    let mut seen = Vec::new();
    for bytes in pieces {
        decoder.feed(bytes);
        while let Some(payload) = decoder.next().transpose() {
            let last = matches!(payload, Err(ProtocolError::TooLong { .. }));
            seen.push(payload);
            if last {
                return seen;
            }
        }
    }
    seen.extend(decoder.end().map(Err));
    seen
}

/// A stream of frames: any cutting gives the same messages, no descriptor leaks, and what is read is
/// what would be written. The first byte is the length of the pieces, the second the number of
/// descriptors that come with the first.
pub(crate) fn native(data: &[u8]) {
    let &[piece, descriptors, ref stream @ ..] = data else { return };
    let piece = usize::from(piece).max(1);
    frames::<ToPrimary>(stream, piece, descriptors % 8);
    frames::<ToWorker>(stream, piece, descriptors % 8);
}

fn frames<T: Payload + PartialEq + std::fmt::Debug>(stream: &[u8], piece: usize, descriptors: u8) {
    let whole = read_frames::<T>(stream, stream.len().max(1), descriptors);
    let cut = read_frames::<T>(stream, piece, descriptors);
    // How early a surplus descriptor is noticed does depend on the cutting.
    if whole.1 != Some(ProtocolError::SurplusDescriptor)
        && cut.1 != Some(ProtocolError::SurplusDescriptor)
    {
        assert_eq!(cut, whole);
    }
    for message in whole.0 {
        let again = read_frames::<T>(&encode(&message, 0), 1000, 0);
        assert_eq!(again, (vec![message], None));
    }
}

fn read_frames<T: Payload>(
    stream: &[u8],
    piece: usize,
    descriptors: u8,
) -> (Vec<T>, Option<ProtocolError>) {
    let token = Rc::new(());
    let mut decoder = FrameDecoder::new(LIMITS);
    let mut messages = Vec::new();
    for _ in 0..descriptors {
        let _ = decoder.push_descriptor(Rc::clone(&token));
    }
    for bytes in stream.chunks(piece) {
        decoder.feed(bytes);
        loop {
            match decoder.next() {
                Ok(Some(frame)) => messages.push(frame.message),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(Rc::strong_count(&token), 1, "a failed decoder keeps nothing");
                    return (messages, Some(error));
                }
            }
        }
    }
    let end = decoder.end();
    assert_eq!(Rc::strong_count(&token), 1, "an ended decoder keeps nothing");
    (messages, end)
}

/// A datagram: what it says is bounded and printable.
pub(crate) fn notify(data: &[u8]) {
    let seen = Notification::parse(data);
    for text in seen.status.iter().chain(&seen.fd_name) {
        assert!(!text.contains(char::is_control) && text.len() <= 3 * data.len());
    }
    assert!(seen.ignored <= data.len());
    assert_ne!(seen.main_pid, Some(0));
}

/// Values of variables, separated by NUL.
pub(crate) fn env(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let values: Vec<&str> = text.split('\0').collect();
    let names = CHANNEL_VARIABLES.iter().chain(&LISTEN_VARIABLES);
    let pairs: Vec<_> = names.zip(values.iter().cycle()).collect();
    if let Ok(Some(channel)) = node_channel(pairs.iter().copied()) {
        assert!(channel.fd >= 0);
    }
    if let Ok(Some(channel)) = native_channel(pairs.iter().copied()) {
        assert!(channel.fd >= 0 && channel.slot > 0);
    }
    let _ = listen_fds(pairs.iter().copied(), 1);
    check_options(values[0], values.last().copied().unwrap_or_default());
}

fn check_options(existing: &str, extra: &str) {
    let options = append_node_options(Some(existing), extra);
    assert!(options.starts_with(existing));
    match split_node_options(existing) {
        Ok(mut arguments) if !extra.is_empty() => {
            arguments.push(extra.to_owned());
            assert_eq!(split_node_options(&options), Ok(arguments));
        }
        _ => assert_eq!(options, existing),
    }
}

/// What happens between a sender and a stock receiver, two bytes for each step after the window.
pub(crate) fn outbox(data: &[u8]) {
    let Some((window, steps)) = data.split_first() else { return };
    let steps: Vec<Step> =
        steps.chunks_exact(2).take(200).map(|two| step(two[0], two[1])).collect();
    play(usize::from(*window) % 20, &steps);
}

fn step(kind: u8, size: u8) -> Step {
    // Lengths around the ones that matter, and small ones.
    let size = usize::from(size);
    let length = match size % 8 {
        0 => 65_400 + size,
        1 => 32_700 + size,
        2 => 150 * size,
        3 => 500 * size,
        _ => size,
    };
    match kind % 16 {
        0..=2 => Step::Plain(length),
        3..=6 => Step::Handle(length),
        7 => Step::Bypass,
        8..=10 => Step::Write,
        11 => Step::WriteSome(length),
        12 | 13 => Step::Read,
        14 => Step::Acknowledge,
        _ => Step::Rewind,
    }
}

/// Checks that a text that is taken as JSON by one is taken by the other, and is the same value.
pub(crate) fn same_json(text: &str) {
    let ours = RawJson::new(text);
    let theirs = serde_json::from_str::<&RawValue>(text);
    assert_eq!(ours.is_ok(), theirs.is_ok(), "{text}");
    if let Ok(ours) = ours {
        let value = |text: &str| serde_json::from_str::<Value>(text).ok();
        assert_eq!(value(ours.as_str()), value(text));
    }
}
