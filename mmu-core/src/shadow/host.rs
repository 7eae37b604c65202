// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host does to guest memory: takes pages away for a while, or makes them read-only.
//!
//! Where the kernel's KVM hears of this from the memory manager, a VMM tells the engine: before it
//! discards, swaps, copies or moves what is behind a range (balloon, madvise, userfaultfd, a snapshot),
//! it begins an [`Invalidation`]; while that lives no processor reaches the range, and faults on it
//! wait. The engine's own accesses (walks, the emulator's accessors) go through the process's mapping
//! of the backing and meet whatever the host has made of that.
//!
//! A page's machine address never changes, so a fault that installs its entry before an invalidation
//! or after it is right in either case; during it the fault sees the range, or the invalidation sees
//! the entry (R7). Changes of the memory map wait until no invalidation is active, and new ones queue
//! behind them, so that no memory enters the map within an invalidation of it (R26).

use super::Engine;
use crate::addr::{Gpa, Hva, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::{MemoryMap, Slot};
use crate::sync::steps::{Held, What};
use crate::sync::{Backoff, Mark, Ordering, WouldDeadlock, fence, lock, rule};
use core::fmt;
use core::ops::Range;
use std::sync::Arc;

/// A range of whole pages, named by the guest's or by the host's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRange {
    /// `size` bytes of guest-physical addresses; aliases are followed.
    Guest {
        /// First address; a multiple of 4096.
        base: Gpa,
        /// Bytes; a multiple of 4096.
        size: u64,
    },
    /// `size` bytes of addresses in this process.
    Host {
        /// First address; a multiple of 4096.
        base: Hva,
        /// Bytes; a multiple of 4096.
        size: u64,
    },
}

/// Why a range was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range is empty, runs past the address space, or is not made of whole pages.
    #[error("{size:#x} bytes at {base:#x} are no range of whole pages")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The calling thread must not wait.
    #[error(transparent)]
    WouldDeadlock(#[from] WouldDeadlock),
}

/// The pages of slots in a range: their indices in the slot.
type Stretches = Vec<(Arc<Slot>, Range<usize>)>;

impl Engine {
    /// The pages of slots that the range names.
    pub(super) fn pages_in(
        &self,
        map: &MemoryMap,
        range: PageRange,
    ) -> Result<Stretches, RangeError> {
        let (base, size) = match range {
            PageRange::Guest { base, size } => (base.0, size),
            PageRange::Host { base, size } => (base.0, size),
        };
        let whole = size > 0 && base % PAGE_SIZE == 0 && size % PAGE_SIZE == 0;
        let end = base.checked_add(size).filter(|_| whole);
        let end = end.ok_or(RangeError::BadRange { base, size })?;
        Ok(match range {
            PageRange::Guest { .. } => {
                let found = map.stretches(base >> PAGE_SHIFT..end >> PAGE_SHIFT);
                found.map(|(slot, pages)| (Arc::clone(slot), pages)).collect()
            }
            PageRange::Host { .. } => {
                let within = |slot: &Arc<Slot>| {
                    let first = slot.region().hva().0;
                    let last = first + (slot.pages() << PAGE_SHIFT);
                    let (from, to) = (base.max(first), end.min(last));
                    let page = |at: u64| ((at - first) >> PAGE_SHIFT) as usize;
                    (from < to).then(|| (Arc::clone(slot), page(from)..page(to)))
                };
                map.slots().filter_map(within).collect()
            }
        })
    }

