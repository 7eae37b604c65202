// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table frames and the shadow pages that live in them.
//!
//! The consumer gives one stretch of table memory. Each 4 KiB of it is a *frame*; each frame has
//! one descriptor, which never moves and is never freed, so a stale frame number is harmless: at
//! worst it names another page. A frame's contents are reused only when every processor has
//! dropped what it remembers of it and every read section that could know it has ended (R4, R29).

use super::flush::Generation;
use super::location::{FrameId, Location};
use super::role::Key;
use super::spte::Spte;
use crate::addr::{ENTRIES, Machine, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::Backing;
use crate::sync::{
    AtomicU32, AtomicU64, CachePadded, LazyArray, LocationSet, Ordering, hint, rule,
};
use core::fmt;
use core::ptr::NonNull;
use std::sync::Arc;

/// Lifecycle of the page in a frame.
pub(crate) mod state {
    /// No page.
    pub(crate) const FREE: u32 = 0;
    /// May be linked and filled.
    pub(crate) const LIVE: u32 = 1;
    /// Being torn down; nothing new may come in.
    pub(crate) const ZAPPING: u32 = 2;
    /// Torn down; waits for processors and readers to forget it.
    pub(crate) const RETIRED: u32 = 3;
}

/// The page's guest table has not been write-protected yet.
pub(crate) const UNPROTECTED: Generation = Generation(u64::MAX);
/// No processor can write the page's guest table. The flush generations count from 1.
pub(crate) const PROTECTED: Generation = Generation(0);

/// Descriptor of a frame; in cache lines of its own, since emulated writes to one vCPU's table count in
/// it, and its neighbour may be another's root.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct ShadowPage {
    /// (gfn, role) of the page; stable while it is not free.
    key: AtomicU64,
    /// Machine address of the guest table, to find its slot after the slot has left the map (R27).
    home: AtomicU64,
    /// What a root of PAE paging stands for; stable as the key.
    pdptrs: [AtomicU64; 4],
    pub(crate) state: AtomicU32,
    /// Flush generation after which no processor can write the guest table (R1).
    pub(crate) protected: AtomicU64,
    /// Entries that point at the page.
    pub(crate) parents: LocationSet,
    /// Of a leaf table: whether the guest may be writing to its guest table unseen
    /// ([`super::unsync`]).
    pub(crate) unsync: AtomicU64,
    /// Of the others: tables that it points at and that are, or point at, such a table.
    pub(crate) below: LocationSet,
    /// Emulated writes to its guest table since a fault passed through.
    writes: hint::AtomicU32,
    /// vCPUs that have the page as root (R19).
    pub(crate) roots: AtomicU32,
    /// Shadow generation it was made in: with an older one than the engine's it is obsolete (R19).
    born: AtomicU64,
    /// It has been linked before: processors may remember entries of it.
    linked: hint::AtomicBool,
    /// A fault has passed through since recycling last looked.
    young: hint::AtomicBool,
    /// Flush generation that must have been drained before the frame is reused.
    retired: AtomicU64,
    /// Link of the list of frames this one is in.
    next: AtomicU32,
}

impl Default for ShadowPage {
    fn default() -> Self {
        Self {
            key: AtomicU64::new(0),
            home: AtomicU64::new(0),
            pdptrs: Default::default(),
            state: AtomicU32::new(state::FREE),
            protected: AtomicU64::new(UNPROTECTED.0),
            parents: LocationSet::default(),
            unsync: AtomicU64::new(0),
            below: LocationSet::default(),
            writes: hint::AtomicU32::new(0),
            roots: AtomicU32::new(0),
            born: AtomicU64::new(0),
            linked: hint::AtomicBool::new(false),
            young: hint::AtomicBool::new(false),
            retired: AtomicU64::new(0),
            next: AtomicU32::new(NONE),
        }
    }
}

impl ShadowPage {
    pub(crate) fn key(&self) -> Key {
        Key(self.key.load(Ordering::Relaxed))
    }

    pub(crate) fn home(&self) -> Machine {
        Machine(self.home.load(Ordering::Relaxed))
    }

    pub(super) fn pdptrs(&self) -> [u64; 4] {
        self.pdptrs.each_ref().map(|register| register.load(Ordering::Relaxed))
    }

