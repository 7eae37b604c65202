// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory map: old versions against their last reader (R30), and one map for an operation
//! (R31).
#![cfg(loom)]

use loom_tests::{Guest, PAGE, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::{Alias, SlotId};
use mmu_core::paging::Access;
use mmu_core::shadow::Outcome;
use mmu_core::sync::epoch::Collector;
use mmu_core::vcpu::AccessError;

/// A walk and a read of what it finds, while a new map is published and the old one is freed.
fn a_reader_meets_a_new_map(collector: Collector) {
    let guest = Guest::with_collector(3, 4, collector);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let vcpu = guest.vcpu();
    let reader = spawn(move || {
        vcpu.read(lo(0), &mut [0xff; 8], Access::read()).unwrap();
        vcpu
    });
    guest.mmu.create_slot(Guest::slot(1, 8, 1)).unwrap();
    guest.mmu.maintain();
    drop(reader.join().unwrap());
    guest.mmu.maintain();
    guest.audit_clean();
}

model!(r30_reader_meets_a_new_map, r30_reader_meets_a_new_map_mutant, "R30:", || {
    a_reader_meets_a_new_map(Collector::new())
});

model!(
    r30_reader_meets_a_new_map_crossbeam,
    r30_reader_meets_a_new_map_crossbeam_mutant,
    "R30:",
    || {
        a_reader_meets_a_new_map(Collector::crossbeam());
    }
);

/// A guest whose leaf table and data are both in slot 1, which moves elsewhere. Half of the slot in
/// its old place is a memory map that never existed.
fn moving_guest() -> Guest {
    let guest = Guest::new(1, 4);
    guest.mmu.create_slot(Guest::slot(1, 4, 2)).unwrap();
    guest.set(0, 0, to(4));
    guest.set(4, 0, to(5));
    guest
}

fn a_fault_meets_a_moving_slot() {
    let guest = moving_guest();
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(lo(1), Access::read());
    let walker = spawn(move || {
        let outcome = vcpu.fault(lo(0), Access::read());
        let whole = matches!(outcome, Ok(Outcome::Fixed | Outcome::Guest(_)));
        assert!(whole, "R31: a table without its slot's data: {outcome:?}");
        vcpu
    });
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    guest.mmu.create_slot(Guest::slot(1, 8, 2)).unwrap();
    drop(walker.join().unwrap());
    guest.audit_clean();
}

model!(
    r31_fault_meets_a_moving_slot,
    r31_fault_meets_a_moving_slot_mutant,
    "R31:",
    a_fault_meets_a_moving_slot
);

fn a_read_meets_a_moving_slot() {
    let guest = moving_guest();
    let vcpu = guest.vcpu();
    let reader = spawn(move || {
        let result = vcpu.read(lo(0), &mut [0xff; 8], Access::read());
        let whole = matches!(result, Ok(()) | Err(AccessError::Fault(_)));
        assert!(whole, "R31: a table without its slot's data: {result:?}");
        vcpu
    });
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    guest.mmu.create_slot(Guest::slot(1, 8, 2)).unwrap();
    drop(reader.join().unwrap());
    guest.audit_clean();
}

model!(
    r31_read_meets_a_moving_slot,
    r31_read_meets_a_moving_slot_mutant,
    "R31:",
    a_read_meets_a_moving_slot
);

/// A table and the page behind it, both named by an alias that comes to show another table and page.
/// The table of one with the page of the other is a memory map that never existed.
fn a_read_meets_a_moving_alias() {
    let shows = |page: u64| Alias {
        number: 0,
        base: Gpa(8 * PAGE),
        size: 2 * PAGE,
        target: Gpa(page * PAGE),
    };
    let guest = Guest::new(6, 4);
    guest.mmu.set_alias(shows(2)).unwrap();
    guest.set(0, 0, to(8));
    // The first table names the page after it, the second another one.
    guest.set(2, 0, to(9));
    guest.set(4, 0, to(1));
    for page in [1, 3, 5] {
        guest.write(Gpa(page * PAGE), page);
    }
    let vcpu = guest.vcpu();
    let reader = spawn(move || {
        let mut word = [0; 8];
        vcpu.read(lo(0), &mut word, Access::read()).unwrap();
        let seen = u64::from_le_bytes(word);
        assert!(matches!(seen, 1 | 3), "R31: page {seen} by half of a change");
        vcpu
    });
    guest.mmu.set_alias(shows(4)).unwrap();
    drop(reader.join().unwrap());
    guest.audit_clean();
}

model!(
    r31_read_meets_a_moving_alias,
    r31_read_meets_a_moving_alias_mutant,
    "R31:",
    a_read_meets_a_moving_alias
);
