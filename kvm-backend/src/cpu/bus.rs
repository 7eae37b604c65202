// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's view of a vCPU: memory through the guest's own tables, or through the shadow.

use super::Crash;
use crate::emu::{Bus, Exception, MAX_INSN, Stop};
use mmu_core::Mmu;
use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use mmu_core::paging::{Access, Regs as ControlRegs};
use mmu_core::vcpu::{AccessError, Session, SoftExit, Vcpu, VcpuError};

/// What stops an instruction from outside.
#[derive(Debug)]
pub(super) enum Halted {
    /// The guest cannot go on.
    Crash(Crash),
    /// Somebody wants the vCPU's thread.
    Requested,
    /// The guest changes its control registers: done between instructions, then the instruction
    /// is executed again.
    Load(ControlRegs),
}

/// Bytes of a fetch at `gva` that lie in its page.
fn in_page(gva: u64) -> usize {
    MAX_INSN.min((PAGE_SIZE - gva % PAGE_SIZE) as usize)
}

fn exchange_args(old: u128, new: u128) -> (u64, u64) {
    (old as u64, new as u64)
}

/// Single instructions for a vCPU that the processor runs.
pub(super) struct TrapBus<'a> {
    pub(super) mmu: &'a Mmu,
    pub(super) vcpu: &'a mut Vcpu,
}

impl TrapBus<'_> {
    fn device(&self, error: AccessError, access: impl FnOnce(Gpa) -> bool) -> Result<(), Halted> {
        Err(Halted::Crash(match error {
            AccessError::Fault(fault) => Crash::Fault(fault),
            AccessError::Unsupported { gva, size } => Crash::Locked { gva, size },
            AccessError::Mmio { gpa, .. } if access(gpa) => return Ok(()),
            AccessError::Mmio { gpa, .. } => Crash::NoDevice(gpa),
        }))
    }
}

impl Bus for TrapBus<'_> {
    type Stop = Halted;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Halted> {
        let len = in_page(gva);
        match self.vcpu.read(Gva(gva), &mut buf[..len], Access::execute().user()) {
            Ok(()) => Ok(len),
            Err(error) => self.device(error, |_| false).map(|()| 0),
        }
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        match self.vcpu.read(Gva(gva), buf, Access::read().user()) {
            Ok(()) => Ok(()),
            Err(error) => self.device(error, |gpa| self.mmu.bus().read(gpa, buf)),
        }
    }

    fn read_for_write(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        match self.vcpu.read(Gva(gva), buf, Access::write().user()) {
            Ok(()) => Ok(()),
            Err(error) => self.device(error, |gpa| self.mmu.bus().read(gpa, buf)),
        }
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Halted> {
        match self.vcpu.write(Gva(gva), bytes, true) {
            Ok(()) => Ok(()),
            Err(error) => self.device(error, |gpa| self.mmu.bus().write(gpa, bytes)),
        }
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Halted> {
        let (old, new) = exchange_args(old, new);
        match self.vcpu.cmpxchg(Gva(gva), size, old, new, true) {
            Ok(result) => Ok(result.map_err(u128::from)),
            Err(error) => self.device(error, |_| false).map(Ok),
        }
    }

    fn read_cr(&mut self, n: u8) -> Result<u64, Stop<Halted>> {
        read_cr(self.vcpu.regs(), n)
    }

    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Stop<Halted>> {
        if let Some(regs) = write_cr(self.vcpu.regs(), n, value)? {
            self.vcpu.set_regs(regs).map_err(|error| refused(&error))?;
        }
        Ok(())
    }

    fn invlpg(&mut self, _gva: u64) -> Result<(), Stop<Halted>> {
        // What the guest changed before is in the flush log, and drained before it runs again.
        Ok(())
    }
}

/// Whole programs for a software vCPU.
pub(super) struct SoftBus<'a> {
    pub(super) mmu: &'a Mmu,
    pub(super) session: Session<'a>,
    pub(super) regs: ControlRegs,
}

impl SoftBus<'_> {
    fn device(&self, exit: SoftExit, access: impl FnOnce(Gpa) -> bool) -> Result<(), Halted> {
        Err(Halted::Crash(match exit {
            SoftExit::Requested => return Err(Halted::Requested),
            SoftExit::Fault(fault) => Crash::Fault(fault),
            SoftExit::Reserved(gva) => Crash::Reserved(gva),
            SoftExit::Unsupported { gva, size } => Crash::Locked { gva, size },
            SoftExit::Mmio(gpa) if access(gpa) => return Ok(()),
            SoftExit::Mmio(gpa) => Crash::NoDevice(gpa),
        }))
    }
}

impl Bus for SoftBus<'_> {
    type Stop = Halted;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Halted> {
        let len = in_page(gva);
        match self.session.fetch(Gva(gva), &mut buf[..len], true) {
            Ok(()) => Ok(len),
            Err(exit) => self.device(exit, |_| false).map(|()| 0),
        }
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        match self.session.load(Gva(gva), buf, true) {
            Ok(()) => Ok(()),
            Err(exit) => self.device(exit, |gpa| self.mmu.bus().read(gpa, buf)),
        }
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Halted> {
        match self.session.store(Gva(gva), bytes, true) {
            Ok(()) => Ok(()),
            Err(exit) => self.device(exit, |gpa| self.mmu.bus().write(gpa, bytes)),
        }
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Halted> {
        let (old, new) = exchange_args(old, new);
        match self.session.cmpxchg(Gva(gva), size, old, new, true) {
            Ok(result) => Ok(result.map_err(u128::from)),
            Err(exit) => self.device(exit, |_| false).map(Ok),
        }
    }

    fn read_cr(&mut self, n: u8) -> Result<u64, Stop<Halted>> {
        read_cr(&self.regs, n)
    }

    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Stop<Halted>> {
        match write_cr(&self.regs, n, value)? {
            Some(regs) => Err(Stop::Bus(Halted::Load(regs))),
            None => {
                // A load of the same value still flushes: what was changed before takes effect.
                self.session.leave();
                Ok(())
            }
        }
    }

    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<Halted>> {
        self.session.invlpg(Gva(gva));
        Ok(())
    }
}

fn read_cr(regs: &ControlRegs, n: u8) -> Result<u64, Stop<Halted>> {
    match n {
        0 => Ok(regs.cr0),
        3 => Ok(regs.cr3),
        4 => Ok(regs.cr4),
        _ => Err(Exception::gp(0).into()),
    }
}

/// The registers after a load of CR3; `None` if nothing changes. The other control registers
/// cannot be changed by a guest that is all user mode.
fn write_cr(regs: &ControlRegs, n: u8, value: u64) -> Result<Option<ControlRegs>, Stop<Halted>> {
    match n {
        3 => Ok((regs.cr3 != value).then_some(ControlRegs { cr3: value, ..*regs })),
        _ => Err(Exception::gp(0).into()),
    }
}

/// What the guest sees of registers that were refused: #GP(0) (SDM vol. 2, MOV to CR).
pub(super) fn refused(_error: &VcpuError) -> Exception {
    Exception::gp(0)
}
