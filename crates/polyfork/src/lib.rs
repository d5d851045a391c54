//! Every core behind one port, from any program.
//!
//! The library behind the `polyfork` command. [`cluster`] starts worker processes, gives each its share of
//! the connections that reach one address, and keeps them running. A worker may be this same program,
//! unmodified Node, or anything that inherits a socket.
//!
//! Layers: this crate is the thin shell. What to do is decided in `polyfork-core` (no I/O, no clock), bytes
//! are read and written by `polyfork-wire` (no I/O), and the operating system is behind `polyfork-sys`, the
//! only crate with unsafe code.
//!
//! Linux only: pidfds, `SCM_RIGHTS`, and reuse-port programs are what it stands on.
#![forbid(unsafe_code)]

pub mod channel;
pub mod child_process;
pub mod cluster;
pub mod identity;
pub mod process;
pub mod shared_memory;
pub mod worker_threads;
