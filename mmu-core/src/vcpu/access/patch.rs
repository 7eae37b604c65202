// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Patches of guest code, such as a hypercall instruction of another maker's processor.
//!
//! A vCPU that runs the code meanwhile must execute the old instruction or the new one. So first
//! the pages are taken away from every processor, as for a host invalidation ([`Engine::invalidate`]);
//! when all vCPUs have come out, or have drained, none is in the middle of fetching from them
//! (R38), and each comes back through an exit and an entry, which serialise (SDM vol. 3, 9.1.3). Then
//! the words are exchanged, two at most, and the pages given back. What fetches without mapping
//! the page, the emulator, reads again if it meets that (R39).

use super::error::AccessError;
use super::space::split;
use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::memory::words::{self, exchange_masked};
use crate::memory::{DirtyRing, MemoryMap, Page};
use crate::paging::Access;
use crate::shadow::{Engine, PageRange, RangeError, Stats};
use crate::sync::{AtomicU64, WouldDeadlock, rule};
use crate::vcpu::Vcpu;
use core::ops::Range;
use std::sync::Arc;

/// Most bytes of a patch.
const MAX_PATCH: usize = 8;

/// Why code was not patched; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// The guest's tables forbid the fetch, or part of the code is in no memory that may be written.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A patch is 1 to 8 bytes, as many as it replaces.
    #[error("{new} bytes in the place of {old} are no patch: 1 to 8, as many as there are")]
    BadLength {
        /// Bytes to be replaced.
        old: usize,
        /// Bytes given for them.
        new: usize,
    },
    /// The calling thread must not wait.
    #[error(transparent)]
    WouldDeadlock(#[from] WouldDeadlock),
}

impl Vcpu {
    /// Replaces an instruction of the guest's, `old`, by `new`, if it is still there; whether it was.
    /// No vCPU executes a mixture of both (KVM's `kvm_fix_hypercall`, which does not look what is
    /// there). `access` is the fetch ([`Access::execute`]); the guest's right to write is not needed.
    ///
    /// ```
    /// # use mmu_core::{Config, Mmu, addr::{Gpa, Gva}, memory::{AllocatedMemory, SlotConfig}};
    /// # use mmu_core::paging::{Access, Regs};
    /// # use std::sync::Arc;
    /// # let mmu = Mmu::new(Config::new(Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(AllocatedMemory::new(1 << 20))))?;
    /// # for (entry, value) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5005)] {
    /// #     mmu.write_phys(Gpa(entry), &u64::to_le_bytes(value));
    /// # }
    /// # mmu.write_phys(Gpa(0x5006), &[0x0f, 0x01, 0xc1]);
    /// # let mut cpu = mmu.create_soft_vcpu(Regs::long_mode(0x1000))?;
    /// const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    /// const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    /// let rip = Gva(0x1006);
    /// let fetch = Access::execute().user();
    /// assert!(cpu.vcpu_mut().patch_code(rip, &VMCALL, &VMMCALL, fetch)?);
    /// let mut bytes = [0; 3];
    /// cpu.session().fetch(rip, &mut bytes, true)?;
    /// assert_eq!(bytes, VMMCALL);
    /// // Somebody else was first.
    /// assert!(!cpu.vcpu_mut().patch_code(rip, &VMCALL, &VMMCALL, fetch)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Waits for changes of the memory map under way, and for vCPUs inside the guest; faults on
    /// these pages stall meanwhile. The vCPU must be outside. The patch is in the dirty log, and
    /// the shadow is told. What others store to the same bytes past the engine, at the same time, may
    /// be mixed with a patch that crosses an 8-byte word.
    ///
    /// # Errors
    ///
    /// [`PatchError`], which names the values; nothing has changed then.
    pub fn patch_code(
        &mut self,
        gva: Gva,
        old: &[u8],
        new: &[u8],
        access: Access,
    ) -> Result<bool, PatchError> {
        self.leave();
        check(old, new)?;
        let places = self.in_space(|space| {
            let parts = space.plan(gva, new.len(), access, false, None)?;
            let places = parts.iter().map(|part| (part.gpa, part.bytes.clone()));
            Ok::<Vec<_>, AccessError>(places.collect())
        })?;
        self.engine.patch(&self.state.stats, self.context.hint.ring(), &places, old, new)
    }
}

