// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table frames: the quota, recycling, zap-all in constant time, and MMIO entries.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use mmu_core::paging::{Reason, Regs, bits};
use mmu_core::shadow::QuotaError;
use mmu_core::vcpu::SoftExit;
use std::sync::Arc;

/// Each page has three tables of its own.
fn apart(page: u64) -> u64 {
    page << 39 >> 2 & 0x7fff_ffff_f000
}

#[test]
fn the_default_follows_the_memory() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 4096, false);
    assert_eq!(guest.mmu.nr_mmu_pages(), (16384 / 50, 0));
    let more = Arc::new(AllocatedMemory::new(64 * MIB));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(1 << 32), more)).unwrap();
    assert_eq!(guest.mmu.nr_mmu_pages().0, 2 * 16384 / 50);
    guest.mmu.set_nr_mmu_pages(1000).unwrap();
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    assert_eq!(guest.mmu.nr_mmu_pages().0, 1000);
    guest.mmu.set_nr_mmu_pages(None).unwrap();
    assert_eq!(guest.mmu.nr_mmu_pages().0, 16384 / 50);
}

#[test]
fn quotas_beyond_reason_are_refused() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let refused = |frames| guest.mmu.set_nr_mmu_pages(frames).unwrap_err();
    let few = |frames, vcpus, minimum| QuotaError::TooFew { frames, vcpus, minimum };
    assert_eq!(refused(63), few(63, 0, 64));
    assert_eq!(refused(257), QuotaError::TooMany { frames: 257, most: 256 });
    let cpus: Vec<_> = (0..10).map(|_| guest.vcpu()).collect();
    assert_eq!(refused(79), few(79, 10, 80));
    guest.mmu.set_nr_mmu_pages(80).unwrap();
    drop(cpus);
    guest.mmu.set_nr_mmu_pages(64).unwrap();
    assert_eq!(guest.mmu.nr_mmu_pages().0, 64);
}

#[test]
fn a_smaller_quota_takes_effect_and_what_is_used_survives() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 1024, false);
    guest.mmu.set_nr_mmu_pages(1024).unwrap();
    for page in 0..200 {
        guest.map(Gva(apart(page)), Gpa(page * PAGE), RWU);
    }
    let mut cpu = guest.vcpu();
    for page in 0..200 {
        store(&mut cpu, apart(page), page);
    }
    let (_, before) = guest.mmu.nr_mmu_pages();
    assert!(before > 400, "{before}");
    guest.mmu.set_nr_mmu_pages(64).unwrap();
    // The vCPU forgets, then the frames are free.
    load(&mut cpu, apart(0));
    for _ in 0..4 {
        guest.mmu.maintain();
    }
    assert!(guest.mmu.nr_mmu_pages().1 <= 64);
    guest.audit();
    // Two pages in turn, and now and then another: those two are not torn down each time.
    for page in 0..200 {
        assert_eq!(load(&mut cpu, apart(page)), page);
    }
    guest.audit();
    let recycled = guest.mmu.stats().mmu_recycled;
    guest.mmu.set_nr_mmu_pages(1024).unwrap();
    for page in 0..200 {
        assert_eq!(load(&mut cpu, apart(page)), page);
    }
    assert_eq!(guest.mmu.stats().mmu_recycled, recycled);
    guest.audit();
}

/// An address space with tables of its own for each of four addresses, behind consecutive entries of the
/// root, that lead to four pages from `first` on.
fn space(guest: &Guest, levels: u32, first: u64) -> Gpa {
    let root = guest.new_table();
    for n in 0..4 {
        let mut entry = Gpa(root.0 + 8 * n);
        for _ in 1..levels {
            let table = guest.new_table();
            guest.write(entry, table.0 | RWU);
            entry = table;
        }
        guest.write(entry, ((first + n) * PAGE) | RWU);
    }
    root
}

