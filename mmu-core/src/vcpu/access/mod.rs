// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-virtual accesses as an instruction emulator makes them: through the guest's own tables,
//! not through the shadow.
//!
//! The rules that all of them share are in the documentation of [`crate::vcpu`].

mod error;
mod patch;
mod pinned;
mod space;
mod view;
#[cfg(all(feature = "vm-memory", not(loom)))]
mod vm_memory;
mod walker;

pub use error::{AccessError, Fragment};
pub use patch::PatchError;
pub use pinned::{MAX_PINNED, PinnedRange};
pub use view::GuestView;
#[cfg(all(feature = "vm-memory", not(loom)))]
pub use vm_memory::{GuestVirtualMemory, NoBackend, Written};
pub use walker::Walker;

use super::Vcpu;
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::paging::{Access, Kind};
use crate::sync::WouldDeadlock;
use space::Space;
pub(super) use space::split;

impl Vcpu {
    /// Runs `body` in a read section.
    fn in_space<R>(&self, body: impl FnOnce(&Space<'_>) -> R) -> R {
        let guard = self.context.handle.pin();
        body(&Space {
            engine: &self.engine,
            stats: &self.state.stats,
            guard: &guard,
            map: self.engine.memory.load(&guard),
            mode: &self.mode,
            hint: &self.context.hint,
        })
    }

    /// Reads guest-virtual memory (KVM's `emulator_read_std`): what is surely memory, such as
    /// descriptor tables, or instructions with [`Access::execute`]. Each aligned 8-byte word is read as
    /// one. Waits for nobody.
    ///
    /// Instruction bytes are all from before a [patch](Vcpu::patch_code) of them, or from after it.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; `buf` is as it was then.
    pub fn read(&self, gva: Gva, buf: &mut [u8], access: Access) -> Result<(), AccessError> {
        self.in_space(|space| {
            let parts = space.plan(gva, buf.len(), access, false, None)?.all_in_memory()?;
            space.load(&parts, buf, access.kind);
            Ok(())
        })
    }

    /// Fetches instruction bytes up to the end of the page (KVM's `kvm_fetch_guest_virt`); returns how
    /// many. A decoder that needs more fetches again at the following address, and gets that page's
    /// own fault: no instruction faults in a page that it does not reach into. Waits for nobody.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig}};
    /// # use mmu_core::paging::{Access, Regs};
    /// # use mmu_core::vcpu::AccessError;
    /// # use std::sync::Arc;
    /// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
    /// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    /// # }
    /// # let cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
    /// // The guest has one page of code, at 0x1000.
    /// let user = Access::execute().user();
    /// let mut bytes = [0; 15];
    /// assert_eq!(cpu.vcpu().fetch(Gva(0x1ffd), &mut bytes, user), Ok(3));
    /// let Err(AccessError::Fault(fault)) = cpu.vcpu().fetch(Gva(0x2000), &mut bytes, user) else {
    ///     panic!("the next page is not there");
    /// };
    /// assert_eq!(fault.gva, Gva(0x2000));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AccessError`]; `buf` is as it was then.
    pub fn fetch(&self, gva: Gva, buf: &mut [u8], access: Access) -> Result<usize, AccessError> {
        let len = buf.len().min((PAGE_SIZE - gva.page_offset()) as usize);
        self.read(gva, &mut buf[..len], Access { kind: Kind::Execute, ..access })?;
        Ok(len)
    }

    /// Writes guest-virtual memory (KVM's `emulator_write_std`): what is surely memory, such as a
    /// busy bit in a descriptor. `access` says who writes. Each part of an aligned 8-byte word is
    /// written as one. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing has been written then.
    pub fn write(&self, gva: Gva, bytes: &[u8], access: Access) -> Result<(), AccessError> {
        let access = Access { kind: Kind::Write, ..access };
        self.in_space(|space| {
            let parts = space.plan(gva, bytes.len(), access, true, None)?.all_in_memory()?;
            space.store(&parts, bytes);
            Ok(())
        })
    }

    /// Reads an operand (KVM's `emulator_read_emulated`): the parts in memory are in `buf` when this
    /// returns, the others are the VMM's to read from devices, in the order given. The first half of
    /// a read-modify-write needs the right to write ([`Access::write`]). Each aligned 8-byte word is
    /// read as one. Waits for nobody.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig}};
    /// # use mmu_core::paging::{Access, Regs};
    /// # use std::sync::Arc;
    /// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007),
    /// #     (0x4010, 0xd000_0007)] {
    /// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    /// # }
    /// # mmu.write_phys(Gpa(0x5ffc), b"RAM!");
    /// # struct Ones;
    /// # impl mmu_core::mmio::Device for Ones {
    /// #     fn read(&self, _base: u64, _offset: u64, buf: &mut [u8]) { buf.fill(b'1') }
    /// #     fn write(&self, _base: u64, _offset: u64, _bytes: &[u8]) {}
    /// # }
    /// # mmu.bus().register(0xd000_0000, 0x10, Arc::new(Ones))?;
    /// # let cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
    /// # let vcpu = cpu.vcpu();
    /// # let mut devices = mmu.bus().initiator();
    /// // 0x1000 is mapped to memory, 0x2000 to a device whose registers read as ones.
    /// let mut operand = [0; 8];
    /// for part in vcpu.read_emulated(Gva(0x1ffc), &mut operand, Access::read().user())? {
    ///     assert_eq!((part.gpa, part.bytes.clone()), (Gpa(0xd000_0000), 4..8));
    ///     assert!(devices.read(part.gpa.0, &mut operand[part.bytes]));
    /// }
    /// assert_eq!(&operand, b"RAM!1111");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AccessError`]; `buf` is as it was then.
    #[must_use = "the fragments are still to be read"]
    pub fn read_emulated(
        &self,
        gva: Gva,
        buf: &mut [u8],
        access: Access,
    ) -> Result<Vec<Fragment>, AccessError> {
        self.in_space(|space| {
            let parts = space.plan(gva, buf.len(), access, false, self.apic)?;
            space.load(&parts, buf, access.kind);
            Ok(parts.fragments())
        })
    }

    /// Writes an operand (KVM's `emulator_write_emulated`): the parts in memory are written when this
    /// returns, the others are the VMM's to write to devices, in the order given. A write to a
    /// read-only slot is a device's. `access` says who writes. Each part of an aligned 8-byte word is
    /// written as one. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing has been written then.
    #[must_use = "the fragments are still to be written"]
    pub fn write_emulated(
        &self,
        gva: Gva,
        bytes: &[u8],
        access: Access,
    ) -> Result<Vec<Fragment>, AccessError> {
        let access = Access { kind: Kind::Write, ..access };
        self.in_space(|space| {
            let parts = space.plan(gva, bytes.len(), access, true, self.apic)?;
            space.store(&parts, bytes);
            Ok(parts.fragments())
        })
    }

    /// Compares `size` bytes with `old` and exchanges them for `new` if they are equal, as one step
    /// with respect to every vCPU, hardware ones included (KVM's `emulator_cmpxchg_emulated`).
    /// `Ok(Err(now))` if they were something else. `access` says who does it; the right to write is
    /// needed in either case (SDM vol. 2, CMPXCHG). Waits for nobody.
    ///
    /// What lies within an aligned 8-byte word works everywhere; across two words of a 64-byte cache
    /// line, and an aligned 16 bytes (`cmpxchg16b`; others are #GP(0), for the emulator to raise), on
    /// x86-64. A split lock, across a line or a page, is refused: KVM makes a plain write of it, which
    /// can lose what others write.
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
    /// # let vcpu = cpu.vcpu();
    /// let user = Access::write().user();
    /// assert_eq!(vcpu.cmpxchg(Gva(0x1004), 4, 0, 7, user)?, Ok(()));
    /// assert_eq!(vcpu.cmpxchg(Gva(0x1004), 4, 0, 9, user)?, Err(7));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`AccessError`]; [`AccessError::Unsupported`] if it cannot be made as one step. A locked access
    /// to a device is no memory: the VMM may make it of a read and a write.
    pub fn cmpxchg(
        &self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
        access: Access,
    ) -> Result<Result<(), u128>, AccessError> {
        self.in_space(|space| space.cmpxchg(gva, size, (old, new), access, self.apic))
    }

    /// Names the page at which this vCPU's local APIC answers (IA32_APIC_BASE), or takes the name
    /// away. [`Vcpu::read_emulated`] and [`Vcpu::write_emulated`] report an access to it as such,
    /// before they look for memory; [`Vcpu::cmpxchg`] refuses it.
    ///
    /// When this returns the vCPU's own access to the page is an
    /// [`Outcome::Mmio`](crate::shadow::Outcome::Mmio). As vCPUs share the shadow, the page is mapped for
    /// none of them: for one that has its APIC elsewhere the memory there, if any, is an
    /// [`Outcome::Emulate`](crate::shadow::Outcome::Emulate). (KVM goes to emulation in `kvm_faultin_pfn`
    /// unless the processor virtualises the APIC. A processor that does needs the page mapped: its VMM names
    /// no page here.) A vCPU that is gone keeps the page from being mapped until the memory map changes
    /// next.
    ///
    /// Waits for other changes of the memory map and active host invalidations; where a memslot has the
    /// page also for readers and vCPUs inside the guest. The vCPU must be outside.
    ///
    /// # Errors
    ///
    /// [`WouldDeadlock`]; the page is the one of before then.
    pub fn set_apic_page(&mut self, page: Option<Gpa>) -> Result<(), WouldDeadlock> {
        self.leave();
        let page = page.map(Gpa::gfn);
        if page != self.apic {
            self.engine.move_apic(self.apic, page)?;
            self.apic = page;
        }
        Ok(())
    }
}
