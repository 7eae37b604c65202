// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random and adversarial tables in every mode, against the independent walker.
#![cfg(not(loom))]

mod paging_oracle;

use mmu_core::addr::{Gpa, Gva};
use mmu_core::memory::Hint;
use mmu_core::paging::{Access, PagingMode, Path, Regs};
use paging_oracle::{Memory, Mode, Random, accesses, mode, walk};
use proptest::prelude::*;

/// Pages of the low piece of memory; a second piece lies above 4 GiB.
const PAGES: u64 = 12;
const HIGH: u64 = 0x1_2340_0000;
const HIGH_PAGES: u64 = 4;

fn memory() -> Memory {
    Memory::new(&[(0x1000, PAGES * 4096), (HIGH, HIGH_PAGES * 4096)])
}

/// Registers of each mode.
fn regs(random: &mut Random, mode: Mode) -> Regs {
    let mut on = |bit: u64| if random.one_in(2) { bit } else { 0 };
    let mut regs = Regs::long_mode(0);
    regs.cr0 = 1 | 1 << 31 | on(1 << 16);
    regs.cr4 = on(1 << 20) | on(1 << 21) | on(1 << 22) | on(1 << 24) | on(1 << 28) | on(1 << 7);
    regs.cr4 |= on(1 << 4);
    regs.efer = on(1 << 11);
    regs.rflags = 2 | on(1 << 18);
    let lam = on(1 << 61) | on(1 << 62);
    match mode {
        Mode::Off => regs.cr0 &= !(1 << 31),
        Mode::ThirtyTwo => {}
        Mode::Pae => regs.cr4 |= 1 << 5,
        Mode::Four | Mode::Five => {
            regs.cr4 |= 1 << 5 | if mode == Mode::Five { 1 << 12 } else { 0 };
            regs.efer |= 1 << 8 | 1 << 10;
        }
    }
    regs.pkru = random.next() as u32 & random.next() as u32;
    regs.pkrs = random.next() as u32 & random.next() as u32;
    regs.maxphyaddr = random.pick(&[32, 34, 36, 40, 46, 51, 52]);
    regs.cr3 = table(random, mode) & ((1 << regs.maxphyaddr) - 1) | random.below(4096);
    if matches!(mode, Mode::Four | Mode::Five) {
        regs.cr3 |= lam;
    }
    for pdpte in &mut regs.pdptrs {
        *pdpte = table(random, mode) | u64::from(!random.one_in(8)) | random.next() & 0xe18;
        if random.one_in(10) {
            *pdpte |= 1 << random.below(64);
        }
    }
    regs
}

/// A page that may be a table: mostly one in memory.
fn table(random: &mut Random, mode: Mode) -> u64 {
    match random.below(30) {
        0 => random.next() & 0xf_ffff_ffff_f000,
        1..=4 if mode != Mode::ThirtyTwo => HIGH + random.below(HIGH_PAGES) * 4096,
        _ => (1 + random.below(PAGES)) * 4096,
    }
}

fn entry(random: &mut Random, mode: Mode) -> u64 {
    let mut entry = table(random, mode) | 0x27;
    for (bit, chance) in [(0, 25), (1, 6), (2, 6), (5, 3), (6, 2), (8, 2), (3, 2), (4, 2)] {
        if random.one_in(chance) {
            entry ^= 1 << bit;
        }
    }
    if random.one_in(5) {
        // A large page, more or less aligned.
        entry |= 0x80;
        let low = random.pick(&[0x1f_e000u64, 0x3fff_e000, 0x3f_e000, 0]);
        entry = entry & !low | if random.one_in(3) { random.next() & low } else { 0 };
    }
    if random.one_in(4) {
        entry |= (random.next() & random.next()) & (0xf << 59 | 1 << 63);
    }
    if random.one_in(12) {
        entry ^= 1 << random.below(64);
    }
    entry
}

