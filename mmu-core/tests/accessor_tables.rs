// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest page tables written in every way that there is, while they are in sync, written natively, or
//! settling, and shadowed in three formats at once: after its flush a vCPU finds what the walker finds.
//!
//! `TABLES_SEED` and `TABLES_STEPS` make the sequences other and longer.

mod common;

use common::{Guest, MIB, PAGE, RWU, Random, setting};
use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::AllocatedMemory;
use mmu_core::paging::{Access, Regs, bits};
use mmu_core::shadow::StatsSnapshot;
use mmu_core::vcpu::{PinnedRange, SoftExit, SoftVcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::thread::scope;

const USED: u64 = bits::A | bits::D;
const WRITE: Access = Access::write().user();

/// The leaf tables that are edited. As tables of 8-byte entries they map 2 MiB from 0 on each, as
/// tables of 4-byte entries 4 MiB.
const TABLES: [u64; 2] = [0x10_0000, 0x10_1000];
/// Data pages.
const DATA: u64 = 0x20_0000;
const PAGES: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Long,
    Pae,
    Narrow,
}

const FORMATS: [Format; 3] = [Format::Long, Format::Pae, Format::Narrow];

impl Format {
    fn entry_size(self) -> u64 {
        if self == Self::Narrow { 4 } else { 8 }
    }

    /// What the entry at `offset` of a table maps.
    fn gva(self, table: usize, offset: u64) -> Gva {
        let (size, span) = (self.entry_size(), PAGE / self.entry_size() * PAGE);
        Gva(table as u64 * span + offset / size * PAGE)
    }

    /// Where the tables are mapped as data.
    fn window(self, table: usize) -> Gva {
        let span = PAGE / self.entry_size() * PAGE;
        Gva(2 * span + table as u64 * PAGE)
    }

    /// Writes the tables above, and the window's.
    fn regs(self, mmu: &Mmu) -> Regs {
        let at = 0x11_0000 + 0x1_0000 * self as u64;
        let set = |gpa: u64, value: u64| {
            let bytes = value.to_le_bytes();
            let size = self.entry_size() as usize;
            assert_eq!(mmu.write_phys(Gpa(gpa), &bytes[..size]), size);
        };
        let (directory, window) = (at + 2 * PAGE, at + 3 * PAGE);
        for (n, table) in TABLES.into_iter().chain([window]).enumerate() {
            set(directory + n as u64 * self.entry_size(), table | RWU | USED);
        }
        for (n, table) in TABLES.into_iter().enumerate() {
            set(window + n as u64 * self.entry_size(), table | RWU | USED);
        }
        let long = Regs::long_mode(at);
        match self {
            Self::Long => {
                set(at, (at + PAGE) | RWU | USED);
                set(at + PAGE, directory | RWU | USED);
                long
            }
            Self::Pae => {
                let pdptrs = [directory | bits::P, 0, 0, 0];
                set(at, pdptrs[0]);
                Regs { efer: 0, cr4: bits::CR4_PAE, pdptrs, ..long }
            }
            Self::Narrow => Regs { efer: 0, cr4: 0, cr3: directory, ..long },
        }
    }
}

fn guest(frames: u64, log: bool) -> Guest {
    let config = Config::new(Arc::new(AllocatedMemory::new(frames * PAGE)));
    let guest = Guest::with(config, 4 * MIB, 3 * MIB, log);
    for page in 0..PAGES {
        guest.write(Gpa(DATA + page * PAGE), page);
    }
    guest
}

/// How an entry is written.
const WAYS: u64 = 12;

