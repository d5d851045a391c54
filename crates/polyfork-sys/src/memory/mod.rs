//! Memory that several processes see: a sealed memfd, its space reserved, mapped shared.
//!
//! Makes it, takes over what another process made, grows it, and gives views of it as slices of atomics. What
//! the words mean is the business of the callers; waiting on one is in [`crate::futex`], views in `view`.
//!
//! # What another process can do, and what it cannot
//!
//! It can write any value at any time: everything read from here is input. It cannot shrink the file, so no
//! access faults with `SIGBUS`: the seals are set before the descriptor leaves [`Memory::create`], and read back,
//! because a kernel may take the call and not the seals. It can give pages back to the kernel (punch a
//! hole), which then reads as zero; no seal forbids that and allows writing.
//!
//! # Room
//!
//! Pages are taken when the memory is made, not when they are touched, so that a shortage is an error of
//! [`Memory::create`]. The kernel would rather end a process than refuse it pages that a control group has not, so
//! what is not there by the books is not asked for (see [`crate::system::available_memory`]).
//!
//! The surprising rule: the length of a growable memory can change under its views, but only upwards, so a view that
//! was inside stays inside. Its maximum travels as the file's position, which nothing else uses.
//!
//! Behaviour follows: memfd_create(2), fcntl(2) (`F_ADD_SEALS`), fallocate(2), Linux `mm/shmem.c`.

mod view;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;

use view::Claims;
pub use view::{View, ViewError, Word};

/// Seals of every memory: nobody can shrink it, nobody can change the seals.
const ALWAYS: SealFlags = SealFlags::SHRINK.union(SealFlags::SEAL);
/// Reserving is done in steps of this size, as a signal makes one step start over.
const STEP_BYTES: usize = 256 << 20;
/// Looking at the books costs more than taking less than this.
const LOOK_FROM_BYTES: usize = 1 << 20;
/// The file system of memfds whose pages are of the ordinary size.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `st_blocks` counts in these.
const BLOCK_BYTES: u64 = 512;

/// Memory that can be given to other processes. Clones are the same memory.
///
/// Unmapped when the last clone and the last [`View`] are gone; freed when that is so in every process.
#[derive(Clone)]
pub struct Memory(Arc<Mapping>);

/// A mapped range and its file.
struct Mapping {
    base: NonNull<u8>,
    /// Bytes of address space, a whole number of pages.
    mapped: usize,
    /// Bytes that exist as far as this mapping knows. Never becomes less.
    length: AtomicUsize,
    /// What it may grow to.
    most: usize,
    growable: bool,
    file: File,
    claims: Claims,
}

// SAFETY: the range is owned by this value, nothing in it belongs to a thread, and all access goes through
// atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; what is not atomic in here is never changed.
unsafe impl Sync for Mapping {}

