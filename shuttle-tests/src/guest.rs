// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest with three levels of tables of four entries: 64 pages of addresses.
//!
//! | virtual pages | show |
//! | --- | --- |
//! | 0 to 23 | data pages; eight for each vCPU, which edits their entries and tables |
//! | [`AWAY`], [`READ_ONLY`] | data pages that the host takes away, or makes read-only |
//! | [`SHARED`], [`CODE`] | the same pages where no host does: of a table that several vCPUs write, and code |
//! | [`PASSING`] | both places of a slot that comes, goes and moves |
//! | [`LARGE`] | the first block of [`BLOCKS`], by a large page |
//! | [`NEWS_WINDOW`] | the second one, the table in it included |
//! | [`NEWS`] | one page of that block after the other; the table is the one in the block |
//! | 49 | a page of the first block |
//! | 50, 51 | the two root tables, which have the same entries |
//! | 52 to 55 | the middle tables |
//! | 56 to 63 | the leaf tables of the first 32 pages |

use crate::devices::Devices;
use crate::rings::Rings;
use crate::seeds::{below, one_in};
use crate::storm::Tally;
use mmu_core::addr::{Gpa, Gva, Machine};
use mmu_core::memory::{AllocatedMemory, Backing, DirtyMode, SlotConfig, SlotId};
use mmu_core::paging::{Access, Fault, Regs, bits};
use mmu_core::shadow::PageRange;
use mmu_core::sync::Ordering;
use mmu_core::sync::epoch::Collector;
use mmu_core::vcpu::{SoftExit, SoftVcpu};
use mmu_core::{Config, Mmu};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of a page; the guest uses the first four words of each.
pub const PAGE: u64 = 0x1000;
/// Words of a page.
pub const WORDS: u64 = 4;
/// Bytes of a block, and of a large page of the guest's.
pub const BLOCK: u64 = 4 * PAGE;
/// Guest tables: the two roots, the middle ones and the leaves.
const ROOTS: [u64; 2] = [0, 22];
const MIDDLES: u64 = 1;
const LEAVES: u64 = 5;
/// How many there are.
pub const TABLES: u64 = 23;
/// Behind them the data pages.
const DATA: u64 = 24;
/// Slot 0: tables and data.
pub const MAIN: SlotId = SlotId(0);
/// Pages of slot 0.
pub const MAIN_PAGES: u64 = DATA + 32;

/// Virtual and data pages of each vCPU.
pub const OWN: u64 = 8;
/// Virtual and data pages that the host takes away.
pub const AWAY: u64 = 24;
/// The same that it makes read-only.
pub const READ_ONLY: u64 = 28;
/// Virtual pages of a leaf table that several vCPUs write, and the data pages behind them; each entry
/// names the page of its number, or the one [`LEAF`] further on.
pub const SHARED: u64 = AWAY;
/// Virtual pages of a leaf table.
pub const LEAF: u64 = 4;
/// A page of code, with an instruction of [`INSTRUCTION`] bytes, all the same, across two words.
pub const CODE: u64 = READ_ONLY + 2;
/// Offset of the instruction.
pub const INSTRUCTION_AT: u64 = 20;
/// Its bytes.
pub const INSTRUCTION: usize = 8;
/// Virtual pages that show where [`PASSING_SLOT`] is, or is not.
pub const PASSING: u64 = 32;
/// A slot that comes, goes and moves.
pub const PASSING_SLOT: SlotId = SlotId(1);
/// The guest frames that it may be at.
pub const PLACES: [u64; 2] = [128, 160];
/// A slot of two blocks.
pub const BLOCKS: SlotId = SlotId(2);
/// Its first guest frame.
pub const BLOCKS_AT: u64 = 192;
/// Its pages.
pub const BLOCKS_PAGES: u64 = 8;
/// Virtual pages of its first block, by a large page.
pub const LARGE: u64 = 40;
/// The same of its second block, of which the first page is a table.
pub const NEWS_WINDOW: u64 = 44;
/// A virtual page whose entry, in that table, one vCPU changes and all read.
pub const NEWS: u64 = 48;
/// The table, and the pages that the entry may name.
const NEWS_TABLE: u64 = BLOCKS_AT + 4;
const NEWS_PAGES: u64 = 3;

