// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Harvests of the dirty log (R13).
//!
//! A harvest clears bits, takes the right to write from the pages' entries (or the dirty bits out
//! of them, [`DirtyMode::DirtyBits`]), and returns when no processor can write without saying so.
//! A fault makes the entry writable first and then sets the bit. So a write is in this harvest, or
//! its bit is set for the next.

use super::Engine;
use crate::memory::{DirtyMode, DirtyPage, MemoryMap, Page, Slot};
use crate::sync::epoch::Handle;
use std::sync::Arc;

impl Engine {
    /// Takes the slot's dirty bits into `bitmap`, bit `n` of word `w` for page `64 w + n`, and
    /// returns the number of dirty pages. When it returns, any further guest write to one of them
    /// is in a later harvest.
    ///
    /// Waits for vCPUs inside the guest to come out; with dirty bits also for readers.
    pub(crate) fn harvest(&self, slot: &Arc<Slot>, bitmap: &mut [u64], handle: &mut Handle) -> u64 {
        bitmap.fill(0);
        self.report_pins(slot, bitmap);
        self.gather(slot, handle);
        let mut protected = false;
        // A bit that this misses is set later than the harvest began.
        for word in slot.region().dirty.set_words(bitmap.len()) {
            let taken = slot.region().dirty.clear(word, within(slot, word));
            bitmap[word] |= taken;
            if taken != 0 {
                self.protect_word(slot, word, taken, handle);
                protected = true;
            }
        }
        if protected {
            self.wait_acknowledged(self.flush.cover());
        }
        bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The slot's dirty bits, left as they are: [`Engine::clear_dirty`] comes later.
    pub(crate) fn peek_dirty(
        &self,
        slot: &Arc<Slot>,
        bitmap: &mut [u64],
        handle: &mut Handle,
    ) -> u64 {
        bitmap.fill(0);
        self.report_pins(slot, bitmap);
        self.gather(slot, handle);
        let mut pages = 0;
        for (word, out) in bitmap.iter_mut().enumerate() {
            *out |= slot.region().dirty.peek(word) & within(slot, word);
            pages += u64::from(out.count_ones());
        }
        pages
    }

    /// Clears the bits that are set in `bitmap`, whose bit `n` of word `w` is page
    /// `64 (first + w) + n`, and makes the next write to these pages set them again. Returns how
    /// many were set.
    pub(crate) fn clear_dirty(
        &self,
        slot: &Arc<Slot>,
        first: usize,
        bitmap: &[u64],
        handle: &Handle,
    ) -> u64 {
        let mut pages = 0;
        let mut protected = false;
        for (word, mask) in (first..).zip(bitmap).filter(|(_, mask)| **mask != 0) {
            let cleared = slot.region().dirty.clear(word, mask & within(slot, word));
            pages += u64::from(cleared.count_ones());
            if cleared != 0 {
                self.protect_word(slot, word, cleared, handle);
                protected = true;
            }
        }
        if protected {
            self.wait_acknowledged(self.flush.cover());
        }
        pages
    }

    /// The same for pages that rings have listed. Pages of slots that are gone, or beyond a slot's
    /// end, are passed over.
    pub(crate) fn reset_dirty(&self, map: &MemoryMap, pages: &[DirtyPage], handle: &Handle) -> u64 {
        let mut reset = 0;
        let mut protected = false;
        for DirtyPage { slot, page } in pages {
            let Some(slot) = map.by_id(*slot).filter(|slot| *page < slot.pages()) else { continue };
            let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
            if slot.region().dirty.clear(word, bit) != 0 {
                reset += 1;
                self.protect_word(slot, word, bit, handle);
                protected = true;
            }
        }
        if protected {
            self.wait_acknowledged(self.flush.cover());
        }
        reset
    }

    /// Takes the right to write 64 pages at most without saying so.
    fn protect_word(&self, slot: &Arc<Slot>, word: usize, bits: u64, handle: &Handle) {
        let pages = || {
            let set = (0..64).filter(move |n| bits >> n & 1 != 0);
            set.map(move |n| Page { slot, index: word * 64 + n })
        };
        // The entries' frames stay theirs within a read section.
        let guard = handle.pin();
        // R13: by the map of this moment. Since this harvest began the slot may have come to log by
        // write-protection: then the bits taken here are of entries that must be protected. If it
        // comes to do so after this, whoever changes that protects everything.
        let now = self.memory.load(&guard).by_machine(slot.machine());
        let mode = now.map_or(slot.flags().dirty, |page| page.slot.flags().dirty);
        if mode != DirtyMode::DirtyBits {
            let mut narrowing = self.flush.narrow();
            pages().for_each(|page| self.protect(&guard, page, &mut narrowing, &self.stats));
        }
        self.flush.met(|n| pages().for_each(|page| self.record(page, n)));
    }

    /// R13: before the bits, so that a page released meanwhile has its bit by then.
    fn report_pins(&self, slot: &Slot, bitmap: &mut [u64]) {
        slot.region().written_pins(|page| {
            if let Some(word) = bitmap.get_mut(page / 64) {
                *word |= 1 << (page % 64);
            }
        });
    }

    /// Moves the dirty bits of the slot's entries into its log, if that is where they are.
    fn gather(&self, slot: &Arc<Slot>, handle: &mut Handle) {
        // Not by the flags: while these change from dirty bits to write-protection, entries of either
        // kind are about, and a write from before is in the first harvest that begins after it.
        if !slot.region().uses_dirty_bits() {
            return;
        }
        let all = 0..slot.pages() as usize;
        let settled = self.for_mapped(slot, all, handle, |_, page, narrowing| {
            if self.clean(page, narrowing) {
                page.mark_dirty(None);
            }
        });
        // Whoever took a dirty entry away before this has recorded the page after it.
        self.wait_for_readers(handle);
        self.wait_acknowledged(settled);
    }
}

/// The bits of a word that are pages of the slot: a backing's own log may cover more.
fn within(slot: &Slot, word: usize) -> u64 {
    match slot.pages().saturating_sub(word as u64 * 64) {
        0 => 0,
        left => u64::MAX >> (64 - left.min(64)),
    }
}
