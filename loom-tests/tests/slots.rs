// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the memory map against faults, zaps and host invalidations: R8, R9, R26, R27.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, entry, lo, model, spawn, then, to};
use mmu_core::addr::{Gpa, Hva};
use mmu_core::memory::SlotId;
use mmu_core::paging::Access;
use mmu_core::shadow::{Outcome, PageRange};

/// A slot is deleted or moved while a fault maps its page.
fn a_fault_meets(change: impl FnOnce(&Guest)) {
    let guest = Guest::new(2, 4);
    guest.mmu.create_slot(Guest::slot(1, 4, 1)).unwrap();
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(4));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(lo(1), Access::read());
    let walker = spawn(move || {
        let _ = vcpu.fault(lo(0), Access::read());
        vcpu
    });
    change(&guest);
    drop(walker.join().unwrap());
    guest.audit("R08", entry("without memory"));
}

fn a_fault_meets_the_end_of_its_slot() {
    a_fault_meets(|guest| {
        guest.mmu.delete_slot(SlotId(1)).unwrap();
    });
}

model!(
    r08_fault_meets_the_end_of_its_slot,
    r08_fault_meets_the_end_of_its_slot_mutant,
    "R08:",
    a_fault_meets_the_end_of_its_slot
);

fn a_fault_meets_a_move_of_its_slot() {
    a_fault_meets(|guest| guest.mmu.move_slot(SlotId(1), Gpa(8 * PAGE)).unwrap());
}

model!(
    r08_fault_meets_a_move_of_its_slot,
    r08_fault_meets_a_move_of_its_slot_mutant,
    "R08:",
    a_fault_meets_a_move_of_its_slot
);

/// A slot is created where a fault finds no memory and remembers that.
fn an_mmio_entry_meets_a_new_slot() {
    let guest = Guest::new(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(4));
    guest.set(1, 1, to(2));
    let mut vcpu = guest.vcpu();
    // The leaf's table is there.
    let _ = vcpu.fault(lo(1), Access::read());
    let walker = spawn(move || {
        let _ = vcpu.fault(lo(0), Access::read());
        vcpu
    });
    guest.mmu.create_slot(Guest::slot(1, 4, 1)).unwrap();
    let mut vcpu = walker.join().unwrap();
    guest.audit("R09", entry("there is memory"));
    let outcome = vcpu.fault(lo(0), Access::read());
    assert_eq!(outcome, Ok(Outcome::Fixed), "R09: memory is taken for a device");
    guest.audit_clean();
}

model!(
    r09_mmio_entry_meets_a_new_slot,
    r09_mmio_entry_meets_a_new_slot_mutant,
    "R09:",
    an_mmio_entry_meets_a_new_slot
);

/// A slot is created while the host has all of its memory taken away.
fn a_new_slot_meets_an_invalidation() {
    let guest = Guest::new(2, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(4));
    let mut vcpu = guest.vcpu();
    let host = {
        let guest = guest.clone();
        spawn(move || {
            let all = PageRange::Host { base: Hva(0), size: 1 << 47 };
            let invalidation = guest.mmu.invalidate(all).unwrap();
            // Either the slot is not there, or its memory is taken away as well.
            let outcome = vcpu.fault(lo(0), Access::read());
            assert_ne!(outcome, Ok(Outcome::Fixed), "R26: a slot entered an invalidation");
            invalidation.end();
            vcpu
        })
    };
    guest.mmu.create_slot(Guest::slot(1, 4, 1)).unwrap();
    drop(host.join().unwrap());
    guest.audit_clean();
}

model!(
    r26_new_slot_meets_an_invalidation,
    r26_new_slot_meets_an_invalidation_mutant,
    "R26:",
    a_new_slot_meets_an_invalidation
);

/// A table that maps a slot's page is torn down while the slot is deleted. The engine itself asserts
/// that nothing names the slot's memory when it is forgotten.
fn a_zap_meets_the_end_of_a_slot() {
    let guest = Guest::new(2, 4);
    guest.mmu.create_slot(Guest::slot(1, 4, 1)).unwrap();
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(4));
    let mut vcpu = guest.vcpu();
    while vcpu.fault(lo(0), Access::read()).is_err() {}
    let zapper = {
        let guest = guest.clone();
        // What was derived from the table in page 1 goes.
        let table = PageRange::Guest { base: Gpa(PAGE), size: PAGE };
        spawn(move || guest.mmu.set_host_writable(table, true).unwrap())
    };
    then(|| guest.mmu.delete_slot(SlotId(1)).unwrap(), || zapper.join().unwrap());
    drop(vcpu);
    guest.audit_clean();
}

model!(
    r27_zap_meets_the_end_of_a_slot,
    r27_zap_meets_the_end_of_a_slot_mutant,
    "R27:",
    a_zap_meets_the_end_of_a_slot
);
