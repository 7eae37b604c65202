// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host does to guest memory against faults and processors (R7), and threads that must not
//! wait (R32).
#![cfg(loom)]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use loom_tests::{Guest, PAGE, entry, fault, lo, model, spawn, then, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::{Alias, DirtyMode, SlotFlags, SlotId};
use mmu_core::paging::Access;
use mmu_core::shadow::PageRange;
use mmu_core::sync::WouldDeadlock;
use std::sync::Arc;

/// The page that the guest uses.
const DATA: u64 = 2;
const RANGE: PageRange = PageRange::Guest { base: Gpa(DATA * PAGE), size: PAGE };

fn guest() -> Guest {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(DATA));
    guest.set(1, 1, to(3));
    guest
}

/// The host takes a page away while a fault maps it.
fn a_fault_meets_an_invalidation() {
    let guest = guest();
    let mut vcpu = guest.vcpu();
    // Everything but the entry is there.
    fault(&mut vcpu, lo(1), Access::read());
    let walker = spawn(move || {
        let _ = vcpu.fault(lo(0), Access::read());
        vcpu
    });
    let invalidation = guest.mmu.invalidate(RANGE).unwrap();
    drop(walker.join().unwrap());
    guest.audit("R07", entry("taken away"));
    invalidation.end();
}

model!(
    r07_fault_meets_an_invalidation,
    r07_fault_meets_an_invalidation_mutant,
    "R07:",
    a_fault_meets_an_invalidation
);

/// The host takes a page away while a processor stores to it. With `warm` the processor may write it
/// already.
fn a_store_meets_an_invalidation(warm: bool) {
    let guest = guest();
    let mut cpu = guest.soft();
    let first = if warm { lo(0) } else { lo(1) };
    cpu.session().store(first, &1u64.to_le_bytes(), false).unwrap();
    let processor = spawn(move || {
        cpu.session().store(lo(0), &2u64.to_le_bytes(), false).unwrap();
        cpu
    });
    let invalidation = guest.mmu.invalidate(RANGE).unwrap();
    guest.swap(Gpa(DATA * PAGE), 7);
    let now = guest.swap(Gpa(DATA * PAGE), 7);
    assert_eq!(now, 7, "R07: a store to a page that the host has taken away");
    invalidation.end();
    drop(processor.join().unwrap());
    guest.audit_clean();
}

model!(r07_store_meets_an_invalidation, r07_store_meets_an_invalidation_mutant, "R07:", || {
    a_store_meets_an_invalidation(false)
});

model!(
    r07_warm_store_meets_an_invalidation,
    r07_warm_store_meets_an_invalidation_mutant,
    "R07:",
    || a_store_meets_an_invalidation(true)
);

/// The host makes a page read-only while a fault makes its entry writable.
fn a_write_fault_meets_a_read_only_page() {
    let guest = guest();
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(1), Access::read());
    let walker = spawn(move || {
        let _ = vcpu.fault(lo(0), Access::write());
        vcpu
    });
    guest.mmu.set_host_writable(RANGE, false).unwrap();
    drop(walker.join().unwrap());
    guest.audit("R07", entry("the host forbids it"));
}

model!(
    r07_write_fault_meets_a_read_only_page,
    r07_write_fault_meets_a_read_only_page_mutant,
    "R07:",
    a_write_fault_meets_a_read_only_page
);

/// The host makes a page read-only while the emulator writes to it: when the host hears that it is, that
/// write is over.
fn an_emulated_write_meets_a_read_only_page() {
    let guest = guest();
    let vcpu = guest.vcpu();
    let emulator = spawn(move || {
        let _ = vcpu.write(lo(0), &2u64.to_le_bytes(), Access::write());
        vcpu
    });
    guest.mmu.set_host_writable(RANGE, false).unwrap();
    guest.swap(Gpa(DATA * PAGE), 7);
    let now = guest.swap(Gpa(DATA * PAGE), 7);
    assert_eq!(now, 7, "R07: a write to a page that the host has made read-only");
    drop(emulator.join().unwrap());
    guest.audit_clean();
}

model!(
    r07_emulated_write_meets_a_read_only_page,
    r07_emulated_write_meets_a_read_only_page_mutant,
    "R07:",
    an_emulated_write_meets_a_read_only_page
);

/// A vCPU's local APIC moves to a page while another vCPU's fault maps it.
fn a_fault_meets_an_apic() {
    let guest = guest();
    let (mut owner, mut vcpu) = (guest.vcpu(), guest.vcpu());
    // Everything but the entry is there.
    fault(&mut vcpu, lo(1), Access::read());
    let walker = spawn(move || {
        let _ = vcpu.fault(lo(0), Access::read());
        vcpu
    });
    owner.set_apic_page(Some(Gpa(DATA * PAGE))).unwrap();
    drop(walker.join().unwrap());
    guest.audit("R08", entry("local APIC"));
}

model!(r08_fault_meets_an_apic, r08_fault_meets_an_apic_mutant, "R08:", a_fault_meets_an_apic);

/// A thread that resolves page faults of the host asks for everything that waits, while a reader
/// waits for it in the middle of a read section.
fn a_resolver_asks_for_what_waits() {
    let guest = Guest::tracking(2, 4, DirtyMode::WriteProtect);
    let vcpu = guest.vcpu();
    let resolved = Arc::new(AtomicBool::new(false));
    let reader = {
        let resolved = Arc::clone(&resolved);
        spawn(move || {
            let walker = vcpu.walker();
            while !resolved.load(Ordering::Acquire) {
                thread::yield_now();
            }
            drop(walker);
            vcpu
        })
    };
    let _resolver = guest.mmu.resolver();
    let (mmu, slot, page) = (&guest.mmu, SlotId(0), Gpa(PAGE));
    let alias = Alias { number: 0, base: Gpa(8 * PAGE), size: PAGE, target: page };
    let range = PageRange::Guest { base: page, size: PAGE };
    let ask = || {
        [
            mmu.synchronize().is_err(),
            mmu.create_slot(Guest::slot(1, 4, 1)).is_err(),
            mmu.delete_slot(slot).is_err(),
            mmu.move_slot(slot, page).is_err(),
            mmu.set_slot_flags(slot, SlotFlags::default()).is_err(),
            mmu.set_alias(alias).is_err(),
            mmu.invalidate(range).is_err(),
            mmu.set_host_writable(range, false).is_err(),
            mmu.dirty_log(slot, &mut [0]).is_err(),
            mmu.clear_dirty_log(slot, 0, &[1]).is_err(),
            mmu.reset_dirty_pages(&[]).is_err(),
        ]
    };
    let waits = then(ask, || {
        resolved.store(true, Ordering::Release);
        drop(reader.join().unwrap());
    });
    assert!(waits.iter().all(|refused| *refused), "R32: not refused: {waits:?}");
    assert_eq!(mmu.synchronize(), Err(WouldDeadlock::Resolver));
    guest.audit_clean();
}

model!(
    r32_resolver_asks_for_what_waits,
    r32_resolver_asks_for_what_waits_mutant,
    "R32:",
    a_resolver_asks_for_what_waits
);
