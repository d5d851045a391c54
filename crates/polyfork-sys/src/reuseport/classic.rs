//! Random choice over live slots by a classic BPF program, which needs no privilege.
//!
//! A classic program cannot count and has no maps: it returns a position in the kernel's array of the
//! group's sockets. So a new program is made and attached for each change of the live set (the
//! kernel swaps it in one step), and we keep a model of that array.
//!
//! The array's order follows kernel `net/core/sock_reuseport.c`: `__reuseport_add_sock` appends when a socket
//! starts to listen, `__reuseport_detach_sock` moves the last into the place of one that stops
//! (`reuseport_grow` keeps the order). [`Positions`] does the same. A program that returns a position
//! beyond the array makes the kernel fall back to its hash (`run_bpf_filter`, `reuseport_select_sock`).
//!
//! Behaviour follows: socket(7) `SO_ATTACH_REUSEPORT_CBPF`, kernel networking/filter documentation.

use std::io;
use std::os::fd::BorrowedFd;

/// The most live positions one program can name (two instructions each, at most 4096, and a system
/// limit of 20 kB per program on older kernels).
pub(super) const MAX_LIVE: usize = 1000;

const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const MODULO: u16 = 0x94; // BPF_ALU | BPF_MOD | BPF_K
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const RETURN_A: u16 = 0x16; // BPF_RET | BPF_A
/// `SKF_AD_OFF + SKF_AD_RANDOM`: loading from here gives a random number.
const RANDOM: u32 = (-0x1000 + 56_i32).cast_unsigned();
/// A position no group has: "let the hash decide".
const NOBODY: u32 = u32::MAX;

type Filter = libc::sock_filter;

fn ins(code: u16, k: u32) -> Filter {
    Filter { code, jt: 0, jf: 0, k }
}

/// A program that returns one of `live` at random.
fn program(live: &[u32]) -> Vec<Filter> {
    let count = live.len() as u32;
    if count == 0 {
        return vec![ins(RETURN, NOBODY)];
    }
    let mut program = vec![ins(LOAD_WORD, RANDOM), ins(MODULO, count)];
    // All of the first positions, the usual case: the random number is the position.
    if live.iter().enumerate().all(|(index, position)| index as u32 == *position) {
        program.push(ins(RETURN_A, 0));
        return program;
    }
    for (index, position) in live.iter().enumerate() {
        let equal = Filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: index as u32 };
        program.extend([equal, ins(RETURN, *position)]);
    }
    program.push(ins(RETURN, NOBODY));
    program
}

/// Attaches a program that picks among `live` positions to the group of `member`, replacing any other.
pub(super) fn attach(member: BorrowedFd<'_>, live: &[u32]) -> io::Result<()> {
    if live.len() > MAX_LIVE {
        let text =
            format!("{} live slots, a classic program can choose among {MAX_LIVE}", live.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut program = program(live);
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    super::set_option(member, libc::SO_ATTACH_REUSEPORT_CBPF, &filter)
}

/// The model of the kernel's array: which slot stands at which position.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Positions(Vec<u32>);

impl Positions {
    /// As another image of this process knew them.
    pub(super) fn from_order(order: Vec<u32>) -> Positions {
        Positions(order)
    }

    /// All slots in the order of their positions.
    pub(super) fn all(&self) -> &[u32] {
        &self.0
    }

    /// A slot's socket has started to listen.
    pub(super) fn append(&mut self, slot: u32) {
        self.0.push(slot);
    }

    /// A slot's socket has stopped to listen.
    pub(super) fn remove(&mut self, slot: u32) {
        if let Some(position) = self.position(slot) {
            self.0.swap_remove(position as usize);
        }
    }

    pub(super) fn position(&self, slot: u32) -> Option<u32> {
        self.0.iter().position(|one| *one == slot).map(|position| position as u32)
    }

    /// The positions of `slots`, in their order.
    pub(super) fn of(&self, slots: &[u32]) -> Vec<u32> {
        slots.iter().filter_map(|slot| self.position(*slot)).collect()
    }

    /// The slot that will be moved when another stops.
    pub(super) fn last(&self) -> Option<u32> {
        self.0.last().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, with a given "random" number.
    fn run(program: &[Filter], random: u32) -> u32 {
        let mut a = 0;
        let mut at = 0;
        loop {
            let ins = program[at];
            at += 1;
            match ins.code {
                LOAD_WORD => a = random,
                MODULO => a %= ins.k,
                JUMP_EQUAL => at += usize::from(if a == ins.k { ins.jt } else { ins.jf }),
                RETURN => return ins.k,
                RETURN_A => return a,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn every_live_position_is_picked_equally_and_no_other() {
        for live in [vec![], vec![0], vec![3], vec![0, 1, 2], vec![2, 0], vec![5, 1, 9, 700]] {
            let program = program(&live);
            let rounds = 12 * live.len().max(1) as u32;
            let picked: Vec<u32> = (0..rounds).map(|random| run(&program, random)).collect();
            for position in &live {
                assert_eq!(picked.iter().filter(|one| *one == position).count(), 12);
            }
            if live.is_empty() {
                assert!(picked.iter().all(|one| *one == NOBODY));
            }
        }
    }

    #[test]
    fn the_longest_program_keeps_to_the_kernel_limits() {
        let live: Vec<u32> = (1..=MAX_LIVE as u32).collect();
        let program = program(&live);
        assert!(program.len() <= 4096 && program.len() * size_of::<Filter>() <= 20 * 1024);
        assert_eq!(run(&program, MAX_LIVE as u32 - 1), MAX_LIVE as u32);
    }

    #[test]
    fn the_last_moves_into_a_gap() {
        let mut positions = Positions::default();
        for slot in [10, 11, 12, 13] {
            positions.append(slot);
        }
        positions.remove(11);
        assert_eq!(positions.of(&[10, 13, 12]), [0, 1, 2]);
        positions.append(11);
        assert_eq!(positions.position(11), Some(3));
        assert_eq!(positions.last(), Some(11));
    }
}
