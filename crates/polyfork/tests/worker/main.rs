//! What a worker promises its primary and its program, against a primary that does what the test says.
//!
//! Real sockets, no processes; the worker inside a whole cluster is tested in `native_cluster`. Order is
//! told by what came over the channel, never by time.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

mod listening;
mod messages;
mod primary;
mod standalone;
mod stopping;
