// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Code that vCPUs patch and fetch.

use super::Cpu;
use crate::guest::{CODE, INSTRUCTION, INSTRUCTION_AT, data, gva};
use crate::seeds::below;
use mmu_core::addr::Gva;
use mmu_core::paging::Access;

fn instruction() -> Gva {
    gva(CODE).wrapping_add(INSTRUCTION_AT)
}

impl Cpu<'_> {
    /// Adds 1 to each byte of the instruction, unless somebody else is faster.
    pub(super) fn patch(&mut self) {
        let old = self.fetch();
        let (old, new) = ([old; INSTRUCTION], [old + 1; INSTRUCTION]);
        let access = Access { user: self.user, ..Access::execute() };
        let done = match below(3) {
            0 => self.guest.mmu.patch_code(data(CODE).wrapping_add(INSTRUCTION_AT), &old, &new),
            _ => self.cpu.vcpu_mut().patch_code(instruction(), &old, &new, access),
        };
        if done.unwrap() {
            self.guest.patched();
        }
    }

    /// Fetches the instruction, several times in one session or for the emulator: the byte of which it
    /// consists.
    pub(super) fn fetch(&mut self) -> u8 {
        let (access, user) = (Access { user: self.user, ..Access::execute() }, self.user);
        let mut newest = 0;
        let mut session = self.cpu.session();
        let emulated = below(2) == 0;
        for _ in 0..4 {
            let patches = self.guest.patches() as u8;
            let mut bytes = [0; INSTRUCTION];
            match emulated {
                true => {
                    let fetched = session.vcpu().fetch(instruction(), &mut bytes, access);
                    assert_eq!(fetched, Ok(INSTRUCTION));
                }
                false => session.fetch(instruction(), &mut bytes, user).unwrap(),
            }
            assert_eq!(bytes, [bytes[0]; INSTRUCTION], "R38, R39: half of a patch was fetched");
            newest = bytes[0];
            assert!(newest >= patches, "R38, R39: {newest} was fetched after patch {patches}");
        }
        newest
    }
}
