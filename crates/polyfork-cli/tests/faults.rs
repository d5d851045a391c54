//! Faults under real load: what clients, siblings and the primary see when workers die, hang or lie.
//!
//! Each test is one row of the fault matrix that such systems were broken by before; its number is in the name, so
//! that a row without a test shows. Every load test prints what became of each attempt. Rows that need no cluster are
//! tests of `polyfork-sys` (spawn, descriptors) and `polyfork-wire` (bytes).

#![allow(clippy::print_stdout, reason = "tests print their counts")]

#[path = "support/mod.rs"]
mod support;

#[path = "faults/cluster.rs"]
mod cluster;
#[path = "faults/death.rs"]
mod death;
#[path = "faults/ends.rs"]
mod ends;
#[path = "faults/hostile.rs"]
mod hostile;
#[path = "faults/load.rs"]
mod load;
#[path = "faults/other_programs.rs"]
mod other_programs;
#[path = "faults/shortage.rs"]
mod shortage;
