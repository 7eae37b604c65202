// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Leaf tables that the guest writes natively, against flushes and links: R3, R16, R23, R33, R34.
#![cfg(loom)]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom_tests::{Guest, PAGE, fault, hi, lo, model, spawn, to};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::paging::Access;
use mmu_core::shadow::Disagreement;
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use std::sync::Arc;

/// The leaf table.
const TABLE: u64 = 1;
/// A second root table, or the table of a window on the first.
const OTHER: u64 = 2;
/// The pages that the leaf table's first entry names.
const BEFORE: u64 = 3;
const AFTER: u64 = 4;

/// A guest whose leaf table maps itself: the data is at `lo(0)`, the table at `lo(1)`.
fn guest() -> Guest {
    let guest = Guest::native(5, 4);
    guest.set(0, 0, to(TABLE));
    guest.set(TABLE, 0, to(BEFORE));
    guest.set(TABLE, 1, to(TABLE));
    for page in [BEFORE, AFTER] {
        guest.write(Gpa(page * PAGE), page);
    }
    guest
}

/// Stores to the leaf table's first entry through `window`.
fn point_at(cpu: &mut SoftVcpu, window: Gva, page: u64) {
    cpu.session().store(window, &to(page).to_le_bytes(), false).unwrap();
}

fn unmarked(found: &Disagreement) -> bool {
    matches!(found, Disagreement::Unmarked { .. })
}

fn load(cpu: &mut SoftVcpu) -> u64 {
    cpu.session().load_u64(lo(0), false).unwrap()
}

fn invlpg(cpu: &mut SoftVcpu) {
    cpu.invlpg(lo(0));
}

fn load_cr3(cpu: &mut SoftVcpu) {
    let cr3 = cpu.vcpu().regs().cr3;
    cpu.vcpu_mut().set_cr3(cr3).unwrap();
}

/// A processor writes a table natively, which was in sync, and tells another one, which flushes.
fn a_native_write_meets(flush: fn(&mut SoftVcpu)) {
    let guest = guest();
    let (mut a, mut b) = (guest.soft(), guest.soft());
    assert_eq!((load(&mut a), load(&mut b)), (BEFORE, BEFORE));
    let told = Arc::new(AtomicBool::new(false));
    let writer = {
        let told = Arc::clone(&told);
        spawn(move || {
            point_at(&mut a, lo(1), AFTER);
            told.store(true, Ordering::Release);
            a
        })
    };
    let heard = told.load(Ordering::Acquire);
    flush(&mut b);
    let seen = load(&mut b);
    assert!(!heard || seen == AFTER, "R03: a flush did not see a write before it");
    drop(writer.join().unwrap());
    flush(&mut b);
    assert_eq!(load(&mut b), AFTER, "R03: a flush did not see a write before it");
    drop(b);
    guest.audit("R03", unmarked);
}

model!(r03_native_write_meets_invlpg, r03_native_write_meets_invlpg_mutant, "R03:", || {
    a_native_write_meets(invlpg);
});

model!(r03_native_write_meets_a_flush, r03_native_write_meets_a_flush_mutant, "R03:", || {
    a_native_write_meets(SoftVcpu::flush);
});

model!(r03_native_write_meets_cr3, r03_native_write_meets_cr3_mutant, "R03:", || {
    a_native_write_meets(load_cr3);
});

/// One vCPU marks a table for a write, through the `window` that it has on it; another, which finds it
/// marked, writes it and flushes.
fn two_markers(window: Gva, flush: fn(&mut SoftVcpu)) {
    let guest = guest();
    guest.set(0, 1, to(OTHER));
    guest.set(OTHER, 0, to(TABLE));
    let (mut a, mut b) = (guest.vcpu(), guest.soft());
    assert_eq!(load(&mut b), BEFORE);
    fault(&mut a, window, Access::read());
    let marker = spawn(move || {
        fault(&mut a, window, Access::write());
        a
    });
    point_at(&mut b, lo(1), AFTER);
    flush(&mut b);
    assert_eq!(load(&mut b), AFTER, "R33: the tables above did not know of a write");
    drop((marker.join().unwrap(), b));
    guest.audit("R33", unmarked);
}

model!(r33_two_markers_meet_invlpg, r33_two_markers_meet_invlpg_mutant, "R33:", 1, || {
    two_markers(lo(1), invlpg);
});

model!(r33_two_markers_meet_a_flush, r33_two_markers_meet_a_flush_mutant, "R33:", 1, || {
    two_markers(lo(1), SoftVcpu::flush);
});

model!(r33_two_windows_meet_invlpg, r33_two_windows_meet_invlpg_mutant, "R33:", 2, || {
    two_markers(hi(0), invlpg);
});

model!(r33_two_windows_meet_a_flush, r33_two_windows_meet_a_flush_mutant, "R33:", 2, || {
    two_markers(hi(0), SoftVcpu::flush);
});

/// A flush finds a table settled and takes it out of the set of the table above, while a processor
/// writes it natively again.
fn a_flush_meets_a_marker() {
    let guest = guest();
    let (mut a, mut b) = (guest.soft(), guest.soft());
    assert_eq!(load(&mut b), BEFORE);
    // Written, and not changed: the first flush begins to settle it.
    point_at(&mut a, lo(1), BEFORE);
    assert_eq!(load(&mut a), BEFORE);
    a.flush();
    let writer = spawn(move || {
        point_at(&mut a, lo(1), AFTER);
        a.flush();
        assert_eq!(load(&mut a), AFTER, "R16: a set lost a table that was written natively");
        a
    });
    b.flush();
    drop((writer.join().unwrap(), b));
    guest.audit("R16", unmarked);
}

