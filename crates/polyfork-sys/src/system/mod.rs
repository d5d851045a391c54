//! What the machine grants this process, and what became of processes that are not our children.
//!
//! Reads `/proc` and the cgroup files and answers plain questions; how many workers to start is
//! decided above. The quota arithmetic is in `cgroup`, groups with limits are made in `limits`.
//!
//! Behaviour follows: sched_getaffinity(2), waitid(2), proc(5), cgroups(7).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Pid;

use crate::wait::{self, Target};

pub(crate) mod cgroup;
mod code;
mod limits;
mod local_time;

pub use code::give_back_code;
pub use limits::{LimitGroup, Limits, limits_folder, prefer_as_oom_victim, sweep};
pub use local_time::{LocalTime, local_time};

/// How many processors this process may really use.
#[derive(Clone, Debug, PartialEq)]
pub struct Parallelism {
    /// The answer: at least 1, at most `affinity`.
    pub cpus: usize,
    /// Processors in this process' affinity mask.
    pub affinity: usize,
    /// Processors' worth of time its control groups grant, the strictest of the hierarchy.
    pub quota: Option<f64>,
    /// A clause for people: which limit decided.
    pub explain: String,
}

/// How many processors this process may use: its affinity mask, and the CPU quota of its control
/// group (v2 `cpu.max`, v1 `cpu.cfs_quota_us`) and of all groups above, rounded up.
pub fn available_parallelism() -> Parallelism {
    parallelism_at(Path::new("/"), affinity())
}

fn affinity() -> usize {
    let set = rustix::thread::sched_getaffinity(None);
    // Fails only on machines with more processors than the set has room for.
    set.map_or(1, |set| set.count() as usize).max(1)
}

fn parallelism_at(root: &Path, affinity: usize) -> Parallelism {
    let quota = cgroup::cpu_quota(root);
    let granted = quota.as_ref().map(|quota| (quota.cpus.ceil() as usize).max(1));
    match (granted, quota) {
        (Some(granted), Some(quota)) if granted < affinity => Parallelism {
            cpus: granted,
            affinity,
            quota: Some(quota.cpus),
            explain: format!(
                "{granted} of {affinity} processors: control group limit of {:.2} in {}",
                quota.cpus, quota.source
            ),
        },
        (_, quota) => Parallelism {
            cpus: affinity,
            affinity,
            quota: quota.map(|quota| quota.cpus),
            explain: format!("{affinity} processors in the affinity mask"),
        },
    }
}

/// How many processes of our control group the kernel has killed for want of memory, ever.
///
/// `None` where the group does not tell (no memory controller). Note it before and compare after a
/// worker died by SIGKILL: a difference is an OOM kill.
pub fn oom_kills() -> Option<u64> {
    cgroup::oom_kills(Path::new("/"))
}

/// How many more bytes of memory this process can use by the books of the machine and of its control groups.
///
/// `None` where neither tells. A moment later it may be less: a reason to refuse, never a promise.
pub fn available_memory() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    [machine, cgroup::memory_room(Path::new("/"))].into_iter().flatten().min()
}

/// CPU time of a process, in user mode and in the kernel, of all its threads, also of those that have ended. `None` when there
/// is none; one that has ended and was not waited for yet still tells.
///
/// # References
///
/// proc_pid_stat(5): `utime`, `stime`. Its unit is a tick of the clock, as a rule 10 ms.
pub fn cpu_time(pid: Pid) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in parentheses may contain anything; behind it comes field 3.
    let fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let mut times = fields.skip(14 - 3).map_while(|field| field.parse::<u64>().ok());
    let ticks = times.next()?.checked_add(times.next()?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_millis(ticks.saturating_mul(1000) / per_second))
}

/// When a process started, in ticks of the machine's clock since it was booted; with the process id this names a process
/// for ever. `None` when there is none, or it has ended and only its status is left.
pub fn started_at(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in parentheses may contain anything.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    // The state was field 3 of proc_pid_stat(5), the start is field 22.
    fields.nth(18)?.parse().ok()
}

