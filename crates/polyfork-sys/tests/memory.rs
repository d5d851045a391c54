//! Shared memory against peers that shrink, forge or do not back it, and machines that have none left.
#![allow(clippy::unwrap_used, reason = "a panic in a test is its report")]

mod common;

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use common::{helper, is_root};
use polyfork_sys::futex::{Waited, wait, wake};
use polyfork_sys::memory::{Memory, MemoryError, ViewError};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

const LIMIT: usize = 1 << 30;
const LONG: Duration = Duration::from_secs(60);

fn copy(memory: &Memory) -> OwnedFd {
    memory.as_fd().try_clone_to_owned().unwrap()
}

/// A memfd that was made by somebody else.
fn memfd(length: u64, seals: SealFlags) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("foreign", flags).unwrap());
    if length > 0 {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, length).unwrap();
    }
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn good_seals() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

fn refused(file: impl Into<OwnedFd>) -> String {
    Memory::adopt(file.into(), LIMIT).unwrap_err().0.to_string()
}

#[test]
fn both_ends_see_the_same_bytes() {
    let ours = Memory::create(100).unwrap();
    let theirs = Memory::adopt(copy(&ours), LIMIT).unwrap();
    assert_eq!((ours.len(), theirs.len(), theirs.max_len()), (100, 100, 100));
    assert!(ours.is_same(&theirs) && !ours.is_same(&Memory::create(100).unwrap()));
    let (a, b) = (ours.view::<AtomicU64>(8, 11).unwrap(), theirs.view::<AtomicU64>(8, 11).unwrap());
    a[10].store(7, Ordering::SeqCst);
    assert_eq!(b[10].load(Ordering::SeqCst), 7);
    drop((ours, theirs, a));
    assert_eq!(b[10].load(Ordering::SeqCst), 7, "a view keeps its memory");
    assert_eq!(b.memory().view::<AtomicU8>(0, 8).unwrap().len(), 8);
}

#[test]
fn empty_memory_has_no_words() {
    let memory = Memory::create(0).unwrap();
    assert!(memory.is_empty());
    assert!(memory.view::<AtomicU8>(0, 0).unwrap().is_empty());
    assert!(memory.view::<AtomicU8>(0, 1).is_err());
    assert!(Memory::adopt(copy(&memory), 0).unwrap().is_empty());
}

#[test]
fn view_is_within_the_memory_and_aligned() {
    let memory = Memory::create(64).unwrap();
    let outside = |start, end| Err(ViewError::Outside { start, end, length: 64 });
    assert_eq!(memory.view::<AtomicU32>(0, 17).map(drop), outside(0, 68));
    assert_eq!(memory.view::<AtomicU32>(64, 1).map(drop), outside(64, 68));
    assert_eq!(memory.view::<AtomicU64>(0, usize::MAX).map(drop), outside(0, usize::MAX));
    assert_eq!(
        memory.view::<AtomicU64>(usize::MAX - 7, 1).map(drop),
        outside(usize::MAX - 7, usize::MAX)
    );
    let unaligned = Err(ViewError::Unaligned { start: 4, width: 8 });
    assert_eq!(memory.view::<AtomicU64>(4, 1).map(drop), unaligned);
    assert_eq!(memory.view::<AtomicU64>(64, 0).unwrap().len(), 0);
}

#[test]
fn bytes_have_one_width_at_a_time() {
    let memory = Memory::create(64).unwrap();
    let words = memory.view::<AtomicU32>(8, 4).unwrap();
    let clone = words.clone();
    let in_use = ViewError::OtherWidth { start: 8, end: 24, width: 4 };
    assert_eq!(memory.view::<AtomicU64>(16, 2).map(drop), Err(in_use));
    assert_eq!(memory.view::<AtomicU8>(23, 1).map(drop), Err(in_use));
    assert!(memory.view::<AtomicU64>(24, 5).is_ok() && memory.view::<AtomicU8>(0, 8).is_ok());
    let signed = memory.view::<AtomicI32>(8, 4).unwrap();
    signed[0].store(-1, Ordering::Relaxed);
    assert_eq!(words[0].load(Ordering::Relaxed), u32::MAX);
    drop((words, signed));
    assert_eq!(memory.view::<AtomicU64>(16, 2).map(drop), Err(in_use), "the clone is left");
    drop(clone);
    assert!(memory.view::<AtomicU64>(16, 2).is_ok());
}

