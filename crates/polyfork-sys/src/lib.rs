//! The operating system as polyfork needs it, behind safe calls.
//!
//! Every `unsafe` block of the project lives in this crate; the crates above forbid it. What is here
//! decides nothing: which worker is next, when to restart or whom to tell is the business of
//! `polyfork-core` and `polyfork`.
//!
//! | module | job |
//! | --- | --- |
//! | [`spawn`] | start a process: pidfd, exact descriptors, default signals, errors told |
//! | [`channel`] | a stream socket pair that carries descriptors |
//! | [`memory`], [`futex`] | memory that several processes see, and waiting in it |
//! | [`steal`] | take back what a stuck process has not read from its channel |
//! | [`reuseport`] | one port, a listening socket per slot, and the program that picks among them |
//! | [`identity`] | accounts, and giving up what only root may |
//! | [`replace`] | another program in the place of this one, with its descriptors |
//! | [`system`] | what the machine lets us use, who died beside our children |
//! | [`note`] | the mark by which an executable says that it speaks the native dialect |
//!
//! Linux only, 64-bit only, kernel 5.11 or later (each module says what it does on older ones).

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("polyfork needs 64-bit Linux: pidfds, close_range and reuse-port programs");

pub mod channel;
mod errno;
pub mod futex;
pub mod identity;
pub mod memory;
pub mod note;
pub mod replace;
pub mod reuseport;
pub mod spawn;
pub mod steal;
pub mod system;
mod wait;
