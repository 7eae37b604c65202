// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's edit of a live page-table entry: store, INVLPG, and the fault that follows.

use crate::figure::{Failure, Figure, Found, Row, check_eq};
use crate::guest::{LEAF, MIB, Memory, PAGE, regs};
use crate::measure::{Effort, Variant, calibrate, interleave, timed};
use mmu_core::addr::Gva;
use mmu_core::memory::AllocatedMemory;
use mmu_core::vcpu::SoftVcpu;
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The page that is remapped, and where the guest sees its entry.
const PAGE_GVA: u64 = 0x4000_0000;
const WINDOW: u64 = 0x10_0000_0000;
/// Edits in a pass.
const EDITS: u64 = 256;

struct Guest {
    mmu: Mmu,
    cpu: SoftVcpu,
}

impl Guest {
    fn new(native: bool) -> Result<Self, Failure> {
        let mut memory = Memory::new(4 * MIB, MIB);
        let root = memory.table();
        memory.map(root, PAGE_GVA, 0);
        let table = memory.leaf_table(root, PAGE_GVA);
        memory.map(root, WINDOW, table);
        for page in 0..EDITS {
            memory.word(page * PAGE).store(page, Ordering::Relaxed);
        }
        let config = Config::new(Arc::new(AllocatedMemory::new(64 * PAGE))).unsync(native);
        let mmu = memory.engine_of(config)?;
        let cpu = mmu.create_soft_vcpu(regs(root)).map_err(Failure::in_step("vCPU"))?;
        Ok(Self { mmu, cpu })
    }

    /// Maps the page to each of the others in turn, and looks.
    fn pass(&mut self) -> Result<(), Failure> {
        let mut session = self.cpu.session();
        for page in 0..EDITS {
            let entry = ((page * PAGE) | LEAF).to_le_bytes();
            let stored = session.store(Gva(WINDOW), &entry, true);
            stored.map_err(Failure::in_step("store to a table"))?;
            session.invlpg(Gva(PAGE_GVA));
            let seen = session.load_u64(Gva(PAGE_GVA), true).map_err(Failure::in_step("load"))?;
            check_eq("the page after INVLPG", seen, page)?;
        }
        Ok(())
    }
}

/// X1.
#[derive(Debug)]
pub struct Edits;

impl Row for Edits {
    fn id(&self) -> &'static str {
        "X1"
    }

    fn figures(&self) -> &'static [&'static str] {
        &["X1.native", "X1.emulated"]
    }

    fn run(&self, effort: &Effort) -> Result<Found, Failure> {
        let mut found = Found::default();
        let mut guests = [("native", Guest::new(true)?), ("emulated", Guest::new(false)?)];
        let passes = calibrate(effort, || guests[1].1.pass())?;
        let variants = guests.iter_mut().map(|(name, guest)| -> Variant<'_> {
            (*name, Box::new(move |_| timed(passes, EDITS as usize, || guest.pass())))
        });
        let samples = interleave(effort, variants.collect())?;
        let what = "store to a live entry, INVLPG, fault: unsync";
        found.figure(Figure::plain("X1.native", what, &samples, "native", "ns")?);
        let what = "the same with the store emulated";
        found.figure(Figure::plain("X1.emulated", what, &samples, "emulated", "ns")?);
        for (name, guest) in &guests {
            guest.mmu.audit().map_err(Failure::in_step("audit"))?;
            let stats = guest.mmu.stats();
            check_eq("tables written natively", stats.mmu_unsync > 0, *name == "native")?;
        }
        found.plots.push(("X1: an entry edited, flushed, used", "ns", samples));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_seen_both_ways() {
        for native in [true, false] {
            let mut guest = Guest::new(native).unwrap();
            guest.pass().unwrap();
            guest.pass().unwrap();
            let stats = guest.mmu.stats();
            assert_eq!(stats.mmu_unsync, u64::from(native));
            // Before the first fault the table had no shadow.
            assert_eq!(stats.mmu_pte_write, if native { 0 } else { 2 * EDITS - 1 });
            guest.mmu.audit().unwrap();
        }
    }
}
