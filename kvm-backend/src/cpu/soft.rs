// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A software vCPU: the emulator executes the guest's instructions, and every access goes through
//! the engine's shadow tables.

use super::bus::{GuestBus, Halted, Inside};
use super::{Cpu, Crash, Event, Watch};
use crate::emu::{self, DecodeCache, Exception, Stop};
use crate::regs::Regs;
use mmu_core::Mmu;
use mmu_core::mmio::Initiator;
use mmu_core::paging::Regs as ControlRegs;
use mmu_core::vcpu::{SoftVcpu, VcpuError, VcpuHandle};

/// Instructions between two looks at the watch.
const SLICE: u64 = 1 << 16;

/// A guest vCPU in software.
#[derive(Debug)]
pub struct SoftCpu {
    devices: Initiator,
    soft: SoftVcpu,
    regs: Regs,
    cache: DecodeCache,
    watch: Watch,
    faults: u64,
}

impl SoftCpu {
    /// A software vCPU of this engine.
    ///
    /// # Errors
    ///
    /// [`VcpuError`].
    pub fn new(mmu: &Mmu, regs: ControlRegs, watch: Watch) -> Result<Self, VcpuError> {
        let soft = mmu.create_soft_vcpu(regs)?;
        let (regs, cache) = (Regs::default(), DecodeCache::new());
        Ok(Self { devices: mmu.bus().initiator(), soft, regs, cache, watch, faults: 0 })
    }

    /// Another thread's hold on the vCPU.
    #[must_use]
    pub fn handle(&self) -> VcpuHandle {
        self.soft.handle()
    }
}

impl Cpu for SoftCpu {
    fn regs(&self) -> Regs {
        self.regs
    }

    fn set_regs(&mut self, regs: &Regs) {
        self.regs = *regs;
    }

    fn run(&mut self) -> Event {
        loop {
            let regs = *self.soft.vcpu().regs();
            let memory = Inside { session: self.soft.session(), regs };
            let mut bus = GuestBus { devices: &mut self.devices, memory };
            let mut budget = SLICE;
            let event = emu::run(&mut self.regs, &mut bus, &mut self.cache, &mut budget);
            drop(bus);
            match event {
                Ok(emu::Event::Halt) => {
                    self.watch.exit(self.regs.rip);
                    return Event::Halt;
                }
                Ok(emu::Event::Pause) => std::thread::yield_now(),
                Ok(_) => {}
                Err(Stop::Exception(exception)) => {
                    return Event::Crash(Crash::Exception(exception));
                }
                Err(Stop::Bus(Halted::Crash(crash))) => return Event::Crash(crash),
                Err(Stop::Bus(Halted::Requested)) => return Event::Stopped,
                Err(Stop::Bus(Halted::LoadCr3(cr3))) => {
                    if self.soft.vcpu_mut().set_cr3(cr3).is_err() {
                        // As on a processor (SDM vol. 2, MOV to CR).
                        return Event::Crash(Crash::Exception(Exception::gp(0)));
                    }
                }
            }
            let faults = self.soft.vcpu().faults();
            if faults != self.faults {
                self.faults = faults;
                self.watch.exit(self.regs.rip);
            }
        }
    }

    /// A software vCPU remembers nothing outside the guest, so nobody waits for it.
    fn idle(&mut self) {}
}
