// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every mapping that page tables hold, in ascending order of the tables' indices.
//!
//! Tables may refer to each other in any way. A path through them is no longer than there are
//! levels, so cycles need no detection; but the number of paths is exponential in the levels. What
//! bounds the time between two mappings is that a table below which there is no mapping is searched
//! once only: it is remembered, for each level at which it is used. Memory is bounded by the
//! number of tables remembered.

use super::Image;
use mmu_core::addr::{Gpa, Gva};
use mmu_core::paging::{Entry, PagingMode, Rights, bits};
use std::collections::HashSet;

/// Most entries of a table: those of 32-bit paging.
const MOST_ENTRIES: usize = 1024;

/// Most tables remembered; then all are forgotten. With fewer than 2^18 page directories, and so
/// with every tree of four levels, this is not reached: for more there must be gigabytes of tables
/// without a mapping.
const MOST_BARREN: usize = 1 << 22;

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// First byte, sign-extended in long mode.
    pub gva: Gva,
    /// Where that is.
    pub gpa: Gpa,
    /// Bytes of the page.
    pub page_size: u64,
    /// The AND over the levels.
    pub rights: Rights,
    /// G of the leaf.
    pub global: bool,
    /// A of the leaf.
    pub accessed: bool,
    /// D of the leaf.
    pub dirty: bool,
}

/// A table on the path.
struct Table {
    /// Where it is, once there is one.
    at: Option<Gpa>,
    level: u8,
    /// Linear address that the first entry stands for, not sign-extended.
    first: u64,
    /// Rights above.
    rights: Rights,
    /// Entries looked at.
    next: usize,
    /// Number of entries.
    len: usize,
    /// log2 of the bytes that an entry stands for.
    shift: u32,
    /// Whether it is worth remembering: a table below it was looked into, or it is in pieces.
    costly: bool,
    /// Mappings found before.
    found_before: u64,
    in_one_piece: bool,
    entries: [u64; MOST_ENTRIES],
}

/// An iterator over the mappings of an address space; see the module. Without paging the mappings
/// are the pages of the 32-bit address space itself.
pub struct Mappings<'i> {
    image: &'i Image,
    mode: PagingMode,
    /// From the top: one for each level.
    tables: Vec<Table>,
    /// How many of them are in use.
    depth: usize,
    /// Tables, with their level in the lowest bits, below which there is no mapping.
    barren: HashSet<u64>,
    /// The next page without paging.
    flat: u64,
    found: u64,
    looked_into: u64,
    /// Called every few thousand tables.
    tick: Box<dyn FnMut(Gva, u64) + 'i>,
}

impl std::fmt::Debug for Mappings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mappings")
            .field("mode", &self.mode)
            .field("found", &self.found)
            .field("looked_into", &self.looked_into)
            .finish_non_exhaustive()
    }
}

impl<'i> Mappings<'i> {
    /// The mappings of the address space that `mode` has for its top table.
    #[must_use]
    pub fn new(image: &'i Image, mode: &PagingMode) -> Self {
        let levels = mode.levels();
        let tables = (1..=levels).rev().map(|level| Table {
            at: None,
            level,
            first: 0,
            rights: Rights { write: true, user: true, execute: true, key: 0 },
            next: 0,
            len: (mode.entries(level) as usize).min(MOST_ENTRIES),
            shift: mode.page_size(level).trailing_zeros(),
            costly: false,
            found_before: 0,
            in_one_piece: true,
            entries: [0; MOST_ENTRIES],
        });
        let mut mappings = Self {
            image,
            mode: *mode,
            tables: tables.collect(),
            depth: 0,
            barren: HashSet::new(),
            flat: 0,
            found: 0,
            looked_into: 0,
            tick: Box::new(|_, _| ()),
        };
        let all = Rights { write: true, user: true, execute: true, key: 0 };
        mappings.enter(mode.root_address(), 0, all);
        mappings
    }

    /// Calls `tick` every few thousand tables with the linear address reached and the number of
    /// tables looked into.
    #[must_use]
    pub fn on_tick(self, tick: impl FnMut(Gva, u64) + 'i) -> Self {
        Self { tick: Box::new(tick), ..self }
    }

