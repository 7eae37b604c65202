// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A storm: vCPUs that do all that guests do, and beside them those who change what is around them.

use crate::changes::Change;
use crate::guest::{Guest, Shape};
use crate::seeds::{below, one_in};
use crate::vcpu::{self, Work};
use mmu_core::memory::DirtyMode;
use shuttle::thread::{self, JoinHandle};
use std::collections::BTreeMap;

/// Shadow pages that three vCPUs must have, much fewer than their tables need.
pub(crate) const FRAMES: u64 = 3 * FRAMES_OF_VCPU;
/// Those that one vCPU must have.
const FRAMES_OF_VCPU: u64 = 8;

/// Counters, of the engine and of what else was counted, by name.
pub(crate) type Tally = BTreeMap<&'static str, u64>;

/// Who is there.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// Its test.
    pub name: &'static str,
    /// vCPUs, up to three.
    pub vcpus: &'static [Work],
    /// A thread for each.
    pub changes: &'static [Change],
    /// What must have happened after some hundred schedules: counters.
    pub events: &'static [&'static str],
}

fn spawn<T: Send + 'static>(
    guest: &Guest,
    work: impl FnOnce(&Guest) -> T + Send + 'static,
) -> JoinHandle<T> {
    let guest = guest.clone();
    thread::spawn(move || work(&guest))
}

impl Storm {
    /// The command that repeats a schedule.
    pub(crate) fn again(&self, seed: u64) -> String {
        format!("SHUTTLE_SEED={seed} cargo shuttle -- --exact {}", self.name)
    }

    fn has(&self, change: Change) -> bool {
        self.changes.contains(&change)
    }

    fn shape(&self) -> Shape {
        use DirtyMode::{DirtyBits, Off, WriteProtect};
        let rings = self.has(Change::Rings);
        let log = match rings {
            true => WriteProtect,
            false if self.has(Change::Log) || self.has(Change::Copy) => {
                [WriteProtect, DirtyBits][below(2) as usize]
            }
            // Without a log there are blocks.
            false => [WriteProtect, DirtyBits, Off][below(3) as usize],
        };
        Shape {
            frames: FRAMES + 8,
            native: !one_in(4),
            blocks: !one_in(4),
            log,
            crossbeam: one_in(2),
            rings,
            vcpus: self.vcpus.len() as u64,
        }
    }

    /// One schedule of it, with the audit and a look at every address in the end. What happened.
    ///
    /// # Panics
    ///
    /// If anything is not as it should be.
    #[must_use]
    pub(crate) fn rage(&self) -> Tally {
        let guest = Guest::new(self.shape());
        let fewest = FRAMES_OF_VCPU * (self.vcpus.len() as u64).max(2);
        if self.has(Change::Quota) {
            guest.mmu.set_nr_mmu_pages(fewest).unwrap();
        } else if one_in(2) {
            guest.mmu.set_nr_mmu_pages([fewest, FRAMES][below(2) as usize]).unwrap();
        }
        let cpus: Vec<_> = (0..)
            .zip(self.vcpus)
            .map(|(id, work)| spawn(&guest, move |guest| vcpu::run(guest, id, *work)))
            .collect();
        let changers: Vec<_> =
            self.changes.iter().map(|change| spawn(&guest, |guest| change.run(guest))).collect();
        let mut cpus: Vec<_> = cpus.into_iter().map(|cpu| cpu.join().unwrap()).collect();
        let copies: Vec<_> =
            changers.into_iter().filter_map(|changer| changer.join().unwrap()).collect();
        for mut copied in copies {
            copied.update(&guest);
            copied.check(&guest);
        }
        guest.rings().into_iter().for_each(|rings| rings.check(&guest));
        guest.devices().check();
        guest.check_code();
        guest.audit();
        // One that was there all the time, or one that begins when the others have gone.
        let cpu = cpus.swap_remove(below(cpus.len() as u64) as usize);
        drop(cpus);
        let mut cpu = match one_in(2) {
            true => cpu,
            false => {
                drop(cpu);
                guest.mmu.maintain();
                guest.vcpu()
            }
        };
        cpu.vcpu_mut().set_dirty_ring(None);
        cpu.session().flush();
        guest.agrees(&mut cpu, !one_in(4));
        drop(cpu);
        guest.mmu.maintain();
        guest.audit();
        guest.tally()
    }
}
