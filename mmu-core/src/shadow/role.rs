// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The identity of a shadow page: the guest frame it shadows, and everything that changes what
//! its entries mean.
//!
//! A page's lifecycle is never part of its identity (R14, R18).

use crate::addr::{ENTRIES, Gfn};
use crate::paging::{Allowed, EntryFormat, Regs, bits};
use core::ops::Range;

const LEVEL: u32 = 0;
const WRITE: u32 = 1 << 3;
const USER: u32 = 1 << 4;
const EXECUTE: u32 = 1 << 5;
const DIRECT: u32 = 1 << 6;
const UPPER: u32 = 1 << 7;
const REGIME: u32 = 8;
const QUADRANT: u32 = 13;
const FORMAT: u32 = 15;
/// Bits of a role.
const BITS: u32 = 24;
/// Bits of a guest frame number, or of the number of a page that shadows none.
pub(crate) const GFN_BITS: u32 = 64 - BITS;

/// Privilege and register bits that decide what a guest entry permits. Each privilege of the guest
/// has trees of its own, because a consumer may run both in its ring 3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Regime(u32);

impl Regime {
    const USER: u32 = 1 << 0;
    const WP: u32 = 1 << 1;
    const NXE: u32 = 1 << 2;
    const SMEP: u32 = 1 << 3;
    const SMAP: u32 = 1 << 4;

    const fn new(bits: u32) -> Self {
        Self(bits & 0x1f)
    }

    /// What the registers mean for accesses of one privilege.
    pub(crate) fn of(regs: &Regs, user: bool) -> Self {
        let set = |bit, yes| if yes { bit } else { 0 };
        let supervisor = if user {
            Self::USER
        } else {
            // Without paging no page is the user's, and what is mapped direct then must not be found
            // where it would be (SDM vol. 3, 5.6.1).
            let paging = regs.cr0 & bits::CR0_PG != 0;
            let smap = regs.cr4 & bits::CR4_SMAP != 0 && regs.rflags & bits::RFLAGS_AC == 0;
            set(Self::WP, regs.cr0 & bits::CR0_WP != 0)
                | set(Self::SMEP, paging && regs.cr4 & bits::CR4_SMEP != 0)
                | set(Self::SMAP, paging && smap)
        };
        Self::new(supervisor | set(Self::NXE, regs.efer & bits::EFER_NXE != 0))
    }

    pub(crate) const fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    /// EFER.NXE.
    pub(crate) const fn has_nxe(self) -> bool {
        self.0 & Self::NXE != 0
    }

    /// CR0.WP: supervisor writes obey the guest's W bits.
    pub(crate) const fn write_protects(self) -> bool {
        self.0 & Self::WP != 0
    }
}

/// What a shadow page's entries mean. It shadows one of
///
/// * a guest table, or with 4-byte entries a *quadrant* of one: as many of its entries as a shadow
///   table has room for (a half at level 1, a quarter at level 2);
/// * *direct*: a stretch of memory, below a large guest page or without paging;
/// * *upper*: no table, but the levels that the guest's format lacks above its own root. In PAE
///   paging these stand for the PDPTE registers, and the page's frame number is its root's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Role(u32);

impl Role {
    /// The root of a tree: the shadow of a guest table.
    pub(crate) const fn root(level: u8, regime: Regime, format: EntryFormat) -> Self {
        let all = WRITE | USER | EXECUTE;
        Self((level as u32) << LEVEL | all | regime.0 << REGIME | (format.0 as u32) << FORMAT)
    }

    /// The same, above the guest's root.
    pub(crate) const fn upper(self) -> Self {
        Self(self.0 | UPPER)
    }

    /// The same with these rights (ANDed over the guest's entries so far).
    pub(crate) const fn with_access(self, write: bool, user: bool, execute: bool) -> Self {
        let access = if write { WRITE } else { 0 }
            | if user { USER } else { 0 }
            | if execute { EXECUTE } else { 0 };
        Self(self.0 & !(WRITE | USER | EXECUTE) | access)
    }

