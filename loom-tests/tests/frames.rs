// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table frames and roots: reuse (R4, R29), the quota (R28), and everything zapped at once (R19).
#![cfg(loom)]

use loom_tests::{Guest, PAGE, fault, hi, lo, model, spawn, to};
use mmu_core::addr::{Gpa, Machine};
use mmu_core::memory::Alias;
use mmu_core::paging::{Access, bits};
use mmu_core::vcpu::{Entry, Vcpu};

/// A processor walks a shadow table while a fault that is short of frames tears the table down and
/// takes its frame.
fn a_processor_meets_recycling() {
    let guest = Guest::new(8, 4);
    guest.set(0, 0, to(3));
    // A large page: its shadow page needs no guest table, so no wait for the table's protection
    // hides a frame that was taken too early.
    guest.set(0, 1, to(6) | bits::PS);
    guest.set(3, 0, to(5));
    guest.write(Gpa(5 * PAGE), 5);
    guest.write(Gpa(6 * PAGE), 6);
    let (mut cpu, mut vcpu) = (guest.soft(), guest.vcpu());
    cpu.session().load_u64(lo(0), false).unwrap();
    let _ = vcpu.fault(lo(1), Access::read());
    // Roots that take the other frames.
    let (mut b, mut c) = (guest.vcpu_at(1), guest.vcpu_at(2));
    let _ = (b.fault(lo(0), Access::read()), c.fault(lo(0), Access::read()));
    let recycler = spawn(move || {
        // The first attempt tears the table down, the next one takes its frame if it may.
        let _ = (0..3).find(|_| vcpu.fault(hi(0), Access::read()).is_ok());
        vcpu
    });
    let seen = cpu.session().load_u64(lo(0), false).unwrap();
    assert_eq!(seen, 5, "R04: a walk went on in a frame that was reused");
    drop((cpu, recycler.join().unwrap(), b, c));
    guest.audit_clean();
}

model!(
    r04_processor_meets_recycling,
    r04_processor_meets_recycling_mutant,
    "R04:",
    2,
    a_processor_meets_recycling
);

/// A vCPU enters the guest while another guest table needs a frame for its shadow page. The root that
/// its processor was told to run on is dead, but it stays on it until it is told another.
fn a_dead_root_meets_a_new_one() {
    let guest = Guest::new(5, 4);
    guest.set(1, 0, to(3));
    guest.set(3, 0, to(4));
    let (mut vcpu, mut other, mut third) = (guest.vcpu(), guest.vcpu_at(1), guest.vcpu_at(2));
    let before = enter(&mut vcpu).unwrap();
    let _ = third.fault(lo(0), Access::read());
    fault(&mut other, lo(0), Access::read());
    // All four frames were in use; two are roots that their vCPUs still hold.
    guest.mmu.zap_all();
    let entering = spawn(move || {
        let now = enter(&mut vcpu);
        (vcpu, now)
    });
    // Nothing is mapped there: this makes the root's shadow page alone.
    let _ = other.fault(lo(1), Access::read());
    let (vcpu, now) = entering.join().unwrap();
    if let Some(others) = enter(&mut other) {
        let root = now.unwrap_or(before);
        assert_ne!(root, others, "R19: a vCPU runs on the root of another guest table");
    }
    drop((vcpu, other, third));
    guest.audit_clean();
}

/// Enters the guest and leaves it; the root to run on, if there was one.
fn enter(vcpu: &mut Vcpu) -> Option<Machine> {
    let entered = vcpu.enter(false, |_| ());
    vcpu.leave();
    match entered {
        Ok(Entry::Run { root, .. }) => Some(root),
        _ => None,
    }
}

model!(
    r19_dead_root_meets_a_new_one,
    r19_dead_root_meets_a_new_one_mutant,
    "R19:",
    2,
    a_dead_root_meets_a_new_one
);

/// An alias shows another page while a processor stores through it.
fn a_store_meets_a_new_alias() {
    const BEFORE: u64 = 2;
    const AFTER: u64 = 3;
    let shows =
        |page: u64| Alias { number: 0, base: Gpa(8 * PAGE), size: PAGE, target: Gpa(page * PAGE) };
    let guest = Guest::new(4, 4);
    guest.mmu.set_alias(shows(BEFORE)).unwrap();
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(8));
    let mut cpu = guest.soft();
    cpu.session().store(lo(0), &1u64.to_le_bytes(), false).unwrap();
    // The next entry drains: what it acknowledges may be later than the root it has found.
    cpu.vcpu_mut().invalidate();
    let processor = spawn(move || {
        cpu.session().store(lo(0), &2u64.to_le_bytes(), false).unwrap();
        cpu
    });
    guest.mmu.set_alias(shows(AFTER)).unwrap();
    guest.swap(Gpa(BEFORE * PAGE), 7);
    drop(processor.join().unwrap());
    let now = guest.swap(Gpa(BEFORE * PAGE), 7);
    assert_eq!(now, 7, "R19: a store where the alias was");
    guest.audit_clean();
}

model!(
    r19_store_meets_a_new_alias,
    r19_store_meets_a_new_alias_mutant,
    "R19:",
    a_store_meets_a_new_alias
);

/// Two vCPUs need a frame each for their roots; the quota has room for one.
fn two_allocations_meet_the_quota() {
    let guest = Guest::new(4, 6);
    guest.mmu.set_nr_mmu_pages(4).unwrap();
    // Roots that are in use, so that nothing can be torn down: three frames.
    let (mut both, mut a, mut b) = (guest.vcpu_at(0), guest.vcpu_at(1), guest.vcpu_at(2));
    let _ = both.fault(lo(0), Access::read());
    let _ = both.fault(lo(0), Access::read().user());
    let _ = a.fault(lo(0), Access::read());
    let other = spawn(move || {
        let _ = a.fault(lo(0), Access::read().user());
        a
    });
    let _ = b.fault(lo(0), Access::read());
    let a = other.join().unwrap();
    let (quota, used) = guest.mmu.nr_mmu_pages();
    assert!(used <= quota, "R28: {used} frames are used, {quota} may be");
    drop((both, a, b));
    guest.audit_clean();
}

model!(
    r28_two_allocations_meet_the_quota,
    r28_two_allocations_meet_the_quota_mutant,
    "R28:",
    two_allocations_meet_the_quota
);
