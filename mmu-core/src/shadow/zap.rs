// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tearing down shadow pages.

use super::Engine;
use super::flush::Generation;
use super::frames::{ShadowPage, state};
use super::location::{FrameId, Location};
use super::spte::Spte;
use crate::addr::ENTRIES;
use crate::sync::epoch::Guard;
use crate::sync::{Ordering, fence, rule};
use std::sync::Arc;

impl Engine {
    /// Tears a page down: unlinks it, empties it, and retires its frame. Returns the generation
    /// after which no processor uses it, or `None` if somebody else tears it down.
    ///
    /// The frame stays with this thread until the caller flushes the guard, after its last page.
    pub(crate) fn tear_down(&self, guard: &Guard<'_>, frame: FrameId) -> Option<Generation> {
        let page = self.frames.page(frame);
        // AcqRel: this thread sees the page's key, and whoever sees the mark sees it dying.
        page.state
            .compare_exchange(state::LIVE, state::ZAPPING, Ordering::AcqRel, Ordering::Relaxed)
            .ok()?;
        let key = page.key();
        self.pages.remove_if_equal(&self.name_of(frame, key), frame);
        // R17: mark, fence, then look at parents. Pairs with the fence of the fault that links the
        // page. R19: a vCPU that has it as root finds it dead when it enters or faults, and keeps
        // the frame until it runs on another root.
        fence(Ordering::SeqCst);
        let mut narrowing = self.flush.narrow();
        let own = self.frames.machine(frame);
        for parent in page.parents.to_vec() {
            let at = Location::from_word(parent);
            let other = |now: Spte| now.is_present() && now.machine() != own;
            self.drop_entry(guard, &mut narrowing, at, other);
            let below = &self.frames.page(at.frame()).below;
            if !below.is_empty() {
                below.remove(u64::from(frame.0) + 1);
            }
        }
        // R5: freeze every entry, so that no install under way can succeed. A root keeps the entry
        // that belongs to the consumer: its processor may be running on it.
        let kept = self.reserved_at(key.role().level()).map(|(index, _)| index);
        let frozen = if rule!(R05) { Spte::FROZEN } else { Spte::EMPTY };
        let mut old = [Spte::EMPTY; ENTRIES];
        for (index, old) in old.iter_mut().enumerate().filter(|(index, _)| Some(*index) != kept) {
            // AcqRel: as in `exchange`.
            let cell = self.frames.entry(Location::new(frame, index));
            *old = Spte(cell.swap(frozen.0, Ordering::AcqRel));
        }
        // Recorded before the links go, so that a scan that misses a link finds the record.
        narrowing.frame(frame);
        // From the last: reverse maps are searched from the newest.
        for (index, old) in old.into_iter().enumerate().rev().filter(|(_, old)| old.is_present()) {
            self.unlink(guard, Location::new(frame, index), old);
        }
        if key.role().has_home() {
            // Nothing is derived from the guest table any more: it may become writable.
            if let Some(home) = self.memory.load(guard).by_machine(page.home()) {
                home.region().remove_shadow(home.index, u64::from(frame.0) + 1);
            }
        }
        let generation = narrowing.finish();
        self.frames.retire(frame, generation);
        let frames = Arc::clone(&self.frames);
        guard.defer(move || frames.grace_passed(frame));
        self.stats.mmu_shadow_zapped.bump_shared();
        Some(generation)
    }

    /// Tears down a single page; false if somebody else does. This thread may idle from now on, and
    /// nobody who waits for the frame waits for it.
    pub(super) fn zap(&self, guard: &Guard<'_>, frame: FrameId) -> bool {
        let mine = self.tear_down(guard, frame).is_some();
        if mine {
            guard.flush();
        }
        mine
    }

    /// Frames that were ever used have numbers below this.
    pub(crate) fn frames_used(&self) -> u32 {
        self.frames.high_water()
    }

    /// Whether the page in the frame may be used: it is live, and was made since everything was last
    /// zapped.
    pub(crate) fn is_current(&self, frame: FrameId) -> bool {
        let page = self.frames.page(frame);
        page.is_live() && !self.is_obsolete(page)
    }

    pub(super) fn is_obsolete(&self, page: &ShadowPage) -> bool {
        // Acquire pairs with `zap_all`.
        page.born() != self.shadow_generation.load(Ordering::Acquire)
    }

    /// Counts a vCPU that has the page as root (R19). The caller has found the page within its
    /// present read section, or holds it already.
    pub(crate) fn hold_root(&self, frame: FrameId) {
        // Relaxed: the end of the read section, or the count held already, publishes it to
        // `reclaim`.
        self.frames.page(frame).roots.fetch_add(1, Ordering::Relaxed);
    }

    /// The vCPU has the page as root no longer.
    pub(crate) fn release_root(&self, frame: FrameId) {
        // Release pairs with the Acquire in `reclaim`.
        self.frames.page(frame).roots.fetch_sub(1, Ordering::Release);
    }
}