/// A patch in one word.
struct Word<'a> {
    cell: &'a AtomicU64,
    old: u64,
    new: u64,
    mask: u64,
}

impl Engine {
    /// The same at a guest-physical address.
    pub(crate) fn patch_phys(
        self: &Arc<Self>,
        gpa: Gpa,
        old: &[u8],
        new: &[u8],
    ) -> Result<bool, PatchError> {
        check(old, new)?;
        let places = split(Gva(gpa.0), new.len()).map(|(at, bytes)| (Gpa(at.0), bytes));
        self.patch(&self.stats, None, &places.collect::<Vec<_>>(), old, new)
    }

    fn patch(
        self: &Arc<Self>,
        stats: &Stats,
        ring: Option<&DirtyRing>,
        places: &[(Gpa, Range<usize>)],
        old: &[u8],
        new: &[u8],
    ) -> Result<bool, PatchError> {
        // What cannot be patched is refused without waiting.
        {
            let handle = self.handles.get();
            pages(self.memory.load(&handle.pin()), places)?;
        }
        let ranges = places
            .iter()
            .map(|(gpa, _)| PageRange::Guest { base: gpa.page(), size: PAGE_SIZE })
            .collect::<Vec<_>>();
        // R38: nobody fetches from the pages until the end of this. The map does not change either
        // (R26), but it may have changed since the look above.
        let _away = match rule!(R38).then(|| self.invalidate(&ranges)) {
            Some(Err(RangeError::WouldDeadlock(why))) => return Err(why.into()),
            // Of whole pages that are in memory.
            Some(Err(RangeError::BadRange { base, size })) => {
                return Err(AccessError::Mmio { gpa: Gpa(base), len: size as usize }.into());
            }
            away => away,
        };
        let handle = self.handles.get();
        let guard = handle.pin();
        let map = self.memory.load(&guard);
        let pages = pages(map, places)?;
        let mut words = Vec::new();
        for (page, (gpa, bytes)) in pages.iter().zip(places) {
            let before = words::parts(gpa.page_offset(), &old[bytes.clone()]);
            let after = words::parts(gpa.page_offset(), &new[bytes.clone()]);
            for ((index, old, mask), (_, new, _)) in before.zip(after) {
                let none = AccessError::Mmio { gpa: *gpa, len: bytes.len() };
                words.push(Word { cell: page.words().get(index).ok_or(none)?, old, new, mask });
            }
        }
        // R39: as one for the emulator, which may be fetching.
        let done = self.patches.write(|| exchange(&words));
        if done {
            for (page, (gpa, bytes)) in pages.into_iter().zip(places) {
                let from = gpa.page_offset();
                self.wrote(stats, &guard, map, ring, page, from..from + bytes.len() as u64);
            }
        }
        Ok(done)
    }
}

fn check(old: &[u8], new: &[u8]) -> Result<(), PatchError> {
    let (old, new) = (old.len(), new.len());
    let good = old == new && (1..=MAX_PATCH).contains(&new);
    good.then_some(()).ok_or(PatchError::BadLength { old, new })
}

/// The pages to be written.
fn pages<'m>(
    map: &'m MemoryMap,
    places: &[(Gpa, Range<usize>)],
) -> Result<Vec<Page<'m>>, AccessError> {
    let page = |(gpa, bytes): &(Gpa, Range<usize>)| match map.page(gpa.gfn()) {
        Some(page) if page.is_writable() => Ok(page),
        Some(page) if !page.slot.is_read_only() => Err(AccessError::HostReadOnly { gpa: *gpa }),
        _ => Err(AccessError::Mmio { gpa: *gpa, len: bytes.len() }),
    };
    places.iter().map(page).collect()
}

/// Exchanges all words if all are what they are taken for. Stores of others that come in between are
/// not lost: a word that is not what it was stays, and those before it are put back.
fn exchange(words: &[Word<'_>]) -> bool {
    for (i, word) in words.iter().enumerate() {
        if exchange_masked(word.cell, word.old, word.new, word.mask).is_err() {
            for Word { cell, old, new, mask } in &words[..i] {
                let _ = exchange_masked(cell, *new, *old, *mask);
            }
            return false;
        }
    }
    true
}
