// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory with page tables in it.

use crate::figure::Failure;
use mmu_core::addr::{Gpa, Machine};
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig};
use mmu_core::paging::{Regs, bits};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// A mebibyte.
pub const MIB: u64 = 1 << 20;
/// An entry that refers to a table.
pub const TABLE: u64 = bits::P | bits::RW | bits::US | bits::A;
/// The entry of an ordinary user page as systems make it for memory that they hand out: accessed
/// and dirty already, which spares the processor two locked updates.
pub const LEAF: u64 = TABLE | bits::D;

/// The next of a sequence of pseudo-random numbers (Marsaglia's xorshift64).
pub fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    x
}

/// Guest-physical memory from 0 on. Tables are taken from it in turn.
#[derive(Clone, Debug)]
pub struct Memory {
    backing: Arc<AllocatedMemory>,
    next: u64,
    /// Pages for tables that are taken first, the last of them foremost.
    places: Vec<u64>,
}

impl Memory {
    /// `size` bytes, with tables from `tables` on.
    pub fn new(size: u64, tables: u64) -> Self {
        Self { backing: Arc::new(AllocatedMemory::new(size)), next: tables, places: Vec::new() }
    }

    /// The same, where a real processor sees the memory from `machine` on.
    pub fn at(machine: Machine, size: u64, tables: u64) -> Self {
        let backing = Arc::new(AllocatedMemory::at(size, machine));
        Self { backing, next: tables, places: Vec::new() }
    }

    /// `size` bytes, with tables at `places`.
    pub fn scattered(size: u64, places: Vec<u64>) -> Self {
        Self { places, ..Self::new(size, size) }
    }

    /// The memory itself.
    pub fn backing(&self) -> Arc<AllocatedMemory> {
        Arc::clone(&self.backing)
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        self.backing.words()
    }

    /// The word at an address.
    pub fn word(&self, gpa: u64) -> &AtomicU64 {
        &self.words()[(gpa / 8) as usize]
    }

    /// An empty table.
    pub fn table(&mut self) -> u64 {
        if let Some(place) = self.places.pop() {
            return place;
        }
        let table = self.next;
        self.next += PAGE;
        table
    }

    /// Where the tables end.
    pub fn tables_end(&self) -> u64 {
        self.next
    }

    /// The table of the lowest level for an address; makes those that are missing on the way.
    pub fn leaf_table(&mut self, root: u64, gva: u64) -> u64 {
        let mut table = root;
        for level in (2..=4).rev() {
            let at = table + (gva >> (12 + 9 * (level - 1)) & 511) * 8;
            let mut entry = self.word(at).load(Ordering::Relaxed);
            if entry == 0 {
                entry = self.table() | TABLE;
                self.word(at).store(entry, Ordering::Relaxed);
            }
            table = entry & bits::ADDR;
        }
        table
    }

    /// Maps a page, before any engine knows the tables.
    pub fn map(&mut self, root: u64, gva: u64, gpa: u64) {
        let at = self.leaf_table(root, gva) + (gva >> 12 & 511) * 8;
        self.word(at).store(gpa | LEAF, Ordering::Relaxed);
    }

    fn slot(&self) -> SlotConfig {
        SlotConfig::new(0, Gpa(0), self.backing.clone())
    }

    /// An engine with this memory and `frames` frames for shadow tables.
    ///
    /// # Errors
    ///
    /// What the engine says.
    pub fn engine(&self, frames: u64) -> Result<Mmu, Failure> {
        self.engine_in(Arc::new(AllocatedMemory::new(frames * PAGE)))
    }

    /// An engine with this memory and all of `tables` for shadow tables.
    ///
    /// # Errors
    ///
    /// What the engine says.
    pub fn engine_in(&self, tables: Arc<AllocatedMemory>) -> Result<Mmu, Failure> {
        self.engine_of(Config::new(tables))
    }

    /// An engine of this kind with this memory, and all of its table memory in use.
    ///
    /// # Errors
    ///
    /// What the engine says.
    pub fn engine_of(&self, config: Config) -> Result<Mmu, Failure> {
        let frames = config.tables.size() / PAGE;
        let mmu = Mmu::new(config).map_err(Failure::in_step("engine"))?;
        // The default is a share of the memory, and guests of the bench have little.
        mmu.set_nr_mmu_pages(frames).map_err(Failure::in_step("quota"))?;
        mmu.create_slot(self.slot()).map_err(Failure::in_step("slot"))?;
        Ok(mmu)
    }
}

/// The registers of a 64-bit guest with this root.
pub fn regs(root: u64) -> Regs {
    Regs::long_mode(root)
}
