//! The words the supervisor and its shell speak: what goes in, what comes out, and what can be looked at.
//!
//! No decision is made here; they are all in the parent module. The surprising rule for readers of [`Action`]: their order
//! within one batch is part of the meaning, so carry them out one after the other.

use std::fmt;
use std::time::Duration;

use crate::id::{SlotId, WorkerId};
use crate::restart::RestartPolicy;
use crate::time::Time;

use super::reload::{ReloadFault, ReloadPlan};

/// What a cluster is asked to be.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// How many slots. Zero is allowed: nothing runs until [`Input::Scale`] or [`Input::Fork`].
    pub workers: u32,
    /// Whether ended workers are replaced. Without it the cluster behaves as Node's own: nothing is restarted, and a worker
    /// that disconnects may live on as long as it likes.
    pub supervise: bool,
    /// How long a worker may take from its start until it is ready; without it, for ever.
    pub ready_timeout: Option<Duration>,
    /// How long a worker that was told to stop may take before it is sent SIGTERM.
    pub grace: Duration,
    /// How long after that SIGTERM it is sent SIGKILL.
    pub kill_after: Duration,
    /// How restarts wait, when a slot is given up, and after which ends it rests.
    pub restart: RestartPolicy,
    /// Whether it goes on when every slot rests, for somebody may start workers again.
    pub stay_at_rest: bool,
    /// Where the chance in restart waits comes from.
    pub seed: u64,
}

/// What can be changed of a [`Plan`] while a cluster runs.
#[derive(Clone, Debug, PartialEq)]
pub struct SupervisorLimits {
    /// As [`Plan::ready_timeout`].
    pub ready_timeout: Option<Duration>,
    /// As [`Plan::grace`].
    pub grace: Duration,
    /// As [`Plan::restart`].
    pub restart: RestartPolicy,
    /// As [`Plan::stay_at_rest`].
    pub stay_at_rest: bool,
}

impl Default for Plan {
    /// One supervised worker, no limit until it is ready, 30 s of grace and 2 s more.
    fn default() -> Plan {
        Plan {
            workers: 1,
            supervise: true,
            ready_timeout: None,
            grace: Duration::from_secs(30),
            kill_after: Duration::from_secs(2),
            restart: RestartPolicy::default(),
            stay_at_rest: false,
            seed: 0,
        }
    }
}

/// How a process ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// Somebody else collected its status.
    Unknown,
    /// It was never started: spawning it failed.
    NotStarted,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited with code {code}"),
            Exit::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "ended by {name}"),
                None => write!(f, "ended by signal {signal}"),
            },
            Exit::Unknown => f.write_str("ended, its status was collected by somebody else"),
            Exit::NotStarted => f.write_str("could not be started"),
        }
    }
}

/// Names of the signals that have the same number on every Unix.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        _ => return None,
    })
}

/// Why a worker ended, as told to people.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Reason {
    /// By itself.
    Exited(Exit),
    /// The kernel ended it for want of memory.
    OutOfMemory,
    /// It was not ready within [`Plan::ready_timeout`].
    NeverReady,
    /// It broke the rules of its channel.
    ProtocolFault,
    /// It gave no sign of life.
    Watchdog,
    /// It did not answer its probe.
    ProbeFailed,
    /// It was asked to stop.
    Asked,
    /// It left on its own request (Node's `exitedAfterDisconnect`, sd_notify's `STOPPING=1`).
    Voluntary,
    /// It was asked, or wanted, to leave and took longer than [`Plan::grace`].
    GraceExpired,
    /// Its channel closed and the process stayed.
    Disconnected,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Exited(exit) => return exit.fmt(f),
            Reason::OutOfMemory => "out of memory",
            Reason::NeverReady => "never got ready",
            Reason::ProtocolFault => "broke the rules of its channel",
            Reason::Watchdog => "gave no sign of life",
            Reason::ProbeFailed => "did not answer its probe",
            Reason::Asked => "was asked to stop",
            Reason::Voluntary => "left on its own request",
            Reason::GraceExpired => "did not stop within its grace period",
            Reason::Disconnected => "closed its channel and stayed",
        })
    }
}

