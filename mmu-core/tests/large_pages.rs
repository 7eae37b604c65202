// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Blocks of 2 MiB and 1 GiB mapped by one entry: when they are, what they are broken by, and that
//! nothing is lost by either.

mod common;

use common::{Guest, MIB, PAGE, RWU, Random, load, reason, setting, store};
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{Alias, AllocatedMemory, Backing, DirtyMode, SlotConfig, SlotFlags, SlotId};
use mmu_core::paging::{Reason, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;
const BLOCK: u64 = 2 * MIB;
/// Where the data is, for the guest and for the processor, and where the guest sees it.
const DATA: u64 = 2 * GIB;
const MACHINE: u64 = 1 << 40;
const WINDOW: u64 = 0x40_0000_0000;
const DATA_SLOT: SlotId = SlotId(1);
const LARGE: u64 = RWU | bits::PS;

/// An engine that may map pages of `largest` bytes, and 4 MiB for page tables.
fn tables(largest: u64) -> Guest {
    let tables = Arc::new(AllocatedMemory::new(512 * PAGE));
    let mmu = Mmu::new(Config::new(tables).largest_page(largest)).unwrap();
    let memory = AllocatedMemory::at(4 * MIB, Machine(MACHINE / 2 + PAGE));
    mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
    let guest = Guest::over(mmu, 2 * MIB);
    guest.mmu.set_nr_mmu_pages(512).unwrap();
    guest
}

/// The same with `size` bytes of data, `skew` bytes off what would be congruent.
fn guest(largest: u64, size: u64, skew: u64) -> (Guest, Arc<AllocatedMemory>) {
    let guest = tables(largest);
    let memory = Arc::new(AllocatedMemory::at(size, Machine(MACHINE + skew)));
    guest.mmu.create_slot(SlotConfig::new(DATA_SLOT.0, Gpa(DATA), memory.clone())).unwrap();
    (guest, memory)
}

impl Guest {
    /// Maps a guest page of 2 MiB (level 2) or 1 GiB (level 3).
    fn map_large(&self, gva: u64, gpa: u64, level: u32, flags: u64) -> Gpa {
        let at = self.entry(self.root, Gva(gva), level);
        self.write(at, gpa | bits::PS | flags);
        at
    }

    /// Entries that map memory.
    fn leaves(&self) -> u64 {
        self.audit().sptes
    }
}

fn data(page: u64, pages: u64) -> PageRange {
    PageRange::Guest { base: Gpa(DATA + page * PAGE), size: pages * PAGE }
}

fn set_log(guest: &Guest, dirty: DirtyMode) {
    guest.mmu.set_slot_flags(DATA_SLOT, SlotFlags { read_only: false, dirty }).unwrap();
}

/// The pages in the log.
fn log(guest: &Guest, bytes: u64) -> Vec<u64> {
    let mut bitmap = vec![0u64; (bytes / PAGE).div_ceil(64) as usize];
    guest.mmu.dirty_log(DATA_SLOT, &mut bitmap).unwrap();
    let pages = (0..bytes / PAGE).filter(|n| bitmap[*n as usize / 64] >> (n % 64) & 1 != 0);
    pages.collect()
}

/// What a guest page of `level` over `size` bytes of data, `skew` bytes off, becomes: (leaves, of
/// these large ones) after three accesses.
fn becomes(level: u32, largest: u64, size: u64, skew: u64) -> (u64, u64) {
    let (guest, memory) = guest(largest, size, skew);
    match level {
        3 => drop(guest.map_large(WINDOW, DATA, 3, RWU)),
        2 => (0..2).for_each(|n| {
            guest.map_large(WINDOW + n * BLOCK, DATA + n * BLOCK, 2, RWU);
        }),
        _ => (0..1024).for_each(|n| guest.map(Gva(WINDOW + n * PAGE), Gpa(DATA + n * PAGE), RWU)),
    }
    let mut cpu = guest.vcpu();
    let touched = [MIB + 8, BLOCK - 8, BLOCK + 16];
    for (value, at) in (1..).zip(touched) {
        store(&mut cpu, WINDOW + at, value);
        assert_eq!(memory.words()[at as usize / 8].load(Ordering::Relaxed), value);
    }
    for (value, at) in (1..).zip(touched) {
        assert_eq!(load(&mut cpu, WINDOW + at), value);
    }
    (guest.leaves(), guest.mmu.stats().pf_large)
}

#[test]
fn a_large_page_is_one_entry_where_its_memory_allows() {
    // The guest's page, the processor's largest, size and skew of the memory.
    assert_eq!(becomes(2, BLOCK, 4 * MIB, 0), (2, 2));
    assert_eq!(becomes(2, GIB, 4 * MIB, 0), (2, 2));
    assert_eq!(becomes(3, GIB, GIB, 0), (1, 1));
    assert_eq!(becomes(3, BLOCK, GIB, 0), (2, 2));
    // The memory ends before the page does.
    assert_eq!(becomes(3, GIB, GIB - PAGE, 0), (2, 2));
    assert_eq!(becomes(2, GIB, 4 * MIB - PAGE, 0), (1 + 8, 1));
    // Its machine addresses are not congruent, or not for so large a block.
    assert_eq!(becomes(3, GIB, GIB, BLOCK), (2, 2));
    assert_eq!(becomes(3, GIB, GIB, PAGE), (3 * 8, 0));
    assert_eq!(becomes(2, GIB, 4 * MIB, MIB), (3 * 8, 0));
    // The processor or the guest has none.
    assert_eq!(becomes(2, PAGE, 4 * MIB, 0), (3 * 8, 0));
    assert_eq!(becomes(1, GIB, 4 * MIB, 0), (3, 0));
}

#[test]
fn guests_with_4_byte_entries_and_pae_have_blocks() {
    let (guest, memory) = guest(GIB, 8 * MIB, 0);
    let unpaged = Regs { cr0: 1, cr4: 0, efer: 0, ..guest.regs() };
    let data = |gva: u64| memory.words()[gva as usize / 8].load(Ordering::Relaxed);
    // A page of 4 MiB is two blocks.
    let root = guest.new_table();
    guest.write(root, DATA | LARGE);
    let regs = Regs { cr0: unpaged.cr0 | bits::CR0_PG, cr4: bits::CR4_PSE, cr3: root.0, ..unpaged };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    for at in [0, BLOCK - 8, BLOCK, 2 * BLOCK - 8] {
        store(&mut cpu, at, at + 1);
        assert_eq!(data(at), at + 1);
    }
    assert_eq!((guest.leaves(), guest.mmu.stats().pf_large), (2, 2));
    // PAE, whose PDPTEs are in registers.
    let directory = guest.new_table();
    guest.write(Gpa(directory.0 + 8), (DATA + BLOCK) | LARGE);
    let pdptrs = [0, directory.0 | bits::P, 0, 0];
    let regs = Regs { cr4: bits::CR4_PAE, pdptrs, ..regs };
    cpu.vcpu_mut().set_regs(regs).unwrap();
    assert_eq!(load(&mut cpu, GIB + 2 * BLOCK - 8), 2 * BLOCK - 7);
    assert_eq!((guest.leaves(), guest.mmu.stats().pf_large), (3, 3));
    // No paging.
    cpu.vcpu_mut().set_regs(unpaged).unwrap();
    assert_eq!(load(&mut cpu, DATA + BLOCK - 8), BLOCK - 7);
    store(&mut cpu, DATA + 4 * MIB, 1);
    assert_eq!((guest.leaves(), guest.mmu.stats().pf_large), (5, 5));
    // The guest's tables are memory like any other there, and their slot is not congruent.
    assert_eq!(load(&mut cpu, root.0), guest.read(root));
    assert_eq!(guest.mmu.stats().pf_large, 5);
}

/// A machine that starts: no tables at all, and 1 GiB of memory from 0 on.
#[test]
fn without_paging_the_largest_pages_are_used() {
    for (levels, largest, leaves) in [(4, GIB, 1), (5, GIB, 1), (4, BLOCK, 3), (5, PAGE, 3 * 8)] {
        let tables = Arc::new(AllocatedMemory::new(256 * PAGE));
        let config = Config::new(tables).levels(levels).largest_page(largest);
        let mmu = Mmu::new(config).unwrap();
        let memory = Arc::new(AllocatedMemory::at(GIB, Machine(MACHINE)));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), memory)).unwrap();
        let regs = Regs { cr0: 0, cr4: 0, efer: 0, ..Regs::long_mode(0) };
        let mut cpu = mmu.create_soft_vcpu(regs).unwrap();
        for at in [0x7c00, 512 * MIB, GIB - 8] {
            cpu.session().store(Gva(at), &at.to_le_bytes(), false).unwrap();
            assert_eq!(cpu.session().load_u64(Gva(at), false), Ok(at));
            // Bits above 31 do not matter.
            assert_eq!(cpu.session().load_u64(Gva(at | 1 << 40), false), Ok(at));
        }
        let beyond = cpu.session().load(Gva(GIB), &mut [0], false);
        assert_eq!(beyond, Err(SoftExit::Mmio(Gpa(GIB))));
        assert_eq!(mmu.audit().unwrap().sptes, leaves);
        drop(cpu);
        mmu.audit().unwrap();
    }
}

