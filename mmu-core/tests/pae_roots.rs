// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Roots of PAE paging: found by what the PDPTE registers hold, by every vCPU, as long as their page
//! lives (SDM vol. 3, 5.4.1).
#![cfg(not(loom))]

mod common;

use common::{Guest, MIB, PAGE, RWU, Random, load, setting};
use mmu_core::addr::Gpa;
use mmu_core::paging::{Regs, bits};
use mmu_core::vcpu::SoftVcpu;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;

const USED: u64 = RWU | bits::A | bits::D;
/// Where the pages are whose first word says whose they are.
const DATA: u64 = 4 * MIB;
/// Shadow pages of a space of which one page is used: the root, the page below it, and two tables.
const PAGES: u64 = 4;

/// Address 0 of space `n` has the number `n`.
struct Spaces {
    guest: Guest,
    cr3: Vec<u64>,
}

impl Spaces {
    fn new(frames: u64, spaces: u64) -> Self {
        let guest = Guest::new(16 * MIB, 8 * MIB, frames, false);
        guest.mmu.set_nr_mmu_pages(frames).unwrap();
        let space = |n: u64| {
            let [registers, directory, table] = [(); 3].map(|()| guest.new_table());
            guest.write(registers, directory.0 | bits::P);
            guest.write(directory, table.0 | USED);
            guest.write(table, (DATA + n * PAGE) | USED);
            guest.write(Gpa(DATA + n * PAGE), n);
            registers.0
        };
        let cr3 = (0..spaces).map(space).collect();
        Self { guest, cr3 }
    }

    fn vcpu(&self, space: usize) -> SoftVcpu {
        let cr3 = self.cr3[space];
        let pdptrs = [self.guest.read(Gpa(cr3)), 0, 0, 0];
        let regs = Regs { cr3, cr4: bits::CR4_PAE, efer: 0, pdptrs, ..self.guest.regs() };
        self.guest.mmu.create_soft_vcpu(regs).unwrap()
    }

    /// Loads CR3 of the space; whose number is at address 0 then.
    fn switch(&self, cpu: &mut SoftVcpu, space: usize) -> u64 {
        cpu.vcpu_mut().set_cr3(self.cr3[space]).unwrap();
        load(cpu, 0)
    }

    /// Pages made and faults served by making entries, so far.
    fn work(&self) -> (u64, u64) {
        let stats = self.guest.mmu.stats();
        (stats.mmu_cache_miss, stats.pf_fixed)
    }

    fn round(&self, cpus: &mut [SoftVcpu]) {
        for space in 0..self.cr3.len() {
            for cpu in &mut *cpus {
                assert_eq!(self.switch(cpu, space), space as u64);
            }
        }
    }
}

#[test]
fn the_second_vcpu_makes_no_page() {
    let spaces = Spaces::new(64, 1);
    let mut first = spaces.vcpu(0);
    assert_eq!(load(&mut first, 0), 0);
    let work = spaces.work();
    assert_eq!(work.0, PAGES);
    let mut second = spaces.vcpu(0);
    assert_eq!(load(&mut second, 0), 0);
    assert_eq!(spaces.work(), work);
    // The same values from elsewhere.
    let copy = spaces.guest.new_table();
    spaces.guest.write(Gpa(copy.0 + 32), spaces.guest.read(Gpa(spaces.cr3[0])));
    second.vcpu_mut().set_cr3(copy.0 + 32).unwrap();
    assert_eq!(load(&mut second, 0), 0);
    assert_eq!(spaces.work(), work);
    assert_eq!(spaces.guest.audit().pages, PAGES);
    // One value of the four is another, or another register changes what the entries mean: only what is
    // below is the same.
    spaces.guest.write(Gpa(copy.0 + 56), spaces.guest.read(Gpa(copy.0 + 32)));
    second.vcpu_mut().set_cr3(copy.0 + 32).unwrap();
    assert_eq!(load(&mut second, 3 << 30), 0);
    assert_eq!(spaces.work().0, PAGES + 2);
    let efer = bits::EFER_NXE;
    second.vcpu_mut().set_efer(efer).unwrap();
    assert_eq!(load(&mut second, 0), 0);
    assert_eq!(spaces.work().0, PAGES + 2 + PAGES);
    spaces.guest.audit();
}

