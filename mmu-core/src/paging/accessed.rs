// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accessed and dirty bits in guest memory (SDM 5.8).
//!
//! They are set only once the whole walk has shown that the access is permitted: accessed in
//! every entry passed, dirty in the leaf and for a write alone. The PDPTE registers have none.

use super::access::Access;
use super::bits::A;
use super::descend::{Packed, Reached, half};
use super::fault::Fault;
use super::format::Layout;
use super::mode::PagingMode;
use super::tables::Live;
use super::walk::Path;
use crate::memory::{Hint, MemoryMap};
use crate::sync::{Ordering, rule};

/// How often a walk starts again because the guest changed an entry between the walk's read and its
/// update. Each restart means that a store of the guest's came in between, so only a guest that
/// stores to the very entry without pause gets here.
const RESTARTS: u32 = if cfg!(loom) { 8 } else { 1000 };

impl PagingMode {
    /// Walks, and sets accessed and dirty bits along the path.
    pub(super) fn walk_tracking<L: Layout>(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: u64,
        access: Access,
        path: &mut Path,
    ) -> Result<Packed, Fault> {
        let rule = self.rule(access);
        let mut restarts = 0;
        loop {
            path.clear();
            let Reached { mut leaf, sum, level } = self
                .descend::<L, _, _>(Live { map, hint }, gva, path)
                .map_err(|m| self.missing(gva, access, m.level, m.reason))?;
            if let Some(fault) = self.refusal(gva, access, level, sum, leaf) {
                return Err(fault);
            }
            let done = mark_all::<L>(map, hint, path, rule.marks());
            // R24: a lost race means that what was checked above is not what is there now.
            if done || restarts == RESTARTS {
                if let Some(last) = path.steps().last() {
                    leaf = last.value;
                }
                return Ok(Packed::new::<L>(gva, &Reached { leaf, sum, level }));
            }
            restarts += 1;
        }
    }
}

/// Sets the accessed bit along the path and `leaf_marks` in its last entry; false if the guest
/// changed an entry since it was read.
fn mark_all<L: Layout>(map: &MemoryMap, hint: &Hint, path: &mut Path, leaf_marks: u64) -> bool {
    let len = path.steps().len();
    for (i, step) in path.steps_mut().iter_mut().enumerate() {
        let marks = if i + 1 == len { leaf_marks } else { A };
        if step.value & marks == marks {
            continue;
        }
        let Some(page) = map.page(step.entry.gfn()) else { return false };
        // R24: nothing is stored into read-only memory.
        if !page.is_writable() {
            continue;
        }
        let Some(cell) = page.word(step.entry.page_offset()) else { return false };
        let (old, shift) = if L::WIDE {
            (step.value, 0)
        } else {
            let (pair, second) = (cell.load(Ordering::Relaxed), (step.entry.0 / 4) & 1);
            if half(pair, second) != step.value {
                return false;
            }
            (pair, 32 * second)
        };
        let new = old | marks << shift;
        // R24: only what was read and checked is replaced. Relaxed on failure: the walk starts
        // again.
        if !rule!(R24) {
            cell.store(new, Ordering::Release);
        } else if cell.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return false;
        }
        step.value |= marks;
        // After the store, so that a harvest that takes the mark sees the store (R13).
        page.mark_dirty(hint.ring());
    }
    true
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::{Gpa, Gva};
    use crate::memory::{AllocatedMemory, SlotConfig, SlotId};
    use crate::paging::Regs;
    use std::sync::Arc;

    #[test]
    fn the_pages_of_updated_tables_are_logged() {
        let memory = Arc::new(AllocatedMemory::new(0x10000));
        let slot = SlotConfig::new(0, Gpa(0), memory).log_dirty();
        let map = MemoryMap::build([slot]).unwrap();
        let slot = map.by_id(SlotId(0)).unwrap();
        let entries = [(0x1000, 0x2007), (0x2000, 0x3027), (0x3000, 0x4007), (0x4000, 0x9027)];
        for (at, value) in entries {
            slot.region().words()[at / 8].store(value, Ordering::Relaxed);
        }
        let mode = PagingMode::new(&Regs::long_mode(0x1000)).unwrap();
        let walk = |access| mode.walk(&map, &Hint::default(), Gva(0), access).unwrap();
        mode.translate(&map, &Hint::default(), Gva(0), Some(Access::write())).unwrap();
        assert_eq!(slot.region().dirty.clear(0, u64::MAX), 0);
        // Accessed was missing at levels 4 and 2; the page itself is not written by the walk.
        walk(Access::read());
        assert_eq!(slot.region().dirty.clear(0, u64::MAX), 1 << 1 | 1 << 3);
        walk(Access::write());
        assert_eq!(slot.region().dirty.clear(0, u64::MAX), 1 << 4);
        walk(Access::write());
        assert_eq!(slot.region().dirty.clear(0, u64::MAX), 0);
    }
}
