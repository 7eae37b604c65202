// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-virtual memory for code that is written for the `vm-memory` crate.
//!
//! vm-memory lends slices of guest memory for as long as the memory object is borrowed, which is no
//! read section. So the object holds a snapshot of the memory map, which keeps the slots' memory;
//! the translations are those of the moment of each access. A slice carries, in the place of
//! vm-memory's bitmap, what tells the dirty log and the shadow of each write through it.
//!
//! Unsafe: a slice is made of a pointer.

use super::error::AccessError;
use super::space::split;
use super::view::GuestView;
use crate::addr::{Gva, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::{MemoryMap, Region};
use crate::paging::{Access, Kind};
use crate::shadow::Engine;
use core::fmt;
use core::iter::FusedIterator;
use core::ops::Range;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, Permissions, VolatileSlice,
};

/// Guest-virtual memory as a [`vm_memory::GuestMemory`]: addresses are the guest's virtual ones, all
/// of [`Bytes`](vm_memory::Bytes) works on them. Made by [`GuestView`]'s
/// [`memory`](GuestAddressSpace::memory).
///
/// An access that crosses pages is made page by page, each by the translation of that moment; one
/// that fails in the middle has been made up to there, and [`Bytes`](vm_memory::Bytes) says how far.
/// ([`GuestView::write`] makes all of it or none.) [`Permissions`] choose between a write and a read
/// of the view's kind; without any, [`GuestMemory::check_range`] asks for a translation alone. It
/// touches no accessed bits, and takes time in proportion to the range.
///
/// An error is [`GuestMemoryError::IOError`] with an [`AccessError`] inside.
///
/// Writes through the slices are in the dirty log and told to the shadow, unless they are made
/// through raw pointers or atomic references, since vm-memory says nothing of these.
///
/// What is allowed is asked when a slice is made: one that is held while the host makes the page
/// read-only, or the guest changes its tables, goes on as it is.
///
/// It keeps the memory of the slots of when it was made, and finds no others: who lives long calls
/// [`memory`](GuestAddressSpace::memory) again now and then.
///
/// ```
/// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig, VmMemoryRegion}};
/// # use mmu_core::paging::{Access, Regs};
/// # use mmu_core::vcpu::AccessError;
/// # use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError, GuestMemoryMmap};
///
/// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
/// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
/// # let region = VmMemoryRegion::new(Arc::clone(&memory), GuestAddress(0))?;
/// # mmu.create_slot(SlotConfig::new(0, region.base(), Arc::new(region)))?;
/// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
/// #     memory.write_obj::<u64>(value, GuestAddress(entry))?;
/// # }
/// // 0x1000 is mapped to 0x5000, the next page to nothing.
/// let view = mmu.view(&Regs::long_mode(0x1000), Access::read().user())?.memory();
/// view.write_obj(0xfeed_u32, GuestAddress(0x1234))?;
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x5234))?, 0xfeed);
///
/// let error = view.read_obj::<u32>(GuestAddress(0x2000)).unwrap_err();
/// let GuestMemoryError::IOError(error) = error else { panic!("{error}") };
/// let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
/// assert!(matches!(cause, Some(AccessError::Fault(fault)) if fault.gva == Gva(0x2000)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct GuestVirtualMemory {
    view: GuestView,
    /// Keeps the memory that slices point into.
    map: Arc<MemoryMap>,
}

impl GuestAddressSpace for GuestView {
    type M = GuestVirtualMemory;
    type T = Arc<GuestVirtualMemory>;

    fn memory(&self) -> Self::T {
        let map = self.engine.memory.snapshot();
        Arc::new(GuestVirtualMemory { view: self.clone(), map })
    }
}

impl GuestVirtualMemory {
    /// The access that permissions stand for; `None` for a look at the translation alone.
    fn access(&self, permissions: Permissions) -> Option<Access> {
        match permissions {
            Permissions::No => None,
            Permissions::Read => Some(self.view.who),
            // SDM vol. 3, 5.6: who may write may read.
            Permissions::Write | Permissions::ReadWrite => Some(self.view.writing()),
        }
    }

    /// Memory for the part of an access in one page.
    fn slice(
        &self,
        gva: Gva,
        len: usize,
        access: Access,
    ) -> Result<VolatileSlice<'_, Written<'_>>, AccessError> {
        let store = access.kind == Kind::Write;
        let (page, offset) = self.view.in_space(|space| {
            let parts = space.plan(gva, len, access, store, None)?.all_in_memory()?;
            // The same page in the snapshot. A part in memory has bytes, and parts are one here.
            let kept = parts.memory().find_map(|(page, offset, _)| {
                let kept = self.map.by_machine(page.machine())?;
                core::ptr::eq(kept.region(), page.region()).then_some((kept, offset as usize))
            });
            let gpa = parts.iter().next().map_or_else(Default::default, |part| part.gpa);
            kept.ok_or(AccessError::Mmio { gpa, len })
        })?;
        let at = (page.index << PAGE_SHIFT) + offset;
        let written = Written { engine: &self.view.engine, region: page.region(), at };
        // SAFETY: the bytes are within the page's words, which are atomics, so that they may be
        // written through a shared reference, and nobody takes them for plain memory; the map that
        // is borrowed with `self` keeps them.
        Ok(unsafe {
            let first = page.words().as_ptr().cast::<u8>().cast_mut().add(offset);
            VolatileSlice::with_bitmap(first, len, written, None)
        })
    }
}