    /// Shadow generation it was made in; stable while it is not free.
    pub(crate) fn born(&self) -> u64 {
        self.born.load(Ordering::Relaxed)
    }

    /// Notes that a fault passes through. Stores only if that is news.
    pub(crate) fn touch(&self) {
        // Relaxed: a hint for recycling.
        if !self.young.load(Ordering::Relaxed) {
            self.young.store(true, Ordering::Relaxed);
        }
        if self.writes.load(Ordering::Relaxed) != 0 {
            self.writes.store(0, Ordering::Relaxed);
        }
    }

    /// Notes that it is linked; whether it was before.
    pub(crate) fn link_again(&self) -> bool {
        self.linked.load(Ordering::Relaxed) || {
            self.linked.store(true, Ordering::Relaxed);
            false
        }
    }

    /// Counts an emulated write to the guest table; how many there were since a fault passed through.
    pub(crate) fn count_write(&self) -> u32 {
        // Relaxed: a hint that the guest uses the table as data.
        self.writes.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether a fault has passed through since the last call.
    pub(crate) fn take_young(&self) -> bool {
        self.young.load(Ordering::Relaxed) && {
            self.young.store(false, Ordering::Relaxed);
            true
        }
    }

    /// Acquire: whoever sees the page live sees its key.
    pub(crate) fn is_live(&self) -> bool {
        self.state.load(Ordering::Acquire) == state::LIVE
    }
}

const NONE: u32 = u32::MAX;

/// A list of frames linked through their descriptors: frame in the low half, a count of changes in
/// the high half against ABA.
#[derive(Debug)]
struct FrameStack(AtomicU64);

impl FrameStack {
    fn new() -> Self {
        Self(AtomicU64::new(NONE as u64))
    }

