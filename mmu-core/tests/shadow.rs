// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Behaviour of the shadow through the software vCPU, single-threaded and under load; each test
//! ends with the audit.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::Config;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig, SlotId};
use mmu_core::paging::{Access, Kind, Reason, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{SoftExit, SoftVcpu, VcpuError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
fn pages_are_mapped_on_demand() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    for page in 0..8 {
        guest.map(Gva(0x7000_0000 + page * PAGE), Gpa(0x10_0000 + page * PAGE), RWU);
    }
    let mut cpu = guest.vcpu();
    for page in 0..8 {
        store(&mut cpu, 0x7000_0000 + page * PAGE + 8 * page, 100 + page);
    }
    for page in 0..8 {
        assert_eq!(load(&mut cpu, 0x7000_0000 + page * PAGE + 8 * page), 100 + page);
        assert_eq!(guest.read(Gpa(0x10_0000 + page * PAGE + 8 * page)), 100 + page);
    }
    let report = guest.audit();
    assert_eq!((report.sptes, report.pages), (8, 4));
    let stats = guest.mmu.stats();
    assert_eq!((stats.pf_fixed, stats.mmu_cache_miss, stats.pf_retry), (8, 4, 0));
}

#[test]
fn faults_of_the_guest_are_the_guests() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(0x1000), Gpa(0x1000), bits::P | bits::US);
    guest.map(Gva(0x2000), Gpa(0x2000), bits::P | bits::RW);
    guest.map(Gva(0x3000), Gpa(0x3000), RWU | bits::NX);
    guest.map(Gva(0x4000), Gpa(1 << 40), RWU);
    let mut cpu = guest.vcpu();
    let mut s = cpu.session();
    assert_eq!(reason(s.store(Gva(0x1000), &[1], true)), Reason::Write);
    assert_eq!(s.load(Gva(0x1000), &mut [0], true), Ok(()));
    assert_eq!(reason(s.store(Gva(0x1000), &[1], true)), Reason::Write);
    assert_eq!(reason(s.load(Gva(0x2000), &mut [0], true)), Reason::User);
    assert_eq!(s.load(Gva(0x2000), &mut [0], false), Ok(()));
    assert_eq!(reason(s.load(Gva(0x2000), &mut [0], true)), Reason::User);
    assert_eq!(reason(s.fetch(Gva(0x3000), &mut [0], true)), Reason::Fetch);
    assert_eq!(reason(s.load(Gva(0x5000), &mut [0], true)), Reason::NotPresent);
    assert_eq!(reason(s.load(Gva(1 << 50), &mut [0], true)), Reason::NonCanonical);
    assert_eq!(s.load(Gva(0x4000), &mut [0], true), Err(SoftExit::Mmio(Gpa(1 << 40))));
    // Nothing of an access that faults in its second page is done.
    guest.map(Gva(0x8000), Gpa(0x8000), RWU);
    assert_eq!(reason(s.store(Gva(0x8ffc), &[0xff; 8], true)), Reason::NotPresent);
    assert_eq!(guest.read(Gpa(0x8ff8)), 0);
    // The fault is that of the first page that has one, at its first byte of the access.
    let at = |result: Result<(), SoftExit>| match result {
        Err(SoftExit::Fault(fault)) => fault.gva,
        other => panic!("{other:?}"),
    };
    assert_eq!(at(s.store(Gva(0x8ffc), &[0xff; 8], true)), Gva(0x9000));
    assert_eq!(at(s.load(Gva(0x8ffd), &mut [0; 8], true)), Gva(0x9000));
    assert_eq!(at(s.store(Gva(0xaffc), &[0xff; 8], true)), Gva(0xaffc));
    assert_eq!(at(s.load(Gva(0x7fff), &mut [0; 2], true)), Gva(0x7fff));
    drop(s);
    guest.audit();
}

#[test]
fn an_edited_entry_takes_effect_at_invlpg() {
    for native in [false, true] {
        edited_entries_take_effect(native);
    }
}

