// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finding a slot among thousands in two loads.
//!
//! The span of guest frames that slots cover is cut into equal buckets, about two for each slot.
//! A bucket names the last slot that begins at or before it; where the slots are of like size, at
//! most one more begins in it. What a look-up touches of a slot lies packed in one array.

use super::Slot;
use crate::addr::{Gfn, Gpa};
use crate::sync::AtomicU64;
use core::ptr::NonNull;
use std::sync::Arc;

/// A slot's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'m> {
    /// First guest-physical byte.
    pub(crate) base: Gpa,
    pub(crate) words: &'m [AtomicU64],
}

/// What a look-up needs of a slot.
#[derive(Debug)]
pub(super) struct Hot {
    base: Gfn,
    pages: u64,
    words: NonNull<[AtomicU64]>,
}

// SAFETY: `words` points to memory shared as atomics, which the slot keeps alive.
unsafe impl Send for Hot {}
// SAFETY: as above.
unsafe impl Sync for Hot {}

impl Hot {
    #[inline]
    fn contains(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.base.0) < self.pages
    }

    #[inline]
    pub(super) fn base(&self) -> Gfn {
        self.base
    }

    #[inline]
    pub(super) fn words(&self) -> NonNull<[AtomicU64]> {
        self.words
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// As the map's slots: sorted by guest frame.
    hot: Box<[Hot]>,
    /// For each bucket the last slots that begin at or before its first and its last frame.
    buckets: Box<[[u32; 2]]>,
    /// First frame of the first bucket.
    start: u64,
    /// log2 of a bucket's frames.
    shift: u32,
}

impl Index {
    pub(super) fn new(slots: &[Arc<Slot>]) -> Self {
        let hot: Box<[Hot]> = slots
            .iter()
            .map(|s| Hot { base: s.base(), pages: s.pages(), words: NonNull::from(s.words()) })
            .collect();
        let (Some(first), Some(last)) = (hot.first(), hot.last()) else { return Self::default() };
        let start = first.base.0;
        let span = last.base.0 + last.pages - start;
        let most = hot.len() as u64 * 2;
        let mut shift = 0;
        while span >> shift > most {
            shift += 1;
        }
        let mut at = 0;
        let mut up_to = |frame| {
            while hot.get(at + 1).is_some_and(|next| next.base.0 <= frame) {
                at += 1;
            }
            at as u32
        };
        let buckets = (0..=span >> shift).map(|bucket| {
            let first = start + (bucket << shift);
            [up_to(first), up_to(first + (1 << shift) - 1)]
        });
        Self { buckets: buckets.collect(), start, shift, hot }
    }

    /// Position of the slot that holds the frame; `hint` is tried first.
    #[inline]
    pub(super) fn find(&self, gfn: Gfn, hint: usize) -> Option<usize> {
        match self.hot.get(hint) {
            Some(hot) if hot.contains(gfn) => Some(hint),
            _ => self.search(gfn),
        }
    }

    /// Position of the slot that holds the frame.
    #[inline]
    pub(super) fn search(&self, gfn: Gfn) -> Option<usize> {
        // A frame below the first slot wraps to a bucket beyond the last.
        let bucket = (gfn.0.wrapping_sub(self.start) >> self.shift) as usize;
        let [low, high] = *self.buckets.get(bucket)?;
        let (low, high) = (low as usize, high as usize);
        let at = if high - low <= 1 {
            // No branch: which of two it is cannot be predicted.
            low + usize::from(self.hot.get(high)?.base <= gfn) * (high - low)
        } else {
            low + self.hot.get(low + 1..=high)?.partition_point(|slot| slot.base <= gfn)
        };
        self.hot.get(at)?.contains(gfn).then_some(at)
    }

    #[inline]
    pub(super) fn slot(&self, at: usize) -> Option<&Hot> {
        self.hot.get(at)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::{AllocatedMemory, SlotConfig};
    use super::*;

    #[test]
    fn finds_what_a_linear_search_finds() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |n: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x % n
        };
        for round in 0..60u64 {
            // Even layouts, scattered ones, and one far slot beside many near ones.
            let mut at = random(3) * 100;
            let mut slots = Vec::new();
            for i in 0..random(40) {
                let pages = 1 + if round % 2 == 0 { 3 } else { random(50) };
                let memory = Arc::new(AllocatedMemory::new(pages << 12));
                let config = SlotConfig::new(i as u32, Gfn(at).gpa(), memory);
                slots.push(Arc::new(Slot::new(config).unwrap()));
                at += pages + if round % 3 == 0 { 0 } else { random(30) };
                at += if round % 5 == 0 && random(20) == 0 { 1 << 30 } else { 0 };
            }
            let index = Index::new(&slots);
            let mut frames: Vec<_> = (0..2_000).map(|_| random(at + 100)).collect();
            for slot in &slots {
                let (first, end) = (slot.base().0, slot.base().0 + slot.pages());
                frames.extend([first.wrapping_sub(1), first, end - 1, end]);
            }
            frames.extend([u64::MAX, 1 << 40, 0]);
            for frame in frames {
                let expected = slots.iter().position(|slot| slot.contains(Gfn(frame)));
                assert_eq!(index.search(Gfn(frame)), expected);
                assert_eq!(index.find(Gfn(frame), random(50) as usize), expected);
            }
        }
    }
}