/// Why there is no such memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The kernel makes none: no descriptors left, or no memfds.
    #[error("cannot create shared memory: {}", crate::errno::text(.0))]
    Create(#[source] io::Error),
    /// There is not so much memory (`ENOSPC`, `ENOMEM`), or a file of this process may not be so long.
    #[error("cannot reserve {length} bytes of shared memory: {}", crate::errno::text(.source))]
    Reserve {
        /// The length that was wanted.
        length: usize,
        /// The reason.
        source: io::Error,
    },
    /// The seals could not be set, or the kernel said so and had not.
    #[error("cannot seal shared memory: {0}")]
    Seal(String),
    /// There is no address space for it.
    #[error("cannot map {length} bytes of shared memory: {}", crate::errno::text(.source))]
    Map {
        /// How much address space was wanted.
        length: usize,
        /// The reason.
        source: io::Error,
    },
    /// It is longer than the caller takes, or than its own maximum.
    #[error("shared memory of {length} bytes is more than the limit of {limit}")]
    TooLong {
        /// The length that was wanted, or that came.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// A descriptor that came is not such memory.
    #[error("descriptor is not shared memory that can be trusted: {0}")]
    Foreign(&'static str),
    /// Memory of a fixed length was to grow, or any to shrink.
    #[error("shared memory of {length} bytes cannot be resized to {wanted}: {why}")]
    Fixed {
        /// The length it has.
        length: usize,
        /// The length that was wanted.
        wanted: usize,
        /// Why not.
        why: &'static str,
    },
}

impl Memory {
    /// Makes memory of this length in bytes, all zero, for ever of this length.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Create`], [`Reserve`](MemoryError::Reserve), [`Seal`](MemoryError::Seal),
    /// [`Map`](MemoryError::Map).
    pub fn create(length: usize) -> Result<Memory, MemoryError> {
        let file = new_file()?;
        reserve_new(&file, length)?;
        seal(&file, ALWAYS.union(SealFlags::GROW))?;
        Memory::own(file, Shape { length, most: length, growable: false })
    }

    /// Makes memory that can [grow](Self::grow) up to `most` bytes, for which address space is set aside now.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); [`MemoryError::TooLong`] when `length` is above `most`.
    pub fn growable(length: usize, most: usize) -> Result<Memory, MemoryError> {
        if length > most {
            return Err(MemoryError::TooLong { length, limit: most });
        }
        let mut file = new_file()?;
        reserve_new(&file, length)?;
        seal(&file, ALWAYS)?;
        file.seek(SeekFrom::Start(most as u64)).map_err(MemoryError::Create)?;
        Memory::own(file, Shape { length, most, growable: true })
    }

    /// Takes memory that another process made, if it is at most `limit` bytes, and can be trusted: a memfd that
    /// cannot be shrunk, whose seals are final, that can be written, and whose pages exist.
    ///
    /// Of growable memory `limit` bounds what it may grow to as far as this process is concerned.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Foreign`] for anything else; [`TooLong`](MemoryError::TooLong);
    /// [`Map`](MemoryError::Map). The descriptor is given back.
    pub fn adopt(descriptor: OwnedFd, limit: usize) -> Result<Memory, (MemoryError, OwnedFd)> {
        match Shape::of_foreign(descriptor.as_fd(), limit) {
            Ok(shape) => Memory::map(descriptor.into(), shape),
            Err(error) => Err((error, descriptor)),
        }
    }

    fn own(file: File, shape: Shape) -> Result<Memory, MemoryError> {
        Memory::map(file, shape).map_err(|(error, _)| error)
    }

    fn map(file: File, shape: Shape) -> Result<Memory, (MemoryError, OwnedFd)> {
        let Shape { length, most, growable } = shape;
        match map_shared(file.as_fd(), most) {
            Ok((base, mapped)) => {
                let length = AtomicUsize::new(length);
                let claims = Claims::default();
                Ok(Memory(Arc::new(Mapping { base, mapped, length, most, growable, file, claims })))
            }
            Err(source) => Err((MemoryError::Map { length: most, source }, file.into())),
        }
    }

    /// Its length in bytes. Of growable memory this asks the kernel, as any process may have grown it.
    pub fn len(&self) -> usize {
        if self.0.growable {
            self.0.look();
        }
        self.0.length.load(Ordering::Acquire)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The length it can grow to in this process; of other memory its length.
    pub fn max_len(&self) -> usize {
        self.0.most
    }

    /// Whether it can grow.
    pub fn is_growable(&self) -> bool {
        self.0.growable
    }

    /// Makes it at least `length` bytes long, for all processes that have it. New bytes are zero. When it is as
    /// long already, nothing happens.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Fixed`] when it cannot grow; [`TooLong`](MemoryError::TooLong) above its maximum;
    /// [`Reserve`](MemoryError::Reserve), when it stays as it was.
    pub fn grow(&self, length: usize) -> Result<(), MemoryError> {
        let now = self.len();
        if length <= now {
            return Ok(());
        }
        if !self.0.growable {
            let why = "it was made with a fixed length";
            return Err(MemoryError::Fixed { length: now, wanted: length, why });
        }
        if length > self.0.most {
            return Err(MemoryError::TooLong { length, limit: self.0.most });
        }
        check_room(length - now, length)?;
        // One call, so that it grows whole or not at all. Whoever grows it further at the same time wins.
        reserve(&self.0.file, length)?;
        self.0.look();
        Ok(())
    }

    /// Whether both are the same memory, in this process or from another.
    pub fn is_same(&self, other: &Memory) -> bool {
        let identity = |memory: &Memory| {
            rustix::fs::fstat(&memory.0.file).ok().map(|stat| (stat.st_dev, stat.st_ino))
        };
        Arc::ptr_eq(&self.0, &other.0)
            || identity(self).is_some_and(|ours| identity(other) == Some(ours))
    }

    fn mapping(&self) -> &Arc<Mapping> {
        &self.0
    }
}

/// Takes over a descriptor of memory that this process inherited, known by number from its environment. It becomes
/// close-on-exec. Whether it can be trusted is not looked at: see [`Memory::adopt`].
///
/// # Errors
///
/// - `AlreadyExists`: this number has been taken before.
/// - `InvalidInput`: standard input, output or error, or nothing that can have seals.
/// - `EBADF`: nothing is open under this number.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        let text = format!("descriptor {number} has been taken already");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    if number <= libc::STDERR_FILENO {
        let text = format!("descriptor {number} cannot be shared memory");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: fcntl(2) with F_GET_SEALS takes any number and touches no memory.
    if unsafe { libc::fcntl(number, libc::F_GET_SEALS) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl(2) with F_SETFD takes any number and touches no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    taken.push(number);
    // SAFETY: the number is open, as just seen. It was inherited over exec, so nothing in this process owns it unless
    // we made an owner before; the list says that we did not.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

impl Mapping {
    /// Learns how long the file is now.
    fn look(&self) {
        // What does not exist as it should is not used: somebody made the file longer without pages.
        if let Ok(length) = backed_length(self.file.as_fd()) {
            self.length.fetch_max(length.min(self.most), Ordering::AcqRel);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and belongs to this value; every view holds the value, so nothing
        // refers into the range any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Memory");
        shown.field("length", &self.0.length.load(Ordering::Relaxed));
        if self.0.growable {
            shown.field("most", &self.0.most);
        }
        shown.finish_non_exhaustive()
    }
}

/// What there is to be mapped.
#[derive(Debug, Clone, Copy)]
struct Shape {
    length: usize,
    most: usize,
    growable: bool,
}

impl Shape {
    fn of_foreign(descriptor: BorrowedFd<'_>, limit: usize) -> Result<Shape, MemoryError> {
        let growable = check_foreign(descriptor)?;
        // Only now: before, it could have been shrunk again.
        let length = backed_length(descriptor)?;
        if length > limit {
            return Err(MemoryError::TooLong { length, limit });
        }
        let most = if growable { announced_most(descriptor).clamp(length, limit) } else { length };
        Ok(Shape { length, most, growable })
    }
}

/// Address space of at least `length` bytes onto the file: where it is, and how much.
fn map_shared(file: BorrowedFd<'_>, length: usize) -> io::Result<(NonNull<u8>, usize)> {
    let none = || io::Error::from_raw_os_error(libc::ENOMEM);
    let page = rustix::param::page_size();
    // An empty one has an address too.
    let mapped = length.max(1).checked_next_multiple_of(page).ok_or_else(none)?;
    // SAFETY: a new mapping at a place the kernel chooses touches no memory that exists.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            mapped,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok((NonNull::new(base.cast()).ok_or_else(none)?, mapped))
}

fn new_file() -> Result<File, MemoryError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let made = match rustix::fs::memfd_create("polyfork", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(Errno::INVAL) => rustix::fs::memfd_create("polyfork", flags),
        made => made,
    };
    made.map(File::from).map_err(|errno| MemoryError::Create(errno.into()))
}

fn reserve_new(file: &File, length: usize) -> Result<(), MemoryError> {
    check_room(length, length)?;
    let mut there = 0;
    while there < length {
        there = length.min(there + STEP_BYTES);
        reserve(file, there).map_err(|error| match error {
            MemoryError::Reserve { source, .. } => MemoryError::Reserve { length, source },
            other => other,
        })?;
    }
    Ok(())
}

/// Whether the books of the machine have room for `more` bytes.
fn check_room(more: usize, length: usize) -> Result<(), MemoryError> {
    let refused = |errno| {
        let source = io::Error::from_raw_os_error(errno);
        Err(MemoryError::Reserve { length, source })
    };
    if isize::try_from(length).is_err() {
        return refused(libc::ENOMEM);
    }
    // The kernel would send SIGXFSZ besides.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if limit.is_some_and(|limit| limit < length as u64) {
        return refused(libc::EFBIG);
    }
    let looks = more >= LOOK_FROM_BYTES;
    if looks && crate::system::available_memory().is_some_and(|there| there < more as u64) {
        return refused(libc::ENOMEM);
    }
    Ok(())
}

/// Takes pages for the first `length` bytes, and makes the file at least that long.
fn reserve(file: &File, length: usize) -> Result<(), MemoryError> {
    let none = FallocateFlags::empty();
    loop {
        match rustix::fs::fallocate(file, none, 0, length as u64) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(MemoryError::Reserve { length, source: errno.into() }),
        }
    }
}

fn seal(file: &File, seals: SealFlags) -> Result<(), MemoryError> {
    rustix::fs::fcntl_add_seals(file, seals)
        .map_err(|errno| MemoryError::Seal(crate::errno::text(&errno.into())))?;
    let set = rustix::fs::fcntl_get_seals(file)
        .map_err(|errno| MemoryError::Seal(crate::errno::text(&errno.into())))?;
    if set.contains(seals) {
        return Ok(());
    }
    Err(MemoryError::Seal(format!("the kernel did not apply {:?}", seals.difference(set))))
}

/// Whether this can be mapped without risk, and if so, whether it can grow.
fn check_foreign(descriptor: BorrowedFd<'_>) -> Result<bool, MemoryError> {
    let foreign = |why| Err(MemoryError::Foreign(why));
    // Ordinary files have no seals, or those of tmpfs, which say that none can be set.
    let Ok(seals) = rustix::fs::fcntl_get_seals(descriptor) else {
        return foreign("it is no memfd");
    };
    if !seals.contains(SealFlags::SHRINK) {
        return foreign("it can be shrunk");
    }
    if !seals.contains(SealFlags::SEAL) {
        return foreign("its seals can still be changed");
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return foreign("it is sealed against writing");
    }
    match rustix::fs::fcntl_getfl(descriptor) {
        Ok(flags) if flags.intersection(OFlags::RWMODE) == OFlags::RDWR => {}
        _ => return foreign("it is not open for reading and writing"),
    }
    match rustix::fs::fstatfs(descriptor) {
        Ok(system) if system.f_type as u64 == TMPFS_MAGIC => {}
        _ => return foreign("its pages are not ordinary ones"),
    }
    Ok(!seals.contains(SealFlags::GROW))
}

/// The length of the file, if it has pages for all of it.
fn backed_length(file: BorrowedFd<'_>) -> Result<usize, MemoryError> {
    let stat = rustix::fs::fstat(file).map_err(|_| MemoryError::Foreign("it has no length"))?;
    let length = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if (stat.st_blocks as u64).saturating_mul(BLOCK_BYTES) < length {
        return Err(MemoryError::Foreign("its space is not reserved"));
    }
    usize::try_from(length).map_err(|_| MemoryError::Foreign("it has no length"))
}

/// What the maker says that it can grow to.
fn announced_most(file: BorrowedFd<'_>) -> usize {
    let at = rustix::fs::tell(file).unwrap_or(0);
    usize::try_from(at).unwrap_or(usize::MAX)
}