fn edited_entries_take_effect(native: bool) {
    let guest = Guest::with(Guest::config(256).unsync(native), 4 * MIB, 2 * MIB, false);
    let window = Gva(0x40_0000);
    guest.write(Gpa(0x1000), 0xa);
    guest.write(Gpa(0x2000), 0xb);
    guest.map(window, Gpa(0x1000), RWU);
    // The guest reaches its own table.
    let entry = guest.entry(guest.root, window, 1);
    guest.map(Gva(0x80_0000), Gpa(entry.0 & !0xfff), RWU);
    let edit = 0x80_0000 + entry.0 % PAGE;
    let mut cpu = guest.vcpu();
    let mut other = guest.vcpu();
    for round in 0..10u64 {
        let expected = [0xa, 0xb][round as usize % 2];
        assert_eq!(load(&mut cpu, window.0), expected);
        assert_eq!(load(&mut other, window.0), expected);
        store(&mut cpu, edit, [0x2000, 0x1000][round as usize % 2] | RWU);
        cpu.session().invlpg(window);
        other.session().invlpg(window);
    }
    let stats = guest.mmu.stats();
    if native {
        assert_eq!((stats.mmu_pte_write, stats.pf_emulate, stats.mmu_unsync), (0, 0, 1));
    } else {
        assert!(stats.mmu_pte_write == 10 && stats.pf_emulate >= 10, "{stats:?}");
    }
    assert!(stats.mmu_pte_zapped >= 10);
    guest.audit();
}

/// Each right that the guest takes from an entry that is in use is gone after its INVLPG.
#[test]
fn a_right_that_was_taken_away_is_gone_after_invlpg() {
    let window = Gva(0x40_0000);
    let used = 0x1000 | bits::P | bits::US | bits::A;
    let full = used | bits::RW | bits::D;
    let cases = [
        (full, bits::RW, Access::write(), Reason::Write),
        (full, bits::US, Access::read(), Reason::User),
        (used, bits::US, Access::read(), Reason::User),
        (used | bits::NX, bits::US, Access::read(), Reason::User),
        (full, bits::NX, Access::execute(), Reason::Fetch),
        (full, bits::P, Access::read(), Reason::NotPresent),
    ];
    for (before, flip, access, expected) in cases {
        let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
        guest.map(window, Gpa(0), before);
        let entry = guest.entry(guest.root, window, 1);
        let regs = Regs { efer: guest.regs().efer | bits::EFER_NXE, ..guest.regs() };
        let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
        let mut go = || {
            let mut session = cpu.session();
            session.invlpg(window);
            match access.kind {
                Kind::Read => session.load(window, &mut [0], true),
                Kind::Write => session.store(window, &[1], true),
                Kind::Execute => session.fetch(window, &mut [0], true),
            }
        };
        assert_eq!(go(), Ok(()), "{before:#x}");
        guest.write(entry, before ^ flip);
        assert_eq!(reason(go()), expected, "{before:#x} without {flip:#x}");
        guest.audit();
    }
}

/// R35: a dirty bit that the guest clears is set again by its next write, whoever wrote the entry.
#[test]
fn a_dirty_bit_that_was_cleared_is_set_again() {
    let (window, edit) = (Gva(0x40_0000), 0x80_0000);
    for native in [false, true] {
        let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
        guest.map(window, Gpa(0x1000), RWU);
        let entry = guest.entry(guest.root, window, 1);
        guest.map(Gva(edit), Gpa(entry.0 & !0xfff), RWU);
        let mut cpu = guest.vcpu();
        // As it is, then without D.
        for dirty in [bits::D, 0] {
            store(&mut cpu, window.0, 1);
            let value = 0x1000 | RWU | bits::A | dirty;
            match native {
                true => store(&mut cpu, edit + entry.0 % PAGE, value),
                false => guest.write(entry, value),
            }
            cpu.session().invlpg(window);
        }
        assert_eq!(load(&mut cpu, window.0), 1);
        assert_eq!(guest.read(entry) & bits::D, 0, "read only");
        store(&mut cpu, window.0, 2);
        assert_eq!(guest.read(entry) & bits::D, bits::D, "native: {native}");
        assert_eq!(guest.mmu.stats().mmu_unsync > 0, native);
        guest.audit();
    }
}

