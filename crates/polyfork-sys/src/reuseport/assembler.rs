//! A tiny assembler for the eBPF instructions our program uses, and for labels.
//!
//! Readable programs in, 64-bit words out. What the program means is in `ebpf`.
//!
//! Behaviour follows: RFC 9669 (BPF instruction set), uapi `linux/bpf.h`.

/// A register. `R0` holds results, `R1`..`R5` arguments, `R6`..`R9` survive calls, `R10` is the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R9,
    R10,
}

impl Reg {
    fn number(self) -> u8 {
        match self {
            Self::R0 => 0,
            Self::R1 => 1,
            Self::R2 => 2,
            Self::R3 => 3,
            Self::R4 => 4,
            Self::R6 => 6,
            Self::R7 => 7,
            Self::R8 => 8,
            Self::R9 => 9,
            Self::R10 => 10,
        }
    }
}

/// Width of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Byte,
    Half,
    Word,
    Double,
}

impl Size {
    fn bits(self) -> u8 {
        match self {
            Self::Word => 0x00,
            Self::Half => 0x08,
            Self::Byte => 0x10,
            Self::Double => 0x18,
        }
    }
}

/// A place in the program to jump to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(pub(super) &'static str);

/// One instruction. Arithmetic is on 64 bits unless named otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ins {
    /// `a = b`
    Move(Reg, Reg),
    /// `a = number`
    Set(Reg, i32),
    /// `a = lower half of b`, upper half zero
    Move32(Reg, Reg),
    /// `a += b`
    Add(Reg, Reg),
    /// `a += number`
    AddNumber(Reg, i32),
    /// `a %= b`, unsigned
    Modulo(Reg, Reg),
    /// `a &= number`
    AndNumber(Reg, i32),
    /// `a <<= number`
    ShiftLeft(Reg, i32),
    /// `a >>= number`, zeros coming in
    ShiftRight(Reg, i32),
    /// `a = *(b + offset)`, zero-extended
    Load(Size, Reg, Reg, i16),
    /// `*(a + offset) = b`
    Store(Size, Reg, i16, Reg),
    /// `b` gets the old 64-bit value of `*(a + offset)`, to which the old `b` was added, as one step
    FetchAdd(Reg, i16, Reg),
    /// `a = the address of map` (by descriptor)
    LoadMap(Reg, i32),
    /// `a = the address of the map's first value`
    LoadMapValue(Reg, i32),
    /// go to `label` if `a == number`
    JumpIfEqual(Reg, i32, Label),
    /// go to `label` if `a != b`
    JumpIfOther(Reg, Reg, Label),
    /// go to `label` if `a > b`, unsigned
    JumpIfAbove(Reg, Reg, Label),
    /// go to `label`
    Jump(Label),
    /// a place to jump to; takes no room
    Here(Label),
    /// call a helper of the kernel
    Call(i32),
    /// return `R0`
    Exit,
}

// Classes and modes of the instruction set.
const LD_IMM_DOUBLE: u8 = 0x18;
const LDX_MEM: u8 = 0x61;
const STX_MEM: u8 = 0x63;
const STX_ATOMIC_DOUBLE: u8 = 0xdb;
const ALU64_NUMBER: u8 = 0x07;
const ALU64_REGISTER: u8 = 0x0f;
const ALU32_REGISTER: u8 = 0x0c;
const JMP_NUMBER: u8 = 0x05;
const JMP_REGISTER: u8 = 0x0d;
const OP_ADD: u8 = 0x00;
const OP_AND: u8 = 0x50;
const OP_SHIFT_LEFT: u8 = 0x60;
const OP_SHIFT_RIGHT: u8 = 0x70;
const OP_MODULO: u8 = 0x90;
const OP_MOVE: u8 = 0xb0;
const OP_JUMP_EQUAL: u8 = 0x10;
const OP_JUMP_OTHER: u8 = 0x50;
const OP_JUMP_ABOVE: u8 = 0x20;
const OP_CALL: u8 = 0x80;
const OP_EXIT: u8 = 0x90;
/// `BPF_ADD | BPF_FETCH`.
const ATOMIC_FETCH_ADD: i32 = 0x01;
const PSEUDO_MAP: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;

/// `struct bpf_insn` as a number: code, registers (destination in the low half), offset, immediate.
fn word(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    u64::from_le_bytes([code, to | from << 4, 0, 0, 0, 0, 0, 0])
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(number.cast_unsigned()) << 32
}

impl Ins {
    /// How many words it takes.
    fn width(self) -> usize {
        match self {
            Self::Here(_) => 0,
            Self::LoadMap(..) | Self::LoadMapValue(..) => 2,
            _ => 1,
        }
    }

    fn label(self) -> Option<Label> {
        match self {
            Self::JumpIfEqual(_, _, label)
            | Self::JumpIfOther(_, _, label)
            | Self::JumpIfAbove(_, _, label)
            | Self::Jump(label) => Some(label),
            _ => None,
        }
    }