#[test]
fn borders_of_slots_and_aliases_are_not_mapped_across() {
    let guest = tables(GIB);
    let halves = [0, MIB].map(|at| Arc::new(AllocatedMemory::at(MIB, Machine(MACHINE + at))));
    // Two slots that are one congruent block together.
    for (id, half) in (1..).zip(&halves) {
        let base = Gpa(DATA + (u64::from(id) - 1) * MIB);
        guest.mmu.create_slot(SlotConfig::new(id, base, half.clone())).unwrap();
    }
    let whole = Arc::new(AllocatedMemory::at(4 * MIB, Machine(MACHINE + GIB)));
    guest.mmu.create_slot(SlotConfig::new(3, Gpa(DATA + BLOCK), whole.clone())).unwrap();
    for n in 0..4 {
        guest.map_large(WINDOW + n * BLOCK, DATA + n * BLOCK, 2, RWU);
    }
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW + MIB - 8, 1);
    store(&mut cpu, WINDOW + MIB, 2);
    assert_eq!(halves[0].words()[MIB as usize / 8 - 1].load(Ordering::Relaxed), 1);
    assert_eq!(halves[1].words()[0].load(Ordering::Relaxed), 2);
    assert_eq!(guest.mmu.stats().pf_large, 0);
    store(&mut cpu, WINDOW + BLOCK, 3);
    assert_eq!(guest.mmu.stats().pf_large, 1);
    // An alias over a page of the block, to a page of a half.
    let alias =
        |number, base, size, target| Alias { number, base: Gpa(base), size, target: Gpa(target) };
    guest.mmu.set_alias(alias(0, DATA + BLOCK + PAGE, PAGE, DATA)).unwrap();
    store(&mut cpu, WINDOW + BLOCK + PAGE, 4);
    store(&mut cpu, WINDOW + BLOCK + 2 * PAGE, 5);
    assert_eq!(halves[0].words()[0].load(Ordering::Relaxed), 4);
    assert_eq!(load(&mut cpu, WINDOW), 4);
    assert_eq!(whole.words()[512].load(Ordering::Relaxed), 0);
    assert_eq!(guest.mmu.stats().pf_large, 1);
    guest.audit();
    guest.mmu.remove_alias(0).unwrap();
    assert_eq!(load(&mut cpu, WINDOW + BLOCK + 2 * PAGE), 5);
    assert_eq!(load(&mut cpu, WINDOW + BLOCK + PAGE), 0);
    assert_eq!(guest.mmu.stats().pf_large, 2);
    // A block that is an alias as a whole, of one, and of none.
    guest.mmu.set_alias(alias(0, DATA + 3 * BLOCK, BLOCK, DATA + BLOCK)).unwrap();
    assert_eq!(load(&mut cpu, WINDOW + 3 * BLOCK + 2 * PAGE), 5);
    assert_eq!(guest.mmu.stats().pf_large, 3);
    guest.mmu.set_alias(alias(0, DATA + 3 * BLOCK, BLOCK, DATA + BLOCK + PAGE)).unwrap();
    assert_eq!(load(&mut cpu, WINDOW + 3 * BLOCK + PAGE), 5);
    assert_eq!(guest.mmu.stats().pf_large, 3);
    guest.audit();
}

