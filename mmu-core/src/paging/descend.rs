// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walking algorithm: from the root to the leaf, in every format.
//!
//! It reads each entry once, tests one mask a level, and sums up the entries' bits; rights, keys and
//! accessed bits are then tested all at once, by comparing the sum with what the access needs.

use super::access::Rule;
use super::bits::*;
use super::fault::Reason;
use super::format::{Entry, Layout};
use super::mode::PagingMode;
use super::tables::{Live, Source};
use super::walk::{Path, Step};
use crate::addr::{Gfn, Gpa, PAGE_SHIFT};
use crate::memory::{Hint, MemoryMap, View};
use crate::sync::AtomicU64;

/// Whether entries are recorded.
pub(super) trait Trace {
    fn pass(&mut self, step: Step);
}

impl Trace for () {
    #[inline(always)]
    fn pass(&mut self, _: Step) {}
}

impl Trace for Path {
    #[inline(always)]
    fn pass(&mut self, step: Step) {
        self.push(step);
    }
}

/// The memslot that the last table was in: the next one most often is in it too.
#[derive(Clone, Copy)]
pub(super) struct Window<'m> {
    words: &'m [AtomicU64],
    /// First guest-physical byte.
    base: u64,
}

impl<'m> Window<'m> {
    #[inline(always)]
    pub(super) fn at(map: &'m MemoryMap, hint: &Hint, table: u64) -> Option<Self> {
        let View { base, words } = map.view(Gfn(table >> PAGE_SHIFT), hint, 0)?;
        Some(Self { words, base: base.0 })
    }

    /// The same for a table in another slot than the last. Each level but the lowest, where walks
    /// differ most, has a turn of its own in the hint.
    #[inline(always)]
    fn move_to(map: &'m MemoryMap, hint: &Hint, table: u64, level: u8) -> Option<Self> {
        let gfn = Gfn(table >> PAGE_SHIFT);
        let View { base, words } = match level {
            1 => map.view_unhinted(gfn)?,
            _ => map.view(gfn, hint, level as usize)?,
        };
        Some(Self { words, base: base.0 })
    }

    /// The word with the entry for `gva` in the table of this level; moves to the table's slot.
    #[inline(always)]
    pub(super) fn entry<L: Layout>(
        &mut self,
        map: &'m MemoryMap,
        hint: &Hint,
        table: u64,
        gva: u64,
        level: u8,
    ) -> Option<&'m AtomicU64> {
        let index = L::index(gva, level);
        let word = if L::WIDE { index } else { index / 2 };
        if let Some(cell) = self.word(table, word) {
            return Some(cell);
        }
        *self = Self::move_to(map, hint, table, level)?;
        self.word(table, word)
    }

    /// A word of the page at `table`.
    #[cfg(not(loom))]
    #[inline(always)]
    pub(super) fn word(&self, table: u64, word: u64) -> Option<&'m AtomicU64> {
        // A table below the slot lies a page or more below and a word less than a page above it,
        // so that the index wraps to one beyond every slice.
        let first = table.wrapping_sub(self.base) >> 3;
        self.words.get(first.wrapping_add(word) as usize)
    }

    /// A word of the page at `table`; a model's page has few.
    #[cfg(loom)]
    pub(super) fn word(&self, table: u64, word: u64) -> Option<&'m AtomicU64> {
        let entries = crate::addr::ENTRIES as u64;
        let page = table.checked_sub(self.base)? >> PAGE_SHIFT;
        (word < entries).then(|| self.words.get((page * entries + word) as usize))?
    }
}

/// The end of a descent at a leaf.
pub(super) struct Reached {
    pub(super) leaf: u64,
    /// See [`Rule`].
    pub(super) sum: u64,
    pub(super) level: u8,
}

/// The end of a descent elsewhere.
pub(super) struct Missing {
    pub(super) level: u8,
    pub(super) reason: Reason,
}

/// A translation in two registers.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    pub(super) gpa: u64,
    /// Entry bits where entries have them: W, U and X of the sum, the others of the leaf; the
    /// page's shift at bit 16 and the level at bit 24. 0 if this is none: the slow path
    /// will tell why.
    pub(super) info: u64,
}

/// Where [`Packed::info`] has the page's shift.
pub(super) const SHIFT_AT: u32 = 16;
/// Where [`Packed::info`] has the level.
pub(super) const LEVEL_AT: u32 = 24;

impl Packed {
    pub(super) const NONE: Self = Self { gpa: 0, info: 0 };

