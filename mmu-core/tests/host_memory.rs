// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host does to guest memory while vCPUs use it: takes pages away and gives them back, makes
//! them read-only, asks which are used.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva, Hva};
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig, SlotId};
use mmu_core::paging::{Access, bits};
use mmu_core::shadow::{PageRange, RangeError};
use mmu_core::sync::WouldDeadlock;
use mmu_core::vcpu::{AccessError, SoftExit};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const DATA: u64 = 16 * MIB;

/// A guest with `pages` pages at `DATA`, mapped one to one, and their memory.
fn guest(pages: u64) -> (Guest, Arc<AllocatedMemory>) {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    let memory = Arc::new(AllocatedMemory::new(pages * PAGE));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(DATA), memory.clone())).unwrap();
    for page in 0..pages {
        guest.map(Gva(DATA + page * PAGE), Gpa(DATA + page * PAGE), RWU);
    }
    (guest, memory)
}

fn by_gpa(page: u64, pages: u64) -> PageRange {
    PageRange::Guest { base: Gpa(DATA + page * PAGE), size: pages * PAGE }
}

fn by_hva(memory: &AllocatedMemory, page: u64, pages: u64) -> PageRange {
    let base = memory.words().as_ptr() as u64 + page * PAGE;
    PageRange::Host { base: Hva(base), size: pages * PAGE }
}

/// Two vCPUs store without pause; whenever the host has taken a page away, its words stand still.
#[test]
fn nothing_is_stored_in_a_page_that_was_taken_away() {
    let (guest, memory) = guest(8);
    let (stop, stores) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        for id in 0..2 {
            let (mut cpu, stop, stores) = (guest.vcpu(), &stop, &stores);
            s.spawn(move || {
                let mut session = cpu.session();
                let mut n = 0u64;
                while !stop.load(Ordering::Acquire) {
                    n += 1;
                    let at = Gva(DATA + n % 8 * PAGE + id * 8);
                    session.store(at, &n.to_le_bytes(), true).unwrap();
                    stores.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut reached = 0;
        for round in 0..300 {
            let (first, pages) = (round % 7, 1 + round % 2);
            let before = stores.load(Ordering::Relaxed);
            let range =
                if round % 3 == 0 { by_gpa(first, pages) } else { by_hva(&memory, first, pages) };
            let taken = guest.mmu.invalidate(range).unwrap();
            let words = &memory.words()[first as usize * 512..(first + pages) as usize * 512];
            let sum = || words.iter().map(|w| w.load(Ordering::Acquire)).fold(0, u64::wrapping_add);
            let still = sum();
            std::thread::yield_now();
            assert_eq!(sum(), still, "stored in a page that was taken away");
            taken.end();
            while stores.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            reached += 1;
        }
        assert_eq!(reached, 300);
        stop.store(true, Ordering::Release);
    });
    guest.audit();
}

#[test]
fn changes_of_the_map_wait_for_invalidations() {
    let (guest, _) = guest(1);
    let taken = guest.mmu.invalidate(by_gpa(0, 1)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            guest.mmu.delete_slot(SlotId(1)).unwrap();
            done.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!done.load(Ordering::Acquire));
        taken.end();
    });
    assert!(done.load(Ordering::Acquire));
    // Nor does a thread begin two at a time: a change that queues for the first would wait for it.
    let first = guest.mmu.invalidate(PageRange::Guest { base: Gpa(0), size: PAGE }).unwrap();
    let refused = RangeError::WouldDeadlock(WouldDeadlock::Invalidating);
    assert_eq!(guest.mmu.invalidate(by_gpa(0, 1)).unwrap_err(), refused);
    drop(first);
    let nothing = guest.mmu.invalidate(by_gpa(0, 1)).unwrap();
    assert_eq!(format!("{nothing:?}"), "[]");
}

/// Who invalidates may stop vCPUs before it ends: one that waits for it comes out.
#[test]
fn a_vcpu_that_waits_for_an_invalidation_can_be_stopped() {
    let (guest, _) = guest(1);
    let mut cpu = guest.vcpu();
    let handle = cpu.handle();
    let taken = guest.mmu.invalidate(by_gpa(0, 1)).unwrap();
    std::thread::scope(|s| {
        let load = s.spawn(|| cpu.session().load(Gva(DATA), &mut [0], true));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!load.is_finished());
        handle.request_exit();
        let end = Instant::now() + Duration::from_secs(10);
        while !load.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let stopped = load.is_finished();
        taken.end();
        assert_eq!((stopped, load.join().unwrap()), (true, Err(SoftExit::Requested)));
    });
    assert_eq!(load(&mut cpu, DATA), 0);
}

#[test]
fn a_page_the_host_made_read_only_is_not_written() {
    let (guest, memory) = guest(2);
    let mut cpu = guest.vcpu();
    store(&mut cpu, DATA, 1);
    guest.mmu.set_host_writable(by_hva(&memory, 0, 1), false).unwrap();
    let refused = cpu.session().store(Gva(DATA), &[2], true);
    assert_eq!(refused, Err(SoftExit::HostReadOnly(Gpa(DATA))));
    let refused = cpu.vcpu().write(Gva(DATA), &[2], Access::write().user());
    assert_eq!(refused, Err(AccessError::HostReadOnly { gpa: Gpa(DATA) }));
    assert_eq!(load(&mut cpu, DATA), 1);
    store(&mut cpu, DATA + PAGE, 2);
    guest.audit();
    guest.mmu.set_host_writable(by_gpa(0, 2), true).unwrap();
    store(&mut cpu, DATA, 3);
    guest.audit();
}

