// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Two holes of Linux KVM's shadow MMU, as regression tests of this one: its rules R14 and R18.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::{AllocatedMemory, SlotConfig, SlotId};
use mmu_core::paging::{Reason, bits};
use mmu_core::vcpu::SoftExit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A large guest page, in memory that is to be taken away.
const WINDOW: u64 = 0x4000_0000;
const SLOT: SlotId = SlotId(1);
const HOME: u64 = 16 * MIB;
const USED: u64 = RWU | bits::A | bits::D;

/// How the guest's large entry comes to say something else.
#[derive(Clone, Copy, Debug)]
enum Edit {
    /// As an instruction that is emulated, or a device's store through the engine.
    Told,
    /// Through the VMM's own mapping, without a word to the engine: what a guest write to a table that
    /// is not protected, or a store by a device, was to KVM.
    PassedBy,
}

/// CVE-2026-53359. Below a large guest page the shadow has a *direct* table, whose key is the guest frame
/// of the large page. The guest points its large entry at other memory, or at a table; if KVM then used
/// the table again for what the entry says now, or computed the reverse map of its entries from the
/// entry as it is at their removal, their links in the reverse maps of the first pages outlived the
/// table. The deletion of the slot walked them: use after free.
///
/// Here the slot goes after such an edit; the deletion must find every entry, however the guest's entry
/// has changed, and nothing may name the slot's memory afterwards.
#[test]
fn entries_go_by_the_page_they_map_not_by_what_the_guest_says_now() {
    let entries = |guest: &Guest| {
        let table = guest.new_table();
        guest.write(Gpa(table.0), 0x8000 | USED);
        let (large, read_only) = (USED | bits::PS, bits::P | bits::US | bits::A | bits::PS);
        [large, HOME | read_only, (8 * MIB) | large, table.0 | USED, 0]
    };
    for blocks in [PAGE, 2 * MIB] {
        for edit in [Edit::Told, Edit::PassedBy] {
            for case in 0..5 {
                let config = Guest::config(256).largest_page(blocks);
                let guest = Guest::with(config, 12 * MIB, 6 * MIB, false);
                let value = entries(&guest)[case];
                large_entry_changes_and_the_slot_goes(&guest, edit, value);
            }
        }
    }
}

fn large_entry_changes_and_the_slot_goes(guest: &Guest, edit: Edit, value: u64) {
    let what = format!("{edit:?} {value:#x}");
    let backing = Arc::new(AllocatedMemory::new(4 * MIB));
    guest.mmu.create_slot(SlotConfig::new(1, Gpa(HOME), backing.clone())).unwrap();
    let at = guest.entry(guest.root, Gva(WINDOW), 2);
    guest.write(at, HOME | USED | bits::PS);
    let (mut cpu, mut other) = (guest.vcpu(), guest.vcpu());
    for page in 0..20 {
        store(&mut cpu, WINDOW + page * PAGE, page);
        assert_eq!(load(&mut other, WINDOW + page * PAGE), page);
    }
    match edit {
        Edit::Told => guest.write(at, value),
        Edit::PassedBy => {
            let pin = guest.mmu.pin_page(at, true).unwrap();
            pin.words()[(at.page_offset() / 8) as usize].store(value, Ordering::Release);
        }
    }
    // Faults meet what is left of the old table, in its own pages and in others.
    for page in [0, 3, 19, 20, 511] {
        let _ = cpu.session().load_u64(Gva(WINDOW + page * PAGE), true);
        let _ = other.session().store(Gva(WINDOW + page * PAGE), &[1], true);
    }
    guest.mmu.delete_slot(SLOT).unwrap();
    assert_eq!(Arc::strong_count(&backing), 1, "{what}: the slot's memory is still in use");
    guest.mmu.note_write(at, 8);
    guest.audit();
    cpu.flush();
    let gone = guest.read(at) & bits::ADDR == HOME;
    let seen = cpu.session().load_u64(Gva(WINDOW + 5 * PAGE), true);
    assert_eq!(gone, matches!(seen, Err(SoftExit::Mmio(_))), "{what}: {seen:?}");
    if value == 0 {
        assert_eq!(reason(seen.map(|_| ())), Reason::NotPresent);
    }
    // The frames of what was torn down are used for other tables.
    guest.mmu.zap_all();
    guest.mmu.maintain();
    for page in 0..64 {
        guest.map(Gva(0x7000_0000_0000 + page * (PAGE << 9)), Gpa(page * PAGE), USED);
        let _ = load(&mut other, 0x7000_0000_0000 + page * (PAGE << 9));
    }
    drop((cpu, other));
    guest.audit();
}

/// CVE-2022-45869. A page fault that was short of memory for tables, or another vCPU, zapped the root on
/// which a fault stood; the fault went on in the dead tree, whose pages were freed under it or were in
/// the list of those to be freed twice.
///
/// Here vCPUs fault in more address spaces than there are frames for, so that every fault recycles,
/// while another thread tears the whole shadow down, and makes the quota smaller, again and again.
/// Every access must see its page, and the audit every frame once.
#[test]
fn a_fault_survives_the_end_of_the_tree_it_stands_on() {
    const VCPUS: u64 = 3;
    const SPACES: u64 = 5;
    const PAGES: u64 = 24;
    // Each page of an address space has tables of its own.
    let apart = |page: u64| page << 39 >> 2 & 0x7fff_ffff_f000;
    let guest = Guest::with(Guest::config(72), 16 * MIB, 6 * MIB, false);
    let roots: Vec<Gpa> = (0..SPACES).map(|_| guest.new_table()).collect();
    let value = |space, page: u64| space * 1000 + page;
    for (space, root) in (0..).zip(&roots) {
        for page in 0..PAGES {
            let data = Gpa((space * PAGES + page) * PAGE);
            guest.write(guest.entry(*root, Gva(apart(page)), 1), data.0 | USED);
            guest.write(data, value(space, page));
        }
    }
    let stop = AtomicBool::new(false);
    let mut cpus: Vec<_> = (0..VCPUS).map(|_| guest.vcpu()).collect();
    std::thread::scope(|s| {
        let (guest, roots, stop) = (&guest, &roots, &stop);
        for (id, cpu) in (0u64..).zip(&mut cpus) {
            s.spawn(move || {
                let mut step = id;
                while !stop.load(Ordering::Relaxed) {
                    step += 1;
                    let space = step / 7 % SPACES;
                    let cr3 = roots[space as usize].0;
                    if cpu.vcpu().regs().cr3 != cr3 {
                        cpu.vcpu_mut().set_cr3(cr3).unwrap();
                    }
                    let page = step * 5 % PAGES;
                    assert_eq!(load(cpu, apart(page)), value(space, page));
                }
            });
        }
        let end = Instant::now() + Duration::from_millis(1500);
        let mut round = 0;
        while Instant::now() < end {
            guest.mmu.zap_all();
            guest.mmu.set_nr_mmu_pages(if round % 2 == 0 { 64 } else { 72 }).unwrap();
            guest.mmu.maintain();
            round += 1;
            std::thread::sleep(Duration::from_millis(round % 4));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let stats = guest.mmu.stats();
    assert!(stats.mmu_recycled > 0 && stats.mmu_shadow_zapped > 100, "{stats:?}");
    guest.audit();
    drop(cpus);
    guest.mmu.zap_all();
    guest.mmu.maintain();
    guest.mmu.maintain();
    assert_eq!(guest.audit().pages, 0);
}
