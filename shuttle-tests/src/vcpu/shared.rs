// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables of which several vCPUs use the entries, in few operations: what goes wrong here needs two
//! threads in windows of a few steps.

use super::Cpu;
use crate::guest::{LARGE, LEAF, PAGE, SHARED, data, gva, leaf_entry, window, word};
use crate::seeds::{below, one_in};
use mmu_core::paging::{Access, bits};
use mmu_core::vcpu::{AccessError, SoftExit};

impl Cpu<'_> {
    /// Points its entry of the shared table at one page or the other, natively and several times over, so
    /// that the last store goes where the first one went; flushes, and looks.
    pub(super) fn point(&mut self) {
        let (page, user) = (SHARED + self.id, self.user);
        let places = [0; 3].map(|_| page + below(2) * LEAF);
        let mut session = self.cpu.session();
        for place in &places[below(3) as usize..] {
            // With A and D, so that what is stored is what stays, and the table may settle.
            let entry = word(data(*place)) | bits::A | bits::D;
            session.store(window(leaf_entry(page)), &entry.to_le_bytes(), user).unwrap();
        }
        match one_in(2) {
            true => session.invlpg(gva(page)),
            false => session.flush(),
        }
        let seen = session.load_u64(gva(page).wrapping_add(8), user).unwrap();
        let named = data(places[2]).0 / PAGE;
        assert_eq!(seen, named, "stale: virtual page {page} is not what it was mapped to");
    }

    /// Flushes, so often that what nobody writes settles.
    pub(super) fn flush_shared(&mut self) {
        let (page, user) = (SHARED + self.id, self.user);
        let mut session = self.cpu.session();
        for _ in 0..3 {
            session.load_u64(gva(page), user).unwrap();
            session.flush();
        }
    }

    /// Points the entry of the first shared page at one page or the other, while another vCPU stores to it.
    pub(super) fn move_shared(&mut self) {
        let user = self.user;
        for _ in 0..2 {
            let used = if one_in(4) { 0 } else { bits::A | bits::D };
            let entry = word(data(SHARED + below(2) * LEAF)) | used;
            match one_in(4) {
                true => self.edit(leaf_entry(SHARED), entry),
                false => self.guest.write(leaf_entry(SHARED), entry),
            }
            let mut session = self.cpu.session();
            session.invlpg(gva(SHARED));
            let seen = session.load_u64(gva(SHARED).wrapping_add(8), user).unwrap();
            let named = [SHARED, SHARED + LEAF].map(|place| data(place).0 / PAGE);
            assert!(named.contains(&seen), "the first shared page is page {seen:#x}");
        }
    }

    /// Reads behind a table that moves together with what is behind it: either both are there or neither.
    pub(super) fn behind_table(&mut self) {
        let (at, user) = (gva(LARGE + 1 + below(3)), self.user);
        if one_in(2) {
            let access = Access { user, ..Access::read() };
            let read = self.cpu.vcpu().read(at, &mut [0; 8], access);
            let whole = matches!(read, Ok(()) | Err(AccessError::Fault(_)));
            assert!(whole, "R31: a table without what is behind it: {read:?}");
        } else {
            let loaded = self.cpu.session().load_u64(at, user);
            let whole = matches!(loaded, Ok(_) | Err(SoftExit::Fault(_)));
            assert!(whole, "R31: a table without what is behind it: {loaded:?}");
        }
    }
}