/// Resident memory of a process in bytes.
///
/// # Errors
///
/// `NotFound`: no such process. A zombie has 0.
pub fn resident_bytes(pid: Pid) -> io::Result<u64> {
    let path = format!("/proc/{}/statm", pid.as_raw_nonzero());
    let text = std::fs::read_to_string(path)?;
    let pages = text.split(' ').nth(1).and_then(|field| field.parse::<u64>().ok());
    let pages = pages.ok_or_else(|| io::Error::other("unexpected form of /proc/PID/statm"))?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// Whether this is process 1 of its namespace, to which orphans are given.
pub fn is_pid_one() -> bool {
    rustix::process::getpid() == Pid::INIT
}

/// Time since an arbitrary start, never going back (`CLOCK_MONOTONIC`).
pub fn now_monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both are non-negative on this clock.
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Collects ended children that are not ours: orphans handed to us as process 1 or subreaper.
///
/// `except` names the children that somebody in this process waits for; they are left alone, ended or
/// not. Does not block. Cheap when nothing has ended (one system call).
pub fn reap_strangers(except: &dyn Fn(Pid) -> bool) -> Vec<(Pid, ExitStatus)> {
    let mut reaped = Vec::new();
    loop {
        let peek = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        match wait::wait(Target::Any, peek) {
            Ok(Some(report)) if !except(report.pid) => reap(report.pid, &mut reaped),
            // One of ours stands in front, and looking again would show it again: search behind it.
            Ok(Some(_)) => {
                for pid in ended_children() {
                    if !except(pid) {
                        reap(pid, &mut reaped);
                    }
                }
                return reaped;
            }
            // Nothing has ended, or there are no children at all.
            Ok(None) | Err(_) => return reaped,
        }
    }
}

fn reap(pid: Pid, reaped: &mut Vec<(Pid, ExitStatus)>) {
    // An error means that somebody else was faster, which is as good.
    if let Ok(Some(report)) = wait::wait(Target::Pid(pid), libc::WEXITED | libc::WNOHANG) {
        reaped.push((pid, report.status()));
    }
}

/// The zombies whose parent we are, by way of `/proc`.
fn ended_children() -> Vec<Pid> {
    let me = rustix::process::getpid().as_raw_nonzero().get();
    let Ok(folder) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for entry in folder.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        if state_and_parent(&stat) == Some(('Z', me)) {
            found.push(pid);
        }
    }
    found
}

fn state_and_parent(stat: &str) -> Option<(char, i32)> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.next()?.parse().ok()?))
}

/// Takes over a descriptor that this process was started with. It becomes close-on-exec.
///
/// Once per number in the life of a process. Call it early: a library may open descriptors without the flag later, and
/// those are its own.
///
/// # Errors
///
/// - `InvalidInput`: a standard stream, or a number that was not inherited (whatever is opened here is close-on-exec, and
///   belongs to whoever opened it), or is taken already.
/// - `EBADF`: nothing is open under this number.
pub fn take_inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if number < 3 {
        return refused("a standard stream belongs to nobody");
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return refused("this descriptor has been taken already");
    }
    // SAFETY: only asked for its flags, and marked below if it was inherited; EBADF if it is not open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    if rustix::io::fcntl_getfd(fd)?.contains(rustix::io::FdFlags::CLOEXEC) {
        return refused("this descriptor was not inherited");
    }
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
    taken.insert(number);
    // SAFETY: open, as just seen, and inherited, so that nothing in this process owns it unless an owner was made here before;
    // the set, from which nothing is ever removed, says that none was.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Descriptors from 3 up that were open without close-on-exec when this was called: what whoever
/// started this process passed on. Ascending.
///
/// Call it early: a library may open descriptors without the flag later.
pub fn inherited_fds() -> Vec<i32> {
    let Ok(folder) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let mut found = Vec::new();
    for entry in folder.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        let Some(number) = number.filter(|number| *number >= 3) else { continue };
        // SAFETY: only asked for its flags; if the number was closed meanwhile the answer is EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let flags = rustix::io::fcntl_getfd(fd);
        if flags.is_ok_and(|flags| !flags.contains(rustix::io::FdFlags::CLOEXEC)) {
            found.push(number);
        }
    }
    found.sort_unstable();
    found
}
