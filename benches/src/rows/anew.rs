// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several vCPUs that make the shadow of their page tables anew after all of it was torn down.
//!
//! As elsewhere in Z1, a table has one page that is touched, and there are frames for a quarter
//! more tables than the guest has: the old ones are torn down, freed and used again by the faults that
//! need them, and a vCPU that is out of frames waits for the others.

use super::lanes::{Crowd, Ids, Sampled, each, fault, ids, measure, resume};
use crate::cpu::{Work, together};
use crate::figure::{Failure, Found, check_eq};
use crate::guest::{MIB, Memory, PAGE, regs};
use crate::measure::{Effort, calibrate, per_operation};
use crate::regime::{Brief, Regime, Vm};
use mmu_core::shadow::Outcome;
use mmu_core::vcpu::Vcpu;
use std::cell::RefCell;
use std::sync::Arc;

/// Tables of all vCPUs.
const TABLES: u64 = 2048;
/// First mapped address.
const FIRST: u64 = 0x4000_0000;

/// One vCPU with page tables of its own.
struct Lane {
    vcpu: Vcpu,
    tables: u64,
}

impl Lane {
    /// Touches a page of each table, and lets the guest go on after each fault.
    fn pass(&mut self, vm: &Vm) -> Result<(), Failure> {
        for table in 0..self.tables {
            let gva = FIRST + table * 2 * MIB + table % 512 * PAGE;
            check_eq("fault", fault(vm, &mut self.vcpu, gva)?, Outcome::Fixed)?;
            resume(&mut self.vcpu)?;
        }
        Ok(())
    }
}

struct Setup {
    vms: Vec<Vm>,
    lanes: RefCell<Vec<Lane>>,
}

impl Setup {
    fn vm(regime: Regime, lanes: u64, tables: u64) -> Result<(Vm, Vec<Lane>), Failure> {
        // Beside each vCPU's leaf tables: one for each GiB, one, and the root.
        let upper = tables / 512 + 4;
        let mut memory = Memory::new(lanes * (tables + upper) * PAGE + MIB, PAGE);
        let roots: Vec<_> = (0..lanes)
            .map(|_| {
                let root = memory.table();
                for table in 0..tables {
                    memory.map(root, FIRST + table * 2 * MIB + table % 512 * PAGE, 0);
                }
                root
            })
            .collect();
        let vm = Vm::new(memory.engine(lanes * (tables / 4 * 5 + upper + 16) + 64)?, regime);
        let lanes = roots.into_iter().map(|root| {
            let vcpu = vm.mmu().create_vcpu(Arc::new(Brief), regs(root));
            Ok(Lane { vcpu: vcpu.map_err(Failure::in_step("vCPU"))?, tables })
        });
        let lanes = lanes.collect::<Result<_, Failure>>()?;
        Ok((vm, lanes))
    }
}

impl Sampled for Setup {
    fn calibrate(&self, effort: &Effort) -> Result<u64, Failure> {
        let lane = &mut self.lanes.borrow_mut()[0];
        calibrate(effort, || {
            self.vms[0].mmu().zap_all();
            lane.pass(&self.vms[0])
        })
    }

    /// For each table. Each vCPU has everything zapped before it goes round.
    fn sample(&self, rounds: u64) -> Result<(f64, bool), Failure> {
        let mut lanes = self.lanes.borrow_mut();
        let tables: u64 = lanes.iter().map(|lane| lane.tables).sum();
        let (mut ns, mut disturbed) = (0.0, false);
        for _ in 0..rounds {
            self.vms.iter().for_each(|vm| vm.mmu().zap_all());
            let work = lanes.iter_mut().enumerate().map(|(n, lane)| {
                let vm = &self.vms[n % self.vms.len()];
                Box::new(move || lane.pass(vm)) as Work<'_, ()>
            });
            let all = together(work.collect())?;
            ns += per_operation(all.elapsed, tables);
            disturbed |= all.disturbed;
        }
        Ok((ns / rounds as f64, disturbed))
    }

    fn verify(&self) -> Result<(), Failure> {
        let tables: u64 = self.lanes.borrow().iter().map(|lane| lane.tables).sum();
        let mut found = 0;
        for vm in &self.vms {
            found += vm.mmu().audit().map_err(Failure::in_step("audit"))?.sptes;
            check_eq("old pages torn down", vm.mmu().stats().mmu_shadow_zapped > 0, true)?;
        }
        check_eq("shadow entries", found, tables)
    }
}

impl Crowd for Setup {
    type Work = ();

    fn one((): (), regime: Regime, lanes: usize) -> Result<Self, Failure> {
        let (vm, made) = Self::vm(regime, lanes as u64, TABLES / lanes as u64)?;
        Ok(Self { vms: vec![vm], lanes: RefCell::new(made) })
    }

    fn private((): (), lanes: usize) -> Result<Self, Failure> {
        let (mut vms, mut all) = (Vec::new(), Vec::new());
        for _ in 0..lanes {
            let (vm, made) = Self::vm(Regime::Rcu, 1, TABLES / lanes as u64)?;
            vms.push(vm);
            all.extend(made);
        }
        Ok(Self { vms, lanes: RefCell::new(all) })
    }
}

/// The figures of these vCPUs.
pub const IDS: &Ids = ids!("Z1");

/// Measures them.
pub fn run(effort: &Effort) -> Result<Found, Failure> {
    measure::<Setup>(effort, (), IDS, each!("make the shadow anew after zap_all"), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_there_again() {
        for regime in Regime::ALL {
            let setup = Setup::one((), regime, 4).unwrap();
            setup.sample(3).unwrap();
            setup.verify().unwrap();
        }
        let setup = Setup::private((), 2).unwrap();
        setup.sample(2).unwrap();
        setup.verify().unwrap();
    }
}
