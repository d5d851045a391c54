//! A primary that puts another binary in its own place: everything around the loop comes to rest, all that it knows is
//! written down, and the next image of this process goes on from there.
//!
//! [`Cluster::freeze`] gives the state, [`exec`] leaves it to a binary, [`Cluster::resume`] is what that one
//! calls. Whether the binary is any good, and who is to be told, is left to the caller (the command, in `polyfork-cli`).
//! Each part of the primary writes down what is its own, in a file called `carry` beside it; the list of descriptors is in
//! `bag`.
//!
//! What happens meanwhile: workers that accept for themselves notice nothing. What they write to the primary, and connections
//! that it would hand over, wait in the kernel. A worker that ends is seen when the loop runs again, for it stays a child of
//! the same process.
//!
//! The rule that surprises: going on after a failure and going on in another image are one and the same. A reader that rests
//! gives back what it had read and not yet understood; who starts it again does not care in which image that is.
//!
//! Reference: execveat(2), clock_gettime(2) for what survives exec.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use polyfork_core::{Inconsistent, NotNow};
pub use polyfork_wire::state::StateError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::oneshot;

pub use bag::{Descriptors, Name, Packing, Unpacking};

use super::Cluster;
use super::event::{Event, Notice};
use super::primary::{Command, Primary};
use super::settings::Settings;

mod bag;

/// How long everything around the loop may take to come to rest. What takes longer waits for a reader of output.
pub(crate) const REST_LIMIT: Duration = Duration::from_secs(2);

/// Why a cluster cannot be carried to another image now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// Something is under way that has to be over first.
    #[error("{0}; wait for its end")]
    NotNow(#[from] NotNow),
    /// Something that belongs to the memory of this process.
    #[error("{0} cannot be carried over")]
    NotCarried(String),
    /// Worker output is not taken, or a task did not come to rest.
    #[error("not everything came to rest within {} s: is worker output not being read?", REST_LIMIT.as_secs())]
    Busy,
    /// It cannot be written down.
    #[error("cannot write the state down: {0}")]
    Write(String),
    /// A descriptor cannot be looked at.
    #[error("cannot look at a descriptor: {0}")]
    Descriptor(#[from] std::io::Error),
    /// The cluster has ended.
    #[error("the cluster has ended")]
    Ended,
}

/// Why a cluster cannot go on from a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// It is none, or another release's, or damaged.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its parts do not fit each other.
    #[error(transparent)]
    Inconsistent(#[from] Inconsistent),
    /// A descriptor is not there, or is not what it was.
    #[error("{0}")]
    Descriptor(String),
    /// The system's, while it is set up again.
    #[error("cannot go on: {0}")]
    System(#[from] std::io::Error),
}

impl ResumeError {
    pub(crate) fn inside(what: impl Into<String>) -> ResumeError {
        ResumeError::State(StateError::Inside(what.into()))
    }
}

/// A moment on the monotonic clock, which goes on when one image of a process follows another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub Instant);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        instant::serialize(&self.0, to)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        instant::deserialize(from).map(Moment)
    }
}

/// For `#[serde(with = ...)]`: an [`Instant`] that means the same moment in the next image of this process.
pub mod instant {
    use super::{Deserialize, Deserializer, Duration, Instant, Serialize, Serializer};

    /// As the time since the clock's own origin.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(at: &Instant, to: S) -> Result<S::Ok, S::Error> {
        let (clock, now) = (polyfork_sys::system::now_monotonic(), Instant::now());
        let since = match at.checked_duration_since(now) {
            Some(ahead) => clock.saturating_add(ahead),
            None => clock.saturating_sub(now.duration_since(*at)),
        };
        since.serialize(to)
    }

    /// Back again.
    ///
    /// # Errors
    /// Those of the deserializer, and a moment that cannot be represented.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Instant, D::Error> {
        let since = Duration::deserialize(from)?;
        let (clock, now) = (polyfork_sys::system::now_monotonic(), Instant::now());
        let at = match since.checked_sub(clock) {
            Some(ahead) => now.checked_add(ahead),
            None => now.checked_sub(clock.saturating_sub(since)),
        };
        at.ok_or_else(|| serde::de::Error::custom("a moment beyond the clock"))
    }
}

/// A cluster at rest. It goes on when this is dropped.
#[derive(Debug)]
pub struct Frozen {
    /// All that it knows. For [`Cluster::resume`], by way of whatever else the caller has to say.
    pub state: Vec<u8>,
    /// The list of descriptors so far; the caller may add its own.
    pub packing: Packing,
    pub(crate) _goes_on: oneshot::Sender<()>,
}

