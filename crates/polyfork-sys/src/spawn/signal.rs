//! Signals by number through a pidfd: to the process, or to the group it leads.
//!
//! Numbers, because rustix's type has no safe way to name the real-time signals. The rule that surprises: a group
//! outlives its leader, and its number stays taken as long; so the pidfd of a collected leader still names the
//! group, and never a later one of the same number.
//!
//! References: pidfd_send_signal(2), signal(7).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The highest signal number of Linux.
pub const MAX_SIGNAL: i32 = 64;
/// Kept by the C library for itself; nobody outside may send them.
const RESERVED: [i32; 2] = [32, 33];
/// `PIDFD_SIGNAL_PROCESS_GROUP` of the kernel (6.9), not yet in the C library's headers.
const PROCESS_GROUP: u32 = 1 << 2;

/// Sends signal `number` to the process behind `pidfd`. Number 0 sends nothing and asks whether it is there; a
/// process that has ended and was not collected is.
///
/// # Errors
///
/// `ESRCH`: it has ended and was collected. `EPERM`: not ours to signal. `EINVAL`: no such signal, or one that the C
/// library keeps for itself (32, 33).
pub fn send_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    send(pidfd, number, 0)
}

/// Sends signal `number` to every process of the group that the process behind `pidfd` leads or led.
///
/// # Errors
///
/// `ESRCH`: no such group, or nobody in it any more. `EPERM`: nobody in it may be signalled by us. `EINVAL`: no such
/// signal, or a kernel before 6.9.
pub fn send_group_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    send(pidfd, number, PROCESS_GROUP)
}

fn send(pidfd: BorrowedFd<'_>, number: i32, flags: u32) -> io::Result<()> {
    if !(0..=MAX_SIGNAL).contains(&number) || RESERVED.contains(&number) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let info = std::ptr::null::<libc::siginfo_t>();
    let fd = pidfd.as_raw_fd();
    // SAFETY: a borrowed descriptor is open over the call, and a null info makes the kernel fill in its own; the
    // numbers whose delivery could confuse this process' own C library are refused above.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, number, info, flags) };
    if sent == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
