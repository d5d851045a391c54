//! The clone itself, and the one thread that starts children with a parent-death signal.
//!
//! Why one thread that never ends: see the header of `spawn`. Other children are cloned where the call was
//! made, which saves the way to that thread and back: a fifth of the time that starting `true` takes. Why our own clone: `fork(2)` copies page
//! tables, 84 ms for a parent of 2 GB; with `CLONE_VM` the child borrows our memory until it execs.
//! Why not `posix_spawn(3)`: it knows no pidfd, no parent-death signal, no user change and does not say
//! which step failed.
//!
//! Around the clone all signals are blocked, glibc's internal ones too, so that no handler of ours runs
//! in a process that shares our memory but is not us.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use rustix::process::Pid;

use super::child::{self, Image};
use super::plan::Plan;
use super::{Child, SpawnError, Step};
use crate::wait::{self, Target};

/// The child calls a dozen small functions; a page would do.
const CHILD_STACK_BYTES: usize = 64 * 1024;
/// Our thread moves plans about and allocates a little.
const THREAD_STACK_BYTES: usize = 128 * 1024;
const THREAD_NAME: &str = "polyfork-spawn";

type Reply = Result<Child, SpawnError>;

struct Request {
    plan: Box<Plan>,
    reply: mpsc::SyncSender<Reply>,
}

/// The way to the thread. Requests are bounded by their callers: each waits for its answer.
static REQUESTS: Mutex<Option<mpsc::Sender<Request>>> = Mutex::new(None);
/// Children of the thread that may still run.
static STARTED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());
/// The process the thread belongs to; zero before the first spawn. After a bare `fork(2)` the copy has
/// this number but not the thread, and the lock above may be held by nobody who could free it.
static OWNER: AtomicI32 = AtomicI32::new(0);

/// Carries `plan` out, here or on the spawner thread.
pub(super) fn spawn(plan: Box<Plan>) -> Reply {
    if plan.death_signal == 0 || crate::replace::is_main_thread() {
        return match Stack::take() {
            Ok(stack) => {
                let reply = carry_out(plan, &stack);
                stack.put_back();
                reply
            }
            Err(error) => Err(plan.error(Step::Clone, error)),
        };
    }
    let me = rustix::process::getpid().as_raw_nonzero().get();
    let owner = OWNER.compare_exchange(0, me, Ordering::Relaxed, Ordering::Relaxed);
    if owner.is_err_and(|owner| owner != me) {
        let text = "not available in a process made by fork";
        return Err(plan.error(Step::Thread, io::Error::other(text)));
    }
    let (reply, answer) = mpsc::sync_channel(1);
    if let Err((plan, error)) = submit(Request { plan, reply }) {
        return Err(plan.error(Step::Thread, error));
    }
    match answer.recv() {
        Ok(reply) => reply,
        // The plan went down with the thread; the next call starts a new one.
        Err(mpsc::RecvError) => Err(SpawnError {
            step: Step::Thread,
            errno: io::Error::other("ended unexpectedly"),
            program: "?".into(),
            tried: Vec::new(),
            directory: None,
        }),
    }
}

/// Whether a child lives that would end with the thread.
pub(super) fn has_children() -> bool {
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    started.retain(|pid| is_child(*pid));
    !started.is_empty()
}

/// Remembers a child of the thread. Those that have ended are forgotten each time there are twice as many as before.
fn note(pid: Pid) {
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    if started.len() == started.capacity() {
        started.retain(|pid| is_child(*pid));
    }
    started.push(pid);
}

/// Whether this process has a child of this number that runs. A number that another child has got since counts as well: to
/// be wrong there is to refuse what could be done.
fn is_child(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    // Behind the name, which may have anything in it: state, parent.
    let fields = stat.ok().and_then(|stat| Some(stat.rsplit_once(')')?.1.to_owned()));
    let Some(fields) = fields else { return false };
    let mut fields = fields.split_ascii_whitespace();
    let (state, parent) = (fields.next(), fields.next().and_then(|parent| parent.parse().ok()));
    !matches!(state, Some("Z" | "X")) && parent == Some(rustix::process::getpid().as_raw_nonzero())
}

