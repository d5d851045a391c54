//! Who this process is, and the way from root to somebody less powerful, for a primary that binds low ports.
//!
//! Thin: the calls are in `polyfork_sys::identity`. The surprising rule: change first, bind afterwards. The kernel lets only
//! sockets of one user share a port, so a group that root has begun could not be joined later.

pub use polyfork_sys::identity::{
    Account, ChangeError, Keep, account, become_user, group, keep_over_exec, may_bind_low_ports,
    may_load_programs,
};

/// Loads the programs by which the kernel takes exact turns for so many addresses, while this process still may: a cluster
/// takes one of them when it may load none of its own.
///
/// # Errors
/// Why the kernel takes none, in words. A cluster goes on without, and tells it where it listens.
pub fn load_in_advance(addresses: usize) -> Result<(), String> {
    polyfork_sys::reuseport::load_in_advance(addresses).map_err(|error| error.to_string())
}
