// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest tables that guests write natively: what a flush must show, and when a table is guarded.

mod common;

use common::{Guest, MIB, PAGE, RWU, load, store};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::paging::{Invpcid, bits};
use mmu_core::vcpu::SoftVcpu;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where the guest sees its page tables: the frame at gpa is at this address plus gpa.
const TABLES: u64 = 0x10_0000_0000;
/// The pages that are mapped and remapped.
const WINDOW: u64 = 0x40_0000;
/// Pages with their own number in the first word, from here on.
const PAGES: u64 = 0x10_0000;

struct World {
    guest: Guest,
}

impl World {
    fn new(native: bool) -> Self {
        let config = Guest::config(512).unsync(native);
        let guest = Guest::with(config, 16 * MIB, 8 * MIB, false);
        for page in 0..256 {
            guest.write(Gpa(PAGES + page * PAGE), page);
        }
        for page in 0..512 {
            guest.map(Gva(WINDOW + page * PAGE), Gpa(PAGES + page % 256 * PAGE), RWU | used());
        }
        let world = Self { guest };
        world.show(world.guest.root);
        world
    }

    /// Makes the tables below 9 MiB visible in the address space.
    fn show(&self, root: Gpa) {
        for table in 0..256 {
            let gpa = 8 * MIB + table * PAGE;
            let at = self.guest.entry(root, Gva(TABLES + gpa), 1);
            self.guest.write(at, gpa | RWU | used());
        }
    }

    /// Where the guest sees the entry for a page of the window.
    fn entry(&self, root: Gpa, gva: u64) -> u64 {
        TABLES + self.guest.entry(root, Gva(gva), 1).0
    }

    /// The guest maps a page of its window to a page of memory, and flushes nothing.
    fn remap(&self, cpu: &mut SoftVcpu, gva: u64, page: u64) {
        let entry = self.entry(self.guest.root, gva);
        store(cpu, entry, (PAGES + page * PAGE) | RWU | used());
    }
}

fn used() -> u64 {
    bits::A | bits::D
}

#[test]
fn after_the_first_write_a_table_is_written_natively() {
    let world = World::new(true);
    let mut cpu = world.guest.vcpu();
    let mut other = world.guest.vcpu();
    for cpu in [&mut cpu, &mut other] {
        assert!((0..8).all(|page| load(cpu, WINDOW + page * PAGE) == page));
    }
    for page in 0..8 {
        world.remap(&mut cpu, WINDOW + page * PAGE, 100 + page);
    }
    // Before its flush a vCPU sees the old or the new; this one remembers the old.
    assert_eq!(load(&mut other, WINDOW), 0);
    for page in 0..8 {
        let gva = WINDOW + page * PAGE;
        cpu.session().invlpg(Gva(gva));
        assert_eq!(load(&mut cpu, gva), 100 + page);
    }
    other.session().flush();
    assert!((0..8).all(|page| load(&mut other, WINDOW + page * PAGE) == 100 + page));
    let stats = world.guest.mmu.stats();
    assert_eq!((stats.mmu_pte_write, stats.pf_emulate, stats.mmu_unsync), (0, 0, 1));
    world.guest.audit();
}

#[test]
fn what_is_taken_away_is_gone_after_the_flush() {
    let world = World::new(true);
    let mut cpu = world.guest.vcpu();
    let entry = world.entry(world.guest.root, WINDOW);
    for (round, flags) in [0, bits::P | used(), bits::P | bits::US | used()].into_iter().enumerate()
    {
        store(&mut cpu, WINDOW + 8, 1);
        store(&mut cpu, entry, PAGES | flags);
        match round {
            1 => cpu.session().flush(),
            _ => cpu.session().invlpg(Gva(WINDOW)),
        }
        assert!(cpu.session().store(Gva(WINDOW + 8), &[2], true).is_err(), "round {round}");
        assert_eq!(cpu.session().load_u64(Gva(WINDOW), true).is_ok(), round == 2);
        store(&mut cpu, entry, PAGES | RWU | used());
        cpu.session().invlpg(Gva(WINDOW));
    }
    // D and A that the guest clears are set again by the next accesses (R35).
    store(&mut cpu, WINDOW + 8, 3);
    store(&mut cpu, entry, PAGES | RWU);
    cpu.session().invlpg(Gva(WINDOW));
    load(&mut cpu, WINDOW);
    let value = || world.guest.read(world.guest.entry(world.guest.root, Gva(WINDOW), 1));
    assert_eq!(value() & used(), bits::A);
    store(&mut cpu, WINDOW + 8, 4);
    assert_eq!(value() & used(), used());
    world.guest.audit();
}

