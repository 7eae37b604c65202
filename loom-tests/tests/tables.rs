// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that write their tables while faults read them: R1, R2, R24, R35, R36; and a store that gets
//! nowhere: R25.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, entry, fault, hi, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::Outcome;

/// The guest maps an address elsewhere while the first fault on it makes the shadow page of the
/// table and the entry.
fn a_write_meets_the_first_entry() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut vcpu = guest.vcpu();
    // The root's shadow page is not what this is about.
    let _ = vcpu.fault(hi(0), Access::read());
    let walker = spawn(move || {
        fault(&mut vcpu, lo(0), Access::read());
        vcpu
    });
    guest.set(1, 0, to(3));
    drop(walker.join().unwrap());
    guest.audit("R02", entry("another page than"));
}

model!(
    r02_guest_write_meets_the_first_entry,
    r02_guest_write_meets_the_first_entry_mutant,
    "R02:",
    a_write_meets_the_first_entry
);

/// The guest points the root at another table while a fault links the shadow page of the first.
fn a_write_meets_a_link() {
    let guest = Guest::new(5, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(3, 0, to(4));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(hi(0), Access::read());
    let walker = spawn(move || {
        fault(&mut vcpu, lo(0), Access::read());
        vcpu
    });
    guest.set(0, 0, to(3));
    drop(walker.join().unwrap());
    guest.audit("R02", entry("another table"));
}

model!(
    r02_guest_write_meets_a_link,
    r02_guest_write_meets_a_link_mutant,
    "R02:",
    a_write_meets_a_link
);

/// One vCPU maps a page writable while another begins to shadow it as a table.
fn a_writable_entry_meets_a_new_table() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(0, 1, to(2));
    guest.set(1, 0, to(3));
    guest.set(2, 0, to(1));
    let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
    // The shadow page of the table in page 2 is there already, that of page 1 is not.
    fault(&mut a, hi(1), Access::read());
    let _ = b.fault(hi(1), Access::read());
    let writer = spawn(move || {
        let outcome = fault(&mut a, hi(0), Access::write());
        assert!(matches!(outcome, Outcome::Fixed | Outcome::Emulate { .. }));
        a
    });
    fault(&mut b, lo(0), Access::read());
    drop(writer.join().unwrap());
    guest.audit("R02", entry("shadowed guest table"));
}

model!(
    r02_writable_entry_meets_a_new_table,
    r02_writable_entry_meets_a_new_table_mutant,
    "R02:",
    2,
    a_writable_entry_meets_a_new_table
);

/// A processor stores to a table that it can still write while a fault begins to shadow the table.
fn a_processor_writes_a_table() {
    let guest = Guest::new(5, 4);
    guest.set(0, 0, to(1));
    guest.set(0, 1, to(2));
    guest.set(1, 0, to(3));
    guest.set(2, 0, to(1));
    guest.write(Gpa(3 * PAGE), 3);
    guest.write(Gpa(4 * PAGE), 4);
    let (mut cpu, mut vcpu) = (guest.soft(), guest.vcpu());
    cpu.session().store(hi(0), &to(3).to_le_bytes(), false).unwrap();
    let _ = vcpu.fault(hi(1), Access::read());
    let processor = spawn(move || {
        cpu.session().store(hi(0), &to(4).to_le_bytes(), false).unwrap();
        cpu
    });
    fault(&mut vcpu, lo(0), Access::read());
    let mut cpu = processor.join().unwrap();
    let seen = cpu.session().load_u64(lo(0), false).unwrap();
    assert_eq!(seen, 4, "R01: an entry made from what a processor overwrote later");
    guest.audit_clean();
}

model!(
    r01_processor_writes_a_table,
    r01_processor_writes_a_table_mutant,
    "R01:",
    a_processor_writes_a_table
);

/// The guest changes an entry while a walk sets its accessed bit.
fn a_mark_meets_a_write() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2) & !(bits::A | bits::D));
    let vcpu = guest.vcpu();
    let walker = spawn(move || {
        let mut word = [0; 8];
        vcpu.read(lo(0), &mut word, Access::read()).unwrap();
        vcpu
    });
    let written = to(3) & !bits::A;
    // Half a word, which is stored by compare-and-swap: loom may order a plain store between the
    // two halves of a compare-and-swap.
    guest.mmu.write_phys(Gpa(PAGE), &(written as u32).to_le_bytes());
    drop(walker.join().unwrap());
    let now = guest.read(Gpa(PAGE));
    assert_eq!(now & !bits::A, written, "R24: the guest's own write was overwritten");
    guest.audit_clean();
}

model!(r24_mark_meets_a_write, r24_mark_meets_a_write_mutant, "R24:", a_mark_meets_a_write);

/// The guest clears a bit of its entry while a fault makes an entry from it.
fn a_fault_meets_a_cleared_bit(bit: u64) {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(3));
    let mut vcpu = guest.vcpu();
    // Everything but the entry is there.
    fault(&mut vcpu, lo(1), Access::read());
    let walker = spawn(move || {
        fault(&mut vcpu, lo(0), Access::read());
        vcpu
    });
    // Half a word, as in `a_mark_meets_a_write`.
    guest.mmu.write_phys(Gpa(PAGE), &((to(2) & !bit) as u32).to_le_bytes());
    drop(walker.join().unwrap());
    guest.audit("R35", |found| {
        entry("not present and accessed")(found) || entry("grant writing, they do not")(found)
    });
}

model!(r35_fault_meets_a_cleared_a, r35_fault_meets_a_cleared_a_mutant, "R35:", || {
    a_fault_meets_a_cleared_bit(bits::A)
});

model!(r35_fault_meets_a_cleared_d, r35_fault_meets_a_cleared_d_mutant, "R35:", || {
    a_fault_meets_a_cleared_bit(bits::D)
});

/// The host writes a guest table past the engine, and says so, while the first fault on it makes the
/// shadow page of the table and the entry.
fn a_fault_meets_a_write_that_passes_by() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(hi(0), Access::read());
    let walker = spawn(move || {
        fault(&mut vcpu, lo(0), Access::read());
        vcpu
    });
    guest.swap(Gpa(PAGE), to(3));
    guest.mmu.note_write(Gpa(PAGE), 8);
    drop(walker.join().unwrap());
    guest.audit("R36", entry("another page than"));
}

model!(
    r36_fault_meets_a_write_that_passes_by,
    r36_fault_meets_a_write_that_passes_by_mutant,
    "R36:",
    a_fault_meets_a_write_that_passes_by
);

/// The fault of this number in a row is emulated, in a model.
const PATIENCE: u64 = 4;

/// A vCPU's store comes to nothing time after time: what its faults map others take away.
fn a_store_meets_zaps() {
    let guest = Guest::new(3, 8);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut cpu = guest.soft();
    // But for the last two times, which are the threads'.
    while cpu.vcpu().faults() < PATIENCE - 2 {
        fault(cpu.vcpu_mut(), lo(0), Access::write());
        guest.forget(1, 0);
    }
    let zapper = {
        let guest = guest.clone();
        spawn(move || {
            guest.mmu.zap_all();
            guest.mmu.zap_all();
        })
    };
    cpu.session().store(lo(0), &7u64.to_le_bytes(), false).unwrap();
    assert!(cpu.vcpu().faults() <= PATIENCE, "R25: a store gets nowhere");
    zapper.join().unwrap();
    assert_eq!(guest.read(Gpa(2 * PAGE)), 7);
    drop(cpu);
    guest.audit_clean();
}

model!(r25_store_meets_zaps, r25_store_meets_zaps_mutant, "R25:", a_store_meets_zaps);
