// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's memory at its start, and the first registers of its vCPUs.

use super::churn;
use super::layout::*;
use super::paging::{NX, P, PAGE, PageTables, U, W, index};
use super::programs::{MAGIC_SEED, Program, mix};
use super::switch::Spaces;
use crate::regs::Regs;

/// A guest: layout and page tables. Its memory is written by [`GuestImage::write`].
#[derive(Debug)]
pub struct GuestImage {
    layout: Layout,
    tables: PageTables,
    /// Guest-physical addresses of the window's page tables A and B.
    window_tables: [u64; 2],
    /// That of the page directory above them.
    window_directory: u64,
}

impl GuestImage {
    /// A guest with `memory_mib` MiB of memory ([`MIN_MEMORY_MIB`] at least) and `vcpus` vCPUs.
    pub fn new(memory_mib: u64, vcpus: usize) -> Result<Self, ImageError> {
        let layout = Layout::new(memory_mib, vcpus)?;
        let mut t = PageTables::new(layout.tables())?;
        let data = P | W | U | NX;
        t.map(CODE_GVA, CODE_GPA, CODE_PAGES, P | U)?;
        t.map(CONTROL_GVA, CONTROL_GPA, 1, data)?;
        t.map(STATES_GVA, STATES_GPA, 1, P | U | NX)?;
        for n in 0..vcpus as u64 {
            t.map(STACKS_GVA + n * STACK_STRIDE, STACKS_GPA + n * PAGE, 1, data)?;
        }
        t.map(TAILS_GVA, layout.tails_gpa(), vcpus as u64 * TAIL_PAGES, data)?;
        t.map(WINDOW_GVA, layout.windows_gpa(), WINDOW_PAGES, data)?;
        let a = t.leaf_table(WINDOW_GVA)?;
        let b = t.allocate()?;
        let directory = t.table(WINDOW_GVA, 2).unwrap_or_default();
        for (n, gpa) in [a, b, directory].into_iter().enumerate() {
            t.map(TABLES_GVA + n as u64 * PAGE, gpa, 1, data)?;
        }
        t.map(DATA_GVA, layout.data_gpa(), layout.data_pages(), data)?;
        t.map(OVERLAP_GVA, layout.overlap_gpa(), layout.data_pages(), data)?;
        for n in 0..SPARSE_PAGES {
            let gpa = layout.overlap_gpa() + n * PAGE;
            t.map(SPARSE_GVA + n * SPARSE_STRIDE, gpa, 1, data)?;
        }
        for window in [CHURN_GVA, CHURN_GVA + CHURN_SECOND] {
            t.map(window, CHURN_GPA, CHURN_PAGES, data)?;
        }
        Ok(GuestImage { layout, tables: t, window_tables: [a, b], window_directory: directory })
    }

    /// Where everything lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The value for CR3: 4-level paging, with EFER.NXE set.
    #[must_use]
    pub fn cr3(&self) -> u64 {
        self.tables.root()
    }

    /// Guest-physical address of the table that maps the lowest 512 GiB: code, control page and stacks
    /// are there.
    #[must_use]
    pub fn low_table(&self) -> u64 {
        self.tables.table(CODE_GVA, 3).unwrap_or_default()
    }

    /// Where `gva` is mapped at the start.
    #[must_use]
    pub fn translate(&self, gva: u64) -> Option<u64> {
        self.tables.translate(gva)
    }

    /// Guest-physical addresses of the page tables A and B of the window.
    #[must_use]
    pub fn window_tables(&self) -> [u64; 2] {
        self.window_tables
    }

    /// Guest-physical address of the page-directory entry of the window.
    #[must_use]
    pub fn window_pde_gpa(&self) -> u64 {
        self.window_directory + 8 * index(WINDOW_GVA, 2) as u64
    }

    /// Writes code, control page, window frames and page tables: `out` gets guest-physical addresses
    /// and bytes, never across a page boundary. All other memory is expected to hold zeros.
    pub fn write(&self, out: &mut dyn FnMut(u64, &[u8])) {
        let mut code = vec![0xcc; (CODE_PAGES * PAGE) as usize];
        for p in Program::ALL {
            let at = p.offset() as usize;
            code[at..at + p.code().len()].copy_from_slice(p.code());
        }
        for (n, page) in code.chunks_exact(PAGE as usize).enumerate() {
            out(CODE_GPA + n as u64 * PAGE, page);
        }
        self.reset_control(out);
        for set in 0..2 {
            for page in 0..WINDOW_PAGES {
                let gpa = self.layout.window_frame(set, page);
                let mut bytes = [0; PAGE as usize];
                bytes[..8].copy_from_slice(&mix(gpa, MAGIC_SEED).to_le_bytes());
                out(gpa, &bytes);
            }
        }
        self.tables.emit(out);
    }

    /// Writes what `churn` expects in the pages that it counts in, which must hold zeros.
    pub fn write_stable(&self, out: &mut dyn FnMut(u64, &[u8])) {
        for n in 0..churn::STABLE_PAGES {
            let gpa = churn::stable_gpa(&self.layout, n);
            let mut word = |offset, value: u64| out(gpa + offset, &value.to_le_bytes());
            word(churn::IDENTITY, churn::identity(churn::STABLE, n));
            for id in 0..self.layout.vcpus() as u64 {
                word(churn::COUNTS + id * 8, churn::count(n, id, 0));
            }
        }
    }

