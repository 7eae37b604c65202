// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many walks in one read section.

use super::super::Vcpu;
use crate::addr::Gva;
use crate::memory::MemoryMap;
use crate::paging::{Access, Fault, Path, Walk};
use crate::sync::epoch::Guard;

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
        if self.vcpu.mode.entry_size() == 4 {
            return self.walk_narrow(map, gva, access);
        }
        self.vcpu.mode.walk(map, &self.vcpu.context.hint, gva, access)
    }

    /// In tables of 4-byte entries, whose bits the shadow of another format may have taken for an
    /// address ([`Engine::guest_walked`](crate::shadow::Engine::guest_walked)).
    #[cold]
    fn walk_narrow(&self, map: &MemoryMap, gva: Gva, access: Access) -> Result<Walk, Fault> {
        let Vcpu { engine, mode, context, state, .. } = self.vcpu;
        let mut path = Path::default();
        let walk = mode.walk_path(map, &context.hint, gva, access, &mut path)?;
        engine.guest_walked(&state.stats, &self.guard, map, mode, &path);
        Ok(walk)
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
}
