// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds 4-level page tables of 4 KiB pages in a region of guest memory.

use super::layout::ImageError;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Entry bit: present.
pub const P: u64 = 1;
/// Entry bit: writable.
pub const W: u64 = 1 << 1;
/// Entry bit: user.
pub const U: u64 = 1 << 2;
/// Entry bit: accessed.
pub const A: u64 = 1 << 5;
/// Entry bit: dirty.
pub const D: u64 = 1 << 6;
/// Entry bit of a page directory: a 2M page.
pub const PS: u64 = 1 << 7;
/// Entry bit: no-execute.
pub const NX: u64 = 1 << 63;
/// The address in an entry.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;

/// What entries above the leaves carry: the leaf decides.
const TABLE: u64 = P | W | U;

/// An upper bound for the tables, without the root, that map `pages` pages at the aligned address `gva`.
pub(super) fn tables_for(gva: u64, pages: u64) -> u64 {
    debug_assert!(gva % (1 << 39) == 0);
    pages.div_ceil(1 << 9) + pages.div_ceil(1 << 18) + pages.div_ceil(1 << 27)
}

/// Page tables under construction.
pub struct PageTables {
    next: u64,
    end: u64,
    root: u64,
    pages: BTreeMap<u64, Box<[u64; 512]>>,
}

impl fmt::Debug for PageTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTables")
            .field("root", &self.root)
            .field("tables", &self.pages.len())
            .finish_non_exhaustive()
    }
}

impl PageTables {
    /// An empty root at the start of `region` (page-aligned guest-physical addresses).
    pub fn new(region: Range<u64>) -> Result<Self, ImageError> {
        let mut tables =
            PageTables { next: region.start, end: region.end, root: 0, pages: BTreeMap::new() };
        tables.root = tables.allocate()?;
        Ok(tables)
    }

    /// Guest-physical address of the root, for CR3.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Takes an empty table from the region.
    pub fn allocate(&mut self) -> Result<u64, ImageError> {
        if self.end.saturating_sub(self.next) < PAGE {
            return Err(ImageError::TablesFull { end: self.end });
        }
        let gpa = self.next;
        self.next += PAGE;
        self.pages.insert(gpa, Box::new([0; 512]));
        Ok(gpa)
    }

    /// Maps `pages` pages at `gva` to `gpa` with the bits `flags` (of [`P`], [`W`], [`U`], [`NX`]).
    pub fn map(&mut self, gva: u64, gpa: u64, pages: u64, flags: u64) -> Result<(), ImageError> {
        let mut table = None;
        for n in 0..pages {
            let at = gva + n * PAGE;
            let leaf = match table {
                Some(t) if index(at, 1) != 0 => t,
                _ => self.leaf_table(at)?,
            };
            table = Some(leaf);
            self.set(leaf, index(at, 1), (gpa + n * PAGE) | flags);
        }
        Ok(())
    }

    /// The page table for `gva`, made if need be.
    pub fn leaf_table(&mut self, gva: u64) -> Result<u64, ImageError> {
        let mut table = self.root;
        for level in [4, 3, 2] {
            let slot = index(gva, level);
            let entry = self.get(table, slot);
            table = if entry & P != 0 {
                entry & ADDR
            } else {
                let new = self.allocate()?;
                self.set(table, slot, new | TABLE);
                new
            };
        }
        Ok(table)
    }

    /// The table of `level` (4 = root … 1 = page table) that translates `gva`, if it exists.
    #[must_use]
    pub fn table(&self, gva: u64, level: u32) -> Option<u64> {
        let mut table = self.root;
        for above in (level.max(1) + 1..=4).rev() {
            let entry = self.get(table, index(gva, above));
            if entry & P == 0 {
                return None;
            }
            table = entry & ADDR;
        }
        Some(table)
    }

    /// Where `gva` is mapped.
    #[must_use]
    pub fn translate(&self, gva: u64) -> Option<u64> {
        let entry = self.get(self.table(gva, 1)?, index(gva, 1));
        (entry & P != 0).then_some((entry & ADDR) | (gva & (PAGE - 1)))
    }

    /// Hands out all tables.
    pub fn emit(&self, out: &mut dyn FnMut(u64, &[u8])) {
        let mut bytes = [0; PAGE as usize];
        for (&gpa, table) in &self.pages {
            for (chunk, entry) in bytes.chunks_exact_mut(8).zip(table.iter()) {
                chunk.copy_from_slice(&entry.to_le_bytes());
            }
            out(gpa, &bytes);
        }
    }

    fn get(&self, table: u64, slot: usize) -> u64 {
        self.pages.get(&table).map_or(0, |t| t[slot & 511])
    }

    fn set(&mut self, table: u64, slot: usize, entry: u64) {
        if let Some(t) = self.pages.get_mut(&table) {
            t[slot & 511] = entry;
        }
    }
}

/// The index of `gva` in a table of `level` (1 = page table).
#[must_use]
pub fn index(gva: u64, level: u32) -> usize {
    (gva >> (12 + 9 * (level - 1))) as usize & 511
}
