// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Map-around: a fault also maps the neighbours of its page that the guest has used before.
//!
//! The entries of one cache line of the guest's table, of which the fault has read one, have their
//! shadows in one cache line as well. A neighbour is mapped only if its shadow entry is empty, the
//! guest's entry has the same rights as the fault's and A set, and writable only if it has D too (R35):
//! so nothing that the guest could observe differs from the neighbour's own fault, which would have
//! made the same entry. It is made by the same steps.
//!
//! How many are looked at depends on what becomes of them. A vCPU that goes through memory page by page
//! faults next to what its last fault has mapped. If it has used three quarters of that, twice as many
//! entries are looked at beyond it; any other fault begins with a line again. A vCPU may follow a few
//! runs at once, as a copy does.
//!
//! Neighbours are made unused ([`Spte::aged`]), so that ageing, and the next fault, can tell what was
//! mapped in vain. In a large window only every fourth line is: the first use of such an entry costs a
//! processor a locked update, and a kernel that shadows these tables a fault for each where it would
//! otherwise map a line. So whoever makes a window grow has used at least 3 of 16 of the last one, and
//! of all pages mapped around faults at most eight are unused for each that is used.

use super::fault::Attempt;
use super::location::{FrameId, Location};
use super::spte::Spte;
use super::{ENTRIES, index};
use crate::addr::PAGE_SHIFT;
use crate::memory::DirtyMode;
use crate::paging::{Entry, Step, Walk, bits};
use crate::sync::Ordering;
use core::cell::Cell;
use core::ops::Range;

/// Entries that a fault looks at, its own included. None else in a model of loom's: a table there has
/// two.
const AROUND: usize = match () {
    () if cfg!(shuttle) => 2,
    () if cfg!(loom) => 1,
    () => 8,
};
/// The same at most, where earlier ones were used.
const WIDEST: usize = match () {
    () if cfg!(shuttle) => 4,
    () if cfg!(loom) => 1,
    () => 256,
};
/// A window that is as large has lines that tell, and others that are taken for used.
const LARGE: usize = 4 * AROUND;
/// Runs that a vCPU may follow at once.
const RUNS: usize = 2;

/// The entries around one.
fn line(own: usize) -> Range<usize> {
    let first = own / AROUND * AROUND;
    first..(first + AROUND).min(ENTRIES)
}

/// Whether an entry of a window of this size is made unused, and tells what becomes of the window.
fn tells(entry: usize, len: usize) -> bool {
    len < LARGE || entry / AROUND % 4 == 3
}

/// Most of a window.
fn most(part: usize, whole: usize) -> bool {
    4 * part >= 3 * whole
}

/// What a fault has looked at: adjacent entries of one table. The table may have become another since:
/// then what was used of it is guessed wrong, and nothing else.
#[derive(Clone, Copy, Debug)]
struct Window {
    table: FrameId,
    /// The number of the first page.
    first: u64,
    len: u16,
    /// Entries that were wanted, of which the table may have had fewer.
    wanted: u16,
    /// Entries that the fault has made.
    made: u16,
}

impl Window {
    /// Next to nothing that was mapped.
    const NONE: Self = Self { table: FrameId(0), first: 0, len: 1, wanted: 0, made: 0 };
}

/// The last windows of a vCPU in which neighbours were mapped, the latest first.
#[derive(Debug)]
pub(crate) struct Windows([Cell<Window>; RUNS]);

impl Default for Windows {
    fn default() -> Self {
        Self([const { Cell::new(Window::NONE) }; RUNS])
    }
}

impl Windows {
    /// The latest window that `page` is next to, and whether it is behind it. Only windows that the
    /// fault has mostly filled are found.
    fn beside(&self, page: u64) -> Option<(usize, Window, bool)> {
        let mut known = self.0.iter().map(Cell::get).enumerate();
        known.find_map(|(place, window)| {
            let behind = page.wrapping_sub(window.first) == u64::from(window.len);
            let before = window.first.wrapping_sub(page) == 1;
            let filled = || most(window.made.into(), window.len.into());
            ((behind || before) && filled()).then_some((place, window, behind))
        })
    }