/// Passes the request on, starting the thread if there is none (or none any more).
fn submit(mut request: Request) -> Result<(), (Box<Plan>, io::Error)> {
    let mut requests = REQUESTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sender) = requests.as_ref() {
        match sender.send(request) {
            Ok(()) => return Ok(()),
            Err(mpsc::SendError(back)) => request = back,
        }
    }
    match start() {
        Ok(sender) => {
            let sent = sender.send(request);
            *requests = Some(sender);
            sent.map_err(|mpsc::SendError(back)| (back.plan, io::Error::other("cannot be reached")))
        }
        Err(error) => Err((request.plan, error)),
    }
}

fn start() -> io::Result<mpsc::Sender<Request>> {
    let stack = Stack::new(CHILD_STACK_BYTES)?;
    let (sender, requests) = mpsc::channel::<Request>();
    let run = move || {
        for Request { plan, reply } in requests {
            let done = carry_out(plan, &stack);
            if let Ok(child) = &done {
                note(child.pid());
            }
            // The caller waits for this; it cannot have gone.
            let _gone = reply.send(done);
        }
    };
    // A new thread starts with its maker's mask, so block first: no signal of the process lands here.
    let blocked = SignalsBlocked::for_thread();
    let builder = std::thread::Builder::new().name(THREAD_NAME.to_owned());
    let started = builder.stack_size(THREAD_STACK_BYTES).spawn(run);
    drop(blocked);
    started.map(|_handle| sender)
}

fn carry_out(mut plan: Box<Plan>, stack: &Stack) -> Reply {
    let mut entry = plan.pid_entry.take();
    let changes_user = plan.identity.uid.is_some() || plan.identity.gid.is_some();
    let pid_entry = entry.as_mut().map(|entry| (entry.bytes.as_mut_slice(), entry.digits));
    let mut image = Image::new(&plan, pid_entry);
    let dumpable = changes_user.then(Dumpable::note);
    let cloned = clone(&mut image, stack);
    drop(dumpable);
    let report = image.report;
    match (cloned, report) {
        (Err(error), _) => Err(plan.error(Step::Clone, error)),
        (Ok(child), None) => Ok(child),
        (Ok(child), Some(failure)) => {
            // Already exiting. ECHILD: SIGCHLD is ignored in this process, so the kernel collected it.
            let _status = wait::wait(Target::PidFd(child.pidfd()), libc::WEXITED);
            Err(plan.error(failure.step, io::Error::from_raw_os_error(failure.errno)))
        }
    }
}

/// Clones a child that runs `child::main` on `stack`; returns when it has exec'ed or exited.
fn clone(image: &mut Image<'_>, stack: &Stack) -> io::Result<Child> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let argument: *mut c_void = (&raw mut *image).cast();
    let mut pidfd: c_int = -1;
    let blocked = SignalsBlocked::for_clone();
    // SAFETY: the stack is mapped, used by one child at a time (this thread sleeps until the child has
    // left our memory) and guarded below; `argument` outlives the child's use of it; `child::main`
    // keeps to raw system calls; no handler of ours can run in the child, all signals being blocked.
    let pid = unsafe { libc::clone(child::main, stack.top(), flags, argument, &raw mut pidfd) };
    let error = io::Error::last_os_error();
    drop(blocked);
    let Some(pid) = Pid::from_raw(pid.max(0)) else { return Err(error) };
    // SAFETY: clone(2) with CLONE_PIDFD just created this descriptor for us and succeeded.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    debug_assert!(rustix::io::fcntl_getfd(pidfd.as_fd()).is_ok());
    Ok(Child { pid, pidfd })
}