/// Writes bytes over those that are there, in one of the ways.
fn edit(guest: &Guest, cpu: &mut SoftVcpu, way: u64, gpa: Gpa, gva: Gva, bytes: &[u8]) {
    let mut old = vec![0; bytes.len()];
    guest.mmu.memory().read(gpa, &mut old);
    let number = |bytes: &[u8]| {
        let mut wide = [0; 16];
        wide[..bytes.len()].copy_from_slice(bytes);
        u128::from_le_bytes(wide)
    };
    let (size, before, after) = (bytes.len(), number(&old), number(bytes));
    let whole = matches!(size, 1 | 2 | 4 | 8) && gpa.0 % size as u64 == 0;
    match way {
        0 => cpu.session().store(gva, bytes, true).unwrap(),
        1 => cpu.vcpu().write(gva, bytes, WRITE).unwrap(),
        2 => assert_eq!(cpu.vcpu().write_emulated(gva, bytes, WRITE), Ok(vec![])),
        3 if whole => {
            assert_eq!(cpu.vcpu().cmpxchg(gva, size, before, after, WRITE), Ok(Ok(())));
        }
        4 => cpu.vcpu().pin(gva, size, WRITE).unwrap().write(0, bytes).unwrap(),
        5 => cpu.vcpu().view(WRITE).write(gva, bytes).unwrap(),
        6 if whole => {
            let view = cpu.vcpu().view(WRITE);
            assert_eq!(view.cmpxchg(gva, size, before, after), Ok(Ok(())));
        }
        7 => assert_eq!(guest.mmu.write_phys(gpa, bytes), size),
        8 if size <= 8 => {
            let fetch = Access::execute().user();
            assert_eq!(cpu.vcpu_mut().patch_code(gva, &old, bytes, fetch), Ok(true));
        }
        9 if whole => {
            assert_eq!(cpu.session().cmpxchg(gva, size, before, after, true), Ok(Ok(())));
        }
        10 => {
            // Through the VMM's own mapping.
            let page = guest.mmu.pin_page(gpa, true).unwrap();
            page.write(gpa.0 % PAGE, bytes).unwrap();
            guest.mmu.note_write(gpa, size as u64);
        }
        #[cfg(feature = "vm-memory")]
        11 => {
            use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
            let memory = cpu.vcpu().view(WRITE).memory();
            memory.write_slice(bytes, GuestAddress(gva.0)).unwrap();
        }
        _ => cpu.vcpu().write(gva, bytes, WRITE).unwrap(),
    }
}

/// An access after an INVLPG, or a flush, against the walker.
fn check(guest: &Guest, cpu: &mut SoftVcpu, gva: Gva, write: bool, all: bool) -> bool {
    match all {
        true => cpu.session().flush(),
        false => cpu.session().invlpg(gva),
    }
    let access = if write { WRITE } else { Access::read().user() };
    let expected = match cpu.vcpu().translate(gva, Some(access)) {
        Ok(walk) if guest.mmu.memory().slot(walk.gpa.gfn()).is_some() => Ok(walk.gpa),
        Ok(walk) => Err(SoftExit::Mmio(walk.gpa)),
        Err(fault) => Err(SoftExit::Fault(fault)),
    };
    let mut seen = [0; 8];
    let result = match write {
        true => cpu.session().store(gva, &(gva.0 | 1).to_le_bytes(), true),
        false => cpu.session().load(gva, &mut seen, true),
    };
    assert_eq!(result, expected.map(drop), "{gva} write {write}");
    if let Ok(gpa) = expected {
        let there = guest.read(gpa);
        let value = if write { gva.0 | 1 } else { u64::from_le_bytes(seen) };
        assert_eq!(there, value, "{gva} at {gpa}, write {write}");
    }
    expected.is_ok()
}

/// One thread, every order of edits, flushes and accesses.
fn sequence(seed: u64, steps: u64) -> [u64; 2] {
    let mut random = Random::new(seed);
    let guest = guest(random.pick(&[96, 256]), random.one_in(2));
    let formats = FORMATS.map(|format| (format, format.regs(&guest.mmu)));
    let mut cpus =
        formats.map(|(format, regs)| (format, guest.mmu.create_soft_vcpu(regs).unwrap()));
    let mut kept: Option<(PinnedRange, usize)> = None;
    let mut counts = [0; 2];
    // The first and the last entries, in which formats and quadrants differ.
    let places = [0, 8, 16, 2040, 2048, 2056, 4080];
    for _ in 0..steps {
        let (table, place) = (random.below(2) as usize, random.pick(&places));
        let of = random.below(3) as usize;
        match random.below(8) {
            0..=2 => {
                // Whole entries, halves, two at a time, and bytes across two.
                let (offset, size) =
                    random.pick(&[(0, 8), (0, 8), (0, 4), (4, 4), (0, 16), (4, 8), (1, 2), (6, 4)]);
                let entry = |random: &mut Random| {
                    let flags = random.pick(&[RWU, RWU, bits::P | bits::US, bits::P, 0]);
                    let used = random.pick(&[0, bits::A, USED, USED]);
                    let page = random.below(PAGES + 1);
                    (DATA + page * PAGE) | flags | used
                };
                let (low, high) = (entry(&mut random), entry(&mut random));
                // Two of 4 bytes now and then.
                let low = if random.one_in(4) { low | high << 32 } else { low };
                let bytes = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
                let bytes = &bytes[..size];
                let at = place + offset;
                let (format, cpu) = &mut cpus[of];
                let gva = format.window(table).wrapping_add(at);
                match &kept {
                    Some((pinned, of)) if *of == table && random.one_in(3) => {
                        pinned.write(at, bytes).unwrap();
                    }
                    _ => {
                        let way = random.below(WAYS);
                        edit(&guest, cpu, way, Gpa(TABLES[table] + at), gva, bytes);
                    }
                }
            }
            3 => {
                let (format, cpu) = &mut cpus[of];
                let pinned = cpu.vcpu().pin(format.window(table), PAGE as usize, WRITE).unwrap();
                kept = random.one_in(2).then_some((pinned, table));
            }
            4 if random.one_in(8) => guest.mmu.zap_all(),
            4 if random.one_in(4) => {
                guest.audit();
            }
            _ => {
                let (format, cpu) = &mut cpus[of];
                let half = if *format == Format::Narrow { random.pick(&[0, 4]) } else { 0 };
                let gva = format.gva(table, place + half).wrapping_add(0x800);
                let (write, all) = (random.one_in(3), random.one_in(4));
                counts[usize::from(check(&guest, cpu, gva, write, all))] += 1;
            }
        }
    }
    guest.audit();
    counts
}

