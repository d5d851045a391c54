//! Shared memory between two processes: the same bytes, waiting across, peers that die or lie.
//!
//! The rule that surprises: the ignored tests in `roles` are no tests. They are what this program does when it is
//! started as a child.
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

#[path = "shared_memory/channel.rs"]
mod channel;
#[path = "shared_memory/cluster.rs"]
mod cluster;
#[path = "shared_memory/locks.rs"]
mod locks;
#[path = "shared_memory/ring.rs"]
mod ring;
#[path = "shared_memory/roles.rs"]
mod roles;
#[path = "shared_memory/sharing.rs"]
mod sharing;
#[path = "shared_memory/support.rs"]
mod support;