fn gva(random: &mut Random, mode: Mode) -> u64 {
    let mut gva = random.next();
    gva = match mode {
        Mode::Five if !random.one_in(6) => (gva << 7) as i64 as u64 >> 7,
        Mode::Four if !random.one_in(6) => ((gva << 16) as i64 >> 16) as u64,
        _ => gva,
    };
    if mode == Mode::Five && random.one_in(2) {
        gva = ((gva << 7) as i64 >> 7) as u64;
    }
    // Sometimes a tag on top.
    if random.one_in(4) {
        gva ^= random.next() & 0x7fff_0000_0000_0000;
    }
    gva
}

fn fill(random: &mut Random, memory: &Memory, mode: Mode) {
    for (base, pages) in [(0x1000, PAGES), (HIGH, HIGH_PAGES)] {
        for word in 0..pages * 512 {
            let value = if mode == Mode::ThirtyTwo {
                let low = entry(random, mode) & 0xffff_ffff;
                low | entry(random, mode) << 32
            } else {
                entry(random, mode)
            };
            memory.write8(base + word * 8, value);
        }
    }
}

/// Everything that must hold of one walk.
fn check(memory: &Memory, regs: &Regs, gva: u64, access: Access) {
    let map = memory.map();
    let hint = Hint::default();
    let paging = PagingMode::new(regs).unwrap();
    let expected = walk(memory, regs, gva, access);
    let context = || format!("{regs:x?} {gva:#x} {access:?}");
    let before: Vec<_> =
        expected.passed.iter().map(|(_, at, _)| memory.read8(at & !7).unwrap()).collect();

    // translate: the same answer, but the accessed and dirty bits as they are, and no store.
    let translated = paging.translate(&map, &hint, Gva(gva), Some(access));
    let same =
        |w: mmu_core::paging::Walk| mmu_core::paging::Walk { accessed: false, dirty: false, ..w };
    assert_eq!(translated.map(same), expected.result.map(same), "{}", context());
    let after: Vec<_> =
        expected.passed.iter().map(|(_, at, _)| memory.read8(at & !7).unwrap()).collect();
    assert_eq!(before, after);

    let walked = paging.walk(&map, &hint, Gva(gva), access);
    assert_eq!(walked, expected.result, "{}", context());
    for (level, at, value) in &expected.passed {
        let now = if mode(regs) == Mode::ThirtyTwo { memory.read4(*at) } else { memory.read8(*at) };
        // An entry that is on the path twice may have got the leaf's bits.
        let now = now.unwrap();
        let twice = expected.passed.iter().filter(|(_, other, _)| other == at).count() > 1;
        assert!(now == *value || twice && now & !0x40 == *value & !0x40, "{level} {}", context());
    }

    let mut path = Path::new();
    assert_eq!(paging.walk_path(&map, &hint, Gva(gva), access, &mut path), walked);
    let steps = path.steps().iter();
    let steps: Vec<_> = steps.map(|s| (s.level, s.entry.0, s.value & !0x60)).collect();
    let passed: Vec<_> = expected.passed.iter().map(|(l, at, v)| (*l, *at, v & !0x60)).collect();
    assert_eq!(steps, passed, "{}", context());
    assert_eq!(path.steps().iter().map(|s| s.entry).collect::<Vec<_>>().len(), passed.len());

    if let Ok(found) = walked {
        let allowed = paging.allowed(found.rights, access.user);
        let kind = access.kind;
        use mmu_core::paging::Kind::{Execute, Read, Write};
        let fits = match kind {
            Read => allowed.read,
            Write => allowed.write,
            Execute => allowed.execute,
        };
        assert!(fits || access.implicit, "{}", context());
        assert!(found.gpa.page_offset() == Gpa(gva).page_offset());
    }
}