#[test]
fn a_dirty_log_breaks_blocks_and_misses_nothing() {
    for level in [2, 3] {
        for mode in [DirtyMode::WriteProtect, DirtyMode::DirtyBits] {
            let size = if level == 2 { 4 * MIB } else { GIB };
            let (guest, _) = guest(GIB, size, 0);
            for n in 0..if level == 2 { 2 } else { 1 } {
                guest.map_large(WINDOW + n * BLOCK, DATA + n * BLOCK, level, RWU);
            }
            let (mut cpu, mut other) = (guest.vcpu(), guest.vcpu());
            for page in [0, 5, 700] {
                store(&mut cpu, WINDOW + page * PAGE, page);
                other.session().store(Gva(WINDOW + page * PAGE + 8), &[1], false).unwrap();
            }
            let blocks = if level == 2 { 2 } else { 1 };
            let broken = || guest.mmu.stats().mmu_block_broken;
            // One tree for each privilege.
            assert_eq!((guest.leaves(), broken()), (2 * blocks, 0));
            set_log(&guest, mode);
            assert_eq!(broken(), 2 * blocks);
            guest.audit();
            for round in 0..3 {
                store(&mut cpu, WINDOW + 5 * PAGE, round);
                other.session().store(Gva(WINDOW + 6 * PAGE), &[1], false).unwrap();
                assert_eq!(load(&mut cpu, WINDOW + 9 * PAGE), 0);
                store(&mut other, WINDOW + 1023 * PAGE, round);
                assert_eq!(log(&guest, size), [5, 6, 1023], "{mode:?}");
                assert_eq!(log(&guest, size), [0u64; 0]);
            }
            assert!(guest.leaves() > 2 * blocks);
            set_log(&guest, DirtyMode::Off);
            store(&mut cpu, WINDOW + 5 * PAGE, 9);
            store(&mut cpu, WINDOW + 600 * PAGE, 9);
            for page in [6, 600] {
                other.session().load(Gva(WINDOW + page * PAGE), &mut [0], false).unwrap();
            }
            assert_eq!(guest.leaves(), 2 * blocks, "whole again");
            assert_eq!(load(&mut cpu, WINDOW + 1023 * PAGE), 2);
        }
    }
}