/// What happened, or is wanted.
///
/// Events about a worker that is gone, or that cannot happen in its state, are ignored: they come late by nature.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Fill the slots.
    Start,
    /// The process of [`Action::Spawn`] runs.
    Spawned {
        /// Which.
        worker: WorkerId,
    },
    /// The process of [`Action::Spawn`] could not be started; there will be no [`Input::Exited`].
    SpawnFailed {
        /// Which.
        worker: WorkerId,
        /// Whether it may work in a moment (EAGAIN, ENOMEM, EMFILE). Retried and counted either way.
        transient: bool,
    },
    /// The worker's program has connected to its channel.
    Online {
        /// Which.
        worker: WorkerId,
    },
    /// The worker can take connections.
    Ready {
        /// Which.
        worker: WorkerId,
    },
    /// The worker said that it is going.
    Leaving {
        /// Which.
        worker: WorkerId,
    },
    /// The worker's channel ended although the process lives.
    ChannelClosed {
        /// Which.
        worker: WorkerId,
    },
    /// The process ended. To be fed only after its channel was read to the end.
    Exited {
        /// Which.
        worker: WorkerId,
        /// How.
        exit: Exit,
        /// Whether the kernel's out-of-memory killer did it.
        out_of_memory: bool,
    },
    /// The worker must be replaced now, for this reason ([`Reason::ProtocolFault`], [`Reason::Watchdog`]).
    Unfit {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: Reason,
    },
    /// The queue of a suspended worker is empty (or the shell gave up waiting): it may be told to stop.
    Drained {
        /// Which.
        worker: WorkerId,
    },
    /// Have this many slots.
    Scale {
        /// How many.
        workers: u32,
    },
    /// One slot more.
    AddOne,
    /// One slot less, but never the last.
    RemoveOne,
    /// One more worker that is not part of the number of slots and is not replaced: Node's `cluster.fork`.
    Fork,
    /// Let this worker finish and leave; a supervised one is replaced.
    Disconnect {
        /// Which.
        worker: WorkerId,
    },
    /// Send this worker a signal; a supervised one that ends by it is replaced.
    Kill {
        /// Which.
        worker: WorkerId,
        /// What.
        signal: i32,
    },
    /// Start this slot's worker anew, forgiving its past: also the way out of [`SlotState::Failed`].
    Restart {
        /// Which.
        slot: SlotId,
    },
    /// Bring the next generation up and let it take over. Ignored while another reload is under way
    /// ([`super::Supervisor::reloading`]) and without supervision.
    Reload(ReloadPlan),
    /// Replace the worker of this slot, which serves, by one that is ready first. Ignored while a reload or another
    /// renewal is under way, and when no worker serves there: ask again later.
    Renew {
        /// Which.
        slot: SlotId,
    },
    /// Another grace period from now on, longer or shorter. It counts from now for workers that stop already.
    Grace {
        /// Instead of [`Plan::grace`].
        grace: Duration,
    },
    /// The worker, which may serve, must be replaced for this reason, and it is better to have its successor first: as
    /// [`Input::Renew`], once whatever is under way is over. Where that cannot be done, when its turn does not come in time, or
    /// when the successor does not come up, as [`Input::Unfit`].
    Replace {
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: Reason,
    },
    /// The worker needs so much longer from now for what has a limit: getting ready, or stopping (`EXTEND_TIMEOUT_USEC` of
    /// sd_notify). Never makes a limit shorter.
    Extend {
        /// Which.
        worker: WorkerId,
        /// How much.
        by: Duration,
    },
    /// Let every worker finish and leave. A second one means now.
    Stop,
    /// End every worker now.
    StopNow,
    /// The time of [`super::Supervisor::deadline`] has come.
    Tick,
}