    /// Takes the pages of the ranges away from every processor until the [`Invalidation`] ends.
    pub(crate) fn invalidate(
        self: &Arc<Self>,
        ranges: &[PageRange],
    ) -> Result<Invalidation, RangeError> {
        self.may_wait()?;
        // R26: a change of the map that queues holds the lock and waits for this thread's first one.
        if Mark::is_set(self.id, WouldDeadlock::Invalidating) {
            return Err(WouldDeadlock::Invalidating.into());
        }
        let stretches = {
            let _writer = lock(&self.writer);
            let map = self.memory.snapshot();
            let mut stretches = Stretches::new();
            for range in ranges {
                stretches.append(&mut self.pages_in(&map, *range)?);
            }
            Held::new(What::Away).keep();
            for (slot, pages) in &stretches {
                slot.region().invalid.begin(pages.clone());
            }
            // Relaxed: the lock publishes it to the next change of the map.
            self.invalidating.fetch_add(1, Ordering::Relaxed);
            stretches
        };
        // From here on dropping it ends it.
        let mark = Mark::new(self.id, WouldDeadlock::Invalidating);
        let invalidation = Invalidation { engine: Arc::clone(self), stretches, _mark: mark };
        // R7: the range first, fence, then entries, pending ones included. Pairs with the fence of a
        // fault between its link and its second look at the range.
        fence(Ordering::SeqCst);
        let handle = self.handles.get();
        let mut settled = self.flush.cover();
        for (slot, pages) in &invalidation.stretches {
            settled = self.for_mapped(slot, pages.clone(), &handle, |guard, page, narrowing| {
                self.drop_mappings(guard, page, narrowing);
            });
        }
        // R07: nor from what processors remember.
        if rule!(R07) {
            self.wait_acknowledged(settled);
        }
        Ok(invalidation)
    }

    /// Makes the pages of the range read-only for processors, or lets faults make them writable again.
    pub(crate) fn set_host_writable(
        &self,
        range: PageRange,
        writable: bool,
    ) -> Result<(), RangeError> {
        self.may_wait()?;
        let stretches = self.pages_in(&self.memory.snapshot(), range)?;
        for (slot, pages) in &stretches {
            slot.region().set_host_read_only(pages.clone(), !writable);
        }
        // R7, as in `invalidate`.
        fence(Ordering::SeqCst);
        let mut handle = self.handles.get();
        if writable {
            // R35: what was derived from guest tables in it need not have A set there.
            for (slot, pages) in &stretches {
                self.zap_shadows(slot, pages.clone(), &handle);
            }
            return Ok(());
        }
        let mut settled = self.flush.cover();
        for (slot, pages) in &stretches {
            settled = self.for_mapped(slot, pages.clone(), &handle, |guard, page, narrowing| {
                self.protect(guard, page, narrowing, &self.stats);
            });
        }
        // R7: nor by the engine itself for a guest: an accessor, or a walk that sets A or D, asks
        // before it writes, both in one read section.
        if rule!(R07) {
            self.wait_for_readers(&mut handle);
        }
        self.wait_acknowledged(settled);
        Ok(())
    }

    /// Waits until no host invalidation is active; the caller holds the writers' lock, so that new
    /// ones queue behind it (R26).
    pub(super) fn wait_for_invalidations(&self) {
        let mut backoff = Backoff::default();
        // Acquire pairs with the Release in the destructor of `Invalidation`.
        while self.invalidating.load(Ordering::Acquire) > 0 && rule!(R26) {
            backoff.wait();
        }
    }

    /// Host invalidations that have ended.
    pub(crate) fn invalidations_ended(&self) -> u64 {
        self.invalidated.load(Ordering::Acquire)
    }
}

/// Pages that the host has taken away: until this is dropped no processor reaches them, and faults
/// on them stall. It belongs to the thread that began it.
#[must_use = "dropping it gives the pages back"]
pub struct Invalidation {
    engine: Arc<Engine>,
    stretches: Stretches,
    _mark: Mark,
}

impl Invalidation {
    /// Gives the pages back.
    pub fn end(self) {}
}

impl Drop for Invalidation {
    fn drop(&mut self) {
        for (slot, _) in &self.stretches {
            slot.region().invalid.end();
        }
        // Release: a change of the map that finds none sees all that this one did.
        self.engine.invalidating.fetch_sub(1, Ordering::Release);
        // The pages first: who waits for this number looks at them next.
        self.engine.invalidated.fetch_add(1, Ordering::Release);
        Held::end(What::Away);
    }
}

impl fmt::Debug for Invalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.stretches.iter().map(|(slot, pages)| (slot.id(), pages)))
            .finish()
    }
}
