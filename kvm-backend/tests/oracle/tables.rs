// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random and adversarial 4-level tables for the ring-3 oracle.
//!
//! A world is a root and a few more frames. Its kinds:
//!
//! * a *tree*: every frame has one level, entries mostly lead to the level below;
//! * a *tangle*: every frame may be a table of any level, the root included, and also a page;
//! * a *sweep*: one clean path for each level and page size, and beside its entry at that level 64
//!   more that differ from it in one bit each.

use super::Random;
use super::lab::{DATA, DATA_BYTES, STUB_SLOT};
use mmu_core::paging::bits::*;

/// The top-level slot with the ring-3 program.
pub const CODE_SLOT: u64 = 1;

/// What the entries may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Physical address bits.
    pub maxphyaddr: u32,
    /// Whether there are 1 GiB pages.
    pub giant: bool,
    /// Whether bit 8 of a PML4E is reserved, as AMD's manual says.
    pub amd: bool,
}

impl Limits {
    /// Bits that would end most walks at their first entry.
    fn rare_in_root(self) -> u64 {
        if self.amd { G } else { 0 }
    }
}

/// Frames as machine addresses and their words, to be put into the arena.
pub struct World {
    /// The first is the root.
    pub frames: Vec<u64>,
    pub words: Vec<[u64; 512]>,
    /// Addresses worth trying.
    pub gvas: Vec<u64>,
}

/// P, RW, US.
const OPEN: u64 = P | RW | US;

/// A linear address from its four indices.
pub fn gva(l4: u64, l3: u64, l2: u64, l1: u64, offset: u64) -> u64 {
    let low = l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12 | offset;
    ((low << 16) as i64 >> 16) as u64
}

impl World {
    fn new(frames: &[u64]) -> World {
        World { frames: frames.to_vec(), words: vec![[0; 512]; frames.len()], gvas: Vec::new() }
    }

    /// Every top-level slot leads to one page. Uses four frames.
    pub fn slots(frames: &[u64]) -> World {
        let mut world = World::new(frames);
        world.words[0] = [frames[1] | OPEN | A; 512];
        world.words[1][127] = frames[2] | OPEN | A;
        world.words[2][127] = frames[3] | OPEN | A;
        world.words[3][127] = DATA | OPEN | A | D;
        let slots = (0..512).filter(|slot| ![CODE_SLOT, STUB_SLOT].contains(slot));
        world.gvas = slots.map(|slot| gva(slot, 127, 127, 127, 8)).collect();
        world
    }

    /// Entries that lead to frames of the next level, most of them.
    pub fn tree(random: &mut Random, frames: &[u64], limits: Limits) -> World {
        let mut world = World::new(frames);
        // One root, then the others by turns.
        let level = |n: usize| if n == 0 { 4 } else { 3 - (n as u64 - 1) % 3 };
        for n in 0..frames.len() {
            let below: Vec<u64> = (1..frames.len())
                .filter(|m| level(*m) + 1 == level(n))
                .map(|m| frames[m])
                .collect();
            let rare = if n == 0 { limits.rare_in_root() } else { 0 };
            for i in 0..512 {
                let to = if level(n) == 1 {
                    page(random, frames)
                } else if random.percent(4) {
                    random.pick(frames)
                } else {
                    random.pick(&below)
                };
                let large = matches!(level(n), 2 | 3) && random.percent(12);
                let entry = entry(random, to, large, level(n) == 1, limits);
                world.words[n][i] = if random.percent(95) { entry & !rare } else { entry };
            }
        }
        world.random_gvas(random);
        world
    }

    /// Any frame at any level.
    pub fn tangle(random: &mut Random, frames: &[u64], limits: Limits) -> World {
        let mut world = World::new(frames);
        for n in 0..frames.len() {
            let rare = if n == 0 { limits.rare_in_root() } else { 0 };
            for i in 0..512 {
                let to =
                    if random.percent(70) { random.pick(frames) } else { page(random, frames) };
                let large = random.percent(6);
                let entry = entry(random, to, large, false, limits);
                world.words[n][i] = if random.percent(95) { entry & !rare } else { entry };
            }
        }
        world.random_gvas(random);
        world
    }

