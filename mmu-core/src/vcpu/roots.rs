// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The roots that a vCPU had lately.
//!
//! A root is found again by what it was made for without a look into the hash, which every vCPU shares.
//! Nothing is held: a root that was torn down meanwhile is not found, and one that nobody uses may be.

use crate::shadow::{FrameId, Name};

/// Roots remembered: three (KVM_MMU_NUM_PREV_ROOTS) for each privilege.
const RECENT: usize = 6;

#[derive(Debug, Default)]
pub(super) struct Recent {
    roots: [Option<(Name, FrameId)>; RECENT],
    next: usize,
}

impl Recent {
    pub(super) fn find(&self, name: &Name) -> Option<FrameId> {
        let mut roots = self.roots.iter().flatten();
        roots.find(|(known, _)| known == name).map(|(_, frame)| *frame)
    }

    pub(super) fn remember(&mut self, name: Name, frame: FrameId) {
        let mut roots = self.roots.iter();
        let same = roots.position(|root| root.is_some_and(|(known, _)| known == name));
        let place = same.unwrap_or_else(|| {
            self.next = (self.next + 1) % RECENT;
            self.next
        });
        self.roots[place] = Some((name, frame));
    }
}
