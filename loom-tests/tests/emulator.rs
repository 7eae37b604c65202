// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulator's accessors: writes to a guest table against faults that begin to shadow it (R2), and
//! patches of code against who fetches it (R38, R39).
#![cfg(loom)]

use loom_tests::{Guest, PAGE, entry, fault, hi, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::paging::Access;
use mmu_core::vcpu::Vcpu;

/// The guest maps an address elsewhere by an emulated instruction while another vCPU's first fault on
/// it makes the shadow page of the table and the entry.
fn an_emulated_write_meets_a_fault(write: fn(&Vcpu)) {
    let guest = Guest::new(5, 6);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(3));
    // The guest's own way to the table in page 1.
    guest.set(0, 1, to(2));
    guest.set(2, 0, to(1));
    let (emulator, mut vcpu) = (guest.vcpu(), guest.vcpu());
    // The root's shadow page is not what this is about.
    let _ = vcpu.fault(hi(1), Access::read());
    let walker = spawn(move || {
        fault(&mut vcpu, lo(0), Access::read());
        vcpu
    });
    write(&emulator);
    drop(walker.join().unwrap());
    assert_eq!(guest.read(Gpa(PAGE)), to(4));
    guest.audit("R02", entry("another page than"));
}

model!(
    r02_emulated_exchange_meets_a_fault,
    r02_emulated_exchange_meets_a_fault_mutant,
    "R02:",
    || an_emulated_write_meets_a_fault(|vcpu| {
        let done = vcpu.cmpxchg(hi(0), 8, to(3).into(), to(4).into(), Access::write());
        assert_eq!(done, Ok(Ok(())));
    })
);

model!(r02_emulated_store_meets_a_fault, r02_emulated_store_meets_a_fault_mutant, "R02:", || {
    an_emulated_write_meets_a_fault(|vcpu| {
        let left = vcpu.write_emulated(hi(0), &to(4).to_le_bytes(), Access::write());
        assert_eq!(left, Ok(vec![]));
    });
});

model!(r02_pinned_write_meets_a_fault, r02_pinned_write_meets_a_fault_mutant, "R02:", || {
    an_emulated_write_meets_a_fault(|vcpu| {
        let pinned = vcpu.pin(hi(0), 8, Access::write()).unwrap();
        pinned.write(0, &to(4).to_le_bytes()).unwrap();
    });
});

/// The page of the code, and where the instruction begins: it crosses the border of two words.
const CODE: u64 = 2;
const AT: u64 = 6;
const OLD: [u8; 4] = [0x11; 4];
const NEW: [u8; 4] = [0xee; 4];

fn guest_with_code() -> Guest {
    let guest = Guest::new(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(CODE));
    guest.mmu.write_phys(Gpa(CODE * PAGE + AT), &OLD);
    guest
}

/// A processor that has the page mapped fetches an instruction while it is patched.
fn a_fetch_meets_a_patch() {
    let guest = guest_with_code();
    let mut cpu = guest.soft();
    let mut code = [0; 4];
    cpu.session().fetch(lo(0).wrapping_add(AT), &mut code, false).unwrap();
    let processor = spawn(move || {
        let mut code = [0; 4];
        cpu.session().fetch(lo(0).wrapping_add(AT), &mut code, false).unwrap();
        assert!(matches!(code, OLD | NEW), "R38: a torn instruction: {code:x?}");
        cpu
    });
    assert_eq!(guest.mmu.patch_code(Gpa(CODE * PAGE + AT), &OLD, &NEW), Ok(true));
    drop(processor.join().unwrap());
    guest.audit_clean();
}

model!(r38_fetch_meets_a_patch, r38_fetch_meets_a_patch_mutant, "R38:", a_fetch_meets_a_patch);

/// The emulator, which maps nothing, fetches an instruction while it is patched there and back.
fn an_emulated_fetch_meets_a_patch() {
    let guest = guest_with_code();
    let vcpu = guest.vcpu();
    let emulator = spawn(move || {
        let mut code = [0; 4];
        vcpu.read(lo(0).wrapping_add(AT), &mut code, Access::execute()).unwrap();
        assert!(matches!(code, OLD | NEW), "R39: a torn instruction: {code:x?}");
        vcpu
    });
    let gpa = Gpa(CODE * PAGE + AT);
    assert_eq!(guest.mmu.patch_code(gpa, &OLD, &NEW), Ok(true));
    assert_eq!(guest.mmu.patch_code(gpa, &NEW, &OLD), Ok(true));
    drop(emulator.join().unwrap());
    guest.audit_clean();
}

model!(
    r39_emulated_fetch_meets_a_patch,
    r39_emulated_fetch_meets_a_patch_mutant,
    "R39:",
    an_emulated_fetch_meets_a_patch
);
