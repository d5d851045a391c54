//! A message may take twice its limit of memory and no more, however it comes.
//!
//! The process's own peak is measured, so everything is in one test, and this program has no other.
#![cfg(target_os = "linux")]

use std::fs;

use polyfork_wire::node::advanced::{self, FrameDecoder, Value};
use polyfork_wire::node::line::LineDecoder;
use polyfork_wire::node::message::{Incoming, parse};
use polyfork_wire::{Limits, ProtocolError};

const MESSAGE_BYTES: usize = 32 << 20;
const READ_BYTES: usize = 64 << 10;

/// What the allocator and the test itself may take on top.
const SLACK_BYTES: usize = 4 << 20;

/// Peak resident memory of `work` above what was there before, in bytes.
fn peak(work: impl FnOnce()) -> usize {
    fs::write("/proc/self/clear_refs", "5").expect("the peak can be reset");
    let before = resident("VmRSS:");
    work();
    resident("VmHWM:").saturating_sub(before)
}

fn resident(name: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("the process can be looked at");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("Linux tells it");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

/// Feeds `total` bytes of a string that does not end, in reads of the usual size.
fn feed(decoder: &mut LineDecoder, byte: u8, total: usize) -> Result<(), ProtocolError> {
    let read = [byte; READ_BYTES];
    for _ in 0..total / READ_BYTES {
        decoder.feed(&read);
        assert_eq!(decoder.next()?, None);
    }
    Ok(())
}

fn one_message(byte: u8, length: usize) {
    let limits = Limits { max_message: MESSAGE_BYTES, ..Limits::default() };
    let mut decoder = LineDecoder::new(limits);
    decoder.feed(b"\"");
    feed(&mut decoder, byte, length).expect("it is within the limit");
    decoder.feed(b"\"\n");
    let line = decoder.next().expect("it is within the limit").expect("it is complete");
    assert!(matches!(parse(line, &limits), Ok(Incoming::User(_))));
}

/// A frame with a payload of so many bytes, fed in reads of the usual size.
fn one_frame(payload: &[u8]) -> Result<Value, ProtocolError> {
    let limits = Limits { max_message: MESSAGE_BYTES, ..Limits::default() };
    let mut decoder = FrameDecoder::new(limits);
    let length = u32::try_from(payload.len()).expect("it is short");
    decoder.feed(&length.to_be_bytes());
    for read in payload.chunks(READ_BYTES) {
        assert_eq!(decoder.next(), Ok(None));
        decoder.feed(read);
    }
    let payload = decoder.next().expect("it is within the limit").expect("it is complete");
    advanced::read(&payload, &limits)
}

/// A payload that is a buffer of so many bytes.
fn buffer(length: usize) -> Vec<u8> {
    advanced::write(&Value::buffer(vec![1; length]))
}

/// A set of as many small values as the limit allows.
fn most_values(one: &[u8]) -> Vec<u8> {
    let count = Limits::default().max_values - 1;
    let mut payload = vec![0xFF, 13, b'\''];
    payload.extend(one.iter().cycle().take(count * one.len()));
    payload.push(b',');
    let seven = |shift: u32| u8::try_from(count >> shift & 0x7F).expect("seven bits");
    payload.extend([seven(0) | 0x80, seven(7) | 0x80, seven(14) | 0x80, seven(21)]);
    payload
}

#[test]
fn peak_is_at_most_twice_the_limit() {
    let most = 2 * MESSAGE_BYTES + SLACK_BYTES;
    // Each byte is replaced by three.
    let replaced = peak(|| one_message(0xff, MESSAGE_BYTES / 3 - READ_BYTES));
    println!("replaced message: {} MiB of {} MiB", replaced >> 20, most >> 20);
    assert!(replaced <= most, "{replaced}");

    let largest = peak(|| one_message(b'x', MESSAGE_BYTES - READ_BYTES));
    println!("largest message: {} MiB of {} MiB", largest >> 20, most >> 20);
    assert!(largest <= most, "{largest}");

    let endless = peak(|| {
        let mut decoder =
            LineDecoder::new(Limits { max_message: MESSAGE_BYTES, ..Limits::default() });
        let refused = feed(&mut decoder, b'x', 1 << 30);
        assert_eq!(refused, Err(ProtocolError::TooLong { limit: MESSAGE_BYTES }));
        feed(&mut decoder, b'x', READ_BYTES).expect_err("it is final");
    });
    println!("1 GiB without a newline: {} MiB of {} MiB", endless >> 20, most >> 20);
    assert!(endless <= most, "{endless}");

    let payload = buffer(MESSAGE_BYTES - 100);
    let framed = peak(|| drop(one_frame(&payload).expect("it is a value")));
    println!("largest frame: {} MiB of {} MiB", framed >> 20, most >> 20);
    assert!(framed <= most, "{framed}");
    drop(payload);

    let announced = peak(|| {
        let limits = Limits { max_message: MESSAGE_BYTES, ..Limits::default() };
        let mut decoder = FrameDecoder::new(limits);
        decoder.feed(&u32::try_from(MESSAGE_BYTES).expect("it is short").to_be_bytes());
        decoder.feed(&[0xFF, 13]);
        assert_eq!(decoder.next(), Ok(None));
        for lengths in [[b'A', 0xFF, 0xFF, 0xFF, 0x0F], [b'"', 0xFF, 0xFF, 0xFF, 0x0F]] {
            let payload = [&[0xFF, 13], &lengths[..]].concat();
            assert!(advanced::read(&payload, &limits).is_err());
        }
    });
    println!("lengths without content: {} KiB", announced >> 10);
    assert!(announced <= SLACK_BYTES, "{announced}");

    // Small values are larger here than on the wire, so these are bounded by their number.
    for one in [&b"_"[..], b"o{\0", b"\"\x01x"] {
        let payload = most_values(one);
        let most = 120 * Limits::default().max_values + 2 * payload.len() + SLACK_BYTES;
        let small = peak(|| drop(one_frame(&payload).expect("it is a value")));
        println!("{}...: {} MiB of {} MiB", one.escape_ascii(), small >> 20, most >> 20);
        assert!(small <= most, "{small}");
    }
}
