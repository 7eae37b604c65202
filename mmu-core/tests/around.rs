// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Map-around: how many pages a fault maps follows what becomes of them.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::paging::bits;
use mmu_core::vcpu::SoftVcpu;

const PAGES: u64 = 4096;
const FIRST: u64 = 0x7f00_0000_0000;

fn gva(page: u64) -> u64 {
    FIRST + page * PAGE
}

/// A guest that has used all of its pages before, and a vCPU.
fn guest() -> (Guest, SoftVcpu) {
    let guest = Guest::new(PAGES * PAGE + MIB, PAGES * PAGE, 256, false);
    for page in 0..PAGES {
        guest.map(Gva(gva(page)), Gpa(page * PAGE), RWU | bits::A | bits::D);
    }
    let cpu = guest.vcpu();
    (guest, cpu)
}

/// Loads from each of the pages; how many faults that took.
fn touch(guest: &Guest, cpu: &mut SoftVcpu, pages: impl IntoIterator<Item = u64>) -> u64 {
    let before = guest.mmu.stats().pf_fixed;
    for page in pages {
        load(cpu, gva(page));
    }
    guest.mmu.stats().pf_fixed - before
}

#[test]
fn a_run_takes_fewer_and_fewer_faults() {
    let (guest, mut cpu) = guest();
    let faults: Vec<_> = (0..8).map(|n| touch(&guest, &mut cpu, n * 512..n * 512 + 512)).collect();
    // 8, 16, 32, 64, 128, 256, and the rest of the table.
    assert_eq!(faults, [7, 2, 2, 2, 2, 2, 2, 2]);
    assert_eq!(guest.audit().sptes, PAGES);
    guest.mmu.zap_all();
    let faults = touch(&guest, &mut cpu, (0..PAGES).rev());
    assert!((16..=24).contains(&faults), "backwards: {faults}");
    assert_eq!(guest.audit().sptes, PAGES);
}

#[test]
fn two_runs_at_once_are_both_followed() {
    let (guest, mut cpu) = guest();
    for page in 0..PAGES / 2 {
        let value = load(&mut cpu, gva(page));
        store(&mut cpu, gva(PAGES / 2 + page), value + 1);
    }
    let faults = guest.mmu.stats().pf_fixed;
    assert!(faults <= 32, "{faults}");
    guest.audit();
}

#[test]
fn a_run_ends_when_something_else_is_used() {
    let (guest, mut cpu) = guest();
    touch(&guest, &mut cpu, 0..1024);
    // The windows of both runs that are remembered.
    touch(&guest, &mut cpu, [2000, 3000]);
    let before = guest.mmu.stats().pte_prefetched;
    touch(&guest, &mut cpu, [1024]);
    assert_eq!(guest.mmu.stats().pte_prefetched - before, 7);
    guest.audit();
}

#[test]
fn few_pages_are_mapped_in_vain() {
    // Every page, every second one, …
    for stride in 1..=40 {
        let (guest, mut cpu) = guest();
        let mut used = 0;
        for page in (0..PAGES).step_by(stride) {
            used += 1;
            touch(&guest, &mut cpu, [page]);
            let stats = guest.mmu.stats();
            let unused = stats.pf_fixed + stats.pte_prefetched - used;
            assert!(unused <= 8 * used, "stride {stride}: {unused} unused of {used} used");
        }
        guest.audit();
    }
    // Only what tells whether a window was used, and where the next one begins.
    let (guest, mut cpu) = guest();
    let mut used = 0;
    let mut before = 0;
    for page in 0..PAGES {
        let stats = guest.mmu.stats();
        let mapped = stats.pf_fixed + stats.pte_prefetched;
        // Pages are mapped from the first on.
        if page < mapped && page >= 24 && page / 8 % 4 != 3 {
            continue;
        }
        used += 1;
        touch(&guest, &mut cpu, [page]);
        let stats = guest.mmu.stats();
        let mapped = stats.pf_fixed + stats.pte_prefetched;
        assert!(mapped - used <= 8 * used, "{mapped} mapped, {used} used");
        before = before.max(mapped);
    }
    assert_eq!(before, PAGES);
    guest.audit();
}

#[test]
fn scattered_accesses_map_a_line_each() {
    let (guest, mut cpu) = guest();
    let mut page = 1;
    for _ in 0..PAGES / 64 {
        // A full period (Knuth, vol. 2, 3.2.1.2).
        page = (page * 1365 + 1031) % PAGES;
        touch(&guest, &mut cpu, [page]);
    }
    let stats = guest.mmu.stats();
    assert!(stats.pte_prefetched <= 7 * stats.pf_fixed, "{stats:?}");
    guest.audit();
}

#[test]
fn a_run_maps_only_what_the_guest_has_used() {
    let (guest, mut cpu) = guest();
    // Page 300 was never used; page 310 may not be written, and nobody has written page 320.
    let entries = [300, 310, 320].map(|page| guest.entry(guest.root, Gva(gva(page)), 1));
    guest.write(entries[0], (300 * PAGE) | RWU);
    guest.write(entries[1], (310 * PAGE) | RWU & !bits::RW | bits::A);
    guest.write(entries[2], (320 * PAGE) | RWU | bits::A);
    touch(&guest, &mut cpu, 0..300);
    assert_eq!(guest.read(entries[0]) & bits::A, 0);
    assert!(guest.mmu.stats().pte_prefetched > 400, "the run has got beyond them");
    guest.audit();
    assert_eq!(touch(&guest, &mut cpu, [300, 301, 310, 311, 320]), 2);
    store(&mut cpu, gva(320), 1);
    assert_eq!(guest.read(entries[2]) & bits::D, bits::D);
    guest.audit();
}
