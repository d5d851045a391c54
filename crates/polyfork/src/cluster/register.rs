//! The one place where a descriptor is given to the event loop.
//!
//! tokio deprecates its safe constructors of `AsyncFd`, because they take types that may close or change
//! their descriptor while it is registered. An `OwnedFd` does neither: it stays open and the same until it is
//! dropped, which `AsyncFd` does after it has deregistered it. So for this one type the safe constructor is
//! sound, and this crate stays free of unsafe code.
//!
//! Reference: tokio pull request 8587.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `fd`, which must be non-blocking. Must be called inside a tokio runtime with I/O enabled.
///
/// # Errors
/// Those of epoll_ctl(2): no memory, too many watches, a kind of file that cannot be waited for.
#[expect(deprecated, reason = "sound for `OwnedFd`, see the header")]
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
