//! One contender of `cargo xtask bench spawn`: starts `true` again and again, one after the other.
//!
//! `spawn_bench HOW SHAPE MIB MILLISECONDS`, where HOW is `polyfork`, `std` or `std-pre-exec` and SHAPE is
//! `plain` (standard descriptors on /dev/null) or `channel` (a socket pair on descriptor 3, five pipes on 0-2, 4
//! and 5). MIB is how much memory this process has touched before it starts. One line of JSON comes
//! out: how many processes in how many seconds, and how long the call that starts one took (median).
//!
//! It stands here because `pre_exec` is unsafe, and unsafe code is in this crate only.

#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a rival, and its result")]

use std::error::Error;
use std::io::PipeWriter;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

const PROGRAM: &str = "/bin/true";
const PAGE_BYTES: usize = 4096;

/// The descriptors of one child of shape `channel`: ours stay open until it has ended.
struct Table {
    ours: (UnixStream, Vec<PipeWriter>),
    theirs: Vec<OwnedFd>,
}

impl Table {
    /// Six descriptors: 0 to 2, the channel, and two more.
    fn new() -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut table = Self { ours: (ours, Vec::new()), theirs: Vec::new() };
        for slot in 0..6 {
            if slot == 3 {
                table.theirs.push(theirs.try_clone()?.into());
                continue;
            }
            let (reader, writer) = std::io::pipe()?;
            table.theirs.push(reader.into());
            table.ours.1.push(writer);
        }
        Ok(table)
    }
}

fn polyfork(channel: bool) -> Result<Duration, Box<dyn Error>> {
    let mut command = polyfork_sys::spawn::Command::new(PROGRAM);
    let mut ours = None;
    if channel {
        let table = Table::new()?;
        for (slot, fd) in (0..).zip(table.theirs) {
            command.fd(slot, fd);
        }
        ours = Some(table.ours);
    } else {
        command.null(0).null(1).null(2);
    }
    let start = Instant::now();
    let child = command.spawn()?;
    let blocked = start.elapsed();
    child.wait()?;
    drop(ours);
    Ok(blocked)
}

/// A copy that is in nobody's way.
fn copy_above(fd: i32) -> i32 {
    // SAFETY: fcntl(2) with F_DUPFD_CLOEXEC takes any number and touches no memory.
    unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100) }
}

fn put(copy: i32, target: i32) -> i32 {
    // SAFETY: dup2(2) touches no memory; in a child that is about to exec nobody owns the target.
    unsafe { libc::dup2(copy, target) }
}

fn std(channel: bool, pre_exec: bool) -> Result<Duration, Box<dyn Error>> {
    let mut command = std::process::Command::new(PROGRAM);
    let mut ours = None;
    if channel {
        let mut table = Table::new()?;
        // What std has no words for is put in place between fork and exec.
        let extra: Vec<OwnedFd> = table.theirs.split_off(3);
        let mut standard = table.theirs.into_iter();
        let mut next = || standard.next().map_or_else(Stdio::null, Stdio::from);
        command.stdin(next()).stdout(next()).stderr(next());
        let place = move || {
            let mut high = [0; 3];
            for (copy, fd) in high.iter_mut().zip(&extra) {
                *copy = copy_above(fd.as_raw_fd());
            }
            for (target, copy) in (3..).zip(high) {
                if put(copy, target) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only, on descriptors that it owns.
        unsafe { command.pre_exec(place) };
        ours = Some(table.ours);
    } else {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if pre_exec {
            // SAFETY: the closure does nothing.
            unsafe { command.pre_exec(|| Ok(())) };
        }
    }
    let start = Instant::now();
    let mut child = command.spawn()?;
    let blocked = start.elapsed();
    child.wait()?;
    drop(ours);
    Ok(blocked)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [how, shape, mib, limit] = args.as_slice() else {
        return Err("usage: spawn_bench HOW SHAPE MIB MILLISECONDS".into());
    };
    let channel = match shape.as_str() {
        "plain" => false,
        "channel" => true,
        other => return Err(format!("no shape \"{other}\": plain or channel").into()),
    };
    let once: Box<dyn Fn() -> Result<Duration, Box<dyn Error>>> = match how.as_str() {
        "polyfork" => Box::new(move || polyfork(channel)),
        "std" if channel => return Err("std has no words for descriptors above 2".into()),
        "std" => Box::new(|| std(false, false)),
        "std-pre-exec" => Box::new(move || std(channel, true)),
        other => return Err(format!("no \"{other}\": polyfork, std or std-pre-exec").into()),
    };
    let mut memory = vec![0_u8; mib.parse::<usize>()? << 20];
    memory.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 1);
    let limit = Duration::from_millis(limit.parse()?);
    once()?;
    let mut blocked = Vec::new();
    let start = Instant::now();
    while start.elapsed() < limit {
        blocked.push(once()?);
    }
    let seconds = start.elapsed().as_secs_f64();
    blocked.sort_unstable();
    std::hint::black_box(&memory);
    println!(
        "{{\"spawns\":{},\"seconds\":{seconds},\"blocked_us\":{}}}",
        blocked.len(),
        blocked[blocked.len() / 2].as_micros()
    );
    Ok(())
}