/// The log of 1 GiB that is mapped by one entry, without a fault for each page that is only read.
#[test]
fn a_block_is_split_at_once() {
    let (guest, _) = guest(GIB, GIB, 0);
    guest.map_large(WINDOW, DATA, 3, RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW, 1);
    set_log(&guest, DirtyMode::WriteProtect);
    let before = guest.mmu.stats().pf_fixed;
    (0..512)
        .for_each(|page| assert_eq!(load(&mut cpu, WINDOW + page * PAGE), u64::from(page == 0)));
    assert_eq!(guest.mmu.stats().pf_fixed, before + 1);
    store(&mut cpu, WINDOW + 77 * PAGE, 1);
    assert_eq!(log(&guest, GIB), [77]);
    guest.audit();
}

#[test]
fn a_guest_table_in_a_block_breaks_it() {
    for level in [2, 3] {
        let (guest, _) = guest(GIB, GIB, 0);
        guest.map_large(WINDOW, DATA, level, RWU);
        let mut cpu = guest.vcpu();
        // A table for another address, in the block.
        let (table, page) = (DATA + 0x10_0000, DATA + 0x10_1000);
        store(&mut cpu, WINDOW + 0x10_0000, page | RWU);
        store(&mut cpu, WINDOW + 0x10_1000, 0xa);
        store(&mut cpu, WINDOW + 0x10_2000, 0xb);
        assert_eq!((guest.leaves(), guest.mmu.stats().mmu_block_broken), (1, 0));
        guest.write(guest.entry(guest.root, Gva(0), 2), table | RWU);
        assert_eq!(load(&mut cpu, 0), 0xa);
        assert_eq!(guest.mmu.stats().mmu_block_broken, 1);
        guest.audit();
        let mut other = guest.vcpu();
        assert_eq!(load(&mut other, 0), 0xa);
        // The table is written through what was the block.
        for round in 0..4u64 {
            let (to, value) = [(page + PAGE, 0xb), (page, 0xa)][round as usize % 2];
            store(&mut cpu, WINDOW + 0x10_0000, to | RWU);
            assert_eq!(guest.mmu.stats().mmu_unsync, 1);
            cpu.session().invlpg(Gva(0));
            other.session().invlpg(Gva(0));
            assert_eq!((load(&mut cpu, 0), load(&mut other, 0)), (value, value));
            // Other pages of it need no emulation.
            let emulated = guest.mmu.stats().pf_emulate;
            store(&mut cpu, WINDOW + 0x10_3000 + round * PAGE, round);
            assert_eq!(guest.mmu.stats().pf_emulate, emulated);
            guest.audit();
        }
        // With the table out of use the block is whole again.
        guest.write(guest.entry(guest.root, Gva(0), 2), 0);
        guest.mmu.zap_all();
        guest.mmu.maintain();
        store(&mut cpu, WINDOW, 1);
        assert_eq!(guest.leaves(), 1);
    }
}

/// The root in the block is known before anything was derived from it.
#[test]
fn a_root_in_a_block_breaks_it_when_it_is_filled() {
    for levels in [4, 5] {
        let tables = Arc::new(AllocatedMemory::new(512 * PAGE));
        let mmu = Mmu::new(Config::new(tables).levels(levels)).unwrap();
        let memory = AllocatedMemory::at(8 * MIB, Machine(MACHINE));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
        let guest = Guest::over(mmu, 6 * MIB);
        guest.map_large(WINDOW, BLOCK, 2, RWU);
        let mut cpu = guest.vcpu();
        store(&mut cpu, WINDOW + 0x5000, 0);
        let regs = Regs::long_mode(BLOCK + 0x5000);
        let narrow = Regs { cr4: 0, efer: 0, cr3: BLOCK + 0x6000, ..regs };
        for regs in [regs, narrow] {
            let mut other = guest.mmu.create_soft_vcpu(regs).unwrap();
            assert_eq!(reason(other.session().load(Gva(0), &mut [0], true)), Reason::NotPresent);
            guest.audit();
            store(&mut cpu, WINDOW + 0x7000, 1);
            guest.audit();
            assert_eq!(guest.mmu.stats().mmu_block_broken, 0);
            drop(other);
            guest.mmu.zap_all();
        }
        let mut other = guest.mmu.create_soft_vcpu(regs).unwrap();
        store(
            &mut cpu,
            WINDOW + 0x5000 + (WINDOW >> 39) * 8,
            guest.read(Gpa(guest.root.0 + (WINDOW >> 39) * 8)),
        );
        assert_eq!(load(&mut other, WINDOW + 0x7000), 1);
        guest.audit();
        store(&mut cpu, WINDOW + 0x5000 + (WINDOW >> 39) * 8, 0);
        other.session().flush();
        let gone = other.session().load(Gva(WINDOW + 0x7000), &mut [0], true);
        assert_eq!(reason(gone), Reason::NotPresent);
        guest.audit();
    }
}