#[test]
fn more_spaces_than_a_vcpu_remembers_roots() {
    const SPACES: u64 = 20;
    let spaces = Spaces::new(256, SPACES);
    let mut cpus = [spaces.vcpu(0), spaces.vcpu(0)];
    spaces.round(&mut cpus);
    let work = spaces.work();
    assert_eq!(work.0, SPACES * PAGES);
    for _ in 0..3 {
        spaces.round(&mut cpus);
    }
    assert_eq!(spaces.work(), work);
    assert_eq!(spaces.guest.audit().pages, SPACES * PAGES);
}

#[test]
fn what_was_torn_down_is_made_again_once() {
    const SPACES: u64 = 40;
    // Not enough for all of them.
    let spaces = Spaces::new(64, SPACES);
    let mut cpus = [spaces.vcpu(0), spaces.vcpu(0)];
    for _ in 0..4 {
        spaces.round(&mut cpus);
    }
    assert!(spaces.guest.mmu.stats().mmu_recycled > 0);
    spaces.guest.audit();
    spaces.guest.mmu.zap_all();
    spaces.round(&mut cpus);
    spaces.guest.audit();
    // And what is left of the last spaces is found by both.
    let work = spaces.work();
    for cpu in &mut cpus {
        assert_eq!(spaces.switch(cpu, SPACES as usize - 1), SPACES - 1);
    }
    assert_eq!(spaces.work(), work);
}

/// The registers keep their values while the memory that they were loaded from changes.
#[test]
fn a_loaded_root_does_not_follow_memory() {
    let spaces = Spaces::new(64, 2);
    let [here, there] = [0, 1].map(|n| Gpa(spaces.cr3[n]));
    let mut latched = spaces.vcpu(0);
    assert_eq!(load(&mut latched, 0), 0);
    spaces.guest.write(here, spaces.guest.read(there));
    let mut other = spaces.vcpu(1);
    assert_eq!(spaces.switch(&mut other, 0), 1, "the values of now");
    // Not by what the processor remembers: by the root.
    spaces.guest.mmu.zap_all();
    assert_eq!(load(&mut latched, 0), 0, "the values of then");
    assert_eq!((load(&mut other, 0), spaces.switch(&mut latched, 0)), (1, 1));
    spaces.guest.audit();
}

/// A guest that never loads the same values twice: bits that the processor ignores are enough. The
/// audit finds a name without a live page.
#[test]
fn ever_new_values_leave_nothing_behind() {
    const FRAMES: u64 = 64;
    let spaces = Spaces::new(FRAMES, 1);
    let mut cpus = [spaces.vcpu(0), spaces.vcpu(0)];
    let registers = Gpa(spaces.cr3[0]);
    let plain = spaces.guest.read(registers);
    for n in 0..setting("PAE_LOADS", 4096) {
        // Bits 9 to 11 of each.
        for (i, pdpte) in [plain, 0, 0, 0].into_iter().enumerate() {
            let ignored = (n >> (3 * i) & 7) << 9;
            spaces.guest.write(Gpa(registers.0 + 8 * i as u64), pdpte | ignored);
        }
        assert_eq!(spaces.switch(&mut cpus[n as usize % 2], 0), 0);
        if n % 256 == 0 {
            assert!(spaces.guest.audit().pages <= FRAMES);
        }
    }
    assert!(spaces.guest.audit().pages <= FRAMES);
}

/// Many load the same few values while their roots are recycled and zapped.
#[test]
fn vcpus_share_roots_that_come_and_go() {
    const SPACES: u64 = 24;
    let spaces = Spaces::new(64, SPACES);
    let switches = setting("PAE_SWITCHES", 3000);
    let done = AtomicBool::new(false);
    scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let spaces = &spaces;
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    let mut cpu = spaces.vcpu(0);
                    for _ in 0..switches {
                        let space = random.below(SPACES);
                        assert_eq!(spaces.switch(&mut cpu, space as usize), space);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                spaces.guest.mmu.zap_all();
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        done.store(true, Ordering::Relaxed);
        assert!(ends.into_iter().all(|end| end.is_ok()));
    });
    spaces.guest.audit();
}
