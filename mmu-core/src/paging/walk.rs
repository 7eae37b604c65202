// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Translations, and the ways to ask for one.

use super::access::{Access, Rights, Rule};
use super::bits::*;
use super::descend::{LEVEL_AT, Packed, Reached, SHIFT_AT};
use super::fault::Fault;
use super::format::with_layout;
use super::mode::{PagingMode, rights};
use super::tables::{Live, Source, Still, Tables};
use crate::addr::{Gpa, Gva};
use crate::memory::{Hint, MemoryMap};

/// Most levels that a walk reads.
const MAX_LEVELS: usize = 5;

/// A translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Walk {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// Bytes of the page.
    pub page_size: u64,
    /// Level of the leaf: 1 for 4 KiB, 2 for 2 and 4 MiB, 3 for 1 GiB pages; 1 without paging.
    pub level: u8,
    /// The AND over the levels.
    pub rights: Rights,
    /// G of the leaf.
    pub global: bool,
    /// A of the leaf, as the walk left it.
    pub accessed: bool,
    /// D of the leaf, as the walk left it.
    pub dirty: bool,
    /// PAT of the leaf.
    pub pat: bool,
    /// PCD of the leaf.
    pub pcd: bool,
    /// PWT of the leaf.
    pub pwt: bool,
}

/// An entry that a walk passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// Level of the table that the entry is in.
    pub level: u8,
    /// Where the entry is.
    pub entry: Gpa,
    /// The entry, with the accessed and dirty bits that the walk has set.
    pub value: u64,
}

/// The entries that a walk read from memory, root first; after a fault up to and with the one that
/// caused it. PDPTE registers are not memory.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    steps: [Step; MAX_LEVELS],
    len: usize,
}

impl Path {
    /// Nothing passed yet.
    #[must_use]
    pub const fn new() -> Self {
        let none = Step { level: 0, entry: Gpa(0), value: 0 };
        Self { steps: [none; MAX_LEVELS], len: 0 }
    }

    /// The entries.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.len.min(MAX_LEVELS)]
    }

    pub(super) fn steps_mut(&mut self) -> &mut [Step] {
        &mut self.steps[..self.len.min(MAX_LEVELS)]
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    #[inline(always)]
    pub(super) fn push(&mut self, step: Step) {
        if let Some(place) = self.steps.get_mut(self.len) {
            *place = step;
            self.len += 1;
        }
    }
}

impl Default for Path {
    fn default() -> Self {
        Self::new()
    }
}

