//! A process that puts another program in its own place and leaves its descriptors to it.
//!
//! The old image makes a sealed memory file ([`seal`]) in which it says what it leaves, holds its signals ([`hold_signals`]),
//! and calls [`exec_keeping`] with an open file. The new one reads the memory file ([`read_sealed`]), checks every descriptor and
//! owns it ([`adopt`]), and lets signals in again when it can handle them ([`release_signals`]). What is in the file, and when
//! it is time, is decided above.
//!
//! The same process goes on: its number, its children, its locks (flock(2) belongs to what is open), its working directory
//! and its limits stay; threads, memory and whatever is close-on-exec go.
//!
//! Two surprising rules. A descriptor stays close-on-exec until the last moment and is so again at once in the new image, so
//! that no child can have it. And the program is executed by its descriptor, never by name: what was looked at is what runs.
//!
//! Behaviour follows: execveat(2), memfd_create(2), fcntl(2) (`F_ADD_SEALS`), pthread_sigmask(3), proc(5).

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::io::FdFlags;

use crate::channel::{self, FdKind};

/// No descriptor below is ever adopted: the standard streams belong to nobody.
const FIRST: RawFd = 3;
/// All that keeps a memory file as it is.
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// By which an open descriptor is known again in another image of the same process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What it is: a number that is the same for the same kind, within one release.
    pub kind: u8,
    /// Device of its inode.
    pub device: u64,
    /// Its inode; for what has none of its own, the number by which the kernel tells it from others of its kind.
    pub inode: u64,
}

/// Why descriptors are not adopted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Only once in the life of a process.
    #[error("descriptors were adopted before")]
    Again,
    /// A number is named twice, or is that of a standard stream.
    #[error("descriptor {0} cannot be adopted")]
    Number(RawFd),
    /// It is not open, or cannot be looked at.
    #[error("descriptor {number}: {error}")]
    Missing {
        /// Its number.
        number: RawFd,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// Something else is open under this number.
    #[error("descriptor {0} is not what it was")]
    Another(RawFd),
}

/// Looks at a descriptor.
///
/// # Errors
///
/// Those of fstat(2) and getsockopt(2); none is expected.
pub fn identity(fd: BorrowedFd<'_>) -> io::Result<Identity> {
    let stat = rustix::fs::fstat(fd)?;
    let (kind, inode) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => (socket_kind(fd)?, stat.st_ino),
        FileType::Fifo => (1, stat.st_ino),
        FileType::RegularFile => (2, stat.st_ino),
        FileType::Directory => (3, stat.st_ino),
        FileType::CharacterDevice => (4, stat.st_ino),
        _ => anonymous(fd)?,
    };
    Ok(Identity { kind, device: stat.st_dev, inode })
}

fn socket_kind(fd: BorrowedFd<'_>) -> io::Result<u8> {
    Ok(match channel::kind(fd)? {
        FdKind::TcpListener => 10,
        FdKind::TcpStream => 11,
        FdKind::UnixListener => 12,
        FdKind::UnixStream => 13,
        FdKind::Udp => 14,
        FdKind::UnixDatagram => 15,
        FdKind::UnixSeqpacket => 16,
        _ => 17,
    })
}

/// Processes, BPF programs and maps share one inode on many kernels; the kernel numbers them elsewhere.
fn anonymous(fd: BorrowedFd<'_>) -> io::Result<(u8, u64)> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    let known = [("map_id:", 20), ("prog_id:", 21), ("Pid:", 22)];
    let found = known.iter().find_map(|(name, kind)| Some((*kind, number(name)?)));
    Ok(found.unwrap_or((23, 0)))
}

/// A memory file with this content that nobody can change any more.
///
/// # Errors
///
/// The system's: no descriptors or no memory left.
pub fn seal(content: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create("polyfork-state", flags)?);
    file.write_all(content)?;
    rustix::fs::fcntl_add_seals(&file, SEALS)?;
    Ok(file.into())
}

/// What is in the sealed memory file that is open under this number, of at most `limit` bytes. The number stays open and
/// nobody's, until [`adopt`] closes it.
///
/// # Errors
///
/// `InvalidData`: not sealed, or longer. Else those of open(2) and read(2).
pub fn read_sealed(number: RawFd, limit: usize) -> io::Result<Vec<u8>> {
    let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let mut file = File::open(format!("/proc/self/fd/{number}"))?;
    // Refused for anything that is no memory file.
    if !rustix::fs::fcntl_get_seals(&file)?.contains(SEALS) {
        return Err(wrong("the state is not sealed"));
    }
    let length = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(usize::MAX);
    if length > limit {
        return Err(wrong("the state is too long"));
    }
    let mut content = Vec::with_capacity(length);
    file.read_to_end(&mut content)?;
    Ok(content)
}