/// The engine does not set accessed bits in a table that the host has made read-only: who needs them
/// set, needs the page writable first (R35).
#[test]
fn guest_tables_the_host_made_read_only_are_not_written() {
    let (guest, memory) = guest(1);
    let gva = Gva(0x40_0000_0000);
    guest.write(guest.entry(guest.root, gva, 2), DATA | RWU);
    guest.write(Gpa(DATA), 0x5000 | RWU);
    let host_writable = |yes| guest.mmu.set_host_writable(by_gpa(0, 1), yes).unwrap();
    let table = || memory.words()[0].load(Ordering::Relaxed);
    let mut cpu = guest.vcpu();
    let refused = SoftExit::HostReadOnly(Gpa(DATA));
    host_writable(false);
    assert_eq!(cpu.session().load(gva, &mut [0], true), Err(refused));
    let read = cpu.vcpu().read(gva, &mut [0], Access::read().user());
    assert_eq!(read, Err(AccessError::HostReadOnly { gpa: Gpa(DATA) }));
    assert_eq!(table(), 0x5000 | RWU);
    guest.audit();
    host_writable(true);
    load(&mut cpu, gva.0);
    assert_eq!(table(), 0x5000 | RWU | bits::A);
    // What has A can be read again, and D is missing for a write.
    host_writable(false);
    load(&mut cpu, gva.0);
    assert_eq!(cpu.session().store(gva, &[1], true), Err(refused));
    guest.audit();
    host_writable(true);
    store(&mut cpu, gva.0, 1);
    assert_eq!(table(), 0x5000 | RWU | bits::A | bits::D);
    guest.audit();
}

#[test]
fn used_pages_are_young() {
    let (guest, memory) = guest(200);
    let mut cpu = guest.vcpu();
    for page in [0, 1, 63, 64, 130] {
        load(&mut cpu, DATA + page * PAGE);
    }
    let young = |range, clear: bool| {
        let mut pages = Vec::new();
        let mut note = |slot: &mmu_core::memory::Slot, first: u64, bits: u64| {
            assert_eq!((slot.id(), first % 64), (SlotId(1), 0));
            pages.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| first + bit));
        };
        let count = if clear {
            guest.mmu.clear_young(range, &mut note)
        } else {
            guest.mmu.test_young(range, &mut note)
        };
        assert_eq!(count, Ok(pages.len() as u64));
        pages
    };
    let all = by_gpa(0, 200);
    assert_eq!(young(all, false), [0, 1, 63, 64, 130]);
    assert_eq!(young(by_hva(&memory, 1, 63), true), [1, 63]);
    assert_eq!(young(all, true), [0, 64, 130]);
    assert_eq!(young(all, false), [0; 0]);
    guest.audit();
    let faults = guest.mmu.stats().pf_fixed;
    load(&mut cpu, DATA + 63 * PAGE);
    store(&mut cpu, DATA + 64 * PAGE, 1);
    assert_eq!(young(all, true), [63, 64]);
    // The first store asked for W; the use itself did not fault.
    assert!(guest.mmu.stats().pf_fixed <= faults + 1);
    guest.audit();
    let bad = PageRange::Guest { base: Gpa(5), size: PAGE };
    let refused = guest.mmu.test_young(bad, |_, _, _| ());
    assert_eq!(refused, Err(RangeError::BadRange { base: 5, size: PAGE }));
}

/// Also by a vCPU that does not come out meanwhile: what it remembers is old when the pages are aged.
#[test]
fn a_running_vcpu_makes_its_pages_young_again() {
    let (guest, _) = guest(1);
    let mut cpu = guest.vcpu();
    let young = || guest.mmu.clear_young(by_gpa(0, 1), |_, _, _| ()).unwrap();
    let mut session = cpu.session();
    for round in 0..3 {
        // An access that begins before the processor hears of it may still go by what it remembers.
        for _ in 0..2 {
            session.load_u64(Gva(DATA), true).unwrap();
        }
        assert_eq!(young(), 1, "round {round}");
    }
    assert_eq!(young(), 0);
}

#[test]
fn writes_past_the_engine_can_be_noted() {
    let (guest, _) = guest(1);
    guest.write(Gpa(0x1000), 0xa);
    guest.write(Gpa(0x2000), 0xb);
    guest.map(Gva(0x5000_0000), Gpa(0x1000), RWU);
    let entry = guest.entry(guest.root, Gva(0x5000_0000), 1);
    let mut cpu = guest.vcpu();
    assert_eq!(load(&mut cpu, 0x5000_0000), 0xa);
    let page = guest.mmu.pin_page(entry, true).unwrap();
    let word = &page.words()[(entry.page_offset() / 8) as usize];
    word.store(0x2000 | RWU, Ordering::Release);
    guest.mmu.note_write(entry, 8);
    cpu.session().invlpg(Gva(0x5000_0000));
    assert_eq!(load(&mut cpu, 0x5000_0000), 0xb);
    guest.mmu.note_write(Gpa(u64::MAX), u64::MAX);
    guest.audit();
}