impl PagingMode {
    /// Translates `gva` for `access` and sets the accessed and dirty bits that the access sets, in
    /// guest memory, if it is permitted (SDM 5.8).
    ///
    /// A bit is set by compare-and-swap of the entry that was read. If the guest has changed the
    /// entry meanwhile, the walk starts again. After a thousand such losses in a row the result
    /// says what was read last: [`Walk::accessed`] and [`Walk::dirty`] are then false where the
    /// bits could not be set. The same holds for tables in read-only memslots, whose bits are left
    /// alone. The pages whose entries were updated become dirty in their slots' logs. A walk that
    /// finds the bits set stores nothing.
    ///
    /// # Errors
    ///
    /// The exception that the access raises.
    ///
    /// # Examples
    ///
    /// ```
    /// use mmu_core::addr::{Gpa, Gva};
    /// use mmu_core::memory::{AllocatedMemory, Backing, Hint, MemoryMap, SlotConfig};
    /// use mmu_core::paging::{Access, PagingMode, Reason, Regs};
    /// use mmu_core::sync::Ordering;
    /// use std::sync::Arc;
    ///
    /// let memory = Arc::new(AllocatedMemory::new(0x10000));
    /// let entry = |gpa: usize, value| memory.words()[gpa / 8].store(value, Ordering::Relaxed);
    /// entry(0x1000, 0x2007); // PML4
    /// entry(0x2000, 0x3007); // page directory pointers
    /// entry(0x3000, 0x4007); // page directory
    /// entry(0x4028, 0x9001); // page table: 0x5000 -> 0x9000, supervisor, read-only
    /// let map = MemoryMap::build([SlotConfig::new(0, Gpa(0), memory.clone())])?;
    ///
    /// let mode = PagingMode::new(&Regs::long_mode(0x1000))?;
    /// let hint = Hint::default();
    /// let walk = mode.walk(&map, &hint, Gva(0x5678), Access::read())?;
    /// assert_eq!(walk.gpa, Gpa(0x9678));
    /// assert_eq!(memory.words()[0x4028 / 8].load(Ordering::Relaxed), 0x9021); // accessed
    ///
    /// let fault = mode.walk(&map, &hint, Gva(0x5678), Access::write().user()).unwrap_err();
    /// assert_eq!((fault.error_code, fault.reason), (7, Reason::User));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn walk(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: Gva,
        access: Access,
    ) -> Result<Walk, Fault> {
        let packed = (self.reach)(self, map, hint, gva.0, self.rule(access));
        if packed.info != 0 {
            return Ok(packed.into());
        }
        self.walk_slowly(map, hint, gva, access)
    }

    /// Like [`walk`](Self::walk), and records in `path` each entry that the walk read.
    ///
    /// # Errors
    ///
    /// The exception that the access raises.
    #[inline]
    pub fn walk_path(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: Gva,
        access: Access,
        path: &mut Path,
    ) -> Result<Walk, Fault> {
        path.clear();
        with_layout!(self.format, L => {
            let linear = self.linear::<L>(gva, access)?;
            Ok(self.walk_tracking::<L>(map, hint, linear, access, path)?.into())
        }, none => Ok(Packed::unpaged(gva.0).into()))
    }

    /// Translates `gva` and touches nothing: for debuggers, introspection and
    /// `KVM_TRANSLATE`. With an access its rights are checked, with `None` only that there is a
    /// translation (a pointer's tag is stripped as for data).
    ///
    /// # Errors
    ///
    /// The exception that the access, or without one a supervisor read, would raise.
    ///
    /// # Examples
    ///
    /// ```
    /// # use mmu_core::addr::{Gpa, Gva};
    /// # use mmu_core::memory::{AllocatedMemory, Backing, Hint, MemoryMap, SlotConfig};
    /// # use mmu_core::paging::{Access, PagingMode, Reason, Regs};
    /// # use mmu_core::sync::Ordering;
    /// # use std::sync::Arc;
    /// let memory = Arc::new(AllocatedMemory::new(0x10000));
    /// let entry = |gpa: usize, value| memory.words()[gpa / 8].store(value, Ordering::Relaxed);
    /// entry(0x1000, 0x2003);
    /// entry(0x2000, 0x4000_0081); // a 1 GiB page, read-only
    /// let map = MemoryMap::build([SlotConfig::new(0, Gpa(0), memory.clone())])?;
    ///
    /// let mode = PagingMode::new(&Regs::long_mode(0x1000))?;
    /// let walk = mode.translate(&map, &Hint::default(), Gva(0x1234_5678), None)?;
    /// assert_eq!((walk.gpa, walk.page_size), (Gpa(0x5234_5678), 1 << 30));
    /// assert!(!walk.rights.write && !walk.rights.user && walk.rights.execute);
    /// assert!(!walk.accessed);
    ///
    /// let write = mode.translate(&map, &Hint::default(), Gva(0), Some(Access::write()));
    /// assert_eq!(write.unwrap_err().reason, Reason::Write);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn translate(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: Gva,
        access: Option<Access>,
    ) -> Result<Walk, Fault> {
        let rule = access.map_or(Rule::NONE, |access| self.rule(access).untracked());
        let packed = (self.reach)(self, map, hint, gva.0, &rule);
        if packed.info != 0 {
            return Ok(packed.into());
        }
        self.translate_slowly(map, hint, gva, access)
    }

    /// As [`translate`](Self::translate), in memory that is no guest's. The PDPTEs of PAE paging
    /// are read where CR3 says, one at a time and whether or not the others could be loaded.
    ///
    /// # Errors
    ///
    /// As [`translate`](Self::translate); [`Reason::TableOutside`](super::Reason::TableOutside)
    /// where an entry is not in `tables`.
    ///
    /// # Examples
    ///
    /// ```
    /// use mmu_core::addr::{Gpa, Gva};
    /// use mmu_core::paging::{PagingMode, Reason, Regs, Tables};
    ///
    /// /// Entries from address 0 on.
    /// struct Words([u64; 1024]);
    ///
    /// impl Tables for Words {
    ///     fn entry(&self, gpa: Gpa, size: u64) -> Option<u64> {
    ///         (size == 8).then(|| self.0.get((gpa.0 / 8) as usize).copied())?
    ///     }
    /// }
    ///
    /// let mut words = Words([0; 1024]);
    /// words.0[0] = 0x1003;
    /// words.0[512] = 0x4000_0083; // a 1 GiB page
    /// words.0[513] = 0x2003; // beyond the end
    /// let mode = PagingMode::new(&Regs::long_mode(0))?;
    /// assert_eq!(mode.translate_in(&words, Gva(0x1234), None)?.gpa, Gpa(0x4000_1234));
    /// let fault = mode.translate_in(&words, Gva(0x4000_0000), None).unwrap_err();
    /// assert_eq!((fault.reason, fault.level), (Reason::TableOutside, 3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn translate_in<T: Tables>(
        &self,
        tables: &T,
        gva: Gva,
        access: Option<Access>,
    ) -> Result<Walk, Fault> {
        self.translate_from(Still(tables), gva, access)
    }

    /// Outside [`walk`](Self::walk) so that its path takes no stack there.
    #[cold]
    #[inline(never)]
    fn walk_slowly(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: Gva,
        access: Access,
    ) -> Result<Walk, Fault> {
        self.walk_path(map, hint, gva, access, &mut Path::new())
    }

    #[cold]
    #[inline(never)]
    fn translate_slowly(
        &self,
        map: &MemoryMap,
        hint: &Hint,
        gva: Gva,
        access: Option<Access>,
    ) -> Result<Walk, Fault> {
        self.translate_from(Live { map, hint }, gva, access)
    }

    #[inline]
    fn translate_from<S: Source>(
        &self,
        source: S,
        gva: Gva,
        access: Option<Access>,
    ) -> Result<Walk, Fault> {
        let as_if = access.unwrap_or(Access::read());
        with_layout!(self.format, L => {
            let gva = self.linear::<L>(gva, as_if)?;
            let reached = self.descend::<L, _, _>(source, gva, &mut ());
            let reached = reached.map_err(|m| self.missing(gva, as_if, m.level, m.reason))?;
            let Reached { leaf, sum, level } = reached;
            let fault = access.and_then(|a| self.refusal(gva, a, level, sum, leaf));
            fault.map_or(Ok(Packed::new::<L>(gva, &reached).into()), Err)
        }, none => Ok(Packed::unpaged(gva.0).into()))
    }
}

impl From<Packed> for Walk {
    #[inline(always)]
    fn from(packed: Packed) -> Self {
        let Packed { gpa, info } = packed;
        let level = (info >> LEVEL_AT) as u8 & 7;
        Self {
            gpa: Gpa(gpa),
            page_size: 1 << (info >> SHIFT_AT & 63),
            level,
            rights: rights(info, info),
            global: info & G != 0,
            accessed: info & A != 0,
            dirty: info & D != 0,
            pat: info & if level == 1 { PAT } else { PAT_LARGE } != 0,
            pcd: info & PCD != 0,
            pwt: info & PWT != 0,
        }
    }
}
