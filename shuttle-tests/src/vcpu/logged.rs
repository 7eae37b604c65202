// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stores that say when they are done, so that every log which is taken later must have led to them.

use super::Cpu;
use crate::guest::{LARGE, LEAF, Mark, OWN, SHARED, data, gva};
use crate::seeds::{below, one_in};
use mmu_core::addr::Gva;
use mmu_core::paging::Access;
use mmu_core::vcpu::SoftExit;

/// Stores of one operation, at most.
const STORES: u64 = 6;

impl Cpu<'_> {
    /// To the page whose entry another vCPU changes.
    pub(super) fn store_shared(&mut self, value: u64) {
        self.store_counted(gva(SHARED), Mark::Shared, value);
    }

    /// To all of its own pages in one exit, for which a small ring has no room.
    pub(super) fn store_emulated(&mut self, value: u64) {
        let access = Access { user: self.user, ..Access::write() };
        for page in 0..OWN {
            self.cpu.vcpu().write(self.at(page), &value.to_le_bytes(), access).unwrap();
            let place = self.behind(page);
            *self.stored(place) = value;
        }
    }

    /// To one of the pages behind that entry, through a pin.
    pub(super) fn store_pinned(&mut self, first: u64) {
        let place = data(SHARED + below(2) * LEAF);
        let page = self.guest.mmu.pin_page(place, true).unwrap();
        for value in first..first + STORES {
            page.write(0, &value.to_le_bytes()).unwrap();
            self.guest.mark(Mark::Shared, value);
        }
    }

    /// To a page that may be in a block.
    pub(super) fn store_large(&mut self, value: u64) {
        self.store_counted(gva(LARGE + 2), Mark::Large, value);
    }

    fn store_counted(&mut self, at: Gva, mark: Mark, first: u64) {
        let (guest, user) = (self.guest, self.user);
        let mut session = self.cpu.session();
        for value in first..first + STORES {
            loop {
                match session.store(at, &value.to_le_bytes(), user) {
                    Ok(()) => break,
                    // Outside, and stays there while pages are collected.
                    Err(SoftExit::RingFull) => guest.rings().expect("a ring").collect(guest),
                    Err(other) => panic!("{at}: {other:?}"),
                }
            }
            guest.mark(mark, value);
            if one_in(STORES) {
                session.flush();
            }
        }
    }
}