    /// Without paging the linear address is the physical one, 32 bits wide (SDM 5.1.1).
    #[inline]
    pub(super) fn unpaged(gva: u64) -> Self {
        let place = u64::from(PAGE_SHIFT) << SHIFT_AT | 1 << LEVEL_AT;
        Self { gpa: gva & 0xffff_ffff, info: P | RW | US | NX | place }
    }

    #[inline(always)]
    pub(super) fn new<L: Layout>(gva: u64, reached: &Reached) -> Self {
        let Reached { leaf, sum, level } = *reached;
        let offset = gva & (L::size(level) - 1);
        let keep = P | PWT | PCD | A | D | G | PAT | 15 << KEY_SHIFT;
        let keep = if level == 1 { keep } else { keep | PAT_LARGE };
        let rights = RW | US | NX;
        let place = u64::from(L::shift(level)) << SHIFT_AT | u64::from(level) << LEVEL_AT;
        Self { gpa: L::page(leaf, level) | offset, info: leaf & keep | sum & rights | place }
    }
}

/// [`PagingMode::reach`] of a format, as the mode holds it.
pub(super) type Reach = fn(&PagingMode, &MemoryMap, &Hint, u64, &Rule) -> Packed;

impl PagingMode {
    /// The walk that meets no obstacle: no tag, no fault, nothing to store.
    pub(super) fn reach<L: Layout>(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: u64,
        rule: &Rule,
    ) -> Packed {
        let Some(gva) = self.plain::<L>(gva) else { return Packed::NONE };
        match self.descend::<L, _, _>(Live { map, hint }, gva, &mut ()) {
            Ok(reached) if rule.is_met(reached.sum, reached.leaf) => {
                Packed::new::<L>(gva, &reached)
            }
            _ => Packed::NONE,
        }
    }

    /// [`Packed::unpaged`] in the shape of the formats' walks.
    pub(super) fn reach_unpaged(&self, _: &MemoryMap, _: &Hint, gva: u64, _: &Rule) -> Packed {
        Packed::unpaged(gva)
    }

    /// Reads entries from the root to the leaf, without looking at rights.
    #[inline(always)]
    pub(super) fn descend<L: Layout, S: Source, T: Trace>(
        &self,
        source: S,
        gva: u64,
        trace: &mut T,
    ) -> Result<Reached, Missing> {
        let mut table = if L::PDPTRS {
            // SDM 5.4.1: they have no rights and no accessed bit.
            let outside = Missing { level: 0, reason: Reason::TableOutside };
            let pdpte = source.pdpte(self, (gva >> 30) as usize & 3).ok_or(outside)?;
            match self.masks.decode_pdpte(pdpte) {
                Entry::Table(table) => table.0,
                Entry::Absent => {
                    return Err(Missing { level: 3, reason: Reason::NotPresent });
                }
                _ => return Err(Missing { level: 3, reason: Reason::Reserved }),
            }
        } else {
            self.root
        };
        let outside = |level| {
            let top = level == L::LEVELS && !L::PDPTRS;
            Missing { level: if top { 0 } else { level + 1 }, reason: Reason::TableOutside }
        };
        let (mut all, mut any) = (u64::MAX, 0);
        let mut place = source.start(table).ok_or_else(|| outside(L::LEVELS))?;
        for level in (1..=L::LEVELS).rev() {
            let entry = source.entry::<L>(&mut place, table, gva, level);
            let entry = entry.ok_or_else(|| outside(level))?;
            trace.pass(Step {
                level,
                entry: Gpa(table + L::index(gva, level) * if L::WIDE { 8 } else { 4 }),
                value: entry,
            });
            if level > 1 && entry & self.masks.table_at(level) == P {
                all &= entry;
                any |= entry;
                table = entry & ADDR;
                continue;
            }
            if level > 1 || entry & self.masks.page != P {
                match self.masks.decode::<L>(entry, level) {
                    Entry::Leaf(_) => {}
                    Entry::Absent => return Err(Missing { level, reason: Reason::NotPresent }),
                    _ => return Err(Missing { level, reason: Reason::Reserved }),
                }
            }
            // D is the leaf's alone (SDM 5.8).
            let sum = (all | D) & entry & !NX | !(any | entry) & NX;
            return Ok(Reached { leaf: entry, sum, level });
        }
        // Not reached: level 1 returns.
        Err(Missing { level: 1, reason: Reason::Reserved })
    }
}

/// The 4-byte entry in its word.
#[inline(always)]
pub(super) fn half(word: u64, index: u64) -> u64 {
    word >> (32 * (index & 1)) & 0xffff_ffff
}
