// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-virtual memory pinned for a while: the buffer of a string instruction for port I/O, whose
//! bytes come or go after an exit to user space.

use super::error::AccessError;
use crate::addr::{Gva, PAGE_SIZE};
use crate::memory::{PinnedAccessError, PinnedPage};
use crate::paging::{Access, Kind};
use crate::shadow::Engine;
use crate::vcpu::Vcpu;
use core::fmt;
use core::ops::Range;
use std::sync::Arc;

/// Most bytes of a [`PinnedRange`]: a guest says how many it wants, and a VMM does them by portions, as
/// KVM does.
pub const MAX_PINNED: usize = PAGE_SIZE as usize;

/// Guest memory that was guest-virtual when it was pinned ([`Vcpu::pin`]), and stays valid until this
/// is dropped, whatever becomes of the guest's tables and of the slots.
pub struct PinnedRange {
    engine: Arc<Engine>,
    pages: Vec<PinnedPage>,
    /// Of the first byte in the first page.
    offset: u64,
    len: u64,
}

impl PinnedRange {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pages, in the order of the guest's addresses.
    #[must_use]
    pub fn pages(&self) -> &[PinnedPage] {
        &self.pages
    }

    /// Reads bytes from `at` bytes into the range on. Each aligned 8-byte word is read as one. Waits
    /// for nobody.
    ///
    /// # Errors
    ///
    /// [`PinnedAccessError::OutOfRange`].
    pub fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), PinnedAccessError> {
        self.check(at, buf.len())?;
        self.parts(at, buf.len())
            .try_for_each(|(page, offset, bytes)| page.read(offset, &mut buf[bytes]))
    }

    /// Writes bytes from `at` bytes into the range on, and tells the shadow; the dirty log has the
    /// pages until they are released. Each part of an aligned 8-byte word is written as one. Waits
    /// for nobody.
    ///
    /// # Errors
    ///
    /// [`PinnedAccessError`], which names the offset.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), PinnedAccessError> {
        self.check(at, bytes.len())?;
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        let map = self.engine.memory.load(&guard);
        self.parts(at, bytes.len()).try_for_each(|(page, offset, part)| {
            let end = offset + part.len() as u64;
            page.write(offset, &bytes[part])?;
            let (region, index) = page.page();
            self.engine.page_wrote(&self.engine.stats, &guard, map, region, index, offset..end);
            Ok(())
        })
    }

    fn check(&self, at: u64, len: usize) -> Result<(), PinnedAccessError> {
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= self.len);
        inside.then_some(()).ok_or(PinnedAccessError::OutOfRange { at, len, size: self.len })
    }

    /// The pages of an access, with the offset in each, and the bytes of the access.
    fn parts(&self, at: u64, len: usize) -> impl Iterator<Item = (&PinnedPage, u64, Range<usize>)> {
        super::space::split(Gva(self.offset + at), len)
            .map(|(at, bytes)| (&self.pages[(at.0 / PAGE_SIZE) as usize], at.page_offset(), bytes))
    }
}

impl fmt::Debug for PinnedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = self.pages.iter().map(PinnedPage::place);
        f.debug_struct("PinnedRange")
            .field("pages", &places.collect::<Vec<_>>())
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish()
    }
}

impl Vcpu {
    /// Pins the pages of `len` bytes, for an access that is made in a while (`gva_to_page` in
    /// KVM's `kvm_emulate_pio_string`): a device's answer to `insb`, or what `outsb` sends. With
    /// [`Access::write`] they can be written. Waits for nobody.
    ///
    /// Accessed and dirty bits are set now, and the rights are those of now, as if the access were
    /// made.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig, SlotId}};
    /// # use mmu_core::paging::{Access, Regs};
    /// # use std::sync::Arc;
    /// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
    /// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    /// # }
    /// # let cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
    /// # let vcpu = cpu.vcpu();
    /// // rep insb, five times, to 0x1234. A fault is the guest's, before the device is asked.
    /// let buffer = vcpu.pin(Gva(0x1234), 5, Access::write().user())?;
    /// // Exit to user space; the device answers.
    /// buffer.write(0, b"hello")?;
    /// drop(buffer);
    /// # let mut bytes = [0; 5];
    /// # mmu.memory().read(Gpa(0x5234), &mut bytes);
    /// # assert_eq!(&bytes, b"hello");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing is pinned then. [`AccessError::TooLong`] for more than
    /// [`MAX_PINNED`] bytes.
    pub fn pin(&self, gva: Gva, len: usize, access: Access) -> Result<PinnedRange, AccessError> {
        if len > MAX_PINNED {
            return Err(AccessError::TooLong { gva, len, max: MAX_PINNED });
        }
        let write = access.kind == Kind::Write;
        let pages = self.in_space(|space| {
            let parts = space.plan(gva, len, access, write, None)?.all_in_memory()?;
            Ok::<_, AccessError>(
                parts.memory().map(|(page, ..)| PinnedPage::new(page, write)).collect(),
            )
        })?;
        let engine = Arc::clone(&self.engine);
        Ok(PinnedRange { engine, pages, offset: gva.page_offset(), len: len as u64 })
    }
}
