// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers compiled into what a walk needs.

use super::access::{Access, Allowed, Kind, Rights, Rule};
use super::bits::*;
use super::descend::Reach;
use super::entry_format::EntryFormat;
use super::fault::{Fault, Reason, code};
use super::format::{Entry, Format, Layout, Masks, with_layout};
use super::regs::{BadRegisters, Regs};
use crate::addr::{Gfn, Gpa, Gva, LEVELS};
use crate::memory::MemoryMap;

/// Paging as the registers of one vCPU define it: everything that is the same for every walk until
/// a register changes. Build a new one then; it is plain data.
#[derive(Clone, Copy, Debug)]
pub struct PagingMode {
    pub(super) format: Format,
    pub(super) entry_format: EntryFormat,
    /// The walk of the format.
    pub(super) reach: Reach,
    /// Shift that brings the highest bit of an address that needs no second look to bit 63.
    quick_shift: u8,
    /// The same for the addresses that are canonical.
    canonical_shift: u8,
    /// The same for pointers with tags, bit 63 clear and set; 0 without tags.
    lam_shift: [u8; 2],
    pub(super) masks: Masks,
    /// First byte of the top table.
    pub(super) root: u64,
    pub(super) pdptrs: [u64; 4],
    /// By [`Access::index`].
    rules: [Rule; 12],
}

const KINDS: [Kind; 3] = [Kind::Read, Kind::Write, Kind::Execute];

impl PagingMode {
    /// The mode that the registers select.
    ///
    /// PDPTE registers are taken as they are: one that is present with a reserved bit set, which
    /// [`load_pdptrs`](super::load_pdptrs) refuses, makes walks through it report
    /// [`Reason::Reserved`] at level 3, as processors do that read PDPTEs while they walk (APM
    /// 15.25, "Legacy PAE Mode").
    ///
    /// # Errors
    ///
    /// Combinations that no processor accepts.
    pub fn new(regs: &Regs) -> Result<Self, BadRegisters> {
        regs.check()?;
        let Regs { cr0, cr3, cr4, efer, .. } = *regs;
        // SDM 5.1.1.
        let format = if cr0 & CR0_PG == 0 {
            Format::None
        } else if efer & EFER_LMA != 0 {
            if cr4 & CR4_LA57 != 0 { Format::FiveLevel } else { Format::FourLevel }
        } else if cr4 & CR4_PAE != 0 {
            Format::Pae
        } else {
            Format::TwoLevel
        };
        let root = match format {
            Format::None => 0,
            // SDM 5.3, table 5-3; 5.4.1, table 5-7 (32-byte aligned); 5.5.2, table 5-12.
            Format::TwoLevel => cr3 & 0xffff_f000,
            Format::Pae => cr3 & 0xffff_ffe0,
            Format::FourLevel | Format::FiveLevel => cr3 & ADDR,
        };
        // SDM vol. 1, 3.3.7.1: 48 or 57 bits.
        let canonical_shift = if format == Format::FiveLevel { 7 } else { 16 };
        // SDM chapter 4, linear-address masking: for user pointers LAM_U57 goes before LAM_U48; a
        // supervisor pointer's tag begins where canonical bits would.
        let lam_user = match (cr3 & CR3_LAM_U57 != 0, cr3 & CR3_LAM_U48 != 0) {
            (true, _) => 7,
            (_, true) => 16,
            _ => 0,
        };
        let lam_supervisor = if cr4 & CR4_LAM_SUP != 0 { canonical_shift } else { 0 };
        let nxe = efer & EFER_NXE != 0;
        let maxphyaddr = u32::from(regs.maxphyaddr);
        Ok(Self {
            format,
            entry_format: EntryFormat::new(format, maxphyaddr, cr4 & CR4_PSE != 0),
            reach: with_layout!(format, L => Self::reach::<L>, none => Self::reach_unpaged),
            quick_shift: canonical_shift.max(lam_user),
            canonical_shift,
            lam_shift: [lam_user, lam_supervisor],
            masks: Masks::new(format, maxphyaddr, nxe, cr4 & CR4_PSE != 0),
            root,
            pdptrs: regs.pdptrs,
            rules: core::array::from_fn(|i| {
                let (user, implicit) = (i & 2 != 0, i & 1 != 0);
                Rule::new(regs, Access { kind: KINDS[i / 4], user, implicit })
            }),
        })
    }

