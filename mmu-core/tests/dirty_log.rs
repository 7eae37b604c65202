// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dirty log in all its forms: by write-protection and by dirty bits, taken, looked at and
//! cleared, listed in rings, and with pages pinned.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{DirtyMode, DirtyPage, DirtyRing, SlotFlags, SlotId, runs};
use mmu_core::paging::{Reason, Regs, bits};
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{DirtyLogError, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const SLOT: SlotId = SlotId(0);
const WORDS: usize = 16;

/// 4 MiB mapped one to one, with this log.
fn guest(dirty: DirtyMode) -> Guest {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    for page in 0..1024 {
        guest.map(Gva(page * PAGE), Gpa(page * PAGE), RWU);
    }
    guest.mmu.set_slot_flags(SLOT, SlotFlags { read_only: false, dirty }).unwrap();
    guest
}

fn pages(bitmap: &[u64]) -> Vec<u64> {
    runs(bitmap).flatten().collect()
}

fn harvest(mmu: &Mmu) -> Vec<u64> {
    let mut bitmap = [!0; WORDS];
    let count = mmu.dirty_log(SLOT, &mut bitmap).unwrap();
    let pages = pages(&bitmap);
    assert_eq!(pages.len() as u64, count);
    pages
}

fn peek(mmu: &Mmu) -> Vec<u64> {
    let mut bitmap = [!0; WORDS];
    let count = mmu.peek_dirty_log(SLOT, &mut bitmap).unwrap();
    let pages = pages(&bitmap);
    assert_eq!(pages.len() as u64, count);
    pages
}

/// The pages below the guest's tables.
fn data(pages: Vec<u64>) -> Vec<u64> {
    pages.into_iter().filter(|page| page * PAGE < 2 * MIB).collect()
}

#[test]
fn each_kind_of_log_has_every_write_once() {
    for dirty in [DirtyMode::WriteProtect, DirtyMode::DirtyBits] {
        let guest = guest(dirty);
        let mut cpu = guest.vcpu();
        assert_eq!(data(harvest(&guest.mmu)), [0; 0]);
        for round in 0..3 {
            load(&mut cpu, 6 * PAGE);
            store(&mut cpu, 5 * PAGE, round);
            store(&mut cpu, 300 * PAGE, round);
            guest.write(Gpa(9 * PAGE), round);
            assert_eq!(data(harvest(&guest.mmu)), [5, 9, 300], "{dirty:?}");
            assert_eq!(data(harvest(&guest.mmu)), [0; 0]);
            guest.audit();
        }
        // What was written through an entry that is taken away is not forgotten (R11).
        store(&mut cpu, 5 * PAGE, 7);
        guest.mmu.zap_all();
        guest.mmu.maintain();
        store(&mut cpu, 7 * PAGE, 7);
        guest.map(Gva(7 * PAGE), Gpa(8 * PAGE), RWU);
        assert_eq!(data(harvest(&guest.mmu)), [5, 7], "{dirty:?}");
        guest.audit();
    }
}

#[test]
fn dirty_bits_cost_no_faults() {
    let guest = guest(DirtyMode::DirtyBits);
    let mut cpu = guest.vcpu();
    for page in 0..8 {
        store(&mut cpu, page * PAGE, 1);
    }
    harvest(&guest.mmu);
    let faults = guest.mmu.stats().pf_fixed;
    for page in 0..8 {
        store(&mut cpu, page * PAGE, 2);
    }
    assert_eq!(data(harvest(&guest.mmu)), (0..8).collect::<Vec<_>>());
    assert_eq!(guest.mmu.stats().pf_fixed, faults);
}

#[test]
fn a_log_can_be_looked_at_and_cleared_in_parts() {
    for dirty in [DirtyMode::WriteProtect, DirtyMode::DirtyBits] {
        let guest = guest(dirty);
        let mut cpu = guest.vcpu();
        harvest(&guest.mmu);
        for page in [3, 70, 200] {
            store(&mut cpu, page * PAGE, 1);
        }
        let peek = || data(peek(&guest.mmu));
        assert_eq!((peek(), peek()), (vec![3, 70, 200], vec![3, 70, 200]));
        assert_eq!(guest.mmu.clear_dirty_log(SLOT, 64, &[1 << 6 | 1 << 9]), Ok(1));
        assert_eq!(peek(), [3, 200]);
        store(&mut cpu, 70 * PAGE, 2);
        assert_eq!(peek(), [3, 70, 200]);
        let bad = |first_page| DirtyLogError::BadRange { id: SLOT, first_page, pages: 1024 };
        let clear = |first, bits: &[u64]| guest.mmu.clear_dirty_log(SLOT, first, bits).unwrap_err();
        assert_eq!(clear(3, &[1]), bad(3));
        assert_eq!(clear(960, &[0, 1]), bad(960));
        assert_eq!(clear(u64::MAX - 63, &[0, 0, 2]), bad(u64::MAX - 63));
        assert_eq!(peek(), [3, 70, 200]);
        assert!(guest.mmu.clear_dirty_log(SLOT, 0, &[!0; WORDS]).unwrap() >= 3);
        assert_eq!(peek(), [0; 0]);
        guest.audit();
    }
}

#[test]
fn a_ring_lists_pages_as_they_become_dirty() {
    let guest = guest(DirtyMode::WriteProtect);
    let mut cpu = guest.vcpu();
    load(&mut cpu, 0);
    harvest(&guest.mmu);
    let ring = Arc::new(DirtyRing::new(64).unwrap());
    cpu.vcpu_mut().set_dirty_ring(Some(Arc::clone(&ring)));
    let collect = || {
        let mut listed = [DirtyPage { slot: SLOT, page: 0 }; 64];
        let count = ring.collect(&mut listed);
        listed[..count].to_vec()
    };
    for page in [5, 6, 5] {
        store(&mut cpu, page * PAGE, 1);
    }
    let listed = collect();
    let numbers =
        |listed: &[DirtyPage]| data(listed.iter().map(|listed| listed.page).collect::<Vec<_>>());
    // The guest's tables are written too: accessed and dirty bits.
    assert_eq!(numbers(&listed), [5, 6]);
    store(&mut cpu, 5 * PAGE, 2);
    assert_eq!(numbers(&collect()), [0; 0], "listed once, until it is reset");
    assert_eq!(guest.mmu.reset_dirty_pages(&listed), Ok(listed.len() as u64));
    assert_eq!(guest.mmu.reset_dirty_pages(&listed), Ok(0));
    store(&mut cpu, 5 * PAGE, 3);
    assert_eq!(numbers(&collect()), [5]);
    // Until the ring is soft-full; then the vCPU stays outside until pages are collected.
    let full = (10..).find(|page| {
        let stored = cpu.session().store(Gva(page * PAGE), &[1], true);
        assert!(matches!(stored, Ok(()) | Err(SoftExit::RingFull)));
        stored.is_err()
    });
    assert!(ring.is_soft_full() && !ring.take_lost());
    let pages = collect();
    guest.mmu.reset_dirty_pages(&pages).unwrap();
    store(&mut cpu, full.unwrap() * PAGE, 1);
    let gone = [DirtyPage { slot: SlotId(7), page: 0 }, DirtyPage { slot: SLOT, page: 1 << 40 }];
    assert_eq!(guest.mmu.reset_dirty_pages(&gone), Ok(0));
    guest.audit();
}

#[test]
fn a_page_pinned_for_writing_is_in_every_harvest() {
    let guest = guest(DirtyMode::WriteProtect);
    harvest(&guest.mmu);
    let pinned = guest.mmu.pin_page(Gpa(5 * PAGE), true).unwrap();
    let read = guest.mmu.pin_page(Gpa(6 * PAGE), false).unwrap();
    assert_eq!((harvest(&guest.mmu), harvest(&guest.mmu)), (vec![5], vec![5]));
    assert_eq!(peek(&guest.mmu), [5], "and whoever only looks");
    let again = guest.mmu.pin_page(Gpa(5 * PAGE), true).unwrap();
    drop(pinned);
    assert_eq!(harvest(&guest.mmu), [5]);
    again.words()[0].store(1, Ordering::Relaxed);
    drop((again, read));
    assert_eq!(harvest(&guest.mmu), [5], "once more after its release");
    assert_eq!(harvest(&guest.mmu), [0; 0]);
}

/// A harvest protects a page; then the guest takes W or D from its entry, natively or not. The right to
/// write is not given back as it was.
#[test]
fn a_harvested_page_has_the_rights_that_the_guest_left() {
    let (window, edit) = (Gva(6 * PAGE), Gva(0x40_0000));
    let full = (5 * PAGE) | RWU | bits::A | bits::D;
    for (taken, native) in [(bits::RW, false), (bits::RW, true), (bits::D, false), (bits::D, true)]
    {
        let guest = guest(DirtyMode::WriteProtect);
        guest.map(window, Gpa(0), full);
        let entry = guest.entry(guest.root, window, 1);
        guest.map(edit, Gpa(entry.0 & !0xfff), RWU);
        let mut cpu = guest.vcpu();
        let write = |cpu: &mut SoftVcpu, value| {
            match native {
                true => store(cpu, edit.0 + entry.0 % PAGE, value),
                false => guest.write(entry, value),
            }
            cpu.session().invlpg(window);
        };
        write(&mut cpu, full);
        store(&mut cpu, window.0, 1);
        assert_eq!(data(harvest(&guest.mmu)), [5]);
        write(&mut cpu, full & !taken);
        let stored = cpu.session().store(window, &[2], true);
        if taken == bits::RW {
            assert_eq!(reason(stored), Reason::Write, "native: {native}");
        } else {
            assert_eq!(stored, Ok(()));
            assert_eq!(guest.read(entry) & bits::D, bits::D, "native: {native}");
        }
        assert_eq!(data(harvest(&guest.mmu)).is_empty(), taken == bits::RW);
        guest.audit();
    }
}

/// An entry that is made anew with more rights is as dirty as it was.
#[test]
fn a_page_stays_dirty_when_its_entry_gets_another_right() {
    let guest = guest(DirtyMode::DirtyBits);
    let used = (5 * PAGE) | RWU | bits::A | bits::D;
    guest.map(Gva(5 * PAGE), Gpa(0), used | bits::NX);
    let regs = Regs { efer: guest.regs().efer | bits::EFER_NXE, ..guest.regs() };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    load(&mut cpu, 5 * PAGE);
    assert_eq!(data(harvest(&guest.mmu)), [0; 0]);
    store(&mut cpu, 5 * PAGE, 1);
    guest.map(Gva(5 * PAGE), Gpa(0), used);
    // No flush: the fetch faults, and finds the right in the guest's entry.
    cpu.session().fetch(Gva(5 * PAGE), &mut [0], true).unwrap();
    assert_eq!(data(harvest(&guest.mmu)), [5]);
    guest.audit();
}

/// Nor is a page dirty that the guest has written before, and only reads now.
#[test]
fn a_page_that_is_read_is_not_dirty() {
    for dirty in [DirtyMode::WriteProtect, DirtyMode::DirtyBits] {
        let guest = guest(dirty);
        guest.map(Gva(5 * PAGE), Gpa(5 * PAGE), RWU | bits::A | bits::D);
        assert_eq!(data(harvest(&guest.mmu)), [0; 0]);
        load(&mut guest.vcpu(), 5 * PAGE);
        assert_eq!(data(harvest(&guest.mmu)), [0; 0], "{dirty:?}");
        guest.audit();
    }
}

/// When the reset of a page has returned, a write to it by a vCPU that never came out is in the log again.
#[test]
fn a_reset_page_is_logged_again_under_a_running_vcpu() {
    let guest = guest(DirtyMode::WriteProtect);
    let mut cpu = guest.vcpu();
    let (inside, reset) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|s| {
        s.spawn(|| {
            while !inside.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            let page = DirtyPage { slot: SLOT, page: 5 };
            assert_eq!(guest.mmu.reset_dirty_pages(&[page]), Ok(1));
            reset.store(true, Ordering::Release);
        });
        let mut session = cpu.session();
        let mut write = || session.store(Gva(5 * PAGE), &[1], true).unwrap();
        write();
        inside.store(true, Ordering::Release);
        while !reset.load(Ordering::Acquire) {
            write();
        }
        write();
    });
    assert_eq!(data(harvest(&guest.mmu)), [5]);
    guest.audit();
}