impl Cluster {
    /// Brings the cluster to rest and writes down all that it knows. Workers serve on; nothing is decided, started or
    /// handed over until the value is dropped.
    ///
    /// `packing` is the list of descriptors to begin with.
    ///
    /// # Errors
    /// [`FreezeError`]; the cluster goes on as if nothing had been asked.
    pub async fn freeze(&self, packing: Packing) -> Result<Frozen, FreezeError> {
        let (reply, answer) = oneshot::channel();
        self.command(Command::Freeze { packing, reply }).await;
        answer.await.map_err(|_| FreezeError::Ended)?
    }

    /// Tells everybody who listens to its events something that it does not know of itself.
    pub fn remark(&self, notice: Notice) {
        // Nobody has to listen.
        let _ = self.events.send(Event::Notice(notice));
    }

    /// How many events somebody who listens has not seen yet.
    pub fn untold(&self) -> usize {
        self.events.len()
    }

    /// Whether something was asked of the cluster that its loop has not seen yet.
    pub fn is_asked(&self) -> bool {
        self.commands.capacity() < self.commands.max_capacity()
    }

    /// Goes on with the cluster that another image of this process has frozen. Must be called inside a tokio runtime.
    ///
    /// `anew` sets what no state can hold: where the output of workers goes ([`Settings::output`]; what they have written
    /// meanwhile comes first), and [`Settings::reload_from`].
    ///
    /// # Errors
    /// [`ResumeError`].
    pub fn resume(
        state: &[u8],
        descriptors: &mut Unpacking,
        anew: impl FnOnce(Settings) -> Settings,
    ) -> Result<Cluster, ResumeError> {
        Primary::wake(read(state)?, descriptors, anew).map(Cluster::of)
    }

    /// Whether a state could be gone on with, as far as that can be told without its descriptors.
    ///
    /// # Errors
    /// [`ResumeError`].
    pub fn check_state(state: &[u8]) -> Result<(), ResumeError> {
        read(state)?.check()
    }
}

fn read(state: &[u8]) -> Result<super::primary::State, ResumeError> {
    let (state, rest) =
        postcard::take_from_bytes(state).map_err(|error| ResumeError::inside(error.to_string()))?;
    match rest {
        [] => Ok(state),
        _ => Err(ResumeError::inside("there is more than there should be")),
    }
}

/// Signals wait while this lives, so that none is lost between two images.
#[derive(Debug)]
pub struct SignalsHeld(
    #[expect(dead_code, reason = "for its drop")] polyfork_sys::replace::SignalsHeld,
);

/// Holds all signals of this thread, and of threads that it starts meanwhile.
///
/// # Errors
/// None is expected.
pub fn hold_signals() -> std::io::Result<SignalsHeld> {
    polyfork_sys::replace::hold_signals().map(SignalsHeld)
}

/// Lets signals in that the image before this one held. On the main thread, once they are handled.
///
/// # Errors
/// None is expected.
pub fn release_signals() -> std::io::Result<()> {
    polyfork_sys::replace::release_signals()
}

/// Puts the program that is open as `binary` in the place of this one, with this environment and `extra` on top. Returns
/// only if that failed; nothing has changed then.
pub fn exec(
    binary: BorrowedFd<'_>,
    argv: &[OsString],
    extra: &[(OsString, OsString)],
    list: &Descriptors,
    also: &[OwnedFd],
) -> std::io::Error {
    let replaced = |key: &OsString| extra.iter().any(|(name, _)| name == key);
    let mut env: Vec<_> = std::env::vars_os().filter(|(key, _)| !replaced(key)).collect();
    env.extend(extra.iter().cloned());
    let also: Vec<_> = also.iter().map(AsFd::as_fd).collect();
    polyfork_sys::replace::exec_keeping(
        binary,
        argv,
        &env,
        &also,
        &list.numbers().collect::<Vec<_>>(),
    )
}

/// The state that the image before this one left: its sealed content. `number` is the descriptor it is open under.
///
/// # Errors
/// When it is not sealed, or too long.
pub fn read_sealed(number: i32) -> std::io::Result<Vec<u8>> {
    polyfork_sys::replace::read_sealed(number, polyfork_wire::state::LONGEST + 64)
}

/// A sealed memory file with this content.
///
/// # Errors
/// The system's.
pub fn seal(content: &[u8]) -> std::io::Result<OwnedFd> {
    polyfork_sys::replace::seal(content)
}

pub use polyfork_wire::env::POLYFORK_STATE as STATE_VARIABLE;
pub use polyfork_wire::state::{VERSION as STATE_VERSION, open as open_state, seal as seal_state};

/// Collects a child that the image before this one has started, when it ends.
///
/// # Errors
/// When it is no child of this process. Those of the event loop.
pub async fn collect(pid: u32) -> std::io::Result<()> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let none = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(none)?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    let pidfd = super::register::register(pidfd, tokio::io::Interest::READABLE)?;
    loop {
        let mut ready = pidfd.readable().await?;
        match polyfork_sys::spawn::try_wait(pidfd.get_ref().as_fd())? {
            Some(_) => return Ok(()),
            None => ready.clear_ready(),
        }
    }
}
