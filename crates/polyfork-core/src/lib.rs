//! Decisions without I/O, without a clock and without randomness of their own.
//!
//! Everything here is a state machine: named events and the time go in, actions for the shell come out. Sockets,
//! processes and timers live in `polyfork` and `polyfork-sys`; bytes on channels live in `polyfork-wire`.
//!
//! | module | decides |
//! | --- | --- |
//! | [`supervisor`] | which worker runs in which slot, when it is admitted, stopped, restarted, given up |
//! | [`restart`] | how long a restart waits, and when a slot has been restarted too often |
//! | [`turn`] | whose turn it is |
//! | [`watchdog`] | who has been silent for too long |
//! | [`seats`] | which worker has which place in a reuse-port group |
//! | [`handoff`] | which worker gets which accepted connection, and who still owes an acknowledgement |
//! | [`listeners`] | who holds which listening socket, and when it may be closed |
//! | [`sync`] | nothing: it holds the lock-free algorithms of ports, rings and pools, without their waiting |
//! | [`time`], [`id`] | the values the others speak in |
//!
//! The surprising rule: time is an argument of every call, and it may go backwards. A state machine then behaves as if
//! it stood still (see [`time::Time`]). This is what lets `tests/simulation.rs` play a million crashes in seconds, from a seed.
//!
//! Source of the rules: the section "Nothing lost" of the project's design, restated where each rule is kept.
#![forbid(unsafe_code)]

pub mod handoff;
pub mod id;
pub mod listeners;
pub mod restart;
pub mod seats;
pub mod supervisor;
pub mod sync;
pub mod time;
pub mod turn;
pub mod watchdog;

pub use handoff::{Accepted, Assignment, Counters, Handoff, HandoffConfig, HandoffFault};
pub use id::{SlotId, WorkerId};
pub use listeners::{Decision, ListenerId, Listeners};
pub use restart::{
    RestartDelay, RestartHistory, RestartPolicy, RestartPolicyError, StopOn, StopOnError,
};
pub use seats::{Seat, Seats};
pub use supervisor::{
    Action, Exit, Inconsistent, Input, NotNow, Outcome, Plan, READY_LIMIT, Reason, ReloadFault,
    ReloadPlan, Report, SlotState, SlotView, Snapshot, Supervisor, SupervisorLimits, WorkerState,
    WorkerView,
};
pub use time::Time;
pub use turn::Turn;
pub use watchdog::{Patience, Silence, Watchdog};