#[test]
fn large_guest_pages_are_mapped_small() {
    let guest = Guest::new(8 * MIB, 6 * MIB, 256, true);
    let at = guest.entry(guest.root, Gva(0x4000_0000), 2);
    guest.write(at, 0x20_0000 | RWU | bits::PS);
    let mut cpu = guest.vcpu();
    assert_eq!(load(&mut cpu, 0x4000_5000), 0);
    store(&mut cpu, 0x4000_5008, 7);
    store(&mut cpu, 0x401f_f000, 8);
    assert_eq!((guest.read(Gpa(0x20_5008)), guest.read(Gpa(0x3f_f000))), (7, 8));
    guest.audit();
    // Read-only now: what is there must go.
    guest.write(at, 0x20_0000 | bits::P | bits::US | bits::PS);
    cpu.session().invlpg(Gva(0x4000_5000));
    assert_eq!(reason(cpu.session().store(Gva(0x4000_5008), &[1], true)), Reason::Write);
    guest.audit();
}

#[test]
fn a_slot_is_released_with_its_last_user() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let backing = Arc::new(AllocatedMemory::new(MIB));
    let create = || guest.mmu.create_slot(SlotConfig::new(1, Gpa(16 * MIB), backing.clone()));
    create().unwrap();
    for page in 0..16 {
        guest.map(Gva(0x1_0000 + page * PAGE), Gpa(16 * MIB + page * PAGE), RWU);
    }
    let mut cpu = guest.vcpu();
    for page in 0..16 {
        store(&mut cpu, 0x1_0000 + page * PAGE, page);
    }
    let held = guest.mmu.memory();
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    assert!(Arc::strong_count(&backing) > 1, "a snapshot keeps it");
    drop(held);
    assert_eq!(Arc::strong_count(&backing), 1);
    let gone = cpu.session().load(Gva(0x1_0000), &mut [0], true);
    assert_eq!(gone, Err(SoftExit::Mmio(Gpa(16 * MIB))));
    guest.audit();
    create().unwrap();
    assert_eq!(load(&mut cpu, 0x1_5000), 5);
    guest.audit();
}

#[test]
fn tables_in_a_deleted_slot_are_forgotten() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let backing = || Arc::new(AllocatedMemory::new(MIB));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(16 * MIB), backing())).unwrap();
    let gva = Gva(0x1234_5000);
    guest.write(guest.entry(guest.root, gva, 2), (16 * MIB) | RWU);
    let at = guest.entry(guest.root, gva, 1);
    assert_eq!(at.gfn().gpa(), Gpa(16 * MIB));
    guest.write(at, 0x5000 | RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, gva.0, 1);
    guest.mmu.delete_slot(SlotId(1)).unwrap();
    guest.audit();
    assert_eq!(reason(cpu.session().load(gva, &mut [0], true)), Reason::TableOutside);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(16 * MIB), backing())).unwrap();
    assert_eq!(reason(cpu.session().load(gva, &mut [0], true)), Reason::NotPresent);
    guest.audit();
}

#[test]
fn few_table_frames_are_recycled() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 64, false);
    let mut cpu = guest.vcpu();
    // Each page needs three tables of its own.
    for page in 0..200u64 {
        guest.map(Gva(page << 39 >> 2 & 0x7fff_ffff_f000), Gpa(page * PAGE), RWU);
    }
    for page in 0..200u64 {
        store(&mut cpu, page << 39 >> 2 & 0x7fff_ffff_f000, page);
    }
    for page in 0..200u64 {
        assert_eq!(load(&mut cpu, page << 39 >> 2 & 0x7fff_ffff_f000), page);
    }
    assert!(guest.mmu.stats().mmu_recycled > 100);
    guest.audit();
}

