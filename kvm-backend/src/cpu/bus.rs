// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's view of a vCPU: memory through the guest's own tables, or through the shadow.

use super::Crash;
use crate::emu::{Bus, Exception, MAX_INSN, Stop};
use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use mmu_core::mmio::Initiator;
use mmu_core::paging::{Access, Invpcid, Regs as ControlRegs, bits};
use mmu_core::vcpu::{AccessError, Session, SoftExit, Vcpu};

/// What stops an instruction from outside.
#[derive(Debug)]
pub(super) enum Halted {
    /// The guest cannot go on.
    Crash(Crash),
    /// Somebody wants the vCPU's thread.
    Requested,
    /// The guest loads CR3: done between instructions, then the instruction is executed again.
    LoadCr3(u64),
}

/// Why memory did not answer.
pub(super) enum Miss {
    /// Perhaps a device does.
    NoMemory(Gpa),
    Halted(Halted),
}

impl From<AccessError> for Miss {
    fn from(error: AccessError) -> Self {
        Self::Halted(Halted::Crash(match error {
            AccessError::Fault(fault) => Crash::Fault(fault),
            AccessError::Unsupported { gva, size } => Crash::Locked { gva, size },
            AccessError::Mmio { gpa, .. } => return Self::NoMemory(gpa),
            AccessError::HostReadOnly { gpa } => Crash::HostReadOnly(gpa),
        }))
    }
}

impl From<SoftExit> for Miss {
    fn from(exit: SoftExit) -> Self {
        Self::Halted(Halted::Crash(match exit {
            SoftExit::Requested => return Self::Halted(Halted::Requested),
            SoftExit::Fault(fault) => Crash::Fault(fault),
            SoftExit::Reserved(gva) => Crash::Reserved(gva),
            SoftExit::Unsupported { gva, size } => Crash::Locked { gva, size },
            SoftExit::Mmio(gpa) => return Self::NoMemory(gpa),
            SoftExit::HostReadOnly(gpa) => Crash::HostReadOnly(gpa),
            SoftExit::RingFull => Crash::RingFull,
        }))
    }
}

impl Miss {
    /// The access without memory goes to `device`.
    fn or(self, device: impl FnOnce(Gpa) -> bool) -> Result<(), Halted> {
        match self {
            Self::NoMemory(gpa) if device(gpa) => Ok(()),
            Self::NoMemory(gpa) => Err(Halted::Crash(Crash::NoDevice(gpa))),
            Self::Halted(halted) => Err(halted),
        }
    }
}

/// One way to a vCPU's memory and registers.
pub(super) trait Memory {
    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), Miss>;
    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<(), Miss>;
    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u64,
        new: u64,
    ) -> Result<Result<(), u64>, Miss>;
    fn regs(&self) -> &ControlRegs;
    fn set_cr3(&mut self, cr3: u64) -> Result<(), Stop<Halted>>;
    fn invalidate(&mut self, gva: Option<Gva>);
    fn invpcid(&mut self, what: Invpcid);
}

/// Through the guest's own tables: single instructions for a vCPU that the processor runs. What the
/// guest changed before an invalidation is in the flush log, and drained before it runs again.
impl Memory for &mut Vcpu {
    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), Miss> {
        Ok(Vcpu::read(self, gva, buf, access)?)
    }

    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<(), Miss> {
        Ok(Vcpu::write(self, gva, bytes, true)?)
    }

    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u64,
        new: u64,
    ) -> Result<Result<(), u64>, Miss> {
        Ok(Vcpu::cmpxchg(self, gva, size, old, new, true)?)
    }

    fn regs(&self) -> &ControlRegs {
        Vcpu::regs(self)
    }

    fn set_cr3(&mut self, cr3: u64) -> Result<(), Stop<Halted>> {
        // What the engine refuses is #GP(0) for the guest (SDM vol. 2, MOV to CR).
        Ok(Vcpu::set_cr3(self, cr3).map_err(|_| Exception::gp(0))?)
    }

    fn invalidate(&mut self, gva: Option<Gva>) {
        match gva {
            Some(gva) => Vcpu::invlpg(self, gva),
            None => Vcpu::flush(self),
        }
        Vcpu::invalidate(self);
    }

    fn invpcid(&mut self, what: Invpcid) {
        Vcpu::invpcid(self, what);
        Vcpu::invalidate(self);
    }
}