#[test]
fn every_way_to_write_a_table_reaches_every_shadow_of_it() {
    let (seed, steps) = (setting("TABLES_SEED", 1), setting("TABLES_STEPS", 4000));
    let mut counts = [0; 2];
    for seed in seed..seed + 8 {
        let result = std::panic::catch_unwind(|| sequence(seed, steps));
        let these = result.unwrap_or_else(|_| panic!("TABLES_SEED={seed}"));
        counts = [counts[0] + these[0], counts[1] + these[1]];
    }
    assert!(counts.iter().all(|count| *count > 8 * steps / 16), "{counts:?}");
}

/// Threads with entries of their own in the same tables, two of them in one format. Whoever tears a table
/// down, because of the writes to it or for another reason, must not let others' writes be missed.
fn entries_of_their_own(zap: bool) -> StatsSnapshot {
    let steps = setting("TABLES_STEPS", 3000);
    let guest = guest(256, true);
    let formats = [Format::Long, Format::Long, Format::Pae, Format::Narrow];
    let regs = formats.map(|format| format.regs(&guest.mmu));
    scope(|s| {
        for (n, (format, regs)) in formats.into_iter().zip(regs).enumerate() {
            let guest = &guest;
            s.spawn(move || {
                let mut random = Random::new(77 + n as u64);
                let mut cpu = guest.mmu.create_soft_vcpu(regs).unwrap();
                for step in 0..steps {
                    if zap && random.one_in(100) {
                        guest.mmu.zap_all();
                    }
                    let table = random.below(2) as usize;
                    let place = 8 * (n as u64 + 4 * random.pick(&[0, 1, 63, 127]));
                    let half = if format == Format::Narrow { 4 * random.below(2) } else { 0 };
                    let at = place + half;
                    let page = random.below(PAGES);
                    let flags = if random.one_in(4) { 0 } else { RWU };
                    let entry = ((DATA + page * PAGE) | flags).to_le_bytes();
                    let bytes = &entry[..format.entry_size() as usize];
                    let gva = format.window(table).wrapping_add(at);
                    let way = random.below(WAYS);
                    edit(guest, &mut cpu, way, Gpa(TABLES[table] + at), gva, bytes);
                    let gva = format.gva(table, at);
                    match random.one_in(4) {
                        true => cpu.session().flush(),
                        false => cpu.session().invlpg(gva),
                    }
                    let seen = cpu.session().load_u64(gva, true);
                    match flags {
                        0 => assert!(matches!(seen, Err(SoftExit::Fault(_))), "{n}, {step}, {way}"),
                        _ => assert_eq!(seen, Ok(page), "{n}, step {step}, way {way}"),
                    }
                }
            });
        }
    });
    guest.audit();
    guest.mmu.stats()
}

#[test]
fn entries_of_their_own_in_one_table() {
    let stats = entries_of_their_own(false);
    assert!(stats.mmu_unsync > 0 && stats.mmu_synced > 0 && stats.mmu_flooded > 0, "{stats:?}");
}

#[test]
fn entries_of_their_own_in_a_table_that_is_zapped() {
    let stats = entries_of_their_own(true);
    assert!(stats.mmu_unsync > 0 && stats.root_loads > 10, "{stats:?}");
}
