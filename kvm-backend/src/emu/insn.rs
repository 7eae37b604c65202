// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The compact form of a decoded instruction.

/// What an instruction does. Operand sizes and operands stand in [`Insn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's mnemonics
pub(super) enum Op {
    Mov,
    Movzx,
    Movsx,
    Movbe,
    Lea,
    Alu(Alu),
    Neg,
    Not,
    Inc,
    Dec,
    /// One-operand forms, with the accumulator.
    MulWide,
    ImulWide,
    /// Two- and three-operand form.
    Imul,
    Div,
    Idiv,
    Shift(Shift),
    Shld,
    Shrd,
    Bit(Bit),
    Xchg,
    Xadd,
    Cmpxchg,
    /// cmpxchg8b and cmpxchg16b; `size` is that of one half.
    CmpxchgPair,
    Jcc,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
    Loop(Loop),
    Push,
    Pop,
    Pushf,
    Popf,
    Leave,
    Setcc,
    Cmov,
    /// cbw, cwde, cdqe: `size` is the result's.
    ExtendA,
    /// cwd, cdq, cqo.
    ExtendD,
    Bswap,
    Bsf,
    Bsr,
    Popcnt,
    Tzcnt,
    Lzcnt,
    Str(Str),
    Nop,
    Pause,
    Fence,
    /// clflush and its kin: a one-byte load as far as permissions go.
    Clflush,
    Clc,
    Stc,
    Cmc,
    Cld,
    Std,
    Lahf,
    Sahf,
    Xlat,
    Cpuid,
    Rdtsc,
    Int,
    Int3,
    Int1,
    Ud,
    Hlt,
    Invlpg,
    Invpcid,
    ReadCr,
    WriteCr,
    In,
    Out,
    Rdmsr,
    Wrmsr,
    /// cli and sti: #GP with IOPL 0.
    Gp,
    Unsupported,
}

/// Two-operand arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    Test,
}

/// Shifts and rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    Rcl,
    Rcr,
}

/// Bit tests: what becomes of the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bit {
    Keep,
    Set,
    Reset,
    Complement,
}

/// loop, loope, loopne, jrcxz.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loop {
    Always,
    Equal,
    NotEqual,
    Rcxz,
}

/// String instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Str {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

/// One operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    /// Absent.
    None,
    /// A general register (its low part), by hardware number.
    Gpr(u8),
    /// ah, ch, dh, bh: bits 15:8 of the register with this number.
    High(u8),
    /// The memory operand [`Insn::mem`].
    Mem,
    /// [`Insn::imm`].
    Imm,
}

/// Segments that matter in 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seg {
    /// Base zero.
    Flat,
    /// Base zero; non-canonical addresses are #SS.
    Stack,
    /// FS.
    Fs,
    /// GS.
    Gs,
}

/// [`Mem::base`] and [`Mem::index`]: no register.
pub(super) const NO_REG: u8 = 16;

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mem {
    /// Displacement; for rip-relative operands the whole address.
    pub disp: u64,
    /// Base register, or [`NO_REG`].
    pub base: u8,
    /// Index register, or [`NO_REG`].
    pub index: u8,
    /// log2 of the scale.
    pub shift: u8,
    /// Segment.
    pub seg: Seg,
    /// 32-bit addresses (prefix 67).
    pub addr32: bool,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Insn {
    /// What it does.
    pub op: Op,
    /// Operand size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Size of the source operand, where it differs (movzx, movsx).
    pub src_size: u8,
    /// Length in bytes.
    pub len: u8,
    /// Condition code as encoded by the hardware (jcc, setcc, cmovcc); number of a control register.
    pub cond: u8,
    /// Prefix lock, or implied.
    pub lock: bool,
    /// Prefix F3.
    pub rep: bool,
    /// Prefix F2.
    pub repne: bool,
    /// First operand.
    pub dst: Operand,
    /// Second operand.
    pub src: Operand,
    /// Third operand.
    pub third: Operand,
    /// The memory operand, if any.
    pub mem: Mem,
    /// Immediate operand, branch target, or the immediate of `ret`.
    pub imm: u64,
}
