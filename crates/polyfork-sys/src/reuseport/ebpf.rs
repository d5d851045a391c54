//! The program by which the kernel takes exact turns, and the memory it shares with us.
//!
//! An `sk_reuseport` program runs for each packet that reaches the group's port and belongs to no
//! connection yet. Ours reads which slots are live, takes the next turn and selects that slot's
//! socket. Which slots are live is written by `Group`; nothing is detached or reloaded for a change.
//!
//! Two maps. `sockets`: index -> listening socket. `state`: one value, mapped into our memory too:
//!
//! | offset | type | meaning | written by |
//! | --- | --- | --- | --- |
//! | 0 | u64 | head: start of the live list (high half), its length (low half) | us |
//! | 8 | u64 | turns taken by connection requests (SYN) | program |
//! | 16 | u64 | turns taken by anything else | program |
//! | 24 | u64 | aim: an index into `sockets` (high half), and the source port that is meant for it, with bit 16 set | us |
//! | 32 | u32 x 2 x capacity | two banks of indices into `sockets` | us |
//! | after them | u64 x capacity | connection requests given to each index | program |
//!
//! A change writes the bank that is not in use and then the head, one atomic store: the program sees the old
//! list or the new one, never a mixture and never an index beyond the list.
//!
//! The surprising rule: only a SYN takes a turn from the first counter. Without that, a SYN flood
//! answered by cookies would cost each connection two turns (the SYN and the final ACK both come
//! here), and with two slots all connections would fall on the same one. What is not a SYN (cookie ACKs,
//! stray packets, connections that move from a closed listener) takes turns by the second counter.
//!
//! A connection of our own that shall reach one slot, live or not, is aimed by its source port (`Group::reach`). It takes
//! no turn and is not counted. Another client that happens to have the same port at that moment reaches that slot too.
//!
//! A counter goes on when the live set changes: turn t goes to entry `t % length` of the list as it is then.
//! It wraps after 2^64 connections, which is to say never.
//!
//! Behaviour follows: bpf(2), uapi `linux/bpf.h`, kernel `net/core/sock_reuseport.c` and
//! `net/core/filter.c` (`sk_reuseport_is_valid_access`, `BPF_CALL_4(sk_select_reuseport`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::LoadError;
use super::assembler::{Ins, Label, Reg, Size, assemble};

/// The most slots a group can have. A power of two: the program masks with it.
pub(super) const CAPACITY: usize = 4096;

const HEAD: usize = 0;
const TURNS: usize = 8;
const OTHER_TURNS: usize = 16;
const AIM: usize = 24;
const BANKS: usize = 32;
const GIVEN: usize = BANKS + 2 * CAPACITY * size_of::<u32>();
const STATE_BYTES: usize = GIVEN + CAPACITY * size_of::<u64>();

// uapi linux/bpf.h
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const PROG_LOAD: i32 = 5;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_REUSEPORT_SOCKARRAY: u32 = 20;
const PROG_TYPE_SK_REUSEPORT: u32 = 21;
const SK_REUSEPORT_SELECT_OR_MIGRATE: u32 = 40;
const F_MMAPABLE: u32 = 1 << 10;
const HELPER_SK_SELECT_REUSEPORT: i32 = 82;
const SK_PASS: i32 = 1;

/// No helper we call is for GPL programs only, so the kernel takes any licence: this is ours.
const LICENCE: &std::ffi::CStr = c"MIT OR Apache-2.0";
/// Shown by tools that list programs and maps.
const NAME: &[u8] = b"polyfork";
const LOG_BYTES: usize = 64 * 1024;

/// `struct sk_reuseport_md`: where the packet (from its TCP header on) starts and ends.
const MD_DATA: i16 = 0;
const MD_DATA_END: i16 = 8;
/// Offset of the source port in a TCP header.
const TCP_SOURCE: i16 = 0;
/// Says that there is an aim, whatever the port.
const AIMED: u64 = 1 << 16;
/// Offset of the flags in a TCP header, and the flags that make a connection request.
const TCP_FLAGS: i16 = 13;
const TCP_SYN_OR_ACK: i32 = 0x12;
const TCP_SYN: i32 = 0x02;