#[test]
fn the_dirty_log_has_every_write() {
    let guest = Guest::new(8 * MIB, 4 * MIB, 256, true);
    for page in 0..1024 {
        guest.map(Gva(page * PAGE), Gpa(page * PAGE), RWU);
    }
    let mut bitmap = [0u64; 32];
    let mut log = || {
        guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
        let set = |page: &usize| bitmap[page / 64] >> (page % 64) & 1 != 0;
        (0..1024).filter(set).collect::<Vec<_>>()
    };
    let mut cpu = guest.vcpu();
    log();
    store(&mut cpu, 5 * PAGE, 1);
    assert_eq!(log(), [5]);
    assert_eq!(log(), [0usize; 0]);
    load(&mut cpu, 6 * PAGE);
    assert_eq!(log(), [0usize; 0]);
    store(&mut cpu, 5 * PAGE, 1);
    store(&mut cpu, 700 * PAGE, 1);
    guest.write(Gpa(9 * PAGE), 1);
    assert_eq!(log(), [5, 9, 700]);
    guest.audit();
}

/// Several vCPUs touch, edit their tables and are zapped, recycled and harvested at once.
#[test]
fn stress_everything_at_once() {
    const VCPUS: u64 = 4;
    const PAGES: u64 = 64;
    let guest = Guest::new(16 * MIB, 8 * MIB, 96, true);
    let shared = Gva(0x5000_0000);
    guest.map(shared, Gpa(0x7f_0000), RWU);
    let mut edits = Vec::new();
    for id in 0..VCPUS {
        let base = (id + 1) << 32;
        for page in 0..PAGES {
            guest.map(Gva(base + page * PAGE), Gpa((id * 2 * PAGES + page) * PAGE), RWU);
        }
        let table = guest.entry(guest.root, Gva(base), 1);
        // Two ways to the same table.
        guest.map(Gva(base + 0x4000_0000), table, RWU);
        guest.map(Gva(base + 0x8000_0000), table, RWU);
        edits.push(base + 0x4000_0000);
    }
    let stop = AtomicBool::new(false);
    let total = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|s| {
        for id in 0..VCPUS {
            let (guest, stop, total, edit) = (&guest, &stop, &total, edits[id as usize]);
            s.spawn(move || {
                let mut cpu = guest.vcpu();
                let base = (id + 1) << 32;
                let mut x = id + 1;
                let mut frames: Vec<u64> = (0..PAGES).map(|p| id * 2 * PAGES + p).collect();
                let mut spare: Vec<u64> = (PAGES..2 * PAGES).map(|p| id * 2 * PAGES + p).collect();
                let mut values = std::collections::HashMap::new();
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let page = (x >> 8) % PAGES;
                    let gva = base + page * PAGE + (x >> 20) % 512 * 8;
                    let key = (frames[page as usize], gva % PAGE);
                    match x % 8 {
                        0 => {
                            // Remap the page: the other table window now and then.
                            let window = if x & 0x100 == 0 { edit } else { edit + 0x4000_0000 };
                            let new = spare.swap_remove((x >> 30) as usize % spare.len());
                            spare.push(std::mem::replace(&mut frames[page as usize], new));
                            store(&mut cpu, window + page * 8, (new * PAGE) | RWU);
                            cpu.session().invlpg(Gva(base + page * PAGE));
                        }
                        1..=3 => {
                            store(&mut cpu, gva, x);
                            values.insert(key, x);
                        }
                        4 => {
                            let at = shared.0 + id * 8;
                            let mut session = cpu.session();
                            let old = session.load_u64(Gva(at), true).unwrap();
                            assert_eq!(
                                session
                                    .cmpxchg(Gva(at), 8, old.into(), (old + 1).into(), true)
                                    .unwrap(),
                                Ok(())
                            );
                            total.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => {
                            assert_eq!(load(&mut cpu, gva), values.get(&key).copied().unwrap_or(0))
                        }
                    }
                    n += 1;
                }
                assert!(n > 1000, "vCPU {id} got {n} operations done");
            });
        }
        let (guest, stop) = (&guest, &stop);
        s.spawn(move || {
            let mut bitmap = [0u64; 64];
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                guest.mmu.dirty_log(SlotId(0), &mut bitmap).unwrap();
                if n % 8 == 0 {
                    guest.mmu.zap_all();
                }
                if n % 16 == 1 {
                    let backing = Arc::new(AllocatedMemory::new(MIB));
                    guest.mmu.create_slot(SlotConfig::new(9, Gpa(64 * MIB), backing)).unwrap();
                    guest.mmu.delete_slot(SlotId(9)).unwrap();
                }
                n += 1;
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        stop.store(true, Ordering::Relaxed);
    });
    guest.audit();
    let sum: u64 = (0..VCPUS).map(|id| guest.read(Gpa(0x7f_0000 + id * 8))).sum();
    assert_eq!(sum, total.load(Ordering::Relaxed));
    let stats = guest.mmu.stats();
    assert!(stats.mmu_unsync > 20 && stats.mmu_synced > 2, "{stats:?}");
    assert!(stats.mmu_pte_zapped > 100 && stats.mmu_shadow_zapped > 100, "{stats:?}");
}

#[test]
fn a_root_whose_memory_goes_is_a_fault_not_a_loop() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let mut cpu = guest.vcpu();
    guest.map(Gva(0x1000), Gpa(0x5000), RWU);
    store(&mut cpu, 0x1000, 1);
    guest.mmu.delete_slot(SlotId(0)).unwrap();
    let fault = reason(cpu.session().load(Gva(0x1000), &mut [0], true));
    assert_eq!(fault, Reason::TableOutside);
    guest.audit();
}

