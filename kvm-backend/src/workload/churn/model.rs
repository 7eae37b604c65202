// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest may find in the window of `churn`, as the host knows it.

use crate::guest::churn::{HOLE, READ_ONLY, STABLE, WRITABLE, identity};
use mmu_core::memory::SlotFlags;
use std::ops::Range;

/// What a page of the window shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// No memory.
    Hole,
    /// A page of a memory.
    Page {
        /// Number of the memory.
        memory: u64,
        /// Page in it.
        page: u64,
        /// Whether the guest's stores go to the device.
        read_only: bool,
    },
}

impl View {
    /// What the guest must read there.
    pub(super) fn identity(self) -> u64 {
        match self {
            Self::Hole => HOLE,
            Self::Page { memory, page, .. } => identity(memory, page),
        }
    }

    /// The rights in the page's state.
    pub(super) fn rights(self) -> u64 {
        match self {
            Self::Hole => 0,
            Self::Page { read_only: true, .. } => READ_ONLY,
            Self::Page { .. } => WRITABLE,
        }
    }
}

/// A memslot in the window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The slot's number.
    pub(super) slot: u32,
    /// The number of the memory behind it.
    pub(super) memory: u64,
    /// First page of the window.
    pub(super) base: u64,
    pub(super) pages: u64,
    pub(super) flags: SlotFlags,
}

impl Placed {
    pub(super) fn range(&self) -> Range<u64> {
        self.base..self.base + self.pages
    }
}

/// What an alias is another name for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Pages of the window from this one on.
    Window(u64),
    /// Pages that stay, from this one on.
    Stable(u64),
}

/// An alias in the window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) number: u32,
    /// First page of the window.
    pub(super) base: u64,
    pub(super) pages: u64,
    pub(super) target: Target,
}

impl Named {
    pub(super) fn range(&self) -> Range<u64> {
        self.base..self.base + self.pages
    }
}

/// Slots, and aliases over them.
#[derive(Clone, Debug, Default)]
pub(super) struct Map {
    pub(super) slots: Vec<Placed>,
    pub(super) aliases: Vec<Named>,
}

impl Map {
    /// What page `place` of the window shows. Of two aliases the one with the smaller number says it;
    /// what an alias stands for is named without aliases.
    pub(super) fn view(&self, place: u64) -> View {
        let there = self.aliases.iter().filter(|alias| alias.range().contains(&place));
        let Some(alias) = there.min_by_key(|alias| alias.number) else {
            return self.beneath(place);
        };
        let page = place - alias.base;
        match alias.target {
            Target::Window(first) => self.beneath(first + page),
            Target::Stable(first) => {
                View::Page { memory: STABLE, page: first + page, read_only: false }
            }
        }
    }

    /// What is there without aliases.
    fn beneath(&self, place: u64) -> View {
        match self.slots.iter().find(|s| s.range().contains(&place)) {
            None => View::Hole,
            Some(slot) => View::Page {
                memory: slot.memory,
                page: place - slot.base,
                read_only: slot.flags.read_only,
            },
        }
    }

    /// Whether a slot fits there, leaving slot `except` out of account.
    pub(super) fn has_room(&self, range: &Range<u64>, except: Option<u32>) -> bool {
        self.slots.iter().all(|s| Some(s.slot) == except || disjoint(&s.range(), range))
    }

    /// Pages of `range` that change with `after`.
    pub(super) fn changes(&self, after: &Self, range: Range<u64>) -> Vec<u64> {
        range.filter(|place| self.view(*place) != after.view(*place)).collect()
    }

    /// Two pages of the window, of which the second shows with `after` what the first shows now, the
    /// first shows it no more, and the second shows nothing now.
    pub(super) fn goes(&self, after: &Self, range: Range<u64>) -> Option<(u64, u64)> {
        let shows = |map: &Self, place| map.view(place).identity();
        range.clone().filter(|to| self.view(*to) == View::Hole).find_map(|to| {
            let identity = Some(shows(after, to)).filter(|id| *id != HOLE)?;
            let mut from = range.clone().filter(|from| shows(self, *from) == identity);
            from.find(|from| shows(after, *from) != identity).map(|from| (from, to))
        })
    }
}

fn disjoint(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(slot: u32, memory: u64, base: u64, pages: u64) -> Placed {
        Placed { slot, memory, base, pages, flags: SlotFlags::default() }
    }

    fn page(memory: u64, page: u64) -> View {
        View::Page { memory, page, read_only: false }
    }

    #[test]
    fn aliases_lie_over_slots_and_show_what_is_beneath_their_target() {
        let mut map = Map::default();
        assert_eq!((map.view(0), View::Hole.identity()), (View::Hole, u64::MAX));
        map.slots = vec![slot(0, 7, 2, 3), slot(1, 8, 10, 1)];
        assert_eq!((map.view(1), map.view(2), map.view(4)), (View::Hole, page(7, 0), page(7, 2)));
        map.aliases = vec![
            Named { number: 0, base: 9, pages: 3, target: Target::Window(3) },
            Named { number: 1, base: 20, pages: 2, target: Target::Stable(5) },
        ];
        assert_eq!((map.view(9), map.view(10), map.view(11)), (page(7, 1), page(7, 2), View::Hole));
        assert_eq!((map.view(20), map.view(22)), (page(STABLE, 5), View::Hole));
        // Over another, and to a range that has another over it.
        map.aliases.push(Named { number: 2, base: 8, pages: 3, target: Target::Window(20) });
        map.aliases.push(Named { number: 3, base: 30, pages: 1, target: Target::Window(10) });
        assert_eq!((map.view(8), map.view(9), map.view(30)), (View::Hole, page(7, 1), page(8, 0)));
        map.slots[0].flags.read_only = true;
        assert_eq!((map.view(9).rights(), map.view(20).rights()), (READ_ONLY, WRITABLE));
    }

    #[test]
    fn rooms_overlap_nothing() {
        let map = Map { slots: vec![slot(0, 7, 2, 3)], aliases: Vec::new() };
        assert!(map.has_room(&(0..2), None) && map.has_room(&(5..6), None));
        assert!(!map.has_room(&(4..6), None) && map.has_room(&(4..6), Some(0)));
    }

    #[test]
    fn a_move_goes_from_a_page_to_a_hole() {
        let map = |base| Map { slots: vec![slot(0, 7, base, 3)], aliases: Vec::new() };
        assert_eq!(map(2).changes(&map(3), 0..16), [2, 3, 4, 5]);
        assert_eq!(map(2).goes(&map(3), 0..16), Some((4, 5)));
        assert_eq!(map(2).goes(&map(8), 0..16), Some((2, 8)));
        assert_eq!(map(2).goes(&map(2), 0..16), None);
        assert_eq!(map(2).goes(&Map::default(), 0..16), None);
        // Where it comes from still shows it, by an alias that comes with it.
        let mut both = map(8);
        both.aliases.push(Named { number: 0, base: 2, pages: 3, target: Target::Window(8) });
        assert_eq!(map(2).goes(&both, 0..16), None);
    }
}