#[test]
fn growing_is_seen_by_all_who_have_it() {
    let ours = Memory::growable(10, 100_000).unwrap();
    let theirs = Memory::adopt(copy(&ours), LIMIT).unwrap();
    assert_eq!((theirs.len(), theirs.max_len(), theirs.is_growable()), (10, 100_000, true));
    let early = theirs.view::<AtomicU8>(0, 10).unwrap();
    theirs.grow(50_000).unwrap();
    assert_eq!((ours.len(), theirs.len(), early.len()), (50_000, 50_000, 10));
    ours.view::<AtomicU8>(49_999, 1).unwrap()[0].store(9, Ordering::SeqCst);
    assert_eq!(theirs.view::<AtomicU8>(49_999, 1).unwrap()[0].load(Ordering::SeqCst), 9);
    ours.grow(20).unwrap();
    assert_eq!(ours.len(), 50_000, "it does not shrink");
    ours.grow(100_000).unwrap();
    assert!(matches!(ours.grow(100_001), Err(MemoryError::TooLong { .. })));
    assert!(matches!(Memory::create(10).unwrap().grow(11), Err(MemoryError::Fixed { .. })));
    assert!(matches!(Memory::growable(2, 1), Err(MemoryError::TooLong { .. })));
}

#[test]
fn growing_from_many_threads_ends_at_the_largest() {
    let memory = Memory::growable(0, 1 << 22).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                for step in 1..=50 {
                    let length = (step * 4 + thread) * 10_000;
                    memory.grow(length).unwrap();
                    assert!(memory.len() >= length);
                    memory.view::<AtomicU8>(length - 1, 1).unwrap()[0].store(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(memory.len(), 203 * 10_000);
}

#[test]
fn what_a_peer_announces_does_not_exceed_the_limit() {
    let memory = Memory::growable(4096, 1 << 30).unwrap();
    let theirs = Memory::adopt(copy(&memory), 1 << 20).unwrap();
    assert_eq!(theirs.max_len(), 1 << 20);
    memory.grow(2 << 20).unwrap();
    assert_eq!(theirs.len(), 1 << 20, "it sees as much as it takes");
    File::from(copy(&memory)).seek(SeekFrom::Start(1)).unwrap();
    let theirs = Memory::adopt(copy(&memory), LIMIT).unwrap();
    assert_eq!((theirs.len(), theirs.max_len()), (2 << 20, 2 << 20));
    assert!(matches!(
        Memory::adopt(copy(&memory), 1000),
        Err((MemoryError::TooLong { length: 2_097_152, limit: 1000 }, _))
    ));
}

#[test]
fn fault_122_memory_cannot_be_shrunk_nor_its_seals_changed() {
    for memory in [Memory::create(8192).unwrap(), Memory::growable(8192, 100_000).unwrap()] {
        let peer = File::from(copy(&memory));
        for length in [0, 1, 4096, 8191] {
            assert_eq!(rustix::fs::ftruncate(&peer, length), Err(Errno::PERM));
        }
        assert_eq!(rustix::fs::fcntl_add_seals(&peer, SealFlags::WRITE), Err(Errno::PERM));
        memory.view::<AtomicU8>(8191, 1).unwrap()[0].store(1, Ordering::SeqCst);
    }
    let fixed = Memory::create(8192).unwrap();
    assert_eq!(rustix::fs::ftruncate(&fixed, 8193), Err(Errno::PERM));
}

#[test]
fn fault_122_shrunk_by_another_process() {
    let memory = Memory::create(8192).unwrap();
    let mut child = helper("shrinks");
    child.fd(3, copy(&memory));
    let status = child.spawn().unwrap().wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(memory.view::<AtomicU8>(8191, 1).unwrap()[0].load(Ordering::SeqCst), 0);
}

#[test]
#[ignore = "run by the other tests as their child"]
fn shrinks() {
    let inherited = std::fs::OpenOptions::new().read(true).write(true).open("/proc/self/fd/3");
    assert_eq!(rustix::fs::ftruncate(inherited.unwrap(), 0), Err(Errno::PERM));
}

#[test]
fn fault_122_unsealed_memory_is_refused() {
    assert!(refused(memfd(4096, SealFlags::empty())).contains("it can be shrunk"));
    assert!(refused(memfd(4096, SealFlags::GROW)).contains("it can be shrunk"));
    assert!(refused(memfd(4096, SealFlags::SHRINK)).contains("seals can still be changed"));
    let write = good_seals() | SealFlags::WRITE;
    assert!(refused(memfd(4096, write)).contains("sealed against writing"));
    let future = good_seals() | SealFlags::FUTURE_WRITE;
    assert!(refused(memfd(4096, future)).contains("sealed against writing"));
    assert!(Memory::adopt(memfd(4096, good_seals()).into(), LIMIT).is_ok());
}

#[test]
fn what_is_no_memory_is_refused() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 8192]).unwrap();
    assert!(refused(file).contains("no memfd"));
    let in_tmpfs = tempfile::tempfile_in("/dev/shm").unwrap();
    in_tmpfs.set_len(8192).unwrap();
    assert!(refused(in_tmpfs).contains("it can be shrunk"));
    let (reader, _writer) = common::pipe();
    assert!(refused(reader).contains("no memfd"));
    assert!(refused(File::open("/dev/zero").unwrap()).contains("no memfd"));
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(refused(socket).contains("no memfd"));
}