/// The program, for maps with these descriptors.
fn program(sockets: i32, state: i32) -> Vec<Ins> {
    use Ins::*;
    use Reg::*;
    let (other, turn, pass) = (Label("other"), Label("turn"), Label("pass"));
    let (short, unaimed, select) = (Label("short"), Label("unaimed"), Label("select"));
    let mask = (2 * CAPACITY - 1) as i32;
    vec![
        // The live list: r8 = its start, r6 = our argument for later, r2 = its length.
        Move(R6, R1),
        LoadMapValue(R7, state),
        Load(Size::Double, R8, R7, HEAD as i16),
        Move32(R0, R8),
        // A packet too short to look at is none that opens a connection.
        Load(Size::Double, R2, R6, MD_DATA),
        Load(Size::Double, R3, R6, MD_DATA_END),
        Move(R4, R2),
        AddNumber(R4, TCP_FLAGS as i32 + 1),
        JumpIfAbove(R4, R3, short),
        // Is it aimed at somebody?
        Load(Size::Double, R9, R7, AIM as i16),
        JumpIfEqual(R9, 0, unaimed),
        Move32(R1, R9),
        AndNumber(R1, 0xffff),
        Load(Size::Half, R4, R2, TCP_SOURCE),
        JumpIfOther(R1, R4, unaimed),
        ShiftRight(R9, 32),
        Store(Size::Word, R10, -4, R9),
        Jump(select),
        Here(short),
        JumpIfEqual(R0, 0, pass),
        Jump(other),
        // Which counter?
        Here(unaimed),
        JumpIfEqual(R0, 0, pass),
        Load(Size::Byte, R4, R2, TCP_FLAGS),
        AndNumber(R4, TCP_SYN_OR_ACK),
        JumpIfEqual(R4, TCP_SYN, turn),
        Here(other),
        Set(R1, 1),
        FetchAdd(R7, OTHER_TURNS as i16, R1),
        Set(R9, 0),
        Jump(Label("taken")),
        Here(turn),
        Set(R9, 1),
        Set(R1, 1),
        FetchAdd(R7, TURNS as i16, R1),
        // r1 = the turn. Index of the socket = list[turn % length].
        Here(Label("taken")),
        Modulo(R1, R0),
        ShiftRight(R8, 32),
        Add(R1, R8),
        AndNumber(R1, mask),
        ShiftLeft(R1, 2),
        Add(R7, R1),
        Load(Size::Word, R3, R7, BANKS as i16),
        Store(Size::Word, R10, -4, R3),
        // Count it for that socket, if it is a connection request.
        AndNumber(R3, CAPACITY as i32 - 1),
        ShiftLeft(R3, 3),
        LoadMapValue(R1, state),
        Add(R1, R3),
        AddNumber(R1, GIVEN as i32),
        FetchAdd(R1, 0, R9),
        Here(select),
        // Select it. Should that fail (the slot left meanwhile), the kernel's own hash decides.
        Move(R1, R6),
        LoadMap(R2, sockets),
        Move(R3, R10),
        AddNumber(R3, -4),
        Set(R4, 0),
        Call(HELPER_SK_SELECT_REUSEPORT),
        Here(pass),
        Set(R0, SK_PASS),
        Exit,
    ]
}

/// The loaded program with its maps.
#[derive(Debug)]
pub(super) struct Selector {
    program: OwnedFd,
    sockets: OwnedFd,
    state: State,
}

impl Selector {
    /// Makes the maps and loads the program.
    pub(super) fn load() -> Result<Self, LoadError> {
        let sockets = create_map(MAP_TYPE_REUSEPORT_SOCKARRAY, 8, CAPACITY as u32, 0)
            .map_err(|errno| LoadError::new("create the map of sockets", errno))?;
        let map = create_map(MAP_TYPE_ARRAY, STATE_BYTES as u32, 1, F_MMAPABLE)
            .map_err(|errno| LoadError::new("create the map of turns", errno))?;
        let words = assemble(&program(sockets.as_raw_fd(), map.as_raw_fd()));
        let program = load_program(&words)?;
        let state =
            State::new(map).map_err(|errno| LoadError::new("share the map of turns", errno))?;
        Ok(Self { program, sockets, state })
    }