#[test]
fn dead_roots_of_idle_vcpus_do_not_hold_up_the_others() {
    let guest = Guest::new(64 * MIB, 32 * MIB, 64, false);
    let mut idle = guest.vcpu();
    let mut cpu = guest.vcpu();
    let gva = |page: u64| page << 39 >> 2 & 0x7fff_ffff_f000;
    for page in 0..200u64 {
        guest.map(Gva(gva(page)), Gpa(page * PAGE), RWU);
    }
    idle.session().load(Gva(0), &mut [0], true).unwrap();
    idle.session().load(Gva(0), &mut [0], false).unwrap();
    cpu.session().load(Gva(0), &mut [0], false).unwrap();
    guest.mmu.zap_all();
    for page in 0..200u64 {
        store(&mut cpu, gva(page), page);
    }
    guest.audit();
    assert_eq!(load(&mut idle, gva(7)), 7);
}

#[test]
fn too_many_vcpus_for_the_table_memory_are_refused() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 64, false);
    let cpus: Vec<_> = (0..8).map(|_| guest.vcpu()).collect();
    let error = guest.mmu.create_soft_vcpu(guest.regs()).unwrap_err();
    assert_eq!(error, VcpuError::TooFewFrames { vcpus: 8 });
    drop(cpus);
    guest.vcpu();
}

#[test]
fn what_the_shadow_cannot_follow_is_refused() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 64, false);
    let long = guest.regs();
    for regs in [
        Regs { cr4: long.cr4 | bits::CR4_PKE, ..long },
        Regs { cr4: long.cr4 | bits::CR4_LA57, ..long },
    ] {
        let error = guest.mmu.create_soft_vcpu(regs).unwrap_err();
        assert!(matches!(error, VcpuError::Unsupported { .. }), "{error}");
    }
}

/// CR0.WP = 0: the supervisor writes to a read-only large page, and its dirty bit is not lost.
#[test]
fn dirty_bits_of_large_pages_survive() {
    let guest = Guest::new(8 * MIB, 6 * MIB, 256, false);
    let at = guest.entry(guest.root, Gva(0x4000_0000), 2);
    for (flags, user, cr0) in [(RWU, true, 0x8001_0001), (bits::P | bits::US, false, 0x8000_0001)] {
        guest.write(at, 0x20_0000 | flags | bits::PS);
        let mut cpu = guest.mmu.create_soft_vcpu(Regs { cr0, ..guest.regs() }).unwrap();
        for round in 0..4u64 {
            let gva = Gva(0x4000_0000 + round * PAGE);
            let mut session = cpu.session();
            session.load_u64(gva, user).unwrap();
            session.store(gva, &round.to_le_bytes(), user).unwrap();
            assert_ne!(guest.read(at) & bits::D, 0, "round {round}");
            guest.write(at, guest.read(at) & !bits::D);
            session.invlpg(gva);
        }
        drop(cpu);
        guest.audit();
    }
}

