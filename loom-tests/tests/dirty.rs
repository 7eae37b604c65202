// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log against faults and against a processor inside the guest: R13, R22.
#![cfg(loom)]

use loom::thread;
use loom_tests::{Guest, PAGE, entry, explore, fault, lo, mutant, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::SlotId;
use mmu_core::paging::Access;

/// The page that the guest writes.
const DATA: u64 = 2;

fn logging_guest() -> Guest {
    let guest = Guest::logging(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(DATA));
    guest
}

/// Takes the log; whether the page that the guest writes is in it.
fn harvest(guest: &Guest) -> bool {
    let mut bitmap = [0];
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    bitmap[0] >> DATA & 1 != 0
}

/// A harvest while a fault makes a page writable.
fn a_harvest_meets_a_write_fault() {
    let guest = logging_guest();
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    harvest(&guest);
    let writer = thread::spawn(move || {
        fault(&mut vcpu, lo(0), Access::write());
        vcpu
    });
    harvest(&guest);
    drop(writer.join().unwrap());
    guest.audit("R13", entry("not in the dirty log"));
}

#[test]
fn r13_harvest_meets_a_write_fault() {
    explore("r13_harvest_meets_a_write_fault", a_harvest_meets_a_write_fault);
}

#[test]
#[should_panic(expected = "R13:")]
fn r13_harvest_meets_a_write_fault_mutant() {
    mutant("R13", || {
        explore("r13_harvest_meets_a_write_fault_mutant", a_harvest_meets_a_write_fault)
    });
}

/// One round of a live migration while the guest stores, then the last round with the guest
/// stopped. With `warm`, the processor may write the page when it begins.
fn a_copy_is_complete(rule: &str, warm: bool, stores: u64) {
    let guest = logging_guest();
    let mut cpu = guest.soft();
    if warm {
        cpu.session().store(lo(0), &[0xff; 8], false).unwrap();
    } else {
        harvest(&guest);
    }
    let processor = thread::spawn(move || {
        let mut session = cpu.session();
        for value in 1..=stores {
            session.store(lo(0), &value.to_le_bytes(), false).unwrap();
        }
        drop(session);
        cpu
    });
    let mut copy = 0;
    if harvest(&guest) {
        copy = guest.read(Gpa(DATA * PAGE));
    }
    let cpu = processor.join().unwrap();
    if harvest(&guest) {
        copy = guest.read(Gpa(DATA * PAGE));
    }
    assert_eq!(copy, stores, "{rule}: no harvest reported the last store");
    drop(cpu);
    guest.audit_clean();
}

#[test]
fn r13_copy_is_complete() {
    explore("r13_copy_is_complete", || a_copy_is_complete("R13", false, 2));
}

#[test]
#[should_panic(expected = "R13:")]
fn r13_copy_is_complete_mutant() {
    mutant("R13", || {
        explore("r13_copy_is_complete_mutant", || a_copy_is_complete("R13", false, 2))
    });
}

#[test]
fn r22_flush_request_meets_an_entry() {
    explore("r22_flush_request_meets_an_entry", || a_copy_is_complete("R22", true, 1));
}

#[test]
#[should_panic(expected = "R22:")]
fn r22_flush_request_meets_an_entry_mutant() {
    mutant("R22", || {
        explore("r22_flush_request_meets_an_entry_mutant", || a_copy_is_complete("R22", true, 1))
    });
}
