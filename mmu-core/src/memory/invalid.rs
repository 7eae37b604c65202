// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages of a region that the host has taken away for a while.
//!
//! A fault asks after its fence whether its page is in the range; an invalidation sets the range,
//! fences, and then takes entries away, pending ones included (R7). So one of them sees the other.

use crate::sync::{AtomicU64, Ordering};
use core::ops::Range;

/// The smallest range around all active invalidations, and their number.
#[derive(Debug, Default)]
pub(crate) struct Invalid {
    active: AtomicU64,
    first: AtomicU64,
    end: AtomicU64,
}

impl Invalid {
    /// One more. Calls must be serialised with each other, not with [`Invalid::end`].
    pub(crate) fn begin(&self, pages: Range<usize>) {
        let (mut first, mut end) = (pages.start as u64, pages.end as u64);
        if self.active.load(Ordering::Relaxed) > 0 {
            first = first.min(self.first.load(Ordering::Relaxed));
            end = end.max(self.end.load(Ordering::Relaxed));
        }
        self.first.store(first, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        // Release publishes the range to `covers`.
        self.active.fetch_add(1, Ordering::Release);
    }

    /// One less.
    pub(crate) fn end(&self) {
        // Release: a fault that sees the pages back sees what the host did to them.
        self.active.fetch_sub(1, Ordering::Release);
    }

    /// Whether the page may not be mapped now. May say so of pages between two ranges.
    #[inline]
    pub(crate) fn covers(&self, page: usize) -> bool {
        self.touches(page..page + 1)
    }

    /// Whether one of the pages may not be mapped now.
    #[inline]
    pub(crate) fn touches(&self, pages: Range<usize>) -> bool {
        // Acquire pairs with `begin` and `end`.
        self.active.load(Ordering::Acquire) > 0
            && (pages.end as u64) > self.first.load(Ordering::Relaxed)
            && (pages.start as u64) < self.end.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn covers_what_is_active() {
        let invalid = Invalid::default();
        assert!(!invalid.covers(0));
        invalid.begin(2..4);
        let covered = |page| invalid.covers(page);
        assert_eq!([1, 2, 3, 4].map(covered), [false, true, true, false]);
        invalid.begin(7..8);
        invalid.end();
        assert!(covered(2) && covered(7) && !covered(8));
        invalid.end();
        assert!(!covered(7));
        invalid.begin(9..10);
        assert!(covered(9) && !covered(7), "a new range begins afresh");
    }
}
