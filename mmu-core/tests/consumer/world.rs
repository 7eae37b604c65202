// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: regions of [`PAGES`] pages, a gibibyte apart, each behind a page directory and a page
//! table of its own. What the guest's tables say changes in one region only, of one of two pages to the
//! other, so it is known what an address may lead to; what is behind the guest-physical addresses changes
//! everywhere.

use super::watch::{Spot, Watch};
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{AllocatedMemory, Backing, SlotConfig};
use mmu_core::paging::{Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::{Config, Mmu};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages of a region.
pub const PAGES: usize = 64;

/// Regions: memory that comes and goes,
pub const PASSING: usize = 0;
/// that moves between two places,
pub const MOVING: usize = 1;
/// the other of them,
pub const MOVED: usize = 2;
/// that the host takes away, makes read-only, and whose slot becomes read-only,
pub const CHANGING: usize = 3;
/// that has a dirty log,
pub const LOGGED: usize = 4;
/// an alias of one of two other slots,
pub const ALIASED: usize = 5;
/// the guest's page tables: page `n` is that of region `n`,
pub const TABLES: usize = 6;
/// large guest pages, of which each has two pages here,
pub const LARGE: usize = 7;
/// whose entries the guest changes: page `n` is behind address `n` or `n ^ 32`,
pub const EDITED: usize = 8;
/// and memory like any other.
pub const PLAIN: Range<usize> = 9..REGIONS;
/// Code that is patched, from this byte of the page on: 8 bytes in two words.
pub const CODE: Spot = Spot { region: PLAIN.start, page: PAGES - 1 };
pub const CODE_AT: u64 = 4;
/// All of them: with a page directory and a page table for each, more than there are frames.
pub const REGIONS: usize = 48;

/// Bank 0 of memory has the guest's tables and plain memory.
const MEMORY: usize = 0;
/// The others are as large as a region.
pub struct Banks {
    /// One after the other behind [`PASSING`].
    pub passing: Range<usize>,
    pub moving: usize,
    pub changing: usize,
    pub logged: usize,
    pub alias: [usize; 2],
    /// As large as it must be.
    pub large: usize,
}
pub const BANKS: Banks =
    Banks { passing: 1..5, moving: 5, changing: 6, logged: 7, alias: [8, 9], large: 10 };
const BANK_COUNT: usize = 11;

/// Bytes of a large page.
const LARGE_PAGE: u64 = 2 << 20;

/// Pages of the guest's tables in bank 0.
const ROOT: u64 = 0;
const POINTERS: u64 = 1;
const DIRECTORIES: u64 = 64;
const LEAVES: u64 = 128;
const DATA: u64 = 256;

/// Where processors see the shadow tables, and the banks.
const TABLES_AT: Machine = Machine(0x10_0000_0000);
const BANKS_AT: u64 = 0x20_0000_0000;
const BANK_STRIDE: u64 = 0x4000_0000;

/// The engine, its guest, and the watch over its consumers.
pub struct World {
    pub mmu: Mmu,
    pub watch: Watch,
    tables: Arc<AllocatedMemory>,
    banks: Vec<Arc<AllocatedMemory>>,
}

impl World {
    /// A guest with every region but [`PASSING`] and [`ALIASED`] in place, and `frames` shadow frames.
    /// If `unsync` it writes its leaf tables natively.
    pub fn new(frames: u64, unsync: bool) -> Self {
        let tables = Arc::new(AllocatedMemory::at(frames * PAGE, TABLES_AT));
        let config = Config::new(Arc::clone(&tables) as Arc<dyn Backing>).unsync(unsync);
        let mmu = Mmu::new(config).unwrap();
        let bank = |n: usize| {
            let size = match n {
                MEMORY => (DATA + (REGIONS * PAGES) as u64) * PAGE,
                n if n == BANKS.large => PAGES as u64 / 2 * LARGE_PAGE,
                _ => PAGES as u64 * PAGE,
            };
            Arc::new(AllocatedMemory::at(size, Machine(BANKS_AT + n as u64 * BANK_STRIDE)))
        };
        let banks = (0..BANK_COUNT).map(bank).collect();
        let in_memory = |region| [TABLES, EDITED].contains(&region) || PLAIN.contains(&region);
        let spots = (0..REGIONS).flat_map(|region| Self::spots(region, 0..PAGES));
        let page_of = |spot: Spot| {
            let bank = if in_memory(spot.region) { Gpa(0) } else { Self::place(spot.region) };
            ((Self::gpa(spot).0 - bank.0) / PAGE) as usize
        };
        let watch = Watch::new(spots.map(page_of), !unsync);
        let world = Self { mmu, watch, tables, banks };
        world.create(Self::slot_of(MEMORY), Gpa(0), MEMORY, |slot| slot);
        for (region, bank) in
            [(MOVING, BANKS.moving), (CHANGING, BANKS.changing), (LARGE, BANKS.large)]
        {
            world.create(Self::slot_of(bank), Self::place(region), bank, |slot| slot);
        }
        world.create(Self::slot_of(BANKS.logged), Self::place(LOGGED), BANKS.logged, |slot| {
            slot.log_dirty()
        });
        for (n, bank) in BANKS.alias.into_iter().enumerate() {
            world.create(Self::slot_of(bank), Self::alias_target(n), bank, |slot| slot);
        }
        for region in (0..REGIONS).filter(|region| in_memory(*region)) {
            world.watch.may_show(region, MEMORY);
        }
        for (region, bank) in [
            (MOVING, BANKS.moving),
            (CHANGING, BANKS.changing),
            (LOGGED, BANKS.logged),
            (LARGE, BANKS.large),
        ] {
            world.watch.may_show(region, bank);
        }
        world.write_tables();
        world
    }

    fn write_tables(&self) {
        let set = |table: u64, index: u64, gpa: u64| {
            let entry = gpa | bits::P | bits::RW | bits::US;
            let at = Gpa(table * PAGE + index * 8);
            assert_eq!(self.mmu.write_phys(at, &entry.to_le_bytes()), 8);
        };
        set(ROOT, 0, POINTERS * PAGE);
        for region in 0..REGIONS {
            let (directory, leaves) = (DIRECTORIES + region as u64, LEAVES + region as u64);
            set(POINTERS, region as u64 + 1, directory * PAGE);
            if region == LARGE {
                for page in 0..PAGES as u64 / 2 {
                    set(directory, page, (Self::place(region).0 + page * LARGE_PAGE) | bits::PS);
                }
                continue;
            }
            set(directory, 0, leaves * PAGE);
            for page in 0..PAGES as u64 {
                set(leaves, page, Self::place(region).0 + page * PAGE);
            }
        }
    }

    /// A slot over a bank.
    pub fn create(
        &self,
        slot: u32,
        base: Gpa,
        bank: usize,
        with: impl FnOnce(SlotConfig) -> SlotConfig,
    ) {
        let memory = Arc::clone(&self.banks[bank]) as Arc<dyn Backing>;
        self.mmu.create_slot(with(SlotConfig::new(slot, base, memory))).unwrap();
    }

    /// The number of the slot over a bank.
    pub const fn slot_of(bank: usize) -> u32 {
        bank as u32
    }

    /// Where the guest's tables say that the region is.
    pub fn place(region: usize) -> Gpa {
        match region {
            TABLES => Gpa(LEAVES * PAGE),
            region if region == EDITED || PLAIN.contains(&region) => {
                Gpa((DATA + (region * PAGES) as u64) * PAGE)
            }
            region => Gpa((region as u64 + 1) << 32),
        }
    }

    /// What the alias may show.
    pub fn alias_target(n: usize) -> Gpa {
        Gpa((REGIONS + n + 1) as u64 * (1 << 32))
    }

    pub fn regs() -> Regs {
        Regs::long_mode(ROOT * PAGE)
    }

    /// Where the spot is in its region, in bytes.
    fn offset(spot: Spot) -> u64 {
        match (spot.region, spot.page as u64) {
            (LARGE, page) => page / 2 * LARGE_PAGE + page % 2 * PAGE,
            (_, page) => page * PAGE,
        }
    }

    pub fn gva(spot: Spot) -> Gva {
        Gva(((spot.region as u64 + 1) << 30) | Self::offset(spot))
    }

    pub fn gpa(spot: Spot) -> Gpa {
        Gpa(Self::place(spot.region).0 + Self::offset(spot))
    }

    /// The pages of a region as guest-physical addresses.
    pub fn range(region: usize, pages: Range<usize>) -> PageRange {
        let base = Gpa(Self::place(region).0 + pages.start as u64 * PAGE);
        PageRange::Guest { base, size: pages.len() as u64 * PAGE }
    }

    /// The page behind the spot.
    pub fn range_of(spot: Spot) -> PageRange {
        PageRange::Guest { base: Self::gpa(spot), size: PAGE }
    }

    /// Page of bank 0 that is behind a spot of [`EDITED`] with the guest's entry for another.
    pub fn edited(spot: Spot) -> usize {
        (Self::gpa(spot).0 / PAGE) as usize
    }

    pub fn spots(region: usize, pages: Range<usize>) -> impl Iterator<Item = Spot> {
        pages.map(move |page| Spot { region, page })
    }

    /// What the guest's entry for the spot is, as the guest would write it anew.
    pub fn guest_entry(spot: Spot) -> u64 {
        Self::gpa(spot).0 | bits::P | bits::RW | bits::US
    }

    /// An entry of the shadow tables, as a processor finds it; `None` if that is not where they are.
    pub fn shadow_entry(&self, table: Machine, index: usize) -> Option<&AtomicU64> {
        let frame = self.frame_of(table)?;
        self.tables.words().get(frame as usize * 512 + index)
    }

    /// The frame at a machine address.
    pub fn frame_of(&self, table: Machine) -> Option<u32> {
        let offset = table.0.checked_sub(TABLES_AT.0)?;
        (offset < self.tables.size()).then_some((offset / PAGE) as u32)
    }

    /// Bank and page of it at a machine address.
    pub fn bank_of(&self, page: Machine) -> Option<(usize, usize)> {
        let offset = page.0.checked_sub(BANKS_AT)?;
        let (bank, page) =
            ((offset / BANK_STRIDE) as usize, (offset % BANK_STRIDE / PAGE) as usize);
        (page as u64 * PAGE < self.banks.get(bank)?.size()).then_some((bank, page))
    }

    /// A word of guest memory, as a processor's memory bus finds it.
    pub fn word(&self, (bank, page): (usize, usize), index: usize) -> &AtomicU64 {
        &self.banks[bank].words()[page * 512 + index]
    }
}