#[test]
fn memory_that_cannot_be_written_is_refused() {
    let file = memfd(4096, good_seals());
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    assert!(refused(File::open(path).unwrap()).contains("not open for reading and writing"));
}

#[test]
fn memory_without_pages_is_refused() {
    let file = memfd(0, SealFlags::empty());
    file.set_len(1 << 20).unwrap();
    rustix::fs::fcntl_add_seals(&file, good_seals()).unwrap();
    assert!(refused(file).contains("not reserved"));
}

#[test]
fn growable_memory_that_a_peer_makes_longer_without_pages_stays_as_it_was() {
    let memory = Memory::growable(4096, 1 << 30).unwrap();
    File::from(copy(&memory)).set_len(1 << 29).unwrap();
    assert_eq!(memory.len(), 4096);
}

#[test]
fn pages_that_a_peer_gives_back_read_as_zero() {
    let memory = Memory::create(8192).unwrap();
    let bytes = memory.view::<AtomicU8>(0, 8192).unwrap();
    bytes[5000].store(1, Ordering::SeqCst);
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(File::from(copy(&memory)), hole, 0, 8192).unwrap();
    assert_eq!(bytes[5000].load(Ordering::SeqCst), 0);
    bytes[5000].store(2, Ordering::SeqCst);
}

#[test]
fn fault_123_memory_beyond_the_machine_is_an_error() {
    for length in [1 << 50, isize::MAX as usize, usize::MAX] {
        let error = Memory::create(length).unwrap_err();
        assert!(matches!(error, MemoryError::Reserve { .. }), "{error}");
        assert!(error.to_string().contains("cannot allocate memory"), "{error}");
    }
}

#[test]
fn fault_123_file_size_limit_is_an_error_and_no_signal() {
    let status = helper("has_a_file_size_limit").spawn().unwrap().wait().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "run by the other tests as their child"]
