//! A small fuzzer that runs with the tests: seeds from `corpus/`, changed at random from a printed seed.
//!
//! It knows nothing of coverage; for that the same targets run under libFuzzer, see `fuzz/README.md` at the
//! root of the project. What it has is speed and no requirements: the same runs on every machine.
//!
//! `POLYFORK_FUZZ_RUNS` sets the runs per target (default 20,000, and 500 for the outbox, which plays whole
//! conversations), `POLYFORK_FUZZ_SEED` the beginning. A failure prints the input, to be added to the
//! corpus.

#![expect(clippy::print_stdout, reason = "a failure prints its input, a run its seed")]

#[path = "common/outbox_model.rs"]
mod outbox_model;
#[path = "common/targets.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use targets::{TARGETS, Target, same_json};

/// Pieces that mean something to one of the formats.
const WORDS: [&[u8]; 46] = [
    b"\n",
    b"\r\n",
    b"\x02",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\\u0063",
    b"\\ud800",
    b"null",
    b"false",
    b"-1",
    b"1e999",
    b"9007199254740993",
    b"\"cmd\":\"NODE_CLUSTER\"",
    b"\"cmd\":\"NODE_HANDLE\"",
    b"\"msg\":{",
    b"\"act\":\"queryServer\"",
    b"\xff",
    b"\xe2\x82",
    b"\0",
    b"READY=1\n",
    b"STATUS=",
    b"MAINPID=",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b" \"",
    b"\xff\x0d",
    b"o{\x00",
    b"A\x010$\x00\x01",
    b"a\x05@\x00\x05",
    b"A\x01-$\x00\x01",
    b";\x3a\x00",
    b"'^\x00,\x01",
    b"^\x01",
    b"c\x02\xac\x20",
    b"Z\x10\x05\x00\x00\x00\x00\x00\x00\x00",
    b"B\x01xVB\x00\x01\x00",
    b"~\x01\x02xVB\x00\x01\x03",
    b"\\\x01o{\x00",
    b"\\\x00\x0a\x01x",
    b"rTm\"\x01x.",
    b"\"\x03cmd\"\x0bNODE_HANDLE",
];

/// Longest input that is made.
const MOST_BYTES: usize = 4096;

#[test]
fn lines_keep_their_promises() {
    fuzz("line", 20_000);
}

#[test]
fn cluster_messages_keep_their_promises() {
    fuzz("cluster", 20_000);
}

#[test]
fn advanced_values_keep_their_promises() {
    fuzz("advanced", 20_000);
}

#[test]
fn advanced_frames_keep_their_promises() {
    fuzz("advanced-frames", 20_000);
}

#[test]
fn native_frames_keep_their_promises() {
    fuzz("native", 20_000);
}

#[test]
fn notifications_keep_their_promises() {
    fuzz("notify", 20_000);
}

#[test]
fn variables_keep_their_promises() {
    fuzz("env", 20_000);
}

#[test]
fn outbox_keeps_its_promises() {
    fuzz("outbox", 500);
}

#[test]
fn states_keep_their_promises() {
    fuzz("state", 20_000);
}

#[test]
fn json_is_what_serde_json_takes_for_it() {
    let seeds = corpus("cluster");
    let target: Target = |bytes| same_json(&String::from_utf8_lossy(bytes));
    run("json", target, &seeds, 20_000);
}

fn fuzz(name: &str, runs: u64) {
    let (_, target) =
        TARGETS.iter().find(|target| target.0 == name).expect("a target of this name");
    run(name, *target, &corpus(name), runs);
}

fn run(name: &str, target: Target, seeds: &[Vec<u8>], runs: u64) {
    let runs = variable("POLYFORK_FUZZ_RUNS").unwrap_or(runs);
    let seed = variable("POLYFORK_FUZZ_SEED").unwrap_or(1);
    println!("{name}: {} seeds, {runs} runs from POLYFORK_FUZZ_SEED={seed}", seeds.len());
    for input in seeds {
        attempt(name, target, input);
    }
    let mut random = Random(seed);
    for _ in 0..runs {
        attempt(name, target, &changed(seeds, &mut random));
    }
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

fn attempt(name: &str, target: Target, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        println!("{name} fails on b\"{}\"", input.escape_ascii());
        std::panic::resume_unwind(panic);
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let entries = fs::read_dir(&directory).expect("every target has a corpus");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("it can be listed").path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).expect("it can be read")).collect()
}

/// A seed with one to six changes.
fn changed(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = random.pick(seeds).clone();
    for _ in 0..=random.below(6) {
        change(&mut input, seeds, random);
    }
    input.truncate(MOST_BYTES);
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + random.below(20)).min(input.len());
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.below(256).try_into().expect("a byte"),
        2 => drop(input.splice(at..at, random.pick(&WORDS).iter().copied())),
        3 => drop(input.splice(at..end, random.pick(&WORDS).iter().copied())),
        4 => drop(input.drain(at..end)),
        5 => {
            let copy = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy.repeat(1 + random.below(4)));
        }
        6 => {
            let other = random.pick(seeds);
            let from = random.below(other.len() + 1);
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
        _ => input.truncate(at.max(1)),
    }
}

/// Numbers that look random and are the same on every machine (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("it is below a usize")
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