    /// A program that was loaded by another image of this process, with its maps.
    pub(super) fn adopt(program: OwnedFd, sockets: OwnedFd, state: OwnedFd) -> io::Result<Self> {
        let mut state = State::new(state)?;
        let head = state.counter(HEAD).load(Ordering::SeqCst);
        state.bank = usize::from((head >> 32) as usize >= CAPACITY);
        Ok(Self { program, sockets, state })
    }

    /// The program, its map of sockets and its memory.
    pub(super) fn descriptors(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.program.as_fd(), self.sockets.as_fd(), self.state.map.as_fd())
    }

    /// Puts a listening member of the group at `index`.
    pub(super) fn put(&self, index: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = u64::from(socket.as_raw_fd().cast_unsigned());
        let attr = MapElement {
            map_fd: self.sockets.as_raw_fd().cast_unsigned(),
            _pad: 0,
            key: address(&index),
            value: address(&value),
            flags: 0,
        };
        bpf(MAP_UPDATE_ELEM, &attr).map(drop)
    }

    /// Empties `index`. Fine if it is empty.
    pub(super) fn clear(&self, index: u32) -> io::Result<()> {
        let attr = MapElement {
            map_fd: self.sockets.as_raw_fd().cast_unsigned(),
            _pad: 0,
            key: address(&index),
            value: 0,
            flags: 0,
        };
        match bpf(MAP_DELETE_ELEM, &attr) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Replaces the live list; from the next packet on it decides.
    pub(super) fn set_live(&mut self, indices: &[u32]) {
        self.state.set_live(indices);
    }

    pub(super) fn turns(&self) -> u64 {
        self.state.counter(TURNS).load(Ordering::Relaxed)
    }

    /// Whatever comes from this source port goes to `index`, until the next call; `None` ends it.
    pub(super) fn aim(&self, at: Option<(u32, u16)>) {
        let word = at.map_or(0, |(index, port)| {
            // As the program reads it from the packet.
            let port = u16::from_ne_bytes(port.to_be_bytes());
            u64::from(index) << 32 | AIMED | u64::from(port)
        });
        self.state.counter(AIM).store(word, Ordering::SeqCst);
    }

    /// Connection requests given to `index` since the program exists.
    pub(super) fn given(&self, index: u32) -> u64 {
        let number = index as usize % CAPACITY;
        self.state.counter(GIVEN + number * size_of::<u64>()).load(Ordering::Relaxed)
    }
}

/// Attaches the program to the group of `member`.
pub(super) fn attach(member: BorrowedFd<'_>, selector: &Selector) -> io::Result<()> {
    super::set_option(member, libc::SO_ATTACH_REUSEPORT_EBPF, &selector.program.as_raw_fd())
}

/// The `state` map in our memory. Only this type writes head and banks.
#[derive(Debug)]
struct State {
    base: NonNull<u8>,
    bytes: usize,
    bank: usize,
    map: OwnedFd,
}

// SAFETY: the mapping belongs to the process; all access goes through atomics.
unsafe impl Send for State {}
// SAFETY: as above; `&State` only reads.
unsafe impl Sync for State {}

