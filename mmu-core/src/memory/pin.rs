// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages pinned by the VMM: for string port I/O, a vapic page, a device's queue.

use super::slot::Page;
use super::{Region, Slot, SlotId};
use crate::addr::PAGE_SIZE;
use crate::sync::{AtomicU64, Mutex, Ordering, lock, rule};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The pins of one region.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    count: AtomicU64,
    /// Pages pinned for writing, and how often.
    written: Mutex<BTreeMap<usize, u64>>,
}

impl Pins {
    /// How many pins there are.
    pub(crate) fn count(&self) -> u64 {
        // Acquire pairs with the Release of an unpin: what was done through the pin has happened.
        self.count.load(Ordering::Acquire)
    }

    /// Reports every page that is pinned for writing.
    pub(crate) fn written(&self, report: impl FnMut(usize)) {
        if self.count() > 0 {
            lock(&self.written).keys().copied().for_each(report);
        }
    }
}

/// A page of guest memory that stays valid until this is dropped, whatever becomes of its slot.
///
/// A page pinned for writing is in every harvest of its dirty log until it is released, and in the
/// one after that (R13). It is not protected from the guest, and its shadow, should it be a guest
/// page table, is not told of writes.
#[derive(Debug)]
pub struct PinnedPage {
    slot: Slot,
    index: usize,
    write: bool,
}

impl PinnedPage {
    pub(crate) fn new(page: Page<'_>, write: bool) -> Self {
        let pins = &page.region().pins;
        // Relaxed: the writer that asks for pins has made the slot unreachable and waited for the
        // read section that this runs in.
        pins.count.fetch_add(1, Ordering::Relaxed);
        if write {
            *lock(&pins.written).entry(page.index).or_insert(0) += 1;
        }
        Self { slot: Slot::clone(page.slot), index: page.index, write }
    }

    /// The page's 8-byte words, in address order.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        let first = self.index * super::PAGE_WORDS;
        &self.region().words()[first..first + super::PAGE_WORDS]
    }

    /// The slot it was found in, and the page's offset in it in bytes.
    #[must_use]
    pub fn place(&self) -> (SlotId, u64) {
        (self.slot.id(), self.index as u64 * PAGE_SIZE)
    }

    fn region(&self) -> &Arc<Region> {
        self.slot.region()
    }
}

impl Drop for PinnedPage {
    fn drop(&mut self) {
        let pins = &self.region().pins;
        if self.write {
            // R13: the bit before the pin goes, so that each harvest sees one of them.
            let mark = || self.region().dirty.mark_unpinned(self.index..self.index + 1);
            if rule!(R13) {
                mark();
            }
            {
                let mut written = lock(&pins.written);
                if let Some(count) = written.get_mut(&self.index) {
                    *count -= 1;
                    if *count == 0 {
                        written.remove(&self.index);
                    }
                }
            }
            if !rule!(R13) {
                mark();
            }
        }
        // Release pairs with the Acquire in `Pins::count`.
        pins.count.fetch_sub(1, Ordering::Release);
    }
}
