// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shadow pages that are made, linked and torn down at the same time: R4, R5, R6, R8,
//! R15, R17, R18, R19.
#![cfg(loom)]

use loom::thread;
use loom_tests::{Guest, PAGE, entry, explore, fault, hi, lo, mutant, to};
use mmu_core::addr::Gpa;
use mmu_core::memory::SlotId;
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::Disagreement;
use mmu_core::vcpu::Entry;

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
    let recycler = thread::spawn(move || {
        // The first attempt tears the table down, the next one takes its frame if it may.
        let _ = (0..3).find(|_| vcpu.fault(hi(0), Access::read()).is_ok());
        vcpu
    });
    let seen = cpu.session().load_u64(lo(0), false).unwrap();
    assert_eq!(seen, 5, "R04: a walk went on in a frame that was reused");
    drop((cpu, recycler.join().unwrap(), b, c));
    guest.audit_clean();
}

#[test]
fn r04_processor_meets_recycling() {
    explore("r04_processor_meets_recycling", a_processor_meets_recycling);
}

#[test]
#[should_panic(expected = "R04:")]
fn r04_processor_meets_recycling_mutant() {
    mutant("R04", || explore("r04_processor_meets_recycling_mutant", a_processor_meets_recycling));
}

/// A fault fills an entry of a table that is being torn down.
fn an_install_meets_a_zap() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(3));
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    let walker = thread::spawn(move || {
        // Once: frames are few, and whether it succeeds is not the question.
        let _ = vcpu.fault(lo(1), Access::read());
        vcpu
    });
    guest.mmu.zap_all();
    drop(walker.join().unwrap());
    guest.audit("R05", |found| matches!(found, Disagreement::Dead { .. }));
}

#[test]
fn r05_install_meets_a_zap() {
    explore("r05_install_meets_a_zap", an_install_meets_a_zap);
}

#[test]
#[should_panic(expected = "R05:")]
fn r05_install_meets_a_zap_mutant() {
    mutant("R05", || explore("r05_install_meets_a_zap_mutant", an_install_meets_a_zap));
}

/// Two faults make the shadow page of one table.
fn two_faults_make_one_page() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(3));
    let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
    // The root's is there.
    let _ = (a.fault(hi(0), Access::read()), b.fault(hi(0), Access::read()));
    let other = thread::spawn(move || {
        fault(&mut a, lo(0), Access::read());
        a
    });
    fault(&mut b, lo(1), Access::read());
    let a = other.join().unwrap();
    let hash = |found: &Disagreement| matches!(found, Disagreement::Hash { .. });
    let report = guest.audit("R06", hash);
    let stats = guest.mmu.stats();
    assert_eq!((report.pages, stats.mmu_cache_miss), (2, 2), "R06: counted twice");
    assert_eq!(report.retired, stats.mmu_cache_race, "R06: a frame was lost");
    drop((a, b));
}

#[test]
fn r06_two_faults_make_one_page() {
    explore("r06_two_faults_make_one_page", two_faults_make_one_page);
}

#[test]
#[should_panic(expected = "R06:")]
fn r06_two_faults_make_one_page_mutant() {
    mutant("R06", || explore("r06_two_faults_make_one_page_mutant", two_faults_make_one_page));
}

/// A slot is deleted while a fault maps its page.
fn a_fault_meets_the_end_of_its_slot() {
    let guest = Guest::new(2, 4);
    guest.mmu.create_slot(Guest::slot(1, 4, 1)).unwrap();
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(4));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(lo(1), Access::read());
    let walker = thread::spawn(move || {
        let _ = vcpu.fault(lo(0), Access::read());
        vcpu
    });
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    drop(walker.join().unwrap());
    guest.audit("R08", entry("without memory"));
}

#[test]
fn r08_fault_meets_the_end_of_its_slot() {
    explore("r08_fault_meets_the_end_of_its_slot", a_fault_meets_the_end_of_its_slot);
}

#[test]
#[should_panic(expected = "R08:")]
fn r08_fault_meets_the_end_of_its_slot_mutant() {
    mutant("R08", || {
        explore("r08_fault_meets_the_end_of_its_slot_mutant", a_fault_meets_the_end_of_its_slot)
    });
}

/// Two faults map one page at two addresses.
fn two_faults_map_one_page() {
    let guest = Guest::new(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(2));
    let (mut a, mut b) = (guest.vcpu(), guest.vcpu());
    // Everything but the two entries is there.
    fault(&mut a, lo(0), Access::read());
    fault(&mut b, lo(1), Access::read());
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(2));
    let other = thread::spawn(move || {
        fault(&mut a, lo(0), Access::read());
        a
    });
    fault(&mut b, lo(1), Access::read());
    drop(other.join().unwrap());
    let rmap = |found: &Disagreement| matches!(found, Disagreement::Links { list: "rmap", .. });
    assert_eq!(guest.audit("R15", rmap).sptes, 2);
}

#[test]
fn r15_two_faults_map_one_page() {
    explore("r15_two_faults_map_one_page", two_faults_map_one_page);
}

#[test]
#[should_panic(expected = "R15:")]
fn r15_two_faults_map_one_page_mutant() {
    mutant("R15", || explore("r15_two_faults_map_one_page_mutant", two_faults_map_one_page));
}

