// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log against faults and against a processor inside the guest: R10, R11, R12, R13, R22.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, entry, fault, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::{DirtyMode, DirtyPage, DirtyRing, SlotFlags, SlotId};
use mmu_core::paging::Access;
use mmu_core::shadow::PageRange;
use mmu_core::sync::Ordering;
use mmu_core::vcpu::SoftVcpu;
use std::sync::Arc;

/// The page that the guest writes.
const DATA: u64 = 2;

fn guest_with(dirty: DirtyMode) -> Guest {
    let guest = Guest::tracking(3, 4, dirty);
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
    let guest = guest_with(DirtyMode::WriteProtect);
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    harvest(&guest);
    let writer = spawn(move || {
        fault(&mut vcpu, lo(0), Access::write());
        vcpu
    });
    harvest(&guest);
    drop(writer.join().unwrap());
    guest.audit("R13", entry("not in the dirty log"));
}

model!(
    r13_harvest_meets_a_write_fault,
    r13_harvest_meets_a_write_fault_mutant,
    "R13:",
    a_harvest_meets_a_write_fault
);

/// A dirty log is switched on while a fault makes a page writable.
fn a_new_log_meets_a_write_fault() {
    let guest = guest_with(DirtyMode::Off);
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    let writer = spawn(move || {
        fault(&mut vcpu, lo(0), Access::write());
        vcpu
    });
    let flags = SlotFlags { dirty: DirtyMode::WriteProtect, ..SlotFlags::default() };
    guest.mmu.set_slot_flags(SlotId(0), flags).unwrap();
    drop(writer.join().unwrap());
    guest.audit("R13", entry("not in the dirty log"));
}

model!(
    r13_new_log_meets_a_write_fault,
    r13_new_log_meets_a_write_fault_mutant,
    "R13:",
    a_new_log_meets_a_write_fault
);

/// A page that the VMM has pinned and written is released while it is harvested.
fn a_harvest_meets_the_end_of_a_pin() {
    let guest = guest_with(DirtyMode::WriteProtect);
    harvest(&guest);
    let pin = guest.mmu.pin_page(Gpa(DATA * PAGE), true).unwrap();
    pin.words()[0].store(5, Ordering::Relaxed);
    let vmm = spawn(move || drop(pin));
    let reported = harvest(&guest);
    vmm.join().unwrap();
    assert!(reported, "R13: a page pinned for writing is not in a harvest");
    guest.audit_clean();
}

model!(
    r13_harvest_meets_the_end_of_a_pin,
    r13_harvest_meets_the_end_of_a_pin_mutant,
    "R13:",
    a_harvest_meets_the_end_of_a_pin
);

/// One round of a live migration while the guest stores, then the last round with the guest
/// stopped: `round` says whether the page is to be copied. With `warm`, the processor may write the
/// page when it begins.
fn a_copy_is_complete(rule: &str, dirty: DirtyMode, warm: bool, round: fn(&Guest) -> bool) {
    let guest = guest_with(dirty);
    let mut cpu = guest.soft();
    if warm {
        cpu.session().store(lo(0), &[0xff; 8], false).unwrap();
    } else {
        harvest(&guest);
    }
    let stores = if warm { 1 } else { 2 };
    let processor = spawn(move || {
        store_up_to(&mut cpu, stores);
        cpu
    });
    let mut copy = 0;
    if round(&guest) {
        copy = guest.read(Gpa(DATA * PAGE));
    }
    let cpu = processor.join().unwrap();
    if round(&guest) {
        copy = guest.read(Gpa(DATA * PAGE));
    }
    assert_eq!(copy, stores, "{rule}: no harvest reported the last store");
    drop(cpu);
    guest.audit_clean();
}

/// Stores 1, 2 and so on to one word.
fn store_up_to(cpu: &mut SoftVcpu, last: u64) {
    let mut session = cpu.session();
    for value in 1..=last {
        session.store(lo(0), &value.to_le_bytes(), false).unwrap();
    }
}

model!(r13_copy_is_complete, r13_copy_is_complete_mutant, "R13:", || {
    a_copy_is_complete("R13", DirtyMode::WriteProtect, false, harvest);
});