/// Each kind of INVPCID that names what was changed shows it.
#[test]
fn an_invpcid_shows_what_was_written() {
    let (pcid, gva) = (0, Gva(WINDOW));
    let kinds = [
        Invpcid::Address { pcid, gva },
        Invpcid::Context { pcid },
        Invpcid::All,
        Invpcid::AllButGlobal,
    ];
    let world = World::new(true);
    let mut cpu = world.guest.vcpu();
    assert_eq!(load(&mut cpu, WINDOW), 0);
    for (page, what) in (1..).zip(kinds) {
        world.remap(&mut cpu, WINDOW, page);
        cpu.session().invpcid(what);
        assert_eq!(load(&mut cpu, WINDOW), page, "{what:?}");
    }
    let stats = world.guest.mmu.stats();
    assert_eq!((stats.mmu_pte_write, stats.mmu_unsync), (0, 1), "all natively");
    world.guest.audit();
}

/// R23: a table that stays as it is over some flushes is protected again; and the next write to it is
/// seen.
#[test]
fn a_quiet_table_settles() {
    let world = World::new(true);
    let mut cpu = world.guest.vcpu();
    for round in 1..4 {
        load(&mut cpu, WINDOW);
        world.remap(&mut cpu, WINDOW, round);
        for _ in 0..6 {
            cpu.session().flush();
            assert_eq!(load(&mut cpu, WINDOW), round);
        }
        let stats = world.guest.mmu.stats();
        assert_eq!((stats.mmu_unsync, stats.mmu_synced), (round, round), "{stats:?}");
        world.guest.audit();
    }
}

/// The same table below another root: a load of CR3 shows what was written through the first.
#[test]
fn a_shared_table_is_in_sync_below_every_root() {
    let world = World::new(true);
    let second = world.guest.new_table();
    for index in 0..512 {
        let entry = world.guest.read(Gpa(world.guest.root.0 + index * 8));
        world.guest.write(Gpa(second.0 + index * 8), entry);
    }
    let mut cpu = world.guest.vcpu();
    let mut expected = 1;
    for round in 2..40u64 {
        let root = if round % 2 == 0 { second } else { world.guest.root };
        cpu.vcpu_mut().set_cr3(root.0).unwrap();
        assert_eq!(load(&mut cpu, WINDOW + PAGE), expected, "round {round}");
        world.remap(&mut cpu, WINDOW + PAGE, round);
        expected = round;
    }
    world.guest.audit();
}

/// R34: a table that was written while no flush could find it is compared before it is linked again.
#[test]
fn a_table_that_was_unlinked_comes_back_up_to_date() {
    let world = World::new(true);
    let guest = &world.guest;
    let mut cpu = guest.vcpu();
    let entry = world.entry(guest.root, WINDOW);
    let above = TABLES + guest.entry(guest.root, Gva(WINDOW), 2).0;
    let link = guest.read(guest.entry(guest.root, Gva(WINDOW), 2));
    assert_eq!(load(&mut cpu, WINDOW), 0);
    store(&mut cpu, entry, (PAGES + PAGE) | RWU | used());
    for page in 2..30 {
        store(&mut cpu, above, 0);
        cpu.session().invlpg(Gva(WINDOW));
        assert!(cpu.session().load_u64(Gva(WINDOW), true).is_err());
        store(&mut cpu, entry, (PAGES + page * PAGE) | RWU | used());
        match page % 2 {
            0 => cpu.session().invlpg(Gva(WINDOW)),
            _ => cpu.session().flush(),
        }
        store(&mut cpu, above, link);
        assert_eq!(load(&mut cpu, WINDOW), page);
        guest.audit();
    }
    assert!(guest.mmu.stats().mmu_unsync > 0);
}