impl GuestMemory for GuestVirtualMemory {
    type PhysicalMemory = NoBackend;
    type Bitmap = NoBackend;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let access = self.access(access);
        split(Gva(addr.0), count).all(|(gva, _)| self.view.allows(gva, access))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, NoBackend>>, GuestMemoryError> {
        let access = self.access(access).unwrap_or(self.view.who);
        Ok(Slices { memory: self, parts: split(Gva(addr.0), count), access, failed: false })
    }
}

impl fmt::Debug for GuestVirtualMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestVirtualMemory").field("view", &self.view).finish_non_exhaustive()
    }
}

/// The pages of a range.
struct Slices<'a, I> {
    memory: &'a GuestVirtualMemory,
    parts: I,
    access: Access,
    failed: bool,
}

impl<'a, I: Iterator<Item = (Gva, Range<usize>)>> Iterator for Slices<'a, I> {
    type Item = Result<VolatileSlice<'a, Written<'a>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let (gva, bytes) = self.parts.next()?;
        let slice = self.memory.slice(gva, bytes.len(), self.access);
        self.failed = slice.is_err();
        Some(slice.map_err(|error| GuestMemoryError::IOError(std::io::Error::other(error))))
    }
}

// `split` ends for good when no bytes are left.
impl<I: Iterator<Item = (Gva, Range<usize>)>> FusedIterator for Slices<'_, I> {}

impl<'a, I: Iterator<Item = (Gva, Range<usize>)>> GuestMemorySliceIterator<'a, Written<'a>>
    for Slices<'a, I>
{
}

/// Tells the dirty log and the shadow of writes through a slice; what vm-memory has for a bitmap.
#[derive(Clone, Copy)]
pub struct Written<'a> {
    engine: &'a Engine,
    region: &'a Region,
    /// Of the slice's first byte in the region.
    at: usize,
}

impl fmt::Debug for Written<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Written").field("at", &self.at).finish_non_exhaustive()
    }
}

impl WithBitmapSlice<'_> for Written<'_> {
    type S = Self;
}

impl BitmapSlice for Written<'_> {}

impl Bitmap for Written<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let from = self.at.saturating_add(offset);
        let Some(last) = len.checked_sub(1).map(|n| from.saturating_add(n)) else { return };
        let pages = from >> PAGE_SHIFT..(last >> PAGE_SHIFT) + 1;
        // R2: the fence of this comes after the write and before the look for shadows.
        self.region.dirty.mark_unpinned(pages.clone());
        for index in pages.filter(|index| self.region.is_shadowed(*index)) {
            let start = index << PAGE_SHIFT;
            let end = (last + 1 - start).min(PAGE_SIZE as usize);
            let bytes = from.saturating_sub(start) as u64..end as u64;
            let handle = self.engine.handles.get();
            let (stats, guard) = (&self.engine.stats, handle.pin());
            let map = self.engine.memory.load(&guard);
            self.engine.page_wrote(stats, &guard, map, self.region, index, bytes);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.region.dirty.is_dirty(self.at.saturating_add(offset) >> PAGE_SHIFT)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { at: self.at.saturating_add(offset), ..*self }
    }
}

/// There is no physical-memory object behind a [`GuestVirtualMemory`], and no bitmap beyond those of
/// its slices: no value of this type exists.
#[derive(Debug)]
pub enum NoBackend {}

impl<'a> WithBitmapSlice<'a> for NoBackend {
    type S = Written<'a>;
}

impl Bitmap for NoBackend {
    fn mark_dirty(&self, _offset: usize, _len: usize) {
        match *self {}
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        match *self {}
    }

    fn slice_at(&self, _offset: usize) -> Written<'_> {
        match *self {}
    }
}

impl GuestMemoryRegion for NoBackend {
    type B = ();

    fn len(&self) -> GuestUsize {
        match *self {}
    }

    fn start_addr(&self) -> GuestAddress {
        match *self {}
    }

    fn bitmap(&self) {
        match *self {}
    }
}

impl GuestMemoryRegionBytes for NoBackend {}

impl GuestMemoryBackend for NoBackend {
    type R = Self;

    fn iter(&self) -> impl Iterator<Item = &Self> {
        core::iter::empty()
    }
}
