// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One memslot: a region of memory, its number, its place and its flags.

use super::region::Region;
use super::{Backing, DirtyPage, DirtyRing, SlotError};
use crate::addr::{Gfn, Gpa, Machine, PAGE_SHIFT, PHYSICAL_BITS};
use crate::sync::AtomicU64;
use core::fmt;
use std::sync::Arc;

/// A memslot's number, chosen by the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// How a slot's dirty pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyMode {
    /// They are not.
    #[default]
    Off,
    /// The first write to a page after a harvest faults (KVM_MEM_LOG_DIRTY_PAGES).
    WriteProtect,
    /// The processor sets the dirty bit in the shadow entry; no write faults for the log's sake, but
    /// a harvest looks at every mapped page (what KVM does with EPT's dirty bits and PML).
    DirtyBits,
}

/// What may change of a slot while it exists ([`crate::Mmu::set_slot_flags`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// Guest writes are refused and handed to the VMM (KVM_MEM_READONLY).
    pub read_only: bool,
    /// Guest writes are recorded for the dirty log.
    pub dirty: DirtyMode,
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
    /// What may be changed later.
    pub flags: SlotFlags,
    /// The memory.
    pub backing: Arc<dyn Backing>,
}

impl SlotConfig {
    /// Writable memory without a dirty log, as large as its backing.
    #[must_use]
    pub fn new(id: u32, base: Gpa, backing: Arc<dyn Backing>) -> Self {
        let size = backing.size();
        Self { id: SlotId(id), base, size, flags: SlotFlags::default(), backing }
    }

    /// The same with a dirty log by write-protection.
    #[must_use]
    pub fn log_dirty(self) -> Self {
        self.track(DirtyMode::WriteProtect)
    }

    /// The same with a dirty log of this kind.
    #[must_use]
    pub fn track(mut self, dirty: DirtyMode) -> Self {
        self.flags.dirty = dirty;
        self
    }

    /// The same, read-only for the guest.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.flags.read_only = true;
        self
    }
}

/// A memslot as published. Keeps its backing alive.
#[derive(Clone)]
pub struct Slot {
    id: SlotId,
    base: Gfn,
    flags: SlotFlags,
    region: Arc<Region>,
}

impl Slot {
    pub(super) fn new(config: SlotConfig) -> Result<Self, SlotError> {
        let SlotConfig { id, base, size, flags, backing } = config;
        let region = Arc::new(Region::new(id, size, backing)?);
        Self { id, base: Gfn(0), flags, region }.at(base)
    }

    /// The same slot with other flags.
    pub(super) fn with_flags(&self, flags: SlotFlags) -> Self {
        Self { flags, ..self.clone() }
    }

    /// The same slot elsewhere.
    pub(super) fn at(&self, base: Gpa) -> Result<Self, SlotError> {
        let (id, size) = (self.id, self.pages() << PAGE_SHIFT);
        if base.page_offset() != 0 {
            return Err(SlotError::MisalignedBase { id, base });
        }
        if base.0.checked_add(size).is_none_or(|end| end > 1 << PHYSICAL_BITS) {
            return Err(SlotError::WrapsAround { id, base, size });
        }
        Ok(Self { base: base.gfn(), ..self.clone() })
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
        self.region.pages()
    }

    /// What may be changed.
    #[must_use]
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// Whether guest writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.flags.read_only
    }

    /// Whether guest writes are recorded.
    #[must_use]
    pub fn logs_dirty(&self) -> bool {
        self.flags.dirty != DirtyMode::Off
    }

    /// The memory.
    #[must_use]
    pub fn backing(&self) -> &Arc<dyn Backing> {
        self.region.backing()
    }

    /// Machine address of the slot's first byte.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.region.machine()
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("id", &self.id)
            .field("base", &self.base)
            .field("pages", &self.pages())
            .field("machine", &self.machine())
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

/// A page of a slot, found in a map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page<'m> {
    pub(crate) slot: &'m Arc<Slot>,
    /// Index of the page in the slot.
    pub(crate) index: usize,
}

impl<'m> Page<'m> {
    #[inline]
    pub(crate) fn region(self) -> &'m Region {
        &self.slot.region
    }

    #[inline]
    pub(crate) fn machine(self) -> Machine {
        self.region().machine_of(self.index)
    }

    /// The page's words, in address order.
    #[inline]
    pub(crate) fn words(self) -> &'m [AtomicU64] {
        self.region().words_of(self.index)
    }

    #[inline]
    pub(crate) fn word(self, offset: u64) -> Option<&'m AtomicU64> {
        self.region().word(self.index, offset)
    }

    /// Records a write to the page, if the slot keeps a log; in the ring as well, if it was not
    /// recorded already.
    ///
    /// A fault calls this after the entry that lets the guest write is in place (R13).
    #[inline]
    pub(crate) fn mark_dirty(self, ring: Option<&DirtyRing>) {
        if self.slot.logs_dirty() && self.region().dirty.mark(self.index) {
            if let Some(ring) = ring {
                // A full ring says so itself; the log has the page.
                ring.push(DirtyPage { slot: self.slot.id(), page: self.index as u64 });
            }
        }
    }

    /// Whether the processor may write the page: neither the VMM nor the host forbids it.
    #[inline]
    pub(crate) fn is_writable(self) -> bool {
        !self.slot.is_read_only() && !self.region().is_host_read_only(self.index)
    }
}