/// What the shell is to do, in this order.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a process; answer [`Input::Spawned`] or [`Input::SpawnFailed`].
    Spawn {
        /// In this slot.
        slot: SlotId,
        /// Under this name.
        worker: WorkerId,
        /// With what this generation is started with.
        generation: u32,
        /// Whether it is to take over from another worker of its slot, see [`Input::Reload`] and [`Input::Renew`].
        candidate: bool,
        /// 1 at first, one more for each restart since the slot last held a stable worker.
        attempt: u32,
    },
    /// Connections may go to this worker from now.
    Admit {
        /// Which.
        worker: WorkerId,
    },
    /// No new connection goes to this worker from now. At most once per worker, before anything that ends it. Answer
    /// [`Input::Drained`] when nothing waits for it any more.
    Suspend {
        /// Which.
        worker: WorkerId,
    },
    /// Ask the worker to stop, in the way of its dialect.
    TellStop {
        /// Which.
        worker: WorkerId,
        /// How long it will be given.
        grace: Duration,
    },
    /// Send SIGTERM.
    Terminate {
        /// Which.
        worker: WorkerId,
    },
    /// Send SIGKILL.
    Kill {
        /// Which.
        worker: WorkerId,
    },
    /// Send a signal that was asked for.
    Signal {
        /// Which.
        worker: WorkerId,
        /// What.
        signal: i32,
    },
    /// The worker is no more; free everything that was its own. Exactly once for every [`Action::Spawn`].
    Gone {
        /// Where it was.
        slot: SlotId,
        /// Which.
        worker: WorkerId,
        /// How it ended.
        exit: Exit,
        /// Why.
        reason: Reason,
        /// From its start to its end.
        lived: Duration,
        /// When its successor starts. Nothing when there is none to come: it runs already, or nobody is to replace it.
        will_restart: Option<Duration>,
    },
    /// The slot was restarted too often and rests.
    SlotFailed {
        /// Which.
        slot: SlotId,
        /// How many restarts were in the window.
        restarts: u32,
        /// How long the window is.
        window: Duration,
    },
    /// The slot's worker ended in a way after which there is to be no other ([`RestartPolicy::stop_on`]).
    SlotRests {
        /// Which.
        slot: SlotId,
        /// How it ended.
        exit: Exit,
    },
    /// The slot is no longer part of the cluster and its last worker is gone.
    SlotRetired {
        /// Which.
        slot: SlotId,
    },
    /// A batch of the new generation has taken over; the workers before it are being told to stop.
    Switched {
        /// The new generation.
        generation: u32,
        /// How many of its workers have taken over by now.
        workers: u32,
    },
    /// A reload is done: every slot has a worker of the new generation, and the ones before are gone.
    Reloaded {
        /// The new generation, which later workers belong to.
        generation: u32,
        /// How many workers took over.
        replaced: u32,
    },
    /// A reload ended early. Its candidates are being stopped; who served goes on serving.
    ReloadFailed {
        /// The generation that did not make it.
        generation: u32,
        /// How many of its workers have taken over and stay.
        replaced: u32,
        /// Why.
        fault: ReloadFault,
    },
    /// A slot has a new worker; the one before is being told to stop.
    Renewed {
        /// Which.
        slot: SlotId,
    },
    /// A slot keeps its worker, as the one that should have taken over did not come up.
    RenewalFailed {
        /// Which.
        slot: SlotId,
        /// Why.
        fault: ReloadFault,
    },
    /// Something people may want to read.
    Report(Report),
    /// It is over. The last action ever.
    Finished {
        /// How it ended.
        outcome: Outcome,
    },
}

