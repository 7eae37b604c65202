// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shadow pages that are made, linked and torn down at the same time: R5, R6, R14, R15, R17,
//! R18.
#![cfg(loom)]

use loom_tests::{Guest, PAGE, fault, hi, lo, model, spawn, to};
use mmu_core::addr::Gpa;
use mmu_core::paging::Access;
use mmu_core::shadow::{Disagreement, PageRange};

/// A fault fills an entry of a table that is being torn down.
fn an_install_meets_a_zap() {
    let guest = Guest::new(4, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    guest.set(1, 1, to(3));
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    let walker = spawn(move || {
        // Once: frames are few, and whether it succeeds is not the question.
        let _ = vcpu.fault(lo(1), Access::read());
        vcpu
    });
    // What was derived from the table goes.
    let table = PageRange::Guest { base: Gpa(PAGE), size: PAGE };
    guest.mmu.set_host_writable(table, true).unwrap();
    drop(walker.join().unwrap());
    guest.audit("R05", |found| matches!(found, Disagreement::Dead { .. }));
}

model!(r05_install_meets_a_zap, r05_install_meets_a_zap_mutant, "R05:", an_install_meets_a_zap);

/// Two faults make the shadow page of one table: of the root, behind which nothing is mapped.
fn two_faults_make_one_page() {
    let guest = Guest::new(2, 4);
    let (mut a, mut b, mut c) = (guest.vcpu(), guest.vcpu(), guest.vcpu_at(1));
    // Not what this is about: memory for descriptors.
    fault(&mut c, lo(0), Access::read());
    let other = spawn(move || {
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
    drop((a, b, c));
}

model!(
    r06_two_faults_make_one_page,
    r06_two_faults_make_one_page_mutant,
    "R06:",
    two_faults_make_one_page
);

/// An entry comes to map another page while it is being taken away.
fn a_removal_meets_another_page() {
    let guest = Guest::new(5, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut vcpu = guest.vcpu();
    fault(&mut vcpu, lo(0), Access::read());
    let other = {
        let guest = guest.clone();
        spawn(move || {
            guest.set(1, 0, to(3));
            fault(&mut vcpu, lo(0), Access::read());
            vcpu
        })
    };
    guest.set(1, 0, to(4));
    drop(other.join().unwrap());
    let rmap = |found: &Disagreement| matches!(found, Disagreement::Links { list: "rmap", .. });
    guest.audit("R14", rmap);
}

model!(
    r14_removal_meets_another_page,
    r14_removal_meets_another_page_mutant,
    "R14:",
    a_removal_meets_another_page
);

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
    guest.forget(1, 0);
    guest.forget(1, 1);
    let other = spawn(move || {
        fault(&mut a, lo(0), Access::read());
        a
    });
    fault(&mut b, lo(1), Access::read());
    drop(other.join().unwrap());
    let rmap = |found: &Disagreement| matches!(found, Disagreement::Links { list: "rmap", .. });
    assert_eq!(guest.audit("R15", rmap).sptes, 2);
}

model!(
    r15_two_faults_map_one_page,
    r15_two_faults_map_one_page_mutant,
    "R15:",
    two_faults_map_one_page
);

/// A fault maps a page that has two entries, more than fit in a word, while a guest write takes one
/// of them away.
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
    guest.forget(2, 0);
    let comes = spawn(move || {
        fault(&mut vcpu, hi(0), Access::read());
        vcpu
    });
    guest.set(1, 0, 0);
    drop(comes.join().unwrap());
    let rmap = |found: &Disagreement| matches!(found, Disagreement::Links { list: "rmap", .. });
    assert_eq!(guest.audit("R15", rmap).sptes, 2);
}

model!(
    r15_entry_goes_while_another_comes,
    r15_entry_goes_while_another_comes_mutant,
    "R15:",
    an_entry_goes_while_another_comes
);

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
    let recycler = spawn(move || {
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

model!(r17_link_meets_recycling, r17_link_meets_recycling_mutant, "R17:", a_link_meets_recycling);

/// A shadow page is torn down while it is being made.
fn a_page_in_the_making_meets_a_zap() {
    let guest = Guest::new(3, 4);
    guest.set(0, 0, to(1));
    guest.set(1, 0, to(2));
    let mut vcpu = guest.vcpu();
    let _ = vcpu.fault(hi(0), Access::read());
    let zapper = {
        let guest = guest.clone();
        spawn(move || {
            guest.mmu.zap_all();
            guest.mmu.maintain();
        })
    };
    let _ = vcpu.fault(lo(0), Access::read());
    zapper.join().unwrap();
    guest.audit("R18", |found| matches!(found, Disagreement::Links { list: "shadows", .. }));
    drop(vcpu);
}

model!(
    r18_page_in_the_making_meets_a_zap,
    r18_page_in_the_making_meets_a_zap_mutant,
    "R18:",
    a_page_in_the_making_meets_a_zap
);