    fn random_gvas(&mut self, random: &mut Random) {
        let frames = self.frames.len();
        for _ in 0..12 {
            let mut l4 = random.below(512);
            if l4 == STUB_SLOT {
                l4 = 0;
            }
            let [l3, l2, l1] = [0; 3].map(|_| random.below(512));
            // 0x1000 is even, so an 8-byte access stays in its page.
            let at = gva(l4, l3, l2, l1, random.below(512) * 8);
            self.gvas.push(at);
            // A neighbour whose upper levels are the same.
            self.gvas.push(at ^ 1 << (12 + random.below(9)));
        }
        if random.percent(30) && frames > 1 {
            let index = 47 + random.below(16);
            let last = self.gvas.len() - 1;
            self.gvas[last] ^= 1 << index;
        }
    }

    /// One clean path and what differs from it in one bit: at `level`, where pages are of the
    /// size of `leaf`. Uses four frames.
    pub fn sweep(frames: &[u64], level: u32, leaf: u32, marks: u64) -> World {
        let mut world = World::new(frames);
        let target = DATA + if leaf == 1 { 0x1000 } else { 0 };
        for l in (leaf..=4).rev() {
            let table = 4 - l as usize;
            let clean = if l > leaf {
                frames[table + 1] | OPEN | marks & A
            } else {
                target | OPEN | marks | if leaf > 1 { PS } else { 0 }
            };
            let words = &mut world.words[table];
            words[127] = clean;
            if l == level {
                (0..64).for_each(|bit| words[128 + bit] = clean ^ 1 << bit);
            }
        }
        let index = |l: u32, i: u64| if l == level { i } else { 127 };
        for i in 127..192 {
            // Below the leaf, indices are offset.
            let low = |l| if l < leaf { 1 } else { index(l, i) };
            let l3 = if leaf > 3 { 0 } else { index(3, i) };
            world.gvas.push(gva(index(4, i), l3, low(2), low(1), 8 * i));
        }
        world
    }
}

/// Where a page may be: in memory, in a table, or where nothing is.
fn page(random: &mut Random, frames: &[u64]) -> u64 {
    match random.below(100) {
        0..85 => DATA + random.below(DATA_BYTES / 4096) * 4096,
        85..93 => random.pick(frames),
        _ => 0x8000_0000 + random.below(64) * 4096,
    }
}

fn entry(random: &mut Random, to: u64, large: bool, lowest: bool, limits: Limits) -> u64 {
    let mut entry = to | random.bit(P, 95) | random.bit(RW, 82) | random.bit(US, 93);
    entry |= random.bit(A, 50) | random.bit(D, 40) | random.bit(G, 50) | random.bit(NX, 10);
    entry |= random.bit(PWT, 15) | random.bit(PCD, 15);
    // Ignored by the processor: 11:9, 58:52, and the key without CR4.PKE.
    if random.percent(50) {
        entry |= random.next() & (0xe00 | 0x7ff << 52);
    }
    if lowest {
        entry |= random.bit(PAT, 40);
    } else if large {
        entry |= PS;
        // Mostly aligned, so that it is the page that its level makes it.
        if random.percent(85) {
            let big = if limits.giant && random.percent(50) { 0x3fff_f000 } else { 0x1f_f000 };
            let start = if random.percent(90) { DATA + random.below(2) * 0x20_0000 } else { to };
            entry = entry & !ADDR | start & !big | random.bit(PAT_LARGE, 50);
        }
    }
    if random.percent(2) && limits.maxphyaddr < 52 {
        entry |=
            1 << (u64::from(limits.maxphyaddr) + random.below(52 - u64::from(limits.maxphyaddr)));
    }
    if random.percent(2) {
        entry ^= 1 << random.below(64);
    }
    if random.percent(2) {
        // Not present: all other bits mean nothing.
        entry = random.next() & !P;
    }
    entry
}
