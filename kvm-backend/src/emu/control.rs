// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Control transfer and the stack.

use super::bus::{Bus, Event, Exception};
use super::flags::{self, bits};
use super::insn::{Insn, Loop, Op, Seg};
use super::memory::{Cpu, RBP, RCX, RSP, Run};

/// Flags that `popf` changes in ring 3 with IOPL 0: CF PF AF ZF SF TF DF OF NT AC ID.
const POPF: u64 = flags::ARITH | flags::TF | flags::DF | 1 << 14 | 1 << 18 | 1 << 21;
/// RF and VM are pushed as zero.
const PUSHF: u64 = !(1 << 16 | 1 << 17);

impl<B: Bus> Cpu<'_, B> {
    /// Goes on at `target`, or raises #GP at the branch.
    #[inline(always)]
    pub(super) fn jump(&mut self, target: u64) -> Run<Event, B> {
        self.check_target(target)?;
        self.regs.rip = target;
        Ok(Event::Retired)
    }

    #[inline(always)]
    fn check_target(&self, target: u64) -> Run<(), B> {
        if self.bus.is_canonical(target) { Ok(()) } else { Err(Exception::gp(0).into()) }
    }

    /// Stores below the stack pointer and returns the new one, which the caller commits.
    #[inline(always)]
    fn push(&mut self, size: u8, v: u64) -> Run<u64, B> {
        let sp = self.reg(RSP).wrapping_sub(u64::from(size));
        self.store(sp, size, Seg::Stack, v)?;
        Ok(sp)
    }

    pub(super) fn control(&mut self, insn: &Insn) -> Run<Event, B> {
        let size = insn.size;
        match insn.op {
            Op::Push => {
                let v = self.get(insn, insn.dst, size)?;
                let sp = self.push(size, v)?;
                self.set_reg(RSP, 8, sp);
            }
            Op::Pop => {
                let sp = self.reg(RSP);
                let v = self.load(sp, size, Seg::Stack)?;
                // The destination is written behind the change of rsp: `pop rsp` keeps the value, and a
                // destination addressed by rsp uses the new one.
                self.set_reg(RSP, 8, sp.wrapping_add(u64::from(size)));
                if let Err(stop) = self.put(insn, insn.dst, size, v) {
                    self.set_reg(RSP, 8, sp);
                    return Err(stop);
                }
            }
            Op::Call => return self.call(insn.imm),
            Op::CallIndirect => {
                let target = self.get(insn, insn.dst, 8)?;
                return self.call(target);
            }
            Op::JmpIndirect => {
                let target = self.get(insn, insn.dst, 8)?;
                return self.jump(target);
            }
            Op::Ret => {
                let sp = self.reg(RSP);
                let target = self.load(sp, 8, Seg::Stack)?;
                self.check_target(target)?;
                self.set_reg(RSP, 8, sp.wrapping_add(8).wrapping_add(insn.imm));
                self.regs.rip = target;
                return Ok(Event::Retired);
            }
            Op::Pushf => {
                let v = (self.regs.rflags & PUSHF) | 2;
                let sp = self.push(size, v)?;
                self.set_reg(RSP, 8, sp);
            }
            Op::Popf => {
                let sp = self.reg(RSP);
                let v = self.load(sp, size, Seg::Stack)?;
                let changed = POPF & u64::MAX >> (64 - bits(size).clamp(1, 64));
                // RF is cleared.
                let kept = self.regs.rflags & !changed & !(1 << 16);
                self.regs.rflags = kept | (v & changed) | 2;
                self.set_reg(RSP, 8, sp.wrapping_add(u64::from(size)));
            }
            Op::Leave => {
                let bp = self.reg(RBP);
                let v = self.load(bp, 8, Seg::Stack)?;
                self.set_reg(RSP, 8, bp.wrapping_add(8));
                self.set_reg(RBP, 8, v);
            }
            Op::Loop(kind) => return self.loop_(insn, kind),
            _ => return Err(Exception::ud().into()),
        }
        self.regs.rip = self.next;
        Ok(Event::Retired)
    }

    fn call(&mut self, target: u64) -> Run<Event, B> {
        self.check_target(target)?;
        let sp = self.push(8, self.next)?;
        self.set_reg(RSP, 8, sp);
        self.regs.rip = target;
        Ok(Event::Retired)
    }

    fn loop_(&mut self, insn: &Insn, kind: Loop) -> Run<Event, B> {
        let size = if insn.mem.addr32 { 4 } else { 8 };
        let zero = self.regs.rflags & flags::ZF != 0;
        let left = if kind == Loop::Rcxz {
            self.reg_part(RCX, size)
        } else {
            self.reg_part(RCX, size).wrapping_sub(1) & flags::mask(size)
        };
        let taken = match kind {
            Loop::Always => left != 0,
            Loop::Equal => left != 0 && zero,
            Loop::NotEqual => left != 0 && !zero,
            Loop::Rcxz => left == 0,
        };
        if taken {
            self.check_target(insn.imm)?;
        }
        if kind != Loop::Rcxz {
            self.set_reg(RCX, size, left);
        }
        self.regs.rip = if taken { insn.imm } else { self.next };
        Ok(Event::Retired)
    }
}