    /// The same on a processor without 1 GiB pages: PS of a PDPTE is reserved (SDM 5.5.4).
    #[must_use]
    pub fn without_1g_pages(self) -> Self {
        Self { masks: self.masks.without_1g(), ..self }
    }

    /// The same on an AMD processor: bit 8 of a PML4E and of a PML5E, which Intel's ignore (SDM
    /// 5.5.4), must be 0 (APM 5.3.3). Bit 8 of a PDPTE or PDE that refers to a table is ignored by
    /// both.
    #[must_use]
    pub fn with_amd_reserved_bits(self) -> Self {
        Self { masks: self.masks.on_amd(), ..self }
    }

    /// Whether linear addresses are translated at all.
    #[must_use]
    pub fn is_paging(&self) -> bool {
        self.format != Format::None
    }

    /// Whether linear addresses have 64 bits.
    #[must_use]
    pub fn is_long(&self) -> bool {
        matches!(self.format, Format::FourLevel | Format::FiveLevel)
    }

    /// Levels of the tables: 0 without paging, 2, 3 with PAE (the registers are the third), 4, 5.
    #[must_use]
    pub fn levels(&self) -> u8 {
        match self.format {
            Format::None => 0,
            Format::TwoLevel => 2,
            Format::Pae => 3,
            Format::FourLevel => LEVELS,
            Format::FiveLevel => LEVELS + 1,
        }
    }

    /// Bytes of an entry.
    #[must_use]
    pub fn entry_size(&self) -> u64 {
        if self.format == Format::TwoLevel { 4 } else { 8 }
    }

    /// Entries of a table of this level.
    #[must_use]
    pub fn entries(&self, level: u8) -> u64 {
        match self.format {
            Format::Pae if level == 3 => 4,
            format => with_layout!(format, L => 1 << L::INDEX_BITS, none => 0),
        }
    }

    /// Index of the entry for `gva` in a table of this level (1 to [`levels`](Self::levels)).
    #[must_use]
    pub fn index(&self, gva: Gva, level: u8) -> u64 {
        match self.format {
            Format::Pae if level == 3 => gva.0 >> 30 & 3,
            format => with_layout!(format, L => L::index(gva.0, level.clamp(1, 5)), none => 0),
        }
    }

    /// Bytes that an entry of this level maps or spans.
    #[must_use]
    pub fn page_size(&self, level: u8) -> u64 {
        with_layout!(self.format, L => L::size(level.clamp(1, 5)), none => crate::addr::PAGE_SIZE)
    }

    /// The frame that holds the top table: the PML5 or PML4, the page directory of 32-bit paging,
    /// the four PDPTEs of PAE (which begin at [`root_address`](Self::root_address)).
    #[must_use]
    pub fn root(&self) -> Gfn {
        Gpa(self.root).gfn()
    }

    /// First byte of the top table.
    #[must_use]
    pub fn root_address(&self) -> Gpa {
        Gpa(self.root)
    }

    /// The PDPTE registers as compiled in.
    #[must_use]
    pub fn pdptrs(&self) -> &[u64; 4] {
        &self.pdptrs
    }

    /// Whether the top table lies in a memslot. An engine refuses a CR3 where it does not.
    #[must_use]
    pub fn root_is_inside(&self, map: &MemoryMap) -> bool {
        !self.is_paging() || map.slot(self.root()).is_some()
    }

    /// What an entry of this level says (1 to [`levels`](Self::levels)).
    #[must_use]
    pub fn decode(&self, entry: u64, level: u8) -> Entry {
        match self.format {
            Format::Pae if level == 3 => self.masks.decode_pdpte(entry),
            Format::TwoLevel => {
                self.masks.decode::<super::format::TwoLevel>(entry & 0xffff_ffff, level)
            }
            format => with_layout!(format, L => self.masks.decode::<L>(entry, level),
                none => Entry::Absent),
        }
    }

    /// Rights that an entry of this level grants by itself. A PDPTE register grants all (SDM
    /// 5.4.1: it has no R/W, U/S or NX).
    #[must_use]
    pub fn entry_rights(&self, entry: u64, level: u8) -> Rights {
        if self.format == Format::Pae && level == 3 || self.format == Format::None {
            return Rights { write: true, user: true, execute: true, key: 0 };
        }
        let entry = if self.format == Format::TwoLevel { entry & 0xffff_ffff } else { entry };
        rights(entry ^ NX, entry)
    }

