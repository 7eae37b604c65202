// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table frames: the quota, what makes room when it is used up, and the end of obsolete trees.
//!
//! *Zap all* counts the shadow generation up: every page made before is obsolete, and no vCPU enters
//! the guest on an obsolete root (R19). The pages themselves are torn down a few at a time by the
//! faults that follow, each of which takes some frame numbers off a common round.
//!
//! *Recycling* goes round the frames like the hand of a clock: a page through which a fault has passed
//! since the last time gets another round, a root in use is left alone (R18), any other goes. It
//! stops as soon as enough frames are on their way back, so that many faults short of a frame do not
//! tear down each other's tables.

use super::flush::Generation;
use super::frames::ShadowPage;
use super::location::FrameId;
use super::{Engine, Stall};
use crate::memory::MemoryMap;
use crate::sync::epoch::Guard;
use crate::sync::{Ordering, lock, rule};

/// Fewest table frames an engine works with (KVM_MIN_ALLOC_MMU_PAGES).
pub(crate) const MIN_FRAMES: u32 = match () {
    () if cfg!(shuttle) => 16,
    () if cfg!(loom) => 4,
    () => 64,
};
/// Frames that each vCPU must have: two roots in use, one it still runs on, a path of tables, and as
/// many on their way back.
pub(crate) const FRAMES_PER_VCPU: u32 = if cfg!(all(loom, not(shuttle))) { 1 } else { 8 };
/// Unless told otherwise, frames are a fiftieth of the memory's pages (KVM_PERMILLE_MMU_PAGES).
const PAGES_PER_FRAME: u64 = if cfg!(loom) { 1 } else { 50 };
/// Frame numbers that a fault takes off the round of obsolete pages.
const STEP: u32 = 4;
/// The same for who is out of frames, or has nothing better to do.
pub(crate) const STRIDE: u32 = 64;

/// What was wrong with a quota of table frames. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuotaError {
    /// Faults could not succeed with so few.
    #[error("{frames} table frames are too few for {vcpus} vCPUs: at least {minimum} are needed")]
    TooFew {
        /// Frames asked for.
        frames: u64,
        /// vCPUs that there are.
        vcpus: usize,
        /// Fewest frames for them.
        minimum: u64,
    },
    /// The table memory is smaller.
    #[error("{frames} table frames are more than the {most} that the table memory has")]
    TooMany {
        /// Frames asked for.
        frames: u64,
        /// Frames of the table memory.
        most: u64,
    },
}

/// The quota as the VMM wants it.
#[derive(Debug, Default)]
pub(crate) struct Quota {
    /// What was asked for; else it follows the memory's size.
    pub(super) asked: Option<u32>,
    /// Pages of all slots.
    pub(super) memory: u64,
}

impl Engine {
    /// Makes every page obsolete; the generation after which no processor uses any of them.
    ///
    /// R19: the mark first, then the flush generation. A vCPU looks at its root again after it has
    /// acknowledged a generation.
    pub(crate) fn zap_all(&self) -> Generation {
        // AcqRel pairs with the Acquire in `is_obsolete`: who sees a page of the new generation sees
        // that the others are obsolete.
        self.shadow_generation.fetch_add(1, Ordering::AcqRel);
        // Pages that are in the making now lie in frames below this.
        let end = u64::from(self.frames.high_water());
        // Of two at a time the one that looked first may come last: a round never becomes shorter.
        let round = |old: u64| Some((old >> 32).max(end) << 32);
        let _ = self.sweep.fetch_update(Ordering::Release, Ordering::Relaxed, round);
        self.flush.advance()
    }

    /// Tears down the obsolete pages among the next frames of the round, if there is one.
    pub(crate) fn sweep_some(&self, guard: &Guard<'_>, frames: u32) {
        let mut round = self.sweep.load(Ordering::Acquire);
        let (next, end) = loop {
            let (next, end) = (round as u32, (round >> 32) as u32);
            if next >= end {
                return;
            }
            let after = u64::from(end) << 32 | u64::from(next.saturating_add(frames).min(end));
            // Relaxed on success: a round begins anew if pages become obsolete meanwhile.
            match self.sweep.compare_exchange(round, after, Ordering::Relaxed, Ordering::Acquire) {
                Ok(_) => break (next, end),
                Err(now) => round = now,
            }
        };
        let mut zapped = false;
        for frame in (next..next.saturating_add(frames).min(end)).map(FrameId) {
            if self.is_over(self.frames.page(frame)) {
                zapped |= self.tear_down(guard, frame).is_some();
            }
        }
        if zapped {
            // Others may wait for the frames, and this thread may not come here again for long.
            guard.flush();
        }
    }

    /// Tears down every obsolete page that is left.
    pub(crate) fn sweep_rest(&self, guard: &mut Guard<'_>) {
        while self.is_sweeping() {
            self.sweep_some(guard, STRIDE);
            guard.repin();
        }
    }

    /// Frees what can be freed.
    pub(crate) fn maintain(&self) {
        let handle = self.handles.get();
        let mut guard = handle.pin();
        self.sweep_rest(&mut guard);
        self.reclaim(&guard);
        self.memory.reclaim();
    }

    /// Whether obsolete pages may be left.
    #[inline]
    pub(crate) fn is_sweeping(&self) -> bool {
        let round = self.sweep.load(Ordering::Relaxed);
        (round as u32) < (round >> 32) as u32
    }

    /// A fault's share of the work.
    #[inline]
    pub(super) fn sweep_step(&self, guard: &Guard<'_>) {
        if self.is_sweeping() {
            self.sweep_some(guard, STEP);
        }
    }

    fn is_over(&self, page: &ShadowPage) -> bool {
        page.is_live() && self.is_obsolete(page)
    }

