// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A storm: vCPUs that do all that guests do, and beside them those who change what is around them.

use crate::changes::Change;
use crate::guest::{Guest, Shape};
use crate::seeds::{below, one_in};
use crate::vcpu;
use mmu_core::memory::DirtyMode;
use mmu_core::shadow::StatsSnapshot;
use shuttle::thread::{self, JoinHandle};

/// Shadow pages that three vCPUs must have, much fewer than their tables need.
pub(crate) const FRAMES: u64 = 24;

/// Who is there.
#[derive(Clone, Copy, Debug)]
pub struct Storm {
    /// Its test.
    pub name: &'static str,
    /// vCPUs, up to three.
    pub vcpus: u64,
    /// A thread for each.
    pub changes: &'static [Change],
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

    /// One schedule of it, with the audit and a look at every address in the end. What happened.
    ///
    /// # Panics
    ///
    /// If anything is not as it should be.
    #[must_use]
    pub fn rage(&self) -> StatsSnapshot {
        let copied = self.changes.iter().any(|change| matches!(change, Change::Log));
        let logs = [DirtyMode::WriteProtect, DirtyMode::DirtyBits, DirtyMode::Off];
        let guest = Guest::new(Shape {
            frames: FRAMES + 8,
            native: !one_in(4),
            blocks: !one_in(4),
            // Without a log there are blocks.
            log: logs[below(if copied { 2 } else { 3 }) as usize],
            crossbeam: one_in(2),
        });
        if one_in(2) {
            guest.mmu.set_nr_mmu_pages(FRAMES).unwrap();
        }
        let cpus: Vec<_> =
            (0..self.vcpus).map(|id| spawn(&guest, move |guest| vcpu::run(guest, id))).collect();
        let changers: Vec<_> =
            self.changes.iter().map(|change| spawn(&guest, |guest| change.run(guest))).collect();
        let mut cpus: Vec<_> = cpus.into_iter().map(|cpu| cpu.join().unwrap()).collect();
        let copies: Vec<_> =
            changers.into_iter().filter_map(|changer| changer.join().unwrap()).collect();
        copies.into_iter().for_each(|copied| copied.check(&guest));
        guest.audit();
        // One that was there all the time, or one that begins when the others have gone.
        let cpu = cpus.swap_remove(below(self.vcpus) as usize);
        drop(cpus);
        let mut cpu = match one_in(2) {
            true => cpu,
            false => {
                drop(cpu);
                guest.mmu.maintain();
                guest.vcpu()
            }
        };
        cpu.session().flush();
        guest.agrees(&mut cpu, !one_in(4));
        drop(cpu);
        guest.mmu.maintain();
        guest.audit();
        guest.mmu.stats()
    }
}
