// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From iced-x86's instruction to ours.

use super::insn::{Alu, Bit, Insn, Loop, Mem, NO_REG, Op, Operand, Seg, Shift, Str};
use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register,
};

/// What the bytes turned out to be.
pub(super) enum Lowered {
    Insn(Insn),
    /// The bytes are the beginning of an instruction.
    NeedMore,
    /// No instruction.
    Invalid,
}

/// Decodes the instruction at the start of `bytes`, whose address is `rip`.
pub(super) fn decode(bytes: &[u8], rip: u64) -> Lowered {
    let Ok(mut decoder) = Decoder::try_with_ip(64, bytes, rip, DecoderOptions::NONE) else {
        return Lowered::Invalid;
    };
    let i = decoder.decode();
    match decoder.last_error() {
        DecoderError::None if !i.is_invalid() => Lowered::Insn(lower(&i)),
        DecoderError::NoMoreBytes => Lowered::NeedMore,
        _ => Lowered::Invalid,
    }
}

/// An instruction without operands that is not executed; `len` is to be set.
pub(super) fn unsupported_insn() -> Insn {
    Insn {
        op: Op::Unsupported,
        size: 8,
        src_size: 8,
        len: 1,
        cond: 0,
        lock: false,
        rep: false,
        repne: false,
        dst: Operand::None,
        src: Operand::None,
        third: Operand::None,
        mem: Mem { disp: 0, base: NO_REG, index: NO_REG, shift: 0, seg: Seg::Flat, addr32: false },
        imm: 0,
    }
}

fn lower(i: &Instruction) -> Insn {
    let none = Insn { len: i.len() as u8, ..unsupported_insn() };
    if let Some(insn) = lower_special(i, none) {
        return insn;
    }
    let op = plain_op(i.mnemonic());
    if op == Op::Unsupported {
        return none;
    }
    let mut insn = Insn { op, lock: i.has_lock_prefix(), ..none };
    let count = i.op_count();
    for (n, slot) in [&mut insn.dst, &mut insn.src, &mut insn.third].into_iter().enumerate() {
        if n as u32 >= count {
            break;
        }
        match operand(i, n as u32) {
            Some(o) => *slot = o,
            None => return none,
        }
    }
    if count > 3 {
        return none;
    }
    for n in 0..count {
        match i.op_kind(n) {
            OpKind::Memory => insn.mem = memory(i),
            OpKind::Register => {}
            _ => insn.imm = i.try_immediate(n).unwrap_or(0),
        }
    }
    let sizes = (operand_size(i, 0), if count > 1 { operand_size(i, 1) } else { None });
    insn.size = sizes.0.unwrap_or(8);
    insn.src_size = sizes.1.unwrap_or(insn.size);
    insn.cond = (i.condition_code() as u8).wrapping_sub(1) & 15;
    match op {
        // Without lock too: xchg with memory always is.
        Op::Xchg => {
            insn.lock = true;
            if insn.src == Operand::Mem {
                (insn.dst, insn.src) = (insn.src, insn.dst);
            }
        }
        Op::CmpxchgPair => {
            insn.size = if i.mnemonic() == Mnemonic::Cmpxchg16b { 8 } else { 4 };
            insn.src_size = insn.size;
        }
        // The stack operand's size is that of the change of rsp.
        Op::Push | Op::Pop | Op::Pushf | Op::Popf => {
            insn.size = i.stack_pointer_increment().unsigned_abs() as u8;
        }
        Op::Leave if i.code() == Code::Leavew => return none,
        // With prefix 66 some processors take 16 bits, others 64.
        Op::JmpIndirect | Op::CallIndirect if insn.size != 8 => return none,
        Op::Imul if count == 1 => insn.op = Op::ImulWide,
        Op::Xlat => insn.mem = memory(i),
        _ => {}
    }
    if !matches!(insn.size, 1 | 2 | 4 | 8) || !matches!(insn.src_size, 1 | 2 | 4 | 8) {
        return none;
    }
    insn
}

