// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real vCPU: its page faults are what the engine serves.

use super::bus::{GuestBus, Halted};
use super::{Cpu, Crash, Event, Watch};
use crate::emu::{self, DecodeCache, Stop};
use crate::kvm::{Downgrade, Exit, Kicker, KvmError, KvmVcpu};
use crate::regs::Regs;
use mmu_core::Mmu;
use mmu_core::addr::Gva;
use mmu_core::mmio::Initiator;
use mmu_core::paging::{Access, Kind, Regs as ControlRegs, code};
use mmu_core::shadow::{self, Generation, Outcome, Processor, Stall};
use mmu_core::vcpu::{Entry, Vcpu, VcpuError, VcpuHandle};
use std::sync::Arc;

const PAGE_FAULT: u8 = 14;
const GENERAL_PROTECTION: u8 = 13;

struct KickedProcessor(Kicker);

impl Processor for KickedProcessor {
    fn kick(&self) {
        self.0.kick();
    }
}

/// A guest vCPU on KVM.
#[derive(Debug)]
pub struct KvmCpu {
    mmu: Mmu,
    devices: Initiator,
    vcpu: Vcpu,
    kvm: KvmVcpu,
    cache: DecodeCache,
    watch: Watch,
}

/// Why [`KvmCpu::new`] failed.
#[derive(Debug, thiserror::Error)]
pub enum NewCpuError {
    /// The engine refused the registers.
    #[error(transparent)]
    Regs(#[from] VcpuError),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl KvmCpu {
    /// Puts the engine behind a KVM vCPU.
    ///
    /// # Errors
    ///
    /// [`NewCpuError`].
    pub fn new(
        mmu: &Mmu,
        mut kvm: KvmVcpu,
        regs: ControlRegs,
        watch: Watch,
    ) -> Result<Self, NewCpuError> {
        let vcpu = mmu.create_vcpu(Arc::new(KickedProcessor(kvm.kicker())), regs)?;
        // A software KVM remembers the tables for the VM, not for a vCPU: also what was narrowed
        // before this one was there, which no other vCPU needs to have drained.
        push(mmu, &mut kvm, shadow::Downgrade::Everything);
        let (devices, cache) = (mmu.bus().initiator(), DecodeCache::new());
        Ok(Self { mmu: mmu.clone(), devices, vcpu, kvm, cache, watch })
    }

    /// Another thread's hold on the vCPU.
    #[must_use]
    pub fn handle(&self) -> VcpuHandle {
        self.vcpu.handle()
    }

    fn run_inner(&mut self) -> Result<Event, Crash> {
        loop {
            let (mmu, kvm) = (&self.mmu, &mut self.kvm);
            let entry = match self.vcpu.enter(true, |d| push(mmu, kvm, d)) {
                Ok(entry) => entry,
                Err(stall) => {
                    self.wait(stall)?;
                    continue;
                }
            };
            let (root, generation) = match entry {
                Entry::Run { root, generation } => (root, generation),
                Entry::Exit => return Ok(Event::Stopped),
                Entry::RootOutside => return Err(Crash::RootOutside),
                Entry::RingFull => return Err(Crash::RingFull),
            };
            let exit = match self.kvm.set_root(root.0) {
                Ok(()) => self.kvm.run(generation.number()),
                Err(error) => Err(error),
            };
            self.vcpu.leave();
            let exit = exit.map_err(host)?;
            self.note_drained(generation);
            self.watch.exit(self.kvm.regs().rip);
            match exit {
                Exit::Interrupted | Exit::Drained => {}
                Exit::Exception { vector: PAGE_FAULT, error_code, cr2 } => {
                    self.page_fault(Gva(cr2), error_code.unwrap_or(0))?;
                }
                Exit::Exception { vector: GENERAL_PROTECTION, .. } => {
                    if self.emulate()? == emu::Event::Halt {
                        return Ok(Event::Halt);
                    }
                }
                Exit::Exception { vector, error_code, .. } => {
                    return Err(self.exception(vector, error_code.unwrap_or(0)));
                }
                other => return Err(Crash::Host(format!("unexpected exit: {other:?}"))),
            }
        }
    }

    fn page_fault(&mut self, gva: Gva, error_code: u32) -> Result<(), Crash> {
        let kind = match error_code {
            c if c & code::I != 0 => Kind::Execute,
            c if c & code::W != 0 => Kind::Write,
            _ => Kind::Read,
        };
        let access = Access { kind, user: true, implicit: false };
        match self.vcpu.fault(gva, access) {
            Ok(Outcome::Fixed) => Ok(()),
            Ok(Outcome::Guest(fault)) => Err(Crash::Fault(fault)),
            Ok(Outcome::Reserved) => Err(Crash::Reserved(gva)),
            Ok(Outcome::HostReadOnly { gpa }) => Err(Crash::HostReadOnly(gpa)),
            Ok(Outcome::Emulate { .. } | Outcome::Mmio { .. }) => self.emulate().map(drop),
            Err(stall) => self.wait(stall),
        }
    }

    /// Executes one instruction on the guest's behalf.
    fn emulate(&mut self) -> Result<emu::Event, Crash> {
        let mut regs = self.kvm.regs();
        let mut bus = GuestBus { devices: &mut self.devices, memory: &mut self.vcpu };
        let event = emu::step(&mut regs, &mut bus, &mut self.cache);
        self.kvm.set_regs(&regs);
        event.map_err(|stop| match stop {
            Stop::Exception(exception) => Crash::Exception(exception),
            Stop::Bus(Halted::Crash(crash)) => crash,
            Stop::Bus(other) => Crash::Host(format!("emulation stopped: {other:?}")),
        })
    }

    /// An exception that nobody handles, with the instruction that raised it where it can be read.
    fn exception(&self, vector: u8, error_code: u32) -> Crash {
        let rip = self.kvm.regs().rip;
        let mut bytes = [0; 8];
        let read = self.vcpu.read(Gva(rip), &mut bytes, Access::execute().user());
        match (vector, read) {
            (6, Ok(())) => Crash::Host(format!("unhandled #UD at {rip:#x} [{bytes:02x?}]")),
            _ => Crash::Vector { vector, error_code },
        }
    }

    fn note_drained(&mut self, generation: Generation) {
        if self.kvm.acknowledged() >= generation.number() {
            self.vcpu.drained(generation);
        }
    }

    /// Waits, outside the guest, and lets the processor drain inside, so that two vCPUs that wait
    /// for each other get on.
    fn wait(&mut self, stall: Stall) -> Result<(), Crash> {
        while self.vcpu.must_wait(stall) {
            self.drain()?;
            std::thread::yield_now();
        }
        // Once in any case: a frame may be in another thread's hands although nobody has to
        // acknowledge anything any more.
        std::thread::yield_now();
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Crash> {
        let (mmu, kvm) = (&self.mmu, &mut self.kvm);
        let generation = self.vcpu.drain(|d| push(mmu, kvm, d));
        if self.kvm.root() != 0 {
            self.kvm.drain_only(generation.number()).map_err(host)?;
            self.note_drained(generation);
        } else {
            // It has never run: it remembers nothing.
            self.vcpu.drained(generation);
        }
        Ok(())
    }
}

fn host(error: KvmError) -> Crash {
    Crash::Host(error.to_string())
}

/// Queues what the processor must forget. The engine names only what lies in the arena.
fn push(mmu: &Mmu, kvm: &mut KvmVcpu, downgrade: shadow::Downgrade) {
    let queued = kvm.push(match downgrade {
        shadow::Downgrade::Entry { entry, gva: Some(gva) } => {
            Downgrade::Leaf { entry: entry.offset(), gva: gva.0 }
        }
        shadow::Downgrade::Entry { entry, gva: None } => Downgrade::Entry { entry: entry.offset() },
        shadow::Downgrade::Frame(frame) => Downgrade::Frame { frame: frame.index() },
        shadow::Downgrade::Everything => Downgrade::Everything { frames: mmu.table_frames_used() },
    });
    debug_assert!(queued.is_ok(), "{queued:?}");
}

impl Cpu for KvmCpu {
    fn regs(&self) -> Regs {
        self.kvm.regs()
    }

    fn set_regs(&mut self, regs: &Regs) {
        self.kvm.set_regs(regs);
    }

    fn run(&mut self) -> Event {
        self.run_inner().unwrap_or_else(Event::Crash)
    }

    fn idle(&mut self) {
        if self.vcpu.is_wanted() {
            // A failure shows again, and is reported, when the vCPU runs.
            let _ = self.drain();
        }
    }
}
