// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shadow entries: one word each, in the processor's own format (SDM vol. 3, table 5-20).
//!
//! | word | meaning |
//! | --- | --- |
//! | 0 | *empty* |
//! | P = 1 | *present*: what a processor may use. U and A are always set, D wherever W is: the processor never needs to write an entry |
//! | P = 0, kind 1 | *frozen*: the page is being torn down and no install may succeed (R5) |
//! | P = 0, kind 2, tag | *pending*: reserved by the fault that owns the tag |
//!
//! Every non-present word that is not 0 has address bits 47 to 51 set, so that a processor which
//! speculates past P = 0 (L1TF) finds no cacheable memory there.

use crate::addr::Machine;

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const NX: u64 = 1 << 63;
const FRAME: u64 = ((1 << 52) - 1) & !0xfff;

const KIND: u64 = 3 << 1;
const FROZEN: u64 = 1 << 1;
const PENDING: u64 = 2 << 1;
const NOWHERE: u64 = 0x1f << 47;
const TAG_SHIFT: u32 = 3;
/// Bits of a tag.
pub(crate) const TAG_BITS: u32 = 44;

/// A shadow entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Spte(pub(crate) u64);

impl Spte {
    pub(crate) const EMPTY: Self = Self(0);
    pub(crate) const FROZEN: Self = Self(FROZEN | NOWHERE);

    /// Maps a page of guest memory.
    pub(crate) const fn page(machine: Machine, write: bool, execute: bool) -> Self {
        let w = if write { W | D } else { 0 };
        let nx = if execute { 0 } else { NX };
        Self(machine.0 & FRAME | P | U | A | w | nx)
    }

    /// Points at a shadow table. Rights are in the leaves alone.
    pub(crate) const fn table(machine: Machine) -> Self {
        Self(machine.0 & FRAME | P | W | U | A)
    }

    /// Reserves the entry for the owner of `tag`.
    pub(crate) const fn pending(tag: u64) -> Self {
        Self((tag & ((1 << TAG_BITS) - 1)) << TAG_SHIFT | PENDING | NOWHERE)
    }

    pub(crate) const fn is_present(self) -> bool {
        self.0 & P != 0
    }

    pub(crate) const fn is_pending(self) -> bool {
        self.0 & (P | KIND) == PENDING
    }

    /// The machine address a present entry points at.
    pub(crate) const fn machine(self) -> Machine {
        Machine(self.0 & FRAME)
    }

    pub(crate) const fn is_writable(self) -> bool {
        self.0 & (P | W) == P | W
    }

    pub(crate) const fn is_executable(self) -> bool {
        self.0 & (P | NX) == P
    }

    /// The same without the right to write.
    pub(crate) const fn write_protected(self) -> Self {
        Self(self.0 & !(W | D))
    }

    /// Whether whoever may use `other` may use this in the same way.
    pub(crate) const fn includes(self, other: Self) -> bool {
        self.is_present()
            && self.0 & FRAME == other.0 & FRAME
            && (self.is_writable() || !other.is_writable())
            && (self.is_executable() || !other.is_executable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_distinct() {
        let page = Spte::page(Machine(0x1000), true, false);
        let pending = Spte::pending(u64::MAX);
        assert!(page.is_present() && !page.is_pending() && page.is_writable());
        assert!(!page.is_executable() && page.machine() == Machine(0x1000));
        assert!(pending.is_pending() && !pending.is_present());
        assert!(!Spte::EMPTY.is_pending() && !Spte::FROZEN.is_pending());
        assert_ne!(pending, Spte::FROZEN);
        for dead in [pending, Spte::FROZEN, Spte::pending(0)] {
            assert_eq!(dead.0 & NOWHERE, NOWHERE, "L1TF");
            assert_eq!(dead.0 >> 52, 0);
        }
        assert_ne!(Spte::pending(1), Spte::pending(2));
    }

    #[test]
    fn inclusion_is_by_frame_and_rights() {
        let m = Machine(0x5000);
        let rw = Spte::page(m, true, false);
        let ro = Spte::page(m, false, false);
        let rx = Spte::page(m, false, true);
        assert!(rw.includes(ro) && !ro.includes(rw) && !rw.includes(rx) && rx.includes(ro));
        assert!(!rw.includes(Spte::page(Machine(0x6000), false, false)));
        assert!(!Spte::EMPTY.includes(ro));
        assert_eq!(rw.write_protected(), ro);
    }
}
