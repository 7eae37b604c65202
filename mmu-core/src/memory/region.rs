// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A slot's memory and what the engine keeps for its pages.
//!
//! It outlives every change of the slot's place and flags: successive memslots that a VMM knows by
//! one number share one region, and so their reverse maps, dirty log and pinned pages.

use super::backing::{Backing, PAGE_WORDS};
use super::pin::Pins;
use super::{DirtyLog, Invalid, SlotError, SlotId};
use crate::addr::{Hva, INDEX_BITS, Machine, PAGE_SHIFT, PAGE_SIZE, PHYSICAL_BITS};
use crate::sync::{AtomicBool, AtomicU64, LazyArray, LocationSet, Ordering};
use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;
use std::sync::Arc;

/// See the module. Everything for a page is allocated in chunks on first use.
pub(crate) struct Region {
    /// Shadow entries that map the page.
    pub(crate) rmap: LazyArray<LocationSet>,
    /// The same for entries that map a whole block: of the sizes of levels 2 and 3.
    large: [LazyArray<LocationSet>; 2],
    /// Shadow pages that shadow the page as a guest page table. While there is one the page must
    /// not be writable.
    pub(crate) shadows: LazyArray<LocationSet>,
    /// How many there are in each block, or more: while there is one the block is not mapped whole.
    tables: [LazyArray<AtomicU64>; 2],
    pub(crate) dirty: DirtyLog,
    /// Whether this region has started its log.
    logs: AtomicBool,
    /// Whether dirty bits in entries may stand for writes that are not in the log: set before the
    /// first map by which they may, cleared when the last such entry is gone.
    dirty_bits: AtomicBool,
    /// What the host has taken away for a while (R7).
    pub(crate) invalid: Invalid,
    pub(super) pins: Pins,
    /// One bit for each page that the host has made read-only.
    host_read_only: LazyArray<AtomicU64>,
    pages: u64,
    machine: Machine,
    /// `backing.words()`, asked once.
    words: NonNull<[AtomicU64]>,
    backing: Arc<dyn Backing>,
}

