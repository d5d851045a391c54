//! Fork and its channel with live Node 20 and 26 at the other end, and with ourselves.
//!
//! `node_child` has scenarios with a Node child, `sharing` those about sockets and descriptors, `rust_child` with a
//! Node parent whose child is this very test program in one of the `roles`, `ours` has Rust on both ends, `hostile`
//! something worse at the other one. Programs are in `tests/fork-apps`.
//!
//! The rule that surprises: the ignored tests in `roles` are no tests. They are what this program does
//! when it is started as a child.
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]
#![allow(clippy::print_stdout, reason = "a test says that it is skipped")]

#[path = "fork/hostile.rs"]
mod hostile;
#[path = "fork/node_child.rs"]
mod node_child;
#[path = "fork/ours.rs"]
mod ours;
#[path = "fork/roles.rs"]
mod roles;
#[path = "fork/rust_child.rs"]
mod rust_child;
#[path = "fork/sharing.rs"]
mod sharing;
#[path = "fork/support.rs"]
mod support;