    /// Whether an address is canonical: 48 bits, or 57 with 5-level paging, sign-extended (SDM
    /// vol. 1, 3.3.7.1). Tags that LAM ignores are not considered. Outside long mode, whether it has
    /// 32 bits.
    #[must_use]
    pub fn is_canonical(&self, gva: Gva) -> bool {
        if self.is_long() {
            extends(gva.0, self.canonical_shift)
        } else {
            gva.0 <= u64::from(u32::MAX)
        }
    }

    /// What these rights permit at this privilege, explicit accesses only: CR0.WP, NX, SMEP, SMAP
    /// with EFLAGS.AC, and the protection keys applied.
    #[must_use]
    pub fn allowed(&self, rights: Rights, user: bool) -> Allowed {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        let sum = bit(rights.write, RW) | bit(rights.user, US) | bit(rights.execute, NX);
        let leaf = u64::from(rights.key & 15) << KEY_SHIFT;
        let allows = |kind| {
            let rule = self.rule(Access { kind, user, implicit: false });
            rule.grants(sum) && !rule.key_denies(sum, leaf)
        };
        if !self.is_paging() {
            return Allowed { read: true, write: true, execute: true };
        }
        Allowed {
            read: allows(Kind::Read),
            write: allows(Kind::Write),
            execute: allows(Kind::Execute),
        }
    }

    #[inline(always)]
    pub(super) fn rule(&self, access: Access) -> &Rule {
        // The index is below 12 by construction; `%` spares a panic path.
        &self.rules[access.index() % 12]
    }

    /// The linear address that is translated, if it has no tag and is canonical for sure; outside
    /// long mode its 32 bits.
    #[inline(always)]
    pub(super) fn plain<L: Layout>(&self, gva: u64) -> Option<u64> {
        if !L::LONG {
            Some(gva & 0xffff_ffff)
        } else {
            extends(gva, self.quick_shift).then_some(gva)
        }
    }

    /// The linear address that is translated.
    pub(super) fn linear<L: Layout>(&self, gva: Gva, access: Access) -> Result<u64, Fault> {
        self.plain::<L>(gva.0).map_or_else(|| self.untag(gva, access.strips_tags()), Ok)
    }

    /// Strips the tag, then checks (SDM chapter 4: bits 62:57 or 62:48 become copies of the
    /// bit below, bit 63 stays).
    #[cold]
    fn untag(&self, gva: Gva, strips_tags: bool) -> Result<u64, Fault> {
        let high = gva.0 & 1 << 63;
        let shift = if strips_tags { self.lam_shift[usize::from(high != 0)] } else { 0 };
        let linear = extend(gva.0, shift) & !(1 << 63) | high;
        if extends(linear, self.canonical_shift) {
            return Ok(linear);
        }
        let reason = Reason::NonCanonical;
        Err(Fault { gva, vector: Fault::GP, error_code: 0, level: 0, reason })
    }

    /// The page fault of a walk that found no leaf.
    #[cold]
    pub(super) fn missing(&self, gva: u64, access: Access, level: u8, reason: Reason) -> Fault {
        let found = if reason == Reason::Reserved { code::P | code::RSVD } else { 0 };
        let error_code = self.rule(access).error | found;
        Fault { gva: Gva(gva), vector: Fault::PF, error_code, level, reason }
    }

    /// The page fault of a walk whose leaf refuses, if it does.
    pub(super) fn refusal(
        &self,
        gva: u64,
        access: Access,
        level: u8,
        sum: u64,
        leaf: u64,
    ) -> Option<Fault> {
        let rule = self.rule(access);
        let key = rule.key_denies(sum, leaf);
        let reason = rule.refusal(access.kind, sum, key)?;
        let error_code = rule.error | code::P | if key { code::PK } else { 0 };
        Some(Fault { gva: Gva(gva), vector: Fault::PF, error_code, level, reason })
    }
}

#[inline(always)]
fn extend(address: u64, shift: u8) -> u64 {
    (address.wrapping_shl(shift.into()) as i64).wrapping_shr(shift.into()) as u64
}

#[inline(always)]
fn extends(address: u64, shift: u8) -> bool {
    extend(address, shift) == address
}

/// The rights in the sum of a walk (see [`Rule`]) and its leaf.
#[inline(always)]
pub(super) fn rights(sum: u64, leaf: u64) -> Rights {
    Rights {
        write: sum & RW != 0,
        user: sum & US != 0,
        execute: sum & NX != 0,
        key: (leaf >> KEY_SHIFT) as u8 & 15,
    }
}
