//! What runs between clone and exec, in a process that shares our memory.
//!
//! The whole list of what it does, in order: default dispositions, control group, session or group, umask,
//! descriptors, close-on-exec for the rest, working directory, groups, group, user, parent-death
//! signal, pid into the environment, empty mask, exec. It makes raw system calls and touches only the
//! [`Image`] laid out for it: no allocation, no lock, no libc function that keeps state (glibc's
//! `setuid` would signal the *parent's* threads), no panic.
//!
//! The parent's thread sleeps until exec or exit, so the child is alone with the image, although the
//! parent's other threads run on. What it writes to `report` is read by the parent afterwards.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::os::fd::AsRawFd;
use std::ptr;

use super::Step;
use super::plan::{Identity, Move, Plan};

/// Size of the kernel's signal set in bytes (64 signals).
const SIGSET_BYTES: usize = 8;
const SIGNALS: c_long = 64;
/// The exit code nobody sees: the parent collects a child that failed and reports why.
const EXIT_FAILED: c_int = 127;

/// What the child could not do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub(super) step: Step,
    pub(super) errno: c_int,
}

/// The plan as pointers and numbers, ready for a process that may not allocate.
#[derive(Debug)]
pub(super) struct Image<'plan> {
    plan: &'plan Plan,
    candidates: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// Where to write the pid's digits, or null. Points into a buffer only this image refers to.
    pid_digits: *mut u8,
    moves: Vec<Move>,
    /// The first number above every target: copies made on the way go there or higher.
    above: c_int,
    parent: c_int,
    /// Written by the child when it fails, read by the parent after the child is gone.
    pub(super) report: Option<Failure>,
}

impl<'plan> Image<'plan> {
    /// `pid_entry` is taken out of the plan by the caller, so that it can be written through.
    pub(super) fn new(plan: &'plan Plan, pid_entry: Option<(&'plan mut [u8], usize)>) -> Self {
        let pointer = |text: &CString| text.as_ptr();
        let mut argv: Vec<_> = plan.argv.iter().map(pointer).collect();
        argv.push(ptr::null());
        let mut envp: Vec<_> = plan.envp.iter().map(pointer).collect();
        let mut pid_digits = ptr::null_mut();
        if let Some((bytes, digits)) = pid_entry {
            let start = bytes.as_mut_ptr();
            envp.push(start.cast_const().cast());
            pid_digits = start.wrapping_add(digits);
        }
        envp.push(ptr::null());
        let targets = plan.descriptors.moves.iter().map(|one| one.target);
        let kept = plan.descriptors.keeps.iter().map(|keep| keep.number);
        let highest = targets.chain(kept).max().unwrap_or(2);
        Self {
            plan,
            candidates: plan.candidates.iter().map(pointer).collect(),
            argv,
            envp,
            pid_digits,
            moves: plan.descriptors.moves.clone(),
            above: highest.max(2).saturating_add(1),
            parent: rustix::process::getpid().as_raw_nonzero().get(),
            report: None,
        }
    }
}