    /// Clears the control page, for another start of a program while no vCPU runs.
    ///
    /// `remap` also keeps its place in the page tables and the window: to start it again, write the whole
    /// image.
    pub fn reset_control(&self, out: &mut dyn FnMut(u64, &[u8])) {
        out(CONTROL_GPA, &[0; PAGE as usize]);
    }

    /// The guest-physical address of a word of the control page (an offset of [`control`]).
    #[must_use]
    pub fn control_gpa(&self, word: u64) -> u64 {
        CONTROL_GPA + (word & (PAGE - 8))
    }

    /// Registers of vCPU `id` at the start of a program without arguments.
    #[must_use]
    pub fn entry(&self, program: Program, id: usize) -> Regs {
        let mut regs = Regs { rip: CODE_GVA + program.offset(), rflags: 0x202, ..Regs::default() };
        regs.gpr[RSP] = STACKS_GVA + id as u64 * STACK_STRIDE + PAGE;
        if program == Program::ReadUnmapped {
            regs.gpr[RDI] = UNMAPPED_GVA;
        }
        regs
    }

    /// Registers of vCPU `id` for [`Program::Touch`].
    #[must_use]
    pub fn touch(&self, id: usize, seed: u64) -> Regs {
        let mut regs = self.entry(Program::Touch, id);
        let g = &mut regs.gpr;
        (g[RDI], g[RSI]) = (DATA_GVA, self.layout.data_pages());
        (g[RDX], g[RCX]) = (id as u64, self.layout.vcpus() as u64);
        g[8] = seed;
        (g[9], g[10]) = (OVERLAP_GVA, self.layout.data_pages());
        regs
    }

    /// Registers of vCPU `id` for [`Program::Remap`] with `rounds` rounds. All vCPUs must run it.
    #[must_use]
    pub fn remap(&self, id: usize, rounds: u64) -> Regs {
        let mut regs = self.entry(Program::Remap, id);
        let g = &mut regs.gpr;
        g[RDI] = CONTROL_GVA;
        (g[RSI], g[RDX]) = (id as u64, self.layout.vcpus() as u64);
        (g[RCX], g[RBX]) = (WINDOW_GVA, WINDOW_PAGES);
        let first = 8 * index(WINDOW_GVA, 1) as u64;
        (g[8], g[9]) = (TABLES_GVA + first, TABLES_GVA + PAGE + first);
        g[10] = TABLES_GVA + 2 * PAGE + 8 * index(WINDOW_GVA, 2) as u64;
        let leaf = P | W | U | NX;
        (g[11], g[12]) =
            (self.layout.window_frame(0, 0) | leaf, self.layout.window_frame(1, 0) | leaf);
        let table = P | W | U;
        (g[13], g[14]) = (self.window_tables[0] | table, self.window_tables[1] | table);
        g[15] = rounds;
        regs
    }

    /// Registers of vCPU `id` for [`Program::Precopy`].
    #[must_use]
    pub fn precopy(&self, id: usize, seed: u64) -> Regs {
        let mut regs = self.entry(Program::Precopy, id);
        let g = &mut regs.gpr;
        (g[RDI], g[RSI]) = (DATA_GVA, self.layout.data_pages());
        g[RDX] = id as u64;
        g[8] = precopy_state(id, seed);
        g[9] = CONTROL_GVA;
        (g[10], g[11]) = (TAILS_GVA + id as u64 * TAIL_PAGES * PAGE, TAIL_PAGES);
        regs
    }

    /// Registers of vCPU `id` for [`Program::Churn`]. [`GuestImage::write_stable`] comes first.
    #[must_use]
    pub fn churn(&self, id: usize, seed: u64) -> Regs {
        let mut regs = self.entry(Program::Churn, id);
        let g = &mut regs.gpr;
        (g[RDI], g[RSI]) = (CONTROL_GVA, id as u64);
        (g[RCX], g[RBX]) = (CHURN_GVA, CHURN_SECOND);
        g[RDX] = STATES_GVA;
        g[8] = precopy_state(id, seed);
        g[9] = TAILS_GVA + id as u64 * TAIL_PAGES * PAGE;
        (g[10], g[11]) = (DATA_GVA, SPARSE_GVA);
        regs
    }

    /// Registers of vCPU `id` for [`Program::Switch`]. The [spaces](super::switch::Spaces) of this image
    /// come first, and page faults must be [delivered](super::programs::deliver).
    #[must_use]
    pub fn switch(&self, spaces: &Spaces, id: usize, seed: u64) -> Regs {
        let mut regs = self.entry(Program::Switch, id);
        let g = &mut regs.gpr;
        (g[RDI], g[RSI]) = (spaces.mirror(spaces.desk(id)), CONTROL_GVA);
        g[RDX] = id as u64;
        (g[RCX], g[RBX]) = (spaces.root(id, 0), self.cr3());
        g[8] = precopy_state(id, seed);
        (g[9], g[10]) = (MIRROR_GVA, SPACE_GVA);
        regs
    }
}

/// The first state of the generators of `precopy`, `churn` and `switch`.
pub(super) fn precopy_state(id: usize, seed: u64) -> u64 {
    mix(id as u64 + 1, seed) | 1
}

const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