    /// Looks into the table for the next level down.
    fn enter(&mut self, at: Gpa, first: u64, rights: Rights) {
        let Some(table) = self.tables.get_mut(self.depth) else { return };
        if !self.barren.is_empty() && self.barren.contains(&key(at, table.level)) {
            return;
        }
        // A table that comes again, as in a cycle, is still there.
        if table.at != Some(at) {
            let entries = &mut table.entries[..table.len];
            let read = self.image.read_table(at, self.mode.entry_size(), entries);
            let Some(in_one_piece) = read else { return };
            (table.at, table.in_one_piece) = (Some(at), in_one_piece);
        }
        (table.first, table.rights, table.next) = (first, rights, 0);
        (table.costly, table.found_before) = (!table.in_one_piece, self.found);
        if let Some(above) = self.depth.checked_sub(1).and_then(|i| self.tables.get_mut(i)) {
            above.costly = true;
        }
        self.depth += 1;
        self.looked_into += 1;
        if self.looked_into % 4096 == 0 {
            let gva = self.canonical(first);
            (self.tick)(gva, self.looked_into);
        }
    }

    /// Leaves the table on top.
    fn leave(&mut self) {
        self.depth -= 1;
        let table = &self.tables[self.depth];
        // The others are searched in less time than it takes to remember them.
        if let Some(at) = table.at.filter(|_| table.costly && self.found == table.found_before) {
            if self.barren.len() >= MOST_BARREN {
                self.barren.clear();
            }
            self.barren.insert(key(at, table.level));
        }
    }

    /// The linear address as a processor takes it.
    fn canonical(&self, gva: u64) -> Gva {
        if !self.mode.is_long() {
            return Gva(gva);
        }
        let unused = 64 - (12 + 9 * u32::from(self.mode.levels()));
        Gva(((gva << unused) as i64 >> unused) as u64)
    }

    fn next_flat(&mut self) -> Option<Mapped> {
        let (gva, page_size) = (self.flat, 0x1000);
        self.flat += page_size;
        let rights = Rights { write: true, user: true, execute: true, key: 0 };
        let (global, accessed, dirty) = (false, false, false);
        let (gva, gpa) = (Gva(gva), Gpa(gva));
        let mapped = Mapped { gva, gpa, page_size, rights, global, accessed, dirty };
        (gva.0 <= u64::from(u32::MAX)).then_some(mapped)
    }
}

/// A table at a level. Tables are aligned to 32 bytes at least.
fn key(at: Gpa, level: u8) -> u64 {
    at.0 | u64::from(level)
}

impl Iterator for Mappings<'_> {
    type Item = Mapped;

    fn next(&mut self) -> Option<Mapped> {
        if !self.mode.is_paging() {
            return self.next_flat();
        }
        loop {
            let table = self.tables.get_mut(self.depth.checked_sub(1)?)?;
            let rest = table.entries[..table.len].get(table.next..).unwrap_or_default();
            let Some(skip) = rest.iter().position(|entry| entry & bits::P != 0) else {
                self.leave();
                continue;
            };
            let (index, entry) = (table.next + skip, rest[skip]);
            table.next = index + 1;
            let (level, shift) = (table.level, table.shift);
            let gva = table.first | (index as u64) << shift;
            let rights = |above: Rights, own: Rights| Rights {
                write: above.write && own.write,
                user: above.user && own.user,
                execute: above.execute && own.execute,
                key: own.key,
            };
            match self.mode.decode(entry, level) {
                Entry::Absent | Entry::Reserved => {}
                Entry::Table(at) => {
                    let rights = rights(table.rights, self.mode.entry_rights(entry, level));
                    self.enter(at, gva, rights);
                }
                Entry::Leaf(gpa) => {
                    let rights = rights(table.rights, self.mode.entry_rights(entry, level));
                    self.found += 1;
                    return Some(Mapped {
                        gva: self.canonical(gva),
                        gpa,
                        page_size: 1 << shift,
                        rights,
                        global: entry & bits::G != 0,
                        accessed: entry & bits::A != 0,
                        dirty: entry & bits::D != 0,
                    });
                }
            }
        }
    }
}