/// A copy made by rounds of any kind of harvest, by two threads at once, while vCPUs write and the log
/// is zapped under them, ends identical.
#[test]
fn a_copy_by_harvests_ends_identical() {
    for dirty in [DirtyMode::WriteProtect, DirtyMode::DirtyBits] {
        let guest = guest(dirty);
        let stop = AtomicBool::new(false);
        let copy = guest_copy();
        std::thread::scope(|s| {
            let writers: Vec<_> = (0..2u64)
                .map(|id| {
                    s.spawn({
                        let (mut cpu, stop) = (guest.vcpu(), &stop);
                        move || write_at_random(&mut cpu, id, stop)
                    })
                })
                .collect();
            for round in 0..40 {
                std::thread::scope(|s| {
                    s.spawn(|| copy_round(&guest, &copy, round));
                    s.spawn(|| copy_round(&guest, &copy, round + 1));
                });
                if round % 8 == 3 {
                    guest.mmu.zap_all();
                }
            }
            stop.store(true, Ordering::Release);
            writers.into_iter().for_each(|writer| writer.join().unwrap());
        });
        // Stopped: no operation is in flight. Once for each order of copy and log.
        copy_round(&guest, &copy, 0);
        for page in 0..512 {
            let word = |words: &[u64]| words.to_vec();
            let (expected, seen) = (guest_page(&guest, page), copied_page(&copy, page));
            assert_eq!(word(&seen), word(&expected), "{dirty:?}, page {page}");
        }
        guest.audit();
    }
}