/// The guest points an entry elsewhere while the page that it named is harvested and a processor
/// stores through what it remembers: the harvest finds nothing to protect, but somebody's flush is
/// still to come.
fn a_harvest_meets_an_edit() {
    let guest = Guest::tracking(4, 4, DirtyMode::WriteProtect);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(DATA));
    let mut cpu = guest.soft();
    cpu.session().store(lo(0), &[0xff; 8], false).unwrap();
    let processor = spawn(move || {
        store_up_to(&mut cpu, 2);
        cpu
    });
    let editor = {
        let guest = guest.clone();
        spawn(move || guest.set(1, 0, to(DATA + 1)))
    };
    let round = |copy: &mut u64| {
        if harvest(&guest) {
            *copy = guest.read(Gpa(DATA * PAGE));
        }
    };
    let mut copy = 0;
    round(&mut copy);
    let cpu = processor.join().unwrap();
    editor.join().unwrap();
    round(&mut copy);
    assert_eq!(copy, guest.read(Gpa(DATA * PAGE)), "R12: no harvest reported the last store");
    drop(cpu);
    guest.audit_clean();
}

model!(
    r12_harvest_meets_an_edit,
    r12_harvest_meets_an_edit_mutant,
    "R12:",
    2,
    a_harvest_meets_an_edit
);

/// A fault gives an entry its right to write back without a walk, while the entry comes to map another
/// page.
fn a_repair_meets_another_page() {
    let guest = Guest::tracking(4, 4, DirtyMode::WriteProtect);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(DATA));
    let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
    fault(&mut a, lo(0), Access::read());
    fault(&mut b, lo(0), Access::read());
    harvest(&guest);
    let repairer = spawn(move || {
        fault(&mut a, lo(0), Access::write());
        a
    });
    guest.set(1, 0, to(DATA + 1));
    fault(&mut b, lo(0), Access::read());
    drop((repairer.join().unwrap(), b));
    guest.audit("R10", entry("not in the dirty log"));
}

model!(
    r10_repair_meets_another_page,
    r10_repair_meets_another_page_mutant,
    "R10:",
    a_repair_meets_another_page
);

/// Looks at the log first, and clears it then.
fn peek_and_clear(guest: &Guest) -> bool {
    let mut bitmap = [0];
    guest.mmu.peek_dirty_log(SlotId(0), &mut bitmap).unwrap();
    guest.mmu.clear_dirty_log(SlotId(0), 0, &bitmap).unwrap();
    bitmap[0] >> DATA & 1 != 0
}

model!(r13_copy_by_peek_and_clear, r13_copy_by_peek_and_clear_mutant, "R13:", || {
    a_copy_is_complete("R13", DirtyMode::WriteProtect, false, peek_and_clear);
});

/// The same by the ring that lists the pages.
fn a_copy_by_ring() {
    let guest = guest_with(DirtyMode::WriteProtect);
    harvest(&guest);
    let ring = Arc::new(DirtyRing::new(4).unwrap());
    let mut cpu = guest.soft();
    cpu.vcpu_mut().set_dirty_ring(Some(Arc::clone(&ring)));
    let processor = spawn(move || {
        store_up_to(&mut cpu, 2);
        cpu
    });
    let round = || {
        // loom does not see that the ring's own load races with a push, which loads the same word
        // before it stores there; it sees this one.
        guest.mmu.peek_dirty_log(SlotId(0), &mut [0]).unwrap();
        let mut pages = [DirtyPage { slot: SlotId(9), page: 9 }; 4];
        let listed = ring.collect(&mut pages);
        guest.mmu.reset_dirty_pages(&pages[..listed]).unwrap();
        let copy = pages.iter().any(|page| page.page == DATA);
        copy.then(|| guest.read(Gpa(DATA * PAGE)))
    };
    let first = round();
    let cpu = processor.join().unwrap();
    let copy = round().or(first);
    assert_eq!(copy, Some(2), "R13: no ring listed the last store");
    drop(cpu);
    guest.audit_clean();
}

model!(r13_copy_by_ring, r13_copy_by_ring_mutant, "R13:", a_copy_by_ring);

/// A harvest of dirty bits after the entry was taken away through which the guest stores.
fn zap_and_harvest(guest: &Guest) -> bool {
    // What was derived from the table goes.
    let table = PageRange::Guest { base: Gpa(PAGE), size: PAGE };
    guest.mmu.set_host_writable(table, true).unwrap();
    harvest(guest)
}

model!(r11_copy_meets_a_zap, r11_copy_meets_a_zap_mutant, "R11:", 2, || {
    a_copy_is_complete("R11", DirtyMode::DirtyBits, false, zap_and_harvest);
});

model!(r22_flush_request_meets_an_entry, r22_flush_request_meets_an_entry_mutant, "R22:", || {
    a_copy_is_complete("R22", DirtyMode::WriteProtect, true, harvest);
});
