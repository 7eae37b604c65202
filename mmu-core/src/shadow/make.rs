// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shadow pages in the making: found by their name or made, with the guest table behind them protected
//! before anything is derived from it.

use super::fault::Retry;
use super::flush::Generation;
use super::frames::{PROTECTED, UNPROTECTED};
use super::location::{FrameId, Location};
use super::names::Name;
use super::stats::Stats;
use super::{Context, Engine, Stall};
use crate::memory::MemoryMap;
use crate::sync::epoch::Guard;
use crate::sync::{Backoff, Ordering, fence, rule};

impl Engine {
    /// The root page of this name, with the caller counted as its user (R19); `None` if the guest's table
    /// lies in no slot.
    pub(crate) fn load_root(
        &self,
        context: &Context,
        stats: &Stats,
        name: Name,
    ) -> Result<Option<FrameId>, Stall> {
        let guard = context.handle.pin();
        let map = self.memory.load(&guard);
        stats.root_loads.bump();
        loop {
            if name.home().is_some_and(|table| map.slot(table).is_none()) {
                return Ok(None);
            }
            match self.get_or_make(stats, &guard, map, name) {
                Ok(frame) => {
                    // R19: within the read section that found it, so the frame is still its.
                    self.hold_root(frame);
                    return Ok(Some(frame));
                }
                Err(Retry::Again) => {}
                Err(Retry::Stall(stall)) => return Err(stall),
            }
        }
    }

    /// Counts a vCPU as user of a root that it had before, if the frame still has that page.
    pub(crate) fn hold_again(&self, context: &Context, frame: FrameId, name: Name) -> bool {
        let _guard = context.handle.pin();
        let page = self.frames.page(frame);
        // R19: live within this read section, and so still what it was.
        let current = self.is_current(frame) && self.name_of(frame, page.key()) == name;
        if current {
            page.touch();
            self.hold_root(frame);
        }
        current
    }

    pub(super) fn get_or_make(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        name: Name,
    ) -> Result<FrameId, Retry> {
        let mut backoff = Backoff::default();
        let mut made = None;
        loop {
            if let Some(frame) = self.pages.get(&name) {
                // In the hash within this read section, so the frame has not been reused.
                let page = self.frames.page(frame);
                if self.is_current(frame) {
                    page.touch();
                    if let Some(spare) = made {
                        // R06: the loser of a race drops its own page.
                        stats.mmu_cache_race.bump();
                        self.zap(guard, spare);
                    }
                    return Ok(frame);
                }
                if page.is_live() {
                    // Obsolete.
                    self.zap(guard, frame);
                }
                // Being torn down: help it out of the hash.
                self.pages.remove_if_equal(&name, frame);
                backoff.wait();
                continue;
            }
            let frame = match made {
                Some(frame) => frame,
                None => {
                    let frame = self.frame_for(guard).map_err(Retry::Stall)?;
                    self.populate(map, name, frame)?;
                    made = Some(frame);
                    frame
                }
            };
            // R06: insert if absent.
            if self.pages.insert_if_absent(name, frame).is_ok() {
                if !self.is_current(frame) {
                    // A slot's removal found it by its guest frame before it was in the hash, or it
                    // became obsolete in the making.
                    self.zap(guard, frame);
                    self.pages.remove_if_equal(&name, frame);
                    return Err(Retry::Again);
                }
                stats.mmu_cache_miss.bump();
                return Ok(frame);
            }
        }
    }

    /// Makes a page of a fresh frame, not yet in the hash.
    fn populate(&self, map: &MemoryMap, name: Name, frame: FrameId) -> Result<(), Retry> {
        let key = self.key_for(name);
        // Read when the frame is allocated already: if it is an old one by now, the round of
        // obsolete pages includes the frame. Acquire pairs with `zap_all`.
        let born = self.shadow_generation.load(Ordering::Acquire);
        let role = key.role();
        if !role.has_home() {
            if let Some(pdptrs) = name.pdptrs() {
                self.frames.stands_for(frame, pdptrs);
            }
            self.frames.claim(frame, key, crate::addr::Machine(0), born);
        } else {
            let Some(home) = map.page(key.gfn()) else {
                // The table itself lies outside memory now; the walk will say so.
                self.frames.release(frame);
                return Err(Retry::Again);
            };
            // From here on no fault makes the guest table writable (R2), and guest writes to it
            // find this page. R18: before the page is live, because whoever tears it down takes
            // this back.
            let track = || home.region().add_shadow(home.index, u64::from(frame.0) + 1);
            if rule!(R18) {
                track();
            }
            self.frames.claim(frame, key, home.machine(), born);
            if !rule!(R18) {
                track();
            }
        }
        if !role.is_indirect() {
            self.frames.page(frame).protected.store(PROTECTED.0, Ordering::Relaxed);
        }
        if let Some((index, value)) = self.reserved_at(key.role().level()) {
            let at = Location::new(frame, index);
            self.frames.entry(at).store(value, Ordering::Relaxed);
        }
        Ok(())
    }

    /// R1: before anything is derived from the guest table of `frame`, no processor may be able to
    /// write it. Any fault that finds the table unprotected does the work, so that one that stopped
    /// half-way stops nobody.
    pub(super) fn ensure_protected(
        &self,
        stats: &Stats,
        guard: &Guard<'_>,
        map: &MemoryMap,
        frame: FrameId,
    ) -> Result<(), Retry> {
        let page = self.frames.page(frame);
        // Acquire pairs with the Release below.
        let mut generation = Generation(page.protected.load(Ordering::Acquire));
        if generation == PROTECTED {
            return Ok(());
        }
        if generation == UNPROTECTED {
            let gfn = page.key().gfn();
            let home = map.page(gfn).ok_or(Retry::Again)?;
            // R2, R20: own store (the shadow's presence), fence, foreign load (the rmaps). Pairs with
            // the fence of the fault that links a writable entry, or one for a block.
            if rule!(R02) {
                fence(Ordering::SeqCst);
            }
            generation = self.protect_for(guard, home, stats);
            // The first generation that covers a scan is as good as any other's.
            let (old, new) = (UNPROTECTED.0, generation.0);
            if let Err(theirs) =
                page.protected.compare_exchange(old, new, Ordering::Release, Ordering::Acquire)
            {
                generation = Generation(theirs);
            }
        }
        if generation != PROTECTED {
            // Kicking vCPUs out is for who waits, outside the read section.
            if rule!(R01) && !self.flush.acknowledged(generation, false) {
                return Err(Retry::Stall(Stall::Flush(generation)));
            }
            page.protected.store(PROTECTED.0, Ordering::Release);
        }
        Ok(())
    }
}