fn has_a_file_size_limit() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    setrlimit(Resource::Fsize, Rlimit { current: Some(65536), maximum: Some(65536) }).unwrap();
    assert!(Memory::create(65536).is_ok());
    let error = Memory::create(65537).unwrap_err().to_string();
    assert!(error.contains("file too large"), "{error}");
}

/// The group's files take a number and a line feed at most.
fn group(limit: &str) -> Option<std::path::PathBuf> {
    let v1 = Path::new("/sys/fs/cgroup/memory");
    let (top, file) = if v1.exists() {
        (v1, "memory.limit_in_bytes")
    } else {
        (Path::new("/sys/fs/cgroup"), "memory.max")
    };
    let folder = top.join(format!("polyfork-test-{}", std::process::id()));
    std::fs::create_dir(&folder).ok()?;
    if std::fs::write(folder.join(file), limit).is_ok() {
        return Some(folder);
    }
    let _ = std::fs::remove_dir(&folder);
    None
}

#[test]
fn fault_123_memory_beyond_the_control_group_is_an_error() {
    let Some(folder) = is_root().then(|| group("20971520")).flatten() else {
        println!("SKIP: no control group for memory can be made");
        return;
    };
    let mut child = helper("is_in_a_small_group");
    child.env("GROUP", folder.as_os_str());
    let status = child.spawn().unwrap().wait().unwrap();
    std::fs::remove_dir(&folder).unwrap();
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "run by the other tests as their child"]
fn is_in_a_small_group() {
    let folder = std::env::var_os("GROUP").unwrap();
    let procs = Path::new(&folder).join("cgroup.procs");
    std::fs::write(procs, std::process::id().to_string()).unwrap();
    let error = Memory::create(64 << 20).unwrap_err();
    assert!(matches!(error, MemoryError::Reserve { .. }), "{error}");
    let small = Memory::growable(2 << 20, 64 << 20).unwrap();
    assert!(small.grow(64 << 20).is_err());
    assert_eq!(small.len(), 2 << 20);
    // All of it can be touched.
    for word in small.view::<AtomicU64>(0, 1 << 18).unwrap().iter() {
        word.store(1, Ordering::Relaxed);
    }
}

#[test]
fn inherited_memory_is_taken_once_and_nothing_else_is() {
    let memory = Memory::create(100).unwrap();
    let mut child = helper("takes_what_it_inherits");
    child.fd(5, copy(&memory)).fd(6, common::pipe().0);
    let status = child.spawn().unwrap().wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(memory.view::<AtomicU8>(99, 1).unwrap()[0].load(Ordering::SeqCst), 7);
}

#[test]
#[ignore = "run by the other tests as their child"]
fn takes_what_it_inherits() {
    use polyfork_sys::memory::take_inherited;
    let taken = take_inherited(5).unwrap();
    assert!(rustix::io::fcntl_getfd(&taken).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    let memory = Memory::adopt(taken, LIMIT).unwrap();
    memory.view::<AtomicU8>(99, 1).unwrap()[0].store(7, Ordering::SeqCst);
    assert_eq!(take_inherited(5).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    for (number, errno) in [(6, Errno::INVAL), (77_777, Errno::BADF)] {
        let told = take_inherited(number).unwrap_err();
        assert_eq!(told.raw_os_error(), Some(errno.raw_os_error()));
    }
    assert_eq!(take_inherited(2).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn waiting_works_across_mappings() {
    let ours = Memory::create(64).unwrap();
    let theirs = Memory::adopt(copy(&ours), LIMIT).unwrap();
    let (a, b) = (ours.view::<AtomicU32>(4, 1).unwrap(), theirs.view::<AtomicU32>(4, 1).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait(&b[0], 0, Some(LONG)));
        while wake(&a[0], 1) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(waiting.join().unwrap(), Waited::Woken);
    });
    a[0].store(1, Ordering::SeqCst);
    assert_eq!(wait(&b[0], 0, None), Waited::NotEqual);
}
