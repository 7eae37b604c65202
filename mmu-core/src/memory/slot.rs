// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One memslot.

use super::SlotError;
use super::backing::{Backing, PAGE_WORDS};
use crate::addr::{Gfn, Gpa, Machine, PAGE_SHIFT, PAGE_SIZE};
use crate::sync::{AtomicU64, LazyArray, LocationSet, Ordering};
use core::fmt;
use core::ptr::NonNull;
use std::sync::Arc;

/// Physical address bits of x86's page-table formats (SDM vol. 3, 5.1.4).
const PHYSICAL_BITS: u32 = 52;

/// A memslot's number, chosen by the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// What a VMM says of a new memslot.
#[derive(Clone, Debug)]
pub struct SlotConfig {
    /// The slot's number.
    pub id: SlotId,
    /// Guest-physical address of the first byte; a multiple of 4096.
    pub base: Gpa,
    /// Bytes; a multiple of 4096, at most the backing's size.
    pub size: u64,
    /// Guest writes are refused and handed to the VMM (KVM_MEM_READONLY).
    pub read_only: bool,
    /// Guest writes are recorded for the dirty log (KVM_MEM_LOG_DIRTY_PAGES).
    pub log_dirty: bool,
    /// The memory.
    pub backing: Arc<dyn Backing>,
}

impl SlotConfig {
    /// Writable memory without a dirty log, as large as its backing.
    #[must_use]
    pub fn new(id: u32, base: Gpa, backing: Arc<dyn Backing>) -> Self {
        let size = backing.size();
        Self { id: SlotId(id), base, size, read_only: false, log_dirty: false, backing }
    }

    /// The same with a dirty log.
    #[must_use]
    pub fn log_dirty(self) -> Self {
        Self { log_dirty: true, ..self }
    }

    /// The same, read-only for the guest.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }
}

/// A memslot as published. Keeps its backing alive.
pub struct Slot {
    id: SlotId,
    base: Gfn,
    pages: u64,
    machine: Machine,
    read_only: bool,
    log_dirty: bool,
    /// `backing.words()`, asked once.
    words: NonNull<[AtomicU64]>,
    backing: Arc<dyn Backing>,
    state: SlotState,
}

/// What the engine keeps for each page of a slot; allocated in chunks on first use.
#[derive(Debug)]
pub(crate) struct SlotState {
    /// Shadow entries that map the page.
    pub(crate) rmap: LazyArray<LocationSet>,
    /// Shadow pages that shadow the page as a guest page table. While there is one the page must
    /// not be writable.
    pub(crate) shadows: LazyArray<LocationSet>,
    dirty: LazyArray<AtomicU64>,
}

// SAFETY: `words` points into `backing`, which is `Send + Sync` and lends its memory as atomics.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

impl Slot {
    pub(super) fn new(config: SlotConfig) -> Result<Self, SlotError> {
        let SlotConfig { id, base, size, read_only, log_dirty, backing } = config;
        if size == 0 {
            return Err(SlotError::ZeroSize(id));
        }
        if size % PAGE_SIZE != 0 {
            return Err(SlotError::MisalignedSize { id, size });
        }
        if base.page_offset() != 0 {
            return Err(SlotError::MisalignedBase { id, base });
        }
        if base.0.checked_add(size).is_none_or(|end| end > 1 << PHYSICAL_BITS) {
            return Err(SlotError::WrapsAround { id, base, size });
        }
        if size > backing.size() {
            return Err(SlotError::BackingTooSmall { id, size, backing: backing.size() });
        }
        let machine = backing.machine();
        let end = machine.0.checked_add(size);
        if machine.page_offset() != 0 || end.is_none_or(|end| end > 1 << PHYSICAL_BITS) {
            return Err(SlotError::BadMachineAddress { id, machine });
        }
        let pages = size >> PAGE_SHIFT;
        let words = NonNull::from(&backing.words()[..pages as usize * PAGE_WORDS]);
        let state = SlotState {
            rmap: LazyArray::new(pages as usize),
            shadows: LazyArray::new(pages as usize),
            dirty: LazyArray::new(pages.div_ceil(64) as usize),
        };
        let base = base.gfn();
        Ok(Self { id, base, pages, machine, read_only, log_dirty, words, backing, state })
    }

    /// The slot's number.
    #[must_use]
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// First guest frame.
    #[must_use]
    pub fn base(&self) -> Gfn {
        self.base
    }

    /// Size in 4 KiB pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether guest writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether guest writes are recorded.
    #[must_use]
    pub fn logs_dirty(&self) -> bool {
        self.log_dirty
    }

    /// The memory.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    /// Machine address of the slot's first byte.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.machine
    }

    /// Whether the frame is in the slot.
    #[inline]
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.base.0) < self.pages
    }

    /// Index in the slot of a page that it contains.
    #[inline]
    pub(crate) fn index_of(&self, gfn: Gfn) -> usize {
        debug_assert!(self.contains(gfn));
        (gfn.0 - self.base.0) as usize
    }

    /// Machine address of the page with this index.
    #[inline]
    pub(crate) fn machine_of(&self, index: usize) -> Machine {
        Machine(self.machine.0 + ((index as u64) << PAGE_SHIFT))
    }

    #[inline]
    pub(crate) fn state(&self) -> &SlotState {
        &self.state
    }

    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the slice belongs to `backing`, which this slot keeps alive; `Backing` promises
        // that it stays valid and is used as atomics only.
        unsafe { self.words.as_ref() }
    }

    /// The word that holds the byte at `offset` (below 4096) of a page; `None` beyond the words
    /// that a model gives a page.
    #[inline]
    pub(crate) fn word(&self, index: usize, offset: u64) -> Option<&AtomicU64> {
        let word = (offset / 8) as usize;
        if cfg!(loom) && word >= PAGE_WORDS {
            return None;
        }
        self.words().get(index * PAGE_WORDS + word)
    }

    /// Records a write to the page, if the slot keeps a log.
    ///
    /// A fault calls this after the entry that lets the guest write is in place (R13).
    #[inline]
    pub(crate) fn mark_dirty(&self, index: usize) {
        if self.log_dirty {
            let word = self.state.dirty.get_or_alloc(index / 64);
            // Release pairs with the Acquire in `take_dirty`: a harvest that takes the bit sees
            // the entry that was made writable before it (R13).
            word.fetch_or(1 << (index % 64), Ordering::Release);
        }
    }

    /// Takes 64 pages' bits, page `64 * word` in bit 0.
    pub(crate) fn take_dirty(&self, word: usize) -> u64 {
        // Acquire pairs with the Release in `mark_dirty`.
        match self.state.dirty.get(word) {
            Some(bits) if bits.load(Ordering::Relaxed) != 0 => bits.swap(0, Ordering::AcqRel),
            _ => 0,
        }
    }

    /// Whether the page's bit is set.
    pub(crate) fn is_dirty(&self, index: usize) -> bool {
        let word = self.state.dirty.get(index / 64);
        word.is_some_and(|bits| bits.load(Ordering::Relaxed) >> (index % 64) & 1 != 0)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("id", &self.id)
            .field("base", &self.base)
            .field("pages", &self.pages)
            .field("machine", &self.machine)
            .field("read_only", &self.read_only)
            .field("log_dirty", &self.log_dirty)
            .finish_non_exhaustive()
    }
}
