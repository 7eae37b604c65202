// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Write-protection of a page, for a shadowed guest table or for the dirty log.

use super::Engine;
use super::flush::{Generation, Narrowing};
use super::location::Location;
use super::stats::Stats;
use crate::memory::Slot;
use crate::sync::Backoff;
use crate::sync::epoch::Handle;

impl Engine {
    /// Takes the right to write the page from every entry that maps it, pending ones included.
    fn protect(&self, slot: &Slot, index: usize, narrowing: &mut Narrowing<'_>, stats: &Stats) {
        let Some(rmap) = slot.state().rmap.get(index) else { return };
        let machine = slot.machine_of(index);
        rmap.for_each(|word| {
            let at = Location::from_word(word);
            let mut old = self.entry(at);
            loop {
                let new = if old.is_pending() {
                    super::Spte::EMPTY
                } else if old.is_writable() && old.machine() == machine {
                    old.write_protected()
                } else {
                    return;
                };
                match self.exchange(at, old, new) {
                    Ok(()) => break,
                    Err(now) => old = now,
                }
            }
            narrowing.entry(at, self.gva_of(at));
            stats.mmu_write_protected.bump_shared();
        });
    }

    /// Records every entry that maps the page, changed or not.
    fn record(&self, slot: &Slot, index: usize, narrowing: &mut Narrowing<'_>) {
        if let Some(rmap) = slot.state().rmap.get(index) {
            rmap.for_each(|word| {
                let at = Location::from_word(word);
                narrowing.entry(at, self.gva_of(at));
            });
        }
    }

    /// Protects a guest table; the generation after which no processor can write it (R1).
    pub(super) fn protect_for(&self, slot: &Slot, index: usize, stats: &Stats) -> Generation {
        let mut narrowing = self.flush.narrow();
        self.protect(slot, index, &mut narrowing, stats);
        drop(narrowing);
        self.flush.settled(|narrowing| self.record(slot, index, narrowing))
    }

    /// Takes the slot's dirty bits into `bitmap`, bit `n` of word `w` for page `64 w + n`, and
    /// returns the number of dirty pages. When it returns, any further guest write to one of them
    /// is in a later harvest (R13).
    ///
    /// Waits for vCPUs inside the guest to come out, but for no reader.
    pub(crate) fn harvest(&self, slot: &Slot, bitmap: &mut [u64], handle: &Handle) -> u64 {
        let mut pages = 0;
        let mut settled = None;
        for (word, out) in bitmap.iter_mut().enumerate() {
            let bits = slot.take_dirty(word);
            *out = bits;
            if bits == 0 {
                continue;
            }
            pages += u64::from(bits.count_ones());
            let indices =
                || (0..64).filter(move |n| bits >> n & 1 != 0).map(move |n| word * 64 + n);
            // The entries' frames stay theirs within a read section.
            let _guard = handle.pin();
            let mut narrowing = self.flush.narrow();
            indices().for_each(|i| self.protect(slot, i, &mut narrowing, &self.stats));
            drop(narrowing);
            settled = Some(self.flush.settled(|n| indices().for_each(|i| self.record(slot, i, n))));
        }
        if let Some(generation) = settled {
            self.wait_acknowledged(generation);
        }
        pages
    }

    /// Waits until no vCPU runs guest code on what was narrowed up to `generation`. The caller
    /// holds no guard.
    pub(super) fn wait_acknowledged(&self, generation: Generation) {
        let mut backoff = Backoff::default();
        while !self.flush.acknowledged(generation, backoff.is_milestone()) {
            backoff.wait();
        }
    }
}
