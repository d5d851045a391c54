//! What a primary tells: Node's events with Node's names, and a few of its own.
//!
//! Order for one worker is Node's: `fork`, `online`, `listening`..., then `disconnect` and `exit` in either
//! order. An [`Events`] that is not read loses the oldest events, and says how many.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use polyfork_core::Reason;
use polyfork_wire::node::advanced::{self, Value};
use polyfork_wire::node::message::UserMessage;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::broadcast;

use super::reload::{ReloadError, ReloadReport};
use super::settings::{Address, Dialect, Policy};

/// Something that happened in a cluster.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// The settings are fixed (Node: `setup`).
    Setup {
        /// How many workers will be started.
        workers: u32,
        /// How workers are spoken to.
        dialect: Dialect,
    },
    /// A worker process was started (Node: `fork`).
    Fork(Who),
    /// A worker runs: its channel works (Node: `online`).
    Online(Who),
    /// A worker listens on an address (Node: `listening`). The address is as bound, with the real port.
    Listening {
        /// The worker.
        who: Who,
        /// The address it listens on.
        address: Address,
        /// How connections reach it.
        by: Arc<Via>,
    },
    /// A worker is ready and gets connections from now on.
    Ready(Who),
    /// Every slot has a ready worker. Told when it becomes true, so again after each repair; a reload does not interrupt it.
    AllReady {
        /// How many slots have one.
        workers: u32,
    },
    /// A worker sent a message (Node: `message`).
    Message {
        /// The worker.
        who: Who,
        /// What it sent.
        message: Message,
    },
    /// A worker gets no new connections and finishes what it has.
    Draining(Who),
    /// A worker's channel closed (Node: `disconnect`).
    Disconnect(Who),
    /// A worker ended (Node: `exit`).
    Exit {
        /// The worker.
        who: Who,
        /// Its exit code; `None` when a signal ended it or nobody could tell.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
        /// Why it ended.
        reason: Reason,
        /// How long it lived.
        lived: Duration,
        /// True when it left on request, its own or the primary's (Node: `exitedAfterDisconnect`).
        voluntary: bool,
        /// When its replacement starts; `None` if there will be none.
        restart_in: Option<Duration>,
    },
    /// A slot was given up: its workers died too often.
    SlotFailed {
        /// The slot.
        slot: u32,
        /// How many restarts within `window`.
        restarts: u32,
        /// The window.
        window: Duration,
    },
    /// A slot rests: its worker ended in a way after which there is to be no other
    /// ([`RestartPolicy::stop_on`](super::RestartPolicy::stop_on)).
    SlotRests {
        /// The slot.
        slot: u32,
        /// The worker's exit code; `None` when a signal ended it or nobody could tell.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
    /// A slot was taken out of service (fewer workers are wanted).
    SlotRetired {
        /// The slot.
        slot: u32,
    },
    /// The primary opened a listening socket.
    Bound {
        /// Where, with the real port.
        address: Address,
        /// How connections will reach workers.
        by: Arc<Via>,
    },
    /// The primary closed a listening socket that no worker uses any more.
    Closed {
        /// Where.
        address: Address,
    },
    /// The primary could not open a socket that a worker asked for; the worker was told.
    BindFailed {
        /// The worker, unless the primary itself wanted it.
        who: Option<Who>,
        /// Where.
        address: Address,
        /// The system's error.
        error: Arc<std::io::Error>,
    },
    /// A worker told its state in words (`STATUS=` of sd_notify).
    Status {
        /// The worker.
        who: Who,
        /// The text, as the worker sent it.
        text: String,
    },
    /// A worker has given no sign of life for half of what [`Settings::watchdog`](super::Settings::watchdog) allows: its event
    /// loop is blocked, or it is stopped. If it stays so it is replaced.
    Blocked {
        /// The worker.
        who: Who,
        /// Since its last sign of life.
        silent: Duration,
    },
    /// A worker that was blocked goes on.
    Unblocked {
        /// The worker.
        who: Who,
        /// How long it had been silent.
        silent: Duration,
    },
    /// A reload began: a new generation is being started.
    Reloading {
        /// Its number.
        generation: u32,
    },
    /// New workers have taken over; the ones before are told to stop.
    Switched {
        /// The new generation.
        generation: u32,
        /// How many of its workers have taken over by now.
        workers: u32,
    },
    /// A reload is done, and what it cost.
    Reloaded(ReloadReport),
    /// A reload ended early; workers that served go on serving.
    ReloadFailed {
        /// The generation that did not make it.
        generation: u32,
        /// Why.
        error: ReloadError,
    },
    /// The cluster was asked to stop: workers get nothing new and finish what they have. Told once.
    Stopping,
    /// Something a person should know.
    Notice(Notice),
    /// The cluster has ended; nothing follows.
    End(Outcome),
    /// This receiver was too slow: so many events were dropped before this one.
    Lagged(u64),
}

/// How a cluster ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Outcome {
    /// As asked; every worker left by itself, or was ended after its grace period.
    Stopped,
    /// Every slot rests: its worker ended in a way after which there is to be no other
    /// ([`RestartPolicy::stop_on`](super::RestartPolicy::stop_on)).
    AtRest {
        /// Why the last worker ended.
        last: Reason,
        /// Whether each one exited with a code that was named, or with 0.
        clean: bool,
    },
    /// At once, as asked by a second signal or [`super::Cluster::stop_now`].
    Forced,
    /// No worker ever served, because an address that the program wants cannot be had.
    BindFailed {
        /// The address.
        address: Address,
        /// The system's error.
        error: Arc<std::io::Error>,
    },
    /// Every slot was restarted too often, after the cluster had served.
    AllFailed {
        /// Why the last worker ended.
        last: Reason,
    },
    /// Every slot was restarted too often and no worker ever became ready.
    NeverReady {
        /// Why the very first worker ended: usually the root of the others.
        first: Reason,
        /// Why the last one did.
        last: Reason,
    },
}