    fn push(&self, pages: &LazyArray<ShadowPage>, frame: FrameId) {
        let page = pages.get_or_alloc(frame.0 as usize);
        let mut head = self.0.load(Ordering::Relaxed);
        loop {
            page.next.store(head as u32, Ordering::Relaxed);
            let new = ((head >> 32) + 1) << 32 | frame.0 as u64;
            // Release publishes the link to `pop` and `take`.
            match self.0.compare_exchange(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    fn pop(&self, pages: &LazyArray<ShadowPage>) -> Option<FrameId> {
        // Acquire pairs with the Release in `push`, here and in the exchange.
        let mut head = self.0.load(Ordering::Acquire);
        loop {
            if head as u32 == NONE {
                return None;
            }
            // A descriptor is never freed, so this read is safe even if another thread pops it;
            // the count then makes the exchange fail.
            let next = pages.get(head as u32 as usize)?.next.load(Ordering::Relaxed);
            let new = ((head >> 32) + 1) << 32 | next as u64;
            match self.0.compare_exchange(head, new, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return Some(FrameId(head as u32)),
                Err(now) => head = now,
            }
        }
    }
}

/// All frames of one engine.
pub(crate) struct Frames {
    memory: Arc<dyn Backing>,
    /// `memory.words()`, asked once.
    entries: NonNull<[AtomicU64]>,
    machine: Machine,
    count: u32,
    pages: LazyArray<ShadowPage>,
    /// How many frames may be in use (R28).
    quota: AtomicU32,
    supply: CachePadded<Supply>,
    retired: CachePadded<Retired>,
}

/// What an allocation changes.
#[derive(Debug)]
struct Supply {
    /// Frames that are not free, those that wait to be free included.
    used: AtomicU32,
    /// Frames at or above this number were never used.
    fresh: AtomicU32,
    free: FrameStack,
}

/// What a page's end changes.
#[derive(Debug)]
struct Retired {
    /// Frames in use whose pages were torn down.
    count: hint::AtomicU32,
    /// Of those, the ones that were some vCPU's root when last looked at.
    held: hint::AtomicU32,
    /// Those whose grace period has passed.
    graced: FrameStack,
}

// SAFETY: `entries` points into `memory`, which is `Send + Sync` and lends atomics.
unsafe impl Send for Frames {}
// SAFETY: as above.
unsafe impl Sync for Frames {}

impl Frames {
    pub(crate) fn new(memory: Arc<dyn Backing>) -> Self {
        let count = (memory.size() / PAGE_SIZE).min(NONE as u64 - 1) as u32;
        Self {
            entries: NonNull::from(memory.words()),
            machine: memory.machine(),
            count,
            pages: LazyArray::new(count as usize),
            quota: AtomicU32::new(count),
            supply: CachePadded::new(Supply {
                used: AtomicU32::new(0),
                fresh: AtomicU32::new(0),
                free: FrameStack::new(),
            }),
            retired: CachePadded::new(Retired {
                count: hint::AtomicU32::new(0),
                held: hint::AtomicU32::new(0),
                graced: FrameStack::new(),
            }),
            memory,
        }
    }

    /// Frames used so far have numbers below this.
    pub(crate) fn high_water(&self) -> u32 {
        self.supply.fresh.load(Ordering::Relaxed)
    }

    fn entries(&self) -> &[AtomicU64] {
        // SAFETY: `memory` keeps the slice alive and promises that it is used as atomics only.
        unsafe { self.entries.as_ref() }
    }

    #[inline]
    pub(crate) fn entry(&self, at: Location) -> &AtomicU64 {
        &self.entries()[at.position()]
    }

    #[inline]
    pub(crate) fn page(&self, frame: FrameId) -> &ShadowPage {
        self.pages.get_or_alloc(frame.0 as usize)
    }

    /// First machine address of the tables, if the range touches them.
    pub(crate) fn overlap(&self, machine: Machine, size: u64) -> Option<Machine> {
        let end = self.machine.0 + u64::from(self.count) * PAGE_SIZE;
        let touches = machine.0 < end && machine.0.saturating_add(size) > self.machine.0;
        touches.then_some(self.machine)
    }

    pub(crate) fn machine(&self, frame: FrameId) -> Machine {
        Machine(self.machine.0 + ((frame.0 as u64) << PAGE_SHIFT))
    }

    /// The frame at a machine address.
    #[inline]
    pub(crate) fn frame_at(&self, machine: Machine) -> Option<FrameId> {
        let index = machine.0.wrapping_sub(self.machine.0) >> PAGE_SHIFT;
        (index < self.count as u64).then_some(FrameId(index as u32))
    }

    /// Number of frames.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Frames that are not free, and of these the ones that were torn down.
    pub(crate) fn used_and_retired(&self) -> (u32, u32) {
        // Relaxed: estimates for recycling and for people.
        (self.supply.used.load(Ordering::Relaxed), self.retired.count.load(Ordering::Relaxed))
    }

    /// Frames that will be free when processors and readers have forgotten them.
    pub(crate) fn coming_back(&self) -> u32 {
        let held = self.retired.held.load(Ordering::Relaxed);
        self.retired.count.load(Ordering::Relaxed).saturating_sub(held)
    }

    /// How many frames may be used.
    pub(crate) fn quota(&self) -> u32 {
        self.quota.load(Ordering::Relaxed)
    }

    /// Sets how many frames may be used, at most as many as there are.
    pub(crate) fn set_quota(&self, quota: u32) {
        self.quota.store(quota.min(self.count), Ordering::Relaxed);
    }

    /// A frame that nobody uses: with every entry empty, and no page in it yet. `None` beyond the
    /// quota.
    pub(crate) fn allocate(&self) -> Option<FrameId> {
        // R28: reserve, give back on failure; the quota is never passed, not even for a moment. All
        // Relaxed: the numbers alone matter.
        let quota = self.quota();
        if rule!(R28) {
            let within = |used: u32| (used < quota).then_some(used + 1);
            self.supply.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).ok()?;
        } else {
            if self.supply.used.load(Ordering::Relaxed) >= quota {
                return None;
            }
            self.supply.used.fetch_add(1, Ordering::Relaxed);
        }
        let frame = self.supply.free.pop(&self.pages).or_else(|| {
            let fresh = |f: u32| (f < self.count).then_some(f + 1);
            let frame = self.supply.fresh.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fresh);
            frame.ok().map(FrameId)
        });
        let Some(frame) = frame else {
            self.supply.used.fetch_sub(1, Ordering::Relaxed);
            return None;
        };
        for index in 0..ENTRIES {
            // Relaxed: the page is published by the link to it.
            self.entry(Location::new(frame, index)).store(Spte::EMPTY.0, Ordering::Relaxed);
        }
        Some(frame)
    }

    /// Says what the page to be made of an allocated frame will stand for.
    pub(super) fn stands_for(&self, frame: FrameId, pdptrs: [u64; 4]) {
        for (register, value) in self.page(frame).pdptrs.iter().zip(pdptrs) {
            // Relaxed: `claim` publishes it with the key.
            register.store(value, Ordering::Relaxed);
        }
    }

    /// Makes a page of an allocated frame.
    pub(crate) fn claim(&self, frame: FrameId, key: Key, home: Machine, born: u64) {
        let page = self.page(frame);
        page.key.store(key.0, Ordering::Relaxed);
        page.home.store(home.0, Ordering::Relaxed);
        page.born.store(born, Ordering::Relaxed);
        page.young.store(true, Ordering::Relaxed);
        page.writes.store(0, Ordering::Relaxed);
        page.linked.store(false, Ordering::Relaxed);
        page.unsync.store(0, Ordering::Relaxed);
        // What its last page left behind: nobody adds to that any more.
        page.below.to_vec().into_iter().for_each(|child| {
            page.below.remove(child);
        });
        page.protected.store(UNPROTECTED.0, Ordering::Relaxed);
        // Release publishes the key to `is_live`.
        page.state.store(state::LIVE, Ordering::Release);
    }

    /// Gives back a frame that was allocated and never claimed.
    pub(crate) fn release(&self, frame: FrameId) {
        self.supply.free.push(&self.pages, frame);
        self.supply.used.fetch_sub(1, Ordering::Relaxed);
    }

    /// Retires the page: its frame may be reused once `generation` is drained by every processor.
    /// The caller defers [`Frames::grace_passed`] to the end of a grace period.
    pub(crate) fn retire(&self, frame: FrameId, generation: Generation) {
        let page = self.page(frame);
        page.retired.store(generation.0, Ordering::Relaxed);
        self.retired.count.fetch_add(1, Ordering::Relaxed);
        // Release: pairs with the Acquire in `reclaim` through the list; the state is for audits.
        page.state.store(state::RETIRED, Ordering::Release);
    }

    /// Called when every read section that was open at [`Frames::retire`] has ended.
    pub(crate) fn grace_passed(&self, frame: FrameId) {
        self.retired.graced.push(&self.pages, frame);
    }

    /// Frees the retired frames that no processor remembers: those whose generation `drained`
    /// approves and that are no vCPU's root. Returns the oldest generation that one waits for.
    pub(crate) fn reclaim(
        &self,
        mut drained: impl FnMut(Generation) -> bool,
    ) -> Option<Generation> {
        let mut waits = None;
        let mut keep = Vec::new();
        let mut held = 0;
        while let Some(frame) = self.retired.graced.pop(&self.pages) {
            let page = self.page(frame);
            let generation = Generation(page.retired.load(Ordering::Relaxed));
            // Acquire pairs with the Release of the vCPU that gave the root up (R19).
            let is_root = page.roots.load(Ordering::Acquire) > 0 && rule!(R19);
            let waited_for = !drained(generation);
            if waited_for {
                waits = Some(waits.map_or(generation, |w: Generation| w.min(generation)));
            }
            if waited_for || is_root {
                held += u32::from(is_root);
                keep.push(frame);
                continue;
            }
            page.state.store(state::FREE, Ordering::Relaxed);
            self.supply.free.push(&self.pages, frame);
            self.retired.count.fetch_sub(1, Ordering::Relaxed);
            self.supply.used.fetch_sub(1, Ordering::Relaxed);
        }
        self.retired.held.store(held, Ordering::Relaxed);
        for frame in keep {
            self.retired.graced.push(&self.pages, frame);
        }
        waits
    }

    /// Every frame that was ever used.
    pub(crate) fn used(&self) -> impl Iterator<Item = (FrameId, &ShadowPage)> {
        (0..self.high_water()).map(|f| (FrameId(f), self.page(FrameId(f))))
    }
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("memory", &self.memory).finish_non_exhaustive()
    }
}