#[test]
fn smap_is_not_opened_by_a_fetch() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 64, false);
    guest.map(Gva(0x1000), Gpa(0x5000), RWU);
    let regs = Regs { cr4: guest.regs().cr4 | bits::CR4_SMAP, ..guest.regs() };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    let mut session = cpu.session();
    session.fetch(Gva(0x1000), &mut [0; 4], false).unwrap();
    assert_eq!(reason(session.load(Gva(0x1000), &mut [0], false)), Reason::Smap);
}

#[test]
fn tables_in_read_only_memory_are_walked_and_audited() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 64, false);
    let rom = Arc::new(AllocatedMemory::new(PAGE));
    rom.words()[5].store(0x5000 | RWU, Ordering::Relaxed);
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(16 * MIB), rom).read_only()).unwrap();
    guest.write(guest.entry(guest.root, Gva(0), 2), (16 * MIB) | RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, 0x5010, 3);
    assert_eq!(load(&mut cpu, 0x5010), 3);
    guest.audit();
}

/// A slot is deleted while vCPUs use it and edit the tables that map it: no access succeeds after
/// the deletion has returned.
#[test]
fn nothing_reaches_a_deleted_slot() {
    let guest = Guest::new(8 * MIB, 4 * MIB, 256, false);
    let window = Gva(0x40_0000);
    let entry = guest.entry(guest.root, window, 1);
    guest.write(entry, (16 * MIB) | RWU);
    let (there, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|s| {
        let (guest, there, stop) = (&guest, &there, &stop);
        s.spawn(move || {
            let mut cpu = guest.vcpu();
            let mut session = cpu.session();
            while !stop.load(Ordering::Relaxed) {
                let absent_before = !there.load(Ordering::SeqCst);
                let got = session.load_u64(window, true);
                let absent_after = !there.load(Ordering::SeqCst);
                assert!(!(absent_before && absent_after && got.is_ok()), "read a deleted slot");
            }
        });
        s.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                guest.write(entry, (16 * MIB) | RWU);
            }
        });
        for _ in 0..100 {
            let backing = Arc::new(AllocatedMemory::new(PAGE));
            there.store(true, Ordering::SeqCst);
            guest.mmu.create_slot(SlotConfig::new(1, Gpa(16 * MIB), backing.clone())).unwrap();
            std::thread::sleep(Duration::from_micros(300));
            guest.mmu.delete_slot(SlotId(1)).unwrap();
            assert_eq!(Arc::strong_count(&backing), 1);
            there.store(false, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(100));
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest.audit();
}