/// Stacks that wait for their next child. Nobody waits for the lock: in a process made by a bare `fork(2)` it may
/// be held by a thread that is not there.
static SPARE: Mutex<Vec<Stack>> = Mutex::new(Vec::new());
/// More are unmapped: as many threads seldom start children at the same instant.
const MAX_SPARE: usize = 4;

/// Memory for the child's stack: one inaccessible page, then the stack.
#[derive(Debug)]
struct Stack {
    base: *mut c_void,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to the thread that made it; `Stack` only passes the
// address on, and the child that writes there runs while the owner sleeps.
unsafe impl Send for Stack {}

impl Stack {
    fn new(usable: usize) -> io::Result<Self> {
        let guard = rustix::param::page_size();
        let bytes = usable.next_multiple_of(guard) + guard;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self { base, bytes };
        let start = base.wrapping_byte_add(guard);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the pages after the first of the mapping made above, which nobody uses yet.
        if unsafe { libc::mprotect(start, bytes - guard, access) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(stack)
    }

    /// One that was used before, or a new one.
    fn take() -> io::Result<Self> {
        let spare = SPARE.try_lock().ok().and_then(|mut spare| spare.pop());
        spare.map_or_else(|| Self::new(CHILD_STACK_BYTES), Ok)
    }

    /// Keeps it for the next child, unless there are enough.
    fn put_back(self) {
        if let Ok(mut spare) = SPARE.try_lock()
            && spare.len() < MAX_SPARE
        {
            spare.push(self);
        }
    }

    /// The end of the mapping: stacks grow down. Page-aligned, so aligned enough for any ABI.
    fn top(&self) -> *mut c_void {
        self.base.wrapping_byte_add(self.bytes)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no child runs on it, since clone has returned.
        unsafe { libc::munmap(self.base, self.bytes) };
    }
}

/// Signals blocked in this thread; the previous mask comes back when dropped.
#[derive(Debug)]
struct SignalsBlocked {
    previous: u64,
}

impl SignalsBlocked {
    /// All but the two that glibc keeps for itself (32 and 33: thread cancellation and `setuid` in all
    /// threads). A thread that never took the latter would hang every `setuid` of the process.
    fn for_thread() -> Self {
        Self::set(!(1 << 31 | 1 << 32))
    }

    /// All that can be blocked, for the short time of a clone.
    fn for_clone() -> Self {
        Self::set(u64::MAX)
    }

    fn set(mask: u64) -> Self {
        let mut previous = 0u64;
        set_mask(&mask, Some(&mut previous));
        Self { previous }
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        set_mask(&self.previous, None);
    }
}

/// The raw call: the library's would leave 32 and 33 unblocked.
fn set_mask(mask: &u64, previous: Option<&mut u64>) {
    let previous = previous.map_or(ptr::null_mut(), ptr::from_mut);
    let place = ptr::from_ref(mask);
    let how = libc::SIG_SETMASK;
    // SAFETY: both point to eight bytes, the size of the kernel's signal set that is passed with them.
    // It fails only for bad arguments, so the result needs no look.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, place, previous, size_of::<u64>()) };
}

/// The process' "dumpable" attribute over a spawn that changes the user.
///
/// The attribute belongs to the memory, which the child shares: its change of user turns off core
/// dumps and `/proc` access for *us*. While the child is about, that is welcome (nobody else can
/// attach to it); afterwards it is put back.
#[derive(Debug)]
struct Dumpable(c_int);

impl Dumpable {
    fn note() -> Self {
        // SAFETY: reads an attribute; no pointers.
        Self(unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) })
    }
}

impl Drop for Dumpable {
    fn drop(&mut self) {
        // The values a process may set; 2 only the kernel sets.
        if matches!(self.0, 0 | 1) {
            // SAFETY: sets an attribute to what it was; no pointers.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, self.0, 0, 0, 0) };
        }
    }
}