/// A fault maps a page that has two entries, more than fit in a word, while a guest write takes one
/// of them away. Without a twin: what a torn list does is not the rule's own assertion.
fn an_entry_goes_while_another_comes() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(0, 1, to(2));
    guest.set(1, 0, to(3));
    guest.set(1, 1, to(3));
    guest.set(2, 0, to(3));
    let mut vcpu = guest.vcpu();
    for gva in [hi(0), lo(0), lo(1)] {
        fault(&mut vcpu, gva, Access::read());
    }
    // Everything for the address but its entry is there.
    guest.set(2, 0, to(3));
    let comes = thread::spawn(move || {
        fault(&mut vcpu, hi(0), Access::read());
        vcpu
    });
    guest.set(1, 0, 0);
    drop(comes.join().unwrap());
    let rmap = |found: &Disagreement| matches!(found, Disagreement::Links { list: "rmap", .. });
    assert_eq!(guest.audit("R15", rmap).sptes, 2);
}

#[test]
fn r15_entry_goes_while_another_comes() {
    explore("r15_entry_goes_while_another_comes", an_entry_goes_while_another_comes);
}

/// A fault links a shadow page that another tears down for its frame.
fn a_link_meets_recycling() {
    // Roots in pages 0, 1 and 2; the first two share the table in page 3.
    let guest = Guest::new(6, 4);
    guest.set(0, 0, to(3));
    guest.set(0, 1, to(4));
    guest.set(1, 0, to(3));
    guest.set(3, 0, to(5));
    guest.set(4, 0, to(5));
    let (mut a, mut b, mut c) = (guest.vcpu_at(0), guest.vcpu_at(1), guest.vcpu_at(2));
    fault(&mut a, lo(0), Access::read());
    let _ = b.fault(hi(0), Access::read());
    let _ = c.fault(lo(0), Access::read());
    let recycler = thread::spawn(move || {
        // All four frames are in use: the shared table is the one that can go.
        assert!(a.fault(hi(0), Access::read()).is_err());
        a
    });
    let _ = b.fault(lo(0), Access::read());
    drop(recycler.join().unwrap());
    guest.audit("R17", |found| match found {
        Disagreement::Dead { why, .. } => why.contains("still point"),
        Disagreement::Entry { why, .. } => why.contains("a dead page"),
        _ => false,
    });
}

#[test]
fn r17_link_meets_recycling() {
    explore("r17_link_meets_recycling", a_link_meets_recycling);
}

#[test]
#[should_panic(expected = "R17:")]
fn r17_link_meets_recycling_mutant() {
    mutant("R17", || explore("r17_link_meets_recycling_mutant", a_link_meets_recycling));
}

/// A shadow page is torn down while it is being made.
fn a_page_in_the_making_meets_a_zap() {
    let guest = Guest::new(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(hi(0), Access::read());
    let zapper = {
        let guest = guest.clone();
        thread::spawn(move || guest.mmu.zap_all())
    };
    let _ = vcpu.fault(lo(0), Access::read());
    zapper.join().unwrap();
    guest.audit("R18", |found| matches!(found, Disagreement::Links { list: "shadows", .. }));
    drop(vcpu);
}

#[test]
fn r18_page_in_the_making_meets_a_zap() {
    explore("r18_page_in_the_making_meets_a_zap", a_page_in_the_making_meets_a_zap);
}

#[test]
#[should_panic(expected = "R18:")]
fn r18_page_in_the_making_meets_a_zap_mutant() {
    mutant("R18", || {
        explore("r18_page_in_the_making_meets_a_zap_mutant", a_page_in_the_making_meets_a_zap)
    });
}

/// A vCPU whose root was torn down enters the guest while another guest table needs a frame for its
/// shadow page.
fn a_dead_root_meets_a_new_one() {
    let guest = Guest::new(5, 4);
    guest.set(1, 0, to(3));
    guest.set(3, 0, to(4));
    let (mut vcpu, mut other, mut third) = (guest.vcpu(), guest.vcpu_at(1), guest.vcpu_at(2));
    let _ = vcpu.fault(lo(0), Access::read());
    let _ = third.fault(lo(0), Access::read());
    fault(&mut other, lo(0), Access::read());
    // All four frames were in use; two are roots that their vCPUs still hold.
    guest.mmu.zap_all();
    let entering = thread::spawn(move || {
        let entered = vcpu.enter(false, |_| ());
        vcpu.leave();
        (vcpu, entered)
    });
    // Nothing is mapped there: this makes the root's shadow page alone.
    let _ = other.fault(lo(1), Access::read());
    let (vcpu, entered) = entering.join().unwrap();
    if let (Ok(Entry::Run { root, .. }), Ok(Entry::Run { root: others, .. })) =
        (entered, other.enter(false, |_| ()))
    {
        assert_ne!(root, others, "R19: a vCPU runs on the root of another guest table");
    }
    drop((vcpu, other, third));
    guest.audit_clean();
}

#[test]
fn r19_dead_root_meets_a_new_one() {
    explore("r19_dead_root_meets_a_new_one", a_dead_root_meets_a_new_one);
}

#[test]
#[should_panic(expected = "R19:")]
fn r19_dead_root_meets_a_new_one_mutant() {
    mutant("R19", || explore("r19_dead_root_meets_a_new_one_mutant", a_dead_root_meets_a_new_one));
}
