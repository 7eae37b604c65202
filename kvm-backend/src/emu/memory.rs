// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operands: addresses, loads, stores, read-modify-writes, registers.

use super::bus::{Bus, Exception, Stop};
use super::flags::mask;
use super::insn::{Insn, Mem, NO_REG, Operand, Seg};
use crate::regs::Regs;

/// Attempts of one locked read-modify-write before [`step`](super::step) returns
/// [`Event::Again`](super::Event::Again).
pub const LOCK_TRIES: u32 = 1000;

/// The result of a piece of execution.
pub(super) type Run<T, B> = Result<T, Stop<<B as Bus>::Stop>>;

/// One instruction being executed.
pub(super) struct Cpu<'a, B> {
    pub(super) regs: &'a mut Regs,
    pub(super) bus: &'a mut B,
    /// The address of the next instruction.
    pub(super) next: u64,
}

pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RBX: u8 = 3;
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;
pub(super) const RSI: u8 = 6;
pub(super) const RDI: u8 = 7;

/// What became of a read-modify-write.
pub(super) enum Rmw {
    /// Done; memory or register held this before.
    Done(u64),
    /// Lost every attempt against other vCPUs.
    Lost,
}

impl<B: Bus> Cpu<'_, B> {
    /// A whole general register.
    #[inline(always)]
    pub(super) fn reg(&self, n: u8) -> u64 {
        self.regs.gpr[usize::from(n & 15)]
    }

    /// The low `size` bytes of a general register.
    #[inline(always)]
    pub(super) fn reg_part(&self, n: u8, size: u8) -> u64 {
        self.reg(n) & mask(size)
    }

    /// Writes the low `size` bytes of a general register; 4 bytes clear the upper half.
    #[inline(always)]
    pub(super) fn set_reg(&mut self, n: u8, size: u8, v: u64) {
        let r = &mut self.regs.gpr[usize::from(n & 15)];
        *r = match size {
            8 => v,
            4 => v & 0xffff_ffff,
            _ => (*r & !mask(size)) | (v & mask(size)),
        };
    }

    /// The offset of a memory operand, before its segment's base is added.
    #[inline(always)]
    pub(super) fn offset(&self, m: &Mem) -> u64 {
        let mut a = m.disp;
        if m.base != NO_REG {
            a = a.wrapping_add(self.reg(m.base));
        }
        if m.index != NO_REG {
            a = a.wrapping_add(self.reg(m.index) << (m.shift & 3));
        }
        if m.addr32 { a & 0xffff_ffff } else { a }
    }

    /// Adds the base of a segment.
    #[inline(always)]
    pub(super) fn with_base(&self, seg: Seg, offset: u64) -> u64 {
        match seg {
            Seg::Flat | Seg::Stack => offset,
            Seg::Fs => offset.wrapping_add(self.bus.fs_base()),
            Seg::Gs => offset.wrapping_add(self.bus.gs_base()),
        }
    }

    /// The guest-virtual address of a memory operand.
    #[inline(always)]
    pub(super) fn gva(&self, m: &Mem) -> u64 {
        self.with_base(m.seg, self.offset(m))
    }

    #[inline(always)]
    fn check(&self, gva: u64, size: u64, seg: Seg) -> Run<(), B> {
        if self.bus.is_canonical(gva) && self.bus.is_canonical(gva.wrapping_add(size - 1)) {
            Ok(())
        } else {
            Err(non_canonical(seg))
        }
    }

    /// A load of 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub(super) fn load(&mut self, gva: u64, size: u8, seg: Seg) -> Run<u64, B> {
        self.check(gva, u64::from(size), seg)?;
        macro_rules! read {
            ($int:ty) => {{
                let mut b = [0; size_of::<$int>()];
                self.bus.read(gva, &mut b).map_err(Stop::Bus)?;
                u64::from(<$int>::from_le_bytes(b))
            }};
        }
        Ok(match size {
            1 => read!(u8),
            2 => read!(u16),
            4 => read!(u32),
            _ => read!(u64),
        })
    }

    fn load_for_write(&mut self, gva: u64, size: u8, seg: Seg) -> Run<u64, B> {
        self.check(gva, u64::from(size), seg)?;
        let mut b = [0; 8];
        let part = b.get_mut(..usize::from(size)).unwrap_or_default();
        self.bus.read_for_write(gva, part).map_err(Stop::Bus)?;
        Ok(u64::from_le_bytes(b))
    }

    /// A store of 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub(super) fn store(&mut self, gva: u64, size: u8, seg: Seg, v: u64) -> Run<(), B> {
        self.check(gva, u64::from(size), seg)?;
        match size {
            1 => self.bus.write(gva, &(v as u8).to_le_bytes()),
            2 => self.bus.write(gva, &(v as u16).to_le_bytes()),
            4 => self.bus.write(gva, &(v as u32).to_le_bytes()),
            _ => self.bus.write(gva, &v.to_le_bytes()),
        }
        .map_err(Stop::Bus)
    }

    /// A compare-and-exchange on the bus.
    pub(super) fn exchange_if(
        &mut self,
        gva: u64,
        seg: Seg,
        old: u128,
        new: u128,
        size: u8,
    ) -> Run<Result<(), u128>, B> {
        self.check(gva, u64::from(size), seg)?;
        self.bus.cmpxchg(gva, old, new, usize::from(size)).map_err(Stop::Bus)
    }

    /// The value of an operand, zero-extended.
    #[inline(always)]
    pub(super) fn get(&mut self, insn: &Insn, op: Operand, size: u8) -> Run<u64, B> {
        Ok(match op {
            Operand::Gpr(n) => self.reg_part(n, size),
            Operand::Imm => insn.imm & mask(size),
            Operand::Mem => self.load(self.gva(&insn.mem), size, insn.mem.seg)?,
            Operand::High(n) => (self.reg(n) >> 8) & 0xff,
            Operand::None => 0,
        })
    }

    /// Writes an operand.
    #[inline(always)]
    pub(super) fn put(&mut self, insn: &Insn, op: Operand, size: u8, v: u64) -> Run<(), B> {
        match op {
            Operand::Gpr(n) => self.set_reg(n, size, v),
            Operand::Mem => self.store(self.gva(&insn.mem), size, insn.mem.seg, v)?,
            Operand::High(n) => {
                let r = &mut self.regs.gpr[usize::from(n & 15)];
                *r = (*r & !0xff00) | ((v & 0xff) << 8);
            }
            Operand::Imm | Operand::None => {}
        }
        Ok(())
    }

    /// Replaces the destination's value `old` by what `f` makes of it, atomically with lock.
    ///
    /// `f` returns the new value and the new flags, which are committed with it.
    #[inline(always)]
    pub(super) fn rmw(&mut self, insn: &Insn, f: impl Fn(u64) -> (u64, u64)) -> Run<Rmw, B> {
        if insn.dst == Operand::Mem {
            let gva = self.gva(&insn.mem);
            return self.rmw_at(gva, insn, f);
        }
        let old = self.get(insn, insn.dst, insn.size)?;
        let (new, fl) = f(old);
        self.put(insn, insn.dst, insn.size, new)?;
        self.regs.rflags = fl;
        Ok(Rmw::Done(old))
    }

    /// The same for memory at `gva`.
    pub(super) fn rmw_at(
        &mut self,
        gva: u64,
        insn: &Insn,
        f: impl Fn(u64) -> (u64, u64),
    ) -> Run<Rmw, B> {
        let (seg, size) = (insn.mem.seg, insn.size);
        let mut old = self.load_for_write(gva, size, seg)?;
        if !insn.lock {
            let (new, fl) = f(old);
            self.store(gva, size, seg, new)?;
            self.regs.rflags = fl;
            return Ok(Rmw::Done(old));
        }
        for _ in 0..LOCK_TRIES {
            let (new, fl) = f(old);
            match self.exchange_if(gva, seg, u128::from(old), u128::from(new), size)? {
                Ok(()) => {
                    self.regs.rflags = fl;
                    return Ok(Rmw::Done(old));
                }
                Err(seen) => old = seen as u64 & mask(size),
            }
        }
        Ok(Rmw::Lost)
    }
}

#[cold]
fn non_canonical<S>(seg: Seg) -> Stop<S> {
    match seg {
        Seg::Stack => Exception::fault(12, Some(0)).into(),
        _ => Exception::gp(0).into(),
    }
}
