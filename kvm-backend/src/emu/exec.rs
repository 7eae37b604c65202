// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The semantics: data movement and arithmetic. Control transfer is in `control`, strings in `string`,
//! privileged instructions in `system`.

use super::bus::{Bus, Event, Exception};
use super::flags::{self, bits, mask, sext};
use super::insn::{Alu, Bit, Insn, Op, Operand};
use super::memory::{Cpu, RAX, RBX, RCX, RDX, Rmw, Run};
use std::sync::atomic::{Ordering, fence};

impl<B: Bus> Cpu<'_, B> {
    /// Executes the instruction and advances the instruction pointer.
    #[inline]
    pub(super) fn exec(&mut self, insn: &Insn) -> Run<Event, B> {
        let size = insn.size;
        match insn.op {
            Op::Mov => {
                let v = self.get(insn, insn.src, size)?;
                self.put(insn, insn.dst, size, v)?;
            }
            Op::Alu(op @ (Alu::Cmp | Alu::Test)) => {
                let a = self.get(insn, insn.dst, size)?;
                let b = self.get(insn, insn.src, size)?;
                self.regs.rflags = flags::alu(op, a, b, size, self.regs.rflags).1;
            }
            Op::Alu(op) => {
                let b = self.get(insn, insn.src, size)?;
                let fl = self.regs.rflags;
                if let Rmw::Lost = self.rmw(insn, |a| flags::alu(op, a, b, size, fl))? {
                    return Ok(Event::Again);
                }
            }
            Op::Jcc => {
                if flags::condition(insn.cond, self.regs.rflags) {
                    return self.jump(insn.imm);
                }
            }
            Op::Jmp => return self.jump(insn.imm),
            Op::Movzx => {
                let v = self.get(insn, insn.src, insn.src_size)?;
                self.put(insn, insn.dst, size, v)?;
            }
            Op::Movsx => {
                let v = self.get(insn, insn.src, insn.src_size)?;
                self.put(insn, insn.dst, size, sext(v, insn.src_size) as u64)?;
            }
            Op::Lea => {
                let v = self.offset(&insn.mem);
                self.put(insn, insn.dst, size, v)?;
            }
            Op::Inc | Op::Dec | Op::Neg | Op::Not | Op::Shift(_) | Op::Shld | Op::Shrd => {
                if let Rmw::Lost = self.unary(insn)? {
                    return Ok(Event::Again);
                }
            }
            Op::Push | Op::Pop | Op::Call | Op::Ret | Op::CallIndirect | Op::JmpIndirect => {
                return self.control(insn);
            }
            _ => return self.exec_rare(insn),
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    /// Everything that is not in the inner loops of guests.
    #[inline(never)]
    fn exec_rare(&mut self, insn: &Insn) -> Run<Event, B> {
        let size = insn.size;
        let fl = self.regs.rflags;
        match insn.op {
            Op::Movbe => {
                let v = self.get(insn, insn.src, size)?;
                self.put(insn, insn.dst, size, v.swap_bytes() >> (64 - bits(size)))?;
            }
            Op::Bswap => {
                let v = self.get(insn, insn.dst, size)?;
                // Undefined for 16 bits; processors store zero.
                let r = if size == 2 { 0 } else { v.swap_bytes() >> (64 - bits(size)) };
                self.put(insn, insn.dst, size, r)?;
            }
            Op::Setcc => {
                let v = u64::from(flags::condition(insn.cond, fl));
                self.put(insn, insn.dst, 1, v)?;
            }
            Op::Cmov => {
                // The load happens in any case, and so does the clearing of the upper half.
                let v = self.get(insn, insn.src, size)?;
                let old = self.get(insn, insn.dst, size)?;
                let v = if flags::condition(insn.cond, fl) { v } else { old };
                self.put(insn, insn.dst, size, v)?;
            }
            Op::ExtendA => {
                let v = sext(self.reg_part(RAX, size / 2), size / 2) as u64;
                self.set_reg(RAX, size, v);
            }
            Op::ExtendD => {
                let v = (sext(self.reg_part(RAX, size), size) >> 63) as u64;
                self.set_reg(RDX, size, v);
            }
            Op::MulWide | Op::ImulWide | Op::Imul => self.multiply(insn)?,
            Op::Div | Op::Idiv => self.divide(insn)?,
            Op::Bit(op) => return self.bit_test(insn, op),
            Op::Xchg => return self.xchg(insn),
            Op::Xadd => return self.xadd(insn),
            Op::Cmpxchg => return self.cmpxchg(insn),
            Op::CmpxchgPair => self.cmpxchg_pair(insn)?,
            Op::Bsf | Op::Bsr => {
                let v = self.get(insn, insn.src, size)?;
                let (r, fl) = flags::bit_scan(v, insn.op == Op::Bsr, fl);
                if let Some(r) = r {
                    self.put(insn, insn.dst, size, r)?;
                }
                self.regs.rflags = fl;
            }
            Op::Popcnt | Op::Tzcnt | Op::Lzcnt => {
                let v = self.get(insn, insn.src, size)?;
                let (r, fl) = match insn.op {
                    Op::Popcnt => flags::popcnt(v, fl),
                    op => flags::count_zeros(v, op == Op::Lzcnt, size, fl),
                };
                self.put(insn, insn.dst, size, r)?;
                self.regs.rflags = fl;
            }
            Op::Str(op) => return self.string(insn, op),
            Op::Nop => {}
            Op::Pause => {
                self.regs.rip = self.next;
                return Ok(Event::Pause);
            }
            Op::Fence => fence(Ordering::SeqCst),
            Op::Clflush => {
                self.load(self.gva(&insn.mem), 1, insn.mem.seg)?;
            }
            Op::Clc => self.regs.rflags &= !flags::CF,
            Op::Stc => self.regs.rflags |= flags::CF,
            Op::Cmc => self.regs.rflags ^= flags::CF,
            Op::Cld => self.regs.rflags &= !flags::DF,
            Op::Std => self.regs.rflags |= flags::DF,
            Op::Lahf => {
                let ah = (fl & 0xd5) | 2;
                self.put(insn, Operand::High(RAX), 1, ah)?;
            }
            Op::Sahf => {
                let ah = self.get(insn, Operand::High(RAX), 1)?;
                self.regs.rflags = (fl & !0xd5) | (ah & 0xd5);
            }
            Op::Xlat => {
                let mut offset = self.reg(RBX).wrapping_add(self.reg_part(RAX, 1));
                if insn.mem.addr32 {
                    offset &= 0xffff_ffff;
                }
                let v = self.load(self.with_base(insn.mem.seg, offset), 1, insn.mem.seg)?;
                self.set_reg(RAX, 1, v);
            }
            Op::Loop(_) | Op::Pushf | Op::Popf | Op::Leave => return self.control(insn),
            _ => return self.system(insn),
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    fn unary(&mut self, insn: &Insn) -> Run<Rmw, B> {
        let (size, fl) = (insn.size, self.regs.rflags);
        match insn.op {
            Op::Inc => self.rmw(insn, |a| flags::inc(a, size, fl)),
            Op::Dec => self.rmw(insn, |a| flags::dec(a, size, fl)),
            Op::Neg => self.rmw(insn, |a| flags::neg(a, size, fl)),
            Op::Shift(op) => {
                let count = self.get(insn, insn.src, 1)?;
                self.rmw(insn, |a| flags::shift(op, a, count, size, fl))
            }
            Op::Shld | Op::Shrd => {
                let count = self.get(insn, insn.third, 1)?;
                let b = self.get(insn, insn.src, size)?;
                let left = insn.op == Op::Shld;
                self.rmw(insn, |a| flags::shift_double(left, a, b, count, size, fl))
            }
            _ => self.rmw(insn, |a| (!a & mask(size), fl)),
        }
    }

    fn multiply(&mut self, insn: &Insn) -> Run<(), B> {
        let (size, fl) = (insn.size, self.regs.rflags);
        if insn.op == Op::Imul {
            let (a, b) = if insn.third == Operand::None {
                (insn.dst, insn.src)
            } else {
                (insn.src, insn.third)
            };
            let a = self.get(insn, a, size)?;
            let b = self.get(insn, b, size)?;
            let (r, fl) = flags::imul(a, b, size, fl);
            self.put(insn, insn.dst, size, r)?;
            self.regs.rflags = fl;
            return Ok(());
        }
        let b = self.get(insn, insn.dst, size)?;
        let a = self.reg_part(RAX, size);
        let (full, overflow) = if insn.op == Op::MulWide {
            let full = u128::from(a) * u128::from(b);
            (full, full >> bits(size) != 0)
        } else {
            let full = i128::from(sext(a, size)) * i128::from(sext(b, size));
            (full as u128, i128::from(sext(full as u64, size)) != full)
        };
        self.set_wide(size, full as u64, (full >> bits(size)) as u64);
        self.regs.rflags = flags::mul_flags(overflow, fl);
        Ok(())
    }

    fn divide(&mut self, insn: &Insn) -> Run<(), B> {
        let size = insn.size;
        let divisor = self.get(insn, insn.dst, size)?;
        let n = bits(size);
        let high = if size == 1 { (self.reg(RAX) >> 8) & 0xff } else { self.reg_part(RDX, size) };
        let dividend = (u128::from(high) << n) | u128::from(self.reg_part(RAX, size));
        let (q, r) = if insn.op == Op::Div {
            let d = u128::from(divisor);
            match (dividend.checked_div(d), dividend.checked_rem(d)) {
                (Some(q), Some(r)) if q <= u128::from(mask(size)) => (q as u64, r as u64),
                _ => return Err(Exception::de().into()),
            }
        } else {
            let d = i128::from(sext(divisor, size));
            let unused = 128 - 2 * n;
            let dividend = ((dividend << unused) as i128) >> unused;
            match (dividend.checked_div(d), dividend.checked_rem(d)) {
                (Some(q), Some(r)) if i128::from(sext(q as u64, size)) == q => (q as u64, r as u64),
                _ => return Err(Exception::de().into()),
            }
        };
        self.set_wide(size, q, r);
        Ok(())
    }

    /// Writes rdx:rax (or ah:al) of operand size `size`.
    fn set_wide(&mut self, size: u8, low: u64, high: u64) {
        if size == 1 {
            self.set_reg(RAX, 2, (low & 0xff) | (high << 8));
        } else {
            self.set_reg(RAX, size, low);
            self.set_reg(RDX, size, high);
        }
    }

    fn bit_test(&mut self, insn: &Insn, op: Bit) -> Run<Event, B> {
        let (size, fl) = (insn.size, self.regs.rflags);
        let offset = self.get(insn, insn.src, size)?;
        let bit = offset & u64::from(bits(size) - 1);
        let change = |v: u64| {
            let set = (v >> bit) & 1;
            let new = match op {
                Bit::Keep => v,
                Bit::Set => v | 1 << bit,
                Bit::Reset => v & !(1 << bit),
                Bit::Complement => v ^ 1 << bit,
            };
            (new, (fl & !flags::CF) | set)
        };
        if insn.dst != Operand::Mem {
            let v = self.get(insn, insn.dst, size)?;
            let (new, fl) = change(v);
            if op != Bit::Keep {
                self.put(insn, insn.dst, size, new)?;
            }
            self.regs.rflags = fl;
        } else {
            // A bit string: a register's offset reaches beyond the operand, in both directions.
            let mut gva = self.offset(&insn.mem);
            if insn.src != Operand::Imm {
                let operands = sext(offset, size) >> bits(size).trailing_zeros();
                gva = gva.wrapping_add((operands * i64::from(size)) as u64);
                if insn.mem.addr32 {
                    gva &= 0xffff_ffff;
                }
            }
            let gva = self.with_base(insn.mem.seg, gva);
            if op == Bit::Keep {
                let v = self.load(gva, size, insn.mem.seg)?;
                self.regs.rflags = change(v).1;
            } else if let Rmw::Lost = self.rmw_at(gva, insn, change)? {
                return Ok(Event::Again);
            }
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    fn xchg(&mut self, insn: &Insn) -> Run<Event, B> {
        let (size, fl) = (insn.size, self.regs.rflags);
        let new = self.get(insn, insn.src, size)?;
        match self.rmw(insn, |_| (new, fl))? {
            Rmw::Done(old) => self.put(insn, insn.src, size, old)?,
            Rmw::Lost => return Ok(Event::Again),
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    fn xadd(&mut self, insn: &Insn) -> Run<Event, B> {
        let (size, fl) = (insn.size, self.regs.rflags);
        let b = self.get(insn, insn.src, size)?;
        let sum = |a| flags::alu(Alu::Add, a, b, size, fl);
        if insn.dst == Operand::Mem {
            match self.rmw(insn, sum)? {
                Rmw::Done(old) => self.put(insn, insn.src, size, old)?,
                Rmw::Lost => return Ok(Event::Again),
            }
        } else {
            // The sum is written last: it stays if both operands are the same register.
            let a = self.get(insn, insn.dst, size)?;
            let (r, fl) = sum(a);
            self.put(insn, insn.src, size, a)?;
            self.put(insn, insn.dst, size, r)?;
            self.regs.rflags = fl;
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    /// cmpxchg; without lock it is atomic, too, which no guest can mind.
    fn cmpxchg(&mut self, insn: &Insn) -> Run<Event, B> {
        let size = insn.size;
        let expected = self.reg_part(RAX, size);
        let new = self.get(insn, insn.src, size)?;
        let seen = if insn.dst == Operand::Mem {
            let gva = self.gva(&insn.mem);
            let (old, new) = (u128::from(expected), u128::from(new));
            match self.exchange_if(gva, insn.mem.seg, old, new, size)? {
                Ok(()) => expected,
                // Failed for no reason: the flags must not say "equal".
                Err(seen) if seen == old => return Ok(Event::Again),
                Err(seen) => seen as u64 & mask(size),
            }
        } else {
            let seen = self.get(insn, insn.dst, size)?;
            // Without success the upper half of a 32-bit destination stays, as on AMD processors.
            if seen == expected {
                self.put(insn, insn.dst, size, new)?;
            }
            seen
        };
        if seen != expected {
            self.set_reg(RAX, size, seen);
        }
        self.regs.rflags = flags::alu(Alu::Cmp, expected, seen, size, self.regs.rflags).1;
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    fn cmpxchg_pair(&mut self, insn: &Insn) -> Run<(), B> {
        let half = insn.size;
        let n = bits(half);
        let gva = self.gva(&insn.mem);
        if half == 8 && gva & 15 != 0 {
            return Err(Exception::gp(0).into());
        }
        let join = |high: u64, low: u64| (u128::from(high) << n) | u128::from(low);
        let old = join(self.reg_part(RDX, half), self.reg_part(RAX, half));
        let new = join(self.reg_part(RCX, half), self.reg_part(RBX, half));
        match self.exchange_if(gva, insn.mem.seg, old, new, half * 2)? {
            Ok(()) => self.regs.rflags |= flags::ZF,
            Err(seen) => {
                self.set_reg(RAX, half, seen as u64 & mask(half));
                self.set_reg(RDX, half, (seen >> n) as u64 & mask(half));
                self.regs.rflags &= !flags::ZF;
            }
        }
        Ok(())
    }
}