    /// A free frame; else what to wait for.
    pub(super) fn frame_for(&self, guard: &Guard<'_>) -> Result<FrameId, Stall> {
        if let Some(frame) = self.frames.allocate() {
            return Ok(frame);
        }
        self.sweep_some(guard, STRIDE);
        let waits = self.reclaim(guard);
        match self.frames.allocate() {
            Some(frame) => Ok(frame),
            None => Err(Stall::Frames(waits.unwrap_or_else(|| self.recycle(guard)))),
        }
    }

    /// Frees what can be freed; the oldest generation that something waits for.
    fn reclaim(&self, guard: &Guard<'_>) -> Option<Generation> {
        guard.flush();
        // R04, R29: not before every processor has forgotten the frame.
        // One look at the vCPUs for each generation, and none for what an answer implies.
        let (mut drained, mut waiting) = (Generation(0), Generation(u64::MAX));
        self.frames.reclaim(|generation| {
            if generation > drained && generation < waiting {
                if self.flush.drained(generation, false) || !rule!(R04) {
                    drained = generation;
                } else {
                    waiting = generation;
                }
            }
            generation <= drained
        })
    }

    /// Whether a fault that was short of frames should try again. `kick` as in
    /// [`Flush::acknowledged`](super::flush::Flush::acknowledged).
    pub(crate) fn frames_are_back(&self, context: &super::Context, kick: bool) -> bool {
        let waits = self.reclaim(&context.handle.pin());
        if let Some(generation) = waits {
            self.flush.drained(generation, kick);
        }
        let (used, _) = self.frames.used_and_retired();
        used < self.frames.quota() || self.frames.coming_back() == 0
    }

    /// Tears down pages that no fault has used lately and that are no vCPU's root, until some frames
    /// are on their way back. Returns the generation that they wait for.
    fn recycle(&self, guard: &Guard<'_>) -> Generation {
        let used = self.frames.high_water().max(1);
        let enough = (self.frames.quota() / 16).clamp(1, 16);
        // Twice round: the first may find every page in use.
        for _ in 0..2 * u64::from(used) {
            if self.frames.coming_back() >= enough {
                break;
            }
            // Relaxed: several threads share the round.
            let frame = FrameId(self.hand.fetch_add(1, Ordering::Relaxed) % used);
            let page = self.frames.page(frame);
            if !page.is_live() || page.roots.load(Ordering::Relaxed) > 0 || page.take_young() {
                continue;
            }
            if self.tear_down(guard, frame).is_some() {
                self.stats.mmu_recycled.bump_shared();
            }
        }
        guard.flush();
        self.flush.next()
    }

    /// Sets how many table frames may be used, `None` for a share of the memory's size; tears down
    /// pages if there are more. Waits for nobody: their frames become free when every vCPU has
    /// forgotten them.
    pub(crate) fn set_quota(&self, frames: Option<u64>) -> Result<(), QuotaError> {
        {
            let seats = lock(&self.seats);
            let mut quota = lock(&self.quota);
            if let Some(frames) = frames {
                let vcpus = seats.iter().filter(|taken| **taken).count();
                let (minimum, most) = (minimum(vcpus), u64::from(self.frames.count()));
                if frames < minimum {
                    return Err(QuotaError::TooFew { frames, vcpus, minimum });
                }
                if frames > most {
                    return Err(QuotaError::TooMany { frames, most });
                }
            }
            quota.asked = frames.map(|frames| frames as u32);
            self.apply_quota(&quota, &seats);
        }
        self.shrink();
        Ok(())
    }

    /// Tears down pages until there are no more than there may be: for who has made the quota much
    /// smaller. Else the next fault would do it, a few pages and a grace period at a time.
    pub(super) fn shrink(&self) {
        let handle = self.handles.get();
        let mut guard = handle.pin();
        self.sweep_rest(&mut guard);
        let mut rounds = 2 * u64::from(self.frames.high_water());
        loop {
            let (used, retired) = self.frames.used_and_retired();
            if used - retired.min(used) <= self.frames.quota() || rounds == 0 {
                break;
            }
            rounds -= 1;
            let high = self.frames.high_water().max(1);
            let frame = FrameId(self.hand.fetch_add(1, Ordering::Relaxed) % high);
            let page = self.frames.page(frame);
            let in_use = page.roots.load(Ordering::Relaxed) > 0 || page.take_young();
            if page.is_live() && !in_use && self.tear_down(&guard, frame).is_some() {
                self.stats.mmu_recycled.bump_shared();
            }
            guard.repin();
        }
        self.reclaim(&guard);
    }

    /// How many table frames may be used, and how many are.
    pub(crate) fn quota_and_used(&self) -> (u32, u32) {
        (self.frames.quota(), self.frames.used_and_retired().0)
    }

    /// The memory has so many pages now.
    pub(super) fn memory_changed(&self, map: &MemoryMap) {
        let seats = lock(&self.seats);
        let mut quota = lock(&self.quota);
        quota.memory = map.pages();
        self.apply_quota(&quota, &seats);
    }

    /// Follows the wish, the memory's size and the number of vCPUs.
    pub(super) fn apply_quota(&self, quota: &Quota, seats: &[bool]) {
        let vcpus = seats.iter().filter(|taken| **taken).count();
        let share = quota.asked.map_or(quota.memory / PAGES_PER_FRAME, u64::from);
        let frames = share.max(minimum(vcpus)).min(u64::from(self.frames.count()));
        self.frames.set_quota(frames as u32);
    }
}

/// Fewest frames with which every fault of so many vCPUs succeeds.
fn minimum(vcpus: usize) -> u64 {
    u64::from(MIN_FRAMES).max(vcpus as u64 * u64::from(FRAMES_PER_VCPU))
}
