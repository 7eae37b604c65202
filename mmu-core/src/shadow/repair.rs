// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Write faults that need nothing but W: after a harvest of the dirty log, above all.
//!
//! An entry that was write-protected still says whether the guest's entries grant writing
//! ([`Spte::grants_write`]), and everything that changes what they grant takes the entry away. So the
//! guest's tables need not be walked again.
//!
//! R10: the entry is exchanged by the steps of any other ([`Attempt::widen`]): reserved by
//! compare-and-swap of the very value that was looked at, and published with the same page. That page
//! is named by the value itself, and so are its log and its reverse map: the value may have gone and come
//! back meanwhile without doing harm. KVM gave this up for indirect pages, because there the log goes
//! by a guest frame that is stored beside the entry.

use super::fault::{Attempt, Outcome};
use super::location::{FrameId, Location};
use super::{Engine, index};
use crate::addr::Gva;
use crate::paging::Kind;
use crate::sync::rule;

impl Engine {
    /// Where the shadow has the entry for 4 KiB at the address, if the tables to it are linked.
    pub(super) fn leaf_at(&self, root: FrameId, gva: Gva) -> Option<Location> {
        let mut table = root;
        for level in (2..=self.levels()).rev() {
            let entry = self.entry(Location::new(table, index(gva, level)));
            let linked = entry.is_present() && !entry.is_large();
            table = linked.then(|| self.table_at(entry.machine()))??;
        }
        Some(Location::new(table, index(gva, 1)))
    }
}

impl Attempt<'_> {
    /// Makes the entry `at`, to which the access leads, writable, if that is all that it needs.
    pub(super) fn repair(&self, at: Location) -> Option<Outcome> {
        let (engine, info) = (self.engine, self.info);
        let met = engine.entry(at);
        // R10: one value for all.
        let old = if rule!(R10) { met } else { engine.entry(at) };
        let write = info.access.kind == Kind::Write && !info.emulate;
        if !write || !old.grants_write() || old.is_writable() {
            return None;
        }
        let page = self.map.by_machine(met.machine())?;
        let direct = engine.frames.page(at.frame()).key().role().is_direct();
        if direct && engine.shape.largest > 1 && !page.slot.logs_dirty() {
            // The block may be mapped whole again.
            return None;
        }
        let (region, number) = (page.region(), page.index);
        let fresh = || {
            let forbidden = !page.is_writable()
                || region.invalid.covers(number)
                || region.is_shadowed(number) && engine.is_guarded(page);
            (!forbidden).then(|| old.writable())
        };
        // Else what hinders it is for the whole of the fault to find out.
        fresh()?;
        if !rule!(R13) {
            self.mark_dirty(page);
        }
        if !self.widen(at, old, (page, region.rmap_at(1, number)), fresh) {
            return None;
        }
        // R13: W first, then the dirty bit, then the guest.
        if rule!(R13) {
            self.mark_dirty(page);
        }
        self.stats.pf_fixed.bump();
        self.stats.pf_fast.bump();
        self.context.repaired.set(true);
        Some(Outcome::Fixed)
    }
}
