// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest-virtual memory for who is no vCPU.

use super::error::AccessError;
use super::space::Space;
use crate::addr::Gva;
use crate::memory::Hint;
use crate::paging::{Access, BadRegisters, Fault, Kind, PagingMode, Regs, Walk};
use crate::shadow::Engine;
use crate::vcpu::Vcpu;
use core::fmt;
use std::sync::Arc;

/// The memory of an address space as somebody in it sees it: through the tables and rules of a set of
/// registers, at a privilege. For debuggers, loaders, paravirtual devices; any thread may use it,
/// clones included.
///
/// Each access is one by the memory map and the guest's tables of that moment, checked like the
/// processor's, with accessed and dirty bits. Writes are in the dirty log and told to the shadow.
/// The registers are those of when the view was made: a guest that loads CR3 is elsewhere then.
///
/// With the feature `vm-memory` it is a `vm_memory::GuestAddressSpace`: its `memory` gives a
/// `vm_memory::GuestMemory` whose addresses are the guest's virtual ones.
///
/// ```
/// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig}};
/// # use mmu_core::paging::{Access, Regs};
/// # use mmu_core::vcpu::AccessError;
/// # use std::sync::Arc;
/// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
/// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
/// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5005)] {
/// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
/// # }
/// // What a user program with these tables may do: read the page at 0x1000, not write it.
/// let view = mmu.view(&Regs::long_mode(0x1000), Access::read().user())?;
/// let mut bytes = [0; 4];
/// view.read(Gva(0x1ff0), &mut bytes)?;
/// let Err(AccessError::Fault(fault)) = view.write(Gva(0x1ff0), b"text") else {
///     panic!("the page is read-only");
/// };
/// assert_eq!(fault.error_code, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct GuestView {
    pub(super) engine: Arc<Engine>,
    mode: PagingMode,
    /// Who accesses, and what a read is.
    pub(super) who: Access,
}

impl GuestView {
    pub(crate) fn new(engine: Arc<Engine>, regs: &Regs, who: Access) -> Result<Self, BadRegisters> {
        Ok(Self { engine, mode: PagingMode::new(regs)?, who })
    }

    /// Runs `body` in a read section.
    pub(super) fn in_space<R>(&self, body: impl FnOnce(&Space<'_>) -> R) -> R {
        let handle = self.engine.handles.get();
        let guard = handle.pin();
        body(&Space {
            engine: &self.engine,
            stats: &self.engine.stats,
            guard: &guard,
            map: self.engine.memory.load(&guard),
            mode: &self.mode,
            // For this access alone: a hint has one user, a view may have many.
            hint: &Hint::default(),
        })
    }

    /// Whether an access could be made, without making it; with `None`, whether there is memory.
    #[cfg(all(feature = "vm-memory", not(loom)))]
    pub(super) fn allows(&self, gva: Gva, access: Option<Access>) -> bool {
        self.in_space(|space| {
            let walk = self.mode.translate(space.map, space.hint, gva, access);
            let page = walk.ok().and_then(|walk| space.map.page(walk.gpa.gfn()));
            let write = access.is_some_and(|access| access.kind == Kind::Write);
            page.is_some_and(|page| !write || page.is_writable())
        })
    }

    /// The access that a write is.
    pub(super) fn writing(&self) -> Access {
        Access { kind: Kind::Write, ..self.who }
    }

    /// Reads, as [`Vcpu::read`] does. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; `buf` is as it was then.
    pub fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), AccessError> {
        self.in_space(|space| {
            let parts = space.plan(gva, buf.len(), self.who, false, None)?.all_in_memory()?;
            space.load(&parts, buf, self.who.kind);
            Ok(())
        })
    }

    /// Writes, as [`Vcpu::write`] does. Waits for nobody.
    ///
    /// # Errors
    ///
    /// [`AccessError`]; nothing has been written then.
    pub fn write(&self, gva: Gva, bytes: &[u8]) -> Result<(), AccessError> {
        self.in_space(|space| {
            let access = self.writing();
            let parts = space.plan(gva, bytes.len(), access, true, None)?.all_in_memory()?;
            space.store(&parts, bytes);
            Ok(())
        })
    }

    /// Compares and exchanges, as [`Vcpu::cmpxchg`] does. Waits for nobody.
    ///
    /// # Errors
    ///
    /// As [`Vcpu::cmpxchg`].
    pub fn cmpxchg(
        &self,
        gva: Gva,
        size: usize,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, AccessError> {
        self.in_space(|space| space.cmpxchg(gva, size, (old, new), self.who, None))
    }

    /// Translates an address for this view's reads, without touching accessed bits. Waits for nobody.
    ///
    /// # Errors
    ///
    /// The [`Fault`] that the read would raise.
    pub fn translate(&self, gva: Gva) -> Result<Walk, Fault> {
        self.in_space(|space| self.mode.translate(space.map, space.hint, gva, Some(self.who)))
    }
}

impl fmt::Debug for GuestView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestView").field("who", &self.who).finish_non_exhaustive()
    }
}

impl Vcpu {
    /// The memory that this vCPU sees with its present registers, for any thread. `who` has the
    /// privilege, and says by its kind what a read through the view is: a read, a fetch, or the first
    /// half of a read-modify-write. Writes are always data's. EFLAGS.AC is that of the registers:
    /// [`Mmu::view`](crate::Mmu::view) takes others.
    #[must_use]
    pub fn view(&self, who: Access) -> GuestView {
        GuestView { engine: Arc::clone(&self.engine), mode: self.mode, who }
    }
}
