// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The roots that a vCPU had lately.
//!
//! A root is found again by what it was made for without a look into the hash; one that stands for
//! PDPTE registers can be found in no other way. Nothing is held: a root that was torn down meanwhile is
//! not found, and one that nobody uses may be.

use crate::addr::Gpa;
use crate::paging::PagingMode;
use crate::shadow::{FrameId, Key, Regime};

/// Roots remembered: three (KVM_MMU_NUM_PREV_ROOTS) for each privilege.
const RECENT: usize = 6;

/// What a root was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    levels: u8,
    root: Gpa,
    pdptrs: [u64; 4],
    regime: Regime,
    format: u16,
}

impl Space {
    pub(super) fn of(mode: &PagingMode, regime: Regime) -> Self {
        let format = mode.entry_format();
        let pae = mode.is_paging() && format.is_pae();
        Self {
            levels: mode.levels(),
            root: if pae { Gpa(0) } else { mode.root_address() },
            pdptrs: if pae { *mode.pdptrs() } else { [0; 4] },
            regime,
            format: format.0,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Recent {
    roots: [Option<(Space, FrameId, Key)>; RECENT],
    next: usize,
}

impl Recent {
    pub(super) fn find(&self, space: &Space) -> Option<(FrameId, Key)> {
        let mut roots = self.roots.iter().flatten();
        roots.find(|(known, ..)| known == space).map(|(_, frame, key)| (*frame, *key))
    }

    pub(super) fn remember(&mut self, space: Space, frame: FrameId, key: Key) {
        let mut roots = self.roots.iter();
        let same = roots.position(|root| root.is_some_and(|(known, ..)| known == space));
        let place = same.unwrap_or_else(|| {
            self.next = (self.next + 1) % RECENT;
            self.next
        });
        self.roots[place] = Some((space, frame, key));
    }
}