#[test]
fn the_host_breaks_blocks_and_they_become_whole_again() {
    for level in [2, 3] {
        let (guest, memory) = guest(GIB, GIB, 0);
        guest.map_large(WINDOW, DATA, level, RWU);
        let mut cpu = guest.vcpu();
        store(&mut cpu, WINDOW, 1);
        assert_eq!(guest.leaves(), 1);
        // One page read-only.
        guest.mmu.set_host_writable(data(7, 1), false).unwrap();
        assert_eq!(guest.mmu.stats().mmu_block_broken, 1);
        let refused = cpu.session().store(Gva(WINDOW + 7 * PAGE), &[2], true);
        assert_eq!(refused, Err(SoftExit::HostReadOnly(Gpa(DATA + 7 * PAGE))));
        assert_eq!(load(&mut cpu, WINDOW + 7 * PAGE), 0);
        store(&mut cpu, WINDOW + 8 * PAGE, 1);
        assert_eq!(memory.words()[7 * 512].load(Ordering::Relaxed), 0);
        assert!(guest.leaves() > 1);
        guest.mmu.set_host_writable(data(7, 1), true).unwrap();
        let large = guest.mmu.stats().pf_large;
        store(&mut cpu, WINDOW + 7 * PAGE, 3);
        assert_eq!(guest.mmu.stats().pf_large, large + 1, "whole again at the next fault");
        let fixed = guest.mmu.stats().pf_fixed;
        store(&mut cpu, WINDOW + 500 * PAGE, 3);
        assert_eq!(guest.mmu.stats().pf_fixed, fixed);
        // One page away, and another.
        let gone = guest.mmu.invalidate(data(9, 1)).unwrap();
        assert_eq!(guest.mmu.stats().mmu_block_broken, 2);
        store(&mut cpu, WINDOW, 4);
        assert_eq!(guest.mmu.stats().pf_large, large + 1);
        gone.end();
        assert_eq!(load(&mut cpu, WINDOW + 9 * PAGE), 0);
        assert_eq!(guest.mmu.stats().pf_large, large + 2);
        drop(guest.mmu.invalidate(data(0, GIB / PAGE)).unwrap());
        assert_eq!(guest.leaves(), 0);
        assert_eq!(load(&mut cpu, WINDOW), 4);
    }
}

#[test]
fn a_block_goes_with_its_slot() {
    let (guest, memory) = guest(GIB, 4 * MIB, 0);
    guest.map_large(WINDOW, DATA, 2, RWU);
    guest.map_large(WINDOW + BLOCK, DATA + GIB, 2, RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW + 8, 7);
    guest.mmu.move_slot(DATA_SLOT, Gpa(DATA + GIB)).unwrap();
    let gone = cpu.session().load(Gva(WINDOW + 8), &mut [0], true);
    assert_eq!(gone, Err(SoftExit::Mmio(Gpa(DATA + 8))));
    assert_eq!(load(&mut cpu, WINDOW + BLOCK + 8), 7);
    assert_eq!(guest.leaves(), 1);
    // No longer aligned.
    guest.mmu.move_slot(DATA_SLOT, Gpa(DATA + GIB - PAGE)).unwrap();
    assert_eq!(load(&mut cpu, WINDOW + BLOCK), memory.words()[512].load(Ordering::Relaxed));
    assert_eq!(guest.mmu.stats().pf_large, 2);
    // Read-only, whole.
    guest.mmu.move_slot(DATA_SLOT, Gpa(DATA)).unwrap();
    let flags = SlotFlags { read_only: true, dirty: DirtyMode::Off };
    store(&mut cpu, WINDOW, 1);
    guest.mmu.set_slot_flags(DATA_SLOT, flags).unwrap();
    let refused = cpu.session().store(Gva(WINDOW), &[2], true);
    assert_eq!(refused, Err(SoftExit::Mmio(Gpa(DATA))));
    assert_eq!((load(&mut cpu, WINDOW), load(&mut cpu, WINDOW + 8)), (1, 7));
    assert_eq!((guest.leaves(), guest.mmu.stats().pf_large), (1, 4));
    guest.mmu.set_slot_flags(DATA_SLOT, SlotFlags::default()).unwrap();
    store(&mut cpu, WINDOW, 2);
    assert_eq!(guest.leaves(), 1);
    guest.mmu.delete_slot(DATA_SLOT).unwrap();
    assert_eq!(Arc::strong_count(&memory), 1);
    let gone = cpu.session().load(Gva(WINDOW), &mut [0], true);
    assert_eq!(gone, Err(SoftExit::Mmio(Gpa(DATA))));
    assert_eq!(guest.leaves(), 0);
}

