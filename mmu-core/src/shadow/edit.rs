// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes to guest memory that the engine does itself, and what they mean for the shadow.

use super::{Engine, FrameId, Location, Role, Spte, Stats};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::memory::{DirtyRing, MemoryMap, Page, Region};
use crate::paging::{PagingMode, Path};
use crate::sync::epoch::Guard;
use crate::sync::{Ordering, fence, rule};
use core::ops::Range;

/// So many emulated writes to a guest table, with no fault through it, and it is taken for data: its
/// shadow goes, and writes to it are native (KVM's write-flooding count).
const FLOOD: u32 = if cfg!(all(loom, not(shuttle))) { u32::MAX } else { 3 };

impl Engine {
    /// Writes guest-physical memory, tells the shadow and the dirty log. Returns how many bytes
    /// could be written before the first one that lies in no slot.
    pub(crate) fn write_phys(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        ring: Option<&DirtyRing>,
        gpa: Gpa,
        bytes: &[u8],
    ) -> usize {
        let done = map.write(gpa, bytes, ring);
        self.guest_wrote(stats, guard, map, gpa, done as u64);
        done
    }

    /// Tells the dirty log and the shadow of bytes of a page that were just written.
    pub(crate) fn wrote(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        ring: Option<&DirtyRing>,
        page: Page<'_>,
        bytes: Range<u64>,
    ) {
        page.mark_dirty(ring);
        self.page_wrote(stats, guard, map, page.region(), page.index, bytes);
    }

    /// Drops the shadow entries made from guest entries in the `len` bytes at `gpa`, which were
    /// just written. No vCPU is interrupted: architecturally a translation may be used until its
    /// vCPU invalidates it (SDM vol. 3, 5.10.4).
    pub(crate) fn guest_wrote(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        gpa: Gpa,
        len: u64,
    ) {
        let end = gpa.wrapping_add(len).0;
        let mut at = gpa.0;
        while at < end {
            let page_end = (at & !(PAGE_SIZE - 1)).saturating_add(PAGE_SIZE).min(end);
            if let Some(page) = map.page(Gpa(at).gfn()) {
                let offset = at % PAGE_SIZE;
                let bytes = offset..offset + (page_end - at);
                self.page_wrote(stats, guard, map, page.region(), page.index, bytes);
            }
            at = page_end;
        }
    }

    /// The same for bytes of one page, wherever the guest finds it.
    pub(crate) fn page_wrote(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        region: &Region,
        index: usize,
        bytes: Range<u64>,
    ) {
        self.drop_derived(stats, guard, map, (region, index), bytes, |_| true);
    }

    /// What a walk that sets accessed and dirty bits means for the shadow: nothing where the table is of
    /// one format. But the bits of every other 4-byte entry are address bits of the 8-byte entry that it
    /// is half of, for a vCPU in another mode.
    pub(crate) fn guest_walked(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        mode: &PagingMode,
        path: &Path,
    ) {
        if mode.entry_size() == 4 {
            for step in path.steps().iter().filter(|step| step.entry.0 & 4 != 0) {
                let Some(page) = map.page(step.entry.gfn()) else { continue };
                let place = (page.region(), page.index);
                let offset = step.entry.page_offset();
                let wide = |role: Role| role.format().is_wide();
                self.drop_derived(stats, guard, map, place, offset..offset + 4, wide);
            }
        }
    }

    /// Drops the shadow entries made from guest entries in these bytes of a page, by shadows of such
    /// roles.
    fn drop_derived(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        (region, index): (&Region, usize),
        bytes: Range<u64>,
        by: impl Fn(Role) -> bool,
    ) {
        // R2: own store, fence, foreign load. Pairs with the fence of the fault between its
        // reservation and its second look at the guest's entry.
        if rule!(R02) {
            fence(Ordering::SeqCst);
        }
        let shadows = region.shadows.get(index).filter(|shadows| !shadows.is_empty());
        let Some(shadows) = shadows.filter(|_| !bytes.is_empty()) else { return };
        // Nothing shared is written where nothing was derived from the entry.
        let mut narrowing = None;
        let mut met = false;
        for frame in shadows.to_vec() {
            let frame = FrameId((frame - 1) as u32);
            let page = self.frames.page(frame);
            let role = page.key().role();
            if !by(role) {
                continue;
            }
            met = true;
            if !role.is_indirect() {
                continue;
            }
            // R18: a root in use stays.
            let flooded = page.count_write() > FLOOD && page.roots.load(Ordering::Relaxed) == 0;
            if flooded && self.zap(guard, frame) {
                stats.mmu_flooded.bump();
                continue;
            }
            // Where somebody else tears it down he need not have come to the entry yet, and processors
            // still get there.
            for index in role.derived_from(bytes.clone()) {
                let entry = Location::new(frame, index);
                let spte = self.entry(entry);
                if matches!(spte, Spte::EMPTY | Spte::FROZEN)
                    || self.is_reserved(frame, index)
                    || self.still_derives(map, frame, entry, spte)
                {
                    continue;
                }
                let narrowing = narrowing.get_or_insert_with(|| self.flush.narrow());
                if self.drop_entry(guard, narrowing, entry, |_| false) {
                    stats.mmu_pte_zapped.bump();
                }
            }
        }
        if met {
            stats.mmu_pte_write.bump();
        }
    }

    /// Whether what was written leaves the entry right.
    fn still_derives(&self, map: &MemoryMap, frame: FrameId, at: Location, spte: Spte) -> bool {
        let key = self.frames.page(frame).key();
        let gpa = key.gfn().gpa().wrapping_add(key.role().guest_offset(at.index()));
        let home = map.by_machine(self.frames.page(frame).home());
        let word = home.and_then(|page| page.word(gpa.page_offset()));
        // Acquire: of two stores to the entry, who sees the later one drops for both.
        word.is_some_and(|word| {
            let guest = key.role().format().entry_of(word.load(Ordering::Acquire), gpa);
            self.derives(map, key, guest, spte)
        })
    }

    /// Whether the entry belongs to the consumer.
    pub(super) fn is_reserved(&self, frame: FrameId, index: usize) -> bool {
        let level = || self.frames.page(frame).key().role().level();
        self.shape
            .reserved
            .is_some_and(|(reserved, _)| reserved == index && level() == self.levels())
    }
}