/// R34: the same where nothing but the link brings the table back, at whichever level: the flush found
/// no way to it, and no fault looks at the entry again.
#[test]
fn a_table_that_is_linked_again_shows_what_was_written_meanwhile() {
    for level in [2, 3] {
        let world = World::new(true);
        let guest = &world.guest;
        let mut cpu = guest.vcpu();
        assert_eq!((load(&mut cpu, WINDOW), load(&mut cpu, WINDOW + PAGE)), (0, 1));
        world.remap(&mut cpu, WINDOW + PAGE, 1);
        assert_eq!(load(&mut cpu, WINDOW + PAGE), 1);
        assert_eq!(guest.mmu.stats().mmu_unsync, 1);
        let entry = world.entry(guest.root, WINDOW + PAGE);
        let above = guest.entry(guest.root, Gva(WINDOW), level);
        let link = guest.read(above);
        guest.write(above, 0);
        cpu.session().flush();
        store(&mut cpu, entry, (PAGES + 2 * PAGE) | RWU | used());
        cpu.session().flush();
        guest.write(above, link);
        cpu.session().flush();
        // Another address of the table's makes the link.
        assert_eq!(load(&mut cpu, WINDOW), 0);
        assert_eq!(load(&mut cpu, WINDOW + PAGE), 2, "unlinked at level {level}");
        guest.audit();
    }
}

/// A table with more ways up than can be told is written by emulation, and its flushes hold as well.
#[test]
fn a_table_with_very_many_parents_is_guarded() {
    let world = World::new(true);
    let guest = &world.guest;
    let table = guest.read(guest.entry(guest.root, Gva(WINDOW), 2));
    const WAYS: u64 = 400;
    let way = |n: u64| 0x80_0000_0000 + n * 2 * MIB;
    for n in 0..WAYS {
        guest.write(guest.entry(guest.root, Gva(way(n)), 2), table);
    }
    let mut cpu = guest.vcpu();
    for n in 0..WAYS {
        assert_eq!(load(&mut cpu, way(n)), 0);
    }
    for page in 1..10 {
        world.remap(&mut cpu, WINDOW, page);
        cpu.session().flush();
        for n in 0..WAYS {
            assert_eq!(load(&mut cpu, way(n)), page);
        }
    }
    let stats = guest.mmu.stats();
    assert!(stats.pf_emulate > 0 && stats.mmu_unsync == 0, "{stats:?}");
    guest.audit();
    // And one that is written natively already may get as many: it begins anew.
    for n in 0..WAYS {
        guest.write(guest.entry(guest.root, Gva(way(n)), 2), 0);
    }
    cpu.session().flush();
    world.remap(&mut cpu, WINDOW, 77);
    cpu.session().invlpg(Gva(WINDOW));
    assert_eq!(load(&mut cpu, WINDOW), 77);
    for n in 0..WAYS {
        guest.write(guest.entry(guest.root, Gva(way(n)), 2), table);
        assert_eq!(load(&mut cpu, way(n)), 77);
    }
    guest.audit();
}

/// A page that was a table and is data now: its shadow goes.
#[test]
fn a_former_table_is_written_natively_again() {
    let world = World::new(false);
    let guest = &world.guest;
    let mut cpu = guest.vcpu();
    load(&mut cpu, WINDOW);
    let entry = world.entry(guest.root, WINDOW);
    for n in 0..512 {
        store(&mut cpu, (entry & !0xfff) + n * 8, n << 1);
    }
    let stats = guest.mmu.stats();
    assert_eq!(stats.mmu_flooded, 1);
    assert!(stats.pf_emulate < 8, "{stats:?}");
    guest.audit();
}

/// A table that is also used at another level, or as the root, is never written natively.
#[test]
fn a_table_that_points_at_itself_is_guarded() {
    let world = World::new(true);
    let guest = &world.guest;
    // The classic recursive entry: the root is a page table as well.
    guest.write(Gpa(guest.root.0 + 256 * 8), guest.root.0 | RWU | used());
    let own = 0xffff_8000_0000_0000 | 256 << 30 | 256 << 21 | 256 << 12;
    let mut cpu = guest.vcpu();
    for n in 300..310 {
        store(&mut cpu, own + n * 8, n << 1);
        assert_eq!(guest.read(Gpa(guest.root.0 + n * 8)), n << 1);
    }
    let stats = guest.mmu.stats();
    assert_eq!((stats.pf_emulate, stats.mmu_unsync), (10, 0));
    guest.audit();
}