/// The pages of each [`Mark`].
const MARKED: [(SlotId, [u64; 2]); 2] =
    [(MAIN, [DATA + SHARED, DATA + SHARED + LEAF]), (BLOCKS, [2, 2])];

/// A place where one vCPU writes greater and greater values, and says how far it has come.
#[derive(Clone, Copy, Debug)]
pub enum Mark {
    /// The first word of page [`SHARED`], or of the other one that its entry may name.
    Shared,
    /// The first word of page [`LARGE`] + 2.
    Large,
}

/// Where the consumer's processor sees the shadow tables, and slot `n`.
const TABLES_AT: Machine = Machine(0x100_0000);
const MEMORY_AT: u64 = 0x200_0000;
const STRIDE: u64 = 0x10_0000;

/// The address of virtual page `n`, below 64; those from 32 on are in the canonical upper half.
#[must_use]
pub const fn gva(n: u64) -> Gva {
    Gva((((n * PAGE) << 46) as i64 >> 46) as u64)
}

/// Guest-physical address of data page `n`.
#[must_use]
pub const fn data(n: u64) -> Gpa {
    Gpa((DATA + n) * PAGE)
}

/// Guest-physical address of the guest's entry for virtual page `n`, of the first 32.
#[must_use]
pub const fn leaf_entry(n: u64) -> Gpa {
    Gpa((LEAVES + n / 4) * PAGE + n % 4 * 8)
}

/// Guest-physical address of the guest's entry for the leaf table of virtual page `n`.
#[must_use]
pub const fn middle_entry(n: u64) -> Gpa {
    Gpa((MIDDLES + n / 16) * PAGE + n / 4 % 4 * 8)
}

/// Where the guest sees an entry of its tables.
///
/// # Panics
///
/// If it sees none there.
#[must_use]
pub fn window(entry: Gpa) -> Gva {
    let table = entry.0 / PAGE;
    let page = match table {
        NEWS_TABLE => NEWS_WINDOW,
        MIDDLES..LEAVES => 52 + table - MIDDLES,
        LEAVES..13 => 56 + table - LEAVES,
        _ if table == ROOTS[0] => 50,
        _ if table == ROOTS[1] => 51,
        _ => panic!("no window onto {entry}"),
    };
    gva(page).wrapping_add(entry.0 % PAGE)
}

/// A guest entry as a guest kernel writes it.
#[must_use]
pub const fn word(gpa: Gpa) -> u64 {
    gpa.0 | bits::P | bits::RW | bits::US
}

/// What an engine of a storm can do.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Shadow table frames.
    pub frames: u64,
    /// Leaf tables are written natively.
    pub native: bool,
    /// Blocks are mapped whole.
    pub blocks: bool,
    /// The dirty log of slot 0 in the beginning.
    pub log: DirtyMode,
    /// crossbeam's epochs instead of the stand-in.
    pub crossbeam: bool,
    /// How many vCPUs there will be.
    pub vcpus: u64,
    /// Each vCPU has a dirty ring, and nobody else writes slot 0.
    pub rings: bool,
}

/// An engine, and its guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The engine.
    pub mmu: Mmu,
    main: Arc<AllocatedMemory>,
    blocks: Arc<AllocatedMemory>,
    /// The number of the news that everybody has been told of.
    told: Arc<AtomicU64>,
    /// vCPUs that have not come to their ends.
    busy: Arc<AtomicU64>,
    marks: Arc<[AtomicU64; MARKED.len()]>,
    /// Patches of the instruction, each of which adds 1 to its bytes.
    patches: Arc<AtomicU64>,
    devices: Arc<Devices>,
    rings: Option<Arc<Rings>>,
}