/// A block is writable once the guest's entry has D, and not after that was cleared; rights of the
/// guest are those of the block.
#[test]
fn a_block_obeys_the_guests_entry() {
    let (guest, _) = guest(GIB, 4 * MIB, 0);
    let at = guest.map_large(WINDOW, DATA, 2, RWU);
    let mut cpu = guest.vcpu();
    let invalidate = |cpu: &mut SoftVcpu| cpu.session().invlpg(Gva(WINDOW));
    load(&mut cpu, WINDOW);
    assert_eq!(guest.read(at) & (bits::A | bits::D), bits::A);
    for round in 1..4 {
        store(&mut cpu, WINDOW, round);
        assert_eq!(guest.read(at) & (bits::A | bits::D), bits::A | bits::D);
        assert_eq!(guest.leaves(), 1);
        guest.write(at, DATA | LARGE);
        invalidate(&mut cpu);
        load(&mut cpu, WINDOW);
        assert_eq!(guest.read(at) & (bits::A | bits::D), bits::A);
    }
    guest.write(at, DATA | bits::P | bits::US | bits::PS);
    invalidate(&mut cpu);
    assert_eq!(reason(cpu.session().store(Gva(WINDOW), &[1], true)), Reason::Write);
    assert_eq!(load(&mut cpu, WINDOW), 3);
    guest.write(at, DATA | bits::P | bits::RW | bits::PS | bits::NX);
    invalidate(&mut cpu);
    assert_eq!(reason(cpu.session().load(Gva(WINDOW), &mut [0], true)), Reason::User);
    assert_eq!(reason(cpu.session().fetch(Gva(WINDOW), &mut [0], false)), Reason::Fetch);
    assert_eq!(cpu.session().store(Gva(WINDOW), &[1], false), Ok(()));
    // A table in the large page's place, and the page again.
    let table = guest.new_table();
    guest.write(Gpa(table.0), (DATA + PAGE) | RWU);
    store_entry(&guest, &mut cpu, at, table.0 | RWU);
    store(&mut cpu, WINDOW, 5);
    assert_eq!(guest.read(Gpa(DATA + PAGE)), 5);
    store_entry(&guest, &mut cpu, at, DATA | LARGE);
    assert_eq!(load(&mut cpu, WINDOW + PAGE), 5);
    guest.audit();
}

fn store_entry(guest: &Guest, cpu: &mut SoftVcpu, at: Gpa, value: u64) {
    guest.write(at, value);
    cpu.session().invlpg(Gva(WINDOW));
    guest.audit();
}

#[test]
fn all_pages_of_a_block_are_young_together() {
    let (guest, _) = guest(GIB, GIB, 0);
    guest.map_large(WINDOW, DATA, 2, RWU);
    guest.map_large(WINDOW + BLOCK, DATA + BLOCK, 2, RWU);
    guest.map(Gva(WINDOW + 2 * BLOCK), Gpa(DATA + 2 * BLOCK), RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW + 5 * PAGE, 1);
    store(&mut cpu, WINDOW + 2 * BLOCK, 1);
    let report = |clear: bool, range: PageRange| {
        let mut pages = Vec::new();
        let mut young = |_: &_, first: u64, set: u64| {
            pages.extend((0..64).filter(|n| set >> n & 1 != 0).map(|n| first + n));
        };
        let count = match clear {
            true => guest.mmu.clear_young(range, &mut young),
            false => guest.mmu.test_young(range, &mut young),
        };
        assert_eq!(count, Ok(pages.len() as u64));
        pages
    };
    let block: Vec<u64> = (0..512).collect();
    let all: Vec<u64> = block.iter().copied().chain([1024]).collect();
    assert_eq!(report(false, data(0, GIB / PAGE)), all);
    // Part of it only: the pages that were asked for.
    assert_eq!(report(false, data(3, 70)), (3..73).collect::<Vec<u64>>());
    assert_eq!(report(false, data(511, 2)), [511]);
    assert_eq!(report(true, data(100, 1)), [100]);
    assert_eq!(report(false, data(0, 1024)), [0u64; 0], "a block has one accessed bit");
    assert_eq!(report(true, data(0, GIB / PAGE)), [1024]);
    load(&mut cpu, WINDOW + 9 * PAGE);
    assert_eq!(report(true, data(0, GIB / PAGE)), block);
    store(&mut cpu, WINDOW + BLOCK, 1);
    assert_eq!(report(true, data(0, GIB / PAGE)), (512..1024).collect::<Vec<u64>>());
    assert_eq!(guest.leaves(), 3);
}