#[test]
fn register_writes_take_effect_or_change_nothing() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(0x1000), Gpa(0x5000), RWU);
    guest.map(Gva(0x2000), Gpa(0x6000), bits::P | bits::US);
    let mut cpu = guest.vcpu();
    store(&mut cpu, 0x1000, 1);
    // C6: toggles of CR0.WP take effect at once.
    let write = |cpu: &mut SoftVcpu| cpu.session().store(Gva(0x2000), &[1], false);
    assert_eq!(reason(write(&mut cpu)), Reason::Write);
    let cr0 = cpu.vcpu().regs().cr0;
    cpu.vcpu_mut().set_cr0(cr0 & !bits::CR0_WP).unwrap();
    assert_eq!(write(&mut cpu), Ok(()));
    cpu.vcpu_mut().set_cr0(cr0).unwrap();
    assert_eq!(reason(write(&mut cpu)), Reason::Write);
    assert_eq!(reason(cpu.session().store(Gva(0x2000), &[1], true)), Reason::Write);
    // What raises #GP, or lies outside memory, changes nothing.
    let before = *cpu.vcpu().regs();
    let vcpu = cpu.vcpu_mut();
    assert!(matches!(vcpu.set_cr0(1 << 32), Err(VcpuError::Gp(_))));
    assert!(matches!(vcpu.set_cr4(0), Err(VcpuError::Gp(_))));
    assert!(matches!(vcpu.set_cr3(1 << 60), Err(VcpuError::Gp(_))));
    assert!(matches!(vcpu.set_efer(0), Err(VcpuError::Gp(_))));
    assert_eq!(vcpu.set_cr3(1 << 40), Err(VcpuError::RootOutside { cr3: 1 << 40 }));
    assert_eq!(*vcpu.regs(), before);
    // Another address space.
    let other = guest.new_table();
    vcpu.set_cr3(other.0).unwrap();
    assert_eq!(reason(cpu.session().load(Gva(0x1000), &mut [0], true)), Reason::NotPresent);
    cpu.vcpu_mut().set_cr3(guest.root.0).unwrap();
    assert_eq!(load(&mut cpu, 0x1000), 1);
    guest.audit();
}

#[test]
fn a_fault_maps_the_neighbours_that_were_used_before() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let gva = |page: u64| 0x7000_0000 + page * PAGE;
    let flags = [RWU, RWU, RWU | bits::NX, RWU, bits::P | bits::US, RWU, RWU, RWU];
    for (page, flags) in (0..).zip(flags) {
        guest.map(Gva(gva(page)), Gpa(0x10_0000 + page * PAGE), flags);
    }
    let mut cpu = guest.vcpu();
    let made = || {
        let stats = guest.mmu.stats();
        (stats.pf_fixed, stats.pte_prefetched)
    };
    for page in [0, 2, 3, 4, 6] {
        load(&mut cpu, gva(page));
    }
    store(&mut cpu, gva(7), 1);
    assert_eq!(made(), (6, 0), "nothing had been used");
    guest.mmu.zap_all();
    load(&mut cpu, gva(0));
    // Not page 1, never used; nor 2 and 4, which have other rights; nor 5.
    assert_eq!(made(), (7, 3));
    for page in [3, 6, 7] {
        load(&mut cpu, gva(page));
    }
    store(&mut cpu, gva(7), 2);
    assert_eq!(made(), (7, 3));
    // The guest's entry of page 6 has no D: its write is a fault that sets it.
    store(&mut cpu, gva(6), 2);
    assert_eq!(made(), (8, 3));
    assert_eq!(guest.audit().sptes, 4);
    // An edit of a neighbour that was mapped with the page.
    guest.map(Gva(gva(3)), Gpa(0x10_0000), RWU);
    cpu.session().invlpg(Gva(gva(3)));
    store(&mut cpu, gva(0), 9);
    assert_eq!(load(&mut cpu, gva(3)), 9);
    guest.audit();
}

#[test]
fn neighbours_in_a_large_page_are_mapped_at_once_and_are_not_young() {
    let guest = Guest::new(8 * MIB, 6 * MIB, 256, false);
    let at = guest.entry(guest.root, Gva(0x4000_0000), 2);
    guest.write(at, 0x20_0000 | RWU | bits::PS);
    let mut cpu = guest.vcpu();
    store(&mut cpu, 0x4000_5000, 7);
    assert_eq!(guest.audit().sptes, 8);
    let range = PageRange::Guest { base: Gpa(0x20_0000), size: 2 * MIB };
    assert_eq!(guest.mmu.test_young(range, |_, _, _| ()), Ok(1));
    store(&mut cpu, 0x4000_0000, 8);
    assert_eq!((load(&mut cpu, 0x4000_5000), guest.read(Gpa(0x20_0000))), (7, 8));
    assert_eq!(guest.mmu.test_young(range, |_, _, _| ()), Ok(2));
    assert_eq!(guest.mmu.stats().pf_fixed, 1);
    guest.audit();
}

