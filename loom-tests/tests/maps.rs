// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory map: old versions against their last reader (R30), and one map for an operation
//! (R31).
#![cfg(loom)]

use loom::thread;
use loom_tests::{Guest, explore, lo, mutant, to};
use mmu_core::memory::SlotId;
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
    let reader = thread::spawn(move || {
        vcpu.read(lo(0), &mut [0xff; 8], Access::read()).unwrap();
        vcpu
    });
    guest.mmu.create_slot(Guest::slot(1, 8, 1)).unwrap();
    guest.mmu.maintain();
    drop(reader.join().unwrap());
    guest.mmu.maintain();
    guest.audit_clean();
}

#[test]
fn r30_reader_meets_a_new_map() {
    explore("r30_reader_meets_a_new_map", || a_reader_meets_a_new_map(Collector::new()));
}

#[test]
#[should_panic(expected = "R30:")]
fn r30_reader_meets_a_new_map_mutant() {
    mutant("R30", || {
        explore("r30_reader_meets_a_new_map_mutant", || a_reader_meets_a_new_map(Collector::new()))
    });
}

#[test]
fn r30_reader_meets_a_new_map_crossbeam() {
    explore("r30_reader_meets_a_new_map_crossbeam", || {
        a_reader_meets_a_new_map(Collector::crossbeam());
    });
}

#[test]
#[should_panic(expected = "R30:")]
fn r30_reader_meets_a_new_map_crossbeam_mutant() {
    mutant("R30", || {
        explore("r30_reader_meets_a_new_map_crossbeam_mutant", || {
            a_reader_meets_a_new_map(Collector::crossbeam())
        })
    });
}

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
    let walker = thread::spawn(move || {
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

#[test]
fn r31_fault_meets_a_moving_slot() {
    explore("r31_fault_meets_a_moving_slot", a_fault_meets_a_moving_slot);
}

#[test]
#[should_panic(expected = "R31:")]
fn r31_fault_meets_a_moving_slot_mutant() {
    mutant("R31", || explore("r31_fault_meets_a_moving_slot_mutant", a_fault_meets_a_moving_slot));
}

fn a_read_meets_a_moving_slot() {
    let guest = moving_guest();
    let vcpu = guest.vcpu();
    let reader = thread::spawn(move || {
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

#[test]
fn r31_read_meets_a_moving_slot() {
    explore("r31_read_meets_a_moving_slot", a_read_meets_a_moving_slot);
}

#[test]
#[should_panic(expected = "R31:")]
fn r31_read_meets_a_moving_slot_mutant() {
    mutant("R31", || explore("r31_read_meets_a_moving_slot_mutant", a_read_meets_a_moving_slot));
}
