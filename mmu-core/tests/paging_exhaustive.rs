// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every combination of the bits that matter, of control registers and of kinds of access, against
//! the independent walker: results, error codes, and the tables afterwards.
#![cfg(not(loom))]

mod paging_oracle;

use mmu_core::addr::Gva;
use mmu_core::memory::Hint;
use mmu_core::paging::{PagingMode, Regs};
use paging_oracle::{Memory, Mode, accesses, walk};

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const NX: u64 = 1 << 63;

/// Every subset of the bits.
fn subsets(bits: &[u64]) -> Vec<u64> {
    let subset = |n: usize| {
        bits.iter().enumerate().filter(|(i, _)| n >> i & 1 == 1).map(|(_, bit)| bit).sum()
    };
    (0..1 << bits.len()).map(subset).collect()
}

/// WP, NXE, SMEP, SMAP and AC in every combination, with keys off and in five settings.
fn registers(mode: Mode) -> Vec<Regs> {
    let mut all = Vec::new();
    let keys: &[(u64, u32)] = match mode {
        // Key 1: access denied, write denied; for user pages, for supervisor pages, for both.
        Mode::Four | Mode::Five => &[
            (0, 0xc),
            (1 << 22, 0x4),
            (1 << 22, 0x8),
            (1 << 24, 0x4),
            (1 << 24, 0x8),
            (5 << 22, 0xc),
        ],
        _ => &[(5 << 22, 0xc)],
    };
    for n in 0..32u64 {
        for &(enable, rights) in keys {
            let mut regs = Regs::long_mode(0x1000);
            let on = |i: u32, bit: u64| if n >> i & 1 == 1 { bit } else { 0 };
            regs.cr0 = 1 | 1 << 31 | on(0, 1 << 16);
            regs.efer = on(1, 1 << 11);
            regs.cr4 = on(2, 1 << 20) | on(3, 1 << 21) | enable;
            regs.rflags = 2 | on(4, 1 << 18);
            regs.pkru = rights;
            regs.pkrs = rights;
            regs.maxphyaddr = 40;
            match mode {
                Mode::Off => unreachable!(),
                Mode::ThirtyTwo => regs.cr4 |= 1 << 4,
                Mode::Pae => {
                    regs.cr4 |= 1 << 5;
                    regs.pdptrs = [0x2001, 0x2001, 0x2001, 0x2001];
                }
                Mode::Four | Mode::Five => {
                    regs.cr4 |= 1 << 5 | if mode == Mode::Five { 1 << 12 } else { 0 };
                    regs.efer |= 1 << 8 | 1 << 10;
                }
            }
            all.push(regs);
        }
    }
    all
}

/// Walks with every `upper` bits in the entry of `level` and every `leaf` bits in the lowest.
/// Returns how many walks were compared.
fn sweep(mode: Mode, top: u8, level: u8, upper: &[u64], leaf: &[u64], stride: usize) -> usize {
    let memory = Memory::new(&[(0x1000, 0x8000)]);
    let map = memory.map();
    let hint = Hint::default();
    let wide = mode != Mode::ThirtyTwo;
    let (bits, size) = if wide { (9, 8) } else { (10, 4) };
    // The table of level n is page (top + 1 - n); all indices differ.
    let gva = (1..=top).fold(0x345, |gva, n| gva | u64::from(n + 2) << (12 + bits * (n - 1)));
    let at = |n: u8| u64::from(top + 1 - n) * 4096 + u64::from(n + 2) * size;
    let write = |n: u8, value| {
        if wide { memory.write8(at(n), value) } else { memory.write4(at(n), value) }
    };
    let read = |n: u8| if wide { memory.read8(at(n)) } else { memory.read4(at(n)) }.unwrap();
    let table = |n: u8| u64::from(top + 2 - n) * 4096;
    let mut count = 0;
    let mut turn = 0;
    for mut regs in registers(mode) {
        regs.pdptrs = regs.pdptrs.map(|pdpte| pdpte & 0xfff | 0x1000);
        let paging = PagingMode::new(&regs).unwrap();
        for &upper_bits in upper {
            for &leaf_bits in leaf {
                turn += 1;
                if turn % stride != 0 {
                    continue;
                }
                for access in accesses() {
                    for n in 2..=top {
                        write(n, table(n) | P | RW | US | A);
                    }
                    if level > 1 {
                        // A large page here must be aligned: its frame is 0.
                        let frame = if upper_bits & PS != 0 { 0 } else { table(level) };
                        write(level, frame | upper_bits);
                    }
                    write(1, 0x7000 | leaf_bits);
                    let expected = walk(&memory, &regs, gva, access);
                    let found = paging.walk(&map, &hint, Gva(gva), access);
                    let context = || format!("{upper_bits:#x} {leaf_bits:#x} {access:?} {regs:x?}");
                    assert_eq!(found, expected.result, "{}", context());
                    for &(n, entry, value) in &expected.passed {
                        assert_eq!((entry, read(n)), (at(n), value), "{}", context());
                    }
                    count += 1;
                }
            }
        }
    }
    count
}

fn stride(release: usize) -> usize {
    // Odd, so that no bit keeps step with it.
    if cfg!(debug_assertions) { release * 61 } else { release }
}

#[test]
fn four_level_rights_of_the_leaf() {
    let leaf = subsets(&[P, RW, US, A, D, PS, NX, 1 << 40, 1 << 59]);
    let n = sweep(Mode::Four, 4, 2, &[P | RW | US], &leaf, stride(1));
    println!("{n} walks");
}

#[test]
fn four_level_rights_of_every_level() {
    for level in [2, 3, 4] {
        let upper = subsets(&[P, RW, US, A, PS, NX, 1 << 51, 1 << 13]);
        let upper: Vec<_> =
            upper.iter().copied().filter(|b| b & PS != 0 || b & 1 << 13 == 0).collect();
        let leaf =
            subsets(&[RW, US, NX, D]).iter().map(|bits| bits | P | 1 << 59).collect::<Vec<_>>();
        let n = sweep(Mode::Four, 4, level, &upper, &leaf, stride(5));
        println!("{n} walks");
    }
}

#[test]
fn five_level() {
    let upper = subsets(&[P, RW, US, A, PS, NX]);
    let leaf = subsets(&[P, RW, US, NX, 1 << 59]);
    for level in [5, 4] {
        println!("{} walks", sweep(Mode::Five, 5, level, &upper, &leaf, stride(5)));
    }
}

#[test]
fn pae() {
    let upper = subsets(&[P, RW, US, A, D, PS, NX, 1 << 52]);
    let leaf = subsets(&[P, RW, US, A, D, PS, NX, 1 << 62]);
    println!("{} walks", sweep(Mode::Pae, 2, 2, &upper, &leaf, stride(11)));
}

#[test]
fn thirty_two_bit() {
    let upper = subsets(&[P, RW, US, A, D, PS, 1 << 13, 1 << 21]);
    let upper: Vec<_> =
        upper.into_iter().filter(|b| b & PS != 0 || b & (1 << 13 | 1 << 21) == 0).collect();
    let leaf = subsets(&[P, RW, US, A, D, PS]);
    println!("{} walks", sweep(Mode::ThirtyTwo, 2, 2, &upper, &leaf, stride(3)));
}
