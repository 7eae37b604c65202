// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses of a vCPU to devices.

use super::Cpu;
use crate::devices::{AT, Devices, SIZE};
use crate::guest::{PASSING, gva};
use crate::seeds::{below, one_in};
use mmu_core::vcpu::SoftExit;

/// Accesses of one operation.
const ACCESSES: u64 = 3;

impl Cpu<'_> {
    /// Reads and writes registers of a device: at ports, or where there is a device instead of memory.
    pub(super) fn device(&mut self) {
        let Self { guest, id, user, .. } = *self;
        let mmu = &guest.mmu;
        let buses = self
            .initiators
            .get_or_insert_with(|| [mmu.bus(), mmu.ports()].map(|bus| bus.initiator()));
        for _ in 0..ACCESSES {
            let (write, offset) = (!one_in(4), below(SIZE / 8) * 8);
            if one_in(2) {
                match write {
                    true => guest.devices().write(id, &mut buses[1], AT[1] + offset),
                    false => Devices::read(&mut buses[1], AT[1] + offset),
                }
                continue;
            }
            let at = gva(PASSING).wrapping_add(offset);
            let mut session = self.cpu.session();
            let exit = match write {
                true => session.store(at, &[0; 8], user).err(),
                false => session.load_u64(at, user).err(),
            };
            drop(session);
            match exit {
                // Memory.
                None => {}
                Some(SoftExit::Mmio(gpa)) if write => {
                    guest.devices().write(id, &mut buses[0], gpa.0);
                }
                Some(SoftExit::Mmio(gpa)) => Devices::read(&mut buses[0], gpa.0),
                Some(other) => panic!("{at}: {other:?}"),
            }
        }
    }
}
