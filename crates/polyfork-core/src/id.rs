//! Names of slots and workers.
//!
//! Only the numbers; what happens in a slot is decided in [`crate::supervisor`]. The one surprising rule: a slot number is
//! used again (that is its point: a stable position with its own listening sockets), a worker number never is, so a late
//! message can always be told from one of the worker's successor.

use std::fmt;

/// A stable position in the cluster, counted from 1. Workers come and go in it.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct SlotId(pub u32);

/// One worker process, counted from 1 over the life of the primary and never used again.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct WorkerId(pub u64);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
