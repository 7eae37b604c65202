// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Roots that stand for PDPTE registers, which every vCPU finds by what the registers hold: R6.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, fault, lo, model, spawn};
use mmu_core::addr::Machine;
use mmu_core::memory::AllocatedMemory;
use mmu_core::paging::{Access, Regs, bits};
use mmu_core::shadow::{Disagreement, Processor};
use mmu_core::vcpu::{Entry, Vcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;

/// Shadow tables of as many levels as PAE paging has, the registers being one.
const LEVELS: u8 = 3;

struct Cpu;

impl Processor for Cpu {
    fn kick(&self) {}

    fn forgets_outside(&self) -> bool {
        true
    }
}

fn guest() -> Guest {
    let tables = AllocatedMemory::at(6 * PAGE, Machine(0x100_0000));
    let mmu = Mmu::new(Config::new(Arc::new(tables)).levels(LEVELS)).unwrap();
    mmu.create_slot(Guest::slot(0, 0, 2)).unwrap();
    Guest { mmu }
}

/// A vCPU whose PDPTE registers hold this value. None is present: behind the root nothing is mapped.
fn vcpu(guest: &Guest, value: u64) -> Vcpu {
    let pdptrs = [value << 1; 4];
    let regs = Regs { cr4: bits::CR4_PAE, efer: 0, pdptrs, ..Guest::regs(0) };
    guest.mmu.create_vcpu(Arc::new(Cpu), regs).unwrap()
}

fn load(vcpu: &mut Vcpu) {
    fault(vcpu, lo(0), Access::read());
}

/// The root that the processor would run on.
fn root(vcpu: &mut Vcpu) -> Option<Machine> {
    let entered = vcpu.enter(false, |_| ());
    vcpu.leave();
    match entered {
        Ok(Entry::Run { root, .. }) => Some(root),
        _ => None,
    }
}

/// The audit, and that both vCPUs run on the one root of their registers.
fn check(guest: &Guest, mut a: Vcpu, mut b: Vcpu) {
    let hash = |found: &Disagreement| matches!(found, Disagreement::Hash { .. });
    let report = guest.audit("R06", hash);
    let stats = guest.mmu.stats();
    assert_eq!(
        report.retired + report.obsolete + report.pages,
        stats.mmu_cache_miss + stats.mmu_cache_race
    );
    let (a_runs, b_runs) = (root(&mut a), root(&mut b));
    assert!(a_runs.is_some() && a_runs == b_runs, "R06: {a_runs:?} and {b_runs:?}");
    drop((a, b));
    guest.audit_clean();
}

/// Two vCPUs load the same values for the first time.
fn two_loads_make_one_page() {
    let guest = guest();
    let (mut a, mut b, mut c) = (vcpu(&guest, 1), vcpu(&guest, 1), vcpu(&guest, 2));
    // Not what this is about: memory for descriptors.
    load(&mut c);
    let other = spawn(move || {
        load(&mut a);
        a
    });
    load(&mut b);
    check(&guest, other.join().unwrap(), b);
    drop(c);
}

model!(
    r06_two_loads_make_one_page,
    r06_two_loads_make_one_page_mutant,
    "R06:",
    two_loads_make_one_page
);

/// A vCPU loads what another has loaded before, while the other's page becomes obsolete and is torn
/// down for one of now.
fn a_load_meets_the_end_of_its_page() {
    let guest = guest();
    let (mut a, mut b) = (vcpu(&guest, 1), vcpu(&guest, 1));
    load(&mut a);
    let other = spawn(move || {
        load(&mut b);
        b
    });
    guest.mmu.zap_all();
    load(&mut a);
    check(&guest, a, other.join().unwrap());
}

model!(
    r06_load_meets_the_end_of_its_page,
    r06_load_meets_the_end_of_its_page_mutant,
    "R06:",
    a_load_meets_the_end_of_its_page
);