/// The instructions whose operands need a closer look.
fn lower_special(i: &Instruction, none: Insn) -> Option<Insn> {
    if i.is_string_instruction() {
        return Some(string(i, none));
    }
    let branch = |op| Insn { op, imm: i.near_branch_target(), ..none };
    let cc = (i.condition_code() as u8).wrapping_sub(1) & 15;
    Some(match i.mnemonic() {
        Mnemonic::Jmp if i.op0_kind() == OpKind::NearBranch64 => branch(Op::Jmp),
        Mnemonic::Call if i.op0_kind() == OpKind::NearBranch64 => branch(Op::Call),
        Mnemonic::Jmp | Mnemonic::Call
            if !matches!(i.op0_kind(), OpKind::Register | OpKind::Memory)
                || i.is_jmp_far_indirect()
                || i.is_call_far_indirect() =>
        {
            none
        }
        Mnemonic::Loop => loop_op(i, branch(Op::Loop(Loop::Always))),
        Mnemonic::Loope => loop_op(i, branch(Op::Loop(Loop::Equal))),
        Mnemonic::Loopne => loop_op(i, branch(Op::Loop(Loop::NotEqual))),
        Mnemonic::Jrcxz => branch(Op::Loop(Loop::Rcxz)),
        Mnemonic::Jecxz => loop_op(i, branch(Op::Loop(Loop::Rcxz))),
        _ if i.is_jcc_short_or_near() => Insn { cond: cc, ..branch(Op::Jcc) },
        Mnemonic::Ret => {
            let imm = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
            let pops = i.stack_pointer_increment();
            if pops < 8 || pops as u64 != 8 + imm {
                return Some(none);
            }
            Insn { op: Op::Ret, imm, ..none }
        }
        Mnemonic::Mov if is_cr(i.op0_register()) => Insn {
            op: Op::WriteCr,
            cond: i.op0_register().number() as u8,
            src: gpr(i.op1_register())?,
            ..none
        },
        Mnemonic::Mov if is_cr(i.op1_register()) => Insn {
            op: Op::ReadCr,
            cond: i.op1_register().number() as u8,
            dst: gpr(i.op0_register())?,
            ..none
        },
        Mnemonic::In | Mnemonic::Out => {
            let input = i.mnemonic() == Mnemonic::In;
            let (acc, port) = if input { (0, 1) } else { (1, 0) };
            let by_dx = i.op_kind(port) == OpKind::Register;
            Insn {
                op: if input { Op::In } else { Op::Out },
                size: i.op_register(acc).size() as u8,
                src: if by_dx { Operand::Gpr(2) } else { Operand::Imm },
                imm: if by_dx { 0 } else { u64::from(i.immediate8()) },
                ..none
            }
        }
        Mnemonic::Int => Insn { op: Op::Int, imm: u64::from(i.immediate8()), ..none },
        Mnemonic::Invlpg => Insn { op: Op::Invlpg, mem: memory(i), ..none },
        Mnemonic::Invpcid => Insn {
            op: Op::Invpcid,
            dst: gpr(i.op0_register())?,
            src: Operand::Mem,
            mem: memory(i),
            ..none
        },
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => {
            Insn { op: Op::Clflush, mem: memory(i), ..none }
        }
        // Operands of a nop are not looked at.
        Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw => Insn { op: Op::Nop, ..none },
        m => match bare_op(m) {
            Some((op, size)) => Insn { op, size, ..none },
            None => return None,
        },
    })
}

/// Instructions without explicit operands, and their operand size.
fn bare_op(m: Mnemonic) -> Option<(Op, u8)> {
    Some(match m {
        Mnemonic::Cbw => (Op::ExtendA, 2),
        Mnemonic::Cwde => (Op::ExtendA, 4),
        Mnemonic::Cdqe => (Op::ExtendA, 8),
        Mnemonic::Cwd => (Op::ExtendD, 2),
        Mnemonic::Cdq => (Op::ExtendD, 4),
        Mnemonic::Cqo => (Op::ExtendD, 8),
        Mnemonic::Pause => (Op::Pause, 8),
        Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => (Op::Fence, 8),
        Mnemonic::Clc => (Op::Clc, 8),
        Mnemonic::Stc => (Op::Stc, 8),
        Mnemonic::Cmc => (Op::Cmc, 8),
        Mnemonic::Cld => (Op::Cld, 8),
        Mnemonic::Std => (Op::Std, 8),
        Mnemonic::Lahf => (Op::Lahf, 8),
        Mnemonic::Sahf => (Op::Sahf, 8),
        Mnemonic::Cpuid => (Op::Cpuid, 8),
        Mnemonic::Rdtsc => (Op::Rdtsc, 8),
        Mnemonic::Int3 => (Op::Int3, 8),
        Mnemonic::Int1 => (Op::Int1, 8),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Syscall => (Op::Ud, 8),
        Mnemonic::Hlt => (Op::Hlt, 8),
        Mnemonic::Rdmsr => (Op::Rdmsr, 8),
        Mnemonic::Wrmsr => (Op::Wrmsr, 8),
        Mnemonic::Cli | Mnemonic::Sti => (Op::Gp, 8),
        _ => return None,
    })
}