/// One page of 1 GiB.
#[test]
fn a_gibibyte_is_young_and_dirty_at_once() {
    let (guest, _) = guest(GIB, GIB, 0);
    guest.map_large(WINDOW, DATA, 3, RWU);
    let mut cpu = guest.vcpu();
    store(&mut cpu, WINDOW + GIB - 8, 1);
    assert_eq!(guest.mmu.clear_young(data(0, GIB / PAGE), |_, _, _| ()), Ok(GIB / PAGE));
    assert_eq!(guest.mmu.clear_young(data(0, GIB / PAGE), |_, _, _| ()), Ok(0));
    assert_eq!(guest.mmu.test_young(data(1000, 2), |_, _, _| ()), Ok(0));
    load(&mut cpu, WINDOW);
    assert_eq!(guest.mmu.test_young(data(1000, 2), |_, _, _| ()), Ok(2));
    guest.audit();
}

/// What the vCPUs, the migration and the host share.
struct Stress {
    guest: Guest,
    memory: Arc<AllocatedMemory>,
    stop: AtomicBool,
    /// Those who write stand still while it is set; so many do.
    pause: AtomicBool,
    paused: AtomicU64,
    stores: AtomicU64,
}

const STRESSED: u64 = 4 * BLOCK;
const RUNNERS: u64 = 2;

/// Ends the test for the other threads, too, when one fails.
struct Ends<'s>(&'s Stress);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
        self.0.pause.store(false, Ordering::Release);
    }
}

