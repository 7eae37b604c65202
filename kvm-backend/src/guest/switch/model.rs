// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the program must have left, computed from the seed and the number of turns alone.
//!
//! A replay of one vCPU needs to know nothing of the others, because what the program stores for good
//! depends on nothing that another vCPU does; see [`super`].

use super::spaces::{LARGE, Pages};
use super::*;
use crate::guest::image::{GuestImage, precopy_state};
use crate::guest::layout::{CONTROL_GPA, STACKS_GPA, control};
use crate::guest::paging::{A, ADDR, D, NX, P, PS, U, W};
use crate::guest::programs::xorshift;
use crate::guest::verify::{Mismatch, Read};
use std::fmt;

/// What the program did, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries edited.
    pub edits: u64,
    /// Of these: slots of 2M split or made one page again.
    pub splits: u64,
    /// Loads of CR3.
    pub loads: u64,
    /// INVLPG of a slot.
    pub invalidations: u64,
    /// Accesses.
    pub accesses: u64,
    /// Accesses that the guest could compare with some of the possible versions only.
    pub loose: u64,
}

impl Counts {
    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            edits: self.edits + other.edits,
            splits: self.splits + other.splits,
            loads: self.loads + other.loads,
            invalidations: self.invalidations + other.invalidations,
            accesses: self.accesses + other.accesses,
            loose: self.loose + other.loose,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { edits, splits, loads, invalidations, accesses, loose } = self;
        write!(
            f,
            "{edits} edits ({splits} splits and merges), {loads} loads of CR3, \
             {invalidations} slots invalidated, {accesses} accesses ({loose} checked loosely)"
        )
    }
}

/// One advance of the generator, and its bits.
#[derive(Clone, Copy)]
struct Draw(u64);

impl Draw {
    fn bits(self, from: u32, count: u32) -> u64 {
        self.0 >> from & ((1 << count) - 1)
    }

    fn is(self, bit: u32) -> bool {
        self.bits(bit, 1) == 1
    }

    fn space(self, from: u32) -> usize {
        self.bits(from, 3) as usize % REACH
    }

    fn used(self) -> u64 {
        (u64::from(self.is(32)) * A) | (u64::from(self.is(33)) * D)
    }
}

/// Memory as the program must leave it.
#[derive(Debug)]
pub struct Model<'a> {
    image: &'a GuestImage,
    spaces: &'a Spaces,
    pages: Pages,
    counts: Counts,
}

impl<'a> Model<'a> {
    /// Before the program has begun.
    #[must_use]
    pub fn new(image: &'a GuestImage, spaces: &'a Spaces) -> Self {
        Self { image, spaces, pages: spaces.pages(image), counts: Counts::default() }
    }

    /// What has been replayed.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Replays vCPU `id`, which began with `seed` and made so many turns; takes about as long as the guest
    /// would without faults.
    pub fn replay(&mut self, id: usize, seed: u64, turns: u64) {
        let mut replay = Replay {
            model: self,
            id,
            generator: precopy_state(id, seed),
            stores: 0,
            space: 0,
            seen: [0; SLOTS],
        };
        replay.load(0);
        (0..turns).for_each(|_| replay.turn());
        let Replay { generator, stores, space, .. } = replay;
        let desk = self.spaces.desk(id);
        *self.word(desk + desk::GENERATOR) = generator;
        *self.word(desk + desk::STORES) = stores;
        *self.word(desk + desk::CURRENT) = space as u64;
    }

    /// The word at a guest-physical address that the spaces use.
    fn word(&mut self, gpa: u64) -> &mut u64 {
        let page = self.pages.entry(gpa & !(PAGE - 1)).or_insert_with(|| Box::new([0; 512]));
        &mut page[(gpa % PAGE / 8) as usize]
    }

    /// Compares the spaces' memory with the guest's, and takes the guest's own counts.
    ///
    /// # Errors
    ///
    /// The first wrong word.
    pub fn check(&mut self, read: Read<'_>) -> Result<(), Mismatch> {
        for (&gpa, expected) in &self.pages {
            self.compare(gpa, expected, read)?;
        }
        for id in 0..self.image.layout().vcpus() {
            let mut bytes = [0; 8];
            read(self.spaces.desk(id) + desk::LOOSE, &mut bytes);
            self.counts.loose += u64::from_le_bytes(bytes);
        }
        Ok(())
    }