/// 32 vCPUs, each with address spaces of its own, within the smallest quota: every fault succeeds.
#[test]
fn the_smallest_quota_is_enough_for_many_vcpus() {
    const VCPUS: u64 = 32;
    const SPACES: u64 = 3;
    for levels in [4, 5] {
        let config = Guest::config(1024).levels(levels as u8);
        let guest = Guest::with(config, 128 * MIB, 32 * MIB, false);
        let la57 = if levels == 5 { bits::CR4_LA57 } else { 0 };
        let mut cpus: Vec<_> = (0..VCPUS)
            .map(|id| {
                let first = |n| (id * SPACES + n) * 4;
                let spaces = [0, 1, 2].map(|n| space(&guest, levels, first(n)).0);
                let regs = Regs { cr3: spaces[0], cr4: guest.regs().cr4 | la57, ..guest.regs() };
                (spaces, guest.mmu.create_soft_vcpu(regs).unwrap())
            })
            .collect();
        guest.mmu.set_nr_mmu_pages(VCPUS * 8).unwrap();
        std::thread::scope(|s| {
            for (spaces, cpu) in &mut cpus {
                s.spawn(move || {
                    for round in 0..20 {
                        cpu.vcpu_mut().set_cr3(spaces[(round % SPACES) as usize]).unwrap();
                        let gva = Gva((round * 7 % 4) << (12 + 9 * (levels - 1)));
                        store(cpu, gva.0, round);
                        // As supervisor as well: another root.
                        assert_eq!(cpu.session().load_u64(gva, false), Ok(round));
                    }
                });
            }
        });
        let (quota, used) = guest.mmu.nr_mmu_pages();
        assert!(quota == VCPUS * 8 && used <= quota);
        assert!(guest.mmu.stats().mmu_recycled > 0, "they do not fit all at once");
        guest.audit();
    }
}

#[test]
fn zapping_everything_leaves_the_work_to_the_faults() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 2048, false);
    guest.mmu.set_nr_mmu_pages(2048).unwrap();
    for page in 0..300 {
        guest.map(Gva(apart(page)), Gpa(page * PAGE), RWU);
    }
    let mut cpu = guest.vcpu();
    for page in 0..300 {
        store(&mut cpu, apart(page), page);
    }
    let live = guest.audit().pages;
    guest.mmu.zap_all();
    let report = guest.audit();
    assert_eq!((report.pages, report.obsolete, report.retired), (0, live, 0));
    for page in 0..300 {
        assert_eq!(load(&mut cpu, apart(page)), page);
    }
    let report = guest.audit();
    assert_eq!((report.pages, report.obsolete), (live, 0), "the faults have torn it down");
    guest.mmu.zap_all();
    guest.mmu.zap_all();
    guest.mmu.maintain();
    let report = guest.audit();
    assert_eq!((report.pages, report.obsolete), (0, 0));
    assert_eq!(load(&mut cpu, apart(7)), 7);
}

#[test]
fn devices_are_remembered_until_there_is_memory() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let (gva, gpa) = (Gva(0x10_0000), Gpa(16 * MIB));
    guest.map(gva, gpa, RWU);
    let mut cpu = guest.vcpu();
    let cached = || guest.mmu.stats().mmio_cached;
    let mut buf = [0; 4];
    let mmio = |offset| Err(SoftExit::Mmio(Gpa(gpa.0 + offset)));
    for (offset, known) in [(0, 0), (8, 1), (0x10, 2)] {
        let at = Gva(gva.0 + offset);
        assert_eq!(cpu.session().load(at, &mut buf, true), mmio(offset));
        assert_eq!(cached(), known);
    }
    // The first write sets D in the guest's entry; the next is known.
    assert_eq!(cpu.session().store(Gva(gva.0 + 4), &[1], true), mmio(4));
    assert_eq!(cpu.session().store(Gva(gva.0 + 4), &[1], true), mmio(4));
    assert_eq!(cached(), 3);
    guest.audit();
    // The supervisor has a tree of its own; instructions are not fetched from devices unseen.
    assert_eq!(cpu.session().load(gva, &mut buf, false), mmio(0));
    assert_eq!(cpu.session().fetch(gva, &mut buf, true), mmio(0));
    assert_eq!(cached(), 3);
    // R9: memory appears.
    let memory = Arc::new(AllocatedMemory::new(PAGE));
    guest.mmu.create_slot(SlotConfig::new(1, gpa, memory)).unwrap();
    store(&mut cpu, gva.0, 5);
    assert_eq!((load(&mut cpu, gva.0), guest.read(gpa)), (5, 5));
    guest.audit();
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    assert_eq!(cpu.session().load(gva, &mut buf, true), mmio(0));
    // The guest maps something else there.
    guest.map(gva, Gpa(0x3000), RWU);
    cpu.session().invlpg(gva);
    store(&mut cpu, gva.0, 6);
    assert_eq!(guest.read(Gpa(0x3000)), 6);
    guest.audit();
}