/// The other privilege's write sets D in a large entry that this one has linked for reading only.
#[test]
fn a_dirty_bit_set_through_another_tree_is_no_disagreement() {
    let guest = Guest::new(8 * MIB, 6 * MIB, 256, false);
    let at = guest.entry(guest.root, Gva(0x4000_0000), 2);
    guest.write(at, 0x20_0000 | RWU | bits::PS);
    let mut cpu = guest.vcpu();
    assert_eq!(cpu.session().load_u64(Gva(0x4000_0000), false), Ok(0));
    store(&mut cpu, 0x4000_0000, 7);
    guest.audit();
    assert_eq!(cpu.session().store(Gva(0x4000_0000), &[8], false), Ok(()));
    assert_eq!(load(&mut cpu, 0x4000_0000), 8);
    guest.audit();
}

/// CR3 comes to name a page that is mapped writable: until something is derived from it, it may be.
#[test]
fn a_new_root_protects_its_table_when_it_is_filled() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(0x1000), Gpa(0x5000), RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, 0x1000, 0);
    let mut other = guest.mmu.create_soft_vcpu(Regs::long_mode(0x5000)).unwrap();
    assert_eq!(reason(other.session().load(Gva(0x1000), &mut [0], true)), Reason::NotPresent);
    guest.audit();
    // The page becomes the other's tables, through the first's mapping.
    store(&mut cpu, 0x1000, guest.read(guest.root));
    assert_eq!(load(&mut other, 0x1000), guest.read(Gpa(0x5000)));
    guest.audit();
    store(&mut cpu, 0x1000, 0);
    other.session().invlpg(Gva(0x1000));
    assert_eq!(reason(other.session().load(Gva(0x1000), &mut [0], true)), Reason::NotPresent);
    guest.audit();
}

/// A read that the processor makes itself goes through the guest's tables: what refuses it names the
/// address of the access, not of its word.
#[test]
fn an_implicit_read_is_refused_at_its_own_address() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let device = Gpa(64 * MIB);
    guest.map(Gva(0x1000), device, RWU);
    let mut cpu = guest.vcpu();
    let mut session = cpu.session();
    let mut read = |gva, len| session.read(Gva(gva), &mut [0; 8][..len], Access::read().implicit());
    for (offset, len) in [(5, 1), (6, 2), (4, 4), (0, 8), (5, 8)] {
        assert_eq!(read(0x1000 + offset, len), Err(SoftExit::Mmio(Gpa(device.0 + offset))));
        let Err(SoftExit::Fault(fault)) = read(0x2000 + offset, len) else {
            panic!("nothing is there");
        };
        assert_eq!((fault.gva, fault.reason), (Gva(0x2000 + offset), Reason::NotPresent));
    }
    guest.audit();
}

/// The entry of a root that belongs to the consumer is none that the guest's tables say anything of.
#[test]
fn a_guests_write_leaves_the_consumers_root_entry() {
    const RESERVED: (usize, u64) = (509, 0xabc_d007);
    let tables = Arc::new(AllocatedMemory::new(256 * PAGE));
    let config = Config::new(tables.clone()).reserve_root_entry(RESERVED.0, RESERVED.1);
    let guest = Guest::with(config, 4 * MIB, 2 * MIB, false);
    guest.map(Gva(0x1000), Gpa(0x1000), RWU);
    let mut cpu = guest.vcpu();
    load(&mut cpu, 0x1000);
    let reserved = || {
        let here = |table: &&[AtomicU64]| table[RESERVED.0].load(Ordering::Acquire) == RESERVED.1;
        tables.words().chunks(512).filter(here).count()
    };
    assert_eq!(reserved(), 1, "in the only root");
    guest.write(Gpa(guest.root.0 + 8 * RESERVED.0 as u64), 0x5007);
    assert_eq!(reserved(), 1, "the guest wrote its own entry of that number");
    load(&mut cpu, 0x1000);
    guest.audit();
}
