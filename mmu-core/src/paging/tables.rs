// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a walk reads the tables' entries: live guest memory, or whatever else holds tables.

use super::descend::{Window, half};
use super::format::Layout;
use super::mode::PagingMode;
use crate::addr::Gpa;
use crate::memory::{Hint, MemoryMap};
use crate::sync::Ordering;

/// Memory with page tables that is no guest's: an image, a snapshot, a debugger's view. It need not
/// be aligned to anything. [`PagingMode::translate_in`] walks it.
pub trait Tables {
    /// The little-endian entry of `size` bytes, 4 or 8, at `gpa`; `None` if any of its bytes is
    /// not there.
    fn entry(&self, gpa: Gpa, size: u64) -> Option<u64>;
}

/// What a descent reads from. Every implementation is instantiated with the walking algorithm.
pub(super) trait Source: Copy {
    /// What is remembered from one table for the next.
    type Place;

    /// Begins at the first table in memory; `None` if it is not there.
    fn start(self, table: u64) -> Option<Self::Place>;

    /// The entry for `gva` in the table of this level, if it is there.
    fn entry<L: Layout>(
        self,
        place: &mut Self::Place,
        table: u64,
        gva: u64,
        level: u8,
    ) -> Option<u64>;

    /// A PDPTE of PAE paging, if it is there.
    fn pdpte(self, mode: &PagingMode, index: usize) -> Option<u64>;
}

/// The memory of a running guest, whose PDPTEs are registers (SDM 5.4.1).
#[derive(Clone, Copy)]
pub(super) struct Live<'m> {
    pub(super) map: &'m MemoryMap,
    pub(super) hint: &'m Hint,
}

impl<'m> Source for Live<'m> {
    type Place = Window<'m>;

    #[inline(always)]
    fn start(self, table: u64) -> Option<Window<'m>> {
        Window::at(self.map, self.hint, table)
    }

    #[inline(always)]
    fn entry<L: Layout>(
        self,
        window: &mut Window<'m>,
        table: u64,
        gva: u64,
        level: u8,
    ) -> Option<u64> {
        let cell = window.entry::<L>(self.map, self.hint, table, gva, level)?;
        // Acquire: a table that another vCPU filled before it stored this entry is seen full.
        let stored = cell.load(Ordering::Acquire);
        Some(if L::WIDE { stored } else { half(stored, L::index(gva, level)) })
    }

    #[inline(always)]
    fn pdpte(self, mode: &PagingMode, index: usize) -> Option<u64> {
        Some(mode.pdptrs[index & 3])
    }
}

/// [`Tables`], where the PDPTEs are in memory at CR3, as the registers' load would find them.
pub(super) struct Still<'t, T>(pub(super) &'t T);

// Not derived: `T` itself need not be `Copy`.
impl<T> Clone for Still<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Still<'_, T> {}

impl<T: Tables> Source for Still<'_, T> {
    type Place = ();

    #[inline(always)]
    fn start(self, _: u64) -> Option<()> {
        Some(())
    }

    #[inline(always)]
    fn entry<L: Layout>(self, _: &mut (), table: u64, gva: u64, level: u8) -> Option<u64> {
        let size = if L::WIDE { 8 } else { 4 };
        self.0.entry(Gpa(table + L::index(gva, level) * size), size)
    }

    #[inline(always)]
    fn pdpte(self, mode: &PagingMode, index: usize) -> Option<u64> {
        self.0.entry(Gpa(mode.root + 8 * index as u64), 8)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::bits::*;
    use super::super::{Access, Reason, Regs, read_pdptrs};
    use super::*;
    use crate::addr::{Gva, PAGE_SHIFT};
    use crate::memory::{AllocatedMemory, Backing, SlotConfig};
    use std::sync::Arc;

    /// The memory of a map as bytes.
    struct Bytes<'m>(&'m MemoryMap);

    impl Tables for Bytes<'_> {
        fn entry(&self, gpa: Gpa, size: u64) -> Option<u64> {
            let mut bytes = [0; 8];
            let entry = bytes.get_mut(..size as usize)?;
            (self.0.read(gpa, entry) as u64 == size).then(|| u64::from_le_bytes(bytes))
        }
    }

    #[test]
    fn finds_what_a_walk_of_live_memory_finds() {
        const PAGES: u64 = 6;
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        };
        let long = Regs::long_mode(0x1000);
        let flat = Regs { cr4: CR4_PSE, efer: 0, ..long };
        let modes = [
            Regs { cr0: CR0_PE, efer: 0, ..long },
            flat,
            Regs { cr4: CR4_PAE, cr3: 0x1020, efer: EFER_NXE, ..flat },
            long,
            Regs { cr4: long.cr4 | CR4_LA57, ..long },
        ];
        let (mut mapped, mut outside) = (0, 0);
        for round in 0..200 {
            let memory = Arc::new(AllocatedMemory::new(PAGES << PAGE_SHIFT));
            for word in memory.words() {
                let flags =
                    random() & random() & 0x8000_0000_0000_0ffe | u64::from(random() % 8 > 0);
                // One page beyond the end.
                let entry = (random() % (PAGES + 1)) << PAGE_SHIFT | flags;
                word.store(entry & !PS | entry << 32 & !(PS << 32), Ordering::Relaxed);
            }
            let map = MemoryMap::build([SlotConfig::new(0, Gpa(0), memory.clone())]).unwrap();
            for regs in modes {
                let hint = Hint::default();
                let pdptrs = read_pdptrs(&map, &hint, regs.cr3).unwrap();
                let mode = PagingMode::new(&Regs { pdptrs, ..regs }).unwrap();
                for _ in 0..50 {
                    let gva = Gva(random() >> (round % 3 * 16));
                    for access in [None, Some(Access::read()), Some(Access::write().user())] {
                        let live = mode.translate(&map, &hint, gva, access);
                        let still = mode.translate_in(&Bytes(&map), gva, access);
                        assert_eq!(live, still, "{regs:x?} {gva} {access:?}");
                        mapped += u32::from(still.is_ok());
                        let table = |f: super::super::Fault| f.reason == Reason::TableOutside;
                        outside += u32::from(still.is_err_and(table));
                    }
                }
            }
        }
        assert!(mapped > 1000 && outside > 1000, "{mapped} mapped, {outside} outside");
    }

    #[test]
    fn a_pdpte_that_is_not_there_is_the_top_table() {
        let memory = Arc::new(AllocatedMemory::new(0x1000));
        let map = MemoryMap::build([SlotConfig::new(0, Gpa(0), memory)]).unwrap();
        let regs = Regs { cr4: CR4_PAE, cr3: 0x1000, efer: 0, ..Regs::long_mode(0) };
        let mode = PagingMode::new(&regs).unwrap();
        let fault = mode.translate_in(&Bytes(&map), Gva(0), None).unwrap_err();
        assert_eq!((fault.reason, fault.level, fault.error_code), (Reason::TableOutside, 0, 0));
    }
}