    /// Compares all other memory of the guest, but for the stacks.
    ///
    /// # Errors
    ///
    /// The first wrong word.
    pub fn check_rest(&self, read: Read<'_>) -> Result<(), Mismatch> {
        let mut rest = Pages::new();
        self.image.write(&mut |gpa, bytes| {
            let page = rest.entry(gpa & !(PAGE - 1)).or_insert_with(|| Box::new([0; 512]));
            for (at, word) in (gpa % PAGE / 8..).zip(bytes.chunks_exact(8)) {
                page[at as usize] = word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
            }
        });
        if let Some(page) = rest.get_mut(&CONTROL_GPA) {
            page[control::STOP as usize / 8] = 1;
        }
        let layout = self.image.layout();
        let stacks = STACKS_GPA..STACKS_GPA + layout.vcpus() as u64 * PAGE;
        let nothing = [0; 512];
        for gpa in (0..layout.memory()).step_by(PAGE as usize) {
            if !stacks.contains(&gpa) && !self.pages.contains_key(&gpa) {
                let expected = rest.get(&gpa).map_or(&nothing, |page| page);
                self.compare(gpa, expected, read)?;
            }
        }
        Ok(())
    }

    fn compare(&self, gpa: u64, expected: &[u64; 512], read: Read<'_>) -> Result<(), Mismatch> {
        let layout = self.image.layout();
        let is_here = self.pages.contains_key(&gpa);
        let is_table = layout.tables().contains(&gpa) || is_here && self.spaces.is_table(gpa);
        let is_desk = is_here && (0..layout.vcpus()).any(|id| self.spaces.desk(id) == gpa);
        let what = match (is_table, is_desk, is_here) {
            (true, ..) => "entry of a page table",
            (_, true, _) => "word of a vCPU",
            (.., true) => "word of a space",
            _ => "word that nobody writes",
        };
        let mut bytes = [0; PAGE as usize];
        read(gpa, &mut bytes);
        for ((offset, &expected), word) in (0..).step_by(8).zip(expected).zip(bytes.chunks(8)) {
            let seen = word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
            let loose = match offset {
                _ if is_table => A | D,
                // When others began their edits nobody can know.
                desk::CHECKS | desk::LOOSE if is_desk => u64::MAX,
                desk::SEEN.. if is_desk => u64::MAX,
                _ => 0,
            };
            if (seen ^ expected) & !loose != 0 {
                let gva = if is_here { self.spaces.mirror(gpa) + offset } else { 0 };
                let gpa = gpa + offset;
                return Err(Mismatch { what, gva, gpa, expected, seen });
            }
        }
        Ok(())
    }
}

/// One vCPU on its way.
struct Replay<'m, 'a> {
    model: &'m mut Model<'a>,
    id: usize,
    generator: u64,
    stores: u64,
    /// The current space, and the version of each of its slots at the last flush.
    space: usize,
    seen: [u64; SLOTS],
}

impl Replay<'_, '_> {
    fn draw(&mut self) -> Draw {
        self.generator = xorshift(self.generator);
        Draw(self.generator)
    }

    fn turn(&mut self) {
        let d = self.draw();
        if d.is(8) {
            for _ in 0..=d.bits(16, 4) {
                self.edit(d.space(12));
            }
        }
        let d = self.draw();
        match d.bits(8, 3) {
            0 | 1 => {}
            2 | 3 => self.flush(d.bits(16, 5) as usize),
            4 => {
                [16, 21, 26, 31].map(|at| self.flush(d.bits(at, 5) as usize)).into_iter().collect()
            }
            5 => self.load(self.space),
            _ => self.load(d.space(16)),
        }
        let d = self.draw();
        for _ in 0..d.bits(8, 2) + 4 {
            self.access();
        }
    }

    fn record(&self, space: usize, slot: usize) -> u64 {
        self.model.spaces.block(self.id, space) + block::RECORDS + slot as u64 * RECORD
    }

    fn version(&mut self, space: usize, slot: usize) -> u64 {
        let record = self.record(space, slot);
        *self.model.word(record + DONE)
    }

    /// What the newest version of the entry says.
    fn entry(&mut self, space: usize, slot: usize) -> u64 {
        let (record, version) = (self.record(space, slot), self.version(space, slot));
        *self.model.word(record + HISTORY + version % KNOWN * 8)
    }

    fn set(&mut self, space: usize, slot: usize, entry: u64) {
        let (record, version) = (self.record(space, slot), self.version(space, slot) + 1);
        *self.model.word(record + HISTORY + version % KNOWN * 8) = entry;
        *self.model.word(record + BEGUN) = version;
        *self.model.word(record + DONE) = version;
        let block = self.model.spaces.block(self.id, space);
        let at = match slot {
            ..LARGE_SLOT => block + block::TABLE + slot as u64 * 8,
            _ => block + block::DIRECTORY + (LARGE_INDEX + (slot - LARGE_SLOT) as u64) * 8,
        };
        *self.model.word(at) = entry;
        self.model.counts.edits += 1;
    }