impl State {
    fn new(map: OwnedFd) -> io::Result<Self> {
        let bytes = STATE_BYTES.next_multiple_of(rustix::param::page_size());
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = map.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice; the map's memory is at least a
        // whole number of pages (array maps that can be mapped are rounded up).
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, bytes, bank: 0, map })
    }

    fn counter(&self, offset: usize) -> &AtomicU64 {
        let place = self.base.as_ptr().wrapping_add(offset).cast::<u64>();
        // SAFETY: `offset` is one of the four u64 fields or that of one of the counters behind the banks, all inside the
        // mapping and aligned to 8 (the base is page-aligned), mapped as long as `self`, and written by the kernel side with atomics only.
        unsafe { AtomicU64::from_ptr(place) }
    }

    fn entry(&self, bank: usize, index: usize) -> &AtomicU32 {
        let number = (bank % 2) * CAPACITY + index % CAPACITY;
        let place = self.base.as_ptr().wrapping_add(BANKS + number * size_of::<u32>());
        // SAFETY: `number` is below 2 x CAPACITY, so the place is inside the mapping; aligned to 4;
        // mapped as long as `self`; the kernel side only reads it.
        unsafe { AtomicU32::from_ptr(place.cast()) }
    }

    fn set_live(&mut self, indices: &[u32]) {
        let bank = 1 - self.bank;
        let indices = &indices[..indices.len().min(CAPACITY)];
        for (position, index) in indices.iter().enumerate() {
            self.entry(bank, position).store(*index, Ordering::Relaxed);
        }
        let head = ((bank * CAPACITY) as u64) << 32 | indices.len() as u64;
        self.counter(HEAD).store(head, Ordering::SeqCst);
        self.bank = bank;
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; references into it end with `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, as far as we use it.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

/// ... for the commands on elements.
#[repr(C)]
struct MapElement {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// ... for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

const _: () = assert!(std::mem::offset_of!(MapCreate, map_name) == 28);
const _: () = assert!(std::mem::offset_of!(ProgLoad, prog_name) == 48);
const _: () = assert!(std::mem::offset_of!(ProgLoad, expected_attach_type) == 68);
const _: () = assert!(size_of::<MapElement>() == 32);

fn address<T: ?Sized>(value: &T) -> u64 {
    ptr::from_ref(value).expose_provenance() as u64
}

fn name() -> [u8; 16] {
    let mut name = [0; 16];
    name[..NAME.len()].copy_from_slice(NAME);
    name
}

/// Calls bpf(2). `A` is one of the structures above.
fn bpf<A>(command: i32, attr: &A) -> io::Result<i32> {
    let place = ptr::from_ref(attr);
    // SAFETY: `attr` is a prefix of `union bpf_attr` of the size given with it; the addresses in it are
    // those of values that the caller keeps alive over the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, place, size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(number: i32) -> OwnedFd {
    // SAFETY: called with the result of a bpf(2) command that makes a descriptor, which is ours alone.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn create_map(kind: u32, value_bytes: u32, entries: u32, flags: u32) -> io::Result<OwnedFd> {
    let attr = MapCreate {
        map_type: kind,
        key_size: 4,
        value_size: value_bytes,
        max_entries: entries,
        map_flags: flags,
        inner_map_fd: 0,
        numa_node: 0,
        map_name: name(),
    };
    bpf(MAP_CREATE, &attr).map(owned)
}

/// Loads the program; when the verifier refuses, loads it again to get its log.
fn load_program(words: &[u64]) -> Result<OwnedFd, LoadError> {
    let mut attr = ProgLoad {
        prog_type: PROG_TYPE_SK_REUSEPORT,
        insn_cnt: words.len() as u32,
        insns: address(words),
        license: LICENCE.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: name(),
        prog_ifindex: 0,
        expected_attach_type: SK_REUSEPORT_SELECT_OR_MIGRATE,
    };
    let first = match bpf(PROG_LOAD, &attr) {
        Ok(number) => return Ok(owned(number)),
        Err(error) => error,
    };
    let mut error = LoadError::new("load the program", first);
    if matches!(error.errno.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) {
        return Err(error);
    }
    let mut log = vec![0u8; LOG_BYTES];
    attr.log_level = 1;
    attr.log_size = LOG_BYTES as u32;
    attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    match bpf(PROG_LOAD, &attr) {
        // What stood in the way has gone.
        Ok(number) => Ok(owned(number)),
        Err(_) => {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            let text = String::from_utf8_lossy(&log[..end]).trim().to_owned();
            error.log = (!text.is_empty()).then_some(text);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_short() {
        assert!(assemble(&program(3, 4)).len() < 64);
    }

    #[test]
    fn a_refused_program_comes_with_the_verifier_log() {
        if let Err(error) = Selector::load() {
            eprintln!("skipped: {error}");
            return;
        }
        // Returns without setting R0.
        let error = load_program(&assemble(&[Ins::Exit])).unwrap_err();
        assert!(error.log.as_deref().is_some_and(|log| log.contains("R0")), "{error:?}");
    }
}
