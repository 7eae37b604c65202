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

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A generator whose numbers the seed alone decides.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Seeds that differ little must not give numbers that do (splitmix64).
        let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(x ^ x >> 31 | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

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
        Self::over(mmu, tables)
    }

    /// A guest of this engine, whose page tables take the frames from `tables` on.
    pub fn over(mmu: Mmu, tables: u64) -> Self {
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