    /// The table below, reached with these rights.
    pub(crate) const fn child(self, write: bool, user: bool, execute: bool) -> Self {
        let below = Self(self.0 & !(7 << LEVEL) | (self.level() as u32 - 1) << LEVEL);
        below.with_access(write, user, execute)
    }

    /// The table below, reached through a guest's entry.
    pub(crate) const fn through(self, guest: u64) -> Self {
        self.child(
            self.writes() && guest & bits::RW != 0,
            self.user() && guest & bits::US != 0,
            // Without EFER.NXE bit 63 is reserved, and an entry that has it leads nowhere.
            self.executes() && guest & bits::NX == 0,
        )
    }

    /// What the privilege may do with a page that a guest's entry maps (SDM vol. 3, 5.6).
    pub(crate) const fn allows(self, guest: u64) -> Allowed {
        let (write, user) = (self.writes() && guest & bits::RW != 0, guest & bits::US != 0);
        let (user, execute) = (self.user() && user, self.executes() && guest & bits::NX == 0);
        let regime = self.regime();
        if regime.is_user() {
            return Allowed { read: user, write: user && write, execute: user && execute };
        }
        let read = !(user && regime.0 & Regime::SMAP != 0);
        Allowed {
            read,
            write: read && (write || !regime.write_protects()),
            execute: execute && !(user && regime.0 & Regime::SMEP != 0),
        }
    }

    /// The table behind entry `index` of an upper page: another, or a guest table.
    pub(crate) const fn below_upper(self, guest_top: u8) -> Self {
        let below = self.child(true, true, true);
        if below.level() > guest_top { below } else { Self(below.0 & !UPPER) }
    }

    /// The same for the part of a guest table that entry `index` of the page above leads to.
    pub(crate) const fn behind(self, index: usize) -> Self {
        let quadrant = match (self.format().is_wide() || self.is_upper(), self.level()) {
            (true, _) => 0,
            (_, 1) => index & 1,
            _ => index & 3,
        };
        Self(self.0 & !(3 << QUADRANT) | (quadrant as u32) << QUADRANT)
    }

    /// Entries of the guest table that each entry of this page stands for are this many of its own:
    /// of two for one, at level 2 of 32-bit paging, where the guest's maps 4 MiB.
    const fn split(self) -> usize {
        if self.format().is_wide() || self.level() == 1 { 1 } else { 2 }
    }

    /// Where in the guest's table the entry is that entry `index` is derived from: its offset in
    /// bytes.
    pub(crate) const fn guest_offset(self, index: usize) -> u64 {
        let first = self.quadrant() * ENTRIES / self.split();
        let size = if self.format().is_wide() { 8 } else { 4 };
        ((first + index / self.split()) * size) as u64
    }

    /// The entries that are derived from these bytes of the guest's table.
    pub(crate) fn derived_from(self, bytes: Range<u64>) -> Range<usize> {
        let size = if self.format().is_wide() { 8 } else { 4 };
        let first = self.quadrant() * ENTRIES;
        let own = |guest: u64| (guest as usize * self.split()).saturating_sub(first).min(ENTRIES);
        own(bytes.start / size)..own(bytes.end.div_ceil(size))
    }

    /// The same, for a page that shadows no guest table but a stretch of memory.
    pub(crate) const fn direct(self) -> Self {
        Self((self.0 | DIRECT) & !(UPPER | 3 << QUADRANT | u32::MAX << FORMAT))
    }

    /// 1 for a page table whose entries map 4 KiB pages.
    pub(crate) const fn level(self) -> u8 {
        (self.0 >> LEVEL & 7) as u8
    }

    pub(crate) const fn is_direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    pub(crate) const fn is_upper(self) -> bool {
        self.0 & UPPER != 0
    }

    /// Whether entries are derived from those of a guest table.
    pub(crate) const fn is_indirect(self) -> bool {
        self.0 & (DIRECT | UPPER) == 0
    }

