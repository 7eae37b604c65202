// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-virtual accesses as an instruction emulator makes them: through the guest's own tables,
//! not through the shadow.

use super::Vcpu;
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::memory::MemoryMap;
use crate::paging::{Access, Fault, Kind, Path, Walk};
use crate::shadow::{Exchange, withheld};
use crate::sync::epoch::Guard;
use crate::sync::rule;

/// Why an access was not made. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The guest's tables forbid it.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Part of it has no memory, or is a write to read-only memory.
    #[error("no memory at guest-physical {gpa} for {len} bytes")]
    Mmio {
        /// Guest-physical address of the part.
        gpa: Gpa,
        /// Bytes of the part.
        len: usize,
    },
    /// Part of it is a write to a page that the host has made read-only.
    #[error("the host has made the page at guest-physical {gpa} read-only")]
    HostReadOnly {
        /// Guest-physical address of the part.
        gpa: Gpa,
    },
    /// A locked access that cannot be made as one step.
    #[error("a locked access of {size} bytes at {gva} is not within an aligned 8-byte word")]
    Unsupported {
        /// Guest-virtual address.
        gva: Gva,
        /// Bytes.
        size: usize,
    },
}

/// Walks of one vCPU's addresses with one read section kept open between them, so that a walk
/// touches nothing that other threads write.
///
/// While it lives, memory that others retire is kept: end it before anything that waits.
#[derive(Debug)]
pub struct Walker<'v> {
    vcpu: &'v Vcpu,
    guard: Guard<'v>,
}

impl Walker<'_> {
    /// Walks the guest's tables for an access: rights are checked, accessed and dirty bits set.
    ///
    /// # Errors
    ///
    /// The [`Fault`] that the access raises.
    #[inline]
    pub fn walk(&mut self, gva: Gva, access: Access) -> Result<Walk, Fault> {
        self.guard.repin();
        let map = self.vcpu.engine.memory.load(&self.guard);
        self.vcpu.mode.walk(map, &self.vcpu.context.hint, gva, access)
    }

    /// As [`Vcpu::translate`].
    ///
    /// # Errors
    ///
    /// The [`Fault`] that the access would raise.
    #[inline]
    pub fn translate(&mut self, gva: Gva, access: Option<Access>) -> Result<Walk, Fault> {
        self.guard.repin();
        let map = self.vcpu.engine.memory.load(&self.guard);
        self.vcpu.mode.translate(map, &self.vcpu.context.hint, gva, access)
    }
}

impl Vcpu {
    /// Opens a read section for a number of walks.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig}};
    /// # use mmu_core::paging::{Access, Regs};
    /// # use std::sync::Arc;
    /// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
    /// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    /// # }
    /// # let cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
    /// let mut walker = cpu.vcpu().walker();
    /// assert_eq!(walker.walk(Gva(0x1234), Access::read().user())?.gpa, Gpa(0x5234));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn walker(&self) -> Walker<'_> {
        Walker { vcpu: self, guard: self.context.handle.pin() }
    }

    /// Reads guest-virtual memory. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; the fault is that of the first page that has one.
    pub fn read(&self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), AccessError> {
        let guard = self.context.handle.pin();
        let map = self.engine.memory.load(&guard);
        let len = buf.len();
        for (at, part) in parts(gva, len) {
            let gpa = self.locate(&guard, map, at, access)?;
            let bytes = &mut buf[part.clone()];
            // R31: the map that was walked.
            let map = if rule!(R31) { map } else { self.engine.memory.load(&guard) };
            if map.read(gpa, bytes) < bytes.len() {
                return Err(AccessError::Mmio { gpa, len: bytes.len() });
            }
        }
        Ok(())
    }

    /// Writes guest-virtual memory; tells the shadow if it is a guest page table, and the dirty
    /// log. Either every page can be written or nothing is. Waits for nobody.
    ///
    /// An aligned power-of-two size up to 8 bytes is written as one.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; the fault is that of the first page that has one.
    pub fn write(&self, gva: Gva, bytes: &[u8], user: bool) -> Result<(), AccessError> {
        let guard = self.context.handle.pin();
        let map = self.engine.memory.load(&guard);
        let access = Access { user, ..Access::write() };
        let write = |gpa, part: &[u8]| {
            let ring = self.context.hint.ring();
            self.engine.write_phys(&self.state.stats, &guard, map, ring, gpa, part);
        };
        let mut parts = parts(gva, bytes.len());
        let Some((at, first)) = parts.next() else { return Ok(()) };
        let gpa = self.locate_for_write(&guard, map, at, first.len(), access)?;
        // Every page is translated before the first is written. Only an access that crosses a page
        // allocates.
        let rest = parts
            .map(|(at, part)| {
                Ok((self.locate_for_write(&guard, map, at, part.len(), access)?, part))
            })
            .collect::<Result<Vec<_>, AccessError>>()?;
        write(gpa, &bytes[first]);
        rest.into_iter().for_each(|(gpa, part)| write(gpa, &bytes[part]));
        Ok(())
    }

    /// Compares `size` bytes with `old` and exchanges them for `new` if they are equal, as one step
    /// with respect to every vCPU. `Ok(Err(now))` if they were something else. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; [`AccessError::Unsupported`] unless the size is 1, 2, 4 or 8 and the bytes
    /// lie within an aligned 8-byte word.
    pub fn cmpxchg(
        &self,
        gva: Gva,
        size: usize,
        old: u64,
        new: u64,
        user: bool,
    ) -> Result<Result<(), u64>, AccessError> {
        let exchange =
            Exchange::new(gva.0, size, old, new).ok_or(AccessError::Unsupported { gva, size })?;
        let guard = self.context.handle.pin();
        let map = self.engine.memory.load(&guard);
        let access = Access { user, ..Access::write() };
        let gpa = self.locate_for_write(&guard, map, gva, size, access)?;
        self.engine
            .cmpxchg_phys(&self.state.stats, &guard, map, self.context.hint.ring(), gpa, exchange)
            .ok_or(AccessError::Mmio { gpa, len: size })
    }

    fn locate(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        gva: Gva,
        access: Access,
    ) -> Result<Gpa, AccessError> {
        let mut path = Path::default();
        let walk = self.mode.walk_path(map, &self.context.hint, gva, access, &mut path)?;
        self.engine.guest_walked(&self.state.stats, guard, map, &self.mode, &path);
        match withheld(map, &path, access.kind == Kind::Write) {
            Some(gpa) => Err(AccessError::HostReadOnly { gpa }),
            None => Ok(walk.gpa),
        }
    }

    fn locate_for_write(
        &self,
        guard: &Guard<'_>,
        map: &MemoryMap,
        gva: Gva,
        len: usize,
        access: Access,
    ) -> Result<Gpa, AccessError> {
        debug_assert!(access.kind == Kind::Write);
        let gpa = self.locate(guard, map, gva, access)?;
        match map.page(gpa.gfn()) {
            Some(page) if page.is_writable() => Ok(gpa),
            Some(page) if !page.slot.is_read_only() => Err(AccessError::HostReadOnly { gpa }),
            _ => Err(AccessError::Mmio { gpa, len }),
        }
    }
}

/// Splits an access by pages: the address of each part and its place in the buffer.
fn parts(gva: Gva, len: usize) -> impl Iterator<Item = (Gva, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = gva.wrapping_add(done as u64);
        let part = ((PAGE_SIZE - at.page_offset()) as usize).min(len - done);
        done += part;
        (part > 0).then(|| (at, done - part..done))
    })
}
