//! Many spawns at once beside threads that allocate and open sockets, and spawns from a big parent.
//!
//! The faults: a child hangs in malloc because another thread held its lock at the fork; a descriptor opened
//! at the wrong moment leaks into a child (a port stays taken by a process that knows nothing of it).
//! `POLYFORK_STRESS=20000` makes it long.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a panic or a line is the report")]

mod common;

use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use polyfork_sys::spawn::{Child, Command};

const SPAWNERS: usize = 8;

fn spawns() -> usize {
    std::env::var("POLYFORK_STRESS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000)
}

/// Opens sockets, half of them without close-on-exec as C libraries do, until told to stop.
fn open_sockets(stop: &AtomicBool) -> usize {
    let mut opened = 0;
    while !stop.load(Ordering::Relaxed) {
        let sockets: Vec<OwnedFd> =
            (0..8).map(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap().into()).collect();
        for socket in sockets.iter().step_by(2) {
            rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty()).unwrap();
        }
        opened += sockets.len();
    }
    opened
}

fn allocate(stop: &AtomicBool) {
    let mut size = 16;
    while !stop.load(Ordering::Relaxed) {
        let memory = std::hint::black_box(vec![1u8; size]);
        size = if size > 1 << 18 { 16 } else { size * 2 + usize::from(memory[0]) };
    }
}

/// Children of this process that have ended and were not collected.
fn zombies() -> usize {
    let me = std::process::id().to_string();
    let is_ours = |stat: &String| {
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.next() == Some("Z") && fields.next() == Some(&me)
    };
    let stats = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = stats.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    stats.filter(is_ours).count()
}

/// A child that no outcome of the test leaves behind.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        kill(&self.0);
    }
}

#[test]
fn no_child_hangs_and_none_has_a_foreign_descriptor() {
    let stop = Arc::new(AtomicBool::new(false));
    let noise: Vec<_> = (0..8)
        .map(|index| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                if index % 2 == 0 {
                    allocate(&stop);
                }
                open_sockets(&stop)
            })
        })
        .collect();
    let left = Arc::new(AtomicUsize::new(spawns()));
    let one = |count: &AtomicUsize| {
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
    };
    let spawners: Vec<_> = (0..SPAWNERS)
        .map(|_| {
            let left = Arc::clone(&left);
            thread::spawn(move || {
                while let Ok(number) = one(&left) {
                    let (reader, writer) = pipe();
                    let writer_number = writer.as_raw_fd();
                    let mut command = stopping_shell();
                    if number % 2 == 0 {
                        // Cloned by this thread, not by the one that starts bound children.
                        command.parent_death_signal(None);
                    }
                    command.fd(3, writer);
                    let child = Ended(command.spawn().unwrap());
                    wait_until_stopped(&child.0);
                    let fds = open_fds(child.0.pid());
                    drop(child);
                    let numbers: Vec<i32> = fds.keys().copied().collect();
                    assert_eq!(numbers, [0, 1, 2, 3], "{fds:?} (writer was {writer_number})");
                    // And the copy the child had was the only one left.
                    assert!(readable_within(std::os::fd::AsFd::as_fd(&reader), PATIENCE));
                }
            })
        })
        .collect();
    for spawner in spawners {
        spawner.join().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    // Whoever starts children elsewhere in this program collects them in an instant.
    until("no zombie is left", || zombies() == 0);
    let opened: usize = noise.into_iter().map(|thread| thread.join().unwrap()).sum();
    println!(
        "{} spawns beside {opened} sockets opened: no foreign descriptor, no hang, no zombie",
        spawns()
    );
}

/// Median time of one spawn.
fn median_spawn() -> Duration {
    let mut times: Vec<Duration> = (0..60)
        .map(|_| {
            let command = Command::new("/bin/true");
            let started = Instant::now();
            let child = command.spawn().unwrap();
            let time = started.elapsed();
            child.wait().unwrap();
            time
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn a_parent_of_two_gigabytes_spawns_like_a_small_one() {
    let bytes = 2 << 30;
    let free = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = free.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free: usize = free.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    if free * 1024 < bytes * 2 {
        println!("skipped: {free} kB of memory free");
        return;
    }
    let small = median_spawn();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new memory at a place of the kernel's choice.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    let big = median_spawn();
    // SAFETY: exactly the mapping made above, to which nothing refers.
    unsafe { libc::munmap(memory, bytes) };
    let ratio = big.as_secs_f64() / small.as_secs_f64();
    println!("spawn: {small:?} from a small parent, {big:?} from one of 2 GB: ratio {ratio:.2}");
    assert!(ratio < 20.0);
}
