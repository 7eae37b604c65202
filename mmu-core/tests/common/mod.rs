// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small guest: memory, and page tables written as a VMM or a guest kernel would.
#![allow(dead_code)]

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig};
use mmu_core::paging::{Reason, Regs, bits};
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub const MIB: u64 = 1 << 20;
pub const PAGE: u64 = 4096;
/// Rights of an ordinary user page.
pub const RWU: u64 = bits::P | bits::RW | bits::US;

/// An engine with one slot of memory at 0.
pub struct Guest {
    pub mmu: Mmu,
    /// Next free frame for page tables.
    next: AtomicU64,
    pub root: Gpa,
}

impl Guest {
    /// `size` bytes of memory, of which page tables take the frames from `tables` on, and
    /// `frames` shadow table frames.
    pub fn new(size: u64, tables: u64, frames: u64, log_dirty: bool) -> Self {
        Self::with(Self::config(frames), size, tables, log_dirty)
    }

    /// What `new` makes its engine of.
    pub fn config(frames: u64) -> Config {
        Config::new(Arc::new(AllocatedMemory::new(frames * PAGE)))
    }

    pub fn with(config: Config, size: u64, tables: u64, log_dirty: bool) -> Self {
        let mmu = Mmu::new(config).unwrap();
        let slot = SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(size)));
        mmu.create_slot(if log_dirty { slot.log_dirty() } else { slot }).unwrap();
        Self { mmu, next: AtomicU64::new(tables + PAGE), root: Gpa(tables) }
    }

    pub fn regs(&self) -> Regs {
        Regs::long_mode(self.root.0)
    }

    pub fn vcpu(&self) -> SoftVcpu {
        self.mmu.create_soft_vcpu(self.regs()).unwrap()
    }

    pub fn new_table(&self) -> Gpa {
        Gpa(self.next.fetch_add(PAGE, Ordering::Relaxed))
    }

    pub fn read(&self, gpa: Gpa) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.mmu.memory().read(gpa, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, gpa: Gpa, value: u64) {
        assert_eq!(self.mmu.write_phys(gpa, &value.to_le_bytes()), 8);
    }

    /// Guest-physical address of the entry for `gva` at `level`; makes the tables above it.
    pub fn entry(&self, root: Gpa, gva: Gva, level: u32) -> Gpa {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let at = Gpa(table.0 + (gva.0 >> (12 + 9 * (above - 1)) & 511) * 8);
            let mut entry = self.read(at);
            if entry & bits::P == 0 {
                entry = self.new_table().0 | RWU;
                self.write(at, entry);
            }
            table = Gpa(entry & bits::ADDR);
        }
        Gpa(table.0 + (gva.0 >> (12 + 9 * (level - 1)) & 511) * 8)
    }

    pub fn map(&self, gva: Gva, gpa: Gpa, flags: u64) {
        self.write(self.entry(self.root, gva, 1), gpa.0 | flags);
    }

    pub fn audit(&self) -> mmu_core::shadow::AuditReport {
        self.mmu.audit().unwrap_or_else(|error| panic!("audit: {error}"))
    }
}

pub fn load(cpu: &mut SoftVcpu, gva: u64) -> u64 {
    cpu.session().load_u64(Gva(gva), true).unwrap()
}

pub fn store(cpu: &mut SoftVcpu, gva: u64, value: u64) {
    cpu.session().store(Gva(gva), &value.to_le_bytes(), true).unwrap();
}

pub fn reason(result: Result<(), SoftExit>) -> Reason {
    match result {
        Err(SoftExit::Fault(fault)) => fault.reason,
        other => panic!("{other:?}"),
    }
}
