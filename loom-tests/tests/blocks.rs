// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Blocks of memory that one leaf maps whole: R20, R21. In a model a block has two pages.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, entry, fault, hi, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::{DirtyMode, SlotFlags, SlotId};
use mmu_core::paging::{Access, bits};

/// The block, and the leaf table in it.
const BLOCK: u64 = 4;
const TABLE: u64 = 5;

/// The block is at `hi(0)`, by a large page of the guest's. The table in it maps page 2 at `lo(0)`.
fn guest() -> Guest {
    let guest = Guest::with_blocks(6, 4);
    guest.set(0, 0, to(TABLE));
    guest.set(0, 1, to(BLOCK) | bits::PS);
    guest.set(TABLE, 0, to(2));
    guest
}

/// A fault maps a block whole while another begins to shadow a guest table in it.
fn a_block_meets_a_new_table() {
    let guest = guest();
    let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
    // The root is there.
    let _ = (a.fault(lo(1), Access::read()), b.fault(lo(1), Access::read()));
    let mapper = spawn(move || {
        fault(&mut a, hi(0), Access::write());
        a
    });
    fault(&mut b, lo(0), Access::read());
    drop(mapper.join().unwrap());
    guest.audit("R20", entry("maps a block with a guest table in it"));
    drop(b);
}

model!(
    r20_block_meets_a_new_table,
    r20_block_meets_a_new_table_mutant,
    "R20:",
    a_block_meets_a_new_table
);

/// A processor stores through a block to a guest table in it while a fault begins to shadow the table.
fn a_store_through_a_block_meets_a_new_table() {
    let guest = guest();
    guest.write(Gpa(2 * PAGE), 2);
    guest.write(Gpa(3 * PAGE), 3);
    let (mut cpu, mut vcpu) = (guest.soft(), guest.vcpu());
    cpu.session().store(hi(1), &to(2).to_le_bytes(), false).unwrap();
    assert_eq!(guest.mmu.stats().pf_large, 1);
    let processor = spawn(move || {
        cpu.session().store(hi(1), &to(3).to_le_bytes(), false).unwrap();
        cpu
    });
    fault(&mut vcpu, lo(0), Access::read());
    let mut cpu = processor.join().unwrap();
    let seen = cpu.session().load_u64(lo(0), false).unwrap();
    assert_eq!(seen, 3, "R21: a write through a block to a shadowed table was not seen");
    drop((cpu, vcpu));
    guest.audit_clean();
}

model!(
    r21_store_meets_a_new_table,
    r21_store_meets_a_new_table_mutant,
    "R21:",
    a_store_through_a_block_meets_a_new_table
);

/// A dirty log is switched on while a processor stores through a block, and then harvested.
fn a_store_through_a_block_meets_a_new_log() {
    let guest = Guest::with_blocks(6, 4);
    guest.set(0, 1, to(BLOCK) | bits::PS);
    let mut cpu = guest.soft();
    cpu.session().store(hi(0), &1u64.to_le_bytes(), false).unwrap();
    assert_eq!(guest.mmu.stats().pf_large, 1);
    let processor = spawn(move || {
        cpu.session().store(hi(0), &2u64.to_le_bytes(), false).unwrap();
        cpu
    });
    let flags = SlotFlags { dirty: DirtyMode::WriteProtect, ..SlotFlags::default() };
    guest.mmu.set_slot_flags(SlotId(0), flags).unwrap();
    // From here on the log has every write.
    let mut copy = guest.read(Gpa(BLOCK * PAGE));
    let cpu = processor.join().unwrap();
    let mut bitmap = [0];
    guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
    if bitmap[0] >> BLOCK & 1 != 0 {
        copy = guest.read(Gpa(BLOCK * PAGE));
    }
    assert_eq!(copy, 2, "R21: a write through a block is in no log");
    drop(cpu);
    guest.audit_clean();
}

model!(
    r21_store_meets_a_new_log,
    r21_store_meets_a_new_log_mutant,
    "R21:",
    a_store_through_a_block_meets_a_new_log
);