/// Instructions with ordinary operands.
fn plain_op(m: Mnemonic) -> Op {
    match m {
        Mnemonic::Mov => Op::Mov,
        Mnemonic::Movzx => Op::Movzx,
        Mnemonic::Movsx | Mnemonic::Movsxd => Op::Movsx,
        Mnemonic::Movbe => Op::Movbe,
        Mnemonic::Lea => Op::Lea,
        Mnemonic::Add => Op::Alu(Alu::Add),
        Mnemonic::Or => Op::Alu(Alu::Or),
        Mnemonic::Adc => Op::Alu(Alu::Adc),
        Mnemonic::Sbb => Op::Alu(Alu::Sbb),
        Mnemonic::And => Op::Alu(Alu::And),
        Mnemonic::Sub => Op::Alu(Alu::Sub),
        Mnemonic::Xor => Op::Alu(Alu::Xor),
        Mnemonic::Cmp => Op::Alu(Alu::Cmp),
        Mnemonic::Test => Op::Alu(Alu::Test),
        Mnemonic::Neg => Op::Neg,
        Mnemonic::Not => Op::Not,
        Mnemonic::Inc => Op::Inc,
        Mnemonic::Dec => Op::Dec,
        Mnemonic::Mul => Op::MulWide,
        Mnemonic::Imul => Op::Imul,
        Mnemonic::Div => Op::Div,
        Mnemonic::Idiv => Op::Idiv,
        Mnemonic::Shl | Mnemonic::Sal => Op::Shift(Shift::Shl),
        Mnemonic::Shr => Op::Shift(Shift::Shr),
        Mnemonic::Sar => Op::Shift(Shift::Sar),
        Mnemonic::Rol => Op::Shift(Shift::Rol),
        Mnemonic::Ror => Op::Shift(Shift::Ror),
        Mnemonic::Rcl => Op::Shift(Shift::Rcl),
        Mnemonic::Rcr => Op::Shift(Shift::Rcr),
        Mnemonic::Shld => Op::Shld,
        Mnemonic::Shrd => Op::Shrd,
        Mnemonic::Bt => Op::Bit(Bit::Keep),
        Mnemonic::Bts => Op::Bit(Bit::Set),
        Mnemonic::Btr => Op::Bit(Bit::Reset),
        Mnemonic::Btc => Op::Bit(Bit::Complement),
        Mnemonic::Xchg => Op::Xchg,
        Mnemonic::Xadd => Op::Xadd,
        Mnemonic::Cmpxchg => Op::Cmpxchg,
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => Op::CmpxchgPair,
        Mnemonic::Jmp => Op::JmpIndirect,
        Mnemonic::Call => Op::CallIndirect,
        Mnemonic::Push => Op::Push,
        Mnemonic::Pop => Op::Pop,
        Mnemonic::Pushfq | Mnemonic::Pushf => Op::Pushf,
        Mnemonic::Popfq | Mnemonic::Popf => Op::Popf,
        Mnemonic::Leave => Op::Leave,
        Mnemonic::Bswap => Op::Bswap,
        Mnemonic::Bsf => Op::Bsf,
        Mnemonic::Bsr => Op::Bsr,
        Mnemonic::Popcnt => Op::Popcnt,
        Mnemonic::Tzcnt => Op::Tzcnt,
        Mnemonic::Lzcnt => Op::Lzcnt,
        Mnemonic::Xlatb => Op::Xlat,
        Mnemonic::Seto
        | Mnemonic::Setno
        | Mnemonic::Setb
        | Mnemonic::Setae
        | Mnemonic::Sete
        | Mnemonic::Setne
        | Mnemonic::Setbe
        | Mnemonic::Seta
        | Mnemonic::Sets
        | Mnemonic::Setns
        | Mnemonic::Setp
        | Mnemonic::Setnp
        | Mnemonic::Setl
        | Mnemonic::Setge
        | Mnemonic::Setle
        | Mnemonic::Setg => Op::Setcc,
        Mnemonic::Cmovo
        | Mnemonic::Cmovno
        | Mnemonic::Cmovb
        | Mnemonic::Cmovae
        | Mnemonic::Cmove
        | Mnemonic::Cmovne
        | Mnemonic::Cmovbe
        | Mnemonic::Cmova
        | Mnemonic::Cmovs
        | Mnemonic::Cmovns
        | Mnemonic::Cmovp
        | Mnemonic::Cmovnp
        | Mnemonic::Cmovl
        | Mnemonic::Cmovge
        | Mnemonic::Cmovle
        | Mnemonic::Cmovg => Op::Cmov,
        _ => Op::Unsupported,
    }
}