    /// Appends the words; `jump` is the distance to the label, if there is one.
    fn emit(self, jump: i16, words: &mut Vec<u64>) {
        let register = |op, a: Reg, b: Reg| word(ALU64_REGISTER | op, a.number(), b.number(), 0, 0);
        let number = |op, a: Reg, n| word(ALU64_NUMBER | op, a.number(), 0, 0, n);
        let last = match self {
            Self::Here(_) => return,
            Self::Move(a, b) => register(OP_MOVE, a, b),
            Self::Set(a, n) => number(OP_MOVE, a, n),
            Self::Move32(a, b) => word(ALU32_REGISTER | OP_MOVE, a.number(), b.number(), 0, 0),
            Self::Add(a, b) => register(OP_ADD, a, b),
            Self::AddNumber(a, n) => number(OP_ADD, a, n),
            Self::Modulo(a, b) => register(OP_MODULO, a, b),
            Self::AndNumber(a, n) => number(OP_AND, a, n),
            Self::ShiftLeft(a, n) => number(OP_SHIFT_LEFT, a, n),
            Self::ShiftRight(a, n) => number(OP_SHIFT_RIGHT, a, n),
            Self::Load(size, a, b, at) => {
                word(LDX_MEM | size.bits(), a.number(), b.number(), at, 0)
            }
            Self::Store(size, a, at, b) => {
                word(STX_MEM | size.bits(), a.number(), b.number(), at, 0)
            }
            Self::FetchAdd(a, at, b) => {
                word(STX_ATOMIC_DOUBLE, a.number(), b.number(), at, ATOMIC_FETCH_ADD)
            }
            Self::LoadMap(a, fd) => {
                words.push(word(LD_IMM_DOUBLE, a.number(), PSEUDO_MAP, 0, fd));
                0
            }
            Self::LoadMapValue(a, fd) => {
                words.push(word(LD_IMM_DOUBLE, a.number(), PSEUDO_MAP_VALUE, 0, fd));
                0
            }
            Self::JumpIfEqual(a, n, _) => word(JMP_NUMBER | OP_JUMP_EQUAL, a.number(), 0, jump, n),
            Self::JumpIfOther(a, b, _) => {
                word(JMP_REGISTER | OP_JUMP_OTHER, a.number(), b.number(), jump, 0)
            }
            Self::JumpIfAbove(a, b, _) => {
                word(JMP_REGISTER | OP_JUMP_ABOVE, a.number(), b.number(), jump, 0)
            }
            Self::Jump(_) => word(JMP_NUMBER, 0, 0, jump, 0),
            Self::Call(helper) => word(JMP_NUMBER | OP_CALL, 0, 0, 0, helper),
            Self::Exit => word(JMP_NUMBER | OP_EXIT, 0, 0, 0, 0),
        };
        words.push(last);
    }
}

/// Turns a program into words.
///
/// # Panics
///
/// When a label is missing or out of reach: a mistake in the program text, found by its first test.
pub(super) fn assemble(program: &[Ins]) -> Vec<u64> {
    let mut places = Vec::new();
    let mut at = 0;
    for ins in program {
        if let Ins::Here(label) = ins {
            places.push((*label, at));
        }
        at += ins.width();
    }
    let mut words = Vec::with_capacity(at);
    for ins in program {
        let jump = ins.label().map_or(0, |label| {
            let found = places.iter().find(|(name, _)| *name == label);
            let (_, target) = found.expect("every label of the program has a place");
            let next = words.len() + ins.width();
            i16::try_from(*target as isize - next as isize).expect("the program is short")
        });
        ins.emit(jump, &mut words);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_specification() {
        let end = Label("end");
        let words = assemble(&[
            Ins::Move(Reg::R6, Reg::R1),
            Ins::LoadMap(Reg::R2, 5),
            Ins::JumpIfEqual(Reg::R2, 0, end),
            Ins::Store(Size::Word, Reg::R10, -4, Reg::R3),
            Ins::FetchAdd(Reg::R7, 8, Reg::R1),
            Ins::Call(82),
            Ins::Here(end),
            Ins::Set(Reg::R0, 1),
            Ins::Exit,
        ]);
        assert_eq!(
            words,
            [
                0x0000_0000_0000_16bf, // r6 = r1
                0x0000_0005_0000_1218, // r2 = map 5 ...
                0,                     // ... second half
                0x0000_0000_0003_0215, // if r2 == 0 goto +3
                0x0000_0000_fffc_3a63, // *(u32 *)(r10 - 4) = r3
                0x0000_0001_0008_17db, // r1 = fetch_add(r7 + 8, r1)
                0x0000_0052_0000_0085, // call 82
                0x0000_0001_0000_00b7, // r0 = 1
                0x0000_0000_0000_0095, // exit
            ]
        );
    }
}