    /// The latest window from now on; that at `place` goes.
    fn note(&self, place: usize, window: Window) {
        for later in (1..=place).rev() {
            self.0[later].set(self.0[later - 1].get());
        }
        self.0[0].set(window);
    }
}

impl Attempt<'_> {
    /// Maps what is around the page that was mapped just now in `table`.
    pub(super) fn map_neighbours(&self, table: FrameId, walk: &Walk, step: Option<&Step>) {
        let own = index(self.info.gva, 1);
        let page = self.info.gva.0 >> PAGE_SHIFT;
        let windows = &self.context.windows;
        let run = windows.beside(page);
        let place = run.map_or(RUNS - 1, |(place, ..)| place);
        let run = run.filter(|(_, window, _)| self.is_used(window));
        let (wanted, around) = match run {
            Some((_, window, behind)) => {
                let wanted = (2 * usize::from(window.wanted)).min(WIDEST);
                let entries = match behind {
                    true => own..(own + wanted).min(ENTRIES),
                    false => (own + 1).saturating_sub(wanted)..own + 1,
                };
                (wanted, entries)
            }
            None => (AROUND, line(own)),
        };
        let first = page - (own - around.start) as u64;
        let len = around.len() as u16;
        let aged = |entry| tells(entry, len.into());
        let made = 1 + self.map_around(table, walk, step, around, aged) as u16;
        // Else nothing can be next to it that matters.
        if made > 1 {
            windows.note(place, Window { table, first, len, wanted: wanted as u16, made });
        }
    }

    /// Whether processors have used most of the window, by what tells.
    fn is_used(&self, window: &Window) -> bool {
        let (first, len) = (window.first as usize % ENTRIES, usize::from(window.len));
        let telling = (first..first + len).filter(|entry| tells(*entry, len));
        let used = |entry| self.engine.entry(Location::new(window.table, entry)).is_accessed();
        let (all, used) =
            telling.fold((0, 0), |(all, sum), n| (all + 1, sum + usize::from(used(n))));
        most(used, all)
    }

    /// Maps these pages around that of the fault, by entries of the same `table`, as unused where
    /// they are to be `aged`. Returns how many were mapped.
    pub(super) fn map_around(
        &self,
        table: FrameId,
        walk: &Walk,
        step: Option<&Step>,
        around: Range<usize>,
        aged: impl Fn(usize) -> bool,
    ) -> usize {
        let own = index(self.info.gva, 1);
        let mut made = 0;
        for other in around.filter(|other| *other != own) {
            let at = Location::new(table, other);
            if self.engine.entry(at) != Spte::EMPTY {
                continue;
            }
            let distance = (other as u64).wrapping_sub(own as u64);
            if let Some((walk, step)) = self.neighbour(walk, step, distance) {
                let mapped = self.map_neighbour(at, &walk, step.as_ref(), aged(other));
                made += usize::from(mapped);
            }
        }
        made
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

    fn map_neighbour(&self, at: Location, walk: &Walk, step: Option<&Step>, aged: bool) -> bool {
        let gfn = walk.gpa.gfn();
        let Some(page) = self.map.page(gfn) else { return false };
        if self.map.has_apic(gfn.0..gfn.0 + 1) {
            return false;
        }
        let (region, index) = (page.region(), page.index);
        let log = page.slot.flags().dirty;
        let allowed = self.allowed(walk);
        // As in `install`: the fault may be a fetch of what may not be read.
        if !allowed.read {
            return false;
        }
        // Where a log counts on write faults there must be one.
        let may_write = allowed.write && walk.dirty && log != DirtyMode::WriteProtect;
        let fresh = || {
            let writable = may_write && page.is_writable() && !region.is_shadowed(index);
            let dirty = log != DirtyMode::DirtyBits;
            let entry = Spte::page(page.machine(), writable, allowed.execute, dirty);
            let entry = if aged { entry.aged() } else { entry };
            let entry = entry.granting_write(allowed.write && walk.dirty);
            let unchanged = self.unchanged(step, entry.grants_write());
            let granted = !region.invalid.covers(index) && unchanged;
            granted.then_some(entry)
        };
        let made = self.publish(at, Spte::EMPTY, Some(region.rmap.get_or_alloc(index)), fresh);
        if made {
            self.stats.pte_prefetched.bump();
        }
        made
    }
}