/// Processors walk a tree until they are told of another, also when it is obsolete.
#[test]
fn a_flush_reaches_an_obsolete_tree() {
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
        s.store(Gva(edit), &(0x1000 | RWU | used()).to_le_bytes(), true).unwrap();
        assert_eq!(s.load_u64(window, true), Ok(0xa));
        s.store(Gva(edit), &(0x2000 | RWU).to_le_bytes(), true).unwrap();
        guest.mmu.zap_all();
        match all {
            true => s.flush(),
            false => s.invlpg(window),
        }
        assert_eq!(s.load_u64(window, true), Ok(0xb), "all: {all}");
    }
}

/// N tables of each level, each linked in all of the level above.
fn flush_a_lattice(n: u64) {
    let guest = Guest::with(Guest::config(2048), 16 * MIB, 8 * MIB, false);
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
    cpu.session().flush();
    assert!(guest.mmu.stats().mmu_unsync >= n);
    drop(inside);
    guest.audit();
}

/// A flush visits each table once, however many paths lead to it: else this one would take days.
#[test]
fn a_flush_visits_each_table_once() {
    flush_a_lattice(64);
}

/// Editors remap pages of each other's windows natively and shoot down; after the shootdown everybody
/// sees the new page, before it the old or the new.
#[test]
fn shootdowns_hold_while_tables_come_and_go_out_of_sync() {
    const CPUS: usize = 3;
    let world = World::new(true);
    let (wanted, round, acks) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|s| {
        for id in 0..CPUS {
            let (world, wanted, round, acks, stop, rounds) =
                (&world, &wanted, &round, &acks, &stop, &rounds);
            s.spawn(move || {
                let mut cpu = world.guest.vcpu();
                let mut now = 0u64;
                while !stop.load(Ordering::Acquire) {
                    let number = now + 1;
                    let page = number.wrapping_mul(0x9e37_79b9) >> 8 & 511;
                    let gva = WINDOW + page * PAGE;
                    if number as usize % CPUS == id {
                        let target = number % 256;
                        world.remap(&mut cpu, gva, target);
                        wanted.store(target, Ordering::Relaxed);
                        acks.store(0, Ordering::Relaxed);
                        round.store(2 * number, Ordering::Release);
                        flush(&mut cpu, number, gva);
                        assert_eq!(load(&mut cpu, gva), target, "editor in round {number}");
                        while acks.load(Ordering::Acquire) < CPUS as u64 - 1 {
                            std::thread::yield_now();
                            let _ = cpu.session().load_u64(Gva(gva ^ 0x1000), true);
                        }
                        rounds.store(number, Ordering::Relaxed);
                        if Instant::now() > end {
                            stop.store(true, Ordering::Release);
                        }
                        round.store(2 * number + 1, Ordering::Release);
                    } else {
                        while round.load(Ordering::Acquire) < 2 * number {
                            if stop.load(Ordering::Acquire) {
                                return;
                            }
                            // Maps neighbours again meanwhile.
                            let _ = cpu.session().load_u64(Gva(gva ^ 0x2000), true);
                        }
                        flush(&mut cpu, number, gva);
                        let target = wanted.load(Ordering::Relaxed);
                        assert_eq!(load(&mut cpu, gva), target, "vCPU {id} in round {number}");
                        acks.fetch_add(1, Ordering::Release);
                    }
                    while round.load(Ordering::Acquire) <= 2 * number {
                        if stop.load(Ordering::Acquire) {
                            return;
                        }
                        std::thread::yield_now();
                    }
                    now = number;
                }
            });
        }
    });
    world.guest.audit();
    let stats = world.guest.mmu.stats();
    assert!(rounds.load(Ordering::Relaxed) > 5, "{rounds:?}");
    assert!(stats.mmu_unsync > 0, "{stats:?}");
}

fn flush(cpu: &mut SoftVcpu, round: u64, gva: u64) {
    match round % 5 {
        0 => cpu.session().flush(),
        1 => {
            let cr3 = cpu.vcpu().regs().cr3;
            cpu.vcpu_mut().set_cr3(cr3).unwrap();
        }
        _ => cpu.session().invlpg(Gva(gva)),
    }
}
