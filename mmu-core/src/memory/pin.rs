// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages pinned by the VMM: for string port I/O, a vapic page, a device's queue.

use super::slot::Page;
use super::{Region, Slot, SlotId, words};
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

/// Why an access to pinned memory was refused. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinnedAccessError {
    /// Not all of it is pinned.
    #[error("{len} bytes at offset {at:#x} are not within {size} pinned bytes")]
    OutOfRange {
        /// Offset given, in bytes.
        at: u64,
        /// Bytes.
        len: usize,
        /// Bytes that are pinned.
        size: u64,
    },
    /// A write to memory that was pinned for reading.
    #[error("{len} bytes to write at offset {at:#x} of memory that is pinned for reading")]
    ReadOnly {
        /// Offset given, in bytes.
        at: u64,
        /// Bytes.
        len: usize,
    },
}

/// A page of guest memory that stays valid until this is dropped, whatever becomes of its slot
/// (`gfn_to_page` and `kvm_release_page_dirty` in KVM).
///
/// A page pinned for writing is in every harvest of its dirty log until it is released, and in the
/// one after that (R13). It is not protected from the guest, and its shadow, should it be a guest
/// page table, is not told of writes ([`crate::Mmu::note_write`]).
///
/// It may be held for any length of time: across guest entries, system calls, and changes of the
/// map. A page that is pinned while its slot is deleted is in the [`Release`](crate::shadow::Release)
/// and no guest memory any more; who pins a page again for each entry, as KVM does, follows the
/// map.
///
/// # The vapic page
///
/// KVM's `vapic_enter` pins the page in which a guest keeps its task-priority register, copies
/// the register there, and `vapic_exit` takes it back and releases the page:
///
/// ```
/// # use mmu_core::{Config, Mmu, addr::Gpa, memory::{AllocatedMemory, SlotConfig}};
/// # use std::sync::Arc;
/// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
/// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
/// # let guest_runs = || mmu.write_phys(Gpa(0x5080), &[0x30]);
/// const TPR: u64 = 0x80;
/// let mut tpr = [0x20];
/// // Before the entry. An error says that the guest's address is no memory.
/// let vapic = mmu.pin_page(Gpa(0x5000), true)?;
/// vapic.write(TPR, &tpr)?;
/// guest_runs();
/// // After the exit.
/// vapic.read(TPR, &mut tpr)?;
/// drop(vapic);
/// assert_eq!(tpr, [0x30]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
        self.region().words_of(self.index)
    }

    /// The slot it was found in, and the page's offset in it in bytes.
    #[must_use]
    pub fn place(&self) -> (SlotId, u64) {
        (self.slot.id(), self.index as u64 * PAGE_SIZE)
    }

    /// Reads bytes from `at` bytes into the page on. Each aligned 8-byte word is read as one. Waits
    /// for nobody.
    ///
    /// # Errors
    ///
    /// [`PinnedAccessError::OutOfRange`].
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), PinnedAccessError> {
        let len = buf.len();
        if at.checked_add(len as u64).is_none_or(|end| end > PAGE_SIZE) {
            return Err(PinnedAccessError::OutOfRange { at, len, size: PAGE_SIZE });
        }
        words::load(self.words(), at, buf);
        Ok(())
    }

    /// Writes bytes from `at` bytes into the page on. Each part of an aligned 8-byte word is written
    /// as one. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`PinnedAccessError`], which names the offset.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), PinnedAccessError> {
        let len = bytes.len();
        if !self.write {
            return Err(PinnedAccessError::ReadOnly { at, len });
        }
        if at.checked_add(len as u64).is_none_or(|end| end > PAGE_SIZE) {
            return Err(PinnedAccessError::OutOfRange { at, len, size: PAGE_SIZE });
        }
        words::store(self.words(), at, bytes);
        Ok(())
    }

    /// The page's region, and its index there.
    pub(crate) fn page(&self) -> (&Region, usize) {
        (self.region(), self.index)
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
