// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest with two-level tables of two entries.

use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{AllocatedMemory, DirtyMode, Hint, SlotConfig};
use mmu_core::paging::{Access, Regs, bits};
use mmu_core::shadow::{AuditReport, Disagreement, Outcome, Processor};
use mmu_core::sync::Ordering;
use mmu_core::sync::epoch::Collector;
use mmu_core::vcpu::{SoftVcpu, Vcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// A guest entry for page `n`: ordinary rights, used and written already, so that a walk changes
/// nothing.
#[must_use]
pub const fn to(n: u64) -> u64 {
    (n * PAGE) | bits::P | bits::RW | bits::US | bits::A | bits::D
}

/// Where the consumer's processor sees the shadow tables.
const TABLES: Machine = Machine(0x100_0000);
/// Where it sees the memory of slot `n`: at `MEMORY + n * STRIDE`.
const MEMORY: u64 = 0x200_0000;
const STRIDE: u64 = 0x10_0000;

/// Page `n` (0 or 1) behind the root's entry 0.
#[must_use]
pub const fn lo(n: u64) -> Gva {
    Gva(n * PAGE)
}

/// Page `n` (0 or 1) behind the root's entry 1: the canonical upper half.
#[must_use]
pub const fn hi(n: u64) -> Gva {
    Gva(0u64.wrapping_sub((2 - n) * PAGE))
}

/// An engine with one slot of memory at 0, and a guest whose root table is page 0 of it.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The engine.
    pub mmu: Mmu,
}

/// A real processor that has nothing to kick in a model.
struct Cpu;

impl Processor for Cpu {
    fn kick(&self) {}

    fn forgets_outside(&self) -> bool {
        true
    }
}

impl Guest {
    /// `pages` pages of memory and `frames` shadow table frames, reclaimed by the checked stand-in.
    #[must_use]
    pub fn new(pages: u64, frames: u64) -> Self {
        Self::build(pages, Self::config(frames), DirtyMode::Off)
    }

    /// The same with a dirty log of this kind.
    #[must_use]
    pub fn tracking(pages: u64, frames: u64, dirty: DirtyMode) -> Self {
        Self::build(pages, Self::config(frames), dirty)
    }

    /// The same with this collector.
    #[must_use]
    pub fn with_collector(pages: u64, frames: u64, collector: Collector) -> Self {
        let config = Config { collector, ..Self::config(frames) };
        Self::build(pages, config, DirtyMode::Off)
    }

    /// The same where the guest may write leaf tables natively.
    #[must_use]
    pub fn native(pages: u64, frames: u64) -> Self {
        Self::build(pages, Self::config(frames).unsync(true), DirtyMode::Off)
    }

    /// The same where a leaf of the root may map a block of two pages.
    #[must_use]
    pub fn with_blocks(pages: u64, frames: u64) -> Self {
        Self::build(pages, Self::config(frames).largest_page(2 * PAGE), DirtyMode::Off)
    }

    fn config(frames: u64) -> Config {
        Config::new(Arc::new(AllocatedMemory::at(frames * PAGE, TABLES)))
    }

    fn build(pages: u64, config: Config, dirty: DirtyMode) -> Self {
        let mmu = Mmu::new(config).unwrap();
        mmu.create_slot(Self::slot(0, 0, pages).track(dirty)).unwrap();
        Self { mmu }
    }

    /// Slot `id` of fresh memory, `pages` pages at guest frame `gfn`.
    #[must_use]
    pub fn slot(id: u32, gfn: u64, pages: u64) -> SlotConfig {
        let machine = Machine(MEMORY + u64::from(id) * STRIDE);
        let memory = AllocatedMemory::at(pages * PAGE, machine);
        SlotConfig::new(id, Gpa(gfn * PAGE), Arc::new(memory))
    }

    /// Writes entry `index` of the guest table in page `table`, through the engine.
    pub fn set(&self, table: u64, index: u64, entry: u64) {
        self.write(Gpa(table * PAGE + index * 8), entry);
    }

    /// Takes away what was derived from the entry, which is as before then: writing the same keeps it.
    pub fn forget(&self, table: u64, index: u64) {
        let entry = self.read(Gpa(table * PAGE + index * 8));
        self.set(table, index, 0);
        self.set(table, index, entry);
    }

    /// Writes a word of guest-physical memory as a device does.
    pub fn write(&self, gpa: Gpa, word: u64) {
        assert_eq!(self.mmu.write_phys(gpa, &word.to_le_bytes()), 8);
    }

    /// A word of guest-physical memory.
    #[must_use]
    pub fn read(&self, gpa: Gpa) -> u64 {
        let mut bytes = [0; 8];
        assert_eq!(self.mmu.memory().read(gpa, &mut bytes), 8);
        u64::from_le_bytes(bytes)
    }

    /// Puts a word where the guest might write as well, as the host does; the one before.
    pub fn swap(&self, gpa: Gpa, word: u64) -> u64 {
        let map = self.mmu.memory();
        map.word(gpa, &Hint::default()).unwrap().swap(word, Ordering::AcqRel)
    }

    /// Registers with the root table in page `root`.
    #[must_use]
    pub fn regs(root: u64) -> Regs {
        Regs::long_mode(root * PAGE)
    }

    /// A vCPU on the root table in page 0.
    #[must_use]
    pub fn vcpu(&self) -> Vcpu {
        self.vcpu_at(0)
    }

    /// A vCPU on the root table in page `root`.
    #[must_use]
    pub fn vcpu_at(&self, root: u64) -> Vcpu {
        self.mmu.create_vcpu(Arc::new(Cpu), Self::regs(root)).unwrap()
    }

    /// A software vCPU on the root table in page 0.
    #[must_use]
    pub fn soft(&self) -> SoftVcpu {
        self.mmu.create_soft_vcpu(Self::regs(0)).unwrap()
    }

    /// The audit, which must find nothing. A disagreement that `rule` is there to prevent is
    /// reported under its number, any other is not.
    pub fn audit(&self, rule: &str, prevents: impl Fn(&Disagreement) -> bool) -> AuditReport {
        match self.mmu.audit() {
            Ok(report) => report,
            Err(error) if prevents(&error) => panic!("{rule}: {error}"),
            Err(error) => panic!("audit: {error}"),
        }
    }

    /// The audit of a model whose rule has an assertion of its own.
    pub fn audit_clean(&self) -> AuditReport {
        self.audit("", |_| false)
    }
}

/// Whether the audit found an entry wrong for a reason that contains `what`.
pub fn entry(what: &'static str) -> impl Fn(&Disagreement) -> bool {
    move |found| matches!(found, Disagreement::Entry { why, .. } if why.contains(what))
}

/// Serves a fault as a vCPU's loop does, until it does not stall.
pub fn fault(vcpu: &mut Vcpu, gva: Gva, access: Access) -> Outcome {
    loop {
        match vcpu.fault(gva, access) {
            Ok(outcome) => return outcome,
            Err(stall) => {
                loom::thread::yield_now();
                while vcpu.must_wait(stall) {
                    loom::thread::yield_now();
                }
            }
        }
    }
}