impl Stress {
    /// A vCPU: what it has stored it finds again, by any way and at either privilege.
    fn run(&self, id: u64) {
        let mut random = Random::new(setting("LARGE_SEED", 1) << 8 | id);
        let mut cpu = self.guest.vcpu();
        let mut values = std::collections::HashMap::new();
        let _ends = Ends(self);
        while !self.stop.load(Ordering::Relaxed) {
            self.stand_still_if_asked();
            // By the large pages, or by the page of 1 GiB.
            let window = random.pick(&[WINDOW, WINDOW + GIB]);
            let at = random.below(STRESSED / PAGE) * PAGE + random.below(16) * 64 + id * 8;
            let (gva, user) = (Gva(window + at), random.one_in(2));
            let value = random.next();
            match random.below(4) {
                0 | 1 => match cpu.session().store(gva, &value.to_le_bytes(), user) {
                    Ok(()) => drop(values.insert(at, value)),
                    Err(SoftExit::HostReadOnly(_)) => {}
                    Err(other) => panic!("{other}"),
                },
                2 => {
                    let seen = cpu.session().load_u64(gva, user).unwrap();
                    assert_eq!(seen, values.get(&at).copied().unwrap_or(0), "at {at:#x}");
                }
                _ => {
                    let old = values.get(&at).copied().unwrap_or(0);
                    match cpu.session().cmpxchg(gva, 8, u128::from(old), u128::from(value), user) {
                        Ok(swapped) => {
                            assert_eq!(swapped, Ok(()));
                            values.insert(at, value);
                        }
                        Err(SoftExit::HostReadOnly(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            self.stores.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn words(&self, pages: std::ops::Range<u64>) -> Vec<u64> {
        let words = &self.memory.words()[pages.start as usize * 512..pages.end as usize * 512];
        words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    fn stand_still_if_asked(&self) {
        if self.pause.load(Ordering::Acquire) {
            self.paused.fetch_add(1, Ordering::AcqRel);
            while self.pause.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            self.paused.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn until_paused(&self, runners: u64) {
        while self.paused.load(Ordering::Acquire) != runners {
            assert!(!self.stop.load(Ordering::Relaxed), "another thread has failed");
            std::thread::yield_now();
        }
    }

    /// Rounds of a migration: log on, copy, harvests, the vCPUs stopped, the last harvest; then the
    /// copy is the memory.
    fn migrate(&self) {
        let mut random = Random::new(setting("LARGE_SEED", 1) << 8 | 100);
        let end = Instant::now() + Duration::from_secs(setting("LARGE_SECONDS", 3));
        let mut rounds = 0;
        let _ends = Ends(self);
        while Instant::now() < end {
            let mode = random.pick(&[DirtyMode::WriteProtect, DirtyMode::DirtyBits]);
            set_log(&self.guest, mode);
            let mut copy = self.words(0..STRESSED / PAGE);
            for last in [false, false, false, true] {
                if last {
                    self.pause.store(true, Ordering::Release);
                    self.until_paused(RUNNERS + 1);
                }
                for page in log(&self.guest, GIB) {
                    let words = self.words(page..page + 1);
                    copy[page as usize * 512..][..512].copy_from_slice(&words);
                }
            }
            for (n, pair) in copy.iter().zip(self.words(0..STRESSED / PAGE)).enumerate() {
                assert_eq!(*pair.0, pair.1, "page {:#x} was written and not logged", n / 512);
            }
            self.pause.store(false, Ordering::Release);
            self.until_paused(0);
            set_log(&self.guest, DirtyMode::Off);
            // For a while blocks may be whole.
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            rounds += 1;
        }
        assert!(rounds > 0);
    }

    /// Pages that are read-only or away are not written; tables come and go in the blocks.
    fn be_the_host(&self) {
        let mut random = Random::new(setting("LARGE_SEED", 1) << 8 | 200);
        let mmu = &self.guest.mmu;
        let _ends = Ends(self);
        while !self.stop.load(Ordering::Relaxed) {
            self.stand_still_if_asked();
            let page = random.below(STRESSED / PAGE);
            let count = random.pick(&[1, 1, 600]).min(STRESSED / PAGE - page);
            match random.below(5) {
                0 => {
                    let gone = mmu.invalidate(data(page, count)).unwrap();
                    let before = self.words(page..page + count);
                    std::thread::yield_now();
                    assert_eq!(self.words(page..page + count), before, "written while away");
                    gone.end();
                }
                1 => {
                    mmu.set_host_writable(data(page, count), false).unwrap();
                    let before = self.words(page..page + count);
                    std::thread::yield_now();
                    assert_eq!(self.words(page..page + count), before, "written, but read-only");
                    mmu.set_host_writable(data(page, count), true).unwrap();
                }
                2 => drop(mmu.clear_young(data(page, count), |_, _, _| ()).unwrap()),
                3 => {
                    // An address space whose tables are in the block: its words of the page are 0.
                    let root = DATA + page * PAGE;
                    let user = random.one_in(2);
                    let mut cpu = mmu.create_soft_vcpu(Regs::long_mode(root)).unwrap();
                    let mut session = cpu.session();
                    // Entry 511 is never stored to.
                    let found = session.load(Gva(511 << 39 | 0xffff << 48), &mut [0], user);
                    assert_eq!(reason(found), Reason::NotPresent);
                    drop(session);
                    // It refers to the guest's own tables for the page of 1 GiB.
                    let window = 1 + (WINDOW >> 39);
                    let entry = self.guest.read(Gpa(self.guest.root.0 + (window - 1) * 8));
                    mmu.write_phys(Gpa(root + 511 * 8), &entry.to_le_bytes());
                    let gva = Gva(511 << 39 | 0xffff << 48 | (WINDOW & ((1 << 39) - 1)) | GIB);
                    cpu.session().invlpg(gva);
                    cpu.session().load(gva, &mut [0], user).unwrap();
                    mmu.write_phys(Gpa(root + 511 * 8), &[0; 8]);
                    cpu.session().invlpg(gva);
                    let found = cpu.session().load(gva, &mut [0], user);
                    assert_eq!(reason(found), Reason::NotPresent);
                }
                _ if random.one_in(4) => mmu.zap_all(),
                _ => mmu.maintain(),
            }
        }
    }
}

#[test]
fn blocks_come_and_go_under_running_vcpus() {
    let (guest, memory) = guest(GIB, GIB, 0);
    (0..STRESSED / BLOCK).for_each(|n| {
        guest.map_large(WINDOW + n * BLOCK, DATA + n * BLOCK, 2, RWU);
    });
    guest.map_large(WINDOW + GIB, DATA, 3, RWU);
    let [stop, pause] = [false; 2].map(AtomicBool::new);
    let [paused, stores] = [0; 2].map(AtomicU64::new);
    let stress = Stress { guest, memory, stop, pause, paused, stores };
    std::thread::scope(|s| {
        (0..RUNNERS).for_each(|id| {
            let stress = &stress;
            s.spawn(move || stress.run(id));
        });
        s.spawn(|| stress.be_the_host());
        stress.migrate();
    });
    stress.guest.audit();
    stress.guest.mmu.maintain();
    let stats = stress.guest.mmu.stats();
    assert!(stats.pf_large > 10 && stats.mmu_block_broken > 10, "{stats:?}");
    assert!(stress.stores.load(Ordering::Relaxed) > 1000);
}

/// Ageing passes over each page and each block once, however large the slot is.
#[test]
fn blocks_of_a_large_slot_are_aged() {
    for gib in [2u64, 4] {
        let config = Config::new(Arc::new(AllocatedMemory::new(2048 * PAGE))).largest_page(2 << 20);
        let mmu = Mmu::new(config).unwrap();
        let memory = AllocatedMemory::at(gib << 30, Machine(1 << 40));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
        let regs = Regs { cr0: 1, cr4: 0, efer: 0, ..Regs::long_mode(0) };
        let mut cpu = mmu.create_soft_vcpu(regs).unwrap();
        for block in 0..gib << 30 >> 21 {
            cpu.session().load_u64(Gva(block << 21), false).unwrap();
        }
        let range = PageRange::Guest { base: Gpa(0), size: gib << 30 };
        let young = mmu.clear_young(range, |_, _, _| ()).unwrap();
        assert_eq!(young, gib << 30 >> 12);
        assert_eq!(mmu.clear_young(range, |_, _, _| ()), Ok(0));
    }
}