fn loop_op(i: &Instruction, mut insn: Insn) -> Insn {
    insn.mem.addr32 = matches!(
        i.code(),
        Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_ECX
            | Code::Jecxz_rel8_64
    );
    insn
}

fn string(i: &Instruction, none: Insn) -> Insn {
    let (op, size) = match i.mnemonic() {
        Mnemonic::Movsb => (Str::Movs, 1),
        Mnemonic::Movsw => (Str::Movs, 2),
        Mnemonic::Movsd => (Str::Movs, 4),
        Mnemonic::Movsq => (Str::Movs, 8),
        Mnemonic::Stosb => (Str::Stos, 1),
        Mnemonic::Stosw => (Str::Stos, 2),
        Mnemonic::Stosd => (Str::Stos, 4),
        Mnemonic::Stosq => (Str::Stos, 8),
        Mnemonic::Lodsb => (Str::Lods, 1),
        Mnemonic::Lodsw => (Str::Lods, 2),
        Mnemonic::Lodsd => (Str::Lods, 4),
        Mnemonic::Lodsq => (Str::Lods, 8),
        Mnemonic::Cmpsb => (Str::Cmps, 1),
        Mnemonic::Cmpsw => (Str::Cmps, 2),
        Mnemonic::Cmpsd => (Str::Cmps, 4),
        Mnemonic::Cmpsq => (Str::Cmps, 8),
        Mnemonic::Scasb => (Str::Scas, 1),
        Mnemonic::Scasw => (Str::Scas, 2),
        Mnemonic::Scasd => (Str::Scas, 4),
        Mnemonic::Scasq => (Str::Scas, 8),
        // ins and outs.
        _ => return none,
    };
    let mut mem = none.mem;
    mem.seg = segment(i.memory_segment());
    mem.addr32 = (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI));
    Insn {
        op: Op::Str(op),
        size,
        rep: i.has_rep_prefix(),
        repne: i.has_repne_prefix(),
        mem,
        ..none
    }
}

fn is_cr(r: Register) -> bool {
    r.is_cr()
}

fn operand(i: &Instruction, n: u32) -> Option<Operand> {
    match i.op_kind(n) {
        OpKind::Register => gpr(i.op_register(n)),
        OpKind::Memory => Some(Operand::Mem),
        // xlat
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(Operand::Imm),
        _ => None,
    }
}

fn gpr(r: Register) -> Option<Operand> {
    let number = || r.full_register().number() as u8 & 15;
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => Some(Operand::High(number())),
        _ if r.is_gpr() => Some(Operand::Gpr(number())),
        _ => None,
    }
}

fn operand_size(i: &Instruction, n: u32) -> Option<u8> {
    let size = match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        OpKind::Memory => i.memory_size().size(),
        _ => 0,
    };
    // lea's memory has no size.
    (size > 0).then_some(size as u8)
}

fn segment(r: Register) -> Seg {
    match r {
        Register::SS => Seg::Stack,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Flat,
    }
}

fn memory(i: &Instruction) -> Mem {
    let (base, index) = (i.memory_base(), i.memory_index());
    let number = |r: Register| {
        if r.is_gpr() { r.full_register().number() as u8 & 15 } else { NO_REG }
    };
    Mem {
        // iced has already added the instruction pointer of rip-relative operands.
        disp: i.memory_displacement64(),
        base: number(base),
        index: number(index),
        shift: i.memory_index_scale().trailing_zeros() as u8 & 3,
        seg: segment(i.memory_segment()),
        addr32: base.is_gpr32()
            || base == Register::EIP
            || index.is_gpr32()
            || (base == Register::None && index == Register::None && i.memory_displ_size() == 4),
    }
}