#[test]
fn agrees_on_random_tables() {
    let memory = memory();
    let accesses = accesses();
    let rounds = if cfg!(debug_assertions) { 30 } else { 400 };
    let mut mapped = 0u32;
    let mut faults = std::collections::BTreeMap::new();
    for seed in 1..=rounds {
        for m in [Mode::Off, Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five] {
            let mut random = Random(seed * 7919);
            fill(&mut random, &memory, m);
            for _ in 0..100 {
                let regs = regs(&mut random, m);
                let paging = PagingMode::new(&regs).unwrap();
                for _ in 0..4 {
                    let gva = gva(&mut random, m);
                    let access = random.pick(&accesses);
                    check(&memory, &regs, gva, access);
                    let map = memory.map();
                    match paging.translate(&map, &Hint::default(), Gva(gva), Some(access)) {
                        Ok(_) => mapped += 1,
                        Err(fault) => {
                            *faults.entry((m as u8, fault.reason.name())).or_insert(0) += 1
                        }
                    }
                }
            }
        }
    }
    assert!(mapped > 5_000, "{mapped} mapped, {faults:?}");
    // Every reason came up in the longest format; what it can give, in the others.
    for (m, reasons) in [(Mode::Five, 10), (Mode::Four, 10), (Mode::Pae, 8), (Mode::ThirtyTwo, 7)] {
        let seen = faults.keys().filter(|(of, _)| *of == m as u8).count();
        assert!(seen >= reasons, "{m:?}: {faults:?}");
    }
}

#[test]
fn batches_are_walks() {
    let memory = memory();
    for m in [Mode::Off, Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five] {
        let mut random = Random(0x5eed + m as u64);
        fill(&mut random, &memory, m);
        let map = memory.map();
        for n in [0, 1, 31, 32, 33, 200] {
            let paging = PagingMode::new(&regs(&mut random, m)).unwrap();
            let mut gvas: Vec<_> = (0..n).map(|_| Gva(gva(&mut random, m))).collect();
            // Some that share tables.
            for i in 1..gvas.len() {
                if random.one_in(2) {
                    gvas[i] = gvas[i - 1].wrapping_add(random.below(4) * 4096);
                }
            }
            let hint = Hint::default();
            let singly: Vec<_> =
                gvas.iter().map(|g| paging.walk(&map, &hint, *g, Access::write())).collect();
            let mut batch = Vec::new();
            paging.walk_batch(&map, &hint, &gvas, Access::write(), |i, result| {
                assert_eq!(i, batch.len());
                batch.push(result);
            });
            // The batch came second: what the later single walks set, the earlier ones now see.
            let plain = |r: &Result<mmu_core::paging::Walk, _>| r.map(|w| (w.gpa, w.rights));
            assert_eq!(
                singly.iter().map(plain).collect::<Vec<_>>(),
                batch.iter().map(plain).collect::<Vec<_>>()
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(debug_assertions) { 200 } else { 2000 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Tables that proptest can shrink: a few entries in otherwise empty memory, any bits.
    #[test]
    fn agrees_on_arbitrary_entries(
        mode_index in 0usize..4,
        seed in 1u64..,
        entries in prop::collection::vec((0u64..PAGES * 512, 1u64..=PAGES, any::<u64>()), 0..40),
        path in prop::collection::vec((0u64..4096, any::<bool>()), 5),
        gva in any::<u64>(),
        access in 0usize..12,
    ) {
        let m = [Mode::ThirtyTwo, Mode::Pae, Mode::Four, Mode::Five][mode_index];
        let memory = memory();
        let regs = regs(&mut Random(seed), m);
        for (word, page, flags) in entries {
            memory.write8(0x1000 + word * 8, page << 12 | flags & 0x8000_0000_0000_0fff);
        }
        // A path for the address: entry i of each table refers to the next page.
        for (i, (flags, large)) in path.iter().enumerate() {
            for slot in 0..512 {
                let value = (i as u64 + 2) << 12 | flags & !0x80 | u64::from(*large) << 7 | 1;
                if memory.read8((i as u64 + 1) * 4096 + slot * 8) == Some(0) {
                    memory.write8((i as u64 + 1) * 4096 + slot * 8, value | value << 32 & m32(m));
                }
            }
        }
        let gva = if seed % 3 == 0 { gva } else { gva & 0x7fff_ffff_ffff };
        check(&memory, &regs, gva, accesses()[access]);
    }
}

fn m32(mode: Mode) -> u64 {
    if mode == Mode::ThirtyTwo { u64::MAX } else { 0 }
}