model!(
    r16_flush_meets_a_marker,
    r16_flush_meets_a_marker_mutant,
    "R16:",
    2,
    a_flush_meets_a_marker
);

/// A table is settled while a processor that could write it natively does.
fn settling_meets_a_write() {
    let guest = guest();
    let (mut a, mut b) = (guest.soft(), guest.soft());
    point_at(&mut b, lo(1), BEFORE);
    assert_eq!((load(&mut a), load(&mut b)), (BEFORE, BEFORE));
    let writer = spawn(move || {
        point_at(&mut b, lo(1), AFTER);
        b.flush();
        assert_eq!(load(&mut b), AFTER, "R23: a write between comparison and end");
        b
    });
    // Begins it, and ends it.
    a.flush();
    a.flush();
    drop((writer.join().unwrap(), a));
    guest.audit("R23", unmarked);
}

model!(
    r23_settling_meets_a_write,
    r23_settling_meets_a_write_mutant,
    "R23:",
    1,
    settling_meets_a_write
);

/// The end of it, where the processor is inside and remembers that it could write.
fn the_end_of_settling_meets_a_write() {
    let guest = guest();
    let (mut a, mut b) = (guest.soft(), guest.soft());
    let mut inside = b.session();
    inside.store(lo(1), &to(BEFORE).to_le_bytes(), false).unwrap();
    assert_eq!(inside.load_u64(lo(0), false), Ok(BEFORE));
    // With the root it is compared, which begins it.
    assert_eq!(load(&mut a), BEFORE);
    let settler = spawn(move || {
        a.flush();
        a
    });
    inside.store(lo(1), &to(AFTER).to_le_bytes(), false).unwrap();
    inside.flush();
    let seen = inside.load_u64(lo(0), false);
    assert_eq!(seen, Ok(AFTER), "R23: a write between comparison and end");
    drop(inside);
    drop((settler.join().unwrap(), b));
    guest.audit("R23", unmarked);
}

model!(
    r23_end_of_settling_meets_a_write,
    r23_end_of_settling_meets_a_write_mutant,
    "R23:",
    2,
    the_end_of_settling_meets_a_write
);

/// A table is linked below another root while it is written natively for the first time.
fn a_link_meets_a_marker(flush: fn(&mut SoftVcpu)) {
    let guest = guest();
    guest.set(OTHER, 0, to(TABLE));
    let mut a = guest.soft();
    let mut b = guest.mmu.create_soft_vcpu(Guest::regs(OTHER)).unwrap();
    assert_eq!(load(&mut a), BEFORE);
    // The root is there, with nothing in it.
    let _ = b.session().load_u64(hi(0), false);
    let writer = spawn(move || {
        point_at(&mut a, lo(1), AFTER);
        a
    });
    let _ = load(&mut b);
    drop(writer.join().unwrap());
    flush(&mut b);
    assert_eq!(load(&mut b), AFTER, "R34: the new root did not know what is below it");
    drop(b);
    guest.audit("R34", unmarked);
}

model!(r34_link_meets_a_marker, r34_link_meets_a_marker_mutant, "R34:", || {
    a_link_meets_a_marker(SoftVcpu::flush);
});

/// A table is written natively and flushed while it is linked nowhere, or is just being linked. With
/// `marked` it was written before.
fn a_link_meets_a_flush(marked: bool, flush: fn(&mut SoftVcpu)) {
    let guest = guest();
    guest.set(0, 1, to(OTHER));
    guest.set(OTHER, 0, to(TABLE));
    let (mut a, mut b) = (guest.soft(), guest.vcpu());
    let _ = a.session().load_u64(hi(0), false);
    assert_eq!(load(&mut a), BEFORE);
    if marked {
        point_at(&mut a, hi(0), BEFORE);
    }
    guest.set(0, 0, 0);
    a.invlpg(lo(0));
    let _ = b.fault(hi(1), Access::read());
    let writer = spawn(move || {
        point_at(&mut a, hi(0), AFTER);
        flush(&mut a);
        let seen = a.session().load_u64(lo(0), false);
        let right = matches!(seen, Ok(AFTER) | Err(SoftExit::Fault(_)));
        assert!(right, "R34: an entry from before the flush: {seen:?}");
        a
    });
    guest.set(0, 0, to(TABLE));
    fault(&mut b, lo(0), Access::read());
    drop((writer.join().unwrap(), b));
    guest.audit("R34", unmarked);
}

model!(r34_link_meets_invlpg, r34_link_meets_invlpg_mutant, "R34:", 2, || {
    a_link_meets_a_flush(true, invlpg);
});

model!(r34_link_meets_a_flush, r34_link_meets_a_flush_mutant, "R34:", 2, || {
    a_link_meets_a_flush(true, SoftVcpu::flush);
});

model!(r34_new_link_meets_invlpg, r34_new_link_meets_invlpg_mutant, "R34:", 2, || {
    a_link_meets_a_flush(false, invlpg);
});

model!(r34_new_link_meets_a_flush, r34_new_link_meets_a_flush_mutant, "R34:", 2, || {
    a_link_meets_a_flush(false, SoftVcpu::flush);
});
