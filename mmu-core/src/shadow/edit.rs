// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes to guest memory that the engine does itself, and what they mean for the shadow.

use super::{Engine, FrameId, Location, Role, Spte, Stats};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::memory::{DirtyRing, MemoryMap, exchange_masked};
use crate::paging::{PagingMode, Path};
use crate::sync::epoch::Guard;
use crate::sync::{AtomicU64, Ordering, fence, rule};
use core::ops::Range;

/// So many emulated writes to a guest table, with no fault through it, and it is taken for data: its
/// shadow goes, and writes to it are native (KVM's write-flooding count).
const FLOOD: u32 = if cfg!(loom) { u32::MAX } else { 3 };

/// A compare-and-exchange of 1, 2, 4 or 8 bytes within an aligned 8-byte word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange {
    /// Bytes from the beginning of the word, in bits.
    shift: u32,
    pub(crate) size: usize,
    old: u64,
    new: u64,
}

impl Exchange {
    /// `None` if the size is none of 1, 2, 4 and 8, or the bytes cross the word's end.
    pub(crate) fn new(address: u64, size: usize, old: u64, new: u64) -> Option<Self> {
        let fits = matches!(size, 1 | 2 | 4 | 8) && (address % 8) as usize + size <= 8;
        fits.then_some(Self { shift: (address % 8) as u32 * 8, size, old, new })
    }

    /// The bytes as they were, if they were not the expected ones.
    pub(crate) fn apply(self, word: &AtomicU64) -> Result<(), u64> {
        let mask = u64::MAX >> (64 - 8 * self.size as u32) << self.shift;
        let (old, new) = (self.old << self.shift, self.new << self.shift);
        exchange_masked(word, old, new, mask).map_err(|now| now >> self.shift)
    }
}

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

    /// Compares and exchanges part of an aligned 8-byte word of guest memory, as one step with
    /// respect to every vCPU. `None` if it lies in no slot.
    pub(crate) fn cmpxchg_phys(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        ring: Option<&DirtyRing>,
        gpa: Gpa,
        exchange: Exchange,
    ) -> Option<Result<(), u64>> {
        let page = map.page(gpa.gfn())?;
        let result = exchange.apply(page.word(gpa.page_offset())?);
        if result.is_ok() {
            page.mark_dirty(ring);
            self.guest_wrote(stats, guard, map, gpa, exchange.size as u64);
        }
        Some(result)
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
        self.drop_derived(stats, guard, map, gpa..gpa.wrapping_add(len), |_| true);
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
                let bytes = step.entry..step.entry.wrapping_add(4);
                self.drop_derived(stats, guard, map, bytes, |role| role.format().is_wide());
            }
        }
    }

    /// Drops the shadow entries made from guest entries in these bytes, by shadows of such roles.
    fn drop_derived(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        Range { start: gpa, end }: Range<Gpa>,
        by: impl Fn(Role) -> bool,
    ) {
        // R2: own store, fence, foreign load. Pairs with the fence of the fault between its
        // reservation and its second look at the guest's entry.
        if rule!(R02) {
            fence(Ordering::SeqCst);
        }
        let (mut at, end) = (gpa.0, end.0);
        while at < end {
            let page_end = (at & !(PAGE_SIZE - 1)).saturating_add(PAGE_SIZE).min(end);
            let gfn = Gpa(at).gfn();
            let shadows = map
                .page(gfn)
                .and_then(|page| page.region().shadows.get(page.index))
                .filter(|shadows| !shadows.is_empty());
            if let Some(shadows) = shadows {
                let bytes = at % PAGE_SIZE..at % PAGE_SIZE + (page_end - at);
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
                    if page.count_write() > FLOOD && page.roots.load(Ordering::Relaxed) == 0 {
                        if self.zap(guard, frame).is_some() {
                            stats.mmu_flooded.bump();
                        }
                        continue;
                    }
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
            at = page_end;
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
