//! Threads with Node's semantics: workers with ports, messages that move, and a pool.
//!
//! The rule that surprises: a thread cannot be killed. Whatever ends a worker from outside asks it, and says so when
//! it does not listen.
//!
//! Behaviour follows: Node `lib/internal/worker.js`, `src/node_messaging.cc`.

mod park;
pub mod pool;
mod port;

pub use pool::{Pool, PoolBuilder, Priority, Task, TaskError};
pub use port::{
    CyclicTransfer, MessageChannel, MessagePort, PostError, Poster, Transferred, TryPostError,
    TryReceiveError, receive_message_on_port,
};
