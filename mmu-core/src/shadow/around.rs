// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Map-around: a fault also maps the neighbours of its page that the guest has used before.
//!
//! The entries of one cache line of the guest's table, of which the fault has read one, have their
//! shadows in one cache line as well. A neighbour is mapped only if its shadow entry is empty, the
//! guest's entry has the same rights as the fault's and A set, and writable only if it has D too (R35):
//! so nothing that the guest could observe differs from the neighbour's own fault, which would have
//! made the same entry. It is made by the same steps, and unused ([`Spte::aged`]), so that ageing tells
//! what was mapped in vain.

use super::fault::Attempt;
use super::location::{FrameId, Location};
use super::spte::Spte;
use super::{ENTRIES, index};
use crate::memory::DirtyMode;
use crate::paging::{Entry, Step, Walk, bits};
use crate::sync::Ordering;
use core::ops::Range;

/// Entries that a fault looks at, its own included. None else in a model: a table there has two.
const AROUND: usize = if cfg!(loom) { 1 } else { 8 };

/// The entries around one.
pub(super) fn around(own: usize) -> Range<usize> {
    let first = own / AROUND * AROUND;
    first..(first + AROUND).min(ENTRIES)
}

impl Attempt<'_> {
    /// Maps what is around the page that was mapped just now in `table`, or is to be.
    pub(super) fn map_around(
        &self,
        table: FrameId,
        walk: &Walk,
        step: Option<&Step>,
        around: Range<usize>,
    ) {
        let own = index(self.info.gva, 1);
        for other in around.filter(|other| *other != own) {
            let at = Location::new(table, other);
            if self.engine.entry(at) != Spte::EMPTY {
                continue;
            }
            let distance = (other as u64).wrapping_sub(own as u64);
            if let Some((walk, step)) = self.neighbour(walk, step, distance) {
                self.map_neighbour(at, &walk, step.as_ref());
            }
        }
    }

    /// What a walk to the page `distance` entries further on would find, if it has the same rights and
    /// was used before.
    fn neighbour(
        &self,
        walk: &Walk,
        step: Option<&Step>,
        distance: u64,
    ) -> Option<(Walk, Option<Step>)> {
        let Some(step) = step else {
            // Part of the same large page.
            let gpa = walk.gpa.page().wrapping_add(distance.wrapping_mul(crate::addr::PAGE_SIZE));
            return Some((Walk { gpa, ..*walk }, None));
        };
        let mode = self.info.mode;
        let entry = step.entry.wrapping_add(distance.wrapping_mul(mode.entry_size()));
        let word = self.map.word(entry, &self.context.hint)?.load(Ordering::Acquire);
        let value = mode.entry_of(word, entry);
        let differs = (value ^ step.value) & !(bits::ADDR | bits::D | bits::A | bits::G);
        let used = value & (bits::P | bits::A) == bits::P | bits::A;
        // With the address come bits that may be reserved.
        let leaf = matches!(mode.decode(value, 1), Entry::Leaf(_));
        let page = differs == 0 && used && leaf;
        let walk = Walk {
            gpa: crate::addr::Gpa(value & bits::ADDR),
            dirty: value & bits::D != 0,
            ..*walk
        };
        page.then_some((walk, Some(Step { entry, value, ..*step })))
    }

    fn map_neighbour(&self, at: Location, walk: &Walk, step: Option<&Step>) {
        let Some(page) = self.map.page(walk.gpa.gfn()) else { return };
        let (region, index) = (page.region(), page.index);
        let log = page.slot.flags().dirty;
        let allowed = self.allowed(walk);
        // As in `install`: the fault may be a fetch of what may not be read.
        if !allowed.read {
            return;
        }
        // Where a log counts on write faults there must be one.
        let may_write = allowed.write && walk.dirty && log != DirtyMode::WriteProtect;
        let fresh = || {
            let writable = may_write && page.is_writable() && !region.is_shadowed(index);
            let dirty = log != DirtyMode::DirtyBits;
            let entry = Spte::page(page.machine(), writable, allowed.execute, dirty).aged();
            let entry = entry.granting_write(allowed.write && walk.dirty);
            let unchanged = self.unchanged(step, entry.grants_write());
            let granted = !region.invalid.covers(index) && unchanged;
            granted.then_some(entry)
        };
        if self.publish(at, Spte::EMPTY, Some(region.rmap.get_or_alloc(index)), fresh) {
            self.stats.pte_prefetched.bump();
        }
    }
}