/// Which worker an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Who {
    /// Stable position, from 1.
    pub slot: u32,
    /// Id, from 1, never used twice (Node: `worker.id`).
    pub worker: u64,
    /// Process id; 0 if the process could not be started.
    pub pid: u32,
}

/// How connections to an address reach workers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Via {
    /// The policy in force.
    pub policy: Policy,
    /// The mechanism in force.
    pub mechanism: Carried,
    /// Why this mechanism: one line for people.
    pub why: String,
}

/// The mechanism that carries a policy out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Carried {
    /// A listening socket per slot; an eBPF program takes exact turns.
    KernelExact,
    /// A listening socket per slot; a classic BPF program picks a live one at random.
    KernelRandom,
    /// The primary accepts and passes connections on, in exact turns.
    Handoff,
    /// One socket that all workers share.
    SharedSocket,
    /// The worker bound for itself; the kernel spreads by its hash.
    OwnSocket,
}

/// A remark of the primary.
#[derive(Debug, Clone)]
pub struct Notice {
    /// A stable word for programs, e.g. `fallback`, `accept-paused`, `protocol-fault`.
    pub code: &'static str,
    /// The worker it is about, if any.
    pub who: Option<Who>,
    /// One line for people: what happened, to what, what follows.
    pub text: String,
}

/// A message between primary and worker, as it travelled.
#[derive(Clone, PartialEq)]
pub struct Message(pub(crate) Encoded);

#[derive(Clone, PartialEq)]
pub(crate) enum Encoded {
    Json(Arc<str>),
    Advanced(Arc<Value>),
    Postcard(Arc<[u8]>),
}

impl From<UserMessage> for Encoded {
    fn from(message: UserMessage) -> Encoded {
        Encoded::Json(message.as_str().into())
    }
}

impl From<Value> for Encoded {
    fn from(value: Value) -> Encoded {
        Encoded::Advanced(Arc::new(value))
    }
}

/// Why a message is not of the expected type.
#[derive(Debug, thiserror::Error)]
#[error("message is not of the expected type: {0}")]
pub struct DecodeError(String);

impl Message {
    /// Reads the message as a value of type `T`: from JSON or V8's serialization when it came over Node's
    /// channel, from postcard when both ends are this crate.
    ///
    /// # Errors
    /// When the message does not have that shape.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        match &self.0 {
            Encoded::Json(text) => {
                serde_json::from_str(text).map_err(|e| DecodeError(e.to_string()))
            }
            Encoded::Advanced(value) => {
                advanced::from_value(Value::clone(value)).map_err(|e| DecodeError(e.to_string()))
            }
            Encoded::Postcard(bytes) => {
                postcard::from_bytes(bytes).map_err(|e| DecodeError(e.to_string()))
            }
        }
    }

    /// The JSON text, if the message came over Node's channel.
    pub fn json(&self) -> Option<&str> {
        match &self.0 {
            Encoded::Json(text) => Some(text),
            Encoded::Advanced(_) | Encoded::Postcard(_) => None,
        }
    }

    /// The value, if the message came over Node's channel in V8's serialization
    /// ([`Settings::serialization`](super::Settings::serialization)): with maps, dates, big integers and cycles.
    pub fn value(&self) -> Option<&Value> {
        match &self.0 {
            Encoded::Advanced(value) => Some(value),
            Encoded::Json(_) | Encoded::Postcard(_) => None,
        }
    }

    pub(crate) fn to_advanced<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EncodeError> {
        advanced::to_frame(value).map_err(|e| EncodeError(e.to_string()))
    }

    pub(crate) fn postcard<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, EncodeError> {
        postcard::to_stdvec(value).map_err(|e| EncodeError(e.to_string()))
    }

    pub(crate) fn to_json<T: Serialize + ?Sized>(value: &T) -> Result<String, EncodeError> {
        serde_json::to_string(value).map_err(|e| EncodeError(e.to_string()))
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Encoded::Json(text) => write!(f, "Message({text})"),
            Encoded::Advanced(value) => write!(f, "Message({value:?})"),
            Encoded::Postcard(bytes) => write!(f, "Message({} bytes)", bytes.len()),
        }
    }
}

/// Why a value cannot travel.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot encode the message: {0}")]
pub struct EncodeError(pub(super) String);

/// A subscription to the events of a cluster, from the moment it was made.
#[derive(Debug)]
pub struct Events(pub(crate) broadcast::Receiver<Event>);

impl Events {
    /// The next event; `None` after [`Event::End`].
    ///
    /// Cancel safe. Waits without limit. When this subscriber fell behind by more than the buffer (1,024
    /// events), [`Event::Lagged`] says how many were dropped.
    pub async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Lagged(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Carried {
    /// One word: `kernel`, `handoff`, `shared` or `own`.
    pub fn word(self) -> &'static str {
        match self {
            Carried::KernelExact | Carried::KernelRandom => "kernel",
            Carried::Handoff => "handoff",
            Carried::SharedSocket => "shared",
            Carried::OwnSocket => "own",
        }
    }
}
