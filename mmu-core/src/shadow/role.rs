// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The identity of a shadow page: the guest frame it shadows, and everything that changes what
//! its entries mean.
//!
//! A page's lifecycle is never part of its identity (R14, R18).

use crate::addr::Gfn;
use crate::paging::{Regs, bits};

const LEVEL: u32 = 0;
const WRITE: u32 = 1 << 3;
const USER: u32 = 1 << 4;
const EXECUTE: u32 = 1 << 5;
const DIRECT: u32 = 1 << 6;
const REGIME: u32 = 7;
/// Bits of a role.
const BITS: u32 = 24;

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
            let smap = regs.cr4 & bits::CR4_SMAP != 0 && regs.rflags & bits::RFLAGS_AC == 0;
            set(Self::WP, regs.cr0 & bits::CR0_WP != 0)
                | set(Self::SMEP, regs.cr4 & bits::CR4_SMEP != 0)
                | set(Self::SMAP, smap)
        };
        Self::new(supervisor | set(Self::NXE, regs.efer & bits::EFER_NXE != 0))
    }

    pub(crate) const fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    /// CR0.WP: supervisor writes obey the guest's W bits.
    pub(crate) const fn write_protects(self) -> bool {
        self.0 & Self::WP != 0
    }
}

/// What a shadow page's entries mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Role(u32);

impl Role {
    /// The root of a tree.
    pub(crate) const fn root(level: u8, regime: Regime) -> Self {
        let all = WRITE | USER | EXECUTE;
        Self((level as u32) << LEVEL | all | regime.0 << REGIME)
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

    /// The same, for a page that shadows no guest table but a stretch of memory.
    pub(crate) const fn direct(self) -> Self {
        Self(self.0 | DIRECT)
    }

    /// 1 for a page table whose entries map 4 KiB pages.
    pub(crate) const fn level(self) -> u8 {
        (self.0 >> LEVEL & 7) as u8
    }

    pub(crate) const fn is_direct(self) -> bool {
        self.0 & DIRECT != 0
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_parts() {
        let regime = Regime::new(Regime::USER | Regime::SMAP | Regime::NXE);
        let root = Role::root(4, regime);
        let child = root.child(false, true, true);
        let key = Key::new(Gfn((1 << 40) - 1), child.direct());
        assert_eq!((key.gfn(), key.role()), (Gfn((1 << 40) - 1), child.direct()));
        assert_eq!((child.level(), child.regime()), (3, regime));
        assert!(!child.writes() && child.executes() && child.user() && !child.is_direct());
        assert!(key.role().is_direct());
    }
}