/// The child's entry. `argument` is a `*mut Image`.
pub(super) extern "C" fn main(argument: *mut c_void) -> c_int {
    // SAFETY: the spawner passes a pointer to an `Image` that outlives the child's use of our memory,
    // and its thread sleeps in clone(2) (`CLONE_VFORK`) until this process has exec'ed or exited.
    let image = unsafe { &mut *argument.cast::<Image<'_>>() };
    if let Err(failure) = run(image) {
        image.report = Some(failure);
    }
    // SAFETY: ends this process at once; no destructor or exit handler of the parent runs.
    unsafe { libc::_exit(EXIT_FAILED) }
}

fn run(image: &mut Image<'_>) -> Result<(), Failure> {
    default_dispositions();
    enter_cgroups(image.plan)?;
    session(image.plan)?;
    if let Some(mask) = image.plan.umask {
        let _previous = call(libc::SYS_umask, [mask.into(), 0, 0, 0]);
    }
    place_descriptors(image)?;
    close_the_rest(image.plan);
    if let Some(path) = &image.plan.directory {
        check(call(libc::SYS_chdir, [address(path), 0, 0, 0]), Step::Chdir)?;
    }
    credentials(&image.plan.identity)?;
    death_signal(image)?;
    write_pid(image);
    empty_mask()?;
    execute(image)
}

/// A raw system call with up to four arguments.
fn call(number: c_long, arguments: [c_long; 4]) -> c_long {
    let [a, b, c, d] = arguments;
    // SAFETY: each caller in this file passes arguments as the manual page of that call demands;
    // pointers among them refer to the image or to the caller's frame and are valid over the call.
    unsafe { libc::syscall(number, a, b, c, d) }
}

fn errno() -> c_int {
    // SAFETY: returns the address of the calling thread's errno, valid as long as the thread. The
    // child runs with the spawning thread's thread-local memory, and that thread sleeps.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; written by the system call wrapper just before.
    unsafe { *place }
}

fn check(result: c_long, step: Step) -> Result<c_long, Failure> {
    if result == -1 { Err(Failure { step, errno: errno() }) } else { Ok(result) }
}

fn address(text: &CStr) -> c_long {
    text.as_ptr().expose_provenance() as c_long
}

/// Every signal back to its default, ours (Rust ignores SIGPIPE) and those ignored by *our* parent.
///
/// The child's table is its own copy (no `CLONE_SIGHAND`). KILL and STOP refuse, which is fine.
fn default_dispositions() {
    // The kernel's own structure: handler (0 is SIG_DFL), flags, restorer, mask; all zero.
    let action = [0u64; 4];
    let place = action.as_ptr().expose_provenance() as c_long;
    for signal in 1..=SIGNALS {
        let _refused = call(libc::SYS_rt_sigaction, [signal, place, 0, SIGSET_BYTES as c_long]);
    }
}

/// Zero stands for whoever writes it, which is this process, not the thread whose memory it borrows.
fn enter_cgroups(plan: &Plan) -> Result<(), Failure> {
    let itself = c"0";
    for door in &plan.cgroups {
        let arguments = [door.as_raw_fd().into(), address(itself), 1, 0];
        check(call(libc::SYS_write, arguments), Step::Cgroup)?;
    }
    Ok(())
}

fn session(plan: &Plan) -> Result<(), Failure> {
    if plan.new_session {
        check(call(libc::SYS_setsid, [0; 4]), Step::Session)?;
    }
    if plan.process_group {
        check(call(libc::SYS_setpgid, [0; 4]), Step::Group)?;
    }
    Ok(())
}

/// First every source that stands on a target's place is copied above all targets; then each move
/// finds its source unharmed, whatever was overwritten before.
fn place_descriptors(image: &mut Image<'_>) -> Result<(), Failure> {
    for one in &mut image.moves {
        if one.clashes {
            let duplicate = libc::F_DUPFD_CLOEXEC.into();
            let arguments = [one.source.into(), duplicate, image.above.into(), 0];
            one.source = check(call(libc::SYS_fcntl, arguments), Step::Fd(one.target))? as c_int;
        }
    }
    for one in &image.moves {
        // Source and target differ here, so the copy is made and comes without close-on-exec.
        let arguments = [one.source.into(), one.target.into(), 0, 0];
        check(call(libc::SYS_dup3, arguments), Step::Fd(one.target))?;
    }
    for keep in &image.plan.descriptors.keeps {
        let arguments = [keep.number.into(), libc::F_SETFD.into(), 0, 0];
        let result = check(call(libc::SYS_fcntl, arguments), Step::Fd(keep.number));
        if keep.required {
            result?;
        }
    }
    Ok(())
}

/// Marks all other numbers close-on-exec. Kernels before 5.11 refuse, which leaves what libraries
/// opened without the flag; our own descriptors carry it from birth.
fn close_the_rest(plan: &Plan) {
    for (first, last) in &plan.descriptors.closed {
        let flags = libc::CLOSE_RANGE_CLOEXEC.into();
        let _refused = call(libc::SYS_close_range, [(*first).into(), (*last).into(), flags, 0]);
    }
}

/// Groups first, user last: each step needs a right the later ones give up. Raw calls, because
/// glibc's wrappers change all threads of the process, which here are the parent's.
fn credentials(who: &Identity) -> Result<(), Failure> {
    if let Some(groups) = &who.groups {
        let list = groups.as_ptr().expose_provenance() as c_long;
        let result =
            check(call(libc::SYS_setgroups, [groups.len() as c_long, list, 0, 0]), Step::Groups);
        match result {
            Err(failure) if who.groups_optional && failure.errno == libc::EPERM => {}
            other => drop(other?),
        }
    }
    if let Some(gid) = who.gid.map(c_long::from) {
        check(call(libc::SYS_setresgid, [gid, gid, gid, 0]), Step::Gid)?;
    }
    if let Some(uid) = who.uid.map(c_long::from) {
        check(call(libc::SYS_setresuid, [uid, uid, uid, 0]), Step::Uid)?;
    }
    Ok(())
}

/// After the change of user, which clears the wish. If the parent ended before it was noted, nobody
/// will ever send the signal, so the child leaves; parent 0 means one outside our pid namespace.
fn death_signal(image: &Image<'_>) -> Result<(), Failure> {
    if image.plan.death_signal == 0 {
        return Ok(());
    }
    let option = libc::PR_SET_PDEATHSIG.into();
    let signal = image.plan.death_signal.into();
    check(call(libc::SYS_prctl, [option, signal, 0, 0]), Step::DeathSignal)?;
    let parent = call(libc::SYS_getppid, [0; 4]);
    if parent != 0 && parent != c_long::from(image.parent) {
        // SAFETY: ends this process at once, as in `main`.
        unsafe { libc::_exit(EXIT_FAILED) }
    }
    Ok(())
}

/// Writes our pid in decimal and a NUL over the reserved digits.
fn write_pid(image: &Image<'_>) {
    if image.pid_digits.is_null() {
        return;
    }
    let pid = call(libc::SYS_getpid, [0; 4]);
    let mut length = 1;
    let mut rest = pid / 10;
    while rest > 0 {
        length += 1;
        rest /= 10;
    }
    let mut rest = pid;
    for index in (0..length).rev() {
        let digit = b'0' + (rest % 10) as u8;
        rest /= 10;
        // SAFETY: a pid is a positive `i32`, so has at most ten digits; the plan reserved eleven.
        unsafe { image.pid_digits.wrapping_add(index).write(digit) };
    }
    // SAFETY: at most the eleventh reserved place.
    unsafe { image.pid_digits.wrapping_add(length).write(0) };
}

fn empty_mask() -> Result<(), Failure> {
    let mask = 0u64;
    let place = (&raw const mask).expose_provenance() as c_long;
    let arguments = [libc::SIG_SETMASK.into(), place, 0, SIGSET_BYTES as c_long];
    check(call(libc::SYS_rt_sigprocmask, arguments), Step::SignalMask).map(drop)
}

/// Tries each candidate. "Not there" and "not permitted" go on to the next, as execvp(3) does, and
/// "not permitted" is what is told in the end if it was met.
fn execute(image: &Image<'_>) -> Result<(), Failure> {
    let mut denied = false;
    for path in &image.candidates {
        // SAFETY: `path` is a C string, `argv` and `envp` are null-terminated arrays of C strings, all
        // owned by the plan that `image` borrows.
        unsafe { libc::execve(*path, image.argv.as_ptr(), image.envp.as_ptr()) };
        match errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => denied = true,
            other => return Err(Failure { step: Step::Exec, errno: other }),
        }
    }
    let errno = if denied { libc::EACCES } else { libc::ENOENT };
    Err(Failure { step: Step::Exec, errno })
}