type Copy = Vec<std::sync::Mutex<Vec<u64>>>;

fn guest_copy() -> Copy {
    (0..512).map(|_| std::sync::Mutex::new(vec![0; 512])).collect()
}

fn guest_page(guest: &Guest, page: u64) -> Vec<u64> {
    let mut bytes = vec![0; PAGE as usize];
    guest.mmu.memory().read(Gpa(page * PAGE), &mut bytes);
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn copied_page(copy: &Copy, page: u64) -> Vec<u64> {
    copy[page as usize].lock().unwrap().clone()
}

fn copy_round(guest: &Guest, copy: &Copy, round: u64) {
    let mut bitmap = [0; WORDS];
    if round % 3 == 1 {
        guest.mmu.peek_dirty_log(SLOT, &mut bitmap).unwrap();
        guest.mmu.clear_dirty_log(SLOT, 0, &bitmap).unwrap();
    } else {
        guest.mmu.dirty_log(SLOT, &mut bitmap).unwrap();
    }
    for page in data(pages(&bitmap)) {
        // Two harvesters may have the same page in two rounds: the later read must stay.
        let mut to = copy[page as usize].lock().unwrap();
        *to = guest_page(guest, page);
    }
}

fn write_at_random(cpu: &mut SoftVcpu, id: u64, stop: &AtomicBool) {
    let mut x = 0x1234_5678_9abc_def1 ^ id;
    let mut session = cpu.session();
    while !stop.load(Ordering::Acquire) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let at = (x % 64 * 8 + (x >> 20 & 7)) * PAGE + id * 8 + (x >> 40 & 15) * 16;
        session.store(Gva(at), &x.to_le_bytes(), true).unwrap();
    }
}
