// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ageing: which pages processors have used since somebody last asked.

use super::location::Location;
use super::{Engine, PageRange, RangeError, Spte};
use crate::memory::{Page, Slot};
use crate::sync::epoch::Handle;
use core::ops::Range;
use std::sync::Arc;

impl Engine {
    /// Reports the pages of the range that a processor has used since their entries were made or
    /// aged: the slot, a page index that is a multiple of 64, and one bit for each page from there
    /// on. With `clear` they count as unused from now on. Returns their number.
    ///
    /// Takes no lock but that of each page's reverse map, and waits for no vCPU: one that remembers a
    /// translation uses it unnoticed until it drains (as with KVM's `clear_young`).
    pub(crate) fn young(
        &self,
        range: PageRange,
        clear: bool,
        mut report: impl FnMut(&Slot, u64, u64),
    ) -> Result<u64, RangeError> {
        let handle = self.handles.get();
        let mut young = 0;
        for (slot, pages) in self.pages_in(&self.memory.snapshot(), range)? {
            let mut next = pages.start;
            while next < pages.end {
                let end = (next / 64 * 64 + 64).min(pages.end);
                let bits = self.young_word(&slot, next..end, clear, &handle);
                if bits != 0 {
                    young += u64::from(bits.count_ones());
                    // Outside the read section.
                    report(&slot, (next / 64 * 64) as u64, bits);
                }
                next = self.next_mapped(&slot, end..pages.end);
            }
        }
        if clear && young > 0 {
            // So that processors look again.
            self.flush.nudge();
        }
        Ok(young)
    }

    /// First page of the range that may be mapped; else its end.
    fn next_mapped(&self, slot: &Slot, pages: Range<usize>) -> usize {
        let end = pages.end;
        let mut mapped = slot.region().rmap.iter_range(pages);
        mapped.find(|(_, rmap)| !rmap.is_empty()).map_or(end, |(index, _)| index)
    }

    fn young_word(
        &self,
        slot: &Arc<Slot>,
        pages: Range<usize>,
        clear: bool,
        handle: &Handle,
    ) -> u64 {
        let mut bits = 0;
        let _guard = handle.pin();
        let mut narrowing = None;
        for (index, rmap) in slot.region().rmap.iter_range(pages) {
            let machine = Page { slot, index }.machine();
            rmap.for_each(|word| {
                let at = Location::from_word(word);
                let mut old = self.entry(at);
                while old.is_accessed() && old.machine() == machine {
                    bits |= 1 << (index % 64);
                    let aged = if clear { old.aged() } else { return };
                    match self.exchange(at, old, aged) {
                        Ok(()) => {
                            let narrowing = narrowing.get_or_insert_with(|| self.flush.narrow());
                            narrowing.entry(at, self.gva_of(at));
                            break;
                        }
                        Err(now) => old = now,
                    }
                }
            });
        }
        bits
    }

    /// Notes a use as a processor does; `None` if the entry has changed meanwhile.
    pub(crate) fn use_entry(&self, at: Location, seen: Spte, write: bool) -> Option<Spte> {
        let used = seen.used(write);
        if used == seen {
            return Some(seen);
        }
        self.exchange(at, seen, used).ok().map(|()| used)
    }
}