/// Whether this is the thread with which the process began: the only one that is still there after exec(2).
pub fn is_main_thread() -> bool {
    rustix::thread::gettid() == rustix::process::getpid()
}

/// Signals wait as long as this lives: they are delivered when it is dropped, or to the program that takes this
/// one's place. Of this thread, and of those it makes meanwhile for as long as they live.
#[derive(Debug)]
pub struct SignalsHeld {
    before: libc::sigset_t,
    /// A mask belongs to a thread.
    _here: std::marker::PhantomData<*const ()>,
}

/// Holds all signals that can be held.
///
/// # Errors
///
/// None is expected.
pub fn hold_signals() -> io::Result<SignalsHeld> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set that it is given room for.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: filled just now.
    let all = unsafe { all.assume_init() };
    let before = set_mask(&all)?;
    Ok(SignalsHeld { before, _here: std::marker::PhantomData })
}

impl Drop for SignalsHeld {
    fn drop(&mut self) {
        // A set that was in force can be again.
        let _ = set_mask(&self.before);
    }
}

/// Lets signals in that the program before this one held. To be called by the main thread once it handles them.
///
/// # Errors
///
/// None is expected.
pub fn release_signals() -> io::Result<()> {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: empties the set that it is given room for.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: filled just now.
    let none = unsafe { none.assume_init() };
    set_mask(&none).map(drop)
}

fn set_mask(mask: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: both point to sets that outlive the call; only this thread's mask changes.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, before.as_mut_ptr()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: written by the successful call; all bits are valid in any case.
    Ok(unsafe { before.assume_init() })
}

/// Owns what the program before this one left, in the order given. All of it is close-on-exec afterwards. Everything else
/// from 3 up is closed, but for the numbers in `others`, which are left as they are.
///
/// To be called before anything else has opened a descriptor. Checks everything before it changes anything.
///
/// # Errors
///
/// [`AdoptError`].
pub fn adopt(declared: &[(RawFd, Identity)], others: &[RawFd]) -> Result<Vec<OwnedFd>, AdoptError> {
    static ADOPTED: AtomicBool = AtomicBool::new(false);
    let mut open: BTreeSet<RawFd> = others.iter().copied().collect();
    for (number, expected) in declared {
        if *number < FIRST || !open.insert(*number) {
            return Err(AdoptError::Number(*number));
        }
        let missing = |error| AdoptError::Missing { number: *number, error };
        // SAFETY: fcntl(2) with F_GETFD takes any number and touches no memory; EBADF if it is not open.
        if unsafe { libc::fcntl(*number, libc::F_GETFD) } == -1 {
            return Err(missing(io::Error::last_os_error()));
        }
        // SAFETY: open, as just seen; nothing in this process owns it yet, so nobody closes it meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        if identity(fd).map_err(missing)? != *expected {
            return Err(AdoptError::Another(*number));
        }
    }
    if ADOPTED.swap(true, Ordering::Relaxed) {
        return Err(AdoptError::Again);
    }
    let mut owned = Vec::with_capacity(declared.len());
    for (number, _) in declared {
        // SAFETY: open, as seen above, and named once. It was left by the program before, so nothing in this process
        // owns it, and the flag, which is never cleared, says that nobody was made its owner here before.
        let fd = unsafe { OwnedFd::from_raw_fd(*number) };
        let flagged = rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC);
        flagged.map_err(|error| AdoptError::Missing { number: *number, error: error.into() })?;
        owned.push(fd);
    }
    close_all_but(&open);
    Ok(owned)
}