// SAFETY: `words` points into `backing`, which is `Send + Sync` and lends its memory as atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    pub(super) fn new(id: SlotId, size: u64, backing: Arc<dyn Backing>) -> Result<Self, SlotError> {
        if size == 0 {
            return Err(SlotError::ZeroSize(id));
        }
        if size % PAGE_SIZE != 0 {
            return Err(SlotError::MisalignedSize { id, size });
        }
        if size > backing.size() {
            return Err(SlotError::BackingTooSmall { id, size, backing: backing.size() });
        }
        let machine = backing.machine();
        let end = machine.0.checked_add(size);
        if machine.page_offset() != 0 || end.is_none_or(|end| end > 1 << PHYSICAL_BITS) {
            return Err(SlotError::BadMachineAddress { id, machine });
        }
        let pages = size >> PAGE_SHIFT;
        let dirty = match backing.dirty_log() {
            Some(log) if log.pages() < pages => {
                return Err(SlotError::LogTooSmall { id, pages, log: log.pages() });
            }
            Some(log) => log.clone(),
            None => DirtyLog::new(size),
        };
        let words = NonNull::from(&backing.words()[..pages as usize * PAGE_WORDS]);
        Ok(Self {
            rmap: LazyArray::new(pages as usize),
            large: core::array::from_fn(|i| LazyArray::new(blocks(machine, pages, i))),
            shadows: LazyArray::new(pages as usize),
            tables: core::array::from_fn(|i| LazyArray::new(blocks(machine, pages, i))),
            dirty,
            logs: AtomicBool::new(false),
            dirty_bits: AtomicBool::new(false),
            invalid: Invalid::default(),
            pins: Pins::default(),
            host_read_only: LazyArray::new(pages.div_ceil(64) as usize),
            pages,
            machine,
            words,
            backing,
        })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    pub(crate) fn machine(&self) -> Machine {
        self.machine
    }

    /// Machine address of the page with this index.
    #[inline]
    pub(crate) fn machine_of(&self, index: usize) -> Machine {
        Machine(self.machine.0 + ((index as u64) << PAGE_SHIFT))
    }

    /// First address in this process.
    pub(crate) fn hva(&self) -> Hva {
        Hva(self.words.as_ptr().cast::<AtomicU64>() as u64)
    }

    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the slice belongs to `backing`, which this region keeps alive; `Backing` promises
        // that it stays valid and is used as atomics only.
        unsafe { self.words.as_ref() }
    }

    /// The words of a page, in address order.
    #[inline]
    pub(crate) fn words_of(&self, index: usize) -> &[AtomicU64] {
        let first = index * PAGE_WORDS;
        self.words().get(first..first + PAGE_WORDS).unwrap_or_default()
    }

    /// The word that holds the byte at `offset` (below 4096) of a page; `None` beyond the words
    /// that a model gives a page.
    #[inline]
    pub(crate) fn word(&self, index: usize, offset: u64) -> Option<&AtomicU64> {
        let word = (offset / 8) as usize;
        if cfg!(loom) && word >= PAGE_WORDS {
            return None;
        }
        self.words().get(index * PAGE_WORDS + word)
    }

    /// See [`Region::dirty_bits`]. Who has taken an entry away sees what its maker saw.
    pub(crate) fn uses_dirty_bits(&self) -> bool {
        // Acquire: a harvest that finds it cleared sees what was recorded before.
        self.dirty_bits.load(Ordering::Acquire)
    }

    pub(crate) fn set_dirty_bits(&self, used: bool) {
        self.dirty_bits.store(used, Ordering::Release);
    }

    /// Starts the log, empty; false if somebody else uses it: a backing may serve several maps.
    pub(crate) fn start_log(&self) -> bool {
        let claimed = self.dirty.claim();
        if claimed {
            self.logs.store(true, Ordering::Relaxed);
        }
        claimed
    }

    /// Stops the log if this region has started it.
    pub(crate) fn stop_log(&self) {
        // Relaxed: changes of a region's log are serialised, and its end is its last use.
        if self.logs.swap(false, Ordering::Relaxed) {
            self.dirty.set_enabled(false);
            self.dirty.reset();
        }
    }

    /// Pages pinned at the moment, as often as they are.
    pub(crate) fn pinned_pages(&self) -> u64 {
        self.pins.count()
    }

    /// Reports every page that is pinned for writing.
    pub(crate) fn written_pins(&self, report: impl FnMut(usize)) {
        self.pins.written(report);
    }

    /// Whether the page is a guest page table that has a shadow. A Relaxed load: the caller orders
    /// it (R2).
    #[inline]
    pub(crate) fn is_shadowed(&self, index: usize) -> bool {
        self.shadows.get(index).is_some_and(|shadows| !shadows.is_empty())
    }

    /// Which block of the size that a leaf at `level` (2 or 3) maps has the page.
    fn block(&self, level: u8, index: usize) -> usize {
        let shift = INDEX_BITS * (u32::from(level) - 1);
        let first = self.machine.0 >> PAGE_SHIFT;
        (((first + index as u64) >> shift) - (first >> shift)) as usize
    }

    /// Entries at this level that map the page.
    pub(crate) fn rmap_at(&self, level: u8, index: usize) -> &LocationSet {
        match level {
            1 => self.rmap.get_or_alloc(index),
            _ => self.large[usize::from(level) - 2].get_or_alloc(self.block(level, index)),
        }
    }

    /// The same if there may be any.
    pub(crate) fn rmap_if_any(&self, level: u8, index: usize) -> Option<&LocationSet> {
        let rmap = match level {
            1 => self.rmap.get(index),
            _ => self.large[usize::from(level) - 2].get(self.block(level, index)),
        };
        rmap.filter(|rmap| !rmap.is_empty())
    }

    /// The blocks that may be mapped whole and that these pages are part of: each with its level and
    /// the pages of the region in it.
    pub(crate) fn mapped_blocks(
        &self,
        pages: Range<usize>,
    ) -> impl Iterator<Item = (u8, Range<usize>, &LocationSet)> {
        [2, 3].into_iter().flat_map(move |level: u8| {
            let (from, to) = match pages.is_empty() {
                true => (0, 0),
                false => (self.block(level, pages.start), self.block(level, pages.end - 1) + 1),
            };
            let found = self.large[usize::from(level) - 2].iter_range(from..to);
            let mapped = found.filter(|(_, rmap)| !rmap.is_empty());
            mapped.map(move |(block, rmap)| (level, self.pages_of(level, block), rmap))
        })
    }

    /// Whether nobody hinders that a block from page `first` on is mapped whole by a leaf at `level`,
    /// for reads or for writes. Relaxed loads: the caller orders them (R7, R20).
    pub(crate) fn allows_block(&self, level: u8, first: usize) -> bool {
        let tables = self.tables[usize::from(level) - 2].get(self.block(level, first));
        tables.is_none_or(|tables| tables.load(Ordering::Relaxed) == 0)
            && self.host_allows(first..first + (1 << (INDEX_BITS * (u32::from(level) - 1))))
    }

    /// Whether the host has neither taken any of the pages away nor made it read-only.
    pub(crate) fn host_allows(&self, pages: Range<usize>) -> bool {
        !self.invalid.touches(pages.clone()) && !self.has_host_read_only(pages)
    }

    /// The page becomes a guest table with this shadow.
    pub(crate) fn add_shadow(&self, index: usize, shadow: u64) {
        for level in [2, 3] {
            let tables = &self.tables[usize::from(level) - 2];
            // Relaxed: the fence of `ensure_protected` orders it (R20).
            tables.get_or_alloc(self.block(level, index)).fetch_add(1, Ordering::Relaxed);
        }
        self.shadows.get_or_alloc(index).add(shadow);
    }

    /// The shadow is gone.
    pub(crate) fn remove_shadow(&self, index: usize, shadow: u64) {
        let removed = self.shadows.get(index).is_some_and(|shadows| shadows.remove(shadow));
        for level in [2, 3].into_iter().filter(|_| removed) {
            let tables = &self.tables[usize::from(level) - 2];
            // Release: who maps the block whole sees the shadow gone.
            tables.get_or_alloc(self.block(level, index)).fetch_sub(1, Ordering::Release);
        }
    }

    /// A block whose count of shadows is not the number of shadows of its pages: the level of the leaf
    /// that would map it, its first page in the region, and the count.
    pub(crate) fn miscounted(&self) -> Option<(u8, usize, u64)> {
        [2, 3].into_iter().find_map(|level| {
            self.tables[usize::from(level) - 2].iter().find_map(|(block, counted)| {
                let pages = self.pages_of(level, block);
                let mut shadows = 0;
                for (_, set) in self.shadows.iter_range(pages.clone()) {
                    set.for_each(|_| shadows += 1);
                }
                let counted = counted.load(Ordering::Relaxed);
                (counted != shadows).then_some((level, pages.start, counted))
            })
        })
    }

    /// The pages of the region in a block of the size that a leaf at `level` maps.
    fn pages_of(&self, level: u8, block: usize) -> Range<usize> {
        let shift = INDEX_BITS * (u32::from(level) - 1);
        let first = self.machine.0 >> PAGE_SHIFT;
        let start = ((first >> shift) + block as u64) << shift;
        let end = (start + (1 << shift) - first).min(self.pages);
        start.saturating_sub(first) as usize..end as usize
    }

    /// Whether the host has made any of the pages read-only.
    fn has_host_read_only(&self, pages: Range<usize>) -> bool {
        let mut words = self.host_read_only.iter_range(pages.start / 64..pages.end.div_ceil(64));
        words.any(|(word, bits)| {
            let inside = |n: usize| pages.contains(&(word * 64 + n));
            let bits = bits.load(Ordering::Relaxed);
            bits != 0 && (0..64).any(|n| bits >> n & 1 != 0 && inside(n))
        })
    }

    /// Whether no shadow entry maps the region and no shadow page was made from it.
    #[cfg(loom)]
    pub(crate) fn is_unlinked(&self) -> bool {
        let large = self.large.iter().flat_map(|large| large.iter());
        let mut links = self.rmap.iter().chain(self.shadows.iter()).chain(large);
        links.all(|(_, links)| links.is_empty())
    }

    /// Whether the host has made the page read-only. A Relaxed load: the caller orders it (R7).
    #[inline]
    pub(crate) fn is_host_read_only(&self, index: usize) -> bool {
        let word = self.host_read_only.get(index / 64);
        word.is_some_and(|bits| bits.load(Ordering::Relaxed) >> (index % 64) & 1 != 0)
    }

    /// The host makes pages read-only, or writable again.
    pub(crate) fn set_host_read_only(&self, pages: Range<usize>, read_only: bool) {
        for word in pages.start / 64..pages.end.div_ceil(64) {
            let from = pages.start.saturating_sub(word * 64).min(64);
            let to = (pages.end - word * 64).min(64);
            let mask = (u64::MAX >> (64 - (to - from))) << from;
            // Release: a fault that sees a page writable again sees what the host did before.
            if read_only {
                self.host_read_only.get_or_alloc(word).fetch_or(mask, Ordering::Release);
            } else if let Some(bits) = self.host_read_only.get(word) {
                bits.fetch_and(!mask, Ordering::Release);
            }
        }
    }
}

/// Blocks of the size of level `i + 2` that the pages from `machine` on touch.
fn blocks(machine: Machine, pages: u64, i: usize) -> usize {
    let shift = INDEX_BITS * (i as u32 + 1);
    let first = machine.0 >> PAGE_SHIFT;
    (((first + pages - 1) >> shift) - (first >> shift) + 1) as usize
}

impl Drop for Region {
    fn drop(&mut self) {
        self.stop_log();
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("pages", &self.pages)
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}
