// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether an entry may stand for a guest's entry that has changed since it was made.

use super::Engine;
use super::location::FrameId;
use super::role::{Key, Role};
use super::spte::Spte;
use crate::memory::MemoryMap;
use crate::paging::{Entry, bits};

impl Engine {
    /// Whether `spte`, in an indirect page, grants nothing that the `guest`'s entry does not. Says no of
    /// what a fault has only reserved.
    pub(super) fn derives(&self, map: &MemoryMap, page: Key, guest: u64, spte: Spte) -> bool {
        let role = page.role();
        // R35.
        if guest & (bits::P | bits::A) != bits::P | bits::A {
            return false;
        }
        match role.format().decode(guest, role.level(), role.regime().has_nxe()) {
            Entry::Leaf(gpa) if role.level() == 1 => {
                let allowed = role.allows(guest);
                let may_write = allowed.write && guest & bits::D != 0;
                if spte.is_mmio() {
                    let same =
                        |(gfn, write)| allowed.read && gfn == gpa.gfn() && may_write >= write;
                    return spte.mmio_frame(map.generation()).is_none_or(same);
                }
                // An APIC's page may have another name, by which the same memory is mapped.
                spte.is_present()
                    && !map.has_apic(gpa.gfn().0..gpa.gfn().0 + 1)
                    && map.page(gpa.gfn()).is_some_and(|page| page.machine() == spte.machine())
                    && allowed.read
                    && (may_write || !spte.is_writable() && !spte.grants_write())
                    && (allowed.execute || !spte.is_executable())
            }
            Entry::Table(gpa) => {
                let child = self.frames.frame_at(spte.machine()).filter(|_| spte.is_present());
                child.is_some_and(|child| self.stands_for(child, role.through(guest), gpa.gfn()))
            }
            _ => false,
        }
    }

    /// Whether the page shadows that table in that role, of which it may be any part.
    fn stands_for(&self, child: FrameId, role: Role, gfn: crate::addr::Gfn) -> bool {
        let key = self.frames.page(child).key();
        key.gfn() == gfn && key.role().behind(0) == role.behind(0)
    }
}
