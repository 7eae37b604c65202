// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shadow entries: one word each, in the processor's own format (SDM vol. 3, table 5-20).
//!
//! | word | meaning |
//! | --- | --- |
//! | 0 | *empty* |
//! | P = 1 | *present*: what a processor may use; a leaf above level 1 has PS set. U is always set. A is clear only after ageing, and D in a writable entry only where a slot's log uses dirty bits: else the processor never needs to write an entry |
//! | P = 0, kind 1 | *frozen*: the page is being torn down and no install may succeed (R5) |
//! | P = 0, kind 2, tag | *pending*: reserved by the fault that owns the tag |
//! | P = 0, kind 3, generation, gfn, W | *MMIO*: no memory at this guest frame, by the memory map of that generation (R9) |
//!
//! Every non-present word that is not 0 has address bits 47 to 51 set, so that a processor which
//! speculates past P = 0 (L1TF) finds no cacheable memory there.

use crate::addr::{Gfn, Machine};

const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
/// Left to software (SDM vol. 3, 5.5.4): the guest's entries grant writing.
const GRANTS_WRITE: u64 = 1 << 9;
/// A leaf above level 1.
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
const FRAME: u64 = ((1 << 52) - 1) & !0xfff;

const KIND: u64 = 3 << 1;
const FROZEN: u64 = 1 << 1;
const PENDING: u64 = 2 << 1;
const MMIO: u64 = 3 << 1;
const NOWHERE: u64 = 0x1f << 47;
const GFN_SHIFT: u32 = 3;
const GFN_BITS: u32 = 40;
const MMIO_WRITE: u64 = 1 << (GFN_SHIFT + GFN_BITS);
/// A generation's low bits are below `NOWHERE`, the others above.
const LOW_SHIFT: u32 = GFN_SHIFT + GFN_BITS + 1;
const LOW_BITS: u32 = 47 - LOW_SHIFT;
const HIGH_SHIFT: u32 = 52;
/// Bits of the generation in an MMIO entry. When they have all been used, every such entry goes.
pub(crate) const MMIO_GENERATION_BITS: u32 = if cfg!(loom) { 4 } else { LOW_BITS + 12 };
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

    /// Maps a page of guest memory. A `dirty` entry that may be written need not be written by the
    /// processor.
    pub(crate) const fn page(machine: Machine, write: bool, execute: bool, dirty: bool) -> Self {
        let w = if write { W } else { 0 };
        let d = if write && dirty { D } else { 0 };
        let nx = if execute { 0 } else { NX };
        Self(machine.0 & FRAME | P | U | A | w | d | nx)
    }

    /// The same for a leaf above level 1: `machine` is aligned to its size.
    pub(crate) const fn large(self) -> Self {
        Self(self.0 | PS)
    }

    /// Whether this is a leaf above level 1.
    pub(crate) const fn is_large(self) -> bool {
        self.0 & (P | PS) == P | PS
    }

    /// No memory at the frame, by the map of that generation.
    pub(crate) const fn mmio(gfn: Gfn, write: bool, generation: u64) -> Self {
        let generation = generation & ((1 << MMIO_GENERATION_BITS) - 1);
        let low = generation & ((1 << LOW_BITS) - 1);
        let high = generation >> LOW_BITS;
        let w = if write { MMIO_WRITE } else { 0 };
        Self(gfn.0 << GFN_SHIFT | w | low << LOW_SHIFT | high << HIGH_SHIFT | MMIO | NOWHERE)
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

    pub(crate) const fn is_mmio(self) -> bool {
        self.0 & (P | KIND) == MMIO
    }

    /// The frame of an MMIO entry, and whether it may be written, by a map of that generation.
    pub(crate) fn mmio_frame(self, generation: u64) -> Option<(Gfn, bool)> {
        let gfn = Gfn(self.0 >> GFN_SHIFT & ((1 << GFN_BITS) - 1));
        let write = self.0 & MMIO_WRITE != 0;
        (self == Self::mmio(gfn, write, generation)).then_some((gfn, write))
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

    /// The same, for a guest whose entries grant writing or do not, whether the entry may or not.
    pub(crate) const fn granting_write(self, grants: bool) -> Self {
        Self(self.0 | if grants { GRANTS_WRITE } else { 0 })
    }

    /// Whether the guest's entries grant writing.
    pub(crate) const fn grants_write(self) -> bool {
        self.0 & (P | GRANTS_WRITE) == P | GRANTS_WRITE
    }

    /// The same with the right to write, written through.
    pub(crate) const fn writable(self) -> Self {
        Self(self.0 | W | A | D)
    }

    /// The same without the right to write.
    pub(crate) const fn write_protected(self) -> Self {
        Self(self.0 & !(W | D))
    }

    /// Whether the processor has written through the entry, or need not say so.
    pub(crate) const fn is_dirty(self) -> bool {
        self.0 & (P | W | D) == P | W | D
    }

    /// The same, not written through yet.
    pub(crate) const fn clean(self) -> Self {
        Self(self.0 & !D)
    }

    /// Whether the processor has used the entry since it was made or aged.
    pub(crate) const fn is_accessed(self) -> bool {
        self.0 & (P | A) == P | A
    }

    /// The same, not used yet.
    pub(crate) const fn aged(self) -> Self {
        Self(self.0 & !A)
    }

    /// The same after a use, as a processor leaves it (SDM vol. 3, 5.8).
    pub(crate) const fn used(self, write: bool) -> Self {
        Self(self.0 | A | if write { D } else { 0 })
    }

    /// Whether whoever may use `other` may use this in the same way.
    pub(crate) const fn includes(self, other: Self) -> bool {
        self.is_present()
            && self.0 & (FRAME | PS) == other.0 & (FRAME | PS)
            && (self.is_writable() || !other.is_writable())
            && (self.is_executable() || !other.is_executable())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_distinct() {
        let page = Spte::page(Machine(0x1000), true, false, true);
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
        let mmio = Spte::mmio(Gfn((1 << 40) - 1), true, 0x7abc);
        assert!(mmio.is_mmio() && !mmio.is_present() && !mmio.is_pending() && mmio != Spte::FROZEN);
        assert_eq!(mmio.0 & NOWHERE, NOWHERE, "L1TF");
        assert_eq!(mmio.mmio_frame(0x7abc), Some((Gfn((1 << 40) - 1), true)));
        assert_eq!(mmio.mmio_frame(0x7abd), None);
        assert_eq!(mmio.mmio_frame(0x6abc), None);
        assert_eq!(Spte::mmio(Gfn(5), false, 0).mmio_frame(0), Some((Gfn(5), false)));
        assert!(!page.is_mmio() && !pending.is_mmio() && !Spte::EMPTY.is_mmio());
        let clean = page.clean().aged();
        assert!(page.is_dirty() && page.is_accessed() && !clean.is_dirty() && !clean.is_accessed());
        assert!(clean.includes(page) && clean.used(true) == page && !clean.used(false).is_dirty());
    }

    #[test]
    fn inclusion_is_by_frame_and_rights() {
        let m = Machine(0x5000);
        let rw = Spte::page(m, true, false, true);
        let ro = Spte::page(m, false, false, true);
        let rx = Spte::page(m, false, true, true);
        assert!(rw.includes(ro) && !ro.includes(rw) && !rw.includes(rx) && rx.includes(ro));
        assert!(!rw.includes(Spte::page(Machine(0x6000), false, false, true)));
        assert!(!Spte::EMPTY.includes(ro));
        assert_eq!(rw.write_protected(), ro);
        let granting = rw.granting_write(true);
        assert!(granting.write_protected().grants_write() && !ro.grants_write());
        assert_eq!(granting.write_protected().writable(), granting);
        assert!(rw.includes(granting) && !Spte::EMPTY.granting_write(true).grants_write());
    }
}
