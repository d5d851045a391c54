//! Bytes without I/O: what travels on the channels between a primary and its workers.
//!
//! Every codec here is a plain state machine. Bytes and descriptors go in, messages come out, and the
//! other way round; nothing here reads a socket, looks at a clock or knows what a worker is. Which
//! worker gets a connection is decided in `polyfork-core`, and the system calls are in
//! `polyfork-sys`.
//!
//! The one surprising rule: everything that is decoded was written by a process that may be broken or
//! hostile, so no function of this crate panics on bytes it did not write itself, allocates more than a
//! [`Limits`] allows, or uses stack in proportion to its input.
//!
//! | module | what it speaks |
//! | --- | --- |
//! | [`node`] | the channel of `child_process.fork` and `cluster`, `json` and `advanced`, Node 16 to 26, Deno, Bun |
//! | [`native`] | frames between two Rust processes, with up to 253 descriptors each |
//! | [`notify`] | the datagrams of `sd_notify` |
//! | [`state`] | the envelope of what a primary leaves to the binary that takes its place |
//! | [`env`](mod@env) | the environment variables by which a child learns of its channel |
#![forbid(unsafe_code)]

mod buffer;
pub mod env;
mod error;
mod json;
pub mod limits;
pub mod native;
pub mod node;
pub mod notify;
pub mod state;

pub use error::ProtocolError;
pub use json::RawJson;
pub use limits::Limits;
