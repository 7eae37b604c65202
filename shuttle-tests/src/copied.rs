// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The copy that a migration makes of a slot, whose log is on.

use crate::guest::{BLOCKS_PAGES, Guest, MAIN, MAIN_PAGES, WORDS};
use crate::seeds::one_in;
use mmu_core::memory::SlotId;

/// See the module.
#[derive(Debug)]
pub(crate) struct Copied {
    slot: SlotId,
    words: Vec<u64>,
}

impl Copied {
    pub(crate) fn of(guest: &Guest, slot: SlotId) -> Self {
        let pages = if slot == MAIN { MAIN_PAGES } else { BLOCKS_PAGES };
        Self { slot, words: guest.words(slot, 0..pages) }
    }

    fn pages(&self) -> u64 {
        self.words.len() as u64 / WORDS
    }

    /// Takes the log and copies what it says.
    pub(crate) fn update(&mut self, guest: &Guest) {
        self.follow(guest, |copied| {
            let (mmu, slot, mut log) = (&guest.mmu, copied.slot, [0]);
            if one_in(3) {
                mmu.peek_dirty_log(slot, &mut log).unwrap();
                mmu.clear_dirty_log(slot, 0, &log).unwrap();
            } else {
                mmu.dirty_log(slot, &mut log).unwrap();
            }
            (0..copied.pages()).filter(|page| log[0] >> page & 1 != 0).collect()
        });
    }

    /// Copies the pages that `take` has taken out of a log. What had been written for good before must
    /// be in the copy then.
    pub(crate) fn follow(&mut self, guest: &Guest, take: impl FnOnce(&Self) -> Vec<u64>) {
        let marks = guest.marks(self.slot);
        for page in take(self) {
            let words = guest.words(self.slot, page..page + 1);
            self.words[(page * WORDS) as usize..][..WORDS as usize].copy_from_slice(&words);
        }
        for (pages, value) in marks {
            let copies = pages.map(|page| self.words[(page * WORDS) as usize]);
            assert!(
                copies.into_iter().max() >= Some(value),
                "R13: {value:x} had been written to one of pages {pages:?} of {}, whose copies say {copies:x?}",
                self.slot
            );
        }
    }

    /// What the slot is now must be what the copy is.
    pub(crate) fn check(&self, guest: &Guest) {
        let now = Self::of(guest, self.slot);
        for page in 0..self.pages() {
            let words =
                |all: &Self| all.words[(page * WORDS) as usize..][..WORDS as usize].to_vec();
            let (copy, now) = (words(self), words(&now));
            assert_eq!(copy, now, "R13: a write to page {page} of {} is in no log", self.slot);
        }
    }
}
