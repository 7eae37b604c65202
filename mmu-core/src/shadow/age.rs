// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ageing: which pages processors have used since somebody last asked.

use super::location::Location;
use super::{Engine, PageRange, RangeError, Spte};
use crate::addr::Machine;
use crate::memory::{Page, Slot};
use crate::sync::LocationSet;
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
            let blocks = self.young_blocks(&slot, pages.clone(), clear, &handle);
            let mut blocks = blocks.into_iter().peekable();
            let mut mapped = self.next_mapped(&slot, pages.clone());
            let mut next = pages.start;
            while next < pages.end {
                let end = (next / 64 * 64 + 64).min(pages.end);
                let mut bits = self.young_word(&slot, next..end, clear, &handle);
                while let Some(block) = blocks.peek().filter(|block| block.start < end) {
                    let (from, to) = (block.start.max(next), block.end.min(end));
                    if from < to {
                        bits |= u64::MAX >> (64 - (to - from)) << (from % 64);
                    }
                    if block.end > end {
                        break;
                    }
                    blocks.next();
                }
                if bits != 0 {
                    young += u64::from(bits.count_ones());
                    // Outside the read section.
                    report(&slot, (next / 64 * 64) as u64, bits);
                }
                // Each page is passed once, however many words there are.
                if mapped < end {
                    mapped = self.next_mapped(&slot, end..pages.end);
                }
                next = blocks.peek().map_or(mapped, |block| block.start.max(end).min(mapped));
            }
        }
        if clear && young > 0 {
            // So that processors look again.
            self.flush.nudge();
        }
        Ok(young)
    }

    /// The blocks of these pages that are mapped whole and were used, in order; none overlaps another.
    fn young_blocks(
        &self,
        slot: &Slot,
        pages: Range<usize>,
        clear: bool,
        handle: &Handle,
    ) -> Vec<Range<usize>> {
        let mut young = Vec::new();
        let mut guard = handle.pin();
        for (_, block, rmap) in slot.region().mapped_blocks(pages) {
            let machine = slot.region().machine_of(block.start);
            if self.take_young(rmap, machine, clear) {
                young.push(block);
            }
            guard.repin();
        }
        young.sort_by_key(|block: &Range<usize>| (block.start, usize::MAX - block.end));
        // Of two that overlap the larger one has the other.
        let mut end = 0;
        young.retain(|block| {
            let apart = block.end > end;
            end = end.max(block.end);
            apart
        });
        young
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
        for (index, rmap) in slot.region().rmap.iter_range(pages) {
            let machine = Page { slot, index }.machine();
            if self.take_young(rmap, machine, clear) {
                bits |= 1 << (index % 64);
            }
        }
        bits
    }

    /// Whether an entry of the reverse map, which maps `machine`, was used; with `clear` none is any
    /// more. Within a read section.
    fn take_young(&self, rmap: &LocationSet, machine: Machine, clear: bool) -> bool {
        let mut young = false;
        let mut narrowing = None;
        rmap.for_each(|word| {
            let at = Location::from_word(word);
            let mut old = self.entry(at);
            while old.is_accessed() && old.machine() == machine {
                young = true;
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
        young
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
