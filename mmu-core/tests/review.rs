// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Probes of a review.
mod common;
use common::{Guest, MIB, PAGE, RWU, load, reason, store};
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{AllocatedMemory, SlotConfig};
use mmu_core::paging::{Reason, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::vcpu::SoftExit;
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::time::Instant;

#[test]
fn invlpg_on_an_obsolete_tree() {
    for all in [false, true] {
        let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
        let window = Gva(0x40_0000);
        guest.write(Gpa(0x1000), 0xa);
        guest.write(Gpa(0x2000), 0xb);
        guest.map(window, Gpa(0x1000), RWU);
        let entry = guest.entry(guest.root, window, 1);
        guest.map(Gva(0x80_0000), Gpa(entry.0 & !0xfff), RWU);
        let edit = 0x80_0000 + entry.0 % PAGE;
        let mut cpu = guest.vcpu();
        let mut s = cpu.session();
        assert_eq!(s.load_u64(window, true), Ok(0xa));
        s.store(Gva(edit), &(0x1000 | RWU | bits::A | bits::D).to_le_bytes(), true).unwrap();
        assert_eq!(s.load_u64(window, true), Ok(0xa));
        s.store(Gva(edit), &(0x2000 | RWU).to_le_bytes(), true).unwrap();
        guest.mmu.zap_all();
        if all {
            s.flush()
        } else {
            s.invlpg(window)
        }
        assert_eq!(s.load_u64(window, true), Ok(0xb), "all: {all}");
    }
}

#[test]
fn a_non_canonical_address_is_no_device() {
    let guest = Guest::new(4 * MIB, 2 * MIB, 256, false);
    guest.map(Gva(0x4000), Gpa(1 << 40), RWU);
    let mut cpu = guest.vcpu();
    let mut s = cpu.session();
    for _ in 0..2 {
        assert_eq!(s.load(Gva(0x4000), &mut [0], true), Err(SoftExit::Mmio(Gpa(1 << 40))));
    }
    assert_eq!(reason(s.load(Gva(0x4000 | 1 << 50), &mut [0], true)), Reason::NonCanonical);
}

#[test]
fn tagged_pointers_on_five_levels() {
    let guest = Guest::with(Guest::config(256).levels(5), 4 * MIB, 2 * MIB, false);
    guest.write(Gpa(0x1000), 0xa);
    guest.map(Gva(0x40_0000), Gpa(0x1000), RWU);
    let regs = guest.regs();
    let regs = Regs { cr3: regs.cr3 | bits::CR3_LAM_U48, ..regs };
    let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let seen = cpu.session().load_u64(Gva(0x40_0000 | 0x55 << 48), true);
        let _ = tx.send(seen);
    });
    let seen = rx.recv_timeout(std::time::Duration::from_secs(5));
    assert_eq!(seen, Ok(Ok(0xa)));
}

/// N tables of each level, each linked in all of the level above.
fn dag(n: u64) -> std::time::Duration {
    let guest = Guest::new(16 * MIB, 8 * MIB, 2048, false);
    guest.mmu.set_nr_mmu_pages(2000).unwrap();
    let tables = |n: u64| (0..n).map(|_| guest.new_table()).collect::<Vec<_>>();
    let [l3, l2, l1] = [tables(n), tables(n), tables(n)];
    for i in 0..n as usize {
        guest.write(Gpa(guest.root.0 + 8 * i as u64), l3[i].0 | RWU);
        for j in 0..n as usize {
            guest.write(Gpa(l3[i].0 + 8 * j as u64), l2[j].0 | RWU);
            guest.write(Gpa(l2[i].0 + 8 * j as u64), l1[j].0 | RWU);
        }
        guest.write(l1[i], 0x1000 | RWU);
        // The table itself.
        guest.write(Gpa(l1[i].0 + 8), l1[i].0 | RWU);
    }
    let at = |a: u64, b: u64, c: u64, d: u64| a << 39 | b << 30 | c << 21 | d << 12;
    let mut cpu = guest.vcpu();
    for i in 0..n {
        load(&mut cpu, at(i, i, i, 0));
    }
    for i in 0..n {
        store(&mut cpu, at(i, i, i, 1) + 256 * 8, 0);
    }
    let mut other = guest.vcpu();
    let mut inside = other.session();
    inside.load_u64(Gva(at(0, 0, 0, 0)), true).unwrap();
    for i in 0..n {
        for j in 0..n {
            load(&mut cpu, at(0, i, j, 0));
        }
    }
    for i in 0..n {
        for j in 0..n {
            load(&mut cpu, at(i, j, 0, 0));
        }
    }
    let start = Instant::now();
    cpu.flush();
    start.elapsed()
}

#[test]
fn a_flush_costs_as_much_as_there_are_tables() {
    for n in [8, 16, 32, 64] {
        println!("fan-out {n}: {:?}", dag(n));
    }
}

#[test]
fn young_blocks() {
    for gib in [2u64, 4] {
        let config = Config::new(Arc::new(AllocatedMemory::new(2048 * PAGE))).largest_page(2 << 20);
        let mmu = Mmu::new(config).unwrap();
        let memory = AllocatedMemory::at(gib << 30, Machine(1 << 40));
        mmu.create_slot(SlotConfig::new(0, Gpa(0), Arc::new(memory))).unwrap();
        let regs = Regs { cr0: 1, cr4: 0, efer: 0, ..Regs::long_mode(0) };
        let mut cpu = mmu.create_soft_vcpu(regs).unwrap();
        for block in 0..(gib.min(4) << 30 >> 21) {
            cpu.session().load_u64(Gva(block << 21), false).unwrap();
        }
        let start = Instant::now();
        let range = PageRange::Guest { base: Gpa(0), size: gib << 30 };
        let young = mmu.clear_young(range, |_, _, _| ()).unwrap();
        println!("{gib} GiB: {young} pages young, {:?}", start.elapsed());
    }
}