/// Through the shadow: whole programs for a software vCPU.
pub(super) struct Inside<'a> {
    pub(super) session: Session<'a>,
    pub(super) regs: ControlRegs,
}

impl Memory for Inside<'_> {
    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), Miss> {
        Ok(self.session.read(gva, buf, access)?)
    }

    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<(), Miss> {
        Ok(self.session.store(gva, bytes, true)?)
    }

    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u64,
        new: u64,
    ) -> Result<Result<(), u64>, Miss> {
        Ok(self.session.cmpxchg(gva, size, old, new, true)?)
    }

    fn regs(&self) -> &ControlRegs {
        &self.regs
    }

    fn set_cr3(&mut self, cr3: u64) -> Result<(), Stop<Halted>> {
        Err(Stop::Bus(Halted::LoadCr3(cr3)))
    }

    fn invalidate(&mut self, gva: Option<Gva>) {
        match gva {
            Some(gva) => self.session.invlpg(gva),
            None => self.session.flush(),
        }
    }

    fn invpcid(&mut self, what: Invpcid) {
        self.session.invpcid(what);
    }
}

/// Memory, then devices. All accesses are the user's: guests run deprivileged.
pub(super) struct GuestBus<'a, M> {
    pub(super) devices: &'a mut Initiator,
    pub(super) memory: M,
}

impl<M: Memory> GuestBus<'_, M> {
    fn read_for(&mut self, gva: u64, buf: &mut [u8], access: Access) -> Result<(), Halted> {
        match self.memory.read(Gva(gva), buf, access.user()) {
            Ok(()) => Ok(()),
            Err(miss) => miss.or(|gpa| self.devices.read(gpa.0, buf)),
        }
    }
}

impl<M: Memory> Bus for GuestBus<'_, M> {
    type Stop = Halted;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Halted> {
        let len = MAX_INSN.min((PAGE_SIZE - gva % PAGE_SIZE) as usize);
        match self.memory.read(Gva(gva), &mut buf[..len], Access::execute().user()) {
            Ok(()) => Ok(len),
            Err(miss) => miss.or(|_| false).map(|()| 0),
        }
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        self.read_for(gva, buf, Access::read())
    }

    fn read_for_write(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        self.read_for(gva, buf, Access::write())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Halted> {
        match self.memory.write(Gva(gva), bytes) {
            Ok(()) => Ok(()),
            Err(miss) => miss.or(|gpa| self.devices.write(gpa.0, bytes).is_done()),
        }
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Halted> {
        match self.memory.cmpxchg(Gva(gva), size, old as u64, new as u64) {
            Ok(result) => Ok(result.map_err(u128::from)),
            Err(miss) => miss.or(|_| false).map(Ok),
        }
    }

    fn read_cr(&mut self, n: u8) -> Result<u64, Stop<Halted>> {
        let regs = self.memory.regs();
        match n {
            0 => Ok(regs.cr0),
            3 => Ok(regs.cr3),
            4 => Ok(regs.cr4),
            _ => Err(Exception::gp(0).into()),
        }
    }

    /// CR3 alone: a guest that is all user mode has no business with the others.
    fn write_cr(&mut self, n: u8, value: u64) -> Result<(), Stop<Halted>> {
        if n != 3 {
            return Err(Exception::gp(0).into());
        }
        // The no-flush bit is not stored (SDM vol. 3, 5.10.4.1).
        if self.memory.regs().cr3 != value & !bits::CR3_NO_FLUSH {
            self.memory.set_cr3(value)?;
        }
        self.memory.invalidate(None);
        Ok(())
    }

    fn invpcid(&mut self, kind: u64, descriptor: [u64; 2]) -> Result<(), Stop<Halted>> {
        let what = Invpcid::decode(kind, descriptor, self.memory.regs());
        self.memory.invpcid(what.map_err(|_| Exception::gp(0))?);
        Ok(())
    }

    fn invlpg(&mut self, gva: u64) -> Result<(), Stop<Halted>> {
        self.memory.invalidate(Some(Gva(gva)));
        Ok(())
    }
}