    fn edit(&mut self, space: usize) {
        let d = self.draw();
        let n = d.bits(8, 4) as usize;
        let slot = match (space < OWN, d.bits(30, 2), d.bits(34, 2)) {
            (true, 0, _) => SHARED_SLOT,
            (true, _, 0) => LARGE_SLOT,
            (true, ..) => n,
            (_, 0, _) => FOREIGN_SLOT,
            (_, _, 0) => LARGE_SLOT + 1,
            _ if FOREIGN_SLOT + n < LARGE_SLOT => FOREIGN_SLOT + n,
            _ => LARGE_SLOT + 1,
        };
        let old = self.entry(space, slot);
        let what = d.bits(16, 3);
        let is_large = slot >= LARGE_SLOT;
        match (is_large, what) {
            (false, 0..3) => {
                let page = self.page(d, space, slot);
                self.set(space, slot, page | P | W | U | NX | d.used());
            }
            (false, 3..6) => self.set(space, slot, old ^ [P, W, U][what as usize - 3]),
            (false, _) => {
                let other = self.entry(space, slot ^ 1);
                self.set(space, slot, other);
                self.set(space, slot ^ 1, old);
            }
            (true, 4..7) => self.set(space, slot, old ^ [P, W, U][what as usize - 4]),
            (true, _) => self.remap_large(d, space, slot, old),
        }
    }

    /// The page that a slot of 4K is remapped to.
    fn page(&self, d: Draw, space: usize, slot: usize) -> u64 {
        let spaces = self.model.spaces;
        match slot {
            ..SHARED_SLOT => spaces.block(self.id, space) + block::PRIVATE + d.bits(24, 2) * PAGE,
            _ => spaces.shared() + d.bits(24, 4) * PAGE,
        }
    }

    fn remap_large(&mut self, d: Draw, space: usize, slot: usize, old: u64) {
        let spaces = self.model.spaces;
        let (was_split, view) = (old & PS == 0, d.bits(24, 2) % spaces.views());
        let rights = P | W | U | NX;
        let (mut entry, split) = (spaces.view(view) | PS, d.is(27) && !was_split);
        if split {
            let table = (slot - LARGE_SLOT) as u64 * PAGE + block::SPLIT;
            let (table, rotation) = (spaces.block(self.id, space) + table, d.bits(28, 2));
            for n in 0..PROBES {
                let page = spaces.view(view) + (PROBE + (n + rotation) % PROBES) * PAGE;
                *self.model.word(table + (PROBE + n) * 8) = page | rights;
            }
            entry = table | (view | rotation << VIEW_BITS) << CODE_SHIFT;
        }
        self.model.counts.splits += u64::from(split != was_split);
        self.set(space, slot, entry | rights | d.used());
    }

    fn flush(&mut self, slot: usize) {
        self.seen[slot] = self.version(self.space, slot);
        self.model.counts.invalidations += 1;
    }

    fn load(&mut self, space: usize) {
        self.space = space;
        for slot in 0..SLOTS {
            self.seen[slot] = self.version(space, slot);
        }
        self.model.counts.loads += 1;
    }

    fn access(&mut self) {
        let d = self.draw();
        let slot = match (d.bits(30, 2), d.bits(34, 2)) {
            (0, _) => FOREIGN_SLOT,
            (_, 0) => LARGE_SLOT + d.bits(8, 1) as usize,
            _ => d.bits(8, 5) as usize,
        };
        if d.bits(26, 2) == 0 {
            self.flush(slot);
        }
        self.model.counts.accesses += 1;
        if !d.is(24) {
            return;
        }
        self.stores += 1;
        let entry = self.entry(self.space, slot);
        let sure = self.model.spaces.is_editor(self.space, slot)
            && self.seen[slot] == self.version(self.space, slot);
        if sure && entry & (P | W | U) == P | W | U {
            let page = match slot {
                ..LARGE_SLOT => entry & ADDR,
                _ => self.probe(entry, d.bits(16, 2)),
            };
            *self.model.word(page + KEPT + self.id as u64 * 8) = self.stores;
        }
    }

    /// What a slot of 2M shows as one of the pages that are looked at.
    fn probe(&mut self, entry: u64, n: u64) -> u64 {
        if entry & PS == 0 {
            // As a walk does.
            return *self.model.word((entry & ADDR) + (PROBE + n) * 8) & ADDR;
        }
        (entry & ADDR & !(LARGE - 1)) + (PROBE + n) * PAGE
    }
}