/// The guest takes the right to write a device's page away: its writes are its own faults.
#[test]
fn a_device_is_written_only_through_a_writable_entry() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let (gva, gpa) = (Gva(0x10_0000), Gpa(16 * MIB));
    let full = RWU | bits::A | bits::D;
    guest.map(gva, gpa, full);
    let mut cpu = guest.vcpu();
    let mut store = || {
        cpu.session().invlpg(gva);
        cpu.session().store(gva, &[1], true)
    };
    for known in [0, 1] {
        assert_eq!(store(), Err(SoftExit::Mmio(gpa)));
        assert_eq!(guest.mmu.stats().mmio_cached, known);
    }
    guest.map(gva, gpa, full & !bits::RW);
    assert_eq!(reason(store()), Reason::Write);
    // R35: nor without the dirty bit, which the write sets.
    guest.map(gva, gpa, full);
    assert_eq!((store(), store()), (Err(SoftExit::Mmio(gpa)), Err(SoftExit::Mmio(gpa))));
    guest.map(gva, gpa, full & !bits::D);
    assert_eq!(store(), Err(SoftExit::Mmio(gpa)));
    assert_eq!(guest.read(guest.entry(guest.root, gva, 1)) & bits::D, bits::D);
    guest.audit();
}

/// The guest makes a device's page the supervisor's: to the user it is not there any more.
#[test]
fn a_device_that_becomes_the_supervisors_is_a_fault_of_the_users() {
    let (gva, gpa, edit) = (Gva(0x10_0000), Gpa(16 * MIB), Gva(0x40_0000));
    let full = RWU | bits::A | bits::D;
    let device = gpa.0 | full & !bits::RW;
    for native in [false, true] {
        let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
        guest.map(gva, Gpa(0), device);
        let entry = guest.entry(guest.root, gva, 1);
        guest.map(edit, Gpa(entry.0 & !0xfff), full);
        let mut cpu = guest.vcpu();
        let mut buf = [0; 4];
        assert_eq!(cpu.session().load(gva, &mut buf, true), Err(SoftExit::Mmio(gpa)));
        let supervisors = device & !bits::US;
        match native {
            true => {
                store(&mut cpu, edit.0 + entry.0 % PAGE, device);
                assert_eq!(cpu.session().load(gva, &mut buf, true), Err(SoftExit::Mmio(gpa)));
                store(&mut cpu, edit.0 + entry.0 % PAGE, supervisors);
            }
            false => guest.write(entry, supervisors),
        }
        cpu.session().invlpg(gva);
        assert_eq!(reason(cpu.session().load(gva, &mut buf, true)), Reason::User, "{native}");
        assert_eq!(cpu.session().load(gva, &mut buf, false), Err(SoftExit::Mmio(gpa)));
        guest.audit();
    }
}

/// More maps than an MMIO entry's generation can count.
#[test]
fn generations_of_mmio_entries_may_wrap() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let gva = Gva(0x10_0000);
    guest.map(gva, Gpa(16 * MIB), RWU);
    let mut cpu = guest.vcpu();
    let memory = Arc::new(AllocatedMemory::new(PAGE));
    let mut buf = [0; 1];
    cpu.session().load(gva, &mut buf, true).unwrap_err();
    // The entry is of this generation; when its bits come round again there is memory.
    let start = guest.mmu.memory().generation();
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(48 * MIB), memory)).unwrap();
    for round in 0..(1 << 15) - 1 {
        let to = [16, 48][round % 2] * MIB;
        guest.mmu.move_slot(SlotId(1), Gpa(to)).unwrap();
    }
    assert_eq!(guest.mmu.memory().generation() - start, 1 << 15);
    assert_eq!(cpu.session().load(gva, &mut buf, true), Ok(()));
    guest.audit();
}
