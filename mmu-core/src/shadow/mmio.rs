// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Entries that say "no memory there", so that an access to a device costs no walk of the guest's
//! tables.
//!
//! Such an entry carries the generation of the memory map by which there is none, and means nothing
//! by any other map (R9). A map and its generation are one snapshot: there is no moment at which a
//! fault could take one from before a change and the other from after it. When the generations of
//! the entries have all been used, everything is zapped ([`Engine::publish`]).

use super::fault::{Attempt, Outcome, Retry};
use super::index;
use super::location::{FrameId, Location};
use super::spte::Spte;
use crate::paging::{Kind, Step, Walk};
use crate::sync::rule;

impl Attempt<'_> {
    /// What the entry `at`, to which the access leads, says of it, if it says that there is no memory.
    pub(super) fn known_mmio(&self, at: Location) -> Option<Outcome> {
        let access = self.info.access;
        let (gfn, write) = self.engine.entry(at).mmio_frame(self.map.generation())?;
        // The entry says nothing of instruction fetches.
        if access.kind == Kind::Execute || access.kind == Kind::Write && !write {
            return None;
        }
        self.stats.pf_mmio.bump();
        self.stats.mmio_cached.bump();
        let gpa = gfn.gpa().wrapping_add(self.info.gva.page_offset());
        Some(Outcome::Mmio { gpa })
    }

    /// Remembers that by this map there is no memory at the walk's end.
    pub(super) fn note_mmio(
        &self,
        table: FrameId,
        walk: &Walk,
        step: Option<&Step>,
    ) -> Result<(), Retry> {
        self.engine.ensure_protected(self.stats, self.guard, self.map, table)?;
        let allowed = self.allowed(walk);
        let at = Location::new(table, index(self.info.gva, 1));
        let old = self.engine.entry(at);
        if !allowed.read || !(old == Spte::EMPTY || old.is_mmio()) {
            return Ok(());
        }
        let generation = if rule!(R09) {
            self.map.generation()
        } else {
            self.engine.memory.load(self.guard).generation()
        };
        // R35, as for any entry: writable only if the guest's has D.
        let write = allowed.write && walk.dirty;
        let entry = Spte::mmio(walk.gpa.gfn(), write, generation);
        if old != entry {
            self.publish(at, old, None, || self.unchanged(step, write).then_some(entry));
        }
        Ok(())
    }
}
