// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taking the right to write away, for a shadowed guest table, the dirty log or the host; and the
//! wait that follows it.

use super::flush::{Generation, Narrowing};
use super::location::Location;
use super::stats::Stats;
use super::{Engine, Spte};
use crate::addr::Machine;
use crate::memory::{Page, Slot};
use crate::sync::epoch::{Guard, Handle};
use crate::sync::{Backoff, Mark, WouldDeadlock, rule};
use core::ops::Range;
use std::sync::Arc;

/// Pages looked at in one read section.
const BLOCK: usize = 64;

impl Engine {
    /// Takes the right to write the page from every entry that maps it, pending ones included.
    pub(super) fn protect(
        &self,
        guard: &Guard<'_>,
        page: Page<'_>,
        narrowing: &mut Narrowing<'_>,
        stats: &Stats,
    ) {
        self.break_blocks(guard, page, narrowing, stats);
        let Some(rmap) = page.region().rmap.get(page.index) else { return };
        let machine = page.machine();
        rmap.for_each(|word| {
            let at = Location::from_word(word);
            let mut old = self.entry(at);
            loop {
                let new = if old.is_pending() {
                    Spte::EMPTY
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
            self.took(page, old);
            stats.mmu_write_protected.bump_shared();
        });
    }

    /// Takes away the leaves that map the page as part of a block: what needs to know a page of its
    /// own does not count for them. The fault that follows maps pages (R20, R21).
    pub(super) fn break_blocks(
        &self,
        guard: &Guard<'_>,
        page: Page<'_>,
        narrowing: &mut Narrowing<'_>,
        stats: &Stats,
    ) {
        for level in 2..=self.shape.largest {
            let Some(rmap) = page.region().rmap_if_any(level, page.index) else { continue };
            let block = self.block_of(page, level);
            let other = |now: Spte| now.is_present() && !(now.is_large() && now.machine() == block);
            for word in rmap.to_vec() {
                if self.drop_entry(guard, narrowing, Location::from_word(word), other) {
                    stats.mmu_block_broken.bump_shared();
                }
            }
        }
    }

    /// Where the block that a leaf at `level` maps with the page begins.
    pub(super) fn block_of(&self, page: Page<'_>, level: u8) -> Machine {
        Machine(page.machine().0 & !((1 << super::shift(level)) - 1))
    }

    /// Clears the dirty bits of the page's entries; whether any was set.
    pub(super) fn clean(&self, page: Page<'_>, narrowing: &mut Narrowing<'_>) -> bool {
        let Some(rmap) = page.region().rmap.get(page.index) else { return false };
        let machine = page.machine();
        let mut dirty = false;
        rmap.for_each(|word| {
            let at = Location::from_word(word);
            let mut old = self.entry(at);
            while old.is_dirty() && old.machine() == machine {
                match self.exchange(at, old, old.clean()) {
                    Ok(()) => {
                        dirty = true;
                        return narrowing.entry(at, self.gva_of(at));
                    }
                    Err(now) => old = now,
                }
            }
        });
        dirty
    }

    /// R11: the value `old` was swapped out of an entry that maps the page. If the processor has
    /// written through it and nobody knows, that is recorded.
    pub(super) fn took(&self, page: Page<'_>, old: Spte) {
        // By the region, not by the slot's flags in some map: during a change of these, entries of
        // either kind are about.
        // A block is mapped whole only where nothing is logged.
        if old.is_dirty() && !old.is_large() && page.region().uses_dirty_bits() && rule!(R11) {
            page.region().dirty.mark(page.index);
        }
    }

    /// Records every entry that maps the page, changed or not.
    pub(super) fn record(&self, page: Page<'_>, narrowing: &mut Narrowing<'_>) {
        for level in 1..=self.shape.largest {
            let Some(rmap) = page.region().rmap_if_any(level, page.index) else { continue };
            rmap.for_each(|word| {
                let at = Location::from_word(word);
                narrowing.entry(at, self.gva_of(at));
            });
        }
    }

    /// Protects a guest table; the generation after which no processor can write it (R1).
    pub(super) fn protect_for(
        &self,
        guard: &Guard<'_>,
        page: Page<'_>,
        stats: &Stats,
    ) -> Generation {
        let mut narrowing = self.flush.narrow();
        self.protect(guard, page, &mut narrowing, stats);
        drop(narrowing);
        self.flush.settled(|narrowing| self.record(page, narrowing))
    }

    /// Calls `change` for each page of a slot that may be mapped, a few in a read section, and
    /// returns the generation that covers what was changed by whomever. Blocks that are mapped whole
    /// and have such a page are not any more.
    pub(super) fn for_mapped(
        &self,
        slot: &Arc<Slot>,
        pages: Range<usize>,
        handle: &Handle,
        mut change: impl FnMut(&Guard<'_>, Page<'_>, &mut Narrowing<'_>),
    ) -> Generation {
        self.break_all_blocks(slot, pages.clone(), handle);
        let mut mapped = slot.region().rmap.iter_range(pages);
        let mut block = [0; BLOCK];
        loop {
            let mut len = 0;
            for (index, _) in mapped.by_ref().filter(|(_, rmap)| !rmap.is_empty()).take(BLOCK) {
                block[len] = index;
                len += 1;
            }
            if len == 0 {
                // What others took away and unlinked before this looked is in the log already.
                return self.flush.settled(|_| ());
            }
            // The entries' frames stay theirs within a read section.
            let guard = handle.pin();
            let mut narrowing = self.flush.narrow();
            let pages = || block[..len].iter().map(|index| Page { slot, index: *index });
            pages().for_each(|page| change(&guard, page, &mut narrowing));
            drop(narrowing);
            // What others have taken away and not recorded yet is recorded here.
            self.flush.met(|n| pages().for_each(|page| self.record(page, n)));
        }
    }

    /// [`Engine::break_blocks`] for the blocks that have one of the pages.
    fn break_all_blocks(&self, slot: &Arc<Slot>, pages: Range<usize>, handle: &Handle) {
        let mut guard = handle.pin();
        for (_, block, _) in slot.region().mapped_blocks(pages) {
            let page = Page { slot, index: block.start };
            self.break_blocks(&guard, page, &mut self.flush.narrow(), &self.stats);
            // What others have taken away and not recorded yet is recorded here.
            self.flush.met(|n| self.record(page, n));
            guard.repin();
        }
    }

    /// Waits until no vCPU runs guest code on what was narrowed up to `generation`. The caller
    /// holds no guard.
    pub(super) fn wait_acknowledged(&self, generation: Generation) {
        self.assert_may_wait();
        let mut backoff = Backoff::default();
        while !self.flush.acknowledged(generation, backoff.is_milestone()) {
            backoff.wait();
        }
    }

    /// Waits until every read section that is open now has ended.
    pub(super) fn wait_for_readers(&self, handle: &mut Handle) {
        self.assert_may_wait();
        handle.synchronize();
    }

    /// Waits for readers, and for vCPUs to stop using what was taken away before this.
    pub(crate) fn synchronize(&self) -> Result<(), WouldDeadlock> {
        self.may_wait()?;
        // Narrowings run in read sections: after this they have recorded everything.
        self.wait_for_readers(&mut self.handles.get());
        self.wait_acknowledged(self.flush.cover());
        Ok(())
    }

    /// Refuses threads that those who are waited for may wait for (R32).
    pub(crate) fn may_wait(&self) -> Result<(), WouldDeadlock> {
        let refused = Mark::is_set(self.id, WouldDeadlock::Resolver) && rule!(R32);
        if refused { Err(WouldDeadlock::Resolver) } else { Ok(()) }
    }

    /// In a model, every wait says who must not make it.
    fn assert_may_wait(&self) {
        #[cfg(loom)]
        assert!(!Mark::is_set(self.id, WouldDeadlock::Resolver), "R32: a resolver waits");
    }
}
