// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's view of a vCPU: memory through the guest's own tables, or through the shadow.

use super::Crash;
use crate::emu::{Bus, Exception, MAX_INSN, Stop};
use mmu_core::addr::{Gpa, Gva, PAGE_SIZE};
use mmu_core::mmio::{Answer, Initiator};
use mmu_core::paging::{Access, Invpcid, Regs as ControlRegs, bits};
use mmu_core::vcpu::{AccessError, Fragment, Session, SoftExit, Vcpu};

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
            AccessError::Mmio { gpa, .. } | AccessError::Apic { gpa } => {
                return Self::NoMemory(gpa);
            }
            AccessError::HostReadOnly { gpa } => Crash::HostReadOnly(gpa),
            other => Crash::Host(other.to_string()),
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
    /// For an access that no device can answer.
    fn without_device(self) -> Halted {
        match self {
            Self::NoMemory(gpa) => Halted::Crash(Crash::NoDevice(gpa)),
            Self::Halted(halted) => halted,
        }
    }
}

/// One way to a vCPU's memory and registers.
pub(super) trait Memory {
    fn fetch(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), Miss>;
    /// Reads what is in memory; the rest is for devices.
    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<Vec<Fragment>, Miss>;
    /// Writes what is in memory; the rest is for devices.
    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<Vec<Fragment>, Miss>;
    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, Miss>;
    fn regs(&self) -> &ControlRegs;
    fn set_cr3(&mut self, cr3: u64) -> Result<(), Stop<Halted>>;
    fn invalidate(&mut self, gva: Option<Gva>);
    fn invpcid(&mut self, what: Invpcid);
}

