//! libFuzzer over the targets that the tests of `polyfork-wire` run as well.
//!
//! What a target promises is in `crates/polyfork-wire/tests/common/targets.rs`. Which one runs is said by
//! `POLYFORK_FUZZ_TARGET`, so that one program, which is slow to build, serves all. `run` in the folder
//! above builds and starts it.
#![no_main]

#[path = "../../crates/polyfork-wire/tests/common/outbox_model.rs"]
mod outbox_model;
#[path = "../../crates/polyfork-wire/tests/common/targets.rs"]
#[expect(dead_code, reason = "one of its targets takes text and is for the tests only")]
mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<targets::Target> = OnceLock::new();

fn chosen() -> targets::Target {
    let name = std::env::var("POLYFORK_FUZZ_TARGET").unwrap_or_default();
    let names = targets::TARGETS.map(|target| target.0).join(", ");
    match targets::TARGETS.iter().find(|target| target.0 == name) {
        Some((_, target)) => *target,
        None => panic!("POLYFORK_FUZZ_TARGET must be one of {names}"),
    }
}

fuzz_target!(|data: &[u8]| TARGET.get_or_init(chosen)(data));