impl Guest {
    /// With this engine.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let tables = Arc::new(AllocatedMemory::at(shape.frames * PAGE, TABLES_AT));
        let collector = if shape.crossbeam { Collector::crossbeam() } else { Collector::new() };
        let config = Config { collector, ..Config::new(tables) }
            .unsync(shape.native)
            .largest_page(if shape.blocks { BLOCK } else { PAGE });
        let mmu = Mmu::new(config).unwrap();
        let memory = |id: SlotId, pages: u64| {
            let machine = Machine(MEMORY_AT + u64::from(id.0) * STRIDE);
            Arc::new(AllocatedMemory::at(pages * PAGE, machine))
        };
        let main = memory(MAIN, MAIN_PAGES);
        let blocks = memory(BLOCKS, BLOCKS_PAGES);
        let slot = |id: SlotId, gfn: u64, memory: &Arc<AllocatedMemory>| {
            SlotConfig::new(id.0, Gpa(gfn * PAGE), Arc::clone(memory) as Arc<dyn Backing>)
        };
        mmu.create_slot(slot(MAIN, 0, &main).track(shape.log)).unwrap();
        mmu.create_slot(slot(BLOCKS, BLOCKS_AT, &blocks)).unwrap();
        let devices = Arc::new(Devices::new(mmu.bus().coalesced()));
        let rings = shape.rings.then(|| Arc::new(Rings::new()));
        let busy = Arc::new(AtomicU64::new(shape.vcpus));
        let (told, marks, patches) = Default::default();
        let guest = Self { mmu, main, blocks, told, busy, marks, patches, devices, rings };
        guest.write_tables();
        // Every page but the tables says which one it is.
        for gfn in (DATA..MAIN_PAGES).chain(BLOCKS_AT..NEWS_TABLE) {
            guest.write(Gpa(gfn * PAGE + 8), gfn);
        }
        if let Some(rings) = &guest.rings {
            guest.mmu.dirty_log(MAIN, &mut [0]).unwrap();
            rings.begin(&guest);
        }
        guest
    }

    fn write_tables(&self) {
        for middle in 0..4 {
            let table = word(Gpa((MIDDLES + middle) * PAGE));
            for root in ROOTS {
                self.write(Gpa(root * PAGE + middle * 8), table);
            }
        }
        let large = |gfn| word(Gpa(gfn * PAGE)) | bits::PS;
        for page in (0..64).step_by(4) {
            let entry = match page {
                LARGE => large(BLOCKS_AT),
                NEWS_WINDOW => large(NEWS_TABLE),
                NEWS => word(Gpa(NEWS_TABLE * PAGE)),
                _ => word(leaf_entry(page)),
            };
            self.write(middle_entry(page), entry);
        }
        for page in 0..64 {
            let shown = match page {
                ..32 => data(page).0 / PAGE,
                PASSING..36 => PLACES[0] + page - PASSING,
                36..40 => PLACES[1] + page - 36,
                52..56 => MIDDLES + page - 52,
                56.. => LEAVES + page - 56,
                _ => continue,
            };
            self.write(leaf_entry(page), word(Gpa(shown * PAGE)));
        }
        for (n, shown) in
            (0..).zip([Self::news_page(0).0 / PAGE, BLOCKS_AT + 1, ROOTS[0], ROOTS[1]])
        {
            self.write(Gpa(NEWS_TABLE * PAGE + n * 8), word(Gpa(shown * PAGE)));
        }
    }

    /// The slot that comes and goes, of fresh memory.
    #[must_use]
    pub fn passing_slot() -> SlotConfig {
        let machine = Machine(MEMORY_AT + u64::from(PASSING_SLOT.0) * STRIDE);
        let memory = AllocatedMemory::at(4 * PAGE, machine);
        SlotConfig::new(PASSING_SLOT.0, Gpa(PLACES[0] * PAGE), Arc::new(memory))
    }

    /// Writes a word of guest-physical memory as a device does.
    pub fn write(&self, gpa: Gpa, value: u64) {
        assert_eq!(self.mmu.write_phys(gpa, &value.to_le_bytes()), 8);
    }

    /// A word of guest-physical memory, if there is memory.
    #[must_use]
    pub fn read(&self, gpa: Gpa) -> Option<u64> {
        let mut bytes = [0; 8];
        let done = self.mmu.memory().read(gpa, &mut bytes);
        (done == 8).then(|| u64::from_le_bytes(bytes))
    }

    /// A software vCPU.
    #[must_use]
    pub fn vcpu(&self) -> SoftVcpu {
        self.mmu.create_soft_vcpu(Regs::long_mode(ROOTS[0] * PAGE)).unwrap()
    }

    /// A software vCPU, with a ring if all have one: so large that it never fills, or a small one.
    #[must_use]
    pub fn logged_vcpu(&self, small: bool) -> SoftVcpu {
        let mut cpu = self.vcpu();
        if let Some(rings) = &self.rings {
            let capacity = if small { 4 << below(2) } else { 256 };
            cpu.vcpu_mut().set_dirty_ring(Some(rings.add(capacity)));
        }
        cpu
    }

    /// Loads one of the two roots.
    pub fn load_root(cpu: &mut SoftVcpu, root: u64) {
        cpu.vcpu_mut().set_cr3(ROOTS[root as usize] * PAGE).unwrap();
    }

    /// Prepares the next news: the entry to write at the address returned. When that is done,
    /// [`tell`](Self::tell).
    #[must_use]
    pub fn news(&self) -> (Gpa, u64) {
        let next = self.told() + 1;
        let page = Self::news_page(next);
        self.write(page, next);
        (Gpa(NEWS_TABLE * PAGE), word(page))
    }

    /// The entry as it is, with A and D clear.
    #[must_use]
    pub fn old_news(&self) -> (Gpa, u64) {
        (Gpa(NEWS_TABLE * PAGE), word(Self::news_page(self.told())))
    }

    fn news_page(number: u64) -> Gpa {
        Gpa((NEWS_TABLE + 1 + number % NEWS_PAGES) * PAGE)
    }

    /// Says that the entry has been written.
    pub fn tell(&self) {
        self.told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// The number of the last news; whoever flushes after this must see that, or later ones.
    #[must_use]
    pub fn told(&self) -> u64 {
        self.told.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Says that a vCPU has come to its end.
    pub fn has_worked(&self) {
        self.busy.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Whether some have not.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy.load(std::sync::atomic::Ordering::Relaxed) > 0
    }

    /// Says that a value has been written at a mark.
    pub fn mark(&self, mark: Mark, value: u64) {
        self.marks[mark as usize].store(value, std::sync::atomic::Ordering::Relaxed);
    }

    /// The marks of a slot: pages, and what has been written to one of them at least.
    #[must_use]
    pub fn marks(&self, slot: SlotId) -> Vec<([u64; 2], u64)> {
        let all = MARKED.into_iter().zip(&*self.marks);
        let of_slot = all.filter(|((of, _), _)| *of == slot);
        of_slot
            .map(|((_, pages), value)| (pages, value.load(std::sync::atomic::Ordering::Relaxed)))
            .collect()
    }

    /// Says that the instruction has been patched.
    pub fn patched(&self) {
        self.patches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// How often the instruction has been patched; whoever fetches it after this must find that, or more.
    #[must_use]
    pub fn patches(&self) -> u64 {
        self.patches.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// When all is over: the instruction is what its patches made of it.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub fn check_code(&self) {
        let words = self.data_words(CODE..CODE + 1);
        let bytes = (words[2] >> 32 | words[3] << 32).to_le_bytes();
        assert_eq!(bytes, [self.patches() as u8; INSTRUCTION], "R38: a patch, or half of one");
    }

    /// The devices, and what they were told.
    #[must_use]
    pub(crate) fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// The dirty rings, if vCPUs have some.
    #[must_use]
    pub(crate) fn rings(&self) -> Option<&Rings> {
        self.rings.as_deref()
    }

    /// The words of a slot's pages, as the host sees them.
    #[must_use]
    pub fn words(&self, slot: SlotId, pages: core::ops::Range<u64>) -> Vec<u64> {
        let memory = if slot == MAIN { &self.main } else { &self.blocks };
        let words = &memory.words()[(pages.start * WORDS) as usize..(pages.end * WORDS) as usize];
        words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// The words of data pages.
    #[must_use]
    pub fn data_words(&self, pages: core::ops::Range<u64>) -> Vec<u64> {
        self.words(MAIN, DATA + pages.start..DATA + pages.end)
    }

    /// Data pages as a range for the host.
    #[must_use]
    pub fn range(pages: core::ops::Range<u64>) -> PageRange {
        PageRange::Guest { base: data(pages.start), size: (pages.end - pages.start) * PAGE }
    }

    /// The guest's tables in slot 0 as one.
    #[must_use]
    pub fn tables() -> PageRange {
        PageRange::Guest { base: Gpa(0), size: DATA * PAGE }
    }

    /// What happened so far.
    #[must_use]
    pub(crate) fn tally(&self) -> Tally {
        let mut tally: Tally = self.mmu.stats().iter().collect();
        tally.extend(self.devices.tally());
        tally.extend(self.rings.iter().flat_map(|rings| rings.tally()));
        tally.insert("patches", self.patches());
        tally
    }

    /// The audit, which must find nothing.
    ///
    /// # Panics
    ///
    /// If it finds something.
    pub fn audit(&self) {
        self.mmu.audit().unwrap_or_else(|found| panic!("audit: {found}"));
    }

    /// Accesses of a vCPU, which must have flushed, to each page do what a walk of the guest's tables says.
    ///
    /// # Panics
    ///
    /// If one does not.
    pub fn agrees(&self, cpu: &mut SoftVcpu, user: bool) {
        for page in 0..64 {
            let kind = if one_in(2) { Access::read() } else { Access::write() };
            self.access_agrees(cpu, page, Access { user, ..kind });
        }
    }

    fn access_agrees(&self, cpu: &mut SoftVcpu, page: u64, access: Access) {
        let at = gva(page);
        let expected = cpu.vcpu().translate(at, Some(access)).map(|walk| walk.gpa);
        let before = expected.ok().and_then(|gpa| self.read(gpa));
        let write = access == Access { user: access.user, ..Access::write() };
        // What is written into tables must not change them, but for A and D.
        let tables = page >= 50 || page == NEWS_WINDOW;
        let value = match before {
            Some(value) if tables => value,
            _ => 0x5eed_0000 + page,
        };
        let done = match write {
            true => cpu.session().store(at, &value.to_le_bytes(), access.user).map(|()| value),
            false => cpu.session().load_u64(at, access.user),
        };
        let done = match done {
            Ok(value) => Ok(Some(value)),
            Err(SoftExit::Mmio(gpa)) if expected == Ok(gpa) => Ok(None),
            Err(SoftExit::Fault(fault)) => Err(fault),
            Err(other) => panic!("virtual page {page}, {access:?}: {other:?}"),
        };
        let flags = bits::A | bits::D;
        let expected: Result<Option<u64>, Fault> = expected.map(|gpa| self.read(gpa));
        let same = match (tables, done, expected) {
            (true, Ok(Some(done)), Ok(Some(expected))) => done | flags == expected | flags,
            (_, done, expected) => done == expected,
        };
        assert!(
            same,
            "virtual page {page}, {access:?}: found {done:x?}, the guest's tables say {expected:x?}"
        );
    }
}