    /// Whether the page belongs to a guest table, whose memory must stay: the upper pages above it do.
    pub(crate) const fn has_home(self) -> bool {
        !(self.is_direct() || self.stands_for_registers())
    }

    /// Whether the page, and with it the root of its tree, stands for PDPTE registers.
    pub(crate) const fn stands_for_registers(self) -> bool {
        self.is_upper() && self.format().is_pae()
    }

    pub(crate) const fn writes(self) -> bool {
        self.0 & WRITE != 0
    }

    pub(crate) const fn user(self) -> bool {
        self.0 & USER != 0
    }

    pub(crate) const fn executes(self) -> bool {
        self.0 & EXECUTE != 0
    }

    pub(crate) const fn regime(self) -> Regime {
        Regime::new(self.0 >> REGIME)
    }

    /// Of the guest's entries.
    pub(crate) const fn format(self) -> EntryFormat {
        EntryFormat((self.0 >> FORMAT) as u16)
    }

    pub(crate) const fn quadrant(self) -> usize {
        (self.0 >> QUADRANT & 3) as usize
    }
}

/// (gfn, role) in one word: the key of the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    pub(crate) const fn new(gfn: Gfn, role: Role) -> Self {
        Self(gfn.0 << BITS | role.0 as u64)
    }

    pub(crate) const fn gfn(self) -> Gfn {
        Gfn(self.0 >> BITS)
    }

    pub(crate) const fn role(self) -> Role {
        Role((self.0 & ((1 << BITS) - 1)) as u32)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_parts() {
        let regime = Regime::new(Regime::USER | Regime::SMAP | Regime::NXE);
        let root = Role::root(4, regime, EntryFormat(0x7f));
        let child = root.child(false, true, true);
        let key = Key::new(Gfn((1 << 40) - 1), child.direct());
        assert_eq!((key.gfn(), key.role()), (Gfn((1 << 40) - 1), child.direct()));
        assert_eq!((child.level(), child.regime()), (3, regime));
        assert!(!child.writes() && child.executes() && child.user() && !child.is_direct());
        assert!(key.role().is_direct() && !key.role().has_home());
        assert_eq!((child.format(), child.direct().format()), (EntryFormat(0x7f), EntryFormat(0)));
        let narrow = Role::root(2, regime, EntryFormat(0)).behind(3);
        assert_eq!((narrow.quadrant(), narrow.is_indirect()), (3, true));
        let below = narrow.child(true, true, true).behind(257);
        assert_eq!((below.quadrant(), below.upper().is_indirect()), (1, false));
        assert_eq!(child.behind(3), child, "8-byte entries");
    }

    /// Each entry is found from its guest entry's bytes, whichever of them, and no other is.
    #[test]
    fn entries_and_guest_entries_belong_together() {
        let regime = Regime::new(0);
        let narrow = |level, quadrant| Role::root(level, regime, EntryFormat(0)).behind(quadrant);
        let wide = Role::root(3, regime, EntryFormat(3));
        let all = [wide, narrow(1, 0), narrow(1, 1), narrow(2, 0), narrow(2, 2), narrow(2, 3)];
        for role in all {
            let size = if role.format().is_wide() { 8 } else { 4 };
            for index in 0..ENTRIES {
                let at = role.guest_offset(index);
                let derived = role.derived_from(at + 1..at + 2);
                assert!(derived.contains(&index), "{role:?} {index}");
                assert_eq!(derived.len(), role.split());
                assert!(derived.clone().all(|other| role.guest_offset(other) == at));
                assert_eq!(role.derived_from(at..at + size), derived);
            }
            assert_eq!(role.derived_from(0..4096), 0..ENTRIES);
        }
        assert_eq!(narrow(2, 1).derived_from(0..1024), 0..0);
        assert_eq!(narrow(2, 1).derived_from(1022..1030), 0..4);
    }
}