/// What happened besides, for people.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Report {
    /// A worker that still runs will be replaced.
    Replacing {
        /// Where.
        slot: SlotId,
        /// Which.
        worker: WorkerId,
        /// Why.
        reason: Reason,
        /// When its successor starts.
        after: Duration,
    },
    /// A process could not be started.
    SpawnFailed {
        /// Where.
        slot: SlotId,
        /// Which.
        worker: WorkerId,
        /// Whether it may work in a moment.
        transient: bool,
    },
    /// A worker did not leave within its grace period and is sent SIGTERM.
    GraceExpired {
        /// Which.
        worker: WorkerId,
    },
    /// Too many workers are still leaving this slot: the oldest one is sent SIGTERM before its time.
    TooManyLeaving {
        /// Where.
        slot: SlotId,
        /// Which.
        worker: WorkerId,
    },
    /// A worker is still there long after SIGKILL; the kernel holds it.
    Unkillable {
        /// Which.
        worker: WorkerId,
    },
    /// So many more slots cannot be had: [`super::MAX_SLOTS`] is the most.
    TooManySlots {
        /// How many more were wanted.
        asked: u32,
        /// How many more there are.
        given: u32,
    },
    /// The last slot stays.
    LastSlot,
    /// A wish came while the cluster stops, and is ignored.
    IgnoredWhileStopping,
}

/// How it ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Stopped,
    /// Every slot rests: its worker ended in a way after which there is to be no other ([`RestartPolicy::stop_on`]).
    AtRest {
        /// Why the last worker ended.
        last: Reason,
        /// Whether each one exited with a code that was named, or with 0.
        clean: bool,
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

/// Where a worker is in its life. It only moves down this list.
#[derive(
    Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum WorkerState {
    /// [`Action::Spawn`] was given, its answer is awaited.
    Spawning,
    /// The process runs and is not ready.
    Starting,
    /// It is ready and belongs to a generation that has not taken over: it gets no connections yet.
    Trial,
    /// It takes connections.
    Ready,
    /// It gets no new ones; those that wait for it are awaited.
    Suspended,
    /// It finishes what it serves.
    Stopping,
    /// It was sent SIGTERM.
    Terminating,
    /// It was sent SIGKILL.
    Killed,
}

/// What can be known of a worker that is not gone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WorkerView {
    /// Its name.
    pub id: WorkerId,
    /// Where it runs.
    pub slot: SlotId,
    /// Which generation it belongs to, from 1.
    pub generation: u32,
    /// Whether it is to take over from another worker of its slot and has not yet.
    pub candidate: bool,
    /// Where it is in its life.
    pub state: WorkerState,
    /// Whether its program connected to the channel.
    pub online: bool,
    /// When [`Action::Spawn`] was given.
    pub started: Time,
    /// When it was admitted, if it was.
    pub ready: Option<Time>,
    /// Why it is ending, if it is and that is known.
    pub reason: Option<Reason>,
}

/// What a slot does.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing runs and nothing is to start.
    Empty,
    /// A worker will be started.
    Waiting {
        /// At this time.
        until: Time,
    },
    /// A worker is on its way.
    Starting,
    /// A worker takes connections.
    Ready,
    /// Only workers that are leaving.
    Draining,
    /// Restarted too often; rests until [`Input::Restart`].
    Failed,
    /// Its worker ended in a way after which there is to be no other; rests until [`Input::Restart`] or a reload.
    Resting,
}

/// What can be known of a slot.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SlotView<'a> {
    /// Which.
    pub id: SlotId,
    /// What it does.
    pub state: SlotState,
    /// The worker that takes connections here, or will.
    pub current: Option<WorkerId>,
    /// The worker of the next generation, during a reload.
    pub candidate: Option<WorkerId>,
    /// The ones that still finish, oldest first.
    pub leaving: &'a [WorkerId],
    /// What its next worker belongs to.
    pub generation: u32,
    /// Whether an ended worker is replaced here.
    pub supervised: bool,
    /// Whether the slot is part of the cluster; when not, it goes with its last worker.
    pub wanted: bool,
    /// Restarts since the slot exists.
    pub restarts: u32,
    /// Why its latest worker ended.
    pub last_reason: Option<Reason>,
}
