// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! String instructions and their repetition.

use super::bus::{Bus, Event};
use super::flags;
use super::insn::{Alu, Insn, Seg, Str};
use super::memory::{Cpu, RAX, RCX, RDI, RSI, Run};

/// Iterations of one repeated string instruction in one [`step`](super::step).
pub const REP_BATCH: u32 = 4096;

impl<B: Bus> Cpu<'_, B> {
    pub(super) fn string(&mut self, insn: &Insn, op: Str) -> Run<Event, B> {
        let repeated = insn.rep || insn.repne;
        let width = if insn.mem.addr32 { 4 } else { 8 };
        let mut left = REP_BATCH;
        // Flags are committed at the end only: a fault in mid-repetition leaves the old ones.
        let mut fl = self.regs.rflags;
        while !repeated || self.reg_part(RCX, width) != 0 {
            if left == 0 {
                return Ok(Event::Again);
            }
            left -= 1;
            fl = self.string_once(insn, op, width, fl)?;
            if !repeated {
                break;
            }
            let count = self.reg_part(RCX, width).wrapping_sub(1);
            self.set_reg(RCX, width, count);
            let equal = fl & flags::ZF != 0;
            if matches!(op, Str::Cmps | Str::Scas) && equal == insn.repne {
                break;
            }
        }
        self.regs.rflags = fl;
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    /// One iteration: the accesses, then rsi and rdi. Returns the flags.
    fn string_once(&mut self, insn: &Insn, op: Str, width: u8, fl: u64) -> Run<u64, B> {
        let size = insn.size;
        let seg = insn.mem.seg;
        let source = self.with_base(seg, self.reg_part(RSI, width));
        let target = self.reg_part(RDI, width);
        let mut flags = fl;
        match op {
            Str::Movs => {
                let v = self.load(source, size, seg)?;
                self.store(target, size, Seg::Flat, v)?;
            }
            Str::Stos => self.store(target, size, Seg::Flat, self.reg_part(RAX, size))?,
            Str::Lods => {
                let v = self.load(source, size, seg)?;
                self.set_reg(RAX, size, v);
            }
            Str::Cmps => {
                let a = self.load(source, size, seg)?;
                let b = self.load(target, size, Seg::Flat)?;
                flags = flags::alu(Alu::Cmp, a, b, size, fl).1;
            }
            Str::Scas => {
                let b = self.load(target, size, Seg::Flat)?;
                flags = flags::alu(Alu::Cmp, self.reg_part(RAX, size), b, size, fl).1;
            }
        }
        let step =
            if fl & flags::DF != 0 { u64::from(size).wrapping_neg() } else { u64::from(size) };
        if !matches!(op, Str::Stos | Str::Scas) {
            self.set_reg(RSI, width, self.reg_part(RSI, width).wrapping_add(step));
        }
        if !matches!(op, Str::Lods) {
            self.set_reg(RDI, width, target.wrapping_add(step));
        }
        Ok(flags)
    }
}