/// Closes every number from 3 up that is not in `open`.
fn close_all_but(open: &BTreeSet<RawFd>) {
    let mut from = FIRST;
    for number in open.iter().copied().chain([RawFd::MAX]) {
        if number > from {
            let (first, last) = (from.cast_unsigned(), (number - 1).cast_unsigned());
            // SAFETY: nothing in this process owns a descriptor in this range: it has opened none yet, and those
            // it was left are in `open`.
            let _refused = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        from = from.max(number.saturating_add(1));
    }
}

/// Puts the program that is open as `binary` in this one's place; returns only when that failed, and then nothing has
/// changed. It will find `keep` open, and what is open under `numbers`.
///
/// To be called on the main thread: the process goes on with it alone, and children with a parent-death signal live as
/// long as the thread that started them.
pub fn exec_keeping(
    binary: BorrowedFd<'_>,
    argv: &[OsString],
    env: &[(OsString, OsString)],
    keep: &[BorrowedFd<'_>],
    numbers: &[RawFd],
) -> io::Error {
    if !is_main_thread() {
        return io::Error::other("only the main thread can do that");
    }
    if crate::spawn::exec_ends_children() {
        return io::Error::other("a child runs that would end with its thread; wait for its end");
    }
    let words = argv.iter().map(|word| text(word.as_bytes())).collect::<io::Result<Vec<CString>>>();
    let pair = |(key, value): &(OsString, OsString)| {
        text(&[key.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let pairs = env.iter().map(pair).collect::<io::Result<Vec<CString>>>();
    let (words, pairs) = match (words, pairs) {
        (Ok(words), Ok(pairs)) => (words, pairs),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    let pointers = |texts: &[CString]| {
        texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>()
    };
    let (argv, envp) = (pointers(&words), pointers(&pairs));
    let keep: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).chain(numbers.to_vec()).collect();
    let opened = keep.iter().try_for_each(|number| close_on_exec(*number, false));
    let error = match opened {
        Err(error) => error,
        Ok(()) => {
            let (file, itself, flags) = (binary.as_raw_fd(), c"", libc::AT_EMPTY_PATH);
            let (argv, envp) = (argv.as_ptr(), envp.as_ptr());
            // SAFETY: the arguments of execveat(2); both lists end with null and point to strings that live on.
            unsafe { libc::syscall(libc::SYS_execveat, file, itself.as_ptr(), argv, envp, flags) };
            io::Error::last_os_error()
        }
    };
    for number in keep {
        // Open, and the flag was there before.
        let _ = close_on_exec(number, true);
    }
    error
}

fn close_on_exec(number: RawFd, yes: bool) -> io::Result<()> {
    let flag = if yes { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: fcntl(2) with F_SETFD takes any number and touches no memory. What the flag does to the owner of
    // the descriptor is nothing; only exec looks at it, and our caller sets it back where that fails.
    match unsafe { libc::fcntl(number, libc::F_SETFD, flag) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn text(word: &[u8]) -> io::Result<CString> {
    CString::new(word)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a word holds a zero byte"))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_sealed_is_read_and_cannot_be_changed() {
        let sealed = seal(b"state").unwrap();
        assert_eq!(read_sealed(sealed.as_raw_fd(), 5).unwrap(), b"state");
        assert!(read_sealed(sealed.as_raw_fd(), 4).is_err(), "too long");
        let mut file = File::from(sealed);
        assert!(file.write_all(b"other").is_err());
        assert!(file.set_len(0).is_err());
    }

    #[test]
    fn what_is_not_sealed_is_not_read() {
        let open = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(read_sealed(open.as_raw_fd(), 5).is_err());
        let null = File::open("/dev/null").unwrap();
        assert!(read_sealed(null.as_raw_fd(), 5).is_err());
        assert!(read_sealed(-1, 5).is_err());
    }

    #[test]
    fn descriptors_are_known_again_and_told_from_each_other() {
        let (one, two) = channel::pair().unwrap();
        let of = |fd: &OwnedFd| identity(fd.as_fd()).unwrap();
        let again = one.try_clone().unwrap();
        assert_eq!(of(&one), of(&again));
        assert_ne!(of(&one), of(&two));
        let listener = OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        assert_eq!((of(&listener).kind, of(&one).kind), (10, 13));
        let me = rustix::process::getpid();
        let pidfd = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).unwrap();
        let init = rustix::process::Pid::INIT;
        if let Ok(other) = rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty()) {
            assert_ne!(of(&pidfd), of(&other));
        }
    }

    #[test]
    fn nothing_is_adopted_that_is_not_what_it_was() {
        let (one, _two) = channel::pair().unwrap();
        let expected = identity(one.as_fd()).unwrap();
        let other = Identity { inode: expected.inode + 1, ..expected };
        let number = one.as_raw_fd();
        let refused = |list: &[(RawFd, Identity)]| adopt(list, &[]).unwrap_err();
        assert!(matches!(refused(&[(number, other)]), AdoptError::Another(_)));
        assert!(matches!(refused(&[(1, expected)]), AdoptError::Number(1)));
        assert!(matches!(
            refused(&[(number, expected), (number, expected)]),
            AdoptError::Number(_)
        ));
        assert!(matches!(refused(&[(100_000, expected)]), AdoptError::Missing { .. }));
        // All of it is still there.
        assert_eq!(identity(one.as_fd()).unwrap(), expected);
    }

    #[test]
    fn another_thread_than_the_main_one_replaces_nothing() {
        let file = File::open("/proc/self/exe").unwrap();
        let error = exec_keeping(file.as_fd(), &[], &[], &[], &[]);
        assert!(error.to_string().contains("only the main thread"), "{error}");
    }

    #[test]
    fn held_signals_wait() {
        let own = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            status.lines().find(|line| line.starts_with("SigBlk:")).unwrap().to_owned()
        };
        let before = own();
        let held = hold_signals().unwrap();
        assert_ne!(own(), before);
        drop(held);
        assert_eq!(own(), before);
    }
}