/// Through the guest's own tables: single instructions for a vCPU that the processor runs. What the
/// guest changed before an invalidation is in the flush log, and drained before it runs again.
impl Memory for &mut Vcpu {
    fn fetch(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), Miss> {
        Ok(Vcpu::read(self, gva, buf, Access::execute().user())?)
    }

    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<Vec<Fragment>, Miss> {
        Ok(self.read_emulated(gva, buf, access)?)
    }

    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<Vec<Fragment>, Miss> {
        Ok(self.write_emulated(gva, bytes, Access::write().user())?)
    }

    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, Miss> {
        Ok(Vcpu::cmpxchg(self, gva, size, old, new, Access::write().user())?)
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
    fn fetch(&mut self, gva: Gva, buf: &mut [u8]) -> Result<(), Miss> {
        Ok(self.session.fetch(gva, buf, true)?)
    }

    fn read(&mut self, gva: Gva, buf: &mut [u8], access: Access) -> Result<Vec<Fragment>, Miss> {
        match self.session.read(gva, buf, access) {
            Ok(()) => Ok(Vec::new()),
            Err(SoftExit::Mmio(_)) => Ok(self.session.vcpu().read_emulated(gva, buf, access)?),
            Err(other) => Err(other.into()),
        }
    }

    fn write(&mut self, gva: Gva, bytes: &[u8]) -> Result<Vec<Fragment>, Miss> {
        match self.session.store(gva, bytes, true) {
            Ok(()) => Ok(Vec::new()),
            Err(SoftExit::Mmio(_)) => {
                Ok(self.session.vcpu().write_emulated(gva, bytes, Access::write().user())?)
            }
            Err(other) => Err(other.into()),
        }
    }

    fn cmpxchg(
        &mut self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, Miss> {
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
        let left = self.memory.read(Gva(gva), buf, access.user()).map_err(Miss::without_device)?;
        self.for_devices(left, |devices, Fragment { gpa, bytes, .. }| {
            match devices.read(gpa.0, &mut buf[bytes]) {
                true => Answer::Device,
                false => Answer::Unhandled,
            }
        })
    }

    fn for_devices(
        &mut self,
        left: Vec<Fragment>,
        mut access: impl FnMut(&mut Initiator, Fragment) -> Answer,
    ) -> Result<(), Halted> {
        left.into_iter().try_for_each(|fragment| {
            let gpa = fragment.gpa;
            Err(Halted::Crash(match access(self.devices, fragment) {
                Answer::Device | Answer::Doorbell | Answer::Coalesced => return Ok(()),
                Answer::RingFull => Crash::CoalescedFull(gpa),
                Answer::Unhandled => Crash::NoDevice(gpa),
            }))
        })
    }
}

impl<M: Memory> Bus for GuestBus<'_, M> {
    type Stop = Halted;

    fn fetch(&mut self, gva: u64, buf: &mut [u8; MAX_INSN]) -> Result<usize, Halted> {
        let len = MAX_INSN.min((PAGE_SIZE - gva % PAGE_SIZE) as usize);
        self.memory.fetch(Gva(gva), &mut buf[..len]).map_err(Miss::without_device)?;
        Ok(len)
    }

    fn read(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        self.read_for(gva, buf, Access::read())
    }

    fn read_for_write(&mut self, gva: u64, buf: &mut [u8]) -> Result<(), Halted> {
        self.read_for(gva, buf, Access::write())
    }

    fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<(), Halted> {
        let left = self.memory.write(Gva(gva), bytes).map_err(Miss::without_device)?;
        self.for_devices(left, |devices, Fragment { gpa, bytes: part, .. }| {
            devices.write(gpa.0, &bytes[part])
        })
    }

    fn cmpxchg(
        &mut self,
        gva: u64,
        old: u128,
        new: u128,
        size: usize,
    ) -> Result<Result<(), u128>, Halted> {
        self.memory.cmpxchg(Gva(gva), size, old, new).map_err(Miss::without_device)
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

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_core::memory::{AllocatedMemory, SlotConfig};
    use mmu_core::mmio::{CoalescedRing, Device};
    use mmu_core::{Config, Mmu};
    use std::sync::{Arc, Mutex};

    /// Reads as its offsets, and remembers what was written.
    #[derive(Default)]
    struct Registers(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Device for Registers {
        fn read(&self, _base: u64, offset: u64, buf: &mut [u8]) {
            buf.iter_mut()
                .zip(offset..)
                .for_each(|(byte, at)| *byte = (at as u8).wrapping_add(0xa0));
        }
        fn write(&self, _base: u64, offset: u64, bytes: &[u8]) {
            self.0.lock().unwrap().push((offset, bytes.to_vec()));
        }
    }

    /// A page of memory at 0x1000, a device after it, and after that a device that is not there.
    fn machine() -> (Mmu, Arc<Registers>) {
        let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20)))).unwrap();
        let memory = Arc::new(AllocatedMemory::new(1 << 20));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
        let entries: [(u64, u64); 6] = [
            (0x1000, 0x2007),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x4008, 0x5007),
            (0x4010, 0xd000_0007),
            (0x4018, 0xd000_1007),
        ];
        for (gpa, entry) in entries {
            mmu.write_phys(Gpa(gpa), &entry.to_le_bytes());
        }
        let device = Arc::new(Registers::default());
        mmu.bus().register(0xd000_0000, 0x1000, device.clone()).unwrap();
        (mmu, device)
    }

    fn every_access<M: Memory>(mmu: &Mmu, device: &Registers, memory: M) {
        let mut bus = GuestBus { devices: &mut mmu.bus().initiator(), memory };
        bus.write(0x1ffa, b"abcdefgh").unwrap();
        assert_eq!(device.0.lock().unwrap().drain(..).collect::<Vec<_>>(), [(0, b"gh".to_vec())]);
        let mut operand = [0; 8];
        bus.read(0x1ffa, &mut operand).unwrap();
        assert_eq!(&operand, b"abcdef\xa0\xa1");
        bus.read_for_write(0x2010, &mut operand[..2]).unwrap();
        assert_eq!(operand[..2], [0xb0, 0xb1]);
        // The part of the device that is not there.
        let stop = bus.read(0x2ffc, &mut operand).unwrap_err();
        assert!(matches!(stop, Halted::Crash(Crash::NoDevice(Gpa(0xd000_1000)))), "{stop:?}");
        let stop = bus.fetch(0x2000, &mut [0; MAX_INSN]).unwrap_err();
        assert!(matches!(stop, Halted::Crash(Crash::NoDevice(Gpa(0xd000_0000)))), "{stop:?}");
        // Locked, across words and of 16 bytes.
        bus.write(0x1800, &[0; 32]).unwrap();
        assert_eq!(bus.cmpxchg(0x1806, 0, 0x11_2233_4455, 8).unwrap(), Ok(()));
        let seen = 0x11_2233_4455 << 48;
        assert_eq!(bus.cmpxchg(0x1800, 1, 2, 16).unwrap(), Err(seen));
        assert_eq!(bus.cmpxchg(0x1800, seen, u128::MAX, 16).unwrap(), Ok(()));
        let mut word = [0; 8];
        bus.read(0x1808, &mut word).unwrap();
        assert_eq!(word, [0xff; 8]);
        let stop = bus.cmpxchg(0x183e, 0, 1, 4).unwrap_err();
        let split = Crash::Locked { gva: Gva(0x183e), size: 4 };
        assert!(matches!(stop, Halted::Crash(crash) if crash == split));
    }

    #[test]
    fn a_full_ring_is_not_taken_for_a_device_that_is_not_there() {
        let (mmu, device) = machine();
        mmu.bus().register_coalesced(0xd000_0000, 8).unwrap();
        let mut cpu = mmu.create_soft_vcpu(ControlRegs::long_mode(0x1000)).unwrap();
        let memory = cpu.vcpu_mut();
        let mut bus = GuestBus { devices: &mut mmu.bus().initiator(), memory };
        for _ in 0..CoalescedRing::CAPACITY {
            bus.write(0x2000, &[1]).unwrap();
        }
        let stop = bus.write(0x2000, &[1]).unwrap_err();
        let full = Crash::CoalescedFull(Gpa(0xd000_0000));
        assert!(matches!(stop, Halted::Crash(crash) if crash == full));
        bus.write(0x2010, &[2]).unwrap();
        assert_eq!(device.0.lock().unwrap().len(), 1);
        assert_eq!(mmu.bus().coalesced().drain().len(), CoalescedRing::CAPACITY);
        bus.write(0x2000, &[1]).unwrap();
    }

    #[test]
    fn accesses_are_divided_between_memory_and_devices() {
        if cfg!(not(target_arch = "x86_64")) {
            return;
        }
        let (mmu, device) = machine();
        let regs = ControlRegs::long_mode(0x1000);
        let mut cpu = mmu.create_soft_vcpu(regs).unwrap();
        every_access(&mmu, &device, cpu.vcpu_mut());
        every_access(&mmu, &device, Inside { session: cpu.session(), regs });
        mmu.audit().unwrap();
    }
}
